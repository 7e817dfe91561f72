"""Run in a fresh interpreter: what 100,000 tracked policies with two assignments each take, as JSON of bytes.

Counted by tracemalloc, which sees every block that Python asks for; what the caller made itself is counted apart.
"""

from __future__ import annotations

import gc
import json
import sys
import tracemalloc

from tracker_rows import FIRST, OUT, NullKernel, sites

from pfkey import Abi, Assignment, PolicyTracker, Template

POLICIES = 100_000


def held() -> int:
    """Bytes in use now."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def main() -> int:
    """Count before, after the caller's objects, and after the tracker's."""
    tracker = PolicyTracker(NullKernel(Abi.linux()))
    tracker.add(OUT, sites(1, POLICIES)[0], FIRST)  # what is made once
    tracemalloc.start()
    empty = held()
    selectors = sites(POLICIES)
    template = Template.tunnel("192.0.2.1", "198.51.100.1", reqid=1)
    pairs = [(Assignment(template, spi=2 * n + 1), Assignment(template, spi=2 * n + 2)) for n in range(POLICIES)]
    callers = held()
    with tracker.transaction():
        for selector, pair in zip(selectors, pairs, strict=True):
            for assignment in pair:
                tracker.add(OUT, selector, assignment)
    full = held()
    if len(tracker) != POLICIES + 1:
        raise AssertionError("the tracker lost something")
    print(json.dumps({"own": full - callers, "all": full - empty}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
