"""Lists of what came next: counted exactly while they have room, read so that each label is one candidate, and stored as rows bit by bit."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.ranking.transitions import (
    COLUMNS,
    FOLLOWERS,
    MOST,
    SIGN_BYTES,
    SUCCESSORS,
    WIDTH,
    Lists,
    Succession,
    from_stored,
    pack,
    record,
    signs_of,
    succession,
    unpack,
)

Array = np.ndarray[Any, Any]


def ids(*numbers: int) -> Array:
    return np.array(numbers, np.uint64)


def counted(labels: list[int], before: Lists | None = None) -> Lists:
    """No category's list and one more, after these came next to it."""
    lists = Lists.empty(2) if before is None else Lists(before.counts.copy(), before.ids.copy())
    record(np.ones(len(labels), np.int32), np.array(labels, np.uint64), lists)
    assert listed(lists, 0) == []
    return lists


def listed(lists: Lists, which: int = 1) -> list[tuple[int, int]]:
    """Ids and counts, in the order of one list."""
    counts = lists.counts[which].tolist()
    return [(one, count) for one, count in zip(lists.ids[which].tolist(), counts, strict=True) if count]


def descends(lists: Lists) -> bool:
    """Whether the list is in order, with nothing but zeros behind its end."""
    counts, ids = lists.counts[1], lists.ids[1]
    ended = ids[int((counts > 0).sum()) :]
    return bool((counts[:-1] >= counts[1:]).all() and counts.min() >= 0 and not ended.any())


@given(st.lists(st.integers(0, FOLLOWERS), max_size=300))
def test_counts_are_exact_until_a_list_is_full(labels: list[int]) -> None:
    lists = counted(labels)
    expected = Counter(label for label in labels if label)
    assert dict(listed(lists)) == expected and len(listed(lists)) == len(expected)
    assert descends(lists)


def test_halving_is_told_for_the_row_at_which_it_happened() -> None:
    lists = counted([5] * (MOST - 1))
    halved = record(np.array([1, 0, 1, 1], np.int32), ids(0, 5, 5, 5), lists)
    assert halved.tolist() == [False, False, True, False]
    assert listed(lists) == [(5, MOST // 2 + 1)]


@given(st.lists(st.integers(1, 2 * FOLLOWERS), max_size=1500))
def test_a_list_stays_in_order_also_when_it_is_full(labels: list[int]) -> None:
    lists = counted(list(range(1, FOLLOWERS + 1)) + labels)
    assert descends(lists)
    assert len({label for label, _ in listed(lists)}) == len(listed(lists)) == FOLLOWERS


def test_a_frequent_label_enters_a_full_list_and_its_count_is_about_right() -> None:
    drawn = np.random.default_rng(5)
    noise = drawn.integers(10_000, 15_000, 3000)
    lists = counted([label for label in range(1, FOLLOWERS + 1) for _ in range(6)])
    lists = counted([777 if drawn.random() < 0.2 else int(label) for label in noise], lists)
    found = dict(listed(lists))
    assert listed(lists)[0][0] == 777
    assert 450 <= found[777] <= 750


def test_whatever_noise_comes_counts_of_frequent_labels_stay_and_all_add_up() -> None:
    known = [label for label in range(1, FOLLOWERS) for _ in range(20)]
    lists = counted([*known, *range(10_000, 10_019)])
    assert listed(lists)[:-1] == listed(counted(known))
    assert sum(count for _, count in listed(lists)) == len(known) + 19


def test_counts_are_halved_when_there_are_as_many_as_a_list_may_have() -> None:
    labels = [5] * (MOST - 4) + [6, 6, 7]
    assert listed(counted(labels)) == [(5, MOST - 4), (6, 2), (7, 1)]
    lists = counted([*labels, 5])
    # What came next once long ago is forgotten.
    assert listed(lists) == [(5, (MOST - 3) // 2), (6, 1)]
    assert descends(lists)
    assert listed(counted([7], lists)) == [(5, (MOST - 3) // 2), (6, 1), (7, 1)]


def test_no_list_and_no_label_count_nothing() -> None:
    lists = Lists.empty(3)
    record(np.array([0, 1, 2, 2], np.int32), ids(5, 0, 6, 0), lists)
    assert [listed(lists, which) for which in range(3)] == [[], [], [(6, 1)]]
    record(np.empty(0, np.int32), ids(), lists)
    assert listed(lists, 2) == [(6, 1)]


def read(lists: Lists, labels: list[int], popular: list[int]) -> Succession:
    return succession(np.array([1], np.int32), lists, ids(*labels)[None], ids(*popular))


def test_an_own_label_wins_over_a_popular_one_and_that_over_a_successor() -> None:
    lists = counted([1] * 6 + [2] * 5 + [3] * 4 + [4] * 3)
    found = read(lists, labels=[9, 1, 2, 0], popular=[2, 3, 0])
    total = 6 + 5 + 4 + 3

    def said(count: int) -> list[int]:
        return [count, count * 256 // (1 + total)]

    assert found.recent_categories[0].tolist() == [[0, 0], said(6), said(5), [0, 0]]
    assert found.popular[0].tolist() == [[0, 0], said(4), [0, 0]]
    assert found.ids[0].tolist() == [4] + [0] * (SUCCESSORS - 1)
    assert found.successors[0].tolist() == [said(3)] + [[0, 0]] * (SUCCESSORS - 1)


def test_a_count_beyond_16_bits_is_the_largest_there_is() -> None:
    lists = counted([1])
    lists.counts[1, 0] = 70_000
    found = read(lists, labels=[1], popular=[2])
    assert found.recent_categories[0, 0].tolist() == [65_535, 70_000 * 256 // 70_001]


batches = st.tuples(st.integers(0, 2**32), st.integers(1, 12))


def many(seed: int, users: int) -> tuple[Array, Lists, Array, Array]:
    """Lists, which of them is each user's, labels and popular ones; some users are without either."""
    rng = np.random.default_rng(seed)
    lists = Lists.empty(4)
    record(rng.integers(1, 4, 400).astype(np.int32), rng.integers(1, 40, 400).astype(np.uint64), lists)
    labels = np.stack([rng.permutation(np.arange(1, 40))[:6] for _ in range(users)]).astype(np.uint64)
    labels[np.arange(6) >= rng.integers(0, 7, users)[:, None]] = 0
    at = np.where(labels[:, 0] != 0, rng.integers(0, 4, users), 0).astype(np.int32)
    popular = np.append(rng.permutation(np.arange(1, 40))[:5], 0).astype(np.uint64)
    return at, lists, labels, popular


@given(batches)
def test_a_follower_is_a_candidate_once_and_what_is_none_says_nothing(batch: tuple[int, int]) -> None:
    at, lists, labels, popular = many(*batch)
    found = succession(at, lists, labels, popular)
    for user, (place, own) in enumerate(zip(at.tolist(), labels.tolist(), strict=True)):
        counts = dict(listed(lists, place))
        chosen = found.ids[user].tolist()
        rest = [label for label, _ in listed(lists, place) if label not in own and label not in popular.tolist()]
        assert chosen == (rest + [0] * SUCCESSORS)[:SUCCESSORS]
        expected = [counts.get(label, 0) for label in own]
        assert found.recent_categories[user, :, 0].tolist() == expected
        expected = [0 if label in own else counts.get(label, 0) for label in popular.tolist()]
        assert found.popular[user, :, 0].tolist() == expected
        assert found.successors[user, :, 0].tolist() == [counts.get(label, 0) for label in chosen]
        assert not found.successors[user, found.ids[user] == 0].any()


@given(batches)
def test_a_users_answer_does_not_depend_on_who_else_asks(batch: tuple[int, int]) -> None:
    at, lists, labels, popular = many(*batch)
    together = succession(at, lists, labels, popular)
    order = np.random.default_rng(batch[0]).permutation(len(at))
    shuffled = succession(at[order], lists, labels[order], popular)
    alone = [succession(at[[user]], lists, labels[[user]], popular) for user in range(len(at))]
    for name, values in together._asdict().items():
        np.testing.assert_array_equal(getattr(shuffled, name), values[order])
        np.testing.assert_array_equal(np.concatenate([getattr(one, name) for one in alone]), values)


@pytest.mark.parametrize("count", [1, 3])
def test_nobody_asks_and_nothing_is_said(count: int) -> None:
    found = succession(np.empty(0, np.int32), Lists.empty(count), np.empty((0, 4), np.uint64), ids(1, 2))
    shapes = [part.shape for part in found]
    columns = len(COLUMNS)
    assert shapes == [(0, 4, columns), (0, 2, columns), (0, SUCCESSORS), (0, SUCCESSORS, columns)]


MOST_ID = (1 << 64) - 1
MOST_COUNT = (1 << 24) - 1

followers = st.lists(
    st.tuples(st.integers(1, MOST_ID), st.integers(1, MOST_COUNT)), max_size=FOLLOWERS, unique_by=lambda one: one[0]
)


def held(*lists: list[tuple[int, int]]) -> Lists:
    made = Lists.empty(len(lists))
    for place, one in enumerate(lists):
        for k, (follower, count) in enumerate(one):
            made.ids[place, k], made.counts[place, k] = follower, count
    return made


def plain(*lists: list[tuple[int, int]]) -> np.ndarray:
    return pack(held(*lists), np.zeros((len(lists), SIGN_BYTES), np.uint8))


@given(st.lists(followers, max_size=4), st.integers(0, 2**32))
def test_lists_and_the_bits_of_their_rows_come_back(lists: list[list[tuple[int, int]]], seed: int) -> None:
    signs = np.random.default_rng(seed).integers(0, 256, (len(lists), SIGN_BYTES)).astype(np.uint8)
    rows = pack(held(*lists), signs)
    again = unpack(rows)
    np.testing.assert_array_equal(again.counts, held(*lists).counts)
    np.testing.assert_array_equal(again.ids, held(*lists).ids)
    assert pack(again, signs_of(rows)).tobytes() == rows.tobytes()
    # No sign says anything, and none stands before anything but a zero behind the list's end.
    np.testing.assert_array_equal(rows, plain(*lists))
    assert not np.signbit(rows[rows != 0]).any()


def test_a_row_is_what_0_1_0_wrote() -> None:
    row = plain([((5 << 42) + (6 << 21) + 7, 9), (MOST_ID, 1)])[0]
    expected = np.zeros((4, FOLLOWERS))
    expected[:, 0] = 9, 5, 6, 7
    expected[:, 1] = 1, (1 << 22) - 1, (1 << 21) - 1, (1 << 21) - 1
    assert row.dtype == np.float32 and row.tobytes() == expected.astype("<f4").tobytes()


@pytest.mark.parametrize("corner", [MOST_ID, 1, 1 << 63, 1 << 42, (1 << 42) - 1, 1 << 21, (1 << 21) - 1])
def test_the_smallest_and_the_largest_part_of_an_id_come_back(corner: int) -> None:
    assert unpack(plain([(corner, 3)])).ids[0, :2].tolist() == [corner, 0]


def test_a_sign_stands_where_it_stood_and_goes_with_its_zero() -> None:
    rows = plain([(8, 4)], [])
    rows[0, FOLLOWERS - 1] = rows[0, 2 * FOLLOWERS + 1] = rows[1, 0] = -0.0
    signs = signs_of(rows)
    assert pack(unpack(rows), signs).tobytes() == rows.tobytes()
    longer = pack(held([(8, 4), (9, 3)], [(9, 3)]), signs)
    assert np.argwhere(np.signbit(longer)).tolist() == [[0, FOLLOWERS - 1]]


def test_a_stored_row_of_another_width_is_as_none() -> None:
    row = plain([(8, 4)])
    narrow = row[:, : WIDTH - 4].tobytes()
    at, lists = from_stored([narrow, row.tobytes(), None, row.tobytes()])
    assert at.tolist() == [0, 1, 0, 2]
    assert lists.ids[:, 0].tolist() == [0, 8, 8] and not lists.counts[0].any()
    at, lists = from_stored([])
    assert at.size == 0 and not lists.counts.any()
