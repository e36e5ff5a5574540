//! The `start` action: finds the shim of the container's pod, or makes one, and answers with its address.
//!
//! The caller reads standard output and standard error as one text and waits for both to be closed: on success
//! nothing but the answer may be written, and the process that stays must hold neither.

use std::collections::HashMap;
use std::io::{self, IsTerminal as _, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use containerd_shim_protos::bootstrap_api::BootstrapResult;
use protobuf::Message as _;
use sandbox::config::{ConfigError, TaskApi};
use serde::Deserialize;

use crate::arguments::Arguments;
use crate::record;
use crate::request::{Dialect, RequestError, StartRequest};
use crate::socket::{self, Bound, SocketError};

/// Carries the runtime options to `serve`, as JSON.
pub const OPTIONS_ENV: &str = "KATA_RS_OPTIONS";

/// Where containerd takes events.
pub const TTRPC_ADDRESS_ENV: &str = "TTRPC_ADDRESS";

/// More than any caller sends.
const INPUT_LIMIT: u64 = 10 << 20;

/// Annotations that name the pod a container belongs to, the strongest first.
const GROUP_ANNOTATIONS: [&str; 3] = [
    "io.containerd.runc.v2.group",
    "io.kubernetes.cri.sandbox-id",
    "io.kubernetes.cri-o.SandboxID",
];

/// Why there is no shim.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// The bundle's path is unknown.
    #[error("cannot find the working directory, which is the bundle: {0}")]
    Bundle(#[source] io::Error),
    /// Standard input failed.
    #[error("cannot read standard input: {0}")]
    Input(#[source] io::Error),
    /// Standard input is nonsense.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The configuration is unusable.
    #[error("{}", sandbox::error::chain(.0))]
    Config(#[from] ConfigError),
    /// The container's specification is unusable.
    #[error("cannot read {path}: {source}")]
    Spec {
        /// `config.json`.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The bundle cannot be written.
    #[error("cannot write the file `address` into the bundle {bundle}: {source}")]
    Address {
        /// The bundle.
        bundle: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The process that stays cannot be started.
    #[error("cannot start the shim process: {0}")]
    Spawn(#[source] io::Error),
    /// The answer cannot be encoded.
    #[error("cannot encode the answer: {0}")]
    Answer(#[source] protobuf::Error),
}

/// Does it; returns what standard output gets.
pub fn start(arguments: &Arguments) -> Result<Vec<u8>, BootstrapError> {
    let bundle = match &arguments.bundle {
        Some(bundle) => bundle.clone(),
        None => std::env::current_dir().map_err(BootstrapError::Bundle)?,
    };
    let ttrpc_address = std::env::var(TTRPC_ADDRESS_ENV).unwrap_or_default();
    let request = StartRequest::read(arguments, ttrpc_address, &read_input()?)?;
    // The process that stays reads it again; here a mistake in it still reaches a person.
    let config = request.options.load()?;
    let group = group(&bundle)?.unwrap_or_else(|| arguments.id.clone());
    let dir = request
        .socket_dir
        .as_deref()
        .unwrap_or(Path::new(socket::DEFAULT_DIR));
    let path = socket::path(dir, &request.grpc_address, &arguments.namespace, &group)?;
    let address = format!("unix://{}", path.display());
    let bound = socket::bind(&path)?;
    let made = record::replace(&bundle, "address", address.as_bytes())
        .map_err(|source| BootstrapError::Address {
            bundle: bundle.clone(),
            source,
        })
        .and_then(|()| match bound {
            Bound::New(listener) => {
                spawn(arguments, &request, &group, &bundle, listener).map_err(BootstrapError::Spawn)
            }
            Bound::Answering => Ok(()),
        });
    if let Err(error) = made {
        // The listener is closed by now: the socket goes unless it is another shim's.
        let _ = socket::remove_stale(&path);
        let _ = std::fs::remove_file(bundle.join("address"));
        return Err(error);
    }
    let version = api_version(config.task_api(), &request.ttrpc_address);
    answer(request.dialect, version, address).map_err(BootstrapError::Answer)
}

fn read_input() -> Result<Vec<u8>, BootstrapError> {
    let mut input = Vec::new();
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        stdin
            .lock()
            .take(INPUT_LIMIT)
            .read_to_end(&mut input)
            .map_err(BootstrapError::Input)?;
    }
    Ok(input)
}

/// The pod that a bundle's specification names. `None`: the container is alone, or the specification comes later
/// (with the Sandbox API).
fn group(bundle: &Path) -> Result<Option<String>, BootstrapError> {
    let path = bundle.join("config.json");
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(BootstrapError::Spec { path, source }),
    };
    group_of(&text).map_err(|error| BootstrapError::Spec {
        path,
        source: error.into(),
    })
}

fn group_of(spec: &[u8]) -> serde_json::Result<Option<String>> {
    #[derive(Deserialize)]
    struct Annotated {
        #[serde(default)]
        annotations: Option<HashMap<String, String>>,
    }
    let mut annotations = serde_json::from_slice::<Annotated>(spec)?
        .annotations
        .unwrap_or_default();
    Ok(GROUP_ANNOTATIONS
        .iter()
        .find_map(|name| annotations.remove(*name).filter(|group| !group.is_empty())))
}

/// Starts the process that stays. The listening socket is its standard input; it shares nothing else.
fn spawn(
    arguments: &Arguments,
    request: &StartRequest,
    group: &str,
    bundle: &Path,
    listener: UnixListener,
) -> io::Result<()> {
    raise_oom_score();
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args([
            "-namespace",
            &arguments.namespace,
            "-id",
            group,
            "-address",
            &request.grpc_address,
        ])
        .arg("-bundle")
        .arg(bundle)
        .args(request.debug.then_some("-debug"))
        .arg("serve")
        .env(TTRPC_ADDRESS_ENV, &request.ttrpc_address)
        .env(OPTIONS_ENV, serde_json::to_string(&request.options)?)
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.spawn().map(drop)
}

/// The kernel shall kill the shim before containerd, and the shim inherits containerd's score: one more than that, as
/// runc's shim does. Failing leaves the inherited score, which is good enough.
fn raise_oom_score() {
    let parent = std::os::unix::process::parent_id();
    let score = std::fs::read_to_string(format!("/proc/{parent}/oom_score_adj"))
        .ok()
        .and_then(|text| text.trim().parse::<i32>().ok());
    if let Some(score) = score {
        let _ = std::fs::write("/proc/self/oom_score_adj", (score + 1).min(1000).to_string());
    }
}

/// The Task API version to announce. CRI-O and containerd 1.7 refuse a 3; CRI-O is known by having no event address.
fn api_version(choice: TaskApi, ttrpc_address: &str) -> i32 {
    match choice {
        TaskApi::V2 => 2,
        TaskApi::V3 => 3,
        TaskApi::Auto => {
            if ttrpc_address.is_empty() {
                2
            } else {
                3
            }
        }
    }
}

fn answer(dialect: Dialect, version: i32, address: String) -> protobuf::Result<Vec<u8>> {
    match dialect {
        // The form that every caller of version 2 understands.
        Dialect::Legacy if version == 2 => Ok(address.into_bytes()),
        Dialect::Legacy => Ok(serde_json::json!({
            "version": version,
            "address": address,
            "protocol": "ttrpc",
        })
        .to_string()
        .into_bytes()),
        Dialect::Bootstrap => BootstrapResult {
            version,
            address,
            protocol: "ttrpc".to_owned(),
            ..BootstrapResult::default()
        }
        .write_to_bytes(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_is_the_strongest_annotation() {
        let all = br#"{"annotations":{"io.kubernetes.cri-o.SandboxID":"crio","io.kubernetes.cri.sandbox-id":"cri","io.containerd.runc.v2.group":"group"}}"#;
        assert_eq!(group_of(all).unwrap().as_deref(), Some("group"));
        let cri = br#"{"annotations":{"io.kubernetes.cri-o.SandboxID":"crio","io.kubernetes.cri.sandbox-id":"cri","io.containerd.runc.v2.group":""}}"#;
        assert_eq!(group_of(cri).unwrap().as_deref(), Some("cri"));
        let crio = br#"{"annotations":{"io.kubernetes.cri-o.SandboxID":"crio"}}"#;
        assert_eq!(group_of(crio).unwrap().as_deref(), Some("crio"));
        assert_eq!(group_of(br#"{"annotations":null}"#).unwrap(), None);
        assert_eq!(group_of(b"{}").unwrap(), None);
        assert!(group_of(b"{").is_err());
    }

    #[test]
    fn a_bundle_without_specification_is_alone() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(group(dir.path()).unwrap(), None);
        std::fs::write(dir.path().join("config.json"), "[1").unwrap();
        let error = group(dir.path()).unwrap_err();
        assert!(error.to_string().contains("config.json"), "{error}");
    }

    #[test]
    fn the_version_follows_the_caller_unless_configured() {
        assert_eq!(api_version(TaskApi::Auto, ""), 2);
        assert_eq!(api_version(TaskApi::Auto, "/run/c.ttrpc"), 3);
        assert_eq!(api_version(TaskApi::V2, "/run/c.ttrpc"), 2);
        assert_eq!(api_version(TaskApi::V3, ""), 3);
    }

    #[test]
    fn each_dialect_gets_its_answer() {
        assert_eq!(
            answer(Dialect::Legacy, 2, "unix:///s".into()).unwrap(),
            b"unix:///s"
        );
        let json: serde_json::Value =
            serde_json::from_slice(&answer(Dialect::Legacy, 3, "unix:///s".into()).unwrap()).unwrap();
        assert_eq!(
            json,
            serde_json::json!({"version": 3, "address": "unix:///s", "protocol": "ttrpc"})
        );
        let bytes = answer(Dialect::Bootstrap, 3, "unix:///s".into()).unwrap();
        let result = BootstrapResult::parse_from_bytes(&bytes).unwrap();
        assert_eq!(
            (result.version, result.address.as_str(), result.protocol.as_str()),
            (3, "unix:///s", "ttrpc")
        );
        // containerd trims white space off the answer before it decodes it.
        assert!(!bytes[0].is_ascii_whitespace() && !bytes[bytes.len() - 1].is_ascii_whitespace());
    }
}
