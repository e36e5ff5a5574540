//! Writes EROFS images. Layout: superblock, inodes with the data of small files and directories right behind them,
//! then the whole blocks of larger files in path order. Owners and times are zero, so equal trees give equal bytes.

use std::collections::BTreeMap;

use super::{
    BLOCK, BLOCK_BITS, DIRENT_SIZE, ErofsError, FEATURE_COMPAT_CHECKSUM, INODE_SIZE, LAYOUT_INLINE,
    LAYOUT_PLAIN, MAGIC, S_IFDIR, S_IFREG, SLOT, SUPERBLOCK_AT, SUPERBLOCK_SIZE, TYPE_DIRECTORY, TYPE_FILE,
    superblock_checksum,
};
use crate::tree::{Content, Tree};

/// One inode on its way into the image.
struct Inode<'a> {
    path: &'a str,
    mode: u16,
    links: u16,
    size: usize,
    /// The file's bytes; a directory's are made once every inode has its place.
    file: Option<&'a [u8]>,
    /// Byte offset of the inode.
    at: usize,
    /// First block of the data, for data that does not follow the inode.
    block: Option<u32>,
}

/// Names of a directory (sorted as EROFS wants them: by bytes) and the inodes they lead to.
type Directories<'a> = BTreeMap<&'a str, BTreeMap<&'a str, usize>>;

/// Writes the image; its length is a whole number of 4 KiB blocks.
///
/// # Errors
/// A tree whose sizes or counts do not fit the format.
pub fn write(tree: &Tree) -> Result<Vec<u8>, ErofsError> {
    let (mut inodes, directories) = collect(tree)?;
    let blocks = place(&mut inodes)?;
    let mut image = vec![0; blocks as usize * BLOCK];
    for number in 0..inodes.len() {
        let made;
        let data = match inodes[number].file {
            Some(bytes) => bytes,
            None => {
                made = directory_bytes(&directories[inodes[number].path], &inodes)?;
                &made
            }
        };
        put_inode(&mut image, &inodes[number], number, data);
    }
    put_superblock(&mut image, &inodes, blocks)?;
    Ok(image)
}

/// All inodes, the root first, and what each directory holds.
fn collect(tree: &Tree) -> Result<(Vec<Inode<'_>>, Directories<'_>), ErofsError> {
    let root = Inode {
        path: "",
        mode: S_IFDIR | 0o755,
        links: 2,
        size: 0,
        file: None,
        at: 0,
        block: None,
    };
    let mut inodes = vec![root];
    let mut directories = Directories::from([("", BTreeMap::from([(".", 0), ("..", 0)]))]);
    for (path, node) in tree.iter() {
        let number = inodes.len();
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        // The tree lists parents before children, so the parent is there.
        let siblings = directories
            .get_mut(parent)
            .ok_or(ErofsError::Damaged("a node without its directory"))?;
        siblings.insert(name, number);
        let parent_number = siblings["."];
        match &node.content {
            Content::Directory => {
                directories.insert(path, BTreeMap::from([(".", number), ("..", parent_number)]));
                let parent = &mut inodes[parent_number];
                parent.links = parent.links.checked_add(1).ok_or(ErofsError::TooMuch)?;
                inodes.push(Inode {
                    path,
                    mode: S_IFDIR | node.mode,
                    links: 2,
                    size: 0,
                    file: None,
                    at: 0,
                    block: None,
                });
            }
            Content::File(bytes) => {
                u32::try_from(bytes.len()).map_err(|_| ErofsError::FileTooLarge(path.to_owned()))?;
                inodes.push(Inode {
                    path,
                    mode: S_IFREG | node.mode,
                    links: 1,
                    size: bytes.len(),
                    file: Some(bytes),
                    at: 0,
                    block: None,
                });
            }
        }
    }
    for inode in &mut inodes {
        if inode.file.is_none() {
            inode.size = directory_blocks(&directories[inode.path]).1;
            u32::try_from(inode.size).map_err(|_| ErofsError::TooMuch)?;
        }
    }
    Ok((inodes, directories))
}

/// Gives every inode its place and every large file its blocks; returns the number of blocks of the image.
fn place(inodes: &mut [Inode<'_>]) -> Result<u32, ErofsError> {
    let mut at = SUPERBLOCK_AT + SUPERBLOCK_SIZE;
    for inode in inodes.iter_mut() {
        // The kernel takes the last name of a directory up to a NUL, so one zero byte follows all inline data.
        let inline = INODE_SIZE + inode.size + 1;
        let needed = if inline <= BLOCK { inline } else { INODE_SIZE };
        // Inline data must not cross a block.
        if at % BLOCK + needed > BLOCK {
            at = at.next_multiple_of(BLOCK);
        }
        inode.at = at;
        at = (at + needed).next_multiple_of(SLOT);
    }
    let mut block = at.div_ceil(BLOCK);
    for inode in inodes
        .iter_mut()
        .filter(|inode| INODE_SIZE + inode.size + 1 > BLOCK)
    {
        inode.block = Some(u32::try_from(block).map_err(|_| ErofsError::TooMuch)?);
        block += inode.size.div_ceil(BLOCK);
    }
    u32::try_from(block).map_err(|_| ErofsError::TooMuch)
}

/// Splits a directory into blocks of names, each block filled as far as entries and names fit. Returns the blocks and
/// the size of the directory in bytes.
fn directory_blocks<'a>(names: &BTreeMap<&'a str, usize>) -> (Vec<Vec<(&'a str, usize)>>, usize) {
    let mut blocks = vec![Vec::new()];
    let mut used = 0;
    for (name, number) in names {
        let needed = DIRENT_SIZE + name.len();
        if used + needed > BLOCK {
            blocks.push(Vec::new());
            used = 0;
        }
        used += needed;
        let last = blocks.len() - 1;
        blocks[last].push((*name, *number));
    }
    let size = (blocks.len() - 1) * BLOCK + used;
    (blocks, size)
}

fn directory_bytes(names: &BTreeMap<&str, usize>, inodes: &[Inode<'_>]) -> Result<Vec<u8>, ErofsError> {
    let (blocks, size) = directory_blocks(names);
    let mut bytes = Vec::with_capacity(size);
    for block in &blocks {
        // Every block but the last is padded to its full size.
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        let mut name_at = DIRENT_SIZE * block.len();
        for (name, number) in block {
            let inode = &inodes[*number];
            let kind = if inode.file.is_some() {
                TYPE_FILE
            } else {
                TYPE_DIRECTORY
            };
            bytes.extend(((inode.at / SLOT) as u64).to_le_bytes());
            bytes.extend(
                u16::try_from(name_at)
                    .map_err(|_| ErofsError::TooMuch)?
                    .to_le_bytes(),
            );
            bytes.extend([kind, 0]);
            name_at += name.len();
        }
        for (name, _) in block {
            bytes.extend(name.as_bytes());
        }
    }
    Ok(bytes)
}

fn put_inode(image: &mut [u8], inode: &Inode<'_>, number: usize, data: &[u8]) {
    let layout = if inode.block.is_some() || inode.size == 0 {
        LAYOUT_PLAIN
    } else {
        LAYOUT_INLINE
    };
    let mut raw = [0u8; INODE_SIZE];
    // Sizes and counts were checked against their fields in `collect` and `place`.
    raw[0..2].copy_from_slice(&(layout << 1).to_le_bytes());
    raw[4..6].copy_from_slice(&inode.mode.to_le_bytes());
    raw[6..8].copy_from_slice(&inode.links.to_le_bytes());
    raw[8..12].copy_from_slice(&(inode.size as u32).to_le_bytes());
    raw[16..20].copy_from_slice(&inode.block.unwrap_or(0).to_le_bytes());
    raw[20..24].copy_from_slice(&(number as u32 + 1).to_le_bytes());
    image[inode.at..inode.at + INODE_SIZE].copy_from_slice(&raw);
    let data_at = inode
        .block
        .map_or(inode.at + INODE_SIZE, |block| block as usize * BLOCK);
    image[data_at..data_at + data.len()].copy_from_slice(data);
}

fn put_superblock(image: &mut [u8], inodes: &[Inode<'_>], blocks: u32) -> Result<(), ErofsError> {
    let root = u16::try_from(inodes[0].at / SLOT).map_err(|_| ErofsError::TooMuch)?;
    let mut raw = [0u8; SUPERBLOCK_SIZE];
    raw[0..4].copy_from_slice(&MAGIC.to_le_bytes());
    raw[8..12].copy_from_slice(&FEATURE_COMPAT_CHECKSUM.to_le_bytes());
    raw[12] = BLOCK_BITS;
    raw[14..16].copy_from_slice(&root.to_le_bytes());
    raw[16..24].copy_from_slice(&(inodes.len() as u64).to_le_bytes());
    raw[36..40].copy_from_slice(&blocks.to_le_bytes());
    raw[64..71].copy_from_slice(b"kata-rs");
    image[SUPERBLOCK_AT..SUPERBLOCK_AT + SUPERBLOCK_SIZE].copy_from_slice(&raw);
    let checksum = superblock_checksum(image).ok_or(ErofsError::Damaged("no first block"))?;
    image[SUPERBLOCK_AT + 4..SUPERBLOCK_AT + 8].copy_from_slice(&checksum.to_le_bytes());
    Ok(())
}
