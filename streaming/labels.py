"""Delayed labels: which impressions wait for an outcome, which event labels them, and when their wait ends.

Positions are processed in the order of a partition's log, by the clock of `streaming.event_clock`. That clock is the
newest event time so far, unless some user's clock is wrong.

1. An outcome labels the latest waiting impression of the same pair. The impression's time must not be after the
   outcome's, and its wait must not be over.
2. An impression begins to wait at its time, or at the clock if its time is ahead of the clock. It does not wait if its
   wait would already be over, because no outcome could join it, or if too many impressions wait.
3. Impressions of a share of the users expire in order of arrival once their wait is over. They expire at an event of
   the user of the oldest impression, or at the share's turn. The turn is at each `SHARES`th offset, whether that offset
   contains a click or nothing. So no other user's click, late or not, decides where a wait ends. At most
   `MOST_EXPIRED` expire at once, so that one position yields few rows.

So any division of the log into batches, and of the users into shares, gives the same result. In the Beam thread,
`Labels.attribute` applies the rules. In the commit thread, `complete` reads the labelled impressions from the store.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from state.accounts import StreamAccount
from state.compiled import compiled, inlined, layout, mixed
from state.config.settings import Settings
from state.errors import CorruptStore
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.history.waiting import Changes, Extra, WaitingRows, WaitingStore, keys_of, place_of
from state.microbatch.batch import Kind, Known, counts_by_range
from state.positions import Range, Source
from state.user_shares import SHARES
from streaming.rows import Rows

I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]
U8 = NDArray[np.uint8]

MOST_EXPIRED = 8
NONE = -1
ANY_USER = np.uint64(0)  # no user has this id
NEVER_MS = np.iinfo(np.int64).min
_FREE = 0

# Roles of actions, and the kinds of `state.microbatch.batch`; a test compares the numbers.
PLAIN, IMPRESSION, OUTCOME = 0, 1, 2
OPENED, DROPPED, FEEDBACK, JOINED, EXPIRED = 1, 2, 3, 4, 5

LOADED_AT_ONCE = 10_000
logger = logging.getLogger(__name__)


@layout(
    "i8[::1], i8[::1], i8[::1], u8[::1], u8[::1], i8[::1], i8[:, ::1], i8[::1], i8[:, ::1], i8[::1], i8[::1], i8[::1]"
)
class Queue(NamedTuple):
    """The waiting impressions, each in a slot; slots are linked into two chains, by share of a partition and by pair.

    An impression takes about 100 bytes here; its row is in the store.

    Attributes:
        offset: `[S]` int64.
        at_ms: `[S]` int64.
        begun_ms: `[S]` int64, when it began to wait.
        pair: `[S]` uint64.
        user: `[S]` uint64.
        share: `[S]` int64, `SHARES` times the number of the partition, plus the index of the share in it.
        chain: `[S, 4]` int64: next and previous slot of the share, older and newer slot of the hash bucket.
        buckets: `[B]` int64, for each bucket the newest slot of its pairs; B is a power of two.
        first: `[Q, 2]` int64, the oldest and the newest slot of each share.
        waiting: `[Q]` int64, number of waiting impressions.
        free: `[S]` int64, the free slots; the first `sizes[0]` entries are valid.
        sizes: `[1]` int64.
    """

    offset: I64
    at_ms: I64
    begun_ms: I64
    pair: U64
    user: U64
    share: I64
    chain: I64
    buckets: I64
    first: I64
    waiting: I64
    free: I64
    sizes: I64

    @classmethod
    def of(cls, slots: int, partitions: int) -> Queue:
        """An empty queue."""
        buckets = 1 << max(4, (slots - 1).bit_length())
        return cls(
            np.zeros(slots, np.int64),
            np.zeros(slots, np.int64),
            np.zeros(slots, np.int64),
            np.zeros(slots, np.uint64),
            np.zeros(slots, np.uint64),
            np.zeros(slots, np.int64),
            np.full((slots, 4), NONE, np.int64),
            np.full(buckets, NONE, np.int64),
            np.full((partitions * SHARES, 2), NONE, np.int64),
            np.zeros(partitions * SHARES, np.int64),
            np.arange(slots, dtype=np.int64)[::-1].copy(),
            np.array([slots], np.int64),
        )

    @property
    def free_slots(self) -> int:
        """Number of further impressions that fit."""
        return int(self.sizes[_FREE])

    def rows(self) -> WaitingImpressions:
        """All waiting impressions, those of a share in order."""
        slots: list[int] = []
        for slot in self.first[:, 0].tolist():
            while slot != NONE:
                slots.append(slot)
                slot = int(self.chain[slot, 0])
        at = np.array(slots, np.int64)
        return WaitingImpressions(
            self.offset[at], self.at_ms[at], self.begun_ms[at], self.pair[at], self.user[at], self.share[at] // SHARES
        )


@layout("i8[::1], i8[::1], i8[::1], u8[::1], u8[::1], i8[::1]")
class WaitingImpressions(NamedTuple):
    """Waiting impressions, those of a share in the order of their offsets; columns as in `Queue`, `[n]` each.

    `partition` is the number of the partition.
    """

    offset: I64
    at_ms: I64
    begun_ms: I64
    pair: U64
    user: U64
    partition: I64


def with_space(queue: Queue, added: int, partitions: int) -> Queue:
    """Returns a queue with space for `added` impressions and `partitions` partitions; `queue` itself if it has that."""
    slots, partitions_held = len(queue.offset), len(queue.waiting) // SHARES
    if queue.free_slots >= added and partitions_held >= partitions:
        return queue
    used = slots - queue.free_slots
    grown = Queue.of(
        max(slots, 2 * (used + added)) if used + added > slots else slots, max(partitions_held, partitions)
    )
    _enter(grown, queue.rows())
    return grown


def enter(queue: Queue, waiting: WaitingImpressions) -> Queue:
    """Adds impressions that already wait."""
    queue = with_space(queue, len(waiting.offset), int(waiting.partition.max(initial=-1)) + 1)
    # Copies, because arrays from a store are read-only, and kernels would be compiled again for that type.
    _enter(queue, WaitingImpressions._make(map(np.array, waiting)))
    return queue


@inlined
def share_number(partition: int, user: int) -> int:
    """The number of the share in which a user's impressions of a partition wait."""
    return partition * SHARES + int(np.int64(np.uint64(user) % np.uint64(SHARES)))


@inlined
def begin(queue: Queue, offset: int, at_ms: int, begun_ms: int, pair: int, user: int, share: int) -> None:
    """Adds an impression as the newest of its share."""
    queue.sizes[_FREE] -= 1
    slot = queue.free[queue.sizes[_FREE]]
    queue.offset[slot] = offset
    queue.at_ms[slot] = at_ms
    queue.begun_ms[slot] = begun_ms
    queue.pair[slot] = pair
    queue.user[slot] = user
    queue.share[slot] = share
    # 1. The newest of its share.
    last = queue.first[share, 1]
    queue.chain[slot, 0] = NONE
    queue.chain[slot, 1] = last
    if last == NONE:
        queue.first[share, 0] = slot
    else:
        queue.chain[last, 0] = slot
    queue.first[share, 1] = slot
    # 2. The newest of its bucket.
    bucket = np.int64(np.uint64(pair) & np.uint64(queue.buckets.shape[0] - 1))
    older = queue.buckets[bucket]
    queue.chain[slot, 2] = older
    queue.chain[slot, 3] = NONE
    if older != NONE:
        queue.chain[older, 3] = slot
    queue.buckets[bucket] = slot
    queue.waiting[share] += 1


@inlined
def close(queue: Queue, slot: int) -> None:
    """Removes the impression in a slot."""
    share = queue.share[slot]
    after, before, older, newer = queue.chain[slot, 0], queue.chain[slot, 1], queue.chain[slot, 2], queue.chain[slot, 3]
    if before == NONE:
        queue.first[share, 0] = after
    else:
        queue.chain[before, 0] = after
    if after == NONE:
        queue.first[share, 1] = before
    else:
        queue.chain[after, 1] = before
    if newer == NONE:
        queue.buckets[np.int64(queue.pair[slot] & np.uint64(queue.buckets.shape[0] - 1))] = older
    else:
        queue.chain[newer, 2] = older
    if older != NONE:
        queue.chain[older, 3] = newer
    queue.waiting[share] -= 1
    queue.free[queue.sizes[_FREE]] = slot
    queue.sizes[_FREE] += 1


@compiled("Queue, WaitingImpressions")
def _enter(queue: Queue, waiting: WaitingImpressions) -> None:
    for n in range(waiting.offset.shape[0]):
        user = waiting.user[n]
        share = share_number(waiting.partition[n], user)
        begin(queue, waiting.offset[n], waiting.at_ms[n], waiting.begun_ms[n], waiting.pair[n], user, share)


@layout("u1[::1], i8[::1], i8[::1], i8[::1], i8[::1], u8[::1], u8[::1]")
class Arrived(NamedTuple):
    """Events; those of a segment are in order of arrival.

    Attributes:
        role: `[n]` uint8: PLAIN, IMPRESSION or OUTCOME.
        segment: `[n]` int64, index of the segment that contains it.
        offset: `[n]` int64.
        at_ms: `[n]` int64.
        clock_ms: `[n]` int64, its partition's clock after it.
        pair: `[n]` uint64 of `pairs`.
        user: `[n]` uint64.
    """

    role: U8
    segment: I64
    offset: I64
    at_ms: I64
    clock_ms: I64
    pair: U64
    user: U64


@layout("i8[::1], i8[::1], i8[::1], i8[::1], i8[::1], i8[::1]")
class Segments(NamedTuple):
    """Segments of partitions, each processed from its first position to its last.

    Attributes:
        partition: `[r]` int64, its number.
        first: `[r]` int64 offset.
        next: `[r]` int64, the offset after the last one.
        move_segment: `[m]` int64, ascending: the segment in which the clock moved,
        move_offset: `[m]` int64, the offset from which on it moved, ascending in a segment,
        move_ms: `[m]` int64, and its new time.
    """

    partition: I64
    first: I64
    next: I64
    move_segment: I64
    move_offset: I64
    move_ms: I64


@layout("i8[::1], i8[::1], i8[::1]")
class Order(NamedTuple):
    """The order in which `_attribute` processes segments of r partitions.

    Attributes:
        events: `[n]` int64, the events by segment, those of a segment in order.
        begins: `[r + 1]` int64, the place in `events` of each segment's first event, and the end.
        moves: `[r + 1]` int64, each segment's first move of the clock, and the end.
    """

    events: I64
    begins: I64
    moves: I64


@layout("i8, i8")
class Limits(NamedTuple):
    """How long an impression waits, and how many impressions of a share wait at most."""

    wait_ms: int
    most: int


@layout("u1[::1], i8[::1], i8[::1], i8[::1], i8[::1], u1[::1], i8[::1]")
class Attributed(NamedTuple):
    """The kind of each event, and the labels that became known at which positions: segment by segment, in order.

    Attributes:
        kind: `[n]` uint8 `Kind` of each event.
        by: `[m]` int64, the last event of the segment that is not after the position; `NONE` before the first one.
        segment: `[m]` int64, the segment of the position.
        at: `[m]` int64 offset of the position.
        opened: `[m]` int64 offset of the impression.
        known: `[m]` uint8, JOINED or EXPIRED.
        opened_ms: `[m]` int64, time of the impression.
    """

    kind: U8
    by: I64
    segment: I64
    at: I64
    opened: I64
    known: U8
    opened_ms: I64


@layout("i8, i8, i8")
class Position(NamedTuple):
    """A position at which labels become known; fields as in `Attributed`."""

    by: int
    segment: int
    at: int


def pairs(user: U64, item: U64, request: U64) -> U64:
    """`[n]` uint64 keys that pair an impression with its outcome.

    A pair collides with one of 1e6 others with probability below 1e-13.
    """
    sums = np.zeros(len(user), np.uint64)
    for part in (user, item, request):
        sums = mixed(sums + np.uint64(0x9E3779B97F4A7C15) + part)
    return sums


def attribute(queue: Queue, arrived: Arrived, segments: Segments, limits: Limits) -> tuple[Queue, Attributed]:
    """Processes segments of partitions; returns the queue to continue with, and the labels that became known.

    Each segment continues where an earlier one of its partition ended.
    """
    events, impressions = len(arrived.role), int((arrived.role == IMPRESSION).sum())
    queue = with_space(queue, impressions, int(segments.partition.max(initial=-1)) + 1)
    waiting = len(queue.offset) - queue.free_slots
    positions = int((segments.next - segments.first).sum())
    most_known = min((1 + MOST_EXPIRED) * events + MOST_EXPIRED * positions, waiting + impressions)
    by, segment, at, opened, opened_ms = (np.empty(most_known, np.int64) for _ in range(5))
    result = Attributed(np.zeros(events, np.uint8), by, segment, at, opened, np.empty(most_known, np.uint8), opened_ms)
    by_segment, numbers = np.argsort(arrived.segment, kind="stable"), np.arange(len(segments.first) + 1)
    order = Order(
        events=by_segment,
        begins=np.searchsorted(arrived.segment[by_segment], numbers),
        moves=np.searchsorted(segments.move_segment, numbers),
    )
    count = _attribute(queue, arrived, segments, order, limits, result)
    return queue, Attributed._make([result.kind, *(column[:count] for column in result[1:])])


@inlined
def _resolve(queue: Queue, slot: int, known: int, position: Position, result: Attributed, count: int) -> int:
    """Ends the wait of the impression in a slot; returns the number of labels so far."""
    result.by[count] = position.by
    result.segment[count] = position.segment
    result.at[count] = position.at
    result.opened[count] = queue.offset[slot]
    result.known[count] = known
    result.opened_ms[count] = queue.at_ms[slot]
    close(queue, slot)
    return count + 1


@inlined
def _impression_of(queue: Queue, arrived: Arrived, n: int, share: int, wait_ms: int) -> int:
    """The slot of the waiting impression that outcome n labels; `NONE` if there is none."""
    time, over_ms = arrived.at_ms[n], arrived.clock_ms[n] - wait_ms
    slot = queue.buckets[np.int64(arrived.pair[n] & np.uint64(queue.buckets.shape[0] - 1))]
    while slot != NONE:
        is_pair = queue.pair[slot] == arrived.pair[n] and queue.share[slot] == share
        # The user's own clock counts too: it may be ahead of the others' or behind them.
        if is_pair and over_ms <= queue.begun_ms[slot] and time - wait_ms <= queue.at_ms[slot] <= time:
            break
        slot = queue.chain[slot, 2]
    return int(slot)


@inlined
def _expire(
    queue: Queue, share: int, over_ms: int, user: np.uint64, position: Position, result: Attributed, count: int
) -> int:
    """Expires the oldest impressions of a share that have waited long enough, up to the first of another user than `user`."""
    for _ in range(MOST_EXPIRED):
        slot = queue.first[share, 0]
        if slot == NONE or queue.begun_ms[slot] >= over_ms or (user != ANY_USER and queue.user[slot] != user):
            break
        count = _resolve(queue, slot, EXPIRED, position, result, count)
    return count


@compiled("Queue, Arrived, Segments, Order, Limits, Attributed")
def _attribute(
    queue: Queue, arrived: Arrived, segments: Segments, order: Order, limits: Limits, result: Attributed
) -> int:
    count, wait_ms = 0, limits.wait_ms
    for r in range(segments.first.shape[0]):
        partition, at, move, last = segments.partition[r], segments.first[r], order.moves[r], NONE
        turn_over_ms = NEVER_MS
        for number in range(order.begins[r], order.begins[r + 1] + 1):
            n = order.events[number] if number < order.begins[r + 1] else NONE
            until_offset = arrived.offset[n] if n != NONE else segments.next[r]
            # 3. at the turn of a share, starting from the previous event.
            while at < until_offset:
                while move < order.moves[r + 1] and segments.move_offset[move] <= at:
                    turn_over_ms = segments.move_ms[move] - wait_ms
                    move += 1
                until = min(until_offset, segments.move_offset[move]) if move < order.moves[r + 1] else until_offset
                idle = 0
                # Once a turn of each share has expired nothing, no further turn can expire anything.
                while at < until and idle < SHARES:
                    before = count
                    share = partition * SHARES + at % SHARES
                    count = _expire(queue, share, turn_over_ms, ANY_USER, Position(last, r, at), result, count)
                    idle = idle + 1 if count == before else 0
                    at += 1
                at = until
            if n == NONE:
                break
            user, offset = arrived.user[n], arrived.offset[n]
            share = share_number(partition, user)
            over_ms = arrived.clock_ms[n] - wait_ms
            # 1.
            if arrived.role[n] == OUTCOME:
                result.kind[n] = FEEDBACK
                slot = _impression_of(queue, arrived, n, share, wait_ms)
                if slot != NONE:
                    count = _resolve(queue, slot, JOINED, Position(n, r, offset), result, count)
            # 2.
            elif arrived.role[n] == IMPRESSION:
                begun_ms = min(arrived.at_ms[n], arrived.clock_ms[n])
                if begun_ms < over_ms or queue.waiting[share] >= limits.most:
                    result.kind[n] = DROPPED
                else:
                    result.kind[n] = OPENED
                    begin(queue, offset, arrived.at_ms[n], begun_ms, arrived.pair[n], user, share)
            # 3. at an event of its own user.
            count = _expire(queue, share, over_ms, user, Position(n, r, offset), result, count)
            last = n
    return count


class Labels:
    """The waiting impressions of one stream, or of one bucket of its users.

    One thread calls `attribute`. One thread calls `complete`, and commits before it calls again.
    """

    def __init__(self, settings: Settings, store: WaitingStore) -> None:
        labels = settings.labels
        named = {**dict.fromkeys(labels.impressions, IMPRESSION), **dict.fromkeys(labels.outcomes, OUTCOME)}
        self._roles = np.array([named.get(name, PLAIN) for name in settings.events.actions], np.uint8)
        # Each share of a partition has its part of the maximum: no share knows how many wait in another.
        self._limits = Limits(round(labels.wait_s * 1000), -(-labels.max_waiting // SHARES))
        self._rows = WaitingRows(store)
        self._numbers: dict[tuple[str, int], int] = {}
        self._queue = self._load(store)

    def _load(self, store: WaitingStore) -> Queue:
        queue = Queue.of(1024, 1)
        rows = store.waiting()
        while chunk := list(itertools.islice(rows, LOADED_AT_ONCE)):
            assert self._rows.format is not None, "written with the first row"
            columns = self._rows.format.unpack([value for _, value in chunk])
            positions = [place_of(key) for key, _ in chunk]
            pair = pairs(*(columns.get(name, np.zeros(len(chunk), np.uint64)) for name in ("user", "item", "request")))
            offsets = np.array([offset for _, offset in positions], np.int64)
            partitions, at_ms = self._number([source for source, _ in positions]), columns["at_ms"]
            begun_ms = at_ms + columns.get("delay_ms", np.zeros(len(chunk), np.int64))
            queue = enter(queue, WaitingImpressions(offsets, at_ms, begun_ms, pair, columns["user"], partitions))
        return queue

    def _number(self, sources: Sequence[Source]) -> NDArray[np.int64]:
        """Numbers the partition of each source, the same for all its buckets: `[n]` int64."""
        numbers = self._numbers
        return np.array(
            [numbers.setdefault((source.topic_id, source.partition), len(numbers)) for source in sources], np.int64
        )

    def attribute(self, rows: Rows) -> Rows:
        """Determines which events wait and which earlier impressions receive a label, by the clocks of `rows.clock`."""
        batch, clock = rows.batch, rows.clock
        if not batch.ranges:
            return rows
        assert clock is not None, "the event clock comes before the labels"
        role = self._roles[batch.action]
        role[(role == IMPRESSION) & ~np.isnan(batch.label)] = PLAIN
        request = batch.request if len(batch.request) else np.zeros(len(batch), np.uint64)
        pair = pairs(batch.user, batch.item, request)
        source = batch.source.astype(np.int64)
        self._queue, result = attribute(
            self._queue,
            Arrived(role, source, batch.offset, batch.at_ms, clock.clock_ms, pair, batch.user),
            Segments(
                self._number([part.source for part in batch.ranges]),
                np.array([part.first for part in batch.ranges], np.int64),
                np.array([part.next for part in batch.ranges], np.int64),
                clock.moves.source.astype(np.int64),
                clock.moves.offset,
                clock.moves.clock_ms,
            ),
            self._limits,
        )
        joined = np.flatnonzero(result.known == Kind.JOINED)
        by, count = result.by[joined], len(result.by)
        known = Known(
            by=result.by,
            source=result.segment.astype(np.uint16),
            offset=result.at,
            opened=result.opened,
            kind=result.known,
            label=np.zeros(count, np.float32),
            weight=np.full(count, np.nan, np.float32),
            at_ms=result.opened_ms + self._limits.wait_ms,
        )
        known.label[joined] = np.where(np.isnan(batch.label[by]), np.float32(1.0), batch.label[by])
        known.weight[joined] = batch.weight[by]
        known.at_ms[joined] = batch.at_ms[by]
        kinds, sources = np.concatenate([result.kind, known.kind]), np.concatenate([batch.source, known.source])
        counted: list[dict[str, Any]] = [*counts_by_range(kinds, sources, len(batch.ranges))]
        ranges = tuple(replace(part, **counts) for part, counts in zip(batch.ranges, counted, strict=True))
        delay_ms = np.where(result.kind == Kind.OPENED, np.minimum(clock.clock_ms - batch.at_ms, 0), 0)
        return replace(rows, batch=replace(batch, ranges=ranges), kind=result.kind, known=known, delay_ms=delay_ms)

    def complete(self, rows: Rows, waiting: Changes, extra: Extra) -> Rows:
        """Completes the rows of `attribute` with the columns of the earlier impressions.

        The changes of waiting rows and values of the store's owner that must be committed with these rows are added to `waiting`
        and `extra`. Both also hold those of preceding batches that are not committed yet.

        Raises:
            CorruptStore: The store lacks an earlier impression.
        """
        if rows.known is None:
            return rows
        batch, events, known = rows.batch, rows.events, rows.known
        sources = [part.source for part in batch.ranges]
        now = self._rows.adopt(events, waiting, extra)
        waits = np.flatnonzero(rows.kind == Kind.OPENED)
        if len(waits):
            keys = keys_of(sources, batch.source[waits], batch.offset[waits])
            packed = now.pack({name: column[waits] for name, column in events.items()})
            waiting.update(zip(keys, packed, strict=True))
        if not len(known):
            return replace(rows, known=replace(known, columns={}))
        keys = keys_of(sources, known.source, known.opened)
        values = [value for value in self._rows.values(keys, waiting) if value is not None]
        if len(values) != len(keys):
            raise CorruptStore(
                f"{len(keys) - len(values)} rows that wait are not in the store",
                "`springtide rebuild-history` rebuilds it",
            )
        waiting.update(dict.fromkeys(keys))
        return replace(rows, known=replace(known, columns=_relabelled(now.unpack(values), known)))


def _relabelled(opened: dict[str, NDArray[Any]], known: Known) -> dict[str, NDArray[Any]]:
    return opened | {
        "kind": known.kind,
        "label": known.label,
        "weight": np.where(np.isnan(known.weight), opened["weight"], known.weight),
        "source": known.source,
        "offset": known.offset,
        "waited": known.offset - known.opened,
        "delay_ms": known.at_ms - opened["at_ms"],
        "request": np.zeros(len(known), np.uint64),
    }


def forget_other_topics(store: HistoryStore, topic_id: str) -> int:
    """Drops waiting impressions of another topic, whose outcomes can no longer arrive; returns how many."""
    dropped = {
        source: waiting
        for source, counts in store.counts().items()
        if source.topic_id != topic_id and (waiting := StreamAccount.of(counts).waiting)
    }
    if not dropped:
        return 0
    ended: Changes = {key: None for key, _ in store.waiting() if place_of(key)[0] in dropped}
    at = store.positions()
    ranges = [Range(source, at[source], at[source], dropped=count) for source, count in dropped.items()]
    store.commit(Appends.none(), ranges, waiting=ended)
    logger.warning("the topic was recreated: %d waiting impressions of the earlier topic are dropped", len(ended))
    return len(ended)


def unused_kernels(settings: Settings) -> Sequence[str]:
    """The modules with kernels that a stream of these settings does not call, unless impressions still wait."""
    return () if settings.labels.impressions else ("streaming.labels",)


def open_labels(settings: Settings, store: HistoryStore, topic_id: str) -> Labels | None:
    """Opens the labels; None if the settings let no impression wait and the store has none that waits."""
    if store.waiting_rows():
        forget_other_topics(store, topic_id)
    if not settings.labels.impressions and not store.waiting_rows():
        return None
    labels = Labels(settings, store)
    logger.info("%d impressions wait for their label", store.waiting_rows())
    return labels
