"""KAME's key.c as the BSDs and macOS have it: how it reads a message, whom it answers, which handler does the work."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..constants import ExtensionType as X
from ..constants import MessageType as M
from ..constants import PolicyScope, SAType
from . import kame_associations as associations
from . import kame_policies as policies
from . import kame_time as times
from .dialect import Receivers
from .kame_associations import association_key
from .kame_time import acquire, use
from .wire import HEADER_SIZE, RefusedError, Request, SendFailedError, UnansweredError

if TYPE_CHECKING:
    from .channel import EmbeddedChannel
    from .kernel import EmbeddedKernel

__all__ = [
    "acquire",
    "association_key",
    "expire",
    "promiscuous_copy",
    "receive",
    "refuse",
    "resume_dump",
    "use",
]

_TYPE_MAXIMUM = 22  # NetBSD and macOS go on to 23 and 26; what they have there is not modelled: EINVAL as well
_BSD = X.NAT_T_OAI >> 8
_SA_TYPES = (SAType.AH, SAType.ESP, SAType.IPCOMP, SAType.TCPSIGNATURE)
_UNSUPPORTED_TYPES = (SAType.RSVP, SAType.OSPFV2, SAType.RIPV2, SAType.MIP)
_NEED_SATYPE = (M.GETSPI, M.UPDATE, M.ADD, M.DELETE, M.GET, M.ACQUIRE, M.EXPIRE)
_REFUSE_SATYPE = (
    M.SPDADD, M.SPDDELETE, M.SPDGET, M.SPDFLUSH, M.SPDSETIDX, M.SPDUPDATE, M.SPDDELETE2,
)  # fmt: skip
_ADDRESSES = (
    X.ADDRESS_SRC, X.ADDRESS_DST, X.ADDRESS_PROXY, X.NAT_T_OAI & 0xFF, X.NAT_T_OAR & 0xFF, X.NEW_ADDRESS_SRC & 0xFF,
    X.NEW_ADDRESS_DST & 0xFF,
)  # fmt: skip
# Number -> (least, most) bytes; most 0 is no limit.  KMPRIVATE is not there: it counts as unknown.  So do macOS's own
# (20 to 29: statistics, interfaces, ranges of addresses), which this kernel does not model and so does not take.
_SIZES = {
    X.SA: (16, 16), X.LIFETIME_CURRENT: (32, 32), X.LIFETIME_HARD: (32, 32), X.LIFETIME_SOFT: (32, 32),
    X.KEY_AUTH: (8, 0), X.KEY_ENCRYPT: (8, 0), X.IDENTITY_SRC: (16, 0), X.IDENTITY_DST: (16, 0),
    X.SENSITIVITY: (16, 0), X.PROPOSAL: (8, 0), X.SUPPORTED_AUTH: (8, 0), X.SUPPORTED_ENCRYPT: (8, 0),
    X.SPIRANGE: (16, 16), X.POLICY: (16, 0), X.SA2: (16, 16), X.NAT_T_TYPE: (8, 8), X.NAT_T_SPORT: (8, 8),
    X.NAT_T_DPORT: (8, 8), X.NAT_T_FRAG & 0xFF: (8, 8), X.SA_REPLAY & 0xFF: (8, 8),
    **dict.fromkeys(_ADDRESSES, (8, 0)),
}  # fmt: skip
_KNOWN = {kind for kind in X if kind & 0xFF in _SIZES and kind >> 8 in (0, _BSD)}
"""What a number means where this code knows it: the common extensions, and FreeBSD's from 23 on."""


def receive(kernel: EmbeddedKernel, channel: EmbeddedChannel, data: bytes) -> None:
    """One send(): raises SendFailedError where the system call fails, else does the work and answers.

    ENOBUFS from here can come after the work: then the reply did not fit the sender's own receive buffer.
    """
    if len(data) > kernel.profile.send_buffer:
        raise SendFailedError("EMSGSIZE")
    if len(data) < HEADER_SIZE:
        raise SendFailedError("EINVAL")
    version, kind, errno, satype, words, reserved, seq, pid = kernel.wire.header.unpack_from(data)
    if words * 8 != len(data):
        raise SendFailedError("EINVAL")
    request = Request(bytearray(data), channel, version, kind, errno, satype, reserved, seq, pid)
    try:
        _check_header(kernel, request)
        _read_extensions(kernel, request)
        _check_satype(kernel, request)
        _check_addresses(kernel, request)
        _HANDLERS.get(kind, _unsupported)(kernel, request)
    except RefusedError as refused:
        request.overflowed |= not _echo(kernel, channel, request.data, refused.name)
    except UnansweredError:
        return
    if request.overflowed:
        raise SendFailedError("ENOBUFS")


def refuse(kernel: EmbeddedKernel, channel: EmbeddedChannel, data: bytes, error: str) -> None:
    """Answer with the whole request and errno."""
    if not _echo(kernel, channel, bytearray(data), error):
        raise SendFailedError("ENOBUFS")


def _echo(kernel: EmbeddedKernel, channel: EmbeddedChannel, data: bytearray, error: str) -> bool:
    data[2] = kernel.abi.error_numbers[error]
    return kernel.broadcast(bytes(data), Receivers.SENDER, channel)


def promiscuous_copy(kernel: EmbeddedKernel, message: bytes) -> bytes:
    """Promiscuous connections get the message behind a header of type PROMISC."""
    return kernel.wire.message(M.PROMISC, 0, 0, 0, message)


def resume_dump(kernel: EmbeddedKernel, channel: EmbeddedChannel) -> None:
    """A dump is over when send() returns."""


def _check_header(kernel: EmbeddedKernel, request: Request) -> None:
    if request.version != 2 or request.type > _TYPE_MAXIMUM:
        raise RefusedError("EINVAL")
    if len(request.data) > kernel.profile.message_limit:
        raise SendFailedError("ENOBUFS")


def _unsupported(kernel: EmbeddedKernel, request: Request) -> None:
    """A type that only the kernel itself sends."""
    raise RefusedError("EINVAL")


def _read_extensions(kernel: EmbeddedKernel, request: Request) -> None:
    """Unknown, twice, too short, too long, a sockaddr that does not fill its extension: EINVAL from send() (key_align).

    One that reaches past the end of the message is ENOBUFS: its bytes cannot be gathered.
    """
    data, offset = request.data, HEADER_SIZE
    while offset < len(data):
        length, number = kernel.wire.head(data, offset)
        known = kernel.abi.extensions.get(number)
        least, most = _SIZES.get(number, (0, 0)) if known in _KNOWN else (0, 0)
        if not least or number in request.extensions:
            raise SendFailedError("EINVAL")
        if length < least or (most and length > most):
            raise SendFailedError("EINVAL")
        sockaddr = data[offset + 8 : offset + 9]
        if number in _ADDRESSES and sockaddr and (length < 10 or 8 + (sockaddr[0] + 7) // 8 * 8 != length):
            raise SendFailedError("EINVAL")
        if offset + length > len(data):
            raise SendFailedError("ENOBUFS")
        request.extensions[number] = (offset, length)
        offset += length


def _check_satype(kernel: EmbeddedKernel, request: Request) -> None:
    satype, kind = request.satype, request.type
    if kind == M.SPDDUMP and kernel.abi.has_scope:
        # Here it is a mask of scopes.
        if satype not in PolicyScope._value2member_map_:
            raise RefusedError("EINVAL")
    elif satype == SAType.UNSPEC:
        if kind in _NEED_SATYPE:
            raise RefusedError("EINVAL")
    elif satype in _SA_TYPES:
        if kind in _REFUSE_SATYPE or kind == M.SPDDUMP:
            raise RefusedError("EINVAL")
    elif satype in _UNSUPPORTED_TYPES:
        raise RefusedError("EOPNOTSUPP")
    elif satype != 1 or kind != M.PROMISC:
        raise RefusedError("EINVAL")


def _check_addresses(kernel: EmbeddedKernel, request: Request) -> None:
    """Where both addresses are given: one protocol, one family, sizes and prefix lengths that fit it."""
    if X.ADDRESS_SRC not in request or X.ADDRESS_DST not in request:
        return
    source, destination = request.raw(X.ADDRESS_SRC), request.raw(X.ADDRESS_DST)
    if source[4] != destination[4] or source[8:10] != destination[8:10]:
        raise RefusedError("EINVAL")
    size, family = source[8:10]
    known = {kernel.abi.af_inet: (16, 32), kernel.abi.af_inet6: (28, 128)}
    if family not in known:
        raise RefusedError("EAFNOSUPPORT")
    expected, width = known[family]
    if size != expected or max(source[5], destination[5]) > width:
        raise RefusedError("EINVAL")


def _register(kernel: EmbeddedKernel, request: Request) -> None:
    """For a type of SA once for each connection; without a type it only lists the algorithms."""
    if request.satype:
        if request.satype in request.channel.registered:
            raise RefusedError("EEXIST")
        request.channel.registered.add(request.satype)
    body = kernel.wire.supported(X.SUPPORTED_AUTH, kernel.profile.authentication)
    body += kernel.wire.supported(X.SUPPORTED_ENCRYPT, kernel.profile.encryption)
    answer = kernel.wire.answer(request, body, reserved=request.reserved)
    request.overflowed |= not kernel.broadcast(answer, Receivers.REGISTERED, request.channel)


def _promisc(kernel: EmbeddedKernel, request: Request) -> None:
    """Bare: switch on or off, and tell everybody.  With something behind the header: that goes to everybody, raw."""
    if len(request.data) > HEADER_SIZE:
        message = bytes(request.data[HEADER_SIZE:])
    else:
        if request.satype > 1:
            raise RefusedError("EINVAL")
        request.channel.promiscuous = bool(request.satype)
        request.data[2] = 0
        message = bytes(request.data)
    request.overflowed |= not kernel.broadcast(message, Receivers.ALL, request.channel)


def expire(kernel: EmbeddedKernel, now: float) -> float:
    """Expire what is due and say when to look again."""
    return min(policies.expire(kernel, now), times.expire(kernel, now))


_HANDLERS: dict[int, Callable[[EmbeddedKernel, Request], None]] = {
    M.GETSPI: associations.getspi,
    M.UPDATE: associations.update,
    M.ADD: associations.add,
    M.DELETE: associations.delete,
    M.GET: associations.get,
    M.ACQUIRE: times.acquire_from_user,
    M.REGISTER: _register,
    M.FLUSH: associations.flush,
    M.DUMP: associations.dump,
    M.PROMISC: _promisc,
    M.SPDUPDATE: policies.add,
    M.SPDADD: policies.add,
    M.SPDDELETE: policies.delete,
    M.SPDGET: policies.get,
    M.SPDDUMP: policies.dump,
    M.SPDFLUSH: policies.flush,
    M.SPDSETIDX: policies.add,
    M.SPDDELETE2: policies.delete_by_id,
}
