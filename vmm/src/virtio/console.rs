//! virtio-console (specification section 5.3): one port, output only, for diagnosis.
//!
//! The last lines stay in a ring that errors and metrics quote; a kernel panic is noticed in passing.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::counter;
use super::queue::{Chain, DeviceQueue, Violations};
use super::worker::{Workers, serve};
use super::{ActivateError, Activation, Device, DeviceType};
use crate::memory::GuestMemory;

const QUEUE_SIZES: &[u16] = &[16, 64];
/// The queue of the guest's output; the other one would carry input.
const TRANSMIT: usize = 1;
/// How much of the output is remembered.
const RING_SIZE: usize = 16 * 1024;
/// The most that one request may print; a driver prints lines or pages.
const MAX_REQUEST: usize = 64 * 1024;
/// How much is written to the log file at most: a guest must not fill the host's disk.
const MAX_LOG: u64 = 64 << 20;
/// What a kernel prints when it gives up (Linux `kernel/panic.c`). Its first byte occurs only once in it.
const PANIC: &[u8] = b"Kernel panic - not syncing";

/// The device.
pub struct Console {
    output: Arc<Output>,
    log: Option<Arc<File>>,
    violations: Arc<Violations>,
    workers: Workers,
}

/// The console's output, for the rest of the VMM.
#[derive(Clone)]
pub struct ConsoleHandle(Arc<Output>);

#[derive(Default)]
struct Output {
    ring: Mutex<Ring>,
    panicked: AtomicBool,
    bytes: AtomicU64,
}

#[derive(Default)]
struct Ring {
    bytes: VecDeque<u8>,
    /// How many bytes of [`PANIC`] the output ends with.
    matched: usize,
}

impl Console {
    /// A device that also writes its output to `log`, if given.
    #[must_use]
    pub fn new(log: Option<File>) -> (Self, ConsoleHandle) {
        let output = Arc::<Output>::default();
        let handle = ConsoleHandle(output.clone());
        let log = log.map(Arc::new);
        (
            Self {
                output,
                log,
                violations: Arc::default(),
                workers: Workers::default(),
            },
            handle,
        )
    }
}

impl ConsoleHandle {
    /// The last lines, oldest first, at most 16 KiB. Untrusted text.
    #[must_use]
    pub fn lines(&self) -> String {
        let ring = self.0.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = ring.bytes.iter().copied().collect();
        let full = bytes.len() == RING_SIZE;
        // What the ring has cut through is not a line.
        let start = if full {
            bytes.iter().position(|&b| b == b'\n').map_or(0, |at| at + 1)
        } else {
            0
        };
        let mut text = String::from_utf8_lossy(&bytes[start..]).into_owned();
        // Each byte that is not UTF-8 has become three.
        while text.len() > RING_SIZE {
            let excess = text.len() - RING_SIZE;
            let cut = (excess..=text.len())
                .find(|&at| text.is_char_boundary(at))
                .unwrap_or(text.len());
            text.drain(..cut);
        }
        text
    }

    /// Adds what the guest said elsewhere: its early messages, before there is a driver.
    pub fn append(&self, bytes: &[u8]) {
        self.0.append(bytes);
    }

    /// Whether the guest has printed that its kernel panicked. A guest may also lie.
    #[must_use]
    pub fn panicked(&self) -> bool {
        self.0.panicked.load(Ordering::Acquire)
    }
}

impl Output {
    fn append(&self, bytes: &[u8]) {
        self.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        for &byte in bytes {
            ring.matched = if byte == PANIC[ring.matched] {
                ring.matched + 1
            } else {
                usize::from(byte == PANIC[0])
            };
            if ring.matched == PANIC.len() {
                ring.matched = 0;
                self.panicked.store(true, Ordering::Release);
            }
        }
        let tail = &bytes[bytes.len().saturating_sub(RING_SIZE)..];
        let excess = (ring.bytes.len() + tail.len()).saturating_sub(RING_SIZE);
        ring.bytes.drain(..excess);
        ring.bytes.extend(tail);
    }

    /// Takes one request, and writes it to `log` as long as `room` lasts.
    fn print(&self, memory: &GuestMemory, chain: &Chain, log: Option<&File>, room: &mut u64) {
        let mut bytes = vec![0; chain.readable_length().min(MAX_REQUEST)];
        if chain.read(memory, 0, &mut bytes).is_err() {
            return;
        }
        self.append(&bytes);
        if let Some(mut file) = log {
            let part = &bytes[..bytes.len().min(usize::try_from(*room).unwrap_or(usize::MAX))];
            *room -= part.len() as u64;
            // The log is for diagnosis: a full disk must not harm the guest.
            let _ = file.write_all(part);
        }
    }
}

impl Device for Console {
    fn device_type(&self) -> DeviceType {
        DeviceType::Console
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        // Size, ports and emergency write are features that are not offered.
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let [_input, output]: [DeviceQueue; 2] = DeviceQueue::take(activation, "console", &self.violations)?;
        self.workers = Workers::new()?;
        let poller = self.workers.poller()?;
        poller.add_event(output.notify(), TRANSMIT as u64)?;
        let (shared, log, mut room) = (self.output.clone(), self.log.clone(), MAX_LOG);
        let mut queues = [output];
        self.workers.spawn("console", move || {
            serve(&poller, &mut queues, |_, memory, chain| {
                shared.print(memory, chain, log.as_deref(), &mut room);
                0
            });
        })?;
        Ok(())
    }

    fn reset(&mut self) {
        self.workers.stop();
    }

    fn counters(&self) -> Vec<(String, u64)> {
        counter::report([("bytes", &self.output.bytes)], &self.violations)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::test_driver::{Buffer, Driver};
    use std::io::{Read, Seek};

    fn print(driver: &mut Driver, text: &[u8]) {
        let id = driver.submit(TRANSMIT, &[Buffer::Out(text)]);
        driver.wait(TRANSMIT, id);
    }

    #[test]
    fn output_lands_in_ring_and_log() {
        let mut log = tempfile::tempfile().unwrap();
        let (mut device, handle) = Console::new(Some(log.try_clone().unwrap()));
        let mut driver = Driver::activate(&mut device);
        print(&mut driver, b"Linux version 6.12\n");
        print(&mut driver, b"\xff odd\n");
        assert_eq!(handle.lines(), "Linux version 6.12\n\u{fffd} odd\n");
        assert!(!handle.panicked());
        let mut logged = Vec::new();
        log.rewind().unwrap();
        log.read_to_end(&mut logged).unwrap();
        assert_eq!(logged, b"Linux version 6.12\n\xff odd\n");
    }

    #[test]
    fn a_panic_is_noticed_even_when_it_comes_in_pieces() {
        let (mut device, handle) = Console::new(None);
        let mut driver = Driver::activate(&mut device);
        print(&mut driver, b"Kernel panic - not syn");
        print(&mut driver, b"apse\nKKernel panic");
        assert!(!handle.panicked());
        print(&mut driver, b" - not syncing: Attempted to kill init!\n");
        assert!(handle.panicked());
    }

    #[test]
    fn the_ring_holds_the_last_whole_lines_and_never_more_than_its_size() {
        let (device, handle) = Console::new(None);
        for line in 0..10_000 {
            device.output.append(format!("line {line}\n").as_bytes());
        }
        let lines = handle.lines();
        assert!(lines.len() <= RING_SIZE && lines.len() > RING_SIZE - 32);
        assert!(lines.starts_with("line ") && lines.ends_with("line 9999\n"));
        device.output.append(&vec![0xff; 3 * RING_SIZE]);
        assert!(handle.lines().len() <= RING_SIZE);
    }
}
