//! A guest image as a file: which formats there are, how a tree becomes one, how a file is recognised as one.

use std::fmt;

use crate::cpio::{self, CpioError};
use crate::erofs::{self, ErofsError};
use crate::manifest::{Manifest, ManifestError};
use crate::tree::Tree;

/// How the tree is laid down in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// A cpio archive that the kernel unpacks into memory at boot.
    Initramfs,
    /// A read-only filesystem on a block device.
    Erofs,
}

impl fmt::Display for Format {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Initramfs => "initramfs",
            Self::Erofs => "erofs",
        })
    }
}

/// A file that is no guest image, or no whole one.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ImageError {
    /// No known first bytes.
    #[error("it is {0}, not a guest image: make one with `kata-rs-image build`")]
    Foreign(&'static str),
    /// The archive is not whole.
    #[error(transparent)]
    Cpio(#[from] CpioError),
    /// The filesystem is not whole.
    #[error(transparent)]
    Erofs(#[from] ErofsError),
    /// The content is not what was built.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The content is right, the bytes around it are not: owners, times, padding, order.
    #[error("its {0} structures are not as this release writes them: build the image again")]
    NotCanonical(Format),
}

/// The bytes of an image of `tree`. Equal trees give equal bytes.
///
/// # Errors
/// Sizes or counts the format cannot hold.
pub fn encode(tree: &Tree, format: Format) -> Result<Vec<u8>, ImageError> {
    Ok(match format {
        Format::Initramfs => cpio::write(tree)?,
        Format::Erofs => erofs::write(tree)?,
    })
}

/// Recognises the format, reads the tree, and holds it against its manifest.
///
/// # Errors
/// Anything that is not a whole image of this project.
pub fn decode(bytes: &[u8]) -> Result<(Format, Tree, Manifest), ImageError> {
    let (format, tree) = if bytes.starts_with(cpio::MAGIC) {
        (Format::Initramfs, cpio::read(bytes)?)
    } else if erofs::recognise(bytes) {
        (Format::Erofs, erofs::read(bytes)?)
    } else {
        return Err(ImageError::Foreign(describe(bytes)));
    };
    let manifest = Manifest::verify(&tree)?;
    // Building is deterministic, so an intact image is the only byte string its tree can give.
    if encode(&tree, format)? != bytes {
        return Err(ImageError::NotCanonical(format));
    }
    Ok((format, tree, manifest))
}

/// What a file that is no image most likely is, for the error message.
fn describe(bytes: &[u8]) -> &'static str {
    match bytes {
        [] => "an empty file",
        [0x7f, b'E', b'L', b'F', ..] => "an ELF file (a kernel or a program)",
        [0x1f, 0x8b, ..] => "gzip data",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd data",
        _ if bytes.get(1080..1082) == Some(&[0x53, 0xef]) => "an ext4 filesystem",
        _ if bytes.starts_with(b"hsqs") => "a squashfs filesystem",
        _ => "something unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_files_are_named() {
        assert_eq!(decode(b""), Err(ImageError::Foreign("an empty file")));
        assert_eq!(
            decode(b"\x7fELF\x02"),
            Err(ImageError::Foreign("an ELF file (a kernel or a program)"))
        );
        assert_eq!(decode(b"hello"), Err(ImageError::Foreign("something unknown")));
    }

    #[test]
    fn changes_outside_the_content_are_found() {
        let mut tree = Tree::new();
        tree.add_file("init", 0o755, vec![1; 5000]).unwrap();
        let manifest = Manifest::of(&tree).to_bytes();
        tree.add_file("etc/kata-rs-image.json", 0o444, manifest).unwrap();
        // The owner of the first cpio entry; the padding of the last EROFS block.
        for (format, at) in [(Format::Initramfs, 22), (Format::Erofs, 3 * 4096 - 1)] {
            let mut bytes = encode(&tree, format).unwrap();
            assert!(decode(&bytes).is_ok());
            bytes[at] = b'1';
            assert_eq!(decode(&bytes), Err(ImageError::NotCanonical(format)));
        }
    }

    #[test]
    fn other_initramfs_are_refused() {
        let mut tree = Tree::new();
        tree.add_file("init", 0o755, b"#!/bin/sh".to_vec()).unwrap();
        for format in [Format::Initramfs, Format::Erofs] {
            let bytes = encode(&tree, format).unwrap();
            assert_eq!(decode(&bytes), Err(ImageError::Manifest(ManifestError::Missing)));
        }
    }
}
