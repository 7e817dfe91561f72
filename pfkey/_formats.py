"""How every extension of every system lies on the wire, declared with construct: a table, a function for each kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

from construct import (
    Bytes,
    Construct,
    Container,
    Int8ub,
    Int16ub,
    Int16ul,
    Int32ub,
    Int32ul,
    Int64ub,
    Int64ul,
    Struct,
)

from ._declare import (
    Refused,
    Rest,
    Rule,
    Several,
    UntilEnd,
    enclosed,
    record,
    room,
    size_of,
)
from .abi import Abi
from .constants import ExtensionType as X

__all__ = ["Format", "Request", "Sockaddr", "algorithm", "combination", "formats", "numbers"]

WORD = 8

# The rules, in the words of the core.
WRONG_SIZE = "the extension has another size than its type allows"
BAD_FAMILY = "the address is neither IPv4 nor IPv6 in this system's numbers"
BAD_SOCKADDR_LENGTH = "the sockaddr's length does not fit its family or its extension"
BAD_PREFIX = "the prefix is longer than the address"
KEY_TOO_SHORT = "the key has more bits than its extension holds"
REQUEST_TOO_SHORT = "a policy request is shorter than its head"
REQUEST_PAST_END = "a policy request goes on past the end of its extension"
FAMILIES = "the two addresses of a pair are of different families"
BAD_COUNT = "the lengths inside the extension do not add up to its size"


class Format(NamedTuple):
    """How one extension lies on the wire: the struct of the headers, and its fields from the header of 4 bytes on."""

    struct: str
    body: Struct


class Numbers(NamedTuple):
    """The integers of a byte order."""

    u8: Construct
    u16: Construct
    u32: Construct
    u64: Construct


_LITTLE, _BIG = Numbers(Int8ub, Int16ul, Int32ul, Int64ul), Numbers(Int8ub, Int16ub, Int32ub, Int64ub)


def numbers(abi: Abi) -> Numbers:
    return _BIG if abi.byteorder == "big" else _LITTLE


def _round(size: int) -> int:
    return (size + WORD - 1) // WORD * WORD


def _exactly(size: int) -> Rule:
    return Rule(WRONG_SIZE, lambda this: size_of(this) == size)


def _at_least(size: int) -> Rule:
    return Rule(WRONG_SIZE, lambda this: size_of(this) >= size)


# Addresses.


class Sockaddr(Construct):  # type: ignore[misc]
    """A sockaddr_in or a sockaddr_in6, told apart by its family; it must end before what encloses it does."""

    encloses = True

    def __init__(self, abi: Abi) -> None:
        super().__init__()
        n = numbers(abi)
        self.has_length = abi.sockaddr_has_length
        self.family = Int8ub if abi.sockaddr_has_length else n.u16
        self.forms: dict[int, tuple[Struct, int]] = {
            abi.af_inet: (self._form("sin_", ("addr", Bytes(4)), ("zero", Bytes(8))), 16),
            abi.af_inet6: (
                self._form("sin6_", ("flowinfo", Int32ub), ("addr", Bytes(16)), ("scope_id", n.u32)),
                28,
            ),
        }

    def _form(self, prefix: str, *rest: tuple[str, Construct]) -> Struct:
        length = [("len", Int8ub)] if self.has_length else []
        return record(prefix, *length, ("family", self.family), ("port", Int16ub), *rest)

    def _parse(self, stream: Any, context: Any, path: str) -> Any:
        start = stream.tell()
        left = room(stream, context)
        head = stream.read(min(left, 2))
        stream.seek(start)
        if len(head) < 2:
            raise Refused(BAD_FAMILY, start)
        family = head[1] if self.has_length else self.family.parse(head)
        if family not in self.forms:
            raise Refused(BAD_FAMILY, start)
        form, length = self.forms[family]
        if length > left or (self.has_length and head[0] != length):
            raise Refused(BAD_SOCKADDR_LENGTH, start)
        return form._parsereport(stream, context, path)

    def _build(self, obj: Any, stream: Any, context: Any, path: str) -> Any:
        return self.forms[obj.family][0]._build(obj, stream, context, path)


def _sockaddr_size(sockaddr: Any) -> int:
    return 16 if len(sockaddr.addr) == 4 else 28


class _Pair(Construct):  # type: ignore[misc]
    """Two sockaddrs of one family, packed; none at all when `optional` and there is no room for any byte."""

    encloses = True

    def __init__(self, abi: Abi, *, optional: bool = False) -> None:
        super().__init__()
        self.sockaddr, self.optional = Sockaddr(abi), optional

    def _parse(self, stream: Any, context: Any, path: str) -> Any:
        if self.optional and not room(stream, context):
            return None
        first = self.sockaddr._parsereport(stream, context, path)
        middle = stream.tell()
        second = self.sockaddr._parsereport(stream, context, path)
        if first.family != second.family:
            raise Refused(FAMILIES, middle)
        return first, second

    def _build(self, obj: Any, stream: Any, context: Any, path: str) -> Any:
        for one in obj or ():
            self.sockaddr._build(one, stream, context, path)
        return obj


# What extensions carry, one function for each kind of body.


def _address(prefix: str, abi: Abi) -> tuple[Any, ...]:
    return (
        _at_least(24),
        ("proto", Int8ub),
        ("prefixlen", Int8ub),
        ("reserved", numbers(abi).u16),
        ("sockaddr", Sockaddr(abi)),
        Rule(WRONG_SIZE, lambda this: size_of(this) == _round(8 + _sockaddr_size(this.sockaddr))),
        Rule(BAD_PREFIX, lambda this: this.prefixlen <= 8 * len(this.sockaddr.addr), at=5),
        ("padding", Rest()),
    )


def _lifetime(prefix: str, abi: Abi) -> tuple[Any, ...]:
    return (_exactly(32), *_lifetime_fields(abi))


def _lifetime_fields(abi: Abi) -> tuple[Any, ...]:
    n = numbers(abi)
    return ("allocations", n.u32), ("bytes", n.u64), ("addtime", n.u64), ("usetime", n.u64)


def _sa(prefix: str, abi: Abi) -> tuple[Any, ...]:
    return (
        _exactly(16),
        ("spi", Int32ub),
        ("replay", Int8ub),
        ("state", Int8ub),
        ("auth", Int8ub),
        ("encrypt", Int8ub),
        ("flags", numbers(abi).u32),
    )


def _key(prefix: str, abi: Abi) -> tuple[Any, ...]:
    return (
        ("bits", numbers(abi).u16),
        ("reserved", numbers(abi).u16),
        Rule(KEY_TOO_SHORT, lambda this: (this.bits + 7) // 8 <= size_of(this) - 8, at=4),
        ("data", Rest()),
    )


def _identity(prefix: str, abi: Abi) -> tuple[Any, ...]:
    n = numbers(abi)
    return _at_least(16), ("type", n.u16), ("reserved", n.u16), ("id", n.u64), ("name", Rest())


def _sensitivity(prefix: str, abi: Abi) -> tuple[Any, ...]:
    n = numbers(abi)
    return (
        _at_least(16),
        ("dpd", n.u32),
        ("sens_level", Int8ub),
        ("sens_len", Int8ub),
        ("integ_level", Int8ub),
        ("integ_len", Int8ub),
        ("reserved", n.u32),
        Rule(BAD_COUNT, lambda this: size_of(this) == 16 + 8 * (this.sens_len + this.integ_len), at=9),
        ("bitmap", Several(lambda this: this.sens_len, record("", ("sens_bitmap", n.u64)))),
        ("integ_bitmap", Several(lambda this: this.integ_len, record("", ("integ_bitmap", n.u64)))),
    )


def combination(abi: Abi) -> Struct:
    n = numbers(abi)
    bits = [(name, n.u16) for name in ("auth_minbits", "auth_maxbits", "encrypt_minbits", "encrypt_maxbits")]
    limits = [
        (f"{which}_{what}", n.u32 if what == "allocations" else n.u64)
        for what in ("allocations", "bytes", "addtime", "usetime")
        for which in ("soft", "hard")
    ]
    head = [("auth", Int8ub), ("encrypt", Int8ub), ("flags", n.u16)]
    return record("sadb_comb_", *head, *bits, ("reserved", n.u32), *limits)


def _proposal(prefix: str, abi: Abi) -> tuple[Any, ...]:
    return (
        Rule(WRONG_SIZE, lambda this: (size_of(this) - 8) % 72 == 0),
        ("replay", Int8ub),
        ("reserved", Bytes(3)),
        ("combinations", UntilEnd(72, combination(abi))),
    )


def algorithm(abi: Abi) -> Struct:
    n = numbers(abi)
    return record(
        "sadb_alg_",
        ("id", Int8ub),
        ("ivlen", Int8ub),
        ("minbits", n.u16),
        ("maxbits", n.u16),
        ("reserved", n.u16),
    )


def _supported(prefix: str, abi: Abi) -> tuple[Any, ...]:
    return ("reserved", numbers(abi).u32), ("algorithms", UntilEnd(8, algorithm(abi)))


def _spirange(prefix: str, abi: Abi) -> tuple[Any, ...]:
    n = numbers(abi)
    return _exactly(16), ("min", n.u32), ("max", n.u32), ("reserved", n.u32)


def _sa2(prefix: str, abi: Abi) -> tuple[Any, ...]:
    n = numbers(abi)
    return (
        _exactly(16),
        ("mode", Int8ub),
        ("reserved1", Int8ub),
        ("reserved2", n.u16),
        ("sequence", n.u32),
        ("reqid", n.u32),
    )


def _nat_t_type(prefix: str, abi: Abi) -> tuple[Any, ...]:
    return _exactly(8), ("type", Int8ub), ("reserved", Bytes(3))


def _nat_t_port(prefix: str, abi: Abi) -> tuple[Any, ...]:
    return _exactly(8), ("port", Int16ub), ("reserved", numbers(abi).u16)


def _nat_t_frag(prefix: str, abi: Abi) -> tuple[Any, ...]:
    return _exactly(8), ("fraglen", numbers(abi).u16), ("reserved", numbers(abi).u16)


def _replay(prefix: str, abi: Abi) -> tuple[Any, ...]:
    return _exactly(8), ("replay", numbers(abi).u32)


class Request(Construct):  # type: ignore[misc]
    """struct sadb_x_ipsecrequest, whose length is in bytes on every system, and the addresses behind it."""

    encloses = True

    def __init__(self, abi: Abi) -> None:
        super().__init__()
        n = numbers(abi)
        wide = abi.request_size == 16
        reqid = [("reserved1", n.u16), ("reqid", n.u32), ("reserved2", n.u32)] if wide else [("reqid", n.u16)]
        self.length = n.u16
        self.least = abi.request_size
        self.form = record(
            "sadb_x_ipsecrequest_",
            ("len", n.u16),
            ("proto", n.u16),
            ("mode", Int8ub),
            ("level", Int8ub),
            *reqid,
            ("addresses", _Pair(abi, optional=True)),
            ("padding", Rest()),
        )

    def _parse(self, stream: Any, context: Any, path: str) -> Any:
        start = stream.tell()
        length = self.length._parsereport(stream, context, path)
        stream.seek(start)
        if length < self.least:
            raise Refused(REQUEST_TOO_SHORT, start)
        if length > room(stream, context):
            raise Refused(REQUEST_PAST_END, start)
        return self.form._parsereport(stream, enclosed(context, start, start + length), path)

    def _build(self, obj: Any, stream: Any, context: Any, path: str) -> Any:
        start = stream.tell()
        self.form._build(Container(obj, len=0), stream, context, path)
        end = stream.tell()
        stream.seek(start)
        stream.write(self.length.build(end - start))
        stream.seek(end)
        return obj


def _policy(prefix: str, abi: Abi) -> tuple[Any, ...]:
    n = numbers(abi)
    scope = "scope" if abi.has_scope else "flags" if abi.has_policy_flags else "reserved"
    return (
        _at_least(16),
        ("type", n.u16),
        ("dir", Int8ub),
        (scope, Int8ub),
        ("id", n.u32),
        ("priority" if abi.has_priority else "reserved2", n.u32),
        ("requests", UntilEnd(abi.request_size, Request(abi))),
        ("rest", Rest()),
    )


def _security_context(prefix: str, abi: Abi) -> tuple[Any, ...]:
    return (
        ("alg", Int8ub),
        ("doi", Int8ub),
        ("len", numbers(abi).u16),
        Rule(BAD_COUNT, lambda this: size_of(this) == _round(8 + this.len), at=6),
        ("context", Bytes(lambda this: this.len)),
        ("padding", Rest()),
    )


def _kmaddress(prefix: str, abi: Abi) -> tuple[Any, ...]:
    return (
        ("reserved", numbers(abi).u32),
        ("addresses", _Pair(abi)),
        Rule(WRONG_SIZE, lambda this: size_of(this) == _round(8 + 2 * _sockaddr_size(this.addresses[0]))),
        ("padding", Rest()),
    )


def _filter(prefix: str, abi: Abi) -> tuple[Any, ...]:
    bits = {abi.af_inet: 32, abi.af_inet6: 128}
    return (
        _exactly(40),
        ("saddr", Bytes(16)),
        ("daddr", Bytes(16)),
        ("family", numbers(abi).u16),
        ("splen", Int8ub),
        ("dplen", Int8ub),
        Rule(BAD_FAMILY, lambda this: this.family in bits, at=36),
        Rule(BAD_PREFIX, lambda this: this.splen <= bits[this.family], at=38),
        Rule(BAD_PREFIX, lambda this: this.dplen <= bits[this.family], at=39),
    )


def _offload(prefix: str, abi: Abi) -> tuple[Any, ...]:
    return _exactly(40), ("flags", numbers(abi).u32), ("if", Bytes(32))


def _session(prefix: str, abi: Abi) -> tuple[Any, ...]:
    n = numbers(abi)
    return _exactly(24), ("reserved", Bytes(4)), ("handle", n.u64), ("session", n.u64)


def _statistics(prefix: str, abi: Abi) -> tuple[Any, ...]:
    n = numbers(abi)
    lifetime = record("sadb_lifetime_", ("len", n.u16), ("exttype", n.u16), *_lifetime_fields(abi))
    one = record("", ("spi", Int32ub), ("created", n.u32), ("lft_c", lifetime))
    return (
        _at_least(16),
        ("dir", n.u32),
        ("reserved", n.u32),
        ("list_len", n.u32),
        Rule(BAD_COUNT, lambda this: size_of(this) == 16 + 40 * this.list_len, at=12),
        ("list", UntilEnd(40, one)),
    )


# (extensions, their struct in the headers, what stands before the names of its fields, its body)
_Body = Callable[[str, Abi], tuple[Any, ...]]
_TABLE: tuple[tuple[tuple[X, ...], str, str, _Body], ...] = (
    ((X.SA,), "sadb_sa", "sadb_sa_", _sa),
    (
        (
            X.LIFETIME_CURRENT, X.LIFETIME_HARD, X.LIFETIME_SOFT,
            X.LIFETIME_CURRENT_SOFTWARE, X.LIFETIME_CURRENT_HARDWARE,
        ), "sadb_lifetime", "sadb_lifetime_", _lifetime,
    ),
    (
        (
            X.ADDRESS_SRC, X.ADDRESS_DST, X.ADDRESS_PROXY, X.NEW_ADDRESS_SRC, X.NEW_ADDRESS_DST,
            X.NAT_T_OA, X.NAT_T_OAI, X.NAT_T_OAR,
            X.ADDRESS_RANGE_SRC_START, X.ADDRESS_RANGE_SRC_END, X.ADDRESS_RANGE_DST_START, X.ADDRESS_RANGE_DST_END,
            X.MIGRATE_ADDRESS_SRC, X.MIGRATE_ADDRESS_DST,
        ), "sadb_address", "sadb_address_", _address,
    ),
    ((X.KEY_AUTH, X.KEY_ENCRYPT), "sadb_key", "sadb_key_", _key),
    ((X.IDENTITY_SRC, X.IDENTITY_DST), "sadb_ident", "sadb_ident_", _identity),
    ((X.SENSITIVITY,), "sadb_sens", "sadb_sens_", _sensitivity),
    ((X.PROPOSAL,), "sadb_prop", "sadb_prop_", _proposal),
    ((X.SUPPORTED_AUTH, X.SUPPORTED_ENCRYPT), "sadb_supported", "sadb_supported_", _supported),
    ((X.SPIRANGE,), "sadb_spirange", "sadb_spirange_", _spirange),
    ((X.SA2,), "sadb_x_sa2", "sadb_x_sa2_", _sa2),
    ((X.POLICY,), "sadb_x_policy", "sadb_x_policy_", _policy),
    ((X.NAT_T_TYPE,), "sadb_x_nat_t_type", "sadb_x_nat_t_type_", _nat_t_type),
    ((X.NAT_T_SPORT, X.NAT_T_DPORT), "sadb_x_nat_t_port", "sadb_x_nat_t_port_", _nat_t_port),
    ((X.NAT_T_FRAG,), "sadb_x_nat_t_frag", "sadb_x_nat_t_frag_", _nat_t_frag),
    ((X.SA_REPLAY,), "sadb_x_sa_replay", "sadb_x_sa_replay_", _replay),
    ((X.SEC_CTX,), "sadb_x_sec_ctx", "sadb_x_ctx_", _security_context),
    ((X.KMADDRESS,), "sadb_x_kmaddress", "sadb_x_kmaddress_", _kmaddress),
    ((X.FILTER,), "sadb_x_filter", "sadb_x_filter_", _filter),
    ((X.HARDWARE_OFFLOAD,), "sadb_x_if_hw_offl", "sadb_x_if_hw_offl_", _offload),
    ((X.SESSION_ID,), "sadb_session_id", "sadb_session_id_", _session),
    ((X.SASTAT,), "sadb_sastat", "sadb_sastat_", _statistics),
)  # fmt: skip


@cache
def formats(abi: Abi) -> Mapping[int, Format]:
    """Number on the wire -> how it lies there, for all that this system has; others come as bytes."""
    known = abi.extension_numbers
    return {
        known[kind]: Format(struct, record(prefix, *body(prefix, abi)))
        for kinds, struct, prefix, body in _TABLE
        for kind in kinds
        if kind in known
    }
