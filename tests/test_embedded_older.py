"""The SADs of FreeBSD up to 11.0, NetBSD and macOS, and what a client has to know to speak to them."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest
from embedded_client import OLDER, OUT, SITE, TUNNEL, Client, discard, esp

from pfkey import (
    Action,
    ExtensionType,
    Lifetime,
    MessageType,
    Mode,
    Policy,
    SAProtocol,
    SecurityAssociation,
    connect,
    encode,
)
from pfkey.constants import SAState
from pfkey.conversation import Conversation
from pfkey.messages import SA2, Address, Algorithm, PolicyExtension, SPIRange
from pfkey.typed import association_message

GETSPI, ADD, UPDATE, DELETE = (
    MessageType.GETSPI, MessageType.ADD, MessageType.UPDATE, MessageType.DELETE,
)  # fmt: skip
A, B = ip_address("192.0.2.1"), ip_address("198.51.100.1")
ESP = SecurityAssociation(
    A,
    B,
    0x1000,
    SAProtocol.ESP,
    Mode.TUNNEL,
    reqid=7,
    authentication="hmac-sha2-256",
    authentication_key=bytes(32),
    encryption="aes-cbc",
    encryption_key=bytes(16),
)


@pytest.fixture(params=OLDER)
def client(request: pytest.FixtureRequest) -> Client:
    return Client(request.param)


def error(client: Client, kind: MessageType, sa: SecurityAssociation, pid: int = 99) -> str:
    client.received()
    client.seq += 1
    client.send(association_message(kind, sa, client.abi).replace(seq=client.seq, pid=pid))
    return client.error(client.received()[0])


def test_an_spi_is_taken_for_its_pair_only(client: Client) -> None:
    """GETSPI gives nobody one that any SA has, all the same."""
    assert error(client, ADD, ESP) == ""
    assert error(client, ADD, ESP) == "EEXIST"
    assert error(client, ADD, replace(ESP, destination=ip_address("198.51.100.2"))) == ""
    ranged = {
        ExtensionType.ADDRESS_SRC: Address(A),
        ExtensionType.ADDRESS_DST: Address(ip_address("198.51.100.3")),
        ExtensionType.SPIRANGE: SPIRange(0x1000, 0x1000),
        ExtensionType.SA2: SA2(2, 0, 7),
    }
    assert client.error(client.ask(GETSPI, ranged, 3)) == "EEXIST"
    assert error(client, DELETE, replace(ESP, destination=ip_address("198.51.100.9"))) == "ENOENT"
    assert error(client, DELETE, ESP) == ""
    assert len(client.kernel.associations()) == 1


def test_update_makes_an_sa_anew(client: Client) -> None:
    """With its keys, whether it is larval or mature; lifetimes alone are refused (seen on 11-CURRENT)."""
    assert error(client, ADD, ESP) == ""
    limited = replace(ESP, lifetime_hard=Lifetime(addtime=100), lifetime_soft=Lifetime(addtime=50))
    message = association_message(UPDATE, limited, client.abi)
    without_keys = {kind: value for kind, value in message.extensions.items() if "KEY" not in ExtensionType(kind).name}
    assert client.error(client.ask(UPDATE, without_keys, 3)) == "EINVAL"
    assert error(client, UPDATE, replace(limited, encryption_key=bytes(32)), pid=98) == "EINVAL"
    assert error(client, UPDATE, replace(limited, encryption_key=bytes(32))) == ""
    (sa,) = client.kernel.associations()
    assert (sa.encryption_key, sa.lifetime_hard, sa.state) == (bytes(32), Lifetime(addtime=100), SAState.MATURE)


def test_the_algorithms_are_those_of_the_system(client: Client) -> None:
    """What REGISTER lists has names there, and every algorithm listed can be added by that name."""
    with connect(client.channel) as kernel:
        supported = kernel.register()
        profile = client.kernel.profile
        assert tuple(supported.encryption) == tuple(Algorithm(*row) for row in profile.encryption)
        for number, (id, _, least, _) in enumerate(profile.encryption):
            name = client.abi.encryption_names[id]
            salted = name == "aes-ctr" or "gcm" in name or "gmac" in name or "chacha" in name
            if name == "null":
                continue  # wants an empty key, which association_message leaves out
            key = bytes(least // 8 + 4 * salted)
            sa = replace(ESP, spi=0x2000 + number, encryption=name, encryption_key=key)
            if "gcm" in name or "chacha" in name or "gmac" in name:
                sa = replace(sa, authentication=None, authentication_key=b"")
            kernel.add_sa(sa)
            assert kernel.get_sa(sa).encryption == name
        names = {client.abi.authentication_names[row[0]] for row in profile.authentication}
    assert {"hmac-md5", "hmac-sha1", "hmac-sha2-256", "hmac-sha2-512", "null"} <= names


def test_gcm_on_a_system_that_notes_no_authentication() -> None:
    client = Client("macos")
    sa = replace(ESP, encryption="aes-gcm-16", encryption_key=bytes(20), authentication=None, authentication_key=b"")
    client.send(association_message(ADD, sa, client.abi))
    (answer,) = client.received()
    assert client.error(answer) == ""
    (found,) = client.kernel.associations()
    assert (found.encryption, found.authentication) == ("aes-gcm-16", None)


# The client.


def test_a_policy_can_be_asked_for_by_id(client: Client) -> None:
    """Whatever seq the answer has: 0 on macOS and on an 11-CURRENT."""
    with connect(client.channel, timeout=5) as kernel:
        one, two = kernel.add_policy(discard(priority=0)), kernel.add_policy(discard(SITE.reversed(), priority=0))
        assert kernel.get_policy(two.id).selector == SITE.reversed()
        assert kernel.get_policy(one.id).selector == SITE
        with pytest.raises(FileNotFoundError):
            kernel.get_policy(77)
        assert kernel.update_policy(esp(priority=0)).id == 3
        assert kernel.get_policy(3).templates == (TUNNEL,)
        assert list(kernel.events(0)) == []


def test_an_answer_without_seq_goes_to_who_asked_for_that_id() -> None:
    client = Client("macos")
    ids = [client.add(discard(selector)).policy for selector in (SITE, SITE.reversed())]
    talk = Conversation(client.abi, pid=99)
    requests = [
        talk.request(client.build(MessageType.SPDGET, {ExtensionType.POLICY: PolicyExtension(2, OUT, one.id)}))
        for one in ids
        if one is not None
    ]
    client.received()
    for request in reversed(requests):
        client.channel.send(request.data)
    for request in reversed(requests):
        data = client.channel.receive(0)
        assert data is not None
        assert data[8:12] == bytes(4)
        assert talk.receive(data) is request
    assert [request.done for request in requests] == [True, True]
    for request in requests:
        talk.end(request)
    assert talk.receive(encode(requests[0].replies[0])) is None
    assert talk.take_events() == []  # late, and nobody's news


def test_a_system_that_keeps_the_seq_is_held_to_it() -> None:
    client = Client("freebsd-12")
    added = client.add(discard()).policy
    assert added is not None
    talk = Conversation(client.abi, pid=99)
    wanted = {ExtensionType.POLICY: PolicyExtension(Action.IPSEC, OUT, added.id)}
    request = talk.request(client.build(MessageType.SPDGET, wanted))
    client.received()
    client.channel.send(request.data)
    (answer,) = client.received()
    assert talk.receive(encode(answer.replace(seq=0))) is None
    assert not request.done
    assert talk.receive(encode(answer)) is request


def test_lifetimes_of_policies_are_shown(client: Client) -> None:
    """A hard lifetime that is never reached stays, and comes back: what marks a policy as somebody's."""
    mark = Lifetime(addtime=0x7FFF_FFFF_0000_0001)
    with connect(client.channel) as kernel:
        kernel.add_policy(Policy(OUT, SITE, Action.DISCARD, lifetime_hard=mark))
        client.kernel.advance(1e9)
        (policy,) = kernel.dump_policies()
    assert policy.lifetime_hard == mark


def test_getspi_then_update(client: Client) -> None:
    with connect(client.channel) as kernel:
        spi = kernel.get_spi(A, B, minimum=0x5000, maximum=0x5000, mode=Mode.TUNNEL, reqid=7)
        kernel.update_sa(replace(ESP, spi=spi))
        assert kernel.get_sa(replace(ESP, spi=spi)).encryption == "aes-cbc"
    (sa,) = client.kernel.associations()
    assert (sa.state, sa.spi) == (SAState.MATURE, 0x5000)
