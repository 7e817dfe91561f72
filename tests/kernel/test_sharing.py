"""One connection to af_key shared by threads, or by tasks; watching the SPD; the grace period and the host lock."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable

import pytest
from scenarios import ADD, DEL, SITE, UPD

from pfkey import (
    Action,
    AsyncKernel,
    Channel,
    Direction,
    ExtensionType,
    Kernel,
    Message,
    MessageType,
    Policy,
    Selector,
    Template,
    connect,
)
from pfkey.messages import PolicyExtension
from pfkey.typed import policy_message

OUT = Direction.OUT


def discard(number: int) -> Policy:
    return Policy(OUT, Selector(f"10.{number >> 8}.{number & 255}.0/24", "172.16.0.0/12"), Action.DISCARD)


def test_threads_beside_a_reader_of_events(kernel: Kernel, other: Kernel) -> None:
    heard: list[Message] = []
    faults: list[BaseException] = []
    watch = kernel.spd_events(timeout=0)

    def read() -> None:
        for event in kernel.events():
            heard.append(event)
            if event.type == MessageType.SPDFLUSH:
                return

    def work(base: int) -> None:
        try:
            for number in range(base, base + 20):
                policy = kernel.add_policy(discard(number))
                assert policy.selector == discard(number).selector
                with pytest.raises(FileExistsError):
                    kernel.add_policy(policy)
            found = {policy.selector for policy in kernel.dump_policies()}
            assert {discard(number).selector for number in range(base, base + 20)} <= found
            wanted = [policy_message(DEL, discard(base + number), kernel.abi) for number in range(20)]
            assert all(isinstance(answer, Message) for answer in kernel.request_many(wanted))
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(1000 * number,)) for number in range(4)]
    reader = threading.Thread(target=read)
    for thread in (reader, *threads):
        thread.start()
    for number in range(10):
        other.add_policy(discard(9000 + number))
    for thread in threads:
        thread.join(60)
    other.flush_policies()
    reader.join(60)
    assert not reader.is_alive()
    assert faults == []
    assert [event.type for event in heard] == [ADD] * 10 + [MessageType.SPDFLUSH]
    seen = [(message.type, own) for message, own in watch]
    assert [seen.count(one) for one in ((ADD, True), (DEL, True), (ADD, False))] == [80, 80, 10]
    assert (kernel.lost_events, watch.lost) == (0, 0)


@pytest.mark.parametrize("two", [False, True], ids=["one channel", "two channels"])
def test_every_change_and_whose_it_is(two: bool, connect_channel: Callable[[], Channel]) -> None:
    kernel = connect(connect_channel(), events=connect_channel() if two else None)
    other = connect(connect_channel())
    watch = kernel.spd_events(timeout=0.2)
    kernel.add_policy(discard(1))
    other.update_policy(discard(1))
    with pytest.raises(FileExistsError):
        kernel.add_policy(discard(1))
    kernel.get_policy(kernel.dump_policies()[0].id)
    kernel.delete_policy(discard(1))
    with pytest.raises(FileNotFoundError):
        kernel.delete_policy(discard(1))
    assert [(message.type, own) for message, own in watch] == [(ADD, True), (UPD, False), (DEL, True)]
    assert [event.type for event in kernel.events(timeout=0)] == [UPD]


def test_a_migration_is_answered(kernel: Kernel, other: Kernel) -> None:
    """Without seq and pid, and with the satype of the template."""
    here, there = (Template.tunnel("192.0.2.1", peer, reqid=1) for peer in ("198.51.100.1", "203.0.113.1"))
    policy = Policy(OUT, SITE, templates=(here,))
    kernel.add_policy(policy)
    message = policy_message(MessageType.MIGRATE, policy, kernel.abi)
    pairs = PolicyExtension(Action.IPSEC, OUT, templates=(here, there))
    watch = kernel.spd_events(timeout=0)
    reply = kernel.request(
        Message(MessageType.MIGRATE, dict(message.extensions) | {ExtensionType.POLICY: pairs}, abi=kernel.abi)
    )
    assert (reply.seq, reply.pid) == (0, 0)
    assert [(one.type, own) for one, own in watch] == [(MessageType.MIGRATE, True)]
    assert list(kernel.events(timeout=0)) == []
    assert other.dump_policies()[0].templates == (there,)


def test_tasks_share_a_connection(connect_channel: Callable[[], Channel]) -> None:
    async def work(kernel: AsyncKernel, base: int) -> None:
        for number in range(base, base + 10):
            assert (await kernel.add_policy(discard(number))).selector == discard(number).selector
        assert len(await kernel.dump_policies()) >= 10
        wanted = [policy_message(DEL, discard(base + number), kernel.abi) for number in range(10)]
        assert all(isinstance(answer, Message) for answer in await kernel.request_many(wanted))

    async def main() -> None:
        channel = connect_channel()
        threads = threading.active_count()
        async with AsyncKernel.connect(channel) as kernel, AsyncKernel.connect(connect_channel()) as other:
            heard = asyncio.ensure_future(anext(kernel.events()))
            await asyncio.sleep(0)
            await asyncio.gather(*(work(kernel, 1000 * number) for number in range(5)))
            cancelled = asyncio.create_task(kernel.dump_policies())
            await asyncio.sleep(0)
            cancelled.cancel()
            assert await kernel.dump_policies() == []
            assert channel.fileno() < 0 or threading.active_count() == threads
            await other.add_policy(discard(1))
            assert (await heard).type == ADD
            await kernel.grace_period()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_the_grace_period_passes(kernel: Kernel) -> None:
    kernel.grace_period()
    assert kernel.dump_policies() == []


@pytest.mark.real_kernel
def test_each_network_namespace_has_a_lock_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PFKEY_LOCK", raising=False)
    with connect() as kernel:
        inode = os.stat("/proc/thread-self/ns/net").st_ino
        assert kernel.host_lock == f"/run/pfkey-spd-{inode}.lock"
        assert inode != os.stat("/proc/1/ns/net").st_ino
