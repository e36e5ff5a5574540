//! Guest memory: private, 2 MiB-aligned, huge pages asked for, kept out of core dumps.
//!
//! Private anonymous memory gets transparent huge pages where shared memory does not, which makes the guest's
//! first touches several times cheaper. How the ranges lie is in [`layout`]; devices only see [`GuestMemory`].

use std::io;

use rustix::mm::{Advice, MapFlags, ProtFlags};
use vm_memory::mmap::MmapRegion;
use vm_memory::{
    Address, GuestAddress, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use crate::arch::x86_64::layout;

/// The guest's memory as every device sees it.
pub type GuestMemory = GuestMemoryMmap<()>;

/// The least memory a guest gets, in MiB: Linux and the agent need about half of it.
pub const MINIMUM_MIB: u32 = 64;

/// Size and alignment of a huge page.
const HUGE_PAGE: usize = 2 << 20;
const PAGE: usize = 4096;

/// Why guest memory could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The size asked for is not one a VM can have.
    #[error("guest memory of {0} MiB: it must be a multiple of 2 MiB and at least {MINIMUM_MIB} MiB")]
    Size(u32),
    /// The host's kernel refused the mapping.
    #[error(
        "cannot reserve {mib} MiB of address space for the guest (check RLIMIT_AS and vm.overcommit_memory)"
    )]
    Map {
        /// How much.
        mib: u32,
        /// Its reason.
        #[source]
        source: io::Error,
    },
    /// The size asked for is not one that pluggable memory can have.
    #[error(
        "pluggable memory of {0} MiB: it must be a multiple of 128 MiB and at most {most} MiB",
        most = crate::pluggable::MOST_MIB
    )]
    Pluggable(u32),
    /// The regions contradict each other.
    #[error("the guest's memory regions are inconsistent")]
    Regions(#[source] vm_memory::GuestRegionCollectionError),
    /// Asking which pages are resident failed.
    #[error("cannot tell which guest pages are resident")]
    Resident(#[source] io::Error),
}

/// One contiguous range of guest memory, for KVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Guest-physical start.
    pub guest: u64,
    /// Address in this process.
    pub host: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Reserves `mib` MiB of guest memory. Nothing is committed until the guest touches it.
///
/// The mapping lives as long as the process: a VM and its process are one, and devices on other threads may
/// hold clones to the end.
///
/// # Errors
/// [`Error::Size`] or [`Error::Map`].
pub fn allocate(mib: u32) -> Result<GuestMemory, Error> {
    if mib < MINIMUM_MIB || !mib.is_multiple_of(2) {
        return Err(Error::Size(mib));
    }
    let size = u64::from(mib) << 20;
    let low = size.min(layout::MMIO_GAP_START);
    let usable = ProtFlags::READ | ProtFlags::WRITE;
    let mut regions = vec![region(0, low, usable, mib)?];
    if size > low {
        regions.push(region(layout::MMIO_GAP_END, size - low, usable, mib)?);
    }
    GuestMemory::from_regions(regions).map_err(Error::Regions)
}

/// Maps `len` bytes for the guest-physical address `guest`; `mib` is for the error.
///
/// # Errors
/// [`Error::Map`].
pub(crate) fn region(guest: u64, len: u64, prot: ProtFlags, mib: u32) -> Result<GuestRegionMmap<()>, Error> {
    let map = |source: io::Error| Error::Map { mib, source };
    let len = usize::try_from(len).map_err(|_| map(io::ErrorKind::OutOfMemory.into()))?;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choosing aliases nothing.
    let reserved = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len + HUGE_PAGE, prot, flags) }
        .map_err(|errno| map(errno.into()))?
        .cast::<u8>();
    let before = reserved.align_offset(HUGE_PAGE);
    let start = reserved.wrapping_add(before);
    // SAFETY: both ranges are the unused ends of the mapping just made, page-aligned because `len` and
    // HUGE_PAGE are multiples of a page; madvise gets exactly what is left of it.
    unsafe {
        if before > 0 {
            rustix::mm::munmap(reserved.cast(), before).map_err(|errno| map(errno.into()))?;
        }
        rustix::mm::munmap(start.wrapping_add(len).cast(), HUGE_PAGE - before)
            .map_err(|errno| map(errno.into()))?;
        // Both are wishes: a kernel without huge pages or with dumps enabled still runs the guest.
        let _ = rustix::mm::madvise(start.cast(), len, Advice::LinuxHugepage);
        let _ = rustix::mm::madvise(start.cast(), len, Advice::LinuxDontDump);
    }
    // SAFETY: [start, start + len) is mapped, at least readable, and stays so until the process ends. Who makes a
    // region that cannot be written keeps everybody from writing to it.
    let mapping = unsafe { MmapRegion::build_raw(start, len, prot.bits() as i32, flags.bits() as i32) }
        .map_err(|error| map(io::Error::other(error)))?;
    GuestRegionMmap::new(mapping, GuestAddress(guest)).ok_or_else(|| map(io::ErrorKind::OutOfMemory.into()))
}

/// Where a region lies.
pub(crate) fn range(region: &GuestRegionMmap<()>) -> Range {
    Range {
        guest: region.start_addr().raw_value(),
        host: region.as_ptr() as u64,
        len: region.len(),
    }
}

/// The contiguous ranges, for KVM's memory slots.
#[must_use]
pub fn ranges(memory: &GuestMemory) -> Vec<Range> {
    memory.iter().map(range).collect()
}

/// Bytes of guest memory configured.
#[must_use]
pub fn size(memory: &GuestMemory) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum()
}

/// Bytes of these ranges of guest memory that are resident on the host, from mincore(2).
///
/// # Errors
/// [`Error::Resident`] with mincore's reason.
pub fn resident_bytes(ranges: &[Range]) -> Result<u64, Error> {
    const CHUNK: usize = 64 * 1024;
    let mut present = vec![0_u8; CHUNK];
    let mut pages = 0_u64;
    for range in ranges {
        let mut offset = 0;
        while offset < range.len {
            let len = (range.len - offset).min((CHUNK * PAGE) as u64) as usize;
            // SAFETY: the range is part of guest memory's mapping, and `present` has a byte for each of its pages.
            let outcome = unsafe {
                libc::mincore(
                    (range.host + offset) as *mut libc::c_void,
                    len,
                    present.as_mut_ptr(),
                )
            };
            if outcome != 0 {
                return Err(Error::Resident(io::Error::last_os_error()));
            }
            pages += present[..len / PAGE]
                .iter()
                .filter(|byte| **byte & 1 == 1)
                .count() as u64;
            offset += len as u64;
        }
    }
    Ok(pages * PAGE as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn memory_is_aligned_for_huge_pages_and_resident_only_where_touched() {
        let memory = allocate(64).unwrap();
        let all = ranges(&memory);
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].host % HUGE_PAGE as u64, 0);
        assert_eq!(size(&memory), 64 << 20);
        assert_eq!(resident_bytes(&all).unwrap(), 0);
        memory.write_obj(1_u8, GuestAddress(33 << 20)).unwrap();
        let resident = resident_bytes(&all).unwrap();
        assert!((4096..=HUGE_PAGE as u64).contains(&resident), "{resident}");
    }

    #[test]
    fn memory_beyond_3_gib_goes_on_above_the_gap() {
        let memory = allocate(4096).unwrap();
        let all = ranges(&memory);
        assert_eq!((all[0].guest, all[0].len), (0, layout::MMIO_GAP_START));
        assert_eq!((all[1].guest, all[1].len), (layout::MMIO_GAP_END, 1 << 30));
        assert!(
            memory
                .read_obj::<u8>(GuestAddress(layout::VIRTIO_MMIO_BASE))
                .is_err()
        );
        assert_eq!(
            memory.read_obj::<u8>(GuestAddress(layout::MMIO_GAP_END)).unwrap(),
            0
        );
    }

    #[test]
    fn odd_or_tiny_sizes_are_refused_by_name() {
        for mib in [0, 62, 127] {
            let error = allocate(mib).unwrap_err();
            assert!(error.to_string().contains(&format!("{mib} MiB")), "{error}");
        }
    }
}
