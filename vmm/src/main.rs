//! kata-rs-vmm: the process around one VM. Started by the sandbox with the control channel as descriptor 3
//! (`protocol::vmm`); does nothing of its own accord.

use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;

use protocol::vmm::CONTROL_FD;
use rustix::net::SocketType;
use vmm::exit::chain;
use vmm::timeline::{Recorder, Stage};
use vmm::{control, jail};

/// Started by hand or by something that is not a sandbox.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let timeline = Arc::new(Recorder::default());
    timeline.record(Stage::VmmMain);
    if std::env::args_os()
        .nth(1)
        .is_some_and(|argument| argument == "--version")
    {
        println!("kata-rs-vmm {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    let Some(channel) = control_channel() else {
        eprintln!(
            "kata-rs-vmm: descriptor {CONTROL_FD} is not a control channel. The sandbox starts this program; \
             to run a container use `kata-rs run` or containerd."
        );
        return ExitCode::from(USAGE);
    };
    if let Err(error) = jail::prelude(CONTROL_FD as u32 + 1) {
        eprintln!("kata-rs-vmm: {}", chain(&error));
        return ExitCode::FAILURE;
    }
    match control::serve(channel, timeline) {
        // Exiting at once leaves it to the kernel to take the VM down: its memory goes either way.
        Ok(ended) => std::process::exit(i32::from(ended.cause.exit_code())),
        Err(error) => {
            eprintln!("kata-rs-vmm: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn control_channel() -> Option<OwnedFd> {
    // SAFETY: the number is only asked about; fcntl fails cleanly when it is not open.
    if unsafe { libc::fcntl(CONTROL_FD, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return None;
    }
    // SAFETY: it is open and, by the contract with whoever starts this program, nobody else's.
    let channel = unsafe { OwnedFd::from_raw_fd(CONTROL_FD) };
    match rustix::net::sockopt::socket_type(&channel) {
        Ok(SocketType::SEQPACKET) => Some(channel),
        _ => {
            // Not ours, so not ours to close.
            std::mem::forget(channel);
            None
        }
    }
}
