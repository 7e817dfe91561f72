"""Who waits for what on one channel, and how much may be under way at once: the same for threads and for tasks."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from .channel import Channel, in_flight
from .channel import lost as lost_by
from .codec import Message
from .conversation import Conversation, Request, Watch
from .exchange import closed, feed, timed_out
from .tables import Batch

__all__ = ["AT_ONCE", "SLICE", "Room", "Shared", "Waiter"]

SLICE = 0.1
"""Seconds after which a thread that reads looks up: the connection may have been closed, or it been told to stop."""
AT_ONCE = 64
"""Messages received in one call."""


_PAUSE = 10 * SLICE
"""Seconds between parts of a dump that a kernel queued all at once: none of FreeBSD, more of a channel to a remote one.

What does not come within was dropped, and need not be waited for as long as an answer; who has a connection that stalls
for longer gives it a longer timeout, of which this is the fifth part then."""


class Waiter:
    """Somebody who waits: for the answers to its requests, or until `ready` says so."""

    __slots__ = ("deadline", "heard", "open", "pause", "ready", "requests", "seqs", "timeout")

    def __init__(self, timeout: float | None, ready: Callable[[], bool] | None = None) -> None:
        self.timeout = timeout
        self.pause = None if timeout is None else min(timeout, max(_PAUSE, timeout / 5))
        """How long it waits for the next part of a dump that the kernel queued all at once."""
        self.deadline = 0.0
        self.heard = True
        """Something came for it: its clock starts again when it looks next."""
        self.ready = ready
        self.seqs: list[int] = []
        self.requests: list[Request] = []
        self.open: set[Request] = set()
        """Those of its requests that are not done."""

    def start_clock(self) -> None:
        """It waits `timeout` seconds from now."""
        self.heard = False
        if self.timeout is not None:
            self.deadline = time.monotonic() + self.timeout

    @property
    def left(self) -> float:
        """How many seconds it still waits; some when it waits for ever."""
        if self.timeout is None:
            return SLICE
        if self.heard:
            self.start_clock()
            return self.timeout
        return self.deadline - time.monotonic()

    @property
    def done(self) -> bool:
        """Whether it has what it waited for."""
        return not self.open if self.ready is None else self.ready()

    def ring(self) -> None:
        """Wake it up."""
        raise NotImplementedError


class Room:
    """How many requests may be under way at once, so that the receive buffer holds all their answers.

    First come, first served.  A connection has one dump at a time: its parts name no request, and Linux answers EBUSY
    to a second one of any type.  Linux fills up to two thirds of the buffer with it, so half of the room is kept free
    meanwhile.  A kernel that counts down queues all parts at once and drops in silence what does not fit, answers of
    others too: nothing else is sent while its dump is under way, and it is not asked for one while somebody who has
    room has not sent yet.

    Every change is one step, and `leave` may be said twice, so that an interrupt leaves nothing behind.
    """

    __slots__ = ("_admitted", "_channel", "_dumper", "_dumps", "_floods", "_requests", "_unsent")

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._floods = channel.abi.dump_counts_down
        self._requests: dict[Waiter, None] = {}
        self._dumps: dict[Waiter, None] = self._requests if self._floods else {}
        self._unsent: dict[Waiter, None] = {}
        self._admitted: dict[Waiter, int] = {}
        self._dumper: Waiter | None = None

    @property
    def floods(self) -> bool:
        """Whether it matters that somebody has not sent yet."""
        return self._floods

    @property
    def dumping(self) -> bool:
        """Whether a dump is under way."""
        return self._dumper is not None

    def enter(self, who: Waiter, wanted: int, *, dump: bool) -> int:
        """How many requests `who` may have under way now; when 0 it is to ask again as soon as `next` names it."""
        queue = self._dumps if dump else self._requests
        granted = self._granted(wanted, dump=dump) if not queue or next(iter(queue)) is who else 0
        if not granted:
            queue[who] = None
            return 0
        queue.pop(who, None)
        self._unsent[who] = None
        self._admitted[who] = max(1, in_flight(self._channel) // 2) if dump else granted
        if dump:
            self._dumper = who
        return granted

    def _granted(self, wanted: int, *, dump: bool) -> int:
        if dump:
            return int(self._dumper is None and not (self._floods and self._unsent))
        if self._dumper is not None and self._floods:
            return 0
        if not self._admitted:
            return min(wanted, in_flight(self._channel))
        room = in_flight(self._channel) - sum(self._admitted.values())
        # However small the buffer is, there is always one request under way beside a dump.
        return min(wanted, room) if room > 0 else int(len(self._admitted) == 1 and self._dumper is not None)

    def sent(self, who: Waiter) -> None:
        """Its requests are with the kernel."""
        self._unsent.pop(who, None)

    def keep(self, who: Waiter, count: int) -> None:
        """Only so many of its requests are still under way."""
        if who is not self._dumper:
            self._admitted[who] = count

    def leave(self, who: Waiter) -> None:
        """Nothing of it is under way, and it waits no more."""
        self._unsent.pop(who, None)
        self._requests.pop(who, None)
        self._dumps.pop(who, None)
        self._admitted.pop(who, None)
        if self._dumper is who:
            self._dumper = None

    @property
    def awaited(self) -> bool:
        """Whether anybody waits."""
        return bool(self._requests or self._dumps)

    @property
    def next(self) -> list[Waiter]:
        """Who is to ask again now that there is more room."""
        return list({next(iter(queue)): None for queue in (self._requests, self._dumps) if queue})


_REST = 5 * SLICE
"""Seconds for which what is left of a dump is waited for at most."""


class Shared:
    """What those who share a channel have in common; whoever changes it sees to it that nobody else does."""

    def __init__(self, channel: Channel, asking: Conversation | None) -> None:
        self.channel = channel
        self.conversation = Conversation(channel.abi, asking=asking)
        self._room = Room(channel)
        self._listeners: dict[Waiter, None] = {}
        """Those who wait for no answer: readers of events, watchers."""
        self._arrived: deque[bytes | Batch] = deque()
        """Received, and not yet given to the conversation."""
        self._quiet = 0.0
        """For how many seconds those who read have waited in vain, since anything came."""
        self._closed = ""
        self._losses = 0

    @property
    def losses(self) -> int:
        """How many messages the channel lost or cut, and how many were no messages."""
        return self._losses + self.conversation.undecodable + lost_by(self.channel)

    @property
    def limit(self) -> int:
        """A single request has a single answer; whatever came behind it can wait for the next one."""
        return AT_ONCE if self._listeners or self._room.dumping or self.conversation.pending > 1 else 1

    def _enters(self, waiter: Waiter, wanted: int, *, dump: bool) -> bool:
        """Whether it has room; its requests have their numbers then."""
        room = wanted if self._closed else self._room.enter(waiter, wanted, dump=dump)
        waiter.seqs = [self.conversation.next_seq() for _ in range(room)]
        if room:
            self._call_in()
        return bool(room)

    def _prepare(self, waiter: Waiter, messages: Sequence[Message], start: int) -> list[Request]:
        prepare = self.conversation.prepare
        some = messages if len(waiter.seqs) == len(messages) else messages[start : start + len(waiter.seqs)]
        waiter.requests = [prepare(message, seq) for message, seq in zip(some, waiter.seqs, strict=True)]
        return waiter.requests

    def _begin(self, waiter: Waiter) -> None:
        for request in waiter.requests:
            request.owner = waiter
            if request.error is None:
                self.conversation.begin(request)
                waiter.open.add(request)

    def _sent(self, waiter: Waiter, failed: Sequence[Request]) -> None:
        self._room.sent(waiter)
        self._call_in()
        if failed:
            waiter.open.difference_update(failed)

    def _deliver(self, reader: Waiter | None = None) -> None:
        """Give what arrived to whom it belongs, and wake those who have what they waited for; `reader` is awake."""
        arrived, more_room, last = self._arrived, False, None
        while arrived:
            try:
                touched = feed(self.conversation, arrived[0])
            except Exception:
                arrived.popleft()
                raise
            for request in touched:
                waiter = request.owner
                if not isinstance(waiter, Waiter):
                    continue
                if request.dump and self._room.floods:
                    waiter.timeout = waiter.pause
                if waiter is reader:
                    waiter.heard = True  # it looks at the clock next
                elif waiter is not last:
                    waiter.start_clock()
                    last = waiter
                if request.done:
                    waiter.open.discard(request)
                    self._room.keep(waiter, len(waiter.open))
                    more_room = True
                    if not waiter.open:
                        waiter.ring()
            arrived.popleft()
        if more_room:
            self._call_in()
        if self._listeners:
            self._wake_listeners()

    def _wake_listeners(self) -> None:
        for waiter in self._listeners:
            if waiter.done:
                waiter.ring()

    def _call_in(self) -> None:
        """Wake who waits for room."""
        if self._room.awaited:
            for waiter in self._room.next:
                waiter.ring()

    def _take(self, received: list[bytes | Batch] | None, seconds: float) -> bool:
        """Keep what was received, after waiting up to so many seconds; whether it was anything."""
        if received is None:
            self._losses += 1
            return False
        if not received:
            self._quiet += seconds
            return False
        self._arrived.extend(received)
        self._quiet = 0.0
        return True

    def _rest_is_over(self, seconds: float, since: float) -> bool:
        """Whether what is left of a dump that was given up has come, or will not: nothing came for so long.

        An end may be lost (FreeBSD drops what does not fit), and a channel to a remote kernel may take a while.  Where
        others never stop talking it is not quiet ever: `since` says from when on (monotonic seconds) it was waited for.
        """
        if self._quiet >= seconds or time.monotonic() - since >= _REST:
            self.conversation.rest_of_dump = False
        return not self.conversation.rest_of_dump or bool(self._closed)

    def _give_up(self, waiter: Waiter) -> None:
        """It is out of time, or the channel closed."""
        if self._closed:
            closed(waiter.requests, self._closed, sent=True)
        for request in waiter.requests:
            if not request.done:
                self.conversation.give_up(request, timed_out(request, waiter.timeout or 0.0))

    def _dismiss(self, waiter: Waiter) -> None:
        """It waits no more.  May be done twice."""
        for request in waiter.requests:
            self.conversation.end(request)
            request.owner = None  # they point at each other, and a dump may be large and hold keys
        self._listeners.pop(waiter, None)
        self._room.leave(waiter)
        self._call_in()

    def _watch_over(self, watch: Watch) -> None:
        watch.stopped = True
        self.conversation.unwatch(watch)
        self._wake_listeners()
