"""Tables of lists on the host, without learned weights: what came next after a category, and the items of a key.

The popular categories are a bounded list of categories by decayed count at log time, in integers.

A count is in units of 1/65536 clicks. Each hour of log time multiplies it by a fixed ratio.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from state.compiled import compiled, inlined
from state.ranking import item_lists, transitions
from state.ranking.item_lists import ItemLists
from state.ranking.transitions import Lists, Succession
from trainer.tables.id_table import NO_CAP, ROOM, IdTable, excess, least_used
from trainer.tables.index import F32, I32, U64, IdIndex, grown, hashed_uniform


class CountTable(IdTable):
    """A table with one list of followers per category, counted over all users; see `IdTable`."""

    def __init__(self, name: str, capacity: int = 1024, admit_after: int = 1, max_rows: int = NO_CAP) -> None:
        super().__init__(name, transitions.WIDTH, capacity, admit_after, max_rows)
        self._lists = Lists.empty(self.capacity)
        self._signs: npt.NDArray[np.uint8] = np.zeros((self.capacity, transitions.SIGN_BYTES), np.uint8)

    @property
    def held(self) -> Lists:
        """All lists by row; valid until the table changes."""
        return self._lists

    def lists(self, rows: I32) -> Lists:
        """Copies of the lists of rows, `[n]` int32; an empty list for a row without one."""
        return Lists(self._lists.counts[rows], self._lists.ids[rows])

    def succession(self, rows: I32, recent_categories: U64, popular: U64) -> Succession:
        """The candidates and counts from the lists of users' newest categories, whose `[n]` rows these are."""
        distinct, at = self.distinct(rows)
        return transitions.succession(at, self._lists, recent_categories, popular, distinct)

    def count(self, rows: I32, followers: U64) -> None:
        """Counts `[n]` transitions from the newest category (a row) to the next one (an id, or 0); marks all rows as changed."""
        halved = transitions.record(rows, followers, self._lists)
        # Entries that halving removes from a list become positive zeros.
        self._signs[rows[halved]] = 0
        self.touch(rows)

    def put(self, rows: I32, values: F32, accum: F32) -> None:
        """Sets lists (rows `[n]` int32) from rows of a version, `[n, dim]` float32; there is no accumulator."""
        lists = transitions.unpack(values)
        self._lists.counts[rows], self._lists.ids[rows] = lists
        self._signs[rows] = transitions.signs_of(values)

    def _served(self, rows: I32) -> F32:
        return transitions.pack(self.lists(rows), self._signs[rows])

    def _begin(self, ids: U64, rows: I32) -> None:
        # Empty lists: their zeros have the signs of a new row's values.
        first = hashed_uniform(ids, self.dim, self.name) * np.float32(0.0)
        self.put(rows, first, np.zeros((len(rows), 0), np.float32))

    def _use(self) -> F32:
        sums: F32 = self._lists.counts.sum(1).astype(np.float32)
        return sums

    def _resize(self, capacity: int, former: I32 | None = None) -> None:
        kept = (*self._lists, self._signs) if former is None else (part[former] for part in (*self._lists, self._signs))
        counts, ids, self._signs = (grown(part, capacity) for part in kept)
        self._lists = Lists(counts, ids)


class ItemListTable(IdTable):
    """A table with one list of items per key, see `state/ranking/item_lists.py`.

    Args:
        name: The table's name in versions, one of `item_lists.ENTRIES`.
    """

    def __init__(self, name: str, capacity: int = 1024, admit_after: int = 1, max_rows: int = NO_CAP) -> None:
        self._entries, self._begun = item_lists.ENTRIES[name], 0
        super().__init__(name, item_lists.width(self._entries), capacity, admit_after, max_rows)
        self._lists = ItemLists.empty(self.capacity, self._entries)

    @property
    def held(self) -> ItemLists:
        """All lists by row; list 0 is that of no key. Valid until the table changes."""
        return self._lists

    def put(self, rows: I32, values: F32, accum: F32) -> None:
        """Sets lists (rows `[n]` int32) from rows of a version, `[n, dim]` float32; there is no accumulator."""
        parts: list[npt.NDArray[Any]] = [*self._lists]
        for part, new in zip(parts, item_lists.unpack(values), strict=True):
            part[rows] = new
        self._begun = max(self._begun, int(rows.max(initial=0)))

    def _served(self, rows: I32) -> F32:
        return item_lists.pack(self._lists.take(rows))

    def _begin(self, ids: U64, rows: I32) -> None:
        # Rows after the last one that was in use are zeros.
        again = rows[rows <= self._begun]
        self._begun = max(self._begun, int(rows.max(initial=0)))
        if again.size:
            parts: list[npt.NDArray[Any]] = [*self._lists]
            for part in parts:
                part[again] = 0

    def _use(self) -> F32:
        return np.ascontiguousarray(self._lists.totals[:, -1])

    def _resize(self, capacity: int, former: I32 | None = None) -> None:
        parts = self._lists if former is None else [part[former] for part in self._lists]
        self._lists = ItemLists(*(grown(part, capacity) for part in parts))


I64 = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

ONE = 1 << 16
HOUR_MS = 3_600_000
DECAY = 63_670
"""The part of a count that each hour keeps, in 1/65536: half is left after a day (2 ** (-1 / 24))."""


def decayed(counts: I64, times: int, kept: int = DECAY) -> I64:
    """Counts after some hours, rounded down each hour; or after other time spans, each of which keeps `kept` / 65536.

    >>> int(decayed(np.array([ONE], np.int64), 24)[0])
    32756
    """
    if times > 24 * 60:
        return np.zeros_like(counts)
    for _ in range(times):
        counts = counts * kept >> 16
    return counts


@inlined
def _before(index: int, other: int, ids: U64, counts: I64) -> bool:
    """Whether a category ranks first: by the larger count, on a tie by the smaller id."""
    return bool(counts[index] > counts[other] or (counts[index] == counts[other] and ids[index] < ids[other]))


@compiled("i4[::1], i8[::1], i8[::1]")
def _count(indices: I32, amounts: I64, counts: I64) -> None:
    for i in range(indices.shape[0]):
        if indices[i] != 0:
            counts[indices[i]] += amounts[i]


@compiled("i4[::1], u8[::1], i8[::1], bool[::1], i4[::1]")
def _rank(indices: I32, ids: U64, counts: I64, seen: Flags, top: I32) -> int:
    """Puts the largest categories among `[n]` indices into `top`, the largest first; returns their number.

    seen: `[used]` bool, all False before and after.
    """
    count, most = 0, top.shape[0]
    for i in range(indices.shape[0]):
        index = indices[i]
        if index == 0 or seen[index] or most == 0:
            continue
        seen[index] = True
        if count < most:
            count += 1
        elif not _before(index, top[most - 1], ids, counts):
            continue
        at = count - 1
        while at > 0 and _before(index, top[at - 1], ids, counts):
            top[at] = top[at - 1]
            at -= 1
        top[at] = index
    for i in range(indices.shape[0]):
        seen[indices[i]] = False
    return count


class Popular:
    """The `size` most clicked categories.

    Args:
        size: P, the most categories listed.
        most: The most categories counted; those with the smallest counts are evicted first.
        span_ms: Log time after which counts decay.
        kept: The part of a count that each span keeps, in 1/65536.
    """

    def __init__(self, size: int, most: int = NO_CAP, span_ms: int = HOUR_MS, kept: int = DECAY) -> None:
        self._size, self._most = size, max(most, size * ROOM)
        self._span_ms, self._kept = span_ms, kept
        # Entry 0 is no category: the index returns 0 for unknown ids.
        self._hour = -1
        self._used = 1
        self._ids: U64 = np.zeros(1, np.uint64)
        self._counts: I64 = np.zeros(1, np.int64)
        self._index = IdIndex()
        # The entries with the largest counts, the largest first.
        self._top: I32 = np.zeros(0, np.int32)

    def __len__(self) -> int:
        return self._used - 1

    def standing_of(self, ids: U64) -> tuple[I64, I32, int]:
        """`[n]` int64 counts of categories, 0 for one without; `[n]` int32 ranks, P if not listed; and the sum of all counts."""
        indices = self._index.find(ids)
        ranks = np.full(self._used, self._size, np.int32)
        ranks[self._top] = np.arange(self._top.size, dtype=np.int32)
        return self._counts[indices], ranks[indices], int(self._counts[1 : self._used].sum())

    def top(self) -> U64:
        """The list as of the last update, `[P]` uint64, padded with 0."""
        padded = np.zeros(self._size, np.uint64)
        padded[: self._top.size] = self._ids[self._top]
        return padded

    def update(self, ids: U64, at_ms: int) -> None:
        """Counts one click of each id (`[n]` uint64, 0 ignored) at log time."""
        self.add(ids, np.full(ids.size, ONE, np.int64), at_ms)

    def add(self, ids: U64, amounts: I64, at_ms: int) -> None:
        """Adds amounts in 1/65536 clicks, which noise may make negative, to the counts of `[n]` ids at log time; 0 is ignored."""
        hour = at_ms // self._span_ms
        ticked = hour > self._hour
        if ticked:
            self._decay(hour - self._hour if self._hour >= 0 else 0)
            self._hour = hour
        indices = self._index.find(ids)
        is_fresh = (indices == 0) & (ids != 0)
        if is_fresh.any():
            fresh = np.unique(ids[is_fresh])
            self._index.insert(fresh, np.arange(self._used, self._used + fresh.size, dtype=np.int32))
            self._reserve(self._used + fresh.size)
            self._ids[self._used : self._used + fresh.size] = fresh
            self._used += fresh.size
            indices = self._index.find(ids)
        _count(indices, amounts, self._counts)
        self._rank(np.arange(1, self._used, dtype=np.int32) if ticked else np.concatenate([self._top, indices]))
        if leaving := excess(self._used - 1, self._most):
            ids, counts = self._ids[1 : self._used], self._counts[1 : self._used]
            stays = np.ones(ids.size, np.bool_)
            stays[least_used(ids, counts, np.zeros(ids.size, np.float32), leaving)] = False
            self.load({"ids": ids[stays], "counts": counts[stays], "hour": self._hour})

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """`ids` ascending, their `counts`, and the `hour` of the last decay."""
        ids = np.sort(self._ids[1 : self._used])
        return {"ids": ids, "counts": self._counts[self._index.find(ids)], "hour": np.array(self._hour, np.int64)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Replaces the whole state by what `state` returned."""
        ids = np.asarray(state["ids"], np.uint64)
        self._hour = int(state["hour"])
        self._used = ids.size + 1
        self._ids = np.concatenate([np.zeros(1, np.uint64), ids])
        self._counts = np.concatenate([np.zeros(1, np.int64), np.asarray(state["counts"], np.int64)])
        self._index = IdIndex(self._used)
        self._index.insert(ids, np.arange(1, self._used, dtype=np.int32))
        self._rank(np.arange(1, self._used, dtype=np.int32))

    def _rank(self, indices: I32) -> None:
        top = np.empty(self._size, np.int32)
        self._top = top[: _rank(indices, self._ids, self._counts, np.zeros(self._used, np.bool_), top)]

    def _decay(self, hours: int) -> None:
        if hours:
            counts = decayed(self._counts[1 : self._used], hours, self._kept)
            stays = counts > 0
            self.load({"ids": self._ids[1 : self._used][stays], "counts": counts[stays], "hour": self._hour})

    def _reserve(self, needed: int) -> None:
        if needed > self._ids.size:
            extra = max(needed, 2 * self._ids.size) - self._ids.size
            self._ids = np.concatenate([self._ids, np.zeros(extra, np.uint64)])
            self._counts = np.concatenate([self._counts, np.zeros(extra, np.int64)])
