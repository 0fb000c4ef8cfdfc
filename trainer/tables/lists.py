"""Tables of lists on the host, without learned weights: what came next after a category, and the items of a key."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from state.ranking import item_lists, transitions
from state.ranking.item_lists import ItemLists
from state.ranking.transitions import Lists, Succession
from trainer.tables.id_table import NO_CAP, IdTable
from trainer.tables.index import F32, I32, U64, grown, hashed_uniform


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
