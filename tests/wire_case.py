"""What a wire case is: bytes, and the message that a person would build for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address

from pfkey import Abi, ExtensionType, Message, MessageType

LINUX, FREEBSD = Abi.linux("little"), Abi.freebsd(12, "little")


@dataclass(frozen=True)
class Case:
    name: str
    abi: Abi
    hex: str
    type: MessageType | int
    extensions: Mapping[ExtensionType | int, object]
    header: Mapping[str, int]

    def __str__(self) -> str:
        return self.name

    @property
    def data(self) -> bytes:
        return bytes.fromhex(self.hex)

    @property
    def message(self) -> Message:
        return Message(self.type, self.extensions, abi=self.abi, **self.header)  # type: ignore[arg-type]


def case(
    name: str, abi: Abi, hex: str, type: int, extensions: Mapping[ExtensionType | int, object], **header: int
) -> Case:
    return Case(name, abi, "".join(hex.split()), type, extensions, header)


ME, PEER = ip_address("192.0.2.1"), ip_address("198.51.100.1")
