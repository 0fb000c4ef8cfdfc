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

from state.statistics.collecting import ACTION, DELAY, FEATURES, ITEM, LABEL, Categorical, Statistics
from state.statistics.numeric import Numeric, median

MOST_VALUES = 2000
MOST_ITEMS = 100
TOP_VALUES = 10


def dataset(statistics: Statistics, name: str) -> DatasetFeatureStatistics:
    """Converts the statistics to one dataset of TensorFlow Data Validation.

    >>> made = dataset(Statistics(("view",), ()), "none")
    >>> made.name, made.num_examples, [one.path.step[0] for one in made.features]
    ('none', 0, ['delay_s', 'label'])
    """
    made = DatasetFeatureStatistics(name=name, num_examples=statistics.rows)
    for key, counted in sorted(statistics.categorical.items()):
        actions = statistics.actions if key == ACTION else ()
        _add_categorical(made, key, counted, actions, MOST_ITEMS if key == ITEM else MOST_VALUES)
    _add_numeric(made, [DELAY], statistics.delay, FeatureNameStatistics.INT)
    _add_numeric(made, [LABEL], statistics.label, FeatureNameStatistics.FLOAT)
    names = [f"{FEATURES}.{one}" for one in statistics.names]
    _add_numeric(made, names, statistics.features, FeatureNameStatistics.INT)
    return made


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
        found = DatasetFeatureStatisticsList.FromString(data)
    except DecodeError as error:
        raise ValueError(f"no DatasetFeatureStatisticsList: {error}") from error
    if len(found.datasets) != 1:
        raise ValueError(f"{len(found.datasets)} datasets where one is expected")
    return found.datasets[0]


def by_name(statistics: DatasetFeatureStatistics) -> dict[str, FeatureNameStatistics]:
    """The features of a dataset by name."""
    return {one.path.step[0]: one for one in statistics.features}


def common(one: FeatureNameStatistics) -> CommonStatistics:
    """The statistics that both kinds of features have."""
    found = one.string_stats if one.HasField("string_stats") else one.num_stats
    return found.common_stats


def frequencies(one: FeatureNameStatistics) -> dict[str, float]:
    """The count of each listed value of a categorical feature."""
    return {bucket.label: bucket.sample_count for bucket in one.string_stats.rank_histogram.buckets}


def _common(rows: int, missing: int) -> CommonStatistics:
    there = rows - missing
    made = CommonStatistics(
        num_non_missing=there, num_missing=missing, min_num_values=1, max_num_values=1, tot_num_values=there
    )
    made.avg_num_values = 1.0 if there else 0.0
    return made


def _add_categorical(
    made: DatasetFeatureStatistics, name: str, counted: Categorical, actions: Sequence[str], most: int
) -> None:
    one = made.features.add(type=FeatureNameStatistics.STRING)
    one.path.step.append(name)
    strings = one.string_stats
    strings.common_stats.CopyFrom(_common(counted.rows, counted.missing))
    strings.unique = counted.distinct
    found = [(actions[value - 1] if actions else f"{value:016x}", count) for value, count in counted.frequent(most)]
    for rank, (label, count) in enumerate(found):
        strings.rank_histogram.buckets.add(low_rank=rank, high_rank=rank, label=label, sample_count=count)
        if rank < TOP_VALUES:
            strings.top_values.add(value=label, frequency=count)
    # This is also the mean over all values, because ids have one length, and actions are few.
    strings.avg_length = float(np.mean([len(label) for label, _ in found])) if found else 0.0


def _add_numeric(made: DatasetFeatureStatistics, names: Sequence[str], counted: Numeric, kind: int) -> None:
    for number, name in enumerate(names):
        one = made.features.add(type=kind)
        one.path.step.append(name)
        numbers, missing = one.num_stats, int(counted.missing[number])
        numbers.common_stats.CopyFrom(_common(counted.rows, missing))
        there = counted.rows - missing
        if not there:
            continue
        counts = counted.counts[number]
        numbers.mean = counted.total[number] / there
        numbers.std_dev = max(0.0, counted.squares[number] / there - numbers.mean**2) ** 0.5
        numbers.num_zeros = int(counted.zeros[number])
        numbers.min, numbers.max = float(counted.least[number]), float(counted.most[number])
        numbers.median = min(max(median(counts, counted.edges), numbers.min), numbers.max)
        histogram = numbers.histograms.add(type=Histogram.STANDARD)
        last = int(np.flatnonzero(counts)[-1])
        for low, high, count in zip(counted.edges, counted.edges[1:], counts[: last + 1].tolist(), strict=False):
            histogram.buckets.add(low_value=float(low), high_value=float(high), sample_count=count)
