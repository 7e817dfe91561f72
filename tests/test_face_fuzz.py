"""Any bytes, any system: the Python face gives a value or a DecodeError, the embedded kernel answers or refuses.

PFKEY_EXAMPLES says how many examples each test tries.
"""

from __future__ import annotations

import contextlib
import os

import pytest
from embedded_client import ALL
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from wire import EVERYTHING, mirrored

from pfkey import (
    Abi,
    Action,
    DecodeError,
    Direction,
    EmbeddedKernel,
    ExtensionType,
    Message,
    MessageType,
    Policy,
    Selector,
    decode,
    decode_many,
    encode,
)
from pfkey.conversation import Conversation
from pfkey.tables import Messages
from pfkey.typed import (
    association_from,
    describe,
    policy_from,
    policy_message,
    policy_rows,
    selector_from,
    templates_of,
)

EXAMPLES = int(os.environ.get("PFKEY_EXAMPLES", "500"))
# hypothesis keeps what it has tried, 20 KB an example: a million in one go take 20 GB.  Each round begins anew.
ROUND = 10_000
rounds = pytest.mark.parametrize("part", range(-(-EXAMPLES // ROUND)))
long = settings(
    max_examples=min(EXAMPLES, ROUND),
    deadline=None,
    database=None,
    derandomize=False,  # each round tries others
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
NAMES = ("linux", "freebsd-9", "freebsd-12", "freebsd-15", "netbsd", "macos")
ABIS = [Abi.named(f"{name}-{order}") for name in NAMES for order in ("little", "big")]
MESSAGES = [one.data for one in EVERYTHING] + [mirrored(one.data, one.abi) for one in EVERYTHING]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A message of some system with a few bytes changed, something cut off, or two of them behind each other."""
    data = bytearray(draw(st.sampled_from(MESSAGES)))
    for at, value in draw(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4)):
        data[at % len(data)] = value
    return bytes(data[: len(data) - draw(st.integers(0, 40))] if draw(st.booleans()) else data)


def read_all(message: Message) -> None:
    for kind, value in message.extensions.items():
        repr(value)
        assert message.get(kind) == value
    for name in dir(Message):
        if not name.startswith("_") and isinstance(getattr(Message, name), property):
            getattr(message, name)
    assert repr(message)
    assert describe(message)
    assert hash(message) == hash(message.replace(seq=message.seq))


def typed(message: Message, table: Messages) -> None:
    for read in (association_from, selector_from):
        with contextlib.suppress(DecodeError):
            repr(read(message))
    error = None
    try:
        policy = policy_from(message)
    except DecodeError as caught:
        error = caught
    if error is not None:
        with pytest.raises(DecodeError) as again:
            list(policy_rows(table))
        assert str(again.value) == str(error)
        return
    assert eval(repr(policy.selector), {"Selector": Selector}) == policy.selector
    row = next(policy_rows(table))
    assert (row.identity, row.is_plain) == (policy.selector.identity, policy.selector.is_plain)
    assert (row.id, row.action, row.priority, row.scope) == (policy.id, policy.action, policy.priority, policy.scope)
    assert (templates_of(row.requests, message.abi), row.lifetime_hard) == (policy.templates, policy.lifetime_hard)


def readable(data: bytes, abi: Abi) -> bool:
    return isinstance(judged(data, abi), Message)


def judged(data: bytes, abi: Abi) -> Message | DecodeError:
    try:
        return decode(data, abi)
    except DecodeError as error:
        return error


@rounds
@given(st.one_of(st.binary(max_size=200), damaged()), st.sampled_from(ABIS))
@long
def test_any_bytes_are_a_message_or_a_decode_error(part: int, data: bytes, abi: Abi) -> None:
    message = judged(data, abi)
    if isinstance(message, DecodeError):
        with pytest.raises(DecodeError) as again:
            decode_many([data], abi)
        assert str(again.value) == f"message 0 of 1: {message}"
        return
    table = decode_many([data, data], abi)
    read_all(message)
    typed(message, table)
    assert encode(message) == data
    assert encode(table[1]) == data


@rounds
@given(st.lists(st.one_of(st.binary(max_size=64), damaged()), max_size=6), st.sampled_from(ABIS))
@long
def test_a_conversation_takes_anything(part: int, datagrams: list[bytes], abi: Abi) -> None:
    conversation = Conversation(abi, pid=821, first_seq=1)
    request = conversation.request(Message(MessageType.SPDDUMP, abi=abi))
    conversation.request(Message(MessageType.FLUSH, abi=abi, satype=3))
    for data in datagrams:
        conversation.receive(data)
    assert request.done in (True, False)
    conversation.take_events()


KERNELS = {profile: EmbeddedKernel(profile) for profile in ALL}
SPOILED = dict.fromkeys(ALL, 0)
"""How many requests each kernel has had since it took one that is no message for us."""


@rounds
@given(st.sampled_from(ALL), st.one_of(st.binary(max_size=200), damaged()))
@long
def test_any_bytes_are_answered_or_refused(part: int, profile: str, data: bytes) -> None:
    """One kernel lives through all of it; what it says can be read as long as what it was told could.

    FreeBSD takes keys of more bits than bytes and templates that it never looks at, echoes them, and dumps them later.
    """
    kernel = KERNELS[profile]
    channel = kernel.connect()
    SPOILED[profile] += bool(SPOILED[profile]) or not readable(data, kernel.abi)
    try:
        channel.send(data)
    except OSError as error:
        assert error.errno or getattr(error, "name", "")  # noqa: PT017
    answered = False
    while (answer := channel.receive(0)) is not None:
        answered |= not answer[2]
        assert answer[2] or SPOILED[profile] or readable(answer, kernel.abi)
    channel.close()
    if SPOILED[profile] == 1 and not answered:
        SPOILED[profile] = 0  # it was refused
    if len(kernel.spd) > 500 or SPOILED[profile] > 100:
        KERNELS[profile], SPOILED[profile] = EmbeddedKernel(profile), 0


def test_an_echo_that_cannot_be_read_is_a_decode_error() -> None:
    """FreeBSD carries out an SPDDELETE whose templates are rubbish, and its answer has them (found by the fuzzer)."""
    kernel = EmbeddedKernel("freebsd-13")
    channel = kernel.connect()
    policy = Policy(Direction.OUT, Selector("10.1.0.0/16", "10.2.0.0/16"), Action.DISCARD)
    for kind, requests in ((MessageType.SPDADD, b""), (MessageType.SPDDELETE, bytes.fromhex("287d320002030800"))):
        request = policy_message(kind, policy, kernel.abi)
        content = request.raw(ExtensionType.POLICY)[4:] + requests
        channel.send(encode(Message(kind, {**request.extensions, ExtensionType.POLICY: content}, abi=kernel.abi)))
        answer = channel.receive(0)
        assert answer is not None
        assert answer[:3] == bytes((2, kind, 0))
        assert readable(answer, kernel.abi) == (kind == MessageType.SPDADD)
    assert not len(kernel.spd)


def test_a_number_that_no_system_has_comes_through() -> None:
    """Newer than this package: types, extensions, algorithms and flags are numbers, and go out as they came."""
    for abi in ABIS:
        order = abi.byteorder
        sa = (2).to_bytes(2, order) + (1).to_bytes(2, order) + bytes((0, 0, 1, 0, 0, 9, 99, 98)) + bytes(4 * [0xFF])
        new = (1).to_bytes(2, order) + (61).to_bytes(2, order) + b"newX"
        data = bytes((2, 77, 0, 66)) + (5).to_bytes(2, order) + bytes(10) + sa + new
        message = decode(data, abi)
        assert (message.type, message.satype, message.get(61)) == (77, 66, b"newX")
        assert message.sa is not None
        assert (message.sa.state, message.sa.auth, message.sa.encrypt) == (9, 99, 98)
        assert encode(message) == data
        assert encode(Message(77, message.extensions, abi=abi, satype=66)) == data
        assert ExtensionType.SA in message
