//! Snapshots of small directories: what the guest's copy of a configMap, a secret or a projected volume is made from.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use protocol::agent::{FileTree, Volume, file_tree, volume};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, StatxFlags, StatxTimestamp};
use rustix::io::Errno;

use super::error::StorageError;
use super::plan::ReadOnly;
use super::probe::{Owner, Place};
use super::share;

/// Has the directory of the volume with this name watched.
pub type Watch<'a> = &'a dyn Fn(&str, &Arc<OwnedFd>) -> io::Result<()>;

/// The most that one message to the agent holds of files, all volumes of a container together: half of what ttrpc
/// carries. Kubernetes allows 1 MiB in a configMap or secret.
pub(crate) const MAX_BYTES: usize = 2 << 20;
/// The most files, directories and links of one volume.
const MAX_ENTRIES: usize = 1024;
const MAX_DEPTH: usize = 8;
/// How often a directory that changes while it is read is read again.
const ATTEMPTS: u32 = 3;
/// The link that kubelet renames to replace the content (AtomicWriter).
const CURRENT: &str = "..data";

/// Why there is no snapshot.
#[derive(Debug)]
pub(crate) enum Unfit {
    /// It is larger, or holds other things, than a copy is made of.
    Shape,
    /// It cannot be read.
    Io(io::Error),
}

impl From<Errno> for Unfit {
    fn from(errno: Errno) -> Self {
        Self::Io(errno.into())
    }
}

/// A directory of small files on the host, and what was found in it.
#[derive(Clone, Debug)]
pub struct FilesVolume {
    /// The volume's name in the pod.
    pub name: String,
    /// The directory, as the root of a detached mount: it keeps nobody from unmounting the host's.
    pub directory: Arc<OwnedFd>,
    /// What it held.
    pub tree: FileTree,
}

impl FilesVolume {
    /// Opens a directory and has it watched, then reads it. `None` when it is not fit for a copy: it holds more than
    /// `room` bytes or cannot be watched.
    pub(super) fn open(
        name: &str,
        source: &Path,
        place: Place,
        room: usize,
        watch: Watch<'_>,
    ) -> Result<Option<Self>, StorageError> {
        let directory = share::clone_directory(source, Some(place), false, ReadOnly::Recursive, false)?;
        let directory = Arc::new(directory);
        if let Err(error) = watch(name, &directory) {
            tracing::warn!(volume = name, %error, "cannot be watched: changes raise no events in the guest");
            return Ok(None);
        }
        match read(&directory, room) {
            Ok(tree) => Ok(Some(Self {
                name: name.to_owned(),
                directory,
                tree,
            })),
            Err(Unfit::Shape) => Ok(None),
            Err(Unfit::Io(cause)) => Err(StorageError::opening("the files of the volume", source, cause)),
        }
    }

    /// In the agent's words.
    #[must_use]
    pub fn to_agent(&self) -> Volume {
        in_agents_words(&self.name, self.tree.clone())
    }
}

/// A volume with these files in the agent's words.
pub(crate) fn in_agents_words(name: &str, tree: FileTree) -> Volume {
    Volume {
        name: name.to_owned(),
        content: Some(volume::Content::Files(tree)),
        ..Default::default()
    }
}

/// How many bytes of files a tree holds.
pub(crate) fn size(tree: &FileTree) -> usize {
    tree.files
        .iter()
        .map(|file| file.path.len() + file.content.len())
        .sum()
}

/// Reads a directory, as it was at one moment as far as kubelet writes it.
pub(crate) fn read(directory: &OwnedFd, room: usize) -> Result<FileTree, Unfit> {
    // Taken before anything is read: what has a higher number was read later, or a change of it is heard of.
    static VERSIONS: AtomicU64 = AtomicU64::new(1);
    let version = VERSIONS.fetch_add(1, Ordering::SeqCst);
    let current = || rustix::fs::readlinkat(directory, CURRENT, Vec::new()).ok();
    let mut attempt = 1;
    loop {
        let before = current();
        let mut reader = Reader {
            tree: FileTree {
                version,
                ..Default::default()
            },
            room,
        };
        let result = reader.root(directory);
        let changed = before != current()
            || matches!(&result, Err(Unfit::Io(error)) if error.kind() == io::ErrorKind::NotFound);
        match result {
            _ if changed && attempt < ATTEMPTS => attempt += 1,
            Ok(()) => return Ok(reader.tree),
            Err(error) => return Err(error),
        }
    }
}

struct Reader {
    tree: FileTree,
    room: usize,
}

impl Reader {
    fn root(&mut self, directory: &OwnedFd) -> Result<(), Unfit> {
        let opened = rustix::fs::openat(
            directory,
            c".",
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let (owner, ..) = look(&opened, Path::new(""))?;
        self.tree.root = Some(owner.to_agent()).into();
        self.directory(&opened, Path::new(""), 1)
    }

    fn directory(&mut self, directory: &OwnedFd, path: &Path, depth: usize) -> Result<(), Unfit> {
        for entry in Dir::read_from(directory)? {
            let entry = entry?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let name = Path::new(std::ffi::OsStr::from_bytes(name.to_bytes()));
            self.entry(directory, name, &path.join(name), depth)?;
        }
        Ok(())
    }

    fn entry(&mut self, directory: &OwnedFd, name: &Path, path: &Path, depth: usize) -> Result<(), Unfit> {
        if self.tree.files.len() == MAX_ENTRIES || depth > MAX_DEPTH {
            return Err(Unfit::Shape);
        }
        let (owner, kind, modified_ns) = look(directory, name)?;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let mut below = None;
        let content = match kind {
            FileType::Symlink => rustix::fs::readlinkat(directory, name, Vec::new())?.into_bytes(),
            FileType::Directory => {
                below = Some(rustix::fs::openat(
                    directory,
                    name,
                    flags | OFlags::DIRECTORY,
                    Mode::empty(),
                )?);
                Vec::new()
            }
            FileType::RegularFile => {
                let file = rustix::fs::openat(directory, name, flags, Mode::empty())?;
                let mut content = Vec::new();
                let limit = u64::try_from(self.room).unwrap_or(u64::MAX).saturating_add(1);
                let mut file = io::Read::take(std::fs::File::from(file), limit);
                io::Read::read_to_end(&mut file, &mut content).map_err(Unfit::Io)?;
                content
            }
            _ => return Err(Unfit::Shape),
        };
        let path_bytes = path.as_os_str().as_bytes().to_vec();
        self.room = self
            .room
            .checked_sub(path_bytes.len() + content.len())
            .ok_or(Unfit::Shape)?;
        let mut wanted = owner.to_agent();
        wanted.mode |= kind.as_raw_mode();
        self.tree.files.push(file_tree::File {
            path: path_bytes,
            owner: Some(wanted).into(),
            modified_ns,
            content,
            ..Default::default()
        });
        match below {
            Some(below) => self.directory(&below, path, depth + 1),
            None => Ok(()),
        }
    }
}

/// Owner, kind and time of a name, or of the directory itself when the name is empty.
fn look(directory: impl AsFd, name: &Path) -> Result<(Owner, FileType, i64), Errno> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::EMPTY_PATH;
    let stat = rustix::fs::statx(directory, name, flags, StatxFlags::BASIC_STATS)?;
    let owner = Owner {
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        mode: u32::from(stat.stx_mode) & 0o7777,
    };
    let StatxTimestamp { tv_sec, tv_nsec, .. } = stat.stx_mtime;
    let modified = tv_sec
        .saturating_mul(1_000_000_000)
        .saturating_add(i64::from(tv_nsec));
    Ok((owner, FileType::from_raw_mode(u32::from(stat.stx_mode)), modified))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn open(path: &Path) -> OwnedFd {
        rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    #[test]
    fn links_stay_links_and_directories_come_first() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        fs::create_dir(path.join("..1")).unwrap();
        fs::write(path.join("..1/key\n"), "value").unwrap();
        fs::set_permissions(path.join("..1/key\n"), fs::Permissions::from_mode(0o640)).unwrap();
        symlink("..1", path.join("..data")).unwrap();
        symlink("..data/key\n", path.join("key\n")).unwrap();
        let tree = read(&open(path), MAX_BYTES).unwrap();
        let place = |wanted: &str| {
            let found = tree.files.iter().position(|file| file.path == wanted.as_bytes());
            found.unwrap_or_else(|| panic!("{wanted} is missing"))
        };
        assert!(place("..1") < place("..1/key\n"));
        let file = &tree.files[place("..1/key\n")];
        assert_eq!(
            (file.content.as_slice(), file.owner.mode),
            (&b"value"[..], 0o100_640)
        );
        let link = &tree.files[place("key\n")];
        assert_eq!(link.content, b"..data/key\n");
        assert_eq!(link.owner.mode & 0o170_000, 0o120_000);
        assert!(read(&open(path), MAX_BYTES).unwrap().version > tree.version);
    }

    #[test]
    fn what_is_too_large_or_odd_is_not_copied() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        fs::write(path.join("file"), [0; 100]).unwrap();
        assert!(read(&open(path), 104).is_ok());
        assert!(matches!(read(&open(path), 103), Err(Unfit::Shape)));
        for number in 0..=MAX_ENTRIES {
            fs::write(path.join(number.to_string()), "").unwrap();
        }
        assert!(matches!(read(&open(path), MAX_BYTES), Err(Unfit::Shape)));

        let odd = tempfile::tempdir().unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            odd.path().join("fifo"),
            FileType::Fifo,
            Mode::RUSR,
            0,
        )
        .unwrap();
        assert!(matches!(read(&open(odd.path()), MAX_BYTES), Err(Unfit::Shape)));
    }
}
