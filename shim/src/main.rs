//! `containerd-shim-kata-rs-v2`: the door for containerd, CRI-O, Docker and nerdctl.
//!
//! Its callers run it as `start` (make or find the shim of a pod, print its address), `delete` (clean up after a
//! shim that died) and `-info`; `start` runs it once more as `serve`, the process that stays. This crate translates
//! the callers' protocol into the `sandbox` crate's API and decides nothing about containers.
//!
//! [`arguments`] is the command line, [`request`] what came with `start` on standard input, [`bootstrap`] the
//! `start` action, [`daemon`] the `serve` action, [`task`] the Task service on top of [`pod`], [`publisher`] the
//! events to containerd, [`cleanup`] the `delete` action. [`sandbox_api`] is the Sandbox service, on the same
//! socket and the same [`pod`]; [`pod_config`] reads what it is given.

mod arguments;
mod bootstrap;
mod callers;
mod cleanup;
mod convert;
mod cri;
mod daemon;
mod info;
mod log;
mod metrics;
mod options;
mod pod;
mod pod_config;
mod publisher;
mod record;
mod request;
mod sandbox_api;
mod socket;
mod task;

use std::io::Write as _;
use std::process::ExitCode;

use arguments::{Action, Arguments};

/// The runtime's name as containerd's configuration and `ctr run --runtime` spell it.
const RUNTIME_NAME: &str = "io.containerd.kata-rs.v2";

/// Why the process fails; its text is all that standard error gets.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Arguments(#[from] arguments::ArgumentsError),
    #[error("{0}")]
    Start(#[from] bootstrap::BootstrapError),
    #[error("{0}")]
    Serve(#[from] daemon::DaemonError),
    #[error("{0}")]
    Delete(#[from] cleanup::CleanupError),
    #[error("{0}")]
    Info(#[from] info::InfoError),
    #[error("cannot write the answer to standard output: {0}")]
    Output(#[source] std::io::Error),
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // Standard error may be closed: there is nobody left to tell.
            let _ = writeln!(std::io::stderr(), "containerd-shim-kata-rs-v2: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Failure> {
    let arguments = Arguments::parse(std::env::args_os().skip(1))?;
    let answer = match arguments.action {
        Action::Version => info::version().into_bytes(),
        Action::Info => info::runtime_info()?,
        Action::Start => bootstrap::start(&arguments)?,
        Action::Delete => cleanup::delete(&arguments)?,
        Action::Serve => {
            daemon::serve(&arguments)?;
            return Ok(());
        }
    };
    let mut stdout = std::io::stdout().lock();
    stdout
        .write_all(&answer)
        .and_then(|()| stdout.flush())
        .map_err(Failure::Output)
}
