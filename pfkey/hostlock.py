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

__all__ = ["LONGEST_WAIT", "WriterLock", "writer_lock"]

_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05
LONGEST_WAIT = 86400.0
"""Seconds: no lock, nor a timer, can be waited for some centuries, or for ever, at once."""


class WriterLock:
    """Who holds it is the only writer.  `path` is the file that the processes of this host lock, None for none.

    Take it with `take`, or with `try_to_take` until that says True.  `by` is who takes it: `release` by anybody else,
    or said once more, does nothing.  An interrupt (Ctrl-C) may come at any moment, and leaves it taken or free.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._taken = False
        self._by: object = None
        self._descriptor = -1

    def take(self, timeout: float, by: object = None) -> None:
        """Take it; SPDLocked when somebody else still has it after `timeout` seconds."""
        deadline, mine = time.monotonic() + timeout, False
        try:
            with self._lock:  # acquire() would be interrupted when it has it already, and nobody would know
                while self._taken and (left := deadline - time.monotonic()) > 0:
                    self._changed.wait(min(left, LONGEST_WAIT))
                if not self._taken:
                    self._by, self._taken, mine = by, True, True
            if mine:
                self._wait_for_file(deadline, timeout)
        except BaseException:
            if mine:
                self.release(by)
            raise
        if not mine:
            raise self.refused(timeout)

    def _wait_for_file(self, deadline: float, timeout: float) -> None:
        pause = _FIRST_PAUSE
        while not self._take_file():
            if time.monotonic() >= deadline:
                raise self.refused(timeout)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def try_to_take(self, by: object = None) -> bool:
        """Take it if nobody has it."""
        mine = done = False
        try:
            with self._lock:
                if self._taken:
                    return False
                self._by, self._taken, mine = by, True, True
            done = self._take_file()
        except BaseException:
            if mine:
                self.release(by)
            raise
        if not done:
            self.release(by)
        return done

    def is_held(self, by: object) -> bool:
        """Whether `by` has it: who tried to take it in vain has not."""
        return self._taken and self._by is by

    def release(self, by: object = None) -> None:
        """Let others write."""
        if not self.is_held(by):
            return
        if self._descriptor >= 0:
            # Closing alone would leave it to a child that was forked meanwhile, for as long as that lives.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)
        with self._lock:
            self._by, self._taken = None, False
            self._changed.notify()

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
