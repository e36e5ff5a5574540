//! A program that takes a container's output (`binary://`; containerd, `docs/runtime-v2.md`, "Logging"): descriptors
//! 3 and 4 are the two outputs, and it says on 5 that it is ready.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal};
use tokio::io::Interest;
use tokio::process::{Child, Command};

use super::end::{Polled, Sink};
use super::error::IoError;

/// How long a log program may take until it is ready.
const READY_TIMEOUT: Duration = Duration::from_secs(30);
/// How long it may take, after its input has ended, until it is told to end.
const END_OF_INPUT_GRACE: Duration = Duration::from_secs(1);
/// How long it may take after that until it is killed, as containerd's own shim does it.
const TERMINATE_GRACE: Duration = Duration::from_secs(12);

/// Where a log program finds its first pipe.
const FIRST_FD: i32 = 3;

/// A running log program.
#[derive(Debug)]
pub(super) struct Logger {
    child: Child,
    path: PathBuf,
}

impl Logger {
    /// Starts a log program and waits until it is ready. Returns the writing ends of its two outputs.
    pub(super) async fn start(
        path: PathBuf,
        args: &[Vec<u8>],
        ready_byte: bool,
        container: &str,
        namespace: &str,
    ) -> Result<(Self, Sink, Sink), IoError> {
        let pipe = || io::pipe().map_err(IoError::system("pipe"));
        let (stdout, stdout_writer) = pipe()?;
        let (stderr, stderr_writer) = pipe()?;
        let (ready_reader, ready) = pipe()?;
        let child = spawn(
            &path,
            args,
            [stdout.into(), stderr.into(), ready.into()],
            container,
            namespace,
        )
        .map_err(|cause| IoError::LoggerStart {
            path: path.clone(),
            cause,
        })?;
        let mut logger = Self { child, path };
        if let Err(error) = logger.ready(ready_reader.into(), ready_byte).await {
            let _ = logger.child.start_kill();
            let _ = logger.child.wait().await;
            return Err(error);
        }
        Ok((logger, sink(stdout_writer.into())?, sink(stderr_writer.into())?))
    }

    async fn ready(&mut self, pipe: OwnedFd, ready_byte: bool) -> Result<(), IoError> {
        let failed = |reason: String| IoError::LoggerReady {
            path: self.path.clone(),
            reason,
        };
        let pipe = polled(pipe, Interest::READABLE)?;
        let mut byte = Vec::new();
        match tokio::time::timeout(READY_TIMEOUT, pipe.read(&mut byte)).await {
            Ok(Ok(0)) if ready_byte => Err(failed("it closed descriptor 5 without a byte".into())),
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(failed(error.to_string())),
            Err(_elapsed) => Err(failed(format!(
                "it was silent on descriptor 5 for {} s",
                READY_TIMEOUT.as_secs()
            ))),
        }
    }

    /// Sees it out, once its inputs have been closed: most log programs end with their input.
    pub(super) async fn finish(mut self) {
        let warn = |what: &str| tracing::warn!(program = %self.path.display(), "the log program {what}");
        if let Ok(status) = tokio::time::timeout(END_OF_INPUT_GRACE, self.child.wait()).await {
            if let Ok(status) = status
                && !status.success()
                && status.signal().is_none()
            {
                warn(&format!("failed: {status}"));
            }
            return;
        }
        if let Some(pid) = self
            .child
            .id()
            .and_then(|pid| i32::try_from(pid).ok())
            .and_then(Pid::from_raw)
        {
            // Not reaped yet, so the pid is still its own.
            let _ = rustix::process::kill_process(pid, Signal::TERM);
        }
        if tokio::time::timeout(TERMINATE_GRACE, self.child.wait())
            .await
            .is_err()
        {
            warn("did not end when it was told to: killed");
            let _ = self.child.kill().await;
        }
    }
}

fn spawn(
    path: &Path,
    args: &[Vec<u8>],
    pipes: [OwnedFd; 3],
    container: &str,
    namespace: &str,
) -> io::Result<Child> {
    // Copies above the numbers they shall get, so that none is overwritten before it is passed on.
    let above = FIRST_FD + 3;
    let copies = pipes
        .into_iter()
        .map(|pipe| Ok(rustix::io::fcntl_dupfd_cloexec(pipe, above)?))
        .collect::<io::Result<Vec<OwnedFd>>>()?;
    let numbers: Vec<i32> = copies.iter().map(AsRawFd::as_raw_fd).collect();
    let pass_on = move || {
        for (number, from) in (FIRST_FD..).zip(&numbers) {
            // SAFETY: dup2(2) is async-signal-safe and only touches the new process's descriptors.
            if unsafe { libc::dup2(*from, number) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        // SAFETY: as above; it marks what a careless library left open, and closes nothing before execve(2).
        match unsafe { libc::syscall(libc::SYS_close_range, above, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    let mut command = Command::new(path);
    command
        .args(args.iter().map(|arg| OsStr::from_bytes(arg)))
        .env_clear()
        .env("CONTAINER_ID", container)
        .env("CONTAINER_NAMESPACE", namespace)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // SAFETY: the closure makes system calls only; it neither allocates nor takes a lock.
    unsafe { command.pre_exec(pass_on) };
    command.spawn()
}

fn sink(writer: OwnedFd) -> Result<Sink, IoError> {
    Ok(Sink::Polled(polled(writer, Interest::WRITABLE)?, None))
}

/// Makes this process's end of a pipe pollable; the other end is an open file of its own.
fn polled(pipe: OwnedFd, interest: Interest) -> Result<Polled, IoError> {
    let nonblocking = || -> io::Result<Polled> {
        let flags = rustix::fs::fcntl_getfl(pipe.as_fd())?;
        rustix::fs::fcntl_setfl(pipe.as_fd(), flags | rustix::fs::OFlags::NONBLOCK)?;
        Polled::nonblocking(pipe, interest)
    };
    nonblocking().map_err(IoError::system("polling a pipe"))
}
