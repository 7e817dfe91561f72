"""The first barrier of an update: whether it needs a guard, and seeing to it that the guard stands."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

from .abi import Abi
from .book import Book
from .constants import MessageType
from .errors import PFKeyError
from .guards import Guard, alias_selectors, filler_policies, guard_policies
from .messages import Policy
from .reading import ENTER, Ask, Steps, dump
from .tracker import Image, Step, image_text
from .typed import policy_from, policy_message
from .work import StoredOtherwise, Work, drop_leftovers, instead, say_more, standing_guards, uncertain, without

__all__ = ["plan_guard", "refuse_behind", "stand_guards"]

log = logging.getLogger("pfkey.keeper")


def plan_guard(book: Book, work: Work, beside: Iterable[Work] = ()) -> tuple[Policy, ...]:
    """The candidates for the guard that an update needs, none when it needs none; `why` is noted.

    `beside` are those of the same networks that are carried out with it.
    """
    tracked, settings, abi = work.tracked, book.settings, book.abi
    policy, image = work.policy, work.before.image
    assert policy is not None
    work.why = ""
    if settings.guard is Guard.BARE:
        return ()
    sole = False
    if abi.update_unlinks_first:
        work.why = f"{abi} removes a policy before it inserts the next one"
    elif abi.stronger_update_shows_none and image is not None and _passes_another(book, work, image, beside):
        work.why = "it gets stronger past another policy of the same addresses"
    elif abi.sole_update_shows_none and book.standing[int(tracked.direction)] <= 1:
        work.why = f"{abi} shows no policy for a moment when the only one of a direction is replaced"
        sole = True
    elif settings.guard is Guard.AUTO and not (book.may_be_rejected(work.image) and _has_alias(policy, abi)):
        return ()
    elif settings.guard is Guard.AUTO:
        work.why = f"{abi} removes a policy whose update it rejects, and has not stored such templates yet"
    else:
        work.why = "guards were asked for"
    how = settings.guard
    if not _has_alias(policy, abi):
        if settings.host_guard is Guard.BARE:
            return ()
        how = settings.host_guard if how is Guard.AUTO else how
        if sole and how is not Guard.DISCARD:
            return filler_policies(policy, abi, settings.owner)
    return guard_policies(policy, image, abi, how, settings.owner)


def _has_alias(policy: Policy, abi: Abi) -> bool:
    return next(alias_selectors(policy.selector, abi), None) is not None


def _passes_another(book: Book, work: Work, before: Image, beside: Iterable[Work]) -> bool:
    """Linux: whether the priority gets stronger past another policy of the same networks, where that is or will be."""
    assert work.policy is not None
    after = work.policy.priority
    if after >= before.priority:
        return False
    pair = book.indexes[int(work.tracked.direction)].pair(work.tracked)
    if any(other.indexed is not None and after <= other.indexed <= before.priority for other in pair):
        return True
    if any(
        one is not work and one.policy is not None and after <= one.policy.priority <= before.priority for one in beside
    ):
        return True
    return book.stranger_between(work.tracked, after, before.priority)


def stand_guards(book: Book, works: Sequence[Work]) -> Steps:
    """See to it that whatever needs a guard has one.

    A policy whose guard did not come to stand is not updated: what stands is better than nothing for a moment.
    """
    updates = [work for work in works if work.step is Step.UPDATE]
    if book.abi.stronger_update_shows_none and book.settings.guard is not Guard.BARE:
        yield from _look_for_strangers(book, updates)
    chains: dict[tuple[int, ...], list[Work]] = {}
    if book.abi.stronger_update_shows_none and len(works) > 1:
        for work in works:
            chains.setdefault(_chain(work), []).append(work)
    waiting = [(work, list(plan)) for work in updates if (plan := plan_guard(book, work, chains.get(_chain(work), ())))]
    stale = [work for work in updates if work.tracked.leftover]
    if not waiting and not stale:
        return
    yield ENTER
    if stale:
        yield from drop_leftovers(book, stale)
        for work in stale:
            _refuse_behind_stale(book, work)
    while waiting := [(work, candidates) for work, candidates in waiting if work.step is Step.UPDATE]:
        tries = []
        for work, candidates in waiting:
            guard = candidates.pop(0)
            work.tracked.leftover = (*work.tracked.leftover, guard)
            work.guards.append(MessageType.SPDADD)
            tries.append((work, guard, candidates))
        replies = yield Ask([policy_message(MessageType.SPDADD, guard, book.abi) for _, guard, _ in tries])
        waiting = []
        doubtful = [
            guard
            for (_, guard, _), reply in zip(tries, replies, strict=True)
            if isinstance(reply, PFKeyError) and uncertain(reply)
        ]
        standing = (yield from standing_guards(book, doubtful)) or []
        for (work, guard, candidates), reply in zip(tries, replies, strict=True):
            if guard in standing:
                continue  # FreeBSD says ENOBUFS after the work when a receive buffer is full, up to 11 anybody's
            if not isinstance(reply, PFKeyError):
                echo = policy_from(reply)
                confirmed = replace(guard, id=echo.id)
                instead(work.tracked, guard, confirmed)
                asked, stored = book.image(guard), book.image(echo)
                if stored != asked:
                    _stored_otherwise(book, work, asked, stored)
                continue
            if not uncertain(reply):
                without(work.tracked, guard)
                if isinstance(reply, FileExistsError) and candidates:
                    waiting.append((work, candidates))
                    continue
            _not_guarded(work, reply)


def _chain(work: Work) -> tuple[int, ...]:
    """What the policies have in common that one look-up of Linux walks along."""
    return (int(work.tracked.direction), *work.tracked.selector.identity[:5])


def _stored_otherwise(book: Book, work: Work, asked: Image, stored: Image) -> None:
    """The kernel would make the same of the policy itself; what stands is left alone, the guard goes."""
    text = f"{book.abi} stored {image_text(stored)} as a guard of {work.tracked}, not {image_text(asked)}"
    work.fail(StoredOtherwise(f"{text}; it was not updated and still is {image_text(work.before.image)}"))
    work.step = Step.NOTHING


def _not_guarded(work: Work, error: PFKeyError) -> None:
    stands = image_text(work.before.image)
    say_more(error, f"it was to guard an update ({work.why}); {work.tracked} was not updated and still is {stands}")
    work.fail(error)
    work.step = Step.NOTHING


def _refuse_behind_stale(book: Book, work: Work) -> None:
    """A former guard that would not go must not come to stand in front of what is new."""
    assert work.policy is not None
    for guard in work.tracked.leftover:
        if not book.abi.has_priority or guard.priority <= work.policy.priority:
            refuse_behind(work, guard, work.notes)
            return


def refuse_behind(work: Work, guard: Policy, notes: Iterable[str]) -> None:
    """What is new must not come to stand behind a guard of something else."""
    text = f"a guard of a former update ({guard.selector}) could not be deleted and would stay in front of it"
    work.is_behind = work.error is None
    work.fail(PFKeyError("; ".join([f"{work.tracked} was not updated: {text}", *notes])))
    work.step = Step.NOTHING


def _look_for_strangers(book: Book, works: Sequence[Work]) -> Steps:
    """Linux: policies of others may lie between the old priority and the new one; a step of one leaves no room."""
    book.forget_strangers()
    if not any(
        work.before.image is not None
        and work.policy is not None
        and work.before.image.priority - work.policy.priority > 1
        for work in works
    ):
        return
    try:
        rows = yield from dump(book)
    except (PFKeyError, OSError) as error:
        log.warning("other policies could not be read, so priorities that get stronger are guarded: %s", error)
        book.see_strangers(None)
    else:
        book.see_strangers(rows.numbers)
