"""One channel that many threads share: calls are under way at once, and whoever waits reads for all of them.

No thread does nothing but read.  Of those who wait one at a time has the lead: it receives, gives what came to the
conversation, wakes those whose requests are done, and hands the lead on when it has what it waited for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from .channel import Channel
from .codec import Message
from .conversation import Conversation, Request, Watch
from .errors import ChannelClosed
from .exchange import closed, is_dump, receive, send
from .sharing import AT_ONCE, SLICE, Shared, Waiter

__all__ = ["Link"]

T = TypeVar("T")


class _Waiter(Waiter):
    """A thread that waits: at a bell, which is a lock that is held until somebody rings.  No ring is lost."""

    __slots__ = ("_bell",)

    def __init__(self, timeout: float | None, ready: Callable[[], bool] | None = None) -> None:
        super().__init__(timeout, ready)
        self._bell: threading.Lock | None = None

    def bell(self) -> threading.Lock:
        """What to wait at; called, as `ring` is, under the link's lock."""
        if self._bell is None:
            self._bell = threading.Lock()
            self._bell.acquire()
        return self._bell

    def ring(self) -> None:
        """Wake it up."""
        if self._bell is not None and self._bell.locked():
            self._bell.release()


class Link(Shared):
    """A channel, its conversation, and the threads that wait for something from it.

    What threads share changes in short steps under `_lock`; the channel is used outside of it, by one sender and one
    receiver at a time.  An interrupt (Ctrl-C) may come between any two steps of the thread that it hits; what this
    thread leaves behind is cleared away, and what it had received for others is given to them.
    """

    def __init__(self, channel: Channel, *, asking: Conversation | None = None) -> None:
        super().__init__(channel, asking)
        self._lock = threading.RLock()  # a signal handler may close what it interrupted
        self._sending = threading.Lock()
        self._lead: _Waiter | None = None
        self._followers: dict[_Waiter, None] = {}

    def close(self) -> None:
        """Close the channel; whoever waits gets ChannelClosed.

        Where there is a file descriptor the reader is first waited for: nobody may go on reading from a number that has
        become another file's.
        """
        with self._lock:
            self._closed = self._closed or "it was closed by this side"
            for waiter in (*self._followers, *self._room.next):
                waiter.ring()
        until = time.monotonic() + 10 * SLICE
        while self._lead is not None and self.channel.fileno() >= 0 and time.monotonic() < until:
            time.sleep(SLICE / 100)
        sender = self._sending.acquire(timeout=10 * SLICE)
        try:
            self.channel.close()
        finally:
            if sender:
                self._sending.release()

    # Requests.

    def exchange(self, messages: Sequence[Message], timeout: float) -> list[Request]:
        """Send, in order, and wait until every one is answered, refused, or out of time: all are done then.

        No more are under way at once, of all threads together, than the receive buffer holds answers for.  The clock
        starts again whenever one of them gets something.
        """
        done: list[Request] = []
        while len(done) < len(messages):
            waiter = _Waiter(timeout)
            self._guarded(waiter, self._exchange, messages, len(done))
            done += waiter.requests
        return done

    def _guarded(self, waiter: _Waiter, step: Callable[..., None], *rest: object) -> None:
        """Do this, and clear away what is left of the waiter then; an interrupt meanwhile is raised afterwards.

        The interpreter looks for signals when a function is called, begins, or a loop begins again: between the end of
        the step and the inner `try` there is no such place, and in the latter an interrupt only makes it begin anew.
        """
        try:
            step(waiter, *rest)
        finally:
            interrupt: KeyboardInterrupt | None = None
            while True:
                try:
                    with self._lock:
                        self._clear(waiter)
                    break
                except KeyboardInterrupt as error:
                    interrupt = error
            if interrupt is not None:
                raise interrupt

    def _exchange(self, waiter: _Waiter, messages: Sequence[Message], start: int) -> None:
        dump = is_dump(messages[start])
        self._enter(waiter, len(messages) - start, dump=dump)
        why: object = self._closed
        try:
            self._drain(waiter)
        except ChannelClosed as error:
            why = error
        requests = self._prepare(waiter, messages, start)
        if why:
            closed(requests, why, sent=False)
            return
        with self._lock:
            if self._followers and self._lead is waiter:
                self._lead = None  # sending may take a while
                self._hand_on()
            self._begin(waiter)
        with self._sending:
            failed = send(self.channel, requests)
        if failed or self._room.floods:
            with self._lock:
                self._sent(waiter, failed)
        self._await(waiter)

    def send(self, message: Message) -> None:
        """Send what nobody answers."""
        with self._lock:
            request = self.conversation.prepare(message, self.conversation.next_seq())
        with self._sending:
            send(self.channel, [request])
        if request.error is not None:
            raise request.error

    def _enter(self, waiter: _Waiter, wanted: int, *, dump: bool) -> None:
        """Wait for room; take the lead when nobody has it."""
        while True:
            with self._lock:
                if self._enters(waiter, wanted, dump=dump):
                    if self._lead is None:
                        self._lead = waiter
                    return
                bell = waiter.bell()
            bell.acquire()

    def _drain(self, waiter: _Waiter) -> None:
        """Take what has arrived since: others' broadcasts would fill the buffer that our answers need."""
        if self._lead is waiter:  # else whoever has the lead reads what there is
            while self._read(AT_ONCE, 0.0):
                pass
        if self.conversation.rest_of_dump:
            self._await_rest(waiter)

    def _await_rest(self, waiter: _Waiter) -> None:
        """Until what is left of a dump given up is out of the way: it also fills the buffer that answers need."""
        self._quiet, since = 0.0, time.monotonic()
        while True:
            with self._lock:
                leads = self._lead is None or self._lead is waiter
                if leads:
                    self._lead = waiter
                # A read of somebody else's may have begun long before, so one that ends in vain proves nothing.
                if self._rest_is_over(SLICE if leads else 2 * SLICE, since):
                    return
            if leads:
                self._read(AT_ONCE, SLICE / 4)
            else:
                time.sleep(SLICE / 100)

    def _clear(self, waiter: _Waiter) -> None:
        """May be done again from the start, when it was interrupted."""
        try:
            if self._arrived and self._lead is waiter:
                self._deliver()
        finally:
            self._dismiss(waiter)
            self._followers.pop(waiter, None)
            if self._lead is waiter:
                self._lead = None
            self._hand_on()

    def _hand_on(self) -> None:
        """When nobody has the lead, wake somebody to take it."""
        if self._lead is None and self._followers:
            next(iter(self._followers)).ring()

    # Waiting and reading.

    def _await(self, waiter: _Waiter) -> None:
        """Read, or let another one read, until it has what it waits for or is out of time."""
        while True:
            leads = self._lead is waiter  # then nobody else changes what it waits for
            if not leads:
                with self._lock:
                    if waiter.done or self._closed:
                        break
                    leads = self._lead is None
                    if leads:
                        self._lead = waiter
                        self._followers.pop(waiter, None)
                    else:
                        self._followers[waiter] = None
                        bell = waiter.bell()
            elif waiter.done or self._closed:
                break
            left = waiter.left
            if left <= 0 and (not leads or waiter.ready is None):
                break
            if leads:
                try:
                    found = self._read(self.limit, max(0.0, min(left, SLICE)))
                except ChannelClosed as error:
                    if waiter.ready is not None:
                        raise
                    closed(waiter.requests, error, sent=True)
                    break
                if left <= 0 and not found:
                    break
            else:
                bell.acquire(timeout=-1 if waiter.timeout is None else left)
        if waiter.open:
            with self._lock:
                self._give_up(waiter)

    def _read(self, limit: int, seconds: float) -> bool:
        """What whoever has the lead does: receive, and give what came to whom it belongs.  Whether anything came."""
        received = receive(self.channel, limit, seconds, dump=self._room.dumping)
        if not self._take(received, seconds):
            return False
        with self._lock:
            self._deliver(self._lead)
        return True

    # What nobody asked for.

    def next_event(self, timeout: float | None) -> Message | None:
        """The oldest event; when there is none, waits up to `timeout` seconds for one."""
        talk = self.conversation
        return self._next(talk.next_event, lambda: talk.has_events, timeout)

    def watch(self) -> Watch:
        """See Conversation.watch; what has arrived before does not count."""
        self._guarded(_Waiter(0.0, lambda: False), self._listen)
        with self._lock:
            return self.conversation.watch()

    def unwatch(self, watch: Watch) -> None:
        """End it, and wake who waits for it."""
        with self._lock:
            self._watch_over(watch)

    def next_watched(self, watch: Watch, timeout: float | None) -> tuple[Message, bool] | None:
        """The next that the watch has; None when none came within `timeout` seconds, or when it was ended."""
        return self._next(watch.take, lambda: bool(watch.queue) or watch.stopped, timeout)

    def _next(self, take: Callable[[], T | None], ready: Callable[[], bool], timeout: float | None) -> T | None:
        """What `take` gives, now or within the time; another thread may be faster, and then the wait goes on."""
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._lock:
                if (found := take()) is not None or ready():
                    return found
            waiter = _Waiter(None if until is None else max(0.0, until - time.monotonic()), ready)
            self._guarded(waiter, self._listen)
            if until is not None and time.monotonic() >= until:
                with self._lock:
                    return take()

    def _listen(self, waiter: _Waiter) -> None:
        """Wait, and read for others meanwhile; raises ChannelClosed."""
        with self._lock:
            if waiter.done:
                return
            self._listeners[waiter] = None
        self._await(waiter)
        if self._closed and not waiter.done:
            raise ChannelClosed(f"waiting for events of {self.channel.abi}: {self._closed}")
