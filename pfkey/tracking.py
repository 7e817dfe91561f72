"""The calls of a tracker, as runs that the blocking and the asyncio face carry out: who works on which policy when.

A policy is held by one call at a time, by its `busy`.  Everything between two effects is one step: the blocking face
takes its lock for it, an event loop is never between.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from .abi import Abi
from .assignment import Assignment
from .book import Book, Settings
from .codec import Message
from .constants import Action, Direction
from .errors import NotTracked, PFKeyError
from .explain import Explanation, explain, unknown
from .messages import Policy, Selector
from .reading import IDLE, Run, Steps, get, is_entry, read
from .resync import Difference, resync, sweep
from .settle import settle
from .tracker import State, TrackedPolicy
from .uses import (
    POSTPONED,
    Transaction,
    change_of,
    close_error,
    let_linger,
    lingers_until,
    say_outcome,
    shift,
    state_text,
)
from .watch import concerned, heal
from .work import Change, Work

if TYPE_CHECKING:
    from .watch import Healing

__all__ = ["Tracking"]

log = logging.getLogger("pfkey.keeper")

T = TypeVar("T")


class Tracking:
    """What both faces of a tracker have in common.

    `me` in the calls below is who calls: a thread, a task.  `released` is set when a policy was let go, so that those
    who wait (IDLE) may look again.
    """

    def __init__(self, abi: Abi, check_policy: Callable[[Policy], None], settings: Settings) -> None:
        self.abi = abi
        self.book = Book(abi, check_policy, settings)
        self.transactions: dict[object, Transaction] = {}
        self.released = False

    # One policy.

    def quick(
        self, me: object, direction: Direction, selector: Selector, old: Assignment | None, new: Assignment | None
    ) -> Change | None:
        """A call that the kernel need not hear of now; None, and nothing was changed, when it takes a run."""
        book = self.book
        if selector.icmp_type == 0:
            return None
        if self.transactions and (transaction := self.transactions.get(me)) is not None:
            own = book.open(direction, selector)
            is_free = own.busy is None or own.busy is transaction
            return self._postpone(transaction, own, old, new) if is_free else None
        tracked = book.get(direction, selector)
        if tracked is None or tracked.busy is not None:
            return None
        top = tracked.top
        steps = shift(book, tracked, old, new)
        change = change_of(book, tracked, top)
        if change is None:
            tracked.undo_all(steps)
        elif not len(tracked):
            book.close(tracked)
        return change

    def call(
        self, me: object, direction: Direction, selector: Selector, old: Assignment | None, new: Assignment | None
    ) -> Run[Change]:
        """Take `old` out of a policy's list, put `new` in, and follow the table; or note it for a transaction's end."""
        book, transaction = self.book, self.transactions.get(me)
        if selector.icmp_type == 0:  # it has the identity of another one: any type
            book.check_policy(Policy(direction, selector, Action.NONE))
        tracked = yield from self._open(direction, selector, transaction)
        if transaction is not None:
            return self._postpone(transaction, tracked, old, new)
        top = tracked.top
        try:
            steps = shift(book, tracked, old, new)
        except BaseException:
            book.close(tracked)
            raise
        change = change_of(book, tracked, top)
        if change is not None:
            book.close(tracked)
            return change
        work = Work(tracked, steps if new is not None else None)
        yield from self._working(tracked, work, settle(book, (work,)))
        if work.error is not None:
            say_outcome(work)
            raise work.error from work.error.__cause__
        return work.change

    def _postpone(
        self, transaction: Transaction, tracked: TrackedPolicy, old: Assignment | None, new: Assignment | None
    ) -> Change:
        """Note it for the end of the transaction."""
        tracked.busy = transaction
        try:
            transaction.touch(self.book, tracked, old, new)
        except BaseException:
            if tracked not in transaction:
                tracked.busy = None
                self.book.close(tracked)
            raise
        return POSTPONED

    def query(self, me: object, direction: Direction, selector: Selector) -> Run[Policy]:
        """The policy as the kernel shows it."""
        book = self.book
        book.must_support(direction)
        holder = self.transactions.get(me) or object()
        tracked = yield from self._open(direction, selector, holder)
        shown = _shown(book, tracked)
        return (yield from shown if tracked.busy is holder else self._working(tracked, holder, shown))

    def heal(self, message: Message) -> Run[Healing | None]:
        """See to the policy that an event is about."""
        while (tracked := concerned(self.book, message)) is not None and tracked.busy is not None:
            yield IDLE
        if tracked is None:
            return None
        return (yield from self._working(tracked, message, heal(self.book, tracked, message, time.monotonic())))

    # Many.

    def begin(self, me: object, *, is_sweep: bool) -> Transaction:
        """Calls of `me` belong to a transaction from now on; one transaction at a time."""
        if is_sweep and not self.book.settings.named:
            raise ValueError("a sweep needs a tracker with an owner: PolicyTracker(kernel, owner='a name')")
        transaction = self.transactions[me] = Transaction(sweep=is_sweep)
        return transaction

    def join(self, me: object) -> Transaction | None:
        """The transaction that `me` has begun already."""
        return self.transactions.get(me)

    def roll_back(self, me: object) -> None:
        """An exception came out of it: every list is what it was."""
        transaction = self.transactions[me]
        for _ in self._ending(transaction, _taken_back(transaction), me):
            pass

    def commit(self, me: object) -> Steps:
        """Carry a transaction out.  When it is interrupted before it begins, `me` still is in it, to be rolled back."""
        transaction = self.transactions[me]
        yield from self._ending(transaction, self._commit(transaction), me)

    def _commit(self, transaction: Transaction) -> Steps:
        if transaction.sweep:
            try:
                yield from self._sweep(transaction)
            except BaseException:  # Ctrl-C, a cancelled task: nothing was sent for the lists yet
                transaction.roll_back()
                raise
        works = transaction.works(self.book)
        if works:
            yield from settle(self.book, works)
        transaction.finish(works)

    def _sweep(self, transaction: Transaction) -> Steps:
        """Take in what nobody wants; when it cannot be looked for, the rest is carried out, and the error told then."""
        try:
            taken = yield from sweep(self.book, set(transaction))
        except (PFKeyError, OSError) as error:
            transaction.not_swept = error
            return
        for tracked in taken:
            # A call that came to it meanwhile sees to it, and may wait for the writers' lock, which is ours now.
            if tracked.busy is None or tracked.busy is transaction:
                transaction.hold(tracked)
                tracked.busy = transaction

    def flush(self) -> Run[tuple[Change, ...]]:
        """Delete whatever is tracked."""
        mine = Transaction(sweep=False)
        return (yield from self._ending(mine, self._flush(mine)))

    def _flush(self, mine: Transaction) -> Run[tuple[Change, ...]]:
        works: list[Work] = []
        yield from self._seize_all(mine)
        for tracked in mine:
            tracked.clear()
            tracked.troubles = None
            works.append(Work(tracked))
        yield from settle(self.book, works)
        close_error(works, "could not be deleted")
        return tuple(work.change for work in works)

    def resync(self, *, by_hand: bool = True) -> Run[tuple[Difference, ...]]:
        """Compare all with the kernel and put right what differs."""
        mine = Transaction(sweep=False)
        return (yield from self._ending(mine, self._resync(mine, by_hand=by_hand)))

    def _resync(self, mine: Transaction, *, by_hand: bool) -> Run[tuple[Difference, ...]]:
        yield from self._seize_all(mine)
        return (yield from resync(self.book, list(mine), by_hand=by_hand))

    def end_lingering(self, now: float | None) -> Steps:
        """Delete what has lingered long enough (monotonic seconds); with None all that lingers.

        What could not be deleted lingers once more, for no other call may come for it.
        """
        mine = Transaction(sweep=False)
        yield from self._ending(mine, self._end_lingering(mine, now))

    def _end_lingering(self, mine: Transaction, now: float | None) -> Steps:
        works: list[Work] = []
        # Nothing is held while another is waited for: a transaction may hold that one, and come to ask for this one.
        while (due := self._due(now)) and (any if now is None else all)(tracked.busy is not None for tracked in due):
            yield IDLE
        try:
            for tracked in due:
                if tracked.busy is not None:
                    continue  # the timer is set again for it
                mine.hold(tracked)
                tracked.busy = mine
                if tracked.troubles is not None:
                    tracked.troubles.lingers_until = None
                if not len(tracked):
                    works.append(Work(tracked))
            if works:
                yield from settle(self.book, works)
            close_error(works, "could not be deleted after lingering")
        finally:
            for work in works:
                if now is not None and not len(work.tracked) and not work.tracked.holds_top():
                    let_linger(self.book, work.tracked)

    def _due(self, now: float | None) -> list[TrackedPolicy]:
        """What has lingered long enough."""
        ends = ((tracked, lingers_until(tracked)) for tracked in self.book.lingering)
        return [tracked for tracked, end in ends if end is not None and (now is None or end <= now)]

    def next_end(self) -> float | None:
        """When the first of those that linger has to go (monotonic seconds); None when none does."""
        waiting = self.book.lingering
        while waiting:
            tracked = next(iter(waiting))
            end = lingers_until(tracked)
            if end is not None:
                return end
            del waiting[tracked]  # it is used again, or has gone
        return None

    # Looking.

    def find(self, policy_id: int) -> tuple[Direction, Selector] | None:
        """Which policy has this id."""
        tracked = self.book.ids.get(policy_id) if policy_id else None
        return None if tracked is None else (tracked.direction, tracked.selector)

    def explain(self, direction: Direction, selector: Selector) -> Explanation:
        """What is known, and what follows."""
        self.book.must_support(direction)
        tracked = self.book.get(direction, selector)
        if tracked is None:
            return unknown(TrackedPolicy(direction, selector, self.abi))
        return explain(self.book, tracked)

    def assignments(self, direction: Direction, selector: Selector) -> tuple[Assignment, ...]:
        """What uses a policy."""
        tracked = self.book.get(direction, selector)
        return () if tracked is None else tracked.assignments

    def policies(self) -> tuple[tuple[Direction, Selector], ...]:
        """All that are tracked."""
        return tuple((tracked.direction, tracked.selector) for tracked in self.book)

    # Holding and letting go.

    def _open(self, direction: Direction, selector: Selector, holder: object) -> Run[TrackedPolicy]:
        """The policy, when nobody else works on it."""
        while True:
            tracked = self.book.open(direction, selector)
            if tracked.busy is None or tracked.busy is holder:
                return tracked
            yield IDLE

    def _seize_all(self, holder: Transaction) -> Steps:
        for tracked in list(self.book):
            while tracked.busy is not None:
                yield IDLE
            if self.book.get(tracked.direction, tracked.selector) is tracked:  # it may have ended meanwhile
                holder.hold(tracked)
                tracked.busy = holder

    def _working(self, tracked: TrackedPolicy, holder: object, steps: Run[T]) -> Run[T]:
        """Hold a policy for these steps."""
        held = (tracked,)
        try:
            tracked.busy = holder
            return (yield from steps)
        finally:
            interrupt: KeyboardInterrupt | None = None
            while True:
                try:
                    self._release(held)
                    break
                except KeyboardInterrupt as error:
                    interrupt = error
            if interrupt is not None:
                raise interrupt

    def _ending(self, transaction: Transaction, steps: Run[T], me: object = None) -> Run[T]:
        """Carry these steps out, and let go of what the transaction (that of `me`) holds.

        An interrupt (Ctrl-C) meanwhile comes afterwards, or others would wait for the rest for ever.  The interpreter
        looks for signals when a function is called, begins, or a loop begins again: between the end of the steps and
        the inner `try` there is no such place, and in the latter an interrupt only makes it begin anew.
        """
        try:
            self.transactions.pop(me, None)
            return (yield from steps)
        finally:
            interrupt: KeyboardInterrupt | None = None
            while True:
                try:
                    self._release(transaction)
                    break
                except KeyboardInterrupt as error:
                    interrupt = error
            if interrupt is not None:
                raise interrupt

    def _release(self, held: Iterable[TrackedPolicy]) -> None:
        """Let go of all; nobody else looks before it is done, so that it may be begun again when it was interrupted."""
        self.released = True
        for tracked in held:
            tracked.busy = None
            self.book.close(tracked)

    def must_be_free(self, me: object, what: str) -> None:
        """Raise when `me` is in a transaction, whose end a call of this kind would wait for."""
        if me in self.transactions:
            raise PFKeyError(f"{what} within a transaction would wait for its own end; call it before or after")


def _taken_back(transaction: Transaction) -> Steps:
    transaction.roll_back()
    yield from ()


def _shown(book: Book, tracked: TrackedPolicy) -> Run[Policy]:
    """The policy as the kernel shows it; NotTracked when it is not tracked, or the kernel has it no more."""
    if tracked.top is None and tracked.installed.state is State.ABSENT:
        raise NotTracked(f"{tracked} is not tracked")
    policy = yield from _sought(book, tracked)
    if policy is None:
        raise NotTracked(f"{tracked} is not in the kernel; {state_text(tracked)}")
    return policy


def _sought(book: Book, tracked: TrackedPolicy) -> Run[Policy | None]:
    """The policy as the kernel shows it, None when it has it no more."""
    for _ in range(2):
        if tracked.installed.state is State.UNKNOWN or not tracked.installed.policy_id:
            unread = yield from read(book, [tracked])
            if tracked in unread:
                raise unread[tracked]
        number = tracked.installed.policy_id
        (found,) = (yield from get(book, [number])) if number else (None,)
        if isinstance(found, PFKeyError):
            raise found
        if found is not None and is_entry(tracked, found):
            return found
        if tracked.installed.state in (State.ABSENT, State.FOREIGN):
            return None
        book.note(tracked, tracked.installed.doubted())
    return None
