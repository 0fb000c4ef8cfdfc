"""Groups a batch of events by user, in the form in which histories append them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from state.events.parser import EventBatch
from state.features.spec import EVENT, LABELLED, POSITIVE, Events
from state.microbatch.batch import MicroBatch
from state.positions import Range


@dataclass(frozen=True, slots=True, eq=False)
class Appends:
    """Events to append, grouped by user; each user occurs once.

    Attributes:
        users: `[k]` uint64, unique.
        starts: `[k]` int64, the index of the user's first event in `events`.
        lengths: `[k]` int64, the number of the user's events.
        events: `[m]` EVENT, each user's in order of arrival.
    """

    users: NDArray[np.uint64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    events: Events

    @classmethod
    def none(cls) -> Appends:
        """No events."""
        return cls(np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, EVENT))

    @classmethod
    def of(cls, users: NDArray[np.uint64], events: Events) -> Appends:
        """Groups events by user."""
        if not len(users):
            return cls.none()
        order = np.argsort(users, kind="stable")
        ordered = users[order]
        starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        return cls(ordered[starts], starts, np.diff(np.append(starts, len(users))), events[order])

    def of_users(self, keep: NDArray[np.bool_]) -> Appends:
        """The appends of some users; `keep` is `[k]` bool."""
        return Appends(self.users[keep], self.starts[keep], self.lengths[keep], self.events)


def events_of(rows: EventBatch | MicroBatch, ranges: Sequence[Range]) -> Events:
    """Converts rows to the form that histories store, `[n]` EVENT.

    Each row is one event at its own offset; `rows.source` is an index of `ranges`.
    """
    sources = [part.source for part in ranges]
    events = np.empty(len(rows.offset), EVENT)
    for name in ("at_ms", "category", "item", "offset", "action"):
        events[name] = getattr(rows, name)
    events["topic"] = np.array([source.topic for source in sources] or [0], np.uint32)[rows.source]
    events["partition"] = np.array([source.partition for source in sources] or [0], np.uint16)[rows.source]
    # An unknown label is NaN, and NaN >= 0.5 is false.
    events["flags"] = LABELLED * ~np.isnan(rows.label) + POSITIVE * (rows.label >= 0.5)
    return events
