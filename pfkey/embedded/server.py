"""Serves one embedded kernel to any number of processes on a unix socket: `pfkey embedded --listen PATH`.

Each connection has a thread that makes the calls of `pfkey.served`; the end of a process closes its connection.
"""

from __future__ import annotations

import json
import os
import select
import socket
import stat
import sys
import threading
from argparse import Namespace
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from ..errors import NotSupported, PFKeyError
from ..served import PROTOCOL, SIZE, Call, Frame, Frames, abi_name, joined, split
from ..target import UsageError
from .channel import EmbeddedChannel
from .kernel import EmbeddedKernel

__all__ = ["Server", "run"]

_LONGEST_SLEEP = 1.0
_SLICE = 1 << 16
_JUST_OURS = 0o600


class Server:
    """Serves `kernel` on a unix socket at `path` from `start()` to `close()`, or within `with`.

    The kernel may be used in this process at the same time: probes, faults, the clock.  Raises PFKeyError when somebody
    listens on `path` or something else is there; a socket that nobody listens on any more is replaced.
    """

    def __init__(self, kernel: EmbeddedKernel, path: str | os.PathLike[str]) -> None:
        self.kernel = kernel
        self.path = os.path.abspath(path)
        self._listener: socket.socket | None = None
        self._file: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._connections: dict[int, _Connection] = {}
        self._until = 0.0

    @property
    def target(self) -> str:
        """What connect() and --kernel take."""
        return f"unix:{self.path}"

    @property
    def connections(self) -> int:
        """How many there are at the moment."""
        with self._lock:
            return len(self._connections)

    def start(self) -> None:
        """Listen, and serve from threads of its own."""
        self._listener = _listening(self.path)
        self._alarm, self._nudges = socket.socketpair()
        self._nudges.setblocking(False)
        status = os.stat(self.path)
        self._file = (status.st_dev, status.st_ino)
        self._thread = threading.Thread(target=self._accept, name=f"pfkey {self.target}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until close() or an interrupt."""
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(_LONGEST_SLEEP)

    def close(self) -> None:
        """End every connection and remove the socket, unless another one has taken its place; the kernel stays."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        self.nudge()
        if self._thread is not None:
            self._thread.join()
        self._remove()
        listener.close()
        with self._lock:
            connections = list(self._connections.values())
        for connection in connections:
            connection.end()
        self._alarm.close()
        self._nudges.close()

    def _remove(self) -> None:
        try:
            status = os.stat(self.path)
            if (status.st_dev, status.st_ino) == self._file:
                os.unlink(self.path)
        except FileNotFoundError:
            pass

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Between the threads.

    def nudge(self) -> None:
        """Look again at what is due."""
        with suppress(OSError):  # it is full of nudges, or closed
            self._nudges.send(b"!")

    def leave(self, connection: _Connection) -> None:
        """It has ended."""
        with self._lock:
            self._connections.pop(id(connection), None)

    def look_ahead(self) -> None:
        """A call may have set a timer that is due before this server wakes up."""
        if self.kernel.deadline < self._until:
            self.nudge()

    def _accept(self) -> None:
        """Take connections, and let the kernel's timers run for those who sleep until there is something to read."""
        while (listener := self._listener) is not None:
            with self.kernel.lock:
                self.kernel.run_timers()
                sleep = self.kernel.patience(_LONGEST_SLEEP) or 0.0
                self._until = self.kernel.now() + sleep
            ready, _, _ = select.select([listener, self._alarm], [], [], sleep)
            if self._alarm in ready:
                self._alarm.recv(_SLICE)
            if listener in ready and self._listener is not None:
                try:
                    accepted, _ = listener.accept()
                except OSError:
                    continue  # it has left again, or there are no descriptors left: the next one may fare better
                connection = _Connection(self, accepted)
                with self._lock:
                    self._connections[id(connection)] = connection
                connection.start()


class _Connection:
    """One client: its socket, the bell at which it hears of messages, and its connection to the kernel."""

    def __init__(self, server: Server, accepted: socket.socket) -> None:
        self._server = server
        self._socket = accepted
        self._bell: socket.socket | None = None
        self._rung = False
        self._frames = Frames()
        self._channel: EmbeddedChannel | None = None
        self._thread = threading.Thread(target=self._serve, name=f"client of {server.target}", daemon=True)

    def start(self) -> None:
        """Serve it from now on."""
        self._thread.start()

    def end(self) -> None:
        """The server ends: so does the client's connection."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _serve(self) -> None:
        try:
            while (frame := self._next()) is not None:
                self._reply(frame)
                self._server.look_ahead()
        except (OSError, ValueError):
            pass  # it has gone, or it speaks something else
        finally:
            if self._channel is not None:
                self._channel.close()
            for one in (self._bell, self._socket):
                if one is not None:
                    one.close()
            self._server.leave(self)

    def _next(self) -> Frame | None:
        while (frame := self._frames.next()) is None:
            data = self._socket.recv(_SLICE)
            if not data:
                return None
            self._frames.feed(data)
        return frame

    def _reply(self, frame: Frame) -> None:
        if frame.call == Call.HELLO:
            self._greet(frame)
            return
        if self._channel is None:
            raise ValueError("no greeting")
        try:
            payload, failed = self._do(frame, self._channel), False
        except OSError as error:
            payload, failed = json.dumps(_told(error)).encode(), True
        self._socket.sendall(Frame(frame.number, frame.call, failed, payload).packed())

    def _greet(self, frame: Frame) -> None:
        """The first call: the client gets the other end of the bell."""
        if self._channel is not None:
            raise ValueError("greeted twice")
        self._bell, theirs = socket.socketpair()
        self._bell.setblocking(False)
        kernel = self._server.kernel
        self._channel = kernel.connect()
        self._channel.on_arrival = self._ring
        hello = {"protocol": PROTOCOL, "profile": kernel.profile.name, "abi": abi_name(kernel.abi)}
        hello |= _buffers(self._channel)
        answer = Frame(frame.number, frame.call, False, json.dumps(hello).encode()).packed()
        with theirs:
            sent = socket.send_fds(self._socket, [answer], [theirs.fileno()])
        self._socket.sendall(answer[sent:])

    def _do(self, frame: Frame, channel: EmbeddedChannel) -> bytes:
        if frame.call == Call.SEND:
            return SIZE.pack(channel.send_many(split(frame.payload)))
        if frame.call == Call.RECEIVE:
            return self._fetch(channel, *SIZE.unpack(frame.payload))
        if frame.call == Call.BUFFER:
            channel.set_receive_buffer(*SIZE.unpack(frame.payload))
            return json.dumps(_buffers(channel)).encode()
        channel.grace_period()
        return b""

    def _fetch(self, channel: EmbeddedChannel, limit: int) -> bytes:
        with self._server.kernel.lock:
            messages = channel.receive_many(limit, 0) if limit else []
            taken_down = self._rung and not channel.waiting
            if taken_down:
                self._rung = False
        return bytes((taken_down,)) + joined(messages)

    def _ring(self) -> None:
        """Under the kernel's lock: a message has arrived."""
        if not self._rung and self._bell is not None:
            self._rung = True
            with suppress(OSError):  # it has gone
                self._bell.send(b"!")


def _buffers(channel: EmbeddedChannel) -> dict[str, int]:
    return {"receive_buffer": channel.receive_buffer, "in_flight": channel.in_flight}


def _told(error: OSError) -> dict[str, Any]:
    return {
        "errno": error.errno or 0,
        "name": getattr(error, "name", ""),
        "kernel_errno": getattr(error, "kernel_errno", 0),
        "text": error.strerror or str(error),
    }


# The socket.


def _listening(path: str) -> socket.socket:
    """A socket that listens at `path`, for nobody but this user: keys travel there."""
    _make_room(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        os.chmod(path, _JUST_OURS)
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise PFKeyError(f"listening on {path} failed: {error.strerror or error}") from error
    return listener


def _make_room(path: str) -> None:
    """Remove a socket that nobody listens on; PFKeyError when somebody does, or when it is something else."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise PFKeyError(f"{path} exists and is no socket; remove it, or listen somewhere else")
    except FileNotFoundError:
        return
    except OSError as error:
        raise PFKeyError(f"listening on {path} failed: {error.strerror}") from error
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError as error:
            raise PFKeyError(f"{path} is somebody else's: {error.strerror}") from error
        else:
            raise PFKeyError(f"somebody serves a kernel on {path} already; end it, or listen somewhere else")


def run(arguments: Namespace) -> int:
    """`pfkey embedded`."""
    try:
        kernel = EmbeddedKernel(arguments.kernel_profile)
    except NotSupported as error:
        raise UsageError(str(error)) from error
    server = Server(kernel, arguments.listen)
    try:
        server.start()
        if arguments.json:
            shown = {"kernel": server.target, "profile": kernel.profile.name, "abi": abi_name(kernel.abi)}
            print(json.dumps(shown, indent=2))
        else:
            print(f"{kernel.profile.name} ({kernel.abi}) on {server.target}; Ctrl-C ends it and forgets everything")
        sys.stdout.flush()
        server.wait()
    except KeyboardInterrupt:
        pass  # which is how it is meant to end
    finally:
        server.close()
    return 0
