"""Decides: which assignment of a policy is on top, what the kernel should hold, what to send.  No I/O.

The order of assignments is that of strongSwan's kernel-pfkey plugin.  What is sent follows from one table, `decide`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from .abi import Abi
from .assignment import Assignment, implied_priority, narrowness, priority_of
from .constants import Action, Direction, Level, Mode
from .errors import NotSupported, NotTracked
from .messages import IPAddress, Lifetime, Policy, PolicyExtension, Selector, Template

__all__ = [
    "Assignment",
    "Image",
    "Installed",
    "State",
    "Step",
    "TrackedPolicy",
    "Undo",
    "decide",
    "image_of",
    "image_of_policy",
    "image_text",
    "lacking",
    "priority_of",
    "templates_of",
]


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


def templates_of(image: Image) -> tuple[Template, ...]:
    """Templates that make such an image: what to send in order to have it again."""
    return tuple(
        Template(one.protocol, one.mode, one.source, one.destination, one.reqid, one.level) for one in image.requests
    )


def _request(template: Template, abi: Abi) -> Request:
    level = abi.level_default if template.level == Level.DEFAULT else template.level
    reqid = 0 if abi.reqid_needs_unique and level != Level.UNIQUE else template.reqid
    if template.mode == Mode.TUNNEL:
        return Request(template.protocol, template.mode, level, reqid, template.source, template.destination)
    return Request(template.protocol, template.mode, level, reqid, None, None)


def image_of(action: Action | int, templates: tuple[Template, ...], priority: int, abi: Abi) -> Image:
    """The image of a policy with this content under `abi`."""
    requests = () if action != Action.IPSEC else tuple(_request(template, abi) for template in templates)
    return Image(_action(action, requests, abi), priority if abi.has_priority else 0, requests)


def _action(action: Action | int, requests: tuple[Request, ...], abi: Abi) -> Action | int:
    """What the kernel makes of the action of a policy with these requests."""
    return Action.NONE if action == Action.IPSEC and not requests and abi.empty_ipsec_is_bypass else action


def requests_of(assignment: Assignment, abi: Abi) -> tuple[Request, ...]:
    """What a kernel stores of the templates of an assignment, worked out once; many assignments have one in common."""
    templates = assignment.templates
    if assignment.action is not Action.IPSEC or not templates:
        return ()
    if len(templates) == 1:
        if templates[0]._stored_abi is abi:
            return templates[0]._stored  # type: ignore[no-any-return]
    elif assignment._content_abi is abi:
        return assignment._content  # type: ignore[no-any-return]
    requests = tuple(_request(template, abi) for template in templates)
    keep_requests(assignment, requests, abi)
    return requests


def keep_requests(assignment: Assignment, requests: tuple[Request, ...], abi: Abi) -> None:
    """Remember what was worked out, or an equal value that others hold too."""
    if len(assignment.templates) == 1:
        object.__setattr__(assignment.templates[0], "_stored", requests)
        object.__setattr__(assignment.templates[0], "_stored_abi", abi)
    else:
        object.__setattr__(assignment, "_content", requests)
        object.__setattr__(assignment, "_content_abi", abi)


def image_of_policy(policy: Policy | PolicyExtension, abi: Abi) -> Image:
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
        was_ours = self.was_ours or self.state is State.OURS
        return Installed(State.UNKNOWN, self.image, self.policy_id, was_ours, tried)

    def found(
        self, image: Image | None, policy_id: int, *, mine: bool | None = None, replaced: bool = False
    ) -> Installed:
        """What a read says: nothing there (image None), ours, or somebody else's.

        A policy that was ours stays ours whoever updated it; one that we never had is ours only if it carries our own
        tag (`mine`), or no tag at all (None) and is what a message of ours may have put there.  `replaced` says that it
        is another entry than the one that was ours: somebody deleted that, and this is theirs.
        """
        if image is None:
            return ABSENT
        was_ours = (self.was_ours or self.state is State.OURS) and not replaced
        ours = mine or was_ours or (mine is None and image == self.tried)
        return Installed(State.OURS if ours else State.FOREIGN, image, policy_id, was_ours=ours)


ABSENT = Installed()


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
    implied: int
    without_reqid: bool
    negated_serial: int
    assignment: Assignment


class _Crowd:
    """Many assignments of one policy: sorted, and each found without a search.

    The few that a policy commonly has are a plain tuple instead, which takes a tenth of the memory.
    """

    __slots__ = ("entries", "serial", "serials")

    def __init__(self, policy: TrackedPolicy, ordered: tuple[Assignment, ...]) -> None:
        self.entries: list[_Entry] = []
        self.serials: dict[Assignment, deque[int]] = {}
        self.serial = 0
        for assignment in reversed(ordered):
            self.insert(policy, assignment)

    def __iter__(self) -> Iterator[Assignment]:
        return (entry.assignment for entry in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def insert(self, policy: TrackedPolicy, assignment: Assignment) -> int:
        """In front of its equals; the serial number names exactly this one."""
        self.serial += 1
        insort(self.entries, _Entry(*policy.order(assignment), -self.serial, assignment))
        self.serials.setdefault(assignment, deque()).append(self.serial)
        return self.serial

    def remove(self, policy: TrackedPolicy, assignment: Assignment) -> int | None:
        """The oldest of the equal ones; its serial number, None when there is none."""
        serials = self.serials.get(assignment)
        if not serials:
            return None
        return self._take(policy, assignment, serials.popleft())

    def withdraw(self, policy: TrackedPolicy, assignment: Assignment, serial: int) -> None:
        """Undo `insert`."""
        self.serials[assignment].remove(serial)
        self._take(policy, assignment, serial)

    def restore(self, policy: TrackedPolicy, assignment: Assignment, serial: int) -> None:
        """Undo `remove`."""
        insort(self.entries, _Entry(*policy.order(assignment), -serial, assignment))
        self.serials.setdefault(assignment, deque()).appendleft(serial)

    def _take(self, policy: TrackedPolicy, assignment: Assignment, serial: int) -> int:
        if not self.serials[assignment]:
            del self.serials[assignment]
        place = (*policy.order(assignment), -serial)
        del self.entries[bisect_left(self.entries, place)]
        return serial


class _CrowdStep(NamedTuple):
    """What takes one step of a crowd back."""

    crowd: _Crowd
    inserted: bool
    assignment: Assignment
    serial: int


Undo = tuple[Assignment, ...] | _CrowdStep
"""What `TrackedPolicy.undo` takes, last step first."""

_FEW, _MANY = 4, 16
"""A tuple that grows past the one becomes a crowd, a crowd that shrinks to the other becomes a tuple."""


class TrackedPolicy:
    """One policy: direction and canonical selector, its assignments in order, and what the kernel holds."""

    __slots__ = (
        "_entries", "_narrowness", "abi", "busy", "direction", "indexed", "installed", "leftover", "selector",
        "troubles",
    )  # fmt: skip

    def __init__(self, direction: Direction, selector: Selector, abi: Abi) -> None:
        if direction not in abi.directions:
            raise lacking(direction, abi)
        self.direction = Direction(direction)
        self.selector = selector.canonical()
        self.abi = abi
        self._narrowness = narrowness(self.selector)
        self._entries: tuple[Assignment, ...] | _Crowd = ()
        self.installed = ABSENT
        self.busy: object | None = None
        """Who works on it at the moment; the keeper's."""
        self.indexed: int | None = None
        """The priority under which the keeper's index has it."""
        self.leftover: tuple[Policy, ...] = ()
        """Guards that may still be in the kernel and have to go."""
        self.troubles: Troubles | None = None

    def __str__(self) -> str:
        return f"{self.direction.name.lower()} {self.selector}"

    def __len__(self) -> int:
        """How many assignments there are."""
        return len(self._entries)

    @property
    def assignments(self) -> tuple[Assignment, ...]:
        """All of them, the one on top first."""
        return tuple(self._entries)

    @property
    def top(self) -> Assignment | None:
        """The assignment that decides what the kernel should hold."""
        entries = self._entries
        if not entries:
            return None
        return entries.entries[0].assignment if isinstance(entries, _Crowd) else entries[0]

    def policy(self, assignment: Assignment, lifetime: Lifetime | None = None) -> Policy:
        """What would be sent for `assignment`."""
        templates = assignment.templates if assignment.action == Action.IPSEC else ()
        priority = self.priority(assignment) if self.abi.has_priority else 0
        return Policy(
            self.direction, self.selector, assignment.action, templates, priority=priority, lifetime_hard=lifetime
        )

    def image(self, assignment: Assignment) -> Image:
        """What the kernel would store for `assignment`."""
        requests = requests_of(assignment, self.abi)
        action = _action(assignment.action, requests, self.abi)
        return Image(action, self.priority(assignment) if self.abi.has_priority else 0, requests)

    def holds(self, assignment: Assignment) -> bool:
        """Whether what the kernel holds of ours is what `assignment` asks for."""
        installed = self.installed
        image = installed.image
        if installed.state is not State.OURS or image is None:
            return False
        requests = requests_of(assignment, self.abi)
        if requests is not image.requests:
            if requests != image.requests:
                return False
            if requests:
                keep_requests(assignment, image.requests, self.abi)  # one of two equal values is enough
        if _action(assignment.action, requests, self.abi) != image.action:
            return False
        return not self.abi.has_priority or self.priority(assignment) == image.priority

    def holds_top(self) -> bool:
        """Whether it is what the assignment on top asks for, or nobody uses it and nothing is there."""
        top = self.top
        return self.installed.state in (State.ABSENT, State.FOREIGN) if top is None else self.holds(top)

    @property
    def desired(self) -> Image | None:
        """The image of the assignment on top; None when the kernel should hold nothing."""
        top = self.top
        return None if top is None else self.image(top)

    @property
    def rank(self) -> int | None:
        """The priority of the assignment on top, on kernels without priorities too; None when there is none."""
        top = self.top
        return None if top is None else self.priority(top)

    def insert(self, assignment: Assignment) -> Undo:
        """Put it in its place; `undo` takes it back."""
        entries = self._entries
        if isinstance(entries, _Crowd):
            return _CrowdStep(entries, True, assignment, entries.insert(self, assignment))
        order, at = self.order(assignment), 0
        for other in entries:
            if order <= self.order(other):
                break
            at += 1
        grown = (*entries[:at], assignment, *entries[at:])
        self._entries = grown if len(grown) <= _MANY else _Crowd(self, grown)
        return entries

    def remove(self, assignment: Assignment) -> Undo:
        """Take out the oldest of the equal ones; NotTracked when there is none.  `undo` takes it back."""
        entries = self._entries
        if isinstance(entries, _Crowd):
            serial = entries.remove(self, assignment)
            if serial is None:
                raise self._not_tracked(assignment)
            if len(entries) <= _FEW:
                self._entries = tuple(entries)
            return _CrowdStep(entries, False, assignment, serial)
        for at in range(len(entries) - 1, -1, -1):
            if entries[at] == assignment:
                self._entries = entries[:at] + entries[at + 1 :]
                return entries
        raise self._not_tracked(assignment)

    def undo(self, step: Undo) -> None:
        """Take back what `insert`, `remove` or `clear` did; of several steps the last one first."""
        if not isinstance(step, _CrowdStep):
            self._entries = step
            return
        self._entries = step.crowd
        (step.crowd.withdraw if step.inserted else step.crowd.restore)(self, step.assignment, step.serial)

    def undo_all(self, steps: Sequence[Undo]) -> None:
        """Take back all that came one after the other; of few assignments in one step, whatever interrupts it."""
        if steps and not isinstance(steps[0], _CrowdStep):
            self._entries = steps[0]  # the whole list as it was before the first
            return
        for step in reversed(steps):
            self.undo(step)

    def must_have(self, assignment: Assignment) -> None:
        """Raise NotTracked when it is not there."""
        entries = self._entries
        if assignment not in (entries.serials if isinstance(entries, _Crowd) else entries):
            raise self._not_tracked(assignment)

    def clear(self) -> Undo:
        """Take out all of them."""
        entries, self._entries = self._entries, ()
        return tuple(entries)

    def order(self, assignment: Assignment) -> tuple[int, int, bool]:
        """What sorts assignments; smaller is stronger, and of equals the newest comes first."""
        implied = implied_priority(assignment.rank, self._narrowness)
        priority = implied if assignment.priority is None else assignment.priority
        return priority, implied, assignment.reqid == 0

    def priority(self, assignment: Assignment) -> int:
        """The priority of the policy while `assignment` is on top; smaller is stronger."""
        if assignment.priority is not None:
            return assignment.priority
        return implied_priority(assignment.rank, self._narrowness)

    def _not_tracked(self, assignment: Assignment) -> NotTracked:
        return NotTracked(f"{self} is not used by {assignment!r}; {self._used_by()}")

    def _used_by(self) -> str:
        count = len(self)
        return (
            "nothing does"
            if not count
            else f"it is used by {', '.join(map(repr, self.assignments[:3]))}"
            + (f" and {count - 3} more" if count > 3 else "")
        )


class Troubles:
    """What is out of the ordinary about a policy: changes by others, a last assignment that is waited for."""

    __slots__ = ("contested", "lingers_until", "strikes")

    def __init__(self) -> None:
        self.strikes: list[float] = []
        """When others changed it, of late."""
        self.contested = False
        self.lingers_until: float | None = None

    @property
    def are_over(self) -> bool:
        """Nothing is the matter any more."""
        return self.lingers_until is None and not self.contested and not self.strikes


def image_text(image: Image | None) -> str:
    """An image as errors and explanations show it."""
    if image is None:
        return "nothing"
    text = image.action.name.lower() if isinstance(image.action, Action) else f"type {image.action}"
    text = " ".join([text, *map(str, templates_of(image))])
    clear = " (lets packets through in clear)" if image.action == Action.NONE else ""
    return f"{text}, priority {image.priority}{clear}"


def lacking(direction: int, abi: Abi) -> NotSupported:
    """What to raise for a direction that the system does not have."""
    name = Direction(direction).name if direction in Direction.__members__.values() else str(direction)
    names = ", ".join(known.name for known in abi.directions)
    return NotSupported(f"{abi} has no policies of direction {name}; it has {names}")
