"""Tables of item lists (`state/ranking/item_lists.py`), on the host and without learned weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from state.ranking import item_lists
from state.ranking.item_lists import ItemLists
from trainer.tables.id_table import NO_CAP, IdTable
from trainer.tables.index import F32, I32, U64, grown


class ItemListTable(IdTable):
    """A table with one list of items per key.

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
