//! Directories and files of the host as detached mounts.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags};

use super::error::StorageError;
use super::holder::{HeldMount, MountHolder};
use super::plan::{FileBind, ReadOnly};
use super::probe::{FileKind, FileSystem, Place, inspect, open_path};
use super::sys::{attr, clone_tree, in_private_namespace, set_attributes};

/// Clones a directory's mount, from the directory on.
pub(super) fn clone_directory(
    source: &Path,
    place: Option<Place>,
    recursive: bool,
    read_only: ReadOnly,
    receive_mounts: bool,
) -> Result<OwnedFd, StorageError> {
    let place = open_same(source, place, FileKind::Directory, "a directory")?;
    let failed = |stage| move |cause| mount_error(source, stage, cause);
    let tree = clone_tree(&place, recursive).map_err(failed("open_tree"))?;
    let everywhere = match read_only {
        ReadOnly::Recursive => attr::SHARE | attr::RDONLY,
        ReadOnly::No | ReadOnly::Top => attr::SHARE,
    };
    let propagation = if receive_mounts {
        libc::MS_SLAVE
    } else {
        libc::MS_PRIVATE
    };
    set_attributes(&tree, true, everywhere, Some(propagation)).map_err(failed("mount_setattr"))?;
    if read_only == ReadOnly::Top {
        set_attributes(&tree, false, attr::RDONLY, None).map_err(failed("mount_setattr"))?;
    }
    Ok(tree)
}

/// Gives a clone that is a slave of the host's mounts a place where it receives them.
pub(super) fn hold(
    source: &Path,
    tree: &OwnedFd,
    holder: &MountHolder,
) -> Result<(OwnedFd, HeldMount), StorageError> {
    holder
        .hold(tree)
        .map_err(|cause| mount_error(source, "finding a place for mounts of the host's", cause))
}

/// Gathers single files in one directory, each under its position as name: a share must be a directory.
pub(super) fn gather_files(files: &[FileBind]) -> Result<OwnedFd, StorageError> {
    // Cloned here, where their paths mean what the caller meant, and moved to where they can be gathered.
    let clones = files.iter().map(clone_file).collect::<Result<Vec<_>, _>>()?;
    in_private_namespace(|| gather(&clones))
        .map_err(|cause| mount_error(Path::new("the files to be mounted"), "gathering them", cause))
}

fn clone_file(file: &FileBind) -> Result<OwnedFd, StorageError> {
    let place = open_same(&file.source, Some(file.place), FileKind::File, "a regular file")?;
    let failed = |stage| move |cause| mount_error(&file.source, stage, cause);
    let tree = clone_tree(&place, false).map_err(failed("open_tree"))?;
    let set = if file.read_only {
        attr::SHARE | attr::RDONLY
    } else {
        attr::SHARE
    };
    set_attributes(&tree, false, set, Some(libc::MS_PRIVATE)).map_err(failed("mount_setattr"))?;
    Ok(tree)
}

/// Must run in a private mount namespace.
fn gather(clones: &[OwnedFd]) -> io::Result<OwnedFd> {
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&context, "mode", "0755")?;
    rustix::mount::fsconfig_create(&context)?;
    let directory = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    // Before Linux 6.15 nothing can be mounted on a detached mount, so it is attached for the time being.
    rustix::mount::move_mount(
        &directory,
        c"",
        CWD,
        c"/",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )?;
    for (index, clone) in clones.iter().enumerate() {
        let name = index.to_string();
        let create = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        rustix::fs::openat(&directory, name.as_str(), create, Mode::RUSR)?;
        let from_fd = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        rustix::mount::move_mount(clone, c"", &directory, name.as_str(), from_fd)?;
    }
    let tree = clone_tree(&directory, true)?;
    // The guest must not fill the host's memory by making files beside the mounted ones.
    set_attributes(&tree, false, attr::SHARE | attr::RDONLY, None)?;
    Ok(tree)
}

/// Like [`open_kind`], and sees that it is the very file that was planned: a path that was replaced meanwhile, by a
/// symbolic link to elsewhere for instance, is not followed.
fn open_same(
    path: &Path,
    planned: Option<Place>,
    kind: FileKind,
    expected: &'static str,
) -> Result<OwnedFd, StorageError> {
    let place = open_kind(path, kind, expected)?;
    if let Some(planned) = planned {
        let found =
            inspect(&place).map_err(|cause| StorageError::opening("the mount's source", path, cause))?;
        if !found.place.is_file_of(planned) {
            return Err(StorageError::Replaced(path.to_owned()));
        }
    }
    Ok(place)
}

/// Opens a path as a place and sees that it still is what the plan took it for.
pub(super) fn open_kind(
    path: &Path,
    kind: FileKind,
    expected: &'static str,
) -> Result<OwnedFd, StorageError> {
    const WHAT: &str = "the directory or file to be shared,";
    let opening = |cause| StorageError::opening(WHAT, path, cause);
    let place = open_path(path).map_err(opening)?;
    let info = inspect(place.as_fd()).map_err(opening)?;
    match (info.kind == kind, info.file_system) {
        (true, FileSystem::Ordinary | FileSystem::Tmpfs { .. }) => Ok(place),
        (true, FileSystem::Kernel(_) | FileSystem::Huge { .. } | FileSystem::Cgroup) => {
            Err(StorageError::Kind {
                what: WHAT,
                path: path.to_owned(),
                expected: "on a file system that can be shared",
            })
        }
        (false, _) => Err(StorageError::Kind {
            what: WHAT,
            path: path.to_owned(),
            expected,
        }),
    }
}

fn mount_error(path: &Path, stage: &'static str, cause: io::Error) -> StorageError {
    StorageError::Mount {
        path: path.to_owned(),
        stage,
        cause,
    }
}
