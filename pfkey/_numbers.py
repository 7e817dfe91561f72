"""The numbers of each system: extensions, message types, modes, flags, errors, algorithms, as tables for the Abis.

Sources: <net/pfkeyv2.h> and <netipsec/ipsec.h> of FreeBSD 9.3 to 15 and of NetBSD, <net/pfkeyv2.h> of macOS and of
OpenBSD, <linux/pfkeyv2.h> and <linux/ipsec.h> of Linux.  A test compiles them against those headers.
"""

from __future__ import annotations

from collections.abc import Mapping

from .constants import ExtensionType, MessageType, Mode, SAFlag

__all__ = [
    "COMPRESSION",
    "ERRORS",
    "EXTENSIONS",
    "FREEBSD_SINCE",
    "LINUX_COMPRESSION",
    "MACOS_AUTHENTICATION",
    "MACOS_ENCRYPTION",
    "MACOS_FLAGS",
    "MESSAGE_TYPES",
    "MODES",
    "OPENBSD_EXTENSIONS",
    "OPENBSD_MESSAGES",
    "freebsd_authentication",
    "freebsd_encryption",
    "freebsd_extensions",
    "linux_authentication",
    "linux_encryption",
    "netbsd_encryption",
]

_LINUX, _BSD, _MACOS = 1, 2, 3  # the dialects of constants.py

_COMMON_EXTENSIONS = {int(kind): kind for kind in ExtensionType if kind <= ExtensionType.SA2}
_NAT_T = {int(kind): kind for kind in ExtensionType if ExtensionType.SA2 < kind < 0x100}


def _dialect(number: int, up_to: int = 0xFF) -> dict[int, ExtensionType]:
    return {kind & 0xFF: kind for kind in ExtensionType if kind >> 8 == number and kind & 0xFF <= up_to}


EXTENSIONS: Mapping[str, Mapping[int, ExtensionType]] = {
    "linux": _COMMON_EXTENSIONS | _NAT_T | _dialect(_LINUX),
    "freebsd": _COMMON_EXTENSIONS | _NAT_T | _dialect(_BSD),
    "netbsd": _COMMON_EXTENSIONS | _NAT_T | _dialect(_BSD, 25),
    "macos": _COMMON_EXTENSIONS | _dialect(_MACOS),
}
"""System -> number on the wire -> what it means there; of FreeBSD those of the newest release."""

FREEBSD_SINCE: Mapping[ExtensionType, tuple[int, int]] = {
    ExtensionType.SA_REPLAY: (11, 1),
    ExtensionType.NEW_ADDRESS_SRC: (11, 1),
    ExtensionType.NEW_ADDRESS_DST: (11, 1),
    ExtensionType.LIFETIME_CURRENT_SOFTWARE: (15, 0),
    ExtensionType.LIFETIME_CURRENT_HARDWARE: (15, 0),
    ExtensionType.HARDWARE_OFFLOAD: (15, 0),
}
"""The first FreeBSD release that has an extension; every described release has the others."""


def freebsd_extensions(release: tuple[int, ...]) -> dict[int, ExtensionType]:
    """What a FreeBSD release knows."""
    release = (*release, 0, 0)[:2] if release != (11,) else (11, 4)  # "11" alone is not the one without scopes
    return {
        number: kind for number, kind in EXTENSIONS["freebsd"].items() if release >= FREEBSD_SINCE.get(kind, (0, 0))
    }


_COMMON_MESSAGES = {int(kind): kind for kind in MessageType if kind <= MessageType.SPDDELETE2}
MESSAGE_TYPES: Mapping[str, Mapping[int, MessageType]] = {
    "linux": _COMMON_MESSAGES | {23: MessageType.NAT_T_NEW_MAPPING, 24: MessageType.MIGRATE},
    "freebsd": _COMMON_MESSAGES,
    "netbsd": _COMMON_MESSAGES | {23: MessageType.NAT_T_NEW_MAPPING},
    "macos": _COMMON_MESSAGES | {kind & 0xFF: kind for kind in MessageType if kind >> 8 == _MACOS},
}
_COMMON_MODES = {int(mode): mode for mode in Mode if mode < 0x100}
MODES: Mapping[str, Mapping[int, Mode]] = {
    "linux": _COMMON_MODES | {3: Mode.BEET, 4: Mode.IPTFS},
    "freebsd": _COMMON_MODES | {3: Mode.TCPMD5},
    "netbsd": _COMMON_MODES | {3: Mode.TCPMD5},
    "macos": _COMMON_MODES,
}
MACOS_FLAGS: Mapping[int, SAFlag] = {0x400: SAFlag.IIV, 0x800: SAFlag.ESN}
"""Bits on the wire that mean something else than the SAFlag of that number."""

_COMMON_ERRORS = {
    1: "EPERM", 2: "ENOENT", 3: "ESRCH", 4: "EINTR", 5: "EIO", 9: "EBADF", 12: "ENOMEM", 13: "EACCES",
    14: "EFAULT", 16: "EBUSY", 17: "EEXIST", 22: "EINVAL", 28: "ENOSPC", 32: "EPIPE", 34: "ERANGE",
}  # fmt: skip
_BSD_ERRORS = _COMMON_ERRORS | {
    35: "EAGAIN", 40: "EMSGSIZE", 42: "ENOPROTOOPT", 43: "EPROTONOSUPPORT", 44: "ESOCKTNOSUPPORT",
    45: "EOPNOTSUPP", 47: "EAFNOSUPPORT", 48: "EADDRINUSE", 49: "EADDRNOTAVAIL", 50: "ENETDOWN", 55: "ENOBUFS",
    60: "ETIMEDOUT", 62: "ELOOP", 78: "ENOSYS", 84: "EOVERFLOW",
}  # fmt: skip
ERRORS: Mapping[str, Mapping[int, str]] = {
    "linux": _COMMON_ERRORS | {
        11: "EAGAIN", 38: "ENOSYS", 40: "ELOOP", 61: "ENODATA", 75: "EOVERFLOW", 90: "EMSGSIZE", 92: "ENOPROTOOPT",
        93: "EPROTONOSUPPORT", 94: "ESOCKTNOSUPPORT", 95: "EOPNOTSUPP", 97: "EAFNOSUPPORT", 98: "EADDRINUSE",
        99: "EADDRNOTAVAIL", 100: "ENETDOWN", 105: "ENOBUFS", 110: "ETIMEDOUT",
    },
    "freebsd": _BSD_ERRORS,
    "netbsd": _BSD_ERRORS,
    "macos": _BSD_ERRORS | {45: "ENOTSUP", 102: "EOPNOTSUPP"},
}  # fmt: skip

_COMMON_AUTHENTICATION = {
    "none": 0, "hmac-md5": 2, "hmac-sha1": 3, "hmac-sha2-256": 5, "hmac-sha2-384": 6, "hmac-sha2-512": 7,
    "hmac-ripemd160": 8, "aes-xcbc-mac": 9, "null": 251,
}  # fmt: skip
_GMAC = {"aes-128-gmac": 11, "aes-192-gmac": 12, "aes-256-gmac": 13}
MACOS_AUTHENTICATION: Mapping[str, int] = {
    "none": 0, "hmac-md5": 1, "hmac-sha1": 2, "keyed-md5": 3, "keyed-sha1": 4, "null": 5, "hmac-sha2-256": 6,
    "hmac-sha2-384": 7, "hmac-sha2-512": 8,
}  # fmt: skip


def linux_authentication() -> dict[str, int]:
    """SADB_AALG_* of Linux."""
    return _COMMON_AUTHENTICATION | {"hmac-sm3-256": 10}


def freebsd_authentication(release: tuple[int, ...]) -> dict[str, int]:
    """SADB_AALG_* of a FreeBSD release; those of 11 to 13 are NetBSD's too."""
    found = _COMMON_AUTHENTICATION | {"keyed-md5": 249, "keyed-sha1": 250, "tcp-md5": 252}
    found |= _GMAC if release >= (11,) else {}
    return found | ({"chacha20-poly1305": 14} if release >= (14,) else {})


_CLASSIC = {"none": 0, "des-cbc": 2, "3des-cbc": 3, "cast128-cbc": 6, "blowfish-cbc": 7, "null": 11, "aes-cbc": 12}
_COUNTER = {"aes-ctr": 13, "aes-gcm-8": 18, "aes-gcm-12": 19, "aes-gcm-16": 20, "aes-gmac": 23}
_CAMELLIA = {"camellia-cbc": 22}
MACOS_ENCRYPTION: Mapping[str, int] = {
    "none": 0, "des-cbc": 1, "3des-cbc": 2, "null": 3, "blowfish-cbc": 4, "cast128-cbc": 5, "aes-cbc": 12,
    "aes-gcm-16": 13, "chacha20-poly1305": 14, "aes-gmac": 15,
}  # fmt: skip


def linux_encryption() -> dict[str, int]:
    """SADB_EALG_* of Linux."""
    return _CLASSIC | _COUNTER | _CAMELLIA | {
        "aes-ccm-8": 14, "aes-ccm-12": 15, "aes-ccm-16": 16, "sm4-cbc": 24, "serpent-cbc": 252, "twofish-cbc": 253,
    }  # fmt: skip


def freebsd_encryption(release: tuple[int, ...]) -> dict[str, int]:
    """SADB_EALG_* of a FreeBSD release; up to 10 AES-CTR has a number of its own and there is no AES-GCM."""
    if release < (11,):
        return _CLASSIC | _CAMELLIA | {"aes-ctr": 250, "skipjack-cbc": 249}
    return _CLASSIC | _COUNTER | _CAMELLIA | ({"chacha20-poly1305": 15} if release >= (14,) else {})


def netbsd_encryption() -> dict[str, int]:
    """SADB_EALG_* of NetBSD."""
    return _CLASSIC | _COUNTER | _CAMELLIA | {"skipjack-cbc": 250}


COMPRESSION: Mapping[str, int] = {"none": 0, "oui": 1, "deflate": 2, "lzs": 3}
LINUX_COMPRESSION: Mapping[str, int] = {**COMPRESSION, "lzjh": 4}

# OpenBSD speaks another PF_KEY: its flows are not policies.  Enough to tell who speaks, and to say so.
OPENBSD_MESSAGES: Mapping[int, str] = {12: "ADDFLOW", 13: "DELFLOW", 14: "GRPSPIS", 15: "ASKPOLICY", 16: "SPDDUMP"}
OPENBSD_EXTENSIONS: Mapping[int, str] = {
    17: "SRC_MASK", 18: "DST_MASK", 19: "PROTOCOL", 20: "FLOW_TYPE", 21: "SRC_FLOW", 22: "DST_FLOW", 23: "SA2",
    24: "DST2", 25: "POLICY", 26: "LOCAL_CREDENTIALS", 27: "REMOTE_CREDENTIALS", 28: "LOCAL_AUTH",
    29: "REMOTE_AUTH", 30: "SUPPORTED_COMP", 31: "UDPENCAP", 32: "LIFETIME_LASTUSE", 33: "TAG", 34: "TAP",
    35: "SATYPE2", 36: "COUNTER", 37: "RDOMAIN", 38: "MTU", 39: "REPLAY", 40: "IFACE",
}  # fmt: skip
