"""Every block of README.md that claims an output is run, and compared."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from package import ROOT

from pfkey import cli

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
TEXTS = [text for kind, text in BLOCKS if kind == "text"]


def lines(*arguments: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert cli.main(arguments) == 0
    printed: str = capsys.readouterr().out
    return printed.splitlines()


def block(start: str) -> list[str]:
    """The text block that begins so."""
    (found,) = (text for text in TEXTS if text.lstrip().startswith(start))
    return found.splitlines()


def assert_stand_together(part: list[str], whole: list[str]) -> None:
    assert any(whole[at : at + len(part)] == part for at in range(len(whole))), "\n".join(part)


SCRIPTS = [text for kind, text in BLOCKS if kind == "python"]


@pytest.mark.parametrize("number", range(len(SCRIPTS)))
def test_the_scripts_print_what_the_readme_says(number: int) -> None:
    """Each script stands before the text that it prints."""
    after = BLOCKS[BLOCKS.index(("python", SCRIPTS[number])) + 1]
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPTS[number]], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert (("text", ran.stdout), ran.stderr) == (after, "")


def test_decode_shows_what_the_readme_says(capsys: pytest.CaptureFixture[str]) -> None:
    command, *shown = block("$ pfkey decode")
    assert lines(*command.split()[2:], capsys=capsys) == shown


def test_the_demo_prints_what_the_readme_says(capsys: pytest.CaptureFixture[str]) -> None:
    printed = lines("demo", "--kernel", "embedded:linux", capsys=capsys)
    header, _, *chapters = block("sent ")
    assert header in printed
    assert_stand_together(chapters, printed)


def test_the_counts_of_a_day_are_those_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    printed = lines("demo", "--rekeyings", "24", "--kernel", "embedded:freebsd-13", capsys=capsys)
    assert_stand_together(block("messages "), printed)


def test_the_commands_of_the_readme_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for command, options in re.findall(r"^    pfkey (\w+) (\[?--\w.*?)  ", README, re.MULTILINE):
        printed = " ".join(lines(command, "--help", capsys=capsys))
        assert all(option in printed for option in re.findall(r"--[\w-]+", options))


def test_no_text_block_is_left_unchecked() -> None:
    assert len(TEXTS) == 9
