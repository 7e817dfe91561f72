"""The embedded Linux kernel answers a thousand messages, sane and damaged, as a real Linux 6.1 did."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from embedded_corpus import RECORDED, SCENARIOS, Answer, play
from embedded_steps import A

from pfkey.embedded import EmbeddedChannel, EmbeddedKernel, Profile
from pfkey.embedded.profiles import LINUX_6_1


class Connection:
    """An embedded connection with the members that play() wants."""

    def __init__(self, channel: EmbeddedChannel) -> None:
        self.channel = channel

    def put(self, data: bytes) -> str | None:
        try:
            self.channel.send(data)
        except OSError as error:
            return str(getattr(error, "name", error))
        return None

    def get(self) -> bytes | None:
        return self.channel.receive(0)

    def close(self) -> None:
        self.channel.close()


def answers_of(profile: Profile | str) -> dict[str, list[Answer]]:
    """What an embedded kernel answers to everything, one scenario after the other as they were recorded."""
    kernel = EmbeddedKernel(profile, clock=lambda: 1_700_000_000.0, choose_spi=lambda low, high: low)
    return {name: play(name, lambda: Connection(kernel.connect()), kernel.advance) for name in SCENARIOS}


@pytest.fixture(scope="module")
def recorded() -> dict[str, list[Any]]:
    loaded = json.loads(RECORDED.read_text())
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture(scope="module")
def embedded() -> dict[str, list[Answer]]:
    return answers_of("linux")


@pytest.mark.parametrize("name", SCENARIOS)
def test_same_answers(name: str, recorded: dict[str, list[Any]], embedded: dict[str, list[Answer]]) -> None:
    assert len(recorded[name]) == len(SCENARIOS[name])
    for step, real, ours in zip(SCENARIOS[name], recorded[name], embedded[name], strict=True):
        assert [*ours] == real, f"after {step[0]} by {step[1]}: {step[2]!r}"


def test_nothing_is_left_over(recorded: dict[str, list[Any]]) -> None:
    """The recording and the scenarios belong together, and are not empty."""
    assert set(recorded) == set(SCENARIOS)
    assert sum(len(answers) for answers in recorded.values()) > 700
    assert sum(len(received.get(A, [])) for answers in recorded.values() for _, received in answers) > 800


@pytest.mark.parametrize("profile", ["linux-6.12", "linux-smp"])
def test_the_other_linuxes_answer_the_same(profile: str, recorded: dict[str, list[Any]]) -> None:
    answers = answers_of(profile)
    assert {name: [[*one] for one in answers[name]] for name in SCENARIOS} == {
        name: recorded[name] for name in SCENARIOS
    }


@pytest.mark.parametrize(
    "other",
    [
        replace(LINUX_6_1, first_reqid=16385),
        replace(LINUX_6_1, larval_seconds=29),
        replace(LINUX_6_1, encryption=LINUX_6_1.encryption[:2]),
    ],
    ids=["reqid", "larval", "algorithms"],
)
def test_another_kernel_is_told_apart(other: Profile, recorded: dict[str, list[Any]]) -> None:
    """The comparison would notice: one quirk off, and answers differ."""
    answers = answers_of(other)
    assert any([*ours] != real for name in SCENARIOS for ours, real in zip(answers[name], recorded[name], strict=True))
