//! Who is connected to the shim: known so that it hangs up last.
//!
//! A caller that finds an answer and the end of the connection at once may take the end for the answer: ttrpc's client
//! in Go picks either, and containerd then says of a sandbox that was shut down "ttrpc: closed".

use std::io;
use std::os::unix::net::UnixListener;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures::stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::watch;
use ttrpc::r#async::transport::Listener;

/// The connections that are open.
pub struct Callers(watch::Sender<usize>);

impl Callers {
    /// A listener whose connections are counted as long as they are open. Needs the event loop.
    pub fn of(listener: UnixListener) -> io::Result<(Listener, Self)> {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::UnixListener::from_std(listener)?;
        let count = watch::Sender::new(0);
        let accepting = stream::unfold((listener, count.clone()), |(listener, count)| async {
            let accepted = listener.accept().await;
            let caller = accepted.map(|(stream, _)| Caller {
                stream,
                _open: Open::new(&count),
            });
            Some((caller, (listener, count)))
        });
        Ok((Listener::new(accepting), Self(count)))
    }

    /// Returns when no connection is open.
    pub async fn gone(&self) {
        // The sender is here: it cannot be closed.
        let _ = self.0.subscribe().wait_for(|open| *open == 0).await;
    }
}

/// Counts for one connection until it is dropped.
struct Open(watch::Sender<usize>);

impl Open {
    fn new(count: &watch::Sender<usize>) -> Self {
        count.send_modify(|open| *open += 1);
        Self(count.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.send_modify(|open| *open -= 1);
    }
}

struct Caller {
    stream: UnixStream,
    _open: Open,
}

impl AsyncRead for Caller {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, into)
    }
}

impl AsyncWrite for Caller {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        from: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, from)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        from: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, from)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use ttrpc::r#async::Server;

    use super::*;

    /// Returns when so many connections are open.
    async fn open(callers: &Callers, number: usize) {
        let mut count = callers.0.subscribe();
        count.wait_for(|open| *open == number).await.unwrap();
    }

    #[tokio::test]
    async fn callers_are_gone_when_the_last_has_hung_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (listener, callers) = Callers::of(UnixListener::bind(&path).unwrap()).unwrap();
        callers.gone().await;
        let mut server = Server::new().add_listener(listener);
        server.start().await.unwrap();
        let one = UnixStream::connect(&path).await.unwrap();
        let other = UnixStream::connect(&path).await.unwrap();
        open(&callers, 2).await;
        drop(one);
        open(&callers, 1).await;
        assert!(callers.gone().now_or_never().is_none());
        drop(other);
        callers.gone().await;
    }
}
