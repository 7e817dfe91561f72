"""One connection to an embedded kernel: its receive buffer, filled and drained by the rules of its system."""

from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Condition
from typing import TYPE_CHECKING, Self

from ..abi import Abi
from ..errors import ChannelClosed
from .interrupts import Uninterrupted
from .profiles import Dialect

if TYPE_CHECKING:
    from .kernel import EmbeddedKernel

__all__ = ["EmbeddedChannel", "kernel_failure"]


_ROOM_FOR_ANSWER = 2560
"""Twice what an ordinary policy or SA costs on Linux; on FreeBSD more than the longest message."""


def kernel_failure(name: str, abi: Abi, text: str = "") -> OSError:
    """What a failing system call raises: `errno` is this host's number for the error, `kernel_errno` that system's.

    The error's name is in `name`.
    """
    number = abi.error_numbers.get(name, 0)
    error = OSError(getattr(errno, name, number), text or f"{name} from the embedded {abi}")
    error.name = name  # type: ignore[attr-defined]
    error.kernel_errno = number  # type: ignore[attr-defined]
    return error


def _linux_cost(length: int) -> int:
    """What one message takes of a Linux receive buffer: its truesize, 768 for a header and 1280 for an SA or policy."""
    data = (length + 16 + 63) // 64 * 64 + 320
    bucket = 512
    while bucket < data:
        bucket *= 2
    return 256 + bucket


def _kame_mbufs(length: int) -> int:
    """The memory of a message's mbufs on FreeBSD: one for the address, one for 168 bytes, one for each further 224."""
    return 256 * (2 + max(0, -(-(length - 168) // 224)))


class EmbeddedChannel:
    """A PF_KEY socket without a file descriptor: whole messages in, whole messages out.  Made by `connect()`."""

    def __init__(self, kernel: EmbeddedKernel) -> None:
        self._kernel = kernel
        self._arrived = Condition(kernel.lock)
        self._queue: deque[tuple[bytes, int]] = deque()
        self._linux = kernel.profile.dialect is Dialect.AF_KEY
        self._size = kernel.profile.receive_buffer
        self._used = 0
        self._mbufs = 0
        self._closed = False
        self._failed: tuple[bytes, OSError] | None = None
        """Of several messages the one whose send failed, until somebody hears of it."""
        self._room: int | None = None
        self.registered: set[int] = set()
        """The SA types it registered for."""
        self.promiscuous = False
        self.dropped = 0
        """Messages lost because the receive buffer was full."""
        self.on_arrival: Callable[[], object] | None = None
        """Called, under the kernel's lock, when a message is put into the receive buffer."""
        self.dump: Iterator[bytes] | None = None
        """A dump that waits for room (Linux); only the kernel's code touches it."""

    @property
    def abi(self) -> Abi:
        """The system that answers here."""
        return self._kernel.abi

    def send(self, data: bytes) -> None:
        """Hand one message to the kernel, which has done the work when this returns.

        Raises OSError where the system call of that kernel fails (`errno` is the host's number of the error, `name` its
        name, `kernel_errno` that kernel's number), ChannelClosed after close().  Ctrl-C meanwhile is raised at the end.
        """
        with self._kernel.lock, Uninterrupted():
            self._send(data)

    def _send(self, data: bytes) -> None:
        self._check()
        failed, self._failed = self._failed, None
        if failed is not None and failed[0] == data:
            raise failed[1]
        self._kernel.submit(self, bytes(data))

    def send_many(self, messages: Sequence[bytes]) -> int:
        """Hand over several messages; how many the kernel took.  Raises only what the first one raises.

        What one behind it raises is raised by the next call, when that begins with the same message, which is not sent
        again: the kernel may have done it (FreeBSD, ENOBUFS).
        """
        with self._kernel.lock, Uninterrupted():
            for count, data in enumerate(messages):
                try:
                    self._send(data)
                except OSError as error:
                    if not count:
                        raise
                    self._failed = bytes(data), error
                    return count
        return len(messages)

    def receive(self, timeout: float | None = None) -> bytes | None:
        """The next message, None when none arrives within `timeout` seconds (None: wait for ever)."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._kernel.lock:
            self._kernel.run_timers()
            while not self._queue:
                self._check()
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return None
                self._arrived.wait(self._kernel.patience(left))
                self._kernel.run_timers()
            return self._take()

    def receive_many(self, limit: int, timeout: float | None = None) -> list[bytes]:
        """Up to `limit` messages: waits for the first one only."""
        with self._kernel.lock:
            first = self.receive(timeout)
            messages = [] if first is None else [first]
            while messages and self._queue and len(messages) < limit:
                messages.append(self._take())
            return messages

    def fileno(self) -> int:
        """-1: there is no file descriptor."""
        return -1

    def close(self) -> None:
        """Leave: what is queued is lost, whoever waits in receive() gets ChannelClosed."""
        with self._kernel.lock, Uninterrupted():
            if not self._closed:
                self._closed = True
                self._queue.clear()
                self.dump = None
                self._kernel.forget(self)
                self._arrived.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def host_lock(self) -> str | None:
        """None: nobody outside this process can write to its SPD, and there is no lock file for those who do."""
        return None

    def grace_period(self) -> None:
        """Return when every packet that may have started before is through: what it could see may be removed now."""
        self._kernel.grace_period()

    def set_receive_buffer(self, size: int) -> int:
        """SO_RCVBUF (on Linux SO_RCVBUFFORCE, which doubles it); returns what getsockopt() would say afterwards.

        Raises OSError (ENOBUFS) above the system's limit.
        """
        with self._kernel.lock:
            if size > self._kernel.profile.receive_buffer_limit:
                raise kernel_failure(
                    "ENOBUFS", self.abi, f"a receive buffer of {size} bytes is over the system's limit"
                )
            self._size = max(2 * size, 2304) if self._linux else size
            return self._size

    @property
    def receive_buffer(self) -> int:
        """How much the receive buffer holds, in bytes of the kernel's own accounting."""
        return self._size

    @property
    def waiting(self) -> int:
        """How many messages are in it."""
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        """How many requests can be under way with room for all their answers."""
        return max(1, self._size // _ROOM_FOR_ANSWER)

    # For the kernel, under its lock.

    @contextmanager
    def only_room_for(self, count: int) -> Iterator[None]:
        """For a while the receive buffer takes no more than `count` messages, however much it holds."""
        self._room = count
        try:
            yield
        finally:
            self._room = None

    @property
    def has_room(self) -> bool:
        """Whether the receive buffer has any."""
        return self._used < self._size and self._room != 0

    def queue(self, message: bytes, *, beyond_limit: bool = False) -> bool:
        """Put a message into the receive buffer; False, and the message is lost, when it does not fit."""
        if self._closed:
            return False
        if self._room == 0 and not beyond_limit:
            self.dropped += 1
            return False
        if self._room:
            self._room -= 1
        if self._linux:
            # Linux looks before it counts: the message that crosses the limit still gets in.
            cost, fits = _linux_cost(len(message)), self._used <= self._size
        else:
            # The sender's address is two bytes; mbufs may take eight times the size.
            cost, mbufs = len(message) + 2, _kame_mbufs(len(message))
            fits = beyond_limit or (self._used + cost <= self._size and self._mbufs + mbufs <= 8 * self._size)
            self._mbufs += mbufs if fits else 0
        if not fits:
            self.dropped += 1
            return False
        self._used += cost
        self._queue.append((message, cost))
        self._arrived.notify_all()
        if self.on_arrival is not None:
            self.on_arrival()
        return True

    def dump_may_go_on(self) -> bool:
        """Linux fills two thirds of the buffer with a dump, then waits for the reader."""
        return 3 * self._used <= 2 * self._size

    def _take(self) -> bytes:
        message, cost = self._queue.popleft()
        if self._linux and self.dump is not None and 3 * self._used <= self._size:
            with Uninterrupted():
                self._kernel.resume_dump(self)
        self._used -= cost
        if not self._linux:
            self._mbufs -= _kame_mbufs(len(message))
        if not self._queue:  # Ctrl-C may have come in between
            self._used = self._mbufs = 0
        return message

    def _check(self) -> None:
        if self._closed:
            raise ChannelClosed(f"this connection to the embedded {self.abi} kernel was closed")
