//! This process's table of mounts (proc_pid_mountinfo(5)), read once when it is first asked for.

use std::cell::OnceCell;
use std::ffi::OsString;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

const TABLE: &str = "/proc/self/mountinfo";

/// The table.
#[derive(Debug, Default)]
pub struct MountTable {
    text: OnceCell<Vec<u8>>,
}

/// A line of the table, as far as it matters.
struct Line<'a> {
    id: &'a [u8],
    device: &'a [u8],
    root: &'a [u8],
    place: &'a [u8],
}

impl MountTable {
    #[cfg(test)]
    fn of(text: &str) -> Self {
        Self {
            text: OnceCell::from(text.as_bytes().to_vec()),
        }
    }

    fn lines(&self) -> io::Result<impl Iterator<Item = Line<'_>>> {
        let text = match self.text.get() {
            Some(text) => text,
            None => {
                let text = std::fs::read(TABLE)?;
                self.text.get_or_init(|| text)
            }
        };
        Ok(text.split(|byte| *byte == b'\n').filter_map(|line| {
            let mut words = line.split(|byte| *byte == b' ');
            let (id, _parent) = (words.next()?, words.next()?);
            Some(Line {
                id,
                device: words.next()?,
                root: words.next()?,
                place: words.next()?,
            })
        }))
    }

    /// Which directory of its file system a mount shows.
    ///
    /// # Errors
    /// `ENOENT` when there is no such mount, and those of reading the table.
    pub(super) fn root_of(&self, mount: u64) -> io::Result<PathBuf> {
        let id = mount.to_string();
        let line = self.lines()?.find(|line| line.id == id.as_bytes());
        line.map(|line| unescape(line.root))
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// A number that tells which mounts are below a directory; 0 for none.
    ///
    /// # Errors
    /// Those of reading the table.
    pub(super) fn below(&self, directory: &Path) -> io::Result<u64> {
        let mut hasher = None;
        for line in self.lines()? {
            // Escaping is rare, and a path that begins otherwise needs no unescaping to be told apart.
            let place = unescape(line.place);
            if place != directory && place.starts_with(directory) {
                let hasher = hasher.get_or_insert_with(DefaultHasher::new);
                (line.id, line.device, line.root, line.place).hash(hasher);
            }
        }
        Ok(hasher.map_or(0, |hasher| hasher.finish() | 1))
    }
}

/// One mount among others.
pub(super) struct Mount {
    pub id: u64,
    pub parent: u64,
    /// Where it is mounted.
    pub place: PathBuf,
}

/// The mounts of a table, in its order.
pub(super) fn tree(text: &[u8]) -> Vec<Mount> {
    let number = |word: &[u8]| std::str::from_utf8(word).ok()?.parse().ok();
    let mount = |line: &[u8]| {
        let mut words = line.split(|byte| *byte == b' ');
        Some(Mount {
            id: number(words.next()?)?,
            parent: number(words.next()?)?,
            place: unescape(words.nth(2)?),
        })
    };
    text.split(|byte| *byte == b'\n').filter_map(mount).collect()
}

/// Space, tab, newline and backslash are octal numbers in the table.
fn unescape(text: &[u8]) -> PathBuf {
    if !text.contains(&b'\\') {
        return std::ffi::OsStr::from_bytes(text).into();
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        let number = (*first == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match number {
            Some(number) => {
                bytes.push(number);
                rest = &tail[3..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
                        30 21 0:40 / /pods/1/a\\040b rw - tmpfs tmpfs rw\n\
                        31 21 0:41 /sub\\134dir /pods/1/sub rw - tmpfs tmpfs rw\n";

    #[test]
    fn roots_and_odd_names_are_read() {
        let table = MountTable::of(TEXT);
        assert_eq!(table.root_of(31).unwrap(), Path::new("/sub\\dir"));
        assert_eq!(table.root_of(21).unwrap(), Path::new("/"));
        assert!(table.root_of(3).is_err());
    }

    #[test]
    fn other_mounts_below_a_directory_are_another_number() {
        let table = MountTable::of(TEXT);
        let all = table.below(Path::new("/pods/1")).unwrap();
        assert_ne!(all, 0);
        assert_eq!(table.below(Path::new("/pods/1/a b")).unwrap(), 0);
        assert_eq!(table.below(Path::new("/pods/1/a")).unwrap(), 0);
        assert_eq!(MountTable::of(TEXT).below(Path::new("/pods/1")).unwrap(), all);
        let fewer = MountTable::of(TEXT.split_inclusive('\n').take(2).collect::<String>().as_str());
        assert_ne!(fewer.below(Path::new("/pods/1")).unwrap(), all);
    }
}
