//! From a snapshotter's mounts and the OCI specification's mounts to what a container sees.
//!
//! [`plan`] is a pure function but for looking at paths: it decides what the host opens ([`HostStep`]) and what the
//! guest mounts. [`realize`] opens: each host step becomes descriptors that the VMM gets, a detached mount or what a
//! disk consists of. Nothing is ever mounted where another process sees it, so nothing is left over when a process dies.
//!
//! Sending the descriptors to the VMM and the guest's half to the agent is not done here.

mod devices;
mod disk;
mod error;
mod ext4;
pub(crate) mod files;
mod guest;
mod holder;
mod kubelet;
mod layers;
#[cfg(test)]
mod layers_tests;
mod mountinfo;
mod mounts;
mod options;
mod plan;
#[cfg(test)]
mod plan_tests;
mod probe;
#[cfg(test)]
mod realize_tests;
mod rootfs;
mod share;
mod sys;
mod template;

use std::os::fd::OwnedFd;
use std::path::Path;

use oci_spec::runtime::Spec;
use protocol::vmm::CachePolicy;

use crate::api::RootfsMount;

pub use devices::DeviceDisk;
pub use disk::{Disk, DiskName, Part};
pub use error::StorageError;
pub use files::{FilesVolume, Watch};
pub use holder::{HeldMount, MountHolder};
pub use mountinfo::MountTable;
pub use plan::{
    Content, Context, Directory, DiskPart, FileBind, GuestMount, HostStep, MemoryVolume, MountSource,
    NewImage, Overlay, Plan, ReadOnly,
};
pub use probe::{FileKind, FileSystem, Host, Owner, Place, SourceInfo, probe, shm_bytes};

/// A directory that the guest shall see.
#[derive(Debug)]
pub struct Share {
    /// Its name under the virtio-fs root: one path component.
    pub name: String,
    /// The root of a detached mount.
    pub fd: OwnedFd,
    /// How the guest may cache.
    pub cache: CachePolicy,
    /// Whether containers of the pod have it in common.
    pub pooled: bool,
    /// Its place in the pod's mount namespace, if it receives mounts of the host.
    pub held: Option<HeldMount>,
}

/// What a plan's host steps became.
#[derive(Debug, Default)]
pub struct Attachments {
    /// In the plan's order.
    pub shares: Vec<Share>,
    /// In the plan's order: [`MountSource::Block`]'s `disk` counts these.
    pub disks: Vec<Disk>,
    /// In the plan's order.
    pub volumes: Vec<FilesVolume>,
}

/// Plans the storage of the container `id`: of its specification, its bundle directory, and its root file system's
/// mounts.
///
/// # Errors
/// [`StorageError`] that names the mount which is malformed, not supported, or whose source is missing.
pub fn plan(spec: &Spec, bundle: &Path, rootfs: &[RootfsMount], id: &str) -> Result<Plan, StorageError> {
    let context = Context {
        container_id: id,
        bundle,
        pod_shm: None,
    };
    Plan::new(context, spec, rootfs, &probe)
}

/// Opens what a plan names. Blocks: call it where that is allowed. Volumes are given to `watch` before they are read;
/// one that is not fit for a copy becomes a share in the plan.
/// Shares that receive mounts of the host are put into `holder`.
///
/// # Errors
/// [`StorageError`]; what had been opened is closed again.
pub fn realize(plan: &mut Plan, watch: Watch<'_>, holder: &MountHolder) -> Result<Attachments, StorageError> {
    let mut attachments = Attachments::default();
    let mut room = files::MAX_BYTES;
    let mut unfit = Vec::new();
    for step in &plan.host {
        let mut is_pooled = false;
        let mut held = None;
        let (name, fd, cache) = match step {
            HostStep::Disk { parts } => {
                attachments.disks.push(disk::open(parts)?);
                continue;
            }
            HostStep::Device { number, read_only } => {
                attachments.disks.push(disk::open_device(*number, *read_only)?);
                continue;
            }
            HostStep::Unseen { directory } => {
                disk::must_be_empty(directory)?;
                continue;
            }
            HostStep::Overlay { share, overlay } => {
                (share, rootfs::mount_overlay(overlay)?, CachePolicy::Exclusive)
            }
            HostStep::Directory {
                share,
                source,
                recursive,
                read_only,
                receive_mounts,
                cache,
                place,
                pooled,
            } => {
                is_pooled = *pooled;
                let mut fd = share::clone_directory(source, *place, *recursive, *read_only, *receive_mounts)?;
                if *receive_mounts {
                    let (placed, mount) = share::hold(source, &fd, holder)?;
                    fd = placed;
                    held = Some(mount);
                }
                (share, fd, *cache)
            }
            HostStep::Volume {
                volume,
                source,
                place,
            } => {
                if let Some(found) = FilesVolume::open(volume, source, *place, room, watch)? {
                    room = room.saturating_sub(files::size(&found.tree));
                    attachments.volumes.push(found);
                    continue;
                }
                is_pooled = true;
                unfit.push(volume.clone());
                let fd = share::clone_directory(source, Some(*place), false, ReadOnly::Recursive, false)?;
                (volume, fd, CachePolicy::Shared)
            }
            HostStep::Files { share, files } => (share, share::gather_files(files)?, CachePolicy::Shared),
        };
        attachments.shares.push(Share {
            name: name.clone(),
            fd,
            cache,
            pooled: is_pooled,
            held,
        });
    }
    for volume in unfit {
        plan.share_instead_of(&volume);
    }
    Ok(attachments)
}
