//! Root file systems as detached mounts: overlays.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags};

use super::error::StorageError;
use super::plan::Overlay;
use super::probe::{FileKind, open_path};
use super::share::open_kind;
use super::sys::{attr, clone_tree, in_private_namespace, set_attributes};

/// Where the older way of mounting puts an overlay, in a mount namespace of its own: any directory but /proc, through
/// which the layers are named.
const SCRATCH: &str = "/sys";

/// Mounts an overlay, detached.
///
/// With an index of the files that have several names in a layer (overlayfs.rst, "Inodes index"), although containerd
/// says `index=off`: without one the names part when one of them is changed, and the file's number with them, while
/// the VMM's file server has taken them for one file. Where there can be no index (the file system has no handles, the
/// upper directory is mounted elsewhere at this moment, or came from another place), the mount is as it was asked for.
pub(super) fn mount_overlay(overlay: &Overlay) -> Result<OwnedFd, StorageError> {
    if overlay.upper.is_some() {
        let mut indexed = overlay.clone();
        indexed.options.retain(|option| !option.starts_with("index="));
        indexed.options.push("index=on".to_owned());
        if let Ok(mount) = mount(&indexed) {
            return Ok(mount);
        }
    }
    mount(overlay)
}

fn mount(overlay: &Overlay) -> Result<OwnedFd, StorageError> {
    match mount_by_descriptor(overlay) {
        Err(Refusal::NotSupported) => mount_by_path(overlay),
        Err(Refusal::Failed(error)) => Err(error),
        Ok(mount) => Ok(mount),
    }
}

enum Refusal {
    /// This kernel's overlayfs takes no single layers: before Linux 6.7.
    NotSupported,
    Failed(StorageError),
}

impl From<StorageError> for Refusal {
    fn from(error: StorageError) -> Self {
        Self::Failed(error)
    }
}

/// The overlay's directories, opened.
struct Layers {
    lower: Vec<OwnedFd>,
    upper: Option<(OwnedFd, OwnedFd)>,
}

impl Layers {
    fn open(overlay: &Overlay) -> Result<Self, StorageError> {
        let directory = |path: &Path| open_kind(path, FileKind::Directory, "a directory");
        Ok(Self {
            lower: overlay
                .lower
                .iter()
                .map(|path| directory(path))
                .collect::<Result<_, _>>()?,
            upper: match &overlay.upper {
                Some((upper, work)) => Some((directory(upper)?, directory(work)?)),
                None => None,
            },
        })
    }
}

/// A name for an open directory that overlayfs can look up: short whatever the path, without characters that the
/// options give a meaning, and of exactly this directory.
fn name_of(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// The file system configuration API. An option's value has at most 255 bytes there, so each lower directory needs an
/// option of its own: `lowerdir+`, Linux 6.7.
fn mount_by_descriptor(overlay: &Overlay) -> Result<OwnedFd, Refusal> {
    let layers = Layers::open(overlay)?;
    let context = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(|errno| refused("fsopen", errno, String::new()))?;
    let fail = |stage: &str| {
        let stage = stage.to_owned();
        let context = &context;
        move |errno| refused(&stage, errno, kernel_messages(context))
    };
    for (index, lower) in layers.lower.iter().enumerate() {
        match rustix::mount::fsconfig_set_string(&context, "lowerdir+", name_of(lower)) {
            Err(Errno::INVAL) if index == 0 => return Err(Refusal::NotSupported),
            other => other.map_err(fail("lowerdir"))?,
        }
    }
    if let Some((upper, work)) = &layers.upper {
        rustix::mount::fsconfig_set_string(&context, "upperdir", name_of(upper)).map_err(fail("upperdir"))?;
        rustix::mount::fsconfig_set_string(&context, "workdir", name_of(work)).map_err(fail("workdir"))?;
    }
    for option in &overlay.options {
        match option.split_once('=') {
            Some((key, value)) => rustix::mount::fsconfig_set_string(&context, key, value),
            None => rustix::mount::fsconfig_set_flag(&context, option.as_str()),
        }
        .map_err(fail(option))?;
    }
    rustix::mount::fsconfig_create(&context).map_err(fail("fsconfig"))?;
    let mut attributes = attr::SHARE;
    if overlay.read_only {
        attributes |= attr::RDONLY;
    }
    let attributes = MountAttrFlags::from_bits_retain(u32::try_from(attributes).expect("flags of 32 bits"));
    let mount = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes);
    Ok(mount.map_err(fail("fsmount"))?)
}

/// mount(2), where nobody sees it.
pub(super) fn mount_by_path(overlay: &Overlay) -> Result<OwnedFd, StorageError> {
    let mut missing = None;
    let mounted = in_private_namespace(|| {
        // Opened here: overlayfs takes only directories of the caller's own mount namespace.
        let layers = match Layers::open(overlay) {
            Ok(layers) => layers,
            Err(error) => {
                missing = Some(error);
                return Err(io::ErrorKind::NotFound.into());
            }
        };
        let lower: Vec<String> = layers.lower.iter().map(name_of).collect();
        let mut data = format!("lowerdir={}", lower.join(":"));
        if let Some((upper, work)) = &layers.upper {
            data += &format!(",upperdir={},workdir={}", name_of(upper), name_of(work));
        }
        for option in &overlay.options {
            data.push(',');
            data.push_str(option);
        }
        let data = CString::new(data)?;
        rustix::mount::mount(
            "overlay",
            SCRATCH,
            "overlay",
            MountFlags::empty(),
            data.as_c_str(),
        )?;
        let place = open_path(Path::new(SCRATCH))?;
        let tree = clone_tree(&place, false)?;
        let set = if overlay.read_only {
            attr::SHARE | attr::RDONLY
        } else {
            attr::SHARE
        };
        set_attributes(&tree, false, set, Some(libc::MS_PRIVATE))?;
        Ok(tree)
    });
    match missing {
        Some(error) => Err(error),
        None => mounted.map_err(|cause| StorageError::Overlay {
            stage: "mount".to_owned(),
            cause,
            messages: String::new(),
        }),
    }
}

fn refused(stage: &str, errno: Errno, messages: String) -> StorageError {
    StorageError::Overlay {
        stage: stage.to_owned(),
        cause: errno.into(),
        messages,
    }
}

/// What the kernel logged into a file system context: one message for each read, `e `, `w ` or `i ` before it
/// (fs/fs_context.c).
fn kernel_messages(context: &OwnedFd) -> String {
    let mut messages = Vec::new();
    let mut buffer = [0; 1024];
    while let Ok(length) = rustix::io::read(context, &mut buffer) {
        let text = String::from_utf8_lossy(&buffer[..length]);
        let text = text.trim();
        messages.push(text.get(2..).unwrap_or(text).to_owned());
        if length == 0 || messages.len() == 16 {
            break;
        }
    }
    messages.join("; ")
}
