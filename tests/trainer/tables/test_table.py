"""Tables of rows, of counts and of popular labels; see tests/conformance for what they share."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.compiled import mixed
from state.ranking.transitions import FOLLOWERS, MOST, WIDTH, unpack
from trainer.tables.index import IdIndex, hashed_uniform
from trainer.tables.lists import HOUR_MS, CountTable, Popular, decayed


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


def test_the_index_grows_reuses_freed_places_and_finds_the_remaining_ids() -> None:
    index = IdIndex(10)
    keys = np.random.default_rng(0).integers(1, 2**64, 50_000, dtype=np.uint64)
    rows = np.arange(1, 50_001, dtype=np.int32)
    index.insert(keys, rows)
    assert (index.find(keys) == rows).all()
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


CLICKS = 3000
OF_0_1_0 = {
    1: ("8b37214108e88139c7a8d537880ff6dcbf9553413a763d04f0e36663f1f0df65", "93c16a3420cff5f3"),
    5: ("7505397e198cbbaa57418de19ee4d2ccd7f2da3000fe5006858463525cac1285", "e6171ea7d39bd5a1"),
}
"""By `admit_after`: digest of the table after `learned`, and of the digests of all changes, with rows in an embedding table."""


def clicks(first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Categories before and after, of which some are 0, and times: most of few, and of so many that lists are full."""
    drawn = mixed(np.arange(first, first + CLICKS, dtype=np.uint64))
    rare, kind, rest = drawn % np.uint64(8) == 0, drawn >> np.uint64(60), drawn >> np.uint64(20)
    before = np.where(rare, drawn >> np.uint64(8), drawn) % np.where(rare, np.uint64(400), np.uint64(9))
    after = np.where(kind < 3, rest % np.uint64(500), rest % np.uint64(12))
    times = np.arange(first, first + CLICKS, dtype=np.int64)
    return mixed(before) * (before != 0), mixed(after) * (after != 0), times


def learned(table: CountTable, move_at: int | None = None) -> tuple[CountTable, str]:
    """The table after thirty times as many clicks, and a digest of all changes; it may move into another layout between."""
    digests = []
    for number in range(30):
        before, after, times = clicks(CLICKS * number)
        table.observe(before, times)
        table.count(table.find(before), after)
        if number == 11:
            assert table.expire(CLICKS * number - 10) > 100
        digests.append(table.take_changes().digest())
        if number == move_at:
            other = CountTable("transition", capacity=700, admit_after=table._admit_after)
            other.load(table.state())
            table = other
    return table, hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


@pytest.mark.parametrize("admit_after", OF_0_1_0)
@pytest.mark.parametrize("move_at", [None, 10, 20])
def test_versions_have_the_bits_of_0_1_0(admit_after: int, move_at: int | None) -> None:
    table, changes = learned(CountTable("transition", capacity=2, admit_after=admit_after), move_at)
    assert (table.digest(), changes) == OF_0_1_0[admit_after]
    # Both sorts of zeros, full lists, and lists that were halved are among them.
    state = table.state()
    totals = unpack(state.rows).counts.sum(1)
    assert np.signbit(state.rows).any() and (state.rows[:, FOLLOWERS - 1] > 0).any() and MOST // 2 < totals.max() < MOST


def test_a_new_list_is_empty_and_its_row_begins_as_a_hash_times_nothing() -> None:
    table = CountTable("transition")
    rows = table.observe(ids(7), np.ones(1, np.int64))
    assert not table.lists(rows).counts.any() and not table.lists(rows).ids.any()
    held = table.state()
    assert held.rows.tobytes() == (hashed_uniform(ids(7), WIDTH, "transition") * np.float32(0)).tobytes()
    assert np.signbit(held.rows).any() and held.accum.shape == (1, 0)


def test_halving_a_list_leaves_positive_zeros_in_its_row() -> None:
    table = CountTable("transition")
    rows = table.observe(ids(7, 8), np.ones(2, np.int64))
    table.count(rows[:1].repeat(MOST - 1), ids(5).repeat(MOST - 1))
    table.count(rows[1:], ids(5))
    before = table.state().rows
    table.count(rows[:1], ids(5))
    after = table.state().rows
    assert np.signbit(before).any(1).all() and not np.signbit(after[0]).any()
    assert after[1].tobytes() == before[1].tobytes() and after[0, :2].tolist() == [MOST // 2, 0]


def test_what_came_next_is_counted_for_listed_labels_and_marked_as_changed() -> None:
    table = CountTable("transition", capacity=2)
    table.observe(ids(1, 2, 3), np.ones(3, np.int64))
    table.take_changes()
    before, after = ids(1, 9, 2, 1, 1, 0), ids(5, 5, 0, 6, 6, 5)
    table.count(table.find(before), after)
    lists = table.lists(table.find(ids(1, 2, 3, 9, 0)))
    assert lists.ids[0, :3].tolist() == [6, 5, 0] and lists.counts[0, :3].tolist() == [2, 1, 0]
    assert not lists.counts[1:].any()
    # That after which no category came has its clicks' times, and is in the next version too.
    assert table.take_changes().ids.tolist() == [1, 2]


def test_predictions_of_lists_equal_those_of_all_counts_while_lists_have_space() -> None:
    table = CountTable("transition")
    before, after, times = clicks(0)
    few = after % np.uint64(FOLLOWERS)
    table.observe(before, times)
    table.count(table.find(before), few)
    own = ids(*range(1, 7))[None].repeat(len(before), 0)
    popular = ids(7, 0)
    found = table.succession(table.find(before), own, popular)
    counts = Counter((one, other) for one, other in zip(before.tolist(), few.tolist(), strict=True) if one and other)
    for row, one in enumerate(before[:200].tolist()):
        assert found.recent_categories[row, :, 0].tolist() == [counts[one, label] for label in range(1, 7)]
        assert found.popular[row, :, 0].tolist() == [counts[one, 7], 0]
        chosen = found.ids[row].tolist()
        assert found.successors[row, :, 0].tolist() == [counts[one, label] for label in chosen]
        assert not set(chosen) & set(range(1, 8))
