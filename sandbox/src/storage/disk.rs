//! Disks for the guest: opens the devices and files that one consists of, sees that they hold what they shall, and
//! makes images that do not exist yet.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{CWD, FileType, FlockOperation, Mode, OFlags, RenameFlags, SeekFrom};
use rustix::io::Errno;

use super::devices::Number;
use super::error::StorageError;
use super::ext4;
use super::plan::{Content, DiskPart, NewImage};
use super::probe::{FileKind, inspect, open_path};

const WHAT: &str = "the block device";

/// The unit of a disk's size, in bytes.
const SECTOR: u64 = 512;
/// Where parts of a disk begin, in bytes, so that pages of the guest's cache are pages of the files.
const ALIGNMENT: u64 = 4096;

/// A disk that the guest shall see.
#[derive(Debug)]
pub struct Disk {
    /// One behind the other.
    pub parts: Vec<Part>,
    /// Its number on the host, when it is a device that the pod's containers have in common.
    pub device: Option<Number>,
}

/// A part of a disk.
#[derive(Debug)]
pub struct Part {
    /// A block device or raw file.
    pub fd: OwnedFd,
    /// How many bytes of the disk it fills; up to 4095 more than it has when it is read-only (see
    /// [`protocol::vmm::BlockExtent`]).
    pub length: u64,
    /// Whether it was opened for reading only.
    pub read_only: bool,
}

/// A disk as the guest knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskName {
    /// Its serial.
    pub serial: String,
    /// Where its parts are: offset and length in bytes.
    pub parts: Vec<(u64, u64)>,
}

impl Disk {
    /// What the guest has to know of it, when it has this serial.
    #[must_use]
    pub fn named(&self, serial: &str) -> DiskName {
        let parts = self.parts.iter().scan(0, |offset, part| {
            let start = *offset;
            *offset += part.length;
            Some((start, part.length))
        });
        DiskName {
            serial: serial.to_owned(),
            parts: parts.collect(),
        }
    }
}

/// Opens the parts of a disk.
pub(super) fn open(parts: &[DiskPart]) -> Result<Disk, StorageError> {
    let alone = parts.len() == 1;
    let parts = parts
        .iter()
        .map(|part| open_part(part, alone))
        .collect::<Result<_, _>>()?;
    Ok(Disk { parts, device: None })
}

/// Opens a block device of the host, whoever else has it: what it is used for is its users' matter, as with any
/// runtime.
pub(super) fn open_device(number: Number, read_only: bool) -> Result<Disk, StorageError> {
    let (major, minor) = number;
    let known = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    let opening = |cause: io::Error| StorageError::opening(WHAT, format!("{major}:{minor}"), cause);
    let events = std::fs::read_to_string(known.join("uevent")).map_err(opening)?;
    let name = events
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="))
        .ok_or_else(|| opening(io::ErrorKind::NotFound.into()))?;
    let path = Path::new("/dev").join(name);
    let opening = |errno: Errno| StorageError::opening(WHAT, &path, errno.into());
    let access = if read_only { OFlags::RDONLY } else { OFlags::RDWR };
    let fd = rustix::fs::openat(
        CWD,
        &path,
        access | OFlags::CLOEXEC | OFlags::NONBLOCK,
        Mode::empty(),
    )
    .map_err(opening)?;
    let stat = rustix::fs::fstat(&fd).map_err(opening)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::BlockDevice
        || stat.st_rdev != rustix::fs::makedev(major, minor)
    {
        return Err(StorageError::Kind {
            what: WHAT,
            path,
            expected: "the device that has its name",
        });
    }
    let bytes = rustix::fs::seek(&fd, SeekFrom::End(0)).map_err(opening)?;
    if bytes == 0 || !bytes.is_multiple_of(SECTOR) {
        return Err(StorageError::BlockSize { path, bytes });
    }
    let part = Part {
        fd,
        length: bytes,
        read_only,
    };
    Ok(Disk {
        parts: vec![part],
        device: Some(number),
    })
}

fn open_part(part: &DiskPart, alone: bool) -> Result<Part, StorageError> {
    let DiskPart {
        source,
        read_only,
        content,
    } = part;
    let place = match (open_path(source), content) {
        (Err(error), Content::Made(image)) if error.kind() == io::ErrorKind::NotFound => {
            make(source, image)?;
            open_path(source)
        }
        (result, _) => result,
    };
    let place = place.map_err(|cause| StorageError::opening(WHAT, source, cause))?;
    let (fd, bytes) = open_one(source, &place, *read_only)?;
    let length = match read_only {
        // A disk that is one file needs no more than whole sectors.
        true if alone => bytes.next_multiple_of(SECTOR),
        true => bytes.next_multiple_of(ALIGNMENT),
        false => bytes,
    };
    if bytes == 0 || (!read_only && !bytes.is_multiple_of(SECTOR)) {
        return Err(StorageError::BlockSize {
            path: source.clone(),
            bytes,
        });
    }
    let file = File::from(fd);
    let file_system = match content {
        Content::Any => None,
        Content::FileSystem(kind) => Some(kind.as_str()),
        Content::Made(_) => Some("ext4"),
    };
    if let Some(kind) = file_system {
        check(&file, source, bytes, kind)?;
    }
    Ok(Part {
        fd: file.into(),
        length,
        read_only: *read_only,
    })
}

/// Opens a block device, or a raw image file, for one guest; many may read it. Its size in bytes comes with it.
fn open_one(path: &Path, place: &OwnedFd, read_only: bool) -> Result<(OwnedFd, u64), StorageError> {
    let opening = |cause: io::Error| StorageError::opening(WHAT, path, cause);
    let kind = inspect(place.as_fd()).map_err(opening)?.kind;
    let mut flags = OFlags::CLOEXEC | if read_only { OFlags::RDONLY } else { OFlags::RDWR };
    match kind {
        // Without O_CREAT, O_EXCL means: not while the host has it mounted or in another use (open(2)).
        FileKind::BlockDevice => flags.set(OFlags::EXCL, !read_only),
        FileKind::File => {}
        _ => {
            return Err(StorageError::Kind {
                what: WHAT,
                path: path.to_owned(),
                expected: "a block device or an image file",
            });
        }
    }
    // Through the descriptor that was looked at: the path may lead elsewhere by now.
    let name = format!("/proc/self/fd/{}", place.as_raw_fd());
    let fd = match rustix::fs::openat(CWD, name.as_str(), flags, Mode::empty()) {
        Err(Errno::BUSY) => return Err(StorageError::BlockBusy(path.to_owned())),
        other => other.map_err(|errno| opening(errno.into()))?,
    };
    if kind == FileKind::File {
        // Held by every copy of the descriptor, so until the VMM closes its.
        let lock = if read_only {
            FlockOperation::NonBlockingLockShared
        } else {
            FlockOperation::NonBlockingLockExclusive
        };
        match rustix::fs::flock(&fd, lock) {
            Err(Errno::WOULDBLOCK) => return Err(StorageError::BlockBusy(path.to_owned())),
            other => other.map_err(|errno| opening(errno.into()))?,
        }
    }
    let bytes = rustix::fs::seek(&fd, SeekFrom::End(0)).map_err(|errno| opening(errno.into()))?;
    Ok((fd, bytes))
}

/// Sees that a file system of this kind is there, and all of it: the guest would only say that it cannot mount it.
fn check(file: &File, path: &Path, bytes: u64, kind: &str) -> Result<(), StorageError> {
    // Where each has its magic number, and which it is (linux/magic.h, fs/xfs/libxfs/xfs_format.h).
    let (offset, magic): (u64, &[u8]) = match kind {
        "erofs" => (1024, &[0xe2, 0xe1, 0xf5, 0xe0]),
        "ext4" => (1080, &[0x53, 0xef]),
        "xfs" => (0, b"XFSB"),
        _ => return Ok(()),
    };
    let wrong = || StorageError::NotFileSystem {
        path: path.to_owned(),
        kind: kind.to_owned(),
    };
    let mut found = [0; 4];
    let found = &mut found[..magic.len()];
    read(file, path, found, offset, wrong)?;
    if found != magic {
        return Err(wrong());
    }
    if kind != "erofs" {
        return Ok(());
    }
    // `struct erofs_super_block`: blkszbits at 12, blocks at 36.
    let mut superblock = [0; 40];
    read(file, path, &mut superblock, 1024, wrong)?;
    let bits = superblock[12];
    let blocks = u32::from_le_bytes([superblock[36], superblock[37], superblock[38], superblock[39]]);
    // EROFS has blocks of at most a page; 64 KiB is the largest page Linux has.
    let wanted = match bits {
        9..=16 => u64::from(blocks) << bits,
        _ => return Err(wrong()),
    };
    if wanted > bytes {
        return Err(StorageError::Truncated {
            path: path.to_owned(),
            wanted,
            bytes,
        });
    }
    Ok(())
}

fn read(
    file: &File,
    path: &Path,
    buffer: &mut [u8],
    offset: u64,
    too_short: impl Fn() -> StorageError,
) -> Result<(), StorageError> {
    file.read_exact_at(buffer, offset)
        .map_err(|cause| match cause.kind() {
            io::ErrorKind::UnexpectedEof => too_short(),
            _ => StorageError::opening(WHAT, path, cause),
        })
}

/// Makes an image. It has its name only once it is complete: one that is there is used as it is.
fn make(path: &Path, image: &NewImage) -> Result<(), StorageError> {
    let failed = |cause: io::Error| StorageError::MakeImage {
        path: path.to_owned(),
        bytes: image.bytes,
        cause,
    };
    if !ext4::SIZES.contains(&image.bytes) {
        return Err(StorageError::ImageSize {
            path: path.to_owned(),
            bytes: image.bytes,
        });
    }
    let uuid = match &image.uuid {
        Some(text) => parse_uuid(text).ok_or_else(|| StorageError::Option {
            what: "mkfs/ext4".to_owned(),
            option: format!("X-containerd.mkfs.uuid={text}"),
            reason: "it is not a UUID",
        })?,
        None => random_uuid().map_err(|errno| failed(errno.into()))?,
    };
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".new");
    let new = path.with_file_name(name);
    // What somebody left behind who did not come to the end.
    match rustix::fs::unlink(&new) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(errno) => return Err(failed(errno.into())),
    }
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(CWD, &new, flags, Mode::from_raw_mode(0o640))
        .map_err(|errno| failed(errno.into()))?;
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let made = ext4::format(
        &File::from(fd),
        image.bytes,
        uuid,
        u32::try_from(now).unwrap_or(u32::MAX),
    )
    .and_then(
        |()| match rustix::fs::renameat_with(CWD, &new, CWD, path, RenameFlags::NOREPLACE) {
            // Somebody else was faster: theirs is as good.
            Err(Errno::EXIST) => Ok(rustix::fs::unlink(&new)?),
            other => Ok(other?),
        },
    );
    made.map_err(|cause| {
        // What is left behind would only take space.
        let _ = rustix::fs::unlink(&new);
        failed(cause)
    })
}

fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let digits: String = text.chars().filter(|character| *character != '-').collect();
    if digits.len() != 32 || !digits.is_ascii() {
        return None;
    }
    u128::from_str_radix(&digits, 16).ok().map(u128::to_be_bytes)
}

/// Version 4, RFC 9562.
fn random_uuid() -> Result<[u8; 16], Errno> {
    let mut uuid = [0; 16];
    rustix::rand::getrandom(&mut uuid, rustix::rand::GetRandomFlags::empty())?;
    uuid[6] = uuid[6] & 0x0f | 0x40;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    Ok(uuid)
}

/// Sees that a directory which the guest will not see holds nothing.
pub(super) fn must_be_empty(directory: &Path) -> Result<(), StorageError> {
    const UPPER: &str = "the upper directory";
    let mut entries =
        std::fs::read_dir(directory).map_err(|cause| StorageError::opening(UPPER, directory, cause))?;
    match entries.next() {
        None => Ok(()),
        Some(Ok(_)) => Err(StorageError::UpperInUse(PathBuf::from(directory))),
        Some(Err(cause)) => Err(StorageError::opening(UPPER, directory, cause)),
    }
}
