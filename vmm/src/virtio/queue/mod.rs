//! A virtqueue as a device sees it: descriptor chains that have been checked once, as a copy.
//!
//! The driver is hostile. What it wrote into the rings is read once into host memory, checked there, and never
//! read again, so that it cannot change between check and use. A queue whose rings or chains break the
//! specification is ignored until the device is reset: nothing useful can come from it any more.
//! Ring arithmetic is virtio-queue's, but for chains that are given back together and the interrupt after them;
//! what requests mean is the devices'.

mod chain;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VRING_AVAIL_F_NO_INTERRUPT};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

pub use chain::{Chain, ChainError, Iovecs, MAX_SEGMENTS, Segment, TooShort};

use super::{ActivateError, Activation, ActiveQueue, Interrupt};
use crate::memory::GuestMemory;
use crate::pluggable::{Hold, Pluggable};

/// How many protocol violations are written to the log in the life of the process.
const MAX_COMPLAINTS: u32 = 16;

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
    /// The chain cannot be one.
    #[error(transparent)]
    Chain(#[from] ChainError),
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
            Some(Err(error)) => return self.stop(&error.into()),
        };
        let head = chain.head();
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
        if self.wants_interrupt() {
            self.interrupt.used();
        }
    }

    /// Whether the driver wants an interrupt for what was pushed since the last call. The caller sends it, and holds
    /// no lock then: the guest may run at once, on this processor.
    #[must_use]
    pub fn wants_interrupt(&mut self) -> bool {
        let pushed = std::mem::take(&mut self.unannounced);
        if self.stopped || pushed == 0 {
            return false;
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
                used.wrapping_sub(wish).wrapping_sub(1) < pushed
            }
            Ok(flags) => u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0,
            Err(error) => self.stop(&QueueError::Available(virtio_queue::Error::GuestMemory(error))),
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
mod tests;
