"""Events in the form in which histories store them: grouped by user, with the numbers that the store gives to actions.

The numbers do not depend on the order of the actions in the settings. No side effects.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

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


ACTIONS = "actions"  # name of the store's extra with its names
OTHER = 255

Numbers = NDArray[np.uint8]


def exchange(then: Sequence[str], now: Sequence[str]) -> Numbers | None:
    """The table from numbers in `then` to numbers in `now`, `[256]` uint8; None if every number stays the same."""
    if tuple(now[: len(then)]) == tuple(then):
        return None
    number_of = {name: number for number, name in enumerate(now)}
    table = np.full(256, OTHER, np.uint8)
    table[: len(then)] = [number_of.get(name, OTHER) for name in then]
    return table


def exchanged(events: Events, table: Numbers | None) -> Events:
    """Events with their actions renumbered; unchanged if there is no table."""
    if table is None or not len(events):
        return events
    copied: Events = events.copy()
    copied["action"] = table[events["action"]]
    return copied


def renumbered(batch: MicroBatch, then: Sequence[str], now: Sequence[str]) -> MicroBatch:
    """A micro-batch with its actions renumbered from the names `then` to the names `now`."""
    table = exchange(then, now)
    return batch if table is None else replace(batch, action=table[batch.action])


@dataclass(frozen=True)
class Numbering:
    """Converts between a store's action numbers and those of the settings; a table is None if the numbers are equal."""

    into: Numbers | None = None
    out_of: Numbers | None = None

    def inwards(self, events: Events) -> Events:
        """Events with the store's numbers."""
        return exchanged(events, self.into)

    def outwards(self, events: Events) -> Events:
        """Events with the settings' numbers."""
        return exchanged(events, self.out_of)


def numbered(
    stored: bytes | None, actions: Sequence[str], before: Sequence[str] | None = None
) -> tuple[Numbering, dict[str, bytes]]:
    """The numbering of a store under the given settings, and the extra to commit with it.

    `stored` is the store's extra `ACTIONS`; `before` has the names in a store of a release that did not keep them.
    """
    names = tuple(json.loads(stored)) if stored is not None else tuple(before or actions)
    now = (*names, *(name for name in actions if name not in names))
    extra = {} if stored is not None and now == names else {ACTIONS: json.dumps(now).encode()}
    return Numbering(exchange(actions, now), exchange(now, actions)), extra
