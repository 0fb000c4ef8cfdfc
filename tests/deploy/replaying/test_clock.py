"""The clock of a replay: pure, in order, never ahead of now, and the same however the rows are cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.replaying.recording import MAX, Clock, Hand, parse_speed, stamp
from state.errors import SettingsError
from state.recordings.rows import NO_TIME, NO_TIMESTAMP, Span

NOW_MS = 1_800_000_000_000
BEGUN = Hand(NO_TIME, float(NOW_MS))
TIMES = st.lists(st.one_of(st.integers(0, 2 * 10**12), st.just(NO_TIME)), min_size=1, max_size=30)
DAY_MS = 86_400_000
AGE_MS = 30 * DAY_MS


def clock(
    speed: float = MAX,
    keep: bool = False,
    newest_ms: int = NO_TIME,
    longest_wait_ms: float = MAX,
    oldest_ms: int = NO_TIME,
) -> Clock:
    return Clock(speed, keep, NOW_MS, Span(oldest_ms, newest_ms), AGE_MS, longest_wait_ms)


def test_at_full_speed_the_newest_is_of_now_and_gaps_stay() -> None:
    stamped = stamp(np.array([1000, 4000, 5000]), clock(newest_ms=5000), BEGUN)
    assert stamped.at_ms.tolist() == [NOW_MS - 4000, NOW_MS - 1000, NOW_MS]
    assert stamped.kafka_ms.tolist() == [NOW_MS] * 3
    assert stamped.due_ms.tolist() == [NOW_MS] * 3


def test_at_60x_what_is_sent_is_of_now_and_a_minute_takes_a_second() -> None:
    stamped = stamp(np.array([0, 60_000, 30_000, 120_000]), clock(60.0), BEGUN)
    assert stamped.due_ms.tolist() == [NOW_MS, NOW_MS + 1000, NOW_MS + 1000, NOW_MS + 2000]
    # The third is half a minute late: half a second at this speed.
    assert stamped.at_ms.tolist() == [NOW_MS, NOW_MS + 1000, NOW_MS + 500, NOW_MS + 2000]
    assert stamped.kafka_ms.tolist() == stamped.due_ms.tolist()


def test_kept_times_stay_paced_or_not_and_carry_no_timestamp() -> None:
    times = np.array([1000, NO_TIME, 61_000])
    stamped = stamp(times, clock(60.0, keep=True), BEGUN)
    assert stamped.at_ms.tolist() == times.tolist()
    assert stamped.kafka_ms.tolist() == [NO_TIMESTAMP, NOW_MS, NO_TIMESTAMP]
    assert stamped.due_ms.tolist() == [NOW_MS, NOW_MS, NOW_MS + 1000]
    assert stamp(times, clock(keep=True), BEGUN).at_ms.tolist() == times.tolist()


@pytest.mark.parametrize("speed", [60.0, 1e9, MAX])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("stray_ms", [0, 100 * DAY_MS])
def test_a_stray_moves_no_clock_and_keeps_its_distance_to_the_newest(speed: float, keep: bool, stray_ms: int) -> None:
    times = np.array([stray_ms, 50 * DAY_MS, 50 * DAY_MS + 60_000, 50 * DAY_MS + 120_000])
    walked = clock(speed, keep, oldest_ms=int(times[1]), newest_ms=int(times[-1]))
    stamped, alone = stamp(times, walked, BEGUN), stamp(times[1:], walked, BEGUN)
    assert stamped.at_ms[1:].tolist() == alone.at_ms.tolist()
    assert stamped.due_ms[1:].tolist() == alone.due_ms.tolist()
    assert stamped.at_ms[0] - stamped.kafka_ms[0] == stray_ms - times[-1]


@pytest.mark.parametrize("speed", [0.001, 60.0, MAX])
def test_a_row_that_its_timestamp_would_refuse_carries_none(speed: float) -> None:
    """At the lowest speed the last row is late by more than `AGE_MS`."""
    times = np.array([0, 60 * DAY_MS, 89 * DAY_MS, 89 * DAY_MS - 60_000_000])
    stamped = stamp(times, clock(speed, oldest_ms=0, newest_ms=int(times[2])), BEGUN)
    age_ms = stamped.kafka_ms - stamped.at_ms
    assert ((stamped.kafka_ms == NO_TIMESTAMP) | (age_ms <= AGE_MS)).all()
    without = {0.001: [False, False, False, True], 60.0: [False] * 4, MAX: [True, False, False, False]}
    assert (stamped.kafka_ms == NO_TIMESTAMP).tolist() == without[speed]


def test_a_night_takes_no_longer_than_the_longest_wait() -> None:
    stamped = stamp(np.array([0, 8 * 3_600_000, 8 * 3_600_000 + 60_000]), clock(60.0, longest_wait_ms=10_000.0), BEGUN)
    assert (stamped.due_ms - NOW_MS).tolist() == [0, 10_000, 11_000]


@given(TIMES, st.sampled_from([1.0, 60.0, 0.5, MAX]), st.booleans())
def test_nothing_is_due_before_its_predecessor_nor_stamped_after_it_is_due(
    times: list[int], speed: float, keep: bool
) -> None:
    at_ms = np.array(times, np.int64)
    stamped = stamp(at_ms, clock(speed, keep, int(at_ms.max())), BEGUN)
    assert (np.diff(stamped.due_ms) >= 0).all()
    timed = at_ms != NO_TIME
    assert ((stamped.at_ms == NO_TIME) == ~timed).all()
    if not keep:
        stamps = stamped.kafka_ms[timed]
        assert ((stamped.at_ms[timed] <= stamps) | (stamps == NO_TIMESTAMP)).all()


@given(TIMES, st.data(), st.sampled_from([60.0, MAX]))
def test_a_cut_changes_nothing(times: list[int], data: st.DataObject, speed: float) -> None:
    at_ms = np.array(times, np.int64)
    place = data.draw(st.integers(1, len(times)))
    newest_ms = data.draw(st.sampled_from([time for time in times if time != NO_TIME] or [0]))
    whole = stamp(at_ms, clock(speed, newest_ms=newest_ms), BEGUN)
    front = stamp(at_ms[:place], clock(speed, newest_ms=newest_ms), BEGUN)
    back = stamp(at_ms[place:], clock(speed, newest_ms=newest_ms), front.hand(place - 1))
    # Sums of floats in another order may differ by less than a millisecond.
    assert np.allclose(np.concatenate([front.due_ms, back.due_ms]), whole.due_ms, atol=1e-2, rtol=0)
    assert np.concatenate([front.high_ms, back.high_ms]).tolist() == whole.high_ms.tolist()


@pytest.mark.parametrize("text", ["", "0", "-1x", "fast", "nan", "inf", "x"])
def test_a_speed_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="--speed"):
        parse_speed(text)
