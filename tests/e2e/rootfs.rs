//! The forms in which a snapshotter hands over a root file system.

use kata_rs_tests::{BUSYBOX, ctr_run, sh, unique};

fn runs_on(snapshotter: &str, file_system: &str) {
    sh(&format!(
        "ctr images import --local --snapshotter {snapshotter} /var/lib/kata-rs-test/images/busybox.oci.tar >/dev/null"
    ))
    .ok();
    let outcome = ctr_run(
        &format!("--rm --snapshotter {snapshotter}"),
        BUSYBOX,
        &unique("t"),
        "sh -c 'echo written > /root/file && cat /root/file; grep \" / \" /proc/mounts | tail -1 | cut -d\" \" -f3'",
    );
    assert_eq!(outcome.ok().lines().collect::<Vec<_>>(), ["written", file_system]);
}

#[test]
fn overlayfs_is_shared_by_virtiofs() {
    runs_on("overlayfs", "virtiofs");
}

#[test]
fn native_is_a_bind_shared_by_virtiofs() {
    runs_on("native", "virtiofs");
}

#[test]
fn blockfile_is_a_virtio_block_device() {
    runs_on("blockfile", "ext4");
}

#[test]
fn devmapper_is_a_virtio_block_device() {
    runs_on("devmapper", "ext4");
}

#[test]
fn a_read_only_root_file_system_refuses_writes() {
    let outcome = ctr_run(
        "--rm --read-only",
        BUSYBOX,
        &unique("t"),
        "sh -c 'touch /x 2>/dev/null || echo refused'",
    );
    assert_eq!(outcome.ok(), "refused");
}

#[test]
fn what_a_container_writes_is_there_for_its_next_task() {
    let id = unique("t");
    let outcome = sh(&format!(
        "set -e; ctr c create --runtime io.containerd.kata-rs.v2 {BUSYBOX} {id} sh -c 'echo run >> /root/count; wc -l < /root/count'; \
         ctr task start {id}; ctr task start {id}; ctr c rm {id}"
    ));
    assert_eq!(outcome.ok().split_whitespace().collect::<Vec<_>>(), ["1", "2"]);
}

#[test]
fn files_keep_owner_mode_links_and_attributes() {
    let script = "sh -c 'cd /root; echo x > a; chown 7:8 a; chmod 4751 a; ln a b; ln -s a c; mkfifo p; \
                  mknod n c 1 3; stat -c \"%a %u %g %h %F\" a b p n; readlink c; rm -r /root/*; ls -A | wc -l'";
    let ours = ctr_run("--rm", BUSYBOX, &unique("t"), script);
    let theirs = sh(&format!("ctr run --rm {BUSYBOX} {} {script}", unique("r")));
    assert_eq!(ours.ok(), theirs.ok());
}
