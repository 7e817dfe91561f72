"""Linux's af_key: how it reads a message, whom it answers, and which handler does the work (Linux 6.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import inf
from typing import TYPE_CHECKING

from ..constants import ExtensionType as X
from ..constants import MessageType as M
from ..constants import SAType
from . import afkey_associations as associations
from . import afkey_policies as policies
from . import afkey_time as times
from .afkey_associations import association_key
from .afkey_migrate import migrate
from .afkey_time import acquire, use
from .dialect import Receivers
from .wire import HEADER_SIZE, RefusedError, Request, SendFailedError

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

_TYPE_MAXIMUM, _EXTENSION_MAXIMUM = 24, 26
_ADDRESSES = {X.ADDRESS_SRC, X.ADDRESS_DST, X.ADDRESS_PROXY, X.NAT_T_OA & 0xFF}
_KEYS = {X.KEY_AUTH, X.KEY_ENCRYPT}
_SEC_CTX = X.SEC_CTX & 0xFF
_LEAST = {
    X.SA: 16, X.LIFETIME_CURRENT: 32, X.LIFETIME_HARD: 32, X.LIFETIME_SOFT: 32, X.ADDRESS_SRC: 8, X.ADDRESS_DST: 8,
    X.ADDRESS_PROXY: 8, X.KEY_AUTH: 8, X.KEY_ENCRYPT: 8, X.IDENTITY_SRC: 16, X.IDENTITY_DST: 16, X.SENSITIVITY: 16,
    X.PROPOSAL: 8, X.SUPPORTED_AUTH: 8, X.SUPPORTED_ENCRYPT: 8, X.SPIRANGE: 16, X.KMPRIVATE: 8, X.POLICY: 16,
    X.SA2: 16, X.NAT_T_TYPE: 8, X.NAT_T_SPORT: 8, X.NAT_T_DPORT: 8, X.NAT_T_OA & 0xFF: 8, _SEC_CTX: 8,
    X.KMADDRESS & 0xFF: 8, X.FILTER & 0xFF: 40,
}  # fmt: skip


def receive(kernel: EmbeddedKernel, channel: EmbeddedChannel, data: bytes) -> None:
    """One send(): raises SendFailedError where the system call fails, else does the work and answers."""
    if len(data) > kernel.profile.send_buffer:
        raise SendFailedError("EMSGSIZE")
    if len(data) < HEADER_SIZE:
        raise SendFailedError("EMSGSIZE")
    version, kind, errno, satype, words, reserved, seq, pid = kernel.wire.header.unpack_from(data)
    if version != 2 or reserved or not 0 < kind <= _TYPE_MAXIMUM:
        raise SendFailedError("EINVAL")
    if words != len(data) // 8 or words < 2:
        raise SendFailedError("EMSGSIZE")
    for other in reversed(kernel.channels):
        if other.promiscuous:
            kernel.deliver(other, data)
    request = Request(bytearray(data), channel, version, kind, errno, satype, reserved, seq, pid)
    try:
        _read_extensions(kernel, request)
        _HANDLERS.get(kind, _unsupported)(kernel, request)
    except RefusedError as refused:
        refuse(kernel, channel, data, refused.name)


def refuse(kernel: EmbeddedKernel, channel: EmbeddedChannel, data: bytes, error: str) -> None:
    """Answer with a bare header: the request's own, with errno."""
    _, kind, _, satype, _, _, seq, pid = kernel.wire.header.unpack_from(data)
    number = kernel.abi.error_numbers[error]
    answer = kernel.wire.message(kind, satype, seq, pid, errno=number)
    kernel.broadcast(answer, Receivers.SENDER, channel)


def promiscuous_copy(kernel: EmbeddedKernel, message: bytes) -> bytes:
    """Promiscuous connections get the message itself once more."""
    return message


def _read_extensions(kernel: EmbeddedKernel, request: Request) -> None:
    """Any order, unknown ones skipped; anything else wrong is EINVAL (parse_exthdrs)."""
    data, offset = request.data, HEADER_SIZE
    while offset < len(data):
        if len(data) - offset < 4:
            raise RefusedError("EINVAL")
        length, number = kernel.wire.head(data, offset)
        if not 8 <= length <= len(data) - offset or number == 0:
            raise RefusedError("EINVAL")
        if number <= _EXTENSION_MAXIMUM:
            if length < _LEAST[number] or number in request.extensions:
                raise RefusedError("EINVAL")
            request.extensions[number] = (offset, length)
            raw = request.raw(number)
            if not _sound(kernel, number, raw):
                raise RefusedError("EINVAL")
        offset += length


def _sound(kernel: EmbeddedKernel, number: int, raw: bytes) -> bool:
    """The further checks of addresses, keys and security contexts."""
    if number in _ADDRESSES:
        _, prefixlen, endpoint = kernel.wire.read_address(raw)
        if endpoint is None:
            return False
        return len(raw) == (24 if endpoint.version == 4 else 40) and prefixlen <= (32 if endpoint.version == 4 else 128)
    if number in _KEYS:
        bits: int = kernel.wire.u16.unpack_from(raw, 4)[0]
        return len(raw) >= 8 + (bits + 63) // 64 * 8
    if number == _SEC_CTX:
        length: int = kernel.wire.u16.unpack_from(raw, 6)[0]
        return len(raw) == (8 + length + 7) // 8 * 8
    return True


def _register(kernel: EmbeddedKernel, request: Request) -> None:
    if request.satype > SAType.IPCOMP:
        raise RefusedError("EINVAL")
    if request.satype:
        if request.satype in request.channel.registered:
            raise RefusedError("EEXIST")
        request.channel.registered.add(request.satype)
    body = kernel.wire.supported(X.SUPPORTED_AUTH, kernel.profile.authentication)
    body += kernel.wire.supported(X.SUPPORTED_ENCRYPT, kernel.profile.encryption)
    answer = kernel.wire.answer(request, body)
    kernel.broadcast(answer, Receivers.REGISTERED, request.channel)


def _promisc(kernel: EmbeddedKernel, request: Request) -> None:
    """Bare: switch on or off, and tell everybody.  With something behind the header: relay it as it is."""
    data = bytearray(request.data)
    if len(data) == HEADER_SIZE:
        if request.satype > 1:
            raise RefusedError("EINVAL")
        request.channel.promiscuous = bool(request.satype)
        data[2] = 0
    kernel.broadcast(bytes(data), Receivers.ALL)


def _dump(kernel: EmbeddedKernel, request: Request, bodies: Iterator[tuple[int, int, bytes, int]]) -> None:
    """Start a dump; the reader's recv() calls carry it on.

    `bodies` yields satype, reserved, extensions and by how many bytes the length is short.
    """
    if request.channel.dump is not None:
        raise RefusedError("EBUSY")
    kind, pid = request.type, request.pid

    def parts() -> Iterator[bytes]:
        """Numbered from 1; the last one says 0, so each waits for its successor."""
        previous: bytes | None = None
        for number, (satype, reserved, body, short) in enumerate(bodies, 1):
            if previous is not None:
                yield previous
            previous = kernel.wire.message(kind, satype, number, pid, body, reserved=reserved)
            if short:
                previous = policies.shorten(kernel, previous, short)
        if previous is not None:
            zero = kernel.wire.u32.pack(0)
            yield previous[:8] + zero + previous[12:]

    request.channel.dump = parts()
    if not resume_dump(kernel, request.channel):
        raise RefusedError("ENOENT")


def resume_dump(kernel: EmbeddedKernel, channel: EmbeddedChannel) -> bool:
    """Go on with a dump while there is room; whether there was anything to send."""
    dump, some = channel.dump, False
    while dump is not None:
        if not channel.dump_may_go_on():
            return True
        part = next(dump, None)
        if part is None:
            channel.dump = None
            return some
        some = True
        kernel.broadcast(part, Receivers.SENDER, channel)
    return some


def _spddump(kernel: EmbeddedKernel, request: Request) -> None:
    _dump(kernel, request, policies.dump_bodies(kernel))


def _saddump(kernel: EmbeddedKernel, request: Request) -> None:
    _dump(kernel, request, associations.dump_bodies(kernel, request))


def _unsupported(kernel: EmbeddedKernel, request: Request) -> None:
    """A type that only the kernel itself sends."""
    raise RefusedError("EOPNOTSUPP")


def expire(kernel: EmbeddedKernel, now: float) -> float:
    """Expire what is due and say when to look again."""
    return min(policies.expire(kernel, now), times.expire(kernel, now), inf)


_HANDLERS: dict[int, Callable[[EmbeddedKernel, Request], None]] = {
    M.GETSPI: associations.getspi,
    M.UPDATE: associations.add,
    M.ADD: associations.add,
    M.DELETE: associations.delete,
    M.GET: associations.get,
    M.ACQUIRE: associations.acquire_failed,
    M.REGISTER: _register,
    M.FLUSH: associations.flush,
    M.DUMP: _saddump,
    M.PROMISC: _promisc,
    M.SPDUPDATE: policies.add,
    M.SPDADD: policies.add,
    M.SPDDELETE: policies.delete,
    M.SPDGET: policies.get,
    M.SPDDUMP: _spddump,
    M.SPDFLUSH: policies.flush,
    M.SPDSETIDX: policies.add,
    M.SPDDELETE2: policies.get,
    M.MIGRATE: migrate,
}
