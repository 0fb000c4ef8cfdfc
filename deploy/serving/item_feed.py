"""A feed of recently clicked items and of new items; the applier writes it with the clicks, and workers read it.

    feed            seq u64, new u64: the number of entries of each kind
    clicked:<slot>  seq u64, log time i64, CLICKED of one commit; the last `SLOTS` commits
    new:<slot>      seq u64, item u64, category u64, log time i64; the last `NEW_SLOTS` items clicked for the first time

All are extras of the histories, and are deleted after a day of log time. They contain no users. A reader that falls behind
misses clicks in its counts, and nothing else.
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


class NewItem(NamedTuple):
    """A new item, its category, and the log time of its first click in milliseconds."""

    item: int
    category: int
    at_ms: int


class ItemFeed:
    """Writes the feed. Used by the thread that commits to the histories."""

    def __init__(self, store: HistoryStore) -> None:
        self._store, self._feed = store, Feed.of(store)
        self._oldest = Feed(max(0, self._feed.seq - SLOTS), max(0, self._feed.new - NEW_SLOTS))

    def news(self, events: Events, categories: Mapping[str, bytes], clock_ms: int) -> dict[str, bytes | None]:
        """Returns the extras to commit together with clicks, `[m]` EVENT.

        `categories` has the extras with items' categories of that commit, which include all new items.
        """
        clicked = _clicked(events)
        if not len(clicked):
            return {}
        extras = self._expired(clock_ms)
        seq, number = self._feed
        extras[f"clicked:{seq % SLOTS}"] = _NOTE.pack(seq, clock_ms) + clicked.tobytes()
        for name, value in categories.items():
            if not name.startswith(ITEM) or self._store.extra(name) is not None:
                continue
            item = int(name.removeprefix(ITEM), 16)
            note = _NEW.pack(number) + _NEW_ITEM.pack(item, item_parts(value)[0], clock_ms)
            extras[f"new:{number % NEW_SLOTS}"] = note
            number += 1
        self._feed = Feed(seq + 1, number)
        return extras | {FEED: _HEAD.pack(*self._feed)}

    def _expired(self, clock_ms: int) -> dict[str, bytes | None]:
        """Returns at most `GONE_AT_ONCE` entries of each kind that are too old, each with None so that it is deleted."""
        extras: dict[str, bytes | None] = {}
        oldest, horizon_ms = self._oldest, clock_ms - NEW_MS
        for seq in range(oldest.seq, min(self._feed.seq, oldest.seq + GONE_AT_ONCE)):
            clicked = clicked_at(self._store, seq)
            if clicked is not None and clicked.at_ms > horizon_ms:
                break
            if clicked is not None:
                extras[f"clicked:{seq % SLOTS}"] = None
            self._oldest = self._oldest._replace(seq=seq + 1)
        for number in range(oldest.new, min(self._feed.new, oldest.new + GONE_AT_ONCE)):
            new = new_at(self._store, number)
            if new is not None and new.at_ms > horizon_ms:
                break
            if new is not None:
                extras[f"new:{number % NEW_SLOTS}"] = None
            self._oldest = self._oldest._replace(new=number + 1)
        return extras


def _clicked(events: Events) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """Counts the clicks of each item with a category, `[k]` CLICKED; its category is that of its last click."""
    some = events[(events["item"] != 0) & (events["category"] != 0)][::-1]
    items, first, clicks = np.unique(some["item"], return_index=True, return_counts=True)
    clicked = np.zeros(len(items), CLICKED)
    clicked["item"], clicked["category"], clicked["clicks"] = items, some["category"][first], clicks
    return clicked if len(clicked) <= MOST_ITEMS else clicked[np.argsort(-clicks, kind="stable")[:MOST_ITEMS]]


def clicked_at(store: HistoryStore, seq: int) -> Clicked | None:
    """Reads one entry of clicks; None if it was overwritten or never committed."""
    note = store.extra(f"clicked:{seq % SLOTS}")
    if note is None or _NOTE.unpack_from(note)[0] != seq:
        return None
    return Clicked(_NOTE.unpack_from(note)[1], np.frombuffer(note, CLICKED, offset=_NOTE.size))


def new_at(store: HistoryStore, number: int) -> NewItem | None:
    """Reads one entry of a new item; None if it was overwritten or never committed."""
    note = store.extra(f"new:{number % NEW_SLOTS}")
    if note is None or _NEW.unpack_from(note)[0] != number:
        return None
    return NewItem(*_NEW_ITEM.unpack_from(note, _NEW.size))
