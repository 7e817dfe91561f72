"""Dumps of thousands, many requests in flight, and a receive buffer that is too small."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address

from pfkey import (
    Action,
    Channel,
    Direction,
    Kernel,
    Message,
    MessageType,
    Policy,
    SAProtocol,
    SecurityAssociation,
    Selector,
    connect,
)
from pfkey.typed import association_message, policy_message

COUNT = 3000


def policies(count: int) -> list[Policy]:
    peer = "172.16.0.0/12"
    return [
        Policy(Direction.OUT, Selector(f"10.{number >> 8}.{number & 255}.0/24", peer), Action.DISCARD, priority=number)
        for number in range(count)
    ]


def add(kernel: Kernel, wanted: list[Policy]) -> None:
    answers = kernel.request_many(policy_message(MessageType.SPDADD, policy, kernel.abi) for policy in wanted)
    assert all(isinstance(answer, Message) for answer in answers)
    ids = [answer.policy.id for answer in answers if isinstance(answer, Message) and answer.policy]
    assert len(set(ids)) == len(wanted)


def test_thousands_of_policies(kernel: Kernel) -> None:
    wanted = policies(COUNT)
    add(kernel, wanted)
    held = kernel.dump_policies()
    assert [policy.selector for policy in held] == [policy.selector for policy in reversed(wanted)]
    assert [policy.priority for policy in held] == list(range(COUNT - 1, -1, -1))


def test_thousands_of_sas(kernel: Kernel) -> None:
    wanted = [
        SecurityAssociation(
            ip_address("192.0.2.1"),
            ip_address("198.51.100.1"),
            0x1000 + number,
            SAProtocol.ESP,
            encryption="null",
            authentication="hmac-sha1",
            authentication_key=number.to_bytes(20, "big"),
        )
        for number in range(COUNT)
    ]
    answers = kernel.request_many(association_message(MessageType.ADD, sa, kernel.abi) for sa in wanted)
    assert all(isinstance(answer, Message) for answer in answers)
    held = kernel.dump_sas()
    assert {sa.spi: sa.authentication_key for sa in held} == {sa.spi: sa.authentication_key for sa in wanted}


def test_many_requests_keep_their_order_and_their_errors(kernel: Kernel) -> None:
    wanted = policies(200)
    add(kernel, wanted[::2])
    answers = kernel.request_many(policy_message(MessageType.SPDADD, policy, kernel.abi) for policy in wanted)
    assert [isinstance(answer, FileExistsError) for answer in answers] == [number % 2 == 0 for number in range(200)]


def test_a_listener_that_does_not_read_loses_events_and_nobody_else_does(
    connect_channel: Callable[[], Channel],
) -> None:
    kernel, listener = connect(connect_channel()), connect_channel()
    shrink = getattr(listener, "set_receive_buffer")  # noqa: B009  # optional in a Channel
    shrink(65536)
    add(kernel, policies(1000))
    assert len(kernel.dump_policies()) == 1000
    heard = 0
    while listener.receive(0.0) is not None:
        heard += 1
    assert 0 < heard < 1000


def test_a_dump_needs_no_large_buffer(connect_channel: Callable[[], Channel]) -> None:
    """Linux waits for the reader, so nothing of a dump is lost."""
    add(connect(connect_channel()), policies(1000))
    channel = connect_channel()
    shrink = getattr(channel, "set_receive_buffer")  # noqa: B009
    shrink(32768)
    assert len(connect(channel).dump_policies()) == 1000
