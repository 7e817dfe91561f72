"""Scenarios about headers, extensions, policies and who hears of them."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from embedded_messages import (
    GATEWAYS,
    WIRE,
    address,
    between,
    discard,
    esp_policy,
    extension,
    lifetime,
    message,
    policy,
    request,
    selector,
    sockaddr,
    spdadd,
)
from embedded_steps import DUMP, SPDDUMP, SPDFLUSH, B, R, Step, from_others, opened, sends, slept

from pfkey.constants import MessageType as M


def _transport() -> Iterator[tuple[str, list[Step]]]:
    plain = policy() + selector()
    yield "short messages", sends(b"", b"\2", SPDDUMP[:12], SPDDUMP[:15])
    yield (
        "header faults",
        sends(
            *[message(M.SPDDUMP, version=version) for version in (0, 1, 3)],
            message(M.SPDDUMP, reserved=1),
            *[message(kind) for kind in (0, 25, 255)],
        ),
    )
    yield (
        "length faults",
        sends(
            *[message(M.SPDDUMP, words=words) for words in (0, 1, 3, 65535)],
            *[message(M.SPDADD, plain + bytes(size)) for size in range(1, 8)],
            *[message(M.SPDADD, plain + b"\xff" * size) for size in range(1, 8)],
            *[message(M.SPDDUMP, bytes(size)) for size in range(1, 9)],
            SPDDUMP + SPDDUMP,
        ),
    )
    kinds = (M.SPDDUMP, M.FLUSH, M.SPDFLUSH, M.DUMP, M.PROMISC)
    yield "errno in a request", sends(discard(), *[message(kind, errno=3) for kind in kinds])
    kinds = (M.EXPIRE, M.PCHANGE, M.SPDACQUIRE, M.SPDEXPIRE, M.NAT_T_NEW_MAPPING)
    yield "types the kernel sends", sends(*[message(kind, satype=satype) for kind in kinds for satype in (0, 3)])
    yield (
        "extensions",
        sends(
            message(M.SPDADD, plain + extension(0, bytes(4))),
            message(M.SPDADD, plain + extension(27, bytes(4)) * 2 + extension(60, bytes(12))),
            message(M.SPDADD, policy() + plain),
            *[message(M.SPDADD, plain + extension(40, bytes(4), words)) for words in (0, 2, 60000)],
            *[message(M.SPDADD, policy() + selector("10.9.0.0/16") + extension(n, bytes(4))) for n in range(1, 27)],
            *[
                message(M.SPDADD, policy() + selector(f"10.10.{n}.0/24") + extension(n, bytes(44)))
                for n in range(1, 27)
            ],
            SPDDUMP,
        ),
    )
    any6, any4 = address(6, "2001:db8::/0"), address(6, "10.2.0.0/0")
    yield (
        "address extensions",
        sends(
            *[message(M.SPDADD, policy() + address(5, "10.1.0.0", prefixlen=n) + any4) for n in (32, 33, 255)],
            *[message(M.SPDADD, policy() + address(5, "2001:db8::", prefixlen=n) + any6) for n in (128, 129)],
            message(M.SPDADD, policy() + address(5, "10.1.0.0/0") + any6),
            message(M.SPDADD, policy() + WIRE.address(5, struct.pack("<H", 5) + bytes(14), 255, 32) + any4),
            message(M.SPDADD, policy() + WIRE.address(5, b"\x10\x02" + bytes(14), 255, 32) + any4),
            message(M.SPDADD, policy() + WIRE.address(5, sockaddr("10.1.1.1") + bytes(8), 255, 32) + any4),
            message(M.SPDADD, policy() + WIRE.address(5, sockaddr("::1")[:24], 255, 32) + any6),
            SPDDUMP,
        ),
    )
    yield (
        "missing parts",
        sends(
            *[message(M.SPDADD, body) for body in (b"", selector(), policy(), address(5, "10.0.0.0/8"))],
            *[message(kind) for kind in (M.SPDUPDATE, M.SPDSETIDX, M.SPDDELETE, M.SPDGET, M.SPDDELETE2, M.MIGRATE)],
            *[message(M.SPDDELETE, body) for body in (selector(), policy())],
        ),
    )


def _requests() -> Iterator[tuple[str, list[Step]]]:
    wrong = ((0, 0), (0, 4), (0, 255), (3, 2), (4, 2), (9, 2), (65535, 1))
    kinds = (M.SPDADD, M.SPDUPDATE, M.SPDSETIDX, M.SPDDELETE)
    yield (
        "types and directions",
        sends(*[message(kind, policy(*both) + selector()) for kind in kinds for both in wrong], SPDDUMP),
    )
    yield (
        "modes and levels",
        sends(
            *[
                esp_policy(request(50, mode, level, 9), direction=direction)
                for mode in (0, 1, 2, 3, 4)
                for level in (0, 1, 2, 3, 4)
                for direction in (1, 2, 3)
            ]
        ),
    )
    protocols = (0, 1, 6, 43, 44, 50, 51, 60, 94, 108, 135, 255, 306, 307, 364, 562, 65535)
    yield "protocols", sends(*[esp_policy(request(protocol, 1, 2, 0)) for protocol in protocols])
    reqids = (0, 1, 16383, 16384, 65535, 65536, 4294967295)
    yield (
        "reqids",
        sends(
            *[esp_policy(request(50, 2, level, reqid)) for level in range(4) for reqid in reqids],
            *[esp_policy(request(50, 2, 3, 0) * number, direction=1) for number in (1, 2, 6, 7)],
            message(M.SPDADD, policy(2, requests=request(50, 1, 3, 0)) + selector()),
            message(M.SPDADD, policy(2, requests=request(50, 1, 3, 0)) + selector("10.7.0.0/16")),
        ),
    )
    v4, v6 = sockaddr("1.2.3.4"), sockaddr("::1")
    ends = (
        b"", v4, v4 + bytes(16), v4 * 2 + bytes(8), v4 * 3, v6 * 2, v6 * 2 + bytes(8), v6 + v4 + bytes(4),
        v4 + v6 + bytes(4), bytes(32), struct.pack("<H", 7) + bytes(30), b"\x10\x02" + bytes(30),
        v6 + bytes(4) + v6 + bytes(4), sockaddr("1.2.3.4", 500) + sockaddr("4.3.2.1", 4500),
        sockaddr("fe80::1", 0, 3) + sockaddr("fe80::2", 0, 4),
    )  # fmt: skip
    yield (
        "addresses of requests",
        sends(
            *[esp_policy(request(ends=both)) for both in ends],
            *[esp_policy(request(50, mode, 2, 0, GATEWAYS)) for mode in (1, 3)],
            SPDDUMP,
        ),
    )
    small = request(50, 1, 2, 0)
    yield (
        "sizes of requests",
        sends(
            *[
                esp_policy(request(50, 1, 2, 0, size=size) + bytes(more))
                for size in (0, 8, 15, 16, 24, 32, 48, 49)
                for more in (0, 8, 16, 24, 32)
            ],
            *[esp_policy(small * number) for number in (0, 1, 6, 7)],
            esp_policy(bytes(16)),
            SPDDUMP,
        ),
    )
    six, four, plain = request(ends=between("2001:db8::1", "2001:db8::2")), request(), request(51, 1, 2, 0)
    yield (
        "lengths that come out wrong",
        sends(
            *[
                message(M.SPDADD, policy(2, requests=requests) + pair)
                for requests, pair in (
                    (six + plain, selector()),
                    (four + plain, selector("2001:db8:1::/48", "2001:db8:2::/48")),
                    (request(108, 1, 2, 0) + six + plain * 2, selector("10.3.0.0/16")),
                    (six + four + plain, selector("10.4.0.0/16")),
                )
            ],
            SPDDUMP,
        ),
    )
    yield (
        "actions",
        sends(
            *[
                message(M.SPDUPDATE, policy(action, direction, 5, 77, requests) + selector())
                for action in (0, 1, 2)
                for direction in (1, 2, 3)
                for requests in (b"", request())
            ],
            SPDDUMP,
        ),
    )


def _databases() -> Iterator[tuple[str, list[Step]]]:
    mixed = address(5, "10.1.0.0/16", 6) + address(6, "10.2.0.0/16", 17)
    scoped = address(5, "fe80::1/64", scope=2) + address(6, "fe80::2/64", scope=3)
    pairs = (
        selector(), selector("10.1.0.1/16"), selector("1.2.3.4/0", "0.0.0.0/0"), selector("0.0.0.0/0", "0.0.0.0/0"),
        selector("10.1.0.0/17"), selector(protocol=0), selector(protocol=6), mixed, selector(protocol=17),
        selector(protocol=6, ports=(80, 0)), selector(ports=(80, 0)), selector(ports=(0, 80)),
        selector(protocol=1, ports=(8, 0)), selector(protocol=1, ports=(8, 1)), selector("fe80::1/64", "fe80::2/64"),
        scoped,
    )  # fmt: skip
    gone = (selector(), selector(), mixed, selector(ports=(80, 0)), selector("1.2.3.4/0", "0.0.0.0/0"), scoped)
    yield (
        "identity",
        sends(
            *[message(M.SPDADD, policy() + pair) for pair in pairs],
            *[message(M.SPDADD, policy(0, direction) + selector()) for direction in (1, 3)],
            SPDDUMP,
            *[message(M.SPDDELETE, policy(2, 2, 99, 5) + pair) for pair in gone],
            SPDDUMP,
        ),
    )
    yield (
        "ids",
        sends(
            *[discard(source=f"10.{n}.0.0/16", direction=d, id=4321) for n, d in enumerate((1, 1, 2, 3, 2, 1))],
            SPDDUMP,
            *[message(M.SPDGET, policy(id=id)) for id in (0, 1, 2, 3, 4, 7, 8, 1000, 4294967288)],
            SPDFLUSH,
            SPDFLUSH,
        ),
    )
    yield (
        "updates",
        sends(
            spdadd(priority=10),
            discard(source="10.5.0.0/16", priority=20),
            discard(source="10.6.0.0/16", priority=20),
            SPDDUMP,
            message(M.SPDUPDATE, policy(1, priority=20) + selector("10.5.0.0/16")),
            SPDDUMP,
            message(M.SPDUPDATE, policy(2, priority=5, requests=request(51, 1, 0, 0)) + selector()),
            discard(M.SPDUPDATE, "10.77.0.0/16", priority=1),
            SPDDUMP,
            discard(),
            discard(M.SPDSETIDX),
            discard(M.SPDSETIDX, "10.78.0.0/16"),
            message(M.SPDUPDATE, policy(9) + selector()),
            esp_policy(request(99)),
            SPDDUMP,
        ),
    )
    kept = (lifetime(3, 1, 2, 300, 400), lifetime(4, 1, 2, 300, 400), lifetime(3, 2**32 - 1, 2**64 - 1, 2**63 - 1, 0))
    yield (
        "lifetimes of policies",
        [
            *sends(*[discard(source=f"10.{n}.0.0/16", more=limit) for n, limit in enumerate(kept)]),
            *sends(SPDDUMP, discard(M.SPDUPDATE, "10.0.0.0/16"), SPDDUMP),
            *slept(2.2),
            *sends(SPDDUMP),
        ],
    )
    limits = (
        lifetime(3, 0, 0, 2, 0), lifetime(3, 0, 0, 0, 2), lifetime(4, 0, 0, 2, 0), lifetime(3, 0, 0, 2**63 - 1, 0),
        lifetime(3, 0, 0, 2**64 - 1, 0), lifetime(3, 0, 0, 2**63 + 5, 0),
    )  # fmt: skip
    yield (
        "expiry of policies",
        [
            *opened(R),
            *sends(*[discard(source=f"10.{n}.0.0/16", more=limit) for n, limit in enumerate(limits)], SPDDUMP),
            *slept(1.3),
            *sends(SPDDUMP),
            *slept(1.5),
            *sends(SPDDUMP),
        ],
    )
    yield (
        "who receives what",
        [
            *opened(B, R),
            *from_others(B, message(M.REGISTER)),
            *sends(spdadd()),
            *from_others(B, discard(M.SPDUPDATE)),
            *sends(SPDDUMP, spdadd()),
            *from_others(B, spdadd(), message(M.SPDGET, policy(id=2)), SPDFLUSH, SPDFLUSH, DUMP),
            *from_others(R, message(M.REGISTER, satype=3), message(M.REGISTER, satype=10)),
            *from_others(R, message(M.REGISTER, satype=9)),
            *from_others(B, message(M.REGISTER, satype=2)),
            ("close", B, b""),
            *sends(spdadd(), SPDFLUSH),
        ],
    )
    yield (
        "promiscuous",
        [
            *opened(B),
            *from_others(B, message(M.PROMISC, satype=1)),
            *sends(spdadd(), spdadd(), message(M.SPDGET, policy(id=2)), SPDDUMP),
            *from_others(B, SPDDUMP, SPDFLUSH),
            *sends(message(M.PROMISC, satype=2), message(M.PROMISC, b"\1" * 16, 2), message(M.PROMISC, b"\1" * 8)),
            *sends(message(M.PROMISC, extension(60, b"abcd"), errno=5)),
            *from_others(B, message(M.PROMISC)),
            *sends(SPDDUMP, message(M.PROMISC, errno=9)),
        ],
    )
    yield (
        "SA types on policies",
        sends(
            *[message(M.SPDADD, policy() + selector(f"10.{n}.0.0/16"), n) for n in (1, 3, 77)],
            *[message(kind, satype=6) for kind in (M.SPDDUMP, M.SPDFLUSH, M.SPDFLUSH)],
        ),
    )


def scenarios() -> Iterator[tuple[str, list[Step]]]:
    """All of them."""
    yield from _transport()
    yield from _requests()
    yield from _databases()
