"""An embedded kernel behind a real socket: what a NativeChannel meets, with a file descriptor, run by other threads."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from pfkey import Abi, ChannelClosed, EmbeddedKernel
from pfkey import channel as channels
from pfkey.channel import NativeChannel

__all__ = ["native_channel"]


@contextlib.contextmanager
def native_channel(embedded: EmbeddedKernel, patch: pytest.MonkeyPatch) -> Iterator[NativeChannel]:
    """A NativeChannel whose socket ends at a connection to this kernel."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    inner = embedded.connect()
    inner.set_receive_buffer(1 << 17)

    def take() -> None:
        with contextlib.suppress(OSError, ChannelClosed):
            while data := theirs.recv(1 << 16):
                inner.send(data)

    def give() -> None:
        with contextlib.suppress(OSError, ChannelClosed):
            while True:
                if (data := inner.receive(None)) is not None:
                    theirs.send(data)

    threads = [threading.Thread(target=one, daemon=True) for one in (take, give)]
    for thread in threads:
        thread.start()
    with patch.context() as patched:
        patched.setattr(Abi, "native", staticmethod(lambda: embedded.abi))
        patched.setattr(channels, "_open", lambda abi: ours)
        channel = NativeChannel()
    try:
        yield channel
    finally:
        channel.close()
        theirs.shutdown(socket.SHUT_RDWR)
        inner.close()
        for thread in threads:
            thread.join(20)
        theirs.close()
