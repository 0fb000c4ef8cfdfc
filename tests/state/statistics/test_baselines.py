"""Baselines: the newest one counts, none is lost, damage is told, and two that are accepted at once are one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from state import layout
from state.errors import ControlConflict, CorruptVersion
from state.registry.registry import Registry
from state.statistics.baselines import SCHEMA, STATISTICS, AcceptedBaseline, Baselines, baseline_files, infer_schema
from state.statistics.collecting import dataset
from tests.state.statistics.made_rows import columns, statistics

FIRST = dataset(statistics(columns(300)), "bootstrap")
SECOND = dataset(statistics(columns(300, seed=1, hot=0.5)), "window")
SPEC = "ab" * 32


@pytest.fixture
def registry(tmp_path: Path) -> Path:

    def fill(place: Path) -> None:
        for name, data in baseline_files(infer_schema(FIRST, warm=False), FIRST).items():
            (place / name).write_bytes(data)

    Registry(tmp_path).specs.add_spec(SPEC, {"created_at_ms": 5}, fill)
    return tmp_path


def accept(registry: Path, number: int) -> AcceptedBaseline:
    schema = infer_schema(SECOND, warm=True)
    return Baselines(registry).add(SPEC, AcceptedBaseline(number, "ann", "a new season", 9), schema, SECOND)


def test_the_bootstrap_is_the_first_baseline_and_an_accepted_one_takes_its_place(registry: Path) -> None:
    baselines = Baselines(registry)
    first = baselines.newest(SPEC)
    assert first is not None
    assert (first.accepted, first.statistics) == (AcceptedBaseline(0, "", "", 5), FIRST)
    accept(registry, 1)
    second = baselines.newest(SPEC)
    assert second is not None
    assert (second.accepted, second.statistics) == (AcceptedBaseline(1, "ann", "a new season", 9), SECOND)
    assert second.schema == infer_schema(SECOND, warm=True)
    assert not [*(registry / layout.TEMPORARY).iterdir()]


def test_two_that_are_accepted_at_once_are_one(registry: Path) -> None:
    accept(registry, 1)
    with pytest.raises(ControlConflict, match="just accepted by somebody else"):
        accept(registry, 1)
    assert Baselines(registry).newest_number(SPEC) == 1
    assert not [*(registry / layout.TEMPORARY).iterdir()]


def test_a_bootstrap_of_a_release_before_has_no_baseline(tmp_path: Path) -> None:
    Registry(tmp_path).specs.add_spec(SPEC, {"created_at_ms": 5}, lambda place: None)
    assert Baselines(tmp_path).newest(SPEC) is None


@pytest.mark.parametrize("name", [SCHEMA, STATISTICS])
def test_damage_is_told_with_what_to_do(registry: Path, name: str) -> None:
    accept(registry, 1)
    path = registry / layout.BASELINES / SPEC / "1" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptVersion, match=r"fails its digest.*move its directory away"):
        Baselines(registry).newest(SPEC)


def test_a_baseline_that_says_not_what_it_is_made_of_is_told(registry: Path) -> None:
    accept(registry, 1)
    about = registry / layout.BASELINES / SPEC / "1" / "baseline.json"
    about.write_text(json.dumps({"sha256": "0" * 64, "body": {}}))
    with pytest.raises(CorruptVersion, match="is damaged"):
        Baselines(registry).newest(SPEC)
    about.unlink()
    with pytest.raises(CorruptVersion, match="is missing"):
        Baselines(registry).newest(SPEC)
