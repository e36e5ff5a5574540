//! `kata-rs-task`: the process on the host that stands for one process of a container.
//!
//! Its pid is what callers see and signal, and its network namespace is the pod's. It passes every signal it gets
//! to the sandbox, one byte each, and exits when the sandbox says so or is gone. Each container and each exec has
//! one, on the path of their start: so it is a handful of system calls and nothing else. Neither the C library's
//! start-up nor Rust's runs, and nothing of either may be used.
//!
//! Descriptor 3: to the sandbox. First [0] once everything is set up, or [255, errno] when that failed; then
//! signal numbers. Descriptor 4: from the sandbox. One byte: exit with this status; end of file: exit with 0.
//! An environment that is not empty asks for a network namespace of its own.
#![no_main]

use std::arch::{asm, global_asm};
use std::mem::MaybeUninit;

const TO_SANDBOX: usize = 3;
const FROM_SANDBOX: usize = 4;

/// Set of all signals, as the kernel has it (signal n is bit n - 1).
static ALL_SIGNALS: u64 = u64::MAX;
/// `sigset_t` of the kernel in bytes.
const SET_BYTES: usize = size_of::<u64>();
/// `struct signalfd_siginfo` in bytes; its first member is the signal's number (signalfd(2)).
const SIGINFO_BYTES: usize = 128;

// The kernel enters here with argc, argv, envp on the stack (System V ABI, x86-64, "Process Initialization").
global_asm!(
    ".globl _start",
    "_start:",
    "xor ebp, ebp",
    "mov rdi, rsp",
    "and rsp, -16",
    "call {run}",
    "ud2",
    run = sym run,
);

/// Sets up, serves, exits. `stack` points to argc.
extern "C" fn run(stack: *const usize) -> ! {
    // SAFETY: above argc lie argc pointers to arguments and a null, then the environment, which ends in null.
    let wants_netns = unsafe { *stack.add(*stack + 2) != 0 };
    let status = match set_up(wants_netns) {
        Ok(signals) if send(&[0]) => serve(signals),
        Ok(_) => 1,
        Err(errno) => {
            send(&[255, errno]);
            1
        }
    };
    loop {
        // SAFETY: exit_group(2) takes a number and does not return.
        unsafe { system_call(libc::SYS_exit_group, [status, 0, 0, 0]) };
    }
}

/// Makes the namespace and the descriptor that signals are read from, or returns the error number.
fn set_up(wants_netns: bool) -> Result<usize, u8> {
    let all: *const u64 = &raw const ALL_SIGNALS;
    // SAFETY: the pointers are to a constant of the size that is passed, or null where that is allowed. The
    // sandbox blocked all signals before it spawned this process; blocking them again makes it true for others.
    unsafe {
        let block = libc::SIG_BLOCK.cast_unsigned() as usize;
        check(system_call(
            libc::SYS_rt_sigprocmask,
            [block, all as usize, 0, SET_BYTES],
        ))?;
        if wants_netns {
            let flags = libc::CLONE_NEWNET.cast_unsigned() as usize;
            check(system_call(libc::SYS_unshare, [flags, 0, 0, 0]))?;
        }
        let flags = libc::SFD_CLOEXEC.cast_unsigned() as usize;
        check(system_call(
            libc::SYS_signalfd4,
            [usize::MAX, all as usize, SET_BYTES, flags],
        ))
    }
}

/// Passes signals on until the sandbox ends this process. Returns the exit status.
fn serve(signals: usize) -> usize {
    let poll_fd = |fd: usize| libc::pollfd {
        fd: fd as i32,
        events: libc::POLLIN,
        revents: 0,
    };
    let mut ready = [poll_fd(signals), poll_fd(FROM_SANDBOX)];
    loop {
        // SAFETY: the array is as long as said; the kernel writes its last members.
        let polled = unsafe { system_call(libc::SYS_poll, [ready.as_mut_ptr() as usize, 2, usize::MAX, 0]) };
        if check(polled).is_err() {
            return 1;
        }
        let [heard, told] = &ready;
        let (heard, told) = (heard.revents != 0, told.revents != 0);
        if told {
            let mut status = 0u8;
            // SAFETY: reads one byte into a byte.
            let read = unsafe { system_call(libc::SYS_read, [FROM_SANDBOX, &raw mut status as usize, 1, 0]) };
            return if read == 1 { status.into() } else { 0 };
        }
        if heard {
            let mut info = MaybeUninit::<[u8; SIGINFO_BYTES]>::uninit();
            let info = info.as_mut_ptr().cast::<u8>();
            // SAFETY: the kernel writes at most as many bytes as said; the first is read only when all were
            // written. Signal numbers are below 65, so the first byte (little-endian) is the number.
            let number = unsafe {
                match system_call(libc::SYS_read, [signals, info as usize, SIGINFO_BYTES, 0]) {
                    128 => *info,
                    _ => 0,
                }
            };
            if number != 0 && !send(&[number]) {
                return 1;
            }
        }
    }
}

/// Writes a few bytes; false when the sandbox is gone.
fn send(bytes: &[u8]) -> bool {
    // SAFETY: the slice is as long as said. SIGPIPE is blocked.
    unsafe {
        system_call(
            libc::SYS_write,
            [TO_SANDBOX, bytes.as_ptr() as usize, bytes.len(), 0],
        ) == bytes.len()
    }
}

/// What a system call returned, or its error number.
fn check(result: usize) -> Result<usize, u8> {
    // Results from -4095 to -1 are error numbers; those that occur here fit into a byte.
    let errno = result.wrapping_neg();
    if matches!(errno, 1..=4095) {
        Err(errno as u8)
    } else {
        Ok(result)
    }
}

/// One system call (syscall(2), "Architecture calling conventions").
///
/// # Safety
/// That of the call.
unsafe fn system_call(number: libc::c_long, arguments: [usize; 4]) -> usize {
    let [a, b, c, d] = arguments;
    let result;
    // SAFETY: the instruction clobbers rcx and r11 and returns in rax; memory is what the caller answers for.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") a,
            in("rsi") b,
            in("rdx") c,
            in("r10") d,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}
