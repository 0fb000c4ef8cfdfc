"""Anomalies: rows like those of the baseline have none, and each kind of fault is found, with its name and its numbers."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from tensorflow_metadata.proto.v0 import schema_pb2
from tensorflow_metadata.proto.v0.anomalies_pb2 import Anomalies, AnomalyInfo
from tensorflow_metadata.proto.v0.statistics_pb2 import DatasetFeatureStatistics

from state.events.identity import public_id
from state.statistics.anomalies import validate
from state.statistics.protos import by_name, dataset
from state.statistics.schema import as_text, infer, of_text
from tests.state.statistics.made_rows import ATTRIBUTES, CATEGORIES, columns, statistics


def window(**changes: Any) -> DatasetFeatureStatistics:
    """Statistics of 4,000 rows that are drawn as `columns` draws them."""
    return dataset(statistics(columns(4000, **({"seed": 1} | changes))), "window")


BASELINE = dataset(statistics(columns(4000)), "baseline")
SCHEMA = infer(BASELINE, warm=True)


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
    schema = infer(shifted, warm=True)
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
    schema = infer(BASELINE, warm=False)
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

    schema = infer(drawn(1, 2000), warm=True)
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
    old = infer(dataset(without, "old"), warm=True)
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
    assert of_text(as_text(SCHEMA)) == SCHEMA
    strict = of_text(as_text(SCHEMA).replace("threshold: 0.1", "threshold: 0.0"))
    assert "category" in found(validate(window(), strict, BASELINE))
    with pytest.raises(ValueError, match="no Schema of TensorFlow Metadata"):
        of_text("feature {")


def test_no_user_and_no_item_is_in_the_schema() -> None:
    by_feature = {feature.name: feature for feature in SCHEMA.feature}
    for name in ("user", "item"):
        assert not by_feature[name].HasField("string_domain")
        assert by_feature[name].type == schema_pb2.BYTES
