"""An erasure in control: kept in files of its own, known to every later generation, lifted by none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from state.errors import CorruptVersion, UnfitMask
from state.features.mask import Mask
from state.features.masked_users import MaskedUsers
from state.registry.control import erase, follow, roll_back, start, unmask
from state.registry.registry import Registry

WHO: dict[str, Any] = {"actor": "ann", "reason": "asked to", "now_ms": 5}
USER = 0x1122334455667788


def erased(path: Path) -> Registry:
    registry = Registry(path)
    registry.propose(start(actor="trainer", reason="first start", now_ms=0))
    registry.change(lambda control: erase(control, MaskedUsers.of([USER]), [(42, 0, 100)], **WHO))
    return registry


def test_every_later_generation_has_the_erasure_whatever_it_decides(tmp_path: Path) -> None:
    registry = erased(tmp_path)
    registry.change(lambda control: roll_back(control, 3, Mask(times=((0, 9),)), **WHO))
    registry.change(lambda control: erase(control, MaskedUsers.of([USER, 9]), [(42, 0, 200)], **WHO))
    registry.change(lambda control: unmask(control, [1], **WHO))
    registry.change(lambda control: follow(control, **WHO))
    with pytest.raises(UnfitMask, match="there is no mask 2"):
        registry.change(lambda control: unmask(control, [2], **WHO))
    newest = Registry(tmp_path).control()
    assert newest is not None and newest.action == "follow"
    assert [(one.id, one.generation, len(one.users)) for one in newest.erased] == [(1, 2, 1), (2, 4, 2)]
    assert newest.mask.erased == newest.mask_at(0).erased == newest.erased
    assert (newest.mask.times, newest.mask_generation) == ((), 5)
    assert [one.erased.last for one in Registry(tmp_path).controls()] == [0, 1, 1, 2, 2, 2]


def test_many_erasures_leave_controls_file_as_small_as_one(tmp_path: Path) -> None:
    registry, sizes = erased(tmp_path), []
    for number in range(1, 21):
        control = registry.control()
        assert control is not None
        made = registry.propose(erase(control, MaskedUsers.of([number]), [(42, 0, 100)], **WHO))
        sizes.append((tmp_path / "control" / f"{made.generation:08d}.json").stat().st_size)
    assert max(sizes) - min(sizes) < 8
    assert Registry(tmp_path).control() == made


def test_the_pseudonym_is_in_the_erasures_file_alone(tmp_path: Path) -> None:
    erased(tmp_path)
    forms = [USER.to_bytes(8, "little"), USER.to_bytes(8, "big"), b"%016x" % USER, b"%d" % USER]
    having = [
        path.suffix for path in tmp_path.rglob("*") if path.is_file() and any(f in path.read_bytes() for f in forms)
    ]
    assert having == [".erased"]


def test_control_whose_erasures_are_damaged_is_refused(tmp_path: Path) -> None:
    erased(tmp_path)
    (path,) = (tmp_path / "masks").glob("*.erased")
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(CorruptVersion, match="fails its digest"):
        Registry(tmp_path).control()
    path.unlink()
    with pytest.raises(CorruptVersion, match="an erasure, is missing"):
        Registry(tmp_path).control()
