//! What is behind the disk comes and goes while the guest runs.

use super::*;

#[test]
fn a_slot_is_filled_and_emptied_while_the_guest_runs() {
    both_ways(|make| {
        let (mut device, handle) = make(None);
        assert_eq!(device.features() & F_RO, 0);
        let mut driver = Driver::activate(&mut device);
        assert_eq!((capacity(&device), handle.capacity()), (0, 0));
        assert!(matches!(handle.detach(), Err(SlotError::Empty)));
        for round in 0..3 {
            let file = disk(16 + round);
            driver.interrupt.acknowledge(u32::MAX);
            handle.attach(backing(&file, round == 1)).unwrap();
            assert_eq!(driver.interrupt.status() & Interrupt::CONFIG, Interrupt::CONFIG);
            assert_eq!(capacity(&device), 16 + round);
            assert!(matches!(
                handle.attach(backing(&file, false)),
                Err(SlotError::Occupied)
            ));
            assert_eq!(read(&mut driver, 9, 1), (vec![9; 512], Some(OK)));
            let expected = if round == 1 { IO_ERROR } else { OK };
            assert_eq!(
                write(&mut driver, 9, &[0xee; 512]),
                Some(expected),
                "read-only in round 1"
            );
            driver.interrupt.acknowledge(u32::MAX);
            let generation = driver.interrupt.generation();
            handle.detach().unwrap();
            assert_eq!(
                (driver.interrupt.generation(), capacity(&device)),
                (generation + 1, 0)
            );
            assert_eq!(
                write(&mut driver, 0, &[1; 512]),
                Some(IO_ERROR),
                "like a pulled disk"
            );
        }
    });
}

#[test]
fn an_empty_slot_answers_too() {
    let (mut device, handle) = Block::new("empty", None);
    let mut driver = Driver::activate(&mut device);
    let (mut other, _other_handle) = Block::new("other", None);
    let mut other_driver = Driver::activate(&mut other);
    assert!(
        matches!(device.slot.lock().stage, Stage::Asleep { .. }),
        "no thread of its own"
    );
    let id = [b"empty".as_slice(), &[0; 15]].concat();
    assert_eq!(
        ask(&mut driver, GET_ID, 0, Buffer::In(20)),
        (id.clone(), Some(OK))
    );
    assert_eq!(write(&mut driver, 0, &[1; 512]), Some(IO_ERROR));
    assert!(
        matches!(other.slot.lock().stage, Stage::Asleep { .. }),
        "it has not been asked"
    );
    handle.attach(backing(&disk(8), false)).unwrap();
    assert_eq!(read(&mut driver, 2, 1), (vec![2; 512], Some(OK)));
    device.reset();
    assert_eq!(ask(&mut other_driver, GET_ID, 0, Buffer::In(20)).1, Some(OK));
}

#[test]
fn emptying_waits_for_what_is_in_flight_and_closes_the_backing() {
    both_ways(|make| {
        let file = disk(256);
        let (mut device, handle) = make(Some(backing(&file, false)));
        let mut driver = Driver::activate(&mut device);
        let flying: Vec<_> = (0..40u64)
            .map(|number| {
                let header = header(OUT, number);
                driver.prepare(
                    0,
                    &[Buffer::Out(&header), Buffer::Out(&[0x77; 512]), Buffer::In(1)],
                )
            })
            .collect();
        driver.kick(0);
        let weak = Arc::downgrade(device.slot.lock().backing.as_ref().unwrap());
        handle.detach().unwrap();
        assert!(weak.upgrade().is_none(), "nobody holds the file any more");
        let mut written = 0;
        for (number, id) in flying.into_iter().enumerate() {
            let status = driver.wait(0, id)[0];
            let mut bytes = [0; 512];
            file.read_exact_at(&mut bytes, number as u64 * 512).unwrap();
            assert_eq!(
                bytes == [0x77; 512],
                status == OK,
                "request {number} is done or refused, not both"
            );
            written += usize::from(status == OK);
        }
        assert_eq!(device.counters()[2].1 as usize, written);
    });
}

#[test]
fn a_device_can_be_reset_and_used_again() {
    both_ways(|make| {
        let (mut device, handle) = make(Some(backing(&disk(8), false)));
        for _ in 0..3 {
            let mut driver = Driver::activate(&mut device);
            assert_eq!(read(&mut driver, 2, 1), (vec![2; 512], Some(OK)));
            let header = header(IN, 1);
            driver.submit(0, &[Buffer::Out(&header), Buffer::In(512), Buffer::In(1)]);
            device.reset();
        }
        handle.detach().unwrap();
        assert_eq!(capacity(&device), 0);
        handle.attach(backing(&disk(9), false)).unwrap();
        let mut driver = Driver::activate(&mut device);
        assert_eq!(read(&mut driver, 8, 1), (vec![8; 512], Some(OK)));
        assert_eq!(
            device.state(),
            BlockState {
                serial: device.serial.clone(),
                capacity: 9,
                read_only: false
            }
        );
    });
}

#[test]
fn only_files_and_block_devices_can_back_a_disk() {
    let refuse = |fd: OwnedFd, read_only| Backing::new(fd, read_only).unwrap_err();
    let open = |path: &str| OwnedFd::from(File::open(path).unwrap());
    assert!(matches!(
        refuse(open("/"), true),
        BackingError::Kind { found: "directory" }
    ));
    assert!(matches!(
        refuse(open("/dev/null"), true),
        BackingError::Kind {
            found: "character device"
        }
    ));
    assert!(matches!(
        refuse(std::io::pipe().unwrap().0.into(), true),
        BackingError::Kind { found: "pipe" }
    ));
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    assert!(matches!(refuse(open(path), false), BackingError::NotWritable));
    let write_only = File::options().write(true).open(path).unwrap();
    assert!(matches!(
        refuse(write_only.into(), false),
        BackingError::NotReadable
    ));
    file.as_file().set_len(1500).unwrap();
    assert_eq!(
        Backing::new(open(path), true).unwrap().capacity(),
        1024,
        "whole sectors only"
    );
}
