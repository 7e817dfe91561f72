"""What the demo plays on: a kernel with a tracker, the other habits beside it, every message counted."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from . import channel as channels
from .assignment import Assignment
from .codec import decode
from .constants import Direction, MessageType, Mode, Rank
from .errors import KernelError, PFKeyError
from .habits import ALWAYS_UPDATE, DELETE_THEN_ADD, Habit, Watch
from .keeper import Change, PolicyTracker
from .kernel import Kernel, connect
from .messages import Policy, SecurityAssociation, Selector, Template
from .show import policy_record
from .target import embedded_kernel, native_channel, served_channel
from .tracker import TrackedPolicy
from .typed import policy_from

__all__ = ["FIRST_SPI", "HERE", "MOVED", "PEER", "SITE", "Chapter", "Stage", "Tunnel", "Wiretap"]

# Addresses for documentation (RFC 5737), which no host has: on a real kernel these policies are in nobody's way.
SITE = Selector("198.51.100.0/24", "203.0.113.0/24")
HERE, PEER, MOVED = "192.0.2.1", "192.0.2.2", "192.0.2.3"
REQID = 1
FIRST_SPI = 0xC5EED001
POLICY_CHANGES = (MessageType.SPDADD, MessageType.SPDUPDATE, MessageType.SPDDELETE)


class Wiretap:
    """A channel that notes the policy changes that go through it, as they are on the wire."""

    def __init__(self, channel: channels.Channel) -> None:
        self._channel = channel
        self.abi = channel.abi
        self.noted: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def send(self, data: bytes) -> None:
        """Note it, and on it goes."""
        self._note(data)
        self._channel.send(data)

    def send_many(self, messages: Sequence[bytes]) -> int:
        """Note those that the kernel took."""
        sent = channels.send_many(self._channel, messages)
        for data in messages[:sent]:
            self._note(data)
        return sent

    def receive(self, timeout: float | None) -> bytes | None:
        """As the channel itself."""
        return self._channel.receive(timeout)

    def fileno(self) -> int:
        """As the channel itself."""
        return self._channel.fileno()

    def close(self) -> None:
        """As the channel itself."""
        self._channel.close()

    def _note(self, data: bytes) -> None:
        if data[1] in POLICY_CHANGES:
            self.noted.append(bytes(data))

    def take(self) -> list[tuple[MessageType, Policy]]:
        """What went through since the last time."""
        messages = [decode(data, self.abi) for data in self.noted]
        self.noted.clear()
        return [(MessageType(message.type), policy_from(message)) for message in messages]


@dataclass(frozen=True)
class Tunnel:
    """The pair of SAs of a moment, or the trap that stands in for one: what each direction's policy is assigned."""

    name: str
    peer: str
    spi: int = 0
    rank: Rank = Rank.REGULAR

    def assignment(self, direction: Direction) -> Assignment:
        """In and fwd packets come through the tunnel from the peer."""
        outbound = direction is Direction.OUT
        template = Template.tunnel(HERE, self.peer, reqid=REQID)
        spi = self.spi + outbound if self.spi else 0
        return Assignment(template if outbound else template.reversed(), spi=spi, rank=self.rank)

    def associations(self) -> Iterator[SecurityAssociation]:
        """The inbound SA, then the outbound one; each with keys of its own."""
        for source, destination, spi in ((self.peer, HERE, self.spi), (HERE, self.peer, self.spi + 1)):
            yield SecurityAssociation(
                source,  # type: ignore[arg-type]  # text will do
                destination,  # type: ignore[arg-type]
                spi,
                mode=Mode.TUNNEL,
                reqid=REQID,
                encryption="aes-cbc",
                encryption_key=os.urandom(16),
                authentication="hmac-sha2-256",
                authentication_key=os.urandom(32),
            )


@dataclass
class Chapter:
    """One event in the life of the tunnel, and what it cost."""

    name: str
    title: str
    calls: list[dict[str, Any]] = field(default_factory=list)

    def sent(self, direction: Direction | None = None) -> list[str]:
        """The policy messages of the chapter, of one direction or of all."""
        chosen = (call for call in self.calls if direction is None or call.get("direction") == direction.name.lower())
        return [kind for call in chosen for kind in call.get("sent", ())]


class Stage:
    """A kernel with a tracker on it, the other ways beside it, and a printer to which everything is told."""

    def __init__(self, target: str, tell: Callable[[str], None]) -> None:
        self.target = target
        self.tell = tell
        embedded = embedded_kernel(target)
        outside = native_channel if target == "native" else partial(served_channel, target)
        self.tap = Wiretap(outside() if embedded is None else embedded.connect())
        self.kernel: Kernel = connect(self.tap)
        self.abi = self.kernel.abi
        self.selectors = {way: SITE if way is Direction.OUT else SITE.reversed() for way in self.abi.directions}
        self.tracker = PolicyTracker(self.kernel)
        self.watch = Watch(embedded, self.selectors)
        profile = None if embedded is None else embedded.profile.name
        self.habits = {
            "always_update": Habit(ALWAYS_UPDATE, profile, self.selectors),
            "delete_then_add": Habit(DELETE_THEN_ADD, profile, self.selectors),
        }
        self.probed = embedded is not None
        self.messages = 0
        self.chapters: list[Chapter] = []
        self.installed: list[SecurityAssociation] = []
        self.without_sas = ""

    # What the story is made of.

    def chapter(self, name: str, title: str) -> Chapter:
        """Begin the next one."""
        self.chapters.append(Chapter(name, title))
        self.tell(f"\n{len(self.chapters)}. {title}")
        return self.chapters[-1]

    def add(self, tunnel: Tunnel) -> None:
        """Its policies follow: inbound first, so that nothing arrives unexpected."""
        for direction in self.abi.directions:
            self._call("add", direction, tunnel.name, tunnel.assignment(direction))

    def remove(self, tunnel: Tunnel) -> None:
        """It no longer uses its policies: outbound first."""
        for direction in sorted(self.abi.directions, key=lambda way: way is not Direction.OUT):
            self._call("remove", direction, tunnel.name, tunnel.assignment(direction))

    def replace(self, old: Tunnel, new: Tunnel) -> None:
        """One takes the other's place."""
        for direction in self.abi.directions:
            pair = old.assignment(direction), new.assignment(direction)
            self._call("replace", direction, f"{old.name} -> {new.name}", *pair)

    def add_sas(self, tunnel: Tunnel) -> None:
        """Its SAs enter the SAD, where the kernel can have them."""
        for sa in tunnel.associations():
            if self.without_sas:
                return
            try:
                self.kernel.add_sa(sa)
            except FileExistsError:
                raise
            except KernelError as error:
                self.without_sas = f"{error}: this kernel lacks ESP or its algorithms"
                self.tell(f"   (the policies alone from here on, without SAs: {self.without_sas})")
                return
            self.installed.append(sa)
            self._note_sa("add_sa", sa)

    def delete_sas(self, tunnel: Tunnel) -> None:
        """Its SAs leave the SAD."""
        for sa in [sa for sa in self.installed if sa.spi in (tunnel.spi, tunnel.spi + 1)]:
            self.kernel.delete_sa(sa)
            self.installed.remove(sa)
            self._note_sa("delete_sa", sa)

    def _note_sa(self, call: str, sa: SecurityAssociation) -> None:
        self.chapters[-1].calls.append({"call": call, "sa": str(sa)})
        self.tell(f"   {call:<9} {sa}")

    def _call(self, verb: str, direction: Direction, label: str, *assignments: Assignment) -> None:
        selector = self.selectors[direction]
        before = self.tracker.assignments(direction, selector)
        if verb == "remove" and len(before) == 1:
            self.watch.end(direction)
        change: Change = getattr(self.tracker, verb)(direction, selector, *assignments)
        after = self.tracker.assignments(direction, selector)
        if after:
            self.watch.begin(direction)
        if before[:1] != after[:1]:
            for habit in self.habits.values():
                habit.follow(direction, self._policy(direction, before), self._policy(direction, after))
        sent = self.tap.take()
        own = [one for one in sent if one[1].selector.canonical() == one[1].selector]
        guard = [one for one in sent if one not in own]
        if [kind for kind, _ in own] != [*change.sent] or [kind for kind, _ in guard] != [*change.guard]:
            raise PFKeyError(f"the tracker says that it sent {change}, the wire says {sent}")
        self.messages += len(sent)
        self._note_call(verb, direction, label, own, guard)

    def _policy(self, direction: Direction, assignments: tuple[Assignment, ...]) -> Policy | None:
        """What the first of them asks for."""
        tracked = TrackedPolicy(direction, self.selectors[direction], self.abi)
        return tracked.policy(assignments[0]) if assignments else None

    def _note_call(
        self,
        verb: str,
        direction: Direction,
        label: str,
        sent: list[tuple[MessageType, Policy]],
        guard: list[tuple[MessageType, Policy]],
    ) -> None:
        counts = self.counts()
        way = direction.name.lower()
        self.chapters[-1].calls.append(
            {
                "call": verb,
                "direction": way,
                "assignment": label,
                "sent": [kind.name for kind, _ in sent],
                "guard": [kind.name for kind, _ in guard],
                "policy": policy_record(sent[-1][1]) if sent else None,
                **counts,
            }
        )
        columns = [f"{number:>6}" for number in counts["messages"].values()]
        bare = counts["steps_without_policy"]
        columns.append(f"{'-' if bare is None else bare['tracker']:>6}")
        names = " ".join(kind.name for kind, _ in sent) or "none"
        what = "  ".join(_policy_text(kind, policy) for kind, policy in sent)
        if guard:
            what += f", guarded by {guard[0][1].selector}"
        self.tell(f"   {verb:<8}{way:<4}{label:<14}{names:<10}{''.join(columns)}   {what}".rstrip())

    def counts(self) -> dict[str, Any]:
        """The running counts; steps are None where nothing can be probed."""
        others = self.habits.items()
        return {
            "messages": {"tracker": self.messages, **{name: habit.messages for name, habit in others}},
            "steps_without_policy": (
                {"tracker": self.watch.bare, **{name: habit.watch.bare for name, habit in others}}
                if self.probed
                else None
            ),
        }

    def steps_probed(self) -> dict[str, int] | None:
        """How many steps of the SPD the probes looked at; None where nothing can be probed."""
        if not self.probed:
            return None
        return {"tracker": self.watch.steps, **{name: habit.watch.steps for name, habit in self.habits.items()}}

    # Before and after.

    def occupied(self) -> list[Policy]:
        """Policies in the kernel that have the demo's own selectors: somebody else's, or left by a killed demo."""
        ours = {(way, selector.identity) for way, selector in self.selectors.items()}
        return [
            policy
            for policy in self.kernel.dump_policies()
            if (policy.direction, policy.selector.identity) in ours and self._stands(policy)
        ]

    def _stands(self, policy: Policy) -> bool:
        """Some kernels list a policy for seconds after it was deleted (FreeBSD 11), and find it by its id no more."""
        try:
            self.kernel.get_policy(policy.id)
        except FileNotFoundError:
            return False
        return True

    def clean_up(self) -> None:
        """Take out whatever is still there; what will not go is named."""
        for direction in self.selectors:
            self.watch.end(direction)
        left: list[str] = []
        try:
            self.tracker.flush()
        except PFKeyError as error:
            left.append(str(error))
        for sa in list(self.installed):
            try:
                self.kernel.delete_sa(sa)
            except PFKeyError as error:
                left.append(str(error))
            else:
                self.installed.remove(sa)
        if left:
            print("pfkey: something was left behind:", *left, sep="\n  ", file=sys.stderr)

    def close(self) -> None:
        """End all connections."""
        for habit in self.habits.values():
            habit.close()
        self.kernel.close()


def _policy_text(kind: MessageType, policy: Policy) -> str:
    if kind is MessageType.SPDDELETE:
        return str(policy.selector)
    return f"{' '.join(map(str, policy.templates))} priority {policy.priority}"
