"""A peer: the same Linux messages decoded by hand with `struct`, as a careful script would do it."""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct

__all__ = ["decode", "encode"]

Fields = dict[str | int, tuple[object, ...]]

_HEADER = Struct("=BBBBHHII")
_EXTENSION = Struct("=HH")
_SA = Struct("=HH4sBBBBI")
_SA2 = Struct("=HHB3xII")
_LIFETIME = Struct("=HHIQQQ")
_ADDRESS = Struct("=HHBBH")
_SOCKADDR_IN = Struct("=H2s4s8x")
_SOCKADDR_IN6 = Struct("=H2sI16sI")
_KEY = Struct("=HHHH")


def _sa(data: bytes, at: int, end: int) -> tuple[object, ...]:
    return _SA.unpack_from(data, at)


def _sa2(data: bytes, at: int, end: int) -> tuple[object, ...]:
    return _SA2.unpack_from(data, at)


def _lifetime(data: bytes, at: int, end: int) -> tuple[object, ...]:
    return _LIFETIME.unpack_from(data, at)


def _address(data: bytes, at: int, end: int) -> tuple[object, ...]:
    head = _ADDRESS.unpack_from(data, at)
    family = data[at + 8] | data[at + 9] << 8
    layout = _SOCKADDR_IN if family == 2 else _SOCKADDR_IN6
    if at + 8 + layout.size > end:
        raise ValueError("sockaddr too short")
    return head + layout.unpack_from(data, at + 8)


def _key(data: bytes, at: int, end: int) -> tuple[object, ...]:
    head = _KEY.unpack_from(data, at)
    length = (head[2] + 7) // 8
    if at + 8 + length > end:
        raise ValueError("key too short")
    return (*head, data[at + 8 : at + 8 + length])


_DECODERS: dict[int, tuple[int, Callable[[bytes, int, int], tuple[object, ...]]]] = {
    1: (16, _sa),
    2: (32, _lifetime),
    3: (32, _lifetime),
    4: (32, _lifetime),
    5: (24, _address),
    6: (24, _address),
    7: (24, _address),
    8: (8, _key),
    9: (8, _key),
    19: (16, _sa2),
}


def decode(data: bytes) -> Fields:
    """Header and extensions as tuples, lengths checked."""
    header = _HEADER.unpack_from(data)
    fields: Fields = {"header": header}
    end = header[4] * 8
    if end > len(data):
        raise ValueError("message too short")
    at = 16
    while at < end:
        words, kind = _EXTENSION.unpack_from(data, at)
        length = words * 8
        if not length or at + length > end:
            raise ValueError("bad extension length")
        least, decoder = _DECODERS[kind]
        if length < least:
            raise ValueError("extension too short")
        fields[kind] = decoder(data, at, at + length)
        at += length
    return fields


def encode(fields: Fields) -> bytes:
    """What `decode` was given."""
    parts: list[bytes] = []
    for kind, values in fields.items():
        if kind == "header":
            parts.append(_HEADER.pack(*values))
        elif kind in (8, 9):
            key = values[4]
            assert isinstance(key, bytes)
            parts.append(_KEY.pack(*values[:4]) + key + bytes(-len(key) % 8))
        elif kind in (5, 6, 7):
            layout = _SOCKADDR_IN if values[5] == 2 else _SOCKADDR_IN6
            body = _ADDRESS.pack(*values[:5]) + layout.pack(*values[5:])
            parts.append(body + bytes(-len(body) % 8))
        else:
            parts.append((_SA if kind == 1 else _SA2 if kind == 19 else _LIFETIME).pack(*values))
    return b"".join(parts)
