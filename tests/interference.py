"""Another process that adds, changes, deletes and flushes policies at random moments while a tracker works.

Over any kernel that processes share: `connect_channel` opens a connection, in whatever process it is called.
"""

from __future__ import annotations

import mmap
import os
import pickle
import random
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from crash import ConnectChannel, is_alive
from scenarios import SITE, TRAP, check, tunnel

from pfkey import (
    Action,
    Assignment,
    Direction,
    ForeignPolicy,
    Kernel,
    KernelError,
    PFKeyError,
    Policy,
    PolicyTracker,
    Selector,
    connect,
)

OUT = Direction.OUT
CALLS, DEEDS = 200, 50
"""How much each of the two does at least."""
TRACKED = (
    (OUT, SITE),
    (Direction.IN, SITE.reversed()),
    (OUT, Selector("10.1.0.1", "10.2.0.1")),
    (OUT, Selector("10.1.0.0/16", "10.2.0.0/16", protocol="tcp", destination_port=443)),
)
"""What the tracker works on, and the other process deletes and changes."""
POOL = (*(tunnel(0xC0000100 + number, reqid=1 + number % 3) for number in range(6)), TRAP)
"""Assignments; of three reqids, so that most of them change what the kernel should hold."""
THEIRS = tuple((OUT, Selector(f"203.0.113.{16 * number}/28", "198.18.0.0/15")) for number in range(8))
"""What belongs to the other process."""
LASTING = THEIRS[:2]
"""Of these, what it changes and never takes away."""


@dataclass
class Other:
    """The other process: what it holds as far as it knows, and the dice."""

    kernel: Kernel
    dice: random.Random
    flushes: bool
    holds: dict[tuple[Direction, Selector], Policy] = field(default_factory=dict)
    deeds: int = 0

    def policy(self, key: tuple[Direction, Selector]) -> Policy:
        direction, selector = key
        priority = self.dice.randrange(1, 1 << 20) if self.kernel.abi.has_priority else 0
        return Policy(direction, selector, Action(self.dice.randrange(2)), priority=priority)

    def put(self, key: tuple[Direction, Selector]) -> None:
        """Add it, or change it."""
        policy = self.policy(key)
        self.holds[key] = self.kernel.update_policy(policy) if key in self.holds else self.kernel.add_policy(policy)

    def take(self, key: tuple[Direction, Selector]) -> None:
        if key in self.holds and key not in LASTING:
            self.kernel.delete_policy(self.holds.pop(key))

    def break_something(self) -> None:
        """Delete or change what the tracker has; the change adds it where it is not."""
        policy = self.policy(self.dice.choice(TRACKED))
        (self.kernel.update_policy if self.dice.random() < 0.5 else self.kernel.delete_policy)(policy)

    def flush(self) -> None:
        self.kernel.flush_policies()
        self.holds.clear()
        for key in LASTING:
            self.put(key)

    def act(self) -> None:
        """One deed; what others have deleted meanwhile is an error of the kernel's, and no matter."""
        roll = self.dice.random()
        try:
            if roll < 0.05 and self.flushes:
                self.flush()
            elif roll < 0.5:
                self.put(self.dice.choice(THEIRS))
            elif roll < 0.7:
                self.take(self.dice.choice(THEIRS))
            else:
                self.break_something()
        except KernelError as error:
            if error.outcome_unknown:
                raise
        self.deeds += 1


@contextmanager
def meddling(connect_channel: ConnectChannel, seed: int, *, flushes: bool) -> Iterator[Meddler]:
    """The other process runs."""
    shared, (reading, writing) = mmap.mmap(-1, mmap.PAGESIZE), os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            other = Other(connect(connect_channel()), random.Random(seed), flushes)
            for key in LASTING:
                other.put(key)
            while not shared[0]:
                other.act()
                shared[1] = min(255, other.deeds)
                time.sleep(other.dice.random() / 500)
            with os.fdopen(writing, "wb") as journal:
                pickle.dump(other.holds, journal)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    meddler = Meddler(child, shared, reading)
    try:
        yield meddler
    finally:
        meddler.end()


@dataclass
class Meddler:
    """The other process, as this one sees it."""

    child: int
    shared: mmap.mmap
    journal: int
    holds: dict[tuple[Direction, Selector], Policy] | None = None
    """What it held in the end."""

    @property
    def deeds(self) -> int:
        """How much it did so far, up to 255."""
        return self.shared[1]

    def end(self) -> dict[tuple[Direction, Selector], Policy]:
        """Let it end; what it holds then."""
        if self.holds is None:
            self.holds = {}
            self.shared[0] = 1
            with os.fdopen(self.journal, "rb") as journal:
                written = journal.read()
            _, status = os.waitpid(self.child, 0)
            assert status == 0, "the other process failed; its traceback is above"
            self.holds = pickle.loads(written)
        return self.holds


@dataclass
class Work:
    """The tracker's side: random calls, whatever comes of them."""

    tracker: PolicyTracker
    dice: random.Random
    uses: dict[tuple[Direction, Selector], list[Assignment]] = field(default_factory=dict)
    refused: int = 0

    def act(self) -> None:
        key = self.dice.choice(TRACKED)
        mine, new = self.uses.setdefault(key, []), self.dice.choice(POOL)
        try:
            if not mine or self.dice.random() < 0.4:
                self.tracker.add(*key, new)
            elif self.dice.random() < 0.5:
                self.tracker.remove(*key, self.dice.choice(mine))
            else:
                self.tracker.replace(*key, self.dice.choice(mine), new)
        except ForeignPolicy:
            self.refused += 1  # the other one was there first, after a flush of its own or a deletion
        except PFKeyError as error:
            if getattr(error, "outcome_unknown", False):
                raise
        self.uses[key] = list(self.tracker.assignments(*key))

    def reach_for_theirs(self) -> None:
        """What belongs to the other process is refused, and stays."""
        try:
            change = self.tracker.add(*self.dice.choice(LASTING), POOL[0])
        except ForeignPolicy:
            return
        raise AssertionError(f"somebody else's policy was taken: {change}")


def work_beside_another(connect_channel: ConnectChannel, seed: int, *, flushes: bool) -> None:
    """Both work; afterwards one resync brings tracker and kernel together, and all of the other's is as it left it."""
    with connect(connect_channel()) as kernel:
        kernel.flush_policies()
    with meddling(connect_channel, seed, flushes=flushes) as meddler, connect(connect_channel()) as mine:
        deadline = time.monotonic() + 60
        while not meddler.deeds:
            assert time.monotonic() < deadline, "the other process did not start in a minute"
            time.sleep(0.001)
        work = Work(PolicyTracker(mine, owner="tests of interference"), random.Random(seed + 1))
        for _ in range(CALLS):
            work.act()
            if not flushes and work.dice.random() < 0.1:
                work.reach_for_theirs()
        while meddler.deeds < DEEDS:
            assert time.monotonic() < deadline, "the other process hardly did anything in a minute"
            work.act()
        holds = meddler.end()
        work.tracker.resync()
        with connect(connect_channel()) as kernel:
            left = [str(one) for one in work.tracker.resync() if not isinstance(one.error, ForeignPolicy)]
            assert not left, "one resync was not enough"
            _compare(work.tracker, kernel, holds)


def _compare(tracker: PolicyTracker, kernel: Kernel, holds: dict[tuple[Direction, Selector], Policy]) -> None:
    alive = {
        (policy.direction, policy.selector): policy for policy in kernel.dump_policies() if is_alive(kernel, policy)
    }
    for key, theirs in holds.items():
        assert key in alive, f"{theirs} of the other process is gone"
        assert (alive[key].id, alive[key].action, alive[key].priority) == (theirs.id, theirs.action, theirs.priority)
    for key in TRACKED:
        if not tracker.assignments(*key):
            continue
        if key in alive and alive[key].action != Action.IPSEC:
            # The other's: ours was deleted, the tracker had noticed, and an update put this there. It is left alone.
            with pytest.raises(ForeignPolicy):
                tracker.add(*key, POOL[0])
        else:
            check(tracker, kernel, *key)
    assert set(alive) <= set(holds) | set(TRACKED), "a guard was left, or something nobody wanted"
