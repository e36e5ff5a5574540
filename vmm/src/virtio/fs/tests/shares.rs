//! Which directories the tree has: they come, go, and say what the guest may remember.

use super::*;

#[test]
fn what_the_guest_may_remember_depends_on_the_share() {
    let mut world = world(CachePolicy::Exclusive);
    let other = tempfile::tempdir().unwrap();
    world
        .handle
        .add_share("two", directory_fd(other.path()), CachePolicy::Shared)
        .unwrap();
    std::fs::write(world.path("file"), "").unwrap();
    std::fs::write(other.path().join("file"), "").unwrap();
    let root = world.lookup(ROOT_ID, "one").unwrap();
    assert_eq!(
        (root.entry_valid, root.entry_valid_nsec),
        (0, 0),
        "shares come and go"
    );
    let (one, two) = (root.nodeid, world.lookup(ROOT_ID, "two").unwrap().nodeid);
    let (mine, shared) = (
        world.lookup(one, "file").unwrap(),
        world.lookup(two, "file").unwrap(),
    );
    assert_eq!((mine.entry_valid, mine.attr_valid), (86400, 86400));
    assert_eq!((shared.entry_valid, shared.attr_valid), (1, 1));
    assert_ne!(mine.nodeid, shared.nodeid);
    let absent = world.lookup(one, "absent").unwrap();
    assert_eq!((absent.nodeid, absent.entry_valid), (0, 86400));
    assert_eq!(world.lookup(two, "absent").map(drop), Err(libc::ENOENT));
    let flags = |open: Result<OpenOut, i32>| open.unwrap().open_flags;
    const KEEP_CACHE: u32 = 2;
    const NOFLUSH: u32 = 32;
    assert_eq!(flags(world.open(mine.nodeid, libc::O_RDWR)), KEEP_CACHE | NOFLUSH);
    assert_eq!(flags(world.open(shared.nodeid, libc::O_RDWR)), 0);
    assert_eq!(flags(world.open(shared.nodeid, libc::O_RDONLY)), NOFLUSH);
    assert_eq!(world.list(ROOT_ID), ["one", "two"]);
    let across = [
        CreateIn::default().as_slice()[..0].to_vec(),
        one.to_le_bytes().to_vec(),
        b"a\0b\0".to_vec(),
    ]
    .concat();
    assert_eq!(world.ask(Opcode::Rename, two, &across), Err(libc::EXDEV));
}

#[test]
fn the_root_never_says_that_something_is_not_supported() {
    let mut world = world(CachePolicy::Exclusive);
    for opcode in [
        Opcode::Getattr,
        Opcode::Setattr,
        Opcode::Readlink,
        Opcode::Open,
        Opcode::Read,
        Opcode::Statfs,
        Opcode::Fsync,
        Opcode::Getxattr,
        Opcode::Listxattr,
        Opcode::Removexattr,
        Opcode::Flush,
        Opcode::Opendir,
        Opcode::Readdir,
        Opcode::Readdirplus,
        Opcode::Access,
        Opcode::Fallocate,
        Opcode::Lseek,
        Opcode::Mkdir,
        Opcode::Create,
    ] {
        let name = format!("{opcode:?}");
        let mut body = vec![0; 96];
        body[90] = b'x';
        assert_ne!(
            world.ask(opcode, ROOT_ID, &body).err(),
            Some(libc::ENOSYS),
            "{name}"
        );
    }
}

#[test]
fn a_removed_share_is_readable_where_it_is_open_and_gone_afterwards() {
    let mut world = world(CachePolicy::Exclusive);
    let directory = world.directory.path().canonicalize().unwrap();
    std::fs::write(world.path("open"), "still here").unwrap();
    std::fs::write(world.path("other"), "").unwrap();
    let share = world.share();
    let (file, other) = (
        world.lookup(share, "open").unwrap().nodeid,
        world.lookup(share, "other").unwrap().nodeid,
    );
    let open = world.open(file, libc::O_RDONLY).unwrap();
    assert!(held(&directory) > 0);

    world.handle.remove_share("one").unwrap();
    assert!(matches!(
        world.handle.remove_share("one"),
        Err(ShareError::Absent { .. })
    ));
    assert_eq!(world.lookup(ROOT_ID, "one").map(drop), Err(libc::ENOENT));
    assert_eq!(world.lookup(share, "other").map(drop), Err(libc::ESTALE));
    assert_eq!(
        world.open(other, libc::O_RDONLY).map(|open| open.fh),
        Err(libc::ESTALE)
    );
    assert_eq!(world.read(file, open.fh, 100).unwrap(), b"still here");
    world.release(file, open.fh).unwrap();
    assert_eq!(held(&directory), 0, "the directory is let go");
    assert_eq!(world.read(file, open.fh, 100), Err(libc::ESTALE));

    // Another directory under the same name is another node, whatever the guest remembers.
    let next = tempfile::tempdir().unwrap();
    std::fs::write(next.path().join("open"), "new").unwrap();
    world
        .handle
        .add_share("one", directory_fd(next.path()), CachePolicy::Exclusive)
        .unwrap();
    let again = world.lookup(ROOT_ID, "one").unwrap();
    assert_ne!(again.nodeid, share);
    let file = world.lookup(again.nodeid, "open").unwrap();
    let open = world.open(file.nodeid, libc::O_RDONLY).unwrap();
    assert_eq!(world.read(file.nodeid, open.fh, 100).unwrap(), b"new");
}

#[test]
fn a_share_without_open_files_is_let_go_at_once() {
    let mut world = world(CachePolicy::Exclusive);
    let directory = world.directory.path().canonicalize().unwrap();
    std::fs::write(world.path("file"), "").unwrap();
    let share = world.share();
    world.lookup(share, "file").unwrap();
    world.list(share);
    world.handle.remove_share("one").unwrap();
    assert_eq!(held(&directory), 0);
}

#[test]
fn places_are_reused_last_and_generations_never() {
    let world = world(CachePolicy::Exclusive);
    let directory = tempfile::tempdir().unwrap();
    let add = |name: &str| {
        world
            .handle
            .add_share(name, directory_fd(directory.path()), CachePolicy::Shared)
    };
    for number in 1..MAX_SHARES {
        add(&format!("s{number}")).unwrap();
    }
    assert!(matches!(add("more"), Err(ShareError::TooMany)));
    let mut world = world;
    let old = world.lookup(ROOT_ID, "s7").unwrap();
    world.handle.remove_share("s7").unwrap();
    world
        .handle
        .add_share("more", directory_fd(directory.path()), CachePolicy::Shared)
        .unwrap();
    let new = world.lookup(ROOT_ID, "more").unwrap();
    assert_eq!(new.nodeid, old.nodeid, "it is the only free place");
    assert!(new.generation > old.generation);
}

#[test]
fn bad_shares_are_refused_by_name() {
    let (_device, handle) = Fs::new("kata-rs");
    let directory = tempfile::tempdir().unwrap();
    let fd = || directory_fd(directory.path());
    let long = "x".repeat(256);
    for name in ["", ".", "..", "a/b", "/", "nul\0", &long] {
        let error = handle.add_share(name, fd(), CachePolicy::Shared).unwrap_err();
        assert!(matches!(error, ShareError::Name { .. }), "{error}");
    }
    handle.add_share("twice", fd(), CachePolicy::Shared).unwrap();
    let error = handle.add_share("twice", fd(), CachePolicy::Shared).unwrap_err();
    assert!(error.to_string().contains("\"twice\" already"), "{error}");
    let file = tempfile::tempfile().unwrap();
    let error = handle
        .add_share("file", file.into(), CachePolicy::Shared)
        .unwrap_err();
    assert!(matches!(error, ShareError::NotADirectory { .. }), "{error}");
}

#[test]
fn what_is_mounted_on_the_host_is_announced_as_a_mount() {
    use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
    if !rustix::process::geteuid().is_root() {
        // Only root can mount.
        return;
    }
    let mut world = world(CachePolicy::Shared);
    for name in ["top", "directory/deep", "directory/plain"] {
        std::fs::create_dir_all(world.path(name)).unwrap();
    }
    let mounts = ["top", "directory/deep"].map(|name| world.path(name));
    for path in &mounts {
        mount("tmpfs", path, "tmpfs", MountFlags::empty(), None).unwrap();
        std::fs::create_dir(path.join("inside")).unwrap();
    }
    let share = world.share();
    let mut flags = |parent, name: &str| {
        let entry = world.lookup(parent, name).unwrap();
        (entry.nodeid, entry.attr.flags)
    };
    let (top, announced) = flags(share, "top");
    assert_eq!(announced, ATTR_SUBMOUNT);
    assert_eq!(flags(top, "inside").1, 0);
    let (directory, plain) = flags(share, "directory");
    assert_eq!(plain, 0);
    assert_eq!(flags(directory, "plain").1, 0);
    let (deep, announced) = flags(directory, "deep");
    assert_eq!(announced, ATTR_SUBMOUNT);
    assert_eq!(flags(deep, "inside").1, 0);
    for path in &mounts {
        unmount(path, UnmountFlags::DETACH).unwrap();
    }
}
