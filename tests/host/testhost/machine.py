"""One host: its run directory, its QEMU process, booting, restoring, saving, carrying files in, stopping.

A run directory is ``ROOT/run/NAME``. QEMU itself holds an exclusive lock on the file ``lock`` in it for as
long as it lives, whatever becomes of the process that started it: a directory whose lock can be taken is
dead and is cleared away. ``host.json`` appears when the host answers.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tarfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from . import cache, channel, qemu
from .errors import HostError

DEFAULT_NAME = "default"
NAME_VARIABLE = "KATA_RS_TEST_HOST"
# Emulation beside other work is slow; with hardware KVM a boot that takes this long has failed.
_BOOT_SECONDS = {"tcg": 300, "kvm": 60}
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Saved:
    """A saved machine: everything in `directory` that ``restore`` and ``boot`` need."""

    qemu: qemu.Qemu
    accelerator: str
    directory: Path
    boot: qemu.Boot

    @property
    def disk(self) -> Path:
        return self.directory / "disk.qcow2"

    @property
    def memory(self) -> Path:
        return self.directory / "memory"

    @property
    def devices(self) -> Path:
        return self.directory / "devices"


@dataclass(frozen=True)
class Record:
    """What ``host.json`` says about a running host."""

    name: str
    pid: int
    port: int
    accelerator: str
    state: str
    how: str
    started: float


class Host:
    """A running host. As a context manager it stops the host at the end, unless the host was kept."""

    def __init__(self, directory: Path, record: Record, process: subprocess.Popen | None):
        self.directory = directory
        self.record = record
        self._process = process
        self._control: qemu.Qmp | None = None

    @property
    def port(self) -> int:
        return self.record.port

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def cpu_seconds(self) -> float:
        """Processor time of the QEMU process, the load-independent cost of what ran in the host."""
        fields = Path(f"/proc/{self.record.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def check(self, argv: list[str], stdin: bytes = b"") -> bytes:
        """Run `argv` in the host; its standard output, or an error with its standard error."""
        ended, output, errors = channel.capture(self.port, argv, stdin)
        if ended.error or ended.status:
            text = ended.error or errors.decode(errors="replace").strip() or output.decode(errors="replace").strip()
            raise HostError(f"in the test host, `{' '.join(argv)}` ended with status {ended.status}: {text}")
        return output

    def carry_in(self, add: Callable[[tarfile.TarFile], None]) -> None:
        """Unpack an archive over the host's root; `add` fills the archive.

        The archive is written to the file behind the host's second disk, and read there without a cache.
        """
        with cache.locked(self.directory / "payload.lock", "waiting for another copy into the same test host"):
            with open(self.directory / "payload.raw", "r+b") as payload:
                with tarfile.open(fileobj=payload, mode="w", format=tarfile.GNU_FORMAT) as archive:
                    add(archive)
                size = payload.tell()
                if size > qemu.PAYLOAD_BYTES:
                    raise HostError(f"{size >> 20} MiB do not fit the {qemu.PAYLOAD_BYTES >> 20} MiB through which files go into a test host", "copy in several steps")
            # tar replaces files rather than writing into them, so what is running may be replaced;
            # a directory of the host may be a link to where it really is, and keeps its mode.
            unpack = (
                f"dd if=/dev/vdb bs=1M count={size} iflag=direct,count_bytes status=none"
                " | tar -xpf - -C / --no-same-owner --no-overwrite-dir --keep-directory-symlink"
            )
            self.check(["bash", "-o", "pipefail", "-c", unpack])

    def stop(self) -> None:
        """End QEMU and remove the run directory. Nothing in a host is worth a shutdown."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.record.pid, signal.SIGKILL)
        if self._process:
            self._process.wait()
        else:
            with open(self.directory / "lock") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX)
        shutil.rmtree(self.directory, ignore_errors=True)


def _runs() -> Path:
    path = cache.root() / "run"
    path.mkdir(exist_ok=True)
    return path


def _alive(directory: Path) -> bool:
    try:
        with open(directory / "lock") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def _claim(name: str) -> tuple[Path, int]:
    """A fresh run directory and the descriptor that holds its lock."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise HostError(f"`{name}` is no name for a test host", "use letters, digits, dot, dash and underscore")
    with cache.locked(_runs() / ".lock", "waiting for another start"):
        for old in _runs().iterdir():
            # A directory without a lock that anybody holds belongs to a host that has ended.
            if old.is_dir() and not _alive(old):
                shutil.rmtree(old, ignore_errors=True)
        directory = _runs() / name
        if directory.exists():
            raise HostError(f"a test host named {name} is running already", f"use it as it is, or end it first: tests/host/down --name {name}")
        directory.mkdir()
        lock = os.open(directory / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        return directory, lock


def running() -> list[Host]:
    """All hosts that run and answer."""
    hosts = (find(directory.name) for directory in sorted(_runs().iterdir()) if directory.is_dir())
    return [host for host in hosts if host]


def find(name: str, wait: bool = False) -> Host | None:
    """The running host of that name. One that is just starting is waited for when asked to."""
    directory = _runs() / name
    while _alive(directory):
        with contextlib.suppress(FileNotFoundError):
            return Host(directory, Record(**json.loads((directory / "host.json").read_text())), None)
        if not wait:
            return None
        time.sleep(0.05)
    return None


def boot(saved: Saved, name: str, background: bool) -> Host:
    """Boot a host from its kernel, on the disk of the saved one."""
    disk = [f"file={saved.disk}", "format=qcow2", "snapshot=on"]
    return _start(saved, name, background, "booted", disk, None, saved.boot)


def restore(saved: Saved, name: str, background: bool) -> Host:
    """Bring a saved host back: its memory is mapped privately, its disk is written beside the original."""
    disk = [f"file={saved.disk}", "format=qcow2", "snapshot=on"]
    return _start(saved, name, background, "restored", disk, qemu.Memory(saved.memory, shared=False), None)


def boot_for_saving(saved: Saved, name: str) -> Host:
    """Boot a host that writes to the disk and the memory file of `saved`, which save() then completes."""
    disk = [f"file={saved.disk}", "format=qcow2"]
    return _start(saved, name, False, "booted", disk, qemu.Memory(saved.memory, shared=True), saved.boot, keep_qmp=True)


def save(host: Host, saved: Saved) -> None:
    """Write the state of a host from boot_for_saving() and end it. No nested machine may run in it."""
    control = host._control
    assert control, "only a host from boot_for_saving() can be saved"
    control.execute("stop")
    _ignore_shared(control)
    control.execute("migrate", uri=f"file:{saved.devices}")
    control.wait_migration()
    control.execute("quit")
    host._process.wait()


def shut_down(host: Host) -> None:
    """Power a host from boot_for_saving() off the proper way, so that its disk is clean."""
    with contextlib.suppress(channel.ChannelLost):
        host.check(["busybox", "poweroff"])
    try:
        host._process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        raise HostError("the test host did not power off within a minute") from None


def _ignore_shared(control: qemu.Qmp) -> None:
    wanted = [{"capability": name, "state": True} for name in ("x-ignore-shared", "events")]
    control.execute("migrate-set-capabilities", capabilities=wanted)


def _start(
    saved: Saved,
    name: str,
    background: bool,
    how: str,
    disk: list[str],
    memory: qemu.Memory | None,
    boot_from: qemu.Boot | None,
    keep_qmp: bool = False,
) -> Host:
    directory, lock = _claim(name)
    process = None
    ours, theirs = socket.socketpair()
    try:
        console = directory / "console.log"
        console.touch()
        payload = directory / "payload.raw"
        with open(payload, "wb") as file:
            file.truncate(qemu.PAYLOAD_BYTES)
        options = qemu.arguments(saved.accelerator, disk, payload, console, theirs.fileno(), memory, boot_from)
        process = _spawn([*saved.qemu.system, *options], directory, (theirs.fileno(), lock), background)
        theirs.close()
        os.close(lock)
        lock = -1
        control = qemu.Qmp(ours)
        if not boot_from:
            _ignore_shared(control)
            control.execute("migrate-incoming", uri=f"file:{saved.devices}")
            control.wait_migration()
            control.execute("cont")
        port = control.forwarded_port()

        def alive() -> None:
            if process.poll() is not None:
                raise HostError(f"QEMU ended with status {process.returncode}")

        channel.wait_ready(port, alive, _BOOT_SECONDS[saved.accelerator])
        record = Record(name, process.pid, port, saved.accelerator, str(saved.directory), how, time.time())
        host = Host(directory, record, process)
        if boot_from:
            host.check(["wait-ready"])
        else:
            channel.after_restore(port)
        if keep_qmp:
            host._control = control
        else:
            control.close()
        partial = directory / "host.json.tmp"
        partial.write_text(json.dumps(asdict(record)))
        partial.rename(directory / "host.json")
        return host
    except BaseException as error:
        last_words = _last_words(directory)
        if process:
            process.kill()
            process.wait()
        if lock >= 0:
            os.close(lock)
        ours.close()
        theirs.close()
        shutil.rmtree(directory, ignore_errors=True)
        if isinstance(error, HostError):
            raise HostError(f"the test host did not start ({saved.accelerator}): {error}{last_words}") from error
        raise


def _spawn(argv: list[str], directory: Path, descriptors: tuple[int, ...], background: bool) -> subprocess.Popen:
    libc = ctypes.CDLL(None)

    def die_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    with open(directory / "qemu.log", "wb") as log:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=descriptors,
            # Snapshot overlays of the disk go here; QEMU unlinks them at once.
            env={**qemu.environment(), "TMPDIR": str(directory)},
            # A Ctrl-C is for the command in the host; QEMU is ended by us.
            start_new_session=True,
            preexec_fn=None if background else die_with_parent,
        )


def _last_words(directory: Path) -> str:
    words = ""
    for title, file in (("QEMU", "qemu.log"), ("its console", "console.log")):
        with contextlib.suppress(OSError):
            lines = (directory / file).read_text(errors="replace").strip().splitlines()
            lines = [line for line in lines if ": warning: " not in line][-12:]
            if lines:
                words += f"\n{title} said last:\n  " + "\n  ".join(lines)
    return words
