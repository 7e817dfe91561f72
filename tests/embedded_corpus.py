"""Messages for a Linux af_key, sane ones and others: what a real kernel answered to them is in data/af_key-6.1.json.

`play()` sends them over any connection.  Run as a program inside a Linux that has af_key (user-mode-linux will do), it
records the answers anew: `python tests/embedded_corpus.py tests/data/af_key-6.1.json`.
"""

from __future__ import annotations

import errno
import json
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import embedded_corpus_sad
import embedded_corpus_spd
from embedded_steps import FLUSH, SPDFLUSH, A, Step

RECORDED = Path(__file__).parent / "data" / "af_key-6.1.json"
Answer = tuple[str | None, dict[str, list[str]]]
"""The error of the send, and what each connection received, in hex and with the times set to 0."""


class Connection(Protocol):
    """What play() needs of a connection."""

    def put(self, message: bytes) -> str | None: ...
    def get(self) -> bytes | None: ...
    def close(self) -> None: ...


SCENARIOS: dict[str, list[Step]] = dict((*embedded_corpus_spd.scenarios(), *embedded_corpus_sad.scenarios()))
"""Each begins with empty databases; the counters for ids and reqids run on from one to the next."""


# Sending them.


def timeless(data: bytes) -> bytes:
    """The message with the times of LIFETIME_CURRENT set to 0."""
    masked, offset = bytearray(data), 16
    while offset + 4 <= len(masked):
        words, kind = struct.unpack_from("<HH", masked, offset)
        if not words:
            break
        if kind == 2:
            masked[offset + 16 : offset + 32] = bytes(16)
        offset += words * 8
    return bytes(masked)


def play(name: str, open_connection: Callable[[], Connection], sleep: Callable[[float], None]) -> list[Answer]:
    """Send one scenario's messages and collect what everybody receives; leave the databases empty."""
    connections = {A: open_connection()}
    answers: list[Answer] = []

    def received() -> dict[str, list[str]]:
        everything: dict[str, list[str]] = {}
        for who, connection in connections.items():
            while (data := connection.get()) is not None:
                everything.setdefault(who, []).append(timeless(data).hex())
        return everything

    for action, who, what in SCENARIOS[name]:
        error = None
        if action == "open":
            connections[who] = open_connection()
        elif action == "close":
            connections.pop(who).close()
        elif isinstance(what, bytes):
            error = connections[who].put(what)
        else:
            sleep(what)
        answers.append((error, received()))
    for data in (FLUSH, SPDFLUSH):
        connections[A].put(data)
    for connection in connections.values():
        connection.close()
    return answers


class NativeConnection:
    """A socket of the running Linux."""

    def __init__(self) -> None:
        self.socket = socket.socket(15, socket.SOCK_RAW, 2)

    def put(self, data: bytes) -> str | None:
        try:
            self.socket.send(data)
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        return None

    def get(self) -> bytes | None:
        try:
            return self.socket.recv(65536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None

    def close(self) -> None:
        self.socket.close()


if __name__ == "__main__":
    recorded = {name: play(name, NativeConnection, time.sleep) for name in SCENARIOS}
    lines = [
        json.dumps(name) + ": [\n" + ",\n".join(json.dumps(answer) for answer in answers) + "\n]"
        for name, answers in recorded.items()
    ]
    Path(sys.argv[1]).write_text("{\n" + ",\n".join(lines) + "\n}\n")
