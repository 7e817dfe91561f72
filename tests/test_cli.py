"""The `pfkey` command: what it prints, where, and with which exit code."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from package import ROOT

from pfkey import (
    Action,
    Assignment,
    Direction,
    Kernel,
    Lifetime,
    Mode,
    Policy,
    PolicyTracker,
    SAProtocol,
    SecurityAssociation,
    Selector,
    Template,
    cli,
    connect,
    show,
    target,
)
from pfkey.constants import SAFlag, SAState
from pfkey.embedded import EmbeddedKernel
from pfkey.errors import NotSupported, kernel_error
from pfkey.guards import owner_number
from pfkey.messages import NATTraversal

KEY, AUTH = bytes(range(16)), bytes(range(100, 132))
SA = SecurityAssociation(
    "192.0.2.1",  # type: ignore[arg-type]
    "198.51.100.1",  # type: ignore[arg-type]
    0xC0000001,
    mode=Mode.TUNNEL,
    reqid=7,
    encryption="aes-cbc",
    encryption_key=KEY,
    authentication="hmac-sha2-256",
    authentication_key=AUTH,
    replay_window=32,
    lifetime_hard=Lifetime(addtime=3600, bytes=1000),
    lifetime_soft=Lifetime(addtime=3000),
    nat_traversal=NATTraversal(4500, 4501),
)
POLICIES = (
    Policy(
        Direction.OUT,
        Selector("10.1.0.0/16", "10.2.0.1", protocol="tcp", destination_port=443),
        templates=(Template.tunnel("192.0.2.1", "198.51.100.1", reqid=7),),
        priority=1000,
    ),
    Policy(Direction.IN, Selector("2001:db8::/32", "::/0"), Action.DISCARD, priority=2000),
)


@pytest.fixture(params=["linux", "freebsd-12", "freebsd-13", "freebsd-14"])
def filled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    """A kernel with an SA and two policies, which every `--kernel embedded:...` of the command reaches."""
    embedded = EmbeddedKernel(request.param)
    monkeypatch.setattr(show, "open_kernel", lambda target: connect(embedded.connect()))
    with connect(embedded.connect()) as kernel:
        kernel.add_sa(SA)
        for policy in POLICIES:
            kernel.add_policy(policy)
        yield kernel


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# dump.


def test_sas_are_one_aligned_line_each_without_keys(filled: Kernel, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "dump")
    assert (code, err) == (0, "")
    (line,) = out.splitlines()
    assert line.startswith(
        "esp  192.0.2.1 -> 198.51.100.1  spi 0xc0000001  reqid 7  tunnel  mature  aes-cbc+hmac-sha2-256  "
    )
    for part in ("replay 32", "natt 4500-4501", "soft 3000s", "hard 3600s/1000B", "used 0B/0packets"):
        assert part in line
    assert KEY.hex() not in out
    assert AUTH.hex() not in out


def test_keys_are_shown_on_request(filled: Kernel, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "dump", "--show-keys")
    assert f"encryption-key 0x{KEY.hex()}" in out
    assert f"authentication-key 0x{AUTH.hex()}" in out


def test_sas_as_json(filled: Kernel, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "dump", "--json")
    (record,) = json.loads(out)
    assert code == 0
    assert record["spi"] == "0xc0000001"
    assert (record["protocol"], record["mode"], record["state"], record["reqid"]) == ("esp", "tunnel", "mature", 7)
    assert (record["encryption"], record["authentication"]) == ("aes-cbc", "hmac-sha2-256")
    assert (record["encryption_key"], record["authentication_key"]) == (None, None)
    assert (record["encryption_key_bits"], record["authentication_key_bits"]) == (128, 256)
    assert record["lifetime_hard"] == {"allocations": 0, "bytes": 1000, "addtime": 3600, "usetime": 0}
    assert record["nat_traversal"] == {"source_port": 4500, "destination_port": 4501, "type": 2}
    _, out, _ = run(capsys, "dump", "--json", "--show-keys")
    (record,) = json.loads(out)
    assert (record["encryption_key"], record["authentication_key"]) == (KEY.hex(), AUTH.hex())


def test_policies_are_one_aligned_line_each(filled: Kernel, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "dump", "--policies")
    assert (code, err) == (0, "")
    lines = sorted(out.splitlines())
    assert len(lines) == 2
    assert lines[0].startswith("in   2001:db8::/32 -> ::/0 any ")
    assert " discard  -  " in lines[0]
    assert lines[1].startswith("out  10.1.0.0/16 -> 10.2.0.1/32[443] tcp  ")
    assert "ipsec    esp/tunnel/192.0.2.1-198.51.100.1/unique:7  priority 1000  id " in lines[1]
    assert len({line.index("priority") for line in lines}) == 1


@pytest.mark.parametrize("profile", ["linux", "freebsd-13"])
def test_what_a_tracker_holds_is_told_and_not_shown_as_a_lifetime(profile: str) -> None:
    with connect(f"embedded:{profile}") as kernel:
        tracker = PolicyTracker(kernel, owner="my-daemon")
        template = Template.tunnel("192.0.2.1", "198.51.100.1", reqid=1)
        tracker.add(Direction.OUT, Selector("10.1.0.0/16", "10.2.0.0/16"), Assignment(template))
        (policy,) = kernel.dump_policies()
    owner = f"{owner_number('my-daemon'):#09x}"
    (line,) = show.policy_lines([policy])
    assert line.endswith(f"tracked as policy by {owner}")
    assert show.policy_record(policy)["tag"] == {"kind": "policy", "owner": owner}


def test_policies_as_json(filled: Kernel, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "dump", "--policies", "--json")
    inbound, outbound = sorted(json.loads(out), key=lambda record: str(record["direction"]))
    assert (outbound["source"], outbound["destination"]) == ("10.1.0.0/16", "10.2.0.1/32")
    assert (outbound["protocol"], outbound["source_port"], outbound["destination_port"]) == (6, None, 443)
    assert outbound["templates"] == [
        {
            "protocol": "esp",
            "mode": "tunnel",
            "source": "192.0.2.1",
            "destination": "198.51.100.1",
            "level": "unique",
            "reqid": 7,
        }
    ]
    assert outbound["priority"] == 1000
    assert outbound["id"] > 0
    assert (inbound["action"], inbound["templates"], inbound["protocol"]) == ("discard", [], None)


@pytest.mark.parametrize(("what", "name"), [((), "SAs"), (("--policies",), "policies")])
def test_an_empty_database_is_said_on_stderr(
    what: tuple[str, ...], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "dump", *what, "--kernel", "embedded:linux") == (0, "", f"pfkey: embedded:linux has no {name}\n")
    assert run(capsys, "dump", *what, "--json", "--kernel", "embedded:linux") == (0, "[]\n", "")


def test_numbers_without_a_name_are_shown_as_numbers() -> None:
    odd = SecurityAssociation("::1", "::2", 5, protocol=99, mode=9, state=8, encryption=77, flags=0x402)  # type: ignore[arg-type]
    (line,) = show.sa_lines([odd])
    assert line == "99  ::1 -> ::2  spi 0x00000005  reqid 0  9  8  77  flags esn,0x2"
    assert show.sa_record(odd)["flags"] == ["esn", "0x2"]
    (line,) = show.policy_lines([Policy(9, Selector("10.0.0.0/8", "10.0.0.0/8"), 7)])
    assert line == "9  10.0.0.0/8 -> 10.0.0.0/8 any  7  -  priority 0  id 0"


def test_ages_are_counted_from_now() -> None:
    old = SecurityAssociation(
        "::1", "::2", 5, protocol=SAProtocol.AH, state=SAState.DYING, flags=SAFlag(0),  # type: ignore[arg-type]
        lifetime_current=Lifetime(allocations=3, bytes=300, addtime=1000, usetime=1001),
        lifetime_soft=Lifetime(), lifetime_hard=Lifetime(allocations=9, usetime=60),
    )  # fmt: skip
    (line,) = show.sa_lines([old], now=1010.9)
    assert line.endswith("dying  -  hard 60s-of-use/9packets  age 10s  used 300B/3packets")


# Which kernel, and errors.


def test_the_environment_names_the_kernel(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PFKEY_KERNEL", "embedded:freebsd-13")
    assert run(capsys, "dump")[2] == "pfkey: embedded:freebsd-13 has no SAs\n"
    assert run(capsys, "dump", "--kernel", "embedded:linux")[2] == "pfkey: embedded:linux has no SAs\n"


@pytest.mark.parametrize("wrong", ["embedded:plan9", "embedded:", "embedded", "plan9", "unix:"])
@pytest.mark.parametrize("command", ["demo", "dump"])
def test_an_unknown_kernel_is_a_usage_error(command: str, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, command, "--kernel", wrong)
    assert (code, out) == (2, "")
    assert err.startswith("pfkey: ")
    assert err.count("\n") == 1
    assert "plan9" not in wrong or "plan9" in err


@pytest.mark.parametrize("arguments", [(), ("fly",), ("dump", "--wings"), ("demo", "--rekeyings", "0")])
def test_usage_errors(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: pfkey")


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, "")
    assert all(command.name in out for command in cli.COMMANDS)
    assert run(capsys, "--version")[0] == 0
    assert "--show-keys" in run(capsys, "dump", "--help")[1]


@pytest.mark.parametrize(
    "error",
    [
        kernel_error("opening a PF_KEY socket", "EPERM", errno.EPERM, advice="run it as root"),
        NotSupported("this kernel has no af_key; try modprobe af_key"),
        OSError(errno.EMFILE, "Too many open files"),
    ],
    ids=["privilege", "af_key", "other"],
)
@pytest.mark.parametrize("command", ["demo", "dump"])
def test_no_pf_key_is_exit_3_with_advice(
    command: str, error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise error

    monkeypatch.setattr(target, "NativeChannel", refuse)
    code, out, err = run(capsys, command, "--kernel", "native")
    assert (code, out) == (3, "")
    assert err == f"pfkey: {error}\n"


def test_what_the_kernel_refuses_is_exit_1(
    filled: Kernel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise kernel_error("SPDDUMP", "ENOMEM", errno.ENOMEM)

    monkeypatch.setattr(Kernel, "dump_policies", refuse)
    assert run(capsys, "dump", "--policies") == (1, "", "pfkey: SPDDUMP was rejected (ENOMEM)\n")


def test_ctrl_c_is_exit_130(
    filled: Kernel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Kernel, "dump_sas", interrupt)
    assert run(capsys, "dump") == (130, "", "pfkey: interrupted\n")


# As a process.


def process(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=os.environ | environment, cwd=ROOT
    )


def test_as_a_module() -> None:
    ran = process(sys.executable, "-m", "pfkey", "dump", "--json", PFKEY_KERNEL="embedded:linux")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "[]\n", "")


def test_as_a_script() -> None:
    script = Path(sys.executable).parent / "pfkey"
    if not script.exists():
        pytest.skip("the package is not installed beside this interpreter")
    ran = process(str(script), "dump", "--kernel", "embedded:linux")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "pfkey: embedded:linux has no SAs\n")


def test_a_reader_that_leaves_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "pfkey", "demo"]
    with os.fdopen(write, "wb") as pipe:
        ran = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, timeout=60, check=False, cwd=ROOT)
    assert (ran.returncode, ran.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_said_in_one_line() -> None:
    with open("/dev/full", "wb") as full:
        ran = subprocess.run(
            [sys.executable, "-m", "pfkey", "demo"],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
            cwd=ROOT,
        )
    assert (ran.returncode, ran.stderr.count(b"\n")) == (1, 1)
    assert b"No space left" in ran.stderr


def test_a_closed_stdout_is_no_error() -> None:
    ran = process("sh", "-c", f"'{sys.executable}' -m pfkey demo >&-")
    assert (ran.returncode, ran.stderr) == (0, "")


def test_importing_the_package_does_not_import_the_command() -> None:
    code = "import sys, pfkey; print(sorted({'argparse', 'asyncio', 'construct', 'pfkey.cli'} & sys.modules.keys()))"
    assert process(sys.executable, "-c", code).stdout == "[]\n"
