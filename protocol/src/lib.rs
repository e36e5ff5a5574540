//! Everything that crosses a process boundary of kata-rs, typed, and nothing else.
//!
//! * [`channel`]: one message and its file descriptors over a `SOCK_SEQPACKET` Unix socket.
//! * [`vmm`]: what the sandbox and the VMM say to each other over such a socket.
//! * [`stream`]: vsock ports, and the header that opens a standard I/O stream.
//! * [`hello`]: the version handshake that opens the agent's connection.
//! * [`capabilities`]: their names in a container's specification.
//! * [`agent`] (feature `agent`): the guest agent's ttrpc service, generated from `proto/agent.proto`.
//!
//! No behaviour lives here beyond encoding, decoding and checking versions.

#[cfg(feature = "agent")]
pub mod agent;
pub mod capabilities;
pub mod channel;
#[cfg(feature = "agent")]
pub mod hello;
pub mod stream;
pub mod vmm;
