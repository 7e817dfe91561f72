"""One channel that many threads share: calls are under way at once, and whoever waits reads for all of them.

No thread does nothing but read.  Of those who wait one at a time has the lead: it receives, gives what came to the
conversation, wakes those whose requests are done, and hands the lead on when it has what it waited for.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from .channel import Channel
from .channel import lost as lost_by
from .codec import Message
from .conversation import Conversation, Request, Watch
from .errors import ChannelClosed
from .exchange import Room, closed, feed, is_dump, left_behind, receive, send, timed_out
from .tables import Batch

__all__ = ["Link"]

_SLICE = 0.1
"""Seconds after which a thread that has the lead looks up: the link may have been closed, or it been told to stop."""
_AT_ONCE = 64
"""Messages received in one call."""


class _Waiter:
    """Somebody who waits: for the answers to its requests, or until `ready` says so."""

    __slots__ = ("_bell", "deadline", "open", "ready", "requests", "seqs", "timeout")

    def __init__(self, timeout: float | None, ready: Callable[[], bool] | None = None) -> None:
        self.timeout = timeout
        self.deadline = 0.0
        self.ready = ready
        self.seqs: list[int] = []
        self.requests: list[Request] = []
        self.open: set[Request] = set()
        """Those of its requests that are not done."""
        self._bell: threading.Lock | None = None

    def start_clock(self) -> None:
        """It waits `timeout` seconds from now."""
        if self.timeout is not None:
            self.deadline = time.monotonic() + self.timeout

    @property
    def left(self) -> float:
        """How many seconds it still waits."""
        return _SLICE if self.timeout is None else self.deadline - time.monotonic()

    @property
    def done(self) -> bool:
        """Whether it has what it waited for."""
        return not self.open if self.ready is None else self.ready()

    # A lock as a bell: it is held until somebody rings, and no ring is lost.  Both under the link's lock.

    def bell(self) -> threading.Lock:
        """What to wait at."""
        if self._bell is None:
            self._bell = threading.Lock()
            self._bell.acquire()
        return self._bell

    def ring(self) -> None:
        """Wake it up."""
        if self._bell is not None and self._bell.locked():
            self._bell.release()


class Link:
    """A channel, its conversation, and the threads that wait for something from it.

    What threads share changes in short steps under `_lock`; the channel is used outside of it, by one sender and one
    receiver at a time.  An interrupt (Ctrl-C) may come between any two steps of the thread that it hits; what this
    thread leaves behind is cleared away, and what it had received for others is given to them.
    """

    def __init__(self, channel: Channel, *, asking: Conversation | None = None) -> None:
        self.channel = channel
        self.conversation = Conversation(channel.abi, asking=asking)
        self._lock = threading.RLock()  # a signal handler may close what it interrupted
        self._sending = threading.Lock()
        self._room = Room(channel)
        self._lead: _Waiter | None = None
        self._followers: dict[_Waiter, None] = {}
        self._listeners: dict[_Waiter, None] = {}
        """Those who wait for no answer: readers of events, watchers."""
        self._arrived: deque[bytes | Batch] = deque()
        """Received, and not yet given to the conversation."""
        self._rest_of_dump = False
        """A dump was given up.  What is left of it must not be taken for parts of the next, and fills the buffer."""
        self._closed = ""
        self._losses = 0

    @property
    def losses(self) -> int:
        """How many messages the channel lost or cut, and how many were no messages."""
        return self._losses + self.conversation.undecodable + lost_by(self.channel)

    def close(self) -> None:
        """Close the channel; whoever waits gets ChannelClosed.

        Where there is a file descriptor the reader is first waited for: nobody may go on reading from a number that has
        become another file's.
        """
        with self._lock:
            self._closed = self._closed or "it was closed by this side"
            for waiter in (*self._followers, *self._room.next):
                if isinstance(waiter, _Waiter):
                    waiter.ring()
        until = time.monotonic() + 10 * _SLICE
        while self._lead is not None and self.channel.fileno() >= 0 and time.monotonic() < until:
            time.sleep(_SLICE / 100)
        sender = self._sending.acquire(timeout=10 * _SLICE)
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
        prepare = self.conversation.prepare
        requests = [
            prepare(message, seq)
            for message, seq in zip(messages[start : start + len(waiter.seqs)], waiter.seqs, strict=True)
        ]
        waiter.requests = requests
        if why:
            closed(requests, why, sent=False)
            return
        with self._lock:
            if self._followers and self._lead is waiter:
                self._lead = None  # sending may take a while
                self._hand_on()
            for request in requests:
                request.owner = waiter
                if request.error is None:
                    self.conversation.begin(request)
                    waiter.open.add(request)
        with self._sending:
            failed = send(self.channel, requests)
        with self._lock:
            self._room.sent(waiter)
            if self._room.awaited:
                self._call_in()
            if failed:
                waiter.open.difference_update(failed)
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
                room = wanted if self._closed else self._room.enter(waiter, wanted, dump=dump)
                if room:
                    waiter.seqs = [self.conversation.next_seq() for _ in range(room)]
                    if self._lead is None:
                        self._lead = waiter
                    if self._room.awaited:
                        self._call_in()
                    return
                bell = waiter.bell()
            bell.acquire()

    def _drain(self, waiter: _Waiter) -> None:
        """Take what has arrived since: others' broadcasts would fill the buffer that our answers need."""
        while self._lead is not waiter:
            if not self._rest_of_dump or self._closed:
                return  # whoever has the lead reads what there is
            time.sleep(_SLICE / 100)
            with self._lock:
                if self._lead is None:
                    self._lead = waiter
        while self._read(_AT_ONCE, 0.0):
            pass

    def _clear(self, waiter: _Waiter) -> None:
        """May be done again from the start, when it was interrupted."""
        try:
            if self._arrived and self._lead is waiter:
                self._feed()
        finally:
            self._dismiss(waiter)

    def _dismiss(self, waiter: _Waiter) -> None:
        for request in waiter.requests:
            if request.dump and left_behind(request):
                self._rest_of_dump = True
            self.conversation.end(request)
        self._listeners.pop(waiter, None)
        self._followers.pop(waiter, None)
        self._room.leave(waiter)
        if self._lead is waiter:
            self._lead = None
        self._hand_on()

    def _hand_on(self) -> None:
        """Wake whoever can go on now: one to take the lead, and who waits for room."""
        if self._lead is None and self._followers:
            next(iter(self._followers)).ring()
        if self._room.awaited:
            self._call_in()

    def _call_in(self) -> None:
        for waiter in self._room.next:
            if isinstance(waiter, _Waiter):
                waiter.ring()

    # Waiting and reading.

    def _await(self, waiter: _Waiter) -> None:
        """Read, or let another one read, until it has what it waits for or is out of time."""
        bell: threading.Lock | None = None
        waiter.start_clock()
        while True:
            with self._lock:
                if waiter.done or self._closed:
                    break
                left = waiter.left
                leads = self._lead is None or self._lead is waiter
                if leads:
                    self._lead = waiter
                    self._followers.pop(waiter, None)
                elif left > 0:
                    self._followers[waiter] = None
                    bell = waiter.bell()
            if left <= 0 and (not leads or waiter.ready is None):
                break
            if leads:
                try:
                    found = self._read(self._limit, 0.0 if self._rest_of_dump else max(0.0, min(left, _SLICE)))
                except ChannelClosed as error:
                    if waiter.ready is not None:
                        raise
                    closed(waiter.requests, error, sent=True)
                    break
                if left <= 0 and not found:
                    break
            elif bell is not None:
                bell.acquire(timeout=-1 if waiter.timeout is None else left)
        if waiter.open:
            self._give_up(waiter)

    @property
    def _limit(self) -> int:
        """A single request has a single answer; whatever came behind it can wait for the next one."""
        return _AT_ONCE if self._listeners or self._room.dumping or self.conversation.pending > 1 else 1

    def _give_up(self, waiter: _Waiter) -> None:
        with self._lock:
            if self._closed:
                closed(waiter.requests, self._closed, sent=True)
            for request in waiter.requests:
                if not request.done:
                    self.conversation.give_up(request, timed_out(request, waiter.timeout or 0.0))

    def _read(self, limit: int, seconds: float) -> bool:
        """What whoever has the lead does: receive, and give what came to whom it belongs.  Whether anything came."""
        received = receive(self.channel, limit, seconds, dump=self._room.dumping)
        if received is None:
            self._losses += 1
            return False
        if not received:
            if seconds == 0.0:
                self._rest_of_dump = False
            return False
        self._arrived.extend(received)
        with self._lock:
            self._feed()
        return True

    def _feed(self) -> None:
        arrived, more_room = self._arrived, False
        while arrived:
            try:
                touched = feed(self.conversation, arrived[0])
            except Exception:
                arrived.popleft()
                raise
            for request in touched:
                waiter = request.owner
                if not isinstance(waiter, _Waiter):
                    continue
                waiter.start_clock()
                if request.done:
                    waiter.open.discard(request)
                    self._room.keep(waiter, len(waiter.open))
                    more_room = True
                    if not waiter.open and waiter is not self._lead:
                        waiter.ring()
            arrived.popleft()
        if more_room and self._room.awaited:
            self._call_in()
        for waiter in self._listeners:
            if waiter is not self._lead and waiter.done:
                waiter.ring()

    # What nobody asked for.

    def take_events(self, timeout: float | None) -> list[Message]:
        """The events since the last time; when there are none, waits up to `timeout` seconds for some."""
        self._guarded(_Waiter(timeout, lambda: self.conversation.has_events), self._listen)
        with self._lock:
            return self.conversation.take_events()

    def watch(self) -> Watch:
        """See Conversation.watch; what has arrived before does not count."""
        self._guarded(_Waiter(0.0, lambda: False), self._listen)
        with self._lock:
            return self.conversation.watch()

    def unwatch(self, watch: Watch) -> None:
        """End it, and wake who waits for it."""
        with self._lock:
            watch.stopped = True
            self.conversation.unwatch(watch)
            for waiter in self._listeners:
                if waiter.done:
                    waiter.ring()

    def next_watched(self, watch: Watch, timeout: float | None) -> tuple[Message, bool] | None:
        """The next that the watch has; None when none came within `timeout` seconds, or when it was ended."""
        if not watch.queue:
            self._guarded(_Waiter(timeout, lambda: bool(watch.queue) or watch.stopped), self._listen)
        with self._lock:
            return watch.queue.popleft() if watch.queue else None

    def _listen(self, waiter: _Waiter) -> None:
        """Wait, and read for others meanwhile; raises ChannelClosed."""
        with self._lock:
            if waiter.done:
                return
            self._listeners[waiter] = None
        self._await(waiter)
        if self._closed and not waiter.done:
            raise ChannelClosed(f"waiting for events of {self.channel.abi}: {self._closed}")
