"""Collects the state before a position of the training log that a store needs to rewind there. No side effects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from state.features.spec import EVENT, Events
from state.history.appends import Appends, events_of
from state.history.since import Place
from state.microbatch.batch import Kind, MicroBatch, happened
from state.positions import Source

TURNS = 16
"""How often the user must change among a source's latest clicks: as often as decides its time, and once more."""


class Before:
    """Collects what a store needs from before a position of the training log, which is read backward block by block.

    Args:
        marks: The next offset of each source at that position.
        needed: User -> how many of the latest events are needed.
        waited: Impressions that are needed.
        items: Items whose category is needed.
        timed: Sources whose latest clicks are needed, because their clock is rewound.

    Attributes:
        categories: Item -> the category in its latest click, as far as found.
        opened: The impressions found, each as a micro-batch of one row.
        latest: The events of the nearest block, record by record, in order. Before them come the events of `timed`
            sources of which that block has too few.
        timed: The argument.
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
        self._found: dict[int, list[Events]] = {user: [] for user in needed}
        self.waited, self.items = set(waited), set(items)
        self._items = np.array(sorted(self.items), np.uint64)
        self.categories: dict[int, int] = {}
        self.opened: list[MicroBatch] = []
        self.latest: list[MicroBatch] = []
        self.timed = frozenset(timed)
        self._turns = Counter[Source]()

    @property
    def done(self) -> bool:
        """Whether everything needed was found."""
        return self.has_rows and len(self.categories) == len(self.items) and not self._untimed

    @property
    def _untimed(self) -> set[Source]:
        """The timed sources of which too few clicks were found."""
        return {source for source in self.timed if self._turns[source] < TURNS and self._low.get(source, 0) > 0}

    @property
    def has_rows(self) -> bool:
        """Whether all needed events and impressions were found."""
        return not self._lacking and not self.waited

    def take_block(self, block: Iterable[MicroBatch]) -> int | None:
        """Processes a block of records in order, which precedes all earlier blocks; returns its newest event time."""
        times, narrow, latest = [0], list[MicroBatch](), list[MicroBatch]()
        untimed = self._untimed if self.latest else None
        for batch in block:
            self._find_opened(batch)
            events = narrowed(batch, happened(batch.kind))
            times.append(int(events.at_ms.max(initial=0)))
            mine = [untimed is None or part.source in untimed for part in events.header.ranges]
            if any(mine):
                latest.append(events.take(np.array(mine)[events.source]))
            named = np.isin(events.item, self._items) & (events.category != 0)
            narrow.append(events.take(np.isin(events.user, self._users) | named))
        for events in latest:
            self._count_turns(events)
        self.latest = [*latest, *self.latest]
        for events in reversed(narrow):
            for item, category in zip(events.item[::-1].tolist(), events.category[::-1].tolist(), strict=True):
                if item in self.items and category:
                    self.categories.setdefault(item, category)
            self._take(events)
        return max(times) or None

    def _count_turns(self, events: MicroBatch) -> None:
        for number, part in enumerate(events.header.ranges):
            users = events.user[events.source == number]
            self._turns[part.source] += int((users[1:] != users[:-1]).sum()) + (len(users) > 0)

    def _find_opened(self, batch: MicroBatch) -> None:
        for row in np.flatnonzero(batch.kind == Kind.OPENED).tolist() if self.waited else ():
            place = (batch.header.ranges[int(batch.source[row])].source, int(batch.offset[row]))
            if place in self.waited:
                self.waited.remove(place)
                self.opened.append(batch.take(np.arange(len(batch)) == row))

    def _take(self, wanted: MicroBatch) -> None:
        """Takes the needed users' events of a record that precedes all records taken so far."""
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
            theirs = grouped.events[max(start, end - lacking) : end]
            self._found[user].append(theirs)
            self._lacking[user] = lacking - len(theirs)
            if len(theirs) == lacking:
                del self._lacking[user]

    @property
    def short(self) -> int:
        """The number of users for whom fewer events were found than needed."""
        return len(self._lacking)

    def histories(self) -> dict[int, Events]:
        """User -> the events found, in order."""
        return {
            user: np.concatenate([np.empty(0, EVENT), *reversed(found)]).astype(EVENT)
            for user, found in self._found.items()
        }


def narrowed(batch: MicroBatch, keep: NDArray[np.bool_]) -> MicroBatch:
    """The rows of a batch selected by `keep` (`[n]` bool), without windows, sequences and attributes."""
    columns = {name: column if column.ndim == 1 else column[:, :0] for name, column in batch.columns.items()}
    return MicroBatch(batch.header, **{name: column[keep] for name, column in columns.items()})
