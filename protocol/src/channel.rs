//! One message with its file descriptors over a `SOCK_SEQPACKET` Unix socket (unix(7), `SCM_RIGHTS`).
//!
//! The control channel and the vsock connection channel of the VMM are such sockets. Framing is the
//! socket's own; a message that does not fit is an error on both sides, never a truncation.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// The most bytes one message carries.
pub const MAX_MESSAGE: usize = 128 * 1024;
/// The most file descriptors one message carries (the kernel's `SCM_MAX_FD` is 253).
pub const MAX_FDS: usize = 128;

/// A message was received, or the peer has closed its end.
#[derive(Debug)]
pub enum Received {
    /// One whole message and the descriptors that came with it, close-on-exec.
    Message(Vec<u8>, Vec<OwnedFd>),
    /// The peer has closed the socket; nothing more will come.
    Closed,
}

/// Creates a connected pair of channels, both ends close-on-exec.
///
/// # Errors
/// Whatever socketpair(2) reports.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?)
}

/// Sends one message with its descriptors. The descriptors are duplicated into the peer; the caller keeps its own.
///
/// # Errors
/// `InvalidInput` when the message is empty or larger than [`MAX_MESSAGE`] or carries more than [`MAX_FDS`]
/// descriptors; otherwise what sendmsg(2) reports (`WouldBlock` on a non-blocking socket).
pub fn send(socket: impl AsFd, message: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    if message.is_empty() || message.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "a message of {} bytes and {} descriptors is outside 1..={MAX_MESSAGE} bytes and 0..={MAX_FDS} descriptors",
                message.len(),
                fds.len()
            ),
        ));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(fds));
    }
    let sent = loop {
        match sendmsg(
            &socket,
            &[IoSlice::new(message)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        ) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other?,
        }
    };
    debug_assert_eq!(sent, message.len(), "a seqpacket socket sends a message whole");
    Ok(())
}

/// Receives one message with its descriptors.
///
/// # Errors
/// `InvalidData` when the peer's message was larger than [`MAX_MESSAGE`] or lost descriptors on the way (too
/// many, or this process is out of descriptors); otherwise what recvmsg(2) reports.
pub fn receive(socket: impl AsFd) -> io::Result<Received> {
    let mut bytes = vec![0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match recvmsg(
            &socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other?,
        }
    };
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received
        .flags
        .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
    {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a control message was cut off: too long, too many descriptors, or this process is out of descriptors (RLIMIT_NOFILE)",
        ));
    }
    if received.bytes == 0 && fds.is_empty() {
        return Ok(Received::Closed);
    }
    bytes.truncate(received.bytes);
    Ok(Received::Message(bytes, fds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn a_message_arrives_whole_with_its_descriptors_in_order() {
        let (left, right) = pair().unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        send(&left, b"two descriptors", &[null.as_fd(), writer.as_fd()]).unwrap();
        drop(writer);
        let Received::Message(bytes, mut fds) = receive(&right).unwrap() else {
            panic!("closed")
        };
        assert_eq!(bytes, b"two descriptors");
        assert_eq!(fds.len(), 2);
        let mut writer = std::io::PipeWriter::from(fds.pop().unwrap());
        writer.write_all(b"through the second").unwrap();
        drop(writer);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through the second");
    }

    #[test]
    fn a_closed_peer_is_told_from_a_message() {
        let (left, right) = pair().unwrap();
        send(&left, b"x", &[]).unwrap();
        drop(left);
        assert!(matches!(receive(&right).unwrap(), Received::Message(bytes, _) if bytes == b"x"));
        assert!(matches!(receive(&right).unwrap(), Received::Closed));
    }

    #[test]
    fn a_message_that_is_too_long_is_refused_by_the_sender() {
        let (left, _right) = pair().unwrap();
        let error = send(&left, &vec![0; MAX_MESSAGE + 1], &[]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert_eq!(
            send(&left, b"", &[]).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
    }

    #[test]
    fn a_message_that_is_too_long_is_refused_by_the_receiver() {
        let (left, right) = pair().unwrap();
        rustix::net::send(&left, &vec![0; MAX_MESSAGE + 1], SendFlags::empty()).unwrap();
        assert_eq!(receive(&right).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
