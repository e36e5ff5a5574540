//! Changing the size of a VM that runs: what its containers may use together decides (`demand`, `sizing`).
//!
//! One task does it, one change after the other: two callers cannot pull in different directions, and what has changed
//! while one was at work is in the next. A VM grows before a container may use more, and shrinks after a container
//! gives some back. It never becomes smaller than it was at boot.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use oci_spec::runtime::{LinuxResources, Spec};
use tokio::sync::{mpsc, oneshot};

use crate::demand::{Demand, Limits};
use crate::error::{Error, ErrorKind};
use crate::pod::{Pod, lock};
use crate::sizing::{self, Size, Sizing, SizingError};

/// How long a guest may take to put memory to use. It clears what describes the new pages, and little else.
const GROW_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a caller waits for a guest to give memory back. What is in use moves elsewhere first; what cannot be moved
/// stays, however long one waits.
const SHRINK_TIMEOUT: Duration = Duration::from_secs(5);

/// The size of a sandbox's VM.
#[derive(Debug)]
pub(crate) struct Resize {
    sizing: Sizing,
    demand: Mutex<Demand>,
    /// What the VM has, or was asked to give back.
    size: Mutex<Size>,
    jobs: mpsc::UnboundedSender<Job>,
}

/// Work for the task.
struct Job {
    pod: Arc<Pod>,
    kind: Kind,
    /// Told when it is done; nobody may be waiting.
    done: oneshot::Sender<Result<(), Error>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Make the VM at least as large as its containers want it.
    Grow,
    /// Make it as small as they let it be.
    Shrink,
}

impl Resize {
    /// A VM as it is at boot. Must be called inside a tokio runtime.
    pub fn new(sizing: Sizing) -> Self {
        let (jobs, queue) = mpsc::unbounded_channel();
        tokio::spawn(work(queue));
        Self {
            sizing,
            demand: Mutex::new(Demand::new(sizing.promised)),
            size: Mutex::new(sizing.boot),
            jobs,
        }
    }

    /// What the containers want, as far as the VM can have it.
    fn goal(&self, pod: &Pod) -> Size {
        let wanted = Size::wanted(lock(&self.demand).total(), &pod.config);
        let boot = self.sizing.boot;
        Size {
            vcpus: wanted.vcpus.max(boot.vcpus),
            memory_mib: wanted.memory_mib.max(boot.memory_mib),
        }
        .at_most(self.sizing.most)
    }

    fn size(&self) -> Size {
        *lock(&self.size)
    }
}

/// A new container's limits.
///
/// # Errors
/// [`Error::Invalid`] when they have no meaning.
pub(crate) fn limits(pod: &Pod, spec: &Spec) -> Result<Limits, Error> {
    let none = Limits::default();
    let limits = match sizing::resources(spec) {
        Some(resources) => none.updated(resources, pod.spec.in_pod),
        None => Ok(none),
    };
    limits.map_err(|error| Error::Invalid(error.to_string()))
}

/// A container comes: the VM grows where it must. A container's limit beyond what the VM can have is no limit, as one
/// beyond the host's memory is none on a host.
pub(crate) async fn arrive(pod: &Arc<Pod>, id: &str, limits: Limits) -> Result<(), Error> {
    lock(&pod.resize.demand).add(id, limits);
    grow(pod).await
}

/// A container is gone, or will not be made.
pub(crate) fn leave(pod: &Arc<Pod>, id: &str) {
    lock(&pod.resize.demand).remove(id);
    if pod.resize.goal(pod) != pod.resize.size() && !pod.is_gone() {
        drop(submit(pod, Kind::Shrink));
    }
}

/// Changes a container's limits: the VM first when they become larger, `in_guest` then, and the VM after it when they
/// become smaller.
pub(crate) async fn update(
    pod: &Arc<Pod>,
    id: &str,
    resources: &LinuxResources,
    in_guest: impl Future<Output = Result<(), Error>>,
) -> Result<(), Error> {
    let in_pod = pod.spec.in_pod;
    let before = lock(&pod.resize.demand).get(id);
    let after = before
        .updated(resources, in_pod)
        .map_err(|error: SizingError| Error::Invalid(error.to_string()))?;
    if after == before {
        return in_guest.await;
    }
    check(pod, id, before, after)?;
    // Until the guest has them, whichever needs more; that is never no limit.
    let larger = Limits {
        micro_cpus: before.micro_cpus.max(after.micro_cpus),
        memory_bytes: before.memory_bytes.max(after.memory_bytes),
        huge_page_bytes: before.huge_page_bytes.max(after.huge_page_bytes),
    };
    lock(&pod.resize.demand).update(id, larger);
    let changed = match grow(pod).await {
        Ok(()) => in_guest.await,
        Err(error) => Err(error),
    };
    lock(&pod.resize.demand).update(id, if changed.is_ok() { after } else { before });
    if pod.resize.goal(pod) != pod.resize.size() {
        // What could not be given back is in the log: the new limits hold all the same.
        let _ = submit(pod, Kind::Shrink).await;
    }
    changed
}

/// Whether the VM can become as large as an update wants it. Where the update asks for no more, what was asked for
/// before is not held against it.
fn check(pod: &Pod, id: &str, before: Limits, after: Limits) -> Result<(), Error> {
    let mut demand = lock(&pod.resize.demand).clone();
    demand.update(id, after);
    let wanted = Size::wanted(demand.total(), &pod.config);
    let most = pod.resize.sizing.most;
    let raises = |before: Option<u64>, after: Option<u64>| after.is_some() && after > before;
    if raises(before.micro_cpus, after.micro_cpus) && wanted.vcpus > most.vcpus {
        return Err(Error::TooLarge {
            container: id.to_owned(),
            wanted: format!("{} vCPUs", wanted.vcpus),
            most: most.vcpus.to_string(),
            key: "max_vcpus",
        });
    }
    if raises(before.memory_bytes, after.memory_bytes) && wanted.memory_mib > most.memory_mib {
        return Err(Error::TooLarge {
            container: id.to_owned(),
            wanted: format!("{} MiB of memory", wanted.memory_mib),
            most: format!("{} MiB", most.memory_mib),
            key: "max_memory_mib",
        });
    }
    Ok(())
}

async fn grow(pod: &Arc<Pod>) -> Result<(), Error> {
    let (goal, size) = (pod.resize.goal(pod), pod.resize.size());
    if goal.vcpus <= size.vcpus && goal.memory_mib <= size.memory_mib {
        return Ok(());
    }
    submit(pod, Kind::Grow).await.unwrap_or_else(|_dropped| {
        Err(Error::Other {
            kind: ErrorKind::Internal,
            message: "the size of the VM was not changed".to_owned(),
        })
    })
}

fn submit(pod: &Arc<Pod>, kind: Kind) -> oneshot::Receiver<Result<(), Error>> {
    let (done, result) = oneshot::channel();
    let pod = Arc::clone(pod);
    // Fails only while the runtime is going down; `result` says so then.
    let _ = pod.resize.jobs.clone().send(Job { pod, kind, done });
    result
}

/// Does one job after the other until the pod is gone.
async fn work(mut jobs: mpsc::UnboundedReceiver<Job>) {
    while let Some(Job { pod, kind, done }) = jobs.recv().await {
        let goal = pod.resize.goal(&pod);
        let result = match kind {
            Kind::Grow => enlarge(&pod, goal).await,
            Kind::Shrink => reduce(&pod, goal).await,
        };
        let result = match result {
            Err(error) => Err(pod.explain(error).await),
            Ok(()) => Ok(()),
        };
        if let (Kind::Shrink, Err(error), false) = (kind, &result, pod.is_gone()) {
            tracing::warn!(sandbox = pod.spec.id, %error, "the VM could not be made smaller");
        }
        drop(pod);
        // Who no longer waits does not need the answer.
        let _ = done.send(result);
    }
}

async fn enlarge(pod: &Pod, goal: Size) -> Result<(), Error> {
    let size = pod.resize.size();
    if goal.vcpus > size.vcpus {
        pod.agent().await?;
        pod.vm()?.set_vcpus(goal.vcpus).await?;
        let online = pod.agent().await?.set_online_cpus(goal.vcpus.into()).await?;
        if online < u32::from(goal.vcpus) {
            return Err(Error::Other {
                kind: ErrorKind::Unavailable,
                message: format!("the guest uses only {online} of its {} CPUs", goal.vcpus),
            });
        }
        lock(&pod.resize.size).vcpus = goal.vcpus;
    }
    if goal.memory_mib > size.memory_mib {
        // A guest that is still booting would be waited for in vain.
        pod.agent().await?;
        if !plug(pod, goal.memory_mib, GROW_TIMEOUT).await? {
            let has = plugged_mib(pod).await;
            // What it has got so far is taken back: nobody may use it.
            let _ = plug(pod, size.memory_mib, Duration::ZERO).await;
            return Err(Error::Other {
                kind: ErrorKind::ResourceExhausted,
                message: format!(
                    "the guest has put only {has} of {} MiB of additional memory to use within {} s: the host may be \
                     short of memory, or the guest too busy",
                    goal.memory_mib - pod.resize.sizing.boot.memory_mib,
                    GROW_TIMEOUT.as_secs()
                ),
            });
        }
        lock(&pod.resize.size).memory_mib = goal.memory_mib;
    }
    Ok(())
}

async fn reduce(pod: &Pod, goal: Size) -> Result<(), Error> {
    let size = pod.resize.size();
    if goal.vcpus < size.vcpus {
        let online = pod.agent().await?.set_online_cpus(goal.vcpus.into()).await?;
        if online > u32::from(goal.vcpus) {
            tracing::warn!(
                sandbox = pod.spec.id,
                online,
                wanted = goal.vcpus,
                "the guest keeps CPUs that it was asked to give back"
            );
        }
        lock(&pod.resize.size).vcpus = u8::try_from(online).unwrap_or(size.vcpus).min(size.vcpus);
    }
    if goal.memory_mib < size.memory_mib {
        let gone = plug(pod, goal.memory_mib, SHRINK_TIMEOUT).await?;
        // What the guest was asked for holds: it goes on giving back what it can, and may not plug it again.
        lock(&pod.resize.size).memory_mib = goal.memory_mib;
        if !gone {
            let kept = pod.resize.sizing.boot.memory_mib + plugged_mib(pod).await;
            tracing::warn!(
                sandbox = pod.spec.id,
                kept_mib = kept,
                wanted_mib = goal.memory_mib,
                "the guest has not given back all the memory yet: what its kernel uses cannot be moved"
            );
        }
    }
    Ok(())
}

/// Asks the guest to have so much memory in all.
async fn plug(pod: &Pod, memory_mib: u32, limit: Duration) -> Result<bool, Error> {
    let plugged = memory_mib.saturating_sub(pod.resize.sizing.boot.memory_mib);
    Ok(pod.vm()?.set_plugged_memory(plugged, limit).await?)
}

/// How much it has beyond what it booted with, in MiB; 0 when that cannot be told.
async fn plugged_mib(pod: &Pod) -> u32 {
    let Ok(vm) = pod.vm() else { return 0 };
    let metrics = vm.metrics().await;
    metrics.map_or(0, |metrics| {
        u32::try_from(metrics.plugged_memory_bytes >> 20).unwrap_or(u32::MAX)
    })
}
