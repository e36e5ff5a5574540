//! The `serve` action: the process that stays. It serves the Task service on the socket it was given as standard
//! input until its pod is gone, and takes the VM with it when it goes.
//!
//! One thread runs everything. Children are the sandbox's affair, which waits for each of them by name; nothing
//! here adopts or reaps strangers.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};
use ttrpc::r#async::Server;

use crate::arguments::Arguments;
use crate::bootstrap::{OPTIONS_ENV, TTRPC_ADDRESS_ENV};
use crate::callers::Callers;
use crate::options::RuntimeOptions;
use crate::pod::Pod;
use crate::publisher::Publisher;
use crate::record::Record;
use crate::sandbox_api::SandboxService;
use crate::task::TaskService;
use crate::{log, socket};

/// How long the last answers may take to reach their callers, and those to hang up then.
const LAST_ANSWERS_LIMIT: Duration = Duration::from_secs(1);

/// Why the shim cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Not started by `start`.
    #[error("the action serve is for start's own use: standard input is not a listening socket ({0})")]
    NoListener(#[source] io::Error),
    /// Detaching from the caller failed.
    #[error("cannot {what}: {source}")]
    Detach {
        /// What.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The options are not what `start` writes.
    #[error("the environment variable KATA_RS_OPTIONS is not valid: {0}")]
    Options(#[source] serde_json::Error),
    /// The event loop or the server cannot be made.
    #[error("cannot serve: {0}")]
    Serve(String),
}

/// Does it; returns when the shim's work is done.
pub fn serve(arguments: &Arguments) -> Result<(), DaemonError> {
    let (listener, socket) = take_listener()?;
    let bundle = match &arguments.bundle {
        Some(bundle) => bundle.clone(),
        None => std::env::current_dir().map_err(detach("find the working directory"))?,
    };
    log::start(arguments.debug, &arguments.id, &bundle);
    let result = detached(arguments, listener, socket.clone(), bundle);
    if let Err(error) = &result {
        tracing::error!(%error, "the shim cannot serve");
        let _ = socket::remove_stale(&socket);
    }
    result
}

fn detached(
    arguments: &Arguments,
    listener: UnixListener,
    socket: PathBuf,
    bundle: PathBuf,
) -> Result<(), DaemonError> {
    // A session of its own: a signal to the caller's process group is not meant for the pod. The bundle's file
    // system must not be held by a working directory.
    rustix::process::setsid().map_err(|errno| detach("start a session")(errno.into()))?;
    std::env::set_current_dir("/").map_err(detach("change to the root directory"))?;
    limit_heap();
    if std::env::var_os("SCHED_CORE").is_some_and(|value| !value.is_empty()) {
        share_core_with_pod_only();
    }
    let options: RuntimeOptions = match std::env::var(OPTIONS_ENV) {
        Ok(text) => serde_json::from_str(&text).map_err(DaemonError::Options)?,
        Err(_) => RuntimeOptions::default(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| DaemonError::Serve(error.to_string()))?;
    let served = runtime.block_on(run(arguments, options, listener, socket, bundle));
    // A thread still busy with a container's files has nobody left to work for.
    runtime.shutdown_background();
    served
}

async fn run(
    arguments: &Arguments,
    options: RuntimeOptions,
    listener: UnixListener,
    socket: PathBuf,
    bundle: PathBuf,
) -> Result<(), DaemonError> {
    let failed = |error: &dyn std::fmt::Display| DaemonError::Serve(error.to_string());
    let ttrpc_address = std::env::var(TTRPC_ADDRESS_ENV).unwrap_or_default();
    let publisher = Publisher::start(&ttrpc_address, &arguments.namespace);
    let pod = Arc::new(Pod::new(&arguments.namespace, &arguments.id, options, publisher));
    // First of all: everything else happens while the VM boots.
    pod.start_early(&bundle);
    let record = pod.record(&socket, None);
    if let Err(error) = record.write(&bundle) {
        warn!(%error, "cannot write the record of the shim's processes");
    }

    let mut terminate = signal(SignalKind::terminate()).map_err(|error| failed(&error))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|error| failed(&error))?;
    let (listener, callers) = Callers::of(listener).map_err(|error| failed(&error))?;
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(TaskService::new(Arc::clone(&pod), socket.clone()).services())
        .register_service(SandboxService::new(Arc::clone(&pod), socket.clone()).services());
    server.start().await.map_err(|error| failed(&error))?;

    // A signal means it: the containers end, their waiters and containerd are told, nothing is left.
    let asked = tokio::select! {
        () = pod.done() => true,
        _ = terminate.recv() => { info!("SIGTERM: ending the pod"); false }
        _ = interrupt.recv() => { info!("SIGINT: ending the pod"); false }
    };
    // From here on a `start` for the same pod makes a shim of its own.
    if let Err(error) = std::fs::remove_file(&socket) {
        warn!(%error, "cannot remove the socket");
    }
    server.stop_listen().await;
    pod.close().await;
    // Who has asked for the end hangs up when it has its answer. To those that have not, this end is the news.
    if asked
        && tokio::time::timeout(LAST_ANSWERS_LIMIT, callers.gone())
            .await
            .is_err()
    {
        info!("leaving while a caller is connected");
    }
    // Waits for the answer to Shutdown, too.
    if tokio::time::timeout(LAST_ANSWERS_LIMIT, server.shutdown())
        .await
        .is_err()
    {
        warn!("a caller did not take its last answer");
    }
    Record::remove(&bundle);
    Ok(())
}

fn detach(what: &'static str) -> impl FnOnce(io::Error) -> DaemonError {
    move |source| DaemonError::Detach { what, source }
}

/// Takes the listening socket off standard input, where /dev/null takes its place.
fn take_listener() -> Result<(UnixListener, PathBuf), DaemonError> {
    let not = |error: io::Error| DaemonError::NoListener(error);
    // What the caller's caller left open would be held as long as the pod lives. A kernel before 5.9 has no such call:
    // then it is held.
    // SAFETY: the first thing this process does: nothing in it owns a descriptor above the standard three yet.
    unsafe {
        libc::close_range(3, libc::c_uint::MAX, 0);
    }
    let stdin = io::stdin();
    let listening =
        rustix::net::sockopt::socket_acceptconn(stdin.as_fd()).map_err(|errno| not(errno.into()))?;
    if !listening {
        return Err(not(io::Error::from_raw_os_error(libc::EINVAL)));
    }
    // A copy above the standard three that children do not get.
    let fd: OwnedFd = stdin.as_fd().try_clone_to_owned().map_err(not)?;
    let listener = UnixListener::from(fd);
    let socket = listener
        .local_addr()
        .map_err(not)?
        .as_pathname()
        .ok_or_else(|| not(io::Error::from_raw_os_error(libc::EINVAL)))?
        .to_owned();
    let null = std::fs::File::open("/dev/null").map_err(detach("open /dev/null"))?;
    rustix::stdio::dup2_stdin(&null).map_err(|errno| detach("replace standard input")(errno.into()))?;
    Ok((listener, socket))
}

/// Keeps the allocator at one heap: threads that open a container's files would each get 64 MiB of address space
/// and keep what they touched.
fn limit_heap() {
    // SAFETY: mallopt(3) only sets a parameter of the allocator; no other thread exists yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// containerd's `sched_core`: no process outside the pod may run on a sibling hyperthread of one inside. What this
/// process spawns inherits its cookie. A kernel without core scheduling refuses, which is as before.
fn share_core_with_pod_only() {
    /// `PIDTYPE_TGID` of the kernel: the whole process.
    const WHOLE_PROCESS: libc::c_ulong = 1;
    // SAFETY: prctl(2) with PR_SCHED_CORE takes plain numbers and a null pointer for the cookie it does not return.
    let result = unsafe {
        libc::prctl(
            libc::PR_SCHED_CORE,
            libc::PR_SCHED_CORE_CREATE,
            0,
            WHOLE_PROCESS,
            0,
        )
    };
    if result != 0 {
        warn!(error = %io::Error::last_os_error(), "core scheduling is not available");
    }
}
