//! The plan of a container's storage: the types, and how each form of root file system is planned.
//!
//! No system call is made here: what must be known of the host comes through the probe.

use std::io;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::Spec;
use protocol::agent;
use protocol::vmm::CachePolicy;

use super::error::StorageError;
use super::options;
use super::probe::{FileKind, Owner, Place, SourceInfo};
use crate::api::RootfsMount;

/// Where the agent wants the root file system (agent.proto, `CreateContainerRequest.rootfs`).
const ROOTFS_TARGET: &str = "/rootfs";

/// File systems on a block device that the guest's kernel can mount.
const BLOCK_FILE_SYSTEMS: [&str; 3] = ["ext4", "xfs", "erofs"];

/// What is supported, for errors.
const SUPPORTED: &str = "use a snapshotter that gives one overlay, bind, ext4, xfs or erofs mount (overlayfs, native, \
                         devmapper, blockfile), or a directory as `root.path`";

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
        /// Whether an unmount below it on the host is one in the share too.
        receive_unmounts: bool,
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
    /// A block device or an image file.
    Block {
        /// The device or file on the host.
        source: PathBuf,
        /// Whether the guest may only read.
        read_only: bool,
    },
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
    /// A block device.
    Block {
        /// Which of the plan's block devices.
        index: usize,
        /// The file system on it.
        file_system: String,
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
        /// The path, absolute.
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
}

/// A volume in the guest's memory that the pod's containers fill themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryVolume {
    /// Its name in the pod.
    pub name: String,
    /// How much it may hold, in bytes.
    pub bytes: u64,
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
            read_only_rootfs: spec
                .root()
                .as_ref()
                .and_then(|root| root.readonly())
                .unwrap_or(false),
        };
        match rootfs {
            [] => plan.rootfs_from_directory(context, spec, probe)?,
            [mount] if matches!(mount.target.as_str(), "" | "/") => {
                plan.rootfs_from_mount(context, mount, probe)?;
            }
            several => {
                let kinds: Vec<&str> = several.iter().map(|mount| mount.kind.as_str()).collect();
                return Err(StorageError::RootfsKind {
                    kind: kinds.join(" + "),
                    cure: SUPPORTED,
                });
            }
        }
        plan.add_mounts(context, spec, probe)?;
        Ok(plan)
    }

    /// The root file system's mounts in the agent's words. `serials[n]` is the serial of the n-th block device.
    #[must_use]
    pub fn agent_rootfs(&self, serials: &[String]) -> Vec<agent::Mount> {
        self.rootfs.iter().map(|mount| mount.to_agent(serials)).collect()
    }

    /// The container's mounts in the agent's words. `serials[n]` is the serial of the n-th block device.
    #[must_use]
    pub fn agent_mounts(&self, serials: &[String]) -> Vec<agent::Mount> {
        self.mounts.iter().map(|mount| mount.to_agent(serials)).collect()
    }

    /// The pod's volumes in memory in the agent's words.
    #[must_use]
    pub fn agent_volumes(&self) -> Vec<agent::Volume> {
        let to_agent = |volume: &MemoryVolume| {
            let mut empty = agent::EmptyVolume::new();
            empty.size_bytes = volume.bytes;
            empty.root = Some(volume.root.to_agent()).into();
            let mut wanted = agent::Volume::new();
            wanted.name.clone_from(&volume.name);
            wanted.content = Some(agent::volume::Content::Empty(empty));
            wanted
        };
        self.volumes.iter().map(to_agent).collect()
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
            receive_unmounts: false,
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
            .find(|word| word.contains("{{") || word.starts_with("X-containerd."))
        {
            return Err(StorageError::Option {
                what: mount.kind.clone(),
                option: option.clone(),
                reason: "containerd must make this mount itself",
            });
        }
        let read_only = options::read_only(&mount.options) != ReadOnly::No;
        let flags: Vec<String> = if read_only {
            vec!["ro".to_owned()]
        } else {
            Vec::new()
        };
        let is_bind = matches!(mount.kind.as_str(), "" | "none")
            && mount.options.iter().any(|word| options::is_bind(word));
        match mount.kind.as_str() {
            "overlay" => {
                let overlay = Overlay::parse(&mount.options)?;
                self.share_rootfs(context, flags, |share| HostStep::Overlay { share, overlay });
            }
            kind if kind == "bind" || is_bind => {
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
                    receive_unmounts: false,
                    cache: CachePolicy::Exclusive,
                    place: None,
                    pooled: false,
                });
            }
            kind if BLOCK_FILE_SYSTEMS.contains(&kind) => self.rootfs_from_block(context, mount)?,
            kind => {
                return Err(StorageError::RootfsKind {
                    kind: kind.to_owned(),
                    cure: SUPPORTED,
                });
            }
        }
        Ok(())
    }

    /// A block device, or a file that containerd would put behind a loop device.
    fn rootfs_from_block(&mut self, context: Context<'_>, mount: &RootfsMount) -> Result<(), StorageError> {
        // EROFS is never written, with `ro` or without.
        let read_only = mount.kind == "erofs" || options::read_only(&mount.options) != ReadOnly::No;
        let mut words = Vec::new();
        for word in &mount.options {
            match word.split_once('=').map_or(word.as_str(), |(key, _)| key) {
                "loop" | "ro" | "rw" => {}
                "offset" | "sizelimit" | "device" => {
                    return Err(StorageError::Option {
                        what: mount.kind.clone(),
                        option: word.clone(),
                        reason: "only whole devices and files can be attached",
                    });
                }
                _ if options::is_comment(word) => {}
                _ => words.push(word.clone()),
            }
        }
        if read_only {
            words.push("ro".to_owned());
        }
        self.rootfs.push(GuestMount {
            source: MountSource::Block {
                index: self.blocks(),
                file_system: mount.kind.clone(),
            },
            target: ROOTFS_TARGET.to_owned(),
            options: words,
        });
        self.host.push(HostStep::Block {
            source: clean(&context.bundle.join(&mount.source)),
            read_only,
        });
        Ok(())
    }

    fn blocks(&self) -> usize {
        let is_block = |step: &&HostStep| matches!(step, HostStep::Block { .. });
        self.host.iter().filter(is_block).count()
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
        });
    }
}

impl GuestMount {
    fn to_agent(&self, serials: &[String]) -> agent::Mount {
        use agent::mount::Source;
        let mut mount = agent::Mount::new();
        mount.source = Some(match &self.source {
            MountSource::Share { name, path } => Source::Share(agent::ShareSource {
                name: name.clone(),
                path: path.clone(),
                ..Default::default()
            }),
            MountSource::Block { index, file_system } => Source::Block(agent::BlockSource {
                serial: serials.get(*index).cloned().unwrap_or_default(),
                file_system: file_system.clone(),
                ..Default::default()
            }),
            MountSource::Kernel { file_system } => Source::Kernel(agent::KernelSource {
                file_system: file_system.clone(),
                ..Default::default()
            }),
            MountSource::Volume {
                name,
                path,
                directory,
            } => Source::Volume(agent::VolumeSource {
                name: name.clone(),
                path: path.clone(),
                directory: directory.map(Owner::to_agent).into(),
                ..Default::default()
            }),
            MountSource::Guest { path } => Source::Guest(agent::GuestSource {
                path: path.clone(),
                ..Default::default()
            }),
        });
        mount.target.clone_from(&self.target);
        mount.options.clone_from(&self.options);
        mount
    }
}

impl Owner {
    pub(super) fn to_agent(self) -> agent::Owner {
        agent::Owner {
            uid: self.uid,
            gid: self.gid,
            mode: self.mode,
            ..Default::default()
        }
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
