"""Rarer extensions as values: read from the bytes that the core has checked, and written as bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from ipaddress import IPv4Address, IPv6Address
from struct import Struct
from typing import Any, NamedTuple

from .abi import Abi
from .constants import ExtensionType, IdentityType
from .errors import EncodeError
from .extensions import (
    Combination,
    Filter,
    HardwareOffload,
    Identity,
    KMAddress,
    Proposal,
    SAStatistic,
    SAStatistics,
    SecurityContext,
    Sensitivity,
    SessionID,
)
from .messages import Address, IPAddress, Lifetime

__all__ = ["RARE", "RareForm", "RareValue"]

RareValue = (
    Address | Lifetime | Identity | Sensitivity | Proposal | SecurityContext | KMAddress | Filter
    | HardwareOffload | SessionID | SAStatistics | int
)  # fmt: skip

_IDENTITIES = {int(kind): kind for kind in IdentityType}
_INTERFACE = 32  # bytes for a name in sadb_x_if_hw_offl


@cache
def _layout(abi: Abi, fields: str) -> Struct:
    return Struct((">" if abi.byteorder == "big" else "<") + fields)


# Each reader gets an extension from its header on, each writer gives what follows the header.


def _sockaddr_at(data: bytes, at: int, abi: Abi) -> tuple[IPAddress, int, int, int, int]:
    """Address, port, scope, flow information, and the length of the sockaddr."""
    family = data[at + 1] if abi.sockaddr_has_length else _layout(abi, "H").unpack_from(data, at)[0]
    port = int.from_bytes(data[at + 2 : at + 4], "big")
    if family == abi.af_inet:
        return IPv4Address(data[at + 4 : at + 8]), port, 0, 0, 16
    flow = int.from_bytes(data[at + 4 : at + 8], "big")
    scope = _layout(abi, "I").unpack_from(data, at + 24)[0]
    return IPv6Address(data[at + 8 : at + 24]), port, scope, flow, 28


def _sockaddr(address: IPAddress, port: int, scope: int, flow: int, abi: Abi) -> bytes:
    size, family = (16, abi.af_inet) if address.version == 4 else (28, abi.af_inet6)
    head = bytes((size, family)) if abi.sockaddr_has_length else _layout(abi, "H").pack(family)
    head += port.to_bytes(2, "big")
    if address.version == 4:
        return head + address.packed + bytes(8)
    return head + flow.to_bytes(4, "big") + address.packed + _layout(abi, "I").pack(scope)


def _read_address(data: bytes, abi: Abi) -> Address:
    address, port, scope, flow, _ = _sockaddr_at(data, 8, abi)
    return Address(address, data[5], data[4], port, scope, flow)


def _write_address(value: Address, abi: Abi) -> bytes:
    if value.prefixlen > value.address.max_prefixlen:
        raise EncodeError(f"a prefix length of {value.prefixlen} for {value.address}")
    head = _layout(abi, "BBH").pack(value.protocol, value.prefixlen, 0)
    return head + _sockaddr(value.address, value.port, value.scope_id, value.flowinfo, abi)


def _read_lifetime(data: bytes, abi: Abi) -> Lifetime:
    return Lifetime(*_layout(abi, "I3Q").unpack_from(data, 4))


def _write_lifetime(value: Lifetime, abi: Abi) -> bytes:
    return _layout(abi, "I3Q").pack(value.allocations, value.bytes, value.addtime, value.usetime)


def _read_fragment(data: bytes, abi: Abi) -> int:
    return int(_layout(abi, "H").unpack_from(data, 4)[0])


def _write_fragment(value: int, abi: Abi) -> bytes:
    return _layout(abi, "HH").pack(value, 0)


def _read_identity(data: bytes, abi: Abi) -> Identity:
    kind, _, number = _layout(abi, "HHQ").unpack_from(data, 4)
    return Identity(_IDENTITIES.get(kind, kind), data[16:].partition(b"\0")[0], number)


def _write_identity(value: Identity, abi: Abi) -> bytes:
    if b"\0" in value.name:
        raise EncodeError(f"the name of an identity ends at a NUL: {value.name!r}")
    return _layout(abi, "HHQ").pack(value.type, 0, value.id) + (value.name + b"\0" if value.name else b"")


def _read_sensitivity(data: bytes, abi: Abi) -> Sensitivity:
    dpd, level, first, integrity, second, _ = _layout(abi, "I4BI").unpack_from(data, 4)
    words = _layout(abi, f"{first + second}Q").unpack_from(data, 16)
    return Sensitivity(dpd, level, integrity, words[:first], words[first:])


def _write_sensitivity(value: Sensitivity, abi: Abi) -> bytes:
    lengths = len(value.bitmap), len(value.integrity_bitmap)
    head = _layout(abi, "I4BI").pack(value.dpd, value.level, lengths[0], value.integrity_level, lengths[1], 0)
    return head + _layout(abi, f"{sum(lengths)}Q").pack(*value.bitmap, *value.integrity_bitmap)


_COMBINATION = "2B5H4x2I6Q"


def _read_proposal(data: bytes, abi: Abi) -> Proposal:
    return Proposal(data[4], tuple(_combination(*row) for row in _layout(abi, _COMBINATION).iter_unpack(data[8:])))


def _combination(*fields: int) -> Combination:
    soft, hard = (Lifetime(*fields[first::2]) for first in (7, 8))
    auth, encrypt, flags, auth_minimum, auth_maximum, encrypt_minimum, encrypt_maximum = fields[:7]
    return Combination(auth, encrypt, flags, auth_minimum, auth_maximum, encrypt_minimum, encrypt_maximum, soft, hard)


def _write_proposal(value: Proposal, abi: Abi) -> bytes:
    pack = _layout(abi, _COMBINATION).pack
    rows = [
        pack(
            one.auth, one.encrypt, one.flags,
            one.auth_minimum_bits, one.auth_maximum_bits, one.encrypt_minimum_bits, one.encrypt_maximum_bits,
            one.soft.allocations, one.hard.allocations, one.soft.bytes, one.hard.bytes,
            one.soft.addtime, one.hard.addtime, one.soft.usetime, one.hard.usetime,
        )
        for one in value.combinations
    ]  # fmt: skip
    return _layout(abi, "B3x").pack(value.replay) + b"".join(rows)


def _read_context(data: bytes, abi: Abi) -> SecurityContext:
    algorithm, doi, length = _layout(abi, "BBH").unpack_from(data, 4)
    return SecurityContext(data[8 : 8 + length], algorithm, doi)


def _write_context(value: SecurityContext, abi: Abi) -> bytes:
    return _layout(abi, "BBH").pack(value.algorithm, value.doi, len(value.context)) + value.context


def _read_kmaddress(data: bytes, abi: Abi) -> KMAddress:
    source, source_port, _, _, size = _sockaddr_at(data, 8, abi)
    destination, destination_port, *_ = _sockaddr_at(data, 8 + size, abi)
    return KMAddress(source, destination, source_port, destination_port)


def _write_kmaddress(value: KMAddress, abi: Abi) -> bytes:
    if value.source.version != value.destination.version:
        raise EncodeError(f"the two addresses of {value} are of different families")
    both = ((value.source, value.source_port), (value.destination, value.destination_port))
    return bytes(4) + b"".join(_sockaddr(address, port, 0, 0, abi) for address, port in both)


def _read_filter(data: bytes, abi: Abi) -> Filter:
    family, first, second = _layout(abi, "HBB").unpack_from(data, 36)
    if family == abi.af_inet:
        return Filter(IPv4Address(data[4:8]), IPv4Address(data[20:24]), first, second)
    return Filter(IPv6Address(data[4:20]), IPv6Address(data[20:36]), first, second)


def _write_filter(value: Filter, abi: Abi) -> bytes:
    if value.source.version != value.destination.version:
        raise EncodeError(f"the two addresses of {value} are of different families")
    limit = value.source.max_prefixlen
    if max(value.source_prefixlen, value.destination_prefixlen) > limit:
        raise EncodeError(f"a prefix length of {value}: at most {limit} fit")
    family = abi.af_inet if value.source.version == 4 else abi.af_inet6
    ends = value.source.packed.ljust(16, b"\0") + value.destination.packed.ljust(16, b"\0")
    return ends + _layout(abi, "HBB").pack(family, value.source_prefixlen, value.destination_prefixlen)


def _read_offload(data: bytes, abi: Abi) -> HardwareOffload:
    name = data[8 : 8 + _INTERFACE].partition(b"\0")[0]
    return HardwareOffload(name.decode("utf-8", "surrogateescape"), _layout(abi, "I").unpack_from(data, 4)[0])


def _write_offload(value: HardwareOffload, abi: Abi) -> bytes:
    name = value.interface.encode("utf-8", "surrogateescape")
    if len(name) >= _INTERFACE:
        raise EncodeError(f"the name of an interface has at most {_INTERFACE - 1} bytes, not {len(name)}")
    return _layout(abi, f"I{_INTERFACE}s").pack(value.flags, name)


def _read_session(data: bytes, abi: Abi) -> SessionID:
    return SessionID(*_layout(abi, "2Q").unpack_from(data, 8))


def _write_session(value: SessionID, abi: Abi) -> bytes:
    return _layout(abi, "4x2Q").pack(value.handle, value.session)


# struct sastat: the SPI in network order, a time, and a whole struct sadb_lifetime with its header.
_STATISTIC = "4sI4xI3Q"


def _read_statistics(data: bytes, abi: Abi) -> SAStatistics:
    rows = _layout(abi, _STATISTIC).iter_unpack(data[16:])
    found = (SAStatistic(int.from_bytes(spi, "big"), created, Lifetime(*rest)) for spi, created, *rest in rows)
    return SAStatistics(_layout(abi, "I").unpack_from(data, 4)[0], tuple(found))


def _write_statistics(value: SAStatistics, abi: Abi) -> bytes:
    head = _layout(abi, "3I").pack(value.direction, 0, len(value.associations))
    # The inner header says what it is, as the kernel's own does.
    inner = _layout(abi, "HH").pack(4, ExtensionType.LIFETIME_CURRENT)
    rows = [
        one.spi.to_bytes(4, "big") + _layout(abi, "I").pack(one.created) + inner
        + _write_lifetime(one.lifetime_current, abi)
        for one in value.associations
    ]  # fmt: skip
    return head + b"".join(rows)


class RareForm(NamedTuple):
    """How a value of one kind is read from an extension and written to one.

    `slot` is the core's check of its bytes (enum pfk_slot), `type` the Python type of the value.
    """

    slot: int
    type: type
    read: Callable[[bytes, Abi], RareValue]
    write: Callable[[Any, Abi], bytes]


_ADDRESS = RareForm(18, Address, _read_address, _write_address)
_LIFETIME = RareForm(19, Lifetime, _read_lifetime, _write_lifetime)
_IDENTITY = RareForm(21, Identity, _read_identity, _write_identity)

RARE = {
    ExtensionType.ADDRESS_PROXY: _ADDRESS,
    ExtensionType.NEW_ADDRESS_SRC: _ADDRESS,
    ExtensionType.NEW_ADDRESS_DST: _ADDRESS,
    ExtensionType.IDENTITY_SRC: _IDENTITY,
    ExtensionType.IDENTITY_DST: _IDENTITY,
    ExtensionType.SENSITIVITY: RareForm(22, Sensitivity, _read_sensitivity, _write_sensitivity),
    ExtensionType.PROPOSAL: RareForm(23, Proposal, _read_proposal, _write_proposal),
    ExtensionType.NAT_T_OA: _ADDRESS,
    ExtensionType.NAT_T_OAI: _ADDRESS,
    ExtensionType.NAT_T_OAR: _ADDRESS,
    ExtensionType.NAT_T_FRAG: RareForm(20, int, _read_fragment, _write_fragment),
    ExtensionType.SEC_CTX: RareForm(24, SecurityContext, _read_context, _write_context),
    ExtensionType.KMADDRESS: RareForm(25, KMAddress, _read_kmaddress, _write_kmaddress),
    ExtensionType.FILTER: RareForm(26, Filter, _read_filter, _write_filter),
    ExtensionType.LIFETIME_CURRENT_SOFTWARE: _LIFETIME,
    ExtensionType.LIFETIME_CURRENT_HARDWARE: _LIFETIME,
    ExtensionType.HARDWARE_OFFLOAD: RareForm(27, HardwareOffload, _read_offload, _write_offload),
    ExtensionType.SESSION_ID: RareForm(28, SessionID, _read_session, _write_session),
    ExtensionType.SASTAT: RareForm(29, SAStatistics, _read_statistics, _write_statistics),
    ExtensionType.ADDRESS_RANGE_SRC_START: _ADDRESS,
    ExtensionType.ADDRESS_RANGE_SRC_END: _ADDRESS,
    ExtensionType.ADDRESS_RANGE_DST_START: _ADDRESS,
    ExtensionType.ADDRESS_RANGE_DST_END: _ADDRESS,
    ExtensionType.MIGRATE_ADDRESS_SRC: _ADDRESS,
    ExtensionType.MIGRATE_ADDRESS_DST: _ADDRESS,
}
