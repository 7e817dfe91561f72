"""Packets: what becomes of one, who is asked for an SA, and that the codec reads all that these kernels say."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest
from embedded_client import (
    ALL,
    IN,
    KAME,
    LINUX,
    OLDER,
    OUT,
    PACKET,
    SA,
    SITE,
    TUNNEL,
    Client,
    add,
    discard,
    esp,
    limited,
    only,
    registered,
    verdict,
)

from pfkey import (
    Action,
    ExtensionType,
    Level,
    Lifetime,
    Message,
    MessageType,
    Mode,
    Policy,
    SAProtocol,
    Selector,
    Template,
    decode,
    encode,
)
from pfkey.constants import SAState, SAType
from pfkey.embedded import EmbeddedChannel, Verdict
from pfkey.extensions import Proposal
from pfkey.messages import SA2, Address, PolicyExtension
from pfkey.typed import association_message, policy_message

ACQUIRE, EXPIRE, SPDEXPIRE = MessageType.ACQUIRE, MessageType.EXPIRE, MessageType.SPDEXPIRE
NOW = 1_700_000_000
OUTSIDE = ("10.9.0.1", "10.2.0.1")
REQUIRED = Template.tunnel("192.0.2.1", "198.51.100.1", level=Level.REQUIRE)


@pytest.fixture(params=ALL)
def client(request: pytest.FixtureRequest) -> Client:
    return Client(request.param)


# What becomes of a packet.


def test_by_the_action(client: Client) -> None:
    assert client.kernel.packet(OUT, *PACKET).verdict is Verdict.PLAINTEXT
    for action, expected in ((Action.DISCARD, "dropped"), (Action.NONE, "plaintext")):
        client.update(Policy(OUT, SITE, action))
        passage = client.kernel.packet(OUT, *PACKET)
        assert (passage.verdict.value, passage.policy) == (expected, client.kernel.policies(OUT)[0])
        assert verdict(client, packet=OUTSIDE) == "plaintext"


def test_through_an_sa(client: Client) -> None:
    client.add(esp())
    add(client)
    passage = client.kernel.packet(OUT, *PACKET, size=300)
    assert (passage.verdict, [sa.spi for sa in passage.associations]) == (Verdict.PROTECTED, [0x1000])
    (sa,) = client.kernel.associations()
    assert sa.lifetime_current == Lifetime(1, 300, NOW, NOW)


@pytest.mark.parametrize(
    "other",
    [
        {"reqid": 8},
        {"mode": Mode.TRANSPORT},
        {"protocol": SAProtocol.AH, "authentication": "hmac-sha1", "authentication_key": bytes(20)},
        {"destination": ip_address("198.51.100.9")},
        {"source": ip_address("192.0.2.9")},
    ],
    ids=lambda other: next(iter(other)),
)
def test_an_sa_that_does_not_fit_the_template(client: Client, other: dict[str, object]) -> None:
    client.add(esp())
    sa = replace(SA, **other)  # type: ignore[arg-type]
    if sa.protocol == SAProtocol.AH:
        sa = replace(sa, encryption=None, encryption_key=b"")
    add(client, sa)
    assert verdict(client) == "dropped"


def test_a_template_without_reqid(client: Client) -> None:
    """Linux wants an SA without one too, FreeBSD takes any."""
    client.add(esp(REQUIRED))
    add(client)
    assert verdict(client) == ("dropped" if client.abi.name == "linux" else "protected")
    add(client, replace(SA, spi=0x1001, reqid=0))
    assert verdict(client) == "protected"


def test_of_two_sas_linux_takes_the_young_and_freebsd_the_old(client: Client) -> None:
    client.add(esp())
    add(client)
    client.kernel.advance(5)
    add(client, replace(SA, spi=0x1001))
    passage = client.kernel.packet(OUT, *PACKET)
    assert [sa.spi for sa in passage.associations] == [0x1001 if client.abi.name == "linux" else 0x1000]


def test_level_use_lets_pass_what_has_no_sa(client: Client) -> None:
    template = Template.transport(level=Level.USE)
    client.add(esp(template))
    listener = registered(client)
    assert verdict(client) == "plaintext"
    assert [message.type for message in client.received(listener)] == [ACQUIRE]


def test_level_default(client: Client) -> None:
    """Protection on Linux, a sysctl on FreeBSD that says no by default."""
    client.add(esp(Template.transport(level=Level.DEFAULT)))
    assert verdict(client) == ("dropped" if client.abi.name == "linux" else "plaintext")


def test_a_bundle_needs_every_sa(client: Client) -> None:
    client.add(esp(TUNNEL, Template.transport(protocol=SAProtocol.AH, reqid=3)))
    add(client)
    assert verdict(client) == "dropped"
    ah = replace(SA, spi=0x2000, protocol=SAProtocol.AH, mode=Mode.TRANSPORT, reqid=3)
    ah = replace(ah, encryption=None, encryption_key=b"", authentication="hmac-sha1", authentication_key=bytes(20))
    add(client, ah)
    assert [sa.spi for sa in client.kernel.packet(OUT, *PACKET).associations] == [0x1000, 0x2000]


def test_plaintext_that_comes_in(client: Client) -> None:
    assert verdict(client, IN) == "plaintext"
    client.add(esp(direction=IN))
    assert verdict(client, IN) == "dropped"
    client.update(esp(Template.transport(level=Level.USE), direction=IN))
    assert verdict(client, IN) == "plaintext"


def test_icmp_types(client: Client) -> None:
    """Linux looks at type and code of both ICMPs, FreeBSD at those of ICMPv6 only."""
    client.add(discard(Selector("0.0.0.0/0", "0.0.0.0/0", protocol="icmp", icmp_type=8)))
    client.add(discard(Selector("::/0", "::/0", protocol="icmp6", icmp_type=135)))

    def hit(source: str, protocol: int, kind: int) -> bool:
        return client.kernel.lookup(OUT, source, source, protocol=protocol, ports=(kind, 0)) is not None

    assert [hit("10.0.0.1", 1, kind) for kind in (8, 0)] == [client.abi.name == "linux", False]
    assert [hit("::1", 58, kind) for kind in (135, 136)] == [True, False]


def test_ports(client: Client) -> None:
    client.add(discard(Selector("10.1.0.0/16", "10.2.0.0/16", protocol="tcp", destination_port=443)))
    for protocol, ports, expected in ((6, (1, 443), True), (6, (443, 1), False), (17, (1, 443), False)):
        assert (client.kernel.lookup(OUT, *PACKET, protocol=protocol, ports=ports) is not None) is expected
    assert client.kernel.lookup(OUT, *PACKET) is None


def test_when_a_policy_was_used(client: Client) -> None:
    client.add(discard())
    used = client.kernel.policies(OUT)[0].lifetime_current
    assert used == Lifetime(0, 0, NOW, 0 if client.abi.name == "linux" else NOW)
    for _ in range(2):
        client.kernel.advance(5)
        verdict(client)
    assert client.kernel.policies(OUT)[0].lifetime_current == Lifetime(0, 0, NOW, NOW + 10)


def test_a_packet_without_its_sa_is_no_use_on_linux(client: Client) -> None:
    client.add(esp())
    client.kernel.advance(5)
    assert verdict(client) == "dropped"
    used = client.kernel.policies(OUT)[0].lifetime_current
    assert used is not None
    assert used.usetime == (0 if client.abi.name == "linux" else NOW + 5)


# ACQUIRE.


def asked(client: Client, channel: EmbeddedChannel) -> list[Message]:
    return [message for message in client.received(channel) if message.type == ACQUIRE]


def test_a_missing_sa_is_asked_for_once(client: Client) -> None:
    added = client.add(esp(priority=3))
    listener, deaf = registered(client), client.kernel.connect()
    assert [verdict(client), verdict(client)] == ["dropped", "dropped"]
    (message,) = asked(client, listener)
    assert (message.satype, message.pid, message.errno) == (SAType.ESP, 0, 0)
    assert message.seq != 0
    assert added.policy is not None
    assert message.policy == PolicyExtension(Action.IPSEC, OUT, added.policy.id, 3 if client.abi.has_priority else 0)
    linux = client.abi.name == "linux"
    assert message.source == Address(SA.source, 32, 0 if linux else 255)
    assert message.destination == Address(SA.destination, 32, 0 if linux else 255)
    assert message.sa2 == (None if linux or client.kernel.profile.name in OLDER else SA2(Mode.TUNNEL, 0, 7))
    assert message.get(ExtensionType.PROPOSAL) == Proposal(32)
    assert client.received(deaf) == []


def test_asking_over_ipv6(client: Client) -> None:
    listener = registered(client)
    client.add(esp(Template.tunnel("2001:db8::1", "2001:db8::2", reqid=7)))
    verdict(client)
    (message,) = asked(client, listener)
    protocol = 0 if client.abi.name == "linux" else 255
    assert message.source == Address(ip_address("2001:db8::1"), 128, protocol)
    assert message.destination == Address(ip_address("2001:db8::2"), 128, protocol)


@only(*LINUX)
def test_nobody_to_ask_on_linux(client: Client) -> None:
    client.add(esp())
    assert verdict(client) == "dropped"
    assert client.kernel.associations() == []
    listener = registered(client)
    assert verdict(client) == "dropped"
    assert len(asked(client, listener)) == 1
    (larval,) = client.kernel.associations()
    assert (larval.spi, larval.state, larval.lifetime_hard) == (0, SAState.LARVAL, Lifetime(addtime=30))


@only(*LINUX)
def test_linux_asks_again_when_the_larval_sa_is_gone(client: Client) -> None:
    client.add(esp())
    listener = registered(client)
    verdict(client)
    client.kernel.advance(29)
    verdict(client)
    client.kernel.advance(1)
    assert client.kernel.associations() == []
    verdict(client)
    kinds = [message.type for message in client.received(listener)]
    assert kinds == [ACQUIRE, EXPIRE, ACQUIRE]


@only(*KAME)
def test_freebsd_asks_again_after_ten_packets_or_twenty_seconds(client: Client) -> None:
    client.add(esp())
    listener = registered(client)
    counts = []
    for _ in range(24):
        verdict(client)
        counts += asked(client, listener)
    first, second, last = counts
    assert first.seq == second.seq == last.seq
    client.kernel.advance(21)
    verdict(client)
    (third,) = asked(client, listener)
    assert third.seq != first.seq


def test_an_answered_acquire(client: Client) -> None:
    """GETSPI and UPDATE with the ACQUIRE's number, as key daemons do; then the packet goes through."""
    client.add(esp())
    listener = registered(client)
    verdict(client)
    (message,) = asked(client, listener)
    ends = {
        ExtensionType.ADDRESS_SRC: Address(SA.source),
        ExtensionType.ADDRESS_DST: Address(SA.destination),
        ExtensionType.SA2: SA2(2, 0, 7),
    }
    answer = client.ask(MessageType.GETSPI, ends, 3, seq=message.seq)
    assert answer.spi
    assert len(client.kernel.associations()) == 1
    sa = replace(SA, spi=answer.spi)
    client.send(association_message(MessageType.UPDATE, sa, client.abi).replace(seq=message.seq, pid=99))
    assert verdict(client) == "protected"
    assert len(client.kernel.associations()) == 1


def test_a_key_daemon_that_gives_up(client: Client) -> None:
    """A bare ACQUIRE with errno is never answered; Linux waits for the larval SA to go, FreeBSD asks again."""
    client.add(esp())
    listener = registered(client)
    verdict(client)
    (message,) = asked(client, listener)
    client.received()
    client.send(client.build(ACQUIRE, satype=3, seq=message.seq, errno=60))
    assert client.received() == []
    verdict(client)
    assert len(asked(client, listener)) == 1


@only(*KAME)
def test_asking_others_for_an_sa(client: Client) -> None:
    listener = registered(client)
    wanted = {
        ExtensionType.ADDRESS_SRC: Address(SA.source),
        ExtensionType.ADDRESS_DST: Address(SA.destination),
        ExtensionType.SA2: SA2(2, 0, 7),
        ExtensionType.PROPOSAL: bytes(4),
    }
    client.send(client.build(ACQUIRE, wanted, satype=3))
    assert client.received() == []
    (message,) = asked(client, listener)
    assert (message.pid, message.reqid) == (0, 7)
    add(client)
    assert client.error(client.ask(ACQUIRE, wanted, satype=3)) == "EEXIST"
    del wanted[ExtensionType.PROPOSAL]
    assert client.error(client.ask(ACQUIRE, wanted, satype=3)) == "EINVAL"


# The codec reads everything that these kernels say, and says it the same way.


def test_every_message_decodes_and_re_encodes(client: Client) -> None:
    listener = client.kernel.connect()
    listener.set_receive_buffer(1 << 20)
    client.send(client.build(MessageType.REGISTER, satype=3), listener)
    bundle = esp(TUNNEL, Template.tunnel("2001:db8::1", "2001:db8::2", level=Level.USE), direction=IN)
    for policy in (esp(), bundle, discard(Selector("::/0", "::/0", protocol=58, icmp_type=1))):
        for kind in (MessageType.SPDADD, MessageType.SPDADD, MessageType.SPDUPDATE, MessageType.SPDDELETE):
            client.send(policy_message(kind, policy, client.abi), listener)
    client.send(policy_message(MessageType.SPDADD, esp(), client.abi), listener)
    verdict(client)
    for kind in (MessageType.ADD, MessageType.ADD, MessageType.GET):
        client.send(association_message(kind, limited(Lifetime(addtime=9), Lifetime(addtime=5)), client.abi), listener)
    for kind in (MessageType.SPDDUMP, MessageType.DUMP):
        client.send(client.build(kind), listener)
    client.kernel.advance(7)
    client.kernel.advance(7)
    kinds = set()
    while (data := listener.receive(0)) is not None:
        message = decode(data, client.abi)
        kinds.add(message.type)
        assert encode(message) == data
    assert len(kinds) >= 10
