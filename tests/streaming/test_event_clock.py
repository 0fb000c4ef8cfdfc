"""The event clock: the newest time if all clocks are right, whatever one user reports, and however the log is cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.microbatch.batch import TOLERANCE_MS
from state.positions import Range, Source
from streaming.event_clock import (
    AGREEING,
    AHEAD,
    BEHIND,
    NEVER_MS,
    PATIENCE,
    TURNS,
    EventClock,
    OffClock,
    Quorum,
    agreed_on,
    believe,
    hear,
)
from tests.streaming.pieces import events

BASE_MS = 1_700_000_000_000
FAR_MS = 10 * TOLERANCE_MS
KEY = 1

Said = list[tuple[int, int]]


def heard(said: Said, known: Quorum | None = None, read_ms: int = BASE_MS) -> list[int]:
    """The clock after each (user, time after the beginning), after the beginning too."""
    at_ms = np.array([BASE_MS + time for _, time in said], np.int64)
    users = np.array([user for user, _ in said], np.uint64)
    clocks = hear(known or Quorum.of(2), np.full(len(said), KEY, np.int64), users, at_ms, read_ms)
    since: list[int] = (clocks - BASE_MS).tolist()
    return since


def told(known: Quorum, times: list[int], now: int) -> tuple[list[int], list[int]]:
    """What readers may believe before and after clicks, and which of them are off."""
    at_ms = BASE_MS + np.array(times, np.int64)
    clocks, off = believe(known, np.array([KEY]), np.zeros(len(times), np.int64), at_ms, BASE_MS + now)
    return (clocks[0] - BASE_MS).tolist(), off.tolist()


def crowd(count: int, time: int, first: int = 100) -> Said:
    return [(first + user, time) for user in range(count)]


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, TOLERANCE_MS)), min_size=1, max_size=80))
def test_where_all_clocks_are_right_it_is_the_newest_time(said: Said) -> None:
    assert heard(said) == np.maximum.accumulate([time for _, time in said]).tolist()


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(-2 * FAR_MS, 2 * FAR_MS)), min_size=1, max_size=60),
    st.integers(1, 20),
)
def test_any_cutting_and_a_restart_after_each_batch_give_the_same(said: Said, size: int) -> None:
    known, found = Quorum.of(2), list[int]()
    for first in range(0, len(said), size):
        found += heard(said[first : first + size], known, read_ms=BASE_MS + first)
        again = Quorum.of(2)
        for key in range(2):
            again.unpack(key, known.pack(key))
        known = again
    assert found == heard(said)


@pytest.mark.parametrize("far_ms", [FAR_MS, -FAR_MS])
@pytest.mark.parametrize("clicks", [1, 1000])
def test_a_user_alone_moves_it_no_further_than_the_others(far_ms: int, clicks: int) -> None:
    assert heard(crowd(20, 0) + [(1, far_ms)] * clicks + crowd(20, 1000)) == [0] * (20 + clicks) + [1000] * 20


def test_between_the_clicks_of_others_a_thousand_of_one_are_one_voice_still() -> None:
    said = [one for turn in range(300) for one in [(1, FAR_MS)] * 3 + [(100 + turn, turn)]]
    assert heard([(50, 0), *said])[-1] == 299


def test_half_of_the_witnesses_must_agree_on_a_jump() -> None:
    clocks = heard(crowd(TURNS, 0) + crowd(TURNS, FAR_MS, first=200))
    assert clocks[TURNS:] == [0] * (AGREEING - 1) + [FAR_MS] * (TURNS - AGREEING + 1)


def test_a_first_click_with_a_wrong_clock_is_overruled_by_the_next_user() -> None:
    assert heard([(1, 100 * FAR_MS), (1, 100 * FAR_MS), (2, 0), (3, 1)]) == [100 * FAR_MS, 100 * FAR_MS, 0, 1]


def test_of_users_of_whom_only_the_time_is_known_it_has_no_clock_and_holds_one_back_who_is_ahead() -> None:
    for at_ms, expected_ms in ((FAR_MS, 0), (-FAR_MS, 0), (1000, 1000)):
        known = Quorum.of(2)
        known.unpack(1, agreed_on(BASE_MS, BASE_MS))
        assert known.marks[1, 1] == NEVER_MS
        assert heard([(7, at_ms)] * 3, known) == [expected_ms] * 3


def test_late_clicks_do_not_move_it_back_until_there_is_nothing_else() -> None:
    late = [(1000 + user, -FAR_MS) for user in range(PATIENCE + 1)]
    assert set(heard(crowd(20, 0) + late[: PATIENCE // 2] + [(1, 0)] + late[: PATIENCE - 1])[20:]) == {0}
    assert heard(crowd(20, 0) + late)[-1] == -FAR_MS


def test_after_a_quiet_night_readers_believe_the_first_click_at_once() -> None:
    known = Quorum.of(2)
    heard(crowd(20, 0), known, read_ms=BASE_MS + 50)
    assert told(known, [0], now=50)[1] == [0]
    assert heard([(1, FAR_MS)], known, read_ms=BASE_MS + FAR_MS + 50) == [0]
    assert told(known, [FAR_MS], now=FAR_MS + 50) == ([0, FAR_MS], [0])


def test_readers_do_not_believe_a_time_beyond_the_wall_clock_unless_many_say_so() -> None:
    known = Quorum.of(2)
    heard(crowd(3, FAR_MS), known)
    assert told(known, [FAR_MS] * 3, now=0)[1] == [AHEAD] * 3
    heard(crowd(AGREEING, FAR_MS), known)
    assert told(known, [FAR_MS], now=0)[1] == [0]


def test_of_a_backlog_readers_believe_the_crowd_and_not_one_who_says_a_time_before_now() -> None:
    known = Quorum.of(2)
    said = [*crowd(20, 0), (1, 3 * FAR_MS), (2, -FAR_MS), *crowd(20, 1000)]
    heard(said, known, read_ms=BASE_MS + 9 * FAR_MS)
    clocks, off = told(known, [time for _, time in said], now=9 * FAR_MS)
    assert clocks == [0, 1000]
    assert off == [0] * 20 + [AHEAD, BEHIND] + [0] * 20


def test_all_partitions_speak_for_one_with_too_few_witnesses() -> None:
    known = Quorum.of(3)
    users = np.arange(1, 21, dtype=np.uint64)
    hear(known, np.full(20, 2, np.int64), users, np.full(20, BASE_MS), BASE_MS + 9 * FAR_MS)
    heard([(99, FAR_MS)], known, read_ms=BASE_MS + 9 * FAR_MS)
    assert told(known, [FAR_MS], now=9 * FAR_MS) == ([0, 0], [AHEAD])


SOURCE = Source("ab" * 16, 0)
BASE_MS = 1_700_000_000_000
DAY_MS = 86_400_000
WRONG_USER, CLICKS = 7, 1000


def follow(clock: EventClock, first: int, users: list[int], at_ms: int, now_ms: int) -> tuple[OffClock, ...]:
    """What the clock finds off in a batch of partition 0 that begins at offset `first`."""
    count = len(users)
    clicks = events(
        count,
        user=users,
        at_ms=np.full(count, at_ms),
        source=np.zeros(count, np.uint16),
        offset=np.arange(first, first + count),
        ranges=(Range(SOURCE, first, first + count, count),),
    )
    return clock.follow(clicks, clicks.ranges, now_ms).off


@pytest.mark.parametrize("batch", [1000, 100])
def test_each_click_of_one_user_with_a_clock_that_is_ahead_is_counted(batch: int) -> None:
    # Clicks of the day before yesterday are read; one user's clock is a day ahead of the others' and behind the wall clock.
    clock, now_ms, first = EventClock(lambda _: None), BASE_MS + 2 * DAY_MS, 20
    assert follow(clock, 0, list(range(100, 120)), BASE_MS, now_ms) == ()
    for _ in range(CLICKS // batch):
        assert follow(clock, first, [WRONG_USER] * batch, BASE_MS + DAY_MS, now_ms) == ()
        first += batch
    found = follow(clock, first, list(range(200, 220)), BASE_MS + 1000, now_ms)
    assert [(one.direction, one.partition, one.offset, one.clicks) for one in found] == [("ahead", 0, 1019, CLICKS)]
    assert follow(clock, first + 20, list(range(300, 320)), BASE_MS + 2000, now_ms) == ()
