"""Which way of replacing a policy leaks or drops on which kernel: prints docs/replacing-a-policy.md.

Every way is played on every embedded kernel, in every circumstance, and a packet is tried at each step of the SPD.
After a change: `python docs/make_replacement_table.py >docs/replacing-a-policy.md`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from enum import Enum

from pfkey import (
    Action,
    Direction,
    EmbeddedKernel,
    Kernel,
    KernelError,
    MessageType,
    Policy,
    Selector,
    Template,
    connect,
)
from pfkey.embedded import profiles
from pfkey.typed import policy_message

__all__ = ["CIRCUMSTANCES", "MEASURED", "PROFILES", "SHAPES", "TECHNIQUES", "Fate", "document", "play"]

PROFILES: tuple[str, ...] = tuple(profiles._PROFILES)
"""Whatever EmbeddedKernel takes."""

OUT = Direction.OUT
ADD, UPDATE, DELETE = MessageType.SPDADD, MessageType.SPDUPDATE, MessageType.SPDDELETE
OLD, NEW = (Template.tunnel("192.0.2.1", "198.51.100.1", reqid=reqid) for reqid in (1, 2))
REJECTED = Template(99)
"""No kernel knows protocol 99: the request is refused where its templates are read."""
WEAK, BETWEEN, STRONG, GUARD = 1000, 900, 800, 2000


@dataclass(frozen=True)
class Shape:
    """A selector, another one for the same packets (None where there is none), and one that is one bit wider."""

    name: str
    selector: Selector
    wider: Selector
    alias: Selector | None = None
    needs_scope: bool = False
    """The alias is told from the selector by a scope: of use where the kernel stores one."""


SHAPES = (
    Shape(
        "prefixes",
        Selector("10.1.0.0/16", "10.2.0.0/16"),
        Selector("10.0.0.0/15", "10.2.0.0/16"),
        Selector("10.1.0.1/16", "10.2.0.0/16"),
    ),
    Shape("IPv4 hosts", Selector("10.1.0.2", "10.2.0.1"), Selector("10.1.0.2/31", "10.2.0.1")),
    Shape(
        "IPv6 hosts",
        Selector("2001:db8::2", "2001:db8::1:1"),
        Selector("2001:db8::2/127", "2001:db8::1:1"),
        Selector("2001:db8::2%1", "2001:db8::1:1"),
        needs_scope=True,
    ),
)


class Fate(Enum):
    """What becomes of the packets, at the worst of all steps."""

    FINE = "-"
    LEAKS = "**leaks**"
    DROPS = "drops"
    BLOCKED = "drops for good"
    IMPOSSIBLE = ""

    OLD_STANDS = "the old one stands"
    IN_CLEAR = "**in clear**"
    DROPPED = "dropped"


class Playing:
    """One embedded kernel with one policy, and what a way does to it."""

    def __init__(self, profile: str, shape: Shape, circumstance: Circumstance) -> None:
        self.embedded = EmbeddedKernel(profile)
        self.kernel: Kernel = connect(self.embedded.connect())
        self.shape = shape
        self.prioritised = self.embedded.abi.has_priority
        self.old = self.policy(shape.selector, OLD, WEAK)
        rejected = circumstance.rejected
        priority = STRONG if circumstance.stronger else WEAK
        self.new = self.policy(shape.selector, REJECTED if rejected else NEW, priority)
        self.worse = max(WEAK, priority)

    def policy(self, selector: Selector, template: Template | None, priority: int) -> Policy:
        """An IPSEC policy; without a template a DISCARD."""
        action, templates = (Action.DISCARD, ()) if template is None else (Action.IPSEC, (template,))
        return Policy(OUT, selector, action, templates, priority=priority if self.prioritised else 0)

    def send(self, kind: MessageType, policy: Policy) -> None:
        """As it is: what the package would refuse is for the kernel to refuse here."""
        self.kernel.request(policy_message(kind, policy, self.embedded.abi))

    def alias(self, of: Policy) -> Policy:
        """A clone for the same packets, no stronger than either policy."""
        assert self.shape.alias is not None
        return self.policy(self.shape.alias, of.templates[0], self.worse)

    def guard(self) -> Policy:
        """A DISCARD, one bit wider and weaker."""
        return self.policy(self.shape.wider, None, GUARD)

    def grace_period(self) -> None:
        """Until no packet is on its way that started before; nothing where the model has one CPU."""
        getattr(self.embedded, "grace_period", lambda: None)()


# The ways.  Each stops at the first message that is refused, as careful programs do.


def delete_add(playing: Playing) -> None:
    playing.send(DELETE, playing.old)
    playing.send(ADD, playing.new)


def update(playing: Playing) -> None:
    playing.send(UPDATE, playing.new)


def _behind(guard: Callable[[Playing], Policy], change: Callable[[Playing], None], *, wait: bool = True) -> Play:
    def play(playing: Playing) -> None:
        standing = guard(playing)
        playing.send(ADD, standing)
        change(playing)
        if wait:
            playing.grace_period()
        playing.send(DELETE, standing)

    return play


def _alias_of_old(playing: Playing) -> Policy:
    return playing.alias(playing.old)


def _alias_of_new(playing: Playing) -> Policy:
    return playing.alias(playing.new)


Play = Callable[[Playing], None]


@dataclass(frozen=True)
class Technique:
    """A way to replace a policy."""

    text: str
    play: Play
    needs_alias: bool = False
    before: Callable[[Playing], Policy] | None = None
    """What stands all the time."""


TECHNIQUES = {
    "delete-add": Technique("SPDDELETE, then SPDADD", delete_add),
    "update": Technique("SPDUPDATE", update),
    "alias-delete-add": Technique(
        "alias of the old, SPDDELETE + SPDADD, alias deleted", _behind(_alias_of_old, delete_add), needs_alias=True
    ),
    "alias-old": Technique("alias of the old, SPDUPDATE, alias deleted", _behind(_alias_of_old, update), True),
    "alias-new": Technique("**alias of the new, SPDUPDATE, alias deleted**", _behind(_alias_of_new, update), True),
    "alias-hasty": Technique(
        "alias of the new, SPDUPDATE, alias deleted at once",
        _behind(_alias_of_new, update, wait=False),
        needs_alias=True,
    ),
    "guard": Technique("wider DISCARD, SPDUPDATE, DISCARD deleted", _behind(Playing.guard, update)),
    "permanent": Technique("SPDUPDATE in front of a permanent wider DISCARD", update, before=Playing.guard),
}


@dataclass(frozen=True)
class Circumstance:
    """What else stands in the SPD, and what kind of policy the new one is."""

    text: str
    alone: bool = False
    stronger: bool = False
    rejected: bool = False


CIRCUMSTANCES = {
    "among others": Circumstance("among others"),
    "alone": Circumstance("the only one of its direction", alone=True),
    "stronger": Circumstance("stronger, past another one", stronger=True),
    "rejected": Circumstance("the new one is rejected", rejected=True),
}


def play(profile: str, shape: Shape, technique: Technique, circumstance: Circumstance) -> Fate:
    """Replace the policy once, and say what packets met."""
    playing = Playing(profile, shape, circumstance)
    abi = playing.embedded.abi
    if technique.needs_alias and (shape.alias is None or (shape.needs_scope and not abi.stores_scope)):
        return Fate.IMPOSSIBLE
    if circumstance.stronger and not playing.prioritised:
        return Fate.IMPOSSIBLE
    if not circumstance.alone:
        unrelated = Selector("172.16.0.0/12", "172.16.0.0/12")
        playing.send(ADD, playing.policy(unrelated, None, BETWEEN))
    if circumstance.stronger:
        port = Selector(shape.selector.source, shape.selector.destination, protocol="tcp", destination_port=7)
        playing.send(ADD, playing.policy(port, None, BETWEEN))
    playing.send(ADD, playing.old)
    if technique.before is not None:
        playing.send(ADD, technique.before(playing))
    refusal = suppress(KernelError) if circumstance.rejected else nullcontext()
    with playing.embedded.probe(OUT, shape.selector) as probe, refusal:
        technique.play(playing)
    meets = playing.embedded.lookup(OUT, shape.selector.source.ip, shape.selector.destination.ip)
    if circumstance.rejected:
        return _afterwards(meets, playing)
    if any(step.policy is None for step in probe.log):
        return Fate.LEAKS
    if meets is None or meets.templates != playing.new.templates:
        return Fate.BLOCKED
    dropped = any(step.policy is not None and step.policy.action == Action.DISCARD for step in probe.log)
    return Fate.DROPS if dropped else Fate.FINE


def _afterwards(meets: Policy | None, playing: Playing) -> Fate:
    if meets is None:
        return Fate.IN_CLEAR
    return Fate.OLD_STANDS if meets.templates == playing.old.templates else Fate.DROPPED


# What was seen on real kernels: (kernel, profile, technique, circumstance, packets in clear).

MEASURED = (
    ("FreeBSD 12.1", "freebsd-12", "delete-add", "among others", 1732),
    ("FreeBSD 12.1", "freebsd-12", "update", "among others", 207),
    ("FreeBSD 12.1", "freebsd-12", "alias-delete-add", "among others", 0),
    ("FreeBSD 12.1", "freebsd-12", "alias-old", "among others", 0),
    ("FreeBSD 12.1", "freebsd-12", "alias-new", "among others", 0),
    ("FreeBSD 12.1", "freebsd-12", "guard", "among others", 0),
    ("FreeBSD 12.1", "freebsd-12", "update", "rejected", 10),
    ("FreeBSD 12.1", "freebsd-12", "alias-new", "rejected", 0),
    ("FreeBSD 11-CURRENT", "freebsd-11", "delete-add", "among others", 3993),
    ("FreeBSD 11-CURRENT", "freebsd-11", "update", "among others", 272),
    ("FreeBSD 11-CURRENT", "freebsd-11", "alias-delete-add", "among others", 0),
    ("FreeBSD 11-CURRENT", "freebsd-11", "alias-old", "among others", 0),
    ("FreeBSD 11-CURRENT", "freebsd-11", "alias-new", "among others", 0),
    ("FreeBSD 11-CURRENT", "freebsd-11", "guard", "among others", 0),
    ("FreeBSD 11-CURRENT", "freebsd-11", "update", "rejected", 10),
    ("FreeBSD 11-CURRENT", "freebsd-11", "alias-new", "rejected", 0),
    ("FreeBSD 12.1 with the replacement of 14", "freebsd-14", "delete-add", "among others", 632),
    ("FreeBSD 12.1 with the replacement of 14", "freebsd-14", "update", "among others", 0),
    ("FreeBSD 12.1 with the replacement of 14", "freebsd-14", "update", "alone", 63),
    ("FreeBSD 12.1 with the replacement of 14", "freebsd-14", "guard", "among others", 0),
    ("FreeBSD 12.1 with the replacement of 14", "freebsd-14", "update", "rejected", 10),
    ("Linux 6.1", "linux", "delete-add", "among others", 589699),
    ("Linux 6.1", "linux", "update", "among others", 0),
    ("Linux 6.18, two CPUs", "linux-smp", "update", "among others", 0),
    ("Linux 6.18, two CPUs", "linux-smp", "update", "stronger", 2643),
    ("Linux 6.18, two CPUs", "linux-smp", "alias-hasty", "stronger", 6),
    ("Linux 6.18, two CPUs", "linux-smp", "alias-new", "stronger", 0),
)


# How long an alias was kept after the update, packets tried and packets in clear in 10,000 changes on Linux 6.18.
WAITS = (
    ("not at all", 3701400, 6),
    ("1 ms", 11594700, 0),
    ("3 ms", 11775900, 0),
    ("5 ms", 20910000, 0),
    ("10 ms", 36959100, 0),
    ("membarrier(MEMBARRIER_CMD_GLOBAL), 4 to 36 ms", 57186200, 0),
    ("closing a packet socket, 4 to 32 ms", 69384600, 0),
    ("(no alias)", 4572200, 2643),
)

# The document.

HEAD = """\
# Replacing a policy

Which way of replacing a policy in the kernel leaves a moment in which packets leave in clear, or are dropped, and what
stands when the kernel rejects the new one. The tables are computed by `docs/make_replacement_table.py`: each way is
played on each embedded kernel, and a packet of the policy is tried at every step of the SPD. Inbound it is the same:
plaintext that should be refused is then accepted.

* An **alias** is a policy for the same packets under another selector: a host bit that the prefix ignores is set
  (10.1.0.1/16 for 10.1.0.0/16); between IPv6 hosts it is a scope, where the kernel stores one. IPv4 host pairs have
  none. It is as strong as the weaker of the two policies, or comes behind them.
* A **wider DISCARD** is one bit wider than the policy and weaker; while it stands it drops the packets of the
  neighbours too.
* A **grace period** is the time after which no packet is on its way that looked at the SPD before. It matters on Linux
  with several CPUs.
* "-": every packet is protected by the old policy or the new one. "drops for good": also afterwards, the new policy
  standing behind the DISCARD. Nothing in a cell: there is no such alias, or the kernel has no priorities.
"""

WAIT = """\
A lookup walks a chain of policies without a lock. When an update makes a policy stronger it is linked in front of
others, and a lookup that is already behind that place finds neither the new one nor, a moment later, the old one. The
alias catches it, if it stands until no such lookup is under way: a grace period of RCU. Any program can wait for one by
membarrier(2). A few milliseconds are more than a lookup takes, but no promise where a CPU may be taken away in the
middle of one (a virtual machine, a preemptible kernel). On Linux 6.18 with two CPUs, 10,000 times from priority 20 to
10 past 200 policies (`python benchmarks/leak_race.py --waits`):"""

CLEAR_AT = "| kernel | way | circumstance | packets in clear | the model says |"


def document() -> Iterator[str]:
    """Its lines."""
    yield from HEAD.splitlines()
    tables: dict[tuple[str, ...], list[str]] = {}
    for profile in PROFILES:
        tables.setdefault(tuple(_table(profile)), []).append(profile)
    for lines, names in tables.items():
        yield ""
        yield f"## {', '.join(names)}"
        yield ""
        yield from lines
    yield ""
    yield from _measured()
    yield ""
    yield from _waits()


def _table(profile: str) -> Iterator[str]:
    yield f"| way | for | {' | '.join(one.text for one in CIRCUMSTANCES.values())} |"
    yield "|---" * (2 + len(CIRCUMSTANCES)) + "|"
    for technique in TECHNIQUES.values():
        rows: dict[tuple[Fate, ...], list[str]] = {}
        for shape in SHAPES:
            fates = tuple(play(profile, shape, technique, one) for one in CIRCUMSTANCES.values())
            rows.setdefault(fates, []).append(shape.name)
        for fates, shapes in rows.items():
            if set(fates) != {Fate.IMPOSSIBLE}:
                whom = "all" if len(shapes) == len(SHAPES) else ", ".join(shapes)
                yield f"| {technique.text} | {whom} | {' | '.join(fate.value for fate in fates)} |"


def _measured() -> Iterator[str]:
    yield "## Seen on real kernels"
    yield ""
    yield "A sender that never stops, thousands of replacements of a policy between prefixes, every packet counted that"
    yield "arrived in clear; for the rejected ones, ten packets sent afterwards. Figures are of one run; what counts is"
    yield "which of them are 0."
    yield ""
    yield CLEAR_AT
    yield "|---|---|---|---|---|"
    for kernel, profile, technique, circumstance, packets in MEASURED:
        if profile in PROFILES:
            fate = play(profile, SHAPES[0], TECHNIQUES[technique], CIRCUMSTANCES[circumstance])
            way, where = TECHNIQUES[technique].text.strip("*"), CIRCUMSTANCES[circumstance].text
            yield f"| {kernel} | {way} | {where} | {packets:,} | {fate.value} |"


def _waits() -> Iterator[str]:
    yield "## How long an alias must stand on Linux"
    yield ""
    yield from WAIT.splitlines()
    yield ""
    yield "| the alias stands on for | packets tried | packets in clear |"
    yield "|---|---|---|"
    for wait, tried, clear in WAITS:
        yield f"| {wait} | {tried:,} | {clear:,} |"


def main() -> int:
    """Print it."""
    for line in document():
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
