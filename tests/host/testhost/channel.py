"""Running a command in a host: the client of guest/usr/lib/testhost/execd.py, which documents the frames."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import select
import signal
import socket
import struct
import sys
import termios
import time
import tty
from collections.abc import Iterator
from dataclasses import dataclass

from .errors import HostError

_HEADER = struct.Struct(">cI")
_VERSION = b"1"
_CHUNK = 1 << 16


class ChannelLost(HostError):
    """The host ended, or its exec service did, while a command was running or starting."""


@dataclass(frozen=True)
class Exit:
    """How a command ended: an exit code, or the signal that killed it, or why it could not start."""

    code: int = 0
    signal: int = 0
    error: str = ""

    @property
    def status(self) -> int:
        """The status a shell would show."""
        return 128 + self.signal if self.signal else self.code


class _Channel:
    def __init__(self, port: int, timeout: float | None = None):
        self._buffer = bytearray()
        try:
            self.sock = socket.create_connection(("127.0.0.1", port), timeout=timeout)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            kind, payload = self.receive()
            self.sock.settimeout(None)
        except OSError as error:
            raise ChannelLost(f"the test host does not answer: {error}") from error
        if (kind, payload) != (b"H", _VERSION):
            raise HostError(f"the test host speaks protocol {payload!r}, not {_VERSION!r}", "it was started by another version of these scripts: tests/host/down, then try again")

    def __enter__(self) -> _Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, kind: bytes, payload: bytes = b"") -> None:
        try:
            self.sock.sendall(_HEADER.pack(kind, len(payload)) + payload)
        except OSError as error:
            raise ChannelLost(f"the test host went away: {error}") from error

    def read(self) -> None:
        """Take what has arrived; blocks when nothing has."""
        try:
            data = self.sock.recv(4 * _CHUNK)
        except OSError as error:
            raise ChannelLost(f"the test host went away: {error}") from error
        if not data:
            raise ChannelLost("the test host closed the connection before the command ended")
        self._buffer += data

    def frames(self) -> Iterator[tuple[bytes, bytes]]:
        """The complete frames that were read."""
        while len(self._buffer) >= _HEADER.size:
            kind, length = _HEADER.unpack_from(self._buffer)
            end = _HEADER.size + length
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[_HEADER.size : end])
            del self._buffer[:end]
            yield kind, payload

    def receive(self) -> tuple[bytes, bytes]:
        """The next frame."""
        while True:
            for frame in self.frames():
                return frame
            self.read()


def ready(port: int) -> bool:
    """Whether the exec service answers."""
    try:
        with _Channel(port, timeout=5):
            return True
    except ChannelLost:
        return False


def wait_ready(port: int, alive: callable, seconds: float) -> None:
    """Wait until the exec service answers; `alive` raises when the host has ended."""
    deadline = time.monotonic() + seconds
    while not ready(port):
        alive()
        if time.monotonic() > deadline:
            raise ChannelLost(f"the test host's exec service did not answer within {seconds:.0f} s")
        time.sleep(0.02)


def after_restore(port: int) -> None:
    """Give a restored host the time of day and randomness of its own."""
    with _Channel(port) as channel:
        request = {"clock_ns": time.time_ns(), "entropy": secrets.token_hex(64)}
        channel.send(b"T", json.dumps(request).encode())
        channel.receive()


def capture(port: int, argv: list[str], stdin: bytes = b"") -> tuple[Exit, bytes, bytes]:
    """Run `argv` with small input; its exit, standard output and standard error."""
    collected = {b"O": bytearray(), b"R": bytearray()}
    with _Channel(port) as channel:
        channel.send(b"E", json.dumps({"argv": argv}).encode())
        if stdin:
            channel.send(b"I", stdin)
        channel.send(b"i")
        while True:
            kind, payload = channel.receive()
            if kind == b"X":
                return Exit(**json.loads(payload)), bytes(collected[b"O"]), bytes(collected[b"R"])
            if kind in collected:
                collected[kind] += payload


def interactive(port: int, argv: list[str], want_terminal: bool) -> Exit:
    """Run `argv` between this process's own standard streams; signals that end this process are passed on."""
    with _Channel(port) as channel, _signals(want_terminal) as signals, _raw_terminal(want_terminal):
        request: dict[str, object] = {"argv": argv}
        if want_terminal:
            request |= {"tty": True, "size": _terminal_size(), "env": {"TERM": os.environ.get("TERM", "xterm")}}
        channel.send(b"E", json.dumps(request).encode())
        return _Pump(channel, signals).run()


class _Pump:
    """Moves bytes between the standard streams and a channel until the command ends."""

    def __init__(self, channel: _Channel, signals: socket.socket):
        self.channel = channel
        self.signals = signals
        self.credit = 0
        self.input_open = True

    def run(self) -> Exit:
        while True:
            poller = select.poll()
            poller.register(self.channel.sock, select.POLLIN)
            poller.register(self.signals, select.POLLIN)
            if self.input_open and self.credit > 0:
                poller.register(0, select.POLLIN)
            for fd, event in poller.poll():
                if fd == self.signals.fileno():
                    self._pass_signals()
                elif fd == 0:
                    self._send_input(event)
                else:
                    self.channel.read()
            for kind, payload in self.channel.frames():
                if kind == b"O":
                    _write(1, payload)
                elif kind == b"R":
                    _write(2, payload)
                elif kind == b"C":
                    self.credit += struct.unpack(">I", payload)[0]
                elif kind == b"X":
                    return Exit(**json.loads(payload))

    def _send_input(self, event: int) -> None:
        try:
            # POLLNVAL: the caller closed its standard input.
            data = b"" if event & select.POLLNVAL else os.read(0, min(_CHUNK, self.credit))
        except OSError:
            data = b""
        if data:
            self.credit -= len(data)
            self.channel.send(b"I", data)
        else:
            self.input_open = False
            self.channel.send(b"i")

    def _pass_signals(self) -> None:
        for number in self.signals.recv(64):
            if number == signal.SIGWINCH:
                self.channel.send(b"W", struct.pack(">HH", *_terminal_size()))
            else:
                self.channel.send(b"S", bytes([number]))


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            # The descriptor is shared with somebody who made it non-blocking.
            select.select([], [fd], [])


def _terminal_size() -> tuple[int, int]:
    size = struct.unpack("HHHH", fcntl.ioctl(0, termios.TIOCGWINSZ, b"\0" * 8))
    return size[0] or 24, size[1] or 80


@contextlib.contextmanager
def _raw_terminal(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    before = termios.tcgetattr(0)
    # What was typed ahead stays.
    tty.setraw(0, termios.TCSADRAIN)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _signals(with_window_size: bool) -> Iterator[socket.socket]:
    """A socket that carries the number of every signal to pass on. The second one of a kind that ends
    processes ends this one, for a command that ignores the first."""
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    received = 0

    def note(number: int, _frame: object) -> None:
        nonlocal received
        received += 1
        if received > 1:
            sys.exit(128 + number)

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT]
    previous = {number: signal.signal(number, note) for number in numbers}
    if with_window_size:
        previous[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, lambda *_: None)
    wakeup = signal.set_wakeup_fd(writing.fileno())
    try:
        yield reading
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in previous.items():
            signal.signal(number, handler)
        reading.close()
        writing.close()
