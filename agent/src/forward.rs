//! Forwarded connections: the host connects over vsock and names a port, the agent connects to that port of the
//! guest's own loopback address, and bytes go both ways until both have ended.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use protocol::stream::{FORWARD_CONNECTED, FORWARD_REFUSED, ForwardHeader, HOST_CID, PORT_FORWARD};
use rustix::net::{SocketFlags, accept_with};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, Interest};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use crate::stream::{Stream, vsock_socket, watch_fd};

/// How many there may be at a time; the host has no more either.
const CONNECTIONS: usize = 256;
/// How many may wait to be accepted.
const BACKLOG: i32 = 64;
/// How long the host may take to name a port.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes on the way in each direction of a connection.
const BUFFER: usize = 16 * 1024;

/// Begins to listen, and serves for as long as the guest lives.
///
/// # Errors
/// Those of socket(2), bind(2) and listen(2).
pub fn start() -> std::io::Result<()> {
    let socket = vsock_socket(libc::SOCK_NONBLOCK)?;
    bind(&socket)?;
    rustix::net::listen(&socket, BACKLOG)?;
    tokio::spawn(accept(watch_fd(socket, Interest::READABLE)?));
    Ok(())
}

fn bind(socket: &OwnedFd) -> std::io::Result<()> {
    // SAFETY: sockaddr_vm holds numbers only; all zero is its neutral value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = libc::VMADDR_CID_ANY;
    address.svm_port = PORT_FORWARD;
    // SAFETY: the address is a sockaddr_vm and its length is told.
    let result = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_vm>() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

async fn accept(listener: AsyncFd<OwnedFd>) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            return;
        };
        let Ok(mut ready) = listener.readable().await else {
            return;
        };
        let accepted = ready.try_io(|socket| {
            let connection = accept_with(socket.get_ref(), SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
            Ok(connection)
        });
        if let Ok(Ok(connection)) = accepted
            && peer(&connection) == Some(HOST_CID)
            && let Ok(stream) = Stream::new(connection)
        {
            tokio::spawn(async move {
                // Whoever is at the other end sees the connection end.
                let _ = carry(stream).await;
                drop(permit);
            });
        }
    }
}

/// Who has connected. Containers can reach this port too where the kernel has vsock's loopback.
fn peer(connection: &OwnedFd) -> Option<u32> {
    // SAFETY: sockaddr_vm holds numbers only; all zero is its neutral value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to an address of that size, which outlives the call.
    let result =
        unsafe { libc::getpeername(connection.as_raw_fd(), (&raw mut address).cast(), &raw mut length) };
    (result == 0).then_some(address.svm_cid)
}

/// One connection.
async fn carry<S: AsyncRead + AsyncWrite + Unpin>(mut host: S) -> std::io::Result<()> {
    let mut header = [0; ForwardHeader::SIZE];
    tokio::time::timeout(HEADER_TIMEOUT, host.read_exact(&mut header)).await??;
    let port = ForwardHeader::decode(header).map_err(std::io::Error::other)?.port;
    let connected = match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
        Ok(stream) => Ok(stream),
        Err(_) => TcpStream::connect((Ipv6Addr::LOCALHOST, port)).await,
    };
    match connected {
        Ok(mut local) => {
            host.write_u8(FORWARD_CONNECTED).await?;
            tokio::io::copy_bidirectional_with_sizes(&mut host, &mut local, BUFFER, BUFFER).await?;
            Ok(())
        }
        Err(error) => {
            host.write_u8(FORWARD_REFUSED).await?;
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    }

    #[test]
    fn bytes_go_both_ways_and_each_way_ends_by_itself() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            runtime().block_on(async {
                let Ok(listener) = TcpListener::bind(address).await else {
                    println!("skipped {address}: no such address here");
                    return;
                };
                let port = listener.local_addr().unwrap().port();
                let (mut host, agents) = tokio::io::duplex(64);
                let carried = tokio::spawn(carry(agents));
                host.write_all(&ForwardHeader { port }.encode()).await.unwrap();
                assert_eq!(host.read_u8().await.unwrap(), FORWARD_CONNECTED);
                let (mut server, _) = listener.accept().await.unwrap();
                host.write_all(b"question").await.unwrap();
                host.shutdown().await.unwrap();
                let mut question = String::new();
                server.read_to_string(&mut question).await.unwrap();
                assert_eq!(question, "question");
                // The other way is still open.
                server.write_all(b"answer").await.unwrap();
                drop(server);
                let mut answer = String::new();
                host.read_to_string(&mut answer).await.unwrap();
                assert_eq!(answer, "answer");
                carried.await.unwrap().unwrap();
            });
        }
    }

    #[test]
    fn a_port_nobody_listens_on_is_said_to_be_so() {
        runtime().block_on(async {
            let unused = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = unused.local_addr().unwrap().port();
            drop(unused);
            let (mut host, agents) = tokio::io::duplex(64);
            let carried = tokio::spawn(carry(agents));
            host.write_all(&ForwardHeader { port }.encode()).await.unwrap();
            assert_eq!(host.read_u8().await.unwrap(), FORWARD_REFUSED);
            assert!(host.read_u8().await.is_err(), "the connection ends");
            carried.await.unwrap().unwrap_err();
        });
    }

    #[test]
    fn a_connection_of_something_else_ends() {
        runtime().block_on(async {
            let (mut host, agents) = tokio::io::duplex(64);
            let carried = tokio::spawn(carry(agents));
            host.write_all(b"GET / HT").await.unwrap();
            let error = carried.await.unwrap().unwrap_err();
            assert!(error.to_string().contains("KRPF"), "{error}");
        });
    }
}
