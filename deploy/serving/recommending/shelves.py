"""An in-memory candidate index of one worker: items by category, with click weights and first-click times.

The index only proposes items; the answer reads their rows at its own version. The
index is built from users' newest clicks, and then follows the feed that the applier
writes (`deploy/serving/item_feed.py`). The weight of a click halves per day of log
time. Only `turn` reads from the stores.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from deploy.serving.item_feed import NEW_SLOTS, SLOTS, Feed, clicked_at, new_at
from state.history.store import HistoryStore

HALF_MS = 86_400_000
MOST_ON_A_SHELF = 512
MOST_ITEMS = 300_000
"""The maximum number of items in all categories; about 40 MB."""
MOST_USERS = 100_000
"""The maximum number of users whose newest click is counted when the index is built."""
USERS_AT_ONCE = 50
NEW_AT_ONCE = 200
NOTES_AT_ONCE = 8


class NewItem(NamedTuple):
    """A new item, its category, and the log time of its first click in milliseconds."""

    item: int
    category: int
    at_ms: int


@dataclass
class _Shelf:
    """The items of one category: weights, and the cached order by weight (None if outdated)."""

    weights: dict[int, float] = field(default_factory=dict)
    ordered: list[int] | None = None

    def add(self, item: int, weight: float) -> int:
        """Adds a click's weight; returns the change in the number of items."""
        before = len(self.weights)
        self.weights[item] = self.weights.get(item, 0.0) + weight
        self.ordered = None
        if len(self.weights) >= 2 * MOST_ON_A_SHELF:
            self.keep(MOST_ON_A_SHELF)
        return len(self.weights) - before

    def keep(self, most: int) -> int:
        """Drops all items except the best; returns the number of dropped items."""
        before = len(self.weights)
        self.weights, self.ordered = {one: self.weights[one] for one in self.best(most)}, None
        return before - len(self.weights)

    def best(self, most: int) -> list[int]:
        if self.ordered is None:
            self.ordered = sorted(self.weights, key=lambda item: (-self.weights[item], item))[:MOST_ON_A_SHELF]
        return self.ordered[:most]


class Shelves:
    """The candidate index: items by category. Used by one thread.

    Args:
        histories: The host's histories, opened read-only.
    """

    def __init__(self, histories: HistoryStore) -> None:
        self._histories = histories
        self._shelves: dict[int, _Shelf] = {}
        self._items = 0
        self._new: deque[NewItem] = deque(maxlen=NEW_SLOTS)
        self._new_of: dict[int, deque[NewItem]] = {}
        self._next_user: int | None = 0
        self._users = 0
        self._begun_ms = 0
        head = Feed.of(histories)
        self._read = Feed(max(0, head.seq - SLOTS), max(0, head.new - NEW_SLOTS))

    def turn(self) -> bool:
        """Reads the next part of the feed, for at most a few milliseconds; returns whether there is more."""
        head = Feed.of(self._histories)
        if head.seq < self._read.seq or head.new < self._read.new:
            # The store was rebuilt.
            self._read = Feed()
        return any((self._turn_new(head), self._turn_clicked(head), self._turn_users()))

    def best(self, category: int, most: int) -> list[int]:
        """Returns the items of a category with the highest click weights, best first."""
        shelf = self._shelves.get(category)
        return [] if shelf is None else shelf.best(most)

    def newest(self, most: int, category: int | None = None) -> list[NewItem]:
        """Returns the latest new items, newest first; only of one category if it is given."""
        found = self._new if category is None else self._new_of.get(category, ())
        return [one for one, _ in zip(reversed(found), range(most), strict=False)]

    def _turn_new(self, head: Feed) -> bool:
        first = max(self._read.new, head.new - NEW_SLOTS)
        last = min(head.new, first + NEW_AT_ONCE)
        for number in range(first, last):
            if (found := new_at(self._histories, number)) is not None:
                self._add_new(NewItem(*found))
        self._read = self._read._replace(new=last)
        return last < head.new

    def _add_new(self, one: NewItem) -> None:
        if len(self._new) == NEW_SLOTS:
            gone = self._new[0]
            theirs = self._new_of[gone.category]
            theirs.popleft()
            if not theirs:
                del self._new_of[gone.category]
        self._new.append(one)
        self._new_of.setdefault(one.category, deque()).append(one)

    def _turn_clicked(self, head: Feed) -> bool:
        first = max(self._read.seq, head.seq - SLOTS)
        last = min(head.seq, first + NOTES_AT_ONCE)
        for seq in range(first, last):
            if (found := clicked_at(self._histories, seq)) is not None:
                weight = self._weight(found.at_ms)
                for item, category, clicks in found.items.tolist():
                    self._add(category, item, weight * clicks)
        self._read = self._read._replace(seq=last)
        return last < head.seq

    def _turn_users(self) -> bool:
        if self._next_user is None or self._users >= MOST_USERS:
            return False
        found = self._histories.ends(self._next_user, USERS_AT_ONCE)
        for event in found.newest[["at_ms", "category", "item"]].tolist():
            at_ms, category, item = event
            if item and category:
                self._add(category, item, self._weight(at_ms))
        self._users += len(found.users)
        self._next_user = found.following
        return self._next_user is not None

    def _weight(self, at_ms: int) -> float:
        """Returns a click's weight; later clicks weigh more, so that stored weights need no decay."""
        self._begun_ms = self._begun_ms or at_ms
        return float(2.0 ** min(500.0, max(-500.0, (at_ms - self._begun_ms) / HALF_MS)))

    def _add(self, category: int, item: int, weight: float) -> None:
        shelf = self._shelves.get(category)
        if shelf is None:
            shelf = self._shelves[category] = _Shelf()
        self._items += shelf.add(item, weight)
        while self._items > MOST_ITEMS:
            # Halve one category after another, so that each call does little work.
            first = next(iter(self._shelves))
            shelf = self._shelves.pop(first)
            self._items -= shelf.keep(len(shelf.weights) // 2)
            if shelf.weights:
                self._shelves[first] = shelf
