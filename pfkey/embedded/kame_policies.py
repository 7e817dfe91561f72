"""The policies of KAME's heirs: what SPDADD stores, when SPDUPDATE unlinks, what replies and dumps show (key.c)."""

from __future__ import annotations

from collections.abc import Iterable
from math import floor, inf
from typing import TYPE_CHECKING

from ..constants import Action, Direction, Level, Mode, PolicyScope, SAProtocol, UpperProtocol
from ..constants import ExtensionType as X
from ..constants import MessageType as M
from ..messages import Template
from .dialect import Receivers
from .profiles import Update
from .spd import Entry
from .wire import HEADER_SIZE, Endpoint, Limits, RefusedError, Request, UnansweredError, pad8

if TYPE_CHECKING:
    from .kernel import EmbeddedKernel

__all__ = ["add", "delete", "delete_by_id", "dump", "ends", "expire", "flush", "gather", "get", "send_dump"]

_PROTOCOLS = (SAProtocol.ESP, SAProtocol.AH, SAProtocol.IPCOMP)
_TYPES = (Action.DISCARD, Action.NONE, Action.IPSEC)
_DIRECTIONS = (Direction.IN, Direction.OUT)
_MANUAL_REQIDS = 16383


def ends(kernel: EmbeddedKernel, request: Request) -> tuple[Endpoint, Endpoint]:
    """Source and destination; EINVAL when one is missing."""
    if X.ADDRESS_SRC not in request or X.ADDRESS_DST not in request:
        raise RefusedError("EINVAL")
    source = kernel.wire.read_address(request.raw(X.ADDRESS_SRC))[2]
    destination = kernel.wire.read_address(request.raw(X.ADDRESS_DST))[2]
    if source is None or destination is None:
        raise RefusedError("EINVAL")
    return source, destination


def gather(kernel: EmbeddedKernel, request: Request, *kinds: int) -> bytes:
    """A reply made of the request's own header and extensions, in this order, as the handler left them."""
    body = b"".join(request.raw(kind & 0xFF) for kind in kinds)
    return kernel.wire.answer(request, body, reserved=request.reserved)


def tell(kernel: EmbeddedKernel, request: Request, message: bytes, receivers: Receivers) -> None:
    """Send the answer; one that does not fit the sender's buffer makes send() fail afterwards."""
    request.overflowed |= not kernel.broadcast(message, receivers, request.channel)


def _policy_extension(kernel: EmbeddedKernel, request: Request) -> bytes:
    if X.POLICY not in request:
        raise RefusedError("EINVAL")
    return request.raw(X.POLICY)


def _entry(kernel: EmbeddedKernel, request: Request, *, adding: bool) -> Entry:
    """The policy that the request describes, without templates; what is wrong here is found before any look-up."""
    source, destination = ends(kernel, request)
    raw = _policy_extension(kernel, request)
    action, direction, _, priority = kernel.wire.read_policy(raw)
    if adding and direction not in _DIRECTIONS and kernel.profile.bad_direction_is_silent:
        raise UnansweredError
    if direction not in _DIRECTIONS or action not in _TYPES:
        raise RefusedError("EINVAL")
    if adding and action == Action.IPSEC and len(raw) <= 16 and not _may_be_empty(kernel, request):
        raise RefusedError("EINVAL")
    protocol, source_prefix, _ = kernel.wire.read_address(request.raw(X.ADDRESS_SRC))
    _, destination_prefix, _ = kernel.wire.read_address(request.raw(X.ADDRESS_DST))
    hard = kernel.wire.read_lifetime(request.raw(X.LIFETIME_HARD)) if X.LIFETIME_HARD in request else None
    now = kernel.now()
    return Entry(
        direction=direction,
        source=source,
        source_prefix=source_prefix,
        destination=destination,
        destination_prefix=destination_prefix,
        protocol=protocol,
        any_protocol=protocol == UpperProtocol.ANY,
        action=action,
        priority=priority if kernel.abi.has_priority else 0,
        created=now,
        hard=Limits(addtime=hard.addtime, usetime=hard.usetime) if hard else None,
        used=now,
    )


def _may_be_empty(kernel: EmbeddedKernel, request: Request) -> bool:
    return request.type == M.SPDSETIDX and kernel.profile.setidx_may_be_empty


def _read_templates(kernel: EmbeddedKernel, request: Request, entry: Entry) -> None:
    """key_msg2sp: what is wrong here is found after an update has given up the old policy.

    The reqid that the kernel chose is written into the request, and so into the reply, or into the echo of an error.
    """
    start, length = request.extensions[X.POLICY]
    offset, end, written = start + 16, start + length, b""
    templates: list[Template] = []
    while offset < end:
        size = kernel.wire.u16.unpack_from(request.data, offset)[0]
        if not 8 <= size <= end - offset or len(templates) >= kernel.profile.templates_maximum:
            raise RefusedError("EINVAL")
        template, shown = _read_template(kernel, request, offset, size)
        templates.append(template)
        written += shown
        offset += size
    entry.templates, entry.requests = tuple(templates), written


def _read_template(kernel: EmbeddedKernel, request: Request, offset: int, size: int) -> tuple[Template, bytes]:
    wire, data = kernel.wire, request.data
    _, protocol, mode, level, reqid = wire.read_request(data, offset)
    if protocol not in _PROTOCOLS:
        raise RefusedError("EPROTONOSUPPORT")
    if mode not in (Mode.TRANSPORT, Mode.TUNNEL) or level not in Level._value2member_map_:
        raise RefusedError("EINVAL")
    if level != Level.UNIQUE:
        reqid = 0  # kept in the reply, gone from the policy
    elif not 0 < reqid <= _MANUAL_REQIDS:
        reqid = _new_reqid(kernel)
        wire.u16.pack_into(data, offset + 6, reqid)
    addresses = bytes(data[offset + 8 : offset + size])
    if mode == Mode.TRANSPORT:
        if addresses:
            raise RefusedError("EINVAL")
        return Template(SAProtocol(protocol), Mode.TRANSPORT, None, None, reqid, Level(level)), wire.request(
            8, protocol, mode, level, reqid
        )
    source, destination = _tunnel_ends(kernel, addresses)
    both = source.raw + destination.raw
    shown = wire.request(8 + len(pad8(both)), protocol, mode, level, reqid) + pad8(both)
    return Template(SAProtocol(protocol), Mode.TUNNEL, source.ip, destination.ip, reqid, Level(level)), shown


def _tunnel_ends(kernel: EmbeddedKernel, addresses: bytes) -> tuple[Endpoint, Endpoint]:
    """Two sockaddrs back to back, of one family and length."""
    if len(addresses) < 16 or len(addresses) < 2 * addresses[0]:
        raise RefusedError("EINVAL")
    source = kernel.wire.endpoint(addresses)
    if source is None or addresses[0] != len(source.raw):
        raise RefusedError("EINVAL")
    rest = addresses[addresses[0] :]
    destination = kernel.wire.endpoint(rest)
    if destination is None or rest[:2] != addresses[:2]:
        raise RefusedError("EINVAL")
    return source, destination


def _new_reqid(kernel: EmbeddedKernel) -> int:
    """A counter of 16 bits."""
    kernel.reqids += 1
    if not kernel.profile.first_reqid <= kernel.reqids <= 0xFFFF:
        kernel.reqids = kernel.profile.first_reqid
    return kernel.reqids


def _new_id(kernel: EmbeddedKernel) -> int:
    """The next number from 1 on that no policy has."""
    while True:
        kernel.policy_ids = kernel.policy_ids % 0xFFFFFFFF + 1
        if kernel.spd.by_id(kernel.policy_ids) is None:
            return kernel.policy_ids


def add(kernel: EmbeddedKernel, request: Request) -> None:
    """SPDADD, SPDSETIDX (the same) and SPDUPDATE, which adds where nothing is to be replaced."""
    entry = _entry(kernel, request, adding=True)
    old = kernel.spd.find(entry.identity)
    if old is not None and request.type != M.SPDUPDATE:
        raise RefusedError("EEXIST")
    unlink_first = kernel.profile.update is Update.UNLINK_FIRST
    if old is not None and unlink_first:
        _unlink(kernel, old, "unlinked")
        if kernel.profile.update_drains:
            kernel.step("drained")
        kernel.stop_after_unlink()
    try:
        if entry.action == Action.IPSEC:
            _read_templates(kernel, request, entry)
        if old is not None and not unlink_first:
            kernel.stop_after_unlink()
    except RefusedError:
        # FreeBSD 14 looks at the new policy first, and removes the old one all the same.
        if old is not None and not old.dead:
            _unlink(kernel, old, "unlinked")
        raise
    entry.id = _new_id(kernel)
    if old is None or unlink_first:
        kernel.spd.link(entry)
        kernel.step("inserted")
    else:
        _swap(kernel, old, entry)
    kernel.schedule(_due(entry) + 1)
    start, _ = request.extensions[X.POLICY]
    kernel.wire.u32.pack_into(request.data, start + 8, entry.id)
    answer = gather(kernel, request, X.POLICY, X.LIFETIME_HARD, X.ADDRESS_SRC, X.ADDRESS_DST)
    tell(kernel, request, answer, Receivers.ALL)


def _swap(kernel: EmbeddedKernel, old: Entry, new: Entry) -> None:
    """Detach and insert under one lock.  Whoever looks a policy up waits for it; whether the direction has any policy
    at all is asked without the lock, so an update of the only one can be caught in between.
    """
    kernel.spd.unlink(old)
    if kernel.profile.sole_policy_glimpse and not kernel.spd.in_order(old.direction):
        kernel.step("detached")
    kernel.spd.link(new)
    kernel.step("swapped")


def _unlink(kernel: EmbeddedKernel, entry: Entry, step: str) -> None:
    kernel.spd.unlink(entry)
    if kernel.profile.dead_seconds:
        until = floor(kernel.now()) + kernel.profile.dead_seconds  # a timer looks once a second
        kernel.spd.bury(entry, until)
        kernel.schedule(until)
    kernel.step(step)


def delete(kernel: EmbeddedKernel, request: Request) -> None:
    """SPDDELETE: by selector and direction; the reply is the request with the id filled in."""
    entry = kernel.spd.find(_entry(kernel, request, adding=False).identity)
    if entry is None:
        raise RefusedError("EINVAL")
    start, _ = request.extensions[X.POLICY]
    kernel.wire.u32.pack_into(request.data, start + 8, entry.id)
    _unlink(kernel, entry, "deleted")
    tell(kernel, request, gather(kernel, request, X.POLICY, X.ADDRESS_SRC, X.ADDRESS_DST), Receivers.ALL)


def delete_by_id(kernel: EmbeddedKernel, request: Request) -> None:
    """SPDDELETE2."""
    entry = kernel.spd.by_id(kernel.wire.read_policy(_policy_extension(kernel, request))[2])
    if entry is None:
        raise RefusedError("EINVAL")
    _unlink(kernel, entry, "deleted")
    tell(kernel, request, gather(kernel, request, X.POLICY), Receivers.ALL)


def get(kernel: EmbeddedKernel, request: Request) -> None:
    """SPDGET: by id, to the sender."""
    entry = kernel.spd.by_id(kernel.wire.read_policy(_policy_extension(kernel, request))[2])
    if entry is None:
        raise RefusedError("ENOENT")
    seq = 0 if kernel.profile.get_answers_seq_zero else request.seq
    answer = kernel.wire.message(M.SPDGET, request.satype, seq, request.pid, _body(kernel, entry), reserved=2)
    tell(kernel, request, answer, Receivers.SENDER)


def _body(kernel: EmbeddedKernel, entry: Entry) -> bytes:
    """Addresses and policy as stored, sockaddrs byte by byte as they were given; times only with a hard lifetime."""
    if entry.body is None:
        wire, addresses = kernel.wire, _addresses(kernel, entry)
        entry.body = addresses + _shown_policy(kernel, entry)
        if entry.hard and entry.hard.addtime:
            current = Limits(0, 0, int(entry.created), int(entry.used))
            entry.body += wire.lifetime(X.LIFETIME_CURRENT, current) + wire.lifetime(X.LIFETIME_HARD, entry.hard)
    return entry.body


def _addresses(kernel: EmbeddedKernel, entry: Entry) -> bytes:
    wire = kernel.wire
    source = wire.address(X.ADDRESS_SRC, entry.source.raw, entry.protocol, entry.source_prefix)
    return source + wire.address(X.ADDRESS_DST, entry.destination.raw, entry.protocol, entry.destination_prefix)


def _shown_policy(kernel: EmbeddedKernel, entry: Entry) -> bytes:
    return kernel.wire.policy(
        entry.action,
        entry.direction,
        scope=kernel.scope,
        id=entry.id,
        priority=entry.priority,
        requests=entry.requests,
    )


def dump(kernel: EmbeddedKernel, request: Request) -> None:
    """SPDDUMP: inbound, then outbound, counting down to 0."""
    entries = [entry for direction in _DIRECTIONS for entry in kernel.spd.listed(direction)]
    if not entries or not (request.satype == PolicyScope.ANY or request.satype & PolicyScope.GLOBAL):
        raise RefusedError("ENOENT")
    send_dump(kernel, request, ((0, _body(kernel, entry)) for entry in entries), len(entries))


def send_dump(kernel: EmbeddedKernel, request: Request, bodies: Iterable[tuple[int, bytes]], count: int) -> None:
    """Queue the parts of a dump, given as SA type and extensions; what does not fit the buffer is lost in silence."""
    whole = kernel.profile.dump_in_one
    if whole and not request.channel.has_room:
        request.data[2] = kernel.abi.error_numbers["ENOBUFS"]
        kernel.deliver(request.channel, bytes(request.data), beyond_limit=True)
        return
    message, kind, pid = kernel.wire.message, request.type, request.pid
    for left, (satype, body) in zip(range(count - 1, -1, -1), bodies, strict=True):
        part = message(kind, satype, left, pid, body, reserved=1)
        kernel.broadcast(part, Receivers.SENDER, request.channel, beyond_limit=whole)


def flush(kernel: EmbeddedKernel, request: Request) -> None:
    """SPDFLUSH, which must be a bare header."""
    if len(request.data) != HEADER_SIZE:
        raise RefusedError("EINVAL")
    for entry in list(kernel.spd):
        _unlink(kernel, entry, "flushed")
    tell(kernel, request, gather(kernel, request), Receivers.ALL)


def expire(kernel: EmbeddedKernel, now: float) -> float:
    """Remove what is older than its hard lifetime or idle for longer; SPDEXPIRE to those who registered."""
    kernel.spd.forget_dead(now)
    for entry in list(kernel.spd):
        if now > _due(entry):
            _unlink(kernel, entry, "expired")
            wire = kernel.wire
            body = wire.lifetime(X.LIFETIME_CURRENT, Limits(0, 0, int(entry.created), int(entry.used)))
            body += wire.lifetime(X.LIFETIME_HARD, entry.hard or Limits()) + _addresses(kernel, entry)
            body += _shown_policy(kernel, entry)
            kernel.broadcast(wire.message(M.SPDEXPIRE, 0, 0, 0, body, reserved=1), Receivers.REGISTERED)
    # Looked at once a second, and only what is older than its limit goes.
    return min(min(map(_due, kernel.spd), default=inf) + 1, kernel.spd.next_to_forget)


def _due(entry: Entry) -> float:
    """When it has its limit of age or idleness behind it."""
    if entry.hard is None:
        return inf
    return min(entry.created + (entry.hard.addtime or inf), entry.used + (entry.hard.usetime or inf))
