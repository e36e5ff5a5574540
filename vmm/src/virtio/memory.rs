//! virtio-mem (specification section 5.15): memory that the guest plugs and unplugs in blocks, as much as it is asked
//! to have.
//!
//! The device says how much; which blocks is the guest's choice, within the part of the region that is usable. A guest
//! can never plug more than it is asked to have, and what it unplugs goes back to the host at once, unless another
//! device is still using it: the answer is then `VIRTIO_MEM_RESP_BUSY`. What lies where is
//! [`pluggable`](crate::pluggable)'s business.
//!
//! `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE` is a condition, not an offer: unplugged memory is not there, for the guest or
//! for devices, since a guest that could use it would not be held by its size. Linux knows the feature from 5.18 on.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::queue::{Chain, DeviceQueue, Violations};
use super::worker::{Workers, serve};
use super::{ActivateError, Activation, Device, DeviceType, Interrupt};
use crate::memory::GuestMemory;
use crate::pluggable::{GRANULE, Pluggable};

/// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`: unplugged memory must not be accessed.
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

const QUEUE_SIZES: &[u16] = &[16];

/// What is plugged at a time: a huge page, so that no half of one is given back.
pub const BLOCK: u64 = 2 << 20;
/// Blocks of a granule: one word of the bitmap.
const PER_GRANULE: u64 = GRANULE / BLOCK;
const _: () = assert!(PER_GRANULE == u64::BITS as u64);

/// Request types (section 5.15.6.1).
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
/// Length of `virtio_mem_req`: type, padding, address, number of blocks, padding.
const REQUEST_SIZE: usize = 24;
/// Length of `virtio_mem_resp`: type, padding, state.
const RESPONSE_SIZE: usize = 10;

/// Response types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
enum Response {
    Ack = 0,
    /// The guest has as much as it shall have.
    Nack = 1,
    /// The host cannot now.
    Busy = 2,
    /// The request contradicts the device's state.
    Error = 3,
}

/// What [`STATE`] answers with.
const STATE_PLUGGED: u16 = 0;
const STATE_UNPLUGGED: u16 = 1;
const STATE_MIXED: u16 = 2;

/// What a snapshot must hold of the device, beside what is in plugged memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryState {
    /// Bytes that the guest shall have plugged (`requested_size`).
    pub requested: u64,
    /// Bytes from the region's start in which it may plug (`usable_region_size`).
    pub usable: u64,
    /// A bit per block of the usable part, 1 for plugged; a word per granule.
    pub plugged: Vec<u64>,
}

struct Shared {
    region: Arc<Pluggable>,
    inner: Mutex<Inner>,
    /// Written when the guest has as much as it was last asked to have.
    reached: EventFd,
}

struct Inner {
    state: MemoryState,
    plugged_blocks: u64,
    /// Whether `reached` is still to be written for the last request.
    waiting: bool,
    /// While the device is active.
    interrupt: Option<Interrupt>,
}

/// The device.
pub struct Memory {
    shared: Arc<Shared>,
    violations: Arc<Violations>,
    workers: Workers,
}

/// Steers the device from elsewhere in the VMM.
#[derive(Clone)]
pub struct MemoryHandle(Arc<Shared>);

impl Memory {
    /// A device without plugged memory.
    ///
    /// # Errors
    /// What eventfd(2) reports.
    pub fn new(region: Arc<Pluggable>) -> std::io::Result<(Self, MemoryHandle)> {
        let shared = Arc::new(Shared {
            region,
            inner: Mutex::new(Inner {
                state: MemoryState::default(),
                plugged_blocks: 0,
                waiting: false,
                interrupt: None,
            }),
            reached: EventFd::new(EFD_NONBLOCK)?,
        });
        let handle = MemoryHandle(shared.clone());
        let device = Self {
            shared,
            violations: Arc::default(),
            workers: Workers::default(),
        };
        Ok((device, handle))
    }

    /// What a snapshot must hold.
    #[must_use]
    pub fn state(&self) -> MemoryState {
        self.shared.lock().state.clone()
    }
}

impl MemoryHandle {
    /// Sets how much the guest shall have plugged, in bytes, and tells it: false when that is no number of whole
    /// blocks, or more than the region has. The guest follows as far as it can.
    #[must_use]
    pub fn request(&self, bytes: u64) -> bool {
        let region = &self.0.region;
        if !bytes.is_multiple_of(BLOCK) || bytes > region.range().len {
            return false;
        }
        let mut inner = self.0.lock();
        inner.state.requested = bytes;
        // Only ever grows here: there may be plugged blocks in all of it.
        let usable = region.usable_for(bytes).max(inner.state.usable);
        inner.set_usable(usable);
        inner.waiting = true;
        self.0.announce_if_reached(&mut inner);
        if let Some(interrupt) = &inner.interrupt {
            interrupt.config_changed(|space| inner.put_sizes(space));
        }
        true
    }

    /// Bytes that the guest has plugged.
    #[must_use]
    pub fn plugged(&self) -> u64 {
        self.0.lock().plugged_bytes()
    }

    /// Readable once the guest has as much as the last [`Self::request`] asked for; written once for each.
    #[must_use]
    pub fn reached(&self) -> &EventFd {
        &self.0.reached
    }

    /// The region.
    #[must_use]
    pub fn region(&self) -> &Pluggable {
        &self.0.region
    }
}

impl Device for Memory {
    fn device_type(&self) -> DeviceType {
        DeviceType::Memory
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | F_UNPLUGGED_INACCESSIBLE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let range = self.shared.region.range();
        let inner = self.shared.lock();
        let mut space = [0; 56];
        // block_size, node_id with padding, addr, region_size; the sizes follow.
        put(&mut space, [BLOCK, 0, range.guest, range.len]);
        inner.put_sizes(&mut space);
        super::copy_config(&space, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if activation.features & F_UNPLUGGED_INACCESSIBLE == 0 {
            return Err(ActivateError::Feature("VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE"));
        }
        let interrupt = activation.interrupt.clone();
        let mut queues: [DeviceQueue; 1] = DeviceQueue::take(activation, "memory", &self.violations)?;
        self.workers = Workers::new()?;
        let poller = self.workers.poller()?;
        poller.add_event(queues[0].notify(), 0)?;
        self.shared.lock().interrupt = Some(interrupt);
        let shared = self.shared.clone();
        self.workers.spawn("memory", move || {
            serve(&poller, &mut queues, |_, memory, chain| {
                shared.answer(memory, chain)
            });
        })?;
        Ok(())
    }

    /// Plugged memory stays as it is (section 5.15.5).
    fn reset(&mut self) {
        self.workers.stop();
        self.shared.lock().interrupt = None;
    }

    fn counters(&self) -> Vec<(String, u64)> {
        let inner = self.shared.lock();
        vec![
            ("requested_bytes".to_owned(), inner.state.requested),
            ("plugged_bytes".to_owned(), inner.plugged_bytes()),
            ("violations".to_owned(), self.violations.count()),
        ]
    }
}

/// Blocks by number, from the region's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Blocks {
    first: u64,
    count: u64,
}

impl Blocks {
    /// The words of the bitmap that they are in, and which bits of each.
    fn words(self) -> impl Iterator<Item = (usize, u64)> {
        let end = self.first + self.count;
        (self.first / PER_GRANULE..end.div_ceil(PER_GRANULE)).map(move |word| {
            let from = self.first.max(word * PER_GRANULE) - word * PER_GRANULE;
            let bits = (end.min((word + 1) * PER_GRANULE) - word * PER_GRANULE) - from;
            (word as usize, (u64::MAX >> (u64::from(u64::BITS) - bits)) << from)
        })
    }
}

/// Puts fields of the configuration space one after the other.
fn put<const N: usize>(space: &mut [u8], fields: [u64; N]) {
    for (bytes, field) in space.chunks_exact_mut(8).zip(fields) {
        bytes.copy_from_slice(&field.to_le_bytes());
    }
}

impl Inner {
    /// Puts usable_region_size, plugged_size and requested_size where the configuration space has them.
    fn put_sizes(&self, space: &mut [u8]) {
        put(
            &mut space[32..],
            [self.state.usable, self.plugged_bytes(), self.state.requested],
        );
    }

    fn plugged_bytes(&self) -> u64 {
        self.plugged_blocks * BLOCK
    }

    fn set_usable(&mut self, usable: u64) {
        self.state.usable = usable;
        self.state.plugged.resize((usable / GRANULE) as usize, 0);
    }

    /// How many of these blocks are plugged.
    fn count(&self, blocks: Blocks) -> u64 {
        let plugged = |(word, mask): (usize, u64)| u64::from((self.state.plugged[word] & mask).count_ones());
        blocks.words().map(plugged).sum()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn announce_if_reached(&self, inner: &mut Inner) {
        if inner.waiting && inner.plugged_bytes() == inner.state.requested {
            inner.waiting = false;
            // Fails only when the counter is full; the event is readable then anyway.
            let _ = self.reached.write(1);
        }
    }

    /// Answers one request: how many bytes of it were written.
    fn answer(&self, memory: &GuestMemory, chain: &Chain) -> usize {
        let mut request = [0; REQUEST_SIZE];
        if chain.read(memory, 0, &mut request).is_err() || chain.writable_length() < RESPONSE_SIZE {
            return 0;
        }
        let word = |at: usize| u16::from_le_bytes([request[at], request[at + 1]]);
        let mut address = [0; 8];
        address.copy_from_slice(&request[8..16]);
        let (kind, address, count) = (word(0), u64::from_le_bytes(address), word(16));
        let mut inner = self.lock();
        let before = inner.plugged_blocks;
        let (response, state) = self.handle(&mut inner, kind, address, count);
        if let (Some(interrupt), true) = (&inner.interrupt, inner.plugged_blocks != before) {
            // The driver knows, but may look.
            interrupt.page().change_config(|space| inner.put_sizes(space));
        }
        self.announce_if_reached(&mut inner);
        drop(inner);
        let mut bytes = [0; RESPONSE_SIZE];
        bytes[..2].copy_from_slice(&(response as u16).to_le_bytes());
        bytes[8..].copy_from_slice(&state.to_le_bytes());
        match chain.write(memory, 0, &bytes) {
            Ok(()) => RESPONSE_SIZE,
            Err(_) => 0,
        }
    }

    fn handle(&self, inner: &mut Inner, kind: u16, address: u64, count: u16) -> (Response, u16) {
        if kind == UNPLUG_ALL {
            return (self.unplug_all(inner), 0);
        }
        let Some(blocks) = self.blocks(inner, address, count) else {
            return (Response::Error, 0);
        };
        match kind {
            PLUG => (self.plug(inner, blocks), 0),
            UNPLUG => (self.unplug(inner, blocks), 0),
            STATE => {
                let state = match inner.count(blocks) {
                    0 => STATE_UNPLUGGED,
                    plugged if plugged == blocks.count => STATE_PLUGGED,
                    _ => STATE_MIXED,
                };
                (Response::Ack, state)
            }
            _ => (Response::Error, 0),
        }
    }

    /// The blocks that a request names, when they lie in the usable part.
    fn blocks(&self, inner: &Inner, address: u64, count: u16) -> Option<Blocks> {
        let offset = address.checked_sub(self.region.range().guest)?;
        let blocks = Blocks {
            first: offset / BLOCK,
            count: count.into(),
        };
        let end = offset.checked_add(blocks.count * BLOCK)?;
        (offset.is_multiple_of(BLOCK) && count > 0 && end <= inner.state.usable).then_some(blocks)
    }

    fn plug(&self, inner: &mut Inner, blocks: Blocks) -> Response {
        if inner.count(blocks) != 0 {
            return Response::Error;
        }
        if (inner.plugged_blocks + blocks.count) * BLOCK > inner.state.requested {
            return Response::Nack;
        }
        for (word, mask) in blocks.words() {
            if inner.state.plugged[word] == 0
                && let Err(error) = self.region.open(word)
            {
                eprintln!("kata-rs-vmm: the host has no memory for the guest to plug: {error}");
                let done = Blocks {
                    count: (word as u64 * PER_GRANULE).saturating_sub(blocks.first),
                    ..blocks
                };
                if done.count > 0 {
                    self.unplug(inner, done);
                }
                return Response::Busy;
            }
            inner.state.plugged[word] |= mask;
            inner.plugged_blocks += u64::from(mask.count_ones());
        }
        Response::Ack
    }

    fn unplug(&self, inner: &mut Inner, blocks: Blocks) -> Response {
        if inner.count(blocks) != blocks.count {
            return Response::Error;
        }
        for (word, mask) in blocks.words() {
            let left = inner.state.plugged[word] & !mask;
            let result = if left == 0 {
                self.region.close(word)
            } else {
                let first = word as u64 * PER_GRANULE + u64::from(mask.trailing_zeros());
                self.region
                    .discard(first * BLOCK, u64::from(mask.count_ones()) * BLOCK)
                    .map(|()| true)
            };
            if !given_back(result) {
                return Response::Busy;
            }
            inner.state.plugged[word] = left;
            inner.plugged_blocks -= u64::from(mask.count_ones());
        }
        Response::Ack
    }

    /// Also the moment at which the usable part may become smaller.
    fn unplug_all(&self, inner: &mut Inner) -> Response {
        for word in 0..inner.state.plugged.len() {
            let plugged = inner.state.plugged[word];
            if plugged == 0 {
                continue;
            }
            if !given_back(self.region.close(word)) {
                return Response::Busy;
            }
            inner.state.plugged[word] = 0;
            inner.plugged_blocks -= u64::from(plugged.count_ones());
        }
        let usable = self.region.usable_for(inner.state.requested);
        if usable != inner.state.usable {
            inner.set_usable(usable);
            if let Some(interrupt) = &inner.interrupt {
                interrupt.config_changed(|space| inner.put_sizes(space));
            }
        }
        Response::Ack
    }
}

/// Whether memory has gone back to the host; false while a device holds it.
fn given_back(result: std::io::Result<bool>) -> bool {
    result.unwrap_or_else(|error| {
        eprintln!("kata-rs-vmm: memory that the guest unplugged cannot be given back: {error}");
        false
    })
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
