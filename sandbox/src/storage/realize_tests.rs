//! Real mounts of this kernel's. They need root; without it they say so and prove nothing.

use std::fs;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};

use super::*;

/// Mounting takes CAP_SYS_ADMIN.
macro_rules! needs_root {
    () => {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: this test mounts, which only root may do");
            return;
        }
    };
}

/// A directory on a file system of its own: overlayfs takes no upper directory on another overlay, as containers
/// have it.
struct Directory {
    path: PathBuf,
}

impl Directory {
    fn new() -> Self {
        let path = tempfile::tempdir().unwrap().keep();
        rustix::mount::mount("tmpfs", &path, "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
        Self { path }
    }

    fn make(&self, name: &str) -> PathBuf {
        let path = self.path.join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.path, rustix::mount::UnmountFlags::DETACH);
        let _ = fs::remove_dir(&self.path);
    }
}

/// A path under a share's root.
fn inside(share: &Share, name: &str) -> PathBuf {
    Path::new(&format!("/proc/self/fd/{}", share.fd.as_raw_fd())).join(name)
}

fn realized(step: HostStep) -> Result<Attachments, StorageError> {
    realize(
        &mut Plan {
            host: vec![step],
            rootfs: Vec::new(),
            mounts: Vec::new(),
            volumes: Vec::new(),
            devices: Vec::new(),
            read_only_rootfs: false,
        },
        &|_, _| Ok(()),
        &MountHolder::default(),
    )
}

fn whole(path: &Path, read_only: bool) -> HostStep {
    HostStep::Disk {
        parts: vec![DiskPart::any(path, read_only)],
    }
}

fn share_of(step: HostStep) -> Share {
    let mut attachments = realized(step).unwrap();
    assert!(attachments.disks.is_empty());
    attachments.shares.remove(0)
}

fn directory(source: &Path, recursive: bool, read_only: ReadOnly) -> HostStep {
    HostStep::Directory {
        share: "c1.1".into(),
        source: source.into(),
        recursive,
        read_only,
        receive_mounts: false,
        cache: CachePolicy::Shared,
        place: None,
        pooled: false,
    }
}

fn errno<T>(result: std::io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

fn mounts_of_this_process() -> String {
    fs::read_to_string("/proc/self/mountinfo").unwrap()
}

/// An overlay of `count` layers, each with a file named by its number; all have `same`, with the number in it.
fn layers(dir: &Directory, count: usize) -> Overlay {
    let lower = (0..count).map(|number| {
        dir.file(&format!("lower{number}/{number}"), "");
        dir.file(&format!("lower{number}/same"), &number.to_string());
        dir.path.join(format!("lower{number}"))
    });
    Overlay {
        lower: lower.collect(),
        upper: Some((dir.make("upper"), dir.make("work"))),
        options: vec!["index=off".into()],
        read_only: false,
    }
}

fn check_overlay(dir: &Directory, share: &Share, count: usize) {
    assert_eq!(
        fs::read_to_string(inside(share, "same")).unwrap(),
        "0",
        "the first layer is not on top"
    );
    assert!(inside(share, &(count - 1).to_string()).exists());
    fs::write(inside(share, "written"), "x").unwrap();
    assert!(dir.path.join("upper/written").exists());
    fs::remove_file(inside(share, "0")).unwrap();
    assert!(dir.path.join("lower0/0").exists());
}

#[test]
fn an_overlay_of_many_layers_is_mounted_where_nobody_sees_it() {
    needs_root!();
    let dir = Directory::new();
    let before = mounts_of_this_process();
    let overlay = layers(&dir, 60);
    let share = share_of(HostStep::Overlay {
        share: "c1.rootfs".into(),
        overlay,
    });
    assert_eq!(
        (share.name.as_str(), share.cache),
        ("c1.rootfs", CachePolicy::Exclusive)
    );
    check_overlay(&dir, &share, 60);
    assert!(!mounts_of_this_process().contains("c1.rootfs"));
    assert_eq!(
        before.matches("overlay").count(),
        mounts_of_this_process().matches("overlay").count(),
        "the overlay is seen by others"
    );
}

#[test]
fn names_of_one_file_in_a_layer_stay_one_file() {
    needs_root!();
    let dir = Directory::new();
    let overlay = layers(&dir, 1);
    fs::hard_link(dir.path.join("lower0/same"), dir.path.join("lower0/second")).unwrap();
    let step = || HostStep::Overlay {
        share: "c1.rootfs".into(),
        overlay: overlay.clone(),
    };
    let share = share_of(step());
    let number = |name| fs::metadata(inside(&share, name)).unwrap().ino();
    let before = number("same");
    fs::write(inside(&share, "second"), "changed").unwrap();
    fs::hard_link(inside(&share, "same"), inside(&share, "third")).unwrap();
    for name in ["same", "second", "third"] {
        assert_eq!(number(name), before, "{name}");
        assert_eq!(fs::read_to_string(inside(&share, name)).unwrap(), "changed");
    }
    // While it is mounted there can be no second index; the file is there all the same.
    let second = share_of(step());
    assert_eq!(fs::read_to_string(inside(&second, "second")).unwrap(), "changed");
}

#[test]
fn an_overlay_is_mounted_the_older_way_too() {
    needs_root!();
    let dir = Directory::new();
    let fd = rootfs::mount_by_path(&layers(&dir, 60)).unwrap();
    let share = Share {
        name: String::new(),
        fd,
        cache: CachePolicy::Exclusive,
        pooled: false,
        held: None,
    };
    check_overlay(&dir, &share, 60);
    assert!(
        !fs::read_to_string("/proc/mounts")
            .unwrap()
            .contains("overlay /sys")
    );
    let mut missing = layers(&dir, 2);
    missing.lower.push("/gone/layer".into());
    let error = rootfs::mount_by_path(&missing).unwrap_err();
    assert!(matches!(error, StorageError::Missing { .. }), "{error}");
}

#[test]
fn an_overlay_with_odd_paths_and_read_only_is_mounted() {
    needs_root!();
    let dir = Directory::new();
    let long = "x".repeat(200);
    dir.file(&format!("a:b,c\\d/{long}/{long}/f"), "found");
    let share = share_of(HostStep::Overlay {
        share: "c1.rootfs".into(),
        overlay: Overlay {
            lower: vec![
                dir.path.join(format!("a:b,c\\d/{long}/{long}")),
                dir.make("second"),
            ],
            read_only: true,
            ..Overlay::default()
        },
    });
    assert_eq!(fs::read_to_string(inside(&share, "f")).unwrap(), "found");
    assert_eq!(errno(fs::write(inside(&share, "f"), "x")), Some(libc::EROFS));
}

#[test]
fn an_overlay_that_the_kernel_refuses_says_why() {
    needs_root!();
    let dir = Directory::new();
    let refused = |change: fn(&mut Overlay)| {
        let mut overlay = layers(&dir, 2);
        change(&mut overlay);
        realized(HostStep::Overlay {
            share: "s".into(),
            overlay,
        })
        .unwrap_err()
        .to_string()
    };
    let unknown = refused(|overlay| overlay.options.push("nonsense=1".into()));
    assert!(
        unknown.contains("nonsense=1: Invalid argument") && unknown.contains("kernel says"),
        "{unknown}"
    );
    let gone = refused(|overlay| overlay.lower.push("/gone/layer".into()));
    assert!(gone.contains("/gone/layer does not exist"), "{gone}");
    let file = refused(|overlay| overlay.lower.push("/etc/passwd".into()));
    assert!(file.contains("/etc/passwd is not a directory"), "{file}");
}

#[test]
fn a_directory_is_shared_with_or_without_the_mounts_below_it() {
    needs_root!();
    let dir = Directory::new();
    let below = dir.make("shared/below");
    dir.file("shared/below/under", "");
    rustix::mount::mount("tmpfs", &below, "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
    dir.file("shared/below/over", "");
    let source = dir.path.join("shared");
    let deep = share_of(directory(&source, true, ReadOnly::No));
    assert!(inside(&deep, "below/over").exists());
    let shallow = share_of(directory(&source, false, ReadOnly::No));
    assert!(inside(&shallow, "below/under").exists());

    let top = share_of(directory(&source, true, ReadOnly::Top));
    assert_eq!(errno(fs::write(inside(&top, "new"), "")), Some(libc::EROFS));
    fs::write(inside(&top, "below/new"), "").unwrap();
    let all = share_of(directory(&source, true, ReadOnly::Recursive));
    assert_eq!(errno(fs::write(inside(&all, "below/new"), "")), Some(libc::EROFS));
    // The host's own view stays as it was.
    fs::write(source.join("new"), "").unwrap();
    rustix::mount::unmount(&below, rustix::mount::UnmountFlags::DETACH).unwrap();
}

#[test]
fn nothing_in_a_share_is_a_device_or_a_link_for_the_host() {
    needs_root!();
    let dir = Directory::new();
    let source = dir.make("shared");
    mknodat(
        CWD,
        source.join("null"),
        FileType::CharacterDevice,
        Mode::from_raw_mode(0o666),
        makedev(1, 3),
    )
    .unwrap();
    symlink("/etc/passwd", source.join("link")).unwrap();
    dir.file("shared/file", "x");
    let share = share_of(directory(&source, true, ReadOnly::No));
    assert_eq!(errno(fs::File::open(inside(&share, "null"))), Some(libc::EACCES));
    assert_eq!(errno(fs::File::open(inside(&share, "link"))), Some(libc::ELOOP));
    assert_eq!(
        fs::read_link(inside(&share, "link")).unwrap(),
        Path::new("/etc/passwd")
    );
    assert!(fs::File::open(inside(&share, "file")).is_ok());
}

#[test]
fn files_are_gathered_each_as_writable_as_it_shall_be() {
    needs_root!();
    let dir = Directory::new();
    let hosts = dir.file("hosts", "hosts");
    let resolv = dir.file("resolv.conf", "resolv");
    symlink(&resolv, dir.path.join("link")).unwrap();
    let bind = |source: PathBuf, read_only| FileBind {
        place: probe(&source).unwrap().place,
        source,
        read_only,
    };
    let at_root = || {
        mounts_of_this_process()
            .lines()
            .filter(|line| line.split(' ').nth(4) == Some("/"))
            .count()
    };
    let before = at_root();
    let share = share_of(HostStep::Files {
        share: "c1.files".into(),
        files: vec![bind(hosts.clone(), true), bind(dir.path.join("link"), false)],
    });
    assert_eq!(fs::read_to_string(inside(&share, "0")).unwrap(), "hosts");
    assert_eq!(fs::read_to_string(inside(&share, "1")).unwrap(), "resolv");
    assert_eq!(
        errno(fs::OpenOptions::new().write(true).open(inside(&share, "0"))),
        Some(libc::EROFS)
    );
    fs::write(inside(&share, "1"), "changed").unwrap();
    assert_eq!(fs::read_to_string(resolv).unwrap(), "changed");
    fs::OpenOptions::new()
        .append(true)
        .open(&hosts)
        .unwrap()
        .write_all(b"+")
        .unwrap();
    assert_eq!(fs::read_to_string(inside(&share, "0")).unwrap(), "hosts+");
    // No file of the guest's making can fill the host's memory here.
    assert_eq!(errno(fs::write(inside(&share, "2"), "")), Some(libc::EROFS));
    assert_eq!(before, at_root(), "the directory is seen by others");
}

#[test]
fn what_is_not_what_the_plan_took_it_for_is_refused() {
    needs_root!();
    let dir = Directory::new();
    let file = dir.file("file", "");
    symlink("/proc", dir.path.join("link")).unwrap();
    let refused = |source: &Path| {
        realized(directory(source, true, ReadOnly::No))
            .unwrap_err()
            .to_string()
    };
    assert!(refused(&file).contains("is not a directory"));
    assert!(refused(&dir.path.join("gone")).contains("does not exist"));
    assert!(refused(&dir.path.join("link")).contains("is not on a file system that can be shared"));
    let files = HostStep::Files {
        share: "s".into(),
        files: vec![FileBind {
            source: dir.path.clone(),
            place: Place::default(),
            read_only: false,
        }],
    };
    assert!(
        realized(files)
            .unwrap_err()
            .to_string()
            .contains("is not a regular file")
    );
}

#[test]
fn an_image_is_opened_for_one_writer() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let open = |read_only| {
        let mut attachments = realized(whole(&image, read_only))?;
        Ok::<_, StorageError>(attachments.disks.remove(0).parts.remove(0))
    };
    let first = open(false).unwrap();
    assert!(!first.read_only);
    assert!(matches!(open(false), Err(StorageError::BlockBusy(_))));
    // The lock lives as long as any copy of the descriptor.
    let copy = first.fd.try_clone().unwrap();
    drop(first);
    assert!(matches!(open(true), Err(StorageError::BlockBusy(_))));
    drop(copy);
    let readers = [open(true).unwrap(), open(true).unwrap()];
    assert_eq!(
        rustix::io::write(&readers[0].fd, b"x"),
        Err(rustix::io::Errno::BADF)
    );
}

#[test]
fn what_is_no_disk_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let open = |path: &Path| realized(whole(path, true)).unwrap_err();
    for (bytes, read_only) in [(0, true), (0, false), (511, false), (513, false)] {
        let image = dir.path().join(bytes.to_string());
        fs::File::create(&image).unwrap().set_len(bytes).unwrap();
        let error = realized(whole(&image, read_only)).unwrap_err();
        assert!(
            matches!(error, StorageError::BlockSize { bytes: found, .. } if found == bytes),
            "{error}"
        );
    }
    assert!(
        open(Path::new("/dev/null"))
            .to_string()
            .contains("not a block device or an image file")
    );
    assert!(
        open(dir.path())
            .to_string()
            .contains("not a block device or an image file")
    );
    assert!(
        open(&dir.path().join("gone"))
            .to_string()
            .contains("does not exist")
    );
}

#[test]
fn a_block_device_that_the_host_has_mounted_is_refused() {
    needs_root!();
    let source = fs::read_to_string("/proc/mounts").unwrap();
    let mounted = source
        .lines()
        .filter_map(|line| line.split(' ').next())
        .map(Path::new)
        .find(|path| {
            use std::os::unix::fs::FileTypeExt;
            // A device cgroup may keep even root from it.
            fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device())
                && fs::File::open(path).is_ok()
        });
    let Some(device) = mounted else {
        eprintln!("skipped: no block device is mounted here that may be opened");
        return;
    };
    let error = realized(whole(device, false)).unwrap_err();
    assert!(matches!(error, StorageError::BlockBusy(_)), "{error}");
}

#[test]
fn a_specification_goes_all_the_way() {
    needs_root!();
    let dir = Directory::new();
    dir.file("bundle/rootfs/bin/true", "");
    fs::set_permissions(dir.path.join("bundle/rootfs"), fs::Permissions::from_mode(0o755)).unwrap();
    dir.file("bundle/hosts", "hosts");
    let shm = dir.make("shm");
    let spec = format!(
        r#"{{"ociVersion":"1.2.0","root":{{"path":"rootfs"}},"mounts":[
            {{"destination":"/etc/hosts","type":"bind","source":"hosts","options":["rbind","ro"]}},
            {{"destination":"/dev/shm","type":"bind","source":"{}","options":["rbind"]}}]}}"#,
        shm.display()
    );
    let spec: Spec = serde_json::from_str(&spec).unwrap();
    assert!(shm_bytes(&spec) > 0);
    let mut plan = plan(&spec, &dir.path.join("bundle"), &[], "c1").unwrap();
    let attachments = realize(&mut plan, &|_, _| Ok(()), &MountHolder::default()).unwrap();
    let names: Vec<&str> = attachments
        .shares
        .iter()
        .map(|share| share.name.as_str())
        .collect();
    assert_eq!(names, ["c1.rootfs", "c1.files"]);
    assert!(inside(&attachments.shares[0], "bin/true").exists());
    assert_eq!(
        fs::read_to_string(inside(&attachments.shares[1], "0")).unwrap(),
        "hosts"
    );
    let mounts = plan.agent_mounts(&[]);
    assert_eq!(mounts[0].share().path, "0");
    assert_eq!(mounts[1].kernel().file_system, "tmpfs");
}

#[test]
fn a_path_that_is_replaced_after_it_was_planned_is_not_followed() {
    needs_root!();
    let dir = Directory::new();
    let source = dir.make("volume");
    let file = dir.file("file", "");
    let secret = dir.make("secret");
    let planned = |path: &Path| probe(path).unwrap().place;
    let mut step = directory(&source, true, ReadOnly::No);
    if let HostStep::Directory { place, .. } = &mut step {
        *place = Some(planned(&source));
    }
    let files = HostStep::Files {
        share: "s".into(),
        files: vec![FileBind {
            place: planned(&file),
            source: file.clone(),
            read_only: false,
        }],
    };
    let volume = HostStep::Volume {
        volume: "v".into(),
        place: planned(&source),
        source: source.clone(),
    };
    for step in [&step, &files, &volume] {
        realized(step.clone()).unwrap();
    }
    fs::remove_dir(&source).unwrap();
    symlink(&secret, &source).unwrap();
    fs::remove_file(&file).unwrap();
    symlink("/etc/passwd", &file).unwrap();
    for step in [&step, &files, &volume] {
        let error = realized(step.clone()).unwrap_err();
        assert!(matches!(error, StorageError::Replaced(_)), "{error}");
    }
    fs::remove_file(&source).unwrap();
    let error = realized(step).unwrap_err();
    assert!(matches!(error, StorageError::Missing { .. }), "{error}");
}

#[test]
fn a_volume_of_files_is_copied_or_shared_when_it_is_too_large() {
    needs_root!();
    let dir = Directory::new();
    dir.file("pods/1/volumes/kubernetes.io~configmap/c/key", "value");
    let source = dir.path.join("pods/1/volumes/kubernetes.io~configmap/c");
    let spec = format!(
        r#"{{"ociVersion":"1.2.0","root":{{"path":"/usr"}},"mounts":[
            {{"destination":"/c","type":"bind","source":"{}","options":["rbind","ro"]}}]}}"#,
        source.display()
    );
    let spec: Spec = serde_json::from_str(&spec).unwrap();
    let realized = || {
        let mut plan = plan(&spec, &dir.path, &[], "c1").unwrap();
        let attachments = realize(&mut plan, &|_, _| Ok(()), &MountHolder::default()).unwrap();
        (plan.mounts.remove(0).source, attachments)
    };
    let (source_of_mount, attachments) = realized();
    assert!(
        matches!(source_of_mount, MountSource::Volume { .. }),
        "{source_of_mount:?}"
    );
    assert_eq!(attachments.volumes[0].tree.files[0].content, b"value");
    assert_eq!(attachments.shares.len(), 1);
    fs::write(source.join("large"), vec![0; files::MAX_BYTES]).unwrap();
    let (source_of_mount, attachments) = realized();
    assert!(
        matches!(source_of_mount, MountSource::Share { .. }),
        "{source_of_mount:?}"
    );
    assert!(attachments.volumes.is_empty() && attachments.shares[1].pooled);
    assert!(inside(&attachments.shares[1], "large").exists());
}

/// An image that says it is EROFS of this many blocks of 4096 bytes, in a file of this size.
fn erofs(path: &Path, blocks: u32, bytes: u64) {
    use std::os::unix::fs::FileExt as _;
    let file = fs::File::create(path).unwrap();
    file.set_len(bytes).unwrap();
    file.write_all_at(&0xe0f5_e1e2_u32.to_le_bytes(), 1024).unwrap();
    file.write_all_at(&[12], 1024 + 12).unwrap();
    file.write_all_at(&blocks.to_le_bytes(), 1024 + 36).unwrap();
}

fn layer(path: &Path, kind: &str) -> DiskPart {
    DiskPart {
        source: path.into(),
        read_only: true,
        content: Content::FileSystem(kind.into()),
    }
}

#[test]
fn layers_lie_on_a_disk_one_behind_the_other_each_from_a_page_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    erofs(&path("a b:c"), 1, 4097);
    erofs(&path("b"), 2, 8192);
    fs::write(path("data"), "x").unwrap();
    let writable = DiskPart {
        source: path("rw"),
        read_only: false,
        content: Content::Made(NewImage {
            bytes: 16 << 20,
            uuid: Some("00010203-0405-0607-0809-0a0b0c0d0e0f".into()),
        }),
    };
    let parts = vec![
        layer(&path("a b:c"), "erofs"),
        writable,
        layer(&path("b"), "erofs"),
        DiskPart::any(path("data"), true),
    ];
    let step = HostStep::Disk { parts };
    let attachments = realized(step.clone()).unwrap();
    let disk = &attachments.disks[0];
    let rw: u64 = 16 << 20;
    assert_eq!(
        disk.named("s").parts,
        [(0, 8192), (8192, rw), (8192 + rw, 8192), (16384 + rw, 4096)]
    );
    assert_eq!(
        disk.parts.iter().map(|part| part.read_only).collect::<Vec<_>>(),
        [true, false, true, true]
    );
    let image = fs::read(path("rw")).unwrap();
    assert_eq!(image[1024 + 0x68..1024 + 0x78], (0..16).collect::<Vec<u8>>());
    drop(attachments);
    // The second time it is there already, and is used as it is.
    fs::OpenOptions::new()
        .write(true)
        .open(path("rw"))
        .unwrap()
        .set_len(32 << 20)
        .unwrap();
    // A test beside this one may be spawning a program, which has copies of all descriptors until it executes.
    let attachments = loop {
        match realized(step.clone()) {
            Err(StorageError::BlockBusy(_)) => std::thread::yield_now(),
            result => break result.unwrap(),
        }
    };
    assert_eq!(attachments.disks[0].parts[1].length, 32 << 20);
    let left: Vec<_> = fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left.len(), 4, "{left:?}");
}

#[test]
fn images_that_do_not_hold_what_they_should_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layer.erofs");
    let refused = |kind: &str| {
        let error = realized(HostStep::Disk {
            parts: vec![layer(&path, kind)],
        })
        .unwrap_err();
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        error
    };
    erofs(&path, 3, 8192);
    assert!(matches!(
        refused("erofs"),
        StorageError::Truncated {
            wanted: 12288,
            bytes: 8192,
            ..
        }
    ));
    for kind in ["ext4", "xfs"] {
        assert!(matches!(refused(kind), StorageError::NotFileSystem { .. }));
    }
    for bytes in [700, 1024, 1027, 1050, 8192] {
        fs::File::create(&path).unwrap().set_len(bytes).unwrap();
        assert!(
            matches!(refused("erofs"), StorageError::NotFileSystem { .. }),
            "{bytes}"
        );
    }
    // Blocks of 2^60 bytes.
    erofs(&path, 1, 8192);
    {
        use std::os::unix::fs::FileExt as _;
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[60], 1024 + 12).unwrap();
    }
    assert!(matches!(refused("erofs"), StorageError::NotFileSystem { .. }));
    fs::remove_file(&path).unwrap();
    assert!(matches!(refused("erofs"), StorageError::Missing { .. }));
}

#[test]
fn an_image_that_cannot_be_made_leaves_nothing_behind() {
    needs_root!();
    let path = tempfile::tempdir().unwrap().keep();
    let full = c"size=8k";
    rustix::mount::mount("tmpfs", &path, "tmpfs", rustix::mount::MountFlags::empty(), full).unwrap();
    let make = |name: &str, bytes| {
        let part = DiskPart {
            source: path.join(name),
            read_only: false,
            content: Content::Made(NewImage { bytes, uuid: None }),
        };
        realized(HostStep::Disk { parts: vec![part] }).unwrap_err()
    };
    let error = make("rwlayer.img", 64 << 20);
    assert!(matches!(&error, StorageError::MakeImage { .. }), "{error}");
    assert_eq!(error.kind(), crate::error::ErrorKind::ResourceExhausted);
    assert!(error.to_string().contains("rwlayer.img"), "{error}");
    assert!(matches!(
        make("x", 1 << 20),
        StorageError::ImageSize { bytes: 1_048_576, .. }
    ));
    assert!(matches!(
        make("no/rwlayer.img", 64 << 20),
        StorageError::MakeImage { .. }
    ));
    assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
    rustix::mount::unmount(&path, rustix::mount::UnmountFlags::DETACH).unwrap();
    fs::remove_dir(&path).unwrap();
}

#[test]
fn an_upper_directory_that_the_guest_would_not_see_must_be_empty() {
    let dir = tempfile::tempdir().unwrap();
    let unseen = || {
        realized(HostStep::Unseen {
            directory: dir.path().into(),
        })
    };
    assert!(unseen().is_ok());
    fs::write(dir.path().join("file"), "").unwrap();
    let error = unseen().unwrap_err();
    assert!(matches!(error, StorageError::UpperInUse(_)), "{error}");
}

#[test]
fn a_slave_receives_the_hosts_mounts_and_gives_up_its_place() {
    use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
    needs_root!();
    let dir = Directory::new();
    mount_change(&dir.path, MountPropagationFlags::SHARED).unwrap();
    let below = dir.make("shared/below");
    let source = dir.path.join("shared");
    let holder = MountHolder::default();
    let share = |receive| {
        let mut step = directory(&source, true, ReadOnly::No);
        if let HostStep::Directory { receive_mounts, .. } = &mut step {
            *receive_mounts = receive;
        }
        let mut plan = Plan {
            host: vec![step],
            rootfs: Vec::new(),
            mounts: Vec::new(),
            volumes: Vec::new(),
            devices: Vec::new(),
            read_only_rootfs: false,
        };
        realize(&mut plan, &|_, _| Ok(()), &holder)
            .unwrap()
            .shares
            .remove(0)
    };
    let own = |text: &str| text.matches(dir.path.to_str().unwrap()).count();
    let before = own(&mounts_of_this_process());
    let (private, slave) = (share(false), share(true));
    assert!(private.held.is_none() && slave.held.is_some());
    mount("tmpfs", &below, "tmpfs", MountFlags::empty(), None).unwrap();
    dir.file("shared/below/mounted", "");
    assert!(inside(&slave, "below/mounted").exists());
    assert!(!inside(&private, "below/mounted").exists());
    let until = |condition: &dyn Fn() -> bool| {
        for _ in 0..1000 {
            if condition() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("it does not become so");
    };
    // Once it is covered, what is in use of it does not keep the host from unmounting.
    let covered = || {
        let place = inside(&slave, "below");
        let below_it = probe(&place).unwrap().place.mount;
        std::thread::sleep(std::time::Duration::from_millis(50));
        below_it == probe(&place).unwrap().place.mount
    };
    until(&covered);
    let open = fs::File::open(inside(&slave, "below/mounted")).unwrap();
    unmount(&below, UnmountFlags::empty()).unwrap();
    until(&|| !inside(&slave, "below/mounted").exists());
    drop(open);
    // What was there from the beginning is no different, with what is mounted in it.
    mount("tmpfs", &below, "tmpfs", MountFlags::empty(), None).unwrap();
    mount_change(&below, MountPropagationFlags::SHARED).unwrap();
    let early = share(true);
    let inner = dir.make("shared/below/inner");
    mount("tmpfs", &inner, "tmpfs", MountFlags::empty(), None).unwrap();
    dir.file("shared/below/inner/deep", "");
    until(&|| inside(&early, "below/inner/deep").exists());
    until(&covered);
    std::thread::sleep(std::time::Duration::from_millis(200));
    let open = fs::File::open(inside(&early, "below/inner/deep")).unwrap();
    unmount(&inner, UnmountFlags::empty()).unwrap();
    until(&|| !inside(&early, "below/inner/deep").exists());
    unmount(&below, UnmountFlags::empty()).unwrap();
    until(&|| !inside(&early, "below/inner").exists());
    drop((open, early));
    assert_eq!(before, own(&mounts_of_this_process()));
    drop((private, slave));
    // Two at a time, and again.
    let both = (share(true), share(true));
    assert!(inside(&both.0, "below").exists() && inside(&both.1, "below").exists());
}
