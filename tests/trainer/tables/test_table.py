"""Tables of rows, of counts and of popular labels; see tests/conformance for what they share."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainer.tables.index import IdIndex
from trainer.tables.popular import HOUR_MS, Popular, decayed


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint64)


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


def ranked(ids: np.ndarray, counts: np.ndarray, size: int) -> np.ndarray:
    """The `size` ids with the largest counts, larger first, then the smaller id."""
    return ids[np.lexsort((ids, -counts))[:size]]


@given(st.lists(st.tuples(st.lists(st.integers(0, 30), max_size=12), st.integers(0, 3)), max_size=30))
def test_list_equals_a_ranking_of_all_counts(updates: list[tuple[list[int], int]]) -> None:
    popular, hour = Popular(5), 0
    for clicked, later in updates:
        hour += later
        popular.update(np.array(clicked, np.uint64), hour * HOUR_MS)
        state = popular.state()
        expected = ranked(state["ids"], state["counts"], 5)
        assert popular.top()[: expected.size].tolist() == expected.tolist()
        assert not popular.top()[expected.size :].any()


def test_new_taste_replaces_the_old_one_in_log_time() -> None:
    popular = Popular(1)
    popular.update(np.full(100, 1, np.uint64), 0)
    popular.update(np.full(20, 2, np.uint64), HOUR_MS)
    assert popular.top().tolist() == [1]
    popular.update(np.full(20, 2, np.uint64), 72 * HOUR_MS)
    assert popular.top().tolist() == [2]


def test_an_event_out_of_order_does_not_move_the_clock_back() -> None:
    popular = Popular(2)
    popular.update(np.array([1], np.uint64), 50 * HOUR_MS)
    popular.update(np.array([2], np.uint64), 10 * HOUR_MS)
    assert popular.state()["hour"] == 50


def test_forgotten_label_leaves_the_state() -> None:
    popular = Popular(2)
    popular.update(np.array([1], np.uint64), 0)
    popular.update(np.array([2], np.uint64), 24 * 40 * HOUR_MS)
    assert popular.state()["ids"].tolist() == [2]


def test_counted_categories_are_limited_and_the_list_has_the_largest() -> None:
    popular, every = Popular(4, most=64), Popular(4)
    for number in range(200):
        clicked = np.array([1, 1, 2, 3, 4, 1000 + number], np.uint64)
        for one in (popular, every):
            one.update(clicked, number * 60_000)
        assert popular.state()["ids"].size <= 64
        assert popular.top().tolist() == every.top().tolist()
        copy = Popular(4, most=64)
        copy.load(popular.state())
        assert copy.top().tolist() == popular.top().tolist()
    assert popular.state()["ids"].tolist()[:4] == [1, 2, 3, 4] and every.state()["ids"].size == 204


def test_decay_halves_in_a_day() -> None:
    assert abs(int(decayed(np.array([1 << 30]), 24)[0]) / (1 << 29) - 1) < 0.001
