"""Which impressions an event labels: as a join by hand says, however the log is cut, and never twice."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from state.microbatch.row_kinds import Kind
from state.positions import MOST_LEARNED
from streaming import attribution
from streaming.attribution import IMPRESSION, MOST_EXPIRED, OUTCOME, PLAIN, Queue, attribute, enter, pairs

WAIT_MS = 100


class Event(NamedTuple):
    """One event of a made-up log; its offset is its position among those of its source."""

    role: int
    source: int
    at_ms: int
    pair: int


class Resolved(NamedTuple):
    """An impression that became known: by which event of its source, which impression, and how."""

    source: int
    by: int
    opened: int
    kind: int


events = st.builds(
    Event,
    role=st.sampled_from([PLAIN, IMPRESSION, IMPRESSION, OUTCOME]),
    source=st.integers(0, 1),
    # Late, equal and out of order; now and then a jump over many waits.
    at_ms=st.integers(0, 60) | st.integers(0, 400),
    pair=st.integers(0, 3),
)
logs = st.lists(events, max_size=120)


def by_hand(log: list[Event], most: int) -> tuple[list[int], list[Resolved]]:
    """The rules of the module, over lists."""
    waiting: dict[int, list[tuple[int, Event]]] = {0: [], 1: []}
    clock: dict[int, int] = {}
    reached = {0: 0, 1: 0}
    kinds, resolved = [], []
    for event in log:
        offset = reached[event.source]
        reached[event.source] += 1
        mine = waiting[event.source]
        clock[event.source] = max(clock.get(event.source, event.at_ms), event.at_ms)
        over = clock[event.source] - WAIT_MS
        kinds.append(int(Kind.ROW))
        if event.role == OUTCOME:
            kinds[-1] = int(Kind.FEEDBACK)
            matches = [one for one in mine if one[1].pair == event.pair and over <= one[1].at_ms <= event.at_ms]
            if matches:
                mine.remove(matches[-1])
                resolved.append(Resolved(event.source, offset, matches[-1][0], int(Kind.JOINED)))
        elif event.role == IMPRESSION:
            waits = event.at_ms >= over and len(mine) < most
            kinds[-1] = int(Kind.OPENED if waits else Kind.DROPPED)
            if waits:
                mine.append((offset, event))
        for _ in range(MOST_EXPIRED):
            if mine and mine[0][1].at_ms < over:
                resolved.append(Resolved(event.source, offset, mine.pop(0)[0], int(Kind.EXPIRED)))
    return kinds, resolved


def by_kernel(log: list[Event], most: int, sizes: list[int], reload: bool) -> tuple[list[int], list[Resolved]]:
    """The same in batches of `sizes`, repeated; with `reload` the queue is made anew from its rows after each."""
    queue = Queue.of(1, 1)
    reached, newest = {0: 0, 1: 0}, {0: 0, 1: 0}
    kinds: list[int] = []
    resolved: list[Resolved] = []
    at = turn = 0
    while at < len(log):
        batch = log[at : at + sizes[turn % len(sizes)]]
        at, turn = at + len(batch), turn + 1
        offsets, clocks = [], []
        for event in batch:
            offsets.append(reached[event.source])
            newest[event.source] = max(newest[event.source], event.at_ms)
            clocks.append(newest[event.source])
            reached[event.source] += 1
        queue, made = attribute(
            queue,
            np.array([event.role for event in batch], np.uint8),
            np.array([event.source for event in batch], np.int64),
            np.array(offsets, np.int64),
            np.array([event.at_ms for event in batch], np.int64),
            np.array(clocks, np.int64),
            np.array([event.pair for event in batch], np.uint64),
            WAIT_MS,
            most,
        )
        kinds += made.kind.tolist()
        for by, opened, known in zip(made.by.tolist(), made.opened.tolist(), made.known.tolist(), strict=True):
            resolved.append(Resolved(batch[by].source, offsets[by], opened, known))
        if reload:
            queue = enter(Queue.of(1, 2), *queue.rows())
    return kinds, resolved


@given(logs, st.integers(1, 12), st.lists(st.integers(1, 30), min_size=1, max_size=5), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_cutting_gives_what_a_join_by_hand_gives(
    log: list[Event], most: int, sizes: list[int], reload: bool
) -> None:
    assert by_kernel(log, most, sizes, reload) == by_hand(log, most)


@given(logs, st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_each_impression_is_joined_expired_dropped_or_waiting_and_only_once(log: list[Event], most: int) -> None:
    kinds, resolved = by_kernel(log, most, [17], reload=False)
    positions = [(one.source, one.opened) for one in resolved]
    assert len(set(positions)) == len(positions)
    assert len(positions) <= kinds.count(Kind.OPENED)
    assert kinds.count(Kind.OPENED) + kinds.count(Kind.DROPPED) == sum(event.role == IMPRESSION for event in log)


def resolved_by(*log: tuple[int, int, int], most: int = 100) -> list[tuple[int, int, int]]:
    """(by, opened, kind) of a log of one source, as (role, time, pair)."""
    _, resolved = by_kernel([Event(role, 0, at_ms, pair) for role, at_ms, pair in log], most, [1000], reload=False)
    return [(one.by, one.opened, one.kind) for one in resolved]


def test_the_latest_impression_before_the_click_gets_it_and_the_next_click_goes_to_the_one_before() -> None:
    shown = [(IMPRESSION, 0, 7), (IMPRESSION, 1, 7), (IMPRESSION, 2, 8)]
    assert resolved_by(*shown, (OUTCOME, 3, 7), (OUTCOME, 4, 7), (OUTCOME, 5, 7)) == [
        (3, 1, Kind.JOINED),
        (4, 0, Kind.JOINED),
    ]


def test_an_impression_whose_time_lies_after_the_click_is_passed_over() -> None:
    assert resolved_by((IMPRESSION, 1, 7), (IMPRESSION, 9, 7), (OUTCOME, 5, 7)) == [(2, 0, Kind.JOINED)]


def test_a_click_at_the_end_of_the_wait_joins_and_one_after_it_does_not() -> None:
    assert resolved_by((IMPRESSION, 0, 7), (OUTCOME, WAIT_MS, 7)) == [(1, 0, Kind.JOINED)]
    assert resolved_by((IMPRESSION, 0, 7), (OUTCOME, WAIT_MS + 1, 7)) == [(1, 0, Kind.EXPIRED)]


def test_a_late_click_does_not_join_what_the_clock_has_passed() -> None:
    assert resolved_by((IMPRESSION, 0, 7), (PLAIN, WAIT_MS + 1, 0), (OUTCOME, 5, 7)) == [(1, 0, Kind.EXPIRED)]


def test_an_impression_whose_wait_is_over_when_it_arrives_is_dropped() -> None:
    kinds, resolved = by_kernel([Event(PLAIN, 0, 500, 0), Event(IMPRESSION, 0, 1, 7)], 9, [9], reload=False)
    assert (kinds[1], resolved) == (Kind.DROPPED, [])


def test_another_partition_does_not_end_a_wait() -> None:
    log = [Event(IMPRESSION, 0, 0, 7), Event(PLAIN, 1, 9999, 0), Event(OUTCOME, 1, 50, 7), Event(OUTCOME, 0, 50, 7)]
    assert by_kernel(log, 9, [9], reload=False)[1] == [Resolved(0, 1, 0, int(Kind.JOINED))]


def test_one_event_expires_a_few_and_the_next_ones_the_rest() -> None:
    log = [(IMPRESSION, 0, pair) for pair in range(2 * MOST_EXPIRED + 3)]
    last = len(log)
    found = resolved_by(*log, (PLAIN, 999, 0), (PLAIN, 0, 0), (PLAIN, 0, 0))
    assert [by - last for by, _, _ in found] == [0] * MOST_EXPIRED + [1] * MOST_EXPIRED + [2] * 3
    assert [opened for _, opened, _ in found] == list(range(last))


def test_the_accounts_know_how_many_rows_one_position_can_have() -> None:
    log = [(IMPRESSION, 0, pair) for pair in range(2 * MOST_EXPIRED)]
    # An outcome joins the one impression of its time, and ends the wait of the oldest.
    found = resolved_by(*log, (IMPRESSION, 100, 77), (OUTCOME, 150, 77))
    assert max(Counter(by for by, _, _ in found).values()) == MOST_LEARNED == 1 + MOST_EXPIRED


def test_more_than_may_wait_are_dropped() -> None:
    kinds, _ = by_kernel([Event(IMPRESSION, 0, 0, pair) for pair in range(5)], 3, [9], reload=False)
    assert kinds == [Kind.OPENED] * 3 + [Kind.DROPPED] * 2


def test_the_kernels_numbers_are_those_of_the_kinds() -> None:
    for name in ("OPENED", "DROPPED", "FEEDBACK", "JOINED", "EXPIRED"):
        assert getattr(attribution, name) == Kind[name]


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_pair_is_the_same_only_where_user_item_and_request_are(changed: int) -> None:
    ids = [np.arange(1000, dtype=np.uint64), np.arange(1000, dtype=np.uint64) * np.uint64(7), np.zeros(1000, np.uint64)]
    others = [part + np.uint64(index == changed) for index, part in enumerate(ids)]
    assert pairs(*ids).tolist() == pairs(*[part.copy() for part in ids]).tolist()
    assert not set(pairs(*ids).tolist()) & set(pairs(*others).tolist())
