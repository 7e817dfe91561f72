"""A peer: the same Linux messages declared with `construct`."""

from __future__ import annotations

from construct import (
    Bytes,
    Const,
    ExprAdapter,
    GreedyBytes,
    GreedyRange,
    Int8un,
    Int16ub,
    Int16un,
    Int32ub,
    Int32un,
    Int64un,
    Padding,
    Prefixed,
    Struct,
    Switch,
    this,
)

__all__ = ["MESSAGE"]

_SA = Struct(
    "spi" / Int32ub,
    "replay" / Int8un,
    "state" / Int8un,
    "auth" / Int8un,
    "encrypt" / Int8un,
    "flags" / Int32un,
)
_SA2 = Struct("mode" / Int8un, Padding(3), "sequence" / Int32un, "reqid" / Int32un)
_LIFETIME = Struct("allocations" / Int32un, "bytes" / Int64un, "addtime" / Int64un, "usetime" / Int64un)
_ADDRESS = Struct(
    "protocol" / Int8un,
    "prefixlen" / Int8un,
    "reserved" / Int16un,
    "family" / Int16un,
    "sockaddr"
    / Switch(
        this.family,
        {
            2: Struct("port" / Int16ub, "address" / Bytes(4), Padding(8)),
            10: Struct("port" / Int16ub, "flowinfo" / Int32un, "address" / Bytes(16), "scope_id" / Int32un, Padding(4)),
        },
        default=GreedyBytes,
    ),
)
_KEY = Struct("bits" / Int16un, "reserved" / Int16un, "key" / Bytes(lambda this: (this.bits + 63) // 64 * 8))

_BODIES = {
    1: _SA,
    2: _LIFETIME,
    3: _LIFETIME,
    4: _LIFETIME,
    5: _ADDRESS,
    6: _ADDRESS,
    7: _ADDRESS,
    8: _KEY,
    9: _KEY,
    19: _SA2,
}

# The length in words of 8 bytes counts its own two bytes, which Prefixed has consumed.
_LENGTH = ExprAdapter(Int16un, lambda words, _: words * 8 - 2, lambda length, _: (length + 2) // 8)
_EXTENSION = Prefixed(_LENGTH, Struct("type" / Int16un, "value" / Switch(this.type, _BODIES, default=GreedyBytes)))

MESSAGE = Struct(
    "version" / Const(2, Int8un),
    "type" / Int8un,
    "errno" / Int8un,
    "satype" / Int8un,
    "length" / Int16un,
    "reserved" / Int16un,
    "seq" / Int32un,
    "pid" / Int32un,
    "extensions" / GreedyRange(_EXTENSION),
)
