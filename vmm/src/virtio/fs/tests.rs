//! The device driven with FUSE messages through its queues, as a guest's kernel does, and as a hostile one might.

mod inodes;
mod shares;

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
