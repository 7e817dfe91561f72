"""Finds the tracked policies that match some of the same packets, through a hash table for each pair of prefix lengths.

Two prefixes share addresses when the longer one, cut to the shorter one's length, is the shorter one.  So the policies
with one pair of prefix lengths that overlap a selector lie under one key: both networks, cut to the shorter lengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .constants import UpperProtocol
from .messages import Selector
from .tracker import TrackedPolicy

__all__ = ["OverlapIndex", "overlap"]

_Shape = tuple[int, int, int]
"""IP version and the two prefix lengths."""


def overlap(one: Selector, other: Selector) -> bool:
    """Whether some packet belongs to both."""
    first, second = one.identity, other.identity
    if first[0] != second[0]:
        return False
    width = 32 if first[0] == 4 else 128
    for at in (1, 3):
        shift = width - min(first[at + 1], second[at + 1])
        if first[at] >> shift != second[at] >> shift:
            return False
    if first[5] != second[5] and UpperProtocol.ANY not in (first[5], second[5]):
        return False
    return all(not (mine and theirs and mine != theirs) for mine, theirs in zip(first[6:8], second[6:8], strict=True))


class _Table:
    """The policies with one pair of prefix lengths, under their networks cut to one pair of lengths."""

    __slots__ = ("_destination", "_source", "_width", "rows")

    def __init__(self, shape: _Shape, source: int, destination: int) -> None:
        self._width = 32 if shape[0] == 4 else 128
        self._source = self._width - source
        self._destination = self._width - destination
        self.rows: dict[int, TrackedPolicy | dict[TrackedPolicy, None]] = {}

    def key(self, selector: Selector) -> int:
        """Both networks in one number."""
        identity = selector.identity
        return (identity[1] >> self._source << self._width) | identity[3] >> self._destination

    def add(self, tracked: TrackedPolicy) -> None:
        """One more; a set (a dict, for its order) only where several share a key."""
        key = self.key(tracked.selector)
        there = self.rows.get(key)
        if there is None:
            self.rows[key] = tracked
        elif isinstance(there, dict):
            there[tracked] = None
        elif there is not tracked:
            self.rows[key] = {there: None, tracked: None}

    def discard(self, tracked: TrackedPolicy) -> None:
        """One less, if it is there."""
        key = self.key(tracked.selector)
        there = self.rows.get(key)
        if not isinstance(there, dict):
            if there is tracked:
                del self.rows[key]
            return
        there.pop(tracked, None)
        if len(there) == 1:
            self.rows[key] = next(iter(there))

    def find(self, selector: Selector) -> Iterable[TrackedPolicy]:
        """Those under the selector's key."""
        there = self.rows.get(self.key(selector))
        if there is None:
            return ()
        return there if isinstance(there, dict) else (there,)


class _Group:
    """All policies of one shape: one table under their own lengths, others as soon as somebody asks."""

    __slots__ = ("priorities", "shape", "tables")

    def __init__(self, shape: _Shape) -> None:
        self.shape = shape
        self.tables: dict[tuple[int, int], _Table] = {shape[1:]: _Table(shape, *shape[1:])}
        self.priorities: dict[int, int] = {}

    def table(self, source: int, destination: int) -> _Table:
        """The one whose keys are cut to these lengths, none of which is longer than the group's own."""
        table = self.tables.get((source, destination))
        if table is None:
            table = _Table(self.shape, source, destination)
            for tracked in self:
                table.add(tracked)
            self.tables[source, destination] = table  # whole, whatever interrupts this
        return table

    def __iter__(self) -> Iterator[TrackedPolicy]:
        for row in self.tables[self.shape[1:]].rows.values():
            yield from row if isinstance(row, dict) else (row,)

    def count(self, priority: int, by: int) -> None:
        """Count a priority up or down."""
        count = self.priorities.get(priority, 0) + by
        if count > 0:
            self.priorities[priority] = count
        else:
            self.priorities.pop(priority, None)


_CHANGING = -1
"""No priority: the policy is being put under another one."""


class OverlapIndex:
    """The tracked policies of one direction, by what they match and how strong they are."""

    __slots__ = ("_groups",)

    def __init__(self) -> None:
        self._groups: dict[_Shape, _Group] = {}

    def put(self, tracked: TrackedPolicy, priority: int | None) -> None:
        """Note the priority that a policy has from now on, None when it has gone.

        An interrupt (Ctrl-C) leaves it half done: the next call for the policy does it again.
        """
        before = tracked.indexed
        if before == priority:
            return
        shape = _shape(tracked.selector)
        group = self._groups.get(shape)
        if group is None:
            group = self._groups[shape] = _Group(shape)
        tracked.indexed = _CHANGING
        if before is None or before == _CHANGING:
            for table in group.tables.values():
                table.add(tracked)
        else:
            group.count(before, -1)
        if priority is None:
            for table in group.tables.values():
                table.discard(tracked)
            if not group.tables[shape[1:]].rows:
                del self._groups[shape]
        else:
            group.count(priority, 1)
        tracked.indexed = priority

    def equals(self, tracked: TrackedPolicy, priority: int) -> Iterator[TrackedPolicy]:
        """Other policies of this priority that match some of the same packets."""
        for group in self._groups.values():
            if priority in group.priorities:
                for other in self._overlapping(tracked, group):
                    if other.indexed == priority:
                        yield other

    def overlapping(self, tracked: TrackedPolicy) -> Iterator[TrackedPolicy]:
        """Other policies that match some of the same packets, whatever their priority."""
        for group in self._groups.values():
            yield from self._overlapping(tracked, group)

    def pair(self, tracked: TrackedPolicy) -> Iterator[TrackedPolicy]:
        """Other policies of the same two networks: the same chain of a Linux lookup."""
        group = self._groups.get(_shape(tracked.selector))
        if group is not None:
            for other in group.tables[group.shape[1:]].find(tracked.selector):
                if other is not tracked:
                    yield other

    def _overlapping(self, tracked: TrackedPolicy, group: _Group) -> Iterator[TrackedPolicy]:
        selector = tracked.selector
        version, source, destination = _shape(selector)
        if version != group.shape[0]:
            return
        table = group.table(min(source, group.shape[1]), min(destination, group.shape[2]))
        for other in table.find(selector):
            if other is not tracked and overlap(selector, other.selector):
                yield other


def _shape(selector: Selector) -> _Shape:
    identity = selector.identity
    return identity[0], identity[2], identity[4]
