//! What the tests have in common: a directory to start a sandbox from, requests to it, and its story as words.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use sandbox::demand::Limits;
use sandbox::{
    Config, ContainerRequest, Event, Events, ExecRequest, Netns, ProcessId, Sandbox, SandboxSpec, Size,
    Sizing, Stdio,
};

/// A directory with a configuration and a bundle.
pub struct Place {
    pub dir: tempfile::TempDir,
}

impl Place {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("bundle/rootfs")).unwrap();
        // As much of a kernel and an image as is looked at on the host.
        std::fs::write(
            dir.path().join("vmlinux"),
            b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0",
        )
        .unwrap();
        std::fs::write(dir.path().join("guest.img"), b"070701").unwrap();
        Self { dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn config(&self, vmm: &Path, more: &str) -> Arc<Config> {
        let text = format!(
            "kernel = {:?}\nguest_image = {:?}\nvmm = {:?}\ntask = {:?}\n{more}",
            self.path("vmlinux"),
            self.path("guest.img"),
            vmm,
            env!("CARGO_BIN_EXE_kata-rs-task"),
        );
        Arc::new(Config::parse(&text, "test").unwrap())
    }

    pub fn start(&self, scenario: &str) -> (Sandbox, Events) {
        let vmm = std::env::current_exe().unwrap();
        Sandbox::start(spec(scenario), self.config(&vmm, "hello_timeout_s = 1\n"))
    }

    /// A request for a container whose process does what `word` says.
    pub fn container(&self, id: &str, word: &str) -> ContainerRequest {
        ContainerRequest {
            id: id.to_owned(),
            spec_json: oci(word, &serde_json::json!([])),
            bundle: self.path("bundle"),
            rootfs: Vec::new(),
            stdio: Stdio::null(),
        }
    }

    pub async fn running(&self, sandbox: &Sandbox, id: &str, word: &str) -> u32 {
        let pid = sandbox.create_container(self.container(id, word)).await.unwrap();
        assert_eq!(sandbox.start_process(&ProcessId::init(id)).await.unwrap(), pid);
        pid
    }
}

pub fn spec(scenario: &str) -> SandboxSpec {
    SandboxSpec {
        id: scenario.to_owned(),
        namespace: String::new(),
        sizing: Sizing {
            boot: Size {
                vcpus: 1,
                memory_mib: 512,
            },
            most: Size {
                vcpus: 4,
                memory_mib: 1024,
            },
            promised: Limits::default(),
        },
        in_pod: false,
        hostname: None,
        netns: Netns::Host,
        cgroups_path: None,
        oom_score_adj: 0,
        sysctls: std::collections::BTreeMap::new(),
        shm_bytes: 0,
    }
}

pub fn oci(word: &str, namespaces: &serde_json::Value) -> Vec<u8> {
    serde_json::to_vec(&serde_json::json!({
        "ociVersion": "1.1.0",
        "process": { "args": [word], "cwd": "/", "user": { "uid": 0, "gid": 0 } },
        "root": { "path": "rootfs" },
        "linux": { "namespaces": namespaces },
    }))
    .unwrap()
}

pub fn exec(container: &str, exec: &str, word: &str) -> ExecRequest {
    ExecRequest {
        process: ProcessId::exec(container, exec),
        process_json: serde_json::to_vec(
            &serde_json::json!({ "args": [word], "cwd": "/", "user": { "uid": 0, "gid": 0 } }),
        )
        .unwrap(),
        stdio: Stdio::null(),
    }
}

/// What exists in the fake VM.
pub async fn in_vm(sandbox: &Sandbox) -> Vec<String> {
    sandbox.guest_info().await.unwrap().controllers
}

pub fn is_alive(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// The events up to the sandbox's end, each as a word with the process it is about.
pub async fn story(mut events: Events) -> Vec<String> {
    let mut story = Vec::new();
    while let Some(event) = events.next().await {
        story.push(match event {
            Event::ContainerCreated { container_id, .. } => format!("{container_id} created"),
            Event::ContainerStarted { container_id, .. } => format!("{container_id} started"),
            Event::ExecAdded { process } => format!("{} added", process.exec_id),
            Event::ExecStarted { process, .. } => format!("{} started", process.exec_id),
            Event::Exited { process, exit, .. } if process.is_init() => {
                format!("{} exited {}", process.container_id, exit.status)
            }
            Event::Exited { process, exit, .. } => format!("{} exited {}", process.exec_id, exit.status),
            Event::Deleted { process, .. } if process.is_init() => {
                format!("{} deleted", process.container_id)
            }
            Event::Deleted { process, .. } => format!("{} deleted", process.exec_id),
            Event::Paused { container_id } => format!("{container_id} paused"),
            Event::Resumed { container_id } => format!("{container_id} resumed"),
            Event::OutOfMemory { container_id } => format!("{container_id} out of memory"),
            Event::SandboxExited { .. } => {
                story.push("end".to_owned());
                return story;
            }
        });
    }
    story
}

/// A container with a hook of each kind that runs on the host; each writes a line to `log`.
/// A request for the container that CRI calls the pod's sandbox. Neither its program nor its root file system exist.
pub fn pause(place: &Place, id: &str) -> ContainerRequest {
    let mut spec: serde_json::Value = serde_json::from_slice(&oci(
        "/pause",
        &serde_json::json!([{ "type": "network" }, { "type": "ipc" }, { "type": "pid" }]),
    ))
    .unwrap();
    spec["annotations"] = serde_json::json!({ "io.kubernetes.cri.container-type": "sandbox" });
    spec["root"]["path"] = "/nonexistent".into();
    ContainerRequest {
        spec_json: serde_json::to_vec(&spec).unwrap(),
        ..place.container(id, "unused")
    }
}
