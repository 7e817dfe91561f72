"""One writer at a time: between threads, between processes, and what is said when somebody does not come to an end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty import FaultyChannel, rejects
from package import ROOT
from rig import BSD, ESP, MOVED, OUT, Rig
from scenarios import DEL, UPD

from pfkey import Assignment, PFKeyError, PolicyTracker, Selector, connect
from pfkey.errors import SPDLocked
from pfkey.hostlock import WriterLock, writer_lock

SITE = Selector("10.1.0.0/16", "10.2.0.0/16")


@contextlib.contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until its stdin ends."""
    script = (
        f"import sys\nfrom pfkey.hostlock import WriterLock\nWriterLock({str(path)!r}).take(5)\n"
        "print('held', flush=True)\nsys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, "ikedaemon"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


@pytest.mark.parametrize("profile", BSD)
def test_another_process_is_waited_for_and_named(profile: str, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    rig = Rig(profile, lock=str(path), lock_timeout=0.05)
    with holder(path) as process:
        with pytest.raises(SPDLocked) as raised:
            rig.tracker.add(OUT, SITE, ESP)
        assert str(raised.value) == (
            f"the SPD is being written by process {process.pid} (-c ikedaemon), for more than 0.05 seconds; nothing was"
            f" sent. The lock is {path}"
        )
        assert isinstance(raised.value, TimeoutError)
        assert rig.told() == []
        assert len(rig.tracker) == 0
    assert rig.tracker.add(OUT, SITE, ESP).sent
    rig.agrees()


def test_a_process_that_is_killed_leaves_the_lock_free(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert WriterLock(str(path)).try_to_take()


@pytest.mark.parametrize("timeout", [1e10, float("inf")])
def test_it_may_be_waited_for_for_ever(timeout: float) -> None:
    lock = WriterLock(None)
    lock.take(0, by="somebody")
    timer = threading.Timer(0.05, lock.release, ("somebody",))
    timer.start()
    lock.take(timeout)
    timer.join()


def test_a_lock_that_comes_free_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    rig = Rig("freebsd-13", lock=str(path), lock_timeout=30)
    with holder(path) as process:
        timer = threading.Timer(0.1, process.kill)
        timer.start()
        assert rig.tracker.add(OUT, SITE, ESP).sent
        timer.join()


def test_what_is_refused_for_the_lock_changes_no_list(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    rig = Rig("freebsd-13", lock=str(path), lock_timeout=0.01)
    rig.tracker.add(OUT, SITE, ESP)
    with holder(path):
        with pytest.raises(SPDLocked):
            rig.tracker.replace(OUT, SITE, ESP, MOVED)
        with pytest.raises(PFKeyError, match="is being written by"), rig.tracker.transaction():
            rig.tracker.add(OUT, SITE, MOVED)
        assert rig.tracker.assignments(OUT, SITE) == (ESP,)
        with pytest.raises(SPDLocked):
            rig.tracker.remove(OUT, SITE, ESP)
        assert rig.tracker.assignments(OUT, SITE) == ()
    rig.tracker.flush()
    assert rig.entries() == []


def test_on_linux_only_guards_take_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    rig = Rig("linux", lock=str(path), lock_timeout=0.01)
    strong, weak = (Assignment(*ESP.templates, priority=priority) for priority in (1000, 2000))
    https = Selector("10.1.0.0/16", "10.2.0.0/16", protocol="tcp", destination_port=443)
    rig.tracker.add(OUT, https, weak)
    rig.tracker.add(OUT, SITE, Assignment(*ESP.templates, priority=1500))
    with holder(path):
        rig.tracker.add(OUT, SITE, Assignment(*MOVED.templates, priority=1500))
        with pytest.raises(SPDLocked):
            rig.tracker.add(OUT, https, strong)
        assert rig.tracker.assignments(OUT, https) == (weak,)
    rig.tracker.add(OUT, https, strong)
    rig.agrees()


def test_a_lock_that_cannot_be_taken_in_a_second_round_is_told(tmp_path: Path) -> None:
    """On Linux an SPDADD meets a policy that is ours by its tag; its update needs a guard, and that the lock."""
    path = tmp_path / "lock"
    rig = Rig("linux", owner="us", lock=str(path), lock_timeout=0.01)
    https = Selector("10.1.0.0/16", "10.2.0.0/16", protocol="tcp", destination_port=443)
    rig.tracker.add(OUT, SITE, Assignment(*ESP.templates, priority=1500))
    with connect(rig.embedded.connect()) as kernel:
        PolicyTracker(kernel, owner="us", lock=str(path)).add(OUT, https, Assignment(*ESP.templates, priority=2000))
    with holder(path), pytest.raises(SPDLocked):
        rig.tracker.add(OUT, https, Assignment(*ESP.templates, priority=1000))
    assert rig.tracker.assignments(OUT, https) == ()


def test_a_lock_file_that_cannot_be_opened_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "no such directory" / "lock"
    rig = Rig("freebsd-13", lock=str(path))
    with pytest.raises(PFKeyError) as raised:
        rig.tracker.add(OUT, SITE, ESP)
    assert str(raised.value) == (
        f"the lock of the SPD's writers, {path}, could not be opened (No such file or directory); nothing was sent."
        " PFKEY_LOCK or PolicyTracker(kernel, lock=PATH) names another file; all writers of this host must agree on it"
    )
    assert rig.told() == []


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    """The file is opened for writing, by root, in a directory where others may write."""
    (tmp_path / "precious").write_text("content")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(PFKeyError, match="could not be opened"):
        WriterLock(str(tmp_path / "lock")).take(0)
    assert (tmp_path / "precious").read_text() == "content"


def test_the_file_says_who_holds_it_and_is_for_us_alone(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("x" * 1000)
    path.unlink()
    lock = WriterLock(str(path))
    lock.take(0)
    assert path.read_text().startswith(f"{os.getpid()} ")
    assert path.stat().st_mode & 0o777 == 0o600
    lock.release()


def test_a_full_disk_does_not_keep_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    lock = WriterLock(str(path))
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        lock.take(0)
        assert not WriterLock(str(path)).try_to_take()
        lock.release()
    assert WriterLock(str(path)).try_to_take()


def test_a_child_that_was_forked_meanwhile_does_not_keep_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    lock = WriterLock(str(path))
    lock.take(0)
    reading, writing = os.pipe()
    child = subprocess.Popen(  # has the descriptor, as a child of fork() without exec() has
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=reading, pass_fds=[lock._descriptor]
    )
    try:
        os.close(reading)
        lock.release()
        assert WriterLock(str(path)).try_to_take()
    finally:
        os.close(writing)
        child.wait()


def test_one_path_is_one_lock_in_this_process_and_one_kernel_too(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    first = writer_lock(path)
    assert writer_lock(path) is first
    first.take(0)
    with pytest.raises(SPDLocked, match=f"process {os.getpid()}"):
        first.take(0.01)
    first.release()
    kernel = connect("embedded:freebsd-13")
    assert writer_lock(None, kernel) is writer_lock(None, kernel)
    assert writer_lock(None, kernel) is not writer_lock(None, connect("embedded:freebsd-13"))
    without = writer_lock(None, kernel)
    without.take(0)
    with pytest.raises(SPDLocked, match=r"by another thread, for more than 0\.01 seconds; .* is in this process"):
        without.take(0.01)


def test_two_trackers_over_one_connection_write_one_after_the_other() -> None:
    """The second comes while the first one's guard stands, and waits until it has gone."""
    rig = Rig("freebsd-13")
    other = PolicyTracker(rig.kernel, lock_timeout=30)
    elsewhere = Selector("10.8.0.0/16", "10.9.0.0/16")
    rig.tracker.add(OUT, SITE, ESP)
    thread = threading.Thread(target=other.add, args=(OUT, elsewhere, ESP))

    def while_the_other_starts(channel: FaultyChannel, data: bytes) -> None:
        thread.start()
        channel.inner.send(data)

    rig.fault(UPD, while_the_other_starts)
    rig.tracker.add(OUT, SITE, MOVED)
    thread.join(30)
    assert not thread.is_alive()
    selectors = [selector for _, selector in rig.told()]
    assert selectors[-1] == str(elsewhere)
    assert len(rig.entries()) == 2


def test_a_sweep_that_cannot_have_it_sends_nothing_for_what_is_wanted_either(tmp_path: Path) -> None:
    """It is tried again for the rest of the transaction: who tried in vain before has not taken it."""
    path = tmp_path / "lock"
    rig = Rig("freebsd-13", owner="us", lock=str(path), lock_timeout=0.01)
    locked = pytest.raises(PFKeyError, match="is being written by")
    with holder(path), locked, rig.tracker.transaction(sweep=True):
        rig.tracker.add(OUT, SITE, ESP)
    assert rig.told() == []
    assert rig.tracker.assignments(OUT, SITE) == ()
    with rig.tracker.transaction(sweep=True):
        rig.tracker.add(OUT, SITE, ESP)
    rig.agrees()


def test_an_interrupt_while_it_is_waited_for_does_not_let_guards_go_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    rig = Rig("freebsd-13", lock=str(path), lock_timeout=0.01)
    rig.tracker.add(OUT, SITE, ESP)
    rig.fault(DEL, rejects("EPERM"))
    rig.tracker.add(OUT, SITE, MOVED)  # its guard stays
    wait, interrupts = WriterLock._wait_for_file, [KeyboardInterrupt]

    def wait_for_file(self: WriterLock, deadline: float, timeout: float) -> None:
        if interrupts:
            raise interrupts.pop()
        wait(self, deadline, timeout)

    monkeypatch.setattr(WriterLock, "_wait_for_file", wait_for_file)
    with holder(path), rig.counting() as sent, pytest.raises(KeyboardInterrupt):
        rig.tracker.remove(OUT, SITE, MOVED)
    assert sent == []
    rig.tracker.resync()
    assert len(rig.entries()) == 1


@pytest.mark.parametrize("profile", ["linux", "freebsd-13"])
def test_an_interrupt_while_waiting_for_it_leaves_it_free(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(profile)
    with monkeypatch.context() as patched:
        patched.setattr(WriterLock, "take", lambda self, timeout, by: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            rig.tracker.add(OUT, SITE, ESP)
    assert rig.tracker.add(OUT, SITE, ESP) is not None
    rig.agrees()
