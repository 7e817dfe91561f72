"""Whether a packet ever leaves in clear while its policy changes: two namespaces, ESP, a sender that never stops."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from ipaddress import ip_address

import pytest

from pfkey import (
    Assignment,
    Direction,
    Kernel,
    Level,
    Mode,
    Policy,
    PolicyTracker,
    SecurityAssociation,
    Selector,
    Template,
    connect,
)

from .network import Cable, PacketCounter, cable

CHANGES = int(os.environ.get("PFKEY_LEAK_CHANGES", "2000"))
OUT = Direction.OUT
ESP, UDP = 50, 17
SENDER = """
import socket
out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
while True:
    try:
        out.sendto(b"x" * 64, ("10.0.0.2", 9))
    except OSError:
        pass
"""

pytestmark = pytest.mark.real_kernel


def esp(reqid: int) -> Template:
    return Template.transport(reqid=reqid, level=Level.UNIQUE)


def association(reqid: int) -> SecurityAssociation:
    """One SA for each reqid, without a cipher: no time goes into encryption."""
    return SecurityAssociation(
        ip_address(Cable.HERE),
        ip_address(Cable.THERE),
        0x1000 + reqid,
        mode=Mode.TRANSPORT,
        reqid=reqid,
        encryption="null",
        authentication="hmac-sha1",
        authentication_key=bytes(range(20)),
    )


# The ways to change a policy: each installs it and returns what then changes it, from one SA to the other and back.

Changes = Callable[[], None]


def delete_then_add(kernel: Kernel, site: Selector) -> Changes:
    kernel.add_policy(Policy(OUT, site, templates=(esp(1),), priority=10))

    def change() -> None:
        for count in range(CHANGES):
            kernel.delete_policy(Policy(OUT, site))
            kernel.add_policy(Policy(OUT, site, templates=(esp(2 - count % 2),), priority=10))

    return change


def bare_update(kernel: Kernel, site: Selector) -> Changes:
    kernel.add_policy(Policy(OUT, site, templates=(esp(1),), priority=10))

    def change() -> None:
        for count in range(CHANGES):
            kernel.update_policy(Policy(OUT, site, templates=(esp(2 - count % 2),), priority=10))

    return change


def tracker(kernel: Kernel, site: Selector) -> Changes:
    """New SAs of alternating reqids come, old ones go."""
    tracker = PolicyTracker(kernel)
    first = Assignment(esp(1), spi=1)
    tracker.add(OUT, site, first)

    def change() -> None:
        old, messages = first, 0
        for count in range(CHANGES):
            new = Assignment(esp(2 - count % 2), spi=count + 2)
            messages += len(tracker.add(OUT, site, new).sent)
            messages += len(tracker.remove(OUT, site, old).sent)
            old = new
        assert messages == CHANGES

    return change


SITES = {
    "hosts": Selector(Cable.HERE, Cable.THERE),
    "prefixes": Selector("10.0.0.0/24", "10.0.0.0/24"),
}


def packets(way: Callable[[Kernel, Selector], Changes], site: Selector) -> tuple[int, int]:
    """(under ESP, in clear): what arrives from a sender that never stops while the policy changes."""
    with cable() as wire:
        with wire.here:
            kernel = connect()
            for reqid in (1, 2):
                kernel.add_sa(association(reqid))
            change = way(kernel, site)
            sender = subprocess.Popen([sys.executable, "-c", SENDER], stdin=subprocess.DEVNULL)
        try:
            with wire.there, PacketCounter(Cable.PEER, ESP) as protected, PacketCounter(Cable.PEER, UDP) as plain:
                _wait_for(protected)
                change()
                assert sender.poll() is None, "the sender has ended"
                time.sleep(0.05)  # what is on its way arrives
                return protected.take(), plain.take()
        finally:
            sender.kill()
            sender.wait()
            kernel.close()


def _wait_for(counter: PacketCounter) -> None:
    deadline = time.monotonic() + 20
    while not counter.take():
        assert time.monotonic() < deadline, "no ESP packet arrived in 20 s"
        time.sleep(0.01)


@pytest.mark.parametrize("site", SITES)
def test_control_delete_then_add_leaks(site: str) -> None:
    """The detector works: what this package never does lets packets out in clear."""
    protected, plain = packets(delete_then_add, SITES[site])
    print(f"{CHANGES} changes of {site} by delete then add: {protected} packets under ESP, {plain} in clear")
    assert plain > 0
    assert protected > 0


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("way", [bare_update, tracker], ids=lambda way: way.__name__)
def test_no_packet_in_clear(way: Callable[[Kernel, Selector], Changes], site: str) -> None:
    protected, plain = packets(way, SITES[site])
    print(f"{CHANGES} changes of {site} by {way.__name__}: {protected} packets under ESP, {plain} in clear")
    assert plain == 0
    assert protected > 0
