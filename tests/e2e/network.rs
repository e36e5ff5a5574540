//! A container's network through a real containerd: interfaces that a CNI plugin would have made, wired to the VM.
//!
//! Each test makes two network namespaces, the pod's and `outside`, and what connects them.

use kata_rs_tests::{BUSYBOX, Container, LeakCheck, RUNTIME, ctr_run, sh, unique};

/// A pod's network namespace and the world outside it; both go when the test ends.
struct Network {
    pod: String,
    outside: String,
}

impl Network {
    /// Two namespaces with nothing but their loopback interfaces.
    #[track_caller]
    fn bare() -> Self {
        let name = unique("n");
        let network = Self {
            pod: format!("{name}-pod"),
            outside: format!("{name}-out"),
        };
        for namespace in [&network.pod, &network.outside] {
            let _ = sh(&format!(
                "ip netns add {namespace} && ip -n {namespace} link set lo up"
            ))
            .ok();
        }
        network
    }

    /// The usual: a veth pair, 10.9.0.2 and fd09::2 in the pod, 10.9.0.1 and fd09::1 outside.
    #[track_caller]
    fn veth() -> Self {
        let network = Self::bare();
        network.set_up(
            "ip -n $P link add eth0 type veth peer name out0 netns $O
             ip -n $P addr add 10.9.0.2/24 dev eth0; ip -n $P addr add fd09::2/64 dev eth0 nodad
             ip -n $O addr add 10.9.0.1/24 dev out0; ip -n $O addr add fd09::1/64 dev out0 nodad
             ip -n $O link set out0 up; ip -n $P link set eth0 up
             ip -n $P route add default via 10.9.0.1; ip -n $P -6 route add default via fd09::1",
        );
        network
    }

    /// Runs a script in which $P and $O are the namespaces; each command must succeed.
    #[track_caller]
    fn set_up(&self, script: &str) {
        let _ = sh(&format!("set -e; P={}; O={}; {script}", self.pod, self.outside)).ok();
    }

    /// A container in the pod.
    #[track_caller]
    fn container(&self, image: &str, command: &str) -> Container {
        Container::start(&self.option(), image, command)
    }

    fn option(&self) -> String {
        format!("--with-ns network:/run/netns/{}", self.pod)
    }

    /// The namespace lives on without the sandbox: nothing is redirected in it any more.
    #[track_caller]
    fn is_as_before(&self) {
        let left = self.pod("nft list ruleset; tc qdisc show dev eth0; ip -o link");
        for gone in ["kata-rs", "ingress", "krtap"] {
            assert!(!left.ok().contains(gone), "{gone} is left: {left:#?}");
        }
    }

    /// Runs a script outside of the pod.
    fn outside(&self, script: &str) -> kata_rs_tests::Outcome {
        sh(&format!(
            "ip netns exec {} sh -c '{}'",
            self.outside,
            script.replace('\'', r"'\''")
        ))
    }

    /// Runs a script in the pod's namespace on the host, where containerd forwards ports from.
    fn pod(&self, script: &str) -> kata_rs_tests::Outcome {
        sh(&format!(
            "ip netns exec {} sh -c '{}'",
            self.pod,
            script.replace('\'', r"'\''")
        ))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = sh(&format!(
            "ip netns del {0}; ip netns del {1}; ip netns del {1}-far 2>/dev/null",
            self.pod, self.outside
        ));
    }
}

#[test]
fn a_veth_is_the_containers_own() {
    let leaks = LeakCheck::begin();
    let network = Network::veth();
    network.set_up(
        "ip -n $P neigh add 10.9.0.77 lladdr 0a:00:00:00:00:77 dev eth0 nud permanent
         ip -n $P route add 172.16.0.0/12 via 169.254.1.1 dev eth0 onlink mtu 1300
         ip -n $P route add default via 10.9.0.3 dev eth0 table 100; ip -n $P rule add from 10.9.0.2 tos 4 lookup 100 pref 50",
    );
    let container = network.container(BUSYBOX, "sleep 1000");

    // What the host's interface has is what the guest's has, and nothing more.
    let host = network.pod("cat /sys/class/net/eth0/address; ip -6 -o addr show dev eth0 | wc -l");
    let host: Vec<String> = host.ok().lines().map(str::to_owned).collect();
    let guest = container.exec(
        "cat /sys/class/net/eth0/address; ip -6 -o addr show dev eth0 | wc -l; ls /sys/class/net | wc -l",
    );
    let guest: Vec<&str> = guest.ok().lines().collect();
    assert_eq!(guest[0], host[0], "the address");
    assert_eq!(guest[1], host[1], "as many IPv6 addresses");
    assert_eq!(guest[2], "2", "lo and eth0");
    let seen = container.exec("ip addr show dev eth0; ip route; ip route show table 100; ip rule; ip neigh");
    for expected in [
        "inet 10.9.0.2/24 brd 10.9.0.255",
        "inet6 fd09::2/64",
        "default via 10.9.0.1 dev eth0",
        "172.16.0.0/12 via 169.254.1.1 dev eth0",
        "default via 10.9.0.3 dev eth0",
        "from 10.9.0.2",
        "10.9.0.77 dev eth0 lladdr 0a:00:00:00:00:77",
    ] {
        assert!(seen.ok().contains(expected), "{expected} is missing: {seen:#?}");
    }

    // Both families, both directions.
    let _ = container
        .exec("ping -c 2 -w 30 10.9.0.1 && ping -c 2 -w 30 fd09::1")
        .ok();
    let _ = network
        .outside("ping -c 2 -w 30 10.9.0.2 && ping -c 2 -w 30 fd09::2")
        .ok();

    // The host's interface counts what the container does.
    let counted = "cat /sys/class/net/eth0/statistics/rx_bytes /sys/class/net/eth0/statistics/tx_bytes";
    let count = |network: &Network| -> Vec<u64> {
        let outcome = network.pod(counted);
        outcome.ok().lines().map(|line| line.parse().unwrap()).collect()
    };
    let before = count(&network);
    let _ = container.exec("ping -c 20 -i 0.1 -s 1000 -w 60 10.9.0.1").ok();
    let after = count(&network);
    for (before, after) in before.iter().zip(&after) {
        assert!((20_000..60_000).contains(&(after - before)), "{before} {after}");
    }

    drop(container);
    drop(network);
    leaks.nothing_left();
}

#[test]
fn large_transfers_arrive_unchanged_both_ways_and_udp_finds_the_name_server() {
    let network = Network::veth();
    let container = network.container(BUSYBOX, "sleep 1000");
    network.set_up("head -c 33554432 /dev/urandom > /tmp/$P.bin; ip netns exec $O sh -c 'true'");
    let sum = sh(&format!("sha256sum < /tmp/{}.bin", network.pod));
    let sum = sum.ok().to_owned();

    // Into the container.
    let received = sh(&format!(
        "ctr task exec --exec-id in {id} sh -c 'nc -l -p 5001 | sha256sum' & \
         i=0; until ip netns exec {out} socat -u FILE:/tmp/{pod}.bin TCP:10.9.0.2:5001 2>/dev/null; do \
         i=$((i+1)); [ $i -lt 100 ] || exit 1; sleep 0.2; done; wait",
        id = container.id(),
        out = network.outside,
        pod = network.pod,
    ));
    assert_eq!(received.ok(), sum, "{received:#?}");

    // Out of it, over IPv6, with the same bytes.
    let sent = sh(&format!(
        "set -e; ip netns exec {out} socat -u TCP6-LISTEN:5002,reuseaddr OPEN:/tmp/{pod}.back,creat,trunc & \
         ctr task exec --exec-id feed {id} sh -c 'cat > /tmp/bin' < /tmp/{pod}.bin; \
         ctr task exec --exec-id out {id} sh -c 'nc fd09::1 5002 < /tmp/bin'; wait; sha256sum < /tmp/{pod}.back; rm /tmp/{pod}.b*",
        id = container.id(),
        out = network.outside,
        pod = network.pod,
    ));
    assert_eq!(sent.ok(), sum, "{sent:#?}");

    // A name server that knows one name.
    let server = r"
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(('10.9.0.1', 53))
while True:
    q, a = s.recvfrom(512)
    end = q.index(b'\0', 12) + 5
    answer = b'\xc0\x0c\0\x01\0\x01\0\0\0\x3c\0\x04\x0a\x09\0\x2a' if q[end - 4:end - 2] == b'\0\x01' else b''
    s.sendto(q[:2] + b'\x81\x80\0\x01\0' + bytes([1 if answer else 0]) + b'\0\0\0\0' + q[12:end] + answer, a)
";
    let script = format!("/tmp/{}.py", network.pod);
    let _ = kata_rs_tests::sh_with_input(&format!("cat > {script}"), server.as_bytes()).ok();
    let answer = sh(&format!(
        "ip netns exec {out} python3 {script} & server=$!; \
         ctr task exec --exec-id dns {id} sh -c 'echo nameserver 10.9.0.1 > /etc/resolv.conf; \
         for i in 1 2 3 4 5 6 7 8 9; do nslookup kata.example && break; sleep 1; done'; kill $server; rm {script}",
        out = network.outside,
        id = container.id(),
    ));
    assert!(answer.stdout.contains("10.9.0.42"), "{answer:#?}");
}

#[test]
fn small_and_large_mtus_two_interfaces_and_a_port_of_the_host() {
    let leaks = LeakCheck::begin();
    let network = Network::veth();
    network.set_up(
        "ip -n $P link set eth0 mtu 1400; ip -n $O link set out0 mtu 1400
         ip -n $P link add net1 mtu 9000 type veth peer name out1 netns $O
         ip -n $O link set out1 mtu 9000 up; ip -n $P link set net1 up
         ip -n $O addr add 10.10.0.1/24 dev out1; ip -n $P addr add 10.10.0.2/24 dev net1
         ip netns exec $O nft 'table ip nat { chain output { type nat hook output priority -100;
             ip daddr 192.0.2.1 tcp dport 8080 dnat to 10.9.0.2:80; }; }'
         ip -n $O route add 192.0.2.0/24 dev out0",
    );
    let container = network.container(
        BUSYBOX,
        "sh -c 'mkdir /tmp/w; echo hello > /tmp/w/index.html; exec httpd -f -p 80 -h /tmp/w'",
    );
    let links = container.exec("cat /sys/class/net/eth0/mtu /sys/class/net/net1/mtu; ip route");
    assert!(links.ok().starts_with("1400\n9000\n"), "{links:#?}");
    assert!(links.ok().contains("10.10.0.0/24 dev net1"), "{links:#?}");
    // With the headers exactly as much as fits, and unfragmented.
    let _ = network
        .outside("ping -M do -s 1372 -c 2 -w 30 10.9.0.2 && ping -M do -s 8972 -c 2 -w 30 10.10.0.2")
        .ok();
    let page = network.outside("echo | socat -t 30 - TCP:192.0.2.1:8080,retry=50,interval=0.2; printf 'GET / HTTP/1.0\\r\\n\\r\\n' | socat -t 30 - TCP:192.0.2.1:8080");
    assert!(page.ok().contains("hello"), "{page:#?}");
    drop(container);
    drop(network);
    leaks.nothing_left();
}

/// Interfaces that stand on another one outside of the pod, and a machine at the other end of that one's cable.
#[test]
fn macvlan_and_ipvlan_work() {
    let network = Network::bare();
    network.set_up(
        "ip netns add $O-far; ip -n $O link add low type veth peer name far netns $O-far
         ip -n $O link set low up; ip -n $O-far link set far up
         ip -n $O-far addr add 10.9.0.1/24 dev far; ip -n $O-far addr add fd09::1/64 dev far nodad",
    );
    let far = |script: &str| sh(&format!("ip netns exec {}-far {script}", network.outside));
    for options in ["macvlan mode bridge", "ipvlan mode l2"] {
        network.set_up(&format!(
            "ip -n $O link add link low name up0 type {options}; ip -n $O link set up0 netns $P; ip -n $P link set up0 name eth0
             ip -n $P addr add 10.9.0.2/24 dev eth0; ip -n $P addr add fd09::2/64 dev eth0 nodad; ip -n $P link set eth0 up"
        ));
        let container = network.container(BUSYBOX, "sleep 1000");
        let pings = container.exec("ping -c 2 -w 30 10.9.0.1 && ping -c 2 -w 30 fd09::1");
        assert_eq!(pings.status, 0, "{options}: {pings:#?}");
        for address in ["10.9.0.2", "fd09::2"] {
            let ping = far(&format!("ping -c 2 -w 30 {address}"));
            assert_eq!(ping.status, 0, "{options}: {ping:#?}");
        }
        drop(container);
        network.set_up("ip -n $P link del eth0");
    }
    // In layer 3 mode the namespace of the lower interface routes, and the other end must know the way.
    network.set_up(
        "ip -n $O addr add 10.8.0.1/24 dev low; ip -n $O-far addr add 10.8.0.2/24 dev far
         ip -n $O-far addr del 10.9.0.1/24 dev far; ip -n $O-far route add 10.9.0.0/24 via 10.8.0.1
         ip -n $O link add link low name up0 type ipvlan mode l3; ip -n $O link set up0 netns $P; ip -n $P link set up0 name eth0
         ip -n $P addr add 10.9.0.2/24 dev eth0; ip -n $P link set eth0 up; ip -n $P route add default dev eth0",
    );
    let container = network.container(BUSYBOX, "sleep 1000");
    let ping = container.exec("ping -c 2 -w 30 10.8.0.2");
    assert_eq!(ping.status, 0, "ipvlan mode l3: {ping:#?}");
    let ping = far("ping -c 2 -w 30 10.9.0.2");
    assert_eq!(ping.status, 0, "ipvlan mode l3: {ping:#?}");
}

#[test]
fn a_dummy_and_a_bridge_are_there() {
    let network = Network::bare();
    network.set_up(
        "ip -n $P link add dummy0 type dummy; ip -n $P addr add 10.11.0.1/32 dev dummy0; ip -n $P link set dummy0 up
         ip -n $P link add br0 type bridge; ip -n $P link add port0 type veth peer name out0 netns $O
         ip -n $P link set port0 master br0 up; ip -n $P link set br0 up; ip -n $P addr add 10.9.0.2/24 dev br0
         ip -n $O addr add 10.9.0.1/24 dev out0; ip -n $O link set out0 up",
    );
    let container = network.container(BUSYBOX, "sleep 1000");
    let links = container.exec("ls /sys/class/net; ip -4 -o addr; ping -c 2 -w 30 10.9.0.1");
    for expected in ["br0", "dummy0", "10.11.0.1/32", "10.9.0.2/24"] {
        assert!(links.ok().contains(expected), "{links:#?}");
    }
    assert!(
        !links.stdout.contains("port0"),
        "a bridge's port is the bridge's: {links:#?}"
    );
    let _ = network.outside("ping -c 2 -w 30 10.9.0.2").ok();
}

#[test]
fn interfaces_that_cannot_work_are_named_with_the_cure() {
    let leaks = LeakCheck::begin();
    let network = Network::bare();
    let refused = |expected: &[&str]| {
        let id = unique("c");
        let outcome = ctr_run(&format!("--rm {}", network.option()), BUSYBOX, &id, "true");
        let _ = sh(&format!("ctr c rm {id} 2>/dev/null"));
        assert_ne!(outcome.status, 0, "{outcome:#?}");
        for words in expected {
            assert!(outcome.stderr.contains(words), "{words} is missing: {outcome:#?}");
        }
    };
    network.set_up("ip -n $P tuntap add name tun0 mode tun; ip -n $P addr add 10.9.0.2/24 dev tun0");
    refused(&[
        "interface tun0 cannot be given to a VM",
        "its kind is tun;",
        "veth, macvlan",
    ]);
    network.set_up(
        "ip -n $P link del tun0; ip -n $O link add low type veth peer name far; ip -n $O link set low up
        ip -n $O link add link low name up0 type ipvlan mode l3s; ip -n $O link set up0 netns $P
        ip -n $P addr add 10.9.0.2/24 dev up0; ip -n $P link set up0 up",
    );
    refused(&["interface up0 cannot be given to a VM", "ipvlan", "l3s"]);
    network.set_up(
        "ip -n $P link del up0; ip -n $P link add eth0 mtu 65535 type veth peer name out0 netns $O
        ip -n $P addr add 10.9.0.2/24 dev eth0; ip -n $P link set eth0 up",
    );
    refused(&["eth0 has an MTU of 65535", "65521 at most"]);
    network.set_up("ip -n $P link del eth0; for i in $(seq 15); do ip -n $P link add eth$i type veth peer name out$i netns $O
        ip -n $P link set eth$i up; done");
    refused(&[
        "the pod has 15 interfaces, and its VM has room for",
        "block_slots",
    ]);
    // One network namespace, two VMs.
    network.set_up("for i in $(seq 2 15); do ip -n $P link del eth$i; done");
    let container = network.container(BUSYBOX, "sleep 1000");
    refused(&["belongs to another VM already"]);
    let _ = container.exec("ip link show eth1").ok();
    drop(container);
    drop(network);
    leaks.nothing_left();
}

#[test]
fn without_an_interface_there_is_loopback_and_one_that_comes_late_is_wired() {
    let leaks = LeakCheck::begin();
    let lonely = ctr_run(
        "--rm",
        BUSYBOX,
        &unique("t"),
        "sh -c 'ls /sys/class/net; ping -c 1 -w 30 127.0.0.1'",
    );
    assert!(lonely.ok().starts_with("lo\nPING"), "{lonely:#?}");

    // As with Docker and nerdctl: the namespace comes with the container, the interface after it, from a hook.
    let network = Network::bare();
    let id = unique("c");
    let hook = format!("/tmp/{id}.sh");
    network.set_up("ip -n $O link add out0 type veth peer name late0; ip -n $O link set out0 up; ip -n $O addr add 10.9.0.1/24 dev out0");
    let script = format!(
        "#!/bin/sh -e\npid=$(jq .pid)\nip -n {out} link set late0 netns $pid\n\
         n() {{ nsenter -n -t $pid ip \"$@\"; }}\n\
         n link set late0 name eth0; n addr add 10.9.0.2/24 dev eth0; n link set eth0 up; n link set lo up\n\
         n route add default via 10.9.0.1\n",
        out = network.outside
    );
    let _ = kata_rs_tests::sh_with_input(&format!("cat > {hook}; chmod +x {hook}"), script.as_bytes()).ok();
    // ctr has no option for hooks: its own specification, with one more member and a root file system of its own.
    let started = sh(&format!(
        "set -e; ctr c create --runtime {RUNTIME} {BUSYBOX} {id} sleep 1000; mkdir {hook}.root; \
         ctr c info --spec {id} | jq '.hooks = {{createRuntime: [{{path: \"{hook}\"}}]}} | \
         .root = {{path: \"{hook}.root\", readonly: true}}' > {hook}.json; ctr c rm {id}; \
         ctr images mount {BUSYBOX} {hook}.root; ctr run --detach --runtime {RUNTIME} --config {hook}.json {id}"
    ));
    let _ = started.ok();
    let ping = sh(&format!(
        "ctr task exec --exec-id p {id} sh -c 'ip route; ping -c 2 -w 30 10.9.0.1'"
    ));
    assert!(ping.ok().contains("default via 10.9.0.1 dev eth0"), "{ping:#?}");
    let _ = network.outside("ping -c 2 -w 30 10.9.0.2").ok();
    let _ = sh(&format!(
        "ctr task kill -s 9 {id}; ctr task rm -f {id}; ctr c rm {id}; \
         ctr images unmount --rm {hook}.root; rmdir {hook}.root; rm -f {hook} {hook}.json"
    ));
    drop(network);
    leaks.nothing_left();
}

#[test]
fn ports_are_forwarded_from_the_hosts_side_of_the_pod() {
    let leaks = LeakCheck::begin();
    let network = Network::veth();
    let container = network.container(
        BUSYBOX,
        "sh -c 'mkdir /tmp/w; cd /tmp/w; echo only here > index.html; httpd -p 127.0.0.1:8080; \
         httpd -p [::1]:8081; exec nc -ll -p 7000 -e cat'",
    );
    let get = "printf \"GET / HTTP/1.0\\r\\n\\r\\n\" | socat -t 30 -";
    for address in [
        "TCP4:127.0.0.1:8080",
        "TCP6:[::1]:8080",
        "TCP4:127.0.0.1:8081",
        "TCP4:127.9.9.9:8080",
    ] {
        let page = network.pod(&format!(
            "for i in 1 2 3 4 5; do {get} {address} && break; sleep 1; done"
        ));
        assert!(page.ok().contains("only here"), "{address}: {page:#?}");
    }
    // A client that ends its half still gets the answer; many bytes come back as they went.
    let echoed = network.pod("head -c 4194304 /dev/urandom > /tmp/echo; socat -t 60 - TCP4:127.0.0.1:7000 < /tmp/echo | cmp - /tmp/echo && rm /tmp/echo && echo same");
    assert_eq!(echoed.ok(), "same");
    // Nobody listens there.
    let refused = network.pod("echo | socat -t 30 - TCP4:127.0.0.1:9999");
    assert_ne!(refused.status, 0, "{refused:#?}");
    assert!(refused.stderr.contains("reset"), "{refused:#?}");
    // The pod's own address is not localhost: from outside, that port is closed.
    let closed = network.outside("echo | socat - TCP4:10.9.0.2:8080");
    assert!(closed.stderr.contains("refused"), "{closed:#?}");
    drop(container);
    network.is_as_before();
    drop(network);
    leaks.nothing_left();
}

#[test]
fn a_killed_shim_leaves_the_pods_namespace_as_it_was() {
    let leaks = LeakCheck::begin();
    let network = Network::veth();
    let container = network.container(BUSYBOX, "sleep 1000");
    let id = container.id();
    let wired = network.pod("nft list ruleset; tc qdisc show dev eth0");
    assert!(
        wired.ok().contains("kata-rs") && wired.ok().contains("ingress"),
        "{wired:#?}"
    );
    // containerd runs the shim's `delete`, and then forgets the task.
    let _ = sh(&format!(
        "kill -9 $(pgrep -f 'containerd-shim-kata-rs-v2.*{id}' | head -1); while ctr task ls -q | grep -qx {id}; do sleep 0.1; done; \
         ctr c rm {id}; for f in /run/containerd/fifo/*/{id}-*; do rm -rf \"${{f%/*}}\"; done"
    ))
    .ok();
    network.is_as_before();
    drop(container);
    drop(network);
    leaks.nothing_left();
}

#[test]
fn an_interface_that_goes_takes_the_guests_link_down() {
    let leaks = LeakCheck::begin();
    let network = Network::veth();
    let container = network.container(BUSYBOX, "sleep 1000");
    assert_eq!(container.exec("cat /sys/class/net/eth0/carrier").ok(), "1");
    let said = || {
        let count = sh("grep -c 'interface of the pod is gone' /var/log/containerd.log || true");
        count.ok().parse::<u32>().unwrap()
    };
    let before = said();
    network.set_up("ip -n $P link del eth0");
    let down = container.exec(
        "while [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do sleep 0.1; done; ip -4 -o addr show dev eth0",
    );
    assert!(down.ok().contains("10.9.0.2"), "what it has stays: {down:#?}");
    let left = network.pod("ip -o link");
    assert!(!left.ok().contains("krtap"), "the tap is gone too: {left:#?}");
    assert_eq!(said(), before + 1);
    drop(container);
    drop(network);
    leaks.nothing_left();
}

/// `ctr run --cni` has the plugins work on the namespace of the task after it was created, as Docker does.
#[test]
fn a_cni_plugins_interface_comes_between_create_and_start() {
    // ctr looks for plugins only there.
    let _ = sh("[ -d /opt/cni/bin ] || [ ! -d /usr/lib/cni ] || { mkdir -p /opt/cni && ln -sfn /usr/lib/cni /opt/cni/bin; }").ok();
    let run = |command: &str| ctr_run("--rm --cni", BUSYBOX, &unique("t"), command);
    let container = run("sh -c 'ip route; ip -4 -o addr show dev eth0; ping -c 2 -w 30 10.88.0.1'");
    assert!(
        container.ok().contains("default via 10.88.0.1 dev eth0"),
        "{container:#?}"
    );
    // No leak check: ctr takes networks away without naming their namespace, and the bridge plugin then leaves its rules
    // for address translation, with any runtime.
    let other = run("sh -c 'ip -4 -o addr show dev eth0; ls /sys/class/net'");
    assert!(other.ok().contains("inet 10.88."), "{other:#?}");
    assert!(other.stdout.ends_with("eth0\nlo\n"), "{other:#?}");
}
