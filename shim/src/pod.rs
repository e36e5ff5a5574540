//! The sandbox this shim stands for: when it is started, who may use it, and when the shim may go.
//!
//! It starts with the shim, before the caller has sent Create: the first container's specification is there already
//! and the VM boots meanwhile. A Create that turns out to want another configuration gets another sandbox, as long
//! as nothing lives in the first.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use oci_spec::runtime::Spec;
use sandbox::{Event, Events, Netns, Sandbox, SandboxExitCause, SandboxSpec};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use crate::options::RuntimeOptions;
use crate::publisher::Publisher;
use crate::record::{Process, Record};

/// How long the shim waits with nothing to do: for a caller that died between `start` and Create, or between the
/// last Delete and Shutdown. Longer than the 100 s that containerd takes to give up on a shim.
const IDLE_LIMIT: Duration = Duration::from_secs(120);

/// How long the last events may take to reach containerd.
const LAST_EVENTS_LIMIT: Duration = Duration::from_secs(3);

/// Why no sandbox could be started.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// The specification does not parse.
    #[error("the OCI specification (config.json) is not valid: {0}")]
    Spec(#[source] serde_json::Error),
    /// The configuration is unusable.
    #[error("{}", sandbox::error::chain(.0))]
    Config(#[from] sandbox::config::ConfigError),
    /// The specification asks for what makes no sandbox.
    #[error(transparent)]
    Sandbox(#[from] sandbox::Error),
    /// The shim is leaving.
    #[error("this shim has been shut down and is about to exit: start another one")]
    Closed,
}

/// The pod.
pub struct Pod {
    namespace: String,
    /// Its first container's id, or the one its annotations name.
    id: String,
    /// What `start` was given; a Create without options means the same.
    options: RuntimeOptions,
    publisher: Publisher,
    state: Mutex<State>,
    /// The bundle of a sandbox that came by the Sandbox service.
    sandbox_bundle: OnceLock<PathBuf>,
    creating: AtomicUsize,
    /// Containers came or went.
    changed: Notify,
    /// The caller said Shutdown and nothing is left.
    leave: Notify,
}

enum State {
    /// There was no specification yet.
    Waiting,
    Running(Running),
    /// What was running has been ended for good.
    Closed,
}

struct Running {
    sandbox: Sandbox,
    cgroups_path: Option<PathBuf>,
    netns: Option<PathBuf>,
    options: RuntimeOptions,
    /// Hands the sandbox's events to the publisher; ends after the sandbox.
    pump: JoinHandle<()>,
}

impl Pod {
    /// A pod without a sandbox.
    pub fn new(namespace: &str, id: &str, options: RuntimeOptions, publisher: Publisher) -> Self {
        Self {
            namespace: namespace.to_owned(),
            id: id.to_owned(),
            options,
            publisher,
            state: Mutex::new(State::Waiting),
            sandbox_bundle: OnceLock::new(),
            creating: AtomicUsize::new(0),
            changed: Notify::new(),
            leave: Notify::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The sandbox, if it was started.
    pub fn sandbox(&self) -> Option<Sandbox> {
        match &*self.state() {
            State::Running(running) => Some(running.sandbox.clone()),
            State::Waiting | State::Closed => None,
        }
    }

    /// The pod's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The pod's sandbox came by the Sandbox service, with this bundle: no event tells of it.
    pub fn keeps_sandbox(&self, bundle: &Path) {
        let _ = self.sandbox_bundle.set(bundle.to_owned());
    }

    /// The bundle of a sandbox that came by the Sandbox service; it holds the files of [`crate::pod_config`].
    pub fn sandbox_bundle(&self) -> Option<&Path> {
        self.sandbox_bundle.get().map(PathBuf::as_path)
    }

    /// What `delete` must know, should this process be killed. `task` stands for the container.
    pub fn record(&self, socket: &Path, task: Option<u32>) -> Record {
        let (vmm, cgroups_path, netns) = match &*self.state() {
            State::Running(running) => (
                running.sandbox.vmm_pid(),
                running.cgroups_path.clone(),
                running.netns.clone(),
            ),
            State::Waiting | State::Closed => (None, None, None),
        };
        Record {
            sandbox_id: self.id.clone(),
            socket: socket.to_owned(),
            cgroups_path,
            netns,
            shim: Process::of(std::process::id()),
            vmm: vmm.and_then(Process::of),
            task: task.and_then(Process::of),
        }
    }

    /// Starts the sandbox ahead of the first Create.
    pub fn start_early(self: &Arc<Self>, bundle: &Path) {
        let started = match std::fs::read(bundle.join("config.json")) {
            Ok(spec) => self.sandbox_for(&spec, None).map_err(|error| error.to_string()),
            // With the Sandbox API there is no specification yet.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = started {
            // Create reads it again and tells its caller.
            warn!(error, "cannot start the sandbox before Create");
        }
    }

    /// The sandbox for a new container. `options` are those of its Create.
    pub fn sandbox_for(
        self: &Arc<Self>,
        spec_json: &[u8],
        options: Option<RuntimeOptions>,
    ) -> Result<Sandbox, PodError> {
        let wanted = options.filter(|options| !options.is_default());
        let mut state = self.state();
        if let State::Closed = *state {
            return Err(PodError::Closed);
        }
        if let State::Running(current) = &*state {
            let same = wanted.as_ref().is_none_or(|wanted| *wanted == current.options);
            if same {
                return Ok(current.sandbox.clone());
            }
            // The caller's own Create is one of those counted.
            if !current.sandbox.containers().is_empty() || self.creating.load(Ordering::Relaxed) > 1 {
                info!("the container's runtime options differ from those of its pod: the pod's hold");
                return Ok(current.sandbox.clone());
            }
            info!("Create has other runtime options than start had: starting another sandbox");
        }
        let options = wanted.unwrap_or_else(|| self.options.clone());
        let spec: Spec = serde_json::from_slice(spec_json).map_err(PodError::Spec)?;
        let config = options.load()?.for_pod(&spec).map_err(sandbox::Error::from)?;
        let mut spec = SandboxSpec::from_oci(&self.id, &spec, &config)?;
        spec.namespace.clone_from(&self.namespace);
        let cgroups_path = spec.cgroups_path.clone();
        let netns = match &spec.netns {
            Netns::Path(path) => Some(path.clone()),
            Netns::Host | Netns::New => None,
        };
        let (sandbox, events) = Sandbox::start(spec, Arc::new(config));
        let pump = tokio::spawn(Arc::clone(self).pump(events));
        let running = State::Running(Running {
            sandbox: sandbox.clone(),
            cgroups_path,
            netns,
            options,
            pump,
        });
        if let State::Running(previous) = std::mem::replace(&mut *state, running) {
            tokio::spawn(async move { previous.sandbox.shutdown().await });
        }
        Ok(sandbox)
    }

    async fn pump(self: Arc<Self>, mut events: Events) {
        while let Some(event) = events.next().await {
            match &event {
                Event::SandboxExited { exit } if exit.cause != SandboxExitCause::Requested => {
                    warn!(reason = exit.message, cause = ?exit.cause, "the VM is gone");
                }
                Event::ContainerCreated { .. } | Event::Deleted { .. } => self.changed.notify_one(),
                _ => {}
            }
            if self.sandbox_bundle().is_none() || !is_about(&event, &self.id) {
                self.publisher.publish(event);
            }
        }
    }

    /// Announces a container in the making, until the guard is dropped.
    pub fn creating(self: &Arc<Self>) -> Creating {
        self.creating.fetch_add(1, Ordering::Relaxed);
        Creating(Arc::clone(self))
    }

    fn is_empty(&self) -> bool {
        self.creating.load(Ordering::Relaxed) == 0
            && self
                .sandbox()
                .is_none_or(|sandbox| sandbox.containers().is_empty())
    }

    /// The caller needs this shim no longer, it says: true when that is so, and then the shim leaves.
    pub fn may_leave(&self) -> bool {
        let empty = self.is_empty();
        if empty {
            self.leave.notify_one();
        }
        empty
    }

    /// The shim leaves, whatever there is.
    pub fn leave(&self) {
        self.leave.notify_one();
    }

    /// Resolves when the shim shall leave: it was told to, or nobody has used it for long.
    pub async fn done(&self) {
        loop {
            let idle = async {
                if self.is_empty() {
                    tokio::time::sleep(IDLE_LIMIT).await;
                } else {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                () = self.leave.notified() => return,
                () = self.changed.notified() => {}
                () = idle => {
                    if self.is_empty() {
                        warn!("no container for {} s: leaving", IDLE_LIMIT.as_secs());
                        return;
                    }
                }
            }
        }
    }

    /// Ends the sandbox and everything in it, and delivers the last events.
    pub async fn close(&self) {
        let state = std::mem::replace(&mut *self.state(), State::Closed);
        if let State::Running(Running { sandbox, pump, .. }) = state {
            sandbox.shutdown().await;
            drop(sandbox);
            if tokio::time::timeout(LAST_EVENTS_LIMIT, pump).await.is_err() {
                warn!("the sandbox has not ended its events");
            }
        }
        self.publisher.finish(LAST_EVENTS_LIMIT).await;
    }
}

/// Whether an event is about the init of this container.
fn is_about(event: &Event, id: &str) -> bool {
    match event {
        Event::ContainerCreated { container_id, .. } | Event::ContainerStarted { container_id, .. } => {
            container_id == id
        }
        Event::Exited { process, .. } | Event::Deleted { process, .. } => process.container_id == id,
        _ => false,
    }
}

/// A container is being made: the shim stays.
pub struct Creating(Arc<Pod>);

impl Drop for Creating {
    fn drop(&mut self) {
        self.0.creating.fetch_sub(1, Ordering::Relaxed);
        self.0.changed.notify_one();
    }
}
