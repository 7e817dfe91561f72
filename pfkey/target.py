"""Which kernel `--kernel TARGET` means, and what to say when it cannot be had."""

from __future__ import annotations

from .channel import Channel, NativeChannel
from .embedded import EmbeddedKernel
from .errors import NotSupported, PFKeyError
from .kernel import Kernel, connect

__all__ = ["CannotOpenError", "UsageError", "embedded_kernel", "native_channel", "open_kernel"]


class UsageError(Exception):
    """The command line asks for something that makes no sense."""


class CannotOpenError(Exception):
    """There is no kernel to speak to."""


def embedded_kernel(target: str) -> EmbeddedKernel | None:
    """A new kernel in this process for "embedded:PROFILE", None for "native"; UsageError for anything else."""
    if target == "native":
        return None
    name, _, profile = target.partition(":")
    if name != "embedded" or not profile:
        raise UsageError(f"--kernel is native or embedded:PROFILE, not {target!r}")
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


def open_kernel(target: str) -> Kernel:
    """A connection to the kernel that TARGET names; raises UsageError or CannotOpenError."""
    embedded = embedded_kernel(target)
    return connect(embedded.connect() if embedded is not None else native_channel())
