"""Selectors as lean values: numbers inside, `ipaddress` outside, one identity; and rows of a dump that say the same."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import FrozenInstanceError, asdict
from ipaddress import IPv4Address, IPv6Address, ip_interface
from typing import Any

import pytest
from embedded_client import ALL, IN, OUT, TUNNEL, Client, discard, esp
from hypothesis import given, settings
from hypothesis import strategies as st
from package import ROOT
from wire import EVERYTHING, mirrored
from wire_case import LINUX

from pfkey import (
    Abi,
    Action,
    DecodeError,
    Direction,
    Lifetime,
    Message,
    MessageType,
    Policy,
    Selector,
    Template,
    connect,
    decode,
    decode_many,
    encode,
)
from pfkey.tables import Batch, assemble
from pfkey.typed import PolicyRow, policy_from, policy_message, policy_rows, selector_from, templates_of

# (what is given, and whether it is refused): every form that ipaddress takes, and what only looks like one.
FORMS: list[Any] = [
    "10.1.2.3", "10.1.2.3/16", "10.1.2.3/08", "10.1.2.3/255.255.0.0", "10.1.2.3/0.0.255.255", "0.0.0.0/0",
    "10.1.2.3/33", "10.1.2.3/", "10.1.2.3/-1", "10.1.2.3/+8", "10.1.2.3/8/8", "10.1.2.3/\u0663", "10.1.2", " 10.1.2.3",
    "010.1.2.3", "10.1.2.3%4", "", "/8", "host",
    "2001:db8::1", "2001:db8::1/48", "::/0", "::1/129", "::ffff:10.1.2.3/96", "2001:db8::1/ffff::", "1:2:3:4:5:6:7:8:9",
    "fe80::1%3", "fe80::1%em0/64", "2001:db8::1%3/48", "fe80::1%", "fe80::1%3%4", ":::",
    0, 2**32, 2**128, -1, b"\x0a\x01\x02\x03", bytes(16), b"\x0a", 1.5, None, ("10.1.2.3", 8),
    IPv4Address("10.1.2.3"), IPv6Address("fe80::1%3"), ip_interface("10.1.2.3/16"), ip_interface("fe80::1%3/64"),
    ip_interface("10.1.2.0/24").network, ip_interface("2001:db8::/32").network,
]  # fmt: skip


def judged_by(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (ValueError, TypeError) as error:
        return error


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_a_prefix_is_what_ipaddress_says(form: Any) -> None:
    """The short way through common texts takes nothing that ipaddress refuses, and refuses in its words."""
    is_network = hasattr(form, "network_address")
    wanted = judged_by(lambda: ip_interface((form.network_address, form.prefixlen) if is_network else form))
    if isinstance(wanted, Exception):
        assert repr(judged_by(lambda: Selector(form, form))) == repr(wanted)
        return
    selector = Selector(form, form)
    for side in (selector.source, selector.destination):
        assert (side, str(side), type(side)) == (wanted, str(wanted), type(wanted))
        assert getattr(side, "scope_id", None) == getattr(wanted, "scope_id", None)


prefixes4 = st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 32)).map(lambda one: f"{IPv4Address(one[0])}/{one[1]}")
addresses6 = st.one_of(st.integers(0, 2**128 - 1), st.integers(0, 2**64 - 1).map(lambda low: (0xFE80 << 112) + low))
prefixes6 = st.tuples(addresses6, st.sampled_from(["", "%3", "%0", "%em0"]), st.integers(0, 128)).map(
    lambda one: f"{IPv6Address(one[0])}{one[1]}/{one[2]}"
)
ports = st.sampled_from([0, 1, 8, 255, 256, 65535])
icmp = st.sampled_from([None, 0, 1, 255])


@st.composite
def selectors(draw: st.DrawFn) -> Selector:
    prefixes = draw(st.sampled_from([prefixes4, prefixes6]))
    source, destination = draw(prefixes), draw(prefixes)
    protocol = draw(st.sampled_from([None, 1, 6, 58, 254]))
    if protocol in (1, 58) and draw(st.booleans()):
        return Selector(source, destination, protocol=protocol, icmp_type=draw(icmp), icmp_code=draw(icmp))
    return Selector(
        source, destination, protocol=protocol, source_port=draw(ports), destination_port=draw(ports)
    )  # fmt: skip


def arguments(selector: Selector) -> dict[str, Any]:
    names = ("source", "destination", "protocol", "source_port", "destination_port", "icmp_type", "icmp_code")
    return {name: getattr(selector, name) for name in names}


@given(selectors(), selectors())
@settings(max_examples=300, deadline=None)
def test_a_selector_is_its_arguments(one: Selector, other: Selector) -> None:
    """Equal, hashed, pickled, copied and written as code: always the same seven values."""
    assert (one == other) == (arguments(one) == arguments(other))
    for same in (
        Selector(**arguments(one)),
        pickle.loads(pickle.dumps(one)),
        copy.copy(one),
        copy.deepcopy(one),
        eval(repr(one), {"Selector": Selector}),
        one.replace(),
        one.reversed().reversed(),
    ):
        assert same == one
        assert (hash(same), same.identity, arguments(same)) == (hash(one), one.identity, arguments(one))
    canonical = one.canonical()
    assert canonical.identity == one.identity
    assert canonical.canonical() is canonical
    assert (canonical is one) == (canonical == one)
    for side, masked in ((one.source, canonical.source), (one.destination, canonical.destination)):
        assert int(masked.ip) == int(side.network.network_address)
        assert masked.network.prefixlen == side.network.prefixlen
        scope, kept = (getattr(one, "scope_id", None) for one in (side, masked))
        local = side.is_link_local and side.network.prefixlen >= 10
        assert kept == (scope if local and scope != "0" else None)
    assert one.is_plain == (one.source.ip == one.source.network.network_address
                            and one.destination.ip == one.destination.network.network_address
                            and one.scopes == ("", ""))  # fmt: skip
    assert one.packed == (one.source.packed, one.destination.packed)


def test_a_selector_does_not_change() -> None:
    selector = Selector("10.1.0.0/16", "10.2.0.0/16")
    for name in ("source", "protocol", "identity", "_identity", "anything"):
        with pytest.raises(FrozenInstanceError, match="does not change"):
            setattr(selector, name, 1)
        with pytest.raises(FrozenInstanceError, match="does not change"):
            delattr(selector, name)
    assert asdict(discard(selector))["selector"] == selector
    assert selector != "10.1.0.0/16"
    assert selector.replace(protocol="tcp", destination_port=443) == Selector(
        "10.1.0.0/16", "10.2.0.0/16", protocol=6, destination_port=443
    )
    assert copy.replace(selector, protocol=6).protocol == 6 if sys.version_info >= (3, 13) else True
    with pytest.raises(ValueError, match="0 to 65535"):
        selector.replace(source_port=-1)
    with pytest.raises(TypeError, match="colour"):
        selector.replace(colour=1)  # type: ignore[call-arg]


def test_a_short_prefix_has_no_scope() -> None:
    """fe80::/5 holds far more than link-local addresses; its identity was another before and after canonical()."""
    short = Selector("fe80::1%3/5", "::/0")
    assert short.canonical().identity == short.identity == Selector("fe80::1/5", "::/0").identity
    assert Selector("fe80::1%3/10", "::/0").identity != Selector("fe80::1/10", "::/0").identity


def test_the_identity_of_a_scope_is_the_same_in_every_process() -> None:
    """A pickled selector is found again: no hash of a text is in it."""
    selector = Selector("fe80::1%em0", "fe80::2%3")
    script = "import pickle, sys; one = pickle.load(sys.stdin.buffer); print(one.identity, one == one.replace())"
    answer = subprocess.run(
        [sys.executable, "-c", script], input=pickle.dumps(selector), capture_output=True, check=True, cwd=ROOT
    )
    assert answer.stdout.decode().strip() == f"{selector.identity} True"


def test_a_hundred_thousand_selectors_are_cheap() -> None:
    """Issue: 100,000 policies with the caller's selectors in 160 MB.  An object of ipaddress costs 500 bytes a side."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    many = [Selector(f"10.{n >> 8}.{n & 255}.0/24", f"172.16.{n >> 8}.{n & 255}/32") for n in range(2000)]
    lean = (tracemalloc.get_traced_memory()[0] - before) / len(many)
    before = tracemalloc.get_traced_memory()[0]
    objects = [(one.source, one.destination) for one in many]
    heavy = (tracemalloc.get_traced_memory()[0] - before) / len(many)
    tracemalloc.stop()
    assert lean < 300, lean
    assert heavy > 2 * lean, "the detector: what it was before shows"
    assert len(objects) == len(many)


# Rows of a dump against the whole policies.


def judged(message: Message) -> Policy | str:
    policy = judged_by(lambda: policy_from(message))
    return policy if isinstance(policy, Policy) else str(policy)


def row_of(policy: Policy, abi: Abi, requests: bytes) -> PolicyRow:
    """What `policy_rows` has to say, from the policy that a person sees."""
    selector = policy.selector
    assert templates_of(requests, abi) == policy.templates
    return PolicyRow(
        int(policy.direction), selector.identity, selector.is_plain, policy.id, int(policy.action), policy.priority,
        requests, policy.lifetime_hard, int(policy.scope),
    )  # fmt: skip


def requests_of(message: Message) -> bytes:
    return message.raw(message.abi.extensions[18])[16:]  # behind struct sadb_x_policy


def big(abi: Abi) -> Abi:
    return Abi.named("-".join((abi.name, *map(str, abi.release), "big")))


VECTORS = [(one.data, one.abi) for one in EVERYTHING]
VECTORS += [(mirrored(one.data, one.abi), big(one.abi)) for one in EVERYTHING]


def test_rows_are_what_policies_say() -> None:
    """Over every vector, alone and between others."""
    policies = 0
    for data, abi in VECTORS:
        message = decode(data, abi)
        policy, table = judged(message), decode_many([data], abi)
        if isinstance(policy, str):
            with pytest.raises(DecodeError) as caught:
                list(policy_rows(table))
            assert str(caught.value) == policy
        else:
            assert list(policy_rows(table)) == [row_of(policy, abi, requests_of(message))]
            policies += 1
    assert policies > 40
    for abi in {abi for _, abi in VECTORS}:
        whole = [data for data, one in VECTORS if one == abi and isinstance(judged(decode(data, abi)), Policy)]
        table = decode_many(whole, abi)
        assert list(policy_rows(table)) == [
            row_of(policy_from(one), abi, requests_of(one)) for one in map(decode, whole, [abi] * len(whole))
        ]


SELECTORS = [
    Selector("10.1.0.0/16", "10.2.0.0/16"),
    Selector("10.1.2.3/16", "10.2.0.0/16"),
    Selector("10.1.0.0/16", "10.2.9.9/16", protocol=6, destination_port=443),
    Selector("10.1.0.0/16", "10.2.0.0/16", protocol=1, icmp_type=8),
    Selector("2001:db8::/32", "::/0", protocol=58, icmp_type=135),
    Selector("2001:db8::1/32", "::/0"),
]


@pytest.mark.parametrize("profile", ALL)
def test_rows_of_an_embedded_kernel(profile: str) -> None:
    client = Client(profile)
    for number, selector in enumerate(SELECTORS):
        client.add(discard(selector, number + 1, IN))
        client.add(esp(TUNNEL, Template.transport(), selector=selector, priority=2**31 + number if number else 1))
    limited = Policy(OUT, Selector("10.9.0.0/16", "10.2.0.0/16"), Action.NONE,
                     lifetime_hard=Lifetime(0, 0, 3600, 60))  # fmt: skip
    client.add(limited)
    with connect(client.kernel.connect()) as kernel:
        dump = kernel.dump_policies()
        rows = list(policy_rows(dump.messages))
        assert rows == [
            row_of(policy, kernel.abi, requests_of(message))
            for policy, message in zip(dump, dump.messages, strict=True)
        ]
    assert len(rows) == 2 * len(SELECTORS) + 1
    assert {row.is_plain for row in rows} == {True, False}
    assert {row.direction for row in rows} == {int(IN), int(OUT)}
    assert sum(row.lifetime_hard is not None and row.lifetime_hard.addtime == 3600 for row in rows) == 1


def test_rows_of_several_batches() -> None:
    """As a native dump arrives: each arena keeps its own offsets."""
    policies = [
        Policy(Direction.OUT, Selector(f"10.{n}.0.0/16", "10.2.0.0/16"), templates=(TUNNEL,) * (n % 3), id=n)
        for n in range(9)
    ]
    data = [encode(policy_message(MessageType.SPDADD, one, LINUX)) for one in policies]
    table = assemble([Batch.of(data[:4]), Batch.of([]), Batch.of(data[4:])], LINUX)
    assert [row.id for row in policy_rows(table)] == list(range(9))
    assert [templates_of(row.requests, LINUX) for row in policy_rows(table)] == [one.templates for one in policies]
    assert [selector_from(one) for one in table] == [one.selector for one in policies]
