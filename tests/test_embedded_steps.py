"""Was there a moment without a policy?  The steps of an update, the probe, and faults that stop in between."""

from __future__ import annotations

import pytest
from embedded_client import ALL, KAME, LINUX, OLDER, OUT, PACKET, SITE, UNLINK_FIRST, Client, discard, esp

from pfkey import Action, Direction, MessageType, Mode, Policy, Selector, Template
from pfkey.embedded import EmbeddedKernel, Probe

ADD, UPDATE, DELETE = MessageType.SPDADD, MessageType.SPDUPDATE, MessageType.SPDDELETE
OTHER = Selector("10.3.0.0/16", "10.4.0.0/16")
ALIAS = Selector("10.1.0.1/16", "10.2.0.0/16")
BROKEN = esp(Template(99, Mode.TRANSPORT))


@pytest.fixture(params=ALL)
def client(request: pytest.FixtureRequest) -> Client:
    return Client(request.param)


def only(*profiles: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("client", profiles, indirect=True)


def names(client: Client) -> list[str]:
    seen: list[str] = []
    client.kernel.on_step.append(lambda name, kernel: seen.append(name))
    return seen


def test_the_steps_of_an_update(client: Client) -> None:
    client.add(discard())
    client.add(discard(OTHER))
    seen = names(client)
    client.update(esp())
    assert seen == [*gap(client), UPDATES.get(client.kernel.profile.name, "inserted")]


UPDATES = {**dict.fromkeys(LINUX, "replaced"), "freebsd-14": "swapped"}


def gap(client: Client) -> list[str]:
    """The steps of an update at which there is no policy; NetBSD also waits for those who still use the old one."""
    name = client.kernel.profile.name
    return [] if name in UPDATES else ["unlinked", "drained"] if name == "netbsd" else ["unlinked"]


def test_the_steps_of_the_rest(client: Client) -> None:
    seen = names(client)
    client.add(discard())
    client.update(discard(OTHER))
    client.apply(DELETE, discard())
    client.ask(MessageType.SPDFLUSH)
    assert seen == ["inserted", "inserted", "deleted", "flushed"]


def test_no_step_where_nothing_changes(client: Client) -> None:
    client.add(discard())
    seen = names(client)
    client.apply(ADD, discard())
    client.apply(DELETE, discard(OTHER))
    client.ask(MessageType.SPDDUMP)
    if client.kernel.profile.name not in OLDER:  # which would not answer
        client.update(Policy(0, SITE, Action.DISCARD))
    client.update(Policy(OUT, SITE, Action.ENTRUST))
    assert seen == []


@only(*UNLINK_FIRST)
def test_what_stands_at_each_step(client: Client) -> None:
    """Between the steps the SPD can be looked at, and the policy is really not there."""
    client.add(discard())
    states: list[tuple[str, int, bool]] = []

    def look(name: str, kernel: EmbeddedKernel) -> None:
        states.append((name, len(kernel.policies()), kernel.lookup(OUT, *PACKET) is None))

    client.kernel.on_step.append(look)
    client.update(esp())
    assert states == [*((name, 0, True) for name in gap(client)), ("inserted", 1, False)]


@only(*UNLINK_FIRST)
def test_the_old_freebsd_update_is_bare(client: Client) -> None:
    client.add(discard())
    client.add(discard(OTHER))
    with client.kernel.probe(OUT, *PACKET) as probe:
        client.update(esp())
    assert (probe.steps, probe.bare) == (len(gap(client)) + 1, len(gap(client)))
    assert [(step.name, step.policy is None) for step in probe.log] == [
        *((name, True) for name in gap(client)),
        ("inserted", False),
    ]


@only(*UPDATES)
def test_the_atomic_update_is_never_bare(client: Client) -> None:
    client.add(discard())
    client.add(discard(OTHER))
    with client.kernel.probe(OUT, *PACKET) as probe:
        for priority in (5, 9, 1):
            client.update(esp(priority=priority))
    assert (probe.steps, probe.bare) == (3, 0)


@only("freebsd-14")
def test_the_only_policy_of_a_direction_can_be_glimpsed_without(client: Client) -> None:
    """FreeBSD 14 asks without the lock whether there is any policy; one more in that direction closes the gap."""
    client.add(discard())
    client.add(discard(direction=Direction.IN))
    with client.kernel.probe(OUT, *PACKET) as out, client.kernel.probe(Direction.IN, *PACKET) as inbound:
        client.update(esp())
        client.add(discard(OTHER))
        client.update(discard())
    assert [step.name for step in out.log] == ["detached", "swapped", "inserted", "swapped"]
    assert (out.bare, inbound.bare) == (1, 0)


def test_delete_then_add_is_bare_everywhere(client: Client) -> None:
    client.add(discard())
    with client.kernel.probe(OUT, *PACKET) as probe:
        client.apply(DELETE, discard())
        client.add(esp())
    assert (probe.steps, probe.bare) == (2, 1)


def test_a_wider_policy_behind_is_no_bare_step(client: Client) -> None:
    client.add(discard(Selector("0.0.0.0/0", "0.0.0.0/0"), 99))
    client.add(esp())
    with client.kernel.probe(OUT, *PACKET) as probe:
        client.apply(DELETE, esp())
        client.add(esp())
    assert probe.bare == 0
    policy = probe.log[0].policy
    assert policy is not None
    assert policy.action == Action.DISCARD


@only(*KAME)
def test_an_alias_of_the_new_policy_closes_every_gap(client: Client) -> None:
    """The guard of the design: clone the new policy under another selector for the same packets, update, delete it."""
    client.add(discard())
    with client.kernel.probe(OUT, *PACKET) as probe:
        client.add(esp(selector=ALIAS, priority=6))
        client.update(esp())
        client.apply(DELETE, esp(selector=ALIAS))
    assert probe.steps >= 3
    assert probe.bare == 0


@only(*KAME)
def test_a_rejected_update_leaves_nothing_on_freebsd(client: Client) -> None:
    client.add(discard())
    with client.kernel.probe(OUT, *PACKET) as probe:
        assert client.error(client.update(BROKEN)) == "EPROTONOSUPPORT"
    assert client.kernel.policies() == []
    assert [(step.name, step.policy) for step in probe.log] == [(name, None) for name in gap(client) or ["unlinked"]]


@only(*LINUX)
def test_a_rejected_update_changes_nothing_on_linux(client: Client) -> None:
    client.add(discard())
    with client.kernel.probe(OUT, *PACKET) as probe:
        assert client.error(client.update(BROKEN)) == "EINVAL"
    assert client.actions() == [("10.1.0.0/16", Action.DISCARD)]
    assert probe.steps == 0


# The probe itself.


def test_a_probe_counts_while_it_is_armed(client: Client) -> None:
    probe = Probe(client.kernel, OUT, *PACKET)
    client.add(discard())
    assert (probe.armed, probe.steps) == (False, 0)
    probe.arm()
    probe.arm()
    client.add(discard(OTHER))
    probe.disarm()
    probe.disarm()
    client.apply(DELETE, discard())
    assert (probe.armed, probe.steps, probe.bare) == (False, 1, 0)
    assert client.kernel.on_step == []


def test_a_probe_looks_away_after_its_block(client: Client) -> None:
    with client.kernel.probe(OUT, *PACKET) as probe:
        assert probe.armed
    assert (probe.armed, client.kernel.on_step) == (False, [])


@pytest.mark.parametrize(
    ("selector", "hit"),
    [
        (SITE, True),
        (Selector("10.1.0.0/24", "10.2.3.4/32", protocol="tcp", destination_port=80), True),
        (Selector("10.0.0.0/15", "10.2.0.0/16"), False),
        (Selector("10.1.255.255/15", "10.2.0.0/16"), True),
        (Selector("::/0", "::/0"), False),
    ],
    ids=str,
)
def test_a_probe_of_a_selector_takes_a_packet_of_it(client: Client, selector: Selector, hit: bool) -> None:
    client.add(discard())
    with client.kernel.probe(OUT, selector) as probe:
        client.add(discard(OTHER))
    assert (probe.bare == 0) is hit


def test_a_probe_wants_both_addresses(client: Client) -> None:
    with pytest.raises(TypeError, match="source and the destination"):
        client.kernel.probe(OUT, "10.1.0.1")
    with pytest.raises(ValueError, match="one address family"):
        client.kernel.probe(OUT, "10.1.0.1", "::1")
