"""Which impressions an event labels: those that wait, joined by an outcome or over with their time. Pure.

Event by event, in the order of a source's log, by the clock of `streaming.witnesses`,
which is the newest event time so far unless somebody's clock is wrong:

1. An outcome labels the latest impression of the same pair that waits, whose
   time is not after the outcome's, and whose wait is not over.
2. An impression begins to wait at its time, or at the clock where it is ahead of
   that; not where its wait is over already, since no outcome could have joined
   it, nor where too many wait.
3. Impressions leave in the order in which they came, as soon as their wait is
   over: at most `MOST_EXPIRED` at one event, so that the rows of one position stay few.

Nothing here knows the time of day or where one batch ends, so that any cutting
of the log gives the same. A row that waits costs some 100 bytes of memory; what
it says is in the store. All of it is one file, constants included: Numba takes
a kernel's machine code from its cache unless the kernel's own file has changed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from state.compiled import compiled
from state.compiled.mixing import mixed

I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]
U8 = NDArray[np.uint8]

MOST_EXPIRED = 8
NONE = -1

# What an action is, and the kinds of `state.microbatch.row_kinds`, whose numbers a test compares.
PLAIN, IMPRESSION, OUTCOME = 0, 1, 2
OPENED, DROPPED, FEEDBACK, JOINED, EXPIRED = 1, 2, 3, 4, 5

_FREE = 0


class Queue(NamedTuple):
    """The impressions that wait, each in a slot; two chains of slots, by source and by pair.

    Attributes:
        offset: `[S]` int64.
        at_ms: `[S]` int64.
        begun_ms: `[S]` int64, when it began to wait.
        pair: `[S]` uint64.
        source: `[S]` int64, a number below Q.
        chain: `[S, 4]` int64: the next and the one before of the source, the older and the newer of the bucket.
        buckets: `[B]` int64, the newest slot of the pairs of each bucket; B is a power of two.
        first: `[Q, 2]` int64, the oldest and the newest slot of each source.
        waiting: `[Q]` int64, how many wait.
        free: `[S]` int64, slots without an impression, the first `sizes[0]` of them.
        sizes: `[1]` int64.
    """

    offset: I64
    at_ms: I64
    begun_ms: I64
    pair: U64
    source: I64
    chain: I64
    buckets: I64
    first: I64
    waiting: I64
    free: I64
    sizes: I64

    @classmethod
    def of(cls, slots: int, sources: int) -> Queue:
        """An empty queue."""
        buckets = 1 << max(4, (slots - 1).bit_length())
        return cls(
            np.zeros(slots, np.int64),
            np.zeros(slots, np.int64),
            np.zeros(slots, np.int64),
            np.zeros(slots, np.uint64),
            np.zeros(slots, np.int64),
            np.full((slots, 4), NONE, np.int64),
            np.full(buckets, NONE, np.int64),
            np.full((sources, 2), NONE, np.int64),
            np.zeros(sources, np.int64),
            np.arange(slots, dtype=np.int64)[::-1].copy(),
            np.array([slots], np.int64),
        )

    def rows(self) -> tuple[I64, I64, I64, U64, I64]:
        """Offset, time, begin, pair and source of all that wait, those of a source in order."""
        found: list[int] = []
        for slot in self.first[:, 0].tolist():
            while slot != NONE:
                found.append(slot)
                slot = int(self.chain[slot, 0])
        at = np.array(found, np.int64)
        return self.offset[at], self.at_ms[at], self.begun_ms[at], self.pair[at], self.source[at]


class Made(NamedTuple):
    """What events became, and what they made known, in order.

    Attributes:
        kind: `[n]` uint8 `Kind` of each event.
        by: `[m]` int64, the event.
        opened: `[m]` int64 offset of the impression.
        known: `[m]` uint8, JOINED or EXPIRED.
        opened_ms: `[m]` int64, time of the impression.
    """

    kind: U8
    by: I64
    opened: I64
    known: U8
    opened_ms: I64


def with_space(queue: Queue, more: int, sources: int) -> Queue:
    """A queue with space for `more` impressions and `sources` sources; `queue` itself where it has that."""
    slots, known = len(queue.offset), len(queue.waiting)
    if int(queue.sizes[_FREE]) >= more and known >= sources:
        return queue
    used = slots - int(queue.sizes[_FREE])
    grown = Queue.of(max(slots, 2 * (used + more)) if used + more > slots else slots, max(known, sources))
    _enter(grown, *queue.rows())
    return grown


def pairs(user: U64, item: U64, request: U64) -> U64:
    """`[n]` uint64: by what an impression and its outcome are paired; two of 1e6 others collide with probability below 1e-13.

    >>> ids = np.array([1, 1, 2], np.uint64)
    >>> len(set(pairs(ids, ids[::-1].copy(), ids).tolist()))
    3
    """
    sums = np.zeros(len(user), np.uint64)
    for part in (user, item, request):
        sums = mixed(sums + np.uint64(0x9E3779B97F4A7C15) + part)
    return sums


def attribute(
    queue: Queue, role: U8, source: I64, offset: I64, at_ms: I64, clock_ms: I64, pair: U64, wait_ms: int, most: int
) -> tuple[Queue, Made]:
    """Takes events in order of arrival; returns the queue to go on with, and what became of them.

    Args:
        queue: What waits; changed.
        role: `[n]` uint8: PLAIN, IMPRESSION or OUTCOME.
        source: `[n]` int64, numbers of sources.
        offset: `[n]` int64.
        at_ms: `[n]` int64.
        clock_ms: `[n]` int64, its source's clock after each event.
        pair: `[n]` uint64 of `pairs`.
        wait_ms: The longest wait.
        most: The most impressions of a source that wait.
    """
    impressions = int((role == IMPRESSION).sum())
    queue = with_space(queue, impressions, int(source.max(initial=-1)) + 1)
    waiting = len(queue.offset) - int(queue.sizes[_FREE])
    most_known = min((1 + MOST_EXPIRED) * len(role), waiting + impressions)
    kind, known = np.zeros(len(role), np.uint8), np.empty(most_known, np.uint8)
    by, opened, opened_ms = (np.empty(most_known, np.int64) for _ in range(3))
    count = _attribute(
        queue, role, source, offset, at_ms, clock_ms, pair, wait_ms, most, kind, by, opened, known, opened_ms
    )
    return queue, Made(kind, by[:count], opened[:count], known[:count], opened_ms[:count])


def enter(queue: Queue, offset: I64, at_ms: I64, begun_ms: I64, pair: U64, source: I64) -> Queue:
    """The queue with impressions that wait already, those of a source in the order of their offsets."""
    queue = with_space(queue, len(offset), int(source.max(initial=-1)) + 1)
    _enter(queue, offset, at_ms, begun_ms, pair, source)
    return queue


@compiled
def _open(queue: Queue, offset: int, at_ms: int, begun_ms: int, pair: int, source: int) -> None:
    queue.sizes[_FREE] -= 1
    slot = queue.free[queue.sizes[_FREE]]
    queue.offset[slot] = offset
    queue.at_ms[slot] = at_ms
    queue.begun_ms[slot] = begun_ms
    queue.pair[slot] = pair
    queue.source[slot] = source
    # The newest of its source.
    last = queue.first[source, 1]
    queue.chain[slot, 0] = NONE
    queue.chain[slot, 1] = last
    if last == NONE:
        queue.first[source, 0] = slot
    else:
        queue.chain[last, 0] = slot
    queue.first[source, 1] = slot
    # The newest of its bucket.
    bucket = np.int64(np.uint64(pair) & np.uint64(queue.buckets.shape[0] - 1))
    older = queue.buckets[bucket]
    queue.chain[slot, 2] = older
    queue.chain[slot, 3] = NONE
    if older != NONE:
        queue.chain[older, 3] = slot
    queue.buckets[bucket] = slot
    queue.waiting[source] += 1


@compiled
def _close(queue: Queue, slot: int) -> None:
    source = queue.source[slot]
    after, before, older, newer = queue.chain[slot, 0], queue.chain[slot, 1], queue.chain[slot, 2], queue.chain[slot, 3]
    if before == NONE:
        queue.first[source, 0] = after
    else:
        queue.chain[before, 0] = after
    if after == NONE:
        queue.first[source, 1] = before
    else:
        queue.chain[after, 1] = before
    if newer == NONE:
        queue.buckets[np.int64(queue.pair[slot] & np.uint64(queue.buckets.shape[0] - 1))] = older
    else:
        queue.chain[newer, 2] = older
    if older != NONE:
        queue.chain[older, 3] = newer
    queue.waiting[source] -= 1
    queue.free[queue.sizes[_FREE]] = slot
    queue.sizes[_FREE] += 1


@compiled
def _enter(queue: Queue, offset: I64, at_ms: I64, begun_ms: I64, pair: U64, source: I64) -> None:
    for n in range(offset.shape[0]):
        _open(queue, offset[n], at_ms[n], begun_ms[n], pair[n], source[n])


@compiled
def _attribute(
    queue: Queue,
    role: U8,
    source: I64,
    offset: I64,
    at_ms: I64,
    clock_ms: I64,
    pair: U64,
    wait_ms: int,
    most: int,
    kind: U8,
    by: I64,
    opened: I64,
    known: U8,
    opened_ms: I64,
) -> int:
    count = 0
    for n in range(role.shape[0]):
        own, time = source[n], at_ms[n]
        over = clock_ms[n] - wait_ms
        # 1.
        if role[n] == OUTCOME:
            kind[n] = FEEDBACK
            slot = queue.buckets[np.int64(pair[n] & np.uint64(queue.buckets.shape[0] - 1))]
            while slot != NONE:
                mine = queue.pair[slot] == pair[n] and queue.source[slot] == own
                # Its own user's clock counts too: it may go before the others' or behind them.
                if mine and over <= queue.begun_ms[slot] and time - wait_ms <= queue.at_ms[slot] <= time:
                    by[count], opened[count], known[count], opened_ms[count] = (
                        n,
                        queue.offset[slot],
                        JOINED,
                        queue.at_ms[slot],
                    )
                    count += 1
                    _close(queue, slot)
                    break
                slot = queue.chain[slot, 2]
        # 2.
        elif role[n] == IMPRESSION:
            begun = min(time, clock_ms[n])
            if begun < over or queue.waiting[own] >= most:
                kind[n] = DROPPED
            else:
                kind[n] = OPENED
                _open(queue, offset[n], time, begun, pair[n], own)
        # 3.
        expired = 0
        slot = queue.first[own, 0]
        while slot != NONE and expired < MOST_EXPIRED and queue.begun_ms[slot] < over:
            by[count], opened[count], known[count], opened_ms[count] = n, queue.offset[slot], EXPIRED, queue.at_ms[slot]
            count += 1
            expired += 1
            _close(queue, slot)
            slot = queue.first[own, 0]
    return count
