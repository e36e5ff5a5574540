//! What the sandbox and its VMM say to each other over the control channel.
//!
//! The channel is a `SOCK_SEQPACKET` socket that the VMM inherits as descriptor [`CONTROL_FD`]. Each message is
//! one JSON document. The sandbox sends a [`Request`] and gets exactly one [`Response`] with the same `id`;
//! requests are answered in order. The VMM also sends [`Event`]s at any time. Descriptors travel with the
//! message that names them: an [`FdIndex`] is a position in that message's descriptor list.
//!
//! The VMM process must be the first of a pid namespace of its own (`CLONE_NEWPID`) when it shall jail itself,
//! and is killed when the *thread* that started it ends (`PR_SET_PDEATHSIG`): start it from one that lives as
//! long as the VM. It keeps descriptors 0 to 3, closes all others, and clears its environment.
//!
//! The first request must be `Configure`; its `version` is checked before anything else. When the sandbox's
//! end closes, the VMM ends at once: a VM never outlives its sandbox.

use serde::{Deserialize, Serialize};

/// The version of these messages. Sandbox and VMM refuse each other when it differs.
pub const CONTROL_VERSION: u32 = 3;
/// The descriptor number under which the VMM finds its control channel.
pub const CONTROL_FD: i32 = 3;

/// Position of a descriptor in the list that came with the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FdIndex(pub u32);

/// A request from the sandbox.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Chosen by the sandbox, returned in the response.
    pub id: u64,
    /// What to do.
    pub body: RequestBody,
}

/// What the sandbox asks of the VMM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum RequestBody {
    /// Build the machine and jail the process. Only once, and first.
    Configure {
        /// [`CONTROL_VERSION`] of the sandbox.
        version: u32,
        /// The machine.
        config: Box<VmConfig>,
    },
    /// Start the vCPUs. Only once, after `Configure`.
    Boot,
    /// Give a block slot its backing: the device's capacity changes and the guest is notified.
    /// Refused when the slot is occupied.
    AttachBlock {
        /// Which slot, by position in [`VmConfig::blocks`].
        slot: u32,
        /// What backs it from now on.
        backing: BlockBacking,
    },
    /// Empty a block slot: capacity 0, backing closed after the requests in flight.
    DetachBlock {
        /// Which slot.
        slot: u32,
    },
    /// Show one more directory under the virtio-fs root.
    AddShare(Share),
    /// Take a directory away from the virtio-fs root. Files the guest still holds open stay readable until closed.
    RemoveShare {
        /// Its name, as given in [`Share::name`].
        name: String,
    },
    /// Stop all vCPUs between two instructions. Devices finish what they have begun.
    Pause,
    /// Let the vCPUs go on.
    Resume,
    /// Give a network slot its backing: the guest sees the link come up. Refused when the slot is occupied.
    AttachNet {
        /// Which slot, by position in [`VmConfig::nets`].
        slot: u32,
        /// What backs it from now on.
        backing: NetBacking,
    },
    /// Empty a network slot: the link goes down, the tap is closed.
    DetachNet {
        /// Which slot.
        slot: u32,
    },
    /// Make vCPUs until there are this many; the guest puts them online. At least as many as there are, at most
    /// [`VmConfig::max_vcpus`]: a vCPU that was made stays.
    SetVcpus {
        /// How many there shall be.
        count: u8,
    },
    /// Ask the guest for this much memory of the virtio-mem device, in MiB; more or less than now. What it then has
    /// plugged shows in [`Metrics::plugged_memory_bytes`].
    SetPluggedMemory {
        /// How much, at most [`VmConfig::pluggable_memory_mib`].
        mib: u32,
    },
    /// Set the balloon's target: how much memory the guest shall give back, in MiB.
    SetBalloon {
        /// Target in MiB; 0 gives everything back to the guest.
        target_mib: u32,
    },
    /// Counters of this VM.
    Metrics,
    /// The boot timeline so far.
    Timeline,
    /// End the VM without asking the guest. Answered before the process exits.
    Shutdown,
}

/// The answer to one request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Response {
    /// The request's id.
    pub id: u64,
    /// What came of it.
    pub result: Result<Reply, Failure>,
}

/// What a successful request returns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Done; nothing to return.
    Done,
    /// Answer to [`RequestBody::Metrics`].
    Metrics(Metrics),
    /// Answer to [`RequestBody::Timeline`].
    Timeline(Timeline),
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What kind of failure it is, for code.
    pub kind: FailureKind,
    /// What failed and what to do about it, for people: the whole chain of causes.
    pub message: String,
}

/// Kinds of failure that a caller may want to tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The sandbox speaks another [`CONTROL_VERSION`].
    Version,
    /// The request is malformed or contradicts itself (missing descriptor, unknown slot, bad size).
    Invalid,
    /// The request does not fit the VM's state (boot twice, attach to an occupied slot).
    State,
    /// KVM refused: /dev/kvm unusable, or a capability is missing.
    Kvm,
    /// The kernel or guest image is not one this VMM can boot.
    Image,
    /// The host is out of something (memory, descriptors, disk).
    Resources,
    /// Anything else the host's kernel reported.
    Io,
}

/// What the VMM says unasked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The VM has ended; the process exits next, with [`ExitCause::exit_code`].
    Exited {
        /// Why.
        cause: ExitCause,
        /// The guest console's last lines, oldest first, at most 16 KiB. Untrusted text.
        console: String,
    },
    /// The guest has plugged exactly as much memory as the last [`RequestBody::SetPluggedMemory`] asked for. Sent at
    /// most once for each.
    PluggedMemory {
        /// How much, in bytes.
        bytes: u64,
    },
}

/// Every message the VMM sends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromVmm {
    /// Answer to a request.
    Response(Response),
    /// Unasked.
    Event(Event),
}

/// Why a VM ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitCause {
    /// The guest shut itself down or rebooted in an orderly way.
    GuestShutdown,
    /// The guest kernel panicked.
    GuestPanic,
    /// A vCPU triple-faulted without a panic having been reported.
    TripleFault,
    /// The sandbox asked for it, or closed the control channel.
    Requested,
    /// The VMM cannot go on: KVM error, or a host failure in a device.
    VmmError {
        /// The whole chain of causes.
        message: String,
    },
}

impl ExitCause {
    /// Exit status of the VMM process for this cause.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::GuestShutdown | Self::Requested => 0,
            Self::VmmError { .. } => 1,
            Self::GuestPanic => 10,
            Self::TripleFault => 11,
        }
    }
}

/// One virtual machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Names the VM in messages.
    pub id: String,
    /// Number of vCPUs, 1 to 254.
    pub vcpus: u8,
    /// How many vCPUs the machine can ever have, at least `vcpus`; see [`RequestBody::SetVcpus`].
    pub max_vcpus: u8,
    /// Guest memory in MiB, a multiple of 2, at least 64.
    pub memory_mib: u32,
    /// Size of the virtio-mem device's region in MiB, a multiple of 128; 0: no such device. None of it is plugged at
    /// boot; see [`RequestBody::SetPluggedMemory`].
    pub pluggable_memory_mib: u32,
    /// /dev/kvm, opened for reading and writing.
    pub kvm: FdIndex,
    /// The guest kernel: a `vmlinux` ELF with a PVH entry note.
    pub kernel: FdIndex,
    /// The initramfs that holds the agent, if the guest image is one.
    pub initrd: Option<FdIndex>,
    /// Words appended to the kernel command line that the VMM composes.
    pub cmdline: String,
    /// virtio-vsock: the `SOCK_SEQPACKET` channel over which connections travel as
    /// [`crate::stream::VsockOpen`] with one descriptor each.
    pub vsock: Option<FdIndex>,
    /// Network devices in the order the guest shall see them. A slot without backing has its link down until
    /// [`RequestBody::AttachNet`].
    pub nets: Vec<NetSlot>,
    /// Block slots in the order the guest shall see them. All devices together are at most 23: one each for
    /// vsock, console, entropy, balloon, memory and file system, the network devices, and these. A slot without backing has capacity 0 until
    /// [`RequestBody::AttachBlock`].
    pub blocks: Vec<BlockSlot>,
    /// virtio-fs with this tag, when given; shares come with [`RequestBody::AddShare`].
    pub fs_tag: Option<String>,
    /// A balloon with free page reporting.
    pub balloon: bool,
    /// Show the guest's whole boot on the console, for debugging.
    pub verbose_console: bool,
    /// Where console output goes besides the ring that [`Event::Exited`] and metrics report from.
    pub console_log: Option<FdIndex>,
    /// When the sandbox started this process, `CLOCK_MONOTONIC` in nanoseconds: zero of the timeline.
    pub started_ns: u64,
    /// Whether to jail the process. Off only in tests.
    pub jail: bool,
}

/// A place for a block device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockSlot {
    /// What the guest reads as the device's serial (virtio-blk `GET_ID`, at most 20 bytes).
    pub serial: String,
    /// What backs it at boot.
    pub backing: Option<BlockBacking>,
}

/// What backs a block device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockBacking {
    /// What the device consists of, one behind the other: 1 to [`MAX_EXTENTS`]. The guest sees one disk.
    pub extents: Vec<BlockExtent>,
    /// How much the guest may do in a time; `None` is no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<RateLimit>,
}

/// The most extents of a block device: each has a descriptor, and one message carries them all.
pub const MAX_EXTENTS: usize = crate::channel::MAX_FDS;

/// A part of a block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockExtent {
    /// A raw file or block device.
    pub fd: FdIndex,
    /// How many bytes of the device it fills from its beginning on, a multiple of 512. `None`: all it holds, without a
    /// trailing part of a sector. A read-only extent may be up to 4095 bytes longer than what it holds: the rest
    /// reads as zeroes.
    pub length: Option<u64>,
    /// Whether the guest may only read.
    pub read_only: bool,
}

impl BlockBacking {
    /// A device that is one whole file or block device.
    #[must_use]
    pub fn whole(fd: FdIndex, read_only: bool) -> Self {
        let extent = BlockExtent {
            fd,
            length: None,
            read_only,
        };
        Self {
            extents: vec![extent],
            limit: None,
        }
    }
}

/// A network device (virtio 1.3, section 5.1).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetSlot {
    /// What the guest reads as the device's address, and recognises it by. The guest may use another one on the wire.
    pub mac: [u8; 6],
    /// What backs it at boot.
    pub backing: Option<NetBacking>,
}

/// What backs a network device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetBacking {
    /// A tap interface's queue, opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`
    /// (Documentation/networking/tuntap.rst). The VMM sets its offloads and the size of its header.
    pub tap: FdIndex,
    /// How much the guest may receive in a time; `None` is no limit.
    pub receive_limit: Option<RateLimit>,
    /// How much it may send.
    pub transmit_limit: Option<RateLimit>,
}

/// A limit of bytes, of operations, or of both. An operation may begin when there is anything in both buckets; what
/// it takes more than there is, is paid back before the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Bytes.
    pub bytes: Option<TokenBucket>,
    /// Operations: block requests or frames. Where segmentation is left to the network card, a frame holds up to
    /// 64 KiB, whatever the MTU.
    pub operations: Option<TokenBucket>,
}

/// A token bucket: it holds `capacity` tokens, is full at first, and is refilled evenly in `refill_ms`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Tokens, at least 1.
    pub capacity: u64,
    /// How long an empty bucket takes to be full, in ms: 1 to [`MAX_REFILL_MS`].
    pub refill_ms: u64,
}

/// A day: the longest that a [`TokenBucket`] may take to be full.
pub const MAX_REFILL_MS: u64 = 86_400_000;

/// A directory shown to the guest under the virtio-fs root.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Share {
    /// One path component; the directory appears under this name.
    pub name: String,
    /// The directory: an `O_PATH` descriptor, for instance from open_tree(2) or fsmount(2).
    pub fd: FdIndex,
    /// How the guest may cache.
    pub cache: CachePolicy,
}

/// How long the guest trusts what it has read from a share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CachePolicy {
    /// Only this guest uses the directory: cache names, attributes and data.
    Exclusive,
    /// Others change the directory too: revalidate on open, names and attributes live for a second.
    Shared,
}

/// Counters of one VM, all since boot.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// vCPU exits to user space.
    pub vcpu_exits: u64,
    /// Bytes of guest memory that are resident on the host.
    pub guest_resident_bytes: u64,
    /// Bytes of guest memory configured.
    pub guest_memory_bytes: u64,
    /// Bytes of the virtio-mem device's region that the guest has plugged.
    pub plugged_memory_bytes: u64,
    /// Per device: name (`block0`, `vsock`, …) and its counters by name.
    pub devices: Vec<(String, Vec<(String, u64)>)>,
    /// The guest console's last lines, oldest first. Untrusted text.
    pub console: String,
}

/// When the stages of a boot were reached: µs since [`VmConfig::started_ns`], absent when not yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    /// `main` of the VMM began.
    pub vmm_main: Option<u64>,
    /// The machine's description had arrived.
    pub configured: Option<u64>,
    /// KVM had created the VM with its interrupt controller and vCPUs.
    pub vm_created: Option<u64>,
    /// Kernel and initramfs were in guest memory.
    pub kernel_loaded: Option<u64>,
    /// The first vCPU was about to execute the guest's first instruction.
    pub first_instruction: Option<u64>,
    /// The agent connected to [`crate::stream::PORT_AGENT`].
    pub agent_connected: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_reads_back_as_it_was_written() {
        let request = Request {
            id: 7,
            body: RequestBody::AttachBlock {
                slot: 2,
                backing: BlockBacking::whole(FdIndex(0), true),
            },
        };
        let wire = serde_json::to_string(&request).unwrap();
        assert_eq!(
            wire,
            r#"{"id":7,"body":{"attach_block":{"slot":2,"backing":{"extents":[{"fd":0,"length":null,"read_only":true}]}}}}"#
        );
        assert_eq!(serde_json::from_str::<Request>(&wire).unwrap(), request);
    }

    #[test]
    fn an_unknown_field_is_refused_by_name() {
        let error =
            serde_json::from_str::<Request>(r#"{"id":1,"body":{"detach_block":{"slot":0,"force":true}}}"#)
                .unwrap_err();
        assert!(error.to_string().contains("force"), "{error}");
    }

    #[test]
    fn causes_that_a_caller_must_tell_apart_have_their_own_exit_codes() {
        let codes = [
            ExitCause::GuestShutdown,
            ExitCause::GuestPanic,
            ExitCause::TripleFault,
        ]
        .map(|c| c.exit_code());
        assert_eq!(codes, [0, 10, 11]);
    }
}
