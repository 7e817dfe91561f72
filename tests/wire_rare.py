"""The wire cases of the rarer extensions: labels, identities, proposals, and what one system has alone."""

from __future__ import annotations

from ipaddress import ip_address

from wire_case import FREEBSD, LINUX, ME, PEER, Case, case

from pfkey import Abi, ExtensionType, Lifetime, MessageType
from pfkey.constants import IdentityType, Mode, SAFlag, SAState, SAType
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
from pfkey.messages import SA, SA2, Address

X = ExtensionType
FREEBSD_9, FREEBSD_15 = Abi.freebsd(9, "little"), Abi.freebsd(15, "little")
NETBSD, MACOS = Abi.netbsd("little"), Abi.macos("little")
SIX, OTHER_SIX = ip_address("2001:db8::1"), ip_address("2001:db8::2")

RARE_CASES: tuple[Case, ...] = (
    case(
        "identities and a label",
        LINUX,
        """020300030d000000 0000000000000000 04000a0002000000 0000000000000000 676174652e657861 6d706c6500000000
        02000b0003000000 e903000000000000 05000c0001000000 0201030200000000 ff00000000000000 0100000000000000
        0000000000000080""",
        MessageType.ADD,
        {
            X.IDENTITY_SRC: Identity(IdentityType.FQDN, b"gate.example"),
            X.IDENTITY_DST: Identity(IdentityType.USER_FQDN, b"", 1001),
            X.SENSITIVITY: Sensitivity(1, 2, 3, (255,), (1, 1 << 63)),
        },
        satype=SAType.ESP,
    ),
    case(
        "an identity type that nobody knows",
        FREEBSD,
        "0203000305000000 0000000000000000 03000a0009000000 0000000000000000 6100000000000000",
        MessageType.ADD,
        {X.IDENTITY_SRC: Identity(9, b"a")},
        satype=SAType.ESP,
    ),
    case(
        "a proposal with a combination",
        LINUX,
        """020600030c000000 0000000000000000 0a000d0020000000 050c010000010001 8000000100000000 0a00000014000000
        0001000000000000 0002000000000000 100e000000000000 201c000000000000 0300000000000000 0400000000000000""",
        MessageType.ACQUIRE,
        {
            X.PROPOSAL: Proposal(
                32,
                (Combination(5, 12, 1, 256, 256, 128, 256, Lifetime(10, 256, 3600, 3), Lifetime(20, 512, 7200, 4)),),
            )
        },
        satype=SAType.ESP,
    ),
    case(
        "linux original address",
        LINUX,
        "0203000307000000 0000000000000000 0500170000800000 0a0000000a0b0c0d 20010db800000000 0000000000000001"
        "0500000000000000",
        MessageType.ADD,
        {X.NAT_T_OA: Address(SIX, 128, 0, 0, 5, 0x0A0B0C0D)},
        satype=SAType.ESP,
    ),
    case(
        "linux security context",
        LINUX,
        "020e000004000000 0000000000000000 0200180001010400 6162636400000000",
        MessageType.SPDADD,
        {X.SEC_CTX: SecurityContext(b"abcd", 1, 1)},
    ),
    case(
        "linux security context that ends in a NUL",
        LINUX,
        "020e000004000000 0000000000000000 0200180001010800 6162636465666700",
        MessageType.SPDADD,
        {X.SEC_CTX: SecurityContext(b"abcdefg\0")},
    ),
    case(
        "linux kmaddress",
        LINUX,
        """0218000007000000 0000000000000000 0500190000000000 020001f4c0000201 0000000000000000 02001194c6336401
        0000000000000000""",
        MessageType.MIGRATE,
        {X.KMADDRESS: KMAddress(ME, PEER, 500, 4500)},
    ),
    case(
        "linux kmaddress v6",
        LINUX,
        """021800000a000000 0000000000000000 0800190000000000 0a00000000000000 20010db800000000 0000000000000001
        000000000a000000 0000000020010db8 0000000000000000 0000000200000000""",
        MessageType.MIGRATE,
        {X.KMADDRESS: KMAddress(SIX, OTHER_SIX)},
    ),
    case(
        "linux filter",
        LINUX,
        """020a000007000000 0000000000000000 05001a00c0000201 0000000000000000 00000000c6336401 0000000000000000
        0000000002002018""",
        MessageType.DUMP,
        {X.FILTER: Filter(ME, PEER, 32, 24)},
    ),
    case(
        "linux filter v6",
        LINUX,
        """020a000007000000 0000000000000000 05001a0020010db8 0000000000000000 0000000120010db8 0000000000000000
        000000020a008040""",
        MessageType.DUMP,
        {X.FILTER: Filter(SIX, OTHER_SIX, 128, 64)},
    ),
    case(
        "linux beet",
        LINUX,
        "0203000304000000 0000000000000000 0200130003000000 0000000007000000",
        MessageType.ADD,
        {X.SA2: SA2(Mode.BEET, 0, 7)},
        satype=SAType.ESP,
    ),
    case(
        "freebsd original addresses and fragment size",
        FREEBSD,
        """0203000309000000 0000000000000000 03001700ff200000 10020000c0000201 0000000000000000 03001800ff200000
        10020000c6336401 0000000000000000 0100190028050000""",
        MessageType.ADD,
        {
            X.NAT_T_OAI: Address(ME, 32, 255),
            X.NAT_T_OAR: Address(PEER, 32, 255),
            X.NAT_T_FRAG: 1320,
        },
        satype=SAType.ESP,
    ),
    case(
        "freebsd tcp-md5 mode",
        FREEBSD,
        "0203000b04000000 0000000000000000 0200130003000000 0000000000000000",
        MessageType.ADD,
        {X.SA2: SA2(Mode.TCPMD5)},
        satype=SAType.TCPSIGNATURE,
    ),
    case(
        "freebsd offload",
        FREEBSD_15,
        """020500030f000000 0000000000000000 04001d0001000000 0200000000000000 0300000000000000 0400000000000000
        04001e0005000000 0600000000000000 0700000000000000 0800000000000000 05001f0000000000 6d63653000000000
        0000000000000000 0000000000000000 0000000000000000""",
        MessageType.GET,
        {
            X.LIFETIME_CURRENT_SOFTWARE: Lifetime(1, 2, 3, 4),
            X.LIFETIME_CURRENT_HARDWARE: Lifetime(5, 6, 7, 8),
            X.HARDWARE_OFFLOAD: HardwareOffload("mce0"),
        },
        satype=SAType.ESP,
    ),
    case(
        "freebsd 9 knows no replay extension",
        FREEBSD_9,
        "0203000303000000 0000000000000000 01001a0000100000",
        MessageType.ADD,
        {26: bytes((0, 16, 0, 0))},
        satype=SAType.ESP,
    ),
    case(
        "netbsd address and fragment size",
        NETBSD,
        """0203000308000000 0000000000000000 05000500ff800000 1c18000000000000 20010db800000000 0000000000000001
        0000000000000000 0100190000050000""",
        MessageType.ADD,
        {X.ADDRESS_SRC: Address(SIX, 128, 255), X.NAT_T_FRAG: 1280},
        satype=SAType.ESP,
    ),
    case(
        "macos session",
        MACOS,
        "0217000307000000 0000000000000000 0300140000000000 0900000000000000 0a00000000000000"
        "0200150002000000 0000000000000000",
        MessageType.GETSASTAT,
        {X.SESSION_ID: SessionID(9, 10), X.SASTAT: SAStatistics(2)},
        satype=SAType.ESP,
    ),
    case(
        "macos statistics",
        MACOS,
        """0217000309000000 0000000000000000 0700150001000000 0000000001000000 c000000110270000 0400020001000000
        0200000000000000 0300000000000000 0400000000000000""",
        MessageType.GETSASTAT,
        {X.SASTAT: SAStatistics(1, (SAStatistic(0xC0000001, 10000, Lifetime(1, 2, 3, 4)),))},
        satype=SAType.ESP,
    ),
    case(
        "macos address ranges",
        MACOS,
        """020e000010000000 0000000000000000 03001700ff200000 10020000c0000201 0000000000000000 03001800ff200000
        10020000c6336401 0000000000000000 03001900ff200000 10020000c0000201 0000000000000000 05001a00ff800000
        1c1e000000000000 20010db800000000 0000000000000001 0000000000000000""",
        MessageType.SPDADD,
        {
            X.ADDRESS_RANGE_SRC_START: Address(ME, 32, 255),
            X.ADDRESS_RANGE_SRC_END: Address(PEER, 32, 255),
            X.ADDRESS_RANGE_DST_START: Address(ME, 32, 255),
            X.ADDRESS_RANGE_DST_END: Address(SIX, 128, 255),
        },
    ),
    case(
        "macos migrate",
        MACOS,
        """021a00030d000000 0000000000000000 02000100c0000001 000106000008 0000 03001b00ff200000 10020000c0000201
        0000000000000000 03001c00ff200000 10020000c6336401 0000000000000000 01001d0001020304 0200160000000000
        6970736563300000""",
        MessageType.SA_MIGRATE,
        {
            X.SA: SA(0xC0000001, 0, SAState.MATURE, 6, 0, SAFlag.ESN),
            X.MIGRATE_ADDRESS_SRC: Address(ME, 32, 255),
            X.MIGRATE_ADDRESS_DST: Address(PEER, 32, 255),
            X.MIGRATE_IPSECIF: bytes((1, 2, 3, 4)),
            X.IPSECIF: bytes(4) + b"ipsec0\0\0",
        },
        satype=SAType.ESP,
    ),
    case(
        "macos implicit iv",
        MACOS,
        "0203000305000000 0000000000000000 02000100c0000001 0001000d00040000 0100110001020304",
        MessageType.ADD,
        {X.SA: SA(0xC0000001, 0, SAState.MATURE, 0, 13, SAFlag.IIV), X.KMPRIVATE: bytes((1, 2, 3, 4))},
        satype=SAType.ESP,
    ),
)
