"""Embedding tables: the index from ids to rows, and what a row and its accumulator begin with; see tests/conformance for the rest."""

from __future__ import annotations

import numpy as np
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


def test_the_index_grows_past_its_first_size() -> None:
    index = IdIndex(10)
    keys = np.random.default_rng(0).integers(1, 2**64, 20_000, dtype=np.uint64)
    index.insert(keys, np.arange(1, 20_001, dtype=np.int32))
    assert (index.find(keys) == np.arange(1, 20_001)).all()


def test_the_index_reuses_freed_places_and_finds_the_remaining_ids() -> None:
    index = IdIndex(10)
    keys = np.random.default_rng(0).integers(1, 2**64, 50_000, dtype=np.uint64)
    rows = np.arange(1, 50_001, dtype=np.int32)
    index.insert(keys, rows)
    most = index.slots
    index.remove(keys[100:])
    assert most >= 65_536 and index.slots <= 1024
    assert (index.find(keys[:100]) == rows[:100]).all() and not index.find(keys[100:]).any() and len(index) == 100
    index.insert(keys[100:], rows[100:])
    assert (index.find(keys) == rows).all()


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


def test_missing_row_is_zero() -> None:
    table = Table("user", 4)
    assert table.observe(ids(0, 7), times(5, 5)).tolist() == [0, 1]
    assert not table.gather(np.zeros(1, np.int32)).any()


def test_growth_keeps_every_row() -> None:
    table = Table("user", 4, capacity=2)
    keys = np.arange(1, 1001, dtype=np.uint64)
    table.observe(keys, np.ones(1000, np.int64))
    assert table.capacity >= 1001
    assert (table.state().rows == hashed_uniform(keys, 4, "user") * np.float32(INITIAL_RANGE)).all()
    assert (table.state().accum == np.float32(1e-6)).all()


def test_digest_sees_accumulators() -> None:
    table = Table("user", 4)
    table.observe(ids(1), times(1))
    state = table.state()
    changed = {name: getattr(state, name) for name in state.FIELDS}
    changed["accum"] = changed["accum"] + 1
    assert type(state)(**changed).digest() != state.digest()
