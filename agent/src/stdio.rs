//! Standard I/O: moves bytes between a process's pipes or terminal and its streams to the host.
//!
//! Pipes and sockets are joined by splice(2), so the bytes do not pass through the agent. A pipe and not the stream
//! itself is what a process gets, since programs open /dev/stdout anew, which a socket does not allow.
//!
//! An output stream ends when every process that holds the pipe has closed it. When the process itself ends before
//! that, its own output is complete as soon as the pipe has been found empty; what descendants write later is still
//! carried. A host that takes nothing for [`STALLED`] does not hold the news of an exit back any longer.

use std::io::Result;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::stream::{Stream, watch_fd};

/// How long a host may take no output of an exited process before its exit is told anyway.
pub const STALLED: Duration = Duration::from_secs(2);
/// At most this much per splice: a pipe holds no more.
const CHUNK: usize = 1 << 16;
const TERMINAL_BUFFER: usize = 8192;

/// The agent's and the process's ends of three standard descriptors.
#[derive(Debug)]
pub struct Pipes {
    /// The agent's ends; None where the process has /dev/null.
    pub ours: Ends,
    /// The process's ends.
    pub theirs: [OwnedFd; 3],
}

/// The agent's ends of the pipes that a process has.
#[derive(Debug, Default)]
pub struct Ends {
    pub stdin: Option<OwnedFd>,
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
}

impl Pipes {
    /// Makes a pipe for each stream that is wanted.
    ///
    /// # Errors
    /// Those of pipe2(2) and of opening /dev/null.
    pub fn new(stdin: bool, stdout: bool, stderr: bool) -> std::result::Result<Self, Errno> {
        let null = || {
            use rustix::fs::{Mode, OFlags, open};
            open(c"/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        };
        let mut ours = Ends::default();
        let output = |wanted: bool, ours: &mut Option<OwnedFd>| {
            if !wanted {
                return null();
            }
            let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
            rustix::io::ioctl_fionbio(&read, true)?;
            *ours = Some(read);
            Ok(write)
        };
        let stdout = output(stdout, &mut ours.stdout)?;
        let stderr = output(stderr, &mut ours.stderr)?;
        let stdin = if stdin {
            let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
            rustix::io::ioctl_fionbio(&write, true)?;
            ours.stdin = Some(write);
            read
        } else {
            null()?
        };
        Ok(Self {
            ours,
            theirs: [stdin, stdout, stderr],
        })
    }
}

/// Streams at the host for the standard I/O of one process.
#[derive(Debug, Default)]
pub struct Streams {
    pub stdin: Option<Stream>,
    pub stdout: Option<Stream>,
    pub stderr: Option<Stream>,
    pub terminal: Option<Stream>,
}

/// The running copies of one process's standard I/O. Dropping it ends them.
#[derive(Debug)]
pub struct Relays {
    tasks: Vec<JoinHandle<()>>,
    outputs: Vec<watch::Receiver<Progress>>,
    exited: watch::Sender<bool>,
}

/// How far an output stream has come.
#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    bytes: u64,
    /// Everything that the process itself wrote has been sent.
    complete: bool,
}

impl Relays {
    /// Starts copying.
    ///
    /// # Errors
    /// When a descriptor cannot be polled.
    pub fn start(ends: Ends, terminal: Option<Arc<Terminal>>, streams: Streams) -> Result<Self> {
        let mut this = Self {
            tasks: Vec::new(),
            outputs: Vec::new(),
            exited: watch::Sender::new(false),
        };
        if let (Some(pipe), Some(stream)) = (ends.stdin, streams.stdin) {
            let pipe = watch_fd(pipe, Interest::WRITABLE)?;
            this.tasks.push(tokio::spawn(feed(stream, pipe)));
        }
        for (pipe, stream) in [(ends.stdout, streams.stdout), (ends.stderr, streams.stderr)] {
            if let (Some(pipe), Some(stream)) = (pipe, stream) {
                let pipe = watch_fd(pipe, Interest::READABLE)?;
                let (mut output, exited) = this.output();
                this.tasks.push(tokio::spawn(async move {
                    drain(&pipe, &stream, &mut output, exited).await;
                    stream.finish_sending();
                    output.complete();
                }));
            }
        }
        if let (Some(terminal), Some(stream)) = (terminal, streams.terminal) {
            let (mut output, exited) = this.output();
            let stream = Arc::new(stream);
            let input = tokio::spawn(type_into(Arc::clone(&stream), Arc::clone(&terminal)));
            this.tasks.push(tokio::spawn(async move {
                show(&terminal, &stream, &mut output, exited).await;
                stream.finish_sending();
                input.abort();
                output.complete();
            }));
        }
        Ok(this)
    }

    fn output(&mut self) -> (Output, watch::Receiver<bool>) {
        let (sender, receiver) = watch::channel(Progress::default());
        self.outputs.push(receiver);
        (Output(sender), self.exited.subscribe())
    }

    /// The process has ended: waits until what it wrote has been sent, or the host takes nothing any more.
    pub async fn finish(&mut self) {
        self.exited.send_replace(true);
        for output in &mut self.outputs {
            loop {
                let before = output.borrow_and_update().bytes;
                let stalled = tokio::time::timeout(STALLED, output.wait_for(|now| now.complete))
                    .await
                    .is_err();
                if !stalled || output.borrow().bytes == before {
                    break;
                }
            }
        }
    }
}

impl Drop for Relays {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// The sender's side of [`Progress`].
struct Output(watch::Sender<Progress>);

impl Output {
    fn sent(&mut self, bytes: usize) {
        self.0.send_modify(|progress| progress.bytes += bytes as u64);
    }

    fn complete(&mut self) {
        self.0
            .send_if_modified(|progress| !std::mem::replace(&mut progress.complete, true));
    }
}

/// From a process's pipe to the host until the pipe ends or the host has gone. Dropping the pipe then gives later
/// writers SIGPIPE.
async fn drain(
    pipe: &AsyncFd<OwnedFd>,
    stream: &Stream,
    output: &mut Output,
    mut exited: watch::Receiver<bool>,
) {
    let gone = *exited.borrow_and_update();
    let mut gone = gone;
    loop {
        match join(pipe.get_ref(), stream.socket().get_ref()) {
            Ok(0) => return,
            Ok(length) => output.sent(length),
            Err(Errno::INTR) => {}
            // One of the two is not ready; splice(2) does not say which.
            Err(Errno::AGAIN) if readable(pipe.get_ref()) => {
                let Ok(mut guard) = stream.socket().writable().await else {
                    return;
                };
                if !writable(stream.socket().get_ref()) {
                    guard.clear_ready();
                }
            }
            Err(Errno::AGAIN) => {
                if gone {
                    output.complete();
                }
                tokio::select! {
                    guard = pipe.readable() => {
                        let Ok(mut guard) = guard else { return };
                        if !readable(pipe.get_ref()) {
                            guard.clear_ready();
                        }
                    }
                    // The pipe is looked at once more after the exit: nothing of the process can follow then.
                    _ = exited.wait_for(|exited| *exited), if !gone => gone = true,
                }
            }
            Err(_) => return,
        }
    }
}

/// From the host into a process's standard input until the host ends it or nobody reads it.
async fn feed(stream: Stream, pipe: AsyncFd<OwnedFd>) {
    loop {
        match join(stream.socket().get_ref(), pipe.get_ref()) {
            Ok(0) => return,
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if readable(stream.socket().get_ref()) => {
                let Ok(mut guard) = pipe.writable().await else {
                    return;
                };
                if !writable(pipe.get_ref()) {
                    guard.clear_ready();
                }
            }
            Err(Errno::AGAIN) => {
                tokio::select! {
                    guard = stream.socket().readable() => {
                        let Ok(mut guard) = guard else { return };
                        if !readable(stream.socket().get_ref()) {
                            guard.clear_ready();
                        }
                    }
                    // The last reader has gone.
                    _ = pipe.ready(Interest::ERROR) => return,
                }
            }
            Err(_) => return,
        }
    }
}

fn join(from: &OwnedFd, to: &OwnedFd) -> std::result::Result<usize, Errno> {
    splice(
        from,
        None,
        to,
        None,
        CHUNK,
        SpliceFlags::MOVE | SpliceFlags::NONBLOCK,
    )
}

fn readable(fd: &OwnedFd) -> bool {
    has(
        fd,
        PollFlags::IN | PollFlags::HUP | PollFlags::ERR | PollFlags::RDHUP,
    )
}

fn writable(fd: &OwnedFd) -> bool {
    has(fd, PollFlags::OUT | PollFlags::HUP | PollFlags::ERR)
}

/// Looks without waiting.
fn has(fd: &OwnedFd, events: PollFlags) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), events)];
    poll(
        &mut fds,
        Some(&Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        }),
    )
    .is_ok_and(|ready| ready > 0)
}

/// A terminal's master.
#[derive(Debug)]
pub struct Terminal(AsyncFd<OwnedFd>);

impl Terminal {
    /// Takes a master; makes it non-blocking.
    ///
    /// # Errors
    /// When it cannot be polled.
    pub fn new(master: OwnedFd) -> Result<Self> {
        rustix::io::ioctl_fionbio(&master, true)?;
        watch_fd(master, Interest::READABLE | Interest::WRITABLE).map(Self)
    }

    /// The descriptor.
    #[must_use]
    pub fn master(&self) -> &OwnedFd {
        self.0.get_ref()
    }
}

/// From a terminal to the host, until no process has the terminal open any more.
async fn show(terminal: &Terminal, stream: &Stream, output: &mut Output, mut exited: watch::Receiver<bool>) {
    let mut buffer = [0; TERMINAL_BUFFER];
    let mut gone = *exited.borrow_and_update();
    let master = &terminal.0;
    loop {
        match rustix::io::read(master.get_ref(), &mut buffer) {
            Ok(0) => return,
            Ok(length) => {
                // A host that has gone must not block the processes: their output is dropped.
                if send_all(stream, &buffer[..length]).await.is_ok() {
                    output.sent(length);
                }
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                if gone {
                    output.complete();
                }
                tokio::select! {
                    guard = master.readable() => {
                        let Ok(mut guard) = guard else { return };
                        if !readable(master.get_ref()) {
                            guard.clear_ready();
                        }
                    }
                    _ = exited.wait_for(|exited| *exited), if !gone => gone = true,
                }
            }
            // EIO: the last slave was closed (pty(7)).
            Err(_) => return,
        }
    }
}

/// From the host into a terminal. The end of the host's input is not the end of the terminal.
async fn type_into(stream: Arc<Stream>, terminal: Arc<Terminal>) {
    let mut buffer = [0; TERMINAL_BUFFER];
    loop {
        let read = stream
            .socket()
            .async_io(Interest::READABLE, |socket| {
                Ok(rustix::io::read(socket, &mut buffer)?)
            })
            .await;
        let Ok(length @ 1..) = read else { return };
        let mut rest = &buffer[..length];
        while !rest.is_empty() {
            let written = terminal
                .0
                .async_io(Interest::WRITABLE, |master| Ok(rustix::io::write(master, rest)?))
                .await;
            match written {
                Ok(length) => rest = &rest[length..],
                Err(_) => return,
            }
        }
    }
}

async fn send_all(stream: &Stream, mut bytes: &[u8]) -> Result<()> {
    while !bytes.is_empty() {
        let sent = stream
            .socket()
            .async_io(Interest::WRITABLE, |socket| {
                Ok(rustix::net::send(
                    socket,
                    bytes,
                    rustix::net::SendFlags::NOSIGNAL,
                )?)
            })
            .await?;
        bytes = &bytes[sent..];
    }
    Ok(())
}
