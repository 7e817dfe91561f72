"""What both faces of a connection do alike: sending, receiving, reading answers, and errors in words."""

from __future__ import annotations

import errno
import logging
from collections import deque
from collections.abc import Iterable
from typing import cast

from .abi import Abi
from .channel import Channel, grow_receive_buffer, receive_batch, receive_many, send_many
from .codec import Message
from .constants import MessageType
from .conversation import DUMPS, Conversation, Request
from .errors import ChannelClosed, DumpOverflow, KernelError, NotSupported, PFKeyError, ReplyTimeout, kernel_error
from .tables import Batch, Messages
from .typed import describe

__all__ = [
    "DUMP_TRIES",
    "answer",
    "answerable",
    "closed",
    "feed",
    "is_dump",
    "is_to_be_repeated",
    "parts",
    "receive",
    "send",
    "timed_out",
]

log = logging.getLogger("pfkey.kernel")

DUMP_TRIES = 6
"""How often an incomplete dump is asked for, each time with a larger receive buffer."""

_OTHERWISE: dict[MessageType | int, str] = {
    MessageType.ACQUIRE: "no kernel answers an ACQUIRE; use send()",
    MessageType.DUMP: "the answer to a DUMP has many parts; use dump()",
    MessageType.SPDDUMP: "the answer to an SPDDUMP has many parts; use dump()",
}
_NOTHING = (errno.EINTR, errno.EAGAIN, errno.EWOULDBLOCK)
_GONE = (errno.EBADF, errno.EPIPE, errno.ENOTCONN, errno.ECONNRESET, errno.ECONNREFUSED)


def answerable(messages: Iterable[Message]) -> list[Message]:
    """The messages, each of which has one answer; raises NotSupported for one that is to be sent in another way."""
    waiting = list(messages)
    for message in waiting:
        if message.type in _OTHERWISE:
            raise NotSupported(_OTHERWISE[message.type])
    return waiting


def answer(request: Request) -> Message | PFKeyError:
    """What came of a request that is done."""
    return request.error or request.replies[0]


def parts(dump: Request) -> Messages:
    """What a dump gave; an empty database answers ENOENT."""
    if dump.error is not None and not (isinstance(dump.error, KernelError) and dump.error.name == "ENOENT"):
        raise dump.error
    return dump.parts()


def is_dump(message: Message) -> bool:
    """Whether its answer has many parts."""
    return message.type in DUMPS


def is_to_be_repeated(dump: Request, channel: Channel) -> bool:
    """Whether a dump may be had whole now: with a larger receive buffer, or with nothing of another one among it."""
    if not isinstance(dump.error, DumpOverflow):
        return False
    if dump.error.mixed:
        log.info("%s", dump.error)
        return True
    if not grow_receive_buffer(channel):
        if channel.abi.dump_counts_down:  # Linux waits for room, and what it leaves out is no matter of that
            dump.error.args = (f"{dump.error}; {_advice(channel)}",)
        return False
    log.info("%s; asking again", dump.error)
    return True


def _advice(channel: Channel) -> str:
    """How a kernel may be given the buffer that a whole dump fits into."""
    if hasattr(channel, "set_receive_buffer"):
        return "the system grants no larger one: raise its limit (FreeBSD: sysctl kern.ipc.maxsockbuf)"
    return (
        "its channel has no set_receive_buffer(size) -> size, by which a larger one is asked for: give it that, or the"
        " socket at its other end a buffer of 1 MiB (SO_RCVBUF; FreeBSD: sysctl net.key.recvspace, before 14"
        " net.raw.recvspace)"
    )


# The channel.


def send(channel: Channel, requests: Iterable[Request]) -> list[Request]:
    """Send all; those whose send failed, which have their error now.  The others go on."""
    failures: list[Request] = []
    waiting = deque(request for request in requests if request.error is None)
    while waiting:
        try:
            # One whose send failed may have been carried out (FreeBSD, ENOBUFS), and is never sent again.
            sent = 0
            if len(waiting) > 1 and hasattr(channel, "send_many"):
                sent = min(send_many(channel, [request.data for request in waiting]), len(waiting))
            if sent <= 0:  # it took none of several and did not say why: one alone is sent, or raises
                channel.send(waiting[0].data)
                sent = 1
        except OSError as error:
            failed = waiting.popleft()
            failed.error = _send_error(failed, error, channel.abi)
            failures.append(failed)
            if isinstance(failed.error, ChannelClosed):
                for request in waiting:
                    request.error = ChannelClosed(str(failed.error), request=request.message)
                return failures + list(waiting)
        else:
            for _ in range(sent):
                waiting.popleft()
    return failures


def _send_error(request: Request, error: OSError, abi: Abi) -> PFKeyError:
    doing = describe(request.message)
    if isinstance(error, ChannelClosed) or error.errno in _GONE:
        return ChannelClosed(f"{doing} was not sent: {error}", request=request.message)
    number, name = _error_name(error, abi)
    unknown = name == "ENOBUFS"
    advice = (
        "the receive buffer was full, and the kernel may have done it all the same: read before trying again"
        if unknown
        else "the kernel did not look at it"
    )
    result = kernel_error(doing, name, number, request=request.message, advice=advice)
    result.outcome_unknown = unknown
    return result


def _error_name(error: OSError, abi: Abi) -> tuple[int, str]:
    """This kernel's number and the name: a channel to another system may give either system's number."""
    number = error.errno or 0
    name = getattr(error, "name", "") or errno.errorcode.get(number, "")
    if name in abi.error_numbers:
        return abi.error_numbers[name], name
    return number, abi.error_name(number)


def receive(channel: Channel, limit: int, timeout: float, *, dump: bool) -> list[bytes | Batch] | None:
    """What is there: up to `limit` messages, or, of a dump, a batch that may lie where the kernel put it.

    None says that the kernel reported a loss.  Raises ChannelClosed, KernelError where the channel raises another
    OSError (whether the kernel did what it was asked is not known then), and whatever else the channel raises.
    """
    try:
        if dump:
            batch = receive_batch(channel, limit, timeout)
            return [batch] if batch.lengths else []
        return cast("list[bytes | Batch]", receive_many(channel, limit, timeout))
    except PFKeyError:
        raise
    except OSError as error:
        if error.errno in _NOTHING or isinstance(error, TimeoutError):
            return []
        if error.errno in _GONE:
            raise ChannelClosed(f"reading from {channel.abi} failed: {error}") from error
        if _error_name(error, channel.abi)[1] == "ENOBUFS":
            # FreeBSD 14 with SO_RERROR: something was lost.  Whoever misses it times out, or finds a gap.
            log.warning("the receive buffer of %s was full; messages were lost", channel.abi)
            return None
        number, name = _error_name(error, channel.abi)
        failure = kernel_error("", name, number)
        failure.strerror = (
            f"reading from {channel.abi} failed ({name}): {error}; what was under way may have been done: read before"
            " trying again"
        )
        failure.outcome_unknown = True
        raise failure from error


def feed(conversation: Conversation, arrived: bytes | Batch) -> Iterable[Request]:
    """Give the conversation what `receive` gave; the requests that got something."""
    if isinstance(arrived, Batch):
        return conversation.receive_batch(arrived)
    request = conversation.receive(arrived)
    return () if request is None else (request,)


# What went wrong, in words.


def timed_out(request: Request, seconds: float) -> ReplyTimeout:
    """Nothing came for so long."""
    return ReplyTimeout(
        f"{describe(request.message)}: no answer from {request.message.abi} in {seconds:g} seconds;"
        " whether it was done is not known: read before trying again",
        request=request.message,
    )


def closed(requests: Iterable[Request], why: object, *, sent: bool) -> None:
    """Those of them that are not done end with ChannelClosed."""
    for request in requests:
        if not request.done:
            doing = describe(request.message)
            text = f"{doing} was sent, then the channel closed: {why}" if sent else f"{doing} was not sent: {why}"
            request.error = ChannelClosed(text, request=request.message)
