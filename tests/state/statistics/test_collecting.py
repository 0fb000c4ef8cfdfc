"""Statistics of rows: exact where they are small, the same however the rows are cut, and without a user's id."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from state.microbatch.batch import Kind
from state.statistics.collecting import (
    BUCKETS,
    SHARES,
    WHOLE,
    Categorical,
    Numeric,
    Statistics,
    as_list,
    by_name,
    common,
    dataset,
    frequencies,
    median,
    of_bytes,
)
from tests.state.statistics.made_rows import ATTRIBUTES, CATEGORIES, CONTEXT, NAMES, columns, statistics

NUMBERS = st.lists(st.integers(0, 65_535), min_size=1, max_size=60)


@settings(max_examples=30, deadline=None)
@given(NUMBERS)
def test_numbers_are_counted_as_numpy_counts_them(values: list[int]) -> None:
    counted = Numeric(1)
    counted.add(np.array(values, np.uint16).reshape(-1, 1))
    assert counted.counts[0].tolist() == np.histogram(values, bins=WHOLE)[0].tolist()
    assert counted.total[0] == sum(values)
    assert counted.squares[0] == sum(value * value for value in values)
    assert (counted.least[0], counted.most[0]) == (min(values), max(values))
    # Of the middle no more is known than its bucket.
    number = min(int(np.searchsorted(WHOLE, median(counted.counts[0], WHOLE), side="right")) - 1, len(WHOLE) - 2)
    assert sum(value < WHOLE[number] for value in values) <= len(values) / 2
    assert sum(value < WHOLE[number + 1] for value in values) >= len(values) / 2


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(st.floats(0, 1, width=32), st.just(float("nan"))), max_size=40))
def test_shares_are_counted_and_no_number_is_missing(values: list[float]) -> None:
    counted = Numeric(1, SHARES)
    counted.add_reals(np.array(values, np.float64))
    there = [value for value in values if value == value]
    assert counted.counts[0].tolist() == np.histogram(there, bins=SHARES)[0].tolist()
    assert (counted.rows, counted.missing[0]) == (len(values), len(values) - len(there))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=200), st.integers(0, 200))
def test_ids_are_counted_exactly_however_they_are_cut(ids: list[int], at: int) -> None:
    whole, first, second = Categorical(), Categorical(), Categorical()
    taken = np.array(ids, np.uint64)
    whole.add(taken)
    first.add(taken[:at])
    second.add(taken[at:])
    first.merge(second)
    expected = sorted(((one, float(ids.count(one))) for one in {*ids} - {0}), key=lambda entry: (-entry[1], entry[0]))
    assert whole.frequent() == first.frequent() == expected
    assert whole.missing == first.missing == ids.count(0)
    assert whole.distinct == first.distinct == len({*ids} - {0})


def test_of_very_many_ids_the_frequent_ones_stay_and_their_number_is_about_right() -> None:
    drawn = np.random.default_rng(1)
    counted = Categorical()
    for _ in range(10):
        rare = drawn.integers(1 << 32, 1 << 63, 3000).astype(np.uint64)
        counted.add(np.concatenate([rare, np.full(300, 7, np.uint64)]))
    (first, count), *_ = counted.frequent(1)
    assert first == 7
    # Misra-Gries counts at most so much too little.
    assert 3000 - 33_000 / BUCKETS <= count <= 3000
    assert abs(counted.distinct / 30_001 - 1) < 0.1


def test_parts_merged_are_the_whole() -> None:
    parts = [columns(300, seed=seed) for seed in range(4)]
    first, second = statistics(*parts[:1]), statistics(*parts[1:])
    first.merge(second)
    whole = statistics(*parts)
    # A sum of reals alone depends on its order.
    np.testing.assert_allclose(first.label.total, whole.label.total)
    for one in (first, whole):
        one.label.total[:], one.label.squares[:] = 0, 0
    assert dataset(first, "a") == dataset(whole, "a")


def test_what_is_not_known_of_a_user_is_missing() -> None:
    found = by_name(dataset(statistics(columns(1000, known=0.7)), "a"))["user_attributes.age_band"]
    assert 0.25 < common(found).num_missing / 1000 < 0.35
    assert len(frequencies(found)) == 2


def test_an_event_counts_where_it_happened_and_its_label_where_it_became_known() -> None:
    rows = columns(6)
    rows["kind"] = np.array([Kind.ROW, Kind.OPENED, Kind.DROPPED, Kind.FEEDBACK, Kind.JOINED, Kind.EXPIRED], np.uint8)
    rows["label"] = np.array([0.5, np.nan, np.nan, np.nan, 1, 0], np.float32)
    rows["delay_ms"] = np.array([0, 0, 0, 0, 90_500, 10_000_000_000], np.int64)
    found = by_name(dataset(statistics(rows), "a"))
    assert sum(frequencies(found["category"]).values()) == 4
    assert common(found["features.gap.1"]).num_non_missing == 4
    assert (found["label"].num_stats.mean, common(found["label"]).num_non_missing) == (0.5, 3)
    assert (found["delay_s"].num_stats.min, found["delay_s"].num_stats.max) == (0, 65_535)


def test_the_protos_say_what_was_counted_and_are_read_back() -> None:
    rows = columns(1000)
    made = dataset(statistics(rows), "window")
    assert of_bytes(as_list(made).SerializeToString()) == made
    found = by_name(made)
    assert {*found} == {
        *("action", "category", "item", "user", "label", "delay_s", "context.device"),
        *("user_attributes.age_band", "item_attributes.brand"),
        *(f"features.{name}" for name in NAMES),
    }
    first = found["features.view.count_1h"].num_stats
    values = rows["features"][:, 0].astype(np.float64)
    np.testing.assert_allclose([first.mean, first.std_dev], [values.mean(), values.std()])
    assert (first.min, first.max, first.num_zeros) == (values.min(), values.max(), (values == 0).sum())
    assert abs(first.median - np.median(values)) <= 1
    assert sum(bucket.sample_count for bucket in first.histograms[0].buckets) == 1000
    named = {f"{one:016x}" for one in CATEGORIES.tolist()}
    assert {*frequencies(found["category"])} <= named
    assert {*frequencies(found["action"])} == {"view", "cart"}


def test_no_user_is_named() -> None:
    rows = columns(500)
    rows["user"] += np.uint64(0xABCDEF0123400000)
    counted = statistics(rows)
    found = by_name(dataset(counted, "a"))["user"].string_stats
    assert found.unique == len(np.unique(rows["user"]))
    assert not found.top_values and not found.rank_histogram.buckets
    assert b"abcdef01234" not in as_list(dataset(counted, "a")).SerializeToString()


def test_rows_without_any_value_are_statistics_too() -> None:
    nothing = Statistics(("view",), NAMES, CONTEXT)
    assert dataset(nothing, "a").num_examples == 0
    nothing.add(columns(0), ATTRIBUTES)
    assert dataset(nothing, "a").num_examples == 0
