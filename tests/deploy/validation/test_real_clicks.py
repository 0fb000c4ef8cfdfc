"""Real clicks: days that are like the ones before raise nothing, and each injected fault is found on the day it begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import repeat
from typing import Any

import numpy as np
import pytest
from tensorflow_metadata.proto.v0.anomalies_pb2 import AnomalyInfo
from tensorflow_metadata.proto.v0.statistics_pb2 import DatasetFeatureStatistics

from deploy.validation.process import Windows
from state.features.spec import FeatureSpec
from state.microbatch.batch import MicroBatch
from state.statistics.anomalies import validate
from state.statistics.baselines import infer_schema
from state.statistics.collecting import Statistics, dataset
from tests.bench.recorded import (
    KUAIRAND,
    Recorded,
    kuairand_settings,
    micro_batches,
    read_impressions,
)

DAY_S = 86_400
FIRST_MS, AFTER_MS = 1_511_539_200_000, 1_512_316_800_000  # 25 November to 3 December 2017, as Taobao says
ROWS = 256
BASELINE_DAYS = 3
Days = list[Statistics]

impressions_needed = pytest.mark.skipif(
    not (KUAIRAND / "impressions.parquet").exists(), reason="needs KuaiRand-Pure at ../shared/data/kuairand"
)


def days_of(batches: Iterator[MicroBatch], spec: FeatureSpec, context: tuple[str, ...] = ()) -> Days:
    """The statistics of each day of log time, the last one too."""
    windows = Windows(DAY_S, lambda: Statistics(spec.actions, spec.names, context))
    found = [
        ended.statistics
        for number, batch in enumerate(batches)
        if (ended := windows.take(number, batch, repeat(batch).__next__)) is not None
    ]
    assert windows.open is not None
    return [*found, windows.open.statistics]


def part(recorded: Recorded, keep: Any) -> Recorded:
    """Some of the events."""
    columns = ("users", "events", "label", "context", "user_attributes", "item_attributes", "measured")
    return replace(recorded, **{name: getattr(recorded, name)[keep] for name in columns})


def found_by_day(days: Days, first: int, warm: bool = False) -> list[dict[str, set[str]]]:
    """What is wrong with each day from `first` on, where the days before it are the baseline."""
    before = Statistics(days[0].actions, days[0].names, days[0].context)
    for day in days[:first]:
        before.merge(day)
    baseline = dataset(before, "baseline")
    schema = infer_schema(baseline, warm)
    counted = [dataset(day, "day") for day in days]
    found = []
    for number in range(first, len(days)):
        previous: DatasetFeatureStatistics | None = counted[number - 1] if number > first else None
        anomalies = validate(counted[number], schema, baseline, previous)
        found.append(
            {
                name: {AnomalyInfo.Type.Name(reason.type) for reason in info.reason}
                for name, info in anomalies.anomaly_info.items()
            }
        )
    return found


def impressions(days: int) -> tuple[FeatureSpec, tuple[str, ...], list[MicroBatch]]:
    """KuaiRand's impressions of every third user on the first days, with their windows and attributes."""
    settings = kuairand_settings()
    spec = FeatureSpec.from_settings(settings)
    recorded = read_impressions(settings)
    day = recorded.events["at_ms"] // (1000 * DAY_S)
    recorded = part(recorded, (recorded.users % np.uint64(3) == 0) & (day - day[0] < days))
    return spec, tuple(settings.events.context), list(micro_batches(recorded, spec, (1.0,) * 10, ROWS))


Change = Callable[[MicroBatch], MicroBatch]


def changed(batches: list[MicroBatch], change: Change, from_day: int) -> Iterator[MicroBatch]:
    """The batches with a fault in all from a day on, counted from that of the first."""
    first = int(batches[0].at_ms.max()) // (1000 * DAY_S)
    for one in batches:
        late = int(one.at_ms.max()) // (1000 * DAY_S) - first >= from_day
        yield change(one) if late else one


def one_category(one: MicroBatch) -> MicroBatch:
    """A third of the impressions is of one category."""
    third = np.arange(len(one)) % 3 == 0
    return replace(one, category=np.where(third, HOT, one.category).astype(np.uint64))


HOT = np.uint64(0x123456789)


@pytest.mark.nightly
@impressions_needed
def test_days_of_impressions_raise_nothing() -> None:
    spec, context, batches = impressions(days=366)
    days = days_of(iter(batches), spec, context)
    *clean, holiday = found_by_day(days, BASELINE_DAYS)
    assert clean == [{}] * (len(days) - BASELINE_DAYS - 1) and len(clean) >= 2
    # The last day, 30 April 2022, is the first of a holiday: other users come, and nothing else is told.
    assert {*holiday} <= {"user_attributes.active_degree", "user_attributes.onehot_feat1"}


@impressions_needed
def test_a_category_that_takes_over_is_found_on_its_first_day_and_nothing_else() -> None:
    spec, context, batches = impressions(days=BASELINE_DAYS + 2)
    late = changed(batches, one_category, BASELINE_DAYS + 1)
    found = found_by_day(days_of(late, spec, context), BASELINE_DAYS)
    assert found[0] == {}
    assert found[1] == {"category": {"COMPARATOR_L_INFTY_HIGH", "ENUM_TYPE_UNEXPECTED_STRING_VALUES"}}
