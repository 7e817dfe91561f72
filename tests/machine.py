"""The tracker's state machine without hypothesis: calls, what may come of each, and what must be true afterwards.

`Play` carries out one thing after the other over an embedded kernel and keeps a model beside the tracker.  Whatever it
is told to do is possible in any state, so that a recorded play can be shortened at will.
"""

from __future__ import annotations

import contextlib
import faulthandler
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from machine_model import ASSIGNMENTS, REFUSED, Model, Where
from machine_world import WRITES, Death, Info, Line, Sent, World, is_discard_guard, kernel_over, key_of

from pfkey import (
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
from pfkey.constants import Action
from pfkey.embedded.profiles import Dialect
from pfkey.errors import PFKeyError, SPDLocked
from pfkey.guards import Kind, alias_selectors
from pfkey.tracker import State, TrackedPolicy, image_of_policy
from pfkey.uses import tunnel_calls

ADD, UPD, DEL = WRITES
NAMED = "the machine"
PATIENCE = 60
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


@dataclass(frozen=True)
class Change:
    """What one line of a transaction or of a thread does."""

    verb: str
    where: int
    what: int
    which: int


class Play:
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
                or not (tracked.holds_top() or self.setup.linger or tracked.installed.state is State.FOREIGN)
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
        self._never_delete_then_add()
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
        self._check_lists()
        world.complain()

    def _never_delete_then_add(self) -> None:
        deleted: set[object] = set()
        for kind, key, message in self.world.sent:
            if key is None:
                continue
            if kind == DEL:
                deleted.add(key)
            elif kind == ADD:
                assert key not in deleted, f"SPDDELETE, then SPDADD for one policy in one call: {message!r}"

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

    def _check_lists(self) -> None:
        for where in self.places:
            has = self.tracker.assignments(*where)
            assert has == self.model.assignments(where), (
                f"the list of {where} is {has}, not {self.model.assignments(where)}"
            )

    def _disarm(self, where: Where) -> None:
        self.world.armed.discard(key_of(where))

    # One call.

    def call(self, verb: str, where: Where, old: Assignment | None, new: Assignment | None) -> None:
        before, after = self.model, self.model.copy()
        legal = self._apply(after, verb, where, old, new)
        if old is not None and where not in after.lists:
            self._disarm(where)
        self.world.wanted.add(key_of(where))
        calm = not self.troubled()
        first = self._first_met() if calm else {}
        held = self.world.real(where)
        self.world.disturbed = False
        method = getattr(self.tracker, verb)
        arguments = [one for one in (old, new) if one is not None]
        change, error = self.act(lambda: method(*where, *arguments))
        if isinstance(error, Death):
            self.finish(error)
            return
        if not legal:
            assert error is not None
        if isinstance(error, NotTracked):
            assert not legal
        elif isinstance(error, KeyboardInterrupt):
            # Whether it was taken back already when Ctrl-C came, nobody was told.
            if self.tracker.assignments(*where) != before.assignments(where):
                self.model = after
        elif error is None or (legal and (new is None or not refused(error))):
            self.model = after
        if calm and not self.world.disturbed:
            self._calm(where, change, error, held)
            self._met_before_or_after(first)
        self.finish(error)

    def _apply(self, model: Model, verb: str, where: Where, old: Assignment | None, new: Assignment | None) -> bool:
        """Let the model do it; whether it can be done."""
        if verb == "add":
            assert new is not None
            model.add(where, new)
        elif verb == "remove":
            assert old is not None
            return model.remove(where, old)
        else:
            assert old is not None
            assert new is not None
            return model.replace(where, old, new)
        return True

    def _calm(self, where: Where, change: Any, error: BaseException | None, held: Info | None) -> None:
        """Nothing went wrong and nothing was unknown: what the table says was sent, and the Change tells it."""
        writes = self._writes()
        kinds = [sent.type for sent in writes]
        if isinstance(error, ForeignPolicy):
            assert held is not None
            assert held.whose != "ours", "our own policy was refused as somebody else's"
            asked = [sent.type for sent in writes if sent.key == key_of(where)]
            assert asked in ([], [ADD]), "SPDADD is how it was met, nothing else is sent"
            assert kinds == asked or not self.abi.has_priority, "others were touched"
            return
        if error is not None:
            assert isinstance(error, NotTracked | NotSupported | EncodeError), f"nothing went wrong, but: {error!r}"
            assert not writes
            return
        if held is not None and held.whose == "foreign" and writes and writes[0].type == ADD:
            del writes[0]  # it was met by that
        about = [sent for sent in writes if sent.key == key_of(where)]
        key, top = key_of(where), self.model.top(where)
        movers = self.abi.has_priority is False
        others = [sent for sent in writes if sent.key is not None and sent.key != key]
        assert movers or not others, f"messages about other policies: {others}"
        counted = Counter(kinds)
        assert Counter((*change.sent, *change.guard)) == counted, f"{change!r} was told, {counted} was sent"
        assert len(change.sent) <= 1
        desired = None if top is None else self.image(where, top)
        ours = held is not None and (held.whose != "foreign" or self.setup.ownership == "adopt")
        if held is not None and ours and desired == image_of_policy(held.policy, self.abi):
            # Where order is by insertion, another rank with the same image moves it, or others behind it.
            kinds = [sent.type for sent in writes if sent.key is not None]
            assert set(kinds) <= {UPD} if movers else not writes, f"the kernel held it already, yet: {writes}"
        elif held is None and desired is not None:
            assert [sent.type for sent in about] == [ADD] or (movers and about[0].type == ADD)
        elif held is not None and desired is not None:
            assert {sent.type for sent in about} == {UPD}
            assert len(about) == 1 or (movers and len(about) == 2)
        elif held is not None and held.whose != "foreign" and not self.setup.linger:
            assert [sent.type for sent in about] == [DEL]
        else:
            assert not about

    def image(self, where: Where, assignment: Assignment) -> Any:
        return TrackedPolicy(where.direction, where.selector, self.abi).image(assignment)

    def _writes(self) -> list[Sent]:
        return [sent for sent in self.world.sent if sent.type in WRITES]

    def _first_met(self) -> dict[object, Info | None]:
        """What the packet of each armed policy meets before a call."""
        by_key = self.world.by_key
        return {key: self.world.met(by_key[key]) for key in self.world.armed}

    def _met_before_or_after(self, first: dict[Any, Info | None]) -> None:
        """While one policy changes, a packet meets what it met before or what it meets afterwards, or their guards."""
        for key, meetings in self.world.meetings.items():
            if key not in first or self.world.is_bare(key):
                continue
            ends = [first[key], self.world.met(self.world.by_key[key])]
            allowed = {info.key or id(info) for info in ends if info is not None}
            for step, info in meetings:
                if info is None or is_discard_guard(info):
                    continue
                assert (info.key or id(info)) in allowed, (
                    f"at step {step!r} a packet of {self.world.by_key[key]} met {info}, before the call {ends[0]} and"
                    f" after it {ends[1]}; sent was {self._writes()}"
                )

    # Transactions.

    def transaction(self, changes: Sequence[Change], *, raises: int | None, sweep: bool) -> None:
        sweep = sweep and self.setup.owner is not None
        before, after = self.model, self.model.copy()
        adding: set[Where] = set()
        touched: set[Where] = set()
        body: list[Callable[[], object]] = []
        for change in changes:
            self._plan(change, after, body, adding, touched)
        gone = [where for where in touched if where not in after.lists]
        if raises is None:
            for where in gone:
                self._disarm(where)
            if sweep:
                self._disarm_unwanted(after)
        self.world.wanted |= {key_of(where) for where in touched}
        if sweep:
            self.world.wanted |= set(self.world.by_key)
        calm = not self.troubled()
        held = {where: self.world.real(where) for where in touched}
        first = self._first_met() if calm else {}
        spd = self._snapshot()
        self.world.disturbed = False

        def run() -> object:
            with self.tracker.transaction(sweep=sweep) as transaction:
                for number, one in enumerate(body):
                    if number == raises:
                        raise Interrupted
                    one()
                if raises is not None:
                    raise Interrupted
            return transaction

        transaction, error = self.act(lambda: self._catching(run))
        if isinstance(error, Death):
            self.finish(error)
            return
        if raises is not None:
            assert error is None
            assert transaction is Interrupted
            assert not self.world.sent, "a transaction that was given up sent something"
            assert self._snapshot() == spd
            self.finish(None)
            return
        self._outcome(before, after, error, adding, touched)
        calm &= not self.world.disturbed
        if calm and error is None:
            self._calm_transaction(transaction, held, sweep=sweep)
            self._never_bare_if_covered(first)
        elif calm:
            assert isinstance(error, TransactionError), f"nothing went wrong, but: {error!r}"
            for one in error.errors.values():
                assert isinstance(one, ForeignPolicy) or "was not deleted" in str(one), (
                    f"nothing went wrong, but: {one!r}"
                )
        self.finish(error)

    @staticmethod
    def _catching(run: Callable[[], object]) -> object:
        try:
            return run()
        except Interrupted:
            return Interrupted

    def _plan(
        self, change: Change, model: Model, body: list[Callable[[], object]], adding: set[Where], touched: set[Where]
    ) -> None:
        """One line of a transaction: carried out in the model now, in the tracker by what is put into `body`."""
        verb, tracker = change.verb, self.tracker
        where = self.where(change.where) if verb == "add" else self._used(model, change.where)
        what, old = self.what(change.what), self.which(model, where, change.which)
        if verb == "remove":
            what = None  # type: ignore[assignment]
        elif verb == "add":
            old = None  # type: ignore[assignment]
        if what is REFUSED or (old is not None and old not in model.assignments(where)):
            arguments = [one for one in (old, what) if one is not None]

            def vain() -> None:
                with contextlib.suppress(NotTracked, NotSupported, EncodeError):
                    getattr(tracker, verb)(*where, *arguments)
                    raise AssertionError(f"{verb} of {arguments} was possible")

            body.append(vain)
            return
        self._apply(model, verb, where, old, what)
        touched.add(where)
        if what is not None:
            adding.add(where)
        method = getattr(tracker, verb)
        arguments = [one for one in (old, what) if one is not None]
        body.append(lambda: method(*where, *arguments))

    def _used(self, model: Model, number: int) -> Where:
        used = [where for where in self.places if where in model.lists]
        return used[number % len(used)] if used else self.where(number)

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

    def _calm_transaction(self, transaction: Any, held: dict[Where, Info | None], *, sweep: bool) -> None:
        writes = self._writes()
        counts = Counter((sent.key, sent.type) for sent in writes if sent.key is not None)
        if not sweep:
            assert Counter(transaction.sent) == Counter(sent.type for sent in writes)
        for where, info in held.items():
            top = self.model.top(where)
            if info is not None and info.whose == "foreign" and counts[key_of(where), ADD]:
                counts[key_of(where), ADD] -= 1  # it was met by that
            kinds = [kind for (key, kind), count in counts.items() if key == key_of(where) and count]
            if self.abi.has_priority:
                assert sum(counts[key_of(where), kind] for kind in kinds) <= 1, f"{where}: {writes}"
                equal = (
                    top is not None
                    and info is not None
                    and self.image(where, top) == image_of_policy(info.policy, self.abi)
                )
                if equal and info is not None and info.whose == "ours":
                    assert not kinds, f"{where} was right already, yet {kinds} were sent"
            # Where order is by insertion, what goes at the end may have to be put behind something else first.
            assert not (DEL in kinds and ADD in kinds)
            assert not (DEL in kinds and UPD in kinds and self.abi.has_priority)

    def _never_bare_if_covered(self, first: dict[Any, Info | None]) -> None:
        """A policy that goes hands its packets over: who is covered before and after is covered in between."""
        for key, meetings in self.world.meetings.items():
            if first.get(key) is None or self.world.met(self.world.by_key[key]) is None:
                continue
            for step, info in meetings:
                assert info is not None or self.world._excused(step, key), (
                    f"at {step!r} {self.world.by_key[key]} was bare"
                )

    def _snapshot(self) -> object:
        return [str(info) for info in self.world.entries.values()]

    def _disarm_unwanted(self, model: Model) -> None:
        for where in self.places:
            if where not in model.lists:
                self._disarm(where)

    # The rest of what a caller can do.

    def tunnel(self, assignment: Assignment, *, remove: bool) -> None:
        """A whole tunnel in one call: a transaction that the tracker makes."""
        selector = self.places[0].selector
        none = (None, None)
        pairs = ((assignment, None), none) if remove else (none, (assignment, None))
        before, after = self.model, self.model.copy()
        touched: set[Where] = set()
        legal = True
        for direction, where, old, new in tunnel_calls(self.abi, selector, *pairs):
            place = Where(direction, where.canonical())
            touched.add(place)
            legal &= self._apply(after, "remove" if remove else "add", place, old, new)
            if place not in after.lists:
                self._disarm(place)
        self.world.wanted |= {key_of(place) for place in touched}
        self.world.disturbed = False
        method = self.tracker.remove_tunnel if remove else self.tracker.add_tunnel
        _, error = self.act(lambda: method(selector, assignment))
        if isinstance(error, Death):
            self.finish(error)
            return
        if legal:
            assert not isinstance(error, NotTracked)
            self._outcome(before, after, error, set() if remove else touched, touched)
        else:
            assert isinstance(error, NotTracked), repr(error)
        self.finish(error)

    def flush(self) -> None:
        self.world.disturbed = False
        for where in self.places:
            self._disarm(where)
        calm = not self.troubled()
        _, error = self.act(self.tracker.flush)
        self.model = Model(serial=self.model.serial)
        if calm and not self.world.disturbed:
            assert error is None, repr(error)
            assert len(self.tracker) == 0
        self.finish(error)

    def resync(self) -> None:
        self.world.disturbed = False
        calm = not self.troubled()
        differences, error = self.act(self.tracker.resync)
        if calm and not self.world.disturbed and error is None:
            shared = any(info.whose == "shared" for info in self.world.entries.values())
            told = [one for one in differences if not isinstance(one.error, ForeignPolicy)]
            assert shared or not told, [str(one) for one in told]
        self.finish(error)

    def look(self, where: Where) -> None:
        """Ask everything that can be asked: nothing is changed by it."""
        before = self._snapshot()
        self.world.disturbed = False
        calm = not self.troubled()
        explanation = self.tracker.explain(*where)
        assert str(explanation)
        assert explanation.assignments == self.model.assignments(where)
        found, error = self.act(lambda: self.tracker.query(*where))
        if not self.line.dead:
            assert not self._writes()
            assert self._snapshot() == before
            held = self.world.real(where)
            if (
                calm
                and not self.world.disturbed
                and where in self.model.lists
                and held is not None
                and held.whose == "ours"
            ):
                assert found is not None, repr(error)
                assert found.id == held.policy.id
                assert self.tracker.find(found.id) == tuple(where)
                if not self.setup.linger:
                    assert explanation.would_send == (), str(explanation)
        self.finish(error)

    def threads(self, lines: Sequence[Sequence[Change]]) -> None:
        """Several callers at once; each adds what no other one touches, and takes some of it back."""
        world = self.world
        world.disturbed = False
        for where in self.places:
            world.wanted.add(key_of(where))
        results: list[list[tuple[str, Where, Assignment, bool]]] = [[] for _ in lines]
        strange: list[BaseException] = []
        self.world.sent.clear()
        self.world.meetings.clear()
        could_empty = {self.where(change.where) for line in lines for change in line}
        for where in could_empty:
            if where not in self.model.lists:
                self._disarm(where)

        def one(number: int, line: Sequence[Change]) -> None:
            mine: list[tuple[Where, Assignment]] = []
            try:
                for change in line:
                    self._threaded(number, change, mine, results[number])
            except Death:
                pass
            except BaseException as error:
                strange.append(error)

        workers = [threading.Thread(target=one, args=(number, line), daemon=True) for number, line in enumerate(lines)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(PATIENCE / 2)
            assert not worker.is_alive(), "the callers wait for each other for ever"
        if strange:
            raise strange[0]
        if self.line.dead:
            self.finish(Death())
            return
        self._after_threads(results)
        self.world.sent.clear()  # of several calls
        self.finish(None)

    def _threaded(
        self,
        number: int,
        change: Change,
        mine: list[tuple[Where, Assignment]],
        result: list[tuple[str, Where, Assignment, bool]],
    ) -> None:
        if change.verb == "remove" and mine:
            where, assignment = mine.pop(change.which % len(mine))
            verb = "remove"
        else:
            where, base = self.where(change.where), ASSIGNMENTS[change.what % len(ASSIGNMENTS)]
            verb, assignment = "add", _variant(base, number)
        try:
            getattr(self.tracker, verb)(*where, assignment)
            told = True
        except KeyboardInterrupt:
            told = assignment in self.tracker.assignments(*where)
        except ChannelClosed:
            told = True
        except PFKeyError as error:
            told = not refused(error)
        if verb == "remove":
            result.append((verb, where, assignment, True))
        elif told:
            mine.append((where, assignment))
            result.append((verb, where, assignment, True))

    def _after_threads(self, results: Sequence[Sequence[tuple[str, Where, Assignment, bool]]]) -> None:
        """The order among threads is anybody's: what the lists hold is known, in which order only by rank."""
        wanted = {where: Counter(self.model.assignments(where)) for where in self.places}
        for result in results:
            for verb, where, assignment, _ in result:
                wanted[where][assignment] += 1 if verb == "add" else -1
        rebuilt = Model(serial=self.model.serial)
        for where in self.places:
            has = self.tracker.assignments(*where)
            assert Counter(has) == +wanted[where], f"{where}: {has}, not {wanted[where]}"
            for assignment in reversed(has):
                rebuilt.add(where, assignment)
            assert rebuilt.assignments(where) == has
        self.model = rebuilt

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

    # When nothing goes wrong any more.

    def settle(self) -> None:
        """Faults stop, late replies come, one resync: then the kernel holds what the lists say, and nothing else."""
        self.calm_down()
        differences, error = self.act(self.tracker.resync)
        assert error is None, repr(error)
        for one in differences:
            stays = "was to take its packets over" in str(one.error) and self._is_blocked(one.direction)
            assert one.error is None or isinstance(one.error, ForeignPolicy) or stays, (
                f"a resync could not put right: {one}"
            )
        self.world.surprised = False
        self.finish(None)
        self.check_settled()

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

    def check_settled(self) -> None:
        world = self.world
        for where in self.places:
            top, held = self.model.top(where), world.real(where)
            tracked = self.book.get(*where)
            if top is None:
                lingers = (
                    tracked is not None and tracked.troubles is not None and tracked.troubles.lingers_until is not None
                )
                lingers |= self._is_blocked(where.direction)
                former = self.lives > 1 and self.setup.owner is not None and tracked is None
                assert held is None or held.whose != "ours" or lingers or former, (
                    f"nobody uses it, yet the kernel has {held}"
                )
                continue
            assert held is not None, f"{top} is on top of {where}, yet the kernel has no policy: {self._snapshot()}"
            if held.whose == "foreign" and world.refuses:
                continue
            assert image_of_policy(held.policy, self.abi) == self.image(where, top), f"{top} is on top, yet {held}"
            assert tracked is not None
            assert tracked.installed.state is State.OURS
            assert tracked.installed.policy_id == held.policy.id
        real = {info.key for info in world.entries.values() if info.guard is None}
        for guard in world.guards():
            # A discard guard of a dead process whose policy nobody wants is left where it is: it drops.
            orphan = (
                guard.guard not in (Kind.ALIAS, Kind.FILLER)
                and guard.key not in real
                and guard.owner != 0
                and self.lives > 1
            )
            assert orphan, f"a guard is left: {guard}; {self._snapshot()}"
        if not self.abi.has_priority:
            self._check_order()
        self._check_index()

    def _is_blocked(self, direction: int) -> bool:
        """Whether somebody else holds the selector of a policy that is wanted: then others may have to stay for it."""
        return any(
            one.direction == direction and len(one) and one.installed.state is State.FOREIGN for one in self.book
        )

    def _check_index(self) -> None:
        """The indexes say what the policies say."""
        book = self.book
        for direction in self.abi.directions:
            ours = [one for one in book if one.direction == direction and one.installed.state is State.OURS]
            assert book.standing[int(direction)] == len(ours)
            for tracked in ours:
                assert book.ids[tracked.installed.policy_id] is tracked
        assert len(book.ids) == sum(1 for one in book if one.installed.policy_id)
        assert not any(tracked.busy for tracked in book)

    def _check_order(self) -> None:
        """A kernel that orders by insertion has the stronger of two policies that overlap in front."""
        from pfkey.overlaps import overlap

        for direction in self.abi.directions:
            infos = [info for info in self.world.order(direction) if info.key is not None and info.whose == "ours"]
            places = [self.world.by_key[info.key] for info in infos if info.key is not None]
            ranks = [
                TrackedPolicy(*where, self.abi).priority(top) if (top := self.model.top(where)) else None
                for where in places
            ]
            for number, (where, rank) in enumerate(zip(places, ranks, strict=True)):
                for other, theirs in zip(places[number + 1 :], ranks[number + 1 :], strict=True):
                    if rank is None or theirs is None or not overlap(where.selector, other.selector):
                        continue
                    assert rank <= theirs, f"{where} ({rank}) stands in front of {other} ({theirs})"


def book_of(tracker: PolicyTracker) -> Any:
    """A tracker's own book."""
    return tracker._book if hasattr(tracker, "_book") else tracker._tracking.book


class Interrupted(Exception):
    """What a caller raises inside a transaction."""


def _variant(assignment: Assignment, number: int) -> Assignment:
    """The same use by another SA: a thread's own."""
    spi = assignment.spi
    own = (*spi[:-1], spi[-1] + 256 * (number + 1)) if isinstance(spi, tuple) else spi + 256 * (number + 1)
    return Assignment(
        *assignment.templates, spi=own, action=assignment.action, rank=assignment.rank, priority=assignment.priority
    )


@contextlib.contextmanager
def playing(profile: str, setup: Setup, kind: type[Play] = Play) -> Iterator[Play]:
    """A play that is ended whatever happens."""
    play = kind(profile, setup)
    try:
        yield play
    finally:
        play.end()
