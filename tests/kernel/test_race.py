"""Whether a packet slips through while a policy changes on a Linux with several CPUs: this host's, over NETLINK_XFRM.

Skipped where it cannot be had; .ci/long plays it at length (benchmarks/leak_race.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from pfkey import Action, Assignment, Change, Kernel, MessageType, PolicyTracker

from .race import (
    BETWEEN,
    OUT,
    SITE,
    STRONG,
    WAYS,
    WEAK,
    Race,
    between,
    grace_period,
    missing_race,
    race,
)

CHANGES = int(os.environ.get("PFKEY_RACE_CHANGES", "100"))
PATIENCE = 50
"""A race that must be seen to be lost is run so many times over, for a machine that is busy with something else."""


@pytest.fixture(autouse=True)
def _possible() -> None:
    reason = missing_race()
    if reason:
        pytest.skip(reason)


def leaks_until_seen(running: Race) -> int:
    for _ in range(PATIENCE):
        leaked, _tries = running.run(CHANGES)
        if leaked:
            return leaked
    return 0


@pytest.mark.parametrize("way", [name for name, way in WAYS.items() if way.leaks])
def test_control_what_leaks_is_seen_to_leak(way: str) -> None:
    with race(WAYS[way].start) as running:
        assert leaks_until_seen(running) > 0


@pytest.mark.parametrize("way", [name for name, way in WAYS.items() if not way.leaks])
def test_no_packet_leaks(way: str) -> None:
    if way == "raise-guarded":
        try:
            grace_period()
        except OSError as error:
            pytest.skip(f"nothing here tells when a grace period has passed: {error}")
    with race(WAYS[way].start) as running:
        leaked, tries = running.run(CHANGES)
    assert (leaked, tries > 0) == (0, True)


def tracked(changes: list[Change]) -> Callable[[Kernel], Callable[[], None]]:
    """A tracker whose policy gets stronger, past others that it tracks too, and weaker again."""

    def start(kernel: Kernel) -> Callable[[], None]:
        tracker = PolicyTracker(kernel)
        weak, strong = (Assignment(action=Action.DISCARD, priority=priority) for priority in (WEAK, STRONG))
        tracker.add(OUT, SITE, weak)
        for selector in between():
            tracker.add(OUT, selector, Assignment(action=Action.NONE, priority=BETWEEN))

        def change() -> None:
            changes.append(tracker.add(OUT, SITE, strong))
            tracker.remove(OUT, SITE, strong)

        return change

    return start


def test_the_tracker_makes_a_policy_stronger_past_others() -> None:
    """What is asserted depends on what the tracker says it did.

    An update that it guarded leaks nothing.  One that it sent bare (an empty Change.guard) is the race of the control:
    then this asserts that it was one update and nothing else, and that the leak which a guard is for is there to see.
    """
    changes: list[Change] = []
    with race(tracked(changes)) as running:
        leaked, tries = running.run(CHANGES)
        assert {change.sent for change in changes} == {(MessageType.SPDUPDATE,)}
        assert tries > 0
        guards = {change.guard for change in changes}
        assert len(guards) == 1, "the same change is guarded always or never"
        if guards != {()}:
            assert leaked == 0
        else:
            assert leaked or leaks_until_seen(running)
