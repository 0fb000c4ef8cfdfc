"""What a host's histories know of categories and items: names, and the category each item was last seen in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from deploy.serving.notes import item_extra, item_parts, name_extra
from state.history.store import HistoryStore

NAMES_REMEMBERED = 100_000


class ShownName(NamedTuple):
    """A category or an item as an answer shows it; without a name its id stands for it."""

    name: str
    hex: str


class Catalogue:
    """Looks names and categories up; use it in one thread.

    Args:
        histories: The history store, read only.
    """

    def __init__(self, histories: HistoryStore) -> None:
        self._histories = histories
        self._names: dict[int, ShownName] = {}

    def name_of(self, category: int) -> ShownName:
        """A category's name."""
        known = self._names.get(category)
        if known is not None:
            return known
        identity = f"{category:016x}"
        stored = self._histories.extra(name_extra(category))
        if stored is None:
            # It is asked for again: the name may come with the next click.
            return ShownName(identity, identity)
        if len(self._names) >= NAMES_REMEMBERED:
            self._names.clear()
        return self._names.setdefault(category, ShownName(stored.decode(), identity))

    def categories_of(self, items: Sequence[tuple[int, int]]) -> list[int]:
        """The category of each of n items, which are an id and 0, or the category itself; 0 where nobody clicked one."""
        found = iter(self._histories.extra_of_each([item_extra(item) for item, category in items if not category]))
        return [category or (0 if (stored := next(found)) is None else item_parts(stored)[0]) for _, category in items]

    def category_of(self, item: int) -> int:
        """The category that an item was last seen in; 0 where nobody clicked it."""
        stored = self._histories.extra(item_extra(item)) if item else None
        return 0 if stored is None else item_parts(stored)[0]

    def item_name(self, item: int) -> ShownName:
        """An item's name; it is the id that clicks give it."""
        stored = self._histories.extra(item_extra(item))
        name = "" if stored is None else item_parts(stored)[1]
        return ShownName(name, f"{item:016x}") if name else self.name_of(item)
