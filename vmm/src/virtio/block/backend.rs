//! Reading and writing what lies behind a block device, in two ways.
//!
//! io_uring does it without a system call per request and without waiting; where the host forbids it, the same
//! requests are done one after the other. Data moves between file and guest memory without a copy of ours.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};

use io_uring::{IoUring, opcode, types};

use super::extents::{Backing, Extent, Piece};
use super::request::{Range, Status};
use crate::virtio::queue::Iovecs;

impl Backing {
    /// Gives the space of a range back.
    #[must_use]
    pub fn discard(&self, range: Range) -> Status {
        self.change(range, Extent::discard)
    }

    /// Makes a range read as zeroes.
    #[must_use]
    pub fn write_zeroes(&self, range: Range) -> Status {
        self.change(range, Extent::write_zeroes)
    }

    /// Does something with each part of a range that lies in another extent. Nothing when one of them is read-only.
    fn change(&self, range: Range, action: impl Fn(&Extent, Range) -> Status) -> Status {
        if !self.may_write(range.offset, range.length) {
            return Status::IoError;
        }
        let parts = self.pieces(range.offset, range.length).map(|piece| {
            let part = Range {
                offset: piece.offset,
                length: piece.length,
                unmap: range.unmap,
            };
            action(piece.extent, part)
        });
        super::request::first_failure(parts)
    }

    /// Reads or writes everything that is left of a transfer after its first `done` bytes.
    fn finish(&self, transfer: &Transfer, mut done: usize) -> Status {
        if matches!(transfer, Transfer::Sync) {
            let synced = self
                .writable()
                .map(|extent| match rustix::fs::fdatasync(extent.file.as_fd()) {
                    Ok(()) => Status::Ok,
                    Err(_) => Status::IoError,
                });
            return super::request::first_failure(synced);
        }
        let (offset, length) = transfer.place();
        while done < length {
            let at = offset + done as u64;
            let Some(piece) = self.pieces(at, (length - done) as u64).next() else {
                return Status::IoError;
            };
            // No longer than what is left, which is a usize.
            let most = piece.length as usize;
            let part = window(transfer.iovecs(), done, most);
            let result = match (piece.held, transfer) {
                (true, _) => move_data(&piece, transfer, &part),
                (false, Transfer::Read { .. }) => {
                    // SAFETY: as for the system calls in `move_data`.
                    unsafe { zero(&part) };
                    Ok(most)
                }
                (false, _) => return Status::IoError,
            };
            match result {
                // The file has become shorter than the device.
                Ok(0) => return Status::IoError,
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Status::IoError,
            }
        }
        Status::Ok
    }
}

impl Extent {
    fn discard(&self, range: Range) -> Status {
        if !self.is_device {
            return self.allocate(range, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE);
        }
        /// `BLKDISCARD` (Linux `include/uapi/linux/fs.h`): `_IO(0x12, 119)`.
        const BLKDISCARD: libc::c_ulong = 0x1277;
        let argument = [range.offset, range.length];
        // SAFETY: the request reads two 64-bit numbers, which are there.
        status(unsafe { libc::ioctl(self.file.as_raw_fd(), BLKDISCARD as _, argument.as_ptr()) })
    }

    fn write_zeroes(&self, range: Range) -> Status {
        if range.unmap {
            let punched = self.allocate(range, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE);
            if punched != Status::Unsupported {
                return punched;
            }
        }
        self.allocate(range, libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE)
    }

    fn allocate(&self, range: Range, mode: i32) -> Status {
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
}

/// One system call's worth of a transfer that lies in a file: how many bytes it has moved.
fn move_data(piece: &Piece<'_>, transfer: &Transfer, part: &[libc::iovec]) -> io::Result<usize> {
    let fd = piece.extent.file.as_raw_fd();
    let (list, count) = (part.as_ptr(), part.len() as i32);
    let at = piece.offset as i64;
    // SAFETY: the iovecs lie in guest memory, which stays mapped while the device runs; nothing in this process relies
    // on its contents.
    let result = unsafe {
        match transfer {
            Transfer::Write { flags, .. } => libc::pwritev2(fd, list, count, at, *flags),
            _ => libc::preadv(fd, list, count, at),
        }
    };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// What of a list lies between its byte `skip` and `most` bytes further on.
fn window(iovecs: &[libc::iovec], mut skip: usize, mut most: usize) -> Vec<libc::iovec> {
    let mut part = Vec::with_capacity(iovecs.len());
    for iovec in iovecs {
        if skip >= iovec.iov_len {
            skip -= iovec.iov_len;
            continue;
        }
        let length = (iovec.iov_len - skip).min(most);
        if length == 0 {
            break;
        }
        part.push(libc::iovec {
            iov_base: iovec.iov_base.wrapping_byte_add(skip),
            iov_len: length,
        });
        (skip, most) = (0, most - length);
    }
    part
}

/// Fills the places of a list with zeroes.
///
/// # Safety
/// They must be mapped, writable, and nothing that this process relies on the contents of.
unsafe fn zero(part: &[libc::iovec]) {
    for iovec in part {
        for index in 0..iovec.iov_len {
            // SAFETY: the caller's promise. Volatile, because the guest may look at the same time.
            unsafe { iovec.iov_base.cast::<u8>().wrapping_add(index).write_volatile(0) };
        }
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

    /// Whether it is a read from an extent that [`Extent::waits`].
    #[must_use]
    pub fn waits(&self, backing: &Backing) -> bool {
        match self {
            Self::Read { offset, length, .. } => backing
                .one_piece(*offset, *length as u64)
                .is_some_and(|piece| piece.extent.waits),
            _ => false,
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
    /// When the transfer touches several extents, which it takes several transfers for; and when more transfers are in
    /// flight than the ring has entries. Nothing is queued then.
    ///
    /// # Safety
    /// Transfer, backing, and the memory that the iovecs lead to must stay where they are until the transfer has
    /// completed.
    pub unsafe fn push(&mut self, transfer: &Transfer, backing: &Backing, token: u64) -> io::Result<()> {
        let several = || io::Error::from(io::ErrorKind::Unsupported);
        let fd = |extent: &Extent| types::Fd(extent.file.as_raw_fd());
        let (offset, length) = transfer.place();
        let piece = || backing.one_piece(offset, length as u64).ok_or_else(several);
        let (list, count) = (transfer.iovecs().as_ptr(), transfer.iovecs().len() as u32);
        let entry = match transfer {
            Transfer::Read { .. } => {
                let piece = piece()?;
                opcode::Readv::new(fd(piece.extent), list, count)
                    .offset(piece.offset)
                    .build()
            }
            Transfer::Write { flags, .. } => {
                let piece = piece()?;
                opcode::Writev::new(fd(piece.extent), list, count)
                    .offset(piece.offset)
                    .rw_flags(*flags)
                    .build()
            }
            Transfer::Sync => {
                let mut writable = backing.writable();
                let (Some(extent), None) = (writable.next(), writable.next()) else {
                    return Err(several());
                };
                opcode::Fsync::new(fd(extent))
                    .flags(types::FsyncFlags::DATASYNC)
                    .build()
            }
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
