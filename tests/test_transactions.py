"""Transactions: what the kernel hears of many changes at once, in which order, and what comes of errors on the way."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import pytest
from faulty import rejects
from rig import ALL, BSD, DROP, ESP, IN, MOVED, OUT, REKEYED, Rig
from scenarios import ADD, DEL, UPD

from pfkey import (
    Abi,
    Action,
    Assignment,
    Direction,
    Message,
    NotTracked,
    PFKeyError,
    Policy,
    PolicyTracker,
    ReplyTimeout,
    Selector,
    Template,
    TransactionError,
)
from pfkey.settle import _AT_ONCE
from pfkey.typed import selector_from

SITE = Selector("10.1.0.0/16", "10.2.0.0/16")
SITES = [Selector(f"10.{number}.0.0/16", "192.168.0.0/16") for number in range(1, 9)]
HOST_IN_SITE = Selector("10.1.0.1", "10.2.0.1")


@pytest.mark.parametrize("profile", ALL)
def test_any_number_of_changes_is_one_message_for_each_policy(profile: str) -> None:
    rig = Rig(profile)
    with rig.tracker.transaction() as transaction:
        for _ in range(5):
            for selector in SITES:
                rig.tracker.add(OUT, selector, ESP)
                rig.tracker.add(OUT, selector, MOVED)
                rig.tracker.replace(OUT, selector, ESP, REKEYED)
                rig.tracker.remove(OUT, selector, MOVED)
        assert rig.told() == []
        assert len(transaction) == len(SITES)
        assert transaction.changes == {}
    assert rig.told() == [(ADD, str(selector)) for selector in SITES]
    assert transaction.sent == (ADD,) * len(SITES)
    assert set(transaction.changes) == {(OUT, selector) for selector in SITES}
    rig.agrees()


class Counting:
    """A kernel that acknowledges all it is told, or never answers; how many messages came at a time."""

    def __init__(self, *, is_deaf: bool) -> None:
        self.abi = Abi.linux()
        self.is_deaf = is_deaf
        self.parts: list[list[Message]] = []

    def check_policy(self, policy: Policy) -> None:
        pass

    def request_many(self, messages: Sequence[Message]) -> Sequence[Message | PFKeyError]:
        self.parts.append([*messages])
        return [ReplyTimeout("nothing", request=message) for message in messages] if self.is_deaf else messages

    def dump_policies(self) -> list[Policy]:
        return []


@pytest.mark.parametrize("is_deaf", [False, True])
def test_many_policies_go_out_in_parts_unless_nobody_answers(is_deaf: bool) -> None:
    """A part takes as long as the timeout where nobody answers, and two of them are enough to know."""
    kernel = Counting(is_deaf=is_deaf)
    tracker = PolicyTracker(kernel)
    sites = [Selector((0x0A000000 + number, 32), "192.168.0.0/16") for number in range(3 * _AT_ONCE)]
    with pytest.raises(TransactionError) if is_deaf else nullcontext(), tracker.transaction():
        for site in sites:
            tracker.add(OUT, site, ESP)
    told = [selector_from(message) for part in kernel.parts for message in part]
    assert told == sites
    assert [len(part) for part in kernel.parts] == ([_AT_ONCE, 2 * _AT_ONCE] if is_deaf else [_AT_ONCE] * 3)


@pytest.mark.parametrize("profile", ALL)
def test_nothing_is_sent_where_nothing_changes(profile: str) -> None:
    rig = Rig(profile)
    for selector in SITES:
        rig.tracker.add(OUT, selector, ESP)
    with rig.counting() as sent, rig.tracker.transaction() as transaction:
        for selector in SITES:
            rig.tracker.add(OUT, selector, REKEYED)
            rig.tracker.remove(OUT, selector, ESP)
        rig.tracker.add(IN, SITE, ESP)
        rig.tracker.remove(IN, SITE, ESP)
    assert sent == []
    assert transaction.sent == ()
    assert transaction.changes[OUT, SITES[0]].avoided == (UPD,)
    assert len(rig.tracker) == len(SITES)


@pytest.mark.parametrize("profile", ALL)
def test_what_is_new_comes_before_what_goes(profile: str) -> None:
    """A packet that belongs to the old and to the new selector always meets one of them."""
    for old, new in ((SITE, HOST_IN_SITE), (HOST_IN_SITE, SITE), (SITE, Selector("10.0.0.0/8", "10.0.0.0/8"))):
        rig = Rig(profile)
        rig.tracker.add(OUT, old, ESP)
        with rig.embedded.probe(OUT, HOST_IN_SITE) as probe:
            with rig.tracker.transaction():
                rig.tracker.remove(OUT, old, ESP)
                rig.tracker.add(OUT, new, MOVED)
            assert [policy.selector for policy in rig.entries()] == [new]
        assert probe.bare == 0
        assert [kind for kind, _ in rig.told()][-1] == DEL
        rig.agrees()


@pytest.mark.parametrize("profile", ALL)
def test_the_control_the_other_way_round_is_bare(profile: str) -> None:
    rig = Rig(profile)
    rig.tracker.add(OUT, SITE, ESP)
    with rig.embedded.probe(OUT, HOST_IN_SITE) as probe:
        rig.tracker.remove(OUT, SITE, ESP)
        rig.tracker.add(OUT, HOST_IN_SITE, ESP)
    assert probe.bare >= 1


@pytest.mark.parametrize("profile", ALL)
def test_what_protects_comes_before_what_lets_through(profile: str) -> None:
    passing = Assignment(action=Action.NONE)
    rig = Rig(profile)
    rig.tracker.add(OUT, SITES[0], ESP)
    with rig.tracker.transaction():
        rig.tracker.add(OUT, SITES[1], passing)
        rig.tracker.add(OUT, SITES[2], DROP)
    if rig.abi.has_priority:
        assert [selector for _, selector in rig.told()][-2:] == [str(SITES[2]), str(SITES[1])]
    with rig.counting() as sent, rig.tracker.transaction():
        rig.tracker.remove(OUT, SITES[2], DROP)
        rig.tracker.remove(OUT, SITES[1], passing)
    assert sent == [(DEL, str(SITES[1])), (DEL, str(SITES[2]))], "what lets through goes first"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("profile", ["linux", "freebsd-13", "netbsd"])
def test_an_exception_inside_sends_nothing_and_restores_every_list(profile: str, error: type[BaseException]) -> None:
    rig = Rig(profile)
    rig.tracker.add(OUT, SITES[0], ESP)
    rig.tracker.add(OUT, SITES[1], ESP)
    before = {(way, one): rig.tracker.assignments(way, one) for way, one in rig.tracker.policies()}
    with rig.counting() as sent, pytest.raises(error), rig.tracker.transaction():
        rig.tracker.add(OUT, SITES[0], MOVED)
        rig.tracker.remove(OUT, SITES[0], ESP)
        rig.tracker.replace(OUT, SITES[1], ESP, MOVED)
        for _ in range(40):
            rig.tracker.add(OUT, SITES[2], ESP)
        raise error
    assert sent == []
    assert {(way, one): rig.tracker.assignments(way, one) for way, one in rig.tracker.policies()} == before
    rig.agrees()
    assert rig.tracker.add(OUT, SITES[0], MOVED).sent == (UPD,), "and it can be used on"


def test_a_call_that_fails_inside_leaves_the_rest_to_the_caller() -> None:
    rig = Rig("linux")
    rig.tracker.add(OUT, SITES[0], ESP)
    with rig.tracker.transaction():
        with pytest.raises(NotTracked):
            rig.tracker.remove(OUT, SITES[1], ESP)
        with pytest.raises(NotTracked):
            rig.tracker.replace(OUT, SITES[0], MOVED, ESP)
        with pytest.raises(PFKeyError):
            rig.tracker.add(OUT, SITES[0], Assignment(spi=1))
        rig.tracker.replace(OUT, SITES[0], ESP, MOVED)
    rig.agrees()
    assert rig.tracker.assignments(OUT, SITES[0]) == (MOVED,)
    assert len(rig.tracker) == 1


@pytest.mark.parametrize("profile", ALL)
def test_errors_at_the_end_name_each_policy_and_its_state_and_the_rest_stands(profile: str) -> None:
    rig = Rig(profile)
    rig.tracker.add(OUT, SITES[0], ESP)
    rig.tracker.add(OUT, SITES[1], ESP)
    rig.fault(ADD, rejects("ENOMEM"), skip=1)
    rig.fault(DEL, rejects("EPERM"), skip=0 if not rig.abi.update_unlinks_first else 1)
    with pytest.raises(TransactionError) as raised, rig.tracker.transaction() as transaction:
        rig.tracker.add(OUT, SITES[2], ESP)
        rig.tracker.add(OUT, SITES[3], ESP)
        rig.tracker.replace(OUT, SITES[0], ESP, MOVED)
        rig.tracker.remove(OUT, SITES[1], ESP)
    error = raised.value
    assert str(error).startswith(f"{len(error.errors)} policies could not be brought to what was asked: out 10.")
    for name in error.errors:
        assert name in str(error)
        assert error.states[name] in str(error)
    assert error.states[f"out {SITES[1]}"].startswith("the kernel holds ipsec esp/tunnel")
    failed = set(error.errors)
    assert {f"out {selector}" for _, selector in transaction.changes} >= failed
    assert rig.tracker.assignments(OUT, SITES[0]) == (MOVED,)
    rig.channel.faults.clear()
    rig.tracker.resync()
    with rig.tracker.transaction():
        pass
    rig.agrees()


@pytest.mark.parametrize("profile", ALL)
def test_nothing_is_deleted_that_has_no_successor(profile: str) -> None:
    """What was to take its packets over was rejected: the old policy stays, and goes with the next call."""
    rig = Rig(profile)
    rig.tracker.add(OUT, SITE, ESP)
    rig.tracker.add(OUT, SITES[5], ESP)
    rig.fault(ADD, rejects("ENOMEM"))
    told = r"was not deleted: .*, which was to take its packets over"
    probe = rig.embedded.probe(OUT, HOST_IN_SITE)
    with probe, pytest.raises(TransactionError, match=told) as raised, rig.tracker.transaction():
        rig.tracker.remove(OUT, SITE, ESP)
        rig.tracker.remove(OUT, SITES[5], ESP)
        rig.tracker.add(OUT, HOST_IN_SITE, ESP)
    assert set(raised.value.errors) == {f"out {SITE}", f"out {HOST_IN_SITE}"}
    assert probe.bare == 0
    assert [policy.selector for policy in rig.entries()] == [SITE], "what does not overlap was deleted"
    rig.tracker.flush()
    assert rig.entries() == []


@pytest.mark.parametrize("profile", ["linux", "freebsd-13"])
def test_5000_policies(profile: str) -> None:
    rig = Rig(profile)
    rig.channel.inner.set_receive_buffer(1 << 20)  # type: ignore[attr-defined]
    many = [Selector(f"10.{n >> 8}.{n & 255}.0/24", "192.168.0.0/16") for n in range(5000)]
    with rig.tracker.transaction() as transaction:
        for selector in many:
            rig.tracker.add(OUT, selector, ESP)
    assert transaction.sent == (ADD,) * 5000
    with rig.tracker.transaction() as transaction:
        for selector in many:
            rig.tracker.replace(OUT, selector, ESP, REKEYED)
    assert transaction.sent == ()
    assert len(rig.embedded.policies()) == 5000
    rig.tracker.flush()
    assert rig.embedded.policies() == []


def test_one_within_another_is_part_of_it() -> None:
    rig = Rig("linux")
    with rig.tracker.transaction() as outer:
        rig.tracker.add(OUT, SITES[0], ESP)
        with rig.tracker.transaction() as inner:
            rig.tracker.add(OUT, SITES[1], ESP)
        assert rig.told() == []
        assert inner is outer
        rig.tracker.add_tunnel(SITE, ESP)
    assert len(outer.changes) == 5
    assert len(rig.told()) == 5


def test_transactions_of_several_threads_come_one_after_the_other() -> None:
    rig = Rig("freebsd-13")
    errors: list[BaseException] = []

    def work(number: int) -> None:
        assignment = Assignment(Template.tunnel("192.0.2.1", f"203.0.113.{number}", reqid=number), spi=number)
        try:
            for _ in range(8):
                with rig.tracker.transaction() as transaction:
                    for selector in SITES:
                        rig.tracker.add(OUT, selector, assignment)
                    rig.tracker.add(OUT, Selector(f"10.200.{number}.0/24", "0.0.0.0/0"), assignment)
                assert len(transaction.changes) == len(SITES) + 1
                rig.tracker.remove(OUT, Selector(f"10.200.{number}.0/24", "0.0.0.0/0"), assignment)
                with rig.tracker.transaction():
                    for selector in SITES:
                        rig.tracker.remove(OUT, selector, assignment)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert errors == []
    assert not any(thread.is_alive() for thread in threads)
    assert rig.embedded.policies() == []
    assert len(rig.tracker) == 0


def test_calls_of_another_thread_for_other_policies_are_not_held_up() -> None:
    rig = Rig("linux")
    rig.tracker.add(OUT, SITES[1], ESP)
    done = threading.Event()

    def other() -> None:
        rig.tracker.add(OUT, SITES[0], ESP)
        done.set()

    with rig.tracker.transaction():
        rig.tracker.add(OUT, SITES[1], MOVED)
        thread = threading.Thread(target=other)
        thread.start()
        assert done.wait(30)
        thread.join(30)
        assert rig.told()[-1] == (ADD, str(SITES[0]))
    rig.agrees()


def test_a_call_of_another_thread_for_a_policy_of_it_waits_for_its_end() -> None:
    rig = Rig("linux")
    done = threading.Event()

    def other() -> None:
        rig.tracker.add(OUT, SITES[0], MOVED)
        done.set()

    with rig.tracker.transaction():
        rig.tracker.add(OUT, SITES[0], ESP)
        thread = threading.Thread(target=other)
        thread.start()
        assert not done.wait(0.05)
        assert rig.told() == []
    thread.join(30)
    assert done.is_set()
    assert [kind for kind, _ in rig.told()] == [ADD, UPD]
    rig.agrees()


@pytest.mark.parametrize("profile", ALL)
def test_a_whole_tunnel(profile: str) -> None:
    rig = Rig(profile)
    ways = list(rig.abi.directions)
    added = rig.tracker.add_tunnel(SITE, ESP)
    assert [policy.direction for policy in rig.embedded.policies(IN)] == [IN]
    assert set(added.changes) == {(way, SITE if way is OUT else SITE.reversed()) for way in ways}
    assert rig.told()[-1] == (ADD, str(SITE)), "outbound last"
    (inbound,) = rig.entries(IN)
    assert inbound.templates == ESP.reversed().templates
    assert rig.tracker.replace_tunnel(SITE, ESP, REKEYED).sent == ()
    moved = rig.tracker.replace_tunnel(SITE, REKEYED, MOVED)
    assert moved.sent.count(UPD) == len(ways)
    rig.agrees()
    with rig.counting() as sent:
        rig.tracker.remove_tunnel(SITE, MOVED)
    assert [kind for kind, _ in sent] == [DEL] * len(ways)
    assert rig.embedded.policies() == []
    assert len(rig.tracker) == 0


def test_a_tunnel_whose_other_half_is_given() -> None:
    rig = Rig("linux")
    other = Assignment(Template.tunnel("198.51.100.1", "192.0.2.1", reqid=9), spi=9)
    rig.tracker.add_tunnel(SITE, ESP, other)
    assert {policy.templates for way in (IN, Direction.FWD) for policy in rig.entries(way)} == {other.templates}
    with pytest.raises(NotTracked):
        rig.tracker.remove_tunnel(SITE, ESP)
    assert len(rig.embedded.policies()) == 3
    rig.tracker.remove_tunnel(SITE, ESP, other)
    assert rig.embedded.policies() == []


@pytest.mark.parametrize("profile", BSD)
def test_a_transaction_of_updates_adds_and_removes_leaves_nothing_bare(profile: str) -> None:
    rig = Rig(profile)
    for selector in SITES[:4]:
        rig.tracker.add(OUT, selector, ESP)
    probes = [rig.embedded.probe(OUT, selector) for selector in SITES[:3]]
    for probe in probes:
        probe.arm()
    with rig.counting() as sent, rig.tracker.transaction():
        rig.tracker.replace(OUT, SITES[0], ESP, MOVED)
        rig.tracker.remove(OUT, SITES[1], ESP)
        rig.tracker.add(OUT, Selector("10.2.0.0/15", "192.168.0.0/16"), MOVED)
        rig.tracker.replace(OUT, SITES[2], ESP, DROP)
        rig.tracker.remove(OUT, SITES[3], ESP)
        rig.tracker.add(OUT, SITES[4], ESP)
    assert [probe.bare for probe in probes] == [0, 0, 0]
    kinds = [kind for kind, _ in sent]
    assert kinds[-2:] == [DEL, DEL], "what goes, goes last"
    rig.agrees()


# Lingering.


@pytest.mark.parametrize("profile", ALL)
def test_a_reauthentication_that_breaks_before_it_makes_costs_no_message(profile: str) -> None:
    rig = Rig(profile, linger=60)
    rig.tracker.add(OUT, SITE, ESP)
    with rig.counting() as sent, rig.embedded.probe(OUT, SITE) as probe:
        change = rig.tracker.remove(OUT, SITE, ESP)
        assert change.avoided == (DEL,)
        assert "it stays for a while" in change.reason
        assert rig.tracker.add(OUT, SITE, REKEYED).sent == ()
        rig.tracker.remove(OUT, SITE, REKEYED)
        assert rig.tracker.add(OUT, SITE, MOVED).sent == (UPD,)
    assert [kind for kind, _ in sent if kind is UPD] == [UPD]
    assert probe.bare == 0
    rig.tracker.close()
    rig.agrees()


def test_what_lingers_goes_when_its_time_is_over() -> None:
    rig = Rig("linux", linger=0.05)
    rig.tracker.add(OUT, SITES[0], ESP)
    rig.tracker.add(OUT, SITES[1], ESP)
    with rig.tracker.transaction():
        rig.tracker.remove(OUT, SITES[0], ESP)
    assert len(rig.entries()) == 2
    gone = threading.Event()
    rig.embedded.on_step.append(lambda name, kernel: gone.set())
    assert gone.wait(30)
    assert rig.tracker.add(OUT, SITES[0], ESP).sent in ((ADD,), (UPD,), ())
    rig.agrees()
    rig.tracker.close()


def test_what_has_lingered_is_forgotten() -> None:
    rig = Rig("linux", linger=60)
    rig.tracker.add(OUT, SITE, ESP)
    rig.tracker.remove(OUT, SITE, ESP)
    assert len(rig.tracker) == 1
    rig.tracker.close()
    assert rig.entries() == []
    assert len(rig.tracker) == 0


def test_the_end_of_lingering_does_not_wait_for_a_transaction_that_comes_for_what_it_holds() -> None:
    """A tunnel is removed out first and added in first, so that each side has what the other one wants."""
    rig = Rig("linux", linger=0.05)
    rig.tracker.add_tunnel(SITE, ESP)
    rig.tracker.remove_tunnel(SITE, ESP)

    def reauthenticate() -> None:
        with rig.tracker.transaction():
            rig.tracker.add(IN, SITE.reversed(), ESP.reversed())
            until = time.monotonic() + 5
            while rig.entries(OUT) and time.monotonic() < until:
                time.sleep(0.01)
            rig.tracker.add(OUT, SITE, ESP)

    thread = threading.Thread(target=reauthenticate, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert [len(rig.entries(direction)) for direction in (IN, OUT)] == [1, 1]
    rig.tracker.close()
    rig.agrees()


def test_a_thread_is_not_in_the_transaction_of_another_that_had_its_number() -> None:
    """One ends with its transaction open; the system gives its number to the next."""
    rig, kept, numbers, changes = Rig("linux"), [], [], []

    def leaves_it_open() -> None:
        def within() -> Iterator[None]:
            with rig.tracker.transaction():
                yield

        kept.append(within())
        next(kept[0])
        numbers.append(threading.get_ident())

    def adds() -> None:
        if threading.get_ident() == numbers[0]:
            changes.append(rig.tracker.add(OUT, SITE, ESP))

    for work in (leaves_it_open, *[adds] * 50):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if changes:
            break
    else:
        pytest.skip("no thread here got the number of one that had ended")
    assert changes[0].sent == (ADD,)
    kept[0].close()
    assert rig.held(SITE) is not None
