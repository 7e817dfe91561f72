"""Common SAs and policies straight into a record: what typed.py says extension by extension, in one step.

Both ways give the same bytes, and a test holds them to it.  What is rare (an SA that moves, a proxy, flags that a
system numbers in its own way) and what does not fit its field is left to the general way, which has words for it.
"""

from __future__ import annotations

import struct

from . import _record as layout
from .abi import Abi
from .codec import Message, made
from .constants import PF_KEY_V2
from .constants import ExtensionType as X
from .messages import Lifetime, Policy, SecurityAssociation

__all__ = ["Numbers", "association", "policy"]

_Plan = tuple[bytes, bytes, int, Abi]
"""What all records of one shape have in common: their first 128 bytes, the headers of their extensions and how long
those are, the system.
"""

_plans: dict[tuple[int, ...], _Plan] = {}


def _plan(key: tuple[int, ...], abi: Abi, kinds: tuple[X, ...]) -> _Plan:
    """Make the plan for a key: message type, SA type, the id of `abi` (which is kept beside it) and the shape."""
    record = bytearray(layout.SIZE)
    layout.HEADER.write(record, 0, PF_KEY_V2, key[0] & 0xFF, 0, key[1], 0, 0, 0, 0)
    present = sum(1 << layout.SLOTS[kind].number for kind in kinds)
    layout.COUNTS.write(record, 0, present, len(kinds), 0)
    unused = [0] * (layout.MAXIMUM_EXTENSIONS - len(kinds))
    layout.OFFSETS.write(record, 0, *range(len(kinds)), *unused)
    layout.VALID.write(record, 0, (1 << len(kinds)) - 1)
    numbers = (abi.extension_numbers[kind].to_bytes(2, abi.byteorder) for kind in kinds)
    blob = b"".join(bytes(2) + number + bytes(4) for number in numbers)
    if len(_plans) > 4096:
        _plans.clear()
    plan = _plans[key] = bytes(record[: layout.LIFETIME.offset]), blob, len(blob), abi
    return plan


_LIFETIME, _ADDRESS = "3QI4x", "BB2xHBxII16s8x"
_END = "16s16s8x"  # what is before an address, which is the same for all without a port, and the address
_USUAL = f"=128s32x{_LIFETIME * 2}{_END * 2}H2xIIH2xII24xI4BIB7xI"
_ASSOCIATION = struct.Struct(f"{_USUAL}{layout.SIZE - struct.calcsize(_USUAL)}x")
_RARER_ASSOCIATION = struct.Struct(f"{_USUAL}12xB3xH2xH2x20xI8x")  # NAT-T, and a window in SA_REPLAY
_BEFORE = {version: struct.pack("=BB4xB9x", 255, bits, version) for version, bits in ((4, 32), (6, 128))}
_POLICY = struct.Struct(f"=128s32x{_LIFETIME * 2}{_ADDRESS * 2}96xHBBIIII12x")
assert _ASSOCIATION.size == _RARER_ASSOCIATION.size == _POLICY.size == layout.SIZE
_NO_LIMIT = Lifetime()


Numbers = tuple[int, int, int | None, int, int, int, bool]
"""What an SA is in numbers of a system, as typed.py works it out.

SA type, replay window in sadb_sa, packets for SA_REPLAY or None, authentication, encryption or compression, mode, and
whether KEY_ENCRYPT is there even when the key is empty.
"""


def _kinds(shape: int) -> tuple[X, ...]:
    """The extensions of an SA, in order; the bits of `shape` say which of those that may be missing are there."""
    parts: tuple[tuple[int, tuple[X, ...]], ...] = (
        (0, (X.SA,)),
        (1, (X.SA_REPLAY,)),
        (0, (X.SA2, X.ADDRESS_SRC, X.ADDRESS_DST)),
        (2, (X.LIFETIME_SOFT, X.LIFETIME_HARD)),
        (4, (X.KEY_ENCRYPT,)),
        (8, (X.KEY_AUTH,)),
        (16, (X.NAT_T_TYPE, X.NAT_T_SPORT, X.NAT_T_DPORT)),
    )
    return tuple(kind for bit, kinds in parts if not bit or shape & bit for kind in kinds)


def association(type: int, sa: SecurityAssociation, numbers: Numbers, abi: Abi) -> Message | None:
    """An ADD or an UPDATE; None when it takes the general way."""
    satype, replay, packets, auth, encrypt, mode, with_key = numbers
    if sa.proxy is not None or sa.new_source is not None or sa.new_destination is not None or abi.flags:
        return None
    soft, hard, nat = sa.lifetime_soft, sa.lifetime_hard, sa.nat_traversal
    encryption_key, authentication_key = sa.encryption_key, sa.authentication_key
    source, destination = sa.source.packed, sa.destination.packed
    shape = 0 if packets is None else 1
    if soft is not None or hard is not None:
        shape |= 2
        soft, hard = soft or _NO_LIMIT, hard or _NO_LIMIT
    else:
        soft = hard = _NO_LIMIT
    if encryption_key or with_key:
        shape |= 4
    if authentication_key:
        shape |= 8
    if nat is not None:
        shape |= 16
    length = len(source)
    if length != len(destination):
        return None
    if length == 4:
        before = _BEFORE[4]
    elif sa.source.scope_id or sa.destination.scope_id:  # type: ignore[union-attr]
        return None
    else:
        before = _BEFORE[6]
    key = (type + 0, satype, id(abi), shape)  # an enum's hash is slow
    try:
        head, blob, at, _ = _plans[key]
    except KeyError:
        head, blob, at, _ = _plan(key, abi, _kinds(shape))
    size, more = len(encryption_key), len(authentication_key)
    try:
        fields = (
            head,
            hard.bytes, hard.addtime, hard.usetime, hard.allocations,
            soft.bytes, soft.addtime, soft.usetime, soft.allocations,
            before, source, before, destination,
            8 * more, at + size if more else 0, more,
            8 * size, at if shape & 4 else 0, size,
            sa.spi, replay, sa.state, auth, encrypt, sa.flags,
            mode, sa.reqid,
        )  # fmt: skip
        if not shape & 17:
            record = _ASSOCIATION.pack(*fields)
        elif nat is None:
            record = _RARER_ASSOCIATION.pack(*fields, 0, 0, 0, packets)
        else:
            record = _RARER_ASSOCIATION.pack(*fields, nat.type, nat.source_port, nat.destination_port, packets or 0)
    except struct.error:
        return None
    return made(abi, record, blob + encryption_key + authentication_key)


_POLICY_KINDS = (X.POLICY, X.ADDRESS_SRC, X.ADDRESS_DST)


def policy(type: int, value: Policy, requests: bytes, abi: Abi) -> Message | None:
    """A message about a policy; None when it takes the general way."""
    selector = value.selector
    identity = selector.identity
    if selector._scopes is not None:  # a global address has one only as a guard, and FreeBSD stores it
        return None
    version, _, source_bits, _, destination_bits, protocol, source_port, destination_port = identity
    source, destination = selector.packed
    soft, hard = value.lifetime_soft, value.lifetime_hard
    key = (type + 0, 0, id(abi), -1 - (hard is not None) - 2 * (soft is not None))
    try:
        head, blob, at, _ = _plans[key]
    except KeyError:
        limits = [X.LIFETIME_HARD] if hard is not None else []
        limits += [X.LIFETIME_SOFT] if soft is not None else []
        head, blob, at, _ = _plan(key, abi, (*_POLICY_KINDS, *limits))
    soft, hard = soft or _NO_LIMIT, hard or _NO_LIMIT
    try:
        record = _POLICY.pack(
            head,
            hard.bytes, hard.addtime, hard.usetime, hard.allocations,
            soft.bytes, soft.addtime, soft.usetime, soft.allocations,
            protocol, source_bits, source_port, version, 0, 0, source,
            protocol, destination_bits, destination_port, version, 0, 0, destination,
            value.action, value.direction, value.scope if abi.has_scope else 0,
            value.id, value.priority if abi.has_priority else 0, at, len(requests),
        )  # fmt: skip
    except struct.error:
        return None
    return made(abi, record, blob + requests)
