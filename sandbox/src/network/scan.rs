//! What is in a network namespace: the interfaces that a VM shall have, and the addresses, routes, rules and
//! neighbours that belong to them. Reads only; what is read is the kernel's word, which CNI plugins and administrators
//! have a say in, a guest has not.

use std::collections::HashMap;

use netlink::route::{
    ARPHRD_ETHER, AddressHeader, FRA_DST, FRA_FWMARK, FRA_FWMASK, FRA_IIFNAME, FRA_OIFNAME, FRA_PRIORITY,
    FRA_SRC, FRA_SUPPRESS_PREFIXLEN, FRA_TABLE, IFA_ADDRESS, IFA_F_DADFAILED, IFA_F_TEMPORARY, IFA_FLAGS,
    IFA_LOCAL, IFF_LOOPBACK, IFF_NOARP, IFF_UP, IFLA_ADDRESS, IFLA_IFNAME, IFLA_INFO_DATA, IFLA_INFO_KIND,
    IFLA_IPVLAN_MODE, IFLA_LINK, IFLA_LINK_NETNSID, IFLA_LINKINFO, IFLA_MASTER, IFLA_MTU, INET, INET6,
    IPVLAN_MODE_L3S, LinkHeader, NDA_DST, NDA_LLADDR, NUD_PERMANENT, NeighbourHeader, RT_TABLE_DEFAULT,
    RT_TABLE_LOCAL, RT_TABLE_MAIN, RTA_DST, RTA_GATEWAY, RTA_METRICS, RTA_MULTIPATH, RTA_OIF, RTA_PREFSRC,
    RTA_PRIORITY, RTA_TABLE, RTA_VIA, RTAX_MTU, RTM_F_CLONED, RTM_GETADDR, RTM_GETLINK, RTM_GETNEIGH,
    RTM_GETROUTE, RTM_GETRULE, RTN_BLACKHOLE, RTN_PROHIBIT, RTN_THROW, RTN_UNICAST, RTN_UNREACHABLE,
    RTNH_F_ONLINK, RouteHeader, RuleHeader,
};
use netlink::{Attribute, Attributes, Message, Reply, Socket};
use protocol::agent::Network;
use protocol::agent::network::{Address, Interface, Neighbour, Route, Rule};

use super::error::NetworkError;
use super::tap;

/// Kinds of devices whose packets can be redirected, as the kernel names them. A physical device has no kind.
const KINDS: [&str; 8] = [
    "veth", "macvlan", "ipvlan", "bridge", "bond", "vlan", "dummy", "netkit",
];
/// Those that stand on another interface, whose packets they take.
const STANDS_ON_ANOTHER: [&str; 4] = ["macvlan", "ipvlan", "vlan", "macvtap"];
/// Rules that every namespace has: priority and table (`fib_default_rules_init`).
const STANDARD_RULES: [(u32, u32); 3] = [
    (0, RT_TABLE_LOCAL),
    (32766, RT_TABLE_MAIN),
    (32767, RT_TABLE_DEFAULT),
];

/// What else rules can select by: jumps, realms, tunnels, layer 3 master devices, users, protocols and ports
/// (`FRA_GOTO`, `FRA_FLOW`, …). A rule without one of its selectors would be another rule.
const OTHER_SELECTORS: [u16; 8] = [4, 11, 12, 19, 20, 22, 23, 24];

/// An interface that a VM shall have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    pub index: u32,
    pub name: String,
    pub mtu: u32,
    /// Whether the device hands on only packets for addresses that it was told of.
    pub filters: bool,
}

/// What is in a namespace.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Topology {
    /// In the order of the VM's devices.
    pub links: Vec<Link>,
    /// The same interfaces in the same order, and what belongs to them, for the guest.
    pub network: Network,
}

/// A link as it was read.
struct Found {
    header: LinkHeader,
    name: String,
    kind: String,
    mac: Vec<u8>,
    mtu: u32,
    has_master: bool,
    /// Index of the interface that it stands on, in this namespace.
    lower: Option<u32>,
}

/// Reads the namespace that the socket belongs to. `mac` is the address that the VM's n-th device is found by.
pub(crate) fn scan(socket: &mut Socket, mac: impl Fn(usize) -> [u8; 6]) -> Result<Topology, NetworkError> {
    let found: Vec<Found> = dump(
        socket,
        "links",
        &Message::new(RTM_GETLINK, 0, &LinkHeader::default().encode()),
    )?
    .iter()
    .filter_map(link)
    .filter(|link| link.header.flags & IFF_LOOPBACK == 0)
    .collect();
    if found.is_empty() {
        return Ok(Topology::default());
    }
    let mut addresses = addresses(socket)?;
    let wired = choose(found, &addresses)?;
    let names: HashMap<u32, String> = wired
        .iter()
        .map(|link| (link.header.index, link.name.clone()))
        .collect();
    let interfaces = wired
        .iter()
        .enumerate()
        .map(|(slot, link)| Interface {
            device_mac: mac(slot).to_vec(),
            name: link.name.clone(),
            mac: link.mac.clone(),
            mtu: link.mtu,
            addresses: addresses.remove(&link.header.index).unwrap_or_default(),
            no_arp: link.header.flags & IFF_NOARP != 0,
            ..Default::default()
        })
        .collect();
    let network = Network {
        interfaces,
        routes: routes(socket, &names)?,
        neighbours: neighbours(socket, &names)?,
        rules: rules(socket)?,
        ..Default::default()
    };
    let links = wired
        .into_iter()
        .map(|link| Link {
            index: link.header.index,
            filters: matches!(link.kind.as_str(), "" | "macvlan"),
            name: link.name,
            mtu: link.mtu,
        })
        .collect();
    Ok(Topology { links, network })
}

fn dump(socket: &mut Socket, what: &'static str, request: &Message) -> Result<Vec<Reply>, NetworkError> {
    socket
        .dump(request)
        .map_err(|cause| NetworkError::Read { what, cause })
}

fn link(reply: &Reply) -> Option<Found> {
    let header = LinkHeader::decode(reply.header()?);
    let attributes = reply.attributes(LinkHeader::SIZE);
    let number = |kind: u16| attributes.get(kind).and_then(Attribute::u32);
    let info = attributes.get(IFLA_LINKINFO).map(Attribute::nested);
    let mut kind = info
        .and_then(|info| info.get(IFLA_INFO_KIND))
        .map(Attribute::text)
        .unwrap_or_default();
    let mode = info
        .and_then(|info| info.get(IFLA_INFO_DATA)?.nested().get(IFLA_IPVLAN_MODE))
        .map(|mode| mode.value);
    if kind == "ipvlan" && mode == Some(&IPVLAN_MODE_L3S.to_ne_bytes()) {
        // The host's packet filter hands on what comes in there, past the place where it could be redirected.
        kind = "ipvlan in mode l3s".to_owned();
    }
    let stands = STANDS_ON_ANOTHER.contains(&kind.as_str()) && attributes.get(IFLA_LINK_NETNSID).is_none();
    Some(Found {
        header,
        name: attributes.get(IFLA_IFNAME)?.text(),
        mac: attributes
            .get(IFLA_ADDRESS)
            .map(|attribute| attribute.value.to_vec())
            .unwrap_or_default(),
        mtu: number(IFLA_MTU).unwrap_or(0),
        has_master: number(IFLA_MASTER).is_some_and(|master| master != 0),
        lower: number(IFLA_LINK).filter(|_| stands),
        kind,
    })
}

/// Which of the links the VM gets.
fn choose(found: Vec<Found>, addresses: &HashMap<u32, Vec<Address>>) -> Result<Vec<Found>, NetworkError> {
    let has_address = |link: &Found| addresses.contains_key(&link.header.index);
    let uppers: HashMap<u32, String> = found
        .iter()
        .filter_map(|link| Some((link.lower?, link.name.clone())))
        .collect();
    let mut wired = Vec::new();
    for link in found {
        if link.kind == "tun" && link.name.starts_with(tap::PREFIX) {
            return Err(NetworkError::InUse(link.name));
        }
        // The port of a bridge or bond has its packets there; what nobody brought up nor gave an address is one of
        // the devices that tunnel modules put into every namespace.
        if link.has_master || (link.header.flags & IFF_UP == 0 && !has_address(&link)) {
            continue;
        }
        if let Some(upper) = uppers.get(&link.header.index) {
            if has_address(&link) {
                return Err(NetworkError::Stacked {
                    lower: link.name,
                    upper: upper.clone(),
                });
            }
            continue;
        }
        let known = link.kind.is_empty() || KINDS.contains(&link.kind.as_str());
        if !known || link.header.device != ARPHRD_ETHER {
            let kind = match link.kind.as_str() {
                "" => format!("hardware of type {}", link.header.device),
                kind => kind.to_owned(),
            };
            return Err(NetworkError::Device {
                name: link.name,
                kind,
            });
        }
        // is_valid_ether_addr(): the guest's kernel takes no other.
        let valid = link.mac.len() == 6 && link.mac[0] & 1 == 0 && link.mac.iter().any(|byte| *byte != 0);
        if !valid {
            return Err(NetworkError::NoAddress(link.name));
        }
        if link.mtu > tap::MOST_MTU {
            return Err(NetworkError::Mtu {
                name: link.name,
                mtu: link.mtu,
                most: tap::MOST_MTU,
            });
        }
        wired.push(link);
    }
    Ok(wired)
}

/// By interface. What the kernel has found to be in use elsewhere, and what it changes by itself, is left out.
fn addresses(socket: &mut Socket) -> Result<HashMap<u32, Vec<Address>>, NetworkError> {
    let mut all: HashMap<u32, Vec<Address>> = HashMap::new();
    let request = Message::new(RTM_GETADDR, 0, &AddressHeader::default().encode());
    for reply in dump(socket, "addresses", &request)? {
        let Some(header) = reply.header().map(AddressHeader::decode) else {
            continue;
        };
        let attributes = reply.attributes(AddressHeader::SIZE);
        let flags = attributes
            .get(IFA_FLAGS)
            .and_then(Attribute::u32)
            .unwrap_or_else(|| header.flags.into());
        let value = |kind: u16| attributes.get(kind).map(|attribute| attribute.value.to_vec());
        let (local, address) = (value(IFA_LOCAL), value(IFA_ADDRESS));
        let Some(ip) = local.clone().or_else(|| address.clone()) else {
            continue;
        };
        if ![INET, INET6].contains(&header.family) || flags & (IFA_F_DADFAILED | IFA_F_TEMPORARY) != 0 {
            continue;
        }
        let peer = address.filter(|address| local.as_ref().is_some_and(|local| local != address));
        all.entry(header.index).or_default().push(Address {
            ip,
            prefix_length: header.prefix_length.into(),
            scope: header.scope.into(),
            peer: peer.unwrap_or_default(),
            ..Default::default()
        });
    }
    Ok(all)
}

/// The routes of all tables but the one that the kernel keeps by itself.
fn routes(socket: &mut Socket, names: &HashMap<u32, String>) -> Result<Vec<Route>, NetworkError> {
    let mut routes = Vec::new();
    for family in [INET, INET6] {
        let header = RouteHeader {
            family,
            ..RouteHeader::default()
        };
        let request = Message::new(RTM_GETROUTE, 0, &header.encode());
        for reply in dump(socket, "routes", &request)? {
            let Some(header) = reply.header().map(RouteHeader::decode) else {
                continue;
            };
            if header.family == family {
                route(header, reply.attributes(RouteHeader::SIZE), names, &mut routes);
            }
        }
    }
    Ok(routes)
}

fn route(
    header: RouteHeader,
    attributes: Attributes<'_>,
    names: &HashMap<u32, String>,
    routes: &mut Vec<Route>,
) {
    let number = |kind: u16| attributes.get(kind).and_then(Attribute::u32);
    let table = number(RTA_TABLE).unwrap_or_else(|| header.table.into());
    let lookup = match header.kind {
        RTN_UNICAST => true,
        RTN_BLACKHOLE | RTN_UNREACHABLE | RTN_PROHIBIT | RTN_THROW => false,
        _ => return,
    };
    if table == RT_TABLE_LOCAL || header.flags & RTM_F_CLONED != 0 {
        return;
    }
    let value = |kind: u16| {
        attributes
            .get(kind)
            .map(|attribute| attribute.value.to_vec())
            .unwrap_or_default()
    };
    let mtu = attributes
        .get(RTA_METRICS)
        .and_then(|metrics| metrics.nested().get(RTAX_MTU)?.u32());
    let common = Route {
        destination: value(RTA_DST),
        prefix_length: header.destination_length.into(),
        source: value(RTA_PREFSRC),
        scope: header.scope.into(),
        protocol: header.protocol.into(),
        type_: header.kind.into(),
        table,
        priority: number(RTA_PRIORITY).unwrap_or(0),
        mtu: mtu.unwrap_or(0),
        ipv6: header.family == INET6,
        ..Default::default()
    };
    if !lookup {
        routes.push(common);
        return;
    }
    let hops: Vec<(u32, u32, Vec<u8>)> = match attributes.get(RTA_MULTIPATH) {
        Some(multipath) => hops(multipath.value),
        None => vec![(number(RTA_OIF).unwrap_or(0), header.flags, gateway(attributes))],
    };
    for (index, flags, gateway) in hops {
        // Routes over the loopback interface and over links that the VM does not get.
        let Some(interface) = names.get(&index) else {
            continue;
        };
        routes.push(Route {
            interface: interface.clone(),
            gateway,
            flags: flags & RTNH_F_ONLINK,
            ..common.clone()
        });
    }
}

/// `struct rtvia` begins with the address's family.
fn gateway(attributes: Attributes<'_>) -> Vec<u8> {
    let via = |attribute: Attribute<'_>| attribute.value.get(2..).unwrap_or_default().to_vec();
    attributes
        .get(RTA_GATEWAY)
        .map(|attribute| attribute.value.to_vec())
        .or_else(|| attributes.get(RTA_VIA).map(via))
        .unwrap_or_default()
}

/// `struct rtnexthop` each, with attributes: interface, flags, gateway.
fn hops(mut bytes: &[u8]) -> Vec<(u32, u32, Vec<u8>)> {
    const HEADER: usize = 8;
    let mut hops = Vec::new();
    while let Some([l0, l1, flags, _, i0, i1, i2, i3]) = bytes.first_chunk::<HEADER>().copied() {
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let Some(attributes) = bytes.get(HEADER..length) else {
            break;
        };
        let index = u32::from_ne_bytes([i0, i1, i2, i3]);
        hops.push((index, flags.into(), gateway(Attributes::parse(attributes))));
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    hops
}

/// Only what was entered by hand: the rest is found out again.
fn neighbours(socket: &mut Socket, names: &HashMap<u32, String>) -> Result<Vec<Neighbour>, NetworkError> {
    let mut neighbours = Vec::new();
    for family in [INET, INET6] {
        let header = NeighbourHeader {
            family,
            ..NeighbourHeader::default()
        };
        let request = Message::new(RTM_GETNEIGH, 0, &header.encode());
        for reply in dump(socket, "neighbours", &request)? {
            let Some(header) = reply.header().map(NeighbourHeader::decode) else {
                continue;
            };
            let attributes = reply.attributes(NeighbourHeader::SIZE);
            let (Some(interface), Some(ip), Some(mac)) = (
                names.get(&header.index),
                attributes.get(NDA_DST),
                attributes.get(NDA_LLADDR),
            ) else {
                continue;
            };
            if header.state & NUD_PERMANENT == 0 || mac.value.len() != 6 {
                continue;
            }
            neighbours.push(Neighbour {
                ip: ip.value.to_vec(),
                mac: mac.value.to_vec(),
                interface: interface.clone(),
                state: NUD_PERMANENT.into(),
                ..Default::default()
            });
        }
    }
    Ok(neighbours)
}

/// What chooses among tables, beyond what every namespace has.
fn rules(socket: &mut Socket) -> Result<Vec<Rule>, NetworkError> {
    let mut rules = Vec::new();
    for family in [INET, INET6] {
        let header = RuleHeader {
            family,
            ..RuleHeader::default()
        };
        let request = Message::new(RTM_GETRULE, 0, &header.encode());
        let replies = match socket.dump(&request) {
            Ok(replies) => replies,
            // A kernel without policy routing.
            Err(error) if error.errno == rustix::io::Errno::OPNOTSUPP => continue,
            Err(cause) => return Err(NetworkError::Read { what: "rules", cause }),
        };
        for reply in replies {
            let Some(header) = reply.header().map(RuleHeader::decode) else {
                continue;
            };
            let attributes = reply.attributes(RuleHeader::SIZE);
            let number = |kind: u16| attributes.get(kind).and_then(Attribute::u32);
            let bytes = |kind: u16| {
                attributes
                    .get(kind)
                    .map(|attribute| attribute.value.to_vec())
                    .unwrap_or_default()
            };
            let text = |kind: u16| attributes.get(kind).map(Attribute::text).unwrap_or_default();
            let priority = number(FRA_PRIORITY).unwrap_or(0);
            let table = number(FRA_TABLE).unwrap_or_else(|| header.table.into());
            if header.family != family || STANDARD_RULES.contains(&(priority, table)) {
                continue;
            }
            if let Some(selector) = OTHER_SELECTORS
                .iter()
                .find(|kind| attributes.get(**kind).is_some())
            {
                tracing::warn!(
                    priority,
                    selector,
                    "a rule of the pod's network is left out: it selects by what the guest is not told of"
                );
                continue;
            }
            rules.push(Rule {
                ipv6: family == INET6,
                priority,
                source: bytes(FRA_SRC),
                source_length: header.source_length.into(),
                destination: bytes(FRA_DST),
                destination_length: header.destination_length.into(),
                input_interface: text(FRA_IIFNAME),
                output_interface: text(FRA_OIFNAME),
                mark: number(FRA_FWMARK).unwrap_or(0),
                mark_mask: number(FRA_FWMASK).unwrap_or(0),
                tos: header.tos.into(),
                action: header.action.into(),
                flags: header.flags,
                table,
                // -1 stands for none.
                suppress_prefix_length: number(FRA_SUPPRESS_PREFIXLEN).filter(|length| *length <= 128),
                ..Default::default()
            });
        }
    }
    Ok(rules)
}
