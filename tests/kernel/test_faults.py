"""The tracker when something goes wrong between it and a real af_key, or the embedded Linux kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from faulty import (
    Fault,
    FaultyChannel,
    closes,
    interrupts,
    loses_reply,
    loses_request,
    no_buffers_after_work,
    rejects,
    spoils,
)
from scenarios import ADD, DEL, MOVED, SITE, TRAP, UPD, X, Y, check

from pfkey import (
    Action,
    Channel,
    ChannelClosed,
    Direction,
    Kernel,
    KernelError,
    MessageType,
    NotTracked,
    Policy,
    PolicyTracker,
    ReplyTimeout,
    Selector,
    connect,
)

OUT = Direction.OUT


@dataclass
class Patient:
    """A tracker over a channel that goes wrong when told to, and an honest connection beside it."""

    channel: FaultyChannel
    tracker: PolicyTracker
    other: Kernel

    def fault(self, type: MessageType, send: Callable[[FaultyChannel, bytes], None]) -> None:
        self.channel.faults.append(Fault(type, send))

    def check(self) -> None:
        check(self.tracker, self.other, OUT, SITE)


@pytest.fixture
def patient(connect_channel: Callable[[], Channel]) -> Patient:
    channel = FaultyChannel(connect_channel())
    return Patient(channel, PolicyTracker(connect(channel, timeout=0.3)), connect(connect_channel()))


DOUBTS = {
    "request lost": (loses_request, ReplyTimeout),
    "reply lost": (loses_reply, ReplyTimeout),
    "no buffers": (no_buffers_after_work, KernelError),
    "interrupt": (interrupts, KeyboardInterrupt),
}


@pytest.mark.parametrize("doubt", DOUBTS)
@pytest.mark.parametrize("type", [ADD, UPD, DEL], ids=lambda kind: kind.name)
def test_the_next_call_reads_and_repairs(type: MessageType, doubt: str, patient: Patient) -> None:
    send, error = DOUBTS[doubt]
    call, assignment = (patient.tracker.remove, TRAP) if type == DEL else (patient.tracker.add, X)
    if type != ADD:
        patient.tracker.add(OUT, SITE, TRAP)
    patient.fault(type, send)
    with pytest.raises(error):
        call(OUT, SITE, assignment)
    patient.tracker.add(OUT, SITE, Y)
    patient.check()
    patient.tracker.flush()
    assert patient.other.dump_policies() == []


def test_a_failed_add_does_not_suppress_the_next(patient: Patient) -> None:
    patient.fault(ADD, spoils)
    with pytest.raises(KernelError, match="EINVAL"):
        patient.tracker.add(OUT, SITE, X)
    assert patient.tracker.assignments(OUT, SITE) == ()
    assert patient.tracker.add(OUT, SITE, Y).sent == (ADD,)
    patient.check()


@pytest.mark.parametrize("send", [spoils, rejects("ENOMEM")], ids=["by the kernel", "for want of memory"])
def test_a_rejected_update_leaves_the_previous_top(
    send: Callable[[FaultyChannel, bytes], None], patient: Patient
) -> None:
    patient.tracker.add(OUT, SITE, TRAP)
    patient.fault(UPD, send)
    with pytest.raises(KernelError):
        patient.tracker.add(OUT, SITE, MOVED)
    assert patient.tracker.assignments(OUT, SITE) == (TRAP,)
    patient.check()
    assert patient.channel.types() == [ADD, UPD]


def test_a_flush_deletes_ours_alone_and_resets(patient: Patient) -> None:
    theirs = patient.other.add_policy(Policy(OUT, Selector("10.3.0.0/16", "10.4.0.0/16"), Action.DISCARD, priority=7))
    patient.tracker.add(OUT, SITE, X)
    patient.tracker.flush()
    assert patient.channel.types() == [ADD, DEL]
    assert [policy.id for policy in patient.other.dump_policies()] == [theirs.id]
    assert patient.tracker.add(OUT, SITE, Y).sent == (ADD,)
    assert patient.tracker.remove(OUT, SITE, Y).sent == (DEL,)
    with pytest.raises(NotTracked):
        patient.tracker.remove(OUT, SITE, X)


def test_a_vanished_socket(patient: Patient) -> None:
    patient.tracker.add(OUT, SITE, TRAP)
    patient.fault(UPD, closes)
    with pytest.raises(ChannelClosed):
        patient.tracker.add(OUT, SITE, X)
    patient.tracker.reconnect(patient.other)
    patient.tracker.remove(OUT, SITE, X)
    patient.check()
