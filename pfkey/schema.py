"""Every format of every system declared with construct: a second description of the wire, which shares no code with C.

`parse` and `build` are what tests judge the core against, and what `pfkey decode` shows its fields by.  They are some
hundred times slower than `pfkey.decode`, and are not imported with the package.

The fields bear the names of the systems' headers, less the prefix of their struct.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import cache
from typing import Any

from construct import Construct, Container, Int8ub, Struct

from ._declare import Note, Refused, Rest, UntilEnd, enclosed, end_of, fields, record
from ._formats import WORD, Format, Request, Sockaddr, algorithm, combination, formats, numbers
from .abi import Abi
from .constants import ExtensionType as X
from .errors import DecodeError

__all__ = ["Format", "Note", "build", "fields", "formats", "message", "parse", "structures"]

HEADER, MOST = 16, 48
PROMISC = 11

# The rules about what encloses extensions, in the words of the core.
SHORT_HEADER = "a message has a header of 16 bytes; fewer are here"
BAD_VERSION = "the version is not 2"
NOT_WORDS = "a message is a multiple of 8 bytes long"
TOO_LONG = "a message is at most 65535 words of 8 bytes long"
STATED_TOO_SHORT = "the stated length is less than that of a header"
TRUNCATED = "the stated length is more than what is here"
TOO_MANY = "more than 48 extensions"
LENGTH_ZERO = "an extension of length 0"
PAST_END = "the extension goes on past the end of the message"
TYPE_ZERO = "an extension of type 0"
DUPLICATE = "the extension is here for the second time"


class _Extension(Construct):  # type: ignore[misc]
    """The 4 bytes that every extension begins with, then what its type says."""

    encloses = True

    def __init__(self, abi: Abi) -> None:
        super().__init__()
        n = numbers(abi)
        self.abi = abi
        self.head = record("sadb_ext_", ("len", n.u16), ("type", n.u16))
        self.raw = record("", ("data", Rest()))

    def _parse(self, stream: Any, context: Any, path: str) -> Any:
        start, end = stream.tell(), end_of(context)
        head = self.head._parsereport(stream, context, path)
        context._params.faults.extension = head.type
        size = WORD * head.len
        if size == 0:
            raise Refused(LENGTH_ZERO, start)
        if size > end - start:
            raise Refused(PAST_END, start)
        if head.type == 0:
            raise Refused(TYPE_ZERO, start + 2)
        if len(context._seen) == MOST:
            raise Refused(TOO_MANY, start)
        if head.type in context._seen:
            raise Refused(DUPLICATE, start + 2)
        context._seen.add(head.type)
        inner = enclosed(context, start, start + size)
        known = formats(self.abi).get(head.type)
        notes = context._params.get("notes")
        before = len(notes or ())
        try:
            if known is not None:
                return Container(type=head.type, body=known.body._parsereport(stream, inner, path))
        except Refused:
            if not context._errno:
                raise
            # An echo of what a kernel rejected may hold anything.
            stream.seek(start + 4)
            if notes is not None:
                del notes[before:]
        return Container(type=head.type, body=self.raw._parsereport(stream, inner, path).data)

    def _build(self, obj: Any, stream: Any, context: Any, path: str) -> Any:
        body = io.BytesIO()
        if isinstance(obj.body, bytes):
            body.write(obj.body)
        else:
            formats(self.abi)[obj.type].body._build(obj.body, body, context, path)
        content = body.getvalue()
        content += bytes(-(len(content) + 4) % WORD)
        self.head._build(Container(len=(len(content) + 4) // WORD, type=obj.type), stream, context, path)
        stream.write(content)
        return obj


def _header(abi: Abi) -> Struct:
    n = numbers(abi)
    return record(
        "sadb_msg_",
        ("version", Int8ub),
        ("type", Int8ub),
        ("errno", Int8ub),
        ("satype", Int8ub),
        ("len", n.u16),
        ("reserved", n.u16),
        ("seq", n.u32),
        ("pid", n.u32),
    )


class _Message(Construct):  # type: ignore[misc]
    """A header and extensions; or, for PROMISC, a header and another message."""

    def __init__(self, abi: Abi) -> None:
        super().__init__()
        self.header = _header(abi)
        self.extensions = UntilEnd(1, _Extension(abi))
        self.policy, self.source = (abi.extension_numbers[kind] for kind in (X.POLICY, X.ADDRESS_SRC))
        self.body = record("", ("body", Rest()))

    def _parse(self, stream: Any, context: Any, path: str) -> Any:
        length = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        if length < HEADER:
            raise Refused(SHORT_HEADER, length)
        header = self.header._parsereport(stream, context, path)
        for broken, words, at in (
            (header.version != 2, BAD_VERSION, 0),
            (length % WORD, NOT_WORDS, length // WORD * WORD),
            (length // WORD > 0xFFFF, TOO_LONG, 0),
            (header.len < HEADER // WORD, STATED_TOO_SHORT, 4),
        ):
            if broken:
                raise Refused(words, at)
        inner = enclosed(context, 0, length, _seen=set(), _errno=header.errno)
        notes = context._params.get("notes")
        before = len(notes or ())
        found = Container(header=header, extensions=[], body=b"")
        try:
            if header.type == PROMISC:
                found.body = self.body._parsereport(stream, inner, path).body
            else:
                found.extensions = self.extensions._parsereport(stream, inner, path)
        except Refused:
            if WORD * header.len <= length:
                raise
            found = None
        if WORD * header.len > length and (found is None or WORD * header.len != length + self._overcount(found)):
            context._params.faults.extension = 0
            if notes is not None:
                del notes[before:]
            raise Refused(TRUNCATED, 4)
        return found

    def _overcount(self, found: Container) -> int:
        """By how many bytes Linux 6.1 states more than it sends.

        24 for each transport template behind a tunnel over IPv4, in a policy of IPv6; a tunnel over IPv6 in a policy of
        IPv4 takes as many off.
        """
        bodies = {one.type: one.body for one in found.extensions if not isinstance(one.body, bytes)}
        policy, source = bodies.get(self.policy), bodies.get(self.source)
        if policy is None or source is None:
            return 0
        own = last = len(source.sockaddr.addr)
        count = 0
        for request in policy.requests:
            last = len(request.addresses[0].addr) if request.addresses else last
            count += 0 if request.addresses else 2 * (own - last)  # in a sockaddr the difference is that of addresses
        return max(count, 0)

    def _build(self, obj: Any, stream: Any, context: Any, path: str) -> Any:
        content = io.BytesIO()
        self.extensions._build(obj.extensions, content, context, path)
        content.write(obj.body)
        words = (HEADER + len(content.getvalue())) // WORD
        stated = obj.header.get("len") or words
        self.header._build(Container(obj.header, len=stated), stream, context, path)
        stream.write(content.getvalue())
        return obj


@cache
def message(abi: Abi) -> Construct:
    """The construct of a whole message of this system."""
    return _Message(abi)


def parse(data: bytes, abi: Abi, *, notes: list[Note] | None = None) -> Container:
    """The header, the extensions in their order, and what a PROMISC message wraps; every field goes to `notes`.

    Raises DecodeError where `pfkey.decode` does; what came before the fault has been noted then.
    """
    faults = Container(extension=0)
    try:
        return message(abi).parse(data, notes=notes, faults=faults)
    except Refused as refused:
        kind = abi.extensions.get(faults.extension)
        raise DecodeError(
            refused.words,
            offset=refused.offset,
            extension=faults.extension or None,
            name=kind.name if kind is not None else "",
        ) from None


def build(value: Container, abi: Abi) -> bytes:
    """The bytes of what `parse` gives; a header without `len` states the length that there is."""
    return bytes(message(abi).build(value))


def structures(abi: Abi) -> Mapping[str, Struct]:
    """Every struct of this system's headers -> its fields; extensions from behind their header of 4 bytes."""
    found = {form.struct: form.body for form in formats(abi).values()}
    request, sockaddr = Request(abi), Sockaddr(abi)
    return found | {
        "sadb_msg": _header(abi),
        "sadb_alg": algorithm(abi),
        "sadb_comb": combination(abi),
        "sadb_x_ipsecrequest": request.form,
        "sockaddr_in": sockaddr.forms[abi.af_inet][0],
        "sockaddr_in6": sockaddr.forms[abi.af_inet6][0],
    }
