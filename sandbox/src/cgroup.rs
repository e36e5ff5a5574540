//! The cgroup on the host that holds a sandbox's VMM: so that what a pod uses is counted, and can be limited, where
//! the caller wants it. Containers' own limits hold in the guest; none is set here.
//!
//! Only cgroup v2 mounted at /sys/fs/cgroup is supported (Documentation/admin-guide/cgroup-v2.rst).

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, XattrFlags};
use rustix::io::Errno;

use crate::error::{ErrorKind, kind_of_io};

/// Where the hierarchy is mounted.
const ROOT: &str = "/sys/fs/cgroup";
/// statfs(2)'s `f_type` of cgroup2 (linux/magic.h).
const CGROUP2: u64 = 0x6367_7270;
/// Marks the cgroups that were made here: only those are removed, and only in those is anything killed.
const MARK: &str = "trusted.kata-rs";
/// How long killed processes may take to be gone. Freeing a large guest's memory takes a while.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a parent may be removed by somebody else while a cgroup is being made in it.
const ATTEMPTS: usize = 8;

/// Why a cgroup cannot be made, joined or removed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The specification's path is malformed.
    #[error(
        "linux.cgroupsPath is {0:?}: give a path without `..`, or `slice:prefix:name` with a slice that ends in .slice"
    )]
    Path(PathBuf),
    /// The kernel refused.
    #[error("the cgroup {path} cannot be {what}: {cause}")]
    System {
        /// Which.
        path: PathBuf,
        /// What was to be done with it.
        what: &'static str,
        /// Why not.
        #[source]
        cause: io::Error,
    },
}

impl CgroupError {
    /// What kind of failure it is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Path(_) => ErrorKind::InvalidArgument,
            Self::System { cause, .. } => kind_of_io(cause),
        }
    }
}

/// A cgroup on the host.
#[derive(Debug)]
pub struct HostCgroup {
    directory: OwnedFd,
    path: PathBuf,
    root: PathBuf,
    /// Whether it was made here.
    ours: bool,
}

impl HostCgroup {
    /// Makes the cgroup that `linux.cgroupsPath` names, or opens it when it exists. `None` when no cgroup is asked for,
    /// or when this host has no cgroup v2, which is logged.
    ///
    /// # Errors
    /// [`CgroupError`].
    pub fn create(cgroups_path: &Path) -> Result<Option<Self>, CgroupError> {
        match place(cgroups_path)? {
            Some(place) if is_cgroup2(Path::new(ROOT)) => Self::create_in(Path::new(ROOT), &place).map(Some),
            Some(_) => {
                tracing::warn!(
                    "cgroup v2 is not mounted at {ROOT}: the VM runs in the cgroup of this process (boot the host with \
                     systemd.unified_cgroup_hierarchy=1)"
                );
                Ok(None)
            }
            None => Ok(None),
        }
    }

    /// Opens the cgroup that `linux.cgroupsPath` names when it exists and was made by [`Self::create`]: what a
    /// sandbox that was killed has left.
    ///
    /// # Errors
    /// [`CgroupError`].
    pub fn left_over(cgroups_path: &Path) -> Result<Option<Self>, CgroupError> {
        match place(cgroups_path)? {
            Some(place) if is_cgroup2(Path::new(ROOT)) => Self::left_over_in(Path::new(ROOT), &place),
            _ => Ok(None),
        }
    }

    /// For clone3(2) with `CLONE_INTO_CGROUP`: the cheapest way in. Moving a process later ([`Self::add`]) waits until
    /// every process of the host has passed through the kernel, up to some 20 ms without the mount option
    /// `favordynmods`; before Linux 6.13 `KVM_CREATE_VM` pays the same, once more, anywhere but in the root cgroup.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves a process, with all its threads, into it. May take milliseconds: see [`Self::fd`].
    ///
    /// # Errors
    /// [`CgroupError::System`].
    pub fn add(&self, pid: u32) -> Result<(), CgroupError> {
        self.write("cgroup.procs", &pid.to_string())
            .map_err(|cause| self.failed("joined", cause))
    }

    /// Kills what is left in it and removes it, with those above it that were made here and are empty. One that was
    /// there before stays as it is. Blocks until the killed processes are gone.
    ///
    /// # Errors
    /// [`CgroupError::System`].
    pub fn remove(self) -> Result<(), CgroupError> {
        if !self.ours {
            return Ok(());
        }
        let deadline = Instant::now() + KILL_TIMEOUT;
        self.kill(deadline)
            .map_err(|cause| self.failed("emptied", cause))?;
        match remove_directory(&self.path) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(self.failed("removed", errno.into())),
        }
        let parents = self
            .path
            .ancestors()
            .skip(1)
            .take_while(|path| **path != self.root);
        for parent in parents {
            let Ok(directory) = open(CWD, parent.as_os_str()) else {
                continue;
            };
            if !is_marked(&directory) || remove_directory(parent).is_err() {
                break;
            }
        }
        Ok(())
    }

    fn create_in(root: &Path, place: &Path) -> Result<Self, CgroupError> {
        let mut attempts = 0..ATTEMPTS;
        loop {
            match make(root, place) {
                // The sandbox that had made a parent has just removed it.
                Err(Errno::NOENT) if attempts.next().is_some() => {}
                Ok((directory, ours)) => {
                    return Ok(Self {
                        directory,
                        path: root.join(place),
                        root: root.to_owned(),
                        ours,
                    });
                }
                Err(errno) => {
                    return Err(CgroupError::System {
                        path: root.join(place),
                        what: "made",
                        cause: errno.into(),
                    });
                }
            }
        }
    }

    fn left_over_in(root: &Path, place: &Path) -> Result<Option<Self>, CgroupError> {
        let path = root.join(place);
        match open(CWD, path.as_os_str()) {
            Ok(directory) if is_marked(&directory) => Ok(Some(Self {
                directory,
                path,
                root: root.to_owned(),
                ours: true,
            })),
            Ok(_) | Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(CgroupError::System {
                path,
                what: "opened",
                cause: errno.into(),
            }),
        }
    }

    /// Kills everything in it and waits until it is empty.
    fn kill(&self, deadline: Instant) -> io::Result<()> {
        let events = self.open_file("cgroup.events", OFlags::RDONLY)?;
        while is_populated(&events)? {
            // Again after each event: one that was just being made may have got away.
            self.write("cgroup.kill", "1")?;
            if !is_populated(&events)? {
                break;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "its processes do not die",
                ));
            }
            let timeout = left.try_into().map_err(io::Error::other)?;
            // A change of cgroup.events is announced as exceptional data.
            rustix::event::poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&timeout))?;
        }
        Ok(())
    }

    fn open_file(&self, name: &str, access: OFlags) -> io::Result<OwnedFd> {
        Ok(rustix::fs::openat(
            &self.directory,
            name,
            access | OFlags::CLOEXEC,
            Mode::empty(),
        )?)
    }

    /// Reads one of its files.
    ///
    /// # Errors
    /// Those of open(2) and read(2).
    pub fn read(&self, name: &str) -> io::Result<String> {
        let mut text = String::new();
        let file = self.open_file(name, OFlags::RDONLY)?;
        io::Read::read_to_string(&mut std::fs::File::from(file), &mut text)?;
        Ok(text)
    }

    fn write(&self, name: &str, text: &str) -> io::Result<()> {
        let file = self.open_file(name, OFlags::WRONLY)?;
        rustix::io::write(file, text.as_bytes())?;
        Ok(())
    }

    fn failed(&self, what: &'static str, cause: io::Error) -> CgroupError {
        CgroupError::System {
            path: self.path.clone(),
            what,
            cause,
        }
    }
}

/// Makes a cgroup and those above it. Also returns whether it was made here, now or earlier.
fn make(root: &Path, place: &Path) -> Result<(OwnedFd, bool), Errno> {
    let mut directory = open(CWD, root.as_os_str())?;
    let mut ours = false;
    for name in place.iter() {
        enable_controllers(&directory);
        let made = match rustix::fs::mkdirat(&directory, name, Mode::from_raw_mode(0o755)) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(errno) => return Err(errno),
        };
        directory = open(directory.as_fd(), name)?;
        if made {
            rustix::fs::fsetxattr(&directory, MARK, b"1", XattrFlags::empty())?;
        }
        ours = made || is_marked(&directory);
    }
    Ok((directory, ours))
}

/// Lets what is in a cgroup be counted and limited by all that it can, as runc does on its way to a container's cgroup:
/// nobody else does it for one that is made here. Without a controller the rest works all the same.
fn enable_controllers(directory: &OwnedFd) {
    let read = |name: &str| -> Result<String, Errno> {
        let file = rustix::fs::openat(directory, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let mut text = [0; 256];
        let length = rustix::io::read(&file, &mut text)?;
        Ok(String::from_utf8_lossy(&text[..length]).into_owned())
    };
    let write = |text: &str| -> Result<(), Errno> {
        let name = "cgroup.subtree_control";
        let file = rustix::fs::openat(directory, name, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        rustix::io::write(&file, text.as_bytes()).map(drop)
    };
    let (Ok(there), Ok(enabled)) = (read("cgroup.controllers"), read("cgroup.subtree_control")) else {
        return;
    };
    let missing = missing_controllers(&there, &enabled);
    if missing.is_empty() || write(&missing.join(" ")).is_ok() {
        return;
    }
    // One that is refused takes the others with it.
    for controller in missing {
        if let Err(error) = write(&controller) {
            tracing::debug!(controller, %error, "a cgroup controller cannot be enabled");
        }
    }
}

/// What to write to `cgroup.subtree_control`.
fn missing_controllers(there: &str, enabled: &str) -> Vec<String> {
    there
        .split_whitespace()
        .filter(|name| !enabled.split_whitespace().any(|enabled| enabled == *name))
        .map(|name| format!("+{name}"))
        .collect()
}

fn open(at: BorrowedFd<'_>, name: &OsStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(at, name, flags, Mode::empty())
}

fn is_marked(directory: &OwnedFd) -> bool {
    rustix::fs::fgetxattr(directory, MARK, &mut [0; 1]).is_ok()
}

fn remove_directory(path: &Path) -> Result<(), Errno> {
    rustix::fs::unlinkat(CWD, path, AtFlags::REMOVEDIR)
}

fn is_populated(events: &OwnedFd) -> io::Result<bool> {
    let mut text = [0; 128];
    let length = rustix::io::pread(events, &mut text, 0)?;
    Ok(text[..length]
        .split(|byte| *byte == b'\n')
        .any(|line| line == b"populated 1"))
}

fn is_cgroup2(path: &Path) -> bool {
    #[allow(clippy::cast_sign_loss, reason = "f_type is a bit pattern")]
    rustix::fs::statfs(path).is_ok_and(|fs| fs.f_type as u64 == CGROUP2)
}

/// Where a `linux.cgroupsPath` leads, below the hierarchy's root. `None` for no path and for the root itself.
fn place(cgroups_path: &Path) -> Result<Option<PathBuf>, CgroupError> {
    let refuse = || CgroupError::Path(cgroups_path.to_owned());
    let text = cgroups_path.to_str().ok_or_else(refuse)?;
    let path = match text.split(':').collect::<Vec<_>>()[..] {
        [slice, prefix, name] if !text.starts_with('/') => unit(slice, prefix, name).ok_or_else(refuse)?,
        _ => PathBuf::from(text),
    };
    let mut place = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => place.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return Err(refuse()),
        }
    }
    Ok((!place.as_os_str().is_empty()).then_some(place))
}

/// The directory of a systemd unit: `a-b.slice` lies in `a.slice` (systemd.slice(5)).
fn unit(slice: &str, prefix: &str, name: &str) -> Option<PathBuf> {
    let mut path = PathBuf::new();
    let slice = if slice.is_empty() { "system.slice" } else { slice };
    let stem = slice.strip_suffix(".slice")?;
    if stem != "-" {
        let mut parent = String::new();
        for part in stem.split('-') {
            if part.is_empty() || part.contains('/') {
                return None;
            }
            parent = if parent.is_empty() {
                part.to_owned()
            } else {
                format!("{parent}-{part}")
            };
            path.push(format!("{parent}.slice"));
        }
    }
    if name.is_empty() || name.contains('/') || prefix.contains('/') {
        return None;
    }
    path.push(match (prefix, name) {
        (_, name) if name.ends_with(".slice") => name.to_owned(),
        ("", name) => format!("{name}.scope"),
        (prefix, name) => format!("{prefix}-{name}.scope"),
    });
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::process::{Child, Command};

    /// A cgroup of somebody else's, for one test.
    struct Foreign {
        root: PathBuf,
        name: String,
    }

    impl Foreign {
        fn new(test: &str) -> Option<Self> {
            let name = format!("kata-rs-test-{test}-{}", std::process::id());
            let root = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
                .into_iter()
                .map(PathBuf::from)
                .find(|path| is_cgroup2(path) && fs::create_dir(path.join(&name)).is_ok());
            if root.is_none() {
                eprintln!("skipped: there is no cgroup v2 here that may be written");
            }
            root.map(|root| Self { root, name })
        }

        fn place(&self, below: &str) -> PathBuf {
            Path::new(&self.name).join(below)
        }

        fn path(&self, below: &str) -> PathBuf {
            self.root.join(self.place(below))
        }

        fn create(&self, below: &str) -> Result<HostCgroup, CgroupError> {
            HostCgroup::create_in(&self.root, &self.place(below))
        }

        fn left_over(&self, below: &str) -> Option<HostCgroup> {
            HostCgroup::left_over_in(&self.root, &self.place(below)).unwrap()
        }
    }

    impl Drop for Foreign {
        fn drop(&mut self) {
            let _ = fs::remove_dir(self.path(""));
        }
    }

    fn sleeper() -> Child {
        Command::new("sleep").arg("1000").spawn().unwrap()
    }

    fn is_gone(path: &Path) -> bool {
        !path.exists()
    }

    #[test]
    fn controllers_that_are_there_and_not_enabled_are_missing() {
        assert_eq!(
            missing_controllers("cpu memory pids\n", "cpu\n"),
            ["+memory", "+pids"]
        );
        assert!(missing_controllers("cpu\n", "cpu\n").is_empty());
        assert!(missing_controllers("", "").is_empty());
    }

    #[test]
    fn paths_are_read_in_both_forms() {
        let of = |path: &str| {
            place(Path::new(path))
                .unwrap()
                .map(|path| path.to_str().unwrap().to_owned())
        };
        let some = |path: &str| Some(path.to_owned());
        assert_eq!(of("/default/c1"), some("default/c1"));
        assert_eq!(of("default//c1/."), some("default/c1"));
        assert_eq!(of("/a:b:c"), some("a:b:c"));
        assert_eq!(of("system.slice:docker:c1"), some("system.slice/docker-c1.scope"));
        assert_eq!(
            of("kubepods-burstable-pod1.slice:cri-containerd:c1"),
            some(
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-c1.scope"
            )
        );
        assert_eq!(of(":x:c1"), some("system.slice/x-c1.scope"));
        assert_eq!(of("-.slice::c1"), some("c1.scope"));
        assert_eq!(of("a.slice:x:b.slice"), some("a.slice/b.slice"));
        assert_eq!(of(""), None);
        assert_eq!(of("/"), None);
    }

    #[test]
    fn paths_that_lead_elsewhere_are_refused() {
        for path in [
            "/a/../b",
            "..",
            "a:b:c",
            "a--b.slice:x:y",
            "a.slice:x:../y",
            "a.slice:../x:y",
            "a/b.slice:x:y",
            "a.slice:x:",
        ] {
            let error = place(Path::new(path)).unwrap_err().to_string();
            assert!(error.contains(&format!("{path:?}")), "{error}");
        }
    }

    #[test]
    fn a_cgroup_goes_with_its_processes_and_the_parents_made_for_it() {
        let Some(foreign) = Foreign::new("remove") else {
            return;
        };
        let first = foreign.create("parent/first").unwrap();
        let second = foreign.create("parent/second").unwrap();
        let mut child = sleeper();
        first.add(child.id()).unwrap();
        let members = fs::read_to_string(first.path().join("cgroup.procs")).unwrap();
        assert_eq!(members.trim(), child.id().to_string());
        first.remove().unwrap();
        assert!(!child.wait().unwrap().success(), "the process was not killed");
        assert!(is_gone(&foreign.path("parent/first")) && !is_gone(&foreign.path("parent/second")));
        second.remove().unwrap();
        assert!(is_gone(&foreign.path("parent")));
        assert!(!is_gone(&foreign.path("")), "somebody else's cgroup was removed");
    }

    #[test]
    fn somebody_elses_cgroup_is_left_as_it_is() {
        let Some(foreign) = Foreign::new("foreign") else {
            return;
        };
        let mut child = sleeper();
        let cgroup = foreign.create("").unwrap();
        cgroup.add(child.id()).unwrap();
        cgroup.remove().unwrap();
        assert!(child.try_wait().unwrap().is_none(), "a process was killed");
        assert!(foreign.left_over("").is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn what_a_killed_sandbox_left_is_found_and_removed() {
        let Some(foreign) = Foreign::new("left") else {
            return;
        };
        assert!(foreign.left_over("left").is_none());
        drop(foreign.create("left").unwrap());
        foreign.left_over("left").unwrap().remove().unwrap();
        assert!(is_gone(&foreign.path("left")));
    }

    #[test]
    fn parents_that_come_and_go_do_not_get_in_the_way() {
        let Some(foreign) = Foreign::new("busy") else {
            return;
        };
        std::thread::scope(|scope| {
            for number in 0..4 {
                let foreign = &foreign;
                scope.spawn(move || {
                    for _ in 0..50 {
                        foreign
                            .create(&format!("busy/{number}"))
                            .unwrap()
                            .remove()
                            .unwrap();
                    }
                });
            }
        });
        assert!(is_gone(&foreign.path("busy")));
    }

    #[test]
    fn what_cannot_be_made_or_joined_is_named() {
        let Some(foreign) = Foreign::new("named") else {
            return;
        };
        let error = foreign.create("cgroup.procs/x").unwrap_err();
        assert!(
            error.to_string().contains("cgroup.procs/x cannot be made"),
            "{error}"
        );
        let cgroup = foreign.create("join").unwrap();
        let error = cgroup.add(u32::MAX >> 1).unwrap_err();
        assert!(error.to_string().contains("join cannot be joined"), "{error}");
        cgroup.remove().unwrap();
    }
}
