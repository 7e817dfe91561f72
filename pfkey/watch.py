"""Follows what others do to tracked policies, and puts it right: which policy an event is about, and what it takes.

The event says that something changed, the kernel what it is now: it is read before anything is done, so that an event
which is older than our own last change does no harm.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

from .book import Book
from .codec import Message
from .constants import MessageType
from .errors import ChannelClosed, NotSupported, PFKeyError
from .reading import Run, get, is_entry, read
from .resync import Difference
from .settle import settle
from .tracker import Installed, State, TrackedPolicy, Troubles, image_text
from .typed import policy_from
from .work import Work

__all__ = ["CONTESTED_CHANGES", "CONTESTED_SECONDS", "Healing", "Pace", "Watch", "concerned", "heal", "start", "writes"]

log = logging.getLogger("pfkey.keeper")

CONTESTED_CHANGES, CONTESTED_SECONDS = 3, 10.0
"""So many foreign changes of one policy in so many seconds, and the tracker stops: two must not fight for ever."""

_GONE = (MessageType.SPDDELETE, MessageType.SPDDELETE2, MessageType.SPDEXPIRE)


@dataclass(frozen=True, slots=True)
class Healing:
    """What was done about a foreign change of a policy."""

    policy: str
    event: str
    found: str
    sent: tuple[MessageType, ...]
    contested: bool = False
    error: PFKeyError | None = None

    def __str__(self) -> str:
        done = "sent " + " ".join(kind.name for kind in self.sent) if self.sent else "nothing was sent"
        done = "contested: it is left as it is" if self.contested else done
        return f"{self.policy}: {self.event} left {self.found}; {done}" + (f"; {self.error}" if self.error else "")


def concerned(book: Book, message: Message) -> TrackedPolicy | None:
    """The tracked policy that an event is about."""
    extension = message.policy
    if extension is None:
        return None
    known = book.ids.get(extension.id) if extension.id else None
    try:
        policy = policy_from(message)
    except PFKeyError:
        return known  # FreeBSD says nothing but the id when it deletes by id
    tracked = book.get(policy.direction, policy.selector)
    return tracked if tracked is not None and is_entry(tracked, policy) else None


_WRITES = (MessageType.SPDADD, MessageType.SPDUPDATE, MessageType.SPDDELETE)
_QUIET = 1.0
"""Seconds without an event after which the broadcasts of our own changes must have arrived."""


def writes(messages: Sequence[Message], replies: Sequence[Message | PFKeyError]) -> int:
    """How many of these were changes that the kernel acknowledged, and so broadcast."""
    pairs = zip(messages, replies, strict=True)
    return sum(message.type in _WRITES and not isinstance(reply, PFKeyError) for message, reply in pairs)


class Pace:
    """When a watch has to compare all policies: after a flush, when events were lost, and once in a while.

    Kernels drop broadcasts in silence (Linux, FreeBSD before 14), so our own are counted: when the broadcast of a
    change of ours does not come, others were lost with it.
    """

    def __init__(self, interval: float, lost: int, written: int) -> None:
        self._interval = interval
        self.compared(lost, written)

    def compared(self, lost: int, written: int) -> None:
        """All were compared: what was missed before does not matter any more."""
        self._due = time.monotonic() + self._interval
        self._lost = lost
        self._written, self._seen = written, 0
        self._flushed = False

    @property
    def patience(self) -> float:
        """For how many seconds to wait for the next event."""
        return max(0.0, min(_QUIET, self._due - time.monotonic()))

    def concerns_one(self, message: Message, own: bool) -> bool:
        """Note an event; whether it is somebody else's change of one policy."""
        if own:
            self._seen += message.type in _WRITES
            return False
        self._flushed |= message.type is MessageType.SPDFLUSH
        return not self._flushed

    def reason(self, lost: int, written: int, *, quiet: bool) -> str:
        """Why all have to be compared now, "" for not yet.

        `written` is how many changes of ours the kernel had acknowledged before it was waited for events; `quiet` says
        that none came.
        """
        if self._flushed:
            return "somebody flushed the policies"
        if lost != self._lost:
            return "events about policies were lost"
        if quiet and self._seen < written - self._written:
            return "the broadcast of a change of ours did not come, so others may be missing too"
        return "it is time" if time.monotonic() >= self._due else ""


def heal(book: Book, tracked: TrackedPolicy, message: Message, now: float) -> Run[Healing | None]:
    """Find out what an event did to a policy and put it right; None when it is what it was."""
    before = tracked.installed
    unread = yield from _look(book, tracked, message)
    after = tracked.installed
    if unread is None and after.image == before.image and after.state is before.state:
        return None
    event = f"{_name(message)} by process {message.pid}" if message.pid else f"{_name(message)} by the kernel"
    found = "something that could not be read" if unread else image_text(after.image)
    if not len(tracked) and after.state in (State.ABSENT, State.FOREIGN):
        return Healing(str(tracked), event, found, ())
    troubles = tracked.troubles
    if troubles is None:
        troubles = tracked.troubles = Troubles()
    troubles.strikes = [when for when in troubles.strikes if now - when < CONTESTED_SECONDS]
    troubles.strikes.append(now)
    if troubles.contested or len(troubles.strikes) >= CONTESTED_CHANGES:
        if not troubles.contested:
            troubles.contested = True
            log.error(
                "%s is contested: %d foreign changes in %g seconds, the last one %s, which left %s; it is left as it is"
                " until a call for it, or resync()",
                tracked, len(troubles.strikes), CONTESTED_SECONDS, event, found,
            )  # fmt: skip
        return Healing(str(tracked), event, found, (), contested=True)
    work = Work(tracked)
    yield from settle(book, (work,))
    log.warning("%s: %s left %s; sent %s", tracked, event, found, work.change)
    change = work.change
    return Healing(str(tracked), event, found, (*change.guard, *change.sent), error=work.error)


def _look(book: Book, tracked: TrackedPolicy, message: Message) -> Run[BaseException | None]:
    """Read the policy; an SPDGET that agrees with an event of deletion is enough."""
    installed = tracked.installed
    extension = message.policy
    number = installed.policy_id
    if extension is not None and extension.id and message.type not in _GONE:
        number = extension.id
    if number:
        (found,) = yield from get(book, [number])
        if not isinstance(found, PFKeyError) and found is not None and is_entry(tracked, found):
            if message.type is MessageType.SPDADD and found.id != installed.policy_id:
                book.note(tracked, Installed(State.UNKNOWN, None, found.id))  # ours had gone, this one is theirs
            book.read(tracked, found)
            return None
        if found is None and message.type in _GONE and number == installed.policy_id:
            book.read(tracked, None)
            return None
    book.note(tracked, installed.doubted(tried=installed.tried))
    unread = yield from read(book, [tracked])
    return unread.get(tracked)


def _name(message: Message) -> str:
    return message.type.name if isinstance(message.type, MessageType) else str(message.type)


@dataclass(slots=True)
class Watch:
    """A thread that follows the kernel's broadcasts for a tracker; made by `PolicyTracker.watch`.

    `healings` are the last foreign changes and what was done about them, `differences` what the last resyncs found;
    `resyncs` counts those, `error` says why the thread has ended by itself.
    """

    interval: float
    healings: list[Healing] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    resyncs: int = 0
    error: BaseException | None = None
    _stopped: threading.Event = field(default_factory=threading.Event, repr=False)
    _events: Any = field(default=None, repr=False)
    _thread: threading.Thread | None = field(default=None, repr=False)

    def stop(self) -> None:
        """End it; returns when it has ended."""
        self._stopped.set()
        if self._events is not None:
            self._events.stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    @property
    def running(self) -> bool:
        """Whether it still follows."""
        return self._thread is not None and self._thread.is_alive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def note(self, healing: Healing | None) -> None:
        """Keep what was done, as long as there is not too much of it."""
        if healing is not None:
            self.healings.append(healing)
            del self.healings[:-_KEPT]

    def note_resync(self, differences: tuple[Difference, ...]) -> None:
        """The same for a resync."""
        self.resyncs += 1
        self.differences += differences
        del self.differences[:-_KEPT]


_KEPT = 1000


def start(
    watch: Watch,
    kernel: Any,
    heal_one: Callable[[Message], None],
    compare: Callable[[], None],
    written: Callable[[], int],
) -> None:
    """Begin to listen, then start the thread: what happens from now on is not missed."""
    if not hasattr(kernel, "spd_events"):
        raise NotSupported(f"{kernel!r} gives no events to watch")
    watch._events = kernel.spd_events(timeout=_QUIET)
    watch._thread = threading.Thread(
        target=_follow, args=(watch, heal_one, compare, written), name="pfkey-watch", daemon=True
    )
    watch._thread.start()


def _follow(
    watch: Watch, heal_one: Callable[[Message], None], compare: Callable[[], None], written: Callable[[], int]
) -> None:
    events = watch._events
    try:
        with _reported(watch):
            pace = Pace(watch.interval, events.lost, written())
            while not watch._stopped.is_set():
                events.timeout, quiet, before = pace.patience, True, written()
                for message, own in events:
                    quiet = False
                    if watch._stopped.is_set():
                        return
                    if pace.concerns_one(message, own):
                        heal_one(message)
                    if pace.reason(events.lost, before, quiet=False):
                        break
                reason = pace.reason(events.lost, before, quiet=quiet)
                if reason and not watch._stopped.is_set():
                    log.info("all policies are compared: %s", reason)
                    with _told("all policies could not be compared"):
                        compare()
                    pace.compared(events.lost, written())
    finally:
        events.stop()


@contextmanager
def _reported(watch: Watch) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        watch.error = error
        log.exception("the watch over the policies has ended")


@contextmanager
def _told(what: str) -> Iterator[None]:
    """An error of one round does not end the watch, unless the connection is gone."""
    try:
        yield
    except ChannelClosed:
        raise
    except PFKeyError as error:
        log.warning("%s: %s", what, error)
