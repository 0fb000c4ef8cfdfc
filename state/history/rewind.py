"""Rewinds a store of histories to an earlier position: computes the changes and writes them.

To rewind, a follower of the training log reads the log in two directions:

1. `Since`: forward from the rewind position. It finds the users that gained events since then, the outcomes of the
   positions, and the impressions that stopped waiting.
2. `Before`: backward from that position, for records that the store lacks. A history keeps the last N events, so a
   user who gained events has lost as many of the oldest ones. Impressions whose wait has ended are missing too.
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

from state.disk.lmdb_store import put_all
from state.features.mask import ClickColumns, Mask
from state.features.spec import EVENT, Events
from state.history import chunks
from state.history.appends import Appends, events_of
from state.history.chunks import Counts, counts_key, prefix_of, returned_counts
from state.microbatch.batch import Kind, MicroBatch, counts, happened, trim
from state.positions import Range, Source, split_range

Place = tuple[Source, int]


class Since:
    """Collects what a store gained since a position of the training log; takes the records after it, in order.

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
        """The items that only masked clicks have named since then."""
        masked, named = self._items
        return masked - named

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
            out = self._mask.rows(ClickColumns.of(batch), ranges)
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

        A stream that crashed may have written positions again in other ranges, and it counted the last of them. So the
        ranges are followed backward from the end.
        """
        low = {source: stored[source]["next"] for source in self.sources}
        removed: dict[Source, Counter[str]] = {source: Counter() for source in low}
        for part in reversed(self._parts):
            if low.get(part.source) == part.next:
                removed[part.source].update(part.outcomes)
                low[part.source] = part.first
        at_position: dict[Source, Counts | None] = {}
        for source, at in low.items():
            mark = self._marks.get(source)
            if mark is None:
                at_position[source] = None
                continue
            # Positions without a record were counted as absent.
            removed[source]["absent"] += at - mark
            at_position[source] = returned_counts(stored[source], removed[source], mark)
        return at_position


TURNS = 16
"""Number of changes of user needed among a source's latest clicks: those that decide its time, plus one."""


class Before:
    """Collects what a store needs from before a position of the training log, which is read backward block by block.

    Args:
        marks: The next offset of each source at that position.
        needed: User -> how many of the latest events are needed.
        items: Items whose category is needed.
        timed: Sources whose latest clicks are needed, because their clock is rewound.

    Attributes:
        categories: Item -> the category in its latest click, if found.
        opened: The impressions found, each as a micro-batch of one row.
        latest: The events of the nearest block, record by record, in order, after the events of `timed` sources of
            which that block has too few.
    """

    def __init__(
        self,
        marks: Mapping[Source, int],
        needed: Mapping[int, int],
        waited: Iterable[Place] = (),
        items: Iterable[int] = (),
        timed: Iterable[Source] = (),
    ) -> None:
        self._low: dict[Source, int] = dict(marks)
        self._lacking = dict(needed)
        self._users = np.array(sorted(needed), np.uint64)
        self._events: dict[int, list[Events]] = {user: [] for user in needed}
        self.waited, self.items = set(waited), set(items)
        self._items = np.array(sorted(self.items), np.uint64)
        self.categories: dict[int, int] = {}
        self.opened: list[MicroBatch] = []
        self.latest: list[MicroBatch] = []
        self.timed = frozenset(timed)
        self._turns = Counter[Source]()
        self._first_users: dict[Source, int] = {}

    @property
    def done(self) -> bool:
        """Whether everything needed was found."""
        return self.has_rows and len(self.categories) == len(self.items) and not self.untimed

    @property
    def untimed(self) -> set[Source]:
        """The timed sources of which too few turns were found, so that earlier clicks also decide their clock."""
        return {source for source in self.timed if self._turns[source] < TURNS and self._low.get(source, 0) > 0}

    @property
    def has_rows(self) -> bool:
        """Whether all needed events and impressions were found."""
        return not self._lacking and not self.waited

    def take_block(self, block: Iterable[MicroBatch]) -> int | None:
        """Processes a block of records in order, which precedes all earlier blocks; returns its newest event time."""
        times, narrow, latest = [0], list[MicroBatch](), list[MicroBatch]()
        untimed = self.untimed if self.latest else None
        for batch in block:
            self._find_opened(batch)
            # Without windows, sequences and attributes.
            columns = {name: column if column.ndim == 1 else column[:, :0] for name, column in batch.columns.items()}
            events = MicroBatch(batch.header, **columns).take(happened(batch.kind))
            times.append(int(events.at_ms.max(initial=0)))
            has_no_time = [untimed is None or part.source in untimed for part in events.header.ranges]
            if any(has_no_time):
                latest.append(events.take(np.array(has_no_time)[events.source]))
            named = np.isin(events.item, self._items) & (events.category != 0)
            narrow.append(events.take(np.isin(events.user, self._users) | named))
        self._count_turns(latest)
        self.latest = [*latest, *self.latest]
        for events in reversed(narrow):
            for item, category in zip(events.item[::-1].tolist(), events.category[::-1].tolist(), strict=True):
                if item in self.items and category:
                    self.categories.setdefault(item, category)
            self._take(events)
        return max(times) or None

    def _count_turns(self, latest: Iterable[MicroBatch]) -> None:
        """Counts changes of user in records that precede those counted so far; a burst of one user is one turn."""
        first, last = dict[Source, int](), dict[Source, int]()
        for events in latest:
            for number, part in enumerate(events.header.ranges):
                users = events.user[events.source == number]
                if not len(users):
                    continue
                is_new = last.get(part.source) != int(users[0])
                self._turns[part.source] += int((users[1:] != users[:-1]).sum()) + is_new
                first.setdefault(part.source, int(users[0]))
                last[part.source] = int(users[-1])
        for source, user in last.items():
            self._turns[source] -= self._first_users.get(source) == user
        self._first_users |= first

    def _find_opened(self, batch: MicroBatch) -> None:
        for row in np.flatnonzero(batch.kind == Kind.OPENED).tolist() if self.waited else ():
            position = (batch.header.ranges[int(batch.source[row])].source, int(batch.offset[row]))
            if position in self.waited:
                self.waited.remove(position)
                self.opened.append(batch.take(np.arange(len(batch)) == row))

    def _take(self, wanted: MicroBatch) -> None:
        ranges = wanted.header.ranges
        lows = np.array([self._low.get(part.source, 0) for part in ranges] or [0], np.int64)
        wanted = wanted.take(wanted.offset < lows[wanted.source])
        for part in ranges:
            self._low[part.source] = min(part.first, self._low.get(part.source, 0))
        grouped = Appends.of(wanted.user, events_of(wanted, ranges))
        ends = (grouped.starts + grouped.lengths).tolist()
        for user, start, end in zip(grouped.users.tolist(), grouped.starts.tolist(), ends, strict=True):
            if (lacking := self._lacking.get(user)) is None:
                continue
            events = grouped.events[max(start, end - lacking) : end]
            self._events[user].append(events)
            self._lacking[user] = lacking - len(events)
            if len(events) == lacking:
                del self._lacking[user]

    @property
    def short(self) -> int:
        """The number of users for whom fewer events were found than needed."""
        return len(self._lacking)

    def histories(self) -> dict[int, Events]:
        """User -> the events found, in order."""
        return {
            user: np.concatenate([np.empty(0, EVENT), *reversed(parts)]).astype(EVENT)
            for user, parts in self._events.items()
        }


@dataclass(frozen=True, slots=True)
class Rewind:
    """The changes of one rewind, written in one transaction.

    Attributes:
        marks: The next offset of each source at the rewind position. Later events are removed, and all events of
            sources without an entry.
        gained: User -> how many events the user gained since then.
        rebuilt: The histories at that position of users whose stored history is too short.
        counts: The counts of each source that moves; None for a source that was unknown then.
        extra: Extras to replace; None removes one.
        waiting: Rows that wait again, by key; None removes one.
    """

    marks: Mapping[Source, int]
    gained: Mapping[int, int] = field(default_factory=dict)
    rebuilt: Mapping[int, Events] = field(default_factory=dict)
    counts: Mapping[Source, Counts | None] = field(default_factory=dict)
    extra: Mapping[str, bytes | None] = field(default_factory=dict)
    waiting: Mapping[bytes, bytes | None] = field(default_factory=dict)


def kept(history: Events, user: int, marks: Mapping[Source, int], sources: Iterable[Source]) -> NDArray[np.bool_]:
    """Which events of a history are before the marks, `[m]` bool."""
    stays = np.ones(len(history), np.bool_)
    for source in sources:
        if not source.has(user):
            continue
        is_of_source = (history["topic"] == source.topic) & (history["partition"] == source.partition)
        stays &= ~(is_of_source & (history["offset"] >= marks.get(source, 0)))
    return stays


def lacking(
    transaction: lmdb.Transaction, databases: Mapping[str, Any], since: Since, marks: Mapping[Source, int], history: int
) -> dict[int, int]:
    """User -> number of latest events before `marks` that are needed, for users whose stored history has fewer."""
    cursor = transaction.cursor(db=databases["chunks"])
    sources, needed = since.sources, dict[int, int]()
    for user, gained in since.gained.items():
        joined, total = chunks.read(cursor, prefix_of(user), history)
        # A user who gained more events than the stored total was evicted meanwhile, so the earlier events are unknown.
        must = history if gained > total else min(history, total - gained)
        if must > int(kept(chunks.events_in(joined), user, marks, sources).sum()):
            needed[user] = must
    return needed


def write_back(transaction: lmdb.Transaction, databases: Mapping[str, Any], back: Rewind, history: int) -> None:
    """Writes a rewind in a transaction of a store with these databases, which keeps `history` events per user."""
    meta, sources = databases["meta"], list(back.counts)
    cursor = transaction.cursor(db=databases["chunks"])
    users = int(transaction.get(b"users", b"0", db=meta))
    # 1. Histories.
    for user, gained in back.gained.items():
        joined, total = chunks.read(cursor, prefix_of(user), history)
        stored = chunks.events_in(joined)
        events = stored[kept(stored, user, back.marks, sources)]
        rebuilt = back.rebuilt.get(user)
        if rebuilt is not None and len(rebuilt) > len(events):
            events = rebuilt
        users += (len(events) > 0) - (len(stored) > 0)
        chunks.replace_all(cursor, prefix_of(user), events, max(total - gained, len(events)))
    transaction.put(b"users", str(users).encode(), db=meta)
    # 2. Positions.
    for source, counted in back.counts.items():
        if counted is None:
            transaction.delete(counts_key(source), db=meta)
        else:
            transaction.put(counts_key(source), json.dumps(counted).encode(), db=meta)
    # 3. Extras, and waiting rows.
    put_all(transaction, meta, {b"x:" + name.encode(): value for name, value in back.extra.items()})
    put_all(transaction, databases["waiting"], back.waiting)
