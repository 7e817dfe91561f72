"""The steps of a scenario: who sends what, who opens a connection, how long to wait."""

from __future__ import annotations

from embedded_messages import message

from pfkey.constants import MessageType as M

A, B, R = "a", "b", "r"
"""The sender, somebody who listens, and somebody who registered."""

Step = tuple[str, str, bytes | float]
"""("send", connection, message), ("open" or "close", connection, b"") or ("sleep", "", seconds)."""

SPDDUMP, DUMP = message(M.SPDDUMP), message(M.DUMP)
SPDFLUSH, FLUSH = message(M.SPDFLUSH), message(M.FLUSH)


def sends(*messages: bytes) -> list[Step]:
    return [("send", A, data) for data in messages]


def opened(*connections: str) -> list[Step]:
    steps: list[Step] = [("open", connection, b"") for connection in connections]
    if R in connections:
        steps.append(("send", R, message(M.REGISTER, satype=3)))
    return steps


def slept(seconds: float) -> list[Step]:
    return [("sleep", "", seconds)]


def from_others(connection: str, *messages: bytes) -> list[Step]:
    return [("send", connection, data) for data in messages]
