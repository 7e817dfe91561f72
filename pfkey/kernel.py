"""The blocking face of one connection to a kernel: policies, security associations, events."""

from __future__ import annotations

import errno
import importlib
import logging
import select
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import ip_address
from types import TracebackType
from typing import NamedTuple, Self

from .abi import Abi
from .channel import Channel, NativeChannel, grow_receive_buffer, in_flight, receive_batch, receive_many, send_many
from .codec import Message, Value
from .constants import Action, Direction, ExtensionType, MessageType, Mode, PolicyScope, SAProtocol
from .conversation import Conversation, Request
from .errors import (
    ChannelClosed,
    DumpOverflow,
    KernelError,
    NotSupported,
    PFKeyError,
    ReplyTimeout,
    kernel_error,
)
from .messages import SA2, Address, AddressLike, Algorithm, Policy, PolicyExtension, SecurityAssociation, SPIRange
from .refusals import check_policy
from .tables import Batch, Dump, Messages
from .typed import SATYPE_OF, association_from, association_message, describe, policy_from, policy_message

__all__ = ["Kernel", "Supported", "connect"]

log = logging.getLogger("pfkey.kernel")

_UNANSWERED = (MessageType.ACQUIRE,)
_GONE = (errno.EBADF, errno.EPIPE, errno.ENOTCONN, errno.ECONNRESET, errno.ECONNREFUSED)
_DUMP_TRIES = 4
_MAIN_SCOPES = (PolicyScope.ANY, PolicyScope.GLOBAL)
_SLICE = 0.1
"""Seconds for which a reader of events keeps the connection from others, where both share one channel."""


class Supported(NamedTuple):
    """What a kernel answers to REGISTER: the algorithms whose code it has, by its own numbers."""

    authentication: tuple[Algorithm, ...]
    encryption: tuple[Algorithm, ...]


def connect(target: str | Channel = "native", *, events: Channel | None = None, timeout: float = 5.0) -> Kernel:
    """Connect to a kernel.

    `target` is "native", this host's; "embedded:PROFILE", a new and empty kernel in this process (linux, linux-6.12,
    linux-smp, freebsd-10 to freebsd-14, netbsd, macos); "unix:PATH", the kernel of `pfkey embedded --listen PATH`; or a
    Channel.  `events` is a second channel to the same kernel, which then has the events to itself.  `timeout` is how
    many seconds to wait for an answer.

    Raises NotSupported when there is no such kernel, KernelError (a PermissionError) when it is not for us.
    """
    channel = _channel(target) if isinstance(target, str) else target
    return Kernel(channel, events=events, timeout=timeout)


def _channel(target: str) -> Channel:
    name, _, profile = target.partition(":")
    if target == "native":
        return NativeChannel()
    if name == "embedded" and profile:
        # A floor above this one, and not needed by those who speak to a real kernel.
        channel: Channel = importlib.import_module("pfkey.embedded").EmbeddedKernel(profile).connect()
        return channel
    if name == "unix" and profile:
        # Others have no use for it, and need not wait for it at the import of this package.
        served: Channel = importlib.import_module("pfkey.served").ServedChannel(profile)
        return served
    raise NotSupported(f"no kernel {target!r}: say native, embedded:PROFILE, unix:PATH, or pass a Channel")


class Kernel:
    """A connection to a kernel; made by `connect`, closed by `close` or at the end of a `with` block.

    Any method may raise KernelError (the kernel refused, or its send call failed: `outcome_unknown` tells whether the
    work may have been done all the same), ReplyTimeout (the same is not known) and ChannelClosed; each carries the
    request.  Threads may share a Kernel: its calls are carried out one after the other.
    """

    def __init__(self, channel: Channel, *, events: Channel | None = None, timeout: float = 5.0) -> None:
        self.channel = channel
        self.timeout = timeout
        self._lock = threading.RLock()
        self._conversation = Conversation(channel.abi)
        self._event_channel = events
        self._event_lock = threading.RLock() if events is not None else self._lock
        self._event_conversation = Conversation(channel.abi) if events is not None else self._conversation

    @property
    def abi(self) -> Abi:
        """The system at the other end."""
        return self.channel.abi

    def __repr__(self) -> str:
        return f"<Kernel {self.abi}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channels; policies and SAs stay in the kernel."""
        self.channel.close()
        if self._event_channel is not None:
            self._event_channel.close()

    # Messages.

    def send(self, message: Message) -> None:
        """Send a message that no kernel answers: an ACQUIRE that reports an error."""
        with self._lock:
            request = self._conversation.request(message)
            try:
                self._send([request])
            finally:
                self._conversation.end(request)
            if request.error is not None:
                raise request.error

    def request(self, message: Message) -> Message:
        """Send a message and return the kernel's answer to it; seq and pid are filled in."""
        result = self.request_many([message])[0]
        if isinstance(result, PFKeyError):
            raise result
        return result

    def request_many(self, messages: Iterable[Message]) -> list[Message | PFKeyError]:
        """Send many messages, in order, and return for each its answer or the exception that it met.

        No more are under way at once than the receive buffer holds answers for.
        """
        results: list[Message | PFKeyError] = []
        with self._lock:
            waiting = list(messages)
            if any(message.type in _UNANSWERED for message in waiting):
                raise NotSupported("no kernel answers an ACQUIRE; use send()")
            self._drain()
            size = in_flight(self.channel)
            for start in range(0, len(waiting), size):
                requests = [self._conversation.request(message) for message in waiting[start : start + size]]
                self._exchange(requests)
                results += [request.error or request.replies[0] for request in requests]
        return results

    def dump(self, message: Message) -> Messages:
        """All parts of the answer to DUMP or SPDDUMP; an empty database gives none.

        A dump that arrives incomplete is asked for again with a larger receive buffer; DumpOverflow when that is not to
        be had.
        """
        with self._lock:
            request = self._dump_once(message)
            for _ in range(_DUMP_TRIES - 1):
                if not isinstance(request.error, DumpOverflow) or not grow_receive_buffer(self.channel):
                    break
                log.info("%s; asking again", request.error)
                request = self._dump_once(message)
        return _parts(request)

    def _dump_once(self, message: Message) -> Request:
        self._drain()
        request = self._conversation.request(message)
        self._exchange([request])
        return request

    # Policies.

    def check_policy(self, policy: Policy) -> None:
        """Raise NotSupported or EncodeError when this kernel would reject `policy` or store it as something else."""
        check_policy(policy, self.abi)

    def add_policy(self, policy: Policy) -> Policy:
        """SPDADD: the policy as the kernel stored it, its id filled in.  FileExistsError when the selector is taken."""
        self.check_policy(policy)
        return policy_from(self.request(policy_message(MessageType.SPDADD, policy, self.abi)))

    def update_policy(self, policy: Policy) -> Policy:
        """SPDUPDATE: replace the policy of this direction and selector; every kernel adds it when there is none.

        FreeBSD before 14 removes the old one first, and one that is rejected for its templates is gone on any FreeBSD.
        """
        self.check_policy(policy)
        return policy_from(self.request(policy_message(MessageType.SPDUPDATE, policy, self.abi)))

    def delete_policy(self, policy: Policy) -> Policy:
        """SPDDELETE by direction and selector, host bits included; the policy that was deleted, as the kernel says it.

        Raises KernelError when there is none (ENOENT on Linux, EINVAL on FreeBSD).
        """
        bare = Policy(policy.direction, policy.selector, policy.action)
        return policy_from(self.request(policy_message(MessageType.SPDDELETE, bare, self.abi)))

    def get_policy(self, policy_id: int) -> Policy:
        """SPDGET by the kernel's id.  FileNotFoundError when the kernel does not know it."""
        # Kernels look at the id alone, but want a direction and a type that exist.
        extension = PolicyExtension(Action.IPSEC, Direction.OUT, policy_id)
        message = Message(MessageType.SPDGET, {ExtensionType.POLICY: extension}, abi=self.abi)
        return policy_from(self.request(message))

    def dump_policies(self, *, everything: bool = False) -> Dump[Policy]:
        """SPDDUMP: the policies of the main table, in the kernel's order; a sequence, and a table to scan.

        With `everything` also what is not there: policies of sockets (Linux, directions 4 and 5) and of interfaces
        (FreeBSD, scope IFNET).
        """
        messages = self.dump(Message(MessageType.SPDDUMP, abi=self.abi))
        if not everything:
            main = [index for index, row in enumerate(messages.select("direction", "scope")) if self._is_main(*row)]
            messages = messages if len(main) == len(messages) else messages.pick(main)
        return Dump(messages, policy_from)

    def _is_main(self, direction: int, scope: int) -> bool:
        return direction in self.abi.directions and (not self.abi.has_scope or scope in _MAIN_SCOPES)

    def flush_policies(self) -> None:
        """SPDFLUSH: delete all policies, whoever made them."""
        self.request(Message(MessageType.SPDFLUSH, abi=self.abi))

    # Security associations.

    def get_spi(
        self,
        source: AddressLike,
        destination: AddressLike,
        *,
        protocol: SAProtocol | int = SAProtocol.ESP,
        minimum: int = 0xC0000000,
        maximum: int = 0xCFFFFFFF,
        mode: Mode | int = Mode.ANY,
        reqid: int = 0,
    ) -> int:
        """GETSPI: reserve an SPI (a CPI for IPComp) between `minimum` and `maximum`; the larval SA lives 30 seconds.

        Raises KernelError when none is free (ENOENT on Linux, EEXIST on FreeBSD).
        """
        extensions: dict[ExtensionType | int, Value] = {
            ExtensionType.ADDRESS_SRC: Address(ip_address(source), protocol=255),
            ExtensionType.ADDRESS_DST: Address(ip_address(destination), protocol=255),
            ExtensionType.SPIRANGE: SPIRange(minimum, maximum),
            ExtensionType.SA2: SA2(mode, 0, reqid),
        }
        message = Message(MessageType.GETSPI, extensions, abi=self.abi, satype=self._satype(protocol))
        reply = self.request(message)
        if reply.spi is None:
            raise PFKeyError(f"{describe(reply)} came without an SPI")
        return reply.spi

    def add_sa(self, sa: SecurityAssociation) -> SecurityAssociation:
        """ADD: the SA as the kernel echoed it.  FileExistsError when the SPI is taken."""
        return association_from(self.request(association_message(MessageType.ADD, sa, self.abi)))

    def update_sa(self, sa: SecurityAssociation) -> SecurityAssociation:
        """UPDATE: make a larval SA mature, or change lifetimes and NAT-T ports of a mature one.

        FreeBSD refuses keys for a mature SA; Linux ignores them, although its answer shows them.
        """
        return association_from(self.request(association_message(MessageType.UPDATE, sa, self.abi)))

    def delete_sa(self, sa: SecurityAssociation) -> None:
        """DELETE by end points, protocol and SPI.  ProcessLookupError (ESRCH) when there is none."""
        self.request(association_message(MessageType.DELETE, sa, self.abi))

    def get_sa(
        self,
        source: AddressLike | SecurityAssociation,
        destination: AddressLike | None = None,
        spi: int | None = None,
        protocol: SAProtocol | int = SAProtocol.ESP,
    ) -> SecurityAssociation:
        """GET by end points, SPI and protocol, or by another SA that has them; keys included.

        Raises ProcessLookupError (ESRCH) when there is none.
        """
        if isinstance(source, SecurityAssociation):
            wanted = source
        elif destination is None or spi is None:
            raise TypeError("get_sa takes a SecurityAssociation, or source, destination and spi")
        else:
            wanted = SecurityAssociation(ip_address(source), ip_address(destination), spi, protocol)
        return association_from(self.request(association_message(MessageType.GET, wanted, self.abi)))

    def dump_sas(self, protocol: SAProtocol | int | None = None) -> Dump[SecurityAssociation]:
        """DUMP: all SAs, or those of one protocol, keys included; a sequence, and a table to scan."""
        message = Message(MessageType.DUMP, abi=self.abi, satype=self._satype(protocol))
        return Dump(self.dump(message), association_from)

    def flush_sas(self, protocol: SAProtocol | int | None = None) -> None:
        """FLUSH: delete all SAs, or those of one protocol, whoever made them."""
        self.request(Message(MessageType.FLUSH, abi=self.abi, satype=self._satype(protocol)))

    def register(self, protocol: SAProtocol | int = SAProtocol.ESP) -> Supported:
        """REGISTER: have ACQUIRE and EXPIRE for `protocol` among the events; the algorithms that the kernel has.

        Raises FileExistsError when this connection is registered for it already.
        """
        message = Message(MessageType.REGISTER, abi=self.abi, satype=self._satype(protocol))
        reply = self._request_on_event_channel(message)
        return Supported(
            reply.get(ExtensionType.SUPPORTED_AUTH) or (), reply.get(ExtensionType.SUPPORTED_ENCRYPT) or ()
        )

    def _satype(self, protocol: SAProtocol | int | None) -> int:
        if protocol is None:
            return 0
        if protocol not in SATYPE_OF:
            names = ", ".join(known.name for known in SATYPE_OF)
            raise NotSupported(f"protocol {protocol} has no SAs; {names} have")
        return SATYPE_OF[SAProtocol(protocol)]

    # Events.

    def events(self, timeout: float | None = None) -> Iterator[Message]:
        """What the kernel says unasked, and what others do: ACQUIRE, EXPIRE, their SPDADD, ADD, and so on.

        Ends when none comes for `timeout` seconds (None: never).
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            for message in self._take_events():
                yield message
                deadline = None if timeout is None else time.monotonic() + timeout
            left = None if deadline is None else deadline - time.monotonic()
            self._hear(_SLICE if left is None else max(0.0, min(_SLICE, left)))
            if left is not None and left <= 0:
                yield from self._take_events()
                return

    def _hear(self, seconds: float) -> None:
        """Take what arrives for events, or wait a little; with a descriptor others may use the channel meanwhile."""
        channel = self._event_channel or self.channel
        descriptor = channel.fileno()
        with self._event_lock:
            received = self._receive(channel, 64, seconds if descriptor < 0 else 0.0)
            self._event_conversation.receive_batch(received)
        if not received.lengths and descriptor >= 0:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            poll.poll(seconds * 1000)

    def _take_events(self) -> list[Message]:
        with self._event_lock:
            events = self._event_conversation.take_events()
        if self._event_channel is None:
            return events
        return [message for message in events if not self._conversation.is_ours(message)]

    def _request_on_event_channel(self, message: Message) -> Message:
        if self._event_channel is None:
            return self.request(message)
        with self._event_lock:
            request = self._event_conversation.request(message)
            self._exchange([request], self._event_channel, self._event_conversation)
        if request.error is not None:
            raise request.error
        return request.replies[0]

    # The channel.

    def _drain(self) -> None:
        """Take what has arrived since: others' broadcasts would fill the buffer that our answers need."""
        while (received := self._receive(self.channel, 64, 0.0)).lengths:
            self._conversation.receive_batch(received)

    def _exchange(
        self, requests: list[Request], channel: Channel | None = None, conversation: Conversation | None = None
    ) -> None:
        """Send, and read until every request is answered, refused, or out of time."""
        channel, conversation = channel or self.channel, conversation or self._conversation
        try:
            self._send(requests, channel)
            self._await([request for request in requests if not request.done], channel, conversation)
        finally:
            for request in requests:
                conversation.end(request)

    def _send(self, requests: Sequence[Request], channel: Channel | None = None) -> None:
        """Send all; a request whose send fails gets its error and the others go on."""
        channel = channel or self.channel
        waiting = list(requests)
        while waiting:
            try:
                if len(waiting) == 1:
                    channel.send(waiting[0].data)
                    sent = 1
                else:
                    sent = send_many(channel, [request.data for request in waiting])
            except OSError as error:
                failed = waiting.pop(0)
                failed.error = self._send_error(failed, error)
                if isinstance(failed.error, ChannelClosed):
                    for request in waiting:
                        request.error = ChannelClosed(str(failed.error), request=request.message)
                    return
            else:
                del waiting[:sent]

    def _send_error(self, request: Request, error: OSError) -> PFKeyError:
        doing = describe(request.message)
        if isinstance(error, ChannelClosed) or error.errno in _GONE:
            return ChannelClosed(f"{doing} was not sent: {error}", request=request.message)
        number, name = self._error_name(error)
        unknown = name == "ENOBUFS"
        advice = (
            "the receive buffer was full, and the kernel may have done it all the same: read before trying again"
            if unknown
            else "the kernel did not look at it"
        )
        result = kernel_error(doing, name, number, request=request.message, advice=advice)
        result.outcome_unknown = unknown
        return result

    def _error_name(self, error: OSError) -> tuple[int, str]:
        """This kernel's number and the name: a channel to another system may give either system's number."""
        number = error.errno or 0
        name = getattr(error, "name", "") or errno.errorcode.get(number, "")
        if name in self.abi.error_numbers:
            return self.abi.error_numbers[name], name
        return number, self.abi.error_name(number)

    def _receive(self, channel: Channel, limit: int, timeout: float, *, dump: bool = False) -> Batch:
        """What is there, up to `limit` messages but for a dump, whose parts may stay where the kernel put them."""
        try:
            if dump:
                return receive_batch(channel, limit, timeout)
            return Batch.of(receive_many(channel, limit, timeout))
        except ChannelClosed:
            raise
        except OSError as error:
            if error.errno in _GONE:
                raise ChannelClosed(f"reading from {self.abi} failed: {error}") from error
            if self._error_name(error)[1] == "ENOBUFS":
                # FreeBSD 14 with SO_RERROR: something was lost.  Whoever misses it times out, or finds a gap.
                log.warning("the receive buffer of %s was full; messages were lost", self.abi)
                return Batch.of([])
            raise

    def _await(self, requests: list[Request], channel: Channel, conversation: Conversation) -> None:
        """Read until all are answered; the clock starts again whenever one of them gets something."""
        dump = any(request.dump for request in requests)
        many = len(requests) > 1 or dump
        deadline = time.monotonic() + self.timeout
        while requests:
            left = deadline - time.monotonic()
            if left <= 0:
                for request in requests:
                    conversation.give_up(request, self._timed_out(request))
                return
            try:
                received = self._receive(channel, 64 if many else 1, left, dump=dump)
            except ChannelClosed as error:
                for request in requests:
                    request.error = ChannelClosed(
                        f"{describe(request.message)} was sent, then the channel closed: {error}",
                        request=request.message,
                    )
                return
            if any(request in requests for request in conversation.receive_batch(received)):
                deadline = time.monotonic() + self.timeout
            requests = [request for request in requests if not request.done]

    def _timed_out(self, request: Request) -> ReplyTimeout:
        return ReplyTimeout(
            f"{describe(request.message)}: no answer from {self.abi} in {self.timeout:g} seconds;"
            " whether it was done is not known: read before trying again",
            request=request.message,
        )


def _parts(dump: Request) -> Messages:
    """What a dump gave; an empty database answers ENOENT."""
    if dump.error is not None and not (isinstance(dump.error, KernelError) and dump.error.name == "ENOENT"):
        raise dump.error
    return dump.parts()
