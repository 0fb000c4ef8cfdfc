"""Micro-batches and dead letters out, then histories and positions committed.

The commit sequence, for all the cuts that are queued at that moment:

    1. One Kafka transaction with their micro-batches and dead letters.
    2. One commit of the store: histories, rows that wait, next offsets, counters.
    3. Once a second the offsets of the consumer group, for lag tools; nothing is read from there.

A crash before 1 is acknowledged leaves nothing. Between 1 and 2 the rows are
written again after the restart, with the same positions, and every reader of
the micro-batch log trims them. After 2 nothing is written again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import apache_beam as beam

from state.errors import LogError, UnreachableBroker
from state.events.dead_letters import DeadLetter
from state.positions import UNPLACED
from state.process import killpoints
from streaming import accounts
from streaming.cut import Cut, Cutter, encode_cut, merge_all, merge_appends
from streaming.rows import Rows
from streaming.shard import Shard, current, open_writer

logger = logging.getLogger(__name__)

# One cut is written while two wait; more would only make answers older.
QUEUED_CUTS = 2
GROUP_S = 1.0

Headers = list[tuple[str, bytes]]


def letter_headers(letter: DeadLetter) -> Headers:
    """The coordinates and the reason of a dead letter; never its key, which is a user's id."""
    return [
        ("reason", str(letter.reason).encode()),
        ("topic_id", letter.source.topic_id.encode()),
        ("partition", str(letter.source.partition).encode()),
        ("offset", str(letter.offset).encode()),
    ]


class CommitThread:
    """Writes and commits cuts in the order in which they were put, in a thread of its own.

    `put`, `flush` and `close` are called by the Beam thread. An exception ends
    the thread and surfaces in the next call of `put`, `check` or `flush`.

    Args:
        shard: What the process owns.
    """

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._queue: deque[Cut] = deque()
        self._changed = threading.Condition()
        self._busy = False
        self._closing = False
        self._failure: BaseException | None = None
        self._sync_due_s = time.monotonic() + shard.settings.stream.sync_s
        self._group_due_s = 0.0
        self._group_fails = False
        self._faults: tuple[str, ...] = ()
        self._truncated = [index for index, name in enumerate(shard.spec.names) if name == "truncated"]
        self._thread = threading.Thread(target=self._run, name="commit", daemon=True)
        self._thread.start()

    def put(self, cut: Cut) -> None:
        """Queues a cut; waits while two are queued, which holds back the reading of clicks.

        Raises:
            SpringtideError: What ended the thread.
        """
        self._wait(lambda: len(self._queue) < QUEUED_CUTS)
        with self._changed:
            self._queue.append(cut)
            self._changed.notify_all()

    def check(self) -> None:
        """Raises what ended the thread, if anything did."""
        if self._failure is not None:
            raise self._failure

    def flush(self) -> None:
        """Returns when all that was put is committed, and the group's offsets say so.

        Raises:
            SpringtideError: What ended the thread.
        """
        self._wait(lambda: not self._queue and not self._busy)
        self._show_group()

    def close(self) -> None:
        """Ends the thread after the commit at hand; queued cuts are dropped and read again later."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _wait(self, until: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or until())
        self.check()

    def _run(self) -> None:
        try:
            while cuts := self._take():
                self._commit(cuts)
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
        # The edge of the thread: kept, and raised again in the Beam thread.
        except BaseException as failure:  # noqa: BLE001
            with self._changed:
                self._failure = failure
                self._changed.notify_all()

    def _take(self) -> list[Cut]:
        """Waits for cuts and takes all of them; none when the thread should end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            if self._closing:
                return []
            cuts = list(self._queue)
            self._queue.clear()
            self._busy = True
            self._changed.notify_all()
            return cuts

    def _commit(self, cuts: Sequence[Cut]) -> None:
        """Writes and commits `cuts`; durable in Kafka and visible in the store when it returns."""
        shard, stream = self._shard, self._shard.settings.stream
        killpoints.reach("stream.taken")
        begun_s = time.perf_counter()
        waiting: Mapping[bytes, bytes | None] = {}
        extra: Mapping[str, bytes] = {}
        if shard.labels is not None:
            cuts, waiting, extra = shard.labels.look_up(cuts)
        pieces = [piece for cut in cuts for piece in cut.pieces]
        values = [
            value
            for cut in cuts
            for value in encode_cut(cut, shard.spec.digest, shard.salt, stream.cut_rows, stream.max_record_bytes)
        ]
        letters = [letter for piece in pieces for letter in piece.batch.dead]
        # 1.
        self._write(values, letters, cuts[-1].created_ms)
        killpoints.reach("stream.acknowledged")
        # 2.
        ranges = merge_all(part for piece in pieces for part in piece.batch.ranges)
        shard.store.commit(merge_appends([piece.appends for piece in pieces]), ranges, extra, waiting)
        killpoints.reach("stream.committed")
        shard.committed = {**shard.committed, **{part.source: part.next for part in ranges}}
        for piece in pieces:
            shard.profiler.committed(piece)
        shard.metrics.commit_seconds.observe(time.perf_counter() - begun_s)
        self._count(pieces, letters, len(values))
        # 3.
        if time.monotonic() >= self._group_due_s:
            self._faults = accounts.show(shard.store, shard.metrics, self._faults)
            self._show_group()
            killpoints.reach("stream.grouped")
        if time.monotonic() >= self._sync_due_s:
            shard.store.sync()
            self._sync_due_s = time.monotonic() + stream.sync_s

    def _write(self, values: Sequence[bytes], letters: Sequence[DeadLetter], created_ms: int) -> None:
        """One acknowledged transaction, whatever time the broker is away.

        Where the outcome of one is unknown its records are written again with
        a writer that first ends the old transaction: what was visible then
        comes twice, with the same positions, as after a crash.

        Raises:
            LogError: The cluster refused; or the broker is away and the stream was asked to stop.
        """
        shard, kafka = self._shard, self._shard.settings.kafka
        while True:
            try:
                with shard.writer.transaction():
                    for value in values:
                        shard.writer.send(kafka.microbatches_topic, 0, None, value, [], created_ms)
                    for letter in letters:
                        shard.writer.send(kafka.dead_letters_topic, 0, None, b"", letter_headers(letter), created_ms)
                    killpoints.reach("stream.sent")
                return
            except UnreachableBroker as error:
                if shard.stopping.is_set():
                    raise
                logger.warning("%s; these rows are written again as soon as it is back", error)
                self._reopen()

    def _reopen(self) -> None:
        """Takes a new writer, once a broker answers."""
        shard = self._shard
        shard.writer.close(0.0)
        while True:
            try:
                shard.writer = open_writer(shard.settings)
                break
            except UnreachableBroker:
                if shard.stopping.is_set():
                    raise
        shard.closing.callback(shard.writer.close)
        logger.info("the broker is back")

    def _show_group(self) -> None:
        """Tells Kafka the committed offsets of this topic; a failure is logged once and stops nothing."""
        shard = self._shard
        positions = {
            source.partition: after for source, after in shard.committed.items() if source.topic_id == shard.topic_id
        }
        try:
            shard.reader.commit_group(positions)
            self._group_fails = False
        except LogError as error:
            if not self._group_fails:
                logger.warning("offsets of group %s are not up to date: %s", shard.settings.kafka.group, error)
            self._group_fails = True
        self._group_due_s = time.monotonic() + GROUP_S

    def _count(self, pieces: Sequence[Rows], letters: Sequence[DeadLetter], records: int) -> None:
        """Adds what was committed to the metrics."""
        metrics = self._shard.metrics
        metrics.microbatches.inc(records)
        outcomes: Counter[str] = Counter()
        for piece in pieces:
            for part in piece.batch.ranges:
                outcomes.update(part.outcomes)
            for index in self._truncated:
                metrics.truncated_histories.inc(int((piece.features[:, index] > 0).sum()))
        for outcome in outcomes.keys() - UNPLACED:
            metrics.events.labels(outcome).inc(outcomes[outcome])
        for reason, count in Counter(str(letter.reason) for letter in letters).items():
            metrics.dead_letters.labels(reason).inc(count)
        metrics.microbatch_rows.observe(sum(map(len, pieces)) / records)


class WriteMicroBatches(beam.DoFn):
    """Cuts by rows and time and hands the cuts to the commit thread; yields nothing."""

    _cutter: Cutter
    _commits: CommitThread

    def setup(self) -> None:
        """Starts the commit thread; Beam calls it once, for one process has one bundle."""
        shard = current()
        self._cutter = Cutter(shard.settings.stream.cut_rows, shard.settings.stream.cut_ms)
        self._commits = CommitThread(shard)
        shard.closing.callback(self._commits.close)

    def process(self, rows: Rows) -> Iterator[None]:
        """Takes a batch; an empty one tells the time."""
        with current().watch():
            self._commits.check()
            for cut in self._cutter.add(rows, time.time_ns() // 1_000_000):
                self._commits.put(cut)
        yield from ()

    def finish_bundle(self) -> None:
        """At a clean stop: commits what is gathered."""
        with current().watch():
            for cut in self._cutter.flush(time.time_ns() // 1_000_000):
                self._commits.put(cut)
            self._commits.flush()
