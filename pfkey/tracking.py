"""The calls of a tracker, as runs that the blocking and the asyncio face carry out: who works on which policy when.

A policy is held by one call at a time, by its `busy`.  Everything between two effects is one step: the blocking face
takes its lock for it, an event loop is never between.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from .abi import Abi
from .assignment import Assignment
from .book import Book, Settings
from .codec import Message
from .constants import Action, Direction
from .errors import NotTracked, PFKeyError
from .explain import Explanation, explain
from .messages import Policy, Selector
from .reading import IDLE, Run, Steps, get, is_entry, read
from .resync import Difference, resync, sweep
from .settle import settle
from .tracker import State, TrackedPolicy
from .uses import POSTPONED, Transaction, change_of, close_error, let_linger, lingers_until, shift, state_text
from .watch import concerned, heal
from .work import Change, Work

if TYPE_CHECKING:
    from .watch import Healing

__all__ = ["Tracking"]

log = logging.getLogger("pfkey.keeper")


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
        self, direction: Direction, selector: Selector, old: Assignment | None, new: Assignment | None
    ) -> Change | None:
        """A call that the kernel need not hear of; None, and nothing was changed, when it takes a run."""
        book = self.book
        tracked = book.get(direction, selector)
        if tracked is None or tracked.busy is not None or selector.icmp_type == 0:
            return None
        top = tracked.top
        steps = shift(book, tracked, old, new)
        change = change_of(book, tracked, top)
        if change is None:
            for step in reversed(steps):
                tracked.undo(step)
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
            try:
                transaction.touch(book, tracked, old, new)
            except BaseException:
                if tracked not in transaction:
                    book.close(tracked)
                raise
            tracked.busy = transaction
            return POSTPONED
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
        tracked.busy = work
        try:
            yield from settle(book, (work,))
        finally:
            self._let_go(tracked)
        if work.error is not None:
            raise work.error from work.error.__cause__
        return work.change

    def query(self, me: object, direction: Direction, selector: Selector) -> Run[Policy]:
        """The policy as the kernel shows it."""
        book = self.book
        book.must_support(direction)
        holder = self.transactions.get(me) or object()
        tracked = yield from self._open(direction, selector, holder)
        before, tracked.busy = tracked.busy, holder
        try:
            if tracked.top is None and tracked.installed.state is State.ABSENT:
                raise NotTracked(f"{tracked} is not tracked")
            policy = yield from _shown(book, tracked)
            if policy is None:
                raise NotTracked(f"{tracked} is not in the kernel; {state_text(tracked)}")
            return policy
        finally:
            tracked.busy = before
            if before is None:
                self._let_go(tracked)

    def heal(self, message: Message) -> Run[Healing | None]:
        """See to the policy that an event is about."""
        while (tracked := concerned(self.book, message)) is not None and tracked.busy is not None:
            yield IDLE
        if tracked is None:
            return None
        tracked.busy = message
        try:
            return (yield from heal(self.book, tracked, message, time.monotonic()))
        finally:
            self._let_go(tracked)

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
        transaction = self.transactions.pop(me)
        transaction.roll_back()
        self._end(transaction)

    def commit(self, me: object) -> Steps:
        """Carry a transaction out."""
        transaction, book = self.transactions.pop(me), self.book
        try:
            if transaction.sweep:
                try:
                    yield from self._sweep(transaction)
                except BaseException:  # Ctrl-C, a cancelled task: nothing was sent for the lists yet
                    transaction.roll_back()
                    raise
            works = transaction.works(book)
            if works:
                yield from settle(book, works)
            transaction.finish(works)
        finally:
            self._end(transaction)

    def _sweep(self, transaction: Transaction) -> Steps:
        """Take in what nobody wants; when it cannot be looked for, the rest is carried out, and the error told then."""
        try:
            taken = yield from sweep(self.book, set(transaction))
        except (PFKeyError, OSError) as error:
            transaction.not_swept = error
            return
        for tracked in taken:
            yield from self._seize(tracked, transaction)

    def flush(self) -> Run[tuple[Change, ...]]:
        """Delete whatever is tracked."""
        mine = Transaction(sweep=False)
        works: list[Work] = []
        try:
            yield from self._seize_all(mine)
            for tracked in mine:
                tracked.clear()
                tracked.troubles = None
                works.append(Work(tracked))
            yield from settle(self.book, works)
            close_error(works, "could not be deleted")
            return tuple(work.change for work in works)
        finally:
            self._end(mine)

    def resync(self, *, by_hand: bool = True) -> Run[tuple[Difference, ...]]:
        """Compare all with the kernel and put right what differs."""
        mine = Transaction(sweep=False)
        try:
            yield from self._seize_all(mine)
            return (yield from resync(self.book, list(mine), by_hand=by_hand))
        finally:
            self._end(mine)

    def end_lingering(self, now: float | None) -> Steps:
        """Delete what has lingered long enough (monotonic seconds); with None all that lingers.

        What could not be deleted lingers once more, for no other call may come for it.
        """
        mine = Transaction(sweep=False)
        works: list[Work] = []
        try:
            for tracked in list(self.book.lingering):
                end = lingers_until(tracked)
                if end is None or (now is not None and end > now):
                    continue
                yield from self._seize(tracked, mine)
                end = lingers_until(tracked)
                if end is None or len(tracked) or tracked.troubles is None or (now is not None and end > now):
                    continue
                tracked.troubles.lingers_until = None
                works.append(Work(tracked))
            if works:
                yield from settle(self.book, works)
            close_error(works, "could not be deleted after lingering")
        finally:
            for work in works:
                if now is not None and not len(work.tracked) and not work.tracked.holds_top():
                    let_linger(self.book, work.tracked)
            self._end(mine)

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
        return explain(self.book, TrackedPolicy(direction, selector, self.abi) if tracked is None else tracked)

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

    def _seize(self, tracked: TrackedPolicy, holder: Transaction) -> Steps:
        while tracked.busy is not None and tracked.busy is not holder:
            yield IDLE
        tracked.busy = holder
        holder.hold(tracked)

    def _seize_all(self, holder: Transaction) -> Steps:
        for tracked in list(self.book):
            while tracked.busy is not None:
                yield IDLE
            if self.book.get(tracked.direction, tracked.selector) is tracked:  # it may have ended meanwhile
                tracked.busy = holder
                holder.hold(tracked)

    def _let_go(self, tracked: TrackedPolicy) -> None:
        self._release((tracked,))

    def _end(self, transaction: Transaction) -> None:
        transaction.over = True
        self._release(transaction)

    def _release(self, held: Iterable[TrackedPolicy]) -> None:
        """Let go of all; an interrupt (Ctrl-C) meanwhile comes afterwards, or others would wait for the rest for ever.

        Nobody else looks before it is done, so that it can be begun again.
        """
        try:
            self._release_each(held)
        except KeyboardInterrupt:
            self._release_each(held)
            raise

    def _release_each(self, held: Iterable[TrackedPolicy]) -> None:
        self.released = True
        for tracked in held:
            tracked.busy = None
            self.book.close(tracked)

    def must_be_free(self, me: object, what: str) -> None:
        """Raise when `me` is in a transaction, whose end a call of this kind would wait for."""
        if me in self.transactions:
            raise PFKeyError(f"{what} within a transaction would wait for its own end; call it before or after")


def _shown(book: Book, tracked: TrackedPolicy) -> Run[Policy | None]:
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
