"""What uses a policy: SAs, traps and shunts as values, and the priority that a selector and a rank imply.

The priorities are those of strongSwan's kernel-pfkey plugin, so that policies of both mix as their users expect.
"""

from __future__ import annotations

from typing import Any

from .constants import Action, Rank, UpperProtocol
from .messages import Selector, Template

__all__ = ["Assignment", "implied_priority", "narrowness", "priority_of"]


class Assignment:
    """One use of a policy: "this SA (or trap, or shunt) uses it".

    `templates` are what the policy asks for while this assignment is on top.  `spi` tells assignments of a rekeying
    apart: one number, or one for each template (a CPI for IPComp); the kernel's policy does not hold it.  `action` is
    IPSEC, or NONE and DISCARD for shunts and guards; those may carry templates too, whose reqid orders them.  `rank`
    says what kind of user it is.  `priority` is the kernel's, None for the one that selector and rank imply.

    Assignments are values: equal ones are interchangeable, and a tracker counts them.
    """

    __slots__ = ("_content", "_content_abi", "_hash", "action", "priority", "rank", "spi", "templates")

    templates: tuple[Template, ...]
    spi: int | tuple[int, ...]
    action: Action
    rank: Rank
    priority: int | None
    _hash: int
    _content: Any
    """What a kernel stores of its templates, as tracker.py last worked it out; of a single one the template has it."""
    _content_abi: Any
    """For which system that was."""

    def __init__(
        self,
        *templates: Template,
        spi: int | tuple[int, ...] = 0,
        action: Action = Action.IPSEC,
        rank: Rank = Rank.REGULAR,
        priority: int | None = None,
    ) -> None:
        if not all(isinstance(template, Template) for template in templates):
            raise TypeError("an Assignment takes Template objects, then keyword arguments")
        if isinstance(spi, tuple) and len(spi) != len(templates):
            raise ValueError(f"{len(spi)} SPIs for {len(templates)} templates; give one number, or one for each")
        if action not in (Action.IPSEC, Action.NONE, Action.DISCARD):
            raise ValueError(f"a policy is IPSEC, NONE or DISCARD; {Action(action).name} is for sockets only")
        if priority is not None and not 0 <= priority <= 0xFFFFFFFF:
            raise ValueError(f"a priority is a number from 0 to 4294967295, not {priority}")
        give = object.__setattr__
        give(self, "templates", templates)
        give(self, "spi", spi)
        give(self, "action", Action(action))
        give(self, "rank", Rank(rank))
        give(self, "priority", priority)
        give(self, "_content", None)
        give(self, "_content_abi", None)
        give(self, "_hash", hash((templates, spi, action, rank, priority)))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"an Assignment does not change; make another one instead of setting {name}")

    __delattr__ = __setattr__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Assignment):
            return NotImplemented
        return self._hash == other._hash and self._fields == other._fields

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        parts = [*map(str, self.templates)]
        if self.spi:
            spis = self.spi if isinstance(self.spi, tuple) else (self.spi,)
            parts.append("spi=" + ",".join(f"{spi:#x}" for spi in spis))
        if self.action is not Action.IPSEC:
            parts.append(f"action={self.action.name}")
        if self.rank is not Rank.REGULAR:
            parts.append(f"rank={self.rank.name}")
        if self.priority is not None:
            parts.append(f"priority={self.priority}")
        return f"Assignment({', '.join(parts)})"

    def __reduce__(self) -> tuple[object, ...]:
        return (_assignment, self._fields)

    @property
    def _fields(self) -> tuple[tuple[Template, ...], int | tuple[int, ...], Action, Rank, int | None]:
        return (self.templates, self.spi, self.action, self.rank, self.priority)

    @property
    def reqid(self) -> int:
        """The reqid by which it is ordered: the first that a template has, else 0."""
        return next((template.reqid for template in self.templates if template.reqid), 0)

    def reversed(self) -> Assignment:
        """The same for the other direction: the end points of every template change sides."""
        return _assignment(tuple(template.reversed() for template in self.templates), *self._fields[1:])


def _assignment(
    templates: tuple[Template, ...],
    spi: int | tuple[int, ...],
    action: Action,
    rank: Rank,
    priority: int | None,
) -> Assignment:
    return Assignment(*templates, spi=spi, action=action, rank=rank, priority=priority)


# Priorities: a class of 200,000 numbers for each rank, and within it the narrower selector in front.
_BASE = {Rank.PASS: 200000, Rank.REGULAR: 400000, Rank.TRAP: 400000, Rank.FALLBACK: 600000}
_PREFIX_BIT, _PROTOCOL, _PORT = 512, 256, 64
# By the rank's value: the hash of an enum's member is slow.
_FIRST = {rank.value: base - (rank is not Rank.TRAP) for rank, base in _BASE.items()}
_SHARED: dict[int, int] = {}
"""The numbers that came up: many policies hold the same one, not equal ones.  There are some thousands at most."""


def priority_of(selector: Selector, rank: Rank) -> int:
    """The priority that a selector's narrowness and a rank imply; smaller is stronger.

    ICMP type and code count as ports.  A trap stands one behind what it stands in for.
    """
    return implied_priority(rank, narrowness(selector))


def implied_priority(rank: Rank, narrow: int) -> int:
    """The same for a selector whose `narrowness` is known."""
    number = _FIRST[rank._value_] - narrow
    return _SHARED.setdefault(number, number)


def narrowness(selector: Selector) -> int:
    """By how much a selector is in front of the widest of its rank."""
    _, _, source, _, destination, protocol, *ports = selector.identity[:8]
    narrow = _PREFIX_BIT * (source + destination) + _PORT * (len(ports) - ports.count(0))
    narrow += _PROTOCOL if protocol != UpperProtocol.ANY else 0
    return _SHARED.setdefault(narrow, narrow)
