//! What can go wrong with a sandbox, for people (the message names the thing and the cure) and for code
//! ([`ErrorKind`]).
//!
//! Each module has an error type of its own; this is where they meet.

use std::fmt;
use std::sync::Arc;

use protocol::agent::failure::Reason;

use crate::api::{ProcessId, Status};

/// What a caller may want to tell apart; the doors map these to their protocols' codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// No such container or process, or it has exited.
    NotFound,
    /// The id is taken.
    AlreadyExists,
    /// The state of the thing forbids it.
    FailedPrecondition,
    /// The request contradicts itself or is malformed.
    InvalidArgument,
    /// Not supported.
    Unimplemented,
    /// Out of memory, descriptors, disk, pids.
    ResourceExhausted,
    /// The VM is gone or does not answer.
    Unavailable,
    /// This process may not do it.
    PermissionDenied,
    /// Anything else.
    Internal,
    /// The container's executable does not exist: exit status 127 at a command line.
    ExecutableNotFound,
    /// The container's executable cannot be executed: exit status 126 at a command line.
    ExecutableNotPermitted,
}

/// Why a call on a [`Sandbox`](crate::Sandbox) failed. Its `Display` is one line with the whole chain of causes.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// No such container.
    #[error("container {0} does not exist in this sandbox")]
    NoContainer(String),
    /// No such exec.
    #[error("{0} does not exist")]
    NoProcess(ProcessId),
    /// The process has exited.
    #[error("{0}: process already finished")]
    Finished(ProcessId),
    /// The id is taken.
    #[error("{0} already exists")]
    Exists(ProcessId),
    /// The process is in another state than the call needs.
    #[error("cannot {operation} {process}: it is {status}")]
    State {
        /// The call.
        operation: &'static str,
        /// The process.
        process: ProcessId,
        /// Its state.
        status: Status,
    },
    /// The container is about to be deleted or is still being made.
    #[error("cannot {operation} container {container}: it is being {what}")]
    Busy {
        /// The call.
        operation: &'static str,
        /// The container.
        container: String,
        /// What it is going through: `created`, `deleted`.
        what: &'static str,
    },
    /// The container is the pod's sandbox.
    #[error(
        "cannot {operation} container {container}: it is the sandbox of a pod, which has no process in the guest; name \
         one of the pod's containers"
    )]
    OnlySandbox {
        /// The call.
        operation: &'static str,
        /// The container.
        container: String,
    },
    /// The container has annotations that are not allowed.
    #[error(transparent)]
    Annotation(#[from] crate::annotations::AnnotationError),
    /// The container asks for namespaces it cannot have.
    #[error(transparent)]
    Namespace(#[from] crate::namespaces::NamespaceError),
    /// The request is malformed.
    #[error("{0}")]
    Invalid(String),
    /// The OCI specification is malformed.
    #[error("the OCI specification of {what} is not valid: {message}")]
    Spec {
        /// Whose.
        what: String,
        /// What is wrong.
        message: String,
    },
    /// The VM cannot become as large as new limits of a container need it.
    #[error(
        "the new limits of container {container} need a VM with {wanted}, this one can have {most} at most: for pods \
         started from now on `{key}` in the configuration allows more"
    )]
    TooLarge {
        /// The container.
        container: String,
        /// What is needed.
        wanted: String,
        /// What there can be.
        most: String,
        /// The configuration's key.
        key: &'static str,
    },
    /// Not supported.
    #[error("{0}")]
    Unsupported(String),
    /// The sandbox never became ready.
    #[error("the sandbox did not start: {0}")]
    Start(Arc<Error>),
    /// The VM is gone.
    #[error("the VM of this sandbox is gone: {0}")]
    Gone(String),
    /// The VMM could not be started or refused.
    #[error("{}", chain(.0.as_ref()))]
    Vm(#[source] Arc<crate::vm::VmError>),
    /// The agent cannot be talked to.
    #[error("{}", chain(.0.as_ref()))]
    Agent(#[source] Arc<crate::agent::AgentError>),
    /// The agent refused or failed.
    #[error("{0}")]
    Guest(GuestFailure),
    /// A process on the host could not be started.
    #[error("{}", chain(.0.as_ref()))]
    Task(#[source] Arc<crate::proxy::TaskError>),
    /// The pod's network on the host.
    #[error("{}", chain(.0.as_ref()))]
    Network(#[source] Arc<crate::network::NetworkError>),
    /// Something else, already in words.
    #[error("{message}")]
    Other {
        /// For code.
        kind: ErrorKind,
        /// For people.
        message: String,
    },
}

/// A failure that the agent reported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestFailure {
    /// The status code's meaning.
    pub kind: ErrorKind,
    /// What the call was about.
    pub what: String,
    /// The agent's message.
    pub message: String,
    /// The thing at fault, when the agent named one.
    pub subject: String,
    /// The agent's reason.
    pub reason: Reason,
}

impl fmt::Display for GuestFailure {
    /// Docker and podman choose between exit status 127 and 126 by words in the message (moby
    /// `daemon/errors.go`, `translateContainerdStartErr`); where the agent's own lack them they are added.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known: &[&str] = match self.kind {
            ErrorKind::ExecutableNotFound => &["executable file not found", "no such file or directory"],
            ErrorKind::ExecutableNotPermitted => &["permission denied", "not a directory", "is a directory"],
            _ => &[],
        };
        write!(f, "{}: ", self.what)?;
        if let Some(words) = known.first()
            && !known.iter().any(|words| self.message.contains(words))
        {
            write!(f, "exec: {:?}: {words}: ", self.subject)?;
        }
        f.write_str(&self.message)
    }
}

impl From<crate::proxy::TaskError> for Error {
    fn from(error: crate::proxy::TaskError) -> Self {
        Self::Task(Arc::new(error))
    }
}

impl From<crate::network::NetworkError> for Error {
    fn from(error: crate::network::NetworkError) -> Self {
        Self::Network(Arc::new(error))
    }
}

impl From<crate::vm::VmError> for Error {
    fn from(error: crate::vm::VmError) -> Self {
        Self::Vm(Arc::new(error))
    }
}

impl Error {
    /// What kind of failure it is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NoContainer(_) | Self::NoProcess(_) | Self::Finished(_) => ErrorKind::NotFound,
            Self::Exists(_) => ErrorKind::AlreadyExists,
            Self::State { .. } | Self::Busy { .. } => ErrorKind::FailedPrecondition,
            Self::Invalid(_) | Self::Spec { .. } => ErrorKind::InvalidArgument,
            Self::TooLarge { .. } => ErrorKind::ResourceExhausted,
            Self::Unsupported(_) | Self::OnlySandbox { .. } => ErrorKind::Unimplemented,
            Self::Annotation(error) => error.kind(),
            Self::Namespace(error) => error.kind(),
            Self::Start(cause) => cause.kind(),
            Self::Gone(_) => ErrorKind::Unavailable,
            Self::Vm(error) => error.kind(),
            Self::Agent(error) => error.kind(),
            Self::Guest(failure) => failure.kind,
            Self::Task(error) => error.kind(),
            Self::Network(error) => error.kind(),
            Self::Other { kind, .. } => *kind,
        }
    }
}

/// An error and its causes in one line, without saying anything twice.
#[must_use]
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let part = cause.to_string();
        if !text.ends_with(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        source = cause.source();
    }
    text
}

/// What kind of failure the kernel's error number is.
#[must_use]
pub fn kind_of_io(error: &std::io::Error) -> ErrorKind {
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => ErrorKind::PermissionDenied,
        Some(libc::ENOMEM | libc::EMFILE | libc::ENFILE | libc::ENOSPC | libc::EAGAIN | libc::EDQUOT) => {
            ErrorKind::ResourceExhausted
        }
        Some(libc::EINVAL | libc::ENOTDIR | libc::ENAMETOOLONG | libc::ELOOP) => ErrorKind::InvalidArgument,
        Some(libc::EOPNOTSUPP | libc::ENOSYS) => ErrorKind::Unimplemented,
        _ => ErrorKind::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_executable_reads_as_docker_expects() {
        let failure = GuestFailure {
            kind: ErrorKind::ExecutableNotFound,
            what: "starting container c".into(),
            message: "not there".into(),
            subject: "nope".into(),
            reason: Reason::EXECUTABLE_NOT_FOUND,
        };
        let error = Error::Guest(failure);
        assert_eq!(error.kind(), ErrorKind::ExecutableNotFound);
        assert_eq!(
            error.to_string(),
            r#"starting container c: exec: "nope": executable file not found: not there"#
        );
    }

    #[test]
    fn a_chain_says_nothing_twice() {
        #[derive(Debug, thiserror::Error)]
        #[error("opening x: {0}")]
        struct Outer(#[source] std::io::Error);
        let error = Outer(std::io::Error::from_raw_os_error(libc::ENOENT));
        assert_eq!(chain(&error), "opening x: No such file or directory (os error 2)");
    }
}
