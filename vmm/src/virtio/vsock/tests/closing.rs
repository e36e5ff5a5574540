//! How connections end, by halves and at once.

use super::*;

#[test]
fn the_guest_may_end_its_half_and_still_receive() {
    let mut world = world();
    let mut stream = world.connect();
    world.send(header(Operation::ReadWrite, 4), b"last");
    world.shutdown(SHUTDOWN_SEND);
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text, "last");
    stream.write_all(b"answer").unwrap();
    assert_eq!(world.receive().1, b"answer");
    stream.shutdown(Shutdown::Write).unwrap();
    let (operation, flags) = world.receive_operation();
    assert_eq!(
        (operation, flags & SHUTDOWN_SEND),
        (Operation::Shutdown, SHUTDOWN_SEND)
    );
    world.shutdown(SHUTDOWN_BOTH);
    while world.receive_operation().0 != Operation::Reset {}
}

#[test]
fn a_connection_whose_half_the_guest_has_ended_falls_silent() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let poller = Workers::new().unwrap().poller().unwrap();
    let watched = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    poller.add(ours.as_raw_fd(), 7, watched).unwrap();
    let ports = Ports {
        host: PORT,
        guest: GUEST_PORT,
    };
    let mut connection = Connection::from_guest(ports, ours.into(), &header(Operation::Request, 0));
    let end = Header {
        flags: SHUTDOWN_SEND,
        ..header(Operation::Shutdown, 0)
    };
    let memory = Driver::new(&[]).memory;
    let verdict = connection.receive(&end, &memory, &Chain::default(), &mut Iovecs::default());
    assert_eq!(verdict, Verdict::Keep);
    let mut events = Events::default();
    for _ in 0..8 {
        let reported = poller.wait(&mut events, false).unwrap();
        if reported.is_empty() {
            return;
        }
        for event in reported {
            connection.socket_event(event.event_set());
        }
    }
    panic!("there is no end of events");
}

#[test]
fn the_host_may_end_its_half_and_still_receive() {
    let mut world = world();
    let mut stream = world.connect();
    stream.write_all(b"end").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(world.receive().1, b"end");
    assert_eq!(world.receive_operation(), (Operation::Shutdown, SHUTDOWN_SEND));
    world.send(header(Operation::ReadWrite, 5), b"later");
    world.shutdown(SHUTDOWN_BOTH);
    assert_eq!(world.receive_operation(), (Operation::Reset, 0));
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text, "later");
}

#[test]
fn what_the_guest_sent_before_it_closed_reaches_a_slow_host() {
    let mut world = world();
    let mut stream = world.connect();
    let block = vec![7; 65536];
    // More than the socket takes at once; the rest must wait in the device.
    let mut credit = BUFFER as usize;
    let mut sent = 0;
    while credit - sent >= block.len() {
        world.send(header(Operation::ReadWrite, block.len()), &block);
        sent += block.len();
        world.post(1);
        while let Some((header, _)) = world.try_receive(Duration::from_millis(20)) {
            credit = header.forwarded as usize + BUFFER as usize;
            world.post(1);
        }
    }
    assert!(sent > BUFFER as usize, "the socket has taken something");
    world.shutdown(SHUTDOWN_BOTH);
    while world.receive_operation().0 != Operation::Reset {}
    // The guest may use the same port again while the old bytes are still on their way.
    let second = world.connect();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len(), sent);
    assert!(bytes.iter().all(|&b| b == 7));
    drop(second);
}

#[test]
fn a_guest_that_overruns_its_credit_is_reset() {
    let mut world = world();
    let stream = world.connect();
    let block = vec![1; 65536];
    let mut sent = 0;
    while world.counter("resets") == 0 {
        world.send(header(Operation::ReadWrite, block.len()), &block);
        sent += block.len();
        assert!(sent < 16 << 20, "nobody reads, so this must end");
    }
    assert_eq!(world.counter("violations"), 1);
    drop(stream);
}

#[test]
fn a_host_that_closes_shows_as_shutdown_of_both_halves() {
    let mut world = world();
    let mut stream = world.connect();
    stream.write_all(b"bye").unwrap();
    drop(stream);
    let mut data = Vec::new();
    loop {
        let (header, payload) = world.receive();
        data.extend(payload);
        if header.operation() == Some(Operation::Shutdown) && header.flags == SHUTDOWN_BOTH {
            break;
        }
    }
    assert_eq!(data, b"bye");
    world.send(header(Operation::ReadWrite, 4), b"late");
    world.send(header(Operation::Reset, 0), &[]);
    world.connect();
}

#[test]
fn a_host_that_stops_reading_is_told_to_the_guest() {
    let mut world = world();
    let stream = world.connect();
    stream.shutdown(Shutdown::Read).unwrap();
    world.send(header(Operation::ReadWrite, 4), b"dead");
    assert_eq!(world.receive_operation(), (Operation::Shutdown, SHUTDOWN_RECEIVE));
}

#[test]
fn a_host_that_writes_to_a_guest_that_receives_no_more_gets_a_broken_pipe() {
    let mut world = world();
    let mut stream = world.connect();
    world.shutdown(SHUTDOWN_RECEIVE);
    world.send(header(Operation::CreditUpdate, 0), &[]);
    assert_eq!(
        stream.write(b"x").unwrap_err().kind(),
        std::io::ErrorKind::BrokenPipe
    );
}
