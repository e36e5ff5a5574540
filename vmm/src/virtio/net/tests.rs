//! The device with a driver before it and a real tap behind it, each in a network namespace of its own. Needs root
//! and /dev/net/tun; skipped, with the reason printed, without them.

mod load;
mod slot;

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
