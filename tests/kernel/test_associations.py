"""SAs, from GETSPI to FLUSH, with their errors, against a real af_key and the embedded Linux kernel."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest

from pfkey import (
    ExtensionType,
    Kernel,
    KernelError,
    Lifetime,
    Message,
    MessageType,
    Mode,
    NotSupported,
    SAProtocol,
    SecurityAssociation,
    connect,
)
from pfkey.constants import SAState, SAType
from pfkey.messages import Address, NATTraversal, SPIRange
from pfkey.typed import association_message

HERE, THERE = ip_address("192.0.2.1"), ip_address("198.51.100.1")
HERE6, THERE6 = ip_address("2001:db8::1"), ip_address("2001:db8::2")
KEY16, KEY20, KEY32 = bytes(range(16)), bytes(range(20)), bytes(range(32))

ESP = SecurityAssociation(
    HERE,
    THERE,
    0x10001,
    mode=Mode.TUNNEL,
    reqid=7,
    encryption="aes-cbc",
    encryption_key=KEY16,
    authentication="hmac-sha2-256",
    authentication_key=KEY32,
    replay_window=32,
    lifetime_hard=Lifetime(5000, 1_000_000, 3600, 1800),
    lifetime_soft=Lifetime(4000, 900_000, 3000, 1500),
)
AH = SecurityAssociation(
    HERE,
    THERE,
    0x10002,
    SAProtocol.AH,
    Mode.TRANSPORT,
    authentication="hmac-sha1",
    authentication_key=KEY20,
)
KINDS = {
    "esp v4": ESP,
    "esp v6": replace(ESP, source=HERE6, destination=THERE6, mode=Mode.TRANSPORT),
    "ah v4": AH,
    "ah v6": replace(AH, source=HERE6, destination=THERE6),
    "esp nat-t": replace(ESP, nat_traversal=NATTraversal(4500, 4501)),
    "esp without lifetimes": replace(ESP, lifetime_hard=None, lifetime_soft=None),
    "esp null": replace(ESP, encryption="null", encryption_key=b""),
    "esp aes-ctr": replace(ESP, encryption="aes-ctr", encryption_key=bytes(range(20))),
    "ipcomp": SecurityAssociation(HERE, THERE, 0x1234, SAProtocol.IPCOMP, Mode.TRANSPORT, compression="deflate"),
}
# Of modules that the embedded kernel, like the one whose REGISTER it answers with, has not loaded.
OTHER_CIPHERS = {
    "esp 3des md5": replace(
        ESP, encryption="3des-cbc", encryption_key=bytes(range(24)), authentication="hmac-md5", authentication_key=KEY16
    ),
    "esp aes-cbc xcbc": replace(ESP, authentication="aes-xcbc-mac", authentication_key=KEY16),
}
_COMPARED = (
    "source",
    "destination",
    "spi",
    "protocol",
    "mode",
    "reqid",
    "authentication",
    "authentication_key",
    "encryption",
    "encryption_key",
    "compression",
    "replay_window",
    "nat_traversal",
)


def assert_same(answer: SecurityAssociation, asked: SecurityAssociation) -> None:
    for name in _COMPARED:
        assert getattr(answer, name) == getattr(asked, name), name
    assert answer.lifetime_hard == (asked.lifetime_hard or Lifetime())
    assert answer.lifetime_soft == (asked.lifetime_soft or Lifetime())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_added_is_what_is_read(kind: str, kernel: Kernel) -> None:
    sa = KINDS[kind]
    for answer in (kernel.add_sa(sa), kernel.get_sa(sa), *kernel.dump_sas(), *kernel.dump_sas(sa.protocol)):
        assert_same(answer, sa)
        assert answer.state == SAState.MATURE
    assert "key" not in repr(kernel.get_sa(sa)).replace("_key", "")
    kernel.delete_sa(sa)
    assert kernel.dump_sas() == []


@pytest.mark.real_kernel
@pytest.mark.parametrize("kind", OTHER_CIPHERS)
def test_ciphers_of_other_modules(kind: str) -> None:
    with connect() as kernel:
        assert_same(kernel.add_sa(OTHER_CIPHERS[kind]), OTHER_CIPHERS[kind])


def test_dumps_by_protocol(kernel: Kernel) -> None:
    kernel.add_sa(ESP)
    kernel.add_sa(AH)
    assert [sa.spi for sa in kernel.dump_sas()] == [AH.spi, ESP.spi]
    assert [sa.spi for sa in kernel.dump_sas(SAProtocol.ESP)] == [ESP.spi]
    assert kernel.dump_sas(SAProtocol.IPCOMP) == []


def test_adding_twice_is_refused_whatever_the_source(kernel: Kernel) -> None:
    kernel.add_sa(ESP)
    with pytest.raises(FileExistsError, match=r"ADD of esp 192\.0\.2\.9 -> 198\.51\.100\.1 spi 0x00010001.*EEXIST"):
        kernel.add_sa(replace(ESP, source=ip_address("192.0.2.9")))
    kernel.add_sa(replace(AH, spi=ESP.spi))  # another protocol is another SA


def test_what_is_not_there(kernel: Kernel) -> None:
    for call in (kernel.get_sa, kernel.delete_sa, kernel.update_sa):
        with pytest.raises(ProcessLookupError, match="ESRCH"):
            call(ESP)
    with pytest.raises(ProcessLookupError):
        kernel.get_sa(HERE, THERE, 0x99)


def test_a_larval_sa_becomes_the_new_one(kernel: Kernel) -> None:
    spi = kernel.get_spi(HERE, THERE, reqid=7, mode=Mode.TUNNEL)
    assert 0xC0000000 <= spi <= 0xCFFFFFFF
    larval = kernel.get_sa(HERE, THERE, spi)
    assert (larval.state, larval.reqid) == (SAState.LARVAL, 7)
    kernel.update_sa(replace(ESP, spi=spi))
    assert_same(kernel.get_sa(HERE, THERE, spi), replace(ESP, spi=spi))


def test_the_range_of_an_spi(kernel: Kernel) -> None:
    assert kernel.get_spi(HERE, THERE, minimum=0x777, maximum=0x777) == 0x777
    with pytest.raises(FileNotFoundError, match="GETSPI of esp"):
        kernel.get_spi(HERE, THERE, minimum=0x777, maximum=0x777)
    with pytest.raises(KernelError, match="EINVAL"):
        kernel.get_spi(HERE, THERE, minimum=10, maximum=9)
    assert 0x100 <= kernel.get_spi(HERE, THERE, protocol=SAProtocol.IPCOMP, minimum=0x100, maximum=0xEFFF) <= 0xEFFF
    with pytest.raises(KernelError, match="EINVAL"):
        kernel.get_spi(HERE, THERE, protocol=SAProtocol.IPCOMP, minimum=0x10000, maximum=0x20000)


def test_an_update_of_a_mature_sa_changes_its_lifetimes_alone(kernel: Kernel) -> None:
    kernel.add_sa(ESP)
    longer = Lifetime(addtime=7200)
    kernel.update_sa(replace(ESP, lifetime_hard=longer, lifetime_soft=Lifetime(), encryption_key=bytes(16), reqid=9))
    held = kernel.get_sa(ESP)
    assert held.lifetime_hard == longer
    assert (held.encryption_key, held.reqid) == (KEY16, 7)


def test_nat_traversal_cannot_be_switched(kernel: Kernel) -> None:
    kernel.add_sa(ESP)
    with pytest.raises(KernelError, match="EINVAL"):
        kernel.update_sa(replace(ESP, nat_traversal=NATTraversal(4500, 4500)))


def test_nat_traversal_ports_can_change(kernel: Kernel) -> None:
    kernel.add_sa(KINDS["esp nat-t"])
    kernel.update_sa(replace(ESP, nat_traversal=NATTraversal(4500, 40000)))
    assert kernel.get_sa(ESP).nat_traversal == NATTraversal(4500, 40000)


def test_flushing_one_protocol(kernel: Kernel) -> None:
    kernel.flush_sas()
    kernel.add_sa(ESP)
    kernel.add_sa(AH)
    kernel.flush_sas(SAProtocol.ESP)
    assert [sa.protocol for sa in kernel.dump_sas()] == [SAProtocol.AH]
    kernel.flush_sas()
    assert kernel.dump_sas() == []


REJECTED = [
    ("a key of the wrong size", replace(ESP, encryption_key=bytes(5)), "EINVAL"),
    ("no encryption key", replace(ESP, encryption_key=b""), "EINVAL"),
    ("no authentication key for AH", replace(AH, authentication_key=b""), "EINVAL"),
    ("an AEAD", replace(ESP, encryption="aes-gcm-16", encryption_key=bytes(20), authentication=None), "ENOSYS"),
    ("an unknown cipher", replace(ESP, encryption=99), "ENOSYS"),
    ("mode 9", replace(ESP, mode=9), "EINVAL"),
    ("two families", replace(ESP, destination=THERE6), "EINVAL"),
    ("nat-t on AH", replace(AH, nat_traversal=NATTraversal(4500, 4500)), "EINVAL"),
    ("an unknown encapsulation", replace(ESP, nat_traversal=NATTraversal(4500, 4500, type=9)), "EINVAL"),
]


@pytest.mark.parametrize(("what", "sa", "error"), REJECTED, ids=[row[0] for row in REJECTED])
def test_what_the_kernel_rejects(what: str, sa: SecurityAssociation, error: str, kernel: Kernel) -> None:
    with pytest.raises(KernelError) as raised:
        kernel.add_sa(sa)
    assert raised.value.name == error
    assert kernel.dump_sas() == []
    assert sa.encryption_key.hex() not in str(raised.value) or not sa.encryption_key


def test_one_lifetime_alone_is_rejected(kernel: Kernel) -> None:
    """Which is why the package sends both or neither."""
    extensions = dict(association_message(MessageType.ADD, ESP, kernel.abi).extensions)
    del extensions[ExtensionType.LIFETIME_SOFT]
    with pytest.raises(KernelError, match="EINVAL"):
        kernel.request(Message(MessageType.ADD, extensions, abi=kernel.abi, satype=SAType.ESP))


def test_satypes_that_do_not_exist(kernel: Kernel) -> None:
    extensions = association_message(MessageType.ADD, ESP, kernel.abi).extensions
    with pytest.raises(KernelError, match="EPROTONOSUPPORT"):
        kernel.request(Message(MessageType.ADD, extensions, abi=kernel.abi, satype=0))
    with pytest.raises(KernelError, match="EINVAL"):
        kernel.dump(Message(MessageType.DUMP, abi=kernel.abi, satype=77))


def test_what_this_pf_key_lacks_is_refused_before(kernel: Kernel) -> None:
    with pytest.raises(NotSupported, match="at most 32"):
        kernel.add_sa(replace(ESP, replay_window=64))
    with pytest.raises(NotSupported, match="has no encryption algorithm 'chacha20-poly1305'"):
        kernel.add_sa(replace(ESP, encryption="chacha20-poly1305"))


def test_register_lists_algorithms(kernel: Kernel) -> None:
    supported = kernel.register(SAProtocol.ESP)
    names = {kernel.abi.encryption_names.get(algorithm.id) for algorithm in supported.encryption}
    assert {"null", "aes-cbc", "aes-ctr"} <= names
    assert "aes-gcm-16" not in names
    assert any(kernel.abi.authentication_names.get(one.id) == "hmac-sha2-256" for one in supported.authentication)
    with pytest.raises(FileExistsError):
        kernel.register(SAProtocol.ESP)


def test_an_spi_range_travels_in_host_order(kernel: Kernel) -> None:
    message = Message(
        MessageType.GETSPI,
        {
            ExtensionType.ADDRESS_SRC: Address(HERE),
            ExtensionType.ADDRESS_DST: Address(THERE),
            ExtensionType.SPIRANGE: SPIRange(0x1000, 0x1000),
        },
        abi=kernel.abi,
        satype=SAType.ESP,
    )
    assert kernel.request(message).spi == 0x1000
