//! Lists of mounts as containerd's erofs snapshotter gives them (2.3, plugins/snapshots/erofs), and broken ones.

use super::plan_tests::{guest, kernel, planned, rootfs};
use super::*;

fn erofs(snapshot: u32) -> RootfsMount {
    rootfs("erofs", &layer_path(snapshot), "ro loop")
}

fn layer_path(snapshot: u32) -> String {
    format!("/c/snapshots/{snapshot}/layer.erofs")
}

fn rwlayer() -> RootfsMount {
    rootfs(
        "mkfs/ext4",
        "/c/snapshots/9/rwlayer.img",
        "X-containerd.mkfs.fs=ext4 X-containerd.mkfs.size=67108864 rw loop",
    )
}

fn with_options(kind: &str, source: &str, options: &[&str]) -> RootfsMount {
    RootfsMount {
        options: options.iter().map(|option| (*option).to_owned()).collect(),
        ..rootfs(kind, source, "")
    }
}

fn layer_part(snapshot: u32) -> DiskPart {
    DiskPart {
        source: layer_path(snapshot).into(),
        read_only: true,
        content: Content::FileSystem("erofs".into()),
    }
}

fn rw_part() -> DiskPart {
    DiskPart {
        source: "/c/snapshots/9/rwlayer.img".into(),
        read_only: false,
        content: Content::Made(NewImage {
            bytes: 64 << 20,
            uuid: None,
        }),
    }
}

fn block(part: usize, file_system: &str, devices: &[usize]) -> MountSource {
    MountSource::Block {
        disk: 0,
        part,
        file_system: file_system.into(),
        devices: devices.to_vec(),
    }
}

fn inner(path: &str) -> MountSource {
    MountSource::Guest { path: path.into() }
}

fn made(path: &str) -> Directory {
    Directory {
        path: path.into(),
        owner: Owner {
            uid: 0,
            gid: 0,
            mode: 0o755,
        },
    }
}

#[test]
fn a_writable_layer_and_many_layers_are_one_disk() {
    let overlay = with_options(
        "format/mkdir/overlay",
        "overlay",
        &[
            "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
            "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
            "workdir={{ mount 0 }}/work",
            "upperdir={{ mount 0 }}/upper",
            "lowerdir={{ overlay 1 3 }}",
            "index=off",
        ],
    );
    let plan = planned(&[rwlayer(), erofs(3), erofs(2), erofs(1), overlay]).unwrap();
    assert_eq!(
        plan.host,
        [HostStep::Disk {
            parts: vec![rw_part(), layer_part(3), layer_part(2), layer_part(1)]
        }]
    );
    let mut last = guest(
        kernel("overlay"),
        "/rootfs",
        "lowerdir=m1:m2:m3 upperdir=m0/upper workdir=m0/work index=off",
    );
    last.directories = vec![made("m0/upper"), made("m0/work")];
    assert_eq!(
        plan.rootfs,
        [
            guest(block(0, "ext4", &[]), "/m0", ""),
            guest(block(1, "erofs", &[]), "/m1", "ro"),
            guest(block(2, "erofs", &[]), "/m2", "ro"),
            guest(block(3, "erofs", &[]), "/m3", "ro"),
            last,
        ]
    );
    let disk = DiskName {
        serial: "s".into(),
        parts: vec![
            (0, 64 << 20),
            (64 << 20, 8192),
            ((64 << 20) + 8192, 4096),
            (1 << 30, 4096),
        ],
    };
    let mounts = plan.agent_rootfs(&[disk]);
    let block = mounts[2].block();
    assert_eq!(
        (block.serial.as_str(), block.part.offset, block.part.length),
        ("s", (64 << 20) + 8192, 4096)
    );
    assert_eq!(mounts[4].directories[1].path, "m0/work");
}

#[test]
fn directories_of_the_host_for_what_is_written_become_a_tmpfs() {
    let overlay = with_options(
        "format/mkdir/overlay",
        "overlay",
        &[
            "workdir=/c/snapshots/9/work",
            "upperdir=/c/snapshots/9/fs",
            "lowerdir={{ mount 0 }}",
        ],
    );
    let plan = planned(&[erofs(1), overlay]).unwrap();
    assert_eq!(
        plan.host,
        [
            HostStep::Unseen {
                directory: "/c/snapshots/9/fs".into()
            },
            HostStep::Disk {
                parts: vec![layer_part(1)]
            },
        ]
    );
    assert_eq!(
        plan.rootfs,
        [
            guest(block(0, "erofs", &[]), "/m0", "ro"),
            guest(kernel("tmpfs"), "/writable", "mode=0755"),
            guest(
                kernel("overlay"),
                "/rootfs",
                "lowerdir=m0 upperdir=writable/upper workdir=writable/work"
            ),
        ]
    );
}

#[test]
fn views_and_images_without_layers_are_mounted_as_they_are() {
    // A view of one layer, of several, and of one with merged metadata.
    let plan = planned(&[erofs(1)]).unwrap();
    assert_eq!(plan.rootfs, [guest(block(0, "erofs", &[]), "/rootfs", "ro")]);
    let overlay = with_options("format/mkdir/overlay", "overlay", &["lowerdir={{ overlay 0 1 }}"]);
    let plan = planned(&[erofs(2), erofs(1), overlay]).unwrap();
    assert_eq!(
        plan.rootfs[2],
        guest(kernel("overlay"), "/rootfs", "lowerdir=m0:m1")
    );
    let bind = with_options("format/bind", "{{ mount 0 }}", &["ro", "rbind"]);
    let plan = planned(&[erofs(1), bind]).unwrap();
    assert_eq!(plan.rootfs[1], guest(inner("m0"), "/rootfs", "ro rbind"));
    // An image without layers.
    let bind = with_options(
        "format/mkdir/bind",
        "{{ mount 0 }}/upper",
        &["X-containerd.mkdir.path={{ mount 0 }}/upper:0755", "rw", "rbind"],
    );
    let plan = planned(&[rwlayer(), bind]).unwrap();
    let mut last = guest(inner("m0/upper"), "/rootfs", "rw rbind");
    last.directories = vec![made("m0/upper")];
    assert_eq!(plan.rootfs[1], last);
}

#[test]
fn merged_metadata_has_the_layers_as_its_devices() {
    let path = "/c/snapshots/2/fsmeta.erofs";
    let options = [
        "ro",
        "loop",
        "device=/c/snapshots/1/layer.erofs",
        "device=/c s/2:x/layer.erofs",
    ];
    let overlay = with_options(
        "format/mkdir/overlay",
        "overlay",
        &["workdir=/w", "upperdir=/u", "lowerdir={{ overlay 0 1 }}"],
    );
    let plan = planned(&[erofs(3), with_options("erofs", path, &options), overlay]).unwrap();
    let metadata = DiskPart {
        source: path.into(),
        ..layer_part(0)
    };
    assert_eq!(
        plan.host[1],
        HostStep::Disk {
            parts: vec![
                layer_part(3),
                metadata,
                DiskPart::any("/c/snapshots/1/layer.erofs", true),
                DiskPart::any("/c s/2:x/layer.erofs", true),
            ]
        }
    );
    assert_eq!(plan.rootfs[1], guest(block(1, "erofs", &[2, 3]), "/m1", "ro"));
    let disk = DiskName {
        serial: "s".into(),
        parts: vec![(0, 4096), (4096, 4096), (8192, 512), (12288, 1024)],
    };
    let mounts = plan.agent_rootfs(&[disk]);
    let devices: Vec<_> = mounts[1]
        .block()
        .devices
        .iter()
        .map(|part| (part.offset, part.length))
        .collect();
    assert_eq!(devices, [(8192, 512), (12288, 1024)]);
    assert!(mounts[1].options.iter().all(|word| !word.starts_with("device")));
}

#[test]
fn a_hundred_layers_are_planned_and_too_many_refused() {
    let list = |count: u32| {
        let mut list: Vec<_> = (0..count).map(erofs).collect();
        let lower = format!("lowerdir={{{{ overlay 0 {} }}}}", count - 1);
        list.push(with_options(
            "format/overlay",
            "overlay",
            &[&lower, "upperdir=/u", "workdir=/w"],
        ));
        planned(&list)
    };
    let plan = list(100).unwrap();
    assert_eq!(plan.rootfs.len(), 102);
    assert!(plan.rootfs[101].options[0].ends_with(":m98:m99"));
    let error = list(129).unwrap_err();
    assert!(matches!(error, StorageError::TooManyLayers(129)), "{error}");
}

#[test]
fn broken_lists_are_refused_and_say_what_is_wrong() {
    let overlay = |options: &[&str]| with_options("format/mkdir/overlay", "overlay", options);
    let mkfs = |options: &[&str]| with_options("mkfs/ext4", "/rw", options);
    for (list, expected) in [
        // Indexes of nothing, of itself, of what comes later.
        (vec![overlay(&["lowerdir={{ mount 0 }}"])], "it is the first"),
        (
            vec![erofs(1), overlay(&["lowerdir={{ overlay 0 1 }}"])],
            "they are 0 to 0",
        ),
        (
            vec![with_options("format/bind", "{{ mount 1 }}", &[]), erofs(1)],
            "\"{{ mount 1 }}\"",
        ),
        // Templates where the type has none.
        (
            vec![
                erofs(1),
                with_options("overlay", "overlay", &["lowerdir={{ mount 0 }}"]),
            ],
            "does not begin with `format/`",
        ),
        // Directories of the host among those of the guest, and the other way round.
        (
            vec![erofs(1), overlay(&["lowerdir={{ mount 0 }}:/etc"])],
            "\"/etc\"",
        ),
        (
            vec![erofs(1), overlay(&["lowerdir=m0/../../m0"])],
            "\"m0/../../m0\"",
        ),
        (vec![erofs(1), overlay(&["lowerdir=m1"])], "\"m1\""),
        (
            vec![
                rwlayer(),
                erofs(1),
                overlay(&["lowerdir=m1", "upperdir=m0/u", "workdir=/w"]),
            ],
            "both on the host",
        ),
        (
            vec![erofs(1), with_options("format/bind", "/etc", &["rbind"])],
            "\"/etc\"",
        ),
        // Directories to be made.
        (
            vec![
                erofs(1),
                overlay(&["X-containerd.mkdir.path=/etc/x:0755", "lowerdir=m0"]),
            ],
            "mkdir.path=/etc/x",
        ),
        (
            vec![
                rwlayer(),
                overlay(&["X-containerd.mkdir.path=m0/../x", "lowerdir=m0"]),
            ],
            "mkdir.path=m0/../x",
        ),
        (
            vec![
                rwlayer(),
                overlay(&["X-containerd.mkdir.path=m0/x:9", "lowerdir=m0"]),
            ],
            "not one in octal",
        ),
        (
            vec![
                rwlayer(),
                overlay(&["X-containerd.mkdir.path=m0/x:0755:1", "lowerdir=m0"]),
            ],
            "path[:mode[:uid:gid]]",
        ),
        (
            vec![
                rwlayer(),
                overlay(&["X-containerd.mkdir.mode=0755", "lowerdir=m0"]),
            ],
            "mkdir.mode",
        ),
        // Images to be made.
        (vec![mkfs(&["X-containerd.mkfs.fs=ext4"])], "mkfs.size"),
        (vec![mkfs(&["X-containerd.mkfs.size=10x"])], "not a size"),
        (vec![mkfs(&["X-containerd.mkfs.size=99999999999T"])], "not a size"),
        (
            vec![mkfs(&["X-containerd.mkfs.size=1g", "X-containerd.mkfs.fs=xfs"])],
            "only ext4",
        ),
        (
            vec![with_options("mkfs/xfs", "/rw", &["X-containerd.mkfs.size=1g"])],
            "only ext4",
        ),
        (
            vec![with_options("ext4", "/rw", &["X-containerd.mkfs.size=1g"])],
            "not known for a mount of this type",
        ),
        // What only the host could do.
        (
            vec![with_options(
                "erofs",
                "/l",
                &["ro", "X-containerd.dmverity=/l.dmverity"],
            )],
            "dmverity_mode",
        ),
        (
            vec![erofs(1), overlay(&["lowerdir=m0", "uidmap=0:1000:65536"])],
            "uidmap=0:1000:65536",
        ),
        (vec![erofs(1), with_options("nfs", "x:/", &[])], "\"nfs\""),
        (vec![with_options("zip/erofs", "/l", &[])], "\"zip/erofs\""),
    ] {
        let error = planned(&list).unwrap_err().to_string();
        assert!(error.contains(expected), "{list:?}: {error}");
    }
    let inside = RootfsMount {
        target: "/usr".into(),
        ..erofs(1)
    };
    assert!(matches!(
        planned(&[erofs(2), inside]),
        Err(StorageError::RootfsTarget(_))
    ));
}

#[test]
fn sizes_of_images_are_read_as_containerd_reads_them() {
    for (text, bytes) in [
        ("67108864", 64 << 20),
        ("64m", 64 << 20),
        ("64MiB", 64 << 20),
        ("10GB", 10 << 30),
        ("1 t", 1 << 40),
        ("512b", 512),
    ] {
        let size = format!("X-containerd.mkfs.size={text}");
        let plan = planned(&[with_options("mkfs/ext4", "/rw", &[&size])]).unwrap();
        let HostStep::Disk { parts } = &plan.host[0] else {
            panic!("{plan:?}");
        };
        assert_eq!(
            parts[0].content,
            Content::Made(NewImage { bytes, uuid: None }),
            "{text}"
        );
    }
}
