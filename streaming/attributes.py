"""Joins each row with what is known of its user and its item when the row is made.

    thread "attributes"   topics -> store -> ids that changed     state/attributes/follower.py
    Beam thread           rows, and the store of recent ids       `Join`, `Recent`

At the start the topics are read to their ends before the first click; from
then on a row gets what the stream has read by that moment. The joined ids are
part of the micro-batch: whoever reads the log again, gets the same. Clicks
read again after a crash may be joined with newer attributes; the rows written
first count, since readers drop the others by their position.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from state.attributes.follower import POLL_S, AttributeFollower, follow, keep_following
from state.attributes.store import AttributeStore
from state.attributes.values import SIDES, AttributeTable, Joined
from state.metrics import StreamMetrics
from streaming.recent_attributes import Recent
from streaming.rows import Rows

TOLD_S = 5.0
logger = logging.getLogger(__name__)


class Join:
    """What the stream knows of users and items, and its follower.

    `rows` is called by the Beam thread. `catch_up` and then `start` are called
    once, `close` at the end; an error of the thread surfaces in `rows`.

    Args:
        store: Where attributes are kept; closed with this.
        followers: Of the configured topics.
        tables: By side.
        slices: Names of the attributes whose values are announced.
        metrics: Of the stream.
    """

    def __init__(
        self,
        store: AttributeStore,
        followers: Sequence[AttributeFollower],
        tables: Mapping[str, AttributeTable],
        slices: Sequence[str],
        metrics: StreamMetrics,
    ) -> None:
        self._store, self._followers, self._metrics = store, followers, metrics
        self._recent = {side: Recent(store, table, slices) for side, table in tables.items()}
        users, items = (tables[side].names if side in tables else () for side in SIDES)
        self._fields = (users, items)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="attributes", daemon=True)
        self._failure: BaseException | None = None

    def rows(self, rows: Rows) -> Rows:
        """The rows with the attributes that are known now.

        Raises:
            SpringtideError: What ended the follower's thread.
        """
        if self._failure is not None:
            raise self._failure
        batch = rows.batch
        newest_ms = int(batch.at_ms.max()) if len(batch) else 0
        found, names = [], dict[int, str]()
        for side, ids in zip(SIDES, (batch.user, batch.item), strict=True):
            recent = self._recent.get(side)
            values = np.empty((len(ids), 0), np.uint64) if recent is None else recent.take(ids)
            names |= {} if recent is None else recent.news(values, newest_ms)
            found.append(values)
        return replace(rows, attributes=Joined(found[0], found[1], names, self._fields))

    def catch_up(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Reads the topics to where they end now, so that the first click is joined with what is known.

        Raises:
            LogError: A topic is missing or cannot be read.
        """
        for one in self._followers:
            one.connect()
        begun_s = told_s = clock()
        while unread := sum(one.unread for one in self._followers):
            follow(self._followers, POLL_S)
            if clock() - told_s >= TOLD_S:
                told_s = clock()
                logger.info("reading attributes before the first click: %d records to go", unread)
        self._show()
        known = ", ".join(f"{self._store.count(one.side)} {one.side}s" for one in self._followers)
        logger.info("attributes of %s are known after %.1f s", known, clock() - begun_s)

    def start(self) -> None:
        """Follows the topics from now on."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread and closes the store."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        for one in self._followers:
            one.disconnect()
        self._store.close()

    def _run(self) -> None:
        try:
            keep_following(
                self._followers, self._stopping, self._take, "clicks are joined with the attributes that are known"
            )
        # The edge of the thread: kept, and raised again in the Beam thread.
        except BaseException as failure:  # noqa: BLE001
            self._failure = failure

    def _take(self, side: str, ids: list[int]) -> None:
        if ids:
            self._recent[side].forget(ids)
            self._show()

    def _show(self) -> None:
        for one in self._followers:
            for outcome, count in one.place.counts.items():
                self._metrics.attribute_records.labels(one.side, outcome).set(count)
            self._metrics.attributes_known.labels(one.side).set(self._store.count(one.side))
