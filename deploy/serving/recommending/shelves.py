"""Which items a host knows by category: how much they are clicked, and since when. In one worker's memory.

It only proposes: whoever answers reads the rows of what is proposed at the
version of the answer. It begins with the newest clicks of users, and goes on
with the feed that the applier writes (`deploy/serving/item_feed.py`). A click
counts half after a day of log time. Nothing is read but what a turn asks for.
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
"""On all shelves; some 40 MB."""
MOST_USERS = 100_000
"""Users whose newest click is counted at the beginning."""
USERS_AT_ONCE = 50
NEW_AT_ONCE = 200
NOTES_AT_ONCE = 8


class NewItem(NamedTuple):
    """An item that was clicked for the first time: its category, and when, in milliseconds of log time."""

    item: int
    category: int
    at_ms: int


@dataclass
class _Shelf:
    """The items of one category: weights, and the order by weight where it is still right."""

    weights: dict[int, float] = field(default_factory=dict)
    ordered: list[int] | None = None

    def add(self, item: int, weight: float) -> int:
        """Counts a click; returns how many items there are more than before."""
        before = len(self.weights)
        self.weights[item] = self.weights.get(item, 0.0) + weight
        self.ordered = None
        if len(self.weights) >= 2 * MOST_ON_A_SHELF:
            self.keep(MOST_ON_A_SHELF)
        return len(self.weights) - before

    def keep(self, most: int) -> int:
        """Forgets all but the best; returns how many."""
        before = len(self.weights)
        self.weights, self.ordered = {one: self.weights[one] for one in self.best(most)}, None
        return before - len(self.weights)

    def best(self, most: int) -> list[int]:
        if self.ordered is None:
            self.ordered = sorted(self.weights, key=lambda item: (-self.weights[item], item))[:MOST_ON_A_SHELF]
        return self.ordered[:most]


class Shelves:
    """Items by category; use it in one thread.

    Args:
        histories: The host's histories, read only.
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
        """Reads some of what is not read yet, at most a few milliseconds' worth; whether there is more."""
        head = Feed.of(self._histories)
        if head.seq < self._read.seq or head.new < self._read.new:
            # The store was begun anew.
            self._read = Feed()
        return any((self._turn_new(head), self._turn_clicked(head), self._turn_users()))

    def best(self, category: int, most: int) -> list[int]:
        """The items of a category with the most clicks, the best first."""
        shelf = self._shelves.get(category)
        return [] if shelf is None else shelf.best(most)

    def newest(self, most: int, category: int | None = None) -> list[NewItem]:
        """The items that were clicked for the first time last, the newest first; of one category where one is given."""
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
        """How much a click counts; that of later ones is larger, so that nothing that is counted has to change."""
        self._begun_ms = self._begun_ms or at_ms
        return float(2.0 ** min(500.0, max(-500.0, (at_ms - self._begun_ms) / HALF_MS)))

    def _add(self, category: int, item: int, weight: float) -> None:
        shelf = self._shelves.get(category)
        if shelf is None:
            shelf = self._shelves[category] = _Shelf()
        self._items += shelf.add(item, weight)
        while self._items > MOST_ITEMS:
            # Each shelf in its turn gives half of what it has, so that no call has much to do.
            first = next(iter(self._shelves))
            shelf = self._shelves.pop(first)
            self._items -= shelf.keep(len(shelf.weights) // 2)
            if shelf.weights:
                self._shelves[first] = shelf
