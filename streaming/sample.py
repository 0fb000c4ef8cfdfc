"""The clicks that a bootstrap looks at: read from a topic's beginning or from files, parsed and windowed by the stream's code.

As in the stream, the steps of the job ask `current` for the one sample that
the process has open: Beam builds them from pickles.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import apache_beam as beam
import numpy as np

from state.config.settings import Settings
from state.errors import SpringtideError
from state.events.event_batch import EventBatch
from state.events.identity import Salt
from state.events.parser import Parser
from state.features.spec import FeatureSpec
from state.history.store import HistoryStore
from state.log import PartitionBatch, Reader
from state.microbatch.row_kinds import Kind, trained
from state.recordings.files import Recording, refuse_beyond_memory
from state.recordings.rows import I64, NO_TIME, Encoded, Encoder, joined, order, shown_reasons
from streaming.cut import Cut
from streaming.labels import Labels, LookedUp
from streaming.profile import Profiler
from streaming.rows import Rows

PROGRESS_S = 2.0
POLL_S = 0.2
NO_TIMESTAMP = -1

Say = Callable[[str], None]
Batches = Iterator[list[PartitionBatch]]


@dataclass
class Sample:
    """What one job reads, and what it has found so far.

    Attributes:
        settings: The effective settings.
        store: Histories of the sample's users, and impressions that wait; thrown away afterwards.
        parser: Records to events.
        profiler: Events to rows.
        labels: Impressions that wait for their label; None where none can.
        say: Takes lines about the progress.
        clock: Seconds.
        began_s: When reading began.
        clicks: Events so far.
        examples: Rows so far that are learned from: events, less impressions without a label yet and their outcomes.
        dropped: Impressions so far that could not wait.
        records: Records so far.
        refused: Records that are no clicks, by reason.
        names: Names of category ids.
        newest_ms: Time of the newest click.
        failure: The first exception of a step; Beam passes on only its text.
    """

    settings: Settings
    store: HistoryStore
    parser: Parser
    profiler: Profiler
    labels: Labels | None
    say: Say
    clock: Callable[[], float]
    began_s: float
    clicks: int = 0
    examples: int = 0
    dropped: int = 0
    records: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    names: dict[int, str] = field(default_factory=dict)
    newest_ms: int = 0
    failure: BaseException | None = None
    _said_s: float = 0.0

    @property
    def left(self) -> int:
        """How many records the next batch may have."""
        return min(self.settings.stream.batch_events, self.settings.bootstrap.sample_rows - self.clicks)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Remembers the first exception that leaves the block."""
        try:
            yield
        except Exception as error:
            self.failure = self.failure or error
            raise

    def count(self, events: EventBatch) -> None:
        """Takes note of parsed records."""
        self.clicks += len(events)
        self.records += len(events) + len(events.dead)
        self.refused.update(str(letter.reason) for letter in events.dead)
        self.names.update(events.names)
        self.newest_ms = max(self.newest_ms, int(events.at_ms.max(initial=0)))

    def progress(self, wanted: str) -> None:
        """Says how far the reading is, now and then."""
        now_s = self.clock()
        if now_s - max(self._said_s, self.began_s) >= PROGRESS_S:
            self._said_s = now_s
            self.say(f"{self.clicks:,} {wanted} read, {self._rate(now_s):,.0f} rows/s")

    def end(self) -> None:
        """Says what was read; called when the last record was."""
        now_s = self.clock()
        dead = f" and {shown_reasons(self.refused)}" if self.refused else ""
        self.say(f"{self.clicks:,} clicks{dead} read in {now_s - self.began_s:.1f} s ({self._rate(now_s):,.0f} rows/s)")

    @property
    def unlabelled(self) -> str:
        """The impressions that got no label, in words; empty for none."""
        waiting = self.store.waiting_rows()
        parts = [
            f"{waiting:,} impressions still waited for their label when the clicks ended" * (waiting > 0),
            f"{self.dropped:,} could not wait" * (self.dropped > 0),
        ]
        return ", ".join(filter(None, parts))

    def _rate(self, now_s: float) -> float:
        return self.records / max(now_s - self.began_s, 1e-9)


_samples: list[Sample] = []


def current() -> Sample:
    """The sample that this process has open."""
    return _samples[-1]


@contextmanager
def opened(settings: Settings, spec: FeatureSpec, salt: Salt, clock: Callable[[], float], say: Say) -> Iterator[Sample]:
    """A new sample, the current one in the block."""
    with tempfile.TemporaryDirectory(prefix="springtide-bootstrap-") as folder:
        store = HistoryStore(Path(folder), history=spec.history, map_bytes=settings.stream.map_gb << 30)
        profiler = Profiler(store, spec, settings.stream.cache_users)
        labels = Labels(settings, store) if settings.labels.impressions else None
        sample = Sample(settings, store, Parser(settings.events, salt), profiler, labels, say, clock, clock())
        _samples.append(sample)
        try:
            yield sample
        finally:
            _samples.remove(sample)
            store.close()


def of_topic(sample: Sample) -> Batches:
    """The beginning of the clicks topic; ends when enough is there and no more is waiting.

    Raises:
        SpringtideError: `bootstrap.timeout_s` passed with less than `bootstrap.min_rows` clicks.
        LogError: The topic cannot be read.
    """
    settings, wanted = sample.settings, sample.settings.bootstrap
    topic = settings.kafka.clicks_topic
    with Reader(settings.kafka, topic) as reader:
        while sample.left > 0:
            batches = reader.poll(POLL_S, sample.left)
            if batches:
                yield batches
            # Where clicks keep coming no poll is empty: caught up to one batch is enough.
            if sample.clicks >= wanted.min_rows and sum(reader.lag().values()) < settings.stream.batch_events:
                break
            sample.progress(f"of at least {wanted.min_rows:,} clicks of {topic}")
            if sample.clock() - sample.began_s > wanted.timeout_s and sample.clicks < wanted.min_rows:
                raise SpringtideError(
                    f"after {wanted.timeout_s} s topic {topic} holds {sample.clicks} usable clicks of the "
                    f"{wanted.min_rows} needed; start the producer, look at the dead letters, lower "
                    "bootstrap.min_rows, or name files of recorded clicks: `springtide bootstrap FILE...`"
                )
    sample.end()


def of_recording(sample: Sample, recording: Recording, sort: str) -> Batches:
    """The rows of files with their times as recorded, as one partition.

    They are judged as a replay at full speed would have them judged: a time is
    compared with the newest one of the recording. Where the files are not
    read to their end (`sort` is assume), no time is compared with another.

    Args:
        sample: What was read so far.
        recording: The files.
        sort: memory (read everything, then order by time) or assume (the files are in order).

    Raises:
        SettingsError: The columns do not fit.
        UnreadableRecording: A file is cut or damaged.
        SpringtideError: No row is a click.
    """
    events = sample.settings.events
    latest_ms = round((sample.clock() + events.max_future_s) * 1000)
    encoder = Encoder(events, recording.constants or {}, latest_ms)
    chunks: Iterator[Encoded] = recording.encoded(encoder, events)
    newest_ms = NO_TIMESTAMP
    if sort == "memory":
        import psutil

        refuse_beyond_memory(recording, psutil.virtual_memory().available)
        whole = joined(list(chunks))
        newest_ms = int(whole.at_ms.max(initial=NO_TIME))
        chunks = iter([whole.take(order(whole.at_ms))])
    topic_id, first = _topic_of(recording), 0
    for chunk in chunks:
        at = 0
        while at < len(chunk) and sample.left > 0:
            part = chunk.cut(at, at + sample.left)
            at += len(part)
            values = encoder.values(part, part.at_ms)
            yield [_partition_batch(topic_id, first, part, values, max(newest_ms, NO_TIMESTAMP))]
            first += len(part)
            sample.progress("clicks of the files")
    if not sample.clicks:
        raise SpringtideError(
            f"no row of {', '.join(str(file.path) for file in recording.files)} is a click: "
            f"{shown_reasons(sample.refused)}; correct [events] (fields, actions, time_unit, decoder), --columns or --constant"
        )
    sample.end()


def _topic_of(recording: Recording) -> str:
    """An id in place of a topic's, by the files' names and sizes."""
    named = "\n".join(f"{file.path.name} {file.path.stat().st_size}" for file in recording.files)
    return hashlib.sha256(named.encode()).hexdigest()[:32]


def _partition_batch(
    topic_id: str, first: int, part: Encoded, values: Sequence[bytes], newest_ms: int
) -> PartitionBatch:
    count = len(part)
    offsets: I64 = np.arange(first, first + count, dtype=np.int64)
    stamps = np.full(count, newest_ms, np.int64)
    return PartitionBatch(topic_id, 0, first, first + count, offsets, stamps, list(part.keys), list(values))


class ReadSample(beam.DoFn):
    """Yields lists of partition batches until the sample is complete.

    Args:
        recording: The files; None for the clicks topic.
        sort: As `of_recording` has it.
    """

    def __init__(self, recording: Recording | None, sort: str) -> None:
        super().__init__()
        self._recording, self._sort = recording, sort

    def process(self, start: bytes) -> Batches:
        """Reads; what stands behind has taken a batch before the next one is read."""
        sample = current()
        with sample.watch():
            if self._recording is None:
                yield from of_topic(sample)
            else:
                yield from of_recording(sample, self._recording, self._sort)


class ParseSample(beam.DoFn):
    """Records to events, as in the stream."""

    def process(self, batches: list[PartitionBatch]) -> Iterator[EventBatch]:
        """Decodes, validates, pseudonymises and counts."""
        sample = current()
        with sample.watch():
            events = sample.parser.parse(batches)
            sample.count(events)
        yield events


class ComputeWindows(beam.DoFn):
    """Events to rows, as in the stream: impressions wait for their label, by the time of the events."""

    def process(self, events: EventBatch) -> Iterator[Rows]:
        """Makes the rows of one batch, and of impressions of before that it labels; a batch without events has none."""
        sample = current()
        with sample.watch():
            rows, found = sample.profiler.update(events), LookedUp([], {}, {})
            if sample.labels is not None:
                found = sample.labels.look_up([Cut((sample.labels.attribute(rows),), 0)])
                ((rows,),) = (cut.pieces for cut in found.cuts)
            sample.store.commit(rows.appends, rows.batch.ranges, found.extra, found.waiting)
            sample.profiler.committed(rows)
            kinds = rows.columns["kind"]
            sample.examples += int(trained(kinds).sum())
            sample.dropped += int((kinds == Kind.DROPPED).sum())
        if len(events):
            yield rows
