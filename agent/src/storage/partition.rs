//! Partitions of a disk that nobody wrote a table for: the host says where they are, and the kernel is told
//! (ioctl(2), `BLKPG`; linux/blkpg.h). The kernel checks every access against their bounds.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use protocol::agent::DiskPart;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;

use super::{StorageError, block};
use crate::container::last_errno;

/// `BLKPG`: `_IO(0x12, 105)`.
const BLKPG: libc::c_ulong = 0x1269;
const ADD: i32 = 1;
const DELETE: i32 = 2;

/// `struct blkpg_ioctl_arg`.
#[repr(C)]
struct Argument {
    operation: i32,
    flags: i32,
    length: i32,
    data: *const Partition,
}

/// `struct blkpg_partition`.
#[repr(C)]
struct Partition {
    start: i64,
    length: i64,
    number: i32,
    device_name: [u8; 64],
    volume_name: [u8; 64],
}

/// The partitions of one container's disks.
#[derive(Debug, Default)]
pub struct Partitions(Vec<Disk>);

#[derive(Debug)]
struct Disk {
    serial: String,
    node: PathBuf,
    device: OwnedFd,
    count: i32,
}

impl Partitions {
    /// Makes a partition; its device node.
    ///
    /// # Errors
    /// [`StorageError::BlockMissing`], [`StorageError::Partition`].
    pub fn add(&mut self, serial: &str, part: &DiskPart) -> Result<PathBuf, StorageError> {
        let disk = match self.0.iter().position(|disk| disk.serial == serial) {
            Some(index) => &mut self.0[index],
            None => {
                let disk = Disk::open(serial)?;
                self.0.push(disk);
                let last = self.0.len() - 1;
                &mut self.0[last]
            }
        };
        let refused = |source| StorageError::Partition {
            what: format!("make bytes {}+{}", part.offset, part.length),
            serial: serial.to_owned(),
            source,
        };
        let number = disk.count + 1;
        let (Ok(start), Ok(length)) = (i64::try_from(part.offset), i64::try_from(part.length)) else {
            return Err(refused(Errno::INVAL));
        };
        change(&disk.device, ADD, number, start, length).map_err(refused)?;
        disk.count = number;
        Ok(node(&disk.node, number))
    }

    /// Takes all of them away. They must not be in use.
    ///
    /// # Errors
    /// The first [`StorageError::Partition`]; the rest goes all the same.
    pub fn remove(&mut self) -> Result<(), StorageError> {
        let mut first = Ok(());
        for disk in self.0.drain(..) {
            for number in (1..=disk.count).rev() {
                let removed = disk.remove(number);
                if first.is_ok() {
                    first = removed;
                }
            }
        }
        first
    }
}

impl Disk {
    fn open(serial: &str) -> Result<Self, StorageError> {
        let node = block::find(serial)?;
        let device = open(&node, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(|source| {
            StorageError::Partition {
                what: format!("open {}", node.display()),
                serial: serial.to_owned(),
                source,
            }
        })?;
        let disk = Self {
            serial: serial.to_owned(),
            node,
            device,
            count: 0,
        };
        // Of a container before, that could not be removed then.
        for number in left_over(Path::new("/sys/block"), &disk.node) {
            disk.remove(number)?;
        }
        Ok(disk)
    }

    fn remove(&self, number: i32) -> Result<(), StorageError> {
        change(&self.device, DELETE, number, 0, 0).map_err(|source| StorageError::Partition {
            what: format!("remove number {number}"),
            serial: self.serial.clone(),
            source,
        })
    }
}

/// Numbers of the partitions that a disk has.
fn left_over(block: &Path, disk: &Path) -> Vec<i32> {
    let Some(name) = disk.file_name() else {
        return Vec::new();
    };
    let number = |entry: std::fs::DirEntry| {
        let text = std::fs::read_to_string(entry.path().join("partition")).ok()?;
        text.trim().parse().ok()
    };
    std::fs::read_dir(block.join(name))
        .map(|entries| entries.flatten().filter_map(number).collect())
        .unwrap_or_default()
}

/// A disk's node with a partition's number: behind a `p` when the name ends in a digit (block/partitions/core.c).
fn node(disk: &Path, number: i32) -> PathBuf {
    let mut name = disk.as_os_str().to_owned();
    if name.as_encoded_bytes().last().is_some_and(u8::is_ascii_digit) {
        name.push("p");
    }
    name.push(number.to_string());
    name.into()
}

fn change(device: &OwnedFd, operation: i32, number: i32, start: i64, length: i64) -> Result<(), Errno> {
    let partition = Partition {
        start,
        length,
        number,
        device_name: [0; 64],
        volume_name: [0; 64],
    };
    let argument = Argument {
        operation,
        flags: 0,
        length: size_of::<Partition>() as i32,
        data: &raw const partition,
    };
    // SAFETY: the kernel reads the argument and the partition that it names, both of which live until it returns.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), BLKPG as _, &raw const argument) };
    if result == -1 { Err(last_errno()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_have_their_disks_names_and_numbers() {
        assert_eq!(node(Path::new("/dev/vdb"), 12), Path::new("/dev/vdb12"));
        assert_eq!(node(Path::new("/dev/nvme0n1"), 3), Path::new("/dev/nvme0n1p3"));
        let directory = tempfile::tempdir().unwrap();
        for (name, file) in [
            ("vdb1", "partition"),
            ("vdb7", "partition"),
            ("queue", "nr_requests"),
        ] {
            let path = directory.path().join("vdb").join(name);
            std::fs::create_dir_all(&path).unwrap();
            std::fs::write(path.join(file), format!("{}\n", &name[3..])).unwrap();
        }
        let mut found = left_over(directory.path(), Path::new("/dev/vdb"));
        found.sort_unstable();
        assert_eq!(found, [1, 7]);
        assert!(left_over(directory.path(), Path::new("/dev/vdc")).is_empty());
    }

    #[test]
    fn the_argument_has_the_kernels_layout() {
        assert_eq!((size_of::<Argument>(), size_of::<Partition>()), (24, 152));
    }
}
