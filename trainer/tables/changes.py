"""Tracks what changed in a table since a point: rows by id, and ids that were removed or wait. Steps only list ids."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from state.compiled import compiled
from trainer.tables.index import F32, I32, U64, grown

I64 = npt.NDArray[np.int64]
_FOLD = 65_536


class ListedIds:
    """A list of changed ids; each is returned once, however often it was added.

    >>> listed = ListedIds()
    >>> listed.add(np.array([9, 3], np.uint64)); listed.add(np.array([9], np.uint64))
    >>> listed.distinct().tolist()
    [3, 9]
    """

    def __init__(self) -> None:
        self._parts: list[U64] = []
        self._waiting = 0

    def add(self, ids: U64) -> None:
        """Lists `[n]` ids; the array must not change afterwards."""
        if ids.size == 0:
            return
        self._parts.append(ids)
        self._waiting += ids.size
        # A list that is not taken is folded, so that it holds at most twice the number of distinct ids.
        if self._waiting > max(_FOLD, self._parts[0].size):
            self._parts, self._waiting = [self.distinct()], 0

    def distinct(self) -> U64:
        """Each id once, ascending."""
        if not self._parts:
            return np.empty(0, np.uint64)
        # Sorting is ten times as fast as NumPy's `unique`, which hashes.
        ids: U64 = np.sort(np.concatenate([np.zeros(1, np.uint64), *self._parts]))
        distinct: U64 = ids[1:][ids[1:] != ids[:-1]]
        return distinct


@dataclass(frozen=True)
class Changes:
    """Rows of a table, ordered by id: all of them, or those that changed since the last take.

    Attributes:
        ids: `[k]` uint64, ascending.
        rows: `[k, dim]` float32, the embedding rows.
        accum: `[k, dim]` float32, their Adagrad accumulators.
        last_seen_ms: `[k]` int64, log time of their last sighting.
        removed: `[r]` uint64, ascending: ids that expired or were evicted, and were not admitted again.
        pending_ids: `[p]` uint64, ascending: ids seen too seldom to have a row yet.
        pending_counts: `[p]` int32, their sightings; 0 means no longer pending.
        pending_seen_ms: `[p]` int64, log time of their last sighting.
    """

    ids: U64
    rows: F32
    accum: F32
    last_seen_ms: I64
    removed: U64
    pending_ids: U64
    pending_counts: I32
    pending_seen_ms: I64

    FIELDS = ("ids", "rows", "accum", "last_seen_ms", "removed", "pending_ids", "pending_counts", "pending_seen_ms")

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays by name."""
        return {field: getattr(self, field) for field in self.FIELDS}

    def digest(self) -> str:
        """SHA-256 (hex) over every array in the order of FIELDS."""
        sha = hashlib.sha256()
        for field in self.FIELDS:
            sha.update(np.ascontiguousarray(getattr(self, field)).tobytes())
        return sha.hexdigest()


@compiled("i4[::1], u1[::1], i4[::1], i8")
def mark_rows(rows: I32, flags: npt.NDArray[np.uint8], listed: I32, count: int) -> int:
    """Appends those of `[n]` rows that are not in `flags` to the first `count` of `listed`; returns the new count."""
    for i in range(rows.shape[0]):
        row = rows[i]
        if row != 0 and flags[row] == 0:
            flags[row] = 1
            listed[count] = row
            count += 1
    return count


class ChangeList:
    """What changed in a table of `capacity` row slots since a point, each row once; nothing is copied.

    Attributes:
        removed: Ids whose rows were removed; those that returned since have a row.
        pending: Ids without a row that were seen, or are no longer waiting.
    """

    def __init__(self, capacity: int) -> None:
        self._flags: npt.NDArray[np.uint8] = np.zeros(capacity, np.uint8)
        self._listed: I32 = np.zeros(capacity, np.int32)
        self._count = 0
        self.removed, self.pending = ListedIds(), ListedIds()

    def touch(self, rows: I32) -> None:
        """Lists rows, `[n]` int32."""
        self._count = mark_rows(np.ascontiguousarray(rows), self._flags, self._listed, self._count)

    def rows(self) -> I32:
        """The rows listed, `[n]` int32; some may no longer have an id."""
        return self._listed[: self._count]

    def clear(self) -> None:
        """Empties the list."""
        self._flags[self.rows()] = 0
        self._count, self.removed, self.pending = 0, ListedIds(), ListedIds()

    def move_to(self, older: ChangeList) -> None:
        """Adds all of it to a list since an earlier point, and clears this list."""
        older.touch(self.rows())
        older.removed.add(self.removed.distinct())
        older.pending.add(self.pending.distinct())
        self.clear()

    def resize(self, capacity: int, former: I32 | None = None) -> None:
        """Follows a table that moved its rows; `former` are the former slots of rows 0, 1, 2 .., None if all stay."""
        if former is None:
            self._flags, self._listed = grown(self._flags, capacity), grown(self._listed, capacity)
            return
        self._flags = grown(self._flags[former], capacity)
        listed = np.flatnonzero(self._flags).astype(np.int32)
        self._listed, self._count = grown(listed, capacity), listed.size
