"""Guards: what stands in for a policy while it is updated, on every kernel; what each packet meets at every step."""

from __future__ import annotations

import pytest
from faulty import rejects
from rig import ALL, ESP, IN, LINUX, MOVED, OUT, PRIORITIES, REKEYED, UNLINK_FIRST, Rig
from scenarios import ADD, DEL, UPD

from pfkey import Abi, Action, Assignment, Direction, MessageType, Policy, Selector
from pfkey.guards import (
    Kind,
    Tag,
    alias_selectors,
    discard_selectors,
    owner_number,
    read_tag,
    real_selector,
    tag_lifetime,
)
from pfkey.messages import Lifetime

SITE = Selector("10.1.0.0/16", "10.2.0.0/16")
HOSTS = Selector("10.1.0.2", "10.2.0.2")
HOSTS6 = Selector("2001:db8:1::2", "2001:db8:2::2")
LINK_LOCAL = Selector("fe80::1", "fe80::2")
ELSEWHERE = Selector("10.8.0.0/16", "10.9.0.0/16")
WAYS = pytest.mark.parametrize("direction", [IN, OUT])
FREEBSD_13 = Abi.freebsd(13)


# Selectors and tags.


def test_aliases_match_the_same_packets_under_another_identity_on_the_wire() -> None:
    for selector in (SITE, Selector("0.0.0.0/0", "0.0.0.0/0"), Selector("10.1.0.0/31", "10.2.0.1"), HOSTS6,
                     Selector("10.1.0.1", "10.2.0.0/31"), Selector("2001:db8::/32", "::/0"),
                     Selector("10.1.0.0/16", "10.2.0.0/16", protocol="tcp", destination_port=443),
                     Selector("10.1.0.0/16", "10.2.0.0/16", protocol="icmp", icmp_type=3, icmp_code=4)):  # fmt: skip
        aliases = list(alias_selectors(selector, FREEBSD_13))
        assert aliases, selector
        assert len({(alias.packed, alias.scopes) for alias in aliases} | {(selector.packed, selector.scopes)}) == (
            len(aliases) + 1
        )
        for alias in aliases:
            assert alias.identity == selector.identity
            assert real_selector(alias, Kind.ALIAS) == selector


def test_there_are_aliases_of_two_hosts_only_where_the_kernel_stores_scopes_that_packets_do_not_have() -> None:
    assert list(alias_selectors(HOSTS, FREEBSD_13)) == []
    assert list(alias_selectors(HOSTS6, Abi.linux())) == []
    assert len(list(alias_selectors(HOSTS6, FREEBSD_13))) == 3
    for selector in (
        LINK_LOCAL,
        Selector("fe80::1", "2001:db8::1"),
        Selector("2001:db8::1", "fe80::1"),
        Selector("2001:db8::1", "ff02::5"),  # OSPF: packets to it carry the scope of their link
        Selector("2001:db8::1", "ff01::1"),
    ):
        assert list(alias_selectors(selector, FREEBSD_13)) == [], selector
    assert list(alias_selectors(Selector("2001:db8::1", "ff0e::1"), FREEBSD_13)) != []


def test_discard_guards_of_two_hosts_are_one_bit_wider_on_either_side() -> None:
    for selector in (HOSTS, LINK_LOCAL, Selector("10.1.0.3", "10.2.0.3", protocol=6, source_port=5)):
        found = list(discard_selectors(selector))
        assert len(found) == 2
        for guard in found:
            assert real_selector(guard, Kind.DISCARD) == selector
            lengths = {guard.source.network.prefixlen, guard.destination.network.prefixlen}
            assert lengths == {selector.source.max_prefixlen, selector.source.max_prefixlen - 1}


@pytest.mark.parametrize("abi", [Abi.linux(), FREEBSD_13, Abi.netbsd(), Abi.macos(), Abi.linux("big")], ids=str)
def test_tags(abi: Abi) -> None:
    for owner in (1, owner_number("a name"), 0x0FFFFFFF):
        for kind in Kind:
            lifetime = tag_lifetime(owner, kind, abi)
            number = lifetime.bytes or lifetime.addtime
            assert number < 1 << 63, "a signed 64-bit number of seconds"
            assert number & 0xFFFFFFFF > 60 * 365 * 24 * 3600, "what a `long` of 32 bits makes of it is never reached"
            assert number & 0xFFFFFFFF < 1 << 31, "and is no negative number there"
            assert read_tag(lifetime, abi) == Tag(owner, kind)
    for other in (None, Lifetime(), Lifetime(addtime=3600, bytes=3600), Lifetime(addtime=(1 << 63) - 1), Lifetime(
        addtime=0x7000000100000001, bytes=0x7000000100000001), Lifetime(bytes=0x70000001_7FFF5F63)):  # fmt: skip
        assert read_tag(other, abi) is None
    assert owner_number("") == owner_number("")
    assert owner_number("a") != owner_number("b")


@pytest.mark.parametrize("profile", ALL)
def test_the_tracked_policies_carry_the_tag_of_their_owner_in_the_kernel(profile: str) -> None:
    rig = Rig(profile, owner="the daemon")
    rig.tracker.add(OUT, SITE, ESP)
    rig.tracker.add(OUT, SITE, MOVED)
    (policy,) = rig.embedded.policies()
    assert read_tag(policy.lifetime_hard, rig.abi) == Tag(owner_number("the daemon"), Kind.POLICY)


# Which guard.

NONE: tuple[MessageType, ...] = ()
GUARDED = (ADD, DEL)


def expected(abi: Abi, selector: Selector) -> str:
    """Which guard an update of the only policy of its direction gets."""
    if not (abi.update_unlinks_first or abi.sole_update_shows_none):
        return "none"
    if next(alias_selectors(selector, abi), None) is not None:
        return "alias"
    return "discard" if abi.update_unlinks_first else "filler"


@WAYS
@pytest.mark.parametrize("selector", [SITE, HOSTS, HOSTS6, LINK_LOCAL], ids=str)
@pytest.mark.parametrize("profile", ALL)
def test_the_guard_that_each_kernel_needs(profile: str, selector: Selector, direction: Direction) -> None:
    rig = Rig(profile)
    rig.tracker.add(direction, selector, ESP)
    kind = expected(rig.abi, selector)
    guards: dict[int, Policy] = {}
    rig.embedded.on_step.append(lambda name, kernel: guards.update({one.id: one for one in rig.guards()}))
    with rig.embedded.probe(direction, selector) as probe, rig.counting() as sent:
        change = rig.tracker.add(direction, selector, MOVED)
    assert change.sent == (UPD,)
    assert change.guard == (NONE if kind == "none" else GUARDED)
    assert [what for what, _ in sent] == [UPD] if kind == "none" else [ADD, UPD, DEL]
    assert probe.bare == 0
    assert probe.steps >= 1
    if kind != "none":
        (guard,) = guards.values()
        assert guard.action == (Action.IPSEC if kind == "alias" else Action.DISCARD)
        assert guard.templates == (MOVED.templates if kind == "alias" else ())
        assert "guarded: " in change.reason
        assert str(rig.abi) in change.reason
    rig.agrees()


@WAYS
@pytest.mark.parametrize("selector", [SITE, HOSTS, HOSTS6], ids=str)
@pytest.mark.parametrize("profile", UNLINK_FIRST)
def test_the_control_without_a_guard_the_window_is_seen(profile: str, selector: Selector, direction: Direction) -> None:
    rig = Rig(profile, guard="bare")
    rig.tracker.add(direction, selector, ESP)
    with rig.embedded.probe(direction, selector) as probe:
        assert rig.tracker.add(direction, selector, MOVED).guard == ()
    assert probe.bare >= 1


def test_freebsd_14_needs_a_guard_for_the_only_policy_of_a_direction() -> None:
    rig = Rig("freebsd-14")
    rig.tracker.add(OUT, SITE, ESP)
    rig.tracker.add(IN, ELSEWHERE, ESP)
    assert rig.tracker.add(OUT, SITE, MOVED).guard == GUARDED
    rig.tracker.add(OUT, ELSEWHERE, ESP)
    with rig.embedded.probe(OUT, SITE) as probe:
        assert rig.tracker.replace(OUT, SITE, MOVED, REKEYED).guard == NONE
    assert probe.bare == 0
    rig.tracker.remove(OUT, ELSEWHERE, ESP)
    assert rig.tracker.add(OUT, SITE, MOVED).guard == GUARDED
    bare = Rig("freebsd-14", guard="bare")
    bare.tracker.add(OUT, SITE, ESP)
    with bare.embedded.probe(OUT, SITE) as probe:
        bare.tracker.add(OUT, SITE, MOVED)
    assert probe.bare == 1, "the control"


def test_the_filler_of_freebsd_14_stops_no_packet() -> None:
    rig = Rig("freebsd-14")
    rig.tracker.add(OUT, HOSTS, ESP)
    neighbour = rig.embedded.probe(OUT, "10.1.0.2", "10.2.0.3")
    with rig.embedded.probe(OUT, HOSTS) as probe, neighbour:
        rig.tracker.add(OUT, HOSTS, MOVED)
    assert all(step.policy is not None and step.policy.action == Action.IPSEC for step in probe.log)
    assert all(step.policy is None for step in neighbour.log)


@WAYS
@pytest.mark.parametrize("profile", UNLINK_FIRST)
def test_a_discard_guard_drops_the_packets_of_the_neighbour_while_it_stands(profile: str, direction: Direction) -> None:
    rig = Rig(profile)
    rig.tracker.add(direction, HOSTS, ESP)
    neighbour = rig.embedded.probe(direction, "10.1.0.2", "10.2.0.3")
    far = rig.embedded.probe(direction, "10.1.0.2", "10.2.0.4")
    with rig.embedded.probe(direction, HOSTS) as probe, neighbour, far:
        assert rig.tracker.add(direction, HOSTS, MOVED).guard == GUARDED
    assert {step.policy.action for step in neighbour.log if step.policy} == {Action.DISCARD}
    assert neighbour.log[-1].policy is None
    assert all(step.policy is None for step in far.log)
    assert Action.DISCARD in {step.policy.action for step in probe.log if step.policy}
    assert probe.bare == 0
    assert probe.log[-1].policy is not None
    assert probe.log[-1].policy.action == Action.IPSEC


@pytest.mark.parametrize("profile", PRIORITIES)
@pytest.mark.parametrize(("before", "after"), [(1000, 2000), (2000, 1000), (1000, 1000)])
def test_an_alias_holds_the_new_policy_at_the_weaker_of_the_two_priorities(
    profile: str, before: int, after: int
) -> None:
    rig = Rig(profile)
    old = Assignment(*ESP.templates, priority=before)
    new = Assignment(*MOVED.templates, priority=after)
    rig.tracker.add(OUT, SITE, old)
    rig.other.add_policy(Policy(OUT, Selector("10.0.0.0/8", "10.0.0.0/8"), Action.NONE, priority=1500))
    guards: list[Policy] = []
    rig.embedded.on_step.append(lambda name, kernel: guards.extend(rig.guards()))
    with rig.embedded.probe(OUT, SITE) as probe:
        rig.tracker.replace(OUT, SITE, old, new)
    assert {(guard.priority, guard.templates) for guard in guards} == {(max(before, after), MOVED.templates)}
    ends = {probe.log[-1].policy.priority, before, 1500 if max(before, after) > 1500 else before}  # type: ignore[union-attr]
    assert {step.policy.priority for step in probe.log if step.policy} <= ends | {max(before, after)}
    assert probe.bare == 0


# Linux: only past another policy, and not before all packets are through.

HTTPS = Selector("10.1.0.0/16", "10.2.0.0/16", protocol="tcp", destination_port=443)
DNS = Selector("10.1.0.0/16", "10.2.0.0/16", protocol="udp", destination_port=53)


def strong(priority: int, base: Assignment = ESP) -> Assignment:
    return Assignment(*base.templates, priority=priority)


def waiting(rig: Rig) -> list[int]:
    """How many messages had been sent whenever it was waited until all packets are through."""
    found: list[int] = []

    def grace_period() -> None:
        found.append(len(rig.writes()))
        rig.embedded.grace_period()

    rig.kernel.grace_period = grace_period  # type: ignore[attr-defined]
    return found


# (what lies beside it, its selector, direction and priority, old and new priority, whether it takes a guard)
BETWEEN = [
    ("between", DNS, OUT, 1500, 2000, 1000, True),
    ("as strong as the old", DNS, OUT, 2000, 2000, 1000, True),
    ("as strong as the new", DNS, OUT, 1000, 2000, 1000, True),
    ("in front of both", DNS, OUT, 500, 2000, 1000, False),
    ("behind both", DNS, OUT, 2500, 2000, 1000, False),
    ("it gets weaker", DNS, OUT, 1500, 1000, 2000, False),
    ("it stays", DNS, OUT, 1500, 1500, 1500, False),
    ("other networks", Selector("10.1.0.0/24", "10.2.0.0/16"), OUT, 1500, 2000, 1000, False),
    ("the other direction", DNS, IN, 1500, 2000, 1000, False),
]


@pytest.mark.parametrize("whose", ["ours", "theirs"])
@pytest.mark.parametrize("case", BETWEEN, ids=lambda case: case[0])
@pytest.mark.parametrize("profile", LINUX)
def test_linux_guards_what_gets_stronger_past_another_policy(profile: str, case: tuple, whose: str) -> None:  # type: ignore[type-arg]
    _, selector, direction, between, before, after, guarded = case
    rig = Rig(profile)
    waits = waiting(rig)
    rig.tracker.add(OUT, HTTPS, strong(before))
    if whose == "ours":
        rig.tracker.add(direction, selector, strong(between))
    else:
        rig.other.add_policy(Policy(direction, selector, Action.DISCARD, priority=between))
    start = len(rig.writes())
    with rig.embedded.probe(OUT, HTTPS) as probe:
        change = rig.tracker.replace(OUT, HTTPS, strong(before), strong(after, MOVED))
    assert change.guard == (GUARDED if guarded else NONE)
    assert probe.bare == 0
    assert waits == ([start + 2] if guarded else []), "after the update, before the alias goes"
    rig.agrees()


def test_the_control_linux_without_a_guard_is_seen_to_be_bare() -> None:
    rig = Rig("linux-smp", guard="bare")
    rig.tracker.add(OUT, DNS, strong(1500))
    rig.tracker.add(OUT, HTTPS, strong(2000))
    with rig.embedded.probe(OUT, HTTPS) as probe:
        rig.tracker.replace(OUT, HTTPS, strong(2000), strong(1000, MOVED))
    assert probe.bare >= 1


def test_the_control_without_the_pause_is_seen_to_be_bare() -> None:
    rig = Rig("linux-smp")
    rig.kernel.grace_period = lambda: None  # type: ignore[attr-defined]
    rig.tracker.add(OUT, DNS, strong(1500))
    rig.tracker.add(OUT, HTTPS, strong(2000))
    with rig.embedded.probe(OUT, HTTPS) as probe:
        rig.tracker.replace(OUT, HTTPS, strong(2000), strong(1000, MOVED))
    assert probe.bare >= 1


@pytest.mark.parametrize("first", [0, 1])
def test_linux_policies_that_pass_each_other_within_one_transaction(first: int) -> None:
    """2000 -> 1000 beside 3000 -> 1500: the one that goes second passes the new place of the other."""
    rig = Rig("linux-smp")
    rig.tracker.add(OUT, HTTPS, strong(2000))
    rig.tracker.add(OUT, DNS, strong(3000))
    moves = [(HTTPS, 2000, 1000), (DNS, 3000, 1500)]
    probes = [rig.embedded.probe(OUT, selector) for selector in (HTTPS, DNS)]
    for probe in probes:
        probe.arm()
    with rig.tracker.transaction():
        for selector, before, after in moves[first:] + moves[:first]:
            rig.tracker.replace(OUT, selector, strong(before), strong(after, MOVED))
    assert [probe.bare for probe in probes] == [0, 0]
    rig.agrees()


def test_linux_a_policy_that_passes_one_added_with_it() -> None:
    rig = Rig("linux-smp")
    rig.tracker.add(OUT, HTTPS, strong(2000))
    with rig.embedded.probe(OUT, HTTPS) as probe, rig.tracker.transaction():
        rig.tracker.add(OUT, DNS, strong(1500))
        rig.tracker.replace(OUT, HTTPS, strong(2000), strong(1000, MOVED))
    assert probe.bare == 0
    rig.agrees()


def test_linux_an_interrupt_while_waiting_does_not_shorten_the_wait() -> None:
    rig = Rig("linux-smp")
    rig.tracker.add(OUT, DNS, strong(1500))
    rig.tracker.add(OUT, HTTPS, strong(2000))
    calls = 0

    def grace_period() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt
        rig.embedded.grace_period()

    rig.kernel.grace_period = grace_period  # type: ignore[attr-defined]
    with rig.embedded.probe(OUT, HTTPS) as probe, pytest.raises(KeyboardInterrupt):
        rig.tracker.replace(OUT, HTTPS, strong(2000), strong(1000, MOVED))
    assert calls == 2
    assert probe.bare == 0
    assert rig.guards() == [], "seen to before the interrupt went on"
    rig.agrees()


def test_linux_what_cannot_be_read_is_guarded() -> None:
    rig = Rig("linux")
    rig.tracker.add(OUT, HTTPS, strong(2000))
    rig.fault(MessageType.SPDDUMP, rejects("ENOMEM"))
    assert rig.tracker.replace(OUT, HTTPS, strong(2000), strong(1000)).guard == GUARDED


# What a probe sees of an update, and that it would see more.


def test_the_probe_sees_no_bare_step_where_the_update_is_atomic() -> None:
    rig = Rig("linux")
    rig.tracker.add(OUT, SITE, ESP)
    with rig.embedded.probe(OUT, "10.1.0.1", "10.2.0.1") as probe:
        rig.tracker.add(OUT, SITE, MOVED)
        rig.tracker.remove(OUT, SITE, MOVED)
    assert probe.steps > 0
    assert probe.bare == 0


@pytest.mark.parametrize("profile", ["freebsd-12", "freebsd-13"])
def test_the_probe_sees_no_bare_step_where_a_guard_stands(profile: str) -> None:
    rig = Rig(profile)
    rig.tracker.add(OUT, SITE, ESP)
    with rig.embedded.probe(OUT, "10.1.0.1", "10.2.0.1") as probe:
        rig.tracker.add(OUT, SITE, MOVED)
    assert probe.bare == 0


@pytest.mark.parametrize("profile", ["freebsd-12", "freebsd-13"])
def test_control_a_bare_update_shows_the_window(profile: str) -> None:
    """The same without the guard: the probe sees what the kernel does."""
    rig = Rig(profile, guard="bare")
    rig.tracker.add(OUT, SITE, ESP)
    with rig.embedded.probe(OUT, "10.1.0.1", "10.2.0.1") as probe:
        assert rig.tracker.add(OUT, SITE, MOVED).guard == ()
    assert probe.bare == 1


@pytest.mark.parametrize("profile", ALL)
def test_control_delete_then_add_is_seen_to_be_bare(profile: str) -> None:
    """The detector works: what this package never does shows as a step without a policy."""
    rig = Rig(profile)
    policy = rig.other.add_policy(Policy(OUT, SITE, Action.DISCARD))
    with rig.embedded.probe(OUT, "10.1.0.1", "10.2.0.1") as probe:
        rig.other.delete_policy(policy)
        rig.other.add_policy(Policy(OUT, SITE, Action.DISCARD))
    assert probe.bare >= 1
