"""The asyncio face: many tasks at once, cancellation, events; with a file descriptor and without one."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from holding import Holding
from package import ROOT
from served import native_channel
from test_link import LATE, Lost, discard, is_late, site

from pfkey import (
    Action,
    AsyncKernel,
    Channel,
    ChannelClosed,
    Direction,
    DumpOverflow,
    EmbeddedKernel,
    Kernel,
    KernelError,
    Message,
    MessageType,
    NotSupported,
    Policy,
    ReplyTimeout,
    SecurityAssociation,
    aio,
    connect,
)
from pfkey.typed import policy_message

OUT = Direction.OUT
PROFILES = ["linux", "freebsd-12", "freebsd-14"]
KINDS = ["without descriptor", "with descriptor"]


class Rig:
    """An embedded kernel and channels to it, of one kind."""

    def __init__(self, profile: str, kind: str, patch: pytest.MonkeyPatch) -> None:
        self.embedded = EmbeddedKernel(profile)
        self.kind = kind
        self._patch = patch
        self._open: list[Any] = []

    def channel(self) -> Channel:
        if self.kind == KINDS[0]:
            inner = self.embedded.connect()
            inner.set_receive_buffer(1 << 17)
            return inner
        manager = native_channel(self.embedded, self._patch)
        self._open.append(manager)
        return manager.__enter__()

    def holding(self, hold: Callable[[Message], bool]) -> Holding:
        return Holding(self.channel(), hold)

    def close(self) -> None:
        for manager in self._open:
            manager.__exit__(None, None, None)


@pytest.fixture(params=[(profile, kind) for profile in PROFILES for kind in KINDS], ids=lambda one: " ".join(one))
def rig(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    rig = Rig(*request.param, monkeypatch)
    yield rig
    rig.close()


def run(function: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(function(), 60)

    asyncio.run(main(), debug=True)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def clean(kernel: AsyncKernel) -> bool:
    link: Any = kernel._link
    room = link._room
    left = [link._waiting, link._listeners, link._arrived, link.conversation._pending]
    return not any([*left, room._admitted, room._requests, room._dumps, room._dumper, room._unsent])


def test_all_that_kernel_has(rig: Rig) -> None:
    async def main() -> None:
        async with AsyncKernel.connect(rig.channel(), timeout=10) as kernel:
            added = await kernel.add_policy(discard(site(1)))
            assert (await kernel.get_policy(added.id)).selector == site(1)
            with pytest.raises(FileExistsError):
                await kernel.add_policy(discard(site(1)))
            await kernel.update_policy(Policy(OUT, site(1), Action.NONE))
            assert [one.action for one in await kernel.dump_policies()] == [Action.NONE]
            await kernel.delete_policy(discard(site(1)))
            await kernel.flush_policies()
            assert await kernel.dump_policies() == []
            sa = SecurityAssociation("192.0.2.1", "198.51.100.1", 0x10001, encryption="null")  # type: ignore[arg-type]
            await kernel.add_sa(sa)
            assert (await kernel.get_sa(sa)).spi == 0x10001
            spi = await kernel.get_spi("192.0.2.1", "198.51.100.1")
            assert {one.spi for one in await kernel.dump_sas()} == {0x10001, spi}
            await kernel.delete_sa(sa)
            await kernel.flush_sas()
            with pytest.raises(ProcessLookupError):
                await kernel.get_sa(sa)
            assert (await kernel.register()).encryption
            with pytest.raises(FileExistsError):
                await kernel.register()
            await kernel.send(Message(MessageType.ACQUIRE, abi=kernel.abi, satype=3, errno=1))
            with pytest.raises(NotSupported, match="use send"):
                await kernel.request(Message(MessageType.ACQUIRE, abi=kernel.abi))
            with pytest.raises(NotSupported, match="use dump"):
                await kernel.request(Message(MessageType.SPDDUMP, abi=kernel.abi))
            assert kernel.lost_events == 0
            assert clean(kernel)

    run(main)


def test_the_two_faces_have_the_same_names_and_arguments() -> None:
    def public(face: type) -> dict[str, list[str]]:
        members = {name: getattr(face, name) for name in dir(face) if not name.startswith("_") and name != "connect"}
        return {name: list(inspect.signature(one).parameters) if callable(one) else [] for name, one in members.items()}

    assert public(Kernel) == public(AsyncKernel)
    assert inspect.signature(connect).parameters.keys() == inspect.signature(aio.connect).parameters.keys()


def test_many_tasks_at_once(rig: Rig) -> None:
    async def work(kernel: AsyncKernel, base: int) -> None:
        for number in range(base, base + 5):
            assert (await kernel.add_policy(discard(site(number)))).selector == site(number)
        found = [one.selector for one in await kernel.dump_policies()]
        assert {site(number) for number in range(base, base + 5)} <= set(found)
        wanted = [policy_message(MessageType.SPDDELETE, discard(site(base + n)), kernel.abi) for n in range(6)]
        answers = await kernel.request_many(wanted)
        assert [isinstance(answer, KernelError) for answer in answers] == [False] * 5 + [True]

    async def main() -> None:
        async with AsyncKernel.connect(rig.channel(), timeout=20) as kernel:
            await asyncio.gather(*(work(kernel, 100 * number) for number in range(12)))
            assert await kernel.dump_policies() == []
            assert clean(kernel)

    run(main)


def test_a_late_answer_keeps_no_other_task_waiting(rig: Rig) -> None:
    async def main() -> None:
        channel = rig.holding(is_late)
        async with AsyncKernel.connect(channel, timeout=20) as kernel:
            late = asyncio.create_task(kernel.add_policy(discard(LATE)))
            await until(lambda: bool(channel.held))
            for number in range(10):
                await kernel.add_policy(discard(site(number)))
            assert len(await kernel.dump_policies()) == 11
            assert not late.done()
            channel.release()
            await kernel.dump_policies()  # no descriptor tells that something was released here
            assert (await late).selector == LATE
            assert clean(kernel)

    run(main)


def test_a_task_that_is_cancelled(rig: Rig) -> None:
    """Its late answer is dropped, and everything else goes on."""

    async def main() -> None:
        channel = rig.holding(is_late)
        async with AsyncKernel.connect(channel, timeout=20) as kernel:
            late = asyncio.create_task(kernel.add_policy(discard(LATE)))
            other = asyncio.create_task(kernel.dump_policies())
            await until(lambda: bool(channel.held))
            late.cancel()
            with pytest.raises(asyncio.CancelledError):
                await late
            await other
            assert clean(kernel)
            channel.release()
            await kernel.add_policy(discard(site(1)))
            assert [event async for event in kernel.events(timeout=0)] == []
            assert clean(kernel)

    run(main)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "with a reader of events"])
def test_a_dump_that_is_cancelled(rig: Rig, beside: bool) -> None:
    """What is left of it is not taken for the next one."""

    async def main() -> None:
        channel = rig.holding(lambda message: False)
        async with AsyncKernel.connect(channel, timeout=20) as kernel:
            for number in range(9):
                await kernel.add_policy(discard(site(number)))

            def pause(message: Message) -> bool:
                channel.paused = message.type == MessageType.SPDDUMP
                return False

            reader = asyncio.ensure_future(anext(kernel.events())) if beside else None
            await asyncio.sleep(0.01)
            channel.hold = pause
            dump = asyncio.create_task(kernel.dump_policies())
            await until(lambda: channel.paused)
            dump.cancel()
            with pytest.raises(asyncio.CancelledError):
                await dump
            channel.hold = lambda message: False
            channel.paused = False
            assert len(await kernel.dump_policies()) == 9
            if reader is not None:
                reader.cancel()

    run(main)


def test_no_answer(rig: Rig) -> None:
    async def main() -> None:
        channel = rig.holding(is_late)
        async with AsyncKernel.connect(channel, timeout=0.2) as kernel:
            with pytest.raises(ReplyTimeout, match=r"SPDADD of out .*: no answer from .* in 0\.2 seconds"):
                await kernel.add_policy(discard(LATE))
            channel.hold = lambda message: message.type == MessageType.SPDDUMP and message.seq == 0
            kernel.timeout = 20
            await kernel.add_policy(discard(site(1)))
            kernel.timeout = 0.2
            with pytest.raises(DumpOverflow, match="stopped after 1 parts"):
                await kernel.dump_policies()
            assert clean(kernel)

    run(main)


async def collect(source: AsyncIterator[Message], into: list[Message], count: int) -> None:
    async for message in source:
        into.append(message)
        if len(into) == count:
            return


@pytest.mark.parametrize("two", [False, True], ids=["one channel", "two channels"])
def test_events_come_beside_requests(rig: Rig, two: bool) -> None:
    async def main() -> None:
        events = rig.channel() if two else None
        async with (
            AsyncKernel.connect(rig.channel(), events=events, timeout=20) as kernel,
            AsyncKernel.connect(rig.channel(), timeout=20) as other,
        ):
            heard: list[Message] = []
            reader = asyncio.create_task(collect(kernel.events(), heard, 4))
            watch = kernel.spd_events(timeout=5)
            for number in range(4):
                await kernel.add_policy(discard(site(number)))
                await other.add_policy(discard(site(10 + number)))
            await reader
            assert [one.type for one in heard] == [MessageType.SPDADD] * 4
            owns = []
            async for _, own in watch:
                owns.append(own)
                if len(owns) == 8:
                    break
            assert owns == [True, False] * 4 or sorted(owns) == [False] * 4 + [True] * 4
            waiting = asyncio.create_task(anext(watch))
            await asyncio.sleep(0.01)
            watch.stop()
            with pytest.raises(StopAsyncIteration):
                await waiting
            assert watch.lost == 0
            assert [event async for event in kernel.events(timeout=0.05)] == []

    run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_of_events_that_is_cancelled_takes_nothing_with_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig("linux", kind, monkeypatch)

    async def main() -> None:
        async with (
            AsyncKernel.connect(rig.channel(), timeout=20) as kernel,
            AsyncKernel.connect(rig.channel()) as other,
        ):
            for number in range(20):
                reader = asyncio.create_task(anext(kernel.events()))
                await asyncio.sleep(0.002 * (number % 3))
                await other.add_policy(discard(site(number)))
                reader.cancel()
                outcome = (await asyncio.gather(reader, return_exceptions=True))[0]
                if isinstance(outcome, asyncio.CancelledError):
                    outcome = await anext(kernel.events(timeout=20))
                assert isinstance(outcome, Message)
                assert outcome.type == MessageType.SPDADD

    run(main)
    rig.close()


def test_who_fails_leaves_the_others_whole(rig: Rig) -> None:
    async def main() -> None:
        channel = rig.holding(lambda message: message.source is not None)
        async with AsyncKernel.connect(channel, timeout=20) as kernel:
            calls = [asyncio.create_task(kernel.add_policy(discard(site(number)))) for number in range(4)]
            await until(lambda: len(channel.held) == 4)
            channel.failing = [Lost("it dies")]
            channel.release()
            calls.append(asyncio.create_task(kernel.add_policy(discard(site(9)))))
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            await kernel.dump_policies()
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert sum(isinstance(one, Policy) for one in outcomes) == 4
            assert [type(one) for one in outcomes if isinstance(one, BaseException)] == [Lost]
            assert clean(kernel)

    run(main)


def test_close_wakes_everybody(rig: Rig) -> None:
    async def main() -> None:
        channel = rig.holding(lambda message: True)
        channel.in_flight = 2
        kernel = AsyncKernel.connect(channel, timeout=30)
        watch = kernel.spd_events()
        calls: list[Any] = [asyncio.create_task(kernel.add_policy(discard(site(number)))) for number in range(6)]
        calls += [asyncio.ensure_future(anext(kernel.events())), asyncio.ensure_future(anext(watch))]
        await until(lambda: len(channel.held) == 2)
        await kernel.close()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(one) for one in outcomes] == [ChannelClosed] * 8
        assert all(one.request.type == MessageType.SPDADD for one in outcomes[:6] if isinstance(one, ChannelClosed))
        with pytest.raises(ChannelClosed, match="SPDDUMP"):
            await kernel.dump_policies()

    run(main)


def receivers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("pfkey-receive")]


def test_there_is_a_thread_only_where_there_is_no_descriptor(rig: Rig) -> None:
    async def main() -> None:
        async with AsyncKernel.connect(rig.channel(), timeout=20) as kernel:
            await kernel.add_policy(discard(site(1)))
            assert receivers() == [], "the answer is there when the send is done"
            reader = asyncio.create_task(anext(kernel.events()))
            await asyncio.sleep(0.02)
            await kernel.add_policy(discard(site(2)))
            assert len(receivers()) == (rig.kind == KINDS[0])
            reader.cancel()
        assert all(not thread.startswith("asyncio") for thread in receivers())

    run(main)
    for thread in threading.enumerate():
        if thread.name.startswith("pfkey-receive"):
            thread.join(20)
    assert receivers() == []


def test_a_connection_belongs_to_one_loop() -> None:
    kernel = AsyncKernel.connect("embedded:linux")
    asyncio.run(kernel.flush_policies())  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="event loop"):
        asyncio.run(kernel.flush_policies())  # type: ignore[arg-type]
    asyncio.run(kernel.close())  # type: ignore[arg-type]


def test_the_grace_period_and_the_host_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        channel: Any = EmbeddedKernel("linux").connect()
        async with AsyncKernel.connect(channel) as kernel:
            assert kernel.host_lock is None
            await kernel.grace_period()
            asked: list[int] = []
            channel.grace_period = lambda: asked.append(1)
            monkeypatch.setattr(type(channel), "host_lock", "/somewhere")
            await kernel.grace_period()
            assert (asked, kernel.host_lock) == ([1], "/somewhere")

    run(main)


def test_import_pfkey_leaves_asyncio_alone() -> None:
    script = (
        "import sys, pfkey; assert 'asyncio' not in sys.modules; pfkey.connect; assert 'asyncio' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_a_task_that_asks_again_and_again_leaves_turns_to_others(rig: Rig) -> None:
    """The kernel has answered when send() returns, so nothing is waited for: a limit of time must work all the same."""

    async def main() -> None:
        async with AsyncKernel.connect(rig.channel(), timeout=10) as kernel:
            turns = 0

            async def other() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            beside = asyncio.create_task(other())
            for number in range(20):
                await kernel.add_policy(discard(site(number)))
            beside.cancel()
            assert turns >= 20

            async def for_ever() -> None:
                while True:
                    await kernel.update_policy(discard(site(1)))

            with pytest.raises(TimeoutError):
                await asyncio.wait_for(for_ever(), 0.05)
            assert clean(kernel)

    run(main)
