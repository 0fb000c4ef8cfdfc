"""The rows of ids: an open-addressing index in compiled loops, the assignment of rows, and numbers hashed from an id."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from state.compiled import compiled, inlined, mix, read_only

U64 = npt.NDArray[np.uint64]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]

_FILL = 0.7


@inlined
def _slot_of(keys: U64, key: np.uint64) -> np.int64:
    """The slot that holds `key`, or the empty slot where it would be inserted."""
    mask = np.uint64(keys.shape[0] - 1)
    mixed = (key ^ (key >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15)
    slot = (mixed >> np.uint64(20)) & mask
    while keys[slot] != np.uint64(0) and keys[slot] != key:
        slot = (slot + np.uint64(1)) & mask
    return np.int64(slot)


@compiled("u8[::1], i4[::1], u8[::1], i4[::1]")
def _insert(keys: U64, rows: I32, ids: U64, values: I32) -> int:
    fresh = 0
    for i in range(ids.shape[0]):
        slot = _slot_of(keys, ids[i])
        if keys[slot] == np.uint64(0):
            fresh += 1
        keys[slot] = ids[i]
        rows[slot] = values[i]
    return fresh


@compiled("u8[::1], i4[::1], const(u8[::1]), i4[::1]")
def _find(keys: U64, rows: I32, ids: U64, found_rows: I32) -> None:
    # An empty slot has key 0 and row 0, so id 0 ("none") finds MISSING.
    for i in range(ids.shape[0]):
        found_rows[i] = rows[_slot_of(keys, ids[i])]


@compiled("u8[::1], i4[::1], u8[::1]")
def _remove(keys: U64, rows: I32, ids: U64) -> int:
    """Removes ids by shifting the rest of their run back, which needs no tombstones."""
    mask = np.int64(keys.shape[0] - 1)
    removed = 0
    for i in range(ids.shape[0]):
        hole = _slot_of(keys, ids[i])
        if ids[i] == np.uint64(0) or keys[hole] != ids[i]:
            continue
        removed += 1
        keys[hole] = np.uint64(0)
        rows[hole] = 0
        slot = (hole + 1) & mask
        while keys[slot] != np.uint64(0):
            key, row = keys[slot], rows[slot]
            keys[slot] = np.uint64(0)
            rows[slot] = 0
            home = _slot_of(keys, key)
            keys[home] = key
            rows[home] = row
            slot = (slot + 1) & mask
    return removed


class IdIndex:
    """An open-addressing map from a 64-bit id to a row; 0 for an id without a row.

    >>> index = IdIndex()
    >>> index.insert(np.array([7, 9], np.uint64), np.array([1, 2], np.int32))
    >>> index.find(np.array([9, 8, 0], np.uint64)).tolist()
    [2, 0, 0]
    >>> index.remove(np.array([9], np.uint64)); len(index)
    1
    """

    def __init__(self, capacity: int = 1024) -> None:
        self._keys: U64 = np.zeros(_slots_for(capacity), np.uint64)
        self._rows: I32 = np.zeros(self._keys.size, np.int32)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def slots(self) -> int:
        """The number of slots."""
        return self._keys.size

    def find(self, ids: U64) -> I32:
        """The row of each id, `[n]` int32; MISSING (0) for an unknown one."""
        rows = np.empty(ids.size, np.int32)
        _find(self._keys, self._rows, read_only(ids), rows)
        return rows

    def insert(self, ids: U64, rows: I32) -> None:
        """Sets the rows of `ids` (no id is 0). Grows first if the index would exceed its fill limit."""
        if self._size + ids.size > self._keys.size * _FILL:
            self._rebuild(_slots_for(self._size + ids.size))
        self._size += _insert(self._keys, self._rows, np.ascontiguousarray(ids), rows)

    def remove(self, ids: U64) -> None:
        """Removes `ids`, and shrinks if most slots are unused; unknown ids are ignored."""
        self._size -= _remove(self._keys, self._rows, np.ascontiguousarray(ids))
        if (slots := _slots_for(2 * self._size)) * 4 <= self._keys.size:
            self._rebuild(slots)

    def _rebuild(self, slots: int) -> None:
        keys, rows = self._keys, self._rows
        self._keys = np.zeros(slots, np.uint64)
        self._rows = np.zeros(slots, np.int32)
        used = keys != 0
        _insert(self._keys, self._rows, keys[used], rows[used])


def _slots_for(ids: int) -> int:
    """The smallest power of two in which `ids` keys stay below the fill limit.

    >>> _slots_for(10), _slots_for(1000)
    (1024, 2048)
    """
    slots = 1024
    while slots * _FILL <= ids:
        slots *= 2
    return slots


SPARSE = 4
"""If the capacity exceeds the ids in use by this factor, memory is freed."""


def grown(array: npt.NDArray[Any], capacity: int) -> npt.NDArray[Any]:
    """`[capacity, ...]`: `array` followed by zeros.

    >>> grown(np.array([7, 8]), 4).tolist()
    [7, 8, 0, 0]
    """
    # Zeros take memory only when they are written.
    larger = np.zeros((capacity, *array.shape[1:]), array.dtype)
    larger[: len(array)] = array
    return larger


@compiled("u8[::1], i8[::1], i8, i4[::1]")
def _older(ids: U64, seen_ms: I64, before_ms: int, older: I32) -> int:
    count = 0
    for index in range(ids.shape[0]):
        if ids[index] != 0 and seen_ms[index] < before_ms:
            older[count] = index
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
        used: I32 = np.flatnonzero(self.ids[: self._next]).astype(np.int32)
        return used

    def older(self, seen_ms: I64, before_ms: int) -> I32:
        """The indices in use whose `[capacity]` times are before `before_ms`, ascending."""
        indices = np.empty(len(self), np.int32)
        return indices[: _older(self.ids[: self._next], seen_ms, before_ms, indices)].copy()

    def take(self, ids: U64) -> I32:
        """Assigns indices to distinct ids that have none; this may change `capacity`.

        Fresh indices are assigned in order, because touching memory pages at random is expensive.
        """
        recycled = min(self._free.size, ids.size)
        remaining = self._free.size - recycled
        fresh = self._next + ids.size - recycled
        if fresh > self.capacity:
            doubled = self._room(2 * self.capacity, self._most)
            self.ids = grown(self.ids, max(doubled, fresh))
        indices = np.concatenate([self._free[remaining:], np.arange(self._next, fresh, dtype=np.int32)])
        self._free, self._next = self._free[:remaining], fresh
        self.ids[indices] = ids
        self._index.insert(ids, indices)
        return indices

    def drop(self, ids: U64) -> I32:
        """Removes distinct ids; returns the former indices of those that had one."""
        indices = self._index.find(ids)
        freed: I32 = indices[indices != 0]
        if freed.size:
            self._index.remove(self.ids[freed])
            self.ids[freed] = 0
            self._free = np.concatenate([self._free, freed])
        return freed

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


@compiled("u8[::1], u8, f4[:, ::1]")
def _draw(ids: U64, salt: np.uint64, out: F32) -> None:
    for i in range(ids.shape[0]):
        state = mix(ids[i] ^ salt)
        for j in range(out.shape[1]):
            state = state + np.uint64(0x9E3779B97F4A7C15)
            # 24 bits fit a float32 exactly: the same value on every machine.
            out[i, j] = np.float32(np.int64(mix(state) >> np.uint64(40))) * np.float32(2.0**-23) - np.float32(1.0)


def hashed_uniform(ids: U64, width: int, name: str) -> F32:
    """Uniform numbers in [-1, 1), `[n, width]` float32, that depend only on `name` and each of `[n]` uint64 ids.

    >>> one = hashed_uniform(np.array([5], np.uint64), 2, "user")
    >>> bool((one == hashed_uniform(np.array([4, 5], np.uint64), 2, "user")[1]).all())
    True
    """
    salt = np.uint64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
    out = np.empty((ids.size, width), np.float32)
    _draw(np.ascontiguousarray(ids), salt, out)
    return out
