"""What calls do to the lists of policies, one call or a transaction of many, before the kernel hears of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from .abi import Abi
from .assignment import Assignment
from .book import Book
from .constants import Action, Direction, Level, MessageType, SAProtocol
from .errors import EncodeError, KernelError, PFKeyError, ReplyTimeout, TransactionError
from .messages import Selector
from .tracker import State, TrackedPolicy, Troubles, Undo, image_text
from .work import LINGERS, UNCHANGED, UNUSED, Change, Work, say_more, uncertain

__all__ = [
    "POSTPONED",
    "Transaction",
    "Ways",
    "change_of",
    "check",
    "close_error",
    "expect",
    "let_linger",
    "lingers_until",
    "say_outcome",
    "shift",
    "state_text",
    "tunnel_calls",
]

_SILENT = Change(reason=UNCHANGED)
_SPARED = Change(avoided=(MessageType.SPDUPDATE,), reason=UNCHANGED)
_UNUSED = Change(reason=UNUSED)
_LINGERING = Change(avoided=(MessageType.SPDDELETE,), reason=LINGERS)
POSTPONED = Change(reason="part of a transaction: what is sent is decided at its end")


def expect(selector: object, *assignments: object) -> None:
    """TypeError when one of these is something else.  None above all: it is no assignment, nor the end of one."""
    if not isinstance(selector, Selector):
        raise TypeError(f"a policy is named by a Selector, not by {selector!r}")
    for one in assignments:
        if not isinstance(one, Assignment):
            raise TypeError(f"a policy is used by an Assignment, not by {one!r}")


def check(book: Book, tracked: TrackedPolicy, assignment: Assignment) -> None:
    """Refuse what the kernel is known to reject or to store as something else, before anything is sent."""
    if tracked.holds(assignment):
        return
    if assignment.action == Action.IPSEC:
        for template in assignment.templates:
            if template.level == Level.UNIQUE and not template.reqid:
                raise EncodeError(
                    f"{template} in {tracked}: level unique without a reqid lets the kernel choose one, which no"
                    " tracker can compare; give the reqid, or level REQUIRE"
                )
    book.check_policy(tracked.policy(assignment))


def shift(
    book: Book,
    tracked: TrackedPolicy,
    old: Assignment | None,
    new: Assignment | None,
    steps: list[Undo] | None = None,
) -> list[Undo]:
    """Take `old` out of the list and put `new` in; what takes that back is appended to `steps`, and returned.

    An interrupt (Ctrl-C) leaves no step out of `steps`, and never the old one gone without the new one there.
    """
    steps = [] if steps is None else steps
    if new is None:
        assert old is not None
        steps.append(tracked.remove(old))
        return steps
    if old == new:
        tracked.must_have(old)
        return steps
    check(book, tracked, new)
    if old is None:
        steps.append(tracked.insert(new))
        return steps
    without = tracked.remove(old)
    done = False
    try:
        inserted = tracked.insert(new)
        done = True
        steps += (without, inserted)
    except BaseException:
        if not done:
            tracked.undo(without)
        raise
    return steps


def change_of(book: Book, tracked: TrackedPolicy, top: Assignment | None) -> Change | None:
    """The Change when the kernel need not hear of anything; None when it has to be asked or told something.

    `top` is the assignment that was on top before.
    """
    installed = tracked.installed
    if tracked.leftover:
        return None
    now = tracked.top
    troubles = tracked.troubles
    if troubles is not None and _is_over(tracked, troubles, now):
        tracked.troubles = None
    if now is not None:
        if not tracked.holds(now):
            return None
        if now is top or now == top:
            return _SILENT
        # Kernels that order by insertion: the same policy, but no longer in its place; or of a former life, or one that
        # lingered, and nobody knows yet whether it is.
        if (top is None or tracked.priority(now) != tracked.priority(top)) and book.is_out_of_order(tracked):
            return None
        return _SPARED
    if installed.state is State.ABSENT:
        return _UNUSED
    if installed.state is State.OURS and book.settings.linger > 0:
        let_linger(book, tracked)
        return _LINGERING
    return None


def let_linger(book: Book, tracked: TrackedPolicy) -> None:
    """Keep it for a while, although nobody uses it."""
    if tracked.troubles is None:
        tracked.troubles = Troubles()
    tracked.troubles.lingers_until = time.monotonic() + book.settings.linger
    book.lingering[tracked] = None
    book.lingering.move_to_end(tracked)


def lingers_until(tracked: TrackedPolicy) -> float | None:
    """When it has to go (monotonic seconds); None when it does not linger."""
    return None if tracked.troubles is None else tracked.troubles.lingers_until


def _is_over(tracked: TrackedPolicy, troubles: Troubles, now: Assignment | None) -> bool:
    """A lingering policy is used again; whether nothing else is the matter with it."""
    if now is not None:
        troubles.lingers_until = None
    return troubles.are_over


class Transaction:
    """Many adds, removes and replaces that the kernel hears of at the end: see `PolicyTracker.transaction`.

    `changes` says afterwards what was done for each policy, `sent` which messages that took, guards included.
    """

    def __init__(self, *, sweep: bool) -> None:
        self.sweep = sweep
        self._touched: dict[TrackedPolicy, tuple[Assignment | None, bool, list[Undo]]] = {}
        self._log: list[tuple[TrackedPolicy, int, bool]] = []
        """What was touched in turn: how many steps it had taken before, and whether something had been added to it."""
        self._changes: list[tuple[TrackedPolicy, Change]] = []
        self.not_swept: PFKeyError | OSError | None = None
        """Why what nobody wants could not be looked for; what is wanted is installed all the same."""

    def __len__(self) -> int:
        """How many policies it touches."""
        return len(self._touched)

    @property
    def changes(self) -> dict[tuple[Direction, Selector], Change]:
        """What came of it, by policy; empty before its end."""
        return {(tracked.direction, tracked.selector): change for tracked, change in self._changes}

    @property
    def sent(self) -> tuple[MessageType, ...]:
        """All messages that it took, those for guards included."""
        return tuple(kind for _, change in self._changes for kind in (*change.guard, *change.sent))

    # For the trackers, under their locks.

    def touch(self, book: Book, tracked: TrackedPolicy, old: Assignment | None, new: Assignment | None) -> None:
        """Change the list of a policy, which is this transaction's from now on."""
        touched = self._touched.get(tracked)
        top, added, steps = touched if touched is not None else (tracked.top, False, list[Undo]())
        self._touched[tracked] = top, added, steps  # before anything is done: an interrupt must find it to take it back
        self._log.append((tracked, len(steps), added))
        try:
            shift(book, tracked, old, new, steps)
        except Exception:
            self._log.pop()
            if touched is None:
                del self._touched[tracked]
            raise
        self._touched[tracked] = top, added or new is not None, steps

    @property
    def mark(self) -> tuple[int, bool]:
        """How far it is: for `back_to`, when a transaction within this one fails."""
        return len(self._log), self.sweep

    def back_to(self, mark: tuple[int, bool]) -> None:
        """Take back what was done since; the policies stay this transaction's to its end."""
        count, self.sweep = mark
        while len(self._log) > count:
            tracked, before, added = self._log.pop()
            top, _, steps = self._touched[tracked]
            while len(steps) > before:
                tracked.undo(steps.pop())
            self._touched[tracked] = (top, added, steps)

    def hold(self, tracked: TrackedPolicy) -> None:
        """It is to be looked at too."""
        self._touched.setdefault(tracked, (tracked.top, False, []))

    def __iter__(self) -> Iterator[TrackedPolicy]:
        return iter(self._touched)

    def __contains__(self, tracked: object) -> bool:
        return tracked in self._touched

    def roll_back(self) -> None:
        """Restore every list."""
        for tracked, (_, _, steps) in self._touched.items():
            tracked.undo_all(steps)

    def works(self, book: Book) -> list[Work]:
        """What the kernel has to hear of; the rest is noted as unchanged."""
        works: list[Work] = []
        for tracked, (top, added, steps) in self._touched.items():
            change = change_of(book, tracked, top)
            if change is not None:
                self._changes.append((tracked, change))
                continue
            works.append(Work(tracked, steps if added else None, avoided=_avoided(tracked, top)))
        return works

    def finish(self, works: list[Work]) -> None:
        """Note what came of them; TransactionError names those that failed."""
        self._changes += [(work.tracked, work.change) for work in works]
        close_error(works, "could not be brought to what was asked")
        if self.not_swept is not None:
            raise self.not_swept


def _avoided(tracked: TrackedPolicy, top: Assignment | None) -> tuple[MessageType, ...]:
    """What a program that never compares would have sent."""
    now = tracked.top
    if now is None or now is top or now == top:
        return ()
    return (MessageType.SPDUPDATE if top is not None else MessageType.SPDADD,)


def close_error(works: list[Work], what: str) -> None:
    """Raise the TransactionError that the failures among these make, if any failed."""
    failed: list[tuple[str, PFKeyError, str]] = [
        (str(work.tracked), work.error, state_text(work.tracked)) for work in works if work.error is not None
    ]
    if not failed:
        return
    shown = "; ".join(f"{name} ({state}): {error}" for name, error, state in failed[:5])
    more = f"; and {len(failed) - 5} more" if len(failed) > 5 else ""
    noun = "policy" if len(failed) == 1 else "policies"
    raise TransactionError(
        f"{len(failed)} {noun} {what}: {shown}{more}",
        {name: error for name, error, _ in failed},
        {name: state for name, _, state in failed},
    ) from failed[0][1]


def say_outcome(work: Work) -> None:
    """Let the error of a call say what the kernel holds now, where it does not say so already."""
    error, state = work.error, state_text(work.tracked)
    image = work.tracked.installed.image
    if work.told or (image is not None and image_text(image) in str(error)):
        return
    if not isinstance(error, KernelError | ReplyTimeout):
        return
    known = uncertain(error) and work.tracked.installed.state is not State.UNKNOWN
    say_more(error, f"it was read since: {state}" if known else state)


def state_text(tracked: TrackedPolicy) -> str:
    """What the kernel holds for it, in words."""
    installed = tracked.installed
    if installed.state is State.UNKNOWN:
        return "what the kernel holds is not known, the next call reads it"
    if installed.state is State.ABSENT:
        return "the kernel holds nothing"
    whose = "somebody else's: " if installed.state is State.FOREIGN else ""
    return f"the kernel holds {whose}{image_text(installed.image)}"


Ways = tuple[Assignment, Assignment | None]
"""A tunnel's assignments: the outbound one, and that of the other directions, None when it is the same reversed."""


def tunnel_calls(
    abi: Abi, selector: Selector, old: Ways | None, new: Ways | None
) -> Iterator[tuple[Direction, Selector, Assignment | None, Assignment | None]]:
    """The calls for a whole tunnel, as (direction, selector, old, new).

    Inbound first, so that nothing arrives unexpected; when it goes, outbound first.
    """
    given = [one for ways in (old, new) if ways for at, one in enumerate(ways) if not at or one is not None]
    expect(selector, *given)
    directions = sorted(abi.directions, key=lambda way: way is Direction.OUT)
    if new is None:
        directions.reverse()
    backwards = selector.reversed()
    for direction in directions:
        if direction is Direction.OUT:
            yield direction, selector, old and old[0], new and new[0]
        else:
            yield direction, backwards, old and _inbound(*old), new and _inbound(*new)


def _inbound(outbound: Assignment, given: Assignment | None) -> Assignment:
    """What comes back through the same tunnel.

    A peer sends what does not get smaller uncompressed, so IPComp is optional there (RFC 3173 section 2.2).
    """
    if given is not None:
        return given
    turned = outbound.reversed()
    if all(template.protocol != SAProtocol.IPCOMP for template in turned.templates):
        return turned
    templates = (
        replace(template, level=Level.USE) if template.protocol == SAProtocol.IPCOMP else template
        for template in turned.templates
    )
    spi, action, rank, priority = turned.spi, turned.action, turned.rank, turned.priority
    return Assignment(*templates, spi=spi, action=action, rank=rank, priority=priority)
