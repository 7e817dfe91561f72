"""What each system and release calls things: the history of FreeBSD, the dialects, the names in and out."""

from __future__ import annotations

import pytest

from pfkey import Abi, ExtensionType, Message, MessageType, Mode, NotSupported, SecurityAssociation, decode, encode
from pfkey.constants import SAFlag, SAType
from pfkey.messages import SA, SA2
from pfkey.typed import association_from, association_message

X = ExtensionType
ALL = [Abi.linux(), *(Abi.freebsd(n) for n in (9, 10, "11.0", 12, 13, 14, 15)), Abi.netbsd(), Abi.macos()]


# (release, largest extension, has a priority, has a scope, aes-ctr, has aes-gcm-16, has chacha20-poly1305)
HISTORY = [
    ("9.3", 25, False, False, 250, False, False),
    ("10.4", 25, False, False, 250, False, False),
    ("11.0", 25, True, False, 13, True, False),
    ("11.1", 28, True, True, 13, True, False),
    ("12.1", 28, True, True, 13, True, False),
    ("13.0", 28, True, True, 13, True, False),
    ("14.3", 28, True, True, 13, True, True),
    ("15.0", 31, True, True, 13, True, True),
]


@pytest.mark.parametrize("row", HISTORY, ids=lambda row: row[0])
def test_the_history_of_freebsd(row: tuple[str, int, bool, bool, int, bool, bool]) -> None:
    release, largest, priority, scope, aes_ctr, gcm, chacha = row
    abi = Abi.freebsd(release)
    assert max(abi.extensions) == largest
    assert (abi.has_priority, abi.has_scope) == (priority, scope)
    assert abi.encryption["aes-ctr"] == aes_ctr
    assert ("aes-gcm-16" in abi.encryption, "chacha20-poly1305" in abi.encryption) == (gcm, chacha)
    assert ("aes-128-gmac" in abi.authentication) == gcm


def test_a_release_alone_is_the_last_of_its_branch_where_it_matters() -> None:
    assert Abi.freebsd(11).has_scope
    assert not Abi.freebsd("11.0").has_scope
    assert max(Abi.freebsd(15).extensions) == max(Abi.freebsd(16).extensions) == 31


# (number on the wire, the system, what it means there)
MEANINGS = [
    (24, Abi.linux(), X.SEC_CTX),
    (24, Abi.freebsd(12), X.NAT_T_OAR),
    (24, Abi.netbsd(), X.NAT_T_OAR),
    (24, Abi.macos(), X.ADDRESS_RANGE_SRC_END),
    (26, Abi.linux(), X.FILTER),
    (26, Abi.freebsd(12), X.SA_REPLAY),
    (26, Abi.freebsd(9), 26),
    (26, Abi.netbsd(), 26),
    (26, Abi.macos(), X.ADDRESS_RANGE_DST_END),
    (20, Abi.macos(), X.SESSION_ID),
]


@pytest.mark.parametrize(("number", "abi", "kind"), MEANINGS, ids=lambda value: str(value))
def test_one_number_means_different_things(number: int, abi: Abi, kind: ExtensionType | int) -> None:
    assert abi.extensions.get(number, number) == kind
    assert int(kind) & 0xFF == number


@pytest.mark.parametrize("abi", ALL, ids=str)
def test_message_types_of_this_system(abi: Abi) -> None:
    for number in range(1, 30):
        message = decode(bytes((2, number, 0, 0, 2, 0, 0, 0)) + bytes(8), Abi.named(f"{abi.name}-little"))
        known = abi.message_types.get(number, number)
        assert message.type == known
        assert encode(message)[1] == number
        assert encode(Message(known, abi=message.abi)) == encode(message)


def test_mode_three() -> None:
    for abi, mode in ((Abi.linux(), Mode.BEET), (Abi.freebsd(13), Mode.TCPMD5), (Abi.macos(), 3)):
        message = Message(MessageType.ADD, {X.SA2: SA2(mode)}, abi=abi, satype=SAType.ESP)
        assert encode(message)[20] == 3
        again = decode(encode(message), abi)
        assert again.mode == mode
        assert again.sa2 == SA2(mode)


def test_flags_of_macos_are_others() -> None:
    wire = {Abi.macos(): {SAFlag.ESN: 0x800, SAFlag.IIV: 0x400}, Abi.freebsd(13): {SAFlag.ESN: 0x400}}
    for abi, flags in wire.items():
        for flag, bit in flags.items():
            message = Message(MessageType.ADD, {X.SA: SA(1, flags=flag | SAFlag.CYCSEQ)}, abi=abi)
            assert int.from_bytes(encode(message)[28:32], abi.byteorder) == bit | 0x40
            assert decode(encode(message), abi).sa == SA(1, flags=flag | SAFlag.CYCSEQ)


@pytest.mark.parametrize("abi", ALL, ids=str)
def test_algorithm_names_in_and_out(abi: Abi) -> None:
    names = [(a, "aes-cbc") for a in abi.authentication if a != "none"]
    names += [("hmac-sha1", e) for e in abi.encryption if e != "none"]
    for authentication, encryption in names:
        sa = SecurityAssociation(
            "192.0.2.1", "192.0.2.2", 0x1000, encryption=encryption, encryption_key=b"k" * 16,
            authentication=authentication, authentication_key=b"a" * 20,
        )  # fmt: skip
        message = association_message(MessageType.ADD, sa, abi)
        again = association_from(decode(encode(message), abi))
        assert (again.authentication, again.encryption) == (authentication, encryption)


# (system, what it lacks)
LACKING = [
    (Abi.macos(), {"encryption": "camellia-cbc"}, "macOS has no encryption algorithm 'camellia-cbc'"),
    (Abi.freebsd(9), {"encryption": "aes-gcm-16"}, "FreeBSD 9 has no encryption"),
    (Abi.netbsd(), {"encryption": "chacha20-poly1305"}, "NetBSD has no encryption"),
    (Abi.linux(), {"authentication": "tcp-md5"}, "Linux has no authentication"),
    (Abi.macos(), {"replay_window": 4096}, "macOS has at most 2040"),
]


@pytest.mark.parametrize(("abi", "given", "text"), LACKING, ids=lambda value: str(value))
def test_what_a_system_lacks(abi: Abi, given: dict[str, object], text: str) -> None:
    sa = SecurityAssociation("192.0.2.1", "192.0.2.2", 0x1000, **given)  # type: ignore[arg-type]
    with pytest.raises(NotSupported, match=text):
        association_message(MessageType.ADD, sa, abi)


def test_names_of_systems() -> None:
    assert Abi.named("freebsd-13.2-big") == Abi.freebsd("13.2", "big")
    assert Abi.named("linux") == Abi.linux()
    assert [str(Abi.named(name)) for name in ("netbsd", "macos", "freebsd-9")] == ["NetBSD", "macOS", "FreeBSD 9"]
    for text, words in (
        ("openbsd", "OpenBSD's PF_KEY"),
        ("plan9", "names no system"),
        ("linux-6.1", "names no system"),
    ):
        with pytest.raises(NotSupported, match=words):
            Abi.named(text)
