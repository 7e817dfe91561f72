"""The SPD of the embedded kernels: identity, order, ids, and what is stored, system by system."""

from __future__ import annotations

from typing import Any

import pytest
from embedded_client import ALL, FREEBSD, IN, KAME, LINUX, LIST_ORDER, OLDER, OUT, SITE, TUNNEL, Client, discard, esp

from pfkey import (
    Action,
    Direction,
    ExtensionType,
    Level,
    Lifetime,
    MessageType,
    NotSupported,
    Policy,
    SAProtocol,
    Selector,
    Template,
    encode,
)
from pfkey.embedded import EmbeddedKernel, Verdict
from pfkey.messages import Address, PolicyExtension
from pfkey.typed import policy_message

ADD, UPDATE, DELETE, DUMP = MessageType.SPDADD, MessageType.SPDUPDATE, MessageType.SPDDELETE, MessageType.SPDDUMP
GET, DELETE2, FLUSH = MessageType.SPDGET, MessageType.SPDDELETE2, MessageType.SPDFLUSH
FIRST, SECOND, THIRD = (Selector(f"10.{n}.0.0/16", "10.2.0.0/16") for n in (1, 3, 4))


@pytest.fixture(params=ALL)
def client(request: pytest.FixtureRequest) -> Client:
    return Client(request.param)


def only(*profiles: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("client", profiles, indirect=True)


def test_a_profile_nobody_knows() -> None:
    with pytest.raises(NotSupported, match=r"plan9.*linux, linux-6.12, .*freebsd-14, netbsd, macos"):
        EmbeddedKernel("plan9")


# Identity.


def test_host_bits_make_another_policy(client: Client) -> None:
    client.add(discard(Selector("10.9.9.8/24", "10.2.0.0/16")))
    client.add(discard(Selector("10.9.9.9/24", "10.2.0.0/16")))
    assert [source for source, _ in client.actions()] == ["10.9.9.8/24", "10.9.9.9/24"]


@pytest.mark.parametrize("other", [discard(priority=9), esp(), esp(priority=1)], ids=["priority", "type", "both"])
def test_the_same_selector_twice_exists(client: Client, other: Policy) -> None:
    client.add(discard())
    assert client.error(client.apply(ADD, other)) == "EEXIST"
    assert client.error(client.apply(MessageType.SPDSETIDX, other)) == "EEXIST"
    assert client.actions() == [("10.1.0.0/16", Action.DISCARD)]


@pytest.mark.parametrize(
    "different",
    [
        Selector("10.1.0.0/16", "10.2.0.0/16", protocol=6),
        Selector("10.1.0.0/16", "10.2.0.0/16", protocol=6, source_port=80),
        Selector("10.1.0.0/16", "10.2.0.0/16", protocol=6, destination_port=80),
        Selector("10.1.0.0/16", "10.2.0.0/17"),
        Selector("::/0", "::/0"),
    ],
    ids=str,
)
def test_another_selector_is_another_policy(client: Client, different: Selector) -> None:
    client.add(discard())
    client.add(discard(different))
    client.add(discard(direction=IN))
    assert len(client.kernel.policies()) == 3
    assert client.error(client.apply(DELETE, discard(different))) == ""
    assert client.actions() == [("10.1.0.0/16", Action.DISCARD)]


def scoped(client: Client, scope: int) -> str:
    addresses: dict[ExtensionType, Any] = {
        kind: Address(SIX.source.ip, 64, 255, scope_id=scope)
        for kind in (ExtensionType.ADDRESS_SRC, ExtensionType.ADDRESS_DST)
    }
    answer = client.ask(ADD, addresses | {ExtensionType.POLICY: PolicyExtension(Action.DISCARD, OUT)})
    return client.error(answer)


SIX = Selector("fe80::1/64", "fe80::1/64")


@only(*KAME)
def test_freebsd_counts_scopes(client: Client) -> None:
    """Each scope is a policy of its own; a packet of a scope meets its own and the one without."""
    assert [scoped(client, scope) for scope in (2, 3, 3)] == ["", "", "EEXIST"]
    assert client.kernel.lookup(OUT, "fe80::9", "fe80::8", scope=2) is not None
    assert client.kernel.lookup(OUT, "fe80::9", "fe80::8", scope=4) is None
    assert scoped(client, 0) == ""
    assert client.kernel.lookup(OUT, "fe80::9", "fe80::8", scope=4) is not None


@only(*LINUX)
def test_linux_forgets_scopes(client: Client) -> None:
    assert [scoped(client, scope) for scope in (2, 3)] == ["", "EEXIST"]
    assert client.kernel.lookup(OUT, "fe80::9", "fe80::8", scope=4) is not None


# Order.


@only(*[name for name in ALL if name not in LIST_ORDER])
def test_a_smaller_priority_goes_first_and_equals_by_age(client: Client) -> None:
    for selector, priority in ((FIRST, 5), (SECOND, 9), (THIRD, 5)):
        client.add(discard(selector, priority))
    client.add(discard(Selector("10.9.0.0/16", "10.2.0.0/16"), 1))
    assert [source for source, _ in client.actions()] == ["10.9.0.0/16", "10.1.0.0/16", "10.4.0.0/16", "10.3.0.0/16"]


@only(*LIST_ORDER)
def test_the_order_of_a_list_is_the_order_of_adding(client: Client) -> None:
    """Whatever priority is asked for; an update moves the policy behind all others, and to the end of the dump."""
    for selector, priority in ((FIRST, 9), (SECOND, 1), (THIRD, 5)):
        client.add(discard(selector, priority))
    assert [source for source, _ in client.actions()] == ["10.1.0.0/16", "10.3.0.0/16", "10.4.0.0/16"]
    client.update(esp(selector=FIRST, priority=0))
    assert [source for source, _ in client.actions()] == ["10.3.0.0/16", "10.4.0.0/16", "10.1.0.0/16"]
    assert {policy.priority for policy in client.kernel.policies()} == {0}
    client.kernel.advance(3)
    assert [source for _, _, source in parts(client)] == ["10.3.0.0", "10.4.0.0", "10.1.0.0"]


@only(*LIST_ORDER)
def test_an_update_can_lose_a_packet_to_another_policy_of_the_list(client: Client) -> None:
    narrow = Selector("10.1.2.0/24", "10.2.0.0/16")
    client.add(esp(selector=narrow))
    client.add(discard(SITE))
    client.update(esp(selector=narrow))
    found = client.kernel.lookup(OUT, "10.1.2.3", "10.2.0.1")
    assert found is not None
    assert found.action == Action.DISCARD


@only(*[name for name in ALL if name not in LIST_ORDER])
def test_the_first_match_wins(client: Client) -> None:
    narrow, wide = Selector("10.1.2.0/24", "10.2.0.0/16"), Selector("0.0.0.0/0", "0.0.0.0/0")
    client.add(discard(wide, 5))
    client.add(esp(selector=narrow, priority=10))
    found = client.kernel.lookup(OUT, "10.1.2.3", "10.2.0.1")
    assert found is not None
    assert found.action == Action.DISCARD
    client.update(discard(wide, 11))
    found = client.kernel.lookup(OUT, "10.1.2.3", "10.2.0.1")
    assert found is not None
    assert found.templates == (TUNNEL,)
    assert client.kernel.lookup(IN, "10.1.2.3", "10.2.0.1") is None
    assert client.kernel.lookup(OUT, "::1", "::1") is None


@only(*KAME)
def test_freebsd_moves_an_updated_policy_behind_its_equals(client: Client) -> None:
    for selector in (FIRST, SECOND, THIRD):
        client.add(discard(selector))
    client.update(esp(selector=FIRST))
    assert [source for source, _ in client.actions()] == ["10.3.0.0/16", "10.4.0.0/16", "10.1.0.0/16"]


@only(*LINUX)
def test_linux_leaves_an_updated_policy_among_its_equals(client: Client) -> None:
    for selector in (FIRST, SECOND, THIRD):
        client.add(discard(selector))
    client.update(esp(selector=FIRST))
    assert client.actions()[0] == ("10.1.0.0/16", Action.IPSEC)
    client.update(esp(selector=FIRST, priority=6))
    client.update(esp(selector=FIRST, priority=5))
    assert client.actions()[2] == ("10.1.0.0/16", Action.IPSEC)


def parts(client: Client) -> list[tuple[int, int, str]]:
    """seq, reserved and source of each part of an SPDDUMP."""
    client.received()
    client.send(client.build(DUMP))
    return [(part.seq, part.reserved, str(part.source.address)) for part in client.received() if part.source]


@only(*LINUX)
def test_a_linux_dump_counts_up_newest_first(client: Client) -> None:
    for selector in (FIRST, SECOND, THIRD):
        client.add(discard(selector))
    assert parts(client) == [(1, 2, "10.4.0.0"), (2, 2, "10.3.0.0"), (0, 2, "10.1.0.0")]
    client.update(discard(FIRST))
    client.kernel.advance(1)
    assert parts(client) == [(1, 1, "10.1.0.0"), (2, 1, "10.4.0.0"), (0, 1, "10.3.0.0")]


@only(*FREEBSD)
def test_a_freebsd_dump_counts_down_in_match_order(client: Client) -> None:
    client.add(discard(FIRST, 9))
    client.add(discard(SECOND, 3))
    client.add(discard(THIRD, 3, IN))
    assert parts(client) == [(2, 1, "10.4.0.0"), (1, 1, "10.3.0.0"), (0, 1, "10.1.0.0")]
    client.update(discard(SECOND, 9))
    assert [source for _, _, source in parts(client)] == ["10.4.0.0", "10.1.0.0", "10.3.0.0"]


def test_an_empty_dump_is_one_error(client: Client) -> None:
    answer = client.ask(DUMP, seq=77)
    assert (client.error(answer), answer.seq, len(answer.extensions)) == ("ENOENT", 77, 0)


@only(*FREEBSD)
def test_satype_of_a_freebsd_dump_is_a_scope(client: Client) -> None:
    client.add(discard())
    assert client.ask(DUMP, satype=1).errno == 0
    assert client.error(client.ask(DUMP, satype=2)) == "ENOENT"
    assert client.error(client.ask(DUMP, satype=4)) == "ENOENT"
    assert client.error(client.ask(DUMP, satype=3)) == "EINVAL"


# Ids.


@only(*LINUX)
def test_linux_ids(client: Client) -> None:
    """(8 * n) | direction - 1, never 0, not chosen by the caller, kept by an update, not used twice."""
    ids = []
    for n, direction in enumerate((OUT, IN, Direction.FWD, OUT)):
        policy = discard(Selector(f"10.{n}.0.0/16", "10.2.0.0/16"), direction=direction)
        answer = client.add(Policy(**{**{f: getattr(policy, f) for f in policy.__slots__}, "id": 4711}))
        assert answer.policy is not None
        ids.append(answer.policy.id)
    assert ids == [1, 8, 18, 25]
    answer = client.update(discard(Selector("10.0.0.0/16", "10.2.0.0/16"), 99))
    assert answer.policy is not None
    assert answer.policy.id == 1


@only(*KAME)
def test_freebsd_ids(client: Client) -> None:
    """From 1 on, and a new one with every update."""
    answers = [client.add(discard(FIRST)), client.add(discard(SECOND)), client.update(discard(FIRST, 9))]
    assert [answer.policy.id for answer in answers if answer.policy] == [1, 2, 3]
    assert client.error(client.ask(GET, {ExtensionType.POLICY: PolicyExtension(0, OUT, 1)})) == "ENOENT"


def test_get_and_delete_by_id(client: Client) -> None:
    added = client.add(esp())
    assert added.policy is not None
    client.add(discard(SECOND))
    wanted = {ExtensionType.POLICY: PolicyExtension(Action.IPSEC, OUT, added.policy.id)}
    answer = client.ask(GET, wanted)
    assert answer.policy is not None
    assert (answer.type, answer.policy.templates) == (GET, (TUNNEL,))
    assert answer.policy.priority == (5 if client.abi.has_priority else 0)
    assert answer.seq == (0 if client.kernel.profile.name in ("freebsd-11", "macos") else client.seq)
    assert client.ask(DELETE2, wanted).type == DELETE2
    assert client.actions() == [("10.3.0.0/16", Action.DISCARD)]
    assert client.error(client.ask(GET, wanted)) == "ENOENT"
    gone = client.ask(DELETE2, wanted)
    assert client.error(gone) == ("ENOENT" if client.abi.name == "linux" else "EINVAL")


# Adding, updating, deleting.


def test_an_update_of_nothing_adds(client: Client) -> None:
    assert client.update(discard()).errno == 0
    assert client.actions() == [("10.1.0.0/16", Action.DISCARD)]


def test_deleting_looks_at_selector_and_direction_only(client: Client) -> None:
    client.add(esp())
    assert client.error(client.apply(DELETE, discard(direction=IN))) == client.abi.absent_policy_error
    answer = client.apply(DELETE, discard(priority=99))
    assert answer.errno == 0
    assert client.actions() == []
    assert client.error(client.apply(DELETE, discard())) == client.abi.absent_policy_error


def test_what_a_delete_answers(client: Client) -> None:
    """Linux shows the policy that went, FreeBSD the request with the id."""
    client.add(esp())
    answer = client.apply(DELETE, discard(priority=99))
    assert answer.policy is not None
    shown = (answer.policy.action, answer.policy.priority, len(answer.policy.templates), answer.policy.id)
    asked = (Action.DISCARD, 99 if client.abi.has_priority else 0, 0, 1)
    assert shown == ((Action.IPSEC, 5, 1, 1) if client.abi.name == "linux" else asked)


def test_flush(client: Client) -> None:
    client.add(discard())
    client.add(discard(direction=IN))
    client.received()
    client.send(client.build(FLUSH))
    assert [answer.type for answer in client.received()] == [FLUSH] * (2 if client.abi.flush_answers_twice else 1)
    assert client.kernel.policies() == []
    client.send(client.build(FLUSH))
    assert len(client.received()) == 1


@only(*KAME)
def test_freebsd_flushes_on_a_bare_header_only(client: Client) -> None:
    client.add(discard())
    assert client.error(client.ask(FLUSH, {ExtensionType.POLICY: PolicyExtension(0, OUT)})) == "EINVAL"
    assert client.actions() != []


def test_setidx_is_an_add(client: Client) -> None:
    answer = client.apply(MessageType.SPDSETIDX, discard())
    assert answer.type == (ADD if client.abi.setidx_answers_spdadd else MessageType.SPDSETIDX)
    assert client.actions() == [("10.1.0.0/16", Action.DISCARD)]


@only(*OLDER)
def test_older_ones_say_nothing_to_a_direction_they_lack(client: Client) -> None:
    """SPDADD and SPDUPDATE: send() succeeds, and no reply ever comes (seen on 11-CURRENT); the old policy stands."""
    client.add(discard())
    client.received()
    for kind in (ADD, UPDATE, MessageType.SPDSETIDX):
        for direction in (0, 3, 77):
            client.send(policy_message(kind, Policy(direction, SITE, Action.DISCARD), client.abi))
    assert client.received() == []
    assert client.actions() == [("10.1.0.0/16", Action.DISCARD)]
    assert client.error(client.apply(DELETE, Policy(Direction.FWD, SITE, Action.DISCARD))) == "EINVAL"


@only(*[name for name in OLDER if name != "netbsd"])
def test_the_dead_stay_in_dumps_for_three_seconds(client: Client) -> None:
    """Deleted, replaced or flushed, with their old ids, where they stood; nothing else finds them."""
    client.add(discard(FIRST))
    client.add(discard(SECOND))
    client.update(esp(selector=FIRST))
    client.apply(DELETE, discard(SECOND))

    def ids() -> list[int]:
        client.received()
        client.send(client.build(DUMP))
        return [part.policy.id for part in client.received() if part.policy]

    assert (ids(), len(client.kernel.policies())) == ([1, 2, 3], 1)
    for gone in (1, 2):
        assert client.error(client.ask(GET, {ExtensionType.POLICY: PolicyExtension(0, OUT, gone)})) == "ENOENT"
    assert client.kernel.lookup(OUT, "10.3.0.1", "10.2.0.1") is None
    client.kernel.advance(2.7)
    assert ids() == [1, 2, 3]
    client.kernel.advance(0.05)
    assert ids() == [3]
    client.ask(FLUSH)
    assert ids() == [3]
    client.kernel.advance(3)
    assert client.error(client.ask(DUMP)) == "ENOENT"


@only(*FREEBSD, "netbsd")
def test_elsewhere_the_dead_are_gone(client: Client) -> None:
    client.add(discard())
    client.apply(DELETE, discard())
    assert client.error(client.ask(DUMP)) == "ENOENT"


@only(*OLDER)
def test_an_older_dump_takes_no_satype(client: Client) -> None:
    client.add(discard())
    assert [client.error(client.ask(DUMP, satype=satype)) for satype in (0, 1, 2, 3)] == ["", *["EINVAL"] * 3]


@only(*OLDER)
def test_an_older_setidx_makes_an_empty_policy(client: Client) -> None:
    empty = Policy(OUT, SITE, Action.IPSEC)
    assert client.error(client.apply(ADD, empty)) == "EINVAL"
    assert client.error(client.apply(MessageType.SPDSETIDX, empty)) == ""
    assert client.kernel.packet(OUT, "10.1.0.1", "10.2.0.1").verdict is Verdict.DROPPED


@only("freebsd-10", "freebsd-11", "netbsd", "macos")
def test_older_ones_show_no_scope(client: Client) -> None:
    id = client.add(discard()).policy
    assert id is not None
    client.received()
    client.send(client.build(GET, {ExtensionType.POLICY: PolicyExtension(0, OUT, id.id)}))
    answer = client.channel.receive(0)
    assert answer is not None
    policy = answer.index(bytes((2, 0, 18, 0)))
    assert answer[policy + 7] == 0


@only("macos")
def test_macos_does_not_know_nat_t(client: Client) -> None:
    """Its numbers from 20 on are others, and the kernel here takes none of them."""
    good = encode(policy_message(ADD, discard(), client.abi))
    for number in range(20, 30):
        data = client.kernel.wire.message(ADD, 0, 1, 1, good[16:] + client.kernel.wire.small(number, bytes(4)))
        with pytest.raises(OSError, match="EINVAL"):
            client.channel.send(data)
    assert client.kernel.policies() == []


@only(*FREEBSD)
def test_freebsd_has_no_forward_direction(client: Client) -> None:
    for kind in (ADD, UPDATE, DELETE):
        assert client.error(client.apply(kind, discard(direction=Direction.FWD))) == "EINVAL"


# What is stored.


def stored(client: Client, *templates: Template, direction: Direction = IN) -> tuple[Template, ...]:
    client.send(client.build(FLUSH))
    client.add(esp(*templates, direction=direction))
    return client.kernel.policies(direction)[0].templates


ENDS = ("192.0.2.1", "198.51.100.1")


@pytest.mark.parametrize("level", list(Level))
def test_a_reqid_stays_with_level_unique_only(client: Client, level: Level) -> None:
    kept = stored(client, Template.tunnel(*ENDS, reqid=9, level=level))[0]
    assert kept.reqid == (9 if level == Level.UNIQUE else 0)
    linux = client.abi.name == "linux"
    assert kept.level == (Level.REQUIRE if linux and level == Level.DEFAULT else level)


@pytest.mark.parametrize("reqid", [0, 16384, 20000, 65535])
def test_unique_without_a_usable_reqid_gets_one(client: Client, reqid: int) -> None:
    """Both systems show it in the answer, so that a client can compare; the counters begin differently."""
    answer = client.add(esp(Template.tunnel(*ENDS, reqid=reqid, level=Level.UNIQUE)))
    assert answer.policy is not None
    first = 16384 if client.abi.name == "linux" else 16385
    assert answer.policy.templates[0].reqid == first
    assert client.kernel.policies(OUT)[0].templates[0].reqid == first
    answer = client.update(esp(Template.tunnel(*ENDS, reqid=reqid, level=Level.UNIQUE)))
    assert answer.policy is not None
    assert answer.policy.templates[0].reqid == first + 1


@pytest.mark.parametrize("reqid", [1, 16383])
def test_unique_keeps_a_manual_reqid(client: Client, reqid: int) -> None:
    assert stored(client, Template.tunnel(*ENDS, reqid=reqid))[0].reqid == reqid


def test_several_templates_in_their_order(client: Client) -> None:
    bundle = (
        Template.tunnel(*ENDS, protocol=SAProtocol.IPCOMP, level=Level.USE),
        Template.transport(protocol=SAProtocol.ESP, reqid=3),
        Template.tunnel("2001:db8::1", "2001:db8::2", protocol=SAProtocol.AH),
    )
    assert stored(client, *bundle) == bundle


def test_ipsec_without_templates(client: Client) -> None:
    """Linux stores a bypass, FreeBSD refuses."""
    answer = client.apply(ADD, Policy(OUT, SITE, Action.IPSEC))
    if client.abi.empty_ipsec_is_bypass:
        assert answer.policy is not None
        assert answer.policy.action == Action.NONE
        assert client.actions() == [("10.1.0.0/16", Action.NONE)]
    else:
        assert client.error(answer) == "EINVAL"
        assert client.actions() == []


@pytest.mark.parametrize("action", [Action.DISCARD, Action.NONE])
def test_templates_of_other_actions_are_dropped(client: Client, action: Action) -> None:
    client.add(Policy(OUT, SITE, action, (TUNNEL,)))
    assert client.kernel.policies(OUT)[0].templates == ()


@only(*KAME)
def test_freebsd_shows_times_with_a_hard_lifetime_only(client: Client) -> None:
    id = client.add(discard())
    assert id.policy is not None
    shown = client.ask(GET, {ExtensionType.POLICY: PolicyExtension(0, OUT, id.policy.id)})
    assert shown.lifetime_hard is None
    assert shown.lifetime_current is None
    limited = Policy(OUT, SECOND, Action.DISCARD, lifetime_hard=Lifetime(3, 4, 3600, 60))
    id = client.add(limited)
    assert id.policy is not None
    shown = client.ask(GET, {ExtensionType.POLICY: PolicyExtension(0, OUT, id.policy.id)})
    assert shown.lifetime_hard == Lifetime(0, 0, 3600, 60)
    assert shown.lifetime_current == Lifetime(0, 0, 1_700_000_000, 1_700_000_000)
