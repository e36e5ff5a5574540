//! What stays in a pod's network namespace when the sandbox's process is killed: packets are redirected to taps that
//! are gone, and connections to localhost to a listener that is gone.

use std::io;
use std::path::Path;

use netlink::route::{IFLA_IFNAME, LinkHeader, RTM_GETLINK};
use netlink::{Message, Socket};
use rustix::io::Errno;

use super::error::NetworkError;
use super::namespace::{Namespace, join};
use super::{open_socket, relay, tap, tc};

/// Takes away what a VM that is gone has left in the network namespace at this path. Where another VM is wired, nothing
/// is touched; a namespace that is gone too, or that is this process's own, has nothing.
///
/// # Errors
/// [`NetworkError`].
pub fn clean_up(path: &Path) -> Result<(), NetworkError> {
    let namespace = match Namespace::open(path) {
        Err(NetworkError::Open { cause, .. }) if cause.kind() == io::ErrorKind::NotFound => return Ok(()),
        opened => opened?,
    };
    let Some(namespace) = namespace else { return Ok(()) };
    match join(namespace.spawn(clean_up_here)?) {
        // The file is there, but no namespace is mounted on it any more.
        Err(NetworkError::Enter(cause)) if Errno::from_io_error(&cause) == Some(Errno::INVAL) => Ok(()),
        result => result?,
    }
}

pub(super) fn clean_up_here() -> Result<(), NetworkError> {
    let mut socket = open_socket()?;
    let read = |cause| NetworkError::Read { what: "links", cause };
    let links = links(&mut socket).map_err(read)?;
    if links.iter().any(|(_, name)| name.starts_with(tap::PREFIX)) {
        return Ok(());
    }
    for (index, name) in links {
        tc::clean_up(&mut socket, index).map_err(|cause| NetworkError::Redirect { name, cause })?;
    }
    // Where there is no nftables nothing of it is left; a rule that stays has connections refused that nobody takes.
    let _ = relay::restore_here();
    Ok(())
}

fn links(socket: &mut Socket) -> Result<Vec<(u32, String)>, netlink::Error> {
    let request = Message::new(RTM_GETLINK, 0, &LinkHeader::default().encode());
    let links = socket.dump(&request)?;
    let link = |reply: &netlink::Reply| {
        let name = reply.attributes(LinkHeader::SIZE).get(IFLA_IFNAME)?.text();
        Some((LinkHeader::decode(reply.header()?).index, name))
    };
    Ok(links.iter().filter_map(link).collect())
}
