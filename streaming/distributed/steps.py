"""The steps of a distributed job up to the rows: one keyed by source, which reads, and one keyed by bucket of users.

`Partitions` are the open partitions of one source. Once per bundle they are read for a moment, parsed, timed, and
divided into buckets:

    poll until the moment is over ─ parse ─ leave masked clicks out ─ follow the clock ─ divide

They stay open in their process from bundle to bundle. They are used again only if their position is exactly the one
in the engine's checkpoint.

`open_clicks` opens the clicks of a source at its position. It continues after losses that an operator accepted, and
never reads from an offset that is used twice:

1. The topic. A recreated topic is read from its beginning.
2. Positions that were deleted unread. They count as a gap if an operator accepts it, else they are an error.
3. The reader. A log that was cut back behind a position is detected by the preceding leader epoch. It is filled up if
   an operator accepts that.

A step that fails restarts its job from the last checkpoint, which meets the same loss. So the error says how to
continue.

`SourceReading` is how far a source has read: positions and clocks together. The engine stores it in the same
checkpoint as the clicks that were emitted before it. Reading continues from it with the same watermark quorum, so each
click gets the same clock again.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import apache_beam as beam
import numpy as np
from apache_beam.coders import BytesCoder
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import BagStateSpec, ReadModifyWriteStateSpec, TimerSpec, on_timer
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import Timestamp

from state.errors import GapError, RewoundLog, StoreError, TruncatedLog, UnreachableBroker
from state.events.parser import EventBatch, Parser
from state.features.mask import Mask
from state.log import PartitionBatch, Reader, accepted_gaps
from state.log.accepted_gaps import Accepted, how_to_go_on
from state.log.client import made_again
from state.log.follow import Position
from state.positions import Gap, Source
from state.process.wall_clock import wall_ms
from state.registry.control import Control
from state.registry.controls import ControlPoll
from state.registry.log_line import FIRST_EPOCH, Stretch
from streaming.accounts import as_ranges, missing, require_accepted
from streaming.alignment import AlignedReader
from streaming.distributed.bucket import BucketRows, Cells, take_portion
from streaming.distributed.buckets import Portion, decode, divide, encode, gathered, pack, unpack
from streaming.distributed.worker import JobPlan, JobWorker, worker_of
from streaming.event_clock import EventClock
from streaming.rows import in_order, leave_out
from streaming.steps import appended_ms
from streaming.truncation import fill, newly_accepted, open_behind

RESUME = "springtide stream --runner RUNNER --savepoint_path=PATH"
"""How a stopped job is resumed; `springtide flink status` shows the savepoint or checkpoint."""

REFRESH_S = 1.0
TOKEN_BYTES = 16
LEAST_S = 0.01  # for a source whose turn comes when the moment is over
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceReading:
    """How far one source has read.

    Attributes:
        topic_id: The topic of clicks; empty before the first poll.
        next: By partition the next offset; a missing partition is read from its beginning.
        clocks: The state of the event clock, by name.
        log_epoch: The epoch of the training log that was written so far; 0 before the first poll.
        erased: The last erasure that was sent to all buckets.
        leaders: By partition the leader epoch of the record before `next`, if known: it shows whether the clicks were
            cut back since.
        accepted: The losses that operators accepted, oldest first.
    """

    topic_id: str = ""
    next: Mapping[int, int] = field(default_factory=dict)
    clocks: Mapping[str, bytes] = field(default_factory=dict)
    log_epoch: int = 0
    erased: int = 0
    leaders: Mapping[int, int] = field(default_factory=dict)
    accepted: tuple[Accepted, ...] = ()

    def positions(self) -> dict[Source, int]:
        """By source the next offset."""
        return {Source(self.topic_id, partition): at for partition, at in self.next.items()}

    def to_bytes(self) -> bytes:
        """The bytes for the engine's state; equal readings have equal bytes."""
        head = {
            "topic_id": self.topic_id,
            "next": sorted(self.next.items()),
            "log_epoch": self.log_epoch,
            "erased": self.erased,
            "leaders": sorted(self.leaders.items()),
            "accepted": [one.to_json() for one in self.accepted],
        }
        clocks = {name: np.frombuffer(self.clocks[name], np.uint8) for name in sorted(self.clocks)}
        return pack(head, clocks)

    @classmethod
    def from_bytes(cls, value: bytes | None) -> SourceReading:
        """Decodes the result of `to_bytes`; None is a source that was never read.

        >>> from state.positions import Gap
        >>> lost = Accepted(Gap(Source("ab" * 16, 3), 5, 6), "ann", "retention", 9)
        >>> one = SourceReading("ab" * 16, {3: 7}, {"clock:all": b"12"}, 2, 1, {3: 4}, (lost,))
        >>> SourceReading.from_bytes(one.to_bytes()) == one
        True
        """
        if value is None:
            return cls()
        head, clocks = unpack(value)
        found = {name: one.tobytes() for name, one in clocks.items()}
        return cls(
            head["topic_id"],
            {int(one): int(at) for one, at in head["next"]},
            found,
            head["log_epoch"],
            head["erased"],
            {int(one): int(epoch) for one, epoch in head["leaders"]},
            tuple(map(Accepted.from_json, head["accepted"])),
        )


@dataclass(frozen=True)
class OpenedClicks:
    """The clicks of a source.

    Attributes:
        topic_id: The topic.
        reading: The position to read from, with the accepted losses.
        passed: The gaps before that; no bundle has reported them yet.
        reader: Of its partitions; None if it has none, until the topic grows.
    """

    topic_id: str
    reading: SourceReading
    passed: list[Gap]
    reader: Reader | None


def of_source(source: int, sources: int, partitions: int) -> list[int]:
    """The partitions that a source reads, including later ones.

    >>> of_source(1, 2, 5)
    [1, 3]
    """
    return [one for one in range(partitions) if one % sources == source]


def open_clicks(worker: JobWorker, source: int, reading: SourceReading) -> OpenedClicks:
    """Opens the clicks of a source.

    Raises:
        GapError: Positions are gone, or used twice, and no operator accepted it.
        LogError: Kafka is not reachable, or the topic is missing.
    """
    kafka, consent = worker.settings.kafka, worker.plan.consent
    now_ms = wall_ms()
    with telling_how(), worker.log.topics() as topics:
        # 1.
        info, ends = topics.describe(kafka.clicks_topic), topics.ends(kafka.clicks_topic)
        if reading.topic_id not in ("", info.topic_id):
            logger.warning("topic %s is another one than before: reading it from its beginning", kafka.clicks_topic)
            # The clock of all partitions continues.
            reading = replace(reading, topic_id="", next={}, leaders={})
        mine = of_source(source, worker.settings.stream.sources, info.partitions)
        known = {partition: at for partition, at in reading.next.items() if partition in mine}
        # 2.
        positions = replace(reading, topic_id=info.topic_id, next=known).positions()
        passed = missing(info.topic_id, positions, {one: ends[one] for one in mine})
        require_accepted(passed, consent, kafka.clicks_topic)
        accepted = [*reading.accepted, *(accepted_gaps.accept(gap, consent, now_ms) for gap in passed)]
        for gap in passed:
            logger.warning("gap accepted by %s (%s): %s", consent.actor, consent.reason, gap)
        at = known | {gap.source.partition: gap.next for gap in passed}
        leaders = {one: epoch for one, epoch in reading.leaders.items() if at.get(one, -1) == known.get(one)}

        # 3.
        def accepts(lost: TruncatedLog) -> None:
            accepted.extend(newly_accepted(accepted, consent, now_ms, lost))

        fills = partial(fill, kafka, topics, worker.log.writer)
        place = Position(info.topic_id, at, leaders)
        reader = open_behind(worker.log, kafka.clicks_topic, mine, place, accepts, fills) if mine else None
    worker.metrics.gaps_accepted.inc(len(accepted) - len(reading.accepted))
    return OpenedClicks(info.topic_id, replace(reading, accepted=tuple(accepted)), passed, reader)


@contextmanager
def telling_how() -> Iterator[None]:
    """Adds to the error of a loss how the job continues without the lost positions."""
    try:
        yield
    except GapError as error:
        raise how_to_go_on(error, RESUME) from error


class Partitions:
    """The open partitions of one source. One thread at a time uses it.

    Args:
        worker: Of this process.
        source: Its number.
        reading: The position at which it begins.

    Attributes:
        at: How far it is, as the engine knows it.

    Raises:
        GapError: Positions are gone, and no operator accepted it.
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
            worker.tell_letters()
        opened = open_clicks(worker, source, reading)
        self._topic_id, self._passed, self._reading = opened.topic_id, opened.passed, opened.reading
        self._clock = EventClock(opened.reading.clocks.get)
        self._follow(opened.reader)
        self._refresh_s = time.monotonic() + REFRESH_S

    def _follow(self, reader: Reader | None) -> None:
        """Reads on with `reader`, by the times up to which its partitions were read."""
        clock, topic_id = self._clock, self._topic_id
        self._reader: Reader | None = reader
        self._aligned: AlignedReader | None = None
        if reader is not None:
            self._aligned = AlignedReader(reader, lambda one: clock.reached(Source(topic_id, one)))

    def read(self, moment_s: float) -> tuple[list[Portion], SourceReading | None]:
        """The clicks of a moment by bucket, and the new reading; empty and None if nothing is new.

        Raises:
            GapError, LogError: As at opening; or the topic was recreated.
            RewoundLog: Control asks for an older position of the log.
        """
        control = self._control.poll()
        log_epoch = self._epoch(control)
        with telling_how():
            batches = self._poll(moment_s)
        # Buckets without clicks must apply erasures, too.
        erased = self._reading.erased if control is None else control.erased.last
        if not batches and not self._passed and erased == self._reading.erased:
            return [], None
        now_ms = wall_ms()
        mask = Mask.NONE if control is None else control.mask
        events = leave_out(self._events(batches), mask)
        events, told = in_order(events, self._clock.follow(events, events.ranges, now_ms))
        ends = {part.source.partition: part.next for part in events.ranges}
        after = replace(
            self._reading,
            topic_id=self._topic_id,
            next={**self._reading.next, **ends},
            clocks={**self._reading.clocks, **told.state},
            log_epoch=log_epoch,
            erased=erased,
            leaders=self._leaders(self._reading.leaders, ends),
        )
        generation = 0 if control is None else control.generation
        newest_ms = max((appended_ms(batch, now_ms) for batch in batches), default=0)
        parts = divide(events, told, self._settings.stream.buckets)
        self.at = self._reading = after
        return [Portion(batch, clock, generation, log_epoch, newest_ms) for batch, clock in parts], after

    def _leaders(self, known: Mapping[int, int], at: Mapping[int, int]) -> dict[int, int]:
        """By partition the leader epoch of the record before a position; former ones only if the position is the same."""
        reader = self._reader
        found = {one: -1 if reader is None else reader.leader_epoch(one, offset) for one, offset in at.items()}
        return {one: epoch for one, epoch in {**known, **found}.items() if epoch >= 0}

    @property
    def at_end(self) -> bool:
        """Whether everything was read, if reading ends at all."""
        until, reader = self._worker.plan.until, self._reader
        if until is None or reader is None:
            return until is not None
        return all(reader.position(one) >= until.get(one, 0) for one in reader.partitions)

    def close(self) -> None:
        """Closes the reader."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _epoch(self, control: Control | None) -> int:
        """The epoch of the log to write; reading continues only if it has not passed the branch point."""
        mine = self._reading.log_epoch
        line = () if control is None else control.log
        now = line[-1].epoch if line else (mine or FIRST_EPOCH)
        if mine in (0, now):
            return now
        if mine > now:
            raise StoreError(
                f"the job is of epoch {mine} of the training log, and control knows {now}: it is another registry, or an "
                "older copy of it",
                "restore the registry, or start the job anew without a savepoint",
            )
        ahead = sorted({one for stretch in line if stretch.epoch > mine for one in self._ahead_of(stretch)})
        if ahead:
            raise RewoundLog(
                f"control's line of the training log turned off, into epoch {now}, before what this job has read: partition "
                + ", ".join(f"{partition} at {at}" for partition, at in ahead),
                "stop the job without a savepoint, and resume it from a savepoint or checkpoint that had read no further "
                "than that; without one, start it anew: it reads the clicks from their beginning, and readers drop what "
                "they have",
            )
        logger.info("epoch %d of the training log is written from here on", now)
        return now

    def _ahead_of(self, stretch: Stretch) -> list[tuple[int, int]]:
        """The partitions that were read beyond the start of a segment of the branch, with that start."""
        marks = dict[int, int]()
        for source, at in stretch.sources:
            if source.topic_id == self._reading.topic_id:
                marks[source.partition] = min(at, marks.get(source.partition, at))
        return [(one, marks.get(one, 0)) for one, ours in self._reading.next.items() if ours > marks.get(one, 0)]

    def _poll(self, moment_s: float) -> list[PartitionBatch]:
        """Gathers records until the moment is over, or there are enough."""
        aligned = self._aligned
        found: list[PartitionBatch] = []
        ends_s = time.monotonic() + moment_s
        if aligned is None:
            self._resting.wait(moment_s)
        else:
            aligned.begin(self._settings.stream.bundle_events)
            while not aligned.is_done and (rest_s := ends_s - time.monotonic()) > 0:
                found += self._before_the_end(aligned.poll(rest_s))
                if self.at_end:
                    break
        if time.monotonic() >= self._refresh_s:
            self._refresh_s = time.monotonic() + REFRESH_S
            self._take_new_partitions()
        return found

    def _before_the_end(self, batches: Sequence[PartitionBatch]) -> Iterator[PartitionBatch]:
        """The batches before the end of reading, if there is one; the last batch may reach beyond it."""
        until = self._worker.plan.until
        for batch in batches:
            if until is None or batch.first < until.get(batch.partition, 0):
                yield batch

    def _events(self, batches: Sequence[PartitionBatch]) -> EventBatch:
        """The events of the records, with the preceding gaps."""
        events = self._parser.parse(batches)
        passed, self._passed = as_ranges(self._passed), []
        if passed:
            # Gaps come first, so that later ranges continue from them.
            events = replace(events, ranges=(*passed, *events.ranges), source=events.source + len(passed))
        return gathered(events)

    def _take_new_partitions(self) -> None:
        """Reopens the reader if the topic has more partitions of this source; these are read from their beginning.

        Raises:
            UnknownTopic: The topic is gone, or is another topic of that name.
        """
        reader, topic = self._reader, self._settings.kafka.clicks_topic
        at = {} if reader is None else {one: reader.position(one) for one in reader.partitions}
        # An unreachable broker costs only time.
        with suppress(UnreachableBroker):
            with self._worker.log.topics() as topics:
                info = topics.describe(topic)
            if info.topic_id != self._topic_id:
                raise made_again(topic, self._topic_id, info.topic_id)
            mine = of_source(self._source, self._settings.stream.sources, info.partitions)
            if len(mine) > len(at):
                logger.info("reading new partitions of %s: %s", topic, sorted({*mine} - {*at}))
                self._follow(self._worker.log.reader(topic, mine, at, leaders=self._leaders({}, at)))
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
    """Reads the partitions of a source for a moment, emits each bucket's part, and does so again in the next bundle.

    Keyed by source. The reading and the timer of the next bundle are state of the key. With the emitted portions they
    are one checkpoint of the engine.
    """

    READING = ReadModifyWriteStateSpec("reading", BytesCoder())
    AGAIN = TimerSpec("again", TimeDomain.REAL_TIME)

    def start_bundle(self) -> None:
        """Begins a moment, which all sources of the bundle share."""
        self._ends_s = time.monotonic() + self.worker.settings.stream.bundle_ms / 1000

    def process(
        self,
        element: tuple[int, bytes],
        again: Any = beam.DoFn.TimerParam(AGAIN),  # noqa: B008  # Beam reads the default
    ) -> None:
        """Wakes the source; one that is awake stays so."""
        again.set(Timestamp.now())

    @on_timer(AGAIN)
    def read(
        self,
        source: Any = beam.DoFn.KeyParam,
        kept: Any = beam.DoFn.StateParam(READING),  # noqa: B008  # Beam reads the defaults
        again: Any = beam.DoFn.TimerParam(AGAIN),  # noqa: B008
    ) -> Iterator[TimestampedValue[tuple[int, bytes]]]:
        """Yields `(bucket, bytes of a portion)`, in the order of the log for each bucket."""
        worker = self.worker
        partitions = self._open(worker, source, SourceReading.from_bytes(kept.read()))
        try:
            portions, after = partitions.read(max(LEAST_S, self._ends_s - time.monotonic()))
        except BaseException:
            partitions.close()
            raise
        if after is not None:
            kept.write(after.to_bytes())
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
        held = cast(Partitions | None, worker.take_reading(source))
        if held is not None and held.at != begin:
            held.close()
            held = None
        return held or Partitions(worker, source, begin)


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
        """Takes a portion."""
        bucket, value = element
        worker, portion = self.worker, decode(value)
        yield take_portion(
            bucket,
            portion,
            Cells(head, snapshot, deltas),
            worker.cache,
            worker.open_core,
            worker.spec.history,
            worker.mask_of(portion.control),
            worker.join,
            lambda: secrets.token_hex(TOKEN_BYTES),
        )
