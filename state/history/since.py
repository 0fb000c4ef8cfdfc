"""Collects what a store of histories gained since a position of the training log, for a rewind. No side effects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from state.features.mask import Mask
from state.history.counts import Counts, returned
from state.microbatch.batch import MicroBatch, counts, happened, trim
from state.positions import Range, Source, split_range

Place = tuple[Source, int]


class Since:
    """What a store gained since a position of the training log; takes the records from there on, in order.

    Args:
        marks: The next offset of each source at that position.
        positions: The store's positions; later rows are not in it.
        mask: The clicks that will not be replayed.

    Attributes:
        gained: User -> how many events the user gained.
        ended: Impressions from before the position whose wait has ended since.
    """

    def __init__(self, marks: Mapping[Source, int], positions: Mapping[Source, int], mask: Mask = Mask.NONE) -> None:
        self._marks, self._positions, self._mask = marks, positions, mask
        self._items: tuple[set[int], set[int]] = (set(), set())
        self._at: dict[Source, int] = dict(marks)
        self._parts: list[Range] = []
        self.gained: Counter[int] = Counter()
        self.ended: set[Place] = set()

    @property
    def masked_items(self) -> set[int]:
        """The items that only masked clicks named since then."""
        masked, others = self._items
        return masked - others

    @property
    def sources(self) -> list[Source]:
        """The sources in which the store has read beyond the position."""
        return [source for source, after in self._positions.items() if after > self._marks.get(source, 0)]

    def take(self, batch: MicroBatch) -> None:
        """Takes a record. Rows before the position, rows already taken and rows that the store lacks do not count."""
        ranges = batch.header.ranges
        new, self._at = trim(batch, self._at)
        ends = np.array([self._positions.get(part.source, 0) for part in ranges] or [0], np.int64)
        new &= batch.offset < ends[batch.source]
        happens = happened(batch.kind)
        users, numbers = np.unique(batch.user[new & happens], return_counts=True)
        self.gained.update(dict(zip(users.tolist(), numbers.tolist(), strict=True)))
        if self._mask:
            out = self._mask.rows(batch.user, batch.at_ms, batch.source, batch.offset, ranges)
            for items, rows in zip(self._items, (out, ~out), strict=True):
                items.update(np.unique(batch.item[new & happens & rows]).tolist())
        for row in np.flatnonzero(new & ~happens).tolist():
            source, opened = ranges[int(batch.source[row])].source, int(batch.opened[row])
            if opened < self._marks.get(source, 0):
                self.ended.add((source, opened))
        for number, part in enumerate(ranges):
            mark = self._marks.get(part.source, 0)
            if part.first < mark < part.next:
                below = counts(batch.kind[(batch.source == number) & (batch.offset < mark)])
                part = split_range(part, mark, below.pop("rows"), below)[1]
            if part.first >= mark and part.source in self._positions:
                self._parts.append(part)

    def counts(self, stored: Mapping[Source, Counts]) -> dict[Source, Counts | None]:
        """The store's counts at the position; None for a source that it had not read then.

        A stream that crashed may have written positions again in other ranges; it
        counted the last ones. So the ranges are followed backward from the end.
        """
        low = {source: stored[source]["next"] for source in self.sources}
        taken: dict[Source, Counter[str]] = {source: Counter() for source in low}
        for part in reversed(self._parts):
            if low.get(part.source) == part.next:
                taken[part.source].update(part.outcomes)
                low[part.source] = part.first
        found: dict[Source, Counts | None] = {}
        for source, at in low.items():
            mark = self._marks.get(source)
            if mark is None:
                found[source] = None
                continue
            # Positions without a record were counted as absent.
            taken[source]["absent"] += at - mark
            found[source] = returned(stored[source], taken[source], mark)
        return found
