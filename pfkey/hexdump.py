"""`pfkey decode`: messages from hex, binary or a stream, shown byte by byte."""

from __future__ import annotations

import json
import re
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from .abi import OPENBSD, Abi
from .annotate import Annotated, Row, annotate, guess, is_openbsd
from .errors import NotSupported
from .show import aligned
from .target import UsageError

__all__ = ["read", "run", "split"]

_ENOUGH = 64
"""So many messages of a stream tell whose they are."""

HIDDEN = "(hidden: --show-keys shows it)"


def run(arguments: Namespace) -> int:
    """Show what was given; 1 when a message is damaged."""
    named = _named(arguments.abi)
    messages = [one for name in _joined(arguments.input) for one in read(name, named)]
    if not messages:
        raise UsageError("there is no message to decode: the input is empty")
    abi, how = (named, "") if named is not None else _guessed(messages)
    damaged = False
    records = []
    for number, data in enumerate(messages):
        one = annotate(data, abi)
        damaged |= one.error is not None
        if arguments.json:
            records.append(_record(one, guessed=named is None, show_keys=arguments.show_keys))
            continue
        print(f"message {number}: {one.type}, {one.size} bytes ({one.abi}, {one.abi.byteorder}-endian{how})")
        print(*_lines(one.rows, show_keys=arguments.show_keys), sep="\n")
        if one.error is not None:
            print(f"error: {one.error}")
    if arguments.json:
        print(json.dumps(records, indent=2))
    return int(damaged)


def _named(name: str | None) -> Abi | None:
    try:
        return Abi.named(name) if name else None
    except NotSupported as error:
        raise UsageError(str(error)) from error


def _guessed(messages: Sequence[bytes]) -> tuple[Abi, str]:
    """The system that speaks, and how sure that is."""
    found = guess(messages[:_ENOUGH])
    if found.alike:
        first, *others = found.systems
        alike = [one.name for one in others if one.byteorder == first.byteorder]
        return first, ", guessed" + (f"; {', '.join(alike)} would say the same" if alike else "")
    if any(map(is_openbsd, messages)):
        raise UsageError(OPENBSD)
    if not found.systems:
        raise UsageError(
            "no system would say this, so the bytes are damaged or no PF_KEYv2; --abi says whose they are meant to be,"
            " and shows where they break its rules"
        )
    names = ", ".join(f"{one.name}-{one.byteorder}" for one in found.systems)
    raise UsageError(
        f"the bytes do not tell whose they are: --abi says it; these read them, each in its own way: {names}"
    )


# Input.


def _joined(inputs: Sequence[str]) -> Iterator[str]:
    """What was given, hex digits that stand beside each other as one."""
    digits = ""
    for name in inputs:
        if _is_hex(name):
            digits += name
            continue
        yield from filter(None, (digits, name))
        digits = ""
    yield from filter(None, (digits,))


def _is_hex(name: str) -> bool:
    """Whether it is hex digits, and no file of that name is here."""
    if not re.fullmatch(r"(?:0x)?[0-9a-fA-F:\s]{2,}", name):
        return False
    try:
        return not Path(name).exists()
    except OSError:
        return True  # longer than a name can be


def read(name: str, abi: Abi | None = None) -> list[bytes]:
    """The messages in a file, in hex digits, or in stdin ("-"); their byte order is that of `abi`, or found out."""
    if name == "-":
        data = sys.stdin.buffer.read()
    elif _is_hex(name):
        data = name.encode()
    else:
        try:
            data = Path(name).read_bytes()
        except OSError as error:
            raise UsageError(f"{name}: {error.strerror}; INPUT is a file, hex digits, or -") from error
    return [one for part in _unhexed(data) for one in split(part, abi)]


def _unhexed(data: bytes) -> list[bytes]:
    """What hex digits say, a line by itself when every line is a whole message; bytes that are no hex as they are."""
    text = re.sub(rb"0x|:", b"", data)
    if not re.fullmatch(rb"[0-9a-fA-F\s]*", text):
        return [data] if data else []
    lines = [b"".join(line.split()) for line in text.splitlines() if line.strip()]
    digits = b"".join(lines)
    if len(digits) % 2:
        raise UsageError(f"{len(digits)} hex digits are no whole number of bytes")
    if not digits:
        return []
    parts = [bytes.fromhex(line.decode()) for line in lines if len(line) % 2 == 0]
    if len(parts) == len(lines) > 1 and all(map(_begins_a_message, parts)):
        return parts
    return [bytes.fromhex(digits.decode())]


_Order = Literal["little", "big"]
_ORDERS: tuple[_Order, ...] = ("little", "big")
_OVERCOUNT = 15
"""Linux 6.1 states up to so many words more than it sends: 3 for each of five transport templates behind a tunnel."""


def _begins_a_message(data: bytes) -> bool:
    """Whether it is one message, by what its header says."""
    if len(data) % 8:
        return False
    return any(
        _is_header(data, 0, order) and _words(data, 4, order) <= len(data) // 8 + _OVERCOUNT for order in _ORDERS
    )


def _is_header(data: bytes, at: int, order: _Order) -> bool:
    return len(data) - at >= 16 and data[at] == 2 and data[at + 1] != 0 and _words(data, at + 4, order) >= 2


def _words(data: bytes, at: int, order: _Order) -> int:
    return int.from_bytes(data[at : at + 2], order)


def split(data: bytes, abi: Abi | None = None) -> list[bytes]:
    """The messages of a stream: by their stated lengths, or by their extensions where those say something else.

    Linux 6.1 states less or more than it sends for some policies.  What does not begin like a message belongs to the
    one before it.
    """
    if abi is not None:
        return list(_cut(data, abi.byteorder))
    little, big = list(_cut(data, "little")), list(_cut(data, "big"))
    return big if sum(map(_whole_in("big"), big)) > sum(map(_whole_in("little"), little)) else little


def _whole_in(order: _Order) -> Any:
    return lambda one: 8 * _words(one, 4, order) == len(one)


def _cut(data: bytes, order: _Order) -> Iterator[bytes]:
    start = 0
    while start < len(data):
        ends = (start + 8 * _words(data, start + 4, order), _by_extensions(data, start + 16, order))
        end = next((end for end in ends if end >= start + 16 and _is_header(data, end, order)), len(data))
        yield data[start:end]
        start = end


def _by_extensions(data: bytes, at: int, order: _Order) -> int:
    """Where the first header is behind a row of extensions, or where they cease to be some."""
    while at < len(data) and not _is_header(data, at, order):
        size = 8 * _words(data, at, order)
        if not size:
            break
        at += size
    return at


# Output.


def _lines(rows: Sequence[Row], *, show_keys: bool) -> list[str]:
    cells = [("offset", "bytes", "field", "value", "meaning")]
    for row in rows:
        hidden = row.secret and not show_keys
        chunks = (
            [f"** x {len(row.data)}"]
            if hidden
            else [row.data[at : at + 16].hex() for at in range(0, len(row.data), 16)]
        )
        meaning = HIDDEN if hidden else row.meaning
        cells.append((f"{row.offset:#06x}", chunks[0], row.field, "" if hidden else str(row.value), meaning))
        cells += [(f"{row.offset + 16 * n:#06x}", chunk, "", "", "") for n, chunk in enumerate(chunks) if n]
    return aligned(cells)


def _record(one: Annotated, *, guessed: bool, show_keys: bool) -> dict[str, Any]:
    """A message for JSON; the bytes and the value of a hidden field are null."""
    release = [".".join(map(str, one.abi.release))] if one.abi.release else []
    return {
        "abi": "-".join((one.abi.name, *release, one.abi.byteorder)),
        "guessed": guessed,
        "type": one.type,
        "size": one.size,
        "fields": [
            {
                "offset": row.offset,
                "size": len(row.data),
                "bytes": None if row.secret and not show_keys else row.data.hex(),
                "field": row.field,
                "value": None if row.secret and not show_keys else row.value,
                "meaning": row.meaning,
            }
            for row in one.rows
        ],
        "error": (
            {"offset": one.error.offset, "extension": one.error.extension, "reason": one.error.reason}
            if one.error
            else None
        ),
    }
