"""Each extension's fields in the record, as the value that a person reads and writes; requests of a policy included."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from struct import Struct
from typing import Any, NamedTuple, cast

from . import _record as layout
from ._rare import RareValue
from .abi import Abi
from .constants import Action, Direction, ExtensionType, Level, Mode, PolicyScope, SAFlag, SAProtocol, SAState
from .errors import EncodeError
from .messages import SA, SA2, Address, Algorithm, IPAddress, Key, Lifetime, PolicyExtension, SPIRange, Template

__all__ = [
    "VALUES", "Blob", "Value", "address_of", "enum_or_int", "flags_of", "lifetime_of", "packed_request",
    "policy_fields", "templates_of", "wire_mode",
]  # fmt: skip

Value = SA | SA2 | Key | PolicyExtension | SPIRange | tuple[Algorithm, ...] | RareValue | bytes


def _table(kind: type[Any]) -> dict[int, Any]:
    return {int(member): member for member in kind}


_STATES, _LEVELS = _table(SAState), _table(Level)
_PROTOCOLS, _ACTIONS, _DIRECTIONS, _SCOPES = _table(SAProtocol), _table(Action), _table(Direction), _table(PolicyScope)
# End points and limits repeat from SA to SA; values do not change, so that many messages may share one.
_REMEMBERED = 4096
_ALGORITHM = {"little": Struct("<BBHHH"), "big": Struct(">BBHHH")}


def enum_or_int(table: Mapping[int, Any], number: int) -> Any:
    """The member, or the number itself: a kernel newer than this package must not break it."""
    return table.get(number, number)


def wire_mode(mode: Mode | int) -> int:
    """The number on the wire: the low byte of a Mode, a plain number as it is."""
    return mode & 0xFF if isinstance(mode, Mode) else mode


class Blob:
    """The variable parts of a message under construction, each on an 8-byte boundary behind its header."""

    __slots__ = ("abi", "data")

    def __init__(self, abi: Abi) -> None:
        self.abi = abi
        self.data = bytearray()

    def begin(self, number: int) -> int:
        """Start an extension; returns its offset in words."""
        self.data += bytes(-len(self.data) % 8)
        offset = len(self.data) // 8
        self.data += bytes(2) + number.to_bytes(2, self.abi.byteorder) + bytes(4)
        return offset

    def part(self, content: bytes) -> tuple[int, int]:
        """Add a variable part; returns its offset and length in bytes."""
        offset = len(self.data)
        self.data += content
        return offset, len(content)

    def raw(self, number: int, content: bytes) -> int:
        """Add an extension as it is: everything behind its 4-byte header, padded to a multiple of 8."""
        offset = self.begin(number)
        del self.data[-4:]
        self.data += content
        self.data += bytes(-len(self.data) % 8)
        words = len(self.data) // 8 - offset
        if words > 0xFFFF:
            raise EncodeError(f"extension {number} has {len(content)} bytes; at most 524276 fit")
        self.data[8 * offset : 8 * offset + 2] = words.to_bytes(2, self.abi.byteorder)
        return offset


def flags_of(wire: int, abi: Abi) -> SAFlag:
    """What the flags of an SA mean on this system."""
    turned = sum(meaning for bit, meaning in abi.flags.items() if wire & bit)
    return SAFlag(wire & ~sum(abi.flags) | turned)


def _wire_flags(flags: int, abi: Abi) -> int:
    turned = sum(bit for bit, meaning in abi.flags.items() if flags & meaning)
    return int(flags) & ~sum(abi.flags.values()) | turned


def _read_sa(record: bytes, data: bytes, abi: Abi, which: int) -> SA:
    spi, replay, state, auth, encrypt, flags = cast("tuple[int, ...]", layout.SA.read(record))
    return SA(spi, replay, enum_or_int(_STATES, state), auth, encrypt, flags_of(flags, abi))


def _write_sa(value: SA, record: bytearray, blob: Blob, which: int) -> None:
    flags = _wire_flags(value.flags, blob.abi)
    layout.SA.write(record, 0, value.spi, value.replay, value.state, value.auth, value.encrypt, flags)


@lru_cache(_REMEMBERED)
def lifetime_of(fields: bytes) -> Lifetime:
    """The value of this part of a record."""
    size, addtime, usetime, allocations, _ = cast("tuple[int, ...]", layout.LIFETIME.unpack(fields))
    return Lifetime(allocations, size, addtime, usetime)


def _read_lifetime(record: bytes, data: bytes, abi: Abi, which: int) -> Lifetime:
    return lifetime_of(layout.LIFETIME.part(record, which))


def _write_lifetime(value: Lifetime, record: bytearray, blob: Blob, which: int) -> None:
    layout.LIFETIME.write(record, which, value.bytes, value.addtime, value.usetime, value.allocations, 0)


@lru_cache(_REMEMBERED)
def address_of(fields: bytes) -> Address:
    """The value of this part of a record."""
    protocol, prefixlen, _, port, version, _, flowinfo, scope_id, raw, _ = cast("Any", layout.ADDRESS.unpack(fields))
    address: IPAddress = IPv4Address(raw[:4]) if version == 4 else IPv6Address(raw)
    return Address(address, prefixlen, protocol, port, scope_id, flowinfo)


def _read_address(record: bytes, data: bytes, abi: Abi, which: int) -> Address:
    return address_of(layout.ADDRESS.part(record, which))


def _write_address(value: Address, record: bytearray, blob: Blob, which: int) -> None:
    address = value.address
    layout.ADDRESS.write(
        record,
        which,
        value.protocol,
        value.prefixlen,
        0,
        value.port,
        address.version,
        0,
        value.flowinfo,
        value.scope_id,
        address.packed,
        b"",
    )
    if value.prefixlen > address.max_prefixlen:
        raise EncodeError(f"a prefix length of {value.prefixlen} for {address}; at most {address.max_prefixlen} fit")


def _read_key(record: bytes, data: bytes, abi: Abi, which: int) -> Key:
    bits, _, offset, _ = cast("tuple[int, ...]", layout.KEY.read(record, which))
    return Key(data[offset : offset + (bits + 7) // 8], bits)


def _write_key(value: Key, record: bytearray, blob: Blob, which: int) -> None:
    if value.bits > 0xFFFF:
        raise EncodeError(f"a key of {value.bits} bits; at most 65535 fit")
    if (value.bits + 7) // 8 != len(value.data):
        raise EncodeError(f"a key of {value.bits} bits takes {(value.bits + 7) // 8} bytes, not {len(value.data)}")
    layout.KEY.write(record, which, value.bits, 0, *blob.part(value.data))


def _read_spi_range(record: bytes, data: bytes, abi: Abi, which: int) -> SPIRange:
    minimum, maximum, _ = cast("tuple[int, ...]", layout.SPIRANGE.read(record))
    return SPIRange(minimum, maximum)


def _write_spi_range(value: SPIRange, record: bytearray, blob: Blob, which: int) -> None:
    layout.SPIRANGE.write(record, 0, value.minimum, value.maximum, 0)


def _read_supported(record: bytes, data: bytes, abi: Abi, which: int) -> tuple[Algorithm, ...]:
    _, offset, length = cast("tuple[int, ...]", layout.SUPPORTED.read(record, which))
    rows = _ALGORITHM[abi.byteorder].iter_unpack(data[offset : offset + length])
    return tuple(Algorithm(number, iv, low, high) for number, iv, low, high, _ in rows)


def _write_supported(value: tuple[Algorithm, ...], record: bytearray, blob: Blob, which: int) -> None:
    pack = _ALGORITHM[blob.abi.byteorder].pack
    content = b"".join(pack(one.id, one.iv_length, one.minimum_bits, one.maximum_bits, 0) for one in value)
    layout.SUPPORTED.write(record, which, 0, *blob.part(content))


def _read_sa2(record: bytes, data: bytes, abi: Abi, which: int) -> SA2:
    mode, _, _, sequence, reqid = cast("tuple[int, ...]", layout.SA2.read(record))
    return SA2(enum_or_int(abi.modes, mode), sequence, reqid)


def _write_sa2(value: SA2, record: bytearray, blob: Blob, which: int) -> None:
    layout.SA2.write(record, 0, wire_mode(value.mode), 0, 0, value.sequence, value.reqid)


def _read_nat_t_type(record: bytes, data: bytes, abi: Abi, which: int) -> int:
    return cast("int", layout.NAT_T_TYPE.read(record)[0])


def _write_nat_t_type(value: int, record: bytearray, blob: Blob, which: int) -> None:
    layout.NAT_T_TYPE.write(record, 0, value, b"")


def _read_nat_t_port(record: bytes, data: bytes, abi: Abi, which: int) -> int:
    return cast("int", layout.NAT_T_PORT.read(record, which)[0])


def _write_nat_t_port(value: int, record: bytearray, blob: Blob, which: int) -> None:
    layout.NAT_T_PORT.write(record, which, value, 0)


def _read_replay(record: bytes, data: bytes, abi: Abi, which: int) -> int:
    return cast("int", layout.REPLAY.read(record)[0])


def _write_replay(value: int, record: bytearray, blob: Blob, which: int) -> None:
    layout.REPLAY.write(record, 0, value)


def policy_fields(record: bytes, data: bytes, abi: Abi) -> tuple[Any, Any, Any, int, int, tuple[Template, ...]]:
    """Action, direction, scope, id, priority and templates of a record that has a policy."""
    action, direction, scope, number, priority, offset, length = cast("tuple[int, ...]", layout.POLICY.read(record))
    return (
        _ACTIONS.get(action, action),
        _DIRECTIONS.get(direction, direction),
        _SCOPES.get(scope, scope) if abi.has_scope else 0,
        number,
        priority if abi.has_priority else 0,  # else a reserved word, which a kernel may leave dirty
        templates_of(data[offset : offset + length], abi),
    )


def _read_policy(record: bytes, data: bytes, abi: Abi, which: int) -> PolicyExtension:
    action, direction, scope, number, priority, templates = policy_fields(record, data, abi)
    return PolicyExtension(action, direction, number, priority, templates, scope)


def _write_policy(value: PolicyExtension, record: bytearray, blob: Blob, which: int) -> None:
    requests = b"".join(packed_request(template, blob.abi) for template in value.templates)
    scope = value.scope if blob.abi.has_scope else 0
    priority = value.priority if blob.abi.has_priority else 0
    layout.POLICY.write(record, 0, value.action, value.direction, scope, value.id, priority, *blob.part(requests))


# struct sadb_x_ipsecrequest: its head, 8 bytes with a 16-bit reqid or 16 with a 32-bit one, then two sockaddrs or none.
_REQUEST = {
    ("little", 8): Struct("<HHBBH"),
    ("big", 8): Struct(">HHBBH"),
    ("little", 16): Struct("<HHBBHII"),
    ("big", 16): Struct(">HHBBHII"),
}


@lru_cache(_REMEMBERED)
def templates_of(data: bytes, abi: Abi) -> tuple[Template, ...]:
    """The requests of a policy, which the core has validated."""
    head = _REQUEST[abi.byteorder, abi.request_size]
    templates = []
    start, end = 0, len(data)
    while start + abi.request_size <= end:
        length, protocol, mode, level, *rest = head.unpack_from(data, start)
        reqid = rest[0] if abi.request_size == 8 else rest[1]
        source = destination = None
        if length > abi.request_size:
            first = start + abi.request_size
            source = _sockaddr(data, first, abi)
            destination = _sockaddr(data, first + (16 if source.version == 4 else 28), abi)
        templates.append(
            Template(
                enum_or_int(_PROTOCOLS, protocol),
                enum_or_int(abi.modes, mode),
                source,
                destination,
                reqid,
                enum_or_int(_LEVELS, level),
            )
        )
        start += length
    return tuple(templates)


def _sockaddr(data: bytes, at: int, abi: Abi) -> IPAddress:
    family = data[at + 1] if abi.sockaddr_has_length else int.from_bytes(data[at : at + 2], abi.byteorder)
    if family == abi.af_inet:
        return IPv4Address(data[at + 4 : at + 8])
    return IPv6Address(data[at + 8 : at + 24])


_request_layouts: dict[tuple[int, int], tuple[Struct, tuple[int, ...], Abi]] = {}


def _request_layout(abi: Abi, address_size: int) -> tuple[Struct, tuple[int, ...], Abi]:
    """A whole request, its head and two sockaddrs of this address size (0: none), and how a sockaddr begins.

    The Abi is kept beside them, so that its id stays its own.
    """
    try:
        return _request_layouts[id(abi), address_size]
    except KeyError:
        pass
    head = "HHBBH" if abi.request_size == 8 else "HHBBHII"
    version, length, family = {0: (0, 0, 0), 4: (4, 16, abi.af_inet), 16: (6, 28, abi.af_inet6)}[address_size]
    begin = (length, family) if abi.sockaddr_has_length else (family,)
    sockaddr = ("BB" if abi.sockaddr_has_length else "H") + {0: "", 4: "2x4s8x", 6: "6x16s4x"}[version]
    ends = 2 * sockaddr if version else ""
    padding = -struct.calcsize(f"<{head}{ends}") % 8
    form = Struct(("<" if abi.byteorder == "little" else ">") + head + ends + f"{padding}x")
    made = _request_layouts[id(abi), address_size] = form, begin, abi
    return made


def packed_request(template: Template, abi: Abi) -> bytes:
    """A template as struct sadb_x_ipsecrequest and the addresses behind it.

    Raises EncodeError when the wire cannot carry it.
    """
    known = template._packed
    if known is not None and known[0] == abi.identity:
        return known[1]
    packed = _packed_request(template, abi)
    # A template is sent again at every change of its policy, and does not change itself.
    object.__setattr__(template, "_packed", (abi.identity, packed))
    return packed


def _packed_request(template: Template, abi: Abi) -> bytes:
    source, destination, reqid, mode = template.source, template.destination, template.reqid, template.mode
    ends: tuple[Any, ...] = ()
    if source is not None and destination is not None:
        first, second = source.packed, destination.packed
        if len(first) != len(second):
            raise EncodeError(f"the two ends of {template} are of different address families")
        form, begin, _ = _request_layout(abi, len(first))
        ends = (*begin, first, *begin, second)
    elif source is not None or destination is not None:
        raise EncodeError(f"{template} has one end point; give both or none")
    else:
        form, _, _ = _request_layout(abi, 0)
    if isinstance(mode, Mode):
        mode &= 0xFF
    try:
        if abi.request_size == 16:
            return form.pack(form.size, template.protocol, mode, template.level, 0, reqid, 0, *ends)
        if reqid > 0xFFFF:
            raise EncodeError(
                f"reqid {reqid} of {template} does not fit: {abi} has 16 bits for it in a policy;"
                f" use one up to {abi.maximum_reqid}"
            )
        return form.pack(form.size, template.protocol, mode, template.level, reqid, *ends)
    except struct.error as error:
        raise EncodeError(f"a number in {template} does not fit its field: {error}") from None


class _Form(NamedTuple):
    """How a value of one kind is read from the record and written to it, and what Python type it has."""

    type: type | tuple[type, ...]
    read: Callable[[bytes, bytes, Abi, int], Value]
    write: Callable[[Any, bytearray, Blob, int], None]


_ADDRESS_FORM = _Form(Address, _read_address, _write_address)
_LIFETIME_FORM = _Form(Lifetime, _read_lifetime, _write_lifetime)
_KEY_FORM = _Form(Key, _read_key, _write_key)
_SUPPORTED_FORM = _Form((tuple, list), _read_supported, _write_supported)
_PORT_FORM = _Form(int, _read_nat_t_port, _write_nat_t_port)

VALUES = {
    ExtensionType.SA: _Form(SA, _read_sa, _write_sa),
    ExtensionType.LIFETIME_CURRENT: _LIFETIME_FORM,
    ExtensionType.LIFETIME_HARD: _LIFETIME_FORM,
    ExtensionType.LIFETIME_SOFT: _LIFETIME_FORM,
    ExtensionType.ADDRESS_SRC: _ADDRESS_FORM,
    ExtensionType.ADDRESS_DST: _ADDRESS_FORM,
    ExtensionType.KEY_AUTH: _KEY_FORM,
    ExtensionType.KEY_ENCRYPT: _KEY_FORM,
    ExtensionType.SPIRANGE: _Form(SPIRange, _read_spi_range, _write_spi_range),
    ExtensionType.SUPPORTED_AUTH: _SUPPORTED_FORM,
    ExtensionType.SUPPORTED_ENCRYPT: _SUPPORTED_FORM,
    ExtensionType.SA2: _Form(SA2, _read_sa2, _write_sa2),
    ExtensionType.NAT_T_TYPE: _Form(int, _read_nat_t_type, _write_nat_t_type),
    ExtensionType.NAT_T_SPORT: _PORT_FORM,
    ExtensionType.NAT_T_DPORT: _PORT_FORM,
    ExtensionType.POLICY: _Form(PolicyExtension, _read_policy, _write_policy),
    ExtensionType.SA_REPLAY: _Form(int, _read_replay, _write_replay),
}
