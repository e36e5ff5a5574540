//! The plain data that goes in and out of a [`Sandbox`](crate::Sandbox). No behaviour beyond conversion.

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::SystemTime;

/// Names a process: a container's init, or an exec in it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProcessId {
    /// The container.
    pub container_id: String,
    /// The exec; empty for the container's init.
    pub exec_id: String,
}

impl ProcessId {
    /// A container's init.
    #[must_use]
    pub fn init(container_id: &str) -> Self {
        Self {
            container_id: container_id.to_owned(),
            exec_id: String::new(),
        }
    }

    /// An exec of a container; an empty `exec_id` names the init.
    #[must_use]
    pub fn exec(container_id: &str, exec_id: &str) -> Self {
        Self {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
        }
    }

    /// Whether this is the container's init.
    #[must_use]
    pub fn is_init(&self) -> bool {
        self.exec_id.is_empty()
    }
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_init() {
            write!(f, "container {}", self.container_id)
        } else {
            write!(f, "exec {} of container {}", self.exec_id, self.container_id)
        }
    }
}

/// What a container is made from.
#[derive(Debug)]
pub struct ContainerRequest {
    /// Unique in the sandbox.
    pub id: String,
    /// The OCI runtime specification's `config.json`.
    pub spec_json: Vec<u8>,
    /// The bundle directory; relative paths of the specification start there.
    pub bundle: PathBuf,
    /// The root file system as a snapshotter gives it. Empty: the specification's `root.path` is the directory.
    pub rootfs: Vec<RootfsMount>,
    /// Standard I/O of the init process.
    pub stdio: Stdio,
}

/// What an exec is made from.
#[derive(Debug)]
pub struct ExecRequest {
    /// Its container and its id, unique in the container and not empty.
    pub process: ProcessId,
    /// The OCI runtime specification's `process`.
    pub process_json: Vec<u8>,
    /// Its standard I/O.
    pub stdio: Stdio,
}

/// One mount of a snapshotter's list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RootfsMount {
    /// `overlay`, `bind`, `ext4`, …
    pub kind: String,
    /// What to mount: a device, file or directory; a placeholder for `overlay`.
    pub source: String,
    /// Where, relative to the root file system; empty for the root itself.
    pub target: String,
    /// mount(8) options.
    pub options: Vec<String>,
}

/// The standard I/O of a process.
#[derive(Debug)]
pub struct Stdio {
    /// Where input comes from.
    pub stdin: StdioTarget,
    /// Where output goes; everything, with a terminal.
    pub stdout: StdioTarget,
    /// Where error output goes; unused with a terminal.
    pub stderr: StdioTarget,
    /// Whether the process has a terminal.
    pub terminal: bool,
}

impl Stdio {
    /// All three are /dev/null.
    #[must_use]
    pub fn null() -> Self {
        Self {
            stdin: StdioTarget::Null,
            stdout: StdioTarget::Null,
            stderr: StdioTarget::Null,
            terminal: false,
        }
    }

    /// The targets as their callers named them; empty where they gave none or a descriptor.
    #[must_use]
    pub fn uris(&self) -> StdioUris {
        let text = |target: &StdioTarget| match target {
            StdioTarget::Uri(uri) => uri.clone(),
            StdioTarget::Null | StdioTarget::Fd(_) => String::new(),
        };
        StdioUris {
            stdin: text(&self.stdin),
            stdout: text(&self.stdout),
            stderr: text(&self.stderr),
            terminal: self.terminal,
        }
    }
}

/// One end of standard I/O on the host.
#[derive(Debug)]
pub enum StdioTarget {
    /// Nothing: end of file, and output is dropped.
    Null,
    /// As containerd names it: a fifo's path, `fifo://`, `file://` or `binary://`.
    Uri(String),
    /// An open descriptor: a pipe, a file, a terminal.
    Fd(OwnedFd),
}

/// [`Stdio`] as its caller named it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StdioUris {
    /// Input; empty for none.
    pub stdin: String,
    /// Output; empty for none.
    pub stdout: String,
    /// Error output; empty for none.
    pub stderr: String,
    /// Whether the process has a terminal.
    pub terminal: bool,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// As a shell shows it: 0–255, 128 + signal number when killed by a signal.
    pub status: u32,
    /// When.
    pub exited_at: SystemTime,
}

/// What [`Sandbox::delete`](crate::Sandbox::delete) leaves to say of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deleted {
    /// The host process that stood for it.
    pub pid: u32,
    /// How it ended. A process that was never started: status 0, at deletion.
    pub exit: Exit,
}

/// What a process is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Made, not yet executed.
    Created,
    /// Executing.
    Running,
    /// Frozen with its container.
    Paused,
    /// Its container is being frozen.
    Pausing,
    /// Exited, or its start failed.
    Stopped,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Pausing => "pausing",
            Self::Stopped => "stopped",
        })
    }
}

/// Everything known about a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessState {
    /// What it is doing.
    pub status: Status,
    /// The host process that stands for it; 0 for an exec that has not been started.
    pub pid: u32,
    /// How it ended; set exactly when it is [`Status::Stopped`].
    pub exit: Option<Exit>,
    /// Its standard I/O.
    pub stdio: StdioUris,
    /// Its container's bundle.
    pub bundle: PathBuf,
}

/// One process of a container's list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessEntry {
    /// The host process that stands for it.
    pub pid: u32,
    /// The exec's id; empty for the init.
    pub exec_id: String,
}

/// What the guest says of itself.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct GuestInfo {
    /// Release of the agent.
    pub agent_release: String,
    /// `uname -r` of the guest.
    pub kernel_release: String,
    /// The guest kernel's boot id.
    pub boot_id: String,
    /// CPUs that are online.
    pub online_cpus: u32,
    /// The guest's memory as its kernel counts it, in bytes.
    pub memory_total_bytes: u64,
    /// What of it is available, in bytes.
    pub memory_available_bytes: u64,
    /// cgroup v2 controllers.
    pub controllers: Vec<String>,
}

/// Why the VM is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SandboxExitCause {
    /// [`Sandbox::shutdown`](crate::Sandbox::shutdown), or the last handle was dropped.
    Requested,
    /// It never became ready: the VMM could not be started, or the guest did not say Hello.
    StartFailed,
    /// The guest shut itself down.
    GuestShutdown,
    /// The guest kernel panicked, or a vCPU triple-faulted.
    GuestCrashed,
    /// The agent closed its connection while the guest ran on.
    AgentLost,
    /// The VMM gave up or was killed.
    VmmDied,
}

/// How a sandbox ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SandboxExit {
    /// Why, for code.
    pub cause: SandboxExitCause,
    /// Why, for people: with the guest's last console lines when nobody had asked for the end.
    pub message: String,
    /// When.
    pub exited_at: SystemTime,
}
