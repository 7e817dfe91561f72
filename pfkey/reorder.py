"""Kernels that order policies by insertion (FreeBSD up to 10, NetBSD, macOS): moving what must come after what.

There an SPDUPDATE moves a policy to the end of the list.  A weaker policy that matches some of the same packets has to
follow it, by an update of its own, and must not be met in between: while the stronger one is replaced, its alias stands
at the end of the list, behind the weaker one.  So the weaker one is moved behind that alias first, and once more behind
the policy afterwards:

    [P Q]  ->  [P Q P' Q']  ->  [P P' Q' Q]  ->  [P' Q' Q P]  ->  [P' Q' P Q]  ->  [P Q]
"""

from __future__ import annotations

from collections.abc import Sequence

from .book import Book
from .guarding import stand_guards
from .tracker import State, Step
from .work import Ask, Run, Steps, Work, drop_leftovers, policy_of, start, take

__all__ = ["by_rank", "moves", "reorder"]


def by_rank(work: Work) -> int:
    """The order that policies ought to have."""
    rank = work.tracked.rank
    return 0xFFFFFFFF if rank is None else rank


def moves(book: Book, works: Sequence[Work]) -> list[Work]:
    """The policies beside `works` that have to be moved behind them, as works of their own."""
    known = {work.tracked for work in works}
    movers: list[Work] = []
    queue = list(works)
    while queue:
        work = queue.pop()
        rank = by_rank(work)
        for other in book.indexes[int(work.tracked.direction)].overlapping(work.tracked):
            theirs = other.rank
            if other in known or theirs is None or theirs <= rank or other.installed.state is not State.OURS:
                continue
            known.add(other)
            image = other.installed.image
            policy = policy_of(other, image)
            assert policy is not None
            mover = Work(other, mover=True, step=Step.UPDATE, image=image, before=other.installed)
            mover.policy = book.tagged(policy)
            movers.append(mover)
            queue.append(mover)
    return movers


def needs_order(book: Book, works: Sequence[Work]) -> bool:
    """Whether one of these would be met in place of a stronger one that is replaced with it."""
    known = {work.tracked: work for work in works}
    for work in works:
        for other in book.indexes[int(work.tracked.direction)].overlapping(work.tracked):
            weaker = known.get(other)
            if weaker is not None and weaker.step is Step.UPDATE and by_rank(weaker) > by_rank(work):
                return True
    return False


def reorder(book: Book, works: Sequence[Work]) -> Run[bool]:
    """Install these so that every one comes to stand before the weaker ones; whether all of it was done.

    What fails on the way leaves guards that stand in the right order.
    """
    ordered = sorted(works, key=by_rank)
    present = [work for work in ordered if work.step is Step.UPDATE]
    for work in present:  # one by one: the guards' own order matters
        yield from stand_guards(book, [work])
        if work.step is not Step.UPDATE:
            _give_up(ordered, work)
            return False
    if len(present) > 1:
        yield from _send(book, list(reversed(present)))
        if any(work.tracked.installed.state is not State.OURS for work in present):
            return False
    first = ordered[0] if len(present) > 1 and ordered[0].step is Step.UPDATE else None
    yield from _send(book, [work for work in ordered if work is not first])
    if any(work.tracked.installed.state is not State.OURS for work in ordered):
        return False
    yield from drop_leftovers(book, reversed(ordered))
    return True


def _send(book: Book, works: Sequence[Work]) -> Steps:
    messages = [start(book, work) for work in works]
    replies = yield Ask(messages)
    for work, reply in zip(works, replies, strict=True):
        take(book, work, reply)


def _give_up(works: Sequence[Work], failed: Work) -> None:
    """Nothing was moved yet: what could not be guarded stops the rest."""
    assert failed.error is not None
    for work in works:
        if work.error is None and not work.mover:
            work.fail(failed.error)
        work.step = Step.NOTHING
