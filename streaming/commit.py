"""The commit sequence of the stream: writes micro-batches and dead letters, then commits histories and positions.

For all the cuts that are queued at that moment:

1. One Kafka transaction with their micro-batches and dead letters.
2. One commit of the store: histories, waiting rows, clocks, next offsets, counters. If the disk has no space for it,
   it waits, and so holds back the reading of clicks.
3. Once a second, and once more after the last click: the gauges of the account, and the consumer group's offsets. The
   offsets are for lag tools; the stream never reads them. From time to time, some users' histories are swept.

The store is synced only at a clean stop; after a power failure it is rebuilt.

A crash before step 1 is acknowledged leaves nothing. After a crash between 1 and 2, the restart writes the rows again
with the same positions. Every reader of the training log drops the duplicates. After 2 nothing is written again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from state.errors import LogError, StoreFull, UnusableDisk
from state.events.decoding import Reason
from state.history.sweeping import Sweeper
from state.history.waiting import Changes, Extra
from state.metrics import StreamMetrics
from state.positions import UNPLACED, Range, Source
from state.process import killpoints
from streaming import accounts
from streaming.context import JobContext, StreamContext
from streaming.event_clock import PREFIX, OffClock, believed_in, clock_of_all
from streaming.rows import Cut, Rows, merge_all, merge_appends

logger = logging.getLogger(__name__)

SHOW_S = 1.0
WHAT = "the stream"


@dataclass(frozen=True)
class CommitReport:
    """What one commit, or one bundle of a distributed job, wrote.

    Attributes:
        ranges: The positions, those of one source in order.
        truncated: Rows whose history was truncated.
        off: Wrong clocks; the newest refused click of a batch represents all refused ones.
    """

    ranges: tuple[Range, ...]
    records: int
    rows: int
    seconds: float
    truncated: int
    letters: Mapping[str, int]
    off: tuple[OffClock, ...]

    @classmethod
    def of(cls, pieces: Sequence[Rows], records: int, seconds: float, truncated: Sequence[int]) -> CommitReport:
        """Summarises batches written as `records` micro-batches; `truncated` is the result of `truncated_columns`."""
        ranges, letters, off = list[Range](), Counter[str](), list[OffClock]()
        for piece in pieces:
            batch = piece.batch
            ranges += batch.ranges
            letters.update(str(letter.reason) for letter in batch.dead)
            refused = [letter for letter in batch.dead if letter.reason is Reason.IMPLAUSIBLE_TIME]
            off += [OffClock("refused", last.source.partition, last.offset, 0, len(refused)) for last in refused[-1:]]
            off += () if piece.clock is None else piece.clock.off
        short = sum(int((piece.vectors.features[:, index] > 0).sum()) for piece in pieces for index in truncated)
        return cls(tuple(ranges), records, sum(map(len, pieces)), seconds, short, letters, tuple(off))

    def count(self, metrics: StreamMetrics) -> None:
        """Adds it to the metrics."""
        metrics.microbatches.inc(self.records)
        metrics.commit_seconds.observe(self.seconds)
        metrics.truncated_histories.inc(self.truncated)
        if self.records:
            metrics.microbatch_rows.observe(self.rows / self.records)
        for reason, count in self.letters.items():
            metrics.dead_letters.labels(reason).inc(count)
        outcomes: Counter[str] = Counter()
        for part in self.ranges:
            outcomes.update(part.outcomes)
        for outcome in outcomes.keys() - UNPLACED - {"elsewhere"}:
            metrics.events.labels(outcome).inc(outcomes[outcome])
        for off in self.off:
            metrics.clocks_off.labels(off.direction).inc(off.clicks)
            metrics.clock_off_partition.labels(off.direction).set(off.partition)
            metrics.clock_off_offset.labels(off.direction).set(off.offset)
            metrics.clock_off_seconds.labels(off.direction).set(off.by_ms / 1000)
            metrics.clock_off_time_seconds.labels(off.direction).set_to_current_time()


def truncated_columns(names: Sequence[str]) -> list[int]:
    """The feature columns that mark truncated histories."""
    return [index for index, name in enumerate(names) if name == "truncated"]


class StreamSweep:
    """Sweeps histories by the event time of committed clicks, and counts what is removed. One thread."""

    def __init__(self, context: JobContext, metrics: StreamMetrics) -> None:
        self._context, self._metrics = context, metrics
        self._clocks: dict[Source, int] = {}
        self._sweeper: Sweeper | None = None
        self._reach_ms = 0
        self._noted = False

    def note(self, pieces: Sequence[Rows]) -> None:
        """Updates the log time from committed batches."""
        for piece in pieces:
            if piece.clock is None or not piece.batch.ranges:
                continue
            if self._sweeper is None:
                self._sweeper = self._open()
            for part, (_, end_ms) in zip(piece.batch.ranges, piece.clock.believed, strict=True):
                self._clocks[part.source] = end_ms
            self._noted = True

    @property
    def due_s(self) -> float | None:
        """The monotonic time from which `sweep` has something to do; None if log time must advance first."""
        sweeper = self._sweeper
        if sweeper is None or not self._clocks or (sweeper.resting and not self._noted):
            return None
        return sweeper.due_s

    @property
    def log_time_ms(self) -> int:
        """The log time of everything committed; valid only after a batch was noted."""
        return clock_of_all(self._clocks, self._reach_ms)

    def sweep(self) -> None:
        """Checks some users, and removes what no row can use; a full store is logged and is not fatal."""
        metrics, sweeper = self._metrics, self._sweeper
        assert sweeper is not None
        try:
            removed = sweeper.sweep(self.log_time_ms)
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
    def freeing_space(self) -> Iterator[None]:
        """Wraps a commit: if the store is full, sweeps many users and re-raises, so that the commit is tried again."""
        try:
            yield
        except StoreFull:
            self._sweeper = self._sweeper or self._open()
            if self._clocks:
                # Events that cannot be removed now are removed by a later sweep.
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
        return Sweeper(store, self._reach_ms, settings.history.max_users, self._context.profiler.forget)


class Committer:
    """Commits cuts in the order in which they arrive. Not thread-safe, except for `show`."""

    def __init__(self, context: StreamContext) -> None:
        self._context = context
        self._show_due_s = 0.0
        self._sweep = StreamSweep(context, context.metrics)
        self._unshown = False
        self._showing = threading.Lock()
        self._group_fails = False
        self._faults: tuple[str, ...] = ()
        self._truncated = truncated_columns(context.spec.names)

    def commit(self, cuts: Sequence[Cut]) -> None:
        """Writes and commits `cuts`; durable in Kafka and visible in the store when it returns.

        Raises:
            CorruptStore: The store lacks a waiting impression.
            PositionConflict: Another process moved the store's positions.
            StoreFull: The store or its disk is full, and the stream was asked to stop.
            LogError: The cluster refused; or the broker is unreachable and the stream was asked to stop.
        """
        context = self._context
        killpoints.reach("stream.taken")
        begun_s = time.perf_counter()
        waiting: Changes = {}
        extra: Extra = {}
        cuts = [
            replace(cut, pieces=tuple(context.complete(piece, waiting, extra) for piece in cut.pieces)) for cut in cuts
        ]
        pieces = [piece for cut in cuts for piece in cut.pieces]
        ranges = merge_all(part for piece in pieces for part in piece.batch.ranges)
        context.room.wait_for(lambda: context.leaders.note(ranges, context.reader), WHAT)
        # 1.
        records = context.writer.write(cuts)
        killpoints.reach("stream.acknowledged")
        # 2.
        for piece in pieces:
            extra |= {} if piece.clock is None else piece.clock.state
        appends = merge_appends([piece.appends for piece in pieces])

        def store() -> None:
            with self._sweep.freeing_space():
                context.store.commit(appends, ranges, extra, waiting)

        context.room.wait_for(store, WHAT)
        killpoints.reach("stream.committed")
        for piece in pieces:
            context.profiler.committed(piece)
        CommitReport.of(pieces, records, time.perf_counter() - begun_s, self._truncated).count(context.metrics)
        self._unshown = True
        self._sweep.note(pieces)
        # 3.
        self.catch_up()

    @property
    def due_s(self) -> float | None:
        """The monotonic time from which `catch_up` has something to do; None if nothing was committed since."""
        due = [self._show_due_s] * self._unshown + ([] if self._sweep.due_s is None else [self._sweep.due_s])
        return min(due, default=None)

    def catch_up(self) -> None:
        """Shows what was committed, and sweeps some histories, if they are due."""
        now_s = time.monotonic()
        if self._unshown and now_s >= self._show_due_s:
            self.show()
            killpoints.reach("stream.grouped")
        if (sweep_s := self._sweep.due_s) is not None and now_s >= sweep_s:
            self._sweep.sweep()

    def show(self) -> None:
        """Sets the account's gauges and commits the group's offsets, as of the last commit; any thread may call it."""
        with self._showing:
            self._faults = accounts.show(self._context.store, self._context.metrics, self._faults)
            context = self._context
            try:
                context.reader.commit_group(accounts.positions_in(context.store, context.topic_id))
                self._unshown = self._group_fails = False
            # The next call tries again.
            except LogError as error:
                if not self._group_fails:
                    logger.warning("offsets of group %s are not up to date: %s", context.settings.kafka.group, error)
                self._unshown = self._group_fails = True
            self._show_due_s = time.monotonic() + SHOW_S
