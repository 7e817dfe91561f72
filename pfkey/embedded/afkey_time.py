"""Linux's SAs in time: limits and EXPIRE, packets that use them, and the ACQUIRE that asks for one (xfrm_state.c)."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from ..constants import Action, Direction, SAState, SAType
from ..constants import ExtensionType as X
from ..constants import MessageType as M
from ..messages import Template
from .afkey_associations import body_of, expiries, new_larval, next_expiry
from .dialect import Receivers
from .sad import Association
from .spd import Entry, Packet
from .wire import Endpoint, Limits

if TYPE_CHECKING:
    from .kernel import EmbeddedKernel

__all__ = ["acquire", "expire", "use"]


def expire(kernel: EmbeddedKernel, now: float) -> float:
    """Soft limits make an SA dying, hard ones end it; those who registered hear of both."""
    following = inf
    for sa in kernel.sad:
        moments = expiries(sa)
        if any(hard and when <= now for when, hard in moments):
            _expired(kernel, sa)
            continue
        if any(when <= now for when, _ in moments):
            _dying(kernel, sa)
        following = min(following, next_expiry(sa))
    return following


def _expired(kernel: EmbeddedKernel, sa: Association) -> None:
    kernel.sad.remove(sa)
    sa.state = SAState.DEAD
    _tell_expiry(kernel, sa, "hard")


def _dying(kernel: EmbeddedKernel, sa: Association) -> None:
    sa.state = SAState.DYING
    _tell_expiry(kernel, sa, "soft")


def _tell_expiry(kernel: EmbeddedKernel, sa: Association, limits: str) -> None:
    body = body_of(kernel, sa, keys=False, limits=limits)
    kernel.broadcast(kernel.wire.message(M.EXPIRE, sa.satype, 0, 0, body), Receivers.REGISTERED)


def use(kernel: EmbeddedKernel, sa: Association, size: int) -> bool:
    """Count a packet; False, and the SA is over, when the packets before it have reached a hard limit."""
    if not sa.used:
        sa.used = kernel.now()
        kernel.schedule(next_expiry(sa))
    if _reached(sa, sa.hard):
        _expired(kernel, sa)
        return False
    if sa.state == SAState.MATURE and _reached(sa, sa.soft):
        _dying(kernel, sa)
    sa.packets += 1
    sa.octets += size
    return True


def _reached(sa: Association, limits: Limits | None) -> bool:
    """Whether packets or bytes have."""
    return limits is not None and (0 < limits.allocations <= sa.packets or 0 < limits.bytes <= sa.octets)


def acquire(
    kernel: EmbeddedKernel, entry: Entry, template: Template, between: tuple[Endpoint, Endpoint], packet: Packet
) -> None:
    """Ask for an SA, once for each larval one, if anybody registered; else nothing happens at all."""
    if not kernel.someone_registered():
        return
    source, destination = between
    for sa in kernel.sad.waiting():
        same = (sa.protocol, sa.mode, sa.reqid) == (template.protocol, template.mode, template.reqid)
        if same and (sa.source.address, sa.destination.address) == (source.address, destination.address):
            return
    kernel.acquire_seq += 1
    sa = new_larval(kernel, template.protocol, between, (template.mode, template.reqid), kernel.acquire_seq)
    wire, width = kernel.wire, 32 if source.version == 4 else 128
    body = wire.address(X.ADDRESS_SRC, wire.sockaddr(source.version, source.address), 0, width)
    body += wire.address(X.ADDRESS_DST, wire.sockaddr(destination.version, destination.address), 0, width)
    body += wire.policy(Action.IPSEC, Direction.OUT, id=entry.id, priority=entry.priority)
    if sa.satype in (SAType.AH, SAType.ESP):
        # A proposal without combinations: policies made through PF_KEY name no algorithms.
        body += wire.small(X.PROPOSAL, bytes((32, 0, 0, 0)))
    kernel.broadcast(wire.message(M.ACQUIRE, sa.satype, sa.seq, 0, body), Receivers.REGISTERED)
