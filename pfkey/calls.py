"""What each call of a connection asks, and how its answer is read: the same for the blocking and the asyncio face."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address
from typing import Generic, NamedTuple, TypeVar

from .abi import Abi
from .codec import Message, Value
from .constants import Action, Direction, ExtensionType, MessageType, Mode, PolicyScope, SAProtocol
from .errors import NotSupported, PFKeyError
from .messages import SA2, Address, AddressLike, Algorithm, Policy, PolicyExtension, SecurityAssociation, SPIRange
from .tables import Dump, Messages
from .typed import SATYPE_OF, association_from, association_message, describe, policy_from, policy_message

__all__ = ["Call", "DumpCall", "Supported"]

T = TypeVar("T")

_MAIN_SCOPES = (PolicyScope.ANY, PolicyScope.GLOBAL)


class Call(NamedTuple, Generic[T]):
    """A request, and what to make of its answer."""

    message: Message
    read: Callable[[Message], T]


class DumpCall(NamedTuple, Generic[T]):
    """A request with many answers, and what to make of them."""

    message: Message
    read: Callable[[Messages], T]


class Supported(NamedTuple):
    """What a kernel answers to REGISTER: the algorithms whose code it has, by its own numbers."""

    authentication: tuple[Algorithm, ...]
    encryption: tuple[Algorithm, ...]


def _nothing(_: Message) -> None:
    """An answer that says no more than that it is done."""


# Policies.


def add_policy(policy: Policy, abi: Abi) -> Call[Policy]:
    """SPDADD."""
    return Call(policy_message(MessageType.SPDADD, policy, abi), policy_from)


def update_policy(policy: Policy, abi: Abi) -> Call[Policy]:
    """SPDUPDATE."""
    return Call(policy_message(MessageType.SPDUPDATE, policy, abi), policy_from)


def delete_policy(policy: Policy, abi: Abi) -> Call[Policy]:
    """SPDDELETE."""
    bare = Policy(policy.direction, policy.selector, policy.action)
    return Call(policy_message(MessageType.SPDDELETE, bare, abi), policy_from)


def get_policy(policy_id: int, abi: Abi) -> Call[Policy]:
    """SPDGET."""
    # Kernels look at the id alone, but want a direction and a type that exist.
    extension = PolicyExtension(Action.IPSEC, Direction.OUT, policy_id)
    return Call(Message(MessageType.SPDGET, {ExtensionType.POLICY: extension}, abi=abi), policy_from)


def dump_policies(abi: Abi, *, everything: bool) -> DumpCall[Dump[Policy]]:
    """SPDDUMP."""

    def read(messages: Messages) -> Dump[Policy]:
        if not everything:
            rows = messages.select("direction", "scope")
            main = [index for index, row in enumerate(rows) if _is_main(abi, *row)]
            messages = messages if len(main) == len(messages) else messages.pick(main)
        return Dump(messages, policy_from)

    return DumpCall(Message(MessageType.SPDDUMP, abi=abi), read)


def _is_main(abi: Abi, direction: int, scope: int) -> bool:
    return direction in abi.directions and (not abi.has_scope or scope in _MAIN_SCOPES)


def flush_policies(abi: Abi) -> Call[None]:
    """SPDFLUSH."""
    return Call(Message(MessageType.SPDFLUSH, abi=abi), _nothing)


# Security associations.


def get_spi(
    source: AddressLike,
    destination: AddressLike,
    abi: Abi,
    *,
    protocol: SAProtocol | int,
    spis: SPIRange,
    mode: Mode | int,
    reqid: int,
) -> Call[int]:
    """GETSPI."""
    extensions: dict[ExtensionType | int, Value] = {
        ExtensionType.ADDRESS_SRC: Address(ip_address(source), protocol=255),
        ExtensionType.ADDRESS_DST: Address(ip_address(destination), protocol=255),
        ExtensionType.SPIRANGE: spis,
        ExtensionType.SA2: SA2(mode, 0, reqid),
    }
    return Call(Message(MessageType.GETSPI, extensions, abi=abi, satype=_satype(protocol)), _spi)


def _spi(reply: Message) -> int:
    if reply.spi is None:
        raise PFKeyError(f"{describe(reply)} came without an SPI")
    return reply.spi


def add_sa(sa: SecurityAssociation, abi: Abi) -> Call[SecurityAssociation]:
    """ADD."""
    return Call(association_message(MessageType.ADD, sa, abi), association_from)


def update_sa(sa: SecurityAssociation, abi: Abi) -> Call[SecurityAssociation]:
    """UPDATE."""
    return Call(association_message(MessageType.UPDATE, sa, abi), association_from)


def delete_sa(sa: SecurityAssociation, abi: Abi) -> Call[None]:
    """DELETE."""
    return Call(association_message(MessageType.DELETE, sa, abi), _nothing)


def get_sa(
    source: AddressLike | SecurityAssociation,
    destination: AddressLike | None,
    spi: int | None,
    protocol: SAProtocol | int,
    abi: Abi,
) -> Call[SecurityAssociation]:
    """GET."""
    if isinstance(source, SecurityAssociation):
        wanted = source
    elif destination is None or spi is None:
        raise TypeError("get_sa takes a SecurityAssociation, or source, destination and spi")
    else:
        wanted = SecurityAssociation(ip_address(source), ip_address(destination), spi, protocol)
    return Call(association_message(MessageType.GET, wanted, abi), association_from)


def dump_sas(protocol: SAProtocol | int | None, abi: Abi) -> DumpCall[Dump[SecurityAssociation]]:
    """DUMP."""
    message = Message(MessageType.DUMP, abi=abi, satype=_satype(protocol))
    return DumpCall(message, lambda messages: Dump(messages, association_from))


def flush_sas(protocol: SAProtocol | int | None, abi: Abi) -> Call[None]:
    """FLUSH."""
    return Call(Message(MessageType.FLUSH, abi=abi, satype=_satype(protocol)), _nothing)


def register(protocol: SAProtocol | int, abi: Abi) -> Call[Supported]:
    """REGISTER."""
    return Call(Message(MessageType.REGISTER, abi=abi, satype=_satype(protocol)), _supported)


def _supported(reply: Message) -> Supported:
    return Supported(reply.get(ExtensionType.SUPPORTED_AUTH) or (), reply.get(ExtensionType.SUPPORTED_ENCRYPT) or ())


def _satype(protocol: SAProtocol | int | None) -> int:
    if protocol is None:
        return 0
    if protocol not in SATYPE_OF:
        names = ", ".join(known.name for known in SATYPE_OF)
        raise NotSupported(f"protocol {protocol} has no SAs; {names} have")
    return SATYPE_OF[SAProtocol(protocol)]
