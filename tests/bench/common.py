"""What the measurements share: containerd's client, the runtimes, and waiting for containers to go."""

import contextlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

IMAGE = "localhost/busybox:1"
ARCHIVE = "/var/lib/kata-rs-test/images/busybox.oci.tar"
# Where the measurements keep their files while they run.
WORK = "/run/kata-rs-bench"
# Where gVisor's kernel leaves its last words.
PANICS = f"{WORK}/panics"


# What failed: by part and case, how often, and why the last time. It goes into the tables as footnotes.
FAILURES = {}


class Failure(Exception):
    """A command failed; its text is what it said."""


def failed(part, case, failure):
    """Notes that a case of a part has failed in a round."""
    why = reason(failure)
    note(f"{part}, {case}: {why}")
    entry = FAILURES.setdefault(part, {}).setdefault(case, {"times": 0})
    entry["times"] += 1
    entry["reason"] = why


def reason(failure):
    """Why: the panic of gVisor's kernel, if it left one since the last call, else what the command said."""
    panics = sorted(pathlib.Path(PANICS).glob("*"))
    text = "".join(path.read_text(errors="replace") for path in panics)
    for path in panics:
        path.unlink()
    panic = next((line for line in text.splitlines() if line.startswith(("panic:", "fatal error:"))), None)
    if panic is None:
        return str(failure)
    if "task goroutine for kernel.Task" in panic:
        panic = re.sub(r"0x[0-9a-f]+|\d+", "…", panic)
        return (
            f"gVisor's kernel ended with `{panic}`: what it takes for the ids of its goroutines is 0 or some large number "
            "in this build of it, and where it compares them (in read, wait4 and others that block) it ends when they differ"
        )
    return f"gVisor's kernel ended with `{panic}`"


def gvisor(network):
    """ctr's flags for runsc with this kind of network; when its kernel panics, `reason` finds out."""
    os.makedirs(PANICS, exist_ok=True)
    wrapper = f"{WORK}/runsc-network-{network}"
    with open(wrapper, "w") as script:
        script.write(f'#!/bin/sh\nexec runsc --platform=systrap --network={network} --panic-log={PANICS}/ "$@"\n')
    os.chmod(wrapper, 0o755)
    return ["--runc-binary", wrapper]


def runtimes():
    """The runtimes that this machine has, with ctr's flags."""
    found = {"kata-rs": ["--runtime", "io.containerd.kata-rs.v2"], "runc": []}
    if shutil.which("runsc"):
        found["runsc"] = gvisor("none")
    return found


# Nothing that is measured takes as long, in seconds: a runtime that hangs has failed.
PATIENCE = 180


def command(*words, **keywords):
    """Runs a command and returns its output; Failure has its own words."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, **keywords)
    except subprocess.TimeoutExpired as late:
        raise Failure(f"{' '.join(words)}: no end after {PATIENCE} s") from late
    if done.returncode != 0:
        raise Failure(f"{' '.join(words)}: status {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def ctr(*words, **keywords):
    """Runs ctr."""
    return command("ctr", *words, **keywords)


def note(text):
    """Says how far the run is."""
    print(text, file=sys.stderr, flush=True)


def timed(function):
    """Seconds that a call takes."""
    start = time.monotonic()
    function()
    return time.monotonic() - start


def remove(name):
    """Kills and removes a container."""
    with contextlib.suppress(Failure):
        ctr("task", "kill", "-s", "KILL", name)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            ctr("task", "rm", "-f", name)
            break
        except Failure as failure:
            if "not found" in str(failure):
                break
        time.sleep(0.1)
    ctr("c", "rm", name)


def tools(*programs):
    """A directory with these programs of the host and the libraries they need, for any container: `run` starts them.

    Failure names a program that is not there.
    """
    missing = [program for program in programs if not shutil.which(program)]
    if missing:
        raise Failure(f"not installed on this machine: {', '.join(missing)}")
    directory = f"{WORK}/tools"
    subprocess.run(["mkdir", "-p", directory], check=True)
    loader = None
    for program in programs:
        path = shutil.which(program)
        shutil.copy(path, f"{directory}/{program}.bin")
        for line in command("ldd", path).splitlines():
            library = next((word for word in line.split() if word.startswith("/")), None)
            if library:
                shutil.copy(library, directory)
                # The C library loads this one by itself when a thread is ended.
                gcc = f"{library.rpartition('/')[0]}/libgcc_s.so.1"
                if os.path.exists(gcc):
                    shutil.copy(gcc, directory)
                if "ld-linux" in library:
                    loader = library.rpartition("/")[2]
        if loader is None:
            raise Failure(f"{path} has no loader: it is not a dynamic program of this machine")
        with open(f"{directory}/{program}", "w") as script:
            script.write(f'#!/bin/sh\nexec /tools/{loader} --library-path /tools /tools/{program}.bin "$@"\n')
        subprocess.run(["chmod", "755", f"{directory}/{program}"], check=True)
    return ["--mount", f"type=bind,src={directory},dst=/tools,options=rbind:ro"]
