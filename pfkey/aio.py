"""The asyncio face of one connection to a kernel: what `Kernel` has, as coroutines of the loop that runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from types import TracebackType
from typing import Self, TypeVar

from . import calls
from .abi import Abi
from .async_link import AsyncLink
from .calls import Call, DumpCall, Supported
from .channel import GRACE_PERIOD, Channel
from .codec import Message
from .constants import Mode, SAProtocol
from .errors import PFKeyError
from .exchange import DUMP_TRIES, answer, answerable, is_to_be_repeated, parts
from .kernel import open_channel
from .messages import AddressLike, Policy, SecurityAssociation, SPIRange
from .refusals import check_policy
from .tables import Dump, Messages

__all__ = ["AsyncKernel", "AsyncSPDEvents", "connect"]

T = TypeVar("T")


def connect(target: str | Channel = "native", *, events: Channel | None = None, timeout: float = 5.0) -> AsyncKernel:
    """Connect to a kernel; `async with` closes it.  Arguments and errors are those of `pfkey.connect`."""
    return AsyncKernel(open_channel(target), events=events, timeout=timeout)


class AsyncKernel:
    """A connection to a kernel for the tasks of one event loop; `Kernel` says what each method does and raises.

        async with pfkey.AsyncKernel.connect("embedded:linux") as kernel:
            await kernel.add_policy(policy)

    Many tasks may call at once.  A call that is cancelled leaves the connection usable: whether the kernel did the work
    is not known then, and its late answer is dropped.  There is no thread where the channel has a file descriptor;
    where it has none (an embedded kernel), one waits for messages as long as somebody waits for one.
    """

    connect = staticmethod(connect)

    def __init__(self, channel: Channel, *, events: Channel | None = None, timeout: float = 5.0) -> None:
        self.channel = channel
        self.timeout = timeout
        self._link = AsyncLink(channel)
        self._event_link = self._link if events is None else AsyncLink(events, asking=self._link.conversation)

    @property
    def abi(self) -> Abi:
        """The system at the other end."""
        return self.channel.abi

    def __repr__(self) -> str:
        return f"<AsyncKernel {self.abi}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channels; whoever waits gets ChannelClosed."""
        await self._link.close()
        if self._event_link is not self._link:
            await self._event_link.close()

    # Messages.

    async def send(self, message: Message) -> None:
        """Send a message that no kernel answers."""
        self._link.send(message)

    async def request(self, message: Message) -> Message:
        """The kernel's answer to a message."""
        return await self._request(message, self._link)

    async def _request(self, message: Message, link: AsyncLink) -> Message:
        result = answer((await link.exchange(answerable([message]), self.timeout))[0])
        if isinstance(result, PFKeyError):
            raise result
        return result

    async def request_many(self, messages: Iterable[Message]) -> list[Message | PFKeyError]:
        """For each message its answer or the exception that it met."""
        return [answer(request) for request in await self._link.exchange(answerable(messages), self.timeout)]

    async def dump(self, message: Message) -> Messages:
        """All parts of the answer to DUMP or SPDDUMP."""
        for _ in range(DUMP_TRIES):
            request = (await self._link.exchange([message], self.timeout))[0]
            if not is_to_be_repeated(request, self.channel):
                break
        return parts(request)

    async def _call(self, call: Call[T]) -> T:
        return call.read(await self.request(call.message))

    async def _dump(self, call: DumpCall[T]) -> T:
        return call.read(await self.dump(call.message))

    # Policies.

    def check_policy(self, policy: Policy) -> None:
        """Raise NotSupported or EncodeError when this kernel would reject `policy` or store it as something else."""
        check_policy(policy, self.abi)

    async def add_policy(self, policy: Policy) -> Policy:
        """SPDADD."""
        self.check_policy(policy)
        return await self._call(calls.add_policy(policy, self.abi))

    async def update_policy(self, policy: Policy) -> Policy:
        """SPDUPDATE."""
        self.check_policy(policy)
        return await self._call(calls.update_policy(policy, self.abi))

    async def delete_policy(self, policy: Policy) -> Policy:
        """SPDDELETE."""
        return await self._call(calls.delete_policy(policy, self.abi))

    async def get_policy(self, policy_id: int) -> Policy:
        """SPDGET."""
        return await self._call(calls.get_policy(policy_id, self.abi))

    async def dump_policies(self, *, everything: bool = False) -> Dump[Policy]:
        """SPDDUMP."""
        return await self._dump(calls.dump_policies(self.abi, everything=everything))

    async def flush_policies(self) -> None:
        """SPDFLUSH."""
        await self._call(calls.flush_policies(self.abi))

    async def grace_period(self) -> None:
        """Return when every packet that was looking at the SPD has finished looking."""
        wait = getattr(self.channel, "grace_period", None)
        if wait is None:
            await asyncio.sleep(GRACE_PERIOD)
        else:
            await asyncio.to_thread(wait)  # the system call that waits for it has no other form

    @property
    def host_lock(self) -> str | None:
        """The path of the lock file that all who write to this kernel's SPD share; None when nobody else can write."""
        return getattr(self.channel, "host_lock", None)

    # Security associations.

    async def get_spi(
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
        """GETSPI."""
        spis = SPIRange(minimum, maximum)
        call = calls.get_spi(source, destination, self.abi, protocol=protocol, spis=spis, mode=mode, reqid=reqid)
        return await self._call(call)

    async def add_sa(self, sa: SecurityAssociation) -> SecurityAssociation:
        """ADD."""
        return await self._call(calls.add_sa(sa, self.abi))

    async def update_sa(self, sa: SecurityAssociation) -> SecurityAssociation:
        """UPDATE."""
        return await self._call(calls.update_sa(sa, self.abi))

    async def delete_sa(self, sa: SecurityAssociation) -> None:
        """DELETE."""
        await self._call(calls.delete_sa(sa, self.abi))

    async def get_sa(
        self,
        source: AddressLike | SecurityAssociation,
        destination: AddressLike | None = None,
        spi: int | None = None,
        protocol: SAProtocol | int = SAProtocol.ESP,
    ) -> SecurityAssociation:
        """GET."""
        return await self._call(calls.get_sa(source, destination, spi, protocol, self.abi))

    async def dump_sas(self, protocol: SAProtocol | int | None = None) -> Dump[SecurityAssociation]:
        """DUMP."""
        return await self._dump(calls.dump_sas(protocol, self.abi))

    async def flush_sas(self, protocol: SAProtocol | int | None = None) -> None:
        """FLUSH."""
        await self._call(calls.flush_sas(protocol, self.abi))

    async def register(self, protocol: SAProtocol | int = SAProtocol.ESP) -> Supported:
        """REGISTER."""
        call = calls.register(protocol, self.abi)
        return call.read(await self._request(call.message, self._event_link))

    # Events.

    async def events(self, timeout: float | None = None) -> AsyncIterator[Message]:
        """What the kernel says unasked, and what others do; ends when none comes for `timeout` seconds."""
        while (event := await self._event_link.next_event(timeout)) is not None:
            yield event

    def spd_events(self, timeout: float | None = None) -> AsyncSPDEvents:
        """Every message that tells that the SPD changed, from now on, each with whether this connection caused it."""
        return AsyncSPDEvents(self._event_link, timeout)

    @property
    def lost_events(self) -> int:
        """How many messages may have been missed so far, by anybody who reads events or watches."""
        return sum(link.conversation.lost_events + link.losses for link in {self._link, self._event_link})


class AsyncSPDEvents(AsyncIterator[tuple[Message, bool]]):
    """What SPDEvents is for tasks."""

    def __init__(self, link: AsyncLink, timeout: float | None) -> None:
        self.timeout = timeout
        self._link = link
        self._watch = link.watch()
        self._losses = link.losses

    @property
    def lost(self) -> int:
        """How many may have been missed since the beginning: lost on the way, or dropped because nobody took them."""
        return self._watch.lost + self._link.losses - self._losses

    async def __anext__(self) -> tuple[Message, bool]:
        found = await self._link.next_watched(self._watch, self.timeout)
        if found is None:
            raise StopAsyncIteration
        return found

    def stop(self) -> None:
        """End the iteration once what came before is taken; wakes up who waits in it."""
        self._link.unwatch(self._watch)

    close = stop

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
