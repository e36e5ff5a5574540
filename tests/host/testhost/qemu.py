"""QEMU: which one, with which accelerator and arguments, and its control socket (QMP).

Nested virtualisation under emulation needs a recent QEMU: 7.2 corrupts the inner kernel in some of its
boots, 10.0 aborts now and then, 11.1 does neither. An older distribution's QEMU is therefore passed over for one
that is unpacked into the cache with its own libraries.

With two emulated CPUs even 11.1 ends a nested guest wrongly about once in a thousand container starts: a second #VMEXIT
follows the first without a VMRUN between them, and the guest's saved state is then the host's own (its instruction
pointer is kvm_amd's, behind VMRUN). Such a guest spins in nested page faults for ever, or triple-faults. With one CPU
that was never seen.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .errors import HostError

OLDEST_GOOD = 11
MEMORY_MIB = 4096
# By accelerator; see above.
CPUS = {"kvm": 2, "tcg": 1}
# The disk that carries files into a host. Sparse, and of one size, since a saved machine restores only
# into a machine with the same devices.
PAYLOAD_BYTES = 2 << 30
ACCELERATOR_VARIABLE = "KATA_RS_TEST_HOST_ACCEL"

_KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet loglevel=4 panic=-1 net.ifnames=0 audit=0 mitigations=off nokaslr nowatchdog "
    "random.trust_cpu=on cryptomgr.notests apparmor=0 rdinit=/init"
)
# Under emulation the timer check fails at times, and the clock source is ours to trust.
_KERNEL_ARGUMENTS_TCG = "no_timer_check tsc=reliable"


@dataclass(frozen=True)
class Qemu:
    """A QEMU that can be started: argument vectors up to the program's own options."""

    system: tuple[str, ...]
    img: tuple[str, ...]
    version: str


@dataclass(frozen=True)
class Boot:
    """What a fresh machine starts from."""

    kernel: Path
    initrd: Path


@dataclass(frozen=True)
class Memory:
    """The file behind the machine's memory; a shared one is written through, a private one only read."""

    file: Path
    shared: bool


def system_qemu() -> Qemu | None:
    """The distribution's QEMU, when it is new enough."""
    program, image = shutil.which("qemu-system-x86_64"), shutil.which("qemu-img")
    if not program or not image:
        return None
    found = _probe(Qemu((program,), (image,), ""))
    return found if int(found.version.split(".")[0]) >= OLDEST_GOOD else None


def unpacked_qemu(directory: Path) -> Qemu:
    """The QEMU that image/qemu.sh unpacked, run by its own loader with its own libraries."""
    root = directory / "root"
    libraries = root / "usr/lib/x86_64-linux-gnu"
    loader = (str(root / "usr/lib64/ld-linux-x86-64.so.2"), "--library-path", f"{libraries}:{libraries}/pulseaudio")
    program = (*loader, str(root / "usr/bin/qemu-system-x86_64"), "-L", str(root / "usr/share/seabios"), "-L", str(root / "usr/share/qemu"))
    return _probe(Qemu(program, (*loader, str(root / "usr/bin/qemu-img")), ""))


def _probe(qemu: Qemu) -> Qemu:
    done = subprocess.run([*qemu.system, "--version"], capture_output=True, text=True, env=environment())
    found = re.search(r"version (\d+\.\d+[\d.]*)", done.stdout)
    if not found:
        raise HostError(f"{qemu.system[0]} does not run: {done.stderr.strip()}", "repair that QEMU, or take it out of PATH so that one is unpacked instead")
    return Qemu(qemu.system, qemu.img, found.group(1))


def environment() -> dict[str, str]:
    """The environment QEMU runs in: display and audio modules of another version must not load."""
    return {**os.environ, "QEMU_MODULE_DIR": "/nonexistent", "QEMU_AUDIO_DRV": "none"}


def nesting_kvm() -> bool:
    """Whether this machine's KVM claims to run hypervisors inside its guests."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    for vendor in ("amd", "intel"):
        parameter = Path(f"/sys/module/kvm_{vendor}/parameters/nested")
        if parameter.exists() and parameter.read_text().strip() in ("1", "Y"):
            return True
    return False


def arguments(accelerator: str, disk: list[str], payload: Path, console: Path, qmp_fd: int, memory: Memory | None, boot: Boot | None) -> list[str]:
    """Options for one machine. `disk` holds the -drive properties of the root disk; without `boot` the
    machine waits for a saved state on its control socket."""
    machine = "q35,usb=off,sata=off,smbus=off,hpet=off,vmport=off"
    if accelerator == "kvm":
        cpu = ["-accel", "kvm", "-cpu", "host"]
        extra = ""
    else:
        cpu = ["-accel", "tcg,thread=multi,tb-size=512", "-cpu", "EPYC,svm=on"]
        extra = _KERNEL_ARGUMENTS_TCG
    options = [*cpu, "-smp", str(CPUS[accelerator]), "-m", str(MEMORY_MIB)]
    if memory:
        share = "on" if memory.shared else "off"
        options += ["-object", f"memory-backend-file,id=ram,size={MEMORY_MIB}M,mem-path={memory.file},share={share}"]
        machine += ",memory-backend=ram"
    options += ["-M", machine, "-nodefaults", "-no-reboot", "-display", "none"]
    options += ["-chardev", f"file,id=console,path={console}", "-serial", "chardev:console"]
    options += ["-chardev", f"socket,id=qmp,fd={qmp_fd}", "-mon", "chardev=qmp,mode=control"]
    # Nothing of a host outlives it, so nothing is ever flushed to this machine's disk.
    options += ["-drive", ",".join(["if=none,id=root,cache=unsafe,aio=threads,discard=unmap", *disk])]
    options += ["-device", "virtio-blk-pci,drive=root"]
    options += ["-drive", f"if=none,id=payload,cache=unsafe,aio=threads,format=raw,read-only=on,file={payload}"]
    options += ["-device", "virtio-blk-pci,drive=payload"]
    # No way out: tests need no network, and other things on this machine are none of their business.
    options += ["-netdev", "user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:0-:2323"]
    options += ["-device", "virtio-net-pci,netdev=net,romfile=", "-device", "virtio-rng-pci"]
    if boot:
        options += ["-kernel", str(boot.kernel), "-initrd", str(boot.initrd), "-append", f"{_KERNEL_ARGUMENTS} {extra}"]
    else:
        options += ["-incoming", "defer"]
    return options


class Qmp:
    """QEMU's control protocol over one connected socket."""

    def __init__(self, sock: socket.socket):
        self._sock = sock
        self._file = sock.makefile("rwb")
        self._events: list[dict] = []
        self._receive()
        self.execute("qmp_capabilities")

    def close(self) -> None:
        """Hang up; QEMU goes on."""
        self._file.close()
        self._sock.close()

    def execute(self, command: str, **arguments: object) -> object:
        """Run one command and return what it returns."""
        self._file.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self._file.flush()
        while True:
            answer = self._receive()
            if "event" in answer:
                self._events.append(answer)
            elif "error" in answer:
                raise HostError(f"QEMU refused {command}: {answer['error']['desc']}")
            else:
                return answer["return"]

    def wait_migration(self) -> None:
        """Wait until a migration, out or in, is complete."""
        while True:
            event = self._events.pop(0) if self._events else self._receive()
            if event.get("event") != "MIGRATION":
                continue
            status = event["data"]["status"]
            if status == "completed":
                return
            if status in ("failed", "cancelled"):
                reason = self.execute("query-migrate").get("error-desc", "no reason given")
                raise HostError(f"QEMU could not move the machine's state: {reason}")

    def forwarded_port(self) -> int:
        """The port of this machine that leads to the exec service."""
        table = self.execute("human-monitor-command", **{"command-line": "info usernet"})
        found = re.search(r"HOST_FORWARD\S*\s+\d+\s+127\.0\.0\.1\s+(\d+)", table)
        if not found:
            raise HostError(f"QEMU forwards no port to the test host:\n{table}")
        return int(found.group(1))

    def _receive(self) -> dict:
        try:
            line = self._file.readline()
        except OSError as error:
            raise HostError(f"QEMU's control socket failed: {error}") from error
        if not line:
            raise HostError("QEMU ended")
        return json.loads(line)
