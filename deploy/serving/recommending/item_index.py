"""The rows with the largest products with a query, among a million: faiss's inverted file, rows in half precision.

Rows lie in lists by the centre that their product is largest with; a query
looks into the lists of some centres. Centres are of unit length, the middles of
directions: rows of items differ in length by how often they were clicked, and
the longest are near to many users.

Of a million rows of 32 numbers on a core at 2 GHz or so: 0.9 us to add one,
1.5 us to put one anew, 3 ms to find those near to a user, 135 MB. A graph
(usearch, HNSW) finds them in 0.3 ms, and takes 43 us to add one of only 60,000
and 940 us to put one anew: five versions a second rewrite thousands of rows.
"""

from __future__ import annotations

import math
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

MOST_LISTS = 256
LOOKED_AT = 0.6
"""Of the lists, so many are looked into. What users' engagement is multiplied with lies in other directions than most rows,
so that fewer miss some: of Taobao's users' 20 nearest half of the lists hold 99 of 100, a quarter 86."""
FEWEST_LOOKED_AT = 16
POINTS = 20
"""Rows of the sample for each list: the centres are learned in some 30 ms."""
ROUNDS = 5

F32 = NDArray[np.float32]
U64 = NDArray[np.uint64]

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
        """Takes out the rows of ids, those that there are."""
        if len(ids):
            self._index.remove_ids(faiss.IDSelectorArray(np.ascontiguousarray(ids).view(np.int64)))

    def oldest(self, most: int) -> U64:
        """So many ids at most, of the fullest list those that are in it for longest, or nearly so."""
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


_NOTHING = (1 << 64) - 1
"""faiss's -1."""
