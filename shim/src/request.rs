//! What the caller asks of `start`: the flags, the environment and standard input put together. Two dialects are in
//! use. Up to containerd 2.2 (and in CRI-O) standard input is empty or an `Any` with the runtime options; from
//! containerd 2.3 it is a `BootstrapParams` message. They are told apart by the id and namespace that the latter
//! repeats, because either message decodes as the other.

use std::path::PathBuf;

use containerd_shim_protos::bootstrap_api::BootstrapParams;
use protobuf::Message as _;
use protobuf::well_known_types::any::Any;

use crate::arguments::Arguments;
use crate::options::{OptionsError, RuntimeOptions};

/// Why the request was refused.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// Neither dialect.
    #[error(
        "standard input of start is neither a BootstrapParams message nor an Any with runtime options: {0}"
    )]
    Undecodable(#[source] protobuf::Error),
    /// A `BootstrapParams` for somebody else.
    #[error(
        "standard input of start is for {params_namespace}/{params_id}, but the flags -namespace and -id name {namespace}/{id}"
    )]
    Contradiction {
        /// Of standard input.
        params_namespace: String,
        /// Of standard input.
        params_id: String,
        /// Of the flags.
        namespace: String,
        /// Of the flags.
        id: String,
    },
    /// Bad runtime options.
    #[error(transparent)]
    Options(#[from] OptionsError),
}

/// How the caller wants to be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// Text: JSON, or the bare address for version 2 of the Task API.
    Legacy,
    /// A `BootstrapResult` message.
    Bootstrap,
}

/// What `start` is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartRequest {
    /// How to answer.
    pub dialect: Dialect,
    /// Where containerd takes events; empty: nowhere.
    pub ttrpc_address: String,
    /// containerd's gRPC address: with namespace and group it names the socket.
    pub grpc_address: String,
    /// Where the socket goes, when the caller has a wish.
    pub socket_dir: Option<PathBuf>,
    /// Log more.
    pub debug: bool,
    /// The configuration to use.
    pub options: RuntimeOptions,
}

impl StartRequest {
    /// Puts it together. `ttrpc_address` is the environment's.
    pub fn read(arguments: &Arguments, ttrpc_address: String, stdin: &[u8]) -> Result<Self, RequestError> {
        let mut request = Self {
            dialect: Dialect::Legacy,
            ttrpc_address,
            grpc_address: arguments.address.clone(),
            socket_dir: None,
            debug: arguments.debug,
            options: RuntimeOptions::default(),
        };
        if stdin.is_empty() {
            return Ok(request);
        }
        if let Ok(params) = BootstrapParams::parse_from_bytes(stdin) {
            if params.instance_id == arguments.id && params.namespace == arguments.namespace {
                return request.with_params(params);
            }
            // No Any has these members: this is the new dialect, with flags that contradict it.
            if !params.containerd_grpc_address.is_empty() || !params.containerd_ttrpc_address.is_empty() {
                return Err(RequestError::Contradiction {
                    params_namespace: params.namespace,
                    params_id: params.instance_id,
                    namespace: arguments.namespace.clone(),
                    id: arguments.id.clone(),
                });
            }
        }
        let any = Any::parse_from_bytes(stdin).map_err(RequestError::Undecodable)?;
        request.options = RuntimeOptions::from_any(&any)?.unwrap_or_default();
        Ok(request)
    }

    fn with_params(mut self, params: BootstrapParams) -> Result<Self, RequestError> {
        self.dialect = Dialect::Bootstrap;
        // The log levels are slog's numbers: INFO is 0, DEBUG -4; anything below INFO's half-way mark is chatty.
        self.debug |= params.log_level.value() < -2;
        if !params.containerd_ttrpc_address.is_empty() {
            self.ttrpc_address = params.containerd_ttrpc_address;
        }
        if !params.containerd_grpc_address.is_empty() {
            self.grpc_address = params.containerd_grpc_address;
        }
        self.socket_dir = params.socket_dir.filter(|dir| !dir.is_empty()).map(PathBuf::from);
        for any in params
            .extensions
            .into_iter()
            .filter_map(|extension| extension.value.into_option())
        {
            if let Some(options) = RuntimeOptions::from_any(&any)? {
                self.options = options;
            }
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::bootstrap_api::{Extension, LogLevel};
    use protobuf::{EnumOrUnknown, MessageField};

    use super::*;

    fn arguments() -> Arguments {
        Arguments {
            namespace: "k8s.io".into(),
            address: "/run/containerd/containerd.sock".into(),
            id: "pod1".into(),
            ..Arguments::default()
        }
    }

    fn options_any() -> Any {
        Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value: b"\x12\x06/x.cfg".to_vec(),
            ..Any::default()
        }
    }

    fn params() -> BootstrapParams {
        BootstrapParams {
            instance_id: "pod1".into(),
            namespace: "k8s.io".into(),
            log_level: EnumOrUnknown::new(LogLevel::LOG_LEVEL_DEBUG),
            containerd_ttrpc_address: "/t.sock".into(),
            containerd_grpc_address: "/g.sock".into(),
            extensions: vec![
                Extension::default(),
                Extension {
                    value: MessageField::some(options_any()),
                    ..Extension::default()
                },
            ],
            socket_dir: Some("/s".into()),
            ..BootstrapParams::default()
        }
    }

    #[test]
    fn empty_input_is_the_old_dialect_without_options() {
        let request = StartRequest::read(&arguments(), "/t".into(), b"").unwrap();
        assert_eq!(request.dialect, Dialect::Legacy);
        assert_eq!(request.ttrpc_address, "/t");
        assert_eq!(request.grpc_address, "/run/containerd/containerd.sock");
        assert!(request.options.is_default());
    }

    #[test]
    fn an_any_is_the_old_dialect() {
        let bytes = options_any().write_to_bytes().unwrap();
        let request = StartRequest::read(&arguments(), String::new(), &bytes).unwrap();
        assert_eq!(request.dialect, Dialect::Legacy);
        assert_eq!(request.options.config_path, "/x.cfg");
    }

    #[test]
    fn params_are_the_new_dialect() {
        let bytes = params().write_to_bytes().unwrap();
        let request = StartRequest::read(&arguments(), "/env".into(), &bytes).unwrap();
        assert_eq!(request.dialect, Dialect::Bootstrap);
        assert_eq!(request.ttrpc_address, "/t.sock");
        assert_eq!(request.grpc_address, "/g.sock");
        assert_eq!(request.socket_dir, Some(PathBuf::from("/s")));
        assert_eq!(request.options.config_path, "/x.cfg");
        assert!(request.debug);
    }

    #[test]
    fn params_for_another_container_are_refused() {
        let mut other = params();
        other.instance_id = "pod2".into();
        let error =
            StartRequest::read(&arguments(), String::new(), &other.write_to_bytes().unwrap()).unwrap_err();
        assert!(error.to_string().contains("k8s.io/pod2"), "{error}");
    }

    #[test]
    fn noise_is_refused() {
        assert!(matches!(
            StartRequest::read(&arguments(), String::new(), b"\xff\xff\xff"),
            Err(RequestError::Undecodable(_))
        ));
    }
}
