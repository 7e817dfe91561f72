"""Policies and SAs in each system's extensions, units and names."""

from __future__ import annotations

import traceback
from dataclasses import replace
from ipaddress import ip_address, ip_interface

import pytest
from wire import RECORDED
from wire_case import FREEBSD, LINUX

from pfkey import (
    Abi,
    Action,
    Direction,
    EncodeError,
    ExtensionType,
    Lifetime,
    Message,
    MessageType,
    Mode,
    NotSupported,
    Policy,
    SAProtocol,
    SecurityAssociation,
    Selector,
    Template,
    decode,
    encode,
)
from pfkey.constants import PolicyScope, SAState, SAType
from pfkey.messages import Address, NATTraversal
from pfkey.typed import association_from, association_message, describe, policy_from, policy_message

X = ExtensionType
OUT = Direction.OUT
SITE = Selector("10.1.0.0/16", "10.2.0.0/16")
BOTH = pytest.mark.parametrize("abi", [LINUX, FREEBSD], ids=str)
SECRET, OTHER_SECRET = bytes(range(0xA0, 0xB0)), bytes(range(0xC0, 0xE0))
ESP = SecurityAssociation(
    ip_address("192.0.2.1"),
    ip_address("198.51.100.1"),
    0x10001,
    mode=Mode.TUNNEL,
    reqid=7,
    encryption="aes-cbc",
    encryption_key=SECRET,
    authentication="hmac-sha2-256",
    authentication_key=OTHER_SECRET,
    replay_window=32,
    lifetime_hard=Lifetime(1, 2, 3, 4),
    lifetime_soft=Lifetime(5, 6, 7, 8),
    nat_traversal=NATTraversal(4500, 4501),
)

SELECTORS = [
    SITE,
    Selector("10.1.2.3/16", "10.2.0.0/16"),
    Selector("10.1.0.1", "10.2.0.1", protocol="tcp", source_port=1024, destination_port=443),
    Selector("::/0", "::/0"),
    Selector("2001:db8::/48", "2001:db8:1::1", protocol=17),
    Selector("fe80::1%3", "fe80::2%3"),
    Selector("10.1.0.0/16", "10.2.0.0/16", protocol="icmp", icmp_type=8, icmp_code=0),
    Selector("::/0", "::/0", protocol="icmp6", icmp_type=135, icmp_code=2),
    Selector("::/0", "::/0", protocol="icmp6"),
]


def wire(message: Message) -> Message:
    return decode(encode(message), message.abi)


@BOTH
@pytest.mark.parametrize("selector", SELECTORS, ids=str)
def test_policies_there_and_back(abi: Abi, selector: Selector) -> None:
    templates = (Template.tunnel("192.0.2.1", "198.51.100.1", reqid=7), Template.transport(protocol=SAProtocol.AH))
    policy = Policy(OUT, selector, Action.IPSEC, templates, 5, 9, Lifetime(1, 2, 3, 4))
    assert policy_from(wire(policy_message(MessageType.SPDADD, policy, abi))) == policy
    bare = policy_message(MessageType.SPDDELETE, policy, abi, with_templates=False)
    assert policy_from(bare).templates == ()


@BOTH
def test_associations_there_and_back(abi: Abi) -> None:
    assert association_from(wire(association_message(MessageType.ADD, ESP, abi))) == ESP
    moved = replace(ESP, new_source=ip_address("192.0.2.9"))
    if abi == FREEBSD:
        assert association_from(wire(association_message(MessageType.UPDATE, moved, abi))) == moved
    else:
        with pytest.raises(EncodeError, match="Linux has no extension NEW_ADDRESS_SRC"):
            association_message(MessageType.UPDATE, moved, abi)
    asked = association_message(MessageType.GET, ESP, abi)
    assert list(asked.extensions) == [X.SA, X.ADDRESS_SRC, X.ADDRESS_DST]


# (window in packets, sadb_sa_replay, SA_REPLAY) on FreeBSD, where the first counts bytes of eight packets
WINDOWS = [(0, 0, None), (1, 1, None), (32, 4, None), (33, 5, None), (2040, 255, None), (2041, 255, 2041)]


@pytest.mark.parametrize(("window", "replay", "packets"), WINDOWS)
def test_replay_windows_are_in_packets(window: int, replay: int, packets: int | None) -> None:
    message = association_message(MessageType.ADD, replace(ESP, replay_window=window), FREEBSD)
    assert message.sa is not None
    assert (message.sa.replay, message.get(X.SA_REPLAY)) == (replay, packets)
    assert association_from(message).replay_window >= window


def test_linux_takes_windows_up_to_32() -> None:
    message = association_message(MessageType.ADD, ESP, LINUX)
    assert message.sa is not None
    assert message.sa.replay == 32
    with pytest.raises(NotSupported, match="window of 33 packets: Linux has at most 32"):
        association_message(MessageType.ADD, replace(ESP, replay_window=33), LINUX)


@BOTH
def test_lifetimes_go_both_or_neither(abi: Abi) -> None:
    neither = association_message(MessageType.ADD, replace(ESP, lifetime_hard=None, lifetime_soft=None), abi)
    assert X.LIFETIME_HARD not in neither
    assert X.LIFETIME_SOFT not in neither
    one = association_message(MessageType.ADD, replace(ESP, lifetime_soft=None), abi)
    assert (one.lifetime_hard, one.lifetime_soft) == (ESP.lifetime_hard, Lifetime())


# (name, its number on Linux, on FreeBSD 12, on FreeBSD 14)
ALGORITHMS = [
    ("aes-cbc", 12, 12, 12),
    ("aes-gcm-16", 20, 20, 20),
    ("null", 11, 11, 11),
    ("AES-CTR", 13, 13, 13),
    ("aes-ccm-16", 16, None, None),
    ("chacha20-poly1305", None, None, 15),
    (99, 99, 99, 99),
    (None, 0, 0, 0),
]


@pytest.mark.parametrize("row", ALGORITHMS, ids=lambda row: str(row[0]))
def test_algorithms_by_name(row: tuple[str | int | None, ...]) -> None:
    name, *numbers = row
    for abi, number in zip((LINUX, FREEBSD, Abi.freebsd(14)), numbers, strict=True):
        sa = replace(ESP, encryption=name, authentication=None, authentication_key=b"")
        if number is None:
            with pytest.raises(NotSupported, match=rf"{abi} has no encryption algorithm '{name}' in PF_KEY; it has"):
                association_message(MessageType.ADD, sa, abi)
            continue
        message = association_message(MessageType.ADD, sa, abi)
        assert message.sa is not None
        assert message.sa.encrypt == number
        assert association_from(message).encryption == (name.lower() if isinstance(name, str) else name)


@BOTH
def test_null_encryption_has_a_key_extension_of_no_bits(abi: Abi) -> None:
    message = association_message(MessageType.ADD, replace(ESP, encryption="null", encryption_key=b""), abi)
    assert message.get(X.KEY_ENCRYPT).bits == 0
    assert X.KEY_ENCRYPT not in association_message(
        MessageType.ADD, replace(ESP, protocol=SAProtocol.AH, encryption=None, encryption_key=b""), abi
    )


@BOTH
def test_ipcomp_has_its_algorithm_where_the_cipher_would_be(abi: Abi) -> None:
    sa = SecurityAssociation(ESP.source, ESP.destination, 0x1234, SAProtocol.IPCOMP, compression="deflate")
    message = association_message(MessageType.ADD, sa, abi)
    assert message.satype == SAType.IPCOMP
    assert message.sa is not None
    assert (message.sa.auth, message.sa.encrypt) == (0, 2)
    assert association_from(message) == sa


def test_what_does_not_fit_is_refused() -> None:
    wide = Policy(OUT, SITE, templates=(Template.transport(reqid=70000),))
    with pytest.raises(EncodeError, match=r"reqid 70000 .* FreeBSD 12 has 16 bits"):
        policy_message(MessageType.SPDADD, wide, FREEBSD)
    assert policy_from(policy_message(MessageType.SPDADD, wide, LINUX)).templates == wide.templates
    with pytest.raises(EncodeError, match="give the interface's index"):
        policy_message(MessageType.SPDADD, Policy(OUT, Selector("fe80::1%em0", "fe80::2")), LINUX)
    with pytest.raises(NotSupported, match="protocol 99"):
        association_message(MessageType.ADD, replace(ESP, protocol=99), LINUX)


def test_keys_never_show() -> None:
    message = association_message(MessageType.ADD, ESP, LINUX)
    shown = [
        repr(ESP),
        str(ESP),
        repr(message),
        repr(message.extensions),
        describe(message),
        repr(decode(encode(message), LINUX)),
    ]
    try:
        encode(Message(MessageType.ADD, {X.KEY_AUTH: replace(message.get(X.KEY_AUTH), bits=8)}, abi=LINUX))
    except EncodeError as error:
        shown += [str(error), "".join(traceback.format_exception(error))]
    assert len(shown) == 8
    for text in shown:
        for key in (SECRET, OTHER_SECRET):
            assert key.hex() not in text.lower()
            assert repr(key)[2:-1] not in text


DESCRIPTIONS = [
    (policy_message(MessageType.SPDUPDATE, Policy(OUT, SITE), LINUX), "SPDUPDATE of out 10.1.0.0/16 -> 10.2.0.0/16"),
    (association_message(MessageType.ADD, ESP, LINUX), "ADD of esp 192.0.2.1 -> 198.51.100.1 spi 0x00010001"),
    (Message(MessageType.SPDDUMP, abi=LINUX), "SPDDUMP"),
    (Message(MessageType.FLUSH, abi=LINUX, satype=3), "FLUSH of esp"),
    (Message(200, abi=LINUX), "message type 200"),
]


@pytest.mark.parametrize(("message", "text"), DESCRIPTIONS, ids=[row[1] for row in DESCRIPTIONS])
def test_descriptions(message: Message, text: str) -> None:
    assert describe(message) == text


def recorded(name: str) -> Message:
    one = next(one for one in RECORDED if one.name == name)
    return decode(one.data, one.abi)


def test_a_recorded_sa_of_linux() -> None:
    sa = association_from(recorded("linux-6.1:get-esp4:recv0"))
    assert (str(sa.source), str(sa.destination), sa.spi) == ("10.0.0.1", "10.0.0.2", 0x10001)
    assert (sa.authentication, sa.encryption, sa.state, sa.replay_window) == ("hmac-sha1", "aes-cbc", SAState.MATURE, 4)
    assert (len(sa.authentication_key), len(sa.encryption_key)) == (20, 16)
    assert sa.lifetime_hard == Lifetime(64, 0, 3600, 0) or sa.lifetime_hard is not None
    assert sa.proxy == ip_interface("0.0.0.0/0")


def test_a_recorded_nat_t_sa_of_freebsd() -> None:
    sa = association_from(recorded("freebsd-12.1:get-natt:recv0"))
    assert (sa.spi, sa.reqid, sa.mode, sa.protocol) == (0xC0000003, 8, Mode.TUNNEL, SAProtocol.ESP)
    assert (str(sa.source), str(sa.destination)) == ("192.0.2.1", "198.51.100.1")
    assert sa.nat_traversal is not None
    assert sa.nat_traversal.type == 2


def test_a_recorded_replay_window_of_freebsd() -> None:
    dumped = recorded("freebsd-12.1:dump-sad:recv3")
    assert (dumped.spi, dumped.get(X.SA_REPLAY)) == (0xC0000004, 4096)
    assert association_from(dumped).replay_window == 4096


def test_recorded_policies_of_freebsd() -> None:
    added = policy_from(recorded("freebsd-12.1:spdadd-tunnel-v4:recv0"))
    assert added == Policy(OUT, SITE, Action.IPSEC, (Template.tunnel("192.0.2.1", "198.51.100.1", reqid=7),), 383615, 1)
    icmp = policy_from(recorded("freebsd-12.1:spddump:recv0"))
    assert icmp.selector == Selector("::/0", "::/0", protocol="icmp6", icmp_type=135, icmp_code=0)
    assert (icmp.direction, icmp.action, icmp.id, icmp.scope) == (Direction.IN, Action.NONE, 9, PolicyScope.GLOBAL)
    replaced = policy_from(recorded("freebsd-12.1:spdadd-reqid-20000:recv0"))
    assert replaced.templates[0].reqid == 16385
    mixed = policy_from(recorded("freebsd-12.1:spdadd-v6-outer-v4:recv0"))
    assert mixed.selector.version == 6
    assert mixed.templates[0].source == ip_address("198.51.100.1")


def test_recorded_errors_keep_what_was_asked() -> None:
    refused = recorded("freebsd-12.1:spdadd-bad-proto-request:recv0")
    assert refused.abi.error_name(refused.errno) == "EPROTONOSUPPORT"
    assert refused.policy is not None
    assert refused.policy.templates[0].protocol == 99
    bare = recorded("linux-6.1:spdadd-dup:recv0")
    assert (bare.abi.error_name(bare.errno), dict(bare.extensions)) == ("EEXIST", {})


def test_recorded_dirt() -> None:
    """FreeBSD 12.1 leaves uninitialised bytes in the SA of a GETSPI reply; they come through as they are."""
    reply = recorded("freebsd-12.1:getspi:recv0")
    assert reply.spi == 0x1951
    assert isinstance(reply.source, Address)
    assert recorded("linux-6.1:spdadd:recv0").reserved == 3
