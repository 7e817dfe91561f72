"""What one kernel does that another does not: a table of quirks per release, nothing but data.

Recorded: Linux 6.1 and FreeBSD 12.1 (their answers are replayed by the tests).  Read in sources: FreeBSD 13.0 and 14.3.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum

from ..abi import Abi
from ..errors import NotSupported

__all__ = ["Dialect", "Profile", "Update", "profile"]

AlgorithmTable = tuple[tuple[int, int, int, int], ...]
"""(number, bytes of IV, least key bits, most key bits), as REGISTER lists them."""


class Dialect(Enum):
    """Which of the two code bases answers: Linux's af_key.c, or KAME's key.c, which the BSDs and macOS carry on."""

    AF_KEY = "af_key"
    KAME = "kame"


class Update(Enum):
    """What SPDUPDATE does with the policy it replaces."""

    REPLACE = "replace"  # links the new one before it unlinks the old one: one step for whoever looks
    UNLINK_FIRST = "unlink-first"  # unlinks the old one, then reads and links the new one: a window without a policy
    SWAP = "swap"  # reads the new one, then detaches the old one and links the new one under one lock


@dataclass(frozen=True)
class Profile:
    """One kernel.  What a client must know too stands in its Abi; here is what only the kernel itself needs."""

    name: str
    """"linux", "freebsd-12", ...: what EmbeddedKernel takes."""
    abi: Abi
    dialect: Dialect

    # The SPD.
    update: Update
    update_keeps_place: bool
    """Among equal priorities an updated policy stays where it was (Linux 6.1); else it goes behind them."""
    hosts_apart: bool
    """Policies between two single addresses have a table of their own.  At equal priority they win against all prefix
    policies of the direction but the very first one, whatever their age (Linux 6.1)."""
    sole_policy_glimpse: bool
    """While SPDUPDATE swaps the only policy of its direction, a packet that looks at the list head without the lock
    (key_havesp) finds none and leaves in clear (FreeBSD 14)."""
    first_reqid: int
    """What level UNIQUE without a usable reqid gets first."""
    default_level_protects: bool
    """A packet without an SA is held back by a template of level DEFAULT (on the BSDs it leaves in clear)."""

    missing_sa_is_no_use: bool
    """A packet dropped for want of an SA does not count as a use of the policy (Linux)."""

    # Buffers.
    receive_buffer: int
    """What a new socket's receive buffer holds, in bytes of the kernel's own accounting."""
    receive_buffer_limit: int
    """The largest SO_RCVBUF; more is ENOBUFS (FreeBSD: kern.ipc.maxsockbuf less its overhead)."""
    send_buffer: int
    """A longer message is EMSGSIZE from send()."""
    message_limit: int
    """A longer message is ENOBUFS from send() (FreeBSD: MCLBYTES); 0 where there is no such limit."""

    # The SAD.
    authentication: AlgorithmTable = field(repr=False)
    encryption: AlgorithmTable = field(repr=False)
    compression: tuple[int, ...] = (2,)
    tcp_signature: bool = False
    """TCP-MD5 keys can be stored (FreeBSD with tcpmd5.ko; the recorded 12.1 ran without it and answers EINVAL)."""
    larval_seconds: int = 30
    """How long an SA lives that GETSPI or an ACQUIRE made and nobody completed."""

    @property
    def templates_maximum(self) -> int:
        """How many templates a policy can have."""
        return self.abi.maximum_templates


LINUX_6_1 = Profile(
    name="linux",
    abi=Abi.linux(),
    dialect=Dialect.AF_KEY,
    update=Update.REPLACE,
    update_keeps_place=True,
    hosts_apart=True,
    sole_policy_glimpse=False,
    first_reqid=16384,
    default_level_protects=True,
    missing_sa_is_no_use=True,
    receive_buffer=212992,
    receive_buffer_limit=0x3FFFFFFF,
    send_buffer=212960,
    message_limit=0,
    # The algorithms whose crypto the recorded kernel had loaded.
    authentication=(
        (251, 0, 0, 0), (2, 0, 128, 128), (3, 0, 160, 160), (5, 0, 256, 256), (6, 0, 384, 384), (7, 0, 512, 512),
    ),
    encryption=((11, 0, 0, 0), (12, 8, 128, 256), (13, 8, 160, 288)),
)  # fmt: skip

FREEBSD_12 = Profile(
    name="freebsd-12",
    abi=Abi.freebsd(12),
    dialect=Dialect.KAME,
    update=Update.UNLINK_FIRST,
    update_keeps_place=False,
    hosts_apart=False,
    sole_policy_glimpse=False,
    first_reqid=16385,  # the counter starts at 16384 and is raised before it is used
    default_level_protects=False,
    missing_sa_is_no_use=False,
    receive_buffer=8192,
    receive_buffer_limit=2097152 * 2048 // 2304,
    send_buffer=8192,
    message_limit=2048,
    authentication=(
        (2, 0, 128, 128), (3, 0, 160, 160), (5, 0, 256, 256), (6, 0, 384, 384), (7, 0, 512, 512), (8, 0, 160, 160),
        (11, 0, 128, 128), (12, 0, 128, 128), (13, 0, 128, 128), (249, 0, 128, 128), (250, 0, 160, 160),
        (251, 0, 8, 2048),
    ),
    encryption=(
        (2, 8, 64, 64), (3, 8, 192, 192), (6, 8, 40, 128), (7, 8, 40, 448), (11, 0, 0, 2048), (12, 16, 128, 256),
        (13, 16, 128, 256), (20, 12, 128, 256), (22, 16, 64, 256), (23, 12, 128, 256),
    ),
)  # fmt: skip

# FreeBSD 13 took out what 12 called deprecated (MD5, RIPEMD160, DES, CAST, Blowfish, Camellia); no recording exists.
_MODERN_AUTHENTICATION = tuple(
    row for row in FREEBSD_12.authentication if row[0] not in (2, 8, 249, 250)
)  # fmt: skip
_MODERN_ENCRYPTION = tuple(row for row in FREEBSD_12.encryption if row[0] not in (2, 3, 6, 7, 22))

FREEBSD_13 = replace(
    FREEBSD_12,
    name="freebsd-13",
    abi=Abi.freebsd(13),
    authentication=_MODERN_AUTHENTICATION,
    encryption=_MODERN_ENCRYPTION,
    tcp_signature=True,
)

FREEBSD_14 = replace(
    FREEBSD_13,
    name="freebsd-14",
    abi=Abi.freebsd(14),
    update=Update.SWAP,
    sole_policy_glimpse=True,
    authentication=(*_MODERN_AUTHENTICATION, (14, 0, 256, 256)),
    encryption=(*_MODERN_ENCRYPTION, (15, 8, 256, 256)),
)

_PROFILES = {profile.name: profile for profile in (LINUX_6_1, FREEBSD_12, FREEBSD_13, FREEBSD_14)}


def profile(name: str | Profile) -> Profile:
    """The profile of that name, or the one given; NotSupported names those there are."""
    if isinstance(name, Profile):
        return name
    try:
        return _PROFILES[name]
    except KeyError:
        raise NotSupported(f"no embedded kernel behaves like {name!r}; there are {', '.join(_PROFILES)}") from None
