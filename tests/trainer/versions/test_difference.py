"""The first difference between two states: table, id, position; and nothing where the bits are equal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.versions.content import PENDING, ROWS, TABLES
from trainer.versions.difference import first_difference


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


def test_a_state_equals_itself_nan_included() -> None:
    assert first_difference(state(), state()) is None


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


def test_the_order_of_the_rows_is_no_difference() -> None:
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
