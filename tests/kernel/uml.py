"""Boots a Linux kernel with af_key as an ordinary process, and runs one command in it (user-mode Linux).

The host's file system is the root of the kernel inside, so a command sees the same Python, the same packages and the
same tree.  What is written there reaches the real files: everything temporary goes to a tmpfs.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

INSTALL = "apt-get install user-mode-linux busybox-static"

MODULES = (
    # The IV generator of ESP needs a random source (drbg): without it every SADB_ADD of ESP answers ENOENT.
    *("jitterentropy_rng", "sha512_generic", "hmac", "drbg", "seqiv", "echainiv", "authenc", "crypto_null"),
    *("cbc", "ctr", "ecb", "des_generic", "md5", "xcbc", "cmac", "rmd160", "deflate"),
    *("ipv6", "af_key", "xfrm_user", "esp4", "ah4", "ipcomp", "esp6", "ah6", "ipcomp6"),
    *("af_packet", "veth"),
)
"""What the tests need; a kernel may have any of them built in."""

SCRATCH = "PFKEY_UML_SCRATCH"
"""The variable that tells a command inside where the scratch directory is."""

_STOP_SECONDS = 10


class Unavailable(Exception):
    """This machine cannot boot the kernel; the text says what is missing and how to get it."""


class BootError(Exception):
    """The kernel did not come up, or ended early; the text ends in what its console said."""


def module_order(dependencies: str, wanted: Iterable[str], built_in: str = "") -> list[str]:
    """The paths of modules.dep in an order in which they can be inserted: what a module needs comes before it.

    `dependencies` and `built_in` are the texts of modules.dep and modules.builtin.  A module may have any of the
    compressed suffixes.  Raises KeyError for one that stands in neither.
    """

    def name(path: str) -> str:
        return path.rsplit("/", 1)[-1].partition(".ko")[0].replace("-", "_")

    # A line lists the nearest dependency first and the deepest last.
    lines = (line.split(":", 1) for line in dependencies.splitlines() if ":" in line)
    known = {name(path): [*reversed(needed.split()), path] for path, needed in lines}
    present = {name(path) for path in built_in.split()}
    order: dict[str, None] = {}
    for module in wanted:
        if module not in present:
            order.update(dict.fromkeys(known[module]))
    return list(order)


@dataclass(frozen=True)
class Installation:
    """The programs and the modules on this machine."""

    kernel: str
    busybox: str
    modules: Path

    @classmethod
    def find(cls) -> Self:
        """Look for them; raises Unavailable with the command that installs what is missing."""
        kernel, busybox = shutil.which("linux.uml"), shutil.which("busybox")
        missing = [name for name, path in (("linux.uml", kernel), ("busybox", busybox)) if path is None]
        if kernel is None or busybox is None:
            raise Unavailable(f"{' and '.join(missing)} not found; a real af_key needs: {INSTALL}")
        release = subprocess.run(
            [kernel, "--version"], capture_output=True, text=True, check=True, timeout=30, stdin=subprocess.DEVNULL
        ).stdout.strip()
        for directory in (Path("/usr/lib/uml/modules"), Path("/lib/modules")):
            if (directory / release / "modules.dep").is_file():
                return cls(kernel, busybox, directory / release)
        raise Unavailable(f"linux.uml {release} has no modules directory; a real af_key needs: {INSTALL}")

    def module_paths(self) -> list[Path]:
        """What to insert, in order; modules that this kernel does not have are left out, af_key may not be."""
        dependencies = (self.modules / "modules.dep").read_text()
        built_in = (self.modules / "modules.builtin").read_text()
        paths: dict[str, None] = {}
        for module in MODULES:
            try:
                paths.update(dict.fromkeys(module_order(dependencies, [module], built_in)))
            except KeyError:
                if module == "af_key":
                    raise Unavailable(f"the kernel of {self.modules} has no af_key") from None
        return [self.modules / path for path in paths]


def _init_script(
    installation: Installation, command: Sequence[str], environment: Mapping[str, str], directory: Path, scratch: Path
) -> str:
    """What the kernel starts as its first process."""
    busybox = shlex.quote(installation.busybox)
    insertions = "\n".join(f"$b insmod {shlex.quote(str(path))}" for path in installation.module_paths())
    assignments = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
    quoted = shlex.join(command)
    return f"""#!{installation.busybox} sh
b={busybox}
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev 2>/dev/null
$b mkdir -p /dev/shm
$b mount -t tmpfs tmpfs /dev/shm
$b mount -t tmpfs tmpfs {shlex.quote(str(scratch / "tmp"))}
{insertions}
$b ip link set lo up
$b hostname uml
echo up >{shlex.quote(str(scratch / "up"))}
cd {shlex.quote(str(directory))} &&
    $b env -i {assignments} {quoted} </dev/null >{shlex.quote(str(scratch / "output"))} 2>&1
echo $? >{shlex.quote(str(scratch / "status"))}
$b poweroff -f
"""


def _environment(extra: Mapping[str, str], temporary: Path) -> dict[str, str]:
    """What a command inside gets to see of the host's environment; a preloaded sanitizer could not run there."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("PFKEY_", "PYTHON", "LC_")) or name in ("PATH", "LANG", "TERM", "VIRTUAL_ENV")
    }
    kept["PATH"] = kept.get("PATH", "/usr/local/bin:/usr/bin:/bin") + ":/usr/sbin:/sbin"
    kept.update(HOME=str(temporary), TMPDIR=str(temporary), PYTHONDONTWRITEBYTECODE="1")
    return kept | dict(extra)


class UserModeLinux:
    """One kernel that runs one command: `with UserModeLinux([...], directory=...) as uml: uml.wait(60)`.

    The command runs as root in `directory`.  Its output is in `output()`, what the kernel itself said in `console()`.
    `scratch` is a directory that both sides see (inside: the variable PFKEY_UML_SCRATCH); it goes away with the
    object.  Nothing is left running.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        directory: Path,
        environment: Mapping[str, str] | None = None,
        memory: str = "512M",
    ) -> None:
        self._installation = Installation.find()
        self._holder = tempfile.TemporaryDirectory(prefix="pfkey-uml-")
        self.scratch = Path(self._holder.name)
        (self.scratch / "tmp").mkdir()
        self._process: subprocess.Popen[bytes] | None = None
        self._command, self._directory, self._memory = command, directory, memory
        self._extra = dict(environment or {})

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Boot; returns at once."""
        init = self.scratch / "init"
        environment = _environment(self._extra | {SCRATCH: str(self.scratch)}, self.scratch / "tmp")
        init.write_text(_init_script(self._installation, self._command, environment, self._directory, self.scratch))
        init.chmod(0o755)
        arguments = [
            *(self._installation.kernel, "rootfstype=hostfs", "rootflags=/", "rw", f"mem={self._memory}"),
            *(f"init={init}", "con=null", "con0=fd:0,fd:1", "quiet", "panic=1", f"uml_dir={self.scratch}/uml/"),
        ]
        with (self.scratch / "console").open("wb") as console:
            # A session of its own: what the kernel starts on the host can then be ended together with it.
            self._process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True
            )

    def running(self) -> bool:
        """The kernel has not been halted yet."""
        return self._process is not None and self._process.poll() is None

    def is_up(self) -> bool:
        """The command has been started."""
        return (self.scratch / "up").exists()

    def wait(self, timeout: float) -> int:
        """The command's exit status; raises BootError when the kernel ends without it or takes too long."""
        assert self._process is not None
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise BootError(f"still running after {timeout:g} s\n{self.report()}") from None
        status = self._read("status").strip()
        if not status:
            raise BootError(f"the kernel ended before its command did\n{self.report()}")
        return int(status)

    def output(self) -> str:
        """What the command printed so far."""
        return self._read("output")

    def console(self) -> str:
        """What the kernel and its first process said so far."""
        return self._read("console")

    def report(self) -> str:
        """Both, as far as they help to see what went wrong."""
        state = "running" if self.is_up() else "not started"
        return f"console:\n{self.console()[-4000:]}\ncommand ({state}):\n{self.output()[-4000:]}"

    def close(self) -> None:
        """End the kernel if it still runs, and remove the scratch directory."""
        process, self._process = self._process, None
        if process is not None:
            # The kernel's own processes are traced by it and end with it; the group is ours alone.
            for end in (signal.SIGTERM, signal.SIGKILL):
                if process.poll() is None:
                    os.killpg(process.pid, end)
                    try:
                        process.wait(_STOP_SECONDS)
                    except subprocess.TimeoutExpired:
                        continue
        self._holder.cleanup()

    def _read(self, name: str) -> str:
        try:
            return (self.scratch / name).read_text(errors="replace")
        except FileNotFoundError:
            return ""
