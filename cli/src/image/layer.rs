//! Applies one layer to a root file system (OCI image specification, "Applying Changesets").
//!
//! Layers are untrusted: every parent directory is resolved inside the root file system (openat2(2),
//! `RESOLVE_IN_ROOT`), so that neither `..` nor a symbolic link of an earlier layer leads out of it.

use std::collections::HashSet;
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use flate2::read::MultiGzDecoder;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use tar::EntryType;

use super::ImageError;
use super::source::{Descriptor, HashingReader};

const OPAQUE: &[u8] = b".wh..wh..opq";
const WHITEOUT: &[u8] = b".wh.";

/// Unpacks `blob` over `rootfs` and checks its digest.
///
/// # Errors
/// [`ImageError::Layer`] names the entry that failed, [`ImageError::Digest`] a damaged blob.
pub fn apply(blob: impl Read, descriptor: &Descriptor, rootfs: &Path) -> Result<(), ImageError> {
    let layer = |entry: String| {
        move |source| ImageError::Layer {
            digest: descriptor.digest.clone(),
            entry,
            source,
        }
    };
    let root = fs::File::open(rootfs).map_err(layer("/".into()))?;
    let kind = descriptor.media_type.as_str();
    let gzip = kind.ends_with("tar+gzip") || kind.ends_with("tar.gzip");
    if !gzip && !kind.ends_with(".tar") {
        return Err(ImageError::LayerType(kind.to_owned()));
    }
    let mut hashing = HashingReader::new(blob);
    let tar: Box<dyn Read + '_> = if gzip {
        Box::new(MultiGzDecoder::new(&mut hashing))
    } else {
        Box::new(&mut hashing)
    };
    let mut archive = tar::Archive::new(tar);
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(true);
    archive.set_unpack_xattrs(true);
    let mut applied = Applied {
        root: root.into(),
        new: HashSet::new(),
    };
    // Directories get their times last: what is put into them changes them.
    let mut directories = Vec::new();
    for entry in archive.entries().map_err(layer(String::new()))? {
        let mut entry = entry.map_err(layer(String::new()))?;
        let path = entry.path().map_err(layer(String::new()))?.into_owned();
        let name = path.display().to_string();
        applied.entry(&mut entry, &path).map_err(layer(name))?;
        if entry.header().entry_type() == EntryType::Directory {
            directories.push((path, entry.header().mtime().unwrap_or_default()));
        }
    }
    for (path, mtime) in directories.into_iter().rev() {
        applied
            .set_time(&path, mtime)
            .map_err(layer(path.display().to_string()))?;
    }
    drop(archive);
    let actual = hashing.finish().map_err(layer(String::new()))?;
    if actual == descriptor.digest {
        Ok(())
    } else {
        Err(ImageError::Digest {
            blob: descriptor.digest.clone(),
            actual,
        })
    }
}

struct Applied {
    root: OwnedFd,
    /// What this layer has made: an opaque directory hides only what was there before.
    new: HashSet<PathBuf>,
}

impl Applied {
    fn entry<R: Read>(&mut self, entry: &mut tar::Entry<'_, R>, path: &Path) -> io::Result<()> {
        let path = clean(path)?;
        let Some(name) = path.file_name() else {
            // The root itself: only its mode and owner matter.
            return self.metadata_of_root(entry);
        };
        let parent_path = path.parent().unwrap_or(Path::new(""));
        let parent = self.directory(parent_path)?;
        let inside = |name: &std::ffi::OsStr| {
            PathBuf::from(format!("/proc/self/fd/{}", parent.as_raw_fd())).join(name)
        };
        if name.as_bytes() == OPAQUE {
            return self.hide_older(&inside(std::ffi::OsStr::new("")), parent_path);
        }
        if let Some(hidden) = name.as_bytes().strip_prefix(WHITEOUT) {
            if hidden.is_empty() || hidden == b"." || hidden == b".." {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "a whiteout that names nothing",
                ));
            }
            return remove(&inside(std::ffi::OsStr::from_bytes(hidden)));
        }
        let target = inside(name);
        let kind = entry.header().entry_type();
        let replaces = match fs::symlink_metadata(&target) {
            Ok(metadata) => !(metadata.is_dir() && kind == EntryType::Directory),
            Err(_) => false,
        };
        if replaces {
            remove(&target)?;
        }
        self.new.insert(path.clone());
        match kind {
            EntryType::Link => {
                let linked = entry.link_name()?.ok_or(io::ErrorKind::InvalidData)?;
                let linked = clean(&linked)?;
                let (Some(linked_name), linked_parent) = (linked.file_name(), linked.parent()) else {
                    return Err(io::ErrorKind::InvalidData.into());
                };
                let from = self.directory(linked_parent.unwrap_or(Path::new("")))?;
                Ok(rustix::fs::linkat(
                    from,
                    linked_name,
                    &parent,
                    name,
                    AtFlags::empty(),
                )?)
            }
            EntryType::Char | EntryType::Block | EntryType::Fifo => {
                let header = entry.header();
                let file_type = match kind {
                    EntryType::Char => FileType::CharacterDevice,
                    EntryType::Block => FileType::BlockDevice,
                    _ => FileType::Fifo,
                };
                let device = rustix::fs::makedev(
                    header.device_major()?.unwrap_or_default(),
                    header.device_minor()?.unwrap_or_default(),
                );
                let mode = Mode::from_raw_mode(header.mode()? & 0o7777);
                rustix::fs::mknodat(&parent, name, file_type, mode, device)?;
                fs::set_permissions(
                    &target,
                    std::os::unix::fs::PermissionsExt::from_mode(mode.as_raw_mode()),
                )?;
                std::os::unix::fs::lchown(&target, Some(id(header.uid()?)?), Some(id(header.gid()?)?))
            }
            EntryType::Regular
            | EntryType::Continuous
            | EntryType::GNUSparse
            | EntryType::Directory
            | EntryType::Symlink => entry.unpack(&target).map(drop),
            EntryType::XGlobalHeader => Ok(()),
            other => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("entry of unknown type {other:?}"),
            )),
        }
    }

    fn metadata_of_root<R: Read>(&self, entry: &tar::Entry<'_, R>) -> io::Result<()> {
        let header = entry.header();
        rustix::fs::fchmod(&self.root, Mode::from_raw_mode(header.mode()? & 0o7777))?;
        std::os::unix::fs::fchown(&self.root, Some(id(header.uid()?)?), Some(id(header.gid()?)?))
    }

    /// Opens a directory below the root, making what is missing.
    fn directory(&self, path: &Path) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let open = |path: &Path| {
            let path = if path.as_os_str().is_empty() {
                Path::new(".")
            } else {
                path
            };
            rustix::fs::openat2(self.root.as_fd(), path, flags, Mode::empty(), resolve)
        };
        match open(path) {
            Err(rustix::io::Errno::NOENT) => {
                let parent = self.directory(path.parent().unwrap_or(Path::new("")))?;
                let name = path.file_name().ok_or(io::ErrorKind::InvalidData)?;
                match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
                    Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                    Err(errno) => return Err(errno.into()),
                }
                Ok(open(path)?)
            }
            other => Ok(other?),
        }
    }

    fn hide_older(&self, directory: &Path, path: &Path) -> io::Result<()> {
        for child in fs::read_dir(directory)? {
            let child = child?;
            let name = path.join(child.file_name());
            if !self.new.iter().any(|new| new.starts_with(&name)) {
                remove(&child.path())?;
            }
        }
        Ok(())
    }

    fn set_time(&self, path: &Path, seconds: u64) -> io::Result<()> {
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        fs::File::from(self.directory(&clean(path)?)?).set_modified(time)
    }
}

fn id(number: u64) -> io::Result<u32> {
    number
        .try_into()
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "user or group id out of range"))
}

/// The path without `.` and leading `/`; `..` is an error.
fn clean(path: &Path) -> io::Result<PathBuf> {
    let mut cleaned = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(part) => cleaned.push(part),
            Component::ParentDir => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "the path leads out of the layer",
                ));
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    Ok(cleaned)
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sha2::{Digest, Sha256};

    enum Member<'a> {
        File(&'a str, &'a str),
        Directory(&'a str),
        Symlink(&'a str, &'a str),
        Hardlink(&'a str, &'a str),
    }
    use Member::{Directory, File, Hardlink, Symlink};

    fn layer(members: &[Member<'_>]) -> (Vec<u8>, Descriptor) {
        let mut builder = tar::Builder::new(Vec::new());
        for member in members {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o755);
            header.set_uid(u64::from(rustix::process::getuid().as_raw()));
            header.set_gid(u64::from(rustix::process::getgid().as_raw()));
            let (name, content, kind, link) = match member {
                File(name, content) => (name, *content, EntryType::Regular, None),
                Directory(name) => (name, "", EntryType::Directory, None),
                Symlink(name, to) => (name, "", EntryType::Symlink, Some(to)),
                Hardlink(name, to) => (name, "", EntryType::Link, Some(to)),
            };
            header.set_entry_type(kind);
            header.set_size(content.len() as u64);
            // Written into the header by hand: the builder refuses the hostile names that the tests need.
            header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
            if let Some(link) = link {
                header.as_gnu_mut().unwrap().linkname[..link.len()].copy_from_slice(link.as_bytes());
            }
            header.set_cksum();
            builder.append(&header, content.as_bytes()).unwrap();
        }
        let bytes = builder.into_inner().unwrap();
        let digest = format!("sha256:{}", super::super::source::hex(&Sha256::digest(&bytes)));
        let descriptor = Descriptor {
            media_type: "application/vnd.oci.image.layer.v1.tar".into(),
            digest,
            ..Descriptor::default()
        };
        (bytes, descriptor)
    }

    fn apply_all(rootfs: &Path, layers: &[&[Member<'_>]]) -> Result<(), ImageError> {
        layers.iter().try_for_each(|members| {
            let (bytes, descriptor) = layer(members);
            apply(bytes.as_slice(), &descriptor, rootfs)
        })
    }

    #[test]
    fn later_layers_replace_hide_and_empty() {
        let root = tempfile::tempdir().unwrap();
        apply_all(
            root.path(),
            &[
                &[
                    Directory("d"),
                    File("d/old", "1"),
                    File("gone", "1"),
                    File("was-file", "1"),
                    Directory("o"),
                    File("o/x", "1"),
                ],
                &[
                    File("d/.wh.old", ""),
                    File(".wh.gone", ""),
                    Directory("was-file"),
                    File("was-file/in", "2"),
                ],
                &[File("o/new", "3"), File("o/.wh..wh..opq", "")],
            ],
        )
        .unwrap();
        let exists = |name: &str| root.path().join(name).exists();
        assert!(!exists("d/old") && exists("d") && !exists("gone"));
        assert!(exists("was-file/in"));
        assert!(!exists("o/x") && exists("o/new"));
    }

    #[test]
    fn absolute_links_lead_into_the_image_not_the_host() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("victim"), "untouched").unwrap();
        let link = outside.path().to_str().unwrap();
        let root = tempfile::tempdir().unwrap();
        apply_all(
            root.path(),
            &[&[
                Symlink("run", "/data"),
                Directory("data"),
                File("run/file", "1"),
                Symlink("out", link),
            ]],
        )
        .unwrap();
        // Inside the image the link leads nowhere.
        for name in ["out/.wh.victim", "out/planted"] {
            assert!(matches!(
                apply_all(root.path(), &[&[File(name, "x")]]),
                Err(ImageError::Layer { .. })
            ));
        }
        assert_eq!(fs::read_to_string(root.path().join("data/file")).unwrap(), "1");
        assert_eq!(
            fs::read_to_string(outside.path().join("victim")).unwrap(),
            "untouched"
        );
        assert!(!outside.path().join("planted").exists());
    }

    #[test]
    fn a_path_with_dots_and_a_link_to_the_host_are_refused() {
        let root = tempfile::tempdir().unwrap();
        let error = apply_all(root.path(), &[&[File("../escape", "x")]]).unwrap_err();
        assert!(
            matches!(&error, ImageError::Layer { entry, .. } if entry.contains("escape")),
            "{error}"
        );
        assert!(apply_all(root.path(), &[&[Hardlink("shadow", "/etc/passwd")]]).is_err());
        assert!(!root.path().join("shadow").exists());
    }

    #[test]
    fn hard_links_share_the_file() {
        use std::os::unix::fs::MetadataExt;
        let root = tempfile::tempdir().unwrap();
        apply_all(root.path(), &[&[File("a", "1"), Hardlink("b", "a")]]).unwrap();
        assert_eq!(fs::metadata(root.path().join("a")).unwrap().nlink(), 2);
    }

    #[test]
    fn a_damaged_layer_and_an_unknown_type_are_refused() {
        let root = tempfile::tempdir().unwrap();
        let (mut bytes, mut descriptor) = layer(&[File("a", "1")]);
        bytes.extend([0; 512]);
        assert!(matches!(
            apply(bytes.as_slice(), &descriptor, root.path()),
            Err(ImageError::Digest { .. })
        ));
        descriptor.media_type = "application/vnd.oci.image.layer.v1.tar+zstd".into();
        assert!(matches!(
            apply(bytes.as_slice(), &descriptor, root.path()),
            Err(ImageError::LayerType(_))
        ));
    }
}
