"""The tracker over a kernel in the process: every scenario, every fault, every profile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from faulty import (
    Fault,
    FaultyChannel,
    closes,
    interrupts,
    loses_reply,
    loses_request,
    no_buffers_after_work,
    no_permission,
    rejects,
    spoils,
)
from scenarios import ADD, DEL, MOVED, SCENARIOS, SITE, TRAP, UPD, Scenario, X, Y, check, in_kernel, run, tunnel

from pfkey import (
    Abi,
    Action,
    Assignment,
    ChannelClosed,
    Direction,
    EmbeddedKernel,
    EncodeError,
    ForeignPolicy,
    Kernel,
    KernelError,
    Level,
    Message,
    MessageType,
    NotSupported,
    NotTracked,
    Policy,
    PolicyTracker,
    ReplyTimeout,
    SAProtocol,
    Selector,
    Template,
    TransactionError,
    connect,
)
from pfkey.errors import PFKeyError
from pfkey.typed import selector_from

PROFILES = ["linux", "freebsd-12", "freebsd-13", "freebsd-14"]
OUT = Direction.OUT
OTHER_SITE = Selector("10.3.0.0/16", "10.4.0.0/16")


class Rig:
    """An embedded kernel, a faulty channel to it, a tracker over that; and a second, honest connection."""

    def __init__(self, profile: str, **how: object) -> None:
        self.embedded = EmbeddedKernel(profile)
        self.channel = FaultyChannel(self.embedded.connect())
        self.kernel = connect(self.channel, timeout=0.2)
        self.other = connect(self.embedded.connect())
        self.tracker = PolicyTracker(self.kernel, **how)  # type: ignore[arg-type]

    def writes(self) -> list[Message]:
        """What was sent that changes policies."""
        return [message for message in self.channel.sent if message.type in (ADD, UPD, DEL)]

    def is_guard(self, message: Message) -> bool:
        """Whether it is about an alias: a selector with host bits."""
        selector = selector_from(message)
        return selector is not None and selector.destination != selector.canonical().destination

    def fault(self, type: MessageType, send: Callable[[FaultyChannel, bytes], None], skip: int = 0) -> None:
        self.channel.faults.append(Fault(type, send, skip))

    def check(self) -> None:
        check(self.tracker, self.other, OUT, SITE)

    def held(self) -> Policy | None:
        return in_kernel(self.other, OUT, SITE)

    @property
    def abi(self) -> Abi:
        return self.kernel.abi


@pytest.fixture(params=PROFILES)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig(request.param)
    yield rig
    rig.kernel.close()
    rig.other.close()


PLAYED = [
    pytest.param(scenario, profile, id=f"{scenario}-{profile}")
    for scenario in SCENARIOS
    for profile in PROFILES
    if scenario.needs(EmbeddedKernel(profile).abi)
]


@pytest.mark.parametrize(("scenario", "profile"), PLAYED)
def test_scenario(scenario: Scenario, profile: str) -> None:
    with connect(f"embedded:{profile}") as kernel:
        run(scenario, kernel)


# What trackers in the field get wrong, and what ours does instead.


def test_41_a_foreign_policy_is_left_alone(rig: Rig) -> None:
    theirs = rig.other.add_policy(Policy(OUT, SITE, Action.DISCARD, priority=7))
    with pytest.raises(ForeignPolicy, match="belongs to somebody else") as raised:
        rig.tracker.add(OUT, SITE, X)
    assert isinstance(raised.value, FileExistsError)
    assert raised.value.policy == theirs or raised.value.policy.selector == SITE
    with pytest.raises(NotTracked):
        rig.tracker.remove(OUT, SITE, X)
    rig.tracker.flush()
    assert rig.other.get_policy(theirs.id).action == Action.DISCARD
    rig.other.delete_policy(theirs)
    assert rig.tracker.add(OUT, SITE, X).sent == (ADD,)
    rig.check()


def test_42_a_failed_add_does_not_suppress_the_next(rig: Rig) -> None:
    rig.fault(ADD, spoils)
    with pytest.raises(KernelError) as raised:
        rig.tracker.add(OUT, SITE, X)
    assert raised.value.name in ("EINVAL", "EPROTONOSUPPORT")
    assert raised.value.request.type == ADD
    assert rig.tracker.assignments(OUT, SITE) == ()
    rig.check()
    assert rig.tracker.add(OUT, SITE, Y).sent == (ADD,)
    rig.check()
    assert rig.tracker.remove(OUT, SITE, Y).sent == (DEL,)
    rig.check()


def test_43_a_rejected_update_leaves_the_previous_top_in_the_kernel(rig: Rig) -> None:
    rig.tracker.add(OUT, SITE, TRAP)
    rig.fault(UPD, spoils)
    with pytest.raises(KernelError) as raised:
        rig.tracker.add(OUT, SITE, X)
    assert rig.tracker.assignments(OUT, SITE) == (TRAP,)
    rig.check()
    if rig.abi.rejected_update_removes:
        assert "removes the policy in that case; it has been put back" in str(raised.value)
        assert rig.channel.types() == [ADD, ADD, UPD, ADD, DEL]  # under a guard, which goes last
    else:
        assert rig.channel.types() == [ADD, UPD]
    assert rig.tracker.add(OUT, SITE, X).sent == (UPD,)
    rig.check()


@pytest.mark.parametrize("profile", PROFILES[1:])
def test_43b_putting_it_back_fails_too(profile: str) -> None:
    rig = Rig(profile)
    rig.tracker.add(OUT, SITE, TRAP)
    rig.fault(UPD, spoils)
    for _ in range(3):
        rig.fault(ADD, rejects("ENOMEM"), skip=1)
    with pytest.raises(KernelError, match="putting it back failed too"):
        rig.tracker.add(OUT, SITE, X)
    (left,) = rig.other.dump_policies()
    assert str(left.selector.destination) == "10.2.0.1/16", "the guard stands"
    assert rig.tracker.add(OUT, SITE, X).sent == (ADD,)
    rig.check()
    assert len(rig.other.dump_policies()) == 1


def test_44_an_update_that_fails_for_want_of_memory(rig: Rig) -> None:
    rig.tracker.add(OUT, SITE, TRAP)
    rig.fault(UPD, rejects("ENOMEM"))
    with pytest.raises(KernelError, match=r"SPDUPDATE of out 10\.1\.0\.0/16 -> 10\.2\.0\.0/16.*ENOMEM"):
        rig.tracker.add(OUT, SITE, X)
    assert rig.tracker.assignments(OUT, SITE) == (TRAP,)
    with pytest.raises(NotTracked):
        rig.tracker.remove(OUT, SITE, X)
    rig.check()


def test_45_a_rejected_update_at_a_removal(rig: Rig) -> None:
    rig.tracker.add(OUT, SITE, TRAP)
    rig.tracker.add(OUT, SITE, X)
    rig.fault(UPD, rejects("ENOMEM"))
    with pytest.raises(KernelError):
        rig.tracker.remove(OUT, SITE, X)
    assert rig.tracker.assignments(OUT, SITE) == (TRAP,)
    assert rig.held() is not None
    rig.tracker.add(OUT, SITE, Assignment(*TRAP.templates, rank=TRAP.rank, spi=1))
    rig.check()


def test_46_flush_deletes_ours_alone_and_resets(rig: Rig) -> None:
    theirs = rig.other.add_policy(Policy(OUT, OTHER_SITE, Action.DISCARD, priority=7))
    rig.tracker.add(OUT, SITE, X)
    assert [change.sent for change in rig.tracker.flush()] == [(DEL,)]
    assert rig.channel.types() == [ADD, DEL]
    assert rig.other.get_policy(theirs.id).selector == OTHER_SITE
    assert rig.tracker.add(OUT, SITE, Y).sent == (ADD,)
    assert rig.tracker.remove(OUT, SITE, Y).sent == (DEL,)
    with pytest.raises(NotTracked):
        rig.tracker.remove(OUT, SITE, X)


def test_46b_flush_names_what_could_not_be_deleted_and_keeps_it(rig: Rig) -> None:
    rig.tracker.add(OUT, SITE, X)
    rig.tracker.add(OUT, OTHER_SITE, X)
    rig.fault(DEL, rejects("ENOMEM"))
    with pytest.raises(TransactionError, match=r"out 10\.1\.0\.0/16 -> 10\.2\.0\.0/16") as raised:
        rig.tracker.flush()
    assert list(raised.value.errors) == [f"out {SITE}"]
    assert [policy.selector for policy in rig.other.dump_policies()] == [SITE]
    rig.tracker.flush()
    assert rig.other.dump_policies() == []
    assert len(rig.tracker) == 0


def test_46c_ranges_are_refused_not_widened() -> None:
    for bad in ("10.1.0.1-10.1.0.9", "10.1.0.0/33"):
        with pytest.raises(ValueError, match=r"does not appear|netmask"):
            Selector(bad, "10.2.0.0/16")
    with pytest.raises((ValueError, TypeError)):
        Selector("10.1.0.0/16", "10.2.0.0/16", protocol="tcp", destination_port="80-90")  # type: ignore[arg-type]


def test_49_query_names_the_latest_id(rig: Rig) -> None:
    rig.tracker.add(OUT, SITE, TRAP)
    first = rig.tracker.query(OUT, SITE)
    rig.tracker.add(OUT, SITE, X)
    second = rig.tracker.query(OUT, SITE)
    assert (first.id != second.id) is rig.abi.update_changes_id
    assert second.id == rig.other.dump_policies()[0].id
    assert rig.tracker.find(second.id) == (OUT, SITE)
    asked = [message for message in rig.channel.sent if message.type == MessageType.SPDGET]
    assert asked[-1].policy is not None
    assert asked[-1].policy.id == second.id
    with pytest.raises(NotTracked):
        rig.tracker.query(OUT, OTHER_SITE)


@pytest.mark.parametrize("profile", PROFILES[1:])
def test_50_a_direction_that_the_kernel_lacks_raises(profile: str) -> None:
    rig = Rig(profile)
    for call in (rig.tracker.add, rig.tracker.remove):
        with pytest.raises(NotSupported, match=r"no policies of direction FWD"):
            call(Direction.FWD, SITE, X)
    with pytest.raises(NotSupported):
        rig.tracker.query(Direction.FWD, SITE)
    assert rig.channel.sent == []
    assert len(rig.tracker) == 0


def test_56_two_threads_end_and_begin(rig: Rig) -> None:
    rounds = 60

    def come_and_go(assignment: Assignment, errors: list[BaseException]) -> None:
        try:
            for _ in range(rounds):
                rig.tracker.add(OUT, SITE, assignment)
                rig.tracker.remove(OUT, SITE, assignment)
        except BaseException as error:
            errors.append(error)

    errors: list[BaseException] = []
    threads = [threading.Thread(target=come_and_go, args=(who, errors)) for who in (X, Y, MOVED)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert not any(thread.is_alive() for thread in threads)
    rig.check()
    types = [message.type for message in rig.writes() if not rig.is_guard(message)]
    assert types.count(ADD) == types.count(DEL) > 0
    standing = 0
    for kind in types:
        standing += {ADD: 1, DEL: -1}.get(kind, 0)
        assert standing in (0, 1)


# Doubt: the tracker knows what it does not know, and the next call reads and repairs.

DOUBTS = {
    "request lost": (loses_request, ReplyTimeout),
    "reply lost": (loses_reply, ReplyTimeout),
    "no buffers": (no_buffers_after_work, KernelError),
    "interrupt": (interrupts, KeyboardInterrupt),
}


@pytest.mark.parametrize("doubt", DOUBTS)
@pytest.mark.parametrize("kind", ["add", "update", "delete"])
def test_the_next_call_reads_and_repairs(rig: Rig, kind: str, doubt: str) -> None:
    send, error = DOUBTS[doubt]
    if kind != "add":
        rig.tracker.add(OUT, SITE, TRAP)
    rig.fault({"add": ADD, "update": UPD, "delete": DEL}[kind], send)
    with pytest.raises(error):
        if kind == "delete":
            rig.tracker.remove(OUT, SITE, TRAP)
        else:
            rig.tracker.add(OUT, SITE, X)
    expected = {"add": (X,), "update": (X, TRAP), "delete": ()}[kind]
    assert rig.tracker.assignments(OUT, SITE) == expected
    count = len(rig.channel.types())
    rig.tracker.add(OUT, SITE, Y)
    rig.check()
    if doubt != "request lost" and kind != "delete":
        assert len(rig.channel.types()) == count, "the work had been done, nothing more was needed"
    rig.tracker.flush()
    assert rig.other.dump_policies() == []
    assert len(rig.tracker) == 0


def test_a_reply_lost_after_a_removal_is_settled_by_flush(rig: Rig) -> None:
    rig.tracker.add(OUT, SITE, X)
    rig.fault(DEL, loses_request)
    with pytest.raises(ReplyTimeout):
        rig.tracker.remove(OUT, SITE, X)
    assert len(rig.tracker) == 1
    rig.tracker.flush()
    assert rig.held() is None


def test_when_reading_fails_too_what_was_ours_is_updated_and_nothing_deleted(rig: Rig) -> None:
    rig.tracker.add(OUT, SITE, TRAP)
    for kind in (MessageType.SPDGET, MessageType.SPDDUMP):
        for _ in range(6):
            rig.fault(kind, rejects("ENOMEM"))
    rig.fault(UPD, loses_request)
    with pytest.raises(ReplyTimeout):
        rig.tracker.add(OUT, SITE, X)
    rig.channel.faults.append(rig.channel.faults.pop(0))
    assert rig.tracker.add(OUT, SITE, Y).sent == (UPD,)
    rig.check()
    assert len(rig.other.dump_policies()) == 1


def test_when_reading_fails_too_nothing_is_deleted(rig: Rig) -> None:
    rig.tracker.add(OUT, SITE, X)
    rig.fault(DEL, loses_request)
    with pytest.raises(ReplyTimeout):
        rig.tracker.remove(OUT, SITE, X)
    for kind in (MessageType.SPDGET, MessageType.SPDDUMP):
        for _ in range(6):
            rig.fault(kind, rejects("ENOMEM"))
    with pytest.raises(TransactionError):
        rig.tracker.flush()
    assert rig.channel.types() == [ADD, DEL]
    rig.channel.faults.clear()
    rig.tracker.flush()
    assert rig.held() is None


def test_when_reading_fails_too_what_never_was_ours_is_not_touched(rig: Rig) -> None:
    rig.fault(ADD, loses_request)
    with pytest.raises(ReplyTimeout):
        rig.tracker.add(OUT, SITE, X)
    for kind in (MessageType.SPDGET, MessageType.SPDDUMP):
        for _ in range(3):
            rig.fault(kind, rejects("ENOMEM"))
    with pytest.raises(PFKeyError, match="could not be read"):
        rig.tracker.add(OUT, SITE, Y)
    assert rig.channel.types() == [ADD]
    rig.channel.faults.clear()
    assert rig.tracker.add(OUT, SITE, Y).sent == (ADD,)
    rig.check()


def test_an_add_of_unknown_outcome_does_not_claim_somebody_elses_policy(rig: Rig) -> None:
    rig.fault(ADD, loses_request)
    with pytest.raises(ReplyTimeout):
        rig.tracker.add(OUT, SITE, X)
    theirs = rig.other.add_policy(Policy(OUT, SITE, Action.DISCARD, priority=7))
    with pytest.raises(ForeignPolicy):
        rig.tracker.add(OUT, SITE, Y)
    assert rig.tracker.remove(OUT, SITE, X).sent == ()
    assert rig.other.get_policy(theirs.id).action == Action.DISCARD
    assert len(rig.tracker) == 0


def test_a_policy_that_was_deleted_behind_our_back(rig: Rig) -> None:
    rig.tracker.add(OUT, SITE, X)
    rig.other.flush_policies()
    assert rig.tracker.remove(OUT, SITE, X).sent == (DEL,)
    assert len(rig.tracker) == 0
    assert rig.tracker.add(OUT, SITE, Y).sent == (ADD,)
    rig.check()


def test_a_send_that_is_refused_changes_nothing(rig: Rig) -> None:
    rig.fault(ADD, no_permission)
    with pytest.raises(PermissionError):
        rig.tracker.add(OUT, SITE, X)
    assert rig.tracker.assignments(OUT, SITE) == ()
    assert rig.tracker.add(OUT, SITE, X).sent == (ADD,)
    rig.check()


def test_a_vanished_socket(rig: Rig) -> None:
    rig.tracker.add(OUT, SITE, TRAP)
    rig.fault(UPD, closes)
    with pytest.raises(ChannelClosed) as raised:
        rig.tracker.add(OUT, SITE, X)
    assert raised.value.request.type == UPD
    assert rig.tracker.assignments(OUT, SITE) == (X, TRAP)
    with pytest.raises(PFKeyError):
        rig.tracker.remove(OUT, SITE, X)
    with pytest.raises(ValueError, match="not of"):
        rig.tracker.reconnect(connect("embedded:linux" if rig.abi.name != "linux" else "embedded:freebsd-14"))
    rig.tracker.reconnect(rig.other)
    assert rig.tracker.add(OUT, SITE, Assignment(*TRAP.templates, rank=TRAP.rank, spi=1)).sent == (UPD,)
    rig.check()


# What is refused before anything is sent.

REFUSED = [
    ("ipsec without templates", Assignment(spi=1)),
    ("unique without a reqid", Assignment(Template.tunnel("192.0.2.1", "198.51.100.1", level=Level.UNIQUE))),
    ("a reqid that the kernel would replace", tunnel(1, reqid=16384)),
    ("a tunnel without end points", Assignment(Template(SAProtocol.ESP, 2, None, None, 1, Level.UNIQUE))),
]  # fmt: skip


@pytest.mark.parametrize(("what", "assignment"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_no_kernel_would_keep_is_refused(rig: Rig, what: str, assignment: Assignment) -> None:
    with pytest.raises((NotSupported, EncodeError)):
        rig.tracker.add(OUT, SITE, assignment)
    assert rig.channel.sent == []
    rig.tracker.add(OUT, SITE, X)
    with pytest.raises((NotSupported, EncodeError)):
        rig.tracker.replace(OUT, SITE, X, assignment)
    assert rig.tracker.assignments(OUT, SITE) == (X,)
    rig.check()


def test_a_rejected_replace_restores_the_list(rig: Rig) -> None:
    rig.tracker.add(OUT, SITE, X)
    rig.tracker.add(OUT, SITE, Y)
    rig.fault(UPD, spoils)
    with pytest.raises(KernelError):
        rig.tracker.replace(OUT, SITE, Y, MOVED)
    assert rig.tracker.assignments(OUT, SITE) == (Y, X)
    rig.check()
    with pytest.raises(NotTracked):
        rig.tracker.replace(OUT, SITE, MOVED, X)
    assert rig.tracker.replace(OUT, SITE, Y, MOVED).sent == (UPD,)
    assert rig.tracker.assignments(OUT, SITE) == (MOVED, X)
    rig.check()


def test_a_policy_that_the_kernel_stores_otherwise_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that replaces the reqid, as FreeBSD does above 16383: the echo is compared with what was asked."""
    rig = Rig("freebsd-13")
    monkeypatch.setattr(Kernel, "check_policy", lambda self, policy: None)
    rig.tracker.add(OUT, SITE, TRAP)
    with pytest.raises(NotSupported, match=r"stored .*/unique:1638\d.* not .*/unique:20000"):
        rig.tracker.add(OUT, SITE, tunnel(1, reqid=20000))
    assert rig.tracker.assignments(OUT, SITE) == (TRAP,)
    rig.check()


def test_never_delete_then_add_for_a_change(rig: Rig) -> None:
    """The core promise: over every relevant change the messages are updates."""
    rig.tracker.add(OUT, SITE, X)
    for assignment in (MOVED, TRAP, Y, tunnel(3, reqid=9), Assignment(*X.templates, action=Action.DISCARD)):
        rig.tracker.add(OUT, SITE, assignment)
        rig.check()
    types = [message.type for message in rig.writes() if message.policy and not rig.is_guard(message)]
    assert types[0] == ADD
    assert set(types[1:]) == {UPD}
