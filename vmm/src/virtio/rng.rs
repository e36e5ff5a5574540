//! virtio-rng (specification section 5.4): entropy from the host's generator.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::counter;
use super::queue::{Chain, DeviceQueue, Violations};
use super::worker::{Workers, serve};
use super::{ActivateError, Activation, Device, DeviceType};
use crate::memory::GuestMemory;

const QUEUE_SIZES: &[u16] = &[16];
/// The most bytes one request gets. The driver asks again for more (the specification allows short answers).
const MAX_REQUEST: usize = 4096;

/// The device. It has no state but its counters.
#[derive(Default)]
pub struct Rng {
    bytes: Arc<AtomicU64>,
    violations: Arc<Violations>,
    workers: Workers,
}

impl Rng {
    /// A device that draws from getrandom(2).
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

impl Device for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::Entropy
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut queues: [DeviceQueue; 1] = DeviceQueue::take(activation, "rng", &self.violations)?;
        self.workers = Workers::new()?;
        let poller = self.workers.poller()?;
        poller.add_event(queues[0].notify(), 0)?;
        let bytes = self.bytes.clone();
        self.workers.spawn("rng", move || {
            serve(&poller, &mut queues, |_, memory, chain| {
                let written = fill(memory, chain);
                bytes.fetch_add(written as u64, Ordering::Relaxed);
                written
            });
        })?;
        Ok(())
    }

    fn reset(&mut self) {
        self.workers.stop();
    }

    fn counters(&self) -> Vec<(String, u64)> {
        counter::report([("bytes", &self.bytes)], &self.violations)
    }
}

/// Fills a request; how many bytes it got.
fn fill(memory: &GuestMemory, chain: &Chain) -> usize {
    let mut bytes = [0; MAX_REQUEST];
    let wanted = chain.writable_length().min(MAX_REQUEST);
    let got =
        rustix::rand::getrandom(&mut bytes[..wanted], rustix::rand::GetRandomFlags::empty()).unwrap_or(0);
    match chain.write(memory, 0, &bytes[..got]) {
        Ok(()) => got,
        Err(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::test_driver::{Buffer, Driver};

    #[test]
    fn requests_are_filled_with_different_bytes_up_to_the_limit() {
        let mut device = Rng::new();
        let mut driver = Driver::activate(&mut device);
        let mut ask = |buffers: &[Buffer<'_>]| {
            let id = driver.submit(0, buffers);
            driver.wait(0, id)
        };
        let first = ask(&[Buffer::In(32), Buffer::In(32)]);
        let second = ask(&[Buffer::In(64)]);
        assert_eq!((first.len(), second.len()), (64, 64));
        assert_ne!(first, second);
        assert_ne!(first[..32], first[32..]);
        assert_eq!(ask(&[Buffer::In(10_000)]).len(), MAX_REQUEST);
        assert_eq!(ask(&[Buffer::Out(b"nothing to fill")]).len(), 0);
        assert_eq!(device.counters()[0].1, 64 + 64 + MAX_REQUEST as u64);
    }

    #[test]
    fn a_broken_queue_is_ignored_until_reset() {
        let mut device = Rng::new();
        let mut driver = Driver::activate(&mut device);
        driver.set_available_index(0, 1000);
        driver.kick(0);
        while device.violations.count() == 0 {
            std::thread::yield_now();
        }
        device.reset();
        let mut driver = Driver::activate(&mut device);
        let id = driver.submit(0, &[Buffer::In(8)]);
        assert_eq!(driver.wait(0, id).len(), 8);
    }
}
