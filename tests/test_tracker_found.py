"""Faults of the tracker that its state machine found, each as the few calls that show it."""

from __future__ import annotations

import pytest
from faulty import FaultyChannel

from pfkey import (
    Action,
    Assignment,
    Direction,
    EmbeddedKernel,
    ForeignPolicy,
    Kernel,
    KernelError,
    MessageType,
    Policy,
    PolicyTracker,
    ReplyTimeout,
    Selector,
    Template,
    connect,
)

ADD, UPD, DEL = MessageType.SPDADD, MessageType.SPDUPDATE, MessageType.SPDDELETE
OUT = Direction.OUT
SITE = Selector("10.1.0.0/16", "10.2.0.0/16")
HOSTS = Selector("10.1.1.1", "10.2.1.1")
X = Assignment(Template.tunnel("192.0.2.1", "198.51.100.1", reqid=1), spi=0xC1)
MOVED = Assignment(Template.tunnel("192.0.2.1", "198.51.100.99", reqid=1), spi=0xC2)


class Rig:
    """An embedded kernel, a tracker over a connection that records, and a second connection."""

    def __init__(self, profile: str, **how: object) -> None:
        self.embedded = EmbeddedKernel(profile)
        self.other = connect(self.embedded.connect())
        self.tracker = self.restart(**how)

    def restart(self, **how: object) -> PolicyTracker:
        """A new process with a tracker of its own."""
        self.channel = FaultyChannel(self.embedded.connect())
        self.kernel: Kernel = connect(self.channel, timeout=0.05)
        self.tracker = PolicyTracker(self.kernel, **how)  # type: ignore[arg-type]
        return self.tracker

    def held(self) -> list[Policy]:
        return self.embedded.policies()


def test_a_policy_with_the_tag_of_another_tracker_is_not_taken_for_what_a_lost_message_made() -> None:
    rig = Rig("linux")
    rig.tracker.add(OUT, SITE, X)
    tracker = rig.restart()  # without a name: what the first one left is somebody else's
    rig.embedded.fail_next(MessageType.SPDADD, "ENOBUFS", "late")
    with pytest.raises(ReplyTimeout):
        tracker.add(OUT, SITE, X)
    with pytest.raises(ForeignPolicy):
        tracker.add(OUT, SITE, X)
    tracker.flush()
    assert [policy.action for policy in rig.held()] == [Action.IPSEC]


@pytest.mark.parametrize("profile", ["freebsd-11", "freebsd-13", "freebsd-14", "netbsd", "macos"])
def test_two_ipv6_hosts_are_guarded_by_an_alias_with_a_scope(profile: str) -> None:
    hosts = Selector("2001:db8:1::1", "2001:db8:2::1")
    rig = Rig(profile)
    rig.tracker.add(OUT, hosts, X)
    with rig.embedded.probe(OUT, hosts) as probe:
        change = rig.tracker.replace(OUT, hosts, X, MOVED)
    assert (change.sent, change.guard) == ((UPD,), (ADD, DEL))
    assert probe.bare == 0
    assert {step.policy.action for step in probe.log if step.policy} == {Action.IPSEC}
    assert len(rig.held()) == 1


@pytest.mark.parametrize("when", ["late", "lost", "after"])
def test_a_guard_of_unknown_outcome_leaves_the_assignment_recorded_as_the_error_says(when: str) -> None:
    rig = Rig("freebsd-13")
    rig.tracker.add(OUT, SITE, X)
    rig.embedded.fail_next(ADD, "ENOBUFS", when)
    with pytest.raises((ReplyTimeout, KernelError)):
        rig.tracker.add(OUT, SITE, MOVED)
    assert rig.tracker.assignments(OUT, SITE) == (MOVED, X)
    assert [policy.templates for policy in rig.held()] == [X.templates]
    rig.embedded.release_replies()
    assert rig.tracker.remove(OUT, SITE, X).sent == (UPD,)
    assert [policy.templates for policy in rig.held()] == [MOVED.templates]


def test_a_guard_that_was_refused_leaves_the_list_as_it_was() -> None:
    rig = Rig("freebsd-13")
    rig.tracker.add(OUT, SITE, X)
    rig.embedded.fail_next(ADD, "ENOMEM")
    with pytest.raises(KernelError):
        rig.tracker.add(OUT, SITE, MOVED)
    assert rig.tracker.assignments(OUT, SITE) == (X,)
