"""What the measurements share: containerd's client, the runtimes, and waiting for containers to go."""

import os
import shutil
import subprocess
import sys
import time

IMAGE = "localhost/busybox:1"
ARCHIVE = "/var/lib/kata-rs-test/images/busybox.oci.tar"
# Where the measurements keep their files while they run.
WORK = "/run/kata-rs-bench"

RUNTIMES = {
    "kata-rs": ["--runtime", "io.containerd.kata-rs.v2"],
    "runc": [],
    "runsc": ["--runc-binary", "/usr/local/bin/runsc-systrap"],
}


class Failure(Exception):
    """A command failed; its text is what it said."""


def runtimes():
    """The runtimes that this machine has, with ctr's flags."""
    return {name: flags for name, flags in RUNTIMES.items() if name != "runsc" or shutil.which("runsc-systrap")}


def command(*words, **keywords):
    """Runs a command and returns its output; Failure has its own words."""
    done = subprocess.run(words, capture_output=True, text=True, **keywords)
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
    subprocess.run(["ctr", "task", "kill", "-s", "KILL", name], capture_output=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done = subprocess.run(["ctr", "task", "rm", "-f", name], capture_output=True, text=True)
        if done.returncode == 0 or "not found" in done.stderr:
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
