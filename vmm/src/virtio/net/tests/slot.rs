//! The tap behind the device comes, goes, and fails.

use super::*;

#[test]
fn a_slot_is_filled_and_emptied_while_the_guest_runs() {
    let (mut device, handle) = Net::new(GUEST, None);
    let mut driver = Driver::activate(&mut device);
    assert_eq!((link(&device), device.features()), (0, ALWAYS));
    assert!(matches!(device.slot.lock().stage, Stage::Asleep(_)), "no thread");
    assert!(matches!(handle.detach(), Err(SlotError::Empty)));
    for _ in 0..3 {
        let (Some(mut wire), Some(mut other)) = (Wire::new(), Wire::new()) else {
            return;
        };
        let generation = driver.interrupt.generation();
        driver.interrupt.acknowledge(u32::MAX);
        handle.attach(wire.backing()).unwrap();
        assert_eq!(
            (driver.interrupt.generation(), link(&device)),
            (generation + 1, LINK_UP)
        );
        assert_ne!(driver.interrupt.status() & Interrupt::CONFIG, 0);
        assert!(matches!(handle.attach(other.backing()), Err(SlotError::Occupied)));
        assert_passes(&mut driver, &wire);
        // Buffers that are posted now are for the next backing.
        handle.detach().unwrap();
        assert_eq!(
            (driver.interrupt.generation(), link(&device)),
            (generation + 2, 0)
        );
        let drops = counter(&device, "tx_drops");
        let id = driver.submit(TX, &[Buffer::Out(&NO_HEADER), Buffer::Out(&frame(100, 0))]);
        driver.wait(TX, id);
        assert_eq!(counter(&device, "tx_drops"), drops + 1);
    }
    let state = device.state();
    assert_eq!((state.mac, state.link_up), (GUEST, false));
    assert!(
        [ALWAYS, ALWAYS | USO].contains(&state.features),
        "of the taps that were there"
    );
}

#[test]
fn detaching_closes_the_tap() {
    let Some(mut wire) = Wire::new() else { return };
    let (mut device, handle) = Net::new(GUEST, Some(wire.backing()));
    let driver = Driver::activate(&mut device);
    let weak = Arc::downgrade(device.slot.lock().backing.as_ref().unwrap());
    handle.detach().unwrap();
    assert!(weak.upgrade().is_none(), "nobody holds the tap any more");
    drop(driver);
}

#[test]
fn a_tap_that_is_deleted_takes_the_link_down() {
    let Some(mut wire) = Wire::new() else { return };
    let (mut device, handle) = Net::new(GUEST, Some(wire.backing()));
    let mut driver = Driver::activate(&mut device);
    assert_passes(&mut driver, &wire);
    let generation = driver.interrupt.generation();
    wire.delete();
    until("link down", || link(&device) == 0);
    until("an interrupt", || driver.interrupt.generation() == generation + 1);
    for _ in 0..3 {
        let id = driver.submit(TX, &[Buffer::Out(&NO_HEADER), Buffer::Out(&frame(100, 0))]);
        driver.wait(TX, id);
    }
    assert_eq!(counter(&device, "tx_drops"), 3);
    // A new driver finds the link down from the start.
    device.reset();
    let mut driver = Driver::activate(&mut device);
    assert_eq!(link(&device), 0);
    let Some(mut wire) = Wire::new() else { return };
    assert!(matches!(handle.attach(wire.backing()), Err(SlotError::Occupied)));
    handle.detach().unwrap();
    let Some(mut wire) = Wire::new() else { return };
    handle.attach(wire.backing()).unwrap();
    assert_passes(&mut driver, &wire);
}

#[test]
fn a_tap_that_is_gone_cannot_be_attached() {
    let Some(mut wire) = Wire::new() else { return };
    let (mut device, handle) = Net::new(GUEST, None);
    let _driver = Driver::activate(&mut device);
    let backing = wire.backing();
    wire.delete();
    until("its end", || backing.tap.is_gone());
    let refused = handle.attach(backing);
    assert!(
        matches!(refused, Err(SlotError::Tap(TapError::Gone))),
        "{refused:?}"
    );
    assert_eq!(link(&device), 0);
}

#[test]
fn an_interface_that_is_down_loses_frames_until_it_is_up_again() {
    let Some(mut wire) = Wire::new() else { return };
    let (mut device, _handle) = Net::new(GUEST, Some(wire.backing()));
    let mut driver = Driver::activate(&mut device);
    wire.set_up(false);
    let id = driver.submit(TX, &[Buffer::Out(&NO_HEADER), Buffer::Out(&frame(100, 0))]);
    driver.wait(TX, id);
    assert_eq!((counter(&device, "tx_drops"), link(&device)), (1, LINK_UP));
    wire.set_up(true);
    assert_passes(&mut driver, &wire);
}

#[test]
fn only_taps_with_headers_can_back_a_device() {
    let refuse = |fd: OwnedFd| Tap::new(fd).unwrap_err();
    assert!(matches!(
        refuse(File::open("/dev/null").unwrap().into()),
        TapError::Kind
    ));
    assert!(matches!(
        refuse(std::io::pipe().unwrap().0.into()),
        TapError::Kind
    ));
    in_new_network(|| {
        assert!(matches!(refuse(open_tun()), TapError::Kind), "not attached");
        for flags in [
            libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR,
            libc::IFF_TAP | libc::IFF_NO_PI,
        ] {
            assert!(
                matches!(refuse(tap_with(flags)), TapError::Flags { .. }),
                "{flags:#x}"
            );
        }
    });
}
