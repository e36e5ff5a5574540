//! A virtio driver for tests: guest memory, split rings, and buffers, as a guest's kernel would have them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::registers::Page;
use super::{Activation, ActiveQueue, Device, Interrupt};
use crate::memory::GuestMemory;
use crate::pluggable::Pluggable;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// A descriptor as it lies in the table.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    pub address: u64,
    pub length: u32,
    pub flags: u16,
    pub next: u16,
}

/// One buffer of a request.
#[derive(Clone, Copy, Debug)]
pub enum Buffer<'a> {
    /// For the device to read.
    Out(&'a [u8]),
    /// For the device to fill.
    In(usize),
}

struct Ring {
    size: u16,
    base: u64,
    notify: EventFd,
    free: Vec<u16>,
    available: u16,
    used: u16,
    /// By head.
    flying: HashMap<u16, Flying>,
    done: HashMap<u16, Vec<u8>>,
}

/// A chain that the device has.
struct Flying {
    descriptors: Vec<u16>,
    /// Where the device shall write, and how much there is room for.
    fills: Vec<(u64, usize)>,
}

/// The driver. Each descriptor of a queue has a data buffer of its own.
pub struct Driver {
    pub memory: GuestMemory,
    pub line: EventFd,
    pub interrupt: Interrupt,
    /// What devices are told of memory that may not be there.
    pub pluggable: Option<Arc<Pluggable>>,
    rings: Vec<Ring>,
}

impl Driver {
    /// Size of guest memory.
    pub const MEMORY: u64 = 0x1000_0000;
    /// Where hand-written requests may put their data.
    pub const DATA: u64 = 0x80_0000;
    /// Buffer space per descriptor.
    const BUFFER: u64 = 0x1_1000;
    const RING_STRIDE: u64 = 0x2_0000;
    const BUFFERS: u64 = 0x100_0000;

    pub fn new(sizes: &[u16]) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), Self::MEMORY as usize)]).unwrap();
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = Interrupt::new(line.try_clone().unwrap(), Page::alone());
        let ring = |(index, &size): (usize, &u16)| Ring {
            size,
            base: 0x1000 + index as u64 * Self::RING_STRIDE,
            notify: EventFd::new(EFD_NONBLOCK).unwrap(),
            free: (0..size).rev().collect(),
            available: 0,
            used: 0,
            flying: HashMap::new(),
            done: HashMap::new(),
        };
        let rings = sizes.iter().enumerate().map(ring).collect();
        Self {
            memory,
            line,
            interrupt,
            pluggable: None,
            rings,
        }
    }

    /// A driver for a device, which it activates with all features the device offers.
    pub fn activate(device: &mut dyn Device) -> Self {
        let mut driver = Self::new(device.queue_sizes());
        let features = device.features();
        device.activate(driver.activation(features)).unwrap();
        driver
    }

    pub fn activation(&mut self, features: u64) -> Activation {
        let queue = |ring: &Ring| {
            let mut queue = Queue::new(ring.size).unwrap();
            let (table, available, used) = (ring.base, ring.available_ring(), ring.used_ring());
            let halves = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
            let (low, high) = halves(table);
            queue.set_desc_table_address(low, high);
            let (low, high) = halves(available);
            queue.set_avail_ring_address(low, high);
            let (low, high) = halves(used);
            queue.set_used_ring_address(low, high);
            queue.set_ready(true);
            assert!(queue.is_valid(&self.memory));
            let areas = [
                (table, available - table),
                (available, used - available),
                (used, 6 + 8 * u64::from(ring.size)),
            ];
            let hold =
                |pluggable: &Arc<Pluggable>| areas.map(|(start, len)| pluggable.hold(start, len).unwrap());
            ActiveQueue {
                queue,
                rings: self.pluggable.iter().flat_map(hold).flatten().collect(),
                notify: ring.notify.try_clone().unwrap(),
            }
        };
        let queues = self.rings.iter().map(queue).collect();
        Activation {
            memory: self.memory.clone(),
            pluggable: self.pluggable.clone(),
            features,
            queues,
            interrupt: self.interrupt.clone(),
        }
    }

    /// Puts a queue's rings elsewhere, before they are used.
    pub fn move_rings(&mut self, queue: usize, base: u64) {
        self.rings[queue].base = base;
    }

    /// Makes a chain of the buffers available and notifies the device. Returns what [`Self::wait`] takes.
    pub fn submit(&mut self, queue: usize, buffers: &[Buffer<'_>]) -> u16 {
        let id = self.prepare(queue, buffers);
        self.kick(queue);
        id
    }

    /// Like [`Self::submit`], without the notification.
    pub fn prepare(&mut self, queue: usize, buffers: &[Buffer<'_>]) -> u16 {
        let ring = &mut self.rings[queue];
        assert!(
            ring.free.len() >= buffers.len(),
            "the driver is out of descriptors"
        );
        let ids: Vec<u16> = buffers.iter().map(|_| ring.free.pop().unwrap()).collect();
        let mut fills = Vec::new();
        for (place, buffer) in buffers.iter().enumerate() {
            let address = Self::BUFFERS
                + (queue as u64 * 0x400_0000)
                + u64::from(ids[place]) * Self::BUFFER.min((0x400_0000 / u64::from(ring.size)) & !0xf);
            let (length, mut flags) = match *buffer {
                Buffer::Out(bytes) => {
                    self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
                    (bytes.len(), 0)
                }
                Buffer::In(length) => {
                    fills.push((address, length));
                    (length, WRITE)
                }
            };
            let mut next = 0;
            if let Some(&following) = ids.get(place + 1) {
                flags |= NEXT;
                next = following;
            }
            let descriptor = Descriptor {
                address,
                length: length as u32,
                flags,
                next,
            };
            write_descriptor(&self.memory, ring.base + u64::from(ids[place]) * 16, descriptor);
        }
        let head = ids[0];
        ring.flying.insert(
            head,
            Flying {
                descriptors: ids,
                fills,
            },
        );
        self.offer(queue, head);
        head
    }

    pub fn kick(&self, queue: usize) {
        self.rings[queue].notify.write(1).unwrap();
    }

    /// Waits until the chain has come back; what the device wrote into it.
    pub fn wait(&mut self, queue: usize, id: u16) -> Vec<u8> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(bytes) = self.poll(queue, id) {
                return bytes;
            }
            assert!(Instant::now() < deadline, "the device did not answer");
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// What the device wrote into the chain, if it has come back.
    pub fn poll(&mut self, queue: usize, id: u16) -> Option<Vec<u8>> {
        while let Some((head, bytes)) = self.reap(queue) {
            self.rings[queue].done.insert(head, bytes);
        }
        self.rings[queue].done.remove(&id)
    }

    /// The next chain that has come back, and what the device wrote into it.
    pub fn reap(&mut self, queue: usize) -> Option<(u16, Vec<u8>)> {
        let ring = &mut self.rings[queue];
        let used = ring.used_ring();
        let index: u16 = self
            .memory
            .load(GuestAddress(used + 2), Ordering::Acquire)
            .unwrap();
        if index == ring.used {
            return None;
        }
        let entry = used + 4 + u64::from(ring.used % ring.size) * 8;
        let head: u32 = self.memory.read_obj(GuestAddress(entry)).unwrap();
        let mut left = self.memory.read_obj::<u32>(GuestAddress(entry + 4)).unwrap() as usize;
        ring.used = ring.used.wrapping_add(1);
        // Asks for an interrupt on the next used chain (`used_event`).
        let event = ring.available_ring() + 4 + u64::from(ring.size) * 2;
        self.memory.write_obj(ring.used, GuestAddress(event)).unwrap();
        let Flying { descriptors, fills } = ring
            .flying
            .remove(&(head as u16))
            .expect("a chain comes back once");
        ring.free.extend(descriptors);
        let mut bytes = Vec::new();
        for (address, length) in fills {
            let mut part = vec![0; length.min(left)];
            self.memory.read_slice(&mut part, GuestAddress(address)).unwrap();
            left -= part.len();
            bytes.extend(part);
        }
        assert_eq!(
            left, 0,
            "the device cannot have written more than the chain holds"
        );
        Some((head as u16, bytes))
    }

    /// Puts a head into the available ring.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let slot = ring.available_ring() + 4 + u64::from(ring.available % ring.size) * 2;
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        let next = ring.available.wrapping_add(1);
        self.set_available_index(queue, next);
    }

    pub fn set_available_index(&mut self, queue: usize, index: u16) {
        let ring = &mut self.rings[queue];
        ring.available = index;
        self.memory
            .store(index, GuestAddress(ring.available_ring() + 2), Ordering::Release)
            .unwrap();
    }

    /// Overwrites the descriptor table from its first entry.
    pub fn write_descriptors(&mut self, queue: usize, descriptors: &[Descriptor]) {
        self.write_table(self.rings[queue].base, descriptors);
    }

    /// Writes descriptors anywhere.
    pub fn write_table(&mut self, at: u64, descriptors: &[Descriptor]) {
        for (index, &descriptor) in descriptors.iter().enumerate() {
            write_descriptor(&self.memory, at + index as u64 * 16, descriptor);
        }
    }

    /// How many descriptors are free.
    pub fn free(&self, queue: usize) -> usize {
        self.rings[queue].free.len()
    }
}

impl Ring {
    fn available_ring(&self) -> u64 {
        self.base + u64::from(self.size) * 16
    }

    fn used_ring(&self) -> u64 {
        (self.available_ring() + 6 + u64::from(self.size) * 2).next_multiple_of(16)
    }
}

fn write_descriptor(memory: &GuestMemory, at: u64, descriptor: Descriptor) {
    let mut bytes = [0; 16];
    bytes[0..8].copy_from_slice(&descriptor.address.to_le_bytes());
    bytes[8..12].copy_from_slice(&descriptor.length.to_le_bytes());
    bytes[12..14].copy_from_slice(&descriptor.flags.to_le_bytes());
    bytes[14..16].copy_from_slice(&descriptor.next.to_le_bytes());
    memory.write_slice(&bytes, GuestAddress(at)).unwrap();
}
