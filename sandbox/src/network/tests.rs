//! Against the kernel, in network namespaces of the tests' own: `pod` is the end of a veth pair in the pod's namespace,
//! `peer` the one outside.

use std::io::{Read, Write};
use std::process::Command;

use netlink::route::RTN_UNREACHABLE;

use super::leftovers::clean_up_here;
use super::*;
use crate::error::ErrorKind;

/// Length of the header before each packet on a tap: `struct virtio_net_hdr`.
const VNET_HEADER: usize = 10;

/// Runs a test on a thread in a namespace of its own; skips it where there can be none.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root may make a network namespace");
        return;
    }
    std::thread::spawn(move || {
        // SAFETY: the thread is this test's own, and shares nothing that a network namespace concerns.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
        test();
    })
    .join()
    .unwrap();
}

/// Runs ip(8) or tc(8) and gives its output, one blank between words.
fn run(command: &str) -> String {
    let mut words = command.split(' ');
    let program = words.next().unwrap();
    let output = Command::new(program).args(words).output().unwrap();
    assert!(output.status.success(), "{command}: {output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The usual pod: one veth with an address of each family. The peer is in the same namespace and carries none, so that
/// it is down where it is read.
fn usual_pod() {
    run("ip link add eth0 address 0a:00:00:00:00:05 mtu 1450 type veth peer name peer");
    run("ip link set eth0 up");
    run("ip addr add 10.1.0.5/24 brd 10.1.0.255 dev eth0");
    run("ip addr add fd00::5/64 dev eth0 nodad");
}

/// A process that another test is about to start has a copy of every descriptor until it executes.
fn taps_are_gone() {
    for _ in 0..500 {
        if !run("ip link").contains("krtap") {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("a tap is left: {}", run("ip link"));
}

fn bytes(text: &str) -> Vec<u8> {
    match text.parse().unwrap() {
        std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
        std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

#[test]
fn interfaces_addresses_routes_rules_and_neighbours_are_read() {
    in_namespace(|| {
        usual_pod();
        run("ip link set lo up");
        run("ip link set peer up");
        run("ip link set peer down");
        run("ip link add net1 type veth peer name peer1");
        run("ip link set net1 up");
        run("ip addr add 192.168.7.2 peer 192.168.7.1 dev net1");
        run("ip route add default via 10.1.0.1 dev eth0 mtu 1300");
        run("ip route add 172.16.0.0/12 via 169.254.1.1 dev net1 onlink src 192.168.7.2");
        run("ip -6 route add default via fd00::1 dev eth0 metric 42");
        run("ip route add 172.31.0.0/16 via inet6 fe80::1 dev net1 onlink");
        run("ip route add default via 10.1.0.2 dev eth0 table 1000");
        run("ip route add unreachable 203.0.113.0/24");
        run("ip rule add from 10.1.0.5 lookup 1000 pref 100");
        run("ip rule add uidrange 7-8 lookup 1000 pref 101");
        run("ip neigh add 169.254.1.1 lladdr ee:ee:ee:ee:ee:ee dev net1 nud permanent");
        run("ip neigh add 169.254.1.2 lladdr ee:ee:ee:ee:ee:ef dev net1 nud stale");
        let found = scan_here().unwrap();
        let names: Vec<&str> = found.links.iter().map(|link| link.name.as_str()).collect();
        assert_eq!(names, ["eth0", "net1"]);
        let [eth0, net1] = &found.network.interfaces[..] else {
            panic!("{found:?}");
        };
        assert_eq!(eth0.device_mac, device_mac(0));
        assert_eq!(
            (eth0.mac.as_slice(), eth0.mtu),
            (&[0x0a, 0, 0, 0, 0, 5][..], 1450)
        );
        let address = |text: &str| eth0.addresses.iter().find(|address| address.ip == bytes(text));
        assert_eq!(address("10.1.0.5").unwrap().prefix_length, 24);
        assert_eq!(address("fd00::5").unwrap().prefix_length, 64);
        assert_eq!(net1.addresses[0].peer, bytes("192.168.7.1"));
        let routes = &found.network.routes;
        let route = |destination: &str| {
            let wanted = if destination.is_empty() {
                Vec::new()
            } else {
                bytes(destination)
            };
            routes
                .iter()
                .find(|route| route.destination == wanted && route.table == 254)
                .unwrap_or_else(|| panic!("{destination}: {routes:?}"))
        };
        assert_eq!(
            (route("").gateway.clone(), route("").mtu),
            (bytes("10.1.0.1"), 1300)
        );
        assert!(
            route("10.1.0.0").gateway.is_empty(),
            "the route to its own network"
        );
        let onlink = route("172.16.0.0");
        assert_eq!((onlink.flags, onlink.interface.as_str()), (4, "net1"));
        assert_eq!(onlink.source, bytes("192.168.7.2"));
        assert_eq!(route("172.31.0.0").gateway, bytes("fe80::1"));
        assert_eq!(route("203.0.113.0").type_, u32::from(RTN_UNREACHABLE));
        assert!(route("203.0.113.0").interface.is_empty());
        let ipv6 = routes
            .iter()
            .find(|route| route.ipv6 && route.destination.is_empty())
            .unwrap();
        assert_eq!((ipv6.gateway.clone(), ipv6.priority), (bytes("fd00::1"), 42));
        assert!(routes.iter().any(|route| route.table == 1000));
        assert!(
            !routes.iter().any(|route| route.table == 255),
            "the kernel's own: {routes:?}"
        );
        let [rule] = &found.network.rules[..] else {
            panic!("{:?}", found.network.rules);
        };
        assert_eq!((rule.priority, rule.table, rule.source_length), (100, 1000, 32));
        let [neighbour] = &found.network.neighbours[..] else {
            panic!("{:?}", found.network.neighbours);
        };
        assert_eq!(
            (neighbour.ip.clone(), neighbour.mac.clone()),
            (bytes("169.254.1.1"), vec![0xee; 6])
        );
    });
}

#[test]
fn what_cannot_be_wired_is_named_with_the_cure() {
    in_namespace(|| {
        usual_pod();
        run("ip link set eth0 mtu 65535");
        let error = scan_here().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.to_string().contains("eth0 has an MTU of 65535"), "{error}");
        run("ip link set eth0 mtu 1500");
        // One that nobody brought up and that has no address is nobody's interface.
        run("ip tuntap add name tun5 mode tun");
        assert_eq!(scan_here().unwrap().links.len(), 1);
        run("ip addr add 10.8.0.2/24 dev tun5");
        let error = scan_here().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unimplemented);
        assert!(
            error
                .to_string()
                .contains("tun5 cannot be given to a VM: its kind is tun;"),
            "{error}"
        );
        assert!(error.to_string().contains("veth, macvlan"), "{error}");
    });
}

/// Sends an Ethernet broadcast with the given last byte out of a tap, as the VM does.
fn vm_sends(tap: &mut std::fs::File, last: u8) {
    let mut packet = vec![0; VNET_HEADER];
    packet.extend([0xff; 6]);
    packet.extend([0x0a, 0, 0, 0, 0, 5, 0x88, 0xb5]);
    packet.extend([last; 46]);
    tap.write_all(&packet).unwrap();
}

fn received(interface: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let line = text
        .lines()
        .find(|line| line.trim_start().starts_with(&format!("{interface}:")));
    line.unwrap().split_whitespace().nth(2).unwrap().parse().unwrap()
}

#[test]
fn packets_go_both_ways_and_are_counted_on_the_pods_interface() {
    in_namespace(|| {
        usual_pod();
        run("ip link set eth0 addrgenmode none");
        run("ip link set peer addrgenmode none up");
        let mut socket = open_socket().unwrap();
        let mut found = scan_here().unwrap();
        // Both ends are here; only one is the pod's.
        found.links.retain(|link| link.name == "eth0");
        let wires = wire_here(&mut socket, found).unwrap();
        assert!(run("ip link show krtap0").contains("mtu 1450"));
        assert!(
            !run("ip addr show dev krtap0").contains("inet"),
            "the tap has something to say"
        );
        let mut tap = std::fs::File::from(wires.taps.into_iter().next().unwrap());
        let before = received("peer");
        vm_sends(&mut tap, 7);
        assert_eq!(received("peer"), before + 1);
        // The other way: an ARP request of the outside for the pod's address reaches the VM, not the host's own stack.
        let before = received("eth0");
        run("ip addr add 10.1.0.1/24 dev peer");
        let udp = std::net::UdpSocket::bind("10.1.0.1:0").unwrap();
        run("ip route flush table local dev eth0");
        run("ip route del 10.1.0.0/24 dev eth0");
        udp.send_to(b"x", "10.1.0.77:9").unwrap();
        let mut packet = [0; 2048];
        let length = loop {
            match tap.read(&mut packet) {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => std::thread::yield_now(),
                other => break other.unwrap(),
            }
        };
        assert!(length > VNET_HEADER + 14);
        assert_eq!(
            packet[VNET_HEADER + 12..VNET_HEADER + 14],
            [0x08, 0x06],
            "an ARP request"
        );
        assert!(received("eth0") > before);
    });
}

#[test]
fn wiring_again_after_a_crash_works_and_unwiring_leaves_nothing() {
    in_namespace(|| {
        usual_pod();
        let mut socket = open_socket().unwrap();
        let found = scan_here().unwrap();
        let wires = wire_here(&mut socket, found.clone()).unwrap();
        let error = scan_here().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
        assert!(error.to_string().contains("krtap0"), "{error}");
        assert!(matches!(
            wire_here(&mut socket, found.clone()),
            Err(NetworkError::InUse(_))
        ));
        // A process that was killed takes its taps with it and leaves the redirection to them.
        drop(wires);
        taps_are_gone();
        assert!(run("tc qdisc show dev eth0").contains("ingress"));
        assert_eq!(scan_here().unwrap(), found);
        let again = wire_here(&mut socket, found.clone()).unwrap();
        let filters = run("tc filter show dev eth0 ingress");
        assert!(filters.contains("Egress Redirect to device krtap0"), "{filters}");
        // One that is left from before would take the packets first.
        assert_eq!(filters.matches("mirred").count(), 1, "{filters}");
        unwire(&mut socket, &again.links);
        assert!(!run("tc qdisc show dev eth0").contains("ingress"), "it was ours");
        drop(again);
        taps_are_gone();
        let fresh = wire_here(&mut socket, found).unwrap();
        unwire(&mut socket, &fresh.links);
        drop(fresh);
        assert!(!run("tc qdisc show dev eth0").contains("ingress"));
        taps_are_gone();
    });
}

#[test]
fn what_a_killed_process_left_is_cleaned_up_and_nothing_else() {
    const OTHERS: &str = "tc filter add dev eth0 ingress protocol ip u32 match u32 0 0 flowid 1:1";
    in_namespace(|| {
        usual_pod();
        let mut socket = open_socket().unwrap();
        let found = scan_here().unwrap();
        let forwarding = Command::new("nft").arg("list").arg("tables").output().is_ok();
        let left = || {
            let tables = if forwarding {
                run("nft list tables")
            } else {
                String::new()
            };
            format!(
                "{} {} {tables}",
                run("tc qdisc show dev eth0"),
                run("tc filter show dev eth0 ingress")
            )
        };
        let wires = wire_here(&mut socket, found.clone()).unwrap();
        clean_up_here().unwrap();
        assert!(left().contains("krtap0"), "a VM that lives: {}", left());
        drop(wires);
        taps_are_gone();
        assert!(left().contains("mirred"));
        clean_up_here().unwrap();
        for ours in ["mirred", "ingress", "kata-rs"] {
            assert!(!left().contains(ours), "{ours}: {}", left());
        }
        clean_up_here().unwrap();

        // What others have put there stays.
        run("tc qdisc add dev eth0 ingress");
        clean_up_here().unwrap();
        assert!(left().contains("ingress"));
        run(OTHERS);
        drop(wire_here(&mut socket, found).unwrap());
        taps_are_gone();
        clean_up_here().unwrap();
        assert!(!left().contains("mirred") && left().contains("u32"), "{}", left());
    });
}

#[test]
fn a_namespace_that_is_gone_has_nothing_to_be_cleaned_up() {
    clean_up(Path::new("/run/netns/nonexistent")).unwrap();
    clean_up(Path::new("/proc/self/ns/net")).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    clean_up(file.path()).unwrap();
}

#[test]
fn an_interface_that_goes_is_noticed() {
    in_namespace(|| {
        usual_pod();
        run("ip link add net1 type veth peer name peer1");
        run("ip link add br0 type bridge");
        run("ip link set net1 master br0");
        let socket = open_socket().unwrap();
        let index = |name| rustix::net::netdevice::name_to_index(&socket, name).unwrap();
        let (eth0, net1) = (index("eth0"), index("net1"));
        let listener = Listener::open().unwrap();
        // A bridge that lets a port go speaks of a deleted link; the port is still there.
        run("ip link set net1 nomaster");
        run("ip link set eth0 down");
        run("ip link del eth0");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut watch = listener.watch().unwrap();
            assert_eq!(watch.lost(&[eth0, net1]).await.unwrap(), [eth0]);
            run("ip link set net1 up");
            // More than the socket has room for.
            for round in 0..200 {
                run(&format!("ip link set net1 mtu {}", 1300 + round));
            }
            run("ip link del net1");
            assert_eq!(watch.lost(&[net1]).await.unwrap(), [net1]);
        });
    });
}

#[test]
fn a_failure_half_way_leaves_nothing() {
    in_namespace(|| {
        usual_pod();
        let mut socket = open_socket().unwrap();
        let mut found = scan_here().unwrap();
        found.links.push(Link {
            index: 9999,
            name: "net1".into(),
            mtu: 1500,
            filters: false,
        });
        let error = wire_here(&mut socket, found).unwrap_err();
        assert!(error.to_string().contains("net1"), "{error}");
        assert!(!run("tc qdisc show dev eth0").contains("ingress"));
        taps_are_gone();
    });
}

#[test]
fn the_hosts_own_namespace_is_never_touched() {
    let own = Path::new("/proc/self/ns/net");
    assert!(Namespace::open(own).unwrap().is_none());
    let scanning = Scanning::begin(&Netns::Path(own.to_owned())).unwrap();
    let (network, slots) = scanning.finish(5).unwrap();
    assert!(slots.is_empty());
    assert_eq!(network.devices, 0);
}

#[test]
fn a_namespace_that_is_empty_or_not_there_yet_gets_a_spare_device() {
    let (_, slots) = Scanning::begin(&Netns::New).unwrap().finish(5).unwrap();
    assert_eq!(slots.len(), 1);
    assert_eq!(slots[0].mac, device_mac(0));
    let (_, slots) = Scanning::begin(&Netns::Host).unwrap().finish(5).unwrap();
    assert!(slots.is_empty());
    let missing = Netns::Path("/run/netns/nonexistent".into());
    let error = Scanning::begin(&missing).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(error.to_string().contains("/run/netns/nonexistent"), "{error}");
    let file = Netns::Path("/etc/hostname".into());
    let error = Scanning::begin(&file).unwrap().finish(5).unwrap_err();
    assert!(matches!(error, NetworkError::Enter(_)), "{error:?}");
}

#[test]
fn connections_to_localhost_are_redirected_and_say_where_they_were_going() {
    in_namespace(|| {
        use std::io::ErrorKind::{AddrNotAvailable, ConnectionRefused};
        use std::net::{TcpListener, TcpStream};

        let mut socket = open_socket().unwrap();
        let listeners = match relay::listen_here(&mut socket) {
            Ok(listeners) => listeners,
            Err(relay::RelayError::Filter(error)) => {
                eprintln!("skipped: this kernel has no nftables: {error}");
                return;
            }
            Err(error) => panic!("{error}"),
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let _guard = runtime.enter();
        for (which, listener) in listeners.0 {
            listener.set_nonblocking(false).unwrap();
            for (address, port) in [("127.0.0.1", 80), ("127.8.9.10", 4242), ("::1", 65535)] {
                if (which == nft::Loopback::V6) != address.contains(':') {
                    continue;
                }
                let _client = TcpStream::connect((address, port)).unwrap();
                let (accepted, _) = listener.accept().unwrap();
                accepted.set_nonblocking(true).unwrap();
                let accepted = tokio::net::TcpStream::from_std(accepted).unwrap();
                assert_eq!(relay::original_port(which, &accepted).unwrap(), port, "{address}");
            }
        }
        // Another address of the namespace is not meant.
        run("ip link add eth0 type veth peer name peer");
        run("ip addr add 10.1.0.5/24 dev eth0");
        run("ip link set eth0 up");
        let own = TcpListener::bind("10.1.0.5:80").unwrap();
        let _client = TcpStream::connect("10.1.0.5:80").unwrap();
        own.accept().unwrap();
        // Twice is as good as once, and in the end nothing is left.
        drop(relay::listen_here(&mut socket).unwrap());
        relay::restore_here().unwrap();
        relay::restore_here().unwrap();
        for address in ["127.0.0.1:4242", "[::1]:4242"] {
            let refused = TcpStream::connect(address).unwrap_err().kind();
            assert!(
                matches!(refused, ConnectionRefused | AddrNotAvailable),
                "{refused:?}"
            );
        }
    });
}

#[test]
fn macvlan_and_ipvlan_are_wired_where_their_packets_can_be_redirected() {
    in_namespace(|| {
        run("ip link add lower type veth peer name peer");
        run("ip link set lower up");
        for (kind, works) in [
            ("macvlan mode bridge", true),
            ("ipvlan mode l2", true),
            ("ipvlan mode l3", true),
            ("ipvlan mode l3s", false),
        ] {
            let command = format!("link add link lower name eth0 type {kind}");
            let made = Command::new("ip").args(command.split(' ')).output().unwrap();
            if !made.status.success() {
                eprintln!("skipped: this kernel cannot make a {kind}: {made:?}");
                continue;
            }
            run("ip addr add 10.1.0.5/24 dev eth0");
            run("ip link set eth0 up");
            match scan_here() {
                Ok(found) => {
                    assert!(works, "{kind}");
                    // What it stands on is not the VM's, which would take its packets.
                    let names: Vec<&str> = found.links.iter().map(|link| link.name.as_str()).collect();
                    assert_eq!(names, ["eth0"], "{kind}");
                    let mut socket = open_socket().unwrap();
                    let wires = wire_here(&mut socket, found).unwrap();
                    unwire(&mut socket, &wires.links);
                    drop(wires);
                    taps_are_gone();
                }
                Err(error) => {
                    assert!(!works, "{kind}: {error}");
                    assert!(
                        error
                            .to_string()
                            .contains("eth0 cannot be given to a VM: its kind is ipvlan in mode l3s")
                    );
                }
            }
            run("ip addr add 10.2.0.5/24 dev lower");
            let error = scan_here().unwrap_err();
            assert!(
                !works || matches!(error, NetworkError::Stacked { .. }),
                "{kind}: {error}"
            );
            run("ip addr del 10.2.0.5/24 dev lower");
            run("ip link del eth0");
        }
    });
}
