"""After a crash: finds the guards that a dead process left, and promotes or deletes them.

A guard is never just deleted: one whose policy is not there holds its place, so the policy is added first.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from weakref import WeakSet

from .book import Book, Ownership
from .constants import MessageType
from .errors import KernelError, PFKeyError
from .guards import Kind, read_tag, real_selector, tag_lifetime
from .messages import Policy
from .tracker import Installed, State
from .typed import policy_message
from .work import Ask, Dump, Steps, uncertain

__all__ = ["AT_WORK", "recover"]

log = logging.getLogger("pfkey.keeper")

AT_WORK: WeakSet[Book] = WeakSet()
"""The books of this process over which something is being carried out: their guards are not left behind."""

_Key = tuple[int, tuple[int, ...]]


def recover(book: Book) -> Steps:
    """Read all policies once: note what is ours from a former life, and see to guards that nobody looks after."""
    try:
        rows = yield Dump()
    except (PFKeyError, OSError) as error:
        log.warning("the kernel was not searched for guards of a former process: %s", error)
        return
    book.recovered = True
    yield from see_to_guards(book, rows)
    note_former(book, rows)


def note_former(book: Book, rows: Sequence[Policy]) -> None:
    """What stands in the kernel already and makes a difference: what carries our name, and what may be adopted."""
    adopting = book.settings.ownership is not Ownership.REFUSE
    if not (adopting or book.settings.named):
        return
    for row in sorted(rows, key=lambda row: row.id):
        tag = read_tag(row.lifetime_hard, book.abi)
        mine = tag is not None and tag.owner == book.settings.owner
        if (tag is not None and tag.kind is not Kind.POLICY) or not (mine or adopting):
            continue
        if (row.selector.source, row.selector.destination) != (
            (canonical := row.selector.canonical()).source,
            canonical.destination,
        ):
            continue
        image = book.image(row)
        state = State.OURS if mine else State.FOREIGN
        book.former[int(row.direction), row.selector.identity] = Installed(state, image, row.id, was_ours=mine)


def see_to_guards(book: Book, rows: Sequence[Policy]) -> Steps:
    """Promote those whose policy is missing, then delete them; a discard guard without its policy stays."""
    entries = {(int(row.direction), row.selector.identity) for row in rows if _is_real(book, row)}
    alive = {
        (int(guard.direction), guard.selector)
        for other in AT_WORK
        if other is not book
        for tracked in other
        for guard in tracked.leftover
    }
    known = {(int(guard.direction), guard.selector) for tracked in book for guard in tracked.leftover}
    guards: list[tuple[Policy, Policy | None]] = []
    for row in rows:
        tag = read_tag(row.lifetime_hard, book.abi)
        if tag is None or tag.kind is Kind.POLICY or (int(row.direction), row.selector) in alive | known:
            continue
        selector = real_selector(row.selector, tag.kind)
        key = (int(row.direction), selector.identity)
        if tag.kind is Kind.FILLER or key in entries:
            guards.append((row, None))
        elif tag.kind is Kind.DISCARD:
            log.warning("%s stands in for a policy that is not there: it stays until that is added", row)
            book.orphans.setdefault(key, []).append(row)
        else:
            lifetime = tag_lifetime(tag.owner, Kind.POLICY, book.abi)
            guards.append((row, replace(row, selector=selector, lifetime_hard=lifetime, id=0, lifetime_current=None)))
    if not guards:
        return
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
    going = []
    for guard, missing in guards:
        if missing is not None and (where := (int(missing.direction), missing.selector.identity)) in failed:
            book.orphans.setdefault(where, []).append(guard)
        else:
            going.append(guard)
    yield from _delete(book, going)


def _delete(book: Book, guards: Sequence[Policy]) -> Steps:
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


def _is_real(book: Book, row: Policy) -> bool:
    tag = read_tag(row.lifetime_hard, book.abi)
    if tag is not None and tag.kind is not Kind.POLICY:
        return False
    canonical = row.selector.canonical()
    return (row.selector.source, row.selector.destination) == (canonical.source, canonical.destination)
