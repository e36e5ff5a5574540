//! Whole pods through CRI, as a kubelet drives them (with crictl): five containers in one VM that share their network
//! and a volume, restarts, probes, logs, statistics, port-forward; many of them at once; and nothing left behind.

use kata_rs_tests::{BUSYBOX, LeakCheck, Outcome, sh, unique};
use serde_json::{Value, json};

const NGINX: &str = "localhost/nginx:1";
/// How many pods run at once. Under emulation a pod of five takes tens of seconds: the full number of twenty is asked
/// for by this variable.
const PODS_VARIABLE: &str = "KATA_RS_TEST_PODS";
const PODS: usize = 3;

/// A pod's sandbox with a directory of its own on the host, removed with everything in it when the test ends.
struct Pod {
    id: String,
    name: String,
    directory: String,
}

/// What a kubelet would say of one container.
struct Container<'a> {
    name: &'a str,
    attempt: u32,
    image: &'a str,
    /// Empty for the image's own.
    command: &'a [&'a str],
    /// Where the pod's volume is in it.
    volume: &'a str,
}

/// A name server of the node, at the address that the pods ask: it knows one name, as 127.0.0.1.
struct NameServer(String);

/// Where the pods' name server is. Any pod network leads here by its gateway.
const NAME_SERVER: &str = "10.88.0.53";

impl NameServer {
    #[track_caller]
    fn start(name: &str) -> Self {
        let program = r#"
import socket, sys
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind((sys.argv[1], 53))
known = b"".join(bytes([len(label)]) + label.encode() for label in sys.argv[2].split(".")) + b"\0"
while True:
    query, client = server.recvfrom(512)
    question = query[12:query.index(0, 12) + 5]
    is_known, is_a = question[:-4] == known, question[-4:-2] == b"\0\1"
    count = int(is_known and is_a)
    # RFC 1035, section 4: authoritative; no error or no such name; an A record of 10 seconds.
    flags = b"\x85\x80" if is_known else b"\x85\x83"
    answer = b"\xc0\x0c\0\1\0\1\0\0\0\x0a\0\4" + bytes([127, 0, 0, 1])
    server.sendto(query[:2] + flags + b"\0\1\0" + bytes([count]) + b"\0\0\0\0" + question + answer * count, client)
"#;
        let started = sh(&format!(
            "ip address add {NAME_SERVER}/32 dev lo && \
             {{ setsid python3 -c '{program}' {NAME_SERVER} {name} >/dev/null 2>&1 & echo $!; }}"
        ));
        Self(started.ok().to_owned())
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        let _ = sh(&format!(
            "kill {}; ip address del {NAME_SERVER}/32 dev lo",
            self.0
        ));
    }
}

impl Pod {
    /// Starts a sandbox, with a name server of its own and room for little memory.
    #[track_caller]
    fn start() -> Self {
        let name = unique("pod");
        let directory = format!("/var/lib/kata-rs-test/{name}");
        let config = json!({
            "metadata": {"name": name, "namespace": "tests", "uid": name, "attempt": 0},
            "hostname": name,
            "log_directory": format!("{directory}/logs"),
            "dns_config": {"servers": [NAME_SERVER], "searches": ["tests.example"], "options": ["ndots:3"]},
            "labels": {
                "io.kubernetes.pod.name": name, "io.kubernetes.pod.namespace": "tests", "io.kubernetes.pod.uid": name
            },
            "linux": {
                "cgroup_parent": format!("/kata-rs-tests/{name}"),
                "resources": {"memory_limit_in_bytes": 64 << 20}
            }
        });
        let outcome = sh(&format!(
            "set -e; mkdir -p {directory}/logs {directory}/volume; echo '{config}' > {directory}/pod.json; \
             crictl runp --runtime kata-rs {directory}/pod.json"
        ));
        let id = outcome.ok().to_owned();
        Self { id, name, directory }
    }

    /// Creates and starts a container; its id.
    #[track_caller]
    fn add(&self, container: &Container<'_>) -> String {
        let Container {
            name,
            attempt,
            image,
            command,
            volume,
        } = container;
        let directory = &self.directory;
        let config = json!({
            "metadata": {"name": name, "attempt": attempt},
            "image": {"image": image},
            "command": command,
            "log_path": format!("{name}-{attempt}.log"),
            "mounts": [{"host_path": format!("{directory}/volume"), "container_path": volume}],
            "labels": {
                "io.kubernetes.container.name": name, "io.kubernetes.pod.name": self.name,
                "io.kubernetes.pod.namespace": "tests", "io.kubernetes.pod.uid": self.name
            },
            "linux": {}
        });
        sh(&format!(
            "set -e; cat > {directory}/{name}.json <<'END'\n{config}\nEND\n\
             id=$(crictl create {0} {directory}/{name}.json {directory}/pod.json); crictl start $id",
            self.id
        ))
        .ok()
        .to_owned()
    }

    /// The five of them: one that runs to its end before the others, a web server, a sidecar, a client, and one that
    /// crashes. Ids in this order.
    #[track_caller]
    fn five(&self) -> [String; 5] {
        let first = self.add(&Container {
            name: "init",
            attempt: 0,
            image: BUSYBOX,
            command: &[
                "sh",
                "-c",
                "echo made by the init container of $(hostname) > /data/index.html",
            ],
            volume: "/data",
        });
        exits(&first, 0);
        let web = self.add(&Container {
            name: "web",
            attempt: 0,
            image: NGINX,
            command: &[],
            volume: "/usr/share/nginx/html",
        });
        let sidecar = self.add(&Container {
            name: "sidecar",
            attempt: 0,
            image: BUSYBOX,
            command: &[
                "sh",
                "-c",
                "echo started > /data/beat; echo the sidecar runs; exec sleep 100000",
            ],
            volume: "/data",
        });
        let client = self.add(&Container {
            name: "client",
            attempt: 0,
            image: BUSYBOX,
            command: &["sleep", "100000"],
            volume: "/data",
        });
        [first, web, sidecar, client, self.crash(0)]
    }

    /// The container that crashes, for the nth time.
    #[track_caller]
    fn crash(&self, attempt: u32) -> String {
        let id = self.add(&Container {
            name: "crash",
            attempt,
            image: BUSYBOX,
            command: &["sh", "-c", "cat /proc/sys/kernel/random/boot_id; exit 7"],
            volume: "/data",
        });
        exits(&id, 7);
        id
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = sh(&format!(
            "crictl rmp --force {} >/dev/null 2>&1; rm -rf {}; rmdir /sys/fs/cgroup/kata-rs-tests/{} 2>/dev/null",
            self.id, self.directory, self.name
        ));
    }
}

/// Waits until a container has exited, with this status.
#[track_caller]
fn exits(id: &str, status: i64) {
    let outcome = sh(&format!(
        "i=0; while [ $i -lt 400 ] && [ \"$(crictl inspect {id} | jq -r .status.state)\" != CONTAINER_EXITED ]; do \
         i=$((i + 1)); sleep 0.2; done; crictl inspect {id}"
    ));
    let inspected: Value = serde_json::from_str(outcome.ok()).expect("crictl prints JSON");
    assert_eq!(inspected["status"]["state"], "CONTAINER_EXITED", "{inspected:#}");
    assert_eq!(inspected["status"]["exitCode"], status, "{inspected:#}");
}

#[track_caller]
fn exec(id: &str, command: &str) -> Outcome {
    sh(&format!("crictl exec --sync {id} {command}"))
}

/// Gets the page that the init container made, from another container of the pod.
#[track_caller]
fn page(client: &str) -> String {
    exec(
        client,
        "sh -c 'i=0; until wget -qO- http://127.0.0.1/ || [ $i = 50 ]; do i=$((i + 1)); sleep 0.2; done'",
    )
    .ok()
    .to_owned()
}

#[test]
fn five_containers_are_one_pod() {
    let leaks = leak_check();
    let pod = Pod::start();
    let [_, web, sidecar, client, crashed] = pod.five();

    // One network, one volume, one name, one resolver.
    assert_eq!(
        page(&client),
        format!("made by the init container of {}", pod.name)
    );
    let names = NameServer::start("page.tests.example");
    // By the search domain; both families are asked for, and the second has no address.
    let named = exec(&client, "wget -qO- http://page/");
    assert_eq!(named.ok(), page(&client));
    assert_ne!(exec(&client, "wget -qO- http://nopage/").status, 0);
    drop(names);
    assert_eq!(exec(&client, "cat /data/beat").ok(), "started");
    assert_eq!(exec(&client, "hostname").ok(), pod.name);
    let resolver = exec(&client, "cat /etc/resolv.conf");
    for line in [
        &*format!("nameserver {NAME_SERVER}"),
        "search tests.example",
        "options ndots:3",
    ] {
        assert!(resolver.ok().lines().any(|l| l == line), "{resolver:#?}");
    }

    // A crash is the container's alone, and its successor finds the same VM.
    let boot_id = exec(&client, "cat /proc/sys/kernel/random/boot_id")
        .ok()
        .to_owned();
    let host = sh("cat /proc/sys/kernel/random/boot_id").ok().to_owned();
    assert_ne!(boot_id, host);
    let again = pod.crash(1);
    assert_ne!(again, crashed);
    for id in [&crashed, &again] {
        assert_eq!(sh(&format!("crictl logs {id}")).ok(), boot_id);
    }
    assert_eq!(sh(&format!("crictl logs {sidecar}")).ok(), "the sidecar runs");

    // Probes: one that succeeds, one that fails, one that takes too long and leaves nothing in the guest.
    assert_eq!(exec(&web, "pgrep nginx").status, 0);
    assert_ne!(exec(&client, "sh -c 'exit 3'").status, 0);
    let late = sh(&format!("crictl exec --sync --timeout 2 {client} sleep 4321"));
    assert_ne!(late.status, 0, "{late:#?}");
    let left = exec(&client, "sh -c 'ps -o args | grep -c \"^sleep 4321\" || true'");
    assert_eq!(left.ok(), "0");

    // Numbers for whoever watches.
    let stats: Value =
        serde_json::from_str(sh(&format!("crictl stats --output json --pod {}", pod.id)).ok()).expect("JSON");
    let listed = stats["stats"].as_array().expect("a list");
    for id in [&web, &sidecar, &client] {
        let one = listed
            .iter()
            .find(|s| s["attributes"]["id"] == id.as_str())
            .unwrap_or_else(|| panic!("no {id} in {stats:#}"));
        let used = one["memory"]["workingSetBytes"]["value"]
            .as_str()
            .and_then(|v| v.parse::<u64>().ok());
        assert!(used.is_some_and(|bytes| bytes > 0), "{one:#}");
    }

    drop(pod);
    leaks.nothing_left();
}

#[test]
fn a_pods_port_is_forwarded_to_the_node() {
    let leaks = leak_check();
    let pod = Pod::start();
    let _ = pod.five();
    let got = sh(&format!(
        "crictl port-forward {} 18080:80 >/tmp/forward.log 2>&1 & pid=$!; \
         curl --silent --show-error --retry 100 --retry-delay 1 --retry-all-errors --max-time 120 http://127.0.0.1:18080/; s=$?; \
         kill $pid; wait $pid 2>/dev/null; cat /tmp/forward.log >&2; exit $s",
        pod.id
    ));
    assert_eq!(got.ok(), format!("made by the init container of {}", pod.name));
    drop(pod);
    leaks.nothing_left();
}

#[test]
fn many_pods_run_at_once_and_leave_nothing() {
    let leaks = leak_check();
    let count = std::env::var(PODS_VARIABLE).map_or(PODS, |n| n.parse().expect("a number of pods"));
    let pods: Vec<Pod> = (0..count).map(|_| Pod::start()).collect();
    let containers: Vec<_> = pods.iter().map(Pod::five).collect();
    for (pod, [.., client, _]) in pods.iter().zip(&containers) {
        assert_eq!(
            page(client),
            format!("made by the init container of {}", pod.name)
        );
    }
    let boots: std::collections::BTreeSet<String> = containers
        .iter()
        .map(|[.., client, _]| {
            exec(client, "cat /proc/sys/kernel/random/boot_id")
                .ok()
                .to_owned()
        })
        .collect();
    assert_eq!(boots.len(), count, "each pod has a kernel of its own");
    drop(pods);
    leaks.nothing_left();
}

/// A snapshot after one pod: the bridge, the chains and the parents of cgroups stay by design.
fn leak_check() -> LeakCheck {
    let warm = "/run/kata-rs-test-warm-pod";
    if sh(&format!("test -e {warm}")).status != 0 {
        let pod = Pod::start();
        let _ = pod.add(&Container {
            name: "warm",
            attempt: 0,
            image: NGINX,
            command: &[],
            volume: "/data",
        });
        drop(pod);
        let _ = sh(&format!("touch {warm}")).ok();
    }
    LeakCheck::begin()
}
