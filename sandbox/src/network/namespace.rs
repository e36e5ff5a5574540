//! A network namespace, and doing something in it: on a thread of its own, which enters it and ends in it, so that no
//! other work ever finds itself there.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::sync::oneshot;

use super::error::NetworkError;

/// A network namespace that is not this process's own.
#[derive(Clone, Debug)]
pub(crate) struct Namespace(Arc<File>);

impl Namespace {
    /// Opens the one at this path; `None` when it is this process's own, in which nothing may be rewired.
    pub fn open(path: &Path) -> Result<Option<Self>, NetworkError> {
        let failed = |cause: io::Error| NetworkError::Open {
            path: path.to_owned(),
            cause,
        };
        // Opening a pipe must not wait for its other end.
        let file = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(failed)?;
        let theirs = file.metadata().map_err(failed)?;
        let own = std::fs::metadata("/proc/self/ns/net").map_err(NetworkError::Enter)?;
        let same = (theirs.dev(), theirs.ino()) == (own.dev(), own.ino());
        Ok((!same).then(|| Self(Arc::new(file))))
    }

    /// Does something in it. The result comes over the thread's handle.
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<JoinHandle<Result<T, NetworkError>>, NetworkError> {
        let file = Arc::clone(&self.0);
        let enter_and_work = move || {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(|error| NetworkError::Enter(error.into()))?;
            Ok(work())
        };
        std::thread::Builder::new()
            .name("network".to_owned())
            .spawn(enter_and_work)
            .map_err(NetworkError::Enter)
    }

    /// Does something in it and waits for the result.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, NetworkError> {
        let (done, result) = oneshot::channel();
        // A thread that cannot enter drops the sender.
        let thread = self.spawn(move || drop(done.send(work())))?;
        match result.await {
            Ok(result) => Ok(result),
            Err(_dropped) => match join(thread) {
                Err(error) => Err(error),
                Ok(()) => Err(NetworkError::Enter(io::Error::other(
                    "the thread ended without a result",
                ))),
            },
        }
    }
}

/// What became of a thread's work.
pub(crate) fn join<T>(thread: JoinHandle<Result<T, NetworkError>>) -> Result<T, NetworkError> {
    thread
        .join()
        .unwrap_or_else(|_| Err(NetworkError::Enter(io::Error::other("the thread panicked"))))
}
