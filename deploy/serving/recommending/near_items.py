"""Finds the items whose rows have the largest product with a user's query vector, from an index in one worker's memory.

An index only proposes items. The caller reads the rows of the proposed items at the version of the
answer. So the index may be some tenths of a second behind, and need not separate versions. From the
first question on, it follows a host's rows in batches of some milliseconds (`NearItems`):

1. The serving version reports which items' rows were written since the one before
   (`RowReader.changed`). Each is due once, however often it is written.
2. Due rows are read at the version of the batch, and put into the index.
3. A new index is built by a pass over all rows if it is unknown what changed. That happens the
   first time, after a rollback, or if a worker slept longer than versions are kept. It is also
   built when there are four times as many rows as the index was built for. The old index answers
   meanwhile.

A batch costs the same whatever arrives: with more clicks, following all rows only takes longer. An
idle host costs nothing.

`ItemIndex` is a faiss inverted file, with rows in half precision, for up to a million rows. Each
row is in the list of the centre with which its product is largest. A query searches the lists of
some centres. Centres have unit length and stand for directions: item rows differ in length by how
often they were clicked, and the longest are near to many users.

Costs for a million rows of 32 numbers on a core at about 2 GHz: 0.9 us to add a row, 1.5 us to
replace one, 3 ms for a query, 135 MB. A graph (usearch, HNSW) answers a query in 0.3 ms. But it
takes 43 us to add a row to only 60,000, and 940 us to replace one. Five versions a second rewrite
thousands of rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from state.rows.reader import RowReader, Served
from state.rows.store import RowStore

MOST_LISTS = 256
LOOKED_AT = 0.6
"""Fraction of the lists that a query searches. Queries have other directions than most rows, so fewer lists miss
some: of the 20 nearest to Taobao's users, half of the lists hold 99 of 100, a quarter 86."""
FEWEST_LOOKED_AT = 16
POINTS = 20
"""Rows of the sample for each list; the centres are learned in about 30 ms."""
ROUNDS = 5

F32 = NDArray[np.float32]
U64 = NDArray[np.uint64]
_NOTHING = (1 << 64) - 1
"""faiss's -1 as an unsigned id: no item."""
MOST_ITEMS = 1_000_000
"""Maximum in the index, about 130 MB. Other items replace some of them at their next click."""
ROWS_AT_ONCE = 400
OUTGROWN = 4
_IDS = 1 << 64

# A worker answers in one thread.
faiss.omp_set_num_threads(1)


def lists_for(rows: int) -> int:
    """How many lists are good for so many rows.

    >>> lists_for(10), lists_for(10_000), lists_for(1_000_000)
    (3, 100, 256)
    """
    return min(MOST_LISTS, max(1, round(math.sqrt(rows))))


class ItemIndex:
    """Rows by id; use it in one thread.

    Args:
        sample: `[k, dim]` float32, some of the rows; they are not added.
        rows: How many rows there will be, or so.
    """

    def __init__(self, sample: F32, rows: int) -> None:
        count, self.dim = sample.shape
        lists = max(1, min(count, lists_for(rows)))
        self._centres = faiss.IndexFlatIP(self.dim)
        kind = faiss.ScalarQuantizer.QT_fp16
        self._index: Any = faiss.IndexIVFScalarQuantizer(
            self._centres, self.dim, lists, kind, faiss.METRIC_INNER_PRODUCT, False
        )
        self._centres.add(_centres(sample, lists))
        self._index.train(self._centres.reconstruct_n(0, lists))
        self._index.set_direct_map_type(faiss.DirectMap.Hashtable)  # type: ignore[attr-defined]
        self._index.nprobe = min(lists, max(FEWEST_LOOKED_AT, round(LOOKED_AT * lists)))

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def add(self, ids: U64, rows: F32) -> None:
        """Adds rows of ids that are not here, `[k]` uint64 and `[k, dim]` float32."""
        if len(ids):
            self._index.add_with_ids(rows, ids.view(np.int64))

    def remove(self, ids: U64) -> None:
        """Removes the rows of these ids, if they are in the index."""
        if len(ids):
            self._index.remove_ids(faiss.IDSelectorArray(np.ascontiguousarray(ids).view(np.int64)))

    def oldest(self, most: int) -> U64:
        """At most this many ids of the fullest list, approximately the oldest ones in it."""
        lists = self._index.invlists
        fullest = max(range(self._index.nlist), key=lists.list_size)
        count = min(most, lists.list_size(fullest))
        held = lists.get_ids(fullest)
        found = faiss.rev_swig_ptr(held, count).copy() if count else np.empty(0, np.int64)
        return np.asarray(found.view(np.uint64))

    def nearest(self, query: F32, most: int) -> list[int]:
        """The ids of the rows with the largest products with a query, `[dim]` float32; the largest first."""
        _, found = self._index.search(query.reshape(1, -1), most)
        return [one for one in found[0].view(np.uint64).tolist() if one != _NOTHING]


def _centres(sample: F32, lists: int) -> F32:
    """`[lists, dim]` float32."""
    if lists == 1:
        return np.zeros((1, sample.shape[1]), np.float32)
    learned = faiss.Kmeans(
        sample.shape[1],
        lists,
        niter=ROUNDS,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=POINTS,
        seed=1,
    )
    learned.train(sample)
    return np.asarray(learned.centroids, np.float32)


@dataclass
class _Walk:
    """An index that is being built, and the progress of the pass over all rows.

    Attributes:
        following: The id at which the pass continues.
        sample: Rows from which the centres are learned, before the index exists.
        index: The new index, once it exists.
        planned: The number of rows that it is built for.
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
        """The items whose rows have the largest products with a query, largest first; fewer while rows are still being read.

        Args:
            query: `[dim]` float32.
            most: How many at most.
        """
        self._wanted = True
        if self._index is None or self._index.dim != len(query):
            return []
        return self._index.nearest(query, most)

    def turn(self) -> bool:
        """Reads some of the outstanding rows, after the first query; returns whether there are more."""
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
        """1. and 3. Determine what is due since the last batch."""
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
        """2. Read some of the due rows."""
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
        """Reads rows until there are enough for each list; ids are hashes, so the first ones are a random sample."""
        ids, rows, following = reader.rows_from("item", making.following, ROWS_AT_ONCE, served)
        making.sample.append((ids, rows))
        read = sum(len(some) for some, _ in making.sample)
        # Assume as many ids in the rest as in the part already read.
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
