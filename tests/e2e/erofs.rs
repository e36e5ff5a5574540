//! containerd 2.3 with its erofs snapshotter: layers reach the guest as block devices, and nothing of the root file
//! system is shared.

use kata_rs_tests::{BUSYBOX, IMAGES, LeakCheck, RUNTIME, sh, unique};

const LAYERS: &str = "localhost/layers:1";
const SNAPSHOTS: &str = "/var/lib/containerd-2.3/io.containerd.snapshotter.v1.erofs/snapshots";

/// containerd 2.3 until the test ends. Suites run one test at a time, and others expect 2.1.
struct Containerd;

impl Containerd {
    /// `rwlayer`: the snapshotter gives containers a block image to write to.
    #[track_caller]
    fn start(rwlayer: &str) -> Self {
        sh(&format!(
            "set -e; use-containerd 2.3 {rwlayer}; mkdir -p /var/lib/containerd-2.3/io.containerd.runtime.v2.task/default; done=/run/kata-rs-test-erofs; [ ! -e $done ] || exit 0; \
             for image in busybox layers; do for snapshotter in erofs overlayfs; do \
             ctr images import --local --snapshotter $snapshotter {IMAGES}/$image.oci.tar; done; done >/dev/null; \
             touch $done"
        ))
        .ok();
        Self
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = sh("use-containerd 2.1");
    }
}

fn run(options: &str, image: &str, script: &str) -> kata_rs_tests::Outcome {
    sh(&format!(
        "ctr run --rm --runtime {RUNTIME} {options} {image} {} sh -c '{script}'",
        unique("t")
    ))
}

#[test]
fn layers_are_erofs_on_virtio_blk_and_read_as_they_do_when_shared() {
    let _containerd = Containerd::start("");
    // In the guest's own pid namespace: its first process is the agent, which has mounted the layers.
    let mounts = "cut -d\" \" -f1,3 /proc/1/mounts | grep -E \"^/dev|overlay|virtiofs\"; echo; \
                  grep \" / \" /proc/mounts | tail -1 | cut -d\" \" -f1,3";
    let guest = "--user 0:0 --with-ns pid:/proc/1/ns/pid --snapshotter";
    let erofs = run(&format!("{guest} erofs"), LAYERS, mounts);
    assert_eq!(
        erofs.stdout.lines().collect::<Vec<_>>(),
        [
            "/dev/vda1 erofs",
            "/dev/vda2 erofs",
            "/dev/vda3 erofs",
            "overlay overlay",
            "",
            "overlay overlay"
        ],
        "{erofs:?}"
    );
    let shared = run(&format!("{guest} overlayfs"), LAYERS, mounts);
    assert_eq!(
        shared.stdout.lines().collect::<Vec<_>>(),
        ["kata-rs virtiofs", "kata-rs virtiofs", "", "kata-rs virtiofs"],
        "{shared:?}"
    );
    // Whiteouts, an opaque directory, a hard link, owners, modes, contents: the same on both, and with runc.
    let files = "cd /; find bin data etc | sort | xargs stat -c \"%n %a %u %g %F\" | md5sum; \
                 find data etc bin/busybox -type f | sort | xargs md5sum; \
                 ls -A data data/opaque; test data/kept/a -ef data/kept/b && echo linked";
    let erofs = run("--user 0:0 --snapshotter erofs", LAYERS, files);
    let shared = run("--user 0:0 --snapshotter overlayfs", LAYERS, files);
    let runc = sh(&format!(
        "ctr run --rm --user 0:0 --snapshotter erofs {LAYERS} {} sh -c '{files}'",
        unique("r")
    ));
    assert!(erofs.ok().ends_with("linked"), "{erofs:?}");
    assert_eq!(erofs.ok(), shared.ok());
    assert_eq!(erofs.ok(), runc.ok());
}

#[test]
fn without_a_block_image_a_container_writes_to_the_guests_memory() {
    let _containerd = Containerd::start("");
    let id = unique("t");
    let written = sh(&format!(
        "set -e; ctr c create --runtime {RUNTIME} --snapshotter erofs {BUSYBOX} {id} \
         sh -c 'echo run >> /root/count; wc -l < /root/count; stat -c %a /; grep -c writable/upper /proc/mounts'; \
         ctr task start {id}; ctr task start {id}; \
         find {SNAPSHOTS} -name count; ctr c rm {id}"
    ));
    assert_eq!(
        written.ok().split_whitespace().collect::<Vec<_>>(),
        ["1", "755", "1", "1", "755", "1"]
    );
}

#[test]
fn a_block_image_keeps_what_is_written_and_is_made_when_it_is_missing() {
    let _containerd = Containerd::start("rwlayer");
    let id = unique("t");
    // The client makes the image when it looks into the file system for the user's groups: ours is made anew.
    let written = sh(&format!(
        "set -e; ctr c create --runtime {RUNTIME} --snapshotter erofs {LAYERS} {id} \
         sh -c 'echo run >> /tmp/count; wc -l < /tmp/count; ls /sys/fs/ext4 | grep vd; grep -c virtiofs /proc/mounts || true'; \
         rm -f {SNAPSHOTS}/*/rwlayer.img; \
         ctr task start {id}; ctr task start {id}; \
         e2fsck -fn {SNAPSHOTS}/*/rwlayer.img >/dev/null 2>&1; stat -c %s {SNAPSHOTS}/*/rwlayer.img; ctr c rm {id}"
    ));
    assert_eq!(
        written.ok().split_whitespace().collect::<Vec<_>>(),
        ["1", "vda1", "0", "2", "vda1", "0", "268435456"]
    );
}

#[test]
fn a_pod_of_seven_containers_has_a_disk_for_each() {
    let _containerd = Containerd::start("");
    let leaks = LeakCheck::begin();
    let group = unique("g");
    let outcome = sh(&format!(
        "g='--runtime {RUNTIME} --snapshotter erofs --annotation io.containerd.runc.v2.group={group}'; \
         ctr run -d $g {LAYERS} {group} sleep 1000; for i in 1 2 3 4 5 6; do ctr run -d $g {LAYERS} {group}-$i sleep 1000; done; \
         for i in '' -1 -2 -3 -4 -5 -6; do ctr task exec --exec-id e {group}$i cat /data/changed; done; \
         for i in -6 -5 -4 -3 -2 -1 ''; do ctr task kill -s 9 {group}$i; ctr task rm {group}$i >/dev/null; ctr c rm {group}$i; done"
    ));
    assert_eq!(
        outcome.stdout.split_whitespace().collect::<Vec<_>>(),
        ["three"; 7],
        "{outcome:?}"
    );
    leaks.nothing_left();
}

#[test]
fn slots_serve_one_container_after_another_and_the_key_is_named_when_they_are_all_taken() {
    let _containerd = Containerd::start("rwlayer");
    let leaks = LeakCheck::begin();
    let group = unique("g");
    // One VM: the first container stays, the others come and go. Their number is more than all slots.
    let script = format!(
        "set -e; echo 'block_slots = 2' > /tmp/{group}.toml; \
         g='--runtime {RUNTIME} --runtime-config-path /tmp/{group}.toml --snapshotter erofs --annotation io.containerd.runc.v2.group={group}'; \
         ctr run -d $g {BUSYBOX} {group} sleep 1000; \
         for i in 1 2 3; do ctr run --rm $g {LAYERS} {group}-$i \
         sh -c 'cd /data; cat changed; echo x > /tmp/file; sync; ls /sys/block/vd*/ | grep -c \"^vd.[0-9]\"'; done; \
         ctr run -d $g {BUSYBOX} {group}-4 sleep 1000; ! ctr run $g {BUSYBOX} {group}-5 true; \
         for c in {group}-5 {group}-4; do ctr task kill -s 9 $c || true; ctr task rm $c >/dev/null || true; ctr c rm $c; done; \
         ctr task kill -s 9 {group}; ctr task rm {group} >/dev/null || true; ctr c rm {group}"
    );
    let outcome = sh(&script);
    let _ = sh(&format!(
        "for c in {group}-5 {group}-4 {group}; do ctr task rm -f $c; ctr c rm $c; done; rm /tmp/{group}.toml"
    ));
    assert_eq!(
        outcome.stdout.split_whitespace().collect::<Vec<_>>(),
        // The first container's two partitions, and four of each that comes.
        ["three", "6"].repeat(3),
        "{outcome:?}"
    );
    let error = "has only 2 slots for block devices and all are in use: raise `block_slots`";
    assert!(outcome.stderr.contains(error), "{outcome:?}");
    leaks.nothing_left();
}

#[test]
fn a_layer_that_is_cut_off_or_no_file_system_is_named() {
    let _containerd = Containerd::start("");
    // The layer's file is the one that the image's VM has open: other suites may have unpacked other images before.
    let outcome = sh(&format!(
        "id={0}; ctr run -d --runtime {RUNTIME} --snapshotter erofs {BUSYBOX} $id-first sleep 600; \
         layer=$(readlink /proc/[0-9]*/fd/* | grep -o -m 1 '/snapshots/[0-9]*/layer.erofs'); layer=$(dirname {SNAPSHOTS})$layer; \
         ctr task delete -f $id-first; ctr c rm $id-first; \
         ctr c create --runtime {RUNTIME} --snapshotter erofs {BUSYBOX} $id true; cp $layer /run/layer.saved; \
         truncate -s 8192 $layer; ctr task start $id; \
         head -c 8192 /dev/zero > $layer; ctr task start $id; \
         cat /run/layer.saved > $layer; rm /run/layer.saved; ctr task start $id; echo status $?; ctr c rm $id",
        unique("t")
    ));
    assert!(outcome.stdout.contains("status 0"), "{outcome:?}");
    for words in ["has 8192 of the", "holds no erofs file system", "layer.erofs"] {
        assert!(outcome.stderr.contains(words), "{words}: {outcome:?}");
    }
}
