//! What the containers of a VM may use: each one's limits, and their sum. How big a VM that needs is in `sizing`.

use std::collections::{BTreeMap, HashMap};

use oci_spec::runtime::LinuxResources;

use crate::sizing::SizingError;

/// CRI's annotations on a pod's sandbox: the sums over the pod's containers, as the kubelet knows them before
/// any container exists (containerd, `internal/cri/annotations`).
const CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
/// CRI-O's: CRI's LinuxContainerResources with the same sums, as JSON (CRI-O, `pkg/annotations`).
const CRIO_RESOURCES: &str = "io.kubernetes.cri-o.PodLinuxResources";

/// The kernel's cpu.max period when none is given, in µs (Documentation/admin-guide/cgroup-v2.rst).
const DEFAULT_PERIOD: u64 = 100_000;

/// From here on a limit of huge pages is somebody's way of saying that there is none.
const NO_HUGE_PAGE_LIMIT: u64 = 1 << 62;

/// What may be used at most; `None` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// CPU time per time, in millionths of a CPU.
    pub micro_cpus: Option<u64>,
    /// Memory in bytes.
    pub memory_bytes: Option<u64>,
    /// Huge pages of all sizes in bytes: what a container may use of them is set aside for it, beside its memory.
    pub huge_page_bytes: u64,
}

impl Limits {
    /// A pod's, from its annotations.
    ///
    /// # Errors
    /// [`SizingError`].
    pub(crate) fn of_pod(annotations: &HashMap<String, String>) -> Result<Self, SizingError> {
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
            micro_cpus: micro_cpus(number(CPU_QUOTA)?, period),
            memory_bytes: positive(number(MEMORY)?),
            ..Self::default()
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
            micro_cpus: micro_cpus(Some(resources.cpu_quota), period),
            memory_bytes: positive(Some(resources.memory_limit_in_bytes)),
            ..Self::default()
        })
    }

    /// A container's, from its resources. What these do not mention stays as it is in `self`, as in an update; so does
    /// what they give as 0. A negative number takes a limit away.
    ///
    /// A list of CPUs counts as so many when there is no quota, except in a pod: the kubelet gives such lists to
    /// containers that are promised none of them.
    ///
    /// # Errors
    /// [`SizingError::Invalid`].
    pub(crate) fn updated(self, resources: &LinuxResources, in_pod: bool) -> Result<Self, SizingError> {
        let mut limits = self;
        let memory = resources.memory().and_then(|memory| memory.limit());
        if let Some(limit) = memory.filter(|limit| *limit != 0) {
            limits.memory_bytes = positive(Some(limit));
        }
        if let Some(pages) = resources.hugepage_limits() {
            limits.huge_page_bytes = pages
                .iter()
                .filter_map(|limit| u64::try_from(limit.limit()).ok())
                .filter(|bytes| *bytes < NO_HUGE_PAGE_LIMIT)
                .fold(0, u64::saturating_add);
        }
        if let Some(cpu) = resources.cpu() {
            let (quota, period) = (cpu.quota().unwrap_or(0), cpu.period().unwrap_or(0));
            if quota != 0 || period != 0 {
                limits.micro_cpus = micro_cpus(Some(quota), Some(period));
            }
            let list = cpu.cpus().as_deref().map_or(Ok(None), count_cpus)?;
            if let (Some(count), None, false) = (list, limits.micro_cpus, in_pod) {
                limits.micro_cpus = Some(count.saturating_mul(MICRO));
            }
        }
        Ok(limits)
    }
}

/// A CPU in millionths of it.
pub(crate) const MICRO: u64 = 1_000_000;

/// What all containers of a VM may use together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Demand {
    /// What the pod's containers will use, as it was known before there was any. A container's update changes it too.
    promised: Limits,
    containers: BTreeMap<String, Limits>,
}

/// Sums over containers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Total {
    /// The sum of the limits there are, in millionths of a CPU.
    pub micro_cpus: u64,
    /// The sum of the limits there are, in bytes.
    pub memory_bytes: u64,
    /// Whether a container has no memory limit, or there is none at all.
    pub unlimited_memory: bool,
    /// The sum of huge pages, in bytes.
    pub huge_page_bytes: u64,
}

impl Demand {
    /// Nothing but what is promised.
    pub fn new(promised: Limits) -> Self {
        Self {
            promised,
            containers: BTreeMap::new(),
        }
    }

    /// A container comes.
    pub fn add(&mut self, id: &str, limits: Limits) {
        self.containers.insert(id.to_owned(), limits);
    }

    /// A container goes.
    pub fn remove(&mut self, id: &str) {
        self.containers.remove(id);
    }

    /// A container's limits.
    pub fn get(&self, id: &str) -> Limits {
        self.containers.get(id).copied().unwrap_or_default()
    }

    /// A container's limits become others. What was promised to the pod follows, so that the container can be made
    /// anew with them.
    pub fn update(&mut self, id: &str, limits: Limits) {
        let Some(known) = self.containers.get_mut(id) else {
            return;
        };
        let before = std::mem::replace(known, limits);
        let follow = |promised: Option<u64>, from: Option<u64>, to: Option<u64>| match (promised, from, to) {
            (Some(promised), Some(from), Some(to)) => Some(promised.saturating_sub(from).saturating_add(to)),
            (promised, ..) => promised,
        };
        self.promised.micro_cpus = follow(self.promised.micro_cpus, before.micro_cpus, limits.micro_cpus);
        self.promised.memory_bytes = follow(
            self.promised.memory_bytes,
            before.memory_bytes,
            limits.memory_bytes,
        );
    }

    /// The sum: of what is promised or of what there is, whichever is more.
    pub fn total(&self) -> Total {
        let sum = |of: fn(&Limits) -> Option<u64>| {
            let there = self
                .containers
                .values()
                .filter_map(of)
                .fold(0, u64::saturating_add);
            there.max(of(&self.promised).unwrap_or(0))
        };
        let memory_bytes = sum(|limits| limits.memory_bytes);
        let without = self
            .containers
            .values()
            .any(|limits| limits.memory_bytes.is_none());
        Total {
            micro_cpus: sum(|limits| limits.micro_cpus),
            memory_bytes,
            unlimited_memory: without || memory_bytes == 0,
            huge_page_bytes: sum(|limits| Some(limits.huge_page_bytes)),
        }
    }
}

/// Zero and negative numbers mean "no limit", in CRI as in the OCI specification.
fn positive(value: Option<i64>) -> Option<u64> {
    value
        .and_then(|value| u64::try_from(value).ok())
        .filter(|value| *value > 0)
}

fn micro_cpus(quota: Option<i64>, period: Option<u64>) -> Option<u64> {
    let period = period.filter(|period| *period > 0).unwrap_or(DEFAULT_PERIOD);
    let quota = u128::from(positive(quota)?);
    let micro = quota * u128::from(MICRO) / u128::from(period);
    Some(u64::try_from(micro).unwrap_or(u64::MAX).max(1))
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

    fn limits(cpus: u64, mib: u64) -> Limits {
        Limits {
            micro_cpus: (cpus > 0).then_some(cpus * MICRO),
            memory_bytes: (mib > 0).then_some(mib << 20),
            ..Limits::default()
        }
    }

    fn updated(before: Limits, resources: &str, in_pod: bool) -> Limits {
        before
            .updated(&serde_json::from_str(resources).unwrap(), in_pod)
            .unwrap()
    }

    #[test]
    fn an_update_changes_what_it_mentions() {
        let before = limits(2, 256);
        assert_eq!(
            updated(before, r#"{"memory":{"limit":1048576}}"#, true),
            limits(2, 1)
        );
        assert_eq!(updated(before, r#"{"memory":{"limit":-1}}"#, true), limits(2, 0));
        assert_eq!(
            updated(before, r#"{"memory":{"limit":0},"cpu":{"shares":2}}"#, true),
            before
        );
        assert_eq!(
            updated(before, r#"{"cpu":{"quota":150000,"period":50000}}"#, true),
            limits(3, 256)
        );
        assert_eq!(
            updated(before, r#"{"cpu":{"quota":-1,"period":100000}}"#, true),
            limits(0, 256)
        );
    }

    #[test]
    fn huge_pages_of_all_sizes_add_up() {
        let limits = r#"{"hugepageLimits":[{"pageSize":"2MB","limit":4194304},{"pageSize":"1GB","limit":1073741824},
            {"pageSize":"64KB","limit":9223372036854771712},{"pageSize":"16GB","limit":0}]}"#;
        let huge = updated(Limits::default(), limits, true);
        assert_eq!(huge.huge_page_bytes, (1 << 30) + (4 << 20));
        let memory_only = updated(huge, r#"{"memory":{"limit":1048576}}"#, true);
        assert_eq!(memory_only.huge_page_bytes, huge.huge_page_bytes);
        let mut demand = Demand::default();
        demand.add("a", huge);
        demand.add("b", huge);
        assert_eq!(demand.total().huge_page_bytes, (2 << 30) + (8 << 20));
        assert_eq!(demand.total().memory_bytes, 0);
    }

    #[test]
    fn a_list_of_cpus_is_a_limit_only_outside_of_pods() {
        let resources = r#"{"cpu":{"cpus":"0-2,7"}}"#;
        assert_eq!(updated(Limits::default(), resources, false), limits(4, 0));
        assert_eq!(updated(Limits::default(), resources, true), Limits::default());
        assert_eq!(updated(limits(2, 0), resources, false), limits(2, 0));
    }

    #[test]
    fn fractions_add_up() {
        let mut demand = Demand::default();
        for id in ["a", "b", "c"] {
            demand.add(
                id,
                updated(Limits::default(), r#"{"cpu":{"quota":1,"period":3}}"#, true),
            );
        }
        assert!(demand.total().micro_cpus <= MICRO);
        demand.add(
            "d",
            updated(Limits::default(), r#"{"cpu":{"quota":50000}}"#, true),
        );
        assert_eq!(demand.total().micro_cpus, 999_999 + MICRO / 2);
    }

    #[test]
    fn what_is_promised_counts_until_there_is_more_and_follows_updates() {
        let mut demand = Demand::new(limits(2, 512));
        assert_eq!(demand.total().memory_bytes, 512 << 20);
        assert!(!demand.total().unlimited_memory);
        demand.add("a", limits(1, 256));
        assert_eq!(demand.total().memory_bytes, 512 << 20);
        demand.add("b", limits(1, 256));
        demand.add("c", limits(0, 64));
        assert_eq!(demand.total().memory_bytes, 576 << 20);
        demand.remove("c");
        demand.update("a", limits(2, 512));
        assert_eq!(
            (demand.total().micro_cpus, demand.total().memory_bytes),
            (3 * MICRO, 768 << 20)
        );
        demand.update("a", limits(1, 128));
        assert_eq!(
            (demand.total().micro_cpus, demand.total().memory_bytes),
            (2 * MICRO, 384 << 20)
        );
        // The container is restarted as it was updated.
        demand.remove("a");
        assert_eq!(demand.total().memory_bytes, 384 << 20);
        demand.add("a", limits(1, 128));
        assert_eq!(demand.total().memory_bytes, 384 << 20);
        assert_eq!(demand.get("a"), limits(1, 128));
        assert_eq!(demand.get("z"), Limits::default());
    }

    #[test]
    fn a_container_without_limit_is_told_from_none() {
        let mut demand = Demand::default();
        assert!(demand.total().unlimited_memory);
        demand.add("a", limits(0, 256));
        assert!(!demand.total().unlimited_memory);
        demand.add("b", limits(0, 0));
        assert!(demand.total().unlimited_memory);
        assert_eq!(demand.total().memory_bytes, 256 << 20);
    }
}
