"""Items whose rows are near to what a user's engagement is multiplied with, in one worker's memory.

An index only proposes: whoever answers reads the rows of what it proposes at
the version of the answer. So it may be some tenths of a second behind, and need
not hold each version apart. It follows a host's rows in turns of some
milliseconds, from the first question on:

1. The version that answers says which items' rows were written since the one
   before (`RowReader.changed`); each is due once, however often it is written.
2. What is due is read at the version of the turn, and put into the index.
3. Where it is not known what changed (the first time, after a rollback, or
   where a worker slept longer than versions are kept), and where there are four
   times as many rows as the index was laid out for, one is made anew, by a walk
   over all rows; the one before answers meanwhile.

A turn costs the same whatever comes: with more clicks it only takes longer
until all rows are followed. A host at rest costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from deploy.serving.recommending.item_index import F32, POINTS, U64, ItemIndex, lists_for
from state.rows.reader import RowReader
from state.rows.served import Served
from state.rows.store import RowStore

MOST_ITEMS = 1_000_000
"""In the index; some 130 MB. Others in place of them come with their next click."""
ROWS_AT_ONCE = 400
OUTGROWN = 4
_IDS = 1 << 64


@dataclass
class _Walk:
    """An index that is being made, and how far the walk over all rows is.

    Attributes:
        following: The id at which the walk goes on.
        sample: Rows of which the centres are made, before there is an index.
        index: Once there is.
        planned: The rows that it is laid out for.
    """

    following: int = 0
    sample: list[tuple[U64, F32]] = field(default_factory=list)
    index: ItemIndex | None = None
    planned: int = 0


class NearItems:
    """Follows the items' rows of one host; use it in one thread.

    Args:
        rows: The host's rows, read only.
    """

    def __init__(self, rows: RowStore) -> None:
        self._rows = rows
        self._index: ItemIndex | None = None
        self._making: _Walk | None = None
        self._at: Served | None = None
        self._due: dict[int, None] = {}
        self._planned = 0
        self._wanted = False

    def nearest(self, query: F32, most: int) -> list[int]:
        """The items whose rows have the largest products with a query, the largest first; fewer while they are still read.

        Args:
            query: `[dim]` float32.
            most: How many at most.
        """
        self._wanted = True
        if self._index is None or self._index.dim != len(query):
            return []
        return self._index.nearest(query, most)

    def turn(self) -> bool:
        """Reads some of what is not read yet, once anything was asked for; whether there is more."""
        if not self._wanted:
            return False
        with self._rows.reader() as reader:
            served = reader.served()
            if served is None or not served.dims.get("item"):
                return False
            self._follow(reader, served)
            if self._making is not None:
                self._make(self._making, reader, served)
            elif self._index is not None and self._due:
                self._put(self._index, reader, served)
        return self._making is not None or bool(self._due)

    def _follow(self, reader: RowReader, served: Served) -> None:
        """1. 3. What is due since the last turn."""
        before, self._at = self._at, served
        changed = None if before is None else reader.changed("item", before, served)
        grown = self._index is not None and len(self._index) > OUTGROWN * self._planned and self._planned < MOST_ITEMS
        if changed is None or before is None or before.dims["item"] != served.dims["item"]:
            self._making = _Walk()
            self._due.clear()
            return
        if grown and self._making is None:
            self._making = _Walk()
        self._due.update(dict.fromkeys(changed.tolist()))

    def _put(self, index: ItemIndex, reader: RowReader, served: Served) -> None:
        """2. Some of what is due."""
        some = list(islice(self._due, ROWS_AT_ONCE))
        for one in some:
            del self._due[one]
        ids = np.array(some, np.uint64)
        rows, known = reader.get("item", some, served)
        index.remove(ids)
        index.add(ids[known], rows[known])
        if (over := len(index) - MOST_ITEMS) > 0:
            index.remove(index.oldest(over))

    def _make(self, making: _Walk, reader: RowReader, served: Served) -> None:
        """3. Goes on with a walk."""
        if making.index is None:
            self._sample(making, reader, served)
            return
        ids, rows, following = reader.rows_from("item", making.following, ROWS_AT_ONCE, served)
        making.index.add(ids, rows)
        if following is None or len(making.index) >= MOST_ITEMS:
            self._index, self._planned, self._making = making.index, making.planned, None
        else:
            making.following = following

    def _sample(self, making: _Walk, reader: RowReader, served: Served) -> None:
        """Reads rows until there are enough for each list: ids are hashes, so that the first ones are as good as any."""
        ids, rows, following = reader.rows_from("item", making.following, ROWS_AT_ONCE, served)
        making.sample.append((ids, rows))
        read = sum(len(some) for some, _ in making.sample)
        # As many ids in the rest as in what is read.
        planned = read if following is None else round(read * _IDS / following)
        if following is not None and read < POINTS * lists_for(planned):
            making.following = following
            return
        making.planned = max(planned, ROWS_AT_ONCE)
        making.index = ItemIndex(np.concatenate([some for _, some in making.sample]), making.planned)
        for some, of_some in making.sample:
            making.index.add(some, of_some)
        making.sample.clear()
        if following is None:
            self._index, self._planned, self._making = making.index, making.planned, None
        else:
            making.following = following
