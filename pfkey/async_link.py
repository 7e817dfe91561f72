"""One channel that many tasks of an event loop share: no thread where there is a file descriptor to wait on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from .channel import Channel
from .codec import Message
from .conversation import Conversation, Request, Watch
from .errors import ChannelClosed
from .exchange import closed, is_dump, receive, send
from .sharing import AT_ONCE, SLICE, Shared, Waiter
from .tables import Batch

__all__ = ["AsyncLink"]

T = TypeVar("T")

_ROUNDS = 16
"""How often the channel is read before the loop's other tasks get their turn."""


class Task(Waiter):
    """A task that waits."""

    __slots__ = ("_future", "error")

    def __init__(self, timeout: float | None, ready: Callable[[], bool] | None = None) -> None:
        super().__init__(timeout, ready)
        self.error: BaseException | None = None
        """What reading met for it."""
        self._future: asyncio.Future[None] | None = None

    async def wait(self, seconds: float | None) -> None:
        """Until somebody rings, or so many seconds."""
        loop = asyncio.get_running_loop()
        self._future = loop.create_future()
        alarm = None if seconds is None else loop.call_later(seconds, self.ring)
        try:
            await self._future
        finally:
            if alarm is not None:
                alarm.cancel()
            self._future = None

    def ring(self) -> None:
        """Wake it up."""
        if self._future is not None and not self._future.done():
            self._future.set_result(None)


class AsyncLink(Shared):
    """One channel that many tasks share.

    Where it has a file descriptor the loop watches that.  Where it has none, what a send has brought about is taken at
    once, and only when nothing is there does a worker thread wait for more: as long as somebody does, and for no more
    than a slice of a second beyond.  What arrives belongs to the connection, and a task that is cancelled takes nothing
    with it.
    """

    def __init__(self, channel: Channel, *, asking: Conversation | None = None) -> None:
        super().__init__(channel, asking)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._descriptor = -1
        self._waiting: dict[Task, None] = {}
        self._executor: ThreadPoolExecutor | None = None
        self._work: asyncio.Future[list[bytes | Batch] | None] | None = None

    async def close(self) -> None:
        """Close the channel; whoever waits gets ChannelClosed."""
        self._closed = self._closed or "it was closed by this side"
        self._unwatch_descriptor()
        self.channel.close()
        for waiter in (*self._waiting, *self._room.next):
            waiter.ring()
        if self._executor is not None:
            self._executor.shutdown(wait=False)
        while self._work is not None:
            await asyncio.wait([self._work])

    # Requests.

    async def exchange(self, messages: Sequence[Message], timeout: float) -> list[Request]:
        """Send, in order, and wait until every one is answered, refused, or out of time: all are done then.

        The loop's other tasks get a turn before each send: most kernels have answered when it returns, so that nothing
        is left to wait for, and a task that asks again and again would have the loop to itself.
        """
        self._attach()
        done: list[Request] = []
        while len(done) < len(messages):
            await asyncio.sleep(0)
            waiter = Task(timeout)
            try:
                await self._exchange(waiter, messages, len(done))
            finally:
                self._leave(waiter)
            done += waiter.requests
        return done

    async def _exchange(self, waiter: Task, messages: Sequence[Message], start: int) -> None:
        dump = is_dump(messages[start])
        while not self._enters(waiter, len(messages) - start, dump=dump):
            await waiter.wait(None)
        why: object = ""
        try:
            await self._drain()
        except ChannelClosed as error:
            why = error
        requests = self._prepare(waiter, messages, start)
        why = self._closed or why
        if why:
            closed(requests, why, sent=False)
            return
        self._begin(waiter)
        self._sent(waiter, send(self.channel, requests))
        await self._await(waiter)

    def send(self, message: Message) -> None:
        """Send what nobody answers."""
        request = self.conversation.prepare(message, self.conversation.next_seq())
        send(self.channel, [request])
        if request.error is not None:
            raise request.error

    async def _drain(self) -> None:
        """Take what has arrived since: others' broadcasts would fill the buffer that our answers need."""
        if self._work is None:
            self._read_all()
        if not self.conversation.rest_of_dump:
            return
        self._quiet, since = 0.0, time.monotonic()
        # A read of the worker may have begun before, so one that ends in vain proves nothing.
        while not self._rest_is_over(2 * SLICE, since):
            if self._work is None:
                await asyncio.sleep(SLICE / 10)
                self._quiet += SLICE / 10
                self._read_all()
            else:
                await asyncio.wait([self._work])

    async def _await(self, waiter: Task) -> None:
        """Until it has what it waits for, or is out of time."""
        self._waiting[waiter] = None
        while not waiter.done and not self._closed:
            try:
                if self._has_read_all(waiter):
                    break
                left = waiter.left
                if left <= 0:
                    break
                await waiter.wait(None if waiter.timeout is None else left)
                if waiter.error is not None:
                    raise waiter.error
            except ChannelClosed as error:
                if waiter.ready is not None:
                    raise
                closed(waiter.requests, error, sent=True)
                return
        if waiter.open:
            self._give_up(waiter)

    def _leave(self, waiter: Task) -> None:
        self._waiting.pop(waiter, None)
        self._dismiss(waiter)

    # Reading.

    def _attach(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None:
                raise RuntimeError("an AsyncKernel belongs to the event loop in which it was first used")
            self._loop = loop

    def _has_read_all(self, waiter: Task) -> bool:
        """Take what is there already; when that is not all that it waits for, see to it that more is read."""
        if self._descriptor < 0:
            self._watch_descriptor()
        if self._work is None:
            self._read_all()
            if self._descriptor < 0 and not waiter.done:
                self._start_work()
        return waiter.done

    def _watch_descriptor(self) -> None:
        descriptor = self.channel.fileno()
        if descriptor >= 0 and self._loop is not None:
            self._loop.add_reader(descriptor, self._readable)
            self._descriptor = descriptor

    def _unwatch_descriptor(self) -> None:
        if self._descriptor >= 0 and self._loop is not None:
            self._loop.remove_reader(self._descriptor)
            self._descriptor = -1

    def _readable(self) -> None:
        try:
            self._read_all()
        except Exception as error:  # whatever a channel raises
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        """Reading failed: one of those who wait is told, the others go on and see for themselves."""
        self._unwatch_descriptor()
        for number, waiter in enumerate(self._waiting):
            if not number:
                waiter.error = error
            waiter.ring()

    def _start_work(self) -> None:
        if self._loop is None or self._closed:
            return
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="pfkey-receive")
        wait = partial(receive, self.channel, AT_ONCE, SLICE, dump=self._room.dumping)
        self._work = self._loop.run_in_executor(self._executor, wait)
        self._work.add_done_callback(self._worked)

    def _worked(self, work: asyncio.Future[list[bytes | Batch] | None]) -> None:
        self._work = None
        if work.cancelled():
            return
        error = work.exception()
        if error is not None:
            if not self._closed:
                self._failed(error)
            return
        if self._take(work.result(), SLICE):
            self._deliver()
        if any(not waiter.done for waiter in self._waiting):
            self._start_work()

    def _read_all(self) -> None:
        """What is there now.  A channel may hold messages back although its descriptor is not readable: all of them."""
        for _ in range(_ROUNDS):
            if self._closed:
                return
            if not self._take(receive(self.channel, AT_ONCE, 0.0, dump=self._room.dumping), 0.0):
                return
            self._deliver()
        if self._loop is not None and self._descriptor >= 0:
            self._loop.call_soon(self._readable)

    # What nobody asked for.

    async def next_event(self, timeout: float | None) -> Message | None:
        """The oldest event; when there is none, waits up to `timeout` seconds for one."""
        talk = self.conversation
        return await self._next(talk.next_event, lambda: talk.has_events, timeout)

    async def next_watched(self, watch: Watch, timeout: float | None) -> tuple[Message, bool] | None:
        """The next that the watch has; None when none came within `timeout` seconds, or when it was ended."""
        return await self._next(watch.take, lambda: bool(watch.queue) or watch.stopped, timeout)

    async def _next(self, take: Callable[[], T | None], ready: Callable[[], bool], timeout: float | None) -> T | None:
        self._attach()
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            if (found := take()) is not None or ready():
                return found
            waiter = Task(None if until is None else max(0.0, until - time.monotonic()), ready)
            self._listeners[waiter] = None
            try:
                await self._await(waiter)
            finally:
                self._leave(waiter)
            if self._closed and not ready():
                raise ChannelClosed(f"waiting for events of {self.channel.abi}: {self._closed}")
            if until is not None and time.monotonic() >= until:
                return take()

    def watch(self) -> Watch:
        """See Conversation.watch; what has arrived before does not count."""
        if self._work is None:
            self._read_all()
        return self.conversation.watch()

    def unwatch(self, watch: Watch) -> None:
        """End it, and wake who waits for it."""
        self._watch_over(watch)
