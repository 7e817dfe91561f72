"""What a hard look at the tracker found: each of these once went wrong."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from faulty import interrupts, rejects
from rig import ALL, DROP, ESP, MOVED, OUT, REKEYED, KilledError, Rig
from scenarios import DEL
from served import native_channel

from pfkey import (
    Abi,
    AsyncKernel,
    AsyncPolicyTracker,
    Change,
    Channel,
    EmbeddedKernel,
    MessageType,
    NotSupported,
    NotTracked,
    PFKeyError,
    Policy,
    PolicyTracker,
    Selector,
    TransactionError,
    _sockets,
    connect,
)
from pfkey.book import Book
from pfkey.embedded.channel import EmbeddedChannel
from pfkey.embedded.server import Server
from pfkey.hostlock import writer_lock
from pfkey.tracker import TrackedPolicy

SITE = Selector("10.1.0.0/16", "10.2.0.0/16")


class Plain:
    """A channel with what the Protocol asks for and nothing else, under the description that somebody gave it."""

    def __init__(self, inner: object, abi: Abi) -> None:
        self.inner, self.abi = inner, abi

    def send(self, data: bytes) -> None:
        self.inner.send(data)  # type: ignore[attr-defined]

    def receive(self, timeout: float | None) -> bytes | None:
        return self.inner.receive(timeout)  # type: ignore[attr-defined, no-any-return]

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        self.inner.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("release", [11, "11.0"])
def test_freebsd_11_without_a_minor_number_may_be_one_that_answers_spdget_with_seq_zero_and_lists_the_dead(
    release: float | str,
) -> None:
    embedded = EmbeddedKernel("freebsd-11")
    kernel = connect(Plain(embedded.connect(), Abi.freebsd(release)), timeout=0.2)
    tracker = PolicyTracker(kernel, owner="a daemon")
    tracker.add(OUT, SITE, ESP)
    tracker.replace(OUT, SITE, ESP, MOVED)
    assert tracker.query(OUT, SITE).templates == MOVED.templates
    with connect(embedded.connect()) as other:
        other.update_policy(Policy(OUT, SITE, DROP.action))
    (difference,) = tracker.resync()
    assert difference.error is None
    assert [policy.templates for policy in embedded.policies()] == [MOVED.templates]
    tracker.remove(OUT, SITE, MOVED)
    assert tracker.resync() == ()
    assert embedded.policies() == []  # a guard that is listed, and dead, brings nothing back to life


@pytest.mark.parametrize("inside", ["at the end", "at a rollback"])
def test_an_interrupt_while_a_transaction_lets_go_of_its_policies_leaves_none_behind(
    inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig("linux")
    close, left = rig.tracker._tracking.book.close, [1]

    def interrupted(tracked: TrackedPolicy) -> None:
        if left[0] == 0:
            left[0] = -1
            raise KeyboardInterrupt
        left[0] -= 1
        close(tracked)

    error = KeyboardInterrupt if inside == "at the end" else (KeyboardInterrupt, ZeroDivisionError)
    with pytest.raises(error), rig.tracker.transaction():
        for third in range(4):
            rig.tracker.add(OUT, Selector(f"10.{third}.0.0/16", "10.9.0.0/16"), ESP)
        monkeypatch.setattr(rig.tracker._tracking.book, "close", interrupted)
        if inside == "at a rollback":
            raise ZeroDivisionError
    monkeypatch.undo()
    done: list[Change] = []
    selector = Selector("10.2.0.0/16", "10.9.0.0/16")
    thread = threading.Thread(target=lambda: done.append(rig.tracker.add(OUT, selector, REKEYED)), daemon=True)
    thread.start()
    thread.join(5)
    assert done, "a policy was not let go"
    rig.tracker.flush()
    rig.agrees()


# What lingers.


def test_what_lingers_costs_neither_a_timer_nor_a_look_at_all_policies_for_each_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[float] = []

    class Timer(threading.Timer):
        def __init__(self, seconds: float, call: Callable[[], None]) -> None:
            made.append(seconds)
            super().__init__(seconds, call)

    rig = Rig("linux", linger=60)
    selectors = [Selector(f"10.{third}.0.0/16", "10.200.0.0/16") for third in range(100)]
    for selector in selectors:
        rig.tracker.add(OUT, selector, ESP)
    monkeypatch.setattr(threading, "Timer", Timer)
    monkeypatch.setattr(Book, "__iter__", None)
    for selector in selectors:
        assert rig.tracker.remove(OUT, selector, ESP).sent == ()
    assert len(made) == 1
    monkeypatch.undo()
    rig.tracker.close()
    rig.agrees()


def test_what_has_lingered_and_could_not_be_deleted_is_tried_again() -> None:
    rig = Rig("linux", linger=0.05)
    rig.tracker.add(OUT, SITE, ESP)
    rig.fault(DEL, rejects("ENOBUFS"))
    rig.tracker.remove(OUT, SITE, ESP)
    until = time.monotonic() + 20
    while rig.entries() and time.monotonic() < until:
        time.sleep(0.01)
    rig.agrees()
    assert rig.told().count((DEL, str(SITE))) == 2


def test_the_end_of_one_that_lingers_is_not_cancelled_by_another_that_begins_to(tmp_path: Path) -> None:
    elsewhere = Selector("10.3.0.0/16", "10.4.0.0/16")

    async def main() -> None:
        embedded, path = EmbeddedKernel("freebsd-13"), str(tmp_path / "lock")
        async with AsyncKernel.connect(embedded.connect()) as kernel:
            tracker = AsyncPolicyTracker(kernel, linger=0.2, lock=path)
            await tracker.add(OUT, SITE, ESP)
            await tracker.add(OUT, elsewhere, ESP)
            await tracker.remove(OUT, SITE, ESP)
            lock = writer_lock(path)
            assert lock.try_to_take()  # the end comes, and waits for somebody else to have written
            while tracker._ending is None:
                await asyncio.sleep(0.01)
            await tracker.remove(OUT, elsewhere, ESP)
            lock.release()
            async with asyncio.timeout(20):
                while embedded.policies():
                    await asyncio.sleep(0.01)
            assert tracker.policies() == ()
            await tracker.close()

    asyncio.run(main())


def test_a_search_for_a_former_life_that_was_interrupted_is_begun_again() -> None:
    rig = Rig("freebsd-13", owner="d")
    rig.tracker.add(OUT, SITE, ESP)
    rig.channel.lives = 2  # the alias, the update
    with pytest.raises(KilledError):
        rig.tracker.replace(OUT, SITE, ESP, MOVED)
    assert rig.guards()
    tracker = rig.restart(owner="d")
    rig.fault(MessageType.SPDGET, interrupts)
    with pytest.raises(KeyboardInterrupt):
        tracker.add(OUT, Selector("10.3.0.0/16", "10.4.0.0/16"), ESP)
    tracker.add(OUT, SITE, MOVED)
    assert rig.guards() == []


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize("code", [None, 0, 3])
def test_icmp_type_zero_is_refused_and_not_taken_for_any_type(profile: str, code: int | None) -> None:
    rig = Rig(profile)
    echo_reply = Selector("10.1.0.0/16", "10.2.0.0/16", protocol="icmp", icmp_type=0, icmp_code=code)
    with pytest.raises(NotSupported, match="any type"):
        rig.tracker.add(OUT, echo_reply, ESP)
    assert rig.entries() == []
    every = Selector("10.1.0.0/16", "10.2.0.0/16", protocol="icmp")
    rig.tracker.add(OUT, every, ESP)
    for call in (rig.tracker.add, rig.tracker.remove):
        with pytest.raises(NotSupported, match="any type"):
            call(OUT, echo_reply, ESP)
    with pytest.raises(NotSupported, match="any type"), rig.tracker.transaction():
        rig.tracker.replace(OUT, echo_reply, ESP, MOVED)
    assert rig.tracker.assignments(OUT, every) == (ESP,)
    rig.agrees()


@pytest.mark.parametrize("profile", ALL)
def test_one_can_wait_for_ever_for_what_an_embedded_kernel_with_tagged_policies_says(profile: str) -> None:
    rig = Rig(profile)
    rig.tracker.add(OUT, SITE, ESP)
    listener, heard = rig.embedded.connect(), list[bytes | None]()
    thread = threading.Thread(target=lambda: heard.append(listener.receive(None)), daemon=True)
    thread.start()
    time.sleep(0.05)
    rig.tracker.replace(OUT, SITE, ESP, MOVED)
    thread.join(10)
    assert len(heard) == 1


def test_what_a_transaction_starts_belongs_to_it() -> None:
    selectors = [Selector(f"10.{third}.0.0/16", "10.200.0.0/16") for third in range(3)]

    async def main() -> None:
        embedded, another = EmbeddedKernel("linux"), EmbeddedKernel("freebsd-13")
        async with AsyncKernel.connect(embedded.connect()) as kernel, AsyncKernel.connect(another.connect()) as second:
            tracker, beside = AsyncPolicyTracker(kernel), AsyncPolicyTracker(second)
            with pytest.raises(ZeroDivisionError):
                async with tracker.transaction(), beside.transaction():
                    await asyncio.gather(*(tracker.add(OUT, selector, ESP) for selector in selectors))
                    await asyncio.wait_for(tracker.replace(OUT, selectors[0], ESP, MOVED), 5)
                    await asyncio.wait_for(beside.add(OUT, SITE, ESP), 5)
                    with pytest.raises(PFKeyError, match="within a transaction"):
                        await asyncio.wait_for(tracker.flush(), 5)
                    raise ZeroDivisionError
            assert (tracker.policies(), beside.policies(), embedded.policies(), another.policies()) == ((), (), [], [])
            later = asyncio.Event()

            async def outlives() -> Change:
                await later.wait()
                async with tracker.transaction() as transaction:
                    await tracker.add(OUT, SITE, ESP)
                assert len(transaction) == 1
                return await tracker.add(OUT, SITE, MOVED)

            async with tracker.transaction() as transaction:
                await asyncio.gather(*(tracker.add(OUT, selector, ESP) for selector in selectors))
                tasks = [asyncio.create_task(outlives()) for _ in range(2)]
                assert embedded.policies() == []
            assert len(transaction) == len(embedded.policies()) == 3
            later.set()
            changes = await asyncio.wait_for(asyncio.gather(*tasks), 10)
            assert max(change.sent for change in changes) == (MessageType.SPDUPDATE,)

    asyncio.run(main())


@pytest.mark.parametrize("profile", ["linux", "freebsd-13"])
def test_a_transaction_within_another_that_fails_takes_back_its_own_part(profile: str) -> None:
    rig = Rig(profile, owner="d")
    elsewhere, third = Selector("10.3.0.0/16", "10.4.0.0/16"), Selector("10.5.0.0/16", "10.6.0.0/16")
    rig.tracker.add(OUT, SITE, ESP)
    rig.tracker.add(OUT, third, ESP)
    former = rig.restart(owner="d")
    former.add(OUT, SITE, ESP)
    with rig.counting() as sent, former.transaction() as transaction:
        former.replace(OUT, SITE, ESP, REKEYED)
        with pytest.raises(ZeroDivisionError), former.transaction(sweep=True):
            former.add(OUT, SITE, DROP)
            former.remove(OUT, SITE, REKEYED)
            former.add(OUT, elsewhere, ESP)
            raise ZeroDivisionError
        with pytest.raises(NotTracked):
            former.replace_tunnel(SITE, REKEYED, MOVED)  # it has no other direction
    assert sent == []
    assert former.assignments(OUT, SITE) == (REKEYED,)
    assert {selector for _, selector in former.policies()} == {SITE}
    assert [str(selector) for _, selector in transaction.changes] != []
    assert rig.held(third) is not None  # nobody asked for a sweep in the end


@pytest.mark.parametrize("way", ["one by one", "many in a call", "served"])
def test_a_message_whose_send_failed_behind_others_is_not_sent_again(
    way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    embedded, seen = EmbeddedKernel("freebsd-11"), list[bytes]()
    submit = embedded.submit

    def noted(channel: EmbeddedChannel, data: bytes) -> None:
        if data[1] == MessageType.SPDADD:
            seen.append(data)
        submit(channel, data)

    monkeypatch.setattr(embedded, "submit", noted)
    channel: Channel = Plain(embedded.connect(), embedded.abi) if way == "one by one" else embedded.connect()
    selectors = [Selector(f"10.{third}.0.0/16", "10.200.0.0/16") for third in range(6)]
    with contextlib.ExitStack() as stack:
        if way == "served":
            stack.enter_context(Server(embedded, tmp_path / "kernel"))
            channel = stack.enter_context(connect(f"unix:{tmp_path / 'kernel'}")).channel
        tracker = PolicyTracker(connect(channel, timeout=0.5), owner="d")
        tracker.add(OUT, SITE, ESP)
        seen.clear()
        embedded.fail_next(MessageType.SPDADD, "ENOBUFS", "after", skip=2)
        with pytest.raises(TransactionError, match="ENOBUFS") as caught, tracker.transaction():
            for selector in selectors:
                tracker.add(OUT, selector, ESP)
        assert len(seen) == 6
        assert list(caught.value.errors) == [f"out {selectors[2]}"]
        assert tracker.add(OUT, selectors[2], REKEYED).sent == ()
        assert len(embedded.policies()) == 7


def test_a_native_channel_tells_what_it_could_not_send_behind_others_and_does_not_try_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[bytes] = []

    def some(descriptor: int, messages: Sequence[bytes]) -> tuple[int, int]:
        for count, data in enumerate(messages):
            tried.append(data)
            if data == b"c":
                return count, errno.ENOBUFS
        return len(messages), 0

    with native_channel(EmbeddedKernel("linux"), monkeypatch) as channel:
        monkeypatch.setattr(_sockets, "send_many", some)
        assert channel.send_many([b"a", b"b", b"c", b"d"]) == 2
        with pytest.raises(OSError, match="ENOBUFS"):
            channel.send_many([b"c", b"d"])
        assert channel.send_many([b"d", b"e"]) == 2
        assert channel.send_many([b"a", b"c"]) == 1
        assert channel.send_many([b"x", b"y"]) == 2  # somebody who does not want to know
    assert b"".join(tried) == b"abcdeacxy"
