"""The event clock of a stream counts each click whose clock is off."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from state.positions import Range, Source
from streaming.event_clock import EventClock, OffClock

SOURCE = Source("ab" * 16, 0)
BASE_MS = 1_700_000_000_000
DAY_MS = 86_400_000
WRONG_USER, CLICKS = 7, 1000


class Clicks(NamedTuple):
    user: NDArray[np.uint64]
    at_ms: NDArray[np.int64]
    source: NDArray[np.uint16]
    offset: NDArray[np.int64]


def follow(clock: EventClock, first: int, users: list[int], at_ms: int, now_ms: int) -> tuple[OffClock, ...]:
    """What the clock finds off in a batch of partition 0 that begins at offset `first`."""
    count = len(users)
    clicks = Clicks(
        np.array(users, np.uint64),
        np.full(count, at_ms, np.int64),
        np.zeros(count, np.uint16),
        np.arange(first, first + count),
    )
    return clock.follow(clicks, [Range(SOURCE, first, first + count, count)], now_ms).off


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
