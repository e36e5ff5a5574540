//! What `exec`, `update` and `kill` say to the process that holds a container.
//!
//! A `SOCK_SEQPACKET` socket; each message is one JSON document, descriptors travel with the first. One
//! connection carries one request; `Exec` stays open until the process has exited.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use sandbox::channel::{self, Received};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

use crate::error::Error;

/// From the caller.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Run a process. Descriptors: its standard input if `interactive`, its output, and without a terminal its
    /// error output.
    Exec {
        command: Vec<String>,
        environment: Vec<String>,
        user: Option<String>,
        workdir: Option<String>,
        interactive: bool,
        terminal: bool,
    },
    /// Signal the container's first process, or on an open `Exec` the process.
    Signal(u32),
    /// Change the container's limits: the OCI specification's `linux.resources`.
    Update(serde_json::Value),
    /// The terminal of an open `Exec` has this size: rows, columns.
    Resize(u16, u16),
}

/// From the holder.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// The process runs.
    Started,
    /// The process has exited with this status and all its output has been written.
    Exited(u8),
    /// Done.
    Done,
    /// It did not work; the caller exits with `status`.
    Failed { message: String, status: u8 },
}

/// One end of a connection.
pub struct Connection(AsyncFd<OwnedFd>);

impl Connection {
    /// Connects to a holder.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = socket()?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        Self::new(socket)
    }

    fn new(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self(register(socket)?))
    }

    /// Sends one message.
    pub async fn send(&self, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let text = serde_json::to_vec(message).map_err(io::Error::other)?;
        loop {
            let mut guard = self.0.writable().await?;
            if let Ok(result) = guard.try_io(|socket| channel::send(socket.as_fd(), &text, fds)) {
                return result;
            }
        }
    }

    /// Receives one message; `None` when the peer is gone.
    pub async fn receive<T: for<'de> Deserialize<'de>>(&self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        loop {
            let mut guard = self.0.readable().await?;
            let Ok(result) = guard.try_io(|socket| channel::receive(socket.as_fd())) else {
                continue;
            };
            return match result? {
                Received::Closed => Ok(None),
                Received::Message(text, fds) => Ok(Some((serde_json::from_slice(&text)?, fds))),
            };
        }
    }
}

/// Where a holder listens; the file goes when this is dropped.
pub struct Listener {
    socket: AsyncFd<OwnedFd>,
    path: std::path::PathBuf,
}

impl Listener {
    /// Listens at `path`, reachable for the owner only.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn bind(path: &Path) -> Result<Self, Error> {
        let bind = || -> io::Result<AsyncFd<OwnedFd>> {
            let socket = socket()?;
            rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
            rustix::net::listen(&socket, 16)?;
            register(socket)
        };
        let socket = bind().map_err(Error::file("cannot listen on", path))?;
        Ok(Self {
            socket,
            path: path.to_owned(),
        })
    }

    /// The next connection.
    pub async fn accept(&self) -> io::Result<Connection> {
        loop {
            let mut guard = self.socket.readable().await?;
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            if let Ok(result) = guard.try_io(|socket| Ok(rustix::net::accept_with(socket, flags)?)) {
                return Connection::new(result?);
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn register(socket: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names the same open descriptor for as long as it lives, and closes it only when dropped.
    Ok(unsafe { AsyncFd::register(socket) }?)
}

fn socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        flags,
        None,
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_with_descriptors_reaches_the_holder_and_its_reply_the_caller() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c.sock");
        crate::block_on(async {
            let listener = Listener::bind(&path)?;
            let caller = Connection::connect(&path).unwrap();
            let holder = listener.accept().await.unwrap();
            let null = std::fs::File::open("/dev/null").unwrap();
            caller.send(&Request::Signal(9), &[null.as_fd()]).await.unwrap();
            let (request, fds) = holder.receive::<Request>().await.unwrap().unwrap();
            assert_eq!((request, fds.len()), (Request::Signal(9), 1));
            holder.send(&Reply::Done, &[]).await.unwrap();
            assert_eq!(caller.receive::<Reply>().await.unwrap().unwrap().0, Reply::Done);
            drop(holder);
            assert!(caller.receive::<Reply>().await.unwrap().is_none());
            Ok(())
        })
        .unwrap();
        assert!(!path.exists(), "the socket went with its listener");
    }
}
