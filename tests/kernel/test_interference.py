"""A tracker beside a second process that changes, deletes and flushes policies, over a real af_key and over netlink."""

from __future__ import annotations

import pytest
from interference import work_beside_another

from pfkey.channel import NativeChannel

from .network import namespace
from .race import missing_xfrm
from .xfrm import XfrmChannel

pytest.importorskip("pfkey.resync", reason="no tracker here compares itself with the kernel")
FLUSHES = pytest.mark.parametrize("flushes", [False, True], ids=["changes", "flushes"])


@pytest.mark.real_kernel
@FLUSHES
def test_they_agree_in_the_end_on_af_key(flushes: bool) -> None:
    for seed in (1, 2):
        work_beside_another(NativeChannel, seed, flushes=flushes)


@FLUSHES
def test_they_agree_in_the_end_over_netlink(flushes: bool) -> None:
    reason = missing_xfrm()
    if reason:
        pytest.skip(reason)
    with namespace():
        for seed in range(3, 6):
            work_beside_another(XfrmChannel, seed, flushes=flushes)
