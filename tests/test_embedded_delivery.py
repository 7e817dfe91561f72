"""Who receives what, and what a full receive buffer loses, system by system."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterable
from ipaddress import ip_address
from typing import Any

import pytest
from embedded_client import ALL, FREEBSD, KAME, LINUX, OLDER, OUT, Client, discard, esp

from pfkey import (
    ChannelClosed,
    DumpOverflow,
    ExtensionType,
    Message,
    MessageType,
    SAProtocol,
    SecurityAssociation,
    Selector,
    connect,
    decode,
    encode,
)
from pfkey.embedded import EmbeddedKernel
from pfkey.messages import PolicyExtension
from pfkey.typed import policy_message

LOSING = [name for name in KAME if name != "netbsd"]
ADD, DUMP, GET = MessageType.SPDADD, MessageType.SPDDUMP, MessageType.SPDGET


@pytest.fixture(params=ALL)
def client(request: pytest.FixtureRequest) -> Client:
    return Client(request.param)


def only(*profiles: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("client", profiles, indirect=True)


def many(count: int) -> Iterable[Selector]:
    return (Selector(f"10.{n // 256}.{n % 256}.0/24", "10.200.0.0/16") for n in range(count))


def types(messages: Iterable[Message]) -> list[int]:
    return [message.type for message in messages]


# Who receives what.


def test_everybody_hears_of_a_change_and_of_nothing_else(client: Client) -> None:
    listener = client.kernel.connect()
    client.add(discard())
    client.update(esp())
    client.apply(ADD, discard())
    client.ask(DUMP)
    client.ask(GET, {ExtensionType.POLICY: PolicyExtension(0, OUT, 1)})
    client.apply(MessageType.SPDDELETE, discard())
    heard = client.received(listener)
    assert types(heard) == [ADD, MessageType.SPDUPDATE, MessageType.SPDDELETE]
    assert [(message.seq, message.pid) for message in heard] == [(1, 99), (2, 99), (6, 99)]


def test_a_flush_of_nothing_is_news_on_freebsd(client: Client) -> None:
    listener = client.kernel.connect()
    client.ask(MessageType.SPDFLUSH)
    client.ask(MessageType.FLUSH)
    silent = client.abi.name == "linux"
    assert types(client.received(listener)) == ([] if silent else [MessageType.SPDFLUSH, MessageType.FLUSH])


def test_registering(client: Client) -> None:
    """The answer goes to the sender and to those who registered before; twice is once too often."""
    first, second = client.kernel.connect(), client.kernel.connect()
    for channel in (first, second):
        client.send(client.build(MessageType.REGISTER, satype=3), channel)
    assert len(client.received(first)) == 2
    assert len(client.received(second)) == 1
    client.send(client.build(MessageType.REGISTER, satype=3), first)
    assert [client.error(message) for message in client.received(first)] == ["EEXIST"]
    client.send(client.build(MessageType.REGISTER, satype=2), first)
    assert [client.error(message) for message in client.received(first)] == [""]
    assert client.received() == []


def test_asking_for_algorithms_does_not_register(client: Client) -> None:
    answer = client.ask(MessageType.REGISTER)
    assert ExtensionType.SUPPORTED_AUTH in answer.extensions
    assert not client.channel.registered


@only(*KAME)
def test_freebsd_wraps_copies_for_the_promiscuous(client: Client) -> None:
    curious = client.kernel.connect()
    client.send(client.build(MessageType.PROMISC, satype=1), curious)
    assert len(curious.receive_many(9, 0)) == 2
    client.received()
    client.add(discard())
    copies = []
    while (data := curious.receive(0)) is not None:
        copies.append(data)
    assert len(copies) == 2
    wrapped, plain = copies
    assert (wrapped[1], wrapped[16:]) == (MessageType.PROMISC, plain)
    assert wrapped[6:16] == bytes(10)
    assert wrapped[4:6] == (len(wrapped) // 8).to_bytes(2, "little")
    client.ask(DUMP)
    assert curious.receive(0) is not None
    assert curious.receive(0) is None


@only(*KAME)
def test_freebsd_relays_what_follows_a_promisc_header(client: Client) -> None:
    """Which must look like extensions all the same: a whole message in there does not get through."""
    listener, inner = client.kernel.connect(), client.kernel.wire.sa2(1, 7)
    client.send(client.kernel.wire.message(MessageType.PROMISC, 0, 1, 2, inner))
    assert [listener.receive(0), client.channel.receive(0)] == [inner, inner]
    message = encode(client.build(MessageType.SPDFLUSH))
    assert raw(client, client.kernel.wire.message(MessageType.PROMISC, 0, 1, 2, message)) == "EINVAL"


# What the send itself refuses.


def raw(client: Client, data: bytes) -> str:
    """Send bytes as they are: the name of the error of the send, whose numbers are checked, or ""."""
    failure: Any = None
    try:
        client.channel.send(data)
    except OSError as error:
        failure = error
    if failure is None:
        return ""
    assert failure.errno == getattr(errno, failure.name)
    assert failure.kernel_errno == client.abi.error_numbers[failure.name]
    return str(failure.name)


@only(*KAME)
def test_freebsd_refuses_in_the_send(client: Client) -> None:
    wire = client.kernel.wire
    good = encode(policy_message(ADD, discard(), client.abi))
    assert raw(client, good[:12]) == "EINVAL"
    assert raw(client, good[:-8]) == "EINVAL"
    assert raw(client, good + bytes(8)) == "EINVAL"
    tail = {
        "unknown": wire.small(60, bytes(4)),
        "KMPRIVATE": wire.small(17, bytes(4)),
        "twice": wire.policy(0, 2),
        "length 0": bytes(8),
        "too short": wire.small(ExtensionType.SA2, bytes(4)),
        "too long": wire.sa2(1, 1)[:1] + b"\0" + wire.sa2(1, 1)[2:] + bytes(8),
    }
    tail["too long"] = b"\3\0" + tail["too long"][2:]
    for name, extension in tail.items():
        message = wire.message(ADD, 0, 1, 1, good[16:] + extension)
        assert raw(client, message) == "EINVAL", name
    assert raw(client, wire.message(ADD, 0, 1, 1, good[16:] + b"\2\0\1\0" + bytes(4))) == "ENOBUFS"
    assert raw(client, wire.message(DUMP, 0, 1, 1, wire.policy(0, 2) + bytes(2040))) == "ENOBUFS"
    assert raw(client, wire.message(DUMP, 0, 1, 1, bytes(8192))) == "EMSGSIZE"
    assert (client.received(), client.kernel.policies()) == ([], [])
    assert raw(client, good) == ""


@only(*KAME)
def test_the_limits_of_a_freebsd_message(client: Client) -> None:
    """2048 bytes are parsed, more is ENOBUFS, and what exceeds the send buffer EMSGSIZE."""
    wire = client.kernel.wire
    errors = [raw(client, wire.message(DUMP, 0, 1, 1, bytes(size - 16))) for size in (2048, 2056, 8192, 8200)]
    assert errors == ["EINVAL", "ENOBUFS", "ENOBUFS", "EMSGSIZE"]


@only(*KAME)
@pytest.mark.parametrize(("position", "value"), [(0, 1), (0, 3), (1, 0), (1, 23), (1, 255)])
def test_a_wrong_version_or_type_is_answered_on_freebsd(client: Client, position: int, value: int) -> None:
    data = bytearray(encode(client.build(DUMP)))
    data[position] = value
    assert raw(client, bytes(data)) == ""
    data[2] = 22
    assert client.channel.receive(0) == bytes(data)


@only(*KAME)
def test_freebsd_looks_into_sockaddrs(client: Client) -> None:
    """A length that does not fill the extension is EINVAL from send(), another family is an error reply."""
    good = bytearray(encode(policy_message(ADD, discard(), client.abi)))
    start = good.index(bytes((16, 2)), 32)
    short = bytearray(good)
    short[start] = 8
    assert raw(client, bytes(short)) == "EINVAL"
    for end in (start, start + 24):
        good[end + 1] = 77
    assert raw(client, bytes(good)) == ""
    assert [client.error(message) for message in client.received()] == ["EAFNOSUPPORT"]


# Full buffers.


@only(*LOSING)
def test_a_freebsd_dump_loses_what_does_not_fit(client: Client) -> None:
    """300 policies into the default 8 KB: 99 messages, the last says 201, and nobody says a word (seen on 12.1)."""
    for selector in many(300):
        client.add(discard(selector))
    client.received()
    client.send(client.build(DUMP))
    received = client.received()
    assert (len(received), received[0].seq, received[-1].seq) == (99, 299, 201)
    assert client.channel.dropped == 201
    assert client.channel.set_receive_buffer(262144) == 262144
    client.send(client.build(DUMP))
    assert [message.seq for message in client.received()] == list(range(299, -1, -1))


@only("netbsd")
def test_a_netbsd_dump_comes_whole_or_not_at_all(client: Client) -> None:
    """It may exceed the buffer; where there is no room left at all, the error still gets through."""
    for selector in many(300):
        client.add(discard(selector))
    client.received()
    client.send(client.build(DUMP))
    assert not client.channel.has_room
    client.send(client.build(DUMP))
    *received, refused = client.received()
    assert [message.seq for message in received] == list(range(299, -1, -1))
    assert (refused.type, client.error(refused), client.channel.dropped) == (DUMP, "ENOBUFS", 0)
    assert raw(client, encode(client.build(DUMP))) == ""


@only(*KAME)
def test_the_face_notices_the_gap_and_asks_again(client: Client) -> None:
    for selector in many(300):
        client.add(discard(selector))
    with connect(client.kernel.connect(), timeout=0.1) as kernel:
        assert len(kernel.dump_policies()) == 300


@only(*LOSING)
def test_an_overflow_that_stays_is_an_error(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    for selector in many(300):
        client.add(discard(selector))
    channel = client.kernel.connect()
    monkeypatch.setattr(channel, "set_receive_buffer", lambda size: 8192)
    with connect(channel, timeout=0.1) as kernel, pytest.raises(DumpOverflow):
        kernel.dump_policies()


@only(*KAME)
def test_a_reply_without_room_is_enobufs_after_the_work(client: Client) -> None:
    data = [encode(policy_message(ADD, discard(selector), client.abi)) for selector in many(100)]
    assert [raw(client, one) for one in data] == [""] * 99 + ["ENOBUFS"]
    assert len(client.kernel.policies()) == 100
    assert len(client.received()) == 99


@only(*OLDER)
def test_a_deaf_listener_fails_the_send_of_others_on_older_ones(client: Client) -> None:
    """The policy is added; the sender, and whoever comes later in the list, hears nothing (seen on 11-CURRENT)."""
    last, deaf = client.channel, client.kernel.connect()
    deaf.set_receive_buffer(0)
    first = client.kernel.connect()
    assert raw(client, encode(policy_message(ADD, discard(), client.abi))) == "ENOBUFS"
    assert [len(client.received(channel)) for channel in (first, deaf, last)] == [1, 0, 0]
    assert len(client.kernel.policies()) == 1
    deaf.close()
    client.update(esp())


@only(*FREEBSD)
def test_others_lose_broadcasts_without_a_word(client: Client) -> None:
    deaf = client.kernel.connect()
    for selector in many(120):
        client.add(discard(selector))
    assert (len(client.received(deaf)), deaf.dropped) == (99, 21)


@only(*KAME)
def test_the_limit_of_a_freebsd_receive_buffer(client: Client) -> None:
    with pytest.raises(OSError, match="limit"):
        client.channel.set_receive_buffer(2 << 20)
    assert client.channel.set_receive_buffer(1 << 20) == 1 << 20
    assert client.channel.in_flight == (1 << 20) // 2560


@only(*LINUX)
def test_a_full_linux_buffer_loses_replies_in_silence(client: Client) -> None:
    """167 policy messages fit the default buffer; all the work is done (seen on 6.1)."""
    listener = client.kernel.connect()
    for selector in many(400):
        client.send(policy_message(ADD, esp(selector=selector), client.abi))
    assert (len(client.received()), len(client.received(listener))) == (167, 167)
    assert len(client.kernel.policies()) == 400


@only(*LINUX)
def test_headers_take_less_of_a_linux_buffer(client: Client) -> None:
    for _ in range(400):
        client.send(client.build(GET, {ExtensionType.POLICY: PolicyExtension(0, OUT, 1000)}))
    assert len(client.received()) == 278


@only(*LINUX)
def test_a_linux_dump_waits_for_its_reader(client: Client) -> None:
    for selector in many(400):
        client.add(esp(selector=selector))
    client.received()
    client.send(client.build(DUMP))
    client.send(client.build(DUMP))
    client.send(client.build(MessageType.DUMP))
    received = client.received()
    errors = [message for message in received if message.errno]
    dumped = [message for message in received if not message.errno]
    assert [client.error(message) for message in errors] == ["EBUSY", "EBUSY"]
    assert [message.seq for message in dumped] == [*range(1, 400), 0]
    assert client.channel.dropped == 0
    client.send(client.build(DUMP))
    assert len(client.received()) == 400


@only(*LINUX)
def test_what_a_waiting_dump_misses(client: Client) -> None:
    """What is updated, added or deleted before its turn came is not listed."""
    selectors = list(many(400))
    for selector in selectors:
        client.add(discard(selector))
    client.received()
    other = client.kernel.connect()
    client.send(client.build(DUMP))
    client.send(policy_message(MessageType.SPDUPDATE, esp(selector=selectors[0]), client.abi), other)
    client.send(policy_message(MessageType.SPDDELETE, discard(selectors[1]), client.abi), other)
    client.send(policy_message(ADD, discard(Selector("10.99.0.0/16", "10.200.0.0/16")), client.abi), other)
    sources = [str(message.source.address) for message in client.received() if message.type == DUMP and message.source]
    assert len(sources) == 398
    assert not {"10.0.0.0", "10.0.1.0", "10.99.0.0"} & set(sources)


@only(*LINUX)
def test_so_rcvbuf_is_doubled_on_linux(client: Client) -> None:
    assert client.channel.set_receive_buffer(1000) == 2304
    assert client.channel.set_receive_buffer(1 << 20) == 2 << 20
    assert client.channel.receive_buffer == 2 << 20


@only(*LINUX)
def test_closing_in_the_middle_of_a_dump(client: Client) -> None:
    for selector in many(400):
        client.add(discard(selector))
    channel = client.kernel.connect()
    client.send(client.build(DUMP), channel)
    channel.close()
    assert len(client.kernel.channels) == 1


# Connections.


def test_receive_waits_and_times_out(client: Client) -> None:
    begin = time.monotonic()
    assert client.channel.receive(0.05) is None
    assert 0.04 < time.monotonic() - begin < 2
    assert client.channel.fileno() == -1


def test_receive_wakes_up_for_a_message(client: Client) -> None:
    listener, got = client.kernel.connect(), []
    thread = threading.Thread(target=lambda: got.append(listener.receive(10)))
    thread.start()
    time.sleep(0.02)
    client.add(discard())
    thread.join(5)
    assert [decode(data, client.abi).type for data in got if data] == [ADD]


def test_close_wakes_up_a_reader(client: Client) -> None:
    channel, raised = client.kernel.connect(), []

    def read() -> None:
        with pytest.raises(ChannelClosed, match="closed") as info:
            channel.receive(None)
        raised.append(info)

    thread = threading.Thread(target=read)
    thread.start()
    time.sleep(0.02)
    channel.close()
    channel.close()
    thread.join(5)
    assert len(raised) == 1
    with pytest.raises(ChannelClosed):
        channel.send(encode(client.build(DUMP)))
    with pytest.raises(ChannelClosed):
        channel.receive(0)
    client.add(discard())


def test_many_at_once(client: Client) -> None:
    data = [encode(policy_message(ADD, discard(selector), client.abi)) for selector in many(20)]
    assert client.channel.send_many(data) == 20
    assert len(client.channel.receive_many(15, 0)) == 15
    assert len(client.channel.receive_many(100, 0)) == 5
    assert client.channel.receive_many(1, 0.01) == []
    assert client.channel.send_many([data[0], b"", data[1]]) == 1
    with pytest.raises(OSError, match=r"E(INVAL|MSGSIZE)"):
        client.channel.send_many([b"", data[0]])


def test_several_threads(client: Client) -> None:
    """Each works through its own connection; nothing is lost and no two policies share an id."""
    selectors = list(many(200))
    client.channel.set_receive_buffer(1 << 20)

    def work(part: list[Selector]) -> None:
        channel = client.kernel.connect()
        channel.set_receive_buffer(1 << 20)  # for what the others do meanwhile
        with connect(channel) as kernel:
            for selector in part:
                kernel.update_policy(kernel.add_policy(discard(selector, 0)))

    threads = [threading.Thread(target=work, args=(selectors[n::4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    policies = client.kernel.policies()
    assert len({policy.id for policy in policies}) == len({policy.selector for policy in policies}) == 200


def test_two_kernels_know_nothing_of_each_other() -> None:
    first, second = EmbeddedKernel("linux"), EmbeddedKernel("linux")
    with connect(first.connect()) as kernel:
        kernel.add_policy(discard())
    assert (len(first.policies()), second.policies()) == (1, [])
    assert repr(first) == "<EmbeddedKernel linux: 1 policies, 0 SAs>"


def test_keys_do_not_show(client: Client) -> None:
    with connect(client.kernel.connect()) as kernel:
        kernel.add_sa(
            SecurityAssociation(
                ip_address("10.0.0.1"),
                ip_address("10.0.0.2"),
                0x1000,
                SAProtocol.ESP,
                encryption="aes-cbc",
                encryption_key=b"0123456789abcdef",
            )
        )
    (sa,) = client.kernel.associations()
    assert sa.encryption_key == b"0123456789abcdef"
    texts = (repr(sa), repr(client.kernel), repr(list(client.kernel.sad)))
    assert not any(needle in text for text in texts for needle in ("0123456789abcdef", "3031323334"))
