//! Carries a command's own standard I/O to and from pipes, and puts its terminal into raw mode.
//!
//! The container never gets the caller's descriptors: a pipe can be made non-blocking and half-closed without
//! touching a terminal or file that others share.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::thread::{self, JoinHandle};

use rustix::termios::{OptionalActions, Termios};
use sandbox::{Stdio, StdioTarget};

use crate::error::Error;

/// The caller's standard I/O, being relayed.
pub struct Relay {
    outputs: Vec<JoinHandle<()>>,
    raw: Option<RawMode>,
}

impl Relay {
    /// Starts relaying; returns the container's ends.
    ///
    /// # Errors
    /// [`Error::NoTerminal`] when a terminal is asked for and there is none.
    pub fn start(interactive: bool, terminal: bool) -> Result<(Self, Stdio), Error> {
        let raw = match (terminal, interactive && io::stdin().is_terminal()) {
            (true, true) => Some(RawMode::enter()?),
            (true, false) if interactive => return Err(Error::NoTerminal),
            _ => None,
        };
        let mut relay = Self {
            outputs: Vec::new(),
            raw,
        };
        let stdin = if interactive {
            StdioTarget::Fd(input()?)
        } else {
            StdioTarget::Null
        };
        let stdout = StdioTarget::Fd(relay.output(io::stdout())?);
        let stderr = if terminal {
            StdioTarget::Null
        } else {
            StdioTarget::Fd(relay.output(io::stderr())?)
        };
        Ok((
            relay,
            Stdio {
                stdin,
                stdout,
                stderr,
                terminal,
            },
        ))
    }

    /// Waits until all output has been written, and gives the terminal back.
    pub fn finish(self) {
        for output in self.outputs {
            // A relay that could not write (a closed pipe) has nothing more to say.
            let _ = output.join();
        }
        drop(self.raw);
    }

    fn output(&mut self, mut to: impl Write + Send + 'static) -> Result<OwnedFd, Error> {
        let (mut reader, writer) = io::pipe().map_err(Error::host("cannot make a pipe"))?;
        self.outputs.push(thread::spawn(move || {
            let mut buffer = vec![0; 64 * 1024];
            while let Ok(read @ 1..) = reader.read(&mut buffer) {
                if to.write_all(&buffer[..read]).and_then(|()| to.flush()).is_err() {
                    break;
                }
            }
        }));
        Ok(writer.into())
    }
}

/// A pipe that standard input is copied into until its end.
fn input() -> Result<OwnedFd, Error> {
    let (reader, mut writer) = io::pipe().map_err(Error::host("cannot make a pipe"))?;
    thread::spawn(move || {
        let mut buffer = vec![0; 64 * 1024];
        // Unbuffered: what is typed goes on at once, and nothing is read ahead.
        let Ok(stdin) = io::stdin().as_fd().try_clone_to_owned() else {
            return;
        };
        let mut stdin = File::from(stdin);
        while let Ok(read @ 1..) = stdin.read(&mut buffer) {
            if writer.write_all(&buffer[..read]).is_err() {
                break;
            }
        }
    });
    Ok(reader.into())
}

/// The terminal in raw mode until dropped.
struct RawMode(Termios);

impl RawMode {
    fn enter() -> Result<Self, Error> {
        let failed =
            |errno: rustix::io::Errno| Error::host("cannot set the terminal to raw mode")(errno.into());
        let before = rustix::termios::tcgetattr(io::stdin()).map_err(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        rustix::termios::tcsetattr(io::stdin(), OptionalActions::Now, &raw).map_err(failed)?;
        Ok(Self(before))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // The terminal is gone when this fails; there is nothing to give back.
        let _ = rustix::termios::tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

/// The terminal's size in rows and columns, if standard input or output is one.
pub fn window_size() -> Option<(u16, u16)> {
    let size =
        rustix::termios::tcgetwinsize(io::stdin()).or_else(|_| rustix::termios::tcgetwinsize(io::stdout()));
    size.ok()
        .filter(|size| size.ws_row > 0 && size.ws_col > 0)
        .map(|size| (size.ws_row, size.ws_col))
}
