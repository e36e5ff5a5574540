//! Putting into guest memory what a PVH guest finds at its first instruction: kernel, initramfs, command
//! line, memory map, start info and MP table.
//!
//! Source: Xen's PVH boot ABI and `include/xen/interface/hvm/start_info.h` of Linux.

pub mod cmdline;
pub mod kernel;
pub mod mptable;

use std::fs::File;

use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryError};

use crate::arch::x86_64::layout;
use crate::memory::{self, GuestMemory};

/// Why the guest cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel is unusable.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
    /// The command line is unusable.
    #[error(transparent)]
    CommandLine(#[from] cmdline::Error),
    /// The processor table does not fit.
    #[error(transparent)]
    MpTable(#[from] mptable::Error),
    /// A boot structure does not fit guest memory.
    #[error("cannot write {what} to guest memory")]
    Write {
        /// Which.
        what: &'static str,
        /// Why.
        #[source]
        source: GuestMemoryError,
    },
}

impl Error {
    /// Whether the kernel or the guest image is to blame, rather than the request.
    #[must_use]
    pub fn is_image(&self) -> bool {
        matches!(self, Self::Kernel(_))
    }
}

/// What the guest boots with.
pub struct Boot<'a> {
    /// A `vmlinux` ELF file.
    pub kernel: File,
    /// The initramfs.
    pub initrd: Option<File>,
    /// The whole command line.
    pub command_line: &'a str,
    /// Number of vCPUs that there can be.
    pub max_vcpus: u8,
    /// Number of the IOAPIC's pins.
    pub pins: u8,
}

/// `hvm_start_info.magic`: "xEn3" with the top bit of "E" set.
const START_MAGIC: u32 = 0x336e_c578;
/// Memory map types (E820).
const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// A structure of the PVH ABI that guest memory can take as bytes.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct Abi<T>(T);

// SAFETY: the structures consist of integers only, without padding (56, 32 and 24 bytes of u32 and u64).
unsafe impl ByteValued for Abi<hvm_start_info> {}
// SAFETY: as above.
unsafe impl ByteValued for Abi<hvm_modlist_entry> {}
// SAFETY: as above.
unsafe impl ByteValued for Abi<hvm_memmap_table_entry> {}

impl Boot<'_> {
    /// Loads everything and returns the guest-physical address of the first instruction; the start info is at
    /// [`layout::START_INFO`].
    ///
    /// # Errors
    /// [`Error`] naming the part that cannot be used or does not fit.
    pub fn load(self, memory: &GuestMemory) -> Result<u64, Error> {
        let loaded = kernel::load(memory, self.kernel)?;
        let modules = match self.initrd {
            None => None,
            Some(initrd) => Some(kernel::load_initrd(memory, initrd, loaded.end)?),
        };
        cmdline::write(memory, self.command_line)?;
        mptable::write(memory, self.max_vcpus, self.pins)?;
        write_start_info(memory, modules)?;
        memory
            .write_obj(layout::NO_BOOT, GuestAddress(layout::WARM_BOOT_FLAG))
            .map_err(|source| Error::Write {
                what: "the warm boot flag",
                source,
            })?;
        Ok(loaded.entry)
    }
}

fn write_start_info(memory: &GuestMemory, initrd: Option<kernel::Module>) -> Result<(), Error> {
    let write = |what| move |source| Error::Write { what, source };
    if let Some(module) = initrd {
        let entry = hvm_modlist_entry {
            paddr: module.address,
            size: module.len,
            ..Default::default()
        };
        memory
            .write_obj(Abi(entry), GuestAddress(layout::MODULES))
            .map_err(write("the module list"))?;
    }
    let map = memory_map(memory);
    for (index, entry) in map.iter().enumerate() {
        let address = layout::MEMORY_MAP + (index * size_of::<hvm_memmap_table_entry>()) as u64;
        memory
            .write_obj(Abi(*entry), GuestAddress(address))
            .map_err(write("the memory map"))?;
    }
    let info = hvm_start_info {
        magic: START_MAGIC,
        version: 1,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: if initrd.is_some() { layout::MODULES } else { 0 },
        cmdline_paddr: layout::COMMAND_LINE,
        memmap_paddr: layout::MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    memory
        .write_obj(Abi(info), GuestAddress(layout::START_INFO))
        .map_err(write("the PVH start info"))
}

fn memory_map(memory: &GuestMemory) -> Vec<hvm_memmap_table_entry> {
    let entry = |addr: u64, end: u64, type_| hvm_memmap_table_entry {
        addr,
        size: end - addr,
        type_,
        reserved: 0,
    };
    let mut map = vec![
        entry(0, layout::LOW_RAM_END, RAM),
        entry(
            layout::MP_TABLE,
            layout::MP_TABLE + layout::MP_TABLE_SIZE as u64,
            RESERVED,
        ),
    ];
    for range in memory::ranges(memory) {
        map.push(entry(
            range.guest.max(layout::HIGH_RAM_START),
            range.guest + range.len,
            RAM,
        ));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_map_leaves_out_the_legacy_hole_and_the_mmio_gap() {
        let memory = memory::allocate(3074).unwrap();
        let map: Vec<_> = memory_map(&memory)
            .iter()
            .map(|e| (e.addr, e.size, e.type_))
            .collect();
        assert_eq!(
            map,
            [
                (0, 0xa_0000, RAM),
                (0xf_0000, 0x1_0000, RESERVED),
                (0x10_0000, 0xbff0_0000, RAM),
                (0x1_0000_0000, 2 << 20, RAM)
            ]
        );
    }

    #[test]
    fn the_start_info_points_at_its_parts() {
        let memory = memory::allocate(64).unwrap();
        write_start_info(
            &memory,
            Some(kernel::Module {
                address: 0x3f0_0000,
                len: 77,
            }),
        )
        .unwrap();
        let info = memory
            .read_obj::<Abi<hvm_start_info>>(GuestAddress(layout::START_INFO))
            .unwrap()
            .0;
        assert_eq!(
            (info.magic, info.version, info.nr_modules, info.memmap_entries),
            (START_MAGIC, 1, 1, 3)
        );
        let module = memory
            .read_obj::<Abi<hvm_modlist_entry>>(GuestAddress(info.modlist_paddr))
            .unwrap()
            .0;
        assert_eq!((module.paddr, module.size), (0x3f0_0000, 77));
    }
}
