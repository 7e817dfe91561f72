"""The blocking Kernel over kernels in the process: both error channels, dumps, events, threads, channels of others."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator

import pytest
from faulty import Fault, FaultyChannel, closes, interrupts, loses_reply, loses_request, no_buffers_after_work

from pfkey import (
    Action,
    Channel,
    ChannelClosed,
    Direction,
    DumpOverflow,
    EmbeddedKernel,
    Kernel,
    KernelError,
    Message,
    MessageType,
    NotSupported,
    Policy,
    ReplyTimeout,
    SecurityAssociation,
    Selector,
    connect,
    encode,
)
from pfkey.typed import policy_message

PROFILES = ["linux", "freebsd-12", "freebsd-13", "freebsd-14"]
SITE = Selector("10.1.0.0/16", "10.2.0.0/16")
POLICY = Policy(Direction.OUT, SITE, Action.DISCARD, priority=5)
ADD = MessageType.SPDADD


def site(number: int) -> Selector:
    return Selector(f"10.{number >> 8}.{number & 255}.0/24", "172.16.0.0/12")


@pytest.fixture(params=PROFILES)
def embedded(request: pytest.FixtureRequest) -> EmbeddedKernel:
    return EmbeddedKernel(request.param)


@pytest.fixture(params=["one channel", "two channels"])
def kernel(request: pytest.FixtureRequest, embedded: EmbeddedKernel) -> Iterator[Kernel]:
    events = embedded.connect() if request.param == "two channels" else None
    with connect(embedded.connect(), events=events, timeout=0.3) as kernel:
        yield kernel


def test_policies(kernel: Kernel) -> None:
    added = kernel.add_policy(POLICY)
    assert added.id > 0
    assert kernel.get_policy(added.id).selector == SITE
    with pytest.raises(FileExistsError):
        kernel.add_policy(POLICY)
    updated = kernel.update_policy(Policy(Direction.OUT, SITE, Action.NONE, priority=6))
    assert (updated.id != added.id) is kernel.abi.update_changes_id
    assert [policy.action for policy in kernel.dump_policies()] == [Action.NONE]
    assert kernel.delete_policy(POLICY).id == updated.id
    with pytest.raises(KernelError) as raised:
        kernel.delete_policy(POLICY)
    assert raised.value.name == kernel.abi.absent_policy_error
    with pytest.raises(FileNotFoundError):
        kernel.get_policy(added.id)
    kernel.add_policy(POLICY)
    kernel.flush_policies()
    assert kernel.dump_policies() == []


def test_associations(kernel: Kernel) -> None:
    sa = SecurityAssociation(
        "192.0.2.1",  # type: ignore[arg-type]
        "198.51.100.1",  # type: ignore[arg-type]
        0x10001,
        reqid=7,
        encryption="aes-cbc",
        encryption_key=bytes(range(16)),
        authentication="hmac-sha1",
        authentication_key=bytes(range(20)),
    )
    kernel.add_sa(sa)
    with pytest.raises(FileExistsError):
        kernel.add_sa(sa)
    held = kernel.get_sa(sa)
    assert (held.spi, held.reqid, held.encryption_key, held.authentication) == (
        0x10001,
        7,
        bytes(range(16)),
        "hmac-sha1",
    )
    assert [one.spi for one in kernel.dump_sas()] == [0x10001]
    spi = kernel.get_spi("192.0.2.1", "198.51.100.1")
    assert len(kernel.dump_sas()) == 2
    kernel.delete_sa(sa)
    assert [one.spi for one in kernel.dump_sas()] == [spi]
    kernel.flush_sas()
    assert kernel.dump_sas() == []
    with pytest.raises(ProcessLookupError):
        kernel.get_sa(sa)
    assert kernel.register().encryption
    with pytest.raises(FileExistsError):
        kernel.register()


def test_own_changes_are_no_events_and_those_of_others_are(kernel: Kernel, embedded: EmbeddedKernel) -> None:
    other = connect(embedded.connect())
    kernel.add_policy(POLICY)
    other.delete_policy(POLICY)
    kernel.dump_policies()
    assert [event.type for event in kernel.events(timeout=0.05)] == [MessageType.SPDDELETE]
    assert list(kernel.events(timeout=0)) == []


def test_many_in_order_with_their_errors(kernel: Kernel) -> None:
    kernel.add_policy(Policy(Direction.OUT, site(3), Action.DISCARD))
    wanted = [
        policy_message(ADD, Policy(Direction.OUT, site(number), Action.DISCARD), kernel.abi) for number in range(100)
    ]
    answers = kernel.request_many(wanted)
    assert [number for number, answer in enumerate(answers) if isinstance(answer, FileExistsError)] == [3]
    assert [answer.source for answer in answers if isinstance(answer, Message)] == [
        message.source for number, message in enumerate(wanted) if number != 3
    ]


# What goes wrong.


class Bare:
    """A channel that has what the Protocol asks for and nothing else."""

    def __init__(self, inner: Channel) -> None:
        self.abi = inner.abi
        self.send = inner.send
        self.receive = inner.receive
        self.fileno = inner.fileno
        self.close = inner.close


def test_a_plugged_in_channel_needs_no_more_than_the_protocol(embedded: EmbeddedKernel) -> None:
    channel = Bare(embedded.connect())
    assert isinstance(channel, Channel)
    with connect(channel) as kernel:
        answers = kernel.request_many(
            policy_message(ADD, Policy(Direction.OUT, site(number), Action.DISCARD), kernel.abi) for number in range(40)
        )
        assert all(isinstance(answer, Message) for answer in answers)
        assert len(kernel.dump_policies()) == 40


@pytest.mark.parametrize("profile", PROFILES[1:])
def test_a_dump_over_the_receive_buffer(profile: str) -> None:
    """FreeBSD drops what does not fit in silence: a larger buffer is asked for; else the list is not called whole."""
    embedded = EmbeddedKernel(profile)
    with connect(embedded.connect()) as kernel:
        for number in range(300):
            kernel.add_policy(Policy(Direction.OUT, site(number), Action.DISCARD, priority=number))
        assert len(kernel.dump_policies()) == 300
    begun = time.monotonic()
    with connect(Bare(embedded.connect()), timeout=10) as kernel, pytest.raises(DumpOverflow) as raised:
        kernel.dump_policies()
    assert time.monotonic() - begun < 8, "what a kernel queued at once is not waited for as long as an answer"
    assert "too small for it; its channel has no set_receive_buffer(size)" in str(raised.value)


def test_a_channel_that_stalls_in_a_dump_is_given_time_by_a_longer_timeout() -> None:
    """What a FreeBSD queued at once may come from afar: a second is not the most that a caller can wait for it."""
    channel = Bare(EmbeddedKernel("freebsd-13").connect())
    given, over = channel.receive, 0.0

    def receive(timeout: float | None) -> bytes | None:
        """The first part, then nothing for a while."""
        nonlocal over
        left = over - time.monotonic()
        if over and left > 0:
            time.sleep(left if timeout is None else min(left, timeout))
            return None
        data = given(timeout)
        if data is not None and data[1] == MessageType.SPDDUMP and not over:
            over = time.monotonic() + 1.2
        return data

    with connect(channel, timeout=30) as kernel:
        for number in range(3):
            kernel.add_policy(Policy(Direction.OUT, site(number), Action.DISCARD, priority=number))
        channel.receive = receive
        assert len(kernel.dump_policies()) == 3


@pytest.mark.parametrize("profile", PROFILES[1:])
def test_a_part_of_another_dump_among_those_of_this(profile: str) -> None:
    """One that came late, of a dump that was given up: this one is asked for again, with the buffer that there is."""
    embedded = EmbeddedKernel(profile)
    channel = Bare(embedded.connect())
    kernel = connect(channel, timeout=5)
    for number in range(5):
        kernel.add_policy(Policy(Direction.OUT, site(number), Action.DISCARD, priority=number))
    arrived: list[bytes] = []
    given = channel.receive

    def receive(timeout: float | None) -> bytes | None:
        if len(arrived) == 1:  # the first part comes once more
            arrived.append(arrived[0])
            return arrived[0]
        data = given(timeout)
        if data is not None and data[1] == MessageType.SPDDUMP:
            arrived.append(data)
        return data

    channel.receive = receive
    assert len(kernel.dump_policies()) == 5
    assert len(arrived) > 6


@pytest.fixture
def faulty(embedded: EmbeddedKernel) -> FaultyChannel:
    return FaultyChannel(embedded.connect())


def test_no_answer(faulty: FaultyChannel) -> None:
    kernel = connect(faulty, timeout=0.1)
    faulty.faults.append(Fault(ADD, loses_request))
    with pytest.raises(ReplyTimeout, match=r"SPDADD of out .*: no answer from .* in 0\.1 seconds") as raised:
        kernel.add_policy(POLICY)
    assert raised.value.request.type == ADD
    kernel.add_policy(POLICY)


def test_a_late_answer_is_not_taken_for_the_next(faulty: FaultyChannel) -> None:
    kernel = connect(faulty, timeout=0.1)
    kept: list[bytes] = []

    def delays(channel: FaultyChannel, data: bytes) -> None:
        channel.inner.send(data)
        while (answer := channel.inner.receive(0.05)) is not None:
            kept.append(answer)

    faulty.faults.append(Fault(ADD, delays))
    with pytest.raises(ReplyTimeout):
        kernel.add_policy(POLICY)
    faulty.answers.extend(kept)
    assert kernel.add_policy(Policy(Direction.OUT, site(1), Action.NONE)).action == Action.NONE
    assert list(kernel.events(timeout=0)) == []


def test_no_buffers_may_come_after_the_work(faulty: FaultyChannel) -> None:
    kernel = connect(faulty, timeout=0.1)
    faulty.faults.append(Fault(ADD, no_buffers_after_work))
    with pytest.raises(KernelError, match="may have done it all the same") as raised:
        kernel.add_policy(POLICY)
    assert (raised.value.name, raised.value.outcome_unknown) == ("ENOBUFS", True)
    assert len(kernel.dump_policies()) == 1


# (the errno that a channel raises, the name, per system): a remote kernel's own number or this host's
NUMBERS = [
    ("freebsd-12", 55, "ENOBUFS"),
    ("freebsd-12", errno.ENOBUFS, "ENOBUFS"),
    ("freebsd-12", 43, "EPROTONOSUPPORT"),
    ("linux", errno.EMSGSIZE, "EMSGSIZE"),
    ("linux", errno.EPERM, "EPERM"),
]


@pytest.mark.parametrize(("profile", "number", "name"), NUMBERS)
def test_numbers_of_a_failing_send(profile: str, number: int, name: str) -> None:
    channel = FaultyChannel(EmbeddedKernel(profile).connect())

    def fails(channel: FaultyChannel, data: bytes) -> None:
        raise OSError(number, "it fails")

    channel.faults.append(Fault(ADD, fails))
    with pytest.raises(KernelError) as raised:
        connect(channel).add_policy(POLICY)
    assert raised.value.name == name
    assert raised.value.outcome_unknown is (name == "ENOBUFS")
    assert raised.value.errno == getattr(errno, name)
    assert raised.value.request.type == ADD


def test_a_channel_that_closes(faulty: FaultyChannel) -> None:
    kernel = connect(faulty)
    faulty.faults.append(Fault(ADD, closes))
    with pytest.raises(ChannelClosed) as raised:
        kernel.add_policy(POLICY)
    assert raised.value.request.type == ADD
    with pytest.raises(ChannelClosed):
        kernel.dump_policies()


def test_a_channel_that_closes_while_an_answer_is_awaited(embedded: EmbeddedKernel) -> None:
    channel = FaultyChannel(embedded.connect())
    kernel = connect(channel)
    channel.faults.append(Fault(ADD, loses_reply))
    closer = threading.Timer(0.1, channel.close)
    closer.start()
    with pytest.raises(ChannelClosed, match=r"SPDADD of out .* was sent, then the channel closed") as raised:
        kernel.add_policy(POLICY)
    closer.join()
    assert raised.value.request.type == ADD


def test_control_c_leaves_nothing_pending(faulty: FaultyChannel) -> None:
    kernel = connect(faulty)
    faulty.faults.append(Fault(ADD, interrupts))
    with pytest.raises(KeyboardInterrupt):
        kernel.add_policy(POLICY)
    assert kernel._link.conversation._pending == {}
    assert len(kernel.dump_policies()) == 1
    assert list(kernel.events(timeout=0)) == []


def test_stale_messages_are_read_first(embedded: EmbeddedKernel) -> None:
    channel = embedded.connect()
    with connect(channel) as kernel:
        stranger = connect(embedded.connect())
        for _ in range(50):
            stranger.add_policy(POLICY)
            stranger.delete_policy(POLICY)
        assert kernel.add_policy(POLICY).id > 0


def test_threads_share_a_kernel(kernel: Kernel) -> None:
    errors: list[BaseException] = []

    def work(base: int) -> None:
        try:
            for number in range(base, base + 30):
                policy = kernel.add_policy(Policy(Direction.OUT, site(number), Action.DISCARD))
                assert policy.selector == site(number)
                kernel.delete_policy(policy)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(1000 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    assert list(kernel.events(timeout=0.2)) == []
    for thread in threads:
        thread.join(60)
    assert errors == []


def test_an_acquire_is_sent_and_not_waited_for(kernel: Kernel) -> None:
    message = Message(MessageType.ACQUIRE, abi=kernel.abi, satype=3, errno=1)
    kernel.send(message)
    with pytest.raises(NotSupported, match="use send"):
        kernel.request(message)
    assert kernel.dump_policies() == []


@pytest.mark.parametrize("target", ["embedded:plan9", "embedded:", "netlink", "native:x"])
def test_kernels_that_do_not_exist(target: str) -> None:
    with pytest.raises(NotSupported):
        connect(target)


def test_every_answer_is_a_message(kernel: Kernel) -> None:
    """The raw way: what `request` returns is what the kernel said, byte for byte."""
    reply = kernel.request(policy_message(ADD, POLICY, kernel.abi))
    assert encode(reply)[1] == ADD
