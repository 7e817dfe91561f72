"""The two ways to a message, in one step and extension by extension, give the same bytes."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pfkey import (
    Abi,
    EncodeError,
    Lifetime,
    MessageType,
    Mode,
    Policy,
    SAProtocol,
    SecurityAssociation,
    Selector,
    Template,
    _direct,
    decode,
    encode,
    typed,
)
from pfkey._values import packed_request
from pfkey.messages import NATTraversal

NAMES = ("linux", "freebsd-9", "freebsd-15", "netbsd")
ABIS = [Abi.named(f"{name}-{order}") for name in NAMES for order in ("little", "big")]
MACOS = Abi.macos()

lifetimes = st.none() | st.builds(
    Lifetime, st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)
)
pairs = st.one_of(
    st.tuples(st.ip_addresses(v=4), st.ip_addresses(v=4)), st.tuples(st.ip_addresses(v=6), st.ip_addresses(v=6))
)
associations = st.builds(
    lambda pair, **rest: SecurityAssociation(*pair, **rest),
    pairs,
    spi=st.integers(0, 2**32 - 1),
    protocol=st.sampled_from([SAProtocol.ESP, SAProtocol.AH, SAProtocol.IPCOMP]),
    mode=st.sampled_from([Mode.ANY, Mode.TUNNEL, Mode.TRANSPORT, Mode.BEET, 7]),
    reqid=st.integers(0, 2**32 - 1),
    authentication=st.sampled_from([None, "hmac-sha1", "HMAC-SHA2-256", 5]),
    authentication_key=st.binary(max_size=40),
    encryption=st.sampled_from([None, "aes-cbc", "null", 12]),
    encryption_key=st.binary(max_size=40),
    replay_window=st.integers(0, 32),
    flags=st.sampled_from([0, 0x400, 0x20000000]),
    lifetime_hard=lifetimes,
    lifetime_soft=lifetimes,
    nat_traversal=st.none() | st.builds(NATTraversal, st.integers(0, 65535), st.integers(0, 65535)),
)
templates = st.lists(
    st.one_of(
        st.just(Template.transport()),
        st.builds(lambda pair, reqid: Template.tunnel(*pair, reqid=reqid), pairs, st.integers(0, 65535)),
    ),
    max_size=3,
).map(tuple)
selectors = st.one_of(
    st.just(Selector("10.1.2.3/16", "10.2.0.0/16", protocol="tcp", source_port=1024)),
    st.just(Selector("0.0.0.0/0", "10.2.0.1", protocol="icmp", icmp_type=8, icmp_code=0)),
    st.just(Selector("2001:db8::/48", "::/0")),
)
policies = st.builds(
    Policy,
    st.sampled_from([1, 2, 3]),
    selectors,
    st.sampled_from([0, 1, 2]),
    templates,
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    lifetimes,
    lifetimes,
    scope=st.sampled_from([0, 1, 2]),
)


@given(associations, st.sampled_from([MessageType.ADD, MessageType.UPDATE]), st.sampled_from(ABIS))
@settings(deadline=None, max_examples=300)
def test_associations(sa: SecurityAssociation, kind: MessageType, abi: Abi) -> None:
    numbers = typed._numbers(sa, typed.SATYPE_OF[SAProtocol(sa.protocol)], abi)
    assert _direct.association(kind, sa, numbers, abi) is not None
    message = typed.association_message(kind, sa, abi)
    general = typed._association_message(kind, sa, numbers, abi)
    assert encode(message) == encode(general)
    assert dict(message.extensions) == dict(general.extensions)
    assert encode(decode(encode(message), abi)) == encode(message)


@given(policies, st.sampled_from([MessageType.SPDADD, MessageType.SPDUPDATE]), st.sampled_from(ABIS))
@settings(deadline=None, max_examples=300)
def test_policies(policy: Policy, kind: MessageType, abi: Abi) -> None:
    requests = b"".join(packed_request(template, abi) for template in policy.templates)
    assert _direct.policy(kind, policy, requests, abi) is not None
    message = typed.policy_message(kind, policy, abi)
    general = typed._policy_message(kind, policy, policy.templates, abi)
    assert encode(message) == encode(general)
    assert dict(message.extensions) == dict(general.extensions)


@pytest.mark.parametrize(
    "ends", [("2001:db8::2%1", "::1"), ("::1", "2001:db8::2%1"), ("fe80::1%3", "fe80::2")], ids=str
)
def test_a_scope_is_sent_whatever_the_address(ends: tuple[str, str]) -> None:
    """Between hosts it is what tells an alias of a policy from the policy itself (FreeBSD)."""
    message = typed.policy_message(MessageType.SPDADD, Policy(2, Selector(*ends)), Abi.freebsd(14))
    sides = [side.scope_id for side in (message.source, message.destination) if side is not None]
    assert sides == [int(end.partition("%")[2] or 0) for end in ends]


HERE, THERE = ip_address("192.0.2.1"), ip_address("192.0.2.2")


def test_a_template_is_packed_for_each_system_anew() -> None:
    template = Template.tunnel("2001:db8::1", "2001:db8::2", reqid=7)
    fresh = {abi: packed_request(Template.tunnel("2001:db8::1", "2001:db8::2", reqid=7), abi) for abi in ABIS}
    assert len(set(fresh.values())) > 3
    for _ in range(2):
        for abi in ABIS:
            assert packed_request(template, abi) == fresh[abi]
    for other in (pickle.loads(pickle.dumps(template)), copy.deepcopy(template), replace(template)):
        assert other == template
        assert packed_request(other, ABIS[1]) == fresh[ABIS[1]]
    changed = replace(template, reqid=8)
    assert packed_request(changed, ABIS[-1]) != fresh[ABIS[-1]]
    assert "packed" not in repr(template)


ESP = SecurityAssociation(HERE, THERE, 1, encryption="aes-cbc", encryption_key=bytes(16))
RARE = [
    replace(ESP, new_source=ip_address("192.0.2.3")),
    replace(ESP, source=ip_address("fe80::1%3"), destination=ip_address("fe80::2")),
    replace(ESP, destination=ip_address("::1")),
]


@pytest.mark.parametrize("sa", RARE, ids=["moves", "scope", "families"])
def test_what_is_rare_takes_the_general_way(sa: SecurityAssociation) -> None:
    abi = Abi.freebsd(14)
    numbers = typed._numbers(sa, 3, abi)
    assert _direct.association(MessageType.ADD, sa, numbers, abi) is None
    assert encode(typed.association_message(MessageType.ADD, sa, abi))


def test_macos_flags_take_the_general_way() -> None:
    sa = replace(ESP, flags=0x400)
    assert _direct.association(MessageType.ADD, sa, typed._numbers(sa, 3, MACOS), MACOS) is None
    assert typed.association_message(MessageType.ADD, sa, MACOS).sa.flags == 0x400  # type: ignore[union-attr]


TOO_MUCH = [{"spi": 1 << 32}, {"reqid": -1}, {"state": 300}, {"lifetime_hard": Lifetime(1 << 32)}]


@pytest.mark.parametrize("change", TOO_MUCH)
def test_what_does_not_fit_has_words(change: dict[str, object]) -> None:
    with pytest.raises(EncodeError, match="does not fit"):
        typed.association_message(MessageType.ADD, replace(ESP, **change), Abi.linux())  # type: ignore[arg-type]
    with pytest.raises(EncodeError, match="at most 65535 fit"):
        typed.association_message(MessageType.ADD, replace(ESP, encryption_key=bytes(9000)), Abi.linux())
