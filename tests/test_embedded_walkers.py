"""Linux: ties since 6.12, and packets on another CPU that are still on their way while the SPD changes."""

from __future__ import annotations

import pytest
from embedded_client import OUT, PACKET, Client, discard, esp

from pfkey import Action, MessageType, Policy, Selector
from pfkey.embedded import EmbeddedKernel, Probe

DELETE = MessageType.SPDDELETE
SITE = Selector("10.1.0.0/16", "10.2.0.0/16")
WIDE = Selector("10.0.0.0/8", "10.0.0.0/8")
HOSTS = Selector(*PACKET)
FILLER = Selector("10.1.0.0/16", "10.2.0.0/16", protocol=6, destination_port=1)
ALIAS = Selector("10.1.0.1/16", "10.2.0.0/16")


def met(client: Client, **packet: object) -> Action | int | None:
    policy = client.kernel.lookup(OUT, *PACKET, **packet)  # type: ignore[arg-type]
    return policy.action if policy else None


def passes(selector: Selector = SITE, priority: int = 5) -> Policy:
    return Policy(OUT, selector, Action.NONE, priority=priority)


# Ties on 6.12.


@pytest.mark.parametrize("other", [WIDE, HOSTS, Selector("10.1.0.0/24", "10.2.0.0/16")], ids=str)
def test_a_tie_goes_to_the_oldest_link(other: Selector) -> None:
    client = Client("linux-6.12")
    client.add(discard())
    client.add(passes(other))
    assert met(client) == Action.DISCARD
    client.update(discard())  # changes nothing, and loses the tie
    assert met(client) == Action.NONE
    client.update(passes(other))
    assert met(client) == Action.DISCARD


def test_without_ties_an_update_that_changes_nothing_changes_nothing() -> None:
    client = Client("linux-6.12")
    client.add(discard())
    client.add(passes(WIDE, priority=6))
    client.update(discard())
    assert met(client) == Action.DISCARD


def test_6_1_keeps_ties() -> None:
    client = Client("linux")
    client.add(discard())
    client.add(passes(WIDE))
    client.update(discard())
    assert met(client) == Action.DISCARD


def test_a_chain_keeps_its_order() -> None:
    """Of one pair of prefixes the first that matches stands for the chain, however young its link."""
    client = Client("linux-6.12")
    client.add(discard())
    client.add(passes(ALIAS))
    client.update(discard())
    assert met(client) == Action.DISCARD
    client.update(discard(priority=6))
    client.update(discard(priority=5))
    assert met(client) == Action.NONE


def test_chains_are_asked_for_each_packet() -> None:
    """UDP meets the second of the chain, which is older than its rival; TCP the first, which is younger."""
    client = Client("linux-6.12")
    client.add(discard(FILLER))
    client.add(discard(SITE))
    client.add(passes(WIDE))
    client.update(discard(FILLER))
    assert met(client, protocol=17) == Action.DISCARD
    assert met(client, protocol=6, ports=(9, 1)) == Action.NONE


# Packets that are on their way.


class Smp:
    """A kernel with two CPUs and a clock that stands still: a policy (10), fillers before it (6), a probe on it."""

    def __init__(self, profile: str = "linux", *, cpus: int | None = 2, fillers: int = 1, others: int = 0) -> None:
        self.now = 1_700_000_000.0
        self.client = Client(profile)
        self.client.kernel = EmbeddedKernel(profile, cpus=cpus, clock=lambda: self.now)
        self.client.channel = self.client.kernel.connect()
        for port in range(fillers):
            self.client.add(discard(Selector("10.1.0.0/16", "10.2.0.0/16", protocol=6, destination_port=port + 1), 6))
        for port in range(others):
            self.client.add(discard(Selector("10.1.0.0/24", "10.2.0.0/16", protocol=6, destination_port=port + 1), 6))
        self.client.add(discard(priority=10))
        self.client.kernel.grace_period()
        self.probe: Probe = self.client.kernel.probe(OUT, *PACKET)
        self.probe.arm()

    def steps(self) -> list[tuple[str, bool]]:
        """What the probe saw since the last time: each step, and whether a policy was there."""
        seen = [(step.name, step.policy is not None) for step in self.probe.log]
        self.probe.log.clear()
        return seen


def test_an_update_past_others_of_its_chain_is_missed_by_who_has_passed() -> None:
    smp = Smp()
    smp.client.update(esp(priority=3))
    assert smp.steps() == [("replaced", True), ("walking", False)]
    assert met(smp.client) == Action.IPSEC  # who starts now finds it


@pytest.mark.parametrize("priority", [10, 11, 7, 6])
def test_no_step_of_that_kind_without_a_stronger_place(priority: int) -> None:
    """As strong as before, weaker, or stronger but behind the same others (6 is behind its equals)."""
    smp = Smp()
    smp.client.update(esp(priority=priority))
    assert smp.steps() == [("replaced", True)]


def test_nor_without_others_in_the_chain() -> None:
    smp = Smp(fillers=0, others=3)
    smp.client.update(esp(priority=3))
    assert smp.steps() == [("replaced", True)]


@pytest.mark.parametrize("profile", ["linux", "linux-6.12"])
def test_nor_on_one_cpu(profile: str) -> None:
    smp = Smp(profile, cpus=None)
    smp.client.update(esp(priority=3))
    assert smp.steps() == [("replaced", True)]


@pytest.mark.parametrize(("profile", "cpus"), [("linux-smp", None), ("linux-6.12", 2)])
def test_each_linux_with_two_cpus(profile: str, cpus: int | None) -> None:
    smp = Smp(profile, cpus=cpus)
    smp.client.update(esp(priority=3))
    assert smp.steps()[-1] == ("walking", False)


def test_a_packet_of_the_policy_that_was_passed_has_met_it() -> None:
    smp = Smp()
    with smp.client.kernel.probe(OUT, *PACKET, protocol=6, ports=(9, 1)) as probe:
        smp.client.update(esp(priority=3))
    assert [(step.name, step.policy is not None) for step in probe.log] == [("replaced", True), ("walking", True)]


def test_an_alias_behind_catches_them_while_it_stands() -> None:
    """Deleted before a grace period is over it is missing to those on their way, and to nobody afterwards."""
    for waits in (False, True):
        smp = Smp()
        smp.client.add(esp(selector=ALIAS, priority=10))
        smp.client.update(esp(priority=3))
        assert smp.steps() == [("inserted", True), ("replaced", True), ("walking", True)]
        if waits:
            smp.client.channel.grace_period()
        smp.client.apply(DELETE, esp(selector=ALIAS))
        assert smp.steps() == ([("deleted", True)] if waits else [("deleted", True), ("walking", False)])


def test_sleeping_does_as_well() -> None:
    smp = Smp()
    smp.client.add(esp(selector=ALIAS, priority=10))
    smp.client.update(esp(priority=3))
    smp.steps()
    smp.now += 0.02
    smp.client.apply(DELETE, esp(selector=ALIAS))
    assert smp.steps() == [("deleted", True)]


def test_an_alias_in_front_is_passed_unless_it_had_its_grace_period() -> None:
    for waits in (False, True):
        smp = Smp()
        smp.client.add(esp(selector=ALIAS, priority=3))
        if waits:
            smp.client.channel.grace_period()
        smp.client.update(esp(priority=3))
        assert smp.steps()[-1] == ("walking", waits)


def test_a_wider_policy_behind_is_met() -> None:
    smp = Smp()
    smp.client.add(discard(WIDE, priority=99))
    smp.client.update(esp(priority=3))
    assert smp.probe.log[-1].name == "walking"
    policy = smp.probe.log[-1].policy
    assert policy is not None
    assert policy.selector == WIDE


def test_many_places_to_stand_at_are_told_once() -> None:
    smp = Smp(fillers=50)
    for priority in (5, 4, 3):
        smp.client.update(esp(priority=priority))
    assert [name for name, _ in smp.steps()] == ["replaced", "walking"] * 3
    smp.client.kernel.grace_period()
    smp.client.update(esp(priority=3))
    assert smp.steps() == [("replaced", True)]


def test_a_measured_one_without_steps_costs_nothing_and_forgets() -> None:
    """Who watches later sees no walk that has ended."""
    smp = Smp()
    smp.probe.disarm()
    smp.client.update(esp(priority=3))
    smp.now += 1
    with smp.client.kernel.probe(OUT, *PACKET) as probe:
        smp.client.update(esp(priority=3))
    assert [step.name for step in probe.log] == ["replaced"]
    assert not smp.client.kernel.walkers
