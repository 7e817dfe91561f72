"""What an IKE daemon does to its policies, and what a kernel should hear of it: one table for every kernel.

The numbers are those of a published list of tracker scenarios; where a tracker in the field sends more, or loses a
policy, the row says what ours does instead.  `run` plays a scenario and compares, after every call, what was sent with
the row and what the kernel holds with what the assignment on top asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from pfkey import (
    Action,
    Assignment,
    Direction,
    Kernel,
    MessageType,
    NotTracked,
    Policy,
    PolicyTracker,
    Rank,
    SAProtocol,
    Selector,
    Template,
)
from pfkey.abi import Abi
from pfkey.tracker import TrackedPolicy, image_of_policy

ADD, UPD, DEL = MessageType.SPDADD, MessageType.SPDUPDATE, MessageType.SPDDELETE
ME, PEER, PEER_MOVED, ME_MOVED = "192.0.2.1", "198.51.100.1", "198.51.100.99", "192.0.2.99"
SITE = Selector("10.1.0.0/16", "10.2.0.0/16")


def tunnel(spi: int, *, reqid: int = 1, me: str = ME, peer: str = PEER, **how: object) -> Assignment:
    """An SA in a tunnel from here to the peer."""
    return Assignment(Template.tunnel(me, peer, reqid=reqid), spi=spi, **how)  # type: ignore[arg-type]


X, Y, Z = tunnel(0xC0000001), tunnel(0xC0000002), tunnel(0xC0000003)
R2, R3 = tunnel(0xC0000004, reqid=2), tunnel(0xC0000005, reqid=3)
MOVED = tunnel(0xC0000006, peer=PEER_MOVED)
TRANSPORT = Assignment(Template.transport(reqid=1), spi=0xC0000007)
IPCOMP = Assignment(
    Template.tunnel(ME, PEER, reqid=1, protocol=SAProtocol.IPCOMP),
    Template.transport(reqid=1),
    spi=(0x1234, 0xC0000008),
)
TRAP = tunnel(0, rank=Rank.TRAP)
TRAP_ANY = tunnel(0, rank=Rank.TRAP, peer="0.0.0.0")
TRAP_1000 = tunnel(0, rank=Rank.TRAP, priority=1000)
X_1000 = tunnel(0xC0000001, priority=1000)
GUARD = Assignment(*X.templates, spi=0xC0000001, action=Action.DISCARD)
PASS = Assignment(action=Action.NONE, rank=Rank.PASS)
DROP = Assignment(action=Action.DISCARD, rank=Rank.FALLBACK)


@dataclass(frozen=True)
class Call:
    """One call and the message it may send; or the exception it raises."""

    verb: str
    what: tuple[Assignment, ...]
    sent: MessageType | None = None
    raises: type[Exception] | None = None
    selector: Selector = SITE
    direction: Direction = Direction.OUT


def add(assignment: Assignment, sent: MessageType | None = None, **where: object) -> Call:
    return Call("add", (assignment,), sent, **where)  # type: ignore[arg-type]


def remove(assignment: Assignment, sent: MessageType | None = None, **where: object) -> Call:
    return Call("remove", (assignment,), sent, **where)  # type: ignore[arg-type]


def swap(old: Assignment, new: Assignment, sent: MessageType | None = None, **where: object) -> Call:
    return Call("replace", (old, new), sent, **where)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Scenario:
    name: str
    calls: tuple[Call, ...]
    left: tuple[Assignment, ...] = ()
    needs: Callable[[Abi], bool] = field(default=lambda abi: True)

    def __str__(self) -> str:
        return self.name


def scenario(name: str, *calls: Call, left: tuple[Assignment, ...] = (), **more: object) -> Scenario:
    return Scenario(name, calls, left, **more)  # type: ignore[arg-type]


def _has_forward(abi: Abi) -> bool:
    return Direction.FWD in abi.directions


def _everywhere(*calls: Call) -> tuple[Call, ...]:
    """The same calls for in, fwd and out, as a tunnel gateway makes them."""
    inbound = SITE.reversed()
    turned = []
    for direction in (Direction.IN, Direction.FWD):
        for call in calls:
            what = tuple(assignment.reversed() for assignment in call.what)
            turned.append(Call(call.verb, what, call.sent, call.raises, inbound, direction))
    return (*turned, *calls)


ANY4, ANY6 = Selector("0.0.0.0/0", "0.0.0.0/0"), Selector("::/0", "::/0")
X6 = Assignment(Template.tunnel("2001:db8::1", "2001:db8::2", reqid=1), spi=0xC0000011)

SCENARIOS = (
    scenario("1 an SA comes and goes", add(X, ADD), remove(X, DEL)),
    scenario("2 the same SA is added twice", add(X, ADD), add(X), remove(X), remove(X, DEL)),
    scenario("4 a second SA of the same image", add(X, ADD), add(Y), left=(Y, X)),
    scenario("5 the older SA goes", add(X, ADD), add(Y), remove(X), left=(Y,)),
    scenario("6 the newer SA goes", add(X, ADD), add(Y), remove(Y), left=(X,)),
    scenario("7 removing what was never added", remove(X, raises=NotTracked)),
    scenario(
        "7b removing another SA than the one that was added", add(X, ADD), remove(Y, raises=NotTracked), left=(X,)
    ),
    scenario(
        "9 host bits make no other policy",
        add(X, ADD, selector=Selector("10.1.2.3/16", "10.2.0.0/16")),
        add(Y, selector=Selector("10.1.9.9/16", "10.2.7.7/16")),
        left=(Y, X),
    ),
    scenario(
        "11 reqids on top of each other",
        add(X, ADD),
        add(R2, UPD),
        add(R3, UPD),
        remove(R2),
        remove(R3, UPD),
        remove(X, DEL),
    ),
    scenario("14 tunnel to transport", add(X, ADD), add(TRANSPORT, UPD), remove(X), remove(TRANSPORT, DEL)),
    scenario("16 IPComp to plain ESP", add(IPCOMP, ADD), add(X, UPD), remove(IPCOMP), remove(X, DEL)),
    scenario("19 a trap waits behind an SA", add(TRAP, ADD), add(X, UPD), remove(X, UPD), remove(TRAP, DEL)),
    scenario("20 a trap added behind an SA", add(X, ADD), add(TRAP), remove(X, UPD), remove(TRAP, DEL)),
    scenario(
        "21 a trap under two SAs in turn",
        add(TRAP, ADD),
        add(X, UPD),
        remove(X, UPD),
        add(Y, UPD),
        remove(Y, UPD),
        left=(TRAP,),
    ),
    scenario("22 a trap to any peer", add(TRAP_ANY, ADD), add(X, UPD), remove(X, UPD), remove(TRAP_ANY, DEL)),
    scenario(
        "26 manual priorities are equal, nothing changes",
        add(TRAP_1000, ADD),
        add(X_1000),
        remove(X_1000),
        left=(TRAP_1000,),
    ),
    scenario(
        "28 a guard while the peer moves",
        add(X, ADD),
        add(GUARD, UPD),
        remove(X),
        add(MOVED, UPD),
        remove(GUARD),
        remove(MOVED, DEL),
    ),
    scenario("29 the peer moves, replaced in one call", add(X, ADD), swap(X, MOVED, UPD), remove(MOVED, DEL)),
    scenario("30 only a NAT port changed, replaced in one call", add(X, ADD), swap(X, Y), left=(Y,)),
    scenario(
        "30b only a NAT port changed, under a guard",
        add(X, ADD),
        add(GUARD, UPD),
        remove(X),
        add(X, UPD),
        remove(GUARD),
        left=(X,),
    ),
    scenario(
        "31 inbound, replaced in one call: no gap",
        add(X.reversed(), ADD, selector=SITE.reversed(), direction=Direction.IN),
        swap(X.reversed(), MOVED.reversed(), UPD, selector=SITE.reversed(), direction=Direction.IN),
        swap(MOVED.reversed(), MOVED.reversed(), selector=SITE.reversed(), direction=Direction.IN),
        remove(MOVED.reversed(), DEL, selector=SITE.reversed(), direction=Direction.IN),
    ),
    scenario("31b replacing what was never added", swap(X, Y, raises=NotTracked)),
    scenario(
        "33 a rekeying in every direction",
        *_everywhere(add(X, ADD), add(Y), remove(X), add(Z), remove(Y), remove(Z, DEL)),
        needs=_has_forward,
    ),
    scenario(
        "34 a rekeying with a changed end point in every direction",
        *_everywhere(add(X, ADD), add(MOVED, UPD), remove(X), remove(MOVED, DEL)),
        needs=_has_forward,
    ),
    scenario("35 a lost collision: the redundant SA goes again", add(X, ADD), add(Y), remove(Y), left=(X,)),
    scenario("37 reauthentication, break before make", add(X, ADD), remove(X, DEL), add(Y, ADD), left=(Y,)),
    scenario(
        "37b reauthentication over a trap: no gap",
        add(TRAP, ADD),
        add(X, UPD),
        remove(X, UPD),
        add(Y, UPD),
        left=(Y, TRAP),
    ),
    scenario(
        "39 narrower selectors are other policies",
        add(X, ADD),
        add(Y, ADD, selector=Selector("10.1.1.0/24", "10.2.0.0/16")),
        remove(X, DEL),
        remove(Y, DEL, selector=Selector("10.1.1.0/24", "10.2.0.0/16")),
    ),
    scenario(
        "47 families do not collapse",
        add(X, ADD, selector=ANY4),
        add(X6, ADD, selector=ANY6),
        remove(X, DEL, selector=ANY4),
        remove(X6, DEL, selector=ANY6),
    ),
    scenario(
        "47b ports do not collapse",
        add(X, ADD, selector=Selector("10.1.0.0/16", "10.2.0.0/16", protocol="tcp", destination_port=443)),
        add(X, ADD, selector=Selector("10.1.0.0/16", "10.2.0.0/16", protocol="tcp", destination_port=444)),
        add(X, ADD, selector=Selector("10.1.0.0/16", "10.2.0.0/16", protocol="udp", destination_port=443)),
        add(X, ADD, selector=Selector("10.1.0.0/16", "10.2.0.0/16", protocol="tcp")),
        add(X, ADD),
        left=(X,),
    ),
    scenario("48 shunts", add(PASS, ADD), add(PASS), remove(PASS), remove(PASS, DEL)),
    scenario("48b a fallback drop stands behind an SA", add(DROP, ADD), add(X, UPD), remove(X, UPD), left=(DROP,)),
    scenario(
        "52 v6 hosts, one port",
        add(X6, ADD, selector=Selector("2001:db8:1::1", "2001:db8:2::1", protocol="tcp", destination_port=443)),
        remove(X6, DEL, selector=Selector("2001:db8:1::1/128", "2001:db8:2::1/128", protocol=6, destination_port=443)),
    ),
    scenario(
        "52b ICMP type and code",
        add(X, ADD, selector=Selector("10.1.0.0/16", "10.2.0.0/16", protocol="icmp", icmp_type=3, icmp_code=4)),
        add(X, ADD, selector=Selector("10.1.0.0/16", "10.2.0.0/16", protocol="icmp", icmp_type=8)),
        remove(X, DEL, selector=Selector("10.1.0.0/16", "10.2.0.0/16", protocol=1, icmp_type=3, icmp_code=4)),
        remove(X, DEL, selector=Selector("10.1.0.0/16", "10.2.0.0/16", protocol=1, icmp_type=8, icmp_code=0)),
    ),
)


def in_kernel(kernel: Kernel, direction: Direction, selector: Selector) -> Policy | None:
    """The kernel's entry for this direction and selector; two of them fail the test."""
    found = [
        policy
        for policy in kernel.dump_policies()
        if policy.direction == direction and policy.selector.identity == selector.identity
    ]
    assert len(found) <= 1, f"{len(found)} policies for one selector: {found}"
    return found[0] if found else None


def check(tracker: PolicyTracker, kernel: Kernel, direction: Direction, selector: Selector) -> None:
    """The kernel holds what the assignment on top asks for, and nothing when there is none."""
    held = in_kernel(kernel, direction, selector)
    assignments = tracker.assignments(direction, selector)
    if not assignments:
        assert held is None, f"nobody uses it, yet the kernel holds {held}"
        return
    assert held is not None, f"{assignments[0]} is on top, yet the kernel holds no policy"
    asked = TrackedPolicy(direction, selector, kernel.abi).image(assignments[0])
    assert image_of_policy(held, kernel.abi) == asked


def run(scenario: Scenario, kernel: Kernel) -> None:
    """Play it on an empty SPD, compare after every call, and leave the SPD empty."""
    tracker = PolicyTracker(kernel)
    before = len(kernel.dump_policies())
    try:
        for number, call in enumerate(scenario.calls):
            doing = f"call {number}: {call.verb} {call.what[-1]}"
            method = getattr(tracker, call.verb)
            if call.raises:
                with pytest.raises(call.raises):
                    method(call.direction, call.selector, *call.what)
            else:
                change = method(call.direction, call.selector, *call.what)
                assert change.sent == ((call.sent,) if call.sent else ()), doing
                assert change.guard == () or call.sent is UPD, doing
            check(tracker, kernel, call.direction, call.selector)
        assert tracker.assignments(Direction.OUT, SITE) == scenario.left
    finally:
        tracker.flush()
    assert len(tracker) == 0
    assert len(kernel.dump_policies()) == before
