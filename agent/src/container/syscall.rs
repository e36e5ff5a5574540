//! System calls that rustix does not wrap. Nothing here allocates or locks, so the child of clone3 may use all.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::AtomicPtr;

use rustix::io::Errno;
use rustix::process::Pid;

use super::mount::last_errno;

/// clone3(2). The libc crate's values do not fit the type it gives them.
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
const CLONE_PIDFD: u64 = 0x1000;

/// What clone3 gave: the parent's or the child's side.
pub enum Cloned {
    /// In the parent: the child, and a descriptor that stands for it.
    Parent(Pid, OwnedFd),
    /// In the child.
    Child,
}

/// Makes a child in new `namespaces` (CLONE_NEW* flags) and in a cgroup (v2), with default signal handlers.
///
/// # Safety
/// The child is a copy of the calling thread alone, in a process whose other threads may have held locks. Until it
/// executes or exits it must not allocate or do anything else that is not async-signal-safe (signal-safety(7)).
///
/// # Errors
/// Those of clone3(2).
pub unsafe fn clone3(namespaces: u64, cgroup: Option<BorrowedFd<'_>>) -> Result<Cloned, Errno> {
    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args holds numbers only; all zero is its neutral value.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = namespaces | CLONE_PIDFD | CLONE_CLEAR_SIGHAND;
    args.pidfd = (&raw mut pidfd) as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: args is a valid struct clone_args whose size is told; pidfd outlives the call. The caller vouches for
    // what the child does.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    match result {
        -1 => Err(last_errno()),
        0 => Ok(Cloned::Child),
        // SAFETY: the kernel has just made this descriptor for us.
        pid => Pid::from_raw(pid as i32)
            .map(|pid| Cloned::Parent(pid, unsafe { OwnedFd::from_raw_fd(pidfd) }))
            .ok_or(Errno::SRCH),
    }
}

/// What ps(1) calls the process.
pub fn set_name(name: &CStr) {
    // SAFETY: the name ends in zero; the kernel takes 15 bytes of it.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

/// Ends the process without running anything on the way out.
pub fn exit(status: i32) -> ! {
    // SAFETY: _exit(2) has no preconditions.
    unsafe { libc::_exit(status) }
}

/// No signal is ignored or blocked any more: programs inherit that (execve(2)), and neither clone3 nor execve takes
/// it back. The Rust runtime ignores SIGPIPE; whatever started this process may have ignored others.
pub fn default_signals() {
    /// `struct sigaction` of the kernel, not of the C library.
    #[repr(C)]
    struct KernelAction {
        handler: usize,
        flags: libc::c_ulong,
        restorer: usize,
        mask: u64,
    }
    const SET_BYTES: usize = size_of::<u64>();
    let action = KernelAction {
        handler: libc::SIG_DFL,
        flags: 0,
        restorer: 0,
        mask: 0,
    };
    let none = 0u64;
    // SAFETY: both structures are the kernel's own on x86-64, and their sizes are told. No handler is installed; SIGKILL
    // and SIGSTOP are refused, which changes nothing. The C library's functions refuse the two signals it uses itself.
    unsafe {
        for signal in 1..=64 {
            let null = std::ptr::null_mut::<KernelAction>();
            libc::syscall(libc::SYS_rt_sigaction, signal, &raw const action, null, SET_BYTES);
        }
        let null = std::ptr::null_mut::<u64>();
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const none,
            null,
            SET_BYTES,
        );
    }
}

/// Closes every descriptor but standard I/O and these two (-1 for none).
pub fn close_all_but(one: RawFd, other: RawFd) {
    let mut first = 3;
    for keep in [one.min(other), one.max(other)] {
        if keep >= first {
            close_range(first, keep - 1);
            first = keep + 1;
        }
    }
    close_range(first, RawFd::MAX);
}

fn close_range(first: RawFd, last: RawFd) {
    if first <= last {
        // SAFETY: the descriptors are closed behind their owners' backs; the only caller is a child that uses none of
        // them again and never runs their destructors.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    }
}

/// Executes; returns only an error.
///
/// Both tables must end in a null pointer, and all others must point to strings that end in zero.
pub fn execve(
    path: &CStr,
    arguments: &[AtomicPtr<libc::c_char>],
    environment: &[AtomicPtr<libc::c_char>],
) -> Errno {
    // SAFETY: AtomicPtr has the layout of a pointer; the tables are those of exec::Program, which owns the strings.
    unsafe {
        libc::execve(
            path.as_ptr(),
            arguments.as_ptr().cast(),
            environment.as_ptr().cast(),
        )
    };
    last_errno()
}

/// Joins the session keyring of that name, making it when there is none. A kernel without keyrings has none to
/// share.
///
/// # Errors
/// Those of keyctl(2).
pub fn join_session_keyring(name: &CStr) -> Result<(), Errno> {
    // SAFETY: the kernel reads the name, a string that ends in zero.
    match unsafe { libc::syscall(libc::SYS_keyctl, libc::KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr()) } {
        -1 => match last_errno() {
            Errno::NOSYS => Ok(()),
            errno => Err(errno),
        },
        _ => Ok(()),
    }
}

/// unshare(2) with flags that touch neither memory nor descriptors.
///
/// # Errors
/// Those of unshare(2).
pub fn unshare(flags: libc::c_int) -> Result<(), Errno> {
    // SAFETY: namespace flags only; memory safety does not depend on them.
    check(unsafe { libc::unshare(flags) })
}

/// Makes children of the calling thread enter this pid namespace.
///
/// # Errors
/// Those of setns(2).
pub fn join_pid_namespace(namespace: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: changes only where later children of this thread are made.
    check(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWPID) })
}

/// personality(2).
///
/// # Errors
/// Those of personality(2).
pub fn personality(domain: u32) -> Result<(), Errno> {
    // SAFETY: affects later executions only in the values used here (PER_LINUX, PER_LINUX32).
    match unsafe { libc::personality(libc::c_ulong::from(domain)) } {
        -1 => Err(last_errno()),
        _ => Ok(()),
    }
}

/// Makes three descriptors standard input, output and error.
///
/// # Errors
/// Those of dup2(2).
pub fn dup_to_stdio(fds: [BorrowedFd<'_>; 3]) -> Result<(), Errno> {
    for (number, fd) in (0..).zip(fds) {
        // SAFETY: nobody owns descriptors 0 to 2; the runtime uses them by number.
        if unsafe { libc::dup2(fd.as_raw_fd(), number) } == -1 {
            return Err(last_errno());
        }
    }
    Ok(())
}

fn check(result: libc::c_int) -> Result<(), Errno> {
    if result == -1 { Err(last_errno()) } else { Ok(()) }
}

/// Sleeps until a child has ended, then lets all that have go.
pub fn wait_and_reap() {
    // SAFETY: the signal set is initialised before use, and no status is asked for.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        // Blocked, so that a child's end between the two calls below is not missed.
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        while libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) > 0 {}
        libc::sigwaitinfo(&raw const set, std::ptr::null_mut());
    }
}
