"""Many threads on one connection: whose answer is late keeps nobody else, and whoever fails leaves the others whole."""

from __future__ import annotations

import contextlib
import gc
import operator
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from holding import Holding
from served import native_channel

from pfkey import (
    Action,
    ChannelClosed,
    Direction,
    EmbeddedKernel,
    EncodeError,
    Kernel,
    Message,
    MessageType,
    Policy,
    ReplyTimeout,
    Selector,
    connect,
)
from pfkey.conversation import Request
from pfkey.sharing import Room, Waiter
from pfkey.typed import policy_from, policy_message

OUT = Direction.OUT
PROFILES = ["linux", "freebsd-12", "freebsd-14"]
LATE = Selector("10.99.0.0/16", "172.16.0.0/12")


def site(number: int) -> Selector:
    return Selector(f"10.{number >> 8}.{number & 255}.0/24", "172.16.0.0/12")


def discard(selector: Selector) -> Policy:
    return Policy(OUT, selector, Action.DISCARD)


def is_late(message: Message) -> bool:
    return message.type == MessageType.SPDADD and not message.errno and policy_from(message).selector == LATE


def in_thread(function: Callable[[], object]) -> Call:
    call = Call(function)
    call.start()
    return call


class Call(threading.Thread):
    """A call in a thread of its own; `outcome()` is what it returned or raised."""

    def __init__(self, function: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.function = function
        self.result: object = None

    def run(self) -> None:
        try:
            self.result = self.function()
        except BaseException as error:
            self.result = error

    def outcome(self) -> Any:
        self.join(60)
        assert not self.is_alive(), "it still waits"
        return self.result


def leftovers(kernel: Kernel) -> dict[str, object]:
    """What calls that are over have left behind: nothing."""
    link: Any = kernel._link
    held = {name: getattr(link, name) for name in ("_lead", "_followers", "_listeners", "_arrived")}
    held |= {name: getattr(link._room, name) for name in ("_admitted", "_requests", "_dumps", "_dumper", "_unsent")}
    held["pending"] = link.conversation._pending
    return {name: value for name, value in held.items() if value}


@pytest.fixture(params=PROFILES)
def embedded(request: pytest.FixtureRequest) -> EmbeddedKernel:
    return EmbeddedKernel(request.param)


@pytest.fixture
def channel(embedded: EmbeddedKernel) -> Holding:
    return Holding(embedded.connect(), is_late)


@pytest.fixture
def kernel(channel: Holding) -> Iterator[Kernel]:
    with connect(channel, timeout=20) as kernel:
        yield kernel


def late_call(kernel: Kernel, channel: Holding) -> Call:
    """A thread that waits for an answer which is held back."""
    call = in_thread(lambda: kernel.add_policy(discard(LATE)))
    channel.wait(lambda: bool(channel.held))
    return call


def test_a_late_answer_keeps_nobody_else_waiting(kernel: Kernel, channel: Holding) -> None:
    late = late_call(kernel, channel)
    for number in range(20):
        assert kernel.add_policy(discard(site(number))).selector == site(number)
    answers = kernel.request_many(
        policy_message(MessageType.SPDDELETE, discard(site(number)), kernel.abi) for number in range(15)
    )
    assert all(isinstance(answer, Message) for answer in answers)
    assert len(kernel.dump_policies()) == 5 + 1
    assert late.is_alive()
    channel.release()
    assert late.outcome().selector == LATE
    assert leftovers(kernel) == {}


def test_the_lead_is_handed_on_by_who_is_done(kernel: Kernel, channel: Holding) -> None:
    """The first to wait is the reader; when its answer comes the second one has to read for itself."""
    channel.hold = lambda message: message.source is not None
    calls = [in_thread(lambda n=n: kernel.add_policy(discard(site(n)))) for n in range(5)]
    channel.wait(lambda: len(channel.held) == 5)
    for _ in range(5):
        channel.release(1)
    assert {call.outcome().selector for call in calls} == {site(number) for number in range(5)}
    assert leftovers(kernel) == {}


def test_the_room_is_that_of_all_threads_together(embedded: EmbeddedKernel) -> None:
    channel = Holding(embedded.connect(), lambda message: True, in_flight=4)
    with connect(channel, timeout=20) as kernel:
        calls = [in_thread(lambda n=n: kernel.add_policy(discard(site(n)))) for n in range(6)]
        channel.wait(lambda: channel.sent == 4 and len(channel.held) == 4)
        many = in_thread(
            lambda: kernel.request_many(
                policy_message(MessageType.SPDADD, discard(site(100 + n)), kernel.abi) for n in range(20)
            )
        )
        channel.release()
        assert [call.outcome().selector for call in calls] == [site(n) for n in range(6)]
        assert len(many.outcome()) == 20
        assert channel.most_under_way == 4
        assert leftovers(kernel) == {}


def test_who_waits_for_room_waits_for_no_other_answer(embedded: EmbeddedKernel) -> None:
    """One of two answers is late: the room of the other one is free again, although one call sent both."""
    channel = Holding(embedded.connect(), is_late, in_flight=2)
    with connect(channel, timeout=20) as kernel:
        both = [policy_message(MessageType.SPDADD, discard(one), kernel.abi) for one in (LATE, site(1))]
        late = in_thread(lambda: kernel.request_many(both))
        channel.wait(lambda: bool(channel.held))
        assert kernel.add_policy(discard(site(2))).selector == site(2)
        assert late.is_alive()
        channel.release()
        assert [type(answer) for answer in late.outcome()] == [Message, Message]


@pytest.mark.parametrize("profile", ["linux", "freebsd-13"])
def test_room_is_given_in_turn(profile: str) -> None:
    """Whoever wants much is not kept waiting by those who want little; on Linux a dump has a queue of its own."""
    room = Room(Holding(EmbeddedKernel(profile).connect(), is_late, in_flight=4))
    first, second, third, dumper = (Waiter(None) for _ in range(4))
    assert room.enter(first, 9, dump=False) == 4
    assert [room.enter(second, 9, dump=False), room.enter(third, 1, dump=False)] == [0, 0]
    room.sent(first)
    room.keep(first, 1)
    assert room.enter(third, 1, dump=False) == 0, "it is not its turn"
    assert room.next == [second]
    assert room.enter(second, 9, dump=False) == 3
    room.sent(second)
    assert bool(room.enter(dumper, 1, dump=True)) is (profile == "linux")
    for waiter in (first, second, dumper):
        room.leave(waiter)
        room.leave(waiter)
    assert (room.next, room.dumping) == ([third], False)
    assert room.enter(third, 1, dump=False) == 1
    assert bool(room.enter(dumper, 1, dump=True)) is (profile == "linux"), "FreeBSD: somebody has not sent yet"
    assert room.dumping is (profile == "linux")
    room.sent(third)
    assert room.dumping or room.enter(dumper, 1, dump=True) == 1
    assert bool(room.enter(first, 1, dump=False)) is (profile == "linux"), "FreeBSD: nothing else beside a dump"


def test_an_answer_that_comes_too_late(channel: Holding) -> None:
    with connect(channel, timeout=0.3) as kernel:
        reader = in_thread(lambda: [event.type for event in kernel.events(timeout=3)])
        late = late_call(kernel, channel)
        assert isinstance(late.outcome(), ReplyTimeout)
        channel.release()
        for number in range(5):
            kernel.add_policy(discard(site(number)))
        assert reader.outcome() == []
        assert leftovers(kernel) == {}


class Lost(Exception):
    """What a channel of somebody else's may raise."""


@pytest.mark.parametrize("error", [Lost, KeyboardInterrupt], ids=lambda kind: kind.__name__)
def test_a_reader_that_dies(kernel: Kernel, channel: Holding, error: type[BaseException]) -> None:
    channel.hold = lambda message: message.source is not None
    calls = [in_thread(lambda n=n: kernel.add_policy(discard(site(n)))) for n in range(4)]
    channel.wait(lambda: len(channel.held) == 4)
    channel.failing = [error("it dies")]
    while channel.failing:
        time.sleep(0.01)
    channel.release()
    outcomes = [call.outcome() for call in calls]
    assert [type(one) for one in outcomes if isinstance(one, BaseException)] == [error]
    assert sum(isinstance(one, Policy) for one in outcomes) == 3
    assert leftovers(kernel) == {}
    assert kernel.add_policy(discard(site(9))).selector == site(9)


def test_close_wakes_everybody(embedded: EmbeddedKernel) -> None:
    channel = Holding(embedded.connect(), lambda message: True, in_flight=2)
    kernel = connect(channel, timeout=60)
    calls = [in_thread(lambda n=n: kernel.add_policy(discard(site(n)))) for n in range(6)]
    calls += [in_thread(lambda: list(kernel.events())), in_thread(lambda: list(kernel.spd_events()))]
    channel.wait(lambda: len(channel.held) == 2)
    kernel.close()
    outcomes = [call.outcome() for call in calls]
    assert [type(one) for one in outcomes] == [ChannelClosed] * 8
    texts = sorted(str(one) for one in outcomes[:6])
    assert [("was sent" in text, "not sent" in text) for text in texts].count((True, False)) == 2
    assert all(one.request.type == MessageType.SPDADD for one in outcomes[:6])
    with pytest.raises(ChannelClosed, match="SPDDUMP"):
        kernel.dump_policies()


def test_many_threads_with_a_reader_of_events_beside_them(embedded: EmbeddedKernel) -> None:
    channel, others = embedded.connect(), embedded.connect()
    channel.set_receive_buffer(1 << 20)
    others.set_receive_buffer(
        1 << 20
    )  # it hears of all that is done here, and FreeBSD 14 fails a send whose answer is lost
    with connect(channel, timeout=30) as kernel, connect(others) as other:
        watch = kernel.spd_events(timeout=0)
        heard: list[Message] = []

        def read() -> None:
            for event in kernel.events():
                heard.append(event)
                if event.type == MessageType.SPDFLUSH:
                    return

        def work(base: int) -> None:
            for number in range(base, base + 25):
                policy = kernel.add_policy(discard(site(number)))
                assert policy.selector == site(number)
                if number % 5 == 0:
                    assert site(number) in [one.selector for one in kernel.dump_policies()]
                with pytest.raises(FileExistsError):
                    kernel.add_policy(policy)
                kernel.delete_policy(policy)

        def work_in_bulk(base: int) -> None:
            for _ in range(3):
                for kind in (MessageType.SPDADD, MessageType.SPDDELETE):
                    wanted = [policy_message(kind, discard(site(base + n)), kernel.abi) for n in range(40)]
                    answers = kernel.request_many(wanted)
                    assert [one.source for one in answers if isinstance(one, Message)] == [m.source for m in wanted]

        reader = in_thread(read)
        calls = [in_thread(lambda n=n: work(1000 * n)) for n in range(4)]
        calls += [in_thread(lambda n=n: work_in_bulk(1000 * n)) for n in range(4, 7)]
        for number in range(10):
            other.add_policy(discard(site(9000 + number)))
        assert [call.outcome() for call in calls] == [None] * 7
        other.flush_policies()
        assert reader.outcome() is None
        assert [event.type for event in heard] == [MessageType.SPDADD] * 10 + [MessageType.SPDFLUSH]
        seen = [(message.type, own) for message, own in watch]
        assert seen.count((MessageType.SPDADD, True)) == 4 * 25 + 3 * 3 * 40
        assert seen.count((MessageType.SPDDELETE, True)) == 4 * 25 + 3 * 3 * 40
        assert seen.count((MessageType.SPDADD, False)) == 10
        assert kernel.lost_events == 0
        assert leftovers(kernel) == {}


def test_threads_may_dump_at_once(kernel: Kernel) -> None:
    """Linux answers EBUSY to a second dump of the same socket, and its parts could not be told apart."""
    for number in range(40):
        kernel.add_policy(discard(site(number)))

    def dump() -> list[int]:
        return [len(kernel.dump_policies()) + len(kernel.dump_sas()) for _ in range(20)]

    assert [call.outcome() for call in [in_thread(dump) for _ in range(4)]] == [[40] * 20] * 4


def test_nothing_of_a_call_outlives_it(embedded: EmbeddedKernel) -> None:
    """Neither its dump, which may be large and hold keys, nor its messages wait for the garbage collector."""
    with connect(embedded.connect()) as kernel:
        gc.collect()
        gc.disable()
        try:
            kernel.add_policy(discard(site(1)))
            with pytest.raises(FileExistsError):
                kernel.add_policy(discard(site(1)))
            assert len(kernel.dump_policies()) == 1
            list(kernel.events(timeout=0))
            assert [one for one in gc.get_objects() if isinstance(one, (Request, Waiter))] == []
        finally:
            gc.enable()


class Gated(Holding):
    """Whoever reads from it in the gated thread waits at the gate first."""

    gated: threading.Thread | None = None

    def receive(self, timeout: float | None) -> bytes | None:
        if threading.current_thread() is self.gated:
            self.arrived.set()
            assert self.gate.wait(20)
        return super().receive(timeout)

    gate = threading.Event()
    arrived = threading.Event()


def test_the_rest_of_a_dump_given_up_is_not_taken_for_the_next(embedded: EmbeddedKernel) -> None:
    """A dump dies half-way; another thread is about to read what is left of it when the next one is asked for."""
    channel = Gated(embedded.connect(), lambda message: False)
    channel.gate, channel.arrived = threading.Event(), threading.Event()
    with connect(channel, timeout=20) as kernel:
        for number in range(9):
            kernel.add_policy(discard(site(number)))

        def hold(message: Message) -> bool:
            if message.type == MessageType.SPDDUMP and len(channel.held) == 3:
                channel.failing = [Lost("half-way")]
            return message.type == MessageType.SPDDUMP

        channel.hold = hold
        with pytest.raises(Lost):
            kernel.dump_policies()
        channel.hold = lambda message: False
        reader = Call(lambda: list(kernel.events(timeout=1)))
        channel.gated = reader
        reader.start()
        assert channel.arrived.wait(20)
        opener = threading.Timer(0.2, channel.gate.set)
        opener.start()
        assert len(kernel.dump_policies()) == 9
        assert reader.outcome() == []


def test_interrupts_at_any_moment_hurt_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C again and again in the thread that reads most; the others get every answer that was not lost with it."""
    rounds = random.Random(7)
    interrupted = 0

    class Interrupt(KeyboardInterrupt):
        pass

    hook = sys.unraisablehook

    def swallow(event: Any) -> None:
        """An interrupt that comes while a buffer is given back goes no further; the interpreter says so here."""
        if not isinstance(event.exc_value, Interrupt):
            hook(event)

    monkeypatch.setattr(sys, "unraisablehook", swallow)

    def raises(*_: object) -> None:
        nonlocal interrupted
        interrupted += 1
        raise Interrupt

    embedded = EmbeddedKernel("linux")
    with native_channel(embedded, monkeypatch) as channel, connect(channel, timeout=1.0) as kernel:
        stop = threading.Event()

        def work(number: int) -> None:
            while not stop.is_set():
                policy = discard(site(1000 * number + done[number] % 50))
                # The answer may have been in the hands of the thread that was interrupted.
                with contextlib.suppress(ReplyTimeout):
                    kernel.update_policy(policy)
                    done[number] += 1

        def work_until_interrupted(
            count: int,
        ) -> None:  # 3.13: an interrupt between two rounds would miss a `with` here
            signal.setitimer(signal.ITIMER_REAL, rounds.uniform(1e-5, 2e-3))
            while interrupted == count:
                kernel.update_policy(discard(site(9999)))
                kernel.dump_policies()

        done = [0, 0]
        calls = [in_thread(lambda n=n: work(n)) for n in range(2)]
        before = signal.signal(signal.SIGALRM, raises)
        try:
            for count in range(400):
                with contextlib.suppress(Interrupt):
                    work_until_interrupted(count)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        after, deadline = list(done), time.monotonic() + 20
        while not all(map(operator.gt, done, after)) and time.monotonic() < deadline:
            time.sleep(0.01)
        stop.set()
        assert [call.outcome() for call in calls] == [None, None]
        assert all(map(operator.gt, done, after)), "the others go on"
        assert interrupted == 400
        assert leftovers(kernel) == {}
        assert len(kernel.dump_policies()) > 2


def test_a_signal_handler_may_close(embedded: EmbeddedKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in the thread that it interrupts, whatever that one holds."""
    with native_channel(embedded, monkeypatch) as channel:
        kernel = connect(channel, timeout=20)
        before = signal.signal(signal.SIGALRM, lambda *_: kernel.close())
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(ChannelClosed):
                while True:
                    kernel.update_policy(discard(site(1)))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def test_what_the_wire_cannot_carry_fails_alone(kernel: Kernel) -> None:
    wanted = [policy_message(MessageType.SPDADD, discard(site(number)), kernel.abi) for number in range(3)]
    half = bytes(65528 * 4)
    too_long = Message(
        MessageType.SPDADD, {77: half, 78: half, 79: half}, abi=kernel.abi
    )  # 64 K units of 8 bytes are too many
    answers = kernel.request_many([*wanted[:2], too_long, wanted[2]])
    assert [isinstance(answer, Message) for answer in answers] == [True, True, False, True]
    assert isinstance(answers[2], EncodeError)
    assert leftovers(kernel) == {}


@pytest.mark.parametrize("profile", ["linux", "freebsd-13"])
def test_what_is_left_of_a_dump_is_not_waited_for_while_others_never_stop_talking(profile: str) -> None:
    embedded = EmbeddedKernel(profile)
    kernel, other = connect(embedded.connect(), timeout=2), connect(embedded.connect(), timeout=2)
    site, stop = Selector("10.1.0.0/16", "10.2.0.0/16"), threading.Event()
    policy = other.add_policy(Policy(Direction.OUT, site, Action.DISCARD))
    wanted = Policy(Direction.OUT, site, Action.DISCARD)

    def talk() -> None:
        while not stop.wait(0.01):
            other.update_policy(wanted)

    thread = threading.Thread(target=talk)
    thread.start()
    try:
        kernel._link.conversation.rest_of_dump = True  # one that was given up, and whose end never comes
        assert policy.selector in [one.selector for one in kernel.dump_policies()]
        assert not kernel._link.conversation.rest_of_dump
    finally:
        stop.set()
        thread.join()
