"""Whose policies are whose: refuse, adopt, take over; what a named owner finds again; what a sweep takes away."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Sequence

import pytest
from faulty import interrupts, rejects, spoils
from rig import ALL, BSD, DROP, ESP, IN, LINUX, MOVED, OUT, UNLINK_FIRST, Rig
from scenarios import ADD, DEL, UPD

from pfkey import (
    Action,
    Assignment,
    Change,
    ForeignPolicy,
    MessageType,
    PFKeyError,
    Policy,
    Rank,
    Selector,
    TransactionError,
)
from pfkey.guards import Kind, Tag, owner_number, read_tag
from pfkey.tracker import priority_of

SITE = Selector("10.1.0.0/16", "10.2.0.0/16")
SITES = [Selector(f"10.{number}.0.0/16", "192.168.0.0/16") for number in range(1, 6)]


def theirs(rig: Rig, selector: Selector = SITE, assignment: Assignment = DROP) -> Policy:
    """A policy that somebody else made: what `assignment` asks for, without our tag."""
    priority = priority_of(selector, Rank.REGULAR) if rig.abi.has_priority else 0
    return rig.other.add_policy(Policy(OUT, selector, assignment.action, assignment.templates, priority))


@pytest.mark.parametrize("profile", ALL)
def test_refuse_says_what_is_there_and_leaves_it_alone(profile: str) -> None:
    rig = Rig(profile)
    policy = theirs(rig)
    with pytest.raises(ForeignPolicy) as raised:
        rig.tracker.add(OUT, SITE, ESP)
    assert str(raised.value).startswith(f"out {SITE} belongs to somebody else (the kernel holds discard, priority ")
    assert "Delete it first if it is not needed, use another selector, or let the tracker adopt it" in str(raised.value)
    assert raised.value.policy.id == policy.id
    assert [kind for kind, _ in rig.told()] == [ADD], "an SPDADD of something that is there changes nothing"
    assert len(rig.tracker) == 0
    rig.tracker.flush()
    assert [one.id for one in rig.entries()] == [policy.id]


@pytest.mark.parametrize("profile", ALL)
def test_adopt_sends_nothing_for_what_is_right_already(profile: str) -> None:
    rig = Rig(profile, ownership="adopt")
    policy = theirs(rig, assignment=ESP)
    change = rig.tracker.add(OUT, SITE, ESP)
    assert change.sent == ()
    assert "it was somebody else's" in change.reason
    assert rig.told() == []
    assert [one.id for one in rig.entries()] == [policy.id]
    assert rig.tracker.remove(OUT, SITE, ESP).sent == (DEL,), "it is ours now"
    assert rig.entries() == []


@pytest.mark.parametrize("profile", ALL)
def test_adopt_updates_what_is_not_right(profile: str) -> None:
    rig = Rig(profile, ownership="adopt")
    theirs(rig)
    with rig.embedded.probe(OUT, SITE) as probe:
        change = rig.tracker.add(OUT, SITE, ESP)
    assert change.sent == (UPD,)
    assert change.guard == (() if rig.abi.name == "linux" else (ADD, DEL))
    assert probe.bare == 0
    rig.agrees()


@pytest.mark.parametrize("profile", ALL)
def test_take_over_updates_in_any_case_and_leaves_our_tag(profile: str) -> None:
    rig = Rig(profile, ownership="take_over", owner="us")
    theirs(rig, assignment=ESP)
    assert rig.tracker.add(OUT, SITE, ESP).sent == (UPD,)
    (policy,) = rig.entries()
    assert read_tag(policy.lifetime_hard, rig.abi) == Tag(owner_number("us"), Kind.POLICY)
    assert rig.tracker.add(OUT, SITE, ESP).sent == ()


@pytest.mark.parametrize("ownership", ["adopt", "take_over"])
@pytest.mark.parametrize("profile", ALL)
def test_what_appears_later_is_adopted_too(profile: str, ownership: str) -> None:
    rig = Rig(profile, ownership=ownership)
    rig.tracker.add(OUT, SITES[0], ESP)
    theirs(rig)
    assert rig.tracker.add(OUT, SITE, ESP).sent == (UPD,)
    rig.agrees()


@pytest.mark.parametrize("ownership", ["adopt", "take_over"])
@pytest.mark.parametrize("profile", ALL)
def test_what_could_not_be_adopted_stays_theirs(profile: str, ownership: str) -> None:
    rig = Rig(profile, ownership=ownership)
    theirs(rig)
    rig.fault(UPD, rejects("ENOMEM"))
    with pytest.raises(PFKeyError, match="ENOMEM"):
        rig.tracker.add(OUT, SITE, ESP)
    assert len(rig.tracker) == 0
    rig.tracker.flush()
    (policy,) = rig.entries()
    assert policy.action == Action.DISCARD
    assert rig.guards() == []


@pytest.mark.parametrize("profile", BSD)
def test_what_a_rejected_adoption_removed_is_put_back_as_theirs(profile: str) -> None:
    rig = Rig(profile, ownership="adopt")
    theirs(rig)
    rig.embedded.fail_next(UPD, "ENOBUFS", "unlinked")
    with rig.embedded.probe(OUT, SITE) as probe, pytest.raises(PFKeyError, match="it has been put back"):
        rig.tracker.add(OUT, SITE, ESP)
    assert probe.bare == 0
    rig.tracker.flush()
    (policy,) = rig.entries()
    assert policy.action == Action.DISCARD
    assert policy.lifetime_hard is None
    assert len(rig.tracker) == 0


@pytest.mark.parametrize("profile", UNLINK_FIRST)
def test_an_adoption_whose_guard_is_refused_leaves_it_theirs(profile: str) -> None:
    rig = Rig(profile, ownership="adopt")
    theirs(rig)
    rig.tracker.add(OUT, SITES[1], ESP)
    rig.fault(ADD, spoils)
    with pytest.raises(PFKeyError):
        rig.tracker.add(OUT, SITE, ESP)
    rig.tracker.flush()
    (policy,) = rig.entries()
    assert policy.action == Action.DISCARD


@pytest.mark.parametrize("profile", LINUX)
def test_what_replaced_ours_is_theirs(profile: str) -> None:
    """An update keeps the id on Linux, so another id is another policy; on the BSDs nobody can tell, and it is ours."""
    rig = Rig(profile)
    rig.tracker.add(OUT, SITE, ESP)
    rig.other.flush_policies()
    policy = theirs(rig)
    (difference,) = rig.tracker.resync()
    assert isinstance(difference.error, ForeignPolicy)
    assert difference.found.startswith("somebody else's discard")
    assert [one.id for one in rig.entries()] == [policy.id], "refused, not overwritten"
    with pytest.raises(PFKeyError):
        rig.tracker.add(OUT, SITE, MOVED)
    rig.tracker.flush()
    assert [one.id for one in rig.entries()] == [policy.id]


# A named owner.


@pytest.mark.parametrize("profile", ALL)
def test_a_named_owner_finds_its_own_after_a_restart_without_a_message(profile: str) -> None:
    rig = Rig(profile, owner="us")
    for selector in SITES:
        rig.tracker.add(OUT, selector, ESP)
    tracker = rig.restart(owner="us")
    for selector in SITES[:3]:
        assert tracker.add(OUT, selector, ESP).sent == ()
    assert rig.told() == []
    assert tracker.add(OUT, SITES[3], MOVED).sent == (UPD,)
    assert tracker.remove(OUT, SITES[0], ESP).sent == (DEL,)
    assert {policy.selector for policy in rig.entries()} == set(SITES[1:])


@pytest.mark.parametrize("profile", ALL)
def test_what_was_seen_at_the_start_is_read_again_before_it_is_believed(profile: str) -> None:
    rig = Rig(profile, owner="us")
    for selector in SITES[:3]:
        rig.tracker.add(OUT, selector, ESP)
    tracker = rig.restart(owner="us")
    tracker.add(OUT, SITES[4], ESP)
    rig.other.flush_policies()
    assert tracker.add(OUT, SITES[0], ESP).sent == (ADD,)
    if not rig.abi.update_changes_id:
        theirs(rig, SITES[1])
        with pytest.raises(ForeignPolicy):
            tracker.add(OUT, SITES[1], ESP)
    assert rig.held(SITES[0]) is not None


@pytest.mark.parametrize("first", ["resync", "transaction"])
@pytest.mark.parametrize("profile", ALL)
def test_whatever_call_comes_first_finds_them(profile: str, first: str) -> None:
    rig = Rig(profile, owner="us")
    for selector in SITES[:3]:
        rig.tracker.add(OUT, selector, ESP)
    tracker = rig.restart(owner="us")
    if first == "resync":
        assert tracker.resync() == ()
        assert tracker.add(OUT, SITES[0], ESP).sent == ()
    else:
        with tracker.transaction():
            for selector in SITES[:3]:
                tracker.add(OUT, selector, ESP)
    assert rig.told() == []


@pytest.mark.parametrize("profile", ALL)
def test_an_unnamed_owner_does_not_take_anothers_for_its_own(profile: str) -> None:
    for owner in (None, "them"):
        rig = Rig(profile, owner="us")
        rig.tracker.add(OUT, SITE, ESP)
        with pytest.raises(ForeignPolicy):
            rig.restart(owner=owner).add(OUT, SITE, ESP)
        assert rig.held(SITE) is not None


# Mark and sweep.


@pytest.mark.parametrize("profile", ALL)
def test_a_sweep_takes_what_is_ours_and_was_not_wanted(profile: str) -> None:
    rig = Rig(profile, owner="us")
    for selector in SITES:
        rig.tracker.add(OUT, selector, ESP)
    rig.tracker.add(IN, SITE, ESP)
    foreign = theirs(rig, Selector("10.77.0.0/16", "10.78.0.0/16"))
    rig.restart(owner="them").add(OUT, Selector("10.88.0.0/16", "10.78.0.0/16"), ESP)
    tracker = rig.restart(owner="us")
    probes = [rig.embedded.probe(OUT, selector) for selector in SITES[:3]]
    for probe in probes:
        probe.arm()
    with tracker.transaction(sweep=True) as transaction:
        for selector in SITES[:2]:
            tracker.add(OUT, selector, ESP)
        tracker.add(OUT, SITES[2], MOVED)
    kinds = [kind for kind, _ in rig.told()]
    assert sorted(kind.name for kind in kinds if kind is not UPD) == sorted(
        ["SPDDELETE"] * 3 + [kind.name for kind in transaction.changes[OUT, SITES[2]].guard]
    )
    assert kinds.count(UPD) == 1
    assert transaction.changes[OUT, SITES[0]].sent == ()
    assert transaction.changes[OUT, SITES[2]].sent == (UPD,)
    assert transaction.changes[OUT, SITES[4]].sent == (DEL,)
    assert transaction.changes[IN, SITE].sent == (DEL,)
    assert sorted(transaction.sent) == sorted(kinds)
    assert [probe.bare for probe in probes] == [0] * 3
    assert rig.other.get_policy(foreign.id).action == Action.DISCARD
    assert len(rig.entries()) == 5
    assert rig.entries(IN) == []
    assert set(tracker.policies()) == {(OUT, selector) for selector in SITES[:3]}


@pytest.mark.parametrize("profile", ALL)
def test_a_sweep_of_what_is_all_right_sends_nothing(profile: str) -> None:
    rig = Rig(profile, owner="us")
    for selector in SITES:
        rig.tracker.add(OUT, selector, ESP)
    tracker = rig.restart(owner="us")
    with tracker.transaction(sweep=True) as transaction:
        for selector in SITES:
            tracker.add(OUT, selector, ESP)
    assert transaction.sent == ()
    assert rig.told() == []


def test_a_sweep_adopts_what_it_may_without_trying_to_add_it() -> None:
    rig = Rig("linux", owner="us", ownership="adopt")
    policy = theirs(rig, assignment=ESP)
    with rig.tracker.transaction(sweep=True):
        rig.tracker.add(OUT, SITE, ESP)
    assert rig.told() == []
    assert [one.id for one in rig.entries()] == [policy.id]


def test_a_sweep_takes_a_name() -> None:
    rig = Rig("linux")
    with pytest.raises(ValueError, match="an owner: PolicyTracker"), rig.tracker.transaction(sweep=True):
        pass


def test_a_sweep_that_cannot_read_does_not_keep_what_is_wanted_from_being_installed() -> None:
    rig = Rig("linux", owner="us")
    rig.fault(MessageType.SPDDUMP, rejects("ENOMEM"))
    with pytest.raises(PFKeyError, match="ENOMEM"), rig.tracker.transaction(sweep=True):
        rig.tracker.add(OUT, SITE, ESP)
    assert rig.held(SITE) is not None
    rig.agrees()


def test_a_sweep_whose_channel_fails_carries_out_what_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig("linux", owner="us")
    rig.tracker.add(OUT, SITES[0], ESP)

    def broken(timeout: float | None) -> bytes:
        monkeypatch.undo()
        raise OSError(errno.EIO, "the channel broke")

    rig.fault(MessageType.SPDDUMP, lambda channel, data: monkeypatch.setattr(channel, "receive", broken))
    with pytest.raises(OSError, match="the channel broke"), rig.tracker.transaction(sweep=True):
        rig.tracker.add(OUT, SITE, ESP)
    assert rig.held(SITE) is not None
    rig.agrees()


def test_a_sweep_that_is_interrupted_while_it_reads_leaves_the_lists_as_they_were() -> None:
    rig = Rig("linux", owner="us")
    rig.tracker.add(OUT, SITE, ESP)
    tracker = rig.restart(owner="us")
    rig.fault(MessageType.SPDDUMP, interrupts)
    with pytest.raises(KeyboardInterrupt), tracker.transaction(sweep=True):
        tracker.add(OUT, SITES[0], ESP)
        tracker.add(OUT, SITE, ESP)
    assert tracker.assignments(OUT, SITES[0]) == tracker.assignments(OUT, SITE) == ()
    tracker.resync()
    assert rig.held(SITE) is not None, "a former life's, which nobody has asked to delete"
    with rig.counting() as told:
        tracker.add(OUT, SITE, ESP)
    assert told == []
    with tracker.transaction(sweep=True):
        tracker.add(OUT, SITES[0], ESP)
    rig.agrees()


def test_what_a_sweep_cannot_delete_is_told_and_tried_again() -> None:
    rig = Rig("freebsd-13", owner="us")
    for selector in SITES[:2]:
        rig.tracker.add(OUT, selector, ESP)
    tracker = rig.restart(owner="us")
    rig.fault(DEL, rejects("ENOMEM"))
    with pytest.raises(TransactionError) as raised, tracker.transaction(sweep=True):
        tracker.add(OUT, SITES[0], ESP)
    assert list(raised.value.errors) == [f"out {SITES[1]}"]
    assert len(rig.entries()) == 2
    with tracker.transaction(sweep=True):
        pass
    assert {policy.selector for policy in rig.entries()} == {SITES[0]}


@pytest.mark.parametrize("profile", ["linux", "freebsd-13"])
def test_what_another_thread_comes_to_use_during_a_sweep_stays(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its call waits until the sweep is over and lets others write: the sweep must not wait for it."""
    rig = Rig(profile, owner="us")
    for site in SITES[:2]:
        rig.tracker.add(OUT, site, ESP)
    tracker = rig.restart(owner="us", lock_timeout=20)
    changes: list[Change] = []
    thread = threading.Thread(target=lambda: changes.append(tracker.add(OUT, SITES[0], ESP)), daemon=True)
    dump = rig.kernel.dump_policies

    def and_somebody_comes() -> Sequence[Policy]:
        policies = dump()
        if thread.ident is None:
            thread.start()
            while (tracked := tracker._tracking.book.get(OUT, SITES[0])) is None or tracked.busy is None:
                time.sleep(0.001)
        return policies

    monkeypatch.setattr(rig.kernel, "dump_policies", and_somebody_comes)
    begun = time.monotonic()
    with tracker.transaction(sweep=True) as transaction:
        pass
    thread.join(30)
    assert time.monotonic() - begun < 10
    assert transaction.sent == (DEL,)
    assert [change.sent for change in changes] == [()]
    assert [entry.selector for entry in rig.entries()] == [SITES[0]]


@pytest.mark.parametrize("profile", ALL)
def test_what_a_sweep_was_told_to_keep_stays_when_its_update_is_refused(profile: str) -> None:
    rig = Rig(profile, owner="me")
    rig.tracker.add(OUT, SITE, ESP)
    tracker = rig.restart(owner="me")
    tracker.add(OUT, SITES[1], ESP)
    for kind in (ADD, UPD):
        rig.embedded.fail_next(kind, "ENOMEM", "before")
    with pytest.raises(TransactionError), tracker.transaction(sweep=True):
        tracker.add(OUT, SITE, MOVED)
    rig.embedded._faults.clear()
    assert rig.held(SITE) is not None
    assert all(difference.selector != SITE for difference in tracker.resync())
    assert rig.held(SITE) is not None
    with tracker.transaction(sweep=True):
        pass
    assert rig.held(SITE) is None


@pytest.mark.parametrize("ownership", ["refuse", "adopt", "take_over"])
@pytest.mark.parametrize("profile", ALL)
def test_a_selector_that_is_taken_by_what_nobody_sees(profile: str, ownership: str) -> None:
    """SPDADD says EEXIST again and again, and no dump shows why: that is no policy, and the caller hears of it."""
    rig = Rig(profile, ownership=ownership)
    for _ in range(8):
        rig.fault(ADD, rejects("EEXIST"))
    with pytest.raises(ForeignPolicy, match="no dump shows it"):
        rig.tracker.add(OUT, SITE, ESP)
    assert rig.tracker.assignments(OUT, SITE) == ()
    with pytest.raises(TransactionError, match="no dump shows it"), rig.tracker.transaction():
        rig.tracker.add(OUT, SITE, ESP)
    rig.channel.faults.clear()
    assert rig.tracker.add(OUT, SITE, ESP).sent == (ADD,)
    rig.agrees()


@pytest.mark.parametrize("profile", ["linux", "freebsd-13"])
def test_taking_over_what_is_right_already_does_not_say_that_it_differed(profile: str) -> None:
    rig = Rig(profile, ownership="take_over")
    theirs(rig, assignment=ESP)
    change = rig.tracker.add(OUT, SITE, ESP)
    assert change.sent == (UPD,)
    assert change.reason.startswith("it is what the assignment on top asks for, and the update puts our tag on it (")


@pytest.mark.parametrize("profile", ["linux", "freebsd-13"])
@pytest.mark.parametrize("is_known", [False, True])
def test_what_comes_and_goes_in_one_transaction_leaves_a_former_life_alone(profile: str, is_known: bool) -> None:
    rig = Rig(profile, owner="me")
    rig.tracker.add(OUT, SITE, ESP)
    tracker = rig.restart(owner="me")
    if is_known:
        tracker.resync()
    rig.channel.sent.clear()
    with tracker.transaction():
        tracker.add(OUT, SITE, ESP)
        tracker.remove(OUT, SITE, ESP)
    tracker.resync()
    assert not {ADD, UPD, DEL} & set(rig.channel.types())
    assert len(rig.embedded.policies()) == 1
    with tracker.transaction(sweep=True):
        pass
    assert rig.embedded.policies() == []
