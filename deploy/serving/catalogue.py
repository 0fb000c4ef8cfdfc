"""Looks up category and item names, and the category each item was last seen in, in a host's histories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from deploy.serving.notes import item_extra, item_parts, name_extra
from state.history.store import HistoryStore

NAMES_REMEMBERED = 100_000


class ShownName(NamedTuple):
    """A category or item as an answer shows it; without a name, the id is used as the name."""

    name: str
    hex: str


class Catalogue:
    """Looks up names and categories. Used by one thread.

    Args:
        histories: The history store, opened read-only.
    """

    def __init__(self, histories: HistoryStore) -> None:
        self._histories = histories
        self._names: dict[int, ShownName] = {}

    def name_of(self, category: int) -> ShownName:
        """Returns a category's name."""
        known = self._names.get(category)
        if known is not None:
            return known
        identity = f"{category:016x}"
        stored = self._histories.extra(name_extra(category))
        if stored is None:
            # Not cached: the name may arrive with the next click.
            return ShownName(identity, identity)
        if len(self._names) >= NAMES_REMEMBERED:
            self._names.clear()
        return self._names.setdefault(category, ShownName(stored.decode(), identity))

    def categories_of(self, items: Sequence[tuple[int, int]]) -> list[int]:
        """Returns each item's category, 0 if nobody clicked it; `items` has `(id, category)` pairs, 0 = look it up."""
        found = iter(self._histories.extra_of_each([item_extra(item) for item, category in items if not category]))
        return [category or (0 if (stored := next(found)) is None else item_parts(stored)[0]) for _, category in items]

    def category_of(self, item: int) -> int:
        """Returns the category that an item was last seen in; 0 if nobody clicked it."""
        stored = self._histories.extra(item_extra(item)) if item else None
        return 0 if stored is None else item_parts(stored)[0]

    def item_name(self, item: int) -> ShownName:
        """Returns an item's name: the id that clicks carry, or the name of the category with this id."""
        stored = self._histories.extra(item_extra(item))
        name = "" if stored is None else item_parts(stored)[1]
        return ShownName(name, f"{item:016x}") if name else self.name_of(item)
