"""One writer of an SPD at a time: a lock in this process, and a file that all processes of a host lock."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import threading
import time
from contextlib import suppress
from weakref import WeakValueDictionary

from .errors import PFKeyError, SPDLocked

__all__ = ["WriterLock", "writer_lock"]

_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05


class WriterLock:
    """Who holds it is the only writer.  `path` is the file that the processes of this host lock, None for none.

    Take it with `try_to_take` until that says None, after the pauses that it suggests.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path
        self._inside = threading.Lock()
        self._descriptor = -1

    def take(self, timeout: float) -> None:
        """Take it; SPDLocked when somebody else still has it after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        if not self._inside.acquire(timeout=timeout):
            raise self.refused(timeout)
        try:
            self._wait_for_file(deadline, timeout)
        except BaseException:
            self._inside.release()
            raise

    def _wait_for_file(self, deadline: float, timeout: float) -> None:
        pause = _FIRST_PAUSE
        while not self._take_file():
            if time.monotonic() >= deadline:
                raise self.refused(timeout)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def try_to_take(self) -> bool:
        """Take it if nobody has it."""
        if not self._inside.acquire(blocking=False):
            return False
        try:
            taken = self._take_file()
        except BaseException:
            self._inside.release()
            raise
        if not taken:
            self._inside.release()
        return taken

    def release(self) -> None:
        """Let others write."""
        if self._descriptor >= 0:
            # Closing alone would leave it to a child that was forked meanwhile, for as long as that lives.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = -1
        self._inside.release()

    def refused(self, timeout: float) -> SPDLocked:
        """What to raise after waiting in vain."""
        holder = self._holder()
        return SPDLocked(
            f"the SPD is being written by {holder}, for more than {timeout:g} seconds; nothing was sent. The lock is"
            f" {self.path or 'in this process'}"
        )

    def _take_file(self) -> bool:
        if self.path is None:
            return True
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise PFKeyError(
                f"the lock of the SPD's writers, {self.path}, could not be opened ({error.strerror}); nothing was sent."
                " PFKEY_LOCK or PolicyTracker(kernel, lock=PATH) names another file; all writers of this host must"
                " agree on it"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            raise PFKeyError(f"the lock of the SPD's writers, {self.path}, failed: {error.strerror}") from error
        self._descriptor = descriptor
        with suppress(OSError):  # a full disk takes the name of who holds it, not the lock
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} {' '.join(sys.argv)[:200]}\n".encode(errors="replace"), 0)
        return True

    def _holder(self) -> str:
        if self.path is None:
            return "another thread"
        try:
            with open(self.path, encoding="utf-8", errors="replace") as file:
                pid, _, command = file.read(300).strip().partition(" ")
        except OSError:
            return "another process"
        return f"process {pid} ({command or 'unknown'})" if pid else "another process"


_locks: WeakValueDictionary[str, WriterLock] = WeakValueDictionary()
_guard = threading.Lock()
_ATTRIBUTE = "_pfkey_writer_lock"


def writer_lock(path: str | None, owner: object = None) -> WriterLock:
    """The lock of a path, one for all of this process; without a path one that `owner`'s users share."""
    if path is None:
        with _guard:
            lock: WriterLock | None = getattr(owner, _ATTRIBUTE, None)
            if lock is None:
                lock = WriterLock(None)
                with suppress(AttributeError):  # the users of an object with slots do not share one
                    setattr(owner, _ATTRIBUTE, lock)
            return lock
    with _guard:
        shared = _locks.get(path)
        if shared is None:
            shared = _locks[path] = WriterLock(path)
        return shared
