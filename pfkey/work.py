"""One policy that is looked at, and the exchanges that carry its step out: what is sent, what an answer means.

Everything that needs I/O is a run, as reading.py has it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from .book import Book
from .codec import Message
from .constants import MessageType
from .errors import EncodeError, ForeignPolicy, KernelError, NotSupported, PFKeyError, SPDLocked
from .guards import Kind, read_tag
from .messages import Policy
from .reading import ENTER, GRACE, Ask, Run, Steps, dump
from .tracker import ABSENT, Image, Installed, State, Step, TrackedPolicy, Undo, image_text
from .typed import Stored, policy_message, stored_from

__all__ = [
    "MESSAGES",
    "Change",
    "StoredOtherwise",
    "Work",
    "by_rank",
    "drop_leftovers",
    "instead",
    "refused",
    "say_more",
    "standing_guards",
    "start",
    "take",
    "uncertain",
]

log = logging.getLogger("pfkey.keeper")

_PLAIN = 8
"""How much of a selector's identity there is without scopes."""


# What comes of it.


@dataclass(frozen=True, slots=True, repr=False)
class Change:
    """What one call did.

    `sent` holds the message sent for the policy itself, at most one, and is empty when nothing had to be sent.  `guard`
    holds the messages for its guard, usually none, and those that put other policies behind it again on kernels that
    order by insertion.  `avoided` is what a program that never compares would have sent, `reason` the rule behind it
    all, `warnings` what is wrong with the policy beside others.
    """

    sent: tuple[MessageType, ...] = ()
    guard: tuple[MessageType, ...] = ()
    avoided: tuple[MessageType, ...] = ()
    reason: str = ""
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        def names(kinds: tuple[MessageType, ...]) -> str:
            return "(" + ", ".join(kind.name for kind in kinds) + (",)" if len(kinds) == 1 else ")")

        return f"Change(sent={names(self.sent)}" + (f", guard={names(self.guard)})" if self.guard else ")")


UNCHANGED = "what the kernel holds is what the assignment on top asks for"
UNUSED = "nobody uses it and the kernel does not hold it"
LINGERS = "nobody uses it now; it stays for a while, in case somebody comes"
MESSAGES = {Step.ADD: MessageType.SPDADD, Step.UPDATE: MessageType.SPDUPDATE, Step.DELETE: MessageType.SPDDELETE}
REASONS = {
    MessageType.SPDADD: "the kernel held no policy",
    MessageType.SPDUPDATE: "what the assignment on top asks for differs from what the kernel holds",
    MessageType.SPDDELETE: "no assignment is left",
}


class StoredOtherwise(NotSupported):
    """The kernel accepted a policy and stored another."""


@dataclass(slots=True, eq=False)
class Work:
    """One policy that is looked at: what its list went through, what is to be done, what came of it."""

    tracked: TrackedPolicy
    undo: list[Undo] | None = None
    """What takes the caller's changes of the list back when the kernel refuses; None: they stay whatever it says."""
    avoided: tuple[MessageType, ...] = ()
    mover: bool = False
    """It is not to change, only to stand behind another (kernels that order by insertion)."""
    step: Step = Step.NOTHING
    policy: Policy | None = None
    """What is to be sent."""
    message: Message | None = None
    """The same as a message, where it was made to see whether it can be."""
    image: Image | None = None
    before: Installed = ABSENT
    """What the kernel held before this was sent."""
    why: str = ""
    """Why it is guarded."""
    claimed: Installed | None = None
    """What somebody else had in its place, or a former life, and what was to become ours."""
    existed: bool = False
    """The kernel said that the selector is taken."""
    is_behind: bool = False
    """It was refused for nothing but a guard that is in its way."""
    postponed: bool = False
    """Nothing was wrong with it, but with another one: it is its turn in the next round."""
    was_read: bool = False
    sent: list[MessageType] = field(default_factory=list)
    guards: list[MessageType] = field(default_factory=list)
    error: PFKeyError | None = None
    reason: str = ""
    """Why it was sent, where that is another one than that of its kind."""
    told: bool = False
    """The error says what became of the policy."""
    notes: list[str] = field(default_factory=list)
    warnings: tuple[str, ...] = ()

    @property
    def change(self) -> Change:
        """What the caller gets."""
        tracked = self.tracked
        if self.sent:
            reason = self.reason or REASONS[self.sent[-1]]
        elif len(tracked):
            reason = UNCHANGED
        elif tracked.troubles is not None and tracked.troubles.lingers_until is not None:
            reason = LINGERS
        else:
            reason = UNUSED
        notes = ["it was read"] if self.was_read else []
        if self.guards and self.why:
            notes.append(f"guarded: {self.why}")
        notes += self.notes
        if tracked.troubles is not None and tracked.troubles.contested:
            notes.append("contested: somebody else keeps changing it")
        if notes:
            reason += f" ({'; '.join(notes)})"
        avoided = () if self.sent else self.avoided
        return Change(tuple(self.sent[-1:]), (*self.sent[:-1], *self.guards), avoided, reason, self.warnings)

    def take_back(self) -> None:
        """Undo the caller's changes of the list, the last one first."""
        self.tracked.undo_all(self.undo or ())
        self.undo = None

    def fail(self, error: PFKeyError) -> None:
        """It could not be done; the first error is the one to tell, and whether it is a refusal decides on the list."""
        if self.error is None:
            self.error = error
        if refused(self.error) and self.step is not Step.DELETE:  # nobody uses it, whatever the kernel says to that
            self.take_back()


def say_more(error: PFKeyError, text: str) -> None:
    """Say more in an error that is on its way."""
    if isinstance(error, KernelError):
        error.strerror = f"{error.strerror}; {text}"
    else:
        error.args = (f"{error}; {text}", *error.args[1:])


def uncertain(error: PFKeyError) -> bool:
    """Whether the kernel may have done the work all the same."""
    return not isinstance(error, KernelError) or error.outcome_unknown


def refused(error: PFKeyError) -> bool:
    """Whether a caller may take it that an assignment was not recorded: nothing of it can be in the kernel."""
    if isinstance(error, KernelError):
        return not error.outcome_unknown
    return isinstance(error, NotSupported | EncodeError | ForeignPolicy | SPDLocked)


# Sending a step, and what the answer says.


def start(book: Book, work: Work) -> Message:
    """The SPDADD or SPDUPDATE.  Until it is acknowledged the kernel's side is not known, whatever interrupts us."""
    assert work.policy is not None
    kind = MESSAGES[work.step]
    (work.guards if work.mover or work.error is not None or kind in work.sent else work.sent).append(kind)
    message, work.message = work.message, None
    if message is None or message.type != kind:
        message = policy_message(kind, work.policy, book.abi)
    book.note(work.tracked, work.tracked.installed.doubted(tried=work.image))
    return message


def take(book: Book, work: Work, reply: Message | PFKeyError) -> None:
    """What the answer to it says of the kernel."""
    if not isinstance(reply, PFKeyError):
        _acknowledged(book, work, stored_from(reply))
    elif uncertain(reply):
        work.fail(reply)
    else:
        _rejected(book, work, reply)


def _acknowledged(book: Book, work: Work, echo: Stored) -> None:
    """The reply is the proof: what it echoes is compared with what was asked."""
    tracked, asked = work.tracked, work.image
    assert asked is not None
    image = book.row_image(echo, asked)
    indexed = tracked.indexed
    book.acknowledge(tracked, image, echo.id)
    if image != asked:
        log.warning("%s: asked for %s, the kernel stored %s", tracked, image_text(asked), image_text(image))
        work.fail(StoredOtherwise(f"{book.abi} stored {image_text(image)} for {tracked}, not {image_text(asked)}"))
        return
    if work.error is not None and isinstance(work.error, KernelError) and not uncertain(work.error):
        _tell_repair(work, f"{book.abi} removes the policy in that case; it has been put back")
    if tracked.indexed != indexed:
        work.warnings = book.warnings(tracked)
        for text in work.warnings:
            log.warning("%s", text)


def _rejected(book: Book, work: Work, error: PFKeyError) -> None:
    """What the kernel holds after it refused: a rejected SPDADD and most rejected updates change nothing."""
    tracked = work.tracked
    if work.error is not None and work.step is Step.ADD:
        _tell_repair(work, f"{book.abi} may remove the policy in that case, and putting it back failed too: {error}")
    if work.step is Step.ADD and isinstance(error, FileExistsError):
        # Somebody else was faster, or it is ours from a former life: it is read, and the table decides again.
        book.note(tracked, Installed(State.UNKNOWN))
        work.existed = True
        return
    if work.step is Step.ADD:
        book.note(tracked, ABSENT)
    elif not (book.abi.update_unlinks_first or book.abi.rejected_update_removes):
        book.note(tracked, work.before)
    work.fail(error)


def _tell_repair(work: Work, text: str) -> None:
    assert work.error is not None
    log.warning("%s; %s", work.error, text)
    say_more(work.error, text)
    work.told = True


# Guards that have done their duty.


def by_rank(work: Work) -> tuple[int, int]:
    """The order that policies ought to have; what nobody uses any more comes last."""
    rank = work.tracked.rank
    return 0xFFFFFFFF if rank is None else rank, work.tracked.installed.policy_id


def drop_leftovers(book: Book, works: Iterable[Work]) -> Steps:
    """Delete the guards of policies that stand as they should, or are wanted by nobody.

    Where order is by insertion one by one, the weakest first: each may hold the place of what stands behind it.
    """
    if not book.abi.has_priority:
        works = sorted(works, key=by_rank, reverse=True)
    going: list[tuple[Work, Policy]] = []
    for work in works:
        state = work.tracked.installed.state
        if state in (State.OURS, State.FOREIGN) or (state is State.ABSENT and not (len(work.tracked) or work.claimed)):
            going += [(work, guard) for guard in work.tracked.leftover]
    if not going:
        return
    yield ENTER
    going = yield from _known_to_stand(book, going)
    if book.abi.stronger_update_shows_none:
        yield GRACE
    if book.abi.has_priority:
        yield from _delete_guards(book, going)
        return
    for one in going:
        if not book.is_behind_weaker(one[0].tracked):
            yield from _delete_guards(book, [one])


def _delete_guards(book: Book, going: Sequence[tuple[Work, Policy]]) -> Steps:
    messages, doubted = [], []
    for work, guard in going:
        work.guards.append(MessageType.SPDDELETE)
        bare = Policy(guard.direction, guard.selector, guard.action)
        messages.append(policy_message(MessageType.SPDDELETE, bare, book.abi))
        # Until it is answered nobody knows whether it stands, whatever interrupts us: nothing may rely on it.
        doubted.append(replace(guard, id=0))
        instead(work.tracked, guard, doubted[-1])
    replies = yield Ask(messages)
    doubtful = [
        guard
        for (_, guard), reply in zip(going, replies, strict=True)
        if isinstance(reply, PFKeyError) and (uncertain(reply) or _says_absent(book, reply))
    ]
    standing = yield from standing_guards(book, doubtful)
    for (work, guard), doubt, reply in zip(going, doubted, replies, strict=True):
        stays = f"its guard {guard.selector} could not be deleted and stays until the next call: "
        work.notes = [note for note in work.notes if not note.startswith(stays)]  # of an attempt before
        gone = guard in doubtful and standing is not None and guard not in standing
        if gone or not isinstance(reply, PFKeyError):
            without(work.tracked, doubt)
            continue
        if standing is not None or guard not in doubtful:
            instead(work.tracked, doubt, guard)
        log.warning("the guard %s of %s could not be deleted: %s", guard.selector, work.tracked, reply)
        work.notes.append(f"{stays}{reply}")


def _says_absent(book: Book, error: PFKeyError) -> bool:
    """Whether it is what a kernel says of a policy that is not there: on FreeBSD EINVAL, which means more than that."""
    return isinstance(error, KernelError) and error.name == book.abi.absent_policy_error


def standing_guards(book: Book, doubtful: Sequence[Policy]) -> Run[list[Policy] | None]:
    """Which of these guards are in the kernel, after answers that left it open; None when it cannot be read."""
    if not doubtful:
        return []
    try:
        rows = yield from dump(book)
    except (PFKeyError, OSError) as error:
        log.warning("guards could not be looked for: %s", error)
        return None
    wanted = {(int(guard.direction), guard.selector.identity[:_PLAIN]) for guard in doubtful}
    found = [
        rows.policies[at] for at, row in enumerate(rows.numbers) if (row.direction, row.identity[:_PLAIN]) in wanted
    ]
    return [guard for guard in doubtful if any(_is_same(book, entry, guard) for entry in found)]


def _known_to_stand(book: Book, going: list[tuple[Work, Policy]]) -> Run[list[tuple[Work, Policy]]]:
    """Those without the ones whose SPDADD was never answered, and that are not there: others may have that selector."""
    if all(guard.id for _, guard in going):
        return going
    try:
        rows = yield from dump(book)
    except (PFKeyError, OSError) as error:
        for work, guard in going:
            if not guard.id:
                work.notes.append(f"whether its guard {guard.selector} stands could not be read: {error}")
        return [(work, guard) for work, guard in going if guard.id]
    tagged: dict[tuple[int, tuple[int, ...]], list[Policy]] = {}
    for at, row in enumerate(rows.numbers):
        tag = read_tag(row.lifetime_hard, book.abi)
        if tag is not None and tag.kind is not Kind.POLICY:
            tagged.setdefault((row.direction, row.identity[:_PLAIN]), []).append(rows.policies[at])
    standing = []
    for work, guard in going:
        entries = tagged.get((int(guard.direction), guard.selector.identity[:_PLAIN]), ())
        entry = next((entry for entry in entries if _is_same(book, entry, guard)), None)
        if guard.id:
            standing.append((work, guard))
        elif entry is None:
            without(work.tracked, guard)
        else:  # its id tells where it stands
            confirmed = replace(guard, id=entry.id)
            instead(work.tracked, guard, confirmed)
            standing.append((work, confirmed))
    return standing


def _is_same(book: Book, entry: Policy, guard: Policy) -> bool:
    """Whether an entry of the kernel is this guard, by its selector to the last bit and by its tag."""
    is_ours = read_tag(entry.lifetime_hard, book.abi) == read_tag(guard.lifetime_hard, book.abi)
    return is_ours and entry.direction == guard.direction and entry.selector == guard.selector


def instead(tracked: TrackedPolicy, guard: Policy, other: Policy) -> None:
    """The same guard, of which something else is known now; without an id, whether it stands is not."""
    tracked.leftover = tuple(other if one is guard else one for one in tracked.leftover)


def without(tracked: TrackedPolicy, guard: Policy) -> None:
    """This guard is not in the kernel any more."""
    tracked.leftover = tuple(one for one in tracked.leftover if one is not guard)
