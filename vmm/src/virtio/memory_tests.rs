use super::*;
use crate::memory::{allocate, resident_bytes};
use crate::pluggable::reserve;
use crate::virtio::test_driver::{Buffer, Descriptor, Driver, WRITE};
use vm_memory::{Bytes, GuestAddress};

/// A driver, its device, and the memory that the device's region is in.
struct Guest {
    driver: Driver,
    device: Memory,
    handle: MemoryHandle,
    memory: GuestMemory,
    region: Arc<Pluggable>,
    base: u64,
}

impl Guest {
    fn new() -> Self {
        let (memory, region) = reserve(&allocate(256).unwrap(), 512).unwrap();
        let base = region.range().guest;
        let (mut device, handle) = Memory::new(region.clone()).unwrap();
        let driver = Driver::activate(&mut device);
        Self {
            driver,
            device,
            handle,
            memory,
            region,
            base,
        }
    }

    /// The response's type and state.
    fn ask(&mut self, kind: u16, block: u64, count: u16) -> (Response, u16) {
        self.ask_at(kind, self.base + block * BLOCK, count)
    }

    fn ask_at(&mut self, kind: u16, address: u64, count: u16) -> (Response, u16) {
        let mut request = [0; REQUEST_SIZE];
        request[..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&address.to_le_bytes());
        request[16..18].copy_from_slice(&count.to_le_bytes());
        let id = self
            .driver
            .submit(0, &[Buffer::Out(&request), Buffer::In(RESPONSE_SIZE)]);
        let bytes = self.driver.wait(0, id);
        let response = match bytes[0] {
            0 => Response::Ack,
            1 => Response::Nack,
            2 => Response::Busy,
            _ => Response::Error,
        };
        (response, u16::from_le_bytes([bytes[8], bytes[9]]))
    }

    fn config(&self) -> Vec<u64> {
        let mut space = [0xff; 56];
        self.device.read_config(0, &mut space);
        space
            .chunks_exact(8)
            .map(|field| u64::from_le_bytes(field.try_into().unwrap()))
            .collect()
    }

    fn reached(&self) -> bool {
        self.handle.reached().read().is_ok()
    }

    fn touch(&self, block: u64) {
        let address = GuestAddress(self.base + block * BLOCK);
        self.memory.write_slice(&[0xaa; 4096], address).unwrap();
    }

    fn byte(&self, block: u64) -> u8 {
        self.memory
            .read_obj(GuestAddress(self.base + block * BLOCK))
            .unwrap()
    }
}

const ACK: (Response, u16) = (Response::Ack, 0);
const NACK: (Response, u16) = (Response::Nack, 0);
const ERROR: (Response, u16) = (Response::Error, 0);

#[test]
fn the_guest_plugs_up_to_what_it_is_asked_to_have() {
    let mut guest = Guest::new();
    assert_eq!(
        guest.ask(PLUG, 0, 1),
        ERROR,
        "nothing is usable before it is asked for"
    );
    assert!(guest.handle.request(6 * BLOCK));
    assert_ne!(guest.driver.interrupt.status() & Interrupt::CONFIG, 0);
    assert_eq!(
        guest.config(),
        [BLOCK, 0, guest.base, 512 << 20, GRANULE, 0, 6 * BLOCK]
    );
    assert_eq!(guest.ask(PLUG, 60, 4), ACK);
    assert!(!guest.reached());
    assert_eq!(guest.ask(PLUG, 0, 3), NACK);
    assert_eq!(guest.ask(PLUG, 0, 2), ACK);
    assert!(guest.reached());
    assert_eq!(guest.handle.plugged(), 6 * BLOCK);
    assert_eq!(guest.ask(PLUG, 10, 1), NACK);
    assert_eq!(guest.ask(PLUG, 1, 1), ERROR, "plugged already");
    assert_eq!(guest.ask(PLUG, 63, 2), ERROR, "beyond what is usable");
}

#[test]
fn what_is_unplugged_goes_back_to_the_host() {
    let mut guest = Guest::new();
    assert!(guest.handle.request(66 * BLOCK));
    assert_eq!(guest.ask(PLUG, 0, 66), ACK);
    for block in [0, 1, 64, 65] {
        guest.touch(block);
    }
    let granules = guest.handle.region().opened();
    assert_eq!(granules.len(), 2);
    assert!(resident_bytes(&granules).unwrap() >= 4 * 4096);
    assert_eq!(guest.ask(UNPLUG, 1, 64), ACK);
    assert_eq!(guest.handle.plugged(), 2 * BLOCK);
    let left: Vec<u8> = [0, 1, 64, 65].map(|block| guest.byte(block)).to_vec();
    assert_eq!(left, [0xaa, 0, 0, 0xaa]);
    assert_eq!(guest.ask(UNPLUG, 0, 2), ERROR, "not all of it is plugged");
    assert_eq!(guest.ask(UNPLUG, 65, 1), ACK);
    assert_eq!(guest.handle.region().opened().len(), 1);
    assert!(
        guest.region.hold(guest.base + 64 * BLOCK, 1).is_err(),
        "a granule without plugged blocks is closed"
    );
}

#[test]
fn shrinking_is_reached_from_above() {
    let mut guest = Guest::new();
    assert!(guest.handle.request(4 * BLOCK));
    assert_eq!(guest.ask(PLUG, 0, 4), ACK);
    assert!(guest.reached());
    assert!(guest.handle.request(BLOCK));
    assert!(!guest.reached());
    assert_eq!(guest.ask(PLUG, 8, 1), NACK);
    assert_eq!(guest.ask(UNPLUG, 1, 3), ACK);
    assert!(guest.reached());
    assert!(guest.handle.request(BLOCK));
    assert!(
        guest.reached(),
        "it is so already, and is said once for each request"
    );
    assert!(!guest.reached());
}

#[test]
fn unplugging_all_makes_the_usable_part_smaller() {
    let mut guest = Guest::new();
    assert!(guest.handle.request(130 * BLOCK));
    assert_eq!(guest.config()[4], 3 * GRANULE);
    assert_eq!(guest.ask(PLUG, 62, 4), ACK);
    assert!(guest.handle.request(0));
    assert_eq!(
        guest.config()[4],
        3 * GRANULE,
        "blocks may be plugged in all of it"
    );
    assert_eq!(guest.ask_at(UNPLUG_ALL, 0, 0), ACK);
    assert!(guest.reached());
    assert_eq!(guest.config()[4..], [0, 0, 0]);
    assert!(guest.handle.region().opened().is_empty());
}

#[test]
fn states_are_told() {
    let mut guest = Guest::new();
    assert!(guest.handle.request(8 * BLOCK));
    assert_eq!(guest.ask(PLUG, 3, 2), ACK);
    assert_eq!(guest.ask(STATE, 3, 2), (Response::Ack, STATE_PLUGGED));
    assert_eq!(guest.ask(STATE, 5, 59), (Response::Ack, STATE_UNPLUGGED));
    assert_eq!(guest.ask(STATE, 2, 2), (Response::Ack, STATE_MIXED));
}

#[test]
fn requests_that_make_no_sense_are_errors() {
    let mut guest = Guest::new();
    assert!(guest.handle.request(8 * BLOCK));
    assert_eq!(guest.ask(PLUG, 0, 0), ERROR);
    assert_eq!(guest.ask_at(PLUG, guest.base + 4096, 1), ERROR);
    assert_eq!(guest.ask_at(PLUG, guest.base - BLOCK, 1), ERROR);
    assert_eq!(guest.ask_at(UNPLUG, u64::MAX - BLOCK + 1, u16::MAX), ERROR);
    assert_eq!(guest.ask(4, 0, 1), ERROR);
    let id = guest
        .driver
        .submit(0, &[Buffer::Out(&[0; 8]), Buffer::In(RESPONSE_SIZE)]);
    assert!(guest.driver.wait(0, id).is_empty());
    let id = guest
        .driver
        .submit(0, &[Buffer::Out(&[0; REQUEST_SIZE]), Buffer::In(4)]);
    assert!(guest.driver.wait(0, id).is_empty());
    assert_eq!(guest.handle.plugged(), 0);
}

#[test]
fn only_whole_blocks_within_the_region_can_be_asked_for() {
    let guest = Guest::new();
    assert!(!guest.handle.request(BLOCK + 1));
    assert!(!guest.handle.request((512 << 20) + BLOCK));
    assert!(guest.handle.request(512 << 20));
}

#[test]
fn a_driver_that_would_touch_unplugged_memory_is_refused() {
    let mut guest = Guest::new();
    guest.device.reset();
    let error = guest
        .device
        .activate(Driver::new(QUEUE_SIZES).activation(1 << VIRTIO_RING_F_EVENT_IDX))
        .unwrap_err();
    assert!(error.to_string().contains("UNPLUGGED_INACCESSIBLE"), "{error}");
}

#[test]
fn memory_stays_plugged_over_a_reset() {
    let mut guest = Guest::new();
    assert!(guest.handle.request(4 * BLOCK));
    assert_eq!(guest.ask(PLUG, 0, 4), ACK);
    guest.device.reset();
    guest.driver = Driver::activate(&mut guest.device);
    assert_eq!(guest.ask(STATE, 0, 4), (Response::Ack, STATE_PLUGGED));
    assert_eq!(guest.device.state().plugged, [0xf]);
}

#[test]
fn block_ranges_cover_their_words_exactly() {
    let words = |first, count| Blocks { first, count }.words().collect::<Vec<_>>();
    assert_eq!(words(0, 64), [(0, u64::MAX)]);
    assert_eq!(words(63, 2), [(0, 1 << 63), (1, 1)]);
    assert_eq!(words(1, 128), [(0, !1), (1, u64::MAX), (2, 1)]);
    assert_eq!(words(70, 3), [(1, 0b111 << 6)]);
}

/// A driver that unplugs memory while another device writes to it.
#[test]
fn memory_that_another_device_is_using_cannot_be_unplugged() {
    const BUFFER: u32 = 1 << 12;
    let mut guest = Guest::new();
    assert!(guest.handle.request(BLOCK));
    for _ in 0..2000 {
        assert_eq!(guest.ask(PLUG, 0, 1), ACK);
        let mut rng = crate::virtio::rng::Rng::new();
        let mut driver = Driver::new(rng.queue_sizes());
        driver.memory = guest.memory.clone();
        driver.pluggable = Some(guest.region.clone());
        let buffer = |index: u16| Descriptor {
            address: guest.base + u64::from(index) * u64::from(BUFFER),
            length: BUFFER,
            flags: WRITE,
            next: 0,
        };
        driver.write_descriptors(0, &std::array::from_fn::<_, 16, _>(|index| buffer(index as u16)));
        (0..16).for_each(|head| driver.offer(0, head));
        rng.activate(driver.activation(rng.features())).unwrap();
        driver.kick(0);
        loop {
            match guest.ask(UNPLUG, 0, 1).0 {
                Response::Ack => break,
                other => assert_eq!(other, Response::Busy),
            }
        }
        // What it takes from here on lies in memory that is not there.
        drop(rng);
        assert!(guest.region.opened().is_empty());
    }
}
