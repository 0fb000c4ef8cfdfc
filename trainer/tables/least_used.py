"""Chooses the ids to evict from a full table: those used least and longest ago, a function of a version's content.

An id ranks by the log time of its last occurrence, plus a day for each doubling of its use. A flood of new ids thus
evicts itself. Ties evict the smaller id first.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from state.compiled import compiled, inlined
from trainer.tables.index import F32, I32, U64

I64 = npt.NDArray[np.int64]

DOUBLING_MS = 86_400_000
"""The additional time that an id is kept for each doubling of its use."""

LEAST = -20
"""Use below 2 to the power of this counts as none."""

ROOM, MOST_AT_ONCE = 8, 131_072
"""A full table evicts one in ROOM ids at once, at most MOST_AT_ONCE, so that it is not full again in the next step."""

_BUCKETS = 1 << 16


@inlined
def _rank(last_seen_ms: int, bits: int) -> int:
    """`bits` are those of a float32. Only its exponent counts, as the number of doublings: rounding has no effect."""
    return last_seen_ms + DOUBLING_MS * max(((bits >> 23) & 255) - 127, LEAST)


@compiled("u8[::1], i8[::1], i4[::1], i8, i8, i8[::1]")
def _counted(ids: U64, last_seen_ms: I64, bits: I32, lowest: int, width: int, counts: I64) -> None:
    for index in range(ids.shape[0]):
        if ids[index] != 0:
            counts[(_rank(last_seen_ms[index], bits[index]) - lowest) // width] += 1


@compiled("u8[::1], i8[::1], i4[::1], i8[::1]")
def _bounds(ids: U64, last_seen_ms: I64, bits: I32, bounds: I64) -> None:
    for index in range(ids.shape[0]):
        if ids[index] != 0:
            rank = _rank(last_seen_ms[index], bits[index])
            bounds[0] = min(bounds[0], rank)
            bounds[1] = max(bounds[1], rank)


@compiled("u8[::1], i8[::1], i4[::1], i8, i8, i4[::1], i8[::1]")
def _below(ids: U64, last_seen_ms: I64, bits: I32, bound: int, width: int, chosen: I32, ranks: I64) -> int:
    """Fills `chosen` from the front with indices that rank below `bound`, and from the end with the next bucket.

    `ranks` gets the ranks of that bucket.
    """
    below, behind = 0, chosen.shape[0]
    for index in range(ids.shape[0]):
        if ids[index] != 0:
            rank = _rank(last_seen_ms[index], bits[index])
            if rank < bound:
                chosen[below] = index
                below += 1
            elif rank < bound + width:
                behind -= 1
                chosen[behind] = index
                ranks[behind] = rank
    return below


def least_used(ids: U64, last_seen_ms: I64, use: F32, leaving: int) -> I32:
    """Chooses the ids to evict: `[leaving]` int32 indices, in arbitrary order.

    Args:
        ids: `[n]` uint64, distinct, the id at each index; 0 where there is none.
        last_seen_ms: `[n]` int64.
        use: `[n]` float32, the amount of use.
        leaving: At least one, and no more than there are.

    >>> ids, seen = np.array([0, 5, 6, 7], np.uint64), np.array([0, 3, 1, 2])
    >>> least_used(ids, seen, np.array([0, 1, 4, 1], np.float32), 2).tolist()
    [3, 1]
    """
    bits = use.view(np.int32)
    ends = np.array([np.iinfo(np.int64).max, np.iinfo(np.int64).min])
    _bounds(ids, last_seen_ms, bits, ends)
    lowest, width = int(ends[0]), int(ends[1] - ends[0]) // _BUCKETS + 1
    counts = np.zeros(_BUCKETS, np.int64)
    _counted(ids, last_seen_ms, bits, lowest, width, counts)
    sums = np.cumsum(counts)
    bucket = int(np.searchsorted(sums, leaving))
    among = int(counts[bucket])
    chosen, ranks = np.empty(int(sums[bucket]), np.int32), np.empty(int(sums[bucket]), np.int64)
    below = _below(ids, last_seen_ms, bits, lowest + bucket * width, width, chosen, ranks)
    last = chosen[below : below + among]
    order = np.lexsort((ids[last], ranks[below : below + among]))
    return np.concatenate([chosen[:below], last[order[: leaving - below]]])


def excess(count: int, most: int) -> int:
    """The number of ids to evict from a table of `count` ids and capacity `most`; 0 if it is within its capacity.

    >>> excess(80, 80), excess(81, 80)
    (0, 11)
    """
    return count - most + min(most // ROOM, MOST_AT_ONCE) if count > most else 0
