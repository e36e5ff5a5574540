//! What a container sees of files: mounts, devices, hidden and read-only paths.

use protocol::agent::mount::Source;
use protocol::agent::{GuestSource, KernelSource, Mount};
use serde_json::json;

use super::host::{edit, share};
use super::{container, guest_tests};

guest_tests! {
    async fn devices_and_links_are_the_standard_ones(host) {
        let script = "for d in null zero full random urandom tty; do stat -c '%n %a %t:%T' /dev/$d; done
                      for l in fd stdin stdout stderr ptmx; do echo $l $(readlink /dev/$l); done
                      head -c 4 /dev/zero | od -An -tx1; echo x > /dev/null; echo x > /dev/full";
        let output = host.run(container("c", script)).await;
        assert_eq!(
            output.stdout.lines().map(str::trim).collect::<Vec<_>>(),
            [
                "/dev/null 666 1:3", "/dev/zero 666 1:5", "/dev/full 666 1:7", "/dev/random 666 1:8",
                "/dev/urandom 666 1:9", "/dev/tty 666 5:0",
                "fd /proc/self/fd", "stdin /proc/self/fd/0", "stdout /proc/self/fd/1", "stderr /proc/self/fd/2",
                "ptmx pts/ptmx", "00 00 00 00",
            ]
        );
        assert!(output.stderr.contains("No space left"), "{}", output.stderr);
    }

    async fn devices_of_the_specification_are_made(host) {
        let mut request = container("c", "stat -c '%n %a %u %F %t:%T' /dev/net/tun");
        edit(&mut request.spec, |spec| {
            spec["linux"]["devices"] = json!([
                {"type": "c", "path": "/dev/net/tun", "major": 10, "minor": 200, "fileMode": 0o600, "uid": 1000}
            ]);
        });
        assert_eq!(host.run(request).await.stdout, "/dev/net/tun 600 1000 character special file a:c8\n");
    }

    async fn mounts_are_as_asked_and_in_order(host) {
        let image = host.directory.join("shares/image");
        std::fs::create_dir_all(image.join("volume/deep")).unwrap();
        std::fs::write(image.join("volume/deep/file"), "content").unwrap();
        let script = "grep -E ' (/dev|/proc|/sys|/data|/data/deep/file|/dev/shm|/sys/fs/cgroup) ' /proc/mounts | cut -d' ' -f2-4
                      cat /data/deep/file /new/place/file; touch /data/x; echo $? ; touch /new/y; echo $?";
        let mut request = container("c", script);
        request.mounts.extend([
            share("volume", "/data", &["rbind", "ro", "nosuid", "rprivate"]),
            share("volume/deep/file", "/new/place/file", &["bind"]),
        ]);
        let output = host.run(request).await;
        let lines: Vec<&str> = output.stdout.lines().collect();
        let find = |target: &str| {
            let line = lines.iter().find(|line| line.starts_with(&format!("{target} ")));
            line.unwrap_or_else(|| panic!("{target}: {lines:?} {}", output.stderr)).to_string()
        };
        assert!(find("/proc").contains("proc rw,nosuid,nodev,noexec,relatime"), "{lines:?}");
        assert!(find("/dev").contains("tmpfs rw,nosuid") && !find("/dev").contains("relatime"), "{lines:?}");
        assert!(find("/dev").contains("size=65536k,mode=755"));
        assert!(find("/sys").contains("sysfs ro,nosuid,nodev,noexec"));
        assert!(find("/sys/fs/cgroup").contains("cgroup2 ro"));
        assert!(find("/data").contains(" ro,nosuid"));
        assert!(output.stdout.ends_with("contentcontent1\n0\n"), "{}", output.stdout);
    }

    async fn attributes_of_a_whole_tree_can_be_set(host) {
        let mut request = container("c", "touch /data/x; echo $?; touch /data/sub/x; echo $?");
        request.rootfs = vec![
            share("", "/rootfs", &["rbind"]),
        ];
        let tmpfs = |target: &str| Mount {
            source: Some(Source::Kernel(KernelSource { file_system: "tmpfs".into(), ..Default::default() })),
            target: target.into(),
            ..Default::default()
        };
        // A tree of two file systems in the container's directory, bound into the container.
        request.rootfs.splice(..0, [tmpfs("/volume"), tmpfs("/volume/sub")]);
        let bound = |options: &[&str]| Mount {
            source: Some(Source::Guest(GuestSource { path: "volume".into(), ..Default::default() })),
            target: "/data".into(),
            options: options.iter().map(ToString::to_string).collect(),
            ..Default::default()
        };
        for (options, expected) in [(&["rbind", "ro"][..], "1\n0\n"), (&["rbind", "rro"][..], "1\n1\n"), (&["rbind"][..], "0\n0\n")] {
            let mut request = request.clone();
            request.mounts.push(bound(options));
            let output = host.run(request).await;
            assert_eq!(output.stdout, expected, "{options:?} {}", output.stderr);
        }
    }

    async fn an_overlay_is_made_of_earlier_mounts(host) {
        let (image, layer) = (host.directory.join("shares/image"), host.directory.join("shares/layer"));
        std::fs::create_dir_all(layer.join("etc")).unwrap();
        std::fs::write(layer.join("etc/added"), "from the upper layer\n").unwrap();
        let mut request = container("c", "cat /etc/added; echo changed > /etc/passwd; cat /etc/passwd; umask");
        let overlay = Mount {
            source: Some(Source::Kernel(KernelSource { file_system: "overlay".into(), ..Default::default() })),
            target: "/rootfs".into(),
            options: vec!["lowerdir=l1:l0".into(), "upperdir=rw/upper".into(), "workdir=rw/work".into()],
            ..Default::default()
        };
        let mut upper_layer = share("", "/l1", &["bind", "ro"]);
        upper_layer.mut_share().name = "layer".into();
        let scratch = Mount {
            source: Some(Source::Kernel(KernelSource { file_system: "tmpfs".into(), ..Default::default() })),
            target: "/rw".into(),
            ..Default::default()
        };
        request.rootfs = vec![share("", "/l0", &["bind", "ro"]), upper_layer, scratch, overlay];
        let output = host.run(request).await;
        assert_eq!(output.stdout, "from the upper layer\nchanged\n0022\n", "{}", output.stderr);
        assert!(std::fs::read_to_string(image.join("etc/passwd")).unwrap().starts_with("root:"));
    }

    async fn paths_are_hidden_and_protected(host) {
        let image = host.directory.join("shares/image");
        std::fs::create_dir_all(image.join("secret")).unwrap();
        std::fs::write(image.join("secret/key"), "x").unwrap();
        let script = "ls -A /secret | wc -l; wc -c < /etc/passwd; touch /secret/x; echo $?
                      echo 1 > /proc/sys/kernel/domainname; echo $?; touch /bin/x; echo $?; touch /tmp/x; echo $?";
        let mut request = container("c", script);
        edit(&mut request.spec, |spec| {
            spec["linux"]["maskedPaths"] = json!(["/secret", "/etc/passwd", "/none/such"]);
            spec["linux"]["readonlyPaths"] = json!(["/proc/sys", "/bin", "/none"]);
        });
        assert_eq!(host.run(request).await.stdout, "0\n0\n1\n1\n1\n0\n");
    }

    async fn a_read_only_root_is_one_but_not_its_mounts(host) {
        let mut request = container("c", "touch /x; echo $?; touch /dev/shm/x; echo $?");
        request.read_only_rootfs = true;
        assert_eq!(host.run(request).await.stdout, "1\n0\n");
    }

    async fn targets_never_leave_the_container(host) {
        let image = host.directory.join("shares/image");
        std::os::unix::fs::symlink("../../../../../../etc", image.join("escape")).unwrap();
        std::fs::create_dir_all(image.join("volume")).unwrap();
        let mut request = container("c", "test -d /etc/kata-rs-escape && echo inside");
        request.mounts.push(share("volume", "/escape/kata-rs-escape", &["bind"]));
        assert_eq!(host.run(request).await.stdout, "inside\n");
        assert!(!std::path::Path::new("/etc/kata-rs-escape").exists());
    }
}
