"""What construct lacks for these formats: rules with words, fields that note where they lay, lists up to an end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from construct import Bytes, Construct, Container, ListContainer, Renamed, SizeofError, Struct, Subconstruct

__all__ = [
    "Note",
    "Refused",
    "Rest",
    "Rule",
    "Several",
    "UntilEnd",
    "beside",
    "enclosed",
    "end_of",
    "fields",
    "record",
    "room",
    "size_of",
    "start_of",
]

Context = Any  # a construct Container; its keys are the names of fields


class Note(NamedTuple):
    """A field as it lay in the message: the name that the headers give it, where, how long, and what it said."""

    name: str
    offset: int
    size: int
    value: Any


class Refused(Exception):
    """A rule is broken; `offset` is that of the byte that breaks it, from the start of the message."""

    def __init__(self, words: str, offset: int) -> None:
        super().__init__(words, offset)
        self.words = words
        self.offset = offset


# Where we are.  Whatever encloses fields puts _start and _end into their context.


def _nearest(context: Context, name: str) -> Any:
    while name not in context:
        context = context["_"]
    return context[name]


def enclosed(context: Context, start: int, end: int, **more: Any) -> Context:
    """A context for what lies from `start` up to `end`."""
    states = {name: context[name] for name in ("_params", "_parsing", "_building", "_sizing")}
    return Container(_=context, **states, _root=None, _start=start, _end=end, _index=None, **more)


def start_of(context: Context) -> int:
    """Where what encloses the field begins."""
    return int(_nearest(context, "_start"))


def end_of(context: Context) -> int:
    """Where it ends."""
    return int(_nearest(context, "_end"))


def size_of(context: Context) -> int:
    """How long it is."""
    return end_of(context) - start_of(context)


def room(stream: Any, context: Context) -> int:
    """How much of it is left."""
    return end_of(context) - int(stream.tell())


class Rule(Construct):  # type: ignore[misc]
    """It holds, or the message is refused: with these words, at this many bytes from the start of what encloses it."""

    def __init__(self, words: str, holds: Callable[[Context], bool], at: int | Callable[[Context], int] = 0) -> None:
        super().__init__()
        self.flagbuildnone = True
        self.words, self.holds, self.at = words, holds, at

    def _parse(self, stream: Any, context: Context, path: str) -> None:
        if not self.holds(context):
            at = self.at(context) if callable(self.at) else self.at
            raise Refused(self.words, start_of(context) + at)

    def _build(self, obj: Any, stream: Any, context: Context, path: str) -> None:
        pass

    def _sizeof(self, context: Context, path: str) -> int:
        return 0


class _Noted(Subconstruct):  # type: ignore[misc]
    """A field that notes where it lay, when whoever parses gives a list for the notes."""

    def __init__(self, title: str, subcon: Construct) -> None:
        super().__init__(subcon)
        self.title = title

    def _parse(self, stream: Any, context: Context, path: str) -> Any:
        start = stream.tell()
        value = self.subcon._parsereport(stream, context, path)
        notes = context._params.get("notes")
        if notes is not None and stream.tell() > start:
            notes.append(Note(self.title, start, stream.tell() - start, value))
        return value


class Rest(Construct):  # type: ignore[misc]
    """All bytes up to the end of what encloses them."""

    def _parse(self, stream: Any, context: Context, path: str) -> bytes:
        return bytes(stream.read(room(stream, context)))

    def _build(self, obj: Any, stream: Any, context: Context, path: str) -> Any:
        stream.write(obj)
        return obj

    def _sizeof(self, context: Context, path: str) -> int:
        raise SizeofError("what is left has no size of its own", path=path)


class Several(Subconstruct):  # type: ignore[misc]
    """As many as the context says."""

    def __init__(self, count: Callable[[Context], int], subcon: Construct) -> None:
        super().__init__(subcon)
        self.count = count

    def _parse(self, stream: Any, context: Context, path: str) -> ListContainer:
        return ListContainer(self.subcon._parsereport(stream, context, path) for _ in range(self.count(context)))

    def _build(self, obj: Any, stream: Any, context: Context, path: str) -> ListContainer:
        return ListContainer(self.subcon._build(one, stream, context, path) for one in obj)

    def _sizeof(self, context: Context, path: str) -> int:
        raise SizeofError("a list has no fixed size", path=path)


class UntilEnd(Subconstruct):  # type: ignore[misc]
    """As many as fit before the end; unlike GreedyRange it hides no error: it stops where less than one is left."""

    def __init__(self, least: int, subcon: Construct) -> None:
        super().__init__(subcon)
        self.least = least

    def _parse(self, stream: Any, context: Context, path: str) -> ListContainer:
        found = ListContainer()
        while room(stream, context) >= self.least:
            found.append(self.subcon._parsereport(stream, context, path))
        return found

    def _build(self, obj: Any, stream: Any, context: Context, path: str) -> ListContainer:
        return ListContainer(self.subcon._build(one, stream, context, path) for one in obj)

    def _sizeof(self, context: Context, path: str) -> int:
        raise SizeofError("a list has no fixed size", path=path)


Part = tuple[str, Any] | Any  # a name and a construct, or a construct without a name


def record(prefix: str, *parts: Part) -> Struct:
    """A struct of the headers: each field under its own name and, when noted, under the header's: prefix + name."""
    made = []
    for part in parts:
        if isinstance(part, Construct):
            made.append(part)
            continue
        name, subcon = part
        plain = not isinstance(subcon, (Struct, Several, UntilEnd)) and not getattr(subcon, "encloses", False)
        made.append(name / (_Noted(prefix + name, subcon) if plain else subcon))
    return Struct(*made)


def fields(struct: Struct) -> Iterator[tuple[str, int, int]]:
    """(name in the headers, offset, size) of the fields up to the first whose place depends on what is before it."""
    at = 0
    for part in struct.subcons:
        inner = part.subcon if isinstance(part, Renamed) else part
        try:
            size = inner.sizeof()
        except SizeofError:
            return
        if isinstance(inner, _Noted):
            yield inner.title, at, size
        at += size


def beside(name: str, size: int) -> tuple[str, Construct]:
    """A reserved field: bytes that are kept."""
    return name, Bytes(size)
