"""What is refused before it is sent: every rule, its words, and that the kernel would indeed have done otherwise."""

from __future__ import annotations

import pytest

from pfkey import (
    Action,
    Direction,
    EmbeddedKernel,
    EncodeError,
    KernelError,
    Level,
    Lifetime,
    MessageType,
    Mode,
    NotSupported,
    Policy,
    SAProtocol,
    Selector,
    Template,
    connect,
)
from pfkey.tracker import image_of_policy
from pfkey.typed import policy_message

OUT, IN, FWD = Direction.OUT, Direction.IN, Direction.FWD
SITE = Selector("10.1.0.0/16", "10.2.0.0/16")
LINUX, FREEBSD, ALL = ["linux"], ["freebsd-12", "freebsd-13", "freebsd-14"], ["linux", "freebsd-12", "freebsd-14"]


def ipsec(*templates: Template, direction: Direction = OUT) -> Policy:
    return Policy(direction, SITE, Action.IPSEC, templates)


# (what, on which systems, the policy, words of the refusal, what the kernel does: an error, or it stores another image)
REJECTS, STORES = "rejects", "stores something else"
ROWS = [
    ("forward", FREEBSD, Policy(FWD, SITE, Action.NONE), "no policies of direction FWD", REJECTS),
    ("direction 9", ALL, Policy(9, SITE, Action.NONE), "no policies of direction 9", REJECTS),
    ("bypass", ALL, Policy(OUT, SITE, Action.BYPASS), "BYPASS is for sockets", REJECTS),
    ("no template", LINUX, ipsec(), "lets the packets through in clear", STORES),
    ("no template", FREEBSD, ipsec(), "answers EINVAL", REJECTS),
    ("seven templates", LINUX, ipsec(*[Template.transport()] * 7), "7 templates; Linux takes 6", REJECTS),
    ("five templates", FREEBSD, ipsec(*[Template.transport()] * 5), "5 templates; .* takes 4", REJECTS),
    ("a protocol", ALL, ipsec(Template(99)), "not protocol 99", REJECTS),
    ("tcp-md5", ALL, ipsec(Template(SAProtocol.TCPSIGNATURE)), "not protocol 6", REJECTS),
    ("any mode", ALL, ipsec(Template(mode=Mode.ANY)), "transport or tunnel", REJECTS),
    ("no end points", ALL, ipsec(Template(mode=Mode.TUNNEL)), "needs both end points", REJECTS),
    ("a level", FREEBSD, ipsec(Template(level=9)), "level 9 is none of", REJECTS),
    ("level use", LINUX, ipsec(Template.tunnel("10.9.0.1", "10.9.0.2", level=Level.USE)), "to level USE", REJECTS),
    ("a great reqid", ALL, ipsec(Template.transport(reqid=20000)), "replaces a unique reqid over 16383", STORES),
]  # fmt: skip
CASES = [
    pytest.param(profile, policy, words, fate, id=f"{what}-{profile}")
    for what, profiles, policy, words, fate in ROWS
    for profile in profiles
]


@pytest.mark.parametrize(("profile", "policy", "words", "fate"), CASES)
def test_refused_for_a_reason(profile: str, policy: Policy, words: str, fate: str) -> None:
    with connect(EmbeddedKernel(profile).connect()) as kernel:
        for call in (kernel.check_policy, kernel.add_policy, kernel.update_policy):
            with pytest.raises((NotSupported, EncodeError), match=words):
                call(policy)
        assert kernel.dump_policies() == []
        raw = policy_message(MessageType.SPDADD, policy, kernel.abi)
        if fate == REJECTS:
            with pytest.raises(KernelError):
                kernel.request(raw)
            return
        kernel.request(raw)
        assert image_of_policy(kernel.dump_policies()[0], kernel.abi) != _literally(policy)


def _literally(policy: Policy) -> object:
    """The image without any normal form."""
    templates = tuple((t.protocol, t.mode, t.level, t.reqid, t.source, t.destination) for t in policy.templates)
    return (policy.action, policy.priority, templates)


# Refused because of what it would mean, although the kernel stores it as it is.
MEANINGS = [
    ("icmp type 0", ALL, Policy(OUT, Selector("::/0", "::/0", protocol=58, icmp_type=0, icmp_code=0)), "any type"),
    ("level default", FREEBSD, ipsec(Template(level=Level.DEFAULT)), "leaves packets unprotected"),
    ("a soft lifetime", FREEBSD, Policy(OUT, SITE, Action.NONE, lifetime_soft=Lifetime(1)), "no soft lifetimes"),
    ("a scope", LINUX, Policy(OUT, Selector("fe80::1%3", "fe80::2%3"), Action.NONE), "forgets the scope"),
    ("beet", LINUX, ipsec(Template(mode=Mode.BEET)), "drops the addresses of BEET"),
]


@pytest.mark.parametrize(
    ("profile", "policy", "words"),
    [pytest.param(p, policy, words, id=f"{what}-{p}") for what, profiles, policy, words in MEANINGS for p in profiles],
)
def test_refused_for_its_meaning(profile: str, policy: Policy, words: str) -> None:
    with connect(EmbeddedKernel(profile).connect()) as kernel, pytest.raises(NotSupported, match=words):
        kernel.add_policy(policy)


ACCEPTED = [
    ipsec(Template.transport()),
    ipsec(Template.tunnel("10.9.0.1", "10.9.0.2", reqid=16383)),
    ipsec(Template.transport(level=Level.USE), direction=IN),
    ipsec(Template.tunnel("2001:db8::1", "2001:db8::2", protocol=SAProtocol.AH)),
    Policy(OUT, SITE, Action.NONE, priority=0xFFFFFFFF),
    Policy(OUT, Selector("10.1.0.0/16", "10.2.0.0/16", protocol=1, icmp_type=8, icmp_code=0), Action.DISCARD),
]


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize("policy", ACCEPTED, ids=str)
def test_what_is_sound_goes_through(profile: str, policy: Policy) -> None:
    with connect(EmbeddedKernel(profile).connect()) as kernel:
        kernel.add_policy(policy)
        held = kernel.dump_policies()[0]
        assert (held.action, held.templates, held.priority) == (policy.action, policy.templates, policy.priority)
