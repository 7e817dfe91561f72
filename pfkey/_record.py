"""The flat record that the C core fills and reads, seen from Python: one Struct for each group of fields.

The order is that of `struct pfk_record` in csrc/pfk.h; a test compares every offset with the compiler's.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

from .constants import ExtensionType

__all__ = [
    "ADDRESS",
    "BODY",
    "COLUMNS",
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
    "Column",
    "Group",
    "presence",
]

MAXIMUM_EXTENSIONS = 48


class Group:
    """Some fields that lie together in the record: where, and how to read and write them."""

    __slots__ = ("_layout", "fields", "name", "offset", "size")

    def __init__(self, name: str, offset: int, layout: str) -> None:
        self.name = name
        self.offset = offset
        self.fields = layout
        self._layout = Struct(f"={layout}")
        self.size = self._layout.size

    def read(self, record: bytes, which: int = 0) -> tuple[int | bytes, ...]:
        """The fields of the `which`th of these groups."""
        return self._layout.unpack_from(record, self.offset + which * self.size)

    def part(self, record: bytes, which: int = 0) -> bytes:
        """The bytes of the `which`th of these groups, for `unpack`."""
        start = self.offset + which * self.size
        return record[start : start + self.size]

    def unpack(self, part: bytes) -> tuple[int | bytes, ...]:
        """The fields in what `part` gave."""
        return self._layout.unpack(part)

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
KEY = Group("key", 304, "2H2I")  # bits reserved, offset length
SUPPORTED = Group("supported", 328, "3I")  # reserved, offset length
SA = Group("sa_spi", 352, "I4BI")  # spi, replay state auth encrypt, flags
SA2 = Group("sa2_mode", 364, "BBH2I")  # mode reserved reserved, sequence reqid
SPIRANGE = Group("spirange_min", 376, "3I")  # minimum maximum reserved
NAT_T_TYPE = Group("nat_t_type", 388, "B3s")  # type, reserved
NAT_T_PORT = Group("nat_t_port", 392, "2H")  # port reserved
POLICY = Group("policy_type", 400, "HBB4I")  # type direction scope, id priority, offset length
REPLAY = Group("replay", 420, "I")
BODY = Group("body", 424, "2I")  # offset length
SIZE = 432


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
    ExtensionType.KEY_AUTH: Slot(7, 0),
    ExtensionType.KEY_ENCRYPT: Slot(8, 1),
    ExtensionType.SPIRANGE: Slot(9, 0),
    ExtensionType.SUPPORTED_AUTH: Slot(10, 0),
    ExtensionType.SUPPORTED_ENCRYPT: Slot(11, 1),
    ExtensionType.SA2: Slot(12, 0),
    ExtensionType.NAT_T_TYPE: Slot(13, 0),
    ExtensionType.NAT_T_SPORT: Slot(14, 0),
    ExtensionType.NAT_T_DPORT: Slot(15, 1),
    ExtensionType.POLICY: Slot(16, 0),
    ExtensionType.SA_REPLAY: Slot(17, 0),
}


def presence(kind: ExtensionType) -> tuple[int, int]:
    """The byte of the record that tells whether this extension is in its slot, and the bit there."""
    number = SLOTS[kind].number
    byte = number // 8 if sys.byteorder == "little" else 3 - number // 8
    return COUNTS.offset + byte, 1 << number % 8


class Column(NamedTuple):
    """A field of the record that a table shows as a column."""

    offset: int
    format: str  # of struct; of memoryview too, but for "16s"

    @property
    def size(self) -> int:
        """In bytes."""
        return Struct(f"={self.format}").size


def _each(fields: str) -> Iterator[str]:
    """The format of each field by itself: "4B16s" is B, B, B, B, 16s."""
    for count, kind in re.findall(r"(\d*)(\D)", fields):
        yield from [f"{count}s"] if kind == "s" else kind * int(count or 1)


def _columns() -> dict[str, Column]:
    found: dict[str, Column] = {}

    def add(group: Group, names: str, which: int = 0, prefix: str = "") -> None:
        """The fields of a group in order; "-" for one that is no column."""
        at = group.offset + which * group.size
        for name, kind in zip(names.split(), _each(group.fields), strict=True):
            if name != "-":
                found[prefix + name] = Column(at, kind)
            at += Struct(f"={kind}").size

    add(HEADER, "version type errno satype length reserved seq pid")
    add(COUNTS, "present count words")
    for which, prefix in enumerate(("current_", "hard_", "soft_")):
        add(LIFETIME, "bytes addtime usetime allocations -", which, prefix)
    for which, side in enumerate(("source", "destination")):
        names = f"{side}_protocol {side}_prefixlen - {side}_port {side}_version - {side}_flowinfo {side}_scope {side} -"
        add(ADDRESS, names, which)
    for which, prefix in enumerate(("auth_", "encrypt_")):
        add(KEY, "key_bits - - -", which, prefix)
    add(SA, "spi replay state auth encrypt flags")
    add(SA2, "mode - - sequence reqid")
    add(SPIRANGE, "spi_minimum spi_maximum -")
    add(NAT_T_TYPE, "nat_t_type -")
    for which, prefix in enumerate(("nat_t_source_", "nat_t_destination_")):
        add(NAT_T_PORT, "port -", which, prefix)
    add(POLICY, "action direction scope policy_id priority - -")
    add(REPLAY, "replay_window")
    return found


COLUMNS = _columns()
