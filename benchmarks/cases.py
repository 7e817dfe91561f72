"""What is measured: one table of (name, function, budget), one of ratios between rows of the same run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import embedded_rows
import peer_struct
import tracker_rows

import pfkey
from pfkey import (
    Abi,
    Direction,
    Lifetime,
    MessageType,
    Policy,
    SAProtocol,
    SecurityAssociation,
    Selector,
    Template,
    decode,
    decode_many,
    encode,
    schema,
)
from pfkey._core import ffi, lib
from pfkey.codec import core_abi
from pfkey.tables import Batch, Messages, assemble
from pfkey.typed import association_from, association_message, policy_from, policy_message, policy_rows

__all__ = ["CASES", "DUMP_ROWS", "MEMORY_ROWS", "RATIOS", "TRANSACTION_ROWS", "Case", "Ratio"]

LINUX = Abi.linux()
RECORDED = Path(__file__).parent.parent / "tests" / "data" / "linux-6.1.json"
BATCH = 10_000

Prepared = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One row: `prepare()` gives the function that is timed, `budget` is for one operation, in seconds."""

    name: str
    prepare: Callable[[], Prepared]
    budget: float | None = None
    operations: int = 1
    """How many operations one call of the function is."""
    iterations: int = 1000
    rounds: int = 100
    minus: str = ""
    """The row whose figure is taken off (what an empty interpreter costs)."""


@dataclass(frozen=True)
class Ratio:
    """One row of the second table: how many times `of` is `to`; the limit is a minimum, or a maximum."""

    name: str
    of: str
    to: str
    at_least: float | None = None
    at_most: float | None = None


def message() -> bytes:
    """Linux's answer to SADB_ADD of an ESP SA between two IPv6 addresses: 344 bytes, ten extensions."""
    exchanges = json.loads(RECORDED.read_text())["exchanges"]
    data = bytes.fromhex(next(one["recv"][0] for one in exchanges if one["name"] == "add-esp6"))
    assert len(data) == 344
    return data


# The wire.


def decode_one() -> Prepared:
    data = message()
    return lambda: decode(data, LINUX)


def decode_and_read() -> Prepared:
    data = message()

    def run() -> object:
        one = decode(data, LINUX)
        return (
            one.type, one.satype, one.spi, one.state, one.mode, one.reqid,
            one.source, one.destination, one.lifetime_hard, one.lifetime_current,
        )  # fmt: skip

    return run


def c_loop() -> Prepared:
    """The limit: the core alone, over messages that lie one after the other."""
    data = message()
    arena, lengths = data * BATCH, ffi.new("uint32_t[]", [len(data)] * BATCH)
    records, fault = ffi.new("struct pfk_record[]", BATCH), ffi.new("struct pfk_fault *")
    core = core_abi(LINUX)
    return lambda: lib.pfk_decode_many(core, arena, lengths, BATCH, records, fault)


def decode_arena() -> Prepared:
    """As a native dump arrives."""
    batch = Batch.of([message()] * BATCH)
    return lambda: assemble([batch], LINUX)


COLUMNS = (
    "type", "satype", "seq", "pid", "hard_bytes", "hard_addtime", "spi", "state", "auth", "encrypt", "mode", "reqid",
)  # fmt: skip


def batch_columns() -> Prepared:
    table = decode_many([message()] * BATCH, LINUX)
    return lambda: list(table.select(*COLUMNS))


def decode_batch() -> Prepared:
    batch = [message()] * BATCH
    return lambda: decode_many(batch, LINUX)


def decode_batch_to_messages() -> Prepared:
    batch = [message()] * BATCH
    return lambda: list(decode_many(batch, LINUX))


def struct_decode() -> Prepared:
    data = message()
    return lambda: peer_struct.decode(data)


def construct_decode() -> Prepared:
    data = message()
    return lambda: schema.parse(data, LINUX)


def association() -> SecurityAssociation:
    return replace(association_from(decode(message(), LINUX)), lifetime_current=None, proxy=None)


def encode_message() -> Prepared:
    built = association_message(MessageType.ADD, association(), LINUX)
    return lambda: encode(built)


def encode_association() -> Prepared:
    kind, sa = MessageType.ADD, association()
    return lambda: encode(association_message(kind, sa, LINUX))


def encode_policy() -> Prepared:
    template = Template.tunnel("192.0.2.1", "198.51.100.1", reqid=1)
    policy = Policy(Direction.OUT, Selector("10.1.0.0/16", "10.2.0.0/16"), templates=(template,), priority=1000)
    kind = MessageType.SPDADD
    return lambda: encode(policy_message(kind, policy, LINUX))


def policies() -> Messages:
    """A dump of 10,000 policies of two templates, each with its own selector, reqid and end of life."""
    compression = Template.transport(protocol=SAProtocol.IPCOMP)
    return decode_many(
        [
            encode(
                policy_message(
                    MessageType.SPDADD,
                    Policy(
                        Direction.OUT,
                        prefixes(number),
                        templates=(compression, Template.tunnel("192.0.2.1", "198.51.100.1", reqid=number + 1)),
                        priority=number,
                        lifetime_hard=Lifetime(addtime=number),
                    ),
                    LINUX,
                )
            )
            for number in range(BATCH)
        ],
        LINUX,
    )


def prefixes(number: int) -> Selector:
    high, low = number >> 8 & 255, number & 255
    return Selector(f"10.{high}.{low}.0/24", f"172.16.{high}.{low}")


def rows_of_policies() -> Prepared:
    table = policies()
    return lambda: list(policy_rows(table))


def whole_policies() -> Prepared:
    table = policies()
    return lambda: [policy_from(one) for one in table]


def struct_encode() -> Prepared:
    fields = peer_struct.decode(encode(association_message(MessageType.ADD, association(), LINUX)))
    return lambda: peer_struct.encode(fields)


def construct_encode() -> Prepared:
    fields = schema.parse(encode(association_message(MessageType.ADD, association(), LINUX)), LINUX)
    return lambda: schema.build(fields, LINUX)


# A fresh interpreter.

FIRST_POLICY = """
import pfkey
tracker = pfkey.PolicyTracker(pfkey.connect("embedded:linux"))
template = pfkey.Template.tunnel("192.0.2.1", "198.51.100.1", reqid=1)
tracker.add(pfkey.Direction.OUT, pfkey.Selector("10.1.0.0/16", "10.2.0.0/16"), pfkey.Assignment(template, spi=1))
"""


def fresh(script: str) -> Callable[[], Prepared]:
    """A new interpreter that runs `script` with the package that is measured here."""

    def prepare() -> Prepared:
        command = [sys.executable, "-c", script]
        environment = os.environ | {"PYTHONPATH": str(Path(pfkey.__file__).parent.parent)}
        return lambda: subprocess.run(command, check=True, cwd=tempfile.gettempdir(), env=environment)

    return prepare


CASES = (
    Case("C core, decode all fields (the limit)", c_loop, 70e-9, BATCH, 1, 300),
    Case("decode(), one message", decode_one, 1.2e-6),
    Case("decode(), then ten typed attributes", decode_and_read, 4e-6),
    Case("decode_many(), 10,000 messages, nothing made of them", decode_batch, None, BATCH, 1, 300),
    Case("the same from the arena of a native dump", decode_arena, None, BATCH, 1, 300),
    Case("its table of 10,000, 12 columns as tuples", batch_columns, 250e-9, BATCH, 1, 100),
    Case("decode_many(), 10,000 messages, each made an object", decode_batch_to_messages, 1.5e-6, BATCH, 1, 30),
    Case("policy_rows(), a dump of 10,000 policies", rows_of_policies, 3e-6, BATCH, 1, 30),
    Case("policy_from(), each of them an object", whole_policies, None, BATCH, 1, 10),
    Case("a Selector from two texts", lambda: lambda: prefixes(4660)),
    Case("decode by hand-written struct", struct_decode),
    Case("decode by the schema (construct)", construct_decode, None, 1, 10, 300),
    Case("encode(), a message that exists", encode_message),
    Case("encode(), from a SecurityAssociation", encode_association, 2.5e-6),
    Case("encode(), from a Policy", encode_policy, 2.5e-6),
    Case("encode by hand-written struct", struct_encode),
    Case("encode by the schema (construct)", construct_encode, None, 1, 10, 300),
    Case("a rekeying among 1,000 policies", tracker_rows.rekeying(1000), 12e-6),
    Case("a rekeying among 10,000 policies", tracker_rows.rekeying(10_000), 12e-6),
    Case("a rekeying among 100,000 policies", tracker_rows.rekeying(100_000)),
    Case("adding a policy among 100,000, overlaps looked for", tracker_rows.adding(100_000, 8000), 50e-6, 1, 100, 50),
    Case("a transaction that rekeys 10,000, nothing changes", tracker_rows.transaction(10_000), 150e-3, 1, 1, 15),
    Case("a resync of 10,000 policies, embedded kernel", tracker_rows.resync(10_000), 150e-3, 1, 1, 15),
    Case("a policy into an embedded kernel, send_many()", embedded_rows.add, 40e-6, embedded_rows.ADDED, 1, 5),
    Case("a dump of 10,000 out of it, nothing decoded", embedded_rows.dump, 5e-6, embedded_rows.DUMPED, 1, 10),
    Case("the same through a socket, decoded", embedded_rows.dump_served, None, embedded_rows.DUMPED, 1, 10),
    Case("an empty interpreter", fresh("pass"), None, 1, 1, 40),
    Case("import pfkey", fresh("import pfkey"), 25e-3, 1, 1, 40, minus="an empty interpreter"),
    Case("import to first tracked policy", fresh(FIRST_POLICY), 80e-3, 1, 1, 40, minus="an empty interpreter"),
)

# Measured in user-mode Linux by dump_native.py: what it prints -> the row.
DUMP_ROWS = {
    "loop": "a dump of 5,000 policies, recv() in a loop, nothing decoded",
    "dump": "the same by dump_policies(), decoded",
    "select": "its table, two columns as tuples",
}

# The same, by transaction_native.py.
TRANSACTION_ROWS = {
    f"{shape} {how}": f"5,000 policies added {how}, pairs of {shape}"
    for shape in ("hosts", "prefixes")
    for how in ("one by one", "in one transaction")
}

# Bytes, counted by tracker_memory.py: what it prints -> (the row, the budget).
MEMORY_ROWS = {
    "own": ("the tracker's own memory, 100,000 policies of two assignments", 60e6),
    "all": ("the same with the caller's selectors and assignments", 160e6),
}

RATIOS = (
    Ratio(
        "decode_many() against the C core",
        "decode_many(), 10,000 messages, nothing made of them",
        "C core, decode all fields (the limit)",
        at_most=1.5,
    ),
    Ratio(
        "an arena against the C core",
        "the same from the arena of a native dump",
        "C core, decode all fields (the limit)",
        at_most=1.5,
    ),
    Ratio("a dump against a loop of recv()", DUMP_ROWS["dump"], DUMP_ROWS["loop"], at_most=0.2),
    Ratio("decode() against struct", "decode by hand-written struct", "decode(), one message", at_least=4),
    Ratio("decode() against construct", "decode by the schema (construct)", "decode(), one message", at_least=200),
    Ratio(
        "encode() against construct",
        "encode by the schema (construct)",
        "encode(), from a SecurityAssociation",
        at_least=80,
    ),
    Ratio(
        "a rekeying among 100,000 against 1,000",
        "a rekeying among 100,000 policies",
        "a rekeying among 1,000 policies",
        at_most=1.3,
    ),
    Ratio(
        "one transaction against one by one, hosts",
        TRANSACTION_ROWS["hosts one by one"],
        TRANSACTION_ROWS["hosts in one transaction"],
        at_least=3,
    ),
    Ratio(
        "one transaction against one by one, prefixes",
        TRANSACTION_ROWS["prefixes one by one"],
        TRANSACTION_ROWS["prefixes in one transaction"],
        at_least=2,
    ),
)
