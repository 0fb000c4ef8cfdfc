"""Tables: rows by id, whatever their layout; admission, expiry, changes."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.tables.index import IdIndex, hashed_uniform
from trainer.tables.table import INITIAL_RANGE, Table


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint64)


def times(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 60)), max_size=300))
def test_index_agrees_with_a_dict(changes: list[tuple[bool, int]]) -> None:
    index, model = IdIndex(), {}
    # Ids of one bucket in a table of 1,024 slots: every run of collisions is exercised.
    for number, (insert, key) in enumerate(changes, start=1):
        key <<= 56
        if insert:
            index.insert(ids(key), np.array([number], np.int32))
            model[key] = number
        else:
            index.remove(ids(key))
            model.pop(key, None)
    everything = ids(*(key << 56 for key in range(1, 61)))
    assert index.find(everything).tolist() == [model.get(int(key), 0) for key in everything]
    assert len(index) == len(model)


def test_index_grows_past_its_first_size() -> None:
    index = IdIndex(10)
    keys = np.random.default_rng(0).integers(1, 2**64, 20_000, dtype=np.uint64)
    index.insert(keys, np.arange(1, 20_001, dtype=np.int32))
    assert (index.find(keys) == np.arange(1, 20_001)).all()


def test_new_row_depends_on_table_and_id_only() -> None:
    small, large = Table("user", 4, capacity=2), Table("user", 4, capacity=100)
    small.observe(ids(1, 2, 3), times(1, 1, 1))
    large.observe(ids(3), times(1))
    rows = small.state()
    assert (large.state().rows[0] == rows.rows[2]).all()
    assert (rows.rows == hashed_uniform(rows.ids, 4, "user") * np.float32(INITIAL_RANGE)).all()
    assert np.abs(rows.rows).max() <= INITIAL_RANGE
    other = Table("item", 4)
    other.observe(ids(3), times(1))
    assert (other.state().rows != rows.rows[2]).all()


def test_missing_row_is_zero_and_no_id_is_none() -> None:
    table = Table("user", 4)
    assert table.observe(ids(0, 7), times(5, 5)).tolist() == [0, 1]
    assert table.find(ids(0, 8)).tolist() == [0, 0]
    assert not tf.gather(table.rows, [0]).numpy().any()
    assert table.take_changes().ids.tolist() == [7]


def test_row_is_admitted_by_its_nth_sighting() -> None:
    table = Table("user", 4, admit_after=3)
    assert table.observe(ids(7, 7), times(1, 2)).tolist() == [0, 0]
    changes = table.take_changes()
    assert (changes.ids.size, changes.pending_ids.tolist(), changes.pending_counts.tolist()) == (0, [7], [2])
    assert table.observe(ids(7), times(3))[0] != 0
    changes = table.take_changes()
    assert (changes.ids.tolist(), changes.pending_ids.tolist(), changes.pending_counts.tolist()) == ([7], [7], [0])
    assert table.pending == 0


def test_expiry_by_log_time_leaves_a_tombstone_and_forgets_pending_ids() -> None:
    table = Table("user", 4, admit_after=2)
    table.observe(ids(1, 1, 2, 2, 3), times(10, 20, 10, 50, 10))
    table.take_changes()
    assert table.expire(before_ms=30) == 1
    changes = table.take_changes()
    assert (changes.removed.tolist(), changes.pending_ids.tolist()) == ([1], [3])
    assert table.find(ids(1, 2)).tolist() == [0, 2]


def test_expired_id_that_comes_back_starts_anew_and_is_no_tombstone() -> None:
    table = Table("user", 4)
    table.observe(ids(1, 2), times(10, 10))
    first = table.state()
    row = table.find(ids(1))
    table.put(row, np.ones((1, 4), np.float32), np.ones((1, 4), np.float32))
    table.expire(before_ms=20)
    table.observe(ids(1), times(30))
    changes = table.take_changes()
    assert (changes.removed.tolist(), changes.ids.tolist()) == ([2], [1])
    assert (changes.rows == first.rows[:1]).all() and (changes.accum == first.accum[:1]).all()


def test_distinct_order_is_that_of_first_occurrence() -> None:
    table = Table("user", 4)
    table.observe(ids(1, 2, 3), times(1, 1, 1))
    unique, positions = table.distinct(table.find(ids(3, 9, 1, 3)))
    assert unique.tolist() == [0, *table.find(ids(3, 1))]
    assert positions.tolist() == [1, 0, 2, 1]
    again, _ = table.distinct(table.find(ids(3, 9, 1, 3)))
    assert again.tolist() == unique.tolist()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 9), st.booleans()), min_size=1, max_size=40),
    st.integers(1, 3),
)
def test_base_and_deltas_rebuild_the_table_in_another_layout(
    events: list[tuple[int, int, bool]], admit_after: int
) -> None:
    table = Table("user", 4, capacity=2, admit_after=admit_after)
    copy = Table("user", 4, capacity=50, admit_after=admit_after)
    for number, (key, at, cut) in enumerate(events):
        row = table.observe(ids(key), times(100 * number + at))
        if row[0]:
            table.put(row, np.full((1, 4), number, np.float32), np.full((1, 4), number + 1, np.float32))
        if number % 7 == 6:
            table.expire(100 * number - 500)
        if cut:
            copy.load(table.take_changes())
    copy.load(table.take_changes())
    assert copy.digest() == table.digest()
    fresh = Table("user", 4, capacity=7, admit_after=admit_after)
    fresh.load(table.state())
    assert fresh.digest() == table.digest()
    assert fresh.take_changes().ids.size == 0


def test_growth_keeps_every_row() -> None:
    table = Table("user", 4, capacity=2)
    keys = np.arange(1, 1001, dtype=np.uint64)
    table.observe(keys, np.ones(1000, np.int64))
    assert table.capacity >= 1001
    assert (table.state().rows == hashed_uniform(keys, 4, "user") * np.float32(INITIAL_RANGE)).all()
    assert (table.state().accum == np.float32(1e-6)).all()


def test_clear_forgets_everything() -> None:
    table = Table("user", 4)
    empty = table.digest()
    table.observe(ids(1), times(1))
    assert table.digest() != empty
    table.clear()
    assert table.digest() == empty and len(table) == 0


@pytest.mark.parametrize("field", ["rows", "accum", "last_seen_ms"])
def test_digest_sees_each_array(field: str) -> None:
    table = Table("user", 4)
    table.observe(ids(1), times(1))
    state = table.state()
    changed = {name: getattr(state, name) for name in state.FIELDS}
    changed[field] = changed[field] + 1
    assert type(state)(**changed).digest() != state.digest()
