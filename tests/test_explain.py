"""What a tracker says: explanations that agree with what is then done, warnings, reasons, use times, ids."""

from __future__ import annotations

import pytest
from faulty import loses_request, rejects
from rig import ALL, BSD, DROP, ESP, LISTS, MOVED, OUT, REKEYED, Rig
from scenarios import ADD, DEL, UPD

from pfkey import (
    Action,
    Assignment,
    Direction,
    MessageType,
    NotSupported,
    NotTracked,
    PFKeyError,
    Policy,
    Selector,
    Template,
)

SITE = Selector("10.1.0.0/16", "10.2.0.0/16")
HOSTS = Selector("10.1.0.2", "10.2.0.2")
HOSTS6 = Selector("2001:db8:1::2", "2001:db8:2::2")
WIDE = Selector("10.0.0.0/8", "10.0.0.0/8")
DIFFERS = "what the assignment on top asks for differs from what the kernel holds"
UNLINKS = "FreeBSD 13 removes a policy before it inserts the next one"
TIE = "which of them wins differs between kernels and changes with updates: give one a priority"
STRONG, WEAK = (Assignment(*ESP.templates, priority=priority) for priority in (1000, 2000))


@pytest.mark.parametrize("selector", [SITE, HOSTS, HOSTS6], ids=str)
@pytest.mark.parametrize("profile", ALL)
def test_what_it_would_send_is_what_the_next_call_sends(profile: str, selector: Selector) -> None:
    """A transaction puts the list into a state that the kernel has not heard of: ask there, then let it end."""
    rig = Rig(profile)
    lists = ((), (ESP,), (ESP, MOVED), (MOVED,), (DROP,), (DROP, ESP), ())
    before: tuple[Assignment, ...] = ()
    for beside in (False, True):
        if beside:
            for other in (WIDE, Selector("10.1.0.0/16", "10.2.0.0/16", protocol="tcp")):
                rig.tracker.add(OUT, other, ESP)
        for then in lists:
            with rig.counting() as sent, rig.tracker.transaction() as transaction:
                for assignment in before:
                    rig.tracker.remove(OUT, selector, assignment)
                for assignment in then:
                    rig.tracker.add(OUT, selector, assignment)
                said = rig.tracker.explain(OUT, selector)
            change = transaction.changes.get((OUT, selector))
            assert said.would_send == (change.sent if change else ())
            assert sorted(said.would_guard) == sorted(change.guard if change else ())
            assert len(sent) == len(said.would_send) + len(said.would_guard)
            assert said.assignments == tuple(reversed(then))
            before = then


def test_a_guard_for_templates_that_freebsd_14_has_not_stored_yet_is_told() -> None:
    rig = Rig("freebsd-14")
    new = Assignment(Template.transport(reqid=2))
    rig.tracker.add(OUT, WIDE, ESP)
    rig.tracker.add(OUT, SITE, ESP)
    with rig.tracker.transaction() as transaction:
        rig.tracker.replace(OUT, SITE, ESP, new)
        said = rig.tracker.explain(OUT, SITE)
    assert transaction.changes[OUT, SITE].guard == said.would_guard == (ADD, DEL)
    assert "has not stored such templates yet" in said.reason


def test_the_text_for_people() -> None:
    rig = Rig("freebsd-13")
    rig.tracker.add(OUT, SITE, ESP)
    with rig.tracker.transaction():
        rig.tracker.add(OUT, SITE, MOVED)
        text = str(rig.tracker.explain(OUT, SITE))
    assert text.splitlines() == [
        "out 10.1.0.0/16 -> 10.2.0.0/16 (id 1)",
        "  the kernel should hold: ipsec esp/tunnel/192.0.2.1-203.0.113.1/unique:1, priority 383615",
        "  the kernel holds ipsec esp/tunnel/192.0.2.1-198.51.100.1/unique:1, priority 383615",
        f"  would be sent: SPDADD, SPDUPDATE, SPDDELETE: {DIFFERS}; guarded: {UNLINKS}",
        "  on top: Assignment(esp/tunnel/192.0.2.1-203.0.113.1/unique:1, spi=0xc0000003)",
        "       2: Assignment(esp/tunnel/192.0.2.1-198.51.100.1/unique:1, spi=0xc0000001)",
    ]


@pytest.mark.parametrize("profile", ALL)
def test_what_is_not_tracked(profile: str) -> None:
    rig = Rig(profile)
    said = rig.tracker.explain(OUT, SITE)
    assert (said.would_send, said.desired) == ((), "nothing")
    assert said.installed == "it is not tracked, so whether the kernel holds one of somebody else was not looked at"
    assert "nothing uses it" in str(said)
    assert len(rig.tracker) == 0
    assert rig.channel.sent == []


def test_a_direction_that_the_system_lacks() -> None:
    with pytest.raises(NotSupported, match="no policies of direction FWD"):
        Rig("freebsd-13").tracker.explain(Direction.FWD, SITE)


@pytest.mark.parametrize("profile", ALL)
def test_what_is_not_certain_would_be_read(profile: str) -> None:
    rig = Rig(profile)
    rig.fault(ADD, loses_request)
    with pytest.raises(PFKeyError):
        rig.tracker.add(OUT, SITE, ESP)
    said = rig.tracker.explain(OUT, SITE)
    assert said.would_send == (MessageType.SPDDUMP,)
    assert "is not certain, so it is read first" in said.reason
    assert "is not known" in said.installed
    assert rig.tracker.add(OUT, SITE, REKEYED).reason.endswith("(it was read)")


def test_what_lingers_stays() -> None:
    rig = Rig("linux", linger=60)
    rig.tracker.add(OUT, SITE, ESP)
    rig.tracker.remove(OUT, SITE, ESP)
    said = rig.tracker.explain(OUT, SITE)
    assert said.would_send == ()
    assert "it stays for a while" in said.reason
    rig.tracker.close()


# Every Change says why.


@pytest.mark.parametrize("profile", ALL)
def test_every_change_says_what_was_sent_what_was_avoided_and_why(profile: str) -> None:
    rig = Rig(profile)
    change = rig.tracker.add(OUT, SITE, ESP)
    assert (change.sent, change.avoided, change.reason) == ((ADD,), (), "the kernel held no policy")
    change = rig.tracker.add(OUT, SITE, REKEYED)
    assert (change.sent, change.avoided) == ((), (UPD,))
    assert change.reason == "what the kernel holds is what the assignment on top asks for"
    change = rig.tracker.remove(OUT, SITE, ESP)
    assert (change.sent, change.avoided) == ((), ()), "the one below was on nobody's mind"
    change = rig.tracker.add(OUT, SITE, MOVED)
    assert change.reason.startswith(DIFFERS)
    rig.tracker.remove(OUT, SITE, MOVED)
    change = rig.tracker.remove(OUT, SITE, REKEYED)
    assert (change.sent, change.reason) == ((DEL,), "no assignment is left")
    assert repr(change) == "Change(sent=(SPDDELETE,))"


# Equal priorities.


@pytest.mark.parametrize("profile", [name for name in ALL if name not in LISTS])
def test_equal_priorities_of_overlapping_policies_are_warned_about(profile: str) -> None:
    rig = Rig(profile)
    assert rig.tracker.add(OUT, SITE, STRONG).warnings == ()
    change = rig.tracker.add(OUT, WIDE, STRONG)
    assert change.warnings == (
        f"out {WIDE} and out {SITE} match some of the same packets with equal priorities (1000); {TIE}",
    )
    assert rig.tracker.explain(OUT, SITE).warnings != ()
    assert "warning: out" in str(rig.tracker.explain(OUT, WIDE))
    assert rig.tracker.add(OUT, Selector("10.0.0.0/9", "10.0.0.0/8"), WEAK).warnings == ()
    assert rig.tracker.add(OUT, Selector("192.168.0.0/16", "10.0.0.0/8"), STRONG).warnings == ()
    assert rig.tracker.add(Direction.IN, SITE, STRONG).warnings == ()
    assert rig.tracker.replace(OUT, WIDE, STRONG, WEAK).warnings != (), "now it is tied with the /9"
    assert rig.tracker.explain(OUT, SITE).warnings == ()


def test_of_many_ties_three_are_named() -> None:
    rig = Rig("linux")
    for number in range(6):
        rig.tracker.add(OUT, Selector(f"10.{number}.0.0/16", "10.0.0.0/8"), STRONG)
    warnings = rig.tracker.add(OUT, WIDE, STRONG).warnings
    assert len(warnings) == 4
    assert warnings[-1] == "and others"


@pytest.mark.parametrize("profile", LISTS)
def test_where_there_are_no_priorities_there_are_no_ties(profile: str) -> None:
    rig = Rig(profile)
    rig.tracker.add(OUT, SITE, STRONG)
    assert rig.tracker.add(OUT, WIDE, STRONG).warnings == ()


@pytest.mark.parametrize("profile", ALL)
def test_a_policy_that_the_kernel_finds_for_no_packet_is_told(profile: str) -> None:
    rig = Rig(profile)
    pings = Selector("10.1.0.0/16", "10.2.0.0/16", protocol="icmp", icmp_type=8)
    warnings = rig.tracker.add(OUT, pings, ESP).warnings
    rig.tracker.add(OUT, Selector("2001:db8:1::/48", "2001:db8:2::/48", protocol="icmp6", icmp_type=128), ESP)
    packet = rig.embedded.packet(OUT, "10.1.0.1", "10.2.0.1", protocol=1, ports=(8, 0))
    assert bool(warnings) == (packet.policy is None)
    assert rig.tracker.explain(OUT, pings).warnings == warnings
    if warnings:
        assert "matches no packet; leave them out" in warnings[0]


# Asking the kernel.


@pytest.mark.parametrize("profile", ALL)
def test_query_gives_last_use_where_the_kernel_keeps_it(profile: str) -> None:
    rig = Rig(profile)
    rig.tracker.add(OUT, SITE, ESP)
    before = rig.tracker.query(OUT, SITE)
    assert before.templates == ESP.templates
    rig.embedded.advance(100)
    rig.embedded.packet(OUT, "10.1.0.1", "10.2.0.1")
    after = rig.tracker.query(OUT, SITE)
    assert after.lifetime_current is not None
    assert before.lifetime_current is not None
    if profile in BSD:
        assert after.lifetime_current.usetime - before.lifetime_current.usetime in (99, 100, 101)
    with pytest.raises(NotTracked, match="is not tracked"):
        rig.tracker.query(OUT, WIDE)


@pytest.mark.parametrize("profile", ALL)
def test_query_of_what_somebody_deleted(profile: str) -> None:
    rig = Rig(profile)
    rig.tracker.add(OUT, SITE, ESP)
    rig.other.flush_policies()
    with pytest.raises(NotTracked, match="is not in the kernel; the kernel holds nothing"):
        rig.tracker.query(OUT, SITE)
    assert rig.tracker.add(OUT, SITE, REKEYED).sent == (ADD,)


@pytest.mark.parametrize("profile", ALL)
def test_find_turns_the_id_of_an_acquire_into_its_policy(profile: str) -> None:
    rig = Rig(profile)
    rig.kernel.register()
    rig.tracker.add(OUT, SITE, ESP)
    rig.tracker.add(OUT, SITE, MOVED)
    rig.embedded.packet(OUT, "10.1.0.1", "10.2.0.1")
    acquire = next(message for message in rig.kernel.events(0.2) if message.type == MessageType.ACQUIRE)
    assert acquire.policy is not None
    assert rig.tracker.find(acquire.policy.id) == (OUT, SITE)
    assert rig.tracker.find(0) is None
    assert rig.tracker.find(99999) is None
    rig.tracker.flush()
    assert rig.tracker.find(acquire.policy.id) is None


# Errors read like advice.


def test_errors_say_what_was_done_to_what_what_the_kernel_said_and_what_came_of_it() -> None:
    rig = Rig("freebsd-13")
    rig.tracker.add(OUT, SITE, ESP)
    rig.embedded.fail_next(UPD, "EINVAL", "unlinked")
    with pytest.raises(PFKeyError) as raised:
        rig.tracker.add(OUT, SITE, MOVED)
    assert str(raised.value) == (
        "SPDUPDATE of out 10.1.0.0/16 -> 10.2.0.0/16 was rejected (EINVAL); FreeBSD 13 removes the policy in that case;"
        " it has been put back"
    )
    rig = Rig("linux")
    rig.fault(DEL, rejects("EPERM"))
    rig.tracker.add(OUT, SITE, ESP)
    with pytest.raises(
        PermissionError, match=r"SPDDELETE of out 10\.1\.0\.0/16 -> 10\.2\.0\.0/16 was rejected \(EPERM"
    ):
        rig.tracker.remove(OUT, SITE, ESP)
    with pytest.raises(NotTracked, match=r"out 10\.1.* is not used by .*; it is used by|nothing does"):
        rig.tracker.remove(OUT, SITE, ESP)
    rig.tracker.flush()
    rig.other.add_policy(Policy(OUT, SITE, Action.DISCARD, priority=5))
