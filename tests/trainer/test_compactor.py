"""The compactor: a base is bit-equal to the trainer's state, and what can be listed can be restored."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from state import layout
from state.disk.lock import DirectoryLock
from state.features.mask import Mask
from state.registry.control import pin, roll_back, start
from state.registry.manifest import Draft, FileEntry, LogRange, Manifest, extend
from state.registry.registry import Registry
from tests.trainer.clicks import SPEC, batches, small_settings
from trainer import compactor
from trainer.compactor import DAY_MS, HOUR_MS, Tiers, compact, old_bases, old_deltas, retain
from trainer.engine.step import Trainer
from trainer.versions import checkpoint, content

WHO = {"actor": "test", "reason": "test", "now_ms": 0}
TIERS = Tiers(delta_ms=HOUR_MS, delta_bytes=10**12, hourly_ms=24 * HOUR_MS, daily_ms=7 * DAY_MS)


def draft(parent: int | None, created_at_ms: int = 0, epoch: int = 1) -> Draft:
    kind = "base" if parent is None else "delta"
    return Draft(kind, epoch, parent, LogRange(), (), 0, 0, created_at_ms, 0, SPEC.digest, "", "")


def test_a_base_is_the_trainers_state_bit_for_bit(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    registry.propose(start(**WHO))
    trainer = Trainer(small_settings("--trainer.admit_after", "2", "--trainer.expire_s", "3600"), SPEC)
    version = registry.publish(draft(None), content.encode(checkpoint.full(trainer))).version
    for number, batch in enumerate(batches(0, 60)):
        trainer.step(batch)
        if number % 5 == 4:
            version = registry.publish(draft(version), content.encode(checkpoint.changes(trainer))).version
        if number == 30:
            compact(registry)
    made = compact(registry)
    assert made is not None
    assert made.version == version
    assert registry.chain(version).deltas == []
    expected = content.encode(checkpoint.full(trainer))
    assert {name: registry.read(made, name) for name in expected} == expected
    assert compact(registry) is None, "there is nothing new"


def manifest(version: int, parent: int | None, created_at_ms: int, visible: tuple[tuple[int, int], ...]) -> Manifest:
    made = draft(parent, created_at_ms)
    return Manifest(
        version=version,
        kind="delta",
        epoch=1,
        parent=parent,
        visible=visible,
        log=made.log,
        sources=(),
        steps=0,
        rows=0,
        created_at_ms=created_at_ms,
        event_time_ms=0,
        spec="",
        program="",
        salt="",
        mask_generation=0,
        metrics={},
        environment={},
        files={"a": FileEntry("", 100)},
    )


def test_of_the_bases_one_an_hour_stays_for_a_day_and_one_a_day_for_a_week() -> None:
    now = 10 * DAY_MS
    bases = [manifest(number, None, number * HOUR_MS // 4, ((1, 1),)) for number in range(1, 4 * 24 * 10)]
    gone = set(old_bases(bases, keep={5}, tiers=TIERS, now_ms=now))
    ages_h = [(now - base.created_at_ms) / HOUR_MS for base in bases if base.version not in gone]
    assert sum(age <= 1 for age in ages_h) == 4
    assert sum(1 < age <= 24 for age in ages_h) in (23, 24)
    assert sum(24 < age <= 7 * 24 for age in ages_h) in (6, 7)
    assert [age for age in ages_h if age > 8 * 24] == [(now - 5 * HOUR_MS // 4) / HOUR_MS], "control names it"


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.one_of(st.just(0), st.integers(1, 40)), min_size=2, max_size=40),
    st.sets(st.integers(2, 40), max_size=5),
    st.sets(st.integers(1, 40), max_size=2),
    st.integers(0, 40),
    st.integers(100, 4000),
)
def test_what_stays_can_be_restored(plan: list[int], based: set[int], keep: set[int], now: int, limit: int) -> None:
    """A line of deltas with rollbacks (numbers of `plan`), one a millisecond, and bases at `based`."""
    visible: dict[int, tuple[tuple[int, int], ...]] = {1: ((1, 1),)}
    parents: dict[int, int] = {}
    head = 1
    for number in plan:
        if number:
            head = sorted(visible)[number % len(visible)]
            continue
        version = max(visible) + 1
        visible[version] = extend(visible[head], head, version)
        parents[version] = head
        head = version
    deltas = [manifest(version, parents[version], version, visible[version]) for version in sorted(parents)]
    bases = {1, *(based & set(parents))}
    keep &= set(visible)
    tiers = replace(TIERS, delta_ms=10, delta_bytes=limit)
    gone, starts = old_deltas(deltas, bases, keep, tiers, now_ms=max(visible) + now - 20)
    staying = set(parents) - set(gone)
    for version in {*staying, *keep, *([deltas[-1].version] if deltas else [])}:
        at = version
        while at not in bases:
            assert at in staying, f"version {version} cannot be restored without {at}"
            at = parents[at]
        assert at in starts, f"version {version} starts from base {at}"


def test_retention_keeps_what_control_names_and_takes_the_rest(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    registry.propose(start(**WHO))
    files = content.encode(
        {f"{table}.{name}": np.zeros(0, np.uint64) for table in content.TABLES for name in ("ids", "removed")}
    )
    version = registry.publish(draft(None), files).version
    for number in range(1, 13):
        version = registry.publish(draft(version, number), files).version
        if number % 4 == 0:
            registry.add_base(registry.manifest(version), files)
    registry.change(lambda c: roll_back(c, 7, Mask.NONE, **WHO))
    registry.change(lambda c: pin(c, 3, **WHO))
    gone = retain(registry, TIERS, now_ms=9 * DAY_MS)
    assert gone == {"delta": [4, 5, 8, 9, 10, 11, 12, 13], "base": [9]}
    assert registry.versions() == [1, 2, 3, 5, 6, 7, 13]
    for kept in (3, 7, 13):
        registry.chain(kept)
    assert Registry(tmp_path).newest_good(1) == 13


def test_the_process_compacts_a_registry_and_says_what_it_did(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    registry = Registry(tmp_path / "registry")
    registry.propose(start(**WHO))
    trainer = Trainer(small_settings(), SPEC)
    first = registry.publish(draft(None), content.encode(checkpoint.full(trainer))).version
    trainer.step(batches(0, 1)[0])
    second = registry.publish(draft(first, 10**15), content.encode(checkpoint.changes(trainer))).version
    with caplog.at_level(logging.INFO):
        compactor.run(small_settings("--paths.state", str(tmp_path)))
    assert f"base of version {second}" in caplog.text
    assert registry.bases()[-1] == second


def test_an_operators_compactor_waits_until_the_trainers_own_is_done(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(tmp_path / "registry")
    registry.propose(start(**WHO))
    at_work = DirectoryLock(registry.path, layout.COMPACTOR_LOCK).acquire()
    done = threading.Timer(0.2, at_work.release)
    done.start()
    with caplog.at_level(logging.INFO):
        compactor.run_after_others(small_settings("--paths.state", str(tmp_path)))
    done.join()
    assert "waiting for it" in caplog.text
