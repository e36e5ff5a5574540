//! The members of the OCI runtime specification's config.json that a guest acts upon.
//!
//! Words that the specification enumerates stay strings here and are checked where they are used, so that an
//! error can name the member. Unknown members are ignored, as the specification asks (config.md,
//! "Extensibility"); members that ask for what this agent does not do are refused by [`check_supported`].

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};

/// What is wrong with a specification.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// Not JSON, or a member of a wrong type.
    #[error("the OCI {document} is not understood: {source}")]
    Syntax {
        /// `spec`, `process` or `linux.resources`.
        document: &'static str,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A member asks for what the guest does not do.
    #[error("{member}: {why}")]
    Unsupported {
        /// The member's path in config.json.
        member: String,
        /// What is missing, and the cure.
        why: String,
    },
    /// A member's value makes no sense.
    #[error("{member}: {why}")]
    Invalid {
        /// The member's path in config.json.
        member: String,
        /// What is wrong with it.
        why: String,
    },
}

impl SpecError {
    /// A member whose value makes no sense.
    pub fn invalid(member: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Invalid {
            member: member.into(),
            why: why.into(),
        }
    }

    /// A member that asks for what the guest does not do.
    pub fn unsupported(member: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Unsupported {
            member: member.into(),
            why: why.into(),
        }
    }
}

/// Decodes a JSON document.
///
/// # Errors
/// [`SpecError::Syntax`].
pub fn parse<'a, T: Deserialize<'a>>(document: &'static str, json: &'a [u8]) -> Result<T, SpecError> {
    serde_json::from_slice(json).map_err(|source| SpecError::Syntax { document, source })
}

/// Go encoders write `null` for empty lists and maps; it means the same as absence.
fn nullable<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// config.json.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Spec {
    pub process: Option<Process>,
    #[serde(deserialize_with = "nullable")]
    pub hostname: String,
    #[serde(deserialize_with = "nullable")]
    pub domainname: String,
    #[serde(deserialize_with = "nullable")]
    pub linux: Linux,
}

/// config.md, "Process".
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Process {
    #[serde(deserialize_with = "nullable")]
    pub user: User,
    #[serde(deserialize_with = "nullable")]
    pub args: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    pub env: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    pub cwd: String,
    pub capabilities: Option<Capabilities>,
    #[serde(deserialize_with = "nullable")]
    pub rlimits: Vec<Rlimit>,
    #[serde(deserialize_with = "nullable")]
    pub no_new_privileges: bool,
    pub oom_score_adj: Option<i32>,
    pub scheduler: Option<serde_json::Value>,
    pub io_priority: Option<serde_json::Value>,
    #[serde(rename = "execCPUAffinity")]
    pub exec_cpu_affinity: Option<serde_json::Value>,
}

/// config.md, "User".
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    pub umask: Option<u32>,
    #[serde(deserialize_with = "nullable")]
    pub additional_gids: Vec<u32>,
}

/// capabilities(7) sets, by name (`CAP_CHOWN`).
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Capabilities {
    #[serde(deserialize_with = "nullable")]
    pub bounding: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    pub effective: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    pub inheritable: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    pub permitted: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    pub ambient: Vec<String>,
}

/// One limit of getrlimit(2).
#[derive(Clone, Debug, Deserialize)]
pub struct Rlimit {
    #[serde(rename = "type")]
    pub kind: String,
    pub soft: u64,
    pub hard: u64,
}

/// config-linux.md.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Linux {
    #[serde(deserialize_with = "nullable")]
    pub namespaces: Vec<Namespace>,
    #[serde(deserialize_with = "nullable")]
    pub uid_mappings: Vec<serde_json::Value>,
    #[serde(deserialize_with = "nullable")]
    pub gid_mappings: Vec<serde_json::Value>,
    #[serde(deserialize_with = "nullable")]
    pub time_offsets: BTreeMap<String, serde_json::Value>,
    #[serde(deserialize_with = "nullable")]
    pub net_devices: BTreeMap<String, serde_json::Value>,
    #[serde(deserialize_with = "nullable")]
    pub devices: Vec<Device>,
    #[serde(deserialize_with = "nullable")]
    pub sysctl: BTreeMap<String, String>,
    pub resources: Option<Resources>,
    #[serde(deserialize_with = "nullable")]
    pub rootfs_propagation: String,
    #[serde(deserialize_with = "nullable")]
    pub masked_paths: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    pub readonly_paths: Vec<String>,
    pub seccomp: Option<Seccomp>,
    pub personality: Option<Personality>,
}

/// config-linux.md, "Namespaces".
#[derive(Clone, Debug, Deserialize)]
pub struct Namespace {
    #[serde(rename = "type")]
    pub kind: String,
    /// Not empty: the namespace is not the container's own. Which file it names means nothing in the guest.
    #[serde(default, deserialize_with = "nullable")]
    pub path: String,
}

/// config-linux.md, "Devices".
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Device {
    #[serde(rename = "type")]
    pub kind: String,
    pub path: String,
    #[serde(default)]
    pub major: i64,
    #[serde(default)]
    pub minor: i64,
    pub file_mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}

/// config-linux.md, "Personality".
#[derive(Clone, Debug, Deserialize)]
pub struct Personality {
    pub domain: String,
    #[serde(default, deserialize_with = "nullable")]
    pub flags: Vec<String>,
}

/// config-linux.md, "Control groups".
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Resources {
    #[serde(deserialize_with = "nullable")]
    pub devices: Vec<DeviceRule>,
    pub memory: Option<Memory>,
    pub cpu: Option<Cpu>,
    pub pids: Option<Pids>,
    #[serde(rename = "blockIO")]
    pub block_io: Option<BlockIo>,
    #[serde(deserialize_with = "nullable")]
    pub hugepage_limits: Vec<HugepageLimit>,
    #[serde(deserialize_with = "nullable")]
    pub rdma: BTreeMap<String, Rdma>,
    #[serde(deserialize_with = "nullable")]
    pub unified: BTreeMap<String, String>,
}

/// How much of an RDMA device may be used; absent is no limit.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Rdma {
    pub hca_handles: Option<u32>,
    pub hca_objects: Option<u32>,
}

/// One rule of the device allow list. An absent number means any.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct DeviceRule {
    pub allow: bool,
    #[serde(rename = "type", deserialize_with = "nullable")]
    pub kind: String,
    pub major: Option<i64>,
    pub minor: Option<i64>,
    #[serde(deserialize_with = "nullable")]
    pub access: String,
}

/// Memory limits in bytes; -1 means none.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Memory {
    pub limit: Option<i64>,
    pub reservation: Option<i64>,
    pub swap: Option<i64>,
    pub check_before_update: Option<bool>,
}

/// CPU limits. Shares as in cgroup v1, times in microseconds.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Cpu {
    pub shares: Option<u64>,
    pub quota: Option<i64>,
    pub burst: Option<u64>,
    pub period: Option<u64>,
    pub realtime_runtime: Option<i64>,
    pub realtime_period: Option<u64>,
    pub idle: Option<i64>,
}

/// Number of tasks.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Pids {
    pub limit: Option<i64>,
}

/// Block I/O limits.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BlockIo {
    pub weight: Option<u16>,
    #[serde(deserialize_with = "nullable")]
    pub weight_device: Vec<WeightDevice>,
    #[serde(deserialize_with = "nullable")]
    pub throttle_read_bps_device: Vec<ThrottleDevice>,
    #[serde(deserialize_with = "nullable")]
    pub throttle_write_bps_device: Vec<ThrottleDevice>,
    #[serde(rename = "throttleReadIOPSDevice", deserialize_with = "nullable")]
    pub throttle_read_iops_device: Vec<ThrottleDevice>,
    #[serde(rename = "throttleWriteIOPSDevice", deserialize_with = "nullable")]
    pub throttle_write_iops_device: Vec<ThrottleDevice>,
}

/// A weight for one device.
#[derive(Clone, Debug, Deserialize)]
pub struct WeightDevice {
    pub major: i64,
    pub minor: i64,
    pub weight: Option<u16>,
}

/// A rate for one device.
#[derive(Clone, Debug, Deserialize)]
pub struct ThrottleDevice {
    pub major: i64,
    pub minor: i64,
    pub rate: u64,
}

/// A limit of huge pages of one size.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HugepageLimit {
    pub page_size: String,
    pub limit: u64,
}

/// config-linux.md, "Seccomp".
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Seccomp {
    pub default_action: String,
    pub default_errno_ret: Option<u32>,
    #[serde(deserialize_with = "nullable")]
    pub architectures: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    pub flags: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    pub syscalls: Vec<SeccompRule>,
}

/// What happens to some system calls.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SeccompRule {
    pub names: Vec<String>,
    pub action: String,
    pub errno_ret: Option<u32>,
    #[serde(deserialize_with = "nullable")]
    pub args: Vec<SeccompArgument>,
}

/// A comparison of one argument.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SeccompArgument {
    pub index: u32,
    pub value: u64,
    #[serde(default)]
    pub value_two: u64,
    pub op: String,
}

/// Refuses members that ask for what the guest does not do. What has no meaning in a VM of one's own (hooks, host
/// cgroup path, security labels of the host, cache allocation) is not looked at.
///
/// # Errors
/// [`SpecError::Unsupported`] with the member's name.
pub fn check_supported(spec: &Spec) -> Result<(), SpecError> {
    let linux = &spec.linux;
    let why = "is not supported in the guest: remove it from the specification";
    for (member, present) in [
        ("linux.uidMappings", !linux.uid_mappings.is_empty()),
        ("linux.gidMappings", !linux.gid_mappings.is_empty()),
        ("linux.timeOffsets", !linux.time_offsets.is_empty()),
        ("linux.netDevices", !linux.net_devices.is_empty()),
    ] {
        if present {
            return Err(SpecError::unsupported(member, why));
        }
    }
    spec.process.as_ref().map_or(Ok(()), check_process_supported)
}

/// The same for a process alone.
///
/// # Errors
/// [`SpecError::Unsupported`] with the member's name.
pub fn check_process_supported(process: &Process) -> Result<(), SpecError> {
    let why = "is not supported in the guest: remove it from the specification";
    for (member, present) in [
        ("process.scheduler", process.scheduler.is_some()),
        ("process.ioPriority", process.io_priority.is_some()),
        ("process.execCPUAffinity", process.exec_cpu_affinity.is_some()),
    ] {
        if present {
            return Err(SpecError::unsupported(member, why));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nulls_and_unknown_members_mean_absence() {
        let spec: Spec = parse(
            "spec",
            br#"{"process":{"args":["a"],"env":null,"cwd":"/","capabilities":null,"new":1},
                 "linux":{"namespaces":[{"type":"pid"}],"maskedPaths":null,"resources":{"memory":{"limit":5}}},
                 "hooks":{"prestart":[]},"annotations":null}"#,
        )
        .unwrap();
        let process = spec.process.as_ref().unwrap();
        assert!(process.env.is_empty() && process.capabilities.is_none());
        assert_eq!(spec.linux.namespaces[0].path, "");
        assert_eq!(
            spec.linux
                .resources
                .as_ref()
                .unwrap()
                .memory
                .as_ref()
                .unwrap()
                .limit,
            Some(5)
        );
        check_supported(&spec).unwrap();
    }

    #[test]
    fn what_is_not_done_is_refused_by_name() {
        let spec: Spec = parse(
            "spec",
            br#"{"process":{"cwd":"/","ioPriority":{"class":"IOPRIO_CLASS_RT"}}}"#,
        )
        .unwrap();
        let error = check_supported(&spec).unwrap_err().to_string();
        assert!(error.starts_with("process.ioPriority: "), "{error}");
        let spec: Spec = parse("spec", br#"{"linux":{"uidMappings":[{"containerID":0}]}}"#).unwrap();
        let error = check_supported(&spec).unwrap_err().to_string();
        assert!(error.starts_with("linux.uidMappings: "), "{error}");
    }

    #[test]
    fn a_wrong_type_is_refused_with_its_place() {
        let error = parse::<Spec>("spec", br#"{"process":{"args":"sh"}}"#)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("OCI spec") && error.contains("line 1 column"),
            "{error}"
        );
    }
}
