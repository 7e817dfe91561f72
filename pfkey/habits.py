"""Other ways of keeping a policy while SAs come and go, carried out beside ours: what they send and what they open."""

from __future__ import annotations

from collections.abc import Mapping

from .constants import Direction, MessageType
from .embedded import EmbeddedKernel
from .kernel import connect
from .messages import Policy, Selector

__all__ = ["ALWAYS_UPDATE", "DELETE_THEN_ADD", "Habit", "Watch"]

ALWAYS_UPDATE = (MessageType.SPDUPDATE,)
"""What strongSwan did up to 5.6.3: an update whenever another SA comes to the top, whether anything differs or not."""

DELETE_THEN_ADD = (MessageType.SPDDELETE, MessageType.SPDADD)
"""What scripts around setkey(8) do; on FreeBSD that command has no update."""


class Watch:
    """Probes on the policies of a selector, one for each direction, while there is meant to be a policy.

    Without an embedded kernel there is nothing to probe: then it counts nothing.
    """

    def __init__(self, kernel: EmbeddedKernel | None, selectors: Mapping[Direction, Selector]) -> None:
        self._probes = {} if kernel is None else {way: kernel.probe(way, one) for way, one in selectors.items()}

    def begin(self, direction: Direction) -> None:
        """The policy of this direction has been acknowledged."""
        if direction in self._probes:
            self._probes[direction].arm()

    def end(self, direction: Direction) -> None:
        """The policy of this direction is about to be removed for good."""
        if direction in self._probes:
            self._probes[direction].disarm()

    @property
    def steps(self) -> int:
        """How many steps of the SPD were looked at."""
        return sum(probe.steps for probe in self._probes.values())

    @property
    def bare(self) -> int:
        """At how many of them a packet would have met no policy."""
        return sum(probe.bare for probe in self._probes.values())


class Habit:
    """One of those ways: `change` is what it sends when another assignment comes to the top of a policy.

    With a profile it is carried out on an embedded kernel of its own, else its messages are only counted.
    """

    def __init__(
        self, change: tuple[MessageType, ...], profile: str | None, selectors: Mapping[Direction, Selector]
    ) -> None:
        self._change = change
        self.messages = 0
        embedded = None if profile is None else EmbeddedKernel(profile)
        self.watch = Watch(embedded, selectors)
        self._kernel = None if embedded is None else connect(embedded.connect())

    def follow(self, direction: Direction, before: Policy | None, after: Policy | None) -> None:
        """Another assignment came to the top: `before` and `after` are the policies it asks for, None for no policy."""
        if before is None and after is not None:
            self._send(MessageType.SPDADD, after)
            self.watch.begin(direction)
        elif before is not None and after is None:
            self.watch.end(direction)
            self._send(MessageType.SPDDELETE, before)
        elif before is not None and after is not None:
            for kind in self._change:
                self._send(kind, before if kind is MessageType.SPDDELETE else after)

    def _send(self, kind: MessageType, policy: Policy) -> None:
        self.messages += 1
        if self._kernel is None:
            return
        if kind is MessageType.SPDADD:
            self._kernel.add_policy(policy)
        elif kind is MessageType.SPDUPDATE:
            self._kernel.update_policy(policy)
        else:
            self._kernel.delete_policy(policy)

    def close(self) -> None:
        """End its kernel."""
        if self._kernel is not None:
            self._kernel.close()
