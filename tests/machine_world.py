"""The kernel of the tracker's state machine: connections that go wrong, whose each entry is, and what packets meet.

Every message is sent under the embedded kernel's lock with its sender noted, so that at each step of the SPD it is
known who caused it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from machine_model import Where, universe

from pfkey import Action, EmbeddedKernel, Kernel, Message, MessageType, Policy, Selector, connect, decode
from pfkey.embedded.channel import EmbeddedChannel
from pfkey.embedded.profiles import Dialect, Update
from pfkey.embedded.spd import Entry, Packet
from pfkey.embedded.traffic import packet_of
from pfkey.guards import Kind, Tag, read_tag, real_selector
from pfkey.tracker import State, image_of_policy
from pfkey.typed import policy_from, selector_from

WRITES = (MessageType.SPDADD, MessageType.SPDUPDATE, MessageType.SPDDELETE)
Key = tuple[int, tuple[int, ...]]


class Death(BaseException):
    """The process was killed here: nothing of it runs any more, and its socket is gone."""


def key_of(where: Where) -> Key:
    return int(where.direction), where.selector.identity


class Clock:
    """The time by which answers are waited for: it passes when somebody waits in vain, and costs nothing."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def kernel_over(line: Line) -> Kernel:
    return connect(line, timeout=0.02)  # type: ignore[arg-type]


class Sent(NamedTuple):
    """One message that the tracker sent."""

    type: MessageType | int
    key: Key | None
    """The policy that it is about; None for one about a guard, and for reading."""
    message: Message


@dataclass
class Line:
    """A connection; the tracker's can be told to die or to be interrupted."""

    world: World
    sender: str
    inner: EmbeddedChannel
    death: tuple[int, bool] | None = None
    """At which send from now on the process dies, and whether the kernel has that message."""
    dead: bool = False
    interrupt: int | None = None
    """At which receive from now on Ctrl-C comes."""

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def send(self, data: bytes) -> None:
        with self.world.embedded.lock:
            self._live()
            dies = after = False
            if self.death is not None:
                left, after = self.death
                dies, self.death = left <= 0, (left - 1, after)
            if not dies or after:
                self.world.begin(self.sender, decode(data, self.inner.abi))
                try:
                    self.inner.send(data)
                finally:
                    self.world.end()
            if dies:
                self.die()

    def receive(self, timeout: float | None) -> bytes | None:
        self._live()
        if self.interrupt is not None:
            self.interrupt -= 1
            if self.interrupt < 0:
                self.interrupt = None
                self.world.disturbed = True
                raise KeyboardInterrupt
        message = self.inner.receive(0.0)
        if message is None:  # what is not there after send() never comes
            self.world.clock.now += timeout or 0.0
        return message

    def receive_many(self, limit: int, timeout: float | None) -> list[bytes]:
        first = self.receive(timeout)
        return [] if first is None else [first, *(self.inner.receive_many(limit - 1, 0.0) if limit > 1 else ())]

    def send_many(self, messages: Sequence[bytes]) -> int:
        """One at a time: of several, the one whose send fails after the work would be sent once more for its error."""
        self.send(messages[0])
        return 1

    def die(self) -> None:
        self.dead = True
        self.world.disturbed = True
        raise Death

    def _live(self) -> None:
        if self.dead:
            raise Death


@dataclass(eq=False)
class Info:
    """An entry of the SPD, and whose it is."""

    key: Key | None
    """The tracked policy that it is, or stands in for; None for one that no tracker would make."""
    guard: Kind | None
    owner: int
    """The number in its tag, 0 without one."""
    policy: Policy
    whose: str
    """ours, foreign, or shared: somebody changed ours, or took its place while the tracker could not know."""

    def __str__(self) -> str:
        what = f"guard ({self.guard.name})" if self.guard else self.whose
        return f"{what} {self.policy}"


class Meeting(NamedTuple):
    """What the packet of a policy met at a step of the SPD that the tracker caused."""

    step: str
    info: Info | None


@dataclass
class World:
    """The embedded kernel and everything that is watched in it."""

    profile: str
    embedded: EmbeddedKernel = field(init=False)
    entries: dict[Entry, Info] = field(default_factory=dict)
    armed: set[Key] = field(default_factory=set)
    """Policies that the caller wants, and the kernel acknowledged: their packets must never find nothing."""
    wanted: set[Key] = field(default_factory=set)
    """Policies that a caller has named: what may be adopted where foreign policies may be."""
    owner: int = 0
    refuses: bool = True
    bare: bool = False
    bare_hosts: bool = False
    beliefs: object = None
    """The tracker's book, for what it could know."""
    sent: list[Sent] = field(default_factory=list)
    disturbed: bool = False
    """Something went wrong on purpose since the last call began."""
    surprised: bool = False
    """Somebody else changed something since the tracker last read everything."""
    violations: list[str] = field(default_factory=list)
    meetings: dict[Key, list[Meeting]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    clock: Clock = field(default_factory=Clock)
    passed: float = 0.0
    """Seconds on the kernel's own clock: it goes on between calls, never within one."""

    def __post_init__(self) -> None:
        self.embedded = EmbeddedKernel(self.profile, clock=lambda: 1.7e9 + self.passed)
        self.abi = self.embedded.abi
        self.places = universe(self.abi)
        self.by_key = {key_of(where): where for where in self.places}
        self.packets: dict[Key, Packet] = {
            key_of(where): packet_of(self.embedded.profile, where.selector) for where in self.places
        }
        self.embedded.on_step.append(self._step)
        self.sender = ""
        self.message: Message | None = None
        self._gone: list[Info] = []
        self._taken: list[Info] = []
        self._covered: set[Key] = set()
        self._seen: frozenset[Key] = frozenset()

    # Connections.

    def connect(self, sender: str) -> Line:
        return Line(self, sender, self.embedded.connect())

    # One message, under the kernel's lock.

    def begin(self, sender: str, message: Message) -> None:
        self.sender, self.message, self._gone = sender, message, []
        if sender != "tracker":
            return
        kind = message.type
        selector = selector_from(message) if kind in WRITES else None
        key = None
        if selector is not None and message.policy is not None:
            found = (int(message.policy.direction), selector.identity)
            is_real = selector.canonical().packed == selector.packed and selector.scopes == selector.canonical().scopes
            key = (
                found
                if is_real and found in self.by_key and self.by_key[found].selector.scopes == selector.scopes
                else None
            )
        self.sent.append(Sent(kind, key, message))
        if kind in WRITES:
            held = {info.key for info in self.entries.values()}
            self._covered = self.armed & held
        else:
            self._covered = set()

    def end(self) -> None:
        for info in self._taken:
            # A dead process may have left its policies in the wrong order: then its update is made up for.
            if not (info.owner and self.message is not None and self._repeats(info)):
                self.violations.append(f"somebody else's policy was taken out by our {self.message!r}: {info}")
        self._taken.clear()
        self.sender, self.message = "", None

    def _repeats(self, info: Info) -> bool:
        """Whether the message under way says what is there already, or what its alias shows, and whose it is."""
        assert self.message is not None
        if self.message.type != MessageType.SPDUPDATE:
            return False
        asked = policy_from(self.message)
        shown = [
            one.policy
            for one in self.entries.values()
            if one.guard is Kind.ALIAS and one.key == info.key and one.owner == info.owner
        ]
        images = [image_of_policy(policy, self.abi) for policy in (info.policy, *shown)]
        is_theirs = read_tag(asked.lifetime_hard, self.abi) == Tag(info.owner, Kind.POLICY)
        return is_theirs and image_of_policy(asked, self.abi) in images

    def _step(self, name: str, kernel: EmbeddedKernel) -> None:
        if name != "walking":
            self._refresh()
        if self.sender == "tracker":
            self._look(name)

    def _refresh(self) -> None:
        standing = set(self.embedded.spd)
        for entry in self.entries.keys() - standing:
            self._removed(self.entries.pop(entry))
        for entry in standing - self.entries.keys():
            self.entries[entry] = self._added(entry)

    def _removed(self, info: Info) -> None:
        self._gone.append(info)
        if self.sender == "tracker":
            if info.whose == "foreign" and info.guard is None and not (info.key in self.wanted and not self.refuses):
                self._taken.append(info)
        elif self.sender == "foreign":
            self.surprised = True
            if info.key is not None:
                self.armed.discard(info.key)

    def _added(self, entry: Entry) -> Info:
        policy = _with_scopes(entry, entry.policy(self.embedded.scope))
        tag = read_tag(policy.lifetime_hard, self.abi)
        guard = tag.kind if tag is not None and tag.kind is not Kind.POLICY else None
        selector = policy.selector if guard is None else real_selector(policy.selector, guard)
        key: Key | None = (int(policy.direction), selector.identity)
        known = self.by_key.get(key)  # type: ignore[arg-type]
        if known is None or known.selector.packed != selector.packed or known.selector.scopes != selector.scopes:
            key = None
        owner = tag.owner if tag is not None else 0
        info = Info(key, guard, owner, policy, "ours" if owner and owner == self.owner else "foreign")
        if guard is None and self.sender == "foreign":
            self.surprised = True
            info.whose = self._whose(info)
        return info

    def _whose(self, info: Info) -> str:
        """Whose a policy is that somebody else has just put there, as far as the tracker can know it."""
        if info.key is None:
            return "foreign"
        before = next((gone for gone in self._gone if gone.key == info.key and gone.guard is None), None)
        if before is not None and before.whose != "foreign":
            return "shared"
        where = self.by_key[info.key]
        book = self.beliefs
        if book is None:
            return "foreign"
        tracked = book.get(where.direction, where.selector)  # type: ignore[attr-defined]
        if tracked is None:
            return "shared" if info.key in book.former else "foreign"  # type: ignore[attr-defined]
        believed = tracked.installed
        blind = believed.state is State.OURS or (
            believed.state is State.UNKNOWN and (believed.was_ours or believed.tried is not None)
        )
        return "shared" if blind else "foreign"

    def _look(self, name: str) -> None:
        """The packets of the armed policies, at this step."""
        spd = self.embedded.spd
        for key in self._covered:
            entry = spd.match(key[0], self.packets[key])
            info = None if entry is None else self.entries.get(entry)
            self.meetings.setdefault(key, []).append(Meeting(name, info))
            if entry is None and not self._excused(name, key):
                self.violations.append(
                    f"at step {name!r} of our {self.message!r} a packet of {self.by_key[key]} met no policy;"
                    f" the SPD: {[str(one) for one in self.entries.values()]}"
                )
        self.counts["looks"] += len(self._covered)

    def _excused(self, name: str, key: Key) -> bool:
        if not self._matches_itself(key) or self.is_bare(key):
            return True
        if self.embedded.profile.update is Update.SWAP:
            # FreeBSD 14 removes the policy when it rejects an update; only the sole policy of a direction is guarded.
            if name == "unlinked" and self.message is not None and self.message.type == MessageType.SPDUPDATE:
                return True
            # Whether it is the sole one is known as far as nobody else deleted the others.
            if name == "detached" and self.surprised:
                return True
        return False

    def is_bare(self, key: Key) -> bool:
        """Whether its updates are meant to be bare."""
        selector = self.by_key[key].selector
        hosts = all(side.network.prefixlen == side.max_prefixlen for side in (selector.source, selector.destination))
        return self.bare or (self.bare_hosts and hosts)

    def _matches_itself(self, key: Key) -> bool:
        """An ICMP policy of a BSD matches no packet: type and code of ICMP are not looked at there."""
        return self.embedded.profile.dialect is Dialect.AF_KEY or self.by_key[key].selector.protocol != 1

    # Between messages.

    def real(self, where: Where) -> Info | None:
        """The kernel's entry of exactly this selector, guards aside."""
        key = key_of(where)
        return next((info for info in self.entries.values() if info.key == key and info.guard is None), None)

    def guards(self) -> list[Info]:
        return [info for info in self.entries.values() if info.guard is not None]

    def met(self, where: Where) -> Info | None:
        entry = self.embedded.spd.match(where.direction, self.packets[key_of(where)])
        return None if entry is None else self.entries[entry]

    def order(self, direction: int) -> list[Info]:
        return [self.entries[entry] for entry in self.embedded.spd.in_order(direction)]

    def relabel(self) -> None:
        """After a restart: what has another owner's tag, or none, is somebody else's."""
        for info in self.entries.values():
            if info.guard is None:
                info.whose = "ours" if info.owner and info.owner == self.owner else "foreign"

    def complain(self) -> None:
        if self.violations:
            violations, self.violations = self.violations, []
            raise AssertionError("\n".join(violations))


def _with_scopes(entry: Entry, policy: Policy) -> Policy:
    """The same with the scopes of its addresses, which an embedded kernel keeps and does not show."""
    sides = [(entry.source, policy.selector.source), (entry.destination, policy.selector.destination)]
    if not any(end.scope for end, _ in sides):
        return policy
    scoped = [f"{side.ip}%{end.scope}/{side.network.prefixlen}" if end.scope else side for end, side in sides]
    selector = policy.selector
    return replace(
        policy,
        selector=Selector(
            *scoped,
            protocol=selector.protocol,
            source_port=selector.source_port,
            destination_port=selector.destination_port,
            icmp_type=selector.icmp_type,
            icmp_code=selector.icmp_code,
        ),
    )


def is_discard_guard(info: Info) -> bool:
    return info.guard is Kind.DISCARD and info.policy.action == Action.DISCARD
