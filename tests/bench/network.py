"""Network: one TCP stream of iperf3 between a container and the host's side of its link, both ways."""

import json
import subprocess
import time

from common import IMAGE, WORK, Failure, command, ctr, note, remove, tools

SECONDS = 3


def link(number):
    """A network namespace with one end of a veth pair in it; returns its name and the address of the host's end."""
    namespace, here = f"bench{number}", f"10.99.{number}.1"
    command("ip", "netns", "add", namespace)
    command("ip", "link", "add", f"bench{number}", "type", "veth", "peer", "name", "eth0", "netns", namespace)
    command("ip", "addr", "add", f"{here}/30", "dev", f"bench{number}")
    command("ip", "link", "set", f"bench{number}", "up")
    for words in (["addr", "add", f"10.99.{number}.2/30", "dev", "eth0"], ["link", "set", "lo", "up"], ["link", "set", "eth0", "up"], ["route", "add", "default", "via", here]):
        command("ip", "-n", namespace, *words)
    return namespace, here


def prepared(runtimes):
    """Starts one container per runtime; returns their names and the host's addresses. Failures are told and left out."""
    mounts = tools("iperf3")
    ready = {}
    for number, (runtime, flags) in enumerate(runtimes.items()):
        name, title = f"bench-network-{number}", runtime
        namespace, address = link(number)
        if runtime == "runsc":
            # gVisor takes a namespace for the host's own, and refuses its stack there, when it has this file: from
            # Linux 6.12 on every namespace has. Then it takes the kernel's stack.
            own = subprocess.run(["ip", "netns", "exec", namespace, "test", "-e", "/proc/sys/net/core/rmem_default"]).returncode != 0
            title, flags = ("runsc, own stack", gvisor("sandbox")) if own else ("runsc, kernel's stack", gvisor("host"))
        try:
            ctr("run", "-d", "--with-ns", f"network:/run/netns/{namespace}", *flags, *mounts, IMAGE, name, "sleep", "3600")
            ready[title] = (name, address, namespace)
        except Failure as failure:
            note(f"network, {title}: {failure}")
            remove_all(name, namespace)
    return ready


def gvisor(network):
    """ctr's flags for runsc with this kind of network; the wrapper that the other cases use gives it none."""
    wrapper = f"{WORK}/runsc-network-{network}"
    with open(wrapper, "w") as script:
        script.write(f'#!/bin/sh\nexec runsc --platform=systrap --network={network} "$@"\n')
    subprocess.run(["chmod", "755", wrapper], check=True)
    return ["--runc-binary", wrapper]


def inside(name, exec_id, *words):
    """Runs a command in a container."""
    return ctr("task", "exec", "--exec-id", exec_id, name, *words)


def remove_all(name, namespace):
    """Removes a container, if it came to be, and its network."""
    subprocess.run(["ip", "link", "del", namespace], capture_output=True)
    try:
        remove(name)
    except Failure:
        pass
    command("ip", "netns", "del", namespace)


def round_of(ready, number, results):
    """One measurement per runtime and direction, in bits per second as the receiver saw them."""
    for runtime, (name, address, namespace) in list(ready.items()):
        try:
            for direction, flag in (("out", []), ("in", ["-R"])):
                rate = stream(name, address, f"{direction}{number}", flag)
                note(f"network, {runtime}, {direction}: {rate / 1e9:.3f} Gbit/s")
                results.setdefault(direction, {}).setdefault(runtime, []).append(rate)
        except Failure as failure:
            note(f"network, {runtime}: {failure}")
            remove_all(name, namespace)
            del ready[runtime]


def stream(name, address, exec_id, flag):
    """What one run of iperf3 measures."""
    server = subprocess.Popen(["iperf3", "-s", "-1", "-B", address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_listener(address)
        text = inside(name, exec_id, "/tools/iperf3", "-J", "-c", address, "-t", str(SECONDS), *flag)
    finally:
        server.terminate()
        server.wait()
    return json.loads(text)["end"]["sum_received"]["bits_per_second"]


def wait_for_listener(address):
    """Until somebody listens on iperf3's port."""
    for _ in range(300):
        if f"{address}:5201" in command("ss", "-Htln"):
            return
        time.sleep(0.05)
    raise Failure(f"iperf3 does not listen on {address}:5201")


def close(ready):
    """Removes the containers and their networks."""
    for name, _, namespace in ready.values():
        remove_all(name, namespace)
