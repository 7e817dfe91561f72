"""Whether a packet ever leaves in clear while SAs are rekeyed: two namespaces, ESP, a sender that never stops."""

from __future__ import annotations

import os

import pytest

from .leak import SITES, WAYS, Count, Way, markdown, measure

REKEYINGS = int(os.environ.get("PFKEY_LEAK_REKEYINGS", "2000")) // len(SITES)
"""Of each kind of selector; the variable says how many each way plays."""
LEAKING = [way for way in WAYS.values() if way.leaks]
SAFE = [way for way in WAYS.values() if not way.leaks]


def counted(way: Way, site: str) -> Count:
    count = measure(way, site, REKEYINGS)
    print(count)
    assert count.messages == way.messages * REKEYINGS
    assert count.protected > 0
    return count


@pytest.mark.real_kernel
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("way", LEAKING, ids=str)
def test_control_a_policy_that_goes_before_it_comes_leaks(way: Way, site: str) -> None:
    """The detector works: what this package never does lets packets out in clear."""
    assert counted(way, site).plain > 0


@pytest.mark.real_kernel
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("way", SAFE, ids=str)
def test_no_packet_in_clear(way: Way, site: str) -> None:
    assert counted(way, site).plain == 0


def test_the_table_adds_up_both_kinds_of_selectors() -> None:
    counts = [Count("delete-add", site, 5000, 10000, 1234, 2500) for site in SITES]
    counts += [Count("tracker", site, 5000, 0, 1234, 0) for site in SITES]
    assert markdown(counts).splitlines()[2:] == [
        "| SPDDELETE, then SPDADD | 20,000 | 2,468 | **5,000** | **5,000** |",
        "| this tracker | 0 | 2,468 | 0 | 0 |",
    ]
