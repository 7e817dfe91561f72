"""`pfkey demo`: its figures on every kernel, and that it leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from package import ROOT

from pfkey import Assignment, Direction, MessageType, Policy, PolicyTracker, Selector, cli, connect, stage
from pfkey.embedded import EmbeddedKernel
from pfkey.embedded.profiles import PROFILE_NAMES

PROFILES = ("linux", "freebsd-12", "freebsd-13", "freebsd-14")

# What each direction of the tunnel costs in each chapter, by pfkey, by always updating, by delete + add.
COSTS = {
    "trap": (["SPDADD"], 1, 1),
    "first SA": (["SPDUPDATE"], 1, 2),
    "rekeying": ([], 1, 2),
    "moved peer": (["SPDUPDATE"], 1, 2),
    "moved trap": ([], 0, 0),
    "reauthentication": (["SPDUPDATE", "SPDUPDATE"], 2, 4),
    "last SA gone": (["SPDUPDATE"], 1, 2),
    "trap removed": (["SPDDELETE"], 1, 1),
}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(("demo", *arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, out, err = run(capsys, "--json", *arguments)
    assert (code, err) == (0, "")
    return json.loads(out)  # type: ignore[no-any-return]


@pytest.mark.parametrize("profile", PROFILE_NAMES)
def test_it_can_be_played_on_every_kernel(profile: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where deleted policies stay in dumps for a while."""
    code, out, _ = run(capsys, "--kernel", f"embedded:{profile}")
    assert code == 0, out


@pytest.mark.parametrize("profile", PROFILES)
def test_every_chapter_costs_what_it_should(profile: str, capsys: pytest.CaptureFixture[str]) -> None:
    story = document(capsys, "--kernel", f"embedded:{profile}")
    ways = story["directions"]
    assert ways == (["in", "fwd", "out"] if profile == "linux" else ["in", "out"])
    assert [chapter["name"] for chapter in story["chapters"]] == list(COSTS)
    before = {"tracker": 0, "always_update": 0, "delete_then_add": 0}
    for chapter in story["chapters"]:
        sent, updates, pairs = COSTS[chapter["name"]]
        calls = [call for call in chapter["calls"] if "direction" in call]
        for way in ways:
            assert [kind for call in calls if call["direction"] == way for kind in call["sent"]] == sent, chapter[
                "name"
            ]
        after = calls[-1]["messages"]
        grown = {name: after[name] - before[name] for name in after}
        assert grown == {
            # Each update of a kernel whose own leaves a moment without a policy has a guard: an SPDADD, an SPDDELETE.
            "tracker": (len(sent) + (profile != "linux") * 2 * sent.count("SPDUPDATE")) * len(ways),
            "always_update": updates * len(ways),
            "delete_then_add": pairs * len(ways),
        }, chapter["name"]
        before = after
    assert story["totals"]["messages"] == before
    assert all(check["held"] for check in story["checks"])
    assert any("0 SPD messages" in check["what"] for check in story["checks"])


@pytest.mark.parametrize(
    ("profile", "ours", "always_update"),
    [
        ("linux", 0, 0),  # puts the new policy in before it takes the old one out
        ("freebsd-12", 0, 12),  # unlinks first: one step at each update, but ours are guarded
        ("freebsd-13", 0, 12),
        ("freebsd-14", 0, 12),  # swaps, but a packet sees no policy while the only one of its direction is swapped
    ],
)
def test_steps_without_a_policy_are_told_as_they_are(
    profile: str, ours: int, always_update: int, capsys: pytest.CaptureFixture[str]
) -> None:
    story = document(capsys, "--kernel", f"embedded:{profile}")
    bare, steps = story["totals"]["steps_without_policy"], story["totals"]["steps_probed"]
    assert (bare["tracker"], bare["always_update"]) == (ours, always_update)
    assert bare["delete_then_add"] > 0
    assert all(bare[name] < steps[name] for name in bare)
    _, text, _ = run(capsys, "--kernel", f"embedded:{profile}")
    assert ("under a guard" in text) == (always_update > 0)


def test_each_call_shows_the_policy_that_was_sent(capsys: pytest.CaptureFixture[str]) -> None:
    story = document(capsys)
    assert story["kernel"] == "embedded:linux"
    calls = [call for chapter in story["chapters"] for call in chapter["calls"] if "direction" in call]
    for call in calls:
        assert (call["policy"] is None) == (not call["sent"])
        if call["policy"] is not None:
            assert call["policy"]["direction"] == call["direction"]
    first = calls[0]["policy"]
    assert (first["source"], first["destination"]) == ("203.0.113.0/24", "198.51.100.0/24")
    assert first["templates"][0]["source"] == "192.0.2.2"
    moved = next(chapter for chapter in story["chapters"] if chapter["name"] == "moved peer")
    assert moved["calls"][-3]["policy"]["templates"][0]["destination"] == "192.0.2.3"


def test_the_text_shows_every_call(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--kernel", "embedded:linux")
    assert (code, err) == (0, "")
    story = document(capsys, "--kernel", "embedded:linux")
    calls = [call for chapter in story["chapters"] for call in chapter["calls"]]
    lines = [line.split() for line in out.splitlines() if line.startswith("   ")]
    told = [line for line in lines if line[0] in {"add", "remove", "replace", "add_sa", "delete_sa"}]
    assert [line[0] for line in told] == [call["call"] for call in calls]
    assert "ok      a rekeying cost 0 SPD messages" in out
    assert "ok      the changed end point cost exactly 1 SPDUPDATE for each direction (in, fwd, out)" in out


def test_more_rekeyings_cost_the_tracker_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    once = document(capsys)["totals"]["messages"]
    often = document(capsys, "--rekeyings", "24")["totals"]["messages"]
    assert often["tracker"] == once["tracker"] == 21
    assert often["always_update"] == once["always_update"] + 23 * 3
    assert often["delete_then_add"] == once["delete_then_add"] + 23 * 6


# What it leaves behind, and what it leaves alone.


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> EmbeddedKernel:
    """What the demo takes for the native kernel."""
    kernel = EmbeddedKernel("linux")
    monkeypatch.setattr(stage, "native_channel", kernel.connect)
    return kernel


def test_on_a_real_kernel_it_says_that_it_cannot_probe(
    embedded: EmbeddedKernel, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "--kernel", "native")
    assert code == 0
    assert "No probe is possible here" in out
    assert not embedded.policies()
    assert not embedded.associations()
    story = document(capsys, "--kernel", "native")
    assert story["totals"]["steps_without_policy"] is None
    assert story["totals"]["messages"] == {"tracker": 21, "always_update": 24, "delete_then_add": 42}


def test_policies_that_are_there_already_are_left_alone(
    embedded: EmbeddedKernel, capsys: pytest.CaptureFixture[str]
) -> None:
    with connect(embedded.connect()) as kernel:
        kernel.add_policy(Policy(Direction.OUT, stage.SITE, action=0))
        kernel.add_policy(Policy(Direction.OUT, Selector("10.0.0.0/8", "10.0.0.0/8"), action=0))
        before = kernel.dump_policies()
        code, out, err = run(capsys, "--kernel", "native")
        assert (code, out) == (1, "")
        assert "left alone" in err
        assert "out 198.51.100.0/24 -> 203.0.113.0/24 discard" in err
        assert "10.0.0.0/8" not in err
        assert kernel.dump_policies() == before


def test_a_kernel_without_esp_gets_the_policies_alone(
    embedded: EmbeddedKernel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded.fail_next(MessageType.ADD, "EPROTONOSUPPORT")
    code, out, _ = run(capsys, "--kernel", "native")
    assert code == 0
    assert "the policies alone from here on" in out
    assert "add_sa" not in out


@pytest.mark.parametrize("when", ["rekeying", "last SA gone", "moved peer"])
def test_ctrl_c_leaves_nothing_behind(
    when: str, embedded: EmbeddedKernel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chapter = stage.Stage.chapter

    def interrupted(self: stage.Stage, name: str, title: str) -> stage.Chapter:
        if name == when:
            assert embedded.policies()
            assert embedded.associations()
            raise KeyboardInterrupt
        return chapter(self, name, title)

    monkeypatch.setattr(stage.Stage, "chapter", interrupted)
    code, _, err = run(capsys, "--kernel", "native")
    assert (code, err) == (130, "pfkey: interrupted\n")
    assert not embedded.policies()
    assert not embedded.associations()


def test_an_error_in_the_middle_leaves_nothing_behind(
    embedded: EmbeddedKernel, capsys: pytest.CaptureFixture[str]
) -> None:
    embedded.fail_next(MessageType.SPDUPDATE, errno.ENOMEM)
    code, _, err = run(capsys, "--kernel", "native")
    assert code == 1
    assert err.startswith("pfkey: ")
    assert "SPDUPDATE" in err
    assert "ENOMEM" in err
    assert "Traceback" not in err
    assert not embedded.policies()
    assert not embedded.associations()


def test_an_sa_that_cannot_be_deleted_does_not_keep_the_others(
    embedded: EmbeddedKernel, capsys: pytest.CaptureFixture[str]
) -> None:
    embedded.fail_next(MessageType.SPDUPDATE, errno.ENOMEM)
    embedded.fail_next(MessageType.DELETE, errno.ENOMEM)
    code, _, err = run(capsys, "--kernel", "native")
    assert code == 1
    assert "left behind" in err
    assert len(embedded.associations()) == 1
    assert not embedded.policies()


def test_a_figure_that_is_not_what_it_should_be_fails_the_demo(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Talkative(PolicyTracker):
        """Sends an update for every call."""

        def add(self, direction: Direction, selector: Selector, assignment: Assignment) -> Any:
            change = super().add(direction, selector, assignment)
            if change.sent:
                return change
            self._kernel.update_policy(self._kernel.dump_policies()[0])
            return type(change)((MessageType.SPDUPDATE,))

    monkeypatch.setattr(stage, "PolicyTracker", Talkative)
    code, out, _ = run(capsys)
    assert code == 1
    assert "FAILED  a rekeying cost 0 SPD messages" in out


def test_a_tracker_that_does_not_say_what_it_sent_is_found_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Secretive(PolicyTracker):
        """Forgets to say what it sent."""

        def add(self, *arguments: Any) -> Any:
            return type(super().add(*arguments))()

    monkeypatch.setattr(stage, "PolicyTracker", Secretive)
    code, _, err = run(capsys)
    assert code == 1
    assert "the wire says" in err


def test_sigterm_cleans_up(tmp_path: Path) -> None:
    """The process is stopped in the middle; what it left in its kernel, it says itself."""
    script = """
import os, signal, sys
from pfkey import cli, stage
from pfkey.embedded import EmbeddedKernel
kernel = EmbeddedKernel("linux")
stage.native_channel = kernel.connect
chapter = stage.Stage.chapter
def stop(self, name, title):
    if name == "moved peer":
        print(len(kernel.policies()), file=sys.stderr)
        os.kill(os.getpid(), signal.SIGTERM)
    return chapter(self, name, title)
stage.Stage.chapter = stop
code = cli.main(["demo", "--kernel", "native"])
print(len(kernel.policies()), len(kernel.associations()), file=sys.stderr)
sys.exit(code)
"""
    ran = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
        env=os.environ,
    )
    assert ran.returncode == 130
    assert ran.stderr == "3\npfkey: interrupted\n0 0\n"
