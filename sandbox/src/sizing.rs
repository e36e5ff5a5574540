//! How big a VM is: from what its containers may use at most, or the configuration's defaults.
//!
//! The limits themselves hold inside the guest, in its cgroups. The VM is sized so that a container meets its own
//! limit before the VM's end.

use std::collections::HashMap;

use oci_spec::runtime::{LinuxResources, Spec};

use crate::annotations::Role;
use crate::config::{Config, MOST_VCPUS};
use crate::error::ErrorKind;

/// vCPUs and memory of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizing {
    /// vCPUs, at least 1.
    pub vcpus: u8,
    /// Memory in MiB: a multiple of 2, at least 128.
    pub memory_mib: u32,
}

/// Why resources make no VM.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizingError {
    /// An annotation holds something else than a number.
    #[error("the annotation {key} is {value:?}: it must be a whole number")]
    NotANumber {
        /// The annotation.
        key: &'static str,
        /// Its value.
        value: String,
    },
    /// A member of the specification's resources has no meaning.
    #[error("{member} of the OCI specification is {value:?}: {expected}")]
    Invalid {
        /// Which.
        member: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        expected: &'static str,
    },
}

impl SizingError {
    /// What kind of failure it is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidArgument
    }
}

/// CRI's annotations on a pod's sandbox: the sums over the pod's containers, as the kubelet knows them before
/// any container exists (containerd, `internal/cri/annotations`).
const CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
/// CRI-O's: CRI's LinuxContainerResources with the same sums, as JSON (CRI-O, `pkg/annotations`).
const CRIO_RESOURCES: &str = "io.kubernetes.cri-o.PodLinuxResources";

/// The kernel's cpu.max period when none is given, in µs (Documentation/admin-guide/cgroup-v2.rst).
const DEFAULT_PERIOD: u64 = 100_000;

const MIB: u64 = 1 << 20;
/// A kernel needs this much to boot with room to spare.
const LEAST_MEMORY_MIB: u64 = 128;
/// The guest kernel describes each page of 4 KiB by 64 bytes.
const PAGE_DESCRIPTOR_SHARE: u64 = 64;

/// What this host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// CPUs this process may run on.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
}

impl Host {
    /// Asks the kernel.
    #[must_use]
    pub fn this() -> Self {
        let memory = rustix::system::sysinfo();
        Self {
            cpus: std::thread::available_parallelism()
                .map_or(1, |cpus| cpus.get().try_into().unwrap_or(u32::MAX)),
            memory_mib: memory.totalram.saturating_mul(memory.mem_unit.into()) / MIB,
        }
    }
}

/// What the containers of a VM may use together; `None` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Limits {
    cpus: Option<u64>,
    memory_bytes: Option<u64>,
}

impl Sizing {
    /// The size for a sandbox whose first container has this specification: a pod's from its annotations, a single
    /// container's from its own resources.
    ///
    /// # Errors
    /// [`SizingError`] for values that have no meaning.
    pub fn from_oci(spec: &Spec, config: &Config) -> Result<Self, SizingError> {
        Self::on_host(spec, config, Host::this())
    }

    fn on_host(spec: &Spec, config: &Config, host: Host) -> Result<Self, SizingError> {
        let limits = match spec.annotations() {
            Some(annotations) if Role::from_annotations(annotations) != Role::Alone => {
                Limits::of_pod(annotations)?
            }
            _ => match spec.linux().as_ref().and_then(|linux| linux.resources().as_ref()) {
                Some(resources) => Limits::of_container(resources)?,
                None => Limits::default(),
            },
        };
        Ok(Self {
            vcpus: limits.vcpus(config, host),
            memory_mib: limits.memory_mib(config, host),
        })
    }
}

impl Limits {
    fn of_pod(annotations: &HashMap<String, String>) -> Result<Self, SizingError> {
        if let Some(text) = annotations.get(CRIO_RESOURCES) {
            return Self::of_crio(text);
        }
        let number = |key: &'static str| match annotations.get(key).map(|value| value.trim()) {
            None | Some("") => Ok(None),
            Some(value) => value
                .parse::<i64>()
                .map(Some)
                .map_err(|_| SizingError::NotANumber {
                    key,
                    value: value.to_owned(),
                }),
        };
        let period = number(CPU_PERIOD)?.and_then(|period| u64::try_from(period).ok());
        Ok(Self {
            cpus: whole_cpus(number(CPU_QUOTA)?, period),
            memory_bytes: positive(number(MEMORY)?),
        })
    }

    fn of_crio(text: &str) -> Result<Self, SizingError> {
        #[derive(Default, serde::Deserialize)]
        #[serde(default)]
        struct Resources {
            cpu_period: i64,
            cpu_quota: i64,
            memory_limit_in_bytes: i64,
        }
        let resources: Option<Resources> = serde_json::from_str(text).map_err(|_| SizingError::Invalid {
            member: CRIO_RESOURCES,
            value: text.chars().take(200).collect(),
            expected: "it must be the JSON of CRI's LinuxContainerResources",
        })?;
        let resources = resources.unwrap_or_default();
        let period = u64::try_from(resources.cpu_period).ok();
        Ok(Self {
            cpus: whole_cpus(Some(resources.cpu_quota), period),
            memory_bytes: positive(Some(resources.memory_limit_in_bytes)),
        })
    }

    fn of_container(resources: &LinuxResources) -> Result<Self, SizingError> {
        let mut limits = Self {
            cpus: None,
            memory_bytes: positive(resources.memory().and_then(|memory| memory.limit())),
        };
        if let Some(cpu) = resources.cpu() {
            limits.cpus = match whole_cpus(cpu.quota(), cpu.period()) {
                Some(cpus) => Some(cpus),
                None => cpu.cpus().as_deref().map_or(Ok(None), count_cpus)?,
            };
        }
        Ok(limits)
    }

    /// A limit beyond the host's CPUs is no limit; what the configuration gives every VM is its writer's choice.
    fn vcpus(self, config: &Config, host: Host) -> u8 {
        let limit = self.cpus.unwrap_or(0).min(host.cpus.into());
        let wanted = limit.max(config.default_vcpus().into());
        u8::try_from(wanted).unwrap_or(MOST_VCPUS).min(MOST_VCPUS)
    }

    /// A limit beyond the host's memory is no limit: the VM ends where the host does.
    fn memory_mib(self, config: &Config, host: Host) -> u32 {
        let wanted = match self.memory_bytes {
            None => config.default_memory_mib().into(),
            Some(bytes) => {
                let limit = bytes.div_ceil(MIB);
                limit
                    .saturating_add(limit / PAGE_DESCRIPTOR_SHARE)
                    .saturating_add(config.memory_overhead_mib().into())
            }
        };
        let most = host.memory_mib.clamp(LEAST_MEMORY_MIB, u32::MAX.into()) & !1;
        let memory = wanted.max(LEAST_MEMORY_MIB).min(most).next_multiple_of(2);
        u32::try_from(memory).expect("at most u32::MAX & !1")
    }
}

/// Zero and negative numbers mean "no limit", in CRI as in the OCI specification.
fn positive(value: Option<i64>) -> Option<u64> {
    value
        .and_then(|value| u64::try_from(value).ok())
        .filter(|value| *value > 0)
}

fn whole_cpus(quota: Option<i64>, period: Option<u64>) -> Option<u64> {
    let period = period.filter(|period| *period > 0).unwrap_or(DEFAULT_PERIOD);
    positive(quota).map(|quota| quota.div_ceil(period))
}

/// How many CPUs a list such as `0-2,7` names (cpuset(7), "List format"); `None` for an empty list.
fn count_cpus(list: &str) -> Result<Option<u64>, SizingError> {
    let invalid = || SizingError::Invalid {
        member: "linux.resources.cpu.cpus",
        value: list.to_owned(),
        expected: "give CPU numbers and ranges, as in 0-2,7",
    };
    let list = list.trim();
    if list.is_empty() {
        return Ok(None);
    }
    let mut count: u64 = 0;
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| text.trim().parse::<u32>().map_err(|_| invalid());
        let (first, last) = (number(first)?, number(last)?);
        let length = last.checked_sub(first).ok_or_else(invalid)?;
        count = count.saturating_add(u64::from(length) + 1);
    }
    Ok(Some(count))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Host = Host {
        cpus: 8,
        memory_mib: 16_384,
    };

    fn size(spec: &str) -> Result<Sizing, SizingError> {
        let spec: Spec = serde_json::from_str(spec).unwrap();
        Sizing::on_host(&spec, &Config::default(), HOST)
    }

    fn limited(resources: &str) -> Sizing {
        size(&format!(
            r#"{{"ociVersion":"1.2.0","linux":{{"resources":{resources}}}}}"#
        ))
        .unwrap()
    }

    #[test]
    fn without_limits_the_defaults_hold() {
        let default = Sizing {
            vcpus: 1,
            memory_mib: 512,
        };
        assert_eq!(size(r#"{"ociVersion":"1.2.0"}"#), Ok(default));
        assert_eq!(
            limited(r#"{"memory":{"limit":-1},"cpu":{"quota":-1,"period":100000,"shares":1024}}"#),
            default
        );
    }

    #[test]
    fn cpus_are_rounded_up_and_end_at_the_hosts() {
        assert_eq!(limited(r#"{"cpu":{"quota":150000,"period":100000}}"#).vcpus, 2);
        assert_eq!(limited(r#"{"cpu":{"quota":10000}}"#).vcpus, 1);
        assert_eq!(limited(r#"{"cpu":{"quota":9900000,"period":100000}}"#).vcpus, 8);
        assert_eq!(limited(r#"{"cpu":{"cpus":"0-2,7"}}"#).vcpus, 4);
        assert_eq!(
            limited(r#"{"cpu":{"quota":200000,"period":100000,"cpus":"0-5"}}"#).vcpus,
            2
        );
    }

    #[test]
    fn a_memory_limit_fits_into_its_vm_with_room_for_the_kernel() {
        // 512 + 512/64 + 64
        assert_eq!(limited(r#"{"memory":{"limit":536870912}}"#).memory_mib, 584);
        assert_eq!(limited(r#"{"memory":{"limit":1}}"#).memory_mib, 128);
        // 101 + 1 + 64 = 166; 102 + 1 + 64 = 167, rounded up to a multiple of 2.
        assert_eq!(limited(r#"{"memory":{"limit":105906176}}"#).memory_mib, 166);
        assert_eq!(limited(r#"{"memory":{"limit":105906177}}"#).memory_mib, 168);
        assert_eq!(
            limited(r#"{"memory":{"limit":9223372036854775807}}"#).memory_mib,
            16_384
        );
    }

    #[test]
    fn a_pod_is_sized_by_its_annotations_and_not_by_the_pause_container() {
        let spec = |annotations: &str| {
            size(&format!(
                r#"{{"ociVersion":"1.2.0","annotations":{{"io.kubernetes.cri.container-type":"sandbox"{annotations}}},
                    "linux":{{"resources":{{"memory":{{"limit":1073741824}},"cpu":{{"quota":400000}}}}}}}}"#
            ))
        };
        let sized = spec(
            r#","io.kubernetes.cri.sandbox-cpu-period":"100000","io.kubernetes.cri.sandbox-cpu-quota":"250000",
               "io.kubernetes.cri.sandbox-memory":"268435456""#,
        );
        assert_eq!(
            sized,
            Ok(Sizing {
                vcpus: 3,
                memory_mib: 324
            })
        );
        let best_effort = spec(
            r#","io.kubernetes.cri.sandbox-cpu-quota":"0","io.kubernetes.cri.sandbox-memory":"0",
               "io.kubernetes.cri.sandbox-cpu-shares":"2""#,
        );
        assert_eq!(
            best_effort,
            Ok(Sizing {
                vcpus: 1,
                memory_mib: 512
            })
        );
    }

    #[test]
    fn crio_says_the_same_in_json() {
        let sized = |resources: &str| {
            let spec = serde_json::json!({
                "ociVersion": "1.2.0",
                "annotations": {
                    "io.kubernetes.cri-o.ContainerType": "sandbox",
                    CRIO_RESOURCES: resources,
                },
            });
            size(&spec.to_string())
        };
        assert_eq!(
            sized(
                r#"{"cpu_period":100000,"cpu_quota":250000,"cpu_shares":2,"memory_limit_in_bytes":268435456}"#
            ),
            Ok(Sizing {
                vcpus: 3,
                memory_mib: 324
            })
        );
        for none in ["{}", "null"] {
            assert_eq!(sized(none).unwrap().memory_mib, 512);
        }
        assert!(sized("[").unwrap_err().to_string().contains("PodLinuxResources"));
    }

    #[test]
    fn values_without_meaning_are_named() {
        let error = size(
            r#"{"ociVersion":"1","annotations":{"io.kubernetes.cri.container-type":"sandbox",
                "io.kubernetes.cri.sandbox-memory":"1Gi"}}"#,
        )
        .unwrap_err();
        assert!(error.to_string().contains("sandbox-memory is \"1Gi\""), "{error}");
        for list in ["a", "3-1", "1,,2", "0-", "-1"] {
            let spec =
                format!(r#"{{"ociVersion":"1","linux":{{"resources":{{"cpu":{{"cpus":"{list}"}}}}}}}}"#);
            let error = size(&spec).unwrap_err();
            assert!(error.to_string().contains("linux.resources.cpu.cpus"), "{error}");
        }
    }

    #[test]
    fn a_small_host_still_makes_a_vm() {
        let spec: Spec = serde_json::from_str(r#"{"ociVersion":"1"}"#).unwrap();
        let host = Host {
            cpus: 0,
            memory_mib: 1,
        };
        assert_eq!(
            Sizing::on_host(&spec, &Config::default(), host),
            Ok(Sizing {
                vcpus: 1,
                memory_mib: 128
            })
        );
    }
}
