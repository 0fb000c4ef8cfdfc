"""Attributes outcomes to impressions: decides which waiting impressions an event labels, and which expire. Pure.

Positions are processed in the order of a partition's log, by the clock of `streaming.event_clock`. That clock is the
newest event time so far, unless some user's clock is wrong.

1. An outcome labels the latest waiting impression of the same pair whose time is not after the outcome's, and whose
   wait is not over.
2. An impression begins to wait at its time, or at the clock if its time is ahead of the clock. It does not wait if its
   wait would already be over, since no outcome could join it, or if too many wait.
3. Impressions of a share of the users expire in order of arrival once their wait is over: at an event of the first
   one's own user, or at the share's turn. The turn is at each `SHARES`th offset, whatever that offset contains, a click
   or nothing. So no other user's click, late or not, decides where a wait ends. At most `MOST_EXPIRED` expire at once,
   so that one position yields few rows.

Nothing here depends on the time of day, on batch boundaries, or on other shares. So any division of the log into
batches, and of the users into shares, gives the same result. A waiting row costs about 100 bytes of memory; its content
is in the store.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from state.compiled import compiled, layout
from state.compiled.mixing import mixed

I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]

SHARES = 64  # as in `state.positions`; a test compares the two
NONE = -1
_FREE = 0


@layout(
    "i8[::1], i8[::1], i8[::1], u8[::1], u8[::1], i8[::1], i8[:, ::1], i8[::1], i8[:, ::1], i8[::1], i8[::1], i8[::1]"
)
class Queue(NamedTuple):
    """The waiting impressions, each in a slot; slots are linked into two chains, by share of a partition and by pair.

    Attributes:
        offset: `[S]` int64.
        at_ms: `[S]` int64.
        begun_ms: `[S]` int64, when it began to wait.
        pair: `[S]` uint64.
        user: `[S]` uint64.
        share: `[S]` int64, `SHARES` times the number of the partition, plus the index of the share in it.
        chain: `[S, 4]` int64: next and previous slot of the share, older and newer slot of the bucket.
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
        """How many more impressions may begin to wait."""
        return int(self.sizes[_FREE])

    def rows(self) -> WaitingImpressions:
        """All waiting impressions, those of a share in order."""
        found: list[int] = []
        for slot in self.first[:, 0].tolist():
            while slot != NONE:
                found.append(slot)
                slot = int(self.chain[slot, 0])
        at = np.array(found, np.int64)
        return WaitingImpressions(
            self.offset[at], self.at_ms[at], self.begun_ms[at], self.pair[at], self.user[at], self.share[at] // SHARES
        )


@layout("i8[::1], i8[::1], i8[::1], u8[::1], u8[::1], i8[::1]")
class WaitingImpressions(NamedTuple):
    """Waiting impressions, those of a share in the order of their offsets.

    Attributes:
        offset: `[n]` int64.
        at_ms: `[n]` int64.
        begun_ms: `[n]` int64, when each began to wait.
        pair: `[n]` uint64 of `pairs`.
        user: `[n]` uint64.
        partition: `[n]` int64, its number.
    """

    offset: I64
    at_ms: I64
    begun_ms: I64
    pair: U64
    user: U64
    partition: I64


def with_space(queue: Queue, more: int, partitions: int) -> Queue:
    """Returns a queue with space for `more` impressions and `partitions` partitions; `queue` itself if it has that."""
    slots, known = len(queue.offset), len(queue.waiting) // SHARES
    if queue.free_slots >= more and known >= partitions:
        return queue
    used = slots - queue.free_slots
    grown = Queue.of(max(slots, 2 * (used + more)) if used + more > slots else slots, max(known, partitions))
    _enter(grown, queue.rows())
    return grown


def enter(queue: Queue, waiting: WaitingImpressions) -> Queue:
    """Adds impressions that already wait."""
    queue = with_space(queue, len(waiting.offset), int(waiting.partition.max(initial=-1)) + 1)
    # Copies: arrays from a store are read-only, which would be another type to compile for.
    _enter(queue, WaitingImpressions._make(map(np.array, waiting)))
    return queue


@compiled
def share_number(partition: int, user: int) -> int:
    """The number of the share in which a user's impressions of a partition wait."""
    return partition * SHARES + int(np.int64(np.uint64(user) % np.uint64(SHARES)))


@compiled
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
    # The newest of its share.
    last = queue.first[share, 1]
    queue.chain[slot, 0] = NONE
    queue.chain[slot, 1] = last
    if last == NONE:
        queue.first[share, 0] = slot
    else:
        queue.chain[last, 0] = slot
    queue.first[share, 1] = slot
    # The newest of its bucket.
    bucket = np.int64(np.uint64(pair) & np.uint64(queue.buckets.shape[0] - 1))
    older = queue.buckets[bucket]
    queue.chain[slot, 2] = older
    queue.chain[slot, 3] = NONE
    if older != NONE:
        queue.chain[older, 3] = slot
    queue.buckets[bucket] = slot
    queue.waiting[share] += 1


@compiled
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


U8 = NDArray[np.uint8]

MOST_EXPIRED = 8
NEVER_MS = np.iinfo(np.int64).min

# Roles of actions, and the kinds of `state.microbatch.batch`; a test compares the numbers.
PLAIN, IMPRESSION, OUTCOME = 0, 1, 2
OPENED, DROPPED, FEEDBACK, JOINED, EXPIRED = 1, 2, 3, 4, 5


@layout("u1[::1], i8[::1], i8[::1], i8[::1], i8[::1], u8[::1], u8[::1]")
class Arrived(NamedTuple):
    """Events; those of a segment are in order of arrival.

    Attributes:
        role: `[n]` uint8: PLAIN, IMPRESSION or OUTCOME.
        stretch: `[n]` int64, index of the segment that contains it.
        offset: `[n]` int64.
        at_ms: `[n]` int64.
        clock_ms: `[n]` int64, its partition's clock after it.
        pair: `[n]` uint64 of `pairs`.
        user: `[n]` uint64.
    """

    role: U8
    stretch: I64
    offset: I64
    at_ms: I64
    clock_ms: I64
    pair: U64
    user: U64


@layout("i8[::1], i8[::1], i8[::1], i8[::1], i8[::1], i8[::1]")
class Stretches(NamedTuple):
    """Segments of partitions, each processed from its first position to its last.

    Attributes:
        partition: `[r]` int64, its number.
        first: `[r]` int64 offset.
        next: `[r]` int64, the offset after the last one.
        move_stretch: `[m]` int64, ascending: the segment in which the clock moved,
        move_offset: `[m]` int64, the offset from which on it moved, ascending in a segment,
        move_ms: `[m]` int64, and its new time.
    """

    partition: I64
    first: I64
    next: I64
    move_stretch: I64
    move_offset: I64
    move_ms: I64


@layout("u1[::1], i8[::1], i8[::1], i8[::1], i8[::1], u1[::1], i8[::1]")
class Made(NamedTuple):
    """The kind of each event, and the labels that became known at which positions: segment by segment, in order.

    Attributes:
        kind: `[n]` uint8 `Kind` of each event.
        by: `[m]` int64, the last event of the segment that is not after the position; `NONE` before the first one.
        stretch: `[m]` int64, the segment of the position.
        at: `[m]` int64 offset of the position.
        opened: `[m]` int64 offset of the impression.
        known: `[m]` uint8, JOINED or EXPIRED.
        opened_ms: `[m]` int64, time of the impression.
    """

    kind: U8
    by: I64
    stretch: I64
    at: I64
    opened: I64
    known: U8
    opened_ms: I64


def pairs(user: U64, item: U64, request: U64) -> U64:
    """`[n]` uint64 keys that pair an impression with its outcome.

    A pair collides with one of 1e6 others with probability below 1e-13.

    >>> ids = np.array([1, 1, 2], np.uint64)
    >>> len(set(pairs(ids, ids[::-1].copy(), ids).tolist()))
    3
    """
    sums = np.zeros(len(user), np.uint64)
    for part in (user, item, request):
        sums = mixed(sums + np.uint64(0x9E3779B97F4A7C15) + part)
    return sums


def attribute(queue: Queue, arrived: Arrived, stretches: Stretches, wait_ms: int, most: int) -> tuple[Queue, Made]:
    """Processes segments of partitions; returns the queue to continue with, and the labels that became known.

    Args:
        queue: The waiting impressions; changed.
        arrived: The events in the segments.
        stretches: The segments; each continues where an earlier one of its partition ended.
        wait_ms: The maximum wait.
        most: Maximum number of waiting impressions of a share of a partition.
    """
    events, impressions = len(arrived.role), int((arrived.role == IMPRESSION).sum())
    queue = with_space(queue, impressions, int(stretches.partition.max(initial=-1)) + 1)
    waiting = len(queue.offset) - queue.free_slots
    positions = int((stretches.next - stretches.first).sum())
    most_known = min((1 + MOST_EXPIRED) * events + MOST_EXPIRED * positions, waiting + impressions)
    by, stretch, at, opened, opened_ms = (np.empty(most_known, np.int64) for _ in range(5))
    made = Made(np.zeros(events, np.uint8), by, stretch, at, opened, np.empty(most_known, np.uint8), opened_ms)
    order = np.argsort(arrived.stretch, kind="stable")
    numbers = np.arange(len(stretches.first) + 1)
    begins = np.searchsorted(arrived.stretch[order], numbers)
    moves = np.searchsorted(stretches.move_stretch, numbers)
    count = _attribute(queue, arrived, stretches, order, begins, moves, wait_ms, most, made)
    known = made.known[:count]
    return queue, Made(made.kind, by[:count], stretch[:count], at[:count], opened[:count], known, opened_ms[:count])


@compiled
def _make_known(queue: Queue, made: Made, count: int, by: int, stretch: int, at: int, slot: int, known: int) -> int:
    made.by[count] = by
    made.stretch[count] = stretch
    made.at[count] = at
    made.opened[count] = queue.offset[slot]
    made.known[count] = known
    made.opened_ms[count] = queue.at_ms[slot]
    close(queue, slot)
    return count + 1


@compiled
def _join(queue: Queue, arrived: Arrived, n: int, share: int, wait_ms: int, made: Made, count: int) -> int:
    time, over_ms = arrived.at_ms[n], arrived.clock_ms[n] - wait_ms
    slot = queue.buckets[np.int64(arrived.pair[n] & np.uint64(queue.buckets.shape[0] - 1))]
    while slot != NONE:
        mine = queue.pair[slot] == arrived.pair[n] and queue.share[slot] == share
        # The user's own clock counts too: it may be ahead of the others' or behind them.
        if mine and over_ms <= queue.begun_ms[slot] and time - wait_ms <= queue.at_ms[slot] <= time:
            return _make_known(queue, made, count, n, arrived.stretch[n], arrived.offset[n], slot, JOINED)
        slot = queue.chain[slot, 2]
    return count


@compiled
def _end(
    queue: Queue,
    share: int,
    over_ms: int,
    by: int,
    stretch: int,
    at: int,
    arrived: Arrived,
    own: bool,
    made: Made,
    count: int,
) -> int:
    """Expires waits of a share that are over, oldest first; `own`: only those of the user of the event `by`."""
    for _ in range(MOST_EXPIRED):
        slot = queue.first[share, 0]
        if slot == NONE or queue.begun_ms[slot] >= over_ms or (own and queue.user[slot] != arrived.user[by]):
            break
        count = _make_known(queue, made, count, by, stretch, at, slot, EXPIRED)
    return count


@compiled("Queue, Arrived, Stretches, i8[::1], i8[::1], i8[::1], i8, i8, Made")
def _attribute(
    queue: Queue,
    arrived: Arrived,
    stretches: Stretches,
    order: I64,
    begins: I64,
    moves: I64,
    wait_ms: int,
    most: int,
    made: Made,
) -> int:
    count = 0
    for r in range(stretches.first.shape[0]):
        partition, at, move, last = stretches.partition[r], stretches.first[r], moves[r], NONE
        turn_over_ms = NEVER_MS
        for number in range(begins[r], begins[r + 1] + 1):
            n = order[number] if number < begins[r + 1] else NONE
            to = arrived.offset[n] if n != NONE else stretches.next[r]
            # 3. at the turn of a share, starting from the previous event.
            while at < to:
                while move < moves[r + 1] and stretches.move_offset[move] <= at:
                    turn_over_ms = stretches.move_ms[move] - wait_ms
                    move += 1
                until = min(to, stretches.move_offset[move]) if move < moves[r + 1] else to
                idle = 0
                # Once the turn of each share expired nothing, no further turn can.
                while at < until and idle < SHARES:
                    before = count
                    share = partition * SHARES + at % SHARES
                    count = _end(queue, share, turn_over_ms, last, r, at, arrived, False, made, count)
                    idle = idle + 1 if count == before else 0
                    at += 1
                at = until
            if n == NONE:
                break
            share = share_number(partition, arrived.user[n])
            over_ms = arrived.clock_ms[n] - wait_ms
            # 1.
            if arrived.role[n] == OUTCOME:
                made.kind[n] = FEEDBACK
                count = _join(queue, arrived, n, share, wait_ms, made, count)
            # 2.
            elif arrived.role[n] == IMPRESSION:
                begun_ms = min(arrived.at_ms[n], arrived.clock_ms[n])
                if begun_ms < over_ms or queue.waiting[share] >= most:
                    made.kind[n] = DROPPED
                else:
                    made.kind[n] = OPENED
                    user = arrived.user[n]
                    begin(queue, arrived.offset[n], arrived.at_ms[n], begun_ms, arrived.pair[n], user, share)
            # 3. at an event of its own user.
            count = _end(queue, share, over_ms, n, r, to, arrived, True, made, count)
            last = n
    return count
