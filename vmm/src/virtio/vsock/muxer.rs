//! All connections of one vsock device: finds them by port, opens and closes them, and decides whose turn it is.
//!
//! Connections live in a table by id (which epoll knows them by) and are found by their ports through an index.
//! A connection that the guest is done with leaves the index at once and the table when its last byte has
//! reached the host.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use protocol::channel::{self, Received};
use protocol::stream::{HOST_CID, VsockOpen};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use vmm_sys_util::epoll::EventSet;

use super::OnConnect;
use super::connection::{Connection, Ports, Verdict};
use super::packet::{HEADER_SIZE, Header, MAX_PAYLOAD, Operation, TYPE_STREAM};
use crate::memory::GuestMemory;
use crate::virtio::queue::{Chain, Iovecs, TooShort};
use crate::virtio::worker::Poller;

/// The most connections at a time, those that only drain included.
pub const MAX_CONNECTIONS: usize = 1024;
/// The most resets for unknown connections that wait to be sent; more are dropped.
const MAX_RESETS: usize = 256;
/// Tokens of connections begin here.
pub const FIRST_ID: u64 = 16;
/// Host ports of connections that the host makes: above those that it listens on.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// Why a packet from the guest was dropped or its connection reset.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// The packet is shorter than its header, or than the header says.
    #[error("a packet is cut off")]
    Short(#[from] TooShort),
    /// The payload is longer than allowed.
    #[error("a packet announces {0} bytes, more than {MAX_PAYLOAD}")]
    Long(u32),
    /// Sent from a context id that is not the guest's.
    #[error("a packet claims to come from context {0}")]
    Source(u64),
    /// A packet that the connection's state does not allow, or more data than it has credit for.
    #[error("operation {operation} does not fit the connection from guest port {guest} to host port {host}")]
    Protocol {
        /// What the guest sent.
        operation: u16,
        /// The guest's port.
        guest: u32,
        /// The host's port.
        host: u32,
    },
}

/// What happened since the device was created.
#[derive(Debug, Default)]
pub struct Counters {
    /// Connections that were made.
    pub connections: AtomicU64,
    /// Connection attempts that were refused, and connections that broke the protocol.
    pub resets: AtomicU64,
    /// Payload bytes from guest to host.
    pub bytes_from_guest: AtomicU64,
    /// Payload bytes from host to guest.
    pub bytes_to_guest: AtomicU64,
}

/// The connections of one device.
pub struct Muxer {
    cid: u64,
    channel: Arc<OwnedFd>,
    channel_open: bool,
    on_connect: OnConnect,
    poller: Arc<Poller>,
    counters: Arc<Counters>,
    connections: HashMap<u64, Connection>,
    index: HashMap<Ports, u64>,
    next_id: u64,
    next_host_port: u32,
    line: VecDeque<u64>,
    resets: VecDeque<Header>,
    iovecs: Iovecs,
}

impl Muxer {
    /// No connection yet. `channel` must not block; connections are watched with `poller`.
    #[must_use]
    pub fn new(
        cid: u64,
        channel: Arc<OwnedFd>,
        on_connect: OnConnect,
        poller: Arc<Poller>,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            cid,
            channel,
            channel_open: true,
            on_connect,
            poller,
            counters,
            connections: HashMap::new(),
            index: HashMap::new(),
            next_id: FIRST_ID,
            next_host_port: FIRST_HOST_PORT,
            line: VecDeque::new(),
            resets: VecDeque::new(),
            iovecs: Iovecs::default(),
        }
    }

    /// Takes a packet from the guest.
    ///
    /// # Errors
    /// [`PacketError`], for the log; everything that has to be done about it is done.
    pub fn receive(&mut self, memory: &GuestMemory, chain: &Chain) -> Result<(), PacketError> {
        let mut bytes = [0; HEADER_SIZE];
        chain.read(memory, 0, &mut bytes)?;
        let header = Header::decode(&bytes);
        if header.source_cid != self.cid {
            return Err(PacketError::Source(header.source_cid));
        }
        let length = header.length as usize;
        if length > MAX_PAYLOAD {
            return Err(PacketError::Long(header.length));
        }
        let available = chain.readable_length() - HEADER_SIZE;
        if length > available {
            return Err(TooShort {
                offset: HEADER_SIZE,
                wanted: length,
                length: chain.readable_length(),
            }
            .into());
        }
        let ports = Ports {
            host: header.destination_port,
            guest: header.source_port,
        };
        let here = header.destination_cid == u64::from(HOST_CID) && header.kind == TYPE_STREAM;
        let id = if here {
            self.index.get(&ports).copied()
        } else {
            None
        };
        let Some(id) = id else {
            match header.operation() {
                Some(Operation::Request) if here => self.open_from_guest(ports, &header),
                Some(Operation::Reset) => {}
                _ => self.refuse(&header),
            }
            return Ok(());
        };
        let Some(connection) = self.connections.get_mut(&id) else {
            return Ok(());
        };
        match connection.receive(&header, memory, chain, &mut self.iovecs) {
            Verdict::Keep => {
                if header.operation() == Some(Operation::ReadWrite) {
                    self.counters
                        .bytes_from_guest
                        .fetch_add(length as u64, Ordering::Relaxed);
                }
                self.enqueue(id);
            }
            Verdict::Close => {
                self.push_reset(&header);
                self.detach(id, ports);
            }
            Verdict::Forget => self.detach(id, ports),
            Verdict::Abort => {
                self.refuse(&header);
                self.index.remove(&ports);
                self.connections.remove(&id);
                return Err(PacketError::Protocol {
                    operation: header.operation,
                    guest: ports.guest,
                    host: ports.host,
                });
            }
        }
        Ok(())
    }

    fn detach(&mut self, id: u64, ports: Ports) {
        self.index.remove(&ports);
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.drain();
            if connection.is_drained() {
                self.connections.remove(&id);
            }
        }
    }

    fn open_from_guest(&mut self, ports: Ports, request: &Header) {
        // Before the sandbox learns of it: whoever then asks when this was shall get an answer.
        (self
            .on_connect
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner))(ports.host);
        match self.connect_to_host(ports.host) {
            Ok(socket) => {
                if self.insert(Connection::from_guest(ports, socket, request)) {
                    return;
                }
                self.refuse(request);
            }
            Err(_) => self.refuse(request),
        }
    }

    /// Makes a socket pair and sends the host its end.
    fn connect_to_host(&self, port: u32) -> io::Result<OwnedFd> {
        if !self.channel_open || self.connections.len() >= MAX_CONNECTIONS {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        rustix::io::ioctl_fionbio(&ours, true)?;
        let message = serde_json::to_vec(&VsockOpen { port })?;
        channel::send(&*self.channel, &message, &[theirs.as_fd()])?;
        Ok(ours)
    }

    /// Takes connections that the host wants to make, until there is none.
    pub fn accept_from_host(&mut self) {
        loop {
            match channel::receive(&*self.channel) {
                Ok(Received::Message(message, mut fds)) => {
                    // Any other message is dropped with its descriptors: their peer sees end of file.
                    if let (Ok(open), Some(socket)) =
                        (serde_json::from_slice::<VsockOpen>(&message), fds.pop())
                    {
                        self.open_from_host(open.port, socket);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {}
                Ok(Received::Closed) | Err(_) => {
                    self.channel_open = false;
                    self.poller.remove(self.channel.as_raw_fd());
                    return;
                }
            }
        }
    }

    fn open_from_host(&mut self, guest: u32, socket: OwnedFd) {
        if self.connections.len() >= MAX_CONNECTIONS || rustix::io::ioctl_fionbio(&socket, true).is_err() {
            return;
        }
        let ports = loop {
            let ports = Ports {
                host: self.next_host_port,
                guest,
            };
            self.next_host_port = self.next_host_port.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            if !self.index.contains_key(&ports) {
                break ports;
            }
        };
        self.insert(Connection::from_host(ports, socket));
    }

    fn insert(&mut self, connection: Connection) -> bool {
        let id = self.next_id;
        self.next_id += 1;
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        let socket = connection.socket().map(AsRawFd::as_raw_fd);
        if socket.is_none_or(|fd| self.poller.add(fd, id, events).is_err()) {
            return false;
        }
        self.counters.connections.fetch_add(1, Ordering::Relaxed);
        self.index.insert(connection.ports, id);
        self.connections.insert(id, connection);
        self.enqueue(id);
        true
    }

    /// Takes what epoll has reported for the socket of connection `id`.
    pub fn socket_event(&mut self, id: u64, events: EventSet) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.socket_event(events);
            if connection.is_drained() {
                self.connections.remove(&id);
            } else {
                self.enqueue(id);
            }
        }
    }

    /// Puts a connection into the line if it has something to say and does not stand there.
    fn enqueue(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        if connection.queued || !connection.has_packets() {
            return;
        }
        connection.queued = true;
        if self.line.len() >= 2 * MAX_CONNECTIONS {
            // Most of these are gone: a guest that offers no buffers may open and reset at will.
            let connections = &self.connections;
            self.line.retain(|id| connections.contains_key(id));
        }
        self.line.push_back(id);
    }

    fn refuse(&mut self, header: &Header) {
        self.counters.resets.fetch_add(1, Ordering::Relaxed);
        self.push_reset(header);
    }

    /// Answers a packet with a reset.
    fn push_reset(&mut self, header: &Header) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(Header {
                source_cid: header.destination_cid,
                source_port: header.destination_port,
                destination_port: header.source_port,
                kind: header.kind,
                operation: Operation::Reset as u16,
                ..Header::default()
            });
        }
    }

    /// Whether [`Self::send`] may have something to send.
    #[must_use]
    pub fn has_packets(&self) -> bool {
        !self.resets.is_empty() || !self.line.is_empty()
    }

    /// Writes the next packet for the guest into `chain`: its whole length, or `None` when there is none.
    ///
    /// # Errors
    /// [`TooShort`] when the chain cannot even take a header; nothing is lost then.
    pub fn send(&mut self, memory: &GuestMemory, chain: &Chain) -> Result<Option<usize>, TooShort> {
        chain.write(memory, 0, &[0; HEADER_SIZE])?;
        let header = match self.resets.pop_front() {
            Some(reset) => Some(reset),
            None => self.next_in_line(memory, chain),
        };
        let Some(mut header) = header else { return Ok(None) };
        if header.source_cid == 0 {
            header.source_cid = u64::from(HOST_CID);
        }
        header.destination_cid = self.cid;
        chain.write(memory, 0, &header.encode())?;
        self.counters
            .bytes_to_guest
            .fetch_add(u64::from(header.length), Ordering::Relaxed);
        Ok(Some(HEADER_SIZE + header.length as usize))
    }

    fn next_in_line(&mut self, memory: &GuestMemory, chain: &Chain) -> Option<Header> {
        while let Some(id) = self.line.pop_front() {
            let Some(connection) = self.connections.get_mut(&id) else {
                continue;
            };
            connection.queued = false;
            let packet = connection.next_packet(memory, chain, &mut self.iovecs);
            self.enqueue(id);
            if packet.is_some() {
                return packet;
            }
        }
        None
    }
}
