"""The SAD: associations by SPI and in the order of a dump, their lifetimes, and the ones waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ..abi import Abi
from ..constants import SAFlag, SAProtocol, SAState
from ..messages import Lifetime, NATTraversal, SecurityAssociation
from .wire import Endpoint, Limits

__all__ = ["NATT", "Association", "AssociationDatabase"]


@dataclass(frozen=True, slots=True)
class NATT:
    """UDP encapsulation: its type and ports, and FreeBSD's original addresses as raw extensions."""

    type: int
    source_port: int
    destination_port: int
    originals: bytes = b""


@dataclass(slots=True, eq=False)
class Association:
    """One SA, or the larval entry of one to come."""

    protocol: int
    satype: int
    source: Endpoint
    destination: Endpoint
    spi: int
    mode: int
    reqid: int
    created: float
    state: int = SAState.LARVAL
    replay: int = 0
    """The window in the system's own unit; FreeBSD's can exceed the byte of the SA extension."""
    has_window: bool = True
    auth: int = 0
    encrypt: int = 0
    flags: int = 0
    auth_key: tuple[int, bytes] | None = field(default=None, repr=False)
    encrypt_key: tuple[int, bytes] | None = field(default=None, repr=False)
    hard: Limits | None = None
    soft: Limits | None = None
    natt: NATT | None = None
    proxy: tuple[int, int, Endpoint] | None = None
    """Linux: protocol, prefix length and address of the selector's source; None when it equals the SA's source."""
    context: bytes = b""
    """Linux: the security context extension."""
    seq: int = 0
    pid: int = 0
    used: float = 0.0
    packets: int = 0
    octets: int = 0
    serial: int = 0
    head: int = 0
    """FreeBSD: when the group of its addresses, protocol, mode and reqid was made."""

    @property
    def group(self) -> tuple[object, ...]:
        """What FreeBSD files SAs under (secasindex)."""
        source, destination = self.source, self.destination
        return (
            self.protocol, self.mode, self.reqid, source.version, source.address, source.scope, destination.address,
            destination.scope,
        )  # fmt: skip

    @property
    def current(self) -> Limits:
        """What LIFETIME_CURRENT says."""
        return Limits(self.packets, self.octets, int(self.created), int(self.used))

    def show(self, abi: Abi) -> SecurityAssociation:
        """The SA as people read it."""
        compressed = self.protocol == SAProtocol.IPCOMP
        window = min(self.replay, 0x1FFFFFFF) * (8 if abi.replay_in_bytes else 1)
        return SecurityAssociation(
            self.source.ip,
            self.destination.ip,
            self.spi,
            SAProtocol(self.protocol) if self.protocol in SAProtocol._value2member_map_ else self.protocol,
            self.mode,
            self.reqid,
            authentication=abi.authentication_names.get(self.auth, self.auth) if self.auth else None,
            authentication_key=self.auth_key[1] if self.auth_key else b"",
            encryption=None if compressed or not self.encrypt else abi.encryption_names.get(self.encrypt, self.encrypt),
            encryption_key=self.encrypt_key[1] if self.encrypt_key else b"",
            compression=abi.compression_names.get(self.encrypt, self.encrypt) if compressed else None,
            replay_window=window,
            state=SAState(self.state),
            flags=SAFlag(self.flags),
            lifetime_hard=Lifetime(*self.hard) if self.hard else None,
            lifetime_soft=Lifetime(*self.soft) if self.soft else None,
            lifetime_current=Lifetime(*self.current),
            nat_traversal=NATTraversal(self.natt.source_port, self.natt.destination_port, self.natt.type)
            if self.natt
            else None,
        )


class AssociationDatabase:
    """The SAs of one kernel.  `key` says what makes an SPI unique on this system."""

    def __init__(self, key: Callable[[Association], tuple[object, ...]]) -> None:
        self._key = key
        self._all: dict[int, Association] = {}  # by serial, in the order of insertion
        self._keys: dict[tuple[object, ...], Association] = {}
        self._heads: dict[tuple[object, ...], list[int]] = {}  # group -> [serial of the group, members]
        self._larval: dict[int, Association] = {}
        self._serial = 0

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Association]:
        """Oldest first."""
        return iter(list(self._all.values()))

    def __contains__(self, association: Association) -> bool:
        return association.serial in self._all

    def newest_first(self) -> list[Association]:
        """The order of a Linux dump."""
        return list(reversed(self._all.values()))

    def by_groups(self) -> list[Association]:
        """The order of a FreeBSD dump: the newest group first, in it larval entries first, of each the newest."""
        return sorted(self._all.values(), key=lambda sa: (-sa.head, sa.state != SAState.LARVAL, -sa.serial))

    def find(self, *key: object) -> Association | None:
        """The SA with this key."""
        return self._keys.get(key)

    def add(self, association: Association) -> None:
        """File it as the newest; one without an SPI (an ACQUIRE's larval entry) has no key yet."""
        self._serial += 1
        association.serial = self._serial
        self._all[self._serial] = association
        head = self._heads.setdefault(association.group, [self._serial, 0])
        head[1] += 1
        association.head = head[0]
        if association.spi:
            self._keys[self._key(association)] = association
        if association.state == SAState.LARVAL:
            self._larval[self._serial] = association

    def waiting(self) -> list[Association]:
        """The larval ones, oldest first."""
        return [association for association in self._larval.values() if association.state == SAState.LARVAL]

    def remove(self, association: Association) -> None:
        """Take it out."""
        if self._all.pop(association.serial, None) is None:
            return
        self._larval.pop(association.serial, None)
        head = self._heads[association.group]
        head[1] -= 1
        if not head[1]:
            del self._heads[association.group]
        if self._keys.get(self._key(association)) is association:
            del self._keys[self._key(association)]

    def give_spi(self, association: Association, spi: int) -> None:
        """Number an entry that had none."""
        association.spi = spi
        self._keys[self._key(association)] = association
