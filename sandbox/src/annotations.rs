//! What the callers' annotations say: which part of a pod a container is, and how its VM shall differ from this host's
//! others.
//!
//! The second only as far as the administrator allows it, by name and value (`enable_annotations`). No annotation
//! names a file of the host or passes arguments to a program: there is no way to allow one that does. Sizes by CRI's own
//! annotations are read by `sizing`.

use std::collections::HashMap;
use std::fmt;
use std::ops::RangeInclusive;

use oci_spec::runtime::Spec;
use serde::{Deserialize, Deserializer, de};

use crate::error::ErrorKind;

/// containerd's CRI and CRI-O each have their own name for the same mark (containerd,
/// `internal/cri/annotations`; CRI-O, `pkg/annotations`).
const CONTAINER_TYPE: [&str; 2] = [
    "io.kubernetes.cri.container-type",
    "io.kubernetes.cri-o.ContainerType",
];

/// What a container is to its pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It belongs to no pod of CRI's.
    Alone,
    /// The one that CRI calls the pod's sandbox: elsewhere it runs `pause`, here the VM is the sandbox.
    Sandbox,
    /// One of the pod's containers.
    Member,
}

impl Role {
    /// What a specification's annotations say. A mark with another value counts as a container's.
    #[must_use]
    pub fn of(spec: &Spec) -> Self {
        spec.annotations()
            .as_ref()
            .map_or(Self::Alone, Self::from_annotations)
    }

    pub(crate) fn from_annotations(annotations: &HashMap<String, String>) -> Self {
        match CONTAINER_TYPE.iter().find_map(|key| annotations.get(*key)) {
            None => Self::Alone,
            Some(kind) if kind == "sandbox" => Self::Sandbox,
            Some(_) => Self::Member,
        }
    }
}

/// Every annotation that begins so is one of those here, or a mistake that is told.
const PREFIX: &str = "io.kata-rs.";
/// Kata Containers' settings. Those whose meaning is the same are understood; the others are told, as Kata tells those
/// that are not enabled.
const KATA_PREFIX: &str = "io.katacontainers.config.";
const KATA_NAMES: [(&str, &str); 3] = [
    ("hypervisor.default_vcpus", "default_vcpus"),
    ("hypervisor.default_memory", "default_memory_mib"),
    ("hypervisor.kernel_params", "kernel_params"),
];

/// Bytes of a value that is a list of words: the kernel's command line has 2048 (COMMAND_LINE_SIZE on x86).
const LONGEST: usize = 1024;

/// Why an annotation was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AnnotationError {
    /// Nothing has this name.
    #[error(
        "the annotation {0} is not supported: remove it; the supported ones are {PREFIX}default_vcpus, \
         {PREFIX}default_memory_mib, {PREFIX}memory_overhead_mib and {PREFIX}kernel_params"
    )]
    Unknown(String),
    /// The administrator does not allow it.
    #[error(
        "the annotation {key} is not enabled on this host: remove it, or have `{name}` added to enable_annotations in \
         the configuration of kata-rs"
    )]
    NotEnabled {
        /// The annotation.
        key: String,
        /// What allows it.
        name: &'static str,
    },
    /// The administrator does not allow this value.
    #[error("the annotation {key} is {value:?}, but this host allows {allowed}")]
    Value {
        /// The annotation.
        key: String,
        /// Its value.
        value: String,
        /// What it may be.
        allowed: String,
    },
}

impl AnnotationError {
    /// What kind of failure it is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidArgument
    }
}

/// The annotations that pods may have, each with the values that it may take: `enable_annotations` of the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EnabledAnnotations {
    #[serde(deserialize_with = "numbers::<_, 1, 64>")]
    default_vcpus: Option<Numbers>,
    #[serde(deserialize_with = "numbers::<_, 128, 16_777_216>")]
    default_memory_mib: Option<Numbers>,
    #[serde(deserialize_with = "numbers::<_, 32, 4096>")]
    memory_overhead_mib: Option<Numbers>,
    kernel_params: Option<Words>,
}

/// What a pod's annotations ask for, all of it allowed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    /// In place of the configuration's key of the same name.
    pub default_vcpus: Option<u32>,
    /// In place of the configuration's key of the same name.
    pub default_memory_mib: Option<u32>,
    /// In place of the configuration's key of the same name.
    pub memory_overhead_mib: Option<u32>,
    /// Added to the configuration's.
    pub kernel_params: Option<String>,
}

impl EnabledAnnotations {
    /// Reads the annotations of a pod or of one of its containers.
    ///
    /// # Errors
    /// [`AnnotationError`] for the first, by name, that is not supported or not allowed.
    pub fn read(&self, spec: &Spec) -> Result<Wishes, AnnotationError> {
        let mut wishes = Wishes::default();
        let mut ours: Vec<(&String, &String)> = spec.annotations().iter().flatten().collect();
        ours.retain(|(key, _)| key.starts_with(PREFIX) || key.starts_with(KATA_PREFIX));
        ours.sort();
        for (key, value) in ours {
            match (name_of(key), value.trim()) {
                (Some("default_vcpus"), value) => {
                    wishes.default_vcpus = number(key, value, "default_vcpus", self.default_vcpus.as_ref())?;
                }
                (Some("default_memory_mib"), value) => {
                    let allowed = self.default_memory_mib.as_ref();
                    wishes.default_memory_mib = number(key, value, "default_memory_mib", allowed)?;
                }
                (Some("memory_overhead_mib"), value) => {
                    let allowed = self.memory_overhead_mib.as_ref();
                    wishes.memory_overhead_mib = number(key, value, "memory_overhead_mib", allowed)?;
                }
                (Some("kernel_params"), value) => {
                    wishes.kernel_params = words(key, value, self.kernel_params.as_ref())?;
                }
                _ => return Err(AnnotationError::Unknown(key.clone())),
            }
        }
        Ok(wishes)
    }
}

/// The setting that an annotation is about.
fn name_of(key: &str) -> Option<&str> {
    if let Some(name) = key.strip_prefix(PREFIX) {
        return Some(name);
    }
    let kata = key.strip_prefix(KATA_PREFIX)?;
    let (_, name) = KATA_NAMES.iter().find(|(name, _)| *name == kata)?;
    Some(name)
}

fn number(
    key: &str,
    value: &str,
    name: &'static str,
    allowed: Option<&Numbers>,
) -> Result<Option<u32>, AnnotationError> {
    let allowed = allowed.ok_or_else(|| AnnotationError::NotEnabled {
        key: key.to_owned(),
        name,
    })?;
    let number = value.parse().ok().filter(|number| allowed.0.contains(number));
    number.map(Some).ok_or_else(|| AnnotationError::Value {
        key: key.to_owned(),
        value: shown(value),
        allowed: allowed.to_string(),
    })
}

fn words(key: &str, value: &str, allowed: Option<&Words>) -> Result<Option<String>, AnnotationError> {
    let allowed = allowed.ok_or_else(|| AnnotationError::NotEnabled {
        key: key.to_owned(),
        name: "kernel_params",
    })?;
    // Quotation marks would let a word hold blanks, and the kernel reads what is behind `--` as init's arguments.
    let plain =
        |word: &&str| word.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"') && *word != "--";
    let mut list = value.split(' ').filter(|word| !word.is_empty());
    if value.len() <= LONGEST && list.all(|word| plain(&word) && allowed.allow(word)) {
        return Ok(Some(value.to_owned()));
    }
    Err(AnnotationError::Value {
        key: key.to_owned(),
        value: shown(value),
        allowed: format!("words separated by blanks, of {allowed}"),
    })
}

/// As much of a value as belongs into a message.
fn shown(value: &str) -> String {
    value.chars().take(80).collect()
}

/// `MIN-MAX`, both included, or one number.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Numbers(RangeInclusive<u32>);

impl fmt::Display for Numbers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "whole numbers from {} to {}", self.0.start(), self.0.end())
    }
}

fn numbers<'de, D: Deserializer<'de>, const MIN: u32, const MAX: u32>(
    deserializer: D,
) -> Result<Option<Numbers>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let (first, last) = text.split_once('-').unwrap_or((&text, &text));
    match (first.trim().parse(), last.trim().parse()) {
        (Ok(first), Ok(last)) if MIN <= first && first <= last && last <= MAX => {
            Ok(Some(Numbers(first..=last)))
        }
        _ => Err(de::Error::custom(format_args!(
            "{text:?} is no range: give two numbers as in \"{MIN}-{MAX}\", from {MIN} to {MAX}"
        ))),
    }
}

/// Words, of which those that end in `*` stand for all that begin so.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct Words(Vec<String>);

impl Words {
    fn allow(&self, word: &str) -> bool {
        self.0.iter().any(|pattern| match pattern.strip_suffix('*') {
            Some(beginning) => word.starts_with(beginning),
            None => word == pattern,
        })
    }
}

impl fmt::Display for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn spec(annotations: &serde_json::Value) -> Spec {
        serde_json::from_value(serde_json::json!({ "ociVersion": "1.2.0", "annotations": annotations }))
            .unwrap()
    }

    const ALL: &str = r#"enable_annotations = { default_vcpus = "1-4", default_memory_mib = "128-2048",
        memory_overhead_mib = "64", kernel_params = ["quiet", "mitigations=*"] }"#;

    fn all() -> Config {
        Config::parse(&ALL.replace('\n', " "), "test").unwrap()
    }

    fn refused(config: &Config, key: &str, value: &str) -> AnnotationError {
        let spec = spec(&serde_json::json!({ key: value }));
        config.clone().for_pod(&spec).unwrap_err()
    }

    #[test]
    fn both_callers_marks_are_known() {
        let role = |annotations| Role::of(&spec(&annotations));
        assert_eq!(role(serde_json::json!({})), Role::Alone);
        assert_eq!(
            role(serde_json::json!({"io.containerd.runc.v2.group": "g"})),
            Role::Alone
        );
        for key in CONTAINER_TYPE {
            assert_eq!(role(serde_json::json!({ key: "sandbox" })), Role::Sandbox);
            assert_eq!(role(serde_json::json!({ key: "container" })), Role::Member);
        }
    }

    #[test]
    fn what_is_allowed_replaces_the_configurations_keys() {
        let ours = spec(&serde_json::json!({
            "io.kata-rs.default_vcpus": "4",
            "io.kata-rs.default_memory_mib": " 1024 ",
            "io.kata-rs.memory_overhead_mib": "64",
            "io.kata-rs.kernel_params": "quiet mitigations=off",
            "io.kubernetes.cri.sandbox-id": "x",
            "example.com/other": "y",
        }));
        let config = all().for_pod(&ours).unwrap();
        assert_eq!(config.default_vcpus(), 4);
        assert_eq!(config.default_memory_mib(), 1024);
        assert_eq!(config.memory_overhead_mib(), 64);
        assert_eq!(config.kernel_params(), "quiet mitigations=off");
        let katas = spec(&serde_json::json!({
            "io.katacontainers.config.hypervisor.default_vcpus": "2",
            "io.katacontainers.config.hypervisor.default_memory": "256",
            "io.katacontainers.config.hypervisor.kernel_params": "quiet",
        }));
        let config = all().for_pod(&katas).unwrap();
        assert_eq!((config.default_vcpus(), config.default_memory_mib()), (2, 256));
    }

    #[test]
    fn nothing_is_allowed_unless_the_administrator_says_so() {
        let config = Config::default();
        for key in [
            "io.kata-rs.default_vcpus",
            "io.katacontainers.config.hypervisor.default_memory",
            "io.kata-rs.kernel_params",
        ] {
            let error = refused(&config, key, "1");
            assert!(matches!(error, AnnotationError::NotEnabled { .. }), "{error}");
            assert!(error.to_string().contains(key), "{error}");
        }
    }

    #[test]
    fn values_out_of_bounds_are_told_with_the_bounds() {
        for value in ["0", "5", "-1", "1.5", "", "4294967297", "four"] {
            let error = refused(&all(), "io.kata-rs.default_vcpus", value);
            assert!(error.to_string().contains("from 1 to 4"), "{error}");
        }
        let long = "quiet ".repeat(200);
        for value in [
            "init=/bin/sh",
            "quiet init=/bin/sh",
            "quiet\ninit=/x",
            "mitigations=\"a b\"",
            "quiet -- x",
            "--",
            &long,
        ] {
            let error = refused(&all(), "io.kata-rs.kernel_params", value);
            assert!(error.to_string().contains("quiet, mitigations=*"), "{error}");
            assert!(error.to_string().len() < 400, "{error}");
        }
    }

    /// GHSA-rr59-xxvx-96qr: an annotation gave the file server arguments that shared the host's root directory.
    #[test]
    fn no_annotation_names_a_file_of_the_host_or_passes_arguments_ghsa_rr59() {
        for key in [
            "io.katacontainers.config.hypervisor.virtio_fs_extra_args",
            "io.katacontainers.config.hypervisor.virtio_fs_daemon",
            "io.katacontainers.config.hypervisor.path",
            "io.katacontainers.config.hypervisor.kernel",
            "io.katacontainers.config.hypervisor.image",
            "io.katacontainers.config.hypervisor.file_mem_backend",
            "io.katacontainers.config_path",
            "io.katacontainers.config.runtime.disable_guest_seccomp",
            "io.kata-rs.kernel",
            "io.kata-rs.guest_image",
            "io.kata-rs.vmm",
            "io.kata-rs.task",
            "io.kata-rs.enable_annotations",
            "io.kata-rs.",
        ] {
            let value = r#"["-o","source=/,sandbox=none"]"#;
            let ours = spec(&serde_json::json!({ key: value }));
            match all().for_pod(&ours) {
                Err(AnnotationError::Unknown(named)) => assert_eq!(named, key),
                // Not a setting at all: nobody reads it.
                Ok(config) if key == "io.katacontainers.config_path" => assert_eq!(config, all()),
                other => panic!("{key}: {other:?}"),
            }
        }
        for key in ["vmm", "kernel", "virtio_fs_extra_args", "guest_image"] {
            let text = format!("enable_annotations = {{ {key} = \"/x\" }}");
            let error = Config::parse(&text, "test").unwrap_err().to_string();
            assert!(error.contains("unknown field"), "{error}");
        }
    }

    #[test]
    fn ranges_beyond_what_a_vm_can_have_are_refused() {
        for range in ["0-4", "1-65", "4-1", "", "1-", "a", "1-2-3"] {
            let text = format!("enable_annotations = {{ default_vcpus = \"{range}\" }}");
            let error = Config::parse(&text, "test").unwrap_err().to_string();
            assert!(error.contains("from 1 to 64"), "{error}");
        }
    }
}
