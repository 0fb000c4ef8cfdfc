"""Numbers the actions in a store of histories, independent of their order in the settings. No side effects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from state.features.spec import Events
from state.microbatch.batch import MicroBatch

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
