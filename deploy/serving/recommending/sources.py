"""Where items to recommend come from, in one worker's memory: those clicked by category, and those near to a user."""

from __future__ import annotations

from deploy.serving.recommending.near_items import NearItems
from deploy.serving.recommending.shelves import Shelves
from state.history.store import HistoryStore
from state.rows.store import RowStore


class ItemSources:
    """Both, followed together; use them in one thread.

    Args:
        histories: The host's histories, read only.
        rows: The host's rows, read only.
    """

    def __init__(self, histories: HistoryStore, rows: RowStore) -> None:
        self.shelves, self.near = Shelves(histories), NearItems(rows)

    def turn(self) -> bool:
        """Reads some of what is not read yet, at most a few milliseconds' worth; whether there is more."""
        return any((self.shelves.turn(), self.near.turn()))
