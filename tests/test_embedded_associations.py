"""The SADs of the embedded kernels: both systems, and FreeBSD; recordings hold Linux's to a real one elsewhere."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest
from embedded_client import ALL, FREEBSD, KAME, OLDER, Client

from pfkey import (
    ExtensionType,
    Lifetime,
    Message,
    MessageType,
    Mode,
    SAProtocol,
    SecurityAssociation,
    connect,
)
from pfkey.constants import SAFlag, SAState
from pfkey.embedded.profiles import FREEBSD_12
from pfkey.messages import SA, SA2, Address, Algorithm, Key, NATTraversal, SPIRange
from pfkey.typed import association_from, association_message

GETSPI, ADD, UPDATE, DELETE = MessageType.GETSPI, MessageType.ADD, MessageType.UPDATE, MessageType.DELETE
GET, DUMP, FLUSH = MessageType.GET, MessageType.DUMP, MessageType.FLUSH
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
    replay_window=32,
)
AH = replace(ESP, spi=0x2000, protocol=SAProtocol.AH, encryption=None, encryption_key=b"")
IPCOMP = SecurityAssociation(A, B, 0x3000, SAProtocol.IPCOMP, Mode.TRANSPORT, compression="deflate")
ENDS = {ExtensionType.ADDRESS_SRC: Address(A), ExtensionType.ADDRESS_DST: Address(B)}


@pytest.fixture(params=ALL)
def client(request: pytest.FixtureRequest) -> Client:
    return Client(request.param)


def only(*profiles: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("client", profiles, indirect=True)


def tell(client: Client, kind: MessageType, sa: SecurityAssociation, **header: int) -> Message:
    client.received()
    client.seq += 1
    message = association_message(kind, sa, client.abi).replace(**({"seq": client.seq, "pid": 99} | header))
    client.send(message)
    return client.received()[0]


def add(client: Client, *associations: SecurityAssociation) -> None:
    for sa in associations:
        answer = tell(client, ADD, sa)
        assert client.error(answer) == ""


def error(client: Client, kind: MessageType, sa: SecurityAssociation, **header: int) -> str:
    return client.error(tell(client, kind, sa, **header))


def spis(client: Client) -> list[int]:
    """Of a dump, in its order."""
    client.received()
    client.send(client.build(DUMP))
    return [message.spi for message in client.received() if message.spi is not None]


def getspi(client: Client, low: int, high: int, satype: int = 3, **header: int) -> Message:
    ranged: dict[Any, Any] = ENDS | {ExtensionType.SPIRANGE: SPIRange(low, high), ExtensionType.SA2: SA2(2, 0, 7)}
    return client.ask(GETSPI, ranged, satype, **header)


# Both systems.


def test_what_was_added_is_there(client: Client) -> None:
    with connect(client.channel) as kernel:
        for sa in (ESP, AH, IPCOMP):
            kernel.add_sa(sa)
            found = kernel.get_sa(sa)
            assert (found.source, found.destination, found.spi, found.protocol) == (A, B, sa.spi, sa.protocol)
            assert (found.mode, found.reqid, found.state) == (sa.mode, sa.reqid, SAState.MATURE)
            assert (found.encryption, found.encryption_key) == (sa.encryption, sa.encryption_key)
            assert (found.authentication, found.authentication_key) == (sa.authentication, sa.authentication_key)
            assert (found.compression, found.replay_window) == (sa.compression, sa.replay_window)
        assert [sa.spi for sa in kernel.dump_sas()] == [0x3000, 0x2000, 0x1000]
        assert [sa.spi for sa in kernel.dump_sas(SAProtocol.AH)] == [0x2000]
        kernel.delete_sa(AH)
        assert len(client.kernel.associations()) == 2
        kernel.flush_sas(SAProtocol.ESP)
        assert [sa.compression for sa in client.kernel.associations()] == ["deflate"]
        kernel.flush_sas()
        assert kernel.dump_sas() == []


def test_getspi_then_update(client: Client) -> None:
    with connect(client.channel) as kernel:
        spi = kernel.get_spi(A, B, minimum=0x5000, maximum=0x5000, mode=Mode.TUNNEL, reqid=7)
        assert spi == 0x5000
        assert [sa.state for sa in client.kernel.associations()] == [SAState.LARVAL]
        kernel.update_sa(replace(ESP, spi=spi))
        (sa,) = client.kernel.associations()
        assert (sa.state, sa.spi, sa.encryption) == (SAState.MATURE, 0x5000, "aes-cbc")


def test_getspi_draws_from_the_range(client: Client) -> None:
    drawn = [getspi(client, 0x6000, 0x6003).spi for _ in range(4)]
    assert sorted(spi or 0 for spi in drawn) == [0x6000, 0x6001, 0x6002, 0x6003]
    answer = getspi(client, 0x6000, 0x6003)
    assert client.error(answer) == ("ENOENT" if client.abi.name == "linux" else "EEXIST")


def test_an_unknown_sa(client: Client) -> None:
    profile = client.kernel.profile
    for kind in (GET, DELETE):
        assert (
            error(client, kind, ESP) == profile.absent_association == ("ENOENT" if profile.name in OLDER else "ESRCH")
        )
    absent = "ESRCH" if client.abi.name == "linux" else "ENOENT" if profile.name in OLDER else "EINVAL"
    assert error(client, UPDATE, ESP) == absent


@pytest.mark.parametrize("kind", [ExtensionType.LIFETIME_HARD, ExtensionType.LIFETIME_SOFT])
def test_one_lifetime_is_none_too_few(client: Client, kind: ExtensionType) -> None:
    message = association_message(ADD, ESP, client.abi)
    answer = client.ask(ADD, dict(message.extensions) | {kind: Lifetime(addtime=5)}, 3)
    assert client.error(answer) == "EINVAL"
    assert client.kernel.associations() == []


def test_an_answer_tells_the_keys_on_linux_only(client: Client) -> None:
    listener = client.kernel.connect()
    answer = tell(client, ADD, ESP)
    (heard,) = client.received(listener)
    assert answer == heard
    assert (ExtensionType.KEY_ENCRYPT in answer.extensions) is (client.abi.name == "linux")


# FreeBSD.


@only(*FREEBSD)
def test_an_spi_is_taken_whatever_the_rest(client: Client) -> None:
    add(client, ESP)
    assert error(client, ADD, replace(ESP, destination=ip_address("198.51.100.2"))) == "EEXIST"
    assert error(client, ADD, replace(AH, spi=ESP.spi)) == "EEXIST"
    assert client.error(getspi(client, ESP.spi, ESP.spi)) == "EEXIST"


@only(*KAME)
def test_reserved_spis(client: Client) -> None:
    assert error(client, ADD, replace(ESP, spi=255)) == "EINVAL"
    assert error(client, ADD, replace(ESP, spi=256)) == ""
    assert error(client, ADD, replace(IPCOMP, spi=2)) == ""
    assert client.error(getspi(client, 100, 100)) == "EINVAL"
    assert client.error(getspi(client, 100, 100, satype=9)) == ""


@only(*KAME)
def test_what_getspi_answers(client: Client) -> None:
    """SA with the SPI and no more, the addresses as sent; only to the sender, and with its seq."""
    listener = client.kernel.connect()
    answer = getspi(client, 0x1234, 0x1234, seq=4711)
    assert list(answer.extensions) == [ExtensionType.SA, ExtensionType.ADDRESS_SRC, ExtensionType.ADDRESS_DST]
    assert (answer.sa, answer.seq, answer.source) == (SA(0x1234), 4711, Address(A))
    assert client.received(listener) == []


@only(*KAME)
def test_getspi_of_ipcomp_stays_within_16_bits(client: Client) -> None:
    assert (getspi(client, 0x20000, 0x30000, satype=9).spi or 0) == 0xFFFF


@only(*KAME)
def test_missing_keys(client: Client) -> None:
    for sa, kind in ((ESP, ExtensionType.KEY_ENCRYPT), (AH, ExtensionType.KEY_AUTH)):
        extensions = dict(association_message(ADD, sa, client.abi).extensions)
        del extensions[kind]
        satype = 3 if sa is ESP else 2
        assert client.error(client.ask(ADD, extensions, satype)) == "EINVAL"


@only(*FREEBSD)
@pytest.mark.parametrize(
    "wrong",
    [
        {"encryption": 99},
        {"authentication": 99},
        {"encryption_key": bytes(15)},
        {"encryption_key": bytes(40)},
        {"authentication_key": bytes(33)},
        {"flags": SAFlag(0x1000)},
        {"encryption": "aes-gcm-16", "encryption_key": bytes(20), "authentication": "null", "authentication_key": b""},
        {"encryption": "aes-gcm-16", "encryption_key": bytes(16), "authentication": None, "authentication_key": b""},
        {"nat_traversal": NATTraversal(4500, 4500, type=1)},
        {"nat_traversal": NATTraversal(0, 4500)},
    ],
    ids=lambda wrong: " ".join(wrong),
)
def test_what_the_transform_refuses(client: Client, wrong: dict[str, Any]) -> None:
    assert error(client, ADD, replace(ESP, **wrong)) == "EINVAL"
    assert client.kernel.associations() == []


@only(*FREEBSD)
def test_no_encryption_and_no_authentication(client: Client) -> None:
    """ "null" wants its key extensions too, empty ones."""
    extensions = dict(association_message(ADD, ESP, client.abi).extensions)
    extensions |= {ExtensionType.SA: SA(0x1000, 4, 1, 251, 11)}
    extensions |= {ExtensionType.KEY_AUTH: Key(b""), ExtensionType.KEY_ENCRYPT: Key(b"")}
    assert client.error(client.ask(ADD, extensions, 3)) == ""
    shown = tell(client, GET, ESP)
    assert (shown.get(ExtensionType.KEY_AUTH), shown.get(ExtensionType.KEY_ENCRYPT)) == (Key(b""), Key(b""))
    del extensions[ExtensionType.KEY_AUTH]
    assert client.error(client.ask(ADD, extensions | {ExtensionType.SA: SA(0x1001, 4, 1, 251, 11)}, 3)) == "EINVAL"


@only(*FREEBSD)
@pytest.mark.parametrize(("size", "shown"), [(20, "aes-128-gmac"), (28, "aes-192-gmac"), (36, "aes-256-gmac")])
def test_aes_gcm_gets_its_authentication_noted(client: Client, size: int, shown: str) -> None:
    sa = replace(ESP, encryption="aes-gcm-16", encryption_key=bytes(size), authentication=None, authentication_key=b"")
    add(client, sa)
    found = association_from(tell(client, GET, sa))
    assert (found.encryption, found.authentication, found.authentication_key) == ("aes-gcm-16", shown, b"")


@only("freebsd-12")
def test_freebsd_12_has_des_and_no_tcp_md5(client: Client) -> None:
    add(client, replace(ESP, encryption="3des-cbc", encryption_key=bytes(24)))
    assert error(client, ADD, TCP) == "EINVAL"


TCP = SecurityAssociation(
    A, B, 0x1000, SAProtocol.TCPSIGNATURE, authentication="tcp-md5", authentication_key=b"bird needs a key"
)


@only("freebsd-13", "freebsd-14")
def test_later_freebsds(client: Client) -> None:
    """Without DES; TCP-MD5 keys are found by their addresses, all with the same SPI."""
    assert error(client, ADD, replace(ESP, encryption="3des-cbc", encryption_key=bytes(24))) == "EINVAL"
    other = replace(TCP, destination=ip_address("198.51.100.9"))
    add(client, TCP, other)
    assert error(client, ADD, TCP) == "EEXIST"
    assert error(client, DELETE, TCP) == ""
    assert error(client, GET, TCP) == "ESRCH"
    assert association_from(tell(client, GET, other)).authentication_key == b"bird needs a key"


@only("freebsd-14")
def test_chacha_on_freebsd_14(client: Client) -> None:
    sa = replace(
        ESP, encryption="chacha20-poly1305", encryption_key=bytes(36), authentication=None, authentication_key=b""
    )
    add(client, sa)
    assert association_from(tell(client, GET, sa)).authentication == "chacha20-poly1305"


@only(*FREEBSD)
def test_a_large_window_needs_its_own_extension(client: Client) -> None:
    add(client, replace(ESP, replay_window=4096), replace(ESP, spi=0x1001, replay_window=64))
    large = tell(client, GET, ESP)
    assert large.sa is not None
    assert (large.sa.replay, large.get(ExtensionType.SA_REPLAY)) == (255, 4096)
    small = tell(client, GET, replace(ESP, spi=0x1001))
    assert small.sa is not None
    assert (small.sa.replay, small.get(ExtensionType.SA_REPLAY)) == (8, None)


@only(*FREEBSD)
def test_an_update_of_a_mature_sa(client: Client) -> None:
    """Lifetimes yes, keys no; by the process that added it, and for the same mode and reqid."""
    add(client, ESP)
    limited = replace(ESP, lifetime_hard=Lifetime(addtime=100), lifetime_soft=Lifetime(addtime=50))
    message = association_message(UPDATE, limited, client.abi)
    without_keys = {kind: value for kind, value in message.extensions.items() if "KEY" not in ExtensionType(kind).name}
    assert client.error(client.ask(UPDATE, without_keys, 3)) == ""
    assert client.kernel.associations()[0].lifetime_hard == Lifetime(addtime=100)
    assert error(client, UPDATE, ESP) == "EINVAL"
    assert client.error(client.ask(UPDATE, without_keys, 3, pid=100)) == "EINVAL"
    other_mode = without_keys | {ExtensionType.SA2: SA2(Mode.TRANSPORT, 0, 7)}
    assert client.error(client.ask(UPDATE, other_mode, 3)) == "ESRCH"
    other_reqid = without_keys | {ExtensionType.SA2: SA2(Mode.TUNNEL, 0, 8)}
    assert client.error(client.ask(UPDATE, other_reqid, 3)) == "ESRCH"
    any_reqid = without_keys | {ExtensionType.SA2: SA2(Mode.TUNNEL, 0, 0)}
    assert client.error(client.ask(UPDATE, any_reqid, 3)) == ""


@only(*FREEBSD)
def test_an_sa_moves_to_new_addresses(client: Client) -> None:
    add(client, ESP, replace(ESP, spi=0x1001))
    moved = {
        ExtensionType.SA: SA(ESP.spi),
        ExtensionType.SA2: SA2(2, 0, 7),
        **ENDS,
        ExtensionType.NEW_ADDRESS_SRC: Address(ip_address("192.0.2.77")),
    }
    answer = client.ask(UPDATE, moved, 3)
    assert answer.get(ExtensionType.NEW_ADDRESS_SRC) == Address(ip_address("192.0.2.77"))
    assert error(client, GET, ESP) == "ESRCH"
    assert spis(client) == [0x1000, 0x1001]
    assert error(client, GET, replace(ESP, source=ip_address("192.0.2.77"))) == ""


@only(*KAME)
def test_delete_without_an_spi_takes_every_grown_sa_of_the_pair(client: Client) -> None:
    add(client, ESP, replace(ESP, spi=0x1001), AH, replace(ESP, spi=0x1002, destination=ip_address("198.51.100.2")))
    getspi(client, 0x4000, 0x4000)
    assert client.error(client.ask(DELETE, ENDS, 3)) == ""
    assert sorted(sa.spi for sa in client.kernel.associations()) == [0x1002, 0x2000, 0x4000]
    assert client.error(client.ask(DELETE, ENDS, 3)) == ""


@only(*FREEBSD)
def test_delete_wants_the_addresses_and_the_protocol(client: Client) -> None:
    add(client, ESP)
    assert error(client, DELETE, replace(ESP, source=B)) == "ESRCH"
    assert error(client, DELETE, replace(AH, spi=ESP.spi)) == "ESRCH"
    assert error(client, DELETE, ESP) == ""


@only(*KAME)
def test_the_order_of_a_freebsd_dump(client: Client) -> None:
    """By groups of addresses, protocol, mode and reqid, the newest group first; larval SAs first in each."""
    add(client, ESP, AH, replace(ESP, spi=0x1001))
    getspi(client, 0x4000, 0x4000)
    assert spis(client) == [0x2000, 0x4000, 0x1001, 0x1000]
    client.received()
    client.send(client.build(DUMP))
    received = client.received()
    assert [message.seq for message in received] == [3, 2, 1, 0]
    assert {message.reserved for message in received} == {1}
    assert tell(client, GET, ESP).reserved == 2


@only(*KAME)
def test_algorithms_that_register_lists(client: Client) -> None:
    with connect(client.channel) as kernel:
        supported = kernel.register()
    rows = client.kernel.profile.encryption
    assert tuple(supported.encryption) == tuple(Algorithm(*row) for row in rows)
    with_des = client.kernel.profile.name in ("freebsd-11", "freebsd-12", "netbsd")
    assert (len(rows) == len(FREEBSD_12.encryption)) is with_des


@only(*KAME)
@pytest.mark.parametrize("kind", [GETSPI, ADD, UPDATE, DELETE, GET])
def test_a_satype_is_needed(client: Client, kind: MessageType) -> None:
    answer = client.ask(kind, {ExtensionType.SA: SA(0x1000), **ENDS})
    assert client.error(answer) == "EINVAL"


@only(*KAME)
@pytest.mark.parametrize("kind", [GETSPI, ADD, UPDATE, DELETE, GET])
def test_both_addresses_are_needed(client: Client, kind: MessageType) -> None:
    for missing in ENDS:
        left = {name: value for name, value in ENDS.items() if name != missing}
        answer = client.ask(kind, {ExtensionType.SA: SA(0x1000), **left}, 3)
        assert client.error(answer) == "EINVAL"
