"""What an embedded kernel costs: policies into it, a dump out of it, and the same through a socket."""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Callable
from pathlib import Path

from pfkey import Direction, Message, MessageType, Policy, Selector, Template, connect, encode
from pfkey.embedded import EmbeddedKernel
from pfkey.embedded.server import Server
from pfkey.typed import policy_message

__all__ = ["ADDED", "DUMPED", "add", "dump", "dump_served"]

ADDED, DUMPED = 5000, 10_000
_TEMPLATE = Template.tunnel("192.0.2.1", "198.51.100.1", reqid=7)


def _messages(kernel: EmbeddedKernel, count: int) -> list[bytes]:
    selectors = (Selector(f"10.{n // 256}.{n % 256}.0/24", "10.200.0.0/16") for n in range(count))
    policies = (Policy(Direction.OUT, selector, templates=(_TEMPLATE,)) for selector in selectors)
    return [encode(policy_message(MessageType.SPDADD, policy, kernel.abi)) for policy in policies]


def _fill(kernel: EmbeddedKernel, messages: list[bytes]) -> None:
    with kernel.connect() as channel:
        channel.set_receive_buffer(1 << 20)
        for start in range(0, len(messages), 200):
            channel.send_many(messages[start : start + 200])
            channel.receive_many(200, 0)


def _full() -> EmbeddedKernel:
    kernel = EmbeddedKernel("linux")
    _fill(kernel, _messages(kernel, DUMPED))
    return kernel


def add() -> Callable[[], object]:
    """ADDED policies by send_many(), into an empty kernel, their answers received."""
    messages = _messages(EmbeddedKernel("linux"), ADDED)
    return lambda: _fill(EmbeddedKernel("linux"), messages)


def dump() -> Callable[[], object]:
    """An SPDDUMP of DUMPED policies, received as it is."""
    channel = _full().connect()
    request = encode(Message(MessageType.SPDDUMP, abi=channel.abi))

    def run() -> None:
        channel.send(request)
        count = 0
        while received := channel.receive_many(64, 0):
            count += len(received)
        assert count == DUMPED

    return run


def dump_served() -> Callable[[], object]:
    """The same through a socket, decoded; both ends in one process."""
    directory = tempfile.TemporaryDirectory()
    server = Server(_full(), Path(directory.name) / "kernel")
    server.start()
    kernel = connect(server.target)
    for end in (directory.cleanup, server.close, kernel.close):
        atexit.register(end)
    return kernel.dump_policies
