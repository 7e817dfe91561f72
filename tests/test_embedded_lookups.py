"""The embedded Linux kernel finds the policies that a real one found, ties between overlapping ones included."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from embedded_lookups import HOSTS, PORTS, RECORDED, data_of

from pfkey import Action, Direction
from pfkey.embedded import EmbeddedKernel, Profile
from pfkey.embedded.profiles import LINUX_6_1
from pfkey.embedded.traffic import make_packet


@pytest.fixture(scope="module")
def cases() -> list[list[Any]]:
    loaded = json.loads(RECORDED.read_text())
    assert isinstance(loaded, list)
    return loaded


def differing(cases: list[list[Any]], profile: Profile) -> list[tuple[int, list[Any]]]:
    """The cases in which this kernel finds something else, up to the step where it does."""
    wrong = []
    for number, case in enumerate(cases):
        kernel = EmbeddedKernel(profile)
        channel = kernel.connect()
        for step, (operation, refused) in enumerate(case):
            channel.send(data_of(tuple(operation)))
            found = [kernel.lookup(Direction.OUT, *HOSTS, protocol=17, ports=(40000, port)) for port in PORTS]
            if [policy is not None and policy.action == Action.DISCARD for policy in found] != refused:
                wrong.append((number, case[: step + 1]))
                break
    return wrong


def test_the_policies_a_real_kernel_found(cases: list[list[Any]]) -> None:
    assert len(cases) >= 250
    assert differing(cases, LINUX_6_1) == []


@pytest.mark.parametrize(
    "quirk",
    [{"hosts_apart": False}, {"update_keeps_place": False}, {"hosts_apart": False, "ties_by_link": True}],
    ids=["no table of hosts", "updates go behind", "6.12"],
)
def test_the_cases_tell_other_orders_apart(cases: list[list[Any]], quirk: dict[str, bool]) -> None:
    assert differing(cases, replace(LINUX_6_1, **quirk))  # type: ignore[arg-type]


def test_the_order_shown_is_the_order_met(cases: list[list[Any]]) -> None:
    """policies() lists what a packet meets first first, the table of hosts woven in."""
    packet = make_packet(LINUX_6_1, *HOSTS, protocol=17, ports=(40000, PORTS[0]))
    met = 0
    for case in cases:
        kernel = EmbeddedKernel("linux")
        channel = kernel.connect()
        for operation, _ in case:
            channel.send(data_of(tuple(operation)))
            matching = [entry for entry in kernel.spd.in_order(Direction.OUT) if entry.matches(packet)]
            assert kernel.spd.match(Direction.OUT, packet) is (matching[0] if matching else None)
            met += len(matching) > 1
    assert met > 1000
