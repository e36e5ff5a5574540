//! Redirecting packets between an interface and a tap (tc-mirred(8)): what comes in on one goes out on the other,
//! before the host's own network stack sees it. So the interface keeps its addresses and its counters.

use netlink::route::{
    NLM_F_CREATE, NLM_F_EXCL, RTM_DELQDISC, RTM_DELTFILTER, RTM_GETTFILTER, RTM_NEWQDISC, RTM_NEWTFILTER,
    TCA_KIND, TCA_OPTIONS, TrafficHeader,
};
use netlink::{Error, Message, Socket};
use rustix::io::Errno;

/// `TC_H_INGRESS`: the parent of the queueing discipline that sees what comes in.
const INGRESS: u32 = 0xffff_fff1;
/// Its handle.
const INGRESS_HANDLE: u32 = 0xffff_0000;
/// The place of filters for what comes in; right for `ingress` and for `clsact`.
const INGRESS_FILTERS: u32 = 0xffff_fff2;
/// After all filters that others may have put there.
const PRIORITY: u32 = 0xfff0;
/// `ETH_P_ALL`, in the network's order.
const ALL_PROTOCOLS: u32 = 0x0003_u16.to_be() as u32;
/// Attributes of the u32 classifier (`linux/pkt_cls.h`).
const TCA_U32_SEL: u16 = 5;
const TCA_U32_ACT: u16 = 7;
const TC_U32_TERMINAL: u8 = 1;
/// Attributes of actions.
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;
const TCA_EGRESS_REDIR: u32 = 1;
const TC_ACT_STOLEN: u32 = 4;

/// Sends everything that comes in on one interface out of another. What an earlier call left there is replaced. Says
/// whether it made the place that filters hang on, for [`restore`].
pub(crate) fn redirect(socket: &mut Socket, from: u32, to: u32) -> Result<bool, Error> {
    let add = Message::new(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, &ingress(from).encode())
        .with_text(TCA_KIND, "ingress");
    let made = match socket.request(&add) {
        // Another's, or left over from a process that was killed: the filter is what counts.
        Err(error) if error.errno == Errno::EXIST => {
            remove_filter(socket, from)? && !has_filters(socket, from)?
        }
        result => result.map(|()| true)?,
    };
    socket.request(&filter(from, to)).map(|()| made)
}

/// Takes it back: the filter, and what it hung on if `made` says that it was made for it.
pub(crate) fn restore(socket: &mut Socket, from: u32, made: bool) -> Result<(), Error> {
    remove_filter(socket, from)?;
    if made && !has_filters(socket, from)? {
        remove_ingress(socket, from)?;
    }
    Ok(())
}

/// Takes back what a process left that was killed: the filter, and what it hung on unless others hang there too.
pub(crate) fn clean_up(socket: &mut Socket, from: u32) -> Result<(), Error> {
    if remove_filter(socket, from)? && !has_filters(socket, from)? {
        remove_ingress(socket, from)?;
    }
    Ok(())
}

fn ingress(index: u32) -> TrafficHeader {
    TrafficHeader {
        index,
        handle: INGRESS_HANDLE,
        parent: INGRESS,
        info: 0,
    }
}

fn remove_ingress(socket: &mut Socket, index: u32) -> Result<(), Error> {
    let delete = Message::new(RTM_DELQDISC, 0, &ingress(index).encode()).with_text(TCA_KIND, "ingress");
    match socket.request(&delete) {
        // It also says so of one of another kind (`clsact`), which others made.
        Err(error) if is_gone(error.errno) || error.errno == Errno::INVAL => Ok(()),
        result => result,
    }
}

/// Whether there was one.
fn remove_filter(socket: &mut Socket, from: u32) -> Result<bool, Error> {
    let delete = Message::new(RTM_DELTFILTER, 0, &place(from).encode());
    match socket.request(&delete) {
        // It says so where there is no place for filters.
        Err(error) if is_gone(error.errno) || error.errno == Errno::INVAL => Ok(false),
        result => result.map(|()| true),
    }
}

fn has_filters(socket: &mut Socket, index: u32) -> Result<bool, Error> {
    let place = TrafficHeader {
        index,
        parent: INGRESS_FILTERS,
        ..TrafficHeader::default()
    };
    let filters = socket.dump(&Message::new(RTM_GETTFILTER, 0, &place.encode()))?;
    Ok(!filters.is_empty())
}

fn is_gone(errno: Errno) -> bool {
    matches!(errno, Errno::NOENT | Errno::NODEV)
}

fn place(index: u32) -> TrafficHeader {
    TrafficHeader {
        index,
        handle: 0,
        parent: INGRESS_FILTERS,
        info: PRIORITY << 16 | ALL_PROTOCOLS,
    }
}

fn filter(from: u32, to: u32) -> Message {
    // One key whose mask is empty: everything matches. `struct tc_u32_sel`, then `struct tc_u32_key`.
    let mut selector = [0; 32];
    selector[0] = TC_U32_TERMINAL;
    selector[2] = 1;
    // `struct tc_mirred`: index, capabilities, action, two counts; what to do, and where.
    let mirred: Vec<u8> = [0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, to]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect();
    Message::new(RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_EXCL, &place(from).encode())
        .with_text(TCA_KIND, "u32")
        .with_nested(TCA_OPTIONS, |options| {
            options
                .with(TCA_U32_SEL, &selector)
                .with_nested(TCA_U32_ACT, |actions| {
                    actions.with_nested(1, |action| {
                        action
                            .with_text(TCA_ACT_KIND, "mirred")
                            .with_nested(TCA_ACT_OPTIONS, |options| options.with(TCA_MIRRED_PARMS, &mirred))
                    })
                })
        })
}
