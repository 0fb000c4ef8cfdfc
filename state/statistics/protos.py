"""Converts statistics to TensorFlow Metadata's `DatasetFeatureStatisticsList`, which TensorFlow Data Validation reads.

A categorical feature has `string_stats`. Its values are written as 16 hexadecimal digits, those of an action by name. A
numeric feature has `num_stats` with one STANDARD histogram. `rank_histogram` has the most frequent values. If a feature
has more values than that, the rest counts only in the totals.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tensorflow_metadata.proto.v0.statistics_pb2 import (
    CommonStatistics,
    DatasetFeatureStatistics,
    DatasetFeatureStatisticsList,
    FeatureNameStatistics,
    Histogram,
)

from state.statistics.collecting import ACTION, DELAY, FEATURES, ITEM, LABEL, Categorical, Numeric, Statistics, median

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
