//! What a VM has of its host, and gives back: its size follows its containers' limits, both ways.

use kata_rs_tests::{IMAGES, Outcome, sh, unique};

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
