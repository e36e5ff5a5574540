//! Port forwarding. Who forwards a port of a pod (containerd's PortForward) connects to localhost in the pod's network
//! namespace on the host, where nobody listens: the containers are in the VM. Such connections are redirected to a
//! listener here and carried over vsock to the guest's localhost.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener as StdListener};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Weak};
use std::time::Duration;

use netlink::route::{IFF_UP, LinkHeader, RTM_NEWLINK};
use netlink::{Family, Message, Socket};
use protocol::stream::{FORWARD_CONNECTED, ForwardHeader, PORT_FORWARD};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::nft::{self, Loopback};
use crate::vm::Vm;

/// How many connections a pod may have at a time. What comes beyond waits for its turn in the listener's queue.
const CONNECTIONS: usize = 256;
/// How long the guest may take to connect to its own port.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes on the way in each direction of a connection.
const BUFFER: usize = 16 * 1024;
/// `SO_ORIGINAL_DST` and `IP6T_SO_ORIGINAL_DST`.
const ORIGINAL_DESTINATION: libc::c_int = 80;

/// Why ports cannot be forwarded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RelayError {
    /// The kernel has no nftables, or not all of it.
    #[error(
        "the packet filter refuses the redirection; this takes the kernel modules nf_tables, nft_chain_nat and nft_redir"
    )]
    Filter(#[source] netlink::Error),
    /// No socket.
    #[error("a socket for it cannot be made")]
    Socket(#[source] io::Error),
}

/// The listeners, in the pod's namespace.
#[derive(Debug)]
pub(crate) struct Listeners(pub Vec<(Loopback, StdListener)>);

/// Makes the listeners in the calling thread's namespace and redirects to them what is meant for the guest.
pub(crate) fn listen_here(route: &mut Socket) -> Result<Listeners, RelayError> {
    let header = LinkHeader {
        index: 1,
        flags: IFF_UP,
        change: IFF_UP,
        ..LinkHeader::default()
    };
    let filter_error = |error: netlink::Error| RelayError::Filter(error);
    route
        .request(&Message::new(RTM_NEWLINK, 0, &header.encode()))
        .map_err(|error| RelayError::Socket(error.into()))?;
    let mut socket = Socket::open(Family::Netfilter).map_err(filter_error)?;
    let mut listeners = Vec::new();
    for which in [Loopback::V4, Loopback::V6] {
        let bound = match which {
            Loopback::V4 => StdListener::bind((Ipv4Addr::LOCALHOST, 0)),
            Loopback::V6 => StdListener::bind((Ipv6Addr::LOCALHOST, 0)),
        };
        let listener = match bound {
            Ok(listener) => listener,
            // A host without IPv6.
            Err(_) if which == Loopback::V6 => continue,
            Err(error) => return Err(RelayError::Socket(error)),
        };
        listener.set_nonblocking(true).map_err(RelayError::Socket)?;
        let port = listener.local_addr().map_err(RelayError::Socket)?.port();
        nft::redirect(&mut socket, which, port).map_err(filter_error)?;
        listeners.push((which, listener));
    }
    Ok(Listeners(listeners))
}

/// Takes the redirection away in the calling thread's namespace.
pub(crate) fn restore_here() -> Result<(), netlink::Error> {
    let mut socket = Socket::open(Family::Netfilter)?;
    nft::restore(&mut socket, Loopback::V4)?;
    nft::restore(&mut socket, Loopback::V6)
}

/// Carries connections until it is dropped, or the VM is.
pub(crate) async fn serve(listeners: Listeners, vm: Weak<Vm>) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let mut loops = JoinSet::new();
    for (which, listener) in listeners.0 {
        match TcpListener::from_std(listener) {
            Ok(listener) => {
                loops.spawn(accept(which, listener, vm.clone(), Arc::clone(&room)));
            }
            Err(error) => tracing::warn!(%error, "ports of the pod cannot be forwarded"),
        }
    }
    while loops.join_next().await.is_some() {}
}

async fn accept(which: Loopback, listener: TcpListener, vm: Weak<Vm>, room: Arc<Semaphore>) {
    // Connections end with this task.
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a forwarded connection was not accepted");
                // Out of descriptors, mostly: not to be asked again at once.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some(vm) = vm.upgrade() else {
            return;
        };
        connections.spawn(async move {
            if let Err(error) = carry(which, stream, vm).await {
                tracing::debug!(%error, "a forwarded connection ended");
            }
            drop(permit);
        });
    }
}

/// One connection. Where the guest has nobody listening, the client sees a reset.
async fn carry(which: Loopback, mut client: TcpStream, vm: Arc<Vm>) -> io::Result<()> {
    let port = original_port(which, &client)?;
    let connect = async {
        let mut guest = vm.connect_guest(PORT_FORWARD).await.map_err(io::Error::other)?;
        guest.write_all(&ForwardHeader { port }.encode()).await?;
        let answer = guest.read_u8().await?;
        Ok::<_, io::Error>((guest, answer))
    };
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, connect).await;
    drop(vm);
    match connected {
        Ok(Ok((mut guest, FORWARD_CONNECTED))) => {
            tokio::io::copy_bidirectional_with_sizes(&mut client, &mut guest, BUFFER, BUFFER).await?;
            Ok(())
        }
        refused => {
            rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO))?;
            match refused {
                Ok(Err(error)) => Err(error),
                Ok(Ok(_)) => Err(io::Error::other(format!(
                    "nobody listens on port {port} in the guest"
                ))),
                Err(_elapsed) => Err(io::ErrorKind::TimedOut.into()),
            }
        }
    }
}

/// The port that the client connected to, before it was redirected.
pub(crate) fn original_port(which: Loopback, client: &TcpStream) -> io::Result<u16> {
    let level = match which {
        Loopback::V4 => libc::SOL_IP,
        Loopback::V6 => libc::SOL_IPV6,
    };
    // The port is at the same place in both families' addresses.
    // SAFETY: a socket address holds numbers only; all zero is a valid one.
    let mut address: libc::sockaddr_in6 = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::sockaddr_in6>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to an address of that size, which outlives the call.
    let result = unsafe {
        libc::getsockopt(
            client.as_raw_fd(),
            level,
            ORIGINAL_DESTINATION,
            (&raw mut address).cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        Ok(u16::from_be(address.sin6_port))
    } else {
        Err(io::Error::last_os_error())
    }
}
