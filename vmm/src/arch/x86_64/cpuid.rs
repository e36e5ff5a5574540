//! The processor that the guest sees: what KVM supports, less what a container host has no use for, with the
//! VM's own topology.
//!
//! The common part is computed once per VM ([`Template::new`]); only the APIC ids differ between vCPUs.
//! Leaves are those of the Intel SDM volume 2 (`CPUID`), the AMD APM volume 3 (appendix E) and the kernel's
//! `Documentation/virt/kvm/x86/cpuid.rst`.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

/// Leaf 1 ECX.
mod leaf1_ecx {
    pub const VMX: u32 = 1 << 5;
    pub const X2APIC: u32 = 1 << 21;
    pub const TSC_DEADLINE: u32 = 1 << 24;
    pub const HYPERVISOR: u32 = 1 << 31;
}
/// Leaf 1 EDX: more than one logical processor per package.
const HTT: u32 = 1 << 28;
/// Leaf 6 EAX: the APIC timer runs in every power state. Without it Linux insists on a PIT.
const ARAT: u32 = 1 << 2;
/// Leaf 6 ECX: energy performance bias, an MSR that KVM does not have.
const EPB: u32 = 1 << 3;
/// Leaf 0x8000_0001 ECX.
mod amd_ecx {
    pub const CMP_LEGACY: u32 = 1 << 1;
    pub const SVM: u32 = 1 << 2;
    pub const PERFCTR_CORE: u32 = 1 << 23;
}
/// Leaf 0 EBX of AMD ("Auth") and of Hygon ("Hygo"), which follows AMD.
const VENDORS_AMD: [u32; 2] = [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"Hygo")];
/// KVM's feature leaf.
const KVM_FEATURES: u32 = 0x4000_0001;
/// Asynchronous page faults (three bits): state in the guest that snapshots would have to carry, and
/// `MSI_EXT_DEST_ID`, which this VMM's IOAPIC does not implement.
const KVM_FEATURES_HIDDEN: u32 = 1 << 4 | 1 << 10 | 1 << 14 | 1 << 15;

/// Why the guest's CPUID could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM does not tell what it supports.
    #[error("KVM does not report the CPUID leaves it supports")]
    Supported(#[source] kvm_ioctls::Error),
    /// There are more leaves than KVM takes.
    #[error("the CPUID table has more than {KVM_MAX_CPUID_ENTRIES} entries")]
    TooMany,
}

/// CPUID of every vCPU of one VM, apart from APIC ids.
#[derive(Clone, Debug)]
pub struct Template {
    entries: Vec<kvm_cpuid_entry2>,
}

impl Template {
    /// Asks KVM what it supports and fits it to a VM of `vcpus` single-threaded cores in one package.
    /// `tsc_deadline` says whether KVM's local APIC has the TSC-deadline timer.
    ///
    /// # Errors
    /// [`Error::Supported`] when KVM does not answer.
    pub fn new(kvm: &Kvm, vcpus: u8, tsc_deadline: bool) -> Result<Self, Error> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(Error::Supported)?;
        Ok(Self::from_supported(supported.as_slice(), vcpus, tsc_deadline))
    }

    fn from_supported(supported: &[kvm_cpuid_entry2], vcpus: u8, tsc_deadline: bool) -> Self {
        let cores = u32::from(vcpus.max(1));
        let amd = supported
            .iter()
            .any(|entry| entry.function == 0 && VENDORS_AMD.contains(&entry.ebx));
        // The topology leaves are written anew, so that their number of levels does not depend on the host.
        let mut entries: Vec<_> = supported
            .iter()
            .copied()
            .filter(|entry| !matches!(entry.function, 0xb | 0x1f))
            .collect();
        for entry in &mut entries {
            match entry.function {
                1 => {
                    entry.ebx = entry.ebx & 0xff00_ffff | cores.next_power_of_two().min(255) << 16;
                    entry.ecx |= leaf1_ecx::HYPERVISOR | leaf1_ecx::X2APIC;
                    entry.ecx &= !(leaf1_ecx::VMX | leaf1_ecx::TSC_DEADLINE);
                    if tsc_deadline {
                        entry.ecx |= leaf1_ecx::TSC_DEADLINE;
                    }
                    if cores > 1 {
                        entry.edx |= HTT;
                    } else {
                        entry.edx &= !HTT;
                    }
                }
                4 => {
                    // EAX 31:26 cores per package - 1; 25:14 logical processors sharing the cache - 1.
                    let level = entry.eax >> 5 & 7;
                    let sharing = if level >= 3 { cores } else { 1 };
                    if entry.eax & 0x1f != 0 {
                        entry.eax =
                            entry.eax & 0x3fff | (sharing - 1).min(0xfff) << 14 | (cores - 1).min(0x3f) << 26;
                    }
                }
                6 => {
                    entry.eax = ARAT;
                    entry.ecx &= !EPB;
                }
                // No performance counters: the host's are not for sale, and their probing costs boot time.
                0xa | 0x8000_0022 => clear(entry),
                KVM_FEATURES => entry.eax &= !KVM_FEATURES_HIDDEN,
                0x8000_0001 => {
                    entry.ecx &= !(amd_ecx::SVM | amd_ecx::PERFCTR_CORE | amd_ecx::CMP_LEGACY);
                    if cores > 1 {
                        entry.ecx |= amd_ecx::CMP_LEGACY;
                    }
                }
                // Nested virtualization is not offered.
                0x8000_000a => clear(entry),
                0x8000_0008 if amd => {
                    // ECX 7:0 cores - 1, 15:12 bits of the APIC id that number cores (Intel reserves it).
                    entry.ecx = (cores - 1) | apic_id_bits(cores) << 12;
                }
                0x8000_001d => {
                    let level = entry.eax >> 5 & 7;
                    let sharing = if level >= 3 { cores } else { 1 };
                    if entry.eax & 0x1f != 0 {
                        entry.eax = entry.eax & 0x3fff | (sharing - 1).min(0xfff) << 14;
                    }
                }
                _ => {}
            }
        }
        let basic_leaves = entries
            .iter()
            .find(|entry| entry.function == 0)
            .map_or(0, |entry| entry.eax);
        for function in [0xb, 0x1f] {
            if function <= basic_leaves {
                entries.extend(topology(function, cores));
            }
        }
        if !entries.iter().any(|entry| entry.function == 6) && basic_leaves >= 6 {
            entries.push(kvm_cpuid_entry2 {
                function: 6,
                eax: ARAT,
                ..Default::default()
            });
        }
        Self { entries }
    }

    /// The leaves of the vCPU with this APIC id.
    ///
    /// # Errors
    /// [`Error::TooMany`] when KVM would not take so many.
    pub fn for_vcpu(&self, apic_id: u8) -> Result<CpuId, Error> {
        let id = u32::from(apic_id);
        let mut cpuid = CpuId::from_entries(&self.entries).map_err(|_| Error::TooMany)?;
        for entry in cpuid.as_mut_slice() {
            match entry.function {
                1 => entry.ebx = entry.ebx & 0x00ff_ffff | id << 24,
                0xb | 0x1f => entry.edx = id,
                0x8000_001e => {
                    // EBX 7:0 core id, 15:8 threads per core - 1; ECX: one node.
                    entry.eax = id;
                    entry.ebx = id;
                    entry.ecx = 0;
                }
                _ => {}
            }
        }
        Ok(cpuid)
    }
}

/// How many low bits of the APIC id number the cores.
fn apic_id_bits(cores: u32) -> u32 {
    cores.next_power_of_two().trailing_zeros()
}

/// Extended topology: a level of one thread, a level of cores, the end.
fn topology(function: u32, cores: u32) -> [kvm_cpuid_entry2; 3] {
    const THREADS: u32 = 1;
    const CORES: u32 = 2;
    let level = |index: u32, shift: u32, processors: u32, kind: u32| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: index | kind << 8,
        ..Default::default()
    };
    [
        level(0, 0, 1, THREADS),
        level(1, apic_id_bits(cores), cores, CORES),
        level(2, 0, 0, 0),
    ]
}

fn clear(entry: &mut kvm_cpuid_entry2) {
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> Vec<kvm_cpuid_entry2> {
        let leaf = |function, eax, ebx, ecx, edx| kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        vec![
            leaf(0, 0x1f, 0, 0, 0),
            leaf(1, 0, 0x0710_0800, leaf1_ecx::VMX, HTT),
            leaf(6, 0x77, 0, EPB, 0),
            leaf(0xa, 0x0730_0404, 0, 0, 0x603),
            leaf(0xb, 1, 2, 0x100, 9),
            leaf(KVM_FEATURES, u32::MAX, 0, 0, 0),
            leaf(0x8000_0001, 0, 0, amd_ecx::SVM, 0),
            leaf(0x8000_001e, 5, 0x105, 3, 0),
        ]
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid
            .as_slice()
            .iter()
            .find(|e| e.function == function && e.index == index)
            .unwrap()
    }

    #[test]
    fn the_guest_gets_a_clock_that_needs_no_pit_and_no_nested_virtualization() {
        let cpuid = Template::from_supported(&supported(), 2, true)
            .for_vcpu(1)
            .unwrap();
        let leaf1 = find(&cpuid, 1, 0);
        assert_eq!(
            leaf1.ecx,
            leaf1_ecx::HYPERVISOR | leaf1_ecx::X2APIC | leaf1_ecx::TSC_DEADLINE
        );
        assert_eq!(leaf1.ebx, 0x0102_0800);
        assert_eq!(find(&cpuid, 6, 0).eax, ARAT);
        assert_eq!(find(&cpuid, 0xa, 0).eax, 0);
        assert_eq!(find(&cpuid, 0x8000_0001, 0).ecx, amd_ecx::CMP_LEGACY);
        assert_eq!(find(&cpuid, KVM_FEATURES, 0).eax & KVM_FEATURES_HIDDEN, 0);
    }

    #[test]
    fn the_topology_is_the_vms_own() {
        let cpuid = Template::from_supported(&supported(), 3, false)
            .for_vcpu(2)
            .unwrap();
        for function in [0xb, 0x1f] {
            assert_eq!(find(&cpuid, function, 0).eax, 0);
            let cores = find(&cpuid, function, 1);
            assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (2, 3, 0x201, 2));
            assert_eq!(find(&cpuid, function, 2).ecx >> 8, 0);
        }
        assert_eq!(cpuid.as_slice().iter().filter(|e| e.function == 0xb).count(), 3);
        assert_eq!(find(&cpuid, 0x8000_001e, 0).eax, 2);
        assert_eq!(find(&cpuid, 1, 0).ecx & leaf1_ecx::TSC_DEADLINE, 0);
    }

    #[test]
    fn a_single_vcpu_is_not_announced_as_hyperthreaded() {
        let cpuid = Template::from_supported(&supported(), 1, true)
            .for_vcpu(0)
            .unwrap();
        assert_eq!(find(&cpuid, 1, 0).edx & HTT, 0);
        assert_eq!(find(&cpuid, 0xb, 1).eax, 0);
    }
}
