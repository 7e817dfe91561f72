"""What a tracker knows: its policies by direction and selector, by id, by what they overlap, and how it was set up."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum

from .abi import Abi
from .constants import Action, Direction
from .guards import Guard, Kind, read_tag, tag_lifetime
from .messages import Policy, PolicyExtension, Selector
from .overlaps import OverlapIndex
from .refusals import unmatched_icmp
from .tracker import (
    ABSENT,
    Image,
    Installed,
    Request,
    State,
    TrackedPolicy,
    image_of,
    image_of_policy,
    lacking,
)
from .typed import PolicyRow, Stored, templates_of

__all__ = ["Book", "Ownership", "Settings"]


class Ownership(Enum):
    """What to do about somebody else's policy that has a selector of ours: see `PolicyTracker`."""

    REFUSE = "refuse"
    """Leave it alone and raise ForeignPolicy."""
    ADOPT = "adopt"
    """Make it ours: nothing is sent when it is what we want already, else one SPDUPDATE."""
    TAKE_OVER = "take_over"
    """Make it ours by an SPDUPDATE in any case, which leaves our tag on it."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a tracker was set up."""

    owner: int
    """The number in the tags of its policies."""
    named: bool
    """The owner has a name, so that a later tracker of that name has the same number."""
    ownership: Ownership = Ownership.REFUSE
    guard: Guard = Guard.AUTO
    host_guard: Guard = Guard.AUTO
    linger: float = 0.0


_PRESENT = (State.OURS, State.UNKNOWN)
_STORED = (Action.DISCARD, Action.NONE, Action.IPSEC)
_REQUESTS_KEPT = 100_000


class Book:
    """The tracked policies and the indexes over them.  No I/O, and no locks: those who use it see to that."""

    def __init__(self, abi: Abi, check_policy: Callable[[Policy], None], settings: Settings) -> None:
        self.abi = abi
        self.check_policy = check_policy
        self.settings = settings
        self.tag = tag_lifetime(settings.owner, Kind.POLICY, abi)
        self.tables: dict[int, dict[tuple[int, ...], TrackedPolicy]] = {int(way): {} for way in abi.directions}
        self.ids: dict[int, TrackedPolicy] = {}
        self.indexes = {int(way): OverlapIndex() for way in abi.directions}
        self.standing = dict.fromkeys(map(int, abi.directions), 0)
        """How many of our policies the kernel acknowledged, by direction."""
        self.recover_after = 0.0
        """Not before that moment (monotonic seconds) is it tried again."""
        self.recovered = False
        """The kernel was searched for guards that a dead process left."""
        self.orphans: dict[tuple[int, tuple[int, ...]], list[Policy]] = {}
        """Such guards that had to stay: they still hold the place of a policy that is not there."""
        self.former: dict[tuple[int, tuple[int, ...]], Installed] = {}
        """What the kernel held at the start that is ours by its tag, or may be adopted; until somebody asks for it."""
        self.lingering: OrderedDict[TrackedPolicy, None] = OrderedDict()
        """What nobody uses any more and may be waited for, first who has to go first; some are used again."""
        self._lent: dict[TrackedPolicy, tuple[list[Policy], Installed | None]] = {}
        """What policies were given of those two that nobody has come to use yet."""
        self._requests: dict[bytes, tuple[Request, ...]] = {}
        """What requests on the wire mean, as long as there are not too many of them."""
        self._accepted: set[tuple[tuple[int, ...], ...]] = set()
        """What kinds of requests this kernel has stored; noted where a rejected update is all there is to fear."""
        self._strangers: dict[tuple[int, tuple[int, ...]], list[int]] | None = {}
        """Priorities of others' policies by direction and networks; None when they could not be read."""

    def __len__(self) -> int:
        return sum(map(len, self.tables.values()))

    def __iter__(self) -> Iterator[TrackedPolicy]:
        for table in list(self.tables.values()):
            yield from list(table.values())

    def get(self, direction: int, selector: Selector) -> TrackedPolicy | None:
        """The tracked policy, None when there is none."""
        table = self.tables.get(direction)
        return None if table is None else table.get(selector.identity)

    def open(self, direction: Direction, selector: Selector) -> TrackedPolicy:
        """The tracked policy, a new one when there is none.  NotSupported for a direction that the system lacks."""
        tracked = self.get(direction, selector)
        if tracked is None:
            tracked = TrackedPolicy(direction, selector, self.abi)
            self.tables[int(direction)][tracked.selector.identity] = tracked
            self.remember(tracked)
        return tracked

    def remember(self, tracked: TrackedPolicy, *, was_just_read: bool = False) -> None:
        """Give a policy what is known of it from a former life, lent until somebody uses it.

        What was read some time ago is read again.
        """
        key = (int(tracked.direction), tracked.selector.identity)
        orphans, former = self.orphans.pop(key, []), self.former.pop(key, None)
        if tracked.installed.state is not State.ABSENT:
            former = None  # it is known better
        if orphans or former is not None:
            self._lent[tracked] = (orphans, former)
        tracked.leftover += tuple(orphans)
        if former is not None:
            self.note(tracked, former if was_just_read else former.doubted())

    def is_lent(self, tracked: TrackedPolicy) -> bool:
        """Whether a former life left something of it, and nobody has come to use it yet."""
        return tracked in self._lent

    def keep(self, tracked: TrackedPolicy) -> None:
        """What a former life left of it is looked after from now on, also when nobody uses it: it is to go."""
        self._lent.pop(tracked, None)

    def _give_back(self, tracked: TrackedPolicy) -> None:
        """Nobody came to use it: what a former life left stays as it is."""
        key = (int(tracked.direction), tracked.selector.identity)
        _, former = self._lent.pop(tracked)
        state = tracked.installed.state
        if tracked.leftover:
            self.orphans[key] = list(tracked.leftover)
            tracked.leftover = ()
        if former is not None and state in _PRESENT:
            self.former[key] = tracked.installed if state is State.OURS else former
            self.note(tracked, ABSENT)

    def _has_own_guard(self, tracked: TrackedPolicy) -> bool:
        """Whether a guard of this life stands beside a policy of a former one."""
        orphans, _ = self._lent[tracked]
        return tracked.installed.state in _PRESENT and any(guard not in orphans for guard in tracked.leftover)

    def close(self, tracked: TrackedPolicy) -> None:
        """Forget it when nobody uses it and the kernel does not hold it."""
        if tracked in self._lent:
            if len(tracked):
                self.keep(tracked)
            elif self._has_own_guard(tracked):
                return  # it stays lent until that is gone: so nobody takes the policy for one that is to go
            else:
                self._give_back(tracked)
        if len(tracked) or tracked.installed.state in _PRESENT or tracked.leftover:
            return
        if tracked.troubles is not None and not tracked.troubles.are_over:
            return
        self.indexes[int(tracked.direction)].put(tracked, None)
        self.tables[int(tracked.direction)].pop(tracked.selector.identity, None)
        if tracked.installed.policy_id:
            self.note(tracked, ABSENT)

    def note(self, tracked: TrackedPolicy, installed: Installed) -> None:
        """The kernel holds this from now on, as far as is known; the indexes follow.

        An interrupt (Ctrl-C) leaves what was known before, which is less, or what is known now, counted.
        """
        before = tracked.installed
        way = int(tracked.direction)
        more = (installed.state is State.OURS) - (before.state is State.OURS)
        if before.policy_id != installed.policy_id:
            if self.ids.get(before.policy_id) is tracked:
                del self.ids[before.policy_id]
            if installed.policy_id:
                self.ids[installed.policy_id] = tracked
        tracked.installed = installed  # no place for an interrupt between this and the next line
        self.standing[way] += more
        image = installed.image if installed.state in _PRESENT else None
        if self.abi.has_priority:
            self.indexes[way].put(tracked, None if image is None else image.priority)
        else:
            self.indexes[way].put(tracked, None if image is None and not tracked.leftover else 0)

    def read(self, tracked: TrackedPolicy, policy: Policy | None) -> None:
        """Note what the kernel says that it holds."""
        installed = tracked.installed
        if policy is None:
            self.note(tracked, ABSENT)
            return
        replaced = not self.abi.update_changes_id and installed.policy_id not in (0, policy.id)
        image = self.image(policy, installed.image)
        self._learn(image)
        tag = read_tag(policy.lifetime_hard, self.abi)
        mine = None if tag is None else tag.owner == self.settings.owner
        self.note(tracked, installed.found(image, policy.id, mine=mine, replaced=replaced))

    def image(self, policy: Policy | PolicyExtension, like: Image | None = None) -> Image:
        """The image of a policy from the kernel; the very object `like` when it is equal."""
        image = image_of_policy(policy, self.abi)
        return like if image == like and like is not None else image

    def row_image(self, row: PolicyRow | Stored, like: Image | None = None) -> Image:
        """The same of a row of a dump, or of what an answer says."""
        requests = self._requests.get(row.requests)
        if requests is None:
            templates = templates_of(row.requests, self.abi)
            requests = image_of(Action.IPSEC, templates, 0, self.abi).requests
            if len(self._requests) > _REQUESTS_KEPT:
                self._requests.clear()
            self._requests[row.requests] = requests
        if like is not None and like.action == row.action and like.priority == row.priority:
            if like.requests is requests:
                return like
            if like.requests == requests:
                self._requests[row.requests] = like.requests  # the next will be the very same
                return like
        action = Action(row.action) if row.action in _STORED else row.action
        if action != Action.IPSEC or not requests:
            return image_of(action, (), row.priority, self.abi)
        return Image(action, row.priority if self.abi.has_priority else 0, requests)

    def is_mine(self, policy: Policy) -> bool:
        """Whether it carries this tracker's own tag."""
        tag = read_tag(policy.lifetime_hard, self.abi)
        return tag is not None and tag.owner == self.settings.owner

    def acknowledge(self, tracked: TrackedPolicy, image: Image, policy_id: int) -> None:
        """The kernel said that it holds this now."""
        self._learn(image)
        self.note(tracked, Installed(State.OURS, image, policy_id, was_ours=True))

    def _learn(self, image: Image) -> None:
        if self.abi.rejected_update_removes and not self.abi.update_unlinks_first:
            self._accepted.add(_kinds(image))

    def may_be_rejected(self, image: Image | None) -> bool:
        """Whether the kernel would remove the old policy for this one, should it reject it, and may well do so.

        What it rejects that passed `check_policy` are protocols it was built without, and modes or addresses that do
        not go together (FreeBSD 14): of what it stored before it rejects none, but for want of memory.
        """
        if not self.abi.rejected_update_removes or image is None or not image.requests:
            return False
        return _kinds(image) not in self._accepted

    def warnings(self, tracked: TrackedPolicy) -> tuple[str, ...]:
        """What a person should know of a policy that the kernel takes without a word."""
        unmatched = unmatched_icmp(tracked.selector, self.abi)
        return (*((unmatched,) if unmatched else ()), *self._ties(tracked))

    def _ties(self, tracked: TrackedPolicy) -> list[str]:
        """Other policies that share the priority and some of the packets; three at most are named."""
        if not self.abi.has_priority or tracked.indexed is None:
            return []
        texts: list[str] = []
        for other in self.indexes[int(tracked.direction)].equals(tracked, tracked.indexed):
            if len(texts) == 3:
                texts.append("and others")
                break
            texts.append(
                f"{tracked} and {other} match some of the same packets with equal priorities ({tracked.indexed});"
                f" which of them wins differs between kernels and changes with updates: give one a priority"
            )
        return texts

    def is_behind_weaker(self, tracked: TrackedPolicy) -> bool:
        """On a kernel that orders by insertion: whether something weaker is, or may be, met in place of this one."""
        if self.abi.has_priority or tracked.rank is None:
            return False
        own = tracked.installed.policy_id
        for other in self.indexes[int(tracked.direction)].overlapping(tracked):
            if other.rank is not None:
                if other.rank <= tracked.rank:
                    continue
                if other.installed.state is State.UNKNOWN:
                    return True
                if other.installed.state is State.OURS and other.installed.policy_id < own:
                    return True
            if any(guard.id < own for guard in other.leftover):
                return True
        return False

    def is_out_of_order(self, tracked: TrackedPolicy) -> bool:
        """On a kernel that orders by insertion: whether it, or something weaker, has to be moved."""
        rank, own = tracked.rank, tracked.installed.policy_id
        if self.abi.has_priority or rank is None:
            return False
        return self.is_behind_weaker(tracked) or any(
            other.rank is not None and other.rank < rank and other.installed.policy_id > own
            for other in self.indexes[int(tracked.direction)].overlapping(tracked)
            if other.installed.state is State.OURS
        )

    def tagged(self, policy: Policy) -> Policy:
        """The same with this tracker's tag."""
        return replace(policy, lifetime_hard=self.tag, id=0)

    # Policies of others, as far as they matter to an update on Linux.

    def forget_strangers(self) -> None:
        """What was seen of them is old."""
        self._strangers = {}

    def see_strangers(self, rows: Iterable[PolicyRow] | None) -> None:
        """Note those of a dump; None: it could not be read, and they may be anywhere."""
        if rows is None:
            self._strangers = None
            return
        strangers: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        self._strangers = strangers
        for row in rows:
            if self.ids.get(row.id) is None:
                strangers.setdefault((row.direction, row.identity[:5]), []).append(row.priority)

    def stranger_between(self, tracked: TrackedPolicy, low: int, high: int) -> bool:
        """Whether a policy of somebody else with the same networks has a priority between these."""
        if self._strangers is None:
            return True
        there = self._strangers.get((int(tracked.direction), tracked.selector.identity[:5]), ())
        return any(low <= priority <= high for priority in there)

    def must_support(self, direction: Direction) -> None:
        """Raise NotSupported for a direction that the system lacks."""
        if int(direction) not in self.tables:
            raise lacking(direction, self.abi)


def _kinds(image: Image) -> tuple[tuple[int, ...], ...]:
    """What of the requests decides on whether a kernel takes them."""
    return tuple(
        (one.protocol, one.mode, one.level, *(side.version for side in (one.source, one.destination) if side))
        for one in image.requests
    )
