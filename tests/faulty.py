"""A channel that goes wrong on purpose, in front of any other one: an embedded kernel's, or a real one's."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pfkey import Abi, Channel, ChannelClosed, ExtensionType, Message, MessageType, Template, decode, encode
from pfkey.messages import PolicyExtension


@dataclass
class Fault:
    """What happens to the next message of a type: see the functions below."""

    type: MessageType
    send: Callable[[FaultyChannel, bytes], None]
    skip: int = 0


@dataclass
class FaultyChannel:
    """Has the members of a Channel and passes everything on until a fault is due."""

    inner: Channel
    faults: list[Fault] = field(default_factory=list)
    sent: list[Message] = field(default_factory=list)
    answers: deque[bytes] = field(default_factory=deque)
    swallow: int = 0
    interrupt: bool = False

    @property
    def abi(self) -> Abi:
        return self.inner.abi

    def send(self, data: bytes) -> None:
        message = decode(data, self.abi)
        self.sent.append(message)
        for fault in self.faults:
            if fault.type == message.type:
                if fault.skip:
                    fault.skip -= 1
                    break
                self.faults.remove(fault)
                fault.send(self, data)
                return
        self.inner.send(data)

    def receive(self, timeout: float | None) -> bytes | None:
        if self.interrupt:
            self.interrupt = False
            raise KeyboardInterrupt
        if self.answers:
            return self.answers.popleft()
        data = self.inner.receive(timeout)
        while data is not None and self.swallow:
            self.swallow -= 1
            data = self.inner.receive(timeout)
        return data

    def fileno(self) -> int:
        return self.inner.fileno()

    def close(self) -> None:
        self.inner.close()

    def types(self) -> list[MessageType | int]:
        """The messages sent for policies so far, reading aside."""
        reading = (MessageType.SPDGET, MessageType.SPDDUMP)
        return [message.type for message in self.sent if message.type not in reading]


def rejects(name: str) -> Callable[[FaultyChannel, bytes], None]:
    """The kernel is not asked; the answer is this error."""

    def send(channel: FaultyChannel, data: bytes) -> None:
        message = decode(data, channel.abi).replace(errno=channel.abi.error_numbers[name])
        if not channel.abi.error_echoes_request:
            message = Message(
                message.type,
                abi=message.abi,
                satype=message.satype,
                errno=message.errno,
                seq=message.seq,
                pid=message.pid,
            )
        channel.answers.append(encode(message))

    return send


def spoils(channel: FaultyChannel, data: bytes) -> None:
    """The kernel gets it with a transform that it does not know, and rejects it itself."""
    message = decode(data, channel.abi)
    policy = message.policy
    assert policy is not None
    bad = PolicyExtension(policy.action, policy.direction, policy.id, policy.priority, (Template(99),))
    extensions = dict(message.extensions) | {ExtensionType.POLICY: bad}
    channel.inner.send(encode(Message(message.type, extensions, abi=message.abi, seq=message.seq, pid=message.pid)))


def loses_request(channel: FaultyChannel, data: bytes) -> None:
    """The kernel never sees it, and nobody answers."""


def loses_reply(channel: FaultyChannel, data: bytes) -> None:
    """The kernel does the work; its answer is lost."""
    channel.inner.send(data)
    while channel.inner.receive(0.05) is not None:
        pass


def no_buffers_after_work(channel: FaultyChannel, data: bytes) -> None:
    """The kernel does the work and says ENOBUFS, as FreeBSD does when the reply does not fit."""
    loses_reply(channel, data)
    raise OSError(errno.ENOBUFS, "No buffer space available")


def no_permission(channel: FaultyChannel, data: bytes) -> None:
    """send() fails; nothing was parsed."""
    raise OSError(errno.EPERM, "Operation not permitted")


def closes(channel: FaultyChannel, data: bytes) -> None:
    """The kernel does the work, and the socket vanishes."""
    loses_reply(channel, data)
    channel.inner.close()
    raise ChannelClosed("the socket is gone")


def interrupts(channel: FaultyChannel, data: bytes) -> None:
    """The kernel does the work, and Ctrl-C comes while its answer is awaited."""
    channel.inner.send(data)
    channel.interrupt = True
