"""What becomes of a packet: plaintext, protected or dropped, and the ACQUIRE that a missing SA causes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from ipaddress import ip_address
from typing import TYPE_CHECKING

from ..constants import Action, Direction, Level, Mode, SAState, UpperProtocol
from ..messages import AddressLike, Policy, SecurityAssociation, Selector, Template
from .profiles import Dialect, Profile
from .sad import Association
from .spd import Entry, Packet
from .wire import Endpoint

if TYPE_CHECKING:
    from .kernel import EmbeddedKernel

__all__ = ["Passage", "Verdict", "make_packet", "packet_of", "send_packet"]


class Verdict(Enum):
    """What becomes of a packet."""

    PLAINTEXT = "plaintext"
    PROTECTED = "protected"
    DROPPED = "dropped"


@dataclass(frozen=True, slots=True)
class Passage:
    """What became of a packet, by which policy, and through which SAs."""

    verdict: Verdict
    policy: Policy | None = None
    associations: tuple[SecurityAssociation, ...] = ()


def make_packet(
    profile: Profile,
    source: AddressLike,
    destination: AddressLike,
    *,
    protocol: int | None = None,
    ports: tuple[int, int] = (0, 0),
    scope: int = 0,
) -> Packet:
    """The packet as policies of this kernel see it."""
    source, destination = ip_address(source), ip_address(destination)
    if source.version != destination.version:
        raise ValueError(f"a packet has one address family, not {source} -> {destination}")
    if protocol == UpperProtocol.ICMP and not profile.abi.matches_icmp_types:
        ports = (0, 0)
    number = UpperProtocol.ANY if protocol is None else protocol
    return Packet(source.version, int(source), int(destination), number, *ports, scope)


def packet_of(profile: Profile, selector: Selector) -> Packet:
    """A packet that belongs to the selector: its own host bits where it has them, else the first host of each side."""
    sides = []
    for side in (selector.source, selector.destination):
        is_network = side.ip == side.network.network_address and side.network.prefixlen < side.max_prefixlen - 1
        sides.append(side.ip + is_network)
    return make_packet(profile, *sides, protocol=selector.protocol, ports=selector.wire_ports)


def send_packet(kernel: EmbeddedKernel, direction: Direction, packet: Packet, size: int) -> Passage:
    """Let a plaintext packet meet the SPD, and the SAD behind it."""
    entry = kernel.spd.match(direction, packet)
    if entry is None:
        return Passage(Verdict.PLAINTEXT)
    used: list[Association] = []
    if entry.action == Action.DISCARD:
        verdict = Verdict.DROPPED
    elif entry.action != Action.IPSEC:
        verdict = Verdict.PLAINTEXT
    elif not entry.templates and direction is Direction.OUT:
        verdict = Verdict.DROPPED  # made by SPDSETIDX on an old BSD: it has nothing to protect the packet with
    elif direction is Direction.OUT:
        verdict = _protect(kernel, entry, packet, size, used)
    else:
        # A packet that came in clear where the policy may insist on protection.
        insists = any(_insists(kernel.profile, template) for template in entry.templates)
        verdict = Verdict.DROPPED if insists else Verdict.PLAINTEXT
    if not kernel.profile.missing_sa_is_no_use or verdict is not Verdict.DROPPED or entry.action == Action.DISCARD:
        entry.touch(kernel.now())
    return Passage(verdict, entry.policy(kernel.scope), tuple(association.show(kernel.abi) for association in used))


def _protect(kernel: EmbeddedKernel, entry: Entry, packet: Packet, size: int, used: list[Association]) -> Verdict:
    """Send it through the SAs it needs, which go into `used`."""
    found, complete = _collect(kernel, entry, packet)
    if not complete or not all(kernel.dialect.use(kernel, association, size) for association in found):
        return Verdict.DROPPED
    used += found
    return Verdict.PROTECTED if used else Verdict.PLAINTEXT


def _insists(profile: Profile, template: Template) -> bool:
    return template.level != Level.USE and (template.level != Level.DEFAULT or profile.default_level_protects)


def _collect(kernel: EmbeddedKernel, entry: Entry, packet: Packet) -> tuple[list[Association], bool]:
    """The SAs of each template; whether all that must be there are there.  The first missing one is asked for."""
    used: list[Association] = []
    wire = kernel.wire
    ends: list[Endpoint | None] = [
        wire.endpoint(wire.sockaddr(packet.version, address, 0, packet.scope))
        for address in (packet.source, packet.destination)
    ]
    for template in entry.templates:
        if template.mode == Mode.TUNNEL and template.source is not None and template.destination is not None:
            ends = [
                wire.endpoint(wire.sockaddr(address.version, int(address)))
                for address in (template.source, template.destination)
            ]
        source, destination = ends
        assert source is not None
        assert destination is not None
        association = _find(kernel, template, source, destination)
        if association is None:
            kernel.dialect.acquire(kernel, entry, template, (source, destination), packet)
            if _insists(kernel.profile, template):
                return used, False
        else:
            used.append(association)
    return used, True


def _find(kernel: EmbeddedKernel, template: Template, source: Endpoint, destination: Endpoint) -> Association | None:
    """A usable SA: Linux takes the youngest that is not dying and matches the reqid, 0 too; FreeBSD the oldest."""
    linux = kernel.profile.dialect is Dialect.AF_KEY
    candidates = [
        association
        for association in kernel.sad
        if association.state in (SAState.MATURE, SAState.DYING)
        and association.protocol == template.protocol
        and association.reqid in ((template.reqid,) if linux or template.reqid else (association.reqid,))
        and association.mode in ((template.mode,) if linux else (template.mode, Mode.ANY))
        and association.source.version == source.version
        and association.source.address == source.address
        and association.destination.address == destination.address
    ]
    if not linux:
        return candidates[0] if candidates else None
    return max(candidates, key=lambda sa: (sa.state == SAState.MATURE, sa.created, sa.serial), default=None)
