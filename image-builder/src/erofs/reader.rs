//! Reads EROFS images that `writer` made, trusting nothing in them: every offset is checked, every inode is entered
//! once. Images of other builders are refused by name of the feature, not half understood.

use std::collections::BTreeSet;

use super::{
    BLOCK, BLOCK_BITS, DIRENT_SIZE, ErofsError, FEATURE_COMPAT_CHECKSUM, INODE_SIZE, LAYOUT_INLINE,
    LAYOUT_PLAIN, S_IFDIR, S_IFMT, S_IFREG, SLOT, SUPERBLOCK_AT, SUPERBLOCK_SIZE, recognise,
    superblock_checksum,
};
use crate::tree::Tree;

/// Reads an image into the tree it was made from.
///
/// # Errors
/// A truncated, damaged or foreign image.
pub fn read(image: &[u8]) -> Result<Tree, ErofsError> {
    if !recognise(image) {
        return Err(ErofsError::NotErofs);
    }
    let actual = image.len() as u64;
    let too_short = ErofsError::Truncated {
        expected: BLOCK as u64,
        actual,
    };
    let superblock = image
        .get(SUPERBLOCK_AT..SUPERBLOCK_AT + SUPERBLOCK_SIZE)
        .ok_or(too_short)?;
    let expected = u64::from(u32_at(superblock, 36)) * BLOCK as u64;
    if actual < expected.max(BLOCK as u64) {
        return Err(ErofsError::Truncated {
            expected: expected.max(BLOCK as u64),
            actual,
        });
    }
    if u32_at(superblock, 8) != FEATURE_COMPAT_CHECKSUM {
        return Err(ErofsError::Foreign("no checksum, or time and attribute features"));
    }
    if superblock_checksum(image) != Some(u32_at(superblock, 4)) {
        return Err(ErofsError::Damaged("the superblock's checksum is wrong"));
    }
    if superblock[12] != BLOCK_BITS || superblock[13] != 0 {
        return Err(ErofsError::Foreign("another block size"));
    }
    if u32_at(superblock, 80) != 0 {
        return Err(ErofsError::Foreign("compression, chunks or devices"));
    }
    if u32_at(superblock, 40) != 0 {
        return Err(ErofsError::Foreign("a metadata area of its own"));
    }
    let mut reader = Reader {
        image,
        entered: BTreeSet::new(),
        tree: Tree::new(),
    };
    let root = u64::from(u16_at(superblock, 14));
    let (mode, bytes) = reader.inode(root)?;
    if mode & S_IFMT != S_IFDIR {
        return Err(ErofsError::Damaged("the root is no directory"));
    }
    reader.entered.insert(root);
    reader.directory("", bytes)?;
    let inodes = u64::from_le_bytes(array_at(superblock, 16));
    if reader.entered.len() as u64 != inodes {
        return Err(ErofsError::Damaged("the number of inodes is wrong"));
    }
    Ok(reader.tree)
}

struct Reader<'a> {
    image: &'a [u8],
    entered: BTreeSet<u64>,
    tree: Tree,
}

impl<'a> Reader<'a> {
    /// Mode and data of the inode at slot `number`.
    fn inode(&self, number: u64) -> Result<(u16, &'a [u8]), ErofsError> {
        let outside = ErofsError::Damaged("an inode lies outside the image");
        let at = usize::try_from(number)
            .ok()
            .and_then(|number| number.checked_mul(SLOT))
            .ok_or(outside)?;
        let raw = self.slice(at, INODE_SIZE)?;
        let format = u16_at(raw, 0);
        if format & 1 != 0 || u16_at(raw, 2) != 0 {
            return Err(ErofsError::Foreign("extended inodes or attributes"));
        }
        let size = u32_at(raw, 8) as usize;
        let data_at = match format >> 1 {
            LAYOUT_INLINE => at + INODE_SIZE,
            LAYOUT_PLAIN if size == 0 => 0,
            LAYOUT_PLAIN => u32_at(raw, 16) as usize * BLOCK,
            _ => return Err(ErofsError::Foreign("compressed or chunked files")),
        };
        Ok((u16_at(raw, 4), self.slice(data_at, size)?))
    }

    fn directory(&mut self, path: &str, bytes: &'a [u8]) -> Result<(), ErofsError> {
        const DAMAGED: ErofsError = ErofsError::Damaged("a directory is not well formed");
        for block in bytes.chunks(BLOCK) {
            if block.len() < DIRENT_SIZE {
                return Err(DAMAGED);
            }
            let names_at = usize::from(u16_at(block, 8));
            if names_at % DIRENT_SIZE != 0 || names_at == 0 || names_at > block.len() {
                return Err(DAMAGED);
            }
            let entries = names_at / DIRENT_SIZE;
            for entry in 0..entries {
                let raw = &block[entry * DIRENT_SIZE..(entry + 1) * DIRENT_SIZE];
                let start = usize::from(u16_at(raw, 8));
                let end = if entry + 1 < entries {
                    usize::from(u16_at(block, (entry + 1) * DIRENT_SIZE + 8))
                } else {
                    block.len()
                };
                let name = block.get(start..end).ok_or(DAMAGED)?;
                // The last name of a block that is not the directory's last ends at the padding.
                let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
                let name = std::str::from_utf8(name).map_err(|_| DAMAGED)?;
                if name.contains('/') {
                    return Err(DAMAGED);
                }
                if name != "." && name != ".." {
                    let child = if path.is_empty() {
                        name.to_owned()
                    } else {
                        format!("{path}/{name}")
                    };
                    self.node(&child, u64::from_le_bytes(array_at(raw, 0)))?;
                }
            }
        }
        Ok(())
    }

    fn node(&mut self, path: &str, number: u64) -> Result<(), ErofsError> {
        // No hard links are written; refusing them also ends every cycle.
        if !self.entered.insert(number) {
            return Err(ErofsError::Damaged("an inode has two names"));
        }
        let (mode, bytes) = self.inode(number)?;
        match mode & S_IFMT {
            S_IFDIR => {
                self.tree.add_directory(path, mode & !S_IFMT)?;
                self.directory(path, bytes)
            }
            S_IFREG => Ok(self.tree.add_file(path, mode & !S_IFMT, bytes.to_vec())?),
            _ => Err(ErofsError::Foreign("links or device files")),
        }
    }

    fn slice(&self, at: usize, length: usize) -> Result<&'a [u8], ErofsError> {
        at.checked_add(length)
            .and_then(|end| self.image.get(at..end))
            .ok_or(ErofsError::Damaged("data lies outside the image"))
    }
}

// The callers pass slices of fixed sizes and offsets inside them.
fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array_at(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}
