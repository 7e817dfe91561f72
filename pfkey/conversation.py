"""Pairs requests with replies, assembles dumps, sorts out events: bytes in, results out, no I/O and no clock."""

from __future__ import annotations

import logging
import os
import weakref
from collections import OrderedDict, deque
from struct import Struct

from .abi import Abi
from .codec import Message, decode, encode, numbered
from .constants import ExtensionType, MessageType
from .errors import ChannelClosed, DecodeError, DumpOverflow, EncodeError, KernelError, PFKeyError, kernel_error
from .messages import Address
from .tables import Batch, Messages, assemble
from .typed import describe, is_same_policy

__all__ = ["Conversation", "Request", "Watch"]

log = logging.getLogger("pfkey.conversation")

DUMPS = (MessageType.DUMP, MessageType.SPDDUMP)
_REMEMBERED = 4096
"""Sequence numbers kept after their request has ended, so that what arrives late is known for what it is."""
_EVENTS = 65536
"""Events kept for a reader; the oldest are dropped, and counted, when nobody reads them."""
_OWN = 1 << 20
"""How many of the last sequence numbers are known as our own in what another channel hears."""
_MIGRATIONS = 64
"""How many MIGRATEs are remembered until their broadcast is heard on another channel."""
SPD_BROADCASTS = frozenset(
    (
        MessageType.SPDADD,
        MessageType.SPDUPDATE,
        MessageType.SPDDELETE,
        MessageType.SPDDELETE2,
        MessageType.SPDFLUSH,
        MessageType.SPDEXPIRE,
        MessageType.SPDSETIDX,
        MessageType.MIGRATE,
    )
)
"""What tells everybody that the SPD changed."""


# Type, errno, seq and pid of struct sadb_msg.
_HEADER = {"little": Struct("<xBB5xII"), "big": Struct(">xBB5xII")}
_HEADER_SIZE = 16


class Request:
    """One request under way: what was sent, and what came back."""

    __slots__ = ("_batches", "count", "data", "dump", "error", "last", "message", "owner", "replies", "seq", "type")

    def __init__(self, message: Message, data: bytes, seq: int) -> None:
        self.message = message
        self.data = data
        self.seq = seq
        self.type = message.type
        self.dump = self.type in DUMPS
        self.replies: list[Message] = []
        """The answer, when it is no dump."""
        self.count = 0
        """The parts of a dump so far."""
        self.last = 0
        """The count in the last part."""
        self._batches: list[Batch] = []
        self.error: PFKeyError | None = None
        self.owner: object = None
        """Who waits for it; nobody any more once it is done."""

    @property
    def done(self) -> bool:
        """Whether nothing more belongs to it."""
        if self.error is not None:
            return True
        if not self.dump:
            return bool(self.replies)
        return bool(self.count) and self.last == 0

    def add(self, batch: Batch, last: int) -> None:
        """Keep parts of the dump, of which the last says `last`."""
        self._batches.append(batch)
        self.count += len(batch.lengths)
        self.last = last

    def parts(self) -> Messages:
        """All parts of the dump; DecodeError when one is no message."""
        return assemble(self._batches, self.message.abi)

    def __repr__(self) -> str:
        state = "failed" if self.error else "done" if self.done else "under way"
        return f"<Request {describe(self.message)} seq={self.message.seq} {state}>"


class Watch:
    """What somebody who watches the SPD has not seen yet: messages, and whether a request of this side caused them."""

    __slots__ = ("__weakref__", "limit", "lost", "queue", "stopped")

    def __init__(self, limit: int = _EVENTS) -> None:
        self.limit = limit
        self.queue: deque[tuple[Message, bool]] = deque()
        self.lost = 0
        """Messages dropped because the queue was full."""
        self.stopped = False

    def take(self) -> tuple[Message, bool] | None:
        """The oldest, if there is one."""
        return self.queue.popleft() if self.queue else None


class Conversation:
    """One side of a PF_KEY connection.

    Give what arrives to `receive`; it ends up in a Request, or among the events.  A reply belongs to a request when
    pid, seq and type agree and it names the same selector or SPI: processes of different containers can share a pid,
    and Linux sends every acknowledgement to every socket.

    `asking` is the conversation of another channel of the same connection, whose requests are not news here.
    """

    def __init__(
        self, abi: Abi, *, pid: int | None = None, first_seq: int | None = None, asking: Conversation | None = None
    ) -> None:
        self.abi = abi
        self._asking = asking
        self.pid = os.getpid() if pid is None else pid
        self._read_header = _HEADER[abi.byteorder].unpack_from
        self._seq = int.from_bytes(os.urandom(4), "little") if first_seq is None else first_seq - 1
        self._pending: dict[int, Request] = {}
        self._ended: OrderedDict[int, MessageType | int] = OrderedDict()
        self._issued = 0
        self._migrations: dict[int, Message] = {}
        self._events: deque[Message] = deque(maxlen=_EVENTS)
        self._events_wanted = False
        self._events_dropped = 0
        self._watches: tuple[weakref.ref[Watch], ...] = ()
        self._watches_lost = 0
        self.rest_of_dump = False
        """A dump was given up and its last part has not come: parts of it must not be taken for those of the next."""
        self.undecodable = 0
        """Datagrams that were no message and answered no request."""

    @property
    def lost_events(self) -> int:
        """Messages that came faster than somebody who reads events, or watches, took them."""
        return self._watches_lost + (self._events_dropped if self._events_wanted else 0)

    @property
    def pending(self) -> int:
        """How many requests are under way."""
        return len(self._pending)

    @property
    def has_events(self) -> bool:
        """Whether `take_events` would give any."""
        return bool(self._events)

    def request(self, message: Message) -> Request:
        """Register a request: `data` of the result is what to send."""
        request = self.prepare(message, self.next_seq())
        self.begin(request)
        return request

    def next_seq(self) -> int:
        """A sequence number that nothing under way or remembered has."""
        while True:
            self._issued = min(self._issued + 1, _OWN)
            self._seq = (self._seq + 1) & 0xFFFFFFFF
            if self._seq and self._seq not in self._pending and self._seq not in self._ended:
                return self._seq

    def prepare(self, message: Message, seq: int) -> Request:
        """A request that is not registered yet.

        One that the wire cannot carry has its EncodeError already, and is not to be sent.
        """
        message = numbered(message, seq, self.pid)
        try:
            return Request(message, encode(message), seq)
        except EncodeError as error:
            request = Request(message, b"", seq)
            request.error = error
            return request

    def begin(self, request: Request) -> None:
        """Register it: what answers it is not an event any more."""
        self._pending[request.seq] = request
        if request.type == MessageType.MIGRATE:
            self._migrations[request.seq] = request.message
            if len(self._migrations) > _MIGRATIONS:
                del self._migrations[next(iter(self._migrations))]

    def end(self, request: Request) -> None:
        """The request is over, answered or given up; what still arrives for it is dropped."""
        if request.error is not None:
            self._migrations.pop(request.seq, None)
        if self._pending.pop(request.seq, None) is not None:
            if request.dump and _may_go_on(request):
                self.rest_of_dump = True
            self._ended[request.seq] = request.type
            while len(self._ended) > _REMEMBERED:
                self._ended.popitem(last=False)

    def receive(self, data: bytes) -> Request | None:
        """Take what arrived; returns the request it belongs to, if it does."""
        try:
            message = decode(data, self.abi)
        except DecodeError as error:
            return self._undecodable(data, error)
        _, errno, seq, pid = self._read_header(data)
        kind = message.type
        request = self._request_of(message, kind, errno, seq, pid)
        if request is not None:
            self._answer(request, message, data)
            own = True
        elif self._is_late(kind, errno, seq, pid):
            log.debug("late, or a second copy: %r", message)
            own = True
        else:
            own = self._asking is not None and self._asking.is_ours(message)
            if not own:
                self._note_event(message)
        if self._watches and not errno and kind in SPD_BROADCASTS:
            self._show(message, own)
        return request

    def receive_batch(self, batch: Batch) -> list[Request]:
        """Take what arrived together; returns the requests it belongs to.

        Parts of a dump, as long as nothing else is among them, are kept as they are and decoded at its end.
        """
        dump = next((one for one in self._pending.values() if one.dump), None)
        if dump is not None and (last := self._continued(dump, batch)) is not None:
            dump.add(batch, last)
            return [dump]
        return [request for data in batch.datagrams() if (request := self.receive(data)) is not None]

    def _continued(self, dump: Request, batch: Batch) -> int | None:
        """The count in the last of these messages when all of them are the next parts of this dump."""
        if not batch.lengths or min(batch.lengths) < _HEADER_SIZE:
            return None
        read = self._read_header
        wanted = (int(dump.message.type), 0, self.pid)
        start, seq = 0, dump.last
        for number, length in enumerate(batch.lengths, dump.count + 1):
            kind, error, before, pid = read(batch.arena, start)
            follows = before == seq - 1 or number == 1 if self.abi.dump_counts_down else before in (number, 0)
            if (kind, error, pid) != wanted or not follows or (seq == 0 and number > 1):
                return None
            seq = before
            start += length
        return seq

    def is_ours(self, message: Message) -> bool:
        """Whether a request of this conversation caused it.

        Asked about what a second channel hears, by whatever thread reads that: it takes no lock, for all it looks at
        changes in one step.
        """
        if message.pid == self.pid:
            return (self._seq - message.seq) & 0xFFFFFFFF < self._issued
        if message.type != MessageType.MIGRATE or message.pid or not self.abi.migrate_answers_seq_zero:
            return False
        for seq, asked in list(self._migrations.items()):
            if _same_subject(asked, message):
                return self._migrations.pop(seq, None) is not None
        return False

    def take_events(self) -> list[Message]:
        """The events so far, oldest first; they are handed out once."""
        self._events_wanted = True
        events = list(self._events)
        self._events.clear()
        return events

    def next_event(self) -> Message | None:
        """The oldest event, if there is one."""
        self._events_wanted = True
        return self._events.popleft() if self._events else None

    def watch(self) -> Watch:
        """From now on keep what tells that the SPD changed, whoever caused it: until `unwatch`, or while it is held."""
        watch = Watch()
        self._watches += (weakref.ref(watch),)
        return watch

    def unwatch(self, watch: Watch) -> None:
        """Keep no more for it."""
        self._watches = tuple(one for one in self._watches if one() not in (watch, None))

    def _show(self, message: Message, own: bool) -> None:
        for one in self._watches:
            watch = one()
            if watch is None:
                self._watches = tuple(another for another in self._watches if another() is not None)
                continue
            if len(watch.queue) >= watch.limit:
                watch.queue.popleft()
                watch.lost += 1
                self._watches_lost += 1
            watch.queue.append((message, own))

    def give_up(self, request: Request, error: PFKeyError) -> None:
        """No more is expected: a dump that stopped half-way was cut, anything else is answered by `error`."""
        if request.dump and request.count:
            error = DumpOverflow(
                f"{describe(request.message)} stopped after {request.count} parts, before the last;"
                " the receive buffer was too small for it"
            )
        request.error = error
        self.end(request)

    # Whose is it?

    def _request_of(self, message: Message, kind: MessageType | int, errno: int, seq: int, pid: int) -> Request | None:
        if kind in DUMPS:
            return self._dump_of(kind, pid)
        if kind == MessageType.MIGRATE and self.abi.migrate_answers_seq_zero and not errno:
            return self._migration_of(message)
        if pid != self.pid:
            return None
        if self._answers_without_seq(kind, seq):
            return self._look_up_of(message)
        request = self._pending.get(seq)
        if request is None or not self._type_answers(request.type, kind, errno):
            return None
        return request if errno or _same_subject(request.message, message) else None

    def _type_answers(self, asked: MessageType | int, kind: MessageType | int, errno: int) -> bool:
        if kind == asked:
            return True
        return (
            self.abi.setidx_answers_spdadd
            and asked == MessageType.SPDSETIDX
            and kind == MessageType.SPDADD
            and not errno
        )

    def _dump_of(self, kind: MessageType | int, pid: int) -> Request | None:
        """Parts of a dump carry a count where the seq would be; there is one dump of a type at a time."""
        if pid != self.pid:
            return None
        return next((one for one in self._pending.values() if one.type == kind), None)

    def _migration_of(self, message: Message) -> Request | None:
        """Linux answers MIGRATE with seq 0 and pid 0: only what it names tells whose it is."""
        for request in self._pending.values():
            if request.type == MessageType.MIGRATE and _same_subject(request.message, message):
                return request
        return None

    def _answers_without_seq(self, kind: MessageType | int, seq: int) -> bool:
        return self.abi.spdget_may_answer_seq_zero and kind == MessageType.SPDGET and not seq

    def _look_up_of(self, message: Message) -> Request | None:
        """Only the id in an answer to SPDGET with seq 0 tells whose it is; its errors carry the request's seq."""
        for request in self._pending.values():
            asked = request.message
            if asked.type == MessageType.SPDGET and not request.done and _same_subject(asked, message):
                return request
        return None

    def _is_late(self, kind: MessageType | int, errno: int, seq: int, pid: int) -> bool:
        if pid != self.pid:
            return False
        if kind in DUMPS:  # they are sent to who asked alone: this is the rest of one given up
            if not seq or errno:
                self.rest_of_dump = False
            return True
        if self._answers_without_seq(kind, seq):
            return True
        return seq in self._ended and self._type_answers(self._ended[seq], kind, errno)

    def _note_event(self, message: Message) -> None:
        if len(self._events) == _EVENTS:
            self._events_dropped += 1
        self._events.append(message)

    def _undecodable(self, data: bytes, error: DecodeError) -> Request | None:
        if len(data) >= 16:
            seq = int.from_bytes(data[8:12], self.abi.byteorder)
            pid = int.from_bytes(data[12:16], self.abi.byteorder)
            request = self._pending.get(seq)
            if request is not None and pid == self.pid and data[1] == request.type:
                request.error = error
                return request
        self.undecodable += 1
        log.warning("%d bytes that are no message were dropped: %s", len(data), error)
        return None

    # What does it say?

    def _answer(self, request: Request, message: Message, data: bytes) -> None:
        if request.dump:
            self._add_part(request, message, data)
        elif message.errno:
            request.error = self._refusal(request, message)
        else:
            request.replies.append(message)

    def _refusal(self, request: Request, message: Message, advice: str = "") -> PFKeyError:
        name = self.abi.error_name(message.errno)
        return kernel_error(
            describe(request.message), name, message.errno, request=request.message, reply=message, advice=advice
        )

    def _add_part(self, request: Request, message: Message, data: bytes) -> None:
        if message.errno and not request.count and message.errno < 128:
            advice = _UNFINISHED if self.abi.error_name(message.errno) == "EBUSY" else ""
            request.error = self._refusal(request, message, advice)
            return
        if message.errno:
            request.error = DumpOverflow(
                f"{describe(request.message)} is incomplete: after {request.count} parts the kernel said"
                f" {self.abi.error_name(message.errno)} (Linux does so at an entry that PF_KEY cannot express)"
            )
            return
        gap = self._gap(request, message.seq)
        request.add(Batch.of([data]), message.seq)
        if gap < 0:
            request.error = error = DumpOverflow(
                f"{describe(request.message)}: among its parts came number {message.seq} of another one, given up"
                " before; ask again"
            )
            error.mixed = True
        elif gap:
            request.error = DumpOverflow(
                f"{describe(request.message)} lacks {gap} parts before number {message.seq};"
                " the receive buffer was too small for it"
            )

    def _gap(self, request: Request, seq: int) -> int:
        """How many parts are missing before this one."""
        if self.abi.dump_counts_down:
            return request.last - 1 - seq if request.count else 0
        return seq - request.count - 1 if seq else 0


def _may_go_on(dump: Request) -> bool:
    """Whether parts of it may still come: not after the last, nor when the kernel refused it, or never saw it."""
    error = dump.error
    if isinstance(error, DumpOverflow) and error.mixed:
        return True  # the last one that came was another dump's
    if dump.count and dump.last == 0:
        return False
    return not isinstance(error, (KernelError, ChannelClosed)) or getattr(error, "outcome_unknown", False)


_UNFINISHED = (
    "a former dump of this connection has not come to its end; Linux never goes on with one when the receive buffer"
    " takes fewer than three messages (4 kB): ask over another connection, with a larger buffer"
)
_PREFIXED = (ExtensionType.ADDRESS_SRC, ExtensionType.ADDRESS_DST)
_BY_ID = (MessageType.SPDGET, MessageType.SPDDELETE2)


def _same_subject(asked: Message, reply: Message) -> bool:
    """Whether a reply is about what was asked: a policy's selector and direction, an SA's SPI and end points."""
    if is_same_policy(asked, reply) and asked.type not in _BY_ID:  # what nearly every answer is
        return True
    wanted = asked.policy
    if wanted is not None:
        policy = reply.policy
        if policy is not None and asked.type in _BY_ID:
            return wanted.id == policy.id
        if policy is not None and policy.direction != wanted.direction:
            return False
        return all(_same_side(asked.get(kind), reply.get(kind), whole=True) for kind in _PREFIXED)
    if asked.satype != reply.satype:  # of a policy it says nothing: Linux puts that of the template into MIGRATE's
        return False
    if asked.spi is not None and reply.spi is not None and asked.spi != reply.spi:
        return False
    return all(_same_side(asked.get(kind), reply.get(kind), whole=False) for kind in _PREFIXED)


def _same_side(asked: object, reply: object, *, whole: bool) -> bool:
    """Compare as far as both say something; of an SA's end points the address alone counts."""
    if not isinstance(asked, Address) or not isinstance(reply, Address):
        return True
    if not whole:
        return asked.address == reply.address
    return (asked.address, asked.prefixlen, asked.port) == (reply.address, reply.prefixlen, reply.port)
