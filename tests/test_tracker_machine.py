"""The tracker as a state machine: random calls, faults, foreign changes, deaths and restarts, on every embedded system.

PFKEY_MACHINES says how many plays of each system, PFKEY_MACHINE_STEPS how many steps each; `.ci/long machine` plays a
million steps.  What must be true is in machine_checks.py.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from machine import Change, Play, Setup, playing
from machine_checks import settled

from pfkey import Kernel, Message, MessageType, PolicyTracker
from pfkey.embedded.profiles import PROFILE_NAMES
from pfkey.errors import PFKeyError
from pfkey.reading import Steps
from pfkey.tracker import Image, Installed, State, Step, decide

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
        self.now.will_die(after, delivered=delivered)

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
            settled(self.play)
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


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Everything goes wrong all the time: nobody wants to read it."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("profile", PROFILE_NAMES)
def test_the_tracker_keeps_its_promises(profile: str) -> None:
    run_state_machine_as_test(machine_of(profile), settings=how(MACHINES))  # type: ignore[no-untyped-call]


# The controls: what is wrong on purpose must be seen.


class Alone(Play):
    """One caller, so that what goes wrong goes wrong in the same way again."""

    def threads(self, lines: Sequence[Sequence[Change]]) -> None:
        """Not here."""


class BareOnTheSly(Alone):
    """A tracker that does not guard, where guards are expected."""

    def make_tracker(self, kernel: Kernel, **how: Any) -> PolicyTracker:
        return PolicyTracker(kernel, **how | {"guard": "bare"})


class TakesWhatItMeets(Alone):
    """A tracker that takes over what it was told to leave alone."""

    def make_tracker(self, kernel: Kernel, **how: Any) -> PolicyTracker:
        return PolicyTracker(kernel, **how | {"ownership": "take_over"})


class DeletesThenAdds(Alone):
    """What scripts around setkey(8) do instead of an update."""

    def make_tracker(self, kernel: Kernel, **how: Any) -> PolicyTracker:
        send = kernel.request_many

        def request_many(messages: Iterable[Message]) -> list[Message | PFKeyError]:
            replies = []
            for message in messages:
                if message.type == M.SPDUPDATE:
                    send([message.replace(type=M.SPDDELETE)])
                    message = message.replace(type=M.SPDADD)
                replies += send([message])
            return replies

        kernel.request_many = request_many  # type: ignore[method-assign]
        return PolicyTracker(kernel, **how)


def test_control_bare_updates_are_seen() -> None:
    fails("met no policy", "freebsd-13", BareOnTheSly)


def test_control_overwritten_policies_of_others_are_seen() -> None:
    with playing("linux", Setup(), TakesWhatItMeets) as play:
        play.stranger("add", 0, 0)
        with pytest.raises(AssertionError, match="somebody else's policy was taken out"):
            play.call("add", play.where(0), None, play.what(0))


def test_control_delete_then_add_is_seen() -> None:
    fails("met no policy|SPDDELETE, then SPDADD", "linux", DeletesThenAdds)


def test_control_needless_updates_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def always(desired: Image | None, installed: Installed) -> Step:
        step = decide(desired, installed)
        return Step.UPDATE if step is Step.NOTHING and installed.state is State.OURS else step

    monkeypatch.setattr("pfkey.settle.decide", always)
    monkeypatch.setattr("pfkey.tracking.change_of", lambda book, tracked, top: None)
    fails("the kernel held it already|was right already", "linux")


def test_control_guards_that_stay_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(book: object, works: object) -> Steps:
        yield from ()

    monkeypatch.setattr("pfkey.settle.drop_leftovers", nothing)
    monkeypatch.setattr("pfkey.guarding.drop_leftovers", nothing)
    fails("a guard is left|could not be deleted and would stay", "freebsd-13")


def test_control_lists_that_keep_what_was_refused_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pfkey.work.Work.take_back", lambda self: None)
    fails("the list of .* is .*, not", "linux")


def test_control_callers_that_wait_for_ever_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a policy that nobody lets go."""
    monkeypatch.setattr("machine_threads.PATIENCE", 2)
    with playing("linux", Setup()) as play:
        play.call("add", play.where(0), None, play.what(0))
        (tracked,) = play.book
        tracked.busy = object()
        with pytest.raises(AssertionError, match="wait for each other for ever"):
            play.threads([[Change("add", 0, 1, 0)], [Change("add", 1, 1, 0)]])


def fails(how_it_is_told: str, profile: str, play: type[Play] = Alone) -> None:
    with pytest.raises(AssertionError, match=how_it_is_told):
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            machine_of(profile, play), settings=how(400, phases=[Phase.generate], report_multiple_bugs=False)
        )
