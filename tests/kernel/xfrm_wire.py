"""The structures of NETLINK_XFRM (linux/netlink.h, linux/xfrm.h) about policies <-> the extensions of PF_KEY."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from ipaddress import ip_address
from typing import Any, NamedTuple

from pfkey import Action, Direction, ExtensionType, Level, Lifetime, Mode, Template
from pfkey.messages import Address, IPAddress, PolicyExtension

__all__ = [
    "ACK",
    "DELETE",
    "DONE",
    "DUMP",
    "ERROR",
    "FLUSH",
    "GET",
    "GROUP_POLICY",
    "MULTI",
    "NETLINK_XFRM",
    "NEW",
    "UPDATE",
    "Extensions",
    "Netlink",
    "Refused",
    "error_number",
    "pack_identity",
    "pack_policy",
    "pack_request",
    "pack_templates",
    "read_deleted",
    "read_policy",
    "read_reqids",
    "split",
]

Extensions = dict[ExtensionType | int, Any]

NETLINK_XFRM, GROUP_POLICY = 6, 1 << 3
ERROR, DONE = 2, 3
NEW, DELETE, GET, UPDATE, FLUSH = 0x13, 0x14, 0x15, 0x19, 0x1D
_REQUEST, MULTI, ACK, DUMP = 0x1, 0x2, 0x4, 0x300
_TEMPLATES, _NESTED_POLICY, _POLICY_TYPE = 5, 7, 16
_MAIN = 0

_HEADER = struct.Struct("=IHHII")  # nlmsghdr
_ATTRIBUTE = struct.Struct("=HH")  # nlattr
_SELECTOR = struct.Struct("=16s16s2sH2sHHBBB3xiI")  # xfrm_selector
_LIFETIMES = struct.Struct("=8Q4Q")  # xfrm_lifetime_cfg, xfrm_lifetime_cur
_POLICY_TAIL = struct.Struct("=IIBBBB4x")  # the rest of xfrm_userpolicy_info, padded as 64-bit compilers do
_IDENTITY_TAIL = struct.Struct("=IB3x")  # the rest of xfrm_userpolicy_id
_TEMPLATE = struct.Struct("=16s4sB3xHxx16sIBBBxIII")  # xfrm_user_tmpl
_POLICY_SIZE = _SELECTOR.size + _LIFETIMES.size + _POLICY_TAIL.size
_IDENTITY_SIZE = _SELECTOR.size + _IDENTITY_TAIL.size

_INFINITY = 0xFFFFFFFFFFFFFFFF
_ALL_ALGORITHMS = 0xFFFFFFFF
_ALLOW, _BLOCK = 0, 1
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_MODES: Mapping[int, int] = {Mode.TRANSPORT: 0, Mode.TUNNEL: 1, Mode.BEET: 4}
_MODES_BACK: Mapping[int, Mode] = {number: Mode(mode) for mode, number in _MODES.items()}
_PROTOCOLS = (50, 51, 108, 43, 60)  # ESP, AH, IPComp; with IPv6 routing and destination options headers
_ANY_PROTOCOL, _MANUAL_REQIDS, _MAXIMUM_TEMPLATES = 255, 16383, 6


class Refused(Exception):
    """What af_key would answer with this error number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Netlink(NamedTuple):
    """One netlink message.  Notices repeat the seq and the pid that the request had in its header, whosever it was."""

    type: int
    flags: int
    seq: int
    pid: int
    body: bytes


# Messages and attributes.


def pack_request(kind: int, flags: int, seq: int, pid: int, body: bytes = b"") -> bytes:
    """One request."""
    return _HEADER.pack(16 + len(body), kind, _REQUEST | flags, seq, pid) + body


def split(data: bytes) -> Iterator[Netlink]:
    """The messages of one datagram."""
    while len(data) >= 16:
        length, kind, flags, seq, pid = _HEADER.unpack_from(data)
        yield Netlink(kind, flags, seq, pid, data[16:length])
        data = data[(length + 3) & ~3 :]


def error_number(body: bytes) -> int:
    """The positive errno of an ERROR or DONE, 0 for success."""
    return -int(struct.unpack_from("=i", body)[0]) if len(body) >= 4 else 0


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(4 + len(value), kind) + value + bytes(-len(value) % 4)


def _attributes(data: bytes) -> dict[int, bytes]:
    found = {}
    while len(data) >= 4:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < 4:
            break
        found[kind] = data[4:length]
        data = data[(length + 3) & ~3 :]
    return found


# What PF_KEY says -> what netlink takes.


def pack_policy(
    source: Address,
    destination: Address,
    policy: PolicyExtension,
    hard: Lifetime | None,
    soft: Lifetime | None,
    templates: bytes,
) -> bytes:
    """The body of NEW and UPDATE: xfrm_userpolicy_info, and the templates as pack_templates gives them."""
    action = _BLOCK if policy.action == Action.DISCARD else _ALLOW
    body = _pack_selector(source, destination) + _pack_lifetimes(hard or Lifetime(), soft or Lifetime())
    body += _POLICY_TAIL.pack(policy.priority, 0, policy.direction - 1, action, 0, 0)
    return body + (_attribute(_TEMPLATES, templates) if templates else b"")


def pack_identity(ends: tuple[Address, Address] | None, index: int, direction: int) -> bytes:
    """The body of GET and DELETE: a policy by its selector, or by its index (then without ends)."""
    selector = bytes(_SELECTOR.size) if ends is None else _pack_selector(*ends)
    return selector + _IDENTITY_TAIL.pack(index, direction)


def pack_templates(
    templates: tuple[Template, ...], direction: int, version: int, new_reqid: Callable[[], int]
) -> bytes:
    """By the rules of af_key: what it refuses is Refused, what it changes is changed.

    `new_reqid` gives the number for level UNIQUE without a usable one.
    """
    if len(templates) > _MAXIMUM_TEMPLATES:
        raise Refused(errno.ELOOP)
    packed = b""
    for template in templates:
        protocol, mode = template.protocol & 0xFF, _MODES.get(template.mode)
        optional = template.level == Level.USE
        if protocol not in _PROTOCOLS or mode is None:
            raise Refused(errno.EINVAL)
        if optional and template.mode != Mode.TRANSPORT and direction == Direction.OUT:
            raise Refused(errno.EINVAL)
        ends = bytes(16), bytes(16)
        if template.mode == Mode.TUNNEL:
            if template.source is None or template.destination is None:
                raise Refused(errno.EINVAL)
            ends, version = (_packed(template.source), _packed(template.destination)), template.source.version
        reqid = template.reqid if template.level == Level.UNIQUE else 0
        if template.level == Level.UNIQUE and not 0 < reqid <= _MANUAL_REQIDS:
            reqid = new_reqid()
        packed += _TEMPLATE.pack(
            *(ends[1], bytes(4), protocol, _FAMILIES[version], ends[0], reqid, mode, 0, optional),
            *(_ALL_ALGORITHMS, _ALL_ALGORITHMS, _ALL_ALGORITHMS),
        )
    return packed


def _pack_selector(source: Address, destination: Address) -> bytes:
    """Host bits as they are; where the two sides name different protocols, the destination's counts, as in af_key."""
    to, since = [(side.port.to_bytes(2, "big"), 0xFFFF if side.port else 0) for side in (destination, source)]
    return _SELECTOR.pack(
        *(_packed(destination.address), _packed(source.address), *to, *since),
        *(_FAMILIES[source.address.version], destination.prefixlen, source.prefixlen),
        *(0 if destination.protocol == _ANY_PROTOCOL else destination.protocol, 0, 0),
    )


def _packed(address: IPAddress) -> bytes:
    return address.packed.ljust(16, b"\0")


def _pack_lifetimes(hard: Lifetime, soft: Lifetime) -> bytes:
    """No limit is 0 in PF_KEY, and all ones for packets and bytes here."""
    counts = (soft.bytes, hard.bytes, soft.allocations, hard.allocations)
    times = (soft.addtime, hard.addtime, soft.usetime, hard.usetime)
    return _LIFETIMES.pack(*(count or _INFINITY for count in counts), *times, 0, 0, 0, 0)


# And back.


def read_policy(body: bytes) -> Extensions | None:
    """The extensions, in af_key's order, of xfrm_userpolicy_info and what follows it; None for a sub-policy."""
    attributes = _attributes(body[_POLICY_SIZE:])
    if attributes.get(_POLICY_TYPE, b"\0")[0] != _MAIN:
        return None
    source, destination = _read_selector(body)
    limits = _LIFETIMES.unpack_from(body, _SELECTOR.size)
    priority, index, way, action, _, _ = _POLICY_TAIL.unpack_from(body, _SELECTOR.size + _LIFETIMES.size)
    templates = tuple(_read_templates(attributes.get(_TEMPLATES, b"")))
    shown = Action.DISCARD if action == _BLOCK else Action.IPSEC if templates else Action.NONE
    hard, soft = (
        Lifetime(_limit(limits[packets]), _limit(limits[size]), limits[add], limits[use])
        for packets, size, add, use in ((3, 1, 5, 7), (2, 0, 4, 6))
    )
    return {
        ExtensionType.ADDRESS_SRC: source,
        ExtensionType.ADDRESS_DST: destination,
        ExtensionType.LIFETIME_HARD: hard,
        ExtensionType.LIFETIME_SOFT: soft,
        ExtensionType.LIFETIME_CURRENT: Lifetime(limits[9], limits[8], limits[10], limits[11]),
        ExtensionType.POLICY: PolicyExtension(shown, way + 1, index, priority, templates),
    }


def read_deleted(body: bytes) -> tuple[bool, Extensions | None]:
    """Of the notice of a deletion: whether it was asked for by index, and the policy."""
    index = _IDENTITY_TAIL.unpack_from(body, _SELECTOR.size)[0]
    attributes = body[_IDENTITY_SIZE:]
    return bool(index), read_policy(_attributes(attributes)[_NESTED_POLICY] + attributes)


def read_reqids(body: bytes) -> set[int]:
    """Those of a policy's templates."""
    templates = _attributes(body[_POLICY_SIZE:]).get(_TEMPLATES, b"")
    return {template.reqid for template in _read_templates(templates)}


def _read_selector(body: bytes) -> tuple[Address, Address]:
    to, since, to_port, _, since_port, _, family, to_length, since_length, protocol, _, _ = _SELECTOR.unpack_from(body)
    protocol = protocol or _ANY_PROTOCOL
    return (
        Address(_address(since, family), since_length, protocol, int.from_bytes(since_port, "big")),
        Address(_address(to, family), to_length, protocol, int.from_bytes(to_port, "big")),
    )


def _address(packed: bytes, family: int) -> IPAddress:
    return ip_address(packed if family == socket.AF_INET6 else packed[:4])


def _limit(limit: int) -> int:
    return 0 if limit == _INFINITY else limit


def _read_templates(data: bytes) -> Iterator[Template]:
    for fields in _TEMPLATE.iter_unpack(data[: len(data) // _TEMPLATE.size * _TEMPLATE.size]):
        destination, _, protocol, family, source, reqid, number, _, optional, _, _, _ = fields
        level = Level.USE if optional else Level.UNIQUE if reqid else Level.REQUIRE
        mode = _MODES_BACK.get(number, Mode.ANY)
        if mode == Mode.TUNNEL:
            ends = _address(source, family), _address(destination, family)
            yield Template(protocol, mode, *ends, reqid=reqid, level=level)
        else:
            yield Template(protocol, mode, reqid=reqid, level=level)
