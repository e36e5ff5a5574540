//! Spawning, watching and reaping the helper processes of a sandbox: its VMM and its tasks.
//!
//! Works as posix_spawn(3) does inside: the child borrows this process's memory and holds up the calling thread
//! until it executes, so nothing is copied however large this process is. Beyond posix_spawn(3) it can enter
//! namespaces, and the child dies with the thread that spawned it: spawn from a thread that lives as long as
//! the sandbox. Children are told apart and reaped by pidfd, never by waiting for just any child.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use rustix::process::{Signal, WaitId, WaitIdOptions};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// What to execute and with what.
pub(crate) struct Command<'a> {
    /// The program's path.
    pub program: &'a Path,
    /// Arguments, the program's own name first.
    pub args: &'a [&'a str],
    /// Environment, `NAME=value`.
    pub env: &'a [&'a str],
    /// The child's descriptors 0, 1, 2, … in order. It gets no others.
    pub fds: &'a [BorrowedFd<'a>],
    /// Makes the child the first process of a new pid namespace.
    pub pid_namespace: bool,
    /// A network namespace to enter.
    pub netns: Option<BorrowedFd<'a>>,
    /// Leaves all signals blocked in the child, so that it loses none before it listens.
    pub block_signals: bool,
}

/// Why a process could not be spawned.
#[derive(Debug, thiserror::Error)]
#[error("{stage}: {cause}")]
pub(crate) struct SpawnError {
    stage: Stage,
    #[source]
    pub(crate) cause: io::Error,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
enum Stage {
    Prepare,
    Clone,
    Netns,
    Descriptors,
    Execute,
}

impl Stage {
    fn from_code(code: i32) -> Self {
        [Self::Prepare, Self::Clone, Self::Netns, Self::Descriptors]
            .into_iter()
            .find(|stage| *stage as i32 == code)
            .unwrap_or(Self::Execute)
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prepare => "preparing its arguments and descriptors",
            Self::Clone => "making a process",
            Self::Netns => "entering its network namespace",
            Self::Descriptors => "passing its descriptors",
            Self::Execute => "executing it",
        })
    }
}

/// All the child needs, prepared before it exists: it must neither allocate nor take a lock.
struct Plan<'a> {
    program: &'a CStr,
    argv: &'a [*const c_char],
    envp: &'a [*const c_char],
    /// Copies of the descriptors, all above the numbers they shall get.
    fds: &'a [RawFd],
    netns: Option<RawFd>,
    block_signals: bool,
    stage: AtomicI32,
    errno: AtomicI32,
}

/// Enough for the few frames of [`child`]; posix_spawn(3) of glibc uses as much.
const STACK_BYTES: usize = 32 * 1024;

/// The highest signal number of Linux on x86-64.
const LAST_SIGNAL: c_int = 64;

impl Command<'_> {
    /// Spawns the process. Must be called inside a tokio runtime, on a thread that outlives the child.
    ///
    /// # Errors
    /// [`SpawnError`] with what the kernel reported, also when the program cannot be executed.
    pub fn spawn(&self) -> Result<Child, SpawnError> {
        let prepare = |cause: io::Error| SpawnError {
            stage: Stage::Prepare,
            cause,
        };
        let text = |bytes: &[u8]| CString::new(bytes).map_err(|error| prepare(error.into()));
        let program = text(self.program.as_os_str().as_bytes())?;
        let args = self
            .args
            .iter()
            .map(|arg| text(arg.as_bytes()))
            .collect::<Result<Vec<_>, _>>()?;
        let env = self
            .env
            .iter()
            .map(|var| text(var.as_bytes()))
            .collect::<Result<Vec<_>, _>>()?;
        let pointers = |list: &[CString]| {
            list.iter()
                .map(|item| item.as_ptr())
                .chain([ptr::null()])
                .collect::<Vec<_>>()
        };
        let (argv, envp) = (pointers(&args), pointers(&env));
        let above = c_int::try_from(self.fds.len()).expect("a handful of descriptors");
        let copies = self
            .fds
            .iter()
            .map(|fd| rustix::io::fcntl_dupfd_cloexec(fd, above))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| prepare(error.into()))?;
        let fds: Vec<RawFd> = copies.iter().map(AsRawFd::as_raw_fd).collect();
        let plan = Plan {
            program: &program,
            argv: &argv,
            envp: &envp,
            fds: &fds,
            netns: self.netns.map(|fd| fd.as_raw_fd()),
            block_signals: self.block_signals,
            stage: AtomicI32::new(Stage::Execute as i32),
            errno: AtomicI32::new(0),
        };
        let mut flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
        if self.pid_namespace {
            flags |= libc::CLONE_NEWPID;
        }
        let (pid, pidfd) = vfork(&plan, flags).map_err(|cause| SpawnError {
            stage: Stage::Clone,
            cause,
        })?;
        let errno = plan.errno.load(Ordering::Relaxed);
        let child = Child::new(pid, pidfd);
        if errno != 0 {
            // The child has exited already; dropping it reaps it.
            return Err(SpawnError {
                stage: Stage::from_code(plan.stage.load(Ordering::Relaxed)),
                cause: io::Error::from_raw_os_error(errno),
            });
        }
        child.map_err(prepare)
    }
}

/// Runs [`child`] in a new process that shares this one's memory, and waits until it executed or exited.
fn vfork(plan: &Plan<'_>, flags: c_int) -> io::Result<(u32, OwnedFd)> {
    let mut stack = vec![0u128; STACK_BYTES / size_of::<u128>()];
    let top = stack.as_mut_ptr_range().end;
    let mut pidfd: c_int = -1;
    let (pid, error) = {
        // No handler of this process may run in the child, on memory that both share.
        let _blocked = BlockedSignals::new();
        // SAFETY: `top` is the 16-byte aligned end of a stack that outlives the call: with CLONE_VFORK it does
        // not return before the child has executed or exited. `child` is given a `Plan` that is borrowed for as
        // long. The pidfd is written to a local that lives throughout.
        let pid = unsafe {
            libc::clone(
                child,
                top.cast::<c_void>(),
                flags,
                ptr::from_ref(plan).cast_mut().cast::<c_void>(),
                &raw mut pidfd,
            )
        };
        (pid, io::Error::last_os_error())
    };
    let Ok(pid) = u32::try_from(pid) else {
        return Err(error);
    };
    // SAFETY: clone(2) succeeded with CLONE_PIDFD, so it stored a new descriptor that nobody else owns.
    Ok((pid, unsafe { OwnedFd::from_raw_fd(pidfd) }))
}

/// The child's life until it executes. Only system calls: it shares the memory of a process with threads.
extern "C" fn child(plan: *mut c_void) -> c_int {
    // SAFETY: vfork passes a reference to a Plan that lives until this process has executed or exited, and that
    // nobody writes but through atomics.
    let plan = unsafe { &*plan.cast::<Plan<'_>>() };
    let fail = |stage: Stage| -> ! {
        // SAFETY: errno is this thread's own while the parent's thread is held up.
        let errno = unsafe { *libc::__errno_location() };
        plan.stage.store(stage as i32, Ordering::Relaxed);
        plan.errno.store(errno, Ordering::Relaxed);
        // SAFETY: _exit(2) runs no handler of the parent.
        unsafe { libc::_exit(127) }
    };
    // SAFETY: all are plain system calls on numbers and on memory that the plan keeps alive; arrays end in null
    // as execve(2) wants. Signal dispositions are this process's own (no CLONE_SIGHAND).
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        for signal in 1..=LAST_SIGNAL {
            if libc::sigaction(signal, ptr::null(), &raw mut action) == 0
                && action.sa_sigaction != libc::SIG_DFL
            {
                let default: libc::sigaction = std::mem::zeroed();
                libc::sigaction(signal, &raw const default, ptr::null_mut());
            }
        }
        // A terminal's signals are for the program at the door, which passes on what it wants to.
        libc::setsid();
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        if let Some(netns) = plan.netns
            && libc::setns(netns, libc::CLONE_NEWNET) != 0
        {
            fail(Stage::Netns);
        }
        let mut number: c_int = 0;
        for fd in plan.fds {
            if libc::dup2(*fd, number) < 0 {
                fail(Stage::Descriptors);
            }
            number += 1;
        }
        if libc::syscall(libc::SYS_close_range, number, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) != 0 {
            fail(Stage::Descriptors);
        }
        if !plan.block_signals {
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
        }
        libc::execve(plan.program.as_ptr(), plan.argv.as_ptr(), plan.envp.as_ptr());
    }
    fail(Stage::Execute)
}

/// Blocks every signal in this thread until dropped.
struct BlockedSignals(libc::sigset_t);

impl BlockedSignals {
    fn new() -> Self {
        // SAFETY: both sets are initialised memory of the right type and live throughout.
        unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            let mut before: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
            Self(before)
        }
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        // SAFETY: the set was filled by pthread_sigmask.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, ptr::null_mut());
        }
    }
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It exited with this status.
    Exited(i32),
    /// This signal killed it.
    Killed(i32),
    /// Somebody else has reaped it.
    Unknown,
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(status) => write!(f, "it exited with status {status}"),
            Self::Killed(signal) => write!(f, "signal {signal} killed it"),
            Self::Unknown => f.write_str("it ended"),
        }
    }
}

/// A spawned process. Dropped before it was seen to end, it is killed and reaped.
#[derive(Debug)]
pub(crate) struct Child {
    pid: u32,
    pidfd: AsyncFd<OwnedFd>,
    reaped: AtomicBool,
}

impl Child {
    fn new(pid: u32, pidfd: OwnedFd) -> io::Result<Self> {
        // SAFETY: an OwnedFd refers to the same open descriptor until it is dropped, and AsyncFd owns it.
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?;
        Ok(Self {
            pid,
            pidfd,
            reaped: AtomicBool::new(false),
        })
    }

    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Kills it. Nothing happens when it has ended already.
    pub fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL);
    }

    /// Lets it go on when it was stopped.
    pub fn resume(&self) {
        let _ = rustix::process::pidfd_send_signal(self.pidfd.get_ref(), Signal::CONT);
    }

    /// Waits until it ends and reaps it. For one caller.
    pub async fn wait(&self) -> Ended {
        // A pidfd is readable once the process has ended, and stays so.
        if let Ok(mut ready) = self.pidfd.readable().await {
            ready.retain_ready();
        }
        self.reap()
    }

    fn reap(&self) -> Ended {
        let ended = loop {
            match rustix::process::waitid(WaitId::PidFd(self.pidfd.get_ref().as_fd()), WaitIdOptions::EXITED)
            {
                Err(rustix::io::Errno::INTR) => {}
                other => break other,
            }
        };
        self.reaped.store(true, Ordering::Relaxed);
        match ended {
            Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
                (Some(status), _) => Ended::Exited(status),
                (None, Some(signal)) => Ended::Killed(signal),
                (None, None) => Ended::Unknown,
            },
            Ok(None) | Err(_) => Ended::Unknown,
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.reaped.load(Ordering::Relaxed) {
            self.kill();
            self.reap();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn shell<'a>(args: &'a [&'a str], fds: &'a [BorrowedFd<'a>]) -> Command<'a> {
        Command {
            program: Path::new("/bin/sh"),
            args,
            env: &["WORD=from the environment"],
            fds,
            pid_namespace: false,
            netns: None,
            block_signals: false,
        }
    }

    #[tokio::test]
    async fn a_child_has_the_descriptors_it_was_given_and_no_others() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        // Without close-on-exec, as a careless library would leave it.
        let leak = rustix::io::fcntl_dupfd_cloexec(&null, 20).unwrap();
        rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty()).unwrap();
        let fds = [null.as_fd(), writer.as_fd(), null.as_fd(), null.as_fd()];
        let child = Command {
            program: Path::new("/bin/ls"),
            ..shell(&["ls", "/proc/self/fd"], &fds)
        }
        .spawn()
        .unwrap();
        drop(writer);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        // 4 is the directory that ls reads.
        assert_eq!(text, "0\n1\n2\n3\n4\n");
        assert_eq!(child.wait().await, Ended::Exited(0));
        drop(leak);
    }

    #[tokio::test]
    async fn a_child_has_the_environment_it_was_given() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        let fds = [null.as_fd(), writer.as_fd(), null.as_fd()];
        let child = shell(&["sh", "-c", "echo $WORD $HOME; exit 7"], &fds)
            .spawn()
            .unwrap();
        drop(writer);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "from the environment\n");
        assert_eq!(child.wait().await, Ended::Exited(7));
    }

    #[tokio::test]
    async fn a_program_that_does_not_exist_is_an_error_and_leaves_no_child() {
        let error = Command {
            program: Path::new("/nonexistent/program"),
            ..shell(&["program"], &[])
        }
        .spawn()
        .unwrap_err();
        assert_eq!(error.stage, Stage::Execute);
        assert_eq!(error.cause.raw_os_error(), Some(libc::ENOENT));
        assert_eq!(
            error.to_string(),
            "executing it: No such file or directory (os error 2)"
        );
    }

    #[tokio::test]
    async fn a_dropped_child_is_killed_and_reaped() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let fds = [null.as_fd(); 3];
        let child = shell(&["sh", "-c", "sleep 1000"], &fds).spawn().unwrap();
        let proc = format!("/proc/{}", child.pid());
        assert!(Path::new(&proc).exists());
        drop(child);
        assert!(!Path::new(&proc).exists());
    }

    #[tokio::test]
    async fn a_killed_child_is_told_from_one_that_exited() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let fds = [null.as_fd(); 3];
        let child = shell(&["sh", "-c", "kill -TERM $$"], &fds).spawn().unwrap();
        assert_eq!(child.wait().await, Ended::Killed(libc::SIGTERM));
    }
}
