//! The `delete` action: ends and removes what a container left behind whose shim is dead or does not answer. It may
//! run any number of times, also while the shim lives and serves other containers: what is in order stays.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use containerd_shim_protos::api::{DeleteResponse, ShutdownRequest};
use containerd_shim_protos::shim_async::{Client, TaskClient};
use protobuf::Message as _;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Signal, pidfd_send_signal};
use sandbox::cgroup::{CgroupError, HostCgroup};
use sandbox::network::NetworkError;
use tokio::net::UnixStream;
use ttrpc::r#async::transport::Socket;

use crate::arguments::Arguments;
use crate::convert;
use crate::record::{Process, Record};
use crate::socket::{self, SocketError};

/// containerd gives the whole action 5 s.
const TIME_LIMIT: Duration = Duration::from_secs(4);

/// How long a shim may take to answer before it counts as hung.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);

/// How a process ends that was killed: 128 + SIGKILL.
const KILLED: u32 = 137;

/// Why not everything is cleaned up.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    /// The bundle's path is unknown.
    #[error("cannot find the working directory, which is the bundle: {0}")]
    Bundle(#[source] io::Error),
    /// The root file system stays mounted.
    #[error("cannot unmount {path}: {source}")]
    Unmount {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A process does not die.
    #[error("process {pid} ({what}) was killed and has not ended within {} s", TIME_LIMIT.as_secs())]
    Survivor {
        /// Which.
        pid: u32,
        /// What it is.
        what: &'static str,
    },
    /// The pod's cgroup stays.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Packets are still redirected to taps that are gone.
    #[error("{}", sandbox::error::chain(.0))]
    Network(#[from] NetworkError),
    /// The socket stays.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The answer cannot be encoded.
    #[error("cannot encode the answer: {0}")]
    Answer(#[source] protobuf::Error),
}

/// Does it; returns what standard output gets.
pub fn delete(arguments: &Arguments) -> Result<Vec<u8>, CleanupError> {
    let deadline = Instant::now() + TIME_LIMIT;
    let bundle = match &arguments.bundle {
        Some(bundle) => bundle.clone(),
        None => std::env::current_dir().map_err(CleanupError::Bundle)?,
    };
    let record = match Record::read(&bundle) {
        Ok(record) => record.unwrap_or_default(),
        Err(error) => {
            // A warning in containerd's log; what the record named cannot be known any more.
            eprintln!("the record of the container's processes cannot be read: {error}");
            Record::default()
        }
    };
    // Everything is tried; the first thing that failed is reported.
    let shim_works = record.shim.is_some_and(|shim| shim.open().is_some()) && answers(&record.socket);
    let processes = end_processes(&record, shim_works, deadline);
    let cgroup = if shim_works {
        Ok(())
    } else {
        remove_cgroup(record.cgroups_path.as_deref())
    };
    let network = match (&record.netns, shim_works) {
        (Some(netns), false) => sandbox::network::clean_up(netns),
        _ => Ok(()),
    };
    let rootfs = unmount_all(&bundle.join("rootfs"));
    let socket = match record.socket.as_os_str().is_empty() {
        true => Ok(()),
        false => socket::remove_stale(&record.socket),
    };
    processes?;
    cgroup?;
    network?;
    rootfs?;
    socket?;
    let response = DeleteResponse {
        pid: record.task.map_or(0, |task| task.pid),
        exit_status: KILLED,
        exited_at: convert::timestamp(SystemTime::now()),
        ..DeleteResponse::default()
    };
    response.write_to_bytes().map_err(CleanupError::Answer)
}

/// Ends the container's process, and those of its pod when the shim does not work.
fn end_processes(record: &Record, shim_works: bool, deadline: Instant) -> Result<(), CleanupError> {
    // The death of this process is a SIGKILL to the container when the shim works.
    let task = kill(record.task);
    let mut ended = Ok(());
    if !shim_works {
        if let Some((shim, pidfd)) = record.shim.and_then(|shim| Some((shim, shim.open()?))) {
            // It is on its way out, or it hangs.
            if !exits(&pidfd, Instant::now() + ANSWER_LIMIT) {
                let _ = pidfd_send_signal(pidfd.as_fd(), Signal::KILL);
                ended = gone(&pidfd, shim, "the shim", deadline);
            }
        }
        // It went with the shim unless something is wrong.
        if let (Some(vmm), Some(pidfd)) = (record.vmm, kill(record.vmm)) {
            ended = ended.and(gone(&pidfd, vmm, "the VMM", deadline));
        }
    }
    if let (Some(process), Some(pidfd)) = (record.task, task) {
        ended = ended.and(gone(&pidfd, process, "the container", deadline));
    }
    ended
}

/// Sends SIGKILL to a process if it still exists.
fn kill(process: Option<Process>) -> Option<OwnedFd> {
    let pidfd = process?.open()?;
    // It may have ended by itself meanwhile.
    let _ = pidfd_send_signal(pidfd.as_fd(), Signal::KILL);
    Some(pidfd)
}

fn gone(
    pidfd: &OwnedFd,
    process: Process,
    what: &'static str,
    deadline: Instant,
) -> Result<(), CleanupError> {
    if exits(pidfd, deadline) {
        Ok(())
    } else {
        Err(CleanupError::Survivor {
            pid: process.pid,
            what,
        })
    }
}

/// Waits for a process to end.
fn exits(pidfd: &OwnedFd, deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&timeout)) {
            Err(Errno::INTR) => {}
            Ok(ready) => return ready > 0,
            Err(_) => return false,
        }
    }
}

/// Whether the shim works. It is asked to shut down, which it does at once when it has no container left and not at
/// all otherwise.
fn answers(socket: &Path) -> bool {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return false;
    };
    runtime.block_on(async {
        let ask = async {
            let stream = UnixStream::connect(socket).await.ok()?;
            let client = TaskClient::new(Client::new(Socket::new(stream)));
            let request = ShutdownRequest::default();
            client
                .shutdown(ttrpc::context::with_duration(ANSWER_LIMIT), &request)
                .await
                .ok()
        };
        matches!(tokio::time::timeout(ANSWER_LIMIT, ask).await, Ok(Some(_)))
    })
}

/// Removes the cgroup that a sandbox made for itself. One that was there before it stays.
fn remove_cgroup(cgroups_path: Option<&Path>) -> Result<(), CgroupError> {
    let Some(cgroups_path) = cgroups_path else {
        return Ok(());
    };
    match HostCgroup::left_over(cgroups_path)? {
        Some(cgroup) => cgroup.remove(),
        None => Ok(()),
    }
}

/// Unmounts everything at `path`: containerd and Docker mount root file systems there, one over the other at times.
fn unmount_all(path: &Path) -> Result<(), CleanupError> {
    loop {
        match unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // EINVAL: nothing is mounted there (any more).
            Err(Errno::INVAL | Errno::NOENT | Errno::NOTDIR) => return Ok(()),
            Err(errno) => {
                return Err(CleanupError::Unmount {
                    path: path.to_owned(),
                    source: errno.into(),
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    fn sleeper() -> (Child, Process) {
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of(child.id()).unwrap();
        (child, process)
    }

    fn deletes(bundle: &Path) -> DeleteResponse {
        let arguments = Arguments {
            bundle: Some(bundle.to_owned()),
            ..Arguments::default()
        };
        DeleteResponse::parse_from_bytes(&delete(&arguments).unwrap()).unwrap()
    }

    #[test]
    fn a_dead_shims_processes_and_socket_go_and_a_second_time_is_fine() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        let ((mut task, task_process), (mut shim, shim_process), (mut vmm, vmm_process)) =
            (sleeper(), sleeper(), sleeper());
        let record = Record {
            sandbox_id: "p".into(),
            socket: socket.clone(),
            cgroups_path: None,
            netns: None,
            shim: Some(shim_process),
            vmm: Some(vmm_process),
            task: Some(task_process),
        };
        record.write(dir.path()).unwrap();
        let response = deletes(dir.path());
        assert_eq!((response.pid, response.exit_status), (task_process.pid, 137));
        assert!(response.exited_at.seconds > 0);
        for child in [&mut task, &mut shim, &mut vmm] {
            assert!(child.try_wait().unwrap().is_some(), "left alive");
        }
        assert!(!socket.exists());
        assert_eq!(deletes(dir.path()).pid, task_process.pid);
    }

    #[test]
    fn a_process_that_only_has_the_pid_is_spared() {
        let dir = tempfile::tempdir().unwrap();
        let (mut stranger, process) = sleeper();
        let record = Record {
            task: Some(Process {
                start_time: process.start_time + 1,
                ..process
            }),
            ..Record::default()
        };
        record.write(dir.path()).unwrap();
        deletes(dir.path());
        assert!(stranger.try_wait().unwrap().is_none(), "killed a stranger");
        stranger.kill().unwrap();
        stranger.wait().unwrap();
    }

    #[test]
    fn nothing_is_left_of_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let response = deletes(&dir.path().join("gone"));
        assert_eq!((response.pid, response.exit_status), (0, 137));
    }
}
