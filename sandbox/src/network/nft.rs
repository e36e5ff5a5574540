//! The packet filter's rules for port forwarding (nftables; `linux/netfilter/nf_tables.h`): TCP connections that
//! processes in the pod's namespace on the host make to its loopback addresses go to a listener of ours. Nothing that
//! comes or goes through an interface of the pod meets these rules.

use netlink::{Error, Message, Socket};
use rustix::io::Errno;

/// The table's name: all rules are in it, and go with it.
const TABLE: &str = "kata-rs";
const CHAIN: &str = "output";
/// `NFNL_SUBSYS_NFTABLES`, and the messages that begin and end a batch for it.
const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
/// `NFT_MSG_*`.
const NEW_TABLE: u16 = 0;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const NEW_RULE: u16 = 6;
const NLM_F_CREATE: u16 = netlink::route::NLM_F_CREATE;
const NLM_F_APPEND: u16 = netlink::route::NLM_F_APPEND;
/// `NF_INET_LOCAL_OUT` and `NF_IP_PRI_NAT_DST`.
const LOCAL_OUT: u32 = 3;
const PRIORITY: i32 = -100;
/// The register that expressions hand values on in.
const REGISTER: u32 = 1;
/// `NFT_META_OIF` and `NFT_META_L4PROTO`.
const META_OUTPUT_INTERFACE: u32 = 5;
const META_PROTOCOL: u32 = 16;
/// The loopback interface is the first of every namespace.
const LOOPBACK_INDEX: u32 = 1;
/// `NFT_PAYLOAD_NETWORK_HEADER`.
const NETWORK_HEADER: u32 = 1;

/// Which addresses are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Loopback {
    /// 127.0.0.0/8.
    V4,
    /// ::1.
    V6,
}

impl Loopback {
    fn family(self) -> u8 {
        match self {
            Self::V4 => netlink::route::INET,
            Self::V6 => netlink::route::INET6,
        }
    }

    /// Where in the header the destination is, and what it must be.
    fn destination(self) -> (u32, Vec<u8>) {
        match self {
            Self::V4 => (16, vec![127]),
            Self::V6 => (24, std::net::Ipv6Addr::LOCALHOST.octets().to_vec()),
        }
    }
}

/// Sends connections to loopback addresses to `port` of the loopback address; replaces what was there.
pub(crate) fn redirect(socket: &mut Socket, which: Loopback, port: u16) -> Result<(), Error> {
    let family = which.family();
    let table = |kind: u16, flags: u16| message(kind, flags, family).with_text(1, TABLE);
    let chain = message(NEW_CHAIN, NLM_F_CREATE, family)
        .with_text(1, TABLE)
        .with_text(3, CHAIN)
        .with_nested(4, |hook| {
            hook.with(1, &LOCAL_OUT.to_be_bytes())
                .with(2, &PRIORITY.to_be_bytes())
        })
        .with_text(7, "nat");
    let (offset, address) = which.destination();
    let length = u32::try_from(address.len()).unwrap_or(0);
    let rule = message(NEW_RULE, NLM_F_CREATE | NLM_F_APPEND, family)
        .with_text(1, TABLE)
        .with_text(2, CHAIN)
        .with_nested(4, |list| {
            let list = expression(list, "meta", |meta| {
                numbers(meta, &[REGISTER, META_OUTPUT_INTERFACE])
            });
            let list = equals(list, &LOOPBACK_INDEX.to_ne_bytes());
            let list = expression(list, "meta", |meta| numbers(meta, &[REGISTER, META_PROTOCOL]));
            let list = equals(list, &[libc::IPPROTO_TCP as u8]);
            let list = expression(list, "payload", |payload| {
                numbers(payload, &[REGISTER, NETWORK_HEADER, offset, length])
            });
            let list = equals(list, &address);
            let list = expression(list, "immediate", |immediate| {
                numbers(immediate, &[REGISTER]).with_nested(2, |data| data.with(1, &port.to_be_bytes()))
            });
            expression(list, "redir", |redirect| numbers(redirect, &[REGISTER]))
        });
    socket.batch(&[
        batch(BATCH_BEGIN),
        table(NEW_TABLE, NLM_F_CREATE),
        table(DELETE_TABLE, 0),
        table(NEW_TABLE, NLM_F_CREATE),
        chain,
        rule,
        batch(BATCH_END),
    ])
}

/// Takes the rules away.
pub(crate) fn restore(socket: &mut Socket, which: Loopback) -> Result<(), Error> {
    let delete = message(DELETE_TABLE, 0, which.family()).with_text(1, TABLE);
    match socket.batch(&[batch(BATCH_BEGIN), delete, batch(BATCH_END)]) {
        Err(error) if matches!(error.errno, Errno::NOENT | Errno::AFNOSUPPORT | Errno::OPNOTSUPP) => Ok(()),
        result => result,
    }
}

/// `struct nfgenmsg`: family, version, and a number in the network's order.
fn message(kind: u16, flags: u16, family: u8) -> Message {
    Message::new(SUBSYSTEM << 8 | kind, flags, &[family, 0, 0, 0])
}

fn batch(kind: u16) -> Message {
    let [high, low] = SUBSYSTEM.to_be_bytes();
    Message::new(kind, 0, &[0, 0, high, low])
}

/// Attributes 1, 2, … with these numbers in the network's order.
fn numbers(message: Message, values: &[u32]) -> Message {
    (1..).zip(values).fold(message, |message, (kind, value)| {
        message.with(kind, &value.to_be_bytes())
    })
}

fn expression(list: Message, name: &str, fill: impl FnOnce(Message) -> Message) -> Message {
    list.with_nested(1, |element| element.with_text(1, name).with_nested(2, fill))
}

/// Goes on only when the register holds these bytes (`NFT_CMP_EQ`).
fn equals(list: Message, bytes: &[u8]) -> Message {
    expression(list, "cmp", |compare| {
        numbers(compare, &[REGISTER, 0]).with_nested(3, |data| data.with(1, bytes))
    })
}
