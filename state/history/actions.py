"""How a store of histories numbers actions: by names that only grow, whatever the settings call them in which order. Pure.

An event has one byte for its action: its place in `events.actions` when it was
stored. Where the setting changes since, what is stored keeps its meaning: the
store has its own list of names, and numbers are exchanged as events go in and
come out. A name that a reader does not know is `OTHER`, which windows count
among all actions and for none.
"""

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


def grown(held: Sequence[str], actions: Sequence[str]) -> tuple[str, ...]:
    """The names of a store that gets events with these actions.

    >>> grown(("view", "cart"), ("cart", "wish"))
    ('view', 'cart', 'wish')
    """
    return (*held, *(name for name in actions if name not in held))


def exchange(then: Sequence[str], now: Sequence[str]) -> Numbers | None:
    """By number among `then` the number among `now`, `[256]` uint8; None where each of them keeps its own.

    >>> exchange(("view", "cart"), ("view", "cart", "wish")) is None
    True
    >>> exchange(("view", "cart"), ("cart", "wish"))[:3].tolist()
    [255, 0, 255]
    """
    if tuple(now[: len(then)]) == tuple(then):
        return None
    places = {name: place for place, name in enumerate(now)}
    table = np.full(256, OTHER, np.uint8)
    table[: len(then)] = [places.get(name, OTHER) for name in then]
    return table


def exchanged(events: Events, table: Numbers | None) -> Events:
    """Events with other numbers of their actions; the same where there is no table."""
    if table is None or not len(events):
        return events
    copied: Events = events.copy()
    copied["action"] = table[events["action"]]
    return copied


def renumbered(batch: MicroBatch, then: Sequence[str], now: Sequence[str]) -> MicroBatch:
    """A micro-batch with the numbers of its actions as the names `now` have them."""
    table = exchange(then, now)
    return batch if table is None else replace(batch, action=table[batch.action])


@dataclass(frozen=True)
class Numbering:
    """What a store exchanges.

    Attributes:
        into: By number of the settings the store's number; None where they are the same.
        out_of: The other way round.
    """

    into: Numbers | None = None
    out_of: Numbers | None = None

    def inwards(self, events: Events) -> Events:
        """Events as they are stored."""
        return exchanged(events, self.into)

    def outwards(self, events: Events) -> Events:
        """Events as the settings call them."""
        return exchanged(events, self.out_of)


def numbered(
    stored: bytes | None, actions: Sequence[str], before: Sequence[str] | None = None
) -> tuple[Numbering, dict[str, bytes]]:
    """How a store numbers actions as the settings call them, and what is to be committed with it.

    Args:
        stored: Its extra `ACTIONS`.
        actions: Their names, in the order of the settings.
        before: The names of what was stored by a release that did not keep them; `actions` where that is not given.

    >>> numbered(None, ("cart", "view"), before=("view", "cart"))[1]
    {'actions': b'["view", "cart"]'}
    """
    held = tuple(json.loads(stored)) if stored is not None else tuple(before or actions)
    now = grown(held, actions)
    extra = {} if stored is not None and now == held else {ACTIONS: json.dumps(now).encode()}
    return Numbering(exchange(actions, now), exchange(now, actions)), extra
