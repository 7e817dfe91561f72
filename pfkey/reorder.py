"""Kernels that order policies by insertion (FreeBSD up to 10, NetBSD, macOS): moving what must come after what.

There an SPDUPDATE moves a policy to the end of the list, under a new id, so that ids tell the order.  A weaker policy
that matches some of the same packets has to follow it, by an update of its own, and must not be met in between: while
the stronger one is replaced, its alias stands at the end of the list, behind the weaker one.  So the weaker is moved
behind that alias first, and once more behind the policy afterwards:

    [P Q]  ->  [P Q P' Q']  ->  [P P' Q' Q]  ->  [P' Q' Q P]  ->  [P' Q' P Q]  ->  [P Q]

The one that stands last goes first, whatever it is: where Q is to become stronger than P, the old Q that still stands
behind P would be met while P is replaced.

    [P Q]  ->  [P Q Q' P']  ->  [P Q' P' Q]  ->  [Q' P' Q P]  ->  [Q P]

One message at a time: whichever fails, everything in the list stands behind what is stronger, or behind that one's
guard, which stays until the order is right; or it stands where it stood.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from .book import Book
from .guarding import refuse_behind, stand_guards
from .reading import Ask, Run, Steps, policy_of
from .tracker import State, Step, TrackedPolicy
from .work import Work, by_rank, drop_leftovers, say_more, start, take

__all__ = ["in_place", "left_beside", "moves", "needs_order", "reorder", "tidy"]

T = TypeVar("T")

_INSTALLS = (Step.ADD, Step.UPDATE)


def tidy(book: Book, works: Sequence[Work], beside: list[Work]) -> Steps:
    """End a move that failed, before there is another: put what stands in order, so that its guards can go.

    What this takes is put to `beside`.  What would have to come to stand behind a guard that stays is refused.
    """
    standing = [Work(work.tracked, claimed=work.claimed) for work in works]
    movers = moves(book, [*standing, *beside])
    if movers:
        yield from reorder(book, movers)
    for mover in movers:
        mover.step = Step.NOTHING
    beside += movers
    helpers = [*standing, *beside]
    yield from drop_leftovers(book, helpers)
    for helper, work in zip(standing, works, strict=True):
        work.guards += helper.guards
        work.notes += [note for note in helper.notes if note not in work.notes]
    stays = {
        helper.tracked: helper.tracked.leftover[0]
        for helper in helpers
        if helper.tracked.leftover and helper.tracked.installed.state in (State.OURS, State.UNKNOWN)
    }
    for work in works:
        if stays and work.step is Step.UPDATE:
            near = (work.tracked, *book.indexes[int(work.tracked.direction)].overlapping(work.tracked))
            guard = next((stays[tracked] for tracked in near if tracked in stays), None)
            if guard is not None:
                notes = dict.fromkeys(note for helper in helpers for note in helper.notes)
                refuse_behind(work, guard, [*notes, *(str(mover.error) for mover in movers if mover.error is not None)])


def left_beside(book: Book, works: Iterable[Work]) -> list[Work]:
    """The policies beside `works` that still have guards of a move that failed."""
    known = {work.tracked for work in works}
    found: list[Work] = []
    queue = list(known)
    while queue:
        tracked = queue.pop()
        for other in book.indexes[int(tracked.direction)].overlapping(tracked):
            if other.leftover and other not in known:
                known.add(other)
                queue.append(other)
                found.append(Work(other, mover=True))
    return found


def moves(book: Book, works: Iterable[Work]) -> list[Work]:
    """The policies beside `works` that have to be moved, as works of their own."""
    moving = {work.tracked for work in works if work.step in _INSTALLS}
    queue = [work.tracked for work in works if work.step in _INSTALLS or work.step is Step.NOTHING]
    movers: list[Work] = []
    while queue:
        tracked = queue.pop()
        for other in book.indexes[int(tracked.direction)].overlapping(tracked):
            for weaker, stronger in ((other, tracked), (tracked, other)):
                if weaker in moving or not _must_follow(weaker, stronger, stronger in moving):
                    continue
                moving.add(weaker)
                queue.append(weaker)
                image = weaker.installed.image
                policy = policy_of(weaker, image)
                assert policy is not None
                mover = Work(weaker, mover=True, step=Step.UPDATE, image=image, before=weaker.installed)
                mover.policy = book.tagged(policy)
                movers.append(mover)
    return movers


def _must_follow(weaker: TrackedPolicy, stronger: TrackedPolicy, moves: bool) -> bool:
    """Whether one has to be put behind the other, which `moves` to the end or stays where it is."""
    if weaker.installed.state is not State.OURS or weaker.installed.image is None or stronger.rank is None:
        return False
    stands = stronger.installed.state is State.OURS
    if weaker.rank is None:  # it goes: until then it may be met where it was met before
        return moves and stands and weaker.installed.policy_id > stronger.installed.policy_id
    if weaker.rank <= stronger.rank:
        return False
    return moves or (stands and weaker.installed.policy_id < stronger.installed.policy_id)


def needs_order(book: Book, works: Sequence[Work]) -> bool:
    """Whether one of these would be met in place of a stronger one that is replaced with it."""
    known = {work.tracked: work for work in works}
    for work in works:
        for other in book.indexes[int(work.tracked.direction)].overlapping(work.tracked):
            weaker = known.get(other)
            if weaker is not None and weaker.step is Step.UPDATE and by_rank(weaker) > by_rank(work):
                return True
    return False


def reorder(book: Book, works: Sequence[Work]) -> Steps:
    """Install these so that every one comes to stand before the weaker ones; the guards stay for now."""
    ordered = sorted(works, key=by_rank)
    present = [work for work in ordered if work.step is Step.UPDATE]
    for work in present:  # one by one: the guards' own order matters
        if work.mover and work.tracked.leftover and all(guard.id for guard in work.tracked.leftover):
            continue  # of a move that failed: it stands where it has to, as the kernel said
        yield from stand_guards(book, [work])
        if work.step is not Step.UPDATE:
            _give_up(ordered, work)
            return
    first = sorted(present, key=lambda work: work.tracked.installed.policy_id, reverse=True) if len(present) > 1 else []
    for work in [*first, *ordered[in_place(ordered, first) :]]:
        if not (yield from _put(book, work)):
            _give_up(ordered, work)
            return


def in_place(ordered: Sequence[T], moved: Sequence[T]) -> int:
    """How many of the first in `ordered` stand one after the other when these have been moved to the end, in turn."""
    places = {id(one): at for at, one in enumerate(moved)}
    last = -1
    for count, one in enumerate(ordered):
        at = places.get(id(one), -1)
        if at <= last:
            return count
        last = at
    return len(ordered)


def _put(book: Book, work: Work) -> Run[bool]:
    """Send one; whether it stands now."""
    (reply,) = yield Ask([start(book, work)])
    take(book, work, reply)
    return work.tracked.installed.state is State.OURS


def _give_up(works: Sequence[Work], failed: Work) -> None:
    """What was not sent yet stays where it is, in front; for the next round when nothing went wrong but a guess."""
    error = failed.error
    unsent = [work for work in works if not work.mover and work is not failed and not work.sent]
    if error is None:  # the selector was taken: that is read first
        for work in works:
            work.postponed = work in unsent
            if work is not failed:
                work.step = Step.NOTHING
        return
    if unsent:
        names = ", ".join(str(work.tracked) for work in unsent)
        say_more(error, f"it was to come behind {names}, which was left as it is")
    for work in works:
        if work in unsent:
            work.fail(error)
        if work is not failed:
            work.step = Step.NOTHING
