//! Much at once: hostile frames, frames in many pieces, floods and limits.

use super::*;

#[test]
fn hostile_frames_are_counted_and_go_nowhere() {
    let Some(mut wire) = Wire::new() else { return };
    let (mut device, _handle) = Net::new(GUEST, Some(wire.backing()));
    let mut driver = Driver::activate(&mut device);
    let good = frame(100, 0);
    let long = vec![0; MAX_FRAME - LENGTH - 65_535 + 1];
    let longest = vec![0; 65_535];
    let segmented = |kind: u8| {
        let mut header = NO_HEADER;
        (header[0], header[1], header[4], header[6]) = (1, kind, 100, 34);
        header
    };
    let udp_fragments = segmented(3);
    let outside = [1, 0, 0, 0, 0, 0, 99, 0, 0, 0, 0, 0];
    let bad: Vec<Vec<Buffer<'_>>> = vec![
        vec![Buffer::Out(b"short")],
        vec![Buffer::Out(&NO_HEADER)],
        vec![Buffer::Out(&NO_HEADER), Buffer::Out(&good[..13])],
        vec![Buffer::Out(&NO_HEADER), Buffer::Out(&good), Buffer::In(1)],
        vec![Buffer::In(2000)],
        vec![Buffer::Out(&NO_HEADER), Buffer::Out(&long), Buffer::Out(&longest)],
        vec![Buffer::Out(&udp_fragments), Buffer::Out(&good)],
        vec![Buffer::Out(&outside), Buffer::Out(&good)],
    ];
    let count = bad.len() as u64;
    for buffers in bad {
        let id = driver.submit(TX, &buffers);
        assert!(driver.wait(TX, id).is_empty());
    }
    assert_eq!(
        (counter(&device, "violations"), counter(&device, "tx_errors")),
        (count, count)
    );
    assert_eq!(counter(&device, "tx_packets"), 0);
    for buffers in [
        [Buffer::In(11)].as_slice(),
        &[Buffer::Out(&good)],
        &[Buffer::Out(b"x"), Buffer::In(2000)],
    ] {
        let id = driver.submit(RX, buffers);
        wire.send(&good);
        assert!(driver.wait(RX, id).is_empty());
    }
    assert_eq!(counter(&device, "violations"), count + 3);
    // What was sent meanwhile is still there.
    let id = driver.submit(RX, &[Buffer::In(2000)]);
    assert_eq!(driver.wait(RX, id), with_header(&good, 1));
    for _ in 0..2 {
        let id = driver.submit(RX, &[Buffer::In(2000)]);
        driver.wait(RX, id);
    }
    assert_passes(&mut driver, &wire);
}

#[test]
fn a_frame_in_very_many_pieces_passes_and_one_in_more_does_not() {
    let Some(mut wire) = Wire::new() else { return };
    let (mut device, _handle) = Net::new(GUEST, Some(wire.backing()));
    let mut driver = Driver::activate(&mut device);
    let bytes = frame(240, 3);
    let mut pieces: Vec<_> = bytes.chunks(1).map(Buffer::Out).collect();
    pieces.insert(0, Buffer::Out(&NO_HEADER));
    let id = driver.submit(TX, &pieces);
    driver.wait(TX, id);
    assert_eq!(wire.receive(), bytes);
    // As many single bytes as there are descriptors, and a frame that needs them all.
    let ids: Vec<_> = (0..16).map(|_| driver.submit(RX, &[Buffer::In(1); 16])).collect();
    wire.send(&frame(244, 4));
    let got: Vec<_> = ids.iter().flat_map(|&id| driver.wait(RX, id)).collect();
    assert_eq!(got, with_header(&frame(244, 4), 16));
}

#[test]
fn a_frame_in_more_pieces_than_can_be_written_at_once_is_dropped() {
    let Some(mut wire) = Wire::new() else { return };
    let (mut device, _handle) = Net::new(GUEST, Some(wire.backing()));
    let mut driver = Driver::activate(&mut device);
    // The header and the frame's first byte are one piece of the guest's, but two of what is written.
    let pieces: Vec<_> = (0..1024)
        .map(|index| Descriptor {
            address: Driver::DATA + 0x10_0000,
            length: if index == 0 { LENGTH as u32 + 1 } else { 1 },
            flags: if index == 1023 { 0 } else { NEXT },
            next: index + 1,
        })
        .collect();
    driver.write_table(Driver::DATA, &pieces);
    let chain = Descriptor {
        address: Driver::DATA,
        length: 1024 * 16,
        flags: INDIRECT,
        next: 0,
    };
    driver.write_descriptors(TX, &[chain]);
    for round in 1..3 {
        driver.offer(TX, 0);
        driver.kick(TX);
        until("it is refused", || counter(&device, "violations") == round);
    }
    let last = Descriptor {
        flags: 0,
        ..pieces[1022]
    };
    driver.write_table(Driver::DATA + 1022 * 16, &[last]);
    driver.offer(TX, 0);
    driver.kick(TX);
    until("one piece less is sent", || counter(&device, "tx_packets") == 1);
}

#[test]
fn a_guest_that_floods_the_device_is_served_in_turns_and_can_be_stopped() {
    let Some(mut wire) = Wire::new() else { return };
    let (mut device, _handle) = Net::new(GUEST, Some(wire.backing()));
    let mut driver = Driver::activate(&mut device);
    // Good frames, bad ones, and notifications without end.
    let (good, bad) = ([&NO_HEADER[..], &frame(1000, 0)].concat(), [0xff; 2000]);
    let mut received = 0_u8;
    let mut waiting = driver.submit(RX, &[Buffer::In(1536)]);
    wire.send(&frame(100, received));
    while received < 200 {
        while driver.free(TX) > 1 {
            driver.prepare(TX, &[Buffer::Out(&good)]);
            driver.prepare(TX, &[Buffer::Out(&bad)]);
        }
        driver.kick(TX);
        driver.kick(RX);
        while driver.reap(TX).is_some() {}
        if let Some(got) = driver.poll(RX, waiting) {
            assert_eq!(got, with_header(&frame(100, received), 1));
            received += 1;
            waiting = driver.submit(RX, &[Buffer::In(1536)]);
            wire.send(&frame(100, received));
        }
    }
    device.reset();
    assert!(counter(&device, "violations") > 0 && counter(&device, "tx_packets") > 0);
}

fn operations(capacity: u64, refill_ms: u64) -> Limit {
    let bucket = protocol::vmm::TokenBucket { capacity, refill_ms };
    Limit::try_from(protocol::vmm::RateLimit {
        bytes: None,
        operations: Some(bucket),
    })
    .unwrap()
}

#[test]
fn limits_hold_frames_back_in_both_directions() {
    let Some(mut wire) = Wire::new() else { return };
    let day = protocol::vmm::MAX_REFILL_MS;
    let bytes = Limit::try_from(protocol::vmm::RateLimit {
        bytes: Some(protocol::vmm::TokenBucket {
            capacity: 1001,
            refill_ms: day,
        }),
        operations: None,
    });
    let (mut device, handle) = Net::new(GUEST, Some(wire.limited(bytes.unwrap(), operations(3, day))));
    let mut driver = Driver::activate(&mut device);
    let ids: Vec<_> = (0..5)
        .map(|seed| driver.submit(TX, &[Buffer::Out(&NO_HEADER), Buffer::Out(&frame(100, seed))]))
        .collect();
    let received: Vec<_> = (0..50).map(|_| driver.submit(RX, &[Buffer::In(1536)])).collect();
    for seed in 0..4 {
        wire.send(&frame(1000, seed));
    }
    for (seed, &id) in ids[..3].iter().enumerate() {
        driver.wait(TX, id);
        assert_eq!(wire.receive(), frame(100, seed as u8));
    }
    // The second takes more than is left, and the bucket is in debt.
    for (seed, &id) in received[..2].iter().enumerate() {
        assert_eq!(driver.wait(RX, id), with_header(&frame(1000, seed as u8), 1));
    }
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(
        ["tx_packets", "rx_packets"].map(|name| counter(&device, name)),
        [3, 2]
    );
    assert_eq!(driver.poll(TX, ids[3]), None);
    // What is held back does not hold up the slot's next backing.
    handle.detach().unwrap();
    driver.wait(TX, ids[4]);
    assert_eq!(counter(&device, "tx_drops"), 2);
    let Some(mut wire) = Wire::new() else { return };
    handle
        .attach(wire.limited(Limit::default(), operations(1, 3)))
        .unwrap();
    for seed in 0..10 {
        let id = driver.submit(TX, &[Buffer::Out(&NO_HEADER), Buffer::Out(&frame(100, seed))]);
        wire.send(&frame(200, seed));
        driver.wait(TX, id);
        assert_eq!(wire.receive(), frame(100, seed));
        assert_eq!(
            driver.wait(RX, received[2 + usize::from(seed)]),
            with_header(&frame(200, seed), 1)
        );
    }
}

/// Not a test: how many frames per second one device moves on this machine. Run it with `--ignored --nocapture`.
#[test]
#[ignore = "measures, asserts nothing"]
fn throughput() {
    let Some(mut wire) = Wire::new() else { return };
    wire.set_mtu(65_000);
    let (mut device, _handle) = Net::new(GUEST, Some(wire.backing()));
    let mut driver = Driver::activate(&mut device);
    for length in [64, 1514, 60_000] {
        let frame = [&NO_HEADER[..], &frame(length, 0)].concat();
        let before = counter(&device, "tx_packets");
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(1) {
            let mut prepared = 0;
            while driver.free(TX) > 0 {
                driver.prepare(TX, &[Buffer::Out(&frame)]);
                prepared += 1;
            }
            if prepared > 0 {
                driver.kick(TX);
            }
            while driver.reap(TX).is_some() {}
        }
        let rate = (counter(&device, "tx_packets") - before) as f64 / start.elapsed().as_secs_f64();
        println!(
            "tx {length:5} bytes: {rate:9.0} frames/s, {:6.2} Gbit/s",
            rate * length as f64 * 8e-9
        );
    }
    let stop = Arc::new(AtomicBool::new(false));
    for length in [64, 1514, 60_000] {
        stop.store(false, Ordering::Relaxed);
        let (bytes, flag, sender) = (frame(length, 0), stop.clone(), wire.frames.try_clone().unwrap());
        let thread = std::thread::spawn(move || {
            while !flag.load(Ordering::Relaxed) {
                let _ = rustix::io::write(&sender, &bytes);
            }
        });
        let before = counter(&device, "rx_packets");
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(1) {
            let mut prepared = 0;
            while driver.free(RX) > 0 {
                driver.prepare(RX, &[Buffer::In(1536)]);
                prepared += 1;
            }
            if prepared > 0 {
                driver.kick(RX);
            }
            while driver.reap(RX).is_some() {}
        }
        let rate = (counter(&device, "rx_packets") - before) as f64 / start.elapsed().as_secs_f64();
        println!(
            "rx {length:5} bytes: {rate:9.0} frames/s, {:6.2} Gbit/s",
            rate * length as f64 * 8e-9
        );
        stop.store(true, Ordering::Relaxed);
        thread.join().unwrap();
    }
}
