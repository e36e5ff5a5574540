//! One pod, one VM: the API the doors call. Each call is a few lines here; what they share is in `pod`, the
//! longer ones are in `create` and `process`.

use std::sync::Arc;
use std::time::Duration;

use protocol::agent::ContainerStatsResponse;

use crate::api::{
    ContainerRequest, Deleted, ExecRequest, Exit, GuestInfo, ProcessEntry, ProcessId, ProcessState,
    SandboxExit, SandboxExitCause, Status,
};
use crate::config::Config;
use crate::container::{Freezer, Phase, Stage};
use crate::error::{Error, ErrorKind, chain};
use crate::events::{Event, EventSender, Events};
use crate::pod::{Pod, lock};
use crate::spec::SandboxSpec;
use crate::timeline::{ContainerTimeline, Timeline};
use crate::{create, process, resize, usage};

/// How long what is left on the host may take to go: processes that only leave a poll(2), and a cgroup.
const LEFTOVERS_TIMEOUT: Duration = Duration::from_secs(10);

/// A cheap handle to a sandbox. When the last one is dropped the VM is killed.
///
/// All calls may run at the same time. Those that change something run to their end even when their future is
/// dropped: a caller that gives up leaves no half-made container behind.
#[derive(Clone, Debug)]
pub struct Sandbox(Arc<Handle>);

/// Ends the VM with the last handle, while the sandbox's own tasks still hold the pod.
#[derive(Debug)]
struct Handle(Arc<Pod>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0
            .end(SandboxExitCause::Requested, "the VM was ended on request");
    }
}

impl Sandbox {
    /// Spawns the VMM and boots in the background; returns at once. A failure shows in [`Sandbox::ready`] and in
    /// every later call.
    ///
    /// Must be called inside a tokio runtime, on a thread that lives as long as the sandbox: the kernel ends its
    /// processes with that thread.
    #[must_use]
    pub fn start(spec: SandboxSpec, config: Arc<Config>) -> (Sandbox, Events) {
        let (sender, events) = EventSender::channel();
        (Self(Arc::new(Handle(Pod::start(spec, config, sender)))), events)
    }

    fn pod(&self) -> &Arc<Pod> {
        &self.0.0
    }

    /// Waits until the guest can make containers.
    ///
    /// # Errors
    /// Why it never will: [`Error::Start`], or [`Error::Gone`] after the VM has ended.
    pub async fn ready(&self) -> Result<(), Error> {
        self.pod().agent().await.map(drop)
    }

    /// Makes a container up to the point where its init would execute. Returns the pid of the host process that
    /// stands for its init.
    ///
    /// # Errors
    /// Everything it had done is undone. [`ErrorKind::AlreadyExists`] when the id is taken.
    pub async fn create_container(&self, request: ContainerRequest) -> Result<u32, Error> {
        to_its_end(create::create(Arc::clone(self.pod()), request)).await
    }

    /// Registers an exec. The guest hears of it when it is started.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`] when the exec id is taken, [`ErrorKind::FailedPrecondition`] when the
    /// container's init has exited.
    #[expect(
        clippy::unused_async,
        reason = "the API leaves room for telling the guest early"
    )]
    pub async fn create_exec(&self, request: ExecRequest) -> Result<(), Error> {
        process::register(self.pod(), request)
    }

    /// Executes a container's init or an exec. Returns the pid of the host process that stands for it.
    ///
    /// # Errors
    /// [`ErrorKind::ExecutableNotFound`] and [`ErrorKind::ExecutableNotPermitted`]; the process is then
    /// [`Status::Stopped`] and wants to be deleted. [`ErrorKind::FailedPrecondition`] when it was started before,
    /// and for an exec when the container does not run or is paused.
    pub async fn start_process(&self, process: &ProcessId) -> Result<u32, Error> {
        to_its_end(process::start(Arc::clone(self.pod()), process.clone())).await
    }

    /// Everything known about a process.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], also while its container is being made.
    #[expect(clippy::unused_async, reason = "one shape for all calls")]
    pub async fn state(&self, process: &ProcessId) -> Result<ProcessState, Error> {
        let containers = self.pod().containers();
        let (container, found) = containers.process(process)?;
        if container.phase == Phase::Making {
            return Err(Error::NoProcess(process.clone()));
        }
        Ok(container.state(found))
    }

    /// Sends a signal (its number on Linux) to a process, or to all processes of its container.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when it has exited, [`ErrorKind::FailedPrecondition`] for an exec that was not started.
    pub async fn signal(&self, process: &ProcessId, signal: u32, all: bool) -> Result<(), Error> {
        process::signal(self.pod(), process, signal, all).await
    }

    /// Waits until a process has exited; at once when it has.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], also when it is deleted while it is waited for without ever having run.
    pub async fn wait(&self, process: &ProcessId) -> Result<Exit, Error> {
        let mut exit = self.pod().containers().process(process)?.1.waiter();
        match exit.wait_for(Option::is_some).await.map(|exit| *exit) {
            Ok(Some(exit)) => Ok(exit),
            _ => Err(Error::NoProcess(process.clone())),
        }
    }

    /// Deletes a process that does not run; an init takes its container with it. Waits, for ten seconds at most,
    /// until its output has been read.
    ///
    /// # Errors
    /// [`ErrorKind::FailedPrecondition`] while it runs, [`ErrorKind::NotFound`] after it was deleted.
    pub async fn delete(&self, process: &ProcessId) -> Result<Deleted, Error> {
        let pod = Arc::clone(self.pod());
        if process.is_init() {
            to_its_end(create::delete(pod, process.container_id.clone())).await
        } else {
            to_its_end(process::delete_exec(pod, process.clone())).await
        }
    }

    /// Ends a process's input: it reads what was written, then end of file.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    #[expect(clippy::unused_async, reason = "one shape for all calls")]
    pub async fn close_stdin(&self, process: &ProcessId) -> Result<(), Error> {
        let mut containers = self.pod().containers();
        let process = containers.process_mut(process)?;
        process.stdin_closed = true;
        if let Some(io) = &process.io {
            io.close_stdin();
        }
        Ok(())
    }

    /// Sets the size of a process's terminal. Does nothing for a process without one.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::FailedPrecondition`] when it has exited.
    pub async fn resize(&self, process: &ProcessId, rows: u16, columns: u16) -> Result<(), Error> {
        {
            let mut containers = self.pod().containers();
            let in_guest = containers.get(&process.container_id)?.in_guest;
            let target = containers.process_mut(process)?;
            match target.stage {
                Stage::Stopped(_) => {
                    return Err(Error::State {
                        operation: "resize the terminal of",
                        process: process.clone(),
                        status: Status::Stopped,
                    });
                }
                _ if !target.uris.terminal || !in_guest => return Ok(()),
                Stage::Registered => {
                    target.size = (rows, columns);
                    return Ok(());
                }
                Stage::Created | Stage::Starting { .. } | Stage::Running => {}
            }
        }
        let agent = self.pod().agent().await?;
        match agent.resize(process, rows, columns).await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.pod().explain(error).await),
        }
    }

    /// The host processes that stand for a container's processes, init first.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    #[expect(clippy::unused_async, reason = "one shape for all calls")]
    pub async fn processes(&self, container: &str) -> Result<Vec<ProcessEntry>, Error> {
        Ok(self.pod().containers().get(container)?.entries())
    }

    /// Freezes all processes of a container.
    ///
    /// # Errors
    /// [`ErrorKind::FailedPrecondition`] when it does not run or is paused.
    pub async fn pause(&self, container: &str) -> Result<(), Error> {
        let pod = Arc::clone(self.pod());
        let id = container.to_owned();
        to_its_end(async move {
            set_freezer(&pod, "pause", &id, Freezer::Thawed, Freezer::Freezing)?;
            let result = match pod.agent().await {
                Ok(agent) => agent.pause(&id).await,
                Err(error) => Err(error),
            };
            settle_freezer(
                &pod,
                &id,
                result,
                Freezer::Freezing,
                Freezer::Frozen,
                Freezer::Thawed,
            )
            .await
        })
        .await
    }

    /// Thaws a container.
    ///
    /// # Errors
    /// [`ErrorKind::FailedPrecondition`] when it is not paused.
    pub async fn resume(&self, container: &str) -> Result<(), Error> {
        let pod = Arc::clone(self.pod());
        let id = container.to_owned();
        to_its_end(async move {
            set_freezer(&pod, "resume", &id, Freezer::Frozen, Freezer::Thawing)?;
            let result = match pod.agent().await {
                Ok(agent) => agent.resume(&id).await,
                Err(error) => Err(error),
            };
            settle_freezer(
                &pod,
                &id,
                result,
                Freezer::Thawing,
                Freezer::Thawed,
                Freezer::Frozen,
            )
            .await
        })
        .await
    }

    /// Applies new resource limits: the OCI runtime specification's `linux.resources` as JSON. The VM grows first when
    /// its containers may use more together than it has, and shrinks after when they may use less.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] when it is something else, [`ErrorKind::FailedPrecondition`] when the
    /// container has exited, [`ErrorKind::ResourceExhausted`] when the VM cannot become as large.
    pub async fn update(&self, container: &str, resources_json: &[u8]) -> Result<(), Error> {
        let resources = serde_json::from_slice(resources_json).map_err(|error| {
            Error::Invalid(format!(
                "the resources for container {container} are not valid: {error}"
            ))
        })?;
        {
            let mut containers = self.pod().containers();
            let target = containers.in_guest("update", container)?;
            let status = target.status(&target.init);
            if status == Status::Stopped {
                return Err(Error::State {
                    operation: "update",
                    process: ProcessId::init(container),
                    status,
                });
            }
        }
        let pod = Arc::clone(self.pod());
        let (id, resources_json) = (container.to_owned(), resources_json.to_vec());
        to_its_end(async move {
            let in_guest = async {
                match pod.agent().await?.update(&id, &resources_json).await {
                    Ok(()) => Ok(()),
                    Err(error) => Err(pod.explain(error).await),
                }
            };
            resize::update(&pod, &id, &resources, in_guest).await
        })
        .await
    }

    /// A container's counters, or a pod's for its sandbox, until it is deleted: also after its exit, and the last ones read once its VM is gone.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Unavailable`] when the VM is gone and none were read.
    pub async fn stats(&self, container: &str) -> Result<ContainerStatsResponse, Error> {
        let pod = self.pod();
        // Nobody knows of one that is not made yet, or not there any more.
        let in_guest = {
            let containers = pod.containers();
            let found = containers.get(container)?;
            (found.phase == Phase::Made).then_some(found.in_guest)
        };
        if !in_guest.ok_or_else(|| Error::NoContainer(container.to_owned()))? {
            return self.usage().await;
        }
        let result = match pod.agent().await {
            Ok(agent) => agent.stats(container).await,
            Err(error) => Err(error),
        };
        match result {
            Ok(stats) => {
                pod.containers().get_mut(container)?.last_stats = Some(stats.clone());
                Ok(stats)
            }
            Err(error) => {
                let error = pod.explain(error).await;
                let last = pod.containers().get(container)?.last_stats.clone();
                last.filter(|_| error.kind() == ErrorKind::Unavailable)
                    .ok_or(error)
            }
        }
    }

    /// What the whole pod uses, as the host counts it.
    async fn usage(&self) -> Result<ContainerStatsResponse, Error> {
        let path = self.pod().spec.cgroups_path.clone();
        let read = tokio::task::spawn_blocking(move || usage::read(path.as_deref()));
        let failed = |kind, message| Error::Other { kind, message };
        match read.await {
            Ok(Ok(stats)) => Ok(stats),
            Ok(Err(error)) => Err(failed(error.kind(), chain(&error))),
            Err(error) => Err(failed(ErrorKind::Internal, error.to_string())),
        }
    }

    /// The ids of the containers that exist, also of those that are being made or deleted.
    #[must_use]
    pub fn containers(&self) -> Vec<String> {
        self.pod().containers().ids()
    }

    /// When the stages of the start were reached.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] when the VM is gone.
    pub async fn timeline(&self) -> Result<Timeline, Error> {
        let pod = self.pod();
        let agent = pod.agent().await?;
        let (vmm, guest) = tokio::join!(pod.vm()?.timeline(), agent.guest_info());
        let vmm = vmm.map_err(|error| Error::Vm(Arc::new(error)))?;
        let guest = guest?;
        let marks = *lock(&pod.marks);
        let mut containers: Vec<ContainerTimeline> = pod
            .containers()
            .iter()
            .map(|(_, container)| container.timeline.clone())
            .collect();
        containers.sort_by_key(|container| container.requested);
        Ok(Timeline {
            vmm_spawned: marks.vmm_spawned,
            vmm_main: vmm.vmm_main,
            configured: vmm.configured,
            vm_created: vmm.vm_created,
            kernel_loaded: vmm.kernel_loaded,
            first_instruction: vmm.first_instruction,
            agent_connected: vmm.agent_connected,
            agent_hello: marks.agent_hello,
            ready: marks.ready,
            guest_agent_main: Some(guest.agent_main_us),
            guest_agent_hello: Some(guest.agent_hello_us),
            containers,
        })
    }

    /// What the guest says of itself.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] when the VM is gone.
    pub async fn guest_info(&self) -> Result<GuestInfo, Error> {
        let info = match self.pod().agent().await?.guest_info().await {
            Ok(info) => info,
            Err(error) => return Err(self.pod().explain(error).await),
        };
        Ok(GuestInfo {
            agent_release: info.agent_release,
            kernel_release: info.kernel_release,
            boot_id: info.boot_id,
            online_cpus: info.online_cpus,
            memory_total_bytes: info.memory_total_bytes,
            memory_available_bytes: info.memory_available_bytes,
            controllers: info.controllers,
        })
    }

    /// Pid of the VMM; `None` when it could not be started.
    #[must_use]
    pub fn vmm_pid(&self) -> Option<u32> {
        self.pod().vm().ok().map(|vm| vm.pid())
    }

    /// Waits until the VM is gone for any reason.
    pub async fn exited(&self) -> SandboxExit {
        self.pod().exited().await
    }

    /// Ends everything: kills the VM, reaps the VMM and all host processes. When it returns all waiters have
    /// their answers and all events are queued. May be called again.
    pub async fn shutdown(&self) {
        let pod = self.pod();
        pod.end(SandboxExitCause::Requested, "the VM was ended on request");
        pod.exited().await;
        let mut leftovers = pod.leftovers.subscribe();
        let gone = leftovers.wait_for(|count| *count == 0);
        if tokio::time::timeout(LEFTOVERS_TIMEOUT, gone).await.is_err() {
            tracing::warn!(
                sandbox = pod.spec.id,
                "something of the sandbox is left on the host"
            );
        }
    }
}

/// Runs a call as a task of its own, so that it is not cut short when its caller gives up.
async fn to_its_end<T: Send + 'static>(
    call: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Error> {
    match tokio::spawn(call).await {
        Ok(result) => result,
        Err(error) => Err(Error::Other {
            kind: ErrorKind::Internal,
            message: format!("the call was cut short: {error}"),
        }),
    }
}

fn set_freezer(
    pod: &Pod,
    operation: &'static str,
    id: &str,
    from: Freezer,
    to: Freezer,
) -> Result<(), Error> {
    let mut containers = pod.containers();
    let container = containers.in_guest(operation, id)?;
    if container.init.stage == Stage::Running && container.freezer == from {
        container.freezer = to;
        Ok(())
    } else {
        Err(Error::State {
            operation,
            process: ProcessId::init(id),
            status: container.status(&container.init),
        })
    }
}

/// Takes note of what became of freezing or thawing. A container that exited meanwhile is thawed already.
async fn settle_freezer(
    pod: &Pod,
    id: &str,
    result: Result<(), Error>,
    during: Freezer,
    done: Freezer,
    failed: Freezer,
) -> Result<(), Error> {
    {
        let mut containers = pod.containers();
        let mut event = None;
        if let Ok(container) = containers.get_mut(id)
            && container.freezer == during
        {
            container.freezer = if result.is_ok() { done } else { failed };
            let container_id = id.to_owned();
            event = result.is_ok().then_some(match done {
                Freezer::Frozen => Event::Paused { container_id },
                _ => Event::Resumed { container_id },
            });
        }
        if let Some(event) = event {
            containers.send(event);
        }
    }
    match result {
        Ok(()) => Ok(()),
        Err(error) => Err(pod.explain(error).await),
    }
}
