//! The guest's first and only process of ours: makes and supervises the pod's containers.
//!
//! It says Hello to the host as early as it can, sets the guest up while the host thinks, then serves the host's
//! calls until the connection ends, which ends the guest.

#![cfg_attr(not(test), no_main)]

#[cfg_attr(test, allow(dead_code))]
mod boot;
mod clock;
mod container;
mod cpus;
mod error;
mod events;
mod forward;
mod network;
mod reaper;
mod rpc;
mod sandbox;
mod stdio;
mod storage;
mod stream;
#[cfg(test)]
mod tests;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use protocol::agent::Hello;
use protocol::hello::{self, AGENT_VERSION};
use protocol::stream::{PORT_AGENT, PORT_FORWARD};
use tokio::io::AsyncReadExt as _;

use crate::boot::BootError;
use crate::container::Engine;
use crate::reaper::Reaper;
use crate::sandbox::{Sandbox, Times};
use crate::storage::Layout;
use crate::stream::Stream;

/// What this agent does beyond the protocol's minimum.
const CAPABILITIES: [&str; 2] = ["seccomp", "device-rules"];

/// Why the agent ended.
#[derive(Debug, thiserror::Error)]
enum AgentError {
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error("cannot reach the host over vsock (port {PORT_AGENT}): {0}")]
    Connect(std::io::Error),
    #[error("the conversation with the host ended before it began: {0}")]
    Hello(std::io::Error),
    #[error(transparent)]
    Refused(#[from] hello::HelloError),
    #[error("cannot listen for forwarded connections (vsock port {PORT_FORWARD}): {0}")]
    Forward(std::io::Error),
    #[error("the runtime cannot start: {0}")]
    Runtime(std::io::Error),
    #[error("the service cannot start: {0}")]
    Service(#[from] ttrpc::Error),
}

/// The kernel starts here. Not by way of Rust's runtime: that ends a process whose standard descriptors are closed and
/// cannot be opened, as they are before /dev is mounted.
#[cfg(not(test))]
#[unsafe(no_mangle)]
extern "C" fn main(_: libc::c_int, _: *const *const libc::c_char) -> libc::c_int {
    let main_us = clock::boottime_us();
    if std::process::id() != 1 {
        let text = "kata-rs-agent is the first process of a guest; it does nothing anywhere else\n";
        let _ = rustix::io::write(rustix::stdio::stderr(), text.as_bytes());
        return 2;
    }
    if let Err(error) = run(main_us) {
        boot::console_line(&error.to_string());
    }
    boot::power_off()
}

#[cfg_attr(test, allow(dead_code))]
fn run(main_us: u64) -> Result<(), AgentError> {
    // SAFETY: SIG_IGN is a valid disposition. A write to a peer that has gone is an error, not the end.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    boot::prepare_devices()?;
    let connection = stream::connect_vsock_blocking(PORT_AGENT).map_err(AgentError::Connect)?;
    say_hello(&connection).map_err(AgentError::Hello)?;
    let times = Times {
        main_us,
        hello_us: clock::boottime_us(),
    };
    boot::prepare_guest()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(AgentError::Runtime)?;
    runtime.block_on(serve(connection, times))
}

#[cfg_attr(test, allow(dead_code))]
fn say_hello(connection: &OwnedFd) -> std::io::Result<()> {
    let hello = hello::encode(&Hello {
        version: AGENT_VERSION,
        agent_release: env!("CARGO_PKG_VERSION").into(),
        kernel_release: sandbox::kernel_release(),
        capabilities: CAPABILITIES.map(String::from).to_vec(),
        ..Default::default()
    });
    let mut rest = hello.as_slice();
    while !rest.is_empty() {
        let written = rustix::io::write(connection, rest)?;
        rest = &rest[written..];
    }
    Ok(())
}

#[cfg_attr(test, allow(dead_code))]
async fn serve(connection: OwnedFd, times: Times) -> Result<(), AgentError> {
    let mut stream = Stream::new(connection).map_err(AgentError::Connect)?;
    hear_reply(&mut stream).await?;
    let (events, listener) = events::queue();
    let reaper = Reaper::default();
    tokio::spawn(reaper.clone().run());
    let state = PathBuf::from(boot::STATE);
    let engine = Arc::new(Engine {
        layout: Layout::new(
            state.join("containers"),
            state.join("shared"),
            state.join("volumes"),
            false,
        ),
        cgroups: boot::CONTAINER_CGROUPS.into(),
        cgroup_mount: boot::CGROUPS.into(),
        reaper,
        events,
        connector: stream::vsock_connector(),
        pod_pid_namespace: Mutex::new(None),
    });
    forward::start().map_err(AgentError::Forward)?;
    let sandbox = Arc::new(Sandbox::new(engine, listener, network::State::of_guest(), times));
    rpc::serve(stream, Arc::clone(&sandbox)).await?;
    sandbox.delete_all().await;
    Ok(())
}

/// Reads the host's answer to Hello.
async fn hear_reply(stream: &mut Stream) -> Result<(), AgentError> {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix).await.map_err(AgentError::Hello)?;
    let mut body = vec![0; hello::body_length(prefix)?];
    stream.read_exact(&mut body).await.map_err(AgentError::Hello)?;
    Ok(hello::check_reply(&body)?)
}
