//! The taps through which a VM's packets come and go (Documentation/networking/tuntap.rst).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use netlink::route::{
    IFF_UP, IFLA_AF_SPEC, IFLA_INET6_ADDR_GEN_MODE, IFLA_MTU, INET6, LinkHeader, RTM_NEWLINK,
};
use netlink::{Message, Socket};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;

use super::error::NetworkError;
use super::scan::Link;

/// What the names of taps begin with; the number of the VM's device follows.
pub(crate) const PREFIX: &str = "krtap";
/// The largest MTU of a tap: 65535 with the Ethernet header (`tun_net_init`).
pub(crate) const MOST_MTU: u32 = 65535 - 14;
/// `IN6_ADDR_GEN_MODE_NONE`: the interface gives itself no address and so says nothing.
const NO_ADDRESS: u8 = 1;

/// A tap. It goes when the last descriptor of it is closed.
#[derive(Debug)]
pub(crate) struct Tap {
    pub fd: OwnedFd,
    pub index: u32,
}

/// Makes the tap for the VM's device `slot` in the calling thread's network namespace and brings it up.
pub(crate) fn make(socket: &mut Socket, slot: usize, link: &Link) -> Result<Tap, NetworkError> {
    let name = format!("{PREFIX}{slot}");
    let failed = |cause: io::Error| NetworkError::Tap {
        name: link.name.clone(),
        cause,
    };
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd = open("/dev/net/tun", flags, Mode::empty()).map_err(|error| NetworkError::NoTun(error.into()))?;
    // SAFETY: ifreq holds numbers and a name; all zero is its neutral value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.as_bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the request is an ifreq for the duration of the call.
    if unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } != 0 {
        let cause = io::Error::last_os_error();
        return Err(match cause.raw_os_error() {
            Some(libc::EBUSY) => NetworkError::InUse(name),
            _ => failed(cause),
        });
    }
    let index =
        rustix::net::netdevice::name_to_index(&*socket, &name).map_err(|error| failed(error.into()))?;
    let header = LinkHeader {
        index,
        ..LinkHeader::default()
    };
    // The kernel takes up flags first, so that they need a message of their own.
    let quiet = Message::new(RTM_NEWLINK, 0, &header.encode()).with_nested(IFLA_AF_SPEC, |families| {
        families.with_nested(u16::from(INET6), |inet6| {
            inet6.with(IFLA_INET6_ADDR_GEN_MODE, &[NO_ADDRESS])
        })
    });
    match socket.request(&quiet) {
        // Without IPv6 there is nothing to switch off.
        Err(error) if error.errno == Errno::AFNOSUPPORT => Ok(()),
        result => result,
    }
    .map_err(|error| failed(error.into()))?;
    let header = LinkHeader {
        flags: IFF_UP,
        change: IFF_UP,
        ..header
    };
    let up = Message::new(RTM_NEWLINK, 0, &header.encode()).with_u32(IFLA_MTU, link.mtu);
    socket.request(&up).map_err(|error| failed(error.into()))?;
    Ok(Tap { fd, index })
}
