"""Keys: in no repr, no log, no traceback, and in no buffer that the core has freed."""

from __future__ import annotations

import contextlib
import logging
import socket
import traceback
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any

import pytest

from pfkey import (
    Abi,
    DecodeError,
    EmbeddedKernel,
    ExtensionType,
    KernelError,
    Message,
    MessageType,
    SecurityAssociation,
    _sockets,
    codec,
    connect,
    decode,
    decode_many,
    encode,
)
from pfkey._core import ffi
from pfkey._sockets import Arena, send_many
from pfkey.messages import SA, Key
from pfkey.tables import Batch, assemble
from pfkey.typed import association_message

SECRET = bytes(range(0xA0, 0xB8))
OTHER = bytes(range(0xC0, 0xD4))
ENDS = ip_address("192.0.2.1"), ip_address("192.0.2.2")
ESP = SecurityAssociation(
    *ENDS, 0x1001, encryption="aes-cbc", encryption_key=SECRET, authentication="hmac-sha1", authentication_key=OTHER
)
ADD = {abi: encode(association_message(MessageType.ADD, ESP, abi)) for abi in (Abi.linux(), Abi.freebsd(13))}


def shows(text: str) -> bool:
    """Whether eight bytes of a key are in it, in any form that Python prints."""
    for key in (SECRET, OTHER):
        for at in range(len(key) - 7):
            piece = key[at : at + 8]
            forms = (piece.hex(), repr(piece)[2:-1], ", ".join(map(str, piece)), piece.decode("latin-1"))
            if any(form in text for form in forms):
                return True
    return False


def test_the_detector() -> None:
    assert shows(f"a key {SECRET!r}")
    assert shows(OTHER.hex())
    assert shows(repr(list(SECRET)))
    assert shows(repr(Message(3, {60: SECRET}, abi=Abi.linux()).extensions))
    assert not shows(repr(ESP))


@pytest.mark.parametrize("abi", ADD, ids=str)
def test_no_repr_shows_them(abi: Abi) -> None:
    message = decode(ADD[abi], abi)
    table = decode_many([ADD[abi]] * 3, abi)
    things = [
        ESP, message, message.extensions, message.get(ExtensionType.KEY_AUTH),
        association_message(MessageType.ADD, ESP, abi),
        table, table[0], next(table.records()), list(table.select(*table.COLUMNS)), Key(SECRET),
    ]  # fmt: skip
    assert not shows(" ".join(map(repr, things)) + " ".join(map(str, things)))


@pytest.mark.parametrize("profile", ["linux", "freebsd-13"])
def test_no_error_and_no_log_shows_them(profile: str, caplog: pytest.LogCaptureFixture) -> None:
    """FreeBSD sends a refused request back, keys and all."""
    caplog.set_level(logging.DEBUG)
    embedded = EmbeddedKernel(profile)
    texts = []
    with connect(embedded.connect()) as kernel, connect(embedded.connect()) as other:
        kernel.add_sa(ESP)
        long = SecurityAssociation(*ENDS, 0x1007, encryption="aes-cbc", encryption_key=SECRET * 400)
        for work in (
            lambda: kernel.add_sa(ESP),
            lambda: kernel.add_sa(SecurityAssociation(*ENDS, 0x1007, encryption="none", encryption_key=SECRET)),
            lambda: kernel.update_sa(SecurityAssociation(*ENDS, 0x1009, encryption="aes-cbc", encryption_key=SECRET)),
            lambda: kernel.add_sa(SecurityAssociation(*ENDS, 1 << 33, encryption="aes-cbc", encryption_key=SECRET)),
            lambda: kernel.add_sa(long),
        ):
            with contextlib.suppress(KernelError, ValueError):
                try:
                    work()
                except Exception as error:
                    texts += [str(error), repr(error), *traceback.format_exception(error)]
                    texts += [repr(getattr(error, "request", "")), repr(getattr(error, "reply", ""))]
                    raise
        texts += [repr(kernel.dump_sas()), repr(kernel.dump_sas().messages), *map(repr, other.events(0))]
    assert len(texts) > 10
    assert not shows("\n".join(texts) + caplog.text)


@pytest.mark.parametrize("at", range(0, 200, 2))
def test_no_decode_error_shows_them(at: int) -> None:
    data = bytearray(ADD[Abi.linux()])
    data[at % len(data)] ^= 0xFF
    text = ""
    try:
        decode(bytes(data), Abi.linux())
    except DecodeError as error:
        text = "".join(traceback.format_exception(error))
    assert not shows(text)


# The core's own buffers.


@pytest.fixture
def owned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every arena that is allocated from here on, held so that it can be looked at when it is done with."""
    buffers: list[Any] = []

    def hold(allocate: Callable[..., Any]) -> Callable[..., Any]:
        def allocated(kind: str, *size: int) -> Any:
            made = allocate(kind, *size)
            buffers.append(made)
            return made

        return allocated

    monkeypatch.setattr(_sockets, "_allocate", hold(_sockets._allocate))
    monkeypatch.setattr(codec, "_scratches", [])
    return buffers


def holds_a_key(buffer: Any) -> bool:
    content = bytes(ffi.buffer(buffer))
    return any(key[at : at + 8] in content for key in (SECRET, OTHER) for at in range(len(key) - 7))


def test_the_encoders_buffer_is_wiped(owned: list[Any]) -> None:
    for abi, data in ADD.items():
        assert encode(association_message(MessageType.ADD, ESP, abi)) == data
        assert encode(decode(data, abi)) == data
    assert codec._scratches
    for scratch in codec._scratches:
        assert not holds_a_key(scratch.out)
        assert not holds_a_key(scratch.record)


def test_the_encoders_buffer_is_wiped_after_an_error(owned: list[Any]) -> None:
    good = decode(ADD[Abi.linux()], Abi.linux())
    broken = codec.made(good.abi, good._record, good._data[:-8])  # its last key lies past the end
    with pytest.raises(ValueError, match="outside"):
        encode(broken)
    assert codec._scratches
    assert not any(holds_a_key(scratch.out) for scratch in codec._scratches)


def arena_with_keys(one: socket.socket, other: socket.socket, *, keep: bool) -> tuple[Arena, _sockets.Received]:
    send_many(one.fileno(), [ADD[Abi.linux()]] * 40)
    arena = Arena(8, 4096)
    received = arena.receive(other.fileno(), 8, 1.0, keep=keep)
    while len(received.lengths) < 8:
        received = arena.receive(other.fileno(), 8, 1.0, keep=keep)
    return arena, received


@pytest.fixture
def pair() -> Any:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, other:
        yield one, other


def test_what_is_copied_out_is_wiped_at_once(owned: list[Any], pair: Any) -> None:
    arena, received = arena_with_keys(*pair, keep=False)
    assert ADD[Abi.linux()] in bytes(received.arena)
    assert [holds_a_key(buffer) for buffer in owned] == [False]
    del arena


def test_what_is_kept_is_wiped_when_nobody_looks_at_it(owned: list[Any], pair: Any) -> None:
    arena, received = arena_with_keys(*pair, keep=True)
    table = assemble([Batch(received.arena, received.lengths)], Abi.linux())
    assert table[3].get(ExtensionType.KEY_ENCRYPT) == Key(SECRET)
    (buffer,) = owned
    # The control: it is there while it is needed, once for each message and nowhere else.
    content = bytes(ffi.buffer(buffer))
    assert content.count(SECRET) == content.count(OTHER) == 8
    del arena, received
    assert holds_a_key(buffer)
    column = table.column("spi")
    del table
    assert not holds_a_key(buffer)
    assert set(column.tolist()) == {0x1001}


def test_an_sa_without_keys_is_no_secret() -> None:
    assert "192.0.2.1" in repr(ESP)
    assert decode(encode(Message(3, {ExtensionType.SA: SA(1)}, abi=Abi.linux())), Abi.linux()).spi == 1
