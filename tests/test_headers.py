"""Our numbers and layouts against the systems' own headers, and the C core compiled for them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from headers import SYSTEMS, System, layouts, numbers, source

from pfkey import Abi

CSRC = Path(__file__).parent.parent / "csrc"
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("ziglang") is None, reason="ziglang is not here: pip install 'pfkey[headers]'"
    ),
    pytest.mark.headers,
]


def compile_for(target: str, file: Path, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ziglang", "cc", "-target", target, "-std=c11", *flags, "-c", str(file)]
    return subprocess.run([*command, "-o", str(folder / "out.o")], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.target)
def test_our_tables_are_those_of_the_headers(system: System, tmp_path: Path) -> None:
    file = tmp_path / "assertions.c"
    file.write_text(source(system))
    compiled = compile_for(system.target, file, tmp_path)
    assert compiled.returncode == 0, compiled.stderr


def test_a_wrong_number_is_seen(tmp_path: Path) -> None:
    """The control: a number and an offset that are not right, and the compiler says which."""
    file = tmp_path / "assertions.c"
    text = source(SYSTEMS[0])
    for right, wrong in (
        ("(SADB_X_EXT_NAT_T_FRAG) == 25u", "(SADB_X_EXT_NAT_T_FRAG) == 26u"),
        ("sadb_sa_flags) == 12u", "sadb_sa_flags) == 8u"),
        ("sizeof(struct sadb_comb) == 72u", "sizeof(struct sadb_comb) == 64u"),
    ):
        assert right in text
        text = text.replace(right, wrong)
    file.write_text(text)
    compiled = compile_for(SYSTEMS[0].target, file, tmp_path)
    assert compiled.returncode != 0
    assert compiled.stderr.count("error:") == 3
    for name in ("SADB_X_EXT_NAT_T_FRAG", "sadb_sa_flags", "sadb_comb"):
        assert name in compiled.stderr


def test_every_number_is_asserted() -> None:
    """A number that the tables gain and this test does not know by name fails here, not in silence."""
    for abi in (Abi.linux(), Abi.freebsd(15), Abi.netbsd(), Abi.macos()):
        checked = list(numbers(abi))
        assert len(checked) > len(abi.extensions) + len(abi.encryption) + len(abi.authentication)
        assert len(list(layouts(abi))) > 80


@pytest.mark.parametrize("target", [one.target for one in SYSTEMS if "bsd" in one.target and one.abi is not None])
@pytest.mark.parametrize("file", sorted(CSRC.glob("*.c")), ids=lambda file: file.name)
def test_the_core_compiles(target: str, file: Path, tmp_path: Path) -> None:
    compiled = compile_for(target, file, tmp_path, "-Wall", "-Wextra", "-Werror", "-pedantic")
    assert compiled.returncode == 0, compiled.stderr
