"""Ctrl-C in the middle of an embedded kernel's work, at every line of it: the work is done, and then it is raised."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

import pytest

from pfkey import Action, Direction, EmbeddedKernel, Message, MessageType, Policy, Selector, encode
from pfkey.embedded.channel import EmbeddedChannel
from pfkey.embedded.interrupts import Uninterrupted
from pfkey.typed import policy_message

ADD, UPDATE, DELETE = MessageType.SPDADD, MessageType.SPDUPDATE, MessageType.SPDDELETE
OUT = Direction.OUT
SITES = [Selector(f"10.{number}.0.0/16", "10.200.0.0/16") for number in range(4)]
STRIDE = 7
"""Of so many lines one is tried; all of them, on all systems, take a minute."""


@pytest.fixture(autouse=True)
def heeds_ctrl_c() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Kernel:
    """Three policies, a connection, and another one that listens."""

    def __init__(self, profile: str) -> None:
        self.embedded = EmbeddedKernel(profile, clock=lambda: 1.7e9)
        self.channel, self.listener = self.embedded.connect(), self.embedded.connect()
        for site in SITES[:3]:
            self.channel.send(self.message(ADD, site, Action.DISCARD))
        for channel in (self.channel, self.listener):
            assert len(received(channel)) == 3

    def message(self, kind: MessageType, site: Selector, action: Action) -> bytes:
        abi = self.embedded.abi
        priority = 0 if not abi.has_priority else 7 if action is Action.DISCARD else 3
        policy = Policy(OUT, site, action, priority=priority)
        return encode(policy_message(kind, policy, abi).replace(seq=1, pid=2))

    def state(self) -> list[str]:
        return [f"{policy} {policy.id}" for policy in self.embedded.policies()]


def received(channel: EmbeddedChannel) -> list[bytes]:
    return list(iter(lambda: channel.receive(0), None))


def interrupted_at(line: int, work: Callable[[], object]) -> int:
    """Do this with Ctrl-C at a line of the embedded kernel's code; how many lines there were."""
    lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if "embedded" in frame.f_code.co_filename and event == "line":
            lines += 1
            if lines == line:
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        assert line
    finally:
        sys.settrace(before)
    return lines


@pytest.mark.parametrize("kind", [ADD, UPDATE, DELETE], ids=lambda kind: kind.name)
@pytest.mark.parametrize("profile", ["linux", "linux-smp", "freebsd-13", "freebsd-14", "netbsd"])
def test_a_message_is_carried_out_or_was_never_seen(profile: str, kind: MessageType) -> None:
    kernel = Kernel(profile)
    message = kernel.message(kind, SITES[3 if kind is ADD else 1], Action.NONE)
    before = kernel.state()
    lines = interrupted_at(0, partial(kernel.channel.send, message))
    after = kernel.state()
    assert before != after
    for line in range(1, lines, STRIDE):
        kernel = Kernel(profile)
        interrupted_at(line, partial(kernel.channel.send, message))
        state, heard = kernel.state(), [len(received(channel)) for channel in (kernel.channel, kernel.listener)]
        assert (state, heard) in [(before, [0, 0]), (after, [1, 1])], line
        for site in SITES:
            kernel.channel.send(kernel.message(UPDATE, site, Action.DISCARD))
            kernel.channel.send(kernel.message(DELETE, site, Action.DISCARD))
        assert kernel.state() == [], line


@pytest.mark.parametrize("profile", ["linux", "freebsd-13"])
def test_what_is_received_is_taken_out_whole(profile: str) -> None:
    """A message may be lost with the call that was to bring it, as with recv(); never the room that it took."""
    kernel = Kernel(profile)
    dump = encode(Message(MessageType.SPDDUMP, abi=kernel.embedded.abi, seq=1, pid=2))
    kernel.channel.send(dump)
    lines = interrupted_at(0, partial(received, kernel.channel))
    for line in range(1, lines, STRIDE):
        kernel = Kernel(profile)
        for _ in range(2):
            kernel.channel.send(dump)
            interrupted_at(line, partial(kernel.channel.receive_many, 2, 0))
            kernel.channel.send(dump)
            received(kernel.channel)
        assert (kernel.channel._used, kernel.channel._mbufs) == (0, 0), line


def test_whose_handler_is_called_and_when() -> None:
    called: list[str] = []
    signal.signal(signal.SIGINT, lambda *_: called.append("handler"))
    with Uninterrupted():
        with Uninterrupted():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        assert called == []
        called.append("end")
    assert called == ["end", "handler"]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Uninterrupted():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_an_error_inside_is_not_lost() -> None:
    with pytest.raises(KeyboardInterrupt) as raised, Uninterrupted():
        signal.raise_signal(signal.SIGINT)
        raise OSError("no")
    assert isinstance(raised.value.__context__, OSError)


def test_other_threads_get_no_signals() -> None:
    handlers = []

    def work() -> None:
        with Uninterrupted():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]
