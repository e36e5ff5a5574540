//! What lies behind a block device: a raw file or block device of the host, and the two ways to read and write it.
//!
//! io_uring does it without a system call per request and without waiting; where the host forbids it, the same
//! requests are done one after the other. Data moves between file and guest memory without a copy of ours.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use io_uring::{IoUring, opcode, types};
use rustix::fs::{FileType, OFlags, SeekFrom};

use super::request::{Range, SECTOR, Status};
use crate::virtio::queue::Iovecs;

/// Why a descriptor cannot back a block device.
#[derive(Debug, thiserror::Error)]
pub enum BackingError {
    /// Neither a file nor a block device.
    #[error("the backing is a {found}, not a regular file or block device")]
    Kind {
        /// What it is.
        found: &'static str,
    },
    /// The device shall be writable but the descriptor is not.
    #[error("the backing is open for reading only: open it for writing too, or attach it read-only")]
    NotWritable,
    /// The descriptor cannot be read from.
    #[error("the backing is not open for reading")]
    NotReadable,
    /// `O_DIRECT` wants alignments that the guest does not keep.
    #[error("the backing is open with O_DIRECT: open it without")]
    Direct,
    /// The host refused.
    #[error("the backing cannot be examined: {0}")]
    Host(#[from] io::Error),
}

/// What backs a block device.
#[derive(Debug)]
pub struct Backing {
    file: File,
    read_only: bool,
    is_device: bool,
    capacity: u64,
}

impl Backing {
    /// A raw file or block device. Its size is taken now; a trailing part of a sector does not count.
    ///
    /// # Errors
    /// [`BackingError`].
    pub fn new(fd: OwnedFd, read_only: bool) -> Result<Self, BackingError> {
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&fd).map_err(io::Error::from)?.st_mode);
        let is_device = match kind {
            FileType::RegularFile => false,
            FileType::BlockDevice => true,
            FileType::Directory => return Err(BackingError::Kind { found: "directory" }),
            FileType::CharacterDevice => {
                return Err(BackingError::Kind {
                    found: "character device",
                });
            }
            FileType::Fifo => return Err(BackingError::Kind { found: "pipe" }),
            FileType::Socket => return Err(BackingError::Kind { found: "socket" }),
            _ => {
                return Err(BackingError::Kind {
                    found: "thing of another kind",
                });
            }
        };
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(io::Error::from)?;
        if flags.contains(OFlags::DIRECT) {
            return Err(BackingError::Direct);
        }
        match flags & OFlags::RWMODE {
            _ if flags.contains(OFlags::PATH) => return Err(BackingError::NotReadable),
            OFlags::WRONLY => return Err(BackingError::NotReadable),
            OFlags::RDONLY if !read_only => return Err(BackingError::NotWritable),
            _ => {}
        }
        // Works for files and devices alike; the position is not used otherwise.
        let size = rustix::fs::seek(&fd, SeekFrom::End(0)).map_err(io::Error::from)?;
        Ok(Self {
            file: File::from(fd),
            read_only,
            is_device,
            capacity: size / SECTOR * SECTOR,
        })
    }

    /// Whether writes are refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Size in bytes, a multiple of the sector.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Gives the space of a range back.
    #[must_use]
    pub fn discard(&self, range: Range) -> Status {
        if !self.is_device {
            return self.allocate(range, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE);
        }
        /// `BLKDISCARD` (Linux `include/uapi/linux/fs.h`): `_IO(0x12, 119)`.
        const BLKDISCARD: libc::c_ulong = 0x1277;
        let argument = [range.offset, range.length];
        // SAFETY: the request reads two 64-bit numbers, which are there.
        status(unsafe { libc::ioctl(self.file.as_raw_fd(), BLKDISCARD as _, argument.as_ptr()) })
    }

    /// Makes a range read as zeroes.
    #[must_use]
    pub fn write_zeroes(&self, range: Range) -> Status {
        if range.unmap {
            let punched = self.allocate(range, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE);
            if punched != Status::Unsupported {
                return punched;
            }
        }
        self.allocate(range, libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE)
    }

    fn allocate(&self, range: Range, mode: i32) -> Status {
        if range.length == 0 {
            return Status::Ok;
        }
        let (Ok(offset), Ok(length)) = (range.offset.try_into(), range.length.try_into()) else {
            return Status::IoError;
        };
        loop {
            // SAFETY: fallocate(2) takes numbers only.
            let result = unsafe { libc::fallocate64(self.file.as_raw_fd(), mode, offset, length) };
            if result == 0 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                return status(result);
            }
        }
    }

    /// Reads or writes everything that is left of a transfer after its first `done` bytes.
    fn finish(&self, transfer: &Transfer, mut done: usize) -> Status {
        if matches!(transfer, Transfer::Sync) {
            return match rustix::fs::fdatasync(self.file.as_fd()) {
                Ok(()) => Status::Ok,
                Err(_) => Status::IoError,
            };
        }
        let (offset, length) = transfer.place();
        let mut left: Vec<libc::iovec> = transfer.iovecs().to_vec();
        let mut skip = done;
        while done < length {
            // What was done before is taken off the front.
            while let Some(first) = left.first_mut() {
                if skip < first.iov_len {
                    first.iov_base = first.iov_base.wrapping_byte_add(skip);
                    first.iov_len -= skip;
                    break;
                }
                skip -= first.iov_len;
                left.remove(0);
            }
            let fd = self.file.as_raw_fd();
            let (list, count) = (left.as_ptr(), left.len() as i32);
            let at = (offset + done as u64) as i64;
            // SAFETY: the iovecs lie in guest memory, which stays mapped while the device runs; nothing in this
            // process relies on its contents.
            let result = unsafe {
                match transfer {
                    Transfer::Write { flags, .. } => libc::pwritev2(fd, list, count, at, *flags),
                    _ => libc::preadv(fd, list, count, at),
                }
            };
            match usize::try_from(result) {
                // The file has become shorter than the device.
                Ok(0) => return Status::IoError,
                Ok(count) => (done, skip) = (done + count, count),
                Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => skip = 0,
                Err(_) => return Status::IoError,
            }
        }
        Status::Ok
    }
}

/// The status for what a system call has returned.
fn status(result: i32) -> Status {
    if result == 0 {
        return Status::Ok;
    }
    match io::Error::last_os_error().raw_os_error() {
        Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::ENOSYS) => Status::Unsupported,
        _ => Status::IoError,
    }
}

/// A transfer between a backing and guest memory.
pub enum Transfer {
    /// From the backing.
    Read {
        /// Where it begins there.
        offset: u64,
        /// How long it is.
        length: usize,
        /// Where it goes.
        iovecs: Iovecs,
    },
    /// To the backing.
    Write {
        /// Where it begins there.
        offset: u64,
        /// How long it is.
        length: usize,
        /// Where it comes from.
        iovecs: Iovecs,
        /// `RWF_*`.
        flags: i32,
    },
    /// Everything written before goes to the disk.
    Sync,
}

impl Transfer {
    fn place(&self) -> (u64, usize) {
        match self {
            Self::Read { offset, length, .. } | Self::Write { offset, length, .. } => (*offset, *length),
            Self::Sync => (0, 0),
        }
    }

    fn iovecs(&self) -> &[libc::iovec] {
        match self {
            Self::Read { iovecs, .. } | Self::Write { iovecs, .. } => iovecs.as_slice(),
            Self::Sync => &[],
        }
    }

    /// How many bytes a successful transfer has put into guest memory.
    #[must_use]
    pub fn bytes_read(&self) -> usize {
        match self {
            Self::Read { length, .. } => *length,
            _ => 0,
        }
    }

    /// Does the whole transfer now.
    #[must_use]
    pub fn run(&self, backing: &Backing) -> Status {
        backing.finish(self, 0)
    }

    /// What became of the transfer, of which io_uring has reported `result`. Does the rest of a short one.
    #[must_use]
    pub fn completed(&self, backing: &Backing, result: i32) -> Status {
        match (usize::try_from(result), self) {
            (Ok(_), Self::Sync) => Status::Ok,
            (Ok(done), _) if done >= self.place().1 => Status::Ok,
            (Ok(done), _) => backing.finish(self, done),
            (Err(_), _) if matches!(-result, libc::EINTR | libc::EAGAIN) => backing.finish(self, 0),
            (Err(_), _) => Status::IoError,
        }
    }
}

/// An io_uring with room for as many transfers as a queue has descriptors.
pub struct Ring(IoUring);

impl Ring {
    /// # Errors
    /// When the host forbids io_uring, or has no memory for one.
    pub fn new(entries: u16) -> io::Result<Self> {
        IoUring::new(u32::from(entries)).map(Self)
    }

    /// Readable when a transfer has completed.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Queues a transfer, to be completed as `token`.
    ///
    /// # Errors
    /// Never when no more transfers are in flight than the ring has entries.
    ///
    /// # Safety
    /// Transfer, backing, and the memory that the iovecs lead to must stay where they are until the transfer has
    /// completed.
    pub unsafe fn push(&mut self, transfer: &Transfer, backing: &Backing, token: u64) -> io::Result<()> {
        let fd = types::Fd(backing.file.as_raw_fd());
        let (list, count) = (transfer.iovecs().as_ptr(), transfer.iovecs().len() as u32);
        let entry = match transfer {
            Transfer::Read { offset, .. } => opcode::Readv::new(fd, list, count).offset(*offset).build(),
            Transfer::Write { offset, flags, .. } => opcode::Writev::new(fd, list, count)
                .offset(*offset)
                .rw_flags(*flags)
                .build(),
            Transfer::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        };
        // SAFETY: the caller keeps alive what the entry points to.
        unsafe { self.0.submission().push(&entry.user_data(token)) }
            .map_err(|_| io::Error::from(io::ErrorKind::WouldBlock))
    }

    /// Gives queued transfers to the kernel, and waits until at least `wait` have completed.
    ///
    /// # Errors
    /// What io_uring_enter(2) reports; never `EINTR`.
    pub fn submit(&mut self, wait: usize) -> io::Result<()> {
        loop {
            match self.0.submit_and_wait(wait) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// A completed transfer: its token, and what it has returned.
    pub fn reap(&mut self) -> Option<(u64, i32)> {
        self.0
            .completion()
            .next()
            .map(|entry| (entry.user_data(), entry.result()))
    }
}
