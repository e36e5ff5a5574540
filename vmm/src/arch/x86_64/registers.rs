//! Registers of the boot vCPU at the PVH entry point.
//!
//! Source: Xen's PVH boot ABI ("x86/HVM direct boot ABI"): 32-bit protected mode, no paging, flat segments,
//! `ebx` holds the physical address of `hvm_start_info`.

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::layout;
use crate::memory::GuestMemory;

/// Why the boot vCPU could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The descriptor table does not fit guest memory.
    #[error("cannot write the descriptor table to guest memory")]
    Gdt(#[source] vm_memory::GuestMemoryError),
    /// KVM refused the registers.
    #[error("KVM refused {what} of the boot vCPU")]
    Kvm {
        /// Which ioctl.
        what: &'static str,
        /// Its error.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// `CR0.PE`: protected mode.
const CR0_PE: u64 = 1;
/// `CR0.ET`: always 1 on processors with an FPU.
const CR0_ET: u64 = 1 << 4;
/// Reserved bit 1 of `RFLAGS` is always set.
const RFLAGS_RESERVED: u64 = 2;

/// Descriptor types (Intel SDM volume 3, 3.4.5.1 and 3.5).
const CODE_EXECUTE_READ_ACCESSED: u8 = 0xb;
const DATA_READ_WRITE_ACCESSED: u8 = 0x3;
const TSS_32_BUSY: u8 = 0xb;

/// Puts the boot vCPU at `entry`, with `start_info` in `ebx`.
///
/// # Errors
/// [`Error`] when guest memory is too small or KVM refuses.
pub fn set_up_pvh(vcpu: &VcpuFd, memory: &GuestMemory, entry: u64, start_info: u64) -> Result<(), Error> {
    let code = flat(1, CODE_EXECUTE_READ_ACCESSED);
    let data = flat(2, DATA_READ_WRITE_ACCESSED);
    let tss = kvm_segment {
        limit: 0x67,
        s: 0,
        g: 0,
        db: 0,
        type_: TSS_32_BUSY,
        ..flat(3, 0)
    };
    let table = [0, descriptor(&code), descriptor(&data), descriptor(&tss)];
    for (index, entry) in table.iter().enumerate() {
        memory
            .write_obj(*entry, GuestAddress(layout::GDT + 8 * index as u64))
            .map_err(Error::Gdt)?;
    }

    let mut sregs = vcpu.get_sregs().map_err(|source| Error::Kvm {
        what: "reading the registers",
        source,
    })?;
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = (size_of_val(&table) - 1) as u16;
    sregs.cs = code;
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = tss;
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
    vcpu.set_sregs(&sregs).map_err(|source| Error::Kvm {
        what: "the system registers",
        source,
    })?;
    let regs = kvm_regs {
        rip: entry,
        rbx: start_info,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(|source| Error::Kvm {
        what: "the general registers",
        source,
    })
}

/// A flat 4 GiB segment at `index` of the GDT.
fn flat(index: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: index * 8,
        type_,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// The segment as the processor would read it from memory (Intel SDM volume 3, figure 3-8).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.avl)
        | u64::from(segment.l) << 1
        | u64::from(segment.db) << 2
        | u64::from(segment.g) << 3;
    (limit & 0xffff)
        | (segment.base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (segment.base >> 24 & 0xff) << 56
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_have_the_processors_layout() {
        // The well-known encodings of flat 32-bit code and data segments.
        assert_eq!(
            descriptor(&flat(1, CODE_EXECUTE_READ_ACCESSED)),
            0x00cf_9b00_0000_ffff
        );
        assert_eq!(
            descriptor(&flat(2, DATA_READ_WRITE_ACCESSED)),
            0x00cf_9300_0000_ffff
        );
        let based = kvm_segment {
            base: 0x1234_5678,
            ..flat(2, DATA_READ_WRITE_ACCESSED)
        };
        assert_eq!(descriptor(&based), 0x12cf_9334_5678_ffff);
    }
}
