//! What can go wrong at the command line, and with which exit status.

use std::error::Error as _;
use std::io;
use std::path::PathBuf;

use sandbox::ErrorKind;

use crate::image::ImageError;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The image cannot be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] sandbox::config::ConfigError),
    /// The sandbox or its container failed.
    #[error("{0}")]
    Sandbox(#[from] sandbox::Error),
    /// A container's holder reported a failure.
    #[error("{message}")]
    Reported {
        /// Its own words.
        message: String,
        /// The exit status it asks for.
        status: u8,
    },
    /// There is no such container.
    #[error("there is no container \"{0}\": `kata-rs ps --all` lists them")]
    NoContainer(String),
    /// The container is there but does not run.
    #[error("container \"{0}\" does not run")]
    NotRunning(String),
    /// The container runs.
    #[error("container \"{0}\" runs: kill it first, or remove it with --force")]
    Running(String),
    /// The name is taken.
    #[error("there is a container \"{0}\" already: remove it with `kata-rs rm {0}` or choose another name")]
    NameTaken(String),
    /// The name cannot be one.
    #[error(
        "\"{0}\" cannot name a container: use 1 to 64 letters, digits, \"_\", \".\" and \"-\", a letter or digit first"
    )]
    BadName(String),
    /// Not a signal.
    #[error("\"{0}\" is not a signal: use a name such as TERM or a number from 1 to 64")]
    BadSignal(String),
    /// The user is not in the container's passwd or group file.
    #[error("there is no {kind} \"{name}\" in the container's {file}: give a number instead")]
    NoUser {
        /// `user` or `group`.
        kind: &'static str,
        /// What was asked for.
        name: String,
        /// Where it was looked for.
        file: &'static str,
    },
    /// Neither the command line nor the image says what to run.
    #[error("the image names no command: give one after the image")]
    NoCommand,
    /// `-t` without a terminal.
    #[error("-t needs a terminal on standard input: leave it out, or run from a terminal")]
    NoTerminal,
    /// A file operation failed.
    #[error("{what} {path}")]
    File {
        /// What was attempted.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The host refused something that is no file.
    #[error("{what}")]
    Host {
        /// What was attempted.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
}

impl Error {
    /// A failure on a file.
    pub fn file(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { what, path, source }
    }

    /// A failure of the host.
    pub fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }

    /// The message with all its causes, on one line.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            let message = error.to_string();
            // Some causes are part of their parent's message already.
            if !text.contains(&message) {
                text.push_str(": ");
                text.push_str(&message);
            }
            cause = error.source();
        }
        text
    }

    /// 127 and 126 as a shell would, otherwise 125.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Sandbox(error) => match error.kind() {
                ErrorKind::ExecutableNotFound => 127,
                ErrorKind::ExecutableNotPermitted => 126,
                _ => 125,
            },
            Self::Reported { status, .. } => *status,
            _ => 125,
        }
    }
}
