"""Linux's MIGRATE: the end points of a policy's templates, and of the SAs they use, change in place (RFC 6275, 6.1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..constants import Action, Direction, Level, Mode
from ..constants import ExtensionType as X
from ..constants import MessageType as M
from ..messages import Template
from .afkey_associations import association_key, in_shape_of, satype_of
from .afkey_policies import pair, selector_of, write_templates
from .dialect import Receivers
from .sad import Association
from .spd import Entry
from .wire import Endpoint, RefusedError, Request, pad8

if TYPE_CHECKING:
    from .kernel import EmbeddedKernel

__all__ = ["migrate"]

_KMADDRESS = X.KMADDRESS & 0xFF
_MODES = {0: Mode.TRANSPORT, 1: Mode.TRANSPORT, 2: Mode.TUNNEL, 3: Mode.BEET}
_MOST = 6


@dataclass(frozen=True, slots=True)
class _Move:
    """One pair of requests: what is to move, from where, to where."""

    protocol: int
    mode: int
    reqid: int
    old: tuple[Endpoint, Endpoint]
    new: tuple[Endpoint, Endpoint]


def migrate(kernel: EmbeddedKernel, request: Request) -> None:
    """Needs the selector, the direction and pairs of requests (old, new); the answer has seq 0 and pid 0."""
    pair(kernel, request)
    raw = request.raw(X.POLICY)
    if not raw:
        raise RefusedError("EINVAL")
    direction = kernel.wire.read_policy(raw)[1]
    if direction > Direction.FWD:
        raise RefusedError("EINVAL")
    if _KMADDRESS in request:
        _two_sockaddrs(kernel, request.raw(_KMADDRESS)[8:])
    moves = _read_moves(kernel, raw[16:])
    if direction == 0:
        raise RefusedError("EINVAL")
    entry = kernel.spd.find(selector_of(kernel, request, direction).identity)
    if entry is None:
        raise RefusedError("ENOENT")
    moved = _moved_associations(kernel, moves)
    templates = _moved_templates(entry, moves)
    for sa, successor in moved:
        kernel.sad.remove(sa)
        kernel.sad.add(successor)
    entry.templates, entry.length_error = templates, 0
    write_templates(kernel, entry)
    entry.changed()
    kernel.step("migrated")
    _announce(kernel, request, entry, moves)


def _two_sockaddrs(kernel: EmbeddedKernel, data: bytes) -> tuple[Endpoint, Endpoint]:
    source = kernel.wire.endpoint(data)
    if source is None or len(data) < len(pad8(2 * source.raw)):
        raise RefusedError("EINVAL")
    destination = kernel.wire.endpoint(data[len(source.raw) :])
    if destination is None or destination.version != source.version:
        raise RefusedError("EINVAL")
    return source, destination


def _read_moves(kernel: EmbeddedKernel, data: bytes) -> list[_Move]:
    moves: list[_Move] = []
    offset = 0
    while offset < len(data) and len(moves) < _MOST:
        halves = []
        for _ in range(2):
            if len(data) - offset < 16:
                raise RefusedError("EINVAL")
            size, *shape = kernel.wire.read_request(data, offset)
            if not 16 <= size <= len(data) - offset:
                raise RefusedError("EINVAL")
            ends = _two_sockaddrs(kernel, data[offset + 16 : offset + size])
            halves.append((shape, ends))
            offset += size
        (shape, old), (new_shape, new) = halves
        protocol, mode, _, reqid = shape
        if (protocol, mode, reqid) != (new_shape[0], new_shape[1], new_shape[3]) or mode not in _MODES:
            raise RefusedError("EINVAL")
        moves.append(_Move(protocol & 0xFF, _MODES[mode], reqid, old, new))
    if not moves or offset < len(data):
        raise RefusedError("EINVAL")
    if any(not end.address for move in moves for end in move.new):
        raise RefusedError("EINVAL")
    return moves


def _moved_associations(kernel: EmbeddedKernel, moves: list[_Move]) -> list[tuple[Association, Association]]:
    """The SAs that go along, and what becomes of each; ENODATA when the SPI is taken at the new destination."""
    moved: list[tuple[Association, Association]] = []
    taken: set[tuple[object, ...]] = set()
    for move in moves:
        sa = _association(kernel, move)
        if sa is None:
            continue
        source, destination = move.new
        proxy = sa.proxy and (*sa.proxy[:2], in_shape_of(source, sa.proxy[2]))
        successor = replace(sa, source=source, destination=destination, proxy=proxy)
        key = association_key(kernel.profile, successor)
        if key != association_key(kernel.profile, sa) and (key in taken or kernel.sad.find(*key) is not None):
            raise RefusedError("ENODATA")
        taken.add(key)
        moved.append((sa, successor))
    return moved


def _association(kernel: EmbeddedKernel, move: _Move) -> Association | None:
    """The SA that a move takes along."""
    for sa in kernel.sad.newest_first():
        ends = [(end.version, end.address) for end in (sa.source, sa.destination)]
        same = (sa.protocol, sa.mode) == (move.protocol, move.mode) and move.reqid in (0, sa.reqid)
        if same and ends == [(end.version, end.address) for end in move.old]:
            return sa
    return None


def _moved_templates(entry: Entry, moves: list[_Move]) -> tuple[Template, ...]:
    """The templates with their new end points; ENODATA when no move fits any."""
    templates, hits = [], 0
    for template in entry.templates:
        for move in moves:
            same = (template.protocol, template.mode) == (move.protocol, move.mode)
            if not same or move.reqid not in (0, template.reqid):
                continue
            if template.mode != Mode.TRANSPORT:
                if (template.source, template.destination) != (move.old[0].ip, move.old[1].ip):
                    continue
                template = replace(template, source=move.new[0].ip, destination=move.new[1].ip)  # noqa: PLW2901
            hits += 1
        templates.append(template)
    if not hits:
        raise RefusedError("ENODATA")
    return tuple(templates)


def _announce(kernel: EmbeddedKernel, request: Request, entry: Entry, moves: list[_Move]) -> None:
    wire, requests = kernel.wire, b""
    for move in moves:
        level = Level.UNIQUE if move.reqid else Level.REQUIRE
        for ends in (move.old, move.new):
            both = b"".join(wire.sockaddr(end.version, end.address) for end in ends)
            both = pad8(both)
            requests += wire.request(16 + len(both), move.protocol, move.mode, level, move.reqid) + both
    body = request.raw(_KMADDRESS)
    protocol = 0 if entry.any_protocol else entry.protocol
    for kind, end, prefix in (
        (X.ADDRESS_SRC, entry.source, entry.source_prefix),
        (X.ADDRESS_DST, entry.destination, entry.destination_prefix),
    ):
        body += wire.address(kind, wire.sockaddr(end.version, end.address), protocol, prefix)
    body += wire.policy(Action.IPSEC, entry.direction, requests=requests)
    message = wire.message(M.MIGRATE, satype_of(moves[0].protocol), 0, 0, body)
    kernel.broadcast(message, Receivers.ALL)
