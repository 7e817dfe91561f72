"""Faults on order: which message goes wrong next, and at which moment."""

from __future__ import annotations

import errno as host_errno
from dataclasses import dataclass
from enum import Enum

from ..abi import Abi
from ..constants import MessageType

__all__ = ["Fault", "When", "error_name"]


class When(Enum):
    """The moment at which a message goes wrong."""

    BEFORE = "before"  # nothing is done, the reply carries the error
    SEND = "send"  # nothing is done, send() itself fails
    UNLINKED = "unlinked"  # SPDUPDATE has unlinked the old policy; then the error
    AFTER = "after"  # the work is done, the reply is lost and send() fails (ENOBUFS on FreeBSD)
    LOST = "lost"  # the work is done, the reply is lost and nobody says so
    LATE = "late"  # the work is done, the reply is kept until `release_replies()`


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault, for the next message of `type` (None: of any type)."""

    type: MessageType | int | None
    error: str
    when: When


def error_name(error: int | str, abi: Abi) -> str:
    """The name of an error given as a name or as this host's number; ValueError for one that the kernel lacks."""
    name = error if isinstance(error, str) else host_errno.errorcode.get(error, "")
    if name not in abi.error_numbers:
        raise ValueError(f"{abi} has no error {error!r}; give a name, or a number of this host's errno module")
    return name
