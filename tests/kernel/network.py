"""Network namespaces, a cable between two of them, and packet counters: what the traffic tests stand on.

Everything is asked of the kernel itself (setns, rtnetlink, packet sockets), so that no program has to be installed.
Linux only.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address, ip_interface
from types import TracebackType
from typing import Self

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


class Namespace:
    """A network namespace: `with there:` puts the calling thread into it, and its new sockets with it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._back: list[int] = []

    @classmethod
    def current(cls) -> Self:
        """The one that the calling thread is in."""
        return cls(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

    @classmethod
    def create(cls) -> Self:
        """A new one, its loopback interface up; the calling thread stays where it is."""
        here = cls.current()
        _check(_libc.unshare(_CLONE_NEWNET), "unshare(CLONE_NEWNET)")
        try:
            with Link() as link:
                link.up("lo")
            return cls.current()
        finally:
            _check(_libc.setns(here.descriptor, _CLONE_NEWNET), "setns")
            here.close()

    def __enter__(self) -> Self:
        here = Namespace.current()
        _check(_libc.setns(self.descriptor, _CLONE_NEWNET), "setns")
        self._back.append(here.descriptor)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        back = self._back.pop()
        _check(_libc.setns(back, _CLONE_NEWNET), "setns")
        os.close(back)

    def close(self) -> None:
        """Give it up; it goes away with its last socket."""
        os.close(self.descriptor)


@contextmanager
def namespace() -> Iterator[Namespace]:
    """A new one, entered and given up again."""
    new = Namespace.create()
    try:
        with new:
            yield new
    finally:
        new.close()


class Link:
    """The few requests of rtnetlink that the tests need, in the namespace in which it is opened."""

    _NEWLINK, _NEWADDR, _NEWNEIGH = 16, 20, 28
    _REQUEST_ACK, _CREATE = 0x5, 0x400
    _IFF_UP, _NUD_PERMANENT, _IFA_F_NODAD = 1, 0x80, 0x02

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        self._socket.settimeout(10)
        self._seq = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.close()

    def up(self, name: str) -> None:
        """Switch an interface on."""
        self._request(self._NEWLINK, 0, self._link(socket.if_nametoindex(name), self._IFF_UP))

    def cable(self, name: str, peer: str, there: Namespace) -> None:
        """A veth pair: `name` here, `peer` in the namespace `there`; both off."""
        end = self._link(0, 0) + self._attribute(3, peer.encode() + b"\0")
        end += self._attribute(28, struct.pack("=i", there.descriptor))  # IFLA_NET_NS_FD
        data = self._attribute(1, end)  # VETH_INFO_PEER
        info = self._attribute(1, b"veth") + self._attribute(2, data)  # IFLA_INFO_KIND, IFLA_INFO_DATA
        body = self._link(0, 0) + self._attribute(3, name.encode() + b"\0") + self._attribute(18, info)
        self._request(self._NEWLINK, self._CREATE, body)

    def address(self, name: str, interface: str) -> None:
        """Give an interface an address with its prefix length, without waiting for duplicate detection."""
        value = ip_interface(interface)
        family = socket.AF_INET if value.version == 4 else socket.AF_INET6
        head = struct.pack("=BBBBi", family, value.network.prefixlen, self._IFA_F_NODAD, 0, socket.if_nametoindex(name))
        body = head + self._attribute(2, value.ip.packed) + self._attribute(1, value.ip.packed)
        self._request(self._NEWADDR, self._CREATE, body)

    def neighbour(self, name: str, address: str, hardware: bytes) -> None:
        """A permanent neighbour: no ARP, no neighbour discovery, nothing on the wire but what the tests send."""
        value = ip_address(address)
        family = socket.AF_INET if value.version == 4 else socket.AF_INET6
        head = struct.pack("=BxxxiHBB", family, socket.if_nametoindex(name), self._NUD_PERMANENT, 0, 0)
        self._request(
            self._NEWNEIGH, self._CREATE, head + self._attribute(1, value.packed) + self._attribute(2, hardware)
        )

    @staticmethod
    def _link(index: int, flags: int) -> bytes:
        return struct.pack("=BxHiII", 0, 0, index, flags, flags)

    @staticmethod
    def _attribute(kind: int, value: bytes) -> bytes:
        return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)

    def _request(self, kind: int, flags: int, body: bytes) -> None:
        self._seq += 1
        self._socket.send(struct.pack("=IHHII", 16 + len(body), kind, self._REQUEST_ACK | flags, self._seq, 0) + body)
        number = -struct.unpack_from("=i", self._socket.recv(65536), 16)[0]
        if number:
            raise OSError(number, f"rtnetlink request {kind}: {os.strerror(number)}")


def hardware_address(name: str) -> bytes:
    """The Ethernet address of an interface of this namespace."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as probe:
        probe.bind((name, 0))
        return bytes(probe.getsockname()[4])


@dataclass(frozen=True)
class Cable:
    """Two namespaces joined by a veth pair, each with an IPv4 and an IPv6 address of one subnet."""

    here: Namespace
    there: Namespace

    HERE, THERE = "10.0.0.1", "10.0.0.2"
    HERE6, THERE6 = "2001:db8::1", "2001:db8::2"
    NAME, PEER = "va", "vb"


@contextmanager
def cable() -> Iterator[Cable]:
    """A cable from a new namespace to another one; the calling thread stays where it is."""
    here, there = Namespace.create(), Namespace.create()
    try:
        with here, Link() as link:
            link.cable(Cable.NAME, Cable.PEER, there)
        ends = [
            (here, Cable.NAME, (Cable.HERE, Cable.HERE6), (Cable.THERE, Cable.THERE6)),
            (there, Cable.PEER, (Cable.THERE, Cable.THERE6), (Cable.HERE, Cable.HERE6)),
        ]
        hardware = []
        for place, name, own, _ in ends:
            with place, Link() as link:
                for address, length in zip(own, (24, 64), strict=True):
                    link.address(name, f"{address}/{length}")
                link.up(name)
                hardware.append(hardware_address(name))
        for (place, name, _, others), address in zip(ends, reversed(hardware), strict=True):
            with place, Link() as link:
                for other in others:
                    link.neighbour(name, other, address)
        yield Cable(here, there)
    finally:
        here.close()
        there.close()


class PacketCounter:
    """Counts the IP packets that arrive on an interface with one of some protocols; none is lost, none is read.

    A packet socket with a filter in the kernel, and PACKET_STATISTICS: a full receive buffer does not matter.  Open it
    in the namespace of the interface.  What leaves through the interface is not counted.
    """

    _SO_ATTACH_FILTER, _SOL_PACKET, _PACKET_STATISTICS = 26, 263, 6
    _LOAD_BYTE, _JUMP_EQUAL, _RETURN = 0x30, 0x15, 0x06
    _ETHERTYPE, _PROTOCOL_OFFSET = {4: 0x0800, 6: 0x86DD}, {4: 9, 6: 6}

    def __init__(self, name: str, *protocols: int, version: int = 4) -> None:
        # SOCK_DGRAM: the filter sees the packet from its IP header on.
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        count = len(protocols)
        self._attach(
            [
                (self._LOAD_BYTE, 0, 0, self._PROTOCOL_OFFSET[version]),
                *((self._JUMP_EQUAL, count - number, 0, protocol) for number, protocol in enumerate(protocols)),
                (self._RETURN, 0, 0, 0),
                (self._RETURN, 0, 0, 0xFFFF),
            ]
        )
        self._socket.bind((name, self._ETHERTYPE[version]))
        self.take()

    def take(self) -> int:
        """How many came since the last call."""
        seen, _dropped = struct.unpack("=II", self._socket.getsockopt(self._SOL_PACKET, self._PACKET_STATISTICS, 8))
        return int(seen)

    def close(self) -> None:
        """Stop counting."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _attach(self, program: list[tuple[int, int, int, int]]) -> None:
        code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
        head = struct.pack("@HP", len(program), ctypes.addressof(code))  # struct sock_fprog
        self._socket.setsockopt(socket.SOL_SOCKET, self._SO_ATTACH_FILTER, head)
