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

/// Structures at the beginning of messages: their length, and each member with its type and place.
macro_rules! headers {
    ($(
        $(#[$doc:meta])* $name:ident($size:literal) {
            $($(#[$about:meta])* $member:ident: $kind:ty = $at:literal),+ $(,)?
        }
    )+) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name {
            $($(#[$about])* pub $member: $kind,)+
        }

        impl $name {
            /// Its length.
            pub const SIZE: usize = $size;

            /// As the kernel has it.
            #[must_use]
            pub fn encode(self) -> [u8; Self::SIZE] {
                let mut bytes = [0; Self::SIZE];
                $(bytes[$at..$at + size_of::<$kind>()].copy_from_slice(&self.$member.to_ne_bytes());)+
                bytes
            }

            /// From the kernel.
            #[must_use]
            pub fn decode(bytes: [u8; Self::SIZE]) -> Self {
                Self {
                    $($member: <$kind>::from_ne_bytes(std::array::from_fn(|index| bytes[$at + index])),)+
                }
            }
        }
    )+};
}

headers! {
    /// `struct ifinfomsg`.
    LinkHeader(16) {
        /// `ifi_type`: `ARPHRD_*`.
        device: u16 = 2,
        /// `ifi_index`.
        index: u32 = 4,
        /// `ifi_flags`.
        flags: u32 = 8,
        /// `ifi_change`: which of the flags are meant.
        change: u32 = 12,
    }

    /// `struct ifaddrmsg`.
    AddressHeader(8) {
        /// `ifa_family`.
        family: u8 = 0,
        /// `ifa_prefixlen`.
        prefix_length: u8 = 1,
        /// `ifa_flags`, the lower eight.
        flags: u8 = 2,
        /// `ifa_scope`.
        scope: u8 = 3,
        /// `ifa_index`.
        index: u32 = 4,
    }

    /// `struct rtmsg`.
    RouteHeader(12) {
        /// `rtm_family`.
        family: u8 = 0,
        /// `rtm_dst_len`.
        destination_length: u8 = 1,
        /// `rtm_table`, when it is below 256.
        table: u8 = 4,
        /// `rtm_protocol`.
        protocol: u8 = 5,
        /// `rtm_scope`.
        scope: u8 = 6,
        /// `rtm_type`: `RTN_*`.
        kind: u8 = 7,
        /// `rtm_flags`.
        flags: u32 = 8,
    }

    /// `struct ndmsg`.
    NeighbourHeader(12) {
        /// `ndm_family`.
        family: u8 = 0,
        /// `ndm_ifindex`.
        index: u32 = 4,
        /// `ndm_state`: `NUD_*`.
        state: u16 = 8,
        /// `ndm_flags`.
        flags: u8 = 10,
    }

    /// `struct fib_rule_hdr`.
    RuleHeader(12) {
        /// `family`.
        family: u8 = 0,
        /// `dst_len`.
        destination_length: u8 = 1,
        /// `src_len`.
        source_length: u8 = 2,
        /// `tos`.
        tos: u8 = 3,
        /// `table`, when it is below 256.
        table: u8 = 4,
        /// `action`: `FR_ACT_*`.
        action: u8 = 7,
        /// `flags`: `FIB_RULE_*`.
        flags: u32 = 8,
    }

    /// `struct tcmsg`.
    TrafficHeader(20) {
        /// `tcm_ifindex`.
        index: u32 = 4,
        /// `tcm_handle`.
        handle: u32 = 8,
        /// `tcm_parent`.
        parent: u32 = 12,
        /// `tcm_info`.
        info: u32 = 16,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Structures as they lie in the kernel: numbers in the machine's order, all of them different.
    #[test]
    fn headers_lie_as_in_the_kernel() {
        let link = LinkHeader {
            device: 0x0102,
            index: 0x0304_0506,
            flags: 0x0708_090a,
            change: 0x0b0c_0d0e,
        };
        assert_eq!(
            link.encode()[..],
            [
                &[0, 0][..],
                &0x0102_u16.to_ne_bytes(),
                &words([0x0304_0506, 0x0708_090a, 0x0b0c_0d0e])
            ]
            .concat()
        );
        assert_eq!(LinkHeader::decode(link.encode()), link);
        let address = AddressHeader {
            family: 1,
            prefix_length: 2,
            flags: 3,
            scope: 4,
            index: 0x0506_0708,
        };
        assert_eq!(
            address.encode()[..],
            [&[1, 2, 3, 4][..], &words([0x0506_0708])].concat()
        );
        assert_eq!(AddressHeader::decode(address.encode()), address);
        let route = RouteHeader {
            family: 1,
            destination_length: 2,
            table: 3,
            protocol: 4,
            scope: 5,
            kind: 6,
            flags: 0x0708_090a,
        };
        assert_eq!(
            route.encode()[..],
            [&[1, 2, 0, 0, 3, 4, 5, 6][..], &words([0x0708_090a])].concat()
        );
        assert_eq!(RouteHeader::decode(route.encode()), route);
        let neighbour = NeighbourHeader {
            family: 1,
            index: 0x0203_0405,
            state: 0x0607,
            flags: 8,
        };
        assert_eq!(
            neighbour.encode()[..],
            [
                &[1, 0, 0, 0][..],
                &words([0x0203_0405]),
                &0x0607_u16.to_ne_bytes(),
                &[8, 0]
            ]
            .concat()
        );
        assert_eq!(NeighbourHeader::decode(neighbour.encode()), neighbour);
        let rule = RuleHeader {
            family: 1,
            destination_length: 2,
            source_length: 3,
            tos: 4,
            table: 5,
            action: 6,
            flags: 0x0708_090a,
        };
        assert_eq!(
            rule.encode()[..],
            [&[1, 2, 3, 4, 5, 0, 0, 6][..], &words([0x0708_090a])].concat()
        );
        assert_eq!(RuleHeader::decode(rule.encode()), rule);
        let traffic = TrafficHeader {
            index: 1,
            handle: 2,
            parent: 3,
            info: 4,
        };
        assert_eq!(traffic.encode()[..], words([0, 1, 2, 3, 4]));
        assert_eq!(TrafficHeader::decode(traffic.encode()), traffic);
    }

    fn words<const N: usize>(words: [u32; N]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }
}
