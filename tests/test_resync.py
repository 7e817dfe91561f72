"""Resync: what differs is found, told and put right, whoever changed it, and twins are never mistaken for ours."""

from __future__ import annotations

from dataclasses import replace

import pytest
from faulty import loses_request, rejects
from rig import ALL, BSD, ESP, IN, LISTS_THE_DEAD, MOVED, OUT, REKEYED, Rig
from scenarios import ADD, DEL, UPD

from pfkey import Action, Assignment, MessageType, PFKeyError, Policy, Selector

SITE = Selector("10.1.0.0/16", "10.2.0.0/16")
SITES = [Selector(f"10.{number}.0.0/16", "192.168.0.0/16") for number in range(1, 6)]


@pytest.mark.parametrize("profile", ALL)
def test_nothing_differs(profile: str) -> None:
    rig = Rig(profile)
    for selector in SITES:
        rig.tracker.add(OUT, selector, ESP)
        rig.tracker.add(IN, selector.reversed(), ESP.reversed())
    with rig.counting() as sent:
        assert rig.tracker.resync() == ()
    assert sent == []


@pytest.mark.parametrize("profile", ALL)
def test_what_others_did_is_told_and_put_right(profile: str) -> None:
    rig = Rig(profile)
    for selector in SITES:
        rig.tracker.add(OUT, selector, ESP)
    held = {selector: rig.held(selector) for selector in SITES}
    rig.other.delete_policy(held[SITES[0]])  # type: ignore[arg-type]
    rig.other.update_policy(replace(held[SITES[1]], id=0, action=Action.DISCARD, templates=()))  # type: ignore[type-var]
    with rig.counting() as sent:
        differences = rig.tracker.resync()
    assert {difference.selector: (difference.found, difference.error) for difference in differences} == {
        SITES[0]: ("nothing", None),
        SITES[1]: (f"discard, priority {held[SITES[1]].priority}", None),  # type: ignore[union-attr]
    }
    assert {difference.selector: difference.change.sent for difference in differences if difference.change} == {
        SITES[0]: (ADD,),
        SITES[1]: (UPD,),
    }
    assert {selector for _, selector in sent} >= {str(SITES[0]), str(SITES[1])}
    assert "believed ipsec" in str(differences[0])
    rig.agrees()
    assert rig.tracker.resync() == ()


@pytest.mark.parametrize("profile", ALL)
def test_what_was_flushed_comes_back(profile: str) -> None:
    rig = Rig(profile)
    for selector in SITES:
        rig.tracker.add(OUT, selector, ESP)
    rig.other.flush_policies()
    assert len(rig.tracker.resync()) == len(SITES)
    rig.agrees()


def test_what_expired_in_silence_is_found() -> None:
    """Linux tells nobody of a policy whose hard lifetime ran out."""
    rig = Rig("linux")
    rig.tracker.add(OUT, SITE, ESP)
    held = rig.held(SITE)
    assert held is not None
    rig.other.update_policy(replace(held, id=0, lifetime_hard=replace(held.lifetime_hard, addtime=10)))  # type: ignore[type-var]
    rig.embedded.advance(60)
    assert rig.entries() == []
    assert [difference.found for difference in rig.tracker.resync()] == ["nothing"]
    rig.agrees()


@pytest.mark.parametrize("profile", LISTS_THE_DEAD)
def test_what_is_dead_is_gone_although_it_is_listed(profile: str) -> None:
    rig = Rig(profile)
    for selector in SITES:
        rig.tracker.add(OUT, selector, ESP)
    rig.other.delete_policy(rig.held(SITES[0]))  # type: ignore[arg-type]
    assert len(rig.other.dump_policies()) == len(SITES)
    assert [difference.selector for difference in rig.tracker.resync()] == [SITES[0]]
    rig.agrees()


@pytest.mark.parametrize("profile", ALL)
def test_what_is_not_certain_is_settled(profile: str) -> None:
    rig = Rig(profile)
    rig.tracker.add(OUT, SITES[0], ESP)
    rig.fault(ADD, loses_request)
    with pytest.raises(PFKeyError):
        rig.tracker.add(OUT, SITES[1], ESP)
    (difference,) = rig.tracker.resync()
    assert difference.believed == "something not certain"
    rig.agrees()


@pytest.mark.parametrize("profile", ALL)
def test_what_cannot_be_put_right_is_told_and_what_cannot_be_read_raises(profile: str) -> None:
    rig = Rig(profile)
    for selector in SITES[:2]:
        rig.tracker.add(OUT, selector, ESP)
    rig.other.flush_policies()
    rig.fault(ADD, rejects("ENOMEM"))
    differences = rig.tracker.resync()
    assert sorted(difference.error is None for difference in differences) == [False, True]
    assert any("not put right: " in str(difference) for difference in differences)
    rig.fault(MessageType.SPDDUMP, rejects("ENOMEM"))
    with pytest.raises(PFKeyError, match="ENOMEM"):
        rig.tracker.resync()
    rig.tracker.resync()
    rig.agrees()


@pytest.mark.parametrize("profile", ALL)
def test_what_lingers_is_left_where_it_is(profile: str) -> None:
    rig = Rig(profile, linger=60)
    rig.tracker.add(OUT, SITE, ESP)
    rig.tracker.remove(OUT, SITE, ESP)
    assert rig.tracker.resync() == ()
    assert rig.tracker.add(OUT, SITE, REKEYED).sent == ()
    rig.tracker.close()


@pytest.mark.parametrize("profile", ALL)
def test_policies_of_others_are_none_of_its_business(profile: str) -> None:
    rig = Rig(profile)
    rig.tracker.add(OUT, SITES[0], ESP)
    host_bits = Selector("10.1.0.0/16", "192.168.0.1/16")
    for selector in (SITES[1], host_bits):
        rig.other.add_policy(Policy(OUT, selector, Action.DISCARD, priority=9 if rig.abi.has_priority else 0))
    assert rig.tracker.resync() == ()
    assert len(rig.entries()) == 3


def test_a_twin_with_a_mark_is_not_ours() -> None:
    """On Linux a dump lists it with the same selector; SPDGET does not know its id, and ours was deleted."""
    rig = Rig("linux")
    rig.tracker.add(OUT, SITE, ESP)
    ours = rig.held(SITE)
    assert ours is not None
    rig.other.delete_policy(ours)
    twin = rig.other.add_policy(Policy(OUT, SITE, Action.NONE, priority=3))
    entry = next(iter(rig.embedded.spd.in_order(OUT)))
    # What a mark does to it: it stays in the dump, and no other message reaches it.
    del rig.embedded.spd._ids[entry.id]
    identities = rig.embedded.spd._identities
    (key,) = (key for key, one in identities.items() if one is entry)
    identities[("mark", *key)] = identities.pop(key)
    (difference,) = rig.tracker.resync()
    assert difference.found == "nothing"
    assert difference.change is not None
    assert difference.change.sent == (ADD,)
    assert twin.id in {policy.id for policy in rig.other.dump_policies()}
    assert rig.tracker.add(OUT, SITE, REKEYED).sent == ()


@pytest.mark.parametrize("profile", BSD)
def test_it_puts_right_under_a_guard(profile: str) -> None:
    rig = Rig(profile)
    rig.tracker.add(OUT, SITE, ESP)
    held = rig.held(SITE)
    assert held is not None
    rig.other.update_policy(replace(held, id=0, templates=MOVED.templates))
    with rig.embedded.probe(OUT, SITE) as probe:
        (difference,) = rig.tracker.resync()
    assert difference.change is not None
    assert difference.change.sent == (UPD,)
    assert difference.change.guard == (ADD, DEL)
    assert probe.bare == 0


def test_assignments_without_a_policy_and_policies_without_assignments() -> None:
    rig = Rig("linux")
    rig.tracker.add(OUT, SITE, ESP)
    rig.fault(DEL, rejects("ENOMEM"))
    with pytest.raises(PFKeyError):
        rig.tracker.remove(OUT, SITE, ESP)
    (difference,) = rig.tracker.resync()
    assert difference.change is not None
    assert difference.change.sent == (DEL,)
    assert rig.entries() == []
    assert len(rig.tracker) == 0
    assert Assignment(*ESP.templates, spi=ESP.spi) == ESP
