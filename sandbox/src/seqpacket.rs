//! A `SOCK_SEQPACKET` channel to the VMM for asynchronous code. What the messages mean is for the users.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use protocol::channel::{self, Received};
use tokio::io::unix::AsyncFd;

/// This process's end of a channel.
#[derive(Debug)]
pub(crate) struct Seqpacket(AsyncFd<OwnedFd>);

impl Seqpacket {
    /// Makes a pair: this process's end, and the other's end as a plain blocking descriptor.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = channel::pair()?;
        rustix::io::ioctl_fionbio(&ours, true)?;
        // SAFETY: an OwnedFd refers to the same open descriptor until it is dropped, and AsyncFd owns it.
        let ours = unsafe { AsyncFd::register(ours) }?;
        Ok((Self(ours), theirs))
    }

    /// Sends a message at once; `WouldBlock` when the peer is behind.
    pub fn try_send(&self, message: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        channel::send(self.0.get_ref(), message, fds)
    }

    /// Sends a message.
    pub async fn send(&self, message: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        loop {
            let mut ready = self.0.writable().await?;
            if let Ok(sent) = ready.try_io(|socket| channel::send(socket.get_ref(), message, fds)) {
                return sent;
            }
        }
    }

    /// Receives a message.
    pub async fn receive(&self) -> io::Result<Received> {
        loop {
            let mut ready = self.0.readable().await?;
            if let Ok(received) = ready.try_io(|socket| channel::receive(socket.get_ref())) {
                return received;
            }
        }
    }
}
