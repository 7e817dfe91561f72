"""Which kernel `--kernel TARGET` means, and what to say when it cannot be had."""

from __future__ import annotations

from .channel import Channel, NativeChannel
from .embedded import EmbeddedKernel
from .errors import NotSupported, PFKeyError
from .kernel import Kernel, connect
from .served import ServedChannel

__all__ = [
    "CannotOpenError",
    "UsageError",
    "elsewhere",
    "embedded_kernel",
    "native_channel",
    "open_kernel",
    "served_channel",
]


class UsageError(Exception):
    """The command line asks for something that makes no sense."""


class CannotOpenError(Exception):
    """There is no kernel to speak to."""


def embedded_kernel(target: str) -> EmbeddedKernel | None:
    """A new kernel in this process for "embedded:PROFILE", None for one that is elsewhere; UsageError for neither."""
    name, _, profile = target.partition(":")
    if target == "native" or (name == "unix" and profile):
        return None
    if name != "embedded" or not profile:
        raise UsageError(f"--kernel is native, embedded:PROFILE or unix:PATH, not {target!r}")
    try:
        return EmbeddedKernel(profile)
    except NotSupported as error:
        raise UsageError(str(error)) from error


def native_channel() -> Channel:
    """The PF_KEY of this host; CannotOpenError, saying what to do, where it is not there or not for us."""
    try:
        return NativeChannel()
    except (PFKeyError, OSError) as error:
        raise CannotOpenError(str(error)) from error


def served_channel(target: str) -> Channel:
    """The kernel that another process serves, for "unix:PATH"; CannotOpenError when nobody does."""
    try:
        return ServedChannel(target.partition(":")[2])
    except (PFKeyError, OSError) as error:
        raise CannotOpenError(str(error)) from error


def elsewhere(target: str) -> Channel:
    """A kernel outside this process, "native" or "unix:PATH"; CannotOpenError where there is none, with advice."""
    return native_channel() if target == "native" else served_channel(target)


def open_kernel(target: str) -> Kernel:
    """A connection to the kernel that TARGET names; raises UsageError or CannotOpenError."""
    embedded = embedded_kernel(target)
    return connect(embedded.connect() if embedded is not None else elsewhere(target))
