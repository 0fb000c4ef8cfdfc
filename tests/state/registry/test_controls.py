"""Users of masks and erasures: each in one file that control names, read once and checked; no later generation loses them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.errors import CorruptVersion, UnfitMask
from state.features.mask import Mask
from state.features.masked_users import MaskedUsers
from state.registry.control import Control, erase, follow, pin, roll_back, start, unmask
from state.registry.controls import Controls

WHO: dict[str, Any] = {"actor": "ann", "reason": "because", "now_ms": 5}
USER = 0x1122334455667788
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


def masking(control: Control) -> Control:
    return roll_back(control, 1, Mask(users=MaskedUsers.of([USER])), **WHO)


def erasing(control: Control) -> Control:
    return erase(control, MaskedUsers.of([USER]), [(42, 0, 100)], **WHO)


@pytest.mark.parametrize(("change", "noun"), [(masking, "the users of a mask"), (erasing, "an erasure")])
def test_control_whose_users_are_damaged_or_missing_is_refused(
    controls: Controls, change: Callable[[Control], Control], noun: str
) -> None:
    controls.change(change)
    (file,) = (controls.path / "masks").iterdir()
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    with pytest.raises(CorruptVersion, match=f"{noun}, fails its digest.*restore it"):
        Controls(controls.path).control()
    file.unlink()
    with pytest.raises(CorruptVersion, match=f"{noun}, is missing"):
        Controls(controls.path).control()


def test_every_later_generation_has_the_erasure_whatever_it_decides(controls: Controls) -> None:
    controls.change(erasing)
    controls.change(lambda control: roll_back(control, 3, Mask(times=((0, 9),)), **WHO))
    controls.change(lambda control: erase(control, MaskedUsers.of([USER, 9]), [(42, 0, 200)], **WHO))
    controls.change(lambda control: unmask(control, [1], **WHO))
    controls.change(lambda control: follow(control, **WHO))
    with pytest.raises(UnfitMask, match="there is no mask 2"):
        controls.change(lambda control: unmask(control, [2], **WHO))
    newest = Controls(controls.path).control()
    assert newest is not None and newest.action == "follow"
    assert [(one.id, one.generation, len(one.users)) for one in newest.erased] == [(1, 2, 1), (2, 4, 2)]
    assert newest.mask.erased == newest.mask_at(0).erased == newest.erased
    assert (newest.mask.times, newest.mask_generation) == ((), 5)
    assert [one.erased.last for one in Controls(controls.path).controls()] == [0, 1, 1, 2, 2, 2]


def test_many_erasures_leave_controls_file_as_small_as_one(controls: Controls) -> None:
    controls.change(erasing)
    sizes = []
    for number in range(1, 21):
        control = controls.control()
        assert control is not None
        made = controls.propose(erase(control, MaskedUsers.of([number]), [(42, 0, 100)], **WHO))
        sizes.append((controls.path / "control" / f"{made.generation:08d}.json").stat().st_size)
    assert max(sizes) - min(sizes) < 8
    assert Controls(controls.path).control() == made


def test_the_pseudonym_is_in_the_erasures_file_alone(controls: Controls) -> None:
    controls.change(erasing)
    forms = [USER.to_bytes(8, "little"), USER.to_bytes(8, "big"), b"%016x" % USER, b"%d" % USER]
    having = [
        path.suffix
        for path in controls.path.rglob("*")
        if path.is_file() and any(f in path.read_bytes() for f in forms)
    ]
    assert having == [".erased"]


def test_the_newest_generation_is_found_without_reading_the_others(
    controls: Controls, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2, 40):
        controls.propose(pin(controls.control() or start(**WHO), number, **WHO))
    read: list[str] = []
    read_bytes = Path.read_bytes

    def counted(path: Path) -> bytes:
        read.append(path.name)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    other = Controls(controls.path)
    assert (other.control() or start(**WHO)).generation == 39
    assert read == ["00000039.json"]
    # An epoch is found by halves, and what ended it likewise.
    controls.propose(roll_back(controls.control() or start(**WHO), 3, Mask.NONE, **WHO))
    controls.propose(pin(controls.control() or start(**WHO), 4, **WHO))
    read.clear()
    other = Controls(controls.path)
    assert [(other.beginning_of(epoch) or start(**WHO)).generation for epoch in (1, 2)] == [1, 40]
    assert other.beginning_of(3) is None
    assert [one.generation for one in other.last_of_epochs(1, 2)] == [39, 41]
    assert len(read) < 30
