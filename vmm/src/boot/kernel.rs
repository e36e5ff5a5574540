//! The guest kernel, a `vmlinux` ELF with a PVH note, and the initramfs.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress};

use crate::arch::x86_64::layout;
use crate::memory::{self, GuestMemory};

/// Why kernel or initramfs cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read the {0}")]
    Read(&'static str, #[source] io::Error),
    /// It is a compressed kernel.
    #[error(
        "the guest kernel is a compressed bzImage, not an uncompressed vmlinux ELF file: \
         build one with `make kernel`"
    )]
    Compressed,
    /// It is not an ELF file at all.
    #[error("the guest kernel is not a vmlinux ELF file for x86-64: build one with `make kernel`")]
    NotElf,
    /// It cannot be entered by the PVH protocol.
    #[error("the guest kernel has no PVH entry note (CONFIG_PVH): build one with `make kernel`")]
    NoPvh,
    /// Its segments do not fit or contradict the file.
    #[error("the guest kernel does not load into {memory_mib} MiB of guest memory")]
    Load {
        /// How much there is.
        memory_mib: u64,
        /// Why.
        #[source]
        source: linux_loader::loader::Error,
    },
    /// The initramfs is empty.
    #[error("the guest image is empty: build one with `make image`")]
    EmptyInitrd,
    /// The initramfs does not fit behind the kernel.
    #[error(
        "a guest image of {image_mib} MiB does not fit beside the kernel into {memory_mib} MiB of guest memory"
    )]
    InitrdTooLarge {
        /// Size of the image, rounded up.
        image_mib: u64,
        /// Size of guest memory.
        memory_mib: u64,
    },
}

/// A kernel in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// The PVH entry point.
    pub entry: u64,
    /// First address after it.
    pub end: u64,
}

/// An initramfs in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Module {
    /// Where it begins.
    pub address: u64,
    /// Its length in bytes.
    pub len: u64,
}

const ELF_MAGIC: &[u8] = b"\x7fELF";
/// `EI_CLASS` and `EI_DATA`: 64 bits, little-endian; `e_machine` at byte 18: x86-64.
const ELF_CLASS: [u8; 2] = [2, 1];
const ELF_MACHINE: [u8; 2] = [62, 0];
/// "HdrS" at this offset marks a bzImage (Linux `Documentation/arch/x86/boot.rst`).
const BZIMAGE_MAGIC_OFFSET: usize = 0x202;

/// Reads the kernel's segments straight into guest memory.
///
/// # Errors
/// [`Error`] naming what is wrong with the file and how to get a right one.
pub fn load(memory: &GuestMemory, mut file: File) -> Result<Loaded, Error> {
    let mut head = [0; BZIMAGE_MAGIC_OFFSET + 4];
    let read = read_head(&file, &mut head).map_err(|source| Error::Read("guest kernel", source))?;
    let head = &head[..read];
    if head.get(BZIMAGE_MAGIC_OFFSET..) == Some(b"HdrS") {
        return Err(Error::Compressed);
    }
    let is_elf = head.starts_with(ELF_MAGIC)
        && head.get(4..6) == Some(&ELF_CLASS)
        && head.get(18..20) == Some(&ELF_MACHINE);
    if !is_elf {
        return Err(Error::NotElf);
    }
    let loaded = Elf::load(memory, None, &mut file, None).map_err(|source| Error::Load {
        memory_mib: memory_mib(memory),
        source,
    })?;
    match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => Ok(Loaded {
            entry: entry.0,
            end: loaded.kernel_end,
        }),
        _ => Err(Error::NoPvh),
    }
}

/// Reads the initramfs to the top of RAM below the MMIO gap, so that the kernel's own first allocations,
/// which also come from the top, share its huge pages.
///
/// # Errors
/// [`Error`] when it is empty, unreadable or too large.
pub fn load_initrd(memory: &GuestMemory, mut file: File, kernel_end: u64) -> Result<Module, Error> {
    const PAGE: u64 = 4096;
    let unreadable = |source| Error::Read("guest image", source);
    let len = file.metadata().map_err(unreadable)?.len();
    if len == 0 {
        return Err(Error::EmptyInitrd);
    }
    let top = memory::size(memory).min(layout::MMIO_GAP_START);
    let too_large = Error::InitrdTooLarge {
        image_mib: len.div_ceil(1 << 20),
        memory_mib: memory_mib(memory),
    };
    let Some(address) = top.checked_sub(len).map(|address| address & !(PAGE - 1)) else {
        return Err(too_large);
    };
    if address < kernel_end.max(layout::HIGH_RAM_START) {
        return Err(too_large);
    }
    let len_in_memory = usize::try_from(len).map_err(|_| unreadable(io::ErrorKind::FileTooLarge.into()))?;
    memory
        .read_exact_volatile_from(GuestAddress(address), &mut file, len_in_memory)
        .map_err(|error| unreadable(io::Error::other(error)))?;
    Ok(Module { address, len })
}

fn memory_mib(memory: &GuestMemory) -> u64 {
    memory::size(memory) >> 20
}

fn read_head(file: &File, head: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < head.len() {
        match file.read_at(&mut head[filled..], filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
