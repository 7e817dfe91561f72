"""`pfkey embedded --listen`, and the commands that speak to a kernel served so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import pytest
from embedded_client import discard
from package import ROOT

from pfkey import (
    Abi,
    cli,
    connect,
)
from pfkey.embedded import EmbeddedKernel
from pfkey.embedded.server import Server
from pfkey.served import abi_name


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "kernel")


@pytest.fixture
def server(path: str) -> Iterator[Server]:
    with Server(EmbeddedKernel("linux"), path) as running:
        yield running


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pfkey", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
        cwd=ROOT,
    )


@pytest.mark.usefixtures("heeds_ctrl_c")
@pytest.mark.parametrize(("number", "json_wanted"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_the_command_serves_until_it_is_interrupted(number: signal.Signals, json_wanted: bool, path: str) -> None:
    command = [sys.executable, "-m", "pfkey", "embedded", "--listen", path, "--kernel-profile", "netbsd"]
    child = subprocess.Popen([*command, *["--json"] * json_wanted], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert child.stdout is not None
    first = child.stdout.readline()
    if json_wanted:
        told = json.loads(first + "".join(takewhile("}\n".__ne__, child.stdout)) + "}")
        assert told == {"kernel": f"unix:{path}", "profile": "netbsd", "abi": abi_name(Abi.netbsd())}
    else:
        assert first == f"netbsd (NetBSD) on unix:{path}; Ctrl-C ends it and forgets everything\n"
    with connect(f"unix:{path}") as kernel:
        kernel.add_policy(discard(priority=0))
    shown = run_command("dump", "--policies", "--kernel", f"unix:{path}")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "10.1.0.0/16 -> 10.2.0.0/16" in shown.stdout
    assert run_command("dump", "--policies", PFKEY_KERNEL=f"unix:{path}").stdout == shown.stdout
    child.send_signal(number)
    assert child.wait(60) == 0
    child.stdout.close()
    assert not os.path.exists(path)


def test_the_demo_plays_on_a_served_kernel(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--kernel", server.target]) == 0
    assert "No probe is possible here" in capsys.readouterr().out
    assert server.kernel.policies() == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["embedded"], 2, "--listen"),
        (["embedded", "--listen", "{path}", "--kernel-profile", "plan9"], 2, "there are linux"),
        (["embedded", "--listen", "{path}/below"], 1, "listening on"),
        (["dump", "--kernel", "unix:{path}"], 3, "nobody serves a kernel"),
        (["demo", "--kernel", "unix:{path}"], 3, "nobody serves a kernel"),
        (["dump", "--kernel", "unix:"], 2, "unix:PATH"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_the_command_says(
    arguments: list[str], code: int, said: str, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([argument.format(path=path) for argument in arguments]) == code
    assert said in capsys.readouterr().err


def test_the_command_does_not_take_a_path_over(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["embedded", "--listen", server.path]) == 1
    assert "already" in capsys.readouterr().err
