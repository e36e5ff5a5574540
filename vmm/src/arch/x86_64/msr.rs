//! Model-specific registers that must differ from their reset values before boot.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

/// `IA32_MISC_ENABLE` (Intel SDM volume 4, table 2-2).
const MISC_ENABLE: u32 = 0x1a0;
/// Fast strings: Linux turns `REP MOVSB` optimisations off when this bit is clear.
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// `IA32_MTRR_DEF_TYPE` (Intel SDM volume 3, 12.11.2.1).
const MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs enabled, all memory write-back: nothing in a VM without device assignment is uncached.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// Why the registers could not be set.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The ioctl failed.
    #[error("KVM refused the boot MSRs")]
    Kvm(#[source] kvm_ioctls::Error),
    /// KVM stopped at a register.
    #[error("KVM does not take MSR {index:#x}")]
    Refused {
        /// The register.
        index: u32,
    },
}

/// Sets the boot values. The vCPU's CPUID must have been set: KVM checks MSRs against it (Linux 6.13).
///
/// # Errors
/// [`Error`] naming the register that KVM refuses.
pub fn set_up(vcpu: &VcpuFd) -> Result<(), Error> {
    let entries = [
        (MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        (MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
    ]
    .map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    });
    let msrs = Msrs::from_entries(&entries).map_err(|_| Error::Kvm(kvm_ioctls::Error::new(libc::E2BIG)))?;
    let set = vcpu.set_msrs(&msrs).map_err(Error::Kvm)?;
    match entries.get(set) {
        None => Ok(()),
        Some(refused) => Err(Error::Refused { index: refused.index }),
    }
}
