"""Estimates when each position of the clicks was read, in log time, from a few marks per source. No side effects.

A mark records that at some log time a source had been read up to an offset. So
an event before that offset was read by then, whatever its own time. An event
after the last mark was read just now.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from state.features.spec import Events
from state.positions import Source

I64 = NDArray[np.int64]
Marks = dict[Source, list[tuple[int, int]]]

_OFFSETS = 1 << 45  # offsets per source; with 16 bits for sources they fit into 63 bits


class ReadTimes:
    """Marks per source, at most some 65 each if `mark` creates and drops them.

    Args:
        marks: Source -> (log time in ms, next offset), both ascending.
    """

    def __init__(self, marks: Mapping[Source, Sequence[tuple[int, int]]] = {}) -> None:
        self._marks: Marks = {source: list(theirs) for source, theirs in marks.items()}
        self._arrange()

    @property
    def newest_ms(self) -> int | None:
        """Log time of the newest mark; None if there is none."""
        return max((theirs[-1][0] for theirs in self._marks.values() if theirs), default=None)

    def mark(self, positions: Mapping[Source, int], clock_ms: int, keep_ms: int) -> bool:
        """Adds a mark at `clock_ms` with each source's position; returns whether the marks changed.

        Of the marks older than `keep_ms` only the newest stays: it bounds everything read before it. Marks ahead of a
        clock or a position that was set back are dropped.

        Args:
            positions: The next offset of each source.
            clock_ms: Log time.
            keep_ms: How far back read times matter.
        """
        before = dict(self._marks)
        for source, position in positions.items():
            theirs = [one for one in self._marks.get(source, ()) if one[0] < clock_ms and one[1] <= position]
            if not theirs or theirs[-1][1] < position:
                theirs.append((clock_ms, position))
            old = sum(at_ms <= clock_ms - keep_ms for at_ms, _ in theirs)
            self._marks[source] = theirs[max(0, old - 1) :]
        self._arrange()
        return self._marks != before

    def at_latest(self, events: Events, clock_ms: int) -> I64:
        """Upper bound of each event's read time, `[m]` int64 log time; `clock_ms` for events after the last mark.

        >>> from state.features.spec import EVENT
        >>> source, events = Source("ab" * 16, 0), np.zeros(3, EVENT)
        >>> events["topic"], events["offset"] = source.topic, [0, 9, 10]
        >>> ReadTimes({source: [(1000, 5), (2000, 10)]}).at_latest(events, 2500).tolist()
        [1000, 2000, 2500]
        """
        return self._bounds(events, clock_ms)[1]

    def about(self, events: Events, clock_ms: int) -> I64:
        """Estimated read time of each event, `[m]` int64 log time, interpolated between two marks.

        >>> from state.features.spec import EVENT
        >>> source, events = Source("ab" * 16, 0), np.zeros(3, EVENT)
        >>> events["topic"], events["offset"] = source.topic, [4, 5, 9]
        >>> ReadTimes({source: [(1000, 5), (2000, 10)]}).about(events, 2500).tolist()
        [1000, 1000, 1800]
        """
        after, latest, before = self._bounds(events, clock_ms)
        earliest, first = np.where(before < 0, latest, self._times[before]), self._nexts[before]
        steps = np.maximum(self._nexts[after] - first, 1)
        passed = np.clip(events["offset"] - first, 0, steps)
        # As a fraction of a step, so that the product of two large integers does not overflow.
        return np.where(after < 0, latest, earliest + ((latest - earliest) * (passed / steps)).astype(np.int64))

    def _bounds(self, events: Events, clock_ms: int) -> tuple[I64, I64, I64]:
        """Per event the index of the mark after it, that mark's time, and the index of the mark before it; or -1."""
        keys = _keys(events["topic"], events["partition"])
        number = np.minimum(np.searchsorted(self._sources, keys), max(0, len(self._sources) - 1))
        known = self._sources[number] == keys if len(self._sources) else np.zeros(len(events), np.bool_)
        place = np.searchsorted(self._places, number * _OFFSETS + events["offset"], side="right")
        # The last owner is -1, which index -1 also reads before the first one.
        inside = known & (self._owners[place] == number)
        after = np.where(inside, place, -1)
        before = np.where(inside & (self._owners[place - 1] == number), place - 1, -1)
        return after, np.where(inside, self._times[after], clock_ms), before

    def _arrange(self) -> None:
        """Puts the marks into arrays, ordered by source and offset; the last entry of each array is a sentinel."""
        # Buckets of a partition share a key: use what holds for all of them.
        merged: dict[int, list[tuple[int, int]]] = {}
        for source, theirs in self._marks.items():
            key = (source.topic << 16) | source.partition
            merged[key] = theirs if key not in merged else _lowest(merged[key], theirs)
        self._sources = np.array(sorted(merged), np.int64)
        rows = [(number, *one) for number, key in enumerate(sorted(merged)) for one in merged[key]]
        columns = np.array([*rows, (-1, 0, 0)], np.int64).T
        self._owners, self._times, self._nexts = columns
        self._places = (self._owners * _OFFSETS + self._nexts)[:-1]

    def to_json(self) -> bytes:
        """Encodes the marks as a store keeps them."""
        return json.dumps({str(source): theirs for source, theirs in self._marks.items()}).encode()

    @classmethod
    def from_json(cls, value: bytes | None) -> ReadTimes:
        """Decodes the output of `to_json`; None means no marks.

        >>> ReadTimes.from_json(ReadTimes({Source("ab" * 16, 0): [(10, 5)]}).to_json()).newest_ms
        10
        """
        stored = json.loads(value or b"{}")
        return cls({Source.parse(name): [(int(a), int(b)) for a, b in theirs] for name, theirs in stored.items()})


def _keys(topic: NDArray[np.uint32], partition: NDArray[np.uint16]) -> I64:
    return (topic.astype(np.int64) << 16) | partition


def _lowest(left: Sequence[tuple[int, int]], right: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The lower offset of two buckets, at the times at which both have a mark."""
    other = dict(right)
    return [(at_ms, min(after, other[at_ms])) for at_ms, after in left if at_ms in other]
