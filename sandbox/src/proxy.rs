//! The host processes that stand for containers' processes (`kata-rs-task`): spawning them in the pod's network
//! namespace, hearing the signals they get, ending them. What a signal does to a container is not decided here.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use crate::error::{ErrorKind, kind_of_io};
use crate::spawn::{Child, Command, Ended};
use crate::spec::Netns;

/// How long a task may take to set itself up. Making a network namespace waits for others that are being made
/// or taken down.
const READY_TIMEOUT: Duration = Duration::from_secs(30);

/// Why the host process for a container's process could not be had.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// The program is missing.
    #[error(
        "the program {0} does not exist: `make install` puts it there, and the key `task` of the configuration \
         names it"
    )]
    NoProgram(PathBuf),
    /// The pod's network namespace cannot be opened.
    #[error("the network namespace {path} cannot be opened")]
    Netns {
        /// Where it should be.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// It could not be spawned.
    #[error("the host process for {id} cannot be started: {message}")]
    Spawn {
        /// The container or exec.
        id: String,
        /// What failed.
        message: String,
        /// The kernel's error.
        cause: io::Error,
    },
    /// It could not make its network namespace.
    #[error("the host process for {id} cannot make its network namespace")]
    NewNetns {
        /// The container or exec.
        id: String,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// It ended before it was ready.
    #[error("the host process for {id} ended before it was ready")]
    Died {
        /// The container or exec.
        id: String,
    },
    /// It did not become ready.
    #[error("the host process for {id} was not ready within {} s", READY_TIMEOUT.as_secs())]
    Silent {
        /// The container or exec.
        id: String,
    },
}

impl TaskError {
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::NoProgram(_) => ErrorKind::FailedPrecondition,
            Self::Netns { cause, .. } if cause.kind() == io::ErrorKind::NotFound => {
                ErrorKind::InvalidArgument
            }
            Self::Netns { cause, .. } | Self::Spawn { cause, .. } | Self::NewNetns { cause, .. } => {
                kind_of_io(cause)
            }
            Self::Died { .. } => ErrorKind::Internal,
            Self::Silent { .. } => ErrorKind::Unavailable,
        }
    }
}

/// A running task. Dropping it ends the process.
#[derive(Debug)]
pub(crate) struct Task {
    child: Arc<Child>,
    /// What is written here ends the process; so does closing it.
    commands: io::PipeWriter,
}

/// The signals a task gets, and its end. Whoever holds it must listen until `None`: that reaps the process.
#[derive(Debug)]
pub(crate) struct TaskSignals {
    child: Arc<Child>,
    pipe: pipe::Receiver,
    heard: VecDeque<u8>,
    reaped: bool,
}

/// Spawns a task for the process `id` and waits until it is set up.
///
/// Must be called inside a tokio runtime, on a thread that lives as long as the sandbox.
pub(crate) async fn spawn(program: &Path, id: &str, netns: &Netns) -> Result<(Task, TaskSignals), TaskError> {
    let failed = |message: &str, cause: io::Error| TaskError::Spawn {
        id: id.to_owned(),
        message: format!("{message}: {cause}"),
        cause,
    };
    let pipes = || -> io::Result<_> {
        let null = File::open("/dev/null")?;
        let (signals, signals_theirs) = io::pipe()?;
        let (commands_theirs, commands) = io::pipe()?;
        rustix::io::ioctl_fionbio(&signals, true)?;
        let signals = pipe::Receiver::from_owned_fd(OwnedFd::from(signals))?;
        Ok((null, signals, signals_theirs, commands_theirs, commands))
    };
    let (null, signals, signals_theirs, commands_theirs, commands) =
        pipes().map_err(|cause| failed("making its pipes", cause))?;
    let joined = match netns {
        Netns::Path(path) => Some(File::open(path).map_err(|cause| TaskError::Netns {
            path: path.clone(),
            cause,
        })?),
        Netns::New | Netns::Host => None,
    };
    let env: &[&str] = if *netns == Netns::New { &["NETNS=new"] } else { &[] };
    let fds = [
        null.as_fd(),
        null.as_fd(),
        null.as_fd(),
        signals_theirs.as_fd(),
        commands_theirs.as_fd(),
    ];
    let child = Command {
        program,
        args: &["kata-rs-task", id],
        env,
        fds: &fds,
        pid_namespace: false,
        netns: joined.as_ref().map(AsFd::as_fd),
        block_signals: true,
    }
    .spawn()
    .map_err(|error| match error.cause.kind() {
        io::ErrorKind::NotFound => TaskError::NoProgram(program.to_owned()),
        _ => TaskError::Spawn {
            id: id.to_owned(),
            message: error.to_string(),
            cause: error.cause,
        },
    })?;
    drop((signals_theirs, commands_theirs));
    let child = Arc::new(child);
    let task = Task {
        child: Arc::clone(&child),
        commands,
    };
    let mut signals = TaskSignals {
        child,
        pipe: signals,
        heard: VecDeque::new(),
        reaped: false,
    };
    // An early return drops both ends and the child with them, which kills and reaps it.
    match tokio::time::timeout(READY_TIMEOUT, signals.byte()).await {
        Ok(Some(0)) => Ok((task, signals)),
        Ok(Some(_)) => Err(TaskError::NewNetns {
            id: id.to_owned(),
            cause: io::Error::from_raw_os_error(signals.byte().await.unwrap_or(0).into()),
        }),
        Ok(None) => Err(TaskError::Died { id: id.to_owned() }),
        Err(_elapsed) => Err(TaskError::Silent { id: id.to_owned() }),
    }
}

impl Task {
    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// Ends it with an exit status, as the process it stood for ended.
    pub fn end(mut self, status: u32) {
        // A task that is gone already needs no status; one that somebody stopped must go on to read it.
        let _ = self.commands.write_all(&[status.try_into().unwrap_or(u8::MAX)]);
        self.child.resume();
    }
}

impl TaskSignals {
    /// The next signal. When the task was killed: that signal, once. `None`: the task has ended and was reaped.
    pub async fn next(&mut self) -> Option<u32> {
        if self.reaped {
            return None;
        }
        if let Some(signal) = self.byte().await {
            return Some(signal.into());
        }
        self.reaped = true;
        match self.child.wait().await {
            Ended::Killed(signal) => u32::try_from(signal).ok(),
            Ended::Exited(_) | Ended::Unknown => None,
        }
    }

    async fn byte(&mut self) -> Option<u8> {
        if self.heard.is_empty() {
            let mut bytes = [0; 64];
            let read = self.pipe.read(&mut bytes).await.unwrap_or(0);
            self.heard.extend(&bytes[..read]);
        }
        self.heard.pop_front()
    }
}
