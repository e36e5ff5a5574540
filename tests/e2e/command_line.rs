//! `kata-rs` by hand, without containerd: run, exec, ps, logs, kill, rm, check.

use kata_rs_tests::{IMAGES, LeakCheck, sh, sh_with_input, unique};

fn run(options: &str, command: &str) -> kata_rs_tests::Outcome {
    sh(&format!(
        "kata-rs run --rm {options} {IMAGES}/busybox.oci.tar {command}"
    ))
}

#[test]
fn run_passes_streams_and_status_through() {
    let leaks = LeakCheck::begin();
    let outcome = run("", "sh -c 'echo out; echo err >&2; exit 7'");
    assert_eq!(
        (outcome.status, outcome.stdout.as_str()),
        (7, "out\n"),
        "{outcome:#?}"
    );
    assert!(outcome.stderr.ends_with("err\n"), "{outcome:#?}");
    leaks.nothing_left();
}

#[test]
fn run_takes_a_directory_an_oci_layout_and_an_archive() {
    let id = unique("layout");
    let outcome = sh(&format!(
        "set -e; mkdir -p /tmp/{id}/oci /tmp/{id}/dir; tar -xf {IMAGES}/busybox.oci.tar -C /tmp/{id}/oci; \
         ctr images mount localhost/busybox:1 /tmp/{id}/dir >/dev/null; \
         for image in {IMAGES}/busybox.oci.tar {IMAGES}/busybox.docker.tar /tmp/{id}/oci /tmp/{id}/dir; do kata-rs run --rm $image echo from-image; done; \
         ctr images unmount --rm /tmp/{id}/dir >/dev/null; rm -r /tmp/{id}"
    ));
    assert_eq!(outcome.ok().lines().collect::<Vec<_>>(), ["from-image"; 4]);
}

#[test]
fn run_sets_cpus_memory_environment_user_directory_and_volumes() {
    let id = unique("volume");
    let outcome = sh(&format!(
        "mkdir -p /tmp/{id} && echo from-host > /tmp/{id}/file; \
         kata-rs run --rm --cpus 0.5 --memory 256m -e COLOUR=green -u 12:34 -w /tmp -v /tmp/{id}:/data:ro {IMAGES}/busybox.oci.tar \
           sh -c 'cat /sys/fs/cgroup/cpu.max; echo $COLOUR; id -u; id -g; pwd; cat /data/file; cat /sys/fs/cgroup/memory.max; touch /data/x 2>/dev/null || echo refused'; \
         rm -r /tmp/{id}"
    ));
    assert_eq!(
        outcome.ok().lines().collect::<Vec<_>>(),
        [
            "50000 100000",
            "green",
            "12",
            "34",
            "/tmp",
            "from-host",
            "268435456",
            "refused"
        ]
    );
}

#[test]
fn the_configuration_can_give_every_vm_several_cpus() {
    let file = format!("/tmp/{}.toml", unique("config"));
    let outcome = sh(&format!(
        "echo 'default_vcpus = 3' > {file}; kata-rs run --rm --config {file} {IMAGES}/busybox.oci.tar nproc; s=$?; rm {file}; exit $s"
    ));
    assert_eq!(outcome.ok(), "3");
}

#[test]
fn standard_input_reaches_the_container_with_i() {
    let outcome = sh_with_input(
        &format!("kata-rs run --rm -i {IMAGES}/busybox.oci.tar cat"),
        b"typed",
    );
    assert_eq!(outcome.ok(), "typed");
}

#[test]
fn a_detached_container_is_listed_executed_in_logged_killed_and_removed() {
    let leaks = LeakCheck::begin();
    let name = unique("detached");
    let outcome = sh(&format!(
        "set -e; kata-rs run -d --name {name} {IMAGES}/busybox.oci.tar sh -c 'echo started; sleep 1000' >/dev/null; \
         kata-rs ps --json; kata-rs exec {name} sh -c 'echo inside; exit 0'; \
         kata-rs logs {name}; kata-rs kill {name} KILL; kata-rs rm --force {name} >/dev/null; kata-rs ps --json"
    ));
    let text = outcome.ok();
    assert!(text.contains(&name) && text.contains("running"), "{text}");
    assert!(text.contains("inside") && text.contains("started"), "{text}");
    assert!(text.trim_end().ends_with("[]"), "{text}");
    leaks.nothing_left();
}

#[test]
fn exec_passes_the_status_and_refuses_an_unknown_name() {
    let name = unique("exec");
    let outcome = sh(&format!(
        "kata-rs run -d --name {name} {IMAGES}/busybox.oci.tar sleep 1000 >/dev/null; kata-rs exec {name} sh -c 'exit 9'; s=$?; \
         kata-rs rm --force {name} >/dev/null; echo $s; kata-rs exec no-such-container true"
    ));
    assert_eq!(outcome.stdout.trim(), "9", "{outcome:#?}");
    assert!(
        outcome.status != 0 && outcome.stderr.contains("no-such-container"),
        "{outcome:#?}"
    );
}

#[test]
fn a_missing_executable_is_127_and_one_that_is_not_executable_126() {
    let leaks = LeakCheck::begin();
    assert_eq!(run("", "no-such-program").status, 127);
    assert_eq!(run("", "/etc/passwd").status, 126);
    leaks.nothing_left();
}

#[test]
fn the_timeline_names_every_stage() {
    let outcome = run("--timeline", "true");
    assert_eq!(outcome.status, 0, "{outcome:#?}");
    for stage in ["VM created", "kernel loaded", "first instruction", "Hello"] {
        assert!(
            outcome.stderr.contains(stage),
            "{stage:?} is missing in {outcome:#?}"
        );
    }
}

#[test]
fn check_finds_this_host_fit_and_says_so_as_json() {
    let outcome = sh("kata-rs check --json");
    let findings: serde_json::Value = serde_json::from_str(outcome.ok()).unwrap();
    assert_eq!(findings["fit"], true, "{findings:#}");
}

#[test]
fn check_names_the_cure_when_kvm_is_missing() {
    let outcome = sh("mv /dev/kvm /dev/kvm.away; kata-rs check; s=$?; mv /dev/kvm.away /dev/kvm; exit $s");
    assert_ne!(outcome.status, 0);
    assert!(
        outcome.stdout.contains("/dev/kvm") && outcome.stdout.contains("modprobe"),
        "{outcome:#?}"
    );
}

#[test]
fn an_image_that_is_none_is_refused_by_name() {
    let outcome = sh("kata-rs run --rm /etc/passwd true");
    assert!(
        outcome.status == 125 && outcome.stderr.contains("/etc/passwd"),
        "{outcome:#?}"
    );
}

#[test]
fn a_full_disk_leaves_no_half_unpacked_image() {
    let id = unique("full");
    let outcome = sh(&format!(
        "mkdir /tmp/{id} && mount -t tmpfs -o size=512k tmpfs /tmp/{id}; \
         kata-rs --root /tmp/{id} run --rm {IMAGES}/busybox.oci.tar true; s=$?; find /tmp/{id}/images -mindepth 1 ! -name lock; \
         umount /tmp/{id}; rmdir /tmp/{id}; exit $s"
    ));
    assert_eq!(
        (outcome.status, outcome.stdout.as_str()),
        (125, ""),
        "{outcome:#?}"
    );
    assert!(outcome.stderr.contains("No space left on device"), "{outcome:#?}");
}
