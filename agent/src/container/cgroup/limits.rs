//! OCI resources (config-linux.md, "Control groups") as values of cgroup v2 files. Pure.

use std::fmt::Display;

use super::super::spec::{BlockIo, Cpu, Memory, Resources, SpecError, ThrottleDevice};

/// Period that goes with a CPU quota when none is given, in microseconds: the kernel's own.
const DEFAULT_PERIOD: u64 = 100_000;

/// A value for a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    pub file: String,
    pub value: String,
    /// Whether the file may be missing.
    pub optional: bool,
}

fn set(file: impl Into<String>, value: impl Display) -> Setting {
    Setting {
        file: file.into(),
        value: format!("{value}"),
        optional: false,
    }
}

fn optional(file: impl Into<String>, value: impl Display) -> Setting {
    Setting {
        optional: true,
        ..set(file, value)
    }
}

/// What to write, in order.
///
/// # Errors
/// [`SpecError`] with the member.
pub fn settings(resources: &Resources) -> Result<Vec<Setting>, SpecError> {
    let mut settings = Vec::new();
    if let Some(cpu) = &resources.cpu {
        cpu_settings(cpu, &mut settings)?;
    }
    if let Some(memory) = &resources.memory {
        memory_settings(memory, &mut settings)?;
    }
    if let Some(limit) = resources.pids.as_ref().and_then(|pids| pids.limit) {
        settings.push(set("pids.max", amount(limit)));
    }
    if let Some(block_io) = &resources.block_io {
        io_settings(block_io, &mut settings)?;
    }
    for (index, limit) in resources.hugepage_limits.iter().enumerate() {
        if limit.page_size.is_empty() || !limit.page_size.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(SpecError::invalid(
                format!("linux.resources.hugepageLimits[{index}].pageSize"),
                format!("{:?} is no page size: write it as 2MB or 1GB", limit.page_size),
            ));
        }
        let file = format!("hugetlb.{}.max", limit.page_size);
        // The kubelet forbids the host's sizes that a container does not use; the guest need not have them.
        settings.push(match limit.limit {
            0 => optional(file, 0),
            bytes => set(file, bytes),
        });
        settings.push(optional(
            format!("hugetlb.{}.rsvd.max", limit.page_size),
            limit.limit,
        ));
    }
    for (device, limit) in &resources.rdma {
        if device.is_empty() || !device.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(SpecError::invalid(
                "linux.resources.rdma",
                format!("{device:?} is not the name of a device"),
            ));
        }
        let most = |count: Option<u32>| count.map_or("max".into(), |count| count.to_string());
        let (handles, objects) = (most(limit.hca_handles), most(limit.hca_objects));
        settings.push(set(
            "rdma.max",
            format!("{device} hca_handle={handles} hca_object={objects}"),
        ));
    }
    for (file, value) in &resources.unified {
        if file.is_empty() || file.contains('/') || file.starts_with('.') || file.starts_with("cgroup.") {
            return Err(SpecError::invalid(
                "linux.resources.unified",
                format!("{file:?} is not a resource file of a cgroup"),
            ));
        }
        settings.extend(value.lines().map(|line| set(file, line)));
    }
    Ok(settings)
}

/// -1, and 0 for a limit that nothing could live under, mean no limit.
fn amount(limit: i64) -> String {
    if limit > 0 {
        limit.to_string()
    } else {
        "max".into()
    }
}

fn memory_settings(memory: &Memory, settings: &mut Vec<Setting>) -> Result<(), SpecError> {
    let given = |value: Option<i64>| value.filter(|value| *value != 0);
    if let Some(swap) = swap(memory)? {
        // Without swap accounting, none and unlimited are what there is.
        let always = swap == "max" || swap == "0";
        settings.push(if always {
            optional("memory.swap.max", swap)
        } else {
            set("memory.swap.max", swap)
        });
    }
    if let Some(limit) = given(memory.limit) {
        settings.push(set("memory.max", amount(limit)));
    }
    if let Some(reservation) = given(memory.reservation) {
        settings.push(set("memory.low", amount(reservation)));
    }
    Ok(())
}

/// OCI's swap limit is of memory and swap together, cgroup v2's of swap alone.
fn swap(memory: &Memory) -> Result<Option<String>, SpecError> {
    let invalid = |why: &str| Err(SpecError::invalid("linux.resources.memory.swap", why));
    match (memory.swap.unwrap_or(0), memory.limit.unwrap_or(0)) {
        (0, ..0) => Ok(Some("max".into())),
        (0, _) => Ok(None),
        (..0, _) => Ok(Some("max".into())),
        (_, 0) => {
            invalid("needs linux.resources.memory.limit beside it, since it limits memory and swap together")
        }
        (_, ..0) => invalid("cannot be limited while memory is not"),
        (swap, limit) if swap < limit => {
            invalid("is below linux.resources.memory.limit, but limits memory and swap together")
        }
        (swap, limit) => Ok(Some((swap - limit).to_string())),
    }
}

fn cpu_settings(cpu: &Cpu, settings: &mut Vec<Setting>) -> Result<(), SpecError> {
    for (member, given) in [
        ("realtimeRuntime", cpu.realtime_runtime.unwrap_or(0) != 0),
        ("realtimePeriod", cpu.realtime_period.unwrap_or(0) != 0),
    ] {
        if given {
            return Err(SpecError::unsupported(
                format!("linux.resources.cpu.{member}"),
                "does not exist in cgroup v2: remove it",
            ));
        }
    }
    if let Some(idle) = cpu.idle {
        settings.push(set("cpu.idle", idle));
    }
    // An idle group has no weight (cgroup v2, "cpu.idle").
    if let Some(shares) = cpu
        .shares
        .filter(|shares| *shares != 0 && cpu.idle.unwrap_or(0) == 0)
    {
        settings.push(set("cpu.weight", weight_of_shares(shares)));
    }
    let burst = cpu.burst;
    if burst.is_some() {
        // A burst above the new quota would make the kernel refuse the quota.
        settings.push(set("cpu.max.burst", 0));
    }
    let (quota, period) = (cpu.quota.unwrap_or(0), cpu.period.unwrap_or(0));
    if quota != 0 || period != 0 {
        let period = if period == 0 { DEFAULT_PERIOD } else { period };
        settings.push(set("cpu.max", format!("{} {period}", amount(quota))));
    }
    if let Some(burst @ 1..) = burst {
        settings.push(set("cpu.max.burst", burst));
    }
    // `cpus` and `mems` name the host's CPUs and memory nodes, not this guest's: nothing here is theirs. How many CPUs
    // there are follows them on the host, where the VM is sized.
    Ok(())
}

/// Shares of cgroup v1 (2 to 262144, 1024 by default) as weight of cgroup v2 (1 to 10000, 100 by default).
///
/// The curve that runc (from 1.3.2) and crun use: least, default and most shares become least, default and most
/// weight, where a straight line would turn the default into 39.
fn weight_of_shares(shares: u64) -> u64 {
    let shares = shares.clamp(2, 262_144);
    let log = (shares as f64).log2();
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    (10f64.powf(exponent).ceil() as u64).clamp(1, 10_000)
}

fn io_settings(block_io: &BlockIo, settings: &mut Vec<Setting>) -> Result<(), SpecError> {
    let weight = |member: &str, weight: u16| {
        if (10..=1000).contains(&weight) {
            // 10 to 1000 become 1 to 10000 (crun(1), "CGROUP V2").
            Ok(1 + (u64::from(weight) - 10) * 9999 / 990)
        } else {
            Err(SpecError::invalid(
                format!("linux.resources.blockIO.{member}"),
                format!("{weight} is not between 10 and 1000"),
            ))
        }
    };
    if let Some(value) = block_io.weight.filter(|value| *value != 0) {
        settings.push(set("io.weight", format!("default {}", weight("weight", value)?)));
    }
    for device in &block_io.weight_device {
        if let Some(value) = device.weight.filter(|value| *value != 0) {
            let value = weight("weightDevice", value)?;
            settings.push(set(
                "io.weight",
                format!("{}:{} {value}", device.major, device.minor),
            ));
        }
    }
    let mut throttle = |key: &str, devices: &[ThrottleDevice]| {
        for device in devices {
            let rate = if device.rate == 0 {
                "max".into()
            } else {
                device.rate.to_string()
            };
            settings.push(set(
                "io.max",
                format!("{}:{} {key}={rate}", device.major, device.minor),
            ));
        }
    };
    throttle("rbps", &block_io.throttle_read_bps_device);
    throttle("wbps", &block_io.throttle_write_bps_device);
    throttle("riops", &block_io.throttle_read_iops_device);
    throttle("wiops", &block_io.throttle_write_iops_device);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: &str) -> Result<Vec<(String, String)>, String> {
        let resources: Resources = serde_json::from_str(json).unwrap();
        settings(&resources)
            .map(|settings| {
                settings
                    .into_iter()
                    .map(|setting| (setting.file, setting.value))
                    .collect()
            })
            .map_err(|error| error.to_string())
    }

    fn pairs(pairs: &[(&str, &str)]) -> Result<Vec<(String, String)>, String> {
        Ok(pairs
            .iter()
            .map(|(a, b)| (a.to_string(), b.to_string()))
            .collect())
    }

    #[test]
    fn shares_become_weight_at_the_three_fixed_points() {
        for (shares, weight) in [(0, 1), (2, 1), (1024, 100), (262_144, 10_000), (1 << 40, 10_000)] {
            assert_eq!(weight_of_shares(shares), weight, "{shares}");
        }
    }

    #[test]
    fn quota_and_period_go_together() {
        assert_eq!(
            of(r#"{"cpu":{"quota":50000}}"#),
            pairs(&[("cpu.max", "50000 100000")])
        );
        assert_eq!(
            of(r#"{"cpu":{"quota":-1,"period":20000}}"#),
            pairs(&[("cpu.max", "max 20000")])
        );
        assert_eq!(
            of(r#"{"cpu":{"quota":1000,"burst":500,"cpus":"0-1","shares":1024}}"#),
            pairs(&[
                ("cpu.weight", "100"),
                ("cpu.max.burst", "0"),
                ("cpu.max", "1000 100000"),
                ("cpu.max.burst", "500"),
            ])
        );
        assert!(
            of(r#"{"cpu":{"realtimePeriod":1000}}"#)
                .unwrap_err()
                .contains("realtimePeriod")
        );
    }

    #[test]
    fn the_hosts_cpu_numbers_mean_nothing_here() {
        assert_eq!(of(r#"{"cpu":{"cpus":"7-200","mems":"1"}}"#), pairs(&[]));
    }

    #[test]
    fn rdma_limits_are_per_device() {
        assert_eq!(
            of(r#"{"rdma":{"mlx5_0":{"hcaHandles":3},"mlx5_1":{"hcaHandles":1,"hcaObjects":2}}}"#),
            pairs(&[
                ("rdma.max", "mlx5_0 hca_handle=3 hca_object=max"),
                ("rdma.max", "mlx5_1 hca_handle=1 hca_object=2"),
            ])
        );
        assert!(of(r#"{"rdma":{"a b":{}}}"#).is_err());
    }

    #[test]
    fn what_cgroup_v2_does_not_have_is_passed_over_as_runc_does() {
        let resources = r#"{"network":{"classID":1048577,"priorities":[{"name":"eth0","priority":5}]},
            "memory":{"swappiness":60,"disableOOMKiller":false,"kernel":1,"kernelTCP":1,"useHierarchy":true},
            "blockIO":{"leafWeight":10}}"#;
        assert_eq!(of(resources), pairs(&[]));
    }

    #[test]
    fn swap_is_what_is_left_of_both() {
        assert_eq!(
            of(r#"{"memory":{"limit":1000,"swap":3000,"reservation":500}}"#),
            pairs(&[
                ("memory.swap.max", "2000"),
                ("memory.max", "1000"),
                ("memory.low", "500")
            ])
        );
        assert_eq!(
            of(r#"{"memory":{"limit":1000,"swap":1000}}"#),
            pairs(&[("memory.swap.max", "0"), ("memory.max", "1000")])
        );
        assert_eq!(
            of(r#"{"memory":{"limit":-1}}"#),
            pairs(&[("memory.swap.max", "max"), ("memory.max", "max")])
        );
        assert!(of(r#"{"memory":{"limit":1000,"swap":999}}"#).is_err());
        assert!(of(r#"{"memory":{"swap":999}}"#).is_err());
    }

    #[test]
    fn pids_io_huge_pages_and_raw_files() {
        assert_eq!(
            of(r#"{"pids":{"limit":32},
                  "blockIO":{"weight":1000,"throttleReadBpsDevice":[{"major":254,"minor":0,"rate":1048576}],
                             "throttleWriteIOPSDevice":[{"major":254,"minor":16,"rate":0}]},
                  "hugepageLimits":[{"pageSize":"2MB","limit":4194304}],
                  "unified":{"memory.high":"1000","io.latency":"254:0 target=10\n254:16 target=20"}}"#),
            pairs(&[
                ("pids.max", "32"),
                ("io.weight", "default 10000"),
                ("io.max", "254:0 rbps=1048576"),
                ("io.max", "254:16 wiops=max"),
                ("hugetlb.2MB.max", "4194304"),
                ("hugetlb.2MB.rsvd.max", "4194304"),
                ("io.latency", "254:0 target=10"),
                ("io.latency", "254:16 target=20"),
                ("memory.high", "1000"),
            ])
        );
        assert_eq!(of(r#"{"pids":{"limit":-1}}"#), pairs(&[("pids.max", "max")]));
        assert!(of(r#"{"unified":{"../cgroup.procs":"1"}}"#).is_err());
        assert!(of(r#"{"unified":{"cgroup.subtree_control":"+cpu"}}"#).is_err());
        assert!(of(r#"{"blockIO":{"weight":5}}"#).is_err());
        assert!(of(r#"{"hugepageLimits":[{"pageSize":"../x","limit":1}]}"#).is_err());
    }
}
