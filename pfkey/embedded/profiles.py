"""What one kernel does that another does not: a table of quirks per release, nothing but data.

Recorded: Linux 6.1 and FreeBSD 12.1 (their answers are replayed by the tests).  Seen to run: an 11-CURRENT of 2014.
Read in sources: Linux 6.12, FreeBSD 10.4, 11.0, 13.0 and 14.3, NetBSD's key.c 1.285, xnu-11417 (macOS).  Where nobody
looked, FreeBSD 10, NetBSD and macOS do what their common ancestor does, KAME's key.c.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum

from ..abi import Abi
from ..errors import NotSupported

__all__ = ["PROFILE_NAMES", "Dialect", "Profile", "Update", "profile"]

AlgorithmTable = tuple[tuple[int, int, int, int], ...]
"""(number, bytes of IV, least key bits, most key bits), as REGISTER lists them."""


class Dialect(Enum):
    """Which of the two code bases answers: Linux's af_key.c, or KAME's key.c, which the BSDs and macOS carry on."""

    AF_KEY = "af_key"
    KAME = "kame"


class Update(Enum):
    """What SPDUPDATE does with the policy it replaces."""

    REPLACE = "replace"  # links the new one before it unlinks the old one: one step for whoever looks
    UNLINK_FIRST = "unlink-first"  # unlinks the old one (or marks it dead, which every look-up skips: FreeBSD 10,
    # macOS), then reads and links the new one: a window without a policy
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
    templates_maximum: int
    """How many templates a policy can have."""
    sole_policy_glimpse: bool
    """While SPDUPDATE swaps the only policy of its direction, a packet that looks at the list head without the lock
    (key_havesp) finds none and leaves in clear (FreeBSD 14)."""
    first_reqid: int
    """What level UNIQUE without a usable reqid gets first."""
    default_level_protects: bool
    """A packet without an SA is held back by a template of level DEFAULT (on the BSDs it leaves in clear)."""

    ties_by_link: bool = field(default=False, kw_only=True)
    """Policies of one pair of prefixes are a chain of their own.  Each chain gives the first that matches, ties between
    chains go to what was linked first; an update is a new link, and keeps the place in its chain (Linux 6.12)."""
    cpus: int = field(default=1, kw_only=True)
    """On Linux with more than one, a packet can walk a chain while an SPDUPDATE moves a policy to a place that it has
    passed, and meets neither the old nor the new one.  (The windows of the BSDs show on one CPU too.)"""
    grace_seconds: float = field(default=0.01, kw_only=True)
    """How long such a walk lasts at most; seen on Linux 6.18 with two CPUs were 3 ms."""
    update_drains: bool = field(default=False, kw_only=True)
    """Between unlinking the old policy and reading the new one SPDUPDATE waits until no packet uses the old one: a step
    more without a policy (NetBSD)."""
    dead_seconds: float = field(default=0.0, kw_only=True)
    """A policy that was deleted or replaced stays in dumps for up to so long (3 seconds, seen on an 11-CURRENT)."""
    bad_direction_is_silent: bool = field(default=False, kw_only=True)
    """An SPDADD or SPDUPDATE with a direction other than in and out is not answered at all (FreeBSD up to 11.0)."""
    setidx_may_be_empty: bool = field(default=False, kw_only=True)
    """SPDSETIDX takes type IPSEC without a template, and packets of such a policy are dropped (FreeBSD up to 11.0)."""
    get_answers_seq_zero: bool = field(default=False, kw_only=True)
    """SPDGET is answered with seq 0, not with the request's (seen on an 11-CURRENT; macOS)."""
    acquire_tells_reqid: bool = field(default=True, kw_only=True)
    """An ACQUIRE has an SA2 extension when the template has a reqid (FreeBSD 12 and later)."""

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
    dump_in_one: bool = field(default=False, kw_only=True)
    """A dump is queued in one piece if there is any room, beyond the limit of the buffer; if there is none the answer
    is ENOBUFS, which always gets through (NetBSD)."""
    deaf_listener_fails: bool = field(default=False, kw_only=True)
    """When somebody else's receive buffer is full, send() fails with ENOBUFS after the work, and neither the sender nor
    those who come later in the list hear of it (seen on an 11-CURRENT; 12.1 goes on)."""

    # The SAD.
    authentication: AlgorithmTable = field(repr=False)
    encryption: AlgorithmTable = field(repr=False)
    compression: tuple[int, ...] = (2,)
    tcp_signature: bool = False
    """TCP-MD5 keys can be stored (FreeBSD with tcpmd5.ko; the recorded 12.1 ran without it and answers EINVAL)."""
    larval_seconds: int = 30
    """How long an SA lives that GETSPI or an ACQUIRE made and nobody completed."""
    spi_for_each_pair: bool = False
    """An SPI is taken for two addresses and a protocol only (FreeBSD up to 11.0), not for all of them."""
    update_refills: bool = False
    """UPDATE makes any SA anew and wants its keys, lifetimes alone are EINVAL (FreeBSD up to 11.0); later ones refuse
    keys for an SA that is mature."""
    absent_association: str = "ESRCH"
    """What GET and DELETE of an absent SA answer."""
    absent_update: str = "EINVAL"
    """What UPDATE of an absent SPI answers (the BSDs)."""


LINUX_6_1 = Profile(
    name="linux",
    abi=Abi.linux(),
    dialect=Dialect.AF_KEY,
    update=Update.REPLACE,
    update_keeps_place=True,
    hosts_apart=True,
    templates_maximum=6,
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
    templates_maximum=4,
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

LINUX_6_12 = replace(LINUX_6_1, name="linux-6.12", hosts_apart=False, ties_by_link=True)
LINUX_SMP = replace(LINUX_6_1, name="linux-smp", cpus=2)

FREEBSD_11 = replace(
    FREEBSD_12,
    name="freebsd-11",
    abi=Abi.freebsd("11.0"),
    templates_maximum=1 << 16,  # IPSEC_MAXREQ came with 11.1
    dead_seconds=3.0,
    bad_direction_is_silent=True,
    setidx_may_be_empty=True,
    get_answers_seq_zero=True,
    acquire_tells_reqid=False,
    deaf_listener_fails=True,
    spi_for_each_pair=True,
    update_refills=True,
    absent_association="ENOENT",
    absent_update="ENOENT",
)

# Before AES-GCM; SADB_X_EALG_AESCTR (250 there) is a number without code.
FREEBSD_10 = replace(
    FREEBSD_11,
    name="freebsd-10",
    abi=Abi.freebsd(10),
    get_answers_seq_zero=False,
    authentication=tuple(row for row in FREEBSD_12.authentication if row[0] not in (11, 12, 13)),
    encryption=tuple(row for row in FREEBSD_12.encryption if row[0] not in (13, 20, 23)),
)

# Its policies are freed as soon as nobody uses them, so that dumps show no dead ones.
NETBSD = replace(
    FREEBSD_11,
    name="netbsd",
    abi=Abi.netbsd(),
    update_drains=True,
    dead_seconds=0.0,
    get_answers_seq_zero=False,
    dump_in_one=True,
    authentication=FREEBSD_12.authentication,
    encryption=FREEBSD_12.encryption,
)

# The same algorithms under macOS's own numbers.
MACOS = replace(
    FREEBSD_10,
    name="macos",
    abi=Abi.macos(),
    get_answers_seq_zero=True,
    authentication=(
        (1, 0, 128, 128), (2, 0, 160, 160), (6, 0, 256, 256), (7, 0, 384, 384), (8, 0, 512, 512), (3, 0, 128, 128),
        (4, 0, 160, 160), (5, 0, 8, 2048),
    ),
    encryption=(
        (1, 8, 64, 64), (2, 8, 192, 192), (5, 8, 40, 128), (4, 8, 40, 448), (3, 0, 0, 2048), (12, 16, 128, 256),
        (13, 12, 128, 256), (14, 8, 256, 256), (15, 12, 128, 256),
    ),
)  # fmt: skip

_PROFILES = {
    profile.name: profile
    for profile in (
        LINUX_6_1, LINUX_6_12, LINUX_SMP, FREEBSD_10, FREEBSD_11, FREEBSD_12, FREEBSD_13, FREEBSD_14, NETBSD, MACOS,
    )
}  # fmt: skip

PROFILE_NAMES = tuple(_PROFILES)
"""The names that EmbeddedKernel and `embedded:NAME` take."""


def profile(name: str | Profile) -> Profile:
    """The profile of that name, or the one given; NotSupported names those there are."""
    if isinstance(name, Profile):
        return name
    try:
        return _PROFILES[name]
    except KeyError:
        raise NotSupported(f"no embedded kernel behaves like {name!r}; there are {', '.join(_PROFILES)}") from None
