"""Dumps as tables: light records, columns without objects, buffers without copies, any row as the full object."""

from __future__ import annotations

import gc
import tracemalloc
from array import array
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire import EVERYTHING, OVERSTATED, RECORDED
from wire_case import FREEBSD, LINUX

from pfkey import (
    Abi,
    DecodeError,
    Direction,
    ExtensionType,
    Kernel,
    Message,
    MessageType,
    Policy,
    SecurityAssociation,
    Selector,
    Template,
    connect,
    decode,
    decode_many,
    encode,
    tables,
)
from pfkey.conversation import Conversation
from pfkey.messages import SA, SA2, Address
from pfkey.tables import Batch, Dump, Messages, assemble

X = ExtensionType
SAS = [one for one in RECORDED if ":recv" in one.name and decode(one.data, one.abi).spi is not None]


@pytest.mark.parametrize("abi", [LINUX, FREEBSD], ids=str)
def test_columns_are_what_messages_say(abi: Abi) -> None:
    datagrams = [one.data for one in EVERYTHING if one.abi == abi]
    table = decode_many(datagrams, abi)
    rows = list(table.select("type", "seq", "spi", "state", "mode", "reqid", "hard_bytes", "source", "source_version"))
    assert len(rows) == len(table) == len(datagrams)
    for row, message in zip(rows, table, strict=True):
        sa, sa2 = message.sa or SA(0), message.sa2 or SA2()
        hard = message.lifetime_hard
        assert row[:2] == (int(message.type) & 0xFF, message.seq)
        assert row[2:6] == (sa.spi, sa.state, int(sa2.mode) & 0xFF, sa2.reqid)
        assert row[6] == (hard.bytes if hard else 0)
        source = message.source.address if isinstance(message.source, Address) else None
        assert row[7:] == ((source.packed.ljust(16, b"\0"), source.version) if source else (bytes(16), 0))
    for name in Messages.COLUMNS:
        values = [value for (value,) in table.select(name)]
        assert [getattr(record, name) for record in table.records()] == values
        column = table.column(name)
        assert [bytes(one) if isinstance(one, list) else one for one in column.tolist()] == values
        assert column.readonly


def test_columns_come_in_the_order_asked_for() -> None:
    table = decode_many([one.data for one in EVERYTHING if one.abi == LINUX], LINUX)
    assert [row[::-1] for row in table.select("spi", "type")] == list(table.select("type", "spi"))
    assert [row[0] for row in table.select("seq", "seq")] == [row[1] for row in table.select("seq", "seq")]


def test_a_column_of_numbers_is_a_view_of_the_records() -> None:
    table = decode_many([SAS[0].data] * 1000, SAS[0].abi)
    column = table.column("spi")
    assert (column.nbytes, column.strides, column.format) == (4000, (432,), "I")
    tracemalloc.start()
    table.column("reqid")
    assert tracemalloc.get_traced_memory()[1] < 2000
    tracemalloc.stop()


def test_numpy_takes_a_column_without_a_copy() -> None:
    numpy = pytest.importorskip("numpy")
    table = decode_many([one.data for one in SAS if one.abi == LINUX], LINUX)
    taken = numpy.asarray(table.column("spi"))
    assert not taken.flags.owndata
    assert taken.tolist() == [message.spi for message in table]


def test_a_column_outlives_its_table() -> None:
    column = decode_many([SAS[0].data] * 100, SAS[0].abi).column("spi")
    gc.collect()
    assert set(column.tolist()) == {decode(SAS[0].data, SAS[0].abi).spi}


def test_names_that_are_no_columns() -> None:
    table = decode_many([SAS[0].data], SAS[0].abi)
    with pytest.raises(ValueError, match=r"no column key; there are version, type"):
        table.column("key")
    with pytest.raises(ValueError, match="no column key, keys"):
        table.select("spi", "key", "keys")
    with pytest.raises(ValueError, match="name the columns"):
        table.select()
    with pytest.raises(AttributeError, match="no column 'key'"):
        _ = next(table.records()).key


def test_a_row_is_the_full_object() -> None:
    datagrams = [one.data for one in EVERYTHING if one.abi == FREEBSD]
    table = decode_many(datagrams, FREEBSD)
    for record, data in zip(table.records(), datagrams, strict=True):
        assert record.message == decode(data, FREEBSD)
        assert encode(record.message) == data
    assert table[-1] == table[len(table) - 1]
    assert [encode(one) for one in table.pick([4, 0, 4])] == [datagrams[at] for at in (4, 0, 4)]
    assert table[2:5] == [decode(data, FREEBSD) for data in datagrams[2:5]]
    assert repr(next(table.records())) == f"<Record 0 of <{len(table)} messages of FreeBSD 12>>"


def header(words: int) -> bytes:
    return bytes((2, 10, 0, 0)) + words.to_bytes(2, "little") + bytes(10)


def by_lengths(datagrams: list[bytes]) -> Messages | str:
    try:
        return assemble([Batch.of(datagrams)], LINUX)
    except DecodeError as error:
        return str(error)


def by_marks(datagrams: list[bytes]) -> Messages | str:
    try:
        return decode_many(datagrams, LINUX)
    except DecodeError as error:
        return str(error)


def test_lengths_that_are_wrong_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each datagram is a message, whatever another states: a list is decoded as a native batch is."""
    mark, extension = bytes.fromhex("01003d0000000000"), bytes.fromhex("01003c0000000000")
    short = header(2) + extension  # says less than it is
    good = header(2)
    crafted = [header(2) + mark + header(2), header(5), extension + bytes.fromhex("01003e0000000000")]
    lists = [
        [good], [good, short, good], [OVERSTATED.data, good, OVERSTATED.data], [short], [good, b""], [b"", good], [b""],
        [good, header(3), extension, good], [header(3), extension], [good, good[:8], good[8:]], [good + good, b"\0"],
        [good, b"\2" * 20], [header(0)], [header(1), good], [good, header(9)], crafted, crafted[1:], crafted[:1],
    ]  # fmt: skip
    for datagrams in lists:
        assert by_marks(datagrams) == by_lengths(datagrams)
        assert by_marks([good, *datagrams, good]) == by_lengths([good, *datagrams, good])
    # The control: whoever knew what lies between the messages could say that it lies elsewhere.
    monkeypatch.setattr(tables, "_MARK", mark)
    assert isinstance(by_lengths(crafted), str)
    assert isinstance(by_marks(crafted), Messages)


@given(st.lists(st.sampled_from([one.data for one in EVERYTHING if one.abi == LINUX][:40]), max_size=5), st.data())
@settings(max_examples=200, deadline=None)
def test_a_list_is_decoded_as_a_batch_is(datagrams: list[bytes], data: st.DataObject) -> None:
    damaged = list(datagrams)
    for index, one in enumerate(datagrams):
        if data.draw(st.booleans()):
            at = data.draw(st.sampled_from([0, 2, 4, 5, *range(16, len(one), 8)]))
            damaged[index] = one[:at] + bytes((data.draw(st.integers(0, 48)),)) + one[at + 1 :]
    assert by_marks(damaged) == by_lengths(damaged)


def test_a_table_of_nothing() -> None:
    table = decode_many([], LINUX)
    assert (len(table), list(table), list(table.records()), list(table.select("spi"))) == (0, [], [], [])
    assert table.column("spi").tolist() == table.column("source").tolist() == []
    assert assemble([], LINUX) == []


def test_some_of_a_table() -> None:
    datagrams = [one.data for one in EVERYTHING if one.abi == LINUX]
    table = decode_many(datagrams, LINUX)
    some = table.pick([5, 2, 9])
    assert list(some) == [table[5], table[2], table[9]]
    assert some.column("seq").tolist() == [table[5].seq, table[2].seq, table[9].seq]
    assert list(table.pick([])) == []
    assert table.pick([]).column("spi").tolist() == []


def test_several_arenas_make_one_table() -> None:
    datagrams = [one.data for one in EVERYTHING if one.abi == LINUX]
    whole = decode_many(datagrams, LINUX)
    for sizes in ([1, 2, 3], [10, 1, 30], [len(datagrams) - 1]):
        batches, at = [], 0
        for size in (*sizes, len(datagrams)):
            batch = Batch.of(datagrams[at : at + size])
            batches.append(batch._replace(arena=memoryview(bytearray(batch.arena))))  # as a native channel has them
            at += size
        table = assemble(batches, LINUX)
        assert table == whole
        assert [table[index] for index in range(len(table))] == list(whole)
        assert table.column("seq").tolist() == whole.column("seq").tolist()
    empty = Batch.of([])
    table = assemble([empty, Batch.of(datagrams[:2]), empty, Batch.of(datagrams[2:]), empty], LINUX)
    assert list(table) == [table[index] for index in range(len(table))] == list(whole)
    broken = [Batch.of(datagrams[:3]), Batch.of([datagrams[3], b"\2" + bytes(20)])]
    with pytest.raises(DecodeError, match="message 4 of 5: a message is a multiple of 8"):
        assemble(broken, LINUX)


def test_many_sas_fit_in_little_memory() -> None:
    """100,000 SAs in less than 100 MB: counted for a tenth of them, the input not included."""
    datagrams = [max((one for one in SAS), key=lambda one: len(one.data)).data] * 10_000
    assert len(datagrams[0]) == 344
    table = decode_many(datagrams, LINUX)
    assert table._view.__len__() + sum(map(len, table._arenas)) + 4 * len(table) < 10_000_000 * 0.8


# Of a kernel.


@pytest.fixture(params=["linux", "freebsd-12", "freebsd-14"])
def filled(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    with connect(f"embedded:{request.param}") as kernel:
        for number in range(1, 200):
            template = Template.tunnel("192.0.2.1", "198.51.100.1", reqid=number)
            kernel.add_policy(
                Policy(Direction.OUT, Selector(f"10.1.{number}.0/24", "10.2.0.0/16"), 2, (template,), number)
            )
            kernel.add_sa(
                SecurityAssociation(
                    "192.0.2.1", "198.51.100.1", 0x1000 + number, reqid=number, encryption="aes-cbc",
                    encryption_key=bytes(16), authentication="hmac-sha1", authentication_key=bytes(20),
                )  # type: ignore[arg-type]
            )  # fmt: skip
        yield kernel


def test_a_dump_is_a_sequence_and_a_table(filled: Kernel) -> None:
    sas, policies = filled.dump_sas(), filled.dump_policies()
    assert isinstance(sas, Dump)
    assert len(sas) == len(policies) == 199
    assert {sa.spi for sa in sas} == set(sas.column("spi").tolist()) == {row[0] for row in sas.select("spi")}
    assert [policy.priority for policy in policies] == policies.column("priority").tolist()
    assert sorted(record.reqid for record in sas.records()) == list(range(1, 200))
    assert sas[3] in sas
    assert sas[-1] == list(sas)[-1]
    assert sas[2:4] == list(sas)[2:4]
    assert policies == list(policies)
    assert list(policies) == policies
    assert repr(policies[:1]) in repr(policies) or repr(policies).startswith("[Policy(")
    assert policies.messages[0].type == MessageType.SPDDUMP


def test_a_dump_among_other_messages_is_whole() -> None:
    """Batches that hold what is no part of the dump are taken apart."""
    conversation = Conversation(LINUX, pid=7, first_seq=1)
    request = conversation.request(Message(MessageType.SPDDUMP, abi=LINUX))
    part = next(one for one in EVERYTHING if one.name == "linux spdadd tunnel v4").data

    def said(kind: int, seq: int, pid: int, errno: int = 0) -> bytes:
        return encode(decode(part, LINUX).replace(type=kind, seq=seq, pid=pid, errno=errno))

    others = [said(MessageType.SPDADD, 9, 8), said(MessageType.SPDDUMP, 1, 8)]
    first, third = [said(18, 1, 7), said(18, 2, 7)], [said(18, 4, 7), said(18, 0, 7)]
    for batch in (first, [others[0], said(18, 3, 7), others[1]], third):
        assert not request.done
        assert conversation.receive_batch(Batch.of(batch)) == [request]
    assert request.done
    assert [one.seq for one in request.parts()] == [1, 2, 3, 4, 0]
    assert [event.pid for event in conversation.take_events()] == [8, 8]


def test_a_batch_with_a_gap_is_noticed() -> None:
    for abi, seqs in ((LINUX, (1, 2, 4, 0)), (FREEBSD, (5, 4, 2, 1))):
        conversation = Conversation(abi, pid=7, first_seq=1)
        request = conversation.request(Message(MessageType.SPDDUMP, abi=abi))
        batch = Batch.of([encode(Message(MessageType.SPDDUMP, abi=abi, seq=seq, pid=7)) for seq in seqs])
        conversation.receive_batch(batch)
        assert "lacks 1 parts" in str(request.error)


def test_lengths_are_kept_small() -> None:
    assert isinstance(decode_many([SAS[0].data], SAS[0].abi)._lengths, array)
