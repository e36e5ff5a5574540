//! The socket.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};

use crate::message::{HEADER, Message, Reply};
use crate::{Attributes, Error};

/// Flags of a request (`linux/netlink.h`).
const REQUEST: u16 = 0x01;
const ACK: u16 = 0x04;
const DUMP: u16 = 0x300;
/// Flags of answers.
const DUMP_INTERRUPTED: u16 = 0x10;
const ACK_TLVS: u16 = 0x200;
/// Kinds of messages that netlink itself knows.
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// `NLMSGERR_ATTR_MSG`.
const ERROR_MESSAGE: u16 = 1;
/// The kernel fills at most 32 KiB at a time (`netlink_dump`).
const BUFFER: usize = 64 * 1024;
/// A dump during which things change is not whole; so often it is begun again.
const DUMP_TRIES: usize = 5;

/// What is spoken with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Links, addresses, routes, neighbours, traffic control.
    Route,
    /// The packet filter.
    Netfilter,
}

/// A connection to the kernel of one network namespace.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// What one message of the kernel says about a request.
enum Part {
    Reply(Reply),
    /// An acknowledgement, a refusal, or the end of a dump.
    End(Result<(), Error>),
}

impl Socket {
    /// Opens one to the network namespace that the calling thread is in.
    ///
    /// # Errors
    /// Those of socket(2).
    pub fn open(family: Family) -> Result<Self, Error> {
        let protocol = match family {
            Family::Route => None,
            Family::Netfilter => Some(netlink::NETFILTER),
        };
        let fd = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            protocol,
        )?;
        let on: libc::c_int = 1;
        for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK] {
            // SAFETY: the value is an int that outlives the call. A kernel without the option is less talkative.
            unsafe {
                libc::setsockopt(
                    fd.as_raw_fd(),
                    libc::SOL_NETLINK,
                    option,
                    (&raw const on).cast(),
                    size_of::<libc::c_int>() as libc::socklen_t,
                )
            };
        }
        Ok(Self {
            fd,
            sequence: 0,
            buffer: vec![0; BUFFER],
        })
    }

    /// Opens one that is told about changes in these groups (`RTMGRP_LINK`, …).
    ///
    /// # Errors
    /// Those of socket(2) and bind(2).
    pub fn listen(family: Family, groups: u32) -> Result<Self, Error> {
        let socket = Self::open(family)?;
        rustix::net::bind(&socket.fd, &netlink::SocketAddrNetlink::new(0, groups))?;
        Ok(socket)
    }

    /// What it was told since the last call. Does not wait.
    ///
    /// # Errors
    /// [`Errno::NOBUFS`] when something was lost because nobody listened.
    pub fn events(&mut self) -> Result<Vec<Reply>, Error> {
        let mut events = Vec::new();
        loop {
            match self.receive(RecvFlags::DONTWAIT) {
                Ok(parts) => events.extend(parts.into_iter().filter_map(|(_, _, part)| match part {
                    Part::Reply(event) => Some(event),
                    Part::End(_) => None,
                })),
                Err(error) if error.errno == Errno::AGAIN => return Ok(events),
                Err(error) => return Err(error),
            }
        }
    }

    /// Has the kernel do something.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn request(&mut self, message: &Message) -> Result<(), Error> {
        let sequence = self.send(message, REQUEST | ACK)?;
        loop {
            for (answered, _, part) in self.receive(RecvFlags::empty())? {
                if let Part::End(result) = part
                    && answered == sequence
                {
                    return result;
                }
            }
        }
    }

    /// Asks for a list.
    ///
    /// # Errors
    /// What the kernel says; [`Errno::INTR`] when the list never stayed still.
    pub fn dump(&mut self, message: &Message) -> Result<Vec<Reply>, Error> {
        for _ in 0..DUMP_TRIES {
            let sequence = self.send(message, REQUEST | DUMP)?;
            let mut replies = Vec::new();
            let mut interrupted = false;
            'parts: loop {
                for (answered, flags, part) in self.receive(RecvFlags::empty())? {
                    if answered != sequence {
                        continue;
                    }
                    interrupted |= flags & DUMP_INTERRUPTED != 0;
                    match part {
                        Part::Reply(reply) => replies.push(reply),
                        Part::End(result) => {
                            result?;
                            break 'parts;
                        }
                    }
                }
            }
            if !interrupted {
                return Ok(replies);
            }
        }
        Err(Errno::INTR.into())
    }

    /// Has the kernel do all of these or nothing (`nfnetlink` batches; the first and the last message mark them).
    ///
    /// # Errors
    /// The first refusal.
    pub fn batch(&mut self, messages: &[Message]) -> Result<(), Error> {
        let mut bytes = Vec::new();
        for message in messages {
            self.sequence = self.sequence.wrapping_add(1);
            bytes.extend(message.encode(REQUEST, self.sequence));
        }
        rustix::net::send(&self.fd, &bytes, SendFlags::empty())?;
        // The kernel has said all it has to say when the send returns: nothing, where nothing went wrong.
        loop {
            match self.receive(RecvFlags::DONTWAIT) {
                Ok(parts) => {
                    for (_, _, part) in parts {
                        if let Part::End(result) = part {
                            result?;
                        }
                    }
                }
                Err(error) if error.errno == Errno::AGAIN => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    fn send(&mut self, message: &Message, flags: u16) -> Result<u32, Error> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = message.encode(flags, self.sequence);
        rustix::net::send(&self.fd, &bytes, SendFlags::empty())?;
        Ok(self.sequence)
    }

    fn receive(&mut self, flags: RecvFlags) -> Result<Vec<(u32, u16, Part)>, Error> {
        let length = loop {
            match rustix::net::recv(&self.fd, self.buffer.as_mut_slice(), flags | RecvFlags::TRUNC) {
                Err(Errno::INTR) => {}
                other => break other?.1,
            }
        };
        let bytes = self.buffer.get(..length).ok_or(Errno::MSGSIZE)?;
        parts(bytes)
    }
}

/// Takes a datagram apart.
fn parts(mut bytes: &[u8]) -> Result<Vec<(u32, u16, Part)>, Error> {
    let mut parts = Vec::new();
    while !bytes.is_empty() {
        let header: [u8; HEADER] = *bytes.first_chunk().ok_or(Errno::BADMSG)?;
        let word =
            |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let length = usize::try_from(word(0)).map_err(|_| Errno::BADMSG)?;
        let body = bytes.get(HEADER..length).ok_or(Errno::BADMSG)?;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        let flags = u16::from_ne_bytes([header[6], header[7]]);
        let part = match kind {
            ERROR | DONE => Part::End(verdict(kind, flags, body)),
            _ => Part::Reply(Reply::new(kind, body)),
        };
        parts.push((word(8), flags, part));
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(parts)
}

/// `struct nlmsgerr`: the error, the header it is about, the message itself unless it was left out, and attributes.
fn verdict(kind: u16, flags: u16, body: &[u8]) -> Result<(), Error> {
    let code = body.first_chunk().map_or(0, |bytes| i32::from_ne_bytes(*bytes));
    if code == 0 {
        return Ok(());
    }
    let before = if kind == ERROR {
        size_of::<i32>() + HEADER
    } else {
        size_of::<i32>()
    };
    let reply = Reply::new(kind, body);
    let attributes = (flags & ACK_TLVS != 0).then(|| reply.attributes(before));
    Err(Error {
        errno: Errno::from_raw_os_error(code.saturating_neg()),
        message: attributes
            .and_then(|list: Attributes<'_>| list.get(ERROR_MESSAGE))
            .map(|attribute| attribute.text())
            .unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `RTM_GETLINK` and `RTM_NEWLINK` with `struct ifinfomsg`.
    const GET_LINK: u16 = 18;
    const NEW_LINK: u16 = 16;
    const IFINFOMSG: usize = 16;
    const IFLA_IFNAME: u16 = 3;

    #[test]
    fn the_kernel_lists_its_links() {
        let mut socket = Socket::open(Family::Route).unwrap();
        let links = socket.dump(&Message::new(GET_LINK, 0, &[0; IFINFOMSG])).unwrap();
        let names: Vec<String> = links
            .iter()
            .filter_map(|link| Some(link.attributes(IFINFOMSG).get(IFLA_IFNAME)?.text()))
            .collect();
        assert!(names.contains(&"lo".to_owned()), "{names:?}");
    }

    #[test]
    fn a_refusal_says_what_the_kernel_says() {
        let mut socket = Socket::open(Family::Route).unwrap();
        let message = Message::new(NEW_LINK, 0, &[0; IFINFOMSG]).with_text(IFLA_IFNAME, "no-such-link");
        let error = socket.request(&message).unwrap_err();
        assert!(matches!(error.errno, Errno::NODEV | Errno::PERM), "{error}");
    }

    #[test]
    fn a_broken_datagram_is_an_error() {
        for bytes in [
            &[1, 2, 3][..],
            &[0; 16],
            &[200, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ] {
            assert!(
                matches!(parts(bytes), Err(error) if error.errno == Errno::BADMSG),
                "{bytes:?}"
            );
        }
    }
}
