"""The SAs of KAME's heirs: GETSPI to FLUSH, and what a dump shows of them (key.c)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING

from ..constants import ExtensionType as X
from ..constants import Mode, SAState, SAType, UpperProtocol
from .dialect import Receivers
from .kame_policies import ends, gather, send_dump, tell
from .profiles import Profile
from .sad import NATT, Association
from .wire import Endpoint, Limits, RefusedError, Request

if TYPE_CHECKING:
    from .kernel import EmbeddedKernel

__all__ = [
    "SATYPES",
    "add",
    "addresses",
    "association_key",
    "delete",
    "dump",
    "flush",
    "get",
    "getspi",
    "index",
    "next_look",
    "reached",
    "start",
    "update",
]

_PROTOCOLS = {SAType.AH: 51, SAType.ESP: 50, SAType.IPCOMP: 108, SAType.TCPSIGNATURE: 6, SAType.UNSPEC: 255}
SATYPES = {51: SAType.AH, 50: SAType.ESP, 108: SAType.IPCOMP, 6: SAType.TCPSIGNATURE}
_OAI, _OAR = X.NAT_T_OAI & 0xFF, X.NAT_T_OAR & 0xFF
_SA_REPLAY, _NEW_SRC, _NEW_DST = X.SA_REPLAY & 0xFF, X.NEW_ADDRESS_SRC & 0xFF, X.NEW_ADDRESS_DST & 0xFF
_REPLY = (
    X.SA, X.SA2, X.ADDRESS_SRC, X.ADDRESS_DST, X.LIFETIME_HARD, X.LIFETIME_SOFT, X.IDENTITY_SRC, X.IDENTITY_DST,
    X.NAT_T_TYPE, X.NAT_T_SPORT, X.NAT_T_DPORT, _OAI, _OAR, _NEW_SRC, _NEW_DST,
)  # fmt: skip
_FLAGS = 0x0FFF
_OLD_ESP = 0x1
_CHACHA = "chacha20-poly1305"
_COMBINED = {"aes-gcm-8", "aes-gcm-12", "aes-gcm-16", "aes-gmac"}
_SALTED = {"aes-ctr", _CHACHA, *_COMBINED}
_SALT_BITS = 32
_GMAC = {128: "aes-128-gmac", 192: "aes-192-gmac", 256: "aes-256-gmac"}
"""Bits of an AES-GCM key -> the authentication that the kernel notes down for it, where it has a number for it."""
_SMALLEST_SPI = 256


def association_key(profile: Profile, association: Association) -> tuple[object, ...]:
    """An SPI is unique whatever the addresses and the protocol; TCP-MD5 keys are found by address.

    Up to FreeBSD 11.0 it is unique for a protocol and two addresses.  (Its kernel tells two SAs apart that differ in
    nothing but mode or reqid, and finds the first of them; this one does not take the second.)
    """
    if association.protocol == _PROTOCOLS[SAType.TCPSIGNATURE]:
        return (*association.group[3:], "tcp")
    if profile.spi_for_each_pair:
        return (association.protocol, *association.group[3:], association.spi)
    return (association.spi,)


def _find(kernel: EmbeddedKernel, wanted: Association) -> Association | None:
    return kernel.sad.find(*association_key(kernel.profile, wanted))


def _protocol(request: Request) -> int:
    protocol = _PROTOCOLS.get(SAType(request.satype), 0)
    if not protocol:
        raise RefusedError("EINVAL")
    return protocol


def index(kernel: EmbeddedKernel, request: Request) -> Association:
    """An SA that is still only its group: protocol, mode, reqid and the two addresses, without ports."""
    source, destination = ends(kernel, request)
    mode, reqid = kernel.wire.read_sa2(request.raw(X.SA2)) if X.SA2 in request else (Mode.ANY, 0)
    return Association(
        protocol=_protocol(request),
        satype=request.satype,
        source=_without_port(kernel, source),
        destination=_without_port(kernel, destination),
        spi=0,
        mode=mode,
        reqid=reqid,
        created=kernel.now(),
        seq=request.seq,
        pid=request.pid,
    )


def _without_port(kernel: EmbeddedKernel, end: Endpoint) -> Endpoint:
    return end._replace(port=0, raw=end.raw[:2] + bytes(2) + end.raw[4:])


def _check_extensions(request: Request) -> None:
    """What ADD and UPDATE need: SA and both addresses, and of the two lifetimes both or none."""
    if any(kind not in request for kind in (X.SA, X.ADDRESS_SRC, X.ADDRESS_DST)):
        raise RefusedError("EINVAL")
    if (X.LIFETIME_HARD in request) != (X.LIFETIME_SOFT in request):
        raise RefusedError("EINVAL")


def _check_keys(request: Request) -> None:
    needed = {SAType.ESP: X.KEY_ENCRYPT, SAType.AH: X.KEY_AUTH}
    if request.satype in needed and needed[SAType(request.satype)] not in request:
        raise RefusedError("EINVAL")


# GETSPI.


def getspi(kernel: EmbeddedKernel, request: Request) -> None:
    """A larval SA; the reply is SA (of which the real kernel fills in the SPI only) and the addresses as sent."""
    sa = index(kernel, request)
    sa.spi = _free_spi(kernel, sa, request)
    if not sa.spi:
        raise RefusedError("EEXIST")
    _check_spi(sa)
    _file(kernel, sa)
    kernel.schedule(next_look(kernel, sa))
    body = (
        kernel.wire.sa(sa.spi, 0, 0, auth=0, encrypt=0, flags=0)
        + request.raw(X.ADDRESS_SRC)
        + request.raw(X.ADDRESS_DST)
    )
    answer = kernel.wire.answer(request, body, reserved=request.reserved)
    tell(kernel, request, answer, Receivers.SENDER)


def _free_spi(kernel: EmbeddedKernel, sa: Association, request: Request) -> int:
    low, high = _SMALLEST_SPI, 0x0FFFFFFF
    if X.SPIRANGE in request:
        low, high = kernel.wire.read_range(request.raw(X.SPIRANGE))
    if sa.satype == SAType.IPCOMP:
        low, high = min(low, 0xFFFF), min(high, 0xFFFF)
    if low > high:
        low, high = high, low
    for _ in range(1000):  # net.key.spi_trycnt
        spi = low if low == high else kernel.choose_spi(low, high)
        if spi and not _taken(kernel, spi):
            return spi
        if low == high:
            break
    return 0


def _taken(kernel: EmbeddedKernel, spi: int) -> bool:
    """GETSPI gives nobody an SPI that any SA has."""
    if kernel.profile.spi_for_each_pair:
        return any(sa.spi == spi for sa in kernel.sad)
    return kernel.sad.find(spi) is not None


def _check_spi(sa: Association) -> None:
    if sa.satype in (SAType.AH, SAType.ESP) and sa.spi < _SMALLEST_SPI:
        raise RefusedError("EINVAL")


def _file(kernel: EmbeddedKernel, sa: Association) -> None:
    """Into the SAD; an SA that answers an ACQUIRE ends the waiting for it."""
    kernel.sad.add(sa)
    for key in [key for key, record in kernel.acquires.items() if sa.seq and record[0] == sa.seq]:
        del kernel.acquires[key]


# ADD and UPDATE.


def _fill(kernel: EmbeddedKernel, request: Request, sa: Association) -> Association:
    """The SA with what the request says of it (key_setsaval), in that function's order of errors."""
    spi, replay, _, auth, encrypt, flags = kernel.wire.read_sa(request.raw(X.SA))
    filled = replace(sa, spi=spi, state=SAState.MATURE, auth=auth, encrypt=encrypt, flags=flags)
    if flags & ~_FLAGS:
        raise RefusedError("EINVAL")
    filled.natt = _natt(kernel, request)
    filled.has_window = not flags & _OLD_ESP
    filled.replay = replay if filled.has_window else 0
    if _SA_REPLAY in request and filled.has_window:
        packets = kernel.wire.u32.unpack_from(request.raw(_SA_REPLAY), 4)[0]
        if packets > 0xFFFFFFFF - 32:
            raise RefusedError("EINVAL")
        filled.replay = (packets + 7) // 8
    for kind, allowed in ((X.KEY_AUTH, (SAType.AH, SAType.ESP, SAType.TCPSIGNATURE)), (X.KEY_ENCRYPT, _WITH_KEYS)):
        if kind in request and request.satype not in allowed:
            raise RefusedError("EINVAL")
    filled.auth_key = _key(kernel, request, X.KEY_AUTH, empty=auth == kernel.abi.authentication["null"])
    compressed = request.satype == SAType.IPCOMP
    if compressed and len(request.raw(X.KEY_ENCRYPT)) > 8:
        raise RefusedError("EINVAL")
    encrypt_key = _key(kernel, request, X.KEY_ENCRYPT, empty=encrypt == kernel.abi.encryption["null"] or compressed)
    filled.encrypt_key = None if compressed else encrypt_key
    _CHECKS[SAType(request.satype)](kernel, filled)
    filled.hard = _limits(kernel, request, X.LIFETIME_HARD)
    filled.soft = _limits(kernel, request, X.LIFETIME_SOFT)
    return filled


_WITH_KEYS = (SAType.ESP, SAType.IPCOMP)


def _key(kernel: EmbeddedKernel, request: Request, kind: int, *, empty: bool) -> tuple[int, bytes] | None:
    if kind not in request:
        return None
    raw = request.raw(kind)
    if len(raw) == 8 and not empty:
        raise RefusedError("EINVAL")
    bits, data = kernel.wire.read_key(raw)
    if len(raw) < 8 + len(data):
        raise RefusedError("EINVAL")
    return bits, data


def _limits(kernel: EmbeddedKernel, request: Request, kind: int) -> Limits | None:
    return kernel.wire.read_lifetime(request.raw(kind)) if kind in request else None


def _natt(kernel: EmbeddedKernel, request: Request) -> NATT | None:
    """Type and both ports, or it is overlooked."""
    if any(kind not in request for kind in (X.NAT_T_TYPE, X.NAT_T_SPORT, X.NAT_T_DPORT)):
        return None
    source, destination = (kernel.wire.read_port(request.raw(kind)) for kind in (X.NAT_T_SPORT, X.NAT_T_DPORT))
    encapsulation = request.raw(X.NAT_T_TYPE)[4]
    if encapsulation != 2 or not source or not destination or request.satype != SAType.ESP:
        raise RefusedError("EINVAL")
    return NATT(encapsulation, source, destination, request.raw(_OAI) + request.raw(_OAR))


def _in_table(rows: Iterable[tuple[int, int, int, int]], number: int) -> tuple[int, int]:
    """Least and most key bits of an algorithm; EINVAL for one that is not there."""
    for row in rows:
        if row[0] == number:
            return row[2], row[3]
    raise RefusedError("EINVAL")


def _check_authentication(kernel: EmbeddedKernel, sa: Association) -> None:
    _, most = _in_table(kernel.profile.authentication, sa.auth)
    if sa.auth_key is None or sa.auth_key[0] > most:  # null too wants a key extension, if an empty one
        raise RefusedError("EINVAL")


def _check_encryption(kernel: EmbeddedKernel, sa: Association) -> None:
    least, most = _in_table(kernel.profile.encryption, sa.encrypt)
    name = kernel.abi.encryption_names.get(sa.encrypt, "")
    bits = (sa.encrypt_key[0] if sa.encrypt_key else 0) - (_SALT_BITS if name in _SALTED else 0)
    if not least <= bits <= most:
        raise RefusedError("EINVAL")
    if sa.auth:
        _check_authentication(kernel, sa)
    if name in _COMBINED:
        if bits not in _GMAC:
            raise RefusedError("EINVAL")
        sa.auth = kernel.abi.authentication.get(_GMAC[bits], sa.auth)
    elif name == _CHACHA:
        sa.auth = kernel.abi.authentication.get(_CHACHA, sa.auth)


def _check_compression(kernel: EmbeddedKernel, sa: Association) -> None:
    if sa.encrypt not in kernel.profile.compression:
        raise RefusedError("EINVAL")


def _check_tcp(kernel: EmbeddedKernel, sa: Association) -> None:
    bits = sa.auth_key[0] if sa.auth_key else 0
    if not kernel.profile.tcp_signature or sa.auth != kernel.abi.authentication["tcp-md5"] or not 8 <= bits <= 640:
        raise RefusedError("EINVAL")


_CHECKS = {
    SAType.AH: _check_authentication,
    SAType.ESP: _check_encryption,
    SAType.IPCOMP: _check_compression,
    SAType.TCPSIGNATURE: _check_tcp,
}


def add(kernel: EmbeddedKernel, request: Request) -> None:
    """ADD: the reply is the request without its keys, to everybody."""
    _check_extensions(request)
    _check_keys(request)
    sa = index(kernel, request)
    sa.spi = kernel.wire.read_sa(request.raw(X.SA))[0]
    if _find(kernel, sa) is not None:
        raise RefusedError("EEXIST")
    _check_spi(sa)
    sa = _fill(kernel, request, sa)
    _file(kernel, sa)
    kernel.schedule(next_look(kernel, sa))
    tell(kernel, request, gather(kernel, request, *_REPLY), Receivers.ALL)


def update(kernel: EmbeddedKernel, request: Request) -> None:
    """UPDATE: completes a larval SA; of a mature one it changes lifetimes and addresses, and refuses keys.

    Up to FreeBSD 11.0 it makes either anew.
    """
    _check_extensions(request)
    wanted = index(kernel, request)
    wanted.spi = kernel.wire.read_sa(request.raw(X.SA))[0]
    sa = _find(kernel, wanted)
    if sa is None:
        raise RefusedError(kernel.profile.absent_update)
    if sa.pid != request.pid:
        raise RefusedError("EINVAL")
    if not _same_index(sa, wanted):
        raise RefusedError(kernel.profile.absent_association)
    if sa.state == SAState.LARVAL or kernel.profile.update_refills:
        _check_keys(request)
        filled = _fill(kernel, request, sa)
        kernel.sad.remove(sa)
        kernel.sad.add(filled)
        sa = filled
    else:
        if X.KEY_ENCRYPT in request or X.KEY_AUTH in request:
            raise RefusedError("EINVAL")
        if X.LIFETIME_HARD in request:
            sa.hard, sa.soft = _limits(kernel, request, X.LIFETIME_HARD), _limits(kernel, request, X.LIFETIME_SOFT)
        _move(kernel, request, sa)
    kernel.schedule(next_look(kernel, sa))
    tell(kernel, request, gather(kernel, request, *_REPLY), Receivers.ALL)


def _same_index(sa: Association, wanted: Association) -> bool:
    """The SA's own mode ANY fits any mode, a reqid of 0 in the message any reqid (CMP_MODE_REQID)."""
    return (
        sa.protocol == wanted.protocol
        and sa.mode in (Mode.ANY, wanted.mode)
        and wanted.reqid in (0, sa.reqid)
        and sa.group[3:] == wanted.group[3:]
    )


def _move(kernel: EmbeddedKernel, request: Request, sa: Association) -> None:
    """NEW_ADDRESS_SRC and _DST give the SA other end points: it is filed anew."""
    moved = {}
    for kind, name in ((_NEW_SRC, "source"), (_NEW_DST, "destination")):
        if kind in request:
            end = kernel.wire.read_address(request.raw(kind))[2]
            if end is None or end.version != sa.source.version:
                raise RefusedError("EINVAL")
            moved[name] = _without_port(kernel, end)
    natt = _natt(kernel, request)
    if moved:
        kernel.sad.remove(sa)
        sa.source, sa.destination = moved.get("source", sa.source), moved.get("destination", sa.destination)
        kernel.sad.add(sa)
    if natt is not None:
        sa.natt = natt


# GET, DELETE, FLUSH, DUMP.


def _named(kernel: EmbeddedKernel, request: Request) -> Association:
    """The SA with this SPI (or TCP-MD5 key with these addresses); protocol and addresses must be its own."""
    wanted = index(kernel, request)
    wanted.spi = kernel.wire.read_sa(request.raw(X.SA))[0]
    sa = _find(kernel, wanted)
    if sa is None or sa.protocol != wanted.protocol or sa.group[3:] != wanted.group[3:]:
        raise RefusedError(kernel.profile.absent_association)
    return sa


def get(kernel: EmbeddedKernel, request: Request) -> None:
    """One SA with its keys, to the sender."""
    if X.SA not in request:
        raise RefusedError("EINVAL")
    sa = _named(kernel, request)
    answer = kernel.wire.answer(request, body_of(kernel, sa), reserved=2)
    tell(kernel, request, answer, Receivers.SENDER)


def delete(kernel: EmbeddedKernel, request: Request) -> None:
    """One SA; without an SA extension every one between the two that is not larval, even if there is none."""
    wanted = index(kernel, request)
    if X.SA not in request:
        for sa in kernel.sad:
            same = sa.protocol == wanted.protocol and sa.group[3:] == wanted.group[3:]
            if same and sa.state != SAState.LARVAL:
                kernel.sad.remove(sa)
        tell(kernel, request, gather(kernel, request, X.ADDRESS_SRC, X.ADDRESS_DST), Receivers.ALL)
        return
    kernel.sad.remove(_named(kernel, request))
    tell(kernel, request, gather(kernel, request, X.SA, X.ADDRESS_SRC, X.ADDRESS_DST), Receivers.ALL)


def flush(kernel: EmbeddedKernel, request: Request) -> None:
    """The SAs of a type, larval ones too; success even when there are none."""
    protocol = _protocol(request)
    for sa in kernel.sad:
        if protocol in (_PROTOCOLS[SAType.UNSPEC], sa.protocol):
            kernel.sad.remove(sa)
    tell(kernel, request, gather(kernel, request), Receivers.ALL)


def dump(kernel: EmbeddedKernel, request: Request) -> None:
    """Counting down to 0."""
    protocol = _protocol(request)
    found = [sa for sa in kernel.sad.by_groups() if protocol in (_PROTOCOLS[SAType.UNSPEC], sa.protocol)]
    if not found:
        raise RefusedError("ENOENT")
    send_dump(kernel, request, ((sa.satype, body_of(kernel, sa)) for sa in found), len(found))


def body_of(kernel: EmbeddedKernel, sa: Association) -> bytes:
    """The SA as GET and DUMP show it (key_setdumpsa)."""
    wire = kernel.wire
    parts = start(kernel, sa)
    if sa.hard is not None:
        parts.append(wire.lifetime(X.LIFETIME_HARD, sa.hard))
    if sa.soft is not None:
        parts.append(wire.lifetime(X.LIFETIME_SOFT, sa.soft))
    parts += [wire.lifetime(X.LIFETIME_CURRENT, sa.current), addresses(kernel, sa)]
    if sa.auth_key:
        parts.append(wire.key(X.KEY_AUTH, *sa.auth_key))
    if sa.encrypt_key:
        parts.append(wire.key(X.KEY_ENCRYPT, *sa.encrypt_key))
    if sa.natt is not None:
        parts.append(wire.small(X.NAT_T_TYPE, bytes((sa.natt.type, 0, 0, 0))))
        parts.append(wire.port(X.NAT_T_SPORT, sa.natt.source_port))
        parts.append(wire.port(X.NAT_T_DPORT, sa.natt.destination_port))
        parts.append(sa.natt.originals)
    return b"".join(parts)


def start(kernel: EmbeddedKernel, sa: Association) -> list[bytes]:
    """SA, SA2 and, for a window that the SA extension cannot say, SA_REPLAY in packets."""
    wire = kernel.wire
    parts = [
        wire.sa(sa.spi, min(sa.replay, 255), sa.state, auth=sa.auth, encrypt=sa.encrypt, flags=sa.flags),
        wire.sa2(sa.mode, sa.reqid, 0),
    ]
    if sa.replay > 255:
        parts.append(wire.small(_SA_REPLAY, wire.u32.pack(sa.replay * 8)))
    return parts


def addresses(kernel: EmbeddedKernel, sa: Association) -> bytes:
    """Both addresses, with protocol 255."""
    wire, width = kernel.wire, 32 if sa.source.version == 4 else 128
    source = wire.address(X.ADDRESS_SRC, sa.source.raw, UpperProtocol.ANY, width)
    return source + wire.address(X.ADDRESS_DST, sa.destination.raw, UpperProtocol.ANY, width)


def reached(sa: Association, limits: Limits | None) -> float:
    """When it has these limits behind it; bytes when they were used up, packets are not limited."""
    if limits is None:
        return inf
    if 0 < limits.bytes < sa.octets:
        return sa.used
    return min(sa.created + (limits.addtime or inf), (sa.used or inf) + (limits.usetime or inf))


def next_look(kernel: EmbeddedKernel, sa: Association) -> float:
    """When it is worth looking at again: the kernel does so once a second, and only what is older than a limit goes."""
    if sa.state == SAState.LARVAL:
        return sa.created + kernel.profile.larval_seconds + 1
    soft = reached(sa, sa.soft) if sa.state == SAState.MATURE else inf
    return min(reached(sa, sa.hard), soft) + 1
