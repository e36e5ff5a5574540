//! One process that the host asked for: created, running, exited.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use protocol::agent;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, Signal};
use tokio::sync::watch;

use super::spawn::{Gate, SpawnError};
use super::terminal;
use crate::error::Error;
use crate::stdio::{Relays, Streams, Terminal};
use crate::stream::Connector;

/// Where a process is in its life.
#[derive(Debug)]
enum State {
    /// It waits to be executed.
    Created(Box<Gate>),
    /// It is being executed.
    Starting,
    Running,
    /// Its execution failed, so it never ran.
    Failed,
    Exited,
}

/// How far the end of a process has come, for those who wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    Alive,
    /// Its execution is under way, so its end may be no exit.
    Starting,
    /// It is executed, or failed to be.
    Settled,
    /// Its exit has been told, and its standard I/O is done.
    Finished,
}

/// A process of a container.
#[derive(Debug)]
pub struct Process {
    /// Empty for the container's init.
    pub exec_id: String,
    /// In the guest's own pid namespace.
    pub pid: Pid,
    pidfd: OwnedFd,
    terminal: Option<Arc<Terminal>>,
    state: Mutex<State>,
    phase: watch::Sender<Phase>,
    relays: Mutex<Option<Relays>>,
}

impl Process {
    /// A process that waits to be executed.
    #[must_use]
    pub fn new(
        exec_id: &str,
        (pid, pidfd): (Pid, OwnedFd),
        gate: Gate,
        terminal: Option<Arc<Terminal>>,
        relays: Relays,
    ) -> Self {
        Self {
            exec_id: exec_id.to_owned(),
            pid,
            pidfd,
            terminal,
            state: Mutex::new(State::Created(Box::new(gate))),
            phase: watch::Sender::new(Phase::Alive),
            relays: Mutex::new(Some(relays)),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Executes it.
    ///
    /// # Errors
    /// [`Error::State`] when it was started before or has exited, [`Error::Spawn`] when it cannot be executed.
    pub async fn start(&self) -> Result<(), Error> {
        let gate = {
            let mut state = self.state();
            match std::mem::replace(&mut *state, State::Starting) {
                State::Created(gate) => {
                    self.phase.send_replace(Phase::Starting);
                    gate
                }
                other => {
                    let what = match other {
                        State::Failed | State::Exited => "has already ended",
                        _ => "is already started",
                    };
                    *state = other;
                    return Err(Error::State(format!("the process {what}")));
                }
            }
        };
        let result = gate.open().await;
        *self.state() = match result {
            Err(SpawnError::Executable { .. } | SpawnError::Step { .. }) => State::Failed,
            // Killed meanwhile: that is an exit like any other.
            Ok(()) | Err(_) => State::Running,
        };
        self.phase.send_replace(Phase::Settled);
        match result {
            Err(error @ (SpawnError::Executable { .. } | SpawnError::Step { .. })) => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// [`Error::Exited`] when it has exited, [`Error::Invalid`] for no signal of Linux.
    pub fn signal(&self, number: u32) -> Result<(), Error> {
        if matches!(*self.state(), State::Exited | State::Failed) {
            return Err(Error::Exited);
        }
        // The state follows the exit with a delay; the descriptor knows at once.
        match rustix::process::pidfd_send_signal(&self.pidfd, parse_signal(number)?) {
            Err(Errno::SRCH) => Err(Error::Exited),
            Err(errno) => Err(Error::Kernel {
                what: format!("send signal {number}"),
                source: errno,
            }),
            Ok(()) => Ok(()),
        }
    }

    /// Sets the terminal's size. Without a terminal there is nothing to do.
    ///
    /// # Errors
    /// [`Error::State`] when the process has exited, [`Error::Invalid`] for an impossible size.
    pub fn resize(&self, rows: u32, columns: u32) -> Result<(), Error> {
        if matches!(*self.state(), State::Exited | State::Failed) {
            return Err(Error::State("the process has exited".into()));
        }
        let Some(terminal) = &self.terminal else {
            return Ok(());
        };
        let (rows, columns) = window(rows, columns)?;
        terminal::resize(terminal.master(), rows, columns).map_err(|source| Error::Kernel {
            what: "set the window size".into(),
            source,
        })
    }

    /// Whether it is created or runs.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        !matches!(*self.state(), State::Exited | State::Failed)
    }

    /// Whether the process is dead. The state follows with a delay; the kernel knows at once.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        // A pidfd that cannot be polled does not exist.
        poll(
            &mut fds,
            Some(&Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            }),
        )
        .is_ok_and(|ready| ready > 0)
    }

    /// Whether it was executed and has not exited.
    #[must_use]
    pub fn is_running(&self) -> bool {
        matches!(*self.state(), State::Running | State::Starting)
    }

    /// The process is dead. Waits until it is known whether it ever ran; gives false when it did not.
    pub async fn ended(&self) -> bool {
        // The sender lives as long as self.
        let _ = self
            .phase
            .subscribe()
            .wait_for(|phase| *phase != Phase::Starting)
            .await;
        let mut state = self.state();
        if matches!(*state, State::Failed) {
            return false;
        }
        *state = State::Exited;
        true
    }

    /// Waits until what the dead process wrote has reached the host.
    pub async fn finish_output(&self) {
        let relays = self.relays.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(mut relays) = relays {
            relays.finish().await;
            // Descendants may still hold the pipes, until the process is deleted.
            *self.relays.lock().unwrap_or_else(PoisonError::into_inner) = Some(relays);
        }
    }

    /// Its exit has been told.
    pub fn finished(&self) {
        self.phase.send_replace(Phase::Finished);
    }

    /// Waits for [`Process::finished`].
    pub async fn wait_finished(&self) {
        let _ = self
            .phase
            .subscribe()
            .wait_for(|phase| *phase == Phase::Finished)
            .await;
    }

    /// A descriptor of the process for others.
    ///
    /// # Errors
    /// Those of dup(2).
    pub fn pidfd(&self) -> Result<OwnedFd, Error> {
        rustix::io::fcntl_dupfd_cloexec(&self.pidfd, 3).map_err(|source| Error::Kernel {
            what: "use a descriptor of the container's init".into(),
            source,
        })
    }
}

/// A terminal's size as the kernel has it.
///
/// # Errors
/// [`Error::Invalid`].
pub fn window(rows: u32, columns: u32) -> Result<(u16, u16), Error> {
    match (u16::try_from(rows), u16::try_from(columns)) {
        (Ok(rows), Ok(columns)) => Ok((rows, columns)),
        _ => Err(Error::Invalid(format!(
            "a window of {rows} rows and {columns} columns is too large"
        ))),
    }
}

/// Checks a signal number of Linux on x86-64.
///
/// # Errors
/// [`Error::Invalid`].
pub fn parse_signal(number: u32) -> Result<Signal, Error> {
    let invalid = || Error::Invalid(format!("{number} is no signal of Linux"));
    let raw = i32::try_from(number)
        .ok()
        .filter(|raw| (1..=64).contains(raw))
        .ok_or_else(invalid)?;
    // SAFETY: the C library keeps 32 and 33 to itself, so sending them would break a program but not this one; any
    // number up to 64 is one that the kernel knows.
    Ok(unsafe { Signal::from_raw_unchecked(raw) })
}

/// Opens the streams that a process's standard I/O needs.
///
/// # Errors
/// [`Error::Stream`] with the stream's name.
pub async fn connect(stdio: &agent::Stdio, connector: &Connector) -> Result<Streams, Error> {
    let open = async |name: &'static str, wanted: bool, token: u64| {
        if !wanted || token == 0 {
            return Ok(None);
        }
        connector(token)
            .await
            .map(Some)
            .map_err(|source| Error::Stream { name, source })
    };
    let pipes = !stdio.terminal;
    let (stdin, stdout, stderr, terminal) = tokio::try_join!(
        open("standard input", pipes, stdio.stdin_token),
        open("standard output", pipes, stdio.stdout_token),
        open("standard error", pipes, stdio.stderr_token),
        open("terminal", stdio.terminal, stdio.terminal_token),
    )?;
    Ok(Streams {
        stdin,
        stdout,
        stderr,
        terminal,
    })
}
