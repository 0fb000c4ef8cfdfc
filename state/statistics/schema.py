"""Infers a schema from a baseline's statistics: types, domains, presence, and allowed distance of a window."""

from __future__ import annotations

from google.protobuf import text_format
from tensorflow_metadata.proto.v0 import schema_pb2
from tensorflow_metadata.proto.v0.schema_pb2 import Schema
from tensorflow_metadata.proto.v0.statistics_pb2 import DatasetFeatureStatistics, FeatureNameStatistics

from state.statistics.collecting import DELAY, FEATURES, ITEM, LABEL, USER
from state.statistics.protos import common, frequencies

LARGEST = 65_535
# Thresholds of a new schema; an operator edits them in `schema.pbtxt`, see `springtide schema accept --schema`.
MISSING_SHARE = 0.1  # increase of the share of missing values over the baseline
NEW_VALUES_SHARE = 0.1  # share of values of a categorical feature that the baseline does not contain
MAX_L_INFINITY = 0.1  # largest change in the share of a value of a categorical feature
MAX_DIVERGENCE = 0.1  # Jensen-Shannon divergence of a numeric feature, bits
_BOUNDS = {"is_last": 1, "truncated": 1, "same_label": 1, "recency": 255, "age": 255, "oldest": 255}
"""By the last part of a feature's name: the largest value that the kernel writes, if it is not 65,535."""


def infer(statistics: DatasetFeatureStatistics, warm: bool) -> Schema:
    """Infers the schema of the statistics of a baseline.

    `warm` is whether windows were full. Only then are their integers also compared with the baseline, because a
    bootstrap's histories begin with its first click.
    """
    schema = Schema()
    for observed in statistics.features:
        name, statistics_of = observed.path.step[0], common(observed)
        feature = schema.feature.add(name=name)
        rows = statistics_of.num_non_missing + statistics_of.num_missing
        present = statistics_of.num_non_missing / rows if rows else 0.0
        feature.value_count.min = feature.value_count.max = 1
        # A feature that was present only occasionally may be absent.
        feature.presence.min_fraction = max(0.0, round(present - MISSING_SHARE, 6))
        if observed.HasField("string_stats"):
            feature.type = schema_pb2.BYTES
            _categorical(feature, observed)
        else:
            feature.type = schema_pb2.FLOAT if observed.type == FeatureNameStatistics.FLOAT else schema_pb2.INT
            _numeric(feature, name, warm)
    return schema


def bounds(name: str) -> tuple[int, int]:
    """The minimum and maximum value that a feature of the spec can have.

    >>> bounds("features.view.recency"), bounds("features.gap.1"), bounds("features.view.count_1h")
    ((0, 255), (0, 255), (0, 65535))
    """
    words = name.split(".")
    if words[1] == "gap":
        return 0, 255
    if words[1] == "clock":
        return 0, 2000
    if words[-1].startswith("top_share"):
        return 0, 1000
    return 0, _BOUNDS.get(words[-1], LARGEST)


def as_text(schema: Schema) -> str:
    """Formats the schema as the text of `schema.pbtxt`."""
    return str(text_format.MessageToString(schema))


def of_text(text: str) -> Schema:
    """Parses the text of a `schema.pbtxt`; ValueError if the text is not a schema."""
    try:
        return text_format.Parse(text, Schema())
    except text_format.ParseError as error:
        raise ValueError(f"no Schema of TensorFlow Metadata: {error}") from error


def _categorical(feature: schema_pb2.Feature, observed: FeatureNameStatistics) -> None:
    counts, total = frequencies(observed), common(observed).num_non_missing
    if feature.name in (USER, ITEM) or not total:
        return
    feature.string_domain.value.extend(sorted(counts))
    listed_share = sum(counts.values()) / total
    # Good, The population frequencies of species, 1953: the next value is new with the share of values seen once.
    unseen = sum(count == 1 for count in counts.values()) / total
    feature.distribution_constraints.min_domain_mass = max(0.0, listed_share - unseen - NEW_VALUES_SHARE)
    for comparator in (feature.skew_comparator, feature.drift_comparator):
        comparator.infinity_norm.threshold = MAX_L_INFINITY


def _numeric(feature: schema_pb2.Feature, name: str, warm: bool) -> None:
    if name == LABEL:
        feature.float_domain.min, feature.float_domain.max = 0.0, 1.0
    elif name == DELAY:
        feature.int_domain.min, feature.int_domain.max = 0, LARGEST
    else:
        feature.int_domain.min, feature.int_domain.max = bounds(name)
    of_spec = name.startswith(f"{FEATURES}.")
    # The hour differs between windows. A history's age is the age of the log until the history is full.
    if of_spec and name.removeprefix(f"{FEATURES}.").startswith(("clock.", "events.", "sessions.count")):
        return
    feature.drift_comparator.jensen_shannon_divergence.threshold = MAX_DIVERGENCE
    if warm or not of_spec:
        feature.skew_comparator.jensen_shannon_divergence.threshold = MAX_DIVERGENCE
