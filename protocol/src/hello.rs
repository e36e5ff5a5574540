//! The version handshake that opens the agent's connection: [`Hello`] from the guest, [`HelloReply`] from the
//! host, each preceded by its length as u32 little-endian.
//!
//! Pure encoding and checking; the callers do the reading and writing.

use protobuf::Message;

use crate::agent::{Hello, HelloReply};

/// Version of the agent protocol. Both sides refuse any other.
pub const AGENT_VERSION: u32 = 1;
/// The longest handshake message, in bytes.
pub const MAX_HELLO: usize = 4096;

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum HelloError {
    /// The message is longer than [`MAX_HELLO`].
    #[error(
        "the peer's handshake is {0} bytes long, at most {MAX_HELLO} are allowed: it is not a kata-rs agent"
    )]
    Length(u32),
    /// The message cannot be decoded.
    #[error("the peer's handshake is not understood: {0}")]
    Malformed(#[from] protobuf::Error),
    /// The peer speaks another version.
    #[error(
        "the {peer} speaks agent protocol version {theirs}, this side {AGENT_VERSION}: use guest image and runtime of one release (`make image` rebuilds the guest image)"
    )]
    Version {
        /// Who: `agent` or `host`.
        peer: &'static str,
        /// Its version.
        theirs: u32,
    },
    /// The host has refused the agent.
    #[error("the host refused the agent: {0}")]
    Refused(String),
}

/// Encodes a handshake message with its length.
#[must_use]
pub fn encode(message: &impl Message) -> Vec<u8> {
    let body = message
        .write_to_bytes()
        .expect("a message without required members always encodes");
    let mut bytes = u32::try_from(body.len())
        .expect("handshakes are short")
        .to_le_bytes()
        .to_vec();
    bytes.extend(body);
    bytes
}

/// Checks a length prefix before the body is read.
///
/// # Errors
/// [`HelloError::Length`] when the peer announces more than [`MAX_HELLO`].
pub fn body_length(prefix: [u8; 4]) -> Result<usize, HelloError> {
    let length = u32::from_le_bytes(prefix);
    if length as usize > MAX_HELLO {
        Err(HelloError::Length(length))
    } else {
        Ok(length as usize)
    }
}

/// Decodes the agent's Hello and decides on the reply, which is to be sent in either case.
///
/// # Errors
/// (as the second value) [`HelloError::Version`] or [`HelloError::Malformed`].
pub fn accept(body: &[u8]) -> (HelloReply, Result<Hello, HelloError>) {
    let checked = Hello::parse_from_bytes(body)
        .map_err(HelloError::from)
        .and_then(|hello| {
            if hello.version == AGENT_VERSION {
                Ok(hello)
            } else {
                Err(HelloError::Version {
                    peer: "agent",
                    theirs: hello.version,
                })
            }
        });
    let reply = HelloReply {
        version: AGENT_VERSION,
        refused: checked
            .as_ref()
            .err()
            .map(ToString::to_string)
            .unwrap_or_default(),
        ..Default::default()
    };
    (reply, checked)
}

/// Decodes the host's reply.
///
/// # Errors
/// [`HelloError`] when the host refused or speaks another version.
pub fn check_reply(body: &[u8]) -> Result<(), HelloError> {
    let reply = HelloReply::parse_from_bytes(body)?;
    if !reply.refused.is_empty() {
        return Err(HelloError::Refused(reply.refused));
    }
    if reply.version != AGENT_VERSION {
        return Err(HelloError::Version {
            peer: "host",
            theirs: reply.version,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(version: u32) -> Vec<u8> {
        encode(&Hello {
            version,
            agent_release: "0.1.0".into(),
            ..Default::default()
        })
    }

    #[test]
    fn the_same_version_is_accepted_on_both_sides() {
        let bytes = hello(AGENT_VERSION);
        let length = body_length(bytes[..4].try_into().unwrap()).unwrap();
        assert_eq!(length, bytes.len() - 4);
        let (reply, checked) = accept(&bytes[4..]);
        assert_eq!(checked.unwrap().agent_release, "0.1.0");
        check_reply(&encode(&reply)[4..]).unwrap();
    }

    #[test]
    fn another_version_is_refused_by_both_sides_with_both_versions_named() {
        let (reply, checked) = accept(&hello(AGENT_VERSION + 1)[4..]);
        let error = checked.unwrap_err().to_string();
        assert!(
            error.contains("version 2") && error.contains("this side 1"),
            "{error}"
        );
        assert!(matches!(check_reply(&encode(&reply)[4..]), Err(HelloError::Refused(why)) if why == error));
        let foreign = HelloReply {
            version: 9,
            ..Default::default()
        };
        assert!(matches!(
            check_reply(&encode(&foreign)[4..]),
            Err(HelloError::Version {
                peer: "host",
                theirs: 9
            })
        ));
    }

    #[test]
    fn a_peer_that_is_not_an_agent_is_refused_before_its_message_is_read() {
        assert!(matches!(body_length(*b"HTTP"), Err(HelloError::Length(_))));
        let (reply, checked) = accept(&[0xff; 8]);
        assert!(matches!(checked, Err(HelloError::Malformed(_))));
        assert!(!reply.refused.is_empty());
    }
}
