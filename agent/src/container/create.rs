//! The making of processes and their surroundings: everything that may block, and what undoes it.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use protocol::agent::CreateContainerRequest;
use rustix::process::Pid;

use super::cgroup::Cgroup;
use super::child::Plan;
use super::hugepages::Reserved;
use super::namespaces::{self, Namespaces};
use super::plan::{self, InitParts, Stdio};
use super::process::Process;
use super::rootfs::has_foreign_dev;
use super::spawn::{self, Born, Place, SharedPidNamespace};
use super::spec::Spec;
use crate::error::Error;
use crate::events::Events;
use crate::reaper::Reaper;
use crate::stdio::{Ends, Pipes, Relays, Streams, Terminal};
use crate::storage::{Layout, Storage};
use crate::stream::Connector;

/// What all containers are made with.
pub struct Engine {
    pub layout: Layout,
    /// The cgroup that holds the containers'.
    pub cgroups: PathBuf,
    /// Where the cgroup hierarchy is mounted.
    pub cgroup_mount: PathBuf,
    pub reaper: Reaper,
    pub events: Events,
    pub connector: Connector,
    /// Made when the first container joins it.
    pub pod_pid_namespace: Mutex<Option<Arc<SharedPidNamespace>>>,
}

/// A container that exists but is not told to anybody yet.
pub(super) struct Made {
    pub storage: Storage,
    pub cgroup: Cgroup,
    pub pid_namespace: Option<Arc<SharedPidNamespace>>,
    pub born: Born,
    pub plan: Plan,
    pub ends: Ends,
    pub huge_pages: Reserved,
}

/// The blocking part of making a container. A failure leaves nothing behind.
pub(super) fn make(
    engine: &Engine,
    spec: &Spec,
    request: &CreateContainerRequest,
    namespaces: Namespaces,
    neighbour: Option<&OwnedFd>,
    size: (u16, u16),
) -> Result<Made, Error> {
    engine.layout.volumes.provide(&request.volumes)?;
    let mut storage = Storage::prepare(&engine.layout, &request.container_id, &request.rootfs)?;
    let cgroup = match Cgroup::create(&engine.cgroups, &request.container_id) {
        Ok(cgroup) => cgroup,
        Err(error) => {
            let _ = storage.remove();
            return Err(error.into());
        }
    };
    let mut process = || -> Result<_, Error> {
        let limits = spec
            .linux
            .resources
            .as_ref()
            .map(|resources| &resources.hugepage_limits[..]);
        let huge_pages = Reserved::new(limits.unwrap_or_default())?;
        if let Some(resources) = &spec.linux.resources {
            cgroup.apply(resources)?;
        }
        let stdio = request.stdio.clone().unwrap_or_default();
        let (stdio, ends) = standard_io(&stdio, size)?;
        let parts = InitParts {
            id: &request.container_id,
            namespaces,
            rootfs: &storage.rootfs(),
            mounts: storage.container_mounts(&engine.layout, &request.mounts)?,
            foreign_dev: has_foreign_dev(&request.mounts),
            read_only_rootfs: request.read_only_rootfs,
            stdio,
        };
        let plan = plan::init(spec, parts)?;
        let pid_namespace = match namespaces.pid {
            namespaces::Pid::Pod => Some(engine.pod_pid_namespace()?),
            namespaces::Pid::Own | namespaces::Pid::Guest | namespaces::Pid::Container => None,
        };
        let place = Place {
            namespaces: namespaces.flags,
            pid_namespace: pid_namespace
                .as_ref()
                .map(|namespace| namespace.fd())
                .or(neighbour.map(AsFd::as_fd)),
            cgroup: cgroup.fd(),
        };
        let born = spawn::spawn(&plan, place, &engine.reaper)?;
        Ok((pid_namespace, born, plan, ends, huge_pages))
    };
    match process() {
        Ok((pid_namespace, born, plan, ends, huge_pages)) => Ok(Made {
            storage,
            cgroup,
            pid_namespace,
            born,
            plan,
            ends,
            huge_pages,
        }),
        Err(error) => {
            let _ = remove(storage, &cgroup);
            Err(error)
        }
    }
}

impl Engine {
    fn pod_pid_namespace(&self) -> Result<Arc<SharedPidNamespace>, Error> {
        let mut namespace = self
            .pod_pid_namespace
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(namespace) = &*namespace {
            return Ok(Arc::clone(namespace));
        }
        let made = Arc::new(SharedPidNamespace::new(&self.reaper)?);
        *namespace = Some(Arc::clone(&made));
        Ok(made)
    }
}

pub(super) fn remove(mut storage: Storage, cgroup: &Cgroup) -> Result<(), Error> {
    let unmounted = storage.remove();
    cgroup.remove()?;
    Ok(unmounted?)
}

/// The process's and the agent's ends of its standard I/O.
pub(super) fn standard_io(
    wanted: &protocol::agent::Stdio,
    (rows, columns): (u16, u16),
) -> Result<(Stdio, Ends), Error> {
    if wanted.terminal {
        return Ok((Stdio::Terminal { rows, columns }, Ends::default()));
    }
    let pipes = Pipes::new(
        wanted.stdin_token != 0,
        wanted.stdout_token != 0,
        wanted.stderr_token != 0,
    )
    .map_err(|source| Error::Kernel {
        what: "make pipes".into(),
        source,
    })?;
    Ok((Stdio::Descriptors(pipes.theirs), pipes.ours))
}

/// Waits for a child to be ready, and joins its standard I/O to the host's streams.
pub(super) async fn follow(
    exec_id: &str,
    (pid, pidfd): (Pid, OwnedFd),
    channel: OwnedFd,
    plan: Plan,
    ends: Ends,
    streams: Streams,
) -> Result<Process, Error> {
    let (gate, terminal) = spawn::ready(channel, plan, &pidfd).await?;
    let terminal = terminal.map(Terminal::new).transpose()?.map(Arc::new);
    let relays = Relays::start(ends, terminal.clone(), streams)?;
    Ok(Process::new(exec_id, (pid, pidfd), gate, terminal, relays))
}

pub(super) fn pid_namespace_of(pid: i32) -> Result<OwnedFd, Error> {
    use rustix::fs::{Mode, OFlags, open};
    let path = format!("/proc/{pid}/ns/pid");
    open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|_| Error::State("the container's init has exited".into()))
}
