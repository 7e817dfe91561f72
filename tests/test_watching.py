"""Watching the SPD: every broadcast with whether it is our own, losses counted; the host lock and the grace period."""

from __future__ import annotations

import errno
import gc
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from holding import Holding
from served import native_channel
from test_link import discard, in_thread, site

from pfkey import (
    Abi,
    Action,
    Channel,
    Direction,
    EmbeddedKernel,
    ExtensionType,
    Kernel,
    Message,
    MessageType,
    Policy,
    ReplyTimeout,
    Selector,
    Template,
    connect,
    encode,
)
from pfkey import channel as channels
from pfkey.conversation import Conversation
from pfkey.messages import PolicyExtension
from pfkey.typed import policy_message

M = MessageType
OUT = Direction.OUT
SITE = site(1)


@pytest.fixture(params=["linux", "freebsd-13"])
def embedded(request: pytest.FixtureRequest) -> EmbeddedKernel:
    return EmbeddedKernel(request.param)


@pytest.fixture(params=["one channel", "two channels"])
def kernel(request: pytest.FixtureRequest, embedded: EmbeddedKernel) -> Iterator[Kernel]:
    events = embedded.connect() if request.param == "two channels" else None
    with connect(embedded.connect(), events=events, timeout=5) as kernel:
        yield kernel


@pytest.fixture
def other(embedded: EmbeddedKernel) -> Iterator[Kernel]:
    with connect(embedded.connect()) as other:
        yield other


def kinds(found: object) -> list[tuple[int, bool]]:
    return [(message.type, own) for message, own in found]  # type: ignore[attr-defined]


def test_all_changes_in_order_and_whose_they_are(kernel: Kernel, other: Kernel) -> None:
    kernel.add_policy(discard(site(7)))
    watch = kernel.spd_events(timeout=0)
    kernel.add_policy(discard(SITE))
    other.add_policy(discard(site(2)))
    kernel.update_policy(discard(SITE))
    with pytest.raises(FileExistsError):
        kernel.add_policy(discard(SITE))
    found = kernel.dump_policies()
    kernel.get_policy(found[0].id)
    other.delete_policy(discard(SITE))
    kernel.delete_policy(discard(site(2)))
    expected = [(M.SPDADD, True), (M.SPDADD, False), (M.SPDUPDATE, True), (M.SPDDELETE, False), (M.SPDDELETE, True)]
    assert kinds(watch) == expected
    assert kinds(watch) == []
    assert [event.type for event in kernel.events(timeout=0)] == [M.SPDADD, M.SPDDELETE], "own ones are no events"
    kernel.flush_policies()
    assert {own for kind, own in kinds(watch)} == {True}
    assert (watch.lost, kernel.lost_events) == (0, 0)


def migration() -> tuple[Policy, Message]:
    here, there = (
        Template.tunnel("192.0.2.1", "198.51.100.1", reqid=1),
        Template.tunnel("192.0.2.1", "203.0.113.1", reqid=1),
    )
    policy = Policy(OUT, Selector("10.1.0.0/16", "10.2.0.0/16"), templates=(here,))
    message = policy_message(M.MIGRATE, policy, Abi.linux())
    pairs = PolicyExtension(Action.IPSEC, OUT, templates=(here, there))
    return policy, Message(M.MIGRATE, dict(message.extensions) | {ExtensionType.POLICY: pairs}, abi=Abi.linux())


@pytest.mark.parametrize("two", [False, True], ids=["one channel", "two channels"])
def test_a_migration_says_not_whose_it_is(two: bool) -> None:
    """Linux broadcasts it with seq 0 and pid 0."""
    embedded = EmbeddedKernel("linux")
    policy, message = migration()
    with connect(embedded.connect(), events=embedded.connect() if two else None) as kernel:
        watch = kernel.spd_events(timeout=0)
        kernel.add_policy(policy)
        kernel.request(message)
        assert kinds(watch) == [(M.SPDADD, True), (M.MIGRATE, True)]
        assert list(kernel.events(timeout=0)) == []
        with connect(embedded.connect()) as other:
            kernel.update_policy(policy)
            other.request(message)
        assert kinds(watch) == [(M.SPDUPDATE, True), (M.MIGRATE, False)]


def test_a_late_answer_is_ours(embedded: EmbeddedKernel) -> None:
    channel = Holding(embedded.connect(), lambda message: message.type == M.SPDADD)
    with connect(channel, timeout=0.1) as kernel:
        watch = kernel.spd_events(timeout=0)
        with pytest.raises(ReplyTimeout):
            kernel.add_policy(discard(SITE))
        channel.release()
        assert kinds(watch) == [(M.SPDADD, True)]
        assert list(kernel.events(timeout=0)) == []


def test_own_changes_are_known_as_such_however_many(embedded: EmbeddedKernel) -> None:
    """More than are remembered one by one, before anybody reads what the second channel heard."""
    with connect(embedded.connect()) as kernel:
        talk = kernel._link.conversation
        first = talk.next_seq()
        for _ in range(10_000):
            talk.end(talk.request(Message(M.SPDFLUSH, abi=kernel.abi)))
        assert talk.is_ours(Message(M.SPDADD, abi=kernel.abi, seq=first, pid=os.getpid()))
        assert not talk.is_ours(Message(M.SPDADD, abi=kernel.abi, seq=first, pid=os.getpid() + 1))
        assert not talk.is_ours(Message(M.SPDADD, abi=kernel.abi, seq=(first - 2) & 0xFFFFFFFF, pid=os.getpid()))
        assert not talk.is_ours(Message(M.SPDADD, abi=kernel.abi, seq=talk._seq + 1, pid=os.getpid()))


def test_who_waits_is_woken_by_another_thread(kernel: Kernel, other: Kernel) -> None:
    watch = kernel.spd_events()
    seen: list[tuple[int, bool]] = []

    def read() -> None:
        for message, own in watch:
            seen.append((message.type, own))

    def wait_for(count: int) -> None:
        deadline = time.monotonic() + 20
        while len(seen) < count and time.monotonic() < deadline:
            time.sleep(0.01)

    reader = in_thread(read)
    for number in range(5):
        kernel.add_policy(discard(site(number)))
    wait_for(5)
    other.delete_policy(discard(site(3)))
    wait_for(6)
    watch.stop()
    assert reader.outcome() is None
    assert seen == [(M.SPDADD, True)] * 5 + [(M.SPDDELETE, False)]


def test_two_watch_and_one_stops(kernel: Kernel, other: Kernel) -> None:
    one, two = kernel.spd_events(timeout=0), kernel.spd_events(timeout=0)
    other.add_policy(discard(SITE))
    kernel.dump_policies()
    one.stop()
    other.delete_policy(discard(SITE))
    assert kinds(two) == [(M.SPDADD, False), (M.SPDDELETE, False)]
    assert [kind for kind, _ in kinds(one)] in ([], [M.SPDADD]), "what came before stop() may still be taken"


def test_a_watch_that_is_dropped_costs_nothing_more(kernel: Kernel) -> None:
    talk = kernel._event_link.conversation
    watch = kernel.spd_events(timeout=0)
    assert talk._watches
    del watch
    gc.collect()
    kernel.add_policy(discard(SITE))
    list(kernel.events(timeout=0))
    assert not talk._watches
    with kernel.spd_events(timeout=0):
        assert talk._watches
    assert not talk._watches


def test_what_comes_faster_than_it_is_taken_is_counted() -> None:
    talk = Conversation(Abi.linux(), pid=1)
    watch = talk.watch()
    watch.limit = 4
    for seq in range(6):
        talk.receive(encode(Message(M.SPDFLUSH, abi=talk.abi, seq=seq, pid=9)))
    assert [message.seq for message, _ in watch.queue] == [2, 3, 4, 5]
    assert (watch.lost, talk.lost_events) == (2, 2)
    assert len(talk.take_events()) == 6


class Lossy(Holding):
    """Loses something now and then."""

    lost = 0
    dropped = 0


def test_losses_are_counted(embedded: EmbeddedKernel) -> None:
    channel = Lossy(embedded.connect(), lambda message: False)
    with connect(channel) as kernel:
        watch = kernel.spd_events(timeout=0)
        assert (kernel.lost_events, watch.lost) == (0, 0)
        channel._ready.append(b"no message")
        channel.failing = [OSError(errno.ENOBUFS, "full")]
        channel.lost, channel.dropped = 10, 100
        kernel.add_policy(discard(SITE))
        assert (kernel.lost_events, watch.lost) == (112, 112)
        later = kernel.spd_events(timeout=0)
        assert later.lost == 0


def test_an_embedded_kernel_counts_what_it_drops() -> None:
    embedded = EmbeddedKernel("freebsd-13")
    with connect(embedded.connect()) as kernel, connect(embedded.connect()) as other:
        for number in range(200):
            other.add_policy(discard(site(number)))
        before = kernel.lost_events
        assert before > 50
        assert len(list(kernel.events(timeout=0))) + before == 200


# The host lock, the grace period, the release of FreeBSD.


@pytest.fixture
def native(embedded: EmbeddedKernel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Channel]:
    with native_channel(embedded, monkeypatch) as channel:
        yield channel


def test_the_host_lock(embedded: EmbeddedKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert connect(embedded.connect()).host_lock is None
    monkeypatch.delenv("PFKEY_LOCK", raising=False)
    with native_channel(embedded, monkeypatch) as channel:
        path = connect(channel).host_lock
        if sys.platform == "linux":
            assert path == f"/run/pfkey-spd-{os.stat('/proc/self/ns/net').st_ino}.lock"
        else:
            assert path == "/var/run/pfkey-spd.lock"
    monkeypatch.setenv("PFKEY_LOCK", "/tmp/another")
    with native_channel(embedded, monkeypatch) as channel:
        assert connect(channel).host_lock == "/tmp/another"


@pytest.mark.parametrize(
    ("platform", "path"), [("freebsd14", "/var/run/pfkey-spd.lock"), ("linux", "/run/pfkey-spd.lock")]
)
def test_the_host_lock_without_namespaces(platform: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: str) -> os.stat_result:
        raise FileNotFoundError(path)

    monkeypatch.delenv("PFKEY_LOCK", raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(channels.os, "stat", missing)  # type: ignore[attr-defined]
    assert channels._host_lock() == path


def test_the_grace_period(native: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux: a PF_KEY socket is opened and closed; a channel that knows better is asked; else some time passes."""
    slept: list[float] = []
    done: list[str] = []

    class Scratch:
        def close(self) -> None:
            done.append("closed")

    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(channels, "_open", lambda abi: Scratch())
    monkeypatch.setattr(sys, "platform", "linux")
    connect(native).grace_period()
    assert (done, slept) == (["closed"], [])
    monkeypatch.setattr(sys, "platform", "freebsd13")
    connect(native).grace_period()
    assert (done, slept) == (["closed"], [0.02])
    embedded: Any = EmbeddedKernel("linux").connect()
    connect(Holding(embedded, lambda _: False)).grace_period()
    assert slept == [0.02, 0.02]
    embedded.grace_period = lambda: done.append("asked")
    connect(embedded).grace_period()
    assert (done, slept) == (["closed", "asked"], [0.02, 0.02])


@pytest.mark.parametrize(
    ("number", "release"), [(1302001, "FreeBSD 13.2"), (0, "FreeBSD 12.1"), (None, "FreeBSD 12.1")]
)
def test_freebsd_is_asked_for_its_number(number: int | None, release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    class Libc:
        def __init__(self, name: None) -> None:
            if number is not None:
                self.getosreldate = lambda: number

    class Host:
        sysname, release = "FreeBSD", "12.1-RELEASE-p8"

    monkeypatch.setattr(os, "uname", Host)
    monkeypatch.setattr(ctypes, "CDLL", Libc)
    assert str(Abi.native()) == release
