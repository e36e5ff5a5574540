//! The plan of a container's storage: the types, and how each form of root file system is planned.
//!
//! No system call is made here: what must be known of the host comes through the probe.

use std::io;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::Spec;
use protocol::vmm::CachePolicy;

use super::devices::DeviceDisk;
use super::error::StorageError;
use super::options;
use super::probe::{FileKind, Owner, Place, SourceInfo};
use super::template::is_template;
use crate::api::RootfsMount;

/// Where the agent wants the root file system (agent.proto, `CreateContainerRequest.rootfs`).
pub(super) const ROOTFS_TARGET: &str = "/rootfs";

/// What is supported, for errors.
pub(super) const SUPPORTED: &str = "use a snapshotter that gives overlay, bind, ext4, xfs or erofs mounts (overlayfs, \
                                    native, devmapper, blockfile, erofs), or a directory as `root.path`";

/// What a plan is made for.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// The container's id: makes the names of its shares.
    pub container_id: &'a str,
    /// The bundle directory, absolute: relative paths of the specification start there.
    pub bundle: &'a Path,
    /// Where the guest has the /dev/shm that the pod's containers share; `None`: each has its own.
    pub pod_shm: Option<&'a str>,
}

/// How deep a mount is read-only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadOnly {
    /// It is writable.
    No,
    /// The mount itself, not the mounts below it.
    Top,
    /// With all mounts below it.
    Recursive,
}

/// An overlay file system (Documentation/filesystems/overlayfs.rst).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overlay {
    /// Lower directories, topmost first.
    pub lower: Vec<PathBuf>,
    /// Upper and work directory; without them the overlay is read-only.
    pub upper: Option<(PathBuf, PathBuf)>,
    /// The file system's other options, `key` or `key=value`.
    pub options: Vec<String>,
    /// Whether the mount is read-only.
    pub read_only: bool,
}

/// One file of a share of files. It appears there under its position as name: `0`, `1`, …
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileBind {
    /// The file on the host.
    pub source: PathBuf,
    /// Which file that was when it was planned.
    pub place: Place,
    /// Whether the guest may only read it.
    pub read_only: bool,
}

/// One thing that the host opens for the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostStep {
    /// An overlay, mounted on the host and shared.
    Overlay {
        /// The share's name.
        share: String,
        /// What to mount.
        overlay: Overlay,
    },
    /// A directory, shared.
    Directory {
        /// The share's name.
        share: String,
        /// The directory on the host.
        source: PathBuf,
        /// Whether mounts below it are seen too.
        recursive: bool,
        /// Whether the guest may only read.
        read_only: ReadOnly,
        /// Whether what is mounted or unmounted below it on the host is in the share too.
        receive_mounts: bool,
        /// How the guest may cache.
        cache: CachePolicy,
        /// Which directory that was when it was planned, if it must still be the same.
        place: Option<Place>,
        /// Whether all containers of the pod that plan the same share have one and the same: its name says all about
        /// it then.
        pooled: bool,
    },
    /// A directory of small files that the host replaces, for a volume with a copy of them.
    Volume {
        /// The volume's name.
        volume: String,
        /// The directory on the host.
        source: PathBuf,
        /// Which directory that was when it was planned.
        place: Place,
    },
    /// Single files, gathered in one share.
    Files {
        /// The share's name.
        share: String,
        /// The files, by position.
        files: Vec<FileBind>,
    },
    /// One disk for the guest.
    Disk {
        /// What it consists of, one behind the other.
        parts: Vec<DiskPart>,
    },
    /// A block device of the host, by number: one disk for the guest, which the pod's containers have in common.
    Device {
        /// Major and minor number.
        number: (u32, u32),
        /// Whether the guest may only read.
        read_only: bool,
    },
    /// Nothing is opened, but a directory must be empty: the guest has something else in its place.
    Unseen {
        /// The directory on the host.
        directory: PathBuf,
    },
}

/// A part of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskPart {
    /// The device or file on the host.
    pub source: PathBuf,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// What must be in it.
    pub content: Content,
}

/// What a part of a disk must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Anything.
    Any,
    /// A file system of this type.
    FileSystem(String),
    /// An ext4 file system, made when there is no such file.
    Made(NewImage),
}

/// How an image is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewImage {
    /// Its size in bytes.
    pub bytes: u64,
    /// The file system's UUID; a random one when absent.
    pub uuid: Option<String>,
}

/// A directory that the guest makes for a mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directory {
    /// Relative to the container's storage directory.
    pub path: String,
    /// Whose it is, and its permission bits.
    pub owner: Owner,
}

/// Where a guest's mount comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MountSource {
    /// A path in a share.
    Share {
        /// The share's name.
        name: String,
        /// Relative to its root; empty for the root.
        path: String,
    },
    /// A part of a disk.
    Block {
        /// Which of the plan's disks.
        disk: usize,
        /// Which of its parts.
        part: usize,
        /// The file system on it.
        file_system: String,
        /// Parts of the same disk that the file system has as further devices, in order.
        devices: Vec<usize>,
    },
    /// A file system of the guest's kernel.
    Kernel {
        /// Its type.
        file_system: String,
    },
    /// A path in a volume of the pod.
    Volume {
        /// The volume's name.
        name: String,
        /// Relative to its root; empty for the root.
        path: String,
        /// Makes the path as a directory when it does not exist.
        directory: Option<Owner>,
    },
    /// A path in the guest's own tree.
    Guest {
        /// The path: absolute, or below the container's storage directory.
        path: String,
    },
}

/// One mount that the agent makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestMount {
    /// Where it comes from.
    pub source: MountSource,
    /// Where it goes, absolute.
    pub target: String,
    /// mount(8) option words.
    pub options: Vec<String>,
    /// What the guest makes before.
    pub directories: Vec<Directory>,
}

/// A volume in the guest's memory that the pod's containers fill themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryVolume {
    /// Its name in the pod.
    pub name: String,
    /// How much it may hold, in bytes; 0 for no limit of its own.
    pub bytes: u64,
    /// The size of its pages in bytes, when it is made of huge ones; otherwise 0.
    pub huge_page_bytes: u64,
    /// Of its root.
    pub root: Owner,
}

/// What a container's storage is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// What the host opens, in this order.
    pub host: Vec<HostStep>,
    /// How the guest makes the root file system.
    pub rootfs: Vec<GuestMount>,
    /// What the guest mounts in it, in the specification's order.
    pub mounts: Vec<GuestMount>,
    /// Volumes of the pod that the mounts name, without those that hold the host's files.
    pub volumes: Vec<MemoryVolume>,
    /// Block devices that the specification names by number.
    pub devices: Vec<DeviceDisk>,
    /// Whether the root file system is read-only once the mounts are made.
    pub read_only_rootfs: bool,
}

/// Looks at a path on the host; see [`probe`](super::probe()).
pub(super) type Probe<'a> = &'a dyn Fn(&Path) -> io::Result<SourceInfo>;

impl Plan {
    /// Plans the storage of a container with this specification and these root file system mounts. `probe` says what
    /// a path on the host is: [`probe`](super::probe()) asks the kernel.
    ///
    /// # Errors
    /// [`StorageError`] that names the mount which is malformed, not supported, or whose source is missing.
    pub fn new(
        context: Context<'_>,
        spec: &Spec,
        rootfs: &[RootfsMount],
        probe: Probe<'_>,
    ) -> Result<Self, StorageError> {
        let id = context.container_id;
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_.+-".contains(&byte);
        if id.is_empty() || id.starts_with('.') || id.len() > 200 || !id.bytes().all(allowed) {
            return Err(StorageError::ContainerId(id.to_owned()));
        }
        let mut plan = Self {
            host: Vec::new(),
            rootfs: Vec::new(),
            mounts: Vec::new(),
            volumes: Vec::new(),
            devices: Vec::new(),
            read_only_rootfs: spec
                .root()
                .as_ref()
                .and_then(|root| root.readonly())
                .unwrap_or(false),
        };
        match rootfs {
            [] => plan.rootfs_from_directory(context, spec, probe)?,
            [mount] if mount.is_shared() => plan.rootfs_from_mount(context, mount, probe)?,
            list => plan.rootfs_from_list(context, list)?,
        }
        plan.add_devices(spec)?;
        plan.add_mounts(context, spec, probe)?;
        Ok(plan)
    }

    /// Gives a share the name under which the guest has it.
    pub fn rename_share(&mut self, from: &str, to: &str) {
        for mount in &mut self.mounts {
            if let MountSource::Share { name, .. } = &mut mount.source
                && name == from
            {
                to.clone_into(name);
            }
        }
    }

    /// Mounts the share of the same name where a volume was planned.
    pub(super) fn share_instead_of(&mut self, volume: &str) {
        for mount in &mut self.mounts {
            if matches!(&mount.source, MountSource::Volume { name, .. } if name == volume) {
                mount.source = MountSource::Share {
                    name: volume.to_owned(),
                    path: String::new(),
                };
            }
        }
    }

    /// `root.path` of the specification. It belongs to the caller, who may change it while the container runs.
    fn rootfs_from_directory(
        &mut self,
        context: Context<'_>,
        spec: &Spec,
        probe: Probe<'_>,
    ) -> Result<(), StorageError> {
        let path = match spec.root() {
            Some(root) if !root.path().as_os_str().is_empty() => root.path(),
            _ => return Err(StorageError::NoRootfs),
        };
        let source = clean(&context.bundle.join(path));
        must_be_directory(&source, probe)?;
        self.share_rootfs(context, Vec::new(), |share| HostStep::Directory {
            share,
            source,
            recursive: true,
            read_only: ReadOnly::No,
            receive_mounts: false,
            cache: CachePolicy::Shared,
            place: None,
            pooled: false,
        });
        Ok(())
    }

    fn rootfs_from_mount(
        &mut self,
        context: Context<'_>,
        mount: &RootfsMount,
        probe: Probe<'_>,
    ) -> Result<(), StorageError> {
        if let Some(option) = mount
            .options
            .iter()
            .find(|word| is_template(word) || word.starts_with("X-containerd."))
        {
            return Err(StorageError::Option {
                what: mount.kind.clone(),
                option: option.clone(),
                reason: "a mount of this type has nothing to fill in or to make",
            });
        }
        let read_only = options::read_only(&mount.options) != ReadOnly::No;
        let flags: Vec<String> = if read_only {
            vec!["ro".to_owned()]
        } else {
            Vec::new()
        };
        if mount.kind == "overlay" {
            let overlay = Overlay::parse(&mount.options)?;
            self.share_rootfs(context, flags, |share| HostStep::Overlay { share, overlay });
            return Ok(());
        }
        let source = clean(&context.bundle.join(&mount.source));
        must_be_directory(&source, probe)?;
        let recursive = mount.options.iter().any(|word| word == "rbind");
        self.share_rootfs(context, flags, |share| HostStep::Directory {
            share,
            source,
            recursive,
            read_only: if read_only {
                ReadOnly::Recursive
            } else {
                ReadOnly::No
            },
            receive_mounts: false,
            cache: CachePolicy::Exclusive,
            place: None,
            pooled: false,
        });
        Ok(())
    }

    /// How many disks there are so far.
    pub(super) fn disks(&self) -> usize {
        let is_disk = |step: &&HostStep| matches!(step, HostStep::Disk { .. } | HostStep::Device { .. });
        self.host.iter().filter(is_disk).count()
    }

    fn share_rootfs(
        &mut self,
        context: Context<'_>,
        mut flags: Vec<String>,
        step: impl FnOnce(String) -> HostStep,
    ) {
        let name = format!("{}.rootfs", context.container_id);
        self.host.push(step(name.clone()));
        flags.insert(0, "rbind".to_owned());
        self.rootfs.push(GuestMount {
            source: MountSource::Share {
                name,
                path: String::new(),
            },
            target: ROOTFS_TARGET.to_owned(),
            options: flags,
            directories: Vec::new(),
        });
    }
}

impl RootfsMount {
    /// Whether the host mounts it and shares it: an overlay or a directory, alone and on `/`.
    fn is_shared(&self) -> bool {
        let binds = self.options.iter().any(|word| options::is_bind(word));
        let kind = match self.kind.as_str() {
            "overlay" | "bind" => true,
            "" | "none" => binds,
            _ => false,
        };
        kind && matches!(self.target.as_str(), "" | "/")
    }
}

impl Overlay {
    /// Reads the options of an overlay mount as mount(8) would get them.
    pub(super) fn parse(options: &[String]) -> Result<Self, StorageError> {
        let refuse = |option: &str, reason| StorageError::Option {
            what: "overlay".to_owned(),
            option: option.to_owned(),
            reason,
        };
        let mut overlay = Self {
            read_only: options::read_only(options) != ReadOnly::No,
            ..Self::default()
        };
        let (mut upper, mut work) = (None, None);
        for word in options {
            match word.split_once('=') {
                Some(("lowerdir", list)) => {
                    overlay.lower =
                        split_lower(list).ok_or_else(|| refuse(word, "a directory's path is empty"))?;
                }
                Some(("upperdir", path)) => upper = Some(PathBuf::from(path)),
                Some(("workdir", path)) => work = Some(PathBuf::from(path)),
                _ if options::is_flag(word) || options::is_propagation(word) || options::is_comment(word) => {
                }
                _ => overlay.options.push(word.clone()),
            }
        }
        if overlay.lower.is_empty() {
            return Err(refuse("lowerdir", "it is missing"));
        }
        overlay.upper = match (upper, work) {
            (Some(upper), Some(work)) => Some((upper, work)),
            (None, None) => None,
            (Some(_), None) => return Err(refuse("workdir", "it is missing, and upperdir is given")),
            (None, Some(_)) => return Err(refuse("upperdir", "it is missing, and workdir is given")),
        };
        Ok(overlay)
    }
}

/// Splits a list of lower directories at its colons; `\:` is a colon of a path (overlayfs.rst, "Multiple lower
/// layers"). `None` when a path is empty, as in the `::` of data-only layers, which are not supported.
fn split_lower(list: &str) -> Option<Vec<PathBuf>> {
    let mut paths = vec![String::new()];
    let mut characters = list.chars();
    while let Some(character) = characters.next() {
        let path = paths.last_mut()?;
        match character {
            '\\' => path.push(characters.next()?),
            ':' => paths.push(String::new()),
            other => path.push(other),
        }
    }
    let paths: Vec<PathBuf> = paths.into_iter().map(PathBuf::from).collect();
    paths
        .iter()
        .all(|path| !path.as_os_str().is_empty())
        .then_some(paths)
}

fn must_be_directory(path: &Path, probe: Probe<'_>) -> Result<(), StorageError> {
    const WHAT: &str = "the root file system";
    match probe(path) {
        Ok(info) if info.kind == FileKind::Directory => Ok(()),
        Ok(_) => Err(StorageError::Kind {
            what: WHAT,
            path: path.to_owned(),
            expected: "a directory",
        }),
        Err(cause) => Err(StorageError::opening(WHAT, path, cause)),
    }
}

/// A path without `.` and doubled slashes. `..` stays: what it leads to is for the kernel to say.
pub(super) fn clean(path: &Path) -> PathBuf {
    path.components()
        .filter(|part| *part != Component::CurDir)
        .collect()
}
