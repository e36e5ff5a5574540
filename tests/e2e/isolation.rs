//! Every sandbox is a machine of its own; what happens inside stays inside.

use kata_rs_tests::{BUSYBOX, Container, ctr_run, sh, unique};

#[test]
fn the_containers_kernel_is_not_the_hosts() {
    let inside = ctr_run("--rm", BUSYBOX, &unique("t"), "uname -r");
    assert_ne!(inside.ok(), sh("uname -r").ok());
    assert!(inside.ok().starts_with("6.12"), "{inside:?}");
}

#[test]
fn two_sandboxes_have_two_vms_two_boot_ids_and_two_clocks() {
    let [one, two] = [(); 2].map(|()| Container::start("--privileged", BUSYBOX, "sleep 1000"));
    let boot_id = "cat /proc/sys/kernel/random/boot_id";
    let ids = [one.exec(boot_id), two.exec(boot_id), sh(boot_id)].map(|outcome| outcome.ok().to_string());
    assert!(
        ids[0] != ids[1] && ids[0] != ids[2] && ids[1] != ids[2],
        "{ids:?}"
    );
    assert_eq!(sh("pgrep -c kata-rs-vmm").ok(), "2");

    one.exec("date -s 2001-02-03").ok();
    assert_eq!(one.exec("date +%Y").ok(), "2001");
    assert_ne!(two.exec("date +%Y").ok(), "2001");
    assert_ne!(sh("date +%Y").ok(), "2001");
}

#[test]
fn clock_sysctls_and_kernel_log_of_the_guest_are_not_the_hosts() {
    let before = sh("cat /proc/sys/kernel/panic").ok().to_string();
    let container = Container::start("--privileged", BUSYBOX, "sleep 1000");
    container.exec("sysctl -w kernel.panic=5").ok();
    assert_eq!(container.exec("cat /proc/sys/kernel/panic").ok(), "5");
    assert_eq!(sh("cat /proc/sys/kernel/panic").ok(), before);

    let mark = unique("mark");
    container.exec(&format!("echo {mark} > /dev/kmsg")).ok();
    assert!(container.exec("dmesg").ok().contains(&mark));
    assert_eq!(sh(&format!("dmesg | grep -c {mark}")).stdout.trim(), "0");
}

#[test]
fn the_guests_clock_is_the_hosts_at_start() {
    let outcome = sh(&format!(
        "a=$(date +%s); b=$(ctr run --rm --runtime io.containerd.kata-rs.v2 {BUSYBOX} {} date +%s); c=$(date +%s); echo $a $b $c",
        unique("t")
    ));
    let times: Vec<i64> = outcome
        .ok()
        .split_whitespace()
        .map(|word| word.parse().unwrap())
        .collect();
    assert!(times[0] <= times[1] && times[1] <= times[2], "{times:?}");
}

#[test]
fn the_hosts_oom_killer_sees_a_vm_as_any_container() {
    // containerd protects its shims; that must not reach the guest's memory.
    let _container = Container::start("", BUSYBOX, "sleep 1000");
    assert_eq!(sh("cat /proc/$(pgrep -n kata-rs-vmm)/oom_score_adj").ok(), "0");
}

#[test]
fn a_vm_is_counted_in_its_containers_cgroup() {
    let container = Container::start("", BUSYBOX, "sleep 1000");
    let cgroup = sh("cat /proc/$(pgrep -n kata-rs-vmm)/cgroup");
    assert!(
        cgroup.ok().contains(container.id()),
        "the VMM of {} is in {cgroup:#?}",
        container.id()
    );
}
