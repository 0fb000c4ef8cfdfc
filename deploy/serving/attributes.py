"""Follows the topics of attributes into the serving host's store; the applier's part.

Serving follows the topics of attributes itself: somebody whose record came a
moment ago is answered by it, clicked or not. Whoever has no record is unknown,
which the model has learned about like any other value.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from state.attributes.follower import AttributeFollower, keep_following
from state.attributes.store import AttributeStore
from state.attributes.values import tables_of
from state.config.settings import Settings
from state.errors import StoreFull
from state.events.identity import load_salt
from state.history.forgetting import PAGES_MS
from state.layout import ATTRIBUTES
from state.metrics import ApplierMetrics
from state.storage.shares import SERVING, map_bytes
from state.storage.waiting import Room

_log = logging.getLogger(__name__)


class AttributesFollower:
    """The applier's part: both topics into the host's store. `run` in a thread of its own, `close` after it.

    Args:
        settings: Of the whole system; at least one topic of attributes is configured.
        path: Directory of the store.
        metrics: Of the applier.
        room: The room that the store needs.

    Raises:
        MissingSalt: The salt's file is missing.
    """

    def __init__(self, settings: Settings, path: Path, metrics: ApplierMetrics, room: Room) -> None:
        wanted, self._metrics, self._room = settings.attributes, metrics, room
        self._removed, self._due_s = 0, float("-inf")
        salt = load_salt(settings.salt_path, create=False)
        self.store = AttributeStore.open_anew(path, map_bytes(settings, SERVING, ATTRIBUTES, path))
        topics = {"user": wanted.user_topic, "item": wanted.item_topic}
        # The stream makes dead letters of refused records; here they only change nothing.
        self._followers = [
            AttributeFollower(
                settings.kafka, topics[side], table, salt, self.store, lambda bad: None, settings.events.max_event_bytes
            )
            for side, table in tables_of(wanted).items()
        ]

    def run(self, stop: threading.Event) -> None:
        """Follows until `stop`.

        Raises:
            StoreError: The store cannot be written.
        """
        for one in self._followers:
            self._count(one.side)
        keep_following(self._followers, stop, self._took, "answers use the attributes they have", self._room)

    def close(self) -> None:
        """Closes the topics and the store."""
        for one in self._followers:
            one.disconnect()
        self.store.close()

    def _took(self, side: str, _: list[int]) -> None:
        self._count(side)
        removed, now_s = sum(one.place.counts["removed"] for one in self._followers), time.monotonic()
        if removed != self._removed and now_s >= self._due_s:
            # What was taken out stays on free pages of the file; a copy of it is dear where that comes one by one.
            self._removed, self._due_s = removed, now_s + PAGES_MS / 1000
            try:
                self.store.compact()
            except StoreFull as full:
                _log.warning("free pages keep bytes of attributes that were taken out: %s", full)

    def _count(self, side: str) -> None:
        self._metrics.attributes_known.labels(side).set(self.store.count(side))
