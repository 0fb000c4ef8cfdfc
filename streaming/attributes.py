"""Joins each row with the attributes of its user and its item that are known when the row is made.

    thread "attributes"   topics -> store -> changed ids          state/attributes/follower.py
    Beam thread           rows, and the store of recent ids       `Join`, `Recent`

At the start, the topics are read to their ends before the first click. The joined ids are part of the micro-batch, so
every reader of the log gets the same ids.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from state.attributes.follower import POLL_S, AttributeFollower, follow, keep_following
from state.attributes.values import SIDES, U64, AttributeStore, AttributeTable, Joined, ids_in, texts_in
from state.events.parser import ANNOUNCE_MS
from state.metrics import StreamMetrics
from streaming.rows import Rows

REMEMBERED = 200_000
PROGRESS_S = 5.0
logger = logging.getLogger(__name__)


class Recent:
    """Caches the newest attributes of `remembered` recent user or item ids.

    One thread calls `take`; any thread calls `forget`. The values of the attributes `slices` are announced.
    """

    def __init__(
        self, store: AttributeStore, table: AttributeTable, slices: Sequence[str] = (), remembered: int = REMEMBERED
    ) -> None:
        self._store, self._table, self._remembered = store, table, remembered
        self._measured = [number for number, name in enumerate(table.names) if name in slices]
        self._values: U64 = np.empty((1024, len(table.names)), np.uint64)
        self._texts: dict[int, str] = {}
        self._announced: dict[int, int] = {}
        self._changed: deque[int] = deque()
        self._clear()

    def forget(self, ids: Iterable[int]) -> None:
        """Drops `ids` from memory, because the store has new values."""
        self._changed.extend(ids)

    def take(self, ids: U64) -> U64:
        """The attributes of `[n]` ids as of now, `[n, A]` uint64; zeros for id 0, which is none."""
        # The store has each new value before `forget`, so the values read below are at least as new.
        while self._changed:
            self._slots.pop(self._changed.popleft(), None)
        wanted = ids.tolist()
        # Each id has a slot; ids without a record share one entry of the values.
        if max(self._used, len(self._slots)) + len(wanted) > self._remembered + 2:
            self._clear()
        slots = self._slots
        missing = [key for key in dict.fromkeys(wanted) if key not in slots]
        if missing:
            self._read(missing)
        return self._values[[slots[key] for key in wanted]]

    def announce(self, values: U64, newest_ms: int) -> dict[int, str]:
        """The texts of measured values in `[n, A]` ids that were not announced within ten minutes of event time."""
        if not self._measured or not len(values):
            return {}
        announced, texts = self._announced, self._texts
        due = [
            value
            for value in np.unique(values[:, self._measured]).tolist()
            if value in texts and abs(newest_ms - announced.get(value, -ANNOUNCE_MS)) >= ANNOUNCE_MS
        ]
        announced.update(dict.fromkeys(due, newest_ms))
        return {value: texts[value] for value in due}

    def _read(self, missing: list[int]) -> None:
        width = len(self._table.names)
        while self._used + len(missing) > len(self._values):
            self._values = np.concatenate([self._values, np.empty_like(self._values)])
        for key, value in zip(missing, self._store.read_many(self._table.side, missing), strict=True):
            if value is None:
                self._slots[key] = 0
                continue
            self._values[self._used] = ids = ids_in(value, width)
            self._slots[key] = self._used
            self._used += 1
            if self._measured:
                texts = texts_in(value, width)
                self._texts |= {int(ids[at]): text for at in self._measured if (text := texts[at]) is not None}

    def _clear(self) -> None:
        self._slots = {0: 1}
        self._values[0], self._values[1] = self._table.unknown, 0
        self._used = 2
        if len(self._texts) > self._remembered:
            self._texts.clear()
            self._announced.clear()


class Join:
    """Joins rows with the attributes of users and items, and follows their topics.

    `rows` is called by the Beam thread. `catch_up` and then `start` are called once, `close` at the end, which also
    closes `store`. An error of the thread surfaces in `rows`. The values of the attributes `slices` are announced.
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
            SpringtideError: The follower's thread failed.
        """
        if self._failure is not None:
            raise self._failure
        batch = rows.batch
        newest_ms = int(batch.at_ms.max()) if len(batch) else 0
        joined, names = [], dict[int, str]()
        for side, ids in zip(SIDES, (batch.user, batch.item), strict=True):
            recent = self._recent.get(side)
            values = np.empty((len(ids), 0), np.uint64) if recent is None else recent.take(ids)
            names |= {} if recent is None else recent.announce(values, newest_ms)
            joined.append(values)
        return replace(rows, attributes=Joined(joined[0], joined[1], names, self._fields))

    def catch_up(self) -> None:
        """Reads the topics to their present ends, so that the first click is joined with current attributes.

        Raises:
            LogError: A topic is missing or cannot be read.
        """
        for follower in self._followers:
            follower.connect()
        begun_s = reported_s = time.monotonic()
        while unread := sum(follower.unread for follower in self._followers):
            follow(self._followers, POLL_S)
            if time.monotonic() - reported_s >= PROGRESS_S:
                reported_s = time.monotonic()
                logger.info("reading attributes before the first click: %d records left", unread)
        self._show()
        counts = ", ".join(f"{self._store.count(follower.side)} {follower.side}s" for follower in self._followers)
        logger.info("attributes of %s are known after %.1f s", counts, time.monotonic() - begun_s)

    def start(self) -> None:
        """Follows the topics from now on."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread and closes the store."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        for follower in self._followers:
            follower.disconnect()
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
        for follower in self._followers:
            for outcome, count in follower.position.counts.items():
                self._metrics.attribute_records.labels(follower.side, outcome).set(count)
            self._metrics.attributes_known.labels(follower.side).set(self._store.count(follower.side))
