"""Packets in clear and messages sent while SAs are rekeyed: `python benchmarks/leak.py [--rekeyings N] [--json]`.

Boots user-mode Linux (no privileges needed), plays every way to keep a policy over N rekeyings, half of them of host
selectors and half of prefixes, with a sender that never stops, and prints the table as Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TREE / "tests"))

from kernel.leak import SITES, WAYS, Count, as_data, markdown, measure  # noqa: E402
from kernel.session import python_path  # noqa: E402
from kernel.uml import BootError, Unavailable, UserModeLinux  # noqa: E402

SECONDS_PER_REKEYING = 0.05
"""The slowest way takes a twentieth of it on an idle machine."""


def inside(rekeyings: int) -> int:
    """In user-mode Linux: one line of JSON for each measurement, as soon as it is there."""
    for way in WAYS.values():
        for site in SITES:
            print(json.dumps(as_data(measure(way, site, rekeyings // len(SITES)))), flush=True)
    return 0


def is_right(count: Count) -> bool:
    """It leaked if that is what the way does, and sent as many messages as it should."""
    way = WAYS[count.way]
    return (count.plain > 0) == way.leaks and count.protected > 0 and count.messages == way.messages * count.rekeyings


def boot(rekeyings: int) -> list[Count]:
    """Run `inside` in a kernel of its own; raises Unavailable or BootError."""
    command = [sys.executable, "-P", str(Path(__file__).resolve()), "--inside", "--rekeyings", str(rekeyings)]
    environment = {"PYTHONPATH": os.pathsep.join([*python_path(), str(TREE / "tests")])}
    with UserModeLinux(command, directory=TREE, environment=environment) as uml:
        status = uml.wait(120 + len(WAYS) * rekeyings * SECONDS_PER_REKEYING)
        if status:
            raise BootError(uml.report())
        return [Count(**json.loads(line)) for line in uml.output().splitlines()]


def main(arguments: list[str]) -> int:
    """Measure and print; 1 when something leaked that must not, or did not that must be seen to; 3 without a kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rekeyings", type=int, default=20000, metavar="N", help="of each way")
    parser.add_argument("--json", action="store_true", help="the counts as JSON, a list of objects")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.inside:
        return inside(options.rekeyings)
    try:
        counts = boot(options.rekeyings)
    except (Unavailable, BootError) as error:
        print(error, file=sys.stderr)
        return 3
    print(json.dumps([as_data(count) for count in counts], indent=2) if options.json else markdown(counts))
    wrong = [count for count in counts if not is_right(count)]
    for count in wrong:
        print(f"not as it must be: {count}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
