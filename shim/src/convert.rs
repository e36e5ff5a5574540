//! Between the sandbox's types and the callers' APIs: calls, errors to gRPC codes, times, states, mounts.

use std::time::SystemTime;

use containerd_shim_protos::types::mount::Mount;
use containerd_shim_protos::types::task::Status as TaskStatus;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageField};
use sandbox::{Error, ErrorKind, RootfsMount, Status, StdioTarget};
use ttrpc::Code;

/// A failed call as ttrpc carries it.
pub fn status(code: Code, message: impl Into<String>) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, message.into()))
}

/// The gRPC code that containerd maps back to its own error kinds.
///
/// An executable that cannot be executed is an invalid argument: not `NotFound`, which callers take to mean the
/// container; which of the two it is, Docker and podman read in the text.
pub fn code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::NotFound => Code::NOT_FOUND,
        ErrorKind::AlreadyExists => Code::ALREADY_EXISTS,
        ErrorKind::FailedPrecondition => Code::FAILED_PRECONDITION,
        ErrorKind::InvalidArgument | ErrorKind::ExecutableNotFound | ErrorKind::ExecutableNotPermitted => {
            Code::INVALID_ARGUMENT
        }
        ErrorKind::Unimplemented => Code::UNIMPLEMENTED,
        ErrorKind::ResourceExhausted => Code::RESOURCE_EXHAUSTED,
        ErrorKind::Unavailable => Code::UNAVAILABLE,
        ErrorKind::PermissionDenied => Code::PERMISSION_DENIED,
        ErrorKind::Internal => Code::INTERNAL,
    }
}

/// Runs a call to its end even when its caller goes away.
pub async fn to_the_end<T: Send + 'static>(
    call: impl Future<Output = ttrpc::Result<T>> + Send + 'static,
) -> ttrpc::Result<T> {
    match tokio::spawn(call).await {
        Ok(result) => result,
        Err(error) => Err(status(Code::INTERNAL, format!("the call ended early: {error}"))),
    }
}

/// An answer that cannot be encoded.
pub fn encoding(error: &protobuf::Error) -> ttrpc::Error {
    status(Code::INTERNAL, format!("cannot encode the answer: {error}"))
}

/// A failed sandbox call as ttrpc carries it, with the words callers look for to tell exit status 127 from 126.
pub fn failure(error: &Error) -> ttrpc::Error {
    let kind = error.kind();
    status(code(kind), describe(kind, error.to_string()))
}

fn describe(kind: ErrorKind, text: String) -> String {
    let words = match kind {
        ErrorKind::ExecutableNotFound => "executable file not found",
        ErrorKind::ExecutableNotPermitted => "permission denied",
        _ => return text,
    };
    if text.contains(words) {
        text
    } else {
        format!("{words}: {text}")
    }
}

/// A point in time.
pub fn timestamp(time: SystemTime) -> MessageField<Timestamp> {
    MessageField::some(time.into())
}

/// A message of containerd's own, in an `Any` whose type is the bare name, as its typeurl package registers it. The
/// package is given because asking the message for it would build the descriptors of its whole file.
pub fn any<M: Message>(package: &str, message: &M) -> protobuf::Result<Any> {
    Ok(Any {
        type_url: format!("{package}.{}", M::NAME),
        value: message.write_to_bytes()?,
        ..Any::default()
    })
}

/// A process's state.
pub fn task_status(status: Status) -> TaskStatus {
    match status {
        Status::Created => TaskStatus::CREATED,
        Status::Running => TaskStatus::RUNNING,
        Status::Paused => TaskStatus::PAUSED,
        Status::Pausing => TaskStatus::PAUSING,
        Status::Stopped => TaskStatus::STOPPED,
    }
}

/// A snapshotter's mount, from containerd.
pub fn rootfs_mount(mount: Mount) -> RootfsMount {
    RootfsMount {
        kind: mount.type_,
        source: mount.source,
        target: mount.target,
        options: mount.options,
    }
}

/// A snapshotter's mount, to containerd.
pub fn mount(mount: RootfsMount) -> Mount {
    Mount {
        type_: mount.kind,
        source: mount.source,
        target: mount.target,
        options: mount.options,
        ..Mount::default()
    }
}

/// A standard I/O URI; the empty one is /dev/null.
pub fn stdio_target(uri: String) -> StdioTarget {
    if uri.is_empty() {
        StdioTarget::Null
    } else {
        StdioTarget::Uri(uri)
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::events::task::TaskExit;
    use protobuf::MessageFull as _;
    use sandbox::ProcessId;

    use super::*;

    fn parts(error: ttrpc::Error) -> (Code, String) {
        match error {
            ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
            other => panic!("not a status: {other}"),
        }
    }

    #[test]
    fn errors_keep_their_meaning() {
        let cases = [
            (Error::NoContainer("c".into()), Code::NOT_FOUND),
            (Error::Finished(ProcessId::init("c")), Code::NOT_FOUND),
            (Error::Exists(ProcessId::exec("c", "e")), Code::ALREADY_EXISTS),
            (
                Error::State {
                    operation: "delete",
                    process: ProcessId::init("c"),
                    status: Status::Running,
                },
                Code::FAILED_PRECONDITION,
            ),
            (Error::Unsupported("x".into()), Code::UNIMPLEMENTED),
            (Error::Gone("x".into()), Code::UNAVAILABLE),
        ];
        for (error, expected) in cases {
            let (code, text) = parts(failure(&error));
            assert_eq!(code, expected, "{error}");
            assert_eq!(text, error.to_string());
        }
    }

    #[test]
    fn executables_that_do_not_execute_have_dockers_words() {
        for (kind, words) in [
            (ErrorKind::ExecutableNotFound, "executable file not found"),
            (ErrorKind::ExecutableNotPermitted, "permission denied"),
        ] {
            let (code, text) = parts(failure(&Error::Other {
                kind,
                message: "exec \"nope\"".into(),
            }));
            assert_eq!(code, Code::INVALID_ARGUMENT);
            assert_eq!(text, format!("{words}: exec \"nope\""));
            assert_eq!(describe(kind, text.clone()), text, "said once is enough");
        }
    }

    #[test]
    fn an_any_has_the_bare_name() {
        let exit = TaskExit {
            container_id: "c".into(),
            ..TaskExit::default()
        };
        let any = any("containerd.events", &exit).unwrap();
        assert_eq!(any.type_url, "containerd.events.TaskExit");
        assert_eq!(any.type_url, TaskExit::descriptor().full_name());
        assert_eq!(any.value, b"\x0a\x01c");
    }
}
