"""Carries the tracker's decisions out over a kernel and remembers what the kernel acknowledged."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from .abi import Abi
from .constants import Action, Direction, Level, MessageType
from .errors import (
    EncodeError,
    ForeignPolicy,
    KernelError,
    NotSupported,
    NotTracked,
    PFKeyError,
    TransactionError,
)
from .messages import Policy, Selector
from .tracker import Assignment, Image, Installed, State, Step, TrackedPolicy, decide, image_of_policy

__all__ = ["Change", "PolicyKernel", "PolicyTracker"]

log = logging.getLogger("pfkey.keeper")


class PolicyKernel(Protocol):
    """What a tracker needs of a kernel; `pfkey.Kernel` has it."""

    @property
    def abi(self) -> Abi: ...
    def check_policy(self, policy: Policy) -> None: ...
    def add_policy(self, policy: Policy) -> Policy: ...
    def update_policy(self, policy: Policy) -> Policy: ...
    def delete_policy(self, policy: Policy) -> Policy: ...
    def get_policy(self, policy_id: int) -> Policy: ...
    def dump_policies(self) -> Sequence[Policy]: ...


@dataclass(frozen=True, slots=True, repr=False)
class Change:
    """What one call did.

    `sent` holds the message sent for the policy itself, at most one, and is empty when nothing had to be sent; `guard`
    holds the messages for its guard, usually none.  `reason` is the rule behind it.
    """

    sent: tuple[MessageType, ...] = ()
    guard: tuple[MessageType, ...] = ()
    reason: str = ""

    def __repr__(self) -> str:
        def names(kinds: tuple[MessageType, ...]) -> str:
            return "(" + ", ".join(kind.name for kind in kinds) + (",)" if len(kinds) == 1 else ")")

        return f"Change(sent={names(self.sent)}" + (f", guard={names(self.guard)})" if self.guard else ")")


class _StoredOtherwise(NotSupported):
    """The kernel accepted a policy and stored another."""


_UNCHANGED = "what the kernel holds is what the assignment on top asks for"
_REASONS = {
    Step.ADD: "the kernel held no policy",
    Step.UPDATE: "what the assignment on top asks for differs from what the kernel holds",
    Step.DELETE: "no assignment is left",
}


class PolicyTracker:
    """Keeps a kernel's policies right while the SAs that use them come and go.

    A policy is identified by direction and selector (address family included, host bits masked).  `add` and `remove`
    say which assignments use it; the kernel hears of it only when what it holds would change: SPDADD for the first,
    SPDUPDATE when another assignment with another image comes to the top, SPDDELETE after the last.  A policy of
    somebody else is neither changed nor deleted (ForeignPolicy).

    After an error whose outcome is not certain the tracker reads the kernel before it acts again.  A tracker may be
    used by several threads: calls for one policy are carried out one after the other.
    """

    def __init__(self, kernel: PolicyKernel) -> None:
        self._kernel = kernel
        self._abi = kernel.abi
        self._policies: dict[tuple[int, tuple[int, ...]], _Kept] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many policies are tracked."""
        return len(self._policies)

    def __repr__(self) -> str:
        return f"<PolicyTracker of {len(self)} policies on {self._abi}>"

    # What people call.

    def add(self, direction: Direction, selector: Selector, assignment: Assignment) -> Change:
        """Let `assignment` use the policy; it comes to the top when it is as strong as the strongest.

        Raises NotSupported or EncodeError for what this kernel cannot hold, ForeignPolicy when somebody else has the
        selector, KernelError for what the kernel refused: then the assignment is not recorded.  After any other error
        (ReplyTimeout, ChannelClosed, ENOBUFS) it is recorded, and the next call finds out what the kernel did.
        """
        with self._hold(direction, selector) as kept:
            self._check(kept.tracked, assignment)
            serial = kept.tracked.insert(assignment)
            return self._carry_out(kept.tracked, lambda: kept.tracked.withdraw(assignment, serial))

    def remove(self, direction: Direction, selector: Selector, assignment: Assignment) -> Change:
        """End the use of the policy by `assignment`, the oldest of equal ones.

        Raises NotTracked when it was never added.  Whatever the kernel answers, the assignment is gone afterwards; a
        policy that could not be deleted stays tracked, and the next call or `flush` tries again.
        """
        with self._hold(direction, selector) as kept:
            kept.tracked.remove(assignment)
            return self._carry_out(kept.tracked, None)

    def replace(self, direction: Direction, selector: Selector, old: Assignment, new: Assignment) -> Change:
        """Let `new` take the place of `old` (an address or a NAT mapping changed): one message at most.

        Raises NotTracked when `old` was never added, and what `add` raises; then `old` stays, when the kernel refused.
        """
        with self._hold(direction, selector) as kept:
            tracked = kept.tracked
            if old == new:
                tracked.restore(old, tracked.remove(old))
                return self._carry_out(tracked, None)
            self._check(tracked, new)
            old_serial = tracked.remove(old)
            new_serial = tracked.insert(new)

            def undo() -> None:
                tracked.withdraw(new, new_serial)
                tracked.restore(old, old_serial)

            return self._carry_out(tracked, undo)

    def flush(self) -> tuple[Change, ...]:
        """Forget all assignments and delete this tracker's policies, one by one: nobody else's, never by SPDFLUSH.

        Raises TransactionError naming the policies that could not be deleted; they stay tracked.
        """
        changes: list[Change] = []
        errors: dict[str, BaseException] = {}
        for kept in list(self._policies.values()):
            with self._hold(kept.tracked.direction, kept.tracked.selector) as held:
                held.tracked.clear()
                try:
                    changes.append(self._carry_out(held.tracked, None))
                except PFKeyError as error:
                    errors[str(held.tracked)] = error
        if errors:
            names = "; ".join(f"{name}: {error}" for name, error in errors.items())
            raise TransactionError(f"{len(errors)} policies could not be deleted: {names}", errors)
        return tuple(changes)

    def reconnect(self, kernel: PolicyKernel) -> None:
        """Go on over another connection to the same kernel, after ChannelClosed.

        What the lost connection left uncertain is read before it is acted on.  Raises ValueError when the other end is
        another system.
        """
        if kernel.abi != self._abi:
            raise ValueError(f"the policies tracked here are in a kernel of {self._abi}, not of {kernel.abi}")
        self._kernel = kernel

    def query(self, direction: Direction, selector: Selector) -> Policy:
        """The policy as the kernel holds it now, lifetimes and last use included where the kernel keeps them.

        Raises NotTracked when the tracker has no such policy, or the kernel has it no more.
        """
        with self._hold(direction, selector) as kept:
            tracked = kept.tracked
            if tracked.top is None and tracked.installed.state is State.ABSENT:
                raise NotTracked(f"{tracked} is not tracked")
            if tracked.installed.state is State.UNKNOWN or not tracked.installed.policy_id:
                self._read(tracked)
            policy = self._get(tracked, tracked.installed.policy_id)
            if policy is None:
                tracked.installed = tracked.installed.doubted()
                policy = self._read(tracked)
            if policy is None:
                raise NotTracked(f"{tracked} is not in the kernel; {self._kernel_holds(tracked)}")
            return policy

    def find(self, policy_id: int) -> tuple[Direction, Selector] | None:
        """Which tracked policy has this id in the kernel (an ACQUIRE names it), or None."""
        for kept in list(self._policies.values()):
            if policy_id and kept.tracked.installed.policy_id == policy_id:
                return kept.tracked.direction, kept.tracked.selector
        return None

    def assignments(self, direction: Direction, selector: Selector) -> tuple[Assignment, ...]:
        """What uses the policy, the one on top first; empty for a policy that is not tracked."""
        kept = self._policies.get((direction, selector.identity))
        return kept.tracked.assignments if kept else ()

    def policies(self) -> tuple[tuple[Direction, Selector], ...]:
        """The policies that are tracked."""
        return tuple((kept.tracked.direction, kept.tracked.selector) for kept in list(self._policies.values()))

    # One policy at a time.

    @contextmanager
    def _hold(self, direction: Direction, selector: Selector) -> Iterator[_Kept]:
        """The policy, locked; it is forgotten afterwards when nobody uses it and the kernel does not hold it."""
        key = (int(direction), selector.identity)
        while True:
            with self._lock:
                kept = self._policies.get(key)
                if kept is None:
                    kept = self._policies[key] = _Kept(TrackedPolicy(direction, selector, self._abi))
            with kept.lock:
                if self._policies.get(key) is not kept:
                    continue  # another thread ended it between the two locks
                try:
                    yield kept
                finally:
                    if kept.tracked.top is None and kept.tracked.installed.state in (State.ABSENT, State.FOREIGN):
                        with self._lock:
                            del self._policies[key]
                return

    def _check(self, tracked: TrackedPolicy, assignment: Assignment) -> None:
        """Refuse what the kernel is known to reject or to store as something else, before anything is sent."""
        if tracked.image(assignment) == tracked.installed.image:
            return
        if assignment.action == Action.IPSEC:
            for template in assignment.templates:
                if template.level == Level.UNIQUE and not template.reqid:
                    raise EncodeError(
                        f"{template} in {tracked}: level unique without a reqid lets the kernel choose one, which no"
                        " tracker can compare; give the reqid, or level REQUIRE"
                    )
        self._kernel.check_policy(tracked.policy(assignment))

    def _carry_out(self, tracked: TrackedPolicy, undo: Callable[[], None] | None) -> Change:
        """Follow the table until it says that nothing is left to do.

        `undo` takes back what the caller changed in the list; it is called when the kernel, or the table, refused.
        """
        try:
            return self._follow(tracked)
        except (ForeignPolicy, NotSupported, EncodeError) as error:
            if undo:
                undo()
            if isinstance(error, _StoredOtherwise):
                self._follow(tracked)
            raise
        except KernelError as error:
            if _outcome_unknown(error):
                raise
            if undo:
                undo()
            raise self._repaired(tracked, error) from error.__cause__

    def _follow(self, tracked: TrackedPolicy) -> Change:
        if tracked.installed.state is State.FOREIGN:
            tracked.installed = Installed(State.UNKNOWN)  # its owner may have deleted it since
        step = decide(tracked.desired, tracked.installed)
        read = False
        if step is Step.READ:
            read = self._try_to_read(tracked)
            step = decide(tracked.desired, tracked.installed) if read else self._unread(tracked)
        if step is Step.NOTHING:
            return Change(reason=_UNCHANGED if tracked.top else "nobody uses it and the kernel does not hold it")
        if step is Step.REFUSE:
            self._refuse(tracked)
        sent = self._send(tracked, step)
        return Change((sent,), reason=_REASONS[step] + (" (it was read)" if read else ""))

    def _unread(self, tracked: TrackedPolicy) -> Step:
        """What may be done although reading failed too: an update of what was ours, never a deletion."""
        if tracked.top is not None and tracked.installed.was_ours:
            return Step.UPDATE
        raise PFKeyError(
            f"what the kernel holds for {tracked} is not known and could not be read; nothing was sent,"
            " the next call reads it again"
        )

    def _refuse(self, tracked: TrackedPolicy) -> None:
        raise ForeignPolicy(
            f"{tracked} belongs to somebody else ({self._kernel_holds(tracked)}); it was left alone."
            " Delete it first if it is not needed, or use another selector",
            policy=self._seen(tracked),
        )

    def _seen(self, tracked: TrackedPolicy) -> Policy | None:
        """What an error shows of the policy in the kernel; None when it cannot be read any more."""
        try:
            return self._get(tracked, tracked.installed.policy_id)
        except PFKeyError:
            return None

    # Sending, and knowing what it did.

    def _send(self, tracked: TrackedPolicy, step: Step) -> MessageType:
        """One message.  Until it is acknowledged the kernel's side counts as unknown, whatever interrupts us."""
        before = tracked.installed
        if step is Step.DELETE:
            self._delete(tracked)
            return MessageType.SPDDELETE
        top = tracked.top
        assert top is not None
        policy, image = tracked.policy(top), tracked.image(top)
        tracked.installed = before.doubted(tried=image)
        try:
            echo = self._kernel.add_policy(policy) if step is Step.ADD else self._update(policy)
        except KernelError as error:
            if not _outcome_unknown(error):
                self._note_rejection(tracked, step, error, before)
            raise
        except (NotSupported, EncodeError):
            tracked.installed = before
            raise
        self._acknowledge(tracked, echo, image)
        return MessageType.SPDADD if step is Step.ADD else MessageType.SPDUPDATE

    def _update(self, policy: Policy) -> Policy:
        """Replace an installed policy by another image: the place of the guard.

        Here the update goes out bare: on kernels whose own update unlinks first (`abi.update_unlinks_first`) there is
        a moment without a policy between the two.
        """
        return self._kernel.update_policy(policy)

    def _note_rejection(self, tracked: TrackedPolicy, step: Step, error: KernelError, before: Installed) -> None:
        """What the kernel holds after it refused: a rejected SPDADD and most rejected updates change nothing."""
        if step is Step.ADD and isinstance(error, FileExistsError):
            tracked.installed = Installed(State.UNKNOWN)
            self._try_to_read(tracked)
            if tracked.installed.state is State.FOREIGN:
                self._refuse(tracked)
            raise ForeignPolicy(
                f"{tracked} is in the kernel already and belongs to somebody else; it was left alone"
            ) from error
        if step is Step.ADD:
            tracked.installed = Installed()
        elif not (self._abi.update_unlinks_first or self._abi.rejected_update_removes):
            tracked.installed = before

    def _repaired(self, tracked: TrackedPolicy, error: KernelError) -> PFKeyError:
        """After a rejection: bring the kernel back to the previous top, and say so in the error."""
        if tracked.installed.state is not State.UNKNOWN:
            return error
        try:
            change = self._follow(tracked)
        except PFKeyError as second:
            note = f"{self._abi} may remove the policy in that case, and putting it back failed too: {second}"
        else:
            if not change.sent:
                return error
            note = f"{self._abi} removes the policy in that case; it has been put back"
        log.warning("%s; %s", error, note)
        error.strerror = f"{error.strerror}; {note}"
        return error

    def _acknowledge(self, tracked: TrackedPolicy, echo: Policy, asked: Image) -> None:
        """The reply is the proof: what it echoes is compared with what was asked."""
        image = image_of_policy(echo, self._abi)
        tracked.installed = Installed(State.OURS, image, echo.id, was_ours=True)
        if image != asked:
            log.warning("%s: asked for %s, the kernel stored %s", tracked, asked, image)
            raise _StoredOtherwise(f"{self._abi} stored {_image_text(image)} for {tracked}, not {_image_text(asked)}")

    def _delete(self, tracked: TrackedPolicy) -> None:
        before = tracked.installed
        action = before.image.action if before.image else Action.NONE
        tracked.installed = before.doubted()
        try:
            self._kernel.delete_policy(Policy(tracked.direction, tracked.selector, action))
        except KernelError as error:
            if _outcome_unknown(error):
                raise
            # FreeBSD answers EINVAL for more than an absent policy: it is absent when a read says so.
            gone = error.name == self._abi.absent_policy_error and self._try_to_read(tracked)
            if not gone or tracked.installed.state is not State.ABSENT:
                tracked.installed = before
                raise
            log.warning("%s was already gone from the kernel when it was to be deleted", tracked)
        else:
            tracked.installed = Installed()

    # Reading.

    def _try_to_read(self, tracked: TrackedPolicy) -> bool:
        try:
            self._read(tracked)
        except (PFKeyError, OSError) as error:
            log.warning("%s could not be read: %s", tracked, error)
            return False
        return True

    def _read(self, tracked: TrackedPolicy) -> Policy | None:
        """Ask the kernel by id, else by a dump, and note what it holds for this policy."""
        policy = self._get(tracked, tracked.installed.policy_id)
        if policy is None:
            # Without an id nothing but dumps can tell, and Linux leaves an entry that is updated meanwhile out of one.
            policy = self._in_dump(tracked) or (None if tracked.installed.policy_id else self._in_dump(tracked))
        image = image_of_policy(policy, self._abi) if policy else None
        tracked.installed = tracked.installed.found(image, policy.id if policy else 0)
        return policy

    def _get(self, tracked: TrackedPolicy, policy_id: int) -> Policy | None:
        """The policy of this id, if it is this one; None when the kernel does not know it."""
        if not policy_id:
            return None
        try:
            policy = self._kernel.get_policy(policy_id)
        except FileNotFoundError:
            return None
        return policy if _is(tracked, policy) else None

    def _in_dump(self, tracked: TrackedPolicy) -> Policy | None:
        """The newest entry of a dump that is this policy; entries that SPDGET does not know (marks) are not."""
        found = [policy for policy in self._kernel.dump_policies() if _is(tracked, policy)]
        for policy in sorted(found, key=lambda policy: policy.id, reverse=True):
            known = self._get(tracked, policy.id)
            if known is not None:
                return known
        return None

    def _kernel_holds(self, tracked: TrackedPolicy) -> str:
        image = tracked.installed.image
        return "the kernel holds nothing" if image is None else f"the kernel holds {_image_text(image)}"


class _Kept:
    """A tracked policy and the lock that serialises the calls for it."""

    __slots__ = ("lock", "tracked")

    def __init__(self, tracked: TrackedPolicy) -> None:
        self.tracked = tracked
        self.lock = threading.Lock()


def _is(tracked: TrackedPolicy, policy: Policy) -> bool:
    """Whether a kernel's entry is this very policy: kernels count other host bits as another selector."""
    selector = policy.selector
    return (
        policy.direction == tracked.direction
        and selector.identity == tracked.selector.identity
        and (selector.source, selector.destination) == (tracked.selector.source, tracked.selector.destination)
    )


def _outcome_unknown(error: KernelError) -> bool:
    """Whether the kernel may have done the work all the same (ENOBUFS from a send)."""
    return error.outcome_unknown


def _image_text(image: Image) -> str:
    text = image.action.name.lower() if isinstance(image.action, Action) else f"type {image.action}"
    for request in image.requests:
        text += f" proto {request.protocol} mode {request.mode} level {request.level} reqid {request.reqid}"
        text += f" {request.source}-{request.destination}" if request.source is not None else ""
    return f"{text}, priority {image.priority}"
