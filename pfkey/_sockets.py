"""What a native channel needs of the C core: PF_KEY's number, and many messages in one call."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from ._core import ffi, lib

__all__ = ["Arena", "Received", "pf_key", "send_many"]

_SEGMENT = 4 << 20


def pf_key() -> int:
    """This host's PF_KEY, or -1 where its headers have none."""
    return cast("int", lib.pfk_pf_key())


def send_many(fd: int, messages: Sequence[bytes]) -> tuple[int, int]:
    """Send each message by itself, in one call; how many the kernel took, and the errno of the first it did not."""
    error = ffi.new("int *")
    sent = lib.pfk_send_many(fd, b"".join(messages), [len(one) for one in messages], len(messages), error)
    return sent, error[0]


class Received(NamedTuple):
    """What one call received: messages one after the other in `arena`, and the lengths of those too long to keep."""

    arena: memoryview
    lengths: array[int]
    cut: list[int]
    error: int
    """errno, or 0."""


_allocate = ffi.new_allocator(should_clear_after_alloc=False)


class Arena:
    """Where messages are received: room for `count` messages of up to `size` bytes at a time.

    What is kept stays where it was received; it is wiped when nobody looks at it any more, for it may hold keys.
    """

    __slots__ = ("_error", "_lengths", "_room", "_segment", "_used", "count", "size")

    def __init__(self, count: int, size: int) -> None:
        self.count = count
        self.size = size
        self._lengths = ffi.new("uint32_t[]", count)
        self._error = ffi.new("int *")
        self._room = max(_SEGMENT, count * size)
        self._begin()

    def _begin(self) -> None:
        used = [0]
        owner = _allocate("uint8_t[]", self._room)
        self._segment: Any = ffi.gc(owner, lambda segment: lib.pfk_wipe(segment, used[0]), self._room)
        self._used = used

    def receive(self, fd: int, limit: int, timeout: float | None, *, keep: bool) -> Received:
        """Up to `limit` messages in one call, which waits up to `timeout` seconds for the first (None: for ever).

        With `keep` the arena of the result is where they were received, else a copy.
        """
        if self._room - self._used[0] < self.count * self.size:
            self._begin()
        wait = -1 if timeout is None else max(0, int(timeout * 1000 + 0.999))
        start = self._used[0]
        here = self._segment + start
        count = lib.pfk_receive_many(fd, here, self.size, self._lengths, min(limit, self.count), wait, self._error)
        if count < 0:
            return Received(memoryview(b""), array("I"), [], cast("int", self._error[0]))
        found = list(self._lengths[0:count])
        cut = [length for length in found if length > self.size]
        lengths = array("I", [length for length in found if length <= self.size] if cut else found)
        total = sum(lengths)
        if keep:
            self._used[0] += total
            return Received(memoryview(ffi.buffer(self._segment, self._room))[start : start + total], lengths, cut, 0)
        copy = memoryview(bytes(ffi.buffer(here, total)))
        lib.pfk_wipe(here, total)
        return Received(copy, lengths, cut, 0)
