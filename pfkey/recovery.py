"""After a crash: finds the guards that a dead process left, and promotes or deletes them.

A guard is never just deleted: one whose policy is not there holds its place, so the policy is added first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from weakref import WeakSet

from .abi import Abi
from .book import Book, Ownership
from .constants import MessageType
from .errors import DumpOverflow, KernelError, PFKeyError, ReplyTimeout
from .guards import Kind, Tag, read_tag, real_selector, tag_lifetime
from .messages import Policy, Selector
from .overlaps import overlap
from .reading import GRACE, Ask, Rows, Run, Steps, dump, get
from .reorder import in_place
from .tracker import Installed, State, TrackedPolicy
from .typed import PolicyRow, policy_from, policy_message
from .work import uncertain

__all__ = ["AT_WORK", "real_of", "recover", "take_stock"]

log = logging.getLogger("pfkey.keeper")

AT_WORK: WeakSet[Book] = WeakSet()
"""The books of this process over which something is being carried out: their guards are not left behind."""

_Key = tuple[int, tuple[int, ...]]
_PATIENCE = 60.0
"""Seconds before the policies are read again in search of a former life, when that takes its time to fail."""
_WITHOUT_SCOPES = 8
"""How long the identity of a selector without scopes is."""


def recover(book: Book, waiting: Collection[TrackedPolicy]) -> Steps:
    """Read all policies once: note what is ours from a former life, and see to guards that nobody looks after.

    `waiting` are those policies that are tracked already and ask for it.
    """
    try:
        rows = yield from dump(book)
    except (PFKeyError, OSError) as error:
        log.warning("the kernel was not searched for guards of a former process: %s", error)
        if isinstance(error, DumpOverflow | ReplyTimeout):
            book.recover_after = time.monotonic() + _PATIENCE  # each attempt is waited for: not at every call
        return
    yield from take_stock(book, rows, waiting)


def take_stock(book: Book, rows: Rows, waiting: Collection[TrackedPolicy] = ()) -> Run[Rows]:
    """Look through all policies that there are: for guards that were left behind, and for what is ours.

    What there is then is returned, read again when it was changed.
    """
    book.recovered = True
    try:
        if (yield from see_to_guards(book, rows)):
            try:
                rows = yield from dump(book)
            except (PFKeyError, OSError) as error:
                log.warning("policies of a former process are not known: %s", error)
                return rows
        _note_former(book, rows, waiting)
    except BaseException:  # Ctrl-C, a cancelled task: nobody knows how far it came
        book.recovered = False
        raise
    return rows


def _note_former(book: Book, rows: Rows, waiting: Collection[TrackedPolicy]) -> None:
    """What stands in the kernel already and makes a difference: what carries our name, and what may be adopted.

    What is tracked is known better: it is noted for nobody, or it would be believed once more when all that is over.
    """
    book.former.clear()
    adopting = book.settings.ownership is not Ownership.REFUSE
    if not (adopting or book.settings.named):
        return
    for row in sorted(rows.numbers, key=lambda row: row.id):
        tag = read_tag(row.lifetime_hard, book.abi)
        mine = tag is not None and tag.owner == book.settings.owner
        if not _is_real(row, tag) or not (mine or adopting):
            continue
        tracked = book.tables.get(row.direction, {}).get(row.identity)
        if tracked is not None and tracked not in waiting:
            continue
        state = State.OURS if mine else State.FOREIGN
        book.former[row.direction, row.identity] = Installed(state, book.row_image(row), row.id, was_ours=mine)


def see_to_guards(book: Book, rows: Rows) -> Run[bool]:
    """Promote those whose policy is missing, then delete them; a discard guard without its policy stays.

    Whether there were any, so that the rows are old.
    """
    book.orphans.clear()  # they are in the rows
    tags = [read_tag(row.lifetime_hard, book.abi) for row in rows.numbers]
    if all(tag is None or tag.kind is Kind.POLICY for tag in tags):
        return False
    standing = yield from _standing(book, rows, tags)
    alive = {
        (int(guard.direction), guard.selector)
        for other in AT_WORK
        if other is not book
        for tracked in other
        for guard in tracked.leftover
    }
    known = {(int(guard.direction), guard.selector) for tracked in book for guard in tracked.leftover}
    guards: list[tuple[Policy, Policy | None]] = []
    for number, tag in enumerate(tags):
        if tag is None or tag.kind is Kind.POLICY:
            continue
        row = rows.policies[number]
        if (int(row.direction), row.selector) in alive | known:
            continue
        selector = real_selector(row.selector, tag.kind)
        key = (int(row.direction), selector.identity)
        if tag.kind is Kind.FILLER or key in standing:
            guards.append((row, None))
        elif tag.kind is not Kind.ALIAS:
            log.warning("%s stands in for a policy that is not there: it stays until that is added", row)
            book.orphans.setdefault(key, []).append(row)
        else:
            lifetime = tag_lifetime(tag.owner, Kind.POLICY, book.abi)
            guards.append((row, replace(row, selector=selector, lifetime_hard=lifetime, id=0, lifetime_current=None)))
    if not guards:
        return False
    promoted = [real for _, real in guards if real is not None]
    for real in promoted:
        log.warning("%s is missing from the kernel, its guard is there: it is added from that", real)
    failed: set[_Key] = set()
    if promoted:
        replies = yield Ask([policy_message(MessageType.SPDADD, real, book.abi) for real in promoted])
        for real, reply in zip(promoted, replies, strict=True):
            if isinstance(reply, PFKeyError) and not isinstance(reply, FileExistsError):
                failed.add((int(real.direction), real.selector.identity))
                log.warning("%s could not be added, its guard stays: %s", real, reply)
            elif not isinstance(reply, PFKeyError):
                standing[int(real.direction), real.selector.identity] = policy_from(reply)
    going = []
    for guard, missing in guards:
        if missing is not None and (where := (int(missing.direction), missing.selector.identity)) in failed:
            book.orphans.setdefault(where, []).append(guard)
        else:
            going.append(guard)
    if book.abi.has_priority:
        yield from _delete(book, going)
    elif not failed and (yield from _put_in_order(book, going, standing)):
        for guard in sorted(going, key=lambda guard: guard.id, reverse=True):  # each holds the place of those behind it
            if book.recovered:
                yield from _delete(book, [guard])
    else:
        book.recovered = False
    return True


def _put_in_order(book: Book, guards: Sequence[Policy], standing: dict[_Key, Policy]) -> Run[bool]:
    """On a kernel that orders by insertion: whether the policies of a move stand in the order of their guards now.

    Those guards were made strongest first, and stand in front of whatever the move has put to the end of the list.  As
    long as it has put nothing there, all is as it was before it.  Afterwards what was to change has to change, for the
    order is that of what the guards show: the old one, put in front of a policy that was stronger than it, would be met
    in place of that.
    """
    pairs = [
        (guard, policy)
        for guard in sorted(guards, key=lambda guard: guard.id)
        if (policy := standing.get((int(guard.direction), real_of(guard, book.abi).identity))) is not None
    ]
    waiting = sorted((pair for pair in pairs if pair[1].id < pair[0].id), key=lambda pair: -pair[1].id)
    if len(waiting) == len(pairs) or all(
        stronger.id < weaker.id or not overlap(stronger.selector, weaker.selector)
        for at, (_, stronger) in enumerate(pairs)
        for _, weaker in pairs[at + 1 :]
        if stronger.direction == weaker.direction
    ):
        return True
    there = sorted((pair for pair in pairs if pair not in waiting), key=lambda pair: pair[1].id)
    for guard, policy in [*waiting, *pairs[in_place(pairs, [*there, *waiting]) :]]:
        log.warning("%s is put behind what is stronger, which a former process did not come to do", policy)
        again = replace(policy, id=0, lifetime_current=None)
        tag = read_tag(guard.lifetime_hard, book.abi)
        if tag is not None and tag.kind is Kind.ALIAS and policy.id < guard.id:
            again = replace(again, action=guard.action, templates=guard.templates)
        tracked = book.get(int(policy.direction), policy.selector)
        if tracked is not None and tracked.installed.policy_id == policy.id:
            book.note(tracked, tracked.installed.doubted())  # it gets another id
        (reply,) = yield Ask([policy_message(MessageType.SPDUPDATE, again, book.abi)])
        if isinstance(reply, PFKeyError):
            log.warning("it could not be, and the guards stay: %s", reply)
            return False
    return True


def _standing(book: Book, rows: Rows, tags: Sequence[Tag | None]) -> Run[dict[_Key, Policy]]:
    """What has a policy that packets of the main table meet; entries with marks are not known to SPDGET (Linux)."""
    wanted = {
        (row.direction, real_selector(rows.policies[at].selector, tag.kind).identity)
        for at, (row, tag) in enumerate(zip(rows.numbers, tags, strict=True))
        if tag is not None and tag.kind not in (Kind.POLICY, Kind.FILLER)
    }
    entries = [
        ((row.direction, row.identity), row.id)
        for row, tag in zip(rows.numbers, tags, strict=True)
        if _is_real(row, tag) and (row.direction, row.identity) in wanted
    ]
    found = yield from get(book, [policy_id for _, policy_id in entries])
    return {key: policy for (key, _), policy in zip(entries, found, strict=True) if isinstance(policy, Policy)}


def real_of(guard: Policy, abi: Abi) -> Selector:
    """The selector that a tagged guard stands in for."""
    tag = read_tag(guard.lifetime_hard, abi)
    return real_selector(guard.selector, tag.kind if tag is not None else Kind.ALIAS)


def _delete(book: Book, guards: Sequence[Policy]) -> Steps:
    if not guards:
        return
    if book.abi.stronger_update_shows_none:
        yield GRACE
    bare = [Policy(guard.direction, guard.selector, guard.action) for guard in guards]
    replies = yield Ask([policy_message(MessageType.SPDDELETE, one, book.abi) for one in bare])
    for guard, reply in zip(guards, replies, strict=True):
        if not isinstance(reply, PFKeyError):
            log.info("the guard %s of a former process was deleted", guard)
            continue
        gone = isinstance(reply, KernelError) and not uncertain(reply) and reply.name == book.abi.absent_policy_error
        if not gone:
            log.warning("the guard %s of a former process could not be deleted: %s", guard, reply)
            book.recovered = False


def _is_real(row: PolicyRow, tag: Tag | None) -> bool:
    """No guard, and of a selector that a tracker would use; one with scopes shows no host bits here."""
    return (tag is None or tag.kind is Kind.POLICY) and (row.is_plain or len(row.identity) > _WITHOUT_SCOPES)
