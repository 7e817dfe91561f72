"""An embedded kernel in a process of its own, so that this one has no threads and may fork."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pfkey import EmbeddedKernel, NotSupported, connect

server = pytest.importorskip("pfkey.embedded.server", reason="no embedded kernel here outlives a process")


@contextmanager
def served(profile: str, path: Path) -> Iterator[str]:
    """What connects to it; it ends with the block."""
    child = os.fork()
    if not child:
        try:
            with server.Server(EmbeddedKernel(profile), path) as serving:
                serving.wait()
        finally:
            os._exit(1)
    try:
        _wait_for(f"unix:{path}")
        yield f"unix:{path}"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _wait_for(target: str) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            connect(target).close()
        except NotSupported:
            assert time.monotonic() < deadline, "no server in 20 s"
            time.sleep(0.002)
        else:
            return
