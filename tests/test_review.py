"""What a hard look at the tracker found: each of these once went wrong."""

from __future__ import annotations

import threading

import pytest
from rig import DROP, ESP, MOVED, OUT, REKEYED, Rig

from pfkey import Abi, Change, EmbeddedKernel, Policy, PolicyTracker, Selector, connect
from pfkey.tracker import TrackedPolicy

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


@pytest.mark.parametrize("inside", ["at the end", "at a rollback"])
def test_an_interrupt_while_a_transaction_lets_go_of_its_policies_leaves_none_behind(
    inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig("linux")
    close, left = rig.tracker._tracking.book.close, [1]

    def interrupted(tracked: TrackedPolicy) -> None:
        if left[0] == 0:
            left[0] = -1
            raise KeyboardInterrupt
        left[0] -= 1
        close(tracked)

    with pytest.raises(KeyboardInterrupt if inside == "at the end" else (KeyboardInterrupt, ZeroDivisionError)):
        with rig.tracker.transaction():
            for third in range(4):
                rig.tracker.add(OUT, Selector(f"10.{third}.0.0/16", "10.9.0.0/16"), ESP)
            monkeypatch.setattr(rig.tracker._tracking.book, "close", interrupted)
            if inside == "at a rollback":
                raise ZeroDivisionError
    monkeypatch.undo()
    done: list[Change] = []
    selector = Selector("10.2.0.0/16", "10.9.0.0/16")
    thread = threading.Thread(target=lambda: done.append(rig.tracker.add(OUT, selector, REKEYED)), daemon=True)
    thread.start()
    thread.join(5)
    assert done, "a policy was not let go"
    rig.tracker.flush()
    rig.agrees()
