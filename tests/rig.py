"""A tracker over an embedded kernel, with everything between them in view: messages, faults, every step of the SPD."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from faulty import Fault, FaultyChannel
from scenarios import ADD, DEL, UPD

from pfkey import (
    Abi,
    Action,
    Assignment,
    Direction,
    EmbeddedKernel,
    Message,
    MessageType,
    Policy,
    PolicyTracker,
    Selector,
    Template,
    connect,
    decode,
)
from pfkey.guards import Kind, read_tag
from pfkey.tracker import TrackedPolicy, image_of_policy
from pfkey.typed import selector_from

OUT, IN = Direction.OUT, Direction.IN
LINUX = ["linux", "linux-6.12", "linux-smp"]
PRIORITIES = ["freebsd-11", "freebsd-12", "freebsd-13"]
"""Unlink first, and order by priority."""
LISTS = ["freebsd-10", "netbsd", "macos"]
"""Unlink first, and order by insertion."""
UNLINK_FIRST = [*PRIORITIES, *LISTS]
BSD = [*UNLINK_FIRST, "freebsd-14"]
ALL = [*LINUX, *BSD]
LISTS_THE_DEAD = ["freebsd-10", "freebsd-11", "macos"]

ESP = Assignment(Template.tunnel("192.0.2.1", "198.51.100.1", reqid=1), spi=0xC0000001)
REKEYED = Assignment(Template.tunnel("192.0.2.1", "198.51.100.1", reqid=1), spi=0xC0000002)
MOVED = Assignment(Template.tunnel("192.0.2.1", "203.0.113.1", reqid=1), spi=0xC0000003)
DROP = Assignment(action=Action.DISCARD)


class KilledError(BaseException):
    """The process is no more."""


class MortalChannel(FaultyChannel):
    """A channel whose process can be killed before it writes another time."""

    lives: int | None = None
    """How many messages that change policies it still sends."""

    def send(self, data: bytes) -> None:
        if self.lives is not None and decode(data, self.abi).type in (ADD, UPD, DEL):
            if self.lives <= 0:
                raise KilledError
            self.lives -= 1
        super().send(data)


class Rig:
    """An embedded kernel, a faulty channel to it, a tracker over that; and a second, honest connection."""

    def __init__(self, profile: str, **how: object) -> None:
        self.embedded = EmbeddedKernel(profile)
        self.channel = MortalChannel(self.embedded.connect())
        self.kernel = connect(self.channel, timeout=0.2)
        self.other = connect(self.embedded.connect())
        self.tracker = PolicyTracker(self.kernel, **how)  # type: ignore[arg-type]

    @property
    def abi(self) -> Abi:
        return self.kernel.abi

    def restart(self, **how: object) -> PolicyTracker:
        """The process died; another one starts, over a connection of its own."""
        self.channel = MortalChannel(self.embedded.connect())
        self.kernel = connect(self.channel, timeout=0.2)
        self.tracker = PolicyTracker(self.kernel, **how)  # type: ignore[arg-type]
        return self.tracker

    def fault(self, type: MessageType, send: Callable[[FaultyChannel, bytes], None], skip: int = 0) -> None:
        self.channel.faults.append(Fault(type, send, skip))

    def writes(self) -> list[Message]:
        """What was sent that changes policies."""
        return [message for message in self.channel.sent if message.type in (ADD, UPD, DEL)]

    def told(self) -> list[tuple[MessageType, str]]:
        """The same as (type, selector)."""
        return [(message.type, str(selector_from(message))) for message in self.writes()]  # type: ignore[misc]

    @contextmanager
    def counting(self) -> Iterator[list[tuple[MessageType, str]]]:
        """What is sent within."""
        before, found = len(self.writes()), list[tuple[MessageType, str]]()
        yield found
        found += self.told()[before:]

    def entries(self, direction: Direction = OUT) -> list[Policy]:
        """What the kernel holds, in the order in which packets meet it."""
        return self.embedded.policies(direction)

    def guards(self) -> list[Policy]:
        """The guards among it."""
        found = []
        for policy in self.embedded.policies():
            tag = read_tag(policy.lifetime_hard, self.abi)
            if tag is not None and tag.kind is not Kind.POLICY:
                found.append(policy)
        return found

    def held(self, selector: Selector, direction: Direction = OUT) -> Policy | None:
        """The kernel's entry for exactly this selector, no guard."""
        guards = {guard.id for guard in self.guards()}
        for policy in self.entries(direction):
            if policy.selector == selector and policy.id not in guards:
                return policy
        return None

    def agrees(self) -> None:
        """The kernel holds what every tracked policy asks for, nothing else of ours, and no guard."""
        assert self.guards() == []
        expected = {}
        for direction, selector in self.tracker.policies():
            assignments = self.tracker.assignments(direction, selector)
            if assignments:
                image = TrackedPolicy(direction, selector, self.abi).image(assignments[0])
                expected[direction, str(selector)] = image
        found = {}
        for policy in self.embedded.policies():
            if read_tag(policy.lifetime_hard, self.abi) is not None:
                key = Direction(policy.direction), str(policy.selector)
                assert key not in found
                found[key] = image_of_policy(policy, self.abi)
        assert found == expected
