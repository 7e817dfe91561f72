"""PF_KEYv2 for Linux and FreeBSD, and a tracker that keeps the kernel's IPsec policies right while SAs come and go.

Names are loaded on first use (PEP 562), so that `import pfkey` costs little.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .abi import Abi
    from .aio import AsyncKernel
    from .aio_tracker import AsyncPolicyTracker
    from .assignment import Assignment
    from .channel import Channel
    from .codec import Message, decode, encode
    from .constants import Action, Direction, ExtensionType, Level, MessageType, Mode, Rank, SAProtocol
    from .embedded import EmbeddedKernel
    from .errors import (
        ChannelClosed,
        DecodeError,
        DumpOverflow,
        EncodeError,
        ForeignPolicy,
        KernelError,
        NotSupported,
        NotTracked,
        PFKeyError,
        ReplyTimeout,
        SPDLocked,
        TransactionError,
    )
    from .keeper import Change, PolicyTracker
    from .kernel import Kernel, connect
    from .messages import Lifetime, Policy, SecurityAssociation, Selector, Template
    from .tables import decode_many

__all__ = [
    "Abi",
    "Action",
    "Assignment",
    "AsyncKernel",
    "AsyncPolicyTracker",
    "Change",
    "Channel",
    "ChannelClosed",
    "DecodeError",
    "Direction",
    "DumpOverflow",
    "EmbeddedKernel",
    "EncodeError",
    "ExtensionType",
    "ForeignPolicy",
    "Kernel",
    "KernelError",
    "Level",
    "Lifetime",
    "Message",
    "MessageType",
    "Mode",
    "NotSupported",
    "NotTracked",
    "PFKeyError",
    "Policy",
    "PolicyTracker",
    "Rank",
    "ReplyTimeout",
    "SAProtocol",
    "SPDLocked",
    "SecurityAssociation",
    "Selector",
    "Template",
    "TransactionError",
    "connect",
    "decode",
    "decode_many",
    "encode",
]

__version__ = "0.1.0"

_MODULES = {
    "abi": ("Abi",),
    "aio": ("AsyncKernel",),
    "channel": ("Channel",),
    "codec": ("Message", "decode", "encode"),
    "constants": ("Action", "Direction", "ExtensionType", "Level", "MessageType", "Mode", "Rank", "SAProtocol"),
    "embedded": ("EmbeddedKernel",),
    "errors": (
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
    ),
    "keeper": ("Change", "PolicyTracker"),
    "kernel": ("Kernel", "connect"),
    "messages": ("Lifetime", "Policy", "SecurityAssociation", "Selector", "Template"),
    "tables": ("decode_many",),
    "aio_tracker": ("AsyncPolicyTracker",),
    "assignment": ("Assignment",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

logging.getLogger("pfkey").addHandler(logging.NullHandler())


def __getattr__(name: str) -> object:
    module = _HOME.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{module}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
