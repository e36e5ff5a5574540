//! virtio-blk (specification section 5.2): raw files and block devices of the host, by descriptor, in slots that
//! can be filled and emptied while the guest runs.
//!
//! This file is the device, its configuration, and the handle. [`request`] reads what the driver wants,
//! [`backend`] does it with what [`extents`] says the device consists of, [`worker`] is the thread in between,
//! [`attendant`] watches slots that are empty.
//!
//! An empty slot has capacity 0, which is how a guest knows an absent disk. Filling it changes the capacity and
//! tells the guest. Whether a disk is read-only is settled when the driver starts, so a slot that was empty then
//! cannot say so later: writes to a read-only backing fail, and who attaches it must have the guest mount it
//! read-only.

mod attendant;
mod backend;
mod extents;
mod request;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, mpsc};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::counter::{self, Counter};
use super::queue::{DeviceQueue, Violations};
use super::worker::Workers;
use super::{ActivateError, Activation, Device, DeviceType, Interrupt};
use attendant::{Attendant, Wake};
pub use extents::{Backing, BackingError};
use request::{ID_SIZE, MAX_DATA_SEGMENTS, MAX_RANGE_SECTORS, MAX_RANGES, SECTOR};
use worker::{Command, Server};

/// Descriptors, and requests at a time: indirect tables make one descriptor enough for a request.
const QUEUE_SIZE: u16 = 128;

/// `VIRTIO_BLK_F_SEG_MAX`.
const F_SEG_MAX: u64 = 1 << 2;
/// `VIRTIO_BLK_F_RO`.
const F_RO: u64 = 1 << 5;
/// `VIRTIO_BLK_F_BLK_SIZE`.
const F_BLK_SIZE: u64 = 1 << 6;
/// `VIRTIO_BLK_F_FLUSH`.
const F_FLUSH: u64 = 1 << 9;
/// `VIRTIO_BLK_F_DISCARD`.
const F_DISCARD: u64 = 1 << 13;
/// `VIRTIO_BLK_F_WRITE_ZEROES`.
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Why a slot cannot be filled or emptied.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// There is something in it.
    #[error("the slot is occupied: empty it first")]
    Occupied,
    /// There is nothing in it.
    #[error("the slot is empty")]
    Empty,
    /// The host refuses a thread.
    #[error("the host cannot start the device: {0}")]
    Host(#[from] io::Error),
}

/// What a snapshot must hold of the device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// What the guest reads as the device's serial number.
    pub serial: String,
    /// Size in sectors of 512 bytes; 0 when the slot is empty.
    pub capacity: u64,
    /// Whether the driver was told that the device is read-only.
    pub read_only: bool,
}

/// The device.
pub struct Block {
    serial: String,
    read_only: bool,
    slot: Arc<Slot>,
    violations: Arc<Violations>,
    attendant: Option<Arc<Attendant>>,
}

/// Fills and empties the slot, at any time, also while the guest uses it.
#[derive(Clone)]
pub struct BlockHandle(Arc<Slot>);

/// What device, handle and thread share without a lock.
struct Common {
    id: [u8; ID_SIZE],
    /// In sectors.
    capacity: AtomicU64,
    counters: Counters,
    /// Whether io_uring may be used where the host has it. Tests want both ways.
    ring_allowed: AtomicBool,
}

#[derive(Default)]
struct Counters {
    reads: Counter,
    /// Those of them that the device's own thread has waited for.
    reads_waited_for: Counter,
    writes: Counter,
    flushes: Counter,
    discards: Counter,
    errors: Counter,
}

struct Slot {
    common: Arc<Common>,
    inner: Mutex<Inner>,
}

struct Inner {
    backing: Option<Arc<Backing>>,
    interrupt: Option<Interrupt>,
    stage: Stage,
}

/// The attendant, weakly: its thread must never be the last to hold it.
type Watched = (Weak<Attendant>, u64);

enum Stage {
    /// No driver.
    Inactive,
    /// A driver, but nothing for it to do.
    Asleep {
        queue: Box<DeviceQueue>,
        features: u64,
        watched: Option<Watched>,
    },
    /// A thread serves the driver.
    Awake {
        commands: mpsc::Sender<Command>,
        command: EventFd,
        workers: Workers,
    },
}

impl Block {
    /// A device that the guest knows by `serial`, of which the first 20 bytes count.
    #[must_use]
    pub fn new(serial: &str, backing: Option<Backing>) -> (Self, BlockHandle) {
        let mut id = [0; ID_SIZE];
        let length = serial.len().min(ID_SIZE);
        id[..length].copy_from_slice(&serial.as_bytes()[..length]);
        let read_only = backing.as_ref().is_some_and(Backing::is_read_only);
        let capacity = AtomicU64::new(backing.as_ref().map_or(0, sectors));
        let common = Arc::new(Common {
            id,
            capacity,
            counters: Counters::default(),
            ring_allowed: AtomicBool::new(true),
        });
        let inner = Inner {
            backing: backing.map(Arc::new),
            interrupt: None,
            stage: Stage::Inactive,
        };
        let slot = Arc::new(Slot {
            common,
            inner: Mutex::new(inner),
        });
        let handle = BlockHandle(slot.clone());
        (
            Self {
                serial: serial.to_owned(),
                read_only,
                slot,
                violations: Arc::default(),
                attendant: None,
            },
            handle,
        )
    }

    /// What a snapshot must hold.
    #[must_use]
    pub fn state(&self) -> BlockState {
        BlockState {
            serial: self.serial.clone(),
            capacity: self.slot.common.capacity.load(Ordering::Relaxed),
            read_only: self.read_only,
        }
    }
}

impl BlockHandle {
    /// Fills the slot and tells the guest.
    ///
    /// # Errors
    /// [`SlotError::Occupied`], or [`SlotError::Host`].
    pub fn attach(&self, backing: Backing) -> Result<(), SlotError> {
        let mut inner = self.0.lock();
        if inner.backing.is_some() {
            return Err(SlotError::Occupied);
        }
        let capacity = sectors(&backing);
        self.0.change(&mut inner, Some(Arc::new(backing)))?;
        self.0.announce(&inner, capacity);
        Ok(())
    }

    /// Empties the slot and tells the guest. Requests in flight are finished first; then the backing is closed.
    ///
    /// # Errors
    /// [`SlotError::Empty`].
    pub fn detach(&self) -> Result<(), SlotError> {
        let mut inner = self.0.lock();
        if inner.backing.is_none() {
            return Err(SlotError::Empty);
        }
        self.0.change(&mut inner, None)?;
        self.0.announce(&inner, 0);
        Ok(())
    }

    /// Size of what is in the slot, in bytes; 0 when it is empty.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.0.common.capacity.load(Ordering::Relaxed) * SECTOR
    }
}

/// Ends the attendant's watch, if it has not ended by itself.
fn forget(watched: Option<&Watched>) {
    if let Some((attendant, token)) = watched
        && let Some(attendant) = attendant.upgrade()
    {
        attendant.forget(*token);
    }
}

fn sectors(backing: &Backing) -> u64 {
    backing.capacity() / SECTOR
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the backing, and starts the thread if there is a driver. Returns when nothing uses the old one.
    fn change(&self, inner: &mut Inner, backing: Option<Arc<Backing>>) -> io::Result<()> {
        inner.backing = backing.clone();
        match &inner.stage {
            Stage::Inactive => Ok(()),
            Stage::Asleep { watched, .. } => {
                forget(watched.as_ref());
                self.start(inner).inspect_err(|_| inner.backing = None)
            }
            Stage::Awake {
                commands, command, ..
            } => {
                let (done, answer) = mpsc::channel();
                if commands.send((backing, done)).is_ok() && command.write(1).is_ok() {
                    // An error means that the thread has ended, and with it everything in flight.
                    let _ = answer.recv();
                }
                Ok(())
            }
        }
    }

    fn announce(&self, inner: &Inner, capacity: u64) {
        self.common.capacity.store(capacity, Ordering::Release);
        if let Some(interrupt) = &inner.interrupt {
            interrupt.config_changed(|space| space[..8].copy_from_slice(&capacity.to_le_bytes()));
        }
    }

    /// Starts the thread of a device that has a driver.
    fn start(&self, inner: &mut Inner) -> io::Result<()> {
        if !matches!(inner.stage, Stage::Asleep { .. }) {
            return Ok(());
        }
        let command = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let mut workers = Workers::new()?;
        let poller = workers.poller()?;
        let (commands, receiver) = mpsc::channel();
        let stage = std::mem::replace(&mut inner.stage, Stage::Inactive);
        let Stage::Asleep { queue, features, .. } = stage else {
            return Ok(());
        };
        let write_through = features & F_FLUSH == 0;
        let (common, backing) = (self.common.clone(), inner.backing.clone());
        let server = Server::new(*queue, common, backing, receiver, &command, poller, write_through)?;
        workers.spawn("block", move || server.run())?;
        inner.stage = Stage::Awake {
            commands,
            command,
            workers,
        };
        Ok(())
    }
}

impl Wake for Slot {
    fn wake(&self) {
        let mut inner = self.lock();
        if let Err(error) = self.start(&mut inner) {
            eprintln!("kata-rs-vmm: a block device cannot be started: {error}");
        }
    }
}

impl Device for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let always = 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;
        let writing = if self.read_only {
            F_RO
        } else {
            F_DISCARD | F_WRITE_ZEROES
        };
        always | F_SEG_MAX | F_BLK_SIZE | F_FLUSH | writing
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // `struct virtio_blk_config` (section 5.2.4). Fields of features that are not offered stay zero.
        let mut space = [0; 60];
        let mut put = |at: usize, value: u32| space[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let capacity = self.slot.common.capacity.load(Ordering::Acquire);
        put(0, capacity as u32);
        put(4, (capacity >> 32) as u32);
        put(12, MAX_DATA_SEGMENTS);
        put(20, SECTOR as u32);
        put(36, MAX_RANGE_SECTORS);
        put(40, MAX_RANGES);
        // Discarding less than a page gives nothing back on most file systems.
        put(44, (4096 / SECTOR) as u32);
        put(48, MAX_RANGE_SECTORS);
        put(52, MAX_RANGES);
        // Zeroing may give the space back.
        space[56] = 1;
        super::copy_config(&space, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let features = activation.features;
        let interrupt = activation.interrupt.clone();
        let [queue]: [DeviceQueue; 1] = DeviceQueue::take(activation, "block", &self.violations)?;
        let mut inner = self.slot.lock();
        inner.interrupt = Some(interrupt);
        if inner.backing.is_some() {
            inner.stage = Stage::Asleep {
                queue: Box::new(queue),
                features,
                watched: None,
            };
            self.slot.start(&mut inner)?;
        } else {
            let attendant = Attendant::shared()?;
            let device: Arc<dyn Wake> = self.slot.clone();
            let token = attendant.watch(queue.notify(), Arc::downgrade(&device))?;
            let watched = Some((Arc::downgrade(&attendant), token));
            self.attendant = Some(attendant);
            inner.stage = Stage::Asleep {
                queue: Box::new(queue),
                features,
                watched,
            };
        }
        Ok(())
    }

    fn reset(&mut self) {
        let mut inner = self.slot.lock();
        inner.interrupt = None;
        match std::mem::replace(&mut inner.stage, Stage::Inactive) {
            Stage::Inactive => {}
            Stage::Asleep { watched, queue, .. } => {
                forget(watched.as_ref());
                drop(queue);
            }
            Stage::Awake { mut workers, .. } => workers.stop(),
        }
        drop(inner);
        self.attendant = None;
    }

    fn counters(&self) -> Vec<(String, u64)> {
        let counters = &self.slot.common.counters;
        let counted = [
            ("reads", &counters.reads.times),
            ("read_bytes", &counters.reads.bytes),
            ("writes", &counters.writes.times),
            ("written_bytes", &counters.writes.bytes),
            ("flushes", &counters.flushes.times),
            ("discards", &counters.discards.times),
            ("errors", &counters.errors.times),
            ("reads_waited_for", &counters.reads_waited_for.times),
        ];
        counter::report(counted, &self.violations)
    }
}
