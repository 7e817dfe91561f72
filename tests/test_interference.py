"""A tracker beside a second process that changes, deletes and flushes policies, over embedded kernels for both."""

from __future__ import annotations

from pathlib import Path

import pytest
from interference import work_beside_another
from serving import served

from pfkey import connect

pytest.importorskip("pfkey.resync", reason="no tracker here compares itself with the kernel")


@pytest.mark.parametrize("profile", ["linux", "freebsd-13", "freebsd-14", "netbsd"])
@pytest.mark.parametrize("flushes", [False, True], ids=["changes", "flushes"])
def test_they_agree_in_the_end(profile: str, flushes: bool, tmp_path: Path) -> None:
    with served(profile, tmp_path / "kernel") as target:
        work_beside_another(lambda: connect(target).channel, 11, flushes=flushes)
