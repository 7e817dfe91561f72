"""Run where there is a PF_KEY (user-mode Linux will do): 5,000 policies in one transaction, against one by one.

Two shapes: pairs of hosts, which Linux finds through a hash, and pairs of prefixes, among which it searches.  Seconds
for one policy, as JSON on stdout.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

from pfkey import Assignment, Direction, Kernel, Policy, PolicyTracker, Selector, Template, connect

POLICIES, ROUNDS = 5000, 5
TUNNEL = Template.tunnel("192.0.2.1", "198.51.100.1", reqid=1)
SHAPES = {
    "hosts": [Selector(f"10.1.{n >> 8}.{n & 255}", f"10.2.{n >> 8}.{n & 255}") for n in range(POLICIES)],
    "prefixes": [
        Selector(f"10.{n >> 8}.{n & 255}.0/24", f"172.{16 + (n >> 8)}.{n & 255}.0/24") for n in range(POLICIES)
    ],
}


def one_by_one(kernel: Kernel, selectors: list[Selector]) -> None:
    """A request and its reply for each, as a program without a tracker does it."""
    for selector in selectors:
        kernel.add_policy(Policy(Direction.OUT, selector, templates=(TUNNEL,), priority=1000))


def in_one_transaction(kernel: Kernel, selectors: list[Selector]) -> None:
    """The tracker, thread-safe, with a Change for each."""
    tracker, assignment = PolicyTracker(kernel), Assignment(TUNNEL, spi=1, priority=1000)
    with tracker.transaction() as done:
        for selector in selectors:
            tracker.add(Direction.OUT, selector, assignment)
    if len(done.sent) != len(selectors):
        raise AssertionError("not all were sent")


def seconds(kernel: Kernel, how: Callable[[Kernel, list[Selector]], None], selectors: list[Selector]) -> float:
    """What it takes from an empty SPD."""
    kernel.flush_policies()
    start = time.perf_counter()
    how(kernel, selectors)
    taken = time.perf_counter() - start
    if len(kernel.dump_policies()) != len(selectors):
        raise AssertionError("the kernel does not hold all of them")
    return taken


def main() -> int:
    """Measure both by turns, so that both meet the same kernel."""
    kernel, found = connect(), dict[str, float]()
    for name, selectors in SHAPES.items():
        times = [
            (seconds(kernel, one_by_one, selectors), seconds(kernel, in_one_transaction, selectors))
            for _ in range(ROUNDS)
        ]
        found[f"{name} one by one"] = min(one for one, _ in times) / POLICIES
        found[f"{name} in one transaction"] = min(other for _, other in times) / POLICIES
    kernel.flush_policies()
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
