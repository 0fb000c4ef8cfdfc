"""The partitions of one source: read for a moment, parsed, timed, and divided into buckets once a bundle.

    poll until the moment is over ─ parse ─ leave masked clicks out ─ follow the clock ─ divide

It stays open from bundle to bundle in its process, and is used again only where
it stands exactly where the engine's checkpoint says.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from state.errors import LineTurned, StoreError, UnreachableBroker
from state.events.event_batch import EventBatch
from state.events.parser import Parser
from state.features.mask import Mask
from state.log import LogReader, PartitionBatch
from state.log.failures import made_again
from state.positions import Source
from state.process.wall_clock import wall_ms
from state.registry.control import Control
from state.registry.control_look import ControlLook
from state.registry.log_line import FIRST_EPOCH, Stretch
from streaming.accounts import as_ranges
from streaming.aligned_reader import AlignedReader
from streaming.distributed.buckets import Portion, divide, gathered
from streaming.distributed.opening import of_source, open_clicks, telling_how
from streaming.distributed.reading import SourceReading
from streaming.distributed.worker import JobWorker
from streaming.event_clock import EventClock
from streaming.interleaving import in_order
from streaming.masking import leave_out
from streaming.source import appended_ms

REFRESH_S = 1.0
logger = logging.getLogger(__name__)


class Partitions:
    """The open partitions of one source. One thread at a time uses it.

    Args:
        worker: Of this process.
        source: Its number.
        reading: Where it begins.

    Attributes:
        at: How far it is, as the engine knows it.

    Raises:
        GapError: Positions are gone, and nobody accepted it.
        LogError: Kafka is not reachable, or the topic is missing.
    """

    def __init__(self, worker: JobWorker, source: int, reading: SourceReading) -> None:
        self._worker, self._source = worker, source
        self._settings = worker.settings
        self._parser = Parser(self._settings.events, worker.salt)
        self._look = ControlLook(self._settings.registry_dir)
        self._resting = threading.Event()
        self.at = reading
        if not source:
            worker.tell_letters()
        opened = open_clicks(worker, source, reading)
        self._topic_id, self._passed, self._reading = opened.topic_id, opened.passed, opened.reading
        self._clock = EventClock(opened.reading.clocks.get)
        self._follow(opened.reader)
        self._refresh_s = time.monotonic() + REFRESH_S

    def _follow(self, reader: LogReader | None) -> None:
        """Reads on with `reader`, by the times up to which its partitions were read."""
        clock, topic_id = self._clock, self._topic_id
        self._reader: LogReader | None = reader
        self._aligned: AlignedReader | None = None
        if reader is not None:
            skew_s = self._settings.stream.max_skew_s
            self._aligned = AlignedReader(reader, lambda one: clock.reached(Source(topic_id, one)), skew_s)

    def read(self, moment_s: float) -> tuple[list[Portion], SourceReading | None]:
        """What was read in a moment, divided, and how far that is; nothing and None where nothing is new.

        Args:
            moment_s: How long clicks are gathered.

        Raises:
            GapError, LogError: As at opening; or the topic was made anew.
            LineTurned: Control asks for an older place of the log.
        """
        control = self._look.look()
        log_epoch = self._epoch(control)
        with telling_how():
            batches = self._poll(moment_s)
        # Buckets without clicks have to forget, too.
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
        """By partition the leader's epoch of the record before a position: what was known, but for those that are at another one."""
        reader = self._reader
        found = {one: -1 if reader is None else reader.leader_epoch(one, offset) for one, offset in at.items()}
        return {one: epoch for one, epoch in {**known, **found}.items() if epoch >= 0}

    @property
    def at_end(self) -> bool:
        """Whether all of it was read, where reading ends at all."""
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
        """The epoch of the log to write; reading goes on only where it had not got beyond where the line turned off."""
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
            raise LineTurned(
                f"control's line of the training log turned off, into epoch {now}, before what this job has read: partition "
                + ", ".join(f"{partition} at {at}" for partition, at in ahead),
                "stop the job without a savepoint, and resume it from a savepoint or checkpoint that had read no further "
                "than that; without one, start it anew: it reads the clicks from their beginning, and readers drop what "
                "they have",
            )
        logger.info("epoch %d of the training log is written from here on", now)
        return now

    def _ahead_of(self, stretch: Stretch) -> list[tuple[int, int]]:
        """The partitions that were read further than where a stretch of the line begins, and where that is."""
        marks = dict[int, int]()
        for source, at in stretch.sources:
            if source.topic_id == self._reading.topic_id:
                marks[source.partition] = min(at, marks.get(source.partition, at))
        return [(one, marks.get(one, 0)) for one, ours in self._reading.next.items() if ours > marks.get(one, 0)]

    def _poll(self, moment_s: float) -> list[PartitionBatch]:
        """Gathers what comes until the moment is over, or enough has come."""
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
        """What lies before where reading ends, where it does: whole batches, of which the last may reach beyond."""
        until = self._worker.plan.until
        for batch in batches:
            if until is None or batch.first < until.get(batch.partition, 0):
                yield batch

    def _events(self, batches: Sequence[PartitionBatch]) -> EventBatch:
        """The events of what was read, with the gaps that were passed before it."""
        events = self._parser.parse(batches)
        passed, self._passed = as_ranges(self._passed), []
        if passed:
            # Gaps come first, so that what follows goes on from them.
            events = replace(events, ranges=(*passed, *events.ranges), source=events.source + len(passed))
        return gathered(events)

    def _take_new_partitions(self) -> None:
        """Opens the reader anew where the topic has more partitions of this source; these are read from their beginning.

        Raises:
            UnknownTopic: The topic is gone, or is another topic of that name.
        """
        reader, topic = self._reader, self._settings.kafka.clicks_topic
        at = {} if reader is None else {one: reader.position(one) for one in reader.partitions}
        # A broker that is away costs only time.
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
