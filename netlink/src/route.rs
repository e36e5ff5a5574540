//! What rtnetlink(7) calls things: kinds of messages, the structures they begin with, and types of attributes. The
//! names are the kernel's (`linux/rtnetlink.h`, `if_link.h`, `if_addr.h`, `neighbour.h`, `fib_rules.h`).

/// `AF_INET` and `AF_INET6`, as one byte.
pub const INET: u8 = libc::AF_INET as u8;
/// See [`INET`].
pub const INET6: u8 = libc::AF_INET6 as u8;

macro_rules! numbers {
    ($($(#[$doc:meta])* $kind:ty { $($name:ident = $value:expr),+ $(,)? })+) => {
        $($(#[doc = concat!("`", stringify!($name), "`")] pub const $name: $kind = $value;)+)+
    };
}

numbers! {
    /// Kinds of messages.
    u16 {
        RTM_NEWLINK = 16, RTM_DELLINK = 17, RTM_GETLINK = 18,
        RTM_NEWADDR = 20, RTM_DELADDR = 21, RTM_GETADDR = 22,
        RTM_NEWROUTE = 24, RTM_DELROUTE = 25, RTM_GETROUTE = 26,
        RTM_NEWNEIGH = 28, RTM_DELNEIGH = 29, RTM_GETNEIGH = 30,
        RTM_NEWRULE = 32, RTM_DELRULE = 33, RTM_GETRULE = 34,
        RTM_NEWQDISC = 36, RTM_DELQDISC = 37,
        RTM_NEWTFILTER = 44, RTM_DELTFILTER = 45, RTM_GETTFILTER = 46,
    }
    /// Flags of a request that makes something.
    u16 { NLM_F_REPLACE = 0x100, NLM_F_EXCL = 0x200, NLM_F_CREATE = 0x400, NLM_F_APPEND = 0x800 }
    /// Attributes of links.
    u16 {
        IFLA_ADDRESS = 1, IFLA_IFNAME = 3, IFLA_MTU = 4, IFLA_LINK = 5, IFLA_MASTER = 10, IFLA_LINKINFO = 18,
        IFLA_AF_SPEC = 26, IFLA_LINK_NETNSID = 37, IFLA_PERM_ADDRESS = 54, IFLA_INFO_KIND = 1, IFLA_INFO_DATA = 2,
        IFLA_IPVLAN_MODE = 1,
        IFLA_INET6_ADDR_GEN_MODE = 8,
    }
    /// Attributes of addresses.
    u16 { IFA_ADDRESS = 1, IFA_LOCAL = 2, IFA_BROADCAST = 4, IFA_FLAGS = 8 }
    /// Attributes of routes.
    u16 {
        RTA_DST = 1, RTA_OIF = 4, RTA_GATEWAY = 5, RTA_PRIORITY = 6, RTA_PREFSRC = 7, RTA_METRICS = 8,
        RTA_MULTIPATH = 9, RTA_TABLE = 15, RTA_VIA = 18, RTAX_MTU = 2,
    }
    /// Attributes of neighbours.
    u16 { NDA_DST = 1, NDA_LLADDR = 2 }
    /// Attributes of rules.
    u16 {
        FRA_DST = 1, FRA_SRC = 2, FRA_IIFNAME = 3, FRA_PRIORITY = 6, FRA_FWMARK = 10,
        FRA_SUPPRESS_PREFIXLEN = 14, FRA_TABLE = 15, FRA_FWMASK = 16, FRA_OIFNAME = 17,
    }
    /// Attributes of traffic control.
    u16 { TCA_KIND = 1, TCA_OPTIONS = 2 }
    /// Flags of addresses.
    u32 {
        IFA_F_TEMPORARY = 0x01, IFA_F_NODAD = 0x02, IFA_F_DADFAILED = 0x08, IFA_F_NOPREFIXROUTE = 0x200,
    }
    /// Flags of interfaces.
    u32 {
        IFF_UP = 0x1, IFF_LOOPBACK = 0x8, IFF_NOARP = 0x80, IFF_ALLMULTI = 0x200, IFF_LOWER_UP = 0x1_0000,
    }
    /// Flags of routes.
    u32 { RTM_F_CLONED = 0x200, RTNH_F_ONLINK = 4 }
    /// Routing tables.
    u32 { RT_TABLE_DEFAULT = 253, RT_TABLE_MAIN = 254, RT_TABLE_LOCAL = 255 }
    /// Types of routes.
    u8 { RTN_UNICAST = 1, RTN_BLACKHOLE = 6, RTN_UNREACHABLE = 7, RTN_PROHIBIT = 8, RTN_THROW = 9 }
    /// States of neighbours.
    u16 { NUD_PERMANENT = 0x80 }
    /// Groups that are told about changes (`struct sockaddr_nl`, `nl_groups`).
    u32 { RTMGRP_LINK = 1 }
    /// Types of devices (`if_arp.h`).
    u16 { ARPHRD_ETHER = 1 }
    /// Modes of ipvlan (`if_link.h`).
    u16 { IPVLAN_MODE_L3S = 2 }
}

/// `struct ifinfomsg`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkHeader {
    /// `ifi_type`: `ARPHRD_*`.
    pub device: u16,
    /// `ifi_index`.
    pub index: u32,
    /// `ifi_flags`.
    pub flags: u32,
    /// `ifi_change`: which of the flags are meant.
    pub change: u32,
}

impl LinkHeader {
    /// Its length.
    pub const SIZE: usize = 16;

    /// As the kernel has it.
    #[must_use]
    pub fn encode(self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[2..4].copy_from_slice(&self.device.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.index.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.flags.to_ne_bytes());
        bytes[12..16].copy_from_slice(&self.change.to_ne_bytes());
        bytes
    }

    /// From the kernel.
    #[must_use]
    pub fn decode(bytes: [u8; Self::SIZE]) -> Self {
        let [_, _, t0, t1, i0, i1, i2, i3, f0, f1, f2, f3, c0, c1, c2, c3] = bytes;
        Self {
            device: u16::from_ne_bytes([t0, t1]),
            index: u32::from_ne_bytes([i0, i1, i2, i3]),
            flags: u32::from_ne_bytes([f0, f1, f2, f3]),
            change: u32::from_ne_bytes([c0, c1, c2, c3]),
        }
    }
}

/// `struct ifaddrmsg`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AddressHeader {
    /// `ifa_family`.
    pub family: u8,
    /// `ifa_prefixlen`.
    pub prefix_length: u8,
    /// `ifa_flags`, the lower eight.
    pub flags: u8,
    /// `ifa_scope`.
    pub scope: u8,
    /// `ifa_index`.
    pub index: u32,
}

impl AddressHeader {
    /// Its length.
    pub const SIZE: usize = 8;

    /// As the kernel has it.
    #[must_use]
    pub fn encode(self) -> [u8; Self::SIZE] {
        let [i0, i1, i2, i3] = self.index.to_ne_bytes();
        [
            self.family,
            self.prefix_length,
            self.flags,
            self.scope,
            i0,
            i1,
            i2,
            i3,
        ]
    }

    /// From the kernel.
    #[must_use]
    pub fn decode(bytes: [u8; Self::SIZE]) -> Self {
        let [family, prefix_length, flags, scope, index @ ..] = bytes;
        Self {
            family,
            prefix_length,
            flags,
            scope,
            index: u32::from_ne_bytes(index),
        }
    }
}

/// `struct rtmsg`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RouteHeader {
    /// `rtm_family`.
    pub family: u8,
    /// `rtm_dst_len`.
    pub destination_length: u8,
    /// `rtm_table`, when it is below 256.
    pub table: u8,
    /// `rtm_protocol`.
    pub protocol: u8,
    /// `rtm_scope`.
    pub scope: u8,
    /// `rtm_type`: `RTN_*`.
    pub kind: u8,
    /// `rtm_flags`.
    pub flags: u32,
}

impl RouteHeader {
    /// Its length.
    pub const SIZE: usize = 12;

    /// As the kernel has it.
    #[must_use]
    pub fn encode(self) -> [u8; Self::SIZE] {
        let [f0, f1, f2, f3] = self.flags.to_ne_bytes();
        [
            self.family,
            self.destination_length,
            0,
            0,
            self.table,
            self.protocol,
            self.scope,
            self.kind,
            f0,
            f1,
            f2,
            f3,
        ]
    }

    /// From the kernel.
    #[must_use]
    pub fn decode(bytes: [u8; Self::SIZE]) -> Self {
        let [
            family,
            destination_length,
            _,
            _,
            table,
            protocol,
            scope,
            kind,
            flags @ ..,
        ] = bytes;
        Self {
            family,
            destination_length,
            table,
            protocol,
            scope,
            kind,
            flags: u32::from_ne_bytes(flags),
        }
    }
}

/// `struct ndmsg`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NeighbourHeader {
    /// `ndm_family`.
    pub family: u8,
    /// `ndm_ifindex`.
    pub index: u32,
    /// `ndm_state`: `NUD_*`.
    pub state: u16,
    /// `ndm_flags`.
    pub flags: u8,
}

impl NeighbourHeader {
    /// Its length.
    pub const SIZE: usize = 12;

    /// As the kernel has it.
    #[must_use]
    pub fn encode(self) -> [u8; Self::SIZE] {
        let [i0, i1, i2, i3] = self.index.to_ne_bytes();
        let [s0, s1] = self.state.to_ne_bytes();
        [self.family, 0, 0, 0, i0, i1, i2, i3, s0, s1, self.flags, 0]
    }

    /// From the kernel.
    #[must_use]
    pub fn decode(bytes: [u8; Self::SIZE]) -> Self {
        let [family, _, _, _, i0, i1, i2, i3, s0, s1, flags, _] = bytes;
        Self {
            family,
            index: u32::from_ne_bytes([i0, i1, i2, i3]),
            state: u16::from_ne_bytes([s0, s1]),
            flags,
        }
    }
}

/// `struct fib_rule_hdr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RuleHeader {
    /// `family`.
    pub family: u8,
    /// `dst_len`.
    pub destination_length: u8,
    /// `src_len`.
    pub source_length: u8,
    /// `tos`.
    pub tos: u8,
    /// `table`, when it is below 256.
    pub table: u8,
    /// `action`: `FR_ACT_*`.
    pub action: u8,
    /// `flags`: `FIB_RULE_*`.
    pub flags: u32,
}

impl RuleHeader {
    /// Its length.
    pub const SIZE: usize = 12;

    /// As the kernel has it.
    #[must_use]
    pub fn encode(self) -> [u8; Self::SIZE] {
        let [f0, f1, f2, f3] = self.flags.to_ne_bytes();
        [
            self.family,
            self.destination_length,
            self.source_length,
            self.tos,
            self.table,
            0,
            0,
            self.action,
            f0,
            f1,
            f2,
            f3,
        ]
    }

    /// From the kernel.
    #[must_use]
    pub fn decode(bytes: [u8; Self::SIZE]) -> Self {
        let [
            family,
            destination_length,
            source_length,
            tos,
            table,
            _,
            _,
            action,
            flags @ ..,
        ] = bytes;
        Self {
            family,
            destination_length,
            source_length,
            tos,
            table,
            action,
            flags: u32::from_ne_bytes(flags),
        }
    }
}

/// `struct tcmsg`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TrafficHeader {
    /// `tcm_ifindex`.
    pub index: u32,
    /// `tcm_handle`.
    pub handle: u32,
    /// `tcm_parent`.
    pub parent: u32,
    /// `tcm_info`.
    pub info: u32,
}

impl TrafficHeader {
    /// Its length.
    pub const SIZE: usize = 20;

    /// As the kernel has it.
    #[must_use]
    pub fn encode(self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[4..8].copy_from_slice(&self.index.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.handle.to_ne_bytes());
        bytes[12..16].copy_from_slice(&self.parent.to_ne_bytes());
        bytes[16..20].copy_from_slice(&self.info.to_ne_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_survive_the_wire() {
        let link = LinkHeader {
            device: 1,
            index: 0x0102_0304,
            flags: 5,
            change: 6,
        };
        assert_eq!(LinkHeader::decode(link.encode()), link);
        let address = AddressHeader {
            family: INET6,
            prefix_length: 64,
            flags: 3,
            scope: 253,
            index: 0x0102_0304,
        };
        assert_eq!(AddressHeader::decode(address.encode()), address);
        let route = RouteHeader {
            family: INET,
            destination_length: 24,
            table: 254,
            protocol: 3,
            scope: 1,
            kind: RTN_UNICAST,
            flags: RTNH_F_ONLINK,
        };
        assert_eq!(RouteHeader::decode(route.encode()), route);
        let neighbour = NeighbourHeader {
            family: INET,
            index: 0x0102_0304,
            state: NUD_PERMANENT,
            flags: 1,
        };
        assert_eq!(NeighbourHeader::decode(neighbour.encode()), neighbour);
        let rule = RuleHeader {
            family: INET,
            destination_length: 1,
            source_length: 2,
            tos: 3,
            table: 4,
            action: 5,
            flags: 6,
        };
        assert_eq!(RuleHeader::decode(rule.encode()), rule);
    }
}
