"""What a person reads and writes: selectors, templates, policies, security associations, lifetimes.

Plain frozen values without a system of their own; the codec turns them into the bytes of an `Abi` and back.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import Any

from ._selector import AddressLike, IPAddress, IPInterface, PrefixLike, Selector
from .constants import (
    Action,
    Direction,
    Level,
    Mode,
    PolicyScope,
    SAFlag,
    SAProtocol,
    SAState,
)

__all__ = [
    "SA",
    "SA2",
    "Address",
    "AddressLike",
    "Algorithm",
    "IPAddress",
    "IPInterface",
    "Key",
    "Lifetime",
    "NATTraversal",
    "Policy",
    "PolicyExtension",
    "PrefixLike",
    "SPIRange",
    "SecurityAssociation",
    "Selector",
    "Template",
]


@dataclass(frozen=True, slots=True)
class Template:
    """One transform that a policy asks for: which protocol, in which mode, between whom, by which SAs.

    `source` and `destination` are the tunnel's end points, None in transport mode.  `reqid` ties the template to the
    SAs of the same reqid; `level` is UNIQUE when there is a reqid and REQUIRE
    otherwise, unless it is given; under any other level kernels forget the reqid.
    """

    protocol: SAProtocol | int = SAProtocol.ESP
    mode: Mode | int = Mode.TRANSPORT
    source: IPAddress | None = None
    destination: IPAddress | None = None
    reqid: int = 0
    level: Level | int = -1
    _packed: tuple[object, bytes] | None = field(default=None, init=False, repr=False, compare=False)
    """How it lies on the wire, as it was last worked out, and for which system."""
    _stored: Any = field(default=None, init=False, repr=False, compare=False)
    """What a kernel stores of it alone, as tracker.py last worked it out."""
    _stored_abi: Any = field(default=None, init=False, repr=False, compare=False)
    """For which system that was."""

    def __post_init__(self) -> None:
        if self.level < 0:
            object.__setattr__(self, "level", Level.UNIQUE if self.reqid else Level.REQUIRE)

    @classmethod
    def tunnel(
        cls,
        source: AddressLike,
        destination: AddressLike,
        *,
        reqid: int = 0,
        protocol: SAProtocol | int = SAProtocol.ESP,
        level: Level | None = None,
    ) -> Template:
        """Whole packets, between two gateways."""
        source, destination = ip_address(source), ip_address(destination)
        if source.version != destination.version:
            raise ValueError(f"the two ends of a tunnel have one address family, not {source} - {destination}")
        return cls(protocol, Mode.TUNNEL, source, destination, reqid, -1 if level is None else level)

    @classmethod
    def transport(
        cls, *, reqid: int = 0, protocol: SAProtocol | int = SAProtocol.ESP, level: Level | None = None
    ) -> Template:
        """The payload of packets between the two hosts themselves."""
        return cls(protocol, Mode.TRANSPORT, None, None, reqid, -1 if level is None else level)

    def reversed(self) -> Template:
        """The same transform for the packets of the other direction: the end points change sides."""
        return replace(self, source=self.destination, destination=self.source)

    def __str__(self) -> str:
        text = f"{_lower(SAProtocol, self.protocol)}/{_lower(Mode, self.mode)}"
        if self.source is not None:
            text += f"/{self.source}-{self.destination}"
        text += f"/{_lower(Level, self.level)}"
        return text + (f":{self.reqid}" if self.reqid else "")


def _lower(kind: type, number: int) -> str:
    try:
        return str(kind(number).name).lower()
    except ValueError:
        return str(int(number))


@dataclass(frozen=True, slots=True)
class Lifetime:
    """A limit, or how much of it is used (sadb_lifetime, RFC 2367 section 2.3.2); 0 is no limit.

    `allocations` counts packets in practice, `bytes` bytes.  As a limit `addtime` and `usetime` are seconds since
    creation and since first use (of a policy: since its last use); as a current value they are the wall-clock seconds
    of creation and of first use (of a policy, and on FreeBSD: last use).
    """

    allocations: int = 0
    bytes: int = 0
    addtime: int = 0
    usetime: int = 0


@dataclass(frozen=True, slots=True)
class Policy:
    """An entry of the SPD: what happens to the packets of a selector in one direction.

    A smaller `priority` is stronger.  `id` is the kernel's number for it, 0 where it has none yet.  `lifetime_current`
    is what the kernel reports; FreeBSD does so only for policies with a hard lifetime.
    """

    direction: Direction | int
    selector: Selector
    action: Action | int = Action.IPSEC
    templates: tuple[Template, ...] = ()
    priority: int = 0
    id: int = 0
    lifetime_hard: Lifetime | None = None
    lifetime_soft: Lifetime | None = None
    lifetime_current: Lifetime | None = None
    scope: PolicyScope | int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "templates", tuple(self.templates))

    def __str__(self) -> str:
        text = f"{_lower(Direction, self.direction)} {self.selector} {_lower(Action, self.action)}"
        return " ".join([text, *map(str, self.templates)])


@dataclass(frozen=True, slots=True)
class NATTraversal:
    """UDP encapsulation of an SA: `type` 2 is ESP in UDP (RFC 3948); ports are numbers."""

    source_port: int
    destination_port: int
    type: int = 2


@dataclass(frozen=True, slots=True)
class SecurityAssociation:
    """An entry of the SAD.

    Algorithms are the field's names ("aes-cbc", "hmac-sha2-256"), or numbers for what an Abi does not name; None is
    none.  Keys are bytes and never shown; an AES-GCM, AES-CTR or ChaCha20 key ends in its four bytes of salt.
    `replay_window` is in packets on every system.  `nat_traversal` asks for UDP encapsulation.  `proxy` is what Linux
    reports as the SA's selector.  `new_source` and `new_destination` move an SA on FreeBSD.
    """

    source: IPAddress
    destination: IPAddress
    spi: int
    protocol: SAProtocol | int = SAProtocol.ESP
    mode: Mode | int = Mode.ANY
    reqid: int = 0
    authentication: str | int | None = None
    authentication_key: bytes = field(default=b"", repr=False)
    encryption: str | int | None = None
    encryption_key: bytes = field(default=b"", repr=False)
    compression: str | int | None = None
    replay_window: int = 0
    state: SAState | int = SAState.MATURE
    flags: SAFlag | int = 0
    lifetime_hard: Lifetime | None = None
    lifetime_soft: Lifetime | None = None
    lifetime_current: Lifetime | None = None
    nat_traversal: NATTraversal | None = None
    sequence: int = 0
    proxy: IPInterface | None = None
    new_source: IPAddress | None = None
    new_destination: IPAddress | None = None

    def __post_init__(self) -> None:
        for name in ("source", "destination", "new_source", "new_destination"):
            value = getattr(self, name)
            if isinstance(value, (str, int)):
                object.__setattr__(self, name, ip_address(value))

    def __str__(self) -> str:
        return f"{_lower(SAProtocol, self.protocol)} {self.source} -> {self.destination} spi {self.spi:#010x}"


# What single extensions hold, for those who read or build messages themselves.


@dataclass(frozen=True, slots=True)
class SA:
    """SADB_EXT_SA.  `spi` is the number as people write it; `replay` is in the system's own unit."""

    spi: int
    replay: int = 0
    state: SAState | int = SAState.LARVAL
    auth: int = 0
    encrypt: int = 0
    flags: SAFlag | int = 0


@dataclass(frozen=True, slots=True)
class SA2:
    """SADB_X_EXT_SA2: mode, the last sequence number sent, and the reqid of an SA."""

    mode: Mode | int = Mode.ANY
    sequence: int = 0
    reqid: int = 0


@dataclass(frozen=True, slots=True)
class Address:
    """An address extension: one side of a selector or an SA's end point.  `protocol` is the number on the wire."""

    address: IPAddress
    prefixlen: int = -1
    protocol: int = 0
    port: int = 0
    scope_id: int = 0
    flowinfo: int = 0

    def __post_init__(self) -> None:
        if self.prefixlen < 0:
            object.__setattr__(self, "prefixlen", self.address.max_prefixlen)


@dataclass(frozen=True, slots=True)
class Key:
    """A key extension; its bytes never show in a repr."""

    data: bytes = field(repr=False)
    bits: int = -1

    def __post_init__(self) -> None:
        if self.bits < 0:
            object.__setattr__(self, "bits", 8 * len(self.data))


@dataclass(frozen=True, slots=True)
class SPIRange:
    """SADB_EXT_SPIRANGE: both ends belong to it."""

    minimum: int
    maximum: int


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One entry of SUPPORTED_AUTH or SUPPORTED_ENCRYPT: its number in this system, key lengths in bits."""

    id: int
    iv_length: int
    minimum_bits: int
    maximum_bits: int


@dataclass(frozen=True, slots=True)
class PolicyExtension:
    """SADB_X_EXT_POLICY with its requests (`templates`)."""

    action: Action | int
    direction: Direction | int
    id: int = 0
    priority: int = 0
    templates: tuple[Template, ...] = ()
    scope: PolicyScope | int = 0
