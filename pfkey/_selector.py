"""Which packets a policy is for: a selector, held as numbers so that a hundred thousand of them are cheap."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from ipaddress import (
    AddressValueError,
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_interface,
)
from typing import Any, TypedDict, Unpack

from .constants import UpperProtocol

__all__ = ["AddressLike", "IPAddress", "IPInterface", "PrefixLike", "Selector", "wire_identity"]

IPAddress = IPv4Address | IPv6Address
IPInterface = IPv4Interface | IPv6Interface
AddressLike = str | int | bytes | IPAddress
PrefixLike = AddressLike | IPInterface | IPv4Network | IPv6Network

_PROTOCOL_NAMES = {"any": None, "icmp": 1, "tcp": 6, "udp": 17, "gre": 47, "icmp6": 58, "ipv6-icmp": 58, "sctp": 132}
_PROTOCOL_TEXT = {1: "icmp", 6: "tcp", 17: "udp", 47: "gre", 58: "icmp6", 132: "sctp"}
_ANY = UpperProtocol.ANY.value
_ICMP = (UpperProtocol.ICMP.value, UpperProtocol.ICMPV6.value)
_WIDTH = {4: 32, 6: 128}
_MASKS = {
    version: tuple((1 << width) - (1 << (width - bits)) for bits in range(width + 1))
    for version, width in _WIDTH.items()
}
# fe80::/10, the addresses that need a scope.
_LINK_LOCAL, _LINK_LOCAL_BITS = 0xFE80 >> 6, 10
# Which of ICMP type and code are given, instead of ports.
_TYPE, _CODE = 1, 2

_Side = tuple[int, int, int, str]
"""One side of a selector: IP version, address with its host bits, prefix length, scope or ""."""


def _side(value: PrefixLike) -> _Side:
    """What `ipaddress.ip_interface` says of it; ValueError as it says it."""
    if type(value) is str:  # the common forms, without an object for each half
        text, slash, tail = value.partition("/")
        if "%" not in text and (not slash or (tail.isascii() and tail.isdigit())):
            try:
                version, address = (6, int(IPv6Address(text))) if ":" in text else (4, int(IPv4Address(text)))
                bits = int(tail) if slash else _WIDTH[version]
                if bits <= _WIDTH[version]:
                    return version, address, bits, ""
            except AddressValueError:
                pass  # ip_interface has the words for it
    interface = _as_interface(value)
    return interface.version, int(interface), interface.network.prefixlen, getattr(interface, "scope_id", None) or ""


def _as_interface(value: PrefixLike) -> IPInterface:
    if isinstance(value, (IPv4Network, IPv6Network)):
        return ip_interface((value.network_address, value.prefixlen))
    return ip_interface(value)


def _interface(version: int, address: int, bits: int, scope: str) -> IPInterface:
    if version == 4:
        return IPv4Interface((address, bits))
    return IPv6Interface(f"{IPv6Address(address)}%{scope}/{bits}") if scope else IPv6Interface((address, bits))


def _scope_number(scope: str) -> int:
    """A number for a scope: an interface's index is itself, a name is one below zero; 0 is none."""
    if scope.isascii() and scope.isdecimal():
        return int(scope)
    return -int.from_bytes(scope.encode(), "big")


def _protocol(value: int | str | None) -> int:
    """Its number; 255 for any, which 0, "any" and None are too."""
    if isinstance(value, str):
        if value.lower() in _PROTOCOL_NAMES:
            return _PROTOCOL_NAMES[value.lower()] or _ANY
        if not value.isdecimal():
            raise ValueError(f"unknown protocol {value!r}; give its number, or one of {', '.join(_PROTOCOL_NAMES)}")
        value = int(value)
    if value is None or value == 0:
        return _ANY
    if not 0 < value < 256:
        raise ValueError(f"a protocol is a number from 0 to 255, not {value}")
    return int(value)


def _port(value: int, what: str) -> int:
    if not 0 <= value <= 0xFFFF:
        raise ValueError(f"a {what} is a number from 0 to 65535, not {value}")
    return value


def _icmp_ports(protocol: int, icmp_type: int | None, icmp_code: int | None, ports: bool) -> tuple[int, int, int]:
    """ICMP type and code in place of two ports, and which of them are given."""
    if protocol not in _ICMP:
        raise ValueError("an ICMP type or code needs protocol icmp or icmp6")
    if ports:
        raise ValueError("a selector has ports or an ICMP type and code, not both")
    for value, what in ((icmp_type, "type"), (icmp_code, "code")):
        if value is not None and not 0 <= value <= 255:
            raise ValueError(f"an ICMP {what} is a number from 0 to 255, not {value}")
    given = (0 if icmp_type is None else _TYPE) | (0 if icmp_code is None else _CODE)
    return icmp_type or 0, icmp_code or 0, given


def _icmp_on_wire(protocol: int, first: int, second: int) -> int:
    """Which of ICMP type and code two port fields hold; what is too large for either is ports."""
    if protocol not in _ICMP or not (first or second) or first > 255 or second > 255:
        return 0
    return _TYPE | _CODE if first else _CODE


def wire_identity(  # noqa: PLR0917
    version: int,
    source: int,
    source_bits: int,
    destination: int,
    destination_bits: int,
    protocol: int,
    first: int,
    second: int,
    source_scope: int = 0,
    destination_scope: int = 0,
) -> tuple[int, ...]:
    """`Selector.identity` of what address extensions hold: addresses as numbers, protocol 0 or 255 for any, two ports.

    The scope counts for prefixes of link-local addresses only; that of any other means nothing.
    """
    masks = _MASKS[version]
    network, other = source & masks[source_bits], destination & masks[destination_bits]
    if source_scope or destination_scope:
        scopes = (_counted(network, source_bits, source_scope), _counted(other, destination_bits, destination_scope))
        if scopes != (0, 0):
            return (version, network, source_bits, other, destination_bits, protocol or _ANY, first, second, *scopes)
    return version, network, source_bits, other, destination_bits, protocol or _ANY, first, second


def _counted(network: int, bits: int, scope: int) -> int:
    return scope if bits >= _LINK_LOCAL_BITS and network >> 128 - _LINK_LOCAL_BITS == _LINK_LOCAL else 0


class _Given(TypedDict, total=False):
    """What `Selector.replace` takes: the arguments of a selector, by name."""

    source: PrefixLike
    destination: PrefixLike
    protocol: int | str | None
    source_port: int
    destination_port: int
    icmp_type: int | None
    icmp_code: int | None


class Selector:
    """Which packets IPsec treats: two prefixes of one family, an upper-layer protocol, ports or ICMP type and code.

    `source` and `destination` take a prefix in any form of `ipaddress`; the host bits they are given are kept, because
    kernels keep them and count 10.1.2.3/16 and 10.1.0.0/16 as two selectors.  `protocol` is a number or a name, None
    for any.  A port of 0 means any port.  For ICMP and ICMPv6 give `icmp_type` and `icmp_code` instead of ports (the
    wire carries them in the two ports, so that a 0 there means any).  The BSDs compare those of ICMPv6 only: there a
    policy with a type of ICMP (version 4) is stored and matches no packet.

    A selector does not change, and takes about 270 bytes; its prefixes become objects when they are asked for.
    """

    __slots__ = ("_destination", "_given", "_identity", "_scopes", "_source")
    __match_args__ = ("source", "destination")

    _identity: tuple[int, ...]
    _source: int
    _destination: int
    _given: int
    """Which of ICMP type and code are given; 0 for ports."""
    _scopes: tuple[str, str] | None

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
        (version, here, bits, scope), (other, there, more_bits, more) = _side(source), _side(destination)
        if version != other:
            one, another = _as_interface(source), _as_interface(destination)
            raise ValueError(f"a selector has one address family, not {one} -> {another}")
        number = _ANY if protocol is None else _protocol(protocol)
        if icmp_type is not None or icmp_code is not None:
            ports = bool(source_port or destination_port)
            first, second, given = _icmp_ports(number, icmp_type, icmp_code, ports)
        else:
            first, second, given = _port(source_port, "source port"), _port(destination_port, "destination port"), 0
        _fill(self, version, here, bits, there, more_bits, number, first, second, given, scope, more)

    @classmethod
    def from_wire(  # noqa: PLR0917
        cls,
        version: int,
        source: bytes,
        source_prefixlen: int,
        destination: bytes,
        destination_prefixlen: int,
        protocol: int,
        source_port: int,
        destination_port: int,
        source_scope: int = 0,
        destination_scope: int = 0,
    ) -> Selector:
        """What two address extensions say: packed addresses, of which the first 4 bytes are taken for version 4.

        A protocol of 0 or 255 is any; with ICMP and ICMPv6 the ports are type and code.  Nothing is checked: the core
        has done so.
        """
        size = 4 if version == 4 else 16
        here, there = int.from_bytes(source[:size], "big"), int.from_bytes(destination[:size], "big")
        made = _new(cls)
        _fill(
            made,
            version,
            here,
            source_prefixlen,
            there,
            destination_prefixlen,
            protocol or _ANY,
            source_port,
            destination_port,
            _icmp_on_wire(protocol, source_port, destination_port),
            str(source_scope or ""),
            str(destination_scope or ""),
        )
        return made

    @property
    def source(self) -> IPInterface:
        """The source prefix, with the host bits it was given."""
        return _interface(self._identity[0], self._source, self._identity[2], self.scopes[0])

    @property
    def destination(self) -> IPInterface:
        """The destination prefix, with the host bits it was given."""
        return _interface(self._identity[0], self._destination, self._identity[4], self.scopes[1])

    @property
    def protocol(self) -> int | None:
        """The number of the upper-layer protocol, None for any."""
        number = self._identity[5]
        return None if number == _ANY else number

    @property
    def source_port(self) -> int:
        """0 for any, and where there are ICMP type and code instead."""
        return 0 if self._given else self._identity[6]

    @property
    def destination_port(self) -> int:
        """0 for any, and where there are ICMP type and code instead."""
        return 0 if self._given else self._identity[7]

    @property
    def icmp_type(self) -> int | None:
        """None where it is not given."""
        return self._identity[6] if self._given & _TYPE else None

    @property
    def icmp_code(self) -> int | None:
        """None where it is not given."""
        return self._identity[7] if self._given & _CODE else None

    @property
    def wire_ports(self) -> tuple[int, int]:
        """What the two port fields on the wire hold: the ports, or ICMP type and code; 0 means any."""
        return self._identity[6], self._identity[7]

    @property
    def packed(self) -> tuple[bytes, bytes]:
        """The two addresses with their host bits, as they are on the wire."""
        size = 4 if self._identity[0] == 4 else 16
        return self._source.to_bytes(size, "big"), self._destination.to_bytes(size, "big")

    @property
    def scopes(self) -> tuple[str, str]:
        """The scopes that the two addresses were given, "" for none."""
        return self._scopes or ("", "")

    @property
    def identity(self) -> tuple[int, ...]:
        """What two selectors have in common when they match the same packets: cheap to hash and to compare.

        (IP version, source network, its prefix length, destination network, its prefix length, protocol with 255 for
        any, the two wire ports); where a link-local address has a scope, two numbers more that tell the scopes apart.
        The family is part of it: 0.0.0.0/0 and ::/0 are different.
        """
        return self._identity

    @property
    def version(self) -> int:
        """4 or 6."""
        return self._identity[0]

    @property
    def is_plain(self) -> bool:
        """Whether `identity` says all about the two prefixes: no host bits beyond them, and no scope."""
        identity = self._identity
        return self._source == identity[1] and self._destination == identity[3] and self._scopes is None

    def canonical(self) -> Selector:
        """The same packets in the one normal form: host bits masked, ICMP type and code where the wire has them.

        The selector itself when it has that form.
        """
        version, source, bits, destination, more_bits, protocol, first, second, *counted = self._identity
        given = _icmp_on_wire(protocol, first, second)
        scopes = self.scopes
        scope, more = (scopes[0] if counted[0] else "", scopes[1] if counted[1] else "") if counted else ("", "")
        plain = self._source == source and self._destination == destination
        if plain and given == self._given and scopes == (scope, more):
            return self
        made = _new(Selector)
        _fill(made, version, source, bits, destination, more_bits, protocol, first, second, given, scope, more)
        return made

    def reversed(self) -> Selector:
        """The packets of the other direction: prefixes and ports change sides; ICMP type and code stay."""
        version, _, bits, _, more_bits, protocol, first, second = self._identity[:8]
        if not self._given:
            first, second = second, first
        scope, more = self.scopes
        made = _new(Selector)
        _fill(
            made, version, self._destination, more_bits, self._source, bits,
            protocol, first, second, self._given, more, scope,
        )  # fmt: skip
        return made

    def replace(self, **changes: Unpack[_Given]) -> Selector:
        """The same with other arguments: any of those that make a selector."""
        given: _Given = {
            "source": self.source,
            "destination": self.destination,
            "protocol": self.protocol,
            "source_port": self.source_port,
            "destination_port": self.destination_port,
            "icmp_type": self.icmp_type,
            "icmp_code": self.icmp_code,
        }
        return Selector(**(given | changes))

    __replace__ = replace  # copy.replace(), Python 3.13

    def __setattr__(self, name: str, value: object) -> None:
        raise FrozenInstanceError(f"a Selector does not change; use replace() instead of setting {name}")

    def __delattr__(self, name: str) -> None:
        raise FrozenInstanceError(f"a Selector does not change; {name} stays")

    @property
    def _key(self) -> tuple[object, ...]:
        return self._identity, self._source, self._destination, self._given, self._scopes

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return self._key == other._key if isinstance(other, Selector) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._identity)

    def __reduce__(self) -> tuple[object, ...]:
        version, _, bits, _, more_bits, protocol, first, second = self._identity[:8]
        sides = (version, self._source, bits, self._destination, more_bits)
        return _restored, (*sides, protocol, first, second, self._given, *self.scopes)

    def __copy__(self) -> Selector:
        return self

    def __deepcopy__(self, memo: object) -> Selector:
        return self

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
        if self._given:
            text += f" type {'any' if self.icmp_type is None else self.icmp_type}"
            text += "" if self.icmp_code is None else f" code {self.icmp_code}"
        return text


_new = Selector.__new__
# What a slot's descriptor does, without a look-up of the name: a frozen class refuses plain assignment.
_set_identity = Selector.__dict__["_identity"].__set__
_set_source = Selector.__dict__["_source"].__set__
_set_destination = Selector.__dict__["_destination"].__set__
_set_given = Selector.__dict__["_given"].__set__
_set_scopes = Selector.__dict__["_scopes"].__set__


def _fill(  # noqa: PLR0917
    selector: Selector,
    version: int,
    source: int,
    source_bits: int,
    destination: int,
    destination_bits: int,
    protocol: int,
    first: int,
    second: int,
    given: int,
    source_scope: str,
    destination_scope: str,
) -> None:
    """Every selector is made here."""
    if source_scope or destination_scope:
        numbers = _scope_number(source_scope), _scope_number(destination_scope)
        scopes = (source_scope, destination_scope)
    else:
        numbers, scopes = (0, 0), None
    identity = wire_identity(
        version, source, source_bits, destination, destination_bits, protocol, first, second, *numbers
    )
    # An address without host bits is the network itself: one number for both.
    _set_source(selector, identity[1] if source == identity[1] else source)
    _set_destination(selector, identity[3] if destination == identity[3] else destination)
    _set_identity(selector, identity)
    _set_given(selector, given)
    _set_scopes(selector, scopes)


def _restored(*parts: Any) -> Selector:
    """The selector that was pickled."""
    made = _new(Selector)
    _fill(made, *parts)
    return made
