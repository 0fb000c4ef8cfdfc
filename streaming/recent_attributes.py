"""The newest attributes of recent ids in memory, so that a batch of rows asks the store only for the others."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from state.attributes.store import AttributeStore, ids_in, texts_in
from state.attributes.values import U64, AttributeTable
from state.events.id_table import ANNOUNCE_MS

REMEMBERED = 200_000


class Recent:
    """The newest attributes of one side's recent ids. One thread calls `take`, any calls `forget`.

    Args:
        store: The newest attributes of all.
        table: What the attributes are.
        slices: Names of the attributes whose values are announced.
        remembered: Ids held in memory.
    """

    def __init__(
        self, store: AttributeStore, table: AttributeTable, slices: Sequence[str] = (), remembered: int = REMEMBERED
    ) -> None:
        self._store, self._table, self._remembered = store, table, remembered
        self._measured = [number for number, name in enumerate(table.names) if name in slices]
        self._values: U64 = np.empty((1024, len(table.names)), np.uint64)
        self._texts: dict[int, str] = {}
        self._announced: dict[int, int] = {}
        self._changed: deque[int] = deque()
        self._clear()

    def forget(self, ids: Iterable[int]) -> None:
        """Tells that the store has new values of `ids`."""
        self._changed.extend(ids)

    def take(self, ids: U64) -> U64:
        """The attributes of `[n]` ids as of now, `[n, A]` uint64; zeros for id 0, which is none."""
        # The store had each new value before its id came here: what is read below is at least as new.
        while self._changed:
            self._slots.pop(self._changed.popleft(), None)
        wanted = ids.tolist()
        # Those without a record share one place among the values, and have their own among the slots.
        if max(self._used, len(self._slots)) + len(wanted) > self._remembered + 2:
            self._clear()
        slots = self._slots
        missing = [one for one in dict.fromkeys(wanted) if one not in slots]
        if missing:
            self._read(missing)
        return self._values[[slots[one] for one in wanted]]

    def news(self, values: U64, newest_ms: int) -> dict[int, str]:
        """The texts of measured values in `[n, A]` ids that were not announced for ten minutes of event time."""
        if not self._measured or not len(values):
            return {}
        announced, texts = self._announced, self._texts
        due = [
            one
            for one in np.unique(values[:, self._measured]).tolist()
            if one in texts and abs(newest_ms - announced.get(one, -ANNOUNCE_MS)) >= ANNOUNCE_MS
        ]
        announced.update(dict.fromkeys(due, newest_ms))
        return {one: texts[one] for one in due}

    def _read(self, missing: list[int]) -> None:
        """Takes ids into memory; all without a record share one slot."""
        width = len(self._table.names)
        while self._used + len(missing) > len(self._values):
            self._values = np.concatenate([self._values, np.empty_like(self._values)])
        for one, value in zip(missing, self._store.read_many(self._table.side, missing), strict=True):
            if value is None:
                self._slots[one] = 0
                continue
            self._values[self._used] = ids = ids_in(value, width)
            self._slots[one] = self._used
            self._used += 1
            if self._measured:
                texts = texts_in(value, width)
                self._texts |= {int(ids[at]): text for at in self._measured if (text := texts[at]) is not None}

    def _clear(self) -> None:
        self._slots = {0: 1}
        self._values[0], self._values[1] = self._table.unknown, 0
        self._used = 2
        if len(self._texts) > self._remembered:
            self._texts.clear()
            self._announced.clear()
