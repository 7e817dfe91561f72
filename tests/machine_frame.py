"""What a play of the state machine stands on: a kernel, one process with a tracker after the other, what goes wrong."""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import machine_checks as checks
from machine_model import ASSIGNMENTS, REFUSED, Model, Where
from machine_world import Death, Line, World, kernel_over, key_of

from pfkey import (
    Action,
    Assignment,
    ChannelClosed,
    EncodeError,
    ForeignPolicy,
    Kernel,
    KernelError,
    MessageType,
    NotSupported,
    NotTracked,
    Policy,
    PolicyTracker,
    Selector,
    Template,
    TransactionError,
    sharing,
)
from pfkey import tracker as tracker_module
from pfkey.embedded.profiles import Dialect
from pfkey.errors import PFKeyError, SPDLocked
from pfkey.guards import alias_selectors
from pfkey.tracker import State, TrackedPolicy
from pfkey.uses import lingers_until

PATIENCE = 300
"""Seconds after which a play counts as stuck."""


@dataclass(frozen=True)
class Setup:
    """How the tracker of a play is made."""

    owner: str | None = None
    ownership: str = "refuse"
    guard: str = "auto"
    host_guard: str = "auto"
    linger: float = 0.0
    crowds: bool = False
    """Lists change their form at four assignments already."""


def refused(error: BaseException) -> bool:
    """Whether the caller may take it that an assignment was not recorded: the rule of `PolicyTracker.add`."""
    if isinstance(error, KernelError):
        return not error.outcome_unknown
    return isinstance(error, ForeignPolicy | NotSupported | EncodeError | NotTracked | SPDLocked)


class Frame:
    """One kernel, one tracker after the other, and the model."""

    def __init__(self, profile: str, setup: Setup) -> None:
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        self.setup = setup
        self.world = World(profile)
        self.world.refuses = setup.ownership == "refuse"
        self.world.bare = setup.guard == "bare"
        self.world.bare_hosts = setup.host_guard == "bare"
        self.model = Model()
        self.foreign = kernel_over(self.world.connect("foreign"))
        self.deaf: list[Any] = []
        self._kept = tracker_module._FEW, tracker_module._MANY, sharing.time
        sharing.time = self.world.clock  # type: ignore[assignment]
        if setup.crowds:
            tracker_module._FEW, tracker_module._MANY = 1, 3
        self.abi = self.world.abi
        self.line: Line
        self.tracker: PolicyTracker
        self.lives = 0
        self._begin_life()

    # Lives.

    def _begin_life(self) -> None:
        self._open_line()
        setup = self.setup
        self.tracker = self.make_tracker(
            kernel_over(self.line),
            owner=setup.owner,
            ownership=setup.ownership,
            guard=setup.guard,
            host_guard=setup.host_guard,
            linger=setup.linger,
        )
        self.world.owner = self.book.settings.owner
        self.world.beliefs = self.book
        self.world.relabel()
        self.world.wanted = set()
        self.model = Model(serial=self.model.serial)
        self.lives += 1

    def make_tracker(self, kernel: Kernel, **how: Any) -> PolicyTracker:
        """What the controls replace."""
        return PolicyTracker(kernel, **how)

    def _open_line(self) -> None:
        self.line = self.world.connect("tracker")

    def _end_life(self) -> None:
        """The process is gone, and everything of it with it."""
        if self.tracker._timer is not None:
            self.tracker._timer.cancel()
        self.line.dead = False
        self.line.close()

    def end(self) -> None:
        """Whatever happens."""
        faulthandler.cancel_dump_traceback_later()
        tracker_module._FEW, tracker_module._MANY, sharing.time = self._kept
        if self.tracker._timer is not None:
            self.tracker._timer.cancel()

    @property
    def book(self) -> Any:
        """What the tracker believes: whether it could know whose a policy is, whether its indexes agree."""
        return book_of(self.tracker)

    @property
    def places(self) -> tuple[Where, ...]:
        return self.world.places

    def where(self, number: int) -> Where:
        return self.places[number % len(self.places)]

    def what(self, number: int) -> Assignment:
        number %= len(ASSIGNMENTS) + 1
        return ASSIGNMENTS[number] if number < len(ASSIGNMENTS) else REFUSED

    def which(self, model: Model, where: Where, number: int) -> Assignment:
        """One that uses the policy, or sometimes one that does not."""
        there = model.assignments(where)
        number %= len(there) + 1
        return there[number] if number < len(there) else ASSIGNMENTS[number % len(ASSIGNMENTS)]

    def busy(self, number: int) -> Where:
        """A policy that is used, if there is any."""
        used = [where for where in self.places if where in self.model.lists]
        return used[number % len(used)] if used else self.where(number)

    # The frame around everything that calls the tracker.

    def troubled(self) -> bool:
        """Whether something may go wrong in the next call, or is not as the tracker believes."""
        line = self.line
        return bool(
            self.world.embedded._faults
            or line.death
            or line.interrupt is not None
            or self.world.surprised
            or self.world.disturbed
            or self.deaf
            or line.receive_buffer < 100000  # type: ignore[operator]
            or any(
                tracked.installed.state is State.UNKNOWN
                or tracked.leftover
                or not (
                    tracked.holds_top()
                    or lingers_until(tracked) is not None
                    or tracked.installed.state is State.FOREIGN
                )
                for tracked in self.book
            )
            or not self.book.recovered
        )

    def act(self, what: Callable[[], Any]) -> tuple[Any, BaseException | None]:
        """Let the tracker do something; death ends its life, everything else is what the caller gets."""
        world = self.world
        world.passed += 0.05
        world.sent.clear()
        world.meetings.clear()
        try:
            result, error = what(), None
        except Death as death:
            return None, death
        except (PFKeyError, KeyboardInterrupt) as failure:
            result, error = None, failure
        checks.never_delete_then_add(self)
        world.complain()
        return result, error

    def finish(self, error: BaseException | None) -> None:
        """After every deed: complaints of the world, and the bookkeeping for the next."""
        world = self.world
        if isinstance(error, Death) or self.line.dead:
            world.complain()
            self.restart(readd=0, sweep=False, died=True)
            return
        if isinstance(error, ChannelClosed):
            self.reconnect()
        while self.foreign.channel.receive(0.0) is not None:
            pass
        for tracked in self.book:
            if tracked.installed.state is State.OURS and not world.refuses:
                adopted = world.real(Where(tracked.direction, tracked.selector))
                if adopted is not None and adopted.whose == "foreign":
                    adopted.whose = "shared"  # it took no message
            if tracked.installed.state is State.FOREIGN:
                info = world.real(Where(tracked.direction, tracked.selector))
                if info is not None and not world.surprised and info.whose == "shared":
                    info.whose = "foreign"
        self._rearm()
        checks.lists_agree(self)
        world.complain()

    def _rearm(self) -> None:
        world = self.world
        for where in self.places:
            key = key_of(where)
            if where not in self.model.lists:
                continue
            tracked = self.book.get(where.direction, where.selector)
            info = world.real(where)
            if tracked is not None and tracked.installed.state is State.OURS and info is not None:
                world.armed.add(key)

    def _disarm(self, where: Where) -> None:
        self.world.armed.discard(key_of(where))

    # A new life.

    def restart(self, *, readd: int, sweep: bool, died: bool = False) -> None:
        """A new process takes over: it adds some of what the old one had, in its first call or one after the other."""
        before = self.model
        self._end_life()
        self._begin_life()
        self.world.complain()
        self.world.disturbed = True
        if died:
            return
        again = [
            (where, assignment)
            for number, where in enumerate(self.places)
            for assignment in reversed(before.assignments(where))
            if readd >> number & 1
        ]
        sweep = sweep and self.setup.owner is not None
        after = self.model.copy()
        for where, assignment in again:
            after.add(where, assignment)
        if sweep:
            self._disarm_unwanted(after)
        self.world.wanted |= {key_of(where) for where, _ in again}

        def take_over() -> None:
            with self.tracker.transaction(sweep=sweep):
                for where, assignment in again:
                    self.tracker.add(*where, assignment)

        _, error = self.act(take_over)
        if isinstance(error, Death):
            self.finish(error)
            return
        touched = {where for where, _ in again}
        self._outcome(Model(serial=after.serial), after, error, touched, touched)
        self.finish(error)

    def _outcome(
        self, before: Model, after: Model, error: BaseException | None, adding: set[Where], touched: set[Where]
    ) -> None:
        """What the lists are after a transaction that came to its end."""
        if isinstance(error, TransactionError):
            for where in touched:
                failure = error.errors.get(f"{where.direction.name.lower()} {where.selector}")
                if failure is not None and where in adding and where in after.lists and refused(failure):
                    del after.lists[where]
                    if where in before.lists:
                        after.lists[where] = before.lists[where]
        elif isinstance(error, KeyboardInterrupt):
            for where in touched:
                if self.tracker.assignments(*where) == before.assignments(where):
                    after.lists.pop(where, None)
                    if where in before.lists:
                        after.lists[where] = before.lists[where]
        self.model = after

    def snapshot(self) -> object:
        return [str(info) for info in self.world.entries.values()]

    def _disarm_unwanted(self, model: Model) -> None:
        for where in self.places:
            if where not in model.lists:
                self._disarm(where)

    # What goes wrong.

    def fault(self, kind: MessageType | None, when: str, error: str | None, skip: int) -> None:
        with contextlib.suppress(ValueError):  # this kernel cannot do that wrong
            self.world.embedded.fail_next(kind, error, when, skip=skip)

    def interrupt(self, after: int) -> None:
        self.line.interrupt = after

    def will_die(self, after: int, *, delivered: bool) -> None:
        self.line.death = (after, delivered)

    def small_buffer(self, size: int, *, listener: bool) -> None:
        """The tracker's receive buffer, or that of somebody who never reads, holds hardly anything.

        On Linux a dump into less than the room of three messages never goes on.
        """
        if self.world.embedded.profile.dialect is Dialect.AF_KEY:
            size = max(size, 8192)
        if listener:
            deaf = self.world.embedded.connect()
            deaf.set_receive_buffer(size)
            self.deaf.append(deaf)
        else:
            self.line.inner.set_receive_buffer(size)

    def lose_connection(self) -> None:
        self.line.inner.close()
        _, error = self.act(lambda: self.tracker.resync())
        assert error is not None
        if not isinstance(error, Death):
            self.reconnect()

    def reconnect(self) -> None:
        self.line.inner.close()
        self.world.disturbed = True
        self._open_line()
        self.tracker.reconnect(kernel_over(self.line))

    def pass_time(self, seconds: float) -> None:
        self.world.embedded.advance(seconds)
        if self.setup.linger:
            self.world.disturbed = False
            _, error = self.act(lambda: self.tracker.close())
            self.finish(error)

    def stranger(self, deed: str, number: int, what: int) -> None:
        """Somebody else changes the SPD."""
        embedded = self.world.embedded
        kept, embedded._faults = embedded._faults, []
        try:
            self._stranger(deed, self.busy(number) if number & 1 else self.where(number), what)
        finally:
            embedded._faults = kept
        self.world.complain()

    def _stranger(self, deed: str, where: Where, what: int) -> None:
        kernel = self.foreign
        if deed == "flush":
            with contextlib.suppress(KernelError):  # FreeBSD 11 with somebody who does not read: done, and ENOBUFS
                kernel.flush_policies()
            return
        selector = where.selector
        if deed == "alias":  # where a guard would want to be
            aliases = list(alias_selectors(selector, self.abi))
            if not aliases:
                return
            selector, deed = aliases[what % len(aliases)], "add"
        policy = self._their_policy(where, selector, what)
        with contextlib.suppress(KernelError):
            if deed == "add":
                kernel.add_policy(policy)
            elif deed == "update":
                kernel.update_policy(policy)
            else:
                kernel.delete_policy(policy)

    def _their_policy(self, where: Where, selector: Selector, what: int) -> Policy:
        number = 350000 + what if self.abi.has_priority else 0
        choices = [
            Policy(where.direction, selector, Action.DISCARD, priority=number),
            Policy(
                where.direction,
                selector,
                Action.IPSEC,
                (Template.tunnel("192.0.2.77", "192.0.2.78", reqid=77),),
                number,
            ),
        ]
        top = self.model.top(where)
        if top is not None and selector == where.selector:
            choices.append(TrackedPolicy(where.direction, selector, self.abi).policy(top))
        return choices[what % len(choices)]

    def calm_down(self) -> None:
        embedded, line = self.world.embedded, self.line
        embedded._faults.clear()
        embedded.release_replies()
        line.death = line.interrupt = None
        line.inner.set_receive_buffer(200000)
        for deaf in self.deaf:
            deaf.close()
        self.deaf.clear()
        self.world.disturbed = False


def book_of(tracker: PolicyTracker) -> Any:
    """A tracker's own book."""
    return tracker._book if hasattr(tracker, "_book") else tracker._tracking.book
