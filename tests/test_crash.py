"""A tracker dies at every message in turn, over embedded kernels that other processes share; its successor repairs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from crash import SCRIPT, WANTED, ConnectChannel, bare, live, standing, survive_every_death
from serving import served

from pfkey import EmbeddedKernel, Policy, PolicyTracker, connect
from pfkey.embedded.profiles import _PROFILES

pytest.importorskip("pfkey.recovery", reason="no tracker here knows its own policies again")

USUAL = ("linux-smp", "freebsd-13", "freebsd-14", "netbsd")
"""One of each kind: several CPUs, unlinking first, one policy alone, ordered by age."""
EVERYWHERE = os.environ.get("PFKEY_EVERY_DEATH", "0") not in ("", "0")


@pytest.mark.parametrize("profile", _PROFILES if EVERYWHERE else USUAL)
@pytest.mark.parametrize("before", [False, True] if EVERYWHERE else [False], ids=["after", "before"][: 1 + EVERYWHERE])
def test_a_death_at_any_message_leaves_no_gap(profile: str, before: bool, tmp_path: Path) -> None:
    """Before a message or after the one that it follows is the same to the kernel, so that one of them is enough."""

    @contextmanager
    def fresh() -> Iterator[ConnectChannel]:
        with served(profile, tmp_path / "kernel") as target:
            yield lambda: connect(target).channel

    assert survive_every_death(fresh, before=before) > 20


def test_a_gap_would_be_seen(tmp_path: Path) -> None:
    """The look at the moment of death finds a policy that somebody deletes."""
    with served("linux", tmp_path / "kernel") as target:
        assert not live(lambda: connect(target).channel, 1 << 30, before=False).killed
        with connect(target) as kernel:
            stands = standing(len(SCRIPT))
            assert len(stands) > 4
            assert bare(kernel, stands) == []
            for direction, selector in stands:
                kernel.delete_policy(Policy(direction, selector))
            assert set(bare(kernel, stands)) == stands


@pytest.mark.parametrize("profile", _PROFILES)
def test_what_is_dead_is_not_taken_for_alive(profile: str) -> None:
    """FreeBSD up to 11 lists deleted policies for seconds: a successor that is quick must not believe the list."""
    embedded = EmbeddedKernel(profile)
    site, assignment = WANTED[0]
    for _ in range(2):
        tracker = PolicyTracker(connect(embedded.connect()), owner="tests of crashes")
        tracker.add(*site, assignment)
        assert [policy.selector for policy in embedded.policies()] == [site[1]]
        tracker.remove(*site, assignment)
        assert embedded.policies() == []
