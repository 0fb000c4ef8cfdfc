"""Forgets events of a host's histories that no window reaches any more, some users at a time."""

from __future__ import annotations

from contextlib import suppress

from state.errors import StoreFull
from state.history.store import HistoryStore

USERS, USERS_WHEN_FULL = 1000, 20_000


class OldEvents:
    """Goes through the users again and again; use it in the store's writing thread.

    Args:
        store: The host's histories.
        horizon_ms: How much older than the newest event one can be that still matters.
    """

    def __init__(self, store: HistoryStore, horizon_ms: int) -> None:
        self._store, self._horizon_ms = store, horizon_ms
        self._from = 0

    def sweep(self, newest_ms: int, users: int = USERS) -> None:
        """Looks at the next `users`; `newest_ms` is the time of the newest event, 0 where there is none.

        Raises:
            StoreFull: There is no room to write what is left; nothing was changed.
        """
        if newest_ms:
            _, following = self._store.sweep(newest_ms - self._horizon_ms, self._from, users)
            self._from = following or 0

    def make_room(self, newest_ms: int) -> None:
        """Looks at many, where the store is full; what cannot be done now is left."""
        with suppress(StoreFull):
            self.sweep(newest_ms, USERS_WHEN_FULL)
