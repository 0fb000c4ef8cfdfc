"""The Beam steps of the stream up to the rows: clicks are read, become events, and events become rows."""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import apache_beam as beam
import numpy as np
from apache_beam.io.iobase import RestrictionProgress, RestrictionTracker
from apache_beam.transforms.core import RestrictionProvider

from state.errors import UnreachableBroker
from state.events.parser import EventBatch
from state.log import PartitionBatch
from state.microbatch.batch import TOLERANCE_MS
from state.positions import Source
from state.process.environment import wall_ms
from streaming.alignment import AlignedReader
from streaming.context import JobContext, StreamContext
from streaming.rows import Rows

Context = TypeVar("Context", covariant=True)
Owned = TypeVar("Owned")


@dataclass
class _Open:
    context: Any
    failure: BaseException | None = None


_open: dict[int, _Open] = {}
_numbers = itertools.count()


class Handle(Generic[Context]):
    """A picklable reference to a context that this process has open."""

    def __init__(self, number: int) -> None:
        self._number = number

    @property
    def context(self) -> Context:
        """The context that the handle refers to."""
        context: Context = _open[self._number].context
        return context

    @contextmanager
    def watched(self) -> Iterator[Context]:
        """Yields the context, and records the first exception that leaves the block."""
        opened = _open[self._number]
        try:
            yield opened.context
        except Exception as error:
            opened.failure = opened.failure or error
            raise

    @contextmanager
    def as_raised(self) -> Iterator[None]:
        """Wraps the run of a job: re-raises the original exception that left a `watched` block of a step."""
        try:
            yield
        # Beam turns an exception of a step into a RuntimeError with the traceback as text.
        except RuntimeError as error:
            raise _open[self._number].failure or error from None


@contextmanager
def opened(context: Owned) -> Iterator[Handle[Owned]]:
    """Registers `context` for the block, and yields the handle by which the steps of a job reach it."""
    number = next(_numbers)
    _open[number] = _Open(context)
    try:
        yield Handle(number)
    finally:
        del _open[number]


class Step(beam.DoFn, Generic[Context]):
    """A step of a job that uses the process's context."""

    def __init__(self, handle: Handle[Context]) -> None:
        super().__init__()
        self.handle = handle


class ParseEvents(Step[JobContext]):
    """Parses each list of partition batches into one `EventBatch`; see `JobContext.parse`."""

    def process(self, batches: list[PartitionBatch]) -> Iterator[EventBatch]:
        """Yields the events of one poll."""
        with self.handle.watched() as context:
            events = context.parse(batches)
        yield events


class UpdateProfiles(Step[StreamContext]):
    """Turns events into rows; see `JobContext.make_rows`."""

    def process(self, batch: EventBatch) -> Iterator[Rows]:
        """Yields the rows of one batch; an empty batch is passed on."""
        with self.handle.watched() as context:
            rows = context.make_rows(batch, wall_ms())
        yield rows


logger = logging.getLogger(__name__)

UPKEEP_S = 1.0
LATEST_RECORDS = 15


class _UntilStopped(RestrictionTracker):
    """An unbounded restriction that is done when the process was asked to end the job; it never splits."""

    def __init__(self) -> None:
        self._done = False

    def current_restriction(self) -> bool:
        return True

    def current_progress(self) -> RestrictionProgress:
        return RestrictionProgress(fraction=float(self._done))

    def try_claim(self, stopping: bool) -> bool:
        """Whether one more poll may begin."""
        self._done = self._done or stopping
        return not self._done

    def try_split(self, fraction_of_remainder: float) -> None:
        """Refuses: the partitions belong to one process."""

    def check_done(self) -> None:
        if not self._done:
            raise ValueError("reading ended without a request to stop")

    def is_bounded(self) -> bool:
        return False


class _Forever(RestrictionProvider):
    def initial_restriction(self, element: Any) -> bool:
        return True

    def create_tracker(self, restriction: bool) -> _UntilStopped:
        return _UntilStopped()

    def restriction_size(self, element: Any, restriction: bool) -> int:
        return 1


class ClickReader:
    """Polls the partitions; once a second it finds new ones and updates the lag metrics. For the Beam thread only."""

    def __init__(self, context: StreamContext) -> None:
        self._context = context
        self._due_s = 0.0
        self._lag = Lag()
        self._unreachable = False
        # Before the next poll, everything read has become rows, so the clock includes it.
        clock, topic_id = context.clock, context.topic_id
        self._reader = AlignedReader(context.reader, lambda partition: clock.reached(Source(topic_id, partition)))

    def poll(self, timeout_s: float) -> list[PartitionBatch]:
        """Returns the next batches, in order within a partition and of similar event times; none after `timeout_s` without one.

        It returns with the first click: a fetch waits for it at the broker.

        Raises:
            LogError: Positions are gone, or the broker stays unreachable.
        """
        stream = self._context.settings.stream
        self._reader.begin(stream.cut_rows)
        batches = self._reader.poll(timeout_s)
        for batch in batches:
            received_ms = appended_ms(batch, wall_ms())
            self._lag.note(Source(batch.topic_id, batch.partition), batch.first, batch.next, received_ms)
        now_s = time.monotonic()
        if now_s >= self._due_s:
            self._due_s = now_s + UPKEEP_S
            self._do_upkeep()
        return batches

    def _do_upkeep(self) -> None:
        context, reader = self._context, self._context.reader
        try:
            for partition in reader.refresh():
                logger.info("reading new partition %d of %s", partition, context.settings.kafka.clicks_topic)
            unread = sum(reader.lag().values())
            self._unreachable = False
        # A temporary outage of the broker only costs time, here as in poll.
        except UnreachableBroker as error:
            if not self._unreachable:
                logger.warning("new partitions and lag are unknown for now: %s", error)
            self._unreachable = True
            return
        waiting = unread + self._lag.uncommitted(context.store.positions())
        context.metrics.lag_events.set(waiting)
        context.metrics.lag_seconds.set(self._lag.seconds(time.time()) if waiting else 0.0)


def appended_ms(batch: PartitionBatch, now_ms: int) -> int:
    """When Kafka received the newest record of a batch, ms; 0 for none.

    A producer may set any timestamp, so one that is far ahead of the others is ignored.
    """
    last = batch.timestamps_ms[-LATEST_RECORDS:]
    return min(int(last[last <= np.median(last) + TOLERANCE_MS].max()), now_ms) if len(last) else 0


class Lag:
    """How far the commits are behind the log, computed from positions that were read and not committed.

    >>> lag, zero = Lag(), Source("ab" * 16, 0)
    >>> lag.note(zero, 0, 4, newest_ms=1000); lag.note(zero, 4, 6, newest_ms=3000)
    >>> lag.uncommitted({zero: 4}), lag.seconds(now_s=5.0)
    (2, 4.0)
    """

    def __init__(self) -> None:
        self._read: dict[Source, deque[tuple[int, int]]] = {}
        self._begun: dict[Source, int] = {}
        self._newest_ms = 0

    def note(self, source: Source, first: int, after: int, newest_ms: int) -> None:
        """Adds the range `[first, after)` that was read; Kafka received its newest record at `newest_ms` (0: none)."""
        self._begun.setdefault(source, first)
        self._read.setdefault(source, deque()).append((after, newest_ms))

    def uncommitted(self, committed: dict[Source, int]) -> int:
        """Number of positions read and not committed; removes the committed ones."""
        waiting = 0
        for source, positions in self._read.items():
            next_offset = committed.get(source, self._begun[source])
            last = positions[-1][0] if positions else next_offset
            while positions and positions[0][0] <= next_offset:
                self._newest_ms = max(self._newest_ms, positions.popleft()[1])
            waiting += max(0, last - next_offset)
        return waiting

    def seconds(self, now_s: float) -> float:
        """Wall time since Kafka received the newest committed click; 0 before the first one."""
        return max(0.0, now_s - self._newest_ms / 1000) if self._newest_ms else 0.0


class ReadClicks(Step[StreamContext]):
    """The unbounded element: yields lists of `PartitionBatch`, empty if nothing arrived, until asked to stop."""

    @beam.DoFn.unbounded_per_element()
    def process(
        self,
        element: bytes,
        tracker: Any = beam.DoFn.RestrictionParam(_Forever()),  # noqa: B008  # Beam reads the default
    ) -> Iterator[list[PartitionBatch]]:
        """Polls until the process was asked to stop, or control has changed."""
        context = self.handle.context
        clicks, stream, cutter = ClickReader(context), context.settings.stream, context.cutter
        while tracker.try_claim(context.stopping.is_set() or context.watch.changed()):
            timeout_s = cutter.poll(1000 * time.monotonic()) / 1000
            with self.handle.watched():
                batches = clicks.poll(timeout_s)
            returned_s = time.monotonic()
            # All downstream steps run before the generator continues.
            yield batches
            now_s = time.monotonic()
            context.metrics.busy_seconds.inc(now_s - returned_s)
            if 0 < sum(map(len, batches)) < stream.cut_rows:
                # At the end of the log a poll returns with the next click, so this waits for more clicks.
                context.stopping.wait(cutter.wait_ms(1000 * now_s, 1000 * returned_s) / 1000)
