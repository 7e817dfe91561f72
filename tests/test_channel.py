"""Channels: the native socket's errors in words, many messages in one call, and doing without."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from pfkey import Abi, ChannelClosed, EmbeddedKernel, KernelError, NotSupported
from pfkey import channel as channels
from pfkey._sockets import Arena, pf_key, send_many
from pfkey.channel import NativeChannel
from pfkey.embedded.channel import EmbeddedChannel
from pfkey.embedded.profiles import profile
from pfkey.tables import Batch


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two sockets that keep messages apart, as a PF_KEY socket does."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, other:
        yield one, other


def received(
    arena: Arena, fd: int, limit: int, timeout: float, *, keep: bool = False
) -> tuple[list[bytes], list[int], int]:
    """The messages, the lengths of those that were cut, errno."""
    found = arena.receive(fd, limit, timeout, keep=keep)
    return list(Batch(found.arena, found.lengths).datagrams()), found.cut, found.error


MESSAGES = [bytes((number & 255,)) * (16 + 8 * (number % 20)) for number in range(100)]


def test_many_in_one_call(pair: tuple[socket.socket, socket.socket]) -> None:
    one, other = pair
    found: list[bytes] = []

    def read() -> None:
        arena = Arena(64, 1024)
        while len(found) < len(MESSAGES):
            whole, cut, error = received(arena, other.fileno(), 64, 5.0)
            assert (cut, error) == ([], 0)
            found.extend(whole)

    reader = threading.Thread(target=read)
    reader.start()
    assert send_many(one.fileno(), MESSAGES) == (len(MESSAGES), 0)
    reader.join(20)
    assert found == MESSAGES


def test_the_limit_is_kept(pair: tuple[socket.socket, socket.socket]) -> None:
    one, other = pair
    send_many(one.fileno(), MESSAGES[:8])
    arena = Arena(64, 1024)
    assert received(arena, other.fileno(), 3, 1.0)[0] == MESSAGES[:3]
    assert received(arena, other.fileno(), 64, 1.0)[0] == MESSAGES[3:8]


def test_what_is_too_long_is_told(pair: tuple[socket.socket, socket.socket]) -> None:
    one, other = pair
    send_many(one.fileno(), [b"a" * 16, b"b" * 100, b"c" * 64])
    whole, cut, error = received(Arena(4, 64), other.fileno(), 4, 1.0)
    assert (whole, error) == ([b"a" * 16, b"c" * 64], 0)
    assert len(cut) == 1
    assert cut[0] > 64


def test_what_is_kept_stays_when_more_comes(pair: tuple[socket.socket, socket.socket]) -> None:
    one, other = pair
    arena = Arena(8, 1 << 20)  # a segment for every call
    kept = []
    for start in range(0, 40, 8):
        send_many(one.fileno(), MESSAGES[start : start + 8])
        kept.append(arena.receive(other.fileno(), 8, 1.0, keep=True))
    found = [data for batch in kept for data in Batch(batch.arena, batch.lengths).datagrams()]
    assert found == MESSAGES[:40]


def test_the_timeout(pair: tuple[socket.socket, socket.socket]) -> None:
    started = time.monotonic()
    assert received(Arena(4, 64), pair[1].fileno(), 4, 0.05) == ([], [], 0)
    assert time.monotonic() - started >= 0.04
    assert received(Arena(4, 64), pair[1].fileno(), 4, 0.0) == ([], [], 0)


def test_a_closed_descriptor(pair: tuple[socket.socket, socket.socket]) -> None:
    fd = os.dup(pair[0].fileno())
    os.close(fd)
    assert send_many(fd, [b"x" * 16]) == (0, errno.EBADF)
    whole, _, error = received(Arena(4, 64), fd, 4, 1.0)
    assert (whole, error) == ([], errno.EBADF)


def test_a_full_socket_says_how_many_it_took(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].setblocking(False)
    sent, error = send_many(pair[0].fileno(), [bytes(4096)] * 5000)
    assert 0 < sent < 5000
    assert error in (errno.EAGAIN, errno.ENOBUFS)


class Scripted:
    """A channel without the optional members."""

    abi = Abi.linux()

    def __init__(self, taken: int = 99) -> None:
        self.sent: list[bytes] = []
        self.waiting = list(MESSAGES[:5])
        self.timeouts: list[float | None] = []
        self._taken = taken

    def send(self, data: bytes, /) -> None:
        if len(self.sent) >= self._taken:
            raise OSError(errno.ENOBUFS, "full")
        self.sent.append(data)

    def receive(self, timeout: float | None, /) -> bytes | None:
        self.timeouts.append(timeout)
        return self.waiting.pop(0) if self.waiting else None

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        pass


def test_doing_without_the_optional_members() -> None:
    channel = Scripted()
    assert channels.send_many(channel, MESSAGES[:7]) == 7
    assert channel.sent == MESSAGES[:7]
    assert channels.receive_many(channel, 3, 1.5) == MESSAGES[:3]
    assert channel.timeouts == [1.5, 0.0, 0.0]
    assert channels.receive_many(channel, 10, 1.5) == MESSAGES[3:5]
    assert channels.in_flight(channel) == 16
    assert not channels.grow_receive_buffer(channel)


def test_a_loop_stops_where_sending_fails() -> None:
    assert channels.send_many(Scripted(taken=3), MESSAGES[:7]) == 3
    with pytest.raises(OSError, match="full"):
        channels.send_many(Scripted(taken=0), MESSAGES[:7])


# (errno of socket(), the exception, what the text must tell)
FAILURES = [
    (errno.EPERM, PermissionError, ["CAP_NET_ADMIN", "root", "embedded:linux"]),
    (errno.EAFNOSUPPORT, NotSupported, ["modprobe af_key", "RHEL 10", "embedded:linux"]),
    (errno.EPROTONOSUPPORT, NotSupported, ["af_key"]),
    (errno.EMFILE, KernelError, ["EMFILE"]),
]


@pytest.mark.parametrize(("number", "kind", "words"), FAILURES, ids=[errno.errorcode[row[0]] for row in FAILURES])
def test_why_there_is_no_socket(
    number: int, kind: type[Exception], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> socket.socket:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Abi, "native", staticmethod(Abi.linux))
    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(kind) as raised:
        NativeChannel()
    for word in words:
        assert word in str(raised.value)


def test_freebsd_gets_other_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> socket.socket:
        raise OSError(errno.EPROTONOSUPPORT, "Protocol not supported")

    monkeypatch.setattr(Abi, "native", staticmethod(lambda: Abi.freebsd(13)))
    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(NotSupported, match=r"kldload ipsec.*vnet"):
        NativeChannel()


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[NativeChannel, socket.socket]]:
    """A NativeChannel whose socket ends in this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    monkeypatch.setattr(Abi, "native", staticmethod(Abi.linux))
    monkeypatch.setattr(channels, "_open", lambda abi: ours)
    with theirs:
        channel = NativeChannel()
        yield channel, theirs
        channel.close()


def test_the_native_channel(native: tuple[NativeChannel, socket.socket]) -> None:
    channel, kernel = native
    channel.send(b"x" * 16)
    assert channel.send_many(MESSAGES[:5]) == 5
    assert [kernel.recv(4096) for _ in range(6)] == [b"x" * 16, *MESSAGES[:5]]
    for message in MESSAGES[:6]:
        kernel.send(message)
    assert channel.receive(1.0) == MESSAGES[0]
    assert channel.receive_many(2, 1.0) == MESSAGES[1:3]
    assert channel.receive_many(64, 1.0) == MESSAGES[3:6]
    assert channel.receive(0.0) is None
    assert channel.fileno() >= 0
    assert channel.in_flight >= 1
    assert channel.receive_buffer >= 65536
    channel.close()
    for call in (lambda: channel.send(b""), lambda: channel.receive(0.0), lambda: channel.send_many([b""])):
        with pytest.raises(ChannelClosed):
            call()
    assert channel.fileno() == -1


@pytest.mark.parametrize("size", [-1, 0, 2304, 16384])
def test_the_receive_buffer_never_gets_too_small_for_a_dump(
    native: tuple[NativeChannel, socket.socket], size: int
) -> None:
    """Linux stops a dump for ever where not even three messages fit (3840 bytes, as it counts)."""
    channel, _ = native
    assert 16384 <= channel.set_receive_buffer(size) == channel.receive_buffer <= 65536


def test_an_interrupted_wait_goes_on(native: tuple[NativeChannel, socket.socket]) -> None:
    """A signal whose handler returns is no error and no message."""
    channel, kernel = native
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        first = channel.receive(0.2)
        kernel.send(b"y" * 16)
        assert (first or channel.receive(1.0)) == b"y" * 16
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_the_number_of_the_protocol_family() -> None:
    assert pf_key() == getattr(socket, "AF_KEY", pf_key())


class Wrapped:
    """A channel of somebody else's making, in front of an embedded FreeBSD's."""

    def __init__(self, inner: EmbeddedChannel, *, tells: bool) -> None:
        self.inner = inner
        self.asked: list[int] = []
        if tells:
            self.receive_buffer = 8192

    @property
    def abi(self) -> Abi:
        return self.inner.abi

    def send(self, data: bytes) -> None:
        self.inner.send(data)

    def receive(self, timeout: float | None) -> bytes | None:
        return self.inner.receive(timeout)

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        self.inner.close()

    def set_receive_buffer(self, size: int) -> int:
        self.asked.append(size)
        return self.inner.set_receive_buffer(size)


@pytest.mark.parametrize("tells", [False, True], ids=["of unknown size", "of known size"])
def test_a_receive_buffer_grows_to_what_the_system_grants(tells: bool) -> None:
    limit = profile("freebsd-13").receive_buffer_limit
    channel = Wrapped(EmbeddedKernel("freebsd-13").connect(), tells=tells)
    while channels.grow_receive_buffer(channel) and tells:
        assert channel.inner.receive_buffer > channel.receive_buffer
        channel.receive_buffer = channel.inner.receive_buffer
    assert limit / 2 < channel.inner.receive_buffer <= limit
