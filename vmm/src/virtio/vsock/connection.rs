//! One vsock connection: its socket on the host, credit in both directions, half-close, and what it has to say next.
//!
//! Bytes that the guest has sent are never dropped while the host can still take them: what the socket does not
//! accept at once waits here, at most [`BUFFER`] bytes, which credit makes the guest respect.

use std::collections::VecDeque;
use std::io;
use std::num::Wrapping;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::net::Shutdown;
use vmm_sys_util::epoll::EventSet;

use super::packet::{
    HEADER_SIZE, Header, MAX_PAYLOAD, Operation, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};
use crate::memory::GuestMemory;
use crate::virtio::queue::{Chain, Iovecs};

/// Bytes of one connection that may wait for the host to take them: what the guest is told as `buf_alloc`.
pub const BUFFER: u32 = 256 * 1024;
/// The guest is told of free space once this much has become free since it was last told.
const ANNOUNCE_AFTER: u32 = BUFFER / 2;

/// The two ports that name a connection; the context ids are always the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    /// The host's.
    pub host: u32,
    /// The guest's.
    pub guest: u32,
}

/// What becomes of a connection after a packet from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on.
    Keep,
    /// The guest is done with it and waits for a reset; what it sent must still reach the host.
    Close,
    /// The guest has reset it; what it sent must still reach the host.
    Forget,
    /// The guest has broken the protocol: reset it at once.
    Abort,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The host has asked for the connection; the guest has not yet answered.
    Requested,
    Established,
    /// The guest is done with it; only bytes for the host are left.
    Draining,
}

/// A connection.
pub struct Connection {
    /// Its name.
    pub ports: Ports,
    /// Whether it stands in the muxer's line of connections that have something to say.
    pub queued: bool,
    phase: Phase,
    socket: Option<OwnedFd>,

    // Host to guest.
    readable: bool,
    hung_up: bool,
    host_ended: bool,
    sent: Wrapping<u32>,
    peer_allocated: u32,
    peer_forwarded: Wrapping<u32>,
    credit_asked: bool,

    // Guest to host.
    writable: bool,
    pending: VecDeque<u8>,
    guest_ended: bool,
    write_ended: bool,
    forwarded: Wrapping<u32>,
    announced: Wrapping<u32>,

    // Packets to be sent.
    say_opening: Option<Operation>,
    say_credit: bool,
    say_shutdown: bool,
    shutdown: u32,
}

impl Connection {
    fn new(ports: Ports, socket: OwnedFd, phase: Phase, opening: Operation) -> Self {
        Self {
            ports,
            queued: false,
            phase,
            socket: Some(socket),
            readable: false,
            hung_up: false,
            host_ended: false,
            sent: Wrapping(0),
            peer_allocated: 0,
            peer_forwarded: Wrapping(0),
            credit_asked: false,
            writable: true,
            pending: VecDeque::new(),
            guest_ended: false,
            write_ended: false,
            forwarded: Wrapping(0),
            announced: Wrapping(0),
            say_opening: Some(opening),
            say_credit: false,
            say_shutdown: false,
            shutdown: 0,
        }
    }

    /// The guest has connected to the host with `request`. `socket` must not block.
    #[must_use]
    pub fn from_guest(ports: Ports, socket: OwnedFd, request: &Header) -> Self {
        let mut connection = Self::new(ports, socket, Phase::Established, Operation::Response);
        connection.take_credit(request);
        connection
    }

    /// The host wants to connect to the guest. `socket` must not block.
    #[must_use]
    pub fn from_host(ports: Ports, socket: OwnedFd) -> Self {
        Self::new(ports, socket, Phase::Requested, Operation::Request)
    }

    /// The socket, to be polled edge-triggered.
    #[must_use]
    pub fn socket(&self) -> Option<&OwnedFd> {
        self.socket.as_ref()
    }

    /// Takes a packet of this connection. Its payload, checked by the caller to be there, follows the header.
    pub fn receive(
        &mut self,
        header: &Header,
        memory: &GuestMemory,
        chain: &Chain,
        iovecs: &mut Iovecs,
    ) -> Verdict {
        self.take_credit(header);
        let established = self.phase == Phase::Established;
        match header.operation() {
            Some(Operation::Response) if self.phase == Phase::Requested => self.phase = Phase::Established,
            Some(Operation::ReadWrite) if established && !self.guest_ended => {
                return self.deliver(header.length as usize, memory, chain, iovecs);
            }
            Some(Operation::CreditUpdate) => {}
            Some(Operation::CreditRequest) => self.say_credit = true,
            Some(Operation::Shutdown) if established => return self.end(header.flags),
            Some(Operation::Reset) => return Verdict::Forget,
            _ => return Verdict::Abort,
        }
        Verdict::Keep
    }

    fn take_credit(&mut self, header: &Header) {
        self.peer_allocated = header.allocated;
        self.peer_forwarded = Wrapping(header.forwarded);
    }

    fn end(&mut self, flags: u32) -> Verdict {
        if flags & SHUTDOWN_BOTH == SHUTDOWN_BOTH || self.guest_ended && flags & SHUTDOWN_RECEIVE != 0 {
            return Verdict::Close;
        }
        if flags & SHUTDOWN_SEND != 0 {
            self.guest_ended = true;
            self.finish_writing();
        }
        if flags & SHUTDOWN_RECEIVE != 0 {
            self.stop_reading();
        }
        Verdict::Keep
    }

    /// Hands `length` bytes after the header to the host.
    fn deliver(
        &mut self,
        length: usize,
        memory: &GuestMemory,
        chain: &Chain,
        iovecs: &mut Iovecs,
    ) -> Verdict {
        if self.pending.len() + length > BUFFER as usize {
            return Verdict::Abort;
        }
        if self.socket.is_none() || self.shutdown & SHUTDOWN_RECEIVE != 0 {
            // The host takes no more, as the guest has been told.
            self.forward(length);
            return Verdict::Keep;
        }
        let mut written = 0;
        if self.pending.is_empty() && self.writable && length > 0 {
            iovecs.clear();
            if chain
                .readable_iovecs(memory, HEADER_SIZE, length, iovecs)
                .is_err()
            {
                return Verdict::Abort;
            }
            written = match self.send(iovecs.as_slice()) {
                Some(count) => count,
                None => length,
            };
            self.forward(written);
        }
        if written < length {
            let mut rest = vec![0; length - written];
            if chain.read(memory, HEADER_SIZE + written, &mut rest).is_err() {
                return Verdict::Abort;
            }
            self.pending.extend(rest);
        }
        Verdict::Keep
    }

    /// Writes to the socket: how much it has taken, or `None` when the host will never take anything again.
    fn send(&mut self, iovecs: &[libc::iovec]) -> Option<usize> {
        let Some(socket) = &self.socket else { return None };
        // SAFETY: `msghdr` is plain data for which zero means "absent".
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = iovecs.as_ptr().cast_mut();
        message.msg_iovlen = iovecs.len();
        loop {
            // SAFETY: the iovecs are live memory of this process (the pending ring, or guest memory, which stays
            // mapped while the device runs), and sendmsg(2) only reads from them.
            let sent = unsafe {
                libc::sendmsg(
                    socket.as_raw_fd(),
                    &message,
                    libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
                )
            };
            if let Ok(count) = usize::try_from(sent) {
                return Some(count);
            }
            match io::Error::last_os_error().kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock => {
                    self.writable = false;
                    return Some(0);
                }
                _ => {
                    self.host_reads_no_more();
                    return None;
                }
            }
        }
    }

    /// Counts bytes that have left the buffer, and decides whether the guest should be told.
    fn forward(&mut self, count: usize) {
        // At most `BUFFER` and one payload.
        self.forwarded += Wrapping(count as u32);
        if (self.forwarded - self.announced).0 >= ANNOUNCE_AFTER {
            self.say_credit = true;
        }
    }

    /// Writes what is pending as far as the socket takes it.
    fn flush(&mut self) {
        while self.writable && !self.pending.is_empty() {
            let (front, back) = self.pending.as_slices();
            let piece = |bytes: &[u8]| libc::iovec {
                iov_base: bytes.as_ptr().cast_mut().cast(),
                iov_len: bytes.len(),
            };
            let iovecs = [piece(front), piece(back)];
            match self.send(&iovecs) {
                Some(count) => {
                    self.pending.drain(..count);
                    self.forward(count);
                }
                None => return,
            }
        }
        if self.pending.is_empty() {
            // A stalled reader's buffer is given back.
            self.pending.shrink_to(0);
            self.finish_writing();
        }
    }

    /// Shuts the socket's sending half down once the guest has ended and everything has been written.
    fn finish_writing(&mut self) {
        if self.guest_ended && self.pending.is_empty() {
            // Only once: to end a half is an event of the socket, which leads here again.
            if !std::mem::replace(&mut self.write_ended, true) {
                self.shutdown_socket(Shutdown::Write);
            }
            self.close_when_done();
        }
    }

    fn stop_reading(&mut self) {
        self.readable = false;
        if !self.host_ended {
            self.host_ended = true;
            self.shutdown_socket(Shutdown::Read);
        }
        self.close_when_done();
    }

    /// The host has closed its end, or the half that reads.
    fn host_reads_no_more(&mut self) {
        self.writable = false;
        let dropped = self.pending.len();
        self.pending = VecDeque::new();
        self.forward(dropped);
        self.tell(SHUTDOWN_RECEIVE);
    }

    fn tell(&mut self, flags: u32) {
        if self.shutdown | flags != self.shutdown {
            self.shutdown |= flags;
            self.say_shutdown = true;
        }
        self.close_when_done();
    }

    /// Closes the socket when neither direction needs it any more.
    fn close_when_done(&mut self) {
        let nothing_to_write =
            self.shutdown & SHUTDOWN_RECEIVE != 0 || self.guest_ended && self.pending.is_empty();
        if self.host_ended && nothing_to_write {
            self.socket = None;
        }
    }

    fn shutdown_socket(&self, how: Shutdown) {
        if let Some(socket) = &self.socket {
            // It fails only when the peer is gone, and then there is nothing left to shut down.
            let _ = rustix::net::shutdown(socket, how);
        }
    }

    /// Takes what epoll has reported for the socket.
    pub fn socket_event(&mut self, events: EventSet) {
        if events.intersects(EventSet::IN | EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR) {
            self.readable = !self.host_ended;
        }
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            // What the host wrote before is still to be read; it will read nothing itself.
            self.hung_up = true;
            self.host_reads_no_more();
        } else if events.contains(EventSet::OUT) {
            self.writable = true;
            self.flush();
        }
    }

    /// The guest is done with the connection. Only what it has sent is still brought to the host.
    pub fn drain(&mut self) {
        self.phase = Phase::Draining;
        self.guest_ended = true;
        self.stop_reading();
        self.finish_writing();
    }

    /// Whether a draining connection has brought everything to the host.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.phase == Phase::Draining && self.socket.is_none()
    }

    /// How much the guest may still be sent.
    fn credit(&self) -> usize {
        let flying = (self.sent - self.peer_forwarded).0;
        self.peer_allocated.saturating_sub(flying) as usize
    }

    /// Whether [`Self::next_packet`] may have something to send.
    #[must_use]
    pub fn has_packets(&self) -> bool {
        match self.phase {
            Phase::Requested => self.say_opening.is_some(),
            Phase::Established => {
                self.say_opening.is_some()
                    || self.say_credit
                    || self.say_shutdown
                    || self.readable && (self.credit() > 0 || !self.credit_asked)
            }
            Phase::Draining => false,
        }
    }

    /// Makes the next packet for the guest. The payload, if any, is put into `chain` behind the place of the
    /// header. `None` when there is nothing to send after all.
    pub fn next_packet(
        &mut self,
        memory: &GuestMemory,
        chain: &Chain,
        iovecs: &mut Iovecs,
    ) -> Option<Header> {
        if let Some(operation) = self.say_opening.take() {
            return Some(self.packet(operation, 0, 0));
        }
        if self.phase != Phase::Established {
            return None;
        }
        if self.readable && self.credit() == 0 && !self.credit_asked {
            self.credit_asked = true;
            return Some(self.packet(Operation::CreditRequest, 0, 0));
        }
        if self.readable && self.credit() > 0 {
            self.credit_asked = false;
            let room = chain.writable_length().saturating_sub(HEADER_SIZE);
            let length = room.min(self.credit()).min(MAX_PAYLOAD);
            iovecs.clear();
            if length > 0
                && chain.writable_iovecs(memory, HEADER_SIZE, length, iovecs).is_ok()
                && let Some(count) = self.read(iovecs.as_slice())
            {
                // At most `MAX_PAYLOAD`.
                self.sent += Wrapping(count as u32);
                return Some(self.packet(Operation::ReadWrite, count as u32, 0));
            }
        }
        if std::mem::take(&mut self.say_shutdown) {
            return Some(self.packet(Operation::Shutdown, 0, self.shutdown));
        }
        if self.say_credit {
            return Some(self.packet(Operation::CreditUpdate, 0, 0));
        }
        None
    }

    /// Reads from the socket: how much, or `None` when there is nothing now, or ever again.
    fn read(&mut self, iovecs: &[libc::iovec]) -> Option<usize> {
        let Some(socket) = &self.socket else {
            self.readable = false;
            return None;
        };
        let count = i32::try_from(iovecs.len()).unwrap_or(i32::MAX);
        loop {
            // SAFETY: the iovecs lie in guest memory, which stays mapped while the device runs; nothing in this
            // process relies on its contents.
            let got = unsafe { libc::readv(socket.as_raw_fd(), iovecs.as_ptr(), count) };
            match usize::try_from(got) {
                Ok(0) => break,
                Ok(count) => return Some(count),
                Err(_) => match io::Error::last_os_error().kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => {
                        self.readable = false;
                        return None;
                    }
                    _ => break,
                },
            }
        }
        self.readable = false;
        self.host_ended = true;
        self.tell(if self.hung_up {
            SHUTDOWN_BOTH
        } else {
            SHUTDOWN_SEND
        });
        None
    }

    /// A packet of this connection; every packet tells the guest about its credit.
    fn packet(&mut self, operation: Operation, length: u32, flags: u32) -> Header {
        self.say_credit = false;
        self.announced = self.forwarded;
        Header {
            source_port: self.ports.host,
            destination_port: self.ports.guest,
            length,
            kind: TYPE_STREAM,
            operation: operation as u16,
            flags,
            allocated: BUFFER,
            forwarded: self.forwarded.0,
            ..Header::default()
        }
    }
}
