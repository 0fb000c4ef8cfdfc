"""Each baseline on a hand-made stream with a known answer."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from evaluation import baselines
from evaluation.baselines import (
    HOUR_MS,
    RATE_OF_ITEM,
    RATE_SO_FAR,
    CategoryBaseline,
    CategoryRows,
    ClickRates,
    ItemBaseline,
    ItemClick,
    ItemNeighbours,
    LastCategory,
    Ordered,
    OwnItems,
    PopularCategories,
    PopularItems,
    PreviousCategories,
    UserPast,
)

DAY_MS = 24 * HOUR_MS


def after(baseline: ItemBaseline, clicks: list[tuple[str, int, int, int]]) -> dict[str, UserPast]:
    """Users' pasts after clicks (user, item, category, time), which the baseline has learned."""
    users: dict[str, UserPast] = {}
    for user, item, category, at_ms in clicks:
        past = users.setdefault(user, UserPast())
        baseline.learn(ItemClick(item, category, at_ms), past)
        past.items.append(item)
        past.seen.add(item)
        past.category = category
        past.clicks += 1
    return users


def test_popular_so_far_counts_all_clicks() -> None:
    baseline = PopularItems("popular so far")
    after(baseline, [("a", 1, 9, 0), ("b", 2, 9, 1), ("c", 2, 9, 2), ("a", 3, 9, DAY_MS)])
    assert [*baseline.propose(UserPast())] == [2, 1, 3]


def test_popular_now_forgets_old_clicks_and_prefers_items_that_are_new_to_the_user() -> None:
    baseline = PopularItems("popular now", HOUR_MS, new_first=True)
    users = after(baseline, [("a", 1, 9, 1), ("b", 1, 9, 2), ("c", 1, 9, 3), ("a", 2, 9, 3 * HOUR_MS)])
    # Three clicks of three hours ago count 3/8.
    assert [*baseline.propose(UserPast())] == [2, 1]
    assert [*baseline.propose(users["a"])] == [2, 1]
    assert [*baseline.propose(users["b"])] == [2, 1]
    after(baseline, [("d", 3, 9, 3 * HOUR_MS), ("d", 3, 9, 3 * HOUR_MS)])
    assert [*baseline.propose(users["a"])] == [3, 2, 1]


def test_popular_now_keeps_its_order_over_years() -> None:
    baseline = PopularItems("popular now", HOUR_MS)
    clicks = [("a", item, 9, 1 + day * DAY_MS) for day, item in enumerate([1, 2, 3, 1] * 200)]
    after(baseline, clicks)
    assert [*baseline.propose(UserPast())] == [1, 3, 2]


def test_last_category_proposes_the_most_clicked_items_of_it() -> None:
    baseline = LastCategory()
    users = after(baseline, [("a", 1, 8, 0), ("b", 2, 8, 0), ("b", 2, 8, 0), ("b", 3, 9, 0)])
    assert [*baseline.propose(users["a"])] == [2, 1]
    assert [*baseline.propose(users["b"])] == [3]
    assert [*baseline.propose(UserPast())] == []


def test_own_items_are_in_order_of_recency_and_visits() -> None:
    baseline = OwnItems()
    users = after(baseline, [("a", item, 9, 0) for item in (1, 1, 2, 3)])
    # 1 counts 1/sqrt(3) + 1/sqrt(4), 3 counts 1, 2 counts 1/sqrt(2).
    assert [*baseline.propose(users["a"])] == [1, 3, 2]


def test_neighbours_are_items_that_others_clicked_next_to_the_latest_ones() -> None:
    baseline = ItemNeighbours()
    others = [("b", 1, 9, 0), ("b", 2, 9, 1), ("c", 1, 9, 2), ("c", 2, 9, 3), ("d", 1, 9, 4), ("d", 4, 9, 5)]
    # Item 4 is popular with everybody, so that a visit next to item 1 says little.
    noise = [(f"n{number}", 4, 9, 6) for number in range(20)]
    users = after(baseline, [*others, *noise, ("a", 1, 9, 10)])
    assert [*baseline.propose(users["a"])] == [2, 4]
    assert [*baseline.propose(UserPast())] == []


def test_neighbours_of_an_item_are_bounded_and_the_most_frequent_ones_stay() -> None:
    baseline = ItemNeighbours()
    often = [click for n in range(3) for click in ((f"o{n}", 1, 9, 0), (f"o{n}", 2, 9, 0))]
    rare = [click for n in range(600) for click in ((f"r{n}", 1, 9, 0), (f"r{n}", 100 + n, 9, 0))]
    users = after(baseline, [*often, *rare, ("a", 1, 9, 0)])
    proposed = [*baseline.propose(users["a"])]
    assert 2 in proposed and len(proposed) <= 2 * baselines.NEIGHBOURS


def test_an_ordered_list_equals_a_sort() -> None:
    random, ordered, counts = np.random.default_rng(3), Ordered(10), np.zeros(50)
    for item, weight in zip(random.integers(0, 50, 3000).tolist(), random.random(3000).tolist(), strict=True):
        ordered.add(item, weight)
        counts[item] += weight
    assert ordered.best == np.argsort(-counts)[:10].tolist()


def rows(categories: list[int], recent: list[list[int]] | None = None, at_ms: list[int] | None = None) -> CategoryRows:
    size = len(categories)
    padded = np.full((size, 5), -1, np.int64)
    for row, own in enumerate(recent or []):
        padded[row, : len(own)] = own
    return CategoryRows(np.array(categories), padded, np.array(at_ms or range(1, size + 1), np.int64))


def shares(baseline: CategoryBaseline, given: CategoryRows) -> list[tuple[int, float]]:
    predicted = baseline.predict(given, 10)
    return [
        (rank, round(float(np.exp(share)), 3))
        for rank, share in zip(predicted.rank.tolist(), predicted.log_share.tolist(), strict=True)
    ]


def test_popular_categories_predict_by_the_clicks_before() -> None:
    found = shares(PopularCategories("popular so far"), rows([7, 7, 5, 7, 5]))
    assert found == [(-1, 1.0), (0, 1.0), (-1, 1.0), (0, 0.667), (1, 0.25)]


def test_popular_categories_halve() -> None:
    times = [1, 2, HOUR_MS + 1, HOUR_MS + 1, HOUR_MS + 1]
    found = shares(PopularCategories("now", HOUR_MS), rows([7, 7, 5, 5, 7], at_ms=times))
    # Two clicks of an hour ago count as much as one.
    assert found[3:] == [(1, 0.5), (1, 0.333)]


def test_popular_categories_survive_the_division_of_their_counts() -> None:
    baseline = PopularCategories("now", 1000.0)
    found = shares(baseline, rows([1, 2, 2, 1, 1], at_ms=[1, 2, 10_000_000, 10_000_001, 10_000_002]))
    assert found[2] == (0, 0.5) and [rank for rank, _ in found[3:]] == [1, 0]
    late_ms = 10_000_000 + 250_000
    baseline = PopularCategories("now", 1000.0)
    predicted = baseline.predict(rows([1, 2, 2, 2, 1], at_ms=[1, 2, 10_000_000, late_ms, late_ms]), 10)
    # As a share it would be 0, and the log loss of the baseline infinite.
    assert predicted.rank[-1] == 1 and -900.0 < predicted.log_share[-1] < -800.0


def test_previous_categories_are_the_users_latest_ones() -> None:
    baseline = PreviousCategories()
    found = baseline.predict(rows([3, 4, 9], [[3, 4], [3, 4], []]), 10)
    assert found.rank.tolist() == [0, 1, -1]
    assert found.candidates.tolist() == [2, 2, 0]
    # The places were right equally often so far.
    assert np.exp(found.log_share[:2]).tolist() == pytest.approx([0.5, 0.5])
    assert np.exp(baseline.predict(rows([3], [[3]]), 10).log_share[0]) == pytest.approx(1.0)


def test_click_rates_are_of_the_rows_before() -> None:
    rates, day = ClickRates(), DAY_MS
    items, clicked = np.array([0, 0, 1, 0]), np.array([True, True, False, False])
    found = rates.predict(items, clicked, np.array([0, 0, 0, day]), 2)
    # All of them begin at one half of one row.
    assert found[RATE_SO_FAR].tolist() == pytest.approx([0.5, 1.5 / 2, 2.5 / 3, 2.5 / 4])
    # A day later the two clicks of the item count as one of one row; ten rows have the rate of all items.
    assert found[RATE_OF_ITEM][3] == pytest.approx((1 + 10 * 2.5 / 4) / (1 + 10))


def test_every_baseline_proposes_each_item_once() -> None:
    random = np.random.default_rng(1)
    clicks = [
        (f"u{user}", int(item), int(item) % 3, at) for at, (user, item) in enumerate(random.integers(1, 9, (300, 2)))
    ]
    for baseline in baselines.item_baselines():
        users = after(baseline, clicks)
        proposed = [*islice(baseline.propose(users["u1"]), 20)]
        assert len(proposed) == len({*proposed}) > 0, baseline.name
