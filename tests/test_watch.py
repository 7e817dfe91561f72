"""Following the kernel's broadcasts: healed within one event, no fight for ever, and nothing missed for long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from pfkey import (
    Action,
    Assignment,
    Direction,
    EmbeddedKernel,
    ForeignPolicy,
    Kernel,
    KernelError,
    MessageType,
    Policy,
    PolicyTracker,
    Selector,
    Template,
    connect,
)
from pfkey.embedded.profiles import PROFILE_NAMES
from pfkey.tracker import image_of_policy

OUT = Direction.OUT
SITE, OTHER_SITE = Selector("10.1.0.0/16", "10.2.0.0/16"), Selector("10.3.0.0/16", "10.4.0.0/16")
X = Assignment(Template.tunnel("192.0.2.1", "198.51.100.1", reqid=1), spi=1)
MOVED = Assignment(Template.tunnel("192.0.2.1", "198.51.100.9", reqid=1), spi=2)
ADD, UPD, DEL = MessageType.SPDADD, MessageType.SPDUPDATE, MessageType.SPDDELETE


class Rig:
    """A kernel, a tracker that has two policies, and somebody else."""

    def __init__(self, profile: str, *, second: bool) -> None:
        self.embedded = EmbeddedKernel(profile)
        channel = self.embedded.connect()
        self.events = self.embedded.connect() if second else channel
        self.kernel = connect(channel, events=self.events if second else None, timeout=2)
        self.other = connect(self.embedded.connect(), timeout=2)
        self.tracker = PolicyTracker(self.kernel)
        for selector in (SITE, OTHER_SITE):
            self.tracker.add(OUT, selector, X)

    def held(self, selector: Selector = SITE) -> Policy | None:
        found = [one for one in self.embedded.policies(OUT) if one.selector == selector]
        return found[-1] if found else None

    def theirs(self, selector: Selector = SITE) -> Policy:
        """A policy that they put in our place."""
        return Policy(OUT, selector, Action.DISCARD, priority=7 if self.kernel.abi.has_priority else 0)

    def is_right(self, selector: Selector = SITE, assignment: Assignment = X) -> bool:
        held = self.held(selector)
        tracked = self.tracker._tracking.book.get(OUT, selector)
        assert tracked is not None
        return held is not None and image_of_policy(held, self.kernel.abi) == tracked.image(assignment)


@pytest.fixture(params=PROFILE_NAMES)
def profile(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[False, True], ids=["shared channel", "channel for events"])
def rig(request: pytest.FixtureRequest, profile: str) -> Iterator[Rig]:
    rig = Rig(profile, second=request.param)
    yield rig
    rig.kernel.close()
    rig.other.close()


def until(condition: Callable[[], bool]) -> bool:
    """Whether it comes true before long."""
    deadline = time.monotonic() + 20
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def test_a_foreign_update_is_healed_within_one_event(rig: Rig) -> None:
    with rig.tracker.watch() as watch:
        rig.other.update_policy(rig.theirs())
        assert until(lambda: len(watch.healings) == 1)
        assert rig.is_right()
        (healing,) = watch.healings
        assert (healing.policy, healing.error, healing.contested) == (f"out {SITE}", None, False)
        assert "SPDUPDATE by process" in healing.event
        assert "discard" in healing.found
        assert healing.sent.count(UPD) == 1
        assert watch.resyncs == 0


def test_a_foreign_deletion_is_healed_within_one_event(rig: Rig) -> None:
    with rig.tracker.watch() as watch:
        rig.other.delete_policy(Policy(OUT, SITE))
        assert until(lambda: len(watch.healings) == 1)
        assert rig.is_right()
        assert watch.healings[0].sent == (ADD,)


def test_a_flush_is_healed_by_a_comparison(rig: Rig) -> None:
    with rig.tracker.watch() as watch:
        rig.other.flush_policies()
        assert until(lambda: watch.resyncs == 1)
        assert rig.is_right()
        assert rig.is_right(OTHER_SITE)
        assert {str(difference.selector) for difference in watch.differences} == {str(SITE), str(OTHER_SITE)}


def test_what_others_do_to_other_policies_is_nothing_to_us(rig: Rig) -> None:
    theirs = Policy(OUT, Selector("10.7.0.0/16", "10.8.0.0/16"), Action.DISCARD)
    with rig.tracker.watch() as watch:
        rig.other.add_policy(theirs)
        alias = Policy(OUT, Selector("10.1.0.0/16", "10.2.0.77/16"), Action.DISCARD, priority=theirs.priority)
        rig.other.add_policy(alias)  # the same packets, but another policy
        rig.tracker.replace(OUT, SITE, X, MOVED)
        rig.other.update_policy(rig.theirs(OTHER_SITE))
        assert until(lambda: len(watch.healings) == 1)
        assert watch.healings[0].policy == f"out {OTHER_SITE}"
    assert rig.held(theirs.selector) is not None
    assert rig.held(alias.selector) is not None


def test_after_the_third_foreign_change_it_stops_and_says_so(rig: Rig) -> None:
    with rig.tracker.watch() as watch:
        for count in range(1, 4):
            rig.other.update_policy(rig.theirs())
            assert until(lambda count=count: len(watch.healings) == count)  # type: ignore[misc]
        assert [healing.contested for healing in watch.healings] == [False, False, True]
        assert not rig.is_right()
        explanation = rig.tracker.explain(OUT, SITE)
        assert "contested" in explanation.reason
        assert UPD in explanation.would_send
        rig.other.update_policy(rig.theirs(OTHER_SITE))
        assert until(lambda: len(watch.healings) == 4), "others are still healed"
        assert rig.is_right(OTHER_SITE)
    change = rig.tracker.add(OUT, SITE, MOVED)
    assert change.sent == (UPD,), "a call says what is wanted"
    assert "contested" in change.reason
    assert rig.is_right(SITE, MOVED)
    rig.tracker.resync()
    assert "contested" not in rig.tracker.explain(OUT, SITE).reason


def test_what_is_contested_is_told_again_whenever_all_are_compared(rig: Rig) -> None:
    """It may protect nothing: one line of a log long ago is not enough."""
    with rig.tracker.watch() as watch:
        for count in range(1, 4):
            rig.other.update_policy(rig.theirs())
            assert until(lambda count=count: len(watch.healings) == count)  # type: ignore[misc]
        assert str(watch.healings[2]).endswith("contested: it is left as it is")
        rig.other.flush_policies()
        assert until(lambda: watch.resyncs == 1)
        (told,) = [one for one in watch.differences if one.selector == SITE]
        assert (told.found, told.change) == ("nothing", None)
        assert "contested" in str(told.error)
        assert rig.is_right(OTHER_SITE)
        assert rig.held(SITE) is None
    rig.tracker.resync()
    assert rig.is_right()


def test_slow_changes_are_healed_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pfkey.watch.CONTESTED_SECONDS", 0.0)
    rig = Rig("linux", second=False)
    with rig.tracker.watch() as watch:
        for count in range(1, 8):
            rig.other.update_policy(rig.theirs())
            assert until(lambda count=count: len(watch.healings) == count)  # type: ignore[misc]
        assert not any(healing.contested for healing in watch.healings)
        assert rig.is_right()


def test_somebody_who_is_faster_keeps_what_is_theirs() -> None:
    """Ours is deleted and theirs added before we hear of either: theirs is left alone, and the watch says so."""
    rig = Rig("linux", second=False)
    rig.other.delete_policy(Policy(OUT, SITE))
    rig.other.add_policy(rig.theirs())
    with rig.tracker.watch() as watch:
        assert rig.tracker.resync()[0].error is not None
        assert rig.held() is not None
        assert rig.held().action == Action.DISCARD  # type: ignore[union-attr]
        assert watch.error is None


def test_lost_events_lead_to_a_comparison(rig: Rig) -> None:
    """The socket overflows with others' broadcasts; the one that mattered is among the lost."""
    with rig.tracker.watch() as watch:
        rig.events.dropped += 1
        entry = next(one for one in rig.embedded.spd if str(one.policy(0).selector) == str(SITE))
        rig.embedded.spd.unlink(entry)  # in silence
        rig.other.update_policy(rig.theirs(OTHER_SITE))  # something that is heard
        assert until(lambda: watch.resyncs >= 1)
        assert until(rig.is_right)


def test_silent_expiry_is_found_out_in_time(profile: str) -> None:
    rig = Rig(profile, second=False)
    with rig.tracker.watch(interval=0.05) as watch:
        entry = next(one for one in rig.embedded.spd if str(one.policy(0).selector) == str(SITE))
        rig.embedded.spd.unlink(entry)
        assert until(rig.is_right)
        assert until(lambda: any(str(one.selector) == str(SITE) for one in watch.differences))


def test_our_own_broadcasts_are_missed_when_they_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full event socket of a kernel that says nothing: the broadcast of our own change is lost with others'."""
    monkeypatch.setattr("pfkey.watch._QUIET", 0.05)
    rig = Rig("freebsd-13", second=True)
    events = rig.events
    queue = type(events).queue
    deaf = threading.Event()

    def lose(channel: Any, message: bytes, **how: Any) -> bool:
        return True if channel is events and deaf.is_set() else queue(channel, message, **how)

    monkeypatch.setattr(type(events), "queue", lose)
    with rig.tracker.watch() as watch:
        rig.tracker.replace(OUT, SITE, X, MOVED)
        deaf.set()
        rig.other.update_policy(rig.theirs(OTHER_SITE))
        time.sleep(0.2)
        assert watch.resyncs == 0, "nothing tells yet"
        rig.tracker.replace(OUT, SITE, MOVED, X)
        deaf.clear()
        assert until(lambda: watch.resyncs == 1)
        assert rig.is_right(OTHER_SITE)
        time.sleep(0.3)
        assert watch.resyncs == 1, "once is enough"


def test_stop_ends_it_and_a_closed_connection_is_told(rig: Rig) -> None:
    watch = rig.tracker.watch()
    assert watch.running
    watch.stop()
    assert not watch.running
    assert watch.error is None
    rig.other.update_policy(rig.theirs())
    assert watch.healings == []
    watch = rig.tracker.watch()
    rig.kernel.close()
    assert until(lambda: not watch.running)
    assert watch.error is not None


@contextmanager
def done_all_the_same() -> Iterator[None]:
    """Old systems say ENOBUFS after the work when anybody's receive buffer is full."""
    try:
        yield
    except KernelError as error:
        if not error.outcome_unknown:
            raise


def test_calls_go_on_while_it_watches(rig: Rig) -> None:
    """Changes of ours and of others at once; in the end the kernel holds what the calls said."""
    stop = threading.Event()

    def interfere(kernel: Kernel) -> None:
        while not stop.is_set():
            with done_all_the_same():
                kernel.update_policy(rig.theirs(OTHER_SITE))
            time.sleep(0.02)

    thread = threading.Thread(target=interfere, args=(rig.other,))
    with rig.tracker.watch() as watch:
        thread.start()
        now, then = X, MOVED
        for _ in range(30):
            with done_all_the_same():
                rig.tracker.replace(OUT, SITE, now, then)
            now, then = then, now
        stop.set()
        thread.join()
        assert watch.error is None
    if any(isinstance(difference.error, ForeignPolicy) for difference in rig.tracker.resync()):
        # They were there before us for a moment: then it is theirs, until they give it up.
        with done_all_the_same():
            rig.other.delete_policy(Policy(OUT, OTHER_SITE))
        rig.tracker.resync()
    assert rig.is_right()
    assert rig.is_right(OTHER_SITE)
    rig.embedded.advance(10)
    assert len(rig.embedded.policies()) == 2


def test_a_kernel_without_events_is_refused() -> None:
    class Mute:
        abi = connect("embedded:linux").abi

    from pfkey import NotSupported

    with pytest.raises(NotSupported, match="no events"):
        PolicyTracker(Mute()).watch()  # type: ignore[arg-type]


def test_replacing_in_the_middle_is_no_strike(rig: Rig) -> None:
    """Our own changes are not counted as somebody else's, whoever hears of them when."""
    with rig.tracker.watch() as watch:
        now, then = X, MOVED
        for _ in range(20):
            rig.tracker.replace(OUT, SITE, now, then)
            now, then = then, now
        policy = rig.held(OTHER_SITE)
        assert policy is not None
        rig.other.update_policy(replace(policy, id=0, lifetime_current=None, scope=0))  # the same: no change at all
        rig.other.update_policy(rig.theirs(OTHER_SITE))
        assert until(lambda: any(one.policy == f"out {OTHER_SITE}" for one in watch.healings))
        assert not any(one.policy == f"out {SITE}" for one in watch.healings)
