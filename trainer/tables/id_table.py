"""Manages which ids of a table have a row: admission, dating, expiry, eviction and change lists.

A subclass defines what a row holds. The position of a row is private: every value that leaves a table is ordered by id.
So two tables with different capacities, or a restored one, continue with the same bits. Evictions, too, follow from the
contents of a version. Only the trainer's step thread uses these classes.

The ids to evict from a full table are those used least and longest ago, a function of a version's content.

An id ranks by the log time of its last occurrence, plus a day for each doubling of its use. A flood of new ids thus
evicts itself. Ties evict the smaller id first.

`Changes` tracks what changed in a table since a point: rows by id, and ids that were removed or wait. Steps only list ids.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from state.compiled import compiled, inlined, mix, read_only
from trainer.tables.index import F32, I32, U64, Places, grown

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


MISSING = 0
"""The row of every id that has none: always zero, never trained."""

NO_CAP = 2**31 - 1
"""Row limit of a table without a limit: as many rows as an int32 can number."""


class Sightings(NamedTuple):
    """Sightings of distinct ids.

    Attributes:
        ids: `[n]` uint64, ascending.
        counts: `[n]` int32.
        seen_ms: `[n]` int64, log time of the last one.
    """

    ids: U64
    counts: I32
    seen_ms: I64


def sightings(ids: U64, at_ms: I64) -> Sightings:
    """Combines the sightings of `[n]` ids at `[n]` log times.

    >>> sightings(np.array([7, 3, 7], np.uint64), np.array([5, 1, 4]))
    Sightings(ids=array([3, 7], dtype=uint64), counts=array([1, 2], dtype=int32), seen_ms=array([1, 5]))
    """
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    starts = np.flatnonzero(np.concatenate([np.ones(min(ids.size, 1), np.bool_), ordered[1:] != ordered[:-1]]))
    counts = np.diff(starts, append=ids.size)
    newest = np.maximum.reduceat(at_ms[order], starts) if ids.size else np.empty(0, np.int64)
    return Sightings(ordered[starts], counts.astype(np.int32), newest)


@compiled("i4[::1], const(i8[::1]), i8[::1]")
def see(rows: I32, at_ms: I64, last_seen_ms: I64) -> None:
    """Raises the last-seen time of each of `[n]` rows to the newest of its log times, in ms."""
    for i in range(rows.shape[0]):
        if at_ms[i] > last_seen_ms[rows[i]]:
            last_seen_ms[rows[i]] = at_ms[i]


@compiled("i4[::1], i4[::1], i4[::1], i4[::1]")
def distinct_rows(rows: I32, scratch: I32, unique: I32, positions: I32) -> int:
    """Distinct rows in order of first use, after the missing row 0, and the position of each of `[n]` rows among them.

    Returns their number. `scratch` has a 0 for each row of the table, before and after.
    """
    unique[0] = 0
    count = 1
    for i in range(rows.shape[0]):
        row = rows[i]
        if row == 0:
            positions[i] = 0
            continue
        if scratch[row] == 0:
            scratch[row] = count
            unique[count] = row
            count += 1
        positions[i] = scratch[row]
    for k in range(1, count):
        scratch[unique[k]] = 0
    return count


def first_occurrences(ids: U64) -> U64:
    """Distinct ids in the order in which they first occur.

    >>> first_occurrences(np.array([9, 3, 9, 1], np.uint64)).tolist()
    [9, 3, 1]
    """
    found = np.empty_like(ids)
    return found[: _first_occurrences(ids, np.zeros(4 << ids.size.bit_length(), np.int32), found)].copy()


@compiled("u8[::1], i4[::1], u8[::1]")
def _first_occurrences(ids: U64, places: I32, found: U64) -> int:
    """`places`: zeros, an index of the ids found; their number is a power of two."""
    last, count = np.uint64(places.shape[0] - 1), 0
    for i in range(ids.shape[0]):
        at = mix(ids[i]) & last
        while places[at] != 0 and found[places[at] - 1] != ids[i]:
            at = (at + np.uint64(1)) & last
        if places[at] == 0:
            found[count] = ids[i]
            count += 1
            places[at] = count
    return count


class Pending:
    """At most `most` ids with fewer than `admit_after` sightings, which wait for a row. The least used are dropped first."""

    def __init__(self, admit_after: int, most: int) -> None:
        self._admit_after, self._most = admit_after, most
        self._places = Places(1024, most)
        self._counts: I32 = np.zeros(self._places.capacity, np.int32)
        self._seen_ms: I64 = np.zeros(self._places.capacity, np.int64)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def capacity(self) -> int:
        """The number of ids that fit."""
        return self._places.capacity

    def count(self, seen: Sightings) -> tuple[U64, U64]:
        """Counts sightings; returns the ids whose counts changed, and those among them that are due a row and no longer wait."""
        before = self.of(seen.ids)
        counts, seen_ms = before.counts + seen.counts, np.maximum(before.seen_ms, seen.seen_ms)
        due = counts >= self._admit_after
        self.load(Sightings(seen.ids, np.where(due, 0, counts).astype(np.int32), seen_ms))
        return seen.ids, seen.ids[due]

    def of(self, ids: U64) -> Sightings:
        """The sightings of `[n]` ids, 0 for ids that do not wait."""
        slots = self._places.find(ids)
        return Sightings(ids, self._counts[slots], self._seen_ms[slots])

    def ids(self) -> U64:
        """The ids that wait, ascending."""
        return np.sort(self._places.ids[self._places.held()])

    def load(self, seen: Sightings) -> None:
        """Sets sightings; a count of 0 removes an id."""
        is_seen = seen.counts > 0
        self._places.drop(seen.ids[~is_seen])
        self._set(Sightings(seen.ids[is_seen], seen.counts[is_seen], seen.seen_ms[is_seen]))

    def expire(self, before_ms: int) -> U64:
        """Forgets ids last seen before `before_ms` of log time; returns them."""
        return self._forget(self._places.older(self._seen_ms, before_ms))

    def forget(self, ids: U64) -> U64:
        """Forgets those of `[n]` ids that wait; returns them."""
        slots = self._places.find(ids)
        return self._forget(np.unique(slots[slots != 0]))

    def evict(self) -> U64:
        """Forgets the least used ids if too many wait; returns them."""
        leaving = excess(len(self), self._most)
        if leaving == 0:
            return np.empty(0, np.uint64)
        return self._forget(least_used(self._places.ids, self._seen_ms, self._counts.astype(np.float32), leaving))

    def _forget(self, slots: I32) -> U64:
        ids = self._places.ids[slots]
        self._places.drop(ids)
        former = self._places.pack()
        if former is not None:
            self._counts = grown(self._counts[former], self.capacity)
            self._seen_ms = grown(self._seen_ms[former], self.capacity)
        return ids

    def _set(self, seen: Sightings) -> None:
        new = seen.ids[self._places.find(seen.ids) == 0]
        self._places.take(new)
        if self.capacity > self._counts.size:
            self._counts, self._seen_ms = grown(self._counts, self.capacity), grown(self._seen_ms, self.capacity)
        slots = self._places.find(seen.ids)
        self._counts[slots], self._seen_ms[slots] = seen.counts, seen.seen_ms


class IdTable(ABC):
    """The rows of one kind of id.

    Args:
        name: The table's name in versions; part of the hash that initialises a new row.
        dim: Width of a row in versions.
        capacity: Initial number of rows; it doubles when full, and shrinks when few are left.
        admit_after: Sightings that an id needs before it gets a row.
        max_rows: The most ids that have a row, and the most that wait for one.
    """

    def __init__(self, name: str, dim: int, capacity: int, admit_after: int, max_rows: int = NO_CAP) -> None:
        self.name = name
        self.dim = dim
        self.max_rows = max_rows
        self._admit_after, self._first_capacity = admit_after, capacity
        self._forget()

    def clear(self) -> None:
        """Forgets every id, and frees the memory."""
        former = self.capacity
        self._forget()
        if self.capacity != former:
            self._resize(self.capacity, np.zeros(1, np.int32))

    def _forget(self) -> None:
        self._places = Places(self._first_capacity, self.max_rows)
        capacity = self.capacity
        self._last_seen_ms: I64 = np.zeros(capacity, np.int64)
        self._scratch: I32 = np.zeros(capacity, np.int32)
        self._since_version, self._since_durable = ChangeList(capacity), ChangeList(capacity)
        self._pending = Pending(self._admit_after, self.max_rows)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def capacity(self) -> int:
        """The number of rows that fit, the missing one included."""
        return self._places.capacity

    @property
    def pending(self) -> int:
        """The number of ids that were seen and have no row yet."""
        return len(self._pending)

    def find(self, ids: U64) -> I32:
        """The row of each id, `[n]` int32, MISSING if it has none. Admits no ids."""
        return self._places.find(ids)

    def known(self) -> U64:
        """The ids that have a row or wait for one, in any order."""
        return np.concatenate([self._places.ids[self._places.held()], self._pending.ids()])

    def has(self, ids: U64) -> bool:
        """Whether one of `[n]` ids has a row or waits for one."""
        return bool(self.find(ids).any() or self._pending.of(ids).counts.any())

    def observe(self, ids: U64, at_ms: I64) -> I32:
        """Counts one sighting of each of `[n]` ids at log time, and admits those seen often enough; 0 is ignored.

        Returns the row of each id after the admissions, `[n]` int32.
        """
        rows = self.find(ids)
        unknown = np.flatnonzero((rows == MISSING) & (ids != 0))
        if unknown.size:
            if self._admit_after > 1:
                sightings_counted, admitted = self._pending.count(sightings(ids[unknown], at_ms[unknown]))
                self._since_version.pending.add(sightings_counted)
            else:
                admitted = first_occurrences(ids[unknown])
            if admitted.size:
                self._begin(admitted, self._place(admitted))
                rows[unknown] = self.find(ids[unknown])
        see(rows, read_only(at_ms), self._last_seen_ms)
        self._last_seen_ms[MISSING] = 0
        self.touch(rows)
        return rows

    def touch(self, rows: I32) -> None:
        """Lists rows (`[n]` int32) as changed."""
        self._since_version.touch(rows)

    def distinct(self, rows: I32) -> tuple[I32, I32]:
        """Each of `[n]` int32 rows once, in order of first occurrence, MISSING first; and the `[n]` int32 positions among them.

        The order depends on the events only, never on the position of a row, so sums of gradients have the same bits in every
        layout.
        """
        unique = np.empty(rows.size + 1, np.int32)
        positions = np.empty(rows.size, np.int32)
        count = distinct_rows(np.ascontiguousarray(rows), self._scratch, unique, positions)
        return unique[:count], positions

    def expire(self, before_ms: int) -> int:
        """Removes ids last seen before `before_ms` of log time; returns how many had a row."""
        old = self._places.older(self._last_seen_ms, before_ms)
        self._leave(old)
        self._since_version.pending.add(self._pending.expire(before_ms))
        return int(old.size)

    def evict(self) -> int:
        """Removes the least used ids if more than `max_rows` have a row or wait for one; returns how many had one.

        Call it once all ids of a step were observed, before their rows are looked up.
        """
        self._since_version.pending.add(self._pending.evict())
        leaving = excess(len(self), self.max_rows)
        if leaving:
            self._leave(least_used(self._places.ids, self._last_seen_ms, self._use(), leaving))
        return leaving

    def forget(self, ids: U64) -> int:
        """Removes those of `[n]` ids that have a row or wait for one; returns how many had one."""
        rows = self.find(ids)
        rows = np.unique(rows[rows != MISSING])
        self._leave(rows)
        self._since_version.pending.add(self._pending.forget(ids))
        return int(rows.size)

    def take_served(self) -> dict[str, npt.NDArray[Any]]:
        """The changes for serving since the last take of either kind: `ids`, `rows`, `removed`, as in `Changes`."""
        rows = self._ordered(self._since_version.rows())
        removed = self._gone(self._since_version)
        self._since_version.move_to(self._since_durable)
        return {"ids": self._places.ids[rows], "rows": self._served(rows), "removed": removed}

    def take_changes(self) -> Changes:
        """The changes for a durable version since the last call; both lists start again."""
        since = self._since_durable
        self._since_version.move_to(since)
        changes = self._collect(self._ordered(since.rows()), self._gone(since), since.pending.distinct())
        since.clear()
        return changes

    def state(self) -> Changes:
        """Every row, for a base; the list of changes continues."""
        rows = self._ordered(self._places.held())
        return self._collect(rows, np.empty(0, np.uint64), self._pending.ids())

    def load(self, changes: Changes) -> None:
        """Applies `changes` to the present rows, and lists none of them as changed. Call `clear` first for a base."""
        self._places.drop(changes.removed)
        self._place(changes.ids[self.find(changes.ids) == MISSING])
        rows = self.find(changes.ids)
        self._last_seen_ms[rows] = changes.last_seen_ms
        self.put(rows, changes.rows, changes.accum)
        self._pending.load(Sightings(changes.pending_ids, changes.pending_counts, changes.pending_seen_ms))

    def digest(self) -> str:
        """SHA-256 (hex) over all rows ordered by id: equal in every layout."""
        return self.state().digest()

    @abstractmethod
    def put(self, rows: I32, values: F32, accum: F32) -> None:
        """Sets `[n]` rows to what a version holds of them: `[n, dim]` values and accumulators, `[n, 0]` if they have none."""

    def _held(self, rows: I32) -> tuple[F32, F32]:
        """Copies of rows and their accumulators, as versions hold them and `put` takes them; by default there are none."""
        return self._served(rows), np.zeros((len(rows), 0), np.float32)

    @abstractmethod
    def _served(self, rows: I32) -> F32:
        """Copies of rows alone, as versions hold them."""

    @abstractmethod
    def _begin(self, ids: U64, rows: I32) -> None:
        """Sets the initial values of the rows of newly admitted ids."""

    @abstractmethod
    def _use(self) -> F32:
        """How much each row was used, `[capacity]` float32, computed from what versions hold; only doublings count."""

    @abstractmethod
    def _resize(self, capacity: int, former: I32 | None = None) -> None:
        """Changes the capacity. `former`: the former positions of rows 0, 1, 2 ..; None if all stay."""

    def _place(self, ids: U64) -> I32:
        before = self.capacity
        rows = self._places.take(ids)
        if self.capacity > before:
            self._resize(self.capacity)
            for field in ("_last_seen_ms", "_scratch"):
                setattr(self, field, grown(getattr(self, field), self.capacity))
            for since in (self._since_version, self._since_durable):
                since.resize(self.capacity)
        self._last_seen_ms[rows] = 0
        return rows

    def _leave(self, rows: I32) -> None:
        ids = self._places.ids[rows]
        self._places.drop(ids)
        self._since_version.removed.add(ids)
        former = self._places.pack()
        if former is None:
            return
        self._resize(self.capacity, former)
        self._last_seen_ms = grown(self._last_seen_ms[former], self.capacity)
        self._scratch = np.zeros(self.capacity, np.int32)
        for since in (self._since_version, self._since_durable):
            since.resize(self.capacity, former)

    def _ordered(self, rows: I32) -> I32:
        """Those of `[n]` rows that have an id, in the order of the ids."""
        ids = self._places.ids[rows]
        occupied = np.flatnonzero(ids)
        return rows[occupied[np.argsort(ids[occupied])]]

    def _gone(self, since: ChangeList) -> U64:
        removed = since.removed.distinct()
        if not removed.size:
            return removed
        absent: U64 = removed[self.find(removed) == MISSING]
        return absent

    def _collect(self, rows: I32, removed: U64, pending: U64) -> Changes:
        values, accum = self._held(rows)
        waiting = self._pending.of(pending)
        return Changes(
            ids=self._places.ids[rows],
            rows=values,
            accum=accum,
            last_seen_ms=self._last_seen_ms[rows],
            removed=removed,
            pending_ids=waiting.ids,
            pending_counts=waiting.counts,
            pending_seen_ms=waiting.seen_ms,
        )
