"""Who clicked: the users of the training log's records, once this host's histories have them."""

from __future__ import annotations

import json
import logging
from collections import deque
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deploy.serving.going_back import POSITION_EXTRA
from state.config.settings import Settings
from state.errors import LogError, MicroBatchError
from state.history.store import HistoryStore
from state.log import Log, LogReader
from state.metrics import SegmentMetrics
from state.microbatch.glance import glance

RECORDS_AT_ONCE = 64
MOST_WAITING = 500_000
"""Users who wait for the histories; with more nobody is waited for, and all users are looked at instead. 8 bytes each."""
_log = logging.getLogger(__name__)


class _Record(NamedTuple):
    """One record: the offset after it, and `[k]` uint64, its users."""

    next: int
    users: NDArray[np.uint64]


class ClickedUsers:
    """Follows the log from where the histories end; used by one thread.

    Args:
        settings: Of the loop.
        log: Where it is.
        metrics: Of the process.

    Attributes:
        missed: Whether users clicked of whom nothing is known here: at the start, and after a gap. Whoever looks at all
            users instead sets it back.
    """

    def __init__(self, settings: Settings, log: Log, metrics: SegmentMetrics) -> None:
        self._topic, self._partition = settings.kafka.microbatches_topic, settings.trainer.partition
        self._kafka, self._metrics = log, metrics
        self._reader: LogReader | None = None
        self._waiting: deque[_Record] = deque()
        self.missed = True

    def take(self, histories: HistoryStore, timeout_s: float) -> list[int]:
        """The users whose clicks came into the histories since the last time, each once.

        Args:
            histories: This host's.
            timeout_s: How long to wait for records.

        Raises:
            LogError: The log cannot be read; come again.
        """
        try:
            if self._reader is None:
                self._reader = self._open(histories)
                self.missed = True
            for batch in self._reader.poll(timeout_s, RECORDS_AT_ONCE):
                for offset, value in zip(batch.offsets.tolist(), batch.values, strict=True):
                    self._meet(offset, value)
            self._metrics.lag_records.set(sum(self._reader.lag().values()) + len(self._waiting))
        except LogError:
            self.disconnect()
            raise
        found: dict[int, None] = {}
        reached = self._reached(histories)
        while self._waiting and self._waiting[0].next <= reached:
            found.update(dict.fromkeys(self._waiting.popleft().users.tolist()))
        if sum(len(one.users) for one in self._waiting) > MOST_WAITING:
            self._waiting.clear()
            self.missed = True
        return list(found)

    @property
    def waits(self) -> bool:
        """Whether users clicked whose clicks the histories do not have yet."""
        return bool(self._waiting)

    def disconnect(self) -> None:
        """Ends the connection; the next call makes another, where the histories end by then."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _open(self, histories: HistoryStore) -> LogReader:
        with self._kafka.topics() as topics:
            topic_id, (begin, end) = topics.describe(self._topic).topic_id, topics.ends(self._topic)[self._partition]
        stored = json.loads(histories.extra(POSITION_EXTRA) or b"{}")
        # What waited is read again.
        self._waiting.clear()
        at = min(max(begin, self._reached(histories)), end) if stored.get("topic_id") == topic_id else begin
        return self._kafka.reader(self._topic, [self._partition], {self._partition: at})

    def _meet(self, offset: int, value: bytes | None) -> None:
        try:
            self._waiting.append(_Record(offset + 1, np.unique(glance(value or b"").user)))
        except MicroBatchError as error:
            _log.warning("record %d of the training log is left out: %s", offset, error)

    def _reached(self, histories: HistoryStore) -> int:
        """Where the histories end in the log."""
        stored = json.loads(histories.extra(POSITION_EXTRA) or b"{}")
        return int(stored.get("next", {}).get(str(self._partition), 0))
