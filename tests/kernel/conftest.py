"""Fixtures of the kernel tests: each runs against a real af_key and against the embedded kernel of the same profile."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterator
from types import FrameType

import pytest

from pfkey import Channel, EmbeddedKernel, Kernel, connect
from pfkey.channel import NativeChannel

from .network import namespace
from .session import missing, plugins, runs_here, skip_or_fail

TEST_SECONDS = 200
"""No single test takes so long, however busy the machine: it hangs."""


def pytest_configure(config: pytest.Config) -> None:
    """Takes the real-kernel tests into user-mode Linux."""
    for plugin in plugins(config):
        config.pluginmanager.register(plugin)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """A kernel that never answers fails its test, not the run."""

    def stop(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"still running after {TEST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(TEST_SECONDS)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def _own_namespace(request: pytest.FixtureRequest) -> Iterator[None]:
    """A real test gets a network namespace of its own: an empty SPD, an empty SAD, nothing of the host's."""
    if request.node.get_closest_marker("real_kernel") is None:
        yield
        return
    reason = None if runs_here() else missing()
    if reason:
        skip_or_fail(reason)
    with namespace():
        yield


@pytest.fixture(params=["embedded", pytest.param("real", marks=pytest.mark.real_kernel)])
def connect_channel(request: pytest.FixtureRequest, _own_namespace: None) -> Iterator[Callable[[], Channel]]:
    """Makes connections to one kernel, a real one or an embedded one, whose databases are empty at first."""
    opened: list[Channel] = []
    embedded = EmbeddedKernel("linux") if request.param == "embedded" else None

    def connect_channel() -> Channel:
        opened.append(embedded.connect() if embedded is not None else NativeChannel())
        return opened[-1]

    yield connect_channel
    for channel in opened:
        channel.close()


@pytest.fixture
def kernel(connect_channel: Callable[[], Channel]) -> Kernel:
    """One connection."""
    return connect(connect_channel())


@pytest.fixture
def other(connect_channel: Callable[[], Channel]) -> Kernel:
    """Another connection to the same kernel: somebody else."""
    return connect(connect_channel())
