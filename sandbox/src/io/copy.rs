//! Copying between a stream of the guest and the host's end of it. Each copy has one buffer: whoever does not take
//! his bytes makes the other side wait, and no memory grows.

use std::io;
use std::sync::Arc;

use rustix::net::Shutdown;
use tokio::net::UnixStream;
use tokio::sync::watch;

use super::end::{CHUNK, Sink, Source};

/// Copies the guest's output until its stream ends. Returns when everything has been written.
pub(super) async fn output(stream: &UnixStream, sink: Sink, what: &'static str) {
    let mut buffer = Vec::new();
    let mut sink = sink;
    loop {
        match receive(stream, &mut buffer).await {
            // A reset is how a stream of a VM that was killed ends.
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let (memory, result) = sink.write_all(buffer).await;
        buffer = memory;
        buffer.clear();
        match result {
            Ok(()) => {}
            // Nobody will ever read: closing the stream passes this on to the writing process.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return,
            // A full disk must not kill what runs: its output is lost, and it runs on.
            Err(error) => {
                tracing::warn!(stream = what, %error, "output cannot be written: dropped from here on");
                sink = Sink::Discard;
            }
        }
    }
}

/// Copies input to the guest until it ends, the guest closes the stream, or `closed` says that it shall end. At the
/// end a stream that is only input is half-closed and held until the guest has closed its half.
pub(super) async fn input(
    mut source: Option<Source>,
    stream: Arc<UnixStream>,
    mut closed: watch::Receiver<bool>,
    terminal: bool,
) {
    let mut buffer = Vec::new();
    while let Some(source) = &mut source {
        buffer.clear();
        let read = tokio::select! {
            biased;
            () = hung_up(&stream), if !terminal => return,
            read = source.read(&mut buffer) => read,
            () = told(&mut closed) => Ok(0),
        };
        match read {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, "standard input cannot be read: ended");
                break;
            }
        }
        if send(&stream, &buffer).await.is_err() {
            return;
        }
    }
    drop(source);
    drop(buffer);
    // A terminal has no end of input of its own, and its other direction goes on.
    if !terminal && rustix::net::shutdown(&*stream, Shutdown::Write).is_ok() {
        hung_up(&stream).await;
    }
}

async fn told(closed: &mut watch::Receiver<bool>) {
    let _ = closed.wait_for(|closed| *closed).await;
}

/// Waits until the guest has closed its half of an input stream. It has nothing to send there: a byte is as good
/// as a hang-up.
async fn hung_up(stream: &UnixStream) {
    loop {
        if stream.readable().await.is_err() {
            return;
        }
        match stream.try_read(&mut [0]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            _ => return,
        }
    }
}

async fn receive(stream: &UnixStream, buffer: &mut Vec<u8>) -> io::Result<usize> {
    loop {
        stream.readable().await?;
        buffer.reserve(CHUNK);
        match stream.try_read_buf(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            other => return other,
        }
    }
}

async fn send(stream: &UnixStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.writable().await?;
        match stream.try_write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
