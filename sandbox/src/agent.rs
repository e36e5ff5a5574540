//! The host's side of the agent's protocol: the handshake, one method per call, and the translation of its
//! errors. When which call is made is decided elsewhere; the behaviour of each is in `protocol/proto/agent.proto`.

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use protobuf::Message;
use protobuf::well_known_types::empty::Empty;
use protocol::agent::failure::Reason;
use protocol::agent::service::AgentClient;
use protocol::agent::{
    ConfigureSandboxRequest, ContainerRef, ContainerStatsResponse, CreateContainerRequest, CreateExecRequest,
    Event, Failure, GuestInfoResponse, Hello, Network, ProcessRef, ResizeTerminalRequest,
    SetOnlineCpusRequest, SignalProcessRequest, UpdateContainerRequest, Volume,
};
use protocol::hello::{self, HelloError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::asynchronous::{Client, ClientStreamReceiver};
use ttrpc::context::Context;

use crate::api::ProcessId;
use crate::error::{Error, ErrorKind, GuestFailure};
use crate::spec::SandboxSpec;

/// For calls that change or read something small in the guest.
const SHORT: Duration = Duration::from_secs(10);
/// For calls that mount, unmount, execute or wait for a process to die, and for what a guest is told at first: on a host
/// where many pods start at once all of them wait for a CPU.
const LONG: Duration = Duration::from_secs(60);
/// Full name of [`Failure`], as `Any` has it after the last slash.
const FAILURE: &str = "kata_rs.agent.v1.Failure";
/// Fresh entropy for the guest, in bytes.
const ENTROPY_BYTES: usize = 64;

/// What went wrong between host and agent.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The guest never said Hello.
    #[error(
        "the guest's agent did not say Hello within {seconds} s (`hello_timeout_s` in the configuration); {console}"
    )]
    NeverSaidHello {
        /// How long it was waited for.
        seconds: u64,
        /// The guest console's last lines, in words.
        console: String,
    },
    /// The handshake broke off.
    #[error("the agent's connection broke in the handshake")]
    Handshake(#[source] io::Error),
    /// The agent is another's.
    #[error(transparent)]
    Hello(#[from] HelloError),
    /// The connection broke.
    #[error("the connection to the agent broke while {what}: {cause}")]
    Lost {
        /// What was being done.
        what: String,
        /// Why.
        cause: String,
    },
    /// A call was not answered.
    #[error("the agent did not answer for {seconds} s while {what}")]
    Silent {
        /// What was being done.
        what: String,
        /// How long it was waited for.
        seconds: u64,
    },
    /// No entropy for the guest.
    #[error("no random bytes for the guest")]
    Entropy(#[source] io::Error),
}

impl AgentError {
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::NeverSaidHello { .. } | Self::Handshake(_) | Self::Lost { .. } | Self::Silent { .. } => {
                ErrorKind::Unavailable
            }
            Self::Hello(_) => ErrorKind::FailedPrecondition,
            Self::Entropy(_) => ErrorKind::Internal,
        }
    }
}

/// A connection to the agent. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Agent {
    client: AgentClient,
    /// What it said of itself.
    hello: Arc<Hello>,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent")
            .field("hello", &self.hello)
            .finish_non_exhaustive()
    }
}

impl Agent {
    /// Shakes hands on a fresh connection. Does not end by itself when the guest says nothing.
    pub async fn connect(mut stream: UnixStream) -> Result<Self, AgentError> {
        let mut prefix = [0; 4];
        stream
            .read_exact(&mut prefix)
            .await
            .map_err(AgentError::Handshake)?;
        let mut body = vec![0; hello::body_length(prefix)?];
        stream
            .read_exact(&mut body)
            .await
            .map_err(AgentError::Handshake)?;
        let (reply, hello) = hello::accept(&body);
        let sent = stream.write_all(&hello::encode(&reply)).await;
        let hello = hello?;
        sent.map_err(AgentError::Handshake)?;
        tracing::debug!(release = %hello.agent_release, kernel = %hello.kernel_release, "the agent said Hello");
        Ok(Self {
            client: AgentClient::new(Client::new(Socket::new(stream))),
            hello: Arc::new(hello),
        })
    }

    /// Tells the guest what its pod needs.
    pub async fn configure(&self, spec: &SandboxSpec, network: Option<Network>) -> Result<(), Error> {
        let request = ConfigureSandboxRequest {
            hostname: spec.hostname.clone().unwrap_or_default(),
            realtime_ns: realtime_ns(),
            entropy: entropy().map_err(|error| Error::Agent(Arc::new(AgentError::Entropy(error))))?,
            sysctls: spec.sysctls.clone().into_iter().collect(),
            shm_bytes: spec.shm_bytes,
            network: network.into(),
            ..Default::default()
        };
        let call = self.client.configure_sandbox(Context::default(), &request);
        self.call(LONG, || "preparing the guest".to_owned(), call)
            .await
            .map(drop)
    }

    /// Tells the guest about its network anew.
    pub async fn update_network(&self, network: &Network) -> Result<(), Error> {
        let call = self.client.update_network(Context::default(), network);
        self.call(SHORT, || "setting up the guest's network".to_owned(), call)
            .await
            .map(drop)
    }

    /// Opens the stream of events. For one caller.
    pub async fn events(&self) -> Result<ClientStreamReceiver<Event>, Error> {
        let request = Empty::new();
        let call = self.client.events(Context::default(), &request);
        self.call(LONG, || "listening to the guest's events".to_owned(), call)
            .await
    }

    pub async fn guest_info(&self) -> Result<GuestInfoResponse, Error> {
        let request = Empty::new();
        let call = self.client.guest_info(Context::default(), &request);
        self.call(SHORT, || "asking the guest about itself".to_owned(), call)
            .await
    }

    /// Puts CPUs online or offline; how many are online then.
    pub async fn set_online_cpus(&self, count: u32) -> Result<u32, Error> {
        let request = SetOnlineCpusRequest {
            count,
            ..Default::default()
        };
        let call = self.client.set_online_cpus(Context::default(), &request);
        let answer = self
            .call(LONG, || format!("putting {count} CPUs online"), call)
            .await?;
        Ok(answer.online)
    }

    pub async fn create_container(&self, request: &CreateContainerRequest) -> Result<(), Error> {
        let call = self.client.create_container(Context::default(), request);
        let what = || format!("creating container {}", request.container_id);
        self.call(LONG, what, call).await.map(drop)
    }

    pub async fn update_volume(&self, volume: &Volume) -> Result<(), Error> {
        let call = self.client.update_volume(Context::default(), volume);
        let what = || format!("bringing volume {} up to date", volume.name);
        self.call(LONG, what, call).await.map(drop)
    }

    pub async fn create_exec(&self, request: &CreateExecRequest) -> Result<(), Error> {
        let call = self.client.create_exec(Context::default(), request);
        let what = || {
            format!(
                "creating exec {} in container {}",
                request.exec_id, request.container_id
            )
        };
        self.call(LONG, what, call).await.map(drop)
    }

    pub async fn start(&self, process: &ProcessId) -> Result<(), Error> {
        let request = process_ref(process);
        let call = self.client.start_process(Context::default(), &request);
        self.call(LONG, || format!("starting {process}"), call)
            .await
            .map(drop)
    }

    pub async fn signal(&self, process: &ProcessId, signal: u32, all: bool) -> Result<(), Error> {
        let request = SignalProcessRequest {
            container_id: process.container_id.clone(),
            exec_id: process.exec_id.clone(),
            signal,
            all,
            ..Default::default()
        };
        let call = self.client.signal_process(Context::default(), &request);
        self.call(LONG, || format!("sending signal {signal} to {process}"), call)
            .await
            .map(drop)
    }

    pub async fn resize(&self, process: &ProcessId, rows: u16, columns: u16) -> Result<(), Error> {
        let request = ResizeTerminalRequest {
            container_id: process.container_id.clone(),
            exec_id: process.exec_id.clone(),
            rows: rows.into(),
            columns: columns.into(),
            ..Default::default()
        };
        let call = self.client.resize_terminal(Context::default(), &request);
        self.call(SHORT, || format!("resizing the terminal of {process}"), call)
            .await
            .map(drop)
    }

    pub async fn delete_exec(&self, process: &ProcessId) -> Result<(), Error> {
        let request = process_ref(process);
        let call = self.client.delete_exec(Context::default(), &request);
        self.call(LONG, || format!("deleting {process}"), call)
            .await
            .map(drop)
    }

    pub async fn delete_container(&self, id: &str) -> Result<(), Error> {
        let request = container_ref(id);
        let call = self.client.delete_container(Context::default(), &request);
        self.call(LONG, || format!("deleting container {id}"), call)
            .await
            .map(drop)
    }

    pub async fn pause(&self, id: &str) -> Result<(), Error> {
        let request = container_ref(id);
        let call = self.client.pause_container(Context::default(), &request);
        self.call(SHORT, || format!("pausing container {id}"), call)
            .await
            .map(drop)
    }

    pub async fn resume(&self, id: &str) -> Result<(), Error> {
        let request = container_ref(id);
        let call = self.client.resume_container(Context::default(), &request);
        self.call(SHORT, || format!("resuming container {id}"), call)
            .await
            .map(drop)
    }

    pub async fn update(&self, id: &str, resources_json: &[u8]) -> Result<(), Error> {
        let request = UpdateContainerRequest {
            container_id: id.to_owned(),
            resources: resources_json.to_vec(),
            ..Default::default()
        };
        let call = self.client.update_container(Context::default(), &request);
        self.call(SHORT, || format!("updating container {id}"), call)
            .await
            .map(drop)
    }

    pub async fn stats(&self, id: &str) -> Result<ContainerStatsResponse, Error> {
        let request = container_ref(id);
        let call = self.client.container_stats(Context::default(), &request);
        self.call(SHORT, || format!("reading the counters of container {id}"), call)
            .await
    }

    /// Waits for a call's answer, for so long, and translates what went wrong.
    async fn call<T>(
        &self,
        limit: Duration,
        what: impl FnOnce() -> String,
        call: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T, Error> {
        match tokio::time::timeout(limit, call).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(ttrpc::Error::RpcStatus(status))) => Err(Error::Guest(guest_failure(&status, what()))),
            Ok(Err(error)) => Err(Error::Agent(Arc::new(AgentError::Lost {
                what: what(),
                cause: error.to_string(),
            }))),
            Err(_elapsed) => Err(Error::Agent(Arc::new(AgentError::Silent {
                what: what(),
                seconds: limit.as_secs(),
            }))),
        }
    }
}

fn container_ref(id: &str) -> ContainerRef {
    ContainerRef {
        container_id: id.to_owned(),
        ..Default::default()
    }
}

fn process_ref(process: &ProcessId) -> ProcessRef {
    ProcessRef {
        container_id: process.container_id.clone(),
        exec_id: process.exec_id.clone(),
        ..Default::default()
    }
}

/// Reads what the agent says of its failure. The guest chose the bytes: whatever they are, this ends in an error
/// that can be shown.
fn guest_failure(status: &ttrpc::Status, what: String) -> GuestFailure {
    let failure = status
        .details
        .iter()
        .find(|detail| detail.type_url.rsplit('/').next() == Some(FAILURE))
        .and_then(|detail| Failure::parse_from_bytes(&detail.value).ok())
        .unwrap_or_default();
    let reason = failure.reason.enum_value_or(Reason::REASON_UNSPECIFIED);
    let kind = match (reason, status.code()) {
        (Reason::EXECUTABLE_NOT_FOUND, _) => ErrorKind::ExecutableNotFound,
        (Reason::EXECUTABLE_NOT_PERMITTED, _) => ErrorKind::ExecutableNotPermitted,
        (_, ttrpc::Code::NOT_FOUND) => ErrorKind::NotFound,
        (_, ttrpc::Code::ALREADY_EXISTS) => ErrorKind::AlreadyExists,
        (_, ttrpc::Code::FAILED_PRECONDITION) => ErrorKind::FailedPrecondition,
        (_, ttrpc::Code::INVALID_ARGUMENT) => ErrorKind::InvalidArgument,
        (_, ttrpc::Code::UNIMPLEMENTED) => ErrorKind::Unimplemented,
        (_, ttrpc::Code::RESOURCE_EXHAUSTED) => ErrorKind::ResourceExhausted,
        (_, ttrpc::Code::PERMISSION_DENIED) => ErrorKind::PermissionDenied,
        (_, ttrpc::Code::UNAVAILABLE) => ErrorKind::Unavailable,
        _ => ErrorKind::Internal,
    };
    GuestFailure {
        kind,
        what,
        message: printable(&status.message),
        subject: printable(&failure.subject),
        reason,
    }
}

fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// The host's wall clock in nanoseconds since the epoch.
fn realtime_ns() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|since| i64::try_from(since.as_nanos()).ok())
        .unwrap_or(0)
}

fn entropy() -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; ENTROPY_BYTES];
    // SAFETY: the buffer is as long as said. Up to 256 bytes are never cut short once the pool is initialised
    // (getrandom(2)), and the result is checked all the same.
    let filled = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    match usize::try_from(filled) {
        Ok(ENTROPY_BYTES) => Ok(bytes),
        Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protobuf::well_known_types::any::Any;

    fn status(code: ttrpc::Code, message: &str, detail: Option<(&str, Vec<u8>)>) -> ttrpc::Status {
        let mut status = ttrpc::get_status(code, message);
        if let Some((type_url, value)) = detail {
            status.details.push(ttrpc::proto::Any {
                type_url: type_url.to_owned(),
                value,
                ..Default::default()
            });
        }
        status
    }

    fn failure(reason: Reason, subject: &str) -> Option<(&'static str, Vec<u8>)> {
        let failure = Failure {
            reason: reason.into(),
            subject: subject.to_owned(),
            ..Default::default()
        };
        let any = Any::pack(&failure).unwrap();
        assert_eq!(any.type_url, "type.googleapis.com/kata_rs.agent.v1.Failure");
        Some(("type.googleapis.com/kata_rs.agent.v1.Failure", any.value))
    }

    #[test]
    fn the_agents_reason_outweighs_its_code() {
        let status = status(
            ttrpc::Code::NOT_FOUND,
            "/bin/nope: no such file or directory",
            failure(Reason::EXECUTABLE_NOT_FOUND, "/bin/nope"),
        );
        let failure = guest_failure(&status, "starting container c".into());
        assert_eq!(failure.kind, ErrorKind::ExecutableNotFound);
        assert_eq!(failure.subject, "/bin/nope");
    }

    #[test]
    fn a_guest_that_sends_rubbish_still_makes_an_error_that_can_be_shown() {
        let status = status(
            ttrpc::Code::NOT_FOUND,
            "\x1b[2Jgotcha\n",
            Some(("type.googleapis.com/kata_rs.agent.v1.Failure", vec![0xff; 9])),
        );
        let failure = guest_failure(&status, "x".into());
        assert_eq!(failure.kind, ErrorKind::NotFound);
        assert_eq!(failure.message, " [2Jgotcha ");
    }

    #[tokio::test]
    async fn an_agent_of_another_version_is_told_so_and_refused() {
        let (host, mut guest) = UnixStream::pair().unwrap();
        let hello = Hello {
            version: hello::AGENT_VERSION + 1,
            ..Default::default()
        };
        guest.write_all(&hello::encode(&hello)).await.unwrap();
        let error = Agent::connect(host).await.unwrap_err();
        assert!(
            matches!(error, AgentError::Hello(HelloError::Version { .. })),
            "{error:?}"
        );
        assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
        let mut reply = Vec::new();
        guest.read_to_end(&mut reply).await.unwrap();
        assert!(matches!(
            hello::check_reply(&reply[4..]),
            Err(HelloError::Refused(_))
        ));
    }

    #[tokio::test]
    async fn a_guest_that_hangs_up_in_the_handshake_is_an_error() {
        let (host, mut guest) = UnixStream::pair().unwrap();
        guest.write_all(&[9, 0]).await.unwrap();
        drop(guest);
        assert!(matches!(
            Agent::connect(host).await,
            Err(AgentError::Handshake(_))
        ));
    }
}
