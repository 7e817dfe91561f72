"""Messages field by field, with what each value means, and the guess whose messages they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntFlag
from ipaddress import ip_address
from typing import Any, Literal, NamedTuple

from . import schema
from ._numbers import OPENBSD_EXTENSIONS
from .abi import Abi
from .constants import (
    Action,
    Direction,
    ExtensionType,
    IdentityType,
    Level,
    MessageType,
    PolicyScope,
    SAFlag,
    SAProtocol,
    SAState,
    SAType,
)
from .errors import DecodeError

__all__ = ["Annotated", "Guess", "Row", "annotate", "guess", "is_openbsd"]

UNKNOWN = "unknown"


class Row(NamedTuple):
    """One field: where, its bytes, the name in the system's headers, its value, what that means ("" for no more)."""

    offset: int
    data: bytes
    field: str
    value: int | str
    meaning: str
    secret: bool = False


@dataclass(frozen=True, slots=True)
class Annotated:
    """A message as rows; where it is damaged, the rows up to the fault, the error, and one row of what was not read."""

    abi: Abi
    size: int
    type: str
    rows: tuple[Row, ...]
    error: DecodeError | None
    doubts: int
    """How many of its numbers this system does not know, or does not use so."""


class _Place(NamedTuple):
    """Where a field is: the system, the SA type of the message, and the extension (0: the header)."""

    abi: Abi
    satype: int
    extension: int


_Meaning = Callable[[Any, _Place], str]


def _member(kind: type) -> _Meaning:
    table = {int(one): one.name for one in kind}  # type: ignore[attr-defined]
    return lambda value, _: table.get(value, UNKNOWN)


def _bytes(words: int, place: _Place) -> str:
    return f"{8 * words} bytes"


def _flags(value: int, place: _Place) -> str:
    turned = place.abi.flags
    names = [turned.get(1 << bit, _flag_name(1 << bit)) for bit in range(32) if value >> bit & 1]
    return "|".join(one.name or UNKNOWN if isinstance(one, IntFlag) else one for one in names)


def _flag_name(bit: int) -> str:
    return SAFlag(bit).name or UNKNOWN


def _message_type(value: int, place: _Place) -> str:
    kind = place.abi.message_types.get(value)
    return kind.name if kind is not None else UNKNOWN


def _extension(value: int, place: _Place) -> str:
    kind = place.abi.extensions.get(value)
    return kind.name if kind is not None else UNKNOWN


def _authentication(value: int, place: _Place) -> str:
    return place.abi.authentication_names.get(value, UNKNOWN)


def _encryption(value: int, place: _Place) -> str:
    names = place.abi.compression_names if place.satype == SAType.IPCOMP else place.abi.encryption_names
    return names.get(value, UNKNOWN)


def _algorithm(value: int, place: _Place) -> str:
    authentication = place.abi.extensions.get(place.extension) is ExtensionType.SUPPORTED_AUTH
    return _authentication(value, place) if authentication else _encryption(value, place)


def _mode(value: int, place: _Place) -> str:
    mode = place.abi.modes.get(value)
    return mode.name if mode is not None else UNKNOWN


def _family(value: int, place: _Place) -> str:
    return {place.abi.af_inet: "AF_INET", place.abi.af_inet6: "AF_INET6"}.get(value, UNKNOWN)


def _moment(value: int, place: _Place) -> str:
    """Times of a current lifetime are moments, those of a limit are durations."""
    kind = place.abi.extensions.get(place.extension)
    if not value:
        return ""
    if kind is not None and kind.name.startswith("LIFETIME_CURRENT") and value < 1 << 36:
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return "s"


def _error(value: int, place: _Place) -> str:
    name = place.abi.error_name(value) if value else ""
    return UNKNOWN if name.startswith("error ") else name


def _protocol(value: int, place: _Place) -> str:
    return "any" if value in (0, 255) else {1: "ICMP", 6: "TCP", 17: "UDP", 58: "ICMPV6"}.get(value, "")


def _policy_flags(value: int, place: _Place) -> str:
    return {0: "", 128: "ORIGIN_KERNEL"}.get(value, UNKNOWN)


def _text(value: bytes, place: _Place) -> str:
    return repr(value.split(b"\0")[0].decode("utf-8", "backslashreplace")) if value.strip(b"\0") else ""


def _address(value: bytes, place: _Place) -> str:
    return str(ip_address(value))


_MEANINGS: Mapping[str, _Meaning] = {
    "sadb_msg_version": lambda value, _: "PF_KEY_V2" if value == 2 else UNKNOWN,
    "sadb_msg_type": _message_type,
    "sadb_msg_errno": _error,
    "sadb_msg_satype": _member(SAType),
    "sadb_msg_len": _bytes,
    "sadb_ext_len": _bytes,
    "sadb_lifetime_len": _bytes,
    "sadb_ext_type": _extension,
    "sadb_lifetime_exttype": _extension,
    "sadb_sa_state": _member(SAState),
    "sadb_sa_auth": _authentication,
    "sadb_sa_encrypt": _encryption,
    "sadb_sa_flags": _flags,
    "sadb_comb_auth": _authentication,
    "sadb_comb_encrypt": _encryption,
    "sadb_comb_flags": _flags,
    "sadb_alg_id": _algorithm,
    "sadb_x_sa2_mode": _mode,
    "sadb_lifetime_bytes": lambda value, _: "bytes" if value else "",
    "sadb_lifetime_addtime": _moment,
    "sadb_lifetime_usetime": _moment,
    "sadb_address_proto": _protocol,
    "sadb_address_prefixlen": lambda value, _: f"/{value}",
    "sadb_ident_type": _member(IdentityType),
    "sadb_x_policy_type": _member(Action),
    "sadb_x_policy_dir": _member(Direction),
    "sadb_x_policy_scope": _member(PolicyScope),
    "sadb_x_policy_flags": _policy_flags,
    "sadb_x_ipsecrequest_proto": _member(SAProtocol),
    "sadb_x_ipsecrequest_mode": _mode,
    "sadb_x_ipsecrequest_level": _member(Level),
    "sadb_x_filter_family": _family,
    "sin_family": _family,
    "sin6_family": _family,
    "sin_addr": _address,
    "sin6_addr": _address,
    "sadb_x_if_hw_offl_if": _text,
    "sadb_ident_name": _text,
    "sadb_x_ctx_context": _text,
}
_AS_HEX = {"sadb_sa_spi", "spi", "sadb_spirange_min", "sadb_spirange_max", "sadb_sa_flags", "sadb_comb_flags"}
_SECRET = {"sadb_key_data"}
_KEYS = {ExtensionType.KEY_AUTH, ExtensionType.KEY_ENCRYPT}
_KEYLESS = {
    MessageType.GETSPI, MessageType.DELETE, MessageType.ACQUIRE, MessageType.REGISTER, MessageType.EXPIRE,
    MessageType.FLUSH, *(kind for kind in MessageType if kind.name.startswith("SPD")),
}  # fmt: skip

# Bits that a key of an algorithm has; what is not here may have any.
_KEY_BITS: Mapping[str, tuple[int, ...]] = {
    "hmac-md5": (128,), "hmac-sha1": (160,), "hmac-sha2-256": (256,), "hmac-sha2-384": (384,),
    "hmac-sha2-512": (512,), "null": (0,), "none": (0,), "des-cbc": (64,), "3des-cbc": (192,),
    "aes-cbc": (128, 192, 256), "aes-gcm-16": (160, 224, 288), "chacha20-poly1305": (288,),
}  # fmt: skip


def annotate(data: bytes, abi: Abi, base: int = 0) -> Annotated:
    """Every field of `data`, which begins at `base` of whatever holds it."""
    notes: list[schema.Note] = []
    error: DecodeError | None = None
    try:
        schema.parse(data, abi, notes=notes)
    except DecodeError as found:
        error = found
    rows = list(_rows(notes, data, abi, base))
    kind = abi.message_types.get(data[1], data[1]) if len(data) > 1 else ""
    end = notes[-1].offset + notes[-1].size if notes else 0
    if end < len(data):
        rows.append(Row(base + end, data[end:], "(not read)", "", "", secret=kind not in _KEYLESS))
    doubts = sum(row.meaning == UNKNOWN or UNKNOWN in row.meaning.split("|") for row in rows) + _misuse(notes, abi)
    name = kind.name if isinstance(kind, MessageType) else str(kind)
    return Annotated(abi, len(data), name, tuple(rows), error, doubts)


def _rows(notes: Sequence[schema.Note], data: bytes, abi: Abi, base: int) -> Iterator[Row]:
    place = _Place(abi, data[3] if len(data) > 3 else 0, 0)
    for note in notes:
        if note.name == "sadb_ext_type":
            place = place._replace(extension=note.value)
        raw = data[note.offset : note.offset + note.size]
        if note.name == "body":
            inner = annotate(raw, abi, base + note.offset)
            yield from inner.rows
            continue
        meaning = _MEANINGS.get(note.name)
        secret = note.name in _SECRET or (note.name == "data" and abi.extensions.get(place.extension) in _KEYS)
        yield Row(
            base + note.offset, raw, note.name, _value(note), meaning(note.value, place) if meaning else "", secret
        )


def _value(note: schema.Note) -> int | str:
    if isinstance(note.value, bytes):
        return "" if note.size > 16 or note.name.endswith("addr") else note.value.hex()
    return f"{note.value:#010x}" if note.name in _AS_HEX else int(note.value)


def _misuse(notes: Sequence[schema.Note], abi: Abi) -> int:
    """How many fields say what a kernel of this system would not: reserved ones that are used, keys of a wrong size."""
    found = sum(
        note.value not in (0, bytes(note.size))
        for note in notes
        if note.name.startswith("sadb_x_policy_reserved") or note.name.startswith("sadb_x_ipsecrequest_reserved")
    )
    said = {note.name: note.value for note in notes}
    kind, formats = 0, schema.formats(abi)
    for note in notes:
        kind = note.value if note.name == "sadb_ext_type" else kind
        # An echo of what was rejected may be damaged, but is likelier the message of a system that can read it.
        found += 2 * (note.name == "data" and kind in formats)
        if note.name != "sadb_key_bits" or "sadb_sa_auth" not in said:
            continue
        names, field = (
            (abi.authentication_names, "sadb_sa_auth")
            if abi.extensions.get(kind) is ExtensionType.KEY_AUTH
            else (abi.encryption_names, "sadb_sa_encrypt")
        )
        fitting = _KEY_BITS.get(names.get(said[field], ""))
        found += fitting is not None and note.value not in fitting
    return found


_CANDIDATES = tuple(
    Abi.named(f"{name}-{order}") for order in ("little", "big") for name in ("linux", "freebsd-15", "netbsd", "macos")
)


class Guess(NamedTuple):
    """The systems that may have said this, and whether they all read it alike."""

    systems: tuple[Abi, ...]
    alike: bool


def guess(messages: Sequence[bytes]) -> Guess:
    """Whose messages these are.

    One that knows every number is likelier than one that does not; one that refuses a message has not said it.  A
    message that all of them refuse is damaged, the end of a capture that was cut off for one, and tells nothing, unless
    OpenBSD has said it.
    """
    readings = [[annotate(data, abi) for abi in _CANDIDATES] for data in messages]
    telling = [
        each
        for data, each in zip(messages, readings, strict=True)
        if not all(one.error for one in each) or is_openbsd(data)
    ]
    fitting = [(abi, [each[number] for each in telling]) for number, abi in enumerate(_CANDIDATES)]
    fitting = [(abi, read) for abi, read in fitting if read and not any(one.error for one in read)]
    if not fitting:
        return Guess((), alike=False)
    least = min(sum(one.doubts for one in read) for _, read in fitting)
    best = [(abi, read) for abi, read in fitting if sum(one.doubts for one in read) == least]
    said = {tuple(_reading(one) for one in read) for _, read in best}
    return Guess(tuple(abi for abi, _ in best), alike=len(said) == 1)


def _reading(one: Annotated) -> tuple[tuple[object, ...], ...]:
    """What it says, whatever the fields are called; zeros say nothing."""
    return tuple((row.offset, row.value, row.meaning) for row in one.rows if any(row.data))


_ORDERS: tuple[Literal["little", "big"], ...] = ("little", "big")


def is_openbsd(data: bytes) -> bool:
    """Whether its extensions are those that only OpenBSD has, with the sizes that they have there."""
    fixed = {17: (24, 40), 18: (24, 40), 19: (8,), 20: (8,), 21: (24, 40), 22: (24, 40)}
    for order in _ORDERS:
        at, seen = 16, []
        while at + 4 <= len(data):
            size = 8 * int.from_bytes(data[at : at + 2], order)
            number = int.from_bytes(data[at + 2 : at + 4], order)
            if not size or at + size > len(data):
                break
            seen.append((number, size))
            at += size
        if at == len(data) and any(number in OPENBSD_EXTENSIONS and number > 31 for number, _ in seen):
            return True
        if at == len(data) and sum(size in fixed.get(number, ()) for number, size in seen) > 1:
            return True
    return False
