"""A channel in front of another one that keeps chosen answers back until they are released."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from pfkey import Abi, Channel, ChannelClosed, Message, decode

__all__ = ["Holding"]


class Holding:
    """Has what the Protocol asks for, and `in_flight`.  `hold(message)` says which answers are kept back."""

    def __init__(self, inner: Channel, hold: Callable[[Message], bool], in_flight: int = 64) -> None:
        self.inner = inner
        self.hold = hold
        self.in_flight = in_flight
        self.held: list[bytes] = []
        self.sent = 0
        self.under_way = 0
        self.most_under_way = 0
        self.failing: list[BaseException] = []
        """What the next calls of receive raise, each once and in whatever thread it is."""
        self.paused = False
        """Nothing more is to be had for the moment; it stays where it is."""
        self._ready: deque[bytes] = deque()
        self._changed = threading.Condition()

    @property
    def abi(self) -> Abi:
        return self.inner.abi

    def send(self, data: bytes) -> None:
        with self._changed:
            self.sent += 1
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
            self._changed.notify_all()
        self.inner.send(data)

    def receive(self, timeout: float | None) -> bytes | None:
        while not self._ready:
            if self.failing:
                raise self.failing.pop()
            if self.paused:
                time.sleep(min(0.01, 1.0 if timeout is None else timeout))
                return None
            data = self.inner.receive(timeout)
            if data is None:
                return None
            held = self.hold(decode(data, self.abi))
            with self._changed:
                (self.held if held else self._ready).append(data)
                self._changed.notify_all()
        if self.failing:
            raise self.failing.pop()
        with self._changed:
            self.under_way -= 1
            return self._ready.popleft()

    def wait(self, condition: Callable[[], bool]) -> None:
        """Until it is so; fails after a long time."""
        with self._changed:
            assert self._changed.wait_for(condition, 20)

    def release(self, count: int | None = None) -> None:
        """Let go what is held (the first `count`), and hold nothing more."""
        with self._changed:
            count = len(self.held) if count is None else count
            self.hold = lambda _: False
            self._ready.extend(self.held[:count])
            del self.held[:count]

    def fileno(self) -> int:
        return self.inner.fileno()

    def close(self) -> None:
        self.inner.close()
        if self.failing:
            raise ChannelClosed("closed")
