"""`pfkey demo`: the policies of one tunnel through its life, every message counted, beside other ways of doing it."""

from __future__ import annotations

import json
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .constants import Rank
from .show import selector_record
from .stage import FIRST_SPI, HERE, MOVED, PEER, SITE, Stage, Tunnel

__all__ = ["run"]

COLUMNS = {
    "tracker": "pfkey",
    "always_update": "always update (strongSwan up to 5.6.3)",
    "delete_then_add": "delete + add (scripts around setkey)",
}


def tell_story(stage: Stage, rekeyings: int) -> None:
    """A tunnel's life, call by call."""
    trap = Tunnel("trap", PEER, rank=Rank.TRAP)
    spi = FIRST_SPI

    def next_tunnel(peer: str) -> Tunnel:
        nonlocal spi
        number = (spi - FIRST_SPI) // 2 + 1
        spi += 2
        return Tunnel(f"SA {number}", peer, spi - 2)

    stage.chapter("trap", "A trap: there is no SA yet; traffic is to wait for one, not to leave in clear")
    stage.add(trap)

    stage.chapter("first SA", "The first pair of SAs: the priority moves from the trap's to the SA's")
    now = next_tunnel(PEER)
    stage.add_sas(now)
    stage.add(now)

    for _ in range(rekeyings):
        stage.chapter("rekeying", "A rekeying: new SAs come, the old ones go, and the policy stays what it is")
        old, now = now, next_tunnel(PEER)
        stage.add_sas(now)
        stage.add(now)
        stage.remove(old)
        stage.delete_sas(old)

    stage.chapter("moved peer", f"The peer moves to {MOVED}: the tunnel has another end point")
    old, now = now, next_tunnel(MOVED)
    stage.add_sas(now)
    stage.replace(old, now)
    stage.delete_sas(old)

    stage.chapter("moved trap", "The trap beneath the SA moves too: it is not on top, so the kernel need not know")
    old_trap, trap = trap, Tunnel("trap", MOVED, rank=Rank.TRAP)
    stage.replace(old_trap, trap)

    stage.chapter("reauthentication", "A reauthentication: all SAs go before new ones come, the trap holds the place")
    stage.remove(now)
    stage.delete_sas(now)
    now = next_tunnel(MOVED)
    stage.add_sas(now)
    stage.add(now)

    stage.chapter("last SA gone", "The last pair of SAs goes: the trap stays")
    stage.remove(now)
    stage.delete_sas(now)

    stage.chapter("trap removed", "The tunnel is no longer wanted: the trap goes, and the policies with it")
    stage.remove(trap)


def checks(stage: Stage) -> list[tuple[str, bool]]:
    """What must be true of every run, in words, and whether it was."""
    directions = stage.abi.directions
    rekeyings = [chapter for chapter in stage.chapters if chapter.name == "rekeying"]
    moves = [chapter for chapter in stage.chapters if chapter.name == "moved peer"]
    ways = ", ".join(way.name.lower() for way in directions)
    found = [
        ("a rekeying cost 0 SPD messages", not any(chapter.sent() for chapter in rekeyings)),
        (
            f"the changed end point cost exactly 1 SPDUPDATE for each direction ({ways})",
            all(chapter.sent(way) == ["SPDUPDATE"] for chapter in moves for way in directions),
        ),
        ("the demo's policies are gone from the kernel", not stage.occupied()),
        ("the demo's SAs are gone from the kernel", not stage.installed),
    ]
    if stage.probed:
        found.append(
            (
                "the control, delete + add, was seen to leave steps without a policy",
                stage.habits["delete_then_add"].watch.bare > 0,
            )
        )
    return found


def summary(stage: Stage) -> Iterator[str]:
    """The counts at the end, in words."""
    counts = stage.counts()
    bare, probed = counts["steps_without_policy"], stage.steps_probed()
    yield f"{'':<42}{'messages':>10}{'steps without a policy':>25}"
    for name, title in COLUMNS.items():
        steps = "-" if bare is None or probed is None else f"{bare[name]} of {probed[name]}"
        yield f"{title:<42}{counts['messages'][name]:>10}{steps:>25}"
    directions = len(stage.abi.directions)
    yield f"Each further rekeying (--rekeyings N): 0, {directions} and {2 * directions} messages."
    if not stage.probed:
        yield "No probe is possible here: only a kernel in this process can be stopped between two of its own steps."
    elif stage.abi.update_unlinks_first or stage.abi.sole_update_shows_none:
        yield _window_text(stage)


def _window_text(stage: Stage) -> str:
    if stage.abi.update_unlinks_first:
        why = "removes the old policy before it installs the new one, so that each SPDUPDATE opens a window"
    else:
        why = "shows a packet no policy for a moment when an SPDUPDATE replaces the only one of its direction"
    how = "pfkey sends fewer of them, and under a guard: a clone of the new policy, for as long as it takes."
    return f"{stage.abi} {why}.\n{how}"


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C waits until the clean-up is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run(arguments: Namespace) -> int:
    """`pfkey demo`."""
    stage = Stage(arguments.kernel, _silence if arguments.json else print)
    try:
        return _play(stage, arguments)
    finally:
        with _undisturbed():
            stage.close()


_HEADER = f"""\
The policies of one tunnel on {{target}} ({{system}}): {SITE},
ESP in tunnel mode, {HERE} - {PEER}.  After each call: the message sent for its policy; how many
messages there were so far by pfkey, by always updating (upd), by delete + add (d+a); at how many
steps so far a probe found no policy (bare); the policy that was sent.

{"":<29}{"sent":<10}{"pfkey":>6}{"upd":>6}{"d+a":>6}{"bare":>6}"""


def _silence(line: str) -> None:
    """With --json nothing is told before the end."""


def _play(stage: Stage, arguments: Namespace) -> int:
    occupied = stage.occupied()
    if occupied:
        print(
            "pfkey: the kernel already has policies for the addresses of the demo; they are left alone:",
            file=sys.stderr,
        )
        for policy in occupied:
            print(f"  {policy}", file=sys.stderr)
        return 1
    stage.tell(_HEADER.format(target=arguments.kernel, system=stage.abi))
    try:
        tell_story(stage, arguments.rekeyings)
    finally:
        with _undisturbed():
            stage.clean_up()
    results = checks(stage)
    if arguments.json:
        print(json.dumps(_document(stage, results), indent=2))
    else:
        print("", *summary(stage), "", sep="\n")
        for what, held in results:
            print(f"{'ok' if held else 'FAILED':<8}{what}")
    return 0 if all(held for _, held in results) else 1


def _document(stage: Stage, results: list[tuple[str, bool]]) -> dict[str, Any]:
    return {
        "kernel": stage.target,
        "system": str(stage.abi),
        "selector": selector_record(SITE),
        "directions": [way.name.lower() for way in stage.abi.directions],
        "chapters": [
            {"name": chapter.name, "title": chapter.title, "calls": chapter.calls} for chapter in stage.chapters
        ],
        "totals": {
            **stage.counts(),
            "steps_probed": stage.steps_probed(),
        },
        "without_sas": stage.without_sas or None,
        "checks": [{"what": what, "held": held} for what, held in results],
    }
