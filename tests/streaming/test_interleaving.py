"""Rows of several partitions come in the order of time, and those of one partition in its own."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from state.events.parser import EventBatch
from state.positions import Source
from streaming.event_clock import EventClock
from streaming.rows import in_order
from tests.streaming.pieces import piece

TOPIC = "ab" * 16
NOW_MS = 1_800_000_000_000
BEGIN_MS = 1_700_000_000_000
USERS = 20


def batch(*times: list[int], users: int = USERS) -> EventBatch:
    """A batch of one range for each list of times; each partition has its own users."""
    made = piece(*((Source(TOPIC, number), 100, len(one)) for number, one in enumerate(times))).batch
    made.at_ms[:] = [BEGIN_MS + at for one in times for at in one]
    made.user[:] = [1000 * number + place % users for number, one in enumerate(times) for place in range(len(one))]
    return made


def ordered(made: EventBatch, *before: EventBatch) -> EventBatch:
    clock = EventClock(lambda _: None)
    for one in before:
        clock.follow(one, one.ranges, NOW_MS)
    return in_order(made, clock.follow(made, made.ranges, NOW_MS))[0]


@given(st.lists(st.lists(st.integers(0, 10_000), max_size=60), min_size=1, max_size=4))
def test_no_row_is_lost_and_none_passes_another_of_its_partition(times: list[list[int]]) -> None:
    made = batch(*times)
    found = ordered(made)
    for number, one in enumerate(times):
        assert found.offset[found.source == number].tolist() == list(range(100, 100 + len(one)))
    rows = np.argsort(found.source, kind="stable")
    for name in ("user", "item", "at_ms", "label", "weight", "action", "category"):
        assert np.array_equal(getattr(found, name)[rows], getattr(made, name), equal_nan=name == "label")
    assert found.ranges == made.ranges


@given(st.lists(st.lists(st.integers(0, 10_000), max_size=60).map(sorted), min_size=2, max_size=4))
def test_with_right_clocks_the_rows_come_in_the_order_of_time(times: list[list[int]]) -> None:
    found = ordered(batch(*times)).at_ms
    assert (np.diff(found) >= 0).all()


def test_a_wrong_clock_moves_nobody_elses_rows() -> None:
    times = [list(range(0, 6000, 100)), list(range(50, 6000, 100))]
    before, made = batch(*([at - 6000 for at in one] for one in times)), batch(*times)
    wrong = np.flatnonzero(made.user == 3)

    def others() -> list[tuple[int, int]]:
        found = ordered(made, before)
        return [row[:2] for row in zip(found.source, found.offset, found.user, strict=True) if row[2] != 3]

    right = others()
    for off_ms in (-5 * 3_600_000, 5 * 3_600_000):
        made.at_ms[wrong] += off_ms
        assert others() == right
        made.at_ms[wrong] -= off_ms


def test_what_was_told_of_a_row_stays_with_it() -> None:
    made = batch([0, 1000, 2000], [500, 1500, 2500])
    clock = EventClock(lambda _: None)
    told = clock.follow(made, made.ranges, NOW_MS)
    found, moved = in_order(made, told)
    assert sorted(zip(found.offset, found.source, moved.clock_ms, strict=True)) == sorted(
        zip(made.offset, made.source, told.clock_ms, strict=True)
    )
    assert (moved.clocks, moved.state, moved.off) == (told.clocks, told.state, told.off)
