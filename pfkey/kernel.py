"""The blocking face of one connection to a kernel: policies, security associations, events."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self, TypeVar

from . import calls
from .abi import Abi
from .calls import Call, DumpCall, Supported
from .channel import GRACE_PERIOD, Channel, NativeChannel
from .codec import Message
from .constants import Mode, SAProtocol
from .errors import NotSupported, PFKeyError
from .exchange import DUMP_TRIES, answer, answerable, is_to_be_repeated, parts
from .link import Link
from .messages import AddressLike, Policy, SecurityAssociation, SPIRange
from .refusals import check_policy
from .tables import Dump, Messages

__all__ = ["Kernel", "SPDEvents", "Supported", "connect", "open_channel"]

T = TypeVar("T")


def connect(target: str | Channel = "native", *, events: Channel | None = None, timeout: float = 5.0) -> Kernel:
    """Connect to a kernel.

    `target` is "native", this host's; "embedded:PROFILE", a new and empty kernel in this process (linux, linux-6.12,
    linux-smp, freebsd-10 to freebsd-14, netbsd, macos); "unix:PATH", the kernel of `pfkey embedded --listen PATH`; or a
    Channel.  `events` is a second channel to the same kernel, which then has the events to itself.  `timeout` is how
    many seconds to wait for an answer; a fifth of it, but a second at least, is waited between the parts of a BSD's
    dump.

    Raises NotSupported when there is no such kernel, KernelError (a PermissionError) when it is not for us.
    """
    return Kernel(open_channel(target), events=events, timeout=timeout)


def open_channel(target: str | Channel) -> Channel:
    """The channel that `target` of `connect` means."""
    if not isinstance(target, str):
        return target
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
    request.

    Threads may share a Kernel, and their calls are under way at the same time: one that waits for a late answer keeps
    nobody else from theirs.  An interrupt (Ctrl-C) ends the call it hits; the others go on, and an answer of another
    thread that was just being received may be lost, which that thread is told as a ReplyTimeout.
    """

    def __init__(self, channel: Channel, *, events: Channel | None = None, timeout: float = 5.0) -> None:
        self.channel = channel
        self.timeout = timeout
        self._link = Link(channel)
        self._event_link = self._link if events is None else Link(events, asking=self._link.conversation)

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
        """Close the channels; policies and SAs stay in the kernel, and whoever waits gets ChannelClosed."""
        self._link.close()
        if self._event_link is not self._link:
            self._event_link.close()

    # Messages.

    def send(self, message: Message) -> None:
        """Send a message that no kernel answers: an ACQUIRE that reports an error."""
        self._link.send(message)

    def request(self, message: Message) -> Message:
        """Send a message and return the kernel's answer to it; seq and pid are filled in."""
        return self._request(message, self._link)

    def _request(self, message: Message, link: Link) -> Message:
        result = answer(link.exchange(answerable([message]), self.timeout)[0])
        if isinstance(result, PFKeyError):
            raise result
        return result

    def request_many(self, messages: Iterable[Message]) -> list[Message | PFKeyError]:
        """Send many messages, in order, and return for each its answer or the exception that it met.

        No more are under way at once than the receive buffer holds answers for.
        """
        return [answer(request) for request in self._link.exchange(answerable(messages), self.timeout)]

    def dump(self, message: Message) -> Messages:
        """All parts of the answer to DUMP or SPDDUMP; an empty database gives none.

        One dump at a time is under way.  One that arrives incomplete is asked for again with a larger receive buffer;
        DumpOverflow when that is not to be had.
        """
        for _ in range(DUMP_TRIES):
            request = self._link.exchange([message], self.timeout)[0]
            if not is_to_be_repeated(request, self.channel):
                break
        return parts(request)

    def _call(self, call: Call[T]) -> T:
        return call.read(self.request(call.message))

    def _dump(self, call: DumpCall[T]) -> T:
        return call.read(self.dump(call.message))

    # Policies.

    def check_policy(self, policy: Policy) -> None:
        """Raise NotSupported or EncodeError when this kernel would reject `policy` or store it as something else."""
        check_policy(policy, self.abi)

    def add_policy(self, policy: Policy) -> Policy:
        """SPDADD: the policy as the kernel stored it, its id filled in.  FileExistsError when the selector is taken."""
        self.check_policy(policy)
        return self._call(calls.add_policy(policy, self.abi))

    def update_policy(self, policy: Policy) -> Policy:
        """SPDUPDATE: replace the policy of this direction and selector; every kernel adds it when there is none.

        FreeBSD before 14 removes the old one first, and one that is rejected for its templates is gone on any FreeBSD.
        """
        self.check_policy(policy)
        return self._call(calls.update_policy(policy, self.abi))

    def delete_policy(self, policy: Policy) -> Policy:
        """SPDDELETE by direction and selector, host bits included; the policy that was deleted, as the kernel says it.

        Raises KernelError when there is none (ENOENT on Linux, EINVAL on FreeBSD).
        """
        return self._call(calls.delete_policy(policy, self.abi))

    def get_policy(self, policy_id: int) -> Policy:
        """SPDGET by the kernel's id.  FileNotFoundError when the kernel does not know it."""
        return self._call(calls.get_policy(policy_id, self.abi))

    def dump_policies(self, *, everything: bool = False) -> Dump[Policy]:
        """SPDDUMP: the policies of the main table, in the kernel's order; a sequence, and a table to scan.

        With `everything` also what is not there: policies of sockets (Linux, directions 4 and 5) and of interfaces
        (FreeBSD, scope IFNET).
        """
        return self._dump(calls.dump_policies(self.abi, everything=everything))

    def flush_policies(self) -> None:
        """SPDFLUSH: delete all policies, whoever made them."""
        self._call(calls.flush_policies(self.abi))

    def grace_period(self) -> None:
        """Return when every packet that was looking at the SPD has finished looking, so that what it saw may go.

        The channel knows how to wait for that, or 20 ms are waited (3 ms were enough wherever it was measured).
        """
        wait = getattr(self.channel, "grace_period", None)
        if wait is None:
            time.sleep(GRACE_PERIOD)
        else:
            wait()

    @property
    def host_lock(self) -> str | None:
        """The path of the lock file that all who write to this kernel's SPD share; None when nobody else can write."""
        return getattr(self.channel, "host_lock", None)

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
        spis = SPIRange(minimum, maximum)
        call = calls.get_spi(source, destination, self.abi, protocol=protocol, spis=spis, mode=mode, reqid=reqid)
        return self._call(call)

    def add_sa(self, sa: SecurityAssociation) -> SecurityAssociation:
        """ADD: the SA as the kernel echoed it.  FileExistsError when the SPI is taken."""
        return self._call(calls.add_sa(sa, self.abi))

    def update_sa(self, sa: SecurityAssociation) -> SecurityAssociation:
        """UPDATE: make a larval SA mature, or change lifetimes and NAT-T ports of a mature one.

        FreeBSD refuses keys for a mature SA; Linux ignores them, although its answer shows them.
        """
        return self._call(calls.update_sa(sa, self.abi))

    def delete_sa(self, sa: SecurityAssociation) -> None:
        """DELETE by end points, protocol and SPI.  ProcessLookupError (ESRCH) when there is none."""
        self._call(calls.delete_sa(sa, self.abi))

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
        return self._call(calls.get_sa(source, destination, spi, protocol, self.abi))

    def dump_sas(self, protocol: SAProtocol | int | None = None) -> Dump[SecurityAssociation]:
        """DUMP: all SAs, or those of one protocol, keys included; a sequence, and a table to scan."""
        return self._dump(calls.dump_sas(protocol, self.abi))

    def flush_sas(self, protocol: SAProtocol | int | None = None) -> None:
        """FLUSH: delete all SAs, or those of one protocol, whoever made them."""
        self._call(calls.flush_sas(protocol, self.abi))

    def register(self, protocol: SAProtocol | int = SAProtocol.ESP) -> Supported:
        """REGISTER: have ACQUIRE and EXPIRE for `protocol` among the events; the algorithms that the kernel has.

        Raises FileExistsError when this connection is registered for it already.
        """
        call = calls.register(protocol, self.abi)
        return call.read(self._request(call.message, self._event_link))

    # Events.

    def events(self, timeout: float | None = None) -> Iterator[Message]:
        """What the kernel says unasked, and what others do: ACQUIRE, EXPIRE, their SPDADD, ADD, and so on.

        Ends when none comes for `timeout` seconds (None: never).  Other threads may send requests meanwhile.
        """
        while (event := self._event_link.next_event(timeout)) is not None:
            yield event

    def spd_events(self, timeout: float | None = None) -> SPDEvents:
        """Every message that tells that the SPD changed, from now on, each with whether this connection caused it.

        Iterating ends when none comes for `timeout` seconds (None: never), or by `stop`.
        """
        return SPDEvents(self._event_link, timeout)

    @property
    def lost_events(self) -> int:
        """How many messages may have been missed so far, by anybody who reads events or watches.

        It counts what came faster than it was taken, what the channel knows it lost, and what was no message.  A kernel
        that drops in silence (Linux, FreeBSD before 14) is found out only by looking.
        """
        links = {self._link, self._event_link}
        return sum(link.conversation.lost_events + link.losses for link in links)


class SPDEvents(Iterator[tuple[Message, bool]]):
    """Broadcasts about policies in the order of arrival, each with whether a request of this connection caused it.

    They are SPDADD, SPDUPDATE, SPDDELETE, SPDDELETE2, SPDFLUSH, SPDEXPIRE, SPDSETIDX and MIGRATE.  They are kept from
    the call on, whichever thread receives them, until `close` or as long as the object lives.  An iteration that ended
    at its timeout may be gone on with: nothing is missed in between.  (Linux answers a flush twice: privately, too.)

    Another thread may call `stop`.
    """

    def __init__(self, link: Link, timeout: float | None) -> None:
        self.timeout = timeout
        self._link = link
        self._watch = link.watch()
        self._losses = link.losses

    @property
    def lost(self) -> int:
        """How many may have been missed since the beginning: lost on the way, or dropped because nobody took them."""
        return self._watch.lost + self._link.losses - self._losses

    def __next__(self) -> tuple[Message, bool]:
        found = self._link.next_watched(self._watch, self.timeout)
        if found is None:
            raise StopIteration
        return found

    def stop(self) -> None:
        """End the iteration once what came before is taken; wakes up who waits in it."""
        self._link.unwatch(self._watch)

    close = stop

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
