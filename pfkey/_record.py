"""The flat record that the C core fills and reads, seen from Python: one Struct for each group of fields.

The order is that of `struct pfk_record` in csrc/pfk.h; a test compares every offset with the compiler's.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from .constants import ExtensionType

__all__ = [
    "ADDRESS",
    "BODY",
    "COUNTS",
    "HEADER",
    "KEY",
    "LIFETIME",
    "MAXIMUM_EXTENSIONS",
    "NAT_T_PORT",
    "NAT_T_TYPE",
    "OFFSETS",
    "POLICY",
    "REPLAY",
    "SA",
    "SA2",
    "SIZE",
    "SLOTS",
    "SPIRANGE",
    "SUPPORTED",
    "VALID",
    "Group",
]

MAXIMUM_EXTENSIONS = 48


class Group:
    """Some fields that lie together in the record: where, and how to read and write them."""

    __slots__ = ("_layout", "name", "offset", "size")

    def __init__(self, name: str, offset: int, layout: str) -> None:
        self.name = name
        self.offset = offset
        self._layout = Struct(f"={layout}")
        self.size = self._layout.size

    def read(self, record: bytes, which: int = 0) -> tuple[int | bytes, ...]:
        """The fields of the `which`th of these groups."""
        return self._layout.unpack_from(record, self.offset + which * self.size)

    def write(self, record: bytearray, which: int, *values: int | bytes) -> None:
        """Fill the fields of the `which`th of these groups; struct.error when a value does not fit."""
        self._layout.pack_into(record, self.offset + which * self.size, *values)


HEADER = Group("version", 0, "4B2H2I")  # version type errno satype, length reserved, seq pid
COUNTS = Group("present", 16, "I2H")  # present, count words
OFFSETS = Group("offset", 24, f"{MAXIMUM_EXTENSIONS}H")
VALID = Group("valid", 120, "Q")  # bit n: the nth extension has a slot and keeps its rules
LIFETIME = Group("lifetime", 128, "3Q2I")  # bytes addtime usetime, allocations -
ADDRESS = Group(
    "address", 224, "BBHHBBII16s8s"
)  # protocol prefix reserved port version - flowinfo scope, bytes padding
KEY = Group("key", 424, "2H2I")  # bits reserved, offset length
SUPPORTED = Group("supported", 448, "3I")  # reserved, offset length
SA = Group("sa_spi", 472, "I4BI")  # spi, replay state auth encrypt, flags
SA2 = Group("sa2_mode", 484, "BBH2I")  # mode reserved reserved, sequence reqid
SPIRANGE = Group("spirange_min", 496, "3I")  # minimum maximum reserved
NAT_T_TYPE = Group("nat_t_type", 508, "B3s")  # type, reserved
NAT_T_PORT = Group("nat_t_port", 512, "2H")  # port reserved
POLICY = Group("policy_type", 520, "HBB4I")  # type direction scope, id priority, offset length
REPLAY = Group("replay", 540, "I")
BODY = Group("body", 544, "2I")  # offset length
SIZE = 552


class Slot(NamedTuple):
    """Where the core keeps an extension: its number, and which of several alike it is."""

    number: int
    which: int


# enum pfk_slot; the position in each group of what occurs several times.  The number is the bit in `present`.
SLOTS = {
    ExtensionType.SA: Slot(1, 0),
    ExtensionType.LIFETIME_CURRENT: Slot(2, 0),
    ExtensionType.LIFETIME_HARD: Slot(3, 1),
    ExtensionType.LIFETIME_SOFT: Slot(4, 2),
    ExtensionType.ADDRESS_SRC: Slot(5, 0),
    ExtensionType.ADDRESS_DST: Slot(6, 1),
    ExtensionType.ADDRESS_PROXY: Slot(7, 2),
    ExtensionType.NEW_ADDRESS_SRC: Slot(8, 3),
    ExtensionType.NEW_ADDRESS_DST: Slot(9, 4),
    ExtensionType.KEY_AUTH: Slot(10, 0),
    ExtensionType.KEY_ENCRYPT: Slot(11, 1),
    ExtensionType.SPIRANGE: Slot(12, 0),
    ExtensionType.SUPPORTED_AUTH: Slot(13, 0),
    ExtensionType.SUPPORTED_ENCRYPT: Slot(14, 1),
    ExtensionType.SA2: Slot(15, 0),
    ExtensionType.NAT_T_TYPE: Slot(16, 0),
    ExtensionType.NAT_T_SPORT: Slot(17, 0),
    ExtensionType.NAT_T_DPORT: Slot(18, 1),
    ExtensionType.POLICY: Slot(19, 0),
    ExtensionType.SA_REPLAY: Slot(20, 0),
}
