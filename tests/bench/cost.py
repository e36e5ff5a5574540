"""What one request costs: exits from the guest by kind, and what the VMM's threads do for it.

Each case runs once with few requests and once with many; the difference, divided by the difference in number, is one
request's share, without what starting the program costs. The kernel counts (tracefs, histogram triggers), so nothing
is slowed down. Shares of timer interrupts and of the host's own grow with the time a request takes.
"""

import contextlib
import glob
import json
import os
import re
import subprocess

import disk
import network
from common import IMAGE, command, ctr, note, remove, tools

TRACING = "/sys/kernel/debug/tracing"
# What is counted, and by which of its fields.
EVENTS = {
    "kvm/kvm_exit": "exit_reason",
    "kvm/kvm_userspace_exit": "reason",
    "kvm/kvm_inj_virq": "vector",
    "raw_syscalls/sys_enter": "common_pid",
    "sched/sched_switch": "prev_pid",
}
# Exit codes of SVM (AMD APM volume 2, appendix C) and of VMX (Intel SDM volume 3, appendix C) that matter here.
EXITS = {
    "mmio": {0x400, 48, 49},
    "hlt": {0x78, 12},
    "timer": {0x7C, 32},
    "host": {0x60, 1},
}
FEW, MANY = 200, 2200
PORT = 5202


class Counts:
    """Counters of this machine since the last `clear`."""

    def __init__(self):
        if not os.path.exists(f"{TRACING}/events/kvm"):
            command("mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug")
        self.close()
        self.trigger("")

    def trigger(self, suffix):
        """Sets the triggers, or with `:clear` the counters back to 0."""
        for event, key in EVENTS.items():
            with open(f"{TRACING}/events/{event}/trigger", "a") as file:
                file.write(f"hist:keys={key}{suffix}")

    def close(self):
        """Takes all triggers of these events away, which is what truncating does."""
        for event in EVENTS:
            with open(f"{TRACING}/events/{event}/trigger", "w"):
                pass

    def read(self):
        """How often, by event and value of its key."""
        counts = {}
        for event in EVENTS:
            with open(f"{TRACING}/events/{event}/hist") as file:
                found = re.findall(r"\{ \w+: +(\d+) \} hitcount: +(\d+)", file.read())
            counts[event] = {int(key): int(count) for key, count in found}
        return counts


def threads():
    """The VMMs' threads by kind: vCPU or device."""
    kinds = {}
    for process in glob.glob("/proc/[0-9]*/task/[0-9]*/comm"):
        with contextlib.suppress(OSError):
            words = process.split("/")
            with open(f"/proc/{words[2]}/comm") as leader, open(process) as thread:
                if leader.read().strip() == "kata-rs-vmm":
                    kinds[int(words[4])] = "vcpu" if thread.read().startswith("vcpu") else "device"
    return kinds


def figures(counts, kinds):
    """What the table says, for one run."""
    exits = counts["kvm/kvm_exit"]
    result = {kind: sum(exits.get(code, 0) for code in codes) for kind, codes in EXITS.items()}
    result["other"] = sum(exits.values()) - sum(result.values())
    result["user"] = sum(counts["kvm/kvm_userspace_exit"].values())
    result["interrupts"] = sum(counts["kvm/kvm_inj_virq"].values())
    for name, event in (("syscalls", "raw_syscalls/sys_enter"), ("switches", "sched/sched_switch")):
        result[name] = sum(count for pid, count in counts[event].items() if kinds.get(pid) == "device")
    return result


def share(counts, run, few=FEW, many=MANY):
    """One request's part of what `run` costs."""
    parts = []
    for number in (few, many):
        counts.trigger(":clear")
        run(number)
        parts.append(figures(counts.read(), threads()))
    return {key: (parts[1][key] - parts[0][key]) / (many - few) for key in parts[0]}


def reads(name):
    """Random reads of 4 KiB; the guest's cache is emptied before, the host's is warm after the first run."""
    return lambda count: ctr(
        "task", "exec", "--exec-id", f"read{count}", name,
        "/tools/fio", "--name=read", "--filename=/data", "--readonly", "--rw=randread", "--bs=4k", f"--size={disk.SIZE_MIB}m",
        f"--number_ios={count}", "--ioengine=psync", "--invalidate=1", "--thread", "--randrepeat=0",
    )


def ping_pong(name, address):
    """One byte there and back over TCP."""
    def run(count):
        words = ["fio", "--name=net", "--ioengine=net", "--protocol=tcp", f"--port={PORT}", "--pingpong=1", "--bs=1", f"--size={count}", "--thread"]
        server = subprocess.Popen([*words, "--listen", "--rw=read"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            network.wait_for_listener(f":{PORT}")
            ctr("task", "exec", "--exec-id", f"ping{count}", name, "/tools/fio", *words[1:], f"--hostname={address}", "--rw=write")
            server.wait(60)
        finally:
            server.kill()
            server.wait()
    return run


def stream(name, address, *flags):
    """64 KiB of a TCP stream."""
    def run(count):
        server = subprocess.Popen(["iperf3", "-s", "-1", "-B", address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            network.wait_for_listener(f"{address}:5201")
            ctr("task", "exec", "--exec-id", f"stream{count}{''.join(flags)}", name, "/tools/iperf3", "-c", address, "-n", str(count << 16), *flags)
        finally:
            server.terminate()
            server.wait()
    return run


def measure(flags, oci):
    """One request's costs by case, for the runtime with these flags of ctr's."""
    counts, results = Counts(), {}

    def one(title, run, few=FEW, many=MANY):
        results[title] = share(counts, run, few, many)
        note(f"requests, {title}: " + ", ".join(f"{key} {value:.2f}" for key, value in results[title].items()))

    try:
        cases = disk.prepared({"kata-rs": flags}, oci)
        for _, snapshotter, words in cases:
            name = f"bench-request-{snapshotter}"
            ctr("run", "-d", *words, disk.IMAGE, name, "/bin/sh", "-c", "sleep 3600")
            run = reads(name)
            run(MANY + 1)
            one(f"4 KiB random read, {snapshotter}", run)
            remove(name)
        disk.close(cases)
        namespace, address = network.link(9)
        name = "bench-request-network"
        ctr("run", "-d", "--with-ns", f"network:/run/netns/{namespace}", *flags, *tools("fio", "iperf3"), IMAGE, name, "sleep", "3600")
        one("1 byte over TCP and back", ping_pong(name, address))
        one("64 KiB of TCP to the host", stream(name, address))
        one("64 KiB of TCP from the host", stream(name, address, "-R"))
        one("exec", lambda count: [ctr("task", "exec", "--exec-id", f"x{count}-{number}", name, "true") for number in range(count)], 5, 25)
        remove(name)
        subprocess.run(["ip", "link", "del", namespace], capture_output=True)
        command("ip", "netns", "del", namespace)
    finally:
        counts.close()
    return results


def table(results):
    """The results as a table in Markdown."""
    keys = {"mmio": "MMIO", "hlt": "HLT", "timer": "timer", "host": "host", "other": "other", "user": "to the VMM"}
    keys |= {"interrupts": "interrupts", "syscalls": "syscalls", "switches": "switches"}
    lines = [f"| request | {' | '.join(keys.values())} |", "|---" * (len(keys) + 1) + "|"]
    for title, row in results.items():
        cells = (f"{max(row[key], 0):.1f}" for key in keys)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)
