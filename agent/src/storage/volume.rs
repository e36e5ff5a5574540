//! Volumes of the pod: file systems in the guest's memory that its containers share, from the first container that
//! names one until the guest ends.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::CString;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use protocol::agent::volume::Content;
use protocol::agent::{Owner, Volume, VolumeSource};
use rustix::fs::{Gid, Mode, OFlags, Uid, chmodat, chownat, open};
use rustix::io::Errno;

use super::files;
use super::source::make;
use super::{StorageError, inside};
use crate::container::mount::{self, FileSystem, Options};
use crate::container::target::{self, Kind};

/// Longest name.
const MAX_NAME: usize = 64;
/// More than any pod has.
const MAX_VOLUMES: usize = 256;

/// The volumes that exist.
#[derive(Debug)]
pub struct Volumes {
    directory: PathBuf,
    known: Mutex<HashMap<String, Held>>,
}

#[derive(Debug)]
struct Held {
    root: OwnedFd,
    /// Of the files that it holds; 0 for the containers' own.
    version: u64,
}

impl Volumes {
    /// Volumes will be mounted below `directory`.
    #[must_use]
    pub fn new(directory: PathBuf) -> Self {
        Self {
            directory,
            known: Mutex::default(),
        }
    }

    /// Makes volumes that do not exist, and brings those with files up to date.
    ///
    /// # Errors
    /// [`StorageError`] for the first that cannot be made; those before it stay.
    pub fn provide(&self, volumes: &[Volume]) -> Result<(), StorageError> {
        volumes.iter().try_for_each(|volume| self.put(volume, true))
    }

    /// Brings the files of a volume up to date.
    ///
    /// # Errors
    /// [`StorageError::VolumeMissing`] when there is no such volume.
    pub fn update(&self, volume: &Volume) -> Result<(), StorageError> {
        self.put(volume, false)
    }

    fn put(&self, volume: &Volume, make: bool) -> Result<(), StorageError> {
        let name = &volume.name;
        let refuse = |why: &str| StorageError::Volume {
            name: name.clone(),
            why: why.to_owned(),
        };
        if name.is_empty() || name.len() > MAX_NAME || name.starts_with('.') || name.contains(['/', '\0']) {
            return Err(refuse("its name is not one path component of at most 64 bytes"));
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let count = known.len();
        let held = match known.entry(name.clone()) {
            Entry::Occupied(held) => held.into_mut(),
            Entry::Vacant(_) if !make => return Err(StorageError::VolumeMissing(name.clone())),
            Entry::Vacant(_) if count >= MAX_VOLUMES => return Err(refuse("there are too many")),
            Entry::Vacant(vacant) => vacant.insert(Held {
                root: self.mount(volume)?,
                version: 0,
            }),
        };
        if let Some(Content::Files(tree)) = &volume.content
            && tree.version > held.version
        {
            files::bring_up_to_date(held.root.as_fd(), tree).map_err(|source| StorageError::VolumeFiles {
                name: name.clone(),
                source,
            })?;
            held.version = tree.version;
        }
        Ok(())
    }

    /// Mounts a new tmpfs, or one of huge pages; gives its root.
    fn mount(&self, volume: &Volume) -> Result<OwnedFd, StorageError> {
        let (size, huge, owner) = match &volume.content {
            Some(Content::Empty(empty)) => (empty.size_bytes, empty.huge_page_bytes, &empty.root),
            Some(Content::Files(tree)) => (0, 0, &tree.root),
            _ => {
                return Err(StorageError::Volume {
                    name: volume.name.clone(),
                    why: "its content is missing or of a newer protocol".into(),
                });
            }
        };
        let mut words = vec![
            format!("mode={:o}", owner.mode & 0o7777),
            format!("uid={}", owner.uid),
            format!("gid={}", owner.gid),
        ];
        if size != 0 {
            words.push(format!("size={size}"));
        }
        let kind = if huge == 0 { c"tmpfs" } else { c"hugetlbfs" };
        if huge != 0 {
            words.push(format!("pagesize={huge}"));
        }
        let path = self.path(&volume.name);
        let target = path.display().to_string();
        let options: Options = mount::parse(&words, false).map_err(|source| StorageError::Option {
            target: target.clone(),
            source,
        })?;
        let file_system = FileSystem {
            kind: kind.into(),
            source: kind.into(),
            options,
        };
        let tree = make(&file_system, &target)?;
        std::fs::create_dir_all(&path).map_err(|source| StorageError::Directory {
            what: "make",
            path: path.clone(),
            source,
        })?;
        let failed = |source: Errno| StorageError::Mount {
            what: kind.to_string_lossy().into_owned(),
            target: target.clone(),
            why: source.to_string(),
            source,
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let place = open(&path, flags, Mode::empty()).map_err(failed)?;
        mount::attach(tree.as_fd(), place.as_fd(), &[]).map_err(failed)?;
        open(&path, flags, Mode::empty()).map_err(failed)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Opens a path of a volume, making it when that is asked for.
    ///
    /// # Errors
    /// [`StorageError`].
    pub fn open(&self, source: &VolumeSource) -> Result<OwnedFd, StorageError> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let held = known
            .get(&source.name)
            .ok_or_else(|| StorageError::VolumeMissing(source.name.clone()))?;
        let failed = |errno| StorageError::ShareMissing {
            name: source.name.clone(),
            path: source.path.clone(),
            source: errno,
        };
        let path = inside(&source.path).ok_or_else(|| failed(Errno::XDEV))?;
        let root = held.root.as_fd();
        let open = |path: &Path| target::open(root, &c_path(path)?);
        match (open(path), source.directory.as_ref()) {
            (Err(Errno::NOENT), Some(owner)) => make_directories(&held.root, path, owner)
                .and_then(|()| open(path))
                .map_err(failed),
            (result, _) => result.map_err(failed),
        }
    }
}

fn c_path(path: &Path) -> Result<CString, Errno> {
    CString::new(path.as_os_str().as_encoded_bytes()).map_err(|_| Errno::INVAL)
}

/// Makes the missing directories of a path, all with this owner and mode, as kubelet does on the host.
fn make_directories(root: &OwnedFd, path: &Path, owner: &Owner) -> Result<(), Errno> {
    let mut done = PathBuf::new();
    for name in path {
        let parent = target::open(root.as_fd(), &c_path(&done)?)?;
        done.push(name);
        if target::open(root.as_fd(), &c_path(&done)?).is_ok() {
            continue;
        }
        target::open_or_create(root.as_fd(), &c_path(&done)?, Kind::Directory)?;
        let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
        let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
        chownat(&parent, name, Some(uid), Some(gid), flags)?;
        chmodat(
            &parent,
            name,
            Mode::from_raw_mode(owner.mode & 0o7777),
            rustix::fs::AtFlags::empty(),
        )?;
    }
    Ok(())
}
