//! Containers and their processes as state machines. Pure bookkeeping: nothing here waits, and the events that a
//! change causes are sent in the change, so their order is the order of the changes.
//!
//! A container's init is the last of its processes to exit: its exit is held back while an exec is being started.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use protocol::agent::ContainerStatsResponse;
use tokio::sync::watch;

use crate::api::{
    Exit, ProcessEntry, ProcessId, ProcessState, RootfsMount, SandboxExit, Status, Stdio, StdioUris,
};
use crate::disks::UsedDisk;
use crate::error::Error;
use crate::events::{Event, EventSender};
use crate::hooks::Hooks;
use crate::io::Io;
use crate::namespaces::Owner;
use crate::proxy::Task;
use crate::shares::ShownShare;
use crate::timeline::ContainerTimeline;

/// Exit status of a process that went down with its VM, as after SIGKILL.
pub(crate) const KILLED: u32 = 137;

/// What a process is going through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// An exec that the guest does not know yet.
    Registered,
    /// Made in the guest, not executed.
    Created,
    /// Being executed. Its exit may be heard before the answer to its start.
    Starting { exited: Option<Exit> },
    /// Executes.
    Running,
    /// Over.
    Stopped(Exit),
}

/// A process of a container.
#[derive(Debug)]
pub(crate) struct Process {
    pub stage: Stage,
    /// 0 until it has a host process.
    pub pid: u32,
    pub task: Option<Task>,
    pub io: Option<Arc<Io>>,
    pub tokens: Vec<u64>,
    pub uris: StdioUris,
    /// What an exec that was not started yet is to be made from.
    pub recipe: Option<(Vec<u8>, Stdio)>,
    /// Input was closed before the exec was started.
    pub stdin_closed: bool,
    /// Rows and columns of its terminal, when they were told before the exec was started.
    pub size: (u16, u16),
    /// Whether somebody is deleting it.
    pub deleting: bool,
    exit: watch::Sender<Option<Exit>>,
}

impl Process {
    pub fn new(stage: Stage, uris: StdioUris) -> Self {
        Self {
            stage,
            pid: 0,
            task: None,
            io: None,
            tokens: Vec::new(),
            uris,
            recipe: None,
            stdin_closed: false,
            size: (0, 0),
            deleting: false,
            exit: watch::Sender::new(None),
        }
    }

    /// Resolves once the process has exited.
    pub fn waiter(&self) -> watch::Receiver<Option<Exit>> {
        self.exit.subscribe()
    }

    /// Ends it without an event: waiters complete and the host process exits the same way.
    pub fn stop(&mut self, exit: Exit) {
        self.stage = Stage::Stopped(exit);
        self.exit.send_replace(Some(exit));
        if let Some(task) = self.task.take() {
            task.end(exit.status);
        }
    }

    fn is_starting(&self) -> bool {
        matches!(self.stage, Stage::Starting { .. })
    }

    /// Whether it may still exit with an event.
    fn is_alive(&self) -> bool {
        matches!(self.stage, Stage::Created | Stage::Running)
    }
}

/// Whether a container's processes are frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Freezer {
    Thawed,
    Freezing,
    Frozen,
    Thawing,
}

/// What a container is going through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Making,
    Made,
    Deleting,
}

/// What a container has attached to the VM.
#[derive(Debug, Default)]
pub(crate) struct Attached {
    pub shares: Vec<ShownShare>,
    pub disks: Vec<UsedDisk>,
}

/// A container.
#[derive(Debug)]
pub(crate) struct Container {
    pub phase: Phase,
    pub bundle: PathBuf,
    pub hooks: Hooks,
    pub rootfs: Vec<RootfsMount>,
    pub init: Process,
    pub execs: BTreeMap<String, Process>,
    pub freezer: Freezer,
    pub attached: Attached,
    pub last_stats: Option<ContainerStatsResponse>,
    pub timeline: ContainerTimeline,
    /// False for a pod's sandbox, of which the guest knows nothing.
    pub in_guest: bool,
    /// Whether it asks for the host's pid namespace.
    pub host_pids: bool,
    /// The init's exit, held back until no exec is being started.
    held: Option<Exit>,
}

impl Container {
    pub fn making(
        bundle: PathBuf,
        rootfs: Vec<RootfsMount>,
        uris: StdioUris,
        timeline: ContainerTimeline,
    ) -> Self {
        Self {
            phase: Phase::Making,
            bundle,
            hooks: Hooks::default(),
            rootfs,
            init: Process::new(Stage::Created, uris),
            execs: BTreeMap::new(),
            freezer: Freezer::Thawed,
            attached: Attached::default(),
            last_stats: None,
            timeline,
            in_guest: true,
            host_pids: false,
            held: None,
        }
    }

    pub fn process(&self, exec_id: &str) -> Option<&Process> {
        if exec_id.is_empty() {
            Some(&self.init)
        } else {
            self.execs.get(exec_id)
        }
    }

    pub fn process_mut(&mut self, exec_id: &str) -> Option<&mut Process> {
        if exec_id.is_empty() {
            Some(&mut self.init)
        } else {
            self.execs.get_mut(exec_id)
        }
    }

    /// A process's status as callers see it: those that run are paused with their container.
    pub fn status(&self, process: &Process) -> Status {
        match (process.stage, self.freezer) {
            (Stage::Registered | Stage::Created | Stage::Starting { .. }, _) => Status::Created,
            (Stage::Running, Freezer::Thawed) => Status::Running,
            (Stage::Running, Freezer::Freezing) => Status::Pausing,
            (Stage::Running, Freezer::Frozen | Freezer::Thawing) => Status::Paused,
            (Stage::Stopped(_), _) => Status::Stopped,
        }
    }

    pub fn state(&self, process: &Process) -> ProcessState {
        ProcessState {
            status: self.status(process),
            pid: process.pid,
            exit: match process.stage {
                Stage::Stopped(exit) => Some(exit),
                _ => None,
            },
            stdio: process.uris.clone(),
            bundle: self.bundle.clone(),
        }
    }

    /// The processes that exist on the host, init first.
    pub fn entries(&self) -> Vec<ProcessEntry> {
        [(&String::new(), &self.init)]
            .into_iter()
            .chain(&self.execs)
            .filter(|(_, process)| process.task.is_some())
            .map(|(exec_id, process)| ProcessEntry {
                pid: process.pid,
                exec_id: exec_id.clone(),
            })
            .collect()
    }

    /// Whether a new process may be started in it.
    pub fn accepts_execs(&self) -> bool {
        self.phase == Phase::Made
            && self.init.stage == Stage::Running
            && self.held.is_none()
            && self.freezer == Freezer::Thawed
    }

    /// Takes note of a process's exit.
    fn exited(&mut self, id: &str, exec_id: &str, exit: Exit, events: &EventSender) {
        if exec_id.is_empty() {
            match &mut self.init.stage {
                Stage::Starting { exited } => *exited = Some(exit),
                Stage::Created | Stage::Running => self.held = Some(exit),
                Stage::Registered | Stage::Stopped(_) => {}
            }
            self.release(id, events);
            return;
        }
        let Some(process) = self.execs.get_mut(exec_id) else {
            return;
        };
        match &mut process.stage {
            Stage::Starting { exited } => *exited = Some(exit),
            Stage::Created | Stage::Running => announce(ProcessId::exec(id, exec_id), process, exit, events),
            Stage::Registered | Stage::Stopped(_) => {}
        }
    }

    /// Lets the init's exit happen when nothing stands before it any more.
    fn release(&mut self, id: &str, events: &EventSender) {
        if self.execs.values().any(Process::is_starting) {
            return;
        }
        let Some(exit) = self.held.take() else {
            return;
        };
        // The agent reports execs before their init; one that it lost went down with the init.
        let killed = Exit {
            status: KILLED,
            exited_at: exit.exited_at,
        };
        for (exec_id, process) in self.execs.iter_mut().filter(|(_, process)| process.is_alive()) {
            announce(ProcessId::exec(id, exec_id), process, killed, events);
        }
        self.freezer = Freezer::Thawed;
        announce(ProcessId::init(id), &mut self.init, exit, events);
    }
}

/// Ends a process with its event.
fn announce(id: ProcessId, process: &mut Process, exit: Exit, events: &EventSender) {
    let pid = process.pid;
    process.stop(exit);
    events.send(Event::Exited {
        process: id,
        pid,
        exit,
    });
}

/// All containers of a sandbox.
#[derive(Debug)]
pub(crate) struct Containers {
    map: BTreeMap<String, Container>,
    events: EventSender,
    ended: Option<SandboxExit>,
    /// The end, not announced yet because a start still hangs in the air.
    unannounced: Option<SandboxExit>,
}

impl Containers {
    pub fn new(events: EventSender) -> Self {
        Self {
            map: BTreeMap::new(),
            events,
            ended: None,
            unannounced: None,
        }
    }

    pub fn ids(&self) -> Vec<String> {
        self.map.keys().cloned().collect()
    }

    pub fn iter(&self) -> impl Iterator<Item = (&String, &Container)> {
        self.map.iter()
    }

    /// A container, also one that is being made or deleted.
    pub fn get(&self, id: &str) -> Result<&Container, Error> {
        self.map.get(id).ok_or_else(|| Error::NoContainer(id.to_owned()))
    }

    pub fn get_mut(&mut self, id: &str) -> Result<&mut Container, Error> {
        self.map
            .get_mut(id)
            .ok_or_else(|| Error::NoContainer(id.to_owned()))
    }

    /// A container that is neither being made nor deleted.
    pub fn made(&mut self, operation: &'static str, id: &str) -> Result<&mut Container, Error> {
        let container = self.get_mut(id)?;
        let what = match container.phase {
            Phase::Made => return Ok(container),
            Phase::Making => "created",
            Phase::Deleting => "deleted",
        };
        Err(Error::Busy {
            operation,
            container: id.to_owned(),
            what,
        })
    }

    /// A container that is neither being made nor deleted and has something in the guest.
    pub fn in_guest(&mut self, operation: &'static str, id: &str) -> Result<&mut Container, Error> {
        let container = self.made(operation, id)?;
        if container.in_guest {
            Ok(container)
        } else {
            Err(Error::OnlySandbox {
                operation,
                container: id.to_owned(),
            })
        }
    }

    /// Who has a pid of the host. One whose process has ended may be somebody else's by now.
    pub fn owner_of(&self, pid: u32) -> Option<Owner> {
        let is_owner = |container: &Container| {
            container.phase == Phase::Made && container.init.pid == pid && container.init.task.is_some()
        };
        let (id, container) = self.map.iter().find(|(_, container)| is_owner(container))?;
        Some(match (container.in_guest, container.host_pids) {
            (true, _) => Owner::Container(id.clone()),
            (false, false) => Owner::Sandbox,
            (false, true) => Owner::HostPidSandbox,
        })
    }

    /// A process and its container.
    pub fn process(&self, id: &ProcessId) -> Result<(&Container, &Process), Error> {
        let container = self.get(&id.container_id)?;
        let process = container
            .process(&id.exec_id)
            .ok_or_else(|| Error::NoProcess(id.clone()))?;
        Ok((container, process))
    }

    pub fn process_mut(&mut self, id: &ProcessId) -> Result<&mut Process, Error> {
        self.get_mut(&id.container_id)?
            .process_mut(&id.exec_id)
            .ok_or_else(|| Error::NoProcess(id.clone()))
    }

    /// Takes an id.
    pub fn reserve(&mut self, id: &str, container: Container) -> Result<(), Error> {
        if self.map.contains_key(id) {
            return Err(Error::Exists(ProcessId::init(id)));
        }
        self.map.insert(id.to_owned(), container);
        Ok(())
    }

    /// Takes a container out, without an event.
    pub fn remove(&mut self, id: &str) -> Option<Container> {
        self.map.remove(id)
    }

    /// Announces a container that was made. One whose VM went down meanwhile exits at once.
    pub fn created(&mut self, id: &str) {
        let Some(container) = self.map.get_mut(id) else {
            return;
        };
        container.phase = Phase::Made;
        self.events.send(Event::ContainerCreated {
            container_id: id.to_owned(),
            pid: container.init.pid,
            bundle: container.bundle.clone(),
            rootfs: container.rootfs.clone(),
            stdio: container.init.uris.clone(),
        });
        if let Some(ended) = &self.ended {
            let exit = killed(ended.exited_at);
            container.exited(id, "", exit, &self.events);
        }
    }

    /// Announces that a process executes, and its exit if that was faster.
    pub fn started(&mut self, process: &ProcessId) {
        let Some(container) = self.map.get_mut(&process.container_id) else {
            return;
        };
        let Some(started) = container.process_mut(&process.exec_id) else {
            return;
        };
        let Stage::Starting { exited } = started.stage else {
            return;
        };
        started.stage = Stage::Running;
        let pid = started.pid;
        self.events.send(if process.is_init() {
            Event::ContainerStarted {
                container_id: process.container_id.clone(),
                pid,
            }
        } else {
            Event::ExecStarted {
                process: process.clone(),
                pid,
            }
        });
        if let Some(exit) = exited {
            container.exited(&process.container_id, &process.exec_id, exit, &self.events);
        }
        container.release(&process.container_id, &self.events);
        self.announce_end();
    }

    /// A start failed: the process is over, without events, and can only be deleted.
    pub fn start_failed(&mut self, process: &ProcessId, exit: Exit) {
        if let Some(container) = self.map.get_mut(&process.container_id) {
            if let Some(failed) = container.process_mut(&process.exec_id) {
                failed.stop(exit);
            }
            container.release(&process.container_id, &self.events);
        }
        self.announce_end();
    }

    /// The guest reports an exit.
    pub fn exited(&mut self, process: &ProcessId, exit: Exit) {
        match self.map.get_mut(&process.container_id) {
            Some(container) => {
                container.exited(&process.container_id, &process.exec_id, exit, &self.events);
            }
            None => tracing::debug!(%process, "the guest reports an exit that nobody waits for"),
        }
    }

    /// The VM is gone: everything that ran in it exits.
    pub fn all_exited(&mut self, end: SandboxExit) {
        let exit = killed(end.exited_at);
        for (id, container) in self
            .map
            .iter_mut()
            .filter(|(_, container)| container.phase != Phase::Making)
        {
            let execs: Vec<String> = container.execs.keys().cloned().collect();
            for process in std::iter::once(&container.init).chain(container.execs.values()) {
                if let Some(io) = &process.io {
                    io.abandon();
                }
            }
            for exec_id in execs {
                container.exited(id, &exec_id, exit, &self.events);
            }
            container.exited(id, "", exit, &self.events);
        }
        self.ended = Some(end.clone());
        self.unannounced = Some(end);
        self.announce_end();
    }

    /// Announces the sandbox's end once no start hangs in the air.
    fn announce_end(&mut self) {
        let settled = self.map.values().all(|container| {
            container.phase == Phase::Making
                || !(container.init.is_starting() || container.execs.values().any(Process::is_starting))
        });
        if settled && let Some(exit) = self.unannounced.take() {
            self.events.send(Event::SandboxExited { exit });
        }
    }

    /// Sends an event that is no change of a process's stage.
    pub fn send(&self, event: Event) {
        self.events.send(event);
    }
}

fn killed(exited_at: SystemTime) -> Exit {
    Exit {
        status: KILLED,
        exited_at,
    }
}

#[cfg(test)]
#[path = "container_tests.rs"]
mod tests;
