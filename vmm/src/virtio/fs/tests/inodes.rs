//! Further names, owners, modes and attributes of files.

use super::*;

#[test]
fn files_get_more_names_without_the_power_to_open_any_file() {
    let mut sets = rustix::thread::capabilities(None).unwrap();
    sets.effective
        .remove(rustix::thread::CapabilitySet::DAC_READ_SEARCH);
    sets.permitted
        .remove(rustix::thread::CapabilitySet::DAC_READ_SEARCH);
    rustix::thread::set_capabilities(None, sets).unwrap();
    // The device's threads have what this one has.
    let mut world = world(CachePolicy::Exclusive);
    std::fs::write(world.path("file"), "content").unwrap();
    std::fs::create_dir(world.path("directory")).unwrap();
    let share = world.share();
    let file = world.lookup(share, "file").unwrap().nodeid;
    let directory = world.lookup(share, "directory").unwrap().nodeid;
    let second = world
        .named(Opcode::Link, directory, &file.to_le_bytes(), "second")
        .unwrap();
    let second: EntryOut = decode(&second);
    assert_eq!((second.nodeid, second.attr.nlink), (file, 2));
    assert_eq!(std::fs::read(world.path("directory/second")).unwrap(), b"content");
    for (node, parent, name, error) in [
        (file, directory, "second", libc::EEXIST),
        (directory, share, "third", libc::EPERM),
        (file, directory, "..", libc::EINVAL),
        (file, ROOT_ID, "third", libc::EXDEV),
    ] {
        assert_eq!(
            world.named(Opcode::Link, parent, &node.to_le_bytes(), name),
            Err(error),
            "{name}"
        );
    }
}

#[test]
fn a_file_belongs_to_its_maker_where_the_guest_has_allowed_it() {
    if !rustix::process::geteuid().is_root() {
        // Only root can act as another user.
        return;
    }
    let mut world = world(CachePolicy::Exclusive);
    // As with a Kubernetes volume: root's, open to a group that the maker is in, which only the guest knows.
    std::fs::set_permissions(world.directory.path(), std::fs::Permissions::from_mode(0o770)).unwrap();
    let share = world.share();
    world.user = 1000;
    world.create(share, "theirs", libc::O_RDWR).unwrap();
    let metadata = std::fs::metadata(world.path("theirs")).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (1000, 1000));
    world.user = 0;
    world.create(share, "ours", libc::O_RDWR).unwrap();
    assert_eq!(std::fs::metadata(world.path("ours")).unwrap().uid(), 0);
}

#[test]
fn links_and_fifos_get_further_names_without_being_opened() {
    let mut world = world(CachePolicy::Exclusive);
    std::fs::create_dir(world.path("directory")).unwrap();
    symlink("/etc/passwd", world.path("directory/link")).unwrap();
    let fifo = CString::new(world.path("fifo").to_str().unwrap()).unwrap();
    // SAFETY: the path is a C string.
    assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }, 0);
    let share = world.share();
    let directory = world.lookup(share, "directory").unwrap().nodeid;
    for (parent, name) in [(directory, "link"), (share, "fifo")] {
        let node = world.lookup(parent, name).unwrap().nodeid;
        let second = format!("second-{name}");
        let answer = world.named(Opcode::Link, directory, &node.to_le_bytes(), &second);
        let entry: EntryOut = decode(&answer.unwrap());
        assert_eq!((entry.nodeid, entry.attr.nlink), (node, 2));
    }
    let first = std::fs::symlink_metadata(world.path("directory/link")).unwrap();
    let second = std::fs::symlink_metadata(world.path("directory/second-link")).unwrap();
    assert_eq!(first.ino(), second.ino());
    // One that was removed is not found under its old name.
    let node = world.lookup(share, "fifo").unwrap().nodeid;
    std::fs::remove_file(world.path("fifo")).unwrap();
    std::fs::write(world.path("fifo"), "").unwrap();
    std::fs::remove_file(world.path("directory/second-fifo")).unwrap();
    assert_eq!(
        world.named(Opcode::Link, directory, &node.to_le_bytes(), "third"),
        Err(libc::ENOENT)
    );
}

#[test]
fn the_umask_counts_unless_a_default_acl_says_otherwise() {
    let mut world = world(CachePolicy::Exclusive);
    for name in ["plain", "with-acl"] {
        std::fs::create_dir(world.path(name)).unwrap();
    }
    let mut acl = 2_u32.to_le_bytes().to_vec();
    for (tag, permission, id) in [
        (1_u16, 7_u16, u32::MAX),
        (2, 7, 1000),
        (4, 7, u32::MAX),
        (0x10, 7, u32::MAX),
        (0x20, 0, u32::MAX),
    ] {
        acl.extend(tag.to_le_bytes());
        acl.extend(permission.to_le_bytes());
        acl.extend(id.to_le_bytes());
    }
    let set = rustix::fs::setxattr(
        world.path("with-acl"),
        c"system.posix_acl_default",
        &acl,
        rustix::fs::XattrFlags::empty(),
    );
    if set == Err(rustix::io::Errno::OPNOTSUPP) {
        eprintln!("skipped: the file system of temporary files has no access control lists");
        return;
    }
    set.unwrap();
    let share = world.share();
    for (name, mode) in [("plain", 0o644), ("with-acl", 0o660)] {
        let parent = world.lookup(share, name).unwrap().nodeid;
        let create = CreateIn {
            flags: libc::O_RDWR as u32,
            mode: 0o100_666,
            umask: 0o022,
            fuse_flags: 0,
        };
        world
            .named(Opcode::Create, parent, create.as_slice(), "file")
            .unwrap();
        let made = std::fs::metadata(world.path(&format!("{name}/file"))).unwrap();
        assert_eq!(made.permissions().mode() & 0o777, mode, "{name}");
    }
}

#[test]
fn trusted_attributes_of_the_guest_are_user_attributes_of_the_host() {
    let mut world = world(CachePolicy::Exclusive);
    std::fs::write(world.path("file"), "").unwrap();
    let share = world.share();
    let node = world.lookup(share, "file").unwrap().nodeid;
    let set = |world: &mut World, name: &str, value: &[u8]| {
        let head = SetxattrIn {
            size: value.len() as u32,
            flags: 0,
        };
        let name = CString::new(name).unwrap().into_bytes_with_nul();
        world.ask(Opcode::Setxattr, node, &[head.as_slice(), &name, value].concat())
    };
    if set(&mut world, "trusted.overlay.opaque", b"y") == Err(libc::EOPNOTSUPP) {
        eprintln!("skipped: the file system of temporary files has no user attributes");
        return;
    }
    assert_eq!(
        set(&mut world, "user.kata-rs.trusted.overlay.opaque", b"n"),
        Err(libc::EPERM)
    );
    let mut value = [0; 8];
    let length = rustix::fs::getxattr(
        world.path("file"),
        c"user.kata-rs.trusted.overlay.opaque",
        &mut value,
    );
    assert_eq!((length, value[0]), (Ok(1), b'y'));
    let size = GetxattrIn { size: 64, padding: 0 };
    let got = world.named(Opcode::Getxattr, node, size.as_slice(), "trusted.overlay.opaque");
    assert_eq!(got.unwrap(), b"y");
    let list = world.ask(Opcode::Listxattr, node, size.as_slice()).unwrap();
    assert_eq!(list, b"trusted.overlay.opaque\0");
    let small = GetxattrIn { size: 5, padding: 0 };
    assert_eq!(
        world.ask(Opcode::Listxattr, node, small.as_slice()),
        Err(libc::ERANGE)
    );
    world
        .named(Opcode::Removexattr, node, &[], "trusted.overlay.opaque")
        .unwrap();
    assert_eq!(
        world.named(
            Opcode::Getxattr,
            node,
            size.as_slice(),
            "user.kata-rs.trusted.overlay.opaque"
        ),
        Err(libc::ENODATA)
    );
}
