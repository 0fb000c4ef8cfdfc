"""Masks that name many users: one file beside control, read once, checked, and as good as a set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.errors import CorruptVersion, UnfitMask
from state.features.mask import Mask
from state.features.masked_users import MaskedUsers
from state.registry.control import pin, roll_back, start
from state.registry.controls import Controls

WHO = {"actor": "ann", "reason": "because", "now_ms": 5}
ids = st.frozensets(st.integers(0, 2**64 - 1), max_size=20)


@pytest.fixture
def controls(tmp_path: Path) -> Controls:
    made = Controls(tmp_path)
    made.propose(start(**WHO))
    return made


@given(ids, ids, st.lists(st.integers(0, 2**64 - 1), max_size=9))
def test_masked_users_are_a_set(mine: frozenset[int], others: frozenset[int], asked: list[int]) -> None:
    asked = [*asked, *list(mine)[:3]]
    users, more = MaskedUsers.of(mine), MaskedUsers.of(others)
    assert users.has(np.array(asked, np.uint64)).tolist() == [one in mine for one in asked]
    assert [one in users for one in asked] == [one in mine for one in asked]
    assert (list(users | more), len(users)) == (sorted(mine | others), len(mine))
    assert (users == more) == (mine == others)
    assert MaskedUsers.from_bytes(users.to_bytes()) == users
    mask = Mask(3, ((1, 2, 3, 4),), ((5, 6),), users)
    assert Mask.from_bytes(mask.to_bytes()) == Mask.from_json(mask.to_json()) == mask


def test_a_million_users_leave_control_small_and_lie_in_one_file(controls: Controls) -> None:
    users = MaskedUsers(np.arange(1, 1_000_001, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15 >> 20))
    controls.change(lambda control: roll_back(control, 1, Mask(users=users), **WHO))
    controls.change(lambda control: pin(control, 2, **WHO))
    assert max(path.stat().st_size for path in (controls.path / "control").iterdir()) < 2000
    (file,) = (controls.path / "masks").iterdir()
    assert file.stat().st_size == 8_000_000
    other = Controls(controls.path)
    assert [one.mask.users == users for one in other.controls()] == [False, True, True]
    second, third = (one.masks[0].users for one in other.controls()[1:])
    assert second is third, "it is read once"


def test_a_control_that_outgrows_its_file_is_refused(controls: Controls) -> None:
    mask = Mask(times=tuple((at, at + 1) for at in range(0, 6000, 2)))
    with pytest.raises(UnfitMask, match=r"3000 masks.*100,000 are allowed.*unmask"):
        controls.change(lambda control: roll_back(control, 1, mask, **WHO))
    assert len(controls.controls()) == 1


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_damaged_users_stop_the_reader_of_control(controls: Controls, damage: str) -> None:
    controls.change(lambda control: roll_back(control, 1, Mask(users=MaskedUsers.of([1, 2])), **WHO))
    (file,) = (controls.path / "masks").iterdir()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(bytes([3]) + file.read_bytes()[1:])
    with pytest.raises(CorruptVersion, match=r"users of a mask.*restore it"):
        Controls(controls.path).control()
