//! The host's description as messages to the kernel. Pure functions.

use std::collections::HashMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use netlink::Message;
use netlink::route::{
    AddressHeader, FRA_DST, FRA_FWMARK, FRA_FWMASK, FRA_IIFNAME, FRA_OIFNAME, FRA_PRIORITY, FRA_SRC,
    FRA_SUPPRESS_PREFIXLEN, FRA_TABLE, IFA_ADDRESS, IFA_BROADCAST, IFA_F_NODAD, IFA_F_NOPREFIXROUTE,
    IFA_FLAGS, IFA_LOCAL, IFF_NOARP, IFF_UP, IFLA_ADDRESS, IFLA_AF_SPEC, IFLA_IFNAME,
    IFLA_INET6_ADDR_GEN_MODE, IFLA_MTU, INET, INET6, LinkHeader, NDA_DST, NDA_LLADDR, NLM_F_APPEND,
    NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NeighbourHeader, RTA_DST, RTA_GATEWAY, RTA_METRICS, RTA_OIF,
    RTA_PREFSRC, RTA_PRIORITY, RTA_TABLE, RTA_VIA, RTAX_MTU, RTM_DELADDR, RTM_DELNEIGH, RTM_DELROUTE,
    RTM_DELRULE, RTM_NEWLINK, RTNH_F_ONLINK, RouteHeader, RuleHeader,
};
use protocol::agent::network::{Address, Interface, Neighbour, Route, Rule};

use super::NetworkError;

/// `IN6_ADDR_GEN_MODE_NONE`.
const NO_ADDRESS: u8 = 1;

/// What becomes of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Up { no_arp: bool },
    Down,
}

/// An IP address, for people.
pub fn ip(bytes: &[u8]) -> String {
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
        Ipv4Addr::from(bytes).to_string()
    } else if let Ok(bytes) = <[u8; 16]>::try_from(bytes) {
        Ipv6Addr::from(bytes).to_string()
    } else {
        format!("{bytes:02x?}")
    }
}

/// A link's address, for people.
pub fn mac(bytes: &[u8]) -> String {
    bytes
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect::<Vec<_>>()
        .join(":")
}

/// A route as ip-route(8) has it.
pub fn describe(route: &Route) -> String {
    let mut text = if route.destination.is_empty() {
        String::from(if route.ipv6 { "::/0" } else { "0.0.0.0/0" })
    } else {
        format!("{}/{}", ip(&route.destination), route.prefix_length)
    };
    if !route.gateway.is_empty() {
        text += &format!(" via {}", ip(&route.gateway));
    }
    if !route.interface.is_empty() {
        text += &format!(" dev {}", route.interface);
    }
    text
}

fn invalid(what: impl Into<String>) -> NetworkError {
    NetworkError::Invalid(what.into())
}

fn family(bytes: &[u8]) -> Result<u8, NetworkError> {
    match bytes.len() {
        4 => Ok(INET),
        16 => Ok(INET6),
        _ => Err(invalid(format!("{} is no IP address", ip(bytes)))),
    }
}

/// A number that the kernel has in one byte.
fn byte(what: &str, number: u32) -> Result<u8, NetworkError> {
    u8::try_from(number).map_err(|_| invalid(format!("{what} is {number}")))
}

fn index(indices: &HashMap<String, u32>, name: &str) -> Result<u32, NetworkError> {
    indices
        .get(name)
        .copied()
        .ok_or_else(|| invalid(format!("there is no interface {name:?}")))
}

/// Gives a link its name, address and MTU.
pub fn link(index: u32, interface: &Interface) -> Result<Message, NetworkError> {
    if interface.name.is_empty() || interface.name.contains('/') || interface.mac.len() != 6 {
        return Err(invalid(format!(
            "an interface is called {:?} and has the address {}",
            interface.name,
            mac(&interface.mac)
        )));
    }
    let header = LinkHeader {
        index,
        ..LinkHeader::default()
    };
    Ok(Message::new(RTM_NEWLINK, 0, &header.encode())
        .with_text(IFLA_IFNAME, &interface.name)
        .with(IFLA_ADDRESS, &interface.mac)
        .with_u32(IFLA_MTU, interface.mtu))
}

/// Keeps a link from giving itself an IPv6 address when it comes up.
pub fn quiet(index: u32) -> Message {
    let header = LinkHeader {
        index,
        ..LinkHeader::default()
    };
    Message::new(RTM_NEWLINK, 0, &header.encode()).with_nested(IFLA_AF_SPEC, |families| {
        families.with_nested(u16::from(INET6), |inet6| {
            inet6.with(IFLA_INET6_ADDR_GEN_MODE, &[NO_ADDRESS])
        })
    })
}

/// Renames a link.
pub fn rename(index: u32, name: &str) -> Message {
    let header = LinkHeader {
        index,
        ..LinkHeader::default()
    };
    Message::new(RTM_NEWLINK, 0, &header.encode()).with_text(IFLA_IFNAME, name)
}

/// Brings a link up or down.
pub fn flags(index: u32, change: Change) -> Message {
    let (flags, change) = match change {
        Change::Up { no_arp } => (IFF_UP | if no_arp { IFF_NOARP } else { 0 }, IFF_UP | IFF_NOARP),
        Change::Down => (0, IFF_UP),
    };
    let header = LinkHeader {
        index,
        flags,
        change,
        ..LinkHeader::default()
    };
    Message::new(RTM_NEWLINK, 0, &header.encode())
}

/// An address of an interface. The route to its network is one of the routes that the host names, or there is none.
pub fn address(kind: u16, index: u32, address: &Address) -> Result<Message, NetworkError> {
    let family = family(&address.ip)?;
    let header = AddressHeader {
        family,
        prefix_length: byte("a prefix's length", address.prefix_length)?,
        flags: 0,
        scope: byte("a scope", address.scope)?,
        index,
    };
    let flags = if kind == RTM_DELADDR {
        0
    } else {
        NLM_F_CREATE | NLM_F_REPLACE
    };
    let peer = if address.peer.is_empty() {
        &address.ip
    } else {
        &address.peer
    };
    let message = Message::new(kind, flags, &header.encode())
        .with(IFA_LOCAL, &address.ip)
        .with(IFA_ADDRESS, peer);
    if kind == RTM_DELADDR {
        return Ok(message);
    }
    let message = message.with_u32(IFA_FLAGS, IFA_F_NODAD | IFA_F_NOPREFIXROUTE);
    match (<[u8; 4]>::try_from(address.ip.as_slice()), address.prefix_length) {
        (Ok(ip), length @ 1..=30) if address.peer.is_empty() => {
            let broadcast = u32::from_be_bytes(ip) | (u32::MAX >> length);
            Ok(message.with(IFA_BROADCAST, &broadcast.to_be_bytes()))
        }
        _ => Ok(message),
    }
}

/// A route.
pub fn route(kind: u16, route: &Route, indices: &HashMap<String, u32>) -> Result<Message, NetworkError> {
    let family = if route.ipv6 { INET6 } else { INET };
    let header = RouteHeader {
        family,
        destination_length: byte("a prefix's length", route.prefix_length)?,
        // RTA_TABLE is what counts.
        table: 0,
        protocol: byte("a route's protocol", route.protocol)?,
        scope: byte("a route's scope", route.scope)?,
        kind: byte("a route's type", route.type_)?,
        flags: route.flags & RTNH_F_ONLINK,
    };
    // Several routes to one network, with one metric, are next hops to the kernel.
    let flags = if kind == RTM_DELROUTE {
        0
    } else {
        NLM_F_CREATE | NLM_F_APPEND
    };
    let mut message = Message::new(kind, flags, &header.encode()).with_u32(RTA_TABLE, route.table);
    if !route.destination.is_empty() {
        if self::family(&route.destination)? != family {
            return Err(invalid(format!(
                "the route {} is of two families",
                describe(route)
            )));
        }
        message = message.with(RTA_DST, &route.destination);
    }
    if !route.interface.is_empty() {
        message = message.with_u32(RTA_OIF, index(indices, &route.interface)?);
    }
    if !route.gateway.is_empty() {
        let other = self::family(&route.gateway)?;
        message = if other == family {
            message.with(RTA_GATEWAY, &route.gateway)
        } else {
            // `struct rtvia`.
            let mut via = u16::from(other).to_ne_bytes().to_vec();
            via.extend(&route.gateway);
            message.with(RTA_VIA, &via)
        };
    }
    if !route.source.is_empty() {
        message = message.with(RTA_PREFSRC, &route.source);
    }
    if route.priority != 0 {
        message = message.with_u32(RTA_PRIORITY, route.priority);
    }
    if route.mtu != 0 {
        message = message.with_nested(RTA_METRICS, |metrics| metrics.with_u32(RTAX_MTU, route.mtu));
    }
    Ok(message)
}

/// A neighbour.
pub fn neighbour(
    kind: u16,
    neighbour: &Neighbour,
    indices: &HashMap<String, u32>,
) -> Result<Message, NetworkError> {
    let header = NeighbourHeader {
        family: family(&neighbour.ip)?,
        index: index(indices, &neighbour.interface)?,
        state: u16::try_from(neighbour.state).map_err(|_| invalid("a neighbour's state is too large"))?,
        flags: byte("a neighbour's flags", neighbour.flags)?,
    };
    let flags = if kind == RTM_DELNEIGH {
        0
    } else {
        NLM_F_CREATE | NLM_F_REPLACE
    };
    let message = Message::new(kind, flags, &header.encode()).with(NDA_DST, &neighbour.ip);
    Ok(if kind == RTM_DELNEIGH {
        message
    } else {
        message.with(NDA_LLADDR, &neighbour.mac)
    })
}

/// A rule.
pub fn rule(kind: u16, rule: &Rule) -> Result<Message, NetworkError> {
    let header = RuleHeader {
        family: if rule.ipv6 { INET6 } else { INET },
        destination_length: byte("a prefix's length", rule.destination_length)?,
        source_length: byte("a prefix's length", rule.source_length)?,
        tos: byte("a rule's type of service", rule.tos)?,
        table: 0,
        action: byte("a rule's action", rule.action)?,
        flags: rule.flags,
    };
    let flags = if kind == RTM_DELRULE {
        0
    } else {
        NLM_F_CREATE | NLM_F_EXCL
    };
    let mut message = Message::new(kind, flags, &header.encode()).with_u32(FRA_PRIORITY, rule.priority);
    for (attribute, network) in [(FRA_SRC, &rule.source), (FRA_DST, &rule.destination)] {
        if !network.is_empty() {
            message = message.with(attribute, network);
        }
    }
    for (attribute, name) in [
        (FRA_IIFNAME, &rule.input_interface),
        (FRA_OIFNAME, &rule.output_interface),
    ] {
        if !name.is_empty() {
            message = message.with_text(attribute, name);
        }
    }
    if rule.mark_mask != 0 {
        message = message
            .with_u32(FRA_FWMARK, rule.mark)
            .with_u32(FRA_FWMASK, rule.mark_mask);
    }
    if rule.table != 0 {
        message = message.with_u32(FRA_TABLE, rule.table);
    }
    if let Some(length) = rule.suppress_prefix_length {
        message = message.with_u32(FRA_SUPPRESS_PREFIXLEN, length);
    }
    Ok(message)
}
