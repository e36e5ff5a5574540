//! The guest agent's messages and ttrpc service, generated from `proto/agent.proto`; its comments define the
//! behaviour.
//!
//! [`service`] holds the `Agent` trait and `create_agent` for the server, and `AgentClient` for the client.

#[allow(
    missing_docs,
    warnings,
    clippy::all,
    clippy::pedantic,
    clippy::undocumented_unsafe_blocks
)]
mod generated {
    // The generated code names its sibling module, so both stand side by side under the names it expects.
    pub mod agent {
        include!(concat!(env!("OUT_DIR"), "/agent.rs"));
    }
    pub mod agent_ttrpc {
        include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
    }
}

pub use generated::agent::*;
pub use generated::agent_ttrpc as service;
