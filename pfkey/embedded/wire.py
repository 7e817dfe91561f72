"""PF_KEY bytes as a kernel reads and writes them: raw extensions, patched in place, laid out as the Abi says.

A kernel is not a strict decoder: it stores a sockaddr with the port nobody asked for, echoes a rejected request byte by
byte and takes protocol 306 for 50.  So this kernel reads with its own few functions; the numbers come from the Abi.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, lru_cache
from ipaddress import IPv4Address, IPv6Address
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from ..abi import Abi
from ..constants import ExtensionType, MessageType
from ..messages import IPAddress

if TYPE_CHECKING:
    from .channel import EmbeddedChannel

__all__ = [
    "HEADER_SIZE",
    "Endpoint",
    "Limits",
    "RefusedError",
    "Request",
    "SendFailedError",
    "UnansweredError",
    "Wire",
    "pad8",
    "wire_for",
]

HEADER_SIZE = 16
_BE16, _BE32 = Struct(">H"), Struct(">I")


class RefusedError(Exception):
    """A handler's verdict: answer the sender with this error (a name like "EINVAL")."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class SendFailedError(Exception):
    """The other error channel: send() itself fails with this error and no reply is queued."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class UnansweredError(Exception):
    """The kernel drops the request: no work, no reply, and send() succeeds."""


class Endpoint(NamedTuple):
    """A sockaddr: IP version, address and port as numbers, the scope of a link-local address, and its own bytes."""

    version: int
    address: int
    port: int
    scope: int
    raw: bytes

    @property
    def ip(self) -> IPAddress:
        """The address as people know it."""
        return _ip(self.version, self.address)

    @property
    def packed(self) -> bytes:
        """The address in network order."""
        return self.address.to_bytes(4 if self.version == 4 else 16, "big")


_few = lru_cache(maxsize=4096)
"""Remembers what the same bytes were read as: the addresses of a request are looked at many times."""


@_few
def _ip(version: int, address: int) -> IPAddress:
    return IPv4Address(address) if version == 4 else IPv6Address(address)


class Limits(NamedTuple):
    """The four numbers of a lifetime extension: allocations, bytes, and two times in seconds."""

    allocations: int = 0
    bytes: int = 0
    addtime: int = 0
    usetime: int = 0


@dataclass(slots=True)
class Request:
    """One message as it was sent: its header's fields and where its extensions lie.  Handlers may patch `data`."""

    data: bytearray
    channel: EmbeddedChannel
    version: int
    type: int
    errno: int
    satype: int
    reserved: int
    seq: int
    pid: int
    extensions: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Number on the wire -> (offset, length) in `data`."""
    overflowed: bool = False
    """The answer did not fit the sender's receive buffer."""

    def __contains__(self, number: int) -> bool:
        return number in self.extensions

    def raw(self, number: int) -> bytes:
        """The whole extension as it was sent, or as a handler left it; empty when it is absent."""
        offset, length = self.extensions.get(number, (0, 0))
        return bytes(self.data[offset : offset + length])


def pad8(data: bytes) -> bytes:
    """`data` filled with zeros to a multiple of eight bytes."""
    return data + bytes(-len(data) % 8)


class Wire:
    """Reading and writing in the layout of one Abi."""

    def __init__(self, abi: Abi) -> None:
        order = "<" if abi.byteorder == "little" else ">"
        self.abi = abi
        self.header = Struct(order + "BBBBHHII")
        self.u16 = Struct(order + "H")
        self.u32 = Struct(order + "I")
        self._head = Struct(order + "HH")
        self._sa = Struct(order + "HH4sBBBBI")
        self._sa2 = Struct(order + "HHB3xII")
        self._lifetime = Struct(order + "HHIQQQ")
        self._address = Struct(order + "HHBBH")
        self._policy = Struct(order + "HHHBBII")
        self._range = Struct(order + "HHIII")
        self._key = Struct(order + "HHHH")
        self._algorithm = Struct(order + "BBHHH")
        self._request = Struct(order + ("HHBBHII" if abi.request_size == 16 else "HHBBH"))
        self._family = {4: abi.af_inet, 6: abi.af_inet6}
        self._version = {number: version for version, number in self._family.items()}
        self.sockaddr = _few(self._sockaddr)
        self.endpoint = _few(self._endpoint)
        self.read_address = _few(self._read_address)
        self.plain = _few(self._plain)

    # Writing.

    def message(
        self, type: int, satype: int, seq: int, pid: int, body: bytes = b"", *, reserved: int = 0, errno: int = 0
    ) -> bytes:
        """A whole message; its length says what `body` is."""
        words = (HEADER_SIZE + len(body)) // 8
        return self.header.pack(2, type, errno, satype, words & 0xFFFF, reserved, seq, pid) + body

    def answer(
        self,
        request: Request,
        body: bytes = b"",
        *,
        type: int | None = None,
        satype: int | None = None,
        reserved: int = 0,
    ) -> bytes:
        """A message with the request's own seq and pid, and its type and SA type unless others are given."""
        kind = request.type if type is None else type
        satype = request.satype if satype is None else satype
        return self.message(kind, satype, request.seq, request.pid, body, reserved=reserved)

    def _sockaddr(self, version: int, address: int, port: int = 0, scope: int = 0) -> bytes:
        """A sockaddr_in (16 bytes) or sockaddr_in6 (28 bytes)."""
        family, size = self._family[version], 16 if version == 4 else 28
        start = bytes((size, family)) if self.abi.sockaddr_has_length else self.u16.pack(family)
        start += _BE16.pack(port)
        if version == 4:
            return start + _BE32.pack(address) + bytes(8)
        return start + bytes(4) + address.to_bytes(16, "big") + self.u32.pack(scope)

    def address(self, kind: int, sockaddr: bytes, protocol: int, prefixlen: int) -> bytes:
        """An address extension."""
        body = pad8(sockaddr)
        return self._address.pack(1 + len(body) // 8, kind, protocol, prefixlen, 0) + body

    def lifetime(self, kind: int, limits: Limits) -> bytes:
        """A lifetime extension."""
        return self._lifetime.pack(4, kind, *limits)

    def sa(self, spi: int, replay: int, state: int, *, auth: int, encrypt: int, flags: int) -> bytes:
        """SADB_EXT_SA."""
        return self._sa.pack(2, ExtensionType.SA, _BE32.pack(spi), replay, state, auth, encrypt, flags)

    def sa2(self, mode: int, reqid: int, sequence: int = 0) -> bytes:
        """SADB_X_EXT_SA2."""
        return self._sa2.pack(2, ExtensionType.SA2, mode & 0xFF, sequence, reqid)

    def key(self, kind: int, bits: int, data: bytes) -> bytes:
        """A key extension."""
        body = pad8(data)
        return self._key.pack(1 + len(body) // 8, kind, bits, 0) + body

    def policy(
        self, action: int, direction: int, *, scope: int = 0, id: int = 0, priority: int = 0, requests: bytes = b""
    ) -> bytes:
        """SADB_X_EXT_POLICY; `requests` are its ipsecrequests, a multiple of eight bytes."""
        words = 2 + len(requests) // 8
        return self._policy.pack(words, ExtensionType.POLICY, action, direction, scope, id, priority) + requests

    def request(self, size: int, protocol: int, mode: int, level: int, reqid: int) -> bytes:
        """The fixed part of an ipsecrequest that is `size` bytes long."""
        if self.abi.request_size == 16:
            return self._request.pack(size, protocol, mode & 0xFF, level, 0, reqid, 0)
        return self._request.pack(size, protocol, mode & 0xFF, level, reqid)

    def small(self, kind: int, body: bytes) -> bytes:
        """An extension of one word: four bytes of `body`."""
        return self._head.pack(1, kind) + body

    def port(self, kind: int, port: int) -> bytes:
        """A NAT-T port extension."""
        return self.small(kind, _BE16.pack(port) + bytes(2))

    def supported(self, kind: int, algorithms: tuple[tuple[int, int, int, int], ...]) -> bytes:
        """SUPPORTED_AUTH or SUPPORTED_ENCRYPT of (number, length of the IV, least and most key bits)."""
        body = b"".join(self._algorithm.pack(*algorithm, 0) for algorithm in algorithms)
        return self._head.pack(1 + len(body) // 8, kind) + bytes(4) + body

    # Reading.

    def head(self, data: bytes | bytearray, offset: int) -> tuple[int, int]:
        """Length in bytes and number of the extension at `offset`."""
        words, number = self._head.unpack_from(data, offset)
        return words * 8, number

    def _endpoint(self, data: bytes) -> Endpoint | None:
        """The sockaddr that `data` begins with; None for another family or too few bytes."""
        if len(data) < 2:
            return None
        family = data[1] if self.abi.sockaddr_has_length else self.u16.unpack_from(data)[0]
        version = self._version.get(family, 0)
        size = {4: 16, 6: 28}.get(version, 0)
        if not size or len(data) < size:
            return None
        port = _BE16.unpack_from(data, 2)[0]
        if version == 4:
            return Endpoint(4, _BE32.unpack_from(data, 4)[0], port, 0, bytes(data[:16]))
        address = int.from_bytes(data[8:24], "big")
        return Endpoint(6, address, port, self.u32.unpack_from(data, 24)[0], bytes(data[:28]))

    def _read_address(self, extension: bytes) -> tuple[int, int, Endpoint | None]:
        """Protocol, prefix length and sockaddr of an address extension."""
        _, _, protocol, prefixlen, _ = self._address.unpack_from(extension)
        return protocol, prefixlen, self.endpoint(extension[8:])

    def _plain(self, end: Endpoint) -> Endpoint:
        """The end without scope and flow information."""
        raw = self.sockaddr(end.version, end.address, end.port)
        return end if raw == end.raw else end._replace(scope=0, raw=raw)

    def read_lifetime(self, extension: bytes) -> Limits:
        """The limits of a lifetime extension."""
        return Limits(*self._lifetime.unpack_from(extension)[2:])

    def read_sa(self, extension: bytes) -> tuple[int, int, int, int, int, int]:
        """SPI, replay, state, auth, encrypt, flags of SADB_EXT_SA."""
        _, _, spi, replay, state, auth, encrypt, flags = self._sa.unpack_from(extension)
        return int.from_bytes(spi, "big"), replay, state, auth, encrypt, flags

    def read_sa2(self, extension: bytes) -> tuple[int, int]:
        """Mode and reqid of SADB_X_EXT_SA2."""
        _, _, mode, _, reqid = self._sa2.unpack_from(extension)
        return mode, reqid

    def read_key(self, extension: bytes) -> tuple[int, bytes]:
        """Bits and bytes of a key extension."""
        bits = self._key.unpack_from(extension)[2]
        return bits, bytes(extension[8 : 8 + (bits + 7) // 8])

    def read_range(self, extension: bytes) -> tuple[int, int]:
        """Both ends of SADB_EXT_SPIRANGE."""
        _, _, minimum, maximum, _ = self._range.unpack_from(extension)
        return minimum, maximum

    def read_policy(self, extension: bytes) -> tuple[int, int, int, int]:
        """Type, direction, id and priority of SADB_X_EXT_POLICY."""
        _, _, action, direction, _, id, priority = self._policy.unpack_from(extension)
        return action, direction, id, priority

    def read_request(self, data: bytes | bytearray, offset: int) -> tuple[int, int, int, int, int]:
        """Length, protocol, mode, level and reqid of the ipsecrequest at `offset`."""
        if self.abi.request_size == 16:
            size, protocol, mode, level, _, reqid, _ = self._request.unpack_from(data, offset)
        else:
            size, protocol, mode, level, reqid = self._request.unpack_from(data, offset)
        return size, protocol, mode, level, reqid

    def read_port(self, extension: bytes) -> int:
        """The port of a NAT-T port extension."""
        return int(_BE16.unpack_from(extension, 4)[0])

    def type_name(self, number: int) -> str:
        """SPDADD, or the number of a type without a name."""
        return MessageType(number).name if number in MessageType._value2member_map_ else str(number)


@cache
def wire_for(abi: Abi) -> Wire:
    """The reader and writer of an Abi, made once."""
    return Wire(abi)
