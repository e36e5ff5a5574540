//! When the stages of a sandbox's start were reached, for people and benchmarks. Measuring happens where the
//! stages happen; this holds the numbers.

use serde::Serialize;

/// When a sandbox's stages were reached, in µs since the sandbox was started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Timeline {
    /// The VMM process had been spawned.
    pub vmm_spawned: Option<u64>,
    /// `main` of the VMM began.
    pub vmm_main: Option<u64>,
    /// The machine's description had arrived.
    pub configured: Option<u64>,
    /// KVM had created the VM with its interrupt controller and vCPUs.
    pub vm_created: Option<u64>,
    /// Kernel and guest image were in guest memory.
    pub kernel_loaded: Option<u64>,
    /// The first vCPU was about to execute the guest's first instruction.
    pub first_instruction: Option<u64>,
    /// The agent connected to the VMM's vsock.
    pub agent_connected: Option<u64>,
    /// The agent's Hello had been accepted.
    pub agent_hello: Option<u64>,
    /// The guest had been configured: containers can be made.
    pub ready: Option<u64>,
    /// In the guest: from its kernel's start until the agent's `main`, µs.
    pub guest_agent_main: Option<u64>,
    /// In the guest: from its kernel's start until the agent said Hello, µs.
    pub guest_agent_hello: Option<u64>,
    /// The containers that exist, in the order they were made.
    pub containers: Vec<ContainerTimeline>,
}

/// When a container's stages were reached, in µs since the sandbox was started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ContainerTimeline {
    /// The container.
    pub id: String,
    /// Its creation was asked for.
    pub requested: u64,
    /// Its storage had been opened on the host.
    pub storage_opened: Option<u64>,
    /// The guest was ready for it, its storage was attached and its host process ran.
    pub attached: Option<u64>,
    /// The agent had made it.
    pub created: Option<u64>,
    /// Its start was asked for.
    pub start_requested: Option<u64>,
    /// Its init executes.
    pub started: Option<u64>,
    /// Its init had exited.
    pub exited: Option<u64>,
}
