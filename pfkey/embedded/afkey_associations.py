"""Linux's SAs: GETSPI to FLUSH, the larval ones, EXPIRE and ACQUIRE (af_key.c, xfrm_state.c of 6.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import inf
from typing import TYPE_CHECKING

from ..constants import ExtensionType as X
from ..constants import MessageType as M
from ..constants import Mode, SAState, SAType
from .afkey_policies import due, pair, read_context, read_limits
from .dialect import Receivers
from .profiles import Profile
from .sad import NATT, Association
from .wire import Endpoint, Limits, RefusedError, Request

if TYPE_CHECKING:
    from .kernel import EmbeddedKernel

__all__ = [
    "acquire_failed",
    "add",
    "association_key",
    "body_of",
    "delete",
    "dump_bodies",
    "expiries",
    "flush",
    "get",
    "getspi",
    "in_shape_of",
    "new_larval",
    "next_expiry",
    "satype_of",
]

_FILTER = X.FILTER & 0xFF
_ANY_PROTOCOL = 255
_PROTOCOLS = {SAType.UNSPEC: _ANY_PROTOCOL, SAType.AH: 51, SAType.ESP: 50, SAType.IPCOMP: 108}
_SATYPES = {51: SAType.AH, 50: SAType.ESP, 108: SAType.IPCOMP}
_MODES = {0: Mode.TRANSPORT, 1: Mode.TRANSPORT, 2: Mode.TUNNEL, 3: Mode.BEET}
_FLAGS = 0x20000000 | 0x40000000 | 0x80000000
_AUTHENTICATION_MAXIMUM, _ENCRYPTION_MAXIMUM, _COMPRESSION_MAXIMUM = 251, 253, 4
_NULL_AUTHENTICATION, _NULL_ENCRYPTION = 251, 11
_LARGEST_WINDOW = 32


def association_key(profile: Profile, association: Association) -> tuple[object, ...]:
    """An SPI is unique for a destination and a protocol."""
    end = association.destination
    return (end.version, end.address, association.spi, association.protocol)


def _protocol(request: Request) -> int:
    """The protocol number of the SA type, 255 for none; 0 for a type that has none."""
    return _PROTOCOLS.get(SAType(request.satype), 0) if request.satype in SAType._value2member_map_ else 0


def satype_of(protocol: int) -> int:
    """The SA type of a protocol number, 0 for one that has none."""
    return _SATYPES.get(protocol, SAType.UNSPEC)


def _sa2(kernel: EmbeddedKernel, request: Request) -> tuple[int, int]:
    if X.SA2 not in request:
        return Mode.TRANSPORT, 0
    mode, reqid = kernel.wire.read_sa2(request.raw(X.SA2))
    if mode not in _MODES:
        raise RefusedError("EINVAL")
    return _MODES[mode], reqid


# What a message about an SA holds.


def body_of(kernel: EmbeddedKernel, sa: Association, *, keys: bool = True, limits: str = "hard soft") -> bytes:
    """Of every message about an SA: SA, limits, current, the two addresses, selector, keys, SA2, NAT-T."""
    wire = kernel.wire
    parts = [wire.sa(sa.spi, sa.replay, sa.state, auth=sa.auth, encrypt=sa.encrypt, flags=sa.flags)]
    if "hard" in limits:
        parts.append(wire.lifetime(X.LIFETIME_HARD, sa.hard or Limits()))
    if "soft" in limits:
        parts.append(wire.lifetime(X.LIFETIME_SOFT, sa.soft or Limits()))
    parts.append(wire.lifetime(X.LIFETIME_CURRENT, sa.current))
    width = 32 if sa.source.version == 4 else 128
    for kind, end in ((X.ADDRESS_SRC, sa.source), (X.ADDRESS_DST, sa.destination)):
        parts.append(wire.address(kind, wire.sockaddr(end.version, end.address), 0, width))
    if sa.proxy is not None:
        protocol, prefixlen, end = sa.proxy
        parts.append(wire.address(X.ADDRESS_PROXY, wire.sockaddr(end.version, end.address), protocol, prefixlen))
    if keys and sa.auth_key:
        parts.append(wire.key(X.KEY_AUTH, *sa.auth_key))
    if keys and sa.encrypt_key:
        parts.append(wire.key(X.KEY_ENCRYPT, *sa.encrypt_key))
    parts.append(wire.sa2(sa.mode, sa.reqid))
    if sa.natt is not None:
        parts.append(wire.small(X.NAT_T_TYPE, bytes((sa.natt.type, 0, 0, 0))))
        parts.append(wire.port(X.NAT_T_SPORT, sa.natt.source_port))
        parts.append(wire.port(X.NAT_T_DPORT, sa.natt.destination_port))
    return b"".join([*parts, sa.context])


def _tell(kernel: EmbeddedKernel, request: Request, sa: Association, receivers: Receivers) -> None:
    message = kernel.wire.answer(request, body_of(kernel, sa), satype=sa.satype)
    kernel.broadcast(message, receivers, request.channel if receivers is Receivers.SENDER else None)


# GETSPI.


def getspi(kernel: EmbeddedKernel, request: Request) -> None:
    """A larval SA with an SPI; after the checks of address and type it stays even when no SPI is found."""
    source, destination = pair(kernel, request)
    protocol = _protocol(request)
    if not protocol:
        raise RefusedError("EINVAL")
    kind = _sa2(kernel, request)
    sa = _larval_by_seq(kernel, request.seq, protocol=None, destination=destination)
    if sa is None:
        sa = _larval_for(kernel, protocol, (source, destination), kind)
    if sa is None:
        sa = new_larval(kernel, protocol, (source, destination), kind)
    low, high = 0x100, 0x0FFFFFFF
    if X.SPIRANGE in request:
        low, high = kernel.wire.read_range(request.raw(X.SPIRANGE))
    if sa.satype == SAType.UNSPEC or low > high or (sa.satype == SAType.IPCOMP and high > 0xFFFF):
        raise RefusedError("EINVAL")
    if not sa.spi:
        spi = _free_spi(kernel, sa, low, high)
        if not spi:
            raise RefusedError("ENOENT")
        kernel.sad.give_spi(sa, spi)
    _tell(kernel, request, sa, Receivers.SENDER)


def _free_spi(kernel: EmbeddedKernel, sa: Association, low: int, high: int) -> int:
    """An SPI of the range that is free for this destination and protocol, 0 when there is none."""
    end = sa.destination

    def free(spi: int) -> bool:
        return kernel.sad.find(end.version, end.address, spi, sa.protocol) is None

    for _ in range(64):
        spi = low if low == high else kernel.choose_spi(low, high)
        if spi and free(spi):
            return spi
    return next((spi for spi in range(max(low, 1), high + 1) if free(spi)), 0)


def new_larval(
    kernel: EmbeddedKernel, protocol: int, between: tuple[Endpoint, Endpoint], kind: tuple[int, int], seq: int = 0
) -> Association:
    """An entry that waits for its SA; `kind` is mode and reqid."""
    now = kernel.now()
    sa = Association(
        protocol=protocol,
        satype=satype_of(protocol),
        source=between[0],
        destination=between[1],
        spi=0,
        mode=kind[0],
        reqid=kind[1],
        created=now,
        hard=Limits(addtime=kernel.profile.larval_seconds),
        seq=seq,
    )
    kernel.sad.add(sa)
    kernel.schedule(now + kernel.profile.larval_seconds)
    return sa


def _larval_by_seq(
    kernel: EmbeddedKernel, seq: int, *, protocol: int | None, destination: Endpoint | None
) -> Association | None:
    """The larval SA that an ACQUIRE with this number asked for."""
    for sa in kernel.sad.waiting():
        if seq and sa.seq == seq:
            fits = destination is None or sa.destination.address == destination.address
            return sa if fits and protocol in (None, sa.protocol) else None
    return None


def _larval_for(
    kernel: EmbeddedKernel, protocol: int, between: tuple[Endpoint, Endpoint], kind: tuple[int, int]
) -> Association | None:
    """A larval SA without SPI between these two (find_acq)."""
    source, destination = between
    for sa in kernel.sad.waiting():
        same = (sa.protocol, sa.mode, sa.reqid, sa.spi) == (protocol, *kind, 0)
        if same and sa.source.address == source.address and sa.destination.address == destination.address:
            return sa
    return None


# ADD and UPDATE.


def _from_request(kernel: EmbeddedKernel, request: Request) -> Association:
    """The SA that the request describes (pfkey_msg2xfrm_state), in that function's order of errors."""
    if X.SA not in request:
        raise RefusedError("EINVAL")
    source, destination = pair(kernel, request)
    if request.satype == SAType.ESP and X.KEY_ENCRYPT not in request:
        raise RefusedError("EINVAL")
    if request.satype == SAType.AH and X.KEY_AUTH not in request:
        raise RefusedError("EINVAL")
    if (X.LIFETIME_HARD in request) != (X.LIFETIME_SOFT in request):
        raise RefusedError("EINVAL")
    protocol = _protocol(request)
    spi, replay, _, auth, encrypt, flags = kernel.wire.read_sa(request.raw(X.SA))
    compressed = request.satype == SAType.IPCOMP
    largest = _COMPRESSION_MAXIMUM if compressed else _ENCRYPTION_MAXIMUM
    if not protocol or auth > _AUTHENTICATION_MAXIMUM or encrypt > largest:
        raise RefusedError("EINVAL")
    auth_key = _key(kernel, request, X.KEY_AUTH, optional=auth == _NULL_AUTHENTICATION)
    encrypt_key = _key(kernel, request, X.KEY_ENCRYPT, optional=encrypt == _NULL_ENCRYPTION)
    if auth and auth not in (row[0] for row in kernel.profile.authentication):
        raise RefusedError("ENOSYS")
    known = kernel.profile.compression if compressed else tuple(row[0] for row in kernel.profile.encryption)
    if encrypt and encrypt not in known:
        raise RefusedError("ENOSYS")
    mode, reqid = _sa2(kernel, request)
    sa = Association(
        protocol=protocol,
        satype=request.satype,
        source=source,
        destination=destination,
        spi=spi,
        mode=mode,
        reqid=reqid,
        created=kernel.now(),
        state=SAState.MATURE,
        replay=min(replay, _LARGEST_WINDOW),
        auth=auth,
        encrypt=encrypt,
        flags=flags & _FLAGS,
        auth_key=auth_key if auth and auth_key and auth_key[0] else None,
        encrypt_key=encrypt_key if encrypt and not compressed and encrypt_key and encrypt_key[0] else None,
        hard=read_limits(kernel, request, X.LIFETIME_HARD),
        soft=read_limits(kernel, request, X.LIFETIME_SOFT),
        natt=_natt(kernel, request),
        proxy=_proxy(kernel, request, source, mode),
        seq=request.seq,
        context=read_context(request),
    )
    _check_transform(kernel, sa)
    return sa


def _key(kernel: EmbeddedKernel, request: Request, kind: int, *, optional: bool) -> tuple[int, bytes] | None:
    if kind not in request:
        return None
    key = kernel.wire.read_key(request.raw(kind))
    if not key[0] and not optional:
        raise RefusedError("EINVAL")
    return key


def _natt(kernel: EmbeddedKernel, request: Request) -> NATT | None:
    if X.NAT_T_TYPE not in request:
        return None
    source, destination = (
        kernel.wire.read_port(request.raw(kind)) if kind in request else 0 for kind in (X.NAT_T_SPORT, X.NAT_T_DPORT)
    )
    return NATT(request.raw(X.NAT_T_TYPE)[4], source, destination)


def _proxy(kernel: EmbeddedKernel, request: Request, source: Endpoint, mode: int) -> tuple[int, int, Endpoint] | None:
    """The selector's source as replies show it: 0.0.0.0/0 by default, and nothing when it is the SA's own source."""
    if X.ADDRESS_PROXY not in request:
        end = kernel.wire.endpoint(kernel.wire.sockaddr(source.version, 0))
        assert end is not None
        return (_ANY_PROTOCOL, 0, end) if source.address else None
    _, prefixlen, given = kernel.wire.read_address(request.raw(X.ADDRESS_PROXY))
    if given is None or given == source:
        return None
    if given.version != source.version and mode == Mode.TRANSPORT:
        raise RefusedError("EPROTONOSUPPORT")
    # A tunnel takes the other family, and shows the address's bytes in the shape of its own.
    return (_ANY_PROTOCOL, prefixlen, in_shape_of(source, given))


def in_shape_of(model: Endpoint, end: Endpoint) -> Endpoint:
    """The bytes of one address as an address of the model's family."""
    packed = end.packed.ljust(16, b"\0")[: len(model.packed)]
    return Endpoint(model.version, int.from_bytes(packed, "big"), 0, 0, b"")


def _check_transform(kernel: EmbeddedKernel, sa: Association) -> None:
    """What initialising the transform refuses (xfrm_init_state)."""
    if sa.satype == SAType.UNSPEC:
        raise RefusedError("EPROTONOSUPPORT")
    if sa.satype == SAType.AH and (not sa.auth or sa.natt):
        raise RefusedError("EINVAL")
    if sa.satype == SAType.IPCOMP and (not sa.encrypt or sa.natt):
        raise RefusedError("EINVAL")
    if sa.satype == SAType.ESP:
        if not sa.encrypt or (sa.natt and sa.natt.type not in (1, 2)):
            raise RefusedError("EINVAL")
        _, _, low, high = next(row for row in kernel.profile.encryption if row[0] == sa.encrypt)
        bits = 8 * len(sa.encrypt_key[1]) if sa.encrypt_key else 0
        if not low <= bits <= high or (bits - low) % 64:
            raise RefusedError("EINVAL")


def add(kernel: EmbeddedKernel, request: Request) -> None:
    """ADD, and UPDATE: it makes a larval SA the real one, and changes only limits and NAT-T ports of a mature one."""
    sa = _from_request(kernel, request)
    old = kernel.sad.find(*association_key(kernel.profile, sa)) if sa.spi else None
    if request.type == M.ADD:
        if old is not None:
            raise RefusedError("EEXIST")
        old = _larval_by_seq(kernel, request.seq, protocol=sa.protocol, destination=sa.destination)
        old = old or _larval_for(kernel, sa.protocol, (sa.source, sa.destination), (sa.mode, sa.reqid))
        _insert(kernel, sa, old)
    elif old is None:
        raise RefusedError("ESRCH")
    elif old.state == SAState.LARVAL:
        _insert(kernel, sa, old)
    else:
        _refresh(kernel, old, sa)
    _tell(kernel, request, sa, Receivers.ALL)


def _insert(kernel: EmbeddedKernel, sa: Association, larval: Association | None) -> None:
    if larval is not None:
        kernel.sad.remove(larval)
    kernel.sad.add(sa)
    kernel.schedule(next_expiry(sa))


def _refresh(kernel: EmbeddedKernel, old: Association, new: Association) -> None:
    """A mature SA keeps its keys, whatever the reply says."""
    if (old.natt is None) != (new.natt is None) or (old.natt and new.natt and old.natt.type != new.natt.type):
        raise RefusedError("EINVAL")
    old.natt, old.hard, old.soft, old.state = new.natt, new.hard, new.soft, SAState.MATURE
    kernel.schedule(next_expiry(old))
    new.state = SAState.DEAD


# GET, DELETE, FLUSH, DUMP.


def _named(kernel: EmbeddedKernel, request: Request) -> Association:
    """The SA that SA and DST name; SRC must be there and is not looked at."""
    if X.SA not in request:
        raise RefusedError("EINVAL")
    _, destination = pair(kernel, request)
    spi = kernel.wire.read_sa(request.raw(X.SA))[0]
    sa = kernel.sad.find(destination.version, destination.address, spi, _protocol(request)) if spi else None
    if sa is None:
        raise RefusedError("ESRCH")
    return sa


def get(kernel: EmbeddedKernel, request: Request) -> None:
    """One SA, to the sender."""
    _tell(kernel, request, _named(kernel, request), Receivers.SENDER)


def delete(kernel: EmbeddedKernel, request: Request) -> None:
    """Remove one SA and show it to everybody."""
    sa = _named(kernel, request)
    kernel.sad.remove(sa)
    sa.state = SAState.DEAD
    _tell(kernel, request, sa, Receivers.ALL)


def flush(kernel: EmbeddedKernel, request: Request) -> None:
    """Remove the SAs of a type; answered twice when there were any."""
    protocol = _protocol(request)
    if not protocol:
        raise RefusedError("EINVAL")
    flushed = [sa for sa in kernel.sad if protocol in (_ANY_PROTOCOL, sa.protocol)]
    for sa in flushed:
        kernel.sad.remove(sa)
    answer = kernel.wire.answer(request)
    kernel.broadcast(answer, Receivers.SENDER, request.channel)
    if flushed:
        kernel.broadcast(answer, Receivers.ALL)


def dump_bodies(kernel: EmbeddedKernel, request: Request) -> Iterator[tuple[int, int, bytes, int]]:
    """The SAs of a type, newest first, those that X_FILTER lets through."""
    protocol = _protocol(request)
    if not protocol:
        raise RefusedError("EINVAL")
    wanted = _filter(kernel, request)
    snapshot = [sa for sa in kernel.sad.newest_first() if protocol in (_ANY_PROTOCOL, sa.protocol) and wanted(sa)]
    return ((sa.satype, 0, body_of(kernel, sa), 0) for sa in snapshot if sa in kernel.sad)


def _filter(kernel: EmbeddedKernel, request: Request) -> Callable[[Association], bool]:
    """SADB_X_EXT_FILTER: two prefixes in network order and a family, of which 0 means any."""
    if _FILTER not in request:
        return lambda _: True
    raw = request.raw(_FILTER)
    family = {kernel.abi.af_inet: 4, kernel.abi.af_inet6: 6}.get(kernel.wire.u16.unpack_from(raw, 36)[0], 0)
    if max(raw[38], raw[39]) > 128:
        raise RefusedError("EINVAL")

    def wanted(sa: Association) -> bool:
        if family and sa.source.version != family:
            return False
        return _within(sa.source, raw[4:20], raw[38]) and _within(sa.destination, raw[20:36], raw[39])

    return wanted


def _within(end: Endpoint, address: bytes, prefixlen: int) -> bool:
    width = 32 if end.version == 4 else 128
    shift = max(width - prefixlen, 0)
    return end.address >> shift == int.from_bytes(address[: width // 8], "big") >> shift


def expiries(sa: Association) -> list[tuple[float, bool]]:
    """When an SA expires, and whether for good."""
    moments = []
    for limits, hard in ((sa.hard, True), (sa.soft, False)):
        if limits is None or (not hard and sa.state == SAState.DYING):
            continue
        if limits.addtime:
            moments.append((due(sa.created, limits.addtime), hard))
        if limits.usetime:
            moments.append((due(sa.used or inf, limits.usetime), hard))
    return moments


def next_expiry(sa: Association) -> float:
    """When the next limit is reached."""
    return min((when for when, _ in expiries(sa)), default=inf)


def acquire_failed(kernel: EmbeddedKernel, request: Request) -> None:
    """ACQUIRE from a key daemon that gave up: the larval SA is dead, and there is no reply."""
    if len(request.data) > 16:
        raise RefusedError("EOPNOTSUPP")
    sa = _larval_by_seq(kernel, request.seq, protocol=None, destination=None) if request.errno else None
    if sa is not None:
        sa.state = SAState.DEAD
