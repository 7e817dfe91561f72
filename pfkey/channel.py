"""Moves whole messages: this host's PF_KEY socket, or any object with the same members."""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from . import _sockets
from .abi import Abi
from .constants import PF_KEY_V2
from .errors import ChannelClosed, KernelError, NotSupported, kernel_error
from .tables import Batch

__all__ = [
    "Channel",
    "NativeChannel",
    "grow_receive_buffer",
    "in_flight",
    "lost",
    "receive_batch",
    "receive_many",
    "send_many",
]

log = logging.getLogger("pfkey.channel")


@runtime_checkable
class Channel(Protocol):
    """What carries messages to a kernel and back.

    `send` raises OSError when the kernel's send call fails.  `receive` gives one whole message, or None when none came
    within `timeout` seconds (None waits for ever).  `fileno` is -1 where there is no file descriptor to wait on.
    ChannelClosed says that the kernel cannot be reached any more.  One thread may send while another one receives.

    A channel may also have `send_many`, `receive_many`, `receive_batch`, `set_receive_buffer(size) -> size` (OSError
    above the system's limit) and `receive_buffer`, its size in bytes, which the functions of this module do without;
    but a BSD drops what of a dump does not fit into the buffer, which is 8 KiB unless more is asked for, so 44 to 99
    policies.  Further `grace_period()`, which returns when every packet that was looking at the SPD has finished;
    `host_lock`, the path of the lock file that all who write to this SPD share; and counters, `lost` and `dropped`, of
    messages that nobody will see.
    """

    @property
    def abi(self) -> Abi: ...
    def send(self, data: bytes, /) -> None: ...
    def receive(self, timeout: float | None, /) -> bytes | None: ...
    def fileno(self) -> int: ...
    def close(self) -> None: ...


def send_many(channel: Channel, messages: Sequence[bytes]) -> int:
    """Send one after the other, in one call where the channel can; how many were taken.

    Raises only what the first of them raises.
    """
    many = getattr(channel, "send_many", None)
    if many is not None:
        return int(many(messages))
    for count, data in enumerate(messages):
        try:
            channel.send(data)
        except OSError:
            if not count:
                raise
            return count
    return len(messages)


def receive_many(channel: Channel, limit: int, timeout: float | None) -> list[bytes]:
    """Up to `limit` messages: wait for the first, take what else is there."""
    many = getattr(channel, "receive_many", None)
    if many is not None:
        return list(many(limit, timeout) or ())
    received: list[bytes] = []
    while len(received) < limit:
        data = channel.receive(0.0 if received else timeout)
        if data is None:
            break
        received.append(data)
    return received


def receive_batch(channel: Channel, limit: int, timeout: float | None) -> Batch:
    """The same as a batch, which a native channel leaves where the kernel put it."""
    batch = getattr(channel, "receive_batch", None)
    return batch(timeout) if batch is not None else Batch.of(receive_many(channel, limit, timeout))


GRACE_PERIOD = 0.02
"""Seconds after which no packet still looks at what the SPD was, where the system has no way to ask."""
_UNKNOWN_IN_FLIGHT = 16
"""How many answers any receive buffer holds: FreeBSD's default of 8192 bytes takes about thirty."""


def in_flight(channel: Channel) -> int:
    """How many requests may be under way at once, so that the receive buffer holds all answers."""
    return int(getattr(channel, "in_flight", _UNKNOWN_IN_FLIGHT))


def lost(channel: Channel) -> int:
    """How many messages the channel knows that nobody will see."""
    return int(getattr(channel, "lost", 0)) + int(getattr(channel, "dropped", 0))


_LARGEST_BUFFER, _SUPPOSED_BUFFER = 64 << 20, 1 << 20
_STEPS, _SUPPOSED_STEPS = (4, 2, 1.5, 1.25), (4, 2, 1, 0.5, 0.25)
"""How much larger a buffer is tried to be, of known and of supposed size: FreeBSD refuses what is over its limit."""


def grow_receive_buffer(channel: Channel) -> bool:
    """Make the receive buffer larger, where the channel can and the system lets it: by less where that is its limit.

    A channel that does not tell the size of its `receive_buffer` gets the largest of a few that the system grants.
    """
    grow = getattr(channel, "set_receive_buffer", None)
    if grow is None:
        return False
    size = getattr(channel, "receive_buffer", None)
    for step in _STEPS if size is not None else _SUPPOSED_STEPS:
        wanted = int((_SUPPOSED_BUFFER if size is None else size) * step)
        if wanted > _LARGEST_BUFFER:
            continue
        try:
            granted = int(grow(wanted))
        except OSError:
            continue
        if size is None or granted > size:
            return True
    return False


# What is asked of a socket of this host.
_SO_RCVBUFFORCE = 33  # Linux: past net.core.rmem_max, for CAP_NET_ADMIN
_SO_RERROR = 0x20000  # FreeBSD 14: receive() reports ENOBUFS after an overflow instead of losing it silently
_FIRST_BUFFER = {"linux": 8 << 20}
_BSD_BUFFER = 2 << 20
_SMALLEST_BUFFER = 16384
_COST_PER_ANSWER = 1280  # bytes of receive buffer that Linux 6.1 charges for a message of 192 to 608 bytes
_LARGEST_MESSAGE = 16384
_BATCH = 64


class NativeChannel:
    """The PF_KEY socket of the running kernel.

    Raises NotSupported when this system has no PF_KEY (the text says how it may get one) and KernelError, a
    PermissionError, when it is not for us.
    """

    def __init__(self) -> None:
        self.abi = Abi.native()
        self._socket = _open(self.abi)
        self.host_lock = _host_lock()
        """The lock file that all who write to this socket's SPD share (the variable PFKEY_LOCK names another one)."""
        self._arena: _sockets.Arena | None = None
        self._queue: deque[bytes] = deque()
        self._failed: tuple[bytes, int] | None = None
        """Of several messages the one that could not be sent, and why, until somebody hears of it."""
        self.lost = 0
        """Messages that were longer than any this package expects, and were cut by the kernel."""
        self.receive_buffer = self._first_buffer()
        self.in_flight = max(1, self.receive_buffer // _COST_PER_ANSWER // 2)

    def _first_buffer(self) -> int:
        if sys.platform.startswith("freebsd"):
            self._option(_SO_RERROR, 1)
        size = _FIRST_BUFFER.get(sys.platform, _BSD_BUFFER)
        while size > 65536:
            try:
                if self.set_receive_buffer(size) >= size:
                    break
            except OSError:
                pass
            size //= 2  # kern.ipc.maxsockbuf says no to the rest
        return self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)

    def _option(self, option: int, value: int) -> bool:
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, option, value)
        except OSError:
            return False
        return True

    def set_receive_buffer(self, size: int) -> int:
        """Ask for a receive buffer of `size` bytes; returns what there is now.  Raises OSError when it is refused.

        It never gets smaller than 16 KiB: in a buffer of fewer than three messages Linux stops a dump for ever, and
        answers EBUSY to every later one of this socket.
        """
        size = max(size, _SMALLEST_BUFFER)
        if not (sys.platform == "linux" and self._option(_SO_RCVBUFFORCE, size)):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        self.receive_buffer = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        self.in_flight = max(1, self.receive_buffer // _COST_PER_ANSWER // 2)
        return self.receive_buffer

    def send(self, data: bytes, /) -> None:
        """Give the kernel one message.  Raises OSError as the system call does, ChannelClosed on a closed socket."""
        self._check()
        self._raise_remembered(data)
        self._socket.send(data)

    def send_many(self, messages: Sequence[bytes]) -> int:
        """Give the kernel many messages in one call; how many it took.  Raises only what the first one raises.

        What one behind it raises is raised by the next call, when that begins with the same message, which is not sent
        again: the kernel may have done it (FreeBSD, ENOBUFS).
        """
        self._check()
        self._raise_remembered(messages[0] if messages else b"")
        sent, error = _sockets.send_many(self._socket.fileno(), messages)
        if not sent and error:
            raise OSError(error, f"sending to the PF_KEY socket: {_strerror(error)}")
        self._failed = (messages[sent], error) if error else None
        return sent

    def _raise_remembered(self, data: bytes) -> None:
        failed, self._failed = self._failed, None
        if failed is not None and failed[0] == data:
            error = failed[1]
            raise OSError(error, f"sending to the PF_KEY socket: {_strerror(error)}")

    def receive(self, timeout: float | None, /) -> bytes | None:
        """The next message, None when none came within `timeout` seconds (None: wait for ever)."""
        if not self._queue:
            self._fetch(timeout)
        return self._queue.popleft() if self._queue else None

    def receive_many(self, limit: int, timeout: float | None) -> list[bytes]:
        """Up to `limit` messages in one call: waits for the first only."""
        if not self._queue:
            self._fetch(timeout)
        return [self._queue.popleft() for _ in range(min(limit, len(self._queue)))]

    def receive_batch(self, timeout: float | None) -> Batch:
        """What is there, left where the kernel put it: waits for the first message only."""
        if self._queue:
            waiting = list(self._queue)
            self._queue.clear()
            return Batch.of(waiting)
        received = self._receive(timeout, keep=True)
        return Batch(received.arena, received.lengths)

    def _fetch(self, timeout: float | None) -> None:
        received = self._receive(timeout, keep=False)
        self._queue.extend(Batch(received.arena, received.lengths).datagrams())

    def _receive(self, timeout: float | None, *, keep: bool) -> _sockets.Received:
        self._check()
        if self._arena is None:
            self._arena = _sockets.Arena(_BATCH, _LARGEST_MESSAGE)
        received = self._arena.receive(self._socket.fileno(), _BATCH, timeout, keep=keep)
        if received.cut:
            self.lost += len(received.cut)
            most = max(received.cut)
            log.warning("%d messages of up to %d bytes were cut at %d", len(received.cut), most, _LARGEST_MESSAGE)
        if received.error and received.error != errno.EINTR:
            raise OSError(received.error, f"receiving from the PF_KEY socket: {_strerror(received.error)}")
        return received

    def grace_period(self) -> None:
        """Return when every packet that was looking at the SPD has finished looking.

        Linux waits for that itself when a PF_KEY socket is closed (pfkey_release() ends in synchronize_rcu()).  The
        others have no such call; 3 ms were enough wherever it was measured, and 20 ms are waited.
        """
        if sys.platform == "linux":
            _open(self.abi).close()
        else:
            time.sleep(GRACE_PERIOD)

    def fileno(self) -> int:
        """The socket's file descriptor, -1 once closed.  Messages may be queued here although it is not readable."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket; on Linux with several CPUs that waits for a grace period, so keep sockets open."""
        self._socket.close()

    def _check(self) -> None:
        if self._socket.fileno() < 0:
            raise ChannelClosed("the PF_KEY socket was closed")


def _host_lock() -> str:
    """One SPD, one file: on Linux each network namespace has an SPD of its own, and this thread's is the socket's."""
    if path := os.environ.get("PFKEY_LOCK"):
        return path
    if sys.platform != "linux":
        return "/var/run/pfkey-spd.lock"
    try:
        return f"/run/pfkey-spd-{os.stat('/proc/thread-self/ns/net').st_ino}.lock"
    except OSError:  # without /proc all namespaces share one file, which waits too often rather than too seldom
        return "/run/pfkey-spd.lock"


def _strerror(number: int) -> str:
    return errno.errorcode.get(number, str(number))


_EMBEDDED = "the embedded kernels (connect('embedded:linux'), --kernel embedded:linux) need no privileges"
_MISSING = {
    "linux": "this kernel has no af_key: try `modprobe af_key`; some distributions build their kernels without it"
    " (RHEL 10), and Linux plans to remove it in 2027",
    "freebsd": "this kernel has no PF_KEY: try `kldload ipsec`; in a jail without vnet it needs allow.socket_af",
}
_FORBIDDEN = {
    "linux": "a PF_KEY socket needs root, or CAP_NET_ADMIN in the user namespace that owns the network namespace",
    "freebsd": "a PF_KEY socket needs root, in a jail a vnet of its own",
}


def _open(abi: Abi) -> socket.socket:
    number = _sockets.pf_key()
    try:
        return socket.socket(number if number >= 0 else abi.pf_key, socket.SOCK_RAW, PF_KEY_V2)
    except OSError as error:
        raise _explained(error, abi) from error


def _explained(error: OSError, abi: Abi) -> NotSupported | KernelError:
    number = error.errno or 0
    if number in (errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT):
        return NotSupported(f"no PF_KEY on this {abi}: {_MISSING[abi.name]}; {_EMBEDDED}")
    advice: Any = f"{_FORBIDDEN[abi.name]}; {_EMBEDDED}" if number in (errno.EPERM, errno.EACCES) else _EMBEDDED
    return kernel_error(f"opening a PF_KEY socket on {abi}", _strerror(number), number, advice=advice)
