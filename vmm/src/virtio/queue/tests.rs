//! Queues as a driver makes them, well-formed and not.

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
