//! What containers mount: directories and files of the host, what kubelet makes of Kubernetes' volumes, and what must
//! never reach the host. Paths like kubelet's are made by hand; the volumes' plugins are told by them.

use kata_rs_tests::{BUSYBOX, Container, DEBIAN, LeakCheck, RUNTIME, ctr_run, sh, unique};

/// A directory of the host that goes with the test, and a pod's directory as kubelet has it in it.
struct Pod {
    directory: String,
    group: String,
}

impl Pod {
    fn new() -> Self {
        let name = unique("pod");
        let directory = format!("/var/lib/kata-rs-test-kubelet/pods/{name}");
        sh(&format!("mkdir -p {directory}/volumes")).ok();
        Self {
            directory,
            group: format!("--annotation io.containerd.runc.v2.group={name}"),
        }
    }

    /// The directory of a volume; made.
    fn volume(&self, plugin: &str, name: &str) -> String {
        let path = format!("{}/volumes/kubernetes.io~{plugin}/{name}", self.directory);
        sh(&format!("mkdir -p {path}")).ok();
        path
    }

    /// Writes the one key `key` the way kubelet does (AtomicWriter).
    fn write(path: &str, revision: u32, text: &str) {
        sh(&format!(
            "set -e; cd {path}; old=$(readlink ..data || true); mkdir ..{revision}; printf '%s' '{text}' > ..{revision}/key; \
             chmod 640 ..{revision}/key; chown 0:77 ..{revision}/key; \
             ln -s ..{revision} ..data_tmp; mv -T ..data_tmp ..data; [ -L key ] || ln -s ..data/key key; rm -rf \"$old\""
        ))
        .ok();
    }

    /// A container of the pod.
    fn start(&self, mounts: &[String], image: &str, command: &str) -> Container {
        Container::start(&format!("{} {}", self.group, mounts.join(" ")), image, command)
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = sh(&format!(
            "for m in $(grep -F {0}/ /proc/mounts | cut -d' ' -f2 | sort -r); do umount $m; done; rm -rf {0}",
            self.directory
        ));
    }
}

fn bind(source: &str, target: &str, options: &str) -> String {
    format!("--mount type=bind,src={source},dst={target},options={options}")
}

/// Waits in the container for a condition, 10 s.
fn wait_for(container: &Container, condition: &str) {
    let outcome = container.exec(&format!(
        "for i in $(seq 100); do {condition} && exit 0; sleep 0.1; done; exit 1"
    ));
    assert_eq!(outcome.status, 0, "{condition}: {outcome:#?}");
}

const SLEEP: &str = "sleep 1000";

#[test]
fn a_config_map_changes_under_running_containers_and_inotify_fires() {
    let leaks = LeakCheck::begin();
    let pod = Pod::new();
    let source = pod.volume("configmap", "settings");
    Pod::write(&source, 1, "one");
    let mounts = [bind(&source, "/etc/settings", "rbind:ro")];
    // The second container is told by inotify; what it hears it writes down.
    let watch = "import ctypes, os; libc = ctypes.CDLL(None); fd = libc.inotify_init(); \
                 assert libc.inotify_add_watch(fd, b'/etc/settings', 0x80) > 0; open('/ready', 'w').close(); \
                 os.read(fd, 4096); open('/heard', 'w').write(open('/etc/settings/key').read()); \
                 __import__('time').sleep(1000)";
    let first = pod.start(&mounts, BUSYBOX, SLEEP);
    let id = unique("c");
    let watcher = sh(&format!(
        "ctr run -d --runtime {RUNTIME} {} {} {DEBIAN} {id} python3 -c \"{watch}\"",
        pod.group, mounts[0]
    ));
    watcher.ok();
    let second = Container::named(id);
    wait_for(&second, "[ -e /ready ]");
    assert_eq!(
        first
            .exec("cd /etc/settings; cat key; echo; readlink key; readlink ..data; stat -Lc %a:%u:%g key")
            .ok()
            .lines()
            .collect::<Vec<_>>(),
        ["one", "..data/key", "..1", "640:0:77"]
    );
    assert!(
        first
            .exec("touch /etc/settings/x")
            .stderr
            .contains("Read-only file system"),
        "the volume is read-only"
    );

    Pod::write(&source, 2, "two");
    wait_for(&first, "[ \"$(cat /etc/settings/key)\" = two ]");
    wait_for(&second, "[ \"$(cat /heard)\" = two ]");
    wait_for(
        &first,
        "[ \"$(ls -A /etc/settings | sort | tr '\\n' ' ')\" = '..2 ..data key ' ]",
    );

    // Of a volume that is gone containers have what was seen of it last, which may be half of it or nothing; a new
    // container is not made with it.
    sh(&format!("rm -rf {source}")).ok();
    first.exec("ls -A /etc/settings").ok();
    let third = ctr_run(
        &format!("--rm {} {}", pod.group, mounts[0]),
        BUSYBOX,
        &unique("t"),
        "true",
    );
    assert!(
        third.stderr.contains(&source) && third.stderr.contains("does not exist"),
        "{third:#?}"
    );
    drop((first, second));
    drop(pod);
    leaks.nothing_left();
}

#[test]
fn a_volume_that_is_too_large_for_a_copy_still_changes() {
    let pod = Pod::new();
    let source = pod.volume("configmap", "large");
    Pod::write(&source, 1, "one");
    sh(&format!("head -c 4000000 /dev/zero > {source}/zeros")).ok();
    let container = pod.start(&[bind(&source, "/large", "rbind:ro")], BUSYBOX, SLEEP);
    assert_eq!(
        container.exec("cat /large/key; wc -c < /large/zeros").ok(),
        "one4000000"
    );
    Pod::write(&source, 2, "two");
    wait_for(&container, "[ \"$(cat /large/key)\" = two ]");
}

#[test]
fn an_empty_dir_is_shared_coherently_by_the_pods_containers() {
    let pod = Pod::new();
    let source = pod.volume("empty-dir", "scratch");
    sh(&format!("chmod 2777 {source}; chgrp 77 {source}")).ok();
    let mounts = [bind(&source, "/scratch", "rbind:rw")];
    let first = pod.start(&mounts, DEBIAN, SLEEP);
    let second = pod.start(&[bind(&source, "/there", "rbind:ro")], DEBIAN, SLEEP);
    // One mmap writes, the other reads, both open all the time: only one cache of the file can do that at once.
    first.exec("head -c 4096 /dev/zero > /scratch/page").ok();
    let reader = "import mmap,os,time,sys\nm=mmap.mmap(os.open(\"/there/page\",os.O_RDONLY),4096,prot=mmap.PROT_READ)\n\
                  for i in range(200):\n if m[0:2]==b\"ok\": sys.exit(0)\n time.sleep(0.05)\nsys.exit(1)";
    let writer = "import mmap,os\nm=mmap.mmap(os.open(\"/scratch/page\",os.O_RDWR),4096)\nm[0:2]=b\"ok\"\n\
                  import time; time.sleep(5)";
    first
        .exec(&format!("python3 -c '{writer}' >/dev/null 2>&1 &"))
        .ok();
    second.exec(&format!("python3 -c '{reader}'")).ok();
    first.exec("echo hello > /scratch/file").ok();
    assert_eq!(
        second.exec("cat /there/file; stat -c %g /there/file").ok(),
        "hello\n77"
    );
    assert_ne!(second.exec("touch /there/x").status, 0);
    assert_eq!(sh(&format!("cat {source}/file")).ok(), "hello");
    // A part of it that another container mounts is the same share: one cache.
    let part = format!("{}/volume-subpaths/scratch/third/0", pod.directory);
    sh(&format!(
        "mkdir -p {source}/sub/dir {part}; mount --bind {source}/sub/dir {part}"
    ))
    .ok();
    let partial = pod.start(&[bind(&part, "/part", "rbind:rw")], BUSYBOX, SLEEP);
    partial.exec("echo one > /part/file").ok();
    assert_eq!(second.exec("cat /there/sub/dir/file").ok(), "one");
    partial.exec("echo other > /part/file").ok();
    assert_eq!(second.exec("cat /there/sub/dir/file").ok(), "other");
    // A container that comes later has the same share, and one that goes takes it from nobody.
    drop(first);
    let third = pod.start(&mounts, BUSYBOX, SLEEP);
    third.exec("echo again > /scratch/file").ok();
    assert_eq!(second.exec("cat /there/file").ok(), "again");
}

#[test]
fn an_empty_dir_in_memory_is_a_tmpfs_of_the_guests() {
    let pod = Pod::new();
    let source = pod.volume("empty-dir", "memory");
    sh(&format!("mount -t tmpfs -o size=8m,mode=1777 tmpfs {source}")).ok();
    // A subPath as kubelet makes it: a directory in the volume, bound to a place of its own.
    let sub_path = format!("{}/volume-subpaths/memory/second/0", pod.directory);
    sh(&format!(
        "mkdir -p {source}/sub {sub_path}; chmod 770 {source}/sub; chown 5:6 {source}/sub; mount --bind {source}/sub {sub_path}"
    ))
    .ok();
    let first = pod.start(&[bind(&source, "/memory", "rbind:rw")], BUSYBOX, SLEEP);
    let second = pod.start(&[bind(&sub_path, "/part", "rbind:rw")], BUSYBOX, SLEEP);
    assert_eq!(
        first
            .exec("grep ' /memory ' /proc/mounts | cut -d' ' -f3; df -k /memory | awk 'END{print $2}'; stat -c %a /memory")
            .ok()
            .lines()
            .collect::<Vec<_>>(),
        ["tmpfs", "8192", "1777"]
    );
    second.exec("echo below > /part/file").ok();
    assert_eq!(
        first
            .exec("cat /memory/sub/file; stat -c %a:%u:%g /memory/sub")
            .ok(),
        "below\n770:5:6"
    );
    let full = first.exec("dd if=/dev/zero of=/memory/full bs=64k count=140");
    assert!(full.stderr.contains("No space left"), "{full:#?}");
    assert_eq!(
        sh(&format!("ls -A {source}/sub")).ok(),
        "",
        "nothing of it is on the host"
    );
    // It outlives its containers, not its pod.
    drop(second);
    let third = pod.start(&[bind(&source, "/m", "rbind:ro")], BUSYBOX, SLEEP);
    assert_eq!(third.exec("cat /m/sub/file").ok(), "below");
    assert_ne!(third.exec("touch /m/x").status, 0);
}

#[test]
fn sub_paths_are_files_and_directories() {
    let pod = Pod::new();
    let volume = pod.volume("host-path", "data");
    let places = format!("{}/volume-subpaths/data/c", pod.directory);
    sh(&format!(
        "set -e; mkdir -p {volume}/dir {places}/0; echo file > {volume}/one; echo deep > {volume}/dir/f; touch {places}/1; \
         mount --bind {volume}/dir {places}/0; mount --bind {volume}/one {places}/1"
    ))
    .ok();
    let container = pod.start(
        &[
            bind(&format!("{places}/0"), "/dir", "rbind:rw"),
            bind(&format!("{places}/1"), "/one", "rbind:rw"),
        ],
        BUSYBOX,
        SLEEP,
    );
    assert_eq!(
        container
            .exec("cat /dir/f /one; echo x > /dir/new; echo written > /one")
            .ok(),
        "deep\nfile"
    );
    assert_eq!(
        sh(&format!("cat {volume}/dir/new {volume}/one")).ok(),
        "x\nwritten"
    );
}

#[test]
fn a_termination_message_reaches_the_host() {
    let id = unique("t");
    let outcome = sh(&format!(
        "touch /tmp/{id}; ctr run --rm --runtime {RUNTIME} {} {BUSYBOX} {id} sh -c 'echo last words > /dev/termination-log'; \
         cat /tmp/{id}; rm /tmp/{id}",
        bind(&format!("/tmp/{id}"), "/dev/termination-log", "rbind:rw")
    ));
    assert_eq!(outcome.ok(), "last words");
}

#[test]
fn a_hundred_and_twenty_mounts_and_mounts_over_mounts() {
    let leaks = LeakCheck::begin();
    let id = unique("t");
    let mut mounts = String::new();
    for number in 0..120 {
        let kind = if number % 2 == 0 { "d" } else { "f" };
        mounts += &format!(
            "{} ",
            bind(
                &format!("/tmp/{id}/{kind}{number}"),
                &format!("/m/{number}"),
                "rbind:rw"
            )
        );
    }
    // The last ones lie over and in others.
    mounts += &format!("{} ", bind(&format!("/tmp/{id}/over"), "/m/0", "rbind:ro"));
    mounts += &bind(&format!("/tmp/{id}/f1"), "/m/0/inner", "rbind:ro");
    let outcome = sh(&format!(
        "mkdir -p /tmp/{id}/over; touch /tmp/{id}/over/inner; for i in $(seq 0 119); do \
           if [ $((i % 2)) = 0 ]; then mkdir /tmp/{id}/d$i; echo $i > /tmp/{id}/d$i/n; else echo $i > /tmp/{id}/f$i; fi; done; \
         ctr run --rm --runtime {RUNTIME} {mounts} {BUSYBOX} {id} sh -c 'ls /m | wc -l; cat /m/2/n /m/119 /m/118/n /m/0/inner; ls /m/0'; \
         s=$?; rm -r /tmp/{id}; exit $s"
    ));
    assert_eq!(
        outcome.ok().split_whitespace().collect::<Vec<_>>(),
        ["120", "2", "119", "118", "1", "inner"]
    );
    leaks.nothing_left();
}

#[test]
fn read_only_mounts_are_as_deep_as_they_say() {
    let id = unique("t");
    let script = "touch /ro/x 2>/dev/null || echo refused; touch /ro/below/x && echo written; \
                  touch /rro/below/x 2>/dev/null || echo refused";
    let outcome = sh(&format!(
        "mkdir -p /tmp/{id}/below; mount -t tmpfs tmpfs /tmp/{id}/below; \
         ctr run --rm --runtime {RUNTIME} {} {} {BUSYBOX} {id} sh -c '{script}'; s=$?; umount /tmp/{id}/below; rm -r /tmp/{id}; exit $s",
        bind(&format!("/tmp/{id}"), "/ro", "rbind:ro"),
        bind(&format!("/tmp/{id}"), "/rro", "rbind:rro"),
    ));
    assert_eq!(outcome.ok(), "refused\nwritten\nrefused");
}

#[test]
fn mounts_of_the_host_appear_where_propagation_says_so() {
    let id = unique("t");
    let directory = format!("/tmp/{id}");
    sh(&format!(
        "mkdir -p {directory}/below; mount --bind {directory} {directory}; mount --make-shared {directory}"
    ))
    .ok();
    let container = Container::start(
        &format!(
            "{} {}",
            bind(&directory, "/slave", "rbind:rslave"),
            bind(&directory, "/private", "rbind:rprivate")
        ),
        BUSYBOX,
        SLEEP,
    );
    assert_eq!(container.exec("ls -A /slave/below /private/below").status, 0);
    sh(&format!(
        "mount -t tmpfs tmpfs {directory}/below; echo there > {directory}/below/file"
    ))
    .ok();
    wait_for(&container, "[ \"$(cat /slave/below/file 2>/dev/null)\" = there ]");
    assert_ne!(container.exec("cat /private/below/file").status, 0);
    container.exec("echo written > /slave/below/file").ok();
    assert_eq!(sh(&format!("cat {directory}/below/file")).ok(), "written");
    // That the container has looked at it does not keep the host from unmounting, and then it is gone from both.
    sh(&format!("umount {directory}/below")).ok();
    wait_for(&container, "[ ! -e /slave/below/file ]");
    let shared = ctr_run(
        &format!("--rm {}", bind(&directory, "/shared", "rbind:rshared")),
        BUSYBOX,
        &unique("t"),
        "true",
    );
    assert!(
        shared.stderr.contains("rshared") && shared.stderr.contains("rslave"),
        "{shared:#?}"
    );
    drop(container);
    sh(&format!("umount {directory}; rm -r {directory}")).ok();
}

// Bad input

/// GHSA-2gv2-cffp-j227: a guest's root made links on the host through a file server that could see all of it.
#[test]
fn links_and_devices_that_a_guest_plants_lead_nowhere_on_the_host() {
    let id = unique("t");
    sh(&format!("mkdir -p /tmp/{id}")).ok();
    let container = Container::start(
        &format!(
            "--privileged {}",
            bind(&format!("/tmp/{id}"), "/data", "rbind:rw")
        ),
        BUSYBOX,
        SLEEP,
    );
    container
        .exec(&format!(
            "mkdir -p /tmp /data/d; ln -s / /data/root; ln -s ../../../../../../.. /data/d/up; \
             echo x > /data/root/tmp/{id}-planted; echo x > /data/d/up/tmp/{id}-planted-too; mknod /data/disk b 254 0; mknod /data/mem c 1 1; \
             ln -s /etc/shadow /data/shadow; ln -f /data/shadow /data/shadow2"
        ))
        .ok();
    assert_eq!(
        container.exec(&format!("ls /tmp | grep -c {id}-planted")).ok(),
        "2"
    );
    assert_eq!(
        sh(&format!("ls -d /tmp/{id}-planted* 2>/dev/null")).stdout,
        "",
        "the guest has written on the host"
    );
    // Through a link a container gets its own files, never the host's.
    let shadow = container.exec("cat /data/shadow");
    assert!(
        shadow.status != 0 || !shadow.stdout.contains("root:"),
        "{shadow:#?}"
    );
    // A device node opens the guest's device of that number, if it has one.
    let vmm = sh(
        "for p in $(pgrep kata-rs-vmm); do ls -l /proc/$p/fd 2>/dev/null; done | grep -E '/dev/(sd|vd|mem)'",
    );
    assert_eq!(vmm.stdout, "", "the VMM holds a device of the host");
    drop(container);
    sh(&format!("rm -rf /tmp/{id}")).ok();
}

#[test]
fn a_hostile_layer_reaches_neither_the_host_nor_beyond_its_root() {
    let id = unique("t");
    let directory = format!("/tmp/{id}");
    // /etc leads to a directory that exists on the host, /mnt up and out, /data to itself.
    let outcome = sh(&format!(
        "set -e; mkdir -p {directory}/image {directory}/outside {directory}/volume; echo hosts > {directory}/hosts; \
         ctr images mount {BUSYBOX} {directory}/image >/dev/null; cp -a {directory}/image {directory}/rootfs; \
         ctr images unmount --rm {directory}/image >/dev/null; cd {directory}/rootfs; \
         rm -rf etc mnt data; ln -s {directory}/outside etc; ln -s ../../../../../../..{directory}/outside mnt; ln -s data data; \
         cp bin/busybox bin/suid; chmod 4755 bin/suid; mknod null c 1 3; \
         ctr run --rm --runtime {RUNTIME} {} {} --rootfs {directory}/rootfs {id} \
           /bin/sh -c 'export PATH=/bin; cat /etc/hosts; ls -d {directory}/outside/hosts {directory}/outside/deep; echo x > /etc/written; echo x > /null'; \
         ls -A {directory}/outside | wc -l",
        bind(&format!("{directory}/hosts"), "/etc/hosts", "rbind:ro"),
        bind(&format!("{directory}/volume"), "/mnt/deep", "rbind:ro"),
    ));
    assert_eq!(
        outcome.ok().lines().collect::<Vec<_>>(),
        [
            "hosts",
            &format!("{directory}/outside/deep"),
            &format!("{directory}/outside/hosts"),
            "0"
        ]
    );
    let looped = sh(&format!(
        "ctr run --rm --runtime {RUNTIME} {} --rootfs {directory}/rootfs {id}-2 /bin/true",
        bind(&format!("{directory}/volume"), "/data/x", "rbind:ro"),
    ));
    assert!(
        looped.status != 0 && looped.stderr.contains("/data/x"),
        "{looped:#?}"
    );
    sh(&format!("ctr c rm {id}-2 2>/dev/null; rm -rf {directory}")).ok();
}

/// GHSA-wwj6-vghv-5p64: the guest's own image could be written from the guest.
#[test]
fn the_guest_image_and_kernel_cannot_be_written_from_a_guest() {
    let container = Container::start("--privileged", BUSYBOX, SLEEP);
    let files = sh("p=$(pgrep -n kata-rs-vmm); ls -l /proc/$p/fd | grep -E 'vmlinux|guest.*img|initr'");
    assert_eq!(files.stdout, "", "the VMM keeps the image or kernel open");
    let disks =
        container.exec("cat /sys/block/*/size | grep -vx 0; ls -d /sys/bus/nd/devices/* 2>/dev/null; true");
    assert_eq!(disks.ok(), "", "there is a disk in a guest that was given none");
}

#[test]
fn names_with_newlines_and_ten_thousand_entries_are_names_and_entries() {
    let id = unique("t");
    let outcome = sh(&format!(
        "mkdir -p '/tmp/{id}/new\nline'; seq 10000 | (cd '/tmp/{id}/new\nline' && xargs touch); \
         ctr run --rm --runtime {RUNTIME} {} {BUSYBOX} {id} sh -c 'cd /data/new*; ls | wc -l; printf \"%s\\n\" ../new*; rm -f 1*; ls | wc -l'; \
         ls '/tmp/{id}/new\nline' | wc -l; rm -r /tmp/{id}",
        bind(&format!("/tmp/{id}"), "/data", "rbind:rw"),
    ));
    assert_eq!(
        outcome.ok().lines().collect::<Vec<_>>(),
        ["10000", "../new", "line", "8888", "8888"]
    );
}
