//! What drivers read of virtio-mmio registers, in memory that KVM shows to the guest read-only.
//!
//! A read is then no exit at all. The one that counts is `InterruptStatus`, which a driver reads at every interrupt
//! and which would be answered by the VMM. Writes still leave the guest (KVM API, `KVM_MEM_READONLY`).
//!
//! The transport keeps its registers here ([`mmio`](super::mmio)), a device its configuration space, and
//! [`Interrupt`](super::Interrupt) the interrupt's status.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::mm::{MapFlags, ProtFlags};

use super::mmio::register;
use crate::memory::Range;

/// Registers of one device.
pub const PAGE_SIZE: usize = 4096;
/// The longest configuration space that a device of ours has, with room to spare.
pub const CONFIG_SIZE: usize = 256;

const WORDS: usize = PAGE_SIZE / 4;
type Words = [AtomicU32; WORDS];

/// The pages of all devices, one after the other. They stay until the process ends, as guest memory does.
pub struct Bank(&'static [Words]);

/// The page of one device.
#[derive(Clone)]
pub struct Page {
    words: &'static Words,
    /// Held while the configuration space is replaced.
    config: Arc<Mutex<()>>,
}

impl Bank {
    /// As many pages of zeroes.
    ///
    /// # Errors
    /// What mmap(2) reports.
    pub fn new(pages: usize) -> io::Result<Self> {
        let length = pages.max(1) * PAGE_SIZE;
        let usable = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choosing aliases nothing.
        let start =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), length, usable, MapFlags::PRIVATE) }?;
        // SAFETY: the mapping is `pages` pages of zeroes, which are valid atomic integers, aligned to a page, and never
        // unmapped. The guest, which may read at any time, does not write.
        Ok(Self(unsafe { std::slice::from_raw_parts(start.cast(), pages) }))
    }

    /// The pages, each once.
    pub fn pages(&self) -> impl Iterator<Item = Page> {
        self.0.iter().map(Page::new)
    }

    /// Where KVM shall show them.
    #[must_use]
    pub fn range(&self, guest: u64) -> Range {
        Range {
            guest,
            host: self.0.as_ptr() as u64,
            len: (self.0.len() * PAGE_SIZE) as u64,
        }
    }
}

impl Page {
    fn new(words: &'static Words) -> Self {
        Self {
            words,
            config: Arc::default(),
        }
    }

    /// A page that no guest sees.
    #[cfg(test)]
    pub fn alone() -> Self {
        Bank::new(1).unwrap().pages().next().unwrap()
    }

    /// The word at `offset`, one of [`register`]'s.
    #[must_use]
    pub fn word(&self, offset: u64) -> &AtomicU32 {
        &self.words[offset as usize / 4 % WORDS]
    }

    /// Shows a value. x86 keeps stores in order, and so does every reader see them.
    pub fn set(&self, offset: u64, value: u32) {
        self.word(offset).store(value.to_le(), Ordering::Release);
    }

    /// What the guest would read. Bytes past the page are zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let at = offset.saturating_add(index as u64);
            *byte = match at < PAGE_SIZE as u64 {
                true => self.word(at).load(Ordering::Acquire).to_ne_bytes()[at as usize % 4],
                false => 0,
            };
        }
    }

    /// `ConfigGeneration`.
    #[must_use]
    pub fn generation(&self) -> u32 {
        u32::from_le(self.word(register::CONFIG_GENERATION).load(Ordering::Acquire))
    }

    /// Lets `change` change the configuration space, and counts that as a new generation. `change` may hold locks of
    /// the device's, but must not take any.
    ///
    /// A driver that reads at the same moment may see a part of the change; the interrupt that follows makes it read
    /// again.
    pub fn change_config(&self, change: impl FnOnce(&mut [u8])) {
        let _changing = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        let mut space = self.config();
        change(&mut space);
        self.write_config(&space);
    }

    /// Replaces the configuration space unless it has changed since `generation`. Whether it is different then;
    /// `None` when nothing was done.
    #[must_use]
    pub fn replace_config(&self, generation: u32, space: &[u8; CONFIG_SIZE]) -> Option<bool> {
        let _changing = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        if self.generation() != generation {
            return None;
        }
        let different = self.config() != *space;
        if different {
            self.write_config(space);
        }
        Some(different)
    }

    fn config(&self) -> [u8; CONFIG_SIZE] {
        let mut space = [0; CONFIG_SIZE];
        self.read(register::CONFIG, &mut space);
        space
    }

    fn write_config(&self, space: &[u8; CONFIG_SIZE]) {
        for (index, bytes) in space.as_chunks().0.iter().enumerate() {
            self.set(register::CONFIG + 4 * index as u64, u32::from_le_bytes(*bytes));
        }
        self.set(register::CONFIG_GENERATION, self.generation().wrapping_add(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_device_has_a_page_of_its_own_in_one_range() {
        let bank = Bank::new(3).unwrap();
        let range = bank.range(0xd000_0000);
        assert_eq!((range.guest, range.len), (0xd000_0000, 3 * 4096));
        for (index, page) in bank.pages().enumerate() {
            page.set(register::STATUS, index as u32 + 1);
            page.set(0xffc, 0x0403_0201);
        }
        let status = bank.pages().map(|page| {
            let mut word = [0; 4];
            page.read(register::STATUS, &mut word);
            u32::from_le_bytes(word)
        });
        assert_eq!(status.collect::<Vec<_>>(), [1, 2, 3]);
        let mut end = [0xff; 4];
        bank.pages().next().unwrap().read(0xffe, &mut end);
        assert_eq!(end, [3, 4, 0, 0]);
    }

    #[test]
    fn a_configuration_that_was_read_before_a_change_does_not_undo_it() {
        let page = Page::alone();
        let generation = page.generation();
        let mut old = [0; CONFIG_SIZE];
        old[0] = 1;
        page.change_config(|space| space[0] = 2);
        assert_eq!(page.replace_config(generation, &old), None);
        let mut byte = [0];
        page.read(register::CONFIG, &mut byte);
        assert_eq!(byte, [2]);
        let generation = page.generation();
        assert_eq!(page.replace_config(generation, &old), Some(true));
        assert_ne!(page.generation(), generation);
        assert_eq!(page.replace_config(page.generation(), &old), Some(false));
    }
}
