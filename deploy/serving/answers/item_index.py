"""Sources of candidate items in one worker's memory: clicked items by category, and the items nearest to a user.

They only propose items, so they may be behind. The caller reads the items' rows at the version of the answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from deploy.serving.host_files import SLOTS, clicked_at, entries_in
from state.history.store import HistoryStore
from state.ranking.item_scores import Workspace
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
MOST_INDEXED = 1_000_000
"""Maximum in the index, about 130 MB. Other items replace some of them at their next click."""
ROWS_AT_ONCE = 400
OUTGROWN = 4
_IDS = 1 << 64

HALF_MS = 86_400_000
MOST_OF_CATEGORY = 512
MOST_ITEMS = 300_000
"""The maximum number of items in all categories; about 40 MB."""
MOST_USERS = 100_000
"""The maximum number of users whose newest click is counted when the index is built."""
USERS_AT_ONCE = 50
NOTES_AT_ONCE = 8

# A worker computes answers in one thread.
faiss.omp_set_num_threads(1)


def lists_for(rows: int) -> int:
    """Returns a suitable number of lists for this many rows.

    >>> lists_for(10), lists_for(10_000), lists_for(1_000_000)
    (3, 100, 256)
    """
    return min(MOST_LISTS, max(1, round(math.sqrt(rows))))


class ItemIndex:
    """A faiss inverted file of rows in half precision, by id; used by one thread.

    Each row is in the list of the centre with which its product is largest. Centres have unit length, so they represent
    directions. A query searches the lists of some centres.

    Args:
        sample: `[k, dim]` float32, some of the rows; they are not added.
        rows: The approximate number of rows that will be added.
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
        """Returns at most this many ids of the fullest list, approximately the oldest in it."""
        lists = self._index.invlists
        fullest = max(range(self._index.nlist), key=lists.list_size)
        count = min(most, lists.list_size(fullest))
        list_ids = lists.get_ids(fullest)
        ids = faiss.rev_swig_ptr(list_ids, count).copy() if count else np.empty(0, np.int64)
        return np.asarray(ids.view(np.uint64))

    def nearest(self, query: F32, most: int) -> list[int]:
        """The ids of the rows with the largest products with a query, `[dim]` float32; the largest first."""
        _, neighbours = self._index.search(query.reshape(1, -1), most)
        return [identity for identity in neighbours[0].view(np.uint64).tolist() if identity != _NOTHING]


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
    """Follows the items' rows of one host, from the first query on; used by one thread.

    1. The serving version reports which rows were written since the one before. Each is due once.
    2. Due rows are read at the version of the batch, and put into the index.
    3. A new index is built by a pass over all rows if it is unknown what changed, or if there are four times as many rows
       as the index was built for. The old index answers meanwhile.
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
            most: The maximum number of items.
        """
        self._wanted = True
        if self._index is None or self._index.dim != len(query):
            return []
        return self._index.nearest(query, most)

    def read_more(self) -> bool:
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
        grown = self._index is not None and len(self._index) > OUTGROWN * self._planned and self._planned < MOST_INDEXED
        if changed is None or before is None or before.dims["item"] != served.dims["item"]:
            self._making = _Walk()
            self._due.clear()
            return
        if grown and self._making is None:
            self._making = _Walk()
        self._due.update(dict.fromkeys(changed.tolist()))

    def _put(self, index: ItemIndex, reader: RowReader, served: Served) -> None:
        """2. Read some of the due rows."""
        batch = list(islice(self._due, ROWS_AT_ONCE))
        for identity in batch:
            del self._due[identity]
        ids = np.array(batch, np.uint64)
        rows, has_row = reader.get("item", batch, served)
        index.remove(ids)
        index.add(ids[has_row], rows[has_row])
        if (over := len(index) - MOST_INDEXED) > 0:
            index.remove(index.oldest(over))

    def _make(self, making: _Walk, reader: RowReader, served: Served) -> None:
        """3. Continue a walk: first read a sample, then fill the index.

        Ids are hashes, so the first rows are a random sample.
        """
        ids, rows, following = reader.rows_from("item", making.following, ROWS_AT_ONCE, served)
        if making.index is not None:
            making.index.add(ids, rows)
        else:
            making.sample.append((ids, rows))
            rows_read = sum(len(ids) for ids, _ in making.sample)
            # Assume as many ids in the rest as in the part already read.
            planned = rows_read if following is None else round(rows_read * _IDS / following)
            if following is None or rows_read >= POINTS * lists_for(planned):
                making.planned = max(planned, ROWS_AT_ONCE)
                making.index = ItemIndex(np.concatenate([rows for _, rows in making.sample]), making.planned)
                for some, of_some in making.sample:
                    making.index.add(some, of_some)
                making.sample.clear()
        if following is not None and (making.index is None or len(making.index) < MOST_INDEXED):
            making.following = following
        else:
            self._index, self._planned, self._making = making.index, making.planned, None


@dataclass
class _Category:
    """The items of one category: weights, and the cached order by weight (None if outdated)."""

    weights: dict[int, float] = field(default_factory=dict)
    ordered: list[int] | None = None

    def add(self, item: int, weight: float) -> int:
        """Adds a click's weight; returns the change in the number of items."""
        before = len(self.weights)
        self.weights[item] = self.weights.get(item, 0.0) + weight
        self.ordered = None
        if len(self.weights) >= 2 * MOST_OF_CATEGORY:
            self.keep(MOST_OF_CATEGORY)
        return len(self.weights) - before

    def keep(self, most: int) -> int:
        """Drops all items except the best; returns the number of dropped items."""
        before = len(self.weights)
        self.weights, self.ordered = {item: self.weights[item] for item in self.best(most)}, None
        return before - len(self.weights)

    def best(self, most: int) -> list[int]:
        if self.ordered is None:
            self.ordered = sorted(self.weights, key=lambda item: (-self.weights[item], item))[:MOST_OF_CATEGORY]
        return self.ordered[:most]


class ClickedItems:
    """The candidate index: items by category, from users' newest clicks and then the feed. Used by one thread."""

    def __init__(self, histories: HistoryStore) -> None:
        self._histories = histories
        self._categories: dict[int, _Category] = {}
        self._all = _Category()
        self._items = 0
        self._next_user: int | None = 0
        self._users = 0
        self._begun_ms = 0
        self._read = max(0, entries_in(histories) - SLOTS)

    def read_more(self) -> bool:
        """Reads the next part of the feed, for at most a few milliseconds; returns whether there is more."""
        written = entries_in(self._histories)
        if written < self._read:
            # The store was rebuilt.
            self._read = 0
        return any((self._read_clicked(written), self._read_users()))

    def best(self, category: int | None, most: int) -> list[int]:
        """Returns the items of a category, or of all (None), with the highest click weights, best first."""
        of_category = self._all if category is None else self._categories.get(category)
        return [] if of_category is None else of_category.best(most)

    def _read_clicked(self, written: int) -> bool:
        first = max(self._read, written - SLOTS)
        last = min(written, first + NOTES_AT_ONCE)
        for seq in range(first, last):
            if (clicked := clicked_at(self._histories, seq)) is not None:
                weight = self._weight(clicked.at_ms)
                for item, category, clicks in clicked.items.tolist():
                    self._add(category, item, weight * clicks)
        self._read = last
        return last < written

    def _read_users(self) -> bool:
        if self._next_user is None or self._users >= MOST_USERS:
            return False
        ends = self._histories.ends(self._next_user, USERS_AT_ONCE)
        for event in ends.newest[["at_ms", "category", "item"]].tolist():
            at_ms, category, item = event
            if item and category:
                self._add(category, item, self._weight(at_ms))
        self._users += len(ends.users)
        self._next_user = ends.following
        return self._next_user is not None

    def _weight(self, at_ms: int) -> float:
        """Returns a click's weight; later clicks weigh more, so that stored weights need no decay."""
        self._begun_ms = self._begun_ms or at_ms
        return float(2.0 ** min(500.0, max(-500.0, (at_ms - self._begun_ms) / HALF_MS)))

    def _add(self, category: int, item: int, weight: float) -> None:
        of_category = self._categories.get(category)
        if of_category is None:
            of_category = self._categories[category] = _Category()
        self._items += of_category.add(item, weight)
        self._all.add(item, weight)
        while self._items > MOST_ITEMS:
            # Halve one category after another, so that each call does little work.
            first = next(iter(self._categories))
            of_category = self._categories.pop(first)
            self._items -= of_category.keep(len(of_category.weights) // 2)
            if of_category.weights:
                self._categories[first] = of_category


class ItemSources:
    """Both sources of candidate items, updated together, and the memory for scoring. Used by one thread."""

    def __init__(self, histories: HistoryStore, rows: RowStore) -> None:
        self.clicked, self.near = ClickedItems(histories), NearItems(rows)
        self.work = Workspace.empty()

    def read_more(self) -> bool:
        """Reads the next part of the stores, for at most a few milliseconds; returns whether there is more."""
        return any((self.clicked.read_more(), self.near.read_more()))
