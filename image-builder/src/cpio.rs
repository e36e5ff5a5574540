//! Initramfs archives: the `newc` form of cpio, uncompressed, as the kernel's `Documentation/driver-api/early-userspace/
//! buffer-format.rst` describes it. Writes and reads exactly what a [`Tree`] can hold; owner, times and devices are zero.

use crate::tree::{Content, PathError, Tree};

/// The first bytes of every entry.
pub const MAGIC: &[u8] = b"070701";
const HEADER_SIZE: usize = 110;
const TRAILER: &str = "TRAILER!!!";
const S_IFMT: u32 = 0o170_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;

/// An archive that cannot be written or read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CpioError {
    /// The format counts file sizes in 32 bits.
    #[error("/{0} is larger than 4 GiB, which an initramfs cannot hold: use --format erofs")]
    FileTooLarge(String),
    /// The archive ends before its trailer.
    #[error("the archive is cut off after {0} bytes")]
    Truncated(usize),
    /// A header that is none.
    #[error("the archive is damaged at byte {0}")]
    Damaged(usize),
    /// Something a kata-rs image never holds.
    #[error("/{0} is neither a file nor a directory: it is not a kata-rs guest image")]
    UnexpectedKind(String),
    /// Content after the trailer, which the kernel would unpack too.
    #[error("the archive goes on after its trailer at byte {0}: it is not a kata-rs guest image")]
    Trailing(usize),
    /// A name that no image has.
    #[error("it was not made by this program: {0}")]
    Path(#[from] PathError),
}

/// Writes the archive. Equal trees give equal bytes.
///
/// # Errors
/// A file of 4 GiB or more.
pub fn write(tree: &Tree) -> Result<Vec<u8>, CpioError> {
    let mut archive = Vec::new();
    for (number, (path, node)) in (1u32..).zip(tree.iter()) {
        let (kind, links, bytes) = match &node.content {
            Content::Directory => (S_IFDIR, 2, &[][..]),
            Content::File(bytes) => (S_IFREG, 1, &bytes[..]),
        };
        push_entry(
            &mut archive,
            number,
            kind | u32::from(node.mode),
            links,
            path,
            bytes,
        )?;
    }
    push_entry(&mut archive, 0, 0, 1, TRAILER, &[])?;
    // Block devices and loaders take whole sectors.
    archive.resize(archive.len().next_multiple_of(512), 0);
    Ok(archive)
}

fn push_entry(
    archive: &mut Vec<u8>,
    inode: u32,
    mode: u32,
    links: u32,
    name: &str,
    bytes: &[u8],
) -> Result<(), CpioError> {
    let size = u32::try_from(bytes.len()).map_err(|_| CpioError::FileTooLarge(name.to_owned()))?;
    // Names are at most 4095 bytes: the tree checks that.
    let name_size = name.len() as u32 + 1;
    archive.extend_from_slice(MAGIC);
    // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    for field in [inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0] {
        archive.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend_from_slice(bytes);
    archive.resize(archive.len().next_multiple_of(4), 0);
    Ok(())
}

/// Reads an archive that [`write`] made.
///
/// # Errors
/// A truncated or damaged archive, or one that holds what a kata-rs image never does.
pub fn read(archive: &[u8]) -> Result<Tree, CpioError> {
    let mut tree = Tree::new();
    let mut at = 0;
    loop {
        let header = take(archive, at, HEADER_SIZE)?;
        if !header.starts_with(MAGIC) {
            return Err(CpioError::Damaged(at));
        }
        let field = |index: usize| hex(&header[6 + 8 * index..14 + 8 * index]).ok_or(CpioError::Damaged(at));
        let (mode, size, name_size) = (field(1)?, field(6)? as usize, field(11)? as usize);
        let name_at = at + HEADER_SIZE;
        let name = match take(archive, name_at, name_size)?.split_last() {
            Some((0, name)) => std::str::from_utf8(name).map_err(|_| CpioError::Damaged(at))?,
            _ => return Err(CpioError::Damaged(at)),
        };
        let data_at = (name_at + name_size).next_multiple_of(4);
        if name == TRAILER {
            return match archive
                .get(data_at..)
                .unwrap_or_default()
                .iter()
                .position(|byte| *byte != 0)
            {
                None => Ok(tree),
                Some(offset) => Err(CpioError::Trailing(data_at + offset)),
            };
        }
        let permissions = (mode & 0o7777) as u16;
        match mode & S_IFMT {
            S_IFDIR => tree.add_directory(name, permissions)?,
            S_IFREG => tree.add_file(name, permissions, take(archive, data_at, size)?.to_vec())?,
            _ => return Err(CpioError::UnexpectedKind(name.to_owned())),
        }
        at = (data_at + size).next_multiple_of(4);
    }
}

// Sizes come from 32-bit fields and offsets lie inside the archive, so sums stay far below the end of usize.
fn take(archive: &[u8], at: usize, length: usize) -> Result<&[u8], CpioError> {
    archive
        .get(at..at + length)
        .ok_or(CpioError::Truncated(archive.len()))
}

fn hex(digits: &[u8]) -> Option<u32> {
    // from_str_radix would take a sign.
    if !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    u32::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Tree {
        let mut tree = Tree::new();
        tree.add_directory("tmp", 0o1777).unwrap();
        tree.add_file("init", 0o755, b"agent".to_vec()).unwrap();
        tree.add_file("etc/empty", 0o600, vec![]).unwrap();
        tree
    }

    #[test]
    fn round_trip() {
        assert_eq!(read(&write(&sample()).unwrap()).unwrap(), sample());
    }

    #[test]
    fn the_header_is_what_the_kernel_reads() {
        let mut tree = Tree::new();
        tree.add_file("init", 0o755, b"abc".to_vec()).unwrap();
        let archive = write(&tree).unwrap();
        let expected = concat!(
            "070701",
            "00000001",
            "000081ed",
            "00000000",
            "00000000",
            "00000001",
            "00000000",
            "00000003",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000005",
            "00000000",
            "init\0\0abc\0",
        );
        assert_eq!(&archive[..expected.len()], expected.as_bytes());
        assert_eq!(archive.len() % 512, 0);
    }

    #[test]
    fn every_truncation_before_the_trailer_is_an_error() {
        let archive = write(&sample()).unwrap();
        let trailer = archive
            .windows(TRAILER.len())
            .rposition(|window| window == TRAILER.as_bytes())
            .unwrap();
        for length in 0..=trailer + TRAILER.len() {
            assert!(
                matches!(read(&archive[..length]), Err(CpioError::Truncated(_))),
                "{length} bytes"
            );
        }
    }

    #[test]
    fn foreign_content_is_refused() {
        let mut archive = write(&sample()).unwrap();
        archive.extend_from_slice(b"070701");
        assert!(matches!(read(&archive), Err(CpioError::Trailing(_))));

        let mut device = Vec::new();
        push_entry(&mut device, 1, 0o020_600, 1, "dev/console", &[]).unwrap();
        push_entry(&mut device, 0, 0, 1, TRAILER, &[]).unwrap();
        assert_eq!(
            read(&device),
            Err(CpioError::UnexpectedKind("dev/console".into()))
        );

        let mut signed = write(&sample()).unwrap();
        signed[14] = b'+';
        assert_eq!(read(&signed), Err(CpioError::Damaged(0)));
    }
}
