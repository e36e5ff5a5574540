//! How a pod maps to a VM, through CRI and for both ways in which containerd keeps a pod's sandbox: namespaces,
//! restarts, probes, what is refused and with which words. Whole pods with network and volumes are in `pods_crictl`.

use kata_rs_tests::{BUSYBOX, LeakCheck, Outcome, sh, unique};
use serde_json::{Value, json};

/// CRI's namespace modes (cri-api, `NamespaceMode`).
const POD: u32 = 0;
const CONTAINER: u32 = 1;
const NODE: u32 = 2;
const TARGET: u32 = 3;

/// A pod's sandbox, removed with everything in it when the test ends.
struct Pod {
    id: String,
    directory: String,
}

/// Asks for a pod; `options` are CRI's namespace options, `annotations` the pod's.
#[track_caller]
fn run(handler: &str, options: &Value, annotations: &Value) -> (String, Outcome) {
    let name = unique("pod");
    let directory = format!("/run/kata-rs-test/{name}");
    let config = json!({
        "metadata": {"name": name, "namespace": "tests", "uid": name, "attempt": 0},
        "hostname": "pods-name",
        "log_directory": directory,
        "dns_config": {"servers": ["10.88.0.53"], "searches": ["tests.example"]},
        "annotations": annotations,
        "linux": {
            "cgroup_parent": format!("/kata-rs-tests/{name}"),
            "security_context": {"namespace_options": options}
        }
    });
    let outcome = sh(&format!(
        "mkdir -p {directory}; echo '{config}' > {directory}/pod.json; crictl runp --runtime {handler} {directory}/pod.json"
    ));
    (directory, outcome)
}

impl Pod {
    #[track_caller]
    fn start(handler: &str, annotations: &Value) -> Self {
        Self::with(handler, &json!({"pid": CONTAINER}), annotations)
    }

    #[track_caller]
    fn with(handler: &str, options: &Value, annotations: &Value) -> Self {
        let (directory, outcome) = run(handler, options, annotations);
        let id = outcome.ok().to_owned();
        Self { id, directory }
    }

    /// Creates and starts a container that runs a shell script; its id.
    #[track_caller]
    fn add(&self, script: &str, options: &Value, linux: &Value) -> String {
        let name = unique("c");
        let mut config = json!({
            "metadata": {"name": name, "attempt": 0},
            "image": {"image": BUSYBOX},
            "command": ["sh", "-c", script],
            "log_path": format!("{name}.log"),
            "linux": linux,
        });
        config["linux"]["security_context"]["namespace_options"] = options.clone();
        let directory = &self.directory;
        sh(&format!(
            "set -e; cat > {directory}/{name}.json <<'END'\n{config}\nEND\n\
             id=$(crictl create {} {directory}/{name}.json {directory}/pod.json); crictl start $id",
            self.id
        ))
        .ok()
        .to_owned()
    }

    /// A container that only waits.
    #[track_caller]
    fn sleeper(&self, options: &Value) -> String {
        self.add("exec sleep 100000", options, &json!({}))
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = sh(&format!(
            "crictl rmp --force {} >/dev/null 2>&1; rm -rf {}",
            self.id, self.directory
        ));
    }
}

/// Runs a shell script in a container.
#[track_caller]
fn exec(id: &str, script: &str) -> Outcome {
    let quoted = script.replace('\'', r"'\''");
    sh(&format!("crictl exec --sync {id} sh -c '{quoted}'"))
}

/// containerd 2.3 in the test host, until it is dropped: the first with a Sandbox service that works.
struct Containerd23;

impl Containerd23 {
    fn begin() -> Option<Self> {
        if sh("command -v use-containerd").status != 0 {
            println!("skipped: only the test host has a second containerd");
            return None;
        }
        let _ = sh("use-containerd 2.3").ok();
        Some(Self)
    }
}

impl Drop for Containerd23 {
    fn drop(&mut self) {
        let _ = sh("use-containerd 2.1");
    }
}

/// After one pod of the kind: the bridge, the chains and the parents of cgroups stay by design.
fn leak_check(handler: &str) -> LeakCheck {
    let warm = format!("/run/kata-rs-test-warm-{handler}");
    if sh(&format!("test -e {warm}")).status != 0 {
        let pod = Pod::start(handler, &json!({}));
        let _ = pod.sleeper(&json!({"pid": CONTAINER}));
        drop(pod);
        let _ = sh(&format!("touch {warm}")).ok();
    }
    LeakCheck::begin()
}

/// The life of a pod, which looks the same from outside whoever keeps its sandbox.
fn a_pods_life(handler: &str) {
    let leaks = leak_check(handler);
    let pod = Pod::start(handler, &json!({}));
    let first = pod.sleeper(&json!({"pid": CONTAINER}));
    let second = pod.sleeper(&json!({"pid": CONTAINER}));

    // One name, one resolver, one set of IPC objects, one /dev/shm; pids are each container's own.
    let same = "hostname; cat /etc/hostname /etc/resolv.conf /proc/sys/kernel/random/boot_id; \
                ls -l /proc/self/ns | grep -oE '(ipc|uts|net):.*'; stat -c %d /dev/shm";
    let told = exec(&first, same);
    assert_eq!(told.ok(), exec(&second, same).ok());
    let lines: Vec<&str> = told.ok().lines().collect();
    assert_eq!(
        lines[..4],
        [
            "pods-name",
            "pods-name",
            "search tests.example",
            "nameserver 10.88.0.53"
        ]
    );
    let boot_id = lines[4].to_owned();
    let _ = exec(&first, "echo shared > /dev/shm/file").ok();
    assert_eq!(exec(&second, "cat /dev/shm/file").ok(), "shared");
    assert_eq!(exec(&second, "ps -o args | grep -c '^sleep'").ok(), "1");

    // A probe whose time is up goes with all it had started.
    let late = sh(&format!(
        "crictl exec --sync --timeout 2 {first} sh -c 'sleep 4321 & sleep 4321; true'"
    ));
    assert!(late.status != 0 && late.stderr.contains("imeout"), "{late:#?}");
    assert_eq!(
        exec(&first, "ps -o args | grep -c '^sleep 4321' || true").ok(),
        "0"
    );

    // The VM outlives its last container, and containerd.
    let _ = sh(&format!(
        "crictl stop -t 0 {first} {second}; crictl rm {first} {second}"
    ))
    .ok();
    let state = format!("crictl inspectp {} | jq -r .status.state", pod.id);
    assert_eq!(sh(&state).ok(), "SANDBOX_READY");
    let _ = sh("restart-containerd").ok();
    assert_eq!(sh(&state).ok(), "SANDBOX_READY");
    let third = pod.sleeper(&json!({"pid": CONTAINER}));
    assert_eq!(exec(&third, "cat /proc/sys/kernel/random/boot_id").ok(), boot_id);

    // Who ends the VM ends the pod.
    let vmm = sh(&format!("pgrep -f '^kata-rs-vmm {}'", pod.id)).ok().to_owned();
    let _ = sh(&format!("kill -9 {vmm}")).ok();
    let ended = sh(&format!(
        "for i in $(seq 100); do [ \"$({state})\" = SANDBOX_NOTREADY ] && break; sleep 0.1; done; {state}; \
         crictl inspect {third} | jq -r '.status.state, .status.exitCode'"
    ));
    assert_eq!(
        ended.ok().lines().collect::<Vec<_>>(),
        ["SANDBOX_NOTREADY", "CONTAINER_EXITED", "137"]
    );
    drop(pod);
    leaks.nothing_left();
}

#[test]
fn a_pod_whose_sandbox_is_a_container_of_containerds() {
    a_pods_life("kata-rs");
}

#[test]
fn a_pod_whose_sandbox_is_the_shims() {
    if let Some(_newer) = Containerd23::begin() {
        a_pods_life("kata-rs-shim");
    }
}

#[test]
fn processes_see_those_that_the_pid_mode_says() {
    let pod = Pod::start("kata-rs", &json!({}));
    let own = pod.sleeper(&json!({"pid": CONTAINER}));
    let shared = pod.sleeper(&json!({"pid": POD}));
    let target = pod.sleeper(&json!({"pid": TARGET, "target_id": own}));
    let sees = |id: &str| {
        exec(id, "ps -o args | grep -c '^sleep'; cat /proc/1/comm")
            .ok()
            .to_owned()
    };
    assert_eq!(sees(&own), "2\nsleep", "itself and who joined it");
    assert_eq!(sees(&target), "2\nsleep");
    assert_eq!(
        sees(&shared),
        "1\npause",
        "the pod's own, which one container shares"
    );
    // What joined goes with the first process of its namespace.
    let _ = sh(&format!("crictl stop -t 0 {own}")).ok();
    let state = format!(
        "for i in $(seq 100); do s=$(crictl inspect {target} | jq -r .status.state); [ $s = CONTAINER_EXITED ] && break; \
         sleep 0.1; done; echo $s"
    );
    assert_eq!(sh(&state).ok(), "CONTAINER_EXITED");
    drop(pod);

    // "The host's" are the guest's: the agent, and every container's.
    let pod = Pod::with("kata-rs", &json!({"pid": NODE}), &json!({}));
    let (one, _other) = (
        pod.sleeper(&json!({"pid": NODE})),
        pod.sleeper(&json!({"pid": NODE})),
    );
    assert_eq!(exec(&one, "ps -o args | grep -c '^sleep'").ok(), "2");
    assert_eq!(exec(&one, "ps -o pid,args | grep -c '^ *2 .*kthreadd'").ok(), "1");
}

#[test]
fn what_a_vm_does_not_have_is_refused_in_words_that_help() {
    let refused = |options: &Value, annotations: &Value| {
        let (directory, outcome) = run("kata-rs", options, annotations);
        let _ = sh(&format!("rm -rf {directory}"));
        assert_ne!(outcome.status, 0, "{outcome:#?}");
        outcome.stderr
    };
    let text = refused(&json!({"network": NODE}), &json!({}));
    assert!(
        text.contains("hostNetwork: true") && text.contains("host_network = \\\"none\\\""),
        "{text}"
    );
    let text = refused(&json!({"ipc": NODE}), &json!({}));
    assert!(text.contains("remove hostIPC"), "{text}");
    let text = refused(&json!({}), &json!({"io.kata-rs.default_vcpus": "2"}));
    assert!(text.contains("enable_annotations"), "{text}");
    let text = refused(
        &json!({}),
        &json!({"io.katacontainers.config.hypervisor.virtio_fs_extra_args": "[\"-o\",\"source=/\"]"}),
    );
    assert!(text.contains("is not supported"), "{text}");
}

#[test]
fn a_container_that_runs_out_of_memory_is_told_from_one_that_was_killed() {
    let pod = Pod::start("kata-rs", &json!({}));
    let greedy = pod.add(
        "dd if=/dev/zero of=/dev/null bs=200M",
        &json!({"pid": CONTAINER}),
        &json!({"resources": {"memory_limit_in_bytes": 32 << 20}}),
    );
    let reason = sh(&format!(
        "for i in $(seq 200); do r=$(crictl inspect {greedy} | jq -r .status.reason); [ \"$r\" = OOMKilled ] && break; \
         sleep 0.1; done; crictl inspect {greedy} | jq -r '.status.reason, .status.exitCode'"
    ));
    assert_eq!(reason.ok(), "OOMKilled\n137");
}
