//! Uncompressed EROFS images: a read-only root filesystem the kernel maps block by block, so that only what is touched
//! is read. This module holds the on-disk vocabulary; `writer` and `reader` know the layout. Source: Linux
//! `fs/erofs/erofs_fs.h` and `Documentation/filesystems/erofs.rst`.
//!
//! Only what a guest image needs is written and understood: 4 KiB blocks, compact inodes, whole or inline data.

mod reader;
mod writer;

pub use reader::read;
pub use writer::write;

use crate::tree::PathError;

const MAGIC: u32 = 0xe0f5_e1e2;
const BLOCK_BITS: u8 = 12;
const BLOCK: usize = 1 << BLOCK_BITS;
const SUPERBLOCK_AT: usize = 1024;
const SUPERBLOCK_SIZE: usize = 128;
/// Inodes are addressed in units of this size, from the start of the metadata area.
const SLOT: usize = 32;
const INODE_SIZE: usize = 32;
const DIRENT_SIZE: usize = 12;
/// The superblock's checksum field is valid.
const FEATURE_COMPAT_CHECKSUM: u32 = 1;
const LAYOUT_PLAIN: u16 = 0;
const LAYOUT_INLINE: u16 = 2;
const TYPE_FILE: u8 = 1;
const TYPE_DIRECTORY: u8 = 2;
const S_IFMT: u16 = 0o170_000;
const S_IFDIR: u16 = 0o040_000;
const S_IFREG: u16 = 0o100_000;

/// An image that cannot be written or read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ErofsError {
    /// Compact inodes count bytes in 32 bits.
    #[error("/{0} is larger than 4 GiB, which a guest image cannot hold: share it into the pod instead")]
    FileTooLarge(String),
    /// Block numbers, link counts or the root's address do not fit their fields.
    #[error("the guest image has too many files or bytes for its format: leave some out")]
    TooMuch,
    /// No superblock where one should be.
    #[error("it holds no EROFS superblock")]
    NotErofs,
    /// Features this program never writes.
    #[error("it uses EROFS features of another builder ({0}): it is not a kata-rs guest image")]
    Foreign(&'static str),
    /// The image ends before the superblock says.
    #[error("the image is cut off: it has {actual} bytes of {expected}")]
    Truncated {
        /// Bytes the superblock promises.
        expected: u64,
        /// Bytes there are.
        actual: u64,
    },
    /// A checksum or structure that does not hold.
    #[error("the image is damaged: {0}")]
    Damaged(&'static str),
    /// A name that no image has.
    #[error("it was not made by this program: {0}")]
    Path(#[from] PathError),
}

/// Whether the bytes look like an EROFS filesystem of any builder.
pub fn recognise(image: &[u8]) -> bool {
    image.get(SUPERBLOCK_AT..SUPERBLOCK_AT + 4) == Some(&MAGIC.to_le_bytes())
}

/// CRC-32C as the kernel's `crc32c(~0, ...)`: Castagnoli polynomial, reflected, without the final inversion.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 {
                (crc >> 1) ^ 0x82f6_3b78
            } else {
                crc >> 1
            }
        })
    })
}

/// The checksum of a superblock: over its block from the superblock on, the checksum field taken as zero.
fn superblock_checksum(image: &[u8]) -> Option<u32> {
    let mut block = image.get(SUPERBLOCK_AT..BLOCK)?.to_vec();
    block[4..8].fill(0);
    Some(crc32c(&block))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::{Content, Tree};

    fn sample() -> Tree {
        let mut tree = Tree::new();
        tree.add_directory("proc", 0o555).unwrap();
        tree.add_directory("tmp", 0o1777).unwrap();
        tree.add_file("init", 0o755, (0..100_000u32).map(|value| value as u8).collect())
            .unwrap();
        tree.add_file("etc/empty", 0o600, vec![]).unwrap();
        tree.add_file("etc/one-block", 0o644, vec![7; BLOCK]).unwrap();
        tree.add_file("etc/inline", 0o644, vec![9; BLOCK - INODE_SIZE - 1])
            .unwrap();
        tree.add_file("etc/ssl/certs/ca.pem", 0o444, b"pem".to_vec())
            .unwrap();
        tree
    }

    #[test]
    fn round_trip() {
        let image = write(&sample()).unwrap();
        assert_eq!(image.len() % BLOCK, 0);
        assert!(recognise(&image));
        assert_eq!(read(&image).unwrap(), sample());
    }

    #[test]
    fn directories_of_many_blocks() {
        let mut tree = Tree::new();
        for number in 0..2000 {
            tree.add_file(
                &format!("d/{:0>width$}", number, width = 1 + number % 200),
                0o644,
                vec![1],
            )
            .unwrap_or(());
        }
        assert!(tree.iter().count() > 1500);
        assert_eq!(read(&write(&tree).unwrap()).unwrap(), tree);
    }

    #[test]
    fn checksum_is_the_kernels() {
        // The check value of CRC-32C, before its final inversion.
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn truncated_images_are_errors() {
        let image = write(&sample()).unwrap();
        for length in (0..image.len()).step_by(97) {
            let error = read(&image[..length]).unwrap_err();
            assert!(
                matches!(error, ErofsError::NotErofs | ErofsError::Truncated { .. }),
                "{length}: {error}"
            );
        }
    }

    #[test]
    fn damage_never_panics_and_metadata_damage_in_the_first_block_is_found() {
        let image = write(&sample()).unwrap();
        for at in SUPERBLOCK_AT..BLOCK {
            let mut damaged = image.clone();
            damaged[at] ^= 0x55;
            assert!(read(&damaged).is_err(), "byte {at}");
        }
        // With the checksum made right again, the structure itself is what has to hold.
        for at in SUPERBLOCK_AT + 8..BLOCK {
            let mut damaged = image.clone();
            damaged[at] ^= [0x01, 0x80, 0xff][at % 3];
            let checksum = superblock_checksum(&damaged).unwrap();
            damaged[SUPERBLOCK_AT + 4..SUPERBLOCK_AT + 8].copy_from_slice(&checksum.to_le_bytes());
            let _ = read(&damaged);
        }
    }

    #[test]
    fn small_images_keep_their_metadata_in_one_block() {
        let mut tree = Tree::new();
        for name in ["dev", "proc", "run", "sys", "tmp"] {
            tree.add_directory(name, 0o755).unwrap();
        }
        tree.add_file("init", 0o755, vec![1; 3 * BLOCK]).unwrap();
        assert_eq!(write(&tree).unwrap().len(), 4 * BLOCK);
        assert!(tree.iter().any(|(_, node)| node.content == Content::Directory));
    }
}
