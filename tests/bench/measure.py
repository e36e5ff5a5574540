#!/usr/bin/env python3
"""Measures kata-rs beside runc and runsc on the machine it runs on, and prints JSON.

    measure.py [ROUNDS]

Every round runs each case once with each runtime, so that whatever else the machine does hits all alike. Times are
wall seconds taken here, around the command that a user would type.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time

IMAGE = "localhost/busybox:1"
RUNTIMES = {
    "kata-rs": ["--runtime", "io.containerd.kata-rs.v2"],
    "runc": [],
    "runsc": ["--runc-binary", "/usr/local/bin/runsc-systrap"],
}
ARCHIVE = "/var/lib/kata-rs-test/images/busybox.oci.tar"


def ctr(*words, **keywords):
    """Runs ctr; a failure stops the benchmark with ctr's own words."""
    done = subprocess.run(["ctr", *words], capture_output=True, text=True, **keywords)
    if done.returncode != 0:
        sys.exit(f"ctr {' '.join(words)}: status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def timed(function):
    """Seconds that a call takes."""
    start = time.monotonic()
    function()
    return time.monotonic() - start


def run_true(flags, name):
    """`ctr run --rm ... true`, start to end."""
    return timed(lambda: ctr("run", "--rm", *flags, IMAGE, name, "true"))


def first_output(flags, name):
    """From the start of ctr to the first byte of the container's output."""
    start = time.monotonic()
    process = subprocess.Popen(
        ["ctr", "run", "--rm", *flags, IMAGE, name, "echo", "hi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    byte = process.stdout.read(1)
    seconds = time.monotonic() - start
    _, errors = process.communicate()
    if not byte or process.returncode != 0:
        sys.exit(f"ctr run echo with {flags}: {errors.decode().strip()}")
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


def pod_memory(runtime, flags, count=3):
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


def remove(name):
    """Kills and removes a container."""
    subprocess.run(["ctr", "task", "kill", "-s", "KILL", name], capture_output=True)
    for _ in range(100):
        if subprocess.run(["ctr", "task", "rm", "-f", name], capture_output=True).returncode == 0:
            break
        time.sleep(0.1)
    ctr("c", "rm", name)


def timeline():
    """Stages of one start by hand, in µs."""
    done = subprocess.run(
        ["kata-rs", "run", "--rm", "--timeline=json", ARCHIVE, "true"], capture_output=True, text=True
    )
    if done.returncode != 0:
        sys.exit(f"kata-rs run: {done.stderr.strip()}")
    stages = json.loads(done.stderr.strip().splitlines()[-1])
    container = stages.pop("containers")[0]
    container.pop("id")
    return stages | {f"container_{key}": value for key, value in container.items() if value is not None}


def cpu_model():
    """The processor's own name."""
    with open("/proc/cpuinfo") as file:
        return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    if rounds < 1:
        sys.exit("measure.py: at least one round is needed")
    runtimes = {name: flags for name, flags in RUNTIMES.items() if name != "runsc" or shutil.which("runsc-systrap")}
    results = {"run_true": {}, "first_output": {}, "exec_true": {}}
    for name, flags in runtimes.items():  # one of each that does not count: caches
        run_true(flags, f"bench-warm-{name}")
        ctr("run", "-d", *flags, IMAGE, f"bench-exec-{name}", "sleep", "3600")
    stages = []
    for number in range(rounds):
        for name, flags in runtimes.items():
            results["run_true"].setdefault(name, []).append(run_true(flags, f"bench-{name}-{number}"))
        for name, flags in runtimes.items():
            results["first_output"].setdefault(name, []).append(first_output(flags, f"bench-out-{name}-{number}"))
        for name in runtimes:
            results["exec_true"].setdefault(name, []).append(exec_true(f"bench-exec-{name}", f"x{number}"))
        stages.append(timeline())
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    for name in runtimes:
        remove(f"bench-exec-{name}")
    versions = {
        "kernel": platform.release(),
        "containerd": ctr("version").split("Version:")[1].split()[0],
        "runc": subprocess.run(["runc", "--version"], capture_output=True, text=True).stdout.split()[2],
        "cpus": os.cpu_count(),
        "cpu": cpu_model(),
        "command_line": open("/proc/cmdline").read().strip(),
        "guest_kernel": ctr("run", "--rm", *runtimes["kata-rs"], IMAGE, "bench-uname", "uname", "-r").strip(),
    }
    print(
        json.dumps(
            {
                "rounds": rounds,
                "host": versions,
                "seconds": results,
                "timeline_us": stages,
                "memory": {name: pod_memory(name, flags) for name, flags in runtimes.items()},
            }
        )
    )


main()
