"""Damaged messages: a value or a DecodeError that says where and why, and nothing else, whatever was damaged."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from wire import EVERYTHING, Recorded
from wire_case import FREEBSD, LINUX

from pfkey import DecodeError, decode, decode_many, encode
from pfkey.tables import Batch, assemble

SAMPLE = [one for one in EVERYTHING if len(one.data) <= 400]


def check(error: DecodeError, data: bytes, one: Recorded) -> None:
    """It says where and why, and a batch says the same."""
    assert 0 <= error.offset <= len(data)
    assert error.reason in str(error)
    assert error.extension is None or f"extension {error.extension}" in str(error)
    with pytest.raises(DecodeError) as again:
        decode_many([data], one.abi)
    assert (again.value.offset, again.value.extension) == (error.offset, error.extension)
    assert str(again.value) == f"message 0 of 1: {error}"
    with pytest.raises(DecodeError) as later:
        assemble([Batch.of([HEADER[:4] + b"\2\0" + HEADER[6:]] * 2), Batch.of([data])], one.abi)
    assert str(later.value) == f"message 2 of 3: {error}"


def judge(data: bytes, one: Recorded) -> bool:
    """Whether `data` decodes; then all of it can be read, and it encodes to itself."""
    try:
        message = decode(data, one.abi)
    except DecodeError as error:
        check(error, data, one)
        return False
    for value in message.extensions.values():
        repr(value)
    repr(message)
    assert encode(message) == data
    return True


@pytest.mark.parametrize("one", SAMPLE, ids=lambda one: one.name)
def test_every_truncation(one: Recorded) -> None:
    for length in range(len(one.data)):
        assert not judge(one.data[:length], one)


@pytest.mark.parametrize("one", SAMPLE, ids=lambda one: one.name)
def test_every_single_byte(one: Recorded) -> None:
    survived = 0
    for at in range(len(one.data)):
        for value in {0, 1, 0x7F, 0x80, 0xFF, one.data[at] ^ 1, (one.data[at] + 8) & 0xFF}:
            survived += judge(one.data[:at] + bytes((value,)) + one.data[at + 1 :], one)
    assert survived > 0


def lengths(data: bytes) -> Iterator[int]:
    """Where the length field of each extension lies."""
    at = 16
    while at < len(data):
        yield at
        at += 8 * int.from_bytes(data[at : at + 2], "little")


@pytest.mark.parametrize("one", SAMPLE, ids=lambda one: one.name)
def test_every_length(one: Recorded) -> None:
    for at in (4, *lengths(one.data)):
        for value in (*range(40), 0x7FFF, 0x8000, 0xFFFF):
            judge(one.data[:at] + value.to_bytes(2, "little") + one.data[at + 2 :], one)


@pytest.mark.parametrize("one", SAMPLE, ids=lambda one: one.name)
def test_an_extension_twice(one: Recorded) -> None:
    if one.data[1] == 11:
        return  # a PROMISC message has no extensions
    for at in lengths(one.data):
        size = 8 * int.from_bytes(one.data[at : at + 2], "little")
        twice = bytearray(one.data + one.data[at : at + size])
        twice[4:6] = (len(twice) // 8).to_bytes(2, "little")
        with pytest.raises(DecodeError, match="second time") as raised:
            decode(bytes(twice), one.abi)
        assert raised.value.offset == len(one.data) + 2


HEADER = bytes.fromhex("020a0000030000000000000000000000")
DAMAGED = [
    ("nothing", b"", 0, None, "fewer are here"),
    ("half a header", HEADER[:8], 8, None, "fewer are here"),
    ("version 9", b"\x09" + HEADER[1:] + bytes(8), 0, None, "version is not 2"),
    ("seven bytes too many", HEADER + bytes(15), 24, None, "multiple of 8"),
    ("a stated length of 1", HEADER[:4] + b"\1\0" + HEADER[6:] + bytes(8), 4, None, "less than that of a header"),
    ("a stated length too long", HEADER[:4] + b"\4\0" + HEADER[6:] + bytes(8), 4, None, "more than what is here"),
    ("an extension of length 0", HEADER + bytes.fromhex("0000010000000000"), 16, 1, "length 0"),
    ("an extension past the end", HEADER + bytes.fromhex("0200010000000000"), 16, 1, "past the end"),
    ("an extension of type 0", HEADER + bytes.fromhex("0100000000000000"), 18, None, "type 0"),
    ("an SA of one word", HEADER + bytes.fromhex("0100010000000000"), 16, 1, "another size"),
    ("a key of too many bits", HEADER + bytes.fromhex("0100080008000000"), 20, 8, "more bits"),
    ("a message over its length field", HEADER + bytes(8 * 65535), 0, None, "65535 words"),
]


@pytest.mark.parametrize(("what", "data", "offset", "extension", "text"), DAMAGED, ids=[row[0] for row in DAMAGED])
def test_the_error_says_where_and_why(what: str, data: bytes, offset: int, extension: int | None, text: str) -> None:
    with pytest.raises(DecodeError, match=text) as raised:
        decode(data, LINUX)
    assert (raised.value.offset, raised.value.extension) == (offset, extension)


def test_more_extensions_than_the_record_holds() -> None:
    def message(count: int) -> bytes:
        body = b"".join(b"\1\0" + number.to_bytes(2, "little") + bytes(4) for number in range(100, 100 + count))
        return HEADER[:4] + (2 + count).to_bytes(2, "little") + HEADER[6:] + body

    assert len(decode(message(48), LINUX).extensions) == 48
    with pytest.raises(DecodeError, match="more than 48"):
        decode(message(49), LINUX)


def test_families_of_the_other_system() -> None:
    linux = next(one for one in EVERYTHING if one.name == "linux spdadd tunnel v4")
    freebsd = next(one for one in EVERYTHING if one.name == "freebsd spdadd tunnel v4")
    for one, abi in ((linux, FREEBSD), (freebsd, LINUX)):
        with pytest.raises(DecodeError):
            decode(one.data, abi)
