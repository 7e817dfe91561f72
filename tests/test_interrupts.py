"""Ctrl-C at any moment of a tracker's calls: nothing stays held, no list loses an assignment, nothing is left bare."""

from __future__ import annotations

import contextlib
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from rig import ESP, IN, MOVED, OUT, REKEYED, Rig
from scenarios import SITE

from pfkey import PolicyTracker, Selector, overlaps, uses
from pfkey.tracker import State, TrackedPolicy

HOSTS = Selector("10.9.9.9", "10.8.8.8")
WEB = Selector("10.1.0.0/16", "10.2.0.0/16", protocol=6, destination_port=443)


class InterruptError(KeyboardInterrupt):
    """The one that a test sent."""


def _update(tracker: PolicyTracker) -> None:
    tracker.add(OUT, SITE, MOVED)


def _replace(tracker: PolicyTracker) -> None:
    tracker.replace(OUT, SITE, ESP, MOVED)


def _transaction(tracker: PolicyTracker) -> None:
    with tracker.transaction():
        tracker.replace(OUT, SITE, ESP, MOVED)
        tracker.add(OUT, WEB, MOVED)
        tracker.replace(OUT, HOSTS, ESP, MOVED)


def _tunnel(tracker: PolicyTracker) -> None:
    tracker.add_tunnel(WEB, ESP)


def _resync(tracker: PolicyTracker) -> None:
    tracker.resync()


def _query(tracker: PolicyTracker) -> None:
    tracker.query(OUT, SITE)


CALLS = (_update, _replace, _transaction, _tunnel, _resync, _query)


def still_works(tracker: PolicyTracker) -> None:
    """In another thread, which nobody keeps waiting."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            tracker.resync()
            for direction, selector in ((OUT, SITE), (OUT, WEB), (OUT, HOSTS), (IN, WEB.reversed())):
                tracker.add(direction, selector, REKEYED)
                tracker.remove(direction, selector, REKEYED)
            with tracker.transaction():
                tracker.add(OUT, SITE, REKEYED)
            tracker.remove(OUT, SITE, REKEYED)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "something is held for ever"
    assert errors == []


def interrupt_somewhere(call: Callable[[], object], seconds: float) -> BaseException | None:
    """Ctrl-C that comes so many seconds after the call began, or as soon as the embedded kernel is not at work."""

    over = False

    def raises(_: int, frame: FrameType | None) -> None:
        if over:
            return
        names = set()
        while frame is not None:
            names.add(frame.f_code.co_filename.rsplit("/pfkey/", 1)[-1])
            frame = frame.f_back
        if "tracking.py" in names and not any(name.startswith("embedded/") for name in names):
            raise InterruptError
        signal.setitimer(signal.ITIMER_REAL, 2e-5)

    before = signal.signal(signal.SIGALRM, raises)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        call()
    except InterruptError as error:
        return error
    finally:
        over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return None


@pytest.mark.parametrize("profile", ["linux", "freebsd-13"])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__.strip("_"))
def test_an_interrupt_at_any_moment_holds_nothing_and_loses_nothing(
    profile: str, call: Callable[[PolicyTracker], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = sys.unraisablehook

    def swallow(event: Any) -> None:
        """One that comes while a buffer is given back goes no further; the interpreter says so here."""
        if not isinstance(event.exc_value, InterruptError):
            hook(event)

    monkeypatch.setattr(sys, "unraisablehook", swallow)
    moments, hits, longest = random.Random(f"{profile} {call.__name__}"), 0, 3e-3
    for number in range(300):
        if number >= 25 and hits:  # how long a call takes, this machine says
            break
        rig = Rig(profile, owner="interrupted")
        for selector in (SITE, HOSTS):
            rig.tracker.add(OUT, selector, ESP)
        begun = time.monotonic()
        with rig.embedded.probe(OUT, SITE) as probe:
            # The error, and with it all that its traceback shows, lives on, as in a `finally` that cleans up.
            error = interrupt_somewhere(lambda rig=rig: call(rig.tracker), moments.uniform(1e-5, longest))  # type: ignore[misc]
            if error is None:
                longest = time.monotonic() - begun
            hits += error is not None
            assert rig.tracker.assignments(OUT, SITE) != ()
            assert rig.tracker.assignments(OUT, HOSTS) != ()
            still_works(rig.tracker)
        assert probe.bare == 0
        rig.agrees()
        rig.tracker.flush()
        assert rig.embedded.policies() == []
        del error
    assert hits


@pytest.mark.parametrize("profile", ["linux", "freebsd-13"])
def test_an_interrupt_between_a_run_and_those_who_wait_for_it_ends_the_run(
    profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(profile)
    rig.tracker.add(OUT, SITE, ESP)
    rig.tracker.add(OUT, HOSTS, ESP)
    tell, due = rig.tracker._tell_idle, [True]

    def interrupted() -> None:
        if due:
            due.clear()
            raise KeyboardInterrupt
        tell()

    monkeypatch.setattr(rig.tracker, "_tell_idle", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        rig.tracker.add(OUT, SITE, MOVED)
    still_works(rig.tracker)
    assert caught.value is not None
    rig.agrees()


@pytest.mark.parametrize("within", [False, True], ids=["a call", "a transaction"])
def test_an_interrupt_within_a_replacement_does_not_lose_the_old_assignment(
    within: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig("linux")
    rig.tracker.add(OUT, SITE, ESP)

    def interrupted(self: TrackedPolicy, assignment: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(TrackedPolicy, "insert", interrupted)
        with (
            pytest.raises(KeyboardInterrupt),
            rig.tracker.transaction() if within else contextlib.nullcontext(),
        ):
            rig.tracker.replace(OUT, SITE, ESP, MOVED)
    assert rig.tracker.assignments(OUT, SITE) == (ESP,)
    assert rig.tracker.resync() == ()
    rig.agrees()


def test_what_an_interrupt_met_after_a_list_of_a_transaction_was_changed_is_taken_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig("linux")
    rig.tracker.add(OUT, SITE, ESP)
    shift = uses.shift

    def interrupted(*what: Any) -> None:
        shift(*what)
        raise KeyboardInterrupt

    monkeypatch.setattr(uses, "shift", interrupted)
    with pytest.raises(KeyboardInterrupt), rig.tracker.transaction():
        rig.tracker.replace(OUT, SITE, ESP, MOVED)
    assert rig.tracker.assignments(OUT, SITE) == (ESP,)
    assert rig.tracker.resync() == ()
    rig.agrees()


@pytest.mark.parametrize("profile", ["linux", "netbsd"])
@pytest.mark.parametrize("what", ["_Table.add", "_Table.discard", "_Group.count"])
@pytest.mark.parametrize("after", range(4))
def test_an_interrupt_leaves_the_index_of_overlaps_usable(
    profile: str, what: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, left = Rig(profile), [after]
    for selector in (SITE, HOSTS, Selector("10.1.0.0/24", "10.2.0.0/16"), Selector("10.1.0.0/16", "10.2.0.0/24")):
        rig.tracker.add(OUT, selector, ESP)
    kind, _, name = what.partition(".")
    owner = getattr(overlaps, kind)
    step = getattr(owner, name)

    def interrupted(*arguments: Any) -> None:
        if left[0] == 0:
            left[0] = -1
            raise KeyboardInterrupt
        left[0] -= 1
        step(*arguments)

    monkeypatch.setattr(owner, name, interrupted)
    with contextlib.suppress(KeyboardInterrupt):
        rig.tracker.add(OUT, Selector("10.1.0.0/20", "10.2.0.0/20"), ESP)
        rig.tracker.flush()
    monkeypatch.undo()
    rig.tracker.resync()
    still_works(rig.tracker)
    rig.agrees()
    rig.tracker.flush()
    assert rig.embedded.policies() == []
    assert all(not index._groups for index in rig.tracker._tracking.book.indexes.values())


def interrupt_at(place: int, call: Callable[[], None]) -> bool:
    """Ctrl-C at one of the places where the interpreter looks for signals: a function begins, or one of C is back."""
    count = 0

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        if event in ("call", "c_return") and frame.f_code.co_filename.endswith(LISTS_AND_HOLDING):
            count += 1
            if count == place:
                sys.setprofile(None)
                raise InterruptError

    sys.setprofile(profile)
    try:
        call()
    except InterruptError:
        return True
    finally:
        sys.setprofile(None)
    return False


LISTS_AND_HOLDING = tuple(f"/pfkey/{name}.py" for name in ("book", "keeper", "tracker", "tracking", "uses"))


def _same(tracker: PolicyTracker) -> None:
    tracker.replace(OUT, SITE, ESP, ESP)


def _remove(tracker: PolicyTracker) -> None:
    tracker.remove(OUT, SITE, ESP)


@pytest.mark.parametrize("profile", ["linux", "freebsd-14"])
@pytest.mark.parametrize("call", [*CALLS, _same, _remove], ids=lambda call: call.__name__.strip("_"))
def test_an_interrupt_at_each_place_leaves_the_book_whole(profile: str, call: Callable[[PolicyTracker], None]) -> None:
    place, interrupted = 0, True
    while interrupted:
        place += 1
        rig = Rig(profile)
        for selector in (SITE, HOSTS):
            rig.tracker.add(OUT, selector, ESP)
        interrupted = interrupt_at(place, lambda rig=rig: call(rig.tracker))  # type: ignore[misc]
        tracking = rig.tracker._tracking
        book = tracking.book
        assert tracking.transactions == {}
        assert [str(tracked) for tracked in book if tracked.busy is not None] == []
        assert call is _remove or rig.tracker.assignments(OUT, SITE) != ()
        held = [tracked for tracked in book if tracked.installed.state is State.OURS]
        assert sum(book.standing.values()) == len(held)
        assert {number: one for number, one in book.ids.items() if one.installed.policy_id != number} == {}
        assert [one for one in book if book.ids.get(one.installed.policy_id, one) is not one] == []
    assert place > 20


def test_an_interrupt_in_a_transaction_within_another_takes_back_all_of_that_one() -> None:
    place, interrupted = 0, True
    while interrupted:
        place += 1
        rig = Rig("linux")
        rig.tracker.add(OUT, SITE, ESP)

        def within(rig: Rig = rig) -> None:
            with rig.tracker.transaction():
                rig.tracker.add(OUT, SITE, REKEYED)
                rig.tracker.add(OUT, WEB, REKEYED)

        with rig.tracker.transaction():
            rig.tracker.add(OUT, SITE, MOVED)
            interrupted = interrupt_at(place, within)
            if interrupted:
                assert rig.tracker.assignments(OUT, SITE) == (MOVED, ESP), place
                assert rig.tracker.assignments(OUT, WEB) == (), place
            held = [tracked.busy is not None for tracked in rig.tracker._tracking.book if len(tracked)]
            assert all(held), place
    assert place > 20
