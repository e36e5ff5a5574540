//! One pod, one VM: the host-side core of kata-rs.
//!
//! A [`Sandbox`] spawns the VMM, boots the guest, and runs containers in it: their life cycle, storage and
//! standard I/O. The doors (`shim`, `cli`) translate their callers' protocols into this API and decide nothing.
//! No type of containerd, Docker or a command line lives here, and nothing of KVM beyond opening `/dev/kvm` for
//! the VMM.

mod agent;
pub mod annotations;
mod api;
mod boot_files;
pub mod cgroup;
pub mod config;
mod container;
mod create;
pub mod demand;
mod disks;
pub mod error;
mod events;
pub mod hooks;
pub mod io;
mod limits;
pub mod namespaces;
pub mod network;
mod pause;
mod pod;
mod process;
mod proxy;
mod resize;
mod sandbox;
mod seqpacket;
mod shares;
pub mod sizing;
mod spawn;
mod spec;
pub mod storage;
mod streams;
mod timeline;
mod usage;
mod vm;
mod volumes;

pub use annotations::Role;
pub use api::{
    ContainerRequest, Deleted, ExecRequest, Exit, GuestInfo, ProcessEntry, ProcessId, ProcessState,
    RootfsMount, SandboxExit, SandboxExitCause, Status, Stdio, StdioTarget, StdioUris,
};
pub use config::Config;
pub use error::{Error, ErrorKind};
pub use events::{Event, Events};
pub use protocol::agent::{ContainerStatsResponse, container_stats_response};
pub use protocol::{capabilities, channel};
pub use sandbox::Sandbox;
pub use sizing::{Size, Sizing};
pub use spec::{Netns, SandboxSpec};
pub use timeline::{ContainerTimeline, Timeline};
