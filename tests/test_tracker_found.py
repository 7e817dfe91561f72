"""Faults of the tracker that its state machine found, each as the few calls that show it."""

from __future__ import annotations

from contextlib import suppress

import pytest
from faulty import Fault, interrupts
from machine import Change, Setup, playing
from rig import OUT, Rig

from pfkey import (
    Abi,
    Action,
    Assignment,
    EmbeddedKernel,
    ForeignPolicy,
    KernelError,
    MessageType,
    NotTracked,
    Policy,
    Rank,
    ReplyTimeout,
    Selector,
    Template,
    TransactionError,
    connect,
)
from pfkey.embedded.profiles import PROFILE_NAMES
from pfkey.errors import PFKeyError
from pfkey.guards import alias_selectors
from pfkey.reading import Rows

ADD, UPD, DEL = MessageType.SPDADD, MessageType.SPDUPDATE, MessageType.SPDDELETE
SITE = Selector("10.1.0.0/16", "10.2.0.0/16")
HOSTS = Selector("10.1.1.1", "10.2.1.1")
X = Assignment(Template.tunnel("192.0.2.1", "198.51.100.1", reqid=1), spi=0xC1)
PASS = Assignment(action=Action.NONE, rank=Rank.PASS)
DROP = Assignment(action=Action.DISCARD, rank=Rank.FALLBACK)
MOVED = Assignment(Template.tunnel("192.0.2.1", "198.51.100.99", reqid=1), spi=0xC2)


def test_a_policy_with_the_tag_of_another_tracker_is_not_taken_for_what_a_lost_message_made() -> None:
    rig = Rig("linux")
    rig.tracker.add(OUT, SITE, X)
    tracker = rig.restart()  # without a name: what the first one left is somebody else's
    rig.embedded.fail_next(MessageType.SPDADD, when="late")
    with pytest.raises(ReplyTimeout):
        tracker.add(OUT, SITE, X)
    with pytest.raises(ForeignPolicy):
        tracker.add(OUT, SITE, X)
    tracker.flush()
    assert [policy.action for policy in rig.embedded.policies()] == [Action.IPSEC]


@pytest.mark.parametrize("profile", ["freebsd-11", "freebsd-13", "freebsd-14", "netbsd", "macos"])
def test_two_ipv6_hosts_are_guarded_by_an_alias_with_a_scope(profile: str) -> None:
    hosts = Selector("2001:db8:1::1", "2001:db8:2::1")
    rig = Rig(profile)
    rig.tracker.add(OUT, hosts, X)
    with rig.embedded.probe(OUT, hosts) as probe:
        change = rig.tracker.replace(OUT, hosts, X, MOVED)
    assert (change.sent, change.guard) == ((UPD,), (ADD, DEL))
    assert probe.bare == 0
    assert {step.policy.action for step in probe.log if step.policy} == {Action.IPSEC}
    assert len(rig.embedded.policies()) == 1


def test_a_guard_of_unknown_outcome_leaves_the_assignment_recorded_as_the_error_says() -> None:
    rig = Rig("freebsd-13")
    rig.tracker.add(OUT, SITE, X)
    rig.embedded.fail_next(ADD, None, "ignored")
    with pytest.raises(ReplyTimeout):
        rig.tracker.add(OUT, SITE, MOVED)
    assert rig.tracker.assignments(OUT, SITE) == (MOVED, X)
    assert [policy.templates for policy in rig.embedded.policies()] == [X.templates]
    assert rig.tracker.remove(OUT, SITE, X).sent == (UPD,)
    assert [policy.templates for policy in rig.embedded.policies()] == [MOVED.templates]


def test_a_guard_that_was_refused_leaves_the_list_as_it_was() -> None:
    rig = Rig("freebsd-13")
    rig.tracker.add(OUT, SITE, X)
    rig.embedded.fail_next(ADD, "ENOMEM")
    with pytest.raises(KernelError):
        rig.tracker.add(OUT, SITE, MOVED)
    assert rig.tracker.assignments(OUT, SITE) == (X,)


@pytest.mark.parametrize("profile", ["linux", "freebsd-13"])
def test_after_a_resync_a_policy_of_a_former_life_is_still_known(profile: str) -> None:
    rig = Rig(profile, owner="me")
    rig.tracker.add(OUT, SITE, X)
    tracker = rig.restart(owner="me")
    tracker.resync()
    assert tracker.add(OUT, SITE, X).sent == ()
    assert tracker.replace(OUT, SITE, X, MOVED).sent == (UPD,)
    assert rig.channel.types().count(ADD) == rig.channel.types().count(DEL), "guards aside, nothing was added"


def test_what_was_found_late_of_a_former_life_is_not_believed_again_when_it_is_gone() -> None:
    rig = Rig("linux", owner="me")
    for _ in range(2):
        rig.embedded.fail_next(MessageType.SPDDUMP, "ENOMEM")
        rig.embedded.fail_next(MessageType.SPDDUMP, "ENOMEM")
    rig.tracker.add(OUT, SITE, X)  # the search for a former life fails
    rig.embedded._faults.clear()
    rig.tracker.add(OUT, HOSTS, X)  # now it finds the policy that the same tracker has made since
    rig.tracker.remove(OUT, SITE, X)
    assert rig.tracker.add(OUT, SITE, X).sent == (ADD,)
    assert len(rig.embedded.policies()) == 2


def test_a_guard_of_a_former_life_that_stays_is_counted_once() -> None:
    rig = Rig("freebsd-13")
    rig.tracker.add(OUT, HOSTS, X)
    rig.embedded.fail_next(UPD, "ENOMEM", "unlinked")
    for _ in range(4):
        rig.embedded.fail_next(DEL, "ENOMEM")
    with pytest.raises(KernelError):
        rig.tracker.add(OUT, HOSTS, MOVED)
    rig.embedded._faults.clear()
    for policy in rig.embedded.policies():
        if policy.selector == HOSTS:
            rig.other.delete_policy(policy)
    assert [policy.action for policy in rig.embedded.policies()] == [Action.DISCARD]
    tracker = rig.restart()
    for _ in range(3):
        tracker.resync()
    assert tracker.add(OUT, HOSTS, X).guard == (DEL,)
    assert [policy.selector for policy in rig.embedded.policies()] == [HOSTS]


@pytest.mark.parametrize("profile", PROFILE_NAMES)
def test_a_row_of_a_dump_has_the_image_of_its_policy(profile: str) -> None:
    rig = Rig(profile)
    for number, assignment in enumerate((X, PASS, DROP)):
        rig.tracker.add(OUT, Selector(f"10.{number}.0.0/16", "10.9.0.0/16"), assignment)
    book = rig.tracker._tracking.book
    dump = rig.kernel.dump_policies()
    rows = Rows.of(dump, rig.kernel.abi).numbers
    assert [book.row_image(row) for row in rows] == [book.image(policy) for policy in dump]
    assert {book.row_image(row).action for row in rows} == {Action.IPSEC, Action.NONE, Action.DISCARD}


@pytest.mark.parametrize("profile", PROFILE_NAMES)
def test_nothing_is_sent_after_a_restart_for_what_is_right(profile: str) -> None:
    rig = Rig(profile, owner="me")
    rig.tracker.add(OUT, SITE, X)
    tracker = rig.restart(owner="me")
    with tracker.transaction(sweep=True) as transaction:
        tracker.add(OUT, SITE, X)
    assert transaction.sent == ()
    assert rig.channel.types() == []


@pytest.mark.parametrize("profile", PROFILE_NAMES)
def test_a_resync_is_not_taken_in_by_the_dead_that_a_dump_shows(profile: str) -> None:
    rig = Rig(profile)
    rig.tracker.add(OUT, SITE, X)
    rig.other.flush_policies()
    (difference,) = rig.tracker.resync()
    assert difference.error is None
    assert len(rig.embedded.policies()) == 1


@pytest.mark.parametrize("profile", PROFILE_NAMES)
def test_a_guard_is_not_deleted_for_the_sake_of_a_dead_policy(profile: str) -> None:
    """Somebody deletes a policy while its guard stands, and the process that guarded it dies."""
    rig = Rig(profile, guard="alias")
    rig.tracker.add(OUT, SITE, X)
    for _ in range(8):
        rig.embedded.fail_next(DEL, "ENOMEM")
    rig.tracker.add(OUT, SITE, MOVED)
    rig.embedded._faults.clear()
    assert len(rig.embedded.policies()) == 2
    rig.other.delete_policy(Policy(OUT, SITE))
    with rig.embedded.probe(OUT, SITE) as probe:
        rig.restart().resync()
    assert probe.bare == 0
    assert [policy.selector for policy in rig.embedded.policies()] == [SITE], "the guard was promoted"


@pytest.mark.parametrize("profile", ["linux", "freebsd-13"])
def test_asking_for_a_policy_of_a_former_life_does_not_get_it_deleted(profile: str) -> None:
    rig = Rig(profile, owner="me")
    rig.tracker.add(OUT, SITE, X)
    tracker = rig.restart(owner="me")
    tracker.add(OUT, HOSTS, X)
    with pytest.raises(NotTracked):
        tracker.remove(OUT, SITE, X)
    assert tracker.query(OUT, SITE).selector == SITE
    with pytest.raises(ZeroDivisionError), tracker.transaction():
        tracker.add(OUT, SITE, X)
        raise ZeroDivisionError
    tracker.resync()
    tracker.flush()
    assert [policy.selector for policy in rig.embedded.policies()] == [SITE]
    assert tracker.add(OUT, SITE, X).sent == ()
    assert tracker.remove(OUT, SITE, X).sent == (DEL,)


def test_asking_for_a_policy_does_not_get_its_orphaned_guard_deleted() -> None:
    rig = Rig("freebsd-13", guard="discard")
    rig.tracker.add(OUT, HOSTS, X)
    for _ in range(8):
        rig.embedded.fail_next(DEL, "ENOMEM")
    rig.tracker.add(OUT, HOSTS, MOVED)
    rig.embedded._faults.clear()
    rig.other.delete_policy(Policy(OUT, HOSTS))
    tracker = rig.restart()
    tracker.add(OUT, SITE, X)
    with pytest.raises(NotTracked):
        tracker.remove(OUT, HOSTS, X)
    tracker.resync()
    assert [policy.action for policy in rig.embedded.policies()].count(Action.DISCARD) == 1
    tracker.add(OUT, HOSTS, X)
    assert [policy.action for policy in rig.embedded.policies()].count(Action.DISCARD) == 0


def test_a_sweep_takes_an_orphaned_guard_of_ours_along() -> None:
    rig = Rig("freebsd-13", owner="me")
    rig.tracker.add(OUT, HOSTS, X)
    for _ in range(8):
        rig.embedded.fail_next(DEL, "ENOMEM")
    rig.tracker.add(OUT, HOSTS, MOVED)
    rig.embedded._faults.clear()
    rig.other.delete_policy(Policy(OUT, HOSTS))
    assert [policy.action for policy in rig.embedded.policies()] == [Action.DISCARD]
    tracker = rig.restart(owner="me")
    with tracker.transaction(sweep=True):
        tracker.add(OUT, SITE, X)
    assert [policy.selector for policy in rig.embedded.policies()] == [SITE]
    assert len(tracker) == 1


def test_a_dump_that_never_comes_whole_is_not_waited_for_at_every_call() -> None:
    """A channel that cannot grow its buffer, to a kernel with more policies than it holds (FreeBSD 12.1: 99 of 300)."""
    embedded = EmbeddedKernel("freebsd-12")
    with connect(embedded.connect()) as other:
        for number in range(150):
            other.add_policy(Policy(OUT, Selector(f"10.9.{number}.0/24", "10.2.0.0/16"), Action.DISCARD))
    rig = Rig.__new__(Rig)
    rig.embedded, rig.other = embedded, connect(embedded.connect())
    tracker = rig.restart()
    for assignment in (X, MOVED, X):
        tracker.add(OUT, SITE, assignment)
    dumps = [message.type for message in rig.channel.sent].count(MessageType.SPDDUMP)
    assert dumps == 1
    assert len([policy for policy in rig.embedded.policies() if policy.selector.identity == SITE.identity]) == 1


@pytest.mark.parametrize("profile", ["freebsd-10", "netbsd", "macos"])
def test_a_selector_that_turns_out_to_be_taken_does_not_stop_a_move(profile: str) -> None:
    """Two policies that have to come in order, and somebody has the selector of the first."""
    rig = Rig(profile)
    wider, narrower = Selector("10.0.0.0/8", "10.0.0.0/8"), SITE
    rig.tracker.add(OUT, wider, X)
    rig.other.add_policy(Policy(OUT, narrower, Action.DISCARD))
    with pytest.raises(ForeignPolicy):
        rig.tracker.add(OUT, narrower, X)
    with pytest.raises(TransactionError) as raised, rig.tracker.transaction():
        rig.tracker.add(OUT, narrower, X)
        rig.tracker.replace(OUT, wider, X, MOVED)
    assert list(raised.value.errors) == [f"out {narrower}"]
    held = {str(policy.selector): policy for policy in rig.embedded.policies()}
    assert held[str(wider)].templates == MOVED.templates
    assert held[str(narrower)].action == Action.DISCARD
    assert len(held) == 2


def test_a_policy_that_comes_and_goes_in_one_transaction_is_gone_though_the_kernel_has_none() -> None:
    rig = Rig("linux")
    rig.tracker.add(OUT, SITE, X)
    rig.other.flush_policies()
    with rig.tracker.transaction():
        rig.tracker.add(OUT, SITE, MOVED)
        rig.tracker.remove(OUT, SITE, X)
        rig.tracker.remove(OUT, SITE, MOVED)
    assert rig.tracker.assignments(OUT, SITE) == ()
    assert len(rig.tracker) == 0


@pytest.mark.parametrize("profile", ["freebsd-12", "freebsd-13", "netbsd"])
def test_a_guard_is_not_taken_for_gone_because_its_deletion_was_refused(profile: str) -> None:
    """EINVAL is what FreeBSD says of a policy that is not there, and of other things."""
    rig = Rig(profile)
    rig.tracker.add(OUT, SITE, X)
    rig.embedded.fail_next(DEL, "EINVAL")
    rig.tracker.replace(OUT, SITE, X, MOVED)
    rig.tracker.remove(OUT, SITE, MOVED)
    assert rig.embedded.policies() == []


UNLINKING = [name for name in PROFILE_NAMES if not name.startswith("linux")]


@pytest.mark.parametrize(
    ("profile", "when"), [(name, "before") for name in PROFILE_NAMES] + [(name, "unlinked") for name in UNLINKING]
)
def test_a_refused_update_leaves_the_policy_of_a_former_life(profile: str, when: str) -> None:
    """It was to become another one, and did not: it protects packets as before, whoever uses it or not."""
    rig = Rig(profile, owner="me")
    rig.tracker.add(OUT, SITE, X)
    tracker = rig.restart(owner="me")
    rig.embedded.fail_next(UPD, "ENOMEM", when)
    with rig.embedded.probe(OUT, SITE) as probe, pytest.raises(KernelError):
        tracker.add(OUT, SITE, MOVED)
    tracker.resync()
    assert [policy.templates for policy in rig.embedded.policies()] == [X.templates]
    if profile != "freebsd-14":  # there the update of the only one is guarded against another danger
        assert probe.bare == 0
    assert tracker.assignments(OUT, SITE) == ()
    assert tracker.add(OUT, SITE, X).sent == ()
    with tracker.transaction(sweep=True):
        tracker.remove(OUT, SITE, X)
    assert rig.embedded.policies() == []


LISTS = ["freebsd-10", "netbsd", "macos"]
NARROW = Selector("10.1.1.0/24", "10.2.0.0/16")


@pytest.mark.parametrize("profile", LISTS)
def test_another_rank_with_the_same_image_moves_what_has_to_follow(profile: str) -> None:
    """Where the order of the list is the priority, the assignment on top decides it too."""
    rig = Rig(profile)
    weak = Assignment(*X.templates, spi=0xC9, rank=Rank.REGULAR, priority=500000)
    strong = Assignment(*X.templates, spi=0xCA, priority=1000)
    rig.tracker.add(OUT, NARROW, X)
    rig.tracker.add(OUT, SITE, X)
    assert [policy.selector for policy in rig.embedded.policies()] == [NARROW, SITE]
    rig.tracker.add(OUT, SITE, strong)
    assert [policy.selector for policy in rig.embedded.policies()] == [SITE, NARROW]
    rig.tracker.replace(OUT, SITE, strong, weak)
    assert [policy.selector for policy in rig.embedded.policies()] == [NARROW, SITE]


@pytest.mark.parametrize("profile", LISTS)
def test_a_resync_puts_in_order_what_somebody_else_moved(profile: str) -> None:
    rig = Rig(profile)
    rig.tracker.add(OUT, NARROW, X)
    rig.tracker.add(OUT, SITE, X)
    first = next(policy for policy in rig.other.dump_policies() if policy.selector == NARROW)
    rig.other.update_policy(first)
    assert [policy.selector for policy in rig.embedded.policies()] == [SITE, NARROW]
    rig.tracker.resync()
    assert [policy.selector for policy in rig.embedded.policies()] == [NARROW, SITE]


@pytest.mark.parametrize("profile", LISTS)
def test_an_add_that_meets_a_policy_does_not_stop_the_others_of_its_transaction(profile: str) -> None:
    rig = Rig(profile, ownership="adopt")
    rig.tracker.add(OUT, NARROW, X)
    rig.other.add_policy(Policy(OUT, SITE, Action.DISCARD))
    with rig.tracker.transaction():
        rig.tracker.replace(OUT, NARROW, X, MOVED)
        rig.tracker.add(OUT, SITE, X)
        rig.tracker.add(OUT, HOSTS, X)
    assert [policy.selector for policy in rig.embedded.policies()] == [HOSTS, NARROW, SITE]
    assert [policy.templates for policy in rig.embedded.policies()] == [X.templates, MOVED.templates, X.templates]


@pytest.mark.parametrize("profile", LISTS)
def test_a_guard_whose_answer_an_interrupt_lost_is_not_relied_on(profile: str) -> None:
    """Ctrl-C comes while the guard of a move is awaited, which the kernel has just refused."""
    rig = Rig(profile)
    strong = Assignment(*X.templates, spi=0xCA, priority=1000)
    rig.tracker.add(OUT, SITE, X)
    rig.tracker.add(OUT, SITE, strong)
    rig.tracker.add(OUT, NARROW, X)
    rig.embedded.fail_next(ADD, "ENOMEM")
    rig.channel.faults.append(Fault(ADD, interrupts))
    with rig.embedded.probe(OUT, SITE) as probe, pytest.raises(KeyboardInterrupt):
        rig.tracker.remove(OUT, SITE, strong)
    assert probe.bare == 0
    rig.tracker.resync()
    assert [policy.selector for policy in rig.embedded.policies()] == [NARROW, SITE]


@pytest.mark.parametrize("profile", [name for name in PROFILE_NAMES if not name.startswith("linux")])
def test_a_discard_guard_between_link_local_hosts_is_known_for_what_it_is(profile: str) -> None:
    """Its scope is part of whose place it holds, and of which packets it drops."""
    hosts = Selector("fe80::1%1", "fe80::2%1")
    rig = Rig(profile, guard="discard")
    rig.tracker.add(OUT, hosts, X)
    for _ in range(8):
        rig.embedded.fail_next(DEL, "ENOMEM")
    rig.tracker.add(OUT, hosts, MOVED)
    rig.embedded._faults.clear()
    assert {policy.selector.scopes for policy in rig.other.dump_policies()} == {("1", "1")}
    assert len(rig.embedded.policies()) == 2
    rig.restart().resync()
    (left,) = rig.embedded.policies()
    assert left.action == Action.IPSEC


def test_an_alias_of_a_link_local_network_keeps_its_scope() -> None:
    """Without it, it would be a policy of that network on every link."""
    networks = Selector("fe80::%1/64", "fe80:0:0:1::%1/64")
    aliases = list(alias_selectors(networks, Abi.freebsd(13)))
    assert aliases
    assert {alias.scopes for alias in aliases} == {("1", "1")}
    assert {alias.identity for alias in aliases} == {networks.identity}


@pytest.mark.parametrize("profile", LISTS)
def test_guards_that_were_never_answered_do_not_hold_each_other_for_ever(profile: str) -> None:
    """Somebody's full receive buffer makes every send fail after the work, while policies are moved."""
    rig = Rig(profile)
    rig.tracker.add(OUT, SITE, X)
    rig.tracker.add(OUT, NARROW, X)
    deaf = rig.embedded.connect()
    deaf.set_receive_buffer(200)
    for selector, assignment in ((Selector("0.0.0.0/0", "0.0.0.0/0"), X), (SITE, X), (SITE, PASS)):
        with suppress(KernelError):
            rig.tracker.add(OUT, selector, assignment)
    deaf.close()
    assert [difference.error for difference in rig.tracker.resync() if difference.error is not None] == []
    assert sorted(str(policy.selector) for policy in rig.embedded.policies()) == sorted(
        str(one) for _, one in rig.tracker.policies()
    )


@pytest.mark.parametrize("profile", LISTS)
def test_a_policy_that_could_not_be_moved_behind_a_stronger_one_is_told_and_mended_by_a_resync(profile: str) -> None:
    rig = Rig(profile)
    strong = Assignment(*X.templates, spi=0xCA, priority=1000)
    rig.tracker.add(OUT, SITE, strong)
    rig.tracker.add(OUT, NARROW, X)
    rig.tracker.add(OUT, SITE, X)
    rig.embedded.fail_next(ADD, "ENOMEM")
    with pytest.raises(PFKeyError, match="stands in front of a stronger policy"):
        rig.tracker.remove(OUT, SITE, strong)
    assert rig.tracker.assignments(OUT, SITE) == (X,)
    assert [policy.selector for policy in rig.embedded.policies()] == [SITE, NARROW]
    rig.tracker.resync()
    assert [policy.selector for policy in rig.embedded.policies()] == [NARROW, SITE]


def test_a_policy_that_the_search_for_a_former_life_put_in_order_is_known_by_its_new_id() -> None:
    """A process dies while it moves policies, and its successor adopts one before all of them are in order."""
    with playing("netbsd", Setup(ownership="adopt")) as play:
        site, narrow, plain = play.where(0), play.where(2), play.what(0)
        for place in (site, narrow):
            play.call("add", place, None, plain)
        play.call("add", play.where(17), None, plain)
        play.small_buffer(200, listener=True)
        play.tunnel(play.what(2), remove=False)
        play.will_die(5, delivered=False)
        play.call("add", site, None, play.what(10))
        play.call("add", narrow, None, plain)
        play.settle()


def test_an_interrupt_after_a_refused_update_does_not_get_the_policy_of_a_former_life_deleted() -> None:
    with playing("freebsd-11", Setup(owner="the machine")) as play:
        play.tunnel(play.what(0), remove=False)
        play.restart(readd=0, sweep=False)
        play.resync()
        play.interrupt(6)
        play.fault(UPD, "before", "ENOMEM", 0)
        play.fault(ADD, "before", "ENOMEM", 0)
        play.tunnel(play.what(2), remove=False)
        play.settle()


@pytest.mark.parametrize("profile", ["freebsd-10", "netbsd", "macos"])
def test_guards_that_hold_each_others_places_go_in_one_call(profile: str) -> None:
    with playing(profile, Setup()) as play:
        play.transaction([Change("add", 3, 17, 0), Change("add", 0, 0, 0)], raises=None, sweep=False)
        play.fault(ADD, "before", "ENOMEM", 0)
        play.interrupt(0)
        play.transaction([Change("add", 0, 2, 0), Change("add", 3, 0, 0)], raises=None, sweep=False)
        play.settle()


def test_a_policy_of_a_former_life_stays_when_a_guard_of_its_refused_update_does() -> None:
    with playing("freebsd-11", Setup(owner="the machine")) as play:
        play.call("add", play.where(0), None, play.what(2))
        for kind, when, error in (
            (DEL, "before", "ENOMEM"),
            (ADD, "after", "ENOBUFS"),
            (UPD, "before", "ENOMEM"),
            (ADD, "before", "ENOMEM"),
        ):
            play.fault(kind, when, error, 0)
        play.restart(readd=0, sweep=False)
        play.transaction([Change("add", 0, 0, 0)], raises=None, sweep=False)
        play.settle()
        assert len(play.world.embedded.policies()) == 1
