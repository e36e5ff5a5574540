//! Netlink (netlink(7), rtnetlink(7)): writing messages, reading them, and a socket that carries them to the kernel of
//! the network namespace it was made in. What the messages mean is for those who send them.
//!
//! The kernel answers a request while it is sent, so nothing here waits for another process.

mod message;
pub mod route;
mod socket;

pub use message::{Attribute, Attributes, Message, Reply};
pub use socket::{Family, Socket};

use rustix::io::Errno;

/// Why a request was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", words(.errno, .message))]
pub struct Error {
    /// The kernel's error number.
    pub errno: Errno,
    /// What the kernel adds in words; often nothing.
    pub message: String,
}

fn words(errno: &Errno, message: &str) -> String {
    if message.is_empty() {
        errno.to_string()
    } else {
        format!("{message}: {errno}")
    }
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Self {
            errno,
            message: String::new(),
        }
    }
}

impl From<Error> for std::io::Error {
    fn from(error: Error) -> Self {
        if error.message.is_empty() {
            error.errno.into()
        } else {
            Self::new(Self::from(error.errno).kind(), error)
        }
    }
}
