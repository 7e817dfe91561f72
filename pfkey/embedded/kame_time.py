"""The SAs of KAME's heirs in time: limits and EXPIRE, packets that use them, the ACQUIRE that asks for one."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from ..constants import ExtensionType as X
from ..constants import MessageType as M
from ..constants import SAState
from ..messages import Template
from .dialect import Receivers
from .kame_associations import SATYPES, addresses, index, next_look, reached, start
from .sad import Association
from .spd import Entry, Packet
from .wire import Endpoint, Limits, RefusedError, Request

if TYPE_CHECKING:
    from .kernel import EmbeddedKernel

__all__ = ["acquire", "acquire_from_user", "expire", "use"]

_ACQUIRES_BLOCKED, _ACQUIRE_SECONDS = 10, 20


def expire(kernel: EmbeddedKernel, now: float) -> float:
    """Larval SAs vanish in silence; a hard limit goes before a soft one, and those who registered hear of both."""
    for sa in kernel.sad:
        if sa.state == SAState.LARVAL:
            if now > sa.created + kernel.profile.larval_seconds:
                kernel.sad.remove(sa)
        elif now > reached(sa, sa.hard):
            _end(kernel, sa)
        elif sa.state == SAState.MATURE and now > reached(sa, sa.soft):
            _dying(kernel, sa)
    return min((next_look(kernel, sa) for sa in kernel.sad), default=inf)


def _end(kernel: EmbeddedKernel, sa: Association) -> None:
    kernel.sad.remove(sa)
    sa.state = SAState.DEAD
    _tell_expiry(kernel, sa, X.LIFETIME_HARD, sa.hard)


def _dying(kernel: EmbeddedKernel, sa: Association) -> None:
    sa.state = SAState.DYING
    _tell_expiry(kernel, sa, X.LIFETIME_SOFT, sa.soft)


def _tell_expiry(kernel: EmbeddedKernel, sa: Association, kind: int, limits: Limits | None) -> None:
    wire = kernel.wire
    parts = [*start(kernel, sa), wire.lifetime(X.LIFETIME_CURRENT, sa.current)]
    parts += [wire.lifetime(kind, limits or Limits()), addresses(kernel, sa)]
    message = wire.message(M.EXPIRE, sa.satype, 0, 0, b"".join(parts), reserved=1)
    kernel.broadcast(message, Receivers.REGISTERED)


def use(kernel: EmbeddedKernel, sa: Association, size: int) -> bool:
    """Count a packet.  Limits of bytes are looked at once a second, too late for this one; packets are not limited."""
    sa.used = sa.used or kernel.now()
    sa.packets += 1
    sa.octets += size
    kernel.schedule(kernel.now() + 1)
    return True


def acquire(
    kernel: EmbeddedKernel, entry: Entry, template: Template, between: tuple[Endpoint, Endpoint], packet: Packet
) -> None:
    """Ask for an SA: at the first packet, and again after ten more or twenty seconds."""
    source, destination = between
    now, key = kernel.now(), (template.protocol, template.mode, template.reqid, source, destination)
    record = kernel.acquires.get(key)
    if record is not None and now - record[2] <= _ACQUIRE_SECONDS:
        if record[1] < _ACQUIRES_BLOCKED:
            record[1] += 1
            return
        record[1] = 0
    else:
        kernel.acquire_seq += 1
        record = kernel.acquires[key] = [kernel.acquire_seq, 0, now]
    wire, width = kernel.wire, 32 if source.version == 4 else 128
    body = wire.address(X.ADDRESS_SRC, source.raw, packet.protocol, width)
    body += wire.address(X.ADDRESS_DST, destination.raw, packet.protocol, width)
    body += wire.policy(entry.action, entry.direction, id=entry.id, priority=entry.priority)
    if template.reqid and kernel.profile.acquire_tells_reqid:
        body += wire.sa2(template.mode, template.reqid)
    # The real kernel's proposal lists combinations of its algorithms; this one leaves the choice open.
    body += wire.small(X.PROPOSAL, bytes((32, 0, 0, 0)))
    message = wire.message(M.ACQUIRE, SATYPES.get(template.protocol, 0), int(record[0]), 0, body)
    kernel.broadcast(message, Receivers.REGISTERED)


def acquire_from_user(kernel: EmbeddedKernel, request: Request) -> None:
    """Bare with errno: a key daemon gave up; the next packet asks anew.  Else it asks others for an SA.  No reply."""
    if len(request.data) == 16:
        if request.errno and request.seq:
            for key in [key for key, record in kernel.acquires.items() if record[0] == request.seq]:
                del kernel.acquires[key]
        return
    if X.PROPOSAL not in request:
        raise RefusedError("EINVAL")
    wanted = index(kernel, request)
    if any(sa.group == wanted.group for sa in kernel.sad):
        raise RefusedError("EEXIST")
    kernel.acquire_seq += 1
    body = request.raw(X.ADDRESS_SRC) + request.raw(X.ADDRESS_DST)
    if wanted.reqid:
        body += kernel.wire.sa2(wanted.mode, wanted.reqid)
    body += kernel.wire.small(X.PROPOSAL, bytes((32, 0, 0, 0)))
    message = kernel.wire.message(M.ACQUIRE, request.satype, kernel.acquire_seq, 0, body)
    kernel.broadcast(message, Receivers.REGISTERED)
