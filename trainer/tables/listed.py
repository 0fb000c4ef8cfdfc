"""Ids listed as changed: as they come, told once each."""

from __future__ import annotations

import numpy as np

from trainer.tables.index import U64

_FOLD = 65_536


class ListedIds:
    """A list of ids.

    >>> listed = ListedIds()
    >>> listed.add(np.array([9, 3], np.uint64)); listed.add(np.array([9], np.uint64))
    >>> listed.distinct().tolist()
    [3, 9]
    """

    def __init__(self) -> None:
        self._parts: list[U64] = []
        self._waiting = 0

    def add(self, ids: U64) -> None:
        """Lists `[n]` ids, which must not change any more."""
        if ids.size == 0:
            return
        self._parts.append(ids)
        self._waiting += ids.size
        # While nobody takes the list it is folded, so that it holds no more than twice as many as are distinct.
        if self._waiting > max(_FOLD, self._parts[0].size):
            self._parts, self._waiting = [self.distinct()], 0

    def distinct(self) -> U64:
        """Each id once, ascending."""
        # Sorting is ten times as fast as NumPy's `unique`, which hashes.
        ids: U64 = np.sort(np.concatenate([np.zeros(1, np.uint64), *self._parts]))
        found: U64 = ids[1:][ids[1:] != ids[:-1]]
        return found
