"""Assigns ids to row indices: in order, with reuse, and compacted when few are left."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from state.compiled import compiled
from trainer.tables.index import I32, U64, IdIndex

I64 = npt.NDArray[np.int64]
SPARSE = 4
"""Capacity of this many times the ids in use is given back."""


def grown(held: npt.NDArray[Any], capacity: int) -> npt.NDArray[Any]:
    """`[capacity, ...]`: `held` followed by zeros.

    >>> grown(np.array([7, 8]), 4).tolist()
    [7, 8, 0, 0]
    """
    return np.concatenate([held, np.zeros((capacity - len(held), *held.shape[1:]), held.dtype)])


@compiled("u8[::1], i8[::1], i8, i4[::1]")
def _older(ids: U64, seen_ms: I64, before_ms: int, found: I32) -> int:
    count = 0
    for place in range(ids.shape[0]):
        if ids[place] != 0 and seen_ms[place] < before_ms:
            found[count] = place
            count += 1
    return count


class Places:
    """The row indices of ids, from 1 on; every id without a row has index 0.

    Args:
        capacity: Initial capacity, index 0 included; it doubles when full.
        most: The usual maximum of ids: beyond it, the capacity grows no more than necessary.

    Attributes:
        ids: `[capacity]` uint64, the id at each index; 0 where there is none.

    >>> places = Places(4)
    >>> places.take(np.array([7, 8, 9], np.uint64)).tolist(), places.drop(np.array([8], np.uint64)).tolist()
    ([1, 2, 3], [2])
    >>> places.find(np.array([7, 8, 9, 0], np.uint64)).tolist(), places.held().tolist()
    ([1, 0, 3, 0], [1, 3])
    """

    def __init__(self, capacity: int, most: int = 2**31) -> None:
        self._least = self._room(max(capacity, 2), most)
        self._most = most
        self.ids: U64 = np.zeros(self._least, np.uint64)
        self._index = IdIndex()
        self._next = 1
        self._free: I32 = np.empty(0, np.int32)

    def __len__(self) -> int:
        """The number of ids with an index."""
        return len(self._index)

    @property
    def capacity(self) -> int:
        """The current capacity, index 0 included."""
        return self.ids.size

    def find(self, ids: U64) -> I32:
        """The index of each id, `[n]` int32; 0 if it has none."""
        return self._index.find(ids)

    def held(self) -> I32:
        """The indices in use, ascending."""
        places: I32 = np.flatnonzero(self.ids[: self._next]).astype(np.int32)
        return places

    def older(self, seen_ms: I64, before_ms: int) -> I32:
        """The indices in use whose `[capacity]` times are before `before_ms`, ascending."""
        found = np.empty(len(self), np.int32)
        return found[: _older(self.ids[: self._next], seen_ms, before_ms, found)].copy()

    def take(self, ids: U64) -> I32:
        """Assigns indices to distinct ids that have none; this may change `capacity`.

        Fresh indices are assigned in order, because touching memory pages at random is expensive.
        """
        recycled = min(self._free.size, ids.size)
        kept = self._free.size - recycled
        fresh = self._next + ids.size - recycled
        if fresh > self.capacity:
            doubled = self._room(2 * self.capacity, self._most)
            self.ids = grown(self.ids, max(doubled, fresh))
        places = np.concatenate([self._free[kept:], np.arange(self._next, fresh, dtype=np.int32)])
        self._free, self._next = self._free[:kept], fresh
        self.ids[places] = ids
        self._index.insert(ids, places)
        return places

    def drop(self, ids: U64) -> I32:
        """Removes distinct ids; returns the former indices of those that had one."""
        places = self._index.find(ids)
        left: I32 = places[places != 0]
        if left.size:
            self._index.remove(self.ids[left])
            self.ids[left] = 0
            self._free = np.concatenate([self._free, left])
        return left

    def pack(self) -> I32 | None:
        """Compacts the indices and shrinks the capacity if most of it is unused.

        Returns the former index of each new index 0, 1, 2 ..; None if nothing moved.
        """
        if self.capacity <= self._least or len(self) * SPARSE >= self.capacity:
            return None
        former: I32 = np.concatenate([np.zeros(1, np.int32), self.held()])
        self.ids = grown(self.ids[former], max(self._least, 2 * former.size))
        self._next, self._free = former.size, np.empty(0, np.int32)
        self._index = IdIndex(former.size)
        self._index.insert(self.ids[1 : former.size], np.arange(1, former.size, dtype=np.int32))
        return former

    @staticmethod
    def _room(capacity: int, most: int) -> int:
        """Limits the capacity. Steps add ids before the least used are evicted, so room beyond `most` is needed."""
        return min(capacity, most + most // 8 + 2)
