"""`pfkey decode`: every byte shown, every system told apart where the bytes do, keys hidden, damage located."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from wire import EVERYTHING, OVERSTATED, RECORDED, Recorded, mirrored
from wire_case import FREEBSD, LINUX

from pfkey import Abi, ExtensionType, Message, MessageType, cli, decode, encode
from pfkey.annotate import annotate, guess
from pfkey.hexdump import split
from pfkey.messages import SA, Key

X = ExtensionType


def named(name: str) -> Recorded:
    return next(one for one in EVERYTHING if one.name == name)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["decode", *arguments])
    return code, *capsys.readouterr()


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> io.BytesIO:
    data = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": data}))
    return data


def test_the_whole_of_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, named("linux spdadd tunnel v4").data.hex())
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "message 0: SPDADD, 128 bytes (Linux, little-endian, guessed)"
    assert lines[1].split() == ["offset", "bytes", "field", "value", "meaning"]
    words = [line.split() for line in lines[2:]]
    for row in (
        ["0x0000", "02", "sadb_msg_version", "2", "PF_KEY_V2"],
        ["0x0004", "1000", "sadb_msg_len", "16", "128", "bytes"],
        ["0x0012", "1200", "sadb_ext_type", "18", "POLICY"],
        ["0x0016", "02", "sadb_x_policy_dir", "2", "OUT"],
        ["0x001c", "7fda0500", "sadb_x_policy_priority", "383615"],
        ["0x0022", "3200", "sadb_x_ipsecrequest_proto", "50", "ESP"],
        ["0x0034", "c0000201", "sin_addr", "192.0.2.1"],
    ):
        assert row in words
    assert "".join(row[1] for row in words) == named("linux spdadd tunnel v4").data.hex()


@pytest.mark.parametrize("one", EVERYTHING, ids=lambda one: one.name)
def test_every_byte_is_shown_once_in_its_place(one: Recorded) -> None:
    shown = annotate(one.data, one.abi)
    assert shown.error is None
    at = 0
    for row in shown.rows:
        assert row.offset == at
        at += len(row.data)
    assert b"".join(row.data for row in shown.rows) == one.data


@pytest.mark.parametrize("one", RECORDED, ids=lambda one: one.name)
def test_a_guess_is_never_wrong(one: Recorded) -> None:
    """What real kernels said: their system is among those guessed; alone, or every one of them reads it alike."""
    for data, order in ((one.data, "little"), (mirrored(one.data, one.abi), "big")):
        found = guess([data])
        assert (one.abi.name, order) in [(abi.name, abi.byteorder) for abi in found.systems]


def test_most_guesses_leave_no_doubt() -> None:
    assert sum(guess([one.data]).alike for one in RECORDED) > 0.9 * len(RECORDED)


def test_what_is_in_doubt_is_not_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    data = encode(Message(3, {X.SA: SA(1, 0, 1, 2, 2)}, abi=LINUX))
    code, out, err = run(capsys, data.hex())
    assert (code, out) == (2, "")
    assert "--abi" in err
    assert "macos-little" in err
    code, out, _ = run(capsys, data.hex(), "--abi", "macos-little")
    assert code == 0
    assert "hmac-sha1" in out
    assert "guessed" not in out


def test_openbsd_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    flow = bytes.fromhex(
        "020c000007000000 0000000000000000 0300150000000000 10020000c0000201 0000000000000000 0100140001000000"
        "0100130032000000"
    )
    flush = bytes((2, 9, 0, 3, 2, 0, 0, 0)) + bytes(8)  # anybody's
    for arguments in ((flow.hex(),), (flow.hex(), "--abi", "openbsd"), ((flush + flow + flush).hex(),)):
        code, _, err = run(capsys, *arguments)
        assert code == 2
        assert "OpenBSD's PF_KEY is another one" in err


def test_from_a_file_and_from_stdin(capsys: pytest.CaptureFixture[str], tmp_path: Path, stdin: io.BytesIO) -> None:
    one = named("freebsd spdadd tunnel v4")
    binary, text = tmp_path / "message.bin", tmp_path / "message.hex"
    binary.write_bytes(one.data)
    text.write_text("\n".join(one.data.hex(" ", 4)[at : at + 36] for at in range(0, 1000, 36)).strip() + "\n")
    stdin.write(one.data)
    stdin.seek(0)
    ways = ((str(binary),), (str(text),), (), tuple(one.data.hex(" ", 8).split()))
    shown = {run(capsys, *arguments)[1] for arguments in ways}
    assert len(shown) == 1
    assert "(FreeBSD 15, little-endian, guessed" in shown.pop()


@pytest.mark.parametrize("abi", [LINUX, FREEBSD], ids=str)
@pytest.mark.parametrize("order", ["little", "big"])
def test_a_stream_of_messages(abi: Abi, order: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """All that a kernel said, behind each other; where Linux states less than it sent, the rest belongs to it."""
    said = [one.data for one in RECORDED if one.abi == abi and ":recv" in one.name]
    said = [mirrored(data, abi) for data in said] if order == "big" else said
    file = tmp_path / "stream"
    file.write_bytes(b"".join(said))
    code, out, _ = run(capsys, str(file), "--json", "--abi", f"{abi.name}-{order}")
    found = json.loads(out)
    assert code == 0
    assert [one["size"] for one in found] == [len(data) for data in said]
    file.write_bytes(b"".join(said))
    assert json.loads(run(capsys, str(file), "--json")[1])[0]["abi"].endswith(order)


def test_a_stream_with_lengths_that_are_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Linux 6.1 states less than it sends, or more: what is behind such a message is found all the same."""
    long, plain = OVERSTATED.data, named("linux spdadd tunnel v4").data
    short = plain[:4] + bytes((plain[4] - 3,)) + plain[5:]
    said = [long, long, plain, short, short, plain, short, long]
    file = tmp_path / "stream"
    file.write_bytes(b"".join(said))
    code, out, _ = run(capsys, str(file), "--json", "--abi", "linux")
    assert [one["size"] for one in json.loads(out)] == [len(data) for data in said]
    assert code == 0
    assert [one["error"] for one in json.loads(out)] == [None] * len(said)
    turned = [mirrored(data, LINUX) for data in said]
    assert split(b"".join(turned)) == split(b"".join(turned), Abi.linux("big")) == turned
    file.write_text("\n".join(data.hex() for data in said))
    assert [one["size"] for one in json.loads(run(capsys, str(file), "--json")[1])] == [len(data) for data in said]


def test_a_capture_that_was_cut_off(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """What is whole tells whose it is; the rest is shown as damaged."""
    said = [one.data for one in RECORDED if one.abi == FREEBSD and ":recv" in one.name]
    said = [*said[:50], said[0]]
    file = tmp_path / "stream"
    file.write_bytes(b"".join(said)[:-9])
    code, out, _ = run(capsys, str(file), "--json")
    found = json.loads(out)
    assert code == 1
    assert [one["size"] for one in found] == [*map(len, said[:-1]), len(said[-1]) - 9]
    assert [one["error"] is None for one in found] == [True] * (len(said) - 1) + [False]
    assert found[0]["abi"].endswith("-little")
    assert guess([said[0], said[1][:20]]) == guess(said[:1])
    assert not guess([said[0][:20]]).systems


def test_lines_of_hex_are_messages_by_themselves(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    short = bytearray(named("linux spdadd tunnel v4").data)
    short[4] -= 3  # as Linux 6.1 does
    file = tmp_path / "lines"
    file.write_text(f"{short.hex()}\n\n{named('bare header').data.hex()}\n")
    assert [one["size"] for one in json.loads(run(capsys, str(file), "--json")[1])] == [128, 16]


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    one = named("linux getspi")
    (found,) = json.loads(run(capsys, one.data.hex(), "--json")[1])
    assert (found["abi"], found["guessed"], found["type"], found["size"], found["error"]) == (
        "linux-little", True, "GETSPI", 80, None,
    )  # fmt: skip
    assert "".join(field["bytes"] for field in found["fields"]) == one.data.hex()
    wanted = {"offset": 68, "size": 4, "bytes": "000000c0", "field": "sadb_spirange_min", "value": "0xc0000000"}
    assert wanted | {"meaning": ""} in found["fields"]


SECRET = bytes(range(0xA0, 0xB0))


@pytest.mark.parametrize("errno", [0, 22])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("damage", [False, True])
def test_keys_are_hidden(errno: int, wrapped: bool, damage: bool, capsys: pytest.CaptureFixture[str]) -> None:
    data = encode(Message(3, {X.SA: SA(1), X.KEY_ENCRYPT: Key(SECRET)}, abi=LINUX, satype=3, errno=errno))
    if damage:
        data = data[:36] + b"\xff\xff" + data[38:]
    if wrapped:
        data = bytes((2, 11, 0, 0)) + (2 + len(data) // 8).to_bytes(2, "little") + bytes(10) + data
    for more in ((), ("--json",)):
        _, out, err = run(capsys, data.hex(), "--abi", "linux", *more)
        assert SECRET.hex() not in out + err
        assert SECRET[:4].hex() not in out + err
        assert SECRET[:8].hex() in run(capsys, data.hex(), "--abi", "linux", "--show-keys", *more)[1]


def test_damage_is_located(capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray(named("linux spdadd tunnel v4").data)
    data[32:34] = b"\3\0"
    code, out, _ = run(capsys, data.hex(), "--abi", "linux")
    assert code == 1
    assert out.splitlines()[-1] == "error: a policy request is shorter than its head (offset 32, extension 18 (POLICY))"
    assert f"0x0020  {data[32:48].hex()}  (not read)" in out
    code, out, err = run(capsys, data.hex())
    assert (code, out) == (2, "")
    assert "shows where they break its rules" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("123",), "3 hex digits are no whole number of bytes"),
        (("/nonexistent",), "No such file"),
        (("00", "--abi", "plan9"), "names no system"),
        (("",), "the input is empty"),
        ((), "the input is empty"),
    ],
)
def test_bad_arguments_are_exit_2(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str], stdin: io.BytesIO
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert words in err


def test_a_promiscuous_copy_is_shown_as_what_it_wraps() -> None:
    inner = named("linux getspi").data
    data = bytes((2, 11, 0, 0)) + ((16 + len(inner)) // 8).to_bytes(2, "little") + bytes(10) + inner
    assert decode(data, LINUX).type is MessageType.PROMISC
    rows = annotate(data, LINUX).rows
    assert [row.field for row in rows].count("sadb_msg_version") == 2
    assert sum(len(row.data) for row in rows) == len(data)
