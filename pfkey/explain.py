"""Says in words what a tracker knows of a policy, and what it would do now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .assignment import Assignment
from .book import Book, Ownership
from .constants import Direction, MessageType
from .guarding import plan_guard
from .messages import Selector
from .reorder import moves
from .tracker import State, Step, TrackedPolicy, decide, image_text
from .uses import state_text
from .work import LINGERS, MESSAGES, REASONS, UNCHANGED, UNUSED, Work

__all__ = ["Explanation", "explain", "unknown"]


@dataclass(frozen=True, slots=True)
class Explanation:
    """A policy as the tracker sees it; `str()` of it is for people.

    `assignments` are what uses it, the one on top first; `desired` what the kernel should hold, `installed` what it
    holds as far as is known; `would_send` and `would_guard` the messages that the next call for it would take as things
    are, `reason` the rule behind that; `warnings` what is wrong with it beside others.
    """

    direction: Direction
    selector: Selector
    assignments: tuple[Assignment, ...]
    desired: str
    installed: str
    policy_id: int
    would_send: tuple[MessageType, ...]
    would_guard: tuple[MessageType, ...]
    reason: str
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.direction.name.lower()} {self.selector}" + (f" (id {self.policy_id})" if self.policy_id else "")
        yield f"  the kernel should hold: {self.desired}"
        yield f"  {self.installed}"
        kinds = [*self.would_guard[: len(self.would_guard) // 2], *self.would_send]
        kinds += self.would_guard[len(self.would_guard) // 2 :]
        yield f"  would be sent: {', '.join(kind.name for kind in kinds) or 'nothing'}: {self.reason}"
        for number, assignment in enumerate(self.assignments):
            yield f"  {'on top' if not number else f'{number + 1:>6}'}: {assignment!r}"
        if not self.assignments:
            yield "  nothing uses it"
        for text in self.warnings:
            yield f"  warning: {text}"


def unknown(tracked: TrackedPolicy) -> Explanation:
    """A policy that no call was about, or that is over: the kernel may hold somebody else's, which is none of ours."""
    return Explanation(
        tracked.direction,
        tracked.selector,
        (),
        image_text(None),
        "it is not tracked, so whether the kernel holds one of somebody else was not looked at",
        0,
        (),
        (),
        "nobody uses it",
    )


def explain(book: Book, tracked: TrackedPolicy) -> Explanation:
    """What is known of it, and what follows from that."""
    installed = tracked.installed
    step = decide(tracked.desired, installed)
    would_send: tuple[MessageType, ...] = ()
    would_guard: tuple[MessageType, ...] = ()
    if step in MESSAGES:
        would_send = (MESSAGES[step],)
        reason = REASONS[would_send[0]]
    elif step is Step.READ:
        would_send = (MessageType.SPDGET if installed.policy_id else MessageType.SPDDUMP,)
        reason = "what the kernel holds is not certain, so it is read first"
    elif step is Step.REFUSE:
        refuses = book.settings.ownership is Ownership.REFUSE
        reason = "it belongs to somebody else" + (" and is left alone" if refuses else " and would become ours")
    else:
        reason = UNCHANGED if len(tracked) else UNUSED
    if step is Step.DELETE and tracked.troubles is not None and tracked.troubles.lingers_until is not None:
        would_send, reason = (), LINGERS
    if step is Step.UPDATE or (step is Step.ADD and not book.abi.has_priority):
        would_guard, why = _guard(book, tracked, step)
        reason += f"; guarded: {why}" if would_guard else ""
    if tracked.troubles is not None and tracked.troubles.contested:
        reason += (
            "; contested: somebody else keeps changing it, so it is put right only when a call or a resync says so"
        )
    if tracked.leftover:
        reason += "; a guard of a former update is still there and will be deleted"
    return Explanation(
        tracked.direction,
        tracked.selector,
        tracked.assignments,
        image_text(tracked.desired),
        state_text(tracked),
        installed.policy_id if installed.state is not State.ABSENT else 0,
        would_send,
        would_guard,
        reason,
        book.warnings(tracked),
    )


def _guard(book: Book, tracked: TrackedPolicy, step: Step) -> tuple[tuple[MessageType, ...], str]:
    top = tracked.top
    assert top is not None
    policy, image = tracked.policy(top, book.tag), tracked.image(top)
    work = Work(tracked, step=step, policy=policy, image=image, before=tracked.installed)
    plan = plan_guard(book, work) if step is Step.UPDATE else ()
    guards, updates = int(bool(plan)), 0
    if not book.abi.has_priority:
        followers = moves(book, [work])
        guards += sum(bool(plan_guard(book, follower)) for follower in followers)
        # Each is moved behind the guards, then behind the policy; one alone behind a new policy at once.
        updates = len(followers) if step is Step.ADD and len(followers) == 1 else 2 * len(followers)
        if followers:
            work.why += f"{'; ' if work.why else ''}{len(followers)} weaker policies have to be moved behind it"
    kinds = [MessageType.SPDADD] * guards + [MessageType.SPDUPDATE] * updates + [MessageType.SPDDELETE] * guards
    return tuple(kinds), work.why
