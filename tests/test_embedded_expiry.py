"""Time: who hears when an SA or a policy expires, and what starts the clock."""

from __future__ import annotations

import threading
import time

import pytest
from embedded_client import (
    ALL,
    KAME,
    LINUX,
    OUT,
    PACKET,
    SA,
    SITE,
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
    Policy,
    Template,
    decode,
    encode,
)
from pfkey.constants import SAState
from pfkey.embedded import EmbeddedChannel, EmbeddedKernel
from pfkey.messages import Address
from pfkey.typed import association_message

ACQUIRE, EXPIRE, SPDEXPIRE = MessageType.ACQUIRE, MessageType.EXPIRE, MessageType.SPDEXPIRE
NOW = 1_700_000_000
OUTSIDE = ("10.9.0.1", "10.2.0.1")
REQUIRED = Template.tunnel("192.0.2.1", "198.51.100.1", level=Level.REQUIRE)


@pytest.fixture(params=ALL)
def client(request: pytest.FixtureRequest) -> Client:
    return Client(request.param)


def expiries(client: Client, channel: EmbeddedChannel) -> list[tuple[SAState | int | None, bool]]:
    """Of each EXPIRE that came: the state, and whether it is the hard limit."""
    messages = [message for message in client.received(channel) if message.type == EXPIRE]
    assert all((message.seq, message.pid) == (0, 0) for message in messages)
    keys = (ExtensionType.KEY_AUTH, ExtensionType.KEY_ENCRYPT)
    assert not any(kind in message for message in messages for kind in keys)
    return [(message.state, message.lifetime_hard is not None) for message in messages]


def test_an_sa_grows_old_and_dies(client: Client) -> None:
    listener = registered(client)
    add(client, limited(Lifetime(addtime=20), Lifetime(addtime=10)))
    client.kernel.advance(9)
    assert expiries(client, listener) == []
    client.kernel.advance(2)
    assert expiries(client, listener) == [(SAState.DYING, False)]
    assert [sa.state for sa in client.kernel.associations()] == [SAState.DYING]
    client.kernel.advance(8)
    assert expiries(client, listener) == []
    client.kernel.advance(2)
    assert expiries(client, listener) == [(SAState.DEAD, True)]
    assert client.kernel.associations() == []


def test_the_clock_of_use_starts_with_the_first_packet(client: Client) -> None:
    listener = registered(client)
    client.add(esp())
    add(client, limited(Lifetime(usetime=20), Lifetime(usetime=10)))
    client.kernel.advance(100)
    assert expiries(client, listener) == []
    verdict(client)
    client.kernel.advance(11)
    assert expiries(client, listener) == [(SAState.DYING, False)]
    client.kernel.advance(10)
    assert expiries(client, listener) == [(SAState.DEAD, True)]


@only(*LINUX)
def test_linux_counts_packets_before_each(client: Client) -> None:
    listener = registered(client)
    client.add(esp())
    add(client, limited(Lifetime(allocations=3), Lifetime(allocations=2)))
    client.received(listener)
    assert [verdict(client) for _ in range(4)] == ["protected", "protected", "protected", "dropped"]
    assert expiries(client, listener) == [(SAState.DYING, False), (SAState.DEAD, True)]
    assert client.kernel.associations() == []


def test_bytes_run_out(client: Client) -> None:
    """Linux looks before every packet, FreeBSD once a second."""
    listener = registered(client)
    client.add(esp())
    add(client, limited(Lifetime(bytes=500), Lifetime(bytes=150)))
    client.received(listener)
    for _ in range(3):
        assert verdict(client) == "protected"
    linux = client.abi.name == "linux"
    assert expiries(client, listener) == ([(SAState.DYING, False)] if linux else [])
    client.kernel.advance(1)
    assert expiries(client, listener) == ([] if linux else [(SAState.DYING, False)])
    for _ in range(3):
        verdict(client)
    client.kernel.advance(1)
    assert expiries(client, listener) == [(SAState.DEAD, True)]


def test_a_larval_sa_dies(client: Client) -> None:
    listener = registered(client)
    ends = {ExtensionType.ADDRESS_SRC: Address(SA.source), ExtensionType.ADDRESS_DST: Address(SA.destination)}
    client.ask(MessageType.GETSPI, ends, 3)
    client.kernel.advance(29)
    assert len(client.kernel.associations()) == 1
    client.kernel.advance(2)
    assert client.kernel.associations() == []
    assert expiries(client, listener) == ([(SAState.DEAD, True)] if client.abi.name == "linux" else [])


def test_a_lifetime_of_zero_is_none(client: Client) -> None:
    add(client, limited(Lifetime(), Lifetime()))
    client.add(Policy(OUT, SITE, Action.DISCARD, lifetime_hard=Lifetime()))
    client.kernel.advance(10**9)
    assert (len(client.kernel.associations()), len(client.kernel.policies())) == (1, 1)


@only(*LINUX)
def test_a_linux_policy_expires_in_silence(client: Client) -> None:
    listener = registered(client)
    client.add(Policy(OUT, SITE, Action.DISCARD, lifetime_hard=Lifetime(addtime=10)))
    client.received(listener)
    with client.kernel.probe(OUT, *PACKET) as probe:
        client.kernel.advance(9.5)
        assert len(client.kernel.policies()) == 1
        client.kernel.advance(1)
    assert client.kernel.policies() == []
    assert [step.name for step in probe.log] == ["expired"]
    assert client.received(listener) == []


@only(*KAME)
def test_a_freebsd_policy_says_that_it_expires(client: Client) -> None:
    listener, deaf = registered(client), client.kernel.connect()
    client.add(Policy(OUT, SITE, Action.DISCARD, lifetime_hard=Lifetime(addtime=10)))
    client.received(listener), client.received(deaf)
    client.kernel.advance(12)
    (message,) = client.received(listener)
    assert (message.type, message.seq, message.pid) == (SPDEXPIRE, 0, 0)
    assert list(message.extensions) == [
        ExtensionType.LIFETIME_CURRENT,
        ExtensionType.LIFETIME_HARD,
        ExtensionType.ADDRESS_SRC,
        ExtensionType.ADDRESS_DST,
        ExtensionType.POLICY,
    ]
    assert message.lifetime_hard == Lifetime(addtime=10)
    assert client.kernel.policies() == []
    assert client.received(deaf) == []


def test_an_idle_policy_expires(client: Client) -> None:
    client.add(Policy(OUT, SITE, Action.DISCARD, lifetime_hard=Lifetime(usetime=10)))
    for _ in range(3):
        client.kernel.advance(8)
        assert verdict(client) == "dropped"
    client.kernel.advance(12)
    assert verdict(client) == "plaintext"


def test_an_update_starts_the_clock_anew(client: Client) -> None:
    client.add(Policy(OUT, SITE, Action.DISCARD, lifetime_hard=Lifetime(addtime=10)))
    client.kernel.advance(8)
    client.update(Policy(OUT, SITE, Action.DISCARD, lifetime_hard=Lifetime(addtime=10)))
    client.kernel.advance(8)
    assert len(client.kernel.policies()) == 1
    client.update(discard())
    client.kernel.advance(100)
    assert len(client.kernel.policies()) == 1


def test_a_waiting_reader_hears_of_an_expiry_in_real_time() -> None:
    """With the real clock nobody needs to call advance()."""
    kernel = EmbeddedKernel("linux")
    listener, sender = kernel.connect(), kernel.connect()
    listener.send(encode(Message(MessageType.REGISTER, abi=kernel.abi, satype=3)))
    listener.receive(0)
    got: list[bytes | None] = []
    thread = threading.Thread(target=lambda: got.append(listener.receive(5)))
    sender.send(
        encode(association_message(MessageType.ADD, limited(Lifetime(addtime=1), Lifetime(addtime=1)), kernel.abi))
    )
    listener.receive(0)
    begin = time.monotonic()
    thread.start()
    thread.join(5)
    assert 0.5 < time.monotonic() - begin < 4
    assert got[0] is not None
    assert decode(got[0], kernel.abi).type == EXPIRE
