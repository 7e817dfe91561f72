"""What a hard look at the tracker found: each of these once went wrong."""

from __future__ import annotations

import pytest
from rig import DROP, ESP, MOVED, OUT

from pfkey import Abi, EmbeddedKernel, Policy, PolicyTracker, Selector, connect

SITE = Selector("10.1.0.0/16", "10.2.0.0/16")


class Plain:
    """A channel with what the Protocol asks for and nothing else, under the description that somebody gave it."""

    def __init__(self, inner: object, abi: Abi) -> None:
        self.inner, self.abi = inner, abi

    def send(self, data: bytes) -> None:
        self.inner.send(data)  # type: ignore[attr-defined]

    def receive(self, timeout: float | None) -> bytes | None:
        return self.inner.receive(timeout)  # type: ignore[attr-defined, no-any-return]

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        self.inner.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("release", [11, "11.0"])
def test_freebsd_11_without_a_minor_number_may_be_one_that_answers_spdget_with_seq_zero_and_lists_the_dead(
    release: float | str,
) -> None:
    embedded = EmbeddedKernel("freebsd-11")
    kernel = connect(Plain(embedded.connect(), Abi.freebsd(release)), timeout=0.2)
    tracker = PolicyTracker(kernel, owner="a daemon")
    tracker.add(OUT, SITE, ESP)
    tracker.replace(OUT, SITE, ESP, MOVED)
    assert tracker.query(OUT, SITE).templates == MOVED.templates
    with connect(embedded.connect()) as other:
        other.update_policy(Policy(OUT, SITE, DROP.action))
    (difference,) = tracker.resync()
    assert difference.error is None
    assert [policy.templates for policy in embedded.policies()] == [MOVED.templates]
    tracker.remove(OUT, SITE, MOVED)
    assert tracker.resync() == ()
    assert embedded.policies() == []  # a guard that is listed, and dead, brings nothing back to life
