"""The kernel itself: connections, who receives what, time, faults, and what a test may look at."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import inf
from threading import RLock

from ..abi import Abi
from ..constants import Direction, MessageType, PolicyScope
from ..messages import AddressLike, Policy, SecurityAssociation, Selector
from .channel import EmbeddedChannel, kernel_failure
from .dialect import DialectModule, Receivers
from .faults import Fault, When, due, fault
from .interrupts import Uninterrupted
from .probe import Probe
from .profiles import Dialect, Profile, profile
from .sad import AssociationDatabase
from .spd import PolicyDatabase
from .traffic import Passage, make_packet, send_packet
from .walkers import Walkers
from .wire import RefusedError, SendFailedError, wire_for

__all__ = ["EmbeddedKernel"]


def _module(dialect: Dialect) -> DialectModule:
    """The code that answers; the other one is not even loaded."""
    if dialect is Dialect.AF_KEY:
        from . import afkey

        return afkey
    from . import kame

    return kame


def _any_between(low: int, high: int) -> int:
    """A number drawn by chance; both ends belong to the range."""
    return low + int.from_bytes(os.urandom(8), "little") % (high - low + 1)


_LONGEST_SLEEP = 86400.0
"""Seconds; a tag of a tracker (BSD) is a lifetime of so many years that no lock can be waited for so long."""


class EmbeddedKernel:
    """An SAD and an SPD in this process, spoken to in the PF_KEY bytes of a real system: "linux", "freebsd-13", ...

    With `cpus=2` a Linux shows what only packets on another CPU can see (the profile "linux-smp" has them): at a step
    "walking" look-ups see the SPD as a packet does that started before and is not through yet.  `grace_period()` waits
    for such packets, and so do a few milliseconds.

    `connect()` gives a connection, any number of them, from any thread.  `clock` tells the time in seconds since the
    epoch; `advance()` moves it on.  `choose_spi` picks an SPI from a range (default: at random).

    `on_step` holds callables that get the name of a step and this kernel at every change of the SPD that a packet could
    notice, in the middle of an update too.  They run under the kernel's lock: they may look, and send nothing.
    """

    def __init__(
        self,
        profile_name: str | Profile = "linux",
        *,
        cpus: int | None = None,
        clock: Callable[[], float] = time.time,
        choose_spi: Callable[[int, int], int] | None = None,
    ) -> None:
        self.profile = profile(profile_name) if cpus is None else replace(profile(profile_name), cpus=cpus)
        self.choose_spi = choose_spi or _any_between
        self.lock = RLock()
        self.on_step: list[Callable[[str, EmbeddedKernel], None]] = []
        self.wire = wire_for(self.profile.abi)
        self.spd = PolicyDatabase(self.profile)
        self.dialect = _module(self.profile.dialect)
        self.sad = AssociationDatabase(partial(self.dialect.association_key, self.profile))
        self.walkers = Walkers()
        self.channels: list[EmbeddedChannel] = []
        self.acquires: dict[tuple[object, ...], list[float]] = {}
        """FreeBSD: which packets asked for an SA -> [seq, packets since, when]."""
        self.policy_ids = 0
        self.reqids = 0
        self.acquire_seq = 0
        self._clock = clock
        self._offset = 0.0
        self._deadline = inf
        self._faults: list[Fault] = []
        self._muted: EmbeddedChannel | None = None
        self._late: list[tuple[EmbeddedChannel, bytes]] = []
        self._holds = False

    @property
    def abi(self) -> Abi:
        """The system that this kernel behaves like."""
        return self.profile.abi

    def __repr__(self) -> str:
        return f"<EmbeddedKernel {self.profile.name}: {len(self.spd)} policies, {len(self.sad)} SAs>"

    # What people use.

    def connect(self) -> EmbeddedChannel:
        """A new connection, like a new PF_KEY socket."""
        with self.lock:
            channel = EmbeddedChannel(self)
            self.channels.append(channel)
            return channel

    def policies(self, direction: Direction | int | None = None) -> list[Policy]:
        """The live policies of a direction in match order; of all directions one after the other."""
        with self.lock:
            directions = list(Direction) if direction is None else [Direction(direction)]
            return [entry.policy(self.scope) for one in directions for entry in self.spd.in_order(one)]

    def associations(self) -> list[SecurityAssociation]:
        """The SAs, larval ones included, oldest first."""
        with self.lock:
            return [association.show(self.abi) for association in self.sad]

    def lookup(
        self,
        direction: Direction | int,
        source: AddressLike,
        destination: AddressLike,
        *,
        protocol: int | None = None,
        ports: tuple[int, int] = (0, 0),
        scope: int = 0,
    ) -> Policy | None:
        """The policy that a packet meets first; None where it would go by the default policy, in clear.

        `protocol` None is a packet of a protocol that no policy names; for ICMP the ports are type and code.
        """
        packet = make_packet(self.profile, source, destination, protocol=protocol, ports=ports, scope=scope)
        with self.lock:
            self.run_timers()
            entry = self.spd.match(direction, packet)
            return entry.policy(self.scope) if entry else None

    def packet(
        self,
        direction: Direction | int,
        source: AddressLike,
        destination: AddressLike,
        *,
        protocol: int | None = None,
        ports: tuple[int, int] = (0, 0),
        scope: int = 0,
        size: int = 100,
    ) -> Passage:
        """Send (or receive, or forward) a plaintext packet of `size` bytes: what becomes of it, ACQUIRE included."""
        packet = make_packet(self.profile, source, destination, protocol=protocol, ports=ports, scope=scope)
        with self.lock, Uninterrupted():
            self.run_timers()
            return send_packet(self, Direction(direction), packet, size)

    def probe(
        self,
        direction: Direction | int,
        source: AddressLike | Selector,
        destination: AddressLike | None = None,
        *,
        protocol: int | None = None,
        ports: tuple[int, int] = (0, 0),
    ) -> Probe:
        """A watch on what one packet would meet at every step: `with kernel.probe(...) as probe`."""
        return Probe(self, direction, source, destination, protocol=protocol, ports=ports)

    def advance(self, seconds: float) -> None:
        """Let time pass: policies and SAs expire, and those who registered hear of it."""
        with self.lock:
            self._offset += seconds
            self.run_timers()

    def fail_next(
        self,
        type: MessageType | int | None,
        error: int | str | None = None,
        when: str | When = When.BEFORE,
        *,
        skip: int = 0,
        room: int = 0,
    ) -> None:
        """Let the next message of `type` (None: any) go wrong, or with `skip` the one after so many; faults queue up.

        `error` is a name, or a number of this host's errno module (default: ENOBUFS).  `when`: "before" the work, in
        the reply; "send", before the work, from send(); "unlinked", in the reply of an SPDUPDATE that has unlinked the
        old policy; "after" the work, from send(), the reply lost (ENOBUFS).  Without an error: "ignored", nothing done
        and no reply; "lost", the work done and the reply lost; "late", the reply kept until release_replies();
        "overflow", the work done while the sender's receive buffer takes `room` more messages (what does not fit is
        lost, and FreeBSD says ENOBUFS from send(), but for a dump).

        Raises ValueError for what this kernel cannot do wrong.
        """
        ordered = fault(self.profile, type, error, when, skip=skip, room=room)
        with self.lock:
            self._faults.append(ordered)

    @property
    def faults(self) -> int:
        """How many faults are still to come."""
        return len(self._faults)

    def clear_faults(self) -> None:
        """No more faults: those that have not come yet are called off.  Late replies stay kept."""
        with self.lock:
            self._faults.clear()

    def release_replies(self) -> int:
        """Deliver the replies that "late" faults kept; how many they were."""
        with self.lock, Uninterrupted():
            late, self._late = self._late, []
            for channel, message in late:
                channel.queue(message)
            return len(late)

    # What the handlers use, under the lock.

    @property
    def scope(self) -> PolicyScope:
        """What the scope of every policy here is (FreeBSD: GLOBAL)."""
        return PolicyScope.GLOBAL if self.abi.has_scope else PolicyScope.ANY

    def now(self) -> float:
        """Seconds since the epoch."""
        return self._clock() + self._offset

    def step(self, name: str) -> None:
        """The SPD is now in a state that a packet could meet."""
        if not self.on_step:
            return
        self._look(name)
        if self.walkers:
            for unseen in self.walkers.missed(self):
                self.spd.hidden = unseen
                try:
                    self._look("walking")
                finally:
                    self.spd.hidden = frozenset()

    def _look(self, name: str) -> None:
        for watch in list(self.on_step):
            watch(name, self)

    def grace_period(self) -> None:
        """Return when no packet is on its way any more that started before."""
        with self.lock, Uninterrupted():
            self.walkers.end(self)

    def stop_after_unlink(self) -> None:
        """Raise the error that a fault has ready for the moment after the unlinking."""
        if self._faults and (found := due(self._faults, MessageType.SPDUPDATE, unlinked=True)) is not None:
            raise RefusedError(found.error)

    def deliver(self, channel: EmbeddedChannel, message: bytes, *, beyond_limit: bool = False) -> bool:
        """Into a connection's receive buffer; False when it did not fit."""
        if channel is not self._muted:
            return channel.queue(message, beyond_limit=beyond_limit)
        if self._holds:
            self._late.append((channel, message))
        return True

    def broadcast(
        self, message: bytes, receivers: Receivers, one: EmbeddedChannel | None = None, *, beyond_limit: bool = False
    ) -> bool:
        """To those concerned, `one` last and in any case; False when `one` had no room (on some, when anybody had)."""
        for channel in reversed(self.channels):
            if channel.promiscuous:
                self.deliver(channel, self.dialect.promiscuous_copy(self, message))
            if channel is one or receivers is Receivers.SENDER:
                continue
            heard = not (receivers is Receivers.ALL or channel.registered) or self.deliver(channel, message)
            if not heard and self.profile.deaf_listener_fails:
                return False
        return one is None or self.deliver(one, message, beyond_limit=beyond_limit)

    def someone_registered(self) -> bool:
        """Whether an ACQUIRE would be heard."""
        return any(channel.registered for channel in self.channels)

    def schedule(self, when: float) -> None:
        """Something expires then."""
        self._deadline = min(self._deadline, when)

    # What the connections use, under the lock.

    def submit(self, channel: EmbeddedChannel, data: bytes) -> None:
        """A message was sent: do what it says."""
        self.run_timers()
        found = due(self._faults, data[1] if len(data) > 1 else None, unlinked=False) if self._faults else None
        if found is None:
            self._dispatch(channel, data)
        else:
            self._go_wrong(found, channel, data)

    def _go_wrong(self, found: Fault, channel: EmbeddedChannel, data: bytes) -> None:
        if found.when is When.SEND:
            raise kernel_failure(found.error, self.abi)
        if found.when is When.BEFORE:
            try:
                self.dialect.refuse(self, channel, data, found.error)
            except SendFailedError as failure:  # the refusal itself did not fit
                raise kernel_failure(failure.name, self.abi) from None
        elif found.when is When.OVERFLOW:
            with channel.only_room_for(found.room):
                self._dispatch(channel, data)
        elif found.when is not When.IGNORED:
            self._muted, self._holds = channel, found.when is When.LATE
            try:
                self._dispatch(channel, data)
            finally:
                self._muted = None
            if found.when is When.AFTER:
                raise kernel_failure(found.error, self.abi)

    def run_timers(self) -> None:
        """Expire what is due."""
        if self.now() >= self._deadline:
            with Uninterrupted():
                while (now := self.now()) >= self._deadline:
                    self._deadline = inf
                    self.schedule(self.dialect.expire(self, now))

    @property
    def deadline(self) -> float:
        """When something expires next, in seconds since the epoch; infinite when nothing does."""
        return self._deadline

    def patience(self, left: float | None) -> float | None:
        """How long a reader may sleep before a timer could have something for it."""
        if self._deadline == inf:
            return left
        due = min(max(self._deadline - self.now(), 0.01), _LONGEST_SLEEP)
        return due if left is None else min(due, left)

    def resume_dump(self, channel: EmbeddedChannel) -> None:
        """A reader made room: go on with its dump."""
        self.dialect.resume_dump(self, channel)

    def forget(self, channel: EmbeddedChannel) -> None:
        """A connection was closed."""
        self.channels.remove(channel)

    def _dispatch(self, channel: EmbeddedChannel, data: bytes) -> None:
        try:
            self.dialect.receive(self, channel, data)
        except SendFailedError as failure:
            raise kernel_failure(failure.name, self.abi) from None
