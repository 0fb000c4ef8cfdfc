"""Rows in order of time, and cuts: made in time, with every position exactly once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.events.parser import EventBatch
from state.features.spec import EVENT
from state.history.appends import Appends
from state.microbatch.codec import decode
from state.positions import Source
from streaming.event_clock import EventClock
from streaming.rows import FEW_ROWS, Cut, Cutter, Encoding, Rows, encode_cut, gather, in_order, merge_appends
from tests.streaming.pieces import ONE, ZERO, piece


def rows_of(cuts: Sequence[Cut]) -> list[int]:
    return [sum(len(one.batch.offset) for one in cut.pieces) for cut in cuts]


def polled(cutter: Cutter, at_ms: float, rows: Rows, busy: bool = False) -> list[int]:
    """Polls `rows` at a time; the numbers of rows of the cuts."""
    cutter.poll(at_ms)
    return rows_of(cutter.add(rows, 0, busy))


def cutter_at(begun_ms: float, cut_rows: int = 10) -> Cutter:
    """A cutter that has polled once in vain."""
    cutter = Cutter(cut_rows, cut_ms=100)
    assert polled(cutter, begun_ms, piece()) == []
    return cutter


def test_a_cut_waits_for_rows_or_time() -> None:
    cutter = cutter_at(1000)
    assert polled(cutter, 1050, piece((ZERO, 0, 4))) == []
    assert polled(cutter, 1060, piece((ZERO, 4, 6))) == [10]
    assert polled(cutter, 1100, piece((ZERO, 10, 4))) == []
    assert polled(cutter, 1159, piece()) == []
    assert polled(cutter, 1160, piece()) == [4]
    assert polled(cutter, 9999, piece()) == []


def test_rows_have_waited_since_the_poll_before_theirs() -> None:
    cutter = cutter_at(1000)
    assert polled(cutter, 1050, piece((ZERO, 0, 4))) == []
    assert polled(cutter, 1100, piece((ZERO, 4, 4))) == [8]
    assert polled(cutter, 1170, piece((ZERO, 8, 1))) == []
    assert polled(cutter, 1200, piece((ZERO, 9, 1))) == [2]


def test_rows_wait_up_to_five_times_as_long_while_an_earlier_cut_is_written() -> None:
    cutter = cutter_at(0)
    assert polled(cutter, 50, piece((ZERO, 0, 4)), busy=True) == []
    assert polled(cutter, 499, piece((ZERO, 4, 4)), busy=True) == []
    assert polled(cutter, 500, piece(), busy=True) == [8]
    assert polled(cutter, 550, piece((ZERO, 8, 4)), busy=True) == []
    assert polled(cutter, 600, piece(), busy=False) == [4]
    assert polled(cutter, 650, piece((ZERO, 12, 9)), busy=True) == []
    assert polled(cutter, 660, piece((ZERO, 21, 1)), busy=True) == [10]


def test_few_rows_take_one_poll_and_many_a_second_one_late() -> None:
    cutter = cutter_at(0, cut_rows=4096)
    assert cutter.wait_ms(2, 0) == 98
    assert polled(cutter, 100, piece((ZERO, 0, FEW_ROWS))) == [FEW_ROWS]
    assert cutter.wait_ms(110, 100) == 60
    assert polled(cutter, 170, piece((ZERO, FEW_ROWS, 1))) == []
    assert cutter.wait_ms(175, 170) == 25
    assert polled(cutter, 200, piece()) == [1]
    assert cutter.wait_ms(200, 200) == 100


def test_a_late_poll_is_followed_at_once_and_a_long_interval_is_divided() -> None:
    cutter = cutter_at(0)
    assert cutter.wait_ms(101, 0) == 0
    assert polled(cutter, 110, piece((ZERO, 0, 1)), busy=True) == []
    assert cutter.wait_ms(112, 110) == 98
    slow = Cutter(10, cut_ms=60_000)
    assert polled(slow, 900, piece()) == []
    assert polled(slow, 1000, piece((ZERO, 0, 1))) == []
    assert slow.wait_ms(1010, 1000) == 240


def test_a_poll_waits_for_a_click_until_a_cut_is_due() -> None:
    cutter = cutter_at(1000)
    assert cutter.poll(1500) == 500
    assert rows_of(cutter.add(piece(), 0)) == []
    # The first click after a quiet time is cut at once, and the next poll comes `cut_ms` after it.
    assert cutter.poll(2000) == 500
    assert rows_of(cutter.add(piece((ZERO, 0, 1)), 0)) == [1]
    assert cutter.wait_ms(2402, returned_ms=2400) == 98
    assert polled(cutter, 2450, piece((ZERO, 1, 1)), busy=True) == []
    # The cut was due, and an earlier one is written.
    assert cutter.poll(2600) == 50
    assert rows_of(cutter.add(piece(), 0)) == [1]
    assert polled(cutter, 2650, piece((ZERO, 2, 1))) == []
    assert cutter.poll(2660) == 40
    assert rows_of(cutter.add(piece((ZERO, 3, 1)), 0)) == []
    assert cutter.poll(2710) == 0
    assert rows_of(cutter.add(piece(), 0)) == [2]


def test_a_cut_does_not_wait_long_once_no_further_click_comes() -> None:
    cutter = Cutter(256, cut_ms=60_000)
    assert polled(cutter, 1000, piece()) == []
    assert polled(cutter, 1100, piece((ZERO, 0, 256))) == [256]
    assert polled(cutter, 1110, piece((ZERO, 256, 100))) == []
    # Each click begins the wait again, up to `cut_ms`.
    assert polled(cutter, 7000, piece((ZERO, 356, 24))) == []
    assert polled(cutter, 12_999, piece()) == []
    assert polled(cutter, 13_000, piece(), busy=True) == []
    assert polled(cutter, 13_010, piece()) == [124]
    assert polled(cutter, 80_000, piece()) == []


def test_a_short_pause_between_clicks_ends_no_cut() -> None:
    cutter = cutter_at(0)
    slow = Cutter(10, cut_ms=2000)
    assert polled(slow, 0, piece()) == []
    assert polled(slow, 10, piece((ZERO, 0, 1))) == []
    assert polled(slow, 1009, piece()) == []
    assert polled(slow, 1010, piece()) == [1]
    # A cut of less than a second waits for its time alone.
    assert polled(cutter, 50, piece((ZERO, 0, 1))) == []
    assert polled(cutter, 99, piece()) == []
    assert polled(cutter, 100, piece()) == [1]


def test_the_first_clicks_of_a_process_do_not_wait() -> None:
    assert polled(Cutter(10, cut_ms=100), 5000, piece((ZERO, 0, 4))) == [4]


def test_positions_without_rows_are_cut_in_time_too() -> None:
    cutter = cutter_at(0)
    assert polled(cutter, 50, piece((ZERO, 0, 0), dead=3)) == []
    cutter.poll(100)
    (cut,) = cutter.add(piece(), 0)
    ranges, _ = gather(cut)
    assert [(part.first, part.next, part.dead) for part in ranges] == [(0, 3, 3)]


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 60)), max_size=30))
def test_every_position_is_in_exactly_one_cut_in_order(steps: list[tuple[int, int]]) -> None:
    cutter, cuts, at, now = Cutter(cut_rows=10, cut_ms=100), [], {ZERO: 0, ONE: 0}, 0
    for index, (rows, wait) in enumerate(steps):
        source = (ZERO, ONE)[index % 2]
        now += wait
        cutter.poll(now)
        cuts += cutter.add(piece((source, at[source], rows)) if rows else piece(), now)
        at[source] += rows
    cuts += cutter.flush(now)
    for source, end in at.items():
        seen = []
        for cut in cuts:
            ranges, columns = gather(cut)
            mine = [index for index, part in enumerate(ranges) if part.source == source]
            seen += columns["offset"][np.isin(columns["source"], mine)].tolist()
        assert seen == list(range(end))
    assert max(rows_of(cuts), default=0) <= 10


def test_a_cut_of_several_batches_is_one_micro_batch_with_one_range_a_source() -> None:
    cut = Cut((piece((ZERO, 0, 2), (ONE, 5, 1), dead=1), piece((ONE, 7, 1)), piece((ZERO, 3, 2))), 77)
    (value,) = encode_cut(cut, Encoding("spec", "salt", 100, 900_000))
    batch = decode(value)
    assert batch.header.created_ms == 77
    assert [(part.source, part.first, part.next, part.dead) for part in batch.header.ranges] == [
        (ZERO, 0, 5, 1),
        (ONE, 5, 8, 1),
    ]
    assert [batch.header.ranges[index].source for index in batch.source] == [ZERO, ZERO, ONE, ONE, ZERO, ZERO]
    assert batch.offset.tolist() == [0, 1, 5, 7, 3, 4]
    assert batch.features.tobytes() == np.concatenate([one.vectors.features for one in cut.pieces]).tobytes()


def test_names_of_categories_and_items_go_with_the_cut() -> None:
    first, second = piece((ZERO, 0, 2)), piece((ZERO, 2, 2))
    first = replace(first, batch=replace(first.batch, names={7: "hats"}, item_names={1: "i1"}))
    second = replace(second, batch=replace(second.batch, item_names={2: "i2", 1: "i1"}))
    (value,) = encode_cut(Cut((first, second), 0), Encoding("spec", "salt", 100, 900_000))
    assert decode(value).header.names == {7: "hats", 1: "i1", 2: "i2"}


def test_a_missing_batch_is_noticed() -> None:
    with pytest.raises(ValueError, match="not adjacent"):
        gather(Cut((piece((ZERO, 0, 2)), piece((ZERO, 3, 2))), 0))


def appends_of(*users: tuple[int, Sequence[int]]) -> Appends:
    """Appends of (user, offsets)."""
    lengths = np.array([len(offsets) for _, offsets in users], np.int64)
    events = np.zeros(int(lengths.sum()), EVENT)
    events["offset"] = [offset for _, offsets in users for offset in offsets]
    return Appends(np.array([user for user, _ in users], np.uint64), np.cumsum(lengths) - lengths, lengths, events)


@given(
    st.lists(
        st.dictionaries(st.integers(1, 5), st.lists(st.integers(0, 99), min_size=1, max_size=4), max_size=4), max_size=5
    )
)
def test_merged_appends_hold_each_users_events_in_order(parts: list[dict[int, list[int]]]) -> None:
    merged = merge_appends([appends_of(*part.items()) for part in parts])
    expected: dict[int, list[int]] = {}
    for part in parts:
        for user, offsets in part.items():
            expected.setdefault(user, []).extend(offsets)
    got = {
        int(user): merged.events["offset"][start : start + length].tolist()
        for user, start, length in zip(merged.users, merged.starts, merged.lengths, strict=True)
    }
    assert len(merged.users) == len(got)
    assert got == expected


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
