"""Scenarios about SAs, and about moving them with their policies."""

from __future__ import annotations

from collections.abc import Iterator

from embedded_messages import (
    GATEWAYS,
    HOSTS,
    HOSTS6,
    KEYS,
    WIRE,
    add,
    address,
    between,
    esp_policy,
    extension,
    filtered,
    get,
    getspi,
    key,
    lifetime,
    message,
    migrate,
    natt,
    policy,
    request,
    sa,
    selector,
    spdadd,
)
from embedded_steps import DUMP, FLUSH, SPDDUMP, B, R, Step, from_others, opened, sends, slept

from pfkey.constants import MessageType as M


def _associations() -> Iterator[tuple[str, list[Step]]]:
    yield (
        "SAs",
        [
            *opened(B),
            *sends(
                add(0x1000),
                add(0x1000),
                get(0x1000),
                get(0x1000, hosts=selector("9.9.9.9", "10.0.0.2")),
                get(0x1000, hosts=selector("10.0.0.1", "10.0.0.3")),
                get(0x1001),
                *[get(0x1000, kind, satype) for kind in (M.GET, M.DELETE) for satype in (0, 2, 9, 5, 77)],
                add(0x1000, hosts=selector("10.0.0.7", "10.0.0.2")),
                add(0x1000, hosts=HOSTS6),
                *[add(spi) for spi in (0, 1, 255)],
                DUMP,
                get(0),
                get(0x1000, M.DELETE),
                get(0x1000, M.DELETE),
                DUMP,
                FLUSH,
                FLUSH,
                DUMP,
            ),
        ],
    )
    yield (
        "what ADD needs",
        sends(
            message(M.ADD, HOSTS + KEYS, 3),
            message(M.ADD, sa(5) + KEYS, 3),
            add(5, keys=key(8, 20)),
            add(0x1000, keys=key(9, 16)),
            add(5, of=sa(5, 3, 0), keys=b"", satype=2),
            add(0x1002, of=sa(0x1002, 3, 0), keys=key(8, 20), satype=2),
            add(5, lifetime(3)),
            add(5, lifetime(4)),
            add(0x1003, lifetime(3, 1, 2, 3000, 4000), lifetime(4, 1, 2, 1000, 5)),
            add(5, hosts=address(5, "10.0.0.1") + address(6, "::1")),
            *[add(5, satype=satype) for satype in (0, 1, 5, 9, 11, 77)],
            *[message(kind, body, 3) for kind in (M.GET, M.DELETE) for body in (HOSTS, sa(5))],
            DUMP,
        ),
    )
    null = WIRE.key(9, 0, b"")
    yield (
        "algorithms",
        sends(
            *[
                add(0x2000 + n, of=sa(0x2000 + n, n, 11), keys=key(8, 20) + null)
                for n in (0, 2, 3, 5, 6, 7, 11, 14, 99, 250, 251, 252)
            ],
            *[add(0x2100 + n, of=sa(0x2100 + n, 3, n)) for n in (0, 11, 12, 13, 14, 18, 20, 23, 25, 200, 254)],
            *[add(0x2200 + n, keys=key(8, 20) + key(9, n)) for n in (8, 15, 16, 17, 24, 31, 32, 40)],
            *[add(0x2300 + n, of=sa(0x2300 + n, 3, 13), keys=key(8, 20) + key(9, n)) for n in (16, 20, 28, 32, 36, 40)],
            *[add(0x2400 + n, of=sa(0x2400 + n, 3, 11), keys=key(8, n) + null) for n in (1, 19, 20, 21, 128)],
            add(0x2500, keys=WIRE.key(8, 0, b"") + key(9, 16)),
            add(0x2501, keys=key(8, 20) + null),
            add(0x2502, of=sa(0x2502, 251, 12), keys=WIRE.key(8, 0, b"") + key(9, 16)),
            add(0x2503, of=sa(0x2503, 0, 12)),
            *[add(0x2504 + bits, keys=key(8, 20) + key(9, 16, bits)) for bits in (120, 121, 127, 129)],
        ),
    )
    yield (
        "AH and IPComp",
        sends(
            *[
                add(0x3000 + n, of=sa(0x3000 + n, n, 0), keys=key(8, size), satype=2)
                for n, size in ((3, 20), (5, 32), (2, 16), (251, 1), (0, 20))
            ],
            add(0x3100, satype=2),
            *[add(0x3200 + n, of=sa(0x3200 + n, 0, n), keys=b"", satype=9) for n in range(6)],
            add(0x123456, of=sa(0x123456, 0, 2), keys=b"", satype=9),
            *[message(kind, satype=satype) for satype in (2, 3, 9, 1, 5, 77) for kind in (M.DUMP, M.FLUSH)],
        ),
    )
    yield (
        "fields of SAs",
        sends(
            *[add(0x4000 + mode, WIRE.sa2(mode, 5)) for mode in (0, 1, 2, 3, 4, 255)],
            *[add(0x4100 + replay, of=sa(0x4100 + replay, replay=replay)) for replay in (0, 1, 32, 33, 255)],
            *[add(0x4200 + n, of=sa(0x4200 + n, flags=f)) for n, f in enumerate((1, 1 << 29, 1 << 31, 0xFFFFFFFF))],
            *[add(0x4300 + state, of=sa(0x4300 + state, state=state)) for state in (0, 2, 3, 9)],
            *[add(0x4400 + n, address(7, text, 6)) for n, text in enumerate(("10.9.0.0/16", "10.0.0.1", "0.0.0.0/0"))],
            add(0x4403, address(7, "2001:db8::/32"), hosts=HOSTS6),
            add(0x4404, address(7, "10.9.0.0/16"), hosts=HOSTS6),
            add(0x4405, address(7, "10.9.0.0/16"), WIRE.sa2(2, 5), hosts=HOSTS6),
            add(0x4406, hosts=selector("0.0.0.0", "10.0.0.2")),
            add(0x4407, lifetime(3, 7, 8, 9999, 10000), lifetime(4, 0xFFFFFFFF, 2**64 - 1, 9998, 11)),
            DUMP,
        ),
    )
    yield (
        "NAT traversal",
        sends(
            *[add(0x5000 + kind, natt(kind)) for kind in (0, 1, 2, 3)],
            add(0x5010, WIRE.port(21, 1) + WIRE.port(22, 2)),
            add(0x5011, natt(2), address(23, "1.2.3.4")),
            add(0x5012, natt(2, 0, 0)),
            add(0x5013, natt(2), of=sa(0x5013, 3, 0), keys=key(8, 20), satype=2),
            add(0x5014, natt(2), of=sa(0x5014, 0, 2), keys=b"", satype=9),
            add(0x5015, natt(2), hosts=HOSTS6),
            add(0x5002, natt(2, 1, 2), kind=M.UPDATE),
            get(0x5002),
            add(0x5002, natt(1, 1, 2), kind=M.UPDATE),
            add(0x5002, kind=M.UPDATE),
            add(0x5010, natt(2), kind=M.UPDATE),
            DUMP,
        ),
    )
    ranges = (
        (3, 0x1000, 0x1000), (3, 0x1000, 0x1000), (2, 0x1000, 0x1000), (9, 0x1000, 0x1000), (9, 0x1001, 0x10000),
        (3, 5, 4), (3, 0, 0), (3, 1, 1), (0, 0x2000, 0x2000), (5, 0x2000, 0x2000), (77, 0x2000, 0x2000),
    )  # fmt: skip
    yield (
        "GETSPI",
        sends(
            *[getspi(low, high, WIRE.sa2(2, 7), satype=satype) for satype, low, high in ranges],
            DUMP,
            message(M.GETSPI, HOSTS, 9),
            message(M.GETSPI, address(5, "1.1.1.1") + address(6, "::1"), 3),
            message(M.GETSPI, address(5, "1.1.1.1"), 3),
            getspi(0x3000, 0x3000, hosts=HOSTS6),
            getspi(0x3001, 0x3001, WIRE.sa2(4, 7)),
            getspi(0x3002, 0x3002, WIRE.sa2(0, 7)),
            add(0x1000),
            add(0x1000, kind=M.UPDATE),
            get(0x1000),
            DUMP,
            get(0x1000, satype=2),
            get(0x3002, M.DELETE),
            add(0x7777, kind=M.UPDATE),
            FLUSH,
            getspi(5, 4, WIRE.sa2(2, 9)),
            getspi(0x1234, 0x1234, WIRE.sa2(2, 9)),
            getspi(5, 4, WIRE.sa2(2, 9)),
            add(0x4321, WIRE.sa2(2, 9)),
            DUMP,
        ),
    )
    yield (
        "updates of SAs",
        sends(
            add(0x6000, lifetime(3, 0, 0, 100, 0), lifetime(4, 0, 0, 50, 0), WIRE.sa2(2, 5)),
            add(0x6000, lifetime(3, 0, 0, 200, 0), lifetime(4, 0, 0, 150, 0), WIRE.sa2(1, 6), kind=M.UPDATE),
            get(0x6000),
            add(0x6000, of=sa(0x6000, 5, 12, replay=32), keys=key(8, 32) + key(9, 32), kind=M.UPDATE),
            get(0x6000),
            add(0x6001, kind=M.UPDATE),
        ),
    )
    yield (
        "expiry of SAs",
        [
            *opened(R),
            *sends(
                add(0x7000, lifetime(3, 0, 0, 3, 0), lifetime(4, 0, 0, 1, 0), WIRE.sa2(2, 5)),
                add(0x7001, lifetime(3, 0, 0, 2, 0), lifetime(4)),
                add(0x7003, lifetime(3, 0, 0, 2**63 - 1, 0), lifetime(4, 0, 0, 2, 0), natt(2), hosts=HOSTS6),
            ),
            *slept(1.5),
            *sends(DUMP),
            *slept(1.1),
            *sends(DUMP),
            *slept(1.1),
            *sends(DUMP),
        ],
    )
    ten7, ten2 = bytes((10, 7, 0, 0)), bytes((10, 0, 0, 2))
    yield (
        "filters",
        sends(
            add(0x8000),
            add(0x8001, hosts=HOSTS6),
            add(0x8002, hosts=selector("10.7.0.1", "10.8.0.2", 0)),
            *[filtered(b"", b"", family, 0, 0) for family in (0, 2, 10, 7)],
            *[filtered(ten7, b"", family, 16, 0) for family in (0, 2)],
            *[filtered(b"", ten2, 2, 0, prefix) for prefix in (32, 64, 128, 129)],
            filtered(bytes((10, 99)), b"", 2, 16, 0),
        ),
    )
    yield "ACQUIRE by a user", sends(message(M.ACQUIRE, satype=3, errno=5), message(M.ACQUIRE, HOSTS, 3, 5))
    yield (
        "who hears of SAs",
        [
            *opened(B, R),
            *sends(add(0x9000), getspi(0x9001, 0x9001)),
            *from_others(B, add(0x9001, kind=M.UPDATE), get(0x9000), DUMP),
            *sends(get(0x9000, M.DELETE)),
            *from_others(B, message(M.FLUSH, satype=2), message(M.FLUSH, satype=3)),
        ],
    )


def _migrations() -> Iterator[tuple[str, list[Step]]]:
    there, six = between("192.0.2.9", "198.51.100.9"), between("2001:db8::1", "2001:db8::2")
    km = extension(25, bytes(4) + GATEWAYS)
    plain = (50, 2, 7, GATEWAYS, there)
    tcp = selector(protocol=6, ports=(80, 0))
    yield (
        "MIGRATE",
        [
            *opened(B),
            *sends(
                message(M.MIGRATE, policy(2) + selector()),
                migrate(plain),
                spdadd(priority=3),
                add(0xA000, WIRE.sa2(2, 7), hosts=selector("192.0.2.1", "198.51.100.1", 0)),
                *[migrate(plain, direction=direction) for direction in (0, 1, 3, 4)],
                migrate(plain, more=selector("10.9.0.0/16")),
                migrate(*[(50, 2, 100 + n, GATEWAYS, there) for n in range(7)]),
                *[migrate((protocol, mode, 7, GATEWAYS, there)) for protocol, mode in ((51, 2), (50, 1), (50, 9))],
                migrate((50, 2, 8, GATEWAYS, there)),
                migrate((50, 2, 7, there, GATEWAYS)),
                *[migrate((50, 2, 7, GATEWAYS, new)) for new in (bytes(32), b"", between("0.0.0.0", "1.1.1.1"))],
                migrate(plain, more=selector() + km),
                SPDDUMP,
                DUMP,
                migrate((50, 2, 0, there, GATEWAYS)),
                SPDDUMP,
                migrate((50, 2, 7, GATEWAYS, six)),
                SPDDUMP,
                DUMP,
                migrate((50, 2, 7, six + bytes(8), GATEWAYS)),
                migrate((306, 2, 7, GATEWAYS, there)),
                message(M.SPDUPDATE, policy(1) + selector()),
                migrate(plain),
                esp_policy(request(50, 1, 3, 7) + request(51, 1, 2, 0), tcp),
                migrate((50, 1, 7, GATEWAYS, there), more=tcp),
                SPDDUMP,
            ),
        ],
    )


def scenarios() -> Iterator[tuple[str, list[Step]]]:
    """All of them."""
    yield from _associations()
    yield from _migrations()
