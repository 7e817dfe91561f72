"""The leak benchmark: ESP between two namespaces, a sender that never stops, and four ways to follow a rekeying.

A rekeying is what an IKE daemon does: a new SA comes, the policy hears of it, the old SA goes.  In a plain one reqid
and end points stay what they are; in one with a change the new SA has another reqid, so that the policy must follow.
Runs where there is a real af_key.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from ipaddress import ip_address

from pfkey import (
    Abi,
    Assignment,
    Channel,
    Direction,
    Kernel,
    Level,
    MessageType,
    Mode,
    Policy,
    PolicyTracker,
    SecurityAssociation,
    Selector,
    Template,
    connect,
)
from pfkey.channel import NativeChannel

from .network import Cable, PacketCounter, cable

OUT = Direction.OUT
ESP, UDP = 50, 17
SENDER = f"""
import socket
out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
while True:
    try:
        out.sendto(b"x" * 64, ("{Cable.THERE}", 9))
    except OSError:
        pass
"""
SITES = {
    "hosts": Selector(Cable.HERE, Cable.THERE),
    "prefixes": Selector("10.0.0.0/24", "10.0.0.0/24"),
}

Follow = Callable[[Assignment, Assignment], None]
"""What a way does when the second assignment takes the place of the first."""


@dataclass
class CountingChannel:
    """Passes everything on and counts the messages by type."""

    inner: Channel
    sent: Counter[int] = field(default_factory=Counter)

    @property
    def abi(self) -> Abi:
        return self.inner.abi

    def send(self, data: bytes) -> None:
        self.sent[data[1]] += 1
        self.inner.send(data)

    def receive(self, timeout: float | None) -> bytes | None:
        return self.inner.receive(timeout)

    def fileno(self) -> int:
        return self.inner.fileno()

    def close(self) -> None:
        self.inner.close()

    @property
    def about_policies(self) -> int:
        """How many of them were about policies, reads included."""
        return sum(count for kind, count in self.sent.items() if MessageType(kind).name.startswith("SPD"))


# The ways: each has the policy of the first assignment installed, and gives what then follows.


def _policy(site: Selector, assignment: Assignment) -> Policy:
    return Policy(OUT, site, templates=assignment.templates, priority=10)


def delete_then_add(kernel: Kernel, site: Selector, first: Assignment) -> Follow:
    kernel.add_policy(_policy(site, first))

    def follow(old: Assignment, new: Assignment) -> None:
        kernel.delete_policy(_policy(site, old))
        kernel.add_policy(_policy(site, new))

    return follow


def flush_then_add(kernel: Kernel, site: Selector, first: Assignment) -> Follow:
    kernel.add_policy(_policy(site, first))

    def follow(old: Assignment, new: Assignment) -> None:
        kernel.flush_policies()
        kernel.add_policy(_policy(site, new))

    return follow


def always_update(kernel: Kernel, site: Selector, first: Assignment) -> Follow:
    kernel.add_policy(_policy(site, first))
    return lambda old, new: _ignore(kernel.update_policy(_policy(site, new)))


def tracker(kernel: Kernel, site: Selector, first: Assignment) -> Follow:
    tracker = PolicyTracker(kernel)
    tracker.add(OUT, site, first)

    def follow(old: Assignment, new: Assignment) -> None:
        tracker.add(OUT, site, new)
        tracker.remove(OUT, site, old)

    return follow


def _ignore(result: object) -> None:
    pass


@dataclass(frozen=True)
class Way:
    """One row: how the policy follows its SAs, how many messages each rekeying takes, and whether packets get out."""

    name: str
    text: str
    start: Callable[[Kernel, Selector, Assignment], Follow]
    messages: int
    leaks: bool = False
    changes: bool = False
    """The reqid of the SAs alternates, so that the policy has to change at each rekeying."""

    def __str__(self) -> str:
        return self.name


WAYS = {
    way.name: way
    for way in (
        Way("delete-add", "SPDDELETE, then SPDADD", delete_then_add, 2, leaks=True),
        Way("flush-add", "SPDFLUSH, then SPDADD", flush_then_add, 2, leaks=True),
        Way("update", "SPDUPDATE every time", always_update, 1),
        Way("tracker", "this tracker", tracker, 0),
        Way("update-changes", "SPDUPDATE, the reqid changes", always_update, 1, changes=True),
        Way("tracker-changes", "this tracker, the reqid changes", tracker, 1, changes=True),
    )
}


@dataclass(frozen=True)
class Count:
    """What was seen of one way on one kind of selector."""

    way: str
    site: str
    rekeyings: int
    messages: int
    """Those about policies; what the SAs take is the same for every way and not among them."""
    protected: int
    """Packets that arrived under ESP while it ran."""
    plain: int
    """Packets that arrived in clear."""

    def __str__(self) -> str:
        return (
            f"{self.rekeyings} rekeyings of {self.site} by {self.way}: {self.messages} messages,"
            f" {self.protected} packets under ESP, {self.plain} in clear"
        )


def _association(number: int, reqid: int) -> SecurityAssociation:
    """Without a cipher: no time goes into encryption."""
    return SecurityAssociation(
        ip_address(Cable.HERE),
        ip_address(Cable.THERE),
        0x1000 + number,
        mode=Mode.TRANSPORT,
        reqid=reqid,
        encryption="null",
        authentication="hmac-sha1",
        authentication_key=bytes(range(20)),
    )


def _assignment(sa: SecurityAssociation) -> Assignment:
    return Assignment(Template.transport(reqid=sa.reqid, level=Level.UNIQUE), spi=sa.spi)


def measure(way: Way, site: str, rekeyings: int) -> Count:
    """Play so many rekeyings while the sender sends, and count what arrives at the other end of the cable."""
    with cable() as wire:
        with wire.here:
            channel = CountingChannel(NativeChannel())
            kernel = connect(channel)
            old = _association(0, 1)
            kernel.add_sa(old)
            follow = way.start(kernel, SITES[site], _assignment(old))
            sender = subprocess.Popen([sys.executable, "-c", SENDER], stdin=subprocess.DEVNULL)
        try:
            with wire.there, PacketCounter(Cable.PEER, ESP) as protected, PacketCounter(Cable.PEER, UDP) as plain:
                _wait_for(protected)
                if plain.take():
                    raise AssertionError("packets leave in clear although nothing has changed yet")
                channel.sent.clear()
                for number in range(1, rekeyings + 1):
                    new = _association(number, 1 + number % 2 if way.changes else 1)
                    kernel.add_sa(new)
                    follow(_assignment(old), _assignment(new))
                    kernel.delete_sa(old)
                    old = new
                messages = channel.about_policies
                if sender.poll() is not None:
                    raise AssertionError("the sender has ended")
                time.sleep(0.05)  # what is on its way arrives
                return Count(way.name, site, rekeyings, messages, protected.take(), plain.take())
        finally:
            sender.kill()
            sender.wait()
            kernel.close()


def _wait_for(counter: PacketCounter) -> None:
    deadline = time.monotonic() + 20
    while not counter.take():
        if time.monotonic() > deadline:
            raise AssertionError("no ESP packet arrived in 20 s")
        time.sleep(0.01)


def markdown(counts: Iterable[Count]) -> str:
    """The table: one row for each way, both kinds of selectors together."""
    titles = ("messages per 10,000 rekeyings", "packets under ESP", "packets in clear", "in clear per 10,000 rekeyings")
    rows = [f"| how the policy follows a rekeying | {' | '.join(titles)} |", "|---|---|---|---|---|"]
    found = list(counts)
    for way in WAYS.values():
        mine = [count for count in found if count.way == way.name]
        if mine:
            rekeyings, messages, protected, plain = (
                sum(getattr(count, name) for count in mine) for name in ("rekeyings", "messages", "protected", "plain")
            )
            leaked = f"{plain * 10000 / rekeyings:,.0f}"
            leaked, total = (f"**{text}**" if plain else text for text in (leaked, f"{plain:,}"))
            row = (way.text, f"{messages * 10000 / rekeyings:,.0f}", f"{protected:,}", total, leaked)
            rows.append(f"| {' | '.join(row)} |")
    return "\n".join(rows)


def as_data(count: Count) -> dict[str, str | int]:
    """For JSON."""
    return asdict(count)
