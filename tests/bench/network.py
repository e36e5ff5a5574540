"""Network: one TCP stream of iperf3 between a container and the host's side of its link, both ways."""

import json
import subprocess
import time

from common import IMAGE, Failure, command, ctr, failed, gvisor, note, remove, tools

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
    """A network and ctr's flags for each runtime, by the title of its row."""
    mounts = tools("iperf3")
    cases = {}
    for number, (runtime, flags) in enumerate(runtimes.items()):
        title = runtime
        namespace, address = link(number)
        if runtime == "runsc":
            # gVisor takes a namespace for the host's own, and refuses its stack there, when it has this file: from
            # Linux 6.12 on every namespace has. Then it takes the kernel's stack.
            own = subprocess.run(["ip", "netns", "exec", namespace, "test", "-e", "/proc/sys/net/core/rmem_default"]).returncode != 0
            title, flags = ("runsc, own stack", gvisor("sandbox")) if own else ("runsc, kernel's stack", gvisor("host"))
        cases[title] = Case(f"bench-network-{number}", [*flags, *mounts], namespace, address)
    return cases


class Case:
    """A container that is started when it is needed: again after a round in which something failed."""

    def __init__(self, name, flags, namespace, address):
        self.name, self.flags, self.namespace, self.address, self.runs = name, flags, namespace, address, False

    def start(self):
        """Starts the container if it does not run."""
        if not self.runs:
            ctr("run", "-d", "--with-ns", f"network:/run/netns/{self.namespace}", *self.flags, IMAGE, self.name, "sleep", "3600")
            self.runs = True

    def stop(self):
        """Removes the container, if it came to be."""
        self.runs = False
        try:
            remove(self.name)
        except Failure:
            pass


def inside(name, exec_id, *words):
    """Runs a command in a container."""
    return ctr("task", "exec", "--exec-id", exec_id, name, *words)


def round_of(cases, number, results):
    """One measurement per runtime and direction, in bits per second as the receiver saw them."""
    for title, case in cases.items():
        for direction, flag in (("out", []), ("in", ["-R"])):
            try:
                case.start()
                rate = stream(case.name, case.address, f"{direction}{number}", flag)
            except Failure as failure:
                failed("network", f"{title} {direction}", failure)
                case.stop()
                continue
            note(f"network, {title}, {direction}: {rate / 1e9:.3f} Gbit/s")
            results.setdefault(direction, {}).setdefault(title, []).append(rate)


def stream(name, address, exec_id, flag):
    """What one run of iperf3 measures."""
    server = subprocess.Popen(["iperf3", "-s", "-1", "-B", address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_listener(f"{address}:5201")
        text = inside(name, exec_id, "/tools/iperf3", "-J", "-c", address, "-t", str(SECONDS), *flag)
    finally:
        server.terminate()
        server.wait()
    return json.loads(text)["end"]["sum_received"]["bits_per_second"]


def wait_for_listener(place):
    """Until somebody listens on an address and port."""
    for _ in range(300):
        if f"{place} " in command("ss", "-Htln"):
            return
        time.sleep(0.05)
    raise Failure(f"nobody listens on {place}")


def close(cases):
    """Removes the containers and their networks."""
    for case in cases.values():
        case.stop()
        subprocess.run(["ip", "link", "del", case.namespace], capture_output=True)
        command("ip", "netns", "del", case.namespace)
