//! The host's side of the tests: a client of the agent that runs in the same process.

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use protobuf::Message as _;
use protobuf::well_known_types::empty::Empty;
use protocol::agent::event::Kind;
use protocol::agent::mount::Source;
use protocol::agent::service::AgentClient;
use protocol::agent::{
    ConfigureSandboxRequest, ContainerRef, CreateContainerRequest, CreateExecRequest, Failure, KernelSource,
    Mount, ProcessExited, ProcessRef, ShareSource, SignalProcessRequest, Stdio,
};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::sync::watch;
use ttrpc::r#async::{Client, transport::Socket};
use ttrpc::context::Context;

use super::BUSYBOX;
use crate::container::Engine;
use crate::reaper::Reaper;
use crate::sandbox::{Sandbox, Times};
use crate::storage::Layout;
use crate::stream::{Connector, Stream};
use crate::{events, network, rpc};

type Streams = Arc<Mutex<HashMap<u64, UnixStream>>>;

/// The agent's client, and what a test looks at.
pub struct Host {
    pub agent: AgentClient,
    streams: Streams,
    exits: watch::Receiver<Vec<ProcessExited>>,
    seen: Mutex<HashSet<usize>>,
    /// Everything of this test, on a tmpfs of its own.
    pub directory: PathBuf,
    next_token: Mutex<u64>,
}

/// What must be gone after a test: nothing of a container may stay.
pub struct Leftovers {
    directory: PathBuf,
    cgroup: PathBuf,
}

/// What a process said, and how it ended.
#[derive(Debug, PartialEq, Eq)]
pub struct Output {
    pub stdout: String,
    pub stderr: String,
    pub status: u32,
}

/// Why a call failed, as the host sees it.
#[derive(Debug)]
pub struct Refusal {
    pub code: ttrpc::Code,
    pub message: String,
    pub failure: Failure,
}

fn mount(kind: &str, target: &str, options: &[&str]) -> Mount {
    Mount {
        source: Some(Source::Kernel(KernelSource {
            file_system: kind.into(),
            ..Default::default()
        })),
        target: target.into(),
        options: options.iter().map(ToString::to_string).collect(),
        ..Default::default()
    }
}

/// A bind mount of a share's path.
pub fn share(path: &str, target: &str, options: &[&str]) -> Mount {
    Mount {
        source: Some(Source::Share(ShareSource {
            name: "image".into(),
            path: path.into(),
            ..Default::default()
        })),
        ..mount("", target, options)
    }
}

/// A container that runs `script` by a shell, as containerd would describe it.
pub fn container(id: &str, script: &str) -> CreateContainerRequest {
    let spec = json!({
        "ociVersion": "1.2.0",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": ["sh", "-c", script],
            "env": ["PATH=/bin"],
            "cwd": "/",
            "capabilities": {
                "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_SYS_CHROOT"],
                "effective": ["CAP_CHOWN", "CAP_KILL", "CAP_SYS_CHROOT"],
                "permitted": ["CAP_CHOWN", "CAP_KILL", "CAP_SYS_CHROOT"],
            },
            "noNewPrivileges": true,
        },
        "hostname": "inside",
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"},
                           {"type": "cgroup"}],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/scsi", "/proc/no-such-file"],
            "readonlyPaths": ["/proc/sys", "/proc/no-such-file"],
        },
    });
    CreateContainerRequest {
        container_id: id.into(),
        spec: spec.to_string().into_bytes(),
        rootfs: vec![share("", "/rootfs", &["rbind", "rprivate"])],
        mounts: vec![
            mount("proc", "/proc", &["nosuid", "noexec", "nodev"]),
            mount(
                "tmpfs",
                "/dev",
                &["nosuid", "strictatime", "mode=755", "size=65536k"],
            ),
            mount(
                "devpts",
                "/dev/pts",
                &[
                    "nosuid",
                    "noexec",
                    "newinstance",
                    "ptmxmode=0666",
                    "mode=0620",
                    "gid=5",
                ],
            ),
            mount(
                "tmpfs",
                "/dev/shm",
                &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
            ),
            mount("mqueue", "/dev/mqueue", &["nosuid", "noexec", "nodev"]),
            mount("sysfs", "/sys", &["nosuid", "noexec", "nodev", "ro"]),
            mount(
                "cgroup",
                "/sys/fs/cgroup",
                &["ro", "nosuid", "noexec", "nodev", "relatime"],
            ),
        ],
        ..Default::default()
    }
}

/// A further process that runs `script` by a shell.
pub fn exec(container_id: &str, exec_id: &str, script: &str) -> CreateExecRequest {
    CreateExecRequest {
        container_id: container_id.into(),
        exec_id: exec_id.into(),
        process: json!({"args": ["sh", "-c", script], "env": ["PATH=/bin"], "cwd": "/", "user": {"uid": 0, "gid": 0}})
            .to_string()
            .into_bytes(),
        ..Default::default()
    }
}

/// Changes a JSON document that a request carries.
pub fn edit(document: &mut Vec<u8>, change: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(document).unwrap();
    change(&mut value);
    *document = value.to_string().into_bytes();
}

impl Host {
    /// Starts an agent that serves one end of a socket pair, and configures it.
    pub async fn start() -> (Self, Leftovers) {
        // SAFETY: SIG_IGN is a valid disposition.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
        let (directory, cgroup) = prepare_machine();
        let streams = Streams::default();
        let (events, listener) = events::queue();
        let reaper = Reaper::default();
        tokio::spawn(reaper.clone().run());
        let engine = Arc::new(Engine {
            layout: Layout::new(
                directory.join("containers"),
                directory.join("shares"),
                directory.join("volumes"),
                true,
            ),
            cgroups: cgroup.clone(),
            cgroup_mount: directory.join("cgroup"),
            reaper,
            events,
            connector: connector(&streams),
            pod_pid_namespace: Mutex::new(None),
        });
        let sandbox = Arc::new(Sandbox::new(
            engine,
            listener,
            network::State::default(),
            Times::default(),
        ));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let theirs = Stream::new(OwnedFd::from(theirs.into_std().unwrap())).unwrap();
        tokio::spawn(rpc::serve(theirs, sandbox));
        let agent = AgentClient::new(Client::new(Socket::new(ours)));
        agent
            .configure_sandbox(
                Context::default(),
                &ConfigureSandboxRequest {
                    hostname: "pod".into(),
                    ..Default::default()
                },
            )
            .await
            .unwrap();
        let (sender, exits) = watch::channel(Vec::new());
        let mut events = agent.events(Context::default(), &Empty::new()).await.unwrap();
        tokio::spawn(async move {
            while let Ok(Some(event)) = events.recv().await {
                if let Some(Kind::Exited(exited)) = event.kind {
                    sender.send_modify(|exits: &mut Vec<ProcessExited>| exits.push(exited));
                }
            }
        });
        let leftovers = Leftovers {
            directory: directory.clone(),
            cgroup,
        };
        let host = Self {
            agent,
            streams,
            exits,
            seen: Mutex::default(),
            directory,
            next_token: Mutex::new(1),
        };
        (host, leftovers)
    }

    fn token(&self) -> u64 {
        let mut next = self.next_token.lock().unwrap();
        *next += 1;
        *next
    }

    /// Tokens for all three streams.
    pub fn pipes(&self) -> Stdio {
        Stdio {
            stdin_token: self.token(),
            stdout_token: self.token(),
            stderr_token: self.token(),
            ..Default::default()
        }
    }

    /// A token for a terminal.
    pub fn terminal(&self) -> Stdio {
        Stdio {
            terminal: true,
            terminal_token: self.token(),
            ..Default::default()
        }
    }

    /// The host's end of a stream that the agent has opened.
    pub fn stream(&self, token: u64) -> UnixStream {
        self.streams
            .lock()
            .unwrap()
            .remove(&token)
            .expect("the agent has opened the stream")
    }

    pub async fn create(&self, request: &CreateContainerRequest) -> Result<i32, Refusal> {
        let answer = self.agent.create_container(Context::default(), request).await;
        answer.map(|answer| answer.guest_pid).map_err(refusal)
    }

    pub async fn create_exec(&self, request: &CreateExecRequest) -> Result<i32, Refusal> {
        let answer = self.agent.create_exec(Context::default(), request).await;
        answer.map(|answer| answer.guest_pid).map_err(refusal)
    }

    pub async fn start_process(&self, container_id: &str, exec_id: &str) -> Result<(), Refusal> {
        let process = process(container_id, exec_id);
        self.agent
            .start_process(Context::default(), &process)
            .await
            .map(drop)
            .map_err(refusal)
    }

    pub async fn signal(
        &self,
        container_id: &str,
        exec_id: &str,
        signal: i32,
        all: bool,
    ) -> Result<(), Refusal> {
        let request = SignalProcessRequest {
            container_id: container_id.into(),
            exec_id: exec_id.into(),
            signal: signal as u32,
            all,
            ..Default::default()
        };
        self.agent
            .signal_process(Context::default(), &request)
            .await
            .map(drop)
            .map_err(refusal)
    }

    pub async fn delete(&self, container_id: &str) -> Result<(), Refusal> {
        let container = reference(container_id);
        self.agent
            .delete_container(Context::default(), &container)
            .await
            .map(drop)
            .map_err(refusal)
    }

    pub async fn delete_exec(&self, container_id: &str, exec_id: &str) -> Result<(), Refusal> {
        let process = process(container_id, exec_id);
        self.agent
            .delete_exec(Context::default(), &process)
            .await
            .map(drop)
            .map_err(refusal)
    }

    /// Waits for the news of an exit, each of which counts once.
    pub async fn exit(&self, container_id: &str, exec_id: &str) -> u32 {
        let seen = |exits: &[ProcessExited]| {
            let seen = self.seen.lock().unwrap();
            exits.iter().enumerate().position(|(index, exit)| {
                exit.container_id == container_id && exit.exec_id == exec_id && !seen.contains(&index)
            })
        };
        let mut exits = self.exits.clone();
        let exits = exits.wait_for(|exits| seen(exits).is_some()).await.unwrap();
        let index = seen(&exits).unwrap();
        self.seen.lock().unwrap().insert(index);
        exits[index].status
    }

    /// Exec ids in the order in which exits were told.
    pub fn exits(&self) -> Vec<String> {
        self.exits
            .borrow()
            .iter()
            .map(|exit| exit.exec_id.clone())
            .collect()
    }

    /// Creates and starts a container that runs until it is told otherwise.
    pub async fn start_sleeper(&self, id: &str) -> i32 {
        let pid = self.create(&container(id, "sleep 1000")).await.unwrap();
        self.start_process(id, "").await.unwrap();
        pid
    }

    /// Runs a container to its end and deletes it.
    pub async fn run(&self, mut request: CreateContainerRequest) -> Output {
        let stdio = self.pipes();
        request.stdio = Some(stdio.clone()).into();
        let id = request.container_id.clone();
        self.create(&request).await.unwrap();
        let output = self.finish(&id, "", &stdio).await;
        self.delete(&id).await.unwrap();
        output
    }

    /// Runs a further process to its end and deletes it.
    pub async fn run_exec(&self, mut request: CreateExecRequest) -> Output {
        let stdio = self.pipes();
        request.stdio = Some(stdio.clone()).into();
        self.create_exec(&request).await.unwrap();
        let output = self.finish(&request.container_id, &request.exec_id, &stdio).await;
        self.delete_exec(&request.container_id, &request.exec_id)
            .await
            .unwrap();
        output
    }

    async fn finish(&self, container_id: &str, exec_id: &str, stdio: &Stdio) -> Output {
        self.stream(stdio.stdin_token).shutdown().await.unwrap();
        let (mut stdout, mut stderr) = (self.stream(stdio.stdout_token), self.stream(stdio.stderr_token));
        self.start_process(container_id, exec_id).await.unwrap();
        let (mut out, mut err) = (String::new(), String::new());
        tokio::try_join!(stdout.read_to_string(&mut out), stderr.read_to_string(&mut err)).unwrap();
        Output {
            stdout: out,
            stderr: err,
            status: self.exit(container_id, exec_id).await,
        }
    }
}

pub fn reference(container_id: &str) -> ContainerRef {
    ContainerRef {
        container_id: container_id.into(),
        ..Default::default()
    }
}

fn process(container_id: &str, exec_id: &str) -> ProcessRef {
    ProcessRef {
        container_id: container_id.into(),
        exec_id: exec_id.into(),
        ..Default::default()
    }
}

fn refusal(error: ttrpc::Error) -> Refusal {
    let ttrpc::Error::RpcStatus(status) = error else {
        panic!("the connection broke: {error}");
    };
    let detail = status
        .details
        .first()
        .map(|detail| detail.value.clone())
        .unwrap_or_default();
    Refusal {
        code: status.code(),
        message: status.message.clone(),
        failure: Failure::parse_from_bytes(&detail).unwrap(),
    }
}

fn connector(streams: &Streams) -> Connector {
    let streams = Arc::clone(streams);
    Arc::new(move |token| {
        let streams = Arc::clone(&streams);
        Box::pin(async move {
            let (ours, theirs) = UnixStream::pair()?;
            streams.lock().unwrap().insert(token, ours);
            Stream::new(OwnedFd::from(theirs.into_std()?))
        })
    })
}

/// A tmpfs with the shares, and a cgroup hierarchy without controllers: enough for freezing and killing.
fn prepare_machine() -> (PathBuf, PathBuf) {
    use rustix::mount::{MountFlags, mount as mount_at};
    let directory = Path::new("/tmp").join(format!("kata-rs-agent-test-{}", clock_id()));
    std::fs::create_dir(&directory).unwrap();
    mount_at("tmpfs", &directory, "tmpfs", MountFlags::empty(), None).unwrap();
    let image = directory.join("shares/image");
    for path in ["bin", "etc", "proc", "sys", "dev", "tmp", "root"] {
        std::fs::create_dir_all(image.join(path)).unwrap();
    }
    std::fs::copy(BUSYBOX, image.join("bin/busybox")).unwrap();
    for applet in std::str::from_utf8(
        &std::process::Command::new(BUSYBOX)
            .arg("--list")
            .output()
            .unwrap()
            .stdout,
    )
    .unwrap()
    .lines()
    .filter(|applet| *applet != "busybox")
    {
        std::os::unix::fs::symlink("busybox", image.join("bin").join(applet)).unwrap();
    }
    std::fs::write(
        image.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
    )
    .unwrap();
    std::fs::write(image.join("etc/text"), "#!/no/such/interpreter\n").unwrap();
    std::fs::write(image.join("bin/orphan-script"), "#!/no/such/interpreter\n").unwrap();
    std::fs::set_permissions(
        image.join("bin/orphan-script"),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    let hierarchy = directory.join("cgroup");
    std::fs::create_dir(&hierarchy).unwrap();
    mount_at("cgroup2", &hierarchy, "cgroup2", MountFlags::empty(), None).unwrap();
    let cgroup = hierarchy.join(format!("kata-rs-agent-test-{}", clock_id()));
    std::fs::create_dir(&cgroup).unwrap();
    (directory, cgroup)
}

/// Pids are the same in all tests, so names need something else.
fn clock_id() -> u64 {
    static ID: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    *ID.get_or_init(|| crate::clock::realtime_ns() as u64)
}

impl Leftovers {
    /// Fails when a container has left something behind that should have gone with it.
    pub fn check(&self) {
        let containers = directories(&self.directory.join("containers"));
        let cgroups = directories(&self.cgroup);
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let mounts = mounts
            .lines()
            .filter(|line| line.contains("/containers/"))
            .count();
        assert_eq!((containers, cgroups, mounts), (vec![], vec![], 0));
    }
}

fn directories(path: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(path)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

impl Drop for Leftovers {
    /// Also after a failure nothing of a test stays on the machine.
    fn drop(&mut self) {
        let _ = std::fs::write(self.cgroup.join("cgroup.kill"), "1");
        for cgroup in directories(&self.cgroup).iter().chain([&self.cgroup]) {
            // What was killed goes in its own time.
            for _ in 0..100 {
                if std::fs::remove_dir(cgroup).is_ok() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        let _ = rustix::mount::unmount(&self.directory, rustix::mount::UnmountFlags::DETACH);
        let _ = std::fs::remove_dir(&self.directory);
    }
}

/// Waits until `condition` holds; for what the agent does not announce.
pub async fn eventually(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..500 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what} has not come true in 5 s");
}
