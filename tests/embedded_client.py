"""Talks to an embedded kernel message by message: what was sent, and what each connection then received."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest

from pfkey import (
    Action,
    Direction,
    Lifetime,
    Message,
    MessageType,
    Mode,
    Policy,
    SAProtocol,
    SecurityAssociation,
    Selector,
    Template,
    decode,
    encode,
)
from pfkey.embedded import EmbeddedChannel, EmbeddedKernel, Profile
from pfkey.typed import association_message, policy_message

LINUX = ["linux", "linux-6.12", "linux-smp"]
FREEBSD = ["freebsd-12", "freebsd-13", "freebsd-14"]
LIST_ORDER = ["freebsd-10", "netbsd", "macos"]
OLDER = ["freebsd-11", *LIST_ORDER]
KAME = [*FREEBSD, *OLDER]
UNLINK_FIRST = [name for name in KAME if name != "freebsd-14"]
ALL = [*LINUX, *KAME]
"""Every profile; FREEBSD stands for the modern releases, KAME for all that come from it."""

OUT, IN = Direction.OUT, Direction.IN
SITE = Selector("10.1.0.0/16", "10.2.0.0/16")
TUNNEL = Template.tunnel("192.0.2.1", "198.51.100.1", reqid=7)
PACKET = ("10.1.0.1", "10.2.0.1")
SA = SecurityAssociation(
    ip_address("192.0.2.1"),
    ip_address("198.51.100.1"),
    0x1000,
    SAProtocol.ESP,
    Mode.TUNNEL,
    reqid=7,
    encryption="aes-cbc",
    encryption_key=bytes(16),
)


def discard(selector: Selector = SITE, priority: int = 5, direction: Direction = OUT) -> Policy:
    return Policy(direction, selector, Action.DISCARD, priority=priority)


def esp(*templates: Template, selector: Selector = SITE, priority: int = 5, direction: Direction = OUT) -> Policy:
    return Policy(direction, selector, Action.IPSEC, templates or (TUNNEL,), priority)


class Client:
    """An embedded kernel with a clock that stands still, and one connection to it."""

    def __init__(self, profile: str | Profile) -> None:
        self.kernel = EmbeddedKernel(profile, clock=lambda: 1_700_000_000.25)
        self.abi = self.kernel.abi
        self.channel = self.kernel.connect()
        self.seq = 0

    def send(self, message: Message | bytes, channel: EmbeddedChannel | None = None) -> None:
        """Send as it is."""
        (channel or self.channel).send(message if isinstance(message, bytes) else encode(message))

    def received(self, channel: EmbeddedChannel | None = None) -> list[Message]:
        """Everything that waits."""
        messages = []
        while (data := (channel or self.channel).receive(0)) is not None:
            messages.append(decode(data, self.abi))
        return messages

    def build(self, kind: int, extensions: Mapping[Any, Any] | None = None, satype: int = 0, **header: int) -> Message:
        """A message with a seq of its own."""
        self.seq += 1
        return Message(kind, extensions or {}, abi=self.abi, satype=satype, **({"seq": self.seq, "pid": 99} | header))

    def ask(self, kind: int, extensions: Mapping[Any, Any] | None = None, satype: int = 0, **header: int) -> Message:
        """Send a message and return the first answer."""
        self.received()
        self.send(self.build(kind, extensions, satype, **header))
        return self.received()[0]

    def apply(self, kind: MessageType, policy: Policy) -> Message:
        """Send a policy message and return the first answer."""
        self.received()
        self.seq += 1
        self.send(policy_message(kind, policy, self.abi).replace(seq=self.seq, pid=99))
        return self.received()[0]

    def add(self, policy: Policy) -> Message:
        """SPDADD, which must succeed."""
        answer = self.apply(MessageType.SPDADD, policy)
        assert not answer.errno, self.error(answer)
        return answer

    def update(self, policy: Policy) -> Message:
        """SPDUPDATE, whatever comes of it."""
        return self.apply(MessageType.SPDUPDATE, policy)

    def error(self, answer: Message) -> str:
        """The name of an answer's error, "" for none."""
        return self.abi.error_name(answer.errno) if answer.errno else ""

    def actions(self, direction: Direction = OUT) -> list[tuple[str, Action | int]]:
        """What stands in the SPD, in match order: sources and actions."""
        return [(str(policy.selector.source), policy.action) for policy in self.kernel.policies(direction)]


def only(*profiles: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("client", profiles, indirect=True)


def registered(client: Client) -> EmbeddedChannel:
    channel = client.kernel.connect()
    client.send(client.build(MessageType.REGISTER, satype=3), channel)
    client.received(channel)
    return channel


def add(client: Client, sa: SecurityAssociation = SA) -> None:
    client.received()
    client.send(association_message(MessageType.ADD, sa, client.abi).replace(seq=4000, pid=99))
    assert client.error(client.received()[0]) == ""


def limited(hard: Lifetime, soft: Lifetime) -> SecurityAssociation:
    return replace(SA, lifetime_hard=hard, lifetime_soft=soft)


def verdict(client: Client, direction: Direction = OUT, packet: tuple[str, str] = PACKET) -> str:
    return client.kernel.packet(direction, *packet).verdict.value
