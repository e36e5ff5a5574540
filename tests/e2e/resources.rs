//! What a VM has of its host, and gives back: its size follows its containers' limits, both ways.

use kata_rs_tests::{Aside, BUSYBOX, IMAGES, Outcome, sh, unique};
use serde_json::json;

/// A container of `kata-rs run` that is removed when the test ends.
struct Sized(String);

impl Sized {
    /// Runs a container that waits, with these options and lines of configuration.
    #[track_caller]
    fn start(options: &str, config: &str) -> Self {
        let container = Self(unique("size"));
        let name = &container.0;
        let _ = sh(&format!(
            "printf '{config}' > /tmp/{name}.toml && \
             kata-rs run -d --name {name} --config /tmp/{name}.toml {options} {IMAGES}/busybox.oci.tar sleep 1000"
        ))
        .ok();
        container
    }

    fn exec(&self, script: &str) -> Outcome {
        sh(&format!("kata-rs exec {} sh -c '{script}'", self.0))
    }

    fn update(&self, options: &str) -> Outcome {
        sh(&format!("kata-rs update {options} {}", self.0))
    }

    /// CPUs and memory in MiB that the container sees.
    #[track_caller]
    fn seen(&self) -> (u64, u64) {
        let outcome = self.exec("nproc; grep MemTotal /proc/meminfo | tr -dc 0-9");
        let numbers: Vec<u64> = outcome.ok().lines().map(|line| line.parse().unwrap()).collect();
        (numbers[0], numbers[1] >> 10)
    }

    /// The VMM's resident memory in MiB: once it is below `below`, or the last of 60 readings.
    fn resident_below(&self, below: u64) -> u64 {
        let name = &self.0;
        sh(&format!(
            "pid=$(pgrep -f \"^kata-rs-vmm {name}\\$\"); n=0; while rss=$(awk '/VmRSS/{{print int($2/1024)}}' /proc/$pid/status); \
             [ $rss -ge {below} ] && [ $n -lt 60 ]; do sleep 1; n=$((n+1)); done; echo $rss"
        ))
        .ok()
        .parse()
        .unwrap()
    }

    /// Holds so many MiB in the container, and gives the VMM's resident memory and its cgroup's meanwhile, in MiB.
    fn hold(&self, mib: u64) -> (u64, u64) {
        let name = &self.0;
        // dd fills its buffer before it writes, and nobody reads.
        let outcome = sh(&format!(
            "kata-rs exec {name} sh -c 'dd if=/dev/zero bs={mib}M count=1 2>/dev/null | sleep 1000' & \
             pid=$(pgrep -f \"^kata-rs-vmm {name}\\$\"); n=0; \
             while used=$(kata-rs exec {name} sh -c 'cat /sys/fs/cgroup/memory.current'); \
             [ $((used >> 20)) -lt {mib} ] && [ $n -lt 60 ]; do sleep 1; n=$((n+1)); done; \
             awk '/VmRSS/{{print int($2/1024)}}' /proc/$pid/status; \
             awk '{{print int($1/1048576)}}' /sys/fs/cgroup/kata-rs/{name}/memory.current; \
             kata-rs exec {name} killall sleep 2>/dev/null; kata-rs exec {name} killall dd 2>/dev/null; wait"
        ));
        let numbers: Vec<u64> = outcome.ok().lines().map(|line| line.parse().unwrap()).collect();
        (numbers[0], numbers[1])
    }
}

impl Drop for Sized {
    fn drop(&mut self) {
        let _ = sh(&format!("kata-rs rm -f {0}; rm -f /tmp/{0}.toml", self.0));
    }
}

#[test]
fn a_container_is_resized_in_place_and_the_host_gets_its_memory_back() {
    let container = Sized::start(
        "--cpus 1 --memory 256m",
        r"max_vcpus = 4\nmax_memory_mib = 1024\n",
    );
    let (cpus, before) = container.seen();
    assert_eq!(cpus, 1);
    assert_eq!(container.update("--cpus 2 --memory 512m").ok(), "");
    let (cpus, grown) = container.seen();
    assert_eq!(cpus, 2);
    // 256 MiB, and what its kernel and its cgroup need beside them.
    assert!(
        (256..=264).contains(&(grown - before)),
        "{before} MiB became {grown} MiB"
    );
    assert_eq!(
        container
            .exec("cd /sys/fs/cgroup; cat cpu.max memory.max cpuset.cpus.effective")
            .ok(),
        "200000 100000\n536870912\n0-1"
    );
    // More than the VM had at boot: some of it lies in what was plugged.
    let (resident, counted) = container.hold(400);
    assert!(
        resident >= 400 && counted >= 400,
        "{resident} MiB resident, {counted} MiB in the cgroup"
    );
    assert_eq!(container.update("--cpus 1 --memory 256m").ok(), "");
    assert_eq!(container.seen(), (1, before));
    assert_eq!(container.exec("cat /sys/fs/cgroup/memory.max").ok(), "268435456");
    let after = container.resident_below(resident - 240);
    assert!(
        after < resident - 240,
        "{resident} MiB of the host were used, {after} MiB still are"
    );
    // And up again: what was unplugged once can be plugged.
    assert_eq!(container.update("--memory 512m").ok(), "");
    assert_eq!(container.seen(), (1, grown));
}

#[test]
fn memory_that_a_container_frees_goes_back_to_the_host() {
    // A VM that cannot be resized: what it gives back it gives by free page reporting.
    let container = Sized::start("--memory 640m", r"max_memory_mib = 0\n");
    let (resident, counted) = container.hold(512);
    assert!(
        resident >= 512 && counted >= 512,
        "{resident} MiB resident, {counted} MiB in the cgroup"
    );
    let after = container.resident_below(resident - 450);
    assert!(
        after < resident - 450,
        "512 MiB were freed in the guest, and the VMM went from {resident} MiB to {after} MiB"
    );
}

#[test]
fn limits_beyond_what_the_vm_can_have_are_refused_by_key() {
    let container = Sized::start("--memory 256m", r"max_vcpus = 2\nmax_memory_mib = 512\n");
    let cpus = container.update("--cpus 3");
    assert_eq!(cpus.status, 125, "{cpus:#?}");
    assert!(
        cpus.stderr.contains("3 vCPUs") && cpus.stderr.contains("`max_vcpus`"),
        "{cpus:#?}"
    );
    let memory = container.update("--memory 2g");
    assert_eq!(memory.status, 125, "{memory:#?}");
    assert!(
        memory.stderr.contains("512 MiB at most") && memory.stderr.contains("`max_memory_mib`"),
        "{memory:#?}"
    );
    assert_eq!(container.exec("cat /sys/fs/cgroup/memory.max").ok(), "268435456");
}

/// A pod of CRI with one container, of one CPU and 256 MiB.
struct Pod {
    name: String,
    id: String,
    container: String,
}

impl Pod {
    #[track_caller]
    fn start() -> Self {
        let name = unique("size");
        let resources =
            json!({"cpu_period": 100_000, "cpu_quota": 100_000, "memory_limit_in_bytes": 256 << 20});
        let pod = json!({
            "metadata": {"name": name, "namespace": "tests", "uid": name, "attempt": 0},
            "linux": {"cgroup_parent": format!("/kata-rs-tests/{name}"), "resources": resources}
        });
        let container = json!({
            "metadata": {"name": "one", "attempt": 0},
            "image": {"image": BUSYBOX},
            "command": ["sleep", "100000"],
            "linux": {"resources": resources}
        });
        let id = sh(&format!(
            "echo '{pod}' > /tmp/{name}.json; crictl runp --runtime kata-rs /tmp/{name}.json"
        ))
        .ok()
        .to_owned();
        let mut pod = Self {
            name,
            id,
            container: String::new(),
        };
        pod.container = sh(&format!(
            "set -e; echo '{container}' > /tmp/{0}-one.json; \
             id=$(crictl create {1} /tmp/{0}-one.json /tmp/{0}.json); crictl start $id",
            pod.name, pod.id
        ))
        .ok()
        .to_owned();
        pod
    }

    /// Sets the container's limits as a kubelet does for `kubectl patch pod --subresource resize`; what is seen in it
    /// then: CPUs, memory in MiB, and its cgroup's limits.
    #[track_caller]
    fn update(&self, cpus: u64, mib: u64) -> (u64, u64, String) {
        let id = &self.container;
        let outcome = sh(&format!(
            "set -e; crictl update --cpu-period 100000 --cpu-quota {} --memory {} {id} >/dev/null; \
             crictl exec --sync {id} sh -c \
             'nproc; grep MemTotal /proc/meminfo | tr -dc 0-9; echo; cd /sys/fs/cgroup; cat cpu.max memory.max'",
            cpus * 100_000,
            mib << 20
        ));
        let mut lines = outcome.ok().lines();
        let mut number = || {
            lines
                .next()
                .and_then(|line| line.parse::<u64>().ok())
                .expect("a number")
        };
        let (cpus, memory) = (number(), number() >> 10);
        (cpus, memory, lines.collect::<Vec<_>>().join(" "))
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = sh(&format!(
            "crictl rmp --force {} >/dev/null 2>&1; rm -f /tmp/{1}*.json; rmdir /sys/fs/cgroup/kata-rs-tests/{1} 2>/dev/null",
            self.id, self.name
        ));
    }
}

#[test]
fn a_pod_of_kubernetes_is_resized_in_place() {
    // The host may have one CPU.
    let configuration = Aside::new("/etc/kata-rs");
    let _ = sh("mkdir /etc/kata-rs; echo 'max_vcpus = 4' > /etc/kata-rs/config.toml").ok();
    let pod = Pod::start();
    drop(configuration);
    let (cpus, before, limits) = pod.update(1, 256);
    assert_eq!((cpus, &*limits), (1, "100000 100000 268435456"));
    let (cpus, grown, limits) = pod.update(2, 512);
    assert_eq!((cpus, &*limits), (2, "200000 100000 536870912"));
    assert!(
        (256..=264).contains(&(grown - before)),
        "{before} MiB became {grown} MiB"
    );
    let (cpus, after, limits) = pod.update(1, 256);
    assert_eq!((cpus, after, &*limits), (1, before, "100000 100000 268435456"));
}
