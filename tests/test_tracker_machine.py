"""The tracker as a state machine: random calls, faults, foreign changes, deaths and restarts, on every embedded system.

PFKEY_MACHINES says how many plays of each system, PFKEY_MACHINE_STEPS how many steps each; `.ci/long machine` plays a
million steps.  What must be true is in machine.py.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from machine import Change, Play, Setup

from pfkey import Assignment, Direction, Kernel, MessageType, PolicyTracker, Selector
from pfkey.embedded.profiles import PROFILE_NAMES

MACHINES = int(os.environ.get("PFKEY_MACHINES", "40"))
STEPS = int(os.environ.get("PFKEY_MACHINE_STEPS", "40"))
COUNTS: Counter[str] = Counter()

small = st.integers(0, 31)
changes = st.builds(Change, st.sampled_from(["add", "add", "remove", "replace"]), small, small, small)
setups = st.builds(
    Setup,
    owner=st.sampled_from([None, "the machine"]),
    ownership=st.sampled_from(["refuse", "refuse", "adopt", "take_over"]),
    guard=st.sampled_from(["auto", "auto", "auto", "alias", "discard", "bare"]),
    host_guard=st.sampled_from(["auto", "auto", "discard", "bare"]),
    linger=st.sampled_from([0.0, 0.0, 0.0, 3600.0]),
    crowds=st.booleans(),
)
M = MessageType
KINDS = [M.SPDADD, M.SPDADD, M.SPDUPDATE, M.SPDUPDATE, M.SPDDELETE, M.SPDDELETE, M.SPDGET, M.SPDDUMP, None]
WHENS: dict[str, tuple[str | None, ...]] = {
    # when -> errors that can be said then
    "before": ("ENOMEM", "EINVAL", "EEXIST", "ENOBUFS"),
    "send": ("EINVAL", "EPERM", "ENOBUFS"),
    "unlinked": ("ENOMEM", "EINVAL"),
    "after": ("ENOBUFS",),
    "ignored": (None,),
    "lost": (None,),
    "late": (None,),
    "overflow": (None,),
}
Fault = tuple[MessageType | None, str, str | None, int]
FAULTS = st.tuples(
    st.sampled_from(KINDS),
    st.sampled_from([(when, error) for when, errors in WHENS.items() for error in errors]),
    st.sampled_from([0, 0, 0, 1, 2]),
).map(lambda drawn: (drawn[0], *drawn[1], drawn[2]))


class Machine(RuleBasedStateMachine):
    """Hypothesis draws numbers; what they mean in the state that there is, the play knows."""

    profile = "linux"
    kind: type[Play] = Play
    play: Play | None = None
    is_well = True

    def __init__(self) -> None:
        super().__init__()
        COUNTS["plays"] += 1

    @initialize(setup=setups)
    def begin(self, setup: Setup) -> None:
        self.play = self.kind(self.profile, setup)

    @property
    def now(self) -> Play:
        self.is_well = False
        COUNTS["steps"] += 1
        COUNTS[self.profile] += 1
        assert self.play is not None
        return self.play

    @rule(where=small, what=small)
    def add(self, where: int, what: int) -> None:
        play = self.now
        play.call("add", play.where(where), None, play.what(what))

    @rule(where=small, what=small)
    def add_to_one_in_use(self, where: int, what: int) -> None:
        play = self.now
        play.call("add", play.busy(where), None, play.what(what))

    @rule(where=small, which=small)
    def remove(self, where: int, which: int) -> None:
        play = self.now
        place = play.busy(where)
        play.call("remove", place, play.which(play.model, place, which), None)

    @rule(where=small, which=small, what=small)
    def replace(self, where: int, which: int, what: int) -> None:
        play = self.now
        place = play.busy(where)
        play.call("replace", place, play.which(play.model, place, which), play.what(what))

    @rule(lines=st.lists(changes, min_size=1, max_size=6), sweep=st.booleans())
    def transaction(self, lines: list[Change], sweep: bool) -> None:
        self.now.transaction(lines, raises=None, sweep=sweep)

    @rule(lines=st.lists(changes, min_size=1, max_size=5), at=st.integers(0, 5))
    def transaction_that_raises(self, lines: list[Change], at: int) -> None:
        self.now.transaction(lines, raises=at, sweep=False)

    @rule(lines=st.lists(changes, min_size=2, max_size=8))
    def large_transaction(self, lines: list[Change]) -> None:
        self.now.transaction(lines, raises=None, sweep=False)

    @rule(what=st.integers(0, 6), remove=st.booleans())
    def tunnel(self, what: int, remove: bool) -> None:
        play = self.now
        play.tunnel(play.what(what), remove=remove)

    @rule(really=st.integers(0, 4))
    def flush(self, really: int) -> None:
        if not really:
            self.now.flush()

    @rule()
    def resync(self) -> None:
        self.now.resync()

    @rule(where=small)
    def look(self, where: int) -> None:
        play = self.now
        play.look(play.busy(where))

    @rule(fault=FAULTS)
    def fault(self, fault: Fault) -> None:
        self.now.fault(*fault)

    @rule(fault=FAULTS, another=FAULTS)
    def faults(self, fault: Fault, another: Fault) -> None:
        play = self.now
        play.fault(*fault)
        play.fault(*another)

    @rule(after=st.integers(0, 8))
    def interrupt(self, after: int) -> None:
        self.now.interrupt(after)

    @rule(after=st.integers(0, 8), delivered=st.booleans())
    def die(self, after: int, delivered: bool) -> None:
        play = self.now
        # Where the order of insertion counts, a successor also moves what the dead one left in the wrong order, which
        # the model takes for meddling: there test_recovery.py and test_crash.py play every death.
        if play.world.embedded.abi.has_priority:
            play.will_die(after, delivered=delivered)

    @rule(size=st.sampled_from([200, 400, 1200, 4000]), listener=st.booleans())
    def small_buffer(self, size: int, listener: bool) -> None:
        self.now.small_buffer(size, listener=listener)

    @rule()
    def lose_connection(self) -> None:
        self.now.lose_connection()

    @rule(seconds=st.sampled_from([1.0, 4.0]))
    def pass_time(self, seconds: float) -> None:
        self.now.pass_time(seconds)

    @rule(
        deed=st.sampled_from(["add", "add", "update", "delete", "alias", "flush"]), where=small, what=st.integers(0, 5)
    )
    def stranger(self, deed: str, where: int, what: int) -> None:
        self.now.stranger(deed, where, what)

    @rule(readd=st.integers(0, (1 << 16) - 1), sweep=st.booleans())
    def restart(self, readd: int, sweep: bool) -> None:
        self.now.restart(readd=readd, sweep=sweep)

    @rule(lines=st.lists(st.lists(changes, min_size=1, max_size=4), min_size=2, max_size=3))
    def threads(self, lines: list[list[Change]]) -> None:
        self.now.threads(lines)

    @rule()
    def settle(self) -> None:
        self.now.settle()

    @invariant()
    def goes_on(self) -> None:
        self.is_well = True

    def teardown(self) -> None:
        if self.play is None:
            return
        try:
            if not self.is_well:  # something failed, and that is what is to be told
                return
            self.play.settle()
            self.play.flush()
            self.play.check_settled()
            COUNTS["looks"] += self.play.world.counts["looks"]
        finally:
            self.play.end()


def machine_of(profile: str, play: type[Play] = Play) -> type[Machine]:
    return type(f"Machine on {profile}", (Machine,), {"profile": profile, "kind": play})


def how(plays: int, **more: Any) -> settings:
    return settings(
        max_examples=plays,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
        **{"derandomize": True, "phases": [Phase.generate, Phase.shrink]} | more,
    )


@pytest.mark.parametrize("profile", PROFILE_NAMES)
def test_the_tracker_keeps_its_promises(profile: str) -> None:
    run_state_machine_as_test(machine_of(profile), settings=how(MACHINES))  # type: ignore[no-untyped-call]


# The controls: trackers that break a promise are caught.


class Unguarded(Play):
    """Its updates are bare, although nobody chose that."""

    def make_tracker(self, kernel: Kernel, **how: Any) -> PolicyTracker:
        return PolicyTracker(kernel, **how | {"guard": "bare"})


class DeletingTracker(PolicyTracker):
    """Deletes a policy and adds it again, as scripts do."""

    def replace(self, direction: Direction, selector: Selector, old: Assignment, new: Assignment) -> Any:
        super().remove(direction, selector, old)
        return super().add(direction, selector, new)


class Deleting(Play):
    def make_tracker(self, kernel: Kernel, **how: Any) -> PolicyTracker:
        return DeletingTracker(kernel, **how)


@pytest.mark.parametrize(
    ("profile", "play"),
    [("freebsd-13", Unguarded), ("netbsd", Unguarded), ("linux", Deleting), ("freebsd-14", Deleting)],
)
def test_control_a_tracker_that_breaks_a_promise_is_caught(profile: str, play: type[Play]) -> None:
    with pytest.raises((AssertionError, BaseExceptionGroup)):
        run_state_machine_as_test(machine_of(profile, play), settings=how(200, phases=[Phase.generate]))  # type: ignore[no-untyped-call]
