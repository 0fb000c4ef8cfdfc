"""In-memory sources of candidate items in one worker: clicked items by category, and items nearest to a user."""

from __future__ import annotations

from deploy.serving.recommending.near_items import NearItems
from deploy.serving.recommending.shelves import Shelves
from state.history.store import HistoryStore
from state.rows.store import RowStore


class ItemSources:
    """Both sources of candidate items, updated together. Used by one thread.

    Args:
        histories: The host's histories, opened read-only.
        rows: The host's rows, opened read-only.
    """

    def __init__(self, histories: HistoryStore, rows: RowStore) -> None:
        self.shelves, self.near = Shelves(histories), NearItems(rows)

    def turn(self) -> bool:
        """Reads the next part of the stores, for at most a few milliseconds; returns whether there is more."""
        return any((self.shelves.turn(), self.near.turn()))
