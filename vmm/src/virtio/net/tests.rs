//! The device with a driver before it and a real tap behind it, each in a network namespace of its own. Needs root
//! and /dev/net/tun; skipped, with the reason printed, without them.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use super::header::{LENGTH, MAX_FRAME};
use super::*;
use crate::virtio::test_driver::{Buffer, Descriptor, Driver, INDIRECT, NEXT};

const RX: usize = 0;
const TX: usize = 1;
/// "Local experimental": nothing else on the wire uses it.
const ETHERTYPE: u16 = 0x88b5;
const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 1];
const NO_HEADER: [u8; LENGTH] = [0; LENGTH];

/// The host's side of a tap: what the interface is steered by, and a socket that sees its frames.
struct Wire {
    tap: Option<OwnedFd>,
    frames: OwnedFd,
    /// For IP, with the header before each frame that says how it is to be segmented.
    segmented: OwnedFd,
    control: OwnedFd,
    routes: OwnedFd,
    index: i32,
}

/// `struct ifreq` with the members that are needed.
#[repr(C)]
struct Request {
    name: [u8; 16],
    value: [i32; 6],
}

fn request(value: i32) -> Request {
    let mut name = [0; 16];
    name[..4].copy_from_slice(b"tap0");
    Request {
        name,
        value: [value, 0, 0, 0, 0, 0],
    }
}

fn ioctl(fd: &OwnedFd, number: libc::Ioctl, request: &mut Request) {
    // SAFETY: every request used here reads or writes a `struct ifreq`.
    let outcome = unsafe { libc::ioctl(fd.as_raw_fd(), number as _, request as *mut Request) };
    assert_eq!(outcome, 0, "{}", std::io::Error::last_os_error());
}

fn socket(domain: i32, kind: i32, protocol: i32) -> OwnedFd {
    // SAFETY: plain numbers; the descriptor is new.
    let fd = unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol) };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: as above.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A socket for all frames of one type that pass through the interface.
fn packets(index: i32, ethertype: u16) -> OwnedFd {
    let protocol = ethertype.to_be();
    let frames = socket(libc::AF_PACKET, libc::SOCK_RAW, i32::from(protocol));
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: protocol,
        sll_ifindex: index,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let length = size_of::<libc::sockaddr_ll>() as u32;
    // SAFETY: the address is of the length that goes with it.
    let bound = unsafe { libc::bind(frames.as_raw_fd(), (&raw const address).cast(), length) };
    assert_eq!(bound, 0, "{}", std::io::Error::last_os_error());
    let timeout = rustix::net::sockopt::Timeout::Recv;
    rustix::net::sockopt::set_socket_timeout(&frames, timeout, Some(Duration::from_secs(20))).unwrap();
    frames
}

/// The same, with a `struct virtio_net_hdr` of ten bytes before each frame (packet(7), `PACKET_VNET_HDR`).
fn with_headers(socket: OwnedFd) -> OwnedFd {
    let on = 1_i32;
    // SAFETY: the kernel reads one int, which is there.
    let outcome = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_VNET_HDR,
            (&raw const on).cast(),
            4,
        )
    };
    assert_eq!(outcome, 0, "{}", std::io::Error::last_os_error());
    socket
}

fn open_tun() -> OwnedFd {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap()
        .into()
}

fn tap_with(flags: i32) -> OwnedFd {
    let tap = open_tun();
    ioctl(&tap, libc::TUNSETIFF, &mut request(flags));
    tap
}

/// Runs on a thread in a network namespace of its own, or says why not.
fn in_new_network<T: Send>(body: impl FnOnce() -> T + Send) -> Option<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: only this thread changes its namespace.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 || !std::fs::exists("/dev/net/tun").unwrap()
            {
                println!("skipped: needs root and /dev/net/tun");
                return None;
            }
            // No frames but the test's.
            std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
            Some(body())
        });
        thread.join().unwrap()
    })
}

impl Wire {
    fn new() -> Option<Self> {
        in_new_network(|| {
            let tap = tap_with(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
            let control = socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
            let mut index = request(0);
            ioctl(&control, libc::SIOCGIFINDEX, &mut index);
            let index = index.value[0];
            // A socket that is bound to an interface that is down begins with an error.
            ioctl(&control, libc::SIOCSIFFLAGS, &mut request(libc::IFF_UP));
            Self {
                tap: Some(tap),
                frames: packets(index, ETHERTYPE),
                segmented: with_headers(packets(index, libc::ETH_P_IP as u16)),
                control,
                routes: socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE),
                index,
            }
        })
    }

    fn set_up(&self, up: bool) {
        ioctl(
            &self.control,
            libc::SIOCSIFFLAGS,
            &mut request(if up { libc::IFF_UP } else { 0 }),
        );
        // Takes the error that going down has left.
        let _ = rustix::net::sockopt::socket_error(&self.frames);
    }

    fn set_mtu(&self, mtu: i32) {
        ioctl(&self.control, libc::SIOCSIFMTU, &mut request(mtu));
    }

    /// Deletes the interface, whoever holds it.
    fn delete(&self) {
        let mut message = Vec::new();
        // `struct nlmsghdr`, `struct ifinfomsg` (rtnetlink(7)).
        for word in [
            32,
            u32::from(libc::RTM_DELLINK) | (libc::NLM_F_REQUEST as u32) << 16,
            1,
            0,
            0,
        ] {
            message.extend(word.to_ne_bytes());
        }
        message.extend(self.index.to_ne_bytes());
        message.extend([0; 8]);
        assert_eq!(rustix::io::write(&self.routes, &message).unwrap(), 32);
    }

    fn backing(&mut self) -> Backing {
        self.limited(Limit::default(), Limit::default())
    }

    fn limited(&mut self, receive: Limit, send: Limit) -> Backing {
        Backing::new(Tap::new(self.tap.take().unwrap()).unwrap(), receive, send)
    }

    /// Puts a frame on the wire, towards the guest.
    fn send(&self, frame: &[u8]) {
        assert_eq!(rustix::io::write(&self.frames, frame).unwrap(), frame.len());
    }

    /// The next frame that the guest has sent.
    fn receive(&self) -> Vec<u8> {
        let mut frame = vec![0; 70_000];
        let length = rustix::io::read(&self.frames, &mut frame).unwrap();
        frame.truncate(length);
        frame
    }
}

fn frame(length: usize, seed: u8) -> Vec<u8> {
    let mut bytes = vec![0xff; 12];
    bytes[6..].copy_from_slice(&GUEST);
    bytes.extend(ETHERTYPE.to_be_bytes());
    bytes.extend((14..length).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)));
    bytes
}

/// What the driver gets for a frame that fills `buffers` of its chains.
fn with_header(frame: &[u8], buffers: u16) -> Vec<u8> {
    let mut bytes = NO_HEADER.to_vec();
    bytes[10..].copy_from_slice(&buffers.to_le_bytes());
    bytes.extend(frame);
    bytes
}

/// `struct virtio_net_hdr` for [`tcp`]: segments of 1448 bytes of data, checksums still to be made.
const SEGMENTED: [u8; LENGTH] = [1, 1, 54, 0, 0xa8, 0x05, 34, 0, 16, 0, 0, 0];

/// A TCP segment over IPv4, longer than any wire takes.
fn tcp(payload: usize) -> Vec<u8> {
    let mut bytes = vec![0xff; 6];
    bytes.extend(GUEST);
    bytes.extend([8, 0, 0x45, 0]);
    bytes.extend(((40 + payload) as u16).to_be_bytes());
    bytes.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    let sum: u32 = bytes[14..34]
        .chunks(2)
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
        .sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    bytes[24..26].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    bytes.extend([
        0, 80, 0, 90, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0,
    ]);
    bytes.extend((0..payload).map(|at| (at / 7) as u8));
    bytes
}

fn counter(device: &Net, name: &str) -> u64 {
    let counters = device.counters();
    counters.iter().find(|(key, _)| key == name).unwrap().1
}

#[track_caller]
fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_micros(100));
    }
}

fn link(device: &Net) -> u16 {
    let mut bytes = [0; 2];
    device.read_config(6, &mut bytes);
    u16::from_le_bytes(bytes)
}

fn activate(device: &mut Net, features: u64) -> Driver {
    let mut driver = Driver::new(device.queue_sizes());
    device.activate(driver.activation(features)).unwrap();
    driver
}

/// Frames pass in both directions.
fn assert_passes(driver: &mut Driver, wire: &Wire) {
    let ids: Vec<_> = (0..4).map(|_| driver.submit(RX, &[Buffer::In(2048)])).collect();
    for (seed, id) in ids.into_iter().enumerate() {
        let frame = frame(60 + seed * 400, seed as u8);
        wire.send(&frame);
        assert_eq!(driver.wait(RX, id), with_header(&frame, 1));
        let sent = driver.submit(TX, &[Buffer::Out(&NO_HEADER), Buffer::Out(&frame)]);
        assert!(driver.wait(TX, sent).is_empty());
        assert_eq!(wire.receive(), frame);
    }
}

#[test]
fn frames_pass_in_both_directions_however_their_buffers_are_cut() {
    let Some(mut wire) = Wire::new() else { return };
    let (mut device, _handle) = Net::new(GUEST, Some(wire.backing()));
    let mut driver = Driver::activate(&mut device);
    assert_passes(&mut driver, &wire);
    let bytes = frame(1514, 9);
    let whole = [&NO_HEADER[..], &bytes].concat();
    let (front, back) = whole.split_at(5);
    let (middle, back) = back.split_at(700);
    for buffers in [
        vec![Buffer::Out(&whole)],
        vec![Buffer::Out(front), Buffer::Out(middle), Buffer::Out(back)],
    ] {
        let id = driver.submit(TX, &buffers);
        assert!(driver.wait(TX, id).is_empty());
        assert_eq!(wire.receive(), bytes);
    }
    let id = driver.submit(
        RX,
        &[Buffer::In(11), Buffer::In(1), Buffer::In(300), Buffer::In(2000)],
    );
    wire.send(&bytes);
    assert_eq!(driver.wait(RX, id), with_header(&bytes, 1));
    let of_assert: u64 = (0..4).map(|seed| 60 + seed * 400).sum();
    for (name, value) in [
        ("rx_packets", 5),
        ("rx_bytes", of_assert + 1514),
        ("tx_packets", 6),
        ("tx_bytes", of_assert + 2 * 1514),
        ("rx_drops", 0),
        ("tx_drops", 0),
        ("tx_errors", 0),
        ("violations", 0),
    ] {
        assert_eq!(counter(&device, name), value, "{name}");
    }
}

#[test]
fn a_long_frame_fills_several_buffers_that_come_back_together() {
    let Some(mut wire) = Wire::new() else { return };
    wire.set_mtu(60_000);
    let (mut device, _handle) = Net::new(GUEST, Some(wire.backing()));
    let mut driver = Driver::activate(&mut device);
    let ids: Vec<_> = (0..100).map(|_| driver.submit(RX, &[Buffer::In(1536)])).collect();
    let mut next = 0;
    for length in [1524, 1525, 10_000, 100, 60_000] {
        let bytes = frame(length, 1);
        let buffers = (length + LENGTH).div_ceil(1536);
        wire.send(&bytes);
        let mut got = Vec::new();
        for &id in &ids[next..next + buffers] {
            let part = driver.wait(RX, id);
            assert!(
                part.len() == 1536 || id == ids[next + buffers - 1],
                "only the last may have room"
            );
            got.extend(part);
        }
        assert_eq!(got, with_header(&bytes, buffers as u16), "{length}");
        next += buffers;
    }
    assert_eq!(counter(&device, "rx_packets"), 5);
}

#[test]
fn a_driver_with_little_room_loses_only_what_does_not_fit() {
    let Some(mut wire) = Wire::new() else { return };
    wire.set_mtu(9000);
    let (mut device, _handle) = Net::new(GUEST, Some(wire.backing()));
    let mut driver = activate(&mut device, ALWAYS);
    let ids = [
        driver.prepare(RX, &[Buffer::In(1536)]),
        driver.prepare(RX, &[Buffer::In(1536)]),
    ];
    driver.kick(RX);
    wire.send(&frame(9000, 1));
    wire.send(&frame(3061, 2));
    until("losses", || counter(&device, "rx_drops") == 2);
    wire.send(&frame(3060, 3));
    let got = [driver.wait(RX, ids[0]), driver.wait(RX, ids[1])].concat();
    assert_eq!(got, with_header(&frame(3060, 3), 2));
}

#[test]
fn without_mergeable_buffers_each_frame_has_one_of_its_own() {
    let Some(mut wire) = Wire::new() else { return };
    wire.set_mtu(9000);
    let (mut device, _handle) = Net::new(GUEST, Some(wire.backing()));
    let mut driver = activate(&mut device, ALWAYS & !feature::MRG_RXBUF);
    let ids = [0; 3].map(|_| driver.submit(RX, &[Buffer::In(1536)]));
    wire.send(&frame(1000, 1));
    assert_eq!(driver.wait(RX, ids[0]), with_header(&frame(1000, 1), 1));
    wire.send(&frame(1525, 2));
    until("a loss", || counter(&device, "rx_drops") == 1);
    wire.send(&frame(1524, 3));
    assert_eq!(driver.wait(RX, ids[1]), with_header(&frame(1524, 3), 1));
}

#[test]
fn the_driver_is_interrupted_only_when_it_wants_to_be() {
    let Some(mut wire) = Wire::new() else { return };
    let (mut device, _handle) = Net::new(GUEST, Some(wire.backing()));
    let mut driver = Driver::activate(&mut device);
    let ids = [0; 3].map(|_| driver.submit(RX, &[Buffer::In(1536)]));
    wire.send(&frame(100, 0));
    until("an interrupt", || driver.line.read().is_ok());
    // The driver has not looked: it does not want to hear of the second.
    wire.send(&frame(100, 1));
    until("the second frame", || counter(&device, "rx_packets") == 2);
    std::thread::sleep(Duration::from_millis(20));
    assert!(driver.line.read().is_err(), "no interrupt for the second");
    driver.wait(RX, ids[0]);
    driver.wait(RX, ids[1]);
    wire.send(&frame(100, 2));
    until("an interrupt again", || driver.line.read().is_ok());
}

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
fn a_device_can_be_reset_and_used_again() {
    let Some(mut wire) = Wire::new() else { return };
    let (mut device, _handle) = Net::new(GUEST, Some(wire.backing()));
    for _ in 0..3 {
        let mut driver = Driver::activate(&mut device);
        assert_passes(&mut driver, &wire);
        driver.submit(RX, &[Buffer::In(1536)]);
        device.reset();
    }
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

#[test]
fn offloads_follow_what_the_driver_has_accepted() {
    use feature::*;
    assert_eq!(offloads(!GUEST_CSUM), 0);
    assert_eq!(offloads(GUEST_CSUM), libc::TUN_F_CSUM);
    assert_eq!(offloads(GUEST_CSUM | GUEST_ECN), libc::TUN_F_CSUM);
    assert_eq!(
        offloads(GUEST_CSUM | GUEST_TSO6 | GUEST_ECN | GUEST_USO4),
        libc::TUN_F_CSUM | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN
    );
    assert_eq!(offloads(ALWAYS | USO), 0x6f);
}

#[test]
fn the_configuration_is_address_and_status() {
    let (device, _handle) = Net::new(GUEST, None);
    let mut space = [0xff; 10];
    device.read_config(0, &mut space);
    assert_eq!(space, [2, 0, 0, 0, 0, 1, 0, 0, 0, 0]);
}

#[test]
fn segmentation_is_left_to_whoever_is_last() {
    let Some(mut wire) = Wire::new() else { return };
    let (mut device, _handle) = Net::new(GUEST, Some(wire.backing()));
    let whole = tcp(20_000);
    let from_host = [&SEGMENTED[..10], &whole].concat();
    let mut driver = Driver::activate(&mut device);
    let ids: Vec<_> = (0..100).map(|_| driver.submit(RX, &[Buffer::In(1536)])).collect();
    rustix::io::write(&wire.segmented, &from_host).unwrap();
    let got: Vec<_> = ids[..14].iter().flat_map(|&id| driver.wait(RX, id)).collect();
    let mut header = SEGMENTED;
    header[10] = 14;
    assert_eq!(got[..LENGTH], header);
    assert!(got[LENGTH..] == whole, "one frame for the guest");

    let id = driver.submit(TX, &[Buffer::Out(&SEGMENTED), Buffer::Out(&whole)]);
    driver.wait(TX, id);
    let mut frame = vec![0; 70_000];
    let length = rustix::io::read(&wire.segmented, &mut frame).unwrap();
    assert!(frame[..length] == from_host, "one frame for the host");

    // A driver that cannot: fourteen frames for the guest, each with its own checksum.
    device.reset();
    let mut driver = activate(&mut device, ALWAYS & !(feature::GUEST_TSO4 | feature::GUEST_CSUM));
    let ids: Vec<_> = (0..100).map(|_| driver.submit(RX, &[Buffer::In(1536)])).collect();
    rustix::io::write(&wire.segmented, &from_host).unwrap();
    let mut data = Vec::new();
    for &id in &ids[..14] {
        let got = driver.wait(RX, id);
        assert_eq!(got[..LENGTH], with_header(&[], 1));
        data.extend_from_slice(&got[LENGTH + 54..]);
    }
    assert!(data == whole[54..], "the same data in the same order");
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
