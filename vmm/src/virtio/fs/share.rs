//! One shared directory: what the guest may ask of it, and for how long it stays after it was removed.
//!
//! `fuse-backend-rs` walks the directory; this file decides which of the guest's requests reach it. The guest
//! is hostile: it must not leave the directory, open anything but files and directories on the host, or make
//! the host allocate without bound.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{ATTR_SUBMOUNT, FsOptions, OpenOptions, ROOT_ID};
use fuse_backend_rs::abi::virtio_fs::RemovemappingOne;
use fuse_backend_rs::api::filesystem::{Context, Entry, FileSystem};
use fuse_backend_rs::api::{BackendFileSystem, validate_path_component};
use fuse_backend_rs::passthrough::{CachePolicy as Caching, Config, PassthroughFs};
use fuse_backend_rs::transport::FsCacheReqHandler;
use protocol::vmm::CachePolicy;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};

use super::ShareError;

/// How long the guest trusts what only it can change. It forgets earlier when it is short of memory.
const EXCLUSIVE_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);
/// How long the guest trusts what others change too.
const SHARED_TIMEOUT: Duration = Duration::from_secs(1);
/// `FOPEN_NOFLUSH` (Linux 5.16 `include/uapi/linux/fuse.h`), which the crate does not know: closing needs no request.
const FOPEN_NOFLUSH: u32 = 1 << 5;
/// Which bits of an inode's number stand for its file system and mount (`fuse-backend-rs`, `use_host_ino`).
const MOUNT_BITS: u64 = 0xff << 47;
/// How often a file that is being renamed is looked for, to link it.
const LINK_ATTEMPTS: u32 = 3;
/// Flags of open(2) that are carried out on the host. Others mean something else than opening this very file:
/// `O_PATH` would even make `O_CREAT` follow symbolic links.
const OPEN_FLAGS: i32 = libc::O_ACCMODE
    | libc::O_APPEND
    | libc::O_DIRECTORY
    | libc::O_DSYNC
    | libc::O_NOATIME
    | libc::O_SYNC
    | libc::O_TRUNC;

/// A directory in the tree that the guest sees.
pub struct Share {
    /// Its name in the tree.
    pub name: String,
    /// Tells nodes of this share from those of an earlier one in the same place (FUSE `generation`).
    pub generation: u64,
    /// The host's side of it.
    pub files: PassthroughFs,
    cache: CachePolicy,
    /// The file system that the directory is on.
    device: u64,
    removed: AtomicBool,
    handles: AtomicU64,
    /// What `files` was told to begin at, by path: it must stay open as long as the directory is begun anew.
    root: OwnedFd,
}

impl Share {
    /// A share of the directory `root`.
    ///
    /// # Errors
    /// [`ShareError::NotADirectory`], or [`ShareError::Host`] when the host refuses to look at it.
    pub fn new(name: &str, root: OwnedFd, cache: CachePolicy, generation: u64) -> Result<Self, ShareError> {
        let stat = rustix::fs::fstat(root.as_fd()).map_err(io::Error::from)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            return Err(ShareError::NotADirectory {
                name: name.to_owned(),
            });
        }
        let (timeout, cache_policy) = match cache {
            CachePolicy::Exclusive => (EXCLUSIVE_TIMEOUT, Caching::Always),
            CachePolicy::Shared => (SHARED_TIMEOUT, Caching::Auto),
        };
        let files = PassthroughFs::new(Config {
            attr_timeout: timeout,
            entry_timeout: timeout,
            cache_policy,
            // The last component is opened without following links, so the link in /proc must not be the last.
            root_dir: format!("/proc/self/fd/{}/.", root.as_raw_fd()),
            xattr: true,
            do_import: false,
            killpriv_v2: true,
            // Inode numbers stay the same after the guest has forgotten a file, and forgotten files cost nothing.
            use_host_ino: true,
            // The guest bypasses its own cache; the host's is what makes that fast.
            allow_direct_io: false,
            ..Config::default()
        })?;
        files.import()?;
        Ok(Self {
            name: name.to_owned(),
            generation,
            files,
            cache,
            device: stat.st_dev,
            removed: AtomicBool::new(false),
            handles: AtomicU64::new(0),
            root,
        })
    }

    /// Tells the share what guest and tree have agreed upon.
    ///
    /// # Errors
    /// What the directory reports.
    pub fn negotiated(&self, options: FsOptions) -> io::Result<()> {
        self.files.init(options).map(drop)
    }

    /// The directory itself. The tree decides how long its name is good.
    ///
    /// # Errors
    /// `ESTALE` when it was removed, otherwise what the directory reports.
    pub fn root(&self) -> io::Result<Entry> {
        self.check()?;
        let (mut entry, _) = self.files.mount()?;
        entry.entry_timeout = Duration::ZERO;
        Ok(entry)
    }

    /// # Errors
    /// `ESTALE` when the share was removed.
    pub fn check(&self) -> io::Result<()> {
        if self.removed.load(Ordering::SeqCst) {
            Err(errno(libc::ESTALE))
        } else {
            Ok(())
        }
    }

    /// From now on nothing new can be opened.
    pub fn remove(&self) {
        self.removed.store(true, Ordering::SeqCst);
    }

    /// Whether the share was removed and the guest holds nothing of it open.
    pub fn is_finished(&self) -> bool {
        self.removed.load(Ordering::SeqCst) && self.handles.load(Ordering::SeqCst) == 0
    }

    /// Forgets everything that the guest has looked up and opened.
    pub fn forget_all(&self) {
        self.files.destroy();
        self.handles.store(0, Ordering::SeqCst);
    }

    /// Counts one more open file, unless the share was removed or `open` fails.
    ///
    /// # Errors
    /// `ESTALE`, or what `open` reports.
    pub fn opening<T>(&self, open: impl FnOnce(&PassthroughFs) -> io::Result<T>) -> io::Result<T> {
        // Counted first, so that a removal at the same time either sees the file or is seen here.
        self.handles.fetch_add(1, Ordering::SeqCst);
        self.check()
            .and_then(|()| open(&self.files))
            .inspect_err(|_| self.closed())
    }

    /// Counts one open file less.
    pub fn closed(&self) {
        let down = |count: u64| count.checked_sub(1);
        // It is zero already when the file system was destroyed while the file was being closed.
        let _ = self
            .handles
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, down);
    }

    /// Finds a name in a directory.
    ///
    /// # Errors
    /// `ENOENT` and what else the directory reports; `EINVAL` for what is not a name.
    pub fn lookup(&self, parent: u64, name: &CStr) -> io::Result<Entry> {
        // Only NFS export looks up "." and "..", and it is not offered. A directory that someone moves out of
        // the share on the host would have a ".." outside of it.
        validate_path_component(name)?;
        match self.files.lookup(&Default::default(), parent, name) {
            Err(error)
                if self.cache == CachePolicy::Exclusive && error.raw_os_error() == Some(libc::ENOENT) =>
            {
                // Node 0: the guest remembers that the name does not exist.
                Ok(Entry {
                    entry_timeout: EXCLUSIVE_TIMEOUT,
                    ..Entry::default()
                })
            }
            other => other.map(|entry| self.announce(parent, entry)),
        }
    }

    /// Marks a directory on which something else is mounted on the host: the guest mounts it too, so that it is a file
    /// system of its own there. A bind mount of the share's own file system at its top is not noticed.
    pub fn announce(&self, parent: u64, mut entry: Entry) -> Entry {
        let crossed = if parent == ROOT_ID {
            entry.attr.st_dev != self.device
        } else {
            (parent ^ entry.inode) & MOUNT_BITS != 0
        };
        if crossed && FileType::from_raw_mode(entry.attr.st_mode) == FileType::Directory {
            entry.attr_flags |= ATTR_SUBMOUNT;
        }
        entry
    }

    /// Gives a file one more name.
    ///
    /// # Errors
    /// `EPERM` for a directory, and what else the directory reports.
    pub fn link(&self, context: &Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        // The crate links by descriptor alone, which wants CAP_DAC_READ_SEARCH; with that capability a process
        // could open any file of a shared file system. By its name in /proc a descriptor needs none.
        let file = match self.descriptor(inode) {
            Err(error) if error.raw_os_error() == Some(libc::EBADF) => self.place(inode)?,
            other => other?,
        };
        let directory = self.descriptor(parent)?;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        rustix::fs::linkat(rustix::fs::CWD, path, directory, name, AtFlags::SYMLINK_FOLLOW)?;
        let entry = self.files.lookup(context, parent, name)?;
        Ok(self.announce(parent, entry))
    }

    /// A regular file or directory, open for reading.
    fn descriptor(&self, inode: u64) -> io::Result<OwnedFd> {
        let mut taker = Taker(None);
        self.files
            .setupmapping(&Context::default(), inode, 0, 0, 0, 0, 0, &mut taker)?;
        taker.0.ok_or_else(|| errno(libc::EBADF))
    }

    /// A file of any kind, as a place: links, FIFOs and devices are never opened. It is found by the path that the
    /// kernel knows of it, and taken only if it is the same file.
    fn place(&self, inode: u64) -> io::Result<OwnedFd> {
        let known = |fd: RawFd| std::fs::read_link(format!("/proc/self/fd/{fd}"));
        for _ in 0..LINK_ATTEMPTS {
            let wanted = self.files.getattr(&Context::default(), inode, None)?.0;
            let path = self.files.readlinkat_proc_file(inode)?;
            let Ok(below) = path.strip_prefix(known(self.root.as_raw_fd())?) else {
                break;
            };
            let found = rustix::fs::openat2(
                &self.root,
                below,
                OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::empty(),
                ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS,
            );
            if let Ok(place) = found {
                let stat = rustix::fs::fstat(&place)?;
                if (stat.st_dev, stat.st_ino) == (wanted.st_dev, wanted.st_ino) {
                    return Ok(place);
                }
            }
            // It was renamed between the two looks.
        }
        Err(errno(libc::ENOENT))
    }

    /// What the guest is told about a file that it has opened with `flags`.
    pub fn opened(&self, options: OpenOptions, flags: u32) -> OpenOptions {
        let reads_only = flags as i32 & libc::O_ACCMODE == libc::O_RDONLY;
        if reads_only || self.cache == CachePolicy::Exclusive {
            // SAFETY: the type is a plain bit set; its bits go to the guest as they are.
            unsafe { OpenOptions::from_bits_unchecked(options.bits() | FOPEN_NOFLUSH) }
        } else {
            options
        }
    }
}

/// Takes a duplicate of the descriptor that the crate opens to have a file mapped.
struct Taker(Option<OwnedFd>);

impl FsCacheReqHandler for Taker {
    fn map(&mut self, _: u64, _: u64, _: u64, _: u64, fd: RawFd) -> io::Result<()> {
        // SAFETY: the caller holds the descriptor open during this call.
        self.0 = Some(unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()?);
        Ok(())
    }

    fn unmap(&mut self, _: Vec<RemovemappingOne>) -> io::Result<()> {
        Ok(())
    }
}

/// The flags of open(2) to be used on the host.
///
/// # Errors
/// `EINVAL` for `O_PATH` and `O_TMPFILE`, which no guest sends.
pub fn open_flags(flags: u32) -> io::Result<u32> {
    let flags = flags as i32;
    // `O_TMPFILE` contains `O_DIRECTORY`, which alone is fine.
    if flags & (libc::O_PATH | libc::O_TMPFILE & !libc::O_DIRECTORY) != 0 {
        return Err(errno(libc::EINVAL));
    }
    Ok((flags & OPEN_FLAGS) as u32)
}

/// An error by number.
pub fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}
