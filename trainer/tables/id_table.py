"""Which ids have a row: admitted, dated, expired, and listed when changed; what a row holds is a subclass's own.

The id -> row index, admission and expiry live on the host in compiled loops.
Where a row lies is nobody's business: every value that leaves a table is
ordered by id. So two tables with other capacities, or one that was restored, go
on with the same bits.

One thread, the trainer's step thread, calls everything here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.tables.changes import Changes
from trainer.tables.index import F32, I32, U64, IdIndex
from trainer.tables.rows_used import distinct_rows, first_occurrences, mark_rows, see

I64 = npt.NDArray[np.int64]

MISSING = 0
"""The row of every id that has none: always zero, never trained."""


def grown(held: npt.NDArray[Any], capacity: int) -> npt.NDArray[Any]:
    """`[capacity, ...]`: what is held and zeros behind it.

    >>> grown(np.array([7, 8]), 4).tolist()
    [7, 8, 0, 0]
    """
    return np.concatenate([held, np.zeros((capacity - len(held), *held.shape[1:]), held.dtype)])


class IdTable(ABC):
    """The rows of one kind of id.

    Args:
        name: Of the table in versions; part of the hash that a new row starts from.
        dim: Width of a row in versions.
        capacity: Rows there is room for at first; it doubles when full.
        admit_after: Sightings an id needs before it gets a row.
    """

    def __init__(self, name: str, dim: int, capacity: int, admit_after: int) -> None:
        self.name = name
        self.dim = dim
        self._admit_after = admit_after
        self._forget(max(capacity, 2))

    def clear(self) -> None:
        """Forgets every id; the capacity stays."""
        self._forget(self.capacity)

    def _forget(self, capacity: int) -> None:
        self._index = IdIndex()
        self._ids: U64 = np.zeros(capacity, np.uint64)
        self._last_seen_ms: I64 = np.zeros(capacity, np.int64)
        self._dirty: npt.NDArray[np.uint8] = np.zeros(capacity, np.uint8)
        self._dirty_rows: I32 = np.zeros(capacity, np.int32)
        self._scratch: I32 = np.zeros(capacity, np.int32)
        self._dirty_count = 0
        self._next_row = 1
        self._free: list[int] = []
        self._removed: set[int] = set()
        self._pending: dict[int, tuple[int, int]] = {}
        self._pending_dirty: set[int] = set()

    def __len__(self) -> int:
        """Ids that have a row."""
        return len(self._index)

    @property
    def capacity(self) -> int:
        """Rows there is room for, the missing one included."""
        return self._ids.size

    @property
    def pending(self) -> int:
        """Ids that were seen and have no row yet."""
        return len(self._pending)

    def find(self, ids: U64) -> I32:
        """The row of each id, `[n]` int32, MISSING where it has none. Admits nothing."""
        return self._index.find(ids)

    def observe(self, ids: U64, at_ms: I64) -> I32:
        """Counts one sighting of each id at log time, admits those seen often enough.

        Args:
            ids: `[n]` uint64, one for each event, repeated as they occur; 0 is ignored.
            at_ms: `[n]` int64 milliseconds since the epoch.

        Returns:
            `[n]` int32: the row of each id after the admissions.
        """
        rows = self._index.find(ids)
        unknown = np.flatnonzero((rows == MISSING) & (ids != 0))
        if unknown.size:
            if self._admit_after > 1:
                admitted = self._count_sightings(ids[unknown], at_ms[unknown])
            else:
                admitted = first_occurrences(ids[unknown])
            if admitted.size:
                self._admit(admitted)
                rows = self._index.find(ids)
        see(rows, np.ascontiguousarray(at_ms), self._last_seen_ms)
        self._last_seen_ms[MISSING] = 0
        self.touch(rows)
        return rows

    def touch(self, rows: I32) -> None:
        """Lists rows (`[n]` int32) as changed."""
        self._dirty_count = mark_rows(np.ascontiguousarray(rows), self._dirty, self._dirty_rows, self._dirty_count)

    def distinct(self, rows: I32) -> tuple[I32, I32]:
        """Each row once, in order of first occurrence, and where each argument went.

        The order depends on the events only, never on where a row lies: sums of
        gradients have the same bits in every layout. The missing row comes first
        always, so that applying a step can leave it out.

        Args:
            rows: `[n]` int32.

        Returns:
            `[u]` int32 distinct rows with MISSING first, and `[n]` int32 positions in it.
        """
        unique = np.empty(rows.size + 1, np.int32)
        positions = np.empty(rows.size, np.int32)
        count = distinct_rows(np.ascontiguousarray(rows), self._scratch, unique, positions)
        return unique[:count], positions

    def expire(self, before_ms: int) -> int:
        """Removes ids last seen before `before_ms` of log time; returns how many had a row."""
        used = slice(0, self._next_row)
        old = np.flatnonzero((self._ids[used] != 0) & (self._last_seen_ms[used] < before_ms))
        self._drop(self._ids[old])
        stale = [key for key, (_, seen_ms) in self._pending.items() if seen_ms < before_ms]
        for key in stale:
            del self._pending[key]
        self._pending_dirty.update(stale)
        return int(old.size)

    def take_changes(self) -> Changes:
        """What changed since the last take, and starts the next list."""
        rows = self._dirty_rows[: self._dirty_count]
        self._dirty[rows] = 0
        changes = self._collect(rows[self._ids[rows] != 0], self._removed, self._pending_dirty)
        self._dirty_count = 0
        self._removed = set()
        self._pending_dirty = set()
        return changes

    def state(self) -> Changes:
        """Every row, for a base; the list of changes goes on."""
        rows = np.flatnonzero(self._ids[: self._next_row]).astype(np.int32)
        return self._collect(rows, set(), set(self._pending))

    def load(self, changes: Changes) -> None:
        """Sets what `changes` says on top of what is here, and lists none of it as changed.

        Call `clear` first for a base; deltas follow in their order.
        """
        self._drop(changes.removed)
        self._removed.difference_update(changes.removed.tolist())
        fresh = changes.ids[self._index.find(changes.ids) == MISSING]
        self._place(fresh)
        rows = self._index.find(changes.ids)
        self._last_seen_ms[rows] = changes.last_seen_ms
        self.put(rows, changes.rows, changes.accum)
        for key, count, seen_ms in zip(
            changes.pending_ids.tolist(), changes.pending_counts.tolist(), changes.pending_seen_ms.tolist(), strict=True
        ):
            if count:
                self._pending[key] = (count, seen_ms)
            else:
                self._pending.pop(key, None)

    def digest(self) -> str:
        """SHA-256 (hex) over all rows ordered by id: equal in every layout."""
        return self.state().digest()

    @abstractmethod
    def put(self, rows: I32, values: F32, accum: F32) -> None:
        """Sets rows (`[n]` int32) to what a version holds of them; `touch` lists them as changed.

        Args:
            rows: `[n]` int32.
            values: `[n, dim]` float32.
            accum: Their accumulators, `[n, dim]` float32; `[n, 0]` where rows have none.
        """

    @abstractmethod
    def _held(self, rows: I32) -> tuple[F32, F32]:
        """Copies of rows and their accumulators, as versions hold them and `put` takes them."""

    @abstractmethod
    def _begin(self, ids: U64, rows: I32) -> None:
        """Gives the rows of ids that were just admitted their first values."""

    @abstractmethod
    def _resize(self, capacity: int) -> None:
        """Makes room for so many rows; those held stay."""

    def _count_sightings(self, ids: U64, at_ms: I64) -> U64:
        """Counts sightings of ids without a row; returns those that are due one, in order."""
        due: list[int] = []
        reached: set[int] = set()
        for key, seen_ms in zip(ids.tolist(), at_ms.tolist(), strict=True):
            if key in reached:
                continue
            count, last_ms = self._pending.get(key, (0, seen_ms))
            self._pending_dirty.add(key)
            if count + 1 >= self._admit_after:
                self._pending.pop(key, None)
                reached.add(key)
                due.append(key)
            else:
                self._pending[key] = (count + 1, max(last_ms, seen_ms))
        return np.array(due, np.uint64)

    def _admit(self, ids: U64) -> None:
        self._begin(ids, self._place(ids))
        if self._removed:
            self._removed.difference_update(ids.tolist())

    def _place(self, ids: U64) -> I32:
        """Hands out rows in order (fresh pages are dear when touched at random)."""
        recycled = min(len(self._free), ids.size)
        fresh = ids.size - recycled
        if self._next_row + fresh > self.capacity:
            self._grow(self._next_row + fresh)
        rows = np.empty(ids.size, np.int32)
        if recycled:
            rows[:recycled] = self._free[-recycled:]
            del self._free[-recycled:]
        rows[recycled:] = np.arange(self._next_row, self._next_row + fresh, dtype=np.int32)
        self._next_row += fresh
        self._ids[rows] = ids
        self._last_seen_ms[rows] = 0
        self._index.insert(ids, rows)
        return rows

    def _drop(self, ids: U64) -> None:
        rows = self._index.find(ids)
        known = rows != MISSING
        self._index.remove(ids[known])
        self._ids[rows[known]] = 0
        self._free.extend(rows[known].tolist())
        self._removed.update(ids[known].tolist())

    def _grow(self, needed: int) -> None:
        capacity = self.capacity
        while capacity < needed:
            capacity *= 2
        self._resize(capacity)
        for field in ("_ids", "_last_seen_ms", "_dirty", "_dirty_rows", "_scratch"):
            setattr(self, field, grown(getattr(self, field), capacity))

    def _collect(self, rows: I32, removed: set[int], pending: set[int]) -> Changes:
        ids = self._ids[rows]
        order = np.argsort(ids)
        rows = rows[order]
        values, accum = self._held(rows)
        waiting = sorted(pending)
        counts = [self._pending.get(key, (0, 0)) for key in waiting]
        return Changes(
            ids=ids[order],
            rows=values,
            accum=accum,
            last_seen_ms=self._last_seen_ms[rows],
            removed=np.array(sorted(removed), np.uint64),
            pending_ids=np.array(waiting, np.uint64),
            pending_counts=np.array([count for count, _ in counts], np.int32),
            pending_seen_ms=np.array([seen_ms for _, seen_ms in counts], np.int64),
        )
