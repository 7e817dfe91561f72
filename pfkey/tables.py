"""Many messages as a table: the core's records in one array, columns without objects, any row as a Message."""

from __future__ import annotations

import os
import struct
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import accumulate
from operator import itemgetter
from typing import Any, Generic, NamedTuple, TypeVar, cast, overload

from . import _record as layout
from ._core import ffi, lib
from .abi import Abi
from .codec import Message, core_abi, decode_error, made

__all__ = ["Batch", "Dump", "Messages", "Record", "assemble", "decode_many"]

T = TypeVar("T")


class Batch(NamedTuple):
    """Messages that lie one after the other in `arena`, which is bytes or a buffer of the core; their lengths."""

    arena: Any
    lengths: array[int]

    @classmethod
    def of(cls, datagrams: Iterable[bytes]) -> Batch:
        """What arrived one by one, as a batch."""
        parts = datagrams if isinstance(datagrams, list) else list(datagrams)
        lengths = array("I")
        lengths.fromlist(list(map(len, parts)))
        return cls(b"".join(parts), lengths)

    def datagrams(self) -> Iterator[bytes]:
        """Each message by itself."""
        start = 0
        for length in self.lengths:
            yield bytes(self.arena[start : start + length])
            start += length


@cache
def _layout(columns: tuple[str, ...]) -> tuple[struct.Struct, tuple[int, ...]]:
    """A Struct over a whole record that has these columns in its order, and where each of those asked for is."""
    unknown = [name for name in columns if name not in layout.COLUMNS]
    if unknown:
        raise ValueError(f"there is no column {', '.join(unknown)}; there are {', '.join(layout.COLUMNS)}")
    ordered = sorted(set(columns), key=lambda name: layout.COLUMNS[name].offset)
    text, at = "=", 0
    for name in ordered:
        column = layout.COLUMNS[name]
        text += f"{column.offset - at}x{column.format}"
        at = column.offset + column.size
    return struct.Struct(text + f"{layout.SIZE - at}x"), tuple(ordered.index(name) for name in columns)


class Record:
    """A light row: each column of `Messages.COLUMNS` is an attribute, read when asked for; `message` is the whole."""

    __slots__ = ("_at", "_messages", "index")

    def __init__(self, messages: Messages, index: int) -> None:
        self._messages = messages
        self.index = index
        self._at = index * layout.SIZE

    @property
    def message(self) -> Message:
        """The message, with all it carries."""
        return self._messages[self.index]

    def __getattr__(self, name: str) -> int | bytes:
        try:
            read, offset = _READERS[name]
        except KeyError:
            raise AttributeError(f"a record has no column {name!r}; it has {', '.join(layout.COLUMNS)}") from None
        return cast("int | bytes", read(self._messages._view, self._at + offset)[0])

    def __repr__(self) -> str:
        return f"<Record {self.index} of {self._messages!r}>"


_READERS = {name: (struct.Struct(f"={one.format}").unpack_from, one.offset) for name, one in layout.COLUMNS.items()}


class Messages(Sequence[Message]):
    """Decoded messages: a sequence that makes a Message of the row that is asked for, and a table of plain numbers.

    The columns are the fixed fields of the commonest extensions, by name in `COLUMNS`; a field whose extension a
    message does not have is 0 (`present` tells).  Numbers are those on the wire, SPIs as people write them; `source`
    and `destination` are 16 bytes of which an IPv4 address takes the first 4 (`source_version` tells).  Keys are no
    columns.
    """

    COLUMNS = tuple(layout.COLUMNS)

    __slots__ = ("_arenas", "_bases", "_gap", "_lengths", "_records", "_starts", "_view", "abi")

    def __init__(
        self, abi: Abi, arenas: Sequence[Any], bases: Sequence[int], lengths: array[int], records: Any, *, gap: int = 0
    ) -> None:
        self.abi = abi
        self._arenas = arenas
        self._bases = bases
        self._lengths = lengths
        self._records = records
        self._gap = gap  # bytes between messages, in the only arena then
        self._view = ffi.buffer(records, len(lengths) * layout.SIZE)
        self._starts: array[int] | None = None

    def __len__(self) -> int:
        return len(self._lengths)

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> list[Message]: ...
    def __getitem__(self, index: int | slice) -> Message | list[Message]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"message {index} of {len(self)}")
        if self._starts is None:
            self._starts = array("Q", accumulate(self._lengths, initial=0))
        start = self._starts[index] + self._gap * index
        number = bisect_right(self._bases, start) - 1 if len(self._bases) > 1 else 0
        start -= self._bases[number]
        at = index * layout.SIZE
        data = bytes(self._arenas[number][start : start + self._lengths[index]])
        return made(self.abi, self._view[at : at + layout.SIZE], data)

    def __iter__(self) -> Iterator[Message]:
        abi, view, size, at = self.abi, self._view, layout.SIZE, 0
        for (arena, start), length in zip(self.extents(), self._lengths, strict=True):
            data = arena[start : start + length]
            yield made(abi, view[at : at + size], data if type(data) is bytes else bytes(data))
            at += size

    def extents(self) -> Iterator[tuple[Any, int]]:
        """Where the bytes of each message are: what they lie in, a slice of which is bytes, and from which on."""
        arenas, ends = iter(self._arenas), iter([*self._bases[1:], -1])
        arena, end, start, base, gap = b"", 0, 0, 0, self._gap
        for length in self._lengths:
            while start == end:  # an arena may be empty
                arena, base, end = next(arenas), start, next(ends)
            yield arena, start - base
            start += length + gap

    def unpack(self, fields: struct.Struct) -> Iterator[tuple[Any, ...]]:
        """Some fields of each record, by a Struct as long as a record."""
        return fields.iter_unpack(self._view)

    def records(self) -> Iterator[Record]:
        """A light row for each message."""
        return (Record(self, index) for index in range(len(self)))

    def select(self, *columns: str) -> Iterator[tuple[Any, ...]]:
        """A tuple of these columns for each message; nothing else is made."""
        if not columns:
            raise ValueError(f"name the columns to select: {', '.join(self.COLUMNS)}")
        fields, order = _layout(columns)
        rows = fields.iter_unpack(self._view)
        return rows if order == tuple(range(len(columns))) else map(itemgetter(*order), rows)

    def column(self, name: str) -> memoryview:
        """One column as a buffer, which numpy takes without a copy.

        A column of numbers is a view of the records themselves, with a stride; one of addresses is a new buffer of 16
        bytes for each message.
        """
        try:
            one = layout.COLUMNS[name]
        except KeyError:
            raise ValueError(f"there is no column {name}; there are {', '.join(self.COLUMNS)}") from None
        if not len(self):
            return cast("Any", memoryview(b"")).cast("B" if one.format == "16s" else one.format)  # type: ignore[no-any-return]
        whole: Any = memoryview(self._view)
        if one.format != "16s":
            numbers: memoryview = whole.cast(one.format)[one.offset // one.size :: layout.SIZE // one.size]
            return numbers.toreadonly()
        gathered = bytearray(16 * len(self))
        for byte in range(16):
            gathered[byte::16] = whole[one.offset + byte :: layout.SIZE]
        return memoryview(gathered).toreadonly().cast("B", (len(self), 16))

    def pick(self, indices: Sequence[int]) -> Messages:
        """Some of the messages, in the order given."""
        records = ffi.new("struct pfk_record[]", max(len(indices), 1))
        view = ffi.buffer(records)
        parts = []
        for position, index in enumerate(indices):
            view[position * layout.SIZE : (position + 1) * layout.SIZE] = self._view[
                index * layout.SIZE : (index + 1) * layout.SIZE
            ]
            parts.append(self[index]._data)
        batch = Batch.of(parts)
        return Messages(self.abi, [batch.arena], [0], batch.lengths, records)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, (str, bytes)):
            return NotImplemented
        return list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as for a list

    def __repr__(self) -> str:
        return f"<{len(self)} messages of {self.abi}>"


_allocate = ffi.new_allocator(should_clear_after_alloc=False)  # the core writes every byte of a record
_SPARE = 8 << 20
_spare: list[tuple[int, Any]] = []


def _records(count: int) -> Any:
    """An array for at least so many records.

    One that nobody looks at any more is used again: the memory of a new one costs more than decoding into it.
    """
    try:
        room, owner = _spare.pop()
    except IndexError:
        room, owner = -1, None
    if room < count:
        room, owner = count, _allocate("struct pfk_record[]", count)
    return ffi.gc(owner, lambda array: _keep(room, array))


def _keep(room: int, owner: Any) -> None:
    if not _spare and room * layout.SIZE <= _SPARE:
        _spare.append((room, owner))


def assemble(batches: Sequence[Batch], abi: Abi) -> Messages:
    """The messages of several batches, each arena decoded where it is.

    Raises DecodeError, whose text says which message it was.
    """
    count = sum(len(batch.lengths) for batch in batches)
    records = _records(count)
    fault = ffi.new("struct pfk_fault *")
    done, base = 0, 0
    bases = []
    core = core_abi(abi)
    for batch in batches:
        lengths = ffi.from_buffer("uint32_t[]", batch.lengths)
        arena = batch.arena if isinstance(batch.arena, bytes) else ffi.from_buffer("uint8_t[]", batch.arena)
        if lib.pfk_decode_many(core, arena, lengths, len(batch.lengths), records + done, fault):
            raise decode_error(fault, abi, f"message {done + fault.index} of {count}: ")
        bases.append(base)
        base += sum(batch.lengths) if len(batches) > 1 else 0
        done += len(batch.lengths)
    every = batches[0].lengths if len(batches) == 1 else array("I", (n for batch in batches for n in batch.lengths))
    return Messages(abi, [batch.arena for batch in batches], bases, every, records)


_MARK = os.urandom(lib.PFK_MARK)
"""Lies between messages that are decoded together.  Nobody outside knows it, so that no message can hold it."""


def decode_many(datagrams: Iterable[bytes], abi: Abi) -> Messages:
    """All messages in one call of the core; each becomes a Message when it is asked for.

    Raises DecodeError, whose text says which message it was.
    """
    parts = datagrams if isinstance(datagrams, list) else list(datagrams)
    # To take the length of each part would cost a third of decoding it; where each is as long as its header says, and
    # the marks prove it, the core finds them.
    arena, lengths, records = _MARK.join(parts), array("I", bytes(4 * len(parts))), _records(len(parts))
    found, fault = ffi.from_buffer("uint32_t[]", lengths), ffi.new("struct pfk_fault *")
    if lib.pfk_decode_marked(core_abi(abi), arena, len(arena), _MARK, len(parts), found, records, fault):
        return assemble([Batch.of(parts)], abi)
    return Messages(abi, [arena], [0], lengths, records, gap=len(_MARK))


class Dump(Sequence[T], Generic[T]):
    """What a kernel's database holds: a sequence whose rows are made when they are asked for.

    `messages` is the same as a table: its columns, light records and messages.
    """

    __slots__ = ("_make", "messages")

    def __init__(self, messages: Messages, make: Callable[[Message], T]) -> None:
        self.messages = messages
        self._make = make

    def __len__(self) -> int:
        return len(self.messages)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        found = self.messages[index]
        return [self._make(one) for one in found] if isinstance(found, list) else self._make(found)

    def __iter__(self) -> Iterator[T]:
        return map(self._make, self.messages)

    def records(self) -> Iterator[Record]:
        """A light row for each entry."""
        return self.messages.records()

    def select(self, *columns: str) -> Iterator[tuple[Any, ...]]:
        """A tuple of these columns for each entry; see Messages."""
        return self.messages.select(*columns)

    def column(self, name: str) -> memoryview:
        """One column as a buffer; see Messages."""
        return self.messages.column(name)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, (str, bytes)):
            return NotImplemented
        return list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as for a list

    def __repr__(self) -> str:
        return repr(list(self))
