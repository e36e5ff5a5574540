//! Making the VM in KVM: capabilities, interrupt controller, vCPUs.
//!
//! Needs nothing of guest memory, so it runs beside loading the kernel. What a vCPU executes first is set
//! afterwards ([`registers`](crate::arch::x86_64::registers)).

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_SPLIT_IRQCHIP, KVM_MEM_READONLY, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use crate::arch::x86_64::{cpuid, layout, msr};
use crate::irq::MAX_PINS;
use crate::memory::Range;

/// Why KVM did not make the VM.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The descriptor is not KVM, or KVM is not the one everybody knows.
    #[error("the descriptor given as /dev/kvm is not KVM (API version {0}, expected {KVM_API_VERSION})")]
    Api(i32),
    /// A capability is missing.
    #[error("this host's KVM lacks {0}: use a newer kernel")]
    Capability(&'static str),
    /// More vCPUs than the host's KVM allows.
    #[error("{asked} vCPUs asked for, this host's KVM allows at most {limit}")]
    TooManyVcpus {
        /// How many.
        asked: u8,
        /// How many there may be.
        limit: usize,
    },
    /// An ioctl failed.
    #[error("KVM cannot {what}")]
    Ioctl {
        /// What was tried.
        what: String,
        /// Its error.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The CPUID table could not be made.
    #[error(transparent)]
    Cpuid(#[from] cpuid::Error),
    /// A vCPU's MSRs could not be set.
    #[error(transparent)]
    Msr(#[from] msr::Error),
}

/// A VM without memory, and its vCPUs with their CPUID and MSRs.
pub struct Created {
    /// The VM.
    pub vm: Arc<VmFd>,
    /// Its vCPUs; positions are APIC ids.
    pub vcpus: Vec<VcpuFd>,
    /// Makes more of them.
    pub template: cpuid::Template,
}

/// What the VM is built on; each with the name that the kernel's documentation uses.
const REQUIRED: [(Cap, &str); 9] = [
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
];

fn ioctl(what: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |source| Error::Ioctl {
        what: what.into(),
        source,
    }
}

/// Makes a VM with `vcpus` vCPUs that look like `max_vcpus`.
///
/// # Errors
/// [`Error`] naming what is missing or what KVM refused.
pub fn create(kvm: OwnedFd, vcpus: u8, max_vcpus: u8) -> Result<Created, Error> {
    // SAFETY: the descriptor is owned and given up to `Kvm`, which closes it. That it is KVM is checked next,
    // by an ioctl that fails cleanly on anything else.
    let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION as i32 {
        return Err(Error::Api(version));
    }
    for (capability, name) in REQUIRED {
        if !kvm.check_extension(capability) {
            return Err(Error::Capability(name));
        }
    }
    let limit = kvm.get_max_vcpus();
    if usize::from(max_vcpus) > limit {
        return Err(Error::TooManyVcpus {
            asked: max_vcpus,
            limit,
        });
    }

    let vm = create_vm(&kvm)?;
    vm.set_tss_address(layout::KVM_TSS as usize)
        .map_err(ioctl("place its task state segment"))?;
    let mut split = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        ..Default::default()
    };
    split.args[0] = u64::from(MAX_PINS);
    vm.enable_cap(&split)
        .map_err(ioctl("make local APICs without an IOAPIC"))?;

    let template = cpuid::Template::new(&kvm, max_vcpus, true)?;
    let vcpus = (0..vcpus)
        .map(|index| create_vcpu(&vm, &template, index))
        .collect::<Result<Vec<_>, Error>>()?;
    Ok(Created {
        vm: Arc::new(vm),
        vcpus,
        template,
    })
}

/// All vCPUs but the first wait for another one to start them (INIT and SIPI).
fn create_vcpu(vm: &VmFd, template: &cpuid::Template, index: u8) -> Result<VcpuFd, Error> {
    let vcpu = vm
        .create_vcpu(u64::from(index))
        .map_err(ioctl(format!("create vCPU {index}")))?;
    vcpu.set_cpuid2(&template.for_vcpu(index)?)
        .map_err(ioctl(format!("set CPUID of vCPU {index}")))?;
    msr::set_up(&vcpu)?;
    Ok(vcpu)
}

/// Makes one vCPU for a VM that runs already.
///
/// # Errors
/// [`Error`] naming what KVM refused.
pub fn create_late_vcpu(vm: &VmFd, template: &cpuid::Template, index: u8) -> Result<VcpuFd, Error> {
    let vcpu = create_vcpu(vm, template, index)?;
    // KVM's map from APIC ids to vCPUs is made anew when a local APIC changes, and a vCPU is not counted yet when its
    // own is made: without this no interrupt finds it, not even the one that starts it.
    let lapic = vcpu
        .get_lapic()
        .map_err(ioctl(format!("read the local APIC of vCPU {index}")))?;
    vcpu.set_lapic(&lapic)
        .map_err(ioctl(format!("set the local APIC of vCPU {index}")))?;
    Ok(vcpu)
}

/// Gives guest memory to the VM.
///
/// # Errors
/// [`Error::Ioctl`] when KVM refuses a range.
pub fn set_memory(vm: &VmFd, ranges: &[Range]) -> Result<(), Error> {
    for (slot, range) in ranges.iter().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: range.guest,
            memory_size: range.len,
            userspace_addr: range.host,
        };
        // SAFETY: the range is mapped for as long as the process lives (`memory::allocate`), so KVM never
        // outlives it, and the ranges do not overlap.
        unsafe { vm.set_user_memory_region(region) }.map_err(ioctl(format!(
            "map {} MiB of guest memory at {:#x}",
            range.len >> 20,
            range.guest
        )))?;
    }
    Ok(())
}

/// Shows `range` to the guest, in memory slot `slot`: reads find what is there, writes are exits.
///
/// # Errors
/// [`Error::Ioctl`] when KVM refuses it.
pub fn show_registers(vm: &VmFd, slot: u32, range: &Range) -> Result<(), Error> {
    let region = kvm_userspace_memory_region {
        slot,
        flags: KVM_MEM_READONLY,
        guest_phys_addr: range.guest,
        memory_size: range.len,
        userspace_addr: range.host,
    };
    // SAFETY: the range is mapped for as long as the process lives (`registers::Bank`), and lies apart from memory.
    unsafe { vm.set_user_memory_region(region) }.map_err(ioctl("show the devices' registers"))
}

fn create_vm(kvm: &Kvm) -> Result<VmFd, Error> {
    loop {
        match kvm.create_vm() {
            // A signal while the kernel starts the VM's worker thread.
            Err(error) if error.errno() == libc::EINTR => {}
            other => return other.map_err(ioctl("create a VM")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn something_else_than_kvm_is_refused() {
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(create(null.into(), 1, 1), Err(Error::Api(-1))));
    }
}
