"""What was before a place of the training log, for a store of histories that goes back there and lacks it. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from state.features.spec import EVENT, Events
from state.history.appends import Appends, events_of
from state.history.since import Place
from state.microbatch.batch import MicroBatch
from state.microbatch.row_kinds import Kind, happened
from state.positions import Source

TURNS = 16
"""How often the user of a source's latest clicks must have changed: as many users say what time it is, and one more."""


class Before:
    """What was before a place of the training log, which is read block by block, the one nearest to the place first.

    Args:
        marks: The next offset of each source at that place.
        needed: By user how many of the latest events are wanted.
        waited: Impressions that are wanted.
        items: Items whose category is wanted.
        timed: Sources whose latest clicks are wanted, because their clock goes back.

    Attributes:
        categories: By item the category that it was last seen in, as far as that was found.
        opened: The impressions found, each in a record's rows of its own.
        latest: The events of the nearest block, record by record, in order; before them those of `timed` sources of which
            that block has too few.
        timed: As given.
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
        """Whether nothing is wanted any more."""
        return self.has_rows and len(self.categories) == len(self.items) and not self._untimed

    @property
    def _untimed(self) -> set[Source]:
        """The timed sources of which too few clicks were found."""
        return {source for source in self.timed if self._turns[source] < TURNS and self._low.get(source, 0) > 0}

    @property
    def has_rows(self) -> bool:
        """Whether all events and impressions that are wanted were found."""
        return not self._lacking and not self.waited

    def take_block(self, block: Iterable[MicroBatch]) -> int | None:
        """Takes a block of records in order, which lie before those taken so far; returns its newest event time."""
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
        """Takes the wanted users' events of the record before the last one taken."""
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
