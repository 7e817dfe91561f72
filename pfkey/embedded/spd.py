"""The SPD: entries in match order, their identity, and which one a packet meets first."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from heapq import merge
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from math import inf
from typing import NamedTuple

from ..constants import Action, Direction, PolicyScope, UpperProtocol
from ..messages import Lifetime, Policy, Selector, Template
from .profiles import Profile
from .wire import Endpoint, Limits

__all__ = ["Entry", "Packet", "PolicyDatabase"]


class Packet(NamedTuple):
    """What a policy looks at.  Addresses are numbers; for ICMP the ports are type and code.

    `scope` is the interface index of a link-local IPv6 packet, 0 otherwise.
    """

    version: int
    source: int
    destination: int
    protocol: int
    source_port: int
    destination_port: int
    scope: int = 0


@dataclass(slots=True, eq=False)
class Entry:
    """One policy in the database."""

    direction: int
    source: Endpoint
    source_prefix: int
    destination: Endpoint
    destination_prefix: int
    protocol: int
    """As the kernel stores and shows it."""
    any_protocol: bool
    created: float
    action: int = Action.NONE
    priority: int = 0
    templates: tuple[Template, ...] = ()
    hard: Limits | None = None
    soft: Limits | None = None
    context: bytes = b""
    """Linux: the security context extension, part of the identity."""
    requests: bytes = b""
    """The ipsecrequests as dumps show them."""
    length_error: int = 0
    """Linux: bytes by which sadb_msg_len comes out short."""
    id: int = 0
    used: float = 0.0
    """Last use; 0 for never (Linux), creation while there was none (FreeBSD)."""
    dead: bool = False
    link: int = 0
    """When it was linked: a number that grows with every link."""
    body: bytes | None = None
    """The extensions of a reply or dump, kept until something in them changes."""
    _shown: Policy | None = field(default=None, repr=False)
    _key: tuple[int, int] = (0, 0)
    _source_bits: int = 0
    _source_shift: int = 0
    _destination_bits: int = 0
    _destination_shift: int = 0

    def __post_init__(self) -> None:
        width = 32 if self.source.version == 4 else 128
        self._source_shift = width - self.source_prefix
        self._destination_shift = width - self.destination_prefix
        self._source_bits = self.source.address >> self._source_shift
        self._destination_bits = self.destination.address >> self._destination_shift

    @property
    def between_hosts(self) -> bool:
        """Both sides are single addresses."""
        return not self._source_shift and not self._destination_shift

    @property
    def chain(self) -> tuple[int, ...]:
        """The family and prefixes of both sides: Linux keeps policies that share them in one chain."""
        return (
            self.source.version,
            self._source_bits,
            self._source_shift,
            self._destination_bits,
            self._destination_shift,
        )

    @property
    def identity(self) -> tuple[object, ...]:
        """What makes two policies one: direction and selector to the last host bit, scope and context included."""
        source, destination = self.source, self.destination
        return (
            self.direction,
            *(source.version, source.address, source.port, source.scope, self.source_prefix),
            *(destination.address, destination.port, destination.scope, self.destination_prefix),
            self.protocol,
            self.context,
        )

    def matches(self, packet: Packet) -> bool:
        """Whether the packet is this policy's."""
        source, destination = self.source, self.destination
        return (
            packet.source >> self._source_shift == self._source_bits
            and packet.destination >> self._destination_shift == self._destination_bits
            and packet.version == source.version
            and (self.any_protocol or packet.protocol == self.protocol)
            and source.port in (0, packet.source_port)
            and destination.port in (0, packet.destination_port)
            # A scope of 0 on either side stands for any (FreeBSD; Linux stores none).
            and (not packet.scope or (source.scope in (0, packet.scope) and destination.scope in (0, packet.scope)))
        )

    def touch(self, now: float) -> None:
        """A packet used it."""
        self.used = now
        self.changed()

    def changed(self) -> None:
        """Forget how it looked."""
        self.body = self._shown = None

    def policy(self, scope: int) -> Policy:
        """The entry as people read it."""
        if self._shown is None:
            self._shown = self._show(scope)
        return self._shown

    def _show(self, scope: int) -> Policy:
        protocol = None if self.any_protocol else self.protocol
        ports = self.source.port, self.destination.port
        icmp = protocol in (UpperProtocol.ICMP, UpperProtocol.ICMPV6) and max(ports) < 256
        selector = Selector(
            _interface(self.source, self.source_prefix),
            _interface(self.destination, self.destination_prefix),
            protocol=protocol,
            source_port=0 if icmp else ports[0],
            destination_port=0 if icmp else ports[1],
            icmp_type=ports[0] if icmp and any(ports) else None,
            icmp_code=ports[1] if icmp and any(ports) else None,
        )
        return Policy(
            Direction(self.direction),
            selector,
            Action(self.action),
            self.templates,
            self.priority,
            self.id,
            Lifetime(*self.hard) if self.hard else None,
            Lifetime(*self.soft) if self.soft else None,
            Lifetime(0, 0, int(self.created), int(self.used)),
            PolicyScope(scope),
        )


def _interface(side: Endpoint, prefix: int) -> IPv4Interface | IPv6Interface:
    return ip_interface((side.ip, prefix))


class _Table:
    """Entries sorted by priority, and by age among equals."""

    def __init__(self) -> None:
        self.keys: list[tuple[int, int]] = []
        self.entries: list[Entry] = []

    def insert(self, entry: Entry) -> None:
        """Where its key belongs."""
        position = bisect_left(self.keys, entry._key)
        self.keys.insert(position, entry._key)
        self.entries.insert(position, entry)

    def remove(self, entry: Entry) -> None:
        """Out again."""
        position = bisect_left(self.keys, entry._key)
        del self.keys[position]
        del self.entries[position]

    def match(self, packet: Packet, hidden: AbstractSet[Entry]) -> Entry | None:
        """The first that the packet belongs to."""
        for entry in self.entries:
            if entry.matches(packet) and entry not in hidden:
                return entry
        return None

    def match_chains(self, packet: Packet, hidden: AbstractSet[Entry]) -> Entry | None:
        """Of the first that it belongs to in each chain, the one of the best priority that was linked first."""
        best: Entry | None = None
        asked: set[tuple[int, ...]] = set()
        for entry in self.entries:
            if best is not None and entry.priority > best.priority:
                break
            if entry.matches(packet) and entry not in hidden and entry.chain not in asked:
                asked.add(entry.chain)
                if best is None or entry.link < best.link:
                    best = entry
        return best

    def up_to(self, entry: Entry) -> int:
        """How many stand in front of it, or of the place where it stood."""
        return bisect_left(self.keys, entry._key)


class PolicyDatabase:
    """The policies of one kernel, by identity, by id, and in match order for each direction."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._identities: dict[tuple[object, ...], Entry] = {}  # in the order of linking
        self._ids: dict[int, Entry] = {}
        self.links = 0
        """How many links there were so far."""
        self.hidden: AbstractSet[Entry] = frozenset()
        """What look-ups do not see for the moment."""
        self._dead: list[tuple[float, Entry]] = []
        self._tables = {direction: _Table() for direction in Direction}
        self._hosts = {direction: _Table() for direction in Direction}
        # Linux 6.1 numbers the prefix policies of a direction from 0, anew whenever it links one.  Policies between
        # hosts always have 0.  At equal priority the smaller number wins, and of two with 0 the prefix policy.
        self._first: dict[int, Entry | None] = dict.fromkeys(Direction)

    def __len__(self) -> int:
        return len(self._identities)

    def __iter__(self) -> Iterator[Entry]:
        """Oldest link first."""
        return iter(self._identities.values())

    def newest_first(self) -> list[Entry]:
        """The order of a Linux dump: what was added or updated last comes first."""
        return list(reversed(self._identities.values()))

    def in_order(self, direction: int) -> list[Entry]:
        """Those of a direction, in the order in which a packet tries them.

        On Linux 6.12, where ties between chains are settled for each packet anew, no one order is everybody's: this
        is that of priority, and of each chain.
        """
        entries = self._tables[Direction(direction)].entries
        hosts = self._hosts[Direction(direction)].entries
        return list(merge(entries, hosts, key=self._rank)) if hosts else list(entries)

    def _rank(self, entry: Entry) -> tuple[int, int, int]:
        """The whole match order as a number: the numbered-0 prefix policy, the hosts, the other prefix policies."""
        priority, link = entry._key
        tie = 0 if entry is self._first[entry.direction] else 1 if self._apart(entry) else 2
        return (priority, tie, link)

    def _apart(self, entry: Entry) -> bool:
        return self._profile.hosts_apart and entry.between_hosts

    def _table(self, entry: Entry) -> _Table:
        return (self._hosts if self._apart(entry) else self._tables)[Direction(entry.direction)]

    def find(self, identity: tuple[object, ...]) -> Entry | None:
        """The policy of exactly this selector and direction."""
        return self._identities.get(identity)

    def by_id(self, id: int) -> Entry | None:
        """The policy with this id."""
        return self._ids.get(id)

    def link(self, entry: Entry, place_of: Entry | None = None) -> None:
        """Put it where its priority belongs: behind its equals, or where `place_of` stood among them."""
        self.links += 1
        entry.link = self.links
        entry._key = (entry.priority if self._profile.abi.has_priority else 0, self.links)
        if place_of is not None and self._profile.update_keeps_place and place_of._key[0] == entry._key[0]:
            entry._key = place_of._key
        table = self._table(entry)
        table.insert(entry)
        self._identities[entry.identity] = entry
        self._ids[entry.id] = entry
        if not self._apart(entry):
            self._first[entry.direction] = table.entries[0]

    def unlink(self, entry: Entry) -> None:
        """Take it out: no packet finds it any more."""
        self._table(entry).remove(entry)
        del self._identities[entry.identity]
        del self._ids[entry.id]
        entry.dead = True

    def bury(self, entry: Entry, until: float) -> None:
        """One that was unlinked stays in dumps until then."""
        self._dead.append((until, entry))

    def forget_dead(self, now: float) -> None:
        """Out of the dumps, too."""
        self._dead = [(until, entry) for until, entry in self._dead if until > now]

    @property
    def next_to_forget(self) -> float:
        """When the first of the dead goes."""
        return min((until for until, _ in self._dead), default=inf)

    def listed(self, direction: int) -> list[Entry]:
        """What a dump shows of a direction: those in order, and where they stood those that died of late."""
        entries = self.in_order(direction)
        if self._dead:
            entries += [entry for _, entry in self._dead if entry.direction == direction]
            entries.sort(key=lambda entry: entry._key)
        return entries

    def between(self, first: Entry, last: Entry) -> list[Entry]:
        """The policies of their chain behind `first` and in front of the place of `last`."""
        table = self._table(first)
        return [e for e in table.entries[table.up_to(first) + 1 : table.up_to(last)] if e.chain == first.chain]

    def in_front_of(self, entry: Entry) -> list[Entry]:
        """The policies of its chain in front of its place."""
        table = self._table(entry)
        return [e for e in table.entries[: table.up_to(entry)] if e.chain == entry.chain]

    def replace(self, old: Entry, new: Entry) -> None:
        """One in the place of the other, in one step.

        The new one is at the end of the order of linking, which is the front of a Linux dump.
        """
        head = self._table(old).entries[0]
        self.unlink(old)
        self.link(new, place_of=old)
        if head is old and new._key > old._key and not self._apart(new):
            self._first[new.direction] = None  # the old one was still there, and first, when the numbers were given

    def match(self, direction: int, packet: Packet) -> Entry | None:
        """The first policy that the packet meets."""
        table = self._tables[Direction(direction)]
        if self._profile.ties_by_link:
            return table.match_chains(packet, self.hidden)
        entry = table.match(packet, self.hidden)
        host = self._hosts[Direction(direction)].match(packet, self.hidden)
        if entry is None or host is None:
            return entry or host
        return min(entry, host, key=self._rank)
