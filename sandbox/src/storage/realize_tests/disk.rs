//! Disks: images, block devices, and the layers of an image one behind the other.

use super::*;

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
