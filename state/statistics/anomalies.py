"""Finds anomalies in a window's statistics, as `tfdv.validate_statistics` does: an `Anomalies` of TensorFlow Metadata.

These checks of TensorFlow Data Validation exist here, under its names:

    SCHEMA_MISSING_COLUMN                       a feature has no value in any row
    SCHEMA_NEW_COLUMN                           a feature that the schema does not know
    FEATURE_TYPE_LOW_FRACTION_PRESENT           fewer rows have a value than `presence` requires
    UNEXPECTED_DATA_TYPE                        a feature has another type
    ENUM_TYPE_UNEXPECTED_STRING_VALUES          more values than `min_domain_mass` allows are outside the domain
    INT_TYPE_SMALL_INT, INT_TYPE_BIG_INT        a number is outside its domain
    FLOAT_TYPE_SMALL_FLOAT, FLOAT_TYPE_BIG_FLOAT
    COMPARATOR_L_INFTY_HIGH                     a categorical feature drifted, see `l_infinity`
    COMPARATOR_JENSEN_SHANNON_DIVERGENCE_HIGH   a numeric feature drifted, see `jensen_shannon`

`drift_skew_info` has every distance, whether it is beyond its threshold or not. Skew is the distance from the baseline,
drift the distance from the preceding window. Both distances are computed as in TensorFlow Data Validation
(`anomalies/metrics.cc` there), so a threshold means the same in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tensorflow_metadata.proto.v0 import schema_pb2
from tensorflow_metadata.proto.v0.anomalies_pb2 import Anomalies, AnomalyInfo, DriftSkewInfo
from tensorflow_metadata.proto.v0.schema_pb2 import Feature, FeatureComparator, Schema
from tensorflow_metadata.proto.v0.statistics_pb2 import DatasetFeatureStatistics, FeatureNameStatistics

from state.statistics.collecting import by_name, common, frequencies

NAMED_VALUES = 3
Measurement = DriftSkewInfo.Measurement

_TYPES = {
    FeatureNameStatistics.INT: schema_pb2.INT,
    FeatureNameStatistics.FLOAT: schema_pb2.FLOAT,
    FeatureNameStatistics.STRING: schema_pb2.BYTES,
    FeatureNameStatistics.BYTES: schema_pb2.BYTES,
}


class Largest(NamedTuple):
    """A distance from 0 to 1, and the value whose share differs most; empty if nothing was counted."""

    distance: float
    value: str


def l_infinity(first: Mapping[str, float], second: Mapping[str, float]) -> Largest:
    """The largest difference of any value's share: max over v of |P(v) - Q(v)|, P and Q each of sum 1.

    >>> l_infinity({"a": 3, "b": 1}, {"a": 1, "b": 1, "c": 2})
    Largest(distance=0.5, value='a')

    Raises:
        ValueError: One of them has no counts, and so no shares.
    """
    totals = sum(first.values()), sum(second.values())
    if not all(totals):
        raise ValueError("a distance needs values on both sides")
    differences = (
        (abs(first.get(key, 0) / totals[0] - second.get(key, 0) / totals[1]), key) for key in first.keys() | second
    )
    # Among equal differences, the first by name, independent of their order.
    distance, value = min(differences, key=lambda entry: (-entry[0], entry[1]))
    return Largest(distance, value)


def jensen_shannon(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Jensen-Shannon divergence of two histograms, `[buckets]` float64 counts each, in bits, so from 0 to 1.

    JSD(P, Q) = (D(P | M) + D(Q | M)) / 2 with M = (P + Q) / 2 and D(P | M) = sum of P log2(P / M) (Lin, Divergence
    measures based on the Shannon entropy, 1991).

    >>> jensen_shannon(np.array([1.0, 0.0]), np.array([0.0, 2.0])), jensen_shannon(np.array([1.0, 2.0]), np.array([2.0, 4.0]))
    (1.0, 0.0)

    Raises:
        ValueError: One of them has no counts.
    """
    if not first.sum() or not second.sum():
        raise ValueError("a divergence needs counts on both sides")
    p, q = first / first.sum(), second / second.sum()
    m = (p + q) / 2

    def towards(share: NDArray[np.float64]) -> float:
        occurs = share > 0
        return float((share[occurs] * np.log2(share[occurs] / m[occurs])).sum())

    return min(1.0, max(0.0, (towards(p) + towards(q)) / 2))


def aligned(
    first: Mapping[tuple[float, float], float], second: Mapping[tuple[float, float], float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two histograms over the bounds of both, as if the values of a bucket were evenly distributed in it.

    Both are counts by bucket, which is a finite (lower, upper) bound. Returns two `[buckets]` float64: first the
    buckets between all bounds, then the single points.

    >>> [counts.tolist() for counts in aligned({(0, 2): 4.0}, {(0, 1): 1.0, (1, 3): 2.0})]
    [[2.0, 2.0, 0.0], [1.0, 1.0, 1.0]]
    """
    bounds = np.array(sorted({bound for bucket in (*first, *second) if bucket[0] < bucket[1] for bound in bucket}))
    points = sorted({bucket[0] for bucket in (*first, *second) if bucket[0] == bucket[1]})

    def over(histogram: Mapping[tuple[float, float], float]) -> NDArray[np.float64]:
        counts = np.zeros(max(0, len(bounds) - 1) + len(points))
        for (low, high), count in histogram.items():
            if low == high:
                counts[len(counts) - len(points) + points.index(low)] += count
                continue
            first, after = np.searchsorted(bounds, (low, high))
            counts[first:after] += count * np.diff(bounds[first : after + 1]) / (high - low)
        return counts

    return over(first), over(second)


class Finding(NamedTuple):
    """One anomaly of a feature: its `AnomalyInfo.Type`, a short description, and one with numbers."""

    kind: int
    short: str
    description: str


def validate(
    statistics: DatasetFeatureStatistics,
    schema: Schema,
    baseline: DatasetFeatureStatistics | None = None,
    previous: DatasetFeatureStatistics | None = None,
) -> Anomalies:
    """Compares a window with the schema, the baseline and the preceding window."""
    anomalies = Anomalies(baseline=schema)
    features = by_name(statistics)
    befores = [None if dataset is None else by_name(dataset) for dataset in (baseline, previous)]
    for feature in schema.feature:
        observed = features.get(feature.name)
        findings = list(_of_feature(feature, observed))
        if observed is not None and common(observed).num_non_missing:
            measured = DriftSkewInfo()
            measured.path.step.append(feature.name)
            sides = zip(("skew", "drift"), befores, strict=True)
            for side, before in ((side, before) for side, before in sides if before is not None):
                comparator = getattr(feature, f"{side}_comparator")
                for measurement, finding in _compared(side, comparator, observed, before.get(feature.name)):
                    getattr(measured, f"{side}_measurements").append(measurement)
                    findings += [finding] * (measurement.value > measurement.threshold)
            if measured.drift_measurements or measured.skew_measurements:
                anomalies.drift_skew_info.append(measured)
        _note(anomalies, feature.name, findings)
    for name in features.keys() - {feature.name for feature in schema.feature}:
        words = "The baseline does not know it: take it up by `springtide schema accept`."
        _note(anomalies, name, [Finding(AnomalyInfo.SCHEMA_NEW_COLUMN, "New column", words)], AnomalyInfo.WARNING)
    return anomalies


def _note(anomalies: Anomalies, name: str, findings: list[Finding], severity: int = AnomalyInfo.ERROR) -> None:
    if not findings:
        return
    info = anomalies.anomaly_info[name]
    info.path.step.append(name)
    info.severity = severity
    for finding in findings:
        info.reason.add(type=finding.kind, short_description=finding.short, description=finding.description)
    info.short_description = findings[0].short if len(findings) == 1 else "Multiple errors"
    info.description = " ".join(finding.description for finding in findings)


def _of_feature(feature: Feature, observed: FeatureNameStatistics | None) -> Iterator[Finding]:
    least = feature.presence.min_fraction
    if observed is None or not (present := common(observed).num_non_missing):
        if least > 0:
            yield Finding(AnomalyInfo.SCHEMA_MISSING_COLUMN, "Column dropped", "The feature has no value in any row.")
        return
    share = present / (present + common(observed).num_missing)
    if share < least:
        words = f"The feature has a value in {share:.1%} of the rows, expected are {least:.1%} or more."
        yield Finding(AnomalyInfo.FEATURE_TYPE_LOW_FRACTION_PRESENT, "Missing values", words)
    if _TYPES[observed.type] != feature.type:
        types = FeatureNameStatistics.Type.Name(observed.type), schema_pb2.FeatureType.Name(feature.type)
        yield Finding(
            AnomalyInfo.UNEXPECTED_DATA_TYPE, "Unexpected type", f"The feature is {types[0]}, expected is {types[1]}."
        )
        return
    if observed.HasField("string_stats"):
        yield from _outside_domain(feature, observed)
    else:
        yield from _outside_bounds(feature, observed)


def _outside_domain(feature: Feature, observed: FeatureNameStatistics) -> Iterator[Finding]:
    if not feature.HasField("string_domain"):
        return
    domain, total = {*feature.string_domain.value}, common(observed).num_non_missing
    new = {value: count for value, count in frequencies(observed).items() if value not in domain}
    allowed = 1.0 - feature.distribution_constraints.min_domain_mass
    if (share := sum(new.values()) / total) > allowed or (allowed == 0 and new):
        top = sorted(new.items(), key=lambda entry: (-entry[1], entry[0]))[:NAMED_VALUES]
        listed = ", ".join(f"{value} ({count / total:.1%})" for value, count in top)
        words = f"{len(new):,} values that the schema does not know make {share:.1%} of all, {allowed:.1%} are allowed: {listed}."
        yield Finding(AnomalyInfo.ENUM_TYPE_UNEXPECTED_STRING_VALUES, "Unexpected string values", words)


def _outside_bounds(feature: Feature, observed: FeatureNameStatistics) -> Iterator[Finding]:
    numbers = observed.num_stats
    if feature.HasField("int_domain"):
        domain = feature.int_domain
        small, big = AnomalyInfo.INT_TYPE_SMALL_INT, AnomalyInfo.INT_TYPE_BIG_INT
    elif feature.HasField("float_domain"):
        domain, small, big = feature.float_domain, AnomalyInfo.FLOAT_TYPE_SMALL_FLOAT, AnomalyInfo.FLOAT_TYPE_BIG_FLOAT
    else:
        return
    if numbers.min < domain.min:
        words = f"Values of {numbers.min:g}, the least expected is {domain.min:g}."
        yield Finding(small, "Out-of-range values", f"Unexpectedly low: {words}")
    if numbers.max > domain.max:
        words = f"Values of {numbers.max:g}, the most expected is {domain.max:g}."
        yield Finding(big, "Out-of-range values", f"Unexpectedly high: {words}")


def _compared(
    side: str, comparator: FeatureComparator, observed: FeatureNameStatistics, before: FeatureNameStatistics | None
) -> Iterator[tuple[DriftSkewInfo.Measurement, Finding]]:
    if before is None or not common(before).num_non_missing:
        return
    reference = "the baseline" if side == "skew" else "the window before"
    if comparator.infinity_norm.HasField("threshold") and observed.HasField("string_stats"):
        limit, shares = comparator.infinity_norm.threshold, (frequencies(observed), frequencies(before))
        if all(shares):
            distance, value = l_infinity(*shares)
            words = f"The L-infinity distance from {reference} is {distance:.3f}, above {limit:g}: the share of {value} differs most."
            yield (
                Measurement(type=Measurement.L_INFTY, value=distance, threshold=limit),
                Finding(AnomalyInfo.COMPARATOR_L_INFTY_HIGH, f"High L-infinity distance from {reference}", words),
            )
    if comparator.jensen_shannon_divergence.HasField("threshold") and observed.HasField("num_stats"):
        limit = comparator.jensen_shannon_divergence.threshold
        distance = jensen_shannon(*aligned(_histogram(observed), _histogram(before)))
        words = f"The Jensen-Shannon divergence from {reference} is {distance:.3f}, above {limit:g}."
        yield (
            Measurement(type=Measurement.JENSEN_SHANNON_DIVERGENCE, value=distance, threshold=limit),
            Finding(
                AnomalyInfo.COMPARATOR_JENSEN_SHANNON_DIVERGENCE_HIGH,
                f"High Jensen-Shannon divergence from {reference}",
                words,
            ),
        )


def _histogram(observed: FeatureNameStatistics) -> dict[tuple[float, float], float]:
    (standard,) = (histogram for histogram in observed.num_stats.histograms if histogram.type == histogram.STANDARD)
    return {(bucket.low_value, bucket.high_value): bucket.sample_count for bucket in standard.buckets}
