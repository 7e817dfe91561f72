"""What the SPD of the embedded kernels refuses, and when, system by system."""

from __future__ import annotations

import pytest
from embedded_client import ALL, KAME, LINUX, OLDER, OUT, SITE, Client, discard, esp
from test_embedded_policies import ENDS, stored

from pfkey import (
    Action,
    ExtensionType,
    Level,
    MessageType,
    Mode,
    Policy,
    SAProtocol,
    Template,
)
from pfkey.messages import Address, PolicyExtension
from pfkey.typed import policy_message

ADD, UPDATE, FLUSH = MessageType.SPDADD, MessageType.SPDUPDATE, MessageType.SPDFLUSH


@pytest.fixture(params=ALL)
def client(request: pytest.FixtureRequest) -> Client:
    return Client(request.param)


def only(*profiles: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("client", profiles, indirect=True)


# What is refused, and when: before the old policy is looked up, or after it is gone.

BROKEN_EARLY = {
    "type": (Policy(OUT, SITE, Action.ENTRUST), "EINVAL"),
    "direction": (Policy(0, SITE, Action.DISCARD), "EINVAL"),
}
BROKEN_LATE = {
    "protocol": (esp(Template(99, Mode.TRANSPORT)), {"linux": "EINVAL", "freebsd": "EPROTONOSUPPORT"}),
    "mode": (esp(Template(SAProtocol.ESP, 0)), {"linux": "EINVAL", "freebsd": "EINVAL"}),
    "level": (esp(Template(SAProtocol.ESP, Mode.TRANSPORT, level=9)), {"linux": "", "freebsd": "EINVAL"}),
    "beet": (esp(Template(SAProtocol.ESP, Mode.BEET)), {"linux": "", "freebsd": "EINVAL"}),
    "tunnel without ends": (esp(Template(SAProtocol.ESP, Mode.TUNNEL)), {"linux": "EINVAL", "freebsd": "EINVAL"}),
    "five": (esp(*[Template.transport()] * 5), {"linux": "", "freebsd": "EINVAL", "older": ""}),
    "seven": (esp(*[Template.transport()] * 7), {"linux": "ELOOP", "freebsd": "EINVAL", "older": ""}),
}


def expected(client: Client, errors: dict[str, str]) -> str:
    if client.kernel.profile.name in OLDER and "older" in errors:
        return errors["older"]
    return errors["linux" if client.abi.name == "linux" else "freebsd"]


def test_how_many_templates(client: Client) -> None:
    for count in range(1, 9):
        allowed = count <= {"linux": 6}.get(client.abi.name, 4) or client.kernel.profile.name in OLDER
        answer = client.update(esp(*[Template.transport()] * count))
        assert client.error(answer) == ("" if allowed else "ELOOP" if client.abi.name == "linux" else "EINVAL")


@pytest.mark.parametrize("case", BROKEN_EARLY)
def test_an_early_fault_leaves_the_old_policy(client: Client, case: str) -> None:
    policy, error = BROKEN_EARLY[case]
    client.add(discard())
    if case == "direction" and client.kernel.profile.name in OLDER:
        client.received()
        client.send(policy_message(UPDATE, policy, client.abi))
        assert client.received() == []
    else:
        assert client.error(client.update(policy)) == error
    assert client.actions() == [("10.1.0.0/16", Action.DISCARD)]


@pytest.mark.parametrize("case", BROKEN_LATE)
def test_a_late_fault_takes_the_old_policy_along_on_freebsd(client: Client, case: str) -> None:
    policy, errors = BROKEN_LATE[case]
    error = expected(client, errors)
    client.add(discard())
    assert client.error(client.update(policy)) == error
    if error:
        assert bool(client.actions()) is not client.abi.rejected_update_removes
    else:
        assert client.actions() == [("10.1.0.0/16", Action.IPSEC)]


@pytest.mark.parametrize("case", BROKEN_LATE)
def test_a_faulty_add_adds_nothing(client: Client, case: str) -> None:
    policy, errors = BROKEN_LATE[case]
    if error := expected(client, errors):
        assert client.error(client.apply(ADD, policy)) == error
        assert client.kernel.policies() == []


@only(*LINUX)
def test_linux_refuses_level_use_in_outbound_tunnels(client: Client) -> None:
    template = Template.tunnel(*ENDS, level=Level.USE)
    assert client.error(client.apply(ADD, esp(template))) == "EINVAL"
    assert stored(client, template)[0].level == Level.USE


@only(*KAME)
def test_freebsd_takes_level_use_in_outbound_tunnels(client: Client) -> None:
    assert stored(client, Template.tunnel(*ENDS, level=Level.USE), direction=OUT)[0].level == Level.USE


def test_how_an_error_looks(client: Client) -> None:
    """Linux answers with the header, FreeBSD with all of the request."""
    sent = client.build(ADD, {ExtensionType.POLICY: PolicyExtension(9, OUT)})
    client.send(sent)
    (answer,) = client.received()
    assert (answer.type, answer.seq, answer.pid, client.error(answer)) == (ADD, sent.seq, sent.pid, "EINVAL")
    assert dict(answer.extensions) == (dict(sent.extensions) if client.abi.error_echoes_request else {})


@only(*KAME)
def test_an_echo_shows_the_reqid_already_given(client: Client) -> None:
    """The kernel writes it into the request itself, and that is what comes back with the error of a later template."""
    answer = client.apply(ADD, esp(Template.tunnel(*ENDS, reqid=0, level=Level.UNIQUE), Template(99)))
    assert client.error(answer) == "EPROTONOSUPPORT"
    assert answer.policy is not None
    assert [template.reqid for template in answer.policy.templates] == [16385, 0]


@only(*KAME)
def test_freebsd_wants_one_protocol_on_both_sides(client: Client) -> None:
    extensions = {
        ExtensionType.POLICY: PolicyExtension(Action.DISCARD, OUT),
        ExtensionType.ADDRESS_SRC: Address(SITE.source.ip, 16, 6),
        ExtensionType.ADDRESS_DST: Address(SITE.destination.ip, 16, 17),
    }
    assert client.error(client.ask(ADD, extensions)) == "EINVAL"


@only(*KAME)
@pytest.mark.parametrize(("satype", "error"), [(3, "EINVAL"), (2, "EINVAL"), (5, "EOPNOTSUPP"), (77, "EINVAL")])
def test_freebsd_refuses_sa_types_on_policy_messages(client: Client, satype: int, error: str) -> None:
    assert client.error(client.ask(FLUSH, satype=satype)) == error


@only(*KAME)
@pytest.mark.parametrize("size", [8, 24])
def test_freebsd_wants_transport_templates_without_addresses(client: Client, size: int) -> None:
    head = client.kernel.wire.request(8 + size, SAProtocol.ESP, Mode.TRANSPORT, Level.REQUIRE, 0)
    policy = client.kernel.wire.policy(Action.IPSEC, OUT, requests=head + bytes(size))
    extensions = {
        ExtensionType.POLICY: policy[4:],
        ExtensionType.ADDRESS_SRC: Address(SITE.source.ip, 16, 255),
        ExtensionType.ADDRESS_DST: Address(SITE.destination.ip, 16, 255),
    }
    assert client.error(client.ask(ADD, extensions)) == "EINVAL"


@only(*KAME)
def test_the_ends_of_a_freebsd_tunnel(client: Client) -> None:
    """Two sockaddrs of one family, one behind the other, whole."""
    wire = client.kernel.wire
    v4, v6 = wire.sockaddr(4, 1), wire.sockaddr(6, 1)
    good = [v4 * 2, v6 * 2, v4 * 2 + bytes(8)]
    bad = [b"", v4, v4 + bytes(16), v4 + v6 + bytes(4), v6 + v4 + bytes(4), bytes(32), b"\x10\x1e" * 16, v6 + bytes(4)]
    outcomes = []
    for ends in good + bad:
        requests = wire.request(8 + len(ends), SAProtocol.ESP, Mode.TUNNEL, Level.REQUIRE, 0) + ends
        extensions = {
            ExtensionType.POLICY: wire.policy(Action.IPSEC, OUT, requests=requests)[4:],
            ExtensionType.ADDRESS_SRC: Address(SITE.source.ip, 16, 255),
            ExtensionType.ADDRESS_DST: Address(SITE.destination.ip, 16, 255),
        }
        client.send(client.build(UPDATE, extensions))
        answer = client.channel.receive(0)
        assert answer is not None
        outcomes.append(answer[2])
    assert outcomes == [0] * len(good) + [22] * len(bad)


@pytest.mark.parametrize("kind", [MessageType.EXPIRE, MessageType.SPDEXPIRE, MessageType.SPDACQUIRE])
def test_types_that_only_the_kernel_sends(client: Client, kind: MessageType) -> None:
    satype = 3 if kind == MessageType.EXPIRE else 0
    expected = "EOPNOTSUPP" if client.abi.name == "linux" else "EINVAL"
    assert client.error(client.ask(kind, satype=satype)) == expected
