"""Runs the tracker's state machine on every embedded system until a number of steps is reached, and says how many.

    python tests/machine_run.py [--steps 1000000] [--jobs 2] [--seed N]

Every job plays one system after the other with a seed of its own; the exit code is 1 as soon as something was not true.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import time
import traceback
from collections import Counter
from typing import NamedTuple

from hypothesis import seed
from hypothesis.stateful import run_state_machine_as_test
from test_tracker_machine import COUNTS, how, machine_of

from pfkey.embedded.profiles import PROFILE_NAMES

PLAYS = 200
"""Of one system in one go."""


class Round(NamedTuple):
    """What came of some plays of one system."""

    counts: Counter[str]
    failure: str


def play(order: tuple[str, int]) -> Round:
    profile, number = order
    logging.disable(logging.CRITICAL)
    COUNTS.clear()
    try:
        machine = seed(number)(machine_of(profile))
        run_state_machine_as_test(machine, settings=how(PLAYS, derandomize=False))  # type: ignore[no-untyped-call]
    except BaseException as error:
        notes = "\n".join(getattr(error, "__notes__", ()))
        return Round(COUNTS.copy(), f"{profile}, seed {number}: {''.join(traceback.format_exception(error))}\n{notes}")
    return Round(COUNTS.copy(), "")


def orders(seed: int, turn: int) -> list[tuple[str, int]]:
    """Every system once, each with a seed of its own."""
    return [(name, seed + turn * len(PROFILE_NAMES) + number) for number, name in enumerate(PROFILE_NAMES)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    chosen = parser.parse_args()
    total: Counter[str] = Counter()
    failed, turn, began = False, 0, time.monotonic()
    with multiprocessing.get_context("spawn").Pool(chosen.jobs) as pool:
        while total["steps"] < chosen.steps and not failed:
            turn += 1
            for done in pool.imap_unordered(play, orders(chosen.seed, turn)):
                total += done.counts
                if done.failure:
                    failed = True
                    print(done.failure, file=sys.stderr, flush=True)
    each = ", ".join(f"{name} {total[name]:,}" for name in PROFILE_NAMES)
    print(f"{total['steps']:,} steps in {total['plays']:,} plays, packets tried {total['looks']:,} times; {each}")
    print(f"seed {chosen.seed}, {time.monotonic() - began:,.0f} seconds")
    return failed


if __name__ == "__main__":
    sys.exit(main())
