"""Faults on order: which message goes wrong next, and at which moment."""

from __future__ import annotations

import errno as host_errno
from dataclasses import dataclass
from enum import Enum

from ..abi import Abi
from ..constants import MessageType
from .profiles import Dialect, Profile, Update

__all__ = ["Fault", "When", "due", "fault"]


class When(Enum):
    """The moment at which a message goes wrong."""

    BEFORE = "before"  # nothing is done, the reply carries the error
    SEND = "send"  # nothing is done, send() itself fails
    IGNORED = "ignored"  # nothing is done, and there is no reply
    UNLINKED = "unlinked"  # SPDUPDATE has unlinked the old policy; then the error
    AFTER = "after"  # the work is done, the reply is lost and send() fails (ENOBUFS on FreeBSD)
    OVERFLOW = "overflow"  # the work is done, and the sender's receive buffer is full
    LOST = "lost"  # the work is done, the reply is lost and nobody says so
    LATE = "late"  # the work is done, the reply is kept until `release_replies()`


_WITHOUT_ERROR = (When.IGNORED, When.OVERFLOW, When.LOST, When.LATE)
_DUMPS = (MessageType.DUMP, MessageType.SPDDUMP)


@dataclass(slots=True)
class Fault:
    """One fault, for a message of `type` (None: of any type), after `skip` others of it."""

    type: MessageType | int | None
    error: str
    when: When
    skip: int = 0
    room: int = 0
    """How many messages still fit the sender's receive buffer, when it overflows."""


def fault(
    profile: Profile,
    type: MessageType | int | None,
    error: int | str | None,
    when: str | When,
    *,
    skip: int,
    room: int,
) -> Fault:
    """A fault that this kernel can have; ValueError says why it cannot."""
    abi, moment = profile.abi, When(when)
    if type is not None and type not in abi.message_types and type not in abi.message_types.values():
        raise ValueError(f"{abi} knows no message of type {type!r}")
    if min(skip, room) < 0:
        raise ValueError("skip and room count messages: 0 or more")
    if room and moment is not When.OVERFLOW:
        raise ValueError(f"room is for an overflow, not for {moment.value!r}")
    if error is not None and moment in _WITHOUT_ERROR:
        raise ValueError(f"{moment.value!r} says no error, {error!r} neither; leave it out")
    name = _error_name("ENOBUFS" if error is None else error, abi)
    if moment is When.AFTER and name != "ENOBUFS":
        raise ValueError(f"after the work no kernel says {name}; ENOBUFS alone comes then")
    if moment is When.UNLINKED:
        if profile.update is Update.REPLACE:
            raise ValueError(f"{abi} never unlinks a policy before its successor stands")
        if type not in (None, MessageType.SPDUPDATE):
            raise ValueError(f"only an SPDUPDATE unlinks what it replaces, not {type!r}")
    if moment is When.OVERFLOW and type in _DUMPS and profile.dialect is Dialect.AF_KEY:
        raise ValueError(f"a dump of {abi} waits for room in the receive buffer, and loses nothing")
    return Fault(None if type is None else type & 0xFF, name, moment, skip, room)


def due(faults: list[Fault], kind: int | None, *, unlinked: bool) -> Fault | None:
    """The fault that befalls a message of this type, taken off the list; the others that wait for it count it."""
    found = None
    for one in list(faults):
        if (one.when is When.UNLINKED) is not unlinked or one.type not in (None, kind):
            continue
        if one.skip:
            one.skip -= 1
        elif found is None:
            found = one
            faults.remove(one)
    return found


def _error_name(error: int | str, abi: Abi) -> str:
    """The name of an error given as a name or as this host's number; ValueError for one that the kernel lacks."""
    name = error if isinstance(error, str) else host_errno.errorcode.get(error, "")
    if name not in abi.error_numbers:
        raise ValueError(f"{abi} has no error {error!r}; give a name, or a number of this host's errno module")
    return name
