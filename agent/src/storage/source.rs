//! Finds what a mount is of: a path of a share, a disk, a file system of the kernel's, a path of the guest.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use protocol::agent::Mount;
use protocol::agent::mount::Source;
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, open, openat2};
use rustix::io::Errno;

use super::partition::Partitions;
use super::{Layout, StorageError, block};
use crate::container::mount::{self, FileSystem, MakeError, Options};
use crate::container::target::{self, Kind};

/// Longest value of a mount option that fsconfig(2) takes, with its final zero.
const MAX_VALUE: usize = 256;

/// File systems whose content depends on the namespaces of who makes them: the child does.
const OF_NAMESPACES: [&str; 4] = ["proc", "sysfs", "mqueue", "cgroup2"];

/// What a mount is of, and how it goes in.
pub struct Found {
    /// For messages.
    pub what: String,
    pub tree: Origin,
    pub kind: Kind,
    pub options: Options,
}

/// Where a mount comes from.
pub enum Origin {
    /// Cloned from another.
    Bind(OwnedFd),
    /// A file system that is yet to be made.
    New(FileSystem),
}

fn bind(mount: &Mount, source: BorrowedFd<'_>, what: String) -> Result<Found, StorageError> {
    let options = options(mount, true)?;
    let fail = |source: Errno| StorageError::Mount {
        what: what.clone(),
        target: mount.target.clone(),
        why: source.to_string(),
        source,
    };
    let tree = mount::clone_tree(source, c"", &options).map_err(fail)?;
    let kind = match FileType::from_raw_mode(fstat(&tree).map_err(fail)?.st_mode) {
        FileType::Directory => Kind::Directory,
        _ => Kind::File,
    };
    Ok(Found {
        what,
        tree: Origin::Bind(tree),
        kind,
        options,
    })
}

fn options(mount: &Mount, bind: bool) -> Result<Options, StorageError> {
    let options = mount::parse(&mount.options, bind).map_err(|source| StorageError::Option {
        target: mount.target.clone(),
        source,
    })?;
    let long = |value: &CString| value.as_bytes_with_nul().len() > MAX_VALUE;
    for (key, value) in &options.parameters {
        // An overlay's layers are cut up later.
        if value.as_ref().is_some_and(long) && key.as_c_str() != c"lowerdir" {
            let key = key.to_string_lossy();
            return Err(invalid(
                mount,
                &format!("the value of option {key:?} is longer than the kernel takes"),
            ));
        }
    }
    Ok(options)
}

pub fn of_namespaces(file_system: &FileSystem) -> bool {
    OF_NAMESPACES
        .iter()
        .any(|kind| file_system.kind.as_bytes() == kind.as_bytes())
}

pub fn make(file_system: &FileSystem, target: &str) -> Result<OwnedFd, StorageError> {
    file_system.make().map_err(|error| StorageError::Mount {
        what: format!(
            "{} from {}",
            file_system.kind.to_string_lossy(),
            file_system.source.to_string_lossy()
        ),
        target: target.to_owned(),
        why: explain(&error),
        source: error.errno,
    })
}

/// The error with what the kernel has to say about it (fsopen(2): messages are read from the context).
pub fn explain(error: &MakeError) -> String {
    let mut why = format!("{}: {}", error.what, error.errno);
    if let Some(context) = &error.context {
        let mut buffer = [0; 1024];
        while let Ok(length @ 1..) = rustix::io::read(context, &mut buffer) {
            why.push_str("; ");
            why.push_str(String::from_utf8_lossy(&buffer[..length]).trim());
        }
    }
    why
}

/// A path without leading slashes, if no component leads upwards.
pub fn inside(path: &str) -> Option<&Path> {
    let path = Path::new(path.trim_start_matches('/'));
    path.components()
        .all(|component| matches!(component, Component::Normal(_) | Component::CurDir))
        .then_some(path)
}

pub fn invalid(mount: &Mount, why: &str) -> StorageError {
    StorageError::Invalid {
        target: mount.target.clone(),
        why: why.to_owned(),
    }
}

pub fn c_string(mount: &Mount, bytes: &[u8]) -> Result<CString, StorageError> {
    CString::new(bytes).map_err(|_| invalid(mount, "contains a zero byte"))
}

/// Finds what a mount is of. `directory` is the container's, `partitions` are those of its disks.
///
/// # Errors
/// [`StorageError`].
pub fn find(
    layout: &Layout,
    directory: &Path,
    partitions: &mut Partitions,
    mount: &Mount,
) -> Result<Found, StorageError> {
    match &mount.source {
        Some(Source::Share(share)) => {
            layout.mount_shares()?;
            let missing = |source| StorageError::ShareMissing {
                name: share.name.clone(),
                path: share.path.clone(),
                source,
            };
            if share.name.is_empty() || share.name.contains('/') || share.name.starts_with('.') {
                return Err(invalid(mount, "the share's name is not one path component"));
            }
            let path = c_string(mount, share.path.as_bytes())?;
            let root = layout.shares.join(&share.name);
            let root = open(&root, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(missing)?;
            let source = target::open(root.as_fd(), &path).map_err(missing)?;
            bind(mount, source.as_fd(), format!("share {:?}", share.name))
        }
        Some(Source::Volume(volume)) => {
            let source = layout.volumes.open(volume)?;
            bind(mount, source.as_fd(), format!("volume {:?}", volume.name))
        }
        Some(Source::Guest(guest)) => {
            let path = resolve(directory, &guest.path)
                .ok_or_else(|| invalid(mount, "the source leads out of its directory"))?;
            let missing = |source| StorageError::PathMissing {
                path: path.clone(),
                source,
            };
            let source = openat2(
                CWD,
                &path,
                OFlags::PATH | OFlags::CLOEXEC,
                Mode::empty(),
                ResolveFlags::NO_MAGICLINKS,
            )
            .map_err(missing)?;
            bind(mount, source.as_fd(), path.display().to_string())
        }
        Some(Source::Block(disk)) if disk.file_system.is_empty() => {
            let device = block::find(&disk.serial)?;
            let node = open(&device, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(|source| {
                StorageError::PathMissing {
                    path: device.clone(),
                    source,
                }
            })?;
            bind(mount, node.as_fd(), device.display().to_string())
        }
        Some(Source::Block(block)) => {
            let mut options = options(mount, false)?;
            let device = match block.part.as_ref() {
                Some(part) => partitions.add(&block.serial, part)?,
                None => block::find(&block.serial)?,
            };
            for part in &block.devices {
                let further = partitions.add(&block.serial, part)?;
                let further = c_string(mount, further.as_os_str().as_bytes())?;
                options.parameters.push((c"device".into(), Some(further)));
            }
            // A device that cannot be written needs a file system that does not try (mount(8), "ro").
            if mount.options.iter().any(|word| word == "ro") {
                options.parameters.push((c"ro".into(), None));
            }
            Ok(Found {
                what: format!("{} on {}", block.file_system, device.display()),
                tree: Origin::New(FileSystem {
                    kind: c_string(mount, block.file_system.as_bytes())?,
                    source: c_string(mount, device.as_os_str().as_bytes())?,
                    options: options.clone(),
                }),
                kind: Kind::Directory,
                options,
            })
        }
        Some(Source::Kernel(kernel)) => {
            let mut options = options(mount, false)?;
            if kernel.file_system == "overlay" {
                complete_overlay(directory, mount, &mut options)?;
            }
            // What the specification calls cgroup is version 2 in the guest.
            let kind = match kernel.file_system.as_str() {
                "cgroup" => "cgroup2",
                other => other,
            };
            let kind = c_string(mount, kind.as_bytes())?;
            Ok(Found {
                what: kernel.file_system.clone(),
                tree: Origin::New(FileSystem {
                    source: kind.clone(),
                    kind,
                    options: options.clone(),
                }),
                kind: Kind::Directory,
                options,
            })
        }
        // The enum may grow; what this agent does not know it must not pass over.
        _ => Err(invalid(mount, "the source is missing or of a newer protocol")),
    }
}

/// Layers are named one by one, since an option's value is short; directories of a writable layer are made.
/// Relative paths are below the container's directory.
fn complete_overlay(directory: &Path, mount: &Mount, options: &mut Options) -> Result<(), StorageError> {
    let mut parameters = Vec::new();
    for (key, value) in std::mem::take(&mut options.parameters) {
        let Some(value) = value else {
            parameters.push((key, None));
            continue;
        };
        let text = value.to_string_lossy().into_owned();
        let name = key.to_bytes();
        if !matches!(name, b"lowerdir" | b"upperdir" | b"workdir") {
            parameters.push((key, Some(value)));
            continue;
        }
        let layers: Vec<&str> = if name == b"lowerdir" {
            text.split(':').collect()
        } else {
            vec![&text]
        };
        for layer in layers {
            let path = resolve(directory, layer)
                .filter(|_| !layer.is_empty())
                .ok_or_else(|| {
                    invalid(
                        mount,
                        &format!("layer {layer:?} is not below the container's directory"),
                    )
                })?;
            if name != b"lowerdir" && !layer.starts_with('/') {
                std::fs::create_dir_all(&path).map_err(|source| StorageError::Directory {
                    what: "make",
                    path: path.clone(),
                    source,
                })?;
            }
            let key = if name == b"lowerdir" {
                c"lowerdir+".into()
            } else {
                key.clone()
            };
            parameters.push((key, Some(c_string(mount, path.as_os_str().as_bytes())?)));
        }
    }
    options.parameters = parameters;
    Ok(())
}

/// An absolute path as it is, a relative one below the container's directory.
fn resolve(directory: &Path, path: &str) -> Option<PathBuf> {
    if path.starts_with('/') {
        Some(PathBuf::from(path))
    } else {
        Some(directory.join(inside(path)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlay_layers_are_cut_up_and_completed() {
        let directory = tempfile::tempdir().unwrap();
        let mount = Mount {
            target: "/rootfs".into(),
            options: [
                "lowerdir=l1:/abs:l0",
                "upperdir=rw/upper",
                "workdir=rw/work",
                "index=off",
                "userxattr",
            ]
            .map(String::from)
            .to_vec(),
            ..Default::default()
        };
        let mut options = options(&mount, false).unwrap();
        complete_overlay(directory.path(), &mount, &mut options).unwrap();
        let found: Vec<String> = options
            .parameters
            .iter()
            .map(|(key, value)| {
                let value = value
                    .as_ref()
                    .map(|value| format!("={}", value.to_string_lossy()));
                format!("{}{}", key.to_string_lossy(), value.unwrap_or_default())
            })
            .collect();
        let base = directory.path().display();
        assert_eq!(
            found,
            [
                format!("lowerdir+={base}/l1"),
                "lowerdir+=/abs".into(),
                format!("lowerdir+={base}/l0"),
                format!("upperdir={base}/rw/upper"),
                format!("workdir={base}/rw/work"),
                "index=off".into(),
                "userxattr".into(),
            ]
        );
        assert!(directory.path().join("rw/work").is_dir());
        let bad = Mount {
            options: vec!["lowerdir=../../etc".into()],
            ..mount
        };
        let mut options = super::options(&bad, false).unwrap();
        assert!(complete_overlay(directory.path(), &bad, &mut options).is_err());
    }

    #[test]
    fn paths_never_lead_upwards() {
        assert_eq!(inside("/a/b"), Some(Path::new("a/b")));
        assert_eq!(inside("a/../../b"), None);
        assert_eq!(inside("/.."), None);
    }
}
