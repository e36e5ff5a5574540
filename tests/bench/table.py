#!/usr/bin/env python3
"""Writes docs/benchmarks.md from what measure.py printed.

    table.py host|direct < result.json
"""

import datetime
import json
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
    "kata-rs erofs": "erofs, layers by virtio-blk",
    "runsc overlayfs": "overlayfs, by its gofer",
}


def percentile(values, share):
    """The smallest value that at least `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * share // 100) - 1)]


def rows(result):
    """One table row per case and runtime."""
    for case, title in CASES.items():
        if case not in result["seconds"]:
            continue
        base = statistics.median(result["seconds"][case]["runc"])
        for runtime, values in result["seconds"][case].items():
            median = statistics.median(values)
            yield f"| {title} | {runtime} | {min(values):.3f} | {median:.3f} | {percentile(values, 95):.3f} | {median / base:.2f} |"
    boots = [(stages["agent_hello"] - stages["vmm_spawned"]) / 1e6 for stages in result["timeline_us"]]
    yield f"| VMM spawned to the agent's Hello | kata-rs | {min(boots):.3f} | {statistics.median(boots):.3f} | {percentile(boots, 95):.3f} | |"


def network_rows(result):
    """One row per runtime: both directions."""
    rates = result["network_bits_per_s"]
    for runtime in rates["out"]:
        cells = []
        for direction in ("out", "in"):
            measured = rates.get(direction, {})
            if runtime not in measured:
                cells.append("failed | ")
                continue
            median = statistics.median(measured[runtime])
            share = f"{median / statistics.median(measured['runc']):.2f}" if "runc" in measured else ""
            cells.append(f"{median / 1e9:.3f} | {share}")
        yield f"| {runtime} | {' | '.join(cells)} |"


def read_rows(result):
    """One row per runtime and snapshotter."""
    reads = result["random_read"]
    for case, runs in reads.items():
        runtime, snapshotter = case.split()
        iops = statistics.median(run["iops"] for run in runs)
        latency = statistics.median(run["mean_us"] for run in runs)
        base = reads.get(f"runc {snapshotter}")
        share = f"{iops / statistics.median(run['iops'] for run in base):.3f}" if base else ""
        yield f"| {runtime} | {ROOTS.get(case, snapshotter)} | {iops:.0f} | {latency:.1f} | {share} |"


def main():
    result = json.load(sys.stdin)
    place = {
        "host": "the emulated test host of `tests/host` (QEMU TCG, nested SVM): 10-20 times slower than hardware; only ratios of one run mean something",
        "direct": "this machine's own KVM",
    }[sys.argv[1]]
    host = result["host"]
    print(f"""# Benchmarks

Written by `make bench` on {datetime.date.today().isoformat()}: {result["rounds"]} rounds, each running every case once with every
runtime. Measured in {place}.
Host: Linux {host["kernel"]} on {host["cpus"]} CPU(s) ({host["cpu"]}), containerd {host["containerd"]}, runc {host["runc"]}, runsc {host["runsc"]}; guest: Linux
{host["guest_kernel"]}. Image `localhost/busybox:1`, overlayfs snapshotter; runsc with `--platform=systrap --network=none`; kata-rs with the
defaults of its configuration. The host's kernel command line: `{host["command_line"]}`.
Raw figures: [benchmarks.json](benchmarks.json).

## Time, seconds

| case | runtime | min | median | p95 | median / runc |
|---|---|---|---|---|---|""")
    print("\n".join(rows(result)))
    if result.get("network_bits_per_s"):
        print("""
## Network: one TCP stream of iperf3 between container and host, Gbit/s

The host's end is the other end of the container's veth pair. Median of all rounds, as the receiver saw it.

| runtime | container to host | / runc | host to container | / runc |
|---|---|---|---|---|""")
        print("\n".join(network_rows(result)))
    if result.get("random_read"):
        print("""
## Random reads of 4 KiB

fio (psync, one job) reads each block of a file of 16 MiB in the image's layer once, in a fresh container. The host has the file in its
cache, so this is the cost of the way, not of a disk.

| runtime | root file system | reads/s | mean latency, µs | reads/s / runc |
|---|---|---|---|---|""")
        print("\n".join(read_rows(result)))
    print("""
## Memory of each further pod, MiB

PSS of shim, VMM and task process (for runsc: shim, sandbox and gofer), guest RAM apart; the pod sleeps, memory limit 64 MiB.

| runtime | host processes | guest RAM touched |
|---|---|---|""")
    for runtime, memory in result["memory"].items():
        print(f"| {runtime} | {memory['pss_kib'] / 1024:.1f} | {memory['guest_kib'] / 1024:.1f} |")
    print("""
## Where the time goes: `kata-rs run --rm --timeline=json IMAGE true`, ms since start

| stage | min | median | p95 |
|---|---|---|---|""")
    for key, title in STAGES:
        values = [stages[key] / 1000 for stages in result["timeline_us"] if stages.get(key) is not None]
        if values:
            print(f"| {title} | {min(values):.1f} | {statistics.median(values):.1f} | {percentile(values, 95):.1f} |")


main()
