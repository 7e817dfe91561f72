"""What must be true in the tracker's state machine: after a call, after one without trouble, when all is settled."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from machine_model import Where
from machine_world import WRITES, Info, Sent, is_discard_guard, key_of

from pfkey import (
    Assignment,
    EncodeError,
    ForeignPolicy,
    NotSupported,
    NotTracked,
)
from pfkey.guards import Kind
from pfkey.overlaps import overlap
from pfkey.tracker import State, TrackedPolicy, image_of_policy

if TYPE_CHECKING:
    from machine_frame import Frame


ADD, UPD, DEL = WRITES


def never_delete_then_add(play: Frame) -> None:
    deleted: set[object] = set()
    for kind, key, message in play.world.sent:
        if key is None:
            continue
        if kind == DEL:
            deleted.add(key)
        elif kind == ADD:
            assert key not in deleted, f"SPDDELETE, then SPDADD for one policy in one call: {message!r}"


def lists_agree(play: Frame) -> None:
    for where in play.places:
        has = play.tracker.assignments(*where)
        assert has == play.model.assignments(where), (
            f"the list of {where} is {has}, not {play.model.assignments(where)}"
        )


def calm_call(play: Frame, where: Where, change: Any, error: BaseException | None, held: Info | None) -> None:
    """Nothing went wrong and nothing was unknown: what the table says was sent, and the Change tells it."""
    writes = written(play)
    kinds = [sent.type for sent in writes]
    if isinstance(error, ForeignPolicy):
        assert held is not None
        assert held.whose != "ours", "our own policy was refused as somebody else's"
        asked = [sent.type for sent in writes if sent.key == key_of(where)]
        assert asked in ([], [ADD]), "SPDADD is how it was met, nothing else is sent"
        assert kinds == asked or not play.abi.has_priority, "others were touched"
        return
    if error is not None:
        assert isinstance(error, NotTracked | NotSupported | EncodeError), f"nothing went wrong, but: {error!r}"
        assert not writes
        return
    if held is not None and held.whose == "foreign" and writes and writes[0].type == ADD:
        del writes[0]  # it was met by that
    about = [sent for sent in writes if sent.key == key_of(where)]
    key, top = key_of(where), play.model.top(where)
    movers = play.abi.has_priority is False
    others = [sent for sent in writes if sent.key is not None and sent.key != key]
    assert movers or not others, f"messages about other policies: {others}"
    counted = Counter(kinds)
    assert Counter((*change.sent, *change.guard)) == counted, f"{change!r} was told, {counted} was sent"
    assert len(change.sent) <= 1
    desired = None if top is None else image(play, where, top)
    ours = held is not None and (held.whose != "foreign" or play.setup.ownership == "adopt")
    if held is not None and ours and desired == image_of_policy(held.policy, play.abi):
        # Where order is by insertion, another rank with the same image moves it, or others behind it.
        kinds = [sent.type for sent in writes if sent.key is not None]
        assert set(kinds) <= {UPD} if movers else not writes, f"the kernel held it already, yet: {writes}"
    elif held is None and desired is not None:
        assert [sent.type for sent in about] == [ADD] or (movers and about[0].type == ADD)
    elif held is not None and desired is not None:
        assert {sent.type for sent in about} == {UPD}
        assert len(about) == 1 or (movers and len(about) == 2)
    elif held is not None and held.whose != "foreign" and not play.setup.linger:
        assert [sent.type for sent in about] == [DEL]
    else:
        assert not about


def image(play: Frame, where: Where, assignment: Assignment) -> Any:
    return TrackedPolicy(where.direction, where.selector, play.abi).image(assignment)


def written(play: Frame) -> list[Sent]:
    return [sent for sent in play.world.sent if sent.type in WRITES]


def first_met(play: Frame) -> dict[object, Info | None]:
    """What the packet of each armed policy meets before a call."""
    by_key = play.world.by_key
    return {key: play.world.met(by_key[key]) for key in play.world.armed}


def met_before_or_after(play: Frame, first: dict[Any, Info | None]) -> None:
    """While one policy changes, a packet meets what it met before or what it meets afterwards, or their guards.

    The content counts: a policy as it was before, which nothing else of the two ends is, may let the packet through.
    Which of equal priorities wins is nobody's promise: on Linux 6.1 it changes with every policy that is linked.
    """

    def what(info: Info) -> tuple[object, ...]:
        image = image_of_policy(info.policy, play.abi)
        return info.key or id(info), image.action, image.requests

    for key, meetings in play.world.meetings.items():
        if key not in first or play.world.is_bare(key):
            continue
        ends = [first[key], play.world.met(play.world.by_key[key])]
        allowed = {what(info) for info in ends if info is not None}
        ties = {info.policy.priority for info in ends if info is not None and play.abi.has_priority}
        for step, info in meetings:
            if info is None or is_discard_guard(info) or info.guard is Kind.BLOCK or info.policy.priority in ties:
                continue
            assert what(info) in allowed, (
                f"at step {step!r} a packet of {play.world.by_key[key]} met {info}, before the call {ends[0]} and"
                f" after it {ends[1]}; sent was {written(play)}"
            )


def calm_transaction(play: Frame, transaction: Any, held: dict[Where, Info | None], *, sweep: bool) -> None:
    writes = written(play)
    counts = Counter((sent.key, sent.type) for sent in writes if sent.key is not None)
    if not sweep:
        assert Counter(transaction.sent) == Counter(sent.type for sent in writes)
    for where, info in held.items():
        top = play.model.top(where)
        if info is not None and info.whose == "foreign" and counts[key_of(where), ADD]:
            counts[key_of(where), ADD] -= 1  # it was met by that
        kinds = [kind for (key, kind), count in counts.items() if key == key_of(where) and count]
        if play.abi.has_priority:
            assert sum(counts[key_of(where), kind] for kind in kinds) <= 1, f"{where}: {writes}"
            equal = (
                top is not None
                and info is not None
                and image(play, where, top) == image_of_policy(info.policy, play.abi)
            )
            if equal and info is not None and info.whose == "ours":
                assert not kinds, f"{where} was right already, yet {kinds} were sent"
        # Where order is by insertion, what goes at the end may have to be put behind something else first.
        assert not (DEL in kinds and ADD in kinds)
        assert not (DEL in kinds and UPD in kinds and play.abi.has_priority)


def never_bare_if_covered(play: Frame, first: dict[Any, Info | None]) -> None:
    """A policy that goes hands its packets over: who is covered before and after is covered in between."""
    for key, meetings in play.world.meetings.items():
        if first.get(key) is None or play.world.met(play.world.by_key[key]) is None:
            continue
        for step, info in meetings:
            assert info is not None or play.world._excused(step, key), f"at {step!r} {play.world.by_key[key]} was bare"


def settled(play: Frame) -> None:
    world = play.world
    for where in play.places:
        top, held = play.model.top(where), world.real(where)
        tracked = play.book.get(*where)
        if top is None:
            lingers = (
                tracked is not None and tracked.troubles is not None and tracked.troubles.lingers_until is not None
            )
            lingers |= is_blocked(play, where.direction)
            former = play.lives > 1 and play.setup.owner is not None and tracked is None
            assert held is None or held.whose != "ours" or lingers or former, (
                f"nobody uses it, yet the kernel has {held}"
            )
            continue
        assert held is not None, f"{top} is on top of {where}, yet the kernel has no policy: {play.snapshot()}"
        if held.whose == "foreign" and world.refuses:
            continue
        assert image_of_policy(held.policy, play.abi) == image(play, where, top), f"{top} is on top, yet {held}"
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
            and play.lives > 1
        )
        assert orphan, f"a guard is left: {guard}; {play.snapshot()}"
    if not play.abi.has_priority:
        _order(play)
    _indexes_agree(play)


def is_blocked(play: Frame, direction: int) -> bool:
    """Whether somebody else holds the selector of a policy that is wanted: then others may have to stay for it."""
    return any(one.direction == direction and len(one) and one.installed.state is State.FOREIGN for one in play.book)


def _indexes_agree(play: Frame) -> None:
    """The indexes say what the policies say."""
    book = play.book
    for direction in play.abi.directions:
        ours = [one for one in book if one.direction == direction and one.installed.state is State.OURS]
        assert book.standing[int(direction)] == len(ours)
        for tracked in ours:
            assert book.ids[tracked.installed.policy_id] is tracked
    assert len(book.ids) == sum(1 for one in book if one.installed.policy_id)
    assert not any(tracked.busy for tracked in book)


def _order(play: Frame) -> None:
    """A kernel that orders by insertion has the stronger of two policies that overlap in front."""
    for direction in play.abi.directions:
        infos = [info for info in play.world.order(direction) if info.key is not None and info.whose == "ours"]
        places = [play.world.by_key[info.key] for info in infos if info.key is not None]
        ranks = [
            TrackedPolicy(*where, play.abi).priority(top) if (top := play.model.top(where)) else None
            for where in places
        ]
        for number, (where, rank) in enumerate(zip(places, ranks, strict=True)):
            for other, theirs in zip(places[number + 1 :], ranks[number + 1 :], strict=True):
                if rank is None or theirs is None or not overlap(where.selector, other.selector):
                    continue
                assert rank <= theirs, f"{where} ({rank}) stands in front of {other} ({theirs})"
