//! The contract between a virtio device and its transport (Virtual I/O Device specification 1.3).
//!
//! A device describes itself, answers its configuration space, and gets its queues when the driver sets
//! `DRIVER_OK`. The transport ([`mmio`]) owns registers, feature negotiation and queue set-up. Devices never
//! see registers; transports never look into queues.

pub mod mmio;

pub mod balloon;
pub mod block;
pub mod console;
mod counter;
pub mod fs;
pub mod memory;
pub mod net;
pub mod queue;
pub mod rate_limiter;
pub mod registers;
pub mod rng;
#[cfg(test)]
mod test_driver;
pub mod vsock;
pub mod worker;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use self::mmio::register;
use self::registers::Page;
use crate::memory::GuestMemory;
use crate::pluggable::{Hold, Pluggable};

/// Device types by number (specification section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum DeviceType {
    /// Section 5.1.
    Network = 1,
    /// Section 5.2.
    Block = 2,
    /// Section 5.3.
    Console = 3,
    /// Section 5.4.
    Entropy = 4,
    /// Section 5.5.
    Balloon = 5,
    /// Section 5.10.
    Vsock = 19,
    /// Section 5.15.
    Memory = 24,
    /// Section 5.11.
    FileSystem = 26,
}

/// A virtio device.
///
/// Implementations keep their state in a plain serde struct apart from threads and descriptors.
pub trait Device: Send {
    /// What the driver finds in `DeviceID`.
    fn device_type(&self) -> DeviceType;

    /// Largest size of each virtqueue; its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// Feature bits offered, without the transport's (`VIRTIO_F_VERSION_1` is added by the transport).
    fn features(&self) -> u64;

    /// Reads the device configuration space at `offset`. Bytes past its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the device configuration space. Writes to read-only or absent fields are ignored.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Takes the queues and begins to serve them. Called once between resets.
    ///
    /// # Errors
    /// When the device cannot serve what the driver set up; the transport then sets `DEVICE_NEEDS_RESET`.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops serving, finishes or drops what is in flight, and gives the queues up. After it the device can be
    /// activated again. Also called before the VM is dropped.
    fn reset(&mut self);

    /// Counters since creation, by name, for the metrics report.
    fn counters(&self) -> Vec<(String, u64)> {
        Vec::new()
    }
}

/// Reads `data.len()` bytes at `offset` of a configuration space. Bytes past its end read as zero.
fn copy_config(space: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let start = usize::try_from(offset).unwrap_or(usize::MAX).min(space.len());
    let length = data.len().min(space.len() - start);
    data[..length].copy_from_slice(&space[start..start + length]);
}

/// What a device gets at `DRIVER_OK`.
pub struct Activation {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The part of it that may not be there, if there is one.
    pub pluggable: Option<Arc<Pluggable>>,
    /// The feature bits that both sides agreed on.
    pub features: u64,
    /// The queues in order, each with the event that the driver's notification signals.
    pub queues: Vec<ActiveQueue>,
    /// How to interrupt the driver.
    pub interrupt: Interrupt,
}

/// A virtqueue that the driver has set up and the transport has validated.
pub struct ActiveQueue {
    /// The split virtqueue.
    pub queue: Queue,
    /// What keeps its rings where they are.
    pub rings: Vec<Hold>,
    /// Signalled by KVM (ioeventfd) when the driver writes `QueueNotify` for this queue.
    pub notify: EventFd,
}

/// Why a device could not be activated.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver set up another number of queues than the device has.
    #[error("the driver set up {found} queues, the device has {expected}")]
    Queues {
        /// How many the device has.
        expected: usize,
        /// How many were set up.
        found: usize,
    },
    /// The driver does without a feature that the device needs.
    #[error("the driver does not accept {0}, which the device needs")]
    Feature(&'static str),
    /// The host refused a thread, a descriptor or an io_uring.
    #[error("the host cannot start the device: {0}")]
    Host(#[from] std::io::Error),
}

/// Interrupts the driver (specification section 4.2.2, `InterruptStatus`).
#[derive(Clone)]
pub struct Interrupt {
    page: Page,
    line: Arc<EventFd>,
}

impl Interrupt {
    /// `InterruptStatus` bit 0: the device has used a buffer.
    pub const USED: u32 = 1;
    /// `InterruptStatus` bit 1: the configuration space has changed.
    pub const CONFIG: u32 = 2;

    /// An interrupt that raises `line`, an irqfd, and says why in the device's `page`.
    #[must_use]
    pub fn new(line: EventFd, page: Page) -> Self {
        Self {
            page,
            line: Arc::new(line),
        }
    }

    /// Where the driver reads status and configuration.
    #[must_use]
    pub fn page(&self) -> &Page {
        &self.page
    }

    /// Tells the driver that buffers were used.
    pub fn used(&self) {
        self.raise(Self::USED);
    }

    /// Lets `change` change the configuration space ([`Page::change_config`]) and tells the driver.
    pub fn config_changed(&self, change: impl FnOnce(&mut [u8])) {
        self.page.change_config(change);
        self.raise(Self::CONFIG);
    }

    /// The bits of `InterruptStatus`.
    #[must_use]
    pub fn status(&self) -> u32 {
        u32::from_le(self.page.word(register::INTERRUPT_STATUS).load(Ordering::Acquire))
    }

    /// The driver wrote `InterruptACK`.
    pub fn acknowledge(&self, bits: u32) {
        self.page
            .word(register::INTERRUPT_STATUS)
            .fetch_and(!bits.to_le(), Ordering::AcqRel);
    }

    /// `ConfigGeneration`.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.page.generation()
    }

    /// Raises the line once more if one of these causes is not acknowledged: for an interrupt controller that
    /// dropped the signal. [`Self::USED`] is not seen to be acknowledged, once it was raised.
    pub fn signal_if_pending(&self, causes: u32) {
        if self.status() & causes != 0 {
            let _ = self.line.write(1);
        }
    }

    fn raise(&self, bit: u32) {
        self.page
            .word(register::INTERRUPT_STATUS)
            .fetch_or(bit.to_le(), Ordering::AcqRel);
        // An eventfd write fails only when its 64-bit counter is full: the interrupt is pending then anyway.
        let _ = self.line.write(1);
    }
}
