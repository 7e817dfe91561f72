"""What a person reads and writes: selectors, templates, policies, security associations, lifetimes.

Plain frozen values without a system of their own; the codec turns them into the bytes of an `Abi` and back.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_interface,
)

from .constants import (
    Action,
    Direction,
    Level,
    Mode,
    PolicyScope,
    SAFlag,
    SAProtocol,
    SAState,
    UpperProtocol,
)

__all__ = [
    "SA",
    "SA2",
    "Address",
    "Algorithm",
    "IPAddress",
    "Key",
    "Lifetime",
    "NATTraversal",
    "Policy",
    "PolicyExtension",
    "SPIRange",
    "SecurityAssociation",
    "Selector",
    "Template",
]

IPAddress = IPv4Address | IPv6Address
IPInterface = IPv4Interface | IPv6Interface
AddressLike = str | int | bytes | IPAddress
PrefixLike = AddressLike | IPInterface | IPv4Network | IPv6Network

_PROTOCOL_NAMES = {"any": None, "icmp": 1, "tcp": 6, "udp": 17, "gre": 47, "icmp6": 58, "ipv6-icmp": 58, "sctp": 132}
_PROTOCOL_TEXT = {1: "icmp", 6: "tcp", 17: "udp", 47: "gre", 58: "icmp6", 132: "sctp"}


def _interface(value: PrefixLike) -> IPInterface:
    if isinstance(value, (IPv4Network, IPv6Network)):
        return ip_interface((value.network_address, value.prefixlen))
    return ip_interface(value)


def _scope(interface: IPInterface) -> str:
    """The scope of a link-local address; that of any other address means nothing."""
    return getattr(interface, "scope_id", None) or "" if interface.is_link_local else ""


def _masked(interface: IPInterface) -> IPInterface:
    network, scope = interface.network, _scope(interface)
    address = ip_address(network.network_address.packed)
    return ip_interface(f"{address}%{scope}/{network.prefixlen}" if scope else (address, network.prefixlen))


def _protocol(value: int | str | None) -> int | None:
    """255, 0 and "any" are None: any protocol."""
    if isinstance(value, str):
        if value.lower() in _PROTOCOL_NAMES:
            return _PROTOCOL_NAMES[value.lower()]
        if not value.isdecimal():
            raise ValueError(f"unknown protocol {value!r}; give its number, or one of {', '.join(_PROTOCOL_NAMES)}")
        value = int(value)
    if value is None or value in (0, UpperProtocol.ANY):
        return None
    if not 0 < value < 256:
        raise ValueError(f"a protocol is a number from 0 to 255, not {value}")
    return int(value)


def _port(value: int, what: str) -> int:
    if not 0 <= value <= 0xFFFF:
        raise ValueError(f"a {what} is a number from 0 to 65535, not {value}")
    return value


@dataclass(frozen=True, slots=True, init=False, repr=False)
class Selector:
    """Which packets a policy is for: two prefixes of one family, an upper-layer protocol, ports or ICMP type and code.

    `source` and `destination` take a prefix in any form of `ipaddress`; the host bits they are given are kept, because
    kernels keep them and count 10.1.2.3/16 and 10.1.0.0/16 as two selectors.  `protocol` is a number or a name, None
    for any.  A port of 0 means any port.  For ICMP and ICMPv6 give `icmp_type` and `icmp_code` instead of ports (the
    wire carries them in the two ports, so that a 0 there means any).
    """

    source: IPInterface
    destination: IPInterface
    protocol: int | None
    source_port: int
    destination_port: int
    icmp_type: int | None
    icmp_code: int | None
    _identity: tuple[int, ...] = field(repr=False, compare=False)

    def __init__(
        self,
        source: PrefixLike,
        destination: PrefixLike,
        *,
        protocol: int | str | None = None,
        source_port: int = 0,
        destination_port: int = 0,
        icmp_type: int | None = None,
        icmp_code: int | None = None,
    ) -> None:
        source, destination = _interface(source), _interface(destination)
        if source.version != destination.version:
            raise ValueError(f"a selector has one address family, not {source} -> {destination}")
        protocol = _protocol(protocol)
        if icmp_type is not None or icmp_code is not None:
            if protocol not in (UpperProtocol.ICMP, UpperProtocol.ICMPV6):
                raise ValueError("an ICMP type or code needs protocol icmp or icmp6")
            if source_port or destination_port:
                raise ValueError("a selector has ports or an ICMP type and code, not both")
            for value, what in ((icmp_type, "type"), (icmp_code, "code")):
                if value is not None and not 0 <= value <= 255:
                    raise ValueError(f"an ICMP {what} is a number from 0 to 255, not {value}")
        give = object.__setattr__
        give(self, "source", source)
        give(self, "destination", destination)
        give(self, "protocol", protocol)
        give(self, "source_port", _port(source_port, "source port"))
        give(self, "destination_port", _port(destination_port, "destination port"))
        give(self, "icmp_type", icmp_type)
        give(self, "icmp_code", icmp_code)
        give(self, "_identity", self._make_identity())

    def _make_identity(self) -> tuple[int, ...]:
        source, destination = self.source.network, self.destination.network
        scopes = (_scope(self.source), _scope(self.destination))
        return (
            source.version,
            int(source.network_address),
            source.prefixlen,
            int(destination.network_address),
            destination.prefixlen,
            UpperProtocol.ANY.value if self.protocol is None else self.protocol,
            *self.wire_ports,
            *map(hash, scopes if any(scopes) else ()),
        )

    @property
    def wire_ports(self) -> tuple[int, int]:
        """What the two port fields on the wire hold: the ports, or ICMP type and code; 0 means any."""
        if self.icmp_type is not None or self.icmp_code is not None:
            return self.icmp_type or 0, self.icmp_code or 0
        return self.source_port, self.destination_port

    @property
    def identity(self) -> tuple[int, ...]:
        """What two selectors have in common when they match the same packets: cheap to hash and to compare.

        (IP version, source network, its prefix length, destination network, its prefix length, protocol with 255 for
        any, the two wire ports, and what tells the scopes of link-local addresses apart).  The family is part of it:
        0.0.0.0/0 and ::/0 are different.
        """
        return self._identity

    @property
    def version(self) -> int:
        """4 or 6."""
        return self.source.version

    def canonical(self) -> Selector:
        """The same packets in the one normal form: host bits masked, ICMP type and code where the wire has them."""
        icmp_type, icmp_code = self.icmp_type, self.icmp_code
        source_port, destination_port = self.source_port, self.destination_port
        if self.protocol in (UpperProtocol.ICMP, UpperProtocol.ICMPV6):
            first, second = self.wire_ports
            icmp_type, icmp_code = first or None, (second if first or second else None)
            source_port = destination_port = 0
            if max(first, second) > 255:
                icmp_type, icmp_code, source_port, destination_port = None, None, first, second
        return Selector(
            _masked(self.source),
            _masked(self.destination),
            protocol=self.protocol,
            source_port=source_port,
            destination_port=destination_port,
            icmp_type=icmp_type,
            icmp_code=icmp_code,
        )

    def reversed(self) -> Selector:
        """The packets of the other direction: prefixes and ports change sides; ICMP type and code stay."""
        return Selector(
            self.destination,
            self.source,
            protocol=self.protocol,
            source_port=self.destination_port,
            destination_port=self.source_port,
            icmp_type=self.icmp_type,
            icmp_code=self.icmp_code,
        )

    def __repr__(self) -> str:
        given = [f"{str(self.source)!r}", f"{str(self.destination)!r}"]
        for name in ("protocol", "source_port", "destination_port", "icmp_type", "icmp_code"):
            value = getattr(self, name)
            if value or (value is not None and name.startswith("icmp")):
                given.append(f"{name}={value}")
        return f"Selector({', '.join(given)})"

    def __str__(self) -> str:
        source, destination = str(self.source), str(self.destination)
        source += f"[{self.source_port}]" if self.source_port else ""
        destination += f"[{self.destination_port}]" if self.destination_port else ""
        text = f"{source} -> {destination}"
        if self.protocol is not None:
            text += f" {_PROTOCOL_TEXT.get(self.protocol, self.protocol)}"
        if self.icmp_type is not None or self.icmp_code is not None:
            text += f" type {'any' if self.icmp_type is None else self.icmp_type}"
            text += "" if self.icmp_code is None else f" code {self.icmp_code}"
        return text


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
