//! The configuration file: few keys, each with a default, a range and a user. `config.example.toml` documents them
//! for administrators.
//!
//! Reading and checking live here; what a key does lives with its user.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use oci_spec::runtime::Spec;
use serde::{Deserialize, Deserializer, de};

use crate::annotations::{AnnotationError, EnabledAnnotations};
use crate::error::{ErrorKind, kind_of_io};
use crate::limits::{DeviceLimit, DeviceLimits};

/// Where the configuration is looked for when nobody names one. It may be absent.
pub const DEFAULT_PATH: &str = "/etc/kata-rs/config.toml";

/// Which version of containerd's task API the shim announces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TaskApi {
    /// Version 3, or 2 when the caller takes no events (CRI-O).
    #[default]
    Auto,
    /// `containerd.task.v2.Task`.
    #[serde(rename = "2")]
    V2,
    /// `containerd.task.v3.Task`.
    #[serde(rename = "3")]
    V3,
}

/// What becomes of a pod that asks for the host's network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HostNetwork {
    /// It is refused.
    #[default]
    Refuse,
    /// It has no network.
    None,
}

/// How far a VM may grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Most {
    /// To the host's memory; to 8 of its CPUs, or what the VM booted with if that is more.
    Auto,
    /// So far; 0 is not at all.
    UpTo(u32),
}

/// The guest kernel's CONFIG_NR_CPUS.
pub(crate) const MOST_VCPUS: u8 = 64;

/// How this host runs its VMs.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    #[serde(deserialize_with = "absolute")]
    kernel: PathBuf,
    #[serde(deserialize_with = "absolute")]
    guest_image: PathBuf,
    #[serde(deserialize_with = "absolute")]
    vmm: PathBuf,
    #[serde(deserialize_with = "absolute")]
    task: PathBuf,
    kernel_params: String,
    #[serde(deserialize_with = "in_range::<_, u8, 1, { MOST_VCPUS as i64 }>")]
    default_vcpus: u8,
    #[serde(deserialize_with = "in_range::<_, u32, 128, 16_777_216>")]
    default_memory_mib: u32,
    #[serde(deserialize_with = "in_range::<_, u32, 32, 4096>")]
    memory_overhead_mib: u32,
    #[serde(deserialize_with = "most::<_, { MOST_VCPUS as i64 }>")]
    max_vcpus: Most,
    #[serde(deserialize_with = "most::<_, 16_777_216>")]
    max_memory_mib: Most,
    #[serde(deserialize_with = "in_range::<_, u32, 1, 3600>")]
    hello_timeout_s: u32,
    #[serde(deserialize_with = "in_range::<_, u8, 0, 16>")]
    block_slots: u8,
    debug_console: bool,
    task_api: TaskApi,
    host_network: HostNetwork,
    block_limit: DeviceLimit,
    net_rx_limit: DeviceLimit,
    net_tx_limit: DeviceLimit,
    enable_annotations: EnabledAnnotations,
}

impl Default for Config {
    /// The defaults, with the files of the installation that the running executable belongs to.
    fn default() -> Self {
        // The executable of a process whose file was replaced reads as "… (deleted)": only its directory counts.
        let executable = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("/usr/local/bin/kata-rs"));
        let prefix = executable
            .parent()
            .and_then(Path::parent)
            .unwrap_or(Path::new("/usr/local"));
        Self::of_installation(prefix)
    }
}

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("the configuration {path} cannot be read: {cause}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// A line is not TOML, names an unknown key, or gives a key a value it cannot have.
    #[error("the configuration is not valid: {origin}:{line}: `{text}`: {message}")]
    Invalid {
        /// Where the text came from: a path, or words.
        origin: String,
        /// The line, from 1.
        line: usize,
        /// What the line says.
        text: String,
        /// What is wrong, with the known keys or the range.
        message: String,
    },
}

impl ConfigError {
    /// What kind of failure it is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Unreadable { cause, .. } if cause.kind() == io::ErrorKind::NotFound => ErrorKind::NotFound,
            Self::Unreadable { cause, .. } => kind_of_io(cause),
            Self::Invalid { .. } => ErrorKind::InvalidArgument,
        }
    }
}

impl Config {
    /// The defaults for the files of an installation under `prefix`.
    fn of_installation(prefix: &Path) -> Self {
        let libexec = prefix.join("lib/kata-rs");
        Self {
            kernel: libexec.join("vmlinux"),
            guest_image: libexec.join("guest.img"),
            vmm: libexec.join("kata-rs-vmm"),
            task: libexec.join("kata-rs-task"),
            kernel_params: String::new(),
            default_vcpus: 1,
            default_memory_mib: 512,
            memory_overhead_mib: 64,
            max_vcpus: Most::Auto,
            max_memory_mib: Most::Auto,
            hello_timeout_s: 60,
            block_slots: 8,
            debug_console: false,
            task_api: TaskApi::Auto,
            host_network: HostNetwork::Refuse,
            block_limit: DeviceLimit::default(),
            net_rx_limit: DeviceLimit::default(),
            net_tx_limit: DeviceLimit::default(),
            enable_annotations: EnabledAnnotations::default(),
        }
    }

    /// Reads a configuration file. Without a path: [`DEFAULT_PATH`] when it exists, else the defaults.
    ///
    /// # Errors
    /// [`ConfigError`], also when `path` names a file that does not exist.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let (path, optional) = match path {
            Some(path) => (path, false),
            None => (Path::new(DEFAULT_PATH), true),
        };
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&text, &path.display().to_string()),
            Err(cause) if optional && cause.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(cause) => Err(ConfigError::Unreadable {
                path: path.to_owned(),
                cause,
            }),
        }
    }

    /// Reads a configuration from TOML text. `origin` says in errors where the text came from.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`].
    pub fn parse(text: &str, origin: &str) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error| {
            let start = error.span().map_or(0, |span| span.start).min(text.len());
            let line = text.as_bytes()[..start]
                .iter()
                .filter(|byte| **byte == b'\n')
                .count();
            ConfigError::Invalid {
                origin: origin.to_owned(),
                line: line + 1,
                text: text.lines().nth(line).unwrap_or_default().trim().to_owned(),
                message: error.message().to_owned(),
            }
        })
    }

    /// The guest kernel: a `vmlinux` ELF file.
    #[must_use]
    pub fn kernel(&self) -> &Path {
        &self.kernel
    }

    /// The guest image that holds the agent.
    #[must_use]
    pub fn guest_image(&self) -> &Path {
        &self.guest_image
    }

    /// The VMM's executable.
    #[must_use]
    pub fn vmm(&self) -> &Path {
        &self.vmm
    }

    /// The executable of the host process that stands for each container and exec.
    #[must_use]
    pub fn task(&self) -> &Path {
        &self.task
    }

    /// Words appended to the guest kernel's command line.
    #[must_use]
    pub fn kernel_params(&self) -> &str {
        &self.kernel_params
    }

    /// vCPUs of a VM whose containers have no CPU limit, and the least of any VM: 1–64.
    #[must_use]
    pub fn default_vcpus(&self) -> u8 {
        self.default_vcpus
    }

    /// Memory of a VM whose containers have no memory limit, in MiB: 128–16777216.
    #[must_use]
    pub fn default_memory_mib(&self) -> u32 {
        self.default_memory_mib
    }

    /// What a VM gets on top of its containers' memory limits for its kernel and agent, in MiB: 32–4096.
    #[must_use]
    pub fn memory_overhead_mib(&self) -> u32 {
        self.memory_overhead_mib
    }

    /// vCPUs that a VM may grow to: 0–64.
    #[must_use]
    pub fn max_vcpus(&self) -> Most {
        self.max_vcpus
    }

    /// Memory that a VM may grow to, in MiB: 0–16777216.
    #[must_use]
    pub fn max_memory_mib(&self) -> Most {
        self.max_memory_mib
    }

    /// How long a guest may take from the start of its VMM until its agent says Hello: 1–3600 seconds.
    #[must_use]
    pub fn hello_timeout(&self) -> Duration {
        Duration::from_secs(self.hello_timeout_s.into())
    }

    /// Places for block devices in a VM, 0–16: one for each container whose root file system is one.
    #[must_use]
    pub fn block_slots(&self) -> u8 {
        self.block_slots
    }

    /// Whether the guest's whole boot shows on its console, which errors quote. Slows the boot down.
    #[must_use]
    pub fn debug_console(&self) -> bool {
        self.debug_console
    }

    /// The annotations that pods may have.
    #[must_use]
    pub fn enable_annotations(&self) -> &EnabledAnnotations {
        &self.enable_annotations
    }

    /// The configuration for the pod whose first container has this specification: with what its annotations ask for.
    ///
    /// # Errors
    /// [`AnnotationError`] for annotations that are not allowed.
    pub fn for_pod(mut self, spec: &Spec) -> Result<Self, AnnotationError> {
        let wishes = self.enable_annotations.read(spec)?;
        if let Some(vcpus) = wishes.default_vcpus.and_then(|vcpus| vcpus.try_into().ok()) {
            self.default_vcpus = vcpus;
        }
        if let Some(memory) = wishes.default_memory_mib {
            self.default_memory_mib = memory;
        }
        if let Some(overhead) = wishes.memory_overhead_mib {
            self.memory_overhead_mib = overhead;
        }
        if let Some(params) = wishes.kernel_params {
            self.kernel_params = format!("{} {params}", self.kernel_params).trim().to_owned();
        }
        Ok(self)
    }

    /// What becomes of a pod that asks for the host's network.
    #[must_use]
    pub fn host_network(&self) -> HostNetwork {
        self.host_network
    }

    /// How much each block device and network interface of a VM may do.
    pub(crate) fn device_limits(&self) -> DeviceLimits {
        DeviceLimits {
            block: self.block_limit,
            net_rx: self.net_rx_limit,
            net_tx: self.net_tx_limit,
        }
    }

    /// The task API that the shim announces.
    #[must_use]
    pub fn task_api(&self) -> TaskApi {
        self.task_api
    }
}

fn absolute<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    let path = PathBuf::deserialize(deserializer)?;
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(de::Error::custom(
            "give an absolute path, one that begins with `/`",
        ))
    }
}

/// A number from 0 on, or `"auto"`.
fn most<'de, D: Deserializer<'de>, const MAX: i64>(deserializer: D) -> Result<Most, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Value {
        Number(i64),
        Word(String),
    }
    let said = match Value::deserialize(deserializer) {
        Ok(Value::Word(word)) if word == "auto" => return Ok(Most::Auto),
        Ok(Value::Number(number)) => match u32::try_from(number) {
            Ok(most) if number <= MAX => return Ok(Most::UpTo(most)),
            _ => number.to_string(),
        },
        Ok(Value::Word(word)) => format!("{word:?}"),
        Err(_) => "this".to_owned(),
    };
    Err(de::Error::custom(format_args!(
        "{said} cannot be used: give a number from 0 to {MAX}, or \"auto\""
    )))
}

fn in_range<'de, D, T, const MIN: i64, const MAX: i64>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: TryFrom<i64>,
{
    let value = i64::deserialize(deserializer)?;
    if (MIN..=MAX).contains(&value)
        && let Ok(value) = T::try_from(value)
    {
        return Ok(value);
    }
    Err(de::Error::custom(format_args!(
        "{value} is out of range: give a number from {MIN} to {MAX}"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../config.example.toml");

    fn refused(text: &str) -> String {
        Config::parse(text, "/etc/kata-rs/config.toml")
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn the_example_holds_every_key_with_its_default() {
        assert_eq!(Config::parse(EXAMPLE, "example").unwrap(), Config::default());
        let is_setting = |line: &&str| line.split_once(" = ").is_some_and(|(key, _)| !key.contains(' '));
        let settings: Vec<&str> = EXAMPLE
            .lines()
            .filter_map(|line| line.strip_prefix('#'))
            .filter(is_setting)
            .collect();
        let config = Config::parse(&settings.join("\n"), "example").unwrap();
        assert_eq!(config, Config::of_installation(Path::new("/usr/local")));
        let known = refused("unknown_key = 1").matches('`').count() / 2 - 2;
        assert_eq!(settings.len(), known, "{settings:?}");
    }

    #[test]
    fn an_unknown_key_is_named_with_its_file_its_line_and_the_known_keys() {
        let error = refused("# mine\ndefault_vcpus = 2\nkernal = \"/k\"\n");
        assert!(
            error.contains("/etc/kata-rs/config.toml:3: `kernal = \"/k\"`: unknown field `kernal`"),
            "{error}"
        );
        for key in ["`kernel`", "`guest_image`", "`hello_timeout_s`", "`task_api`"] {
            assert!(error.contains(key), "{error}");
        }
        assert!(!error.contains('\n'), "{error}");
    }

    #[test]
    fn a_value_out_of_its_range_is_named_with_the_range() {
        let error = refused("default_vcpus = 0");
        assert!(
            error.contains(":1: `default_vcpus = 0`: 0 is out of range"),
            "{error}"
        );
        assert!(error.contains("from 1 to 64"), "{error}");
        assert!(refused("default_memory_mib = 64").contains("from 128"));
        assert!(refused("hello_timeout_s = -1").contains("-1 is out of range"));
        assert!(
            refused("max_vcpus = 65").contains("65 cannot be used: give a number from 0 to 64, or \"auto\"")
        );
        assert!(refused("max_memory_mib = \"all\"").contains("\"all\" cannot be used"));
        assert!(refused("max_memory_mib = -1").contains("-1 cannot be used"));
        assert!(refused("max_vcpus = true").contains("this cannot be used"));
        assert!(
            refused("\n\nkernel = \"vmlinux\"").contains(":3: `kernel = \"vmlinux\"`: give an absolute path")
        );
    }

    #[test]
    fn a_value_of_another_type_and_broken_syntax_are_named_by_line() {
        assert!(refused("debug_console = 1").contains("`debug_console = 1`: invalid type"));
        assert!(refused("task_api = \"4\"").contains("expected one of `auto`, `2`, `3`"));
        assert!(refused("block_slots = 4\nkernel = ").contains(":2:"));
    }

    #[test]
    fn only_a_file_that_nobody_named_may_be_absent() {
        let error = Config::load(Some(Path::new("/nonexistent/config.toml"))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.to_string().contains("/nonexistent/config.toml"), "{error}");
    }

    #[test]
    fn the_default_files_are_those_of_the_running_installation() {
        let config = Config::default();
        let executable = std::env::current_exe().unwrap();
        let prefix = executable.parent().unwrap().parent().unwrap();
        assert_eq!(config.vmm, prefix.join("lib/kata-rs/kata-rs-vmm"));
    }
}
