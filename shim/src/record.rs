//! `kata-rs.json` in a container's bundle: which processes stand behind the container, so that `delete` can end what
//! a dead shim left. A process is named by its pid and its start time, because pids come round again.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};

/// The file's name in the bundle.
const NAME: &str = "kata-rs.json";

/// The file's content.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The pod's id, which names its sandbox.
    #[serde(default)]
    pub sandbox_id: String,
    /// Where the shim listens.
    #[serde(default)]
    pub socket: PathBuf,
    /// The pod's cgroup, as `linux.cgroupsPath` names it.
    #[serde(default)]
    pub cgroups_path: Option<PathBuf>,
    /// The pod's network namespace on the host, when it has a path.
    #[serde(default)]
    pub netns: Option<PathBuf>,
    /// The shim.
    #[serde(default)]
    pub shim: Option<Process>,
    /// The VMM of the pod, once there was one.
    #[serde(default)]
    pub vmm: Option<Process>,
    /// The process that stands for the container, once it was created.
    #[serde(default)]
    pub task: Option<Process>,
}

impl Record {
    /// Reads the record of a bundle. `Ok(None)`: there is none.
    ///
    /// # Errors
    /// When it cannot be read or understood.
    pub fn read(bundle: &Path) -> io::Result<Option<Self>> {
        match std::fs::read(bundle.join(NAME)) {
            Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Writes it, whole or not at all.
    ///
    /// # Errors
    /// When the bundle cannot be written.
    pub fn write(&self, bundle: &Path) -> io::Result<()> {
        replace(bundle, NAME, &serde_json::to_vec(self)?)
    }

    /// Removes it. One that is gone already, with its bundle or alone, is fine.
    pub fn remove(bundle: &Path) {
        let _ = std::fs::remove_file(bundle.join(NAME));
    }
}

/// Writes a file beside its name and moves it there, so that a reader sees it whole.
///
/// # Errors
/// When the directory cannot be written.
pub fn replace(dir: &Path, name: &str, content: &[u8]) -> io::Result<()> {
    let draft = dir.join(format!(".{name}"));
    std::fs::write(&draft, content)?;
    std::fs::rename(&draft, dir.join(name))
}

/// One process, for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its pid.
    pub pid: u32,
    /// When it was started, in clock ticks since boot (proc(5), field 22 of stat).
    pub start_time: u64,
}

impl Process {
    /// The process that has this pid now; `None` when there is none.
    pub fn of(pid: u32) -> Option<Self> {
        let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
        Some(Self {
            pid,
            start_time: start_time(&stat)?,
        })
    }

    /// Opens the process while it exists; what has its pid by now is left alone.
    pub fn open(self) -> Option<OwnedFd> {
        let pid = Pid::from_raw(i32::try_from(self.pid).ok()?)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        // The descriptor holds the pid: what is read now is about the process it names.
        (Self::of(self.pid) == Some(self)).then_some(pidfd)
    }
}

/// Field 22 of /proc/PID/stat. The command in field 2 may contain anything, also parentheses.
fn start_time(stat: &[u8]) -> Option<u64> {
    let end = stat.iter().rposition(|byte| *byte == b')')?;
    let rest = std::str::from_utf8(stat.get(end + 1..)?).ok()?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_found_behind_a_hostile_name() {
        let fields = (3..=52).map(|n| n.to_string()).collect::<Vec<_>>().join(" ");
        let stat = format!("77 (a) b (c) {fields}\n");
        assert_eq!(start_time(stat.as_bytes()), Some(22));
        assert_eq!(start_time(b"77 (short) S 1"), None);
    }

    #[test]
    fn a_process_is_told_from_one_that_got_its_pid() {
        let me = Process::of(std::process::id()).unwrap();
        assert!(me.open().is_some());
        let earlier = Process {
            start_time: me.start_time - 1,
            ..me
        };
        assert!(earlier.open().is_none());
    }

    #[test]
    fn a_record_comes_back_and_absence_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Record::read(dir.path()).unwrap(), None);
        assert_eq!(Record::read(&dir.path().join("gone")).unwrap(), None);
        let record = Record {
            sandbox_id: "p".into(),
            socket: "/s".into(),
            cgroups_path: Some("/c".into()),
            netns: Some("/n".into()),
            shim: Process::of(1),
            vmm: None,
            task: Some(Process {
                pid: 7,
                start_time: 8,
            }),
        };
        record.write(dir.path()).unwrap();
        assert_eq!(Record::read(dir.path()).unwrap(), Some(record));
        Record::remove(dir.path());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
