"""Real clicks: days that are like the ones before raise nothing, and each injected fault is found on the day it begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tensorflow_metadata.proto.v0.anomalies_pb2 import AnomalyInfo
from tensorflow_metadata.proto.v0.statistics_pb2 import DatasetFeatureStatistics

from deploy.validation.process import Windows
from state.attributes.values import AttributeTable
from state.features.spec import FeatureSpec
from state.microbatch.batch import Header, MicroBatch
from state.positions import Range
from state.statistics.anomalies import validate
from state.statistics.collecting import Statistics
from state.statistics.protos import dataset
from state.statistics.schema import infer
from tests.bench.recorded import (
    CLICKS,
    KUAIRAND,
    SOURCE,
    Recorded,
    kuairand_settings,
    micro_batches,
    read_clicks,
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
        ended.statistics for number, batch in enumerate(batches) if (ended := windows.take(number, batch)) is not None
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
    schema = infer(baseline, warm)
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


def inputs(recorded: Recorded, spec: FeatureSpec) -> Iterator[MicroBatch]:
    """What arrives, without windows, whose computation takes most of the time."""
    for first in range(0, recorded.users.size, ROWS):
        one = part(recorded, slice(first, first + ROWS))
        rows = one.users.size
        yield MicroBatch(
            Header(spec.digest, "0" * 16, (Range(SOURCE, first, first + rows, rows=rows),), 0),
            user=one.users,
            item=one.events["item"].copy(),
            category=one.events["category"].copy(),
            action=one.events["action"].copy(),
            at_ms=one.events["at_ms"].copy(),
            label=one.label,
            weight=np.ones(rows, np.float32),
            source=np.zeros(rows, np.uint16),
            offset=np.arange(first, first + rows),
            context=one.context,
            features=np.zeros((rows, len(spec.names)), np.uint16),
            recent_categories=np.zeros((rows, 0), np.uint64),
            category_windows=np.zeros((rows, 0, 0), np.uint16),
        )


@pytest.mark.skipif(not CLICKS.exists(), reason="needs Taobao's UserBehavior.csv at ../shared/data/taobao")
def test_a_week_of_taobao_raises_nothing_and_a_category_that_takes_over_does() -> None:
    spec, clicks = FeatureSpec(), read_clicks()
    times = clicks.events["at_ms"]
    clicks = part(clicks, (times >= FIRST_MS) & (times < AFTER_MS))
    days = days_of(inputs(clicks, spec), spec)
    assert found_by_day(days, BASELINE_DAYS) == [{}] * (len(days) - BASELINE_DAYS) and len(days) >= 9
    # From the sixth day on bots click one category as much again as a quarter of all.
    events = clicks.events.copy()
    late = events["at_ms"] >= FIRST_MS + 5 * 1000 * DAY_S
    bots = late & (np.random.default_rng(3).random(len(events)) < 0.25)
    events["category"][bots] = events["category"][0]
    found = found_by_day(days_of(inputs(replace(clicks, events=events), spec), spec), BASELINE_DAYS)
    assert found[0] == {} and found[-1] == {"category": {"COMPARATOR_L_INFTY_HIGH"}}
    # Its first day is over in part.
    assert [bool(one) for one in found] in ([number >= first for number in range(len(found))] for first in (2, 3))


@pytest.fixture(scope="module")
def impressions() -> tuple[FeatureSpec, tuple[str, ...], list[MicroBatch]]:
    """KuaiRand's impressions of every third user, with their windows and attributes."""
    settings = kuairand_settings()
    spec = FeatureSpec.from_settings(settings)
    recorded = read_impressions(settings)
    recorded = part(recorded, recorded.users % np.uint64(3) == 0)
    return spec, tuple(settings.events.context), list(micro_batches(recorded, spec, (1.0,) * 10, ROWS))


Change = Callable[[MicroBatch], MicroBatch]


def changed(batches: list[MicroBatch], change: Change, from_day: int) -> Iterator[MicroBatch]:
    """The batches with a fault in all from a day on, counted from that of the first."""
    first = int(batches[0].at_ms.max()) // (1000 * DAY_S)
    for one in batches:
        late = int(one.at_ms.max()) // (1000 * DAY_S) - first >= from_day
        yield change(one) if late else one


def without_age(one: MicroBatch) -> MicroBatch:
    """The records of the first attribute do not arrive any more."""
    lost = one.user_attributes.copy()
    name = one.header.attributes[0][0]
    lost[:, 0] = AttributeTable("user", ()).unknown_id(name)
    return replace(one, user_attributes=lost)


def in_milliseconds(one: MicroBatch) -> MicroBatch:
    """The kernel's counts come a thousandfold too large."""
    wide = one.features.copy()
    wide[:, 0] = np.minimum(wide[:, 0].astype(np.int64) * 1000, 65_535)
    return replace(one, features=wide)


def one_category(one: MicroBatch) -> MicroBatch:
    """A third of the impressions is of one category."""
    third = np.arange(len(one)) % 3 == 0
    return replace(one, category=np.where(third, HOT, one.category).astype(np.uint64))


HOT = np.uint64(0x123456789)


@impressions_needed
def test_days_of_impressions_raise_nothing(
    impressions: tuple[FeatureSpec, tuple[str, ...], list[MicroBatch]],
) -> None:
    spec, context, batches = impressions
    days = days_of(iter(batches), spec, context)
    *clean, holiday = found_by_day(days, BASELINE_DAYS)
    assert clean == [{}] * (len(days) - BASELINE_DAYS - 1) and len(clean) >= 2
    # The last day, 30 April 2022, is the first of a holiday: other users come, and nothing else is told.
    assert {*holiday} <= {"user_attributes.active_degree", "user_attributes.onehot_feat1"}


@impressions_needed
@pytest.mark.parametrize(
    ("change", "feature", "kinds"),
    [
        (without_age, "user_attributes", {"SCHEMA_MISSING_COLUMN"}),
        (in_milliseconds, "features.", {"COMPARATOR_JENSEN_SHANNON_DIVERGENCE_HIGH"}),
        (one_category, "category", {"COMPARATOR_L_INFTY_HIGH", "ENUM_TYPE_UNEXPECTED_STRING_VALUES"}),
    ],
)
def test_a_fault_among_impressions_is_found_on_its_first_day_and_nothing_else(
    impressions: tuple[FeatureSpec, tuple[str, ...], list[MicroBatch]], change: Change, feature: str, kinds: set[str]
) -> None:
    spec, context, batches = impressions
    found = found_by_day(days_of(changed(batches, change, BASELINE_DAYS + 1), spec, context), BASELINE_DAYS)
    assert found[0] == {}
    ((name, reasons),) = found[1].items()
    assert name.startswith(feature) and reasons == kinds
