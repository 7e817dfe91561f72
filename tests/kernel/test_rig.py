"""The rig itself: the kernel that answers is a real one, and the machinery around it cannot pass what did not run."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from .network import Cable, Link, Namespace, PacketCounter, cable, namespace
from .session import python_path
from .uml import INSTALL, module_order

DEPENDENCIES = """\
kernel/lib/crc-ccitt.ko:
kernel/net/ipv6/ipv6.ko: kernel/lib/crc-ccitt.ko
kernel/net/xfrm/xfrm_algo.ko.xz:
kernel/net/ipv6/esp6.ko: kernel/net/xfrm/xfrm_algo.ko.xz kernel/net/ipv6/ipv6.ko kernel/lib/crc-ccitt.ko
kernel/net/key/af-key.ko: kernel/net/xfrm/xfrm_algo.ko.xz
"""


def test_modules_come_after_what_they_need() -> None:
    assert module_order(DEPENDENCIES, ["esp6", "af_key", "af_packet"], "kernel/net/packet/af_packet.ko") == [
        "kernel/lib/crc-ccitt.ko",
        "kernel/net/ipv6/ipv6.ko",
        "kernel/net/xfrm/xfrm_algo.ko.xz",
        "kernel/net/ipv6/esp6.ko",
        "kernel/net/key/af-key.ko",
    ]


def test_an_unknown_module_is_an_error() -> None:
    with pytest.raises(KeyError, match="af_kay"):
        module_order(DEPENDENCIES, ["af_kay"])


@pytest.fixture
def run_outside(tmp_path: Path, request: pytest.FixtureRequest):
    """Run one real-kernel test of this file in a pytest of its own, with another environment."""

    def run(name: str, **environment: str) -> str:
        if os.environ.get("PFKEY_UML_SCRATCH"):
            pytest.fail("this is a test of the outer side")
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith(("PFKEY_", "PYTEST_", "LD_PRELOAD"))
        }
        command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", "-rs", "-v"]
        done = subprocess.run(
            [*command, "--rootdir", str(request.config.rootpath), f"{__file__}::{name}"],
            env=inherited | {"PYTHONPATH": os.pathsep.join(python_path())} | environment,
            cwd=request.config.rootpath,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        return done.stdout + done.stderr

    return run


def test_without_user_mode_linux_it_skips_and_says_how_to_get_it(run_outside, tmp_path: Path) -> None:
    text = run_outside("test_af_key_answers", PATH=str(tmp_path))
    assert "1 skipped" in text
    assert INSTALL in " ".join(text.split())


def test_where_it_is_required_a_skip_is_a_failure(run_outside, tmp_path: Path) -> None:
    text = run_outside("test_af_key_answers", PATH=str(tmp_path), PFKEY_REQUIRE_REAL_KERNEL="1")
    assert "1 error" in text or "1 failed" in text
    assert "PFKEY_REQUIRE_REAL_KERNEL is set" in text


@pytest.mark.real_kernel
def test_af_key_answers() -> None:
    """SADB_REGISTER for ESP: what comes back lists SADB_X_EALG_AESCBC, so the crypto is there too."""
    with socket.socket(15, socket.SOCK_RAW, 2) as pf_key:
        pf_key.settimeout(10)
        pf_key.send(struct.pack("=BBBBHHII", 2, 7, 0, 3, 2, 0, 1, os.getpid()))
        reply = pf_key.recv(65536)
    version, kind, error, satype, words, _reserved, seq, pid = struct.unpack_from("=BBBBHHII", reply)
    assert (version, kind, error, satype, seq, pid) == (2, 7, 0, 3, 1, os.getpid())
    assert 8 * words == len(reply)
    length, extension = struct.unpack_from("=HH", reply, 16)
    assert extension == 14  # SUPPORTED_AUTH
    start = 16 + 8 * length
    length, extension = struct.unpack_from("=HH", reply, start)
    assert extension == 15  # SUPPORTED_ENCRYPT
    assert 12 in reply[start + 8 : start + 8 * length : 8]


@pytest.mark.real_kernel
def test_every_test_has_its_own_namespace() -> None:
    assert os.readlink("/proc/thread-self/ns/net") != os.readlink("/proc/1/ns/net")
    before = os.readlink("/proc/thread-self/ns/net")
    with namespace():
        assert os.readlink("/proc/thread-self/ns/net") != before
    assert os.readlink("/proc/thread-self/ns/net") == before


@pytest.mark.real_kernel
@pytest.mark.parametrize("version", [4, 6])
def test_the_cable_carries_packets_and_the_counter_counts_them(version: int) -> None:
    family, address = (socket.AF_INET, Cable.THERE) if version == 4 else (socket.AF_INET6, Cable.THERE6)
    with cable() as wire:
        with wire.there:
            udp = PacketCounter(Cable.PEER, 17, version=version)
            other = PacketCounter(Cable.PEER, 50, 51, version=version)
            receiver = socket.socket(family, socket.SOCK_DGRAM)
            receiver.bind((address, 7777))
        with udp, other, receiver:
            with wire.here, socket.socket(family, socket.SOCK_DGRAM) as sender:
                for _ in range(1000):
                    sender.sendto(b"x", (address, 7777))
            assert udp.take() == 1000
            assert udp.take() == 0
            assert other.take() == 0
            receiver.settimeout(10)
            assert receiver.recv(10) == b"x"


@pytest.mark.real_kernel
def test_errors_of_rtnetlink_are_raised() -> None:
    with Namespace.current(), Link() as link, pytest.raises(OSError, match="rtnetlink request 16"):
        link.cable("lo", "elsewhere", Namespace.current())
