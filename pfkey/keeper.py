"""The blocking tracker: carries its decisions out over a kernel, for several threads."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, Self, TypeVar

from .abi import Abi
from .assignment import Assignment
from .book import Book, Ownership, Settings
from .codec import Message
from .constants import Direction
from .errors import NotTracked, PFKeyError
from .explain import Explanation, explain
from .guards import Guard, owner_number
from .hostlock import writer_lock
from .messages import Policy, Selector
from .resync import Difference, resync, sweep
from .settle import settle
from .tracker import State, TrackedPolicy
from .uses import POSTPONED, Transaction, change_of, close_error, shift, state_text, tunnel_calls
from .work import ENTER, GRACE, Ask, Change, Dump, Rows, Run, Work, get, is_entry, read

__all__ = ["Change", "PolicyKernel", "PolicyTracker", "Transaction", "make_settings"]

log = logging.getLogger("pfkey.keeper")

T = TypeVar("T")


class PolicyKernel(Protocol):
    """What a tracker needs of a kernel; `pfkey.Kernel` has it.  `host_lock` and `grace_period` may be missing."""

    @property
    def abi(self) -> Abi: ...
    def check_policy(self, policy: Policy) -> None: ...
    def request_many(self, messages: Sequence[Message]) -> Sequence[Message | PFKeyError]: ...
    def dump_policies(self) -> Sequence[Policy]: ...


def make_settings(
    owner: str | None,
    ownership: Ownership | str,
    guard: Guard | str,
    host_guard: Guard | str,
    linger: float,
) -> Settings:
    """Check what a tracker is told; ValueError for what is none of the choices."""
    number = owner_number(owner) if owner is not None else int.from_bytes(os.urandom(4), "little") >> 4 or 1
    if linger < 0:
        raise ValueError(f"linger is a number of seconds, not {linger}")
    return Settings(number, owner is not None, Ownership(ownership), Guard(guard), Guard(host_guard), linger)


class PolicyTracker:
    """Keeps a kernel's policies right while the SAs that use them come and go.

    A policy is identified by direction and selector (address family included, host bits masked).  `add` and `remove`
    say which assignments use it; the kernel hears of it only when what it holds would change: SPDADD for the first,
    SPDUPDATE when another assignment with another image comes to the top, SPDDELETE after the last.  After an error
    whose outcome is not certain the tracker reads the kernel before it acts again.

    `owner` is a name that goes into a tag on the tracker's policies: after a restart a tracker of the same name knows
    them again, and `transaction(sweep=True)` deletes what it no longer wants.  `ownership` says what happens when
    somebody else's policy has a selector of ours: "refuse" (leave it alone, raise ForeignPolicy), "adopt" (it is ours
    from now on; nothing is sent when it is what we want) or "take_over" (one SPDUPDATE in any case, which tags it).

    `guard` is what stands in for a policy while it is updated: "auto", what this kernel needs (an alias clone of the
    new policy; between two hosts, where none exists, a discard guard one bit wider, which drops packets for a moment);
    "alias" or "discard" at every update; "bare" for none, with the window that the kernel has.  `host_guard` is the
    same for policies between two hosts alone.  `linger` seconds is how long a policy that nobody uses any more is kept,
    so that a reauthentication that breaks before it makes leaves no gap.

    `lock` is the file that all writers of this SPD on this host lock (default: what the kernel says), `lock_timeout`
    how many seconds to wait for it.  On the BSDs it is held for every change, on Linux while guards stand.

    A tracker may be used by several threads: calls for one policy are carried out one after the other, calls for others
    are not held up by them.
    """

    def __init__(
        self,
        kernel: PolicyKernel,
        *,
        owner: str | None = None,
        ownership: Ownership | str = Ownership.REFUSE,
        guard: Guard | str = Guard.AUTO,
        host_guard: Guard | str = Guard.AUTO,
        linger: float = 0.0,
        lock: str | None = None,
        lock_timeout: float = 10.0,
    ) -> None:
        self._kernel = kernel
        self._abi = kernel.abi
        settings = make_settings(owner, ownership, guard, host_guard, linger)
        self._book = Book(kernel.abi, self._check_policy, settings)
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._in_order = threading.RLock()
        """Held by the one transaction that is under way."""
        self._transactions: dict[int, Transaction] = {}
        self._lock_path = lock
        self._lock_timeout = lock_timeout
        self._timer: threading.Timer | None = None

    def _check_policy(self, policy: Policy) -> None:
        self._kernel.check_policy(policy)  # of the connection that there is then

    def __len__(self) -> int:
        """How many policies are tracked."""
        return len(self._book)

    def __repr__(self) -> str:
        return f"<PolicyTracker of {len(self)} policies on {self._abi}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Delete what only lingers, and stop waiting for it.  The policies in use stay in the kernel."""
        self._end_lingering(None)

    # What uses a policy.

    def add(self, direction: Direction, selector: Selector, assignment: Assignment) -> Change:
        """Let `assignment` use the policy; it comes to the top when it is as strong as the strongest.

        Raises NotSupported or EncodeError for what this kernel cannot hold, ForeignPolicy when somebody else has the
        selector, KernelError for what the kernel refused: then the assignment is not recorded.  After any other error
        (ReplyTimeout, ChannelClosed, ENOBUFS) it is recorded, and the next call finds out what the kernel did.
        """
        return self._call(direction, selector, None, assignment)

    def remove(self, direction: Direction, selector: Selector, assignment: Assignment) -> Change:
        """End the use of the policy by `assignment`, the oldest of equal ones.

        Raises NotTracked when it was never added.  Whatever the kernel answers, the assignment is gone afterwards; a
        policy that could not be deleted stays tracked, and the next call or `flush` tries again.
        """
        return self._call(direction, selector, assignment, None)

    def replace(self, direction: Direction, selector: Selector, old: Assignment, new: Assignment) -> Change:
        """Let `new` take the place of `old` (an address or a NAT mapping changed): one message at most.

        Raises NotTracked when `old` was never added, and what `add` raises; then `old` stays, when the kernel refused.
        """
        return self._call(direction, selector, old, new)

    def add_tunnel(self, selector: Selector, assignment: Assignment, inbound: Assignment | None = None) -> Transaction:
        """Add the policies of a whole tunnel from what goes out: in, fwd where there is one, then out.

        `inbound` is the assignment of the other directions; without it, `assignment` reversed.
        """
        return self._tunnel(selector, (None, None), (assignment, inbound))

    def remove_tunnel(
        self, selector: Selector, assignment: Assignment, inbound: Assignment | None = None
    ) -> Transaction:
        """Undo `add_tunnel`: out first."""
        return self._tunnel(selector, (assignment, inbound), (None, None))

    def replace_tunnel(
        self,
        selector: Selector,
        old: Assignment,
        new: Assignment,
        *,
        old_inbound: Assignment | None = None,
        new_inbound: Assignment | None = None,
    ) -> Transaction:
        """`replace` in every direction, as one transaction."""
        return self._tunnel(selector, (old, old_inbound), (new, new_inbound))

    def _tunnel(
        self,
        selector: Selector,
        old: tuple[Assignment | None, Assignment | None],
        new: tuple[Assignment | None, Assignment | None],
    ) -> Transaction:
        with self.transaction() as transaction:
            for direction, where, before, after in tunnel_calls(self._abi, selector, old, new):
                self._call(direction, where, before, after)
        return transaction

    @contextmanager
    def transaction(self, *, sweep: bool = False) -> Iterator[Transaction]:
        """Within `with`, calls of this thread change lists alone; the kernel hears of each policy once, at the end.

        What is new comes before what goes, so that no selector is bare in between; an exception inside sends nothing
        and restores every list.  Raises TransactionError naming the policies that failed; the rest stands.  With
        `sweep` the policies that carry the tag of this tracker's `owner`, and are not tracked at the end, are deleted.
        There is one transaction of a tracker at a time; within one, another is part of it.
        """
        if sweep and not self._book.settings.named:
            raise ValueError("a sweep needs a tracker with an owner: PolicyTracker(kernel, owner='a name')")
        me = threading.get_ident()
        outer = self._transactions.get(me)
        if outer is not None:
            outer.sweep |= sweep
            yield outer
            return
        with self._in_order:
            transaction = self._transactions[me] = Transaction(self, sweep=sweep)
            try:
                yield transaction
            except BaseException:
                with self._lock:
                    del self._transactions[me]
                    transaction.roll_back()
                    self._let_go(transaction)
                raise
            del self._transactions[me]
            try:
                self._commit(transaction)
            finally:
                transaction.over = True
                with self._lock:
                    self._let_go(transaction)

    def _commit(self, transaction: Transaction) -> None:
        if transaction.sweep:
            try:
                self._run(sweep(self._book, lambda tracked: self._seize(tracked, transaction)))
            except PFKeyError as error:
                transaction.not_swept = error
        with self._lock:
            works = transaction.works(self._book)
        if works:
            self._run(settle(self._book, works))
        with self._lock:
            transaction.finish(works)

    def flush(self) -> tuple[Change, ...]:
        """Forget all assignments and delete this tracker's policies, one by one: nobody else's, never by SPDFLUSH.

        Raises TransactionError naming the policies that could not be deleted; they stay tracked.
        """
        with self._in_order:
            all_of_it = Transaction(self, sweep=False)
            works: list[Work] = []
            try:
                for tracked in self._everything(all_of_it):
                    tracked.clear()
                    if tracked.troubles is not None:
                        tracked.troubles = None
                    works.append(Work(tracked))
                self._run(settle(self._book, works))
                close_error(works, "could not be deleted")
                return tuple(work.change for work in works)
            finally:
                with self._lock:
                    self._let_go(all_of_it)

    # Knowing.

    def resync(self) -> tuple[Difference, ...]:
        """Read all policies, compare them with what should be there, and put right what differs.

        Returns the differences, what was done about each included.  Guards that a dead process left are seen to as
        well.  Raises PFKeyError when the policies cannot be read; what cannot be put right is told in its difference.
        """
        with self._in_order:
            all_of_it = Transaction(self, sweep=False)
            try:
                tracked = self._everything(all_of_it)
                return self._run(resync(self._book, tracked))
            finally:
                with self._lock:
                    self._let_go(all_of_it)

    def query(self, direction: Direction, selector: Selector) -> Policy:
        """The policy as the kernel holds it now, lifetimes and last use included where the kernel keeps them.

        Raises NotTracked when the tracker has no such policy, or the kernel has it no more.
        """
        self._book.must_support(direction)
        with self._holding(direction, selector) as tracked:
            if tracked.top is None and tracked.installed.state is State.ABSENT:
                raise NotTracked(f"{tracked} is not tracked")
            policy = self._run(query(self._book, tracked))
            if policy is None:
                raise NotTracked(f"{tracked} is not in the kernel; {state_text(tracked)}")
            return policy

    def find(self, policy_id: int) -> tuple[Direction, Selector] | None:
        """Which tracked policy has this id in the kernel (an ACQUIRE names it), or None."""
        with self._lock:
            tracked = self._book.ids.get(policy_id) if policy_id else None
            return None if tracked is None else (tracked.direction, tracked.selector)

    def explain(self, direction: Direction, selector: Selector) -> Explanation:
        """What uses the policy, what the kernel holds as far as is known, what would be sent now, and why."""
        self._book.must_support(direction)
        with self._lock:
            tracked = self._book.get(direction, selector)
            if tracked is None:
                tracked = TrackedPolicy(direction, selector, self._abi)
            return explain(self._book, tracked)

    def assignments(self, direction: Direction, selector: Selector) -> tuple[Assignment, ...]:
        """What uses the policy, the one on top first; empty for a policy that is not tracked."""
        with self._lock:
            tracked = self._book.get(direction, selector)
            return () if tracked is None else tracked.assignments

    def policies(self) -> tuple[tuple[Direction, Selector], ...]:
        """The policies that are tracked."""
        with self._lock:
            return tuple((tracked.direction, tracked.selector) for tracked in self._book)

    def reconnect(self, kernel: PolicyKernel) -> None:
        """Go on over another connection to the same kernel, after ChannelClosed.

        What the lost connection left uncertain is read before it is acted on.  Raises ValueError when the other end is
        another system.
        """
        if kernel.abi != self._abi:
            raise ValueError(f"the policies tracked here are in a kernel of {self._abi}, not of {kernel.abi}")
        self._kernel = kernel

    # One policy at a time, or all of a transaction's.

    def _call(self, direction: Direction, selector: Selector, old: Assignment | None, new: Assignment | None) -> Change:
        transaction = self._transactions.get(threading.get_ident()) if self._transactions else None
        book = self._book
        with self._lock:
            tracked = self._open(direction, selector, transaction)
            if transaction is not None:
                try:
                    transaction.touch(book, tracked, old, new)
                except BaseException:
                    if tracked not in transaction._touched:
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
                if change.avoided and not len(tracked):
                    self._set_timer()
                elif not len(tracked):
                    book.close(tracked)
                return change
            work = Work(tracked, steps if new is not None else None)
            tracked.busy = work
        try:
            self._run(settle(book, (work,)))
        finally:
            with self._lock:
                tracked.busy = None
                book.close(tracked)
                self._idle.notify_all()
        if work.error is not None:
            raise work.error from work.error.__cause__
        return work.change

    def _open(self, direction: Direction, selector: Selector, me: object) -> TrackedPolicy:
        """The policy, when nobody else works on it; the lock is held, and let go while waiting."""
        while True:
            tracked = self._book.open(direction, selector)
            if tracked.busy is None or tracked.busy is me:
                return tracked
            self._idle.wait()

    @contextmanager
    def _holding(self, direction: Direction, selector: Selector) -> Iterator[TrackedPolicy]:
        me = self._transactions.get(threading.get_ident()) or object()
        with self._lock:
            tracked = self._open(direction, selector, me)
            before, tracked.busy = tracked.busy, me
        try:
            yield tracked
        finally:
            with self._lock:
                tracked.busy = before
                self._book.close(tracked)
                self._idle.notify_all()

    def _everything(self, me: Transaction) -> list[TrackedPolicy]:
        """All policies, held for `me`."""
        with self._lock:
            found: list[TrackedPolicy] = []
            for tracked in self._book:
                self._seize_locked(tracked, me)
                if self._book.get(tracked.direction, tracked.selector) is tracked:
                    found.append(tracked)
                else:
                    tracked.busy = None
            return found

    def _seize(self, tracked: TrackedPolicy, me: Transaction) -> None:
        """Hold one more for a transaction; called while the lock is held."""
        self._seize_locked(tracked, me)

    def _seize_locked(self, tracked: TrackedPolicy, me: Transaction) -> None:
        while tracked.busy is not None and tracked.busy is not me:
            self._idle.wait()
        tracked.busy = me
        me.hold(tracked)

    def _let_go(self, transaction: Transaction) -> None:
        """A transaction is over: its policies are anybody's again."""
        for tracked in transaction:
            tracked.busy = None
            self._book.close(tracked)
        self._idle.notify_all()
        if self._book.settings.linger:
            self._set_timer()

    # Running what needs I/O.

    def _run(self, steps: Run[T]) -> T:
        """Carry a run out: what it decides under the lock, what it asks for without."""
        value: Any = None
        error: BaseException | None = None
        writer = None
        try:
            while True:
                with self._lock:
                    try:
                        effect = steps.send(value) if error is None else steps.throw(error)
                    except StopIteration as end:
                        result: T = end.value
                        return result
                value, error = None, None
                try:
                    if isinstance(effect, Ask):
                        value = self._ask(effect)
                    elif isinstance(effect, Dump):
                        value = Rows.of(self._kernel.dump_policies(), self._abi)
                    elif effect is GRACE:
                        self._grace()
                    elif effect is ENTER and writer is None:
                        writer = self._writer()
                        writer.take(self._lock_timeout)
                except BaseException as failure:
                    if effect is ENTER:
                        writer = None
                    error = failure
        finally:
            if writer is not None:
                writer.release()

    def _ask(self, effect: Ask) -> Sequence[Message | PFKeyError]:
        try:
            return self._kernel.request_many(effect.messages)
        except PFKeyError as error:
            return [error] * len(effect.messages)

    def _grace(self) -> None:
        wait = getattr(self._kernel, "grace_period", None)
        if wait is not None:
            wait()
        else:
            time.sleep(_GRACE)

    def _writer(self) -> Any:
        path = self._lock_path if self._lock_path is not None else getattr(self._kernel, "host_lock", None)
        return writer_lock(path, self._kernel)

    # Lingering.

    def _set_timer(self) -> None:
        """See to it that what lingers is deleted in time; the lock is held."""
        due = [
            tracked.troubles.lingers_until
            for tracked in self._book
            if tracked.troubles is not None and tracked.troubles.lingers_until is not None
        ]
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if due:
            self._timer = threading.Timer(max(0.0, min(due) - time.monotonic()), self._linger_is_over)
            self._timer.daemon = True
            self._timer.start()

    def _linger_is_over(self) -> None:
        try:
            self._end_lingering(time.monotonic())
        except Exception:
            log.exception("policies that nobody uses any more could not be deleted")

    def _end_lingering(self, now: float | None) -> None:
        """Delete what has lingered long enough; with None all that lingers."""
        with self._in_order:
            mine = Transaction(self, sweep=False)
            works: list[Work] = []
            try:
                with self._lock:
                    for tracked in self._book:
                        troubles = tracked.troubles
                        if troubles is None or troubles.lingers_until is None:
                            continue
                        self._seize_locked(tracked, mine)
                        if tracked.troubles is None or tracked.troubles.lingers_until is None or len(tracked):
                            continue
                        if now is None or tracked.troubles.lingers_until <= now:
                            tracked.troubles.lingers_until = None
                            works.append(Work(tracked))
                if works:
                    self._run(settle(self._book, works))
                close_error(works, "could not be deleted after lingering")
            finally:
                with self._lock:
                    self._let_go(mine)


_GRACE = 0.02
"""Seconds in which all packets under way are through; 3 ms were enough in 10,000 measured updates (Linux 6.18)."""


def query(book: Book, tracked: TrackedPolicy) -> Run[Policy | None]:
    """The policy as the kernel shows it, None when it has it no more."""
    for _ in range(2):
        if tracked.installed.state is State.UNKNOWN or not tracked.installed.policy_id:
            unread = yield from read(book, [tracked])
            if tracked in unread:
                raise unread[tracked]
        (found,) = (yield from get(book, [tracked.installed.policy_id])) if tracked.installed.policy_id else (None,)
        if isinstance(found, Policy) and is_entry(tracked, found):
            return found
        if isinstance(found, PFKeyError):
            raise found
        if tracked.installed.state in (State.ABSENT, State.FOREIGN):
            return None
        book.note(tracked, tracked.installed.doubted())
    return None
