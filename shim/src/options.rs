//! The runtime options that containerd and CRI-O attach to a container: a `runtimeoptions.v1.Options` message
//! {1: type_url, 2: config_path, 3: config_body} in an `Any`, and the configuration they lead to.

use std::path::Path;

use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::empty::Empty;
use protobuf::{Message as _, UnknownValueRef};
use serde::{Deserialize, Serialize};

use sandbox::Config;
use sandbox::config::ConfigError;

/// Why runtime options were refused.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    /// Not the message it claims to be.
    #[error("the runtime options {type_url:?} are not a runtimeoptions.v1.Options message: {source}")]
    Malformed {
        /// What it claims to be.
        type_url: String,
        /// What the decoder said.
        source: protobuf::Error,
    },
    /// A text member that is not UTF-8, or of another wire type.
    #[error("the member {0} of the runtime options is not UTF-8 text")]
    NotText(&'static str),
}

/// Where the configuration of a sandbox comes from; both empty: the system's configuration file or the defaults.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuntimeOptions {
    /// `ConfigPath` of containerd's runtime section, `--runtime-config-path` of ctr.
    #[serde(default)]
    pub config_path: String,
    /// The runtime section's own keys as TOML; containerd fills it when there is no path.
    #[serde(default)]
    pub config_body: String,
}

impl RuntimeOptions {
    /// Reads an `Any`. `Ok(None)`: it is of another type, such as runc's options, and says nothing to us.
    pub fn from_any(any: &Any) -> Result<Option<Self>, OptionsError> {
        let name = any.type_url.rsplit('/').next().unwrap_or_default();
        // CRI's own copy of the message has a package name of its own with the same members.
        let ours = name.ends_with("runtimeoptions.v1.Options") || (name.is_empty() && !any.value.is_empty());
        if !ours {
            return Ok(None);
        }
        // A message without declared members keeps every field as it came.
        let fields = Empty::parse_from_bytes(&any.value).map_err(|source| OptionsError::Malformed {
            type_url: any.type_url.clone(),
            source,
        })?;
        let text = |number, member| match fields.special_fields.unknown_fields().get(number) {
            None => Ok(String::new()),
            Some(UnknownValueRef::LengthDelimited(bytes)) => std::str::from_utf8(bytes)
                .map(str::to_owned)
                .map_err(|_| OptionsError::NotText(member)),
            Some(_) => Err(OptionsError::NotText(member)),
        };
        Ok(Some(Self {
            config_path: text(2, "config_path")?,
            config_body: text(3, "config_body")?,
        }))
    }

    /// Whether they name no configuration of their own.
    pub fn is_default(&self) -> bool {
        self.config_path.is_empty() && self.config_body.is_empty()
    }

    /// Reads the configuration they name.
    pub fn load(&self) -> Result<Config, ConfigError> {
        if !self.config_path.is_empty() {
            Config::load(Some(Path::new(&self.config_path)))
        } else if !self.config_body.is_empty() {
            Config::parse(&self.config_body, "the runtime options")
        } else {
            Config::load(None)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(type_url: &str, value: &[u8]) -> Any {
        Any {
            type_url: type_url.into(),
            value: value.into(),
            ..Any::default()
        }
    }

    #[test]
    fn path_and_body_are_read() {
        let mut value = b"\x0a\x03abc\x12\x08/etc/x.y".to_vec();
        value.extend_from_slice(b"\x1a\x05a = 1");
        for url in [
            "runtimeoptions.v1.Options",
            "type.googleapis.com/runtimeoptions.v1.Options",
            "cri.runtimeoptions.v1.Options",
            "",
        ] {
            let options = RuntimeOptions::from_any(&any(url, &value)).unwrap().unwrap();
            assert_eq!(options.config_path, "/etc/x.y", "{url}");
            assert_eq!(options.config_body, "a = 1", "{url}");
            assert!(!options.is_default());
        }
    }

    #[test]
    fn other_types_say_nothing() {
        assert!(
            RuntimeOptions::from_any(&any("containerd.runc.v1.Options", b"\x08\x01"))
                .unwrap()
                .is_none()
        );
        assert!(RuntimeOptions::from_any(&any("", b"")).unwrap().is_none());
        assert!(
            RuntimeOptions::from_any(&any("runtimeoptions.v1.Options", b""))
                .unwrap()
                .unwrap()
                .is_default()
        );
    }

    #[test]
    fn malformed_options_are_refused() {
        let url = "runtimeoptions.v1.Options";
        assert!(matches!(
            RuntimeOptions::from_any(&any(url, b"\x12\x7fabc")),
            Err(OptionsError::Malformed { .. })
        ));
        assert!(matches!(
            RuntimeOptions::from_any(&any(url, b"\x10\x01")),
            Err(OptionsError::NotText("config_path"))
        ));
        assert!(matches!(
            RuntimeOptions::from_any(&any(url, b"\x1a\x01\xff")),
            Err(OptionsError::NotText("config_body"))
        ));
    }
}
