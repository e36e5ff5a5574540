//! The built shim as its callers run it: `start` in a bundle, calls on its socket, `delete`, `-info`. No VM boots
//! here: the configuration names files that do not exist, so that every failure path runs to its end.

use std::ffi::OsStr;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use containerd_shim_protos::api::{
    ConnectRequest, CreateTaskRequest, DeleteRequest, DeleteResponse, ExecProcessRequest, KillRequest,
    PidsRequest, ShutdownRequest, StateRequest, WaitRequest,
};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult, Extension};
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, PlatformRequest, ShutdownSandboxRequest, StopSandboxRequest,
};
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use containerd_shim_protos::types::introspection::RuntimeInfo;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use ttrpc::Code;
use ttrpc::r#async::transport::Socket;

const SHIM: &str = env!("CARGO_BIN_EXE_containerd-shim-kata-rs-v2");

/// A directory with room for bundles and sockets, and shims started in it.
struct Host {
    dir: tempfile::TempDir,
}

struct Shim {
    client: TaskClient,
    connection: Client,
    pid: u32,
    pidfd: OwnedFd,
    socket: PathBuf,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = "kernel = \"/nonexistent/vmlinux\"\ntask = \"/nonexistent/task\"\n";
        fs::write(dir.path().join("config.toml"), config).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A bundle whose container belongs to the given pod.
    fn bundle(&self, id: &str, pod: Option<&str>) -> PathBuf {
        let bundle = self.path(id);
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let mut spec = serde_json::json!({
            "ociVersion": "1.0.2",
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["true"], "cwd": "/"},
            "root": {"path": "rootfs"},
            "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]},
        });
        if let Some(pod) = pod {
            spec["annotations"] = serde_json::json!({"io.kubernetes.cri.sandbox-id": pod});
        }
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        bundle
    }

    fn params(&self, id: &str, config: &Path) -> BootstrapParams {
        let mut options = Vec::new();
        options.extend_from_slice(b"\x12");
        options.push(u8::try_from(config.as_os_str().len()).unwrap());
        options.extend_from_slice(config.as_os_str().as_encoded_bytes());
        BootstrapParams {
            instance_id: id.into(),
            namespace: "test".into(),
            containerd_grpc_address: "/run/test.sock".into(),
            containerd_ttrpc_address: self.path("events.sock").to_str().unwrap().into(),
            socket_dir: Some(self.path("s").to_str().unwrap().into()),
            extensions: vec![Extension {
                value: MessageField::some(Any {
                    type_url: "runtimeoptions.v1.Options".into(),
                    value: options,
                    ..Any::default()
                }),
                ..Extension::default()
            }],
            ..BootstrapParams::default()
        }
    }

    fn start(&self, id: &str) -> Output {
        let params = self.params(id, &self.path("config.toml"));
        self.start_with(id, &params.write_to_bytes().unwrap())
    }

    fn start_with(&self, id: &str, stdin: &[u8]) -> Output {
        run(
            &[
                "-namespace",
                "test",
                "-address",
                "/run/test.sock",
                "-publish-binary",
                "x",
                "-id",
                id,
                "start",
            ],
            &self.path(id),
            stdin,
        )
    }

    /// Sockets there are.
    fn sockets(&self) -> usize {
        fs::read_dir(self.path("s")).map_or(0, Iterator::count)
    }
}

fn run(args: &[&str], dir: &Path, stdin: &[u8]) -> Output {
    let mut child = Command::new(SHIM)
        .args(args)
        .current_dir(dir)
        .env_remove("TTRPC_ADDRESS")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(stdin).unwrap();
    // Returns only when nobody holds the two pipes any more.
    child.wait_with_output().unwrap()
}

fn address(output: &Output) -> PathBuf {
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    let result = BootstrapResult::parse_from_bytes(&output.stdout).unwrap();
    assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
    PathBuf::from(result.address.strip_prefix("unix://").unwrap())
}

impl Shim {
    async fn connect(socket: &Path) -> Self {
        let stream = tokio::net::UnixStream::connect(socket).await.unwrap();
        let connection = Client::new(Socket::new(stream));
        let client = TaskClient::new(connection.clone());
        let request = ConnectRequest {
            id: "nobody".into(),
            ..ConnectRequest::default()
        };
        let answer = client.connect(context(), &request).await.unwrap();
        assert_eq!(answer.task_pid, 0, "an unknown container has no pid");
        let pid = i32::try_from(answer.shim_pid)
            .ok()
            .and_then(Pid::from_raw)
            .unwrap();
        Self {
            client,
            connection,
            pid: answer.shim_pid,
            pidfd: pidfd_open(pid, PidfdFlags::empty()).unwrap(),
            socket: socket.to_owned(),
        }
    }

    /// Waits until the process is gone.
    fn gone(&self) {
        let timeout = Timespec {
            tv_sec: 30,
            tv_nsec: 0,
        };
        let ready = poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&timeout)).unwrap();
        assert_eq!(ready, 1, "the shim does not leave");
    }

    async fn create(&self, id: &str, bundle: &Path) -> (Code, String) {
        let request = CreateTaskRequest {
            id: id.into(),
            bundle: bundle.to_str().unwrap().into(),
            ..CreateTaskRequest::default()
        };
        refusal(self.client.create(context(), &request).await)
    }
}

fn context() -> ttrpc::context::Context {
    ttrpc::context::with_duration(Duration::from_secs(30))
}

fn refusal<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message().to_owned()),
        other => panic!("not refused: {other:?}"),
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[tokio::test]
async fn a_create_that_fails_says_why_and_leaves_nothing() {
    let host = Host::new();
    let bundle = host.bundle("c1", None);
    let socket = address(&host.start("c1"));
    assert_eq!(
        fs::read_to_string(bundle.join("address")).unwrap(),
        format!("unix://{}", socket.display())
    );
    let shim = Shim::connect(&socket).await;

    let (code, message) = shim.create("c1", &bundle).await;
    assert!(message.contains("/nonexistent/"), "{message}");
    assert_ne!(code, Code::UNKNOWN, "{message}");
    assert_ne!(
        code,
        Code::UNIMPLEMENTED,
        "containerd would try version 2: {message}"
    );

    let id = || "c1".to_owned();
    let client = &shim.client;
    let request = DeleteRequest {
        id: id(),
        ..DeleteRequest::default()
    };
    assert_eq!(
        refusal(client.delete(context(), &request).await).0,
        Code::NOT_FOUND
    );
    let request = StateRequest {
        id: id(),
        ..StateRequest::default()
    };
    assert_eq!(
        refusal(client.state(context(), &request).await).0,
        Code::NOT_FOUND
    );
    let request = WaitRequest {
        id: id(),
        ..WaitRequest::default()
    };
    assert_eq!(refusal(client.wait(context(), &request).await).0, Code::NOT_FOUND);
    let request = PidsRequest {
        id: id(),
        ..PidsRequest::default()
    };
    assert_eq!(refusal(client.pids(context(), &request).await).0, Code::NOT_FOUND);
    let request = KillRequest {
        id: id(),
        signal: 9,
        ..KillRequest::default()
    };
    assert_eq!(refusal(client.kill(context(), &request).await).0, Code::NOT_FOUND);
    let request = ExecProcessRequest {
        id: id(),
        exec_id: "e".into(),
        ..ExecProcessRequest::default()
    };
    assert_eq!(
        refusal(client.exec(context(), &request).await).0,
        Code::INVALID_ARGUMENT,
        "no process"
    );

    client
        .shutdown(context(), &ShutdownRequest::default())
        .await
        .unwrap();
    shim.gone();
    assert_eq!(host.sockets(), 0);
    assert_eq!(names(&bundle), ["address", "config.json", "rootfs"]);
}

#[tokio::test]
async fn containers_of_one_pod_share_a_shim_under_both_names() {
    let host = Host::new();
    host.bundle("pod", Some("pod"));
    let second = host.bundle("c1", Some("pod"));
    host.bundle("other", None);
    let socket = address(&host.start("pod"));
    assert_eq!(address(&host.start("c1")), socket, "the pod's shim is found");
    assert_eq!(
        fs::read_to_string(second.join("address")).unwrap(),
        format!("unix://{}", socket.display())
    );
    let stranger = address(&host.start("other"));
    assert_ne!(stranger, socket);
    assert_eq!(host.sockets(), 2);

    let shim = Shim::connect(&socket).await;
    // A caller that leaves takes nothing with it.
    drop(Shim::connect(&socket).await);
    let request = ttrpc::Request {
        service: "containerd.task.v2.Task".into(),
        method: "Connect".into(),
        payload: ConnectRequest::default().write_to_bytes().unwrap(),
        ..ttrpc::Request::default()
    };
    shim.connection.request(request).await.unwrap();
    for socket in [socket, stranger] {
        let shim = Shim::connect(&socket).await;
        shim.client
            .shutdown(context(), &ShutdownRequest::default())
            .await
            .unwrap();
        shim.gone();
    }
    assert_eq!(host.sockets(), 0);
}

#[tokio::test]
async fn a_start_after_a_shim_was_killed_replaces_its_socket() {
    let host = Host::new();
    host.bundle("c1", None);
    let first = Shim::connect(&address(&host.start("c1"))).await;
    pidfd_send_signal(&first.pidfd, Signal::KILL).unwrap();
    first.gone();
    assert!(first.socket.exists());
    let second = Shim::connect(&address(&host.start("c1"))).await;
    assert_eq!(second.socket, first.socket);
    assert_ne!(second.pid, first.pid);
    pidfd_send_signal(&second.pidfd, Signal::TERM).unwrap();
    second.gone();
    assert_eq!(host.sockets(), 0, "SIGTERM is an orderly end");
}

#[tokio::test]
async fn delete_cleans_up_after_a_killed_shim() {
    let host = Host::new();
    let bundle = host.bundle("c1", None);
    let shim = Shim::connect(&address(&host.start("c1"))).await;
    let _ = shim.create("c1", &bundle).await;
    pidfd_send_signal(&shim.pidfd, Signal::KILL).unwrap();
    shim.gone();
    let bundle = bundle.to_str().unwrap();
    for _ in 0..2 {
        let output = run(
            &["-namespace", "test", "-id", "c1", "-bundle", bundle, "delete"],
            Path::new("/"),
            b"",
        );
        assert!(output.status.success(), "{output:?}");
        let response = DeleteResponse::parse_from_bytes(&output.stdout).unwrap();
        assert_eq!(response.exit_status, 137);
        assert!(response.exited_at.is_some());
        assert_eq!(host.sockets(), 0);
    }
}

#[tokio::test]
async fn delete_asks_a_shim_that_answers_and_it_leaves_when_idle() {
    let host = Host::new();
    let bundle = host.bundle("c1", None);
    let shim = Shim::connect(&address(&host.start("c1"))).await;
    let output = run(&["-namespace", "test", "-id", "c1", "delete"], &bundle, b"");
    assert!(output.status.success(), "{output:?}");
    // It had no container: the question whether it may go was answered by going.
    shim.gone();
    assert_eq!(host.sockets(), 0);
}

#[tokio::test]
async fn a_shim_waits_for_its_callers_to_hang_up_but_not_for_ever() {
    let host = Host::new();
    let path = host.bundle("c1", None).join("log");
    rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    // Open for writing too: reading then never meets the end of the file.
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut log = fs::File::from(rustix::fs::open(&path, flags, Mode::empty()).unwrap());
    let shim = Shim::connect(&address(&host.start("c1"))).await;
    shim.client
        .shutdown(context(), &ShutdownRequest::default())
        .await
        .unwrap();
    // This caller has its answer and stays.
    shim.gone();
    let mut text = vec![0; 64 << 10];
    let length = log.read(&mut text).unwrap();
    let text = String::from_utf8_lossy(&text[..length]);
    assert!(text.contains("leaving while a caller is connected"), "{text}");
}

#[tokio::test]
async fn a_sandbox_that_cannot_be_made_is_told_through_its_service_and_the_shim_goes() {
    let host = Host::new();
    let bundle = host.path("pod");
    fs::create_dir_all(&bundle).unwrap();
    let shim = Shim::connect(&address(&host.start("pod"))).await;
    let client = SandboxClient::new(shim.connection.clone());

    let answer = client
        .platform(context(), &PlatformRequest::default())
        .await
        .unwrap();
    assert_eq!(
        (answer.platform.os.as_str(), answer.platform.architecture.as_str()),
        ("linux", "amd64")
    );
    let unknown = StopSandboxRequest {
        sandbox_id: "pod".into(),
        ..StopSandboxRequest::default()
    };
    assert_eq!(
        refusal(client.stop_sandbox(context(), &unknown).await).0,
        Code::NOT_FOUND
    );

    let create = async |id: &str, config: &[u8]| {
        let request = CreateSandboxRequest {
            sandbox_id: id.into(),
            bundle_path: bundle.to_str().unwrap().into(),
            options: MessageField::some(Any {
                type_url: "runtime.v1.PodSandboxConfig".into(),
                value: config.to_vec(),
                ..Any::default()
            }),
            ..CreateSandboxRequest::default()
        };
        refusal(client.create_sandbox(context(), &request).await)
    };
    let (code, message) = create("another", b"").await;
    assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
    let (code, message) = create("pod", b"\x12\x7f").await;
    assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
    // linux { security_context { namespace_options { network: NODE } } }
    let (code, message) = create("pod", b"\x42\x06\x12\x04\x0a\x02\x08\x02").await;
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("hostNetwork: true"), "{message}");
    // hostname: "h"
    let (code, message) = create("pod", b"\x12\x01h").await;
    assert!(message.contains("/nonexistent/"), "{message}");
    assert_ne!(code, Code::UNKNOWN, "{message}");
    assert_eq!(fs::read_to_string(bundle.join("hostname")).unwrap(), "h\n");

    client
        .shutdown_sandbox(context(), &ShutdownSandboxRequest::default())
        .await
        .unwrap();
    shim.gone();
    assert_eq!(host.sockets(), 0);
}

#[test]
fn a_bad_start_names_the_fault_and_leaves_nothing() {
    let host = Host::new();
    let bundle = host.bundle("c1", None);
    fs::write(host.path("config.toml"), "kernle = \"/x\"\n").unwrap();
    let output = host.start("c1");
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("kernle") && text.contains("config.toml"), "{text}");

    let output = host.start_with("c1", b"\xff\xff");
    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("standard input")
    );

    fs::write(bundle.join("config.json"), "{").unwrap();
    fs::write(host.path("config.toml"), "").unwrap();
    let output = host.start("c1");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().contains("config.json"));

    let output = run(&["-namespace", "test", "-id", "c1", "serve"], &bundle, b"");
    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("listening socket")
    );

    assert_eq!(host.sockets(), 0);
    assert_eq!(names(&bundle), ["config.json", "rootfs"]);
}

#[test]
fn info_and_version_need_no_bundle() {
    let output = run(&["-info"], Path::new("/"), b"");
    assert!(output.status.success() && output.stderr.is_empty());
    let info = RuntimeInfo::parse_from_bytes(&output.stdout).unwrap();
    assert_eq!(info.name, "io.containerd.kata-rs.v2");
    let output = run(&["-v"], Path::new("/"), b"");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains(env!("CARGO_PKG_VERSION")), "{text}");
    let output = Command::new(SHIM).arg(OsStr::new("explode")).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().contains("explode"));
}
