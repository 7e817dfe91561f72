"""What nobody should do: wrong types, numbers that no wire carries, channels whose receive() fails."""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import pytest
from rig import ALL, BSD, ESP, MOVED, OUT, Rig
from scenarios import ADD

from pfkey import (
    Assignment,
    AsyncKernel,
    AsyncPolicyTracker,
    EmbeddedKernel,
    EncodeError,
    KernelError,
    PolicyTracker,
    ReplyTimeout,
    Selector,
    Template,
    connect,
)
from pfkey.errors import PFKeyError, TransactionError

SITE = Selector("10.1.0.0/16", "10.2.0.0/16")
NAMED_SCOPE = Selector("fe80::1%eth0/128", "fe80::2%eth0/128")
NO_NUMBER = Assignment(Template.tunnel("192.0.2.1", "198.51.100.1", reqid=-1), spi=9)


@pytest.mark.parametrize("profile", ALL)
def test_what_cannot_be_encoded_changes_nothing(profile: str) -> None:
    """It was never sent: nothing is in doubt, nothing is read, no guard is looked for."""
    rig = Rig(profile)
    with pytest.raises(EncodeError):
        rig.tracker.add(OUT, SITE, NO_NUMBER)
    assert len(rig.tracker) == 0
    rig.tracker.add(OUT, SITE, ESP)
    sent = len(rig.channel.sent)
    with pytest.raises(EncodeError):
        rig.tracker.add(OUT, SITE, NO_NUMBER)
    with pytest.raises(EncodeError):
        rig.tracker.replace(OUT, SITE, ESP, NO_NUMBER)
    assert rig.tracker.assignments(OUT, SITE) == (ESP,)
    assert len(rig.channel.sent) == sent
    assert rig.guards() == []
    rig.agrees()


@pytest.mark.parametrize("profile", BSD)
def test_what_cannot_be_encoded_holds_up_no_transaction(profile: str) -> None:
    rig = Rig(profile)
    with pytest.raises(TransactionError, match="interface's index") as raised, rig.tracker.transaction():
        rig.tracker.add(OUT, SITE, ESP)
        rig.tracker.add(OUT, NAMED_SCOPE, ESP)
    assert list(raised.value.errors) == [f"out {NAMED_SCOPE}"]
    assert rig.told() == [(ADD, str(SITE))]
    rig.agrees()


WRONG: list[tuple[str, tuple[Any, ...], str]] = [
    ("add", (OUT, SITE, None), "Assignment"),
    ("add", (OUT, SITE, Template.transport()), "Assignment"),
    ("add", (OUT, "10.1.0.0/16", ESP), "Selector"),
    ("remove", (OUT, SITE, None), "Assignment"),
    ("remove", (OUT, None, ESP), "Selector"),
    ("replace", (OUT, SITE, ESP, None), "Assignment"),
    ("replace", (OUT, SITE, None, ESP), "Assignment"),
    ("add_tunnel", (SITE, None), "Assignment"),
    ("add_tunnel", (SITE, ESP, Template.transport()), "Assignment"),
    ("add_tunnel", ("10.1.0.0/16", ESP), "Selector"),
    ("remove_tunnel", (SITE, None), "Assignment"),
    ("replace_tunnel", (SITE, ESP, None), "Assignment"),
    ("replace_tunnel", (SITE, None, ESP), "Assignment"),
]


@pytest.mark.parametrize(("call", "arguments", "wanted"), WRONG)
def test_wrong_types_are_told(call: str, arguments: tuple[Any, ...], wanted: str) -> None:
    """`replace(old, None)` in particular is not taken for a removal."""
    rig = Rig("linux")
    rig.tracker.add(OUT, SITE, ESP)
    sent = len(rig.channel.sent)
    with pytest.raises(TypeError, match=wanted):
        getattr(rig.tracker, call)(*arguments)

    async def alike() -> None:
        async with AsyncKernel.connect(EmbeddedKernel("linux").connect()) as kernel:
            await getattr(AsyncPolicyTracker(kernel), call)(*arguments)

    with pytest.raises(TypeError, match=wanted):
        asyncio.run(alike())
    assert len(rig.channel.sent) == sent
    assert rig.tracker.assignments(OUT, SITE) == (ESP,)


def failing(rig: Rig, kind: type[OSError], number: int | None, times: int) -> None:
    """The next receive() calls that come after something was sent fail."""
    inner, left = rig.channel.receive, times

    def receive(timeout: float | None) -> bytes | None:
        nonlocal left
        if left and rig.channel.sent and rig.channel.sent[-1].type == ADD:
            left -= 1
            raise kind(number, "broken") if number else kind("broken")
        return inner(timeout)

    rig.channel.receive = receive  # type: ignore[method-assign]


@pytest.mark.parametrize(("kind", "number"), [(OSError, errno.EINTR), (OSError, errno.EAGAIN), (TimeoutError, None)])
def test_a_receive_that_only_found_nothing_is_done_again(kind: type[OSError], number: int | None) -> None:
    rig = Rig("linux")
    failing(rig, kind, number, 3)
    assert rig.tracker.add(OUT, SITE, ESP).sent == (ADD,)
    rig.agrees()


def test_a_receive_that_never_finds_anything_ends_in_time() -> None:
    rig = Rig("linux")
    failing(rig, OSError, errno.EAGAIN, -1)
    with pytest.raises(ReplyTimeout):
        rig.tracker.add(OUT, SITE, ESP)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM, errno.ENETDOWN])
@pytest.mark.parametrize("profile", ["linux", "freebsd-13", "netbsd"])
def test_a_receive_that_fails_leaves_the_outcome_open(profile: str, number: int) -> None:
    """The assignment is recorded, the error is one of this package, and the next call finds out."""
    rig = Rig(profile)
    failing(rig, OSError, number, 1)
    with pytest.raises(KernelError, match=r"reading from .* failed") as raised:
        rig.tracker.add(OUT, SITE, ESP)
    assert (raised.value.errno, raised.value.outcome_unknown) == (number, True)
    assert rig.tracker.assignments(OUT, SITE) == (ESP,)
    with suppress(PFKeyError):
        rig.tracker.replace(OUT, SITE, ESP, MOVED)
    rig.tracker.resync()
    rig.agrees()


class Careless:
    """A channel whose send_many() tells another number than it should, and does what it tells."""

    def __init__(self, embedded: EmbeddedKernel, takes: int, tells: int) -> None:
        self._inner = embedded.connect()
        self.abi = embedded.abi
        self.send, self.receive = self._inner.send, self._inner.receive
        self.fileno, self.close = self._inner.fileno, self._inner.close
        self._takes, self._tells = takes, tells

    def send_many(self, messages: Sequence[bytes]) -> int:
        for message in messages[: self._takes]:
            self.send(message)
        return self._tells

    def receive_many(self, limit: int, timeout: float | None) -> list[bytes] | None:
        return self._inner.receive_many(limit, timeout) or None


@pytest.mark.parametrize(("takes", "tells"), [(1, 1), (0, 0), (0, -1), (64, 65)])
def test_a_send_many_that_takes_none_or_tells_too_many(takes: int, tells: int) -> None:
    """It is not called again for ever, nor are more taken off the list than there are."""
    embedded = EmbeddedKernel("linux")
    with connect(Careless(embedded, takes, tells), timeout=1) as kernel:
        tracker = PolicyTracker(kernel)
        with tracker.transaction():
            for number in range(20):
                tracker.add(OUT, Selector(f"10.{number}.0.0/16", "10.200.0.0/16"), ESP)
        assert len(embedded.policies()) == 20
        assert tracker.resync() == ()


@pytest.mark.parametrize("linger", [1e10, 1e300, float("inf")])
def test_a_policy_may_linger_for_ever(linger: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread can wait so long at once."""
    died: list[object] = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    rig = Rig("linux", linger=linger)
    rig.tracker.add(OUT, SITE, ESP)
    assert rig.tracker.remove(OUT, SITE, ESP).sent == ()
    time.sleep(0.05)
    assert died == []
    assert rig.held(SITE) is not None
    rig.tracker.close()
    assert rig.held(SITE) is None


@pytest.mark.parametrize("linger", [-1, float("nan")])
def test_what_is_no_number_of_seconds(linger: float) -> None:
    with pytest.raises(ValueError, match="linger"):
        Rig("linux", linger=linger)


def test_a_transaction_of_a_generator_that_ends_in_another_thread() -> None:
    """The garbage collector ends generators in whatever thread it runs: the transaction is over then, for everybody."""
    rig = Rig("linux")

    def half() -> Iterator[None]:
        with rig.tracker.transaction():
            rig.tracker.add(OUT, SITE, ESP)
            yield

    generator = half()
    next(generator)
    closing = threading.Thread(target=generator.close)  # type: ignore[attr-defined]
    closing.start()
    closing.join()
    assert rig.tracker.policies() == ()
    adding = threading.Thread(target=rig.tracker.add_tunnel, args=(SITE, ESP), daemon=True)
    adding.start()
    adding.join(20)
    assert not adding.is_alive()
    rig.agrees()
