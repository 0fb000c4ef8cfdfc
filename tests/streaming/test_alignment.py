"""Which partitions are read next: a backlog comes in order, nobody is held up for ever, and no user decides for others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from state.microbatch.batch import TOLERANCE_MS
from state.positions import Range, Source
from streaming.alignment import SILENT_S, Alignment, Reached, ReadingPlace, to_one_time
from streaming.event_clock import AGREEING, PATIENCE, EventClock
from tests.streaming.pieces import piece

SKEW_MS = 60_000
MOST = 100
POLL_S = 0.02
TOPIC = "ab" * 16
HOUR_MS = 3_600_000
BEGIN_MS = 1_700_000_000_000


@dataclass
class Reading:
    """Partitions, given by the times of their records, that are read as a source reads them; those in `away` give nothing."""

    logs: list[list[int]]
    alignment: Alignment = field(default_factory=lambda: Alignment(SKEW_MS))
    positions: list[int] = field(default_factory=list)
    away: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.positions = [0] * len(self.logs)

    def reached(self, partition: int) -> Reached:
        """What the users of a partition say."""
        at = self.positions[partition]
        return Reached(self.logs[partition][at - 1] if at else None, False)

    def unread(self, partition: int) -> int:
        return len(self.logs[partition]) - self.positions[partition]

    def poll(self) -> dict[int, list[int]]:
        """One poll: by partition the times of what came."""
        places = {one: ReadingPlace(self.positions[one], self.unread(one)) for one in range(len(self.logs))}
        shares = self.alignment.shares(places, MOST)
        came: dict[int, list[int]] = {}
        for one, share in shares.items():
            first = self.positions[one]
            if one not in self.away and (found := self.logs[one][first : first + share]):
                self.taken(one, first, found)
                came[one], self.positions[one] = found, first + len(found)
        self.alignment.polled(shares, came, POLL_S)
        for one, found in came.items():
            self.alignment.follow(one, len(found), self.reached(one))
        return came

    def taken(self, partition: int, first: int, times: Sequence[int]) -> None:
        """Is told of what came, before it counts."""

    def all(self) -> list[dict[int, list[int]]]:
        """Polls until everything is read, each of which must find something."""
        polls = []
        while any(self.unread(one) for one in range(len(self.logs))):
            polls.append(self.poll())
            assert polls[-1], "nothing was read, and something is there"
        return polls


def ascending(gaps: Iterable[int], begin_ms: int = 0) -> list[int]:
    found: list[int] = (begin_ms + np.cumsum(list(gaps))).tolist()
    return found


@st.composite
def backlogs(draw: st.DrawFn) -> list[list[int]]:
    """Logs in order, of any length and pace, that begin at any time."""
    chance = np.random.default_rng(draw(st.integers(0, 2**32)))
    lengths = draw(st.lists(st.integers(0, 400), min_size=1, max_size=5))
    paces = [draw(st.sampled_from([0, 10, 1000, 2 * SKEW_MS])) for _ in lengths]
    return [
        ascending(chance.integers(0, pace + 1, length), int(chance.integers(0, 10 * SKEW_MS)))
        for length, pace in zip(lengths, paces, strict=True)
    ]


@given(backlogs())
def test_all_is_read_in_order_and_no_partition_goes_on_while_it_is_too_far_ahead(logs: list[list[int]]) -> None:
    reading = Reading(logs)
    seen: list[list[int]] = [[] for _ in logs]
    while any(reading.unread(one) for one in range(len(logs))):
        clocks = {one: reading.reached(one).crowd_ms for one in range(len(logs))}
        behind = [one for one in clocks if reading.unread(one)]
        came = reading.poll()
        assert came and sum(map(len, came.values())) <= MOST + len(logs)
        for one, found in came.items():
            seen[one] += found
            for other in behind:
                mine, theirs = clocks[one], clocks[other]
                assert mine is None or (theirs is not None and mine <= theirs + SKEW_MS)
    assert seen == logs


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=4), st.integers(0, 99))
def test_partitions_of_any_rates_advance_together(rates: list[int], seed: int) -> None:
    clicks, chance = 6000, np.random.default_rng(seed)
    # A click a second over all.
    of_click = np.repeat(np.arange(len(rates)), rates)[chance.integers(0, sum(rates), clicks)]
    logs = [(1000 * np.flatnonzero(of_click == one)).tolist() for one in range(len(rates))]
    reading, apart = Reading(logs), []
    while all(reading.unread(one) for one in range(len(logs))):
        reading.poll()
        times = [reading.reached(one).crowd_ms or 0 for one in range(len(logs))]
        apart.append(max(times) - min(times))
    # The first polls know no pace.
    assert np.median(apart[5:] or [0]) <= 2 * MOST * 1000


def test_what_gives_nothing_holds_nobody_up_for_more_than_a_second_and_again_once_it_gives() -> None:
    reading = Reading([ascending([1000] * 900), ascending([1000] * 900)])
    for _ in range(3):
        reading.poll()
    reading.away.add(0)
    polls = 0
    while reading.unread(1) > 300:
        reading.poll()
        polls += 1
    assert polls * POLL_S <= SILENT_S + 20 * POLL_S
    reading.away.clear()
    caught_up = [reading.poll() for _ in range(3)]
    assert [set(one) for one in caught_up[1:]] == [{0}, {0}], "who was silent is read until it is there"


def test_nobody_waits_for_what_comes_after_the_wait_began() -> None:
    # Its clock is three hours behind for good, and more comes than one poll reads.
    late, right = ascending([10] * 1000), ascending([10] * 1000, begin_ms=3 * HOUR_MS)
    reading, turns = Reading([late, right]), []
    for number in range(60):
        late += ascending([10] * (2 * MOST), begin_ms=late[-1])
        if 1 in reading.poll():
            turns.append(number)
    waits = np.diff(turns)
    assert len(turns) >= 2 and reading.unread(0) > 1000
    assert turns[1] <= 2 * 1000 // MOST and waits.max() <= 40


def test_a_new_partition_is_looked_at_and_then_waits_for_its_time() -> None:
    reading = Reading([ascending([1000] * 2000)])
    for _ in range(3):
        reading.poll()
    reading.logs.append(ascending([1000] * 100, begin_ms=1_500_000))
    reading.positions.append(0)
    assert set(reading.poll()) == {1} and reading.positions[1] <= MOST // 2
    at = reading.positions[1]
    while (reading.reached(0).crowd_ms or 0) < 1_500_000 - SKEW_MS - 2 * MOST * 1000:
        assert set(reading.poll()) == {0}
    reading.all()
    assert at < reading.positions[1] == 100


def test_what_says_nothing_of_its_time_is_read_beside_the_others() -> None:
    class Refused(Reading):
        def reached(self, partition: int) -> Reached:
            return Reached(None, False) if partition == 0 else super().reached(partition)

    came = Refused([[0] * 500, ascending([1000] * 500)]).all()
    assert all(set(one) == {0, 1} for one in came[1:5])


# With the witnesses


class Told(Reading):
    """The same with users: what time it is their clicks say."""

    def __init__(self, logs: list[list[int]], users: Callable[[int, int], int]) -> None:
        super().__init__(logs)
        self.users, self.clock = users, EventClock(lambda _: None)

    def reached(self, partition: int) -> Reached:
        return self.clock.reached(Source(TOPIC, partition))

    def taken(self, partition: int, first: int, times: Sequence[int]) -> None:
        rows = piece((Source(TOPIC, partition), first, len(times))).batch
        rows.at_ms[:] = times
        rows.user[:] = [self.users(partition, first + one) for one in range(len(times))]
        now_ms = BEGIN_MS + 1000 * HOUR_MS
        self.clock.follow(rows, (Range(Source(TOPIC, partition), first, first + len(times), rows=len(times)),), now_ms)


def crowded(partition: int, offset: int) -> int:
    return 1000 * partition + offset % 40


def honest(clicks: int) -> list[list[int]]:
    return [ascending([1000] * clicks, begin_ms=BEGIN_MS) for _ in range(2)]


@settings(max_examples=20, deadline=None)
@given(st.integers(-30 * HOUR_MS, 30 * HOUR_MS), st.integers(2, 6))
def test_one_users_wrong_clock_neither_holds_others_up_nor_lets_them_go(off_ms: int, every: int) -> None:
    logs = honest(800)
    for position in range(0, 800, every):
        logs[0][position] += off_ms

    def users(partition: int, offset: int) -> int:
        return 7 if partition == 0 and offset % every == 0 else crowded(partition, offset)

    polls = Told(logs, users).all()
    read = np.cumsum([[len(one.get(number, [])) for number in (0, 1)] for one in polls], axis=0)
    # A click a second: both are read as evenly as with right clocks, by what one poll brings.
    assert np.abs(read[:, 0] - read[:, 1]).max() <= 2 * MOST


def test_a_late_file_is_read_beside_the_others_also_when_its_clock_begins_anew() -> None:
    logs = honest(2 * PATIENCE + 2000)
    file = ascending([1000] * (2 * PATIENCE), begin_ms=BEGIN_MS - 100 * HOUR_MS)
    logs[0] = logs[0][:500] + file + logs[0][500:2000]
    polls = Told(logs, crowded).all()
    in_file = [one for one in polls if 0 in one and one[0][-1] < BEGIN_MS - TOLERANCE_MS]
    assert len(in_file) > 5
    # Until the crowd knows that it is late, as many clicks as decide about it may pass.
    assert all(1 in one for one in in_file[2:])
    assert AGREEING < MOST


# Shares


@given(
    st.lists(st.tuples(st.integers(0, 100_000), st.floats(0.001, 10_000.0)), min_size=1, max_size=6),
    st.integers(1, 2000),
)
def test_shares_bring_those_behind_to_one_time(clocks: list[tuple[int, float]], most: int) -> None:
    found = to_one_time(clocks, most)
    assert 1 <= sum(found) <= most + 1 and min(found) >= 0
    after = [at_ms + records * pace for (at_ms, pace), records in zip(clocks, found, strict=True)]
    reached = [time + pace for time, (_, pace), records in zip(after, clocks, found, strict=True) if records]
    # Who gets nothing is there already, and no other one is a record beyond.
    for time, (at_ms, pace), records in zip(after, clocks, found, strict=True):
        assert time <= min(reached) + pace + 1 if records > 1 else True
        assert records or at_ms >= min(reached) - 2 * pace - 1 or sum(found) >= most - len(clocks)
