//! Many containers, one after the other and at once: no failure, no leak, no growth.

use kata_rs_tests::{BUSYBOX, LeakCheck, RUNTIME, sh, unique};

/// containerd's open descriptors and resident KiB.
fn containerd() -> (u64, u64) {
    let text =
        sh("p=$(pgrep -xo containerd); ls /proc/$p/fd | wc -l; awk '/^VmRSS/{print $2}' /proc/$p/status");
    let numbers: Vec<u64> = text
        .ok()
        .lines()
        .map(|line| line.trim().parse().unwrap())
        .collect();
    (numbers[0], numbers[1])
}

#[test]
fn a_hundred_cycles_leave_nothing_and_grow_nothing() {
    let prefix = unique("cycle");
    let cycle = |from: u32, to: u32| {
        sh(&format!(
            "for i in $(seq {from} {to}); do ctr run --rm --runtime {RUNTIME} {BUSYBOX} {prefix}-$i true || exit 1; done"
        ))
    };
    // The first ones warm caches and pools up.
    cycle(1, 10).ok();
    let leaks = LeakCheck::begin();
    let before = containerd();
    for start in (11..=110).step_by(20) {
        cycle(start, start + 19).ok();
    }
    let after = containerd();
    assert!(
        after.0 <= before.0 + 5,
        "containerd's descriptors grew from {} to {}",
        before.0,
        after.0
    );
    assert!(
        after.1 <= before.1 + before.1 / 2,
        "containerd's memory grew from {} to {} KiB",
        before.1,
        after.1
    );
    leaks.nothing_left();
}

#[test]
fn twenty_vms_run_at_once() {
    let leaks = LeakCheck::begin();
    let prefix = unique("many");
    let started = sh(&format!(
        "for i in $(seq 20); do ctr run -d --runtime {RUNTIME} --memory-limit 67108864 {BUSYBOX} {prefix}-$i sleep 3600 & done; wait"
    ));
    let running = sh(&format!(
        "pgrep -c kata-rs-vmm; \
         for i in $(seq 20); do ctr task exec --exec-id x {prefix}-$i cat /proc/sys/kernel/random/boot_id; done | sort -u | wc -l"
    ));
    let removed = sh(&format!(
        "remove() {{ ctr task kill -s KILL $1; for _ in $(seq 100); do ctr task rm -f $1 >/dev/null 2>&1 && break; sleep 0.2; done; ctr c rm $1; }}; \
         for i in $(seq 20); do remove {prefix}-$i & done; wait; ctr task ls -q | grep -c {prefix}"
    ));
    assert_eq!(
        (started.stderr.as_str(), running.stdout.as_str(), removed.stdout.as_str()),
        ("", "20\n20\n", "0\n"),
        "{started:#?} {running:#?} {removed:#?}"
    );
    leaks.nothing_left();
}
