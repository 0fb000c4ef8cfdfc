"""Which rows wait after a stretch of the micro-batch log: those that it opens and does not close."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from state.features.erased import Flags
from state.history.store import HistoryStore
from state.history.waiting import Changes, Extra, WaitingRows, keys_of, place_of
from state.microbatch.batch import MicroBatch
from state.microbatch.row_kinds import Kind, happened
from state.positions import Range, Source


class Waits:
    """Gathers from micro-batches what begins and ends to wait, until it is committed. One thread.

    Args:
        store: Being rebuilt.
    """

    def __init__(self, store: HistoryStore) -> None:
        self._store = store
        self._rows: WaitingRows | None = None
        self._changes: Changes = {}
        self._extra: Extra = {}
        self._erased: set[bytes] = set()

    def follow(self, batch: MicroBatch, erased: Flags, ranges: Sequence[Range]) -> list[Range]:
        """Takes the new rows of a micro-batch; returns its ranges without closings of what was never opened here.

        Where the log no longer holds an impression, but holds its label, the
        row never waited in this store; its account leaves both out. What an
        erased user was shown does not wait, and counts as opened.

        Args:
            batch: Rows that the store does not have.
            erased: `[n]` bool, whether each row is of a user who was erased since.
            ranges: What they came from.
        """
        rows = self._rows = self._rows or WaitingRows(self._store)
        closing = np.flatnonzero(~happened(batch.kind))
        opened = batch.kind == Kind.OPENED
        if not (len(closing) or opened.any()):
            return list(ranges)
        sources = [part.source for part in batch.header.ranges]
        now = rows.adopt(batch.columns, self._changes, self._extra)
        if (waits := opened & ~erased).any():
            keys = keys_of(sources, batch.source[waits], batch.offset[waits])
            self._changes.update(zip(keys, now.pack(batch.take(waits).columns), strict=True))
        self._erased.update(keys_of(sources, batch.source[opened & erased], batch.offset[opened & erased]))
        keys = keys_of(sources, batch.source[closing], batch.opened[closing])
        found = zip(keys, rows.values(keys, self._changes), strict=True)
        known = np.array([value is not None or key in self._erased for key, value in found], np.bool_)
        self._changes.update(dict.fromkeys(keys))
        self._erased.difference_update(keys)
        lost = closing[~known]
        return [_without(part, batch.take(_named(lost, len(batch)))) for part in ranges] if len(lost) else list(ranges)

    def to_commit(self) -> tuple[Changes, Extra]:
        """What to commit; from then on the store is asked again."""
        changes, extra, self._changes, self._extra, self._rows = self._changes, self._extra, {}, {}, None
        return changes, extra

    def dropped(self, marks: Mapping[Source, int]) -> list[Range]:
        """What erased users were shown and no label ever closed, as it counts: dropped, at the marks of its sources."""
        counted = Counter(place_of(key)[0] for key in self._erased)
        return [Range(source, marks[source], marks[source], dropped=count) for source, count in counted.items()]


def _named(rows: np.ndarray[tuple[int], np.dtype[np.int64]], count: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    named = np.zeros(count, np.bool_)
    named[rows] = True
    return named


def _without(part: Range, lost: MicroBatch) -> Range:
    """A range without the closings in `lost` that lie in it."""
    sources = [one.source for one in lost.header.ranges]
    mine = np.array([sources[number] == part.source for number in lost.source.tolist()], np.bool_)
    mine &= (lost.offset >= part.first) & (lost.offset < part.next)
    joined, expired = (int((lost.kind[mine] == kind).sum()) for kind in (Kind.JOINED, Kind.EXPIRED))
    return replace(part, joined=part.joined - joined, expired=part.expired - expired)
