//! What a whole pod uses, as the host counts it: the counters of the cgroup that holds its VM, in the form of a
//! container's (Documentation/admin-guide/cgroup-v2.rst). What each container uses is counted in the guest.

use std::collections::HashMap;
use std::io;
use std::path::Path;

use protocol::agent::ContainerStatsResponse;
use protocol::agent::container_stats_response::{Cpu, IoDevice, Memory, Pids, Pressure, PressureLine};

use crate::cgroup::{CgroupError, HostCgroup};

/// Reads the counters. All zero where the host counts nothing: without a cgroup, or without cgroup v2. Blocks.
///
/// # Errors
/// [`CgroupError`].
pub(crate) fn read(cgroups_path: Option<&Path>) -> Result<ContainerStatsResponse, CgroupError> {
    let cgroup = match cgroups_path {
        Some(path) => HostCgroup::left_over(path)?,
        None => None,
    };
    Ok(cgroup.map_or_else(ContainerStatsResponse::new, |cgroup| {
        counters(|name| cgroup.read(name))
    }))
}

/// A file that a controller would have is absent where the controller is not enabled: its counters are then zero.
fn counters(read: impl Fn(&str) -> io::Result<String>) -> ContainerStatsResponse {
    let text = |name: &str| read(name).unwrap_or_default();
    let cpu = flat(&text("cpu.stat"));
    let of_cpu = |key: &str| cpu.get(key).copied().unwrap_or(0);
    let mut stats = ContainerStatsResponse::new();
    stats.cpu = Some(Cpu {
        usage_usec: of_cpu("usage_usec"),
        user_usec: of_cpu("user_usec"),
        system_usec: of_cpu("system_usec"),
        nr_periods: of_cpu("nr_periods"),
        nr_throttled: of_cpu("nr_throttled"),
        throttled_usec: of_cpu("throttled_usec"),
        ..Default::default()
    })
    .into();
    stats.memory = Some(Memory {
        current: number(&text("memory.current")),
        max: number(&text("memory.max")),
        peak: number(&text("memory.peak")),
        swap_current: number(&text("memory.swap.current")),
        swap_max: number(&text("memory.swap.max")),
        stat: flat(&text("memory.stat")),
        events: flat(&text("memory.events")),
        ..Default::default()
    })
    .into();
    stats.pids = Some(Pids {
        current: number(&text("pids.current")),
        max: number(&text("pids.max")),
        ..Default::default()
    })
    .into();
    stats.io = text("io.stat").lines().filter_map(device).collect();
    stats.cpu_pressure = pressure(&text("cpu.pressure")).into();
    stats.memory_pressure = pressure(&text("memory.pressure")).into();
    stats.io_pressure = pressure(&text("io.pressure")).into();
    stats
}

/// A single value; `max` is the largest.
fn number(text: &str) -> u64 {
    match text.trim() {
        "max" => u64::MAX,
        text => text.parse().unwrap_or(0),
    }
}

/// A flat keyed file: a key and a value on each line.
fn flat(text: &str) -> HashMap<String, u64> {
    let pair = |line: &str| {
        let (key, value) = line.split_once(' ')?;
        Some((key.to_owned(), value.trim().parse().ok()?))
    };
    text.lines().filter_map(pair).collect()
}

/// A line of io.stat: `8:0 rbytes=1 wbytes=2 rios=3 wios=4 …`.
fn device(line: &str) -> Option<IoDevice> {
    let (name, values) = line.split_once(' ')?;
    let (major, minor) = name.split_once(':')?;
    let mut device = IoDevice {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        ..Default::default()
    };
    for (key, value) in values.split(' ').filter_map(|pair| pair.split_once('=')) {
        let member = match key {
            "rbytes" => &mut device.rbytes,
            "wbytes" => &mut device.wbytes,
            "rios" => &mut device.rios,
            "wios" => &mut device.wios,
            _ => continue,
        };
        *member = value.parse().unwrap_or(0);
    }
    Some(device)
}

/// A pressure file (Documentation/accounting/psi.rst). `None` where the kernel does not measure it.
fn pressure(text: &str) -> Option<Pressure> {
    let mut pressure = Pressure::new();
    for line in text.lines() {
        let (kind, values) = line.split_once(' ')?;
        let mut read = PressureLine::new();
        for (key, value) in values.split(' ').filter_map(|pair| pair.split_once('=')) {
            match key {
                "avg10" => read.avg10 = value.parse().unwrap_or(0.0),
                "avg60" => read.avg60 = value.parse().unwrap_or(0.0),
                "avg300" => read.avg300 = value.parse().unwrap_or(0.0),
                "total" => read.total = value.parse().unwrap_or(0),
                _ => {}
            }
        }
        match kind {
            "some" => pressure.some = Some(read).into(),
            "full" => pressure.full = Some(read).into(),
            _ => {}
        }
    }
    (pressure.some.is_some() || pressure.full.is_some()).then_some(pressure)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroups_files_become_counters() {
        let stats = counters(|name| {
            Ok(match name {
                "cpu.stat" => "usage_usec 100\nuser_usec 60\nsystem_usec 40\nnr_periods 3\n",
                "memory.current" => "4096\n",
                "memory.max" => "max\n",
                "memory.stat" => "anon 1\ninactive_file 2\n",
                "memory.events" => "oom_kill 7\n",
                "pids.current" => "5\n",
                "io.stat" => "8:16 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n7:0\n",
                "cpu.pressure" => "some avg10=1.50 avg60=0.00 avg300=0.00 total=9\n",
                _ => return Err(io::ErrorKind::NotFound.into()),
            }
            .to_owned())
        });
        assert_eq!((stats.cpu.usage_usec, stats.cpu.nr_periods), (100, 3));
        assert_eq!((stats.memory.current, stats.memory.max), (4096, u64::MAX));
        assert_eq!(stats.memory.stat["inactive_file"], 2);
        assert_eq!(stats.memory.events["oom_kill"], 7);
        assert_eq!(stats.pids.current, 5);
        assert_eq!(stats.io.len(), 1);
        assert_eq!((stats.io[0].major, stats.io[0].minor), (8, 16));
        assert_eq!((stats.io[0].rbytes, stats.io[0].wios), (1, 4));
        assert_eq!(stats.cpu_pressure.some.total, 9);
        assert!(stats.memory_pressure.is_none());
    }

    #[test]
    fn without_a_cgroup_nothing_is_counted() {
        assert_eq!(read(None).unwrap(), ContainerStatsResponse::new());
    }
}
