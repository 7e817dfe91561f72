"""What the two code bases, af_key and KAME, have to provide, and whom a message of theirs can go to."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ..messages import Template
    from .channel import EmbeddedChannel
    from .kernel import EmbeddedKernel
    from .profiles import Profile
    from .sad import Association
    from .spd import Entry, Packet
    from .wire import Endpoint

__all__ = ["DialectModule", "Receivers"]


class Receivers(Enum):
    """Whom a message goes to, besides promiscuous connections."""

    SENDER = "the sender of the request only"
    ALL = "every connection"
    REGISTERED = "connections that registered for some SA type, and the sender of a REGISTER"


class DialectModule(Protocol):
    """The functions that the modules `afkey` and `kame` share.  All run under the kernel's lock."""

    def association_key(self, profile: Profile, association: Association, /) -> tuple[object, ...]:
        """What makes an SPI unique."""

    def receive(self, kernel: EmbeddedKernel, channel: EmbeddedChannel, data: bytes, /) -> None:
        """Do what one message asks for and answer it; SendFailedError where the system call fails."""

    def refuse(self, kernel: EmbeddedKernel, channel: EmbeddedChannel, data: bytes, error: str, /) -> None:
        """Answer one message with an error and do nothing."""

    def promiscuous_copy(self, kernel: EmbeddedKernel, message: bytes, /) -> bytes:
        """What promiscuous connections see of a message."""

    def resume_dump(self, kernel: EmbeddedKernel, channel: EmbeddedChannel, /) -> object:
        """Go on with a dump that waits for its reader."""

    def expire(self, kernel: EmbeddedKernel, now: float, /) -> float:
        """Expire what is due and say when to look again."""

    def acquire(
        self,
        kernel: EmbeddedKernel,
        entry: Entry,
        template: Template,
        between: tuple[Endpoint, Endpoint],
        packet: Packet,
        /,
    ) -> None:
        """Ask for the SA that a packet lacks."""

    def use(self, kernel: EmbeddedKernel, association: Association, size: int, /) -> bool:
        """Count a packet; False when it must not pass."""
