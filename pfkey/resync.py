"""Compares what a tracker believes with what a kernel says, and puts right what differs."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .book import Book
from .constants import Direction
from .errors import PFKeyError
from .guards import Kind, read_tag
from .messages import Policy, Selector
from .reading import ENTER, Rows, Run, dump, is_entry, read
from .recovery import real_of, take_stock
from .settle import settle
from .tracker import Installed, State, TrackedPolicy, image_text
from .typed import PolicyRow
from .work import Change, Work

__all__ = ["Difference", "compare", "resync", "sweep"]

log = logging.getLogger("pfkey.keeper")


@dataclass(frozen=True, slots=True)
class Difference:
    """One policy that was not what the tracker believed: what it believed, what it found, and what it did."""

    direction: Direction
    selector: Selector
    believed: str
    found: str
    change: Change | None
    error: PFKeyError | None = None

    def __str__(self) -> str:
        done = f"not put right: {self.error}" if self.error else repr(self.change)
        return f"{self.direction.name.lower()} {self.selector}: believed {self.believed}, found {self.found}; {done}"


def resync(book: Book, everything: Sequence[TrackedPolicy], *, by_hand: bool) -> Run[tuple[Difference, ...]]:
    """Read the whole SPD once; every policy that is not what it should be goes through the table.

    One that is contested is left as it is, and told each time, unless somebody asks for this `by_hand`.
    """
    yield ENTER
    rows = yield from dump(book)
    rows = yield from take_stock(book, rows)
    before = {tracked: tracked.installed for tracked in everything}
    differing = yield from compare(book, everything, rows)
    works = [
        Work(tracked)
        for tracked in everything
        if tracked in differing
        or tracked.leftover
        or not (tracked.holds_top() or _lingers(tracked))
        or book.is_out_of_order(tracked)
    ]
    if by_hand:
        for tracked in everything:
            if tracked.troubles is not None:
                tracked.troubles.contested, tracked.troubles.strikes = False, []
    left = [work for work in works if _is_contested(work.tracked)]
    works = [work for work in works if not _is_contested(work.tracked)]
    found = {work.tracked: work.tracked.installed for work in (*works, *left)}
    if works:
        yield from settle(book, works)
    for work in left:
        work.error = PFKeyError(
            f"{work.tracked} is contested: somebody else keeps changing it, and it is left as it is until a call for"
            " it, or resync()"
        )
        log.error("%s; the kernel holds %s", work.error, _text(found[work.tracked]))
    return tuple(
        Difference(
            work.tracked.direction,
            work.tracked.selector,
            _text(before[work.tracked]),
            _text(found[work.tracked]),
            None if work.error else work.change,
            work.error,
        )
        for work in (*works, *left)
        if work.tracked in differing or work.sent or work.error
    )


def _lingers(tracked: TrackedPolicy) -> bool:
    return tracked.troubles is not None and tracked.troubles.lingers_until is not None


def _is_contested(tracked: TrackedPolicy) -> bool:
    return tracked.troubles is not None and tracked.troubles.contested


def _text(installed: Installed) -> str:
    if installed.state is State.UNKNOWN:
        return "something not certain"
    return ("somebody else's " if installed.state is State.FOREIGN else "") + image_text(installed.image)


def compare(book: Book, everything: Sequence[TrackedPolicy], rows: Rows) -> Run[set[TrackedPolicy]]:
    """Note what the rows of a dump say of each policy; which of them are not what was believed."""
    entries: dict[int, PolicyRow] = {}
    others: set[tuple[int, tuple[int, ...]]] = set()
    ids = book.ids
    for row in rows.numbers:
        tracked = ids.get(row.id)
        if tracked is not None and tracked.direction == row.direction and tracked.selector.identity == row.identity:
            entries[row.id] = row
        else:
            others.add((row.direction, row.identity))
    differing: set[TrackedPolicy] = set()
    doubtful: list[TrackedPolicy] = []
    for tracked in everything:
        installed = tracked.installed
        entry = entries.get(installed.policy_id) if installed.policy_id else None
        key = (int(tracked.direction), tracked.selector.identity)
        if (
            entry is not None
            and installed.state is State.OURS
            and book.row_image(entry, installed.image) is installed.image
        ):
            continue
        if entry is None and key not in others and installed.state is State.ABSENT:
            continue
        if installed.state is not State.UNKNOWN:
            book.note(tracked, installed.doubted())
        doubtful.append(tracked)
        differing.add(tracked)
    if doubtful:
        before = {tracked: tracked.installed for tracked in doubtful}
        unread = yield from read(book, doubtful)
        for tracked in doubtful:
            if tracked in unread:
                book.note(tracked, before[tracked])
    return differing


def sweep(book: Book, waiting: Collection[TrackedPolicy]) -> Run[list[TrackedPolicy]]:
    """Take in what carries this tracker's tag and is not tracked: nobody wants it, so the table deletes it.

    `waiting` are the policies that the caller wants.  Those that were taken in are returned.
    """
    yield ENTER
    rows = yield from dump(book)
    rows = yield from take_stock(book, rows, waiting)
    for tracked in waiting:
        book.remember(tracked, was_just_read=True)
    wanted: dict[TrackedPolicy, Policy] = {}
    for number in sorted(range(len(rows.numbers)), key=lambda number: rows.numbers[number].id):
        row = rows.numbers[number]
        tag = read_tag(row.lifetime_hard, book.abi)
        if tag is None or tag.owner != book.settings.owner or tag.kind is not Kind.POLICY:
            continue
        table = book.tables.get(row.direction)
        if table is None or (
            (known := table.get(row.identity)) is not None
            and known.installed.state is State.OURS
            and known.installed.policy_id == row.id
            and (len(known) or _lingers(known))
        ):
            continue
        policy = rows.policies[number]
        tracked = known if known is not None else book.open(Direction(row.direction), policy.selector)
        if is_entry(tracked, policy):
            wanted[tracked] = policy
    for tracked, policy in wanted.items():
        if not len(tracked):  # else somebody came to use it, and when that is refused it stays as it was
            book.keep(tracked)
        if tracked.installed.state in (State.ABSENT, State.UNKNOWN):
            book.read(tracked, policy)
    taken = list(wanted)
    for key, guards in list(book.orphans.items()):
        if any(book.is_mine(guard) for guard in guards):
            tracked = book.open(Direction(key[0]), real_of(guards[0], book.abi))
            book.keep(tracked)
            taken.append(tracked)
    return taken
