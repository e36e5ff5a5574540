//! What dies or is broken around a container ends in a clear error or a correct exit, and nothing is left behind.

use kata_rs_tests::{BUSYBOX, Container, LeakCheck, ctr_run, sh, unique};

const STOPPED: &str =
    "for i in $(seq 150); do ctr task ls | grep -q \"$id.*STOPPED\" && break; sleep 0.1; done";

#[test]
fn the_leak_checker_finds_what_is_planted() {
    sh("kata-rs-test-leaks self-test").ok();
}

#[test]
fn a_killed_vmm_is_reported_as_137_and_leaves_nothing() {
    let leaks = LeakCheck::begin();
    let container = Container::start("", BUSYBOX, "sleep 1000");
    let id = container.id();
    let outcome = sh(&format!(
        "id={id}; kill -9 $(pgrep -n kata-rs-vmm); {STOPPED}; ctr task ls; ctr task rm $id; ctr c rm $id"
    ));
    assert!(outcome.stderr.contains("exit code 137"), "{outcome:#?}");
    drop(container);
    leaks.nothing_left();
}

#[test]
fn a_killed_shim_leaves_nothing() {
    let leaks = LeakCheck::begin();
    let container = Container::start("", BUSYBOX, "sleep 1000");
    let id = container.id();
    let outcome = sh(&format!(
        "id={id}; kill -9 $(pgrep -f 'containerd-shim-kata-rs-v2.*{id}' | head -1); \
         for i in $(seq 100); do ctr task ls | grep -q $id || break; sleep 0.1; done; ctr task ls; pgrep kata-rs-vmm; ctr c rm $id; \
         for f in /run/containerd/fifo/*/$id-*; do rm -rf \"${{f%/*}}\"; done"
    ));
    // The fifos are ctr's own: it removes them in `ctr task rm`, which has no task to remove any more.
    assert!(
        !outcome.stdout.contains(id),
        "the task is gone from the list: {outcome:#?}"
    );
    drop(container);
    leaks.nothing_left();
}

#[test]
fn a_container_survives_a_restart_of_containerd() {
    let leaks = LeakCheck::begin();
    let container = Container::start("", BUSYBOX, "sleep 1000");
    let id = container.id();
    sh("kata-rs-test-restart-containerd").ok();
    assert!(
        sh("ctr task ls")
            .ok()
            .lines()
            .any(|line| line.starts_with(id) && line.contains("RUNNING"))
    );
    assert_eq!(container.exec("echo alive").ok(), "alive");
    let outcome = sh(&format!(
        "id={id}; ctr task kill -s KILL $id; {STOPPED}; ctr task rm $id"
    ));
    assert!(outcome.stderr.contains("exit code 137"), "{outcome:#?}");
    drop(container);
    leaks.nothing_left();
}

#[test]
fn a_guest_that_panics_ends_its_container_only() {
    let leaks = LeakCheck::begin();
    let victim = Container::start("--privileged", BUSYBOX, "sleep 1000");
    let bystander = Container::start("", BUSYBOX, "sleep 1000");
    let id = victim.id();
    let outcome = sh(&format!(
        "id={id}; timeout 20 ctr task exec --exec-id p $id sh -c 'echo c > /proc/sysrq-trigger' ; {STOPPED}; ctr task rm $id"
    ));
    assert!(outcome.stderr.contains("exit code 137"), "{outcome:#?}");
    assert_eq!(bystander.exec("echo alive").ok(), "alive");
    drop((victim, bystander));
    leaks.nothing_left();
}

fn fails_with(options: &str, config: &str, words: &[&str]) {
    let leaks = LeakCheck::begin();
    let id = unique("t");
    let outcome = sh(&format!(
        "cat > /tmp/{id}.toml <<'END'\n{config}\nEND\n\
         ctr run --rm --runtime io.containerd.kata-rs.v2 --runtime-config-path /tmp/{id}.toml {options} {BUSYBOX} {id} true; \
         s=$?; rm /tmp/{id}.toml; ctr c rm {id} 2>/dev/null; exit $s"
    ));
    assert_ne!(outcome.status, 0, "{outcome:#?}");
    for word in words {
        assert!(
            outcome.stderr.contains(word),
            "{word:?} is missing in {outcome:#?}"
        );
    }
    leaks.nothing_left();
}

#[test]
fn an_unknown_configuration_key_is_named() {
    fails_with("", "kernle = \"/boot/vmlinux\"", &["kernle"]);
}

#[test]
fn a_missing_kernel_is_named_with_the_cure() {
    fails_with(
        "",
        "kernel = \"/nowhere/vmlinux\"",
        &["/nowhere/vmlinux", "make kernel"],
    );
}

#[test]
fn a_foreign_kernel_file_is_refused() {
    fails_with("", "kernel = \"/etc/passwd\"", &["/etc/passwd", "make kernel"]);
}

#[test]
fn a_guest_that_never_says_hello_is_given_up() {
    let id = unique("silent");
    // PID 1 of this guest is a program that only waits.
    sh(&format!(
        "mkdir -p /tmp/{id}/rootfs && ctr images mount localhost/pause:1 /tmp/{id}/rootfs >/dev/null && \
         kata-rs-image build --agent /tmp/{id}/rootfs/pause --output /tmp/silent.img >/dev/null; \
         ctr images unmount --rm /tmp/{id}/rootfs >/dev/null; rm -r /tmp/{id}; test -s /tmp/silent.img"
    ))
    .ok();
    fails_with(
        "",
        "guest_image = \"/tmp/silent.img\"\nhello_timeout_s = 20",
        &["did not say Hello within 20 s", "hello_timeout_s"],
    );
}

#[test]
fn a_guest_whose_init_dies_is_reported_with_its_last_words() {
    // A program that prints its usage and exits; a kernel without PID 1 panics.
    sh("kata-rs-image build --agent \"$(command -v kata-rs-image)\" --output /tmp/dying.img >/dev/null; test -s /tmp/dying.img").ok();
    fails_with("", "guest_image = \"/tmp/dying.img\"", &["panic"]);
}

#[test]
fn an_unusable_kvm_device_is_named_with_the_cure() {
    let leaks = LeakCheck::begin();
    let id = unique("t");
    let outcome = sh(&format!(
        "mv /dev/kvm /dev/kvm.away; ctr run --rm --runtime io.containerd.kata-rs.v2 {BUSYBOX} {id} true; s=$?; mv /dev/kvm.away /dev/kvm; ctr c rm {id} 2>/dev/null; exit $s"
    ));
    assert_ne!(outcome.status, 0);
    assert!(outcome.stderr.contains("/dev/kvm"), "{outcome:#?}");
    leaks.nothing_left();
}

#[test]
fn a_mount_source_that_does_not_exist_is_named() {
    let leaks = LeakCheck::begin();
    let outcome = ctr_run(
        "--rm --mount type=bind,src=/no/such/source,dst=/data,options=rbind:ro",
        BUSYBOX,
        &unique("t"),
        "true",
    );
    assert_ne!(outcome.status, 0);
    assert!(outcome.stderr.contains("/no/such/source"), "{outcome:#?}");
    leaks.nothing_left();
}

#[test]
fn a_full_disk_is_the_containers_problem_only() {
    let container = Container::start(
        "--mount type=tmpfs,dst=/small,options=size=1m",
        BUSYBOX,
        "sleep 1000",
    );
    let full = container.exec("dd if=/dev/zero of=/small/file bs=64k count=32");
    assert_ne!(full.status, 0);
    assert!(full.stderr.contains("No space left on device"), "{full:#?}");
    assert_eq!(container.exec("rm /small/file; echo fine").ok(), "fine");
}

#[test]
fn a_root_file_system_that_vanished_is_named() {
    let leaks = LeakCheck::begin();
    let id = unique("t");
    let outcome = sh(&format!(
        r#"ctr oci spec | jq '.root.path="/tmp/{id}/gone" | .process.terminal=false | .process.args=["true"]' > /tmp/{id}.json; \
        ctr run --rm --runtime io.containerd.kata-rs.v2 --config /tmp/{id}.json {id}; s=$?; rm /tmp/{id}.json; ctr c rm {id} 2>/dev/null; exit $s"#
    ));
    assert_ne!(outcome.status, 0);
    assert!(
        outcome.stderr.contains(&format!("/tmp/{id}/gone")),
        "{outcome:#?}"
    );
    leaks.nothing_left();
}

#[test]
fn a_foreign_guest_image_is_refused_with_the_cure() {
    fails_with(
        "",
        "guest_image = \"/etc/passwd\"",
        &["/etc/passwd", "make image"],
    );
}
