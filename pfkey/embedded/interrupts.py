"""Keeps Ctrl-C out of the work of a kernel that runs in its caller's thread: what has begun comes to its end first."""

from __future__ import annotations

import signal
import threading

# Those of `signal` make enums of numbers and handlers first: 4 us a call instead of 0.3, twice at every message.
from _signal import getsignal as _get  # type: ignore[import-not-found]
from _signal import signal as _set
from types import FrameType

__all__ = ["Uninterrupted"]

_SIGINT = int(signal.SIGINT)


class Uninterrupted:
    """Within `with`, SIGINT is noted; at the end its handler is called, which commonly raises KeyboardInterrupt.

    A real kernel is never left half-way through a message by Ctrl-C, and its caller learns of both: the work is done,
    and the call was interrupted.  Handlers of other signals that raise are not held back: an alarm that should end a
    test must be able to.  Only the main thread runs handlers, so in others there is nothing to do, nor where SIGINT is
    ignored or ends the process.
    """

    __slots__ = ("_handler", "_noted")

    def __init__(self) -> None:
        self._handler: object = None
        self._noted: list[FrameType | None] = []

    def __enter__(self) -> None:
        if threading.get_ident() != threading.main_thread().ident:
            return
        handler = _get(_SIGINT)
        if callable(handler):
            try:
                _set(_SIGINT, self._note)
            except ValueError:  # the main thread of a subinterpreter gets no signals
                return
            self._handler = handler

    def _note(self, _number: int, frame: FrameType | None) -> None:
        self._noted.append(frame)

    def __exit__(self, *_: object) -> None:
        handler, self._handler = self._handler, None
        if callable(handler):
            _set(_SIGINT, handler)
            if self._noted:
                handler(_SIGINT, self._noted[0])
