//! virtio-vsock (specification section 5.10): stream connections between guest and host.
//!
//! On the host every connection is a Unix stream socket whose far end travels over a channel to the sandbox
//! (`protocol::stream::VsockOpen`); nothing listens on a path. This file is the device and its thread;
//! [`muxer`] knows the connections, [`connection`] one of them, [`packet`] the header.

mod connection;
mod muxer;
mod packet;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::epoll::EventSet;

use super::counter;
use super::queue::{Chain, DeviceQueue, Violations};
use super::worker::{Events, Poller, STOP, Workers};
use super::{ActivateError, Activation, Device, DeviceType};
use muxer::{Counters, Muxer};

const QUEUE_SIZE: u16 = 256;
/// How many packets from the guest are taken before the other direction has its turn.
const TURN: usize = 64;

const RECEIVE: u64 = 0;
const TRANSMIT: u64 = 1;
const CHANNEL: u64 = 2;

type OnConnect = Arc<Mutex<Box<dyn Fn(u32) + Send>>>;

/// What a snapshot must hold of the device. Connections do not survive one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The guest's context id.
    pub guest_cid: u64,
}

/// The device.
pub struct Vsock {
    state: VsockState,
    channel: Arc<OwnedFd>,
    on_connect: OnConnect,
    counters: Arc<Counters>,
    violations: Arc<Violations>,
    workers: Workers,
}

impl Vsock {
    /// A device for the guest with context id `cid`. Connections travel over `channel`, a `SOCK_SEQPACKET` socket,
    /// which is made non-blocking. `on_connect` is called with the host port of every connection that the guest
    /// makes, before the sandbox learns of it, on the device's thread: it must not block.
    #[must_use]
    pub fn new(cid: u32, channel: OwnedFd, on_connect: Box<dyn Fn(u32) + Send>) -> Self {
        Self {
            state: VsockState {
                guest_cid: u64::from(cid),
            },
            channel: Arc::new(channel),
            on_connect: Arc::new(Mutex::new(on_connect)),
            counters: Arc::default(),
            violations: Arc::default(),
            workers: Workers::default(),
        }
    }

    /// What a snapshot must hold.
    #[must_use]
    pub fn state(&self) -> VsockState {
        self.state
    }
}

impl Device for Vsock {
    fn device_type(&self) -> DeviceType {
        DeviceType::Vsock
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 3]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::copy_config(&self.state.guest_cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        // Nothing is ever put into the event queue: it tells of a new context id after a migration.
        let [receive, transmit, _events] = DeviceQueue::take(activation, "vsock", &self.violations)?;
        rustix::io::ioctl_fionbio(&*self.channel, true).map_err(io::Error::from)?;
        self.workers = Workers::new()?;
        let poller = Arc::new(self.workers.poller()?);
        poller.add_event(receive.notify(), RECEIVE)?;
        poller.add_event(transmit.notify(), TRANSMIT)?;
        poller.add(self.channel.as_raw_fd(), CHANNEL, EventSet::IN)?;
        let muxer = Muxer::new(
            self.state.guest_cid,
            self.channel.clone(),
            self.on_connect.clone(),
            poller.clone(),
            self.counters.clone(),
        );
        let server = Server {
            receive,
            transmit,
            muxer,
            poller,
            chain: Chain::default(),
        };
        self.workers.spawn("vsock", move || server.run())?;
        Ok(())
    }

    fn reset(&mut self) {
        self.workers.stop();
    }

    fn counters(&self) -> Vec<(String, u64)> {
        let counters = &self.counters;
        let counted = [
            ("connections", &counters.connections),
            ("resets", &counters.resets),
            ("bytes_from_guest", &counters.bytes_from_guest),
            ("bytes_to_guest", &counters.bytes_to_guest),
        ];
        counter::report(counted, &self.violations)
    }
}

/// The device's thread.
struct Server {
    /// Buffers for packets to the guest.
    receive: DeviceQueue,
    /// Packets from the guest.
    transmit: DeviceQueue,
    muxer: Muxer,
    poller: Arc<Poller>,
    chain: Chain,
}

impl Server {
    fn run(mut self) {
        let mut events = Events::default();
        let poller = self.poller.clone();
        // The driver may have offered chains before this thread listened.
        let (mut more_to_take, mut more_to_send) = (true, true);
        loop {
            let Ok(events) = poller.wait(&mut events, !more_to_take && !more_to_send) else {
                return;
            };
            for event in events {
                match event.data() {
                    STOP => return,
                    TRANSMIT => more_to_take = true,
                    RECEIVE => {}
                    CHANNEL => self.muxer.accept_from_host(),
                    id => self.muxer.socket_event(id, event.event_set()),
                }
            }
            if more_to_take {
                more_to_take = self.take_packets();
            }
            more_to_send = self.send_packets();
        }
    }

    /// Takes packets from the guest, at most [`TURN`]. True when there are more.
    fn take_packets(&mut self) -> bool {
        let mut taken = 0;
        let more = loop {
            if taken == TURN {
                break true;
            }
            if !self.transmit.pop(&mut self.chain) {
                if self.transmit.rearm() {
                    continue;
                }
                break false;
            }
            taken += 1;
            if let Err(error) = self.muxer.receive(self.transmit.memory(), &self.chain) {
                self.transmit.violation(&error);
            }
            self.transmit.push(self.chain.head(), 0);
        };
        if taken > 0 {
            self.transmit.interrupt();
        }
        more
    }

    /// Sends packets to the guest while it has room for them, at most [`TURN`]. True when there are more and
    /// room was not what ended it.
    fn send_packets(&mut self) -> bool {
        let mut sent = 0;
        let mut more = false;
        while self.muxer.has_packets() {
            if sent == TURN {
                more = true;
                break;
            }
            if !self.receive.pop(&mut self.chain) {
                if self.receive.rearm() {
                    continue;
                }
                // Connections stay in line until the driver notifies the device of new buffers.
                break;
            }
            match self.muxer.send(self.receive.memory(), &self.chain) {
                Ok(None) => self.receive.unpop(),
                Ok(Some(length)) => {
                    self.receive.push(self.chain.head(), length);
                    sent += 1;
                }
                Err(error) => {
                    self.receive.violation(&error);
                    self.receive.push(self.chain.head(), 0);
                    sent += 1;
                }
            }
        }
        if sent > 0 {
            self.receive.interrupt();
        }
        more
    }
}
