//! What goes wrong with a VMM.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use protocol::vmm::{Failure, FailureKind};

use super::{ANSWER_TIMEOUT, VmExit};
use crate::boot_files::BootFileError;
use crate::error::{ErrorKind, kind_of_io};

/// What went wrong with a VMM.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// Something that the VM boots from is missing.
    #[error(transparent)]
    BootFile(#[from] BootFileError),
    /// The VMM's program is missing.
    #[error(
        "the VMM {0} does not exist: `make install` puts it there, and the key `vmm` of the configuration names it"
    )]
    NoVmm(PathBuf),
    /// The VMM could not be spawned.
    #[error("the VMM {path} cannot be started: {stage}")]
    Spawn {
        /// Its program.
        path: PathBuf,
        /// What failed: a part of spawning, and the kernel's error.
        stage: String,
        /// The kernel's error.
        cause: io::Error,
    },
    /// A socket or pipe for the VMM could not be made.
    #[error("a channel to the VMM cannot be made")]
    Channel(#[source] io::Error),
    /// A request could not be sent.
    #[error("the VMM cannot be asked to {what}")]
    Send {
        /// The request.
        what: &'static str,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The VMM refused a request.
    #[error("the VMM could not {what}")]
    Refused {
        /// The request.
        what: &'static str,
        /// Its answer.
        #[source]
        cause: Failure,
    },
    /// The VMM did not answer.
    #[error("the VMM did not answer the request to {what} for {} s", ANSWER_TIMEOUT.as_secs())]
    Silent {
        /// The request.
        what: &'static str,
    },
    /// The VMM's answer is not the one that belongs to the request.
    #[error("the VMM gave the wrong answer to the request to {what}: use runtime and VMM of one release")]
    WrongAnswer {
        /// The request.
        what: &'static str,
    },
    /// The VMM is gone.
    #[error("{0}")]
    Gone(Arc<VmExit>),
    /// All block slots are occupied.
    #[error(
        "this VM has only {0} slots for block devices and all are in use: raise `block_slots` in the configuration"
    )]
    NoSlot(usize),
}

impl VmError {
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::BootFile(error) => error.kind(),
            Self::NoVmm(_) => ErrorKind::FailedPrecondition,
            Self::Spawn { cause, .. } | Self::Channel(cause) | Self::Send { cause, .. } => kind_of_io(cause),
            Self::Refused { cause, .. } => match cause.kind {
                FailureKind::Resources => ErrorKind::ResourceExhausted,
                FailureKind::Invalid => ErrorKind::InvalidArgument,
                FailureKind::State | FailureKind::Version | FailureKind::Image => {
                    ErrorKind::FailedPrecondition
                }
                FailureKind::Kvm => ErrorKind::Unavailable,
                FailureKind::Io => ErrorKind::Internal,
            },
            Self::Silent { .. } | Self::Gone(_) => ErrorKind::Unavailable,
            Self::WrongAnswer { .. } => ErrorKind::Internal,
            Self::NoSlot(_) => ErrorKind::ResourceExhausted,
        }
    }
}
