"""Claims about windows: each integer equals its definition, written here once more without any cleverness."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.config.loading import load
from state.errors import SettingsError
from state.events.identity import public_id
from state.features.arrays import quantise, recency_step
from state.features.erased import MaskedUsers
from state.features.mask import ClickColumns, Named
from state.features.spec import EVENT, Events, FeatureSpec, Mask, vectorise_many
from state.positions import Range, Source
from tests.vectors import vectorise

SPEC = FeatureSpec(windows_s=(60, 600, 7200), half_lives_s=(30, 900), history=32, recent_categories=6, sequence=7)
BASE_MS = 1_700_000_000_000
TOPIC = 0xABABABAB

Click = tuple[int, int, int, int, int, int]

clicks = st.lists(
    st.tuples(
        # Times in few values, so that equal ones, late ones and ones beyond the window are common.
        st.one_of(st.integers(-8, 4).map(lambda k: k * 1_000_000), st.integers(-40, 3).map(lambda k: k * 30_000)),
        st.integers(0, 4),  # category
        st.integers(0, 3),  # item
        st.integers(0, 1),  # partition
        st.integers(0, 3),  # action
        st.sampled_from([0, 1, 3]),  # flags
    ),
    max_size=60,
)


def history_of(made: list[Click]) -> Events:
    """Offsets count in each partition, so that two events can share one."""
    events = np.zeros(len(made), EVENT)
    following = [0, 0]
    for place, (time, category, item, partition, action, flags) in enumerate(made):
        # Ids near the top of 64 bits: a signed comparison would show.
        label = 2**64 - category if category else 0
        events[place] = (BASE_MS + time, label, item, following[partition], TOPIC, partition, action, flags)
        following[partition] += 1
    return events


def visible(history: Events, at_ms: int, spec: FeatureSpec, hidden: Any) -> list[Any]:
    """The events that a row may speak of, newest first."""
    longest = spec.windows_s[-1] * 1000
    kept = history[-spec.history :]
    seen = [event for event in kept if at_ms - longest < int(event["at_ms"]) <= at_ms and not hidden(event)]
    return sorted(seen, key=lambda e: (int(e["at_ms"]), int(e["offset"]), int(e["partition"])), reverse=True)


def expected(history: Events, at_ms: int, spec: FeatureSpec, hidden: Any) -> tuple[dict[str, int], list[int]]:
    """Every feature by its definition; returns them by name, and the labels."""
    kept = list(history[-spec.history :])
    longest = spec.windows_s[-1] * 1000
    seen = visible(history, at_ms, spec, hidden)
    tables = spec.tables
    out: dict[str, int] = {}

    def age(event: Any) -> int:
        return at_ms - int(event["at_ms"])

    def within(events: list[Any], window_s: int) -> list[Any]:
        return [event for event in events if age(event) < window_s * 1000]

    def decayed(events: list[Any], half_life: int) -> int:
        return sum(int(tables.decay[quantise(age(event) >> 10), half_life]) for event in events) >> 8

    def recency(ms: int | None) -> int:
        return 255 if ms is None else int(tables.recency[quantise(ms >> 10)])

    def sums(prefix: str, events: list[Any]) -> None:
        values = [len(within(events, window)) for window in spec.windows_s]
        values += [decayed(events, k) for k in range(len(spec.half_lives_s))]
        names = [name for name in spec.window_names if name.startswith(("count", "decayed"))]
        out.update({f"{prefix}.{name}": value for name, value in zip(names, values, strict=True)})

    for index, action in enumerate(spec.actions):
        mine = [event for event in seen if event["action"] == index]
        sums(action, mine)
        out[f"{action}.recency"] = recency(age(mine[0]) if mine else None)
    sums("labelled", [event for event in seen if event["flags"] & 1])
    sums("positive", [event for event in seen if event["flags"] & 2])
    spans = [name.removeprefix("count_") for name in spec.window_names if name.startswith("count_")]
    for window, span in zip(spec.windows_s, spans, strict=True):
        part = within(seen, window)
        labels = Counter(int(event["category"]) for event in part if event["category"])
        out[f"labels.distinct_{span}"] = len(labels)
        out[f"items.distinct_{span}"] = len({int(event["item"]) for event in part if event["item"]})
        out[f"labels.top_share_{span}"] = 1000 * max(labels.values()) // labels.total() if labels else 0
    gaps = [int(a["at_ms"]) - int(b["at_ms"]) for a, b in pairwise(seen)]
    for k in range(4):
        out[f"gap.{k + 1}"] = recency(gaps[k] if k < len(gaps) else None)
    pauses = [age(seen[0]), *gaps] if seen else []
    breaks = [k for k, gap in enumerate(pauses) if gap > 1_800_000]
    session = seen[: breaks[0]] if breaks else seen
    out["session.events"] = len(session)
    out["session.age"] = recency(age(session[-1]) if session else None)
    out["session.labels"] = len({int(event["category"]) for event in session if event["category"]})
    out["session.items"] = len({int(event["item"]) for event in session if event["item"]})
    out["sessions.count"] = len([gap for gap in gaps if gap > 1_800_000]) + 1 if seen else 0
    row = [int(event["category"]) for event in seen]
    out["last.same_label"] = int(len(row) > 1 and row[0] == row[1] != 0)
    out["last.switches_16"] = sum(a != b for a, b in pairwise(row[:16]))
    out["events.visible"] = len(seen)
    out["truncated"] = int(len(kept) == spec.history and all(age(event) < longest for event in kept))
    out["events.oldest"] = recency(age(seen[-1]) if seen else None)
    out["events.days"] = len({int(event["at_ms"]) // 86_400_000 for event in seen})
    hour, day = at_ms // 3_600_000 % 24, (at_ms // 86_400_000 + 3) % 7
    out["clock.hour_sin"] = 1000 + round(1000 * math.sin(2 * math.pi * hour / 24))
    out["clock.hour_cos"] = 1000 + round(1000 * math.cos(2 * math.pi * hour / 24))
    out["clock.weekday_sin"] = 1000 + round(1000 * math.sin(2 * math.pi * day / 7))
    out["clock.weekday_cos"] = 1000 + round(1000 * math.cos(2 * math.pi * day / 7))
    labels_in_order = list(dict.fromkeys(label for label in row if label))[: spec.recent_categories]
    for slot in range(spec.recent_categories):
        mine = [event for event in seen if slot < len(labels_in_order) and event["category"] == labels_in_order[slot]]
        prefix = f"label.{slot + 1}"
        sums(prefix, mine)
        out[f"{prefix}.recency"] = recency(age(mine[0]) if mine else None)
        out[f"{prefix}.is_last"] = int(slot == 0 and bool(row) and row[0] != 0)
        for index, action in enumerate(spec.actions):
            out[f"{prefix}.{action}_{spans[-1]}"] = sum(event["action"] == index for event in mine)
        label = labels_in_order[slot] if slot < len(labels_in_order) else None
        out[f"{prefix}.of_latest_5"] = sum(category == label for category in row[:5])
        out[f"{prefix}.of_latest_20"] = sum(category == label for category in row[:20])
        out[f"{prefix}.follows"] = sum(newer == label and older == row[0] for newer, older in pairwise(row) if older)
    return out, labels_in_order + [0] * (spec.recent_categories - len(labels_in_order))


def assert_equal(history: Events, at_ms: int, mask: Mask, spec: FeatureSpec) -> None:
    def hidden(event: Any) -> bool:
        return bool(mask.events(np.array([event], EVENT))[0])

    row = vectorise(history, at_ms, None, mask, spec)
    # Among those of others, a row has the same bits.
    several = vectorise_many([history[:1], history, history[::-1]], [at_ms, at_ms, at_ms + 1], mask, spec, [1, 0, 2])
    pairs: zip[tuple[np.ndarray, np.ndarray]] = zip(row, several, strict=True)
    for alone, among in pairs:
        np.testing.assert_array_equal(alone, among[1])
    want, labels = expected(history, at_ms, spec, hidden)
    latest = visible(history, at_ms, spec, hidden)[: spec.sequence]
    padding = [0] * (spec.sequence - len(latest))
    assert row.sequence_items.tolist() == [int(event["item"]) for event in latest] + padding
    assert row.sequence_categories.tolist() == [int(event["category"]) for event in latest] + padding
    assert row.sequence_actions.tolist() == [1 + int(event["action"]) for event in latest] + padding
    ages = [recency_step((at_ms - int(event["at_ms"])) >> 10) for event in latest]
    assert row.sequence_ages.tolist() == ages + padding
    assert dict(zip(spec.names, row.features.tolist(), strict=True)) == {name: want[name] for name in spec.names}
    assert row.recent_categories.tolist() == labels
    for slot in range(spec.recent_categories):
        names = {name: want[f"label.{slot + 1}.{name}"] for name in spec.window_names}
        assert dict(zip(spec.window_names, row.category_windows[slot].tolist(), strict=True)) == names


@given(made=clicks, at=st.integers(-40, 5).map(lambda k: k * 30_000))
def test_every_feature_equals_its_definition(made: list[Click], at: int) -> None:
    assert_equal(history_of(made), BASE_MS + at, Mask.NONE, SPEC)


@given(
    made=clicks,
    offsets=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 30), st.integers(0, 30)), max_size=2),
    times=st.lists(st.tuples(st.integers(-40, 0), st.integers(1, 20)), max_size=2),
    named=st.lists(
        st.tuples(st.sampled_from(["item", "category"]), st.integers(1, 4), st.integers(-40, 0), st.integers(1, 20)),
        max_size=2,
    ),
)
def test_masked_events_are_left_out(
    made: list[Click],
    offsets: list[tuple[int, int, int]],
    times: list[tuple[int, int]],
    named: list[tuple[Any, int, int, int]],
) -> None:
    mask = Mask(
        1,
        tuple((TOPIC, partition, first, first + count) for partition, first, count in offsets),
        tuple((BASE_MS + begin * 30_000, BASE_MS + (begin + count) * 30_000) for begin, count in times),
        named=tuple(
            Named(column, str(number), BASE_MS + begin * 30_000, BASE_MS + (begin + count) * 30_000)
            for column, number, begin, count in named
        ),
    )
    history = history_of(made)
    history["category"] = -history["category"].astype(np.int64)
    for column in ("item", "category"):
        history[column] = [public_id(number) if number else 0 for number in history[column].tolist()]
    assert_equal(history, BASE_MS, mask, SPEC)
    if (
        len(history) <= SPEC.history
        and not vectorise(history, BASE_MS, None, mask, SPEC).features[SPEC.names.index("truncated")]
    ):
        clean = vectorise(history[~mask.events(history)], BASE_MS, None, Mask.NONE, SPEC)
        for left, right in zip(vectorise(history, BASE_MS, None, mask, SPEC), clean, strict=True):
            np.testing.assert_array_equal(left, right)


@given(made=clicks, before=st.integers(0, 60))
def test_before_shows_the_leading_events_only(made: list[Click], before: int) -> None:
    history = history_of(made)
    for left, right in zip(
        vectorise(history, BASE_MS, before, Mask.NONE, SPEC),
        vectorise(history[:before].copy(), BASE_MS, None, Mask.NONE, SPEC),
        strict=True,
    ):
        np.testing.assert_array_equal(left, right)


@given(made=clicks, at=st.integers(-20, 5).map(lambda k: k * 30_000), swept=st.integers(0, 60))
def test_sweeping_events_beyond_the_longest_window_changes_nothing(made: list[Click], at: int, swept: int) -> None:
    history = history_of(made)[-SPEC.history :]
    horizon = BASE_MS + at - SPEC.windows_s[-1] * 1000
    leading = int(np.argmax(np.append(history["at_ms"] > horizon, True)))
    for left, right in zip(
        vectorise(history, BASE_MS + at, None, Mask.NONE, SPEC),
        vectorise(history[min(leading, swept) :], BASE_MS + at, None, Mask.NONE, SPEC),
        strict=True,
    ):
        np.testing.assert_array_equal(left, right)


def test_the_default_spec_on_a_full_history() -> None:
    rng = np.random.default_rng(5)
    history = np.zeros(400, EVENT)
    history["at_ms"] = np.sort(BASE_MS + rng.integers(0, 8 * 86_400_000, 400))
    history["category"] = rng.integers(0, 30, 400)
    history["item"] = rng.integers(0, 200, 400)
    history["offset"] = np.arange(400)
    history["action"] = rng.integers(0, 4, 400)
    history["flags"] = rng.choice([0, 1, 3], 400)
    assert_equal(history, int(history["at_ms"][-1]) + 90_000, Mask.NONE, FeatureSpec())


def test_a_window_is_open_at_its_beginning_and_closed_at_its_end() -> None:
    events = history_of([(-60_000, 1, 1, 0, 0, 0), (-59_999, 1, 1, 0, 0, 0), (0, 1, 1, 0, 0, 0), (1, 1, 1, 0, 0, 0)])
    row = vectorise(events, BASE_MS, None, Mask.NONE, SPEC)
    assert row.features[SPEC.names.index("view.count_1m")] == 2
    assert row.features[SPEC.names.index("events.visible")] == 3


def test_decays_halve_at_the_half_life_and_ages_are_within_two_percent() -> None:
    spec = FeatureSpec()
    for k, half_life_s in enumerate(spec.half_lives_s):
        assert spec.tables.decay[0, k] == 65_536
        for ms in (0, 1_000, 45_000, half_life_s * 500, half_life_s * 1000, half_life_s * 2000):
            true = 65_536 * 2 ** (-ms / 1000 / half_life_s)
            found = int(spec.tables.decay[quantise(ms >> 10), k])
            # Ages are rounded down by up to one unit and one part in 64.
            assert true * 0.999 <= found <= true * 2 ** ((1.024 + ms / 64_000) / half_life_s) * 1.001
    steps = [recency_step(age) for age in range(5000)]
    assert steps == sorted(steps) and steps[-1] < 255


def test_windows_by_order_speak_of_the_latest_events_and_of_what_came_next() -> None:
    # Labels 1 2 1 2 3 1, then one without a label and six of 4, then 1: the newest label is 1, and 2 followed it twice.
    made = [(k - 30, label, 1, 0, 0, 0) for k, label in enumerate([1, 2, 1, 2, 3, 1, 0, 4, 4, 4, 4, 4, 4, 1])]
    row = vectorise(history_of(made), BASE_MS, None, Mask.NONE, SPEC)
    shown = {
        2**64 - int(label): row.category_windows[slot, -3:].tolist()
        for slot, label in enumerate(row.recent_categories[:4])
    }
    assert shown == {1: [1, 4, 0], 4: [4, 6, 0], 3: [0, 1, 0], 2: [0, 2, 2]}
    assert SPEC.window_names[-3:] == ("of_latest_5", "of_latest_20", "follows")
    # Six more of 4: of the latest 20 the oldest, of label 1, falls out of none but the longer count.
    more = [*made, *((k, 4, 1, 0, 0, 0) for k in range(-6, 0)), (0, 1, 1, 0, 0, 0)]
    row = vectorise(history_of(more), BASE_MS, None, Mask.NONE, SPEC)
    assert row.category_windows[:2, -3:].tolist() == [[1, 4, 0], [4, 12, 1]]


def test_counts_and_decays_saturate() -> None:
    spec = FeatureSpec(history=512)
    history = np.zeros(512, EVENT)
    history["at_ms"] = BASE_MS
    history["offset"] = np.arange(512)
    row = vectorise(history, BASE_MS, None, Mask.NONE, spec)
    assert row.features[spec.names.index("view.count_1h")] == 512
    assert row.features[spec.names.index("view.decayed_30m")] == 65_535


def test_equal_times_are_ordered_by_offset() -> None:
    events = history_of([(0, 1, 1, 0, 0, 0), (0, 2, 1, 0, 0, 0)])
    for order in ([0, 1], [1, 0]):
        row = vectorise(events[order], BASE_MS, None, Mask.NONE, SPEC)
        assert row.recent_categories[:2].tolist() == [2**64 - 2, 2**64 - 1]


def test_names_are_128_and_unique_and_the_digest_is_pinned() -> None:
    spec = FeatureSpec()
    assert len(spec.names) == len(set(spec.names)) == 128
    assert len(spec.window_names) == 15
    # Raise CODE with the digest: stored rows and weights belong to it.
    assert spec.digest == "3a0f316c0dd9582d33dd330e8995ac383a3c3542a0adfad46cfa8adf966c8715"
    golden = np.zeros(3, EVENT)
    golden["at_ms"] = BASE_MS - np.array([7_200_000, 5_000, 1_000])
    golden["category"], golden["item"], golden["flags"] = [5, 6, 5], [1, 2, 3], [3, 1, 0]
    row = vectorise(golden, BASE_MS, None, Mask.NONE, spec)
    assert hashlib.sha256(row.features.tobytes()).hexdigest() == (
        "7e141577c769efd1e72d728c44008f81aa70eda27071c916021080cc58324c8e"
    )


def test_a_spec_comes_back_from_json_and_each_part_changes_the_digest() -> None:
    spec = FeatureSpec()
    assert FeatureSpec.from_json(spec.to_json()) == spec
    others = [
        replace(spec, history=128),
        replace(spec, recent_categories=8),
        replace(spec, actions=("a", "b", "c", "d")),
    ]
    others += [
        replace(spec, windows_s=(3600, 86_400)),
        replace(spec, half_lives_s=(1, 2, 3)),
        replace(spec, sequence=20),
    ]
    assert len({other.digest for other in [spec, *others]}) == 7
    assert [FeatureSpec.from_json(other.to_json()) for other in others] == others
    with pytest.raises(ValueError, match=r"code version 0.*with the release that wrote it"):
        FeatureSpec.from_json({**spec.to_json(), "code": 0})


def test_settings_make_the_default_spec_and_impossible_ones_are_refused() -> None:
    assert FeatureSpec.from_settings(load([], {})) == FeatureSpec()
    with pytest.raises(SettingsError, match="recent_categories 24 must be between 5 and history"):
        FeatureSpec.from_settings(load(["--features.history", "16"], {}))


@pytest.mark.parametrize(
    "wrong",
    [
        {"actions": ()},
        {"actions": ("a", "a")},
        {"windows_s": (9, 3)},
        {"half_lives_s": (0,)},
        {"history": 4},
        {"sequence": 257},
    ],
)
def test_an_impossible_spec_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FeatureSpec(**wrong)


def test_a_mask_names_rows_of_a_batch_and_comes_back_from_json() -> None:
    ranges = (Range(Source("ab" * 16, 0), 0, 9, rows=9), Range(Source("ab" * 16, 1), 0, 9, rows=9))
    named = (Named("item", "a", 2000, 3000), Named("category", "a", 5000, 6000))
    mask = Mask(4, ((TOPIC, 1, 2, 5),), ((1000, 2000),), MaskedUsers.of([2**64 - 1]), named=named)
    clicks = ClickColumns(
        user=np.array([1, 1, 1, 2**64 - 1, 1, 1, 1, 1], np.uint64),
        item=np.array([0, 0, 0, 0, 0, *[public_id("a")] * 3], np.uint64),
        category=np.zeros(8, np.uint64),
        at_ms=np.array([0, 0, 1999, 0, 2000, 2999, 3000, 5000]),
        source=np.array([0, 1, 0, 0, 1, 0, 0, 0], np.uint16),
        offset=np.array([2, 2, 0, 0, 5, 6, 7, 8]),
    )
    rows = mask.rows(clicks, ranges)
    assert rows.tolist() == [False, True, True, True, False, True, False, False]
    assert Mask.from_json(mask.to_json()) == mask == Mask.from_bytes(mask.to_bytes())
    assert bool(mask) and not Mask.NONE
    assert (
        vectorise(history_of([(0, 1, 1, 0, 0, 0)]), BASE_MS, None, mask, SPEC, user=2**64 - 1).recent_categories[0] == 0
    )
