"""Faults on order: any error at any message, before, between and after the work, replies lost and late, overflow."""

from __future__ import annotations

import errno

import pytest
from embedded_client import ALL, FREEBSD, KAME, LINUX, OUT, PACKET, SITE, TUNNEL, Client, discard, esp

from pfkey import Action, MessageType, Selector, connect, encode
from pfkey.embedded import EmbeddedKernel
from pfkey.typed import policy_message

ADD, UPDATE, DELETE, DUMP = MessageType.SPDADD, MessageType.SPDUPDATE, MessageType.SPDDELETE, MessageType.SPDDUMP
OTHER = Selector("10.3.0.0/16", "10.4.0.0/16")
ALIAS = Selector("10.1.0.1/16", "10.2.0.0/16")


@pytest.fixture(params=ALL)
def client(request: pytest.FixtureRequest) -> Client:
    return Client(request.param)


def only(*profiles: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("client", profiles, indirect=True)


def test_a_fault_before_the_work(client: Client) -> None:
    client.kernel.fail_next(ADD, errno.ENOMEM)
    answer = client.apply(ADD, discard())
    assert (client.error(answer), answer.seq) == ("ENOMEM", client.seq)
    assert client.kernel.policies() == []
    client.add(discard())


def test_a_fault_of_the_send(client: Client) -> None:
    client.kernel.fail_next(ADD, "EPERM", "send")
    with pytest.raises(PermissionError):
        client.apply(ADD, discard())
    assert (client.received(), client.kernel.policies()) == ([], [])


def test_no_buffers_after_the_work(client: Client) -> None:
    """The policy is there, its reply is not, and others heard of it."""
    other = client.kernel.connect()
    client.kernel.fail_next(ADD, "ENOBUFS", "after")
    with pytest.raises(OSError, match="ENOBUFS") as raised:
        client.apply(ADD, discard())
    assert raised.value.errno == errno.ENOBUFS
    assert client.received() == []
    assert client.actions() == [("10.1.0.0/16", Action.DISCARD)]
    assert [message.type for message in client.received(other)] == [ADD]


def test_a_lost_reply(client: Client) -> None:
    client.kernel.fail_next(ADD, when="lost")
    client.send(policy_message(ADD, discard(), client.abi))
    assert client.received() == []
    assert client.actions() == [("10.1.0.0/16", Action.DISCARD)]


def test_a_late_reply(client: Client) -> None:
    client.kernel.fail_next(ADD, when="late")
    client.send(policy_message(ADD, discard(), client.abi))
    client.add(discard(OTHER))
    assert client.received() == []
    assert client.kernel.release_replies() == 1
    assert [str(message.source.address) for message in client.received() if message.source] == ["10.1.0.0"]
    assert client.kernel.release_replies() == 0


@only(*KAME)
def test_a_fault_after_the_unlinking(client: Client) -> None:
    client.kernel.fail_next(UPDATE, "ENOBUFS", "unlinked")
    client.update(discard())  # nothing to unlink yet: the fault waits
    with client.kernel.probe(OUT, *PACKET) as probe:
        assert client.error(client.update(esp())) == "ENOBUFS"
    assert client.kernel.policies() == []
    assert probe.bare == probe.steps > 0
    assert client.update(esp()).errno == 0


@only(*LINUX)
def test_linux_cannot_stop_after_an_unlinking(client: Client) -> None:
    with pytest.raises(ValueError, match="never unlinks"):
        client.kernel.fail_next(UPDATE, "ENOBUFS", "unlinked")


def test_faults_queue_up_and_mind_the_type(client: Client) -> None:
    client.kernel.fail_next(UPDATE, "EIO")
    client.kernel.fail_next(None, "EPERM")
    client.kernel.fail_next(ADD, "EACCES")
    answers = [client.apply(kind, discard()) for kind in (ADD, ADD, ADD, UPDATE, UPDATE)]
    assert [client.error(answer) for answer in answers] == ["EPERM", "EACCES", "", "EIO", ""]


def test_an_error_the_kernel_lacks(client: Client) -> None:
    with pytest.raises(ValueError, match="EWHATEVER"):
        client.kernel.fail_next(ADD, "EWHATEVER")


def test_the_template_survives_a_fault(client: Client) -> None:
    """A refused update through a fault leaves the policy as it was, on every system: nothing was done."""
    client.add(esp())
    client.kernel.fail_next(UPDATE, "EINVAL")
    client.update(discard())
    assert client.kernel.policies(OUT)[0].templates == (TUNNEL,)


def test_the_nth_from_now(client: Client) -> None:
    """Each fault counts the messages since it was ordered, whether another one befell them or not."""
    client.kernel.fail_next(ADD, "EIO", skip=2)
    client.kernel.fail_next(ADD, "EPERM")
    client.kernel.fail_next(None, "EACCES", skip=3)
    assert client.kernel.faults == 3
    answers = [client.apply(kind, discard()) for kind in (ADD, ADD, ADD, UPDATE, UPDATE)]
    assert [client.error(answer) for answer in answers] == ["EPERM", "", "EIO", "EACCES", ""]
    assert client.kernel.faults == 0


@only(*KAME)
def test_the_nth_unlinking(client: Client) -> None:
    """Of updates only those count that have something to unlink."""
    client.kernel.fail_next(UPDATE, "ENOBUFS", "unlinked", skip=1)
    answers = [client.update(discard()) for _ in range(4)]
    assert [client.error(answer) for answer in answers] == ["", "", "ENOBUFS", ""]


def test_an_alias_that_is_rejected_and_one_that_cannot_be_deleted(client: Client) -> None:
    client.add(discard())
    client.kernel.fail_next(ADD, "EPROTONOSUPPORT")
    assert client.error(client.apply(ADD, esp(selector=ALIAS))) == "EPROTONOSUPPORT"
    client.add(esp(selector=ALIAS))
    client.kernel.fail_next(DELETE, "ENOMEM")
    assert client.error(client.apply(DELETE, esp(selector=ALIAS))) == "ENOMEM"
    assert len(client.kernel.policies()) == 2


def test_a_request_that_is_ignored(client: Client) -> None:
    client.kernel.fail_next(ADD, when="ignored")
    client.send(policy_message(ADD, discard(), client.abi))
    assert (client.received(), client.kernel.policies()) == ([], [])
    client.add(discard())


def test_an_overflow_loses_the_reply(client: Client) -> None:
    """In silence on Linux, with an ENOBUFS from send() elsewhere; the work is done, and others hear of it."""
    other = client.kernel.connect()
    client.kernel.fail_next(ADD, when="overflow")
    message = encode(policy_message(ADD, discard(), client.abi))
    if client.kernel.profile.name in LINUX:
        client.channel.send(message)
    else:
        with pytest.raises(OSError, match="ENOBUFS"):
            client.channel.send(message)
    assert (client.received(), client.channel.dropped) == ([], 1)
    assert [len(client.received(other)), len(client.kernel.policies())] == [1, 1]
    client.apply(DELETE, discard())


@only(*[name for name in KAME if name != "netbsd"])
def test_an_overflow_cuts_a_dump(client: Client) -> None:
    for selector in (SITE, OTHER, ALIAS):
        client.add(discard(selector))
    client.received()
    client.kernel.fail_next(DUMP, when="overflow", room=2)
    client.send(client.build(DUMP))
    assert [part.seq for part in client.received()] == [2, 1]
    with connect(client.channel, timeout=0.1) as kernel:
        client.kernel.fail_next(DUMP, when="overflow", room=1)
        assert len(kernel.dump_policies()) == 3  # the face noticed, and asked again


@only("netbsd")
def test_an_overflow_refuses_a_netbsd_dump(client: Client) -> None:
    client.add(discard())
    client.kernel.fail_next(DUMP, when="overflow")
    assert client.error(client.ask(DUMP)) == "ENOBUFS"


@only(*FREEBSD)
def test_an_error_that_does_not_fit_either(client: Client) -> None:
    client.channel.set_receive_buffer(0)
    client.kernel.fail_next(ADD, "EIO")
    with pytest.raises(OSError, match="ENOBUFS"):
        client.send(policy_message(ADD, discard(), client.abi))
    assert client.kernel.policies() == []


def test_a_lost_dump_leaves_no_dump_behind(client: Client) -> None:
    for when in ("lost", "ignored", "late"):
        client.add(discard()) if when == "lost" else None
        client.received()
        client.kernel.fail_next(DUMP, when=when)
        client.send(client.build(DUMP))
        assert client.received() == []
        assert client.ask(DUMP).errno == 0
    assert client.kernel.release_replies() == 1


def test_faults_are_called_off(client: Client) -> None:
    client.kernel.fail_next(ADD)
    client.kernel.fail_next(ADD, skip=5)
    client.kernel.clear_faults()
    assert client.kernel.faults == 0
    client.add(discard())


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ((99,), {}, "no message of type"),
        ((ADD, "EIO"), {"skip": -1}, "0 or more"),
        ((ADD, None, "overflow"), {"room": -1}, "0 or more"),
        ((ADD, "EIO"), {"room": 1}, "room is for an overflow"),
        ((ADD, "EIO", "lost"), {}, "says no error"),
        ((ADD, "EIO", "late"), {}, "says no error"),
        ((ADD, "EIO", "ignored"), {}, "says no error"),
        ((ADD, "EIO", "overflow"), {}, "says no error"),
        ((ADD, "EIO", "after"), {}, "ENOBUFS alone"),
        ((ADD, "EIO", "whenever"), {}, "not a valid When"),
        ((ADD, 0), {}, "no error 0"),
    ],
    ids=str,
)
def test_faults_that_cannot_be(client: Client, arguments: tuple[int, ...], options: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        client.kernel.fail_next(*arguments, **options)  # type: ignore[arg-type]
    assert client.kernel.faults == 0


@only(*KAME)
def test_only_an_update_unlinks(client: Client) -> None:
    with pytest.raises(ValueError, match="only an SPDUPDATE"):
        client.kernel.fail_next(ADD, "EIO", "unlinked")
    client.kernel.fail_next(None, "EIO", "unlinked")


@only(*LINUX)
def test_a_linux_dump_does_not_overflow(client: Client) -> None:
    for kind in (DUMP, MessageType.DUMP):
        with pytest.raises(ValueError, match="loses nothing"):
            client.kernel.fail_next(kind, when="overflow")


def test_a_message_of_another_system() -> None:
    with pytest.raises(ValueError, match="no message of type"):
        EmbeddedKernel("freebsd-13").fail_next(MessageType.MIGRATE, "EIO")
    EmbeddedKernel("linux").fail_next(MessageType.MIGRATE, "EIO")
