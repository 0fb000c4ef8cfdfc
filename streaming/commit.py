"""The commit sequence of the stream: writes micro-batches and dead letters, then commits histories and positions.

For all the cuts that are queued at that moment:

    1. One Kafka transaction with their micro-batches and dead letters.
    2. One commit of the store: histories, waiting rows, clocks, next offsets, counters.
    3. Once a second, the gauges of the account, and the offsets of the consumer group for lag tools; they are never
       read back. From time to time, some users' histories are swept.

The store is synced only at a clean stop. A store that was open during a power failure is rebuilt, whatever had reached
the disk.

When clicks stop arriving, step 3 runs once more, so that the idle metrics match what is committed.

A crash before step 1 is acknowledged leaves nothing. After a crash between 1 and 2 the rows are written again at the
restart, with the same positions, and every reader of the micro-batch log drops the duplicates. After 2 nothing is
written again. If the disk has no space for 2, it waits, and so holds back the reading of clicks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from state.errors import LogError
from state.events.dead_letters import Reason
from state.metrics import StreamMetrics
from state.positions import UNPLACED
from state.process import killpoints
from streaming import accounts
from streaming.context import StreamContext
from streaming.cut import Cut, merge_all, merge_appends
from streaming.event_clock import OffClock
from streaming.rows import Rows
from streaming.sweeping import StreamSweep
from streaming.writer import count_letters

logger = logging.getLogger(__name__)

SHOW_S = 1.0
WHAT = "the stream"


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
        self._truncated = [index for index, name in enumerate(context.spec.names) if name == "truncated"]

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
        waiting: Mapping[bytes, bytes | None] = {}
        extra: dict[str, bytes] = {}
        if context.labels is not None:
            cuts, waiting, extra = context.labels.look_up(cuts)
        pieces = [piece for cut in cuts for piece in cut.pieces]
        ranges = merge_all(part for piece in pieces for part in piece.batch.ranges)
        context.room.wait_for(lambda: context.leaders.note(ranges, context.reader), WHAT)
        # 1.
        records = context.writer.write(cuts)
        killpoints.reach("stream.acknowledged")
        # 2.
        for piece in pieces:
            extra |= {} if piece.told is None else piece.told.state
        appends = merge_appends([piece.appends for piece in pieces])

        def store() -> None:
            with self._sweep.making_room():
                context.store.commit(appends, ranges, extra, waiting)

        context.room.wait_for(store, WHAT)
        killpoints.reach("stream.committed")
        for piece in pieces:
            context.profiler.committed(piece)
        context.metrics.commit_seconds.observe(time.perf_counter() - begun_s)
        self._count(pieces, records)
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
        """Shows what was committed and sweeps some histories, if each is due."""
        now_s = time.monotonic()
        if self._unshown and now_s >= self._show_due_s:
            self.show()
            killpoints.reach("stream.grouped")
        if (sweep_s := self._sweep.due_s) is not None and now_s >= sweep_s:
            self._sweep.look()

    def show(self) -> None:
        """Sets the gauges of the account and commits the consumer group's offsets to Kafka, as of the last commit.

        Any thread may call it.
        """
        with self._showing:
            self._faults = accounts.show(self._context.store, self._context.metrics, self._faults)
            # If the group's offsets were not committed, the next call tries again.
            self._unshown = not self._told_group()
            self._show_due_s = time.monotonic() + SHOW_S

    def _told_group(self) -> bool:
        """Commits this topic's offsets of the consumer group; a failure is logged once and is not fatal."""
        context = self._context
        try:
            context.reader.commit_group(accounts.positions_in(context.store, context.topic_id))
            self._group_fails = False
        except LogError as error:
            if not self._group_fails:
                logger.warning("offsets of group %s are not up to date: %s", context.settings.kafka.group, error)
            self._group_fails = True
        return not self._group_fails

    def _count(self, pieces: Sequence[Rows], records: int) -> None:
        """Adds the committed rows to the metrics."""
        metrics = self._context.metrics
        metrics.microbatches.inc(records)
        outcomes: Counter[str] = Counter()
        for piece in pieces:
            for part in piece.batch.ranges:
                outcomes.update(part.outcomes)
            for index in self._truncated:
                metrics.truncated_histories.inc(int((piece.vectors.features[:, index] > 0).sum()))
            count_letters(metrics, piece.batch.dead)
            for off in off_clocks(piece):
                show_off_clock(metrics, off)
        for outcome in outcomes.keys() - UNPLACED:
            metrics.events.labels(outcome).inc(outcomes[outcome])
        metrics.microbatch_rows.observe(sum(map(len, pieces)) / records)


def off_clocks(piece: Rows) -> list[OffClock]:
    """The wrong clocks in a batch; the newest refused click stands for all refused ones."""
    refused = [one for one in piece.batch.dead if one.reason is Reason.IMPLAUSIBLE_TIME]
    found = [OffClock("refused", one.source.partition, one.offset, 0, len(refused)) for one in refused[-1:]]
    return [*found, *(() if piece.told is None else piece.told.off)]


def show_off_clock(metrics: StreamMetrics, off: OffClock) -> None:
    """Counts clicks with a wrong clock, and sets gauges to the newest of them."""
    metrics.clocks_off.labels(off.direction).inc(off.clicks)
    metrics.clock_off_partition.labels(off.direction).set(off.partition)
    metrics.clock_off_offset.labels(off.direction).set(off.offset)
    metrics.clock_off_seconds.labels(off.direction).set(off.by_ms / 1000)
    metrics.clock_off_time_seconds.labels(off.direction).set_to_current_time()
