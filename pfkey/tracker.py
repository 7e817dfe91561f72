"""Decides: which assignment of a policy is on top, what the kernel should hold, what to send.  No I/O.

The order of assignments and the priorities are those of strongSwan's kernel-pfkey plugin, so that policies of both mix
as their users expect.  What is sent follows from one table, `decide`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import NamedTuple

from .abi import Abi
from .constants import Action, Direction, Level, Mode, Rank, UpperProtocol
from .errors import NotSupported, NotTracked
from .messages import IPAddress, Policy, Selector, Template

__all__ = ["Assignment", "Image", "Installed", "State", "Step", "TrackedPolicy", "decide", "image_of", "priority_of"]


class Assignment:
    """One use of a policy: "this SA (or trap, or shunt) uses it".

    `templates` are what the policy asks for while this assignment is on top.  `spi` tells assignments of a rekeying
    apart: one number, or one for each template (a CPI for IPComp); the kernel's policy does not hold it.  `action` is
    IPSEC, or NONE and DISCARD for shunts and guards; those may carry templates too, whose reqid orders them.  `rank`
    says what kind of user it is.  `priority` is the kernel's, None for the one that selector and rank imply.

    Assignments are values: equal ones are interchangeable, and a tracker counts them.
    """

    __slots__ = ("_content", "_hash", "action", "priority", "rank", "spi", "templates")

    templates: tuple[Template, ...]
    spi: int | tuple[int, ...]
    action: Action
    rank: Rank
    priority: int | None
    _hash: int
    _content: tuple[Abi, tuple[Action | int, tuple[Request, ...]]] | None
    """What a kernel stores of it, as it was last worked out, and for which system."""

    def __init__(
        self,
        *templates: Template,
        spi: int | tuple[int, ...] = 0,
        action: Action = Action.IPSEC,
        rank: Rank = Rank.REGULAR,
        priority: int | None = None,
    ) -> None:
        if not all(isinstance(template, Template) for template in templates):
            raise TypeError("an Assignment takes Template objects, then keyword arguments")
        if isinstance(spi, tuple) and len(spi) != len(templates):
            raise ValueError(f"{len(spi)} SPIs for {len(templates)} templates; give one number, or one for each")
        if action not in (Action.IPSEC, Action.NONE, Action.DISCARD):
            raise ValueError(f"a policy is IPSEC, NONE or DISCARD; {Action(action).name} is for sockets only")
        if priority is not None and not 0 <= priority <= 0xFFFFFFFF:
            raise ValueError(f"a priority is a number from 0 to 4294967295, not {priority}")
        give = object.__setattr__
        give(self, "templates", templates)
        give(self, "spi", spi)
        give(self, "action", Action(action))
        give(self, "rank", Rank(rank))
        give(self, "priority", priority)
        give(self, "_content", None)
        give(self, "_hash", hash((templates, spi, action, rank, priority)))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"an Assignment does not change; make another one instead of setting {name}")

    __delattr__ = __setattr__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Assignment):
            return NotImplemented
        return self._hash == other._hash and self._fields == other._fields

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        parts = [*map(str, self.templates)]
        if self.spi:
            spis = self.spi if isinstance(self.spi, tuple) else (self.spi,)
            parts.append("spi=" + ",".join(f"{spi:#x}" for spi in spis))
        if self.action is not Action.IPSEC:
            parts.append(f"action={self.action.name}")
        if self.rank is not Rank.REGULAR:
            parts.append(f"rank={self.rank.name}")
        if self.priority is not None:
            parts.append(f"priority={self.priority}")
        return f"Assignment({', '.join(parts)})"

    def __reduce__(self) -> tuple[object, ...]:
        return (_assignment, self._fields)

    @property
    def _fields(self) -> tuple[tuple[Template, ...], int | tuple[int, ...], Action, Rank, int | None]:
        return (self.templates, self.spi, self.action, self.rank, self.priority)

    @property
    def reqid(self) -> int:
        """The reqid by which it is ordered: the first that a template has, else 0."""
        return next((template.reqid for template in self.templates if template.reqid), 0)

    def reversed(self) -> Assignment:
        """The same for the other direction: the end points of every template change sides."""
        return _assignment(tuple(template.reversed() for template in self.templates), *self._fields[1:])


def _assignment(
    templates: tuple[Template, ...],
    spi: int | tuple[int, ...],
    action: Action,
    rank: Rank,
    priority: int | None,
) -> Assignment:
    return Assignment(*templates, spi=spi, action=action, rank=rank, priority=priority)


# Priorities: a class of 200,000 numbers for each rank, and within it the narrower selector in front.
_BASE = {Rank.PASS: 200000, Rank.REGULAR: 400000, Rank.TRAP: 400000, Rank.FALLBACK: 600000}
_PREFIX_BIT, _PROTOCOL, _PORT = 512, 256, 64
# By the rank's value: the hash of an enum's member is slow.
_FIRST = {rank.value: base - (rank is not Rank.TRAP) for rank, base in _BASE.items()}


def priority_of(selector: Selector, rank: Rank) -> int:
    """The priority that a selector's narrowness and a rank imply; smaller is stronger.

    ICMP type and code count as ports.  A trap stands one behind what it stands in for.
    """
    return _FIRST[rank._value_] - narrowness(selector)


def narrowness(selector: Selector) -> int:
    """By how much a selector is in front of the widest of its rank."""
    _, _, source, _, destination, protocol, *ports = selector.identity[:8]
    narrow = _PREFIX_BIT * (source + destination) + _PORT * (len(ports) - ports.count(0))
    return narrow + (_PROTOCOL if protocol != UpperProtocol.ANY else 0)


class Request(NamedTuple):
    """A template as the kernel stores it."""

    protocol: int
    mode: int
    level: int
    reqid: int
    source: IPAddress | None
    destination: IPAddress | None


class Image(NamedTuple):
    """What a kernel stores of a policy, in the normal form that is Abi data: two equal images are one policy.

    SPIs, ids and lifetimes are not in it.  `priority` is 0 where the kernel keeps none.
    """

    action: Action | int
    priority: int
    requests: tuple[Request, ...]


def _request(template: Template, abi: Abi) -> Request:
    level = abi.level_default if template.level == Level.DEFAULT else template.level
    reqid = 0 if abi.reqid_needs_unique and level != Level.UNIQUE else template.reqid
    if template.mode == Mode.TUNNEL:
        return Request(template.protocol, template.mode, level, reqid, template.source, template.destination)
    return Request(template.protocol, template.mode, level, reqid, None, None)


def image_of(action: Action | int, templates: tuple[Template, ...], priority: int, abi: Abi) -> Image:
    """The image of a policy with this content under `abi`."""
    action, requests = _content(action, templates, abi)
    return Image(action, priority if abi.has_priority else 0, requests)


def _content(
    action: Action | int, templates: tuple[Template, ...], abi: Abi
) -> tuple[Action | int, tuple[Request, ...]]:
    """All of an image but the priority."""
    if action != Action.IPSEC:
        templates = ()
    elif not templates and abi.empty_ipsec_is_bypass:
        action = Action.NONE
    return action, tuple(_request(template, abi) for template in templates)


def _content_of(assignment: Assignment, abi: Abi) -> tuple[Action | int, tuple[Request, ...]]:
    """The same for an assignment, worked out once."""
    known = assignment._content
    if known is not None and known[0] is abi:
        return known[1]
    content = _content(assignment.action, assignment.templates, abi)
    object.__setattr__(assignment, "_content", (abi, content))
    return content


def image_of_policy(policy: Policy, abi: Abi) -> Image:
    """The image of a policy that was read from a kernel, or is about to be sent to one."""
    return image_of(policy.action, policy.templates, policy.priority, abi)


class State(Enum):
    """What is known of the kernel's side of a policy."""

    ABSENT = auto()
    OURS = auto()
    FOREIGN = auto()
    UNKNOWN = auto()


@dataclass(frozen=True, slots=True)
class Installed:
    """What the kernel holds, as far as it acknowledged or was read.

    `was_ours` survives into UNKNOWN: the kernel once acknowledged this policy to us and no read said otherwise.
    `tried` is the image that a message of unknown outcome may have put there.
    """

    state: State = State.ABSENT
    image: Image | None = None
    policy_id: int = 0
    was_ours: bool = False
    tried: Image | None = None

    def doubted(self, tried: Image | None = None) -> Installed:
        """The same when something happened whose outcome is not certain."""
        return replace(self, state=State.UNKNOWN, was_ours=self.was_ours or self.state is State.OURS, tried=tried)

    def found(self, image: Image | None, policy_id: int) -> Installed:
        """What a read says: nothing there (image None), ours, or somebody else's.

        A policy that was ours stays ours whoever changed it; one that we never had is ours only if it is what a
        message of ours may have put there.
        """
        if image is None:
            return Installed()
        ours = self.was_ours or self.state is State.OURS or image == self.tried
        return Installed(State.OURS if ours else State.FOREIGN, image, policy_id, was_ours=ours)


class Step(Enum):
    """What the table says to do next."""

    NOTHING = auto()
    READ = auto()
    ADD = auto()
    UPDATE = auto()
    DELETE = auto()
    REFUSE = auto()


_TABLE = {
    # (something is desired, what is installed) -> step
    (False, State.UNKNOWN): Step.READ,
    (True, State.UNKNOWN): Step.READ,
    (False, State.ABSENT): Step.NOTHING,
    (False, State.OURS): Step.DELETE,
    (False, State.FOREIGN): Step.NOTHING,
    (True, State.ABSENT): Step.ADD,
    (True, State.OURS): Step.UPDATE,
    (True, State.FOREIGN): Step.REFUSE,
}


def decide(desired: Image | None, installed: Installed) -> Step:
    """The whole of the update logic: what brings a kernel that holds `installed` to `desired` (None: no policy)."""
    if desired is not None and installed.state is State.OURS and installed.image == desired:
        return Step.NOTHING
    return _TABLE[desired is not None, installed.state]


class _Entry(NamedTuple):
    """An assignment in its place.  The fields in front are the order: smaller is stronger, the newest comes first."""

    priority: int
    rank_priority: int
    without_reqid: bool
    negated_serial: int
    assignment: Assignment


class TrackedPolicy:
    """One policy: direction and canonical selector, its assignments in order, and what the kernel holds."""

    __slots__ = ("_entries", "_narrowness", "_serial", "_serials", "abi", "direction", "installed", "selector")

    def __init__(self, direction: Direction, selector: Selector, abi: Abi) -> None:
        if direction not in abi.directions:
            names = ", ".join(known.name for known in abi.directions)
            raise NotSupported(f"{abi} has no policies of direction {_name(direction)}; it has {names}")
        self.direction = Direction(direction)
        self.selector = selector.canonical()
        self.abi = abi
        self._narrowness = narrowness(self.selector)
        self.installed = Installed()
        self._entries: list[_Entry] = []
        self._serials: dict[Assignment, deque[int]] = {}
        self._serial = 0

    def __str__(self) -> str:
        return f"{self.direction.name.lower()} {self.selector}"

    @property
    def assignments(self) -> tuple[Assignment, ...]:
        """All of them, the one on top first."""
        return tuple(entry.assignment for entry in self._entries)

    @property
    def top(self) -> Assignment | None:
        """The assignment that decides what the kernel should hold."""
        return self._entries[0].assignment if self._entries else None

    def policy(self, assignment: Assignment) -> Policy:
        """What would be sent for `assignment`."""
        templates = assignment.templates if assignment.action == Action.IPSEC else ()
        priority = self._priority(assignment) if self.abi.has_priority else 0
        return Policy(self.direction, self.selector, assignment.action, templates, priority=priority)

    def image(self, assignment: Assignment) -> Image:
        """What the kernel would store for `assignment`."""
        action, requests = _content_of(assignment, self.abi)
        return Image(action, self._priority(assignment) if self.abi.has_priority else 0, requests)

    @property
    def desired(self) -> Image | None:
        """The image of the assignment on top; None when the kernel should hold nothing."""
        return self.image(self._entries[0].assignment) if self._entries else None

    def insert(self, assignment: Assignment) -> int:
        """Put it in its place and return the serial number by which `withdraw` takes exactly this one back."""
        self._serial += 1
        insort(self._entries, self._entry(assignment, self._serial))
        self._serials.setdefault(assignment, deque()).append(self._serial)
        return self._serial

    def remove(self, assignment: Assignment) -> int:
        """Take out the oldest of the equal ones and return its serial; NotTracked when there is none."""
        serials = self._serials.get(assignment)
        if not serials:
            raise NotTracked(f"{assignment!r} does not use {self}; {self._used_by()}")
        return self._take(assignment, serials.popleft())

    def withdraw(self, assignment: Assignment, serial: int) -> None:
        """Undo `insert`."""
        self._serials[assignment].remove(serial)
        self._take(assignment, serial)

    def restore(self, assignment: Assignment, serial: int) -> None:
        """Undo `remove`: it returns to the very place that it had."""
        insort(self._entries, self._entry(assignment, serial))
        self._serials.setdefault(assignment, deque()).appendleft(serial)

    def clear(self) -> None:
        """Take out all of them."""
        self._entries.clear()
        self._serials.clear()

    def _take(self, assignment: Assignment, serial: int) -> int:
        if not self._serials[assignment]:
            del self._serials[assignment]
        del self._entries[bisect_left(self._entries, self._entry(assignment, serial)[:4])]
        return serial

    def _entry(self, assignment: Assignment, serial: int) -> _Entry:
        implied = _FIRST[assignment.rank._value_] - self._narrowness
        priority = implied if assignment.priority is None else assignment.priority
        return _Entry(priority, implied, assignment.reqid == 0, -serial, assignment)

    def _priority(self, assignment: Assignment) -> int:
        if assignment.priority is not None:
            return assignment.priority
        return _FIRST[assignment.rank._value_] - self._narrowness

    def _used_by(self) -> str:
        count = len(self._entries)
        return (
            "nothing does"
            if not count
            else f"it is used by {', '.join(map(repr, self.assignments[:3]))}"
            + (f" and {count - 3} more" if count > 3 else "")
        )


def _name(direction: int) -> str:
    return Direction(direction).name if direction in Direction.__members__.values() else str(direction)
