"""The conversation alone: whose reply is it, when is a dump complete, what is an event.  No kernel, no channel."""

from __future__ import annotations

import pytest

from pfkey import (
    Abi,
    Action,
    Direction,
    DumpOverflow,
    ExtensionType,
    KernelError,
    Message,
    MessageType,
    Policy,
    ReplyTimeout,
    Selector,
    encode,
)
from pfkey.constants import SAType
from pfkey.conversation import _EVENTS, _REMEMBERED, Conversation, Request
from pfkey.errors import DecodeError
from pfkey.messages import SA, PolicyExtension
from pfkey.typed import policy_message

LINUX, FREEBSD = Abi.linux(), Abi.freebsd(12)
M = MessageType
PID = 4242
SITE, OTHER_SITE = Selector("10.1.0.0/16", "10.2.0.0/16"), Selector("10.3.0.0/16", "10.2.0.0/16")


def conversation(abi: Abi = LINUX) -> Conversation:
    return Conversation(abi, pid=PID, first_seq=100)


def about(type: MessageType, selector: Selector = SITE, abi: Abi = LINUX, direction: int = Direction.OUT) -> Message:
    return policy_message(type, Policy(direction, selector, Action.DISCARD), abi)


def ask(talk: Conversation, message: Message) -> Request:
    request = talk.request(message)
    assert (request.message.pid, request.message.seq > 0) == (PID, True)
    return request


def hear(talk: Conversation, message: Message, **header: int) -> None:
    talk.receive(encode(message.replace(**header)))


# (what arrives for SPDADD with seq 100, header, is it the answer)
ARRIVALS = [
    ("the answer", about(M.SPDADD), {}, True),
    ("another process", about(M.SPDADD), {"pid": PID + 1}, False),
    ("an older seq", about(M.SPDADD), {"seq": 99}, False),
    ("a newer seq", about(M.SPDADD), {"seq": 101}, False),
    ("seq 0", about(M.SPDADD), {"seq": 0}, False),
    ("another type", about(M.SPDUPDATE), {}, False),
    ("another selector", about(M.SPDADD, OTHER_SITE), {}, False),
    ("another direction", about(M.SPDADD, direction=Direction.IN), {}, False),
    ("another port", about(M.SPDADD, Selector("10.1.0.0/16", "10.2.0.0/16", protocol=6, source_port=1)), {}, False),
    # Linux says the destination's protocol of both sides.
    ("the same in other words", about(M.SPDADD, Selector("10.1.0.0/16", "10.2.0.0/16", protocol=6)), {}, True),
]


@pytest.mark.parametrize(("what", "message", "header", "ours"), ARRIVALS, ids=[row[0] for row in ARRIVALS])
def test_whose_answer_it_is(what: str, message: Message, header: dict[str, int], ours: bool) -> None:
    talk = conversation()
    request = ask(talk, about(M.SPDADD))
    hear(talk, message, **({"seq": 100, "pid": PID} | header))
    assert request.done is ours
    assert len(talk.take_events()) == (not ours)
    assert talk.take_events() == []


def test_an_answer_about_another_sa_is_not_ours() -> None:
    talk = conversation()
    request = ask(talk, Message(M.GET, {ExtensionType.SA: SA(0x100)}, abi=LINUX, satype=SAType.ESP))
    hear(talk, Message(M.GET, {ExtensionType.SA: SA(0x101)}, abi=LINUX, satype=SAType.ESP), seq=100, pid=PID)
    hear(talk, Message(M.GET, {ExtensionType.SA: SA(0x100)}, abi=LINUX, satype=SAType.AH), seq=100, pid=PID)
    assert not request.done
    hear(talk, Message(M.GET, {ExtensionType.SA: SA(0x100)}, abi=LINUX, satype=SAType.ESP), seq=100, pid=PID)
    assert request.done


def test_policies_asked_for_by_id() -> None:
    def by_id(number: int) -> Message:
        return Message(M.SPDGET, {ExtensionType.POLICY: PolicyExtension(2, 2, number)}, abi=LINUX)

    def with_selector(number: int) -> Message:
        return policy_message(M.SPDGET, Policy(Direction.OUT, SITE, Action.DISCARD, id=number), LINUX)

    talk = conversation()
    request = ask(talk, with_selector(8))
    hear(talk, with_selector(16), seq=100, pid=PID)
    assert not request.done
    talk = conversation()
    request = ask(talk, by_id(8))
    hear(talk, by_id(16), seq=100, pid=PID)
    assert not request.done
    hear(talk, by_id(8), seq=100, pid=PID)
    assert request.done


@pytest.mark.parametrize(("abi", "done"), [(LINUX, True), (FREEBSD, False)], ids=str)
def test_linux_answers_setidx_as_an_add(abi: Abi, done: bool) -> None:
    talk = conversation(abi)
    request = ask(talk, about(M.SPDSETIDX, abi=abi))
    hear(talk, about(M.SPDADD, abi=abi), seq=100, pid=PID)
    assert request.done is done


def test_linux_answers_migrate_without_seq_and_pid() -> None:
    talk = conversation()
    request = ask(talk, about(M.MIGRATE))
    hear(talk, about(M.MIGRATE, OTHER_SITE), seq=0, pid=0)
    assert not request.done
    hear(talk, about(M.MIGRATE), seq=0, pid=0)
    assert request.done


@pytest.mark.parametrize("abi", [LINUX, FREEBSD], ids=str)
def test_errors_name_what_was_asked(abi: Abi) -> None:
    talk = conversation(abi)
    request = ask(talk, about(M.SPDADD, abi=abi))
    echo = about(M.SPDADD, abi=abi) if abi.error_echoes_request else Message(M.SPDADD, abi=abi)
    hear(talk, echo, seq=100, pid=PID, errno=17)
    assert isinstance(request.error, FileExistsError)
    assert isinstance(request.error, KernelError)
    assert str(request.error) == "SPDADD of out 10.1.0.0/16 -> 10.2.0.0/16 was rejected (EEXIST)"
    assert request.error.request == request.message
    assert request.error.reply.errno == 17


def test_a_second_copy_is_neither_event_nor_answer() -> None:
    """Linux answers a flush twice."""
    talk = conversation()
    first = ask(talk, Message(M.SPDFLUSH, abi=LINUX))
    hear(talk, Message(M.SPDFLUSH, abi=LINUX), seq=100, pid=PID)
    assert first.done
    talk.end(first)
    second = ask(talk, Message(M.SPDFLUSH, abi=LINUX))
    hear(talk, Message(M.SPDFLUSH, abi=LINUX), seq=100, pid=PID)
    assert not second.done
    assert talk.take_events() == []


def test_a_late_answer_is_dropped() -> None:
    talk = conversation()
    request = ask(talk, about(M.SPDADD))
    talk.give_up(request, ReplyTimeout("late"))
    hear(talk, about(M.SPDADD), seq=100, pid=PID)
    assert talk.take_events() == []
    hear(talk, about(M.SPDADD), seq=100, pid=PID + 1)
    assert len(talk.take_events()) == 1


# Dumps.

UP, DOWN = [1, 2, 3, 0], [3, 2, 1, 0]


def dump(abi: Abi, seqs: list[int], errnos: dict[int, int] | None = None) -> Request:
    talk = conversation(abi)
    request = ask(talk, Message(M.SPDDUMP, abi=abi))
    for position, seq in enumerate(seqs):
        if request.done:
            break
        errno = (errnos or {}).get(position, 0)
        hear(talk, about(M.SPDDUMP, abi=abi), seq=seq, pid=PID, errno=errno)
    if not request.done:
        talk.give_up(request, ReplyTimeout("no more came"))
    return request


@pytest.mark.parametrize(("abi", "seqs"), [(LINUX, UP), (FREEBSD, DOWN), (LINUX, [0]), (FREEBSD, [0])])
def test_whole_dumps(abi: Abi, seqs: list[int]) -> None:
    request = dump(abi, seqs)
    assert request.error is None
    assert [part.seq for part in request.parts()] == seqs


CUT = [
    (FREEBSD, [5, 4, 2, 1, 0], "lacks 1 parts"),
    (FREEBSD, [5, 4, 3], "stopped after 3 parts"),
    (FREEBSD, [5, 0], "lacks 4 parts"),
    (FREEBSD, [5, 4, 7], "came number 7 of another one"),
    (LINUX, [1, 2, 4, 0], "lacks 1 parts"),
    (LINUX, [1, 2, 1], "came number 1 of another one"),
    (LINUX, [1, 2], "stopped after 2 parts"),
]


@pytest.mark.parametrize(("abi", "seqs", "text"), CUT, ids=[row[2] for row in CUT])
def test_cut_dumps(abi: Abi, seqs: list[int], text: str) -> None:
    request = dump(abi, seqs)
    assert isinstance(request.error, DumpOverflow)
    assert text in str(request.error)


def test_a_dump_that_linux_truncates() -> None:
    """The last part says 234, which is -22 in a byte; another message with errno 22 follows."""
    request = dump(LINUX, [1, 2, 0], {2: 234})
    assert isinstance(request.error, DumpOverflow)
    assert "the kernel said EINVAL" in str(request.error)
    talk = conversation()
    whole = ask(talk, Message(M.SPDDUMP, abi=LINUX))
    hear(talk, about(M.SPDDUMP), seq=0, pid=PID)
    talk.end(whole)
    hear(talk, Message(M.SPDDUMP, abi=LINUX), seq=0, pid=PID, errno=22)
    assert talk.take_events() == []


@pytest.mark.parametrize(("number", "name"), [(2, "ENOENT"), (16, "EBUSY")])
def test_a_dump_that_is_refused(number: int, name: str) -> None:
    request = dump(LINUX, [100], {0: number})
    assert isinstance(request.error, KernelError)
    assert request.error.name == name
    assert ("larger buffer" in str(request.error)) == (name == "EBUSY")


@pytest.mark.parametrize(("abi", "seqs"), [(LINUX, UP), (FREEBSD, DOWN)], ids=str)
def test_the_rest_of_a_dump_given_up_ends_with_its_last_part(abi: Abi, seqs: list[int]) -> None:
    talk = conversation(abi)
    request = ask(talk, Message(M.SPDDUMP, abi=abi))
    for seq in seqs[:2]:
        hear(talk, about(M.SPDDUMP, abi=abi), seq=seq, pid=PID)
    assert not talk.rest_of_dump
    talk.end(request)
    for seq in seqs[2:]:
        assert talk.rest_of_dump
        hear(talk, about(M.SPDDUMP, abi=abi), seq=seq, pid=PID)
    assert not talk.rest_of_dump
    assert talk.take_events() == []


def test_a_whole_dump_and_a_refused_one_leave_no_rest() -> None:
    for errno in (0, 2, 16):
        talk = conversation()
        request = ask(talk, Message(M.SPDDUMP, abi=LINUX))
        hear(talk, about(M.SPDDUMP), seq=0, pid=PID, errno=errno)
        assert request.done
        talk.end(request)
        assert not talk.rest_of_dump


def test_broadcasts_between_the_parts_are_events() -> None:
    talk = conversation()
    request = ask(talk, Message(M.SPDDUMP, abi=LINUX))
    hear(talk, about(M.SPDDUMP), seq=1, pid=PID)
    hear(talk, about(M.SPDUPDATE), seq=7, pid=1)
    hear(talk, about(M.SPDDUMP), seq=0, pid=PID)
    assert request.done
    assert [event.type for event in talk.take_events()] == [M.SPDUPDATE]


# What cannot be read, what never ends.


def test_what_is_no_message_is_counted() -> None:
    talk = conversation()
    request = ask(talk, about(M.SPDADD))
    for data in (b"", b"\2", bytes(16), bytes.fromhex("020e0000ffff00000100000001000000")):
        talk.receive(data)
    assert (talk.undecodable, request.done) == (4, False)
    broken = bytearray(encode(about(M.SPDADD).replace(seq=100, pid=PID)))
    broken[16:18] = b"\0\0"
    talk.receive(bytes(broken))
    assert isinstance(request.error, DecodeError)


def test_numbers_wrap_and_are_never_0() -> None:
    talk = Conversation(LINUX, pid=PID, first_seq=0xFFFFFFFE)
    assert [talk.request(about(M.SPDADD)).message.seq for _ in range(4)] == [0xFFFFFFFE, 0xFFFFFFFF, 1, 2]


def test_numbers_start_anywhere() -> None:
    assert len({Conversation(LINUX).request(about(M.SPDADD)).message.seq for _ in range(20)}) > 15


def test_nothing_grows_without_end() -> None:
    talk = conversation()
    for _ in range(_REMEMBERED + 100):
        talk.end(talk.request(Message(M.SPDFLUSH, abi=LINUX)))
    assert len(talk._ended) == _REMEMBERED
    event = encode(Message(M.SPDFLUSH, abi=LINUX))
    for _ in range(_EVENTS + 5):
        talk.receive(event)
    assert talk.lost_events == 0, "as long as nobody reads events nobody misses any"
    assert len(talk.take_events()) == _EVENTS
    assert talk.lost_events == 5
