"""Chooses the interest candidates of a row and its negative: integers, on the host, in compiled loops.

The candidates of a row are:

- its user's categories (L slots, newest first)
- the popular categories that are not among them (P slots)
- what came next most often after the newest category, over all users (S slots)
- one more slot: the row's own category if no other slot has it, else a category that another row of the batch clicked.
  It teaches the model the value of "something else"
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from state.compiled import compiled, layout, mix, read_only
from trainer.tables.index import I32, U64

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]


@layout("i4[::1], f4[:, ::1], u8[::1]")
class Candidates(NamedTuple):
    """The interest slots of a batch.

    Attributes:
        target: `[n]` int32, the slot of the row's category; -1 without a category. Slots below L are categories of the
            user, below L + P popular ones, below L + P + S successors. L + P + S is the last slot.
        popular_mask: `[n, P]` float32, 1 for a popular category that is not among the user's own.
        other: `[n]` uint64, the category in the last slot; 0 if it is empty.
    """

    target: I32
    popular_mask: F32
    other: U64


@compiled("u8[::1], u8[::1], i8[::1], i8[::1]")
def _partners(topics: U64, partitions: U64, offsets: I64, partners: I64) -> None:
    rows = partners.shape[0]
    for i in range(rows):
        state = mix(topics[i] + np.uint64(0x9E3779B97F4A7C15))
        state = mix(state ^ partitions[i])
        state = mix(state ^ np.uint64(offsets[i]))
        step = np.int64(state % np.uint64(max(rows - 1, 1)))
        partners[i] = (i + 1 + step) % rows


@compiled("const(u8[::1]), const(u8[:, ::1]), u8[::1], u8[:, ::1], i8[::1], Candidates")
def _compete(
    category: U64, recent_categories: U64, popular: U64, successors: U64, partners: I64, filled: Candidates
) -> None:
    target, popular_mask, other = filled
    slots, ranks, last = recent_categories.shape[1], popular.shape[0], successors.shape[1]
    for i in range(category.shape[0]):
        own, foreign = category[i], category[partners[i]]
        slot, foreign_known = -1, foreign == np.uint64(0)
        for p in range(ranks):
            popular_mask[i, p] = 0.0 if popular[p] == np.uint64(0) else 1.0
            if popular[p] == own:
                slot = slots + p
            if popular[p] == foreign:
                foreign_known = True
        for j in range(slots):
            recent = recent_categories[i, j]
            if recent == np.uint64(0):
                continue
            if recent == own:
                slot = j
            if recent == foreign:
                foreign_known = True
            for p in range(ranks):
                if popular[p] == recent:
                    popular_mask[i, p] = 0.0
        for j in range(last):
            if successors[i, j] == own:
                slot = slots + ranks + j
            if successors[i, j] == foreign:
                foreign_known = True
        if own == np.uint64(0):
            target[i] = -1
            other[i] = 0
        elif slot < 0:
            target[i] = slots + ranks + last
            other[i] = own
        else:
            target[i] = slot
            other[i] = np.uint64(0) if foreign_known else foreign


def partners(topics: U64, partitions: U64, offsets: I64) -> I64:
    """Chooses for each row another row of the batch, by a hash of its source position: topic, partition and offset, `[n]` each.

    Returns `[n]` int64 indices, none its own; 0 for the only row of a batch.

    >>> found = partners(np.zeros(3, np.uint64), np.zeros(3, np.uint64), np.arange(3))
    >>> bool((found != np.arange(3)).all())
    True
    """
    chosen = np.empty(offsets.size, np.int64)
    _partners(topics, partitions, offsets, chosen)
    return chosen


def candidates(category: U64, recent_categories: U64, popular: U64, successors: U64, partner: I64) -> Candidates:
    """Fills the interest slots of a batch.

    Args:
        category: `[n]` uint64, the clicked category of each row; 0 for none.
        recent_categories: `[n, L]` uint64, the user's categories before the click, padded with 0.
        popular: `[P]` uint64, padded with 0.
        successors: `[n, S]` uint64, neither categories of their row nor popular, padded with 0.
        partner: `[n]` int64 from `partners`.

    >>> found = candidates(
    ...     np.array([5, 9], np.uint64),
    ...     np.array([[5, 7], [5, 0]], np.uint64),
    ...     np.array([7, 8], np.uint64),
    ...     np.array([[3], [0]], np.uint64),
    ...     np.array([1, 0]),
    ... )
    >>> found.target.tolist(), found.popular_mask.tolist(), found.other.tolist()
    ([0, 5], [[0.0, 1.0], [1.0, 1.0]], [9, 9])
    """
    rows = category.size
    filled = Candidates(np.empty(rows, np.int32), np.empty((rows, popular.size), np.float32), np.empty(rows, np.uint64))
    _compete(read_only(category), read_only(recent_categories), popular, successors, partner, filled)
    return filled


def seed_of(topic: int, partition: int, offset: int) -> tuple[int, int]:
    """A step's dropout seed: two int32 hashed from the position of its first row.

    >>> seed_of(1, 2, 3) == seed_of(1, 2, 3) != seed_of(1, 2, 4)
    True
    """
    state = ((topic * 0x9E3779B97F4A7C15) ^ (partition * 0xBF58476D1CE4E5B9) ^ offset) & (2**64 - 1)
    mixed = int(mix(np.uint64(state)))
    return (mixed >> 33), (mixed & 0x7FFFFFFF)
