"""Runs commands in the test host for clients outside: one TCP connection is one command.

Both directions carry frames: one type byte, the payload's length as a big-endian u32, the payload.

    client to here                          here to client
    E  JSON {argv, cwd?, env?, tty?}        H  protocol version: this end is ready for E
    T  JSON {clock_ns, entropy}             O  standard output
    I  standard input                       R  standard error
    i  end of standard input                C  u32: so many more bytes of I may be sent
    S  u8: a signal for the process group   X  JSON {code} or {signal} or {error, code}; the last frame
    W  u16 rows, u16 columns

Ends of streams are frames because a half-closed TCP connection is dropped by the emulated network
after two idle minutes. Standard input is sent against credit, so that a signal never waits behind
input that the command does not read. Closing the connection ends the command.

The protocol's other end is testhost/channel.py.
"""

import errno
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import traceback

PORT = 2323
VERSION = b"1"
HEADER = struct.Struct(">cI")
CREDIT = 1 << 20
CHUNK = 1 << 16
OUT_LIMIT = 1 << 19
MAX_FRAME = 1 << 20
# How long a stream may stay open without data after the command has ended: a background process may
# hold it for ever, and its output is not the command's.
LINGER = 0.2
GRACE = 5.0
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "USER": "root",
    "LANG": "C.UTF-8",
    "DM_DISABLE_UDEV": "1",
}
RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207


class Gone(Exception):
    """The client went away or broke the protocol."""


class Connection:
    """Framing over one client socket, never blocking except in flush()."""

    def __init__(self, sock):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.inbound = bytearray()
        self.outbound = bytearray()

    def send(self, kind, payload=b""):
        self.outbound += HEADER.pack(kind, len(payload)) + payload

    def push(self):
        """Write what the socket takes now."""
        try:
            while self.outbound:
                with memoryview(self.outbound) as view:
                    sent = self.sock.send(view[: 4 * CHUNK], socket.MSG_DONTWAIT)
                del self.outbound[:sent]
        except BlockingIOError:
            pass
        except OSError as error:
            raise Gone(str(error)) from error

    def flush(self):
        while self.outbound:
            self.push()
            if self.outbound:
                select.select([], [self.sock], [])

    def pull(self):
        """Read what is there now."""
        try:
            data = self.sock.recv(4 * CHUNK, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            raise Gone(str(error)) from error
        if not data:
            raise Gone("connection closed")
        self.inbound += data

    def frames(self):
        """The complete frames that have arrived."""
        while len(self.inbound) >= HEADER.size:
            kind, length = HEADER.unpack_from(self.inbound)
            if length > MAX_FRAME:
                raise Gone(f"frame of {length} bytes")
            end = HEADER.size + length
            if end > len(self.inbound):
                return
            payload = bytes(self.inbound[HEADER.size : end])
            # Before the yield: the caller may take one frame and come back later for the others.
            del self.inbound[:end]
            yield kind, payload

    def first(self):
        """Wait for the frame that says what this connection is for."""
        while True:
            for frame in self.frames():
                return frame
            select.select([self.sock], [], [])
            self.pull()


class Command:
    """A running command and the streams between it and its client."""

    def __init__(self, connection, request):
        self.connection = connection
        self.input = bytearray()
        self.input_ended = False
        self.outputs = {}
        self.terminal = -1
        self.process = self._terminal(request) if request.get("tty") else self._pipes(request)
        self.exit_fd = os.pidfd_open(self.process.pid)

    @staticmethod
    def _options(request):
        return {"cwd": request.get("cwd") or "/root", "env": {**ENVIRONMENT, **request.get("env", {})}, "restore_signals": True}

    def _pipes(self, request):
        process = subprocess.Popen(
            request["argv"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            **self._options(request),
        )
        self.input_fd = os.dup(process.stdin.fileno())
        process.stdin.close()
        self.outputs = {process.stdout.fileno(): b"O", process.stderr.fileno(): b"R"}
        for fd in (self.input_fd, *self.outputs):
            os.set_blocking(fd, False)
        return process

    def _terminal(self, request):
        master, slave = os.openpty()
        rows, columns = request.get("size") or (24, 80)
        set_size(master, rows, columns)
        options = self._options(request)
        options["env"].setdefault("TERM", "xterm")
        try:
            # setsid(1) makes the session and takes the terminal: Python's own fork hook is not safe beside threads.
            process = subprocess.Popen(["setsid", "--ctty", "--", *request["argv"]], stdin=slave, stdout=slave, stderr=slave, **options)
        finally:
            os.close(slave)
        self.terminal = master
        self.input_fd = os.dup(master)
        self.outputs = {master: b"O"}
        os.set_blocking(master, False)
        return process

    def signal(self, number):
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass

    def feed(self):
        """Give the command what it takes of its input, and its client credit for that."""
        taken = 0
        try:
            while self.input:
                with memoryview(self.input) as view:
                    count = os.write(self.input_fd, view[: 4 * CHUNK])
                del self.input[:count]
                taken += count
        except BlockingIOError:
            pass
        except OSError:
            # Nobody reads any more: the rest goes nowhere, as with a pipe on one machine.
            taken += len(self.input)
            self.input.clear()
            self._close_input()
        if taken:
            self.connection.send(b"C", struct.pack(">I", taken))
        if self.input_ended and not self.input:
            self._close_input()

    def _close_input(self):
        if self.input_fd < 0:
            return
        if self.terminal >= 0 and self.input_ended:
            # A terminal has no end of input; the control character says it to a program that reads lines.
            try:
                os.write(self.input_fd, b"\x04")
            except OSError:
                pass
        os.close(self.input_fd)
        self.input_fd = -1

    def drain(self, fd):
        """Pass on what the command wrote to one stream; false when there was nothing."""
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:
            return False
        except OSError as error:
            # The last holder of a terminal's other side has gone.
            if error.errno != errno.EIO:
                raise
            data = b""
        if data:
            self.connection.send(self.outputs[fd], data)
        else:
            del self.outputs[fd]
        return True

    def handle(self, kind, payload):
        if kind == b"I":
            if self.input_fd < 0:
                self.connection.send(b"C", struct.pack(">I", len(payload)))
            else:
                self.input += payload
        elif kind == b"i":
            self.input_ended = True
        elif kind == b"S" and len(payload) == 1:
            self.signal(payload[0])
        elif kind == b"W" and len(payload) == 4 and self.terminal >= 0:
            set_size(self.terminal, *struct.unpack(">HH", payload))
        else:
            raise Gone(f"unexpected frame {kind!r}")

    def run(self):
        """Move streams until the command has ended and its output is passed on; its exit as a dict."""
        connection = self.connection
        ended = False
        while True:
            for frame in connection.frames():
                self.handle(*frame)
            if self.input_fd >= 0 and (self.input or self.input_ended):
                self.feed()
            connection.push()
            poller = select.poll()
            poller.register(connection.sock, select.POLLIN | (select.POLLOUT if connection.outbound else 0))
            if self.input and self.input_fd >= 0:
                poller.register(self.input_fd, select.POLLOUT)
            if len(connection.outbound) < OUT_LIMIT:
                for fd in self.outputs:
                    poller.register(fd, select.POLLIN)
            if not ended:
                poller.register(self.exit_fd, select.POLLIN)
            # After the end, a stream that stays silent is somebody else's.
            waiting_for_client = len(connection.outbound) >= OUT_LIMIT
            ready = dict(poller.poll(LINGER * 1000 if ended and not waiting_for_client else None))
            if self.exit_fd in ready:
                ended = True
            progress = False
            for fd in list(self.outputs):
                if fd in ready:
                    progress |= self.drain(fd)
            if connection.sock.fileno() in ready:
                if ready[connection.sock.fileno()] & ~select.POLLOUT:
                    connection.pull()
                progress |= bool(ready[connection.sock.fileno()] & select.POLLOUT)
            if ended and (not self.outputs or not (progress or ready or waiting_for_client)):
                break
        status = self.process.wait()
        return {"code": status} if status >= 0 else {"signal": -status}

    def abandon(self):
        """The client is gone: end the command, politely first, because it may have to clean up."""
        self.signal(signal.SIGHUP if self.terminal >= 0 else signal.SIGTERM)
        if not select.select([self.exit_fd], [], [], GRACE)[0]:
            self.signal(signal.SIGKILL)
        # What is left of the group has lost its leader.
        self.signal(signal.SIGKILL)
        self.process.wait()

    def close(self):
        self._close_input()
        for fd in {self.exit_fd, self.terminal} - {-1}:
            os.close(fd)
        for stream in (self.process.stdout, self.process.stderr):
            if stream:
                stream.close()


def set_size(fd, rows, columns):
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def after_restore(request):
    """A restored machine has the clock and the random state of the moment it was saved."""
    time.clock_settime_ns(time.CLOCK_REALTIME, request["clock_ns"])
    entropy = bytes.fromhex(request["entropy"])
    fd = os.open("/dev/urandom", os.O_WRONLY)
    try:
        fcntl.ioctl(fd, RNDADDENTROPY, struct.pack("ii", len(entropy) * 8, len(entropy)) + entropy)
        fcntl.ioctl(fd, RNDRESEEDCRNG)
    finally:
        os.close(fd)


def start(connection, request):
    """The command, or the frame that says why there is none, with the shell's status for the reason."""
    try:
        return Command(connection, request), None
    except FileNotFoundError as error:
        return None, {"error": f"{error.filename}: not found in the test host", "code": 127}
    except (PermissionError, OSError) as error:
        return None, {"error": f"{request['argv'][0]}: {error.strerror}", "code": 126}


def serve(sock):
    connection = Connection(sock)
    try:
        connection.send(b"H", VERSION)
        connection.flush()
        kind, payload = connection.first()
        if kind == b"T":
            after_restore(json.loads(payload))
            connection.send(b"X", b'{"code": 0}')
        elif kind == b"E":
            command, failure = start(connection, json.loads(payload))
            if command:
                connection.send(b"C", struct.pack(">I", CREDIT))
                try:
                    failure = command.run()
                except Gone:
                    command.abandon()
                    raise
                finally:
                    command.close()
            connection.send(b"X", json.dumps(failure).encode())
        else:
            raise Gone(f"unexpected first frame {kind!r}")
        connection.flush()
        # The client closes first, so that nothing it has not read yet is lost to a reset.
        select.select([sock], [], [], GRACE)
    except Gone:
        pass
    except Exception:
        traceback.print_exc(file=sys.stderr)
    finally:
        sock.close()


def main():
    listener = socket.create_server(("", PORT), backlog=128)
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=serve, args=(sock,), daemon=True).start()


if __name__ == "__main__":
    main()
