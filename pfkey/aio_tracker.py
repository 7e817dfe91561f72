"""The asyncio tracker: the same decisions as the blocking one, for the tasks of one event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Protocol, Self, TypeVar

from .abi import Abi
from .assignment import Assignment
from .book import Ownership
from .codec import Message
from .constants import Direction
from .errors import ChannelClosed, NotSupported, PFKeyError
from .explain import Explanation
from .guards import Guard
from .hostlock import WriterLock, writer_lock
from .keeper import GRACE_SECONDS, make_settings
from .messages import Policy, Selector
from .reading import ENTER, GRACE, IDLE, Ask, Dump, Rows, Run
from .resync import Difference
from .tracking import Tracking
from .uses import Transaction, Ways, expect, tunnel_calls
from .watch import Healing, Pace, writes
from .work import Change

__all__ = ["AsyncPolicyKernel", "AsyncPolicyTracker", "AsyncWatch"]

log = logging.getLogger("pfkey.keeper")

T = TypeVar("T")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05
_KEPT = 1000


_SCOPE: ContextVar[Mapping[int, object]] = ContextVar("pfkey transactions", default=MappingProxyType({}))
"""Which transaction of a tracker the code that runs belongs to; tasks have those of who started them."""


class AsyncPolicyKernel(Protocol):
    """What a tracker needs of a kernel; `pfkey.AsyncKernel` has it.  `host_lock` and `grace_period` may be missing."""

    @property
    def abi(self) -> Abi: ...
    def check_policy(self, policy: Policy) -> None: ...
    async def request_many(self, messages: Sequence[Message]) -> Sequence[Message | PFKeyError]: ...
    async def dump_policies(self) -> Sequence[Policy]: ...


class AsyncPolicyTracker:
    """`PolicyTracker` for asyncio: the same calls, as coroutines.  See there for what they do and for the arguments.

    It starts no event loop and no thread; its tasks are those that call it, one for each `watch`, and one timer when
    `linger` is set.  A call that is cancelled sees to its guards first; what it had sent is read by the next one.
    """

    def __init__(
        self,
        kernel: AsyncPolicyKernel,
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
        self._in_order = asyncio.Lock()
        """Held by the one transaction that is under way."""
        self._released = asyncio.Event()
        self._lock_path = lock
        self._lock_timeout = lock_timeout
        self._timer: asyncio.Task[None] | None = None
        self._timer_due = 0.0
        self._ending: asyncio.Task[None] | None = None
        """Deletes at the moment what has lingered long enough: a timer is set again afterwards."""
        self._written = 0
        """How many changes the kernel acknowledged."""

    def _check_policy(self, policy: Policy) -> None:
        self._kernel.check_policy(policy)  # of the connection that there is then

    def __len__(self) -> int:
        """How many policies are tracked."""
        return len(self._tracking.book)

    def __repr__(self) -> str:
        return f"<AsyncPolicyTracker of {len(self)} policies on {self._abi}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Delete what only lingers, and stop waiting for it.  The policies in use stay in the kernel."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        await self._run(self._tracking.end_lingering(None))

    # What uses a policy.

    async def add(self, direction: Direction, selector: Selector, assignment: Assignment) -> Change:
        """Let `assignment` use the policy."""
        expect(selector, assignment)
        return await self._call(direction, selector, None, assignment)

    async def remove(self, direction: Direction, selector: Selector, assignment: Assignment) -> Change:
        """End the use of the policy by `assignment`, the oldest of equal ones."""
        expect(selector, assignment)
        return await self._call(direction, selector, assignment, None)

    async def replace(self, direction: Direction, selector: Selector, old: Assignment, new: Assignment) -> Change:
        """Let `new` take the place of `old`: one message at most."""
        expect(selector, old, new)
        return await self._call(direction, selector, old, new)

    async def add_tunnel(
        self, selector: Selector, assignment: Assignment, inbound: Assignment | None = None
    ) -> Transaction:
        """Add the policies of a whole tunnel from what goes out."""
        return await self._tunnel(selector, None, (assignment, inbound))

    async def remove_tunnel(
        self, selector: Selector, assignment: Assignment, inbound: Assignment | None = None
    ) -> Transaction:
        """Undo `add_tunnel`: out first."""
        return await self._tunnel(selector, (assignment, inbound), None)

    async def replace_tunnel(
        self,
        selector: Selector,
        old: Assignment,
        new: Assignment,
        *,
        old_inbound: Assignment | None = None,
        new_inbound: Assignment | None = None,
    ) -> Transaction:
        """`replace` in every direction, as one transaction."""
        return await self._tunnel(selector, (old, old_inbound), (new, new_inbound))

    async def _tunnel(self, selector: Selector, old: Ways | None, new: Ways | None) -> Transaction:
        async with self.transaction() as transaction:
            for direction, where, before, after in tunnel_calls(self._abi, selector, old, new):
                await self._call(direction, where, before, after)
        return transaction

    @asynccontextmanager
    async def transaction(self, *, sweep: bool = False) -> AsyncIterator[Transaction]:
        """Within `async with`, calls change lists alone; the kernel hears of each policy at the end.

        Calls of tasks that are started within belong to it too, those of asyncio.gather() and wait_for() for example.
        """
        tracking, before = self._tracking, _SCOPE.get()
        outer = tracking.join(self._me)
        if outer is not None:
            mark = outer.mark
            outer.sweep |= sweep
            try:
                yield outer
            except BaseException:
                outer.back_to(mark)
                raise
            return
        async with self._in_order:
            me = object()
            transaction = tracking.begin(me, is_sweep=sweep)
            _SCOPE.set({**before, id(self): me})
            try:
                yield transaction
            except BaseException:
                tracking.roll_back(me)
                self._tell_idle()
                raise
            finally:
                _SCOPE.set(before)
            await self._run(tracking.commit(me))

    async def flush(self) -> tuple[Change, ...]:
        """Forget all assignments and delete this tracker's policies, one by one."""
        self._tracking.must_be_free(self._me, "flush()")
        async with self._in_order:
            return await self._run(self._tracking.flush())

    # Knowing.

    async def resync(self) -> tuple[Difference, ...]:
        """Read all policies, compare them with what should be there, and put right what differs."""
        self._tracking.must_be_free(self._me, "resync()")
        return await self._resync(by_hand=True)

    async def _resync(self, *, by_hand: bool) -> tuple[Difference, ...]:
        async with self._in_order:
            return await self._run(self._tracking.resync(by_hand=by_hand))

    def watch(self, interval: float = 60.0) -> AsyncWatch:
        """Follow the kernel's broadcasts in a task of the running loop, and put right what others change."""
        if not hasattr(self._kernel, "spd_events"):
            raise NotSupported(f"{self._kernel!r} gives no events to watch")
        return AsyncWatch(self, self._kernel.spd_events(timeout=interval), interval)

    async def query(self, direction: Direction, selector: Selector) -> Policy:
        """The policy as the kernel holds it now."""
        return await self._run(self._tracking.query(self._me, direction, selector))

    def find(self, policy_id: int) -> tuple[Direction, Selector] | None:
        """Which tracked policy has this id in the kernel (an ACQUIRE names it), or None."""
        return self._tracking.find(policy_id)

    def explain(self, direction: Direction, selector: Selector) -> Explanation:
        """What uses the policy, what the kernel holds as far as is known, what would be sent now, and why."""
        return self._tracking.explain(direction, selector)

    def assignments(self, direction: Direction, selector: Selector) -> tuple[Assignment, ...]:
        """What uses the policy, the one on top first; empty for a policy that is not tracked."""
        return self._tracking.assignments(direction, selector)

    def policies(self) -> tuple[tuple[Direction, Selector], ...]:
        """The policies that are tracked."""
        return self._tracking.policies()

    def reconnect(self, kernel: AsyncPolicyKernel) -> None:
        """Go on over another connection to the same kernel, after ChannelClosed."""
        if kernel.abi != self._abi:
            raise ValueError(f"the policies tracked here are in a kernel of {self._abi}, not of {kernel.abi}")
        self._kernel = kernel

    # Running.

    @property
    def _me(self) -> object:
        return _SCOPE.get().get(id(self))

    async def _call(
        self, direction: Direction, selector: Selector, old: Assignment | None, new: Assignment | None
    ) -> Change:
        me, tracking = self._me, self._tracking
        change = tracking.quick(me, direction, selector, old, new)
        if change is not None:
            if new is None and tracking.book.settings.linger:
                self._set_timer()
            return change
        return await self._run(tracking.call(me, direction, selector, old, new))

    async def _run(self, steps: Run[T]) -> T:
        """Carry a run out: nothing else of this loop comes between two of its effects."""
        value: Any = None
        error: BaseException | None = None
        writer: WriterLock | None = None
        try:
            while True:
                try:
                    effect = steps.send(value) if error is None else steps.throw(error)
                except StopIteration as end:
                    result: T = end.value
                    return result
                finally:
                    self._tell_idle()
                value, error = None, None
                try:
                    if isinstance(effect, Ask):
                        value = await self._ask(effect)
                    elif isinstance(effect, Dump):
                        value = Rows.of(await self._kernel.dump_policies(), self._abi)
                    elif effect is IDLE:
                        self._released.clear()
                        await self._released.wait()
                    elif effect is GRACE:
                        await self._grace()
                    elif effect is ENTER and writer is None:
                        writer = await self._enter()
                except BaseException as failure:
                    error = failure
        finally:
            if writer is not None:
                writer.release()

    def _tell_idle(self) -> None:
        """Wake up those who wait for a policy that was let go."""
        if self._tracking.released:
            self._tracking.released = False
            self._released.set()
            if self._tracking.book.settings.linger:
                self._set_timer()

    async def _ask(self, effect: Ask) -> Sequence[Message | PFKeyError]:
        try:
            replies = await self._kernel.request_many(effect.messages)
        except PFKeyError as error:
            return [error] * len(effect.messages)
        self._written += writes(effect.messages, replies)
        return replies

    async def _grace(self) -> None:
        wait = getattr(self._kernel, "grace_period", None)
        if wait is not None:
            await wait()
        else:
            await asyncio.sleep(GRACE_SECONDS)

    async def _enter(self) -> WriterLock:
        path = self._lock_path if self._lock_path is not None else getattr(self._kernel, "host_lock", None)
        writer = writer_lock(path, self._kernel)
        deadline, pause = time.monotonic() + self._lock_timeout, _FIRST_PAUSE
        while not writer.try_to_take():
            if time.monotonic() >= deadline:
                raise writer.refused(self._lock_timeout)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return writer

    # Lingering.

    def _set_timer(self) -> None:
        """See to it that what lingers is deleted in time."""
        due = self._tracking.next_end()
        if self._ending is not None or (self._timer is not None and due == self._timer_due):
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if due is not None:
            self._timer = asyncio.get_running_loop().create_task(self._end_lingering(due))
            self._timer_due = due

    async def _end_lingering(self, due: float) -> None:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        self._ending, self._timer = self._timer, None  # what is under way must not be cancelled for a later end
        try:
            await self._run(self._tracking.end_lingering(time.monotonic()))
        except PFKeyError:
            log.exception("policies that nobody uses any more could not be deleted; it is tried again")
        finally:
            self._ending = None
        self._set_timer()


class AsyncWatch:
    """A task that follows the kernel's broadcasts for a tracker; made by `AsyncPolicyTracker.watch`.

    `healings` are the last foreign changes and what was done about them, `differences` what the last resyncs found;
    `resyncs` counts those, `error` says why the task has ended by itself.
    """

    def __init__(self, tracker: AsyncPolicyTracker, events: Any, interval: float) -> None:
        self.interval = interval
        self.healings: list[Healing] = []
        self.differences: list[Difference] = []
        self.resyncs = 0
        self.error: BaseException | None = None
        self._tracker = tracker
        self._events = events
        self._task = asyncio.get_running_loop().create_task(self._follow(), name="pfkey-watch")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def running(self) -> bool:
        """Whether it still follows."""
        return not self._task.done()

    async def stop(self) -> None:
        """End it; returns when it has ended."""
        self._task.cancel()
        await asyncio.wait([self._task])
        self._events.stop()

    async def _follow(self) -> None:
        try:
            await self._rounds()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self.error = error
            log.exception("the watch over the policies has ended")

    async def _rounds(self) -> None:
        events, tracker = self._events, self._tracker
        pace = Pace(self.interval, events.lost, tracker._written)
        while True:
            events.timeout, quiet, before = pace.patience, True, tracker._written
            async for message, own in events:
                quiet = False
                if pace.concerns_one(message, own):
                    self._note(await tracker._run(tracker._tracking.heal(message)))
                if pace.reason(events.lost, before, quiet=False):
                    break
            reason = pace.reason(events.lost, before, quiet=quiet)
            if reason:
                log.info("all policies are compared: %s", reason)
                await self._compare()
                pace.compared(events.lost, tracker._written)

    async def _compare(self) -> None:
        try:
            self.differences += await self._tracker._resync(by_hand=False)
        except ChannelClosed:
            raise
        except PFKeyError as error:
            log.warning("all policies could not be compared: %s", error)
        del self.differences[:-_KEPT]
        self.resyncs += 1

    def _note(self, healing: Healing | None) -> None:
        if healing is not None:
            self.healings.append(healing)
            del self.healings[:-_KEPT]
