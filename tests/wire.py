"""Every wire case once: the bytes, and the message that a person would build for them.

The encoder, the decoder and the damage tests use the same table; so do the bytes recorded from real kernels.
"""

from __future__ import annotations

import json
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from wire_case import FREEBSD, LINUX, ME, PEER, case
from wire_rare import RARE_CASES

from pfkey import (
    Abi,
    Action,
    Direction,
    ExtensionType,
    Level,
    Lifetime,
    MessageType,
    Mode,
    SAProtocol,
    Template,
)
from pfkey.constants import SAFlag, SAState, SAType
from pfkey.messages import SA, SA2, Address, Algorithm, Key, PolicyExtension, SPIRange

X = ExtensionType
SOURCE, DESTINATION = Address(ip_address("10.1.0.0"), 16, 255), Address(ip_address("10.2.0.0"), 16, 255)
SITE: dict[ExtensionType | int, object] = {X.ADDRESS_SRC: SOURCE, X.ADDRESS_DST: DESTINATION}
SITE_HEX = """03000500ff100000 020000000a010000 0000000000000000 03000600ff100000 020000000a020000 0000000000000000"""
SITE_HEX_BSD = (
    """03000500ff100000 100200000a010000 0000000000000000 03000600ff100000 100200000a020000 0000000000000000"""
)
IPSEC, OUT, IN = Action.IPSEC, Direction.OUT, Direction.IN
TUNNEL = Template.tunnel(ME, PEER, reqid=1)
TUNNEL6 = Template.tunnel("2001:db8::1", "2001:db8::2", reqid=1)
PRIORITY = 383615

CASES = (
    case("bare header", LINUX, "0212000002000000 0700000009000000", MessageType.SPDDUMP, {}, seq=7, pid=9),
    case(
        "linux spdadd tunnel v4",
        LINUX,
        f"""020e000010000000 0000000000000000 0800120002000200 000000007fda0500 3000320002030000 0100000000000000
        02000000c0000201 0000000000000000 02000000c6336401 0000000000000000 {SITE_HEX}""",
        MessageType.SPDADD,
        {X.POLICY: PolicyExtension(IPSEC, OUT, 0, PRIORITY, (TUNNEL,)), **SITE},
    ),
    case(
        "linux spdupdate to discard",
        LINUX,
        f"020d00000a000000 0000000000000000 0200120000000200 000000007fda0500 {SITE_HEX}",
        MessageType.SPDUPDATE,
        {X.POLICY: PolicyExtension(Action.DISCARD, OUT, 0, PRIORITY), **SITE},
    ),
    case(
        "linux spddelete",
        LINUX,
        f"020f00000a000000 0000000000000000 0200120002000200 0000000000000000 {SITE_HEX}",
        MessageType.SPDDELETE,
        {X.POLICY: PolicyExtension(IPSEC, OUT), **SITE},
    ),
    case(
        "linux transport",
        LINUX,
        f"""020e00000c000000 0000000000000000 0400120002000200 000000007fda0500 1000320001030000 0100000000000000
        {SITE_HEX}""",
        MessageType.SPDADD,
        {X.POLICY: PolicyExtension(IPSEC, OUT, 0, PRIORITY, (Template.transport(reqid=1),)), **SITE},
    ),
    case(
        "linux ipcomp and esp",
        LINUX,
        f"""020e000012000000 0000000000000000 0a00120002000100 000000007fda0500 30006c0002010000 0100000000000000
        02000000c6336401 0000000000000000 02000000c0000201 0000000000000000 1000320001030000 0100000000000000
        {SITE_HEX}""",
        MessageType.SPDADD,
        {
            X.POLICY: PolicyExtension(
                IPSEC,
                IN,
                0,
                PRIORITY,
                (
                    Template.tunnel(PEER, ME, reqid=1, protocol=SAProtocol.IPCOMP, level=Level.USE),
                    Template.transport(reqid=1),
                ),
            ),
            **SITE,
        },
    ),
    case(
        "linux tunnel v6 alone",
        LINUX,
        """020e00000d000000 0000000000000000 0b00120002000200 000000007f5a0500 4800320002030000 0100000000000000
        0a00000000000000 20010db800000000 0000000000000001 000000000a000000 0000000020010db8 0000000000000000
        0000000200000000""",
        MessageType.SPDADD,
        {X.POLICY: PolicyExtension(IPSEC, OUT, 0, 350847, (TUNNEL6,))},
    ),
    case(
        "linux spdget by id",
        LINUX,
        "0210000004000000 0000000000000000 0200120002000200 0400000000000000",
        MessageType.SPDGET,
        {X.POLICY: PolicyExtension(IPSEC, OUT, 4)},
    ),
    case(
        "linux getspi",
        LINUX,
        """020100030a000000 0000000000000000 0300050000000000 02000000c6336401 0000000000000000 0300060000000000
        02000000c0000201 0000000000000000 02001000000000c0 ffffffcf00000000""",
        MessageType.GETSPI,
        {
            X.ADDRESS_SRC: Address(PEER, 0),
            X.ADDRESS_DST: Address(ME, 0),
            X.SPIRANGE: SPIRange(0xC0000000, 0xCFFFFFFF),
        },
        satype=SAType.ESP,
    ),
    case(
        "linux add with nat-t and lifetimes",
        LINUX,
        f"""020300031f000000 0000000000000000 02000100c0000001 0001050c00000000 0200130002000000 0000000007000000
        0300050000000000 02000000c0000201 0000000000000000 0300060000000000 02000000c6336401 0000000000000000
        04000400a00f0000 a0bb0d0000000000 b80b000000000000 0000000000000000 0400030088130000 40420f0000000000
        100e000000000000 0000000000000000 0300090080000000 {bytes(range(16)).hex()} 0500080000010000
        {bytes(range(32)).hex()} 0100140002000000 0100150011940000 0100160011950000""",
        MessageType.ADD,
        {
            X.SA: SA(0xC0000001, 0, SAState.MATURE, 5, 12),
            X.SA2: SA2(Mode.TUNNEL, 0, 7),
            X.ADDRESS_SRC: Address(ME, 0),
            X.ADDRESS_DST: Address(PEER, 0),
            X.LIFETIME_SOFT: Lifetime(4000, 900000, 3000),
            X.LIFETIME_HARD: Lifetime(5000, 1000000, 3600),
            X.KEY_ENCRYPT: Key(bytes(range(16))),
            X.KEY_AUTH: Key(bytes(range(32))),
            X.NAT_T_TYPE: 2,
            X.NAT_T_SPORT: 4500,
            X.NAT_T_DPORT: 4501,
        },
        satype=SAType.ESP,
    ),
    case(
        "freebsd spdadd tunnel v4",
        FREEBSD,
        f"""020e00000f000000 0000000000000000 0700120002000200 000000007fda0500 2800320002030100 10020000c0000201
        0000000000000000 10020000c6336401 0000000000000000 {SITE_HEX_BSD}""",
        MessageType.SPDADD,
        {X.POLICY: PolicyExtension(IPSEC, OUT, 0, PRIORITY, (TUNNEL,)), **SITE},
    ),
    case(
        "freebsd tunnel v6 alone",
        FREEBSD,
        """020e00000c000000 0000000000000000 0a00120002000200 000000007f5a0500 4000320002030100 1c1c000000000000
        20010db800000000 0000000000000001 000000001c1c0000 0000000020010db8 0000000000000000 0000000200000000""",
        MessageType.SPDADD,
        {X.POLICY: PolicyExtension(IPSEC, OUT, 0, 350847, (TUNNEL6,))},
    ),
    case(
        "freebsd replay, new addresses, esn",
        FREEBSD,
        """020200030b000000 0000000000000000 02000100c0000004 ff01030c00040000 01001a0000100000 03001b00ff200000
        10020000c0000209 0000000000000000 03001c00ff200000 10020000c6336409 0000000000000000""",
        MessageType.UPDATE,
        {
            X.SA: SA(0xC0000004, 255, SAState.MATURE, 3, 12, SAFlag.ESN),
            X.SA_REPLAY: 4096,
            X.NEW_ADDRESS_SRC: Address(ip_address("192.0.2.9"), 32, 255),
            X.NEW_ADDRESS_DST: Address(ip_address("198.51.100.9"), 32, 255),
        },
        satype=SAType.ESP,
    ),
    case(
        "link-local with a scope",
        FREEBSD,
        """0205000307000000 0000000000000000 05000500ff800000 1c1c123400000007 fe80000000000000 0000000000000001
        0300000000000000""",
        MessageType.GET,
        {X.ADDRESS_SRC: Address(ip_address("fe80::1"), 128, 255, 0x1234, 3, 7)},
        satype=SAType.ESP,
    ),
    case(
        "supported algorithms, proxy",
        LINUX,
        "0207000309000000 0000000000000000 03000700ff000000 0200000000000000 0000000000000000 03000e0000000000"
        "0300 0000 a000 0000"
        "fb00000000000000"
        "01000f0000000000",
        MessageType.REGISTER,
        {
            X.ADDRESS_PROXY: Address(ip_address("0.0.0.0"), 0, 255),
            X.SUPPORTED_AUTH: (Algorithm(3, 0, 0, 160), Algorithm(251, 0, 0, 0)),
            X.SUPPORTED_ENCRYPT: (),
        },
        satype=SAType.ESP,
    ),
    case(
        "extensions that nobody knows, in any order",
        LINUX,
        "0203000307000000 0000000000000000 02003c00 0102030405060708090a0b0c 0200130001000000 0000000000000000"
        "0100ff7f deadbeef",
        MessageType.ADD,
        {60: bytes(range(1, 13)), X.SA2: SA2(Mode.TRANSPORT), 0x7FFF: bytes.fromhex("deadbeef")},
        satype=SAType.ESP,
    ),
    case("types that nobody knows", FREEBSD, "02c8004d02000000 0100000002000000", 200, {}, satype=77, seq=1, pid=2),
    *RARE_CASES,
)


class Recorded(NamedTuple):
    """A message of a real kernel, or one that was sent to it."""

    name: str
    abi: Abi
    data: bytes


def _recorded() -> list[Recorded]:
    found = []
    for file, abi in (("linux-6.1", LINUX), ("freebsd-12.1", FREEBSD)):
        text = (Path(__file__).parent / "data" / f"{file}.json").read_text(encoding="utf-8")
        for exchange in json.loads(text)["exchanges"]:
            lines = [("sent", exchange.get("sent"))] + [(f"recv{n}", line) for n, line in enumerate(exchange["recv"])]
            found += [
                Recorded(f"{file}:{exchange['name']}:{which}", abi, bytes.fromhex(line))
                for which, line in lines
                if line
            ]
    return found


# An entry of a dump of Linux 6.1 whose header says 296 bytes: a policy of IPv6, a tunnel over IPv4, then transport.
OVERSTATED = Recorded(
    "linux-6.1:spddump-mixed-bundle:recv0",
    LINUX,
    bytes.fromhex(
        """
        0212000025000200 00000000f8020000
        05000500ff300000 0a00000000000000 20010db800010000 0000000000000000 0000000000000000
        05000600ff300000 0a00000000000000 20010db800020000 0000000000000000 0000000000000000
        0400030000000000 0000000000000000 0000000000000000 0000000000000000
        0400040000000000 0000000000000000 0000000000000000 0000000000000000
        0400020000000000 0000000000000000 2324066b00000000 0000000000000000
        0a00120002000200 0100000000000000 3000320002030000 6400000000000000
        02000000c0000201 0000000000000000 02000000c6336401 0000000000000000
        1000320001030000 0300000000000000
        """
    ),
)
RECORDED = _recorded()
EVERYTHING = [*(Recorded(str(one), one.abi, one.data) for one in CASES), *RECORDED, OVERSTATED]


# The same message as a big-endian machine would say it: every field turned by a table of its own, not by the codec.

_HEADER = ((4, 2), (6, 2), (8, 4), (12, 4))
_FIELDS: dict[ExtensionType, tuple[tuple[int, int], ...]] = {
    X.SA: ((12, 4),),
    X.LIFETIME_CURRENT: ((4, 4), (8, 8), (16, 8), (24, 8)),
    X.KEY_AUTH: ((4, 2), (6, 2)),
    X.SA2: ((6, 2), (8, 4), (12, 4)),
    X.SPIRANGE: ((4, 4), (8, 4), (12, 4)),
    X.SUPPORTED_AUTH: ((4, 4),),
    X.NAT_T_TYPE: (),
    X.NAT_T_SPORT: ((6, 2),),
    X.POLICY: ((4, 2), (8, 4), (12, 4)),
    X.SA_REPLAY: ((4, 4),),
    X.ADDRESS_SRC: ((6, 2),),
    X.IDENTITY_SRC: ((4, 2), (6, 2), (8, 8)),
    X.SENSITIVITY: ((4, 4), (12, 4)),
    X.PROPOSAL: (),
    X.NAT_T_FRAG: ((4, 2), (6, 2)),
    X.SEC_CTX: ((6, 2),),
    X.KMADDRESS: ((4, 4),),
    X.FILTER: ((36, 2),),
    X.HARDWARE_OFFLOAD: ((4, 4),),
    X.SESSION_ID: ((8, 8), (16, 8)),
    X.SASTAT: ((4, 4), (8, 4), (12, 4)),
}
# What repeats behind the head of an extension: where it begins, how long one is, its fields.
_ROWS: dict[ExtensionType, tuple[int, int, tuple[tuple[int, int], ...]]] = {
    X.SUPPORTED_AUTH: (8, 8, ((2, 2), (4, 2), (6, 2))),
    X.SENSITIVITY: (16, 8, ((0, 8),)),
    X.PROPOSAL: (8, 72, (*((at, 2) for at in range(2, 12, 2)), *((at, 4) for at in (12, 16, 20)),
                         *((at, 8) for at in range(24, 72, 8)))),
    X.SASTAT: (16, 40, ((4, 4), (8, 2), (10, 2), (12, 4), (16, 8), (24, 8), (32, 8))),
}  # fmt: skip
_LIKE = {
    X.LIFETIME_HARD: X.LIFETIME_CURRENT,
    X.LIFETIME_SOFT: X.LIFETIME_CURRENT,
    X.KEY_ENCRYPT: X.KEY_AUTH,
    X.SUPPORTED_ENCRYPT: X.SUPPORTED_AUTH,
    X.NAT_T_DPORT: X.NAT_T_SPORT,
    X.ADDRESS_DST: X.ADDRESS_SRC,
    X.ADDRESS_PROXY: X.ADDRESS_SRC,
    X.NEW_ADDRESS_SRC: X.ADDRESS_SRC,
    X.NEW_ADDRESS_DST: X.ADDRESS_SRC,
    X.IDENTITY_DST: X.IDENTITY_SRC,
    X.LIFETIME_CURRENT_SOFTWARE: X.LIFETIME_CURRENT,
    X.LIFETIME_CURRENT_HARDWARE: X.LIFETIME_CURRENT,
    **{kind: X.ADDRESS_SRC for kind in X if kind.name.startswith(("NAT_T_OA", "ADDRESS_RANGE", "MIGRATE_ADDRESS"))},
}


def mirrored(data: bytes, abi: Abi) -> bytes:
    """`data`, little-endian, as the big-endian machine of the same system would have it."""
    out = bytearray(data)

    def turn(base: int, fields: tuple[tuple[int, int], ...]) -> None:
        for offset, width in fields:
            start = base + offset
            out[start : start + width] = out[start : start + width][::-1]

    def turn_sockaddr(base: int) -> int:
        six = data[base + (1 if abi.sockaddr_has_length else 0)] == abi.af_inet6
        turn(base, (() if abi.sockaddr_has_length else ((0, 2),)) + (((24, 4),) if six else ()))
        return 28 if six else 16

    turn(0, _HEADER)
    at = 16
    while at < len(data):
        size = 8 * int.from_bytes(data[at : at + 2], "little")
        kind = abi.extensions.get(int.from_bytes(data[at + 2 : at + 4], "little"))
        turn(at, ((0, 2), (2, 2)))
        if kind is not None:
            kind = _LIKE.get(kind, kind)
            turn(at, _FIELDS.get(kind, ()))
        if kind is X.ADDRESS_SRC:
            turn_sockaddr(at + 8)
        elif kind is X.KMADDRESS:
            turn_sockaddr(at + 8 + turn_sockaddr(at + 8))
        elif kind in _ROWS:
            first, length, fields = _ROWS[kind]
            for row in range(at + first, at + size, length):
                turn(row, fields)
        elif kind is X.POLICY:
            start = at + 16
            while start < at + size:
                length = int.from_bytes(data[start : start + 2], "little")
                turn(start, ((0, 2), (2, 2), (6, 2)) + (((8, 4), (12, 4)) if abi.request_size == 16 else ()))
                if length > abi.request_size:
                    first = turn_sockaddr(start + abi.request_size)
                    turn_sockaddr(start + abi.request_size + first)
                start += length
        at += size
    return bytes(out)
