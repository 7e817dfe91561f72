"""Messages for a Linux af_key in raw bytes, right or wrong in any way a test wants."""

from __future__ import annotations

import struct
from ipaddress import ip_interface
from itertools import count

from pfkey.abi import Abi
from pfkey.constants import MessageType as M
from pfkey.embedded.wire import Limits, Wire

WIRE = Wire(Abi.linux("little"))
_seq = count(1)


def message(
    kind: int, body: bytes = b"", satype: int = 0, errno: int = 0, *, version: int = 2, words: int | None = None,
    reserved: int = 0, seq: int | None = None,
) -> bytes:  # fmt: skip
    data = bytearray(
        WIRE.message(kind, satype, next(_seq) if seq is None else seq, 4711, body, reserved=reserved, errno=errno)
    )
    data[0] = version
    if words is not None:
        data[4:6] = struct.pack("<H", words)
    return bytes(data)


def sockaddr(text: str, port: int = 0, scope: int = 0) -> bytes:
    address = ip_interface(text).ip
    return WIRE.sockaddr(address.version, int(address), port, scope)


def address(
    kind: int, text: str, protocol: int = 255, *, port: int = 0, scope: int = 0, prefixlen: int | None = None
) -> bytes:
    length = ip_interface(text).network.prefixlen if prefixlen is None else prefixlen
    return WIRE.address(kind, sockaddr(text, port, scope), protocol, length)


def selector(
    source: str = "10.1.0.0/16", destination: str = "10.2.0.0/16", protocol: int = 255, ports: tuple[int, int] = (0, 0)
) -> bytes:
    return address(5, source, protocol, port=ports[0]) + address(6, destination, protocol, port=ports[1])


def between(*ends: str) -> bytes:
    return b"".join(map(sockaddr, ends))


GATEWAYS = between("192.0.2.1", "198.51.100.1")


def request(
    protocol: int = 50, mode: int = 2, level: int = 3, reqid: int = 7, ends: bytes | None = None, *, size: int = -1
) -> bytes:
    if ends is None:
        ends = GATEWAYS if mode == 2 else b""
    return WIRE.request(16 + len(ends) if size < 0 else size, protocol, mode, level, reqid) + ends


def policy(action: int = 0, direction: int = 2, priority: int = 0, id: int = 0, requests: bytes = b"") -> bytes:
    return WIRE.policy(action, direction, id=id, priority=priority, requests=requests)


def lifetime(kind: int, *limits: int) -> bytes:
    return WIRE.lifetime(kind, Limits(*limits))


def extension(kind: int, body: bytes, words: int | None = None) -> bytes:
    return struct.pack("<HH", (4 + len(body)) // 8 if words is None else words, kind) + body


def spdadd(source: str = "10.1.0.0/16", priority: int = 0) -> bytes:
    return message(M.SPDADD, policy(2, priority=priority, requests=request()) + selector(source))


def discard(
    kind: int = M.SPDADD, source: str = "10.1.0.0/16", more: bytes = b"", *, direction: int = 2, priority: int = 0,
    id: int = 0,
) -> bytes:  # fmt: skip
    return message(kind, policy(0, direction, priority, id) + selector(source) + more)


def esp_policy(requests: bytes, more: bytes = b"", direction: int = 2) -> bytes:
    return message(M.SPDUPDATE, policy(2, direction, requests=requests) + (more or selector()))


def sa(spi: int, auth: int = 3, encrypt: int = 12, *, replay: int = 4, state: int = 1, flags: int = 0) -> bytes:
    return WIRE.sa(spi, replay, state, auth=auth, encrypt=encrypt, flags=flags)


def key(kind: int, size: int, bits: int | None = None) -> bytes:
    return WIRE.key(kind, 8 * size if bits is None else bits, bytes(range(size)))


HOSTS = selector("10.0.0.1", "10.0.0.2", 0)
HOSTS6 = selector("2001:db8::1", "2001:db8::2", 0)
KEYS = key(8, 20) + key(9, 16)


def add(
    spi: int, *more: bytes, of: bytes | None = None, hosts: bytes = HOSTS, keys: bytes = KEYS, satype: int = 3,
    kind: int = M.ADD,
) -> bytes:  # fmt: skip
    return message(kind, (sa(spi) if of is None else of) + hosts + keys + b"".join(more), satype)


def get(spi: int, kind: int = M.GET, satype: int = 3, hosts: bytes = HOSTS) -> bytes:
    return message(kind, sa(spi) + hosts, satype)


def getspi(low: int, high: int, *more: bytes, hosts: bytes = HOSTS, satype: int = 3) -> bytes:
    return message(M.GETSPI, hosts + struct.pack("<HHIII", 2, 16, low, high, 0) + b"".join(more), satype)


def natt(kind: int, source: int = 4500, destination: int = 4501) -> bytes:
    return WIRE.small(20, bytes((kind, 0, 0, 0))) + WIRE.port(21, source) + WIRE.port(22, destination)


def filtered(source: bytes, destination: bytes, family: int, source_prefix: int, destination_prefix: int) -> bytes:
    body = source.ljust(16, b"\0") + destination.ljust(16, b"\0")
    return message(M.DUMP, extension(26, body + struct.pack("<HBB", family, source_prefix, destination_prefix), 5))


def migrate(
    *pairs: tuple[int, int, int, bytes, bytes], direction: int = 2, more: bytes = b"", satype: int = 0
) -> bytes:
    requests = b"".join(
        request(protocol, mode, 3, reqid, ends) for protocol, mode, reqid, *both in pairs for ends in both
    )
    return message(M.MIGRATE, policy(2, direction, 7, 9, requests) + (more or selector()), satype)
