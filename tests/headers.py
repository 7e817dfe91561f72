"""What the systems' own headers call our numbers, and C that asserts that both agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from pfkey import Abi, Action, Direction, ExtensionType, Level, MessageType, schema
from pfkey._numbers import OPENBSD_EXTENSIONS, OPENBSD_MESSAGES
from pfkey.constants import IdentityType, PolicyScope, SAFlag, SAState, SAType

X = ExtensionType


class System(NamedTuple):
    """A target of the compiler, the headers it has, and the Abi that they must agree with (None: OpenBSD)."""

    target: str
    abi: Abi | None
    has_ipsec: bool = True


# The headers are those of FreeBSD 15; older releases are read from the history in _numbers.py.
SYSTEMS = (
    System("x86_64-freebsd", Abi.freebsd(15, "little")),
    System("aarch64-freebsd", Abi.freebsd(15, "little")),
    System("powerpc64-freebsd", Abi.freebsd(15, "big")),
    System("x86_64-netbsd", Abi.netbsd("little")),
    System("aarch64-macos", Abi.macos("little"), has_ipsec=False),
    System("x86_64-openbsd", None, has_ipsec=False),
    System("x86_64-linux-musl", Abi.linux("little")),
)

_RFC = set(range(1, 17))  # extensions that RFC 2367 names
_EXTENSION_NAMES = {
    X.SESSION_ID: "SADB_EXT_SESSION_ID",
    X.SASTAT: "SADB_EXT_SASTAT",
    X.MIGRATE_ADDRESS_SRC: "SADB_EXT_MIGRATE_ADDRESS_SRC",
    X.MIGRATE_ADDRESS_DST: "SADB_EXT_MIGRATE_ADDRESS_DST",
    X.ADDRESS_RANGE_SRC_START: "SADB_X_EXT_ADDR_RANGE_SRC_START",
    X.ADDRESS_RANGE_SRC_END: "SADB_X_EXT_ADDR_RANGE_SRC_END",
    X.ADDRESS_RANGE_DST_START: "SADB_X_EXT_ADDR_RANGE_DST_START",
    X.ADDRESS_RANGE_DST_END: "SADB_X_EXT_ADDR_RANGE_DST_END",
    X.LIFETIME_CURRENT_SOFTWARE: "SADB_X_EXT_LFT_CUR_SW_OFFL",
    X.LIFETIME_CURRENT_HARDWARE: "SADB_X_EXT_LFT_CUR_HW_OFFL",
    X.HARDWARE_OFFLOAD: "SADB_X_EXT_IF_HW_OFFL",
}
_MESSAGE_NAMES = {MessageType.GETSASTAT: "SADB_GETSASTAT", MessageType.SA_MIGRATE: "SADB_MIGRATE"}
_AUTHENTICATION_NAMES = {
    "none": "SADB_AALG_NONE", "hmac-md5": "SADB_AALG_MD5HMAC", "hmac-sha1": "SADB_AALG_SHA1HMAC",
    "keyed-md5": "SADB_X_AALG_MD5", "keyed-sha1": "SADB_X_AALG_SHA", "null": "SADB_X_AALG_NULL",
    "hmac-sha2-256": "SADB_X_AALG_SHA2_256", "hmac-sha2-384": "SADB_X_AALG_SHA2_384",
    "hmac-sha2-512": "SADB_X_AALG_SHA2_512", "hmac-ripemd160": "SADB_X_AALG_RIPEMD160HMAC",
    "aes-xcbc-mac": "SADB_X_AALG_AES_XCBC_MAC", "aes-128-gmac": "SADB_X_AALG_AES128GMAC",
    "aes-192-gmac": "SADB_X_AALG_AES192GMAC", "aes-256-gmac": "SADB_X_AALG_AES256GMAC",
    "chacha20-poly1305": "SADB_X_AALG_CHACHA20POLY1305", "tcp-md5": "SADB_X_AALG_TCP_MD5",
    "hmac-sm3-256": "SADB_X_AALG_SM3_256HMAC",
}  # fmt: skip
_ENCRYPTION_NAMES = {
    "none": "SADB_EALG_NONE", "des-cbc": "SADB_EALG_DESCBC", "3des-cbc": "SADB_EALG_3DESCBC",
    "cast128-cbc": "SADB_X_EALG_CAST128CBC", "blowfish-cbc": "SADB_X_EALG_BLOWFISHCBC", "null": "SADB_EALG_NULL",
    "aes-ctr": "SADB_X_EALG_AESCTR", "aes-gcm-8": "SADB_X_EALG_AESGCM8", "aes-gcm-12": "SADB_X_EALG_AESGCM12",
    "camellia-cbc": "SADB_X_EALG_CAMELLIACBC", "chacha20-poly1305": "SADB_X_EALG_CHACHA20POLY1305",
    "aes-ccm-8": "SADB_X_EALG_AES_CCM_ICV8", "aes-ccm-12": "SADB_X_EALG_AES_CCM_ICV12",
    "aes-ccm-16": "SADB_X_EALG_AES_CCM_ICV16", "sm4-cbc": "SADB_X_EALG_SM4CBC",
    "serpent-cbc": "SADB_X_EALG_SERPENTCBC", "twofish-cbc": "SADB_X_EALG_TWOFISHCBC",
    "skipjack-cbc": "SADB_X_EALG_SKIPJACK", "aes-cbc": "SADB_X_EALG_AESCBC", "aes-gcm-16": "SADB_X_EALG_AESGCM16",
    "aes-gmac": "SADB_X_EALG_AESGMAC",
}  # fmt: skip
# Where a system spells a name differently.
_SPELLED: Mapping[str, Mapping[str, str]] = {
    "linux": {
        "hmac-sha2-256": "SADB_X_AALG_SHA2_256HMAC", "hmac-sha2-384": "SADB_X_AALG_SHA2_384HMAC",
        "hmac-sha2-512": "SADB_X_AALG_SHA2_512HMAC", "cast128-cbc": "SADB_X_EALG_CASTCBC",
        "aes-gcm-8": "SADB_X_EALG_AES_GCM_ICV8", "aes-gcm-12": "SADB_X_EALG_AES_GCM_ICV12",
        "aes-gcm-16": "SADB_X_EALG_AES_GCM_ICV16", "aes-gmac": "SADB_X_EALG_NULL_AES_GMAC",
    },
    "macos": {"aes-gcm-16": "SADB_X_EALG_AES_GCM", "aes-gmac": "SADB_X_EALG_AES_GMAC", "aes-cbc": "SADB_X_EALG_AES"},
    "netbsd": {"aes-cbc": "SADB_X_EALG_RIJNDAELCBC"},
}  # fmt: skip
_BSD_FLAGS = {
    SAFlag.IV4B: "SADB_X_EXT_IV4B", SAFlag.DERIV: "SADB_X_EXT_DERIV", SAFlag.CYCSEQ: "SADB_X_EXT_CYCSEQ",
    SAFlag.RAWCPI: "SADB_X_EXT_RAWCPI", SAFlag.PRAND: "SADB_X_EXT_PRAND", SAFlag.PZERO: "SADB_X_EXT_PZERO",
    SAFlag.PFS: "SADB_SAFLAGS_PFS",
}  # fmt: skip
_FLAGS: Mapping[str, Mapping[int, str]] = {
    "linux": {
        SAFlag.PFS: "SADB_SAFLAGS_PFS", SAFlag.NOPMTUDISC: "SADB_SAFLAGS_NOPMTUDISC",
        SAFlag.DECAP_DSCP: "SADB_SAFLAGS_DECAP_DSCP", SAFlag.NOECN: "SADB_SAFLAGS_NOECN",
    },
    "freebsd": {**_BSD_FLAGS, SAFlag.ESN: "SADB_X_SAFLAGS_ESN"},
    "netbsd": _BSD_FLAGS,
    "macos": {**_BSD_FLAGS, 0x400: "SADB_X_EXT_IIV", 0x800: "SADB_X_EXT_ESN"},
}  # fmt: skip
_POLICY_NAMES = {
    **{member: f"IPSEC_POLICY_{member.name}" for member in Action if member is not Action.GENERATE},
    **{member: f"IPSEC_LEVEL_{member.name}" for member in Level},
}
_COMMON_DIRECTIONS = {Direction.IN: "IPSEC_DIR_INBOUND", Direction.OUT: "IPSEC_DIR_OUTBOUND"}


def extension_name(kind: ExtensionType) -> str:
    if kind in _EXTENSION_NAMES:
        return _EXTENSION_NAMES[kind]
    return f"SADB_EXT_{kind.name}" if kind in _RFC else f"SADB_X_EXT_{kind.name}"


def message_name(kind: MessageType) -> str:
    return _MESSAGE_NAMES.get(kind) or (f"SADB_{kind.name}" if kind <= 10 else f"SADB_X_{kind.name}")


def satype_name(kind: SAType) -> str:
    x = kind in (SAType.IPCOMP, SAType.TCPSIGNATURE, SAType.POLICY)
    return f"SADB_{'X_' if x else ''}SATYPE_{kind.name}"


def numbers(abi: Abi) -> Iterator[tuple[str, int]]:
    """(the header's name, our number) of everything in <net/pfkeyv2.h>."""
    yield "PF_KEY_V2", 2
    yield "AF_INET", abi.af_inet
    yield "AF_INET6", abi.af_inet6
    yield "PF_KEY", abi.pf_key
    yield from ((extension_name(kind), number) for number, kind in abi.extensions.items())
    yield "SADB_EXT_MAX", max(abi.extensions)
    yield from ((message_name(kind), number) for number, kind in abi.message_types.items())
    yield "SADB_MAX", max(abi.message_types)
    lacking = {"linux": {10, 11}, "freebsd": {10}, "netbsd": {10}, "macos": {11}}[abi.name]
    yield from ((satype_name(kind), int(kind)) for kind in SAType if kind not in lacking)
    yield from ((f"SADB_SASTATE_{state.name}", int(state)) for state in SAState)
    identities = {1: "SADB_IDENTTYPE_PREFIX", 2: "SADB_IDENTTYPE_FQDN", 3: "SADB_IDENTTYPE_USERFQDN"}
    yield from ((identities[kind], int(kind)) for kind in IdentityType if kind in identities)
    if abi.name != "linux":
        yield "SADB_X_IDENTTYPE_ADDR", IdentityType.ADDRESS
    spelled = _SPELLED.get(abi.name, {})
    for names, numbers in ((_AUTHENTICATION_NAMES, abi.authentication), (_ENCRYPTION_NAMES, abi.encryption)):
        yield from ((spelled.get(name, names[name]), number) for name, number in numbers.items())
    yield from ((f"SADB_X_CALG_{name.upper()}", number) for name, number in abi.compression.items())
    yield from ((name, int(bit)) for bit, name in _FLAGS[abi.name].items())


def policy_numbers(abi: Abi) -> Iterator[tuple[str, int]]:
    """(the header's name, our number) of everything in the header of policies."""
    yield from ((name, int(member)) for member, name in _POLICY_NAMES.items())
    directions = _COMMON_DIRECTIONS | ({Direction.FWD: "IPSEC_DIR_FWD"} if Direction.FWD in abi.directions else {})
    yield from ((name, int(member)) for member, name in directions.items())
    yield from ((f"IPSEC_MODE_{mode.name}", number) for number, mode in abi.modes.items())
    yield "IPSEC_MANUAL_REQID_MAX", abi.maximum_reqid
    yield "IPSEC_ULPROTO_ANY", 255
    if abi.has_scope:
        yield from ((f"IPSEC_POLICYSCOPE_{scope.name}", int(scope)) for scope in PolicyScope)


def openbsd_numbers() -> Iterator[tuple[str, int]]:
    yield from ((f"SADB_X_{name}", number) for number, name in OPENBSD_MESSAGES.items())
    yield from ((f"SADB_X_EXT_{name}", number) for number, name in OPENBSD_EXTENSIONS.items())
    yield "SADB_EXT_MAX", max(OPENBSD_EXTENSIONS)
    yield "SADB_MAX", max(OPENBSD_MESSAGES)


# Structs and members that a system's public headers do not have, or spell differently.
_SIZES = {
    "sadb_msg": 16, "sadb_sa": 16, "sadb_lifetime": 32, "sadb_address": 8, "sadb_key": 8, "sadb_ident": 16,
    "sadb_sens": 16, "sadb_prop": 8, "sadb_comb": 72, "sadb_supported": 8, "sadb_alg": 8, "sadb_spirange": 16,
    "sadb_x_sa2": 16, "sadb_x_policy": 16, "sadb_x_nat_t_type": 8, "sadb_x_nat_t_port": 8, "sadb_x_nat_t_frag": 8,
    "sadb_x_sa_replay": 8, "sadb_x_sec_ctx": 8, "sadb_x_kmaddress": 8, "sadb_x_filter": 40, "sadb_x_if_hw_offl": 40,
    "sadb_session_id": 24, "sadb_sastat": 16, "sockaddr_in": 16, "sockaddr_in6": 28,
}  # fmt: skip


# macOS has an array of two where we have two names, and no name for what is before it.
_MEMBERS = {
    "sadb_session_id_handle": "sadb_session_id_v[0]",
    "sadb_session_id_session": "sadb_session_id_v[1]",
}
_NAMELESS = {"sadb_session_id_reserved"}


def layouts(abi: Abi) -> Iterator[tuple[str, str, int]]:
    """(struct, member, offset in bytes) of everything that the schema declares; the member "" is for the size."""
    for struct, body in schema.structures(abi).items():
        size = abi.request_size if struct == "sadb_x_ipsecrequest" else _SIZES[struct]
        yield struct, "", size
        head = 4 if struct in {form.struct for form in schema.formats(abi).values()} else 0
        for member, offset, _ in schema.fields(body):
            if head + offset < size and member not in _NAMELESS:
                yield struct, _MEMBERS.get(member, member), head + offset


def layout_assertion(struct: str, member: str, number: int) -> str:
    what = f"offsetof(struct {struct}, {member})" if member else f"sizeof(struct {struct})"
    return f'_Static_assert({what} == {number}u, "{struct} {member}");'


def source(system: System) -> str:
    """C that compiles when the headers of a system agree with our tables."""
    abi = system.abi
    linux = abi is not None and abi.name == "linux"
    lines = ["#include <stddef.h>", "#include <sys/types.h>", "#include <sys/socket.h>"]
    lines.append("#include <linux/pfkeyv2.h>" if linux else "#include <net/pfkeyv2.h>")
    if system.has_ipsec:
        lines.append("#include <linux/ipsec.h>" if linux else "#include <netipsec/ipsec.h>")
    checks = openbsd_numbers() if abi is None else numbers(abi)
    found = [*checks, *(policy_numbers(abi) if abi is not None and system.has_ipsec else ())]
    lines += [f'_Static_assert(({name}) == {number}u, "{name}");' for name, number in found]
    if abi is not None:
        lines.append("#include <netinet/in.h>")
        lines += [layout_assertion(*one) for one in layouts(abi)]
    return "\n".join([*lines, ""])
