"""What a kernel is known to reject, or to store as something else than what was asked: refused before it is sent."""

from __future__ import annotations

from .abi import Abi
from .constants import Action, Direction, Level, Mode, SAProtocol, UpperProtocol
from .errors import EncodeError, NotSupported
from .messages import Policy, Selector, Template

__all__ = ["check_policy", "unmatched_icmp"]

_STORED = (Action.IPSEC, Action.NONE, Action.DISCARD)
_PROTOCOLS = (SAProtocol.ESP, SAProtocol.AH, SAProtocol.IPCOMP)
_MODES = (Mode.TRANSPORT, Mode.TUNNEL)
_LEVELS = tuple(Level)


def check_policy(policy: Policy, abi: Abi) -> None:
    """Raise NotSupported or EncodeError when a kernel of `abi` would not store `policy` as it is.

    The text says what the kernel would do, and what to give instead.
    """
    _check_direction(policy, abi)
    if policy.action not in _STORED:
        raise NotSupported(f"{policy}: {_name(policy.action)} is for sockets; a policy is IPSEC, NONE or DISCARD")
    _check_icmp(policy, abi)
    _check_scope(policy, abi)
    if policy.lifetime_soft is not None and not abi.has_soft_policy_lifetime:
        raise NotSupported(f"{policy}: {abi} has no soft lifetimes of policies; give a hard one")
    if policy.priority and not abi.has_priority:
        raise NotSupported(f"{policy}: {abi} has no priorities; policies match in the order they were added")
    if policy.action != Action.IPSEC:
        return
    if not policy.templates:
        fate = "lets the packets through in clear" if abi.empty_ipsec_is_bypass else "answers EINVAL"
        raise NotSupported(f"{policy}: {abi} {fate} when an ipsec policy has no template; give one, or action NONE")
    if len(policy.templates) > abi.maximum_templates:
        raise NotSupported(f"{policy}: {len(policy.templates)} templates; {abi} takes {abi.maximum_templates}")
    for template in policy.templates:
        _check_template(policy, template, abi)


def _name(number: int) -> str:
    return number.name if isinstance(number, Action) else f"action {number}"


def _check_direction(policy: Policy, abi: Abi) -> None:
    if policy.direction not in abi.directions:
        names = ", ".join(direction.name for direction in abi.directions)
        name = policy.direction.name if isinstance(policy.direction, Direction) else policy.direction
        raise NotSupported(f"{abi} has no policies of direction {name}; it has {names}")


def _check_icmp(policy: Policy, abi: Abi) -> None:
    selector = policy.selector
    if selector.icmp_type != 0 or not abi.icmp_zero_is_any:
        return
    if selector.protocol in (UpperProtocol.ICMP, UpperProtocol.ICMPV6):
        raise NotSupported(f"{policy}: {abi} takes ICMP type 0 for any type; leave it out if that is what is meant")


def unmatched_icmp(selector: Selector, abi: Abi) -> str:
    """Why a kernel of `abi` stores the selector and finds it for no packet; empty when it does find it."""
    if abi.matches_icmp_types or selector.protocol != UpperProtocol.ICMP or not any(selector.wire_ports):
        return ""
    return (
        f"{selector}: {abi} looks at type and code of ICMPv6 only, so that this policy matches no packet; leave them"
        " out to have all of ICMP"
    )


def _check_scope(policy: Policy, abi: Abi) -> None:
    if abi.stores_scope or not any(policy.selector.scopes):
        return
    for side in (policy.selector.source, policy.selector.destination):
        if getattr(side, "scope_id", None):
            raise NotSupported(f"{policy}: {abi} forgets the scope of {side}, so that it would match on every link")


def _check_template(policy: Policy, template: Template, abi: Abi) -> None:
    if template.protocol not in _PROTOCOLS:
        what = f"not protocol {int(template.protocol)}"
        raise NotSupported(f"{_text(policy, template)}: a template is ESP, AH or IPComp, {what}")
    if template.mode not in _MODES:
        what = f"PF_KEY policies are transport or tunnel; {abi} drops the addresses of BEET"
        raise NotSupported(f"{_text(policy, template)}: {what}")
    if template.mode == Mode.TUNNEL and (template.source is None or template.destination is None):
        raise EncodeError(f"{_text(policy, template)}: a tunnel needs both end points")
    _check_level(policy, template, abi)


def _check_level(policy: Policy, template: Template, abi: Abi) -> None:
    level, reqid = template.level, template.reqid
    if level not in _LEVELS:
        raise NotSupported(f"{_text(policy, template)}: level {int(level)} is none of DEFAULT, USE, REQUIRE, UNIQUE")
    if level == Level.DEFAULT and abi.level_default == Level.DEFAULT:
        raise NotSupported(
            f"{_text(policy, template)}: level DEFAULT on {abi} is whatever a sysctl says, and by default leaves"
            " packets unprotected; give REQUIRE or UNIQUE"
        )
    if level == Level.UNIQUE and reqid > abi.maximum_reqid:
        raise NotSupported(
            f"{_text(policy, template)}: {abi} replaces a unique reqid over {abi.maximum_reqid} by one of its own, and"
            f" no SA of reqid {reqid} would match; use one from 1 to {abi.maximum_reqid}"
        )
    outbound_tunnel = template.mode == Mode.TUNNEL and policy.direction == Direction.OUT
    if level == Level.USE and outbound_tunnel and not abi.use_level_in_outbound_tunnel:
        raise NotSupported(f"{_text(policy, template)}: {abi} answers EINVAL to level USE in an outbound tunnel")


def _text(policy: Policy, template: Template) -> str:
    """Worked out only for an error: it costs more than the whole check."""
    return f"{template} in {policy.selector}"
