//! How big a VM is, and how big it can become: from what its containers may use at most, or the configuration's
//! defaults.
//!
//! The limits themselves hold inside the guest, in its cgroups. The VM is sized so that a container meets its own
//! limit before the VM's end.

use oci_spec::runtime::{LinuxResources, Spec};

use crate::annotations::Role;
use crate::config::{Config, MOST_VCPUS, Most};
use crate::demand::{Demand, Limits, MICRO, Total};
use crate::error::ErrorKind;

/// vCPUs and memory of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// vCPUs, at least 1.
    pub vcpus: u8,
    /// Memory in MiB: a multiple of 2, at least 128.
    pub memory_mib: u32,
}

/// The size of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizing {
    /// At boot.
    pub boot: Size,
    /// What it can become.
    pub most: Size,
    /// What the pod's containers may use together, when that was known before there was any.
    pub promised: Limits,
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

const MIB: u64 = 1 << 20;
/// A kernel needs this much to boot with room to spare.
const LEAST_MEMORY_MIB: u64 = 128;
/// vCPUs that a VM can grow to when nobody says how many: the guest's kernel keeps memory for each that may come
/// (docs/resources.md has figures).
const AUTO_VCPUS: u32 = 8;
/// The guest kernel describes each page of 4 KiB by 64 bytes.
const PAGE_DESCRIPTOR_SHARE: u64 = 64;
/// Memory that can be plugged is a multiple of this, in MiB (`protocol::vmm::VmConfig::pluggable_memory_mib`).
const PLUGGABLE_STEP_MIB: u32 = 128;
/// The most there can be of it.
const MOST_PLUGGABLE_MIB: u32 = 2 << 20;

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
        let mut demand = Demand::default();
        let mut promised = Limits::default();
        match (Role::of(spec), spec.annotations()) {
            (Role::Sandbox | Role::Member, Some(annotations)) => {
                promised = Limits::of_pod(annotations)?;
                demand = Demand::new(promised);
            }
            _ => {
                if let Some(resources) = resources(spec) {
                    demand.add("", Limits::default().updated(resources, false)?);
                }
            }
        }
        // A limit beyond what the host has is no limit, unless the configuration says that VMs may be larger.
        let host = Size {
            vcpus: u8::try_from(host.cpus).unwrap_or(MOST_VCPUS).clamp(1, MOST_VCPUS),
            memory_mib: even(host.memory_mib),
        };
        let vcpus = config.max_vcpus().or(AUTO_VCPUS.min(host.vcpus.into()));
        let vcpus = u8::try_from(vcpus).unwrap_or(MOST_VCPUS);
        let memory_mib = config.max_memory_mib().or(host.memory_mib);
        let ceiling = Size {
            vcpus: host.vcpus.max(vcpus),
            memory_mib: host.memory_mib.max(even(memory_mib.into())),
        };
        let wanted = Size::wanted(demand.total(), config);
        let boot = Size {
            // What the configuration gives every VM is its writer's choice.
            vcpus: wanted.vcpus.min(ceiling.vcpus).max(config.default_vcpus()),
            memory_mib: wanted.memory_mib.min(ceiling.memory_mib),
        };
        let grown =
            even(u64::from(memory_mib).min(u64::from(boot.memory_mib) + u64::from(MOST_PLUGGABLE_MIB)));
        let most = Size {
            vcpus: boot.vcpus.max(vcpus),
            memory_mib: if memory_mib > boot.memory_mib {
                grown
            } else {
                boot.memory_mib
            },
        };
        Ok(Self { boot, most, promised })
    }

    /// Memory that a machine of this size must be able to plug, in MiB.
    #[must_use]
    pub fn pluggable_mib(&self) -> u32 {
        (self.most.memory_mib - self.boot.memory_mib)
            .next_multiple_of(PLUGGABLE_STEP_MIB)
            .min(MOST_PLUGGABLE_MIB)
    }
}

impl Size {
    /// What containers with these limits want of their VM.
    pub(crate) fn wanted(total: Total, config: &Config) -> Self {
        let vcpus = total
            .micro_cpus
            .div_ceil(MICRO)
            .max(config.default_vcpus().into());
        let limit = total.memory_bytes.div_ceil(MIB);
        let described = |mib: u64| mib.saturating_add(mib / PAGE_DESCRIPTOR_SHARE);
        let limited = described(limit).saturating_add(config.memory_overhead_mib().into());
        let default = u64::from(config.default_memory_mib());
        let memory = match (limit, total.unlimited_memory) {
            (0, _) => default,
            (_, true) => limited.max(default),
            (_, false) => limited,
        };
        let memory = memory.saturating_add(described(total.huge_page_bytes.div_ceil(MIB)));
        Self {
            vcpus: u8::try_from(vcpus).unwrap_or(MOST_VCPUS).min(MOST_VCPUS),
            memory_mib: even(memory),
        }
    }

    /// The smaller of each.
    pub(crate) fn at_most(self, most: Self) -> Self {
        Self {
            vcpus: self.vcpus.min(most.vcpus),
            memory_mib: self.memory_mib.min(most.memory_mib),
        }
    }
}

impl Most {
    /// The number, or what it is on this host.
    fn or(self, auto: u32) -> u32 {
        match self {
            Self::Auto => auto,
            Self::UpTo(number) => number,
        }
    }
}

/// The resources of a container.
pub(crate) fn resources(spec: &Spec) -> Option<&LinuxResources> {
    spec.linux().as_ref()?.resources().as_ref()
}

/// A size that memory can have: a multiple of 2 MiB, and enough to boot.
fn even(mib: u64) -> u32 {
    let most = u64::from(u32::MAX - 1);
    let mib = mib.clamp(LEAST_MEMORY_MIB, most).next_multiple_of(2);
    u32::try_from(mib).expect("at most u32::MAX - 1")
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Host = Host {
        cpus: 8,
        memory_mib: 16_384,
    };

    fn size(spec: &str) -> Result<Size, SizingError> {
        let spec: Spec = serde_json::from_str(spec).unwrap();
        Sizing::on_host(&spec, &Config::default(), HOST).map(|sizing| sizing.boot)
    }

    fn limited(resources: &str) -> Size {
        size(&format!(
            r#"{{"ociVersion":"1.2.0","linux":{{"resources":{resources}}}}}"#
        ))
        .unwrap()
    }

    #[test]
    fn without_limits_the_defaults_hold() {
        let default = Size {
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
    fn huge_pages_come_on_top_of_the_memory() {
        let huge = r#""hugepageLimits":[{"pageSize":"2MB","limit":134217728}]"#;
        // 128 + 128/64 for the pages.
        assert_eq!(limited(&format!("{{{huge}}}")).memory_mib, 512 + 130);
        assert_eq!(
            limited(&format!(r#"{{"memory":{{"limit":536870912}},{huge}}}"#)).memory_mib,
            584 + 130
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
            Ok(Size {
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
            Ok(Size {
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
                    "io.kubernetes.cri-o.PodLinuxResources": resources,
                },
            });
            size(&spec.to_string())
        };
        assert_eq!(
            sized(
                r#"{"cpu_period":100000,"cpu_quota":250000,"cpu_shares":2,"memory_limit_in_bytes":268435456}"#
            ),
            Ok(Size {
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
            Sizing::on_host(&spec, &Config::default(), host).map(|sizing| sizing.boot),
            Ok(Size {
                vcpus: 1,
                memory_mib: 128
            })
        );
    }

    fn configured(config: &str, spec: &str) -> Sizing {
        let config = Config::parse(config, "test").unwrap();
        Sizing::on_host(&serde_json::from_str(spec).unwrap(), &config, HOST).unwrap()
    }

    const PLAIN: &str = r#"{"ociVersion":"1"}"#;

    #[test]
    fn a_vm_can_grow_to_the_hosts_size_unless_told_otherwise() {
        let sizing = configured("", PLAIN);
        assert_eq!((sizing.most.vcpus, sizing.most.memory_mib), (8, 16_384));
        assert_eq!(sizing.pluggable_mib(), 15_872);
        let sizing = configured("max_vcpus = 3\nmax_memory_mib = 700", PLAIN);
        assert_eq!((sizing.most.vcpus, sizing.most.memory_mib), (3, 700));
        assert_eq!(
            sizing.pluggable_mib(),
            256,
            "a multiple of 128 that has room for 188"
        );
        for none in [
            "max_vcpus = 0\nmax_memory_mib = 0",
            "max_vcpus = 1\nmax_memory_mib = 512",
        ] {
            let sizing = configured(none, PLAIN);
            assert_eq!(sizing.most, sizing.boot);
            assert_eq!(sizing.pluggable_mib(), 0);
        }
    }

    #[test]
    fn a_large_hosts_cpus_are_for_those_who_ask_for_them() {
        let large = Host { cpus: 64, ..HOST };
        let vcpus = |config: &str, quota: u32| {
            let config = Config::parse(config, "test").unwrap();
            let spec =
                format!(r#"{{"ociVersion":"1","linux":{{"resources":{{"cpu":{{"quota":{quota}}}}}}}}}"#);
            let sizing = Sizing::on_host(&serde_json::from_str(&spec).unwrap(), &config, large).unwrap();
            (sizing.boot.vcpus, sizing.most.vcpus)
        };
        assert_eq!(vcpus("", 100_000), (1, 8));
        assert_eq!(vcpus("", 1_600_000), (16, 16));
        assert_eq!(vcpus("", 9_900_000), (64, 64));
        assert_eq!(vcpus("max_vcpus = 32", 100_000), (1, 32));
        assert_eq!(vcpus("default_vcpus = 12", 100_000), (12, 12));
    }

    #[test]
    fn a_configured_maximum_may_be_beyond_the_host() {
        let spec = r#"{"ociVersion":"1","linux":{"resources":{"cpu":{"quota":9900000},"memory":{"limit":34359738368}}}}"#;
        let sizing = configured("max_vcpus = 16\nmax_memory_mib = 65536", spec);
        assert_eq!(
            (sizing.boot.vcpus, sizing.boot.memory_mib),
            (16, 32768 + 512 + 64)
        );
        assert_eq!((sizing.most.vcpus, sizing.most.memory_mib), (16, 65_536));
        let sizing = configured("max_vcpus = 0\nmax_memory_mib = 0", spec);
        assert_eq!((sizing.boot.vcpus, sizing.boot.memory_mib), (8, 16_384));
    }

    #[test]
    fn a_container_without_limit_gets_the_default_beside_the_others() {
        let config = Config::default();
        let mut demand = Demand::default();
        let limits = |mib: u64| Limits {
            memory_bytes: (mib > 0).then_some(mib << 20),
            ..Limits::default()
        };
        demand.add("a", limits(128));
        assert_eq!(Size::wanted(demand.total(), &config).memory_mib, 128 + 2 + 64);
        demand.add("b", limits(0));
        assert_eq!(Size::wanted(demand.total(), &config).memory_mib, 512);
        demand.add("c", limits(1024));
        assert_eq!(Size::wanted(demand.total(), &config).memory_mib, 1152 + 18 + 64);
    }
}
