"""Which policy does a packet meet?  Overlapping policies of few priorities, and what a real Linux 6.1 said.

data/lookups-6.1.json holds cases: what was done to the SPD, and after each step whether a UDP packet from 10.0.0.1 to
10.0.0.2 was refused (a discard policy matched) or not, for two destination ports.  Run as a program inside a Linux that
has af_key, on an interface with that address, it records new ones: `python tests/embedded_lookups.py FILE`.
"""

from __future__ import annotations

import json
import random
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from embedded_messages import message, policy, selector

from pfkey.constants import MessageType as M

RECORDED = Path(__file__).parent / "data" / "lookups-6.1.json"
HOSTS = ("10.0.0.1", "10.0.0.2")
PORTS = (5000, 5001)
KINDS = {"add": M.SPDADD, "update": M.SPDUPDATE, "delete": M.SPDDELETE}
SOURCES = ["10.0.0.1/32", "10.0.0.1/32", "10.0.0.0/24", "10.0.0.0/8", "0.0.0.0/0", "10.0.0.1/24", "10.0.0.0/31"]
DESTINATIONS = ["10.0.0.2/32", "10.0.0.2/32", "10.0.0.0/24", "10.0.0.0/30", "0.0.0.0/0", "10.0.0.2/8", "10.0.0.2/31"]

Operation = tuple[str, str, str, int, int, int, int]
"""What, source, destination, protocol, destination port, action (discard or none), priority."""


def data_of(operation: Operation) -> bytes:
    """The message that does it, in the outbound direction."""
    kind, source, destination, protocol, port, action, priority = operation
    return message(KINDS[kind], policy(action, 2, priority) + selector(source, destination, protocol, (0, port)), seq=1)


def drawn(source: random.Random) -> list[Operation]:
    """A dozen operations on four selectors, so that they overlap, tie and replace each other."""
    selectors = []
    for _ in range(4):
        protocol = source.choice([255, 255, 255, 17, 6])
        port = source.choice([0, 0, 0, 5000]) if protocol != 255 else 0
        selectors.append((source.choice(SOURCES), source.choice(DESTINATIONS), protocol, port))
    operations: list[Operation] = []
    for _ in range(12):
        kind = source.choice(["add", "update", "update", "delete"])
        operations.append((kind, *source.choice(selectors), source.choice([0, 1]), source.choice([5, 5, 5, 6])))
    return operations


def refused(port: int) -> bool:
    """Whether this host may not send to that port of the other one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        try:
            sender.sendto(b"x", (HOSTS[1], port))
        except PermissionError:
            return True
    return False


def recorded(cases: int, send: Callable[[bytes], object]) -> list[list[list[object]]]:
    """New cases, answered by the running kernel."""
    source, result = random.Random(6), []
    for _ in range(cases):
        send(message(M.SPDFLUSH))
        case: list[list[object]] = []
        for operation in drawn(source):
            send(data_of(operation))
            case.append([operation, [int(refused(port)) for port in PORTS]])
        result.append(case)
    return result


if __name__ == "__main__":
    with socket.socket(15, socket.SOCK_RAW, 2) as key:

        def send(data: bytes) -> None:
            key.send(data)
            try:
                while True:
                    key.recv(65536, socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass

        lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in recorded(int(sys.argv[2]), send))
        Path(sys.argv[1]).write_text(f"[\n{lines}\n]\n")
