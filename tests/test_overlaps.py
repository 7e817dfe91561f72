"""The index of overlapping policies against a plain scan: the same policies, whatever shapes come and go."""

from __future__ import annotations

from ipaddress import ip_network

from hypothesis import given, settings
from hypothesis import strategies as st

from pfkey import Abi, Direction, Selector
from pfkey.overlaps import OverlapIndex, overlap
from pfkey.tracker import TrackedPolicy

LINUX = Abi.linux()
_BITS = st.sampled_from([0, 8, 16, 24, 31, 32])


@st.composite
def selectors(draw: st.DrawFn) -> Selector:
    """Few networks, so that many overlap; ports and protocols too; sometimes IPv6."""
    if draw(st.integers(0, 5)) == 0:
        sides = [f"2001:db8:{draw(st.integers(0, 1))}::/{draw(st.sampled_from([0, 32, 48, 128]))}" for _ in range(2)]
    else:
        sides = [f"10.{draw(st.integers(0, 1))}.{draw(st.integers(0, 1))}.0/{draw(_BITS)}" for _ in range(2)]
    protocol = draw(st.sampled_from([None, 6, 17]))
    port = draw(st.sampled_from([0, 80, 443])) if protocol else 0
    return Selector(*sides, protocol=protocol, destination_port=port).canonical()


def plainly(one: Selector, other: Selector) -> bool:
    """What `overlap` says, by the networks of the standard library."""
    if one.version != other.version:
        return False
    for mine, theirs in ((one.source, other.source), (one.destination, other.destination)):
        if not ip_network(str(mine.network)).overlaps(ip_network(str(theirs.network))):
            return False
    if one.protocol != other.protocol and one.protocol and other.protocol:
        return False
    return not (one.destination_port and other.destination_port and one.destination_port != other.destination_port)


@given(one=selectors(), other=selectors())
def test_overlap_is_what_it_says(one: Selector, other: Selector) -> None:
    assert overlap(one, other) == overlap(other, one) == plainly(one, other)


@settings(deadline=None)
@given(steps=st.lists(st.tuples(selectors(), st.sampled_from([None, 1, 2, 2, 3])), max_size=60), asked=selectors())
def test_the_index_finds_what_a_scan_finds(steps: list[tuple[Selector, int | None]], asked: Selector) -> None:
    index, policies = OverlapIndex(), dict[tuple[int, ...], TrackedPolicy]()
    for number, (selector, priority) in enumerate(steps):
        tracked = policies.setdefault(selector.identity, TrackedPolicy(Direction.OUT, selector, LINUX))
        index.put(tracked, priority)
        assert tracked.indexed == priority
        if number % 7 and number != len(steps) - 1:
            continue
        there = [one for one in policies.values() if one.indexed is not None]
        probe = policies.get(asked.identity) or TrackedPolicy(Direction.OUT, asked, LINUX)
        others = {one for one in there if one is not probe and plainly(asked, one.selector)}
        found = list(index.overlapping(probe))
        assert set(found) == others
        assert len(found) == len(others)
        for strength in (1, 2, 3):
            assert set(index.equals(probe, strength)) == {one for one in others if one.indexed == strength}
        pair = {one for one in there if one is not probe and one.selector.identity[:5] == asked.identity[:5]}
        assert set(index.pair(probe)) == pair
    for tracked in policies.values():
        index.put(tracked, None)
    assert index._groups == {}, "nothing is left behind"
