//! An empty ext4 file system in a fresh, sparse file (Documentation/filesystems/ext4): what a container of containerd's
//! erofs snapshotter writes goes there.
//!
//! A file of holes reads as zeroes, so nearly nothing has to be written: superblock, group descriptors, the first
//! group's bitmaps, three inodes, two directories and the journal's superblock. That takes less than a millisecond and
//! no other program. Checksums cover the group descriptors only (`uninit_bg`), and superblock and descriptors have no
//! backups (`sparse_super2`): the image lives as long as its container.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const BLOCK: u64 = 4096;
/// Blocks that one block of bits is for.
const BLOCKS_PER_GROUP: u64 = 8 * BLOCK;
/// One for 16 KiB of space, as mke2fs(8) makes them.
const INODES_PER_GROUP: u64 = BLOCKS_PER_GROUP / 4;
const INODE_SIZE: u64 = 256;
const INODE_TABLE_BLOCKS: u64 = INODES_PER_GROUP * INODE_SIZE / BLOCK;
/// `struct ext4_group_desc` without the second half for file systems of more than 2^32 blocks.
const DESCRIPTOR: u64 = 32;
/// Most blocks that 32 bits count.
const MOST_BLOCKS: u64 = u32::MAX as u64;

const ROOT_INODE: u64 = 2;
const JOURNAL_INODE: u64 = 8;
/// The first that is not reserved.
const FIRST_INODE: u64 = 11;

/// Smallest and largest image, in bytes.
pub(super) const SIZES: std::ops::RangeInclusive<u64> = 16 << 20..=MOST_BLOCKS * BLOCK;

/// Where everything is, in blocks.
struct Layout {
    blocks: u64,
    groups: u64,
    descriptor_blocks: u64,
    journal_blocks: u64,
}

impl Layout {
    /// Of a file of this size, in bytes; it must be among [`SIZES`].
    fn of(bytes: u64) -> Self {
        let mut blocks = (bytes / BLOCK).min(MOST_BLOCKS);
        // A last group that has hardly room for its own tables is left out.
        let tail = blocks % BLOCKS_PER_GROUP;
        if blocks > BLOCKS_PER_GROUP && tail < Self::TABLES + 64 {
            blocks -= tail;
        }
        let groups = blocks.div_ceil(BLOCKS_PER_GROUP);
        let journal_blocks = match bytes >> 20 {
            ..128 => 1024,
            128..1024 => 4096,
            _ => 16384,
        };
        Self {
            blocks,
            groups,
            descriptor_blocks: (groups * DESCRIPTOR).div_ceil(BLOCK),
            journal_blocks,
        }
    }

    /// Blocks of a group's bitmaps and inodes.
    const TABLES: u64 = 2 + INODE_TABLE_BLOCKS;

    /// The first block of a group's tables: block bitmap, inode bitmap, inodes.
    fn tables(&self, group: u64) -> u64 {
        match group {
            0 => 1 + self.descriptor_blocks,
            group => group * BLOCKS_PER_GROUP,
        }
    }

    fn root_directory(&self) -> u64 {
        self.tables(0) + Self::TABLES
    }

    fn lost_and_found(&self) -> u64 {
        self.root_directory() + 1
    }

    fn journal(&self) -> u64 {
        self.root_directory() + 2
    }

    /// Blocks in use at the beginning of a group.
    fn used(&self, group: u64) -> u64 {
        match group {
            0 => self.journal() + self.journal_blocks,
            _ => Self::TABLES,
        }
    }

    fn blocks_of(&self, group: u64) -> u64 {
        (self.blocks - group * BLOCKS_PER_GROUP).min(BLOCKS_PER_GROUP)
    }

    fn free_blocks(&self) -> u64 {
        (0..self.groups)
            .map(|group| self.blocks_of(group) - self.used(group))
            .sum()
    }
}

/// Makes a file that holds nothing yet an image of this size, in bytes. `now` is in seconds since the epoch.
///
/// # Errors
/// What ftruncate(2) and pwrite(2) report; `InvalidInput` for a size that is not among [`SIZES`].
pub(super) fn format(file: &File, bytes: u64, uuid: [u8; 16], now: u32) -> io::Result<()> {
    if !SIZES.contains(&bytes) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{bytes} bytes are not among {} to {}", SIZES.start(), SIZES.end()),
        ));
    }
    file.set_len(bytes / BLOCK * BLOCK)?;
    let layout = Layout::of(bytes);
    let put = |block: u64, data: &[u8]| file.write_all_at(data, block * BLOCK);
    put(1, &descriptors(&layout, &uuid))?;
    // The last group's is wanted too (e2fsck(8) says so): it tells where the file system ends.
    for group in [0, layout.groups - 1] {
        put(layout.tables(group), &block_bitmap(&layout, group))?;
    }
    put(layout.tables(0) + 1, &inode_bitmap())?;
    put(layout.tables(0) + 2, &inodes(&layout, now))?;
    put(
        layout.root_directory(),
        &directory(&[(ROOT_INODE, "."), (ROOT_INODE, ".."), (FIRST_INODE, "lost+found")]),
    )?;
    put(
        layout.lost_and_found(),
        &directory(&[(FIRST_INODE, "."), (ROOT_INODE, "..")]),
    )?;
    put(layout.journal(), &journal(&layout, &uuid))?;
    // Last: without it there is no file system.
    file.write_all_at(&superblock(&layout, &uuid, now), 1024)
}

/// A block, or another piece of bytes, with little-endian numbers in it.
struct Bytes(Vec<u8>);

impl Bytes {
    fn new(length: u64) -> Self {
        Self(vec![0; length as usize])
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.0[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    fn put16(&mut self, at: u64, value: u64) {
        self.put(at, &(value as u16).to_le_bytes());
    }

    fn put32(&mut self, at: u64, value: u64) {
        self.put(at, &(value as u32).to_le_bytes());
    }
}

/// `struct ext4_super_block`.
fn superblock(layout: &Layout, uuid: &[u8; 16], now: u32) -> Vec<u8> {
    /// `COMPAT_HAS_JOURNAL`, `COMPAT_EXT_ATTR`, `COMPAT_DIR_INDEX`, `COMPAT_SPARSE_SUPER2`.
    const COMPATIBLE: u64 = 0x4 | 0x8 | 0x20 | 0x200;
    /// `INCOMPAT_FILETYPE`, `INCOMPAT_EXTENTS`.
    const INCOMPATIBLE: u64 = 0x2 | 0x40;
    /// `RO_COMPAT_LARGE_FILE`, `HUGE_FILE`, `GDT_CSUM`, `DIR_NLINK`, `EXTRA_ISIZE`.
    const READ_ONLY_COMPATIBLE: u64 = 0x2 | 0x8 | 0x10 | 0x20 | 0x40;
    let mut block = Bytes::new(1024);
    block.put32(0x00, layout.groups * INODES_PER_GROUP);
    block.put32(0x04, layout.blocks);
    block.put32(0x0c, layout.free_blocks());
    block.put32(0x10, layout.groups * INODES_PER_GROUP - FIRST_INODE);
    // Sizes of blocks and clusters: 1024 << 2.
    block.put32(0x18, 2);
    block.put32(0x1c, 2);
    block.put32(0x20, BLOCKS_PER_GROUP);
    block.put32(0x24, BLOCKS_PER_GROUP);
    block.put32(0x28, INODES_PER_GROUP);
    block.put32(0x30, now.into());
    // Never checked after so and so many mounts; magic; clean; errors: go on, as mke2fs(8) has it.
    block.put16(0x36, 0xffff);
    block.put16(0x38, 0xef53);
    block.put16(0x3a, 1);
    block.put16(0x3c, 1);
    block.put32(0x40, now.into());
    block.put32(0x4c, 1);
    block.put32(0x54, FIRST_INODE);
    block.put16(0x58, INODE_SIZE);
    block.put32(0x5c, COMPATIBLE);
    block.put32(0x60, INCOMPATIBLE);
    block.put32(0x64, READ_ONLY_COMPATIBLE);
    block.put(0x68, uuid);
    block.put32(0xe0, JOURNAL_INODE);
    // Names are hashed with half MD4, seeded with what is random anyway; signed characters.
    block.put(0xec, uuid);
    block.0[0xfc] = 1;
    block.put16(0xfe, DESCRIPTOR);
    // Extended attributes and ACLs.
    block.put32(0x100, 0x4 | 0x8);
    block.put32(0x108, now.into());
    block.put16(0x15c, 32);
    block.put16(0x15e, 32);
    block.put32(0x160, 1);
    block.0
}

/// All `struct ext4_group_desc`.
fn descriptors(layout: &Layout, uuid: &[u8; 16]) -> Vec<u8> {
    /// `EXT4_BG_INODE_UNINIT`.
    const NO_INODES: u64 = 1;
    /// `EXT4_BG_BLOCK_UNINIT`.
    const NO_BLOCKS: u64 = 2;
    /// `EXT4_BG_INODE_ZEROED`.
    const ZEROED: u64 = 4;
    let mut blocks = Bytes::new(layout.descriptor_blocks * BLOCK);
    for group in 0..layout.groups {
        let tables = layout.tables(group);
        let first = group == 0;
        let used_inodes = if first { FIRST_INODE } else { 0 };
        let mut descriptor = Bytes::new(DESCRIPTOR);
        descriptor.put32(0x0, tables);
        descriptor.put32(0x4, tables + 1);
        descriptor.put32(0x8, tables + 2);
        descriptor.put16(0xc, layout.blocks_of(group) - layout.used(group));
        descriptor.put16(0xe, INODES_PER_GROUP - used_inodes);
        // Root and lost+found.
        descriptor.put16(0x10, if first { 2 } else { 0 });
        descriptor.put16(
            0x12,
            match group {
                0 => ZEROED,
                _ if group + 1 == layout.groups => ZEROED | NO_INODES,
                _ => ZEROED | NO_INODES | NO_BLOCKS,
            },
        );
        descriptor.put16(0x1c, INODES_PER_GROUP - used_inodes);
        let checksum = crc16(crc16(0xffff, uuid), &(group as u32).to_le_bytes());
        let checksum = crc16(checksum, &descriptor.0[..0x1e]);
        descriptor.put16(0x1e, checksum.into());
        blocks.put(group * DESCRIPTOR, &descriptor.0);
    }
    blocks.0
}

/// lib/crc16.c of Linux.
fn crc16(start: u16, bytes: &[u8]) -> u16 {
    bytes.iter().fold(start, |crc, byte| {
        (0..8).fold(crc ^ u16::from(*byte), |crc, _| {
            if crc & 1 == 1 { crc >> 1 ^ 0xa001 } else { crc >> 1 }
        })
    })
}

/// A block with these bits set.
fn bits(set: impl Iterator<Item = u64>) -> Vec<u8> {
    let mut block = vec![0; BLOCK as usize];
    for bit in set {
        block[bit as usize / 8] |= 1 << (bit % 8);
    }
    block
}

/// Bits of blocks behind the end are set.
fn block_bitmap(layout: &Layout, group: u64) -> Vec<u8> {
    bits((0..layout.used(group)).chain(layout.blocks_of(group)..BLOCKS_PER_GROUP))
}

fn inode_bitmap() -> Vec<u8> {
    bits((0..FIRST_INODE).chain(INODES_PER_GROUP..BLOCKS_PER_GROUP))
}

/// The first block of inodes: the root directory, the journal, lost+found.
fn inodes(layout: &Layout, now: u32) -> Vec<u8> {
    let mut block = Bytes::new(BLOCK);
    let mut put = |number: u64, mode: u64, links: u64, first: u64, blocks: u64| {
        let at = (number - 1) * INODE_SIZE;
        block.put16(at, mode);
        block.put32(at + 0x04, blocks * BLOCK);
        for time in [0x08, 0x0c, 0x10, 0x90] {
            block.put32(at + time, now.into());
        }
        block.put16(at + 0x1a, links);
        block.put32(at + 0x1c, blocks * BLOCK / 512);
        // EXT4_EXTENTS_FL; a header, and one extent: not more than 32768 blocks.
        block.put32(at + 0x20, 0x8_0000);
        block.put16(at + 0x28, 0xf30a);
        block.put16(at + 0x2a, 1);
        block.put16(at + 0x2c, 4);
        block.put16(at + 0x38, blocks);
        block.put32(at + 0x3c, first);
        // i_extra_isize.
        block.put16(at + 0x80, 32);
    };
    put(ROOT_INODE, 0o40755, 3, layout.root_directory(), 1);
    put(
        JOURNAL_INODE,
        0o100_600,
        1,
        layout.journal(),
        layout.journal_blocks,
    );
    put(FIRST_INODE, 0o40700, 2, layout.lost_and_found(), 1);
    block.0
}

/// A block of `struct ext4_dir_entry_2`, all directories. The last entry has the rest of the block.
fn directory(entries: &[(u64, &str)]) -> Vec<u8> {
    let mut block = Bytes::new(BLOCK);
    let mut at = 0;
    for (index, (inode, name)) in entries.iter().enumerate() {
        let length = match index + 1 == entries.len() {
            true => BLOCK - at,
            false => (8 + name.len() as u64).next_multiple_of(4),
        };
        block.put32(at, *inode);
        block.put16(at + 4, length);
        block.0[at as usize + 6] = name.len() as u8;
        block.0[at as usize + 7] = 2;
        block.put(at + 8, name.as_bytes());
        at += length;
    }
    block.0
}

/// `struct journal_superblock_s`, big-endian: version 2, clean.
fn journal(layout: &Layout, uuid: &[u8; 16]) -> Vec<u8> {
    let mut block = Bytes::new(1024);
    let journal_blocks = layout.journal_blocks as u32;
    for (at, value) in [
        (0x00, 0xc03b_3998),
        (0x04, 4),
        (0x0c, BLOCK as u32),
        (0x10, journal_blocks),
        (0x14, 1),
        (0x18, 1),
        (0x40, 1),
    ] {
        block.put(at, &value.to_be_bytes());
    }
    block.put(0x30, uuid);
    block.put(0x100, uuid);
    block.0
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;
    use std::process::Command;

    use super::*;

    const UUID: [u8; 16] = *b"0123456789abcdef";

    /// e2fsck(8) is the judge of what ext4 is.
    #[test]
    fn a_checker_finds_nothing_wrong() {
        if Command::new("e2fsck").arg("-V").output().is_err() {
            println!("skipped: this machine has no e2fsck(8)");
            return;
        }
        for bytes in [
            16 << 20,
            (16 << 20) + 12345,
            64 << 20,
            128 << 20,
            (128 << 20) + (2 << 20),
            (128 << 20) + (3 << 20),
            200 << 20,
            1 << 30,
            10 << 30,
            (100 << 30) + 4096,
        ] {
            let image = tempfile::NamedTempFile::new().unwrap();
            format(image.as_file(), bytes, UUID, 1_700_000_000).unwrap();
            let check = Command::new("e2fsck")
                .args(["-f", "-n"])
                .arg(image.path())
                .output()
                .unwrap();
            assert!(check.status.success(), "{bytes}: {check:?}");
            let metadata = image.as_file().metadata().unwrap();
            assert_eq!(metadata.len(), bytes / BLOCK * BLOCK);
            assert!(
                metadata.blocks() * 512 < 256 << 10,
                "{bytes}: {} blocks",
                metadata.blocks()
            );
        }
    }

    #[test]
    fn sizes_that_no_file_system_has_are_refused() {
        let file = tempfile::tempfile().unwrap();
        for bytes in [0, (16 << 20) - 1, u64::MAX] {
            let error = format(&file, bytes, UUID, 0).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{bytes}");
        }
        assert_eq!(file.metadata().unwrap().len(), 0);
    }
}
