"""Collects statistics of training rows: mergeable, and deterministic given the rows and their batches.

    action, category, item       ids of an event; of items only the most frequent are stored
    user                         number of distinct users; no id is stored
    context.NAME                 ids of `events.context`
    user_attributes.NAME         ids of attribute values that were joined to the row; none for an unknown user
    item_attributes.NAME         likewise
    label                        engagement label of rows that are trained on, from 0 to 1
    delay_s                      how much later than the event its label became known
    features.NAME                each integer of the feature spec

Numbers are counted in a histogram with fixed buckets, and summed exactly. The buckets are the same for every window and
every baseline. So counts can be added and histograms compared without assumptions about the distribution within a
bucket. Whole numbers up to 7 have one bucket each, and larger numbers up to 65,535 have four buckets per octave. Shares
have ten buckets of equal width.

An event counts once, in the row where it happened. Its label and its delay count in the row where they became known
(`state/microbatch/batch.py`).

Statistics are converted to TensorFlow Metadata's `DatasetFeatureStatisticsList`, which TensorFlow Data Validation reads.

A categorical feature has `string_stats`. Its values are written as 16 hexadecimal digits, those of an action by name. A
numeric feature has `num_stats` with one STANDARD histogram. `rank_histogram` has the most frequent values. If a feature
has more values than that, the rest counts only in the totals.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorflow_metadata.proto.v0.statistics_pb2 import (
    CommonStatistics,
    DatasetFeatureStatistics,
    DatasetFeatureStatisticsList,
    FeatureNameStatistics,
    Histogram,
)
from tfx_bsl.sketches import KmvSketch, MisraGriesSketch

from state.attributes.values import AttributeTable
from state.compiled import compiled
from state.microbatch.batch import ATTRIBUTES, Columns, happened, trained
from state.microbatch.codec import arrow_array

USER, ACTION, ITEM = "user", "action", "item"
CATEGORY, LABEL, DELAY = "category", "label", "delay_s"
FEATURES = "features"
LONGEST_DELAY_S = 65_535

BUCKETS = 4096
DISTINCT_BUCKETS = 2048

WHOLE = np.array([*range(8), *(8 * 2**octave * quarter // 4 for octave in range(13) for quarter in range(4, 8)), 65536])
"""`[61]` int64 bounds of the buckets of whole numbers from 0 to 65,535; a bucket includes its lower bound."""

SHARES = np.linspace(0.0, 1.0, 11)
"""`[11]` float64 bounds of the buckets of numbers from 0 to 1; the last bucket includes both of its bounds."""

_BUCKET_OF = np.repeat(np.arange(len(WHOLE) - 1, dtype=np.int64), np.diff(WHOLE))


class Categorical:
    """Counts the ids of one feature; 0 is a missing value.

    For users (`listed` is False), only the number of distinct ids is stored.

    It uses two mergeable sketches of tfx-bsl, like TensorFlow Data Validation. Misra-Gries (Finding repeated elements,
    1982) finds the most frequent values; it is exact while there are no more values than buckets. K minimum values
    (Bar-Yossef et al., Counting distinct elements in a data stream, 2002) estimates the number of distinct values.

    >>> counted = Categorical()
    >>> counted.add(np.array([7, 9, 7, 0], np.uint64))
    >>> counted.rows, counted.missing, counted.frequent(), counted.distinct
    (4, 1, [(7, 2.0), (9, 1.0)], 2)
    """

    def __init__(self, listed: bool = True) -> None:
        self.rows = self.missing = 0
        self._listed = listed
        self._frequent = MisraGriesSketch(BUCKETS)
        self._different = KmvSketch(DISTINCT_BUCKETS)

    def add(self, ids: NDArray[np.uint64]) -> None:
        """Counts `[n]` uint64 ids."""
        values_found, counts = np.unique(ids, return_counts=True)
        self.rows += len(ids)
        if len(values_found) and values_found[0] == 0:
            self.missing += int(counts[0])
            values_found, counts = values_found[1:], counts[1:]
        if not len(values_found):
            return
        values = arrow_array(values_found.view(np.int64))
        self._different.AddValues(values)
        if self._listed:
            self._frequent.AddValues(values, arrow_array(counts.astype(np.float32)))

    def merge(self, other: Categorical) -> None:
        """Adds the counts of `other`, which does not change."""
        self.rows += other.rows
        self.missing += other.missing
        self._frequent.Merge(other._frequent)
        self._different.Merge(other._different)

    @property
    def distinct(self) -> int:
        """Estimated number of distinct values, exact up to about two thousand."""
        return int(self._different.Estimate())

    def frequent(self, most: int = BUCKETS) -> list[tuple[int, float]]:
        """The most frequent values with their counts, highest count first, lower id first among equals."""
        estimate: Any = self._frequent.Estimate()
        if not len(estimate):
            return []
        values: Sequence[bytes] = estimate.field("values").to_pylist()
        counts: Sequence[float] = estimate.field("counts").to_pylist()
        # The sketch returns an id as a signed decimal number.
        frequencies = [(int(value) % 2**64, count) for value, count in zip(values, counts, strict=True)]
        return sorted(frequencies, key=lambda entry: (-entry[1], entry[0]))[:most]


class Numeric:
    """Statistics of D features with the same rows.

    Args:
        width: D.
        edges: Bounds of the buckets: `WHOLE` or `SHARES`.

    Attributes:
        missing: `[D]` int64, rows in which the feature had no value.
        counts: `[D, buckets]` int64.
        total: `[D]` float64, sum of the values.
        squares: `[D]` float64, sum of their squares.
        zeros: `[D]` int64, number of zeros.
        least: `[D]` float64, minimum; infinite if there was no value.
        most: `[D]` float64, maximum; likewise.

    >>> counted = Numeric(2)
    >>> counted.add(np.array([[1, 300], [1, 0]], np.uint16))
    >>> counted.counts[:, :2].tolist(), counted.total.tolist(), counted.most.tolist()
    ([[0, 2], [1, 0]], [2.0, 300.0], [1.0, 300.0])
    """

    def __init__(self, width: int, edges: NDArray[np.int64] | NDArray[np.float64] = WHOLE) -> None:
        self.edges = edges
        self.rows = 0
        self.missing = np.zeros(width, np.int64)
        self.counts = np.zeros((width, len(edges) - 1), np.int64)
        self.total, self.squares = np.zeros(width), np.zeros(width)
        self.zeros = np.zeros(width, np.int64)
        self.least, self.most = np.full(width, np.inf), np.full(width, -np.inf)

    def add(self, values: NDArray[np.uint16]) -> None:
        """Counts `[n, D]` uint16 values without missing ones."""
        if not len(values):
            return
        self.rows += len(values)
        _count(np.ascontiguousarray(values), _BUCKET_OF, self.counts, self.total, self.squares, self.least, self.most)
        self.zeros = self.counts[:, 0].copy()

    def add_reals(self, values: NDArray[np.float64]) -> None:
        """Counts `[n]` float64 of a single feature; NaN is missing. Values outside all buckets count in the nearest."""
        present = values[~np.isnan(values)]
        self.rows += len(values)
        self.missing += len(values) - len(present)
        if not len(present):
            return
        inside = np.clip(np.searchsorted(self.edges, present, side="right") - 1, 0, len(self.edges) - 2)
        self.counts[0] += np.bincount(inside, minlength=self.counts.shape[1])
        self.total += present.sum()
        self.squares += np.dot(present, present)
        self.zeros += np.count_nonzero(present == 0)
        self.least, self.most = np.minimum(self.least, present.min()), np.maximum(self.most, present.max())

    def merge(self, other: Numeric) -> None:
        """Adds the counts of `other`."""
        self.rows += other.rows
        for name in ("missing", "counts", "total", "squares", "zeros"):
            getattr(self, name).__iadd__(getattr(other, name))
        self.least, self.most = np.minimum(self.least, other.least), np.maximum(self.most, other.most)


@compiled(
    "u2[:, ::1], i8[::1], i8[:, ::1], f8[::1], f8[::1], f8[::1], f8[::1]",
    "const(u2[:, ::1]), i8[::1], i8[:, ::1], f8[::1], f8[::1], f8[::1], f8[::1]",
)
def _count(
    values: NDArray[np.uint16],
    bucket_of: NDArray[np.int64],
    counts: NDArray[np.int64],
    total: NDArray[np.float64],
    squares: NDArray[np.float64],
    least: NDArray[np.float64],
    most: NDArray[np.float64],
) -> None:
    """Adds `[n, D]` values to the statistics of D features; whole numbers up to 2**53 sum exactly in any order."""
    for row in range(values.shape[0]):
        for feature in range(values.shape[1]):
            value = float(values[row, feature])
            counts[feature, bucket_of[values[row, feature]]] += 1
            total[feature] += value
            squares[feature] += value * value
            least[feature] = min(least[feature], value)
            most[feature] = max(most[feature], value)


def median(counts: NDArray[np.int64], edges: NDArray[np.int64] | NDArray[np.float64]) -> float:
    """The median of a histogram, as if the values of a bucket were evenly distributed in it.

    >>> median(np.array([2, 2]), np.array([0, 10, 30]))
    10.0
    """
    upto = np.concatenate([[0], np.cumsum(counts)])
    return float(np.interp(upto[-1] / 2, upto, edges))


@dataclass
class Statistics:
    """Statistics of some rows, each event counted once.

    Attributes:
        names: Names of the D features of the spec.
        context: Names of the K fields of `events.context`.
        categorical: Statistics of ids, by feature name.
        delay: Statistics of the delay in whole seconds.
    """

    actions: Sequence[str]
    names: Sequence[str]
    context: Sequence[str] = ()
    rows: int = 0
    categorical: dict[str, Categorical] = field(default_factory=dict)
    label: Numeric = field(default_factory=lambda: Numeric(1, SHARES))
    delay: Numeric = field(default_factory=lambda: Numeric(1))
    features: Numeric = field(init=False)

    def __post_init__(self) -> None:
        self.features = Numeric(len(self.names))

    def add(self, columns: Columns, attributes: Sequence[Sequence[str]] = ((), ())) -> None:
        """Counts rows: `[n, ...]` columns of a micro-batch by name.

        `attributes` are the names of the attributes in the order of their columns.
        """
        kinds = columns["kind"]
        is_event = happened(kinds)
        every = bool(is_event.all())

        def of(name: str) -> NDArray[np.uint64]:
            column: NDArray[np.uint64] = columns[name] if every else columns[name][is_event]
            return column

        self.rows += int(is_event.sum())
        for name in (CATEGORY, ITEM, USER):
            self._ids(name).add(of(name))
        self._ids(ACTION).add(of(ACTION).astype(np.uint64) + np.uint64(1))
        self._add_fields("context", self.context, of("context"))
        for side, names in zip(ATTRIBUTES, attributes, strict=True):
            self._add_fields(side, names, _known(side, names, of(side)))
        self.features.add(columns[FEATURES] if every else columns[FEATURES][is_event])
        learned = trained(kinds)
        self.label.add_reals(columns["label"][learned].astype(np.float64))
        after_s = np.clip(columns["delay_ms"][learned] // 1000, 0, LONGEST_DELAY_S)
        self.delay.add(after_s.astype(np.uint16).reshape(-1, 1))

    def merge(self, other: Statistics) -> None:
        """Adds the counts of `other`, which does not change."""
        self.rows += other.rows
        for name, column in other.categorical.items():
            self._ids(name).merge(column)
        for own, others in ((self.label, other.label), (self.delay, other.delay), (self.features, other.features)):
            own.merge(others)

    def _add_fields(self, column: str, names: Sequence[str], ids: NDArray[np.uint64]) -> None:
        for name, column_ids in zip(names, _columns(ids), strict=False):
            self._ids(f"{column}.{name}").add(column_ids)

    def _ids(self, name: str) -> Categorical:
        if name not in self.categorical:
            self.categorical[name] = Categorical(listed=name != USER)
        return self.categorical[name]


def _known(side: str, names: Sequence[str], ids: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Attributes `[n, A]` uint64 with 0 where the user or item is unknown, or its record has no such value."""
    table = AttributeTable(side.partition("_")[0], ())
    absent = [[table.unknown_id(name), table.none_id(name)] for name in names]
    if not absent:
        return ids
    known_ids: NDArray[np.uint64] = np.where((ids[:, :, None] == np.array(absent, np.uint64)).any(axis=2), 0, ids)
    return known_ids.astype(np.uint64, copy=False)


def _columns(ids: NDArray[np.uint64]) -> Iterable[NDArray[np.uint64]]:
    """The columns of `[n, K]` uint64, one after another."""
    return np.ascontiguousarray(ids.T)


MOST_VALUES = 2000
MOST_ITEMS = 100
TOP_VALUES = 10


def dataset(statistics: Statistics, name: str) -> DatasetFeatureStatistics:
    """Converts the statistics to one dataset of TensorFlow Data Validation.

    >>> made = dataset(Statistics(("view",), ()), "none")
    >>> made.name, made.num_examples, [one.path.step[0] for one in made.features]
    ('none', 0, ['delay_s', 'label'])
    """
    message = DatasetFeatureStatistics(name=name, num_examples=statistics.rows)
    for key, column in sorted(statistics.categorical.items()):
        actions = statistics.actions if key == ACTION else ()
        _add_categorical(message, key, column, actions, MOST_ITEMS if key == ITEM else MOST_VALUES)
    _add_numeric(message, [DELAY], statistics.delay, FeatureNameStatistics.INT)
    _add_numeric(message, [LABEL], statistics.label, FeatureNameStatistics.FLOAT)
    names = [f"{FEATURES}.{feature}" for feature in statistics.names]
    _add_numeric(message, names, statistics.features, FeatureNameStatistics.INT)
    return message


def as_list(*datasets: DatasetFeatureStatistics) -> DatasetFeatureStatisticsList:
    """Wraps datasets in the message that is written to a file."""
    return DatasetFeatureStatisticsList(datasets=datasets)


def of_bytes(data: bytes) -> DatasetFeatureStatistics:
    """Parses a binary `DatasetFeatureStatisticsList` and returns its one dataset.

    Raises:
        ValueError: The bytes are not such a message, or it does not have exactly one dataset.
    """
    from google.protobuf.message import DecodeError

    try:
        parsed = DatasetFeatureStatisticsList.FromString(data)
    except DecodeError as error:
        raise ValueError(f"no DatasetFeatureStatisticsList: {error}") from error
    if len(parsed.datasets) != 1:
        raise ValueError(f"{len(parsed.datasets)} datasets where one is expected")
    return parsed.datasets[0]


def by_name(statistics: DatasetFeatureStatistics) -> dict[str, FeatureNameStatistics]:
    """The features of a dataset by name."""
    return {feature.path.step[0]: feature for feature in statistics.features}


def common(feature: FeatureNameStatistics) -> CommonStatistics:
    """The statistics that both kinds of features have."""
    statistics = feature.string_stats if feature.HasField("string_stats") else feature.num_stats
    return statistics.common_stats


def frequencies(feature: FeatureNameStatistics) -> dict[str, float]:
    """The count of each listed value of a categorical feature."""
    return {bucket.label: bucket.sample_count for bucket in feature.string_stats.rank_histogram.buckets}


def _common(rows: int, missing: int) -> CommonStatistics:
    present = rows - missing
    message = CommonStatistics(
        num_non_missing=present, num_missing=missing, min_num_values=1, max_num_values=1, tot_num_values=present
    )
    message.avg_num_values = 1.0 if present else 0.0
    return message


def _add_categorical(
    message: DatasetFeatureStatistics, name: str, column: Categorical, actions: Sequence[str], most: int
) -> None:
    feature = message.features.add(type=FeatureNameStatistics.STRING)
    feature.path.step.append(name)
    strings = feature.string_stats
    strings.common_stats.CopyFrom(_common(column.rows, column.missing))
    strings.unique = column.distinct
    counts = [(actions[value - 1] if actions else f"{value:016x}", count) for value, count in column.frequent(most)]
    for rank, (label, count) in enumerate(counts):
        strings.rank_histogram.buckets.add(low_rank=rank, high_rank=rank, label=label, sample_count=count)
        if rank < TOP_VALUES:
            strings.top_values.add(value=label, frequency=count)
    # This is also the mean over all values, because ids have one length, and actions are few.
    strings.avg_length = float(np.mean([len(label) for label, _ in counts])) if counts else 0.0


def _add_numeric(message: DatasetFeatureStatistics, names: Sequence[str], column: Numeric, kind: int) -> None:
    for number, name in enumerate(names):
        feature = message.features.add(type=kind)
        feature.path.step.append(name)
        numbers, missing = feature.num_stats, int(column.missing[number])
        numbers.common_stats.CopyFrom(_common(column.rows, missing))
        present = column.rows - missing
        if not present:
            continue
        counts = column.counts[number]
        numbers.mean = column.total[number] / present
        numbers.std_dev = max(0.0, column.squares[number] / present - numbers.mean**2) ** 0.5
        numbers.num_zeros = int(column.zeros[number])
        numbers.min, numbers.max = float(column.least[number]), float(column.most[number])
        numbers.median = min(max(median(counts, column.edges), numbers.min), numbers.max)
        histogram = numbers.histograms.add(type=Histogram.STANDARD)
        last = int(np.flatnonzero(counts)[-1])
        for low, high, count in zip(column.edges, column.edges[1:], counts[: last + 1].tolist(), strict=False):
            histogram.buckets.add(low_value=float(low), high_value=float(high), sample_count=count)
