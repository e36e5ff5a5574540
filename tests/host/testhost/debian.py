"""Debian packages on this machine: installing what is missing, and finding the mirror it uses."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from .cache import say
from .errors import HostError

MIRROR_VARIABLE = "KATA_RS_DEBIAN_MIRROR"


def privileged(argv: list[str]) -> list[str]:
    """`argv` as root: as it is for root, through sudo for others."""
    if os.geteuid() == 0:
        return argv
    if shutil.which("sudo"):
        return ["sudo", *argv]
    raise HostError(
        f"building the test host needs root for: {' '.join(argv)}",
        "run tests/host/build once as root (with the same KATA_RS_CACHE), or install sudo",
    )


def need(tools: dict[str, str]) -> None:
    """Make sure that each command exists; `tools` maps the command to the package that holds it."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = sorted({package for command, package in tools.items() if not shutil.which(command, path=path)})
    if not missing:
        return
    install = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
    if not shutil.which("apt-get"):
        raise HostError(f"missing tools from the Debian packages: {' '.join(missing)}", "install them with this system's package manager")
    say(f"installing Debian packages: {' '.join(missing)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for attempt in (install, ["apt-get", "update"], install):
        done = subprocess.run(privileged(attempt), env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if attempt is install and done.returncode == 0:
            return
    raise HostError(f"apt-get could not install {' '.join(missing)}:\n{done.stderr.strip()}", f"run by hand and read its output: {' '.join(install)}")


def mirror() -> str:
    """The address of the Debian archive in this machine's own apt set-up."""
    if chosen := os.environ.get(MIRROR_VARIABLE):
        return chosen
    found = _configured_mirror()
    if not found:
        # A fresh container image has no package lists yet, and apt names only archives it has lists for.
        subprocess.run(privileged(["apt-get", "update"]), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        found = _configured_mirror()
    if not found:
        raise HostError("this machine's apt knows no Debian archive", f"set {MIRROR_VARIABLE} to the address of a Debian mirror")
    return found


def _configured_mirror() -> str | None:
    if not shutil.which("apt-get"):
        return None
    listing = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(COMPONENT)|$(REPO_URI)", "Created-By: Packages"],
        capture_output=True,
        text=True,
    ).stdout
    for line in listing.splitlines():
        origin, label, component, address = line.split("|", 3)
        if (origin, label, component) == ("Debian", "Debian", "main"):
            return address.rstrip("/")
    return None


def run_script(script: Path, environment: dict[str, str], log: Path) -> None:
    """Run a build script as root with its output in `log`; the error carries the end of that output."""
    variables = [f"{name}={value}" for name, value in environment.items()]
    argv = privileged(["env", *variables, "nice", "-n", "5", "bash", str(script)])
    with open(log, "wb") as output:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        status = _wait(process, log)
    except BaseException:
        # The script's own children end with it, and clean up after themselves.
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    if status != 0:
        tail = "\n".join(_lines(log)[-15:])
        raise HostError(f"{script.name} failed with status {status}:\n{tail}", "the lines above say why; run tests/host/build again after the cure")


def _wait(process: subprocess.Popen, log: Path) -> int:
    """Wait for a build script; meanwhile show what it does, in place on a terminal, now and then elsewhere."""
    began = time.monotonic()
    live = sys.stderr.isatty()
    shown = ""
    while True:
        try:
            status = process.wait(timeout=1 if live else 30)
        except subprocess.TimeoutExpired:
            shown = f"  {time.monotonic() - began:4.0f} s  {(_lines(log) or [''])[-1][:60]:60}"
            print(shown, end="\r" if live else "\n", file=sys.stderr, flush=True)
        else:
            if live and shown:
                print(" " * len(shown), end="\r", file=sys.stderr, flush=True)
            return status


def _lines(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines()
