"""The values of the rarer extensions: identities, sensitivity, proposals, contexts, and what one system has alone."""

from __future__ import annotations

from dataclasses import dataclass

from .constants import IdentityType
from .messages import IPAddress, Lifetime

__all__ = [
    "Combination",
    "Filter",
    "HardwareOffload",
    "Identity",
    "KMAddress",
    "Proposal",
    "SAStatistic",
    "SAStatistics",
    "SecurityContext",
    "Sensitivity",
    "SessionID",
]

_NONE = Lifetime()


@dataclass(frozen=True, slots=True)
class Identity:
    """Who one end is (sadb_ident, RFC 2367 section 2.3.4).

    `name` is what stands before the first NUL: a prefix, a domain name, user@domain.  `id` is the user's number.
    """

    type: IdentityType | int
    name: bytes = b""
    id: int = 0


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The label of what an SA carries (sadb_sens, RFC 2367 section 2.3.5): levels, and bitmaps as 64-bit numbers."""

    dpd: int = 0
    level: int = 0
    integrity_level: int = 0
    bitmap: tuple[int, ...] = ()
    integrity_bitmap: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Combination:
    """One way in which the kernel would have an SA (sadb_comb); key lengths in bits, algorithms as numbers."""

    auth: int = 0
    encrypt: int = 0
    flags: int = 0
    auth_minimum_bits: int = 0
    auth_maximum_bits: int = 0
    encrypt_minimum_bits: int = 0
    encrypt_maximum_bits: int = 0
    soft: Lifetime = _NONE
    hard: Lifetime = _NONE


@dataclass(frozen=True, slots=True)
class Proposal:
    """What an ACQUIRE asks for, the best first (sadb_prop, RFC 2367 section 2.3.7); `replay` in the system's unit."""

    replay: int = 0
    combinations: tuple[Combination, ...] = ()


@dataclass(frozen=True, slots=True)
class SecurityContext:
    """SADB_X_EXT_SEC_CTX (Linux): `algorithm` 1 is SELinux, whose context ends in a NUL."""

    context: bytes
    algorithm: int = 1
    doi: int = 1


@dataclass(frozen=True, slots=True)
class KMAddress:
    """SADB_X_EXT_KMADDRESS (Linux): between which addresses the key managers of a MIGRATE speak."""

    source: IPAddress
    destination: IPAddress
    source_port: int = 0
    destination_port: int = 0


@dataclass(frozen=True, slots=True)
class Filter:
    """SADB_X_EXT_FILTER (Linux): which SAs a DUMP is to show."""

    source: IPAddress
    destination: IPAddress
    source_prefixlen: int = 0
    destination_prefixlen: int = 0


@dataclass(frozen=True, slots=True)
class HardwareOffload:
    """SADB_X_EXT_IF_HW_OFFL (FreeBSD 15): the interface that does the work."""

    interface: str
    flags: int = 0


@dataclass(frozen=True, slots=True)
class SessionID:
    """SADB_EXT_SESSION_ID (macOS): a handle of the requester's own, and the session's number in the kernel."""

    handle: int
    session: int


@dataclass(frozen=True, slots=True)
class SAStatistic:
    """One SA of SADB_EXT_SASTAT (macOS); `created` in seconds."""

    spi: int
    created: int = 0
    lifetime_current: Lifetime = _NONE


@dataclass(frozen=True, slots=True)
class SAStatistics:
    """SADB_EXT_SASTAT (macOS): what the SAs of one direction have carried."""

    direction: int
    associations: tuple[SAStatistic, ...] = ()
