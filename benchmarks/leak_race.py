"""Packets that slip through while a policy changes, on several CPUs: `python benchmarks/leak_race.py [--changes N]`.

Changes policies of this host's kernel, in network namespaces of its own, over NETLINK_XFRM; takes root and two CPUs.
Prints how many packets left in clear by each way, and by how long an alias waits before it goes, as Markdown or JSON.
Exits 1 when something leaked that must not, or did not that must be seen to; 3 where it cannot be played.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TREE / "tests"))

from kernel.race import GRACES, WAYS, Start, Way, missing_race, race, raise_guarded  # noqa: E402

GRACE = "an alias that stands for {} after the update"


def graces() -> list[Way]:
    """The guarded update, by what it waits for; no claim is made for any but the one that is a grace period."""
    return [Way(GRACE.format(name), raise_guarded(wait)) for name, wait in GRACES.items() if usable(wait)]


def usable(wait: Callable[[], None]) -> bool:
    """Whether this kernel lets us wait so."""
    try:
        wait()
    except (OSError, KeyError):
        return False
    return True


def measure(text: str, start: Start, changes: int) -> dict[str, str | int | float]:
    """One row."""
    with race(start) as running:
        started = time.monotonic()
        leaked, tries = running.run(changes)
        seconds = time.monotonic() - started
    return {"way": text, "changes": changes, "tries": tries, "leaked": leaked, "seconds": round(seconds, 1)}


def main(arguments: list[str]) -> int:
    """Play everything and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", type=int, default=10000, metavar="N", help="of each way")
    parser.add_argument("--waits", action="store_true", help="also how long the alias has to wait")
    parser.add_argument("--json", action="store_true", help="a list of objects")
    options = parser.parse_args(arguments)
    reason = missing_race()
    if reason:
        print(reason, file=sys.stderr)
        return 3
    rows = [measure(way.text, way.start, options.changes) for way in WAYS.values()]
    wrong = sum(bool(row["leaked"]) != way.leaks for row, way in zip(rows, WAYS.values(), strict=True))
    if options.waits:
        rows += [measure(way.text, way.start, options.changes) for way in graces()]
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        print("| how the policy was changed | times | packets tried | packets in clear |\n|---|---|---|---|")
        for row in rows:
            print(f"| {row['way']} | {row['changes']:,} | {row['tries']:,} | {row['leaked']:,} |")
    if wrong:
        print(f"{wrong} of them not as it must be", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
