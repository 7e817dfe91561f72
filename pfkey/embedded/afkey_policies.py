"""Linux's policies: what SPDADD stores, what a reply shows, and when an entry goes (af_key.c, xfrm_policy.c of 6.1)."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import TYPE_CHECKING

from ..constants import Action, Direction, Level, Mode, UpperProtocol
from ..constants import ExtensionType as X
from ..constants import MessageType as M
from ..messages import Template
from .dialect import Receivers
from .spd import Entry
from .wire import Endpoint, Limits, RefusedError, Request, pad8

if TYPE_CHECKING:
    from .kernel import EmbeddedKernel

__all__ = [
    "add",
    "delete",
    "due",
    "dump_bodies",
    "expire",
    "flush",
    "get",
    "pair",
    "read_context",
    "read_limits",
    "selector_of",
    "shorten",
    "write_templates",
]

_SEC_CTX = X.SEC_CTX & 0xFF
_PROTOCOLS = (50, 51, 108, 43, 60)  # ESP, AH, IPComp; with IPv6 routing and destination options headers
_MODES = {0: Mode.ANY, 1: Mode.TRANSPORT, 2: Mode.TUNNEL, 3: Mode.BEET}
_MANUAL_REQIDS = 16383
_UNLIMITED = 0xFFFFFFFFFFFFFFFF
_OVERFLOW = 1 << 63


def pair(kernel: EmbeddedKernel, request: Request) -> tuple[Endpoint, Endpoint]:
    """Source and destination, which must be there and of one family."""
    if X.ADDRESS_SRC not in request or X.ADDRESS_DST not in request:
        raise RefusedError("EINVAL")
    source = kernel.wire.read_address(request.raw(X.ADDRESS_SRC))[2]
    destination = kernel.wire.read_address(request.raw(X.ADDRESS_DST))[2]
    if source is None or destination is None or source.version != destination.version:
        raise RefusedError("EINVAL")
    return kernel.wire.plain(source), kernel.wire.plain(destination)  # scope and flow information are not kept


def selector_of(kernel: EmbeddedKernel, request: Request, direction: int) -> Entry:
    """An entry with the selector that the request names and nothing else."""
    source, destination = pair(kernel, request)
    # Both addresses say a protocol; the destination's is the one that counts.
    protocol, destination_prefix, _ = kernel.wire.read_address(request.raw(X.ADDRESS_DST))
    _, source_prefix, _ = kernel.wire.read_address(request.raw(X.ADDRESS_SRC))
    protocol = protocol or UpperProtocol.ANY
    return Entry(
        direction=direction,
        source=source,
        source_prefix=source_prefix,
        destination=destination,
        destination_prefix=destination_prefix,
        protocol=protocol,
        any_protocol=protocol == UpperProtocol.ANY,
        created=kernel.now(),
        context=read_context(request),
    )


def _directed(kernel: EmbeddedKernel, request: Request) -> tuple[Entry, int, int]:
    """The entry of the selector and direction of the request, and the type and priority that it names."""
    raw = request.raw(X.POLICY)
    if not raw:
        raise RefusedError("EINVAL")
    action, direction, _, priority = kernel.wire.read_policy(raw)
    if not Direction.IN <= direction <= Direction.FWD:
        raise RefusedError("EINVAL")
    return selector_of(kernel, request, direction), action, priority


def read_context(request: Request) -> bytes:
    """The security context extension, as a kernel with SELinux takes it: of that LSM, or EINVAL."""
    raw = request.raw(_SEC_CTX)
    if raw and (raw[4], raw[5]) != (1, 1):
        raise RefusedError("EINVAL")
    return raw


def read_limits(kernel: EmbeddedKernel, request: Request, kind: int) -> Limits | None:
    """A lifetime; all ones are the kernel's infinity, which it shows as no limit."""
    if kind not in request:
        return None
    limits = kernel.wire.read_lifetime(request.raw(kind))
    return limits._replace(bytes=0) if limits.bytes == _UNLIMITED else limits


def due(since: float, seconds: int) -> float:
    """When a limit of `seconds` is reached: the kernel reckons with 63 bits, so that more is in the past."""
    return since + (seconds if seconds < _OVERFLOW else 1)


def _read_templates(kernel: EmbeddedKernel, entry: Entry, raw: bytes) -> None:
    """The ipsecrequests behind sadb_x_policy; less than one of them at the end is overlooked."""
    wire, offset = kernel.wire, 16
    templates: list[Template] = []
    while len(raw) - offset >= 16:
        size = wire.u16.unpack_from(raw, offset)[0]
        if not 16 <= size <= len(raw) - offset:
            raise RefusedError("EINVAL")
        if len(templates) >= kernel.profile.templates_maximum:
            raise RefusedError("ELOOP")
        templates.append(_read_template(kernel, entry, raw[offset : offset + size]))
        offset += size
    entry.templates = tuple(templates)
    if templates:
        entry.action = Action.IPSEC  # without any it is stored, and shown, as NONE


def _read_template(kernel: EmbeddedKernel, entry: Entry, raw: bytes) -> Template:
    _, protocol, mode, level, reqid = kernel.wire.read_request(raw, 0)
    protocol &= 0xFF
    if mode == Mode.ANY or protocol not in _PROTOCOLS or mode not in _MODES:
        raise RefusedError("EINVAL")
    if level == Level.USE and _MODES[mode] in (Mode.TUNNEL, Mode.BEET) and entry.direction == Direction.OUT:
        raise RefusedError("EINVAL")
    if level == Level.UNIQUE:
        reqid = reqid if 0 < reqid <= _MANUAL_REQIDS else _new_reqid(kernel)
    else:
        reqid, level = 0, Level.USE if level == Level.USE else Level.REQUIRE
    if mode != Mode.TUNNEL:
        return Template(protocol, _MODES[mode], None, None, reqid, Level(level))
    source = kernel.wire.endpoint(raw[16:])
    if source is None or len(raw) - 16 < len(pad8(bytes(2 * len(source.raw)))):
        raise RefusedError("EINVAL")
    destination = kernel.wire.endpoint(raw[16 + len(source.raw) :])
    if destination is None or destination.version != source.version:
        raise RefusedError("EINVAL")
    return Template(protocol, Mode.TUNNEL, source.ip, destination.ip, reqid, Level(level))


def _new_reqid(kernel: EmbeddedKernel) -> int:
    """The next number; nobody can have given it to a template by hand."""
    kernel.reqids = max(kernel.reqids + 1, kernel.profile.first_reqid)
    return kernel.reqids


def write_templates(kernel: EmbeddedKernel, entry: Entry) -> None:
    """What replies show.  The length in the header goes wrong when a tunnel of the other family comes before a
    transport template: the kernel allots the latter room for one family and takes back that of the other.
    """
    wire, body, last = kernel.wire, b"", len(entry.source.raw)
    for template in entry.templates:
        ends = b""
        if template.source is not None and template.destination is not None:
            last = len(wire.sockaddr(template.source.version, 0))
            ends = wire.sockaddr(template.source.version, int(template.source))
            ends += wire.sockaddr(template.destination.version, int(template.destination))
        else:
            entry.length_error += 2 * (last - len(entry.source.raw))
        head = wire.request(16 + len(ends), template.protocol, template.mode, template.level, template.reqid)
        body += head + ends
    entry.requests = body


def _new_id(kernel: EmbeddedKernel, direction: int) -> int:
    """(8 * n) | direction - 1, never 0 and never one in use (xfrm_gen_index)."""
    while True:
        number = (kernel.policy_ids | direction - 1) or 8
        kernel.policy_ids = kernel.policy_ids + 8 & 0xFFFFFFFF
        if kernel.spd.by_id(number) is None:
            return number


def _body(kernel: EmbeddedKernel, entry: Entry) -> bytes:
    if entry.body is None:
        wire = kernel.wire
        current = Limits(0, 0, int(entry.created), int(entry.used))
        entry.body = (
            wire.address(X.ADDRESS_SRC, entry.source.raw, entry.protocol, entry.source_prefix)
            + wire.address(X.ADDRESS_DST, entry.destination.raw, entry.protocol, entry.destination_prefix)
            + wire.lifetime(X.LIFETIME_HARD, entry.hard or Limits())
            + wire.lifetime(X.LIFETIME_SOFT, entry.soft or Limits())
            + wire.lifetime(X.LIFETIME_CURRENT, current)
            + wire.policy(entry.action, entry.direction, id=entry.id, priority=entry.priority, requests=entry.requests)
            + entry.context
        )
    return entry.body


def shorten(kernel: EmbeddedKernel, message: bytes, short: int) -> bytes:
    """The message with a sadb_msg_len that is `short` bytes too small."""
    words = (len(message) - short) // 8 & 0xFFFF
    return message[:4] + kernel.wire.u16.pack(words) + message[6:]


def _timer_runs(entry: Entry, now: float) -> bool:
    """A timer holds a reference: for the first second always, afterwards while the policy can expire."""
    limits = [limit for limit in (entry.hard, entry.soft) if limit]
    return now - entry.created < 1 or any(limit.addtime or limit.usetime for limit in limits)


def _answer(kernel: EmbeddedKernel, request: Request, kind: int, entry: Entry, references: int) -> bytes:
    message = kernel.wire.answer(request, _body(kernel, entry), type=kind, satype=0, reserved=references)
    return shorten(kernel, message, entry.length_error) if entry.length_error else message


def add(kernel: EmbeddedKernel, request: Request) -> None:
    """SPDADD, SPDSETIDX (the same) and SPDUPDATE, which adds where nothing is to be replaced."""
    entry, action, priority = _directed(kernel, request)
    entry.priority = priority
    if action > Action.IPSEC:
        raise RefusedError("EINVAL")
    entry.hard = read_limits(kernel, request, X.LIFETIME_HARD)
    entry.soft = read_limits(kernel, request, X.LIFETIME_SOFT)
    entry.action = Action.NONE if action else Action.DISCARD
    if action == Action.IPSEC:
        _read_templates(kernel, entry, request.raw(X.POLICY))
    write_templates(kernel, entry)
    old = kernel.spd.find(entry.identity)
    if old is None:
        entry.id = _new_id(kernel, entry.direction)
        kernel.spd.link(entry)
        kernel.step("inserted")
    elif request.type == M.SPDUPDATE:
        entry.id = old.id
        kernel.spd.replace(old, entry)
        if kernel.profile.cpus > 1 and entry.priority < old.priority:
            kernel.walkers.begin(kernel, old, entry)
        kernel.step("replaced")
    else:
        raise RefusedError("EEXIST")
    kernel.schedule(_expiry(entry))
    kind = M.SPDUPDATE if request.type == M.SPDUPDATE else M.SPDADD
    kernel.broadcast(_answer(kernel, request, kind, entry, 3), Receivers.ALL)


def delete(kernel: EmbeddedKernel, request: Request) -> None:
    """SPDDELETE: by selector and direction."""
    wanted, _, _ = _directed(kernel, request)
    entry = kernel.spd.find(wanted.identity)
    if entry is None:
        raise RefusedError("ENOENT")
    _remove(kernel, entry, "deleted")
    kernel.broadcast(_answer(kernel, request, M.SPDDELETE, entry, 1), Receivers.ALL)


def get(kernel: EmbeddedKernel, request: Request) -> None:
    """SPDGET and SPDDELETE2: by id."""
    raw = request.raw(X.POLICY)
    if not raw:
        raise RefusedError("EINVAL")
    id = kernel.wire.read_policy(raw)[2]
    if id & 7 >= Direction.FWD:
        raise RefusedError("EINVAL")
    entry = kernel.spd.by_id(id)
    if entry is None:
        raise RefusedError("ENOENT")
    if request.type == M.SPDGET:
        references = 2 + _timer_runs(entry, kernel.now())
        answer = _answer(kernel, request, M.SPDGET, entry, references)
        kernel.broadcast(answer, Receivers.SENDER, request.channel)
        return
    _remove(kernel, entry, "deleted")
    kernel.broadcast(_answer(kernel, request, M.SPDDELETE2, entry, 1), Receivers.ALL)


def flush(kernel: EmbeddedKernel, request: Request) -> None:
    """SPDFLUSH: the sender hears of it once, and once more with everybody else when there was something to flush."""
    entries = list(kernel.spd)
    for entry in entries:
        _remove(kernel, entry, "flushed")
    answer = kernel.wire.answer(request)
    kernel.broadcast(answer, Receivers.SENDER, request.channel)
    if entries:
        notice = kernel.wire.answer(request, satype=0)
        kernel.broadcast(notice, Receivers.ALL)


def _remove(kernel: EmbeddedKernel, entry: Entry, step: str) -> None:
    kernel.spd.unlink(entry)
    kernel.step(step)


def dump_bodies(kernel: EmbeddedKernel) -> Iterator[tuple[int, int, bytes, int]]:
    """What stood in the database when the dump began, without what was deleted or replaced since."""
    for entry in kernel.spd.newest_first():
        if not entry.dead:
            yield 0, 1 + _timer_runs(entry, kernel.now()), _body(kernel, entry), entry.length_error


def expire(kernel: EmbeddedKernel, now: float) -> float:
    """Remove policies past a hard limit, in silence (af_key tells nobody); when the next one is due."""
    for entry in list(kernel.spd):
        if _expiry(entry) <= now:
            _remove(kernel, entry, "expired")
    return min(map(_expiry, kernel.spd), default=inf)


def _expiry(entry: Entry) -> float:
    """When its hard limit is reached: of age, or of idleness."""
    if entry.hard is None:
        return inf
    age = due(entry.created, entry.hard.addtime) if entry.hard.addtime else inf
    idle = due(entry.used or entry.created, entry.hard.usetime) if entry.hard.usetime else inf
    return min(age, idle)
