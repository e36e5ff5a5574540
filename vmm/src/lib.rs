//! The kata-rs virtual machine monitor: one jailed process, one VM.
//!
//! [`control`] listens to the sandbox and drives one [`machine`]; a machine is guest [`memory`], some of it perhaps [`pluggable`], a VM in
//! [`kvm`], [`devices`] on a [`bus`] with their interrupts ([`irq`]), and [`vcpu`]s. [`boot`] puts the guest's
//! kernel into memory, [`jail`] locks the process in. `virtio` holds the devices themselves.

pub mod arch;
pub mod boot;
pub mod bus;
pub mod control;
pub mod devices;
pub mod exit;
pub mod irq;
pub mod jail;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod metrics;
pub mod pluggable;
pub mod ports;
pub mod timeline;
pub mod vcpu;
pub mod virtio;
