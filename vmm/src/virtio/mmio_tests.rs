use super::*;
use crate::virtio::registers::Page;
use crate::virtio::{ActivateError, DeviceType};
use std::sync::Arc;
use vm_memory::Bytes;

const EVENT_IDX_BIT: u32 = 1 << 29;
const READY_FOR_FEATURES: u32 = status::ACKNOWLEDGE | status::DRIVER;
const READY_FOR_QUEUES: u32 = READY_FOR_FEATURES | status::FEATURES_OK;
const RUNNING: u32 = READY_FOR_QUEUES | status::DRIVER_OK;

/// What the device under test saw.
#[derive(Default)]
struct Seen {
    activations: Vec<(u64, Vec<u16>)>,
    resets: u32,
    config_writes: Vec<(u64, Vec<u8>)>,
    refuse: bool,
    config: u8,
}

struct Probe(Arc<Mutex<Seen>>);

impl Device for Probe {
    fn device_type(&self) -> DeviceType {
        DeviceType::Entropy
    }
    fn queue_sizes(&self) -> &[u16] {
        &[256, 16]
    }
    fn features(&self) -> u64 {
        u64::from(EVENT_IDX_BIT) | 1 << 5
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        if offset == 0 {
            data[0] = self.0.lock().unwrap().config;
        }
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.0.lock().unwrap().config_writes.push((offset, data.to_vec()));
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut seen = self.0.lock().unwrap();
        if seen.refuse {
            return Err(ActivateError::Queues {
                expected: 2,
                found: activation.queues.len(),
            });
        }
        let sizes = activation
            .queues
            .iter()
            .map(|active| active.queue.size())
            .collect();
        seen.activations.push((activation.features, sizes));
        Ok(())
    }
    fn reset(&mut self) {
        self.0.lock().unwrap().resets += 1;
    }
}

struct Driver {
    mmio: Mmio,
    seen: Arc<Mutex<Seen>>,
    line: EventFd,
}

impl Driver {
    fn new() -> Self {
        let seen = Arc::<Mutex<Seen>>::default();
        seen.lock().unwrap().config = 0x5a;
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = Interrupt::new(line.try_clone().unwrap(), Page::alone());
        let mmio = Mmio::new(
            "probe".to_owned(),
            Box::new(Probe(seen.clone())),
            memory,
            None,
            interrupt,
        )
        .unwrap();
        Self { mmio, seen, line }
    }

    fn read(&self, register: u64) -> u32 {
        let mut data = [0xff; 4];
        self.mmio.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, register: u64, value: u32) {
        self.mmio.write(register, &value.to_le_bytes());
    }

    fn status(&self) -> u32 {
        self.read(register::STATUS)
    }

    fn refused(&self) -> u64 {
        self.mmio.counters().pop().unwrap().1
    }

    /// Writes the status bits one after the other as the specification wants it.
    fn advance(&self, to: u32) {
        for bit in [
            status::ACKNOWLEDGE,
            status::DRIVER,
            status::FEATURES_OK,
            status::DRIVER_OK,
        ] {
            if to & bit != 0 && self.status() & bit == 0 {
                if bit == status::FEATURES_OK {
                    self.accept(0, EVENT_IDX_BIT);
                    self.accept(1, 1);
                }
                self.write(register::STATUS, self.status() | bit);
            }
        }
    }

    fn accept(&self, half: u32, bits: u32) {
        self.write(register::DRIVER_FEATURES_SEL, half);
        self.write(register::DRIVER_FEATURES, bits);
    }

    fn set_up_queue(&self, index: u32, size: u32, base: u32) {
        self.write(register::QUEUE_SEL, index);
        self.write(register::QUEUE_SIZE, size);
        self.write(register::QUEUE_DESC_LOW, base);
        self.write(register::QUEUE_DRIVER_LOW, base + 0x2000);
        self.write(register::QUEUE_DEVICE_LOW, base + 0x3000);
        self.write(register::QUEUE_READY, 1);
    }
}

#[test]
fn a_driver_that_follows_the_specification_gets_its_device() {
    let driver = Driver::new();
    assert_eq!(driver.read(register::MAGIC_VALUE), 0x7472_6976);
    assert_eq!(driver.read(register::VERSION), 2);
    assert_eq!(driver.read(register::DEVICE_ID), 4);
    driver.write(register::DEVICE_FEATURES_SEL, 1);
    assert_eq!(driver.read(register::DEVICE_FEATURES), 1, "VERSION_1");
    driver.advance(READY_FOR_QUEUES);
    driver.write(register::QUEUE_SEL, 0);
    assert_eq!(driver.read(register::QUEUE_SIZE_MAX), 256);
    driver.set_up_queue(0, 128, 0x1_0000);
    driver.set_up_queue(1, 16, 0x2_0000);
    assert_eq!(driver.read(register::QUEUE_READY), 1);
    driver.advance(RUNNING);
    assert_eq!(driver.status(), RUNNING);
    let seen = driver.seen.lock().unwrap();
    assert_eq!(
        seen.activations,
        [(1 << 32 | u64::from(EVENT_IDX_BIT), vec![128, 16])]
    );
    drop(seen);
    assert_eq!(driver.refused(), 0);
}

#[test]
fn status_bits_out_of_order_are_refused() {
    let driver = Driver::new();
    for jump in [
        status::DRIVER,
        status::DRIVER_OK,
        RUNNING,
        status::ACKNOWLEDGE | status::DRIVER,
    ] {
        driver.write(register::STATUS, jump);
        assert_eq!(driver.status(), 0, "{jump:#x}");
    }
    driver.advance(READY_FOR_FEATURES);
    driver.write(register::STATUS, READY_FOR_FEATURES | status::DRIVER_OK);
    driver.write(register::STATUS, status::DRIVER);
    driver.write(register::STATUS, READY_FOR_FEATURES | 0x10);
    assert_eq!(driver.status(), READY_FOR_FEATURES);
    assert_eq!(driver.refused(), 7);
}

#[test]
fn features_that_were_not_offered_and_legacy_drivers_are_refused() {
    for (low, high) in [(1 << 7, 1), (0, 1 << 6 | 1), (EVENT_IDX_BIT, 0)] {
        let driver = Driver::new();
        driver.advance(READY_FOR_FEATURES);
        driver.accept(0, low);
        driver.accept(1, high);
        driver.write(register::STATUS, READY_FOR_QUEUES);
        assert_eq!(driver.status(), READY_FOR_FEATURES, "{low:#x} {high:#x}");
    }
}

#[test]
fn features_stand_once_they_are_agreed() {
    let driver = Driver::new();
    driver.accept(0, EVENT_IDX_BIT);
    assert_eq!(driver.refused(), 1, "before the driver has introduced itself");
    driver.advance(READY_FOR_QUEUES);
    driver.accept(0, 1 << 5);
    assert_eq!(driver.refused(), 2);
    driver.set_up_queue(0, 16, 0x1_0000);
    driver.advance(RUNNING);
    assert_eq!(
        driver.seen.lock().unwrap().activations[0].0,
        1 << 32 | u64::from(EVENT_IDX_BIT)
    );
}

#[test]
fn queues_with_bad_sizes_or_addresses_never_become_ready() {
    for (size, base, what) in [
        (0, 0x1_0000, "no entries"),
        (3, 0x1_0000, "not a power of two"),
        (512, 0x1_0000, "more than the device has"),
        (0x1_0000, 0x1_0000, "more than 16 bits"),
        (16, 0x1_0008, "descriptor table not aligned to 16"),
        (16, 0xf_fff0, "outside of memory"),
        (256, 0xf_f000, "table reaches beyond memory"),
        (16, 0xffff_fff0, "far outside of memory"),
    ] {
        let driver = Driver::new();
        driver.advance(READY_FOR_QUEUES);
        driver.write(register::QUEUE_SEL, 0);
        driver.write(register::QUEUE_SIZE, size);
        driver.write(register::QUEUE_DESC_LOW, base);
        driver.write(register::QUEUE_DRIVER_LOW, 0x2000);
        driver.write(register::QUEUE_DEVICE_LOW, 0x3000);
        driver.write(register::QUEUE_READY, 1);
        assert_eq!(driver.read(register::QUEUE_READY), 0, "{what}");
    }
}

#[test]
fn ring_addresses_that_wrap_or_are_unaligned_are_refused() {
    for (register, value, what) in [
        (
            register::QUEUE_DESC_HIGH,
            u32::MAX,
            "descriptor table near the end of the address space",
        ),
        (register::QUEUE_DRIVER_HIGH, 1, "available ring above memory"),
        (
            register::QUEUE_DRIVER_LOW,
            0x2001,
            "available ring not aligned to 2",
        ),
        (register::QUEUE_DEVICE_LOW, 0x3002, "used ring not aligned to 4"),
        (
            register::QUEUE_DEVICE_LOW,
            0xf_fffc,
            "used ring reaches beyond memory",
        ),
    ] {
        let driver = Driver::new();
        driver.advance(READY_FOR_QUEUES);
        driver.set_up_queue(0, 16, 0x1_0000);
        assert_eq!(driver.read(register::QUEUE_READY), 1);
        driver.write(register::QUEUE_READY, 0);
        driver.write(register, value);
        driver.write(register::QUEUE_READY, 1);
        assert_eq!(driver.read(register::QUEUE_READY), 0, "{what}");
    }
}

#[test]
fn queues_are_set_up_only_between_features_ok_and_driver_ok() {
    let driver = Driver::new();
    driver.set_up_queue(0, 16, 0x1_0000);
    driver.advance(READY_FOR_FEATURES);
    driver.set_up_queue(0, 16, 0x1_0000);
    assert_eq!(driver.read(register::QUEUE_READY), 0);
    driver.advance(READY_FOR_QUEUES);
    driver.set_up_queue(0, 16, 0x1_0000);
    driver.write(register::QUEUE_SIZE, 32);
    driver.advance(RUNNING);
    driver.set_up_queue(1, 16, 0x2_0000);
    driver.write(register::QUEUE_SEL, 0);
    driver.write(register::QUEUE_READY, 0);
    assert_eq!(driver.read(register::QUEUE_READY), 1);
    assert_eq!(
        driver.seen.lock().unwrap().activations[0].1,
        [16],
        "a ready queue keeps its size"
    );
}

#[test]
fn a_queue_set_up_behind_an_unused_one_does_not_take_its_place() {
    let driver = Driver::new();
    driver.advance(READY_FOR_QUEUES);
    driver.set_up_queue(1, 16, 0x2_0000);
    driver.advance(RUNNING);
    assert_eq!(driver.status(), RUNNING | status::DEVICE_NEEDS_RESET);
    assert!(driver.seen.lock().unwrap().activations.is_empty());
}

#[test]
fn a_device_that_refuses_says_so_by_needs_reset_and_recovers_by_reset() {
    let driver = Driver::new();
    driver.seen.lock().unwrap().refuse = true;
    driver.advance(READY_FOR_QUEUES);
    driver.set_up_queue(0, 16, 0x1_0000);
    driver.advance(RUNNING);
    assert_eq!(driver.status(), RUNNING | status::DEVICE_NEEDS_RESET);
    assert_eq!(driver.read(register::INTERRUPT_STATUS), Interrupt::CONFIG);
    assert_eq!(driver.line.read().unwrap(), 1);
    driver.write(register::STATUS, 0);
    assert_eq!((driver.status(), driver.read(register::INTERRUPT_STATUS)), (0, 0));
    driver.seen.lock().unwrap().refuse = false;
    driver.advance(READY_FOR_QUEUES);
    driver.set_up_queue(0, 16, 0x1_0000);
    driver.advance(RUNNING);
    assert_eq!(driver.status(), RUNNING);
}

#[test]
fn reset_takes_everything_back() {
    let driver = Driver::new();
    driver.write(register::STATUS, 0);
    assert_eq!(driver.seen.lock().unwrap().resets, 0, "nothing was running");
    driver.advance(READY_FOR_QUEUES);
    driver.set_up_queue(0, 16, 0x1_0000);
    driver.advance(RUNNING);
    driver.mmio.interrupt.used();
    driver.write(register::STATUS, 0);
    assert_eq!(driver.seen.lock().unwrap().resets, 1);
    assert_eq!(driver.read(register::QUEUE_READY), 0);
    assert_eq!(driver.read(register::INTERRUPT_STATUS), 0);
}

#[test]
fn a_configuration_that_changes_before_the_device_is_active_is_announced_when_it_is() {
    let driver = Driver::new();
    driver.advance(READY_FOR_QUEUES);
    driver.seen.lock().unwrap().config = 7;
    driver.set_up_queue(0, 16, 0x1_0000);
    driver.advance(RUNNING);
    assert_eq!(driver.read(register::CONFIG), 7);
    assert_eq!(driver.read(register::INTERRUPT_STATUS), Interrupt::CONFIG);
    driver.line.read().unwrap();
}

#[test]
fn interrupts_are_acknowledged_bit_by_bit() {
    let driver = Driver::new();
    driver.mmio.interrupt.used();
    let generation = driver.read(register::CONFIG_GENERATION);
    driver.mmio.interrupt.config_changed(|space| space[0] = 0x5b);
    assert_eq!(driver.read(register::CONFIG), 0x5b);
    assert_eq!(driver.read(register::INTERRUPT_STATUS), 3);
    assert_eq!(driver.read(register::CONFIG_GENERATION), generation + 1);
    driver.write(register::INTERRUPT_ACK, Interrupt::USED);
    assert_eq!(driver.read(register::INTERRUPT_STATUS), Interrupt::CONFIG);
}

#[test]
fn registers_take_aligned_words_only_and_unknown_ones_read_as_zero() {
    let driver = Driver::new();
    driver.mmio.write(register::STATUS, &[1]);
    driver.mmio.write(register::STATUS + 1, &1_u32.to_le_bytes());
    assert_eq!(driver.status(), 0);
    assert_eq!(driver.refused(), 2);
    for unknown in [
        0x00c + 0x40,
        0x0f8,
        register::QUEUE_NOTIFY,
        register::QUEUE_DESC_LOW,
    ] {
        assert_eq!(driver.read(unknown), 0);
    }
    assert_eq!(
        driver.read(register::SHM_LEN_LOW),
        u32::MAX,
        "there is no shared memory region"
    );
    driver.write(register::QUEUE_SEL, 7);
    assert_eq!(driver.read(register::QUEUE_SIZE_MAX), 0, "there is no such queue");
    driver.write(register::QUEUE_NOTIFY, 7);
    driver.write(0x0f8, 1);
    assert_eq!(driver.refused(), 4);
}

#[test]
fn the_configuration_space_is_read_at_any_width_and_written_by_drivers_only() {
    let driver = Driver::new();
    let mut wide = [0xff; 8];
    driver.mmio.read(register::CONFIG, &mut wide);
    assert_eq!(wide, [0x5a, 0, 0, 0, 0, 0, 0, 0]);
    let mut beyond = [0xff; 2];
    driver.mmio.read(0xffe, &mut beyond);
    assert_eq!(beyond, [0, 0]);
    driver.mmio.write(register::CONFIG + 4, &[1]);
    driver.advance(status::ACKNOWLEDGE | status::DRIVER);
    driver.mmio.write(register::CONFIG + 4, &[2]);
    driver.write(register::STATUS, READY_FOR_FEATURES | status::FAILED);
    driver.mmio.write(register::CONFIG + 4, &[3]);
    assert_eq!(driver.seen.lock().unwrap().config_writes, [(4, vec![2])]);
}

#[test]
fn guest_memory_is_not_written_while_setting_up() {
    let driver = Driver::new();
    driver.advance(READY_FOR_QUEUES);
    driver.set_up_queue(0, 16, 0x1_0000);
    driver.advance(RUNNING);
    let inner = driver.mmio.lock();
    let bytes: [u8; 16] = inner.memory.read_obj(GuestAddress(0x1_3000)).unwrap();
    assert_eq!(bytes, [0; 16]);
}
