"""The exception family: what was being done, to what, what the kernel said, what to try."""

from __future__ import annotations

import errno as host_errno
from typing import Any

__all__ = [
    "ChannelClosed",
    "DecodeError",
    "DumpOverflow",
    "EncodeError",
    "ForeignPolicy",
    "KernelError",
    "NotSupported",
    "NotTracked",
    "PFKeyError",
    "ReplyTimeout",
    "SPDLocked",
    "TransactionError",
]


class PFKeyError(Exception):
    """The root of everything this package raises on purpose."""


class EncodeError(PFKeyError, ValueError):
    """The wire cannot carry what was asked for (a reqid over 16 bits on a BSD, a key longer than its extension)."""


class DecodeError(PFKeyError, ValueError):
    """Bytes that are no PF_KEY message.

    `offset` is the byte at which the rule `reason` is broken, `extension` the number of the extension on the wire
    there, or None for the header.
    """

    def __init__(self, reason: str, *, offset: int = 0, extension: int | None = None, name: str = "") -> None:
        where = f"offset {offset}"
        if extension is not None:
            where += f", extension {extension}" + (f" ({name})" if name else "")
        super().__init__(f"{reason} ({where})")
        self.reason = reason
        self.offset = offset
        self.extension = extension


class KernelError(PFKeyError, OSError):
    """The kernel refused a request.

    `errno` is this host's number for the error's name, so that it compares with the `errno` module; `kernel_errno`
    is the number that the kernel used (FreeBSD's EPROTONOSUPPORT is 43, Linux's is 93), `name` the error's name.
    `request` is the message that was refused, `reply` the kernel's answer or None when the send itself failed.
    `outcome_unknown` says that the work may have been done all the same (ENOBUFS from a send).
    Errors that Python has a class for are instances of it too: `except FileExistsError` catches EEXIST.
    """

    kernel_errno: int = 0
    name: str = ""
    request: Any = None
    reply: Any = None
    outcome_unknown: bool = False

    def __str__(self) -> str:
        return str(self.strerror)


def _specific(base: type[OSError]) -> type[KernelError]:
    return type(f"Kernel{base.__name__}", (KernelError, base), {"__doc__": KernelError.__doc__})


_CLASSES: dict[int, type[KernelError]] = {
    host_errno.EEXIST: _specific(FileExistsError),
    host_errno.ENOENT: _specific(FileNotFoundError),
    host_errno.EPERM: _specific(PermissionError),
    host_errno.EACCES: _specific(PermissionError),
    host_errno.ESRCH: _specific(ProcessLookupError),
}


def kernel_error(
    doing: str, name: str, number: int, *, request: Any = None, reply: Any = None, advice: str = ""
) -> KernelError:
    """The exception for a kernel that answered `doing` with the error `name` (its own number: `number`)."""
    local = getattr(host_errno, name, number)
    text = f"{doing} was rejected ({name})" + (f"; {advice}" if advice else "")
    error = _CLASSES.get(local, KernelError)(local, text)
    error.kernel_errno = number
    error.name = name
    error.request = request
    error.reply = reply
    return error


class ReplyTimeout(PFKeyError, TimeoutError):
    """The kernel did not answer in time; whether it did the work is not known.  `request` is what was asked."""

    def __init__(self, text: str, *, request: Any = None) -> None:
        super().__init__(text)
        self.request = request


class ChannelClosed(PFKeyError, ConnectionError):
    """The channel to the kernel is gone; nothing can be sent or read any more.  `request` is what was under way."""

    def __init__(self, text: str, *, request: Any = None) -> None:
        super().__init__(text)
        self.request = request


class DumpOverflow(PFKeyError):
    """A dump arrived incomplete: the kernel dropped parts for want of receive buffer, or stopped in the middle."""

    mixed = False
    """Parts of an earlier dump, which was given up, came late and among its own: it is only to be asked for again."""


class NotSupported(PFKeyError):
    """This system lacks what was asked for; the text names the system and what it lacks."""


class NotTracked(PFKeyError, LookupError):
    """What should be removed or looked up was never added to this tracker."""


class ForeignPolicy(PFKeyError, FileExistsError):
    """Somebody else's policy holds this selector; it was neither changed nor deleted.  `policy` is what it says."""

    def __init__(self, text: str, *, policy: Any = None) -> None:
        super().__init__(host_errno.EEXIST, text)
        self.policy = policy

    def __str__(self) -> str:
        return str(self.strerror)


class SPDLocked(PFKeyError, TimeoutError):
    """Somebody else is writing the SPD and did not come to an end; the text says who.  Nothing was sent."""


class TransactionError(PFKeyError):
    """Some policies of a transaction could not be brought to what was asked; the rest of it stands.

    `errors` maps each of them ("out 10.1.0.0/16 -> 10.2.0.0/16") to its exception, `states` to what the kernel holds.
    """

    def __init__(self, text: str, errors: dict[Any, BaseException], states: dict[str, str] | None = None) -> None:
        super().__init__(text)
        self.errors = errors
        self.states = states or {}
