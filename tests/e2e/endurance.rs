//! Many containers, one after the other and at once: no failure, no leak, no growth.

use std::collections::BTreeMap;

use kata_rs_tests::{BUSYBOX, LeakCheck, RUNTIME, sh, unique};

/// The leak checker's figures of the host and of containerd.
fn figures() -> BTreeMap<String, i64> {
    serde_json::from_str(sh("kata-rs-test-leaks figures").ok()).unwrap()
}

/// How much each figure may grow over a hundred containers: less than one of a thing per container, and less memory
/// than a process or a cgroup of each would keep.
const ALLOWED: [(&str, i64); 7] = [
    ("open_files", 64),
    ("processes", 10),
    ("slab_unreclaimable_kib", 16 << 10),
    ("shared_memory_kib", 1 << 10),
    ("containerd_open_files", 10),
    ("containerd_threads", 10),
    ("containerd_resident_kib", 32 << 10),
];

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
    let before = figures();
    for start in (11..=110).step_by(20) {
        cycle(start, start + 19).ok();
    }
    leaks.nothing_left();
    let after = figures();
    println!("before {before:?}\nafter  {after:?}");
    for (name, allowed) in ALLOWED {
        assert!(
            after[name] <= before[name] + allowed,
            "{name} grew by more than {allowed}: before {before:?}, after {after:?}"
        );
    }
    assert!(
        after["available_kib"] >= before["available_kib"] - (64 << 10),
        "the host has less memory: before {before:?}, after {after:?}"
    );
}

#[test]
fn twenty_vms_run_at_once() {
    let leaks = LeakCheck::begin();
    let prefix = unique("many");
    // On a machine that is emulated by a slow one, the last of them needs more than a minute to boot.
    let config = format!("/tmp/{prefix}.toml");
    let started = sh(&format!(
        "echo 'hello_timeout_s = 280' > {config}; \
         for i in $(seq 20); do ctr run -d --runtime {RUNTIME} --runtime-config-path {config} --memory-limit 67108864 {BUSYBOX} {prefix}-$i sleep 3600 & done; wait"
    ));
    let running = sh(&format!(
        "pgrep -c kata-rs-vmm; \
         for i in $(seq 20); do ctr task exec --exec-id x {prefix}-$i cat /proc/sys/kernel/random/boot_id; done | sort -u | wc -l"
    ));
    let removed = sh(&format!(
        "remove() {{ ctr task kill -s KILL $1; for _ in $(seq 100); do ctr task rm -f $1 >/dev/null 2>&1 && break; sleep 0.2; done; ctr c rm $1; }}; \
         for i in $(seq 20); do remove {prefix}-$i & done; wait; rm {config}; ctr task ls -q | grep -c {prefix}"
    ));
    assert_eq!(
        (
            started.stderr.as_str(),
            running.stdout.as_str(),
            removed.stdout.as_str()
        ),
        ("", "20\n20\n", "0\n"),
        "{started:#?} {running:#?} {removed:#?}"
    );
    leaks.nothing_left();
}
