"""Policies and security associations <-> messages: what people write, in the extensions and units of a system."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from struct import Struct
from typing import Any, NamedTuple, cast

from . import _direct
from . import _record as layout
from ._selector import wire_identity
from ._values import lifetime_of, packed_request, policy_fields, templates_of
from .abi import Abi
from .codec import Message
from .constants import Direction, ExtensionType, MessageType, Mode, SAProtocol, SAType, UpperProtocol
from .errors import DecodeError, EncodeError, NotSupported
from .messages import (
    SA,
    SA2,
    Address,
    IPAddress,
    Key,
    Lifetime,
    NATTraversal,
    Policy,
    PolicyExtension,
    SecurityAssociation,
    Selector,
    Template,
)
from .tables import Messages

__all__ = [
    "PROTOCOL_OF",
    "SATYPE_OF",
    "PolicyRow",
    "Stored",
    "association_from",
    "association_message",
    "describe",
    "is_same_policy",
    "policy_from",
    "policy_message",
    "policy_rows",
    "selector_from",
    "stored_from",
    "templates_of",
]

SATYPE_OF = {
    SAProtocol.ESP: SAType.ESP,
    SAProtocol.AH: SAType.AH,
    SAProtocol.IPCOMP: SAType.IPCOMP,
    SAProtocol.TCPSIGNATURE: SAType.TCPSIGNATURE,
}
_SATYPES = {int(protocol): int(satype) for protocol, satype in SATYPE_OF.items()}
_ESP, _IPCOMP = int(SAType.ESP), int(SAType.IPCOMP)
PROTOCOL_OF = {satype: protocol for protocol, satype in SATYPE_OF.items()}
_WHOLE = (MessageType.ADD, MessageType.UPDATE)


# Policies.


def _scope_id(address: IPAddress | IPv4Interface | IPv6Interface) -> int:
    scope = getattr(address, "scope_id", None)
    if not scope:
        return 0
    if not scope.isdecimal():
        raise EncodeError(f"{address}: the wire has a number for the scope; give the interface's index, not its name")
    return int(scope)


def _sides(selector: Selector) -> tuple[Address, Address]:
    """The two addresses of a selector.

    The scope of a global address goes out too, when it is a number: FreeBSD stores it, and counts another selector.
    """
    _, _, _, _, _, protocol, *ports = selector.identity[:8]
    source, destination = (
        Address(side.ip, side.network.prefixlen, protocol, port, _scope_id(side) if counts or scope.isdecimal() else 0)
        for side, port, scope, counts in zip(
            (selector.source, selector.destination),
            ports,
            selector.scopes,
            selector.identity[8:] or (0, 0),
            strict=True,
        )
    )
    return source, destination


def policy_message(type: MessageType, policy: Policy, abi: Abi, *, with_templates: bool = True) -> Message:
    """The request `type` about a policy: POLICY, source, destination, and the lifetimes that are set.

    A priority is left out where `abi` has none.  Raises EncodeError for what the wire cannot carry.
    """
    templates = policy.templates if with_templates else ()
    requests = b"".join([packed_request(template, abi) for template in templates])
    return _direct.policy(type, policy, requests, abi) or _policy_message(type, policy, templates, abi)


def _policy_message(type: MessageType, policy: Policy, templates: tuple[Template, ...], abi: Abi) -> Message:
    """The general way, extension by extension."""
    selector = policy.selector
    source, destination = _sides(selector)
    extensions: dict[ExtensionType | int, Any] = {
        ExtensionType.POLICY: PolicyExtension(
            policy.action, policy.direction, policy.id, policy.priority, templates, policy.scope
        ),
        ExtensionType.ADDRESS_SRC: source,
        ExtensionType.ADDRESS_DST: destination,
    }
    if policy.lifetime_hard is not None:
        extensions[ExtensionType.LIFETIME_HARD] = policy.lifetime_hard
    if policy.lifetime_soft is not None:
        extensions[ExtensionType.LIFETIME_SOFT] = policy.lifetime_soft
    return Message(type, extensions, abi=abi)


def _interface(address: Address) -> IPv4Interface | IPv6Interface:
    text = str(address.address) + (f"%{address.scope_id}" if address.scope_id else "")
    return (
        ip_interface(f"{text}/{address.prefixlen}")
        if address.scope_id
        else ip_interface((address.address, address.prefixlen))
    )


def _bits(*kinds: ExtensionType) -> int:
    """What these extensions are in the presence bits of a record."""
    return sum(1 << layout.SLOTS[kind].number for kind in kinds)


_HARD, _SOFT, _CURRENT = ExtensionType.LIFETIME_HARD, ExtensionType.LIFETIME_SOFT, ExtensionType.LIFETIME_CURRENT
_SIDES = _bits(ExtensionType.ADDRESS_SRC, ExtensionType.ADDRESS_DST)
_POLICY_AND_SIDES = _bits(ExtensionType.POLICY) | _SIDES
_LIMIT = _bits(_HARD)
# Of an address: protocol, prefix length, port, IP version, scope, the address itself.
_ADDRESS = "BB2xHB5xI16s8x"
_TWO_ADDRESSES = Struct(f"={_ADDRESS}{_ADDRESS}")


def selector_from(message: Message) -> Selector | None:
    """The selector that a policy message names, None when it names none (an id alone) or it cannot be read."""
    if message._present & _SIDES != _SIDES:
        return None
    # Where the two sides differ, the destination's protocol is the one that counts (Linux 6.1).
    (
        _, source_bits, source_port, version, source_scope, source,
        protocol, destination_bits, destination_port, other, destination_scope, destination,
    ) = _TWO_ADDRESSES.unpack_from(message._record, layout.ADDRESS.offset)  # fmt: skip
    if version != other:
        return None
    return Selector.from_wire(
        version, source, source_bits, destination, destination_bits,
        protocol, source_port, destination_port, source_scope, destination_scope,
    )  # fmt: skip


_BOTH_SIDES = slice(layout.ADDRESS.offset, layout.ADDRESS.offset + 2 * layout.ADDRESS.size)
_DIRECTION_AT = layout.COLUMNS["direction"].offset


def is_same_policy(one: Message, other: Message) -> bool:
    """Whether both name a policy of the same direction and selector, to the last bit.

    Nothing is made of the messages for it.  They may mean the same although it is False: in other words, or by an id.
    """
    mine, others = one._record, other._record
    return (
        mine[_BOTH_SIDES] == others[_BOTH_SIDES]
        and mine[_DIRECTION_AT] == others[_DIRECTION_AT]
        and one._present & other._present & _POLICY_AND_SIDES == _POLICY_AND_SIDES
    )


def policy_from(message: Message) -> Policy:
    """The policy of a reply, of a part of a dump, or of an event.

    Raises DecodeError when the message names no policy with a selector.
    """
    present, selector = message._present, selector_from(message)
    if present & _POLICY_AND_SIDES != _POLICY_AND_SIDES or selector is None:
        raise DecodeError(f"{message!r} holds no policy with a selector")
    action, direction, scope, number, priority, templates = policy_fields(message._record, message._data, message.abi)
    return Policy(
        direction,
        selector,
        action,
        templates,
        priority,
        number,
        _lifetime(message, _HARD),
        _lifetime(message, _SOFT),
        _lifetime(message, _CURRENT),
        scope,
    )


def _lifetime(message: Message, kind: ExtensionType) -> Lifetime | None:
    slot = layout.SLOTS[kind]
    return (
        lifetime_of(layout.LIFETIME.part(message._record, slot.which)) if message._present >> slot.number & 1 else None
    )


class Stored(NamedTuple):
    """What an answer says that the kernel stores, in plain numbers: as in a PolicyRow."""

    id: int
    action: int
    priority: int
    requests: bytes


def stored_from(message: Message) -> Stored:
    """What the policy of a message is, and nothing made of it; DecodeError when it holds none."""
    if not message._has(ExtensionType.POLICY):
        raise DecodeError(f"{message!r} holds no policy")
    action, _, _, number, priority, offset, length = cast("tuple[int, ...]", layout.POLICY.read(message._record))
    requests = message._data[offset : offset + length]
    return Stored(number, action, priority if message.abi.has_priority else 0, requests)


class PolicyRow(NamedTuple):
    """What tells one policy of a dump from what it should be, in plain numbers: see `policy_from` for the whole."""

    direction: int
    identity: tuple[int, ...]
    """`Selector.identity`."""
    is_plain: bool
    """`Selector.is_plain`: no host bits beyond the prefixes, and no scope."""
    id: int
    action: int
    priority: int
    requests: bytes
    """The templates as they are on the wire: equal ones mean the same; `templates_of(requests, abi)` reads them."""
    lifetime_hard: Lifetime | None
    scope: int
    """Policy.scope: 0 where the system has none."""


_ROW = Struct(
    f"={layout.COUNTS.offset}xI{layout.LIFETIME.offset + layout.LIFETIME.size - layout.COUNTS.offset - 4}x"
    f"{layout.LIFETIME.size}s{layout.LIFETIME.size}x{_ADDRESS}{_ADDRESS}"
    f"{layout.POLICY.offset - layout.ADDRESS.offset - 2 * layout.ADDRESS.size}x"
    f"{layout.POLICY.fields}{layout.SIZE - layout.POLICY.offset - layout.POLICY.size}x"
)


def policy_rows(messages: Messages) -> Iterator[PolicyRow]:
    """A row for each policy of a dump, in its order, at a fraction of the cost of a Policy.

    Raises DecodeError, as `policy_from` does, at a message that names no policy with a selector.
    """
    make, number = partial(tuple.__new__, PolicyRow), int.from_bytes
    has_scope, has_priority = messages.abi.has_scope, messages.abi.has_priority
    for index, ((arena, start), fields) in enumerate(zip(messages.extents(), messages.unpack(_ROW), strict=True)):
        (
            present, limit,
            _, source_bits, source_port, version, source_scope, packed_source,
            protocol, destination_bits, destination_port, other, destination_scope, packed_destination,
            action, direction, scope, policy_id, priority, offset, length,
        ) = fields  # fmt: skip
        if present & _POLICY_AND_SIDES != _POLICY_AND_SIDES or version != other:
            policy_from(messages[index])  # says what is wrong
        source, destination = number(packed_source, "big"), number(packed_destination, "big")
        if version == 4:
            source >>= 96
            destination >>= 96
        identity = wire_identity(
            version, source, source_bits, destination, destination_bits,
            protocol, source_port, destination_port, source_scope, destination_scope,
        )  # fmt: skip
        first = start + offset
        yield make((
            direction,
            identity,
            source == identity[1] and destination == identity[3] and not (source_scope or destination_scope),
            policy_id,
            action,
            priority if has_priority else 0,
            bytes(arena[first : first + length]),
            lifetime_of(limit) if present & _LIMIT else None,
            scope if has_scope else 0,
        ))  # fmt: skip


# Security associations.


def _algorithm(value: str | int | None, numbers: Mapping[str, int], what: str, abi: Abi) -> int:
    if value is None:
        return 0
    found = numbers.get(value)  # type: ignore[arg-type]
    if found is not None:
        return found
    if isinstance(value, int):
        return value
    if value.lower() not in numbers:
        raise NotSupported(f"{abi} has no {what} algorithm {value!r} in PF_KEY; it has {', '.join(numbers)}")
    return numbers[value.lower()]


def _replay(window: int, abi: Abi) -> tuple[int, int | None]:
    """sadb_sa_replay in the system's unit, and the packets for SA_REPLAY where that is too small."""
    if window > abi.maximum_replay_window:
        raise NotSupported(
            f"a replay window of {window} packets: {abi} has at most {abi.maximum_replay_window} in PF_KEY"
        )
    if not abi.replay_in_bytes:
        return window, None
    octets = (window + 7) // 8
    return min(octets, 255), window if octets > 255 else None


def _end(address: IPAddress) -> Address:
    return Address(address, address.max_prefixlen, UpperProtocol.ANY, 0, _scope_id(address))


def association_message(type: MessageType, sa: SecurityAssociation, abi: Abi) -> Message:
    """The request `type` about an SA: all of it for ADD and UPDATE, SPI and end points for every other.

    A lifetime given without the other gets one without limits: every kernel wants both or neither.  Raises NotSupported
    for an algorithm or a replay window that `abi` does not have, EncodeError for what the wire cannot carry.
    """
    satype = _SATYPES.get(sa.protocol + 0)  # as a plain number: the hash of an enum's member is slow
    if satype is None:
        raise NotSupported(f"protocol {sa.protocol} has no SAs; {', '.join(known.name for known in SATYPE_OF)} have")
    if type not in _WHOLE:
        extensions = {ExtensionType.SA: SA(sa.spi, state=sa.state)} | _ends(sa)
        return Message(type, extensions, abi=abi, satype=satype)
    numbers = _numbers(sa, satype, abi)
    return _direct.association(type, sa, numbers, abi) or _association_message(type, sa, numbers, abi)


def _ends(sa: SecurityAssociation) -> dict[ExtensionType | int, Any]:
    return {ExtensionType.ADDRESS_SRC: _end(sa.source), ExtensionType.ADDRESS_DST: _end(sa.destination)}


def _numbers(sa: SecurityAssociation, satype: int, abi: Abi) -> _direct.Numbers:
    """What the SA is in the numbers and units of a system."""
    if abi.replay_in_bytes or sa.replay_window > abi.maximum_replay_window:
        replay, packets = _replay(sa.replay_window, abi)
    else:
        replay, packets = sa.replay_window, None
    if satype == _IPCOMP:
        auth, encrypt = 0, _algorithm(sa.compression, abi.compression, "compression", abi)
    else:
        auth = _algorithm(sa.authentication, abi.authentication, "authentication", abi)
        encrypt = _algorithm(sa.encryption, abi.encryption, "encryption", abi)
    # ESP without a key is ESP with the null cipher: kernels want the key extension all the same.
    with_key = satype == _ESP and sa.encryption is not None
    mode = sa.mode
    return satype, replay, packets, auth, encrypt, mode & 0xFF if isinstance(mode, Mode) else mode, with_key


def _association_message(type: MessageType, sa: SecurityAssociation, numbers: _direct.Numbers, abi: Abi) -> Message:
    """The general way, extension by extension."""
    satype, replay, packets, auth, encrypt, _, with_key = numbers
    extensions: dict[ExtensionType | int, Any] = {
        ExtensionType.SA: SA(sa.spi, replay, sa.state, auth, encrypt, sa.flags)
    }
    if packets is not None:
        extensions[ExtensionType.SA_REPLAY] = packets
    extensions |= {ExtensionType.SA2: SA2(sa.mode, 0, sa.reqid)} | _ends(sa)
    if sa.lifetime_hard is not None or sa.lifetime_soft is not None:
        extensions[ExtensionType.LIFETIME_SOFT] = sa.lifetime_soft or Lifetime()
        extensions[ExtensionType.LIFETIME_HARD] = sa.lifetime_hard or Lifetime()
    if sa.encryption_key or with_key:
        extensions[ExtensionType.KEY_ENCRYPT] = Key(sa.encryption_key)
    if sa.authentication_key:
        extensions[ExtensionType.KEY_AUTH] = Key(sa.authentication_key)
    if sa.nat_traversal is not None:
        extensions[ExtensionType.NAT_T_TYPE] = sa.nat_traversal.type
        extensions[ExtensionType.NAT_T_SPORT] = sa.nat_traversal.source_port
        extensions[ExtensionType.NAT_T_DPORT] = sa.nat_traversal.destination_port
    for kind, address in (
        (ExtensionType.NEW_ADDRESS_SRC, sa.new_source),
        (ExtensionType.NEW_ADDRESS_DST, sa.new_destination),
    ):
        if address is not None:
            extensions[kind] = _end(address)
    if sa.proxy is not None:
        bits, scope = sa.proxy.network.prefixlen, _scope_id(sa.proxy)
        extensions[ExtensionType.ADDRESS_PROXY] = Address(sa.proxy.ip, bits, UpperProtocol.ANY, 0, scope)
    return Message(type, extensions, abi=abi, satype=satype)


def _name(number: int, names: Mapping[int, str]) -> str | int | None:
    return names.get(number, number) if number else None


def association_from(message: Message) -> SecurityAssociation:
    """The SA of a reply, of a part of a dump, or of an event.

    Raises DecodeError when the message names no SA with its end points.
    """
    sa, source, destination = message.sa, message.source, message.destination
    if not isinstance(sa, SA) or not isinstance(source, Address) or not isinstance(destination, Address):
        raise DecodeError(f"{message!r} holds no SA with its end points")
    abi, get = message.abi, message.get
    protocol = PROTOCOL_OF.get(message.satype, int(message.satype))  # type: ignore[call-overload]
    compressed = protocol == SAProtocol.IPCOMP
    sa2: SA2 = get(ExtensionType.SA2) or SA2()
    packets = get(ExtensionType.SA_REPLAY)
    nat_t = get(ExtensionType.NAT_T_TYPE)
    proxy = get(ExtensionType.ADDRESS_PROXY)
    return SecurityAssociation(
        source.address,
        destination.address,
        sa.spi,
        protocol,
        sa2.mode,
        sa2.reqid,
        authentication=None if compressed else _name(sa.auth, abi.authentication_names),
        authentication_key=_key(message, ExtensionType.KEY_AUTH),
        encryption=None if compressed else _name(sa.encrypt, abi.encryption_names),
        encryption_key=_key(message, ExtensionType.KEY_ENCRYPT),
        compression=_name(sa.encrypt, abi.compression_names) if compressed else None,
        replay_window=packets if packets is not None else sa.replay * (8 if abi.replay_in_bytes else 1),
        state=sa.state,
        flags=sa.flags,
        lifetime_hard=_lifetime(message, ExtensionType.LIFETIME_HARD),
        lifetime_soft=_lifetime(message, ExtensionType.LIFETIME_SOFT),
        lifetime_current=_lifetime(message, ExtensionType.LIFETIME_CURRENT),
        nat_traversal=NATTraversal(get(ExtensionType.NAT_T_SPORT) or 0, get(ExtensionType.NAT_T_DPORT) or 0, nat_t)
        if nat_t
        else None,
        sequence=sa2.sequence,
        proxy=_interface(proxy) if isinstance(proxy, Address) else None,
        new_source=_address(message, ExtensionType.NEW_ADDRESS_SRC),
        new_destination=_address(message, ExtensionType.NEW_ADDRESS_DST),
    )


def _key(message: Message, kind: ExtensionType) -> bytes:
    value = message.get(kind)
    return value.data if isinstance(value, Key) else b""


def _address(message: Message, kind: ExtensionType) -> IPAddress | None:
    value = message.get(kind)
    return value.address if isinstance(value, Address) else None


# Words.


def describe(message: Message) -> str:
    """What a message does to what, in one line: "SPDUPDATE of out 10.1.0.0/16 -> 10.2.0.0/16"."""
    kind = message.type
    name = kind.name if isinstance(kind, MessageType) else f"message type {kind}"
    policy, selector = message.policy, selector_from(message)
    if policy is not None:
        direction = policy.direction.name.lower() if isinstance(policy.direction, Direction) else policy.direction
        return f"{name} of {direction} {selector}" if selector else f"{name} of policy {policy.id}"
    if message.satype:
        satype = message.satype.name.lower() if isinstance(message.satype, SAType) else f"SA type {message.satype}"
        name += f" of {satype}"
        if isinstance(message.source, Address) and isinstance(message.destination, Address):
            name += f" {message.source.address} -> {message.destination.address}"
        if message.spi is not None:
            name += f" spi {message.spi:#010x}"
    return name
