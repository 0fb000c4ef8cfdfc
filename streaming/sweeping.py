"""Sweeps the stream's histories in the commit thread, by the event time of committed clicks; counts what is removed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from state.errors import StoreFull, UnusableDisk
from state.history.sweeping import Sweeper
from state.metrics import StreamMetrics
from state.positions import Source
from streaming.context import JobContext
from streaming.event_clock import PREFIX, believed_in, clock_of_all
from streaming.rows import Rows

logger = logging.getLogger(__name__)


class StreamSweep:
    """The sweep of one shard; used by the commit thread."""

    def __init__(self, context: JobContext, metrics: StreamMetrics) -> None:
        self._context, self._metrics = context, metrics
        self._clocks: dict[Source, int] = {}
        self._sweeper: Sweeper | None = None
        self._reach_ms = 0
        self._noted = False

    def note(self, pieces: Sequence[Rows]) -> None:
        """Updates the log time from committed batches."""
        for piece in pieces:
            if piece.told is None or not piece.batch.ranges:
                continue
            if self._sweeper is None:
                self._sweeper = self._open()
            for part, (_, end_ms) in zip(piece.batch.ranges, piece.told.clocks, strict=True):
                self._clocks[part.source] = end_ms
            self._noted = True

    @property
    def due_s(self) -> float | None:
        """The monotonic time from which `look` has something to do; None if log time must advance first."""
        sweeper = self._sweeper
        if sweeper is None or not self._clocks or (sweeper.resting and not self._noted):
            return None
        return sweeper.due_s

    @property
    def log_time_ms(self) -> int:
        """The log time of everything committed; valid only after a batch was noted."""
        return clock_of_all(self._clocks, self._reach_ms)

    def look(self) -> None:
        """Sweeps some users, and removes what may go; a full store is logged and is not fatal."""
        metrics, sweeper = self._metrics, self._sweeper
        assert sweeper is not None
        try:
            removed = sweeper.look(self.log_time_ms)
        except (StoreFull, UnusableDisk) as error:
            logger.warning("histories are not swept: %s", error)
            return
        if sweeper.resting:
            self._noted = False
        metrics.swept_events.inc(removed.events)
        for reason, users in (("old", removed.aged), ("too_many", removed.evicted)):
            metrics.swept_users.labels(reason).inc(users)
        metrics.history_users.set(self._context.store.users())

    @contextmanager
    def making_room(self) -> Iterator[None]:
        """Wraps a commit: if the store is full, sweeps many users and re-raises, so that the commit is tried again."""
        try:
            yield
        except StoreFull:
            self._sweeper = self._sweeper or self._open()
            if self._clocks:
                # Whatever cannot be removed now is left for later.
                with suppress(StoreFull, UnusableDisk):
                    self._sweeper.hurry(self.log_time_ms)
            raise

    def _open(self) -> Sweeper:
        settings, store = self._context.settings, self._context.store
        self._reach_ms = self._context.spec.reach_ms(settings.events)
        for source in store.positions():
            believed_ms = believed_in(store.extra(PREFIX + str(source)))
            if believed_ms is not None:
                self._clocks[source] = believed_ms
        return Sweeper(store, self._reach_ms, settings.stream.max_users, self._context.profiler.forget)
