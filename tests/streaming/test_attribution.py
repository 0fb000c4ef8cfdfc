"""Which impressions an event labels: as a join by hand says, however the log is cut and users divided, and never twice."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.microbatch.batch import Kind
from state.positions import MOST_LEARNED
from state.user_shares import SHARES
from streaming import labels
from streaming.labels import (
    IMPRESSION,
    MOST_EXPIRED,
    OUTCOME,
    PLAIN,
    Arrived,
    Limits,
    Queue,
    Segments,
    attribute,
    enter,
    pairs,
)

WAIT_MS = 100
NOTHING = 3  # a role of no event: a position that holds none


class Event(NamedTuple):
    """One position of a made-up log, those of a source in the order of their offsets."""

    role: int
    source: int
    at_ms: int
    pair: int
    user: int = 0


class Resolved(NamedTuple):
    """An impression that became known: at which offset of its source, which impression, and how."""

    source: int
    by: int
    opened: int
    kind: int


events = st.builds(
    Event,
    role=st.sampled_from([PLAIN, IMPRESSION, IMPRESSION, OUTCOME, NOTHING]),
    source=st.integers(0, 1),
    # Late, equal and out of order; now and then a jump over many waits.
    at_ms=st.integers(0, 60) | st.integers(0, 400),
    pair=st.integers(0, 3),
    # Two of one share, and one whose share's turn comes late.
    user=st.sampled_from([3, 3 + SHARES, 12, 40]),
)
logs = st.lists(events, max_size=120)


def by_hand(log: list[Event], most: int) -> tuple[list[int], list[Resolved]]:
    """The rules of the module, over lists."""
    waiting: dict[tuple[int, int], list[tuple[int, Event]]] = {}
    clock: dict[int, int] = {}
    reached = {0: 0, 1: 0}
    kinds, resolved = [], []
    for event in log:
        source, offset = event.source, reached[event.source]
        reached[source] += 1
        mine = waiting.setdefault((source, event.user % SHARES), [])
        if event.role != NOTHING:
            clock[source] = max(clock.get(source, event.at_ms), event.at_ms)
            kinds.append(int(Kind.ROW))
        over = clock.get(source, 0) - WAIT_MS
        if event.role == OUTCOME:
            kinds[-1] = int(Kind.FEEDBACK)
            matches = [one for one in mine if one[1].pair == event.pair and over <= one[1].at_ms <= event.at_ms]
            if matches:
                mine.remove(matches[-1])
                resolved.append(Resolved(source, offset, matches[-1][0], int(Kind.JOINED)))
        elif event.role == IMPRESSION:
            waits = event.at_ms >= over and len(mine) < most
            kinds[-1] = int(Kind.OPENED if waits else Kind.DROPPED)
            if waits:
                mine.append((offset, event))
        for whose, anyones in ((mine, False), (waiting.get((source, offset % SHARES), []), True)):
            for _ in range(MOST_EXPIRED if anyones or event.role != NOTHING else 0):
                if whose and whose[0][1].at_ms < over and (anyones or whose[0][1].user == event.user):
                    resolved.append(Resolved(source, offset, whose.pop(0)[0], int(Kind.EXPIRED)))
    return kinds, resolved


def by_kernel(
    log: list[Event], most: int, sizes: list[int], reload: bool, buckets: int = 1, clocks: list[int] | None = None
) -> tuple[list[int], list[Resolved]]:
    """The same in batches of `sizes`, repeated, for each of `buckets` of the users apart; `reload` makes the queue anew each time."""
    queues = [Queue.of(1, 1) for _ in range(buckets)]
    reached = {0: 0, 1: 0}
    clock: dict[int, int] = {}
    kinds: list[int] = []
    resolved: list[Resolved] = []
    at = turn = 0
    while at < len(log):
        batch = log[at : at + sizes[turn % len(sizes)]]
        first, offsets, after = dict(reached), list[int](), list[int]()
        moves = [(source, reached[source], clock[source]) for source in sorted(clock)]
        for number, event in enumerate(batch, at):
            offsets.append(reached[event.source])
            reached[event.source] += 1
            if event.role != NOTHING:
                told = max(clock.get(event.source, event.at_ms), event.at_ms) if clocks is None else clocks[number]
                clock[event.source] = told
                moves.append((event.source, offsets[-1], told))
            after.append(clock.get(event.source, 0))
        at, turn = at + len(batch), turn + 1
        moves.sort(key=lambda move: move[:2])
        made_kinds = dict[int, int]()
        for bucket in range(buckets):
            mine = [
                number
                for number, event in enumerate(batch)
                if event.role != NOTHING and event.user % SHARES % buckets == bucket
            ]
            queues[bucket], made = attribute(
                queues[bucket],
                Arrived(
                    np.array([batch[number].role for number in mine], np.uint8),
                    np.array([batch[number].source for number in mine], np.int64),
                    np.array([offsets[number] for number in mine], np.int64),
                    np.array([batch[number].at_ms for number in mine], np.int64),
                    np.array([after[number] for number in mine], np.int64),
                    np.array([batch[number].pair for number in mine], np.uint64),
                    np.array([batch[number].user for number in mine], np.uint64),
                ),
                Segments(
                    np.arange(2),
                    np.array([first[0], first[1]], np.int64),
                    np.array([reached[0], reached[1]], np.int64),
                    *(np.array([move[column] for move in moves], np.int64) for column in range(3)),
                ),
                Limits(WAIT_MS, most),
            )
            made_kinds |= dict(zip(mine, made.kind.tolist(), strict=True))
            columns = (made.by, made.segment, made.at, made.opened, made.known)
            for by, source, offset, opened, known in zip(*(column.tolist() for column in columns), strict=True):
                before = [number for number in mine if batch[number].source == source and offsets[number] <= offset]
                assert by == (mine.index(before[-1]) if before else -1)
                resolved.append(Resolved(source, offset, opened, known))
            if reload:
                queues[bucket] = enter(Queue.of(1, 2), queues[bucket].rows())
        kinds += [made_kinds[number] for number in sorted(made_kinds)]
    return kinds, resolved


def in_places(made: tuple[list[int], list[Resolved]]) -> tuple[list[int], list[Resolved]]:
    """With the rows of one position in their order, source by source."""
    return made[0], sorted(made[1], key=lambda one: one[:2])


@given(logs, st.integers(1, 12), st.lists(st.integers(1, 30), min_size=1, max_size=5), st.booleans())
def test_any_cutting_gives_what_a_join_by_hand_gives(
    log: list[Event], most: int, sizes: list[int], reload: bool
) -> None:
    assert in_places(by_kernel(log, most, sizes, reload)) == in_places(by_hand(log, most))


@given(logs, st.integers(1, 12), st.integers(1, 30), st.sampled_from([2, 8, 64]))
def test_however_users_are_divided_each_impression_becomes_known_at_the_same_position(
    log: list[Event], most: int, size: int, buckets: int
) -> None:
    kinds, resolved = by_kernel(log, most, [size], False, buckets)
    whole = by_hand(log, most)
    assert (kinds, sorted(resolved)) == (whole[0], sorted(whole[1]))


@given(
    st.lists(events.map(lambda one: one._replace(source=0)) | st.just(None), max_size=150),
    st.lists(st.sampled_from([PLAIN, IMPRESSION, OUTCOME, NOTHING]), min_size=1),
    st.sampled_from([9, 40]),
)
def test_whatever_late_clicks_lie_between_those_of_others_these_become_known_at_the_same_positions(
    log: list[Event | None], late: list[int], share: int
) -> None:
    """A file of years ago beside live clicks, also of users of the same share; where it is not there, nothing is."""
    users = {one.user for one in log if one is not None}
    stranger = share + 2 * SHARES
    assert stranger not in users
    clock, clocks, found = 0, [], []
    for one in log:
        clock = max(clock, one.at_ms) if one is not None and one.role != NOTHING else clock
        clocks.append(clock)
    for roles in (late, [NOTHING]):
        whole = [one or Event(roles[at % len(roles)], 0, -99_999_999, at % 4, stranger) for at, one in enumerate(log)]
        kinds, resolved = by_kernel(whole, 12, [23], False, clocks=clocks)
        there = [one for one in whole if one.role != NOTHING]
        mine = [kind for kind, one in zip(kinds, there, strict=True) if one.user in users]
        found.append((mine, resolved))
    assert found[0] == found[1]


def test_a_wait_that_is_over_ends_where_it_is_its_shares_turn_whatever_lies_there() -> None:
    """Be it a click of another share, one that is late, one of its own share, or nothing."""
    shown = Event(IMPRESSION, 0, 0, 7, user=3)
    for there in (
        Event(PLAIN, 0, 600, 0, user=40),
        Event(PLAIN, 0, -9999, 0, user=40),
        Event(OUTCOME, 0, -9999, 7, user=3 + SHARES),
        Event(NOTHING, 0, 0, 0),
    ):
        others = [Event(PLAIN, 0, 50 if offset <= 3 else 500, 0, user=3 + SHARES) for offset in range(1, SHARES + 3)]
        log = [shown, *others, there, Event(PLAIN, 0, 700, 0, user=3)]
        assert by_kernel(log, 9, [7], False)[1] == [Resolved(0, SHARES + 3, 0, int(Kind.EXPIRED))]


def test_in_a_stretch_without_events_each_share_has_its_turns() -> None:
    waits = [Event(IMPRESSION, 0, 0, number, 5) for number in range(3 * MOST_EXPIRED)] + [Event(PLAIN, 0, 900, 0, 9)]
    log = [*waits, *[Event(NOTHING, 0, 0, 0)] * (4 * SHARES)]
    ends = [one.by for one in by_kernel(log, 99, [1000], False)[1]]
    turns = [offset for offset in range(len(waits), len(log)) if offset % SHARES == 5]
    assert ends == sorted(turns[:3] * MOST_EXPIRED)


def resolved_by(*log: tuple[int, int, int], most: int = 100) -> list[tuple[int, int, int]]:
    """(by, opened, kind) of a log of one source, as (role, time, pair)."""
    _, resolved = by_kernel([Event(role, 0, at_ms, pair, 0) for role, at_ms, pair in log], most, [1000], reload=False)
    return [(one.by, one.opened, one.kind) for one in resolved]


def test_a_click_at_the_end_of_the_wait_joins_and_one_after_it_does_not() -> None:
    assert resolved_by((IMPRESSION, 0, 7), (OUTCOME, WAIT_MS, 7)) == [(1, 0, Kind.JOINED)]
    assert resolved_by((IMPRESSION, 0, 7), (OUTCOME, WAIT_MS + 1, 7)) == [(1, 0, Kind.EXPIRED)]


def test_a_stretch_of_any_length_without_events_costs_no_more_than_what_waits() -> None:
    queue, nobody, pair = Queue.of(1, 1), np.empty(0, np.int64), np.empty(0, np.uint64)
    none = Arrived(np.empty(0, np.uint8), nobody, nobody, nobody, nobody, pair, pair)
    whole = Segments(*(np.array([one]) for one in (0, 0, 10**15, 0, 7, 500)))
    assert len(attribute(queue, none, whole, Limits(WAIT_MS, 9))[1].by) == 0


def test_the_accounts_know_how_many_rows_one_position_can_have() -> None:
    log = [(IMPRESSION, 0, pair) for pair in range(SHARES - 1)]
    # An outcome joins the one impression of its time, and ends the oldest waits as their user's and where it is their turn.
    found = resolved_by(*log, (IMPRESSION, 100, 77), (OUTCOME, 150, 77))
    assert max(Counter(by for by, _, _ in found).values()) == MOST_LEARNED == 1 + 2 * MOST_EXPIRED


def test_the_kernels_numbers_are_those_of_the_kinds() -> None:
    for name in ("OPENED", "DROPPED", "FEEDBACK", "JOINED", "EXPIRED"):
        assert getattr(labels, name) == Kind[name]


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_pair_is_the_same_only_where_user_item_and_request_are(changed: int) -> None:
    ids = [np.arange(1000, dtype=np.uint64), np.arange(1000, dtype=np.uint64) * np.uint64(7), np.zeros(1000, np.uint64)]
    others = [part + np.uint64(index == changed) for index, part in enumerate(ids)]
    assert pairs(*ids).tolist() == pairs(*[part.copy() for part in ids]).tolist()
    assert not set(pairs(*ids).tolist()) & set(pairs(*others).tolist())
