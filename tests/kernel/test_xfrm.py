"""The channel over NETLINK_XFRM answers as af_key does: on this host's kernel, and in user-mode Linux beside af_key."""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from ipaddress import ip_address

import embedded_corpus
import pytest
from scenarios import SCENARIOS, Scenario, run

from pfkey import (
    Action,
    Channel,
    ChannelClosed,
    Direction,
    KernelError,
    Level,
    Lifetime,
    Message,
    MessageType,
    Policy,
    SecurityAssociation,
    Selector,
    Template,
    connect,
    encode,
)
from pfkey.channel import NativeChannel
from pfkey.typed import policy_message

from .network import namespace
from .race import missing_xfrm
from .xfrm import XfrmChannel

OUT = Direction.OUT
SITE = Selector("10.1.0.0/16", "10.2.0.0/16")
TUNNEL = Template.tunnel("192.0.2.1", "198.51.100.1", reqid=7)
LIKE_AF_KEY = (
    "short messages",
    "header faults",
    "length faults",
    "types the kernel sends",
    "address extensions",
    "types and directions",
    "modes and levels",
    "protocols",
    "addresses of requests",
    "actions",
    "identity",
    "updates",
    "SA types on policies",
)
"""The recorded scenarios that are about policies, have no SADB_REGISTER in them, and damage no extension."""


@pytest.fixture(params=["host", pytest.param("uml", marks=pytest.mark.real_kernel)])
def channel(request: pytest.FixtureRequest, _own_namespace: None) -> Iterator[Callable[[], XfrmChannel]]:
    """Makes connections to one empty SPD."""
    opened: list[XfrmChannel] = []

    def connect_channel() -> XfrmChannel:
        opened.append(XfrmChannel())
        return opened[-1]

    if request.param == "host":
        reason = missing_xfrm()
        if reason:
            pytest.skip(reason)
        with namespace():
            yield connect_channel
    else:
        yield connect_channel
    for one in opened:
        one.close()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_scenario(scenario: Scenario, channel: Callable[[], XfrmChannel]) -> None:
    run(scenario, connect(channel()))


class Connection:
    """A channel with the members that the player of recorded scenarios wants."""

    def __init__(self, channel: XfrmChannel) -> None:
        self.channel = channel

    def put(self, data: bytes) -> str | None:
        try:
            self.channel.send(data)
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        return None

    def get(self) -> bytes | None:
        return self.channel.receive(0)

    def close(self) -> None:
        self.channel.close()


def comparable(data: bytes) -> bytes:
    """Without the count of references, the ids that a kernel numbers on and on, and times."""
    masked, offset = bytearray(embedded_corpus.timeless(data)), 16
    masked[6:8] = bytes(2)
    while offset + 4 <= len(masked):
        words, kind = struct.unpack_from("<HH", masked, offset)
        if kind == 18:
            masked[offset + 8 : offset + 12] = bytes(4)
        offset += words * 8
    return bytes(masked)


@pytest.mark.skipif(sys.byteorder == "big", reason="the recordings are of a little-endian machine")
@pytest.mark.parametrize("name", LIKE_AF_KEY)
def test_the_answers_are_those_that_af_key_gave(name: str, channel: Callable[[], XfrmChannel]) -> None:
    """What a real Linux 6.1 answered to the same messages; the embedded kernel gives the same too."""
    recorded = json.loads(embedded_corpus.RECORDED.read_text())[name]
    answers = embedded_corpus.play(name, lambda: Connection(channel()), lambda seconds: None)
    steps = embedded_corpus.SCENARIOS[name]
    assert len(steps) == len(recorded) > 3
    for step, (error, heard), (our_error, ours) in zip(steps, recorded, answers, strict=True):
        theirs, mine = (
            {who: [comparable(bytes.fromhex(one)) for one in messages] for who, messages in of.items()}
            for of in (heard, ours)
        )
        assert (our_error, mine) == (error, theirs), f"after {step[0]} by {step[1]}: {step[2]!r}"


def test_it_is_a_channel(channel: Callable[[], XfrmChannel]) -> None:
    assert isinstance(channel(), Channel)


def test_what_netlink_stores_without_enforcing_it_comes_back(channel: Callable[[], XfrmChannel]) -> None:
    """A tag in the hard limits of packets and bytes: kept by an add, by an update, and in a dump."""
    kernel = connect(channel())
    for store, tag in ((kernel.add_policy, 0x706B), (kernel.update_policy, 0xFFFFFFFF)):
        wanted = Policy(OUT, SITE, templates=(TUNNEL,), lifetime_hard=Lifetime(tag, tag << 31))
        stored = store(wanted)
        assert stored.lifetime_hard == Lifetime(tag, tag << 31)
        assert [policy.lifetime_hard for policy in kernel.dump_policies()] == [stored.lifetime_hard]
        assert kernel.get_policy(stored.id) == stored


def test_a_level_unique_without_a_reqid_gets_one_that_nobody_has(channel: Callable[[], XfrmChannel]) -> None:
    kernel, other = connect(channel()), connect(channel())
    wanted = Template.tunnel("192.0.2.1", "198.51.100.1", level=Level.UNIQUE)
    reqids = [
        one.add_policy(Policy(OUT, Selector(f"10.{number}.0.0/16", "10.2.0.0/16"), templates=(wanted,))).templates[0]
        for number, one in enumerate((kernel, other, kernel))
    ]
    assert [template.reqid for template in reqids] == [16384, 16385, 16386]


def test_others_hear_what_somebody_does(channel: Callable[[], XfrmChannel]) -> None:
    kernel, other = connect(channel()), connect(channel())
    policy = kernel.add_policy(Policy(OUT, SITE, Action.DISCARD, priority=3))
    kernel.update_policy(Policy(OUT, SITE, templates=(TUNNEL,)))
    kernel.delete_policy(policy)
    events = list(other.events(0))
    assert [event.type for event in events] == [MessageType.SPDADD, MessageType.SPDUPDATE, MessageType.SPDDELETE]
    assert {event.pid for event in events} == {os.getpid()}
    assert [event.policy.id for event in events if event.policy] == [policy.id] * 3
    assert list(kernel.events(0)) == []


def test_a_dump_is_whole_whatever_goes_on(channel: Callable[[], XfrmChannel]) -> None:
    kernel, other = connect(channel()), connect(channel())
    sites = [Selector(f"10.{n >> 8}.{n & 255}.0/24", "172.16.0.0/12") for n in range(1000)]
    for selector in sites:
        other.add_policy(Policy(OUT, selector, Action.DISCARD))
    for number in range(5):
        kernel.add_policy(Policy(Direction.IN, sites[number], Action.NONE))
        assert len(kernel.dump_policies()) == 1001 + number


def test_every_channel_of_a_process_gets_its_answers(channel: Callable[[], XfrmChannel]) -> None:
    """Netlink numbers the first socket of a process like the process, and the others otherwise."""
    kernels = [connect(channel(), timeout=1) for _ in range(3)]
    policy = kernels[0].add_policy(Policy(OUT, SITE, templates=(TUNNEL,)))
    for kernel in kernels:
        assert kernel.get_policy(policy.id) == policy
        assert list(kernel.dump_policies()) == [policy]
        assert kernel.update_policy(policy).id == policy.id


def test_it_is_readable_as_long_as_there_is_something(channel: Callable[[], XfrmChannel]) -> None:
    """What it refuses itself, without asking the kernel, and what arrives in one piece with something else, too."""
    one = channel()

    def is_readable() -> bool:
        return bool(select.select([one.fileno()], [], [], 0)[0])

    assert not is_readable()
    one.send(encode(Message(MessageType.ADD, abi=one.abi, seq=1, pid=9)))
    for number in range(3):
        policy = Policy(OUT, Selector(f"10.{number}.0.0/16", "10.0.0.0/8"), Action.DISCARD)
        one.send(encode(policy_message(MessageType.SPDADD, policy, one.abi)))
    said = 0
    while is_readable():
        said += one.receive(0) is not None
    assert said == 4
    assert one.receive(0) is None


def test_a_reader_hears_what_another_thread_asks(channel: Callable[[], XfrmChannel]) -> None:
    """It sleeps in the kernel while the request is refused without it."""
    one = channel()
    heard: list[bytes | None] = []
    reader = threading.Thread(target=lambda: heard.append(one.receive(20)))
    reader.start()
    one.send(encode(Message(MessageType.ADD, abi=one.abi, seq=7, pid=9)))
    reader.join(20)
    assert [data and (data[1], data[2]) for data in heard] == [(MessageType.ADD, errno.EOPNOTSUPP)]


def test_two_dumps_at_once_are_refused(channel: Callable[[], XfrmChannel]) -> None:
    one = channel()
    connect(channel()).add_policy(Policy(OUT, SITE, Action.DISCARD))
    for seq in (1, 2):
        one.send(encode(Message(MessageType.SPDDUMP, abi=one.abi, seq=seq, pid=9)))
    first = [one.receive(1), one.receive(1)]
    assert sorted(data[2] for data in first if data) == [0, errno.EBUSY]
    assert len(connect(one).dump_policies()) == 1


def test_what_was_lost_is_said(channel: Callable[[], XfrmChannel]) -> None:
    """A receive buffer that is too small for what others do: the next reader is told, and goes on afterwards."""
    deaf, busy = channel(), connect(channel())
    deaf._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    for number in range(50):
        busy.update_policy(Policy(OUT, SITE, Action.DISCARD, priority=number))
    with pytest.raises(OSError, match="No buffer space") as raised:
        while deaf.receive(0) is not None:
            pass
    assert raised.value.errno == errno.ENOBUFS
    assert [policy.priority for policy in connect(deaf).dump_policies()] == [49]


def test_security_associations_are_not_for_it(channel: Callable[[], XfrmChannel]) -> None:
    sa = SecurityAssociation(ip_address("192.0.2.1"), ip_address("192.0.2.2"), 0x1234, encryption="null")
    with pytest.raises(KernelError, match="EOPNOTSUPP"):
        connect(channel()).add_sa(sa)


def test_it_takes_privileges(channel: Callable[[], XfrmChannel]) -> None:
    child = os.fork()
    if not child:
        code = 1
        try:
            os.setuid(65534)
            connect(XfrmChannel()).dump_policies()
        except PermissionError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def test_a_closed_channel_says_so(channel: Callable[[], XfrmChannel]) -> None:
    one = channel()
    one.close()
    assert one.fileno() == -1
    with pytest.raises(ChannelClosed):
        one.receive(0)
    with pytest.raises(ChannelClosed):
        one.send(bytes(16))


# Beside af_key: one SPD, two ways to it.


@pytest.mark.real_kernel
def test_af_key_and_netlink_are_two_ways_to_one_database() -> None:
    """Whoever makes a change, both sides read the same and both hear the same, byte for byte."""
    ways = connect(NativeChannel()), connect(XfrmChannel())
    ears = NativeChannel(), XfrmChannel()

    def heard() -> list[bytes]:
        told = [[comparable(data) for data in _everything(ear)] for ear in ears]
        assert told[0] == told[1]
        return told[0]

    selectors = (SITE, Selector("2001:db8::/32", "::/0", protocol="tcp", destination_port=443), SITE.reversed())
    for kernel in ways:
        for direction, selector in zip((OUT, Direction.FWD, Direction.IN), selectors, strict=True):
            for policy in _lives(direction, selector):
                stored = kernel.add_policy(policy)
                assert [_timeless(list(way.dump_policies())) for way in ways] == [_timeless([stored])] * 2
                assert [_timeless([way.get_policy(stored.id)]) for way in ways] == [_timeless([stored])] * 2
                kernel.update_policy(Policy(direction, selector, Action.NONE, priority=77))
                kernel.delete_policy(policy)
                assert [message[1] for message in heard()] == [14, 13, 15]
        kernel.add_policy(Policy(OUT, SITE, Action.DISCARD))
        kernel.flush_policies()
        assert [message[1] for message in heard()] == [14, 19]
    for closing in (*ways, *ears):
        closing.close()


def _everything(channel: Channel) -> list[bytes]:
    said = []
    while (data := channel.receive(0)) is not None:
        said.append(data)
    return said


def _lives(direction: Direction, selector: Selector) -> Iterator[Policy]:
    """Tunnels of the selector's own family: af_key of 6.1 says a wrong length for a transport behind another one."""
    limits = Lifetime(1, 2, 300, 400), Lifetime(5, 6, 70, 80)
    tunnel = TUNNEL if selector.version == 4 else Template.tunnel("2001:db8::1", "2001:db8::2", reqid=7)
    yield Policy(direction, selector, Action.DISCARD, priority=4)
    yield Policy(direction, selector, templates=(tunnel, Template.transport()), priority=1 << 31)
    yield Policy(direction, selector, templates=(tunnel,), lifetime_hard=limits[0], lifetime_soft=limits[1])


def _timeless(policies: list[Policy]) -> list[tuple[object, ...]]:
    return [
        (one.direction, one.selector, one.action, one.templates, one.priority, one.id, one.lifetime_hard)
        for one in policies
    ]


def test_the_comparison_would_notice(channel: Callable[[], XfrmChannel]) -> None:
    """One bit of a priority off, and two messages are not the same any more."""
    ear, kernel = channel(), connect(channel())
    for priority in (3, 4):
        kernel.update_policy(Policy(OUT, SITE, Action.DISCARD, priority=priority))
    one, other = (comparable(data) for data in _everything(ear))
    assert one[16:] != other[16:]
