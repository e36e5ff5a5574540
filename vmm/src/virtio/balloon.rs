//! virtio-balloon (specification section 5.5): memory that the guest does not need goes back to the host.
//!
//! Free page reporting is the everyday way: the guest names ranges that it has free, and gets them back as soon
//! as it touches them. The balloon proper takes memory away until its target is lowered or the guest is short.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Address, GuestAddress, GuestMemory as _};

use super::counter;
use super::queue::{Chain, DeviceQueue, Iovecs, Violations};
use super::worker::{Workers, serve};
use super::{ActivateError, Activation, Device, DeviceType, Interrupt};
use crate::memory::GuestMemory;

/// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`: the guest may take pages back when it is short of memory.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// `VIRTIO_BALLOON_F_REPORTING`: the guest reports free pages.
const F_REPORTING: u64 = 1 << 5;

/// Inflate, deflate, reporting. Queues of features that are not offered do not exist.
const QUEUE_SIZES: &[u16] = &[64, 64, 32];
const INFLATE: usize = 0;
const REPORTING: usize = 2;

/// The balloon counts in pages of this size, whatever the page size of host and guest (section 5.5.6).
const PAGE: u64 = 4096;
/// The most page numbers one request may hold; Linux sends 256.
const MAX_PAGES: usize = 4096;

/// What a snapshot must hold of the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// Pages that the guest shall give up (`num_pages`).
    pub target: u32,
    /// Pages that it has given up (`actual`), as it says.
    pub actual: u32,
}

/// What became of the guest's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonStats {
    /// MiB that the guest shall give up.
    pub target_mib: u32,
    /// MiB that it says it has given up.
    pub actual_mib: u32,
    /// Bytes given back to the host by inflation, since the start.
    pub inflated_bytes: u64,
    /// Bytes given back to the host by free page reporting, since the start.
    pub reported_bytes: u64,
}

#[derive(Default)]
struct Shared {
    target: AtomicU32,
    actual: AtomicU32,
    inflated: AtomicU64,
    reported: AtomicU64,
    /// While the device is active.
    interrupt: Mutex<Option<Interrupt>>,
}

/// The device.
pub struct Balloon {
    shared: Arc<Shared>,
    violations: Arc<Violations>,
    workers: Workers,
}

/// Steers the balloon from elsewhere in the VMM.
#[derive(Clone)]
pub struct BalloonHandle(Arc<Shared>);

impl Balloon {
    /// An empty balloon.
    #[must_use]
    pub fn new() -> (Self, BalloonHandle) {
        let shared = Arc::<Shared>::default();
        let handle = BalloonHandle(shared.clone());
        (
            Self {
                shared,
                violations: Arc::default(),
                workers: Workers::default(),
            },
            handle,
        )
    }

    /// What a snapshot must hold.
    #[must_use]
    pub fn state(&self) -> BalloonState {
        BalloonState {
            target: self.shared.target.load(Ordering::Relaxed),
            actual: self.shared.actual.load(Ordering::Relaxed),
        }
    }
}

impl BalloonHandle {
    /// Sets how much memory the guest shall give up, and tells it. The guest follows as far as it can.
    pub fn set_target_mib(&self, mib: u32) {
        let pages_per_mib = ((1 << 20) / PAGE) as u32;
        self.0
            .target
            .store(mib.saturating_mul(pages_per_mib), Ordering::Relaxed);
        if let Some(interrupt) = &*self.0.interrupt.lock().unwrap_or_else(PoisonError::into_inner) {
            interrupt.config_changed(|space| {
                space[..4].copy_from_slice(&self.0.target.load(Ordering::Relaxed).to_le_bytes());
            });
        }
    }

    /// What became of the guest's memory so far.
    #[must_use]
    pub fn stats(&self) -> BalloonStats {
        let mib = |pages: &AtomicU32| ((u64::from(pages.load(Ordering::Relaxed)) * PAGE) >> 20) as u32;
        BalloonStats {
            target_mib: mib(&self.0.target),
            actual_mib: mib(&self.0.actual),
            inflated_bytes: self.0.inflated.load(Ordering::Relaxed),
            reported_bytes: self.0.reported.load(Ordering::Relaxed),
        }
    }
}

impl Device for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | F_DEFLATE_ON_OOM | F_REPORTING
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; 8];
        space[..4].copy_from_slice(&self.shared.target.load(Ordering::Relaxed).to_le_bytes());
        space[4..].copy_from_slice(&self.shared.actual.load(Ordering::Relaxed).to_le_bytes());
        super::copy_config(&space, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (4, Ok(bytes)) = (offset, data.try_into()) {
            self.shared
                .actual
                .store(u32::from_le_bytes(bytes), Ordering::Relaxed);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let interrupt = activation.interrupt.clone();
        // A driver that does not report free pages does not set the last queue up.
        let reporting = activation.features & F_REPORTING != 0;
        let expected = if reporting { QUEUE_SIZES.len() } else { REPORTING };
        let mut queues = DeviceQueue::take_all(activation, "balloon", &self.violations);
        if queues.len() != expected {
            return Err(ActivateError::Queues {
                expected,
                found: queues.len(),
            });
        }
        self.workers = Workers::new()?;
        let poller = self.workers.poller()?;
        for (index, queue) in queues.iter().enumerate() {
            poller.add_event(queue.notify(), index as u64)?;
        }
        let shared = self.shared.clone();
        let mut iovecs = Iovecs::default();
        self.workers.spawn("balloon", move || {
            serve(&poller, &mut queues, |index, memory, chain| {
                match index {
                    INFLATE => shared.inflate(memory, chain),
                    REPORTING => shared.report(memory, chain, &mut iovecs),
                    // Deflation: the guest touches the pages, and the host's kernel fills them in.
                    _ => {}
                }
                0
            });
        })?;
        *self
            .shared
            .interrupt
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(interrupt);
        Ok(())
    }

    fn reset(&mut self) {
        self.workers.stop();
        *self
            .shared
            .interrupt
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = None;
        self.shared.actual.store(0, Ordering::Relaxed);
    }

    fn counters(&self) -> Vec<(String, u64)> {
        let counted = [
            ("inflated_bytes", &self.shared.inflated),
            ("reported_bytes", &self.shared.reported),
        ];
        counter::report(counted, &self.violations)
    }
}

impl Shared {
    /// Gives pages back whose numbers the guest has listed.
    fn inflate(&self, memory: &GuestMemory, chain: &Chain) {
        let count = (chain.readable_length() / 4).min(MAX_PAGES);
        let mut bytes = vec![0; count * 4];
        if chain.read(memory, 0, &mut bytes).is_err() {
            return;
        }
        let mut numbers: Vec<u64> = bytes
            .chunks_exact(4)
            .map(|number| u64::from(u32::from_le_bytes([number[0], number[1], number[2], number[3]])))
            .collect();
        // Linux lists them in any order; one madvise(2) per run is much cheaper than one per page.
        numbers.sort_unstable();
        numbers.dedup();
        for run in numbers.chunk_by(|a, b| a + 1 == *b) {
            let address = GuestAddress(run[0] * PAGE);
            let length = run.len() * PAGE as usize;
            let discarded = discard_guest(memory, address, length);
            self.inflated.fetch_add(discarded, Ordering::Relaxed);
        }
    }

    /// Gives ranges back that the guest has free.
    fn report(&self, memory: &GuestMemory, chain: &Chain, iovecs: &mut Iovecs) {
        iovecs.clear();
        if chain
            .writable_iovecs(memory, 0, chain.writable_length(), iovecs)
            .is_ok()
        {
            for range in iovecs.as_slice() {
                self.reported
                    .fetch_add(discard(range.iov_base as usize, range.iov_len), Ordering::Relaxed);
            }
        }
    }
}

/// Gives a range of guest memory back, which may span a hole in it: how many bytes.
fn discard_guest(memory: &GuestMemory, address: GuestAddress, length: usize) -> u64 {
    match memory.get_slice(address, length) {
        Ok(slice) => discard(slice.ptr_guard_mut().as_ptr() as usize, length),
        Err(_) if length > PAGE as usize => {
            let half = (length / 2).next_multiple_of(PAGE as usize);
            let second = address.checked_add(half as u64).unwrap_or(address);
            discard_guest(memory, address, half) + discard_guest(memory, second, length - half)
        }
        Err(_) => 0,
    }
}

/// Gives the whole pages of a range of this process, which must lie in guest memory, back: how many bytes.
fn discard(start: usize, length: usize) -> u64 {
    let page = PAGE as usize;
    let first = start.next_multiple_of(page);
    let end = (start + length) / page * page;
    if end <= first {
        return 0;
    }
    // SAFETY: the range is guest memory (the callers' iovecs and slices are), which stays mapped while the device
    // runs, and whose bytes nothing in this process relies on.
    let result = unsafe { libc::madvise(first as *mut libc::c_void, end - first, libc::MADV_DONTNEED) };
    if result == 0 { (end - first) as u64 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::test_driver::{Buffer, Descriptor, Driver, WRITE};
    use vm_memory::Bytes;

    fn numbers(pages: &[u32]) -> Vec<u8> {
        pages.iter().flat_map(|page| page.to_le_bytes()).collect()
    }

    fn byte(driver: &Driver, page: u32) -> u8 {
        driver
            .memory
            .read_obj(GuestAddress(u64::from(page) * PAGE + 7))
            .unwrap()
    }

    fn fill(driver: &Driver, pages: std::ops::Range<u32>) {
        for page in pages {
            driver
                .memory
                .write_slice(&[0xaa; PAGE as usize], GuestAddress(u64::from(page) * PAGE))
                .unwrap();
        }
    }

    #[test]
    fn inflation_gives_back_exactly_the_listed_pages() {
        let (mut device, handle) = Balloon::new();
        let mut driver = Driver::activate(&mut device);
        let base = (Driver::DATA / PAGE) as u32;
        fill(&driver, base..base + 8);
        let outside = (Driver::MEMORY / PAGE) as u32;
        // Out of order, twice the same, and some that are not memory at all.
        let list = numbers(&[
            base + 5,
            base + 1,
            base + 2,
            base + 1,
            outside - 1,
            outside,
            u32::MAX,
        ]);
        let id = driver.submit(INFLATE, &[Buffer::Out(&list)]);
        driver.wait(INFLATE, id);
        let left: Vec<u8> = (base..base + 8).map(|page| byte(&driver, page)).collect();
        assert_eq!(left, [0xaa, 0, 0, 0xaa, 0xaa, 0, 0xaa, 0xaa]);
        assert_eq!(handle.stats().inflated_bytes, 4 * PAGE);
        let id = driver.submit(INFLATE, &[Buffer::Out(b"odd")]);
        driver.wait(INFLATE, id);
        assert_eq!(handle.stats().inflated_bytes, 4 * PAGE);
    }

    #[test]
    fn reporting_gives_back_whole_pages_within_the_range_only() {
        let (mut device, handle) = Balloon::new();
        let mut driver = Driver::new(device.queue_sizes());
        let base = (Driver::DATA / PAGE) as u32;
        fill(&driver, base..base + 4);
        let range = Descriptor {
            address: Driver::DATA + 100,
            length: 3 * PAGE as u32,
            flags: WRITE,
            next: 0,
        };
        driver.write_descriptors(REPORTING, &[range]);
        let features = device.features();
        device.activate(driver.activation(features)).unwrap();
        driver.offer(REPORTING, 0);
        driver.kick(REPORTING);
        while handle.stats().reported_bytes == 0 {
            std::thread::yield_now();
        }
        assert_eq!(handle.stats().reported_bytes, 2 * PAGE);
        let left: Vec<u8> = (base..base + 4).map(|page| byte(&driver, page)).collect();
        assert_eq!(left, [0xaa, 0, 0, 0xaa]);
    }

    #[test]
    fn a_driver_may_do_without_reporting() {
        let (mut device, handle) = Balloon::new();
        let mut driver = Driver::new(&QUEUE_SIZES[..2]);
        device.activate(driver.activation(0)).unwrap();
        let list = numbers(&[(Driver::DATA / PAGE) as u32]);
        let id = driver.submit(INFLATE, &[Buffer::Out(&list)]);
        driver.wait(INFLATE, id);
        assert_eq!(handle.stats().inflated_bytes, PAGE);
        device.reset();
        let error = device
            .activate(Driver::new(&QUEUE_SIZES[..2]).activation(F_REPORTING))
            .unwrap_err();
        assert!(
            matches!(
                error,
                ActivateError::Queues {
                    expected: 3,
                    found: 2
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn the_target_is_in_the_configuration_and_the_guest_is_told() {
        let (mut device, handle) = Balloon::new();
        handle.set_target_mib(1);
        let driver = Driver::activate(&mut device);
        assert_eq!(driver.interrupt.status(), 0);
        handle.set_target_mib(3);
        assert_eq!(driver.interrupt.status(), Interrupt::CONFIG);
        let mut bytes = [0xff; 12];
        device.read_config(0, &mut bytes);
        assert_eq!(bytes, [0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        device.write_config(0, &[9, 9, 9, 9]);
        device.write_config(4, &512u32.to_le_bytes());
        device.write_config(4, &[1]);
        assert_eq!((handle.stats().target_mib, handle.stats().actual_mib), (3, 2));
        assert_eq!(
            device.state(),
            BalloonState {
                target: 768,
                actual: 512
            }
        );
    }
}
