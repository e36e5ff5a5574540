//! The inside of a sandbox: what all calls share, how its VM comes up, and how it ends. What calls do with
//! containers is in `create` and `process`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use protocol::agent::Event as GuestEvent;
use protocol::agent::event::Kind;
use protocol::vmm::ExitCause;
use tokio::net::UnixStream;
use tokio::sync::{oneshot, watch};
use ttrpc::asynchronous::ClientStreamReceiver;

use crate::agent::{Agent, AgentError};
use crate::api::{Exit, ProcessId, SandboxExit, SandboxExitCause};
use crate::cgroup::{CgroupError, HostCgroup};
use crate::config::Config;
use crate::container::Containers;
use crate::disks::Disks;
use crate::error::{Error, ErrorKind, chain};
use crate::events::{Event, EventSender};
use crate::network::{PodNetwork, Scanning};
use crate::resize::Resize;
use crate::seqpacket::Seqpacket;
use crate::shares::Shares;
use crate::spec::SandboxSpec;
use crate::storage::MountHolder;
use crate::streams::{self, Router};
use crate::vm::{self, Vm, VmError, VmExit, console_words};
use crate::volumes::Volumes;

/// How long a VM whose agent hung up may take to say why it ends.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What all calls on a sandbox share. No lock of it is held while anything is waited for.
#[derive(Debug)]
pub(crate) struct Pod {
    pub spec: SandboxSpec,
    pub config: Arc<Config>,
    pub router: Arc<Router>,
    pub shares: Shares,
    /// Block devices that containers have in common.
    pub disks: Disks,
    pub volumes: Volumes,
    pub resize: Resize,
    /// Where shares are that receive mounts of the host.
    pub mounts: MountHolder,
    pub marks: Mutex<Marks>,
    /// How many things on the host are to go before nothing is left: processes to be reaped, the VM's cgroup.
    pub leftovers: watch::Sender<usize>,
    started: Instant,
    vm: Result<Arc<Vm>, Error>,
    pub network: PodNetwork,
    containers: Mutex<Containers>,
    agent: watch::Receiver<Option<Result<Agent, Error>>>,
    exit: watch::Sender<Option<SandboxExit>>,
    /// Why the end was brought about, when this process did it.
    reason: Mutex<Option<(SandboxExitCause, String)>>,
    /// The least `oom_score_adj` of the containers there were, of a pod of CRI's.
    oom_score: Mutex<Option<i32>>,
}

/// Stages of the start that are reached here, in µs since it began.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Marks {
    pub vmm_spawned: Option<u64>,
    pub agent_hello: Option<u64>,
    pub ready: Option<u64>,
}

impl Pod {
    /// Spawns the VMM and boots in the background.
    pub fn start(spec: SandboxSpec, config: Arc<Config>, events: EventSender) -> Arc<Self> {
        let started = Instant::now();
        let mut network = PodNetwork::default();
        // The namespace is read while the VMM starts.
        let launched = Scanning::begin(&spec.netns)
            .map_err(Error::from)
            .and_then(|scanning| {
                vm::launch(&spec, &config, monotonic_ns(), |blocks| {
                    let (found, devices) = scanning.finish(blocks)?;
                    network = found;
                    Ok(devices)
                })
            });
        let (agent_sender, agent) = watch::channel(None);
        let (vm, rest) = match launched {
            Ok(launched) => {
                let (vm, vsock, booted) = launched.split();
                (Ok(vm), Some((vsock, booted)))
            }
            Err(error) => (Err(Error::Start(Arc::new(error))), None),
        };
        let pod = Arc::new(Self {
            resize: Resize::new(spec.sizing),
            spec,
            config,
            router: Arc::default(),
            shares: Shares::default(),
            disks: Disks::default(),
            volumes: Volumes::default(),
            mounts: MountHolder::default(),
            marks: Mutex::default(),
            leftovers: watch::Sender::new(0),
            started,
            vm,
            network,
            containers: Mutex::new(Containers::new(events)),
            agent,
            exit: watch::Sender::new(None),
            reason: Mutex::default(),
            oom_score: Mutex::default(),
        });
        lock(&pod.marks).vmm_spawned = rest.is_some().then(|| pod.elapsed());
        match (&pod.vm, rest) {
            (Ok(vm), Some((vsock, booted))) => {
                tokio::spawn(supervise(Arc::clone(&pod), Arc::clone(vm)));
                tokio::spawn(boot(
                    Arc::clone(&pod),
                    Arc::clone(vm),
                    vsock,
                    booted,
                    agent_sender,
                ));
            }
            (Err(error), _) => {
                let error = error.clone();
                pod.set_reason(SandboxExitCause::StartFailed, error.to_string());
                agent_sender.send_replace(Some(Err(error)));
                pod.finish(None);
            }
            (Ok(_), None) => unreachable!("a VM comes with its channels"),
        }
        pod
    }

    /// µs since the sandbox began.
    pub fn elapsed(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// The containers. The guard must not live across an await.
    pub fn containers(&self) -> MutexGuard<'_, Containers> {
        lock(&self.containers)
    }

    /// The VM, whatever it is doing.
    pub fn vm(&self) -> Result<&Arc<Vm>, Error> {
        self.vm.as_ref().map_err(Clone::clone)
    }

    /// The agent, once the guest is ready for containers.
    pub async fn agent(&self) -> Result<Agent, Error> {
        if let Some(exit) = &*self.exit.borrow()
            && exit.cause != SandboxExitCause::StartFailed
        {
            return Err(Error::Gone(exit.message.clone()));
        }
        let mut agent = self.agent.clone();
        match agent.wait_for(Option::is_some).await.map(|agent| agent.clone()) {
            Ok(Some(result)) => result,
            _ => Err(Error::Gone("its start was given up".to_owned())),
        }
    }

    /// Waits until the VM is gone.
    pub async fn exited(&self) -> SandboxExit {
        let mut exit = self.exit.subscribe();
        match exit.wait_for(Option::is_some).await.map(|exit| exit.clone()) {
            Ok(Some(exit)) => exit,
            _ => unreachable!("the sender lives as long as this object"),
        }
    }

    /// Whether the VM is gone.
    pub fn is_gone(&self) -> bool {
        self.exit.borrow().is_some()
    }

    /// A call to the VMM or the agent failed: when that is because the VM went down, says so and why.
    pub async fn explain(&self, error: Error) -> Error {
        let lost = match &error {
            Error::Agent(cause) => matches!(**cause, AgentError::Lost { .. }),
            Error::Vm(cause) => matches!(**cause, VmError::Gone(_)),
            _ => false,
        };
        if !lost {
            return error;
        }
        let Ok(exit) = tokio::time::timeout(2 * LAST_WORDS, self.exited()).await else {
            return error;
        };
        match &*self.agent.borrow() {
            Some(Err(start)) => start.clone(),
            _ => Error::Gone(exit.message),
        }
    }

    /// A container of the pod is about to be made. The sandbox has the score of `pause`, which the host's out-of-memory
    /// killer shall spare because it uses nothing; a VM with containers shall be spared as the one of them that
    /// matters most.
    pub fn spare_as(&self, score: i32) {
        let mut least = lock(&self.oom_score);
        if least.is_some_and(|least| least <= score) {
            return;
        }
        *least = Some(score);
        if let Ok(vm) = &self.vm {
            vm::set_oom_score(vm.pid(), score);
        }
    }

    /// Brings the end about: kills the VM. The first reason counts.
    pub fn end(&self, cause: SandboxExitCause, message: &str) {
        self.set_reason(cause, message.to_owned());
        if let Ok(vm) = &self.vm {
            vm.kill();
        }
    }

    fn set_reason(&self, cause: SandboxExitCause, message: String) {
        lock(&self.reason).get_or_insert((cause, message));
    }

    /// The VM has ended, or never began.
    fn finish(&self, exit: Option<Arc<VmExit>>) {
        let ready = matches!(&*self.agent.borrow(), Some(Ok(_)));
        let reason = lock(&self.reason).clone();
        let (cause, message) = match (reason, exit) {
            (Some(reason), _) => reason,
            (None, Some(exit)) if ready => (exit_cause(&exit), exit.to_string()),
            (None, Some(exit)) => (SandboxExitCause::StartFailed, exit.to_string()),
            (None, None) => (SandboxExitCause::StartFailed, String::new()),
        };
        let exit = SandboxExit {
            cause,
            message,
            exited_at: SystemTime::now(),
        };
        tracing::debug!(sandbox = self.spec.id, cause = ?exit.cause, reason = exit.message, "the VM is gone");
        self.containers().all_exited(exit.clone());
        self.exit.send_replace(Some(exit));
    }

    fn guest_event(&self, event: GuestEvent) {
        match event.kind {
            Some(Kind::Exited(exited)) => {
                let process = ProcessId {
                    container_id: exited.container_id,
                    exec_id: exited.exec_id,
                };
                // The guest's clock is the guest's: the host's time is what callers can compare.
                let exit = Exit {
                    status: exited.status.min(255),
                    exited_at: SystemTime::now(),
                };
                let now = self.elapsed();
                let mut containers = self.containers();
                containers.exited(&process, exit);
                if process.is_init()
                    && let Ok(container) = containers.get_mut(&process.container_id)
                {
                    container.timeline.exited = Some(now);
                }
            }
            Some(Kind::OutOfMemory(event)) => {
                let containers = self.containers();
                if containers.get(&event.container_id).is_ok() {
                    containers.send(Event::OutOfMemory {
                        container_id: event.container_id,
                    });
                }
            }
            _ => tracing::debug!("the guest reports something that this release does not know"),
        }
    }
}

fn exit_cause(exit: &VmExit) -> SandboxExitCause {
    match exit.cause {
        Some(ExitCause::GuestShutdown) => SandboxExitCause::GuestShutdown,
        Some(ExitCause::GuestPanic | ExitCause::TripleFault) => SandboxExitCause::GuestCrashed,
        Some(ExitCause::Requested) => SandboxExitCause::Requested,
        Some(ExitCause::VmmError { .. }) | None => SandboxExitCause::VmmDied,
    }
}

/// Waits for the VM's end.
async fn supervise(pod: Arc<Pod>, vm: Arc<Vm>) {
    let exit = vm.exited().await;
    pod.finish(Some(exit));
}

/// Brings the guest up, and listens to its events until it hangs up.
async fn boot(
    pod: Arc<Pod>,
    vm: Arc<Vm>,
    vsock: Arc<Seqpacket>,
    booted: impl Future<Output = Result<(), VmError>>,
    ready: watch::Sender<Option<Result<Agent, Error>>>,
) {
    let (agent_sender, connected) = oneshot::channel();
    tokio::spawn(streams::dispatch(vsock, agent_sender, Arc::clone(&pod.router)));
    let (agent, events) = match come_up(&pod, &vm, booted, connected).await {
        Ok(up) => up,
        Err(error) => {
            let reason = lock(&pod.reason).clone();
            let error = match reason {
                Some((SandboxExitCause::Requested, message)) => Error::Gone(message),
                _ => Error::Start(Arc::new(error)),
            };
            tracing::debug!(sandbox = pod.spec.id, %error, "the sandbox did not start");
            pod.end(SandboxExitCause::StartFailed, &error.to_string());
            ready.send_replace(Some(Err(error)));
            return;
        }
    };
    lock(&pod.marks).ready = Some(pod.elapsed());
    ready.send_replace(Some(Ok(agent)));
    drop(ready);
    let pod = Arc::downgrade(&pod);
    listen(&pod, events).await;
    // A guest that goes down hangs up before its VMM can say why.
    if tokio::time::timeout(LAST_WORDS, vm.exited()).await.is_err()
        && let Some(pod) = pod.upgrade()
    {
        pod.end(
            SandboxExitCause::AgentLost,
            "the guest's agent closed its connection",
        );
    }
}

/// From a spawned VMM to a guest that is ready for containers.
async fn come_up(
    pod: &Pod,
    vm: &Arc<Vm>,
    booted: impl Future<Output = Result<(), VmError>>,
    connected: oneshot::Receiver<UnixStream>,
) -> Result<(Agent, ClientStreamReceiver<GuestEvent>), Error> {
    let vm_error = |error: VmError| Error::Vm(Arc::new(error));
    let agent_error = |error: AgentError| Error::Agent(Arc::new(error));
    let limit = pod.config.hello_timeout();
    let hello = async {
        booted.await.map_err(vm_error)?;
        let (placed, agent) = tokio::join!(place_in_cgroup(pod, vm), connect(vm, connected));
        placed?;
        agent
    };
    // Wiring is not cut short by the limit: what it has begun it must be able to take back.
    let (hello, network) = tokio::join!(tokio::time::timeout(limit, hello), pod.network.wire(pod, vm));
    let agent = match hello {
        Ok(Ok(agent)) => agent,
        // A guest that dies in the handshake shows as a broken connection first.
        Ok(Err(error)) => match &error {
            Error::Agent(cause) if matches!(**cause, AgentError::Handshake(_)) => {
                match tokio::time::timeout(LAST_WORDS, vm.exited()).await {
                    Ok(exit) => return Err(vm_error(VmError::Gone(exit))),
                    Err(_elapsed) => return Err(error),
                }
            }
            _ => return Err(error),
        },
        Err(_elapsed) => {
            let console = match tokio::time::timeout(LAST_WORDS, vm.metrics()).await {
                Ok(Ok(metrics)) => console_words(&metrics.console),
                _ => "the VMM does not answer either".to_owned(),
            };
            return Err(agent_error(AgentError::NeverSaidHello {
                seconds: limit.as_secs(),
                console,
            }));
        }
    };
    lock(&pod.marks).agent_hello = Some(pod.elapsed());
    let (configured, events) = tokio::join!(agent.configure(&pod.spec, network?), agent.events());
    match (configured, events) {
        (Ok(()), Ok(events)) => Ok((agent, events)),
        (Err(error), _) | (_, Err(error)) => match tokio::time::timeout(LAST_WORDS, vm.exited()).await {
            Ok(exit) => Err(vm_error(VmError::Gone(exit))),
            Err(_elapsed) => Err(error),
        },
    }
}

/// Waits for the agent's connection and shakes hands.
async fn connect(vm: &Vm, connected: oneshot::Receiver<UnixStream>) -> Result<Agent, Error> {
    match connected.await {
        Ok(stream) => Agent::connect(stream)
            .await
            .map_err(|error| Error::Agent(Arc::new(error))),
        Err(_dropped) => Err(VmError::Gone(vm.exited().await).into()),
    }
}

/// Moves the VMM where the caller wants its resources counted, beside the guest's boot: the kernel takes its time
/// for that, and would for a process made there too (creating a VM attaches a thread to the cgroup). What was
/// used until then, the kernel's image mostly, is counted where this process is.
async fn place_in_cgroup(pod: &Pod, vm: &Arc<Vm>) -> Result<(), Error> {
    let Some(path) = pod.spec.cgroups_path.clone() else {
        return Ok(());
    };
    let pid = vm.pid();
    let placed = tokio::task::spawn_blocking(move || {
        let Some(cgroup) = HostCgroup::create(&path)? else {
            return Ok((None, Ok(())));
        };
        let added = cgroup.add(pid);
        Ok::<_, CgroupError>((Some(cgroup), added))
    });
    let failed = |error: &CgroupError| Error::Other {
        kind: error.kind(),
        message: chain(error),
    };
    let (cgroup, added) = match placed.await {
        Ok(placed) => placed.map_err(|error| failed(&error))?,
        Err(error) => {
            return Err(Error::Other {
                kind: ErrorKind::Internal,
                message: format!("placing the VM in its cgroup failed: {error}"),
            });
        }
    };
    if let Some(cgroup) = cgroup {
        let leftovers = pod.leftovers.clone();
        leftovers.send_modify(|count| *count += 1);
        let vm = Arc::clone(vm);
        tokio::spawn(async move {
            vm.exited().await;
            let removed = tokio::task::spawn_blocking(move || cgroup.remove()).await;
            if let Ok(Err(error)) = removed {
                tracing::warn!(error = %chain(&error), "the VM's cgroup is left over");
            }
            leftovers.send_modify(|count| *count -= 1);
        });
    }
    added.map_err(|error| failed(&error))
}

/// Takes the guest's events until the stream ends.
async fn listen(pod: &Weak<Pod>, mut events: ClientStreamReceiver<GuestEvent>) {
    loop {
        match events.recv().await {
            Ok(Some(event)) => match pod.upgrade() {
                Some(pod) => pod.guest_event(event),
                None => return,
            },
            Ok(None) => return,
            Err(error) => {
                tracing::debug!(%error, "the stream of the guest's events broke");
                return;
            }
        }
    }
}

/// `CLOCK_MONOTONIC` in nanoseconds.
fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// No holder of these locks can panic half-way through a change.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
