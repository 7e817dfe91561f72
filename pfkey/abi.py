"""One description per system: numbers, layouts and quirks, as data.

The numbers stand in _numbers.py; layouts come from the same headers, quirks from the behaviour of the kernels.  A quirk
stands here, under the name of what it does, so that no other module asks which system it talks to.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from types import MappingProxyType
from typing import Literal

from . import _numbers as numbers
from .constants import Direction, ExtensionType, Level, MessageType, Mode, SAFlag
from .errors import NotSupported

__all__ = ["Abi"]

ByteOrder = Literal["little", "big"]

_ALL_DIRECTIONS = (Direction.IN, Direction.FWD, Direction.OUT)


@dataclass(frozen=True, eq=False)
class Abi:
    """How one system speaks PF_KEYv2: `Abi.linux()`, `Abi.freebsd(14)`, `Abi.netbsd()`, `Abi.macos()`, `Abi.native()`.

    Two descriptions are equal when they stand for the same system, release and byte order.
    """

    name: str
    """The system: "linux", "freebsd", "netbsd" or "macos"."""
    release: tuple[int, ...]
    """The release whose behaviour this describes, (14, 3) for example; empty where it makes no difference."""
    byteorder: ByteOrder
    """"little" or "big": everything but SPIs, ports and addresses is in the host's order."""

    # Numbers.
    pf_key: int
    af_inet: int
    af_inet6: int
    extensions: Mapping[int, ExtensionType] = field(repr=False)
    """Number on the wire -> what it means here."""
    message_types: Mapping[int, MessageType] = field(repr=False)
    """Number on the wire -> what it means here."""
    modes: Mapping[int, Mode] = field(repr=False)
    """Number on the wire -> the mode it means here."""
    flags: Mapping[int, SAFlag] = field(repr=False)
    """Bits of sadb_sa_flags that mean another SAFlag than the one of their number; empty but on macOS."""
    errors: Mapping[int, str] = field(repr=False)
    """This kernel's error number -> its name."""
    authentication: Mapping[str, int] = field(repr=False)
    encryption: Mapping[str, int] = field(repr=False)
    compression: Mapping[str, int] = field(repr=False)

    # Layouts.
    sockaddr_has_length: bool = field(repr=False)
    """A sockaddr begins with its own length in one byte, then the family in one (4.4BSD); else a 16-bit family."""
    request_size: int = field(repr=False)
    """sizeof(struct sadb_x_ipsecrequest): 16 with a 32-bit reqid on Linux, 8 with a 16-bit one on the BSDs."""
    has_priority: bool = field(repr=False)
    """sadb_x_policy ends in a priority (else a reserved word: FreeBSD up to 10, NetBSD, macOS)."""
    has_scope: bool = field(repr=False)
    """Byte 7 of sadb_x_policy tells the scope of the policy (FreeBSD 11.1 and later)."""
    has_policy_flags: bool = field(repr=False)
    """The byte that holds the scope elsewhere is sadb_x_policy_flags (NetBSD)."""

    # What the kernel knows and how it stores it.
    directions: tuple[Direction, ...] = field(repr=False)
    """The directions a policy can have, in the order in which a tunnel installs them."""
    maximum_reqid: int = field(repr=False)
    """The largest reqid that level UNIQUE keeps; the kernel silently replaces greater ones (IPSEC_MANUAL_REQID_MAX)."""
    maximum_templates: int = field(repr=False)
    level_default: Level = field(repr=False)
    """What the kernel makes of Level.DEFAULT; DEFAULT itself where that means something of its own."""
    reqid_needs_unique: bool = field(repr=False)
    """The kernel forgets the reqid of a template whose level is not UNIQUE (FreeBSD too, though its reply shows it)."""
    use_level_in_outbound_tunnel: bool = field(repr=False)
    """Level USE is accepted for tunnels of outbound policies (Linux answers EINVAL)."""
    empty_ipsec_is_bypass: bool = field(repr=False)
    """IPSEC without templates is accepted and lets packets through in clear (Linux 6.1); others answer EINVAL."""
    stores_scope: bool = field(repr=False)
    """A selector keeps the scope of an IPv6 address (FreeBSD); Linux forgets it."""
    icmp_zero_is_any: bool = field(repr=False)
    """ICMP type 0 in a selector matches any type: it travels in the source port, where 0 is any."""
    matches_icmp_types: bool = field(repr=False)
    """Type and code of an ICMP (version 4) selector are compared with a packet's (Linux); KAME reads those of ICMPv6
    only, so that such a selector matches no packet (setkey(8) has them for icmp6 alone; not tried on a live kernel)."""
    has_soft_policy_lifetime: bool = field(repr=False)
    """A policy may have a soft lifetime (Linux)."""
    replay_in_bytes: bool = field(repr=False)
    """sadb_sa_replay counts bytes of bitmap, eight packets each (the BSDs), not packets (Linux)."""
    maximum_replay_window: int = field(repr=False)
    """The largest replay window in packets; Linux silently makes greater ones 32."""

    # How it talks.
    update_unlinks_first: bool = field(repr=False)
    """SPDUPDATE removes the old policy before it inserts the new one, and a rejected one leaves none (FreeBSD < 14)."""
    rejected_update_removes: bool = field(repr=False)
    """An SPDUPDATE rejected for its templates removes the policy all the same (every FreeBSD, 14.3 included)."""
    sole_update_shows_none: bool = field(repr=False)
    """While SPDUPDATE swaps the only policy of its direction, a packet may see none at all (FreeBSD 14.3 and later)."""
    stronger_update_shows_none: bool = field(repr=False)
    """An SPDUPDATE that makes a priority stronger past other policies of the same addresses may be missed by a packet
    that has passed the new place, until all packets of that moment are through (Linux on several CPUs)."""
    one_writer: bool = field(repr=False)
    """Two writers of the SPD at once can corrupt it (FreeBSD 14 may panic); only one may write at a time."""
    tag_in: Literal["bytes", "addtime"] = field(repr=False)
    """Where a hard lifetime of a policy keeps a mark: the kernel never enforces its bytes (Linux), or reads nothing but
    addtime, of which a value near 2^63 is never reached (the BSDs)."""
    update_changes_id: bool = field(repr=False)
    """SPDUPDATE gives the policy a new id (FreeBSD); Linux keeps it."""
    dump_shows_dead: bool = field(repr=False)
    """A dump lists policies for some seconds after they were deleted or replaced; SPDGET does not know them any more
    (seen on an 11-CURRENT, for up to 3 seconds; FreeBSD up to 11.0, macOS)."""
    dump_counts_down: bool = field(repr=False)
    """The parts of a dump count down to 0 (FreeBSD); on Linux they count up and the last says 0."""
    error_echoes_request: bool = field(repr=False)
    """An error reply is the whole request with errno set (FreeBSD, keys included); else a bare header (Linux)."""
    absent_policy_error: str = field(repr=False)
    """What SPDDELETE of an absent policy answers."""
    setidx_answers_spdadd: bool = field(repr=False)
    """A successful SPDSETIDX is answered by a message of type SPDADD (Linux)."""
    flush_answers_twice: bool = field(repr=False)
    """A FLUSH or SPDFLUSH that removed something is answered twice, privately and as broadcast (Linux)."""
    migrate_answers_seq_zero: bool = field(repr=False)
    """The answer to MIGRATE has seq 0 and pid 0 (Linux)."""
    spdget_may_answer_seq_zero: bool = field(repr=False)
    """The answer to SPDGET may have seq 0 instead of the request's (macOS, FreeBSD up to 11.0)."""
    send_limit: int = field(repr=False)
    """The largest message the kernel takes, in bytes."""

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Abi):
            return NotImplemented
        return self.identity == other.identity

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return f"{_TITLES[self.name]}{self._release_text}"

    @property
    def _release_text(self) -> str:
        return " " + ".".join(map(str, self.release)) if self.release else ""

    @cached_property
    def _hash(self) -> int:
        return hash(self.identity)

    @cached_property
    def identity(self) -> tuple[object, ...]:
        """What two descriptions of the same system have in common: its name, its release and its byte order."""
        return (self.name, self.release, self.byteorder)

    @cached_property
    def extension_numbers(self) -> Mapping[ExtensionType, int]:
        """What an extension means -> its number on the wire."""
        return MappingProxyType({kind: number for number, kind in self.extensions.items()})

    @cached_property
    def error_numbers(self) -> Mapping[str, int]:
        """An error's name -> this kernel's number for it."""
        return MappingProxyType({name: number for number, name in self.errors.items()})

    @cached_property
    def authentication_names(self) -> Mapping[int, str]:
        """Number of an authentication algorithm -> its name."""
        return MappingProxyType({number: name for name, number in self.authentication.items()})

    @cached_property
    def encryption_names(self) -> Mapping[int, str]:
        """Number of an encryption algorithm -> its name."""
        return MappingProxyType({number: name for name, number in self.encryption.items()})

    @cached_property
    def compression_names(self) -> Mapping[int, str]:
        """Number of a compression algorithm -> its name."""
        return MappingProxyType({number: name for name, number in self.compression.items()})

    def error_name(self, number: int) -> str:
        """The name of this kernel's error `number`; Linux sometimes says it as a negative number in one byte."""
        return self.errors.get(number) or self.errors.get(256 - number) or f"error {number}"

    @staticmethod
    @cache
    def linux(byteorder: ByteOrder = sys.byteorder) -> Abi:
        """af_key of Linux (measured on 6.1)."""
        return Abi(
            name="linux",
            release=(),
            byteorder=_checked_order(byteorder),
            pf_key=15,
            af_inet=2,
            af_inet6=10,
            extensions=MappingProxyType(numbers.EXTENSIONS["linux"]),
            message_types=MappingProxyType(numbers.MESSAGE_TYPES["linux"]),
            modes=MappingProxyType(numbers.MODES["linux"]),
            flags=MappingProxyType({}),
            errors=MappingProxyType(numbers.ERRORS["linux"]),
            authentication=MappingProxyType(numbers.linux_authentication()),
            encryption=MappingProxyType(numbers.linux_encryption()),
            compression=MappingProxyType(numbers.LINUX_COMPRESSION),
            sockaddr_has_length=False,
            request_size=16,
            has_priority=True,
            has_scope=False,
            has_policy_flags=False,
            directions=_ALL_DIRECTIONS,
            maximum_reqid=16383,
            maximum_templates=6,
            level_default=Level.REQUIRE,
            reqid_needs_unique=True,
            use_level_in_outbound_tunnel=False,
            empty_ipsec_is_bypass=True,
            stores_scope=False,
            icmp_zero_is_any=True,
            matches_icmp_types=True,
            has_soft_policy_lifetime=True,
            replay_in_bytes=False,
            maximum_replay_window=32,
            update_unlinks_first=False,
            rejected_update_removes=False,
            sole_update_shows_none=False,
            stronger_update_shows_none=True,
            one_writer=False,
            tag_in="bytes",
            update_changes_id=False,
            dump_shows_dead=False,
            dump_counts_down=False,
            error_echoes_request=False,
            absent_policy_error="ENOENT",
            setidx_answers_spdadd=True,
            flush_answers_twice=True,
            migrate_answers_seq_zero=True,
            spdget_may_answer_seq_zero=False,
            send_limit=212960,
        )

    @staticmethod
    def freebsd(release: float | str | tuple[int, ...] = 14, byteorder: ByteOrder = sys.byteorder) -> Abi:
        """FreeBSD 9 and later: a release (13, "14.3") or the number that `sysctl kern.osreldate` prints (1403000).

        A release newer than 15 is described as 15.
        """
        return _freebsd(_freebsd_release(release), _checked_order(byteorder))

    @staticmethod
    @cache
    def netbsd(byteorder: ByteOrder = sys.byteorder) -> Abi:
        """NetBSD, as of its key.c of 2024.  Its kernel orders policies by insertion; there are no priorities."""
        return replace(
            _freebsd((10,), _checked_order(byteorder)),
            name="netbsd",
            release=(),
            pf_key=29,
            af_inet6=24,
            extensions=MappingProxyType(numbers.EXTENSIONS["netbsd"]),
            message_types=MappingProxyType(numbers.MESSAGE_TYPES["netbsd"]),
            modes=MappingProxyType(numbers.MODES["netbsd"]),
            has_policy_flags=True,
            dump_shows_dead=False,
            errors=MappingProxyType(numbers.ERRORS["netbsd"]),
            authentication=MappingProxyType(numbers.freebsd_authentication((11,))),
            encryption=MappingProxyType(numbers.netbsd_encryption()),
        )

    @staticmethod
    @cache
    def macos(byteorder: ByteOrder = sys.byteorder) -> Abi:
        """macOS, as of xnu-11417 (2025): algorithm numbers of its own, no priorities, no NAT-T extensions."""
        return replace(
            _freebsd((10,), _checked_order(byteorder)),
            name="macos",
            release=(),
            pf_key=29,
            af_inet6=30,
            extensions=MappingProxyType(numbers.EXTENSIONS["macos"]),
            message_types=MappingProxyType(numbers.MESSAGE_TYPES["macos"]),
            modes=MappingProxyType(numbers.MODES["macos"]),
            flags=MappingProxyType(numbers.MACOS_FLAGS),
            errors=MappingProxyType(numbers.ERRORS["macos"]),
            authentication=MappingProxyType(numbers.MACOS_AUTHENTICATION),
            encryption=MappingProxyType(numbers.MACOS_ENCRYPTION),
        )

    @staticmethod
    def named(text: str) -> Abi:
        """The system that a word names: "linux", "freebsd-13.2", "netbsd", "macos", each with "-big" or "-little".

        Without a byte order it is this host's.  Raises NotSupported for a system that this package does not speak, by
        its name when it is OpenBSD.
        """
        found = re.fullmatch(r"(linux|freebsd|netbsd|macos|openbsd)(?:-(\d[\d.]*))?(?:-(little|big))?", text.lower())
        if found is None or (found[2] and found[1] != "freebsd"):
            raise NotSupported(
                f"{text!r} names no system; linux, freebsd, freebsd-RELEASE, netbsd and macos do,"
                " each with -little or -big if you like"
            )
        order: ByteOrder = "big" if found[3] == "big" else "little" if found[3] else sys.byteorder
        if found[1] == "openbsd":
            raise NotSupported(OPENBSD)
        if found[1] == "freebsd":
            return Abi.freebsd(found[2] or 14, order)
        make = {"linux": Abi.linux, "netbsd": Abi.netbsd, "macos": Abi.macos}[found[1]]
        return make(order)

    @staticmethod
    def native() -> Abi:
        """The system that runs here, asked of the running kernel and not of the headers this was built with.

        Raises NotSupported on a system without PF_KEYv2 policies that this package knows.
        """
        host = os.uname()
        if host.sysname == "Linux":
            return Abi.linux()
        if host.sysname == "FreeBSD":
            return Abi.freebsd(_osreldate() or host.release)
        if host.sysname == "NetBSD":
            return Abi.netbsd()
        if host.sysname == "Darwin":
            return Abi.macos()
        if host.sysname == "OpenBSD":
            raise NotSupported(OPENBSD)
        raise NotSupported(
            f"{host.sysname} {host.release} is not a system whose PF_KEYv2 this package speaks (Linux, FreeBSD 9 and"
            " later, NetBSD, macOS); name one of those, or pass a channel that has an abi"
        )


def _osreldate() -> int:
    """`kern.osreldate` of the running FreeBSD kernel, 0 when its libc does not say.

    uname's release can be set to anything by the environment (UNAME_r) and by a jail; what is asked here is the number
    that FreeBSD's own programs go by.
    """
    import ctypes

    try:
        return max(0, int(ctypes.CDLL(None).getosreldate()))
    except (AttributeError, OSError):
        return 0


OPENBSD = (
    "OpenBSD's PF_KEY is another one: its policies are flows (SADB_X_ADDFLOW), and its extensions from 17 on and its SA"
    " types have other meanings; this package speaks that of Linux, FreeBSD, NetBSD and macOS"
)
_TITLES = {"linux": "Linux", "freebsd": "FreeBSD", "netbsd": "NetBSD", "macos": "macOS"}


def _checked_order(byteorder: ByteOrder) -> ByteOrder:
    if byteorder not in ("little", "big"):
        raise ValueError(f"byteorder is 'little' or 'big', not {byteorder!r}")
    return byteorder


def _freebsd_release(release: float | str | tuple[int, ...]) -> tuple[int, ...]:
    """(13, 2) from 13.2, "13.2-RELEASE", 1302001 or (13, 2); only what changes the description is kept."""
    if isinstance(release, tuple):
        parts = release
    elif isinstance(release, int) and release >= 100000:
        parts = (release // 100000, release // 1000 % 100)
    else:
        parts = tuple(map(int, re.findall(r"\d+", str(release))[:2]))
    if not parts or parts[0] < 9:
        raise NotSupported(f"FreeBSD {release} is not described here; 9 and later are")
    return parts


@cache
def _freebsd(release: tuple[int, ...], byteorder: ByteOrder) -> Abi:
    # The update became atomic somewhere between 13.0 and 14.3; 14.0 to 14.2 were never read and count as they were.
    atomic = release == (14,) or release >= (14, 3)
    extensions = numbers.freebsd_extensions(release)
    replay_extension = ExtensionType.SA_REPLAY in extensions.values()
    # 11 without a minor number may be a kernel from before 11.0 (seen: an 11-CURRENT) just as well as an 11.4.
    may_be_old = release < (11, 1)
    return Abi(
        name="freebsd",
        release=release,
        byteorder=byteorder,
        pf_key=27,
        af_inet=2,
        af_inet6=28,
        extensions=MappingProxyType(extensions),
        message_types=MappingProxyType(numbers.MESSAGE_TYPES["freebsd"]),
        modes=MappingProxyType(numbers.MODES["freebsd"]),
        flags=MappingProxyType({}),
        errors=MappingProxyType(numbers.ERRORS["freebsd"]),
        authentication=MappingProxyType(numbers.freebsd_authentication(release)),
        encryption=MappingProxyType(numbers.freebsd_encryption(release)),
        compression=MappingProxyType(numbers.COMPRESSION),
        sockaddr_has_length=True,
        request_size=8,
        has_priority=release >= (11,),
        has_scope=replay_extension,  # both came with 11.1
        has_policy_flags=False,
        directions=(Direction.IN, Direction.OUT),
        maximum_reqid=16383,
        maximum_templates=4,
        level_default=Level.DEFAULT,
        reqid_needs_unique=True,
        use_level_in_outbound_tunnel=True,
        empty_ipsec_is_bypass=False,
        stores_scope=True,
        icmp_zero_is_any=True,
        matches_icmp_types=False,
        has_soft_policy_lifetime=False,
        replay_in_bytes=True,
        maximum_replay_window=(1 << 32) - 33 if replay_extension else 255 * 8,
        update_unlinks_first=not atomic,
        rejected_update_removes=True,
        sole_update_shows_none=atomic,
        stronger_update_shows_none=False,
        one_writer=True,
        tag_in="addtime",
        update_changes_id=True,
        dump_shows_dead=may_be_old,
        dump_counts_down=True,
        error_echoes_request=True,
        absent_policy_error="EINVAL",
        setidx_answers_spdadd=False,
        flush_answers_twice=False,
        migrate_answers_seq_zero=False,
        spdget_may_answer_seq_zero=may_be_old,
        send_limit=2048,
    )
