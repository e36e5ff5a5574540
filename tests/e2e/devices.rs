//! Block devices of the host in containers, devices that no guest has, and huge pages.

use kata_rs_tests::{BUSYBOX, DEBIAN, LeakCheck, RUNTIME, sh, unique};

/// A loop device on a file of the host, gone with the test.
struct Loop {
    device: String,
    file: String,
}

impl Loop {
    #[track_caller]
    fn new() -> Self {
        let file = format!("/run/{}", unique("disk"));
        let made = sh(&format!(
            "set -e; printf first > {file}; truncate -s 16M {file}; losetup -f --show {file}"
        ));
        Self {
            device: made.ok().to_owned(),
            file,
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = sh(&format!("losetup -d {}; rm -f {}", self.device, self.file));
    }
}

#[test]
fn a_block_device_of_the_host_is_the_containers_disk() {
    let leaks = LeakCheck::begin();
    let disk = Loop::new();
    let (device, file) = (&disk.device, &disk.file);
    let inside = sh(&format!(
        "ctr run --rm --runtime {RUNTIME} --device {device} {BUSYBOX} {} sh -c \
         'd={device}; stat -c \"%F\" $d; blockdev --getsize64 $d; head -c 5 $d; echo; \
          printf written | dd of=$d bs=512 seek=1 conv=fsync 2>/dev/null; \
          printf \"%d\\n\" 0x$(stat -c %t $d); dd if=/dev/null of=$d 2>/dev/null; \
          cat /proc/mounts | grep -c $d; \
          mknod /other b 254 200; head -c 1 /other 2>&1 | grep -c \"not permitted\"'",
        unique("t")
    ));
    assert_eq!(
        inside.ok().lines().collect::<Vec<_>>(),
        // The guest's number of virtio disks, and no other device.
        ["block special file", "16777216", "first", "254", "0", "1"],
        "{inside:?}"
    );
    let host = sh(&format!(
        "dd if={file} bs=512 skip=1 count=1 2>/dev/null | head -c 7"
    ));
    assert_eq!(host.ok(), "written");
    drop(disk);
    leaks.nothing_left();
}

#[test]
fn a_disk_keeps_to_its_limit() {
    const PER_SECOND: f64 = 20.0;
    const WRITES: f64 = 100.0;
    let disk = Loop::new();
    let (device, config) = (&disk.device, format!("{}.toml", disk.file));
    // Requests that the disk has completed and the time, both as the guest counts them, before and after.
    let outcome = sh(&format!(
        "set -e; echo 'block_limit = {{ operations_per_s = {PER_SECOND} }}' > {config}; trap 'rm {config}' EXIT
         ctr run --rm --runtime {RUNTIME} --runtime-config-path {config} --device {device} {DEBIAN} {} sh -c \
         'set -e; counters=/sys/dev/block/$(mountpoint -x {device})/stat
          now() {{ read reads b c d writes e < $counters; read uptime f < /proc/uptime; echo $((reads + writes)) $uptime; }}
          now; dd if=/dev/zero of={device} bs=4k count={WRITES} oflag=direct; now'",
        unique("t")
    ));
    let numbers = outcome.ok().split_whitespace().map(|word| word.parse().unwrap());
    let numbers: Vec<f64> = numbers.collect();
    let (passed, elapsed) = (numbers[2] - numbers[0], numbers[3] - numbers[1]);
    // A second's worth was saved up.
    let most = PER_SECOND * (elapsed + 1.0) + 5.0;
    assert!(passed <= most, "{passed} requests in {elapsed} s, at most {most}");
    assert!(passed >= WRITES, "only {passed} requests");
}

#[test]
fn containers_of_a_pod_have_a_device_in_common_and_it_can_be_mounted_at_a_path() {
    let disk = Loop::new();
    let device = &disk.device;
    let group = unique("g");
    let outcome = sh(&format!(
        "g='--runtime {RUNTIME} --annotation io.containerd.runc.v2.group={group}'; \
         ctr run -d $g --device {device} {BUSYBOX} {group} sleep 1000; \
         ctr task exec --exec-id e1 {group} sh -c 'printf shared | dd of={device} conv=notrunc 2>/dev/null; stat -c %t:%T {device}'; \
         ctr run --rm $g --device {device} {BUSYBOX} {group}-2 sh -c 'head -c 6 {device}; echo; stat -c %t:%T {device}'; \
         ctr run --rm $g --privileged --mount type=bind,src={device},dst=/disk,options=rbind {BUSYBOX} {group}-3 \
         sh -c 'head -c 6 /disk; echo; stat -c %t:%T /disk'; \
         ctr task kill -s 9 {group}; sleep 1; ctr task rm -f {group} >/dev/null; ctr c rm {group}"
    ));
    let lines: Vec<&str> = outcome.stdout.lines().collect();
    let [number, shared, same, again, mounted] = lines[..] else {
        panic!("{outcome:?}");
    };
    assert_eq!((shared, again), ("shared", "shared"), "{outcome:?}");
    assert_eq!((same, mounted), (number, number), "one disk for all: {outcome:?}");
}

#[test]
fn a_device_that_no_guest_has_is_refused_by_name() {
    let outcome = sh(&format!(
        "ctr run --rm --runtime {RUNTIME} --device /dev/kvm {BUSYBOX} {} true",
        unique("t")
    ));
    assert_ne!(outcome.status, 0);
    assert!(
        outcome
            .stderr
            .contains("the device /dev/kvm (10:232) is the host's"),
        "{outcome:?}"
    );
    let own = sh(&format!(
        "ctr run --rm --runtime {RUNTIME} --device /dev/fuse {BUSYBOX} {} stat -c %F:%t:%T /dev/fuse",
        unique("t")
    ));
    assert_eq!(own.ok(), "character special file:a:e5");
}

/// Runs a container of a specification that `jq` has changed with this filter.
fn run_with(filter: &str, script: &str) -> kata_rs_tests::Outcome {
    let id = unique("t");
    sh(&format!(
        "dir=/run/{id}; mkdir -p $dir/rootfs; ctr images mount --rw {BUSYBOX} $dir/rootfs >/dev/null; \
         ctr oci spec | jq --arg root $dir/rootfs '.root = {{path: $root}} | .linux.cgroupsPath = \"/default/{id}\" | .process.terminal = false | .process.env = [\"PATH=/bin\"] | \
         .process.args = [\"sh\", \"-c\", \"{script}\"] | {filter}' > $dir/config.json; \
         ctr run --rm --runtime {RUNTIME} --config $dir/config.json {id}; s=$?; \
         ctr images unmount $dir/rootfs >/dev/null; rm -r $dir; exit $s"
    ))
}

#[test]
fn a_device_that_may_only_be_read_cannot_be_written() {
    let disk = Loop::new();
    let device = &disk.device;
    let minor = device.trim_start_matches("/dev/loop");
    let filter = format!(
        ".linux.devices = [{{type: \"b\", path: \"/dev/xvda\", major: 7, minor: {minor}, fileMode: 432, uid: 5, gid: 6}}] | \
         .linux.resources.devices += [{{allow: true, type: \"b\", major: 7, minor: {minor}, access: \"r\"}}]"
    );
    let outcome = run_with(
        &filter,
        "stat -c %a:%u:%g /dev/xvda; head -c 5 /dev/xvda; echo; echo x 2>/dev/null > /dev/xvda || echo refused",
    );
    assert_eq!(
        outcome.ok().lines().collect::<Vec<_>>(),
        ["660:5:6", "first", "refused"],
        "{outcome:?}"
    );
}

#[test]
fn huge_pages_are_set_aside_by_the_limits() {
    let huge = |bytes: u64| {
        format!(
            ".linux.resources.hugepageLimits = [{{pageSize: \"2MB\", limit: {bytes}}}] | \
             .mounts += [{{destination: \"/huge\", type: \"hugetlbfs\", source: \"hugetlbfs\", options: [\"pagesize=2M\"]}}]"
        )
    };
    let script = "cat /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages; truncate -s 4M /huge/f; stat -c %s /huge/f";
    let outcome = run_with(&huge(8 << 20), script);
    assert_eq!(
        outcome.ok().lines().collect::<Vec<_>>(),
        ["4", "4194304"],
        "{outcome:?}"
    );
    let outcome = run_with(&huge(64 << 30), script);
    assert_ne!(outcome.status, 0);
    assert!(
        outcome
            .stderr
            .contains("of 32768 pages of 2MB: give the VM more memory"),
        "{outcome:?}"
    );
}

#[test]
fn a_pods_vm_grows_by_the_huge_pages_of_a_container() {
    let group = unique("g");
    let pages = "cat /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
    // 640 MiB of huge pages are more than the whole VM at first.
    let outcome = sh(&format!(
        "g='--runtime {RUNTIME} --annotation io.containerd.runc.v2.group={group}'; \
         ctr run -d $g {BUSYBOX} {group} sleep 1000; \
         ctr c create $g {BUSYBOX} {group}-2 sh -c '{pages}'; \
         ctr c info --spec {group}-2 | jq '.linux.resources.hugepageLimits = [{{pageSize: \"2MB\", limit: 671088640}}]' > /run/{group}.json; \
         ctr c rm {group}-2; mkdir /run/{group}; ctr images mount {BUSYBOX} /run/{group} >/dev/null; \
         jq '.root = {{path: \"/run/{group}\", readonly: true}}' /run/{group}.json > /run/{group}-2.json; \
         ctr run --rm --runtime {RUNTIME} --config /run/{group}-2.json {group}-2; \
         ctr images unmount --rm /run/{group} >/dev/null; rmdir /run/{group}; rm /run/{group}.json /run/{group}-2.json; \
         while ! ctr task exec --exec-id e {group} {pages} | grep -x 0; do sleep 0.1; done; \
         ctr task kill -s 9 {group}; ctr task rm {group} >/dev/null; ctr c rm {group}"
    ));
    assert_eq!(
        outcome.stdout.split_whitespace().collect::<Vec<_>>(),
        ["320", "0"],
        "{outcome:?}"
    );
}
