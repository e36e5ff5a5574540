//! Makes a process from a [`Plan`]: clone3, and the conversation with the child until it waits to be executed.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, PidfdGetfdFlags, pidfd_getfd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

use super::child::{self, Channel, Message, Plan, Stage, Step};
use super::syscall::{self, Cloned};
use crate::reaper::{Reaper, Status};
use crate::stream::watch_fd;

/// Why a process could not be made or executed.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The kernel makes no process.
    #[error("cannot make a process: {what}: {source}")]
    Clone { what: &'static str, source: Errno },
    /// A step of the child failed.
    #[error("cannot {what}: {source}")]
    Step {
        what: String,
        /// Whether it was a mount.
        mount: bool,
        source: Errno,
    },
    /// There is no executable, or it cannot be executed.
    #[error("{message}")]
    Executable { message: String, source: Errno },
    /// The child ended without a word.
    #[error("the process ended before it could be executed{0}")]
    Ended(String),
}

/// A child that has been cloned and works through its plan.
#[derive(Debug)]
pub struct Born {
    pub pid: Pid,
    pub pidfd: OwnedFd,
    /// Gives the status when it has ended.
    pub exit: oneshot::Receiver<Status>,
    /// The agent's end of the conversation.
    pub channel: OwnedFd,
}

/// A child that waits to be executed.
#[derive(Debug)]
pub struct Gate {
    channel: AsyncFd<OwnedFd>,
    plan: Plan,
}

/// Where a process is put.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// CLONE_NEW* flags.
    pub namespaces: u64,
    /// A pid namespace that exists; None for the agent's or, by flag, a new one.
    pub pid_namespace: Option<BorrowedFd<'a>>,
    pub cgroup: BorrowedFd<'a>,
}

/// Clones. Blocks for as long as the kernel copies.
///
/// # Errors
/// [`SpawnError::Clone`].
pub fn spawn(plan: &Plan, place: Place<'_>, reaper: &Reaper) -> Result<Born, SpawnError> {
    let Some(namespace) = place.pid_namespace else {
        return clone(plan, place, reaper);
    };
    // Only children of a thread that has joined are born there, and the thread cannot make others for the agent any
    // more: it ends right after.
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                syscall::join_pid_namespace(namespace).map_err(fail("join the pid namespace"))?;
                clone(plan, place, reaper)
            })
            .join()
            .unwrap_or(Err(SpawnError::Clone {
                what: "the thread for it ended",
                source: Errno::AGAIN,
            }))
    })
}

fn fail(what: &'static str) -> impl FnOnce(Errno) -> SpawnError {
    move |source| SpawnError::Clone { what, source }
}

fn clone(plan: &Plan, place: Place<'_>, reaper: &Reaper) -> Result<Born, SpawnError> {
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(fail("make a socket"))?;
    let theirs = Channel(theirs);
    let maker = reaper.maker();
    // SAFETY: the child runs child::run and nothing else, which keeps to what is allowed there and never returns.
    match unsafe { syscall::clone3(place.namespaces, Some(place.cgroup)) }.map_err(fail("clone3"))? {
        Cloned::Child => child::run(plan, &theirs),
        Cloned::Parent(pid, pidfd) => Ok(Born {
            exit: maker.made(pid),
            pid,
            pidfd,
            channel: ours,
        }),
    }
}

/// Waits until a child is ready to be executed; gives the gate and the terminal's master.
///
/// # Errors
/// [`SpawnError`]; the child has then ended or is about to.
pub async fn ready(
    channel: OwnedFd,
    mut plan: Plan,
    pidfd: &OwnedFd,
) -> Result<(Gate, Option<OwnedFd>), SpawnError> {
    plan.give_up_descriptors();
    rustix::io::ioctl_fionbio(&channel, true).map_err(fail("use a socket"))?;
    let channel =
        watch_fd(channel, Interest::READABLE).map_err(|error| SpawnError::Ended(format!(": {error}")))?;
    let gate = Gate { channel, plan };
    match gate.message().await? {
        Some(Message::Ready { terminal: -1 }) => Ok((gate, None)),
        Some(Message::Ready { terminal }) => {
            let terminal =
                pidfd_getfd(pidfd, terminal, PidfdGetfdFlags::empty()).map_err(fail("get its terminal"))?;
            Ok((gate, Some(terminal)))
        }
        Some(Message::Failed { stage, errno }) => Err(gate.explain(stage, errno)),
        None => Err(SpawnError::Ended(String::new())),
    }
}

impl Gate {
    /// Lets the child execute its program.
    ///
    /// # Errors
    /// [`SpawnError::Executable`] and others, when the child is still the child.
    pub async fn open(self) -> Result<(), SpawnError> {
        rustix::net::send(self.channel.get_ref(), &[1], SendFlags::NOSIGNAL)
            .map_err(|_| SpawnError::Ended(String::new()))?;
        match self.message().await? {
            // The child's end was closed by its execution.
            None => Ok(()),
            Some(Message::Failed { stage, errno }) => Err(self.explain(stage, errno)),
            Some(Message::Ready { .. }) => Err(SpawnError::Ended(": it spoke out of turn".into())),
        }
    }

    /// None at the end of the conversation.
    async fn message(&self) -> Result<Option<Message>, SpawnError> {
        let mut bytes = [0; Message::SIZE];
        let received = self
            .channel
            .async_io(Interest::READABLE, |channel| {
                Ok(rustix::net::recv(channel, &mut bytes, RecvFlags::empty())?.1)
            })
            .await;
        match received {
            Ok(0) => Ok(None),
            // A socket whose other end was closed with something unread.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(None),
            Ok(Message::SIZE) => Message::decode(bytes)
                .map(Some)
                .ok_or_else(|| SpawnError::Ended(": it spoke nonsense".into())),
            Ok(length) => Err(SpawnError::Ended(format!(": it spoke {length} bytes"))),
            Err(error) => Err(SpawnError::Ended(format!(": {error}"))),
        }
    }

    fn explain(&self, stage: Stage, errno: Errno) -> SpawnError {
        match stage {
            Stage::Step(index) => {
                let step = usize::try_from(index)
                    .ok()
                    .and_then(|index| self.plan.steps.get(index));
                SpawnError::Step {
                    what: step.map_or_else(|| format!("do step {index}"), Step::describe),
                    mount: matches!(step, Some(Step::Mount { .. })),
                    source: errno,
                }
            }
            Stage::LastFilter => SpawnError::Step {
                what: "linux.seccomp: install the filter".into(),
                mount: false,
                source: errno,
            },
            Stage::Lookup | Stage::Execute => SpawnError::Executable {
                message: self.plan.program.explain(errno, stage == Stage::Execute),
                source: errno,
            },
        }
    }
}

/// A pid namespace that containers share. Its first process takes in orphans and lives as long as this does.
#[derive(Debug)]
pub struct SharedPidNamespace {
    namespace: OwnedFd,
    holder: OwnedFd,
}

impl SharedPidNamespace {
    /// Makes one.
    ///
    /// # Errors
    /// [`SpawnError::Clone`].
    pub fn new(reaper: &Reaper) -> Result<Self, SpawnError> {
        let maker = reaper.maker();
        // SAFETY: the child runs hold_namespace only, which makes system calls and never returns.
        let (pid, holder) =
            match unsafe { syscall::clone3(libc::CLONE_NEWPID as u64, None) }.map_err(fail("clone3"))? {
                Cloned::Child => hold_namespace(),
                Cloned::Parent(pid, holder) => (pid, holder),
            };
        drop(maker);
        let path = format!("/proc/{}/ns/pid", pid.as_raw_nonzero());
        let namespace = openat(CWD, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(fail("open the pid namespace"))?;
        Ok(Self { namespace, holder })
    }

    /// For [`Place::pid_namespace`].
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }
}

impl Drop for SharedPidNamespace {
    fn drop(&mut self) {
        // Its end is the end of every process of the namespace.
        let _ = rustix::process::pidfd_send_signal(&self.holder, rustix::process::Signal::KILL);
    }
}

/// The first process of a shared namespace: reaps until it is killed.
fn hold_namespace() -> ! {
    syscall::close_all_but(-1, -1);
    // As who looks for it in a pod knows it.
    syscall::set_name(c"pause");
    loop {
        syscall::wait_and_reap();
    }
}
