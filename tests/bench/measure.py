#!/usr/bin/env python3
"""Measures kata-rs beside runc and runsc on the machine it runs on, and prints JSON.

    measure.py [ROUNDS] [--only PART]

Every round runs each case once with each runtime, so that whatever else the machine does hits all alike. Times are
wall seconds taken here, around the command that a user would type.
"""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import threading
import time

import cost
import disk
import network
import pods
from common import ARCHIVE, FAILURES, IMAGE, PATIENCE, WORK, Failure, command, ctr, failed, note, remove, runtimes, timed


def run_true(flags, name):
    """`ctr run --rm ... true`, start to end."""
    return timed(lambda: ctr("run", "--rm", *flags, IMAGE, name, "true"))


def first_output(flags, name):
    """From the start of ctr to the first byte of the container's output."""
    start = time.monotonic()
    process = subprocess.Popen(
        ["ctr", "run", "--rm", *flags, IMAGE, name, "echo", "hi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    patience = threading.Timer(PATIENCE, process.kill)
    patience.start()
    byte = process.stdout.read(1)
    seconds = time.monotonic() - start
    _, errors = process.communicate()
    patience.cancel()
    if not byte or process.returncode != 0:
        raise Failure(f"ctr run echo with {flags}: {errors.decode().strip()}")
    return seconds


def exec_true(container, name):
    """`ctr task exec ... true` in a running container."""
    return timed(lambda: ctr("task", "exec", "--exec-id", name, container, "true"))


def processes(pattern):
    """Process ids whose command line matches."""
    found = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/cmdline", "rb") as file:
                    command = file.read().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if re.search(pattern, command):
                found.add(int(entry))
    return found


def memory(pid):
    """(PSS in KiB without guest RAM, guest RAM touched in KiB) of a process.

    Guest RAM is recognised by its size: no other anonymous mapping of ours is 64 MiB or more.
    """
    pss = guest = 0
    size = name = None
    try:
        with open(f"/proc/{pid}/smaps") as file:
            for line in file:
                header = re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(.*)", line)
                if header:
                    name = header.group(1).strip()
                    continue
                key, _, rest = line.partition(":")
                if key == "Size":
                    size = int(rest.split()[0])
                elif key == "Pss":
                    if size >= 65536 and name == "":
                        guest += int(rest.split()[0])
                    else:
                        pss += int(rest.split()[0])
    except OSError:
        return 0, 0
    return pss, guest


PROCESSES = {
    "kata-rs": r"containerd-shim-kata-rs|kata-rs-vmm|kata-rs-task",
    "runc": r"containerd-shim-runc",
    "runsc": r"containerd-shim-runc|runsc-sandbox|runsc-gofer|\brunsc\b.*(boot|gofer)",
}


# How many pods the memory of a further one is the mean of.
POD_COUNT = 3


def pod_memory(runtime, flags, count=POD_COUNT):
    """PSS and touched guest RAM of each further pod, KiB: the growth from `count` pods over one, per pod."""
    names = [f"bench-memory-{runtime}-{number}" for number in range(count + 1)]
    readings = []
    for number, name in enumerate(names):
        ctr("run", "-d", *flags, "--memory-limit", str(64 << 20), IMAGE, name, "sleep", "3600")
        if number in (0, count):
            time.sleep(3)
            parts = [memory(pid) for pid in processes(PROCESSES[runtime])]
            readings.append((sum(part[0] for part in parts), sum(part[1] for part in parts)))
    for name in names:
        remove(name)
    (first, first_guest), (last, last_guest) = readings
    return {"pss_kib": (last - first) // count, "guest_kib": (last_guest - first_guest) // count}


def timeline():
    """Stages of one start by hand, in µs."""
    done = subprocess.run(
        ["kata-rs", "run", "--rm", "--timeline=json", ARCHIVE, "true"], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise Failure(f"kata-rs run: {done.stderr.strip()}")
    stages = json.loads(done.stderr.strip().splitlines()[-1])
    container = stages.pop("containers")[0]
    container.pop("id")
    return stages | {f"container_{key}": value for key, value in container.items() if value is not None}


def cpu_model():
    """The processor's own name."""
    with open("/proc/cpuinfo") as file:
        return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))


def tolerate(case, runtime, failure):
    """Notes that somebody else's runtime has failed; kata-rs must not, and all is measured against runc."""
    if runtime != "runsc":
        raise failure
    failed(case, runtime, failure)


def starts(found, rounds):
    """Containers through ctr: run, first output, exec; and the stages of a start by hand."""
    results = {"run_true": {}, "first_output": {}, "exec_true": {}}
    for name, flags in found.items():  # one of each that does not count: caches
        run_true(flags, f"bench-warm-{name}")
        ctr("run", "-d", *flags, IMAGE, f"bench-exec-{name}", "sleep", "3600")
    stages = []
    for number in range(rounds):
        cases = {
            "run_true": lambda name, flags: run_true(flags, f"bench-{name}-{number}"),
            "first_output": lambda name, flags: first_output(flags, f"bench-out-{name}-{number}"),
            "exec_true": lambda name, _: exec_true(f"bench-exec-{name}", f"x{number}"),
        }
        for case, measured in cases.items():
            for name, flags in found.items():
                try:
                    results[case].setdefault(name, []).append(measured(name, flags))
                except Failure as failure:
                    tolerate(case, name, failure)
        stages.append(timeline())
        note(f"starts: round {number + 1} of {rounds}")
    for name in found:
        remove(f"bench-exec-{name}")
    return {"seconds": results, "timeline_us": stages}


def further(title, prepare, measure, close, rounds):
    """A measurement that wants more than containerd: what is missing is told, and its table is left out."""
    results = {}
    try:
        prepared = prepare()
    except Failure as failure:
        note(f"{title}: left out: {failure}")
        return results
    try:
        for number in range(rounds):
            measure(prepared, number, results)
            note(f"{title}: round {number + 1} of {rounds}")
    finally:
        close(prepared)
    return results


def versions(found):
    """What was measured on."""
    return {
        "kernel": platform.release(),
        "containerd": ctr("version").split("Version:")[-1].split()[0],
        "runc": command("runc", "--version").split()[2],
        "runsc": command("runsc", "--version").split()[2] if "runsc" in found else None,
        "cpus": os.cpu_count(),
        "cpu": cpu_model(),
        "command_line": pathlib.Path("/proc/cmdline").read_text().strip(),
        "guest_kernel": ctr("run", "--rm", *found["kata-rs"], IMAGE, "bench-uname", "uname", "-r").strip(),
    }


PARTS = ("starts", "pods", "network", "reads", "memory")
# Counts instead of measuring, and only when asked to.
COST = "cost"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rounds", type=int, nargs="?", default=12)
    parser.add_argument("--only", action="append", choices=(*PARTS, COST), help="measure this part, not all")
    parser.add_argument("--oci", default="oci.py", help="the program that packs an image (tests/images/oci.py)")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("at least one round is needed")
    rounds, parts = options.rounds, options.only or PARTS
    shutil.rmtree(WORK, ignore_errors=True)
    os.makedirs(WORK)
    found = runtimes()
    result = {"rounds": rounds, "host": versions(found)}
    if "starts" in parts:
        result |= starts(found, rounds)
    if "pods" in parts:
        results = further("pods", lambda: pods.prepared(found), pods.round_of, lambda _: None, rounds)
        if results:
            result.setdefault("seconds", {})["pod_start"] = results
    if "network" in parts:
        result["network_bits_per_s"] = further("network", lambda: network.prepared(found), network.round_of, network.close, rounds)
    if "reads" in parts:
        result["random_read"] = further("random reads", lambda: disk.prepared(found, options.oci), disk.round_of, disk.close, rounds)
    if "memory" in parts:
        result["memory"] = {}
        for name, flags in found.items():
            try:
                result["memory"][name] = pod_memory(name, flags)
            except Failure as failure:
                tolerate("memory", name, failure)
                for number in range(POD_COUNT + 1):
                    with contextlib.suppress(Failure):
                        remove(f"bench-memory-{name}-{number}")
    if COST in parts:
        result["cost_per_request"] = cost.measure(found["kata-rs"], options.oci)
        note(cost.table(result["cost_per_request"]))
    result["failures"] = FAILURES
    shutil.rmtree(WORK)
    print(json.dumps(result))


try:
    main()
except Failure as failure:
    sys.exit(f"measure.py: {failure}")
