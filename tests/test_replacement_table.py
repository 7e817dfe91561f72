"""docs/replacing-a-policy.md is what its script computes, and the model agrees with what real kernels did."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"

_spec = importlib.util.spec_from_file_location("make_replacement_table", DOCS / "make_replacement_table.py")
assert _spec is not None
assert _spec.loader is not None
table = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = table
_spec.loader.exec_module(table)
Fate = table.Fate


def test_the_page_is_what_the_script_prints() -> None:
    """If not: python docs/make_replacement_table.py >docs/replacing-a-policy.md."""
    assert (DOCS / "replacing-a-policy.md").read_text().splitlines() == list(table.document())


KNOWN = [row for row in table.MEASURED if row[1] in table.PROFILES]


@pytest.mark.parametrize(("kernel", "profile", "way", "circumstance", "packets"), KNOWN)
def test_the_model_agrees_with_real_kernels(
    kernel: str, profile: str, way: str, circumstance: str, packets: int
) -> None:
    fate = table.play(profile, table.SHAPES[0], table.TECHNIQUES[way], table.CIRCUMSTANCES[circumstance])
    assert fate is not Fate.IMPOSSIBLE
    assert (fate in (Fate.LEAKS, Fate.IN_CLEAR)) == (packets > 0), f"{kernel}: {packets} packets in clear"


@pytest.mark.parametrize("profile", table.PROFILES)
@pytest.mark.parametrize("shape", table.SHAPES, ids=lambda shape: shape.name)
def test_the_ways_that_are_recommended_are_safe_everywhere(profile: str, shape: object) -> None:
    """An alias of the new policy neither leaks nor drops, whatever stands beside it and whatever the kernel answers."""
    technique = table.TECHNIQUES["alias-new"]
    safe = {Fate.FINE, Fate.OLD_STANDS, Fate.IMPOSSIBLE}
    for circumstance in table.CIRCUMSTANCES.values():
        assert table.play(profile, shape, technique, circumstance) in safe
        assert table.play(profile, shape, table.TECHNIQUES["delete-add"], circumstance) not in safe - {Fate.IMPOSSIBLE}


def test_every_verdict_is_seen_somewhere() -> None:
    """The table tells ways apart: each of its words stands somewhere ("for good" takes a kernel that orders by age)."""
    seen = {
        table.play(profile, shape, technique, circumstance)
        for profile in table.PROFILES
        for shape in table.SHAPES
        for technique in table.TECHNIQUES.values()
        for circumstance in table.CIRCUMSTANCES.values()
    }
    assert seen >= set(Fate) - {Fate.BLOCKED}
