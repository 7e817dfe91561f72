"""After a crash: what a dead process left is promoted or deleted, and no packet meets a moment without a policy."""

from __future__ import annotations

from dataclasses import replace

import pytest
from faulty import FaultyChannel, loses_reply, loses_request, rejects
from rig import ALL, BSD, DROP, ESP, IN, LISTS_THE_DEAD, MOVED, OUT, UNLINK_FIRST, KilledError, Rig
from scenarios import ADD, DEL, UPD

from pfkey import (
    Abi,
    Action,
    Direction,
    ExtensionType,
    Message,
    MessageType,
    Policy,
    PolicyTracker,
    Selector,
    connect,
    decode,
    encode,
)
from pfkey.guards import Guard, Kind, discard_selectors, guard_policies, owner_number, real_selector, tag_lifetime

SITE = Selector("10.1.0.0/16", "10.2.0.0/16")
HOSTS = Selector("10.1.0.2", "10.2.0.2")
HOSTS6 = Selector("2001:db8:1::2", "2001:db8:2::2")
ELSEWHERE = Selector("10.8.0.0/16", "10.9.0.0/16")
SELECTORS = [SITE, HOSTS, HOSTS6]
GET, DUMP = MessageType.SPDGET, MessageType.SPDDUMP


def dying(profile: str, selector: Selector, direction: Direction, lives: int, **how: object) -> Rig:
    """An update whose process is killed after so many of its messages."""
    rig = Rig(profile, owner="d", guard="alias", **how)
    rig.tracker.add(direction, selector, ESP)
    rig.channel.lives = lives
    try:
        rig.tracker.add(direction, selector, MOVED)
    except KilledError:
        pass
    else:
        assert len(rig.writes()) < 1 + lives + 1
    return rig


@pytest.mark.parametrize("owner", ["d", "somebody else", None])
@pytest.mark.parametrize("direction", [IN, OUT])
@pytest.mark.parametrize("selector", SELECTORS, ids=str)
@pytest.mark.parametrize("profile", ALL)
def test_killed_at_every_message(profile: str, selector: Selector, direction: Direction, owner: str | None) -> None:
    died = 0
    for lives in range(4):
        rig = dying(profile, selector, direction, lives)
        died += len(rig.writes()) == 1 + lives < 4
        with rig.embedded.probe(direction, selector) as probe:
            tracker = rig.restart(owner=owner)
            tracker.add(direction, ELSEWHERE if selector.version == 4 else SITE, ESP)
            assert rig.guards() == [], "recovered by whatever call came first"
            held = rig.held(selector, direction)
            assert held is not None
            assert held.templates in (ESP.templates, MOVED.templates)
            if owner == "d":
                tracker.add(direction, selector, MOVED)
                rig.agrees()
        assert probe.bare == 0
        assert probe.steps > 0
    assert died >= 3, "the update had three messages to be killed at"


@pytest.mark.parametrize("direction", [IN, OUT])
@pytest.mark.parametrize("selector", SELECTORS, ids=str)
@pytest.mark.parametrize("profile", BSD)
def test_killed_when_the_kernel_had_removed_the_policy(profile: str, selector: Selector, direction: Direction) -> None:
    """The update is rejected after the unlinking, and nobody is there any more to put the policy back."""
    rig = Rig(profile, owner="d", guard="alias")
    rig.tracker.add(direction, selector, ESP)
    rig.embedded.fail_next(UPD, "ENOBUFS", "unlinked")
    rig.channel.lives = 2
    with rig.embedded.probe(direction, selector) as probe:
        with pytest.raises(KilledError):
            rig.tracker.add(direction, selector, MOVED)
        assert rig.held(selector, direction) is None
        (guard,) = rig.guards()
        tracker = rig.restart(owner="d")
        with rig.counting() as sent:
            tracker.add(direction, ELSEWHERE if selector.version == 4 else SITE, ESP)
        held = rig.held(selector, direction)
        if guard.selector.protocol == 253:  # no packet has it: nothing stood in for the only policy (see below)
            return
        if guard.action == Action.DISCARD:  # it cannot tell what it stood in for: it stays until somebody adds that
            assert held is None
            assert rig.guards() == [guard]
        else:
            assert held is not None
            assert held.templates == MOVED.templates
            assert [kind for kind, _ in sent] == [ADD, DEL, ADD]
            assert rig.guards() == []
        tracker.add(direction, selector, MOVED)
        rig.agrees()
    assert probe.bare == 0


def test_the_probe_would_see_a_guard_that_is_just_deleted() -> None:
    """The control: what recovery must not do."""
    rig = Rig("freebsd-13", owner="d")
    rig.tracker.add(OUT, SITE, ESP)
    rig.embedded.fail_next(UPD, "ENOBUFS", "unlinked")
    rig.channel.lives = 2
    with pytest.raises(KilledError):
        rig.tracker.add(OUT, SITE, MOVED)
    (guard,) = rig.guards()
    with rig.embedded.probe(OUT, SITE) as probe:
        rig.other.delete_policy(guard)
    assert probe.bare == 1


def test_a_discard_guard_that_stayed_is_swept_when_nobody_wants_its_policy() -> None:
    for guard in ("auto", "discard"):
        for selector in (HOSTS, SITE):
            if guard == "auto" and selector is SITE:
                continue
            rig = Rig("freebsd-13", owner="d", guard=guard)
            rig.tracker.add(OUT, selector, ESP)
            rig.embedded.fail_next(UPD, "ENOBUFS", "unlinked")
            rig.channel.lives = 2
            with pytest.raises(KilledError):
                rig.tracker.add(OUT, selector, MOVED)
            tracker = rig.restart(owner="d")
            tracker.add(OUT, ELSEWHERE, ESP)
            assert len(rig.guards()) == 1
            with tracker.transaction(sweep=True):
                pass
            assert [policy.selector for policy in rig.entries()] == [ELSEWHERE]
            assert tracker.policies() == ((OUT, ELSEWHERE),)
            rig.agrees()


def test_a_discard_guard_goes_when_its_policy_is_added_in_the_sweep_or_after_a_resync() -> None:
    for way in ("sweep", "resync"):
        rig = Rig("freebsd-13", owner="d")
        rig.tracker.add(OUT, HOSTS, ESP)
        rig.embedded.fail_next(UPD, "ENOBUFS", "unlinked")
        rig.channel.lives = 2
        with pytest.raises(KilledError):
            rig.tracker.add(OUT, HOSTS, MOVED)
        tracker = rig.restart(owner="d")
        with rig.embedded.probe(OUT, HOSTS) as probe:
            if way == "sweep":
                with tracker.transaction(sweep=True):
                    tracker.add(OUT, HOSTS, MOVED)
            else:
                tracker.resync()
                assert len(rig.guards()) == 1
                tracker.add(OUT, HOSTS, MOVED)
        assert probe.bare == 0
        rig.agrees()


@pytest.mark.parametrize("profile", LISTS_THE_DEAD)
def test_dead_entries_of_a_dump_do_not_count(profile: str) -> None:
    """FreeBSD up to 11.0 and macOS list a removed policy for seconds: its guard is promoted all the same."""
    rig = Rig(profile, owner="d")
    rig.tracker.add(OUT, SITE, ESP)
    rig.embedded.fail_next(UPD, "ENOBUFS", "unlinked")
    rig.channel.lives = 2
    with rig.embedded.probe(OUT, SITE) as probe:
        with pytest.raises(KilledError):
            rig.tracker.add(OUT, SITE, MOVED)
        listed = [policy.selector for policy in rig.other.dump_policies()]
        assert SITE in listed, "the dead one is listed, or this tests nothing"
        rig.restart(owner="d").add(OUT, ELSEWHERE, ESP)
        held = rig.held(SITE)
    assert held is not None
    assert probe.bare == 0
    rig.restart(owner="d").add(OUT, SITE, MOVED)
    assert rig.guards() == []


@pytest.mark.parametrize("profile", LISTS_THE_DEAD)
def test_a_dead_guard_is_not_promoted(profile: str) -> None:
    """It was deleted after its update, and somebody deleted the policy too: neither comes back."""
    rig = Rig(profile, owner="d")
    rig.tracker.add(OUT, SITE, ESP)
    rig.tracker.add(OUT, SITE, MOVED)
    rig.tracker.flush()
    assert len(rig.other.dump_policies()) == 3, "two policies and a guard, all dead"
    rig.restart(owner="d").add(OUT, ELSEWHERE, ESP)
    assert [policy.selector for policy in rig.entries()] == [ELSEWHERE]


@pytest.mark.parametrize("profile", LISTS_THE_DEAD)
def test_a_dead_policy_of_a_former_life_is_not_taken_for_one_that_stands(profile: str) -> None:
    for how in ("add", "sweep", "adopt"):
        rig = Rig(profile, owner="d")
        rig.tracker.add(OUT, SITE, ESP)
        rig.tracker.flush()
        tracker = rig.restart(owner="d", ownership="adopt" if how == "adopt" else "refuse")
        if how == "sweep":
            with tracker.transaction(sweep=True):
                tracker.add(OUT, SITE, ESP)
        else:
            assert tracker.add(OUT, SITE, ESP).sent == (ADD,)
        assert rig.held(SITE) is not None
        rig.agrees()


class Blind:
    """A Linux kernel whose SPDGET does not know some of what its dump lists: policies with marks."""

    def __init__(self, rig: Rig, marked: set[int]) -> None:
        self.marked = marked
        self.inner_send = rig.channel.inner.send

    def send(self, data: bytes) -> None:
        message = decode(data, Abi.linux())
        policy = message.policy
        if message.type == GET and policy is not None and policy.id in self.marked:
            extensions = {ExtensionType.POLICY: replace(policy, id=0x7FFFFFF8)}
            data = encode(Message(GET, extensions, abi=message.abi, seq=message.seq, pid=message.pid))
        self.inner_send(data)


def test_a_twin_with_a_mark_does_not_stand_in_for_a_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux lists policies with marks too; only what SPDGET knows is what packets of the main table meet."""
    rig = Rig("linux", owner="d", guard="alias")
    twin = rig.other.add_policy(Policy(OUT, SITE, Action.NONE, priority=9))
    tag = tag_lifetime(owner_number("d"), Kind.ALIAS, rig.abi)
    alias = Selector("10.1.0.0/16", "10.2.0.1/16")
    rig.other.add_policy(Policy(OUT, alias, templates=ESP.templates, priority=383615, lifetime_hard=tag))
    monkeypatch.setattr(rig.channel.inner, "send", Blind(rig, {twin.id}).send)
    with rig.counting() as sent:
        rig.tracker.add(OUT, ELSEWHERE, ESP)
    assert sent == [(ADD, str(SITE)), (DEL, str(alias)), (ADD, str(ELSEWHERE))], "promoted, not just deleted"


def test_guards_of_a_tracker_at_work_in_this_process_are_left_alone() -> None:
    for profile in ALL:
        rig = Rig(profile, guard="alias")
        rig.tracker.add(OUT, SITE, ESP)
        seen: list[Policy] = []

        def another(channel: FaultyChannel, data: bytes, rig: Rig = rig, seen: list[Policy] = seen) -> None:
            """While the update is on its way, a second tracker starts and looks around."""
            with connect(rig.embedded.connect()) as kernel:
                PolicyTracker(kernel).add(OUT, ELSEWHERE, ESP)
            seen += rig.guards()
            channel.inner.send(data)

        rig.fault(UPD, another)
        change = rig.tracker.add(OUT, SITE, MOVED)
        assert change.sent == (UPD,)
        assert change.guard == (ADD, DEL)
        assert len(seen) == 1, f"{profile}: the guard stood"
        assert rig.guards() == []


@pytest.mark.parametrize("profile", ALL)
def test_what_cannot_be_searched_does_not_stop_the_work(profile: str) -> None:
    rig = dying(profile, SITE, OUT, 1)
    assert len(rig.guards()) == 1
    tracker = rig.restart(owner="d")
    rig.fault(DUMP, rejects("ENOMEM"))
    assert tracker.add(OUT, ELSEWHERE, ESP).sent == (ADD,)
    assert len(rig.guards()) == 1
    assert tracker.remove(OUT, ELSEWHERE, ESP).sent == (DEL,)
    assert rig.guards() == [], "the next call searched again"


@pytest.mark.parametrize("profile", ALL)
def test_a_guard_that_cannot_be_deleted_is_tried_again(profile: str) -> None:
    rig = dying(profile, SITE, OUT, 1)
    tracker = rig.restart(owner="d")
    rig.fault(DEL, rejects("ENOMEM"))
    tracker.add(OUT, ELSEWHERE, ESP)
    assert len(rig.guards()) == 1
    tracker.remove(OUT, ELSEWHERE, ESP)
    assert rig.guards() == []


@pytest.mark.parametrize("profile", UNLINK_FIRST)
def test_a_guard_whose_policy_cannot_be_added_stays(profile: str) -> None:
    rig = Rig(profile, owner="d")
    rig.tracker.add(OUT, SITE, ESP)
    rig.embedded.fail_next(UPD, "ENOBUFS", "unlinked")
    rig.channel.lives = 2
    with pytest.raises(KilledError):
        rig.tracker.add(OUT, SITE, MOVED)
    tracker = rig.restart(owner="d")
    rig.fault(ADD, rejects("ENOMEM"))
    tracker.add(OUT, ELSEWHERE, ESP)
    assert len(rig.guards()) == 1
    assert rig.held(SITE) is None
    with rig.embedded.probe(OUT, SITE) as probe:
        tracker.add(OUT, SITE, MOVED)
    assert probe.bare == 0
    rig.agrees()


def test_an_add_of_a_guard_that_got_lost_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer is lost: that it stands is read, and the update goes on under it."""
    rig = Rig("freebsd-13")
    rig.tracker.add(OUT, SITE, ESP)
    rig.fault(ADD, loses_reply)
    assert rig.tracker.add(OUT, SITE, MOVED).sent == (UPD,)
    rig.agrees()


def test_a_guard_that_never_came_leaves_what_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig("freebsd-13")
    rig.tracker.add(OUT, SITE, ESP)
    rig.fault(ADD, loses_request)
    with pytest.raises(Exception, match="was to guard an update"):
        rig.tracker.add(OUT, SITE, MOVED)
    assert rig.held(SITE).templates == ESP.templates  # type: ignore[union-attr]
    rig.tracker.add(OUT, SITE, MOVED)
    rig.agrees()


def test_the_real_selector_of_every_guard_is_found_again() -> None:
    abi = Abi.freebsd(13)
    for selector in (SITE, HOSTS, HOSTS6, Selector("10.0.0.2/31", "10.0.0.4"), Selector("10.0.0.2/31", "10.0.0.4/31"),
                     Selector("2001:db8::/127", "2001:db8::4/127"), Selector("0.0.0.0/0", "10.0.0.1"),
                     Selector("10.1.0.1", "10.2.0.1", protocol=6, destination_port=443)):  # fmt: skip
        for how in (Guard.ALIAS, Guard.DISCARD):
            for guard in guard_policies(Policy(OUT, selector, Action.DISCARD), None, abi, how, 1):
                tag = guard.lifetime_hard
                kind = next(kind for kind in Kind if tag == tag_lifetime(1, kind, abi))
                assert real_selector(guard.selector, kind).identity == selector.identity, (selector, how, guard)
    assert [str(one) for one in discard_selectors(HOSTS)] == [
        "10.1.0.2/32 -> 10.2.0.2/31",
        "10.1.0.2/31 -> 10.2.0.2/32",
    ]


def test_a_crash_under_guard_discard_over_a_pair_of_addresses_each() -> None:
    """A discard guard of a /31 looks like one of a /32 that was made wider; the tag tells them apart."""
    pair = Selector("10.1.0.2/31", "10.2.0.2/31")
    rig = Rig("freebsd-13", owner="d", guard="discard")
    rig.tracker.add(OUT, pair, ESP)
    rig.channel.lives = 2
    with pytest.raises(KilledError):
        rig.tracker.add(OUT, pair, MOVED)
    assert len(rig.guards()) == 1
    rig.restart(owner="d").add(OUT, ELSEWHERE, DROP)
    assert rig.guards() == []
    assert rig.held(pair) is not None
