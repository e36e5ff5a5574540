//! Against the kernel, in a network namespace of the test's own in which veth devices stand for the VM's.

use std::process::Command;

use protocol::agent::network::{Address, Neighbour, Route, Rule};

use super::*;

const MAC: [u8; 6] = [2, 0x6b, 0x72, 0, 0, 1];
const OTHER: [u8; 6] = [2, 0x6b, 0x72, 0, 0, 2];

/// Runs a test on a thread in a namespace of its own; skips it where there can be none.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can make network namespaces");
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

/// Runs ip(8) and gives its output, one blank between words.
fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn apply(state: &State, network: &Network) -> Result<(), NetworkError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(state.apply(network.clone()))
}

fn address(text: &str, prefix_length: u32) -> Address {
    let ip: std::net::IpAddr = text.parse().unwrap();
    Address {
        ip: match ip {
            std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
            std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
        },
        prefix_length,
        scope: if text.starts_with("fe80") { 253 } else { 0 },
        ..Address::default()
    }
}

fn bytes(text: &str) -> Vec<u8> {
    address(text, 0).ip
}

fn interface(name: &str, mac: [u8; 6], addresses: Vec<Address>) -> Interface {
    Interface {
        device_mac: mac.to_vec(),
        name: name.into(),
        mac: mac.to_vec(),
        mtu: 1400,
        addresses,
        ..Interface::default()
    }
}

/// A route in the main table, as ip-route(8) would make it.
fn route(destination: &str, length: u32, gateway: &str, name: &str) -> Route {
    let ipv6 = format!("{destination}{gateway}").contains(':');
    Route {
        destination: if destination.is_empty() {
            Vec::new()
        } else {
            bytes(destination)
        },
        prefix_length: length,
        gateway: if gateway.is_empty() {
            Vec::new()
        } else {
            bytes(gateway)
        },
        interface: name.into(),
        scope: if gateway.is_empty() && !ipv6 { 253 } else { 0 },
        protocol: 3,
        type_: 1,
        table: 254,
        ipv6,
        ..Route::default()
    }
}

fn two_devices() {
    // The kernel's names are the wrong way round: each name that is wanted is another's.
    ip("link add eth1 address 02:6b:72:00:00:01 type veth peer name p1");
    ip("link add eth0 address 02:6b:72:00:00:02 type veth peer name p0");
    ip("link set p0 up");
    ip("link set p1 up");
}

#[test]
fn names_addresses_routes_rules_and_neighbours_are_what_the_host_says() {
    in_namespace(|| {
        two_devices();
        let network = Network {
            interfaces: vec![
                interface("eth0", MAC, vec![address("10.1.0.5", 24), address("fd00::5", 64)]),
                interface("net1", OTHER, vec![address("192.168.7.2", 32)]),
            ],
            routes: vec![
                // Gateways first: the order is for the agent to find.
                route("", 0, "10.1.0.1", "eth0"),
                route("", 0, "fd00::1", "eth0"),
                route("10.1.0.0", 24, "", "eth0"),
                route("fd00::", 64, "", "eth0"),
                Route {
                    flags: 4,
                    mtu: 1300,
                    ..route("172.16.0.0", 12, "169.254.1.1", "net1")
                },
                Route {
                    table: 1000,
                    priority: 7,
                    ..route("", 0, "10.1.0.2", "eth0")
                },
                Route {
                    flags: 4,
                    ipv6: false,
                    ..route("172.31.0.0", 16, "fe80::1", "net1")
                },
                Route {
                    type_: 7,
                    ..route("203.0.113.0", 24, "", "")
                },
            ],
            neighbours: vec![Neighbour {
                ip: bytes("169.254.1.1"),
                mac: vec![0xee; 6],
                interface: "net1".into(),
                state: 0x80,
                ..Neighbour::default()
            }],
            rules: vec![Rule {
                priority: 100,
                source: bytes("10.1.0.5"),
                source_length: 32,
                table: 1000,
                action: 1,
                ..Rule::default()
            }],
            ..Network::default()
        };
        apply(&State::default(), &network).unwrap();
        let link = ip("link show eth0");
        assert!(
            link.contains("02:6b:72:00:00:01") && link.contains("mtu 1400") && link.contains(",UP"),
            "{link}"
        );
        assert!(ip("link show net1").contains("02:6b:72:00:00:02"));
        let addresses = ip("addr show dev eth0");
        assert!(
            addresses.contains("inet 10.1.0.5/24 brd 10.1.0.255 scope global"),
            "{addresses}"
        );
        assert!(
            addresses.contains("inet6 fd00::5/64 scope global nodad noprefixroute"),
            "{addresses}"
        );
        assert!(
            !addresses.contains("fe80"),
            "an address that nobody gave: {addresses}"
        );
        let routes = ip("route");
        for expected in [
            "default via 10.1.0.1 dev eth0 10.1.0.0/24 dev eth0 scope link 172.16.0.0/12 via 169.254.1.1 dev net1",
            "onlink",
            "mtu 1300",
            "172.31.0.0/16 via inet6 fe80::1 dev net1 onlink",
            "unreachable 203.0.113.0/24",
        ] {
            assert!(routes.contains(expected), "{routes}");
        }
        assert!(
            ip("-6 route").starts_with("fd00::/64 dev eth0"),
            "{}",
            ip("-6 route")
        );
        assert!(ip("-6 route").contains("default via fd00::1 dev eth0"));
        assert_eq!(
            ip("route show table 1000"),
            "default via 10.1.0.2 dev eth0 metric 7"
        );
        assert!(
            ip("rule").contains("100: from 10.1.0.5 lookup 1000"),
            "{}",
            ip("rule")
        );
        assert_eq!(
            ip("neigh show nud permanent"),
            "169.254.1.1 dev net1 lladdr ee:ee:ee:ee:ee:ee PERMANENT"
        );
    });
}

#[test]
fn what_is_not_named_any_more_goes_and_what_containers_made_stays() {
    in_namespace(|| {
        two_devices();
        let state = State::default();
        let before = Network {
            interfaces: vec![
                interface(
                    "eth0",
                    MAC,
                    vec![address("10.1.0.5", 24), address("10.1.0.6", 24)],
                ),
                interface("net1", OTHER, vec![address("192.168.7.2", 24)]),
            ],
            routes: vec![
                route("10.1.0.0", 24, "", "eth0"),
                route("", 0, "10.1.0.1", "eth0"),
                route("192.168.7.0", 24, "", "net1"),
            ],
            ..Network::default()
        };
        apply(&state, &before).unwrap();
        apply(&state, &before).unwrap();
        ip("link set lo up");
        ip("route add 198.51.100.0/24 via 10.1.0.9 dev eth0");
        let after = Network {
            interfaces: vec![interface("eth0", MAC, vec![address("10.1.0.6", 24)])],
            routes: vec![
                route("10.1.0.0", 24, "", "eth0"),
                route("", 0, "10.1.0.2", "eth0"),
            ],
            ..Network::default()
        };
        apply(&state, &after).unwrap();
        assert_eq!(
            ip("route"),
            "default via 10.1.0.2 dev eth0 10.1.0.0/24 dev eth0 scope link 198.51.100.0/24 via 10.1.0.9 dev eth0"
        );
        assert!(!ip("addr show dev eth0").contains("10.1.0.5"));
        let net1 = ip("addr show dev net1");
        assert!(net1.contains("state DOWN") && !net1.contains("inet "), "{net1}");
    });
}

#[test]
fn what_does_not_fit_is_named() {
    in_namespace(|| {
        two_devices();
        let missing = Network {
            interfaces: vec![interface("eth0", [2, 0, 0, 0, 0, 9], Vec::new())],
            ..Network::default()
        };
        let error = apply(&State::default(), &missing).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("02:00:00:00:00:09 for eth0 is not there"),
            "{error}"
        );
        let unreachable = Network {
            interfaces: vec![interface("eth0", MAC, vec![address("10.1.0.5", 32)])],
            routes: vec![route("", 0, "10.9.0.1", "eth0")],
            ..Network::default()
        };
        let error = apply(&State::default(), &unreachable).unwrap_err();
        assert!(
            error.to_string().contains("0.0.0.0/0 via 10.9.0.1 dev eth0"),
            "{error}"
        );
        assert!(error.to_string().contains("unreachable"), "{error}");
    });
}
