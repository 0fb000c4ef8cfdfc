"""A feed of recently clicked items, without users; the applier commits it with the clicks, and workers read it.

If a reader falls behind, its counts lack some clicks; nothing else is affected.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

from state.features.spec import Events
from state.history.store import HistoryStore

FEED = "feed"
EXTRAS = (FEED, "clicked:")
"""The names of the extras, or their prefixes."""
SLOTS = 256
MOST_ITEMS = 4096
"""The maximum number of items in a commit's entry; those with the most clicks are kept."""
KEPT_MS = 86_400_000
"""How long an entry is kept."""
GONE_AT_ONCE = 64
"""The maximum number of entries that one commit deletes."""

CLICKED = np.dtype([("item", "<u8"), ("category", "<u8"), ("clicks", "<u4")])
_NOTE = struct.Struct(">Qq")


def entries_in(store: HistoryStore) -> int:
    """Reads the number of entries that were ever written."""
    return int.from_bytes(store.extra(FEED) or b"", "big")


class Clicked(NamedTuple):
    """The clicks of one commit: log time, and `[k]` CLICKED."""

    at_ms: int
    items: np.ndarray[tuple[int], np.dtype[np.void]]


class ItemFeed:
    """Writes the feed. Used by the thread that commits to the histories."""

    def __init__(self, store: HistoryStore) -> None:
        self._store, self._next = store, entries_in(store)
        self._oldest = max(0, self._next - SLOTS)

    def news(self, events: Events, clock_ms: int) -> dict[str, bytes | None]:
        """Returns the extras to commit together with clicks, `[m]` EVENT."""
        clicked = _clicked(events)
        if not len(clicked):
            return {}
        extras = self._expired(clock_ms)
        extras[f"clicked:{self._next % SLOTS}"] = _NOTE.pack(self._next, clock_ms) + clicked.tobytes()
        self._next += 1
        return extras | {FEED: self._next.to_bytes(8, "big")}

    def _expired(self, clock_ms: int) -> dict[str, bytes | None]:
        """Returns at most `GONE_AT_ONCE` entries that are too old, each with None so that it is deleted."""
        extras: dict[str, bytes | None] = {}
        for seq in range(self._oldest, min(self._next, self._oldest + GONE_AT_ONCE)):
            clicked = clicked_at(self._store, seq)
            if clicked is not None and clicked.at_ms > clock_ms - KEPT_MS:
                break
            if clicked is not None:
                extras[f"clicked:{seq % SLOTS}"] = None
            self._oldest = seq + 1
        return extras


def _clicked(events: Events) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """Counts the clicks of each item with a category, `[k]` CLICKED; its category is that of its last click."""
    clicks_of_items = events[(events["item"] != 0) & (events["category"] != 0)][::-1]
    items, first, clicks = np.unique(clicks_of_items["item"], return_index=True, return_counts=True)
    clicked = np.zeros(len(items), CLICKED)
    clicked["item"], clicked["category"], clicked["clicks"] = items, clicks_of_items["category"][first], clicks
    return clicked if len(clicked) <= MOST_ITEMS else clicked[np.argsort(-clicks, kind="stable")[:MOST_ITEMS]]


def clicked_at(store: HistoryStore, seq: int) -> Clicked | None:
    """Reads one entry of clicks; None if it was overwritten or never committed."""
    note = store.extra(f"clicked:{seq % SLOTS}")
    if note is None or _NOTE.unpack_from(note)[0] != seq:
        return None
    return Clicked(_NOTE.unpack_from(note)[1], np.frombuffer(note, CLICKED, offset=_NOTE.size))
