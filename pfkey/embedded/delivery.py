"""Whom a message of the kernel goes to."""

from __future__ import annotations

from enum import Enum

__all__ = ["Receivers"]


class Receivers(Enum):
    """Whom a message goes to, besides promiscuous connections."""

    SENDER = "the sender of the request only"
    ALL = "every connection"
    REGISTERED = "connections that registered for some SA type, and the sender of a REGISTER"
