"""`pfkey dump`, and how the command shows SAs and policies: aligned lines or JSON values; keys only on request."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any

from .constants import Action, Direction, Mode, SAFlag, SAProtocol, SAState
from .guards import Kind, Tag, tag_of
from .messages import Lifetime, Policy, SecurityAssociation, Selector, Template
from .target import open_kernel

__all__ = ["aligned", "policy_lines", "policy_record", "run", "sa_lines", "sa_record", "selector_record"]

JSONValue = Any  # what json.dumps takes: dict, list, str, int, bool, None


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """One line per row, each column as wide as its widest cell, no blanks at the end of a line."""
    rows = [tuple(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


# Text.


def sa_lines(
    associations: Iterable[SecurityAssociation], *, show_keys: bool = False, now: float | None = None
) -> list[str]:
    """One line for each SA; `now` (seconds since 1970) is what ages are counted from."""
    moment = time.time() if now is None else now
    return aligned(_sa_row(sa, show_keys, moment) for sa in associations)


def policy_lines(policies: Iterable[Policy]) -> list[str]:
    """One line for each policy, in the order given."""
    return aligned(_policy_row(policy) for policy in policies)


def _sa_row(sa: SecurityAssociation, show_keys: bool, now: float) -> tuple[str, ...]:
    rest = [f"replay {sa.replay_window}"] if sa.replay_window else []
    if sa.nat_traversal:
        rest.append(f"natt {sa.nat_traversal.source_port}-{sa.nat_traversal.destination_port}")
    if sa.flags:
        rest.append("flags " + ",".join(_flag_names(sa.flags)))
    for word, limit in (("soft", sa.lifetime_soft), ("hard", sa.lifetime_hard)):
        if limit is not None and limit != Lifetime():
            rest.append(f"{word} {_limit_text(limit)}")
    if sa.lifetime_current is not None:
        rest.append(_use_text(sa.lifetime_current, now))
    if show_keys:
        rest.extend(f"{word} 0x{key.hex()}" for word, key in _keys(sa) if key)
    return (
        _name(SAProtocol, sa.protocol),
        f"{sa.source} -> {sa.destination}",
        f"spi {sa.spi:#010x}",
        f"reqid {sa.reqid}",
        _name(Mode, sa.mode),
        _name(SAState, sa.state),
        _algorithms_text(sa),
        "  ".join(rest),
    )


def _policy_row(policy: Policy) -> tuple[str, ...]:
    rest = [f"id {policy.id}"]
    tag = _tag(policy)
    if tag is not None:
        rest.append(f"tracked as {_name(Kind, tag.kind)} by {tag.owner:#09x}")
    for word, limit in (("soft", policy.lifetime_soft), ("hard", policy.lifetime_hard)):
        if limit is not None and limit != Lifetime() and not (tag is not None and word == "hard"):
            rest.append(f"{word} {_limit_text(limit)}")
    return (
        _name(Direction, policy.direction),
        _selector_text(policy.selector),
        _name(Action, policy.action),
        " ".join(map(str, policy.templates)) or "-",
        f"priority {policy.priority}",
        "  ".join(rest),
    )


def _tag(policy: Policy) -> Tag | None:
    """The mark of a tracker, which some kernels keep in the bytes of a hard lifetime and others in its addtime."""
    hard = policy.lifetime_hard
    return None if hard is None else tag_of(hard.bytes) or tag_of(hard.addtime)


def _selector_text(selector: Selector) -> str:
    return str(selector) if selector.protocol is not None else f"{selector} any"


def _algorithms_text(sa: SecurityAssociation) -> str:
    names = [str(name) for name in (sa.encryption, sa.authentication, sa.compression) if name is not None]
    return "+".join(names) or "-"


def _limit_text(limit: Lifetime) -> str:
    parts = [f"{limit.addtime}s"] if limit.addtime else []
    parts += [f"{limit.usetime}s-of-use"] if limit.usetime else []
    parts += [f"{limit.bytes}B"] if limit.bytes else []
    parts += [f"{limit.allocations}packets"] if limit.allocations else []
    return "/".join(parts)


def _use_text(current: Lifetime, now: float) -> str:
    age = f"age {max(0, int(now) - current.addtime)}s" if current.addtime else "age -"
    return f"{age}  used {current.bytes}B/{current.allocations}packets"


def _keys(sa: SecurityAssociation) -> tuple[tuple[str, bytes], ...]:
    return ("encryption-key", sa.encryption_key), ("authentication-key", sa.authentication_key)


# Values for JSON.


def sa_record(sa: SecurityAssociation, *, show_keys: bool = False) -> dict[str, JSONValue]:
    """What the kernel says of an SA.  SPIs are "0x..." strings; keys are hex, and null unless `show_keys`."""
    return {
        "protocol": _name(SAProtocol, sa.protocol),
        "source": str(sa.source),
        "destination": str(sa.destination),
        "spi": f"{sa.spi:#010x}",
        "reqid": sa.reqid,
        "mode": _name(Mode, sa.mode),
        "state": _name(SAState, sa.state),
        "encryption": sa.encryption,
        "authentication": sa.authentication,
        "compression": sa.compression,
        "encryption_key": sa.encryption_key.hex() if show_keys and sa.encryption_key else None,
        "authentication_key": sa.authentication_key.hex() if show_keys and sa.authentication_key else None,
        "encryption_key_bits": 8 * len(sa.encryption_key),
        "authentication_key_bits": 8 * len(sa.authentication_key),
        "replay_window": sa.replay_window,
        "flags": _flag_names(sa.flags),
        "nat_traversal": (
            {
                "source_port": sa.nat_traversal.source_port,
                "destination_port": sa.nat_traversal.destination_port,
                "type": sa.nat_traversal.type,
            }
            if sa.nat_traversal
            else None
        ),
        "lifetime_current": _lifetime_record(sa.lifetime_current),
        "lifetime_soft": _lifetime_record(sa.lifetime_soft),
        "lifetime_hard": _lifetime_record(sa.lifetime_hard),
        "sequence": sa.sequence,
    }


def policy_record(policy: Policy) -> dict[str, JSONValue]:
    """What the kernel says of a policy; `tag` is a tracker's mark in its hard lifetime, null when it has none."""
    tag = _tag(policy)
    return {
        "direction": _name(Direction, policy.direction),
        **selector_record(policy.selector),
        "action": _name(Action, policy.action),
        "templates": [_template_record(template) for template in policy.templates],
        "priority": policy.priority,
        "id": policy.id,
        "scope": int(policy.scope),
        "lifetime_current": _lifetime_record(policy.lifetime_current),
        "lifetime_soft": _lifetime_record(policy.lifetime_soft),
        "lifetime_hard": _lifetime_record(policy.lifetime_hard),
        "tag": None if tag is None else {"kind": _name(Kind, tag.kind), "owner": f"{tag.owner:#09x}"},
    }


def selector_record(selector: Selector) -> dict[str, JSONValue]:
    """Prefixes with their lengths; protocol, ports and ICMP type and code are null where any will do."""
    return {
        "source": str(selector.source),
        "destination": str(selector.destination),
        "protocol": selector.protocol,
        "source_port": selector.source_port or None,
        "destination_port": selector.destination_port or None,
        "icmp_type": selector.icmp_type,
        "icmp_code": selector.icmp_code,
    }


def _template_record(template: Template) -> dict[str, JSONValue]:
    return {
        "protocol": _name(SAProtocol, template.protocol),
        "mode": _name(Mode, template.mode),
        "source": None if template.source is None else str(template.source),
        "destination": None if template.destination is None else str(template.destination),
        "level": str(getattr(template.level, "name", template.level)).lower(),
        "reqid": template.reqid,
    }


def _lifetime_record(lifetime: Lifetime | None) -> dict[str, int] | None:
    if lifetime is None:
        return None
    return {
        "allocations": lifetime.allocations,
        "bytes": lifetime.bytes,
        "addtime": lifetime.addtime,
        "usetime": lifetime.usetime,
    }


# Names: lower case; a number that has no name stays a number.


def _name(kind: type[Enum], value: int) -> str:
    try:
        return str(kind(value).name).lower()
    except ValueError:
        return str(int(value))


def _flag_names(flags: int) -> list[str]:
    named = [flag for flag in SAFlag if flags & flag]
    rest = int(flags) & ~sum(named)
    return [str(flag.name).lower() for flag in named] + ([f"{rest:#x}"] if rest else [])


# The command.


def run(arguments: Namespace) -> int:
    """`pfkey dump`."""
    with open_kernel(arguments.kernel) as kernel:
        if arguments.policies:
            policies = kernel.dump_policies()
            _print(arguments, policy_lines(policies), [policy_record(policy) for policy in policies])
        else:
            associations = kernel.dump_sas()
            keys: bool = arguments.show_keys
            records = [sa_record(sa, show_keys=keys) for sa in associations]
            _print(arguments, sa_lines(associations, show_keys=keys), records)
    return 0


def _print(arguments: Namespace, lines: list[str], records: list[dict[str, JSONValue]]) -> None:
    if arguments.json:
        print(json.dumps(records, indent=2))
    elif lines:
        print("\n".join(lines))
    else:
        print(f"pfkey: {arguments.kernel} has no {'policies' if arguments.policies else 'SAs'}", file=sys.stderr)
