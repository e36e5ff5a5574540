//! What a block device consists of: files and block devices of the host, one behind the other, and which bytes of the
//! device lie where.
//!
//! Many read-only layers of a container make one disk this way, and a disk is one slot. Reading and writing is not
//! done here.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use protocol::vmm::MAX_EXTENTS;
use rustix::fs::{FileType, OFlags, SeekFrom};

use super::request::SECTOR;
use crate::virtio::rate_limiter::Limit;

/// How much longer than its file an extent may be, at most, in bytes: so much as makes it end at a page.
const MOST_PADDING: u64 = 4095;

/// Why descriptors cannot back a block device.
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
    /// A device of nothing, or of too much.
    #[error("a block device consists of 1 to {MAX_EXTENTS} extents, not of {0}")]
    Count(usize),
    /// An extent is not a number of sectors.
    #[error("an extent of {0} bytes: it must be a multiple of 512, and more than 0")]
    Length(u64),
    /// An extent holds less than it shall be long.
    #[error("an extent of {wanted} bytes holds {held} only")]
    Short {
        /// How long it shall be.
        wanted: u64,
        /// How much there is.
        held: u64,
    },
    /// All extents together are longer than a disk can be.
    #[error("the extents together are longer than a disk can be")]
    TooLong,
    /// The host refused.
    #[error("the backing cannot be examined: {0}")]
    Host(#[from] io::Error),
}

/// A part of a block device: a file, or the beginning of one.
#[derive(Debug)]
pub struct Extent {
    /// The file or block device.
    pub file: File,
    /// Whether it is a block device.
    pub is_device: bool,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether the kernel cannot read from it without waiting, whatever its cache has (no `FMODE_NOWAIT`): so with
    /// device mapper's thin volumes. io_uring then has a thread of its own do it.
    pub waits: bool,
    /// Where on the device it begins, in bytes.
    start: u64,
    /// How much of the device it fills, in bytes.
    length: u64,
    /// How much of that the file has; the rest reads as zeroes.
    held: u64,
}

/// A part of a request that lies in one extent, and either in its file or in the zeroes behind it.
#[derive(Debug, Clone, Copy)]
pub struct Piece<'a> {
    /// The extent.
    pub extent: &'a Extent,
    /// Where in the extent's file it begins, in bytes.
    pub offset: u64,
    /// How long it is, in bytes; never 0.
    pub length: u64,
    /// Whether the file has it; otherwise it reads as zeroes and cannot be written.
    pub held: bool,
}

/// What backs a block device.
#[derive(Debug)]
pub struct Backing {
    /// In the device's order, without gaps.
    extents: Vec<Extent>,
    capacity: u64,
    limit: Limit,
}

impl Backing {
    /// One raw file or block device. Its size is taken now; a trailing part of a sector does not count.
    ///
    /// # Errors
    /// [`BackingError`].
    pub fn new(fd: OwnedFd, read_only: bool) -> Result<Self, BackingError> {
        let mut backing = Self {
            extents: Vec::with_capacity(1),
            capacity: 0,
            limit: Limit::default(),
        };
        backing.append(fd, None, read_only)?;
        Ok(backing)
    }

    /// The same, of which the guest may use only so much in a time.
    #[must_use]
    pub fn limited(self, limit: Limit) -> Self {
        Self { limit, ..self }
    }

    /// How much the guest may do in a time.
    #[must_use]
    pub fn limit(&self) -> Limit {
        self.limit
    }

    /// Several, one behind the other: each with its length on the device, `None` for all it holds in whole sectors, and
    /// whether it is read-only (see [`protocol::vmm::BlockExtent`]).
    ///
    /// # Errors
    /// [`BackingError`].
    pub fn concatenated(parts: Vec<(OwnedFd, Option<u64>, bool)>) -> Result<Self, BackingError> {
        if parts.is_empty() || parts.len() > MAX_EXTENTS {
            return Err(BackingError::Count(parts.len()));
        }
        let mut backing = Self {
            extents: Vec::with_capacity(parts.len()),
            capacity: 0,
            limit: Limit::default(),
        };
        for (fd, length, read_only) in parts {
            // An empty extent of its own would be a device of nothing, which an empty slot is; between others it is
            // somebody's mistake.
            if length == Some(0) {
                return Err(BackingError::Length(0));
            }
            backing.append(fd, length, read_only)?;
        }
        Ok(backing)
    }

    fn append(&mut self, fd: OwnedFd, length: Option<u64>, read_only: bool) -> Result<(), BackingError> {
        let is_device = examine(&fd, read_only)?;
        // Works for files and devices alike; the position is not used otherwise.
        let held = rustix::fs::seek(&fd, SeekFrom::End(0)).map_err(io::Error::from)?;
        let length = length.unwrap_or(held / SECTOR * SECTOR);
        if !length.is_multiple_of(SECTOR) {
            return Err(BackingError::Length(length));
        }
        let padding = length.saturating_sub(held);
        if padding > MOST_PADDING || (padding > 0 && !read_only) {
            return Err(BackingError::Short { wanted: length, held });
        }
        let start = self.capacity;
        // What io_uring and preadv(2) take is a signed number.
        self.capacity = start
            .checked_add(length)
            .filter(|end| i64::try_from(*end).is_ok())
            .ok_or(BackingError::TooLong)?;
        let waits = held > 0 && reading_waits(&fd);
        self.extents.push(Extent {
            file: File::from(fd),
            is_device,
            read_only,
            waits,
            start,
            length,
            held: held.min(length),
        });
        Ok(())
    }

    /// The same, read from like a backing that [`Extent::waits`].
    #[cfg(test)]
    pub fn waiting(mut self) -> Self {
        self.extents.iter_mut().for_each(|extent| extent.waits = true);
        self
    }

    /// Whether all writes are refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.extents.iter().all(|extent| extent.read_only)
    }

    /// Size in bytes, a multiple of the sector.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// The extents that can be written.
    pub fn writable(&self) -> impl Iterator<Item = &Extent> {
        self.extents.iter().filter(|extent| !extent.read_only)
    }

    /// Whether all of a part of the device can be written.
    #[must_use]
    pub fn may_write(&self, offset: u64, length: u64) -> bool {
        self.pieces(offset, length)
            .all(|piece| piece.held && !piece.extent.read_only)
    }

    /// What lies in a part of the device, in order. Nothing behind the device's end.
    pub fn pieces(&self, offset: u64, length: u64) -> Pieces<'_> {
        let first = self
            .extents
            .partition_point(|extent| extent.start + extent.length <= offset);
        Pieces {
            extents: self.extents.get(first..).unwrap_or_default(),
            at: offset,
            end: offset.saturating_add(length).min(self.capacity),
        }
    }

    /// The piece that a part of the device is, if it is one of a file.
    #[must_use]
    pub fn one_piece(&self, offset: u64, length: u64) -> Option<Piece<'_>> {
        self.pieces(offset, length)
            .next()
            .filter(|piece| piece.held && piece.length == length)
    }
}

/// See [`Backing::pieces`].
pub struct Pieces<'a> {
    extents: &'a [Extent],
    at: u64,
    end: u64,
}

impl<'a> Iterator for Pieces<'a> {
    type Item = Piece<'a>;

    fn next(&mut self) -> Option<Piece<'a>> {
        let extent = self.extents.first().filter(|_| self.at < self.end)?;
        let offset = self.at - extent.start;
        let held = offset < extent.held;
        let limit = if held { extent.held } else { extent.length };
        let length = (limit - offset).min(self.end - self.at);
        self.at += length;
        if offset + length == extent.length {
            self.extents = &self.extents[1..];
        }
        Some(Piece {
            extent,
            offset,
            length,
            held,
        })
    }
}

/// Whether reading from a descriptor may always wait.
fn reading_waits(fd: &OwnedFd) -> bool {
    let mut byte = [0];
    let part = libc::iovec {
        iov_base: byte.as_mut_ptr().cast(),
        iov_len: byte.len(),
    };
    // SAFETY: the kernel writes at most the byte that the one iovec names.
    let result = unsafe { libc::preadv2(fd.as_raw_fd(), &raw const part, 1, 0, libc::RWF_NOWAIT) };
    result < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EOPNOTSUPP)
}

/// Whether a descriptor that can be part of a disk is a block device.
fn examine(fd: &OwnedFd, read_only: bool) -> Result<bool, BackingError> {
    let kind = FileType::from_raw_mode(rustix::fs::fstat(fd).map_err(io::Error::from)?.st_mode);
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
    let flags = rustix::fs::fcntl_getfl(fd).map_err(io::Error::from)?;
    if flags.contains(OFlags::DIRECT) {
        return Err(BackingError::Direct);
    }
    match flags & OFlags::RWMODE {
        _ if flags.contains(OFlags::PATH) => Err(BackingError::NotReadable),
        OFlags::WRONLY => Err(BackingError::NotReadable),
        OFlags::RDONLY if !read_only => Err(BackingError::NotWritable),
        _ => Ok(is_device),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: &[u8]) -> OwnedFd {
        use std::io::Write as _;
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.into()
    }

    /// Numbers that are the same in every run (xorshift).
    struct Numbers(u64);

    impl Numbers {
        fn below(&mut self, limit: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % limit
        }
    }

    #[test]
    fn any_part_of_the_device_is_that_part_of_its_extents_one_behind_the_other() {
        use std::os::unix::fs::FileExt as _;
        let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
        for _ in 0..40 {
            let mut whole = Vec::new();
            let mut parts = Vec::new();
            for _ in 0..=numbers.below(7) {
                let bytes: Vec<u8> = (0..numbers.below(6000))
                    .map(|_| numbers.below(256) as u8)
                    .collect();
                // To the next sector, and up to seven more, as far as there may be padding.
                let sectors = (bytes.len() as u64).div_ceil(SECTOR).max(1);
                let length =
                    (sectors + numbers.below(8)).min((bytes.len() as u64 + MOST_PADDING) / SECTOR) * SECTOR;
                let start = whole.len();
                whole.extend_from_slice(&bytes);
                whole.resize(start + length as usize, 0);
                parts.push((file(&bytes), Some(length), true));
            }
            let backing = Backing::concatenated(parts).unwrap();
            assert_eq!(backing.capacity(), whole.len() as u64);
            for _ in 0..60 {
                let offset = numbers.below(backing.capacity() + 1000);
                let length = numbers.below(backing.capacity() + 1000);
                let mut read = Vec::new();
                for piece in backing.pieces(offset, length) {
                    assert!(piece.length > 0);
                    let mut bytes = vec![0; piece.length as usize];
                    if piece.held {
                        piece.extent.file.read_exact_at(&mut bytes, piece.offset).unwrap();
                    }
                    read.extend(bytes);
                }
                let from = (offset as usize).min(whole.len());
                let to = (from + length as usize).min(whole.len());
                assert_eq!(read, whole[from..to], "{offset}+{length}");
            }
        }
    }

    #[test]
    fn extents_must_hold_what_they_are_said_to() {
        let one = |bytes: usize, length, read_only| {
            Backing::concatenated(vec![(file(&vec![1; bytes]), length, read_only)])
                .map(|backing| backing.capacity())
        };
        assert_eq!(one(1500, Some(1536), true).unwrap(), 1536);
        assert_eq!(one(1500, Some(4096 + 1024), true).unwrap(), 5120);
        assert_eq!(one(5000, Some(512), false).unwrap(), 512);
        assert_eq!(one(1500, None, true).unwrap(), 1024);
        assert!(matches!(
            one(1500, Some(6144), true),
            Err(BackingError::Short {
                wanted: 6144,
                held: 1500
            })
        ));
        // There is nothing behind the file that could be written.
        assert!(matches!(
            one(1500, Some(1536), false),
            Err(BackingError::Short { .. })
        ));
        assert!(matches!(
            one(1500, Some(1000), true),
            Err(BackingError::Length(1000))
        ));
        assert!(matches!(one(1500, Some(0), true), Err(BackingError::Length(0))));
        assert!(matches!(
            Backing::concatenated(Vec::new()),
            Err(BackingError::Count(0))
        ));
        let many = |count| (0..count).map(|_| (file(&[0; 512]), None, true)).collect();
        assert_eq!(
            Backing::concatenated(many(MAX_EXTENTS)).unwrap().capacity(),
            128 * 512
        );
        assert!(matches!(
            Backing::concatenated(many(MAX_EXTENTS + 1)),
            Err(BackingError::Count(129))
        ));
        // Sparse, so that the sum is more than a signed number holds.
        let large = || {
            let file = tempfile::tempfile().unwrap();
            (0..62).rev().find(|bits| file.set_len(1 << bits).is_ok());
            OwnedFd::from(file)
        };
        let size = File::from(large()).metadata().unwrap().len();
        let count = (i64::MAX as u64 / size + 1) as usize;
        if count <= MAX_EXTENTS {
            let parts = (0..count).map(|_| (large(), None, true)).collect();
            assert!(matches!(Backing::concatenated(parts), Err(BackingError::TooLong)));
        }
    }

    #[test]
    fn a_part_can_be_written_when_all_of_it_can() {
        let parts = vec![
            (file(&[0; 1024]), None, true),
            (file(&[0; 1024]), None, false),
            (file(&[0; 1024]), None, false),
        ];
        let backing = Backing::concatenated(parts).unwrap();
        assert!(!backing.is_read_only());
        assert!(!backing.may_write(512, 1024) && !backing.may_write(0, 512));
        assert!(backing.may_write(1024, 2048));
        assert!(backing.one_piece(1536, 512).is_some() && backing.one_piece(1536, 1024).is_none());
        assert_eq!(backing.writable().count(), 2);
    }
}
