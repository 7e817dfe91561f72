"""What a tracker's runs need of the outside, and reading what a kernel holds.

A run is a generator: it yields what it needs (Ask, Dump, GRACE, ENTER, IDLE) to whoever carries it out over a blocking
or an asyncio connection, and gets the results back.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from typing import Any, Final, NamedTuple, TypeVar

from . import tables
from ._values import packed_request
from .abi import Abi
from .book import Book
from .codec import Message
from .constants import Action, ExtensionType, MessageType
from .errors import PFKeyError
from .messages import Policy, PolicyExtension
from .tracker import Image, TrackedPolicy, templates_of
from .typed import PolicyRow, policy_from, policy_rows

__all__ = [
    "ENTER",
    "GRACE",
    "IDLE",
    "Ask",
    "Dump",
    "Need",
    "Rows",
    "Run",
    "Steps",
    "dump",
    "get",
    "is_entry",
    "policy_of",
    "read",
]

log = logging.getLogger("pfkey.keeper")

T = TypeVar("T")


# What a run needs of the outside.


class Ask(NamedTuple):
    """Send these; the result is for each its answer or the PFKeyError that it met."""

    messages: list[Message]


class Dump(NamedTuple):
    """All policies of the main table, as Rows; may raise a PFKeyError."""


class Rows(NamedTuple):
    """A dump: what each policy is in numbers, and in the same order the policies, made when they are asked for."""

    numbers: list[PolicyRow]
    policies: Sequence[Policy]

    @classmethod
    def of(cls, dump: Sequence[Policy], abi: Abi) -> Rows:
        """What `dump_policies()` gave, or any other sequence of policies."""
        if isinstance(dump, tables.Dump):
            return cls(list(policy_rows(dump.messages)), dump)
        return cls([_row(policy, abi) for policy in dump], dump)


def _row(policy: Policy, abi: Abi) -> PolicyRow:
    return PolicyRow(
        policy.direction,
        policy.selector.identity,
        policy.selector.is_plain,
        policy.id,
        policy.action,
        policy.priority,
        b"".join(packed_request(template, abi) for template in policy.templates),
        policy.lifetime_hard,
        policy.scope,
    )


class Need(NamedTuple):
    """One of those below."""

    name: str


ENTER: Final = Need("enter")
"""Be the only writer of this kernel's SPD from now on, until the run is over; may raise a PFKeyError."""
GRACE: Final = Need("grace")
"""Go on when every packet that looks at the SPD now is through."""
IDLE: Final = Need("idle")
"""Go on when somebody has let go of a policy."""

Effect = Ask | Dump | Need
Run = Generator[Effect, Any, T]
Steps = Run[None]


# Reading.


def dump(book: Book) -> Run[Rows]:
    """All policies that there are; may raise a PFKeyError."""
    rows: Rows = yield Dump()
    if not book.abi.dump_shows_dead:
        return rows
    found = yield from get(book, [row.id for row in rows.numbers])
    for error in found:
        if isinstance(error, PFKeyError):
            raise error
    alive = [at for at, policy in enumerate(found) if policy is not None]
    return Rows([rows.numbers[at] for at in alive], [policy for policy in found if isinstance(policy, Policy)])


def policy_of(tracked: TrackedPolicy, image: Image | None, policy_id: int = 0) -> Policy | None:
    """A policy of this selector with such an image."""
    if image is None:
        return None
    way, selector, templates = tracked.direction, tracked.selector, templates_of(image)
    return Policy(way, selector, image.action, templates, priority=image.priority, id=policy_id)


def is_entry(tracked: TrackedPolicy, policy: Policy) -> bool:
    """Whether a kernel's entry is this very policy: kernels count other host bits as another selector."""
    selector, own = policy.selector, tracked.selector
    return (
        policy.direction == tracked.direction
        and selector.identity == own.identity
        and selector.packed == own.packed
        and selector.scopes == own.scopes
    )


def read(book: Book, doubtful: Sequence[TrackedPolicy]) -> Run[dict[TrackedPolicy, BaseException]]:
    """Ask the kernel what it holds for each, by id, else by a dump; which of them could not be read, and why."""
    unread: dict[TrackedPolicy, BaseException] = {}
    missing: list[TrackedPolicy] = []
    asked = [tracked for tracked in doubtful if tracked.installed.policy_id]
    found = yield from get(book, [tracked.installed.policy_id for tracked in asked])
    for tracked, policy in zip(asked, found, strict=True):
        if isinstance(policy, Policy) and is_entry(tracked, policy):
            book.read(tracked, policy)
        elif policy is None or isinstance(policy, Policy):
            missing.append(tracked)
        else:
            unread[tracked] = policy
    missing += [tracked for tracked in doubtful if not tracked.installed.policy_id]
    gone = {tracked: {tracked.installed.policy_id} for tracked in missing}
    for again in range(_DUMPS):
        # Linux leaves an entry that is updated meanwhile out of a dump: without an id, only a second one can tell.
        if not missing:
            break
        renewed: set[TrackedPolicy] = set()
        try:
            rows = yield Dump()  # dead rows too: who is listed may be there under another id
            missing = yield from _match(book, missing, rows, gone, renewed)
        except (PFKeyError, OSError) as error:
            log.warning("the policies could not be read: %s", error)
            unread |= dict.fromkeys(missing, error)
            return unread
        # On FreeBSD an entry that is updated between the dump and the SPDGET has another id then.
        if not book.abi.update_changes_id:
            renewed.clear()
        for tracked in [one for one in missing if one not in renewed and (one.installed.policy_id or again)]:
            book.read(tracked, None)
            missing.remove(tracked)
    for tracked in missing:
        book.read(tracked, None)
    return unread


_DUMPS = 4
"""How often the policies are read in search of one that is listed, and then not known by that id any more."""


def _match(
    book: Book,
    missing: list[TrackedPolicy],
    rows: Rows,
    gone: dict[TrackedPolicy, set[int]],
    renewed: set[TrackedPolicy],
) -> Run[list[TrackedPolicy]]:
    """Find them among the rows of a dump, the newest first; entries that SPDGET does not know (marks) are not them.

    Ids that it does not know are added to `gone`, and who has one that was not in there to `renewed`.
    """
    wanted = {(int(one.direction), one.selector.identity): one for one in missing}
    candidates: list[tuple[TrackedPolicy, int]] = []
    for row in rows.numbers:
        tracked = wanted.get((row.direction, row.identity))
        if tracked is not None:
            candidates.append((tracked, row.id))
    candidates.sort(key=lambda candidate: candidate[1], reverse=True)
    found = yield from get(book, [policy_id for _, policy_id in candidates])
    done: set[TrackedPolicy] = set()
    for (tracked, policy_id), policy in zip(candidates, found, strict=True):
        if policy is None:
            if policy_id not in gone[tracked]:
                renewed.add(tracked)
                gone[tracked].add(policy_id)
        elif not isinstance(policy, Policy):
            raise policy
        elif tracked not in done and is_entry(tracked, policy):
            book.read(tracked, policy)
            done.add(tracked)
    return [tracked for tracked in missing if tracked not in done]


def get(book: Book, ids: Sequence[int]) -> Run[list[Policy | PFKeyError | None]]:
    """The policies with these ids; None for one that the kernel does not know."""
    if not ids:
        return []
    replies = yield Ask([get_message(book, policy_id) for policy_id in ids])
    results: list[Policy | PFKeyError | None] = []
    for reply in replies:
        if isinstance(reply, FileNotFoundError):
            results.append(None)
        else:
            results.append(reply if isinstance(reply, PFKeyError) else policy_from(reply))
    return results


def get_message(book: Book, policy_id: int) -> Message:
    """SPDGET: kernels look at the id alone, but want a direction and a type that exist."""
    extension = PolicyExtension(Action.IPSEC, book.abi.directions[-1], policy_id)
    return Message(MessageType.SPDGET, {ExtensionType.POLICY: extension}, abi=book.abi)
