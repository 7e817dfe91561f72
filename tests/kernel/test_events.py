"""What a kernel says unasked: expiry, ACQUIRE, what others did; and what the tracker makes of others' changes."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from ipaddress import ip_address

import pytest
from scenarios import ADD, DEL, SITE, UPD, X, Y, check, tunnel

from pfkey import (
    Action,
    Assignment,
    Channel,
    Direction,
    ExtensionType,
    ForeignPolicy,
    Kernel,
    Lifetime,
    Message,
    MessageType,
    Mode,
    Policy,
    PolicyTracker,
    SecurityAssociation,
    Selector,
    Template,
    connect,
)
from pfkey.constants import SAState

from .network import Cable, cable

OUT = Direction.OUT


def expect(kernel: Kernel, type: MessageType, seconds: float = 15) -> Message:
    """The next event of a type; others may come before it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for event in kernel.events(timeout=1):
            if event.type == type:
                return event
    pytest.fail(f"no {type.name} within {seconds:g} seconds")


def association(hard: int, soft: int) -> SecurityAssociation:
    return SecurityAssociation(
        ip_address("192.0.2.1"),
        ip_address("198.51.100.1"),
        0x5001,
        mode=Mode.TRANSPORT,
        encryption="null",
        authentication="hmac-sha1",
        authentication_key=bytes(range(20)),
        lifetime_hard=Lifetime(addtime=hard),
        lifetime_soft=Lifetime(addtime=soft),
    )


def test_an_sa_expires_softly_then_for_good(kernel: Kernel, other: Kernel) -> None:
    other.register()
    kernel.add_sa(association(hard=3, soft=1))
    soft = expect(other, MessageType.EXPIRE)
    assert (soft.spi, soft.state, soft.pid) == (0x5001, SAState.DYING, 0)
    assert soft.lifetime_soft is not None
    assert soft.lifetime_hard is None
    assert ExtensionType.KEY_AUTH not in soft
    hard = expect(other, MessageType.EXPIRE)
    assert (hard.spi, hard.state) == (0x5001, SAState.DEAD)
    assert hard.lifetime_hard is not None
    with pytest.raises(ProcessLookupError):
        kernel.get_sa("192.0.2.1", "198.51.100.1", 0x5001)


def test_a_policy_expires_in_silence(kernel: Kernel, other: Kernel) -> None:
    other.register()
    kernel.add_policy(Policy(OUT, SITE, Action.DISCARD, lifetime_hard=Lifetime(addtime=1)))
    assert expect(other, MessageType.SPDADD).policy is not None
    deadline = time.monotonic() + 15
    while kernel.dump_policies() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert kernel.dump_policies() == []
    assert [event.type for event in other.events(timeout=0.3)] == []


def test_others_hear_of_changes_and_not_of_questions(kernel: Kernel, other: Kernel) -> None:
    policy = kernel.add_policy(Policy(OUT, SITE, Action.DISCARD))
    kernel.get_policy(policy.id)
    kernel.update_policy(Policy(OUT, SITE, Action.NONE))
    kernel.dump_policies()
    kernel.delete_policy(policy)
    with pytest.raises(FileNotFoundError):
        kernel.delete_policy(policy)
    kernel.flush_policies()
    kernel.add_policy(policy)
    kernel.flush_policies()
    heard = [event.type for event in other.events(timeout=0.3)]
    assert heard == [ADD, UPD, DEL, ADD, MessageType.SPDFLUSH]
    assert [event.type for event in kernel.events(timeout=0.1)] == [], "one's own changes are no events"


def test_events_on_a_channel_of_their_own(connect_channel: Callable[[], Channel]) -> None:
    kernel = connect(connect_channel(), events=connect_channel())
    somebody = connect(connect_channel())
    kernel.register()
    kernel.add_policy(Policy(OUT, SITE, Action.DISCARD))
    somebody.add_policy(Policy(Direction.IN, SITE, Action.DISCARD))
    kernel.delete_policy(Policy(OUT, SITE))
    events = list(kernel.events(timeout=0.3))
    assert [(event.type, event.policy and event.policy.direction) for event in events] == [(ADD, Direction.IN)]


def test_a_foreign_policy_is_left_alone(kernel: Kernel, other: Kernel) -> None:
    theirs = other.add_policy(Policy(OUT, SITE, Action.DISCARD, priority=7))
    tracker = PolicyTracker(kernel)
    with pytest.raises(ForeignPolicy, match="belongs to somebody else"):
        tracker.add(OUT, SITE, X)
    tracker.flush()
    assert other.get_policy(theirs.id).action == Action.DISCARD


def test_a_foreign_flush_is_noticed_at_the_removal(kernel: Kernel, other: Kernel) -> None:
    tracker = PolicyTracker(kernel)
    tracker.add(OUT, SITE, X)
    other.flush_policies()
    assert tracker.remove(OUT, SITE, X).sent == (DEL,)
    assert tracker.add(OUT, SITE, Y).sent == (ADD,)
    check(tracker, other, OUT, SITE)


def test_an_update_heals_what_somebody_changed(kernel: Kernel, other: Kernel) -> None:
    tracker = PolicyTracker(kernel)
    tracker.add(OUT, SITE, X)
    other.update_policy(Policy(OUT, SITE, Action.NONE, priority=1))
    assert tracker.add(OUT, SITE, tunnel(9, reqid=9)).sent == (UPD,)
    check(tracker, other, OUT, SITE)


@pytest.mark.real_kernel
def test_traffic_without_an_sa_causes_an_acquire() -> None:
    with cable() as wire, wire.here:
        site = Selector(Cable.HERE, Cable.THERE)
        with connect() as kernel, connect() as listener:
            listener.register()
            tracker = PolicyTracker(kernel)
            trap = Assignment(Template.transport(reqid=42))
            tracker.add(OUT, site, trap)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.sendto(b"x", (Cable.THERE, 9))
            acquire = expect(listener, MessageType.ACQUIRE)
            assert acquire.policy is not None
            assert tracker.find(acquire.policy.id) == (OUT, site)
            assert acquire.source is not None
            assert acquire.source.address == ip_address(Cable.HERE)
            assert (acquire.pid, acquire.policy.direction) == (0, OUT)
            assert acquire.seq != 0
