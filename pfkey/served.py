"""A channel to an embedded kernel that lives in another process, on a unix socket, and the frames that it is called by.

A stream of frames, on every system the same: the length of what follows the head, the number of the call, what is
called, and whether it went well.  Messages stay in the kernel's own receive buffer until they are fetched, so that it
overflows as it does at home; a second socket, handed over at the start, is readable while there are any.
"""

from __future__ import annotations

import json
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from enum import IntEnum
from struct import Struct
from typing import Any, NamedTuple, Self

from .abi import Abi
from .errors import ChannelClosed, KernelError, NotSupported, kernel_error

__all__ = ["Call", "Frame", "Frames", "ServedChannel", "abi_name", "joined", "lock_path", "split"]

PROTOCOL = 1
_HEAD = Struct("!IIBB")
_LENGTH = Struct("!I")
SIZE = Struct("!Q")
LARGEST = 256 << 20
"""Bytes of a frame; more is no frame."""
_HELLO_SECONDS = 5.0
_SLICE = 1 << 16


class Call(IntEnum):
    """What a client asks for."""

    HELLO = 1  # nothing -> JSON: protocol, profile, abi, receive_buffer, in_flight; and the socket that says when
    SEND = 2  # messages -> how many were taken
    RECEIVE = 3  # the most that are wanted -> 1 when none are left, and messages
    BUFFER = 4  # a size -> JSON: receive_buffer, in_flight
    GRACE = 5  # nothing -> nothing


class Frame(NamedTuple):
    """One call, or its answer; what went wrong is JSON: errno, name, kernel_errno, text."""

    number: int
    call: int
    failed: bool
    payload: bytes

    def packed(self) -> bytes:
        """As it travels."""
        return _HEAD.pack(len(self.payload), self.number, self.call, self.failed) + self.payload


class Frames:
    """Puts together frames of what arrives in pieces."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> None:
        """Some more bytes."""
        self._data += data

    def next(self) -> Frame | None:
        """The next whole frame; ValueError when it cannot be one."""
        if len(self._data) < _HEAD.size:
            return None
        length, number, call, failed = _HEAD.unpack_from(self._data)
        if length > LARGEST or call not in Call._value2member_map_ or failed > 1:
            raise ValueError(f"no frame: {bytes(self._data[: _HEAD.size]).hex()}")
        if len(self._data) < _HEAD.size + length:
            return None
        payload = bytes(self._data[_HEAD.size : _HEAD.size + length])
        del self._data[: _HEAD.size + length]
        return Frame(number, call, bool(failed), payload)


def joined(messages: Iterable[bytes]) -> bytes:
    """Messages one after the other, each behind its length."""
    return b"".join(part for data in messages for part in (_LENGTH.pack(len(data)), data))


def split(payload: bytes) -> list[bytes]:
    """The messages of `joined`; ValueError when something is left over."""
    messages, offset = [], 0
    while offset < len(payload):
        if offset + _LENGTH.size > len(payload):
            raise ValueError("a message without its length")
        (length,) = _LENGTH.unpack_from(payload, offset)
        offset += _LENGTH.size
        if offset + length > len(payload):
            raise ValueError("a message that is cut off")
        messages.append(payload[offset : offset + length])
        offset += length
    return messages


def abi_name(abi: Abi) -> str:
    """What Abi.named() makes `abi` of again."""
    release = ".".join(map(str, abi.release))
    return "-".join(filter(None, (abi.name, release, abi.byteorder)))


def lock_path(path: str) -> str:
    """The lock file that those share who write to the SPD of the kernel on the socket `path`."""
    return path + ".lock"


class ServedChannel:
    """A connection to the kernel that `pfkey embedded --listen PATH` serves; made by `connect("unix:PATH")`.

    It has a file descriptor, which is readable while there are messages.  Errors of the kernel's send call arrive as
    the OSErrors that they were (`errno` is this host's number, `name` and `kernel_errno` that kernel's).  The end of
    this process closes the connection; the kernel lives on.

    Raises NotSupported where nobody serves a kernel on PATH, KernelError (a PermissionError) where it is not for us.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(path)
        self.host_lock: str | None = lock_path(self.path)
        """The advisory lock file of those who write to this kernel's SPD."""
        self._lock = threading.RLock()
        self._number = 0
        self._outgoing = bytearray()
        self._frames = Frames()
        self._kept: deque[bytes] = deque()
        self._bell: socket.socket | None = None
        self._socket = _connected(self.path)
        try:
            self._greet()
        except BaseException:
            self.close()
            raise

    def _greet(self) -> None:
        self._socket.settimeout(_HELLO_SECONDS)
        try:
            hello = json.loads(self._call(Call.HELLO, b""))
        except (ChannelClosed, ValueError, TimeoutError) as error:
            raise NotSupported(f"whoever listens on {self.path} serves no kernel of this package: {error}") from error
        if self._bell is None or hello["protocol"] != PROTOCOL:
            raise NotSupported(f"{self.path} is served by another version of this package")
        self._socket.settimeout(None)
        self.abi = Abi.named(hello["abi"])
        self.profile: str = hello["profile"]
        """The name of the kernel's profile."""
        self._learn(hello)

    def _learn(self, told: dict[str, Any]) -> None:
        self.receive_buffer: int = told["receive_buffer"]
        """What the receive buffer holds, in bytes of the kernel's own accounting."""
        self.in_flight: int = told["in_flight"]
        """How many requests can be under way with room for all their answers."""

    # What a Channel has.

    def send(self, data: bytes, /) -> None:
        """Hand one message to the kernel, which has done the work when this returns.

        Raises OSError where the system call of that kernel fails, ChannelClosed when the kernel is gone.
        """
        self._call(Call.SEND, joined([bytes(data)]))

    def send_many(self, messages: Sequence[bytes]) -> int:
        """Hand over several messages; how many the kernel took.  Raises only what the first one raises."""
        if not messages:
            return 0
        (count,) = SIZE.unpack(self._call(Call.SEND, joined(messages)))
        return int(count)

    def receive(self, timeout: float | None = None, /) -> bytes | None:
        """The next message, None when none arrives within `timeout` seconds (None: wait for ever)."""
        received = self.receive_many(1, timeout)
        return received[0] if received else None

    def receive_many(self, limit: int, timeout: float | None = None) -> list[bytes]:
        """Up to `limit` messages: waits for the first one only."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._lock:
                received = [self._kept.popleft() for _ in range(min(limit, len(self._kept)))]
                bell = self._bell
            if received:
                return received
            if bell is None:
                raise self._closed()
            if not _readable(bell, deadline):
                return []
            with self._lock:
                self._absorb(self._call(Call.RECEIVE, SIZE.pack(limit)))

    def set_receive_buffer(self, size: int) -> int:
        """SO_RCVBUF of that kernel; returns what there is now.  Raises OSError (ENOBUFS) above the system's limit."""
        with self._lock:
            self._learn(json.loads(self._call(Call.BUFFER, SIZE.pack(max(0, size)))))
            return self.receive_buffer

    def grace_period(self) -> None:
        """Return when every packet that may have started before is through: what it could see may be removed now."""
        self._call(Call.GRACE, b"")

    def fileno(self) -> int:
        """Readable while there are messages; -1 once closed."""
        return -1 if self._bell is None else self._bell.fileno()

    def close(self) -> None:
        """Leave: what is queued is lost, whoever waits in receive() gets ChannelClosed."""
        for one in (self._bell, self._socket):
            if one is not None:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)  # wakes up who waits
        with self._lock:
            bell, self._bell = self._bell, None
            if bell is not None:
                bell.close()
            self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ServedChannel unix:{self.path}>"

    # Calls.  Ctrl-C may end the waiting at any point: what was not sent yet goes out before the next call, an answer
    # nobody waits for any more is passed over, and the messages in it are kept.

    def _call(self, call: Call, payload: bytes) -> bytes:
        with self._lock:
            self._number = (self._number + 1) & 0xFFFFFFFF
            number = self._number
            try:
                self._outgoing += Frame(number, call, False, payload).packed()
                while self._outgoing:
                    del self._outgoing[: self._socket.send(self._outgoing)]
                answer = self._answer(number)
            except TimeoutError:
                raise
            except (OSError, ValueError) as error:
                raise self._closed() from error
        if answer.failed:
            raise _failure(json.loads(answer.payload))
        return answer.payload

    def _answer(self, number: int) -> Frame:
        while True:
            frame = self._frames.next()
            if frame is None:
                self._frames.feed(self._more())
            elif frame.number == number:
                return frame
            elif frame.call == Call.RECEIVE and not frame.failed:
                self._absorb(frame.payload)

    def _more(self) -> bytes:
        if self._bell is not None:
            data = self._socket.recv(_SLICE)
        else:  # the answer to the first call brings the other socket along
            data, descriptors, _, _ = socket.recv_fds(self._socket, _SLICE, 1)
            for descriptor in descriptors:
                self._bell = socket.socket(fileno=descriptor)
        if not data:
            raise ConnectionResetError("the other side has gone")
        return data

    def _absorb(self, payload: bytes) -> None:
        """Messages that the kernel gave up; after the last the bell is taken down, which rings again with the next."""
        self._kept += split(payload[1:])
        if payload[0] and self._bell is not None:
            self._bell.recv(1)

    def _closed(self) -> ChannelClosed:
        return ChannelClosed(f"the connection to the kernel on {self.path} is closed")


def _readable(bell: socket.socket, deadline: float | None) -> bool:
    """Wait until it is, or until the deadline; a closed one counts as readable."""
    left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
    poll = select.poll()
    try:
        poll.register(bell.fileno(), select.POLLIN)
    except ValueError:
        return True
    return bool(poll.poll(left))


def _failure(told: dict[str, Any]) -> OSError:
    error = OSError(told["errno"], told["text"])
    error.name = told["name"]  # type: ignore[attr-defined]
    error.kernel_errno = told["kernel_errno"]  # type: ignore[attr-defined]
    return error


def _connected(path: str) -> socket.socket:
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        channel.connect(path)
    except OSError as error:
        channel.close()
        raise _explained(path, error) from error
    return channel


def _explained(path: str, error: OSError) -> NotSupported | KernelError:
    if isinstance(error, PermissionError):
        advice = "it belongs to somebody else; ask them, or serve a kernel of your own"
        return kernel_error(f"connecting to the kernel on {path}", "EACCES", error.errno or 0, advice=advice)
    return NotSupported(
        f"nobody serves a kernel on {path} ({error.strerror or error});"
        f" `pfkey embedded --listen {path}` does, as long as it runs"
    )
