//! The host's ends of standard I/O: anything that bytes can be read from or written to, without ever blocking the
//! runtime's thread.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{CWD, FileType, Mode, OFlags, RawMode};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

/// How much is copied at once: what a fifo holds. Memory is only touched as far as bytes come.
pub(super) const CHUNK: usize = 64 * 1024;

/// Where input comes from.
#[derive(Debug)]
pub(super) enum Source {
    /// A descriptor that says when it can be read.
    Polled(Polled),
    /// Bytes from a thread that reads something that cannot say so.
    Thread(mpsc::Receiver<io::Result<Vec<u8>>>),
}

/// Where output goes.
#[derive(Debug)]
pub(super) enum Sink {
    /// Nowhere.
    Discard,
    /// A descriptor that says when it can be written. The other descriptor is only held open.
    Polled(Polled, #[expect(dead_code, reason = "held open")] Option<OwnedFd>),
    /// A file, written on a blocking thread. Shared, when both outputs go to one.
    File(Arc<File>),
}

/// A descriptor for which the runtime waits.
#[derive(Debug)]
pub(super) struct Polled {
    fd: AsyncFd<OwnedFd>,
    /// Read and written by socket calls, which can be told not to block without changing the socket for others.
    socket: bool,
}

impl Polled {
    /// For a descriptor opened with O_NONBLOCK.
    pub(super) fn nonblocking(fd: OwnedFd, interest: Interest) -> io::Result<Self> {
        Ok(Self {
            fd: register(fd, interest)?,
            socket: false,
        })
    }

    /// Waits for bytes and appends them to `buffer`; none at the end.
    pub(super) async fn read(&self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        loop {
            let mut ready = self.fd.readable().await?;
            buffer.reserve(CHUNK);
            let spare = rustix::buffer::spare_capacity(buffer);
            let result = ready.try_io(|fd| {
                let result = if self.socket {
                    rustix::net::recv(fd, spare, RecvFlags::DONTWAIT).map(|(length, _)| length)
                } else {
                    rustix::io::read(fd, spare)
                };
                result.map_err(io::Error::from)
            });
            match result {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return result,
                Err(_not_ready) => {}
            }
        }
    }

    async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut ready = self.fd.writable().await?;
            let result = ready.try_io(|fd| {
                let result = if self.socket {
                    rustix::net::send(fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
                } else {
                    rustix::io::write(fd, bytes)
                };
                result.map_err(io::Error::from)
            });
            match result {
                Ok(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(Ok(written)) => bytes = &bytes[written..],
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_not_ready) => {}
            }
        }
        Ok(())
    }
}

impl Source {
    /// From a descriptor that others may share: its flags stay as they are.
    pub(super) fn of_descriptor(fd: OwnedFd) -> io::Result<Self> {
        match poll_descriptor(fd, OFlags::RDONLY, Interest::READABLE)? {
            Ok(polled) => Ok(Self::Polled(polled)),
            Err(fd) => Self::thread(File::from(fd)),
        }
    }

    /// Reads on a thread of its own, which ends with the file, with this source, or with the process.
    fn thread(mut file: File) -> io::Result<Self> {
        let (sender, receiver) = mpsc::channel(1);
        let read = move || {
            loop {
                let mut buffer = vec![0; CHUNK];
                let result = match file.read(&mut buffer) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    result => result,
                };
                let end = !matches!(result, Ok(length) if length > 0);
                let chunk = result.map(|length| {
                    buffer.truncate(length);
                    buffer
                });
                if sender.blocking_send(chunk).is_err() || end {
                    return;
                }
            }
        };
        std::thread::Builder::new()
            .name("kata-rs-stdin".into())
            .spawn(read)?;
        Ok(Self::Thread(receiver))
    }

    /// Waits for bytes and puts them into `buffer`, which is empty; none at the end. Nothing is lost when the future
    /// is dropped.
    pub(super) async fn read(&mut self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        match self {
            Self::Polled(polled) => polled.read(buffer).await,
            Self::Thread(chunks) => match chunks.recv().await {
                Some(chunk) => {
                    *buffer = chunk?;
                    Ok(buffer.len())
                }
                None => Ok(0),
            },
        }
    }
}

impl Sink {
    /// To a descriptor that others may share: its flags stay as they are.
    pub(super) fn of_descriptor(fd: OwnedFd) -> io::Result<Self> {
        Ok(match poll_descriptor(fd, OFlags::WRONLY, Interest::WRITABLE)? {
            Ok(polled) => Self::Polled(polled, None),
            Err(fd) => Self::File(Arc::new(File::from(fd))),
        })
    }

    /// Writes all of `bytes` and gives the memory back.
    pub(super) async fn write_all(&self, bytes: Vec<u8>) -> (Vec<u8>, io::Result<()>) {
        match self {
            Self::Discard => (bytes, Ok(())),
            Self::Polled(polled, _) => {
                let result = polled.write_all(&bytes).await;
                (bytes, result)
            }
            Self::File(file) => {
                let file = Arc::clone(file);
                let write = move || {
                    let result = (&*file).write_all(&bytes);
                    (bytes, result)
                };
                match tokio::task::spawn_blocking(write).await {
                    Ok(written) => written,
                    Err(error) => (Vec::new(), Err(io::Error::other(error))),
                }
            }
        }
    }
}

/// Makes a descriptor pollable without changing the open file, which others share (the caller's shell, for one):
/// pipes and terminals are opened anew. Gives it back when it cannot be polled.
fn poll_descriptor(fd: OwnedFd, access: OFlags, interest: Interest) -> io::Result<Result<Polled, OwnedFd>> {
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode as RawMode);
    let (candidate, socket) = match kind {
        FileType::Socket => (rustix::io::fcntl_dupfd_cloexec(&fd, 0)?, true),
        FileType::Fifo | FileType::CharacterDevice => {
            let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
            let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
            match rustix::fs::openat(CWD, path.as_str(), flags, Mode::empty()) {
                Ok(opened) => (opened, false),
                // A terminal of another user, or no /proc.
                Err(Errno::ACCESS | Errno::NXIO | Errno::NOENT | Errno::IO) => return Ok(Err(fd)),
                Err(errno) => return Err(errno.into()),
            }
        }
        _ => return Ok(Err(fd)),
    };
    match register(candidate, interest) {
        Ok(polled) => Ok(Ok(Polled { fd: polled, socket })),
        // What epoll(7) does not support, as /dev/null, never makes anybody wait.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => Ok(Err(fd)),
        Err(error) => Err(error),
    }
}

fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names the same open descriptor for as long as it lives, and AsyncFd keeps it for as long as
    // it is registered.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest)? })
}
