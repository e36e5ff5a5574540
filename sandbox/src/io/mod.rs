//! A process's standard I/O: the host's ends, and the streams by which the guest's agent reaches them.
//!
//! [`Io::open`] opens the host's ends and makes a token for each stream; the agent gets the tokens and opens a stream
//! for each. [`Io::attach`] brings both together and copies until one side ends.

mod copy;
mod end;
mod error;
mod fifo;
mod logger;
mod target;
#[cfg(test)]
mod tests;
mod uri;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use protocol::agent;
use tokio::net::UnixStream;
use tokio::sync::{oneshot, watch};
use tokio::task::AbortHandle;

use crate::api::Stdio;
use end::{Sink, Source};
use target::{Ends, Input};

pub use error::IoError;

/// What an agent's stream is connected to.
#[derive(Debug)]
enum Stream {
    Input(Begun),
    Output(Sink, &'static str),
    Terminal(Option<Begun>, Sink),
}

/// Input that can be read, or will be once the process starts.
#[derive(Debug)]
enum Begun {
    Now(Source),
    Later(oneshot::Receiver<Source>),
}

impl Begun {
    async fn source(self) -> Option<Source> {
        match self {
            Self::Now(source) => Some(source),
            Self::Later(source) => source.await.ok(),
        }
    }
}

/// The standard I/O of one process. Dropping it closes it.
#[derive(Debug)]
pub struct Io {
    tokens: agent::Stdio,
    state: Mutex<State>,
    /// How many outputs are not at their end yet.
    outputs: Arc<watch::Sender<usize>>,
    /// Whether a log program runs.
    logging: Arc<watch::Sender<bool>>,
    stdin_closed: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct State {
    /// Streams that the agent has not opened yet, by token.
    waiting: Vec<(u64, Stream)>,
    /// A fifo for input that is not open yet, and who waits for it.
    fifo: Option<(PathBuf, oneshot::Sender<Source>)>,
    /// What keeps input from ending.
    hold: Option<Hold>,
    copies: Vec<AbortHandle>,
}

/// What [`Io::close_stdin`] lets go of.
#[derive(Debug)]
enum Hold {
    /// A fifo's writing end: input ends when the other writers have closed theirs, and all has been read.
    Writer(#[expect(dead_code, reason = "held open")] std::os::fd::OwnedFd),
    /// Nothing but our reading on.
    Reading,
    /// A fifo's writing end, once it is opened.
    Unopened,
}

impl Io {
    /// Opens the host's ends. `container` and `namespace` are told to a log program.
    ///
    /// # Errors
    /// [`IoError`] that names the target.
    pub async fn open(stdio: Stdio, container: &str, namespace: &str) -> Result<Self, IoError> {
        let terminal = stdio.terminal;
        let Ends {
            stdin,
            stdout,
            stderr,
            logger,
        } = target::open(stdio, container, namespace).await?;
        let (source, hold, fifo) = match stdin {
            Some(Input::Open(source)) => (Some(Begun::Now(source)), Some(Hold::Reading), None),
            Some(Input::Fifo(path)) => {
                let (sender, receiver) = oneshot::channel();
                let fifo = Some((path, sender));
                (Some(Begun::Later(receiver)), Some(Hold::Unopened), fifo)
            }
            None => (None, None, None),
        };
        let mut tokens = agent::Stdio::new();
        let mut waiting = Vec::new();
        let mut expect = |stream| -> Result<u64, IoError> {
            let token = random_token()?;
            waiting.push((token, stream));
            Ok(token)
        };
        tokens.terminal = terminal;
        let outputs = if terminal {
            tokens.terminal_token = expect(Stream::Terminal(source, stdout.unwrap_or(Sink::Discard)))?;
            1
        } else {
            if let Some(source) = source {
                tokens.stdin_token = expect(Stream::Input(source))?;
            }
            let mut outputs = 0;
            if let Some(sink) = stdout {
                tokens.stdout_token = expect(Stream::Output(sink, "stdout"))?;
                outputs += 1;
            }
            if let Some(sink) = stderr {
                tokens.stderr_token = expect(Stream::Output(sink, "stderr"))?;
                outputs += 1;
            }
            outputs
        };
        let outputs = Arc::new(watch::Sender::new(outputs));
        let logging = Arc::new(watch::Sender::new(logger.is_some()));
        if let Some(logger) = logger {
            let (outputs, logging) = (Arc::clone(&outputs), Arc::clone(&logging));
            tokio::spawn(async move {
                all_finished(&outputs).await;
                logger.finish().await;
                logging.send_replace(false);
            });
        }
        Ok(Self {
            tokens,
            state: Mutex::new(State {
                waiting,
                fifo,
                hold,
                copies: Vec::new(),
            }),
            outputs,
            logging,
            stdin_closed: watch::Sender::new(false),
        })
    }

    /// What the agent is told.
    #[must_use]
    pub fn tokens(&self) -> agent::Stdio {
        self.tokens.clone()
    }

    /// The tokens of the streams that the agent shall open.
    #[must_use]
    pub fn token_list(&self) -> Vec<u64> {
        let Self { tokens, .. } = self;
        let all = [
            tokens.stdin_token,
            tokens.stdout_token,
            tokens.stderr_token,
            tokens.terminal_token,
        ];
        all.into_iter().filter(|token| *token != 0).collect()
    }

    /// Connects a stream that the agent opened. Dropped when its token is not one of these, or was used before.
    /// Must be called inside a tokio runtime.
    pub fn attach(&self, token: u64, stream: UnixStream) {
        let mut state = self.state();
        let Some(position) = state.waiting.iter().position(|(waiting, _)| *waiting == token) else {
            return;
        };
        let (_, kind) = state.waiting.swap_remove(position);
        let stream = Arc::new(stream);
        let closed = self.stdin_closed.subscribe();
        let finished = || Finished(Arc::clone(&self.outputs));
        match kind {
            Stream::Input(source) => {
                let copy = async move { copy::input(source.source().await, stream, closed, false).await };
                state.copies.push(tokio::spawn(copy).abort_handle());
            }
            Stream::Output(sink, what) => {
                let finished = finished();
                let copy = async move {
                    copy::output(&stream, sink, what).await;
                    drop(finished);
                };
                state.copies.push(tokio::spawn(copy).abort_handle());
            }
            Stream::Terminal(source, sink) => {
                let keyboard = Arc::clone(&stream);
                let input = async move {
                    let source = match source {
                        Some(source) => source.source().await,
                        None => None,
                    };
                    copy::input(source, keyboard, closed, true).await;
                };
                let input = tokio::spawn(input).abort_handle();
                let finished = finished();
                state.copies.push(input.clone());
                let copy = async move {
                    copy::output(&stream, sink, "terminal").await;
                    input.abort();
                    drop(finished);
                };
                state.copies.push(tokio::spawn(copy).abort_handle());
            }
        }
    }

    /// Opens a fifo for input: for when the process starts. A caller that sends its input and is done would
    /// otherwise be done before it has been told of the process, and have nothing yet to close its input by (`ctr`).
    ///
    /// # Errors
    /// [`IoError::Open`].
    pub fn begin_input(&self) -> Result<(), IoError> {
        let mut state = self.state();
        let Some((path, waiting)) = state.fifo.take() else {
            return Ok(());
        };
        let (source, writer) =
            fifo::source(&path).map_err(|cause| target::opening("standard input", path, cause))?;
        if state.hold.is_some() {
            state.hold = Some(Hold::Writer(writer));
        }
        // Nobody waits when the guest is gone.
        let _ = waiting.send(source);
        Ok(())
    }

    /// Ends the process's input, once everything that was sent has been read. Nothing happens the second time.
    pub fn close_stdin(&self) {
        let hold = self.state().hold.take();
        if matches!(hold, Some(Hold::Reading)) {
            self.stdin_closed.send_replace(true);
        }
    }

    /// Resolves when all output has been written and a log program has ended.
    pub async fn drained(&self) {
        all_finished(&self.outputs).await;
        let _ = self.logging.subscribe().wait_for(|logging| !*logging).await;
    }

    /// Says that the guest is gone: streams that it has not opened will not come.
    pub fn abandon(&self) {
        let waiting = std::mem::take(&mut self.state().waiting);
        let outputs = waiting
            .iter()
            .filter(|(_, stream)| !matches!(stream, Stream::Input(_)))
            .count();
        drop(waiting);
        self.outputs
            .send_modify(|left| *left = left.saturating_sub(outputs));
    }

    /// Ends everything: what has not been copied yet is dropped, and the host's ends are closed.
    pub fn close(&self) {
        let State {
            waiting,
            fifo,
            hold,
            copies,
        } = std::mem::take(&mut *self.state());
        drop((waiting, fifo, hold));
        for copy in copies {
            copy.abort();
        }
        self.outputs.send_replace(0);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Io {
    fn drop(&mut self) {
        self.close();
    }
}

/// Counts an output as finished when it is dropped, however its copy ended.
struct Finished(Arc<watch::Sender<usize>>);

impl Drop for Finished {
    fn drop(&mut self) {
        self.0.send_modify(|left| *left = left.saturating_sub(1));
    }
}

async fn all_finished(outputs: &watch::Sender<usize>) {
    let _ = outputs.subscribe().wait_for(|left| *left == 0).await;
}

/// A token that a guest cannot guess; not 0, which means none.
fn random_token() -> Result<u64, IoError> {
    loop {
        let mut bytes = [0; 8];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
            .map_err(|errno| IoError::system("getrandom")(errno.into()))?;
        match u64::from_ne_bytes(bytes) {
            0 => {}
            token => return Ok(token),
        }
    }
}
