"""Guards when something goes wrong: refused, not answered, left behind, not wanted by who set the tracker up."""

from __future__ import annotations

import pytest
from faulty import Fault, FaultyChannel, interrupts, loses_reply, loses_request, rejects
from rig import ALL, BSD, DROP, ESP, IN, MOVED, OUT, REKEYED, UNLINK_FIRST, Rig
from scenarios import ADD, DEL, UPD

from pfkey import (
    Action,
    Assignment,
    Direction,
    KernelError,
    MessageType,
    PFKeyError,
    Policy,
    Rank,
    SAProtocol,
    Selector,
    Template,
    settle,
)
from pfkey.guards import (
    Guard,
    alias_selectors,
    guard_policies,
)

SITE = Selector("10.1.0.0/16", "10.2.0.0/16")
HOSTS = Selector("10.1.0.2", "10.2.0.2")
HOSTS6 = Selector("2001:db8:1::2", "2001:db8:2::2")
ELSEWHERE = Selector("10.8.0.0/16", "10.9.0.0/16")
GUARDED = (ADD, DEL)
WAYS = pytest.mark.parametrize("direction", [IN, OUT])


@WAYS
@pytest.mark.parametrize("selector", [SITE, HOSTS, HOSTS6], ids=str)
@pytest.mark.parametrize("profile", UNLINK_FIRST)
def test_a_rejected_guard_leaves_the_old_policy(profile: str, selector: Selector, direction: Direction) -> None:
    rig = Rig(profile)
    rig.tracker.add(direction, selector, ESP)
    rig.fault(ADD, rejects("EPROTONOSUPPORT"))
    told = r"was to guard an update \(.* removes a policy before .* still is ipsec"
    probe = rig.embedded.probe(direction, selector)
    with probe, rig.counting() as sent, pytest.raises(KernelError, match=told):
        rig.tracker.add(direction, selector, MOVED)
    assert [kind for kind, _ in sent] == [ADD]
    assert probe.steps == 0
    assert rig.tracker.assignments(direction, selector) == (ESP,)
    rig.agrees()
    assert rig.tracker.add(direction, selector, MOVED).sent == (UPD,)
    rig.agrees()


@WAYS
@pytest.mark.parametrize("profile", UNLINK_FIRST)
@pytest.mark.parametrize("selector", [SITE, HOSTS, HOSTS6], ids=str)
def test_a_selector_that_somebody_else_has_is_not_touched(
    profile: str, selector: Selector, direction: Direction
) -> None:
    rig = Rig(profile)
    rig.tracker.add(direction, selector, ESP)
    first = guard_policies(rig.held(selector, direction), None, rig.abi, Guard.AUTO, 1)[0].selector  # type: ignore[arg-type]
    theirs = rig.other.add_policy(Policy(direction, first, Action.NONE, priority=4 if rig.abi.has_priority else 0))
    with rig.counting() as sent:
        change = rig.tracker.add(direction, selector, MOVED)
    assert change.sent == (UPD,)
    assert change.guard == (ADD, ADD, DEL)
    assert sent[0][1] != sent[1][1] == sent[3][1]
    assert rig.other.get_policy(theirs.id).action == Action.NONE
    assert len(rig.entries(direction)) == 2


def test_when_all_candidates_are_taken_nothing_is_updated() -> None:
    rig = Rig("freebsd-13")
    rig.tracker.add(OUT, SITE, ESP)
    policy = rig.held(SITE)
    assert policy is not None
    for guard in guard_policies(policy, None, rig.abi, Guard.AUTO, 1):
        rig.other.add_policy(Policy(OUT, guard.selector, Action.NONE, priority=900000))
    with pytest.raises(FileExistsError, match="was not updated and still is"):
        rig.tracker.add(OUT, SITE, MOVED)
    assert rig.held(SITE).templates == ESP.templates  # type: ignore[union-attr]


def test_a_guard_that_was_never_answered_is_not_deleted_unless_it_is_ours() -> None:
    """The answer was EEXIST and got lost: somebody else has that selector, and SPDDELETE would hit theirs."""
    for fault in (loses_request, loses_reply):
        rig = Rig("freebsd-13")
        rig.tracker.add(OUT, SITE, ESP)
        alias = next(alias_selectors(SITE, rig.abi))
        theirs = rig.other.add_policy(Policy(OUT, alias, Action.DISCARD, priority=900000))
        rig.fault(ADD, fault)
        with pytest.raises(PFKeyError, match="was to guard an update"):
            rig.tracker.add(OUT, SITE, MOVED)
        assert [policy.id for policy in rig.entries()][-1] == theirs.id
        rig.tracker.add(OUT, SITE, MOVED)
        rig.tracker.flush()
        assert [policy.id for policy in rig.entries()] == [theirs.id]


def test_a_guard_that_was_never_answered_stays_while_nobody_can_tell_whose_it_is() -> None:
    rig = Rig("freebsd-13")
    rig.tracker.add(OUT, SITE, ESP)
    rig.fault(ADD, loses_reply)
    for _ in range(2):
        rig.fault(MessageType.SPDDUMP, rejects("ENOMEM"))
    with pytest.raises(PFKeyError, match="was to guard an update"):
        rig.tracker.add(OUT, SITE, MOVED)
    assert len(rig.guards()) == 1
    rig.tracker.add(OUT, SITE, MOVED)
    rig.agrees()


@pytest.mark.parametrize("profile", BSD)
def test_a_guard_whose_deletion_was_not_answered_is_looked_for(profile: str) -> None:
    rig = Rig(profile)
    rig.tracker.add(OUT, SITE, ESP)
    rig.channel.faults.append(Fault(DEL, loses_reply))
    change = rig.tracker.add(OUT, SITE, MOVED)
    assert "could not be deleted" not in change.reason
    rig.agrees()


@pytest.mark.parametrize("fault", [rejects("ENOMEM"), loses_request], ids=["rejected", "lost"])
@WAYS
@pytest.mark.parametrize("profile", BSD)
def test_a_guard_that_cannot_be_deleted_goes_with_the_next_call(
    profile: str, direction: Direction, fault: object
) -> None:
    rig = Rig(profile)
    rig.tracker.add(direction, SITE, ESP)
    rig.channel.faults.append(Fault(DEL, fault))  # type: ignore[arg-type]
    change = rig.tracker.add(direction, SITE, MOVED)
    assert change.sent == (UPD,)
    assert "could not be deleted and stays until the next call" in change.reason
    assert "guard of a former update is still there" in rig.tracker.explain(direction, SITE).reason
    rig.tracker.add(direction, SITE, MOVED)
    rig.agrees()
    rig.channel.faults.append(Fault(DEL, fault))  # type: ignore[arg-type]
    rig.tracker.add(direction, SITE, ESP)
    rig.tracker.flush()
    assert rig.embedded.policies() == []


@pytest.mark.parametrize("profile", UNLINK_FIRST)
def test_behind_a_stale_guard_that_will_not_go_nothing_is_updated(profile: str) -> None:
    rig = Rig(profile)
    rig.tracker.add(OUT, SITE, ESP)
    for _ in range(3):
        rig.fault(DEL, rejects("ENOMEM"))
    rig.tracker.add(OUT, SITE, MOVED)
    with pytest.raises(PFKeyError, match=r"a guard of a former update .* could not be deleted and would stay"):
        rig.tracker.add(OUT, SITE, ESP)
    rig.tracker.add(OUT, SITE, ESP)
    rig.agrees()


@WAYS
@pytest.mark.parametrize("selector", [SITE, HOSTS, HOSTS6], ids=str)
@pytest.mark.parametrize("profile", BSD)
def test_a_rejected_update_is_put_back_under_the_guard(profile: str, selector: Selector, direction: Direction) -> None:
    rig = Rig(profile)
    rig.tracker.add(direction, selector, ESP)
    rig.tracker.add(direction, ELSEWHERE, ESP)
    rig.embedded.fail_next(UPD, "EINVAL", "unlinked")
    with rig.embedded.probe(direction, selector) as probe, pytest.raises(KernelError) as raised:
        rig.tracker.add(direction, selector, MOVED)
    assert str(raised.value) == (
        f"SPDUPDATE of {direction.name.lower()} {selector} was rejected (EINVAL); {rig.abi} removes the policy in that"
        " case; it has been put back"
    )
    assert rig.tracker.assignments(direction, selector) == (ESP,)
    if rig.abi.update_unlinks_first:
        assert probe.bare == 0
    rig.agrees()


@pytest.mark.parametrize("profile", ALL)
def test_an_interrupt_at_every_message_leaves_no_guard_and_no_gap(profile: str) -> None:
    for kind in (ADD, UPD, DEL):
        rig = Rig(profile, guard="alias")
        rig.tracker.add(OUT, SITE, ESP)
        rig.fault(kind, interrupts)
        with rig.embedded.probe(OUT, SITE) as probe:
            with pytest.raises(KeyboardInterrupt):
                rig.tracker.add(OUT, SITE, MOVED)
            assert rig.guards() == []
            rig.tracker.add(OUT, SITE, MOVED)
        assert probe.bare == 0
        rig.agrees()


# Settings.


@pytest.mark.parametrize("profile", ALL)
def test_guard_alias_guards_every_update(profile: str) -> None:
    rig = Rig(profile, guard="alias")
    for selector in (SITE, ELSEWHERE):
        rig.tracker.add(OUT, selector, ESP)
    assert rig.tracker.add(OUT, SITE, MOVED).guard == GUARDED
    assert rig.tracker.add(OUT, SITE, REKEYED).guard == GUARDED
    rig.agrees()


@pytest.mark.parametrize("profile", UNLINK_FIRST)
def test_guard_discard_drops_packets_instead(profile: str) -> None:
    rig = Rig(profile, guard="discard")
    rig.tracker.add(OUT, SITE, ESP)
    with rig.embedded.probe(OUT, SITE) as probe:
        assert rig.tracker.add(OUT, SITE, MOVED).guard == GUARDED
    assert Action.DISCARD in {step.policy.action for step in probe.log if step.policy}
    assert probe.bare == 0
    rig.agrees()


@pytest.mark.parametrize("profile", UNLINK_FIRST)
def test_host_guard_bare_is_for_two_hosts_alone(profile: str) -> None:
    rig = Rig(profile, host_guard="bare")
    for selector in (ELSEWHERE, HOSTS, HOSTS6):
        rig.tracker.add(OUT, selector, ESP)
    assert rig.tracker.add(OUT, HOSTS, MOVED).guard == ()
    assert rig.tracker.add(OUT, ELSEWHERE, MOVED).guard == GUARDED
    assert rig.tracker.add(OUT, HOSTS6, MOVED).guard == GUARDED, "there is an alias"


def test_what_is_no_setting() -> None:
    for how in ({"guard": "always"}, {"host_guard": ""}, {"ownership": "steal"}, {"linger": -1}):
        (name,) = how
        with pytest.raises(ValueError, match=f"^{name} is (one of|a number)"):
            Rig("linux", **how)


@pytest.mark.parametrize("profile", ALL)
def test_several_policies_at_once_stand_behind_three_barriers(profile: str) -> None:
    """All guards, then all updates, then all deletions, as they come on the wire."""
    rig = Rig(profile, guard="alias")
    sites = [Selector(f"10.{number}.0.0/16", "192.168.0.0/16") for number in range(1, 9)]
    for selector in sites:
        rig.tracker.add(OUT, selector, ESP)
    probes = [rig.embedded.probe(OUT, selector) for selector in sites]
    for probe in probes:
        probe.arm()
    with rig.counting() as sent, rig.tracker.transaction() as transaction:
        for selector in sites:
            rig.tracker.replace(OUT, selector, ESP, MOVED)
    assert [kind for kind, _ in sent] == [ADD] * 8 + [UPD] * 8 + [DEL] * 8
    assert {change.guard for change in transaction.changes.values()} == {GUARDED}
    assert [probe.bare for probe in probes] == [0] * 8
    rig.agrees()


@pytest.mark.parametrize("profile", UNLINK_FIRST)
def test_of_several_the_one_whose_guard_failed_is_left_alone(profile: str) -> None:
    rig = Rig(profile)
    sites = [Selector(f"10.{number}.0.0/16", "192.168.0.0/16") for number in range(1, 5)]
    for selector in sites:
        rig.tracker.add(OUT, selector, ESP)
    rig.fault(ADD, rejects("ENOMEM"), skip=1)
    rig.embedded.fail_next(UPD, "ENOBUFS", "unlinked")
    with pytest.raises(PFKeyError, match="2 policies could not be brought") as raised, rig.tracker.transaction():
        for selector in sites:
            rig.tracker.replace(OUT, selector, ESP, MOVED)
    assert {str(name) for name in raised.value.errors} == {f"out {sites[0]}", f"out {sites[1]}"}  # type: ignore[attr-defined]
    assert [rig.held(selector).templates for selector in sites] == [  # type: ignore[union-attr]
        *(ESP.templates,) * 2, *(MOVED.templates,) * 2,
    ]  # fmt: skip
    rig.agrees()


def test_a_trap_becomes_an_sa_without_a_guard_on_linux_and_with_one_on_freebsd_13() -> None:
    for profile, guard in (("linux", ()), ("freebsd-13", GUARDED)):
        rig = Rig(profile)
        rig.tracker.add(OUT, SITE, Assignment(*ESP.templates, rank=Rank.TRAP))
        assert rig.tracker.add(OUT, SITE, ESP).guard == guard


def test_a_drop_that_becomes_an_sa_meets_the_drop_or_the_sa() -> None:
    for profile in BSD:
        rig = Rig(profile)
        rig.tracker.add(OUT, SITE, DROP)
        with rig.embedded.probe(OUT, SITE) as probe:
            rig.tracker.replace(OUT, SITE, DROP, ESP)
        assert probe.bare == 0
        assert {step.policy.action for step in probe.log if step.policy} <= {Action.DISCARD, Action.IPSEC}


def test_a_channel_that_fails_in_the_middle_of_a_guarded_update(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(channel: FaultyChannel, data: bytes) -> None:
        raise OSError(32, "Broken pipe")

    rig = Rig("freebsd-13")
    rig.tracker.add(OUT, SITE, ESP)
    rig.fault(UPD, gone)
    with rig.embedded.probe(OUT, SITE) as probe:
        with pytest.raises(PFKeyError):
            rig.tracker.add(OUT, SITE, MOVED)
        rig.tracker.reconnect(rig.other)
        rig.tracker.add(OUT, SITE, MOVED)
    assert probe.bare == 0
    rig.agrees()


@pytest.mark.parametrize("selector", [SITE, HOSTS, HOSTS6], ids=str)
@pytest.mark.parametrize("profile", ALL)
def test_an_update_that_was_refused_before_the_old_one_went_says_what_stands(profile: str, selector: Selector) -> None:
    rig = Rig(profile)
    rig.tracker.add(OUT, selector, ESP)
    rig.embedded.fail_next(UPD, "EINVAL", "before")
    told = r"SPDUPDATE of .* was rejected \(EINVAL\); the kernel holds ipsec esp/tunnel/192\.0\.2\.1-198"
    with pytest.raises(KernelError, match=told) as raised:
        rig.tracker.add(OUT, selector, MOVED)
    assert str(raised.value).count("the kernel holds") == 1
    assert "put back" not in str(raised.value)
    rig.agrees()


@pytest.mark.parametrize("profile", UNLINK_FIRST)
def test_the_policies_are_read_once_when_an_update_was_refused_under_its_alias(profile: str) -> None:
    """The alias has the selector of the policy, as far as a tracker tells selectors apart, and is not that policy."""
    rig = Rig(profile)
    rig.tracker.add(OUT, ELSEWHERE, ESP)
    rig.tracker.add(OUT, SITE, ESP)
    rig.embedded.fail_next(UPD, "EPROTONOSUPPORT", "unlinked")
    before = len(rig.channel.sent)
    with pytest.raises(KernelError, match="it has been put back"):
        rig.tracker.add(OUT, SITE, MOVED)
    kinds = [message.type for message in rig.channel.sent[before:]]
    assert kinds.count(MessageType.SPDDUMP) == 1
    assert kinds.count(MessageType.SPDADD) == 2
    rig.agrees()


@WAYS
@pytest.mark.parametrize("selector", [SITE, HOSTS6], ids=str)
def test_freebsd_14_is_asked_about_templates_that_it_never_stored(selector: Selector, direction: Direction) -> None:
    """It removes a policy whose update it rejects: among others too, and for a protocol that it was built without."""
    rig = Rig("freebsd-14")
    ah = Template.tunnel("192.0.2.1", "203.0.113.1", reqid=1, protocol=SAProtocol.AH)
    rig.tracker.add(direction, ELSEWHERE, ESP)
    rig.tracker.add(direction, selector, ESP)
    rig.fault(ADD, rejects("EPROTONOSUPPORT"))
    with rig.embedded.probe(direction, selector) as probe, pytest.raises(KernelError, match="still is ipsec"):
        rig.tracker.add(direction, selector, Assignment(ah))
    assert probe.steps == 0
    rig.agrees()
    assert rig.tracker.add(direction, selector, MOVED).guard == (), "of the kind that stands"
    assert rig.tracker.add(direction, selector, Assignment(ah)).guard == GUARDED
    assert rig.tracker.add(direction, selector, DROP).guard == ()
    again = Assignment(Template.tunnel("192.0.2.1", "192.0.2.9", reqid=5, protocol=SAProtocol.AH))
    assert rig.tracker.add(direction, selector, again).guard == (), "of a kind that was stored"
    rig.agrees()


def test_freebsd_14_need_not_be_asked_about_what_a_former_life_had_stored() -> None:
    rig = Rig("freebsd-14", owner="d")
    for selector in (ELSEWHERE, SITE):
        rig.tracker.add(OUT, selector, ESP)
    tracker = rig.restart(owner="d")
    for selector in (ELSEWHERE, SITE):
        tracker.add(OUT, selector, ESP)
    assert tracker.add(OUT, SITE, MOVED).guard == ()


@pytest.mark.parametrize("profile", UNLINK_FIRST)
def test_an_update_is_tried_again_when_the_guard_in_its_way_has_gone(profile: str) -> None:
    """A guard of the update before could not be deleted, at first not now either, and at the end it could."""
    rig = Rig(profile)
    rig.tracker.add(OUT, ELSEWHERE, ESP)
    rig.tracker.add(OUT, SITE, ESP)
    rig.fault(DEL, rejects("ENOMEM"))
    rig.tracker.replace(OUT, SITE, ESP, MOVED)
    assert rig.guards() != []
    rig.fault(DEL, rejects("ENOMEM"))
    with rig.embedded.probe(OUT, SITE) as probe:
        change = rig.tracker.replace(OUT, SITE, MOVED, ESP)
    assert change.sent == (UPD,)
    assert "stays" not in change.reason
    assert probe.bare == 0
    rig.agrees()


def test_an_update_that_is_put_off_to_the_last_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, where the round in which it would be tried again does not come."""
    rig = Rig("freebsd-13")
    rig.tracker.add(OUT, ELSEWHERE, ESP)
    rig.tracker.add(OUT, SITE, ESP)
    rig.fault(DEL, rejects("ENOMEM"))
    rig.tracker.replace(OUT, SITE, ESP, MOVED)
    rig.fault(DEL, rejects("ENOMEM"))
    with monkeypatch.context() as patch:
        patch.setattr(settle, "_ROUNDS", 1)
        with pytest.raises(PFKeyError, match="was not changed: others were in its way; the next call tries again"):
            rig.tracker.replace(OUT, SITE, MOVED, ESP)
    assert rig.tracker.assignments(OUT, SITE) == (ESP,)
    assert rig.tracker.add(OUT, SITE, REKEYED).sent == (UPD,)
    rig.agrees()
