"""Two descriptions of the wire that share no code: the same fields, the same bytes, the same errors."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opinion import values, verdict
from package import ROOT
from wire import EVERYTHING, Recorded, mirrored

from pfkey import Abi, DecodeError, Message, _formats, decode, encode, schema
from pfkey._core import ffi, lib

SHORT = [one for one in EVERYTHING if len(one.data) <= 300]


def big(abi: Abi) -> Abi:
    return Abi.named("-".join((abi.name, *(str(part) for part in abi.release), "big")))


BOTH_ORDERS = EVERYTHING + [
    Recorded(f"{one.name}, big-endian", big(one.abi), mirrored(one.data, one.abi)) for one in EVERYTHING
]


def judged(data: bytes, abi: Abi) -> Message | str:
    try:
        return decode(data, abi)
    except DecodeError as error:
        return str(error)


def agree(data: bytes, abi: Abi) -> bool:
    """Both accept it and say the same of it, or refuse it in the same words; whether they accept it."""
    first, second = judged(data, abi), verdict(data, abi)
    if isinstance(first, str) or isinstance(second, str):
        assert first == second
        return False
    same(first, second)
    assert schema.build(second, abi) == data
    return True


def same(message: Message, parsed: schema.Container) -> None:
    assert list(message.extensions.items()) == values(parsed, message.abi)
    head = parsed.header
    assert (message.version, int(message.type) & 0xFF, message.errno, int(message.satype)) == (
        head.version,
        head.type,
        head.errno,
        head.satype,
    )
    assert (message.reserved, message.seq, message.pid) == (head.reserved, head.seq, head.pid)
    assert message.body == parsed.body


@pytest.mark.parametrize("one", BOTH_ORDERS, ids=lambda one: one.name)
def test_the_same_fields_and_the_same_bytes(one: Recorded) -> None:
    assert agree(one.data, one.abi)


@pytest.mark.parametrize("one", EVERYTHING, ids=lambda one: one.name)
def test_what_is_built_from_values_is_parsed_alike(one: Recorded) -> None:
    """From values alone, reserved bytes are 0 and every length is computed by each of the two."""
    message = decode(one.data, one.abi)
    built = encode(Message(message.type, message.extensions, abi=one.abi, satype=message.satype, seq=message.seq))
    parsed = schema.parse(built, one.abi)
    if message.type != schema.PROMISC:
        assert list(message.extensions.items()) == values(parsed, one.abi)
    del parsed.header["len"]
    assert schema.build(parsed, one.abi) == built


@pytest.mark.parametrize("one", SHORT, ids=lambda one: one.name)
def test_the_same_verdict_on_every_damaged_byte(one: Recorded) -> None:
    refused = 0
    for at in range(len(one.data)):
        for value in (0, 0xFF, one.data[at] ^ 1):
            refused += not agree(one.data[:at] + bytes((value,)) + one.data[at + 1 :], one.abi)
    assert refused > 0


@pytest.mark.parametrize("one", SHORT, ids=lambda one: one.name)
def test_the_same_verdict_on_every_truncation(one: Recorded) -> None:
    for length in range(len(one.data)):
        assert not agree(one.data[:length], one.abi)


@pytest.mark.parametrize("one", [one for one in SHORT if one.data[1] != schema.PROMISC], ids=lambda one: one.name)
def test_the_same_verdict_on_other_sizes_of_every_extension(one: Recorded) -> None:
    """Each extension cut and lengthened, its length and that of the message as they must be."""
    at = 16
    while at < len(one.data):
        words = int.from_bytes(one.data[at : at + 2], "little")
        end = at + 8 * words
        for other in {1, words - 1, words + 1, words + 9} - {0, words}:
            body = one.data[at + 2 : end][: 8 * other - 2].ljust(8 * other - 2, b"\1")
            data = bytearray(one.data[:at] + other.to_bytes(2, "little") + body + one.data[end:])
            data[4:6] = (len(data) // 8).to_bytes(2, "little")
            for errno in (0, 22):
                data[2] = errno
                agree(bytes(data), one.abi)
        at = end


ABIS = [
    Abi.named(f"{name}-{order}") for name in ("linux", "freebsd-15", "netbsd", "macos") for order in ("little", "big")
]


@st.composite
def generated(draw: st.DrawFn) -> tuple[bytes, Abi]:
    """A message of well-formed extensions with any content, sizes mostly right."""
    abi = draw(st.sampled_from(ABIS))
    body = b""
    for number in draw(st.lists(st.sampled_from([*schema.formats(abi), 60]), unique=True, max_size=6)):
        words = draw(st.sampled_from((1, 2, 3, 4, 5, 6, 8, 10)))
        family = bytes((16, 2)) if abi.sockaddr_has_length else (2).to_bytes(2, abi.byteorder)
        content = draw(st.binary(min_size=8 * words - 4, max_size=8 * words - 4))
        if draw(st.booleans()):
            content = content[:4] + family + content[6:]
        if draw(st.booleans()):
            content = bytes(len(content))
        body += words.to_bytes(2, abi.byteorder) + number.to_bytes(2, abi.byteorder) + content
    head = bytes((2, draw(st.integers(0, 30)), draw(st.sampled_from((0, 0, 22))), draw(st.integers(0, 12))))
    return head + (2 + len(body) // 8).to_bytes(2, abi.byteorder) + draw(
        st.binary(min_size=10, max_size=10)
    ) + body, abi


@given(generated())
@settings(max_examples=400, deadline=None)
def test_the_same_verdict_on_generated_messages(one: tuple[bytes, Abi]) -> None:
    agree(*one)


def test_the_words_of_every_rule_are_those_of_the_core() -> None:
    declared = vars(schema) | vars(_formats)
    words = {text for name, text in declared.items() if name.isupper() and isinstance(text, str)}
    core = {ffi.string(lib.pfk_reason(number)).decode() for number in range(lib.PFK_SHORT_HEADER, lib.PFK_NO_SPACE)}
    assert words == core


def test_a_wrong_reading_is_seen() -> None:
    """The control: a schema that reads one field in the other byte order does not agree."""
    one = next(one for one in EVERYTHING if one.name == "linux getspi")
    parsed = schema.parse(one.data, one.abi)
    parsed.extensions[2].body.min = int.from_bytes(parsed.extensions[2].body.min.to_bytes(4, "little"), "big")
    with pytest.raises(AssertionError):
        same(decode(one.data, one.abi), parsed)


def test_every_byte_is_noted_once() -> None:
    for one in BOTH_ORDERS:
        notes: list[schema.Note] = []
        schema.parse(one.data, one.abi, notes=notes)
        at = 0
        for note in notes:
            assert note.offset == at, one.name
            at += note.size
        assert at == len(one.data)


def test_it_is_not_imported_with_the_package() -> None:
    import subprocess
    import sys

    script = "import pfkey, sys; sys.exit('construct' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False, cwd=ROOT).returncode == 0
