"""Ids that were seen too seldom to have a row yet, with their sightings: bounded, and forgotten by log time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trainer.tables.index import I32, U64
from trainer.tables.least_used import excess, least_used
from trainer.tables.places import Places, grown

I64 = npt.NDArray[np.int64]


class Sightings(NamedTuple):
    """Of distinct ids.

    Attributes:
        ids: `[n]` uint64, ascending.
        counts: `[n]` int32.
        seen_ms: `[n]` int64, log time of the last one.
    """

    ids: U64
    counts: I32
    seen_ms: I64


def sightings(ids: U64, at_ms: I64) -> Sightings:
    """One sighting for each of `[n]` ids at `[n]` log times, put together.

    >>> sightings(np.array([7, 3, 7], np.uint64), np.array([5, 1, 4]))
    Sightings(ids=array([3, 7], dtype=uint64), counts=array([1, 2], dtype=int32), seen_ms=array([1, 5]))
    """
    order = np.argsort(ids, kind="stable")
    distinct, starts, counts = np.unique(ids[order], return_index=True, return_counts=True)
    newest = np.maximum.reduceat(at_ms[order], starts) if ids.size else np.empty(0, np.int64)
    return Sightings(distinct, counts.astype(np.int32), newest)


class Pending:
    """Who waits for a row.

    Args:
        admit_after: Sightings an id needs.
        most: Ids that wait at most; the least used go first.
    """

    def __init__(self, admit_after: int, most: int) -> None:
        self._admit_after, self._most = admit_after, most
        self._places = Places(1024, most)
        self._counts: I32 = np.zeros(self._places.capacity, np.int32)
        self._seen_ms: I64 = np.zeros(self._places.capacity, np.int64)

    def __len__(self) -> int:
        """Ids that wait."""
        return len(self._places)

    @property
    def capacity(self) -> int:
        """Ids there is room for."""
        return self._places.capacity

    def count(self, seen: Sightings) -> tuple[U64, U64]:
        """Counts sightings.

        Returns:
            The ids whose sightings are another number now, and those among them that wait no more: they are due a row.
        """
        before = self.of(seen.ids)
        counts, seen_ms = before.counts + seen.counts, np.maximum(before.seen_ms, seen.seen_ms)
        due = counts >= self._admit_after
        self.load(Sightings(seen.ids, np.where(due, 0, counts).astype(np.int32), seen_ms))
        return seen.ids, seen.ids[due]

    def of(self, ids: U64) -> Sightings:
        """The sightings of `[n]` ids, 0 of whoever does not wait."""
        places = self._places.find(ids)
        return Sightings(ids, self._counts[places], self._seen_ms[places])

    def ids(self) -> U64:
        """Who waits, ascending."""
        return np.sort(self._places.ids[self._places.held()])

    def load(self, seen: Sightings) -> None:
        """Sets sightings; a count of 0 takes an id out."""
        here = seen.counts > 0
        self._places.drop(seen.ids[~here])
        self._set(Sightings(seen.ids[here], seen.counts[here], seen.seen_ms[here]))

    def expire(self, before_ms: int) -> U64:
        """Forgets who was last seen before `before_ms` of log time; returns them."""
        return self._forget(self._places.older(self._seen_ms, before_ms))

    def forget(self, ids: U64) -> U64:
        """Forgets those of `[n]` ids that wait; returns them."""
        places = self._places.find(ids)
        return self._forget(np.unique(places[places != 0]))

    def evict(self) -> U64:
        """Forgets the least used, where too many wait; returns them."""
        leaving = excess(len(self), self._most)
        if leaving == 0:
            return np.empty(0, np.uint64)
        return self._forget(least_used(self._places.ids, self._seen_ms, self._counts.astype(np.float32), leaving))

    def _forget(self, places: I32) -> U64:
        ids = self._places.ids[places]
        self._places.drop(ids)
        former = self._places.pack()
        if former is not None:
            self._counts = grown(self._counts[former], self.capacity)
            self._seen_ms = grown(self._seen_ms[former], self.capacity)
        return ids

    def _set(self, seen: Sightings) -> None:
        """Of distinct ids with sightings."""
        new = seen.ids[self._places.find(seen.ids) == 0]
        self._places.take(new)
        if self.capacity > self._counts.size:
            self._counts, self._seen_ms = grown(self._counts, self.capacity), grown(self._seen_ms, self.capacity)
        places = self._places.find(seen.ids)
        self._counts[places], self._seen_ms[places] = seen.counts, seen.seen_ms
