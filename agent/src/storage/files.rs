//! A directory of small files that holds what the host says: configMaps, secrets, projected volumes.
//!
//! The host's kubelet replaces such a directory's content by renaming one symbolic link (AtomicWriter). The same is
//! done here, through the guest's own kernel, so that whoever watches the directory in a container is told of it.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use protocol::agent::file_tree::File;
use protocol::agent::{FileTree, Owner};
use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, chownat, fchmod,
    fchown, fstat, futimens, mkdirat, openat, openat2, readlinkat, renameat, statat, symlinkat, unlinkat,
    utimensat,
};
use rustix::io::Errno;

/// Deeper trees than any volume has are refused.
const MAX_DEPTH: usize = 16;
/// What a new file or link is called until it takes its name: kubelet's word for it.
const TEMPORARY: &str = "_tmp";

/// Why a directory could not be brought up to date.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// An entry that no directory has.
    #[error("{path:?} cannot be in a volume: {why}")]
    Entry { path: PathBuf, why: &'static str },
    /// The guest's kernel refused.
    #[error("cannot {what} {path:?}: {source}")]
    Kernel {
        what: &'static str,
        path: PathBuf,
        source: Errno,
    },
}

fn kernel(what: &'static str, path: &Path) -> impl Fn(Errno) -> FilesError {
    let path = path.to_owned();
    move |source| FilesError::Kernel {
        what,
        path: path.clone(),
        source,
    }
}

/// An entry of the tree, checked.
struct Entry<'a> {
    path: &'a Path,
    kind: FileType,
    file: &'a File,
}

impl<'a> Entry<'a> {
    fn new(file: &'a File) -> Result<Self, FilesError> {
        let path = Path::new(OsStr::from_bytes(&file.path));
        let refuse = |why| FilesError::Entry {
            path: path.to_owned(),
            why,
        };
        let plain = |part: Component<'_>| matches!(part, Component::Normal(_));
        let again: PathBuf = path.components().collect();
        if file.path.is_empty() || !path.components().all(plain) || again.as_os_str() != path.as_os_str() {
            return Err(refuse("it is not a path below the volume"));
        }
        if path.components().count() > MAX_DEPTH {
            return Err(refuse("it is too deep"));
        }
        let kind = FileType::from_raw_mode(file.owner.mode);
        if !matches!(
            kind,
            FileType::RegularFile | FileType::Directory | FileType::Symlink
        ) {
            return Err(refuse("it is neither a file nor a directory nor a symbolic link"));
        }
        Ok(Self { path, kind, file })
    }

    fn name(&self) -> &'a OsStr {
        self.path.file_name().unwrap_or_default()
    }

    fn times(&self) -> Timestamps {
        let time = Timespec {
            tv_sec: self.file.modified_ns.div_euclid(1_000_000_000),
            tv_nsec: self.file.modified_ns.rem_euclid(1_000_000_000),
        };
        Timestamps {
            last_access: time,
            last_modification: time,
        }
    }

    /// Whether `..data` and its like: they lead to the content, other links lead to them.
    fn is_internal(&self) -> bool {
        self.file.path.starts_with(b"..")
    }
}

/// Makes the directory `root` hold what the tree holds, and nothing else.
///
/// # Errors
/// [`FilesError`]; what was done until then stays.
pub fn bring_up_to_date(root: BorrowedFd<'_>, tree: &FileTree) -> Result<(), FilesError> {
    let entries: Vec<Entry<'_>> = tree.files.iter().map(Entry::new).collect::<Result<_, _>>()?;
    let mut present = BTreeMap::new();
    list(root, Path::new(""), 0, &mut present)?;
    // What stands in another kind's place goes first.
    for entry in &entries {
        if present.get(entry.path).is_some_and(|kind| *kind != entry.kind) {
            remove(root, entry.path, &mut present)?;
        }
    }
    let of_kind = |kind| entries.iter().filter(move |entry| entry.kind == kind);
    for entry in of_kind(FileType::Directory).filter(|entry| !present.contains_key(entry.path)) {
        let parent = parent(root, entry.path)?;
        mkdirat(&parent, entry.name(), Mode::RWXU).map_err(kernel("make", entry.path))?;
    }
    for entry in of_kind(FileType::RegularFile) {
        put_file(root, entry, present.contains_key(entry.path))?;
    }
    for internal in [true, false] {
        for entry in of_kind(FileType::Symlink).filter(|entry| entry.is_internal() == internal) {
            put_link(root, entry, present.contains_key(entry.path))?;
        }
    }
    let wanted: BTreeSet<&Path> = entries.iter().map(|entry| entry.path).collect();
    let stale: Vec<PathBuf> = present
        .keys()
        .filter(|path| !wanted.contains(path.as_path()))
        .cloned()
        .collect();
    for path in stale {
        remove(root, &path, &mut present)?;
    }
    // Last, because what is put into a directory changes its times; deepest first, because a mode may close it.
    for entry in of_kind(FileType::Directory).collect::<Vec<_>>().into_iter().rev() {
        let directory = open_directory(root, entry.path)?;
        dress(&directory, &entry.file.owner, entry.path)?;
        futimens(&directory, &entry.times()).map_err(kernel("set the times of", entry.path))?;
    }
    let directory = open_directory(root, Path::new("."))?;
    dress(&directory, &tree.root, Path::new("."))
}

/// What is below `path`, with its kind.
fn list(
    root: BorrowedFd<'_>,
    path: &Path,
    depth: usize,
    found: &mut BTreeMap<PathBuf, FileType>,
) -> Result<(), FilesError> {
    let here = if depth == 0 { Path::new(".") } else { path };
    let directory = open_directory(root, here)?;
    for entry in Dir::read_from(&directory).map_err(kernel("read", here))? {
        let entry = entry.map_err(kernel("read", here))?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name == "." || name == ".." {
            continue;
        }
        let below = path.join(name);
        let stat = statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW).map_err(kernel("look at", &below))?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        found.insert(below.clone(), kind);
        if kind == FileType::Directory && depth < MAX_DEPTH {
            list(root, &below, depth + 1, found)?;
        }
    }
    Ok(())
}

/// Removes a path with all below it, from the file system and from what is known of it.
fn remove(
    root: BorrowedFd<'_>,
    path: &Path,
    present: &mut BTreeMap<PathBuf, FileType>,
) -> Result<(), FilesError> {
    let all: Vec<(PathBuf, FileType)> = present
        .iter()
        .filter(|(found, _)| found.starts_with(path))
        .map(|(found, kind)| (found.clone(), *kind))
        .collect();
    // In the order of a map a directory comes before what is in it.
    for (found, kind) in all.into_iter().rev() {
        let flags = if kind == FileType::Directory {
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        };
        let directory = parent(root, &found)?;
        unlinkat(&directory, found.file_name().unwrap_or_default(), flags)
            .map_err(kernel("remove", &found))?;
        present.remove(&found);
    }
    Ok(())
}

fn put_file(root: BorrowedFd<'_>, entry: &Entry<'_>, exists: bool) -> Result<(), FilesError> {
    let directory = parent(root, entry.path)?;
    if exists && is_same(&directory, entry)? {
        return Ok(());
    }
    let name = if exists {
        temporary(entry)
    } else {
        entry.name().into()
    };
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = openat(&directory, name.as_path(), flags, Mode::RUSR | Mode::WUSR)
        .map_err(kernel("make", entry.path))?;
    let mut rest = entry.file.content.as_slice();
    while !rest.is_empty() {
        let written = rustix::io::write(&file, rest).map_err(kernel("write", entry.path))?;
        rest = &rest[written..];
    }
    dress(&file, &entry.file.owner, entry.path)?;
    futimens(&file, &entry.times()).map_err(kernel("set the times of", entry.path))?;
    if exists {
        renameat(&directory, name.as_path(), &directory, entry.name())
            .map_err(kernel("replace", entry.path))?;
    }
    Ok(())
}

fn is_same(directory: &OwnedFd, entry: &Entry<'_>) -> Result<bool, FilesError> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = openat(directory, entry.name(), flags, Mode::empty()).map_err(kernel("open", entry.path))?;
    let stat = fstat(&file).map_err(kernel("look at", entry.path))?;
    let owner = &entry.file.owner;
    if (stat.st_uid, stat.st_gid, stat.st_mode & 0o7777) != (owner.uid, owner.gid, owner.mode & 0o7777)
        || usize::try_from(stat.st_size) != Ok(entry.file.content.len())
    {
        return Ok(false);
    }
    let mut found = Vec::with_capacity(entry.file.content.len());
    let mut file = std::fs::File::from(file);
    match std::io::Read::read_to_end(&mut file, &mut found) {
        Ok(_) => Ok(found == entry.file.content),
        Err(_) => Ok(false),
    }
}

fn put_link(root: BorrowedFd<'_>, entry: &Entry<'_>, exists: bool) -> Result<(), FilesError> {
    let directory = parent(root, entry.path)?;
    let target = OsStr::from_bytes(&entry.file.content);
    if exists
        && readlinkat(&directory, entry.name(), Vec::new())
            .is_ok_and(|found| found.to_bytes() == entry.file.content)
    {
        return Ok(());
    }
    let name = if exists {
        temporary(entry)
    } else {
        entry.name().into()
    };
    symlinkat(target, &directory, name.as_path()).map_err(kernel("make", entry.path))?;
    let owner = &entry.file.owner;
    let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    chownat(&directory, name.as_path(), Some(uid), Some(gid), flags)
        .map_err(kernel("set the owner of", entry.path))?;
    utimensat(&directory, name.as_path(), &entry.times(), flags)
        .map_err(kernel("set the times of", entry.path))?;
    if exists {
        renameat(&directory, name.as_path(), &directory, entry.name())
            .map_err(kernel("replace", entry.path))?;
    }
    Ok(())
}

fn temporary(entry: &Entry<'_>) -> PathBuf {
    let mut name = entry.name().to_os_string();
    name.push(TEMPORARY);
    name.into()
}

/// Gives a file or directory its owner and mode.
fn dress(file: &OwnedFd, owner: &Owner, path: &Path) -> Result<(), FilesError> {
    let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
    fchown(file, Some(uid), Some(gid)).map_err(kernel("set the owner of", path))?;
    // After the owner, whose change takes setuid and setgid away.
    fchmod(file, Mode::from_raw_mode(owner.mode & 0o7777)).map_err(kernel("set the mode of", path))
}

fn parent(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, FilesError> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => open_directory(root, parent),
        _ => open_directory(root, Path::new(".")),
    }
}

/// Never by way of a link: a container that has found a way to write must not lead the agent elsewhere.
fn open_directory(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, FilesError> {
    openat2(
        root.as_fd(),
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
    )
    .map_err(kernel("open", path))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    fn file(path: &str, mode: u32, content: &str) -> File {
        let stat = std::fs::metadata("/proc/self").unwrap();
        File {
            path: path.into(),
            owner: Some(Owner {
                uid: stat.uid(),
                gid: stat.gid(),
                mode,
                ..Default::default()
            })
            .into(),
            modified_ns: 1_000_000_000,
            content: content.into(),
            ..Default::default()
        }
    }

    fn tree(files: Vec<File>) -> FileTree {
        FileTree {
            version: 1,
            root: file("", 0o755, "").owner,
            files,
            ..Default::default()
        }
    }

    /// What kubelet makes of one key.
    fn written(revision: &str, text: &str) -> FileTree {
        tree(vec![
            file(revision, 0o40755, ""),
            file(&format!("{revision}/key"), 0o100_640, text),
            file("..data", 0o120_777, revision),
            file("key", 0o120_777, "..data/key"),
        ])
    }

    fn directory() -> (tempfile::TempDir, OwnedFd) {
        let directory = tempfile::tempdir().unwrap();
        let fd = rustix::fs::open(directory.path(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        (directory, fd)
    }

    fn names(directory: &tempfile::TempDir) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn an_update_swaps_the_link_and_removes_the_old_content() {
        use rustix::fs::inotify;
        let (directory, fd) = directory();
        bring_up_to_date(fd.as_fd(), &written("..1", "one")).unwrap();
        assert_eq!(
            std::fs::read_to_string(directory.path().join("key")).unwrap(),
            "one"
        );
        let stat = std::fs::metadata(directory.path().join("key")).unwrap();
        assert_eq!((stat.mode() & 0o7777, stat.mtime()), (0o640, 1));

        let watch = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC).unwrap();
        inotify::add_watch(&watch, directory.path(), inotify::WatchFlags::MOVED_TO).unwrap();
        bring_up_to_date(fd.as_fd(), &written("..2", "two")).unwrap();
        assert_eq!(
            std::fs::read_to_string(directory.path().join("key")).unwrap(),
            "two"
        );
        assert_eq!(names(&directory), ["..2", "..data", "key"]);
        let mut buffer = [std::mem::MaybeUninit::uninit(); 1024];
        let mut events = inotify::Reader::new(&watch, &mut buffer);
        let event = events.next().unwrap();
        assert_eq!(event.file_name(), Some(c"..data"));

        // The same again is no event.
        bring_up_to_date(fd.as_fd(), &written("..2", "two")).unwrap();
        assert_eq!(events.next().map(drop), Err(Errno::AGAIN));
    }

    #[test]
    fn plain_files_are_replaced_and_kinds_may_change() {
        let (directory, fd) = directory();
        let first = tree(vec![
            file("a", 0o100_644, "a"),
            file("b", 0o40755, ""),
            file("b/c", 0o100_644, "c"),
        ]);
        bring_up_to_date(fd.as_fd(), &first).unwrap();
        let second = tree(vec![file("a", 0o40755, ""), file("b", 0o100_600, "b")]);
        bring_up_to_date(fd.as_fd(), &second).unwrap();
        assert_eq!(names(&directory), ["a", "b"]);
        assert_eq!(std::fs::read_to_string(directory.path().join("b")).unwrap(), "b");
        bring_up_to_date(fd.as_fd(), &tree(vec![file("b", 0o100_600, "other")])).unwrap();
        assert_eq!(names(&directory), ["b"]);
        assert_eq!(
            std::fs::read_to_string(directory.path().join("b")).unwrap(),
            "other"
        );
    }

    #[test]
    fn nothing_is_written_outside_of_the_directory() {
        let (outside, _) = directory();
        let (directory, fd) = directory();
        for path in ["../x", "/x", "a/../x", "", ".", "a//b", "a/"] {
            let error = bring_up_to_date(fd.as_fd(), &tree(vec![file(path, 0o100_644, "")])).unwrap_err();
            assert!(matches!(error, FilesError::Entry { .. }), "{path}: {error}");
        }
        let fifo = tree(vec![file("fifo", 0o010_644, "")]);
        assert!(matches!(
            bring_up_to_date(fd.as_fd(), &fifo),
            Err(FilesError::Entry { .. })
        ));
        // A link that leads out is content, not a way.
        let out = outside.path().to_str().unwrap();
        let through = tree(vec![file("out", 0o120_777, out), file("out/x", 0o100_644, "")]);
        bring_up_to_date(fd.as_fd(), &tree(vec![file("out", 0o120_777, out)])).unwrap();
        assert!(bring_up_to_date(fd.as_fd(), &through).is_err());
        assert!(names(&outside).is_empty());
        assert_eq!(names(&directory), ["out"]);
    }
}
