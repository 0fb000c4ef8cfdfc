"""The sample of clicks that a bootstrap reads, from a topic or files: own histories, rows by the stream's code, statistics."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from state.config.sections import Events
from state.config.settings import Settings
from state.errors import SpringtideError, UnknownTopic, UnreachableBroker
from state.events.identity import Salt
from state.events.parser import EventBatch, Parser
from state.features.spec import FeatureSpec
from state.history.store import HistoryStore
from state.log import PartitionBatch, Reader
from state.microbatch.batch import Kind, trained
from state.recordings.crowd import RecordedTimes, described
from state.recordings.files import Recording, refuse_beyond_memory
from state.recordings.rows import I64, EncodedRows, Encoder, joined, order, shown_reasons
from state.statistics.collecting import Statistics
from streaming.context import Handle, JobContext, Step, opened
from streaming.event_clock import EventClock
from streaming.labels import Labels
from streaming.profile import Profiler
from streaming.rows import Rows
from streaming.unlogged import commit_at_once

PROGRESS_S = 2.0

Say = Callable[[str], None]


@dataclass
class Tally:
    """Counts of a sample so far.

    Attributes:
        clicks: Events.
        examples: Rows used for training: events, except impressions without a label yet and their outcomes.
        dropped: Impressions that could not wait.
        records: Records.
        refused: Records that are not clicks, by reason.
        names: Names of category ids.
        newest_ms: Time of the newest click.
        said_s: When progress was last reported.
    """

    clicks: int = 0
    examples: int = 0
    dropped: int = 0
    records: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    names: dict[int, str] = field(default_factory=dict)
    newest_ms: int = 0
    said_s: float = 0.0

    def count_events(self, events: EventBatch) -> None:
        """Counts parsed records."""
        self.clicks += len(events)
        self.records += len(events) + len(events.dead)
        self.refused.update(str(letter.reason) for letter in events.dead)
        self.names.update(events.names)
        self.newest_ms = max(self.newest_ms, int(events.at_ms.max(initial=0)))

    def count_rows(self, rows: Rows) -> None:
        """Counts the rows of a batch."""
        kinds = rows.columns["kind"]
        self.examples += int(trained(kinds).sum())
        self.dropped += int((kinds == Kind.DROPPED).sum())


@dataclass(frozen=True, kw_only=True)
class Sample(JobContext):
    """The context of one bootstrap; its store is deleted afterwards.

    Attributes:
        say: Receives progress messages.
        clock_s: Wall clock, seconds.
        began_s: When reading began.
        tally: Counts so far.
        statistics: Of the rows so far.
        asked: The options that the preprocessing read, of `AskedModel`.
    """

    say: Say
    clock_s: Callable[[], float]
    began_s: float
    statistics: Statistics
    tally: Tally = field(default_factory=Tally)
    asked: dict[str, list[str]] = field(default_factory=dict)

    @property
    def left(self) -> int:
        """Maximum number of records of the next batch."""
        return min(self.settings.stream.batch_events, self.settings.bootstrap.sample_rows - self.tally.clicks)

    def progress(self, wanted: str) -> None:
        """Reports the progress, at most once per `PROGRESS_S`."""
        now_s = self.clock_s()
        if now_s - max(self.tally.said_s, self.began_s) >= PROGRESS_S:
            self.tally.said_s = now_s
            self.say(f"{self.tally.clicks:,} {wanted} read, {self._rate(now_s):,.0f} rows/s")

    def end(self) -> None:
        """Reports what was read; called after the last record."""
        now_s, tally = self.clock_s(), self.tally
        dead = f" and {shown_reasons(tally.refused)}" if tally.refused else ""
        self.say(
            f"{tally.clicks:,} clicks{dead} read in {now_s - self.began_s:.1f} s ({self._rate(now_s):,.0f} rows/s)"
        )

    @property
    def unlabelled(self) -> str:
        """Describes the impressions that got no label; empty if there are none."""
        waiting, dropped = self.store.waiting_rows(), self.tally.dropped
        parts = [
            f"{waiting:,} impressions still waited for their label when the clicks ended" * (waiting > 0),
            f"{dropped:,} could not wait" * (dropped > 0),
        ]
        return ", ".join(filter(None, parts))

    def _rate(self, now_s: float) -> float:
        return self.tally.records / max(now_s - self.began_s, 1e-9)


@contextmanager
def open_sample(
    settings: Settings, spec: FeatureSpec, salt: Salt, clock: Callable[[], float], say: Say
) -> Iterator[Handle[Sample]]:
    """Yields a new sample, whose store is deleted after the block."""
    with tempfile.TemporaryDirectory(prefix="springtide-bootstrap-") as folder:
        store = HistoryStore(Path(folder), history=spec.history, map_bytes=settings.stream.map_gb << 30)
        try:
            sample = Sample(
                settings=settings,
                spec=spec,
                store=store,
                parser=Parser(settings.events, salt),
                profiler=Profiler(store, spec, settings.stream.cache_users),
                clock=EventClock(store.extra),
                labels=Labels(settings, store) if settings.labels.impressions else None,
                say=say,
                clock_s=clock,
                began_s=clock(),
                statistics=Statistics(spec.actions, spec.names, settings.events.context),
            )
            with opened(sample) as handle:
                yield handle
        finally:
            store.close()


class ComputeWindows(Step[Sample]):
    """Turns events into rows, as in the stream: impressions wait for their label, in event time."""

    def process(self, events: EventBatch) -> Iterator[Rows]:
        """Yields the rows of one batch and of earlier impressions that it labels; skips batches without events."""
        with self.handle.watched() as sample:
            sample.tally.count_events(events)
            now_ms = round(sample.clock_s() * 1000)
            rows = commit_at_once(sample.store, sample.profiler, sample.clock, sample.labels, events, now_ms)
            sample.tally.count_rows(rows)
            sample.statistics.add(rows.columns)
        if len(events):
            yield rows


POLL_S = 0.2
NO_TIMESTAMP = -1

Batches = Iterator[list[PartitionBatch]]


def of_topic(sample: Sample, await_topic: bool = False) -> Batches:
    """Reads the clicks topic from its beginning; ends when there are enough clicks and no more are waiting.

    Args:
        sample: Counts what was read so far.
        await_topic: Whether to wait for Kafka and the topic, up to `bootstrap.timeout_s`.

    Raises:
        SpringtideError: `bootstrap.timeout_s` passed with fewer than `bootstrap.min_rows` clicks.
        LogError: The topic cannot be read.
    """
    settings, wanted = sample.settings, sample.settings.bootstrap
    topic = settings.kafka.clicks_topic
    with _reader(sample, await_topic) as reader:
        began_s = sample.clock_s()
        while sample.left > 0:
            batches = reader.poll(POLL_S, sample.left)
            if batches:
                yield batches
            # While clicks keep arriving no poll is empty, so a lag of less than one batch is enough.
            if sample.tally.clicks >= wanted.min_rows and sum(reader.lag().values()) < settings.stream.batch_events:
                break
            sample.progress(f"of at least {wanted.min_rows:,} clicks of {topic}")
            if sample.clock_s() - began_s > wanted.timeout_s and sample.tally.clicks < wanted.min_rows:
                raise SpringtideError(
                    f"after {wanted.timeout_s} s topic {topic} holds {sample.tally.clicks} usable clicks of the "
                    f"{wanted.min_rows} needed",
                    "start the producer, look at the dead letters, lower "
                    "bootstrap.min_rows, or name files of recorded clicks: `springtide bootstrap FILE...`",
                )
    sample.end()


def _reader(sample: Sample, await_topic: bool) -> Reader:
    settings = sample.settings
    while True:
        try:
            return Reader(settings.kafka, settings.kafka.clicks_topic)
        except (UnreachableBroker, UnknownTopic):
            if not await_topic or sample.clock_s() - sample.began_s > settings.bootstrap.timeout_s:
                raise
            time.sleep(POLL_S)


def of_recording(sample: Sample, recording: Recording, sort: str) -> Batches:
    """Reads the rows of files with their recorded times, as one partition.

    Rows are accepted or refused as in a replay at full speed: a time is compared with the newest one of the recording,
    not counting strays. If the files are not read to their end (`sort` is assume), no times are compared.

    Args:
        sample: Counts what was read so far.
        recording: The files.
        sort: memory (read everything, then order by time) or assume (the files are in order).

    Raises:
        SettingsError: The columns do not fit.
        UnreadableRecording: A file is cut or damaged.
        SpringtideError: No row is a click.
    """
    clicks = recorded_batches(
        sample.settings.events, recording, sort, sample.clock_s(), sample.say, lambda _: sample.left
    )
    for batches in clicks:
        yield batches
        sample.progress("clicks of the files")
    if not sample.tally.clicks:
        raise SpringtideError(
            f"no row of {', '.join(str(file.path) for file in recording.files)} is a click: "
            f"{shown_reasons(sample.tally.refused)}",
            "correct [events] (fields, actions, time_unit, decoder), --columns or --constant",
        )
    sample.end()


def recorded_batches(
    events: Events, recording: Recording, sort: str, now_s: float, say: Say, size: Callable[[I64], int]
) -> Batches:
    """Yields the rows of files with their recorded times, as one partition.

    Args:
        events: Names of fields, and which times are believed.
        recording: The files.
        sort: memory (read everything, then order by time) or assume (the files are in order).
        now_s: Wall clock; a later time counts as none.
        say: Receives a message about strays.
        size: Maximum number of rows of the next batch, by the times of the rows that are left; 0 ends the reading.

    Raises:
        SettingsError: The columns do not fit, or the files do not fit in memory.
        UnreadableRecording: A file is cut or damaged.
    """
    encoder = Encoder(events, recording.constants or {}, round((now_s + events.max_future_s) * 1000))
    chunks: Iterator[EncodedRows] = recording.encoded(encoder, events)
    newest_ms = NO_TIMESTAMP
    if sort == "memory":
        import psutil

        refuse_beyond_memory(recording, psutil.virtual_memory().available)
        whole = joined(list(chunks))
        newest_ms = _newest(events, recording, whole, say)
        chunks = iter([whole.take(order(whole.at_ms))])
    topic_id, first = topic_of(recording), 0
    for chunk in chunks:
        at = 0
        while at < len(chunk) and (count := size(chunk.at_ms[at:])) > 0:
            part = chunk.cut(at, at + count)
            at += len(part)
            values = encoder.values(part, part.at_ms)
            yield [_partition_batch(topic_id, first, part, values, max(newest_ms, NO_TIMESTAMP))]
            first += len(part)


def _newest(events: Events, recording: Recording, whole: EncodedRows, say: Say) -> int:
    """The newest time, which the others are compared with; reports strays."""
    times, max_age_s = RecordedTimes(), events.max_age_s
    times.add(whole.at_ms, whole.file, whole.line)
    crowd = times.crowd(round(max_age_s * 1000))
    if crowd.first is not None:
        file, line = crowd.first
        say(described(crowd, f"{recording.files[file].path}:{line}", max_age_s))
    return crowd.newest_ms


def topic_of(recording: Recording) -> str:
    """A replacement for a topic id, derived from the files' names and sizes."""
    named = "\n".join(f"{file.path.name} {file.path.stat().st_size}" for file in recording.files)
    return hashlib.sha256(named.encode()).hexdigest()[:32]


def _partition_batch(
    topic_id: str, first: int, part: EncodedRows, values: Sequence[bytes], newest_ms: int
) -> PartitionBatch:
    count = len(part)
    offsets: I64 = np.arange(first, first + count, dtype=np.int64)
    stamps = np.full(count, newest_ms, np.int64)
    return PartitionBatch(topic_id, 0, first, first + count, offsets, stamps, list(part.keys), list(values))


class ReadSample(Step[Sample]):
    """Yields lists of partition batches until the sample is complete.

    Args:
        handle: Of the sample.
        recording: The files; None for the clicks topic.
        sort: See `of_recording`.
        await_topic: See `of_topic`.
    """

    def __init__(self, handle: Handle[Sample], recording: Recording | None, sort: str, await_topic: bool) -> None:
        super().__init__(handle)
        self._recording, self._sort, self._await_topic = recording, sort, await_topic

    def process(self, start: bytes) -> Batches:
        """Reads the clicks; the next steps process a batch before the next one is read."""
        with self.handle.watched() as sample:
            if self._recording is None:
                yield from of_topic(sample, self._await_topic)
            else:
                yield from of_recording(sample, self._recording, self._sort)
