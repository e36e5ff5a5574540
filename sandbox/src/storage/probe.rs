//! What a path on the host is, as far as a plan must know.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RawMode, StatxAttributes, StatxFlags};

use super::kubelet;
use super::mountinfo::MountTable;

/// The kind of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
    /// A Unix socket.
    Socket,
}

/// The kind of a file system, where it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    /// One that can be shared.
    Ordinary,
    /// tmpfs, with its size in bytes.
    Tmpfs {
        /// Size in bytes.
        bytes: u64,
    },
    /// cgroup or cgroup2.
    Cgroup,
    /// hugetlbfs.
    Huge {
        /// The size of its pages in bytes.
        page_bytes: u64,
    },
    /// Another one through which the host's kernel shows itself: by its type.
    Kernel(&'static str),
}

/// Which file something is, whatever its path, and by way of which mount it was reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Number of the file system (`st_dev`).
    pub device: u64,
    /// Number of the file in it.
    pub inode: u64,
    /// Number of the mount (statx(2), `stx_mnt_id`); 0 where the kernel does not tell.
    pub mount: u64,
}

impl Place {
    /// Whether it is the same file.
    #[must_use]
    pub fn is_file_of(self, other: Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }
}

/// Who owns a file, and its permission bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Permission bits with setuid, setgid and sticky bit.
    pub mode: u32,
}

/// What a plan must know of a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceInfo {
    /// The kind of file, behind all symbolic links.
    pub kind: FileKind,
    /// The kind of file system it is on.
    pub file_system: FileSystem,
    /// Which file it is.
    pub place: Place,
    /// Whose it is.
    pub owner: Owner,
    /// Of which device, major and minor, a device node is.
    pub number: (u32, u32),
    /// Whether something is mounted right here.
    pub mount_root: bool,
    /// Which directory of its file system the mount shows, of a `subPath`.
    pub shows: Option<PathBuf>,
    /// A number that tells which mounts are below a directory; 0 for none.
    pub below: u64,
}

/// File systems that show or steer the host's kernel, by statfs(2)'s `f_type` (linux/magic.h).
const KERNEL_FILE_SYSTEMS: [(u64, &str); 11] = [
    (0x9fa0, "proc"),
    (0x6265_6572, "sysfs"),
    (0x1cd1, "devpts"),
    (0x1980_0202, "mqueue"),
    (0xcafe_4a11, "bpf"),
    (0x6462_6720, "debugfs"),
    (0x7472_6163, "tracefs"),
    (0x7363_6673, "securityfs"),
    (0x6265_6570, "configfs"),
    (0xde5e_81e4, "efivarfs"),
    (0x6e73_6673, "nsfs"),
];
const CGROUP: [u64; 2] = [0x27_e0eb, 0x6367_7270];
const TMPFS: u64 = 0x0102_1994;
const HUGETLBFS: u64 = 0x9584_58f6;

/// The host's files, as a plan looks at them.
#[derive(Debug, Default)]
pub struct Host {
    mounts: MountTable,
}

impl Host {
    /// Looks at a path, behind all symbolic links.
    ///
    /// # Errors
    /// What open(2), statx(2) and statfs(2) report.
    pub fn probe(&self, path: &Path) -> io::Result<SourceInfo> {
        let fd = open_path(path)?;
        let mut info = inspect(&fd)?;
        if info.kind == FileKind::Directory
            && matches!(info.file_system, FileSystem::Ordinary | FileSystem::Tmpfs { .. })
        {
            let real = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
            info.below = self.mounts.below(&real)?;
            if kubelet::empty_dir_of_sub_path(path).is_some() {
                info.shows = Some(self.mounts.root_of(info.place.mount)?);
            }
        }
        Ok(info)
    }
}

/// Looks at a path, behind all symbolic links.
///
/// # Errors
/// What open(2), statx(2) and statfs(2) report.
pub fn probe(path: &Path) -> io::Result<SourceInfo> {
    Host::default().probe(path)
}

/// Opens a path as a place, without access to what it holds.
pub(super) fn open_path(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::openat(
        CWD,
        path,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// Looks at an open path itself; what is below it is left out.
pub(super) fn inspect(fd: impl AsFd) -> io::Result<SourceInfo> {
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
    let stat = rustix::fs::statx(&fd, c"", AtFlags::EMPTY_PATH, wanted)?;
    let kind = match FileType::from_raw_mode(RawMode::from(stat.stx_mode)) {
        FileType::Directory => FileKind::Directory,
        FileType::CharacterDevice => FileKind::CharDevice,
        FileType::BlockDevice => FileKind::BlockDevice,
        FileType::Fifo => FileKind::Fifo,
        FileType::Socket => FileKind::Socket,
        FileType::RegularFile | FileType::Symlink | FileType::Unknown => FileKind::File,
    };
    let fs = rustix::fs::fstatfs(&fd)?;
    #[allow(clippy::cast_sign_loss, reason = "f_type is a bit pattern")]
    let magic = fs.f_type as u64;
    let file_system = match KERNEL_FILE_SYSTEMS.iter().find(|(number, _)| *number == magic) {
        Some((_, name)) => FileSystem::Kernel(name),
        None if CGROUP.contains(&magic) => FileSystem::Cgroup,
        None if magic == TMPFS => FileSystem::Tmpfs {
            bytes: fs.f_blocks.saturating_mul(u64::try_from(fs.f_bsize).unwrap_or(0)),
        },
        None if magic == HUGETLBFS => FileSystem::Huge {
            page_bytes: u64::try_from(fs.f_bsize).unwrap_or(0),
        },
        None => FileSystem::Ordinary,
    };
    Ok(SourceInfo {
        kind,
        file_system,
        place: Place {
            device: rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
            mount: stat.stx_mnt_id,
        },
        owner: Owner {
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            mode: u32::from(stat.stx_mode) & 0o7777,
        },
        number: (stat.stx_rdev_major, stat.stx_rdev_minor),
        mount_root: stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT),
        shows: None,
        below: 0,
    })
}

/// The size in bytes of the /dev/shm that a pod's containers share: of the tmpfs that the specification binds there,
/// 0 when it binds none.
#[must_use]
pub fn shm_bytes(spec: &Spec) -> u64 {
    let shm =
        spec.mounts().iter().flatten().find(|mount| {
            mount.destination() == Path::new(super::mounts::SHM) && super::mounts::is_bind(mount)
        });
    match shm.and_then(|mount| mount.source().as_deref()).map(probe) {
        Some(Ok(SourceInfo {
            kind: FileKind::Directory,
            file_system: FileSystem::Tmpfs { bytes },
            ..
        })) => bytes,
        _ => 0,
    }
}
