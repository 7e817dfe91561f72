"""Brings a kernel to what the tracked policies ask for, in rounds of three barriers.

1. Guards of the updates that need one.
2. New policies, then updates, of either first those that protect; an update only when its guard stands.
3. After a pause where packets under way must get through: the guards go, and the policies that nobody uses.

What a rejection leaves behind is read and repaired in another round.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from .book import Book, Ownership
from .constants import Action, MessageType
from .errors import EncodeError, ForeignPolicy, KernelError, NotSupported, PFKeyError, ReplyTimeout
from .guarding import stand_guards
from .messages import Policy
from .overlaps import overlap
from .reading import ENTER, Ask, Run, Steps, policy_of, read
from .recovery import AT_WORK, recover
from .reorder import left_beside, moves, needs_order, reorder, tidy
from .tracker import Installed, State, Step, TrackedPolicy, decide, image_text
from .typed import policy_message
from .work import MESSAGES, StoredOtherwise, Work, by_rank, drop_leftovers, start, take, uncertain

__all__ = ["settle"]

log = logging.getLogger("pfkey.keeper")

_AT_ONCE = 512
"""How many policies are sent at a time: what the bytes and the answers take is used again for the next."""
_ROUNDS = 4
"""Once as asked; once to read what an SPDADD met, or to repair what a rejection left; the rest for what comes then."""


def settle(book: Book, works: Sequence[Work]) -> Steps:
    """Follow the table for each policy until nothing is left to do; errors end up in the works.

    BaseExceptions of whoever runs this (KeyboardInterrupt, a cancelled task) come out of it, after guards that stand
    have been seen to.
    """
    AT_WORK.add(book)
    try:
        is_first = not book.recovered and time.monotonic() >= book.recover_after
        if book.abi.one_writer or is_first:
            yield ENTER
        if is_first:
            yield from recover(book, {work.tracked for work in works})
        for work in works:
            book.remember(work.tracked, was_just_read=is_first)
        yield from _rounds(book, works)
    except PFKeyError as error:  # the SPD is locked, or could not be
        for work in works:
            if work.sent and work.tracked.holds_top():
                continue
            if work.sent and work.tracked.installed.state is State.UNKNOWN:
                work.undo = None  # whatever was sent may have been done
            work.fail(error)
            work.take_back()
    except GeneratorExit:
        raise
    except BaseException:
        guarded = [Work(work.tracked, claimed=work.claimed) for work in works if work.tracked.leftover]
        if guarded:
            log.warning("interrupted while guards stand; they are seen to first")
            try:
                yield from _rounds(book, guarded)
            except PFKeyError as error:  # the SPD is locked; it is the interrupt that is to be told
                log.warning("the guards stay until the next call: %s", error)
        raise
    finally:
        AT_WORK.discard(book)
        for work in works:
            _give_back(book, work)


def _give_back(book: Book, work: Work) -> None:
    """A policy that was to become ours, and did not, is its owner's as it was."""
    tracked, installed, claimed = work.tracked, work.tracked.installed, work.claimed
    if claimed is None or claimed.state is State.OURS or len(tracked):
        return
    if installed.state is State.OURS and installed.image == claimed.image:
        book.note(tracked, Installed(State.FOREIGN, installed.image, installed.policy_id))


def _rounds(book: Book, works: Sequence[Work]) -> Steps:
    pending = list(works)
    beside: list[Work] = []
    for _ in range(_ROUNDS):
        others = yield from _round(book, pending)
        beside += others
        asked = {work.tracked for work in works}
        for work in pending:
            _let_try_again(book, work)
        pending = [work for work in [*pending, *others] if _needs_another(work) or (beside and _is_upset(book, work))]
        pending = [work for work in pending if not (work.mover and work.tracked in asked)]
        if not pending:
            break
        taken = [work for work in pending if work.existed]
        put_off = [work for work in pending if work.postponed]
        for work in pending:
            work.existed = work.postponed = False
    else:
        _tell_invisible(taken)
        _tell_put_off(put_off)
    if beside and works:
        _account(book, works, beside)


def _tell_invisible(works: Sequence[Work]) -> None:
    """The kernel said to the last that their selectors are taken, and no read shows by what."""
    for work in works:
        if work.error is None and not work.tracked.holds_top():
            work.fail(
                ForeignPolicy(
                    f"{work.tracked} was not installed: {work.tracked.abi} answers SPDADD as if it were there (EEXIST),"
                    " and no dump shows it; what PF_KEY does not show may hold the selector (an interface's policy, one"
                    " that is about to go), or somebody adds and deletes it all the time"
                )
            )


def _tell_put_off(works: Sequence[Work]) -> None:
    """It was their turn in the next round each time, and there is none any more."""
    for work in works:
        if work.error is None and not work.tracked.holds_top():
            work.fail(PFKeyError(f"{work.tracked} was not changed: others were in its way; the next call tries again"))


def _account(book: Book, works: Sequence[Work], beside: Sequence[Work]) -> None:
    """What was sent for others that had to be moved counts for the first; what is not in order yet is told."""
    for other in beside:
        works[0].guards += [*other.sent, *other.guards]
    error = next((other.error for other in beside if other.error is not None), None)
    for work in works:
        if work.error is None and error is not None and book.is_out_of_order(work.tracked):
            text = f"{work.tracked} stands in front of a stronger policy, and could not be moved behind it: so it stays"
            if book.is_behind_weaker(work.tracked):
                text = f"{work.tracked} stands, but weaker ones could not be moved behind it; a guard holds its place"
            failure = PFKeyError(f"{text} until the next call: {error}")
            failure.__cause__ = error
            work.fail(failure)


def _is_upset(book: Book, work: Work) -> bool:
    """On a kernel that orders by insertion: whether a move left it behind something weaker, or a guard of it."""
    return book.is_behind_weaker(work.tracked) or bool(work.tracked.leftover)


def _let_try_again(book: Book, work: Work) -> None:
    """A guard was in its way, and has gone since: that is no error any more."""
    if not work.is_behind:
        return
    near = [work.tracked]
    if not book.abi.has_priority:
        near += book.indexes[int(work.tracked.direction)].overlapping(work.tracked)
    if not any(other.leftover for other in near):
        work.error, work.is_behind, work.postponed = None, False, True


def _needs_another(work: Work) -> bool:
    """Whether something is left to do that the next call should not have to.

    What is unknown for want of an answer is left to the next call, unless a guard stands for it.
    """
    tracked, error = work.tracked, work.error
    if work.existed or work.postponed:
        return True
    if error is None:
        return False
    if isinstance(error, StoredOtherwise):
        return not tracked.holds_top()
    in_doubt = tracked.installed.state is State.UNKNOWN
    if tracked.leftover and work.step is Step.UPDATE:
        return True
    return in_doubt and isinstance(error, KernelError) and not error.outcome_unknown


def _round(book: Book, works: Sequence[Work]) -> Run[list[Work]]:
    """Read what is not known, decide, and carry out; what had to be moved behind is returned."""
    yield from _look(book, works)
    for work in works:
        if work.step in MESSAGES:
            _prepare(book, work)
    adding = [work for work in works if work.step in (Step.ADD, Step.UPDATE)]
    beside: list[Work] = []
    if not book.abi.has_priority:
        beside = left_beside(book, works)
        if beside or any(work.tracked.leftover for work in works):
            yield from tidy(book, works, beside)
            adding = [work for work in works if work.step in (Step.ADD, Step.UPDATE)]
        movers = moves(book, [*works, *beside])
        if movers or needs_order(book, adding):
            yield from reorder(book, [*adding, *movers])
            adding = []
        beside += movers
    yield from stand_guards(book, adding)
    yield from _install(book, adding)
    yield from _remove(book, works, beside)
    return beside


# Reading, and the table.


def _look(book: Book, works: Sequence[Work]) -> Steps:
    doubtful: list[TrackedPolicy] = []
    for work in works:
        installed = work.tracked.installed
        if installed.state is State.FOREIGN:  # its owner may have deleted it since
            book.note(work.tracked, Installed(State.UNKNOWN, None, installed.policy_id))
        if work.tracked.installed.state is State.UNKNOWN:
            doubtful.append(work.tracked)
    unread: dict[TrackedPolicy, BaseException] = {}
    if doubtful:
        unread = yield from read(book, doubtful)
    seen = set(doubtful) - unread.keys()
    for work in works:
        work.was_read |= work.tracked in seen
        work.step = _decide(book, work, unread.get(work.tracked))


def _decide(book: Book, work: Work, unread: BaseException | None) -> Step:
    tracked = work.tracked
    if unread is not None:
        return _unread(work, unread)
    step = decide(tracked.desired, tracked.installed)
    if step is Step.REFUSE:
        return _claim(book, work)
    if tracked.installed.state is State.OURS and book.is_lent(tracked):
        work.claimed = work.claimed or tracked.installed
    if work.claimed is not None and tracked.top is None:
        return Step.ADD if tracked.installed.state is State.ABSENT else Step.NOTHING
    if step is Step.DELETE and tracked.troubles is not None and tracked.troubles.lingers_until is not None:
        return Step.NOTHING
    return step


def _unread(work: Work, why: BaseException) -> Step:
    """What may be done although reading failed too: an update of what was ours, never a deletion."""
    tracked = work.tracked
    if work.existed:
        work.fail(
            ForeignPolicy(
                f"{tracked} is in the kernel already, and whose it is could not be read ({why}); it was left alone"
            )
        )
    elif tracked.top is not None and tracked.installed.was_ours and work.error is None:
        return Step.UPDATE
    else:
        work.fail(
            PFKeyError(
                f"what the kernel holds for {tracked} is not known and could not be read ({why}); nothing was sent,"
                " the next call reads it again"
            )
        )
    return Step.NOTHING


def _claim(book: Book, work: Work) -> Step:
    """Somebody else's policy is in our place: the ownership choice."""
    tracked, installed = work.tracked, work.tracked.installed
    if book.settings.ownership is Ownership.REFUSE:
        held = image_text(installed.image)
        work.fail(
            ForeignPolicy(
                f"{tracked} belongs to somebody else (the kernel holds {held}); it was left alone. Delete it first if"
                " it is not needed, use another selector, or let the tracker adopt it",
                policy=policy_of(tracked, installed.image, installed.policy_id),
            )
        )
        return Step.NOTHING
    log.warning("%s was somebody else's (%s) and is ours from now on", tracked, image_text(installed.image))
    work.claimed = installed
    book.note(tracked, Installed(State.OURS, installed.image, installed.policy_id, was_ours=True))
    work.notes.append("it was somebody else's")
    if book.settings.ownership is Ownership.TAKE_OVER:
        if installed.image == tracked.desired:
            work.reason = "it is what the assignment on top asks for, and the update puts our tag on it"
        return Step.UPDATE
    return decide(tracked.desired, tracked.installed)


def _prepare(book: Book, work: Work) -> None:
    """What exactly is to be sent; refuse what the kernel would reject or store as something else."""
    tracked = work.tracked
    work.before = tracked.installed
    if work.step is Step.DELETE:
        image = tracked.installed.image
        work.policy = Policy(tracked.direction, tracked.selector, image.action if image else Action.NONE)
        return
    top = tracked.top
    if top is None:  # somebody else's or of a former life: a rejected update of ours removed it
        assert work.claimed is not None
        work.policy, work.image = policy_of(tracked, work.claimed.image), work.claimed.image
        if work.policy is not None and work.claimed.state is State.OURS:
            work.policy = book.tagged(work.policy)
        return
    work.policy, work.image = tracked.policy(top, book.tag), tracked.image(top)
    try:
        book.check_policy(work.policy)
        work.message = policy_message(MESSAGES[work.step], work.policy, book.abi)
    except (NotSupported, EncodeError) as error:
        work.fail(error)
        work.step = Step.NOTHING


# The second barrier: what is to stand.


def _protects(work: Work) -> bool:
    """Its policy holds packets back, or secures them."""
    return work.policy is not None and work.policy.action != Action.NONE


def _install(book: Book, works: Sequence[Work]) -> Steps:
    """Send SPDADDs and SPDUPDATEs, and take the answers in."""
    ready = [work for work in works if work.step in (Step.ADD, Step.UPDATE)]
    if not ready:
        return
    if book.abi.has_priority:
        ready.sort(key=lambda work: (not _protects(work), work.step is Step.UPDATE))
    else:
        ready.sort(key=by_rank)
    count = _AT_ONCE
    while ready:
        some, ready = ready[:count], ready[count:]
        replies = yield Ask([start(book, work) for work in some])
        for work, reply in zip(some, replies, strict=True):
            take(book, work, reply)
        if all(isinstance(reply, ReplyTimeout) for reply in replies):
            count = len(ready)  # nobody answers, and each part would be waited for


# The third barrier: what is to go.


def _remove(book: Book, works: Sequence[Work], beside: Sequence[Work]) -> Steps:
    """Delete guards whose policy stands, and policies that nobody uses."""
    once = {work.tracked: work for work in [*beside, *works]}
    yield from drop_leftovers(book, once.values())
    going = [work for work in works if work.step is Step.DELETE and work.tracked.installed.state is State.OURS]
    failed = [work for work in works if work.error is not None and work.step is not Step.DELETE]
    if failed:
        going = [work for work in going if not _has_to_stay(work, failed)]
    if not going:
        return
    going.sort(key=_protects)
    messages = []
    for work in going:
        work.sent.append(MessageType.SPDDELETE)
        assert work.policy is not None
        work.before = work.tracked.installed
        book.note(work.tracked, work.before.doubted())
        messages.append(policy_message(MessageType.SPDDELETE, work.policy, book.abi))
    replies = yield Ask(messages)
    rejected: list[Work] = []
    for work, reply in zip(going, replies, strict=True):
        if not isinstance(reply, PFKeyError):
            book.read(work.tracked, None)
            continue
        work.fail(reply)
        if not uncertain(reply):
            rejected.append(work)
    if rejected:
        yield from _not_deleted(book, rejected)


def _not_deleted(book: Book, works: Sequence[Work]) -> Steps:
    """FreeBSD answers EINVAL for more than an absent policy: it is absent when a read says so."""
    name = book.abi.absent_policy_error
    absent = [work for work in works if isinstance(work.error, KernelError) and work.error.name == name]
    unread = (yield from read(book, [work.tracked for work in absent])) if absent else {}
    for work in works:
        if work in absent and work.tracked not in unread and work.tracked.installed.state is not State.OURS:
            log.warning("%s was already gone from the kernel when it was to be deleted", work.tracked)
            work.error = None
        else:
            book.note(work.tracked, work.before)


def _has_to_stay(work: Work, failed: Sequence[Work]) -> bool:
    """Whether a policy must stay because what was to take its packets over did not come to stand."""
    for other in failed:
        if other.tracked.direction != work.tracked.direction or other.tracked.installed.state is State.OURS:
            continue
        if overlap(other.tracked.selector, work.tracked.selector):
            work.fail(
                PFKeyError(
                    f"{work.tracked} was not deleted: {other.tracked}, which was to take its packets over, could not be"
                    " installed; it stays until the next call for it, or flush()"
                )
            )
            return True
    return False
