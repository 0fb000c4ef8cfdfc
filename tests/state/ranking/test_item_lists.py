"""Item lists count as a naive computation does, within their bounds."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from state.compiled import compiled
from state.ranking.item_lists import (
    CLICKED,
    ENTRIES,
    HALF_LIVES_S,
    LIVES,
    ItemLists,
    count_click,
    count_visits,
    from_stored,
    pack,
    width,
)


@compiled("u8[::1], i8[::1], ItemLists")
def count_clicks(items: np.ndarray, at_s: np.ndarray, lists: ItemLists) -> None:
    for k in range(items.shape[0]):
        count_click(0, items[k], at_s[k], lists)


def naive(items: np.ndarray, at_s: np.ndarray) -> dict[int, np.ndarray]:
    """By item, its decayed clicks at the time of the last click."""
    found: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(LIVES))
    for item, then_s in zip(items.tolist(), at_s.tolist(), strict=True):
        found[item] += 2.0 ** (-(at_s[-1] - then_s) / np.array(HALF_LIVES_S))
    return found


def clicks(count: int, kinds: int) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(3)
    return chance.integers(1, 1 + kinds, count).astype(np.uint64), np.sort(chance.integers(0, 40_000, count))


def test_counts_are_decayed_clicks_while_all_items_fit() -> None:
    items, at_s = clicks(500, ENTRIES[CLICKED])
    lists = ItemLists.empty(1, ENTRIES[CLICKED])
    count_clicks(items, at_s, lists)
    wanted = naive(items, at_s)
    assert {*lists.ids[0].tolist()} == {*wanted}
    for item, counts in zip(lists.ids[0].tolist(), lists.counts[0].T, strict=True):
        np.testing.assert_allclose(counts, wanted[item], rtol=1e-3)
    np.testing.assert_allclose(lists.totals[0], sum(wanted.values()), rtol=1e-3)
    first = [int(at_s[items == item][0]) for item in lists.ids[0]]
    assert lists.ages[0].tolist() == [at_s[-1] - then_s for then_s in first]


def test_a_full_list_keeps_what_is_clicked_now() -> None:
    items, at_s = clicks(4000, 1000)
    busy = np.arange(4000) % 4 == 0
    items[busy] = 5000 + (np.arange(4000) // 400)[busy].astype(np.uint64)
    lists = ItemLists.empty(1, ENTRIES[CLICKED])
    count_clicks(items, at_s, lists)
    assert 5009 in lists.ids[0].tolist() and len({*lists.ids[0].tolist()}) == ENTRIES[CLICKED]
    # Replacing an entry keeps the sum of the counts that decide about it.
    np.testing.assert_allclose(lists.counts[0, 1].sum(), lists.totals[0, 1], rtol=1e-3)


def test_a_users_list_has_the_newest_items_first_and_counts_repeats() -> None:
    lists = ItemLists.empty(1, 4)
    items = np.array([1, 2, 3, 2, 4, 5, 0], np.uint64)
    count_visits(items, np.full(7, 9), 0, lists)
    assert lists.ids[0].tolist() == [5, 4, 2, 3]
    assert lists.totals[0].tolist() == [6, 6, 6] and lists.known[0].tolist() == [1, 1, 1]
    assert lists.counts[0, 0].tolist() == [1, 1, 2, 1]
    count_visits(np.array([2], np.uint64), np.array([29]), 0, lists)
    assert lists.ids[0].tolist() == [2, 5, 4, 3] and lists.ages[0].tolist() == [20, 20, 20, 20]


def test_a_row_of_another_width_is_an_empty_list() -> None:
    lists = ItemLists.empty(1, 16)
    count_visits(np.array([1 << 63], np.uint64), np.array([1_800_000_000]), 0, lists)
    found = from_stored([None, pack(lists).tobytes(), bytes(12)], 16)
    assert found.ids[:, 0].tolist() == [0, 1 << 63, 0] and found.at_s.tolist() == [0, 1_800_000_000, 0]
    assert pack(lists).shape == (1, width(16))
