"""A feed of recently clicked items and of new items; the applier writes it with the clicks, and workers read it.

    feed            seq u64, new u64: the number of entries of each kind
    clicked:<slot>  seq u64, log time i64, CLICKED of one commit; the last `SLOTS` commits
    new:<slot>      seq u64, item u64, category u64, log time i64; the last `NEW_SLOTS` items clicked for the first time

All are extras of the histories, and are deleted after a day of log time. They
contain no users. A reader that falls behind misses clicks in its counts, and
nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from deploy.serving.notes import ITEM, item_parts
from state.features.spec import Events
from state.history.store import HistoryStore

FEED = "feed"
EXTRAS = (FEED, "clicked:", "new:")
"""The names of the extras, or their prefixes."""
SLOTS = 256
NEW_SLOTS = 4096
MOST_ITEMS = 4096
"""The maximum number of items in a commit's entry; those with the most clicks are kept."""
NEW_MS = 86_400_000
"""How long an item counts as new, and how long an entry is kept."""
GONE_AT_ONCE = 64
"""The maximum number of entries of each kind that one commit deletes."""

CLICKED = np.dtype([("item", "<u8"), ("category", "<u8"), ("clicks", "<u4")])
_HEAD = struct.Struct(">QQ")
_NOTE = struct.Struct(">Qq")
_NEW = struct.Struct(">Q")
_NEW_ITEM = struct.Struct("<QQq")


class Feed(NamedTuple):
    """The number of entries of each kind: `seq` of clicks, `new` of new items."""

    seq: int = 0
    new: int = 0

    @classmethod
    def of(cls, store: HistoryStore) -> Feed:
        """Reads the counts from the store."""
        head = store.extra(FEED)
        return cls() if head is None else cls(*_HEAD.unpack(head))


class Clicked(NamedTuple):
    """The clicks of one commit: log time, and `[k]` CLICKED."""

    at_ms: int
    items: np.ndarray[tuple[int], np.dtype[np.void]]


class ItemFeed:
    """Writes the feed. Used by the thread that commits to the histories.

    Args:
        store: The histories.
    """

    def __init__(self, store: HistoryStore) -> None:
        self._store, self._feed = store, Feed.of(store)
        self._oldest = Feed(max(0, self._feed.seq - SLOTS), max(0, self._feed.new - NEW_SLOTS))

    def news(self, events: Events, categories: Mapping[str, bytes], clock_ms: int) -> dict[str, bytes | None]:
        """Returns the extras to commit together with clicks.

        Args:
            events: `[m]` EVENT.
            categories: The extras with items' categories that are committed with them; they include all new items.
            clock_ms: Log time.
        """
        clicked = _clicked(events)
        if not len(clicked):
            return {}
        found: dict[str, bytes | None] = self._gone(clock_ms)
        seq, number = self._feed
        found[f"clicked:{seq % SLOTS}"] = _NOTE.pack(seq, clock_ms) + clicked.tobytes()
        for name, value in categories.items():
            if not name.startswith(ITEM) or self._store.extra(name) is not None:
                continue
            item = int(name.removeprefix(ITEM), 16)
            note = _NEW.pack(number) + _NEW_ITEM.pack(item, item_parts(value)[0], clock_ms)
            found[f"new:{number % NEW_SLOTS}"] = note
            number += 1
        self._feed = Feed(seq + 1, number)
        return found | {FEED: _HEAD.pack(*self._feed)}

    def _gone(self, clock_ms: int) -> dict[str, bytes | None]:
        """Returns the entries that are too old, each with None so that it is deleted."""
        found: dict[str, bytes | None] = {}
        (seq, number), horizon_ms = self._oldest, clock_ms - NEW_MS
        while seq < self._feed.seq and len(found) < GONE_AT_ONCE:
            clicked = clicked_at(self._store, seq)
            if clicked is not None and clicked.at_ms > horizon_ms:
                break
            if clicked is not None:
                found[f"clicked:{seq % SLOTS}"] = None
            seq += 1
        while number < self._feed.new and len(found) < 2 * GONE_AT_ONCE:
            new = new_at(self._store, number)
            if new is not None and new[2] > horizon_ms:
                break
            if new is not None:
                found[f"new:{number % NEW_SLOTS}"] = None
            number += 1
        self._oldest = Feed(seq, number)
        return found


def _clicked(events: Events) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """Counts the clicks of each item with a category, `[k]` CLICKED; the category is that of its last click."""
    some = events[(events["item"] != 0) & (events["category"] != 0)][::-1]
    items, first, clicks = np.unique(some["item"], return_index=True, return_counts=True)
    found = np.zeros(len(items), CLICKED)
    found["item"], found["category"], found["clicks"] = items, some["category"][first], clicks
    return found if len(found) <= MOST_ITEMS else found[np.argsort(-clicks, kind="stable")[:MOST_ITEMS]]


def clicked_at(store: HistoryStore, seq: int) -> Clicked | None:
    """Reads one entry of clicks; None if it was overwritten or never committed."""
    note = store.extra(f"clicked:{seq % SLOTS}")
    if note is None or _NOTE.unpack_from(note)[0] != seq:
        return None
    return Clicked(_NOTE.unpack_from(note)[1], np.frombuffer(note, CLICKED, offset=_NOTE.size))


def new_at(store: HistoryStore, number: int) -> tuple[int, int, int] | None:
    """Reads one entry of a new item: item, category, log time; None if it was overwritten or never committed."""
    note = store.extra(f"new:{number % NEW_SLOTS}")
    if note is None or _NEW.unpack_from(note)[0] != number:
        return None
    item, category, at_ms = _NEW_ITEM.unpack_from(note, _NEW.size)
    return item, category, at_ms
