"""The tracker's state machine without hypothesis: calls, what may come of each, and what must be true afterwards.

`Play` carries out one thing after the other over an embedded kernel and keeps a model beside the tracker.  Whatever it
is told to do is possible in any state, so that a recorded play can be shortened at will.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import machine_checks as checks
from machine_frame import Frame, Setup, refused
from machine_model import REFUSED, Model, Where
from machine_threads import threads
from machine_world import Death, key_of

from pfkey import (
    Assignment,
    EncodeError,
    ForeignPolicy,
    NotSupported,
    NotTracked,
    TransactionError,
)
from pfkey.uses import tunnel_calls


@dataclass(frozen=True)
class Change:
    """What one line of a transaction or of a thread does."""

    verb: str
    where: int
    what: int
    which: int


class Interrupted(Exception):
    """What a caller raises inside a transaction."""


class Play(Frame):
    """What a caller may do, one thing after the other."""

    # One call.

    def call(self, verb: str, where: Where, old: Assignment | None, new: Assignment | None) -> None:
        before, after = self.model, self.model.copy()
        legal = self._apply(after, verb, where, old, new)
        if old is not None and where not in after.lists:
            self._disarm(where)
        self.world.wanted.add(key_of(where))
        calm = not self.troubled()
        first = checks.first_met(self) if calm else {}
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
            checks.calm_call(self, where, change, error, held)
            checks.met_before_or_after(self, first)
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
        first = checks.first_met(self) if calm else {}
        spd = self.snapshot()
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
            assert self.snapshot() == spd
            self.finish(None)
            return
        self._outcome(before, after, error, adding, touched)
        calm &= not self.world.disturbed
        if calm and error is None:
            checks.calm_transaction(self, transaction, held, sweep=sweep)
            checks.never_bare_if_covered(self, first)
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

    # The rest of what a caller can do.

    def threads(self, lines: Sequence[Sequence[Change]]) -> None:
        """Several callers at once."""
        threads(self, lines)

    def tunnel(self, assignment: Assignment, *, remove: bool) -> None:
        """A whole tunnel in one call: a transaction that the tracker makes."""
        selector = self.places[0].selector
        pairs = ((assignment, None), None) if remove else (None, (assignment, None))
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
        before = self.snapshot()
        self.world.disturbed = False
        calm = not self.troubled()
        explanation = self.tracker.explain(*where)
        assert str(explanation)
        assert explanation.assignments == self.model.assignments(where)
        found, error = self.act(lambda: self.tracker.query(*where))
        if not self.line.dead:
            assert not checks.written(self)
            assert self.snapshot() == before
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

    # When nothing goes wrong any more.

    def settle(self) -> None:
        """Faults stop, late replies come, one resync: then the kernel holds what the lists say, and nothing else."""
        self.calm_down()
        differences, error = self.act(self.tracker.resync)
        assert error is None, repr(error)
        for one in differences:
            stays = "was to take its packets over" in str(one.error) and checks.is_blocked(self, one.direction)
            assert one.error is None or isinstance(one.error, ForeignPolicy) or stays, (
                f"a resync could not put right: {one}"
            )
        self.world.surprised = False
        self.finish(None)
        checks.settled(self)


@contextlib.contextmanager
def playing(profile: str, setup: Setup, kind: type[Play] = Play) -> Iterator[Play]:
    """A play that is ended whatever happens."""
    play = kind(profile, setup)
    try:
        yield play
    finally:
        play.end()
