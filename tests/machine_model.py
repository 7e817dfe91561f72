"""What the tracker's state machine plays with, and how it believes that lists of assignments behave.

The order of assignments is worked out here anew from the numbers of strongSwan's plugin, without the tracker's code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from pfkey import Abi, Action, Assignment, Direction, Rank, SAProtocol, Selector, Template

ME, PEER, MOVED_PEER = "192.0.2.1", "198.51.100.1", "198.51.100.99"


def tunnel(spi: int = 0, *, reqid: int = 1, peer: str = PEER, **how: object) -> Assignment:
    return Assignment(Template.tunnel(ME, peer, reqid=reqid), spi=spi, **how)  # type: ignore[arg-type]


ASSIGNMENTS = (
    tunnel(0xC1),
    tunnel(0xC2),  # the same image
    tunnel(0xC3, reqid=2),
    tunnel(0xC4, peer=MOVED_PEER),
    tunnel(rank=Rank.TRAP),
    Assignment(Template.transport(reqid=1), spi=0xC5),
    Assignment(
        Template.tunnel(ME, PEER, reqid=1, protocol=SAProtocol.IPCOMP), Template.transport(reqid=1), spi=(0x12, 0xC6)
    ),
    Assignment(action=Action.NONE, rank=Rank.PASS),
    Assignment(action=Action.DISCARD, rank=Rank.FALLBACK),
    tunnel(0xC1, action=Action.DISCARD),
    tunnel(0xC7, priority=1000),
    tunnel(0xC8, reqid=3, priority=367231),  # what two hosts have
    tunnel(rank=Rank.TRAP, priority=1000),
    Assignment(Template.tunnel("2001:db8::1", "2001:db8::2"), spi=0xC9),  # no reqid
)
REFUSED = tunnel(0xCA, reqid=20000)
"""What no kernel stores as it is: refused before anything is sent."""


class Where(NamedTuple):
    """One policy of the universe."""

    direction: Direction
    selector: Selector


def universe(abi: Abi) -> tuple[Where, ...]:
    """Policies that overlap in every way there is, and those for which no alias exists."""
    site = ("10.1.0.0/16", "10.2.0.0/16")
    outbound = [
        Selector(*site),
        Selector("0.0.0.0/0", "0.0.0.0/0"),
        Selector("10.1.1.0/24", "10.2.0.0/16"),
        Selector("10.1.1.1", "10.2.1.1"),
        Selector("10.1.1.1", "10.2.1.0"),  # the other half of the discard guard of the one before
        Selector(*site, protocol="tcp", destination_port=443),
        Selector(*site, protocol="udp"),
        Selector(*site, protocol="icmp", icmp_type=8),
        Selector("2001:db8:1::/48", "2001:db8:2::/48"),
        Selector("2001:db8:1::1", "2001:db8:2::1"),
        Selector("2001:db8:1::/48", "2001:db8:2::/48", protocol="ipv6-icmp", icmp_type=128),
    ]
    if abi.stores_scope:
        outbound.append(Selector("fe80::1%1", "fe80::2%1"))
    places = [Where(Direction.OUT, selector.canonical()) for selector in outbound]
    for way in abi.directions:
        if way is not Direction.OUT:
            places += [Where(way, outbound[number].reversed().canonical()) for number in (0, 3)]
    return tuple(places)


_BASE = {Rank.PASS: 200000, Rank.REGULAR: 400000, Rank.TRAP: 400000, Rank.FALLBACK: 600000}


def priority(selector: Selector, assignment: Assignment) -> int:
    """The kernel's priority of a policy while `assignment` is on top."""
    return implied(selector, assignment) if assignment.priority is None else assignment.priority


def implied(selector: Selector, assignment: Assignment) -> int:
    number = _BASE[assignment.rank] - 512 * (selector.source.network.prefixlen + selector.destination.network.prefixlen)
    number -= 256 if selector.protocol not in (None, 255) else 0
    number -= 64 * sum(port != 0 for port in selector.wire_ports)
    return number - (assignment.rank is not Rank.TRAP)


class Use(NamedTuple):
    """One assignment in its list; as a tuple it sorts the list."""

    priority: int
    implied: int
    without_reqid: bool
    youngest_first: int
    assignment: Assignment


@dataclass
class Model:
    """The lists that the tracker is meant to have, by policy."""

    lists: dict[Where, list[Use]] = field(default_factory=dict)
    serial: int = 0

    def copy(self) -> Model:
        return Model({where: list(uses) for where, uses in self.lists.items()}, self.serial)

    def assignments(self, where: Where) -> tuple[Assignment, ...]:
        return tuple(use.assignment for use in self.lists.get(where, ()))

    def top(self, where: Where) -> Assignment | None:
        uses = self.lists.get(where)
        return uses[0].assignment if uses else None

    def add(self, where: Where, assignment: Assignment) -> None:
        self.serial += 1
        reqid = next((template.reqid for template in assignment.templates if template.reqid), 0)
        use = Use(
            priority(where.selector, assignment),
            implied(where.selector, assignment),
            reqid == 0,
            -self.serial,
            assignment,
        )
        uses = self.lists.setdefault(where, [])
        uses.append(use)
        uses.sort(key=lambda one: one[:4])

    def remove(self, where: Where, assignment: Assignment) -> bool:
        """The oldest of equal ones; whether there was one."""
        equal = [use for use in self.lists.get(where, ()) if use.assignment == assignment]
        if not equal:
            return False
        oldest = max(equal, key=lambda use: use.youngest_first)
        self.lists[where].remove(oldest)
        if not self.lists[where]:
            del self.lists[where]
        return True

    def replace(self, where: Where, old: Assignment, new: Assignment) -> bool:
        if old == new:
            return old in self.assignments(where)
        if not self.remove(where, old):
            return False
        self.add(where, new)
        return True
