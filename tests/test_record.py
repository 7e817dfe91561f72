"""The record as Python describes it is the record that the compiler laid out."""

from __future__ import annotations

import pytest

from pfkey import _record as layout
from pfkey._core import ffi, lib
from pfkey._rare import RARE

GROUPS = [value for value in vars(layout).values() if isinstance(value, layout.Group)]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_offsets(group: layout.Group) -> None:
    assert ffi.offsetof("struct pfk_record", group.name) == group.offset


def test_the_groups_fill_the_record() -> None:
    repeated = {"lifetime": 3, "address": 2, "key": 2, "supported": 2, "nat_t_port": 2}
    end = 0
    for group in sorted(GROUPS, key=lambda group: group.offset):
        assert group.offset == end, group.name
        end += group.size * repeated.get(group.name, 1)
    assert end == layout.SIZE == ffi.sizeof("struct pfk_record")


@pytest.mark.parametrize("name", ["lifetime", "address", "key", "supported", "nat_t_port"])
def test_sizes_of_what_occurs_several_times(name: str) -> None:
    group = next(group for group in GROUPS if group.name == name)
    kind = dict(ffi.typeof("struct pfk_record").fields)[name].type
    assert ffi.sizeof(kind) == group.size * kind.length


def test_slots() -> None:
    for kind, slot in layout.SLOTS.items():
        assert getattr(lib, f"PFK_{kind.name}") == slot.number
    assert len(layout.SLOTS) == lib.PFK_CHECK_ADDRESS - 1
    assert {form.slot for form in RARE.values()} == set(range(lib.PFK_CHECK_ADDRESS, lib.PFK_SLOTS))
    assert RARE.keys() & layout.SLOTS.keys() == set()
    assert lib.PFK_MAX_EXTENSIONS == layout.MAXIMUM_EXTENSIONS


def test_every_reason_has_words() -> None:
    texts = {ffi.string(lib.pfk_reason(number)) for number in range(lib.PFK_REASONS)}
    assert len(texts) == lib.PFK_REASONS
    assert ffi.string(lib.pfk_reason(lib.PFK_REASONS)) == b"unknown reason"
