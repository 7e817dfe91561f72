"""A watch on one packet: was there a step at which no policy was there for it?"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Self

from ..constants import Direction
from ..messages import AddressLike, Policy, Selector
from .traffic import make_packet, packet_of

if TYPE_CHECKING:
    from .kernel import EmbeddedKernel

__all__ = ["Probe", "Step"]


class Step(NamedTuple):
    """One step of the SPD, and the policy that the packet would have met there."""

    name: str
    policy: Policy | None


class Probe:
    """Tries one packet at every step of the SPD while it is armed: within `with`, or from `arm()` to `disarm()`.

    `steps` counts the steps, `bare` those at which no policy matched, so that the packet would have passed in clear;
    `log` holds them.  The packet is given by its addresses, or by a selector that it belongs to.
    """

    def __init__(
        self,
        kernel: EmbeddedKernel,
        direction: Direction | int,
        source: AddressLike | Selector,
        destination: AddressLike | None = None,
        *,
        protocol: int | None = None,
        ports: tuple[int, int] = (0, 0),
    ) -> None:
        self._kernel = kernel
        self.direction = Direction(direction)
        if isinstance(source, Selector):
            self.packet = packet_of(kernel.profile, source)
        elif destination is None:
            raise TypeError("a probe takes a selector, or the source and the destination of a packet")
        else:
            self.packet = make_packet(kernel.profile, source, destination, protocol=protocol, ports=ports)
        self.log: list[Step] = []
        self.armed = False

    @property
    def steps(self) -> int:
        """How many steps it saw."""
        return len(self.log)

    @property
    def bare(self) -> int:
        """At how many of them no policy matched."""
        return sum(step.policy is None for step in self.log)

    def arm(self) -> None:
        """Watch from now on."""
        with self._kernel.lock:
            if not self.armed:
                self.armed = True
                self._kernel.on_step.append(self._watch)

    def disarm(self) -> None:
        """Watch no longer; the counts stay."""
        with self._kernel.lock:
            if self.armed:
                self.armed = False
                self._kernel.on_step.remove(self._watch)

    def __enter__(self) -> Self:
        self.arm()
        return self

    def __exit__(self, *_: object) -> None:
        self.disarm()

    def _watch(self, name: str, kernel: EmbeddedKernel) -> None:
        entry = kernel.spd.match(self.direction, self.packet)
        self.log.append(Step(name, entry.policy(kernel.scope) if entry else None))
