"""What a host does now and then so that its histories, items and names do not grow without bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress

from deploy.serving.item_feed import ItemFeed
from deploy.serving.remembered import Remembered
from state.config.sections import ServingSettings
from state.errors import StoreFull
from state.features.spec import Events
from state.history.store import HistoryStore
from state.history.sweeping import Sweeper
from state.metrics import ApplierMetrics


class Upkeep:
    """Sweeps a host's histories and what is noted beside them; used by the store's writing thread.

    Args:
        store: The host's histories.
        reach_ms: How much older than the newest event one can be that still matters.
        kept: How many users and items are kept, and how long.
        metrics: Of the applier.
        now_ms: The wall clock.
        lose: Told where users whose events still count were taken out.
    """

    def __init__(
        self,
        store: HistoryStore,
        reach_ms: int,
        kept: ServingSettings,
        metrics: ApplierMetrics,
        now_ms: Callable[[], int],
        lose: Callable[[], None] = lambda: None,
    ) -> None:
        self._store, self._reach_ms, self._kept = store, reach_ms, kept
        self._metrics, self._now_ms, self._lose = metrics, now_ms, lose
        self.begin()

    def begin(self) -> None:
        """Begins anew with what the store has: it went back, or refused a commit."""
        self._remembered = Remembered(self._store, self._kept.items_keep_d, self._kept.max_items)
        self._feed = ItemFeed(self._store)
        self._sweeper = Sweeper(
            self._store, self._reach_ms, self._kept.max_users, elapsed=lambda: self._now_ms() / 1000
        )

    def news(self, events: Events, names: Mapping[int, str], clock_ms: int) -> dict[str, bytes | None]:
        """The extras to commit with some clicks, see `Remembered.news` and `ItemFeed.news`."""
        found = self._remembered.news(events, names, clock_ms)
        return found | self._feed.news(events, found, clock_ms)

    def look(self, newest_ms: int) -> None:
        """Looks at some users and items where that is due, and takes out what has to go.

        Args:
            newest_ms: Log time; 0 where there is none.

        Raises:
            StoreFull: There is no room to write what is left; nothing was changed.
        """
        if newest_ms:
            metrics, removed = self._metrics, self._sweeper.look(newest_ms)
            metrics.swept_events.inc(removed.events)
            metrics.swept_users.labels("old").inc(removed.aged)
            metrics.swept_users.labels("too_many").inc(removed.evicted)
            if removed.evicted:
                self._lose()
            metrics.swept_items.inc(self._remembered.look(newest_ms))

    def make_room(self, newest_ms: int) -> None:
        """Looks at many, where the store is full; what cannot be done now is left."""
        # What was not stored is not known either.
        self._remembered.forget()
        self._feed = ItemFeed(self._store)
        self._lose()
        if newest_ms:
            with suppress(StoreFull):
                self._sweeper.hurry(newest_ms)

    def show(self) -> None:
        """Sets the gauges."""
        self._metrics.history_users.set(self._store.users())
        for kind, count in self._remembered.counts.items():
            self._metrics.remembered.labels(kind).set(count)
