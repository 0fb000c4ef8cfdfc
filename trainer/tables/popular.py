"""The popular categories: categories by decayed count at log time, in integers, at most so many of them.

A count is in 1/65536 clicks and is multiplied by a fixed ratio each hour of
log time, so that the same log gives the same list on every machine. The list
is kept up to date from the categories a batch touched; only the hourly decay,
which can make counts equal, looks at all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.tables.id_table import NO_CAP
from trainer.tables.index import IdIndex
from trainer.tables.least_used import ROOM, excess, least_used

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

ONE = 1 << 16
HOUR_MS = 3_600_000
DECAY = 63_670
"""Kept of a count each hour, in 1/65536: half of it after a day (2 ** (-1 / 24))."""


def decayed(counts: I64, times: int, kept: int = DECAY) -> I64:
    """Counts after some hours, rounded down each hour; or after as many other spans of which `kept` is left.

    >>> int(decayed(np.array([ONE], np.int64), 24)[0])
    32756
    """
    if times > 24 * 60:
        return np.zeros_like(counts)
    for _ in range(times):
        counts = counts * kept >> 16
    return counts


def ranked(ids: U64, counts: I64, size: int) -> U64:
    """The `size` ids with the largest counts, larger first, then the smaller id.

    >>> ranked(np.array([5, 3, 9], np.uint64), np.array([2, 2, 7]), 2).tolist()
    [9, 3]
    """
    return ids[np.lexsort((ids, -counts))[:size]]


class Popular:
    """The `size` most clicked categories.

    Args:
        size: P, the most categories listed.
        most: Categories counted at most; those with the smallest counts go first.
        span_ms: Of log time, after which counts decay.
        kept: Of a count after each span, in 1/65536.
    """

    def __init__(self, size: int, most: int = NO_CAP, span_ms: int = HOUR_MS, kept: int = DECAY) -> None:
        self._size, self._most = size, max(most, size * ROOM)
        self._span_ms, self._kept = span_ms, kept
        # Entry 0 is no category: the index finds 0 for what it does not hold.
        self._hour = -1
        self._used = 1
        self._ids: U64 = np.zeros(1, np.uint64)
        self._counts: I64 = np.zeros(1, np.int64)
        self._index = IdIndex()
        self._top: U64 = np.zeros(0, np.uint64)

    def __len__(self) -> int:
        """How many categories have a count."""
        return self._used - 1

    def counts_of(self, ids: U64) -> tuple[I64, int]:
        """The counts of some categories, `[n]` int64, 0 where it has none, and the sum of all counts."""
        return self._counts[self._index.find(ids)], int(self._counts[1 : self._used].sum())

    def top(self) -> U64:
        """The list as of the last update, `[P]` uint64, padded with 0."""
        padded = np.zeros(self._size, np.uint64)
        padded[: self._top.size] = self._top
        return padded

    def update(self, ids: U64, at_ms: int) -> None:
        """Counts one click of each id (`[n]` uint64, 0 ignored) at log time."""
        touched, clicks = np.unique(ids[ids != 0], return_counts=True)
        self.add(touched, clicks * ONE, at_ms)

    def add(self, touched: U64, amounts: I64, at_ms: int) -> None:
        """Adds to counts at log time.

        Args:
            touched: `[n]` uint64, distinct ids, ascending, none 0.
            amounts: `[n]` int64, in 1/65536 clicks; with noise some are below 0.
            at_ms: Log time.
        """
        hour = at_ms // self._span_ms
        ticked = hour > self._hour
        if ticked:
            self._decay(hour - self._hour if self._hour >= 0 else 0)
            self._hour = hour
        fresh = touched[self._index.find(touched) == 0]
        if fresh.size:
            self._index.insert(fresh, np.arange(self._used, self._used + fresh.size, dtype=np.int32))
            self._reserve(self._used + fresh.size)
            self._ids[self._used : self._used + fresh.size] = fresh
            self._used += fresh.size
        self._counts[self._index.find(touched)] += amounts
        candidates = self._ids[1 : self._used] if ticked else np.union1d(self._top, touched)
        self._top = ranked(candidates, self._counts[self._index.find(candidates)], self._size)
        if leaving := excess(self._used - 1, self._most):
            ids, counts = self._ids[1 : self._used], self._counts[1 : self._used]
            kept = np.ones(ids.size, np.bool_)
            kept[least_used(ids, counts, np.zeros(ids.size, np.float32), leaving)] = False
            self.load({"ids": ids[kept], "counts": counts[kept], "hour": self._hour})

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """`ids` ascending, their `counts`, and the `hour` of the last decay."""
        ids = np.sort(self._ids[1 : self._used])
        return {"ids": ids, "counts": self._counts[self._index.find(ids)], "hour": np.array(self._hour, np.int64)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Replaces everything by what `state` returned."""
        ids = np.asarray(state["ids"], np.uint64)
        self._hour = int(state["hour"])
        self._used = ids.size + 1
        self._ids = np.concatenate([np.zeros(1, np.uint64), ids])
        self._counts = np.concatenate([np.zeros(1, np.int64), np.asarray(state["counts"], np.int64)])
        self._index = IdIndex(self._used)
        self._index.insert(ids, np.arange(1, self._used, dtype=np.int32))
        self._top = ranked(ids, self._counts[1:], self._size)

    def _decay(self, hours: int) -> None:
        if hours:
            counts = decayed(self._counts[1 : self._used], hours, self._kept)
            kept = counts > 0
            self.load({"ids": self._ids[1 : self._used][kept], "counts": counts[kept], "hour": self._hour})

    def _reserve(self, needed: int) -> None:
        if needed > self._ids.size:
            extra = max(needed, 2 * self._ids.size) - self._ids.size
            self._ids = np.concatenate([self._ids, np.zeros(extra, np.uint64)])
            self._counts = np.concatenate([self._counts, np.zeros(extra, np.int64)])
