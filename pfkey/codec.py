"""A message <-> bytes: one call of the C core each way."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeVar, cast

from . import _record as layout
from ._core import ffi, lib
from ._rare import RARE
from ._values import VALUES, Blob, Value, address_of, lifetime_of
from .abi import Abi
from .constants import PF_KEY_V2, ExtensionType, MessageType, Mode, SAState, SAType
from .errors import DecodeError, EncodeError
from .messages import SA, SA2, PolicyExtension

__all__ = ["Message", "Value", "core_abi", "core_slots", "decode", "decode_error", "encode", "made", "numbered"]

if ffi.sizeof("struct pfk_record") != layout.SIZE:
    raise ImportError("the compiled core and _record.py do not describe the same record; build the package again")

T = TypeVar("T")

_SATYPES: dict[int, SAType] = {int(kind): kind for kind in SAType}
_HEADER_FIELDS = ("version", "type", "errno", "satype", "length", "reserved", "seq", "pid")
_OUT = 8192
"""Room for a message under construction; a longer one gets a buffer of its own."""


class _Scratch:
    """Buffers for one call of the core.  cffi releases the GIL, so no two threads may use the same."""

    __slots__ = ("fault", "out", "record", "view", "written")

    def __init__(self) -> None:
        self.out = ffi.new("uint8_t[]", _OUT)
        self.written = ffi.buffer(self.out)
        self.record = ffi.new("struct pfk_record *")
        self.view = ffi.buffer(self.record)
        self.fault = ffi.new("struct pfk_fault *")


_scratches: list[_Scratch] = []
_core_abis: dict[int, tuple[Any, Abi]] = {}


def core_slots(abi: Abi) -> dict[int, int]:
    """Number of an extension on the wire -> the core's slot for it (enum pfk_slot)."""
    slots: dict[ExtensionType, int] = {kind: slot.number for kind, slot in layout.SLOTS.items()}
    slots |= {kind: form.slot for kind, form in RARE.items()}
    return {number: slots.get(kind, 0) for kind, number in abi.extension_numbers.items()}


def core_abi(abi: Abi) -> Any:
    """The core's part of an Abi, made once.  The Abi is kept beside it, so that its id stays its own."""
    try:
        return _core_abis[id(abi)][0]
    except KeyError:
        pass
    core = ffi.new("struct pfk_abi *")
    core.big_endian = abi.byteorder == "big"
    core.sockaddr_has_length = abi.sockaddr_has_length
    core.request_size = abi.request_size
    core.af_inet = abi.af_inet
    core.af_inet6 = abi.af_inet6
    for number, slot in core_slots(abi).items():
        core.slot[number] = slot
    _core_abis[id(abi)] = (core, abi)
    return core


# Where single fields lie in the record, for those that are read most.
_SA_BYTE, _SA_BIT = layout.presence(ExtensionType.SA)
_SA2_BYTE, _SA2_BIT = layout.presence(ExtensionType.SA2)
_NUMBER: Callable[..., tuple[int]] = struct.Struct("=I").unpack_from
_SEQ_AND_PID, _SEQ_AT, _COUNTS_AT = struct.Struct("=II").pack, layout.COLUMNS["seq"].offset, layout.COUNTS.offset
_SPI_AT, _STATE_AT = layout.COLUMNS["spi"].offset, layout.COLUMNS["state"].offset
_MODE_AT, _REQID_AT = layout.COLUMNS["mode"].offset, layout.COLUMNS["reqid"].offset
_STATES = {int(state): state for state in SAState}


def _part(kind: ExtensionType, group: layout.Group, make: Callable[[bytes], T], text: str) -> T | None:
    """A property whose value is made of one part of the record."""
    byte, bit = layout.presence(kind)
    start = group.offset + layout.SLOTS[kind].which * group.size
    end = start + group.size

    def read(self: Message) -> T | None:
        record = self._record
        return make(record[start:end]) if record[byte] & bit else self.get(kind)

    return cast("T | None", property(read, doc=text))


class Message:
    """One PF_KEY message of one system: a header and extensions, in order.

    `extensions` maps what each extension is (or its number, where this Abi does not know it) to its value: SA, SA2,
    Lifetime, Address, Key, SPIRange, PolicyExtension, a tuple of Algorithm for the supported ones, an int for NAT-T
    type and ports and for the replay window; for the rarer ones what `pfkey.extensions` has; bytes, everything behind
    its 4-byte header, for what this Abi does not know, KMPRIVATE and macOS's IPSECIF and MIGRATE_IPSECIF.  Bytes are
    accepted for any extension when a message is built; they are padded to a multiple of 8 and not checked.

    Messages do not change.  Values are made when they are first asked for.
    """

    __slots__ = ("_cache", "_data", "_record", "abi")

    abi: Abi
    _record: bytes
    _data: bytes
    _cache: Mapping[ExtensionType | int, Value]

    def __init__(
        self,
        type: MessageType | int,
        extensions: Mapping[ExtensionType | int, Value] = MappingProxyType({}),
        *,
        abi: Abi,
        satype: SAType | int = 0,
        errno: int = 0,
        seq: int = 0,
        pid: int = 0,
        reserved: int = 0,
        version: int = PF_KEY_V2,
    ) -> None:
        record = bytearray(layout.SIZE)
        type = type & 0xFF if isinstance(type, MessageType) else type
        _pack_header(record, version, type, errno, satype, 0, reserved, seq, pid)
        blob = Blob(abi)
        if len(extensions) > layout.MAXIMUM_EXTENSIONS:
            raise EncodeError(f"{len(extensions)} extensions; at most {layout.MAXIMUM_EXTENSIONS} fit")
        present = valid = 0
        offsets = [0] * layout.MAXIMUM_EXTENSIONS
        for position, (kind, value) in enumerate(extensions.items()):
            offsets[position], slot = _put(kind, value, record, blob)
            present |= 1 << slot if slot > 0 else 0
            valid |= 1 << position if slot else 0
        layout.COUNTS.write(record, 0, present, len(extensions), 0)
        layout.VALID.write(record, 0, valid)
        layout.OFFSETS.write(record, 0, *offsets)
        self._fill(abi, bytes(record), bytes(blob.data))

    def _fill(self, abi: Abi, record: bytes, data: bytes) -> None:
        give = object.__setattr__
        give(self, "abi", abi)
        give(self, "_record", record)
        give(self, "_data", data)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Message does not change; use replace() or make another one instead of setting {name}")

    # The header (struct sadb_msg).

    @property
    def version(self) -> int:
        """2, PF_KEY_V2."""
        return self._record[0]

    @property
    def type(self) -> MessageType | int:
        """What is asked or said; a number when this package does not know it."""
        return self.abi.message_types.get(self._record[1], self._record[1])

    @property
    def errno(self) -> int:
        """The kernel's error number, 0 for none; `abi.error_name` has its name."""
        return self._record[2]

    @property
    def satype(self) -> SAType | int:
        """What kind of SA it is about; a scope in FreeBSD's SPDDUMP."""
        return _SATYPES.get(self._record[3], self._record[3])

    @property
    def reserved(self) -> int:
        """sadb_msg_reserved: kernels put a reference count there."""
        return cast("int", layout.HEADER.read(self._record)[5])

    @property
    def seq(self) -> int:
        """The sequence number that pairs requests with replies; in a dump it counts."""
        return cast("int", layout.HEADER.read(self._record)[6])

    @property
    def pid(self) -> int:
        """The process that asked; 0 when the kernel speaks by itself."""
        return cast("int", layout.HEADER.read(self._record)[7])

    def replace(self, **header: int) -> Message:
        """The same extensions under another header: any of version, type, errno, satype, reserved, seq, pid."""
        fields = dict(zip(_HEADER_FIELDS, layout.HEADER.read(self._record), strict=True))
        unknown = header.keys() - fields.keys() | (header.keys() & {"length"})
        if unknown:
            raise TypeError(f"a header has no field {', '.join(sorted(unknown))} to replace")
        record = bytearray(self._record)
        _pack_header(record, *(fields | header).values())
        return made(self.abi, bytes(record), self._data)

    # The extensions.

    @property
    def extensions(self) -> Mapping[ExtensionType | int, Value]:
        """What it carries, in the order of the wire."""
        try:
            return self._cache
        except AttributeError:  # it is asked for the first time
            known = self.abi.extensions
            values = {
                known.get(number, number): self._value(number, offset, position)
                for position, (number, offset) in enumerate(self._walk())
            }
            object.__setattr__(self, "_cache", MappingProxyType(values))
            return self._cache

    def get(self, kind: ExtensionType | int) -> Any:
        """The value of one extension, or None; the others are not made."""
        slot = layout.SLOTS.get(cast("ExtensionType", kind))
        if slot is not None and self._present >> slot.number & 1:
            return VALUES[cast("ExtensionType", kind)].read(self._record, self._data, self.abi, slot.which)
        wanted = self._number(kind)
        for position, (number, offset) in enumerate(self._walk()):
            if number == wanted:
                return self._value(number, offset, position)
        return None

    def __contains__(self, kind: object) -> bool:
        wanted = self._number(cast("int", kind))
        return any(number == wanted for number, _ in self._walk())

    def raw(self, kind: ExtensionType | int) -> bytes:
        """A whole extension as it is on the wire, header included; KeyError when it is not here."""
        data, wanted, order = encode(self), self._number(kind), self.abi.byteorder
        start = 16
        for number, _ in self._walk():
            end = start + 8 * int.from_bytes(data[start : start + 2], order)
            if number == wanted:
                return data[start:end]
            start = end
        raise KeyError(kind)

    @property
    def body(self) -> bytes:
        """What follows the header of a PROMISC message: another message; empty for every other type."""
        offset, length = cast("tuple[int, int]", layout.BODY.read(self._record))
        return self._data[offset : offset + length]

    # Shorthands; None where the message does not have it, bytes where an error reply echoes what cannot be read.

    @property
    def sa(self) -> SA | None:
        """SADB_EXT_SA."""
        return cast("SA | None", self.get(ExtensionType.SA))

    @property
    def sa2(self) -> SA2 | None:
        """SADB_X_EXT_SA2."""
        return cast("SA2 | None", self.get(ExtensionType.SA2))

    @property
    def spi(self) -> int | None:
        """The SPI of the SA, as a number."""
        record = self._record
        return _NUMBER(record, _SPI_AT)[0] if record[_SA_BYTE] & _SA_BIT else None

    @property
    def state(self) -> SAState | int | None:
        """The state of the SA."""
        record = self._record
        return _STATES.get(record[_STATE_AT], record[_STATE_AT]) if record[_SA_BYTE] & _SA_BIT else None

    @property
    def mode(self) -> Mode | int | None:
        """The mode of the SA."""
        record = self._record
        return self.abi.modes.get(record[_MODE_AT], record[_MODE_AT]) if record[_SA2_BYTE] & _SA2_BIT else None

    @property
    def reqid(self) -> int | None:
        """The reqid of the SA."""
        record = self._record
        return _NUMBER(record, _REQID_AT)[0] if record[_SA2_BYTE] & _SA2_BIT else None

    source = _part(ExtensionType.ADDRESS_SRC, layout.ADDRESS, address_of, "SADB_EXT_ADDRESS_SRC.")
    destination = _part(ExtensionType.ADDRESS_DST, layout.ADDRESS, address_of, "SADB_EXT_ADDRESS_DST.")

    @property
    def policy(self) -> PolicyExtension | None:
        """SADB_X_EXT_POLICY, or None also when an error reply echoes one that cannot be read."""
        return (
            cast("PolicyExtension | None", self.get(ExtensionType.POLICY)) if self._has(ExtensionType.POLICY) else None
        )

    lifetime_current = _part(ExtensionType.LIFETIME_CURRENT, layout.LIFETIME, lifetime_of, "SADB_EXT_LIFETIME_CURRENT.")
    lifetime_hard = _part(ExtensionType.LIFETIME_HARD, layout.LIFETIME, lifetime_of, "SADB_EXT_LIFETIME_HARD.")
    lifetime_soft = _part(ExtensionType.LIFETIME_SOFT, layout.LIFETIME, lifetime_of, "SADB_EXT_LIFETIME_SOFT.")

    # Below the surface.

    @property
    def _present(self) -> int:
        return _NUMBER(self._record, layout.COUNTS.offset)[0]

    def _has(self, kind: ExtensionType) -> bool:
        return bool(self._present >> layout.SLOTS[kind].number & 1)

    def _number(self, kind: ExtensionType | int) -> int:
        """The number on the wire; -1 for what this Abi does not have."""
        if isinstance(kind, ExtensionType):
            return self.abi.extension_numbers.get(kind, -1)
        return kind

    def _walk(self) -> Iterator[tuple[int, int]]:
        """(number on the wire, offset in words) of each extension."""
        _, count, _ = cast("tuple[int, ...]", layout.COUNTS.read(self._record))
        order = self.abi.byteorder
        for offset in cast("tuple[int, ...]", layout.OFFSETS.read(self._record)[:count]):
            yield int.from_bytes(self._data[8 * offset + 2 : 8 * offset + 4], order), offset

    def _words(self, offset: int) -> int:
        return int.from_bytes(self._data[8 * offset : 8 * offset + 2], self.abi.byteorder)

    def _value(self, number: int, offset: int, position: int) -> Value:
        kind = self.abi.extensions.get(number)
        content = self._data[8 * offset : 8 * offset + 8 * self._words(offset)]
        if kind is None or not layout.VALID.read(self._record)[0] >> position & 1:  # type: ignore[operator]
            return content[4:]
        if kind in RARE:
            return RARE[kind].read(content, self.abi)
        return VALUES[kind].read(self._record, self._data, self.abi, layout.SLOTS[kind].which)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Message):
            return NotImplemented
        return self.abi == other.abi and encode(self) == encode(other)

    def __hash__(self) -> int:
        return hash(encode(self))

    def __repr__(self) -> str:
        kind = self.type
        text = f"<Message {kind.name if isinstance(kind, MessageType) else kind}"
        if self.satype:
            text += f" {self.satype.name if isinstance(self.satype, SAType) else self.satype}"
        text += f" seq={self.seq} pid={self.pid}"
        if self.errno:
            text += f" errno={self.abi.error_name(self.errno)}"
        names = (name.name if isinstance(name, ExtensionType) else str(name) for name in self.extensions)
        return f"{text} [{' '.join(names)}] {self.abi}>"


def made(abi: Abi, record: bytes, data: bytes) -> Message:
    """The message of a record of the core and the bytes that its variable parts lie in."""
    message = _new(Message)
    _set_abi(message, abi)
    _set_record(message, record)
    _set_data(message, data)
    return message


def numbered(message: Message, seq: int, pid: int) -> Message:
    """The same message with these 32-bit numbers, as every request gets them: `replace`, with less ado."""
    record = message._record
    return made(message.abi, record[:_SEQ_AT] + _SEQ_AND_PID(seq, pid) + record[_COUNTS_AT:], message._data)


def _pack_header(record: bytearray, *fields: int | bytes) -> None:
    try:
        layout.HEADER.write(record, 0, *fields)
    except struct.error as error:
        shown = ", ".join(f"{name} {value!r}" for name, value in zip(_HEADER_FIELDS, fields, strict=True))
        raise EncodeError(f"a number does not fit its field of the header ({shown}): {error}") from None


_RARE_SLOT = -1


def _put(kind: ExtensionType | int, value: Value, record: bytearray, blob: Blob) -> tuple[int, int]:
    """Write one extension to the record and the blob; its offset in words, and its slot (0: raw, -1: a rare one)."""
    abi = blob.abi
    if isinstance(kind, ExtensionType):
        if kind not in abi.extension_numbers:
            raise EncodeError(f"{abi} has no extension {kind.name}")
        number = abi.extension_numbers[kind]
    else:
        number = int(kind)
        if not 0 < number <= 0xFFFF:
            raise EncodeError(f"an extension's number is 1 to 65535, not {number}")
        kind = abi.extensions.get(number, number)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return blob.raw(number, bytes(value)), 0
    name = kind.name if isinstance(kind, ExtensionType) else str(kind)
    form = VALUES.get(cast("ExtensionType", kind))
    rare = RARE.get(cast("ExtensionType", kind))
    wanted = form.type if form else rare.type if rare else None
    if wanted is None:
        raise EncodeError(f"extension {name} takes bytes (what follows its 4-byte header), not {type(value).__name__}")
    if not isinstance(value, wanted):
        raise EncodeError(f"extension {name} does not take a {type(value).__name__}")
    try:
        if rare is not None:
            return blob.raw(number, rare.write(value, abi)), _RARE_SLOT
        slot = layout.SLOTS[cast("ExtensionType", kind)]
        offset = blob.begin(number)
        cast("Any", form).write(value, record, blob, slot.which)
    except (struct.error, OverflowError) as error:
        raise EncodeError(f"a number in {value!r} does not fit its field of {name}: {error}") from None
    return offset, slot.number


def encode(message: Message) -> bytes:
    """The bytes of a message for the Abi that it carries; every length is computed.

    Raises EncodeError when the message is longer than its length field can say.
    """
    data = message._data
    capacity = len(data) + _MARGIN
    try:
        scratch = _scratches.pop()
    except IndexError:
        scratch = _Scratch()
    if capacity <= _OUT:
        capacity, out, written = _OUT, scratch.out, scratch.written
    else:
        out = ffi.new("uint8_t[]", capacity)
        written = ffi.buffer(out)
    fault = scratch.fault
    try:
        core = _core_abis[id(message.abi)][0]
    except KeyError:
        core = core_abi(message.abi)
    length = _encode(core, message._record, data, len(data), out, capacity, fault)
    if not length:
        error = EncodeError(f"{_type_name(message)}: {_reason(fault.reason)} (extension {fault.extension})")
        lib.pfk_wipe(out, capacity)
        _scratches.append(scratch)
        raise error
    encoded: bytes = written[:length]
    _wipe(out, length)
    _scratches.append(scratch)
    return encoded


_MARGIN = 16 + 48 * layout.MAXIMUM_EXTENSIONS
_encode, _decode, _wipe = lib.pfk_encode, lib.pfk_decode, lib.pfk_wipe


def decode(data: bytes | bytearray | memoryview, abi: Abi) -> Message:
    """The message that `data` holds, in the layout of `abi`; all of it is validated.

    Raises DecodeError with the offset, the extension and the rule.  Content that a kernel echoes because it rejected it
    (errno is not 0) may break the rules of its extension: it comes as bytes.
    """
    if type(data) is not bytes:
        data = bytes(data)
    try:
        scratch = _scratches.pop()
    except IndexError:
        scratch = _Scratch()
    fault = scratch.fault
    try:
        core = _core_abis[id(abi)][0]
    except KeyError:
        core = core_abi(abi)
    if _decode(core, data, len(data), scratch.record, fault):
        error = decode_error(fault, abi)
        _scratches.append(scratch)
        raise error
    record = bytes(scratch.view)
    _scratches.append(scratch)
    message = _new(Message)
    _set_abi(message, abi)
    _set_record(message, record)
    _set_data(message, data)
    return message


_new = Message.__new__
# What a slot's descriptor does, without a look-up of the name: Message refuses plain assignment.
_set_abi = Message.__dict__["abi"].__set__
_set_record = Message.__dict__["_record"].__set__
_set_data = Message.__dict__["_data"].__set__


def _reason(number: int) -> str:
    return cast("bytes", ffi.string(lib.pfk_reason(number))).decode()


def decode_error(fault: Any, abi: Abi, prefix: str = "") -> DecodeError:
    """The exception that a fault of the core is."""
    number = fault.extension or None
    kind = abi.extensions.get(fault.extension)
    name = kind.name if kind is not None else ""
    return DecodeError(prefix + _reason(fault.reason), offset=fault.offset, extension=number, name=name)


def _type_name(message: Message) -> str:
    return message.type.name if isinstance(message.type, MessageType) else f"message of type {message.type}"
