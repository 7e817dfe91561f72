"""What stands in for a policy while it is replaced: alias clones and discard guards, and the tags that tell them.

An alias clone holds the new policy under a selector of the same packets that the kernel counts as another one: an
ignored host bit is set.  Kernels that look policies up in order of priority find it whenever the real one is missing.
Measured on FreeBSD 12.1 and 11 and on Linux 6.18: no packet in clear in 10,000 changes, where bare updates leaked.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from enum import Enum, IntEnum
from ipaddress import IPv4Interface, IPv6Interface, ip_address, ip_interface
from typing import NamedTuple

from .abi import Abi
from .constants import Action
from .messages import IPInterface, Lifetime, Policy, Selector
from .tracker import Image

__all__ = [
    "Guard",
    "Kind",
    "Tag",
    "alias_selectors",
    "discard_selectors",
    "filler_policies",
    "guard_policies",
    "is_filler",
    "owner_number",
    "read_tag",
    "real_selector",
    "tag_lifetime",
    "tag_of",
]


class Guard(Enum):
    """How an update is guarded: see `PolicyTracker`."""

    AUTO = "auto"
    """What the kernel needs: an alias clone where there is one, else a discard guard; none where updates are safe."""
    ALIAS = "alias"
    """An alias clone at every update; a discard guard where no alias exists."""
    DISCARD = "discard"
    """A discard guard at every update that needs a guard: drops packets for a moment."""
    BARE = "bare"
    """Never: the kernel's own window stays open."""


# Tags.


class Kind(IntEnum):
    """What a tagged entry of the SPD is."""

    POLICY = 1
    ALIAS = 2
    DISCARD = 3
    """Drops the packets of two hosts, and of a neighbour: one bit wider."""
    FILLER = 4
    BLOCK = 5
    """Drops the packets of exactly its policy: under an alias selector."""


class Tag(NamedTuple):
    """Whose an entry is, as a number of 28 bits, and what for."""

    owner: int
    kind: Kind


# As a lifetime in seconds it is never reached, on kernels whose `long` has 32 bits neither: the lower half alone is 68
# years.  The upper half holds the owner, and keeps the whole below 2^63.
_MAGIC = 0x7FFF5F00
_OWNERS = 0x0FFFFFFF


def owner_number(name: str) -> int:
    """A name as tags carry it: 28 bits of its CRC-32, never 0."""
    return (zlib.crc32(name.encode()) & _OWNERS) or 1


def tag_lifetime(owner: int, kind: Kind, abi: Abi) -> Lifetime:
    """The hard lifetime that marks a policy."""
    number = (0x70000000 | owner) << 32 | _MAGIC | kind
    if abi.tag_in == "bytes":
        return Lifetime(bytes=number)
    return Lifetime(addtime=number)


def read_tag(lifetime: Lifetime | None, abi: Abi) -> Tag | None:
    """The tag in a hard lifetime, None when there is none."""
    if lifetime is None:
        return None
    return tag_of(lifetime.bytes if abi.tag_in == "bytes" else lifetime.addtime)


def tag_of(number: int) -> Tag | None:
    """The tag in the one number of a hard lifetime that holds it."""
    if number >> 60 != 7 or number & 0xFFFFFF00 != _MAGIC or number & 0xFF not in Kind._value2member_map_:
        return None
    return Tag(number >> 32 & _OWNERS, Kind(number & 0xFF))


# Selectors of guards.


def alias_selectors(selector: Selector, abi: Abi) -> Iterator[Selector]:
    """Selectors of exactly the same packets that the kernel counts as others, the first choice first.

    None for two IPv4 hosts, nor for two IPv6 hosts where the kernel forgets scopes or an address is link-local.
    """
    source, destination = selector.source, selector.destination
    width = source.max_prefixlen
    source_bits = width - source.network.prefixlen
    destination_bits = width - destination.network.prefixlen
    for number in (1, 2, 3):
        if number >> destination_bits == 0:
            yield _moved(selector, 0, number)
        if number >> source_bits == 0:
            yield _moved(selector, number, 0)
    hosts = not source_bits and not destination_bits
    # A scope is a wildcard to packets of a global address, which carry none (FreeBSD, NetBSD, macOS).
    if hosts and abi.stores_scope and source.version == 6 and not (_has_zone(source) or _has_zone(destination)):
        for scope in ("1", "2", "3"):
            yield _with(selector, source, ip_interface(f"{ip_address(destination.packed)}%{scope}/128"))


def _has_zone(side: IPInterface) -> bool:
    """Whether packets of such an address carry the scope of their link: unicast and multicast of a link or interface.

    RFC 4291 section 2.7: the scope of a multicast address is the lower half of its second byte.
    """
    return side.is_link_local or (side.is_multicast and side.packed[1] & 0x0F <= 2)


def discard_selectors(selector: Selector) -> Iterator[Selector]:
    """For two hosts: selectors one bit wider, which catch the packets of a neighbour address too."""
    source, destination = selector.source, selector.destination
    wider = source.max_prefixlen - 1
    if destination.network.prefixlen > wider:
        yield _with(selector, source, _side(destination, wider))
    if source.network.prefixlen > wider:
        yield _with(selector, _side(source, wider), destination)


def filler_selector() -> Selector:
    """A selector that no packet has."""
    return Selector("0.0.0.0/32", "0.0.0.0/32", protocol=253)


def is_filler(selector: Selector) -> bool:
    """Whether it is that one."""
    return selector.identity == filler_selector().identity


def real_selector(selector: Selector, kind: Kind) -> Selector:
    """The selector of the policy that a guard with this one stands in for."""
    if kind is not Kind.DISCARD:
        return _without_scopes(selector).canonical()
    return _with(selector, *(_side(side, side.max_prefixlen) for side in (selector.source, selector.destination)))


def _moved(selector: Selector, source: int, destination: int) -> Selector:
    """The same networks, with these host parts."""
    sides = []
    for side, host in ((selector.source, source), (selector.destination, destination)):
        sides.append(_side(side, side.network.prefixlen, host) if host else side)
    return _with(selector, *sides)


def _side(side: IPv4Interface | IPv6Interface, bits: int, host: int | None = None) -> IPv4Interface | IPv6Interface:
    """The same address, or this host of its network, with a prefix of so many bits.  A scope stays."""
    address = ip_address(side.packed) if host is None else side.network.network_address + host
    scope = getattr(side, "scope_id", None)
    return ip_interface(f"{address}%{scope}/{bits}") if scope else ip_interface((address, bits))


def _with(selector: Selector, source: object, destination: object) -> Selector:
    return Selector(
        source,  # type: ignore[arg-type]
        destination,  # type: ignore[arg-type]
        protocol=selector.protocol,
        source_port=selector.source_port,
        destination_port=selector.destination_port,
        icmp_type=selector.icmp_type,
        icmp_code=selector.icmp_code,
    )


def _without_scopes(selector: Selector) -> Selector:
    """A scope on a global address is a guard's, and no part of what it matches."""
    sides = []
    for side in (selector.source, selector.destination):
        scoped = getattr(side, "scope_id", None) and not _has_zone(side)
        sides.append(ip_interface((side.packed, side.network.prefixlen)) if scoped else side)
    return _with(selector, *sides)


# Which guard.


def guard_policies(policy: Policy, before: Image | None, abi: Abi, how: Guard, owner: int) -> tuple[Policy, ...]:
    """The candidates for the guard of an update from `before` to `policy`.

    Its priority is the weaker of the two: wherever the real policy is missing, a packet meets what it would have met
    before the update or after it, never a policy between.
    """
    priority = max(policy.priority, before.priority) if before is not None else policy.priority
    aliases = tuple(alias_selectors(policy.selector, abi))
    if aliases and how is not Guard.DISCARD:
        tag = tag_lifetime(owner, Kind.ALIAS, abi)
        return tuple(
            Policy(policy.direction, one, policy.action, policy.templates, priority=priority, lifetime_hard=tag)
            for one in aliases
        )
    tag = tag_lifetime(owner, Kind.BLOCK if aliases else Kind.DISCARD, abi)
    selectors = aliases or tuple(discard_selectors(policy.selector))
    return tuple(
        Policy(policy.direction, one, Action.DISCARD, priority=priority, lifetime_hard=tag) for one in selectors
    )


def filler_policies(policy: Policy, abi: Abi, owner: int) -> tuple[Policy, ...]:
    """A policy for no packet at all: enough where a direction must not be empty for a moment (FreeBSD 14)."""
    tag = tag_lifetime(owner, Kind.FILLER, abi)
    return (Policy(policy.direction, filler_selector(), Action.DISCARD, priority=0xFFFFFFFF, lifetime_hard=tag),)
