"""The steps of a distributed job up to the rows: one keyed by source, which reads, and one keyed by bucket of users.

`Partitions` are the open partitions of one source. Once per bundle they are read for a moment, parsed, timed, and
divided into buckets:

    poll until the moment is over ─ parse ─ leave masked clicks out ─ follow the clock ─ divide
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, cast

import apache_beam as beam
from apache_beam.coders import BytesCoder
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import BagStateSpec, ReadModifyWriteStateSpec, TimerSpec, on_timer
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import Timestamp

from state.errors import GapError, RewoundLog, StoreError, TruncatedLog, UnreachableBroker
from state.events.parser import EventBatch, Parser
from state.features.mask import Mask
from state.log import PartitionBatch, Reader
from state.log.accepted_gaps import Accepted, how_to_go_on
from state.log.client import made_again
from state.log.follow import Position
from state.positions import Gap, Source
from state.process.environment import wall_ms
from state.registry.control import Control
from state.registry.controls import ControlPoll
from state.registry.log_line import FIRST_EPOCH, BranchSegment
from streaming import accounts
from streaming.alignment import AlignedReader
from streaming.distributed.bucket import BucketRows, Cells, Portion, decode, divide, encode, gathered, stored
from streaming.distributed.worker import JobPlan, JobWorker, worker_of
from streaming.event_clock import EventClock
from streaming.rows import in_order, leave_out
from streaming.steps import appended_ms

RESUME = "springtide stream --runner RUNNER --savepoint_path=PATH"
"""How a stopped job is resumed; `springtide flink status` shows the savepoint or checkpoint."""

REFRESH_S = 1.0
BUNDLE_BATCHES = 5  # batches of `stream.cut_rows` that a source collects at most
LEAST_S = 0.01  # for a source that is read after the moment of its bundle is over
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceReading:
    """How far one source has read: positions and clocks together.

    The engine stores it in the same checkpoint as the clicks that were emitted before it. Reading continues from it
    with the same watermark quorum, so each click gets the same clock again.

    Attributes:
        topic_id: The topic of clicks; empty before the first poll.
        next: By partition the next offset; a missing partition is read from its beginning.
        clocks: The state of the event clock, by name.
        log_epoch: The epoch of the training log that was written so far; 0 before the first poll.
        erased: The last erasure that was sent to all buckets.
        leaders: By partition the leader epoch of the record before `next`, if known: it shows whether the clicks were
            truncated since.
        accepted: The losses that operators accepted, oldest first.
    """

    topic_id: str = ""
    next: Mapping[int, int] = field(default_factory=dict)
    clocks: Mapping[str, bytes] = field(default_factory=dict)
    log_epoch: int = 0
    erased: int = 0
    leaders: Mapping[int, int] = field(default_factory=dict)
    accepted: tuple[Accepted, ...] = ()


@contextmanager
def _saying_how() -> Iterator[None]:
    try:
        yield
    except GapError as error:
        raise how_to_go_on(error, RESUME) from error


class Partitions:
    """The open partitions of one source, at the position `at` that the engine knows. One thread at a time uses it.

    1. A recreated topic is read from its beginning.
    2. Positions that were deleted unread count as a gap if an operator accepts it, else they are an error.
    3. A log that was truncated below a position is detected by the preceding leader epoch. It is filled if an operator
       accepts that, so no offset is read twice.

    Raises:
        GapError: Positions are gone, or used twice, and no operator accepted it.
        LogError: Kafka is not reachable, or the topic is missing.
    """

    def __init__(self, worker: JobWorker, source: int, reading: SourceReading) -> None:
        self._worker, self._source = worker, source
        self._settings = worker.settings
        self._parser = Parser(self._settings.events, worker.salt)
        self._control = ControlPoll(self._settings.registry_dir)
        self._resting = threading.Event()
        self.at = reading
        if not source:
            worker.report_dead_letters()
        self._clock = EventClock(reading.clocks.get)
        with _saying_how():
            self._open(reading)
        self._refresh_s = time.monotonic() + REFRESH_S

    def _open(self, reading: SourceReading) -> None:
        worker, now_ms = self._worker, wall_ms()
        kafka, consent = self._settings.kafka, worker.plan.consent
        with worker.log.topics() as topics:
            info, ends = topics.describe(kafka.clicks_topic), topics.ends(kafka.clicks_topic)
        # 1.
        if reading.topic_id not in ("", info.topic_id):
            logger.warning("topic %s was recreated: reading it from its beginning", kafka.clicks_topic)
            # The clock of all partitions continues.
            reading = replace(reading, topic_id="", next={}, leaders={})
        own_partitions = self._own(info.partitions)
        read_so_far = {partition: at for partition, at in reading.next.items() if partition in own_partitions}
        # 2.
        positions = {Source(info.topic_id, partition): at for partition, at in read_so_far.items()}
        gaps = accounts.missing(info.topic_id, positions, {partition: ends[partition] for partition in own_partitions})
        accepted = [*reading.accepted, *accounts.accept_gaps(gaps, consent, kafka.clicks_topic, now_ms)]
        at = read_so_far | {gap.source.partition: gap.next for gap in gaps}
        leaders = {
            partition: epoch
            for partition, epoch in reading.leaders.items()
            if at.get(partition, -1) == read_so_far.get(partition)
        }

        # 3.
        def accept(lost: TruncatedLog) -> None:
            accepted.extend(accounts.newly_accepted(accepted, consent, now_ms, lost))

        position = Position(info.topic_id, at, leaders)
        reader = accounts.open_clicks(worker.log, kafka, own_partitions, position, accept) if own_partitions else None
        worker.metrics.gaps_accepted.inc(len(accepted) - len(reading.accepted))
        self._topic_id, self._gaps, self._reading = info.topic_id, gaps, replace(reading, accepted=tuple(accepted))
        self._follow(reader)

    def _own(self, partitions: int) -> list[int]:
        """The partitions of this source, of a topic with `partitions` of them."""
        return [*range(self._source, partitions, self._settings.stream.sources)]

    def _follow(self, reader: Reader | None) -> None:
        clock, topic_id = self._clock, self._topic_id
        self._reader: Reader | None = reader
        self._aligned: AlignedReader | None = None
        if reader is not None:
            self._aligned = AlignedReader(reader, lambda partition: clock.reached(Source(topic_id, partition)))

    def read(self, moment_s: float) -> tuple[list[Portion], SourceReading | None]:
        """The clicks of a moment by bucket, and the new reading; empty and None if nothing is new.

        Raises:
            GapError, LogError: As at opening; or the topic was recreated.
            RewoundLog: Control requests an older position of the log.
        """
        control = self._control.poll()
        log_epoch = self._epoch(control)
        with _saying_how():
            batches = self._poll(moment_s)
        # Buckets without clicks must apply erasures, too.
        erased = self._reading.erased if control is None else control.erased.last
        if not batches and not self._gaps and erased == self._reading.erased:
            return [], None
        now_ms = wall_ms()
        mask = Mask.NONE if control is None else control.mask
        events = leave_out(self._events(batches), mask)
        events, clock = in_order(events, self._clock.follow(events, events.ranges, now_ms))
        ends = {part.source.partition: part.next for part in events.ranges}
        after = replace(
            self._reading,
            topic_id=self._topic_id,
            next={**self._reading.next, **ends},
            clocks={**self._reading.clocks, **clock.state},
            log_epoch=log_epoch,
            erased=erased,
            leaders=self._leaders(self._reading.leaders, ends),
        )
        generation = 0 if control is None else control.generation
        newest_ms = max((appended_ms(batch, now_ms) for batch in batches), default=0)
        parts = divide(events, clock, self._settings.stream.buckets)
        self.at = self._reading = after
        return [Portion(*part, generation, log_epoch, newest_ms) for part in parts], after

    def _leaders(self, stored: Mapping[int, int], at: Mapping[int, int]) -> dict[int, int]:
        """By partition, the leader epoch of the record before a position; a known one only at the same position."""
        reader = self._reader
        epochs = {
            number: -1 if reader is None else reader.leader_epoch(number, offset) for number, offset in at.items()
        }
        return {number: epoch for number, epoch in {**stored, **epochs}.items() if epoch >= 0}

    @property
    def at_end(self) -> bool:
        """Whether everything was read, if reading ends at all."""
        until, reader = self._worker.plan.until, self._reader
        if until is None or reader is None:
            return until is not None
        return all(reader.position(number) >= until.get(number, 0) for number in reader.partitions)

    def close(self) -> None:
        """Closes the reader."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _epoch(self, control: Control | None) -> int:
        """The epoch of the log to write; reading continues only if it has not passed the branch point."""
        own_epoch = self._reading.log_epoch
        branch = () if control is None else control.log
        now = branch[-1].epoch if branch else (own_epoch or FIRST_EPOCH)
        if own_epoch in (0, now):
            return now
        if own_epoch > now:
            raise StoreError(
                f"the job belongs to epoch {own_epoch} of the training log, but control has epoch {now}: this is another registry, or an "
                "older copy of it",
                "restore the registry, or start the job without a savepoint",
            )
        ahead = sorted(
            {reached for segment in branch if segment.epoch > own_epoch for reached in self._ahead_of(segment)}
        )
        if ahead:
            raise RewoundLog(
                f"the training log branched into epoch {now} before what this job has read: partition "
                + ", ".join(f"{partition} at {at}" for partition, at in ahead),
                "stop the job without a savepoint, and resume it from a savepoint or checkpoint that had read no further "
                "than that. Without one, start it from scratch: it reads the clicks from their beginning, and readers drop "
                "the records that they have",
            )
        logger.info("epoch %d of the training log is written from here on", now)
        return now

    def _ahead_of(self, segment: BranchSegment) -> list[tuple[int, int]]:
        marks = dict[int, int]()
        for source, offset in segment.sources:
            if source.topic_id == self._reading.topic_id:
                marks[source.partition] = min(offset, marks.get(source.partition, offset))
        return [
            (partition, marks.get(partition, 0))
            for partition, offset in self._reading.next.items()
            if offset > marks.get(partition, 0)
        ]

    def _poll(self, moment_s: float) -> list[PartitionBatch]:
        aligned, until = self._aligned, self._worker.plan.until
        batches: list[PartitionBatch] = []
        ends_s = time.monotonic() + moment_s
        if aligned is None:
            self._resting.wait(moment_s)
        else:
            aligned.begin(BUNDLE_BATCHES * self._settings.stream.cut_rows)
            while not aligned.is_done and (rest_s := ends_s - time.monotonic()) > 0:
                # With an end of reading, the last batch may reach beyond it.
                batches += [
                    batch
                    for batch in aligned.poll(rest_s)
                    if until is None or batch.first < until.get(batch.partition, 0)
                ]
                if self.at_end:
                    break
        if time.monotonic() >= self._refresh_s:
            self._refresh_s = time.monotonic() + REFRESH_S
            self._take_new_partitions()
        return batches

    def _events(self, batches: Sequence[PartitionBatch]) -> EventBatch:
        events = self._parser.parse(batches)
        gaps, self._gaps = accounts.as_ranges(self._gaps), list[Gap]()
        if gaps:
            # Gaps come first, so that later ranges continue from them.
            events = replace(events, ranges=(*gaps, *events.ranges), source=events.source + len(gaps))
        return gathered(events)

    def _take_new_partitions(self) -> None:
        """Reopens the reader if the topic has more partitions of this source; these are read from their beginning."""
        reader, topic = self._reader, self._settings.kafka.clicks_topic
        at = {} if reader is None else {number: reader.position(number) for number in reader.partitions}
        # An unreachable broker costs only time.
        with suppress(UnreachableBroker):
            with self._worker.log.topics() as topics:
                info = topics.describe(topic)
            if info.topic_id != self._topic_id:
                raise made_again(topic, self._topic_id, info.topic_id)
            own_partitions = self._own(info.partitions)
            if len(own_partitions) > len(at):
                logger.info("reading new partitions of %s: %s", topic, sorted({*own_partitions} - {*at}))
                self._follow(self._worker.log.reader(topic, own_partitions, at, leaders=self._leaders({}, at)))
                if reader is not None:
                    reader.close()


class WorkerStep(beam.DoFn):
    """A step that uses the process's worker."""

    def __init__(self, plan: JobPlan) -> None:
        super().__init__()
        self._plan = plan

    @property
    def worker(self) -> JobWorker:
        """The worker of this process."""
        return worker_of(self._plan)


class ReadPartitions(WorkerStep):
    """Reads the partitions of a source for a moment and emits each bucket's portion; repeats this in the next bundle.

    Keyed by source. The reading and the timer of the next bundle are state of the key. With the emitted portions they
    are one checkpoint of the engine.
    """

    READING = ReadModifyWriteStateSpec("reading", BytesCoder())
    AGAIN = TimerSpec("again", TimeDomain.REAL_TIME)

    def start_bundle(self) -> None:
        """Begins a moment, which all sources of the bundle share."""
        self._ends_s = time.monotonic() + self.worker.settings.stream.cut_ms / 1000

    def process(
        self,
        element: tuple[int, bytes],
        again: Any = beam.DoFn.TimerParam(AGAIN),  # noqa: B008  # Beam reads the default
    ) -> None:
        """Wakes the source; does nothing if it is awake."""
        again.set(Timestamp.now())

    @on_timer(AGAIN)
    def read(
        self,
        source: Any = beam.DoFn.KeyParam,
        state: Any = beam.DoFn.StateParam(READING),  # noqa: B008  # Beam reads the defaults
        again: Any = beam.DoFn.TimerParam(AGAIN),  # noqa: B008
    ) -> Iterator[TimestampedValue[tuple[int, bytes]]]:
        """Yields `(bucket, bytes of a portion)`, in the order of the log for each bucket."""
        worker = self.worker
        partitions = self._open(worker, source, stored(state, SourceReading))
        try:
            portions, after = partitions.read(max(LEAST_S, self._ends_s - time.monotonic()))
        except BaseException:
            partitions.close()
            raise
        if after is not None:
            state.write(encode(after))
        now = Timestamp.now()
        if partitions.at_end:
            partitions.close()
        else:
            worker.keep_reading(source, partitions)
            again.set(now)
        # Prism delivers the elements of a key by timestamp.
        for bucket, portion in enumerate(portions):
            yield TimestampedValue((bucket, encode(portion)), now)

    def _open(self, worker: JobWorker, source: int, begin: SourceReading) -> Partitions:
        kept_reading = cast(Partitions | None, worker.take_reading(source))
        if kept_reading is not None and kept_reading.at != begin:
            kept_reading.close()
            kept_reading = None
        return kept_reading or Partitions(worker, source, begin)


class UpdateBuckets(WorkerStep):
    """Makes the rows of a bucket's users; keyed by bucket, whose state the engine keeps."""

    HEAD = ReadModifyWriteStateSpec("head", BytesCoder())
    SNAPSHOT = BagStateSpec("snapshot", BytesCoder())
    DELTAS = BagStateSpec("deltas", BytesCoder())

    def process(
        self,
        element: tuple[int, bytes],
        head: Any = beam.DoFn.StateParam(HEAD),  # noqa: B008  # Beam reads the defaults
        snapshot: Any = beam.DoFn.StateParam(SNAPSHOT),  # noqa: B008
        deltas: Any = beam.DoFn.StateParam(DELTAS),  # noqa: B008
    ) -> Iterator[BucketRows]:
        """Yields the rows of a portion."""
        bucket, value = element
        worker, portion = self.worker, decode(value, Portion)
        cells, mask = Cells(head, snapshot, deltas), worker.mask_of(portion.control)
        yield worker.buckets.take(bucket, portion, cells, mask, worker.join)
