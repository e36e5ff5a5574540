//! Root file systems that are mounted in the guest: disks of the host, layers put on top of each other there, and the
//! lists of mounts by which containerd's mount manager (2.2 and later) describes them.
//!
//! All disks and images of such a list become the parts of one disk of the guest: a container needs one slot for its
//! root file system, however many layers it has. Where a list names directories of the host for what the container
//! writes, the guest has a tmpfs instead: nothing of the root file system is on virtio-fs.

use std::path::{Component, Path, PathBuf};

use super::error::StorageError;
use super::options;
use super::plan::{
    Content, Context, Directory, DiskPart, GuestMount, HostStep, MountSource, NewImage, Overlay, Plan,
    ROOTFS_TARGET, ReadOnly, SUPPORTED, clean,
};
use super::probe::Owner;
use super::template::{Named, expand, is_template};
use crate::api::RootfsMount;

/// File systems on a block device that the guest's kernel can mount.
pub(super) const BLOCK_FILE_SYSTEMS: [&str; 3] = ["ext4", "xfs", "erofs"];

/// What containerd's mount manager has for itself among the options.
const MANAGER: &str = "X-containerd.";

/// Where the guest has the tmpfs that holds what a container writes.
const WRITABLE: &str = "writable";

/// A mount's type: what is to be done before, and what is mounted.
struct Kind<'a> {
    format: bool,
    mkdir: bool,
    mkfs: bool,
    base: &'a str,
}

impl<'a> Kind<'a> {
    /// Reads `format/mkdir/overlay` and its like.
    fn parse(mut text: &'a str) -> Self {
        let (mut format, mut mkdir, mut mkfs) = (false, false, false);
        while let Some((word, rest)) = text.split_once('/') {
            match word {
                "format" => format = true,
                "mkdir" => mkdir = true,
                "mkfs" => mkfs = true,
                _ => break,
            }
            text = rest;
        }
        Self {
            format,
            mkdir,
            mkfs,
            base: text,
        }
    }
}

/// The options of a mount, those for the mount manager apart.
#[derive(Default)]
struct Words {
    plain: Vec<String>,
    directories: Vec<Directory>,
    image: Image,
}

/// The options with which an image is made.
#[derive(Default)]
struct Image {
    bytes: Option<u64>,
    file_system: Option<String>,
    uuid: Option<String>,
}

impl Plan {
    /// A list of mounts of which the last one is the root file system.
    pub(super) fn rootfs_from_list(
        &mut self,
        context: Context<'_>,
        list: &[RootfsMount],
    ) -> Result<(), StorageError> {
        let disk = self.disks();
        let mut parts = Vec::new();
        let mut before: Vec<Named> = Vec::with_capacity(list.len());
        for (index, mount) in list.iter().enumerate() {
            let last = index + 1 == list.len();
            if !matches!(mount.target.as_str(), "" | "/") {
                return Err(StorageError::RootfsTarget(mount.target.clone()));
            }
            let kind = Kind::parse(&mount.kind);
            let mount = formatted(mount, &kind, &before)?;
            let words = sort(&mount, &kind)?;
            let place = if last {
                "rootfs".to_owned()
            } else {
                format!("m{index}")
            };
            let target = if last {
                ROOTFS_TARGET.to_owned()
            } else {
                format!("/{place}")
            };
            let directories = words.directories.clone();
            if let Some(stray) = directories
                .iter()
                .find(|made| inside(Path::new(&made.path), &before).is_none())
            {
                return Err(StorageError::Option {
                    what: mount.kind.clone(),
                    option: format!("{MANAGER}mkdir.path={}", stray.path),
                    reason: "the directory must be in one of the mounts before",
                });
            }
            let (source, options) = match kind.base {
                base if BLOCK_FILE_SYSTEMS.contains(&base) => {
                    let (part, devices, options) =
                        disk_parts(context, &mount, base, &kind, words, &mut parts)?;
                    let source = MountSource::Block {
                        disk,
                        part,
                        file_system: base.to_owned(),
                        devices,
                    };
                    (source, options)
                }
                "overlay" => self.overlay_of(&words.plain, &before)?,
                "bind" => bind_of(&mount, &words.plain, &before)?,
                _ => {
                    return Err(StorageError::RootfsKind {
                        kind: mount.kind.clone(),
                        cure: SUPPORTED,
                    });
                }
            };
            self.rootfs.push(GuestMount {
                source,
                target,
                options,
                directories,
            });
            before.push(Named {
                source: mount.source.clone(),
                target: mount.target.clone(),
                place,
            });
        }
        if parts.len() > protocol::vmm::MAX_EXTENTS {
            return Err(StorageError::TooManyLayers(parts.len()));
        }
        if !parts.is_empty() {
            self.host.push(HostStep::Disk { parts });
        }
        Ok(())
    }

    /// Directories of mounts before, one over the other.
    fn overlay_of(
        &mut self,
        options: &[String],
        before: &[Named],
    ) -> Result<(MountSource, Vec<String>), StorageError> {
        let refuse = |option: &str, reason| StorageError::Option {
            what: "overlay".to_owned(),
            option: option.to_owned(),
            reason,
        };
        if let Some(word) = options
            .iter()
            .find(|word| word.starts_with("uidmap=") || word.starts_with("gidmap="))
        {
            return Err(refuse(
                word,
                "mapped ids are not supported: run the container without a user namespace",
            ));
        }
        let overlay = Overlay::parse(options)?;
        let mut words: Vec<String> = options
            .iter()
            .filter(|word| options::is_flag(word))
            .cloned()
            .collect();
        let lower = overlay
            .lower
            .iter()
            .map(|path| {
                inside(path, before).ok_or_else(|| {
                    refuse(
                        &path.display().to_string(),
                        "a lower directory must be in one of the mounts before",
                    )
                })
            })
            .collect::<Result<Vec<_>, _>>()?;
        words.push(format!("lowerdir={}", lower.join(":")));
        if let Some((upper, work)) = &overlay.upper {
            let (upper, work) = match (inside(upper, before), inside(work, before)) {
                (Some(upper), Some(work)) => (upper, work),
                (None, None) if upper.is_absolute() && work.is_absolute() => self.writable_tmpfs(upper),
                _ => {
                    return Err(refuse(
                        "upperdir",
                        "it and workdir must both be in a mount before, or both on the host",
                    ));
                }
            };
            words.extend([format!("upperdir={upper}"), format!("workdir={work}")]);
        }
        words.extend(overlay.options);
        let source = MountSource::Kernel {
            file_system: "overlay".to_owned(),
        };
        Ok((source, words))
    }

    /// A tmpfs in place of directories of the host: upper and work directory in it. The kernel gives it half of the
    /// guest's memory at most.
    fn writable_tmpfs(&mut self, upper: &Path) -> (String, String) {
        self.host.push(HostStep::Unseen {
            directory: upper.to_owned(),
        });
        self.rootfs.push(GuestMount {
            source: MountSource::Kernel {
                file_system: "tmpfs".to_owned(),
            },
            target: format!("/{WRITABLE}"),
            options: vec!["mode=0755".to_owned()],
            directories: Vec::new(),
        });
        (format!("{WRITABLE}/upper"), format!("{WRITABLE}/work"))
    }
}

/// A mount with its templates filled in. Only a type that says so has any.
fn formatted(mount: &RootfsMount, kind: &Kind<'_>, before: &[Named]) -> Result<RootfsMount, StorageError> {
    let mut mount = mount.clone();
    let texts = [&mut mount.source, &mut mount.target]
        .into_iter()
        .chain(&mut mount.options);
    for text in texts {
        if !is_template(text) {
            continue;
        }
        if !kind.format {
            return Err(StorageError::Template {
                text: text.clone(),
                reason: format!("the mount's type {:?} does not begin with `format/`", mount.kind),
            });
        }
        *text = expand(text, before)?;
    }
    Ok(mount)
}

/// Tells the options for the mount manager from those of the file system.
fn sort(mount: &RootfsMount, kind: &Kind<'_>) -> Result<Words, StorageError> {
    let mut words = Words::default();
    for option in &mount.options {
        let refuse = |reason| StorageError::Option {
            what: mount.kind.clone(),
            option: option.clone(),
            reason,
        };
        let Some(own) = option.strip_prefix(MANAGER) else {
            words.plain.push(option.clone());
            continue;
        };
        match own.split_once('=') {
            Some(("mkdir.path", value)) if kind.mkdir => {
                words.directories.push(directory(value).map_err(refuse)?);
            }
            Some(("mkfs.size", value)) if kind.mkfs => {
                words.image.bytes = Some(bytes(value).ok_or_else(|| refuse("it is not a size"))?);
            }
            Some(("mkfs.fs", value)) if kind.mkfs => words.image.file_system = Some(value.to_owned()),
            Some(("mkfs.uuid", value)) if kind.mkfs => words.image.uuid = Some(value.to_owned()),
            Some(("dmverity", _)) => {
                return Err(refuse(
                    "the guest cannot verify layers: set dmverity_mode = \"off\" for containerd's erofs snapshotter",
                ));
            }
            _ => return Err(refuse("it is not known for a mount of this type")),
        }
    }
    Ok(words)
}

/// `path[:mode[:uid:gid]]`, as containerd's mount manager has it (core/mount/manager/mkdir.go).
fn directory(value: &str) -> Result<Directory, &'static str> {
    let fields: Vec<&str> = value.split(':').collect();
    let (path, mode, ids) = match fields[..] {
        [path] => (path, None, None),
        [path, mode] => (path, Some(mode), None),
        [path, mode, uid, gid] => (path, Some(mode), Some((uid, gid))),
        _ => return Err("it is not path[:mode[:uid:gid]]"),
    };
    let mode = match mode {
        None => 0o700,
        Some(mode) => u32::from_str_radix(mode, 8)
            .ok()
            .filter(|mode| *mode <= 0o777)
            .ok_or("the mode is not one in octal")?,
    };
    let (uid, gid) = match ids {
        None => (0, 0),
        Some((uid, gid)) => uid
            .parse()
            .ok()
            .zip(gid.parse().ok())
            .ok_or("uid and gid are not numbers")?,
    };
    Ok(Directory {
        path: path.to_owned(),
        owner: Owner { uid, gid, mode },
    })
}

/// A size in bytes, or with a binary unit: `64m`, `10 GiB` (docker/go-units, `RAMInBytes`).
fn bytes(text: &str) -> Option<u64> {
    let digits = text.trim_start_matches(|character: char| character.is_ascii_digit());
    let number: u64 = text[..text.len() - digits.len()].parse().ok()?;
    let unit = digits.trim().to_ascii_lowercase();
    let unit = unit
        .strip_suffix("ib")
        .or(unit.strip_suffix('b'))
        .unwrap_or(&unit);
    let shift = match unit {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        _ => return None,
    };
    number.checked_mul(1 << shift)
}

/// Adds a mount's image, and the further ones that its file system consists of, to the parts of the disk. Their
/// indexes, and the options that are left.
fn disk_parts(
    context: Context<'_>,
    mount: &RootfsMount,
    file_system: &str,
    kind: &Kind<'_>,
    words: Words,
    parts: &mut Vec<DiskPart>,
) -> Result<(usize, Vec<usize>, Vec<String>), StorageError> {
    let refuse = |option: &str, reason| StorageError::Option {
        what: mount.kind.clone(),
        option: option.to_owned(),
        reason,
    };
    // EROFS is never written, with `ro` or without.
    let read_only = file_system == "erofs" || options::read_only(&words.plain) != ReadOnly::No;
    let source = |path: &str| clean(&context.bundle.join(path));
    let content = if kind.mkfs {
        let Words { image, .. } = &words;
        match (image.bytes, image.file_system.as_deref().unwrap_or("ext4")) {
            (None | Some(0), _) => return Err(refuse("X-containerd.mkfs.size", "it is missing, or 0")),
            (Some(bytes), "ext4") if file_system == "ext4" => Content::Made(NewImage {
                bytes,
                uuid: image.uuid.clone(),
            }),
            _ => {
                return Err(refuse(
                    "X-containerd.mkfs.fs",
                    "only ext4 images can be made: set default_size for an ext4 writable layer",
                ));
            }
        }
    } else {
        Content::FileSystem(file_system.to_owned())
    };
    let first = parts.len();
    parts.push(DiskPart {
        source: source(&mount.source),
        read_only,
        content,
    });
    let mut plain = Vec::new();
    for word in words.plain {
        match word.split_once('=') {
            Some(("device", path)) if file_system == "erofs" => parts.push(DiskPart {
                source: source(path),
                read_only: true,
                content: Content::Any,
            }),
            Some(("offset" | "sizelimit" | "device", _)) => {
                return Err(refuse(&word, "only whole devices and files can be attached"));
            }
            None if matches!(word.as_str(), "loop" | "ro" | "rw") => {}
            _ if options::is_comment(&word) => {}
            _ => plain.push(word),
        }
    }
    if read_only {
        plain.push("ro".to_owned());
    }
    Ok((first, (first + 1..parts.len()).collect(), plain))
}

/// A directory of a mount before, seen at another place.
fn bind_of(
    mount: &RootfsMount,
    options: &[String],
    before: &[Named],
) -> Result<(MountSource, Vec<String>), StorageError> {
    let path = inside(Path::new(&mount.source), before).ok_or_else(|| StorageError::Option {
        what: mount.kind.clone(),
        option: mount.source.clone(),
        reason: "the source must be in one of the mounts before",
    })?;
    let kept = |word: &&String| options::is_flag(word) || options::is_bind(word);
    let mut words: Vec<String> = options.iter().filter(kept).cloned().collect();
    if !words.iter().any(|word| options::is_bind(word)) {
        words.insert(0, "bind".to_owned());
    }
    Ok((MountSource::Guest { path }, words))
}

/// A path below the place of a mount before.
fn inside(path: &Path, before: &[Named]) -> Option<String> {
    let place = path.components().next()?.as_os_str();
    (is_inside(path) && before.iter().any(|named| place == named.place.as_str()))
        .then(|| path.to_str().map(str::to_owned))?
}

/// Whether a path is relative and never leads upwards.
fn is_inside(path: &Path) -> bool {
    path.components().next().is_some() && path.components().all(|part| matches!(part, Component::Normal(_)))
}

impl DiskPart {
    /// A whole device or file, whatever is on it.
    #[must_use]
    pub fn any(source: impl Into<PathBuf>, read_only: bool) -> Self {
        Self {
            source: source.into(),
            read_only,
            content: Content::Any,
        }
    }
}
