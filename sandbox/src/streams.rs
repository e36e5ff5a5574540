//! Connections that the guest makes to the host over vsock, and where each belongs: the agent's control
//! connection, or a process's standard I/O. The guest is not trusted: what it may not open is closed.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use protocol::channel::Received;
use protocol::stream::{PORT_AGENT, PORT_STDIO, StreamHeader, VsockOpen};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, oneshot};

use crate::io::Io;
use crate::seqpacket::Seqpacket;

/// How long a connection may take to say which stream it is.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// How many connections may be about to say so. An agent opens three per process.
const UNNAMED_STREAMS: usize = 256;

/// Which process's standard I/O each token opens.
#[derive(Debug, Default)]
pub(crate) struct Router(Mutex<HashMap<u64, Arc<Io>>>);

impl Router {
    /// Expects streams with these tokens.
    pub fn expect(&self, tokens: &[u64], io: &Arc<Io>) {
        let mut map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        map.extend(
            tokens
                .iter()
                .filter(|token| **token != 0)
                .map(|token| (*token, Arc::clone(io))),
        );
    }

    /// Expects them no longer.
    pub fn forget(&self, tokens: &[u64]) {
        let mut map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for token in tokens {
            map.remove(token);
        }
    }

    /// Each token opens one stream, once.
    fn claim(&self, token: u64) -> Option<Arc<Io>> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&token)
    }
}

/// Receives the guest's connections until the VMM closes the channel. The first to the agent's port goes to
/// `agent`.
pub(crate) async fn dispatch(vsock: Arc<Seqpacket>, agent: oneshot::Sender<UnixStream>, router: Arc<Router>) {
    let mut agent = Some(agent);
    let unnamed = Arc::new(Semaphore::new(UNNAMED_STREAMS));
    loop {
        let (port, stream) = match vsock.receive().await {
            Ok(Received::Message(bytes, fds)) => match connection(&bytes, fds) {
                Ok(connection) => connection,
                Err(error) => {
                    tracing::warn!(%error, "a connection of the guest was dropped");
                    continue;
                }
            },
            Ok(Received::Closed) => return,
            Err(error) => {
                tracing::warn!(%error, "the vsock channel broke");
                return;
            }
        };
        match port {
            PORT_AGENT => match agent.take() {
                Some(waiting) => drop(waiting.send(stream)),
                None => tracing::warn!("the guest opened a second agent connection: closed"),
            },
            PORT_STDIO => match Arc::clone(&unnamed).try_acquire_owned() {
                Ok(permit) => {
                    let router = Arc::clone(&router);
                    tokio::spawn(async move {
                        if let Err(error) = route(stream, &router).await {
                            tracing::warn!(%error, "a standard I/O stream of the guest was dropped");
                        }
                        drop(permit);
                    });
                }
                Err(_) => tracing::warn!("the guest opens too many streams at once: closed"),
            },
            port => tracing::warn!(port, "the guest connected to a port that nobody serves: closed"),
        }
    }
}

fn connection(bytes: &[u8], fds: Vec<OwnedFd>) -> io::Result<(u32, UnixStream)> {
    let open: VsockOpen = serde_json::from_slice(bytes)?;
    let [fd] = <[OwnedFd; 1]>::try_from(fds)
        .map_err(|fds| io::Error::other(format!("it came with {} descriptors instead of one", fds.len())))?;
    let stream = std::os::unix::net::UnixStream::from(fd);
    stream.set_nonblocking(true)?;
    Ok((open.port, UnixStream::from_std(stream)?))
}

async fn route(mut stream: UnixStream, router: &Router) -> io::Result<()> {
    let mut header = [0; StreamHeader::SIZE];
    tokio::time::timeout(HEADER_TIMEOUT, stream.read_exact(&mut header)).await??;
    let token = StreamHeader::decode(header).map_err(io::Error::other)?.token;
    let io = router
        .claim(token)
        .ok_or_else(|| io::Error::other("it names a stream that nobody waits for"))?;
    io.attach(token, stream);
    Ok(())
}
