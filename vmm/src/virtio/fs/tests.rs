//! The device driven with FUSE messages through its queues, as a guest's kernel does, and as a hostile one might.

use std::ffi::CString;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use fuse_backend_rs::abi::fuse_abi::{
    ATTR_SUBMOUNT, AttrOut, CreateIn, EntryOut, FsOptions, GetattrIn, GetxattrIn, InHeader, InitIn, InitOut,
    Opcode, OpenIn, OpenOut, OutHeader, ROOT_ID, ReadIn, ReleaseIn, SetxattrIn, WriteIn,
};
use rustix::fs::{Mode, OFlags};
use vm_memory::ByteValued;

use super::*;
use crate::virtio::test_driver::{Buffer, Driver};

const REQUESTS: usize = 1;

/// A guest, and a host directory named "one" in its tree.
struct World {
    device: Fs,
    handle: FsHandle,
    driver: Driver,
    directory: tempfile::TempDir,
    unique: u64,
    user: u32,
}

fn directory_fd(path: &Path) -> OwnedFd {
    rustix::fs::open(
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .unwrap()
}

fn world(cache: CachePolicy) -> World {
    let (mut device, handle) = Fs::new("kata-rs");
    let directory = tempfile::tempdir().unwrap();
    handle
        .add_share("one", directory_fd(directory.path()), cache)
        .unwrap();
    let driver = Driver::activate(&mut device);
    let mut world = World {
        device,
        handle,
        driver,
        directory,
        unique: 0,
        user: 0,
    };
    let all = FsOptions::all().bits() as u32 & !(FsOptions::INIT_EXT.bits() as u32);
    let init = InitIn {
        major: 7,
        minor: 39,
        max_readahead: 1 << 17,
        flags: all,
    };
    let answer: InitOut = decode(&world.ask(Opcode::Init, 0, init.as_slice()).unwrap());
    assert_eq!((answer.major, answer.max_pages), (7, 256));
    let agreed = FsOptions::from_bits_truncate(u64::from(answer.flags));
    assert!(agreed.contains(FsOptions::HANDLE_KILLPRIV_V2 | FsOptions::DO_READDIRPLUS));
    assert!(
        !agreed.intersects(
            FsOptions::WRITEBACK_CACHE | FsOptions::ZERO_MESSAGE_OPEN | FsOptions::EXPORT_SUPPORT
        )
    );
    world
}

/// The structure that `bytes` begin with.
fn decode<T: ByteValued + Default>(bytes: &[u8]) -> T {
    let mut value = T::default();
    let size = size_of::<T>();
    value.as_mut_slice().copy_from_slice(&bytes[..size]);
    value
}

impl World {
    /// Sends a request: the body of its answer, or the error number.
    fn ask(&mut self, opcode: Opcode, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        self.unique += 1;
        let header = InHeader {
            len: (size_of::<InHeader>() + body.len()) as u32,
            opcode: opcode as u32,
            unique: self.unique,
            nodeid: node,
            uid: self.user,
            gid: self.user,
            pid: 1,
            padding: 0,
        };
        let mut buffers = vec![Buffer::Out(header.as_slice())];
        if !body.is_empty() {
            buffers.push(Buffer::Out(body));
        }
        buffers.extend([Buffer::In(16), Buffer::In(16384)]);
        let id = self.driver.submit(REQUESTS, &buffers);
        let answer = self.driver.wait(REQUESTS, id);
        let out: OutHeader = decode(&answer);
        assert_eq!((out.len as usize, out.unique), (answer.len(), self.unique));
        if out.error == 0 {
            Ok(answer[16..].to_vec())
        } else {
            Err(-out.error)
        }
    }

    fn named(&mut self, opcode: Opcode, node: u64, head: &[u8], name: &str) -> Result<Vec<u8>, i32> {
        let mut body = head.to_vec();
        body.extend(CString::new(name).unwrap().into_bytes_with_nul());
        self.ask(opcode, node, &body)
    }

    fn lookup(&mut self, parent: u64, name: &str) -> Result<EntryOut, i32> {
        self.named(Opcode::Lookup, parent, &[], name)
            .map(|bytes| decode(&bytes))
    }

    /// The node of share "one".
    fn share(&mut self) -> u64 {
        self.lookup(ROOT_ID, "one").unwrap().nodeid
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<OpenOut, i32> {
        let open = OpenIn {
            flags: flags as u32,
            fuse_flags: 0,
        };
        self.ask(Opcode::Open, node, open.as_slice())
            .map(|bytes| decode(&bytes))
    }

    fn create(&mut self, parent: u64, name: &str, flags: i32) -> Result<(EntryOut, OpenOut), i32> {
        let create = CreateIn {
            flags: flags as u32,
            mode: 0o100_640,
            umask: 0,
            fuse_flags: 0,
        };
        let answer = self.named(Opcode::Create, parent, create.as_slice(), name)?;
        Ok((decode(&answer), decode(&answer[size_of::<EntryOut>()..])))
    }

    fn read(&mut self, node: u64, fh: u64, size: u32) -> Result<Vec<u8>, i32> {
        let read = ReadIn {
            fh,
            size,
            ..ReadIn::default()
        };
        self.ask(Opcode::Read, node, read.as_slice())
    }

    fn write(&mut self, node: u64, fh: u64, offset: u64, bytes: &[u8]) -> Result<Vec<u8>, i32> {
        let flags = libc::O_RDWR as u32;
        let write = WriteIn {
            fh,
            offset,
            size: bytes.len() as u32,
            flags,
            ..WriteIn::default()
        };
        self.ask(Opcode::Write, node, &[write.as_slice(), bytes].concat())
    }

    fn release(&mut self, node: u64, fh: u64) -> Result<Vec<u8>, i32> {
        let release = ReleaseIn {
            fh,
            ..ReleaseIn::default()
        };
        self.ask(Opcode::Release, node, release.as_slice())
    }

    /// Names in a directory, in the order in which they come.
    fn list(&mut self, node: u64) -> Vec<String> {
        let handle: OpenOut = decode(
            &self
                .ask(Opcode::Opendir, node, OpenIn::default().as_slice())
                .unwrap(),
        );
        let (mut names, mut offset) = (Vec::new(), 0);
        loop {
            let read = ReadIn {
                fh: handle.fh,
                offset,
                size: 4096,
                ..ReadIn::default()
            };
            let bytes = self.ask(Opcode::Readdirplus, node, read.as_slice()).unwrap();
            if bytes.is_empty() {
                break;
            }
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                // `struct fuse_direntplus`: an entry, then inode, offset, name length, type, name, padding.
                let entry = &rest[size_of::<EntryOut>()..];
                offset = u64::from_le_bytes(entry[8..16].try_into().unwrap());
                let length = u32::from_le_bytes(entry[16..20].try_into().unwrap()) as usize;
                names.push(String::from_utf8(entry[24..24 + length].to_vec()).unwrap());
                rest = &entry[(24 + length).next_multiple_of(8)..];
            }
        }
        let release = ReleaseIn {
            fh: handle.fh,
            ..ReleaseIn::default()
        };
        self.ask(Opcode::Releasedir, node, release.as_slice()).unwrap();
        names
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    fn violations(&self) -> u64 {
        self.device.violations.count()
    }
}

/// Descriptors of this process that lead into the directory.
fn held(directory: &Path) -> usize {
    let links = std::fs::read_dir("/proc/self/fd").unwrap();
    links
        .filter_map(|link| std::fs::read_link(link.ok()?.path()).ok())
        .filter(|target| target.starts_with(directory))
        .count()
}

#[test]
fn files_are_read_created_and_written() {
    let mut world = world(CachePolicy::Exclusive);
    std::fs::write(world.path("greeting"), "hello from the host").unwrap();
    let share = world.share();
    let file = world.lookup(share, "greeting").unwrap();
    assert_eq!(file.attr.size, 19);
    let open = world.open(file.nodeid, libc::O_RDONLY).unwrap();
    assert_eq!(
        world.read(file.nodeid, open.fh, 4096).unwrap(),
        b"hello from the host"
    );
    assert_eq!(world.read(file.nodeid, open.fh, 5).unwrap(), b"hello");
    world.release(file.nodeid, open.fh).unwrap();
    assert_eq!(world.read(file.nodeid, open.fh, 5), Err(libc::EBADF));

    let (entry, open) = world.create(share, "made", libc::O_RDWR).unwrap();
    world.write(entry.nodeid, open.fh, 0, b"by the guest").unwrap();
    world.write(entry.nodeid, open.fh, 7, b"GUEST").unwrap();
    let attributes: AttrOut = decode(
        &world
            .ask(Opcode::Getattr, entry.nodeid, GetattrIn::default().as_slice())
            .unwrap(),
    );
    assert_eq!(
        (attributes.attr.size, attributes.attr.mode, attributes.attr.ino),
        (12, 0o100_640, entry.nodeid)
    );
    assert_eq!(std::fs::read(world.path("made")).unwrap(), b"by the GUEST");
    assert_eq!(
        std::fs::metadata(world.path("made"))
            .unwrap()
            .permissions()
            .mode(),
        0o100_640
    );
    let mut names = world.list(share);
    names.sort();
    assert_eq!(names, ["greeting", "made"]);
    world.named(Opcode::Unlink, share, &[], "made").unwrap();
    assert!(!world.path("made").exists());
    assert_eq!(world.violations(), 0);
}

#[test]
fn the_configuration_names_tag_and_queues() {
    let (device, _) = Fs::new("kata-rs");
    let mut space = [0xff; 48];
    device.read_config(0, &mut space);
    assert_eq!(&space[..8], b"kata-rs\0");
    assert_eq!(space[8..], [[0; 28].as_slice(), &[1, 0, 0, 0], &[0; 8]].concat());
}

#[test]
fn no_name_leads_out_of_the_share() {
    let mut world = world(CachePolicy::Exclusive);
    std::fs::create_dir_all(world.path("inner/deep")).unwrap();
    let share = world.share();
    let inner = world.lookup(share, "inner").unwrap().nodeid;
    for node in [share, inner] {
        for name in ["..", ".", "../..", "inner/deep", "/", "/etc"] {
            assert_eq!(
                world.lookup(node, name).map(|entry| entry.nodeid),
                Err(libc::EINVAL),
                "{name}"
            );
            assert_eq!(
                world.create(node, name, libc::O_RDWR).map(drop),
                Err(libc::EINVAL),
                "{name}"
            );
            assert_eq!(
                world.named(Opcode::Rmdir, node, &[], name),
                Err(libc::EINVAL),
                "{name}"
            );
        }
    }
    assert_eq!(world.lookup(ROOT_ID, "..").map(drop), Err(libc::ENOENT));
    assert_eq!(
        world.create(ROOT_ID, "new", libc::O_RDWR).map(drop),
        Err(libc::EPERM)
    );
    // A node that was never looked up, and one in a place without share.
    assert_eq!(world.lookup(share + 1000, "x").map(drop), Err(libc::EBADF));
    assert_eq!(world.lookup(77 << 56 | 1, "x").map(drop), Err(libc::ESTALE));
}

#[test]
fn links_are_never_followed_on_the_host() {
    let mut world = world(CachePolicy::Exclusive);
    let secret = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(secret.path(), "secret").unwrap();
    symlink(secret.path(), world.path("link")).unwrap();
    symlink("/proc/self", world.path("directory")).unwrap();
    let share = world.share();
    let link = world.lookup(share, "link").unwrap();
    assert_eq!(link.attr.mode & libc::S_IFMT, libc::S_IFLNK);
    let target = world.ask(Opcode::Readlink, link.nodeid, &[]).unwrap();
    assert_eq!(target, secret.path().as_os_str().as_encoded_bytes());
    assert_eq!(
        world.open(link.nodeid, libc::O_RDONLY).map(|open| open.fh),
        Err(libc::EBADF)
    );
    let directory = world.lookup(share, "directory").unwrap().nodeid;
    assert_eq!(world.lookup(directory, "status").map(drop), Err(libc::ENOTDIR));
    for flags in [
        libc::O_RDWR,
        libc::O_RDWR | libc::O_TRUNC,
        libc::O_PATH,
        libc::O_TMPFILE | libc::O_RDWR,
    ] {
        assert!(world.create(share, "link", flags).is_err(), "{flags:o}");
        assert!(
            world
                .open(share, flags & !libc::O_RDWR & !libc::O_TRUNC | libc::O_PATH)
                .is_err()
        );
    }
    assert_eq!(std::fs::read(secret.path()).unwrap(), b"secret");
}

#[test]
fn opening_a_fifo_fails_at_once() {
    let mut world = world(CachePolicy::Exclusive);
    let path = CString::new(world.path("fifo").to_str().unwrap()).unwrap();
    // SAFETY: `path` is a NUL-terminated string.
    assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o666) }, 0);
    let share = world.share();
    let fifo = world.lookup(share, "fifo").unwrap();
    assert_eq!(fifo.attr.mode & libc::S_IFMT, libc::S_IFIFO);
    for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR] {
        assert_eq!(
            world.open(fifo.nodeid, flags).map(|open| open.fh),
            Err(libc::EBADF)
        );
        assert!(world.create(share, "fifo", flags).is_err());
    }
    assert!(
        std::fs::metadata(world.path("fifo"))
            .unwrap()
            .file_type()
            .is_fifo()
    );
}

#[test]
fn device_nodes_are_never_opened() {
    let mut world = world(CachePolicy::Shared);
    world
        .handle
        .add_share("dev", directory_fd(Path::new("/dev")), CachePolicy::Shared)
        .unwrap();
    let share = world.lookup(ROOT_ID, "dev").unwrap().nodeid;
    let null = world.lookup(share, "null").unwrap();
    assert_eq!(null.attr.mode & libc::S_IFMT, libc::S_IFCHR);
    assert_eq!(
        world.open(null.nodeid, libc::O_RDWR).map(|open| open.fh),
        Err(libc::EBADF)
    );
    assert_eq!(
        world.create(share, "null", libc::O_RDWR).map(drop),
        Err(libc::EBADF)
    );
}

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
fn messages_that_make_no_sense_get_an_error_or_nothing() {
    let mut world = world(CachePolicy::Exclusive);
    let share = world.share();
    // The length in the header is not the message's.
    let header = InHeader {
        len: 4096,
        opcode: 1,
        unique: 9,
        nodeid: share,
        ..InHeader::default()
    };
    let id = world.driver.submit(
        REQUESTS,
        &[
            Buffer::Out(header.as_slice()),
            Buffer::Out(b"x\0"),
            Buffer::In(16),
        ],
    );
    let out: OutHeader = decode(&world.driver.wait(REQUESTS, id));
    assert_eq!((out.len, out.error, out.unique), (16, -libc::EIO, 9));
    assert_eq!(
        world.ask(Opcode::CopyFileRange, share, &[0; 64]),
        Err(libc::ENOSYS)
    );
    assert_eq!(world.ask(Opcode::Lookup, share, b"no end"), Err(libc::EINVAL));
    assert_eq!(world.violations(), 0);
    for (violations, buffers) in [
        [Buffer::Out(b"short"), Buffer::In(100)].as_slice(),
        &[Buffer::Out(header.as_slice()), Buffer::In(8)],
        &[Buffer::In(200)],
    ]
    .into_iter()
    .enumerate()
    {
        let id = world.driver.submit(REQUESTS, buffers);
        assert!(world.driver.wait(REQUESTS, id).is_empty());
        assert_eq!(world.violations(), violations as u64 + 1);
    }
    let huge: Vec<_> = (0..40).map(|_| Buffer::In(32768)).collect();
    let id = world.driver.submit(
        REQUESTS,
        &[&[Buffer::Out(header.as_slice())], huge.as_slice()].concat(),
    );
    assert!(world.driver.wait(REQUESTS, id).is_empty());
    assert_eq!(world.violations(), 4);
    world.lookup(ROOT_ID, "one").unwrap();
}

#[test]
fn many_requests_at_once_are_all_answered() {
    let mut world = world(CachePolicy::Exclusive);
    let share = world.share();
    for _ in 0..50 {
        let mut flying = Vec::new();
        for unique in 0..100 {
            let header = InHeader {
                len: 40 + 16,
                opcode: Opcode::Getattr as u32,
                unique,
                nodeid: share,
                ..InHeader::default()
            };
            let buffers = [
                Buffer::Out(header.as_slice()),
                Buffer::Out(&[0; 16]),
                Buffer::In(200),
            ];
            flying.push((unique, world.driver.prepare(REQUESTS, &buffers)));
        }
        // One notification for all of them.
        world.driver.kick(REQUESTS);
        for (unique, id) in flying {
            let out: OutHeader = decode(&world.driver.wait(REQUESTS, id));
            assert_eq!((out.error, out.unique), (0, unique));
        }
    }
}

#[test]
fn a_reset_forgets_the_guest_but_not_the_shares() {
    let mut world = world(CachePolicy::Exclusive);
    std::fs::write(world.path("file"), "content").unwrap();
    let share = world.share();
    let file = world.lookup(share, "file").unwrap().nodeid;
    let open = world.open(file, libc::O_RDONLY).unwrap();
    world.device.reset();
    world.driver = Driver::activate(&mut world.device);
    assert_eq!(world.read(file, open.fh, 10), Err(libc::EBADF));
    let share = world.share();
    let file = world.lookup(share, "file").unwrap().nodeid;
    let open = world.open(file, libc::O_RDONLY).unwrap();
    assert_eq!(world.read(file, open.fh, 10).unwrap(), b"content");
    world.ask(Opcode::Destroy, 0, &[]).unwrap();
    world.handle.remove_share("one").unwrap();
    assert_eq!(held(&world.directory.path().canonicalize().unwrap()), 0);
}

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
