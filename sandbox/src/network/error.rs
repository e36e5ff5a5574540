//! What goes wrong with a pod's network on the host.

use std::io;
use std::path::PathBuf;

use crate::error::{ErrorKind, kind_of_io};

/// What works, for messages.
const DEVICES: &str = "veth, macvlan, ipvlan (l2 and l3), bridge, bond, vlan, dummy, netkit (l2) and physical Ethernet devices can";

/// What went wrong with the network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The pod's network namespace cannot be opened.
    #[error("the network namespace {path} cannot be opened")]
    Open {
        /// Where it should be.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The thread that works in the namespace did not come about, or may not enter it.
    #[error("the pod's network namespace cannot be entered")]
    Enter(#[source] io::Error),
    /// What is in the namespace cannot be read.
    #[error("the {what} of the pod's network namespace cannot be read")]
    Read {
        /// Links, addresses, …
        what: &'static str,
        /// What the kernel says.
        #[source]
        cause: netlink::Error,
    },
    /// An interface of a kind that no VM can be wired to.
    #[error(
        "the pod's interface {name} cannot be given to a VM: its kind is {kind}; {DEVICES}: have the CNI plugin make one of \
         those, or use another RuntimeClass"
    )]
    Device {
        /// The interface.
        name: String,
        /// Its kind, as the kernel names it.
        kind: String,
    },
    /// An interface without an Ethernet address of its own.
    #[error(
        "the pod's interface {0} cannot be given to a VM: it has no Ethernet address; have the CNI plugin make it in \
         layer 2 mode"
    )]
    NoAddress(String),
    /// An interface that others in the namespace stand on.
    #[error(
        "the pod's interface {lower} cannot be given to a VM together with {upper}, which is made on top of it: leave \
         {lower} without an address, or make {upper} on an interface outside the pod"
    )]
    Stacked {
        /// The lower interface.
        lower: String,
        /// The one on top of it.
        upper: String,
    },
    /// The MTU is beyond what a tap can have.
    #[error(
        "the pod's interface {name} has an MTU of {mtu}, and a VM's is {most} at most: set a smaller one"
    )]
    Mtu {
        /// The interface.
        name: String,
        /// Its MTU.
        mtu: u32,
        /// The largest.
        most: u32,
    },
    /// More interfaces than the VM has room for.
    #[error("the pod has {found} interfaces, and its VM has room for {most}: {cure}")]
    TooMany {
        /// How many there are.
        found: usize,
        /// How many there may be.
        most: usize,
        /// What to do.
        cure: &'static str,
    },
    /// Another VM has the namespace.
    #[error(
        "the pod's network namespace belongs to another VM already (it holds the interface {0}): sandboxes cannot share \
         one; run both containers in one pod"
    )]
    InUse(String),
    /// There are no taps on this host.
    #[error("/dev/net/tun cannot be opened: load the kernel module `tun`")]
    NoTun(#[source] io::Error),
    /// No tap could be made.
    #[error("a tap for the pod's interface {name} cannot be made")]
    Tap {
        /// The interface.
        name: String,
        /// What the kernel says.
        #[source]
        cause: io::Error,
    },
    /// Packets could not be redirected.
    #[error(
        "packets of the pod's interface {name} cannot be redirected to its VM; this takes the kernel modules \
         sch_ingress, cls_u32 and act_mirred"
    )]
    Redirect {
        /// The interface.
        name: String,
        /// What the kernel says.
        #[source]
        cause: netlink::Error,
    },
}

impl NetworkError {
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Open { cause, .. } if cause.kind() == io::ErrorKind::NotFound => ErrorKind::InvalidArgument,
            Self::Open { cause, .. } | Self::Enter(cause) | Self::Tap { cause, .. } => kind_of_io(cause),
            Self::Read { cause, .. } | Self::Redirect { cause, .. } => kind_of_io(&cause.errno.into()),
            Self::Device { .. } | Self::NoAddress(_) | Self::Stacked { .. } => ErrorKind::Unimplemented,
            Self::Mtu { .. } => ErrorKind::InvalidArgument,
            Self::TooMany { .. } => ErrorKind::ResourceExhausted,
            Self::InUse(_) | Self::NoTun(_) => ErrorKind::FailedPrecondition,
        }
    }
}
