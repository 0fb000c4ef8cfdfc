"""Lists of what came next: counted exactly while they have room, and read so that each label is one candidate."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from state.ranking.transitions import (
    COLUMNS,
    FOLLOWERS,
    MOST,
    SUCCESSORS,
    WIDTH,
    Succession,
    identity,
    record,
    succession,
)

MOST_ID = (1 << 64) - 1

Array = np.ndarray[Any, Any]


def ids(*numbers: int) -> Array:
    return np.array(numbers, np.uint64)


def counted(labels: list[int], row: Array | None = None) -> Array:
    """A list, `[WIDTH]` float32, after these came next."""
    rows = np.zeros((2, WIDTH), np.float32)
    if row is not None:
        rows[1] = row
    record(np.ones(len(labels), np.int32), np.array(labels, np.uint64), rows)
    assert not rows[0].any()
    return rows[1]


def listed(row: Array) -> list[tuple[int, int]]:
    """Ids and counts, in the order of the list."""
    length = int((row[:FOLLOWERS] > 0).sum())
    return [(int(identity(row, place)), int(row[place])) for place in range(length)]


def descends(row: Array) -> bool:
    """Whether the list is in order, whole numbers below 2^24, with nothing but zeros behind its end."""
    counts, parts = row[:FOLLOWERS], row.reshape(4, FOLLOWERS)
    ended = parts[:, int((counts > 0).sum()) :]
    exact = (row == np.floor(row)).all() and row.min() >= 0 and row.max() < 1 << 24
    return bool((counts[:-1] >= counts[1:]).all() and not ended.any() and exact)


@settings(deadline=None)
@given(st.lists(st.integers(0, FOLLOWERS), max_size=300))
def test_counts_are_exact_until_a_list_is_full(labels: list[int]) -> None:
    row = counted(labels)
    expected = Counter(label for label in labels if label)
    assert dict(listed(row)) == expected and len(listed(row)) == len(expected)
    assert descends(row)


@settings(deadline=None)
@given(st.lists(st.integers(1, MOST_ID), min_size=1, max_size=FOLLOWERS, unique=True))
def test_an_id_comes_back_with_all_its_bits(labels: list[int]) -> None:
    assert [label for label, _ in listed(counted(labels))] == labels


def test_the_smallest_and_the_largest_part_of_an_id_come_back() -> None:
    corners = [MOST_ID, 1, 1 << 63, 1 << 42, (1 << 42) - 1, 1 << 21, (1 << 21) - 1]
    assert [label for label, _ in listed(counted(corners))] == corners


@settings(deadline=None)
@given(st.lists(st.integers(1, 2 * FOLLOWERS), max_size=1500))
def test_a_list_stays_in_order_also_when_it_is_full(labels: list[int]) -> None:
    row = counted(list(range(1, FOLLOWERS + 1)) + labels)
    assert descends(row)
    assert len({label for label, _ in listed(row)}) == len(listed(row)) == FOLLOWERS


def test_a_frequent_label_enters_a_full_list_and_its_count_is_about_right() -> None:
    drawn = np.random.default_rng(5)
    noise = drawn.integers(10_000, 15_000, 3000)
    row = counted([label for label in range(1, FOLLOWERS + 1) for _ in range(6)])
    row = counted([777 if drawn.random() < 0.2 else int(label) for label in noise], row)
    found = dict(listed(row))
    assert listed(row)[0][0] == 777
    assert 450 <= found[777] <= 750


def test_whatever_noise_comes_counts_of_frequent_labels_stay_and_all_add_up() -> None:
    known = [label for label in range(1, FOLLOWERS) for _ in range(20)]
    row = counted([*known, *range(10_000, 10_019)])
    assert listed(row)[:-1] == listed(counted(known))
    assert sum(count for _, count in listed(row)) == len(known) + 19


def test_counts_are_halved_when_there_are_as_many_as_a_list_may_have() -> None:
    labels = [5] * (MOST - 4) + [6, 6, 7]
    assert listed(counted(labels)) == [(5, MOST - 4), (6, 2), (7, 1)]
    row = counted([*labels, 5])
    # What came next once long ago is forgotten.
    assert listed(row) == [(5, (MOST - 3) // 2), (6, 1)]
    assert descends(row)
    assert listed(counted([7], row)) == [(5, (MOST - 3) // 2), (6, 1), (7, 1)]


def test_no_list_and_no_label_count_nothing() -> None:
    rows = np.zeros((3, WIDTH), np.float32)
    record(np.array([0, 1, 2, 2], np.int32), ids(5, 0, 6, 0), rows)
    assert not rows[:2].any() and listed(rows[2]) == [(6, 1)]
    record(np.empty(0, np.int32), ids(), rows)
    assert listed(rows[2]) == [(6, 1)]


def read(row: Array, labels: list[int], popular: list[int]) -> Succession:
    rows = np.stack([np.zeros(WIDTH, np.float32), row])
    return succession(np.array([1], np.int32), rows, ids(*labels)[None], ids(*popular))


def test_an_own_label_wins_over_a_popular_one_and_that_over_a_successor() -> None:
    row = counted([1] * 6 + [2] * 5 + [3] * 4 + [4] * 3)
    found = read(row, labels=[9, 1, 2, 0], popular=[2, 3, 0])
    total = 6 + 5 + 4 + 3

    def said(count: int) -> list[int]:
        return [count, count * 256 // (1 + total)]

    assert found.recent_categories[0].tolist() == [[0, 0], said(6), said(5), [0, 0]]
    assert found.popular[0].tolist() == [[0, 0], said(4), [0, 0]]
    assert found.ids[0].tolist() == [4] + [0] * (SUCCESSORS - 1)
    assert found.successors[0].tolist() == [said(3)] + [[0, 0]] * (SUCCESSORS - 1)


def test_successors_are_the_most_frequent_and_no_more_than_there_is_room_for() -> None:
    row = counted([label for label in range(1, 21) for _ in range(30 - label)])
    found = read(row, labels=[1, 4], popular=[2, 6])
    assert found.ids[0].tolist() == [3, 5, 7, 8, 9, 10, 11, 12]
    assert found.successors[0, :, 0].tolist() == [30 - label for label in found.ids[0].tolist()]


def test_a_count_beyond_16_bits_is_the_largest_there_is() -> None:
    row = counted([1])
    row[0] = 70_000
    found = read(row, labels=[1], popular=[2])
    assert found.recent_categories[0, 0].tolist() == [65_535, 70_000 * 256 // 70_001]


batches = st.tuples(st.integers(0, 2**32), st.integers(1, 12))


def many(seed: int, users: int) -> tuple[Array, Array, Array, Array]:
    """Lists, which of them is each user's, labels and popular ones; some users are without either."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((4, WIDTH), np.float32)
    record(rng.integers(1, 4, 400).astype(np.int32), rng.integers(1, 40, 400).astype(np.uint64), rows)
    labels = np.stack([rng.permutation(np.arange(1, 40))[:6] for _ in range(users)]).astype(np.uint64)
    labels[np.arange(6) >= rng.integers(0, 7, users)[:, None]] = 0
    at = np.where(labels[:, 0] != 0, rng.integers(0, 4, users), 0).astype(np.int32)
    popular = np.append(rng.permutation(np.arange(1, 40))[:5], 0).astype(np.uint64)
    return at, rows, labels, popular


@settings(deadline=None)
@given(batches)
def test_a_follower_is_a_candidate_once_and_what_is_none_says_nothing(batch: tuple[int, int]) -> None:
    at, rows, labels, popular = many(*batch)
    found = succession(at, rows, labels, popular)
    for user, (place, own) in enumerate(zip(at.tolist(), labels.tolist(), strict=True)):
        counts = dict(listed(rows[place]))
        chosen = found.ids[user].tolist()
        rest = [label for label, _ in listed(rows[place]) if label not in own and label not in popular.tolist()]
        assert chosen == (rest + [0] * SUCCESSORS)[:SUCCESSORS]
        expected = [counts.get(label, 0) for label in own]
        assert found.recent_categories[user, :, 0].tolist() == expected
        expected = [0 if label in own else counts.get(label, 0) for label in popular.tolist()]
        assert found.popular[user, :, 0].tolist() == expected
        assert found.successors[user, :, 0].tolist() == [counts.get(label, 0) for label in chosen]
        assert not found.successors[user, found.ids[user] == 0].any()


@settings(deadline=None)
@given(batches)
def test_a_users_answer_does_not_depend_on_who_else_asks(batch: tuple[int, int]) -> None:
    at, rows, labels, popular = many(*batch)
    together = succession(at, rows, labels, popular)
    order = np.random.default_rng(batch[0]).permutation(len(at))
    shuffled = succession(at[order], rows, labels[order], popular)
    alone = [succession(at[[user]], rows, labels[[user]], popular) for user in range(len(at))]
    for name, values in together._asdict().items():
        np.testing.assert_array_equal(getattr(shuffled, name), values[order])
        np.testing.assert_array_equal(np.concatenate([getattr(one, name) for one in alone]), values)


@pytest.mark.parametrize("lists", [1, 3])
def test_nobody_asks_and_nothing_is_said(lists: int) -> None:
    rows = np.zeros((lists, WIDTH), np.float32)
    found = succession(np.empty(0, np.int32), rows, np.empty((0, 4), np.uint64), ids(1, 2))
    shapes = [part.shape for part in found]
    columns = len(COLUMNS)
    assert shapes == [(0, 4, columns), (0, 2, columns), (0, SUCCESSORS), (0, SUCCESSORS, columns)]
