//! Resource limits hold in the guest, and the VM survives who runs into them.

use kata_rs_tests::{BUSYBOX, Container, DEBIAN, RUNTIME, sh, unique};

/// Takes memory until it is killed.
const BOMB: &str = "a = []\nwhile True: a.append(bytearray(1 << 20))";
/// ctr's default specification mounts no cgroup file system, and has no cgroup namespace: own limits are below /proc/self/cgroup.
const CGROUP: &str = "--mount type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro:nosuid:noexec:nodev";

#[test]
fn a_memory_bomb_is_killed_and_reported_and_the_vm_survives() {
    let container = Container::start(&format!("--memory-limit 67108864 {CGROUP}"), DEBIAN, "sleep 1000");
    let id = container.id();
    let events = format!("/tmp/{}", unique("events"));
    // The event stream must be open before the bomb goes off.
    let outcome = sh(&format!(
        "ctr events > {events} & e=$!; sleep 1; \
         ctr task exec --exec-id bomb {id} python3 -c '{BOMB}'; echo status=$?; sleep 1; kill $e; cat {events}; rm {events}"
    ));
    assert!(outcome.stdout.contains("status=137"), "{outcome:#?}");
    assert!(outcome.stdout.contains("/tasks/oom"), "{outcome:#?}");
    assert_eq!(
        container
            .exec("cat /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)/memory.max; echo alive")
            .ok(),
        "67108864\nalive"
    );
}

#[test]
fn memory_can_be_reserved_beyond_what_the_vm_has() {
    let id = unique("t");
    let outcome = sh(&format!(
        "ctr run --rm --runtime {RUNTIME} --memory-limit 67108864 {DEBIAN} {id} \
         python3 -c 'import mmap; print(len(mmap.mmap(-1, 8 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)))'"
    ));
    assert_eq!(outcome.ok(), "8589934592");
}

#[test]
fn a_container_whose_init_runs_out_of_memory_exits_with_137() {
    let id = unique("t");
    let outcome = sh(&format!(
        "ctr run --rm --runtime io.containerd.kata-rs.v2 --memory-limit 67108864 {DEBIAN} {id} python3 -c '{BOMB}'"
    ));
    assert_eq!(outcome.status, 137, "{outcome:#?}");
}

#[test]
fn a_cpu_quota_holds() {
    let container = Container::start(
        &format!("--cpu-quota 20000 --cpu-period 100000 {CGROUP}"),
        BUSYBOX,
        "sh -c 'while :; do :; done'",
    );
    // Both clocks are the guest's: used CPU time and uptime, in ms.
    let readings = container.exec(
        "cd /sys/fs/cgroup$(cut -d: -f3 /proc/1/cgroup); cat cpu.max; \
         now() { awk \"{print int(\\$1 * 1000)}\" /proc/uptime; awk \"/^usage_usec/{print int(\\$2 / 1000)}\" cpu.stat; }; \
         now; sleep 5; now",
    );
    let lines: Vec<&str> = readings.ok().lines().collect();
    assert_eq!(lines[0], "20000 100000", "{readings:#?}");
    let numbers: Vec<u64> = lines[1..].iter().map(|line| line.parse().unwrap()).collect();
    let (elapsed, used) = (numbers[2] - numbers[0], numbers[3] - numbers[1]);
    assert!(
        used > 0 && used * 100 < elapsed * 35,
        "a quota of 20 % let {used} ms of {elapsed} ms through"
    );
}

#[test]
fn a_fork_bomb_stops_at_the_pids_limit() {
    // ctr has no flag for it, so the spec is written by hand; its root.path names the root file system, as with Docker.
    let id = unique("t");
    let outcome = sh(&format!(
        r#"mkdir -p /tmp/{id}/rootfs && ctr images mount --rw {BUSYBOX} /tmp/{id}/rootfs >/dev/null &&
        ctr oci spec | jq '.root.path="/tmp/{id}/rootfs" | .process.terminal=false | .process.args=["sleep","1000"] | .process.env=["PATH=/bin"] | .linux.resources.pids={{"limit":32}} | .linux.cgroupsPath="/default/{id}" | .mounts+=[{{"destination":"/sys/fs/cgroup","type":"cgroup","source":"cgroup","options":["ro"]}}]' > /tmp/{id}/config.json &&
        ctr run -d --runtime {RUNTIME} --config /tmp/{id}/config.json {id}"#
    ));
    outcome.ok();
    let exec =
        |name: &str, script: &str| sh(&format!("ctr task exec --exec-id {name} {id} sh -c '{script}'"));
    let limit = exec(
        "limit",
        "cat /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)/pids.max",
    );
    let bomb = exec(
        "bomb",
        "i=0; while [ $i -lt 100 ]; do sleep 15 & i=$((i+1)); done; wait",
    );
    let alive = exec("alive", "echo alive");
    let _ = sh(&format!(
        "ctr task kill -s KILL {id}; sleep 1; ctr task rm -f {id}; ctr c rm {id}; ctr images unmount --rm /tmp/{id}/rootfs; rm -r /tmp/{id}"
    ));
    assert_eq!(limit.ok(), "32");
    assert!(bomb.stderr.contains("fork"), "{bomb:#?}");
    assert_eq!(alive.ok(), "alive");
}

#[test]
fn network_interfaces_keep_to_their_limits_in_both_directions() {
    const PER_SECOND: f64 = 50.0;
    /// Sends small packets to an address as fast as they go, for four seconds.
    const FLOOD: &str = "import socket, sys, time\n\
                         s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
                         s.setblocking(False)\n\
                         end = time.monotonic() + 4\n\
                         while time.monotonic() < end:\n\
                         \x20   try: s.sendto(b\"x\" * 100, (sys.argv[1], 9))\n\
                         \x20   except BlockingIOError: time.sleep(0.001)";
    let name = unique("n");
    let _cleanup = AtEnd(format!("ip netns del {name}; rm -f /tmp/{name}.toml"));
    let _ = sh(&format!(
        "set -e; ip netns add {name}; ip -n {name} link add eth0 type veth peer name {name}
         ip -n {name} link set {name} netns 1; ip addr add 10.99.7.1/24 dev {name}; ip link set {name} up
         ip -n {name} addr add 10.99.7.2/24 dev eth0; ip -n {name} link set eth0 up
         # A question who has an address would wait behind what is held back of the flood before.
         ip -n {name} neigh add 10.99.7.1 lladdr $(cat /sys/class/net/{name}/address) dev eth0
         ip neigh add 10.99.7.2 lladdr $(ip netns exec {name} cat /sys/class/net/eth0/address) dev {name}
         echo 'net_rx_limit = {{ operations_per_s = 50 }}' > /tmp/{name}.toml
         echo 'net_tx_limit = {{ operations_per_s = 50, bytes_per_s = 1000000000 }}' >> /tmp/{name}.toml"
    ))
    .ok();
    let options = format!("--with-ns network:/run/netns/{name} --runtime-config-path /tmp/{name}.toml");
    let container = Container::start(&options, DEBIAN, "sleep 1000");
    // Packets that the guest has received and sent, as it counts them: once the device has taken them.
    let count = || -> Vec<f64> {
        let counters = "cd /sys/class/net/eth0/statistics; cat rx_packets tx_packets";
        let outcome = container.exec(counters);
        outcome.ok().lines().map(|line| line.parse().unwrap()).collect()
    };
    for (direction, flood) in [
        (0, format!("python3 -c '{FLOOD}' 10.99.7.2")),
        (
            1,
            format!(
                "ctr task exec --exec-id flood {} python3 -c '{FLOOD}' 10.99.7.1",
                container.id()
            ),
        ),
    ] {
        let (start, before) = (std::time::Instant::now(), count()[direction]);
        let _ = sh(&flood).ok();
        let passed = count()[direction] - before;
        // A second's worth was saved up; a few are not the flood's.
        let most = PER_SECOND * (start.elapsed().as_secs_f64() + 1.0) + 20.0;
        assert!(
            passed <= most,
            "direction {direction}: {passed} packets, at most {most}"
        );
        assert!(
            passed >= PER_SECOND,
            "direction {direction}: only {passed} packets"
        );
    }
}

/// A script that runs however the test ends.
struct AtEnd(String);

impl Drop for AtEnd {
    fn drop(&mut self) {
        let _ = sh(&self.0);
    }
}
