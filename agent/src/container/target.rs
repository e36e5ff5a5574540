//! Finds, and where missing makes, the place of a mount inside a root directory, without ever leaving it
//! (openat2(2), RESOLVE_IN_ROOT).
//!
//! Allocates nothing: it runs between clone3 and execve. A symbolic link that leads nowhere is followed and its
//! destination made, as images ship such links for /etc/resolv.conf.

use std::ffi::CStr;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, RawMode, ResolveFlags, mkdirat, openat, openat2, readlinkat_raw};
use rustix::io::Errno;

/// Longest path, with its final zero (limits.h, PATH_MAX).
const PATH_MAX: usize = 4096;
/// As many symbolic links as the kernel follows in one path.
const MAX_LINKS: usize = 40;

/// What to make at a path that does not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory, 0755.
    Directory,
    /// An empty file, 0644.
    File,
}

/// Opens `path` (O_PATH) below `root`, making it and the directories that lead to it when they are missing.
///
/// # Errors
/// ENAMETOOLONG, ELOOP, and those of openat2(2), mkdirat(2), readlinkat(2).
pub fn open_or_create(root: BorrowedFd<'_>, path: &CStr, kind: Kind) -> Result<OwnedFd, Errno> {
    match open(root, path) {
        Err(Errno::NOENT) => {}
        result => return result,
    }
    let mut walk = Path::new(path.to_bytes())?;
    for _ in 0..MAX_LINKS {
        match make(root, &mut walk, kind)? {
            Step::Made => return open(root, walk.whole()),
            Step::Link => {}
        }
    }
    Err(Errno::LOOP)
}

/// Opens `path` (O_PATH) below `root`.
///
/// # Errors
/// Those of openat2(2).
pub fn open(root: BorrowedFd<'_>, path: &CStr) -> Result<OwnedFd, Errno> {
    // An empty path and "/" both mean the root itself.
    let path = if path.is_empty() { c"/" } else { path };
    loop {
        match openat2(
            root,
            path,
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
        ) {
            // The kernel gives up when the tree is renamed under it, and asks to try again (openat2(2)).
            Err(Errno::AGAIN) => {}
            result => return result,
        }
    }
}

enum Step {
    Made,
    /// A link that leads nowhere was put into the path.
    Link,
}

/// Makes the missing components of a path in order.
fn make(root: BorrowedFd<'_>, walk: &mut Path, kind: Kind) -> Result<Step, Errno> {
    let mut start = 0;
    while let Some((name, end)) = walk.component(start) {
        match open(root, walk.prefix(end)) {
            Ok(_) => {}
            Err(Errno::NOENT) => {
                let parent = open(root, walk.prefix(name))?;
                let last = walk.component(end).is_none();
                let result = if last && kind == Kind::File {
                    openat(
                        &parent,
                        walk.name(name, end),
                        OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW,
                        Mode::from_raw_mode(0o644),
                    )
                    .map(drop)
                } else {
                    mkdirat(
                        &parent,
                        walk.name(name, end),
                        Mode::from_raw_mode(0o755 as RawMode),
                    )
                };
                match result {
                    Ok(()) => {}
                    Err(Errno::EXIST) => {
                        let mut buffer = [0; PATH_MAX];
                        let length = readlinkat_raw(&parent, walk.name(name, end), &mut buffer[..])?;
                        walk.substitute(name, end, &buffer[..length])?;
                        return Ok(Step::Link);
                    }
                    Err(errno) => return Err(errno),
                }
            }
            Err(errno) => return Err(errno),
        }
        start = end;
    }
    Ok(Step::Made)
}

/// A path in a fixed buffer that is always followed by a zero.
struct Path {
    buffer: [u8; PATH_MAX],
    length: usize,
    /// A copy of the part that was asked for, with its own final zero.
    part: [u8; PATH_MAX],
}

impl Path {
    fn new(path: &[u8]) -> Result<Self, Errno> {
        let mut this = Self {
            buffer: [0; PATH_MAX],
            length: 0,
            part: [0; PATH_MAX],
        };
        this.append(path)?;
        Ok(this)
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), Errno> {
        let end = self.length + bytes.len();
        if end >= PATH_MAX {
            return Err(Errno::NAMETOOLONG);
        }
        self.buffer[self.length..end].copy_from_slice(bytes);
        self.buffer[end] = 0;
        self.length = end;
        Ok(())
    }

    /// Where the first component from `start` on begins and ends.
    fn component(&self, start: usize) -> Option<(usize, usize)> {
        let rest = &self.buffer[start..self.length];
        let begin = start + rest.iter().position(|byte| *byte != b'/')?;
        let rest = &self.buffer[begin..self.length];
        let end = begin + rest.iter().position(|byte| *byte == b'/').unwrap_or(rest.len());
        Some((begin, end))
    }

    fn whole(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.buffer).unwrap_or(c"")
    }

    fn prefix(&mut self, end: usize) -> &CStr {
        self.name(0, end)
    }

    fn name(&mut self, begin: usize, end: usize) -> &CStr {
        let length = end - begin;
        self.part[..length].copy_from_slice(&self.buffer[begin..end]);
        self.part[length] = 0;
        CStr::from_bytes_until_nul(&self.part).unwrap_or(c"")
    }

    /// Puts the content of a link where its name stands.
    fn substitute(&mut self, begin: usize, end: usize, link: &[u8]) -> Result<(), Errno> {
        let mut new = Self::new(&[])?;
        if link.first() != Some(&b'/') {
            new.append(&self.buffer[..begin])?;
        }
        new.append(link)?;
        new.append(&self.buffer[end..self.length])?;
        self.buffer = new.buffer;
        self.length = new.length;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::fs::symlink;

    use super::*;

    fn root() -> (tempfile::TempDir, OwnedFd) {
        let directory = tempfile::tempdir().unwrap();
        let fd = rustix::fs::open(directory.path(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        (directory, fd)
    }

    #[test]
    fn directories_and_files_are_made_with_their_parents() {
        let (directory, fd) = root();
        open_or_create(fd.as_fd(), c"/a/b//c", Kind::Directory).unwrap();
        assert!(directory.path().join("a/b/c").is_dir());
        open_or_create(fd.as_fd(), c"/a/b/d/file", Kind::File).unwrap();
        assert!(directory.path().join("a/b/d/file").is_file());
        open_or_create(fd.as_fd(), c"/", Kind::Directory).unwrap();
        open_or_create(fd.as_fd(), c"", Kind::Directory).unwrap();
    }

    #[test]
    fn links_never_lead_out_of_the_root() {
        let (directory, fd) = root();
        symlink("../../../..", directory.path().join("up")).unwrap();
        symlink("/etc", directory.path().join("absolute")).unwrap();
        open_or_create(fd.as_fd(), c"/up/made", Kind::Directory).unwrap();
        assert!(directory.path().join("made").is_dir());
        open_or_create(fd.as_fd(), c"/absolute/kata-rs-test", Kind::File).unwrap();
        assert!(directory.path().join("etc/kata-rs-test").is_file());
    }

    #[test]
    fn the_destination_of_a_dangling_link_is_made() {
        let (directory, fd) = root();
        std::fs::create_dir(directory.path().join("etc")).unwrap();
        symlink(
            "../run/resolve/stub.conf",
            directory.path().join("etc/resolv.conf"),
        )
        .unwrap();
        open_or_create(fd.as_fd(), c"/etc/resolv.conf", Kind::File).unwrap();
        assert!(directory.path().join("run/resolve/stub.conf").is_file());
    }

    #[test]
    fn a_link_to_itself_ends() {
        let (directory, fd) = root();
        symlink("loop", directory.path().join("loop")).unwrap();
        assert_eq!(
            open_or_create(fd.as_fd(), c"/loop/x", Kind::File).unwrap_err(),
            Errno::LOOP
        );
        let long = std::ffi::CString::new(vec![b'x'; 5000]).unwrap();
        assert_eq!(
            open_or_create(fd.as_fd(), &long, Kind::File).unwrap_err(),
            Errno::NAMETOOLONG
        );
    }
}
