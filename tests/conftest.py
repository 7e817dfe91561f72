"""What tests of more than one room need of the process they run in."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """Ctrl-C interrupts this process, and children that it starts, even where a shell started it with SIGINT ignored.

    `nohup`, `setsid` and a shell's `&` do that, Python then installs no handler, and children inherit it.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
