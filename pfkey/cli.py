"""The `pfkey` command: one table of subcommands, exit codes, and errors as one line of advice.

Exit codes: 0 done, 1 the kernel refused something or a check failed, 2 usage, 3 PF_KEY could not be opened; 130 after
Ctrl-C.  Data goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from . import __version__
from .errors import PFKeyError
from .target import CannotOpenError, UsageError

__all__ = ["main"]

OK, REFUSED, USAGE, CANNOT_OPEN, INTERRUPTED = 0, 1, 2, 3, 130


@dataclass(frozen=True)
class Command:
    """A subcommand: its arguments, and where the function that runs it is (imported only then)."""

    name: str
    summary: str
    description: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: str
    """"module:function" in this package; the function takes the parsed arguments and returns the exit code."""
    kernel: str | None = "native"
    """The kernel when neither --kernel nor PFKEY_KERNEL says; None for a command that speaks to none."""


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rekeyings", type=_positive, default=1, metavar="N", help="rekey N times (default: 1)")


def _dump_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policies", action="store_true", help="the policies (SPD) instead of the SAs (SAD)")
    parser.add_argument("--show-keys", action="store_true", help="show the keys of the SAs")


def _decode_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input", nargs="*", metavar="INPUT", help="a file, hex digits, or - for stdin (default: -)", default=["-"]
    )
    parser.add_argument("--abi", metavar="NAME", help="linux, freebsd-RELEASE, netbsd or macos, with -big or -little")
    parser.add_argument("--show-keys", action="store_true", help="show the keys of SAs")


def _embedded_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--listen", required=True, metavar="PATH", help="the socket; others say --kernel unix:PATH")
    parser.add_argument(
        "--kernel-profile",
        default="linux",
        metavar="NAME",
        help="linux, linux-6.12, linux-smp (several CPUs), freebsd-10 to freebsd-14, netbsd or macos (default: linux)",
    )


COMMANDS = (
    Command(
        "demo",
        "what the tracker sends while SAs come and go",
        "Take a tunnel through its life (trap, first SA, rekeying, moved peer, reauthentication, end) and print each"
        " message sent for its policies, beside what other ways of doing it send.  Runs without privileges on a kernel"
        " inside the process; with --kernel native on this host's own, which it leaves as it found it.",
        _demo_arguments,
        "demo:run",
        kernel="embedded:linux",
    ),
    Command(
        "dump",
        "list the SAs or the policies of a kernel",
        "One record per line, prefix lengths always printed, keys hidden.",
        _dump_arguments,
        "show:run",
    ),
    Command(
        "decode",
        "show messages byte by byte",
        "Each field of each message: its offset, its bytes, the name that the system's headers give it, its value and"
        " what that means.  The input is hex or binary, one message or a stream of them.  The system is guessed when"
        " the bytes leave no doubt.",
        _decode_arguments,
        "hexdump:run",
        kernel=None,
    ),
    Command(
        "embedded",
        "serve an embedded kernel to other processes",
        "A kernel that behaves like one of these systems, an SAD and an SPD in this process, served on a unix socket"
        " to any number of others (pfkey dump --kernel unix:PATH, connect('unix:PATH')) until Ctrl-C.  It needs no"
        " privileges and protects no packet.  Who connects may be killed at any moment: the kernel lives on, as a real"
        " one would.  Only this user can connect.",
        _embedded_arguments,
        "embedded.server:run",
        kernel=None,
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: those of the process) and return its exit code."""
    if sys.stdout is None:  # started with a closed stdout: what it would show is wanted by nobody
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (it lives as long as the process)
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed the usage, or the help
        return stop.code if isinstance(stop.code, int) else USAGE
    try:
        with _terminable():
            return _run(arguments)
    except UsageError as error:
        return _fail(error, USAGE)
    except CannotOpenError as error:
        return _fail(error, CANNOT_OPEN)
    except PFKeyError as error:
        return _fail(error, REFUSED)
    except BrokenPipeError:
        _abandon_output()  # the reader has gone: `pfkey dump | head -1`
        return OK
    except OSError as error:
        _abandon_output()  # a full disk, a closed terminal
        return _fail(f"the output could not be written: {error.strerror}", REFUSED)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)


def _abandon_output() -> None:
    """Point stdout at nothing, so that the interpreter does not stumble at exit over what could not be written."""
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())


def _run(arguments: argparse.Namespace) -> int:
    command: Command = arguments.command
    if command.kernel is not None:
        arguments.kernel = arguments.kernel or os.environ.get("PFKEY_KERNEL") or command.kernel
    module, _, function = command.run.partition(":")
    run: Callable[[argparse.Namespace], int] = getattr(importlib.import_module(f".{module}", __package__), function)
    code = run(arguments)
    sys.stdout.flush()  # a reader that has gone is to be noticed here
    return code


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="one JSON document on stdout")
    kernel = argparse.ArgumentParser(add_help=False)
    kernel.add_argument(
        "--kernel",
        metavar="TARGET",
        help="native; embedded:PROFILE, a kernel in this process; or unix:PATH, one that pfkey embedded serves",
    )
    parser = argparse.ArgumentParser(
        prog="pfkey",
        description="PF_KEYv2: see and keep the IPsec policies and SAs of a kernel.",
        epilog="PFKEY_KERNEL names the kernel where --kernel does not."
        "  Exit codes: 0 done, 1 the kernel refused something, a message is damaged or the output"
        " could not be written, 2 usage,"
        " 3 PF_KEY could not be opened.",
    )
    parser.add_argument("--version", action="version", version=f"pfkey {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        sub = commands.add_parser(
            command.name,
            parents=[common, kernel] if command.kernel else [common],
            help=command.summary,
            description=command.description,
            epilog=f"Without --kernel and PFKEY_KERNEL: {command.kernel}." if command.kernel else None,
        )
        command.arguments(sub)
        sub.set_defaults(command=command)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"at least 1, not {number}")
    return number


def _fail(error: object, code: int) -> int:
    print(f"pfkey: {error}", file=sys.stderr)
    return code


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does, so that it cleans up after itself."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set a handler; whoever called main() from another has its own ways
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
