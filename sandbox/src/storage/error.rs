//! Why storage could not be planned or opened.

use std::io;
use std::path::PathBuf;

use protocol::vmm::MAX_EXTENTS;

use crate::error::{ErrorKind, kind_of_io};

/// Why storage could not be planned or opened.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// A container id that cannot be part of a file name.
    #[error(
        "the container id {0:?} is not valid: use at most 200 letters, digits and the characters `_.+-`, a dot not first"
    )]
    ContainerId(String),
    /// Neither the caller nor the specification names a root file system.
    #[error("the container has no root file system: neither mounts were given nor `root.path` is set")]
    NoRootfs,
    /// A form of root file system that is not supported.
    #[error("a root file system of type {kind:?} is not supported: {cure}")]
    RootfsKind {
        /// The mount's type, or the types of several.
        kind: String,
        /// What is supported.
        cure: &'static str,
    },
    /// A root file system's mount option that is malformed or not supported.
    #[error("the option {option:?} of the {what} mount is not valid: {reason}")]
    Option {
        /// Which mount.
        what: String,
        /// Which option.
        option: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A mount of the specification whose destination cannot be mounted on.
    #[error("the mount destination {0:?} is not valid: give an absolute path below `/` without `..`")]
    Destination(PathBuf),
    /// A mount of the specification that maps ids.
    #[error("the mount on {0} maps ids, which is not supported: mount it without `idmap` and id mappings")]
    IdMapped(PathBuf),
    /// A mount of the specification that wants its mounts to appear on the host.
    #[error(
        "the mount on {0} is {1}: mounts made in a virtual machine cannot appear on the host: use rslave or rprivate"
    )]
    SharedPropagation(PathBuf, String),
    /// A mount of the specification with a type that the guest does not have.
    #[error(
        "the mount on {destination} has the type {kind:?}, which is not supported: use bind or one of {known}"
    )]
    MountKind {
        /// Where it was to be mounted.
        destination: PathBuf,
        /// Its type.
        kind: String,
        /// The types that are.
        known: String,
    },
    /// A bind mount without a source.
    #[error("the bind mount on {0} has no source")]
    NoSource(PathBuf),
    /// A bind mount's source cannot be had by a virtual machine.
    #[error("{source_path} cannot be mounted on {destination}: {reason}")]
    Unshareable {
        /// The source.
        source_path: PathBuf,
        /// The destination.
        destination: PathBuf,
        /// Why, and what to do instead.
        reason: &'static str,
    },
    /// The source of a mount does not exist.
    #[error("{what} {path} does not exist")]
    Missing {
        /// What it was to be.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
    },
    /// The source of a mount is of another kind than it must be.
    #[error("{what} {path} is not {expected}")]
    Kind {
        /// What it was to be.
        what: &'static str,
        /// Where it is.
        path: PathBuf,
        /// What it must be.
        expected: &'static str,
    },
    /// The source of a mount cannot be opened or looked at.
    #[error("{what} {path} cannot be opened: {cause}")]
    Open {
        /// What it was to be.
        what: &'static str,
        /// Where it is.
        path: PathBuf,
        /// Why not.
        #[source]
        cause: io::Error,
    },
    /// Something else has come to be at a path since it was looked at.
    #[error("{0} was replaced while it was being mounted: try again, and see who changes it")]
    Replaced(PathBuf),
    /// The kernel refused the overlay.
    #[error("the overlay cannot be mounted: {stage}: {cause}{}", log(.messages))]
    Overlay {
        /// At which system call or option.
        stage: String,
        /// Why.
        #[source]
        cause: io::Error,
        /// What the kernel said besides; may be empty.
        messages: String,
    },
    /// The kernel refused to make a detached mount.
    #[error("{path} cannot be shared: {stage}: {cause}")]
    Mount {
        /// What was to be shared.
        path: PathBuf,
        /// At which system call.
        stage: &'static str,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// A block device or image is in use.
    #[error("the block device {0} is in use: unmount it, or end the container that has it")]
    BlockBusy(PathBuf),
    /// A block device or image has a size that no disk has.
    #[error("the block device {path} has {bytes} bytes: it must hold a multiple of 512, and some")]
    BlockSize {
        /// The device.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// A template of a root file system's mount.
    #[error("the template in {text:?} cannot be filled in: {reason}")]
    Template {
        /// The whole text.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A root file system's mount inside another.
    #[error(
        "a root file system with a mount on {0:?} is not supported: use a snapshotter that mounts on `/` only"
    )]
    RootfsTarget(String),
    /// More layers than one disk can have.
    #[error(
        "the root file system has {0} layers and devices, at most {MAX_EXTENTS} can be attached: build the image with fewer layers"
    )]
    TooManyLayers(usize),
    /// A character device that no guest has.
    #[error(
        "the device {path} ({number}) is the host's, and devices of the host other than block devices cannot be given to \
         a virtual machine: remove it, or use another runtime for this container"
    )]
    Device {
        /// Where the container was to have it.
        path: PathBuf,
        /// Its number.
        number: String,
    },
    /// An image or device without the file system that it shall have.
    #[error("{path} holds no {kind} file system: remove the image and pull it again")]
    NotFileSystem {
        /// The image or device.
        path: PathBuf,
        /// Which file system it shall have.
        kind: String,
    },
    /// An image whose end is missing.
    #[error(
        "{path} has {bytes} of the {wanted} bytes of its file system: remove the image and pull it again"
    )]
    Truncated {
        /// The image.
        path: PathBuf,
        /// How much the file system needs.
        wanted: u64,
        /// How much there is.
        bytes: u64,
    },
    /// An image that shall be made with a size that it cannot have.
    #[error("{path} cannot be made with {bytes} bytes: a writable layer has 16 MiB to 16 TiB")]
    ImageSize {
        /// The image.
        path: PathBuf,
        /// The size.
        bytes: u64,
    },
    /// An image could not be made.
    #[error("{path} cannot be made as an ext4 image of {bytes} bytes: {cause}")]
    MakeImage {
        /// The image.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// Why not.
        #[source]
        cause: io::Error,
    },
    /// An upper directory that the guest would not see holds files.
    #[error(
        "{0} holds files, and a container with its layers on block devices would not see them: remove the container and \
         make it anew, or give containerd's erofs snapshotter a default_size"
    )]
    UpperInUse(PathBuf),
}

fn log(messages: &str) -> String {
    if messages.is_empty() {
        String::new()
    } else {
        format!(" (the kernel says: {messages})")
    }
}

impl StorageError {
    /// What kind of failure it is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::ContainerId(_)
            | Self::NoRootfs
            | Self::Option { .. }
            | Self::Destination(_)
            | Self::NoSource(_)
            | Self::Kind { .. }
            | Self::BlockSize { .. }
            | Self::Template { .. }
            | Self::TooManyLayers(_)
            | Self::NotFileSystem { .. }
            | Self::Truncated { .. }
            | Self::ImageSize { .. } => ErrorKind::InvalidArgument,
            Self::RootfsKind { .. }
            | Self::RootfsTarget(_)
            | Self::Device { .. }
            | Self::IdMapped(_)
            | Self::SharedPropagation(..)
            | Self::MountKind { .. }
            | Self::Unshareable { .. } => ErrorKind::Unimplemented,
            Self::Missing { .. } => ErrorKind::NotFound,
            Self::BlockBusy(_) | Self::Replaced(_) | Self::UpperInUse(_) => ErrorKind::FailedPrecondition,
            Self::Open { cause, .. }
            | Self::Overlay { cause, .. }
            | Self::Mount { cause, .. }
            | Self::MakeImage { cause, .. } => kind_of_io(cause),
        }
    }

    /// Says what could not be opened, and tells a missing thing from one that is there.
    pub(super) fn opening(what: &'static str, path: impl Into<PathBuf>, cause: io::Error) -> Self {
        let path = path.into();
        match cause.kind() {
            io::ErrorKind::NotFound => Self::Missing { what, path },
            _ => Self::Open { what, path, cause },
        }
    }
}

impl From<StorageError> for crate::Error {
    fn from(error: StorageError) -> Self {
        Self::Other {
            kind: error.kind(),
            message: crate::error::chain(&error),
        }
    }
}
