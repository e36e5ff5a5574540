//! virtio-net (specification section 5.1): one pair of queues between the guest and a tap interface of the host, in
//! slots that can be filled and emptied while the guest runs.
//!
//! This file is the device, its configuration, and the handle. [`tap`] is the interface, [`worker`] the thread in
//! between, [`posted`] the buffers for frames to come, [`header`] what is said about each frame.
//!
//! An empty slot is a device without link, which costs no thread. What offloads it has is settled when the driver
//! starts; segmentation of UDP is only promised by a slot that has had a tap by then which does it.

mod header;
mod posted;
mod tap;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::counter::{self, Counter};
use super::queue::{DeviceQueue, Violations};
use super::rate_limiter::Limit;
use super::worker::Workers;
use super::{ActivateError, Activation, Device, DeviceType, Interrupt};
use header::feature;
pub use tap::{Tap, TapError};
use worker::{Command, Server};

/// Descriptors of each queue: more cost the sending side cache misses and win nothing.
const QUEUE_SIZE: u16 = 256;
/// `VIRTIO_NET_S_LINK_UP`.
const LINK_UP: u16 = 1;

/// What a device offers whatever its tap can do.
const ALWAYS: u64 = 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | feature::MAC
    | feature::STATUS
    | feature::MRG_RXBUF
    | feature::CSUM
    | feature::GUEST_CSUM
    | feature::GUEST_TSO4
    | feature::GUEST_TSO6
    | feature::GUEST_ECN
    | feature::HOST_TSO4
    | feature::HOST_TSO6
    | feature::HOST_ECN;
const USO: u64 = feature::GUEST_USO4 | feature::GUEST_USO6 | feature::HOST_USO;

/// Why a slot cannot be filled or emptied.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// There is something in it.
    #[error("the network slot is occupied: empty it first")]
    Occupied,
    /// There is nothing in it.
    #[error("the network slot is empty")]
    Empty,
    /// The tap does not do what the guest was promised, or is gone.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The host refuses a thread.
    #[error("the host cannot start the network device: {0}")]
    Host(#[from] io::Error),
}

/// What a snapshot must hold of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// What the guest reads as the device's address.
    pub mac: [u8; 6],
    /// The features that are offered.
    pub features: u64,
    /// Whether the guest sees the link up.
    pub link_up: bool,
}

/// What backs a network device.
#[derive(Debug)]
pub struct Backing {
    tap: Tap,
    receive_limit: Limit,
    send_limit: Limit,
}

impl Backing {
    /// A tap, and how much the guest may receive and send through it.
    #[must_use]
    pub fn new(tap: Tap, receive_limit: Limit, send_limit: Limit) -> Self {
        Self {
            tap,
            receive_limit,
            send_limit,
        }
    }
}

/// The device.
pub struct Net {
    mac: [u8; 6],
    slot: Arc<Slot>,
    violations: Arc<Violations>,
}

/// Fills and empties the slot, at any time, also while the guest uses it.
#[derive(Clone)]
pub struct NetHandle(Arc<Slot>);

/// What device, handle and thread share without a lock.
#[derive(Default)]
struct Common {
    link_up: AtomicBool,
    /// Whether there was ever a tap that segments UDP. It stays: what was offered once is not taken back.
    has_uso: AtomicBool,
    counters: Counters,
}

impl Common {
    /// Puts the link's state where the configuration space has it.
    fn put_link(&self, space: &mut [u8]) {
        let status = if self.link_up.load(Ordering::Acquire) {
            LINK_UP
        } else {
            0
        };
        space[6..8].copy_from_slice(&status.to_le_bytes());
    }

    fn learn(&self, backing: Option<&Backing>) {
        if backing.is_some_and(|backing| backing.tap.has_uso()) {
            self.has_uso.store(true, Ordering::Relaxed);
        }
    }
}

#[derive(Default)]
struct Counters {
    received: Counter,
    /// Longer than the buffers that were there.
    receive_drops: Counter,
    receive_errors: Counter,
    sent: Counter,
    /// Nothing to send them to.
    send_drops: Counter,
    send_errors: Counter,
}

struct Slot {
    common: Arc<Common>,
    inner: Mutex<Inner>,
}

struct Inner {
    backing: Option<Arc<Backing>>,
    interrupt: Option<Interrupt>,
    /// What the driver has accepted, while there is one.
    features: u64,
    stage: Stage,
}

enum Stage {
    /// No driver.
    Inactive,
    /// A driver, but no link yet.
    Asleep(Box<[DeviceQueue; 2]>),
    /// A thread serves the driver, also when the link has gone down again.
    Awake {
        commands: mpsc::Sender<Command>,
        command: EventFd,
        workers: Workers,
    },
}

impl Net {
    /// A device that the guest knows by `mac`.
    #[must_use]
    pub fn new(mac: [u8; 6], backing: Option<Backing>) -> (Self, NetHandle) {
        let common = Arc::<Common>::default();
        common.link_up.store(backing.is_some(), Ordering::Relaxed);
        common.learn(backing.as_ref());
        let inner = Inner {
            backing: backing.map(Arc::new),
            interrupt: None,
            features: 0,
            stage: Stage::Inactive,
        };
        let slot = Arc::new(Slot {
            common,
            inner: Mutex::new(inner),
        });
        let handle = NetHandle(slot.clone());
        let device = Self {
            mac,
            slot,
            violations: Arc::default(),
        };
        (device, handle)
    }

    /// What a snapshot must hold.
    #[must_use]
    pub fn state(&self) -> NetState {
        NetState {
            mac: self.mac,
            features: self.features(),
            link_up: self.slot.common.link_up.load(Ordering::Relaxed),
        }
    }
}

impl NetHandle {
    /// Fills the slot: the guest sees the link come up.
    ///
    /// # Errors
    /// [`SlotError`]; the slot is empty then.
    pub fn attach(&self, backing: Backing) -> Result<(), SlotError> {
        let mut inner = self.0.lock();
        if inner.backing.is_some() {
            return Err(SlotError::Occupied);
        }
        if !matches!(inner.stage, Stage::Inactive) {
            backing.tap.set_offloads(offloads(inner.features))?;
        }
        self.0.common.learn(Some(&backing));
        self.0.change(&mut inner, Some(Arc::new(backing)))?;
        self.0.announce(&inner);
        Ok(())
    }

    /// Empties the slot: the guest sees the link go down, and the tap is closed.
    ///
    /// # Errors
    /// [`SlotError::Empty`].
    pub fn detach(&self) -> Result<(), SlotError> {
        let mut inner = self.0.lock();
        if inner.backing.is_none() {
            return Err(SlotError::Empty);
        }
        self.0.change(&mut inner, None)?;
        self.0.announce(&inner);
        Ok(())
    }
}

/// What a tap may leave to a driver with these features (`TUN_F_*`).
fn offloads(features: u64) -> u32 {
    let has = |wanted: u64| features & wanted == wanted;
    // Nothing can be segmented by who does not finish checksums (section 5.1.3.1).
    if !has(feature::GUEST_CSUM) {
        return 0;
    }
    let mut offloads = libc::TUN_F_CSUM;
    for (wanted, offload) in [
        (feature::GUEST_TSO4, libc::TUN_F_TSO4),
        (feature::GUEST_TSO6, libc::TUN_F_TSO6),
        // The kernel takes these two only together.
        (
            feature::GUEST_USO4 | feature::GUEST_USO6,
            libc::TUN_F_USO4 | libc::TUN_F_USO6,
        ),
    ] {
        if has(wanted) {
            offloads |= offload;
        }
    }
    if has(feature::GUEST_ECN) && offloads & (libc::TUN_F_TSO4 | libc::TUN_F_TSO6) != 0 {
        offloads |= libc::TUN_F_TSO_ECN;
    }
    offloads
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the backing, and starts the thread if there is a driver. Returns when nothing uses the old one.
    fn change(&self, inner: &mut Inner, backing: Option<Arc<Backing>>) -> io::Result<()> {
        inner.backing.clone_from(&backing);
        match &inner.stage {
            Stage::Inactive => self.common.link_up.store(backing.is_some(), Ordering::Release),
            Stage::Asleep(_) => self.start(inner).inspect_err(|_| {
                inner.backing = None;
                self.common.link_up.store(false, Ordering::Release);
            })?,
            Stage::Awake {
                commands, command, ..
            } => {
                let (done, answer) = mpsc::channel();
                if commands.send((backing, done)).is_ok() && command.write(1).is_ok() {
                    // An error means that the thread has ended, and with it every use of the old one.
                    let _ = answer.recv();
                }
            }
        }
        Ok(())
    }

    fn announce(&self, inner: &Inner) {
        if let Some(interrupt) = &inner.interrupt {
            interrupt.config_changed(|space| self.common.put_link(space));
        }
    }

    /// Starts the thread of a device that has a driver and a backing.
    fn start(&self, inner: &mut Inner) -> io::Result<()> {
        let command = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let mut workers = Workers::new()?;
        let poller = workers.poller()?;
        let (commands, receiver) = mpsc::channel();
        let stage = std::mem::replace(&mut inner.stage, Stage::Inactive);
        let (Stage::Asleep(queues), Some(interrupt)) = (stage, &inner.interrupt) else {
            return Ok(());
        };
        let server = Server::new(
            *queues,
            interrupt.clone(),
            inner.features,
            self.common.clone(),
            inner.backing.clone(),
            (receiver, &command),
            poller,
        )?;
        workers.spawn("net", move || server.run())?;
        inner.stage = Stage::Awake {
            commands,
            command,
            workers,
        };
        Ok(())
    }
}

impl Device for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::Network
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    fn features(&self) -> u64 {
        match self.slot.common.has_uso.load(Ordering::Relaxed) {
            true => ALWAYS | USO,
            false => ALWAYS,
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // `struct virtio_net_config` (section 5.1.4): address and status. The rest belongs to features that are not
        // offered.
        let mut space = [0; 8];
        space[..6].copy_from_slice(&self.mac);
        self.slot.common.put_link(&mut space);
        super::copy_config(&space, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let features = activation.features;
        let interrupt = activation.interrupt.clone();
        let queues: [DeviceQueue; 2] = DeviceQueue::take(activation, "net", &self.violations)?;
        let mut inner = self.slot.lock();
        if let Some(backing) = &inner.backing {
            match backing.tap.set_offloads(offloads(features)) {
                // The thread sees that the tap is gone, and takes the link down.
                Ok(()) | Err(TapError::Gone) => {}
                Err(error) => return Err(io::Error::other(error).into()),
            }
        }
        inner.interrupt = Some(interrupt);
        inner.features = features;
        inner.stage = Stage::Asleep(Box::new(queues));
        if inner.backing.is_some() {
            self.slot.start(&mut inner)?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        let mut inner = self.slot.lock();
        inner.interrupt = None;
        if let Stage::Awake { mut workers, .. } = std::mem::replace(&mut inner.stage, Stage::Inactive) {
            workers.stop();
        }
    }

    fn counters(&self) -> Vec<(String, u64)> {
        let counters = &self.slot.common.counters;
        let counted = [
            ("rx_packets", &counters.received.times),
            ("rx_bytes", &counters.received.bytes),
            ("rx_drops", &counters.receive_drops.times),
            ("rx_errors", &counters.receive_errors.times),
            ("tx_packets", &counters.sent.times),
            ("tx_bytes", &counters.sent.bytes),
            ("tx_drops", &counters.send_drops.times),
            ("tx_errors", &counters.send_errors.times),
        ];
        counter::report(counted, &self.violations)
    }
}
