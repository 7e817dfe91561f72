"""A tracker is killed at every message in turn, over a real af_key and over NETLINK_XFRM; its successor repairs."""

from __future__ import annotations

import pytest
from crash import SCRIPT, bare, flushed, live, standing, survive_every_death

from pfkey import Policy, connect
from pfkey.channel import NativeChannel

from .network import namespace
from .race import missing_xfrm
from .xfrm import XfrmChannel

pytest.importorskip("pfkey.recovery", reason="no tracker here knows its own policies again")


@pytest.mark.real_kernel
def test_a_death_at_any_message_leaves_no_gap_on_af_key() -> None:
    """After each message; before the next one is the same to the kernel."""
    assert survive_every_death(flushed(NativeChannel), before=False) > 20


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
def test_a_death_at_any_message_leaves_no_gap_over_netlink(before: bool) -> None:
    reason = missing_xfrm()
    if reason:
        pytest.skip(reason)
    with namespace():
        assert survive_every_death(flushed(XfrmChannel), before=before) > 20


@pytest.mark.real_kernel
def test_a_gap_would_be_seen() -> None:
    """The look at the moment of death finds what somebody deletes."""
    assert not live(NativeChannel, 1 << 30, before=False).killed
    stands = standing(len(SCRIPT))
    with connect(NativeChannel()) as kernel:
        assert len(stands) > 4
        assert bare(kernel, stands) == []
        for direction, selector in stands:
            kernel.delete_policy(Policy(direction, selector))
        assert set(bare(kernel, stands)) == stands
