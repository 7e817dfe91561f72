"""A process that tracks policies and is killed at any message, and what its successor finds in the kernel.

Over any kernel that outlives a process: `connect_channel` opens a connection, in whatever process it is called, and
`fresh` gives one such for each life, to a kernel without policies.
"""

from __future__ import annotations

import mmap
import os
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from scenarios import SITE, TRAP, TRAP_1000, tunnel

from pfkey import (
    Action,
    Assignment,
    Channel,
    Direction,
    Kernel,
    MessageType,
    Policy,
    PolicyTracker,
    Selector,
    Template,
    connect,
)

ConnectChannel = Callable[[], Channel]
Fresh = Callable[[], AbstractContextManager[ConnectChannel]]
Key = tuple[Direction, Selector]
OWNER = "tests of crashes"
CHANGES = (MessageType.SPDADD, MessageType.SPDUPDATE, MessageType.SPDDELETE, MessageType.SPDDELETE2)
OUT, IN = Direction.OUT, Direction.IN

X, Y, R2, R3 = (tunnel(0xC0000000 + number, reqid=reqid) for number, reqid in enumerate((1, 1, 2, 3), 1))
MOVED = tunnel(0xC0000009, peer="198.51.100.99")
DROP = Assignment(action=Action.DISCARD)
HOSTS = Selector("10.1.0.1", "10.2.0.1")
HOSTS6 = Selector("2001:db8::1", "2001:db8::2")
SITE6 = Selector("2001:db8:1::/48", "2001:db8:2::/48")
PORT = Selector("10.1.0.0/16", "10.2.0.0/16", protocol="tcp", destination_port=443)
LATE = Selector("10.3.0.0/16", "10.4.0.0/16")
X6, M6 = (
    Assignment(Template.tunnel("2001:db8::a", peer, reqid=6), spi=0xC0000066) for peer in ("2001:db8::b", "2001:db8::c")
)
FOREIGN = Policy(OUT, Selector("203.0.113.0/24", "198.18.0.0/15"), Action.DISCARD)
"""Somebody else's, which nobody may touch."""


@dataclass(frozen=True)
class Call:
    """One call of the tracker."""

    verb: str
    selector: Selector
    what: tuple[Assignment, ...]
    direction: Direction = OUT

    @property
    def key(self) -> Key:
        return self.direction, self.selector


def add(selector: Selector, assignment: Assignment, direction: Direction = OUT) -> Call:
    return Call("add", selector, (assignment,), direction)


def remove(selector: Selector, assignment: Assignment, direction: Direction = OUT) -> Call:
    return Call("remove", selector, (assignment,), direction)


def swap(selector: Selector, old: Assignment, new: Assignment, direction: Direction = OUT) -> Call:
    return Call("replace", selector, (old, new), direction)


# Each step is a call, or several in one transaction.  With its priority of 1000 a trap makes SITE's policy stronger,
# past that of PORT, which has the same networks.
SCRIPT: tuple[tuple[Call, ...], ...] = (
    (add(SITE, X),),
    (add(SITE.reversed(), X.reversed(), IN),),
    (add(SITE, Y),),
    (remove(SITE, X),),
    (add(PORT, DROP),),
    (add(SITE, R2),),
    (add(HOSTS, TRAP),),
    (add(HOSTS, X),),
    (swap(HOSTS, X, MOVED),),
    (add(SITE6, X6), add(HOSTS6, X6)),
    (swap(SITE6, X6, M6), swap(HOSTS6, X6, M6), swap(SITE.reversed(), X.reversed(), MOVED.reversed(), IN)),
    (remove(HOSTS, MOVED),),
    (add(SITE, R3), remove(SITE, R2), add(LATE, X), remove(SITE6, M6), swap(HOSTS, TRAP, X)),
    (remove(SITE, Y), add(SITE, TRAP_1000)),
    (remove(SITE, TRAP_1000),),
    (remove(PORT, DROP), add(SITE6, X6)),
)
WANTED: tuple[tuple[Key, Assignment], ...] = (
    ((OUT, SITE), R3),
    ((IN, SITE.reversed()), MOVED.reversed()),
    ((OUT, HOSTS), X),
    ((OUT, HOSTS6), M6),
)
"""What the successor asks for; what else the dead one left is swept away."""

Uses = dict[Key, Counter[Assignment]]


def uses_after(steps: Sequence[tuple[Call, ...]]) -> Uses:
    """Which assignments use which policies then."""
    uses: Uses = {}
    for call in (call for step in steps for call in step):
        counter = uses.setdefault(call.key, Counter())
        if call.verb != "add":
            counter[call.what[0]] -= 1
        if call.verb != "remove":
            counter[call.what[-1]] += 1
    return {key: +counter for key, counter in uses.items() if +counter}


def standing(done: int) -> set[Key]:
    """The policies that stand whatever the step after the first `done` was at: used before it, and after it."""
    return set(uses_after(SCRIPT[:done])) & set(uses_after(SCRIPT[: done + 1]))


def matches(policy: Policy, key: Key) -> bool:
    """Whether every packet of this direction and selector belongs to `policy`."""
    direction, selector = key
    one = policy.selector
    return (
        policy.direction == direction
        and one.version == selector.version
        and selector.source.network.subnet_of(one.source.network)  # type: ignore[arg-type]
        and selector.destination.network.subnet_of(one.destination.network)  # type: ignore[arg-type]
        and one.protocol in (None, selector.protocol)
        and all(mine in (0, theirs) for mine, theirs in zip(one.wire_ports, selector.wire_ports, strict=True))
    )


def is_alive(kernel: Kernel, policy: Policy) -> bool:
    """FreeBSD up to 11 lists for seconds what is deleted or replaced; SPDGET does not know it any more."""
    try:
        return kernel.get_policy(policy.id).selector == policy.selector
    except FileNotFoundError:
        return False


def bare(kernel: Kernel, keys: set[Key]) -> list[Key]:
    """Those whose packets would meet no policy, a guard included."""
    policies = sorted(kernel.dump_policies(), key=lambda policy: policy.id, reverse=True)  # of two, the newer one lives
    return [key for key in keys if not any(matches(one, key) and is_alive(kernel, one) for one in policies)]


class DyingChannel:
    """Passes everything on, and ends its own process at a message: before it is sent, or after."""

    def __init__(self, inner: Channel, at: int, *, before: bool) -> None:
        self._inner = inner
        self._left = at
        self._before = before

    def send(self, data: bytes) -> None:
        self._left -= 1
        if not self._left and self._before:
            os.kill(os.getpid(), signal.SIGKILL)
        self._inner.send(data)
        if not self._left:
            os.kill(os.getpid(), signal.SIGKILL)

    def __getattr__(self, name: str) -> Any:
        if name == "send_many":
            raise AttributeError(name)  # one by one, so that it can die between two
        return getattr(self._inner, name)


class WatchedChannel:
    """Passes everything on, and looks after each change whether something is bare, by another connection."""

    def __init__(self, inner: Channel, look: Callable[[], None]) -> None:
        self._inner = inner
        self._look = look

    def send(self, data: bytes) -> None:
        self._inner.send(data)
        if data[1] in CHANGES:
            self._look()

    def __getattr__(self, name: str) -> Any:
        if name == "send_many":
            raise AttributeError(name)
        return getattr(self._inner, name)


def play(tracker: PolicyTracker, step: tuple[Call, ...]) -> None:
    """One step of the script."""
    if len(step) == 1:
        getattr(tracker, step[0].verb)(step[0].direction, step[0].selector, *step[0].what)
        return
    with tracker.transaction():
        for call in step:
            getattr(tracker, call.verb)(call.direction, call.selector, *call.what)


@dataclass(frozen=True)
class Life:
    """How a process ended: how many steps it had finished, and whether it was killed in the next one."""

    done: int
    killed: bool


def live(connect_channel: ConnectChannel, at: int, *, before: bool) -> Life:
    """Play the script in a process of its own that dies at message number `at`."""
    progress = mmap.mmap(-1, mmap.PAGESIZE)
    child = os.fork()
    if not child:
        code = 1
        try:
            tracker = PolicyTracker(connect(DyingChannel(connect_channel(), at, before=before)), owner=OWNER)
            for number, step in enumerate(SCRIPT, 1):
                play(tracker, step)
                progress[0] = number
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    done = progress[0]
    progress.close()
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, "the process failed; its traceback is above"
    else:
        assert os.WTERMSIG(status) == signal.SIGKILL
    return Life(done, os.WIFSIGNALED(status))


def flushed(connect_channel: ConnectChannel) -> Fresh:
    """One kernel for all lives."""

    @contextmanager
    def fresh() -> Iterator[ConnectChannel]:
        with connect(connect_channel()) as kernel:
            kernel.flush_policies()
        yield connect_channel

    return fresh


def succeed(connect_channel: ConnectChannel, kernel: Kernel, life: Life) -> None:
    """Start a successor, which wants what it wants; `kernel` then holds that and nothing else of ours, at no gap."""
    wanted = {key for key, _ in WANTED}
    stands = standing(life.done) & wanted

    def look() -> None:
        assert not bare(kernel, stands), f"the successor left {bare(kernel, stands)} without a policy"

    look()
    with connect(WatchedChannel(connect_channel(), look)) as connection:
        tracker = PolicyTracker(connection, owner=OWNER)
        with tracker.transaction(sweep=True):
            for (direction, selector), assignment in WANTED:
                tracker.add(direction, selector, assignment)
        assert_held(kernel, dict(WANTED))
        again = tracker.resync()
        assert again == (), f"the successor and the kernel do not agree: {again}"
        stands.clear()
        tracker.flush()
    assert_held(kernel, {})


def assert_held(kernel: Kernel, wanted: dict[Key, Assignment]) -> None:
    """These policies, in their canonical form, and the foreign one as it was: no guard, no leftover."""
    held = {
        (Direction(one.direction), one.selector): (int(one.action), one.templates)
        for one in kernel.dump_policies()
        if is_alive(kernel, one)
    }
    expected = {key: (int(assignment.action), assignment.templates) for key, assignment in wanted.items()}
    expected[OUT, FOREIGN.selector] = (int(FOREIGN.action), FOREIGN.templates)
    assert held == expected, f"the kernel holds {held}, and should hold {expected}"


def survive_every_death(fresh: Fresh, *, before: bool) -> int:
    """Die at every message in turn, look at the moment of death, succeed; how many deaths there were."""
    deaths = 0
    while True:
        with fresh() as connect_channel:
            with connect(connect_channel()) as kernel:
                kernel.add_policy(FOREIGN)
            # Nobody listens meanwhile: on FreeBSD up to 11 a full receive buffer of somebody else fails what we send.
            life = live(connect_channel, deaths + 1, before=before)
            with connect(connect_channel()) as kernel:
                uncovered = bare(kernel, standing(life.done))
                assert not uncovered, f"killed at message {deaths + 1}, in step {life.done}: {uncovered} have no policy"
                succeed(connect_channel, kernel, life)
        if not life.killed:
            assert life.done == len(SCRIPT)
            return deaths
        deaths += 1
