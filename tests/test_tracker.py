"""What the tracker decides, without a kernel: order, priorities, images, the table."""

from __future__ import annotations

import pickle

import pytest

from pfkey import (
    Abi,
    Action,
    Assignment,
    Direction,
    Level,
    NotSupported,
    NotTracked,
    Rank,
    SAProtocol,
    Selector,
    Template,
)
from pfkey.constants import Mode
from pfkey.messages import Policy
from pfkey.tracker import Image, Installed, State, Step, TrackedPolicy, decide, image_of, image_of_policy, priority_of

LINUX, FREEBSD = Abi.linux(), Abi.freebsd(13)
SITE = Selector("10.1.0.0/16", "10.2.0.0/16")
TUNNEL = Template.tunnel("192.0.2.1", "198.51.100.1", reqid=1)


def tracked(abi: Abi = LINUX) -> TrackedPolicy:
    return TrackedPolicy(Direction.OUT, SITE, abi)


# The formula, row by row as it was observed: (selector, regular, trap, pass, fallback).
PRIORITIES = [
    (Selector("0.0.0.0/0", "0.0.0.0/0"), 399999, 400000, 199999, 599999),
    (Selector("10.1.0.0/16", "10.2.0.0/16"), 383615, 383616, 183615, 583615),
    (Selector("10.1.0.1", "10.2.0.1"), 367231, 367232, 167231, 567231),
    (Selector("10.1.0.0/16", "10.2.0.0/16", protocol="tcp"), 383359, 383360, 183359, 583359),
    (Selector("10.1.0.0/16", "10.2.0.0/16", protocol="tcp", destination_port=443), 383295, 383296, 183295, 583295),
    (Selector("10.1.0.0/16", "10.2.0.0/16", protocol=1, icmp_type=8, icmp_code=0), 383295, 383296, 183295, 583295),
    (Selector("10.1.0.0/16", "10.2.0.0/16", protocol=1, icmp_type=3, icmp_code=4), 383231, 383232, 183231, 583231),
    (Selector("10.1.0.1", "10.2.0.1", protocol=17, source_port=5, destination_port=5), 366847, 366848, 166847, 566847),
    (Selector("2001:db8:1::/48", "2001:db8:2::/48"), 350847, 350848, 150847, 550847),
    (
        Selector("2001:db8::1", "2001:db8::2", protocol=6, source_port=1, destination_port=2),
        268543,
        268544,
        68543,
        468543,
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("selector", "regular", "trap", "passing", "fallback"), PRIORITIES, ids=lambda value: str(value)
)
def test_priority_formula(selector: Selector, regular: int, trap: int, passing: int, fallback: int) -> None:
    assert priority_of(selector, Rank.REGULAR) == regular
    assert priority_of(selector, Rank.TRAP) == trap
    assert priority_of(selector, Rank.PASS) == passing
    assert priority_of(selector, Rank.FALLBACK) == fallback


def order(*assignments: Assignment) -> list[Assignment]:
    policy = tracked()
    for assignment in assignments:
        policy.insert(assignment)
    return list(policy.assignments)


def test_order_is_priority_then_rank_then_reqid_then_newest() -> None:
    old, new = Assignment(TUNNEL, spi=1), Assignment(TUNNEL, spi=2)
    assert order(old, new) == [new, old]
    trap = Assignment(TUNNEL, rank=Rank.TRAP)
    assert order(old, trap) == [old, trap] == order(trap, old)
    bare = Assignment(Template.transport(), spi=3)
    assert order(old, bare) == [old, bare] == order(bare, old)
    first, second = Assignment(spi=4, action=Action.DISCARD), Assignment(spi=5, action=Action.DISCARD)
    assert order(first, second) == [second, first]
    strong_trap = Assignment(TUNNEL, rank=Rank.TRAP, priority=10)
    assert order(old, strong_trap) == [strong_trap, old]


def test_equal_manual_priorities_put_the_regular_in_front_of_the_trap() -> None:
    regular, trap = Assignment(TUNNEL, priority=1000), Assignment(TUNNEL, rank=Rank.TRAP, priority=1000)
    assert order(regular, trap) == [regular, trap] == order(trap, regular)


def test_a_discard_with_a_reqid_stands_in_front_and_one_without_behind() -> None:
    sa = Assignment(TUNNEL, spi=1)
    guard = Assignment(TUNNEL, spi=1, action=Action.DISCARD)
    assert order(sa, guard) == [guard, sa]
    assert order(sa, Assignment(action=Action.DISCARD)) == [sa, Assignment(action=Action.DISCARD)]


def test_the_oldest_of_equal_assignments_is_removed() -> None:
    policy = tracked()
    x, y = Assignment(TUNNEL, spi=1), Assignment(TUNNEL, spi=2)
    for assignment in (x, y, x):
        policy.insert(assignment)
    policy.remove(x)
    assert policy.assignments == (x, y)
    policy.remove(x)
    assert policy.assignments == (y,)
    with pytest.raises(NotTracked, match=r"^out 10.* is not used by"):
        policy.remove(x)
    assert policy.assignments == (y,)


def test_withdraw_and_restore_undo_exactly() -> None:
    policy = tracked()
    x, y = Assignment(TUNNEL, spi=1), Assignment(TUNNEL, spi=2)
    for assignment in (x, y, x, y):
        policy.insert(assignment)
    before = policy.assignments
    policy.undo(policy.insert(x))
    assert policy.assignments == before
    for assignment in (x, y):
        policy.undo(policy.remove(assignment))
        assert policy.assignments == before
    policy.undo(policy.clear())
    assert policy.assignments == before


def test_undoing_a_long_way_back_restores_the_order() -> None:
    """Through the number of assignments at which they are kept in another way."""
    policy = tracked()
    some = [Assignment(TUNNEL, spi=spi % 7, rank=Rank.TRAP if spi % 3 else Rank.REGULAR) for spi in range(1, 41)]
    steps, before = [], []
    for assignment in some:
        before.append(policy.assignments)
        steps.append(policy.insert(assignment))
    for assignment in some[::-1][:38]:
        before.append(policy.assignments)
        steps.append(policy.remove(assignment))
    for step, there in zip(reversed(steps), reversed(before), strict=True):
        policy.undo(step)
        assert policy.assignments == there


def test_thousands_of_assignments_keep_their_order() -> None:
    policy = tracked()
    many = [Assignment(TUNNEL, spi=spi) for spi in range(1, 3001)]
    for assignment in many:
        policy.insert(assignment)
    assert list(policy.assignments) == many[::-1]
    for assignment in many[1::2]:
        policy.remove(assignment)
    assert list(policy.assignments) == many[0::2][::-1]


def test_assignments_are_values() -> None:
    one, other = Assignment(TUNNEL, spi=7), Assignment(Template.tunnel("192.0.2.1", "198.51.100.1", reqid=1), spi=7)
    assert one == other
    assert len({one, other}) == 1
    assert one != Assignment(TUNNEL, spi=8)
    assert pickle.loads(pickle.dumps(one)) == one
    assert one.reversed().templates[0].source == TUNNEL.destination
    assert one.reversed().reversed() == one
    with pytest.raises(AttributeError, match="does not change"):
        one.spi = 9
    assert "0x7" in repr(one)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Assignment(TUNNEL, spi=(1, 2)),
        lambda: Assignment(TUNNEL, action=Action.BYPASS),
        lambda: Assignment(TUNNEL, priority=-1),
        lambda: Assignment(TUNNEL, priority=1 << 32),
    ],
)
def test_what_an_assignment_cannot_be(build: object) -> None:
    with pytest.raises(ValueError, match=r"SPIs|sockets|priority"):
        build()  # type: ignore[operator]


# (what differs, the other assignment, is it another image on Linux, on FreeBSD)
RELEVANT = [
    ("spi", Assignment(TUNNEL, spi=99), False, False),
    ("reqid", Assignment(Template.tunnel("192.0.2.1", "198.51.100.1", reqid=2)), True, True),
    ("destination", Assignment(Template.tunnel("192.0.2.1", "198.51.100.2", reqid=1)), True, True),
    ("source", Assignment(Template.tunnel("192.0.2.2", "198.51.100.1", reqid=1)), True, True),
    ("mode", Assignment(Template.transport(reqid=1)), True, True),
    ("protocol", Assignment(Template.tunnel("192.0.2.1", "198.51.100.1", reqid=1, protocol=SAProtocol.AH)), True, True),
    ("action", Assignment(TUNNEL, action=Action.DISCARD), True, True),
    ("priority", Assignment(TUNNEL, priority=5), True, True),
    ("rank", Assignment(TUNNEL, rank=Rank.TRAP), True, True),
    ("a second template", Assignment(TUNNEL, Template.transport(reqid=1)), True, True),
]


@pytest.mark.parametrize(("what", "other", "linux", "freebsd"), RELEVANT, ids=[row[0] for row in RELEVANT])
def test_what_counts_as_a_relevant_change(what: str, other: Assignment, linux: bool, freebsd: bool) -> None:
    base = Assignment(TUNNEL, spi=1)
    for abi, differs in ((LINUX, linux), (FREEBSD, freebsd)):
        policy = tracked(abi)
        assert (policy.image(base) != policy.image(other)) is differs


def test_images_are_what_the_kernel_stores() -> None:
    def image(template: Template, abi: Abi) -> Image:
        return image_of(Action.IPSEC, (template,), 1, abi)

    required = Template.transport(level=Level.REQUIRE)
    assert image(Template.transport(level=Level.DEFAULT), LINUX) == image(required, LINUX)
    assert image(Template.transport(level=Level.DEFAULT), FREEBSD) != image(required, FREEBSD)
    with_reqid = Template.transport(reqid=5, level=Level.REQUIRE)
    for abi in (LINUX, FREEBSD):
        assert image(with_reqid, abi) == image(required, abi)
    ends = Template.tunnel("192.0.2.1", "198.51.100.1")
    transport = Template(SAProtocol.ESP, Mode.TRANSPORT, ends.source, ends.destination)
    assert image(transport, LINUX) == image(required, LINUX)
    assert image_of(Action.IPSEC, (), 1, LINUX) == image_of(Action.NONE, (), 1, LINUX)
    assert image_of(Action.DISCARD, (TUNNEL,), 1, LINUX) == image_of(Action.DISCARD, (), 1, LINUX)


def test_what_is_sent_has_the_image_that_is_expected_back() -> None:
    for abi in (LINUX, FREEBSD):
        policy = tracked(abi)
        for assignment in (
            Assignment(TUNNEL),
            Assignment(TUNNEL, action=Action.DISCARD),
            Assignment(action=Action.NONE),
        ):
            assert image_of_policy(policy.policy(assignment), abi) == policy.image(assignment)


D, OTHER = image_of(Action.DISCARD, (), 1, LINUX), image_of(Action.NONE, (), 1, LINUX)
TABLE = [
    (None, Installed(State.UNKNOWN), Step.READ),
    (D, Installed(State.UNKNOWN, D), Step.READ),
    (None, Installed(), Step.NOTHING),
    (None, Installed(State.OURS, D), Step.DELETE),
    (None, Installed(State.FOREIGN, D), Step.NOTHING),
    (D, Installed(), Step.ADD),
    (D, Installed(State.OURS, D), Step.NOTHING),
    (D, Installed(State.OURS, OTHER), Step.UPDATE),
    (D, Installed(State.FOREIGN, OTHER), Step.REFUSE),
    (D, Installed(State.FOREIGN, D), Step.REFUSE),
]


@pytest.mark.parametrize(("desired", "installed", "step"), TABLE)
def test_the_table(desired: Image | None, installed: Installed, step: Step) -> None:
    assert decide(desired, installed) is step


def test_what_a_read_makes_of_doubt() -> None:
    ours = Installed(State.OURS, D, 7)
    assert ours.doubted().found(OTHER, 8) == Installed(State.OURS, OTHER, 8, was_ours=True)
    assert ours.doubted().doubted().found(None, 0) == Installed()
    tried = Installed().doubted(tried=D)
    assert tried.found(D, 9).state is State.OURS
    assert tried.found(OTHER, 9).state is State.FOREIGN


def test_a_direction_that_the_system_lacks() -> None:
    with pytest.raises(NotSupported, match=r"FreeBSD 13 has no policies of direction FWD; it has IN, OUT"):
        TrackedPolicy(Direction.FWD, SITE, FREEBSD)


def test_the_policy_that_is_sent_is_canonical() -> None:
    policy = TrackedPolicy(Direction.OUT, Selector("10.1.2.3/16", "10.2.9.9/16"), LINUX)
    expected = Policy(Direction.OUT, SITE, Action.IPSEC, (TUNNEL,), priority=383615)
    assert policy.policy(Assignment(TUNNEL, spi=3)) == expected
