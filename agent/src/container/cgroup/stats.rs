//! A cgroup's counters. A file that the kernel does not have (a controller that is off) leaves zeros.

use std::collections::HashMap;

use protocol::agent::ContainerStatsResponse;
use protocol::agent::container_stats_response::{
    Cpu, HugePages, IoDevice, Memory, Pids, Pressure, PressureLine,
};

use super::Cgroup;

/// Reads all counters.
#[must_use]
pub fn read(cgroup: &Cgroup) -> ContainerStatsResponse {
    let text = |file: &str| cgroup.read(file).unwrap_or_default();
    let cpu = flat(&text("cpu.stat"));
    let counter = |key: &str| cpu.get(key).copied().unwrap_or(0);
    ContainerStatsResponse {
        cpu: Some(Cpu {
            usage_usec: counter("usage_usec"),
            user_usec: counter("user_usec"),
            system_usec: counter("system_usec"),
            nr_periods: counter("nr_periods"),
            nr_throttled: counter("nr_throttled"),
            throttled_usec: counter("throttled_usec"),
            nr_bursts: counter("nr_bursts"),
            burst_usec: counter("burst_usec"),
            ..Default::default()
        })
        .into(),
        memory: Some(Memory {
            current: number(&text("memory.current")),
            max: number(&text("memory.max")),
            peak: number(&text("memory.peak")),
            swap_current: number(&text("memory.swap.current")),
            swap_max: number(&text("memory.swap.max")),
            swap_peak: number(&text("memory.swap.peak")),
            stat: flat(&text("memory.stat")),
            events: flat(&text("memory.events")),
            ..Default::default()
        })
        .into(),
        pids: Some(Pids {
            current: number(&text("pids.current")),
            max: number(&text("pids.max")),
            ..Default::default()
        })
        .into(),
        io: text("io.stat").lines().filter_map(io_device).collect(),
        cpu_pressure: Some(pressure(&text("cpu.pressure"))).into(),
        memory_pressure: Some(pressure(&text("memory.pressure"))).into(),
        io_pressure: Some(pressure(&text("io.pressure"))).into(),
        huge_pages: cgroup
            .huge_page_sizes()
            .into_iter()
            .map(|size| HugePages {
                current: number(&text(&format!("hugetlb.{size}.current"))),
                max: number(&text(&format!("hugetlb.{size}.max"))),
                failures: flat(&text(&format!("hugetlb.{size}.events")))
                    .get("max")
                    .copied()
                    .unwrap_or(0),
                page_size: size,
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    }
}

/// How often the kernel has killed for want of memory.
#[must_use]
pub fn oom_kills(events: &str) -> u64 {
    flat(events).get("oom_kill").copied().unwrap_or(0)
}

fn number(text: &str) -> u64 {
    match text.trim() {
        "max" => u64::MAX,
        number => number.parse().unwrap_or(0),
    }
}

/// "Flat keyed" files: `key value` lines.
fn flat(text: &str) -> HashMap<String, u64> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(key, value)| (key.to_owned(), number(value)))
        .collect()
}

/// `254:0 rbytes=1 wbytes=2 rios=3 wios=4 ...`.
fn io_device(line: &str) -> Option<IoDevice> {
    let (device, counters) = line.split_once(' ')?;
    let (major, minor) = device.split_once(':')?;
    let counters: HashMap<_, _> = counters
        .split(' ')
        .filter_map(|pair| pair.split_once('='))
        .collect();
    let counter = |key| counters.get(key).map_or(0, |value| number(value));
    Some(IoDevice {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        rbytes: counter("rbytes"),
        wbytes: counter("wbytes"),
        rios: counter("rios"),
        wios: counter("wios"),
        ..Default::default()
    })
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and the same with `full`.
fn pressure(text: &str) -> Pressure {
    let line = |kind: &str| {
        let values: HashMap<_, _> = text
            .lines()
            .find_map(|line| line.strip_prefix(kind)?.strip_prefix(' '))?
            .split(' ')
            .filter_map(|pair| pair.split_once('='))
            .collect();
        let average = |key| {
            values
                .get(key)
                .and_then(|value| value.parse().ok())
                .unwrap_or(0.0)
        };
        Some(PressureLine {
            avg10: average("avg10"),
            avg60: average("avg60"),
            avg300: average("avg300"),
            total: values.get("total").map_or(0, |value| number(value)),
            ..Default::default()
        })
    };
    Pressure {
        some: line("some").into(),
        full: line("full").into(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_formats_are_understood() {
        assert_eq!(number("max\n"), u64::MAX);
        assert_eq!(number("4096\n"), 4096);
        assert_eq!(
            oom_kills("low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n"),
            2
        );
        assert_eq!(oom_kills(""), 0);
        let device = io_device("254:16 rbytes=1024 wbytes=2 rios=3 wios=4 dbytes=0 dios=0").unwrap();
        assert_eq!(
            (device.major, device.minor, device.rbytes, device.wios),
            (254, 16, 1024, 4)
        );
        assert!(io_device("").is_none());
        let pressure = pressure(
            "some avg10=1.50 avg60=0.00 avg300=0.00 total=77\nfull avg10=0.00 avg60=0.00 avg300=0.25 total=5\n",
        );
        assert_eq!((pressure.some.avg10, pressure.some.total), (1.5, 77));
        assert_eq!((pressure.full.avg300, pressure.full.total), (0.25, 5));
    }
}
