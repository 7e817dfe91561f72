"""The blocking tracker: carries its decisions out over a kernel, for several threads."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any, Protocol, Self, TypeVar

from .abi import Abi
from .assignment import Assignment
from .book import Ownership, Settings
from .codec import Message
from .constants import Direction
from .errors import PFKeyError
from .explain import Explanation
from .guards import Guard, owner_number
from .hostlock import LONGEST_WAIT, WriterLock, writer_lock
from .messages import Policy, Selector
from .reading import ENTER, GRACE, IDLE, Ask, Dump, Rows, Run
from .resync import Difference
from .tracking import Tracking
from .uses import Transaction, Ways, expect, tunnel_calls
from .watch import Healing, Watch, start, writes
from .work import Change

__all__ = ["Change", "PolicyKernel", "PolicyTracker", "Transaction", "make_settings"]

log = logging.getLogger("pfkey.keeper")

T = TypeVar("T")
E = TypeVar("E", bound=Enum)


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
    if not linger >= 0:  # nor is NaN one
        raise ValueError(f"linger is a number of seconds, not {linger}")
    choices = (_choice(Guard, "guard", guard), _choice(Guard, "host_guard", host_guard))
    return Settings(number, owner is not None, _choice(Ownership, "ownership", ownership), *choices, linger)


def _choice(kind: type[E], name: str, given: E | str) -> E:
    try:
        return kind(given)
    except ValueError:
        choices = ", ".join(str(one.value) for one in kind)
        raise ValueError(f"{name} is one of {choices}, not {given!r}") from None


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
        self._tracking = Tracking(kernel.abi, self._check_policy, settings)
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._in_order = threading.Lock()
        """Held by the one transaction that is under way."""
        self._lock_path = lock
        self._lock_timeout = lock_timeout
        self._timer: threading.Timer | None = None
        self._timer_due = 0.0
        self._ending = False
        """Policies that have lingered long enough are being deleted: a timer is set again afterwards."""
        self._written = 0
        """How many changes the kernel acknowledged."""

    def _check_policy(self, policy: Policy) -> None:
        self._kernel.check_policy(policy)  # of the connection that there is then

    def __len__(self) -> int:
        """How many policies are tracked."""
        return len(self._tracking.book)

    def __repr__(self) -> str:
        return f"<PolicyTracker of {len(self)} policies on {self._abi}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Delete what only lingers, and stop waiting for it.  The policies in use stay in the kernel."""
        self._run(self._tracking.end_lingering(None))

    # What uses a policy.

    def add(self, direction: Direction, selector: Selector, assignment: Assignment) -> Change:
        """Let `assignment` use the policy; it comes to the top when it is as strong as the strongest.

        Raises NotSupported or EncodeError for what this kernel cannot hold, ForeignPolicy when somebody else has the
        selector, KernelError for what the kernel refused: then the assignment is not recorded.  After any other error
        (ReplyTimeout, ChannelClosed, ENOBUFS) it is recorded, and the next call finds out what the kernel did.
        """
        expect(selector, assignment)
        return self._call(direction, selector, None, assignment)

    def remove(self, direction: Direction, selector: Selector, assignment: Assignment) -> Change:
        """End the use of the policy by `assignment`, the oldest of equal ones.

        Raises NotTracked when it was never added.  Whatever the kernel answers, the assignment is gone afterwards; a
        policy that could not be deleted stays tracked, and the next call or `flush` tries again.
        """
        expect(selector, assignment)
        return self._call(direction, selector, assignment, None)

    def replace(self, direction: Direction, selector: Selector, old: Assignment, new: Assignment) -> Change:
        """Let `new` take the place of `old` (an address or a NAT mapping changed): one message at most.

        Raises NotTracked when `old` was never added, and what `add` raises; then `old` stays, when the kernel refused.
        """
        expect(selector, old, new)
        return self._call(direction, selector, old, new)

    def add_tunnel(self, selector: Selector, assignment: Assignment, inbound: Assignment | None = None) -> Transaction:
        """Add the policies of a whole tunnel from what goes out: in, fwd where there is one, then out.

        `inbound` is the assignment of the other directions; without it, `assignment` reversed.
        """
        return self._tunnel(selector, None, (assignment, inbound))

    def remove_tunnel(
        self, selector: Selector, assignment: Assignment, inbound: Assignment | None = None
    ) -> Transaction:
        """Undo `add_tunnel`: out first."""
        return self._tunnel(selector, (assignment, inbound), None)

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

    def _tunnel(self, selector: Selector, old: Ways | None, new: Ways | None) -> Transaction:
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
        There is one transaction of a tracker at a time; within one, another is part of it, and an exception that comes
        out of that takes back what was done in it.
        """
        me, tracking = threading.current_thread(), self._tracking
        outer = tracking.join(me)
        if outer is not None:
            mark = outer.mark
            outer.sweep |= sweep
            try:
                yield outer
            except BaseException:
                with self._lock:
                    outer.back_to(mark)
                raise
            return
        with self._in_order:
            try:
                with self._lock:
                    transaction = tracking.begin(me, is_sweep=sweep)
                yield transaction
                self._run(tracking.commit(me))
            except BaseException:
                if tracking.join(me) is not None:  # it came before anything was done
                    with self._lock:
                        tracking.roll_back(me)
                        self._tell_idle()
                raise

    def flush(self) -> tuple[Change, ...]:
        """Forget all assignments and delete this tracker's policies, one by one: nobody else's, never by SPDFLUSH.

        Raises TransactionError naming the policies that could not be deleted; they stay tracked.
        """
        self._tracking.must_be_free(threading.current_thread(), "flush()")
        with self._in_order:
            return self._run(self._tracking.flush())

    # Knowing.

    def resync(self) -> tuple[Difference, ...]:
        """Read all policies, compare them with what should be there, and put right what differs.

        Returns the differences, what was done about each included.  Guards that a dead process left are seen to as
        well, and what was contested is ours again.  Raises PFKeyError when the policies cannot be read; what cannot be
        put right is told in its difference.
        """
        self._tracking.must_be_free(threading.current_thread(), "resync()")
        return self._resync(by_hand=True)

    def _resync(self, *, by_hand: bool) -> tuple[Difference, ...]:
        with self._in_order:
            return self._run(self._tracking.resync(by_hand=by_hand))

    def watch(self, interval: float = 60.0) -> Watch:
        """Follow the kernel's broadcasts in a thread, and put right what others change, within one event.

        After three foreign changes of one policy in ten seconds it is left as it is, and `explain` says so.  When
        events were lost, after a flush, and every `interval` seconds all policies are compared: Linux expires policies
        and drops events in silence.  End it with `stop()`, or use it in a `with` block.
        """
        watch = Watch(interval)

        def heal_one(message: Message) -> None:
            watch.note(self._heal(message))

        def compare() -> None:
            watch.note_resync(self._resync(by_hand=False))

        start(watch, self._kernel, heal_one, compare, lambda: self._written)
        return watch

    def _heal(self, message: Message) -> Healing | None:
        return self._run(self._tracking.heal(message))

    def query(self, direction: Direction, selector: Selector) -> Policy:
        """The policy as the kernel holds it now, lifetimes and last use included where the kernel keeps them.

        Raises NotTracked when the tracker has no such policy, or the kernel has it no more.
        """
        return self._run(self._tracking.query(threading.current_thread(), direction, selector))

    def find(self, policy_id: int) -> tuple[Direction, Selector] | None:
        """Which tracked policy has this id in the kernel (an ACQUIRE names it), or None."""
        with self._lock:
            return self._tracking.find(policy_id)

    def explain(self, direction: Direction, selector: Selector) -> Explanation:
        """What uses the policy, what the kernel holds as far as is known, what would be sent now, and why."""
        with self._lock:
            return self._tracking.explain(direction, selector)

    def assignments(self, direction: Direction, selector: Selector) -> tuple[Assignment, ...]:
        """What uses the policy, the one on top first; empty for a policy that is not tracked."""
        with self._lock:
            return self._tracking.assignments(direction, selector)

    def policies(self) -> tuple[tuple[Direction, Selector], ...]:
        """The policies that are tracked."""
        with self._lock:
            return self._tracking.policies()

    def reconnect(self, kernel: PolicyKernel) -> None:
        """Go on over another connection to the same kernel, after ChannelClosed.

        What the lost connection left uncertain is read before it is acted on.  Raises ValueError when the other end is
        another system.
        """
        if kernel.abi != self._abi:
            raise ValueError(f"the policies tracked here are in a kernel of {self._abi}, not of {kernel.abi}")
        self._kernel = kernel

    # Running.

    def _call(self, direction: Direction, selector: Selector, old: Assignment | None, new: Assignment | None) -> Change:
        tracking = self._tracking
        me = threading.current_thread() if tracking.transactions else None
        with self._lock:
            change = tracking.quick(me, direction, selector, old, new)
            if change is not None:
                if new is None and tracking.book.settings.linger:
                    self._set_timer()
                return change
        return self._run(tracking.call(threading.current_thread(), direction, selector, old, new))

    def _run(self, steps: Run[T]) -> T:
        """Carry a run out: what it decides under the lock, what it asks for without.

        An interrupt (Ctrl-C) may come between any two steps of this: one that the run has not seen is raised in it, so
        that it sees to its guards and lets go of its policies; `tracking.Tracking._ending` says where that may be.
        """
        writers: list[WriterLock] = []
        unseen: BaseException | None = None
        try:
            while True:
                try:
                    return self._carry_on(steps, unseen, writers)
                except BaseException as error:
                    if steps.gi_frame is None:  # type: ignore[attr-defined]  # it has ended
                        raise
                    unseen = error
        finally:
            interrupt: KeyboardInterrupt | None = None
            while True:
                try:
                    for writer in writers:
                        writer.release(by=writers)
                    if self._tracking.released:
                        with self._lock:
                            self._tell_idle()
                    break
                except KeyboardInterrupt as error:
                    interrupt = error
            if interrupt is not None:
                raise interrupt

    def _carry_on(self, steps: Run[T], error: BaseException | None, writers: list[WriterLock]) -> T:
        value: Any = None
        while True:
            with self._lock:
                try:
                    effect = steps.send(value) if error is None else steps.throw(error)
                    while effect is IDLE:
                        effect = self._wait(steps)
                except StopIteration as end:
                    result: T = end.value
                    return result
                finally:
                    self._tell_idle()
            value, error = None, None
            try:
                if isinstance(effect, Ask):
                    value = self._ask(effect)
                elif isinstance(effect, Dump):
                    value = Rows.of(self._kernel.dump_policies(), self._abi)
                elif effect is GRACE:
                    self._grace()
                elif effect is ENTER and not any(writer.is_held(by=writers) for writer in writers):
                    self._enter(writers)
            except BaseException as failure:
                error = failure

    def _enter(self, writers: list[WriterLock]) -> None:
        writer = self._writer()
        writers.append(writer)  # before it is taken: an interrupt comes when it is, or never
        writer.take(self._lock_timeout, by=writers)

    def _wait(self, steps: Run[Any]) -> Any:
        """Let others work until somebody lets go of a policy; the lock is held before and after."""
        try:
            self._idle.wait()
        except BaseException as error:
            return steps.throw(error)
        return steps.send(None)

    def _tell_idle(self) -> None:
        """Wake up those who wait for a policy that was let go; the lock is held."""
        if self._tracking.released:
            self._tracking.released = False
            self._idle.notify_all()
            if self._tracking.book.settings.linger:
                self._set_timer()

    def _ask(self, effect: Ask) -> Sequence[Message | PFKeyError]:
        try:
            replies = self._kernel.request_many(effect.messages)
        except PFKeyError as error:
            return [error] * len(effect.messages)
        self._written += writes(effect.messages, replies)
        return replies

    def _grace(self) -> None:
        wait = getattr(self._kernel, "grace_period", None)
        if wait is not None:
            wait()
        else:
            time.sleep(GRACE_SECONDS)

    def _writer(self) -> WriterLock:
        path = self._lock_path if self._lock_path is not None else getattr(self._kernel, "host_lock", None)
        return writer_lock(path, self._kernel)

    # Lingering.

    def _set_timer(self) -> None:
        """See to it that what lingers is deleted in time; the lock is held."""
        due = self._tracking.next_end()
        if self._ending or (self._timer is not None and due == self._timer_due):
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if due is not None:
            seconds = min(max(0.0, due - time.monotonic()), LONGEST_WAIT)  # it is set again when nothing is due then
            self._timer, self._timer_due = threading.Timer(seconds, self._linger_is_over), due
            self._timer.daemon = True
            self._timer.start()

    def _linger_is_over(self) -> None:
        with self._lock:
            if self._ending or threading.current_thread() is not self._timer:
                return  # it was cancelled a moment too late
            self._ending, self._timer = True, None
        try:
            self._run(self._tracking.end_lingering(time.monotonic()))
        except Exception:
            log.exception("policies that nobody uses any more could not be deleted; it is tried again")
        finally:
            with self._lock:
                self._ending = False
                self._set_timer()


GRACE_SECONDS = 0.02
"""In which all packets under way are through; 3 ms were enough in 10,000 measured updates (Linux 6.18)."""
