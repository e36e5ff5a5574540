//! The messages of Kubernetes' container runtime interface that this shim reads, generated from `proto/cri.proto`.

#[allow(warnings, clippy::all, clippy::pedantic, clippy::undocumented_unsafe_blocks)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/cri.rs"));
}

pub use generated::*;
