//! How each of the specification's mounts is planned: which become a share, and which a file system or a path of the
//! guest's own.
//!
//! A bind of something through which the host's kernel shows itself (/proc, /sys, cgroups, /dev) becomes the guest's
//! own: that is what the container would see if the guest were its host.

use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{Mount, Spec};
use protocol::vmm::CachePolicy;

use super::error::StorageError;
use super::plan::{
    Context, FileBind, GuestMount, HostStep, MemoryVolume, MountSource, Overlay, Plan, Probe, ReadOnly, clean,
};
use super::probe::{FileKind, FileSystem, Place, SourceInfo};
use super::{kubelet, options};

/// Where POSIX shared memory is.
pub(super) const SHM: &str = "/dev/shm";

/// File system types that the specification may ask for by name, all of the guest's kernel.
const KERNEL_TYPES: [&str; 14] = [
    "proc",
    "sysfs",
    "tmpfs",
    "ramfs",
    "devpts",
    "mqueue",
    "cgroup",
    "cgroup2",
    "hugetlbfs",
    "bpf",
    "debugfs",
    "tracefs",
    "securityfs",
    "configfs",
];

/// Where a Linux system has its kernel's file systems: a bind of one becomes the guest's own.
const KERNEL_PATHS: [(&str, &str); 8] = [
    ("/proc", "proc"),
    ("/sys", "sysfs"),
    ("/sys/fs/bpf", "bpf"),
    ("/sys/kernel/debug", "debugfs"),
    ("/sys/kernel/tracing", "tracefs"),
    ("/sys/kernel/security", "securityfs"),
    ("/dev/mqueue", "mqueue"),
    ("/dev/pts", "devpts"),
];

/// Character devices that are the same in every kernel. A bind of one becomes the guest's own.
const GUEST_DEVICES: [&str; 9] = [
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/random",
    "/dev/urandom",
    "/dev/tty",
    "/dev/fuse",
    "/dev/net/tun",
    "/dev/kmsg",
];

/// Whether a mount is a bind mount (config.md, "POSIX-platform Mounts"): by its options, or by the type `bind`.
pub(super) fn is_bind(mount: &Mount) -> bool {
    let by_option = mount
        .options()
        .iter()
        .flatten()
        .any(|word| options::is_bind(word));
    by_option || mount.typ().as_deref() == Some("bind")
}

impl Plan {
    pub(super) fn add_mounts(
        &mut self,
        context: Context<'_>,
        spec: &Spec,
        probe: Probe<'_>,
    ) -> Result<(), StorageError> {
        let mut files = Vec::new();
        for mount in spec.mounts().iter().flatten() {
            let target = destination(mount.destination())?;
            let words = mount.options().as_deref().unwrap_or_default();
            let ids = [mount.uid_mappings(), mount.gid_mappings()];
            if ids
                .iter()
                .any(|map| map.as_ref().is_some_and(|map| !map.is_empty()))
                || words
                    .iter()
                    .any(|word| matches!(word.as_str(), "idmap" | "ridmap"))
            {
                return Err(StorageError::IdMapped(target));
            }
            let words: Vec<String> = words
                .iter()
                .filter(|word| !options::is_comment(word))
                .cloned()
                .collect();
            let (source, options) = if is_bind(mount) {
                self.bind((context, spec), mount, &target, words, &mut files, probe)?
            } else {
                self.own(context, mount, &target, words)?
            };
            self.mounts.push(GuestMount {
                source,
                target: target.to_string_lossy().into_owned(),
                options,
                directories: Vec::new(),
            });
        }
        if !files.is_empty() {
            self.host.push(HostStep::Files {
                share: files_share(context),
                files,
            });
        }
        Ok(())
    }

    /// A new file system.
    fn own(
        &mut self,
        context: Context<'_>,
        mount: &Mount,
        target: &Path,
        words: Vec<String>,
    ) -> Result<(MountSource, Vec<String>), StorageError> {
        let kind = mount.typ().as_deref().unwrap_or_default();
        // containerd gives each container of a pod one of its own where the pod's is left to the runtime.
        if kind == "tmpfs"
            && target == Path::new(SHM)
            && let Some(path) = context.pod_shm
        {
            let path = path.to_owned();
            let kept = |word: &String| options::is_flag(word) || options::is_propagation(word);
            let options = ["bind".to_owned()]
                .into_iter()
                .chain(words.into_iter().filter(kept));
            return Ok((MountSource::Guest { path }, options.collect()));
        }
        match kind {
            "overlay" => {
                let overlay = Overlay::parse(&words)?;
                let share = self.share_name(context);
                self.host.push(HostStep::Overlay {
                    share: share.clone(),
                    overlay,
                });
                let kept = |word: &String| options::is_flag(word) || options::is_propagation(word);
                let options = ["rbind".to_owned()]
                    .into_iter()
                    .chain(words.into_iter().filter(kept))
                    .collect();
                Ok((root_of(share), options))
            }
            kind if KERNEL_TYPES.contains(&kind) => Ok((kernel(kind), words)),
            kind => Err(StorageError::MountKind {
                destination: target.to_owned(),
                kind: kind.to_owned(),
                known: [&KERNEL_TYPES[..], &["overlay"]].concat().join(", "),
            }),
        }
    }

    /// A bind mount.
    fn bind(
        &mut self,
        (context, spec): (Context<'_>, &Spec),
        mount: &Mount,
        target: &Path,
        mut words: Vec<String>,
        files: &mut Vec<FileBind>,
        probe: Probe<'_>,
    ) -> Result<(MountSource, Vec<String>), StorageError> {
        let source = match mount.source() {
            Some(source) if !source.as_os_str().is_empty() => clean(&context.bundle.join(source)),
            _ => return Err(StorageError::NoSource(target.to_owned())),
        };
        if let Some(word @ ("shared" | "rshared")) = options::propagation(&words) {
            return Err(StorageError::SharedPropagation(
                target.to_owned(),
                word.to_owned(),
            ));
        }
        let info = probe(&source)
            .map_err(|cause| StorageError::opening("the source of a bind mount,", &source, cause))?;
        if info.kind == FileKind::BlockDevice {
            if !words.iter().any(|word| options::is_bind(word)) {
                words.insert(0, "bind".to_owned());
            }
            return Ok((self.device_node(info.number, spec), words));
        }
        if let Some(replaced) = guests_own(context, &source, target, &info, &words)? {
            return Ok(replaced);
        }
        if !words.iter().any(|word| options::is_bind(word)) {
            words.insert(0, "bind".to_owned());
        }
        if let Some(volume) = self.memory_volume(&source, &info, probe) {
            return Ok((volume, words));
        }
        let read_only = options::read_only(&words);
        if info.kind == FileKind::File {
            let path = files.len().to_string();
            files.push(FileBind {
                source,
                place: info.place,
                read_only: read_only != ReadOnly::No,
            });
            let name = files_share(context);
            return Ok((MountSource::Share { name, path }, words));
        }
        if read_only != ReadOnly::No && kubelet::holds_api_files(&source) {
            let name = volume_name("files", info.place);
            self.push_once(HostStep::Volume {
                volume: name.clone(),
                source,
                place: info.place,
            });
            return Ok((root_of_volume(name), words));
        }
        let recursive = words.iter().any(|word| word == "rbind");
        let receive_mounts = matches!(options::propagation(&words), Some("slave" | "rslave"));
        let (source, info, path) =
            in_its_empty_dir(&source, &info, probe).unwrap_or((source, info, String::new()));
        // An emptyDir is the pod's: one share, also where a container may only read, so that its containers see each
        // other's writes in one cache. What else is read-only stays so whatever the guest does.
        let read_only = if kubelet::is_empty_dir(&source) {
            ReadOnly::No
        } else {
            read_only
        };
        // What is mounted below stays writable. The guest's kernel gives it the flags of the mount it is found in, so
        // that one has none: the host refuses writes to the directory itself.
        if read_only == ReadOnly::Top && recursive && (info.below != 0 || receive_mounts) {
            words.retain(|word| word != "ro");
        }
        let share = pooled_name(&info, recursive, read_only, receive_mounts);
        self.push_once(HostStep::Directory {
            share: share.clone(),
            source,
            recursive,
            read_only,
            receive_mounts,
            cache: CachePolicy::Shared,
            place: Some(info.place),
            pooled: true,
        });
        Ok((MountSource::Share { name: share, path }, words))
    }

    /// The same directory may be mounted at several places of a container.
    fn push_once(&mut self, step: HostStep) {
        if !self.host.contains(&step) {
            self.host.push(step);
        }
    }

    /// An emptyDir in memory, or a `subPath` of one: a file system of the guest's, as large as the host's.
    fn memory_volume(&mut self, source: &Path, info: &SourceInfo, probe: Probe<'_>) -> Option<MountSource> {
        if let (FileSystem::Huge { page_bytes }, FileKind::Directory) = (info.file_system, info.kind) {
            return Some(self.huge_volume(info, page_bytes));
        }
        let FileSystem::Tmpfs { bytes } = info.file_system else {
            return None;
        };
        if info.kind != FileKind::Directory {
            return None;
        }
        // A kubelet whose own directory is on a tmpfs has all its emptyDirs there: only one with a mount of its own
        // is meant to be in memory.
        let (bytes, volume, path) = if kubelet::is_empty_dir(source) {
            (bytes, info.clone(), String::new())
        } else {
            let volume = probe(&kubelet::empty_dir_of_sub_path(source)?).ok()?;
            let FileSystem::Tmpfs { bytes } = volume.file_system else {
                return None;
            };
            let path = info.shows.as_ref()?.to_str()?.trim_start_matches('/').to_owned();
            (bytes, volume, path)
        };
        if !volume.mount_root || volume.place.device != info.place.device {
            return None;
        }
        let name = volume_name("memory", volume.place);
        if !self.volumes.iter().any(|known| known.name == name) {
            self.volumes.push(MemoryVolume {
                name: name.clone(),
                bytes,
                huge_page_bytes: 0,
                root: volume.owner,
            });
        }
        Some(MountSource::Volume {
            name,
            directory: (!path.is_empty()).then_some(info.owner),
            path,
        })
    }

    /// A directory of huge pages, an emptyDir of the medium `HugePages` above all: pages of the guest's, of the same
    /// size. How many there may be is the containers' own limits' matter.
    fn huge_volume(&mut self, info: &SourceInfo, page_bytes: u64) -> MountSource {
        let name = volume_name("huge", info.place);
        if !self.volumes.iter().any(|known| known.name == name) {
            self.volumes.push(MemoryVolume {
                name: name.clone(),
                bytes: 0,
                huge_page_bytes: page_bytes,
                root: info.owner,
            });
        }
        root_of_volume(name)
    }

    /// A name no other share of the sandbox has: container ids are unique, and the part behind the last dot is
    /// unique in the container.
    fn share_name(&self, context: Context<'_>) -> String {
        format!("{}.{}", context.container_id, self.host.len())
    }
}

/// A directory in an emptyDir that a container mounts by a `subPath`: the emptyDir and the path in it, so that there is
/// one share of both.
fn in_its_empty_dir(
    source: &Path,
    info: &SourceInfo,
    probe: Probe<'_>,
) -> Option<(PathBuf, SourceInfo, String)> {
    let volume = kubelet::empty_dir_of_sub_path(source)?;
    let shows = info.shows.as_ref()?.to_str()?;
    let end = format!(
        "/{}",
        Path::new(volume.parent()?.file_name()?)
            .join(volume.file_name()?)
            .to_str()?
    );
    let (_, path) = shows.split_once(&end)?;
    let path = path.trim_start_matches('/');
    // The path is a guess until it leads to the very directory.
    let found = probe(&volume.join(path)).ok()?;
    let volume_info = probe(&volume).ok()?;
    found
        .place
        .is_file_of(info.place)
        .then(|| (volume, volume_info, path.to_owned()))
}

/// What of the guest's own stands for a bind of this source, if anything does. An error for what cannot be shared.
fn guests_own(
    context: Context<'_>,
    source: &Path,
    target: &Path,
    info: &SourceInfo,
    words: &[String],
) -> Result<Option<(MountSource, Vec<String>)>, StorageError> {
    let flags = || -> Vec<String> {
        let top = |word: &String| match word.as_str() {
            "rro" => "ro".to_owned(),
            _ => word.clone(),
        };
        let flags = words
            .iter()
            .filter(|word| options::is_flag(word) || options::is_propagation(word));
        flags.map(top).collect()
    };
    let unshareable = |reason| {
        Err(StorageError::Unshareable {
            source_path: source.to_owned(),
            destination: target.to_owned(),
            reason,
        })
    };
    let guest = |path: &str| {
        let path = path.to_owned();
        Ok(Some((MountSource::Guest { path }, words.to_vec())))
    };
    match info.kind {
        FileKind::Socket => {
            return unshareable(
                "a socket cannot be shared with a virtual machine: remove the mount, or use TCP",
            );
        }
        FileKind::Fifo => {
            return unshareable("a named pipe cannot be shared with a virtual machine: remove the mount");
        }
        FileKind::CharDevice => {
            return match GUEST_DEVICES.iter().find(|path| Path::new(path) == source) {
                Some(path) => guest(path),
                None => unshareable(
                    "devices of the host cannot be shared with a virtual machine: remove the mount",
                ),
            };
        }
        FileKind::BlockDevice | FileKind::Directory | FileKind::File => {}
    }
    let known = KERNEL_PATHS.iter().find(|(path, _)| Path::new(path) == source);
    match info.file_system {
        FileSystem::Cgroup => Ok(Some((kernel("cgroup2"), flags()))),
        FileSystem::Kernel(_) => match known {
            Some((_, kind)) => Ok(Some((kernel(kind), flags()))),
            None => unshareable(
                "it belongs to the host's kernel: mount /proc, /sys or a file system by its type instead",
            ),
        },
        FileSystem::Tmpfs { .. } if source == Path::new("/dev") => guest("/dev"),
        FileSystem::Tmpfs { bytes } if target == Path::new(SHM) && info.kind == FileKind::Directory => {
            if let Some(path) = context.pod_shm {
                return guest(path);
            }
            let mut options = flags();
            options.extend(["mode=1777".to_owned(), format!("size={bytes}")]);
            Ok(Some((kernel("tmpfs"), options)))
        }
        FileSystem::Tmpfs { .. } | FileSystem::Huge { .. } | FileSystem::Ordinary => Ok(None),
    }
}

fn kernel(kind: &str) -> MountSource {
    let file_system = if kind == "cgroup" { "cgroup2" } else { kind };
    MountSource::Kernel {
        file_system: file_system.to_owned(),
    }
}

/// The name of a share that says all about it: containers whose mounts come to the same name have it in common, and
/// with it one cache in the guest. No container's id begins with this character.
fn pooled_name(info: &SourceInfo, recursive: bool, read_only: ReadOnly, receive_mounts: bool) -> String {
    let Place { device, inode, mount } = info.place;
    let below = if recursive { info.below } else { 0 };
    let depth = match (recursive, read_only) {
        (false, ReadOnly::No) => "w",
        (false, _) => "r",
        (true, ReadOnly::No) => "ww",
        (true, ReadOnly::Top) => "rw",
        (true, ReadOnly::Recursive) => "rr",
    };
    let slave = if receive_mounts { "s" } else { "" };
    format!("@{device:x}.{inode:x}.{mount:x}.{below:x}.{depth}{slave}")
}

fn volume_name(kind: &str, place: Place) -> String {
    format!("{kind}-{:x}-{:x}", place.device, place.inode)
}

fn root_of_volume(name: String) -> MountSource {
    MountSource::Volume {
        name,
        path: String::new(),
        directory: None,
    }
}

fn root_of(share: String) -> MountSource {
    MountSource::Share {
        name: share,
        path: String::new(),
    }
}

fn files_share(context: Context<'_>) -> String {
    format!("{}.files", context.container_id)
}

/// A mount's destination as an absolute path. A relative one starts at `/`, as older versions of the specification
/// had it.
fn destination(path: &Path) -> Result<PathBuf, StorageError> {
    let refuse = || StorageError::Destination(path.to_owned());
    let absolute = clean(&Path::new("/").join(path));
    if absolute == Path::new("/")
        || absolute.to_str().is_none()
        || absolute.components().any(|part| part == Component::ParentDir)
    {
        return Err(refuse());
    }
    Ok(absolute)
}
