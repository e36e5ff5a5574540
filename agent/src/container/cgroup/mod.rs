//! Control groups (v2): one per container, made before its init and removed with it.
//!
//! Here: the directory and its life. `limits` turns OCI resources into what is written to its files, `devices` into
//! a BPF program, `stats` reads its counters.

mod devices;
mod limits;
mod stats;

use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::spec::{Resources, SpecError};
use crate::stream::watch_fd;
pub use stats::{oom_kills, read as read_stats};

/// Why something about a cgroup failed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The directory cannot be made, opened or removed.
    #[error("cannot {what} cgroup {path}: {source}")]
    Directory {
        what: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    /// The kernel does not take a value.
    #[error("the guest's kernel refuses to set {file} to {value:?}: {source}")]
    Refused {
        file: String,
        value: String,
        source: std::io::Error,
    },
    /// A counter cannot be read.
    #[error("cannot read cgroup file {file}: {source}")]
    Read { file: String, source: std::io::Error },
    /// A new memory limit is below the use, and the caller asked to be told.
    #[error("the memory limit of {limit} bytes is below the present use of {current} bytes")]
    BelowUse { limit: i64, current: i64 },
    /// The kernel does not take the device rules.
    #[error("the guest's kernel refuses the device rules: {what}: {source}")]
    Devices { what: &'static str, source: Errno },
    /// The resources contradict themselves or ask for what there is not.
    #[error(transparent)]
    Spec(#[from] SpecError),
}

/// A container's cgroup.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    directory: OwnedFd,
    /// The attached device program; replaced by an update.
    devices: std::sync::Mutex<Option<OwnedFd>>,
}

impl Cgroup {
    /// Makes a cgroup. One that was left behind under this name, empty, is taken over.
    ///
    /// # Errors
    /// [`CgroupError::Directory`].
    pub fn create(parent: &Path, name: &str) -> Result<Self, CgroupError> {
        let path = parent.join(name);
        let fail = |what| {
            let path = path.clone();
            move |source| CgroupError::Directory { what, path, source }
        };
        match std::fs::create_dir(&path) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(fail("make")(error)),
            _ => {}
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory =
            openat(CWD, &path, flags, Mode::empty()).map_err(|errno| fail("open")(errno.into()))?;
        Ok(Self {
            path,
            directory,
            devices: std::sync::Mutex::new(None),
        })
    }

    /// For clone3's CLONE_INTO_CGROUP.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Applies the limits of a new container, or changes those of a running one. What is absent stays.
    ///
    /// # Errors
    /// [`CgroupError`] with the file and value; what came before it stays applied.
    pub fn apply(&self, resources: &Resources) -> Result<(), CgroupError> {
        let settings = limits::settings(resources)?;
        if let Some(memory) = &resources.memory
            && memory.check_before_update == Some(true)
            && let Some(limit @ 1..) = memory.limit
        {
            let current = self.read("memory.current")?.trim().parse().unwrap_or(0);
            if limit < current {
                return Err(CgroupError::BelowUse { limit, current });
            }
        }
        for setting in &settings {
            match self.write(&setting.file, &setting.value) {
                // No swap, no reservations: then what was asked for holds without the file.
                Err(CgroupError::Refused { source, .. })
                    if setting.optional && source.kind() == ErrorKind::NotFound => {}
                result => result?,
            }
        }
        if !resources.devices.is_empty() {
            self.apply_devices(resources)?;
        }
        Ok(())
    }

    fn apply_devices(&self, resources: &Resources) -> Result<(), CgroupError> {
        let program = devices::compile(&resources.devices)?;
        let mut attached = self
            .devices
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        *attached = devices::replace(self.fd(), attached.take(), program.as_deref())?;
        Ok(())
    }

    /// Writes one of its files.
    ///
    /// # Errors
    /// [`CgroupError::Refused`].
    pub fn write(&self, file: &str, value: &str) -> Result<(), CgroupError> {
        let write = || {
            let fd = openat(
                &self.directory,
                file,
                OFlags::WRONLY | OFlags::CLOEXEC,
                Mode::empty(),
            )?;
            rustix::io::write(&fd, value.as_bytes())
        };
        write().map(drop).map_err(|errno| CgroupError::Refused {
            file: file.into(),
            value: value.into(),
            source: errno.into(),
        })
    }

    /// Reads one of its files.
    ///
    /// # Errors
    /// [`CgroupError::Read`].
    pub fn read(&self, file: &str) -> Result<String, CgroupError> {
        std::fs::read_to_string(self.path.join(file)).map_err(|source| CgroupError::Read {
            file: file.into(),
            source,
        })
    }

    /// The sizes of huge pages that it has files for, as in their names.
    #[must_use]
    pub fn huge_page_sizes(&self) -> Vec<String> {
        let mut sizes: Vec<String> = std::fs::read_dir(&self.path)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
                (!size.contains('.')).then(|| size.to_owned())
            })
            .collect();
        sizes.sort();
        sizes
    }

    /// Kills every process in it and below.
    ///
    /// # Errors
    /// [`CgroupError::Refused`].
    pub fn kill(&self) -> Result<(), CgroupError> {
        self.write("cgroup.kill", "1")
    }

    /// The processes in it and below, by pid in the agent's pid namespace.
    ///
    /// # Errors
    /// [`CgroupError::Read`].
    pub fn processes(&self) -> Result<Vec<i32>, CgroupError> {
        let mut pids = Vec::new();
        for directory in self.tree() {
            let file = directory.join("cgroup.procs");
            match std::fs::read_to_string(&file) {
                Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok())),
                // Removed meanwhile, or threaded (cgroup v2, "Threads").
                Err(error)
                    if error.kind() == ErrorKind::NotFound
                        || error.raw_os_error() == Some(libc::ENODEV)
                        || error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
                Err(source) => {
                    let file = file.display().to_string();
                    return Err(CgroupError::Read { file, source });
                }
            }
        }
        // Pid 0 stands for processes of namespaces that cannot be seen from here.
        pids.retain(|pid| *pid > 0);
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// Its directory and all below, parents first.
    fn tree(&self) -> Vec<PathBuf> {
        let mut found = vec![self.path.clone()];
        let mut next = 0;
        while let Some(directory) = found.get(next) {
            let below: Vec<_> = std::fs::read_dir(directory)
                .into_iter()
                .flatten()
                .flatten()
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .map(|entry| entry.path())
                .collect();
            found.extend(below);
            next += 1;
        }
        found
    }

    /// Freezes or thaws it, and waits until it is so.
    ///
    /// # Errors
    /// [`CgroupError`].
    pub async fn freeze(&self, frozen: bool) -> Result<(), CgroupError> {
        let value = if frozen { "1" } else { "0" };
        self.write("cgroup.freeze", value)?;
        self.wait_event("frozen", value).await
    }

    /// Waits until no process is left in it or below.
    ///
    /// # Errors
    /// [`CgroupError::Read`].
    pub async fn wait_empty(&self) -> Result<(), CgroupError> {
        self.wait_event("populated", "0").await
    }

    async fn wait_event(&self, key: &str, value: &str) -> Result<(), CgroupError> {
        let mut watch = Watch::open(self, "cgroup.events")?;
        loop {
            let text = watch.read()?;
            if text
                .lines()
                .filter_map(|line| line.split_once(' '))
                .any(|pair| pair == (key, value))
            {
                return Ok(());
            }
            watch.changed().await?;
        }
    }

    /// Removes it and what the container made below it. Its processes have ended before.
    ///
    /// # Errors
    /// [`CgroupError::Directory`].
    pub fn remove(&self) -> Result<(), CgroupError> {
        for path in self.tree().into_iter().rev() {
            match std::fs::remove_dir(&path) {
                Err(source) if source.kind() != ErrorKind::NotFound => {
                    return Err(CgroupError::Directory {
                        what: "remove",
                        path,
                        source,
                    });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// A cgroup file whose changes the kernel announces (cgroup v2, "Interface Files": a file modified event).
#[derive(Debug)]
pub struct Watch {
    name: &'static str,
    file: AsyncFd<OwnedFd>,
}

impl Watch {
    /// Opens a file to be watched. Needs a runtime.
    ///
    /// # Errors
    /// [`CgroupError::Read`].
    pub fn open(cgroup: &Cgroup, name: &'static str) -> Result<Self, CgroupError> {
        let fail = |source| CgroupError::Read {
            file: name.into(),
            source,
        };
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file =
            openat(&cgroup.directory, name, flags, Mode::empty()).map_err(|errno| fail(errno.into()))?;
        let file = watch_fd(file, Interest::PRIORITY).map_err(fail)?;
        Ok(Self { name, file })
    }

    /// The file's content now. A change after it ends [`Watch::changed`].
    ///
    /// # Errors
    /// [`CgroupError::Read`].
    pub fn read(&mut self) -> Result<String, CgroupError> {
        // These files are a few lines of counters.
        let mut buffer = [0; 4096];
        let length = rustix::io::pread(self.file.get_ref(), &mut buffer, 0)
            .map_err(|errno| self.fail(errno.into()))?;
        Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
    }

    /// Waits for a change after the last reading.
    ///
    /// # Errors
    /// [`CgroupError::Read`].
    pub async fn changed(&mut self) -> Result<(), CgroupError> {
        let mut ready = self
            .file
            .ready(Interest::PRIORITY)
            .await
            .map_err(|source| self.fail(source))?;
        ready.clear_ready();
        Ok(())
    }

    fn fail(&self, source: std::io::Error) -> CgroupError {
        CgroupError::Read {
            file: self.name.into(),
            source,
        }
    }
}

/// A process's own cgroup below `root`, for processes whose container has moved on to cgroups of its own making.
#[must_use]
pub fn of_process(root: &Path, pid: i32) -> Option<OwnedFd> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(CWD, root.join(path), flags, Mode::empty()).ok()
}
