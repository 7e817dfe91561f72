"""The benchmark table as Markdown: `python benchmarks/table.py [RESULTS.json]`.

Without a file it runs the benchmarks; with one it shows what `pytest benchmarks --benchmark-json=FILE` wrote.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from cases import CASES, DUMP_ROWS, MEMORY_ROWS, RATIOS, TRANSACTION_ROWS, Case, Ratio

__all__ = ["budget_text", "figure", "markdown", "ratio", "ratio_text", "within"]

Minima = Mapping[str, float]


def figure(case: Case, minima: Minima) -> float:
    """Seconds of one operation, less what the row is to be without."""
    return minima[case.name] - (minima[case.minus] if case.minus else 0)


def within(case: Case, minima: Minima) -> bool:
    """Whether the row keeps its budget; a row without one does."""
    return case.budget is None or figure(case, minima) <= case.budget


def ratio(one: Ratio, minima: Minima) -> float:
    """How many times `of` is `to`."""
    return minima[one.of] / minima[one.to]


def budget_text(case: Case) -> str:
    """The budget in a unit that reads well."""
    return "" if case.budget is None else _time(case.budget)


def ratio_text(one: Ratio, minima: Minima) -> str:
    """The ratio and its limit."""
    limit = f"at least {one.at_least:g}" if one.at_least else f"at most {one.at_most:g}"
    return f"{ratio(one, minima):.3g} times ({limit})"


def markdown(minima: Minima) -> Iterator[str]:
    """The lines of both tables."""
    yield "| what | minimum | budget |"
    yield "|---|---|---|"
    for case in CASES:
        if case.name in minima:
            name = case.name + (f" (less {case.minus})" if case.minus else "")
            yield f"| {name} | {_time(figure(case, minima))} | {budget_text(case)} |"
    for row in (*DUMP_ROWS.values(), *TRANSACTION_ROWS.values()):
        if row in minima:
            yield f"| {row} (each) | {_time(minima[row])} | |"
    for row, budget in MEMORY_ROWS.values():
        if row in minima:
            yield f"| {row} | {minima[row] / 1e6:.3g} MB | {budget / 1e6:g} MB |"
    yield ""
    yield "| ratio | measured | limit |"
    yield "|---|---|---|"
    for one in RATIOS:
        if {one.of, one.to} <= minima.keys():
            value, _, limit = ratio_text(one, minima).partition(" (")
            yield f"| {one.name} | {value} | {limit.rstrip(')')} |"


def _time(seconds: float) -> str:
    for unit, size in (("ns", 1e-9), ("us", 1e-6)):
        if seconds < 1000 * size * 0.9995:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-3:.3g} ms"


def _read(path: Path) -> dict[str, float]:
    operations = {case.name: case.operations for case in CASES}
    found = json.loads(path.read_text())["benchmarks"]
    rows = {one["extra_info"]["case"]: one["stats"]["min"] for one in found if "case" in one["extra_info"]}
    minima = {name: minimum / operations[name] for name, minimum in rows.items() if name in operations}
    for one in found:
        minima |= one["extra_info"].get("measured", {})
    return minima


def main(arguments: list[str]) -> int:
    """Run or read, then print."""
    if arguments:
        print(*markdown(_read(Path(arguments[0]))), sep="\n")
        return 0
    import pytest

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        code = pytest.main([str(Path(__file__).parent), "-q", f"--benchmark-json={path}", "-p", "no:cacheprovider"])
        if path.exists():
            print(*markdown(_read(path)), sep="\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
