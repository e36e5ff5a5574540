//! The device seen from both ends: a driver in a guest, and the sandbox behind the channel.

mod closing;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::time::Duration;

use protocol::channel::{self, Received};
use protocol::stream::VsockOpen;

use super::connection::{BUFFER, Connection, Ports, Verdict};
use super::packet::{
    HEADER_SIZE, Header, Operation, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};
use super::*;
use crate::virtio::queue::Iovecs;
use crate::virtio::test_driver::{Buffer, Driver};

const CID: u32 = 3;
const PORT: u32 = 1024;
const GUEST_PORT: u32 = 777;

/// A guest with its vsock driver, and the host's end of the channel.
struct World {
    device: Vsock,
    driver: Driver,
    channel: OwnedFd,
    connected: mpsc::Receiver<u32>,
    posted: Vec<u16>,
}

fn world() -> World {
    let (channel, theirs) = channel::pair().unwrap();
    let (sender, connected) = mpsc::channel();
    let mut device = Vsock::new(CID, theirs, Box::new(move |port| sender.send(port).unwrap()));
    let driver = Driver::activate(&mut device);
    World {
        device,
        driver,
        channel,
        connected,
        posted: Vec::new(),
    }
}

fn header(operation: Operation, length: usize) -> Header {
    Header {
        source_cid: u64::from(CID),
        destination_cid: 2,
        source_port: GUEST_PORT,
        destination_port: PORT,
        length: length as u32,
        kind: TYPE_STREAM,
        operation: operation as u16,
        flags: 0,
        allocated: 256 * 1024,
        forwarded: 0,
    }
}

impl World {
    fn post(&mut self, count: usize) {
        for _ in 0..count {
            self.posted
                .push(self.driver.submit(0, &[Buffer::In(HEADER_SIZE + 4096)]));
        }
    }

    /// Sends a packet and waits until the device has taken it.
    fn send(&mut self, header: Header, payload: &[u8]) {
        let header = header.encode();
        let mut buffers = vec![Buffer::Out(&header)];
        if !payload.is_empty() {
            buffers.push(Buffer::Out(payload));
        }
        let id = self.driver.submit(1, &buffers);
        self.driver.wait(1, id);
    }

    /// The next packet for the guest, if it comes within the time.
    fn try_receive(&mut self, wait: Duration) -> Option<(Header, Vec<u8>)> {
        let deadline = std::time::Instant::now() + wait;
        loop {
            if let Some((_, bytes)) = self.driver.reap(0) {
                let head = bytes[..HEADER_SIZE].try_into().unwrap();
                return Some((Header::decode(head), bytes[HEADER_SIZE..].to_vec()));
            }
            if std::time::Instant::now() > deadline {
                return None;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    fn receive(&mut self) -> (Header, Vec<u8>) {
        self.post(1);
        self.try_receive(Duration::from_secs(20)).expect("no packet came")
    }

    fn receive_operation(&mut self) -> (Operation, u32) {
        let (header, _) = self.receive();
        (header.operation().unwrap(), header.flags)
    }

    fn accept(&self) -> (u32, UnixStream) {
        let Received::Message(message, mut fds) = channel::receive(&self.channel).unwrap() else {
            panic!("closed")
        };
        let open: VsockOpen = serde_json::from_slice(&message).unwrap();
        (open.port, UnixStream::from(fds.pop().unwrap()))
    }

    /// A connection made by the guest.
    fn connect(&mut self) -> UnixStream {
        self.send(header(Operation::Request, 0), &[]);
        let (port, stream) = self.accept();
        assert_eq!(port, PORT);
        assert_eq!(self.receive_operation(), (Operation::Response, 0));
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    fn shutdown(&mut self, flags: u32) {
        self.send(
            Header {
                flags,
                ..header(Operation::Shutdown, 0)
            },
            &[],
        );
    }

    fn counter(&self, name: &str) -> u64 {
        self.device
            .counters()
            .into_iter()
            .find(|(n, _)| n == name)
            .unwrap()
            .1
    }
}

#[test]
fn the_guest_connects_and_both_sides_talk() {
    let mut world = world();
    let mut stream = world.connect();
    assert_eq!(world.connected.recv().unwrap(), PORT);
    world.send(header(Operation::ReadWrite, 5), b"hello");
    let mut bytes = [0; 5];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello");
    stream.write_all(b"good day").unwrap();
    let (header, payload) = world.receive();
    assert_eq!(
        (header.operation(), payload.as_slice()),
        (Some(Operation::ReadWrite), &b"good day"[..])
    );
    assert_eq!((header.source_cid, header.destination_cid), (2, u64::from(CID)));
    assert_eq!((header.source_port, header.destination_port), (PORT, GUEST_PORT));
    assert_eq!((header.allocated, header.forwarded), (BUFFER, 5));
    let mut cid = [0xff; 16];
    world.device.read_config(0, &mut cid);
    assert_eq!(u128::from_le_bytes(cid), u128::from(CID));
}

#[test]
fn the_host_connects_to_a_listening_guest_and_sees_a_refusal_as_end_of_file() {
    let mut world = world();
    let mut open = |port| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let message = serde_json::to_vec(&VsockOpen { port }).unwrap();
        channel::send(&world.channel, &message, &[theirs.as_fd()]).unwrap();
        drop(theirs);
        let (request, _) = world.receive();
        assert_eq!(
            (request.operation(), request.destination_port),
            (Some(Operation::Request), port)
        );
        (
            ours,
            Header {
                source_port: port,
                destination_port: request.source_port,
                ..header(Operation::Response, 0)
            },
        )
    };
    let (mut stream, response) = open(5000);
    let (mut refused, reset) = open(5001);
    world.send(response, &[]);
    world.send(
        Header {
            operation: Operation::ReadWrite as u16,
            length: 2,
            ..response
        },
        b"ok",
    );
    let mut bytes = [0; 2];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"ok");
    world.send(
        Header {
            operation: Operation::Reset as u16,
            ..reset
        },
        &[],
    );
    assert_eq!(refused.read(&mut bytes).unwrap(), 0);
}

#[test]
fn a_hundred_megabytes_pass_each_way_unharmed() {
    const TOTAL: usize = 100 << 20;
    let byte = |at: usize| (at.wrapping_mul(0x9e37_79b1) >> 13) as u8;
    let block = |at: usize, length: usize| (at..at + length).map(byte).collect::<Vec<u8>>();
    let mut world = world();
    let mut stream = world.connect();
    let mut writer = stream.try_clone().unwrap();
    let pattern = block(0, 1 << 20);
    let host_pattern = pattern.clone();
    let (reader_done, reader_result) = mpsc::channel();
    let reading = std::thread::spawn(move || {
        let mut bytes = vec![0; 1 << 20];
        for _ in 0..TOTAL >> 20 {
            stream.read_exact(&mut bytes).unwrap();
            assert!(bytes == host_pattern, "bytes from the guest have changed");
        }
        reader_done.send(stream.read(&mut bytes).unwrap()).unwrap();
    });
    let host_pattern = pattern.clone();
    let writing = std::thread::spawn(move || {
        for _ in 0..TOTAL >> 20 {
            writer.write_all(&host_pattern).unwrap();
        }
        writer.shutdown(Shutdown::Write).unwrap();
    });

    let (mut sent, mut received, mut credit, mut host_ended) = (0usize, 0usize, BUFFER as usize, false);
    world.post(64);
    let mut posted = 64;
    let mut last = std::time::Instant::now();
    while sent < TOTAL || received < TOTAL || !host_ended {
        while sent < TOTAL && credit - sent >= 65536 && world.driver.free(1) >= 2 {
            let at = sent % (1 << 20);
            let packet = Header {
                forwarded: received as u32,
                ..header(Operation::ReadWrite, 65536)
            }
            .encode();
            world
                .driver
                .submit(1, &[Buffer::Out(&packet), Buffer::Out(&pattern[at..at + 65536])]);
            sent += 65536;
            last = std::time::Instant::now();
        }
        while world.driver.reap(1).is_some() {}
        while let Some((_, bytes)) = world.driver.reap(0) {
            last = std::time::Instant::now();
            posted -= 1;
            let header = Header::decode(bytes[..HEADER_SIZE].try_into().unwrap());
            let forwarded = credit - BUFFER as usize;
            credit = forwarded + header.forwarded.wrapping_sub(forwarded as u32) as usize + BUFFER as usize;
            match header.operation().unwrap() {
                Operation::ReadWrite => {
                    let payload = &bytes[HEADER_SIZE..];
                    let at = received % (1 << 20);
                    let first = payload.len().min((1 << 20) - at);
                    assert!(
                        payload[..first] == pattern[at..at + first]
                            && payload[first..] == pattern[..payload.len() - first]
                    );
                    received += payload.len();
                }
                Operation::CreditRequest | Operation::CreditUpdate => {}
                Operation::Shutdown => host_ended = header.flags == SHUTDOWN_SEND,
                other => panic!("{other:?}"),
            }
            if received % 65536 < 4096 && world.driver.free(1) > 0 {
                let update = Header {
                    forwarded: received as u32,
                    ..self::header(Operation::CreditUpdate, 0)
                }
                .encode();
                world.driver.submit(1, &[Buffer::Out(&update)]);
            }
        }
        if posted < 32 {
            world.post(32);
            posted += 32;
        }
        assert!(
            last.elapsed() < Duration::from_secs(20),
            "stuck at {sent} sent, {received} received, {credit}"
        );
    }
    world.shutdown(SHUTDOWN_SEND);
    assert_eq!(
        reader_result.recv_timeout(Duration::from_secs(20)).unwrap(),
        0,
        "the guest's half-close is end of file"
    );
    reading.join().unwrap();
    writing.join().unwrap();
    assert_eq!(world.counter("bytes_from_guest"), TOTAL as u64);
    assert_eq!(world.counter("bytes_to_guest"), TOTAL as u64);
}

#[test]
fn data_waits_until_the_guest_offers_buffers_and_credit() {
    let mut world = world();
    let mut stream = world.connect();
    world.send(
        Header {
            allocated: 10,
            ..header(Operation::CreditUpdate, 0)
        },
        &[],
    );
    stream.write_all(b"0123456789abcdef").unwrap();
    assert!(
        world.try_receive(Duration::from_millis(50)).is_none(),
        "no buffer was offered"
    );
    let (header_seen, payload) = world.receive();
    assert_eq!(
        (header_seen.operation(), payload.as_slice()),
        (Some(Operation::ReadWrite), &b"0123456789"[..])
    );
    assert_eq!(world.receive_operation().0, Operation::CreditRequest);
    world.post(1);
    assert!(
        world.try_receive(Duration::from_millis(50)).is_none(),
        "no credit is left"
    );
    world.send(
        Header {
            allocated: 10,
            forwarded: 10,
            ..header(Operation::CreditUpdate, 0)
        },
        &[],
    );
    assert_eq!(world.try_receive(Duration::from_secs(20)).unwrap().1, b"abcdef");
}

#[test]
fn packets_that_make_no_sense_are_reset_or_dropped() {
    let mut world = world();
    let bad = |h: Header| h;
    for (name, packet) in [
        ("unknown connection", bad(header(Operation::ReadWrite, 0))),
        (
            "unknown operation",
            Header {
                operation: 99,
                ..header(Operation::Request, 0)
            },
        ),
        (
            "other context",
            Header {
                destination_cid: 9,
                ..header(Operation::Request, 0)
            },
        ),
        (
            "other type",
            Header {
                kind: 2,
                ..header(Operation::Request, 0)
            },
        ),
        ("shutdown of nothing", header(Operation::Shutdown, 0)),
    ] {
        world.send(packet, &[]);
        let (answer, _) = world.receive();
        assert_eq!(answer.operation(), Some(Operation::Reset), "{name}");
        assert_eq!(
            (answer.destination_port, answer.source_port),
            (GUEST_PORT, PORT),
            "{name}"
        );
    }
    assert_eq!(world.counter("violations"), 0);
    world.send(
        Header {
            source_cid: 4,
            ..header(Operation::Request, 0)
        },
        &[],
    );
    world.send(
        Header {
            length: 1 << 20,
            ..header(Operation::ReadWrite, 0)
        },
        &[],
    );
    world.send(header(Operation::ReadWrite, 100), b"short");
    let id = world.driver.submit(1, &[Buffer::Out(b"tiny")]);
    world.driver.wait(1, id);
    assert_eq!(world.counter("violations"), 4);
    world.post(1);
    assert!(world.try_receive(Duration::from_millis(20)).is_none());
    // And it still works.
    world.send(header(Operation::Request, 0), &[]);
    assert_eq!(
        world.try_receive(Duration::from_secs(20)).unwrap().0.operation(),
        Some(Operation::Response)
    );
}

#[test]
fn a_chain_that_cannot_take_a_header_is_given_back_empty() {
    let mut world = world();
    let id = world.driver.submit(0, &[Buffer::In(10)]);
    world.send(header(Operation::Request, 0), &[]);
    assert!(world.driver.wait(0, id).is_empty());
    assert_eq!(
        world.receive_operation().0,
        Operation::Response,
        "the packet was not lost"
    );
}

#[test]
fn without_a_sandbox_connections_are_reset() {
    let mut world = world();
    let (other, _) = channel::pair().unwrap();
    drop(std::mem::replace(&mut world.channel, other));
    world.send(header(Operation::Request, 0), &[]);
    assert_eq!(world.receive_operation().0, Operation::Reset);
}

#[test]
fn after_a_reset_the_device_starts_afresh() {
    let mut world = world();
    let mut stream = world.connect();
    world.device.reset();
    assert_eq!(
        stream.read(&mut [0; 1]).unwrap(),
        0,
        "connections end with the device"
    );
    world.driver = Driver::activate(&mut world.device);
    world.connect();
}
