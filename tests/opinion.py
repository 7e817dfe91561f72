"""What the schema's fields mean, as the values that `Message.extensions` gives: the second opinion's own reading."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

from construct import Container

from pfkey import Abi, DecodeError, ExtensionType, Lifetime, Template, schema
from pfkey.extensions import (
    Combination,
    Filter,
    HardwareOffload,
    Identity,
    KMAddress,
    Proposal,
    SAStatistic,
    SAStatistics,
    SecurityContext,
    Sensitivity,
    SessionID,
)
from pfkey.messages import SA, SA2, Address, Algorithm, Key, PolicyExtension, SPIRange

# The values compare equal to those that say the same by enum members: enum members are their numbers, but for modes,
# flags and identities, which a system may number in its own way.


def _lifetime(one: Any, _: Abi) -> Lifetime:
    return Lifetime(one.allocations, one.bytes, one.addtime, one.usetime)


def _address(one: Any, _: Abi) -> Address:
    inner = one.sockaddr
    rest = (inner.port, inner.scope_id, inner.flowinfo) if "scope_id" in inner else (inner.port, 0, 0)
    return Address(ip_address(inner.addr), one.prefixlen, one.proto, *rest)


def _flags(one: Any, abi: Abi) -> int:
    turned = {0x400: 1 << 32, 0x800: 0x400} if abi.name == "macos" else {}
    return sum(turned.get(1 << bit, 1 << bit) for bit in range(32) if one.flags >> bit & 1)


def _mode(number: int, abi: Abi) -> int:
    return {("linux", 3): 0x103, ("linux", 4): 0x104, ("freebsd", 3): 0x203, ("netbsd", 3): 0x203}.get(
        (abi.name, number), number
    )


def _template(one: Any, abi: Abi) -> Template:
    ends = [ip_address(end.addr) for end in one.addresses] if one.addresses else [None, None]
    return Template(one.proto, _mode(one.mode, abi), *ends, one.reqid, one.level)  # type: ignore[arg-type]


def _policy(one: Any, abi: Abi) -> PolicyExtension:
    templates = tuple(_template(request, abi) for request in one.requests)
    return PolicyExtension(one.type, one.dir, one.id, one.get("priority", 0), templates, one.get("scope", 0))


def _combination(one: Any) -> Combination:
    soft, hard = (
        Lifetime(*(one[f"{which}_{what}"] for what in ("allocations", "bytes", "addtime", "usetime")))
        for which in ("soft", "hard")
    )
    bits = (one.auth_minbits, one.auth_maxbits, one.encrypt_minbits, one.encrypt_maxbits)
    return Combination(one.auth, one.encrypt, one.flags, *bits, soft, hard)


def _filter(one: Any, abi: Abi) -> Filter:
    size = 4 if one.family == abi.af_inet else 16
    return Filter(ip_address(one.saddr[:size]), ip_address(one.daddr[:size]), one.splen, one.dplen)


def _name(text: bytes) -> bytes:
    return text.split(b"\0")[0]


_READ = {
    "sadb_sa": lambda one, abi: SA(one.spi, one.replay, one.state, one.auth, one.encrypt, _flags(one, abi)),
    "sadb_lifetime": _lifetime,
    "sadb_address": _address,
    "sadb_key": lambda one, _: Key(one.data[: (one.bits + 7) // 8], one.bits),
    "sadb_ident": lambda one, _: Identity(one.type, _name(one.name), one.id),
    "sadb_sens": lambda one, _: Sensitivity(
        one.dpd,
        one.sens_level,
        one.integ_level,
        tuple(word.sens_bitmap for word in one.bitmap),
        tuple(word.integ_bitmap for word in one.integ_bitmap),
    ),
    "sadb_prop": lambda one, _: Proposal(one.replay, tuple(map(_combination, one.combinations))),
    "sadb_supported": lambda one, _: tuple(
        Algorithm(row.id, row.ivlen, row.minbits, row.maxbits) for row in one.algorithms
    ),
    "sadb_spirange": lambda one, _: SPIRange(one.min, one.max),
    "sadb_x_sa2": lambda one, abi: SA2(_mode(one.mode, abi), one.sequence, one.reqid),
    "sadb_x_policy": _policy,
    "sadb_x_nat_t_type": lambda one, _: one.type,
    "sadb_x_nat_t_port": lambda one, _: one.port,
    "sadb_x_nat_t_frag": lambda one, _: one.fraglen,
    "sadb_x_sa_replay": lambda one, _: one.replay,
    "sadb_x_sec_ctx": lambda one, _: SecurityContext(one.context, one.alg, one.doi),
    "sadb_x_kmaddress": lambda one, _: KMAddress(
        *(ip_address(end.addr) for end in one.addresses), *(end.port for end in one.addresses)
    ),
    "sadb_x_filter": _filter,
    "sadb_x_if_hw_offl": lambda one, _: HardwareOffload(_name(one["if"]).decode("utf-8", "surrogateescape"), one.flags),
    "sadb_session_id": lambda one, _: SessionID(one.handle, one.session),
    "sadb_sastat": lambda one, abi: SAStatistics(
        one.dir, tuple(SAStatistic(row.spi, row.created, _lifetime(row.lft_c, abi)) for row in one.list)
    ),
}


def values(parsed: Container, abi: Abi) -> list[tuple[ExtensionType | int, object]]:
    """What `Message.extensions` is to say, in order."""
    forms = schema.formats(abi)
    return [
        (
            abi.extensions.get(one.type, one.type),
            one.body if isinstance(one.body, bytes) else _READ[forms[one.type].struct](one.body, abi),
        )
        for one in parsed.extensions
    ]


def verdict(data: bytes, abi: Abi) -> Container | str:
    """What the schema makes of it, or the words of its refusal."""
    try:
        return schema.parse(data, abi)
    except DecodeError as error:
        return str(error)
