"""Carries the real-kernel tests of a pytest session into one user-mode Linux, and their reports back out.

Outside, `Outside` takes over the tests marked `real_kernel`: the first of them boots the kernel, which runs all that
are selected in an ordinary pytest run; each report is replayed here under the test's own name as soon as it arrives.
Inside, `Inside` keeps to the selection and writes every report as a line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest

import pfkey

from .uml import SCRATCH, Installation, Unavailable, UserModeLinux

SILENCE_SECONDS = 300.0
"""No report for so long, and the kernel inside is taken for stuck; a single test is given less (see conftest)."""

WHERE, REQUIRED = "PFKEY_KERNEL_TESTS", "PFKEY_REQUIRE_REAL_KERNEL"
UML, NATIVE = "uml", "native"


def runs_here() -> bool:
    """The real-kernel tests run in this process: its kernel has af_key and we may use it."""
    value = os.environ.get(WHERE, UML)
    if value not in (UML, NATIVE):
        raise pytest.UsageError(f"{WHERE}={value}: it is {UML} or {NATIVE}")
    return value == NATIVE


def is_real(item: pytest.Item) -> bool:
    """The test needs a real af_key."""
    return item.get_closest_marker("real_kernel") is not None


def missing() -> str | None:
    """Why user-mode Linux cannot be booted here, or None."""
    try:
        Installation.find().module_paths()
    except Unavailable as reason:
        return str(reason)
    return None


def skip_or_fail(reason: str) -> None:
    """A machine without the kernel skips; where the tests must run (CI), a skip would hide that they did not."""
    if os.environ.get(REQUIRED, "0") not in ("", "0"):
        pytest.fail(f"{REQUIRED} is set, but {reason}", pytrace=False)
    pytest.skip(reason)


class Outside:
    """Replays what the tests do in user-mode Linux; a pytest plugin."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._uml: UserModeLinux | None = None
        self._reports: dict[str, list[pytest.TestReport]] = defaultdict(list)
        self._finished: set[str] = set()
        self._position = 0
        self._failure = ""
        self._boot_seconds = 0.0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Real ones last: pytest tears down after the others as usual, and the kernel runs in one stretch."""
        items.sort(key=is_real)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Replay a real one; leave the others to pytest."""
        if not is_real(item):
            return None
        if self._uml is None:
            self._boot([other for other in item.session.items if is_real(other)])
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._wait_for(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say that it was a real kernel."""
        if self._boot_seconds:
            terminalreporter.write_line(f"user-mode Linux came up in {self._boot_seconds:.1f} s")

    def pytest_unconfigure(self) -> None:
        """End it, also after Ctrl-C or --exitfirst."""
        if self._uml is not None:
            self._uml.close()

    def _boot(self, items: list[pytest.Item]) -> None:
        """Start the kernel with a pytest run of these tests in it."""
        config = self._config
        # -P, and the path of the package that is tested here: an unbuilt source tree must not come before it.
        command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(config.rootpath)]
        if config.inipath is not None:
            command += ["-c", str(config.inipath)]
        command += dict.fromkeys(str(item.path) for item in items)
        environment = {WHERE: NATIVE, REQUIRED: "1", "PYTHONPATH": os.pathsep.join(python_path())}
        self._uml = UserModeLinux(command, directory=config.rootpath, environment=environment)
        (self._uml.scratch / "selection").write_text(json.dumps([item.nodeid for item in items]))
        started = time.monotonic()
        self._uml.start()
        while self._uml.running() and not self._uml.is_up() and time.monotonic() - started < SILENCE_SECONDS:
            time.sleep(0.02)
        self._boot_seconds = time.monotonic() - started

    def _wait_for(self, item: pytest.Item) -> list[pytest.TestReport]:
        """The reports of one test, as soon as it has run; a failed one when it never will."""
        assert self._uml is not None
        heard = time.monotonic()
        while item.nodeid not in self._finished and not self._failure:
            running = self._uml.running()
            if self._read_reports():
                heard = time.monotonic()
            elif not running:
                self._failure = f"the run in user-mode Linux ended without this test\n{self._uml.report()}"
            elif time.monotonic() - heard > SILENCE_SECONDS:
                self._failure = f"no report from user-mode Linux for {SILENCE_SECONDS:g} s\n{self._uml.report()}"
                self._uml.close()
            else:
                time.sleep(0.02)
        reports = self._reports.pop(item.nodeid, [])
        if item.nodeid not in self._finished:
            reports.append(pytest.TestReport(item.nodeid, item.location, {}, "failed", self._failure, "call"))
        return reports

    def _read_reports(self) -> bool:
        """Take in what came since the last look; whether there was anything."""
        assert self._uml is not None
        try:
            with (self._uml.scratch / "reports").open("rb") as file:
                file.seek(self._position)
                # The line that is being written has no end yet: it waits for the next look.
                whole = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return False
        if not whole:
            return False
        self._position += len(whole) + 1
        for line in whole.splitlines():
            data = json.loads(line)
            if "finished" in data:
                self._finished.add(data["finished"])
                continue
            report = self._config.hook.pytest_report_from_serializable(config=self._config, data=data)
            self._reports[report.nodeid].append(report)
        return True


class Inside:
    """Keeps a run in user-mode Linux to the tests that were selected outside, and reports them; a pytest plugin."""

    def __init__(self, config: pytest.Config, scratch: Path) -> None:
        self._config = config
        self._selection: list[str] = json.loads((scratch / "selection").read_text())
        self._file = (scratch / "reports").open("w", buffering=1)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """What was selected, in the order in which it is waited for."""
        known = {item.nodeid: item for item in items}
        items[:] = [known[nodeid] for nodeid in self._selection if nodeid in known]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One line for each phase of each test."""
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._file.write(json.dumps(data, default=str) + "\n")

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """And one that says that there will be no more of it."""
        self._file.write(json.dumps({"finished": nodeid}) + "\n")

    def pytest_unconfigure(self) -> None:
        """The last line is out."""
        self._file.close()


def python_path() -> list[str]:
    """Where the package under test comes from, before what the environment says."""
    package = Path(str(pfkey.__file__)).resolve().parent.parent
    return [str(package), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


def plugins(config: pytest.Config) -> list[object]:
    """The plugins that this run needs: none where the tests run here or cannot run at all."""
    scratch = os.environ.get(SCRATCH)
    if scratch:
        return [Inside(config, Path(scratch))]
    return [] if runs_here() or missing() else [Outside(config)]
