"""What a tracker costs: rekeyings, new policies, a transaction, a resync; kernels that answer at once, or embedded."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pfkey import (
    Abi,
    Assignment,
    Direction,
    EmbeddedKernel,
    Message,
    Policy,
    PolicyTracker,
    Selector,
    Template,
    connect,
)

__all__ = ["adding", "filled", "rekeying", "resync", "sites", "transaction"]

OUT = Direction.OUT
TUNNEL = Template.tunnel("192.0.2.1", "198.51.100.1", reqid=1)
FIRST, SECOND = Assignment(TUNNEL, spi=0xC0000001), Assignment(TUNNEL, spi=0xC0000002)
SHAPES = ((24, 32), (24, 24), (26, 32), (32, 24), (28, 28))
"""Pairs of prefix lengths, in turn: an index of overlaps has a table for each pair of them."""


@dataclass
class NullKernel:
    """Acknowledges whatever it is told: what is left is the tracker's own time."""

    abi: Abi

    def check_policy(self, policy: Policy) -> None:
        pass

    def request_many(self, messages: Sequence[Message]) -> Sequence[Message]:
        return messages

    def dump_policies(self) -> list[Policy]:
        return []


def sites(count: int, first: int = 0) -> list[Selector]:
    """So many selectors that do not overlap, of several shapes."""
    made = []
    for number in range(first, first + count):
        source, destination = SHAPES[number % len(SHAPES)]
        here, there = 0x0A000000 + (number << 8 & 0xFFFFFF), 0xAC000000 + (number << 8 & 0x0FFFFFFF)
        made.append(Selector((here, source), (there, destination)))
    return made


def filled(count: int) -> tuple[PolicyTracker, list[Selector]]:
    """A tracker with so many policies of one assignment each."""
    tracker, selectors = PolicyTracker(NullKernel(Abi.linux())), sites(count)
    with tracker.transaction():
        for selector in selectors:
            tracker.add(OUT, selector, FIRST)
    return tracker, selectors


def rekeying(policies: int) -> Callable[[], Callable[[], object]]:
    """Add the new SA, remove the old one, for the next policy among so many; no kernel message is needed."""

    def prepare() -> Callable[[], object]:
        tracker, selectors = filled(policies)
        # Rekeyed once each, then back again, so that every policy always has exactly one assignment.
        turns = itertools.cycle(
            [*((one, FIRST, SECOND) for one in selectors), *((one, SECOND, FIRST) for one in selectors)]
        )

        def run() -> None:
            selector, old, new = next(turns)
            tracker.add(OUT, selector, new)
            tracker.remove(OUT, selector, old)

        return run

    return prepare


def adding(policies: int, more: int) -> Callable[[], Callable[[], object]]:
    """Add the next new policy to so many, which looks for overlapping ones of the same priority; `more` times."""

    def prepare() -> Callable[[], object]:
        tracker, _ = filled(policies)
        new = iter(sites(more, policies))
        # A wide one of another strength above all of them, so that there is something to look at.
        tracker.add(OUT, Selector("10.0.0.0/8", "172.16.0.0/12"), Assignment(TUNNEL, priority=5))
        return lambda: tracker.add(OUT, next(new), FIRST)

    return prepare


def transaction(policies: int) -> Callable[[], Callable[[], object]]:
    """Rekey all of them in one transaction: nothing changes for the kernel."""

    def prepare() -> Callable[[], object]:
        tracker, selectors = filled(policies)
        turns = itertools.cycle([(FIRST, SECOND), (SECOND, FIRST)])

        def run() -> None:
            old, new = next(turns)
            with tracker.transaction() as done:
                for selector in selectors:
                    tracker.add(OUT, selector, new)
                    tracker.remove(OUT, selector, old)
            if done.sent or len(done.changes) != policies:
                raise AssertionError("a message was sent")

        return run

    return prepare


def resync(policies: int) -> Callable[[], Callable[[], object]]:
    """Compare so many with an embedded kernel that has them all."""

    def prepare() -> Callable[[], object]:
        tracker, selectors = PolicyTracker(connect(EmbeddedKernel("linux").connect())), sites(policies)
        with tracker.transaction():
            for selector in selectors:
                tracker.add(OUT, selector, FIRST)

        def run() -> None:
            if tracker.resync():
                raise AssertionError("nothing differs")

        return run

    return prepare
