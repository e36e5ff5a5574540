//! The virtio-over-MMIO transport (Virtual I/O Device specification 1.3, section 4.2): registers, status
//! machine, feature negotiation and queue set-up.
//!
//! What the driver reads lies in a page that KVM shows to it ([`registers`](super::registers)); what it writes comes
//! here, but for notifications and most acknowledgements.
//!
//! The driver is not trusted. What it does out of turn is ignored and counted; what it sets up wrongly makes
//! the device say `DEVICE_NEEDS_RESET`. Queue contents are the devices' business.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory as _};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::registers::CONFIG_SIZE;
use super::{Activation, ActiveQueue, Device, Interrupt};
use crate::bus::MmioDevice;
use crate::memory::GuestMemory;
use crate::pluggable::{Hold, Pluggable};

/// Registers (section 4.2.2). Those with `_LOW` have their upper half four bytes further.
pub mod register {
    /// "virt".
    pub const MAGIC_VALUE: u64 = 0x000;
    /// 2.
    pub const VERSION: u64 = 0x004;
    /// [`DeviceType`](crate::virtio::DeviceType).
    pub const DEVICE_ID: u64 = 0x008;
    /// Who made the device.
    pub const VENDOR_ID: u64 = 0x00c;
    /// Offered feature bits of the selected half.
    pub const DEVICE_FEATURES: u64 = 0x010;
    /// Selects the half.
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    /// Accepted feature bits of the selected half.
    pub const DRIVER_FEATURES: u64 = 0x020;
    /// Selects the half.
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    /// Selects the queue.
    pub const QUEUE_SEL: u64 = 0x030;
    /// Largest size of the selected queue.
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    /// Its size.
    pub const QUEUE_SIZE: u64 = 0x038;
    /// Whether it is in use.
    pub const QUEUE_READY: u64 = 0x044;
    /// "There are buffers", with the queue's index. KVM answers it, not this module.
    pub const QUEUE_NOTIFY: u64 = 0x050;
    /// Why the interrupt was raised.
    pub const INTERRUPT_STATUS: u64 = 0x060;
    /// Clears bits of it.
    pub const INTERRUPT_ACK: u64 = 0x064;
    /// Device status.
    pub const STATUS: u64 = 0x070;
    /// Descriptor table.
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    /// Upper half.
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    /// Available ring.
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    /// Upper half.
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    /// Used ring.
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    /// Upper half.
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    /// First register that describes a shared memory region; this transport has none.
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    /// Last of them.
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    /// Changes with the configuration space.
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    /// Device-specific configuration space.
    pub const CONFIG: u64 = 0x100;
}

/// Device status bits (section 2.1).
pub mod status {
    /// The driver has seen the device.
    pub const ACKNOWLEDGE: u32 = 1;
    /// The driver knows how to drive it.
    pub const DRIVER: u32 = 2;
    /// The driver drives it.
    pub const DRIVER_OK: u32 = 4;
    /// Features are agreed.
    pub const FEATURES_OK: u32 = 8;
    /// The device cannot go on.
    pub const DEVICE_NEEDS_RESET: u32 = 64;
    /// The driver has given up.
    pub const FAILED: u32 = 128;
}

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const TRANSPORT_VERSION: u32 = 2;
/// "kata", as a number nobody else uses.
const VENDOR: u32 = u32::from_le_bytes(*b"kata");
/// `VIRTIO_F_VERSION_1`, the only feature of the transport itself (section 6).
const VERSION_1: u64 = 1 << 32;

/// One device behind the transport.
pub struct Mmio {
    name: String,
    interrupt: Interrupt,
    /// One per queue, signalled by KVM.
    notify: Vec<EventFd>,
    /// Accesses that the specification forbids.
    refused: AtomicU64,
    inner: Mutex<Inner>,
}

struct Inner {
    device: Box<dyn Device>,
    memory: GuestMemory,
    pluggable: Option<Arc<Pluggable>>,
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueSetup>,
    active: bool,
}

/// What the driver has written about one queue.
#[derive(Clone, Copy, Debug)]
struct QueueSetup {
    max_size: u16,
    size: u32,
    ready: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

impl Mmio {
    /// Puts `device` behind registers. `name` is for reports; `interrupt` leads to the device's pin.
    ///
    /// # Errors
    /// What eventfd(2) reports.
    pub fn new(
        name: String,
        device: Box<dyn Device>,
        memory: GuestMemory,
        pluggable: Option<Arc<Pluggable>>,
        interrupt: Interrupt,
    ) -> io::Result<Self> {
        let notify = device
            .queue_sizes()
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK))
            .collect::<io::Result<Vec<_>>>()?;
        let mut inner = Inner {
            device,
            memory,
            pluggable,
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues: Vec::new(),
            active: false,
        };
        inner.reset();
        let page = interrupt.page();
        page.set(register::MAGIC_VALUE, MAGIC);
        page.set(register::VERSION, TRANSPORT_VERSION);
        page.set(register::DEVICE_ID, inner.device.device_type() as u32);
        page.set(register::VENDOR_ID, VENDOR);
        // A region that does not exist has length and address -1 (section 4.2.2).
        for offset in (register::SHM_LEN_LOW..=register::SHM_BASE_HIGH).step_by(4) {
            page.set(offset, u32::MAX);
        }
        let mmio = Self {
            name,
            interrupt,
            notify,
            refused: AtomicU64::new(0),
            inner: Mutex::new(inner),
        };
        let inner = mmio.lock();
        mmio.show(&inner);
        mmio.show_config(&inner);
        drop(inner);
        Ok(mmio)
    }

    /// The device's name in reports.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How the device interrupts its driver.
    #[must_use]
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// The events that KVM shall signal when the driver writes the queue's index to `QueueNotify`.
    #[must_use]
    pub fn notify_events(&self) -> &[EventFd] {
        &self.notify
    }

    /// The device's counters and the transport's own.
    #[must_use]
    pub fn counters(&self) -> Vec<(String, u64)> {
        let mut counters = self.lock().device.counters();
        counters.push((
            "refused_accesses".to_owned(),
            self.refused.load(Ordering::Relaxed),
        ));
        counters
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refuse(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    /// Puts the registers that a write may have changed where the driver reads them.
    fn show(&self, inner: &Inner) {
        let page = self.interrupt.page();
        for offset in [
            register::DEVICE_FEATURES,
            register::QUEUE_SIZE_MAX,
            register::QUEUE_READY,
            register::STATUS,
        ] {
            page.set(offset, inner.read(offset));
        }
    }

    /// Puts the configuration space where the driver reads it. Whether it is not what was there.
    fn show_config(&self, inner: &Inner) -> bool {
        let page = self.interrupt.page();
        loop {
            let generation = page.generation();
            let mut space = [0; CONFIG_SIZE];
            inner.device.read_config(0, &mut space);
            // A device may change it meanwhile, and that must stand.
            if let Some(changed) = page.replace_config(generation, &space) {
                return changed;
            }
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        let accepted = match offset {
            register::INTERRUPT_ACK => {
                self.interrupt.acknowledge(value);
                true
            }
            register::STATUS => self.write_status(value),
            // A queue that does not exist, or KVM would have taken it.
            register::QUEUE_NOTIFY => false,
            _ => {
                let mut inner = self.lock();
                let accepted = inner.write(offset, value);
                self.show(&inner);
                accepted
            }
        };
        if !accepted {
            self.refuse();
        }
    }

    fn write_status(&self, value: u32) -> bool {
        let mut inner = self.lock();
        let accepted = self.move_status(&mut inner, value);
        let changed = self.show_config(&inner);
        self.show(&inner);
        let needs_reset = inner.status & status::DEVICE_NEEDS_RESET != 0;
        drop(inner);
        // Devices do not interrupt before they are activated, but the driver has looked already.
        if needs_reset && !accepted || changed && value & status::DRIVER_OK != 0 {
            self.interrupt.config_changed(|_| ());
        }
        accepted
    }

    /// The driver moves through section 3.1.1 one bit at a time, or resets.
    fn move_status(&self, inner: &mut Inner, value: u32) -> bool {
        if value == 0 {
            inner.reset();
            self.interrupt.acknowledge(u32::MAX);
            return true;
        }
        let current = inner.status & !status::DEVICE_NEEDS_RESET;
        let wanted = value & !status::DEVICE_NEEDS_RESET;
        if wanted & current != current {
            return false;
        }
        match wanted & !current {
            0 => {}
            status::ACKNOWLEDGE if current == 0 => inner.status |= status::ACKNOWLEDGE,
            status::DRIVER if current == status::ACKNOWLEDGE => inner.status |= status::DRIVER,
            status::FEATURES_OK if current == status::ACKNOWLEDGE | status::DRIVER => {
                // Not setting the bit is how a device refuses (section 3.1.1, step 5).
                if !inner.accepts_features() {
                    return false;
                }
                inner.status |= status::FEATURES_OK;
            }
            status::DRIVER_OK if current == status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK => {
                inner.status |= status::DRIVER_OK;
                if !inner.activate(&self.interrupt, &self.notify) {
                    inner.status |= status::DEVICE_NEEDS_RESET;
                    return false;
                }
            }
            status::FAILED => inner.status |= status::FAILED,
            _ => return false,
        }
        true
    }
}

impl MmioDevice for Mmio {
    /// What the driver finds without this module's help: KVM shows it the page.
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.interrupt.page().read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            let mut inner = self.lock();
            if inner.status & (status::DRIVER | status::FAILED) == status::DRIVER {
                inner.device.write_config(offset, data);
                self.show_config(&inner);
            } else {
                self.refuse();
            }
        } else if let (Ok(bytes), true) = (<[u8; 4]>::try_from(data), offset.is_multiple_of(4)) {
            self.write_register(offset, u32::from_le_bytes(bytes));
        } else {
            self.refuse();
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.reset();
    }
}

impl Inner {
    fn reset(&mut self) {
        if self.active {
            self.device.reset();
            self.active = false;
        }
        self.status = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        self.queues = self
            .device
            .queue_sizes()
            .iter()
            .map(|&max_size| QueueSetup {
                max_size,
                size: 0,
                ready: false,
                descriptors: 0,
                driver: 0,
                device: 0,
            })
            .collect();
    }

    fn offered(&self) -> u64 {
        self.device.features() | VERSION_1
    }

    fn accepts_features(&self) -> bool {
        self.driver_features & !self.offered() == 0 && self.driver_features & VERSION_1 != 0
    }

    fn selected(&self) -> Option<&QueueSetup> {
        self.queues.get(self.queue_sel as usize)
    }

    fn read(&self, offset: u64) -> u32 {
        match offset {
            register::DEVICE_FEATURES => half(self.offered(), self.device_features_sel),
            register::QUEUE_SIZE_MAX => self.selected().map_or(0, |queue| u32::from(queue.max_size)),
            register::QUEUE_READY => self.selected().map_or(0, |queue| u32::from(queue.ready)),
            register::STATUS => self.status,
            _ => 0,
        }
    }

    /// Whether the driver may write this register now, and if so writes it.
    fn write(&mut self, offset: u64, value: u32) -> bool {
        const NEGOTIATING: u32 = status::ACKNOWLEDGE | status::DRIVER;
        const SETTING_UP: u32 = NEGOTIATING | status::FEATURES_OK;
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            register::QUEUE_SEL => self.queue_sel = value,
            register::DRIVER_FEATURES if self.status == NEGOTIATING => match self.driver_features_sel {
                0 => self.driver_features = self.driver_features & !0xffff_ffff | u64::from(value),
                1 => self.driver_features = self.driver_features & 0xffff_ffff | u64::from(value) << 32,
                _ => return value == 0,
            },
            _ if self.status == SETTING_UP => return self.write_queue(offset, value),
            _ => return false,
        }
        true
    }

    fn write_queue(&mut self, offset: u64, value: u32) -> bool {
        let Some(queue) = self.queues.get_mut(self.queue_sel as usize) else {
            return false;
        };
        if queue.ready && (offset, value) != (register::QUEUE_READY, 0) {
            return false;
        }
        match offset {
            register::QUEUE_SIZE => queue.size = value,
            register::QUEUE_READY if value == 1 => {
                if queue.checked(&self.memory, self.pluggable.as_ref()).is_none() {
                    return false;
                }
                queue.ready = true;
            }
            register::QUEUE_READY if value == 0 => queue.ready = false,
            register::QUEUE_DESC_LOW => set_half(&mut queue.descriptors, 0, value),
            register::QUEUE_DESC_HIGH => set_half(&mut queue.descriptors, 1, value),
            register::QUEUE_DRIVER_LOW => set_half(&mut queue.driver, 0, value),
            register::QUEUE_DRIVER_HIGH => set_half(&mut queue.driver, 1, value),
            register::QUEUE_DEVICE_LOW => set_half(&mut queue.device, 0, value),
            register::QUEUE_DEVICE_HIGH => set_half(&mut queue.device, 1, value),
            _ => return false,
        }
        true
    }

    /// Hands the queues to the device.
    fn activate(&mut self, interrupt: &Interrupt, notify: &[EventFd]) -> bool {
        // Queues after the first unused one would take its place in the device's eyes.
        let used = self.queues.iter().take_while(|queue| queue.ready).count();
        if self.queues[used..].iter().any(|queue| queue.ready) {
            return false;
        }
        let queues = self.queues[..used]
            .iter()
            .zip(notify)
            .map(|(setup, event)| {
                let (mut queue, rings) = setup.checked(&self.memory, self.pluggable.as_ref())?;
                queue.set_event_idx(self.driver_features & EVENT_IDX != 0);
                Some(ActiveQueue {
                    queue,
                    rings,
                    notify: event.try_clone().ok()?,
                })
            })
            .collect::<Option<Vec<_>>>();
        let Some(queues) = queues else { return false };
        let activation = Activation {
            memory: self.memory.clone(),
            pluggable: self.pluggable.clone(),
            features: self.driver_features,
            queues,
            interrupt: interrupt.clone(),
        };
        self.active = self.device.activate(activation).is_ok();
        self.active
    }
}

/// `VIRTIO_F_EVENT_IDX` (section 6).
const EVENT_IDX: u64 = 1 << 29;

impl QueueSetup {
    /// The queue, if size, alignment (section 2.7) and addresses are such that the device may use it, with what keeps
    /// its rings where they are.
    fn checked(
        &self,
        memory: &GuestMemory,
        pluggable: Option<&Arc<Pluggable>>,
    ) -> Option<(Queue, Vec<Hold>)> {
        let size = u16::try_from(self.size).ok()?;
        let bytes = u64::from(size);
        // Descriptors of 16 bytes; flags, index, 2-byte entries and event; flags, index, 8-byte entries and event.
        let areas = [
            (self.descriptors, 16 * bytes),
            (self.driver, 6 + 2 * bytes),
            (self.device, 6 + 8 * bytes),
        ];
        let mut rings = Vec::new();
        for (start, len) in areas {
            if start.checked_add(len).is_none() || !memory.check_range(GuestAddress(start), len as usize) {
                return None;
            }
            if let Some(pluggable) = pluggable {
                rings.extend(pluggable.hold(start, len).ok()?);
            }
        }
        let mut queue = Queue::new(self.max_size).ok()?;
        queue.try_set_size(size).ok()?;
        queue
            .try_set_desc_table_address(GuestAddress(self.descriptors))
            .ok()?;
        queue.try_set_avail_ring_address(GuestAddress(self.driver)).ok()?;
        queue.try_set_used_ring_address(GuestAddress(self.device)).ok()?;
        queue.set_ready(true);
        queue.is_valid(memory).then_some((queue, rings))
    }
}

fn half(value: u64, selector: u32) -> u32 {
    match selector {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(target: &mut u64, selector: u32, value: u32) {
    let shift = 32 * selector;
    *target = *target & !(0xffff_ffff << shift) | u64::from(value) << shift;
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
