//! A virtqueue as a device sees it: descriptor chains that have been checked once, as a copy.
//!
//! The driver is hostile. What it wrote into the rings is read once into host memory, checked there, and never
//! read again, so that it cannot change between check and use. A queue whose rings or chains break the
//! specification is ignored until the device is reset: nothing useful can come from it any more.
//! Ring arithmetic is virtio-queue's, but for chains that are given back together and the interrupt after them;
//! what requests mean is the devices'.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VRING_AVAIL_F_NO_INTERRUPT};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory as _};
use vmm_sys_util::eventfd::EventFd;

use super::{ActivateError, Activation, ActiveQueue, Interrupt};
use crate::memory::GuestMemory;
use crate::pluggable::{Hold, Pluggable};

/// The most buffers in one chain: what one readv(2) takes (`IOV_MAX`).
pub const MAX_SEGMENTS: usize = 1024;
/// How many protocol violations are written to the log in the life of the process.
const MAX_COMPLAINTS: u32 = 16;

/// One buffer of a chain; it lies within guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address of the first byte.
    pub address: GuestAddress,
    /// Length in bytes, at least 1.
    pub length: u32,
}

/// How a driver has broken a virtqueue.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The available ring cannot be read, or announces more chains than the queue has descriptors.
    #[error("the available ring is broken: {0}")]
    Available(virtio_queue::Error),
    /// The used ring cannot be written.
    #[error("the used ring is broken: {0}")]
    Used(virtio_queue::Error),
    /// The device still has the chain: it cannot be two requests.
    #[error("chain {head} is available again before it was used")]
    Again {
        /// Index of the chain's first descriptor.
        head: u16,
    },
    /// A descriptor lies outside its table, the chain loops, or an indirect table is malformed.
    #[error("chain {head} does not end: bad index, loop, or bad indirect table")]
    Unterminated {
        /// Index of the chain's first descriptor.
        head: u16,
    },
    /// The chain has more buffers than [`MAX_SEGMENTS`].
    #[error("chain {head} has more than {MAX_SEGMENTS} buffers")]
    TooManySegments {
        /// Index of the chain's first descriptor.
        head: u16,
    },
    /// A buffer lies outside guest memory, or in memory that is not plugged.
    #[error("chain {head} has a buffer of {length} bytes at {address:#x}, outside of memory")]
    OutOfMemory {
        /// Index of the chain's first descriptor.
        head: u16,
        /// Guest-physical address of the buffer.
        address: u64,
        /// Length of the buffer.
        length: u32,
    },
    /// A buffer for the device to read follows one for it to write (specification section 2.7.4.2).
    #[error("chain {head} has a readable buffer after a writable one")]
    Order {
        /// Index of the chain's first descriptor.
        head: u16,
    },
}

/// A request does not fit into its chain.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the chain is too short: {wanted} bytes at {offset} of {length}")]
pub struct TooShort {
    /// Where in the chain's bytes.
    pub offset: usize,
    /// How many were wanted.
    pub wanted: usize,
    /// How many the chain has.
    pub length: usize,
}

/// Where buffers of a chain lie in this process, for readv(2) and its kin. Reused from request to request.
///
/// The addresses are good as long as guest memory is mapped. The guest may change the bytes at any time.
#[derive(Default)]
pub struct Iovecs(Vec<libc::iovec>);

// SAFETY: an iovec is a plain address and length, tied to no thread; whoever dereferences it answers for that.
unsafe impl Send for Iovecs {}

impl Iovecs {
    /// The list.
    #[must_use]
    pub fn as_slice(&self) -> &[libc::iovec] {
        &self.0
    }

    /// Forgets all addresses.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Forgets the first `count` addresses.
    pub fn discard(&mut self, count: usize) {
        self.0.drain(..count.min(self.0.len()));
    }

    /// Appends bytes of this process. They must stay where they are as long as the list is used.
    pub fn push_own(&mut self, bytes: &mut [u8]) {
        self.0.push(libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        });
    }

    /// Forgets the last address.
    pub fn pop(&mut self) {
        self.0.pop();
    }
}

/// A checked descriptor chain. Reused from request to request so that the hot path does not allocate.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    readable_length: usize,
    writable_length: usize,
}

impl Chain {
    /// Index of the first descriptor: names the chain when it is given back.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Buffers that the driver has filled for the device.
    #[must_use]
    pub fn readable(&self) -> &[Segment] {
        &self.readable
    }

    /// Buffers that the device fills for the driver.
    #[must_use]
    pub fn writable(&self) -> &[Segment] {
        &self.writable
    }

    /// Bytes in the readable buffers.
    #[must_use]
    pub fn readable_length(&self) -> usize {
        self.readable_length
    }

    /// Bytes in the writable buffers.
    #[must_use]
    pub fn writable_length(&self) -> usize {
        self.writable_length
    }

    /// Guest-physical address of a byte of the writable buffers, if they have so many.
    #[must_use]
    pub fn writable_address(&self, offset: usize) -> Option<GuestAddress> {
        let mut found = None;
        each(&self.writable, self.writable_length, offset, 1, |address, _| {
            found = Some(address);
        })
        .ok()?;
        found
    }

    /// Copies bytes from the readable buffers.
    ///
    /// # Errors
    /// [`TooShort`] when they have fewer than `offset + bytes.len()`.
    pub fn read(&self, memory: &GuestMemory, offset: usize, bytes: &mut [u8]) -> Result<(), TooShort> {
        let mut done = 0;
        each(
            &self.readable,
            self.readable_length,
            offset,
            bytes.len(),
            |address, length| {
                if memory
                    .read_slice(&mut bytes[done..done + length], address)
                    .is_err()
                {
                    bytes[done..done + length].fill(0);
                }
                done += length;
            },
        )
    }

    /// Copies bytes into the writable buffers.
    ///
    /// # Errors
    /// [`TooShort`] when they have fewer than `offset + bytes.len()`; nothing is written then.
    pub fn write(&self, memory: &GuestMemory, offset: usize, bytes: &[u8]) -> Result<(), TooShort> {
        let mut done = 0;
        each(
            &self.writable,
            self.writable_length,
            offset,
            bytes.len(),
            |address, length| {
                // The range was checked when the chain was taken, and is held until it is given back.
                let _ = memory.write_slice(&bytes[done..done + length], address);
                done += length;
            },
        )
    }

    /// Where a part of the readable buffers lies, appended to `into`.
    ///
    /// # Errors
    /// [`TooShort`] when they have fewer than `offset + length` bytes.
    pub fn readable_iovecs(
        &self,
        memory: &GuestMemory,
        offset: usize,
        length: usize,
        into: &mut Iovecs,
    ) -> Result<(), TooShort> {
        iovecs(memory, &self.readable, self.readable_length, offset, length, into)
    }

    /// Where a part of the writable buffers lies, appended to `into`.
    ///
    /// # Errors
    /// [`TooShort`] when they have fewer than `offset + length` bytes.
    pub fn writable_iovecs(
        &self,
        memory: &GuestMemory,
        offset: usize,
        length: usize,
        into: &mut Iovecs,
    ) -> Result<(), TooShort> {
        iovecs(memory, &self.writable, self.writable_length, offset, length, into)
    }

    /// Takes a copy of the chain that begins at `descriptors`' head, and checks it. What it returns keeps the buffers
    /// where they are.
    fn fill(
        &mut self,
        memory: &GuestMemory,
        pluggable: Option<&Arc<Pluggable>>,
        mut descriptors: virtio_queue::DescriptorChain<&GuestMemory>,
    ) -> Result<Vec<Hold>, QueueError> {
        let mut holds = Vec::new();
        let head = descriptors.head_index();
        self.head = head;
        self.readable.clear();
        self.writable.clear();
        self.readable_length = 0;
        self.writable_length = 0;
        // The iterator ends silently on a bad index, a loop or a bad indirect table; the last descriptor then
        // still announces a successor.
        let mut unterminated = true;
        let mut descriptors_seen = 0;
        for descriptor in descriptors.by_ref() {
            unterminated = descriptor.has_next();
            descriptors_seen += 1;
            if descriptors_seen > MAX_SEGMENTS {
                return Err(QueueError::TooManySegments { head });
            }
            let segment = Segment {
                address: descriptor.addr(),
                length: descriptor.len(),
            };
            if segment.length == 0 {
                continue;
            }
            let (address, length) = (segment.address.0, segment.length);
            let outside = QueueError::OutOfMemory {
                head,
                address,
                length,
            };
            if memory.get_slice(segment.address, length as usize).is_err() {
                return Err(outside);
            }
            if let Some(pluggable) = pluggable {
                holds.extend(pluggable.hold(address, length.into()).map_err(|_| outside)?);
            }
            if descriptor.is_write_only() {
                self.writable.push(segment);
                self.writable_length += segment.length as usize;
            } else if self.writable.is_empty() {
                self.readable.push(segment);
                self.readable_length += segment.length as usize;
            } else {
                return Err(QueueError::Order { head });
            }
        }
        if unterminated {
            Err(QueueError::Unterminated { head })
        } else {
            Ok(holds)
        }
    }
}

/// Calls `visit` with each contiguous piece of `length` bytes from `offset`.
fn each(
    segments: &[Segment],
    total: usize,
    offset: usize,
    length: usize,
    mut visit: impl FnMut(GuestAddress, usize),
) -> Result<(), TooShort> {
    if offset.checked_add(length).is_none_or(|end| end > total) {
        return Err(TooShort {
            offset,
            wanted: length,
            length: total,
        });
    }
    let (mut skip, mut left) = (offset, length);
    for segment in segments {
        if left == 0 {
            break;
        }
        let size = segment.length as usize;
        if skip >= size {
            skip -= size;
            continue;
        }
        let piece = left.min(size - skip);
        visit(GuestAddress(segment.address.0 + skip as u64), piece);
        left -= piece;
        skip = 0;
    }
    Ok(())
}

fn iovecs(
    memory: &GuestMemory,
    segments: &[Segment],
    total: usize,
    offset: usize,
    length: usize,
    into: &mut Iovecs,
) -> Result<(), TooShort> {
    each(segments, total, offset, length, |address, length| {
        if let Ok(slice) = memory.get_slice(address, length) {
            into.0.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
        }
    })
}

/// What went wrong on the queues of one device, since its creation.
#[derive(Debug, Default)]
pub struct Violations(AtomicU64);

impl Violations {
    /// How often the driver has broken the specification.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Counts one, and logs it unless the guest has filled its share of the log already.
    pub fn report(&self, device: &str, error: &dyn std::error::Error) {
        static COMPLAINTS: AtomicU32 = AtomicU32::new(0);
        self.0.fetch_add(1, Ordering::Relaxed);
        if COMPLAINTS.load(Ordering::Relaxed) < MAX_COMPLAINTS {
            COMPLAINTS.fetch_add(1, Ordering::Relaxed);
            eprintln!("kata-rs-vmm: the guest broke virtio-{device}: {error}");
        }
    }
}

/// A queue that a device serves.
pub struct DeviceQueue {
    device: &'static str,
    queue: Queue,
    notify: EventFd,
    memory: GuestMemory,
    pluggable: Option<Arc<Pluggable>>,
    _rings: Vec<Hold>,
    /// Of the chains that the device has, by head: what keeps their buffers where they are.
    taken: Box<[Option<Vec<Hold>>]>,
    /// Head of the chain that was taken last.
    last: u16,
    interrupt: Interrupt,
    violations: Arc<Violations>,
    stopped: bool,
    /// Chains given back since the driver was last interrupted, or need not have been.
    unannounced: u16,
}

impl DeviceQueue {
    /// Takes the queues of an activation, of which there must be `N`.
    ///
    /// # Errors
    /// [`ActivateError::Queues`] when there is another number of them.
    pub fn take<const N: usize>(
        activation: Activation,
        device: &'static str,
        violations: &Arc<Violations>,
    ) -> Result<[Self; N], ActivateError> {
        let queues = Self::take_all(activation, device, violations);
        let found = queues.len();
        queues
            .try_into()
            .map_err(|_| ActivateError::Queues { expected: N, found })
    }

    /// Takes the queues of an activation, however many there are.
    #[must_use]
    pub fn take_all(activation: Activation, device: &'static str, violations: &Arc<Violations>) -> Vec<Self> {
        let event_idx = activation.features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let queues = activation.queues.into_iter().map(|active| {
            let ActiveQueue {
                mut queue,
                rings,
                notify,
            } = active;
            queue.set_event_idx(event_idx);
            Self {
                device,
                _rings: rings,
                taken: (0..queue.size()).map(|_| None).collect(),
                last: 0,
                queue,
                notify,
                memory: activation.memory.clone(),
                pluggable: activation.pluggable.clone(),
                interrupt: activation.interrupt.clone(),
                violations: violations.clone(),
                stopped: false,
                unannounced: 0,
            }
        });
        queues.collect()
    }

    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Signalled when the driver has made chains available. Counts up; need not be read when polled edge-triggered.
    #[must_use]
    pub fn notify(&self) -> &EventFd {
        &self.notify
    }

    /// Number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Whether the driver has broken the queue; it is ignored until reset.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Takes the next available chain into `chain`. False when there is none or the queue is stopped.
    pub fn pop(&mut self, chain: &mut Chain) -> bool {
        if self.stopped {
            return false;
        }
        let next = match self.queue.iter(&self.memory) {
            Ok(mut available) => available.next(),
            Err(error) => return self.stop(&QueueError::Available(error)),
        };
        let filled = next.map(|descriptors| chain.fill(&self.memory, self.pluggable.as_ref(), descriptors));
        let holds = match filled {
            None => return false,
            Some(Ok(holds)) => holds,
            Some(Err(error)) => return self.stop(&error),
        };
        let head = chain.head;
        match self.taken.get_mut(usize::from(head)) {
            Some(place @ None) => {
                *place = Some(holds);
                self.last = head;
                true
            }
            _ => self.stop(&QueueError::Again { head }),
        }
    }

    /// Undoes the last [`Self::pop`]: the chain is available again.
    pub fn unpop(&mut self) {
        self.release(self.last);
        self.queue.go_to_previous_position();
    }

    /// Lets go of a chain's buffers.
    fn release(&mut self, head: u16) {
        if let Some(holds) = self.taken.get_mut(usize::from(head)) {
            *holds = None;
        }
    }

    /// Gives the chain that begins at `head` back to the driver, with `written` bytes in its writable buffers.
    pub fn push(&mut self, head: u16, written: usize) {
        self.push_all(&[(head, written)]);
    }

    /// Gives chains back to the driver, each with the bytes written into it, in such a way that it sees all of them
    /// or none (what section 5.1.6.4 wants of buffers that share a packet).
    pub fn push_all(&mut self, used: &[(u16, usize)]) {
        let Some((&(last, last_written), others)) = used.split_last() else {
            return;
        };
        // Before the driver can see that it has them back: it may unplug the memory then.
        for &(head, _) in used {
            self.release(head);
        }
        if self.stopped {
            return;
        }
        let first = self.queue.next_used();
        for (place, &(head, written)) in others.iter().enumerate() {
            let index = u64::from(first.wrapping_add(place as u16) % self.queue.size());
            // The ring was checked when the queue was set up: flags and index, then entries of eight bytes.
            let entry = GuestAddress(self.queue.used_ring() + 4 + index * 8);
            let element = u64::from(head) | u64::from(length_of(written)) << 32;
            if let Err(error) = self.memory.write_obj(element.to_le(), entry) {
                self.stop(&QueueError::Used(virtio_queue::Error::GuestMemory(error)));
                return;
            }
        }
        // Only the last entry moves the ring's index, over all of them.
        self.queue.set_next_used(first.wrapping_add(others.len() as u16));
        match self.queue.add_used(&self.memory, last, length_of(last_written)) {
            Ok(()) => self.unannounced = self.unannounced.saturating_add(used.len() as u16),
            Err(error) => {
                self.stop(&QueueError::Used(error));
            }
        }
    }

    /// Interrupts the driver if it wants to know about what was pushed since the last call.
    pub fn interrupt(&mut self) {
        let pushed = std::mem::take(&mut self.unannounced);
        if self.stopped || pushed == 0 {
            return;
        }
        // The driver must see the used entries before its wish is read (section 2.7.7.2).
        fence(Ordering::SeqCst);
        let available = self.queue.avail_ring();
        let event_idx = self.queue.event_idx_enabled();
        // With event indices the wish is the last word of the available ring, else its first.
        let offset = if event_idx {
            4 + 2 * u64::from(self.queue.size())
        } else {
            0
        };
        match self
            .memory
            .load::<u16>(GuestAddress(available + offset), Ordering::Relaxed)
        {
            Ok(wish) if event_idx => {
                let used = self.queue.next_used();
                // Whether `used_event` is among the entries that were added since.
                if used.wrapping_sub(wish).wrapping_sub(1) < pushed {
                    self.interrupt.used();
                }
            }
            Ok(flags) if u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT != 0 => {}
            Ok(_) => self.interrupt.used(),
            Err(error) => {
                self.stop(&QueueError::Available(virtio_queue::Error::GuestMemory(error)));
            }
        }
    }

    /// Asks to be notified of the next available chain. True when one is there already: pop again.
    pub fn rearm(&mut self) -> bool {
        if self.stopped {
            return false;
        }
        match self.queue.enable_notification(&self.memory) {
            Ok(more) => more,
            Err(error) => self.stop(&QueueError::Available(error)),
        }
    }

    /// Counts a request that made no sense to the device.
    pub fn violation(&self, error: &dyn std::error::Error) {
        self.violations.report(self.device, error);
    }

    /// Always false, for callers that return whether there is a chain.
    fn stop(&mut self, error: &QueueError) -> bool {
        self.violations.report(self.device, error);
        self.stopped = true;
        false
    }
}

/// A length as the used ring holds it.
fn length_of(written: usize) -> u32 {
    u32::try_from(written).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::test_driver::{Buffer, Descriptor, Driver, INDIRECT, NEXT, WRITE};

    fn queue(driver: &mut Driver) -> DeviceQueue {
        let violations = Arc::default();
        let [queue] = DeviceQueue::take(
            driver.activation(1 << VIRTIO_RING_F_EVENT_IDX),
            "test",
            &violations,
        )
        .unwrap();
        queue
    }

    /// What a device makes of hand-written descriptors, of which the first is the head.
    fn verdict(descriptors: &[Descriptor]) -> (bool, u64) {
        let mut driver = Driver::new(&[16]);
        let mut queue = queue(&mut driver);
        driver.write_descriptors(0, descriptors);
        driver.offer(0, 0);
        let taken = queue.pop(&mut Chain::default());
        assert_eq!(taken, !queue.is_stopped());
        (taken, queue.violations.count())
    }

    #[test]
    fn a_chain_is_read_and_written_across_its_buffers() {
        let mut driver = Driver::new(&[16]);
        let mut queue = queue(&mut driver);
        let id = driver.submit(
            0,
            &[
                Buffer::Out(b"hel"),
                Buffer::Out(b"lo"),
                Buffer::In(2),
                Buffer::In(4),
            ],
        );
        let mut chain = Chain::default();
        assert!(queue.pop(&mut chain));
        assert_eq!((chain.readable_length(), chain.writable_length()), (5, 6));
        let mut bytes = [0; 3];
        chain.read(queue.memory(), 1, &mut bytes).unwrap();
        assert_eq!(&bytes, b"ell");
        chain.write(queue.memory(), 1, b"wor").unwrap();
        let mut list = Iovecs::default();
        chain.writable_iovecs(queue.memory(), 1, 4, &mut list).unwrap();
        assert_eq!(
            list.as_slice().iter().map(|v| v.iov_len).collect::<Vec<_>>(),
            [1, 3]
        );
        assert_eq!(
            chain.write(queue.memory(), 4, b"abc"),
            Err(TooShort {
                offset: 4,
                wanted: 3,
                length: 6
            })
        );
        assert!(chain.read(queue.memory(), usize::MAX, &mut bytes).is_err());
        queue.push(chain.head(), 4);
        assert_eq!(driver.interrupt.status(), 0);
        queue.interrupt();
        assert_eq!(
            (driver.line.read().unwrap(), driver.interrupt.status()),
            (1, Interrupt::USED)
        );
        queue.interrupt();
        assert!(driver.line.read().is_err(), "one interrupt per used chain");
        assert!(!queue.pop(&mut chain));
        assert_eq!(driver.wait(0, id), [0, b'w', b'o', b'r']);
    }

    #[test]
    fn chains_given_back_together_appear_together_and_count_together() {
        let mut driver = Driver::new(&[16]);
        let mut queue = queue(&mut driver);
        let mut chain = Chain::default();
        // Over the ring's end, which is where arithmetic goes wrong.
        for round in 0..7_usize {
            let ids = [3, 4, 5].map(|length| driver.submit(0, &[Buffer::In(length)]));
            let mut used = Vec::new();
            for place in 0..3 {
                assert!(queue.pop(&mut chain));
                chain.write(queue.memory(), 0, &[round as u8; 3]).unwrap();
                used.push((chain.head(), place + 1));
            }
            queue.push_all(&used);
            queue.interrupt();
            assert_eq!(driver.line.read().unwrap(), 1, "one interrupt for the three");
            for (place, id) in ids.into_iter().enumerate() {
                assert_eq!(driver.poll(0, id).unwrap(), vec![round as u8; place + 1]);
            }
        }
        queue.push_all(&[]);
        queue.interrupt();
        assert!(driver.line.read().is_err());
    }

    #[test]
    fn a_driver_that_looked_in_between_is_not_interrupted_for_what_it_has_seen() {
        let mut driver = Driver::new(&[16]);
        let mut queue = queue(&mut driver);
        let mut chain = Chain::default();
        let mut give_back = |driver: &mut Driver| {
            let id = driver.submit(0, &[Buffer::In(1)]);
            assert!(queue.pop(&mut chain));
            queue.push(chain.head(), 1);
            queue.interrupt();
            (id, driver.line.read().is_ok())
        };
        assert!(give_back(&mut driver).1);
        assert!(!give_back(&mut driver).1, "it has not asked again");
        let (id, interrupted) = give_back(&mut driver);
        assert!(!interrupted);
        driver.wait(0, id);
        assert!(give_back(&mut driver).1, "it has asked for the next");
    }

    #[test]
    fn a_driver_without_event_indices_suppresses_interrupts_by_flag() {
        let mut driver = Driver::new(&[16]);
        let [mut queue] = DeviceQueue::take(driver.activation(0), "test", &Arc::default()).unwrap();
        let flags = GuestAddress(queue.queue.avail_ring());
        let mut chain = Chain::default();
        for (flag, expected) in [(0_u16, true), (1, false), (0, true)] {
            driver.memory.write_obj(flag, flags).unwrap();
            driver.submit(0, &[Buffer::In(1)]);
            assert!(queue.pop(&mut chain));
            queue.push(chain.head(), 1);
            queue.interrupt();
            assert_eq!(driver.line.read().is_ok(), expected, "flags {flag}");
        }
    }

    #[test]
    fn an_unpopped_chain_comes_again() {
        let mut driver = Driver::new(&[16]);
        let mut queue = queue(&mut driver);
        driver.submit(0, &[Buffer::Out(b"x")]);
        let mut chain = Chain::default();
        assert!(queue.pop(&mut chain));
        queue.unpop();
        assert!(queue.rearm());
        assert!(queue.pop(&mut chain));
        assert!(!queue.rearm());
    }

    #[test]
    fn a_buffer_in_memory_that_is_not_plugged_stops_the_queue() {
        let mut driver = Driver::new(&[16]);
        let (memory, pluggable) = crate::pluggable::reserve(&driver.memory, 128).unwrap();
        let buffer = Descriptor {
            address: pluggable.range().guest,
            length: 4096,
            flags: WRITE,
            next: 0,
        };
        driver.memory = memory;
        driver.pluggable = Some(pluggable.clone());
        driver.write_descriptors(0, &[buffer]);
        driver.offer(0, 0);
        let mut closed = queue(&mut driver);
        assert!(!closed.pop(&mut Chain::default()) && closed.is_stopped());
        pluggable.open(0).unwrap();
        assert!(queue(&mut driver).pop(&mut Chain::default()));
    }

    #[test]
    fn memory_that_a_device_has_in_hand_stays() {
        let mut driver = Driver::new(&[16]);
        let (memory, pluggable) = crate::pluggable::reserve(&driver.memory, 256).unwrap();
        pluggable.open(0).unwrap();
        pluggable.open(1).unwrap();
        driver.memory = memory;
        driver.pluggable = Some(pluggable.clone());
        let start = pluggable.range().guest;
        driver.move_rings(0, start);
        let mut queue = queue(&mut driver);
        let buffer = Descriptor {
            address: start + crate::pluggable::GRANULE,
            length: 4096,
            flags: WRITE,
            next: 0,
        };
        driver.write_descriptors(0, &[buffer]);
        let mut chain = Chain::default();
        let offer_and_take = |driver: &mut Driver, queue: &mut DeviceQueue, chain: &mut Chain| {
            driver.offer(0, 0);
            assert!(queue.pop(chain));
            assert!(!pluggable.close(1).unwrap(), "the chain's buffer");
            chain.write(queue.memory(), 0, &[1; 4096]).unwrap();
        };
        offer_and_take(&mut driver, &mut queue, &mut chain);
        queue.push(chain.head(), 4096);
        assert!(pluggable.close(1).unwrap());
        pluggable.open(1).unwrap();
        offer_and_take(&mut driver, &mut queue, &mut chain);
        queue.unpop();
        assert!(pluggable.close(1).unwrap());
        assert!(!pluggable.close(0).unwrap(), "the rings");
        drop(queue);
        assert!(pluggable.close(0).unwrap());
    }

    #[test]
    fn a_chain_that_the_device_has_cannot_be_offered_again() {
        let mut driver = Driver::new(&[16]);
        let mut queue = queue(&mut driver);
        let id = driver.submit(0, &[Buffer::Out(b"x")]);
        driver.offer(0, id);
        assert!(queue.pop(&mut Chain::default()));
        assert!(!queue.pop(&mut Chain::default()));
        assert!(queue.is_stopped());
    }

    #[test]
    fn every_kind_of_broken_chain_stops_the_queue() {
        let good = Descriptor {
            address: Driver::DATA,
            length: 16,
            flags: 0,
            next: 0,
        };
        assert_eq!(verdict(&[good]), (true, 0));
        assert_eq!(
            verdict(&[Descriptor { length: 0, ..good }]),
            (true, 0),
            "an empty buffer is harmless"
        );
        for (name, chain) in [
            (
                "index past the table",
                vec![Descriptor {
                    flags: NEXT,
                    next: 16,
                    ..good
                }],
            ),
            (
                "loop to itself",
                vec![Descriptor {
                    flags: NEXT,
                    next: 0,
                    ..good
                }],
            ),
            (
                "outside of memory",
                vec![Descriptor {
                    address: 1 << 40,
                    ..good
                }],
            ),
            (
                "runs over the end of memory",
                vec![Descriptor {
                    address: Driver::MEMORY - 8,
                    ..good
                }],
            ),
            (
                "address overflow",
                vec![Descriptor {
                    address: u64::MAX - 4,
                    ..good
                }],
            ),
            (
                "longer than memory",
                vec![Descriptor {
                    length: u32::MAX,
                    ..good
                }],
            ),
            (
                "readable after writable",
                vec![
                    Descriptor {
                        flags: WRITE | NEXT,
                        next: 1,
                        ..good
                    },
                    Descriptor { flags: 0, ..good },
                ],
            ),
            (
                "indirect table of odd length",
                vec![Descriptor {
                    flags: INDIRECT,
                    length: 17,
                    ..good
                }],
            ),
            (
                "indirect table outside of memory",
                vec![Descriptor {
                    flags: INDIRECT,
                    address: 1 << 40,
                    ..good
                }],
            ),
        ] {
            assert_eq!(verdict(&chain), (false, 1), "{name}");
        }
    }

    #[test]
    fn an_indirect_table_is_followed_once_and_its_length_is_bounded() {
        let mut driver = Driver::new(&[16]);
        let table = Driver::DATA + 0x1000;
        let entry = Descriptor {
            address: Driver::DATA,
            length: 8,
            flags: NEXT,
            next: 1,
        };
        let last = Descriptor {
            flags: WRITE,
            next: 0,
            ..entry
        };
        let top = Descriptor {
            address: table,
            length: 32,
            flags: INDIRECT,
            next: 0,
        };
        driver.write_table(table, &[entry, last]);
        driver.write_descriptors(0, &[top]);
        driver.offer(0, 0);
        let mut first = queue(&mut driver);
        let mut chain = Chain::default();
        assert!(first.pop(&mut chain));
        assert_eq!((chain.readable_length(), chain.writable_length()), (8, 8));

        let long: Vec<_> = (0..2048).map(|i| Descriptor { next: i + 1, ..entry }).collect();
        driver.write_table(table, &long);
        driver.write_descriptors(
            0,
            &[Descriptor {
                length: 2048 * 16,
                ..top
            }],
        );
        let mut second = queue(&mut driver);
        assert!(!second.pop(&mut chain) && second.is_stopped());

        driver.write_table(
            table,
            &[Descriptor {
                flags: INDIRECT,
                ..top
            }],
        );
        let mut third = queue(&mut driver);
        assert!(!third.pop(&mut chain) && third.is_stopped());
    }

    #[test]
    fn an_available_index_that_runs_away_stops_the_queue() {
        let mut driver = Driver::new(&[16]);
        let mut queue = queue(&mut driver);
        driver.set_available_index(0, 17);
        assert!(!queue.pop(&mut Chain::default()));
        assert!(queue.is_stopped());
        driver.set_available_index(0, 1);
        assert!(!queue.pop(&mut Chain::default()), "it stays stopped");
    }

    #[test]
    fn another_number_of_queues_is_refused() {
        let mut driver = Driver::new(&[16, 16]);
        let error = DeviceQueue::take::<1>(driver.activation(0), "test", &Arc::default())
            .err()
            .unwrap();
        assert!(
            matches!(
                error,
                ActivateError::Queues {
                    expected: 1,
                    found: 2
                }
            ),
            "{error}"
        );
    }
}
