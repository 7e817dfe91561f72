"""Several callers of one tracker at once, as a step of its state machine."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from machine_frame import PATIENCE, refused
from machine_model import ASSIGNMENTS, Model, Where
from machine_world import Death, key_of

from pfkey import (
    Assignment,
    ChannelClosed,
)
from pfkey.errors import PFKeyError

if TYPE_CHECKING:
    from machine import Change, Play


def threads(play: Play, lines: Sequence[Sequence[Change]]) -> None:
    """Several callers at once; each adds what no other one touches, and takes some of it back."""
    world = play.world
    world.disturbed = False
    for where in play.places:
        world.wanted.add(key_of(where))
    results: list[list[tuple[str, Where, Assignment, bool]]] = [[] for _ in lines]
    strange: list[BaseException] = []
    play.world.sent.clear()
    play.world.meetings.clear()
    could_empty = {play.where(change.where) for line in lines for change in line}
    for where in could_empty:
        if where not in play.model.lists:
            play._disarm(where)

    def one(number: int, line: Sequence[Change]) -> None:
        mine: list[tuple[Where, Assignment]] = []
        try:
            for change in line:
                _threaded(play, number, change, mine, results[number])
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
    if play.line.dead:
        play.finish(Death())
        return
    _after_threads(play, results)
    play.world.sent.clear()  # of several calls
    play.finish(None)


def _threaded(
    play: Play,
    number: int,
    change: Change,
    mine: list[tuple[Where, Assignment]],
    result: list[tuple[str, Where, Assignment, bool]],
) -> None:
    if change.verb == "remove" and mine:
        where, assignment = mine.pop(change.which % len(mine))
        verb = "remove"
    else:
        where, base = play.where(change.where), ASSIGNMENTS[change.what % len(ASSIGNMENTS)]
        verb, assignment = "add", _variant(base, number)
    try:
        getattr(play.tracker, verb)(*where, assignment)
        told = True
    except KeyboardInterrupt:
        told = assignment in play.tracker.assignments(*where)
    except ChannelClosed:
        told = True
    except PFKeyError as error:
        told = not refused(error)
    if verb == "remove":
        result.append((verb, where, assignment, True))
    elif told:
        mine.append((where, assignment))
        result.append((verb, where, assignment, True))


def _after_threads(play: Play, results: Sequence[Sequence[tuple[str, Where, Assignment, bool]]]) -> None:
    """The order among threads is anybody's: what the lists hold is known, in which order only by rank."""
    wanted = {where: Counter(play.model.assignments(where)) for where in play.places}
    for result in results:
        for verb, where, assignment, _ in result:
            wanted[where][assignment] += 1 if verb == "add" else -1
    rebuilt = Model(serial=play.model.serial)
    for where in play.places:
        has = play.tracker.assignments(*where)
        assert Counter(has) == +wanted[where], f"{where}: {has}, not {wanted[where]}"
        for assignment in reversed(has):
            rebuilt.add(where, assignment)
        assert rebuilt.assignments(where) == has
    play.model = rebuilt


def _variant(assignment: Assignment, number: int) -> Assignment:
    """The same use by another SA: a thread's own."""
    spi = assignment.spi
    own = (*spi[:-1], spi[-1] + 256 * (number + 1)) if isinstance(spi, tuple) else spi + 256 * (number + 1)
    return Assignment(
        *assignment.templates, spi=own, action=assignment.action, rank=assignment.rank, priority=assignment.priority
    )
