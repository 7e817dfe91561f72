"""What real kernels were recorded to answer, the embedded ones answer too, to the last byte.

Given are only what a kernel draws from outside: the time of each message, and the SPIs that it chose.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pfkey.embedded import EmbeddedChannel, EmbeddedKernel

DATA = Path(__file__).parent / "data"
MONITOR = "monitor(unregistered socket)"

# Vectors -> profile, SPI chosen, and since which exchange which second went on (the fractions are ours: both real
# kernels were asked several times a second).
RECORDINGS: dict[str, tuple[str, int, dict[str, float]]] = {
    "linux-6.1": (
        "linux",
        0x1438,
        {
            "register-esp": 0x6B045699, "add-natt": 0x6B04569A, "getspi": 0x6B04569B, "spdadd": 0x6B04569C + 0.6,
            "spdupdate-new": 0x6B04569D + 0.2,
        },
    ),
    "freebsd-12.1": (
        "freebsd-12",
        0x1951,
        {
            "register-esp": 0x6B045F74, "add-esp-v6-gcm": 0x6B045F75, "add-ah": 0x6B045F76,
            "spdadd-with-lifetime": 0x6B045F7F,
        },
    ),
}  # fmt: skip


def exchanges(recording: str) -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = json.loads((DATA / f"{recording}.json").read_text())["exchanges"]
    return loaded


def everything(channel: EmbeddedChannel) -> list[bytes]:
    received = []
    while (data := channel.receive(0)) is not None:
        received.append(data)
    return received


class Replay:
    """One embedded kernel that was sent a whole recording."""

    def __init__(self, recording: str, profile: str = "") -> None:
        recorded, spi, times = RECORDINGS[recording]
        profile = profile or recorded
        self.now = 0.0
        kernel = EmbeddedKernel(profile, clock=lambda: self.now, choose_spi=lambda low, high: spi)
        channel, monitor = kernel.connect(), kernel.connect()
        self.answers: dict[str, tuple[str | None, list[bytes]]] = {}
        for exchange in exchanges(recording):
            if exchange["name"] == MONITOR:
                self.answers[MONITOR] = (None, everything(monitor))
                continue
            self.now = times.get(exchange["name"], self.now)
            error = None
            try:
                channel.send(bytes.fromhex(exchange["sent"]))
            except OSError as failure:
                error = str(getattr(failure, "name", failure))
            self.answers[exchange["name"]] = (error, everything(channel))


@pytest.fixture(scope="module")
def replays() -> dict[str, Replay]:
    return {recording: Replay(recording) for recording in RECORDINGS}


CASES = [(recording, exchange["name"]) for recording in RECORDINGS for exchange in exchanges(recording)]


@pytest.mark.parametrize(("recording", "name"), CASES)
def test_same_bytes(recording: str, name: str, replays: dict[str, Replay]) -> None:
    exchange = next(exchange for exchange in exchanges(recording) if exchange["name"] == name)
    error, answers = replays[recording].answers[name]
    assert [data.hex() for data in answers] == exchange["recv"]
    assert error == exchange.get("send_error")


@pytest.mark.parametrize("recording", RECORDINGS)
def test_every_time_is_a_recorded_one(recording: str) -> None:
    """The table of times holds nothing that the recording does not show, and only goes forward."""
    _, _, times = RECORDINGS[recording]
    assert all(earlier < later for earlier, later in pairwise(times.values()))
    shown = (DATA / f"{recording}.json").read_text()
    for moment in times.values():
        assert int(moment).to_bytes(8, "little").hex() in shown


# Other releases answer the same but for this.
_ALGORITHMS = {"register-esp", "register-ah", "register-ipcomp", "add-tcpmd5", "dump-sad"}
_OLDER = {
    "add-esp-big-replay", "update-new-address", "get-absent", "delete-absent", "update-lifetimes", "dump-sad",
    "spdadd-bad-dir", "spddump", "spdget-9", "spdget-6", "spdget-4",
}  # fmt: skip
_BEFORE_GCM = {"register-esp", "register-ah", "register-ipcomp", "add-esp-v6-gcm", "get-v6", "delete"}
DIFFERENCES = {
    ("linux-6.1", "linux-6.12"): set[str](),
    ("linux-6.1", "linux-smp"): set[str](),
    ("freebsd-12.1", "freebsd-13"): _ALGORITHMS,
    ("freebsd-12.1", "freebsd-14"): _ALGORITHMS,
    ("freebsd-12.1", "freebsd-11"): _OLDER,
    ("freebsd-12.1", "freebsd-10"): _OLDER | _BEFORE_GCM,
}


@pytest.mark.parametrize(("recording", "profile"), DIFFERENCES)
def test_other_releases_differ_where_they_should(recording: str, profile: str) -> None:
    answers = Replay(recording, profile).answers
    wrong = set()
    for exchange in exchanges(recording):
        error, received = answers[exchange["name"]]
        if (error, [data.hex() for data in received]) != (exchange.get("send_error"), exchange["recv"]):
            wrong.add(exchange["name"])
    assert wrong - {MONITOR} == DIFFERENCES[recording, profile]
