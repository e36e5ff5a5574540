//! The guest-physical address map.
//!
//! ```text
//! 0000_0000  RAM: GDT, PVH start info, memory map, command line
//! 000a_0000  legacy hole (backed, not announced)
//! 000f_0000  reserved: MP table
//! 0010_0000  RAM: kernel (at 16 MiB), initramfs at the top, up to 3 GiB
//! c000_0000  gap: virtio-mmio devices at d000_0000, IOAPIC, LAPIC, KVM's TSS
//! 1_0000_0000  RAM beyond 3 GiB
//! ```

/// Where RAM below 4 GiB must end.
pub const MMIO_GAP_START: u64 = 0xc000_0000;
/// Where RAM goes on: 4 GiB.
pub const MMIO_GAP_END: u64 = 0x1_0000_0000;

/// The first virtio-mmio device's registers; the others follow.
pub const VIRTIO_MMIO_BASE: u64 = 0xd000_0000;
/// Distance of two virtio-mmio devices.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// The IOAPIC's registers (its customary address).
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Length of the IOAPIC's register window.
pub const IOAPIC_SIZE: u64 = 0x1000;
/// The local APICs (Intel SDM volume 3, 11.4.1: reset value of `IA32_APIC_BASE`).
pub const LAPIC_BASE: u64 = 0xfee0_0000;
/// Three pages that KVM wants on Intel hosts (KVM API, `KVM_SET_TSS_ADDR`).
pub const KVM_TSS: u64 = 0xfffb_d000;

/// The word with which a BIOS was once told to skip its memory test. Linux writes it right before it resets
/// the machine (`native_machine_emergency_restart`): [`WARM_BOOT`] in warm mode, else [`COLD_BOOT`].
pub const WARM_BOOT_FLAG: u64 = 0x472;
/// The machine was reset in warm mode: with `reboot=panic_warm`, after a panic and only then.
pub const WARM_BOOT: u16 = 0x1234;
/// The machine was reset in an orderly way.
pub const COLD_BOOT: u16 = 0;
/// What the VMM puts there: a machine that stops with it has faulted without its kernel's knowledge.
pub const NO_BOOT: u16 = 0xa55a;

/// Global descriptor table of the boot vCPU.
pub const GDT: u64 = 0x500;
/// `hvm_start_info` of the PVH boot protocol.
pub const START_INFO: u64 = 0x6000;
/// `hvm_modlist_entry` of the initramfs.
pub const MODULES: u64 = 0x6040;
/// `hvm_memmap_table_entry` array.
pub const MEMORY_MAP: u64 = 0x7000;
/// The kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Longest command line with its terminating zero (Linux x86 `COMMAND_LINE_SIZE`).
pub const COMMAND_LINE_SIZE: usize = 2048;
/// End of conventional memory.
pub const LOW_RAM_END: u64 = 0xa_0000;
/// MP floating pointer structure and table, in the range where the kernel looks for them.
pub const MP_TABLE: u64 = 0xf_0000;
/// The reserved range that [`MP_TABLE`] begins.
pub const MP_TABLE_SIZE: usize = 0x1_0000;
/// End of the legacy range.
pub const HIGH_RAM_START: u64 = 0x10_0000;
