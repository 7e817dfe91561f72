"""The names and numbers of the field: RFC 2367, the KAME extensions, and what Linux, the BSDs and macOS added.

Numbers that every system shares are the wire numbers.  Where systems use one number for different things
(extension 24 is a security context on Linux and a NAT-T address on FreeBSD) the member's low byte is still the
wire number and its high byte tells the dialects apart: 0 for what all share, 1 for Linux, 2 for FreeBSD and NetBSD,
3 for macOS.  An `Abi` knows which of them its system speaks.
"""

from __future__ import annotations

from enum import Enum, IntEnum, IntFlag

__all__ = [
    "PF_KEY_V2",
    "Action",
    "Direction",
    "ExtensionType",
    "IdentityType",
    "Level",
    "MessageType",
    "Mode",
    "PolicyScope",
    "Rank",
    "SAFlag",
    "SAProtocol",
    "SAState",
    "SAType",
    "UpperProtocol",
]

PF_KEY_V2 = 2
"""The version in every message header and the protocol number of the socket (RFC 2367 section 1.3)."""


class MessageType(IntEnum):
    """What a message asks or says (sadb_msg_type; RFC 2367 section 3.1 and the KAME policy messages).

    `value & 0xFF` is the number on the wire.
    """

    GETSPI = 1
    UPDATE = 2
    ADD = 3
    DELETE = 4
    GET = 5
    ACQUIRE = 6
    REGISTER = 7
    EXPIRE = 8
    FLUSH = 9
    DUMP = 10
    PROMISC = 11
    PCHANGE = 12
    SPDUPDATE = 13
    SPDADD = 14
    SPDDELETE = 15
    SPDGET = 16
    SPDACQUIRE = 17
    SPDDUMP = 18
    SPDFLUSH = 19
    SPDSETIDX = 20
    SPDEXPIRE = 21
    SPDDELETE2 = 22
    NAT_T_NEW_MAPPING = 23  # Linux, NetBSD
    MIGRATE = 24  # Linux; a policy moves with its SAs

    GETSASTAT = 0x317
    SPDENABLE = 0x318
    SPDDISABLE = 0x319
    SA_MIGRATE = 0x31A  # SADB_MIGRATE of macOS, about an SA


class ExtensionType(IntEnum):
    """What an extension carries (sadb_ext_type); `value & 0xFF` is the number on the wire."""

    SA = 1
    LIFETIME_CURRENT = 2
    LIFETIME_HARD = 3
    LIFETIME_SOFT = 4
    ADDRESS_SRC = 5
    ADDRESS_DST = 6
    ADDRESS_PROXY = 7
    KEY_AUTH = 8
    KEY_ENCRYPT = 9
    IDENTITY_SRC = 10
    IDENTITY_DST = 11
    SENSITIVITY = 12
    PROPOSAL = 13
    SUPPORTED_AUTH = 14
    SUPPORTED_ENCRYPT = 15
    SPIRANGE = 16
    KMPRIVATE = 17
    POLICY = 18
    SA2 = 19
    NAT_T_TYPE = 20
    NAT_T_SPORT = 21
    NAT_T_DPORT = 22

    NAT_T_OA = 0x117
    SEC_CTX = 0x118
    KMADDRESS = 0x119
    FILTER = 0x11A

    NAT_T_OAI = 0x217  # FreeBSD, NetBSD
    NAT_T_OAR = 0x218  # FreeBSD, NetBSD
    NAT_T_FRAG = 0x219  # FreeBSD, NetBSD
    SA_REPLAY = 0x21A  # FreeBSD 11.1 and later
    NEW_ADDRESS_SRC = 0x21B  # FreeBSD 11.1 and later
    NEW_ADDRESS_DST = 0x21C  # FreeBSD 11.1 and later
    LIFETIME_CURRENT_SOFTWARE = 0x21D  # FreeBSD 15: SADB_X_EXT_LFT_CUR_SW_OFFL
    LIFETIME_CURRENT_HARDWARE = 0x21E  # FreeBSD 15: SADB_X_EXT_LFT_CUR_HW_OFFL
    HARDWARE_OFFLOAD = 0x21F  # FreeBSD 15: SADB_X_EXT_IF_HW_OFFL

    SESSION_ID = 0x314
    SASTAT = 0x315
    IPSECIF = 0x316
    ADDRESS_RANGE_SRC_START = 0x317
    ADDRESS_RANGE_SRC_END = 0x318
    ADDRESS_RANGE_DST_START = 0x319
    ADDRESS_RANGE_DST_END = 0x31A
    MIGRATE_ADDRESS_SRC = 0x31B
    MIGRATE_ADDRESS_DST = 0x31C
    MIGRATE_IPSECIF = 0x31D


class SAType(IntEnum):
    """What kind of security association a message is about (sadb_msg_satype)."""

    UNSPEC = 0
    AH = 2
    ESP = 3
    RSVP = 5
    OSPFV2 = 6
    RIPV2 = 7
    MIP = 8
    IPCOMP = 9
    POLICY = 10  # macOS
    TCPSIGNATURE = 11  # FreeBSD, NetBSD


class SAProtocol(IntEnum):
    """The transform of a template or an SA, as its IP protocol number."""

    TCPSIGNATURE = 6
    ESP = 50
    AH = 51
    IPCOMP = 108


class SAState(IntEnum):
    """Where an SA stands in its life (sadb_sa_state)."""

    LARVAL = 0
    MATURE = 1
    DYING = 2
    DEAD = 3


class SAFlag(IntFlag):
    """Flags of an SA (sadb_sa_flags).  Bits that a system does not name are kept as they are.

    macOS says ESN by another bit, and implicit initialisation vectors by the bit that is ESN on FreeBSD: a codec turns
    them into these and back.
    """

    PFS = 0x1  # the BSDs: the old format (RFC 1826, RFC 1827) of an SA that the kernel holds
    IV4B = 0x10  # the BSDs: an IV of four bytes
    DERIV = 0x20  # the BSDs: DES with a derived IV
    CYCSEQ = 0x40  # the BSDs: the sequence number may wrap
    RAWCPI = 0x80  # the BSDs: the well-known CPI of an IPComp algorithm
    PRAND = 0x100  # the BSDs: random padding
    PZERO = 0x200  # the BSDs: padding with zeros
    ESN = 0x400  # FreeBSD 13 and later; macOS, where the wire has 0x800
    NOPMTUDISC = 0x20000000  # Linux
    DECAP_DSCP = 0x40000000  # Linux
    NOECN = 0x80000000  # Linux
    IIV = 1 << 32  # macOS: implicit IV; the wire has 0x400


class Direction(IntEnum):
    """Which way the packets of a policy go (sadb_x_policy_dir).  FWD, for forwarded packets, is Linux only."""

    IN = 1
    OUT = 2
    FWD = 3


class Action(IntEnum):
    """What happens to a packet that a policy matches (sadb_x_policy_type)."""

    DISCARD = 0
    NONE = 1
    IPSEC = 2
    ENTRUST = 3  # sockets only
    BYPASS = 4  # sockets only
    GENERATE = 5  # macOS


class Mode(IntEnum):
    """How a transform is applied (sadb_x_ipsecrequest_mode, sadb_x_sa2_mode).

    `value & 0xFF` is the number on the wire.
    """

    ANY = 0
    TRANSPORT = 1
    TUNNEL = 2
    BEET = 0x103  # Linux
    IPTFS = 0x104  # Linux 6.14 and later
    TCPMD5 = 0x203  # FreeBSD, NetBSD


class Level(IntEnum):
    """How much a template insists (sadb_x_ipsecrequest_level).

    DEFAULT is REQUIRE on Linux; on the BSDs and macOS it asks a sysctl, whose default leaves packets unprotected.
    """

    DEFAULT = 0
    USE = 1
    REQUIRE = 2
    UNIQUE = 3


class IdentityType(IntEnum):
    """How an identity names somebody (sadb_ident_type, RFC 2367 section 2.3.4)."""

    PREFIX = 1
    FQDN = 2
    USER_FQDN = 3
    ADDRESS = 4  # the BSDs and macOS


class PolicyScope(IntEnum):
    """Where a FreeBSD policy lives (sadb_x_policy_scope, FreeBSD 11.1 and later)."""

    ANY = 0
    GLOBAL = 1
    IFNET = 2
    PCB = 4


class UpperProtocol(IntEnum):
    """Upper-layer protocols with a meaning of their own in a selector (IANA numbers; ANY is IPSEC_ULPROTO_ANY)."""

    ICMP = 1
    TCP = 6
    UDP = 17
    ICMPV6 = 58
    ANY = 255


class Rank(Enum):
    """How an assignment ranks among those of one policy, and where its policy ranks among others.

    PASS policies stand before REGULAR and TRAP ones, FALLBACK policies behind; a TRAP waits one step behind REGULAR.
    """

    REGULAR = "regular"
    TRAP = "trap"
    PASS = "pass"
    FALLBACK = "fallback"
