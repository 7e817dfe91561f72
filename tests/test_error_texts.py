"""What the errors of a tracker's calls tell the person who reads the log."""

from __future__ import annotations

import pytest
from rig import ESP, MOVED, OUT, Rig
from scenarios import ADD, DEL, SITE, UPD

from pfkey import KernelError, MessageType, ReplyTimeout


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (ADD, "(EINVAL); the kernel holds nothing"),
        (UPD, "(EINVAL); the kernel holds ipsec esp/tunnel/192.0.2.1-198.51.100.1/unique:1, priority 383615"),
        (DEL, "(EINVAL); the kernel holds ipsec esp/tunnel/192.0.2.1-198.51.100.1/unique:1, priority 383615"),
    ],
    ids=["add", "update", "delete"],
)
def test_an_error_says_what_the_kernel_holds_now(kind: MessageType, said: str) -> None:
    for profile in ("linux", "freebsd-13"):
        rig = Rig(profile)
        if kind is not ADD:
            rig.tracker.add(OUT, SITE, ESP)
        rig.embedded.fail_next(kind, "EINVAL")
        with pytest.raises(KernelError) as raised:
            if kind is DEL:
                rig.tracker.remove(OUT, SITE, ESP)
            else:
                rig.tracker.add(OUT, SITE, ESP if kind is ADD else MOVED)
        assert str(raised.value).endswith(said)


def test_an_error_of_unknown_outcome_says_whether_it_was_read_since() -> None:
    known = {"linux": "the next call reads it", "freebsd-13": "; it was read since: the kernel holds ipsec"}
    for profile, said in known.items():
        rig = Rig(profile)
        rig.tracker.add(OUT, SITE, ESP)
        rig.embedded.fail_next(UPD, when="lost")
        with pytest.raises(ReplyTimeout) as raised:
            rig.tracker.add(OUT, SITE, MOVED)
        assert said in str(raised.value)
