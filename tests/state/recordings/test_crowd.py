"""The newest time of a recording: strays cost others nothing, and nobody is called one without need."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from state.recordings.crowd import Crowd, RecordedTimes
from state.recordings.rows import NO_TIME

DAY_MS = 86_400_000
AGE_MS = 30 * DAY_MS
TIMES = st.lists(st.one_of(st.integers(0, 100 * DAY_MS), st.just(NO_TIME)), min_size=1, max_size=60)


def crowd(at_ms: list[int], max_age_ms: int = AGE_MS) -> Crowd:
    times = RecordedTimes()
    times.add(np.array(at_ms, np.int64), 0, np.arange(2, 2 + len(at_ms)))
    return times.crowd(max_age_ms)


def refused(at_ms: list[int], newest_ms: int) -> int:
    """Rows that are too old, or after the newest."""
    return sum(at != NO_TIME and not newest_ms - AGE_MS <= at <= newest_ms for at in at_ms)


def test_strays_are_described_wherever_they_stand_and_however_late_they_are() -> None:
    days = [number * DAY_MS // 20 for number in range(200)]  # ten days
    for late in ([35], [60], [400], [35, 80, 900]):
        at_ms = [*days[:50], *(day * DAY_MS for day in late), *days[50:]]
        found = crowd(at_ms)
        assert (found.newest_ms, found.strays, found.first) == (days[-1], len(late), (0, 52))
        assert found.latest_ms == max(late) * DAY_MS
        assert found.spared > 0


def test_the_end_of_a_long_recording_is_no_stray() -> None:
    """Half of it is too old either way; its last day is not given up for an older one with more clicks."""
    even = [number * DAY_MS // 10 for number in range(600)]
    fading = [round(60 * DAY_MS * (number / 1000) ** 2) for number in range(1000)]
    for at_ms in (even, fading):
        assert crowd(at_ms).strays == 0


@given(TIMES)
def test_telling_apart_never_refuses_more_rows_and_needs_a_reason(at_ms: list[int]) -> None:
    found = crowd(at_ms)
    timed = [at for at in at_ms if at != NO_TIME]
    if not timed:
        assert found == Crowd(NO_TIME)
        return
    newest_ms = max(timed)
    assert found.latest_ms == newest_ms
    assert found.strays == sum(at > found.newest_ms for at in timed)
    assert refused(at_ms, found.newest_ms) <= refused(at_ms, newest_ms)
    if newest_ms - min(timed) <= AGE_MS:
        assert found.strays == 0


@given(TIMES, st.data())
def test_rows_counted_in_pieces_are_those_counted_at_once(at_ms: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(at_ms)))
    times, lines = RecordedTimes(), np.arange(2, 2 + len(at_ms))
    for part in (slice(cut), slice(cut, None)):
        times.add(np.array(at_ms[part], np.int64), 0, lines[part])
    assert times.crowd(AGE_MS) == crowd(at_ms)
