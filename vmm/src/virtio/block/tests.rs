//! The device with a driver before it and files behind it, with io_uring and without.

mod slot;

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use super::request::Status;
use super::*;
use crate::virtio::rate_limiter::Limit;
use crate::virtio::test_driver::{Buffer, Driver};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const OK: u8 = Status::Ok as u8;
const IO_ERROR: u8 = Status::IoError as u8;
const UNSUPPORTED: u8 = Status::Unsupported as u8;

fn disk(sectors: u64) -> File {
    let mut file = tempfile::tempfile().unwrap();
    for sector in 0..sectors {
        file.write_all(&[sector as u8; 512]).unwrap();
    }
    file
}

fn backing(file: &File, read_only: bool) -> Backing {
    Backing::new(OwnedFd::from(file.try_clone().unwrap()), read_only).unwrap()
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

/// Sends a request; its data and status. An unanswerable one has neither.
fn ask(driver: &mut Driver, kind: u32, sector: u64, data: Buffer<'_>) -> (Vec<u8>, Option<u8>) {
    let header = header(kind, sector);
    let id = driver.submit(0, &[Buffer::Out(&header), data, Buffer::In(1)]);
    split(driver.wait(0, id), data)
}

fn split(mut answer: Vec<u8>, data: Buffer<'_>) -> (Vec<u8>, Option<u8>) {
    // A device that fails writes nothing but the last byte, which the driver finds where it is, not by length.
    let expected = if let Buffer::In(length) = data { length } else { 0 };
    let status = if answer.len() > expected {
        answer.pop()
    } else {
        None
    };
    (answer, status)
}

fn read(driver: &mut Driver, sector: u64, sectors: usize) -> (Vec<u8>, Option<u8>) {
    ask(driver, IN, sector, Buffer::In(sectors * 512))
}

fn write(driver: &mut Driver, sector: u64, data: &[u8]) -> Option<u8> {
    ask(driver, OUT, sector, Buffer::Out(data)).1
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [
        &sector.to_le_bytes()[..],
        &sectors.to_le_bytes(),
        &flags.to_le_bytes(),
    ]
    .concat()
}

fn capacity(device: &Block) -> u64 {
    let mut bytes = [0; 8];
    device.read_config(0, &mut bytes);
    u64::from_le_bytes(bytes)
}

/// Runs a test with io_uring, if the host has it, and without.
fn both_ways(test: impl Fn(&mut dyn FnMut(Option<Backing>) -> (Block, BlockHandle))) {
    for ring in [true, false] {
        test(&mut |backing| {
            let (device, handle) = Block::new("serial-of-20-bytes!!x", backing);
            device.slot.common.ring_allowed.store(ring, Ordering::Relaxed);
            (device, handle)
        });
    }
}

#[test]
fn sectors_are_read_written_and_flushed() {
    both_ways(|make| {
        let file = disk(64);
        let (mut device, handle) = make(Some(backing(&file, false)));
        assert_eq!((capacity(&device), handle.capacity()), (64, 64 * 512));
        let mut driver = Driver::activate(&mut device);
        let (data, status) = read(&mut driver, 3, 2);
        assert_eq!((data, status), ([[3; 512], [4; 512]].concat(), Some(OK)));
        assert_eq!(write(&mut driver, 5, &[0xab; 1024]), Some(OK));
        assert_eq!(
            read(&mut driver, 4, 4).0,
            [[4; 512], [0xab; 512], [0xab; 512], [7; 512]].concat()
        );
        assert_eq!(ask(&mut driver, FLUSH, 0, Buffer::Out(&[])).1, Some(OK));
        let mut bytes = [0; 512];
        file.read_exact_at(&mut bytes, 6 * 512).unwrap();
        assert_eq!(bytes, [0xab; 512]);
        assert_eq!(
            ask(&mut driver, GET_ID, 0, Buffer::In(20)),
            (b"serial-of-20-bytes!!".to_vec(), Some(OK))
        );
        let counters = device.counters();
        assert_eq!(
            counters[..4].iter().map(|c| c.1).collect::<Vec<_>>(),
            [2, 3072, 1, 1024]
        );
    });
}

#[test]
fn data_may_be_scattered_in_any_way() {
    both_ways(|make| {
        let (mut device, _handle) = make(Some(backing(&disk(64), false)));
        let mut driver = Driver::activate(&mut device);
        let header = header(IN, 10);
        // The header in pieces, and the status in one buffer with data.
        let (front, back) = header.split_at(5);
        let buffers = [
            Buffer::Out(front),
            Buffer::Out(back),
            Buffer::In(100),
            Buffer::In(900),
            Buffer::In(25),
        ];
        let id = driver.submit(0, &buffers);
        let mut answer = driver.wait(0, id);
        assert_eq!(answer.pop(), Some(OK));
        assert_eq!(answer, [[10; 512], [11; 512]].concat());
    });
}

#[test]
fn many_requests_are_in_flight_at_once() {
    both_ways(|make| {
        let (mut device, _handle) = make(Some(backing(&disk(256), false)));
        let mut driver = Driver::activate(&mut device);
        for _ in 0..20 {
            let flying: Vec<_> = (0..40u64)
                .map(|number| {
                    let header = header(IN, number * 5);
                    (
                        number,
                        driver.prepare(0, &[Buffer::Out(&header), Buffer::In(512), Buffer::In(1)]),
                    )
                })
                .collect();
            driver.kick(0);
            for (number, id) in flying {
                let answer = driver.wait(0, id);
                assert_eq!(answer, [vec![number as u8 * 5; 512], vec![OK]].concat());
            }
        }
    });
}

#[test]
fn a_read_that_would_wait_elsewhere_is_waited_for_unless_others_would_wait_for_it() {
    let (mut device, _handle) = Block::new("", Some(backing(&disk(64), false).waiting()));
    let mut driver = Driver::activate(&mut device);
    let waited_for = |device: &Block| {
        let counters = device.counters();
        counters
            .into_iter()
            .find(|(name, _)| name == "reads_waited_for")
            .unwrap()
            .1
    };
    for sector in 0..3 {
        assert_eq!(read(&mut driver, sector, 1), (vec![sector as u8; 512], Some(OK)));
    }
    if super::backend::Ring::new(1).is_err() {
        println!("skipped: this host has no io_uring, all reads are waited for");
        return;
    }
    assert_eq!(waited_for(&device), 3);
    let header = header(IN, 9);
    let buffers = [Buffer::Out(&header), Buffer::In(512), Buffer::In(1)];
    let together: Vec<_> = (0..8).map(|_| driver.prepare(0, &buffers)).collect();
    driver.kick(0);
    for id in together {
        assert_eq!(driver.wait(0, id), [vec![9; 512], vec![OK]].concat());
    }
    assert_eq!(waited_for(&device), 3);
    assert_eq!(read(&mut driver, 1, 1).1, Some(OK));
    assert_eq!(waited_for(&device), 3, "there may be company again");
    while waited_for(&device) == 3 {
        assert_eq!(read(&mut driver, 2, 1), (vec![2; 512], Some(OK)));
    }
}

#[test]
fn what_lies_outside_of_the_disk_is_an_error() {
    both_ways(|make| {
        let (mut device, _handle) = make(Some(backing(&disk(8), false)));
        let mut driver = Driver::activate(&mut device);
        for (sector, sectors) in [(8, 1), (7, 2), (u64::MAX, 1), (u64::MAX / 512, 1), (1 << 55, 1)] {
            assert_eq!(
                write(&mut driver, sector, &vec![1; sectors * 512]),
                Some(IO_ERROR),
                "{sector}"
            );
            let header = header(IN, sector);
            let id = driver.submit(0, &[Buffer::Out(&header), Buffer::In(sectors * 512 + 1)]);
            assert_eq!(driver.wait(0, id).len(), 1, "{sector}: only the status");
        }
        assert_eq!(
            write(&mut driver, 0, &[1; 100]),
            Some(IO_ERROR),
            "not a whole sector"
        );
        assert_eq!(ask(&mut driver, 77, 0, Buffer::Out(&[])).1, Some(UNSUPPORTED));
        for buffers in [
            [Buffer::Out(b"short"), Buffer::In(1)].as_slice(),
            &[Buffer::Out(&header(IN, 0))],
        ] {
            let id = driver.submit(0, buffers);
            assert!(driver.wait(0, id).is_empty());
        }
        assert_eq!(device.violations.count(), 2);
        assert_eq!(read(&mut driver, 7, 1), (vec![7; 512], Some(OK)));
    });
}

#[test]
fn a_read_only_disk_says_so_and_refuses_to_change() {
    both_ways(|make| {
        let file = disk(8);
        let (mut device, _handle) = make(Some(backing(&file, true)));
        assert_eq!(device.features() & (F_RO | F_DISCARD | F_WRITE_ZEROES), F_RO);
        let mut driver = Driver::activate(&mut device);
        assert_eq!(write(&mut driver, 0, &[9; 512]), Some(IO_ERROR));
        for kind in [DISCARD, WRITE_ZEROES] {
            assert_eq!(
                ask(&mut driver, kind, 0, Buffer::Out(&range(0, 8, 0))).1,
                Some(IO_ERROR)
            );
        }
        assert_eq!(ask(&mut driver, FLUSH, 0, Buffer::Out(&[])).1, Some(OK));
        assert_eq!(read(&mut driver, 1, 1), (vec![1; 512], Some(OK)));
    });
}

#[test]
fn space_is_given_back_and_zeroed() {
    both_ways(|make| {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[0xff; 1 << 20], 0).unwrap();
        let (mut device, _handle) = make(Some(backing(&file, false)));
        let mut driver = Driver::activate(&mut device);
        let before = file.metadata().unwrap().blocks();
        let ranges = [range(0, 512, 0), range(1024, 512, 0)].concat();
        assert_eq!(ask(&mut driver, DISCARD, 0, Buffer::Out(&ranges)).1, Some(OK));
        assert!(file.metadata().unwrap().blocks() < before);
        assert_eq!(read(&mut driver, 511, 2).0, [[0; 512], [0xff; 512]].concat());
        for flags in [0, 1] {
            let sector = 600 + u64::from(flags) * 10;
            let status = ask(
                &mut driver,
                WRITE_ZEROES,
                0,
                Buffer::Out(&range(sector, 2, flags)),
            )
            .1;
            assert_eq!(status, Some(OK));
            assert_eq!(
                read(&mut driver, sector, 3).0,
                [[0; 512], [0; 512], [0xff; 512]].concat()
            );
        }
        assert_eq!(file.metadata().unwrap().len(), 1 << 20);
        for (bad, status) in [
            (range(2047, 2, 0), IO_ERROR),
            (range(u64::MAX, 1, 0), IO_ERROR),
            (range(0, u32::MAX, 0), IO_ERROR),
            (range(0, 1, 1), UNSUPPORTED),
            (vec![0; 15], IO_ERROR),
            (Vec::new(), IO_ERROR),
            (range(0, 1, 0).repeat(33), IO_ERROR),
        ] {
            assert_eq!(
                ask(&mut driver, DISCARD, 0, Buffer::Out(&bad)).1,
                Some(status),
                "{bad:?}"
            );
        }
    });
}

#[test]
fn a_full_host_disk_is_the_guests_error_only() {
    both_ways(|make| {
        // A file that must not grow stands in for a full disk.
        let seals = rustix::fs::SealFlags::GROW;
        let fd = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&fd, 64 * 512).unwrap();
        let file = File::from(fd);
        let (mut device, _handle) = make(Some(backing(&file, false)));
        let mut driver = Driver::activate(&mut device);
        file.set_len(8 * 512).unwrap();
        rustix::fs::fcntl_add_seals(&file, seals).unwrap();
        assert_eq!(write(&mut driver, 60, &[1; 512]), Some(IO_ERROR));
        assert_eq!(write(&mut driver, 1, &[1; 512]), Some(OK));
        let header = header(IN, 7);
        let id = driver.submit(0, &[Buffer::Out(&header), Buffer::In(1025)]);
        assert_eq!(
            driver.wait(0, id).len(),
            1,
            "the file has become shorter than the disk"
        );
        assert_eq!(read(&mut driver, 1, 1), (vec![1; 512], Some(OK)));
    });
}

#[test]
fn the_configuration_has_the_layout_of_the_specification() {
    let (device, _handle) = Block::new("x", Some(backing(&disk(3), false)));
    let mut space = [0xff; 64];
    device.read_config(0, &mut space);
    let u32_at = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
    assert_eq!((u32_at(0), u32_at(4)), (3, 0));
    assert_eq!((u32_at(12), u32_at(20)), (126, 512));
    assert_eq!((u32_at(36), u32_at(40), u32_at(44)), (1 << 22, 32, 8));
    assert_eq!((u32_at(48), u32_at(52), space[56]), (1 << 22, 32, 1));
    assert_eq!(space[57..], [0; 7]);
}

#[test]
fn many_files_are_one_disk_of_which_some_can_be_written() {
    both_ways(|make| {
        let layers = [disk(3), disk(5)];
        layers[0].set_len(2 * 512 + 100).unwrap();
        let upper = disk(8);
        let owned = |file: &File| OwnedFd::from(file.try_clone().unwrap());
        let parts = vec![
            (owned(&layers[0]), Some(4 * 512), true),
            (owned(&layers[1]), None, true),
            (owned(&upper), Some(8 * 512), false),
        ];
        let (mut device, handle) = make(Some(Backing::concatenated(parts).unwrap()));
        assert_eq!((capacity(&device), handle.capacity()), (17, 17 * 512));
        assert_eq!(device.features() & F_RO, 0);
        let mut driver = Driver::activate(&mut device);
        let sector = |number: u8| vec![number; 512];
        let mut tail = sector(2);
        tail[100..].fill(0);
        let first = [sector(0), sector(1), tail, sector(0)].concat();
        let all = [first, disk_bytes(5), disk_bytes(8)].concat();
        // Within an extent, across two, across all, and into the zeroes behind a short file.
        for (from, count) in [(0, 2), (5, 3), (1, 3), (3, 1), (2, 4), (8, 3), (0, 17)] {
            let expected = all[from * 512..(from + count) * 512].to_vec();
            assert_eq!(
                read(&mut driver, from as u64, count),
                (expected, Some(OK)),
                "{from}+{count}"
            );
        }
        // Scattered buffers that do not end where extents do.
        let header = header(IN, 2);
        let id = driver.submit(
            0,
            &[
                Buffer::Out(&header),
                Buffer::In(700),
                Buffer::In(1900),
                Buffer::In(473),
            ],
        );
        let mut answer = driver.wait(0, id);
        assert_eq!(answer.pop(), Some(OK));
        assert_eq!(answer, all[2 * 512..8 * 512]);
        // Writes go where they may, and nowhere else.
        for (sector, status) in [(0, IO_ERROR), (8, IO_ERROR), (9, OK), (15, OK), (16, IO_ERROR)] {
            assert_eq!(
                write(&mut driver, sector, &[0xab; 1024]),
                Some(status),
                "{sector}"
            );
        }
        let (mut bytes, mut layer) = ([0; 1024], [0; 5 * 512]);
        upper.read_exact_at(&mut bytes, 6 * 512).unwrap();
        assert_eq!(bytes, [0xab; 1024]);
        layers[1].read_exact_at(&mut layer, 0).unwrap();
        assert_eq!(layer.to_vec(), disk_bytes(5));
        assert_eq!(ask(&mut driver, FLUSH, 0, Buffer::Out(&[])).1, Some(OK));
        for (at, status) in [(8, IO_ERROR), (0, IO_ERROR), (9, OK)] {
            for kind in [DISCARD, WRITE_ZEROES] {
                let ranges = range(at, 2, 0);
                assert_eq!(
                    ask(&mut driver, kind, 0, Buffer::Out(&ranges)).1,
                    Some(status),
                    "{kind} at {at}"
                );
            }
        }
        assert_eq!(read(&mut driver, 9, 3).0, [vec![0; 1024], sector(2)].concat());
    });
}

/// What [`disk`] holds.
fn disk_bytes(sectors: u8) -> Vec<u8> {
    (0..sectors).flat_map(|sector| [sector; 512]).collect()
}

#[test]
fn a_limit_holds_requests_back_until_there_are_tokens_again() {
    use protocol::vmm::{MAX_REFILL_MS, RateLimit, TokenBucket};
    let limit = |bytes: Option<(u64, u64)>, operations: Option<(u64, u64)>| {
        let bucket = |(capacity, refill_ms)| TokenBucket { capacity, refill_ms };
        Limit::try_from(RateLimit {
            bytes: bytes.map(bucket),
            operations: operations.map(bucket),
        })
        .unwrap()
    };
    both_ways(|make| {
        let day = limit(Some((1025, MAX_REFILL_MS)), Some((100, MAX_REFILL_MS)));
        let file = disk(64);
        let (mut device, handle) = make(Some(backing(&file, false).limited(day)));
        let mut driver = Driver::activate(&mut device);
        // The third takes more than is left, and the bucket is in debt.
        for sectors in [1, 1, 20] {
            assert_eq!(read(&mut driver, 0, sectors).1, Some(OK));
        }
        let header = header(IN, 3);
        let held_back = driver.submit(0, &[Buffer::Out(&header), Buffer::In(512), Buffer::In(1)]);
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(driver.poll(0, held_back), None);
        // What is held back does not hold up the slot's next backing.
        handle.detach().unwrap();
        assert_eq!(driver.wait(0, held_back).len(), 1, "only the status");
        let quick = limit(None, Some((2, 4)));
        handle.attach(backing(&file, false).limited(quick)).unwrap();
        for sector in 0..20 {
            assert_eq!(write(&mut driver, sector, &[0x55; 512]), Some(OK));
        }
    });
}
