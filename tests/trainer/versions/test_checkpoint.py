"""Checkpoints of a trainer: restored with the same bits, merged, and compared."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.errors import CorruptVersion, SpecMismatch
from state.registry.model_fit import environment_differences
from state.registry.registry import TRAINING, Registry
from tests.trainer.batches import with_tables
from tests.trainer.clicks import SPEC, batches, small_settings
from tests.trainer.logs import publish, started
from trainer.engine.step import Trainer
from trainer.model.hyperparameters import HYPERPARAMETERS
from trainer.verify import first_difference
from trainer.versions import checkpoint, content
from trainer.versions.content import PENDING, ROWS, TABLES

FLAGS = ("--trainer.admit_after", "2", "--trainer.expire_s", "3600", "--churn.days", "0.002")


def made(*flags: str) -> Trainer:
    return Trainer(small_settings(*FLAGS, *flags), SPEC)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return started(tmp_path)


def test_the_tables_are_those_of_the_step() -> None:
    assert tuple(made().tables) == (*content.TABLES, "clicked", "followed", "visited", "next_category")


def test_a_restored_trainer_goes_on_with_the_same_bits_in_another_layout(registry: Registry) -> None:
    ours = made()
    version = publish(registry, ours, None)
    digests = {version: checkpoint.digest(ours)}
    # Some hours of log time, expiry after one: the later versions hold tombstones.
    for number, batch in enumerate(batches(0, 90)):
        ours.step(batch)
        if number % 7 == 0:
            version = publish(registry, ours, version)
            digests[version] = checkpoint.digest(ours)
    assert any(len(checkpoint.tensors_of(registry, registry.manifest(number))["user.removed"]) for number in digests)

    theirs = with_tables(small_settings(*FLAGS), 1024)
    for number, expected in digests.items():
        checkpoint.restore(registry, number, theirs, SPEC.digest)
        assert checkpoint.digest(theirs) == expected, f"version {number}"
    checkpoint.restore(registry, version, theirs, SPEC.digest)
    for batch in batches(85, 90):
        theirs.step(batch)
    assert checkpoint.digest(theirs) == checkpoint.digest(ours)


def test_a_restored_trainer_publishes_only_what_it_changed(registry: Registry) -> None:
    ours = made()
    first = publish(registry, ours, None)
    for batch in batches(0, 4):
        ours.step(batch)
    second = publish(registry, ours, first)
    checkpoint.restore(registry, second, ours, SPEC.digest)
    assert all(len(checkpoint.changes(ours)[f"{table}.ids"]) == 0 for table in content.TABLES)


def test_a_corrupt_or_foreign_version_is_not_restored(registry: Registry) -> None:
    ours = made()
    first = publish(registry, ours, None)
    foreign = publish(registry, ours, first, spec="f" * 64)
    with pytest.raises(SpecMismatch, match=r"put \[features\]"):
        checkpoint.restore(registry, foreign, ours, SPEC.digest)
    path = registry.folder("base", first) / TRAINING
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptVersion, match=TRAINING):
        checkpoint.restore(registry, first, ours, SPEC.digest)


def delta(changed: dict[int, int], removed: set[int], pending: dict[int, int]) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {"dense.w": np.array([sum(changed.values())], np.float32)}
    for table in content.TABLES:
        ids = sorted(changed)
        values = np.array([changed[key] for key in ids], np.float32).reshape(-1, 1)
        tensors |= {
            f"{table}.ids": np.array(ids, np.uint64),
            f"{table}.rows": values,
            f"{table}.accum": values * 2,
            f"{table}.last_seen_ms": values[:, 0].astype(np.int64),
            f"{table}.removed": np.array(sorted(removed - set(ids)), np.uint64),
            f"{table}.pending_ids": np.array(sorted(pending), np.uint64),
            f"{table}.pending_counts": np.array([pending[key] for key in sorted(pending)], np.int32),
            f"{table}.pending_seen_ms": np.array([pending[key] for key in sorted(pending)], np.int64),
        }
    return tensors


keys = st.integers(1, 8)
deltas = st.lists(
    st.builds(
        delta,
        st.dictionaries(keys, st.integers(1, 99), max_size=5),
        st.sets(keys, max_size=3),
        st.dictionaries(keys, st.integers(0, 3), max_size=3),
    ),
    min_size=1,
    max_size=6,
)


@given(deltas, st.integers(1, 5))
def test_merging_in_any_grouping_is_replaying_the_deltas(parts: list[dict[str, np.ndarray]], cut: int) -> None:
    rows: dict[int, float] = {}
    pending: dict[int, int] = {}
    for part in parts:
        for key in part["user.removed"].tolist():
            rows.pop(key, None)
        rows |= dict(zip(part["user.ids"].tolist(), part["user.rows"][:, 0].tolist(), strict=True))
        pending |= dict(zip(part["user.pending_ids"].tolist(), part["user.pending_counts"].tolist(), strict=True))
    merged = content.merge(parts)
    assert dict(zip(merged["user.ids"].tolist(), merged["user.rows"][:, 0].tolist(), strict=True)) == rows
    assert merged["user.ids"].tolist() == sorted(rows)
    assert merged["user.accum"][:, 0].tolist() == [2 * rows[key] for key in sorted(rows)]
    assert merged["user.pending_ids"].tolist() == sorted(key for key, count in pending.items() if count)
    assert merged["dense.w"] == parts[-1]["dense.w"]
    if cut < len(parts):
        grouped = content.merge([content.merge(parts[:cut], full=False), content.merge(parts[cut:], full=False)])
        assert content.encode(grouped) == content.encode(merged)


def test_encoding_is_exact_and_splits_what_serving_needs_from_the_rest() -> None:
    trainer = made()
    trainer.step(batches(0, 1)[0])
    tensors = checkpoint.full(trainer)
    files = content.encode(tensors)
    assert files == content.encode(tensors)
    back = content.decode(files.values())
    assert content.digest(back) == content.digest(tensors)
    served = content.decode([files["serving.safetensors"]])
    assert {name for name in served if not name.startswith("dense.")} == {
        *(
            f"{table}.{name}"
            for table in (*content.TABLES, "clicked", "followed", "next_category")
            for name in ("ids", "rows", "removed")
        ),
        "popular",
    }


def test_the_environment_names_what_decides_the_bits() -> None:
    found = checkpoint.environment(small_settings(), "/CPU:0")
    assert found["tensorflow"].startswith("2.")
    assert found["threads"] == "any"
    assert checkpoint.environment(small_settings(), "/CPU:0", "tensorflow")["threads"] == "1"
    assert {"numba", "llvmlite", "engine", "model_code"} <= found.keys()


def test_the_environment_has_every_tuned_number_and_another_one_is_not_comparable() -> None:
    found = checkpoint.environment(small_settings(), "/CPU:0")
    for field in dataclasses.fields(HYPERPARAMETERS):
        assert json.loads(found[f"hyperparameters.{field.name}"]) is not None, field.name
    other = dataclasses.replace(HYPERPARAMETERS, fast_rows=16).texts()
    changed = found | {f"hyperparameters.{name}": text for name, text in other.items()}
    assert environment_differences(found, changed) == ["hyperparameters.fast_rows was 32 and is 16"]
    engines = found, checkpoint.environment(small_settings(), "/CPU:0", "tensorflow")
    assert environment_differences(*engines) == ["engine was compiled and is tensorflow", "threads was any and is 1"]


def state() -> dict[str, Any]:
    """Three rows and one sighting in each table, some weights, a NaN."""
    held: dict[str, Any] = {}
    for number, table in enumerate(TABLES):
        held |= {f"{table}.ids": np.array([5, 7, 2**63], np.uint64), f"{table}.removed": np.zeros(0, np.uint64)}
        held |= {f"{table}.rows": np.arange(12, dtype=np.float32).reshape(3, 4) + number}
        held |= {f"{table}.accum": np.ones((3, 4), np.float32), f"{table}.last_seen_ms": np.arange(3)}
        held |= {name: np.array([9]) for name in (f"{table}.{field}" for field in PENDING[1:])}
        held |= {f"{table}.pending_ids": np.array([11], np.uint64)}
    return held | {
        "dense.kernel": np.array([[1.0, np.nan], [0.0, 2.0]], np.float32),
        "state.counters.steps": np.array(4),
    }


@given(st.sampled_from(TABLES), st.sampled_from(ROWS[:2]), st.integers(0, 2), st.integers(0, 3))
def test_one_changed_value_of_a_row_is_named(table: str, field: str, row: int, position: int) -> None:
    other = state()
    other[f"{table}.{field}"] = other[f"{table}.{field}"].copy()
    other[f"{table}.{field}"][row, position] = -3.5
    found = first_difference(state(), other)
    assert found is not None
    assert (found.table, found.field, found.position) == (table, field, position)
    assert found.id == [5, 7, 2**63][row]
    assert found.recomputed == "-3.5"


def test_a_row_that_only_one_side_has_is_named() -> None:
    other = state()
    for name in ("ids", *ROWS):
        other[f"item.{name}"] = other[f"item.{name}"][[0, 2]]
    assert (
        str(first_difference(state(), other))
        == "item, id 0000000000000007, row: the version has it, recomputed nothing"
    )
    assert "has nothing, recomputed it" in str(first_difference(other, state()))


def test_the_order_of_the_rows_and_equal_nans_are_no_difference() -> None:
    other = state()
    for name in ("ids", *ROWS):
        other[f"user.{name}"] = other[f"user.{name}"][[2, 0, 1]]
    assert first_difference(state(), other) is None


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        (
            "dense.kernel",
            np.array([[1.0, np.nan], [-0.0, 2.0]], np.float32),
            "dense.kernel[2]: the version has 0.0, recomputed -0.0",
        ),
        ("state.counters.steps", np.array(5), "state.counters.steps[0]: the version has 4, recomputed 5"),
        ("state.counters.steps", np.array([4]), "state.counters.steps: the version has int64[], recomputed int64[1]"),
        (
            "category.pending_counts",
            np.array([8]),
            "category, id 000000000000000b, pending_counts[0]: the version has 9, recomputed 8",
        ),
        ("slots.new", np.array([1]), "slots.new: the version has nothing, recomputed it"),
    ],
)
def test_everything_beside_the_rows_is_compared_too(name: str, value: Any, text: str) -> None:
    assert str(first_difference(state(), state() | {name: value})) == text
