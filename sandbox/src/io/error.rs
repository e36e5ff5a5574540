//! Why standard I/O could not be opened.

use std::io;
use std::path::PathBuf;

use crate::error::{ErrorKind, kind_of_io};

/// Why standard I/O could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum IoError {
    /// A target in a form that is not known.
    #[error(
        "the standard I/O target {0:?} is not valid: give an absolute path of a fifo, or an address that begins with \
         fifo://, file://, binary:// or binary-v2://"
    )]
    Target(String),
    /// Input from something that only takes output.
    #[error("standard input cannot come from {0:?}: give an absolute path of a fifo")]
    NotInput(String),
    /// Something cannot be opened.
    #[error("{what} {path} cannot be opened: {cause}")]
    Open {
        /// What it is.
        what: &'static str,
        /// Where it is.
        path: PathBuf,
        /// Why not.
        #[source]
        cause: io::Error,
    },
    /// The log program cannot be started.
    #[error("the log program {path} cannot be started: {cause}")]
    LoggerStart {
        /// The program.
        path: PathBuf,
        /// Why not.
        #[source]
        cause: io::Error,
    },
    /// The log program ended or hung before it said that it is ready.
    #[error("the log program {path} did not become ready: {reason}")]
    LoggerReady {
        /// The program.
        path: PathBuf,
        /// What it did instead.
        reason: String,
    },
    /// The kernel refused a descriptor, a pipe or random numbers.
    #[error("standard I/O cannot be set up: {stage}: {cause}")]
    System {
        /// At what.
        stage: &'static str,
        /// Why.
        #[source]
        cause: io::Error,
    },
}

impl IoError {
    /// What kind of failure it is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Target(_) | Self::NotInput(_) => ErrorKind::InvalidArgument,
            Self::LoggerReady { .. } => ErrorKind::FailedPrecondition,
            Self::Open { cause, .. } | Self::LoggerStart { cause, .. }
                if cause.kind() == io::ErrorKind::NotFound =>
            {
                ErrorKind::NotFound
            }
            Self::Open { cause, .. } | Self::LoggerStart { cause, .. } | Self::System { cause, .. } => {
                kind_of_io(cause)
            }
        }
    }

    pub(super) fn system(stage: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |cause| Self::System { stage, cause }
    }
}

impl From<IoError> for crate::Error {
    fn from(error: IoError) -> Self {
        Self::Other {
            kind: error.kind(),
            message: crate::error::chain(&error),
        }
    }
}
