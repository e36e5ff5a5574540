#!/usr/bin/env python3
"""Writes docs/benchmarks.md from what measure.py printed.

    table.py host|direct < result.json
"""

import datetime
import json
import re
import statistics
import sys

CASES = {
    "first_output": "`ctr run`, start to first byte of output",
    "run_true": "`ctr run --rm … true`, start to end",
    "exec_true": "`ctr task exec … true` in a running container",
    "pod_start": "pod through CRI: `crictl run`, with CNI's network",
}
STAGES = [
    ("vmm_main", "VMM process runs"),
    ("vm_created", "KVM has the VM"),
    ("kernel_loaded", "kernel and image in guest memory"),
    ("first_instruction", "guest executes"),
    ("agent_connected", "agent connects"),
    ("agent_hello", "agent's Hello accepted"),
    ("ready", "guest configured"),
    ("container_created", "container made"),
    ("container_started", "container's process executes"),
]

# How a root file system reaches the container.
ROOTS = {
    "kata-rs overlayfs": "overlayfs, by virtio-fs",
    "kata-rs devmapper": "devmapper, by virtio-blk",
    "runsc overlayfs": "overlayfs, by its gofer",
}


class Footnotes:
    """Why something is missing from the tables."""

    def __init__(self, failures, rounds):
        self.failures, self.rounds, self.texts = failures, rounds, []

    def mark(self, part, case, figure=True):
        """What stands behind a figure, or for it, when the case has failed; nothing when it has not."""
        entry = self.failures.get(part, {}).get(case)
        if entry is None:
            return ""
        text = entry["reason"]
        if text not in self.texts:
            self.texts.append(text)
        times = f"{entry['times']} of {self.rounds} failed" if figure else "failed"
        return f"{times} [{self.texts.index(text) + 1}]"

    def __str__(self):
        return "".join(f"\n[{number}] {text}.\n" for number, text in enumerate(self.texts, 1))


def roots(containerd):
    """How each root file system reaches the container, with this version of containerd."""
    version = tuple(int(part) for part in re.findall(r"\d+", containerd)[:2])
    erofs = "erofs, layers by virtio-blk" if version >= (2, 2) else "erofs, mounted by containerd, by virtio-fs"
    return ROOTS | {"kata-rs erofs": erofs}


def percentile(values, share):
    """The smallest value that at least `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * share // 100) - 1)]


def rows(result, notes):
    """One table row per case and runtime."""
    for case, title in CASES.items():
        if case not in result["seconds"]:
            continue
        base = statistics.median(result["seconds"][case]["runc"])
        for runtime, values in result["seconds"][case].items():
            median = statistics.median(values)
            mark = notes.mark(case, runtime)
            yield f"| {title} | {runtime} | {min(values):.3f} | {median:.3f} | {percentile(values, 95):.3f} | {median / base:.2f} | {mark} |"
        if "runsc" not in result["seconds"][case] and (mark := notes.mark(case, "runsc", figure=False)):
            yield f"| {title} | runsc | | | | | {mark} |"
    boots = [(stages["agent_hello"] - stages["vmm_spawned"]) / 1e6 for stages in result["timeline_us"]]
    yield f"| VMM spawned to the agent's Hello | kata-rs | {min(boots):.3f} | {statistics.median(boots):.3f} | {percentile(boots, 95):.3f} | | |"


def network_rows(result, notes):
    """One row per runtime: both directions."""
    rates = result["network_bits_per_s"]
    failed = [case.rpartition(" ")[0] for case in result.get("failures", {}).get("network", {})]
    for runtime in dict.fromkeys([*rates.get("out", {}), *rates.get("in", {}), *failed]):
        cells = []
        for direction in ("out", "in"):
            measured = rates.get(direction, {})
            mark = notes.mark("network", f"{runtime} {direction}", figure=runtime in measured)
            if runtime not in measured:
                cells.append(f"{mark} | ")
                continue
            median = statistics.median(measured[runtime])
            share = f"{median / statistics.median(measured['runc']):.2f}" if "runc" in measured else ""
            cells.append(f"{median / 1e9:.3f} {mark}".rstrip() + f" | {share}")
        yield f"| {runtime} | {' | '.join(cells)} |"


def read_rows(result, notes):
    """One row per runtime and snapshotter."""
    reads, ways = result["random_read"], roots(result["host"]["containerd"])
    for case in dict.fromkeys([*reads, *result.get("failures", {}).get("random_read", {})]):
        runtime, snapshotter = case.split()
        mark = notes.mark("random_read", case, figure=case in reads)
        if case not in reads:
            yield f"| {runtime} | {ways.get(case, snapshotter)} | {mark} | | |"
            continue
        iops = statistics.median(run["iops"] for run in reads[case])
        latency = statistics.median(run["mean_us"] for run in reads[case])
        base = reads.get(f"runc {snapshotter}")
        share = f"{iops / statistics.median(run['iops'] for run in base):.3f}" if base else ""
        yield f"| {runtime} | {ways.get(case, snapshotter)} | {iops:.0f} {mark}".rstrip() + f" | {latency:.1f} | {share} |"


def main():
    result = json.load(sys.stdin)
    place = {
        "host": "the emulated test host of `tests/host` (QEMU TCG, nested SVM): 10-20 times slower than hardware; only ratios of one run mean something",
        "direct": "this machine's own KVM",
    }[sys.argv[1]]
    host = result["host"]
    notes = Footnotes(result.get("failures", {}), result["rounds"])
    print(f"""# Benchmarks

Written by `make bench` on {datetime.date.today().isoformat()}: {result["rounds"]} rounds, each running every case once with every
runtime. Measured in {place}.
Host: Linux {host["kernel"]} on {host["cpus"]} CPU(s) ({host["cpu"]}), containerd {host["containerd"]}, runc {host["runc"]}, runsc {host["runsc"]}; guest: Linux
{host["guest_kernel"]}. Image `localhost/busybox:1`, overlayfs snapshotter; runsc with `--platform=systrap --network=none`; kata-rs with the
defaults of its configuration. The host's kernel command line: `{host["command_line"]}`.
Raw figures: [benchmarks.json](benchmarks.json).

## Time, seconds

| case | runtime | min | median | p95 | median / runc | |
|---|---|---|---|---|---|---|---|""")
    print("\n".join(rows(result, notes)))
    if result.get("network_bits_per_s"):
        print("""
## Network: one TCP stream of iperf3 between container and host, Gbit/s

The host's end is the other end of the container's veth pair. Median of all rounds, as the receiver saw it.

| runtime | container to host | / runc | host to container | / runc |
|---|---|---|---|---|""")
        print("\n".join(network_rows(result, notes)))
    if result.get("random_read"):
        print("""
## Random reads of 4 KiB

fio (psync, one job) reads each block of a file of 16 MiB in the image's layer once, in a fresh container. On overlayfs and erofs the host
has the file in its cache, so this is the cost of the way, not of a disk; on devmapper each container's device has a cache of its own,
which is empty. With kata-rs such a read is a request to a device, one at a time: two exits from the guest and a change of threads
([architecture.md](architecture.md), "What a request costs"), where runc's is a system call.

| runtime | root file system | reads/s | mean latency, µs | reads/s / runc |
|---|---|---|---|---|""")
        print("\n".join(read_rows(result, notes)))
    print("""
## Memory of each further pod, MiB

PSS of shim, VMM and task process (for runsc: shim, sandbox and gofer), guest RAM apart; the pod sleeps, memory limit 64 MiB.

| runtime | host processes | guest RAM touched |
|---|---|---|""")
    for runtime, memory in result["memory"].items():
        print(f"| {runtime} | {memory['pss_kib'] / 1024:.1f} | {memory['guest_kib'] / 1024:.1f} |")
    if mark := notes.mark("memory", "runsc", figure=False):
        print(f"| runsc | {mark} | |")
    print("""
## Where the time goes: `kata-rs run --rm --timeline=json IMAGE true`, ms since start

| stage | min | median | p95 |
|---|---|---|---|""")
    for key, title in STAGES:
        values = [stages[key] / 1000 for stages in result["timeline_us"] if stages.get(key) is not None]
        if values:
            print(f"| {title} | {min(values):.1f} | {statistics.median(values):.1f} | {percentile(values, 95):.1f} |")
    print(notes, end="")


main()
