"""What histories give back when their source is read again from an earlier position, and how it is written. Pure but for the last part.

A reader of the training log that goes back, the stream as well as each serving
host, looks at the log in two directions:

1. `Since`: forward from the place gone back to. Who gained events since, what
   became of the positions, which impressions stopped waiting.
2. `Before`: backward from that place, for what the store lacks. A history keeps
   the last N events, so of a user who gained some since then the oldest of
   that time are gone; and so are impressions whose wait has ended.

What both find is a `Rewind`, which is one transaction of the store.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lmdb
import numpy as np
from numpy.typing import NDArray

from state.features.spec import EVENT, Events
from state.history import chunks
from state.history.appends import events_of
from state.history.chunks import prefix_of
from state.history.counts import Counts, key_of, returned
from state.microbatch.batch import MicroBatch
from state.microbatch.cutting import trim
from state.microbatch.row_kinds import Kind, counts, happened
from state.positions import Range, Source, split_range

Place = tuple[Source, int]


@dataclass(frozen=True, slots=True)
class Rewind:
    """What a store gives back, at once.

    Attributes:
        marks: The next offset of each source gone back to; events from there on go, and sources without one.
        gained: By user the events gained since then.
        rebuilt: Histories at that place of users whose own are not enough any more.
        counts: Of each source that moves; None for one that is not known any more.
        extra: Values of the owner's, replaced.
        waiting: Rows that wait again, by key; None for one that does not.
    """

    marks: Mapping[Source, int]
    gained: Mapping[int, int] = field(default_factory=dict)
    rebuilt: Mapping[int, Events] = field(default_factory=dict)
    counts: Mapping[Source, Counts | None] = field(default_factory=dict)
    extra: Mapping[str, bytes] = field(default_factory=dict)
    waiting: Mapping[bytes, bytes | None] = field(default_factory=dict)


def kept(history: Events, marks: Mapping[Source, int], sources: Iterable[Source]) -> NDArray[np.bool_]:
    """Which events of a history (`[m]` bool) lie before the marks.

    Args:
        history: `[m]` EVENT.
        marks: The next offset of each source; all events of one without are behind it.
        sources: Those that go back; events of others stay.
    """
    stays = np.ones(len(history), np.bool_)
    for source in sources:
        theirs = (history["topic"] == source.topic) & (history["partition"] == source.partition)
        stays &= ~(theirs & (history["offset"] >= marks.get(source, 0)))
    return stays


class Since:
    """What a store gained since a place of the training log; takes the records from there on, in order.

    Args:
        marks: The next offset of each source at that place.
        positions: Those that the store has: what lies beyond is not in it.

    Attributes:
        gained: By user the events gained.
        ended: Impressions from before the place whose wait has ended since.
    """

    def __init__(self, marks: Mapping[Source, int], positions: Mapping[Source, int]) -> None:
        self._marks, self._positions = marks, positions
        self._at: dict[Source, int] = dict(marks)
        self._parts: list[Range] = []
        self.gained: Counter[int] = Counter()
        self.ended: set[Place] = set()

    @property
    def sources(self) -> list[Source]:
        """The sources that the store has read further than the place."""
        return [source for source, after in self._positions.items() if after > self._marks.get(source, 0)]

    def take(self, batch: MicroBatch) -> None:
        """Takes a record; rows of before the place, rows taken already and rows that the store lacks do not count."""
        ranges = batch.header.ranges
        new, self._at = trim(batch, self._at)
        ends = np.array([self._positions.get(part.source, 0) for part in ranges] or [0], np.int64)
        new &= batch.offset < ends[batch.source]
        happens = happened(batch.kind)
        users, numbers = np.unique(batch.user[new & happens], return_counts=True)
        self.gained.update(dict(zip(users.tolist(), numbers.tolist(), strict=True)))
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
        """What the store counts at the place; None for a source that it had not read then.

        A stream that crashed wrote positions again, perhaps in other ranges,
        and counted the last ones: they are followed back from the end.
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
            # What no record covered was counted as absent.
            taken[source]["absent"] += at - mark
            found[source] = returned(stored[source], taken[source], mark)
        return found


class Before:
    """What was before a place of the training log, which is read block by block, the one nearest to the place first.

    Args:
        marks: The next offset of each source at that place.
        needed: By user how many of the latest events are wanted.
        waited: Impressions that are wanted.

    Attributes:
        opened: The impressions found, each in a record's rows of its own.
        latest: The events of the nearest block, record by record, in order.
    """

    def __init__(self, marks: Mapping[Source, int], needed: Mapping[int, int], waited: Iterable[Place] = ()) -> None:
        self._low: dict[Source, int] = dict(marks)
        self._lacking = dict(needed)
        self._users = np.array(sorted(needed), np.uint64)
        self._found: dict[int, list[Events]] = {user: [] for user in needed}
        self.waited = set(waited)
        self.opened: list[MicroBatch] = []
        self.latest: list[MicroBatch] = []

    @property
    def done(self) -> bool:
        """Whether nothing is wanted any more."""
        return not self._lacking and not self.waited

    def take_block(self, block: Iterable[MicroBatch]) -> int | None:
        """Takes a block of records in order, which lie before those taken so far; returns its newest event time."""
        times, narrow, first = [0], list[MicroBatch](), not self.latest
        for batch in block:
            self._find_opened(batch)
            events = narrowed(batch, happened(batch.kind))
            times.append(int(events.at_ms.max(initial=0)))
            if first:
                self.latest.append(events)
            narrow.append(events.take(np.isin(events.user, self._users)))
        for events in reversed(narrow):
            self._take(events)
        return max(times) or None

    def _find_opened(self, batch: MicroBatch) -> None:
        for row in np.flatnonzero(batch.kind == Kind.OPENED).tolist() if self.waited else ():
            place = (batch.header.ranges[int(batch.source[row])].source, int(batch.offset[row]))
            if place in self.waited:
                self.waited.remove(place)
                self.opened.append(batch.take(np.arange(len(batch)) == row))

    def _take(self, wanted: MicroBatch) -> None:
        """Takes the wanted users' events of the record before the last one taken."""
        ranges = wanted.header.ranges
        lows = np.array([self._low.get(part.source, 0) for part in ranges] or [0], np.int64)
        wanted = wanted.take(wanted.offset < lows[wanted.source])
        for part in ranges:
            self._low[part.source] = min(part.first, self._low.get(part.source, 0))
        events = events_of(wanted, ranges)
        for user in np.unique(wanted.user).tolist():
            if (lacking := self._lacking.get(user)) is None:
                continue
            theirs = events[wanted.user == user][-lacking:]
            self._found[user].append(theirs)
            self._lacking[user] = lacking - len(theirs)
            if len(theirs) == lacking:
                del self._lacking[user]

    @property
    def short(self) -> int:
        """Of how many users not all that is wanted was found."""
        return len(self._lacking)

    def histories(self) -> dict[int, Events]:
        """By user the events found, in order."""
        return {
            user: np.concatenate([np.empty(0, EVENT), *reversed(found)]).astype(EVENT)
            for user, found in self._found.items()
        }


def narrowed(batch: MicroBatch, keep: NDArray[np.bool_]) -> MicroBatch:
    """The rows of a batch that `keep` (`[n]` bool) names, without windows, sequences and attributes."""
    columns = {name: column if column.ndim == 1 else column[:, :0] for name, column in batch.columns.items()}
    return MicroBatch(batch.header, **{name: column[keep] for name, column in columns.items()})


def lacking(
    transaction: lmdb.Transaction, databases: Mapping[str, Any], since: Since, marks: Mapping[Source, int], history: int
) -> dict[int, int]:
    """By user how many of the latest events before `marks` a history must have, of users whose stored one has fewer."""
    cursor = transaction.cursor(db=databases["chunks"])
    sources, found = since.sources, dict[int, int]()
    for user, gained in since.gained.items():
        joined, total = chunks.read(cursor, prefix_of(user), history)
        must = min(history, total - gained)
        if must > int(kept(chunks.events_in(joined), marks, sources).sum()):
            found[user] = must
    return found


def write_back(transaction: lmdb.Transaction, databases: Mapping[str, Any], back: Rewind, history: int) -> None:
    """Writes a rewind in a transaction of a store with these databases, which keeps `history` events of a user."""
    meta, sources = databases["meta"], list(back.counts)
    cursor = transaction.cursor(db=databases["chunks"])
    users = int(transaction.get(b"users", b"0", db=meta))
    # 1. Histories.
    for user, gained in back.gained.items():
        joined, total = chunks.read(cursor, prefix_of(user), history)
        stored = chunks.events_in(joined)
        events = stored[kept(stored, back.marks, sources)]
        rebuilt = back.rebuilt.get(user)
        if rebuilt is not None and len(rebuilt) > len(events):
            events = rebuilt
        users += (len(events) > 0) - (len(stored) > 0)
        chunks.replace_all(cursor, prefix_of(user), events, max(total - gained, len(events)))
    transaction.put(b"users", str(users).encode(), db=meta)
    # 2. Positions.
    for source, counted in back.counts.items():
        if counted is None:
            transaction.delete(key_of(source), db=meta)
        else:
            transaction.put(key_of(source), json.dumps(counted).encode(), db=meta)
    # 3. The owner's values, and rows that wait.
    for name, value in back.extra.items():
        transaction.put(b"x:" + name.encode(), value, db=meta)
    for key, row in back.waiting.items():
        if row is None:
            transaction.delete(key, db=databases["waiting"])
        else:
            transaction.put(key, row, db=databases["waiting"])
