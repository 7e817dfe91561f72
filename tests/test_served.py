"""A kernel that lives in another process: its channel, its server, and clients that are killed while it lives on."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from embedded_client import ALL, OUT, SITE, discard, esp
from package import ROOT

from pfkey import (
    Abi,
    Action,
    Channel,
    ChannelClosed,
    Message,
    MessageType,
    NotSupported,
    Selector,
    connect,
    encode,
)
from pfkey.embedded import EmbeddedKernel
from pfkey.embedded.profiles import PROFILE_NAMES
from pfkey.embedded.server import Server
from pfkey.errors import PFKeyError
from pfkey.served import Call, Frame, Frames, ServedChannel, abi_name, joined, split
from pfkey.typed import policy_message

ADD, UPDATE, DUMP = MessageType.SPDADD, MessageType.SPDUPDATE, MessageType.SPDDUMP


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "kernel")


@pytest.fixture
def server(path: str) -> Iterator[Server]:
    with Server(EmbeddedKernel("linux"), path) as running:
        yield running


@pytest.fixture
def channel(server: Server) -> Iterator[ServedChannel]:
    with ServedChannel(server.path) as one:
        yield one


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Wait for another thread or process to come so far."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def readable(one: ServedChannel) -> bool:
    return bool(select.select([one], [], [], 0)[0])


def added(abi: Abi, number: int = 0) -> bytes:
    selector = Selector(f"10.{number // 256}.{number % 256}.0/24", "10.200.0.0/16")
    return encode(policy_message(ADD, discard(selector, 0), abi).replace(seq=number + 1, pid=5))


# The channel.


@pytest.mark.parametrize("profile", ALL)
def test_it_is_the_kernel_it_serves(profile: str, path: str) -> None:
    """What a client does through the socket is what it does in the process, on every system."""
    kernel = EmbeddedKernel(profile)
    with Server(kernel, path) as server, connect(server.target) as client:
        assert (client.abi, client.channel.profile) == (kernel.abi, profile)  # type: ignore[attr-defined]
        assert isinstance(client.channel, Channel)
        policy = client.add_policy(discard(priority=0))
        (shown,) = client.dump_policies()
        assert (shown.id, shown.selector, shown.action) == (policy.id, SITE, Action.DISCARD)
        with pytest.raises(FileExistsError):
            client.add_policy(discard(priority=0))
        assert client.get_policy(policy.id).selector == SITE
        client.update_policy(esp(priority=0))
        assert [one.action for one in kernel.policies()] == [Action.IPSEC]


def test_every_abi_is_learnt_by_its_name() -> None:
    for abi in (*(EmbeddedKernel(name).abi for name in PROFILE_NAMES), Abi.freebsd("14.1", "big"), Abi.linux("big")):
        assert Abi.named(abi_name(abi)) == abi


def test_several_processes_hear_of_each_other(server: Server) -> None:
    with connect(server.target) as one, connect(server.target) as two:
        one.add_policy(discard(priority=0))
        assert [event.type for event in two.events(1)] == [ADD]
        assert server.connections == 2
    until(lambda: server.connections == 0)


def test_the_descriptor_is_readable_while_there_is_something(channel: ServedChannel, server: Server) -> None:
    """Level-triggered, and never for nothing: poll(), asyncio and a blocking receive() all see the same."""
    assert channel.fileno() >= 0
    for _ in range(3):
        assert not readable(channel)
        assert channel.receive(0) is None
        with server.kernel.connect() as other:
            assert other.send_many([added(other.abi, number) for number in range(5)]) == 5
            for number in range(5):
                assert readable(channel)
                assert channel.receive(0) is not None, number
            assert not readable(channel)
            other.send(encode(Message(MessageType.SPDFLUSH, abi=other.abi)))
        assert len(channel.receive_many(10, 0)) == 1
    assert not readable(channel)


def test_asyncio_waits_on_it(channel: ServedChannel, server: Server) -> None:
    async def first() -> bytes | None:
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(channel.fileno(), arrived.set)
        server.kernel.connect().send(added(channel.abi))
        await asyncio.wait_for(arrived.wait(), 20)
        loop.remove_reader(channel.fileno())
        return channel.receive(0)

    data = asyncio.run(first())
    assert data is not None
    assert data[1] == ADD


def test_a_reader_wakes_up(channel: ServedChannel, server: Server) -> None:
    got: list[bytes | None] = []
    thread = threading.Thread(target=lambda: got.append(channel.receive(20)))
    thread.start()
    server.kernel.connect().send(added(channel.abi))
    thread.join(20)
    assert [data[1] for data in got if data] == [ADD]


def test_many_at_once(channel: ServedChannel) -> None:
    messages = [added(channel.abi, number) for number in range(100)]
    assert channel.send_many(messages) == 100
    assert len(channel.receive_many(60, 0)) == 60
    assert len(channel.receive_many(60, 0)) == 40
    assert channel.send_many([]) == 0
    assert channel.send_many([messages[0], b"no message", messages[1]]) == 1
    with pytest.raises(OSError, match="EMSGSIZE"):
        channel.send_many([b"no message", messages[0]])


def test_errors_of_the_send_travel(path: str) -> None:
    """The host's number, the kernel's number and the name, as if the system call had failed here."""
    kernel = EmbeddedKernel("macos")
    with Server(kernel, path), ServedChannel(path) as channel:
        kernel.fail_next(ADD, "EOPNOTSUPP", "send")
        with pytest.raises(OSError, match="EOPNOTSUPP") as raised:
            channel.send(added(channel.abi))
    error: Any = raised.value
    assert (error.errno, error.kernel_errno, error.name) == (errno.EOPNOTSUPP, 102, "EOPNOTSUPP")


def test_the_receive_buffer_is_the_kernel_s_own(channel: ServedChannel) -> None:
    """167 policy messages and no more: nothing is hoarded on the way."""
    for number in range(250):
        policy = esp(selector=Selector(f"10.{number}.0.0/16", "10.0.0.0/8"))
        channel.send(encode(policy_message(ADD, policy, channel.abi)))
    received = 0
    while got := channel.receive_many(64, 0):
        received += len(got)
    assert received == 167
    size = channel.in_flight
    assert channel.set_receive_buffer(1 << 20) == channel.receive_buffer == 2 << 20
    assert channel.in_flight > size
    with pytest.raises(OSError, match="over the system's limit"):
        channel.set_receive_buffer(1 << 40)
    assert channel.set_receive_buffer(-1) == 2304


def test_a_dump_longer_than_the_buffer(server: Server) -> None:
    with connect(server.kernel.connect()) as direct, connect(server.target) as served:
        for number in range(400):
            direct.add_policy(discard(Selector(f"10.{number // 256}.{number % 256}.0/24", "10.200.0.0/16")))
        assert list(served.dump_policies()) == list(direct.dump_policies())
        assert len(served.dump_policies()) == 400


def test_a_timer_wakes_a_reader_that_sleeps(path: str) -> None:
    """The server lets the kernel's clock run for those who wait: here for an SA that nobody completed."""
    now = [1e9]
    with Server(EmbeddedKernel("linux", clock=lambda: now[0]), path) as server, connect(server.target) as client:
        client.register()
        client.get_spi("192.0.2.1", "192.0.2.2")
        now[0] += 31
        assert next(client.events(20)).type == MessageType.EXPIRE


def test_grace_period(path: str) -> None:
    kernel = EmbeddedKernel("linux-smp", clock=lambda: 1e9)
    filler = Selector(SITE.source, SITE.destination, protocol=6)
    with Server(kernel, path), connect(f"unix:{path}") as client:
        client.add_policy(discard(filler, 6))
        client.add_policy(discard(priority=10))
        client.channel.grace_period()  # type: ignore[attr-defined]
        with kernel.probe(OUT, SITE) as probe:
            client.update_policy(discard(priority=1))
            client.channel.grace_period()  # type: ignore[attr-defined]
            client.update_policy(esp(priority=1))
    assert [step.name for step in probe.log] == ["replaced", "walking", "replaced"]


def test_writers_share_a_lock_file(channel: ServedChannel, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is the same from whatever directory."""
    assert channel.host_lock == server.path + ".lock"
    monkeypatch.chdir(Path(server.path).parent)
    with ServedChannel("kernel") as other:
        assert other.host_lock == channel.host_lock
    assert server.kernel.connect().host_lock is None


# Ends.


def test_close_wakes_up_a_reader(channel: ServedChannel) -> None:
    raised: list[BaseException] = []

    def read() -> None:
        with pytest.raises(ChannelClosed, match="closed") as info:
            channel.receive(None)
        raised.append(info.value)

    thread = threading.Thread(target=read)
    thread.start()
    time.sleep(0.02)
    channel.close()
    channel.close()
    thread.join(20)
    assert len(raised) == 1
    assert channel.fileno() == -1
    for use in (channel.grace_period, lambda: channel.send(b""), lambda: channel.receive(0)):
        with pytest.raises(ChannelClosed):
            use()


def test_a_server_that_goes(path: str) -> None:
    with Server(EmbeddedKernel("linux"), path) as server:
        client = connect(server.target)
        client.add_policy(discard())
    with pytest.raises(ChannelClosed, match=path):
        client.add_policy(esp(selector=SITE.reversed()))
    with pytest.raises(ChannelClosed):
        client.channel.receive(20)
    client.close()
    assert not Path(path).exists()
    with pytest.raises(NotSupported, match=f"pfkey embedded --listen {path}"):
        connect(f"unix:{path}")


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_an_interrupt_leaves_the_channel_usable(channel: ServedChannel, server: Server) -> None:
    """Ctrl-C while the kernel works: the answer that nobody waited for is passed over, its messages are kept."""

    def interrupted(call: Callable[[], object]) -> None:
        with server.kernel.lock:  # nothing is answered meanwhile
            timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                call()
            timer.join()

    interrupted(lambda: channel.send(added(channel.abi)))
    assert channel.receive(20) is not None
    channel.send(added(channel.abi, 1))
    interrupted(lambda: channel.receive(20))
    channel.grace_period()
    data = channel.receive(20)
    assert data is not None
    assert data[8:12] == (2).to_bytes(4, sys.byteorder)
    assert len(server.kernel.policies()) == 2
    assert not readable(channel)
    assert channel.receive(0) is None


CLIENT = """
import sys
from pfkey import Direction, Policy, Selector, Action, connect
kernel = connect("unix:" + sys.argv[1])
for number in range(1000):
    kernel.update_policy(Policy(Direction.OUT, Selector("10.1.0.0/16", "10.2.0.0/16"), Action.DISCARD))
"""


def killed_at(server: Server, message: int) -> None:
    """Run a client and kill it, in the middle of its n-th message."""
    child = subprocess.Popen([sys.executable, "-c", CLIENT, server.path], cwd=ROOT)
    steps = []

    def look(name: str, kernel: EmbeddedKernel) -> None:
        steps.append(name)
        if len(steps) == message:
            child.kill()
            child.wait()

    server.kernel.on_step.append(look)
    try:
        assert child.wait(60) == -signal.SIGKILL
        until(lambda: server.connections == 0)
    finally:
        server.kernel.on_step.remove(look)


@pytest.mark.parametrize("profile", ["linux", "freebsd-13"])
def test_a_client_is_killed_and_the_kernel_lives_on(profile: str, path: str) -> None:
    with Server(EmbeddedKernel(profile), path) as server:
        for message in (1, 2, 5):
            killed_at(server, message)
            assert server.kernel.channels == []
            assert len(server.kernel.policies()) in (0, 1)
            with connect(server.target) as client:
                client.update_policy(discard(priority=0))
                assert len(client.dump_policies()) == 1


# The socket.


def test_only_one_serves_a_path(server: Server) -> None:
    with pytest.raises(PFKeyError, match="already"):
        Server(EmbeddedKernel("linux"), server.path).start()
    with connect(server.target) as client:
        assert client.dump_policies() == []


def test_a_socket_left_behind_is_replaced(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
    with Server(EmbeddedKernel("linux"), path) as server:
        connect(server.target).close()
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert not os.path.exists(path)


def test_what_is_no_socket_stays(path: str) -> None:
    Path(path).write_text("mine")
    with pytest.raises(PFKeyError, match="no socket"):
        Server(EmbeddedKernel("linux"), path).start()
    assert Path(path).read_text() == "mine"


def test_a_socket_of_another_one_stays(path: str) -> None:
    with Server(EmbeddedKernel("linux"), path):
        os.unlink(path)
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(path)
    assert os.path.exists(path)


@pytest.mark.parametrize("where", ["/nonexistent/socket", "/tmp/" + "x" * 200], ids=["nowhere", "too long"])
def test_where_no_socket_can_be(where: str) -> None:
    with pytest.raises(PFKeyError, match="failed"):
        Server(EmbeddedKernel("linux"), where).start()
    with pytest.raises(NotSupported, match="nobody serves"):
        ServedChannel(where)


def test_a_socket_that_is_not_for_us(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, where: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pfkey.served.socket.socket.connect", refuse)
    with pytest.raises(PermissionError, match="somebody else") as raised:
        ServedChannel(server.path)
    assert (raised.value.errno, raised.value.name) == (errno.EACCES, "EACCES")  # type: ignore[attr-defined]


@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.0 400 Bad Request\r\n\r\n"], ids=["silent", "chatty"])
def test_somebody_else_s_socket(greeting: bytes, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pfkey.served._HELLO_SECONDS", 0.1)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        accepted: list[socket.socket] = []

        def answer() -> None:
            accepted.append(listener.accept()[0])
            accepted[0].sendall(greeting)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(NotSupported, match="no kernel of this package"):
            ServedChannel(path)
        thread.join()
        accepted[0].close()


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        Frame(1, Call.SEND, False, b"").packed(),
        Frame(1, Call.HELLO, False, b"").packed() * 2,
        Frame(1, Call.HELLO, False, b"").packed() + Frame(2, Call.SEND, False, b"\0\0\0\5x").packed(),
        Frame(1, Call.HELLO, False, b"").packed()[:5],
    ],
    ids=["http", "no greeting", "two greetings", "cut off", "half a head"],
)
def test_a_client_that_speaks_something_else(data: bytes, server: Server) -> None:
    """Its connection ends, and nothing else does."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(server.path)
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        while client.recv(4096):
            pass
    until(lambda: server.connections == 0)
    with connect(server.target) as kernel:
        kernel.add_policy(discard())
    until(lambda: server.kernel.channels == [])


def test_frames_come_in_pieces() -> None:
    sent = [Frame(number, Call.SEND, bool(number % 2), bytes(number)) for number in range(5)]
    frames, received = Frames(), []
    for byte in b"".join(frame.packed() for frame in sent):
        frames.feed(bytes((byte,)))
        while (frame := frames.next()) is not None:
            received.append(frame)
    assert received == sent
    assert split(joined([b"", b"a", b"bc"])) == [b"", b"a", b"bc"]
    for damaged in (b"\0", b"\0\0\0\2x", joined([b"abc"])[:-1]):
        with pytest.raises(ValueError, match="message"):
            split(damaged)
