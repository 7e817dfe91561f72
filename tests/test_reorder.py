"""Kernels that order policies by insertion: every way to three nested selectors, and what an inner packet meets."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import pytest
from faulty import Fault, FaultyChannel, closes, interrupts, loses_reply, loses_request, rejects
from rig import ESP, LISTS, MOVED, OUT, KilledError, Rig
from scenarios import ADD, DEL, UPD

from pfkey import Action, Assignment, Direction, Policy, Selector, Template
from pfkey.embedded.probe import Probe
from pfkey.errors import PFKeyError
from pfkey.guards import Kind, read_tag, real_selector

A8 = Selector("10.0.0.0/8", "10.0.0.0/8")
A16 = Selector("10.1.0.0/16", "10.2.0.0/16")
A24 = Selector("10.1.1.0/24", "10.2.1.0/24")
NESTED = (A8, A16, A24)
BESIDE = Selector("192.168.0.0/16", "192.168.0.0/16")
ANYWHERE = Assignment(action=Action.NONE)
"""The outermost lets packets through: to meet it in place of an inner one is a leak."""
BEFORE = {A8: ANYWHERE, A16: Assignment(action=Action.DISCARD), A24: ESP}
AFTER = {A8: Assignment(action=Action.DISCARD), A16: MOVED, A24: MOVED}


def whose(rig: Rig, policy: Policy | None) -> Selector | None:
    """The tracked selector that an entry is of, or stands in for."""
    if policy is None:
        return None
    tag = read_tag(policy.lifetime_hard, rig.abi)
    assert tag is not None
    return policy.selector if tag.kind is Kind.POLICY else real_selector(policy.selector, tag.kind)


def in_order(rig: Rig, expected: Sequence[Selector]) -> None:
    """The kernel's list has the narrower ones in front."""
    assert [policy.selector for policy in rig.entries()] == [
        selector for selector in (A24, A16, A8) if selector in expected
    ]
    rig.agrees()


def innermost(rig: Rig, probe: Probe, there: Sequence[Selector], then: Sequence[Selector]) -> None:
    """At every step the packet met the innermost selector of before or of afterwards, never one further out."""
    allowed = {next((one for one in (A24, A16, A8) if one in some), None) for some in (there, then)}
    met = {whose(rig, step.policy) for step in probe.log}
    assert met <= allowed, f"met {met}, may meet {allowed}"


@pytest.mark.parametrize("order", list(itertools.permutations(NESTED)), ids=lambda order: "-".join(
    str(selector.source.network.prefixlen) for selector in order))  # fmt: skip
@pytest.mark.parametrize("profile", LISTS)
def test_added_one_by_one_updated_one_by_one_removed_one_by_one(profile: str, order: tuple[Selector, ...]) -> None:
    for update_order in itertools.permutations(NESTED):
        rig = Rig(profile)
        rig.tracker.add(OUT, BESIDE, ESP)
        rig.tracker.remove(OUT, BESIDE, ESP)
        there: list[Selector] = []
        with rig.embedded.probe(OUT, A24) as probe:
            for selector in order:
                probe.log.clear()
                rig.tracker.add(OUT, selector, BEFORE[selector])
                innermost(rig, probe, there, [*there, selector])
                there.append(selector)
                in_order(rig, there)
            for selector in update_order:
                probe.log.clear()
                change = rig.tracker.replace(OUT, selector, BEFORE[selector], AFTER[selector])
                assert change.sent == (UPD,)
                innermost(rig, probe, there, there)
                in_order(rig, there)
            for selector in order:
                probe.log.clear()
                rig.tracker.remove(OUT, selector, AFTER[selector])
                innermost(rig, probe, there, [one for one in there if one != selector])
                there.remove(selector)
                in_order(rig, there)


@pytest.mark.parametrize("profile", LISTS)
def test_all_subsets_in_one_transaction(profile: str) -> None:
    """Each of the three is added, updated, removed or left alone, in one transaction: 64 of them from each start."""
    for start in range(8):
        present = [selector for number, selector in enumerate(NESTED) if start >> number & 1]
        choices = [("keep", "update", "remove") if selector in present else ("keep", "add") for selector in NESTED]
        for choice in itertools.product(*choices):
            rig = Rig(profile)
            for selector in present:
                rig.tracker.add(OUT, selector, BEFORE[selector])
            then = [
                selector
                for selector, what in zip(NESTED, choice, strict=True)
                if what in ("update", "add") or (what == "keep" and selector in present)
            ]
            with rig.embedded.probe(OUT, A24) as probe, rig.tracker.transaction():
                for selector, what in zip(NESTED, choice, strict=True):
                    if what == "add":
                        rig.tracker.add(OUT, selector, BEFORE[selector])
                    elif what == "update":
                        rig.tracker.replace(OUT, selector, BEFORE[selector], AFTER[selector])
                    elif what == "remove":
                        rig.tracker.remove(OUT, selector, BEFORE[selector])
            innermost(rig, probe, present, then)
            in_order(rig, then)


@pytest.mark.parametrize("profile", LISTS)
def test_a_probe_of_each_selector_at_every_step(profile: str) -> None:
    """Not the innermost packet alone: those that only the /16 or the /8 match meet theirs too."""
    packets = {A24: ("10.1.1.1", "10.2.1.1"), A16: ("10.1.9.1", "10.2.9.1"), A8: ("10.9.9.9", "10.9.9.8")}
    for selector in NESTED:
        rig = Rig(profile)
        for one in NESTED:
            rig.tracker.add(OUT, one, BEFORE[one])
        probes = {one: rig.embedded.probe(OUT, *packet) for one, packet in packets.items()}
        for probe in probes.values():
            probe.arm()
        rig.tracker.replace(OUT, selector, BEFORE[selector], AFTER[selector])
        for one, probe in probes.items():
            assert {whose(rig, step.policy) for step in probe.log} == {one}
        in_order(rig, NESTED)


@pytest.mark.parametrize("profile", LISTS)
def test_the_control_a_bare_update_is_seen_to_meet_the_policy_outside(profile: str) -> None:
    rig = Rig(profile)
    for one in NESTED:
        rig.tracker.add(OUT, one, BEFORE[one])
    held = rig.held(A24)
    assert held is not None
    with rig.embedded.probe(OUT, A24) as probe:
        rig.other.update_policy(Policy(OUT, A24, templates=MOVED.templates))
    assert {whose(rig, step.policy) for step in probe.log[:1]} == {A16}
    assert [policy.selector for policy in rig.entries()] == [A16, A8, A24]


@pytest.mark.parametrize("profile", LISTS)
def test_the_messages_that_move_others_are_counted(profile: str) -> None:
    rig = Rig(profile)
    for one in NESTED:
        rig.tracker.add(OUT, one, BEFORE[one])
    for selector, moved in ((A24, 2), (A16, 1), (A8, 0)):
        with rig.counting() as sent:
            change = rig.tracker.replace(OUT, selector, BEFORE[selector], AFTER[selector])
        assert change.sent == (UPD,)
        assert sorted((*change.sent, *change.guard)) == sorted(kind for kind, _ in sent)
        assert change.guard.count(ADD) == change.guard.count(DEL) == 1 + moved
        assert change.guard.count(UPD) == 2 * moved


@pytest.mark.parametrize("profile", LISTS)
def test_what_does_not_overlap_is_not_moved(profile: str) -> None:
    rig = Rig(profile)
    for selector in (A24, BESIDE):
        rig.tracker.add(OUT, selector, ESP)
    rig.tracker.add(Direction.IN, A8, ESP)
    assert rig.tracker.replace(OUT, A24, ESP, MOVED).guard == (ADD, DEL)


# What goes wrong on the way.

FAULTS = {
    "rejected": rejects("ENOMEM"),
    "request lost": loses_request,
    "reply lost": loses_reply,
    "interrupted": interrupts,
}
KINDS = [(ADD, 0), (ADD, 1), (ADD, 2), (UPD, 0), (UPD, 1), (UPD, 2), (UPD, 3), (UPD, 4), (DEL, 0), (DEL, 1), (DEL, 2)]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("selector", [A24, A16], ids=str)
@pytest.mark.parametrize("profile", LISTS)
def test_every_message_of_a_move_goes_wrong(profile: str, selector: Selector, fault: str) -> None:
    """Nobody meets a weaker policy in place of a stronger one meanwhile, and the next call leaves all in order."""
    for kind, skip in KINDS:
        rig = Rig(profile)
        for one in NESTED:
            rig.tracker.add(OUT, one, BEFORE[one])
        rig.channel.faults.append(Fault(kind, FAULTS[fault], skip))
        where = f"{kind.name} number {skip}, {fault}"
        with rig.embedded.probe(OUT, A24) as probe:
            with suppress(PFKeyError, KeyboardInterrupt):
                rig.tracker.replace(OUT, selector, BEFORE[selector], AFTER[selector])
            assert {whose(rig, step.policy) for step in probe.log} <= {A24}, where
            assert whose(rig, rig.embedded.lookup(OUT, "10.1.1.1", "10.2.1.1")) == A24, where
            rig.channel.faults.clear()
            with rig.tracker.transaction():
                for one in NESTED:
                    old = rig.tracker.assignments(OUT, one)[0]
                    rig.tracker.replace(OUT, one, old, AFTER[one])
            assert {whose(rig, step.policy) for step in probe.log} <= {A24}, where
        in_order(rig, NESTED)


@pytest.mark.parametrize("owner", ["d", "somebody else"])
@pytest.mark.parametrize("profile", LISTS)
def test_killed_at_every_message_of_a_move(profile: str, owner: str) -> None:
    """The next start has the order restored before the guards go, whoever starts."""
    for selector in (A24, A16):
        for lives in range(14):
            rig = Rig(profile, owner="d")
            for one in NESTED:
                rig.tracker.add(OUT, one, BEFORE[one])
            rig.channel.lives = lives
            with rig.embedded.probe(OUT, A24) as probe:
                with suppress(KilledError):
                    rig.tracker.replace(OUT, selector, BEFORE[selector], AFTER[selector])
                rig.restart(owner=owner).add(OUT, BESIDE, ESP)
                assert rig.guards() == []
            assert {whose(rig, step.policy) for step in probe.log} <= {A24}, (selector, lives)
            assert [policy.selector for policy in rig.entries()] == [A24, A16, A8, BESIDE]


@pytest.mark.parametrize("profile", LISTS)
def test_killed_when_the_kernel_had_removed_one_of_them(profile: str) -> None:
    for number in range(5):
        rig = Rig(profile, owner="d")
        for one in NESTED:
            rig.tracker.add(OUT, one, BEFORE[one])
        with rig.embedded.probe(OUT, A24) as probe:
            rig.channel.lives = 4 + number
            rig.channel.faults.append(Fault(UPD, _removes, number))
            with suppress(KilledError):
                rig.tracker.replace(OUT, A24, BEFORE[A24], AFTER[A24])
            rig.restart(owner="d").add(OUT, BESIDE, ESP)
        assert {whose(rig, step.policy) for step in probe.log} <= {A24}, number
        assert rig.guards() == []
        assert [policy.selector for policy in rig.entries()] == [A24, A16, A8, BESIDE]


def _removes(channel: FaultyChannel, data: bytes) -> None:
    """The kernel has unlinked the old one when it finds the new one wrong."""
    channel.inner._kernel.fail_next(UPD, "ENOBUFS", "unlinked")  # type: ignore[attr-defined]
    channel.inner.send(data)


@pytest.mark.parametrize("profile", LISTS)
def test_every_update_of_a_move_is_rejected_after_the_old_one_is_gone(profile: str) -> None:
    for selector in (A24, A16):
        for number in range(5):
            rig = Rig(profile)
            for one in NESTED:
                rig.tracker.add(OUT, one, BEFORE[one])
            rig.channel.faults.append(Fault(UPD, _removes, number))
            with rig.embedded.probe(OUT, A24) as probe:
                with suppress(PFKeyError):
                    rig.tracker.replace(OUT, selector, BEFORE[selector], AFTER[selector])
                assert {whose(rig, step.policy) for step in probe.log} <= {A24}, number
                in_order(rig, NESTED)


@pytest.mark.parametrize("profile", LISTS)
def test_a_disorder_that_somebody_else_made_is_put_right(profile: str) -> None:
    """Their update of the innermost leaves what it says as it was, at the end of the list."""
    for how in ("call", "resync", "call for the outermost"):
        rig = Rig(profile)
        for one in NESTED:
            rig.tracker.add(OUT, one, BEFORE[one])
        held = rig.held(A24)
        assert held is not None
        rig.other.update_policy(replace(held, id=0))
        assert [policy.selector for policy in rig.entries()] == [A16, A8, A24]
        rig.tracker.resync()
        if how == "call":
            rig.tracker.add(OUT, A24, ESP)
        elif how != "resync":
            rig.tracker.add(OUT, A8, BEFORE[A8])
        in_order(rig, NESTED)


@pytest.mark.parametrize("profile", ["freebsd-10", "netbsd", "macos"])
def test_another_priority_moves_a_policy_whose_image_stays(profile: str) -> None:
    """These kernels do not store it, but it says what comes before what."""
    rig = Rig(profile)
    wide, narrow = Selector("10.1.0.0/16", "10.2.0.0/16"), Selector("10.1.1.0/24", "10.2.0.0/16")
    template = Template.tunnel("192.0.2.1", "198.51.100.1", reqid=1)
    plain, strong = Assignment(template, spi=1), Assignment(template, spi=2, priority=1000)
    rig.tracker.add(OUT, narrow, plain)
    rig.tracker.add(OUT, wide, Assignment(Template.tunnel("192.0.2.1", "198.51.100.1", reqid=3), spi=3, priority=5000))

    def order() -> list[Selector]:
        rig.embedded.advance(10)
        return [policy.selector for policy in rig.embedded.policies(OUT)]

    assert order() == [wide, narrow]
    rig.tracker.add(OUT, narrow, strong)
    assert order() == [narrow, wide]
    assert rig.tracker.add(OUT, narrow, Assignment(template, spi=4, priority=1000)).guard == ()
    rig.tracker.remove(OUT, narrow, Assignment(template, spi=4, priority=1000))
    rig.tracker.remove(OUT, narrow, strong)
    assert order() == [wide, narrow]


@pytest.mark.parametrize("fault", [closes, interrupts])
@pytest.mark.parametrize("profile", LISTS)
def test_a_guard_whose_deletion_was_not_answered_is_not_relied_on(
    profile: str, fault: Callable[[FaultyChannel, bytes], None]
) -> None:
    """It went, the connection too before that was told: it protects nothing from then on."""
    strong = Assignment(Template.tunnel("192.0.2.1", "203.0.113.9", reqid=1), spi=2, priority=100)
    for number in range(3):
        rig = Rig(profile)
        rig.tracker.add(OUT, A8, ESP)
        rig.tracker.add(OUT, A16, ESP)
        with rig.embedded.probe(OUT, "10.9.0.1", "10.9.0.2") as wide, rig.embedded.probe(OUT, A16) as narrow:
            rig.fault(DEL, fault, number)
            with suppress(PFKeyError, KeyboardInterrupt):
                rig.tracker.add(OUT, A8, strong)
            rig.channel.faults.clear()
            rig.tracker.reconnect(rig.other)
            with suppress(PFKeyError):
                rig.tracker.remove(OUT, A8, strong)
            rig.tracker.replace(OUT, A8, ESP, MOVED)
            rig.tracker.resync()
        assert (wide.bare, narrow.bare) == (0, 0), number
        rig.agrees()


WEAKER = Assignment(action=Action.NONE, priority=400)
BETWEEN = Assignment(*ESP.templates, priority=200)
STRONGER = Assignment(action=Action.DISCARD, priority=100)


@pytest.mark.parametrize("profile", LISTS)
def test_what_is_to_become_stronger_is_not_met_as_it_was(profile: str) -> None:
    """It stands behind the one that has to be moved behind it, and lets packets through until it is updated."""
    rig = Rig(profile)
    rig.tracker.add(OUT, A24, BETWEEN)
    rig.tracker.add(OUT, A8, WEAKER)
    with rig.embedded.probe(OUT, A24) as probe:
        rig.tracker.replace(OUT, A8, WEAKER, STRONGER)
    assert {step.policy.action for step in probe.log if step.policy} == {Action.IPSEC, Action.DISCARD}
    assert None not in {step.policy for step in probe.log}
    assert [policy.selector for policy in rig.entries()] == [A8, A24]
    rig.agrees()


@pytest.mark.parametrize("others", [(), (A16,)], ids=["two", "three"])
@pytest.mark.parametrize("profile", LISTS)
def test_killed_at_every_message_while_it_becomes_stronger(profile: str, others: tuple[Selector, ...]) -> None:
    """The next start leaves what nobody had moved yet, or finishes what the dead process had begun."""
    for lives in range(3, 16):
        rig = Rig(profile, owner="d")
        for one in (A24, *others):
            rig.tracker.add(OUT, one, BETWEEN)
        rig.tracker.add(OUT, A8, WEAKER)
        with rig.embedded.probe(OUT, A24) as probe:
            rig.channel.lives = lives - 3
            with suppress(KilledError):
                rig.tracker.replace(OUT, A8, WEAKER, STRONGER)
            rig.restart(owner="d").add(OUT, BESIDE, ESP)
            assert rig.guards() == []
        assert all(step.policy and step.policy.action != Action.NONE for step in probe.log), lives
        found = rig.embedded.lookup(OUT, "10.1.1.1", "10.2.1.1")
        assert found is not None
        assert found.action != Action.NONE, lives


@pytest.mark.parametrize("profile", LISTS)
def test_a_sweep_after_a_restart_restores_the_order(profile: str) -> None:
    """A process died after it had added a stronger policy, before the weaker one was put behind it."""
    for order in itertools.permutations((A8, A24)):
        rig = Rig(profile, owner="d")
        rig.tracker.add(OUT, A8, ANYWHERE)
        rig.channel.lives = 2
        with suppress(KilledError):
            rig.tracker.add(OUT, A24, ESP)
        assert [policy.selector for policy in rig.entries()][-1] == A24
        tracker = rig.restart(owner="d")
        with tracker.transaction(sweep=True):
            for selector in order:
                tracker.add(OUT, selector, ANYWHERE if selector == A8 else ESP)
        assert [policy.selector for policy in rig.entries()] == [A24, A8]
        rig.agrees()


@pytest.mark.parametrize("profile", LISTS)
def test_what_lingered_comes_back_to_its_new_place(profile: str) -> None:
    rig = Rig(profile, linger=60.0)
    weak = Assignment(*ESP.templates, priority=500)
    rig.tracker.add(OUT, A8, WEAKER)
    rig.tracker.add(OUT, A24, weak)
    rig.tracker.remove(OUT, A24, weak)
    rig.tracker.add(OUT, A24, BETWEEN)
    assert [policy.selector for policy in rig.entries()] == [A24, A8]
    rig.agrees()
