"""What a native channel needs of the C core: PF_KEY's number, and many messages in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from ._core import ffi, lib

__all__ = ["Arena", "pf_key", "send_many"]


def pf_key() -> int:
    """This host's PF_KEY, or -1 where its headers have none."""
    return cast("int", lib.pfk_pf_key())


def send_many(fd: int, messages: Sequence[bytes]) -> tuple[int, int]:
    """Send each message by itself, in one call; how many the kernel took, and the errno of the first it did not."""
    error = ffi.new("int *")
    sent = lib.pfk_send_many(fd, b"".join(messages), [len(one) for one in messages], len(messages), error)
    return sent, error[0]


class Arena:
    """Where messages are received: room for `count` messages of up to `size` bytes."""

    __slots__ = ("_buffer", "_error", "_lengths", "count", "size")

    def __init__(self, count: int, size: int) -> None:
        self.count = count
        self.size = size
        self._buffer = ffi.new("uint8_t[]", count * size)
        self._lengths = ffi.new("uint32_t[]", count)
        self._error = ffi.new("int *")

    def receive(self, fd: int, limit: int, timeout: float | None) -> tuple[list[bytes], list[int], int]:
        """Up to `limit` messages in one call, which waits up to `timeout` seconds for the first (None: for ever).

        Returns the messages, the lengths of those that were too long and are lost, and errno or 0.  The buffer, which
        may have held keys, is wiped.
        """
        wait = -1 if timeout is None else max(0, int(timeout * 1000 + 0.999))
        count = lib.pfk_receive_many(
            fd, self._buffer, self.size, self._lengths, min(limit, self.count), wait, self._error
        )
        if count < 0:
            return [], [], cast("int", self._error[0])
        whole, cut = [], []
        for index in range(count):
            length = self._lengths[index]
            start = self._buffer + index * self.size
            if length > self.size:
                cut.append(length)
            else:
                whole.append(bytes(ffi.buffer(start, length)))
            lib.pfk_wipe(start, min(length, self.size))
        return whole, cut, 0
