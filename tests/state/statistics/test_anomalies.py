"""Anomalies of a window against a schema, and the distances behind them."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow_metadata.proto.v0 import schema_pb2
from tensorflow_metadata.proto.v0.anomalies_pb2 import Anomalies, AnomalyInfo
from tensorflow_metadata.proto.v0.statistics_pb2 import DatasetFeatureStatistics

from state.events.identity import public_id
from state.statistics.anomalies import aligned, jensen_shannon, l_infinity, validate
from state.statistics.baselines import infer_schema, schema_of, schema_text
from state.statistics.collecting import by_name, dataset
from tests.state.statistics.made_rows import ATTRIBUTES, CATEGORIES, columns, statistics


def window(**changes: Any) -> DatasetFeatureStatistics:
    """Statistics of 4,000 rows that are drawn as `columns` draws them."""
    return dataset(statistics(columns(4000, **({"seed": 1} | changes))), "window")


BASELINE = dataset(statistics(columns(4000)), "baseline")
SCHEMA = infer_schema(BASELINE, warm=True)


def found(anomalies: Anomalies) -> dict[str, set[str]]:
    """The names of what is wrong, by feature."""
    return {
        name: {AnomalyInfo.Type.Name(reason.type) for reason in info.reason}
        for name, info in anomalies.anomaly_info.items()
    }


def test_rows_drawn_alike_have_no_anomaly() -> None:
    for seed in range(1, 6):
        assert found(validate(window(seed=seed), SCHEMA, BASELINE, window(seed=seed + 10))) == {}
    assert found(validate(BASELINE, SCHEMA, BASELINE, BASELINE)) == {}


def test_a_category_that_takes_over_is_named_with_its_distance() -> None:
    anomalies = validate(window(hot=0.4), SCHEMA, BASELINE, BASELINE)
    assert found(anomalies) == {"category": {"COMPARATOR_L_INFTY_HIGH"}}
    info = anomalies.anomaly_info["category"]
    assert [reason.short_description for reason in info.reason] == [
        "High L-infinity distance from the baseline",
        "High L-infinity distance from the window before",
    ]
    assert f"the share of {CATEGORIES[0]:016x} differs most" in info.description


def test_a_shift_is_drift_from_the_window_before_only_where_it_happens() -> None:
    shifted, after = window(hot=0.4), window(hot=0.4, seed=2)
    schema = infer_schema(shifted, warm=True)
    assert found(validate(after, schema, shifted, window())) == {"category": {"COMPARATOR_L_INFTY_HIGH"}}
    assert found(validate(after, schema, shifted, shifted)) == {}


def test_a_missing_attribute_is_found_where_it_lacks_in_part_and_where_it_lacks_wholly() -> None:
    assert found(validate(window(known=0.85), SCHEMA, BASELINE)) == {
        "user_attributes.age_band": {"FEATURE_TYPE_LOW_FRACTION_PRESENT"}
    }
    assert found(validate(window(known=0.0), SCHEMA, BASELINE)) == {
        "user_attributes.age_band": {"SCHEMA_MISSING_COLUMN"}
    }
    assert found(validate(window(known=0.95), SCHEMA, BASELINE)) == {}


def test_a_rescaled_feature_diverges() -> None:
    anomalies = validate(window(scale=3.0), SCHEMA, BASELINE, BASELINE)
    assert found(anomalies) == {"features.view.count_1h": {"COMPARATOR_JENSEN_SHANNON_DIVERGENCE_HIGH"}}
    assert "above 0.1" in anomalies.anomaly_info["features.view.count_1h"].description


def test_a_feature_that_is_rescaled_diverges_from_the_window_before_while_histories_are_cold() -> None:
    schema = infer_schema(BASELINE, warm=False)
    assert found(validate(window(scale=3.0), schema, BASELINE)) == {}
    assert [*found(validate(window(scale=3.0), schema, BASELINE, window()))] == ["features.view.count_1h"]


def test_new_values_are_found_beyond_what_the_domain_allows() -> None:
    def with_new(share: float) -> DatasetFeatureStatistics:
        rows = columns(4000, seed=1)
        new = np.random.default_rng(5).random(4000) < share
        rows["category"][new] = [public_id(f"new{number % 40}") for number in range(int(new.sum()))]
        return dataset(statistics(rows), "window")

    assert found(validate(with_new(0.05), SCHEMA)) == {}
    anomalies = validate(with_new(0.15), SCHEMA)
    assert found(anomalies) == {"category": {"ENUM_TYPE_UNEXPECTED_STRING_VALUES"}}
    words = anomalies.anomaly_info["category"].description
    assert re.match(r"40 values that the schema does not know make 1[56]\.\d% of all, 10\.0% are allowed: ", words)


def test_as_many_new_categories_are_allowed_as_are_to_be_expected() -> None:
    """Of a small sample of many categories much was seen once: as much will be new."""

    def drawn(seed: int, rows: int) -> DatasetFeatureStatistics:
        made = columns(rows, seed=seed)
        values = np.random.default_rng(seed).zipf(1.2, rows) % 5000
        made["category"] = (values + 1).astype(np.uint64)
        return dataset(statistics(made), "many")

    schema = infer_schema(drawn(1, 2000), warm=True)
    assert "category" not in found(validate(drawn(2, 20_000), schema))


def test_numbers_outside_their_domain_are_found() -> None:
    rows = columns(2000, seed=1)
    rows["features"][7, 1] = 256  # a gap is a recency, at most 255
    rows["label"][3] = 1.5
    assert found(validate(dataset(statistics(rows), "window"), SCHEMA)) == {
        "features.gap.1": {"INT_TYPE_BIG_INT"},
        "label": {"FLOAT_TYPE_BIG_FLOAT"},
    }
    rows = columns(2000, seed=1)
    rows["label"][3] = -0.5
    assert found(validate(dataset(statistics(rows), "window"), SCHEMA)) == {"label": {"FLOAT_TYPE_SMALL_FLOAT"}}


def test_another_type_is_found() -> None:
    statistics_of_text = DatasetFeatureStatistics.FromString(window().SerializeToString())
    label = by_name(statistics_of_text)["label"]
    label.type = label.INT
    assert found(validate(statistics_of_text, SCHEMA)) == {"label": {"UNEXPECTED_DATA_TYPE"}}


def test_what_the_baseline_does_not_know_is_a_warning_and_what_it_knows_and_is_gone_an_error() -> None:
    rows = columns(2000, seed=1)
    without = statistics()
    without.add(rows, ((), ATTRIBUTES[1]))
    old = infer_schema(dataset(without, "old"), warm=True)
    anomalies = validate(window(), old)
    assert found(anomalies) == {"user_attributes.age_band": {"SCHEMA_NEW_COLUMN"}}
    assert anomalies.anomaly_info["user_attributes.age_band"].severity == AnomalyInfo.WARNING
    gone = validate(dataset(without, "window"), SCHEMA)
    assert found(gone) == {"user_attributes.age_band": {"SCHEMA_MISSING_COLUMN"}}
    assert gone.anomaly_info["user_attributes.age_band"].severity == AnomalyInfo.ERROR


def test_every_distance_is_told_with_its_threshold() -> None:
    anomalies = validate(window(), SCHEMA, BASELINE, BASELINE)
    measured = {one.path.step[0]: one for one in anomalies.drift_skew_info}
    assert {*measured} == {feature.name for feature in SCHEMA.feature if feature.HasField("skew_comparator")}
    for one in measured.values():
        assert one.skew_measurements[0].value == one.drift_measurements[0].value <= one.skew_measurements[0].threshold


def test_a_schema_is_read_back_from_its_text_and_its_thresholds_count() -> None:
    assert schema_of(schema_text(SCHEMA)) == SCHEMA
    strict = schema_of(schema_text(SCHEMA).replace("threshold: 0.1", "threshold: 0.0"))
    assert "category" in found(validate(window(), strict, BASELINE))
    with pytest.raises(ValueError, match="no Schema of TensorFlow Metadata"):
        schema_of("feature {")


def test_no_user_and_no_item_is_in_the_schema() -> None:
    by_feature = {feature.name: feature for feature in SCHEMA.feature}
    for name in ("user", "item"):
        assert not by_feature[name].HasField("string_domain")
        assert by_feature[name].type == schema_pb2.BYTES


COUNTS = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 1000), min_size=1)
PAIRS = st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), min_size=1, max_size=20).filter(
    lambda pairs: any(one for one, _ in pairs) and any(other for _, other in pairs)
)


@settings(max_examples=30, deadline=None)
@given(COUNTS, COUNTS)
def test_l_infinity_is_the_largest_difference_of_shares(one: dict[str, int], other: dict[str, int]) -> None:
    shares = [{key: value / sum(counts.values()) for key, value in counts.items()} for counts in (one, other)]
    differences = {key: abs(shares[0].get(key, 0) - shares[1].get(key, 0)) for key in {*one, *other}}
    found = l_infinity(one, other)
    assert found.distance == pytest.approx(max(differences.values()))
    assert differences[found.value] == pytest.approx(found.distance)
    assert l_infinity(other, one) == found
    assert l_infinity(one, {key: 3 * value for key, value in one.items()}).distance == pytest.approx(0)


@settings(max_examples=30, deadline=None)
@given(PAIRS)
def test_jensen_shannon_is_what_entropies_say(pairs: list[tuple[int, int]]) -> None:
    """JSD(P, Q) = H((P + Q) / 2) - (H(P) + H(Q)) / 2, another form of it (Lin, 1991, equation 5.1)."""
    p, q = ([value / sum(values) for value in values] for values in zip(*pairs, strict=True))

    def entropy(shares: list[float]) -> float:
        return -sum(share * math.log2(share) for share in shares if share)

    expected = entropy([(a + b) / 2 for a, b in zip(p, q, strict=True)]) - (entropy(p) + entropy(q)) / 2
    found = jensen_shannon(*np.array(pairs, np.float64).T)
    assert found == pytest.approx(expected, abs=1e-9)
    assert 0 <= found <= 1
    assert jensen_shannon(*np.array(pairs, np.float64).T[::-1]) == pytest.approx(found, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(PAIRS)
def test_a_divergence_of_nothing_in_common_is_one(pairs: list[tuple[int, int]]) -> None:
    one, other = np.array(pairs, np.float64).T
    nothing = np.zeros(len(pairs))
    apart = jensen_shannon(np.concatenate([one, nothing]), np.concatenate([nothing, other]))
    assert apart == pytest.approx(1)


def test_no_values_have_no_distance() -> None:
    with pytest.raises(ValueError, match="values on both sides"):
        l_infinity({}, {"a": 1})
    with pytest.raises(ValueError, match="counts on both sides"):
        jensen_shannon(np.zeros(2), np.ones(2))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=3, max_size=8, unique=True), st.lists(st.integers(0, 50), max_size=5))
def test_histograms_keep_their_counts_when_they_are_aligned(bounds: list[int], more: list[int]) -> None:
    edges, finer = sorted(bounds), sorted({*bounds, *more})
    one = {(float(low), float(high)): float(high - low) for low, high in itertools.pairwise(edges)}
    other = {(float(low), float(high)): float(high - low) for low, high in itertools.pairwise(finer)}
    left, right = aligned(one, other)
    # Both say that values are spread evenly, one over wider buckets.
    assert left.sum() == pytest.approx(sum(one.values())) and right.sum() == pytest.approx(sum(other.values()))
    inside = [edges[0] <= low < edges[-1] for low in finer[:-1]]
    np.testing.assert_allclose(left[inside], right[inside])


def test_single_points_stand_beside_the_buckets() -> None:
    left, right = aligned({(3.0, 3.0): 5.0, (0.0, 4.0): 8.0}, {(0.0, 4.0): 1.0})
    assert left.tolist() == [8.0, 5.0] and right.tolist() == [1.0, 0.0]
