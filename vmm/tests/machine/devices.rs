//! Devices by request: slots are filled and emptied, shares come and go, and what was not asked for is not there.

use super::*;

#[test]
fn block_slots_are_filled_and_emptied_one_backing_at_a_time() {
    let slot = |serial: &str| BlockSlot {
        serial: serial.to_owned(),
        backing: None,
    };
    let blocks = vec![slot("first"), slot("second")];
    let Some(mut vmm) = configured(&kernel(SPIN), VmConfig { blocks, ..config() }) else {
        return;
    };
    let backing = BlockBacking::whole(FdIndex(0), true);
    let attach = |slot| RequestBody::AttachBlock {
        slot,
        backing: backing.clone(),
    };
    let disk = file_of(&[0; 4096]);
    assert_eq!(vmm.request(attach(1), &[disk.as_fd()]).result, Ok(Reply::Done));
    let twice = vmm.request(attach(1), &[disk.as_fd()]).result.unwrap_err();
    assert_eq!(twice.kind, FailureKind::State);
    let absent = vmm.request(attach(2), &[disk.as_fd()]).result.unwrap_err();
    assert_eq!(absent.kind, FailureKind::Invalid);
    assert!(absent.message.contains("slot 2"), "{}", absent.message);
    let (reader, _writer) = std::io::pipe().unwrap();
    let pipe = vmm.request(attach(0), &[reader.as_fd()]).result.unwrap_err();
    assert_eq!(pipe.kind, FailureKind::Invalid, "{}", pipe.message);
    assert_eq!(
        vmm.refused(attach(0)).0,
        FailureKind::Invalid,
        "no descriptor came"
    );
    vmm.done(RequestBody::DetachBlock { slot: 1 });
    assert_eq!(
        vmm.refused(RequestBody::DetachBlock { slot: 1 }).0,
        FailureKind::State
    );
}

#[test]
fn network_slots_are_filled_and_emptied_one_tap_at_a_time() {
    let slot = |last: u8| NetSlot {
        mac: [2, 0, 0, 0, 0, last],
        backing: None,
    };
    let nets = vec![slot(1), slot(2)];
    let Some(mut vmm) = configured(&kernel(SPIN), VmConfig { nets, ..config() }) else {
        return;
    };
    let attach = |slot| RequestBody::AttachNet {
        slot,
        backing: NetBacking {
            tap: FdIndex(0),
            receive_limit: None,
            transmit_limit: None,
        },
    };
    let null = File::open("/dev/null").unwrap();
    let kind = vmm.request(attach(0), &[null.as_fd()]).result.unwrap_err();
    assert_eq!(kind.kind, FailureKind::Invalid);
    assert!(kind.message.contains("TUNSETIFF"), "{}", kind.message);
    let absent = vmm.request(attach(2), &[null.as_fd()]).result.unwrap_err();
    assert!(absent.message.contains("network slot 2"), "{}", absent.message);
    assert_eq!(
        vmm.refused(RequestBody::DetachNet { slot: 1 }).0,
        FailureKind::State
    );
    let (Some(tap), Some(other)) = (tap(), tap()) else {
        return;
    };
    for _ in 0..2 {
        assert_eq!(vmm.request(attach(1), &[tap.as_fd()]).result, Ok(Reply::Done));
        let twice = vmm.request(attach(1), &[other.as_fd()]).result.unwrap_err();
        assert_eq!(twice.kind, FailureKind::State);
        vmm.done(RequestBody::DetachNet { slot: 1 });
    }
}

/// A tap in a network namespace of its own.
fn tap() -> Option<OwnedFd> {
    let make = || {
        // SAFETY: only this thread changes its namespace.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            println!("skipped: needs root for a tap");
            return None;
        }
        let open = File::options().read(true).write(true).open("/dev/net/tun");
        let Ok(tun) = open else {
            println!("skipped: needs /dev/net/tun");
            return None;
        };
        let mut request = [0_u8; 40];
        let flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as u16;
        request[16..18].copy_from_slice(&flags.to_ne_bytes());
        // SAFETY: the kernel reads and writes one `struct ifreq`, which is there.
        let outcome = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF as _, request.as_mut_ptr()) };
        assert_eq!(outcome, 0);
        Some(OwnedFd::from(tun))
    };
    std::thread::spawn(make).join().unwrap()
}

#[test]
fn network_devices_need_addresses_to_be_told_apart_by() {
    let Some(kvm) = kvm() else { return };
    let group = [3, 0, 0, 0, 0, 1];
    for (macs, word) in [
        (vec![group], "group"),
        (vec![[0; 6]], "none"),
        (vec![[2; 6], [4; 6], [2; 6]], "network slot 2"),
    ] {
        let nets = macs
            .into_iter()
            .map(|mac| NetSlot { mac, backing: None })
            .collect();
        let kernel = file_of(&kernel(SPIN));
        let failure = Vmm::start()
            .request(
                configure(VmConfig { nets, ..config() }),
                &[kvm.as_fd(), kernel.as_fd()],
            )
            .result
            .unwrap_err();
        assert_eq!(failure.kind, FailureKind::Invalid);
        assert!(failure.message.contains(word), "{}", failure.message);
    }
}

#[test]
fn shares_come_and_go_by_name() {
    let fs_tag = Some("kata-rs".to_owned());
    let Some(mut vmm) = configured(&kernel(SPIN), VmConfig { fs_tag, ..config() }) else {
        return;
    };
    let share = |name: &str| {
        RequestBody::AddShare(Share {
            name: name.to_owned(),
            fd: FdIndex(0),
            cache: CachePolicy::Exclusive,
        })
    };
    let directory = File::open("/").unwrap();
    let mut add = |name: &str| vmm.request(share(name), &[directory.as_fd()]).result;
    assert_eq!(add("rootfs"), Ok(Reply::Done));
    assert_eq!(add("rootfs").unwrap_err().kind, FailureKind::State);
    assert_eq!(add("a/b").unwrap_err().kind, FailureKind::Invalid);
    let name = "rootfs".to_owned();
    vmm.done(RequestBody::RemoveShare { name: name.clone() });
    assert_eq!(
        vmm.refused(RequestBody::RemoveShare { name }).0,
        FailureKind::Invalid
    );
}

#[test]
fn devices_that_were_not_asked_for_cannot_be_driven() {
    let Some(mut vmm) = configured(&kernel(SPIN), config()) else {
        return;
    };
    assert_eq!(
        vmm.refused(RequestBody::SetBalloon { target_mib: 16 }),
        (FailureKind::Invalid, "this VM has no balloon".to_owned())
    );
    assert_eq!(
        vmm.refused(RequestBody::SetPluggedMemory { mib: 0 }),
        (FailureKind::Invalid, "this VM has no pluggable memory".to_owned())
    );
    assert_eq!(
        vmm.refused(RequestBody::DetachBlock { slot: 0 }).0,
        FailureKind::Invalid
    );
    assert_eq!(
        vmm.refused(RequestBody::DetachNet { slot: 0 }).0,
        FailureKind::Invalid
    );
    let name = "x".to_owned();
    assert_eq!(
        vmm.refused(RequestBody::RemoveShare { name }).0,
        FailureKind::Invalid
    );
}

#[test]
fn more_devices_than_interrupts_are_refused() {
    let slot = BlockSlot {
        serial: String::new(),
        backing: None,
    };
    let Some(kvm) = kvm() else { return };
    let kernel = file_of(&kernel(SPIN));
    let description = VmConfig {
        nets: Vec::new(),
        blocks: vec![slot; 22],
        ..config()
    };
    let failure = Vmm::start()
        .request(configure(description), &[kvm.as_fd(), kernel.as_fd()])
        .result
        .unwrap_err();
    assert_eq!(failure.kind, FailureKind::Invalid);
    assert!(failure.message.contains("24 devices"), "{}", failure.message);
}
