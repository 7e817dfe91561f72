"""Damaged messages never break an embedded kernel: it answers, or send() fails; its databases stay in order."""

from __future__ import annotations

import random

import pytest
from embedded_client import ALL, IN, OUT, SITE, TUNNEL, Client, discard, esp

from pfkey import Direction, Level, Lifetime, MessageType, Policy, SAProtocol, Selector, Template, encode
from pfkey.constants import ExtensionType
from pfkey.messages import SA, SA2, Address, Key, NATTraversal, SecurityAssociation, SPIRange
from pfkey.typed import association_message, policy_message

MESSAGES = 4000


def good_messages(client: Client) -> list[bytes]:
    """One of every kind."""
    abi = client.abi
    policies = (
        esp(),
        discard(direction=IN),
        esp(Template.tunnel("2001:db8::1", "2001:db8::2", level=Level.UNIQUE), Template.transport(), direction=IN),
        Policy(
            OUT, Selector("::/0", "::/0", protocol=58, icmp_type=1), 2, (TUNNEL,), lifetime_hard=Lifetime(addtime=9)
        ),
    )
    associations = (
        SecurityAssociation(
            SITE.source.ip,
            SITE.destination.ip,
            0x1000,
            SAProtocol.ESP,
            encryption="aes-cbc",
            encryption_key=bytes(16),
            nat_traversal=NATTraversal(4500, 4500) if ExtensionType.NAT_T_TYPE in abi.extension_numbers else None,
            lifetime_hard=Lifetime(addtime=9),
            lifetime_soft=Lifetime(addtime=5),
        ),
        SecurityAssociation(
            SITE.source.ip,
            SITE.destination.ip,
            0x1001,
            SAProtocol.AH,
            authentication="hmac-sha1",
            authentication_key=bytes(20),
        ),
    )
    changes = (MessageType.SPDADD, MessageType.SPDUPDATE, MessageType.SPDDELETE, MessageType.SPDSETIDX)
    messages = [policy_message(kind, policy, abi) for kind in changes for policy in policies]
    messages += [
        association_message(kind, sa, abi)
        for kind in (MessageType.ADD, MessageType.UPDATE, MessageType.GET, MessageType.DELETE)
        for sa in associations
    ]
    ends = {
        ExtensionType.ADDRESS_SRC: Address(SITE.source.ip),
        ExtensionType.ADDRESS_DST: Address(SITE.destination.ip),
        ExtensionType.SPIRANGE: SPIRange(256, 300),
        ExtensionType.SA2: SA2(1, 0, 7),
    }
    messages += [client.build(MessageType.GETSPI, ends, 3), client.build(MessageType.ACQUIRE, ends, 3)]
    messages.append(client.build(MessageType.ADD, {ExtensionType.SA: SA(1), ExtensionType.KEY_AUTH: Key(b"k")}, 3))
    messages += [client.build(kind, satype=3) for kind in (MessageType.REGISTER, MessageType.DUMP, MessageType.FLUSH)]
    messages += [client.build(kind) for kind in (MessageType.SPDDUMP, MessageType.SPDFLUSH, MessageType.PROMISC)]
    return [encode(message) for message in messages]


def damaged(data: bytes, source: random.Random) -> bytes:
    """A few bytes changed, cut off or added; the length in the header is mostly made right again."""
    result = bytearray(data)
    for _ in range(source.choice([0, 1, 1, 2, 3])):
        position = source.randrange(len(result))
        result[position] = source.choice([0, 1, 2, 3, 4, 8, 16, 28, 255, result[position] ^ 1 << source.randrange(8)])
    if source.random() < 0.2:
        del result[source.randrange(len(result)) :]
    if source.random() < 0.2:
        result += bytes(source.randrange(20))
    if len(result) >= 16 and source.random() < 0.9:
        result[4:6] = (len(result) // 8 & 0xFFFF).to_bytes(2, "little")
    return bytes(result)


def failure_of(client: Client, data: bytes) -> str | None:
    """The name of the error of the send, None for none."""
    try:
        client.channel.send(data)
    except OSError as error:
        return str(getattr(error, "name", error))
    return None


@pytest.mark.parametrize("profile", ALL)
def test_damaged_messages(profile: str) -> None:
    client, source = Client(profile), random.Random(profile)
    good, listener = good_messages(client), client.kernel.connect()
    failed = answered = 0
    for number in range(MESSAGES):
        name = failure_of(client, damaged(source.choice(good), source))
        failed += name is not None
        assert name is None or name in client.abi.error_numbers
        for channel in (client.channel, listener):
            while (data := channel.receive(0)) is not None:
                answered += 1
                assert len(data) >= 16
        if number % 50 == 0:
            agrees(client)
            client.kernel.advance(1)
            client.kernel.packet(OUT, "10.1.0.1", "10.2.0.1")
    assert failed > 100
    assert answered > MESSAGES // 2


def agrees(client: Client) -> None:
    """Every way to look at the databases finds the same."""
    spd = client.kernel.spd
    entries = list(spd)
    in_order = [entry for direction in Direction for entry in spd.in_order(direction)]
    assert sorted(entry.id for entry in entries) == sorted(entry.id for entry in in_order)
    assert len({entry.id for entry in entries}) == len(entries) == len(spd)
    for entry in entries:
        assert spd.by_id(entry.id) is entry
        assert spd.find(entry.identity) is entry
        assert not entry.dead
        assert entry.policy(client.kernel.scope).id == entry.id
    for direction in Direction:
        priorities = [entry.priority for entry in spd.in_order(direction)]
        assert all(entry in spd.listed(direction) for entry in spd.in_order(direction))
        assert priorities == sorted(priorities)
    assert len(client.kernel.associations()) == len(client.kernel.sad)
    assert len(client.kernel.sad.by_groups()) == len(client.kernel.sad)
