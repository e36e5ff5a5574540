//! Plans as data: a specification and a host that exists only here go in, and what comes out is compared.

mod volumes;

use std::io;
use std::path::Path;

use super::*;

/// A host with a few paths of each kind.
fn host(path: &Path) -> io::Result<SourceInfo> {
    use FileKind::{BlockDevice, CharDevice, Directory, Fifo, File, Socket};
    let ordinary = |kind| Ok((kind, FileSystem::Ordinary));
    let tmpfs = |kind| Ok((kind, FileSystem::Tmpfs { bytes: 64 << 20 }));
    let (kind, file_system) = match path.to_str().unwrap() {
        "/data" | "/tree-of-mounts" | "/bundle/rootfs" | "/bundle/sub" | "/snap/1/fs" => ordinary(Directory),
        "/etc/hosts" | "/etc/resolv.conf" | "/bundle/hosts" => ordinary(File),
        "/run/shm" | "/dev" => tmpfs(Directory),
        "/k/pods/1/volumes/kubernetes.io~empty-dir/mem"
        | "/k/pods/1/volumes/kubernetes.io~empty-dir/disk"
        | "/k/pods/1/volumes/kubernetes.io~empty-dir/disk/a/b"
        | "/k/pods/1/volumes/kubernetes.io~secret/s"
        | "/k/pods/1/volume-subpaths/mem/c/0"
        | "/k/pods/1/volume-subpaths/disk/c/0" => tmpfs(Directory),
        "/run/docker.sock" => tmpfs(Socket),
        "/run/pipe" => tmpfs(Fifo),
        "/dev/fuse" | "/dev/ttyS0" => tmpfs(CharDevice),
        "/dev/sda" => tmpfs(BlockDevice),
        "/k/pods/1/volumes/kubernetes.io~empty-dir/huge" => {
            Ok((Directory, FileSystem::Huge { page_bytes: 2 << 20 }))
        }
        "/proc" | "/proc/sys" => Ok((Directory, FileSystem::Kernel("proc"))),
        "/sys" => Ok((Directory, FileSystem::Kernel("sysfs"))),
        "/sys/fs/cgroup" | "/sys/fs/cgroup/x" => Ok((Directory, FileSystem::Cgroup)),
        _ => Err(io::Error::from_raw_os_error(libc::ENOENT)),
    }?;
    // A directory in an emptyDir, and the bind mount of it.
    let inode = match path.to_str().unwrap() {
        "/k/pods/1/volume-subpaths/disk/c/0" | "/k/pods/1/volumes/kubernetes.io~empty-dir/disk/a/b" => 1000,
        other => other.len() as u64,
    };
    let shows = match path.to_str().unwrap() {
        "/k/pods/1/volume-subpaths/mem/c/0" => Some("/sub/dir".into()),
        "/k/pods/1/volume-subpaths/disk/c/0" => {
            Some("/lib/k/pods/1/volumes/kubernetes.io~empty-dir/disk/a/b".into())
        }
        _ => None,
    };
    Ok(SourceInfo {
        kind,
        file_system,
        place: Place {
            device: 8,
            inode,
            mount: 1,
        },
        owner: Owner {
            uid: 0,
            gid: 7,
            mode: 0o2777,
        },
        number: if kind == FileKind::BlockDevice {
            (8, 0)
        } else {
            (0, 0)
        },
        mount_root: path.ends_with("mem"),
        shows,
        below: if path.ends_with("tree-of-mounts") { 3 } else { 0 },
    })
}

/// Where this host's paths are.
fn place(path: &str) -> Place {
    host(Path::new(path)).unwrap().place
}

fn context() -> Context<'static> {
    Context {
        container_id: "c1",
        bundle: Path::new("/bundle"),
        pod_shm: None,
    }
}

fn spec(members: &str) -> Spec {
    serde_json::from_str(&format!(r#"{{"ociVersion":"1.2.0"{members}}}"#)).unwrap()
}

pub(super) fn rootfs(kind: &str, source: &str, options: &str) -> RootfsMount {
    RootfsMount {
        kind: kind.into(),
        source: source.into(),
        target: String::new(),
        options: words(options),
    }
}

fn words(options: &str) -> Vec<String> {
    options.split_whitespace().map(str::to_owned).collect()
}

pub(super) fn planned(rootfs: &[RootfsMount]) -> Result<Plan, StorageError> {
    Plan::new(context(), &spec(""), rootfs, &host)
}

/// The plan of a container with these mounts, without its root file system.
fn mounts(json: &str) -> Result<(Vec<HostStep>, Vec<GuestMount>), StorageError> {
    mounts_in(context(), json)
}

fn mounts_in(context: Context<'_>, json: &str) -> Result<(Vec<HostStep>, Vec<GuestMount>), StorageError> {
    let spec = spec(&format!(r#","root":{{"path":"rootfs"}},"mounts":[{json}]"#));
    let mut plan = Plan::new(context, &spec, &[], &host)?;
    plan.host.remove(0);
    Ok((plan.host, plan.mounts))
}

fn refused(json: &str) -> String {
    mounts(json).unwrap_err().to_string()
}

fn share(name: &str, path: &str) -> MountSource {
    MountSource::Share {
        name: name.into(),
        path: path.into(),
    }
}

pub(super) fn kernel(file_system: &str) -> MountSource {
    MountSource::Kernel {
        file_system: file_system.into(),
    }
}

pub(super) fn guest(source: MountSource, target: &str, options: &str) -> GuestMount {
    GuestMount {
        source,
        target: target.into(),
        options: words(options),
        directories: Vec::new(),
    }
}

#[test]
fn an_overlay_is_mounted_on_the_host_and_shared() {
    let plan = planned(&[rootfs(
        "overlay",
        "overlay",
        r"index=off workdir=/snap/2/work upperdir=/snap/2/fs lowerdir=/snap/1/fs:/with\:colon volatile",
    )])
    .unwrap();
    let overlay = Overlay {
        lower: vec!["/snap/1/fs".into(), "/with:colon".into()],
        upper: Some(("/snap/2/fs".into(), "/snap/2/work".into())),
        options: words("index=off volatile"),
        read_only: false,
    };
    assert_eq!(
        plan.host,
        [HostStep::Overlay {
            share: "c1.rootfs".into(),
            overlay
        }]
    );
    assert_eq!(plan.rootfs, [guest(share("c1.rootfs", ""), "/rootfs", "rbind")]);
    assert!(!plan.read_only_rootfs);
}

#[test]
fn an_overlay_without_upper_directory_is_a_view() {
    let plan = planned(&[rootfs("overlay", "overlay", "ro lowerdir=/b:/a")]).unwrap();
    let HostStep::Overlay { overlay, .. } = &plan.host[0] else {
        panic!("{plan:?}");
    };
    assert!(overlay.read_only && overlay.upper.is_none());
    assert_eq!(plan.rootfs[0].options, words("rbind ro"));
}

#[test]
fn an_overlay_that_contradicts_itself_is_refused() {
    for (options, expected) in [
        ("upperdir=/u workdir=/w", "\"lowerdir\""),
        ("lowerdir=/l upperdir=/u", "\"workdir\""),
        ("lowerdir=/l workdir=/w", "\"upperdir\""),
        ("lowerdir=/l::/data", "\"lowerdir=/l::/data\""),
        (r"lowerdir=/l\", "lowerdir=/l"),
        ("lowerdir={{mount:0}}", "has nothing to fill in or to make"),
        (
            "X-containerd.mkdir.path=/u lowerdir=/l",
            "has nothing to fill in or to make",
        ),
    ] {
        let error = planned(&[rootfs("overlay", "overlay", options)])
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "{options}: {error}");
    }
}

#[test]
fn a_bind_is_shared_as_deep_and_as_writable_as_it_is() {
    let plan = |options| planned(&[rootfs("bind", "/snap/1/fs", options)]).unwrap();
    let step = |recursive, read_only| HostStep::Directory {
        share: "c1.rootfs".into(),
        source: "/snap/1/fs".into(),
        recursive,
        read_only,
        receive_mounts: false,
        cache: CachePolicy::Exclusive,
        place: None,
        pooled: false,
    };
    assert_eq!(plan("rbind rw").host, [step(true, ReadOnly::No)]);
    assert_eq!(plan("bind ro").host, [step(false, ReadOnly::Recursive)]);
    assert_eq!(plan("bind ro").rootfs[0].options, words("rbind ro"));
    let error = planned(&[rootfs("bind", "/etc/hosts", "rbind")]).unwrap_err();
    assert!(matches!(error, StorageError::Kind { .. }), "{error}");
    let error = planned(&[rootfs("bind", "/gone", "rbind")]).unwrap_err();
    assert!(matches!(error, StorageError::Missing { .. }), "{error}");
}

#[test]
fn a_block_device_or_image_is_attached() {
    let plan = planned(&[rootfs("xfs", "/dev/mapper/pool-snap-1", "nouuid discard")]).unwrap();
    let step = |source: &str, read_only, kind: &str| HostStep::Disk {
        parts: vec![DiskPart {
            source: source.into(),
            read_only,
            content: Content::FileSystem(kind.into()),
        }],
    };
    assert_eq!(plan.host, [step("/dev/mapper/pool-snap-1", false, "xfs")]);
    let block = |file_system: &str| MountSource::Block {
        disk: 0,
        part: 0,
        file_system: file_system.into(),
        devices: Vec::new(),
    };
    assert_eq!(plan.rootfs, [guest(block("xfs"), "/rootfs", "nouuid discard")]);
    let disk = DiskName {
        serial: "serial-7".into(),
        parts: vec![(0, 1 << 20)],
    };
    let [mount] = &plan.agent_rootfs(&[disk])[..] else {
        panic!("one mount");
    };
    assert!(mount.block().part.is_none(), "the whole disk");
    assert_eq!(mount.block().serial, "serial-7");
    assert_eq!(mount.block().file_system, "xfs");

    let plan = planned(&[rootfs("ext4", "/images/1", "loop ro x-comment=1 noatime")]).unwrap();
    assert_eq!(plan.host, [step("/images/1", true, "ext4")]);
    assert_eq!(plan.rootfs, [guest(block("ext4"), "/rootfs", "noatime ro")]);
    assert_eq!(
        planned(&[rootfs("erofs", "/l.erofs", "loop")]).unwrap().host,
        [step("/l.erofs", true, "erofs")]
    );
    for (kind, option) in [("erofs", "offset=512"), ("ext4", "device=/x.erofs")] {
        let error = planned(&[rootfs(kind, "/l.erofs", option)])
            .unwrap_err()
            .to_string();
        assert!(error.contains(option), "{error}");
    }
}

#[test]
fn without_mounts_the_root_path_is_shared() {
    let plan = |root| Plan::new(context(), &spec(root), &[], &host);
    let found = plan(r#","root":{"path":"rootfs","readonly":true}"#).unwrap();
    assert!(found.read_only_rootfs);
    let [
        HostStep::Directory {
            source,
            recursive: true,
            cache,
            ..
        },
    ] = &found.host[..]
    else {
        panic!("{found:?}");
    };
    assert_eq!(
        (source.as_path(), *cache),
        (Path::new("/bundle/rootfs"), CachePolicy::Shared)
    );
    assert!(matches!(plan(""), Err(StorageError::NoRootfs)));
    assert!(matches!(
        plan(r#","root":{"path":""}"#),
        Err(StorageError::NoRootfs)
    ));
    let error = plan(r#","root":{"path":"/gone"}"#).unwrap_err();
    assert_eq!(error.to_string(), "the root file system /gone does not exist");
}

#[test]
fn forms_of_root_file_systems_that_are_not_supported_are_named() {
    let of = |mounts: &[RootfsMount]| planned(mounts).unwrap_err().to_string();
    assert!(of(&[rootfs("btrfs", "/dev/x", "")]).contains("\"btrfs\" is not supported: use a snapshotter"));
    let inside = RootfsMount {
        target: "/var".into(),
        ..rootfs("bind", "/data", "rbind")
    };
    assert!(of(&[inside]).contains("\"/var\""));
}

#[test]
fn a_container_id_must_be_fit_for_a_file_name() {
    for id in ["", ".x", "../x", "a/b", "a b", "\0", &"x".repeat(201)] {
        let context = Context {
            container_id: id,
            ..context()
        };
        let error = mounts_in(context, "").unwrap_err();
        assert!(matches!(error, StorageError::ContainerId(_)), "{id}: {error}");
    }
}

#[test]
fn kernel_file_systems_are_the_guests_own_and_keep_order_and_options() {
    let (steps, mounts) = mounts(
        r#"{"destination":"/proc","type":"proc","source":"proc","options":["nosuid","noexec"]},
           {"destination":"/dev","type":"tmpfs","source":"tmpfs","options":["nosuid","mode=755","size=65536k"]},
           {"destination":"/dev/pts","type":"devpts","options":["newinstance","gid=5"]},
           {"destination":"/dev/shm","type":"tmpfs","source":"shm","options":["mode=1777","size=65536k"]},
           {"destination":"dev/mqueue","type":"mqueue","source":"mqueue"},
           {"destination":"/sys","type":"sysfs","options":["ro"]},
           {"destination":"/sys/fs/cgroup","type":"cgroup","options":["ro","x-comment"]}"#,
    )
    .unwrap();
    assert_eq!(steps, []);
    assert_eq!(
        mounts,
        [
            guest(kernel("proc"), "/proc", "nosuid noexec"),
            guest(kernel("tmpfs"), "/dev", "nosuid mode=755 size=65536k"),
            guest(kernel("devpts"), "/dev/pts", "newinstance gid=5"),
            guest(kernel("tmpfs"), "/dev/shm", "mode=1777 size=65536k"),
            guest(kernel("mqueue"), "/dev/mqueue", ""),
            guest(kernel("sysfs"), "/sys", "ro"),
            guest(kernel("cgroup2"), "/sys/fs/cgroup", "ro"),
        ]
    );
}

#[test]
fn directories_are_shared_each_and_files_together() {
    let (steps, mounts) = mounts(
        r#"{"destination":"/etc/hosts","type":"bind","source":"/etc/hosts","options":["rbind","ro"]},
           {"destination":"/data","type":"bind","source":"/data/.","options":["rbind","rslave","rro","nosuid"]},
           {"destination":"/sub","source":"sub","options":["bind","ro"]},
           {"destination":"/etc/resolv.conf","type":"bind","source":"/etc/resolv.conf"}"#,
    )
    .unwrap();
    let directory = |share: &str, source: &str, recursive, read_only, receive_mounts| HostStep::Directory {
        share: share.into(),
        source: source.into(),
        recursive,
        read_only,
        receive_mounts,
        cache: CachePolicy::Shared,
        place: Some(place(source)),
        pooled: true,
    };
    let file = |source: &str, read_only| FileBind {
        source: source.into(),
        place: place(source),
        read_only,
    };
    assert_eq!(
        steps,
        [
            directory("@8.5.1.0.rrs", "/data", true, ReadOnly::Recursive, true),
            directory("@8.b.1.0.r", "/bundle/sub", false, ReadOnly::Top, false),
            HostStep::Files {
                share: "c1.files".into(),
                files: vec![file("/etc/hosts", true), file("/etc/resolv.conf", false)],
            },
        ]
    );
    assert_eq!(
        mounts,
        [
            guest(share("c1.files", "0"), "/etc/hosts", "rbind ro"),
            guest(share("@8.5.1.0.rrs", ""), "/data", "rbind rslave rro nosuid"),
            guest(share("@8.b.1.0.r", ""), "/sub", "bind ro"),
            guest(share("c1.files", "1"), "/etc/resolv.conf", "bind"),
        ]
    );
}

#[test]
fn what_is_mounted_in_a_directory_that_is_read_only_itself_stays_writable() {
    let (steps, mounts) = mounts(
        r#"{"destination":"/top","source":"/tree-of-mounts","options":["rbind","ro"]},
           {"destination":"/all","source":"/tree-of-mounts","options":["rbind","rro"]},
           {"destination":"/alone","source":"/tree-of-mounts","options":["bind","ro"]}"#,
    )
    .unwrap();
    let depth = |step: &HostStep| match step {
        HostStep::Directory { read_only, .. } => *read_only,
        other => panic!("{other:?}"),
    };
    let depths: Vec<ReadOnly> = steps.iter().map(depth).collect();
    assert_eq!(depths, [ReadOnly::Top, ReadOnly::Recursive, ReadOnly::Top]);
    assert_eq!(
        mounts,
        [
            guest(share("@8.f.1.3.rw", ""), "/top", "rbind"),
            guest(share("@8.f.1.3.rr", ""), "/all", "rbind rro"),
            guest(share("@8.f.1.0.r", ""), "/alone", "bind ro"),
        ]
    );
}

#[test]
fn an_overlay_among_the_mounts_is_mounted_on_the_host() {
    let (steps, mounts) = mounts(
        r#"{"destination":"/v","type":"overlay","source":"overlay",
            "options":["lowerdir=/data","upperdir=/u","workdir=/w","nosuid","private"]}"#,
    )
    .unwrap();
    assert!(
        matches!(&steps[..], [HostStep::Overlay { share, .. }] if share == "c1.1"),
        "{steps:?}"
    );
    assert_eq!(mounts, [guest(share("c1.1", ""), "/v", "rbind nosuid private")]);
}

#[test]
fn what_shows_the_hosts_kernel_becomes_the_guests_own() {
    let bind = |source: &str, destination: &str| {
        let json = format!(
            r#"{{"destination":"{destination}","type":"bind","source":"{source}","options":["rbind","rprivate","rro"]}}"#
        );
        let (steps, mut mounts) = mounts(&json).unwrap();
        assert_eq!(steps, [], "{source}");
        mounts.remove(0)
    };
    let own = |path: &str| MountSource::Guest { path: path.into() };
    assert_eq!(
        bind("/proc", "/host/proc"),
        guest(kernel("proc"), "/host/proc", "rprivate ro")
    );
    assert_eq!(
        bind("/sys", "/sys"),
        guest(kernel("sysfs"), "/sys", "rprivate ro")
    );
    assert_eq!(
        bind("/sys/fs/cgroup/x", "/sys/fs/cgroup"),
        guest(kernel("cgroup2"), "/sys/fs/cgroup", "rprivate ro")
    );
    assert_eq!(
        bind("/dev", "/dev"),
        guest(own("/dev"), "/dev", "rbind rprivate rro")
    );
    assert_eq!(
        bind("/dev/fuse", "/dev/fuse"),
        guest(own("/dev/fuse"), "/dev/fuse", "rbind rprivate rro")
    );
}

#[test]
fn shared_memory_is_the_guests_own_or_the_pods() {
    let json =
        r#"{"destination":"/dev/shm","type":"bind","source":"/run/shm","options":["rbind","ro","noexec"]}"#;
    let (steps, alone) = mounts(json).unwrap();
    assert_eq!(steps, []);
    assert_eq!(
        alone,
        [guest(
            kernel("tmpfs"),
            "/dev/shm",
            "ro noexec mode=1777 size=67108864"
        )]
    );
    let context = Context {
        pod_shm: Some("/run/pod/shm"),
        ..context()
    };
    let own = MountSource::Guest {
        path: "/run/pod/shm".into(),
    };
    let (steps, in_pod) = mounts_in(context, json).unwrap();
    assert_eq!(steps, []);
    assert_eq!(in_pod, [guest(own.clone(), "/dev/shm", "rbind ro noexec")]);
    let tmpfs = r#"{"destination":"/dev/shm","type":"tmpfs","source":"shm","options":["nosuid","mode=1777","size=65536k"]}"#;
    let (_, in_pod) = mounts_in(context, tmpfs).unwrap();
    assert_eq!(in_pod, [guest(own, "/dev/shm", "bind nosuid")]);
    let (_, alone) = mounts(tmpfs).unwrap();
    assert_eq!(
        alone,
        [guest(kernel("tmpfs"), "/dev/shm", "nosuid mode=1777 size=65536k")]
    );
    // Elsewhere a tmpfs is a directory like any other.
    let (steps, _) = mounts(r#"{"destination":"/x","type":"bind","source":"/run/shm"}"#).unwrap();
    assert_eq!(steps.len(), 1);
}

#[test]
fn what_a_virtual_machine_cannot_have_is_refused_by_name() {
    let bind = |source: &str| {
        refused(&format!(
            r#"{{"destination":"/x","type":"bind","source":"{source}"}}"#
        ))
    };
    for (source, expected) in [
        ("/run/docker.sock", "a socket cannot be shared"),
        ("/run/pipe", "a named pipe cannot be shared"),
        ("/dev/ttyS0", "devices of the host cannot be shared"),
        ("/proc/sys", "it belongs to the host's kernel"),
        ("/gone", "does not exist"),
    ] {
        let error = bind(source);
        assert!(error.contains(source) && error.contains(expected), "{error}");
    }
    for (json, expected) in [
        (
            r#"{"destination":"/x","type":"bind"}"#,
            "bind mount on /x has no source",
        ),
        (
            r#"{"destination":"/x","type":"nfs","source":"h:/x"}"#,
            "has the type \"nfs\"",
        ),
        (r#"{"destination":"/x","source":"/data"}"#, "has the type \"\""),
        (
            r#"{"destination":"/","type":"tmpfs"}"#,
            "destination \"/\" is not valid",
        ),
        (
            r#"{"destination":"/a/../b","type":"tmpfs"}"#,
            "destination \"/a/../b\" is not valid",
        ),
        (
            r#"{"destination":"/x","type":"bind","source":"/data","options":["rbind","rshared"]}"#,
            "the mount on /x is rshared",
        ),
        (
            r#"{"destination":"/x","type":"bind","source":"/data","options":["rbind","idmap"]}"#,
            "the mount on /x maps ids",
        ),
        (
            r#"{"destination":"/x","type":"bind","source":"/data",
                "uidMappings":[{"containerID":0,"hostID":1000,"size":1}]}"#,
            "the mount on /x maps ids",
        ),
    ] {
        let error = refused(json);
        assert!(error.contains(expected), "{error}");
    }
}
