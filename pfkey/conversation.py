"""Pairs requests with replies, assembles dumps, sorts out events: bytes in, results out, no I/O and no clock."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict, deque
from struct import Struct

from .abi import Abi
from .codec import Message, decode, encode
from .constants import ExtensionType, MessageType
from .errors import DecodeError, DumpOverflow, PFKeyError, kernel_error
from .messages import Address
from .tables import Batch, Messages, assemble
from .typed import describe

__all__ = ["Conversation", "Request"]

log = logging.getLogger("pfkey.conversation")

DUMPS = (MessageType.DUMP, MessageType.SPDDUMP)
_REMEMBERED = 4096
"""Sequence numbers kept after their request has ended, so that what arrives late is known for what it is."""
_EVENTS = 65536
"""Events kept for a reader; the oldest are dropped, and counted, when nobody reads them."""


# Type, errno, seq and pid of struct sadb_msg.
_HEADER = {"little": Struct("<xBB5xII"), "big": Struct(">xBB5xII")}


class Request:
    """One request under way: what was sent, and what came back."""

    __slots__ = ("_batches", "count", "data", "dump", "error", "last", "message", "replies", "sent")

    def __init__(self, message: Message) -> None:
        self.message = message
        self.data = encode(message)
        self.dump = message.type in DUMPS
        self.replies: list[Message] = []
        """The answer, when it is no dump."""
        self.count = 0
        """The parts of a dump so far."""
        self.last = 0
        """The count in the last part."""
        self._batches: list[Batch] = []
        self.error: PFKeyError | None = None
        self.sent = False

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


class Conversation:
    """One side of a PF_KEY connection.

    Give what arrives to `receive`; it ends up in a Request, or among the events.  A reply belongs to a request when
    pid, seq and type agree and it names the same selector or SPI: processes of different containers can share a pid,
    and Linux sends every acknowledgement to every socket.
    """

    def __init__(self, abi: Abi, *, pid: int | None = None, first_seq: int | None = None) -> None:
        self.abi = abi
        self.pid = os.getpid() if pid is None else pid
        self._seq = int.from_bytes(os.urandom(4), "little") if first_seq is None else first_seq - 1
        self._pending: dict[int, Request] = {}
        self._ended: OrderedDict[int, MessageType | int] = OrderedDict()
        self._events: deque[Message] = deque(maxlen=_EVENTS)
        self.lost_events = 0
        """Events dropped because nobody took them."""
        self.undecodable = 0
        """Datagrams that were no message and answered no request."""

    def request(self, message: Message) -> Request:
        """Register a request: `data` of the result is what to send."""
        request = Request(message.replace(seq=self._next_seq(), pid=self.pid))
        self._pending[request.message.seq] = request
        return request

    def end(self, request: Request) -> None:
        """The request is over, answered or given up; what still arrives for it is dropped."""
        if self._pending.pop(request.message.seq, None) is not None:
            self._ended[request.message.seq] = request.message.type
            while len(self._ended) > _REMEMBERED:
                self._ended.popitem(last=False)

    def receive(self, data: bytes) -> Request | None:
        """Take what arrived; returns the request it belongs to, if it does."""
        try:
            message = decode(data, self.abi)
        except DecodeError as error:
            return self._undecodable(data, error)
        request = self._request_of(message)
        if request is not None:
            self._answer(request, message, data)
            return request
        if self._is_late(message):
            log.debug("late, or a second copy: %r", message)
        else:
            self._note_event(message)
        return None

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
        if not batch.lengths or min(batch.lengths) < _HEADER[self.abi.byteorder].size:
            return None
        read = _HEADER[self.abi.byteorder].unpack_from
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
        """Whether a request of this conversation caused it (asked about what a second channel hears)."""
        return message.pid == self.pid and (message.seq in self._pending or message.seq in self._ended)

    def take_events(self) -> list[Message]:
        """The events so far, oldest first; they are handed out once."""
        events = list(self._events)
        self._events.clear()
        return events

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

    def _next_seq(self) -> int:
        while True:
            self._seq = (self._seq + 1) & 0xFFFFFFFF
            if self._seq and self._seq not in self._pending and self._seq not in self._ended:
                return self._seq

    def _request_of(self, message: Message) -> Request | None:
        if message.type in DUMPS:
            return self._dump_of(message)
        if message.type == MessageType.MIGRATE and self.abi.migrate_answers_seq_zero and not message.errno:
            return self._migration_of(message)
        if message.pid != self.pid:
            return None
        if self._answers_without_seq(message):
            return self._look_up_of(message)
        request = self._pending.get(message.seq)
        if request is None or not self._type_answers(request.message.type, message):
            return None
        return request if message.errno or _same_subject(request.message, message) else None

    def _type_answers(self, asked: MessageType | int, message: Message) -> bool:
        if message.type == asked:
            return True
        return (
            self.abi.setidx_answers_spdadd
            and asked == MessageType.SPDSETIDX
            and message.type == MessageType.SPDADD
            and not message.errno
        )

    def _dump_of(self, message: Message) -> Request | None:
        """Parts of a dump carry a count where the seq would be; there is one dump of a type at a time."""
        if message.pid != self.pid:
            return None
        return next((one for one in self._pending.values() if one.message.type == message.type), None)

    def _migration_of(self, message: Message) -> Request | None:
        """Linux answers MIGRATE with seq 0 and pid 0: only what it names tells whose it is."""
        for request in self._pending.values():
            if request.message.type == MessageType.MIGRATE and _same_subject(request.message, message):
                return request
        return None

    def _answers_without_seq(self, message: Message) -> bool:
        return self.abi.spdget_may_answer_seq_zero and message.type == MessageType.SPDGET and not message.seq

    def _look_up_of(self, message: Message) -> Request | None:
        """Only the id in an answer to SPDGET with seq 0 tells whose it is; its errors carry the request's seq."""
        for request in self._pending.values():
            asked = request.message
            if asked.type == MessageType.SPDGET and not request.done and _same_subject(asked, message):
                return request
        return None

    def _is_late(self, message: Message) -> bool:
        if message.type in DUMPS or self._answers_without_seq(message):
            return message.pid == self.pid  # sent to who asked alone: this belongs to one given up
        if message.pid != self.pid or message.seq not in self._ended:
            return False
        return self._type_answers(self._ended[message.seq], message)

    def _note_event(self, message: Message) -> None:
        if len(self._events) == _EVENTS:
            self.lost_events += 1
        self._events.append(message)

    def _undecodable(self, data: bytes, error: DecodeError) -> Request | None:
        if len(data) >= 16:
            seq = int.from_bytes(data[8:12], self.abi.byteorder)
            pid = int.from_bytes(data[12:16], self.abi.byteorder)
            request = self._pending.get(seq)
            if request is not None and pid == self.pid and data[1] == request.message.type:
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
            request.error = self._refusal(request, message)
            return
        if message.errno:
            request.error = DumpOverflow(
                f"{describe(request.message)} is incomplete: after {request.count} parts the kernel said"
                f" {self.abi.error_name(message.errno)} (Linux does so at an entry that PF_KEY cannot express)"
            )
            return
        gap = self._gap(request, message.seq)
        request.add(Batch.of([data]), message.seq)
        if gap:
            request.error = DumpOverflow(
                f"{describe(request.message)} lacks {gap} parts before number {message.seq};"
                " the receive buffer was too small for it"
            )

    def _gap(self, request: Request, seq: int) -> int:
        """How many parts are missing before this one."""
        if self.abi.dump_counts_down:
            return request.last - 1 - seq if request.count else 0
        return seq - request.count - 1 if seq else 0


_PREFIXED = (ExtensionType.ADDRESS_SRC, ExtensionType.ADDRESS_DST)
_BY_ID = (MessageType.SPDGET, MessageType.SPDDELETE2)


def _same_subject(asked: Message, reply: Message) -> bool:
    """Whether a reply is about what was asked: a policy's selector and direction, an SA's SPI and end points."""
    if asked.satype != reply.satype:
        return False
    if asked.policy is not None:
        if reply.policy is not None and asked.type in _BY_ID:
            return asked.policy.id == reply.policy.id
        if reply.policy is not None and reply.policy.direction != asked.policy.direction:
            return False
        return all(_same_side(asked.get(kind), reply.get(kind), whole=True) for kind in _PREFIXED)
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
