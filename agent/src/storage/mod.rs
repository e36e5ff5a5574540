//! Mount lists of the protocol: finds what is to be mounted in the guest, mounts a container's root file system, and
//! prepares its other mounts for the child to put in place.
//!
//! Everything here may block; it runs on threads of its own.

mod block;
mod files;
mod partition;
mod source;
mod volume;

use std::ffi::CStr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use protocol::agent::{Directory, Mount};
use rustix::fs::{Gid, Mode, OFlags, Uid, fchmod, fchown, mkdirat, open, openat};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

pub use self::files::FilesError;
use self::partition::Partitions;
use self::source::{Origin, c_string, explain, inside, invalid, make, of_namespaces};
use self::volume::Volumes;
use crate::container::child::{Step, Tree};
use crate::container::mount::{self, FileSystem, OptionError, Options};
use crate::container::target;

/// Where a container's root file system ends up, below its storage directory.
const ROOTFS: &str = "rootfs";
/// The virtio-fs tag that holds all shares (linux/virtio_fs.h: the device's name).
const TAG: &CStr = c"kata-rs";
/// Why something cannot be mounted.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// A mount list that contradicts itself.
    #[error("mount at {target:?}: {why}")]
    Invalid { target: String, why: String },
    /// An option word.
    #[error("mount at {target:?}: {source}")]
    Option { target: String, source: OptionError },
    /// The shares cannot be reached.
    #[error("the guest has no share of host directories: {0}")]
    NoShares(String),
    /// A share, or a path in it, is not there.
    #[error("share {name:?} has no {path:?} in the guest: {source}")]
    ShareMissing {
        name: String,
        path: String,
        source: Errno,
    },
    /// A path in the guest is not there.
    #[error("the guest has no {path}: {source}")]
    PathMissing { path: PathBuf, source: Errno },
    /// No block device with this serial.
    #[error("no block device with serial {serial:?} appeared in the guest: {why}")]
    BlockMissing { serial: String, why: String },
    /// A partition cannot come or go.
    #[error("the partitions of disk {serial:?}: cannot {what}: {source}")]
    Partition {
        what: String,
        serial: String,
        source: Errno,
    },
    /// The kernel does not mount it.
    #[error("cannot mount {what} at {target:?}: {why}")]
    Mount {
        what: String,
        target: String,
        why: String,
        source: Errno,
    },
    /// No container was made with this volume.
    #[error("the guest has no volume {0:?}")]
    VolumeMissing(String),
    /// A volume that cannot be.
    #[error("volume {name:?}: {why}")]
    Volume { name: String, why: String },
    /// A volume's files.
    #[error("volume {name:?}: {source}")]
    VolumeFiles { name: String, source: FilesError },
    /// A directory of the agent's own.
    #[error("cannot {what} {path}: {source}")]
    Directory {
        what: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
}

/// Where storage of all containers is.
#[derive(Debug)]
pub struct Layout {
    /// One directory per container.
    pub containers: PathBuf,
    /// Where the shares are mounted.
    pub shares: PathBuf,
    /// The pod's own file systems.
    pub volumes: Volumes,
    /// Whether they are mounted yet: the first share that is asked for does it.
    mounted: Mutex<bool>,
}

impl Layout {
    /// `mounted` says that the shares are at their place already.
    #[must_use]
    pub fn new(containers: PathBuf, shares: PathBuf, volumes: PathBuf, mounted: bool) -> Self {
        Self {
            containers,
            shares,
            volumes: Volumes::new(volumes),
            mounted: Mutex::new(mounted),
        }
    }

    fn mount_shares(&self) -> Result<(), StorageError> {
        let mut mounted = self.mounted.lock().unwrap_or_else(PoisonError::into_inner);
        if *mounted {
            return Ok(());
        }
        let mount = || {
            std::fs::create_dir_all(&self.shares).map_err(|error| error.to_string())?;
            let file_system = FileSystem {
                kind: c"virtiofs".into(),
                source: TAG.into(),
                options: Options::default(),
            };
            let tree = file_system.make().map_err(|error| explain(&error))?;
            let place = open(&self.shares, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
                .map_err(|e| e.to_string())?;
            mount::attach(tree.as_fd(), place.as_fd(), &[]).map_err(|errno| errno.to_string())
        };
        mount().map_err(StorageError::NoShares)?;
        *mounted = true;
        Ok(())
    }
}

/// Major and minor number of the disk with this serial; waits for one that is yet to come.
///
/// # Errors
/// [`StorageError::BlockMissing`], [`StorageError::PathMissing`].
pub fn device_number(serial: &str) -> Result<(u32, u32), StorageError> {
    let path = block::find(serial)?;
    let stat = rustix::fs::stat(&path).map_err(|source| StorageError::PathMissing {
        path: path.clone(),
        source,
    })?;
    Ok((rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)))
}

/// The mounts of one container in the agent's own tree.
#[derive(Debug)]
pub struct Storage {
    directory: PathBuf,
    fd: OwnedFd,
    /// In the order they were made.
    mounted: Vec<PathBuf>,
    partitions: Partitions,
}

impl Storage {
    /// Makes a container's directory and mounts its root file system there. A failure leaves nothing behind.
    ///
    /// # Errors
    /// [`StorageError`].
    pub fn prepare(layout: &Layout, id: &str, rootfs: &[Mount]) -> Result<Self, StorageError> {
        if rootfs
            .last()
            .is_none_or(|last| last.target.trim_matches('/') != ROOTFS)
        {
            return Err(StorageError::Invalid {
                target: rootfs.last().map(|last| last.target.clone()).unwrap_or_default(),
                why: format!("the last mount of a root file system must be at \"/{ROOTFS}\""),
            });
        }
        let directory = layout.containers.join(id);
        std::fs::create_dir_all(&directory).map_err(|source| StorageError::Directory {
            what: "make",
            path: directory.clone(),
            source,
        })?;
        let fd = open(
            &directory,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|errno| StorageError::Directory {
            what: "open",
            path: directory.clone(),
            source: errno.into(),
        })?;
        let mut this = Self {
            directory,
            fd,
            mounted: Vec::new(),
            partitions: Partitions::default(),
        };
        for mount in rootfs {
            if let Err(error) = this.mount(layout, mount) {
                // What is left behind would only repeat the same cause.
                let _ = this.remove();
                return Err(error);
            }
        }
        Ok(this)
    }

    /// Where the root file system is mounted.
    #[must_use]
    pub fn rootfs(&self) -> PathBuf {
        self.directory.join(ROOTFS)
    }

    fn mount(&mut self, layout: &Layout, mount: &Mount) -> Result<(), StorageError> {
        for directory in &mount.directories {
            self.make(mount, directory)?;
        }
        let found = source::find(layout, &self.directory, &mut self.partitions, mount)?;
        let tree = match found.tree {
            Origin::Bind(tree) => tree,
            Origin::New(file_system) => make(&file_system, &mount.target)?,
        };
        let path =
            inside(&mount.target).ok_or_else(|| invalid(mount, "leads out of the container's directory"))?;
        let target = target::open_or_create(
            self.fd.as_fd(),
            &c_string(mount, path.as_os_str().as_bytes())?,
            found.kind,
        )
        .and_then(|target| mount::attach(tree.as_fd(), target.as_fd(), &found.options.propagation));
        target.map_err(|source| StorageError::Mount {
            what: found.what,
            target: mount.target.clone(),
            why: source.to_string(),
            source,
        })?;
        self.mounted.push(self.directory.join(path));
        Ok(())
    }

    /// Makes a directory that a mount wants, unless it is there.
    fn make(&self, mount: &Mount, directory: &Directory) -> Result<(), StorageError> {
        let path = inside(&directory.path)
            .ok_or_else(|| invalid(mount, "a directory leads out of the container's"))?;
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(invalid(mount, "a directory has no name"));
        };
        let made = || {
            let parent = target::open(
                self.fd.as_fd(),
                &std::ffi::CString::new(parent.as_os_str().as_bytes())?,
            )?;
            let owner = directory.owner.get_or_default();
            let mode = Mode::from_raw_mode(owner.mode & 0o7777);
            match mkdirat(&parent, name, mode) {
                Err(Errno::EXIST) => return Ok(()),
                result => result?,
            }
            let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let made = openat(&parent, name, flags, Mode::empty())?;
            let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
            fchown(&made, Some(uid), Some(gid))?;
            // Whatever the umask left of it.
            Ok::<_, std::io::Error>(fchmod(&made, mode)?)
        };
        made().map_err(|source| StorageError::Directory {
            what: "make",
            path: self.directory.join(path),
            source,
        })
    }

    /// Prepares the mounts that the child is to put into the container, in order.
    ///
    /// # Errors
    /// [`StorageError`].
    pub fn container_mounts(&mut self, layout: &Layout, mounts: &[Mount]) -> Result<Vec<Step>, StorageError> {
        mounts
            .iter()
            .map(|mount| {
                if !mount.target.starts_with('/') || mount.target.trim_matches('/').is_empty() {
                    return Err(invalid(
                        mount,
                        "the target must be an absolute path below the container's root",
                    ));
                }
                let found = source::find(layout, &self.directory, &mut self.partitions, mount)?;
                let tree = match found.tree {
                    Origin::Bind(tree) => Tree::Detached(tree.into()),
                    Origin::New(file_system) if of_namespaces(&file_system) => Tree::New(file_system),
                    Origin::New(file_system) => Tree::Detached(make(&file_system, &mount.target)?.into()),
                };
                Ok(Step::Mount {
                    tree,
                    target: c_string(mount, mount.target.as_bytes())?,
                    kind: found.kind,
                    propagation: found.options.propagation,
                })
            })
            .collect()
    }

    /// Unmounts everything, last first, and removes the directory. Writes of block devices have reached them then.
    ///
    /// # Errors
    /// The first [`StorageError`]; the rest is removed all the same.
    pub fn remove(&mut self) -> Result<(), StorageError> {
        let mut results = Vec::new();
        let fail = |path: &Path, what, source: std::io::Error| StorageError::Directory {
            what,
            path: path.to_path_buf(),
            source,
        };
        for path in self.mounted.drain(..).rev() {
            let result = match unmount(&path, UnmountFlags::NOFOLLOW) {
                // Something still has it open; it goes when that does.
                Err(Errno::BUSY) => unmount(&path, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH),
                result => result,
            };
            results.push(result.map_err(|errno| fail(&path, "unmount", errno.into())));
        }
        results.push(self.partitions.remove());
        let result = std::fs::symlink_metadata(&self.directory)
            .and_then(|directory| remove_tree(&self.directory, directory.dev()));
        results.push(result.map_err(|error| fail(&self.directory, "remove", error)));
        results.into_iter().collect()
    }
}

/// Removes a directory and what is in it, but never anything of another file system: a mount that could not be
/// undone keeps its content.
fn remove_tree(directory: &Path, device: u64) -> std::io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let found = std::fs::symlink_metadata(&path)?;
        if found.dev() != device {
            return Err(Errno::BUSY.into());
        }
        if found.is_dir() {
            remove_tree(&path, device)?;
        } else {
            std::fs::remove_file(&path)?;
        }
    }
    std::fs::remove_dir(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_must_end_at_the_root_file_system() {
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::new(
            directory.path().join("c"),
            directory.path().join("s"),
            directory.path().join("v"),
            true,
        );
        let mount = Mount {
            target: "/other".into(),
            ..Default::default()
        };
        let error = Storage::prepare(&layout, "x", &[mount]).unwrap_err().to_string();
        assert!(error.contains("must be at \"/rootfs\""), "{error}");
        assert!(Storage::prepare(&layout, "x", &[]).is_err());
    }
}
