"""In-memory queue of impressions that wait for their label, ordered by share of a partition, indexed by pair. Pure."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from state.compiled import compiled, layout

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
