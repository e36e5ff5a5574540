//! What can go wrong in a call, and how the host is told (agent.proto, "Errors").

use protobuf::EnumOrUnknown;
use protobuf::well_known_types::any::Any;
use protocol::agent::Failure;
use protocol::agent::failure::Reason;
use rustix::io::Errno;
use ttrpc::{Code, Status};

use crate::container::cgroup::CgroupError;
use crate::container::spec::SpecError;
use crate::container::{HugePagesError, SpawnError};
use crate::network::NetworkError;
use crate::storage::{FilesError, StorageError};

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such container or process.
    #[error("there is no {0} in the guest")]
    NotFound(String),
    /// The process has exited.
    #[error("the process has already finished")]
    Exited,
    /// The id is taken.
    #[error("{0} exists already")]
    Exists(String),
    /// The object's state forbids it.
    #[error("{0}")]
    State(String),
    /// The request contradicts itself.
    #[error("{0}")]
    Invalid(String),
    /// The specification.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The storage.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Huge pages.
    #[error(transparent)]
    HugePages(#[from] HugePagesError),
    /// The process.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// The network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A stream to the host.
    #[error("cannot connect {name} to the host: {source}")]
    Stream {
        name: &'static str,
        source: std::io::Error,
    },
    /// Any other system call.
    #[error("cannot {what}: {source}")]
    Kernel { what: String, source: Errno },
    /// A CPU that does not come or go.
    #[error("cannot {what}: {source}")]
    Cpu { what: String, source: std::io::Error },
    /// The event queue.
    #[error("the guest's event queue: {0}")]
    Queue(#[from] std::io::Error),
    /// A fault of the agent itself.
    #[error("the agent failed: {0}")]
    Internal(String),
}

impl Error {
    /// The system's error that is behind it.
    fn errno(&self) -> Option<Errno> {
        let raw = |error: &std::io::Error| error.raw_os_error().map(Errno::from_raw_os_error);
        match self {
            Self::Kernel { source, .. } => Some(*source),
            Self::Network(NetworkError::Kernel { source, .. }) => Some(source.errno),
            Self::Stream { source, .. } | Self::Cpu { source, .. } | Self::Queue(source) => raw(source),
            Self::Spawn(
                SpawnError::Clone { source, .. }
                | SpawnError::Step { source, .. }
                | SpawnError::Executable { source, .. },
            ) => Some(*source),
            Self::Storage(
                StorageError::Mount { source, .. }
                | StorageError::ShareMissing { source, .. }
                | StorageError::Partition { source, .. },
            ) => Some(*source),
            Self::Storage(StorageError::VolumeFiles {
                source: FilesError::Kernel { source, .. },
                ..
            }) => Some(*source),
            Self::Storage(StorageError::Directory { source, .. }) => raw(source),
            Self::Cgroup(CgroupError::Directory { source, .. } | CgroupError::Refused { source, .. }) => {
                raw(source)
            }
            _ => None,
        }
    }

    /// The code for programs.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::NotFound(_) | Self::Exited => Code::NOT_FOUND,
            Self::Exists(_) => Code::ALREADY_EXISTS,
            Self::State(_) => Code::FAILED_PRECONDITION,
            Self::Invalid(_) => Code::INVALID_ARGUMENT,
            Self::Spec(error) | Self::Cgroup(CgroupError::Spec(error)) => match error {
                SpecError::Unsupported { .. } => Code::UNIMPLEMENTED,
                SpecError::Syntax { .. } | SpecError::Invalid { .. } => Code::INVALID_ARGUMENT,
            },
            Self::Storage(error) => match error {
                StorageError::Invalid { .. }
                | StorageError::Volume { .. }
                | StorageError::VolumeFiles {
                    source: FilesError::Entry { .. },
                    ..
                } => Code::INVALID_ARGUMENT,
                StorageError::Option { source, .. } => match source {
                    crate::container::mount::OptionError::Unsupported(_) => Code::UNIMPLEMENTED,
                    _ => Code::INVALID_ARGUMENT,
                },
                StorageError::NoShares(_)
                | StorageError::ShareMissing { .. }
                | StorageError::PathMissing { .. }
                | StorageError::VolumeMissing(_)
                | StorageError::BlockMissing { .. } => Code::NOT_FOUND,
                // fsopen(2) says so of a file system that the kernel does not have.
                StorageError::Mount {
                    source: Errno::NODEV, ..
                } => Code::UNIMPLEMENTED,
                StorageError::Mount { .. }
                | StorageError::VolumeFiles { .. }
                | StorageError::Partition { .. }
                | StorageError::Directory { .. } => self.code_of_errno(),
            },
            Self::Spawn(SpawnError::Executable { source, .. }) => match *source {
                Errno::NOENT | Errno::NOTDIR => Code::NOT_FOUND,
                errno if is_refusal(errno) => Code::PERMISSION_DENIED,
                _ => self.code_of_errno(),
            },
            Self::Network(NetworkError::NoDevice(..)) => Code::NOT_FOUND,
            Self::Network(NetworkError::Invalid(_)) => Code::INVALID_ARGUMENT,
            Self::HugePages(error) => match error {
                HugePagesError::Size(_) => Code::INVALID_ARGUMENT,
                HugePagesError::Unknown(..) => Code::UNIMPLEMENTED,
                HugePagesError::Short { .. } => Code::RESOURCE_EXHAUSTED,
                HugePagesError::Kernel { .. } => Code::INTERNAL,
            },
            Self::Cgroup(CgroupError::BelowUse { .. }) => Code::FAILED_PRECONDITION,
            Self::Spawn(_)
            | Self::Cgroup(_)
            | Self::Stream { .. }
            | Self::Kernel { .. }
            | Self::Network(NetworkError::Kernel { .. })
            | Self::Cpu { .. }
            | Self::Queue(_)
            | Self::Internal(_) => self.code_of_errno(),
        }
    }

    fn code_of_errno(&self) -> Code {
        match self.errno() {
            Some(Errno::NOMEM | Errno::NOSPC | Errno::AGAIN | Errno::MFILE | Errno::NFILE | Errno::DQUOT) => {
                Code::RESOURCE_EXHAUSTED
            }
            Some(Errno::NOSYS) => Code::UNIMPLEMENTED,
            _ => Code::INTERNAL,
        }
    }

    /// The reason, and the thing that is at fault where it is one word.
    fn failure(&self) -> (Reason, String) {
        let none = String::new;
        match self {
            Self::Spec(error) | Self::Cgroup(CgroupError::Spec(error)) => match error {
                SpecError::Syntax { document, .. } => (Reason::SPEC_INVALID, (*document).into()),
                SpecError::Invalid { member, .. } => (Reason::SPEC_INVALID, member.clone()),
                SpecError::Unsupported { member, .. } => (Reason::SPEC_UNSUPPORTED, member.clone()),
            },
            Self::Storage(error) => match error {
                StorageError::Invalid { target, .. } => (Reason::SPEC_INVALID, target.clone()),
                StorageError::Option { target, .. } => match self.code() {
                    Code::UNIMPLEMENTED => (Reason::SPEC_UNSUPPORTED, target.clone()),
                    _ => (Reason::SPEC_INVALID, target.clone()),
                },
                StorageError::NoShares(_) => (Reason::STORAGE_MISSING, none()),
                StorageError::ShareMissing { name, .. } => (Reason::STORAGE_MISSING, name.clone()),
                StorageError::PathMissing { path, .. } => {
                    (Reason::STORAGE_MISSING, path.display().to_string())
                }
                StorageError::VolumeMissing(name) => (Reason::STORAGE_MISSING, name.clone()),
                StorageError::Volume { name, .. } | StorageError::VolumeFiles { name, .. } => {
                    (Reason::REASON_UNSPECIFIED, name.clone())
                }
                StorageError::BlockMissing { serial, .. } | StorageError::Partition { serial, .. } => {
                    (Reason::STORAGE_MISSING, serial.clone())
                }
                StorageError::Mount { target, .. } => (Reason::MOUNT_FAILED, target.clone()),
                StorageError::Directory { path, .. } => {
                    (Reason::REASON_UNSPECIFIED, path.display().to_string())
                }
            },
            Self::Spawn(SpawnError::Executable { source, .. }) => match *source {
                Errno::NOENT | Errno::NOTDIR => (Reason::EXECUTABLE_NOT_FOUND, none()),
                errno if is_refusal(errno) => (Reason::EXECUTABLE_NOT_PERMITTED, none()),
                _ => (Reason::REASON_UNSPECIFIED, none()),
            },
            Self::Spawn(SpawnError::Step {
                what, mount: true, ..
            }) => (Reason::MOUNT_FAILED, what.clone()),
            Self::Cgroup(CgroupError::Refused { file, .. }) => (Reason::CGROUP_REFUSED, file.clone()),
            Self::Cgroup(CgroupError::BelowUse { .. }) => (Reason::CGROUP_REFUSED, "memory.max".into()),
            Self::Cgroup(CgroupError::Devices { .. }) => (Reason::CGROUP_REFUSED, "devices".into()),
            _ => (Reason::REASON_UNSPECIFIED, none()),
        }
    }
}

/// Errors that mean that a file is there but no program: exit status 126 of a shell.
fn is_refusal(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::ACCESS | Errno::PERM | Errno::ISDIR | Errno::NOEXEC | Errno::LIBBAD | Errno::TXTBSY
    )
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        let (reason, subject) = error.failure();
        let failure = Failure {
            reason: EnumOrUnknown::new(reason),
            subject,
            ..Default::default()
        };
        let mut status = Status::new();
        status.set_code(error.code());
        status.set_message(error.to_string());
        if let Ok(detail) = Any::pack(&failure) {
            // ttrpc has a type of its own for the same message.
            let mut own = ttrpc::proto::Any::new();
            own.type_url = detail.type_url;
            own.value = detail.value;
            status.details.push(own);
        }
        Self::RpcStatus(status)
    }
}
