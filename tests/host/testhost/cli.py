"""The commands of the test host; the files tests/host/{build,up,down,status,install,run} call main()."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from . import build, cache, channel, machine
from .errors import HostError

# What `make stage` leaves: a host that is started here gets it, so that it runs the fresh binaries.
_STAGE = Path(__file__).resolve().parents[3] / "target" / "stage"
_INSTALL = f"copy this directory tree over the host's root first (default for a host that this starts: {_STAGE}, once `make stage` has made it)"
_COPY = re.compile(r"(?P<source>.+?)(?::(?P<target>/.*))?", re.DOTALL)


def main(command: str) -> None:
    """Run one command with this process's arguments, and exit with its status."""
    # A standard stream that the caller closed must not become some file that is opened below.
    for fd in (0, 1, 2):
        with contextlib.suppress(OSError):
            os.fstat(fd)
            continue
        os.open(os.devnull, os.O_RDWR)
    # Whatever ends this process unwinds it first, so that a private host is stopped and cleared away.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    try:
        sys.exit(_COMMANDS[command]())
    except HostError as error:
        cache.say(str(error))
        sys.exit(125)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        # The reader of our output has left, as in `run -- yes | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        # A full disk, or a cache that belongs to somebody else.
        cache.say(f"{error}\n  the test host keeps its files in {os.environ.get('KATA_RS_CACHE') or '~/.cache/kata-rs'} (KATA_RS_CACHE): it needs 5 GiB there, and to be yours")
        sys.exit(125)


def _parser(program: str, text: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"tests/host/{program}", description=text)


def _with_name(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    default = os.environ.get(machine.NAME_VARIABLE, machine.DEFAULT_NAME)
    parser.add_argument("--name", default=default, help=f"the running host that is meant (default: ${machine.NAME_VARIABLE}, now {default})")
    return parser


def _build() -> int:
    _parser("build", "Build everything a test host needs. Does nothing when it is all there.").parse_args()
    saved = build.saved_host()
    print(f"{saved.directory}: QEMU {saved.qemu.version}, accelerator {saved.accelerator}")
    return 0


def _up() -> int:
    parser = _with_name(_parser("up", "Start a host that stays; tests/host/run uses it from then on."))
    parser.add_argument("--fresh", action="store_true", help="boot it instead of restoring the saved one")
    parser.add_argument("--install", metavar="STAGE", type=_directory, help=_INSTALL)
    options = parser.parse_args()
    if host := machine.find(options.name, wait=True):
        cache.say(f"{options.name} is running already, since {time.strftime('%H:%M', time.localtime(host.record.started))}")
    else:
        host = _start(options.name, options.fresh, background=True)
        options.install = options.install or _staged()
    if options.install:
        host.carry_in(_tree(options.install))
    print(f"test host {host.record.name}: {host.record.how}, accelerator {host.record.accelerator}, QEMU process {host.record.pid}")
    return 0


def _down() -> int:
    parser = _with_name(_parser("down", "End a running host. Everything in it is lost."))
    parser.add_argument("--all", action="store_true", help="end all running hosts")
    options = parser.parse_args()
    hosts = machine.running() if options.all else [host for host in [machine.find(options.name, wait=True)] if host]
    for host in hosts:
        host.stop()
        cache.say(f"{host.record.name} has ended")
    if not hosts:
        cache.say("no host is running" if options.all else f"{options.name} is not running")
    return 0


def _status() -> int:
    _parser("status", "Print the running hosts as JSON, one per line, with the CPU seconds their QEMU has used.").parse_args()
    for host in machine.running():
        print(json.dumps({**asdict(host.record), "cpu_seconds": host.cpu_seconds()}))
    return 0


def _install() -> int:
    parser = _with_name(_parser("install", "Copy a directory tree, as made by `make install DESTDIR=STAGE`, over a running host's root."))
    parser.add_argument("stage", metavar="STAGE", type=_directory)
    options = parser.parse_args()
    host = machine.find(options.name, wait=True)
    if not host:
        raise HostError(f"no test host named {options.name} is running", "start one with tests/host/up, or use tests/host/run --install STAGE -- COMMAND")
    began = time.monotonic()
    host.carry_in(_tree(options.stage))
    cache.say(f"installed {options.stage} in {time.monotonic() - began:.1f} s")
    return 0


def _run() -> int:
    parser = _with_name(
        _parser(
            "run",
            "Run COMMAND in the test host: in the running one if there is one, else in one that is restored for it and ended after it. "
            "Standard streams, exit status and signals pass through; 125 means that the test host itself failed.",
        )
    )
    parser.add_argument("--fresh", action="store_true", help="boot a host for this command, whatever is running")
    parser.add_argument("--private", action="store_true", help="restore a host for this command, whatever is running")
    parser.add_argument("--keep", action="store_true", help="leave the host running afterwards, as tests/host/up does")
    parser.add_argument("--copy", action="append", default=[], type=_copy, metavar="FILE[:GUESTPATH]", help="carry a file or directory in first (default: to /root/)")
    parser.add_argument("--install", metavar="STAGE", type=_directory, help=_INSTALL)
    parser.add_argument("-t", "--tty", action="store_true", help="give COMMAND a terminal; standard input must be one")
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    arguments = sys.argv[1:]
    if "--" not in arguments and not {"-h", "--help"} & set(arguments):
        parser.error("put -- before COMMAND")
    options = parser.parse_args()
    if options.tty and not os.isatty(0):
        raise HostError("-t needs a terminal as standard input", "leave -t out")

    with contextlib.ExitStack() as cleanup:
        host = None if options.fresh or options.private else machine.find(options.name, wait=True)
        if not host:
            # Without a name of its own, so that any number of them run side by side.
            name = options.name if options.keep else f"run-{os.getpid()}"
            host = _start(name, options.fresh, background=options.keep)
            if not options.keep:
                cleanup.enter_context(host)
            options.install = options.install or _staged()
        if options.install or options.copy:
            host.carry_in(_all([*([_tree(options.install)] if options.install else []), *options.copy]))
        ended = channel.interactive(host.port, options.command, options.tty)
    if ended.error:
        print(f"tests/host/run: {ended.error}", file=sys.stderr)
    return ended.status


def _staged() -> Path | None:
    return _STAGE if _STAGE.is_dir() else None


def _start(name: str, fresh: bool, background: bool) -> machine.Host:
    saved = build.saved_host()
    return (machine.boot if fresh else machine.restore)(saved, name, background)


_Filler = Callable[[tarfile.TarFile], None]


def _as_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    return entry


def _tree(directory: Path) -> _Filler:
    return lambda archive: archive.add(directory, ".", filter=_as_root)


def _all(fillers: list[_Filler]) -> _Filler:
    def fill(archive: tarfile.TarFile) -> None:
        for filler in fillers:
            filler(archive)

    return fill


def _copy(text: str) -> _Filler:
    match = _COPY.fullmatch(text)
    source = Path(match["source"]) if match else Path()
    if not match or not source.exists():
        raise argparse.ArgumentTypeError(f"{source} does not exist")
    target = match["target"] or "/root/"
    if target.endswith("/"):
        target += source.resolve().name
    # A link named on the command line means the file it leads to.
    return lambda archive: archive.add(source.resolve(), target.lstrip("/"), filter=_as_root)


def _directory(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a directory")
    return path


_COMMANDS = {"build": _build, "up": _up, "down": _down, "status": _status, "install": _install, "run": _run}
