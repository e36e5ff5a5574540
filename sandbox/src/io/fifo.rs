//! Named pipes between containerd and a container, fifo(7).
//!
//! containerd opens its ends whenever it likes, and opens them again after a restart. So each end here is opened with
//! its counterpart held beside it: opening never waits for the other side, a reader that goes away does not make
//! writing fail, and input does not end when a writer goes away.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};
use tokio::io::Interest;

use super::end::{Polled, Sink, Source};

/// Opens a fifo for output.
pub(super) fn sink(path: &Path) -> io::Result<Sink> {
    // First the reading end: without a reader, opening for writing without waiting fails.
    let reader = open(path, OFlags::RDONLY)?;
    let writer = Polled::nonblocking(open(path, OFlags::WRONLY)?, Interest::WRITABLE)?;
    Ok(Sink::Polled(writer, Some(reader)))
}

/// Opens a fifo for input. It ends once the second descriptor and every other writer's are closed.
pub(super) fn source(path: &Path) -> io::Result<(Source, OwnedFd)> {
    let reader = Polled::nonblocking(open(path, OFlags::RDONLY)?, Interest::READABLE)?;
    let writer = open(path, OFlags::WRONLY)?;
    Ok((Source::Polled(reader), writer))
}

fn open(path: &Path, access: OFlags) -> io::Result<OwnedFd> {
    let flags = access | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(CWD, path, flags, Mode::empty())?)
}
