"""One description per system: numbers, layouts and quirks, as data.

Sources: <net/pfkeyv2.h> and <netipsec/ipsec.h> of FreeBSD 12.1, 13.0 and 14.3, <linux/pfkeyv2.h> and <linux/ipsec.h>
of Linux 6.1, and the behaviour of their kernels.  A quirk stands here, under the name of what it does, so that no other
module asks which system it talks to.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from types import MappingProxyType
from typing import Literal

from .constants import Direction, ExtensionType, Level, MessageType
from .errors import NotSupported

__all__ = ["Abi"]

ByteOrder = Literal["little", "big"]

_COMMON_EXTENSIONS = {int(kind): kind for kind in ExtensionType if kind < 0x100}
_LINUX_EXTENSIONS = _COMMON_EXTENSIONS | {kind & 0xFF: kind for kind in ExtensionType if kind >> 8 == 1}
_FREEBSD_EXTENSIONS = _COMMON_EXTENSIONS | {kind & 0xFF: kind for kind in ExtensionType if kind >> 8 == 2}

_COMMON_ERRORS = {
    1: "EPERM", 2: "ENOENT", 3: "ESRCH", 4: "EINTR", 5: "EIO", 9: "EBADF", 12: "ENOMEM", 13: "EACCES",
    14: "EFAULT", 16: "EBUSY", 17: "EEXIST", 22: "EINVAL", 28: "ENOSPC", 32: "EPIPE", 34: "ERANGE",
}  # fmt: skip
_LINUX_ERRORS = _COMMON_ERRORS | {
    11: "EAGAIN", 38: "ENOSYS", 40: "ELOOP", 61: "ENODATA", 75: "EOVERFLOW", 90: "EMSGSIZE", 92: "ENOPROTOOPT",
    93: "EPROTONOSUPPORT", 94: "ESOCKTNOSUPPORT", 95: "EOPNOTSUPP", 97: "EAFNOSUPPORT", 98: "EADDRINUSE",
    99: "EADDRNOTAVAIL", 100: "ENETDOWN", 105: "ENOBUFS", 110: "ETIMEDOUT",
}  # fmt: skip
_FREEBSD_ERRORS = _COMMON_ERRORS | {
    35: "EAGAIN", 40: "EMSGSIZE", 42: "ENOPROTOOPT", 43: "EPROTONOSUPPORT", 44: "ESOCKTNOSUPPORT",
    45: "EOPNOTSUPP", 47: "EAFNOSUPPORT", 48: "EADDRINUSE", 49: "EADDRNOTAVAIL", 50: "ENETDOWN", 55: "ENOBUFS",
    60: "ETIMEDOUT", 62: "ELOOP", 78: "ENOSYS", 84: "EOVERFLOW",
}  # fmt: skip

_COMMON_AUTHENTICATION = {
    "none": 0, "hmac-md5": 2, "hmac-sha1": 3, "hmac-sha2-256": 5, "hmac-sha2-384": 6, "hmac-sha2-512": 7,
    "hmac-ripemd160": 8, "aes-xcbc-mac": 9, "null": 251,
}  # fmt: skip
_LINUX_AUTHENTICATION = _COMMON_AUTHENTICATION | {"hmac-sm3-256": 10}
_FREEBSD_AUTHENTICATION = _COMMON_AUTHENTICATION | {
    "aes-128-gmac": 11, "aes-192-gmac": 12, "aes-256-gmac": 13, "keyed-md5": 249, "keyed-sha1": 250, "tcp-md5": 252,
}  # fmt: skip
_COMMON_ENCRYPTION = {
    "none": 0, "des-cbc": 2, "3des-cbc": 3, "cast128-cbc": 6, "blowfish-cbc": 7, "null": 11, "aes-cbc": 12,
    "aes-ctr": 13, "aes-gcm-8": 18, "aes-gcm-12": 19, "aes-gcm-16": 20, "camellia-cbc": 22, "aes-gmac": 23,
}  # fmt: skip
_LINUX_ENCRYPTION = _COMMON_ENCRYPTION | {
    "aes-ccm-8": 14, "aes-ccm-12": 15, "aes-ccm-16": 16, "sm4-cbc": 24, "serpent-cbc": 252, "twofish-cbc": 253,
}  # fmt: skip
_COMMON_COMPRESSION = {"none": 0, "oui": 1, "deflate": 2, "lzs": 3}
_LINUX_COMPRESSION = _COMMON_COMPRESSION | {"lzjh": 4}

_COMMON_TYPES = frozenset(kind for kind in MessageType if kind <= MessageType.SPDDELETE2)
_ALL_DIRECTIONS = (Direction.IN, Direction.FWD, Direction.OUT)


@dataclass(frozen=True, eq=False)
class Abi:
    """How one system speaks PF_KEYv2: `Abi.linux()`, `Abi.freebsd(14)`, `Abi.native()`.

    Two descriptions are equal when they stand for the same system, release and byte order.
    """

    name: str
    """The system: "linux" or "freebsd"."""
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
    message_types: frozenset[MessageType] = field(repr=False)
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
    update_changes_id: bool = field(repr=False)
    """SPDUPDATE gives the policy a new id (FreeBSD); Linux keeps it."""
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
    send_limit: int = field(repr=False)
    """The largest message the kernel takes, in bytes."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Abi):
            return NotImplemented
        return self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def __str__(self) -> str:
        return f"{'Linux' if self.name == 'linux' else 'FreeBSD'}{self._release_text}"

    @property
    def _release_text(self) -> str:
        return " " + ".".join(map(str, self.release)) if self.release else ""

    @property
    def _identity(self) -> tuple[object, ...]:
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
            extensions=MappingProxyType(_LINUX_EXTENSIONS),
            message_types=_COMMON_TYPES | {MessageType.NAT_T_NEW_MAPPING, MessageType.MIGRATE},
            errors=MappingProxyType(_LINUX_ERRORS),
            authentication=MappingProxyType(_LINUX_AUTHENTICATION),
            encryption=MappingProxyType(_LINUX_ENCRYPTION),
            compression=MappingProxyType(_LINUX_COMPRESSION),
            sockaddr_has_length=False,
            request_size=16,
            has_priority=True,
            has_scope=False,
            directions=_ALL_DIRECTIONS,
            maximum_reqid=16383,
            maximum_templates=6,
            level_default=Level.REQUIRE,
            reqid_needs_unique=True,
            use_level_in_outbound_tunnel=False,
            empty_ipsec_is_bypass=True,
            stores_scope=False,
            icmp_zero_is_any=True,
            has_soft_policy_lifetime=True,
            replay_in_bytes=False,
            maximum_replay_window=32,
            update_unlinks_first=False,
            rejected_update_removes=False,
            update_changes_id=False,
            dump_counts_down=False,
            error_echoes_request=False,
            absent_policy_error="ENOENT",
            setidx_answers_spdadd=True,
            flush_answers_twice=True,
            migrate_answers_seq_zero=True,
            send_limit=212960,
        )

    @staticmethod
    def freebsd(release: float | str | tuple[int, ...] = 14, byteorder: ByteOrder = sys.byteorder) -> Abi:
        """FreeBSD 12 and later: a release (13, "14.3") or the number that `sysctl kern.osreldate` prints (1403000)."""
        return _freebsd(_freebsd_release(release), _checked_order(byteorder))

    @staticmethod
    def native() -> Abi:
        """The system that runs here, asked of the running kernel and not of the headers this was built with.

        Raises NotSupported on a system without PF_KEYv2 policies that this package knows.
        """
        host = os.uname()
        if host.sysname == "Linux":
            return Abi.linux()
        if host.sysname == "FreeBSD":
            return Abi.freebsd(host.release)
        raise NotSupported(
            f"{host.sysname} {host.release} is not a system whose PF_KEYv2 this package speaks (Linux, FreeBSD 12 and"
            " later); name one of those, or pass a channel that has an abi"
        )


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
    if not parts or parts[0] < 12:
        raise NotSupported(f"FreeBSD {release} is not described here; 12 and later are")
    return parts


@cache
def _freebsd(release: tuple[int, ...], byteorder: ByteOrder) -> Abi:
    # The update became atomic somewhere between 13.0 and 14.3; 14.0 to 14.2 were never read and count as they were.
    atomic = release == (14,) or release >= (14, 3)
    chacha = {"chacha20-poly1305": 14} if release >= (14,) else {}
    chacha_encryption = {"chacha20-poly1305": 15} if release >= (14,) else {}
    return Abi(
        name="freebsd",
        release=release,
        byteorder=byteorder,
        pf_key=27,
        af_inet=2,
        af_inet6=28,
        extensions=MappingProxyType(_FREEBSD_EXTENSIONS),
        message_types=_COMMON_TYPES,
        errors=MappingProxyType(_FREEBSD_ERRORS),
        authentication=MappingProxyType(_FREEBSD_AUTHENTICATION | chacha),
        encryption=MappingProxyType(_COMMON_ENCRYPTION | chacha_encryption),
        compression=MappingProxyType(_COMMON_COMPRESSION),
        sockaddr_has_length=True,
        request_size=8,
        has_priority=True,
        has_scope=True,
        directions=(Direction.IN, Direction.OUT),
        maximum_reqid=16383,
        maximum_templates=4,
        level_default=Level.DEFAULT,
        reqid_needs_unique=True,
        use_level_in_outbound_tunnel=True,
        empty_ipsec_is_bypass=False,
        stores_scope=True,
        icmp_zero_is_any=True,
        has_soft_policy_lifetime=False,
        replay_in_bytes=True,
        maximum_replay_window=(1 << 32) - 33,
        update_unlinks_first=not atomic,
        rejected_update_removes=True,
        update_changes_id=True,
        dump_counts_down=True,
        error_echoes_request=True,
        absent_policy_error="EINVAL",
        setidx_answers_spdadd=False,
        flush_answers_twice=False,
        migrate_answers_seq_zero=False,
        send_limit=2048,
    )
