"""What people write: selectors, templates, lifetimes; and the exceptions and descriptions they meet."""

from __future__ import annotations

import errno
from ipaddress import IPv4Address, IPv4Network

import pytest

from pfkey import Abi, KernelError, Level, Mode, NotSupported, PFKeyError, SecurityAssociation, Selector, Template
from pfkey.errors import DecodeError, EncodeError, ForeignPolicy, NotTracked, ReplyTimeout, kernel_error

SAME = [
    ("10.1.0.0/16", "10.1.2.3/16"),
    ("10.1.2.3", "10.1.2.3/32"),
    (IPv4Network("10.1.0.0/16"), "10.1.0.0/16"),
    (IPv4Address("10.1.0.1"), "10.1.0.1"),
    ("2001:db8::1", "2001:0db8:0::1/128"),
]


@pytest.mark.parametrize(("one", "other"), SAME, ids=str)
def test_selectors_of_the_same_packets(one: object, other: object) -> None:
    first, second = Selector(one, one), Selector(other, other)  # type: ignore[arg-type]
    assert first.identity == second.identity
    assert first.canonical() == second.canonical()
    assert first.canonical().canonical() == first.canonical()


DIFFERENT = [
    Selector("0.0.0.0/0", "0.0.0.0/0"),
    Selector("::/0", "::/0"),
    Selector("0.0.0.0/0", "0.0.0.0/1"),
    Selector("0.0.0.0/1", "0.0.0.0/0"),
    Selector("0.0.0.0/0", "0.0.0.0/0", protocol="tcp"),
    Selector("0.0.0.0/0", "0.0.0.0/0", protocol="udp"),
    Selector("0.0.0.0/0", "0.0.0.0/0", protocol="tcp", source_port=1),
    Selector("0.0.0.0/0", "0.0.0.0/0", protocol="tcp", destination_port=1),
    Selector("0.0.0.0/0", "0.0.0.0/0", protocol="icmp", icmp_type=1),
    Selector("0.0.0.0/0", "0.0.0.0/0", protocol="icmp", icmp_type=1, icmp_code=1),
]


def test_selectors_of_different_packets() -> None:
    assert len({selector.identity for selector in DIFFERENT}) == len(DIFFERENT)
    assert len({selector.canonical() for selector in DIFFERENT}) == len(DIFFERENT)


def test_a_selector_keeps_its_host_bits() -> None:
    selector = Selector("10.1.2.3/16", "10.2.0.0/16")
    assert str(selector) == "10.1.2.3/16 -> 10.2.0.0/16"
    assert str(selector.canonical()) == "10.1.0.0/16 -> 10.2.0.0/16"
    assert selector != selector.canonical()


def test_turning_round() -> None:
    selector = Selector("10.1.0.0/16", "10.2.0.0/16", protocol="tcp", source_port=1, destination_port=2)
    assert selector.reversed() == Selector("10.2.0.0/16", "10.1.0.0/16", protocol=6, source_port=2, destination_port=1)
    assert selector.reversed().reversed() == selector
    ping = Selector("10.1.0.0/16", "10.2.0.0/16", protocol="icmp", icmp_type=8)
    assert ping.reversed().wire_ports == ping.wire_ports == (8, 0)
    template = Template.tunnel("192.0.2.1", "198.51.100.1", reqid=1)
    assert template.reversed() == Template.tunnel("198.51.100.1", "192.0.2.1", reqid=1)


def test_any_protocol() -> None:
    assert (
        Selector("::", "::", protocol=0) == Selector("::", "::", protocol=255) == Selector("::", "::", protocol="any")
    )


TEXTS = [
    (Selector("10.1.0.0/16", "10.2.0.1", protocol=6, destination_port=443), "10.1.0.0/16 -> 10.2.0.1/32[443] tcp"),
    (Selector("::/0", "::/0", protocol=58, icmp_type=135, icmp_code=0), "::/0 -> ::/0 icmp6 type 135 code 0"),
    (Selector("::/0", "::/0", protocol=99), "::/0 -> ::/0 99"),
    (Template.tunnel("192.0.2.1", "198.51.100.1", reqid=7), "esp/tunnel/192.0.2.1-198.51.100.1/unique:7"),
    (Template.transport(), "esp/transport/require"),
    (Template(99, 9, level=Level.USE), "99/9/use"),
]


@pytest.mark.parametrize(("value", "text"), TEXTS, ids=[row[1] for row in TEXTS])
def test_how_they_read(value: object, text: str) -> None:
    assert str(value) == text


def test_a_selector_shows_how_to_write_it() -> None:
    selector = Selector("10.1.2.3/16", "10.2.0.0/16", protocol=1, icmp_type=0, icmp_code=3)
    assert eval(repr(selector)) == selector


WRONG = [
    (lambda: Selector("10.0.0.0/8", "::/0"), "one address family"),
    (lambda: Selector("10.0.0.0/33", "10.0.0.0/8"), "does not appear"),
    (lambda: Selector("::", "::", protocol="tpc"), "unknown protocol 'tpc'"),
    (lambda: Selector("::", "::", protocol=256), "0 to 255"),
    (lambda: Selector("::", "::", source_port=65536), "0 to 65535"),
    (lambda: Selector("::", "::", protocol="tcp", icmp_type=1), "needs protocol icmp"),
    (lambda: Selector("::", "::", protocol="icmp6", icmp_type=1, source_port=2), "not both"),
    (lambda: Selector("::", "::", protocol="icmp6", icmp_type=256), "0 to 255"),
    (lambda: Template.tunnel("10.0.0.1", "::1"), "one address family"),
]


@pytest.mark.parametrize(("build", "text"), WRONG, ids=[row[1] for row in WRONG])
def test_what_they_refuse(build: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        build()  # type: ignore[operator]


def test_levels_follow_the_reqid() -> None:
    assert Template.transport().level == Level.REQUIRE
    assert Template.transport(reqid=5).level == Level.UNIQUE
    assert Template.transport(reqid=5, level=Level.USE).level == Level.USE
    assert Template.tunnel("::1", "::2", level=Level.DEFAULT).level == Level.DEFAULT


def test_an_sa_takes_addresses_as_text() -> None:
    sa = SecurityAssociation("192.0.2.1", "198.51.100.1", 1, mode=Mode.TUNNEL)  # type: ignore[arg-type]
    assert sa.source == IPv4Address("192.0.2.1")


def test_scopes_tell_link_local_addresses_apart() -> None:
    one, other = Selector("fe80::1%3", "fe80::2%3"), Selector("fe80::1%4", "fe80::2%4")
    assert one.identity != other.identity
    assert one.canonical() == one
    assert Selector("2001:db8::1%3", "::").identity == Selector("2001:db8::1", "::").identity


# Abi


def test_descriptions_are_equal_by_what_they_describe() -> None:
    assert Abi.freebsd(13) == Abi.freebsd("13") == Abi.freebsd((13,))
    assert Abi.freebsd("13.2-RELEASE-p4") == Abi.freebsd(1302001) == Abi.freebsd(13.2)
    assert len({Abi.linux(), Abi.linux("little"), Abi.linux("big"), Abi.freebsd(12), Abi.freebsd(13)}) == 4
    assert str(Abi.freebsd(1403000)) == "FreeBSD 14.3"


@pytest.mark.parametrize("release", [12, "12.1", 13, 1305000, "14.0", "14.2"], ids=str)
def test_which_freebsd_unlinks_first(release: int | str) -> None:
    assert Abi.freebsd(release).update_unlinks_first


@pytest.mark.parametrize("release", [14, "14.3", 1403000, 15], ids=str)
def test_which_freebsd_does_not(release: int | str) -> None:
    assert not Abi.freebsd(release).update_unlinks_first


def test_systems_that_are_not_described(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotSupported, match="FreeBSD 8 is not described"):
        Abi.freebsd(8)
    with pytest.raises(ValueError, match="'middle'"):
        Abi.linux("middle")  # type: ignore[arg-type]
    real = Abi.native()
    assert real.name in ("linux", "freebsd")

    class Host:
        sysname, release = "Plan9", "4"

    monkeypatch.setattr("os.uname", lambda: Host)
    with pytest.raises(NotSupported, match="Plan9 4"):
        Abi.native()
    Host.sysname, Host.release = "FreeBSD", "13.2-RELEASE"
    assert Abi.native() == Abi.freebsd("13.2")


# Errors

CLASSES = [
    ("EEXIST", FileExistsError),
    ("ENOENT", FileNotFoundError),
    ("EPERM", PermissionError),
    ("EACCES", PermissionError),
    ("ESRCH", ProcessLookupError),
    ("EINVAL", OSError),
]


@pytest.mark.parametrize(("name", "kind"), CLASSES)
def test_kernel_errors_are_what_python_calls_them(name: str, kind: type[OSError]) -> None:
    error = kernel_error("SPDADD of it", name, 99, advice="try again")
    assert isinstance(error, kind)
    assert isinstance(error, KernelError)
    assert isinstance(error, PFKeyError)
    assert (error.errno, error.kernel_errno, error.name) == (getattr(errno, name), 99, name)
    assert str(error) == f"SPDADD of it was rejected ({name}); try again"


def test_numbers_of_another_system_become_ours() -> None:
    freebsd = Abi.freebsd(12)
    assert freebsd.error_name(43) == "EPROTONOSUPPORT"
    assert kernel_error("it", freebsd.error_name(43), 43).errno == errno.EPROTONOSUPPORT
    assert Abi.linux().error_name(234) == "EINVAL"
    assert Abi.linux().error_name(200) == "error 200"


def test_the_family() -> None:
    assert issubclass(DecodeError, ValueError)
    assert issubclass(EncodeError, ValueError)
    assert issubclass(ReplyTimeout, TimeoutError)
    assert issubclass(NotTracked, LookupError)
    assert issubclass(ForeignPolicy, FileExistsError)
    assert (
        str(DecodeError("too short", offset=24, extension=18, name="POLICY"))
        == "too short (offset 24, extension 18 (POLICY))"
    )
