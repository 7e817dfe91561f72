"""Carries PF_KEY's policy messages out over NETLINK_XFRM: the same SPD of a Linux, without af_key.

One netlink socket, joined to the group that hears of policies.  `send` gives the kernel one netlink request; what comes
back, the kernel's notice of our own change or of somebody else's, a policy, a part of a dump, an error, is told in the
PF_KEY message that af_key would have sent.  Policies only: what is about SAs is answered EOPNOTSUPP.

What differs from af_key: a mode that PF_KEY has no number for is shown as 0 and does not end a dump; a transport
template behind a tunnel of the other family is of that family, and the message says its right length; damaged
extensions that af_key would overlook are EINVAL; lost notices are reported, as ENOBUFS from `receive`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from pfkey import Abi, Action, Direction, ExtensionType, Message, MessageType
from pfkey import decode as decode_message
from pfkey import encode as encode_message
from pfkey.constants import PF_KEY_V2
from pfkey.errors import ChannelClosed, DecodeError, NotSupported
from pfkey.messages import Address, PolicyExtension

from . import xfrm_wire as wire
from .xfrm_wire import Extensions, Netlink, Refused

__all__ = ["XfrmChannel", "grace_period"]

_SOL_NETLINK, _CAP_ACK = 270, 10
_SO_RCVBUFFORCE, _BUFFER = 33, 8 << 20
_COST = 4096
"""Bytes of receive buffer that the notice and the acknowledgement of one request take, generously."""
_BARE = struct.pack("=HH", 2, 0)  # sadb_msg_len and sadb_msg_reserved of a message without extensions
_LAST_TYPE = MessageType.MIGRATE

# The kernel's notices -> how af_key tells them.
_TOLD = {wire.NEW: MessageType.SPDADD, wire.UPDATE: MessageType.SPDUPDATE, wire.FLUSH: MessageType.SPDFLUSH}


@dataclass
class _Pending:
    """A request that is not over: under which header PF_KEY hears of it."""

    type: MessageType | int
    seq: int
    pid: int
    satype: int
    told: int = 0
    """How many messages it was answered by so far."""
    held: Extensions | None = None
    """Of a dump: the part that waits until it is known whether it is the last."""


class XfrmChannel:
    """The SPD of the network namespace that it is opened in, as a Channel of Linux's PF_KEY.

    Raises NotSupported where the kernel has no NETLINK_XFRM.  Without CAP_NET_ADMIN every request is answered EPERM.
    One thread may send while another one receives.
    """

    def __init__(self) -> None:
        self.abi = Abi.linux()
        self._socket = _open(wire.GROUP_POLICY)
        self._lock = threading.Lock()
        self._queue: deque[bytes] = deque()
        # What is told without the kernel being asked, or along with something else, makes the channel readable too.
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._readable = select.epoll()
        for descriptor in (self._bell, self._socket.fileno()):
            self._readable.register(descriptor, select.EPOLLIN)
        self._pending: deque[_Pending] = deque()
        self._dumping: _Pending | None = None
        self._next_reqid = self.abi.maximum_reqid + 1
        self.in_flight = max(1, self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // _COST)

    # The members of a Channel.

    def send(self, data: bytes, /) -> None:
        """Give the kernel one message; raises OSError as the system call does, ChannelClosed on a closed channel."""
        self._check()
        _check_header(data)
        with self._lock:
            try:
                message = _decoded(bytes(data), self.abi)
                kind, flags, body = _translator(message)(self, message)
            except Refused as refusal:
                self._put(bytes([*data[:2], refusal.number, data[3]]) + _BARE + data[8:16])
                return
            pending = _Pending(message.type, message.seq, message.pid, int(message.satype))
            if flags & wire.DUMP:
                self._dumping = pending
            else:
                self._pending.append(pending)
            self._socket.send(wire.pack_request(kind, flags, message.seq, message.pid, body))

    def receive(self, timeout: float | None, /) -> bytes | None:
        """The next message, None when none came within `timeout` seconds (None: wait for ever)."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (told := self._next()) is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._readable.poll(left):
                return None
            self._fetch()
        return told

    def fileno(self) -> int:
        """A descriptor that is readable when there is something to receive, -1 once closed."""
        return -1 if self._readable.closed else self._readable.fileno()

    def grace_period(self) -> None:
        """Return when every packet that was looking at the SPD has finished looking."""
        grace_period()

    def close(self) -> None:
        """Give it up; policies stay in the kernel."""
        if not self._readable.closed:
            self._readable.close()
            os.close(self._bell)
            self._socket.close()

    def _next(self) -> bytes | None:
        """What is told next; the bell rings as long as there is more."""
        self._check()
        with self._lock:
            told = self._queue.popleft() if self._queue else None
            if not self._queue:
                with suppress(BlockingIOError):
                    os.eventfd_read(self._bell)
            return told

    def _fetch(self) -> None:
        """Take in one datagram, if there is one."""
        try:
            datagram = self._socket.recv(1 << 20, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        with self._lock:
            for message in wire.split(datagram):
                self._take(message)

    def _put(self, told: bytes) -> None:
        self._queue.append(told)
        os.eventfd_write(self._bell, 1)

    def _check(self) -> None:
        if self._socket.fileno() < 0:
            raise ChannelClosed("the NETLINK_XFRM socket was closed")

    # PF_KEY requests -> netlink requests: (type, flags, body).

    def _insert(self, message: Message) -> tuple[int, int, bytes]:
        """SPDADD, SPDSETIDX (the same) and SPDUPDATE, which adds where there is nothing to replace."""
        source, destination, policy = _named(message)
        if policy.action > Action.IPSEC or ExtensionType.SEC_CTX in message:
            raise Refused(errno.EINVAL)
        templates = policy.templates if policy.action == Action.IPSEC else ()
        packed = wire.pack_templates(templates, policy.direction, source.address.version, self._new_reqid)
        limits = message.lifetime_hard, message.lifetime_soft
        kind = wire.UPDATE if message.type == MessageType.SPDUPDATE else wire.NEW
        return kind, wire.ACK, wire.pack_policy(source, destination, policy, *limits, packed)

    def _by_selector(self, message: Message) -> tuple[int, int, bytes]:
        """SPDDELETE."""
        source, destination, policy = _named(message)
        return wire.DELETE, wire.ACK, wire.pack_identity((source, destination), 0, policy.direction - 1)

    def _by_id(self, message: Message) -> tuple[int, int, bytes]:
        """SPDGET and SPDDELETE2."""
        policy = _policy(message)
        if policy.id & 7 >= Direction.FWD:
            raise Refused(errno.EINVAL)
        if not policy.id:
            raise Refused(errno.ENOENT)  # netlink would take the selector, which is empty
        kind = wire.GET if message.type == MessageType.SPDGET else wire.DELETE
        return kind, wire.ACK, wire.pack_identity(None, policy.id, policy.id & 7)

    def _dump(self, message: Message) -> tuple[int, int, bytes]:
        """SPDDUMP; one at a time."""
        if self._dumping is not None:
            raise Refused(errno.EBUSY)
        return wire.GET, wire.DUMP, b""

    def _flush(self, message: Message) -> tuple[int, int, bytes]:
        """SPDFLUSH."""
        return wire.FLUSH, wire.ACK, b""

    def _new_reqid(self) -> int:
        """The next number that no policy has."""
        taken = _reqids()
        while self._next_reqid in taken:
            self._next_reqid += 1
        self._next_reqid += 1
        return self._next_reqid - 1

    # What the kernel says -> PF_KEY messages.

    def _take(self, message: Netlink) -> None:
        if message.type == wire.ERROR:
            self._acknowledge(message)
        elif message.flags & wire.MULTI:
            if self._dumping is not None:
                self._part(self._dumping, message)
        elif message.type in (*_TOLD, wire.DELETE):
            self._notice(message)

    def _answered(self, seq: int) -> _Pending | None:
        """The request of this number, first in, first out; those before it have lost their answers."""
        if any(pending.seq == seq for pending in self._pending):
            while self._pending[0].seq != seq:
                self._pending.popleft()
            return self._pending[0]
        return None

    def _acknowledge(self, message: Netlink) -> None:
        """The end of a request: an error, or everything that belongs to it has come before."""
        number = wire.error_number(message.body)
        dumping, pending = self._dumping, self._answered(message.seq)
        if pending is not None:
            self._pending.popleft()
        elif dumping is not None and dumping.seq == message.seq:
            pending, self._dumping = dumping, None
        if pending is not None and number:
            self._tell(pending, {}, errno=number & 0xFF)
        elif pending is not None and pending.type == MessageType.SPDFLUSH and not pending.told:
            self._tell(pending, {})

    def _part(self, dumping: _Pending, message: Netlink) -> None:
        """Parts count up and the last says 0; an empty database is ENOENT."""
        if message.type == wire.NEW:
            extensions = wire.read_policy(message.body)
            if extensions is not None:
                if dumping.held is not None:
                    self._tell(dumping, dumping.held, seq=dumping.told + 1)
                dumping.held = extensions
            return
        self._dumping = None
        number = wire.error_number(message.body) or (errno.ENOENT if dumping.held is None else 0)
        if number:
            self._tell(dumping, {}, errno=number & 0xFF)
        else:
            self._tell(dumping, dumping.held or {}, seq=0)

    def _notice(self, message: Netlink) -> None:
        """A change, ours or not, or the answer to SPDGET, told as af_key tells it."""
        told = _Pending(_TOLD.get(message.type, MessageType.SPDDELETE), message.seq, message.pid, 0)
        extensions: Extensions | None = {}
        if message.type == wire.DELETE:
            by_id, extensions = wire.read_deleted(message.body)
            told.type = MessageType.SPDDELETE2 if by_id else MessageType.SPDDELETE
        elif message.type != wire.FLUSH:
            extensions = wire.read_policy(message.body)
        if extensions is None:
            return
        answered = self._answered(message.seq)
        if answered is not None and answered.type == MessageType.SPDGET and message.type == wire.NEW:
            told = answered  # an answer has the number of our socket where notices have the pid
        elif answered is not None and answered.type == MessageType.SPDFLUSH and message.type == wire.FLUSH:
            self._tell(answered, {})  # whoever flushes hears of it by an answer of their own first
        self._tell(told, extensions)

    def _tell(self, whose: _Pending, extensions: Extensions, *, seq: int | None = None, errno: int = 0) -> None:
        """What names a policy has SA type 0, whatever was asked."""
        whose.told += 1
        satype = 0 if extensions else whose.satype
        header = {"seq": whose.seq if seq is None else seq, "pid": whose.pid, "satype": satype, "errno": errno}
        self._put(encode_message(Message(whose.type, extensions, abi=self.abi, **header)))


_Translator = Callable[[XfrmChannel, Message], tuple[int, int, bytes]]
_REQUESTS: Mapping[MessageType | int, _Translator] = {
    MessageType.SPDADD: XfrmChannel._insert,
    MessageType.SPDSETIDX: XfrmChannel._insert,
    MessageType.SPDUPDATE: XfrmChannel._insert,
    MessageType.SPDDELETE: XfrmChannel._by_selector,
    MessageType.SPDGET: XfrmChannel._by_id,
    MessageType.SPDDELETE2: XfrmChannel._by_id,
    MessageType.SPDDUMP: XfrmChannel._dump,
    MessageType.SPDFLUSH: XfrmChannel._flush,
}


# What a request is, and what it names.


def _check_header(data: bytes) -> None:
    """What af_key does not even look at: its send() fails."""
    if len(data) < 16:
        raise OSError(errno.EMSGSIZE, f"{len(data)} bytes are no PF_KEY message")
    version, kind, _, _, words, reserved = struct.unpack_from("=BBBBHH", data)
    if version != PF_KEY_V2 or reserved or not 0 < kind <= _LAST_TYPE:
        raise OSError(errno.EINVAL, f"version {version}, type {kind} and reserved {reserved} are no PF_KEY request")
    if words < 2 or words != len(data) // 8:
        raise OSError(errno.EMSGSIZE, f"the message says {8 * words} bytes and has {len(data)}")


def _decoded(data: bytes, abi: Abi) -> Message:
    try:
        return decode_message(data, abi)
    except DecodeError as error:
        raise Refused(errno.EINVAL) from error


def _translator(message: Message) -> _Translator:
    try:
        return _REQUESTS[message.type]
    except KeyError:
        raise Refused(errno.EOPNOTSUPP) from None


def _policy(message: Message) -> PolicyExtension:
    policy = message.policy
    if not isinstance(policy, PolicyExtension):
        raise Refused(errno.EINVAL)
    return policy


def _named(message: Message) -> tuple[Address, Address, PolicyExtension]:
    """Both sides, of one family, and a policy of a direction that can be set."""
    source, destination, policy = message.source, message.destination, _policy(message)
    if not isinstance(source, Address) or not isinstance(destination, Address):
        raise Refused(errno.EINVAL)
    if source.address.version != destination.address.version or not Direction.IN <= policy.direction <= Direction.FWD:
        raise Refused(errno.EINVAL)
    return source, destination, policy


# The socket, and the kernel's clock.

_MEMBARRIER = {"x86_64": 324, "aarch64": 283, "riscv64": 283, "ppc64le": 365, "s390x": 356}


def grace_period() -> None:
    """membarrier(MEMBARRIER_CMD_GLOBAL): Linux carries it out as synchronize_rcu(), for anybody (4.3 and later).

    After it no lookup is under way that began before.  Raises OSError where the call is missing or filtered.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_MEMBARRIER[os.uname().machine], 1, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"membarrier: {os.strerror(number)}")


def _open(groups: int) -> socket.socket:
    try:
        opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, wire.NETLINK_XFRM)
    except OSError as error:
        raise NotSupported(f"this kernel has no NETLINK_XFRM ({error.strerror})") from error
    opened.setsockopt(_SOL_NETLINK, _CAP_ACK, 1)
    for option in (_SO_RCVBUFFORCE, socket.SO_RCVBUF):
        try:
            opened.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
            break
        except PermissionError:
            continue  # not privileged in the first namespace: what net.core.rmem_max allows
    opened.bind((0, groups))
    return opened


def _reqids() -> set[int]:
    """Those of all policies, asked by a socket of its own so that nothing of it mixes with the answers of others."""
    found: set[int] = set()
    with _open(0) as asking:
        asking.settimeout(10)
        asking.send(wire.pack_request(wire.GET, wire.DUMP, 1, 0))
        while True:
            for message in wire.split(asking.recv(1 << 20)):
                if message.type != wire.NEW:
                    return found
                found |= wire.read_reqids(message.body)
