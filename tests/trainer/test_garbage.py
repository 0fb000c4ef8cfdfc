"""What nobody needs goes by age; what a kept version, control or a living writer needs stays, and so does the audit."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from state.disk import files as durable
from state.registry.control import start
from state.registry.registry import SERVING, Registry
from tests.state.registry.test_registry import WHO, draft
from trainer.compactor import DAY_MS, collect

NOW_MS = 1_000 * DAY_MS
KEEP_MS = 30 * DAY_MS


def aged(path: Path, days: float) -> Path:
    """Makes a file or directory so many days old."""
    at_s = (NOW_MS - days * DAY_MS) / 1000
    os.utime(path, (at_s, at_s))
    return path


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    made = Registry(tmp_path)
    made.propose(start(**WHO))
    return made


def publish(registry: Registry, parent: int | None, **changes: Any) -> int:
    return registry.publish(replace(draft(parent), **changes), {SERVING: b"rows"}).version


def test_programs_and_specs_go_that_no_kept_version_names(registry: Registry) -> None:
    programs = {name: registry.specs.add_program(name.encode()) for name in ("named", "gone", "newest", "young")}
    for spec in ("named", "gone", "asked", "newest"):
        registry.specs.add_spec(spec, {}, lambda folder: (folder / "transform").mkdir())
    publish(registry, None, program=programs["named"], spec="named")
    for folder, days in (
        *((f"programs/{programs[name]}.tflite", age) for name, age in (("named", 90), ("gone", 90), ("newest", 31))),
        (f"programs/{programs['young']}.tflite", 29),
        *((f"specs/{name}", age) for name, age in (("named", 90), ("gone", 90), ("asked", 90), ("newest", 40))),
    ):
        aged(registry.path / folder, days)
    gone = collect(registry, KEEP_MS, NOW_MS, ["asked"])
    assert sorted(gone) == sorted(
        [f"programs/{programs['gone']}.tflite", f"programs/{programs['newest']}.tflite", "specs/gone"]
    )
    assert registry.specs.names() == ["asked", "named", "newest"]
    assert registry.specs.program(programs["named"]) == b"named"


def test_what_was_prepared_goes_with_its_spec(registry: Registry) -> None:
    for spec in ("kept", "gone"):
        registry.specs.add_spec(spec, {}, lambda folder: (folder / "transform").mkdir())
        registry.specs.keep_prepared(spec, {}, b"table")
        aged(registry.path / "prepared" / spec, 90)
    (registry.path / "specs" / "gone").rename(registry.path / "tmp" / "gone")
    assert collect(registry, KEEP_MS, NOW_MS) == ["prepared/gone"]


def test_the_program_that_a_trainer_just_took_up_stays(registry: Registry) -> None:
    old = registry.specs.add_program(b"old")
    aged(registry.path / "programs" / f"{old}.tflite", 90)
    other = registry.specs.add_program(b"other")
    aged(registry.path / "programs" / f"{other}.tflite", 60)
    # A trainer goes back to it, and has published nothing yet.
    registry.specs.add_program(b"old")
    assert collect(registry, KEEP_MS, NOW_MS) == [f"programs/{other}.tflite"]


def test_damaged_versions_go_and_their_numbers_do_not_come_again(registry: Registry) -> None:
    first = publish(registry, None)
    second = publish(registry, first)
    third = publish(registry, second)
    for version in (second, third):
        aged(registry.set_aside(registry.folder("delta", version), version, "test"), 60)
    # The last one still says which numbers are taken.
    assert collect(registry, KEEP_MS, NOW_MS) == []
    fourth = publish(registry, first)
    assert fourth == third + 1
    assert len(collect(registry, KEEP_MS, NOW_MS)) == 2
    assert not list((registry.path / "versions").glob("*.bad*"))
    assert Registry(registry.path).next_number() == fourth + 1


def test_outcomes_go_with_the_last_version_of_their_epoch_and_control_never(registry: Registry) -> None:
    publish(registry, None)
    for epoch in (1, 2, 3):
        registry.generations.add_outcome(epoch, "learned", {"seconds": 1.0})
    for path in (registry.path / "outcomes").iterdir():
        aged(path, 400)
    for path in (registry.path / "control").iterdir():
        aged(path, 4000)
    assert collect(registry, KEEP_MS, NOW_MS) == ["outcomes/00000002-learned.json", "outcomes/00000003-learned.json"]
    assert [one.generation for one in registry.controls()] == [1]


def test_what_writers_left_goes_once_they_are_dead_or_elsewhere_for_a_day(registry: Registry) -> None:
    folder = registry.path / "tmp"
    dead = folder / f"base-7~{durable.HOST}@{2**22 + 1}@0.00"
    away, young = folder / "base-8~elsewhere@7@0.00", folder / "base-9~elsewhere@7@0.00"
    own = folder / f"base-10~{durable.owner_mark()}"
    for path in (dead, away, young, own):
        path.mkdir()
        (path / "file").write_bytes(b"half")
    for path, days in ((away, 2.0), (young, 0.5), (own, 9.0)):
        aged(path, days)
    assert sorted(collect(registry, KEEP_MS, NOW_MS)) == sorted(f"tmp/{path.name}" for path in (dead, away))
    assert sorted(path.name for path in folder.iterdir()) == sorted([young.name, own.name])
