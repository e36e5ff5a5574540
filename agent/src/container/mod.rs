//! A container: its storage, cgroup, init and further processes, from creation to deletion.
//!
//! Here is the order of things; `create` makes what it is about. What happens between clone3 and execve is in `child`, prepared by `plan`, `rootfs`,
//! `namespaces`, `capabilities`, `seccomp` and `exec`; `spawn` makes the process, `process` follows its life.

mod capabilities;
pub mod cgroup;
pub mod child;
mod create;
mod disks;
mod exec;
mod hugepages;
pub mod mount;
mod namespaces;
mod plan;
mod process;
mod rootfs;
mod seccomp;
mod spawn;
pub mod spec;
mod syscall;
pub mod target;
mod terminal;

use std::collections::HashMap;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use protocol::agent::list_processes_response::Process as ListedProcess;
use protocol::agent::{ContainerStatsResponse, CreateContainerRequest, CreateExecRequest};
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::oneshot;
use tokio::task::{AbortHandle, spawn_blocking};

use self::cgroup::{Cgroup, Watch};
use self::child::Plan;
pub use self::create::Engine;
use self::create::{Made, follow, make, pid_namespace_of, remove, standard_io};
use self::disks::Numbers;
pub use self::hugepages::HugePagesError;
use self::hugepages::Reserved;
pub use self::mount::last_errno;
use self::namespaces::Namespaces;
use self::plan::ExecParts;
pub use self::plan::sysctl;
pub use self::process::Process;
use self::process::{connect, parse_signal, window};
pub use self::spawn::SpawnError;
use self::spawn::{Born, Place, SharedPidNamespace};
use self::spec::{Resources, Spec, SpecError};
use crate::error::Error;
use crate::reaper::Status;
use crate::storage::Storage;

/// How often a session that does not die is killed, and how long killed processes have to be gone before that.
const SESSION_KILLS: usize = 50;
const SESSION_KILL_PAUSE: Duration = Duration::from_millis(2);

/// A container whose init was created.
pub struct Container {
    id: String,
    engine: Arc<Engine>,
    spec: Spec,
    /// Which disks stand for which of the specification's.
    numbers: Numbers,
    _huge_pages: Reserved,
    cgroup: Cgroup,
    storage: Mutex<Option<Storage>>,
    /// Kept while the container's processes may live in it.
    pid_namespace: Option<Arc<SharedPidNamespace>>,
    init: Arc<Process>,
    execs: Mutex<Execs>,
    paused: AtomicBool,
    /// Kills for want of memory that were told.
    oom_told: AtomicU64,
    oom_watch: Mutex<Option<AbortHandle>>,
}

/// The further processes, by exec id.
#[derive(Default)]
struct Execs {
    /// None while one is being created.
    known: HashMap<String, Option<Arc<Process>>>,
    /// The init has ended: no more.
    closed: bool,
}

/// Runs what may block on a thread for that.
///
/// # Errors
/// Those of the work, and [`Error::Internal`] when it did not come to its end.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(Error::Internal(error.to_string())))
}

impl Container {
    /// Makes a container up to the point where its init would execute. A failure leaves nothing behind.
    ///
    /// `neighbour` is the pid namespace of another container, for a request that names one.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn create(
        engine: &Arc<Engine>,
        request: CreateContainerRequest,
        neighbour: Option<OwnedFd>,
    ) -> Result<Arc<Self>, Error> {
        let mut spec: Spec = spec::parse("spec", &request.spec)?;
        spec::check_supported(&spec)?;
        let namespaces = Namespaces::new(&spec.linux.namespaces, request.pid_namespace.as_ref())?;
        let size = window(request.terminal_rows, request.terminal_columns)?;
        let id = request.container_id.clone();
        let stdio = request.stdio.clone().unwrap_or_default();
        let maker = Arc::clone(engine);
        let make = blocking(move || {
            let numbers = Numbers::find(&request.disks)?;
            numbers.apply(&mut spec.linux);
            let made = make(&maker, &spec, &request, namespaces, neighbour.as_ref(), size)?;
            Ok((spec, numbers, made))
        });
        let (made, streams) = tokio::join!(make, connect(&stdio, &engine.connector));
        let (spec, numbers, made) = made?;
        let Made {
            storage,
            cgroup,
            pid_namespace,
            born,
            plan,
            ends,
            huge_pages,
        } = made;
        let Born {
            pid,
            pidfd,
            exit,
            channel,
        } = born;
        let process = async {
            let streams = streams?;
            follow("", (pid, pidfd), channel, plan, ends, streams).await
        };
        let init = match process.await {
            Ok(init) => Arc::new(init),
            Err(error) => {
                // The cause is worth telling; what goes wrong on the way back is not.
                let _ = cgroup.kill();
                let _ = exit.await;
                let _ = cgroup.wait_empty().await;
                let _ = blocking(move || remove(storage, &cgroup)).await;
                return Err(error);
            }
        };
        let container = Arc::new(Self {
            id,
            engine: Arc::clone(engine),
            spec,
            numbers,
            _huge_pages: huge_pages,
            cgroup,
            storage: Mutex::new(Some(storage)),
            pid_namespace,
            init,
            execs: Mutex::default(),
            paused: AtomicBool::new(false),
            oom_told: AtomicU64::new(0),
            oom_watch: Mutex::new(None),
        });
        tokio::spawn(Arc::clone(&container).follow_init(exit));
        container.watch_memory();
        Ok(container)
    }

    /// The init's pid in the guest's own pid namespace.
    #[must_use]
    pub fn init_pid(&self) -> i32 {
        self.init.pid.as_raw_nonzero().get()
    }

    /// The pid namespace of its init.
    ///
    /// # Errors
    /// [`Error::State`] when that has exited.
    pub fn pid_namespace(&self) -> Result<OwnedFd, Error> {
        let namespace = pid_namespace_of(self.init_pid());
        // The pid belongs to the init as long as that lives, and then so does what was opened by it.
        if self.init.has_ended() {
            return Err(Error::State(format!("container {:?} has exited", self.id)));
        }
        namespace
    }

    fn execs(&self) -> MutexGuard<'_, Execs> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The process with this exec id; empty for the init.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>, Error> {
        if exec_id.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        let process = self.execs().known.get(exec_id).cloned().flatten();
        process.ok_or_else(|| Error::NotFound(format!("process {exec_id:?} of container {:?}", self.id)))
    }

    async fn follow_init(self: Arc<Self>, exit: oneshot::Receiver<Status>) {
        let status = exit.await.unwrap_or(255);
        let ran = self.init.ended().await;
        let others: Vec<_> = {
            let mut execs = self.execs();
            execs.closed = true;
            execs.known.values().flatten().cloned().collect()
        };
        // Without a pid namespace of its own nothing else ends them.
        let _ = self.cgroup.kill();
        for other in others {
            other.wait_finished().await;
        }
        self.init.finish_output().await;
        self.tell_memory().await;
        if ran {
            self.engine.events.exited(&self.id, "", status).await;
        }
        self.init.finished();
    }

    async fn follow_exec(self: Arc<Self>, process: Arc<Process>, exit: oneshot::Receiver<Status>) {
        let status = exit.await.unwrap_or(255);
        let ran = process.ended().await;
        process.finish_output().await;
        self.tell_memory().await;
        if ran {
            self.engine
                .events
                .exited(&self.id, &process.exec_id, status)
                .await;
        }
        process.finished();
    }

    /// Tells kills for want of memory as they happen.
    fn watch_memory(self: &Arc<Self>) {
        // Without the memory controller there are none.
        let Ok(mut events) = Watch::open(&self.cgroup, "memory.events") else {
            return;
        };
        let container = Arc::downgrade(self);
        let task = tokio::spawn(async move {
            while events.read().is_ok() && events.changed().await.is_ok() {
                let Some(container) = container.upgrade() else {
                    return;
                };
                container.tell_memory().await;
            }
        });
        *self.oom_watch.lock().unwrap_or_else(PoisonError::into_inner) = Some(task.abort_handle());
    }

    async fn tell_memory(&self) {
        let Ok(events) = self.cgroup.read("memory.events") else {
            return;
        };
        let kills = cgroup::oom_kills(&events);
        if self.oom_told.fetch_max(kills, Ordering::SeqCst) < kills {
            self.engine.events.out_of_memory(&self.id).await;
        }
    }

    /// Adds a process up to the point where it would execute.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn create_exec(self: &Arc<Self>, request: CreateExecRequest) -> Result<i32, Error> {
        let exec_id = request.exec_id.clone();
        {
            let mut execs = self.execs();
            if execs.closed || !self.init.is_running() {
                return Err(Error::State(format!("container {:?} is not running", self.id)));
            }
            if execs.known.contains_key(&exec_id) {
                return Err(Error::Exists(format!(
                    "process {exec_id:?} of container {:?}",
                    self.id
                )));
            }
            execs.known.insert(exec_id.clone(), None);
        }
        match self.make_exec(&exec_id, request).await {
            Ok((process, exit)) => {
                let pid = process.pid.as_raw_nonzero().get();
                let process = Arc::new(process);
                {
                    let mut execs = self.execs();
                    if execs.closed {
                        // The init has ended meanwhile, and took this process with it.
                        execs.known.remove(&exec_id);
                        return Err(Error::State(format!("container {:?} has exited", self.id)));
                    }
                    execs.known.insert(exec_id, Some(Arc::clone(&process)));
                }
                tokio::spawn(Arc::clone(self).follow_exec(process, exit));
                Ok(pid)
            }
            Err(error) => {
                self.execs().known.remove(&exec_id);
                Err(error)
            }
        }
    }

    async fn make_exec(
        self: &Arc<Self>,
        exec_id: &str,
        request: CreateExecRequest,
    ) -> Result<(Process, oneshot::Receiver<Status>), Error> {
        let size = window(request.terminal_rows, request.terminal_columns)?;
        let process: spec::Process = spec::parse("process", &request.process)?;
        spec::check_process_supported(&process)?;
        let stdio = request.stdio.unwrap_or_default();
        let container = Arc::clone(self);
        let wanted = stdio.clone();
        let make = blocking(move || {
            let (stdio, ends) = standard_io(&wanted, size)?;
            let parts = ExecParts {
                id: &container.id,
                init: container.init.pidfd()?,
                container: &container.spec,
                stdio,
            };
            let plan = plan::exec(&process, parts)?;
            let born = container.spawn_exec(&plan)?;
            Ok((plan, born, ends))
        });
        let (made, streams) = tokio::join!(make, connect(&stdio, &self.engine.connector));
        // A child without streams sees the gate close, and ends.
        let ((plan, born, ends), streams) = (made?, streams?);
        let process = follow(exec_id, (born.pid, born.pidfd), born.channel, plan, ends, streams).await?;
        Ok((process, born.exit))
    }

    fn spawn_exec(&self, plan: &Plan) -> Result<Born, Error> {
        let init = self.init_pid();
        let namespace = pid_namespace_of(init)?;
        let place = |cgroup| Place {
            namespaces: 0,
            pid_namespace: Some(namespace.as_fd()),
            cgroup,
        };
        match spawn::spawn(plan, place(self.cgroup.fd()), &self.engine.reaper) {
            // The container has cgroups of its own below its own: processes live only in the lowest ones (cgroup v2,
            // "No Internal Process Constraint").
            Err(SpawnError::Clone {
                source: rustix::io::Errno::BUSY,
                ..
            }) => {
                let cgroup = cgroup::of_process(&self.engine.cgroup_mount, init)
                    .ok_or_else(|| Error::State(format!("container {:?} has exited", self.id)))?;
                Ok(spawn::spawn(plan, place(cgroup.as_fd()), &self.engine.reaper)?)
            }
            result => Ok(result?),
        }
    }

    /// Forgets a further process that has exited, or kills one that was never started.
    ///
    /// # Errors
    /// [`Error::State`] while it runs, [`Error::NotFound`].
    pub async fn delete_exec(&self, exec_id: &str) -> Result<(), Error> {
        let process = self.process(exec_id)?;
        if process.is_running() {
            return Err(Error::State(format!("process {exec_id:?} is running")));
        }
        if process.is_alive() {
            // Gone already is fine.
            let _ = process.signal(Signal::KILL.as_raw() as u32);
        }
        process.wait_finished().await;
        self.execs().known.remove(exec_id);
        Ok(())
    }

    /// Signals one process. SIGKILL for a further process takes what that has started along: a probe whose time is up
    /// leaves nothing behind, and nothing keeps its output open. What made itself a session of its own stays.
    ///
    /// # Errors
    /// [`Error::NotFound`], and those of [`Process::signal`].
    pub async fn signal(&self, exec_id: &str, number: u32) -> Result<(), Error> {
        let process = self.process(exec_id)?;
        process.signal(number)?;
        if !exec_id.is_empty() && number == Signal::KILL.as_raw().unsigned_abs() {
            self.kill_session(process.pid).await?;
        }
        Ok(())
    }

    /// Kills the processes of a session whose leader was killed: several times, since they may be making others.
    async fn kill_session(&self, leader: Pid) -> Result<(), Error> {
        for _ in 0..SESSION_KILLS {
            let pids = self.cgroup.processes()?;
            let members = pids
                .into_iter()
                .filter_map(Pid::from_raw)
                .filter(|pid| rustix::process::getsid(Some(*pid)) == Ok(leader));
            let mut found = false;
            for member in members {
                found = true;
                // One that has ended needs no signal.
                let _ = kill_process(member, Signal::KILL);
            }
            if !found {
                return Ok(());
            }
            tokio::time::sleep(SESSION_KILL_PAUSE).await;
        }
        Ok(())
    }

    /// Signals every process.
    ///
    /// # Errors
    /// [`Error::Exited`] when there is none any more.
    pub async fn signal_all(&self, number: u32) -> Result<(), Error> {
        let signal = parse_signal(number)?;
        if !self.init.is_alive() {
            return Err(Error::Exited);
        }
        if signal == Signal::KILL {
            return Ok(self.cgroup.kill()?);
        }
        // Frozen, nobody escapes by making children meanwhile.
        let paused = self.paused.load(Ordering::SeqCst);
        if !paused {
            self.cgroup.freeze(true).await?;
        }
        let result = self.cgroup.processes().map(|pids| {
            for pid in pids.into_iter().filter_map(Pid::from_raw) {
                // One that has ended needs no signal.
                let _ = kill_process(pid, signal);
            }
        });
        if !paused {
            self.cgroup.freeze(false).await?;
        }
        Ok(result?)
    }

    /// Freezes or thaws.
    ///
    /// # Errors
    /// [`Error::State`] when it is so already, or nothing runs.
    pub async fn set_paused(&self, paused: bool) -> Result<(), Error> {
        if !self.init.is_running() {
            return Err(Error::State(format!("container {:?} is not running", self.id)));
        }
        if self.paused.swap(paused, Ordering::SeqCst) == paused {
            let what = if paused { "already paused" } else { "not paused" };
            return Err(Error::State(format!("container {:?} is {what}", self.id)));
        }
        Ok(self.cgroup.freeze(paused).await?)
    }

    /// Changes resource limits.
    ///
    /// # Errors
    /// [`Error`] with the limit that was refused.
    pub async fn update(self: &Arc<Self>, resources: &[u8]) -> Result<(), Error> {
        let mut resources: Resources = spec::parse("linux.resources", resources)?;
        self.numbers.apply_to_rules(&mut resources);
        let container = Arc::clone(self);
        // Lowering a memory limit waits for memory to be given back.
        blocking(move || Ok(container.cgroup.apply(&resources)?)).await
    }

    /// Reads the cgroup's counters.
    ///
    /// # Errors
    /// [`Error::Internal`].
    pub async fn stats(self: &Arc<Self>) -> Result<ContainerStatsResponse, Error> {
        let container = Arc::clone(self);
        blocking(move || Ok(cgroup::read_stats(&container.cgroup))).await
    }

    /// All processes.
    ///
    /// # Errors
    /// [`Error::Cgroup`].
    pub fn processes(&self) -> Result<Vec<ListedProcess>, Error> {
        let mut known: HashMap<i32, String> = HashMap::from([(self.init_pid(), String::new())]);
        for process in self.execs().known.values().flatten() {
            known.insert(process.pid.as_raw_nonzero().get(), process.exec_id.clone());
        }
        let pids = self.cgroup.processes()?;
        Ok(pids
            .into_iter()
            .map(|pid| ListedProcess {
                guest_pid: pid,
                known: known.contains_key(&pid),
                exec_id: known.get(&pid).cloned().unwrap_or_default(),
                command: command(pid),
                ..Default::default()
            })
            .collect())
    }

    /// Kills what is left, waits for all exits to be told, unmounts the storage and removes the cgroup.
    ///
    /// # Errors
    /// [`Error`] with what could not be removed; the rest is.
    pub async fn delete(self: Arc<Self>) -> Result<(), Error> {
        self.cgroup.kill()?;
        self.init.wait_finished().await;
        self.cgroup.wait_empty().await?;
        if let Some(watch) = self
            .oom_watch
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
        {
            watch.abort();
        }
        let Some(storage) = self.storage.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            return Ok(());
        };
        blocking(move || remove(storage, &self.cgroup)).await
    }
}

/// A process's command line, or its name where there is none.
fn command(pid: i32) -> String {
    let read = |file: &str| std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let line = read("cmdline");
    let text = if line.is_empty() { read("comm") } else { line };
    let text = String::from_utf8_lossy(&text);
    text.trim_end_matches(['\0', '\n']).replace('\0', " ")
}

/// Checks the name of a container: it becomes the name of directories.
///
/// # Errors
/// [`Error::Invalid`].
pub fn check_id(id: &str) -> Result<(), Error> {
    let well_formed = !id.is_empty() && id.len() <= 128 && !id.starts_with('.') && !id.contains(['/', '\0']);
    if well_formed {
        Ok(())
    } else {
        Err(SpecError::invalid("container_id", format!("{id:?} cannot name a container")).into())
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // Named for what it keeps alive until here.
        drop(self.pid_namespace.take());
    }
}
