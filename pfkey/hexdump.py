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


def _begins_a_message(data: bytes) -> bool:
    if len(data) < 16 or len(data) % 8 or data[0] != 2:
        return False
    orders: tuple[Literal["little", "big"], ...] = ("little", "big")
    return any(2 <= int.from_bytes(data[4:6], order) <= len(data) // 8 for order in orders)


def split(data: bytes, abi: Abi | None = None) -> list[bytes]:
    """The messages of a stream, by their stated lengths.

    What does not begin like a message belongs to the one before it: Linux 6.1 states less than it sends for some.
    """
    if abi is not None:
        return list(_cut(data, abi.byteorder))
    little, big = list(_cut(data, "little")), list(_cut(data, "big"))
    return big if sum(map(_whole_in("big"), big)) > sum(map(_whole_in("little"), little)) else little


def _whole_in(order: Literal["little", "big"]) -> Any:
    return lambda one: 8 * int.from_bytes(one[4:6], order) == len(one)


def _cut(data: bytes, order: Literal["little", "big"]) -> Iterator[bytes]:
    while data:
        size = 8 * int.from_bytes(data[4:6], order)
        rest = data[size:]
        if size < 16 or size >= len(data) or not (rest[0] == 2 and len(rest) >= 16):
            yield data
            return
        yield data[:size]
        data = rest


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
