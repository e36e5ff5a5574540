//! vsock ports of a sandbox, and the headers that open a standard I/O stream and a forwarded connection.
//!
//! The agent connects to the host, [`HOST_CID`], for everything but forwarded connections, which the host makes to
//! the agent. The VMM carries each connection as one Unix stream socket whose host end travels over the vsock channel
//! (see [`VsockOpen`]).

use serde::{Deserialize, Serialize};

/// The host's context id (vsock(7), `VMADDR_CID_HOST`).
pub const HOST_CID: u32 = 2;
/// The guest's context id. Each VM has a vsock of its own, so it is the same in all.
pub const GUEST_CID: u32 = 3;

/// Host port of the agent's control connection: Hello, then ttrpc with the host as client.
pub const PORT_AGENT: u32 = 1024;
/// Host port of standard I/O streams: a [`StreamHeader`], then raw bytes with half-close.
pub const PORT_STDIO: u32 = 1025;

/// Guest port of forwarded connections: a [`ForwardHeader`] from the host, one byte from the agent, then raw bytes with
/// half-close in both directions.
pub const PORT_FORWARD: u32 = 1026;

/// What travels with a connection's descriptor over the vsock channel, as JSON, in either direction.
///
/// From the VMM: the guest has connected to host port `port`; the descriptor is the host's end.
/// To the VMM: connect to guest port `port`; the descriptor is the guest side's end. A refused or reset
/// connection shows as end of file on the peer's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockOpen {
    /// The vsock port that is connected to.
    pub port: u32,
}

/// Opens a standard I/O stream: written by the agent, first thing on a connection to [`PORT_STDIO`].
///
/// 16 bytes, little-endian: magic `KRIO`, version (u16), reserved (u16, zero), token (u64). After it the stream
/// is raw bytes. Output streams: the agent writes and closes. Input streams: the host writes and shuts its
/// sending half down at end of input. A terminal's stream carries both directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamHeader {
    /// The token that the host chose for this stream in `CreateContainer` or `CreateExec`.
    pub token: u64,
}

/// Why a stream header was not accepted.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamHeaderError {
    /// The connection does not begin with the magic number.
    #[error("not a standard I/O stream: it begins with {0:02x?} instead of \"KRIO\"")]
    Magic([u8; 4]),
    /// The peer speaks another version of the header.
    #[error(
        "standard I/O stream version {0} is not supported, only {version}: use agent and runtime of one release",
        version = StreamHeader::VERSION
    )]
    Version(u16),
}

impl StreamHeader {
    /// Length of the header in bytes.
    pub const SIZE: usize = 16;
    /// The version this crate speaks.
    pub const VERSION: u16 = 1;
    const MAGIC: [u8; 4] = *b"KRIO";

    /// Encodes the header.
    #[must_use]
    pub fn encode(self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[0..4].copy_from_slice(&Self::MAGIC);
        bytes[4..6].copy_from_slice(&Self::VERSION.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.token.to_le_bytes());
        bytes
    }

    /// Decodes and checks a header.
    ///
    /// # Errors
    /// [`StreamHeaderError`] when the peer is something else or of another version.
    pub fn decode(bytes: [u8; Self::SIZE]) -> Result<Self, StreamHeaderError> {
        let [m0, m1, m2, m3, v0, v1, _, _, token @ ..] = bytes;
        if [m0, m1, m2, m3] != Self::MAGIC {
            return Err(StreamHeaderError::Magic([m0, m1, m2, m3]));
        }
        match u16::from_le_bytes([v0, v1]) {
            Self::VERSION => Ok(Self {
                token: u64::from_le_bytes(token),
            }),
            other => Err(StreamHeaderError::Version(other)),
        }
    }
}

/// Opens a forwarded connection: written by the host, first thing on a connection to [`PORT_FORWARD`].
///
/// 8 bytes, little-endian: magic `KRPF`, version (u16), port (u16). The agent connects to that port of the guest's own
/// 127.0.0.1, or else of its ::1, and answers with [`FORWARD_CONNECTED`]; or with [`FORWARD_REFUSED`] when nobody
/// listens there, and closes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForwardHeader {
    /// The TCP port in the guest.
    pub port: u16,
}

/// The agent's answer to a [`ForwardHeader`]: what follows is the connection's.
pub const FORWARD_CONNECTED: u8 = 0;
/// The agent's answer to a [`ForwardHeader`]: there is no connection.
pub const FORWARD_REFUSED: u8 = 1;

/// Why a forwarded connection's header was not accepted.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ForwardHeaderError {
    /// The connection does not begin with the magic number.
    #[error("not a forwarded connection: it begins with {0:02x?} instead of \"KRPF\"")]
    Magic([u8; 4]),
    /// The peer speaks another version of the header.
    #[error(
        "version {0} of forwarded connections is not supported, only {version}: use agent and runtime of one release",
        version = ForwardHeader::VERSION
    )]
    Version(u16),
}

impl ForwardHeader {
    /// Length of the header in bytes.
    pub const SIZE: usize = 8;
    /// The version this crate speaks.
    pub const VERSION: u16 = 1;
    const MAGIC: [u8; 4] = *b"KRPF";

    /// Encodes the header.
    #[must_use]
    pub fn encode(self) -> [u8; Self::SIZE] {
        let [m0, m1, m2, m3] = Self::MAGIC;
        let [v0, v1] = Self::VERSION.to_le_bytes();
        let [p0, p1] = self.port.to_le_bytes();
        [m0, m1, m2, m3, v0, v1, p0, p1]
    }

    /// Decodes and checks a header.
    ///
    /// # Errors
    /// [`ForwardHeaderError`] when the peer is something else or of another version.
    pub fn decode(bytes: [u8; Self::SIZE]) -> Result<Self, ForwardHeaderError> {
        let [m0, m1, m2, m3, v0, v1, p0, p1] = bytes;
        if [m0, m1, m2, m3] != Self::MAGIC {
            return Err(ForwardHeaderError::Magic([m0, m1, m2, m3]));
        }
        match u16::from_le_bytes([v0, v1]) {
            Self::VERSION => Ok(Self {
                port: u16::from_le_bytes([p0, p1]),
            }),
            other => Err(ForwardHeaderError::Version(other)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_wire() {
        let header = StreamHeader {
            token: 0x0102_0304_0506_0708,
        };
        assert_eq!(StreamHeader::decode(header.encode()), Ok(header));
    }

    #[test]
    fn a_forwarded_connections_header_survives_the_wire_or_is_refused_by_name() {
        let header = ForwardHeader { port: 0x1f90 };
        assert_eq!(ForwardHeader::decode(header.encode()), Ok(header));
        let mut bytes = header.encode();
        bytes[5] = 1;
        assert_eq!(
            ForwardHeader::decode(bytes),
            Err(ForwardHeaderError::Version(257))
        );
        bytes[0] = b'X';
        assert_eq!(
            ForwardHeader::decode(bytes),
            Err(ForwardHeaderError::Magic(*b"XRPF"))
        );
    }

    #[test]
    fn another_magic_or_version_is_refused_by_name() {
        let mut bytes = StreamHeader { token: 1 }.encode();
        bytes[4] = 9;
        let error = StreamHeader::decode(bytes).unwrap_err();
        assert_eq!(error, StreamHeaderError::Version(9));
        assert!(error.to_string().contains("version 9"), "{error}");
        bytes[0] = b'X';
        assert_eq!(
            StreamHeader::decode(bytes),
            Err(StreamHeaderError::Magic(*b"XRIO"))
        );
    }
}
