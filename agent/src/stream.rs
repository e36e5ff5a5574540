//! Connections to the host: vsock sockets, as asynchronous byte streams and as plain descriptors.

use std::future::Future;
use std::io::{IoSlice, Result};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use protocol::stream::{HOST_CID, PORT_STDIO, StreamHeader};
use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, Interest, ReadBuf};
use tokio::sync::watch;

/// A connected stream socket.
#[derive(Debug)]
pub struct Stream {
    socket: AsyncFd<OwnedFd>,
    /// Told when the peer has closed.
    closed: Option<watch::Sender<bool>>,
}

/// Opens the stream with this token at the host: connected, header sent.
pub type Connector = Arc<dyn Fn(u64) -> Pin<Box<dyn Future<Output = Result<Stream>> + Send>> + Send + Sync>;

/// Connects standard I/O streams over vsock.
#[must_use]
pub fn vsock_connector() -> Connector {
    Arc::new(|token| {
        Box::pin(async move {
            let mut stream = Stream::connect_vsock(PORT_STDIO).await?;
            stream.write_all(&StreamHeader { token }.encode()).await?;
            Ok(stream)
        })
    })
}

impl Stream {
    /// Takes a connected socket; makes it non-blocking.
    ///
    /// # Errors
    /// When there is no runtime, or the descriptor cannot be polled.
    pub fn new(socket: OwnedFd) -> Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self {
            socket: watch_fd(socket, Interest::READABLE | Interest::WRITABLE)?,
            closed: None,
        })
    }

    /// Connects to a port of the host.
    ///
    /// # Errors
    /// Those of connect(2): ECONNRESET when nobody listens there.
    pub async fn connect_vsock(port: u32) -> Result<Self> {
        let socket = vsock_socket(libc::SOCK_NONBLOCK)?;
        match connect(&socket, port) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(errno) => return Err(errno.into()),
        }
        let stream = Self::new(socket)?;
        drop(stream.socket.writable().await?);
        rustix::net::sockopt::socket_error(stream.socket.get_ref())??;
        Ok(stream)
    }

    /// Lets others know when the peer has closed the connection or it broke.
    pub fn watch_closed(&mut self) -> watch::Receiver<bool> {
        let (sender, receiver) = watch::channel(false);
        self.closed = Some(sender);
        receiver
    }

    /// The descriptor, for splice(2) and the like.
    #[must_use]
    pub fn socket(&self) -> &AsyncFd<OwnedFd> {
        &self.socket
    }

    /// Ends what is sent; the other direction stays open.
    pub fn finish_sending(&self) {
        // A connection that is gone has nothing to end.
        let _ = rustix::net::shutdown(self.socket.get_ref(), Shutdown::Write);
    }

    fn note_closed(&self) {
        if let Some(closed) = &self.closed {
            closed.send_replace(true);
        }
    }
}

/// Has the runtime watch a non-blocking descriptor.
///
/// # Errors
/// When it cannot be polled.
pub fn watch_fd(fd: OwnedFd, interest: Interest) -> Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is owned from here on, and neither closed nor exchanged before it is taken back.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// Connects to a port of the host and waits for it: for the time before there is a runtime.
///
/// # Errors
/// Those of socket(2) and connect(2).
pub fn connect_vsock_blocking(port: u32) -> Result<OwnedFd> {
    let socket = vsock_socket(0)?;
    connect(&socket, port)?;
    Ok(socket)
}

/// A vsock stream socket with these flags of socket(2).
///
/// # Errors
/// Those of socket(2).
pub fn vsock_socket(flags: libc::c_int) -> Result<OwnedFd> {
    // SAFETY: socket(2) takes numbers only.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC | flags, 0) };
    if fd == -1 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn connect(socket: &OwnedFd, port: u32) -> std::result::Result<(), Errno> {
    // SAFETY: sockaddr_vm holds numbers only; all zero is its neutral value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = HOST_CID;
    address.svm_port = port;
    // SAFETY: the address is a sockaddr_vm and its length is told.
    let result = unsafe {
        libc::connect(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_vm>() as libc::socklen_t,
        )
    };
    if result == -1 {
        Err(crate::container::last_errno())
    } else {
        Ok(())
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        loop {
            let mut guard = ready!(self.socket.poll_read_ready(cx))?;
            match guard.try_io(|socket| Ok(rustix::io::read(socket.get_ref(), buffer.initialize_unfilled())?))
            {
                Ok(Ok(length)) => {
                    if length == 0 {
                        self.note_closed();
                    }
                    buffer.advance(length);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => {
                    self.note_closed();
                    return Poll::Ready(Err(error));
                }
                Err(_would_block) => {}
            }
        }
    }
}

impl Stream {
    fn poll_send(
        &self,
        cx: &mut Context<'_>,
        send: impl Fn(&OwnedFd) -> std::result::Result<usize, Errno>,
    ) -> Poll<Result<usize>> {
        loop {
            let mut guard = ready!(self.socket.poll_write_ready(cx))?;
            match guard.try_io(|socket| Ok(send(socket.get_ref())?)) {
                Ok(Err(error)) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<Result<usize>> {
        self.poll_send(cx, |socket| {
            rustix::net::send(socket, buffer, SendFlags::NOSIGNAL)
        })
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        self.poll_send(cx, |socket| rustix::io::writev(socket, buffers))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<()>> {
        self.finish_sending();
        Poll::Ready(Ok(()))
    }
}
