//! The part of guest memory that comes and goes: a region above the guest's boot memory.
//!
//! All of it is address space from the start, so that devices know it, but nobody can write there: not the guest, to
//! whom KVM shows nothing, and not a device on its behalf. It is opened in granules as the guest plugs blocks of it
//! (`virtio::memory`) and closed again. A VM that never grows pays for one mapping.
//!
//! A device that wrote to a closed granule would end the process by a fault. So whoever has a pointer into the region has
//! a [`Hold`] too, and what is held is not closed.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::mm::{Advice, MprotectFlags, ProtFlags};
use vm_memory::{Address, GuestMemory as _};

use crate::arch::x86_64::layout;
use crate::memory::{self, Error, GuestMemory, Range};

/// What is opened and closed at a time: a memory block of Linux (`MIN_MEMORY_BLOCK_SIZE`).
pub const GRANULE: u64 = 128 << 20;
/// The largest region, in MiB: KVM has about 32,000 memory slots, and each granule takes one.
pub const MOST_MIB: u32 = 2 << 20;
/// Largest memory block of Linux (`MAX_BLOCK_SIZE` of arch/x86/mm/init_64.c), to which the region is aligned.
const LARGEST_BLOCK: u64 = 2 << 30;
/// From this much boot memory on Linux may choose memory blocks larger than a granule (`MEM_SIZE_FOR_LARGE_BLOCK`).
const LARGE_BLOCKS_FROM: u64 = 64 << 30;

/// The region.
pub struct Pluggable {
    range: Range,
    /// The memory blocks that the guest's kernel may have chosen.
    block: u64,
    /// Of each granule: [`CLOSED`], or [`OPEN`] and one more for each hold on it.
    granules: Box<[AtomicU32]>,
    vm: OnceLock<Kvm>,
}

const CLOSED: u32 = 0;
const OPEN: u32 = 1;

/// Memory that a device uses or will use: its granules stay open until this is dropped.
pub struct Hold {
    pluggable: Arc<Pluggable>,
    granules: std::ops::RangeInclusive<usize>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.pluggable.release(self.granules.clone());
    }
}

/// A range of guest memory that is not there: some of it lies in closed granules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed;

struct Kvm {
    vm: Arc<VmFd>,
    first_slot: u32,
}

/// Adds a region of `mib` MiB above `ram`: the memory with it, and the region.
///
/// # Errors
/// [`Error::Pluggable`] for a size that cannot be, [`Error::Map`].
pub fn reserve(ram: &GuestMemory, mib: u32) -> Result<(GuestMemory, Arc<Pluggable>), Error> {
    let len = u64::from(mib) << 20;
    if len == 0 || !len.is_multiple_of(GRANULE) || mib > MOST_MIB {
        return Err(Error::Pluggable(mib));
    }
    let end = ram.last_addr().raw_value() + 1;
    let guest = end.max(layout::MMIO_GAP_END).next_multiple_of(LARGEST_BLOCK);
    let region = memory::region(guest, len, ProtFlags::READ, mib)?;
    let range = memory::range(&region);
    let all = ram.insert_region(Arc::new(region)).map_err(Error::Regions)?;
    let block = if memory::size(ram) < LARGE_BLOCKS_FROM {
        GRANULE
    } else {
        LARGEST_BLOCK
    };
    let pluggable = Pluggable {
        range,
        block,
        granules: (0..len / GRANULE).map(|_| AtomicU32::new(CLOSED)).collect(),
        vm: OnceLock::new(),
    };
    Ok((all, Arc::new(pluggable)))
}

impl Pluggable {
    /// Where it lies.
    #[must_use]
    pub fn range(&self) -> Range {
        self.range
    }

    /// The part of the region, from its start, in which a guest can plug `bytes`: whole memory blocks of its kernel.
    #[must_use]
    pub fn usable_for(&self, bytes: u64) -> u64 {
        bytes.next_multiple_of(self.block).min(self.range.len)
    }

    /// Tells the VM to which opened granules are shown, in memory slots from `first_slot` on.
    pub fn connect(&self, vm: Arc<VmFd>, first_slot: u32) {
        // Called once, by the machine that is being built.
        let _ = self.vm.set(Kvm { vm, first_slot });
    }

    /// Keeps a range of guest memory as it is, for a device that has it in hand. `None` when none of it lies in the
    /// region: boot memory is always there.
    ///
    /// # Errors
    /// [`Closed`].
    pub fn hold(self: &Arc<Self>, address: u64, len: u64) -> Result<Option<Hold>, Closed> {
        let Some(granules) = self.granules(address, len) else {
            return Ok(None);
        };
        let (first, last) = (*granules.start(), *granules.end());
        for index in granules.clone() {
            let one_more = |state| (state != CLOSED).then(|| state + 1);
            let held = self.granules[index].fetch_update(Ordering::Acquire, Ordering::Relaxed, one_more);
            if held.is_err() {
                if index > first {
                    self.release(first..=index - 1);
                }
                return Err(Closed);
            }
        }
        Ok(Some(Hold {
            pluggable: self.clone(),
            granules: first..=last,
        }))
    }

    fn release(&self, granules: std::ops::RangeInclusive<usize>) {
        for state in &self.granules[granules] {
            // Whatever the holder has done to the memory happens before it is taken away.
            state.fetch_sub(1, Ordering::Release);
        }
    }

    /// The granules that a range of guest memory touches.
    fn granules(&self, address: u64, len: u64) -> Option<std::ops::RangeInclusive<usize>> {
        let last = address.saturating_add(len.checked_sub(1)?);
        let (start, end) = (self.range.guest, self.range.guest + self.range.len);
        if last < start || address >= end {
            return None;
        }
        let first = (address.max(start) - start) / GRANULE;
        let last = (last.min(end - 1) - start) / GRANULE;
        Some(first as usize..=last as usize)
    }

    /// Makes a granule memory that guest and devices can use.
    ///
    /// # Errors
    /// When the host has no memory for it, or KVM no slot.
    pub fn open(&self, granule: usize) -> io::Result<()> {
        self.protect(granule, MprotectFlags::READ | MprotectFlags::WRITE)?;
        self.show(granule, GRANULE)?;
        self.granules[granule].store(OPEN, Ordering::Release);
        Ok(())
    }

    /// Takes a granule away from guest and devices, with what is in it. False when a device holds some of it: then it
    /// stays as it is.
    ///
    /// # Errors
    /// What KVM or the host's kernel refuse; the granule is closed to devices then.
    pub fn close(&self, granule: usize) -> io::Result<bool> {
        let state = &self.granules[granule];
        if state
            .compare_exchange(OPEN, CLOSED, Ordering::Acquire, Ordering::Relaxed)
            .is_err_and(|found| found != CLOSED)
        {
            return Ok(false);
        }
        self.show(granule, 0)?;
        self.discard(granule as u64 * GRANULE, GRANULE)?;
        self.protect(granule, MprotectFlags::READ)?;
        Ok(true)
    }

    /// Gives the pages of a part back to the host. `offset` is from the region's start.
    ///
    /// # Errors
    /// What madvise(2) reports, [`io::ErrorKind::InvalidInput`] for a part that is not in the region.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let start = self.host(offset, len)?;
        // SAFETY: the range is part of the region's mapping, which stays until the process ends; nothing in this
        // process relies on what is in it.
        Ok(unsafe { rustix::mm::madvise(start, len as usize, Advice::LinuxDontNeed) }?)
    }

    /// The granules that are open.
    #[must_use]
    pub fn opened(&self) -> Vec<Range> {
        let granules = self.granules.iter().enumerate();
        granules
            .filter(|(_, state)| state.load(Ordering::Acquire) != CLOSED)
            .map(|(granule, _)| Range {
                guest: self.range.guest + granule as u64 * GRANULE,
                host: self.range.host + granule as u64 * GRANULE,
                len: GRANULE,
            })
            .collect()
    }

    fn host(&self, offset: u64, len: u64) -> io::Result<*mut libc::c_void> {
        match offset.checked_add(len) {
            Some(end) if end <= self.range.len => Ok((self.range.host + offset) as *mut libc::c_void),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn protect(&self, granule: usize, flags: MprotectFlags) -> io::Result<()> {
        let start = self.host(granule as u64 * GRANULE, GRANULE)?;
        // SAFETY: the range is part of the region's mapping, and nobody holds it when it becomes read-only. A write all
        // the same would be a fault, never reach other memory.
        Ok(unsafe { rustix::mm::mprotect(start, GRANULE as usize, flags) }?)
    }

    /// Shows `len` bytes of a granule to the guest: all or none of it.
    fn show(&self, granule: usize, len: u64) -> io::Result<()> {
        let Some(Kvm { vm, first_slot }) = self.vm.get() else {
            return Ok(());
        };
        let offset = granule as u64 * GRANULE;
        let region = kvm_userspace_memory_region {
            slot: first_slot + granule as u32,
            flags: 0,
            guest_phys_addr: self.range.guest + offset,
            memory_size: len,
            userspace_addr: self.range.host + offset,
        };
        // SAFETY: the range is mapped for as long as the process lives, and no other slot has it.
        match unsafe { vm.set_user_memory_region(region) } {
            Ok(()) => Ok(()),
            Err(error) => Err(io::Error::from_raw_os_error(error.errno())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn the_region_lies_above_ram_aligned_to_any_memory_block() {
        for (ram, base) in [(64, 4_u64 << 30), (4096, 6 << 30), (3074, 6 << 30)] {
            let ram = memory::allocate(ram).unwrap();
            let (all, pluggable) = reserve(&ram, 256).unwrap();
            assert_eq!(
                (pluggable.range().guest, pluggable.range().len),
                (base, 256 << 20)
            );
            assert_eq!(pluggable.range().host % (2 << 20), 0);
            assert_eq!(memory::size(&all), memory::size(&ram) + (256 << 20));
        }
    }

    #[test]
    fn sizes_that_are_no_whole_granules_are_refused_by_name() {
        let ram = memory::allocate(64).unwrap();
        for mib in [0, 64, 200, MOST_MIB + 128] {
            let error = reserve(&ram, mib).err().unwrap();
            assert!(error.to_string().contains(&format!("{mib} MiB")), "{error}");
        }
    }

    #[test]
    fn what_is_usable_is_whole_blocks_within_the_region() {
        let ram = memory::allocate(64).unwrap();
        let (_, pluggable) = reserve(&ram, 256).unwrap();
        assert_eq!(pluggable.usable_for(0), 0);
        assert_eq!(pluggable.usable_for(2 << 20), GRANULE);
        assert_eq!(pluggable.usable_for(GRANULE + 1), 2 * GRANULE);
        assert_eq!(pluggable.usable_for(u64::MAX / 2), 2 * GRANULE);
    }

    #[test]
    fn devices_are_kept_out_of_closed_granules() {
        let ram = memory::allocate(64).unwrap();
        let (all, pluggable) = reserve(&ram, 384).unwrap();
        let start = pluggable.range().guest;
        let absent = |address, len| pluggable.hold(address, len).is_err();
        assert!(
            matches!(pluggable.hold(0, 64 << 20), Ok(None)),
            "boot memory is always there"
        );
        assert!(absent(start, 1));
        assert!(!absent(start, 0));
        pluggable.open(1).unwrap();
        assert!(!absent(start + GRANULE, GRANULE));
        assert!(absent(start + GRANULE, GRANULE + 1));
        assert!(absent(start + GRANULE - 1, 2));
        assert!(absent(start + 3 * GRANULE - 1, u64::MAX / 2));
        assert!(absent(start + GRANULE, u64::MAX));
        assert_eq!(pluggable.opened().len(), 1);

        let inside = GuestAddress(start + GRANULE + 4096);
        all.write_obj(7_u8, inside).unwrap();
        assert!(pluggable.close(1).unwrap());
        assert!(absent(start + GRANULE, 1));
        assert_eq!(all.read_obj::<u8>(inside).unwrap(), 0, "what was there is gone");
        pluggable.open(1).unwrap();
        all.write_obj(8_u8, inside).unwrap();
        pluggable.discard(GRANULE, 2 << 20).unwrap();
        assert_eq!(all.read_obj::<u8>(inside).unwrap(), 0);
        assert!(pluggable.discard(2 * GRANULE, GRANULE + 1).is_err());
    }

    #[test]
    fn what_a_device_holds_is_not_closed() {
        let ram = memory::allocate(64).unwrap();
        let (all, pluggable) = reserve(&ram, 256).unwrap();
        let start = pluggable.range().guest;
        pluggable.open(0).unwrap();
        let first = pluggable.hold(start + 4096, 1).unwrap();
        let second = pluggable.hold(start, GRANULE).unwrap();
        assert!(
            pluggable.hold(start, GRANULE + 1).is_err(),
            "half of it is closed"
        );
        drop(first);
        assert!(!pluggable.close(0).unwrap());
        all.write_obj(7_u8, GuestAddress(start)).unwrap();
        assert_eq!(all.read_obj::<u8>(GuestAddress(start)).unwrap(), 7);
        drop(second);
        assert!(pluggable.close(0).unwrap());
        assert!(pluggable.close(0).unwrap(), "closed already");
    }

    #[test]
    fn a_closed_granule_cannot_be_written_through_the_kernel_either() {
        let ram = memory::allocate(64).unwrap();
        let (_, pluggable) = reserve(&ram, 128).unwrap();
        let mut byte = libc::iovec {
            iov_base: pluggable.range().host as *mut libc::c_void,
            iov_len: 1,
        };
        let zero = std::fs::File::open("/dev/zero").unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&zero);
        // SAFETY: the address is mapped; that it cannot be written is what is asked about.
        let read = |byte: &mut libc::iovec| unsafe { libc::readv(fd, byte, 1) };
        assert_eq!(read(&mut byte), -1);
        assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::EFAULT));
        pluggable.open(0).unwrap();
        assert_eq!(read(&mut byte), 1);
    }
}
