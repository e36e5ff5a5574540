//! What happens when things go wrong in ways a real VM cannot be made to, and in which order.
//!
//! This program is its own VMM: the sandbox spawns it again under the VMM's name (`fake`). It needs /dev/kvm to
//! be openable, and root for the namespaces, as every sandbox does.

mod fake;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sandbox::demand::Limits;
use sandbox::{
    Config, ContainerRequest, ErrorKind, Event, Events, ExecRequest, Netns, ProcessId, Sandbox,
    SandboxExitCause, SandboxSpec, Size, Sizing, Status, Stdio, StdioTarget,
};

type Test = (
    &'static str,
    fn(&Place) -> std::pin::Pin<Box<dyn Future<Output = ()> + '_>>,
);

macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        const TESTS: &[Test] = &[$((stringify!($name), |place| Box::pin($name(place)))),*];
    };
}

tests![
    a_container_runs_and_leaves_nothing,
    an_agent_of_another_version_is_refused,
    a_guest_that_never_says_hello_is_given_up_with_its_console,
    a_guest_that_panics_in_boot_is_reported_with_its_console,
    a_guest_that_dies_in_the_handshake_is_not_waited_for,
    a_vmm_that_dies_at_once_is_reported_with_its_words,
    a_vmm_that_refuses_the_machine_is_quoted,
    a_missing_vmm_is_named,
    a_refused_container_leaves_nothing_attached,
    a_missing_netns_is_named_and_undone,
    an_exit_before_the_answer_comes_after_the_start,
    a_missing_executable_can_only_be_deleted,
    a_killed_vmm_ends_every_process_in_order,
    a_guest_that_panics_is_told_from_a_killed_vmm,
    an_agent_that_hangs_up_ends_the_vm,
    an_out_of_memory_comes_before_its_exit,
    a_killed_host_process_kills_its_container,
    a_paused_container_takes_no_exec,
    execs_are_told_apart,
    a_pods_sandbox_is_nothing_in_the_guest_and_outlives_its_containers,
    namespaces_are_told_by_the_pids_of_the_pods_own_processes,
    a_pod_in_a_namespace_of_the_host_is_refused,
    a_vm_grows_before_its_container_and_shrinks_after_it,
    a_vm_that_cannot_grow_leaves_its_container_as_it_is,
    a_container_that_comes_later_makes_the_vm_grow,
    hooks_run_around_the_container,
    a_failed_hook_undoes_the_container,
    the_vm_is_counted_in_its_cgroup_which_goes_with_it,
    a_shutdown_ends_everything_and_may_be_repeated,
    a_container_in_the_making_is_not_known_yet,
    a_dropped_sandbox_leaves_no_process,
    a_dead_owner_leaves_no_process,
];

fn main() {
    let args: Vec<String> = std::env::args().collect();
    match args.first().map(String::as_str) {
        Some("kata-rs-vmm") => return fake::run(&args[1]),
        Some("owner") => return own(&args[1]),
        _ => {}
    }
    let filter = args.iter().skip(1).find(|arg| !arg.starts_with('-')).cloned();
    let filter = filter.unwrap_or_default();
    if args.iter().any(|arg| arg == "--list") {
        TESTS.iter().for_each(|(name, _)| println!("{name}: test"));
        return;
    }
    let (mut passed, mut failed) = (0, 0);
    for (name, test) in TESTS.iter().filter(|(name, _)| name.contains(&filter)) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let place = Place::new();
        let run = std::panic::AssertUnwindSafe(|| {
            runtime.block_on(async {
                let limit = Duration::from_secs(30);
                tokio::time::timeout(limit, test(&place))
                    .await
                    .expect("the test hangs");
            });
        });
        let result = std::panic::catch_unwind(run);
        drop(runtime);
        *(if result.is_ok() { &mut passed } else { &mut failed }) += 1;
        println!("test {name} ... {}", if result.is_ok() { "ok" } else { "FAILED" });
    }
    let word = if failed == 0 { "ok" } else { "FAILED" };
    println!("\ntest result: {word}. {passed} passed; {failed} failed; 0 ignored");
    if failed > 0 {
        std::process::exit(1);
    }
}

/// A directory with a configuration and a bundle.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
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

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn config(&self, vmm: &Path, more: &str) -> Arc<Config> {
        let text = format!(
            "kernel = {:?}\nguest_image = {:?}\nvmm = {:?}\ntask = {:?}\n{more}",
            self.path("vmlinux"),
            self.path("guest.img"),
            vmm,
            env!("CARGO_BIN_EXE_kata-rs-task"),
        );
        Arc::new(Config::parse(&text, "test").unwrap())
    }

    fn start(&self, scenario: &str) -> (Sandbox, Events) {
        let vmm = std::env::current_exe().unwrap();
        Sandbox::start(spec(scenario), self.config(&vmm, "hello_timeout_s = 1\n"))
    }

    /// A request for a container whose process does what `word` says.
    fn container(&self, id: &str, word: &str) -> ContainerRequest {
        ContainerRequest {
            id: id.to_owned(),
            spec_json: oci(word, &serde_json::json!([])),
            bundle: self.path("bundle"),
            rootfs: Vec::new(),
            stdio: Stdio::null(),
        }
    }

    async fn running(&self, sandbox: &Sandbox, id: &str, word: &str) -> u32 {
        let pid = sandbox.create_container(self.container(id, word)).await.unwrap();
        assert_eq!(sandbox.start_process(&ProcessId::init(id)).await.unwrap(), pid);
        pid
    }
}

fn spec(scenario: &str) -> SandboxSpec {
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

fn oci(word: &str, namespaces: &serde_json::Value) -> Vec<u8> {
    serde_json::to_vec(&serde_json::json!({
        "ociVersion": "1.1.0",
        "process": { "args": [word], "cwd": "/", "user": { "uid": 0, "gid": 0 } },
        "root": { "path": "rootfs" },
        "linux": { "namespaces": namespaces },
    }))
    .unwrap()
}

fn exec(container: &str, exec: &str, word: &str) -> ExecRequest {
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
async fn in_vm(sandbox: &Sandbox) -> Vec<String> {
    sandbox.guest_info().await.unwrap().controllers
}

fn is_alive(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// The events up to the sandbox's end, each as a word with the process it is about.
async fn story(mut events: Events) -> Vec<String> {
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

async fn a_container_runs_and_leaves_nothing(place: &Place) {
    let (sandbox, events) = place.start("ordinary");
    let (mut output, writer) = std::io::pipe().unwrap();
    let mut request = place.container("c", "runs");
    request.stdio.stdout = StdioTarget::Fd(writer.into());
    let pid = sandbox.create_container(request).await.unwrap();
    assert!(is_alive(pid));
    assert!(
        in_vm(&sandbox).await.len() >= 2,
        "a process and its root file system"
    );
    let init = ProcessId::init("c");
    assert_eq!(sandbox.state(&init).await.unwrap().status, Status::Created);
    sandbox.start_process(&init).await.unwrap();
    assert_eq!(sandbox.state(&init).await.unwrap().status, Status::Running);
    assert_eq!(
        sandbox.start_process(&init).await.unwrap_err().kind(),
        ErrorKind::FailedPrecondition
    );
    assert_eq!(
        sandbox.delete(&init).await.unwrap_err().kind(),
        ErrorKind::FailedPrecondition
    );
    assert_eq!(sandbox.stats("c").await.unwrap().pids.current, 42);
    sandbox.signal(&init, 15, false).await.unwrap();
    assert_eq!(sandbox.wait(&init).await.unwrap().status, 143);
    assert_eq!(sandbox.state(&init).await.unwrap().status, Status::Stopped);
    assert_eq!(
        sandbox.signal(&init, 9, false).await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
    // A fake's output stream ends when the fake closes it, which is at once.
    let deleted = sandbox.delete(&init).await.unwrap();
    assert_eq!((deleted.pid, deleted.exit.status), (pid, 143));
    assert_eq!(
        sandbox.delete(&init).await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
    assert_eq!(in_vm(&sandbox).await, Vec::<String>::new());
    let mut text = String::new();
    std::io::Read::read_to_string(&mut output, &mut text).unwrap();
    assert_eq!(text, "written by the fake\n");
    sandbox.shutdown().await;
    assert!(!is_alive(pid));
    assert_eq!(
        story(events).await,
        ["c created", "c started", "c exited 143", "c deleted", "end"]
    );
}

async fn an_agent_of_another_version_is_refused(place: &Place) {
    let (sandbox, events) = place.start("another-version");
    let error = sandbox.ready().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition, "{error}");
    assert!(error.to_string().contains("version 2"), "{error}");
    let again = sandbox
        .create_container(place.container("c", "runs"))
        .await
        .unwrap_err();
    assert_eq!(again.to_string(), error.to_string());
    assert_eq!(sandbox.exited().await.cause, SandboxExitCause::StartFailed);
    assert!(sandbox.containers().is_empty());
    assert_eq!(story(events).await, ["end"]);
}

async fn a_guest_that_never_says_hello_is_given_up_with_its_console(place: &Place) {
    let (sandbox, _events) = place.start("says-nothing");
    let error = sandbox.ready().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    let text = error.to_string();
    assert!(
        text.contains("within 1 s") && text.contains("booting | stuck in the fake guest"),
        "{text}"
    );
    let exit = sandbox.exited().await;
    assert_eq!(exit.cause, SandboxExitCause::StartFailed);
    assert!(!is_alive(sandbox.vmm_pid().unwrap()));
}

async fn a_guest_that_panics_in_boot_is_reported_with_its_console(place: &Place) {
    let (sandbox, _events) = place.start("panics-in-boot");
    let text = sandbox.ready().await.unwrap_err().to_string();
    assert!(
        text.contains("the guest kernel panicked") && text.contains("no init found"),
        "{text}"
    );
}

async fn a_guest_that_dies_in_the_handshake_is_not_waited_for(place: &Place) {
    let (sandbox, _events) = place.start("dies-after-hello");
    let text = sandbox.ready().await.unwrap_err().to_string();
    assert!(text.contains("triple fault"), "{text}");
    assert_eq!(sandbox.exited().await.cause, SandboxExitCause::StartFailed);
}

async fn a_vmm_that_dies_at_once_is_reported_with_its_words(place: &Place) {
    let (sandbox, _events) = place.start("dies-at-once");
    let error = sandbox.ready().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    let text = error.to_string();
    assert!(
        text.contains("status 3") && text.contains("the fake VMM has had enough"),
        "{text}"
    );
}

async fn a_vmm_that_refuses_the_machine_is_quoted(place: &Place) {
    let (sandbox, _events) = place.start("refuses-the-machine");
    let text = sandbox.ready().await.unwrap_err().to_string();
    assert!(text.contains("KVM is out of sorts"), "{text}");
    sandbox.exited().await;
    assert!(!is_alive(sandbox.vmm_pid().unwrap()));
}

async fn a_missing_vmm_is_named(place: &Place) {
    let config = place.config(Path::new("/nonexistent/kata-rs-vmm"), "");
    let (sandbox, events) = Sandbox::start(spec("none"), config);
    let error = sandbox
        .create_container(place.container("c", "runs"))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
    assert!(error.to_string().contains("/nonexistent/kata-rs-vmm"), "{error}");
    assert_eq!(sandbox.vmm_pid(), None);
    assert_eq!(story(events).await, ["end"]);
    sandbox.shutdown().await;
}

async fn a_refused_container_leaves_nothing_attached(place: &Place) {
    let (sandbox, events) = place.start("ordinary");
    sandbox.ready().await.unwrap();
    let error = sandbox
        .create_container(place.container("c", "refused"))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(error.to_string().contains("the fake agent refuses it"), "{error}");
    assert_eq!(in_vm(&sandbox).await, Vec::<String>::new());
    assert!(sandbox.containers().is_empty());
    let mut broken = place.container("c", "runs");
    broken.spec_json.truncate(20);
    assert_eq!(
        sandbox.create_container(broken).await.unwrap_err().kind(),
        ErrorKind::InvalidArgument
    );
    place.running(&sandbox, "c", "runs").await;
    let twice = sandbox
        .create_container(place.container("c", "runs"))
        .await
        .unwrap_err();
    assert_eq!(twice.kind(), ErrorKind::AlreadyExists);
    sandbox.shutdown().await;
    assert_eq!(
        story(events).await,
        ["c created", "c started", "c exited 137", "end"]
    );
}

fn limits(cpus: u32, mib: u64) -> Vec<u8> {
    serde_json::to_vec(&serde_json::json!({
        "cpu": { "quota": cpus * 100_000, "period": 100_000 },
        "memory": { "limit": mib << 20 },
    }))
    .unwrap()
}

/// What was done about the VM's size.
async fn sizes(sandbox: &Sandbox) -> Vec<String> {
    let all = in_vm(sandbox).await;
    let words = ["vcpus", "online", "plugged", "update"];
    let is_size = |line: &String| words.iter().any(|word| line.starts_with(word));
    all.into_iter().filter(is_size).collect()
}

async fn a_vm_grows_before_its_container_and_shrinks_after_it(place: &Place) {
    let (sandbox, _events) = place.start("ordinary");
    place.running(&sandbox, "c", "runs").await;
    sandbox.update("c", &limits(2, 640)).await.unwrap();
    // 640 + 10 + 64, of which 512 are there.
    let grown = ["vcpus 2", "online 2", "plugged 202", "update c"];
    assert_eq!(sizes(&sandbox).await, grown);
    sandbox.update("c", br#"{"pids":{"limit":5}}"#).await.unwrap();
    assert_eq!(sizes(&sandbox).await[4..], ["update c"]);
    sandbox.update("c", &limits(1, 256)).await.unwrap();
    assert_eq!(sizes(&sandbox).await[5..], ["update c", "online 1", "plugged 0"]);
    // The vCPU that was made is still there, and what cannot be is said by its key.
    let error = sandbox.update("c", &limits(5, 256)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
    assert!(error.to_string().contains("5 vCPUs"), "{error}");
    assert!(error.to_string().contains("`max_vcpus`"), "{error}");
    let error = sandbox.update("c", &limits(1, 1000)).await.unwrap_err();
    assert!(error.to_string().contains("1024 MiB at most"), "{error}");
    assert!(error.to_string().contains("`max_memory_mib`"), "{error}");
    assert_eq!(sizes(&sandbox).await.len(), 8, "a refused update changes nothing");
    sandbox.shutdown().await;
}

async fn a_vm_that_cannot_grow_leaves_its_container_as_it_is(place: &Place) {
    let (sandbox, _events) = place.start("plugs-nothing");
    place.running(&sandbox, "c", "runs").await;
    let error = sandbox.update("c", &limits(2, 640)).await.unwrap_err();
    assert!(error.to_string().contains("no memory today"), "{error}");
    assert_eq!(
        sizes(&sandbox).await,
        ["vcpus 2", "online 2", "online 1"],
        "what had grown shrinks again"
    );
    sandbox.shutdown().await;
}

async fn a_container_that_comes_later_makes_the_vm_grow(place: &Place) {
    let (sandbox, _events) = place.start("ordinary");
    let limited = |id: &str| {
        let mut request = place.container(id, "runs");
        let mut spec: serde_json::Value = serde_json::from_slice(&request.spec_json).unwrap();
        spec["linux"]["resources"] = serde_json::from_slice(&limits(1, 400)).unwrap();
        request.spec_json = serde_json::to_vec(&spec).unwrap();
        request
    };
    sandbox.create_container(limited("a")).await.unwrap();
    assert_eq!(sizes(&sandbox).await, Vec::<String>::new());
    sandbox.create_container(limited("b")).await.unwrap();
    // 800 + 12 + 64 - 512.
    assert_eq!(sizes(&sandbox).await, ["vcpus 2", "online 2", "plugged 364"]);
    // More than there can be is no limit for a container that comes.
    sandbox.create_container(limited("c")).await.unwrap();
    assert_eq!(sizes(&sandbox).await[3..], ["vcpus 3", "online 3", "plugged 512"]);
    for id in ["c", "b"] {
        sandbox.delete(&ProcessId::init(id)).await.unwrap();
    }
    // Nobody waits for it to shrink.
    while sizes(&sandbox)
        .await
        .last()
        .is_none_or(|last| last != "plugged 0")
    {
        tokio::task::yield_now().await;
    }
    sandbox.shutdown().await;
}

async fn a_missing_netns_is_named_and_undone(place: &Place) {
    let (sandbox, _events) = place.start("ordinary");
    let mut request = place.container("c", "runs");
    request.spec_json = oci(
        "runs",
        &serde_json::json!([{ "type": "network", "path": "/run/netns/nonexistent" }]),
    );
    let error = sandbox.create_container(request).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(error.to_string().contains("/run/netns/nonexistent"), "{error}");
    assert_eq!(in_vm(&sandbox).await, Vec::<String>::new());
    let mut request = place.container("c", "runs");
    request.spec_json = oci("runs", &serde_json::json!([{ "type": "network" }]));
    let pid = sandbox.create_container(request).await.unwrap();
    let netns = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    assert_ne!(netns(&pid.to_string()), netns("self"));
    sandbox.start_process(&ProcessId::init("c")).await.unwrap();
    sandbox.create_exec(exec("c", "e", "runs")).await.unwrap();
    let exec = sandbox.start_process(&ProcessId::exec("c", "e")).await.unwrap();
    assert_eq!(netns(&pid.to_string()), netns(&exec.to_string()));
}

async fn an_exit_before_the_answer_comes_after_the_start(place: &Place) {
    let (sandbox, events) = place.start("ordinary");
    place.running(&sandbox, "c", "exits-before-the-answer").await;
    assert_eq!(sandbox.wait(&ProcessId::init("c")).await.unwrap().status, 5);
    sandbox.shutdown().await;
    assert_eq!(
        story(events).await,
        ["c created", "c started", "c exited 5", "end"]
    );
}

async fn a_missing_executable_can_only_be_deleted(place: &Place) {
    let (sandbox, events) = place.start("ordinary");
    place.running(&sandbox, "c", "runs").await;
    sandbox.create_exec(exec("c", "e", "missing")).await.unwrap();
    let process = ProcessId::exec("c", "e");
    let waiter = tokio::spawn({
        let (sandbox, process) = (sandbox.clone(), process.clone());
        async move { sandbox.wait(&process).await }
    });
    let error = sandbox.start_process(&process).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ExecutableNotFound);
    assert!(error.to_string().contains("no such file or directory"), "{error}");
    assert_eq!(waiter.await.unwrap().unwrap().status, 127);
    assert_eq!(sandbox.state(&process).await.unwrap().status, Status::Stopped);
    assert_eq!(
        sandbox.start_process(&process).await.unwrap_err().kind(),
        ErrorKind::FailedPrecondition
    );
    sandbox.delete(&process).await.unwrap();
    assert_eq!(
        sandbox.state(&process).await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
    assert!(!in_vm(&sandbox).await.contains(&"process c/e".to_owned()));
    assert_eq!(sandbox.processes("c").await.unwrap().len(), 1);
    sandbox.shutdown().await;
    assert_eq!(
        story(events).await,
        [
            "c created",
            "c started",
            "e added",
            "e deleted",
            "c exited 137",
            "end"
        ]
    );
}

async fn a_killed_vmm_ends_every_process_in_order(place: &Place) {
    let (sandbox, events) = place.start("ordinary");
    let pid = place.running(&sandbox, "c", "runs").await;
    sandbox
        .create_container(place.container("waiting", "runs"))
        .await
        .unwrap();
    sandbox.create_exec(exec("c", "e", "runs")).await.unwrap();
    sandbox.start_process(&ProcessId::exec("c", "e")).await.unwrap();
    sandbox.create_exec(exec("c", "never", "runs")).await.unwrap();
    sandbox.stats("c").await.unwrap();
    let vmm = rustix::process::Pid::from_raw(sandbox.vmm_pid().unwrap().cast_signed()).unwrap();
    rustix::process::kill_process(vmm, rustix::process::Signal::KILL).unwrap();
    let init = ProcessId::init("c");
    assert_eq!(sandbox.wait(&init).await.unwrap().status, 137);
    let exit = sandbox.exited().await;
    assert_eq!(exit.cause, SandboxExitCause::VmmDied);
    assert!(exit.message.contains("signal 9 killed it"), "{}", exit.message);
    // What can still be asked, and what not.
    assert_eq!(
        sandbox.stats("c").await.unwrap().pids.current,
        42,
        "the last reading"
    );
    assert_eq!(
        sandbox.signal(&init, 9, false).await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
    assert_eq!(
        sandbox.guest_info().await.unwrap_err().kind(),
        ErrorKind::Unavailable
    );
    let late = sandbox
        .create_container(place.container("late", "runs"))
        .await
        .unwrap_err();
    assert_eq!(late.kind(), ErrorKind::Unavailable, "{late}");
    sandbox.delete(&init).await.unwrap();
    sandbox.delete(&ProcessId::init("waiting")).await.unwrap();
    sandbox.shutdown().await;
    assert!(!is_alive(pid));
    assert_eq!(
        story(events).await,
        [
            "c created",
            "c started",
            "waiting created",
            "e added",
            "e started",
            "never added",
            "e exited 137",
            "c exited 137",
            "waiting exited 137",
            "end"
        ]
    );
}

async fn a_guest_that_panics_is_told_from_a_killed_vmm(place: &Place) {
    let (sandbox, events) = place.start("ordinary");
    sandbox
        .create_container(place.container("c", "panics-the-guest"))
        .await
        .unwrap();
    let error = sandbox.start_process(&ProcessId::init("c")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("Kernel panic: as told"), "{error}");
    assert_eq!(sandbox.exited().await.cause, SandboxExitCause::GuestCrashed);
    assert_eq!(sandbox.wait(&ProcessId::init("c")).await.unwrap().status, 137);
    assert_eq!(story(events).await, ["c created", "end"]);
}

async fn an_agent_that_hangs_up_ends_the_vm(place: &Place) {
    let (sandbox, _events) = place.start("ordinary");
    place.running(&sandbox, "other", "runs").await;
    sandbox
        .create_container(place.container("c", "takes-the-agent-down"))
        .await
        .unwrap();
    let error = sandbox.start_process(&ProcessId::init("c")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert_eq!(sandbox.wait(&ProcessId::init("other")).await.unwrap().status, 137);
    assert_eq!(sandbox.exited().await.cause, SandboxExitCause::AgentLost);
    assert!(!is_alive(sandbox.vmm_pid().unwrap()));
}

async fn an_out_of_memory_comes_before_its_exit(place: &Place) {
    let (sandbox, events) = place.start("ordinary");
    place.running(&sandbox, "c", "is-out-of-memory").await;
    assert_eq!(sandbox.wait(&ProcessId::init("c")).await.unwrap().status, 137);
    sandbox.shutdown().await;
    let story = story(events).await;
    let at = |word: &str| story.iter().position(|event| event == word).unwrap();
    assert!(at("c out of memory") < at("c exited 137"), "{story:?}");
}

async fn a_killed_host_process_kills_its_container(place: &Place) {
    let (sandbox, _events) = place.start("ordinary");
    for (id, signal) in [
        ("kill", rustix::process::Signal::KILL),
        ("term", rustix::process::Signal::TERM),
    ] {
        let pid = place.running(&sandbox, id, "runs").await;
        let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
        let exit = sandbox.wait(&ProcessId::init(id)).await.unwrap();
        assert_eq!(exit.status, 128 + signal.as_raw().cast_unsigned());
    }
}

async fn a_paused_container_takes_no_exec(place: &Place) {
    let (sandbox, events) = place.start("ordinary");
    place.running(&sandbox, "c", "runs").await;
    assert_eq!(
        sandbox.resume("c").await.unwrap_err().kind(),
        ErrorKind::FailedPrecondition
    );
    sandbox.create_exec(exec("c", "e", "runs")).await.unwrap();
    sandbox.pause("c").await.unwrap();
    assert_eq!(
        sandbox.state(&ProcessId::init("c")).await.unwrap().status,
        Status::Paused
    );
    assert_eq!(
        sandbox.pause("c").await.unwrap_err().kind(),
        ErrorKind::FailedPrecondition
    );
    let process = ProcessId::exec("c", "e");
    assert_eq!(
        sandbox.start_process(&process).await.unwrap_err().kind(),
        ErrorKind::FailedPrecondition
    );
    sandbox.resume("c").await.unwrap();
    sandbox.start_process(&process).await.unwrap();
    assert_eq!(
        sandbox.update("c", b"{\"pids\": 3}").await.unwrap_err().kind(),
        ErrorKind::InvalidArgument
    );
    sandbox.update("c", b"{\"pids\": {\"limit\": 3}}").await.unwrap();
    sandbox.shutdown().await;
    assert_eq!(
        story(events).await,
        [
            "c created",
            "c started",
            "e added",
            "c paused",
            "c resumed",
            "e started",
            "e exited 137",
            "c exited 137",
            "end"
        ]
    );
}

async fn execs_are_told_apart(place: &Place) {
    let (sandbox, _events) = place.start("ordinary");
    let init = place.running(&sandbox, "c", "runs").await;
    sandbox.create_exec(exec("c", "e", "runs")).await.unwrap();
    let process = ProcessId::exec("c", "e");
    assert_eq!(sandbox.state(&process).await.unwrap().pid, 0);
    assert_eq!(
        sandbox
            .create_exec(exec("c", "e", "runs"))
            .await
            .unwrap_err()
            .kind(),
        ErrorKind::AlreadyExists
    );
    assert_eq!(
        sandbox.signal(&process, 9, false).await.unwrap_err().kind(),
        ErrorKind::FailedPrecondition
    );
    let nobody = sandbox
        .create_exec(exec("nobody", "e", "runs"))
        .await
        .unwrap_err();
    assert_eq!(nobody.kind(), ErrorKind::NotFound);
    let pid = sandbox.start_process(&process).await.unwrap();
    let pids: Vec<u32> = sandbox
        .processes("c")
        .await
        .unwrap()
        .iter()
        .map(|entry| entry.pid)
        .collect();
    assert_eq!(pids, [init, pid]);
    assert_eq!(
        sandbox.delete(&process).await.unwrap_err().kind(),
        ErrorKind::FailedPrecondition
    );
    sandbox.signal(&process, 9, false).await.unwrap();
    assert_eq!(sandbox.wait(&process).await.unwrap().status, 137);
    assert_eq!(sandbox.delete(&process).await.unwrap().pid, pid);
    assert_eq!(
        sandbox.wait(&process).await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
    assert_eq!(
        sandbox.state(&ProcessId::init("c")).await.unwrap().status,
        Status::Running
    );
    sandbox.signal(&ProcessId::init("c"), 9, true).await.unwrap();
    sandbox.wait(&ProcessId::init("c")).await.unwrap();
    let stopped = sandbox.create_exec(exec("c", "e", "runs")).await.unwrap_err();
    assert_eq!(stopped.kind(), ErrorKind::FailedPrecondition);
}

/// A container with a hook of each kind that runs on the host; each writes a line to `log`.
/// A request for the container that CRI calls the pod's sandbox. Neither its program nor its root file system exist.
fn pause(place: &Place, id: &str) -> ContainerRequest {
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

async fn a_pods_sandbox_is_nothing_in_the_guest_and_outlives_its_containers(place: &Place) {
    let (sandbox, events) = place.start("ordinary");
    let (pod, init) = (ProcessId::init("pod"), ProcessId::init("c"));
    let pid = sandbox.create_container(pause(place, "pod")).await.unwrap();
    assert_eq!(sandbox.state(&pod).await.unwrap().status, Status::Created);
    assert_eq!(sandbox.start_process(&pod).await.unwrap(), pid);
    assert_eq!(sandbox.state(&pod).await.unwrap().status, Status::Running);
    let netns = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    assert_ne!(netns(&pid.to_string()), netns("self"));
    assert_eq!(in_vm(&sandbox).await, Vec::<String>::new());
    for refused in [
        sandbox.create_exec(exec("pod", "e", "runs")).await,
        sandbox.update("pod", b"{}").await,
        sandbox.pause("pod").await,
    ] {
        let error = refused.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unimplemented, "{error}");
        assert!(error.to_string().contains("the sandbox of a pod"), "{error}");
    }
    sandbox.stats("pod").await.unwrap();
    // A container can be made anew in the same VM, as often as wanted.
    for _ in 0..2 {
        place.running(&sandbox, "c", "runs").await;
        sandbox.signal(&init, 9, false).await.unwrap();
        sandbox.wait(&init).await.unwrap();
        sandbox.delete(&init).await.unwrap();
    }
    assert_eq!(sandbox.containers(), ["pod"]);
    for harmless in [0, 28] {
        sandbox.signal(&pod, harmless, false).await.unwrap();
        assert_eq!(sandbox.state(&pod).await.unwrap().status, Status::Running);
    }
    sandbox.signal(&pod, 9, true).await.unwrap();
    assert_eq!(sandbox.wait(&pod).await.unwrap().status, 137);
    assert_eq!(
        sandbox.signal(&pod, 9, false).await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
    let deleted = sandbox.delete(&pod).await.unwrap();
    assert_eq!((deleted.pid, deleted.exit.status), (pid, 137));
    sandbox.ready().await.unwrap();

    // Its host process is the pod's as well: who kills it ends the pod's sandbox.
    let pid = sandbox.create_container(pause(place, "again")).await.unwrap();
    sandbox.start_process(&ProcessId::init("again")).await.unwrap();
    // SAFETY: the process is one that this test was given.
    unsafe { libc::kill(pid.cast_signed(), libc::SIGTERM) };
    assert_eq!(sandbox.wait(&ProcessId::init("again")).await.unwrap().status, 143);
    sandbox.shutdown().await;
    assert_eq!(
        story(events).await,
        [
            "pod created",
            "pod started",
            "c created",
            "c started",
            "c exited 137",
            "c deleted",
            "c created",
            "c started",
            "c exited 137",
            "c deleted",
            "pod exited 137",
            "pod deleted",
            "again created",
            "again started",
            "again exited 143",
            "end",
        ]
    );
}

/// A container of a pod with the pod's namespaces but for one.
fn member(place: &Place, id: &str, word: &str, pod: u32, pid: &serde_json::Value) -> ContainerRequest {
    let at = |kind: &str| serde_json::json!({ "type": kind, "path": format!("/proc/{pod}/ns/{kind}") });
    let mut namespaces = vec![
        serde_json::json!({ "type": "network", "path": format!("/proc/{pod}/ns/net") }),
        at("ipc"),
        at("uts"),
    ];
    if !pid.is_null() {
        namespaces.push(pid.clone());
    }
    let mut spec: serde_json::Value =
        serde_json::from_slice(&oci(word, &serde_json::json!(namespaces))).unwrap();
    spec["annotations"] = serde_json::json!({ "io.kubernetes.cri.container-type": "container" });
    spec["process"]["oomScoreAdj"] = 300.into();
    ContainerRequest {
        spec_json: serde_json::to_vec(&spec).unwrap(),
        ..place.container(id, word)
    }
}

async fn namespaces_are_told_by_the_pids_of_the_pods_own_processes(place: &Place) {
    let (sandbox, _events) = place.start("ordinary");
    let pod = sandbox.create_container(pause(place, "pod")).await.unwrap();
    sandbox.start_process(&ProcessId::init("pod")).await.unwrap();
    let own = serde_json::json!({ "type": "pid" });
    let other = sandbox
        .create_container(member(place, "c", "runs", pod, &own))
        .await
        .unwrap();
    let at = |pid: u32| serde_json::json!({ "type": "pid", "path": format!("/proc/{pid}/ns/pid") });
    let told = async |pid: serde_json::Value| {
        let request = member(place, "t", "tells-its-pid-namespace", pod, &pid);
        sandbox.create_container(request).await.unwrap_err().to_string()
    };
    // The VM is spared by the host's out-of-memory killer as its containers are, not as `pause`.
    let score = || {
        let vmm = sandbox.vmm_pid().unwrap();
        std::fs::read_to_string(format!("/proc/{vmm}/oom_score_adj")).unwrap()
    };
    assert_eq!(score().trim(), "300");
    assert!(told(own.clone()).await.ends_with("pids of its own"));
    assert!(told(at(pod)).await.ends_with("pids of the pod"));
    assert!(told(at(other)).await.ends_with("pids of c"));
    assert!(told(serde_json::Value::Null).await.ends_with("pids of the guest"));
    assert!(told(at(1)).await.ends_with("pids of the guest"));
    let stranger = std::process::id();
    let foreign = told(at(stranger)).await;
    assert!(
        foreign.contains(&format!("/proc/{stranger}/ns/pid cannot be joined")),
        "{foreign}"
    );
    // A pid that was one of the pod's is nobody's once its process has ended.
    sandbox.signal(&ProcessId::init("c"), 9, false).await.unwrap();
    sandbox.wait(&ProcessId::init("c")).await.unwrap();
    let gone = told(at(other)).await;
    assert!(gone.contains("cannot be joined"), "{gone}");
}

async fn a_pod_in_a_namespace_of_the_host_is_refused(place: &Place) {
    let (sandbox, _events) = place.start("ordinary");
    let mut request = pause(place, "pod");
    let mut spec: serde_json::Value = serde_json::from_slice(&request.spec_json).unwrap();
    spec["linux"]["namespaces"] = serde_json::json!([{ "type": "ipc" }]);
    request.spec_json = serde_json::to_vec(&spec).unwrap();
    let error = sandbox.create_container(request).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(error.to_string().contains("hostNetwork: true"), "{error}");
    assert!(sandbox.containers().is_empty());
}

fn with_hooks(place: &Place, id: &str, create_runtime: &str) -> ContainerRequest {
    let log = place.path("log");
    let hook = |name: &str| {
        let write = format!(
            "echo {name} $(grep -o '\"status\":\"[a-z]*' | cut -d'\"' -f4) >> {}",
            log.display()
        );
        let script = match name {
            "createRuntime" => format!("{create_runtime}; {write}"),
            _ => write,
        };
        serde_json::json!([{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"] }])
    };
    let mut request = place.container(id, "runs");
    let mut spec: serde_json::Value = serde_json::from_slice(&request.spec_json).unwrap();
    spec["hooks"] = serde_json::json!({
        "createRuntime": hook("createRuntime"),
        "poststart": hook("poststart"),
        "poststop": hook("poststop"),
    });
    request.spec_json = serde_json::to_vec(&spec).unwrap();
    request
}

async fn hooks_run_around_the_container(place: &Place) {
    let (sandbox, _events) = place.start("ordinary");
    sandbox
        .create_container(with_hooks(place, "c", "true"))
        .await
        .unwrap();
    let log = || std::fs::read_to_string(place.path("log")).unwrap_or_default();
    assert_eq!(log(), "createRuntime creating\n");
    let init = ProcessId::init("c");
    sandbox.start_process(&init).await.unwrap();
    while log().lines().count() < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    sandbox.signal(&init, 9, false).await.unwrap();
    sandbox.wait(&init).await.unwrap();
    sandbox.delete(&init).await.unwrap();
    assert_eq!(
        log(),
        "createRuntime creating\npoststart running\npoststop stopped\n"
    );
}

async fn a_failed_hook_undoes_the_container(place: &Place) {
    let (sandbox, events) = place.start("ordinary");
    let error = sandbox
        .create_container(with_hooks(
            place,
            "c",
            "echo the network is out of order >&2; exit 3",
        ))
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("the network is out of order"),
        "{error}"
    );
    assert_eq!(in_vm(&sandbox).await, Vec::<String>::new());
    assert!(sandbox.containers().is_empty());
    let log = std::fs::read_to_string(place.path("log")).unwrap();
    assert_eq!(log, "poststop stopped\n");
    sandbox.shutdown().await;
    assert_eq!(story(events).await, ["end"]);
}

async fn the_vm_is_counted_in_its_cgroup_which_goes_with_it(place: &Place) {
    if !Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        println!("skipped: this host has no cgroup v2");
        return;
    }
    let name = format!("kata-rs-test-{}", std::process::id());
    let mut spec = spec("ordinary");
    spec.cgroups_path = Some(PathBuf::from(format!("/{name}/vm")));
    let vmm = std::env::current_exe().unwrap();
    let (sandbox, _events) = Sandbox::start(spec, place.config(&vmm, ""));
    sandbox.ready().await.unwrap();
    let cgroup = Path::new("/sys/fs/cgroup").join(name);
    let procs = std::fs::read_to_string(cgroup.join("vm/cgroup.procs")).unwrap();
    assert_eq!(procs.trim(), sandbox.vmm_pid().unwrap().to_string());
    sandbox.shutdown().await;
    assert!(!cgroup.exists());
}

async fn a_shutdown_ends_everything_and_may_be_repeated(place: &Place) {
    let (sandbox, events) = place.start("ordinary");
    let pid = place.running(&sandbox, "c", "runs").await;
    let vmm = sandbox.vmm_pid().unwrap();
    sandbox.shutdown().await;
    sandbox.shutdown().await;
    assert!(!is_alive(pid) && !is_alive(vmm));
    assert_eq!(sandbox.exited().await.cause, SandboxExitCause::Requested);
    assert_eq!(
        story(events).await,
        ["c created", "c started", "c exited 137", "end"]
    );
    // Also before the guest has come up.
    let (sandbox, _events) = place.start("says-nothing");
    sandbox.shutdown().await;
    assert_eq!(sandbox.ready().await.unwrap_err().kind(), ErrorKind::Unavailable);
}

async fn a_container_in_the_making_is_not_known_yet(place: &Place) {
    let (sandbox, _events) = place.start("says-nothing");
    let making = tokio::spawn({
        let (sandbox, request) = (sandbox.clone(), place.container("c", "runs"));
        async move { sandbox.create_container(request).await }
    });
    while sandbox.containers().is_empty() {
        tokio::task::yield_now().await;
    }
    let state = sandbox.state(&ProcessId::init("c")).await;
    assert_eq!(state.unwrap_err().kind(), ErrorKind::NotFound);
    sandbox.shutdown().await;
    assert!(making.await.unwrap().is_err());
}

async fn a_dropped_sandbox_leaves_no_process(place: &Place) {
    let (sandbox, mut events) = place.start("ordinary");
    let pid = place.running(&sandbox, "c", "runs").await;
    let vmm = sandbox.vmm_pid().unwrap();
    drop(sandbox);
    while events.next().await.is_some() {}
    assert!(!is_alive(pid) && !is_alive(vmm));
}

/// The sandbox's process is killed without a chance to clean up.
async fn a_dead_owner_leaves_no_process(place: &Place) {
    use std::io::{BufRead, BufReader};
    use std::os::unix::process::CommandExt;
    let mut owner = std::process::Command::new(std::env::current_exe().unwrap())
        .arg0("owner")
        .arg(place.dir.path())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(owner.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let pids: Vec<u32> = line.split_whitespace().map(|pid| pid.parse().unwrap()).collect();
    assert_eq!(pids.len(), 2, "{line:?}");
    assert!(pids.iter().all(|pid| is_alive(*pid)));
    owner.kill().unwrap();
    owner.wait().unwrap();
    // They are reaped by whoever adopts them: ended is what counts here.
    let ended = |pid: u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.is_empty()
            || stat
                .rsplit(')')
                .next()
                .is_some_and(|rest| rest.trim_start().starts_with('Z'))
    };
    while !pids.iter().all(|pid| ended(*pid)) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The process that is killed: says which processes it has, then waits for its end.
fn own(dir: &str) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    // The directory stays with the test that made it.
    let place = std::mem::ManuallyDrop::new(Place {
        dir: tempfile::Builder::new().prefix("owner").tempdir_in(dir).unwrap(),
    });
    for name in ["vmlinux", "guest.img"] {
        std::fs::copy(Path::new(dir).join(name), place.path(name)).unwrap();
    }
    std::fs::create_dir_all(place.path("bundle/rootfs")).unwrap();
    runtime.block_on(async {
        let (sandbox, _events) = place.start("ordinary");
        let pid = place.running(&sandbox, "c", "runs").await;
        println!("{} {pid}", sandbox.vmm_pid().unwrap());
        std::future::pending::<()>().await;
    });
}
