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

// Behind the macro that they use.
mod disk;
mod overlay;

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
