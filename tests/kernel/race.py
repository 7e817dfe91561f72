"""Races packets against changes of a policy on a Linux with several CPUs, over NETLINK_XFRM in namespaces of this host.

The policy is a DISCARD, so that every packet that arrives at the other end of a cable has leaked.  A sender in a tight
loop has one CPU to itself; whoever changes the policy has another.

What is raced against: a lookup walks a chain that is sorted by priority, without a lock.  An update that makes a
policy stronger links it in front of others; a lookup that is already behind that place does not meet it, and the old
one, which it would have met, is gone.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pfkey import Action, Direction, Kernel, PFKeyError, Policy, Selector, connect

from .network import Cable, PacketCounter, cable, namespace
from .xfrm import XfrmChannel, grace_period

__all__ = [
    "BETWEEN",
    "GRACES",
    "OUT",
    "SITE",
    "STRONG",
    "WAYS",
    "WEAK",
    "Race",
    "Start",
    "Way",
    "between",
    "grace_period",
    "missing_race",
    "missing_xfrm",
    "race",
    "raise_guarded",
]

OUT = Direction.OUT
UDP, PORT = 17, 9
SITE = Selector("10.0.0.0/24", "10.0.0.0/24", protocol="udp")
ALIAS = Selector("10.0.0.1/24", "10.0.0.0/24", protocol="udp")
"""The same packets, and another policy to the kernel: a host bit that does not matter is set."""
STRONG, BETWEEN, WEAK = 10, 15, 20
"""Priorities."""
MANY = 200
"""Policies between those two: the longer the chain, the longer a lookup is on its way."""

_libc = ctypes.CDLL(None)


def missing_xfrm() -> str | None:
    """Why NETLINK_XFRM cannot be used in a namespace of this host, or None."""
    try:
        with namespace(), connect(XfrmChannel(), timeout=2) as kernel:
            kernel.dump_policies()
    except (OSError, PFKeyError) as error:
        return f"no NETLINK_XFRM in a network namespace of this host: {error}"
    return None


def missing_race() -> str | None:
    """The same for several CPUs and a cable."""
    if len(os.sched_getaffinity(0)) < 2:
        return "a race takes two CPUs, and this process may use one"
    reason = missing_xfrm()
    if reason is None:
        try:
            with cable():
                pass
        except OSError as error:
            return f"no cable between two namespaces of this host: {error}"
    return reason


def between() -> list[Selector]:
    """The same prefixes and other ports: the kernel keeps their policies in one chain with the one that is changed."""
    return [
        Selector(SITE.source, SITE.destination, protocol="udp", destination_port=10000 + number)
        for number in range(MANY)
    ]


# Grace periods: after one, no lookup is under way that began before it.


def _packet_socket() -> None:
    """Closing a packet socket that listens waits for one too (packet_release)."""
    socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0x0008).close()


def _sleeping(milliseconds: int) -> Callable[[], None]:
    return lambda: time.sleep(milliseconds / 1000)


GRACES: dict[str, Callable[[], None]] = {
    "no wait": lambda: None,
    **{f"{milliseconds} ms": _sleeping(milliseconds) for milliseconds in (1, 3, 5, 10)},
    "membarrier": grace_period,
    "packet socket": _packet_socket,
}

# The ways to change the policy: each installs it and gives what is then done again and again, back and forth.

Start = Callable[[Kernel], Callable[[], None]]


def _policy(priority: int, selector: Selector = SITE) -> Policy:
    return Policy(OUT, selector, Action.DISCARD, priority=priority)


def _install(kernel: Kernel) -> None:
    kernel.add_policy(_policy(WEAK))
    for filler in between():
        kernel.add_policy(Policy(OUT, filler, Action.NONE, priority=BETWEEN))


def _delete_then_add(kernel: Kernel) -> Callable[[], None]:
    _install(kernel)

    def change() -> None:
        kernel.delete_policy(_policy(WEAK))
        kernel.add_policy(_policy(WEAK))

    return change


def _update(kernel: Kernel) -> Callable[[], None]:
    _install(kernel)

    def change() -> None:
        kernel.update_policy(_policy(WEAK))

    return change


def _raise(kernel: Kernel) -> Callable[[], None]:
    _install(kernel)

    def change() -> None:
        kernel.update_policy(_policy(STRONG))
        kernel.update_policy(_policy(WEAK))

    return change


def raise_guarded(wait: Callable[[], None]) -> Start:
    """Behind an alias at the weaker of the two priorities, which goes when no lookup can have missed both."""

    def start(kernel: Kernel) -> Callable[[], None]:
        _install(kernel)

        def change() -> None:
            kernel.add_policy(_policy(max(STRONG, WEAK), ALIAS))
            kernel.update_policy(_policy(STRONG))
            wait()
            kernel.delete_policy(_policy(max(STRONG, WEAK), ALIAS))
            kernel.update_policy(_policy(WEAK))

        return change

    return start


@dataclass(frozen=True)
class Way:
    """One row: how the policy is changed, and whether packets get out."""

    text: str
    start: Start
    leaks: bool = False


WAYS = {
    "delete-add": Way("SPDDELETE, then SPDADD", _delete_then_add, leaks=True),
    "update": Way("SPDUPDATE, the same priority", _update),
    "raise": Way(f"SPDUPDATE, priority {WEAK} to {STRONG}", _raise, leaks=True),
    "raise-guarded": Way("the same behind an alias, and a grace period", raise_guarded(grace_period)),
}


def _flood(tries: mmap.mmap, cpu: int, address: str) -> None:
    """Send for ever, without a Python object for each refusal; counts in `tries`."""
    os.sched_setaffinity(0, {cpu})
    where = struct.pack("=H", socket.AF_INET) + PORT.to_bytes(2, "big") + socket.inet_aton(address) + bytes(8)
    out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    arguments = (out.fileno(), b"x", 1, socket.MSG_DONTWAIT, where, len(where))
    send, count = _libc.sendto, 0
    while True:
        for _ in range(100):
            send(*arguments)
        count += 100
        tries[:8] = count.to_bytes(8, "little")


@dataclass
class Race:
    """A sender that runs, the change that it races against, and what has arrived."""

    change: Callable[[], None]
    _counter: PacketCounter = field(repr=False)
    _tries: mmap.mmap = field(repr=False)
    _seen: int = 0

    def tries(self) -> int:
        """How many packets were sent, or refused, since the last call."""
        total = int.from_bytes(self._tries[:8], "little")
        new, self._seen = total - self._seen, total
        return new

    def leaked(self) -> int:
        """How many packets have arrived since the last call."""
        time.sleep(0.01)  # what is on its way arrives
        return self._counter.take()

    def run(self, times: int) -> tuple[int, int]:
        """(packets that leaked, packets tried) while the change is made so many times."""
        self.leaked()
        self.tries()
        for _ in range(times):
            self.change()
        return self.leaked(), self.tries()


@contextmanager
def race(start: Start) -> Iterator[Race]:
    """The policy stands at WEAK, many others between it and STRONG; the sender runs; the caller is in its namespace."""
    cpus = sorted(os.sched_getaffinity(0))
    tries = mmap.mmap(-1, mmap.PAGESIZE)
    with cable() as wire:
        with wire.there:
            counter = PacketCounter(Cable.PEER, UDP)
        with wire.here, counter, connect(XfrmChannel()) as kernel:
            change = start(kernel)
            child = os.fork()
            if not child:
                try:
                    _flood(tries, cpus[1], Cable.THERE)
                finally:
                    os._exit(1)
            try:
                os.sched_setaffinity(0, {cpus[0]})
                running = Race(change, counter, tries)
                _wait_for(running)
                yield running
                if os.waitpid(child, os.WNOHANG) != (0, 0):
                    raise AssertionError("the sender has ended")
            finally:
                os.sched_setaffinity(0, cpus)
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def _wait_for(running: Race) -> None:
    deadline = time.monotonic() + 20
    while not running.tries():
        if time.monotonic() > deadline:
            raise AssertionError("the sender did not start in 20 s")
        time.sleep(0.01)
