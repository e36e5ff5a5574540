//! A container's cgroup counters as `io.containerd.cgroups.v2.Metrics`, which containerd's CRI and CRI-O read.

use containerd_shim_protos::cgroups_v2::metrics as v2;
use protobuf::well_known_types::any::Any;
use protobuf::{Message as _, MessageField};
use sandbox::ContainerStatsResponse;
use sandbox::container_stats_response::{Pressure, PressureLine};

use crate::convert::encoding;

/// The type's name in an `Any`.
const TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";

/// A reading as the caller gets it.
pub fn any(stats: &ContainerStatsResponse) -> ttrpc::Result<Any> {
    Ok(Any {
        type_url: TYPE_URL.to_owned(),
        value: metrics(stats)
            .write_to_bytes()
            .map_err(|error| encoding(&error))?,
        ..Any::default()
    })
}

/// Converts the agent's reading.
pub fn metrics(stats: &ContainerStatsResponse) -> v2::Metrics {
    v2::Metrics {
        pids: MessageField::some(v2::PidsStat {
            current: stats.pids.current,
            limit: stats.pids.max,
            ..v2::PidsStat::default()
        }),
        cpu: MessageField::some(v2::CPUStat {
            usage_usec: stats.cpu.usage_usec,
            user_usec: stats.cpu.user_usec,
            system_usec: stats.cpu.system_usec,
            nr_periods: stats.cpu.nr_periods,
            nr_throttled: stats.cpu.nr_throttled,
            throttled_usec: stats.cpu.throttled_usec,
            nr_bursts: stats.cpu.nr_bursts,
            burst_usec: stats.cpu.burst_usec,
            psi: pressure(stats.cpu_pressure.as_ref()),
            ..v2::CPUStat::default()
        }),
        memory: MessageField::some(memory(stats)),
        memory_events: MessageField::some(memory_events(stats)),
        io: MessageField::some(v2::IOStat {
            usage: stats
                .io
                .iter()
                .map(|device| v2::IOEntry {
                    major: device.major,
                    minor: device.minor,
                    rbytes: device.rbytes,
                    wbytes: device.wbytes,
                    rios: device.rios,
                    wios: device.wios,
                    ..v2::IOEntry::default()
                })
                .collect(),
            psi: pressure(stats.io_pressure.as_ref()),
            ..v2::IOStat::default()
        }),
        hugetlb: stats
            .huge_pages
            .iter()
            .map(|pages| v2::HugeTlbStat {
                current: pages.current,
                max: pages.max,
                pagesize: pages.page_size.clone(),
                failcnt: pages.failures,
                ..v2::HugeTlbStat::default()
            })
            .collect(),
        ..v2::Metrics::default()
    }
}

fn memory(stats: &ContainerStatsResponse) -> v2::MemoryStat {
    let memory = &stats.memory;
    let stat = |key: &str| memory.stat.get(key).copied().unwrap_or(0);
    // The guest chose the numbers: adding them must not be able to overflow.
    let sum = |one: &str, other: &str| stat(one).saturating_add(stat(other));
    v2::MemoryStat {
        anon: stat("anon"),
        file: stat("file"),
        kernel_stack: stat("kernel_stack"),
        slab: stat("slab"),
        sock: stat("sock"),
        shmem: stat("shmem"),
        file_mapped: stat("file_mapped"),
        file_dirty: stat("file_dirty"),
        file_writeback: stat("file_writeback"),
        anon_thp: stat("anon_thp"),
        inactive_anon: stat("inactive_anon"),
        active_anon: stat("active_anon"),
        inactive_file: stat("inactive_file"),
        active_file: stat("active_file"),
        unevictable: stat("unevictable"),
        slab_reclaimable: stat("slab_reclaimable"),
        slab_unreclaimable: stat("slab_unreclaimable"),
        pgfault: stat("pgfault"),
        pgmajfault: stat("pgmajfault"),
        // The kernel split these by kind of page in 5.9; the message kept the old sum.
        workingset_refault: sum("workingset_refault_anon", "workingset_refault_file"),
        workingset_activate: sum("workingset_activate_anon", "workingset_activate_file"),
        workingset_nodereclaim: stat("workingset_nodereclaim"),
        pgrefill: stat("pgrefill"),
        pgscan: stat("pgscan"),
        pgsteal: stat("pgsteal"),
        pgactivate: stat("pgactivate"),
        pgdeactivate: stat("pgdeactivate"),
        pglazyfree: stat("pglazyfree"),
        pglazyfreed: stat("pglazyfreed"),
        thp_fault_alloc: stat("thp_fault_alloc"),
        thp_collapse_alloc: stat("thp_collapse_alloc"),
        usage: memory.current,
        usage_limit: memory.max,
        swap_usage: memory.swap_current,
        swap_limit: memory.swap_max,
        swap_max_usage: memory.swap_peak,
        max_usage: memory.peak,
        psi: pressure(stats.memory_pressure.as_ref()),
        ..v2::MemoryStat::default()
    }
}

fn memory_events(stats: &ContainerStatsResponse) -> v2::MemoryEvents {
    let event = |key: &str| stats.memory.events.get(key).copied().unwrap_or(0);
    v2::MemoryEvents {
        low: event("low"),
        high: event("high"),
        max: event("max"),
        oom: event("oom"),
        oom_kill: event("oom_kill"),
        oom_group_kill: event("oom_group_kill"),
        ..v2::MemoryEvents::default()
    }
}

fn pressure(pressure: Option<&Pressure>) -> MessageField<v2::PSIStats> {
    let line = |line: Option<&PressureLine>| {
        line.map_or_else(MessageField::none, |line| {
            MessageField::some(v2::PSIData {
                avg10: line.avg10,
                avg60: line.avg60,
                avg300: line.avg300,
                total: line.total,
                ..v2::PSIData::default()
            })
        })
    };
    pressure.map_or_else(MessageField::none, |pressure| {
        MessageField::some(v2::PSIStats {
            some: line(pressure.some.as_ref()),
            full: line(pressure.full.as_ref()),
            ..v2::PSIStats::default()
        })
    })
}

#[cfg(test)]
mod tests {
    use protobuf::MessageFull as _;
    use sandbox::container_stats_response::HugePages;

    use super::*;

    #[test]
    fn the_type_url_is_the_messages_name() {
        assert_eq!(TYPE_URL, v2::Metrics::descriptor().full_name());
    }

    #[test]
    fn counters_arrive_where_callers_look() {
        let mut stats = ContainerStatsResponse::new();
        let memory = stats.memory.mut_or_insert_default();
        memory.current = 100;
        memory.max = u64::MAX;
        memory.stat.insert("inactive_file".into(), 30);
        memory.stat.insert("workingset_refault_anon".into(), 1);
        memory.stat.insert("workingset_refault_file".into(), 2);
        memory.stat.insert("workingset_activate_anon".into(), u64::MAX);
        memory.stat.insert("workingset_activate_file".into(), 2);
        memory.events.insert("oom_kill".into(), 7);
        stats.cpu.mut_or_insert_default().usage_usec = 42;
        stats.pids.mut_or_insert_default().current = 3;
        stats.huge_pages.push(HugePages {
            page_size: "2MB".into(),
            current: 5,
            max: u64::MAX,
            failures: 1,
            ..Default::default()
        });
        stats
            .memory_pressure
            .mut_or_insert_default()
            .some
            .mut_or_insert_default()
            .avg10 = 1.5;
        let metrics = metrics(&stats);
        assert_eq!(metrics.memory.usage, 100);
        assert_eq!(metrics.memory.usage_limit, u64::MAX);
        assert_eq!(metrics.memory.inactive_file, 30);
        assert_eq!(metrics.memory.workingset_refault, 3);
        assert_eq!(metrics.memory.workingset_activate, u64::MAX);
        assert_eq!(metrics.memory_events.oom_kill, 7);
        assert_eq!(metrics.cpu.usage_usec, 42);
        assert_eq!(metrics.pids.current, 3);
        let pages = &metrics.hugetlb[0];
        assert_eq!(
            (pages.pagesize.as_str(), pages.current, pages.failcnt),
            ("2MB", 5, 1)
        );
        assert!((metrics.memory.psi.some.avg10 - 1.5).abs() < f64::EPSILON);
        assert!(metrics.memory.psi.full.is_none());
        assert!(metrics.cpu.psi.is_none(), "absent pressure stays absent");
    }
}
