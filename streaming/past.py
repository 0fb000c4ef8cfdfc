"""Computes the rows of past clicks for a trainer: `python -m streaming.past`, a child process of the trainer."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from prometheus_client import CollectorRegistry

from state.config.sections import Events
from state.config.settings import Settings
from state.errors import RegistryError, UnknownTopic
from state.events.identity import load_salt
from state.experiments.past import Past, read_past
from state.history.store import HistoryStore
from state.layout import HISTORIES
from state.log import Log, PartitionBatch, Topics
from state.log.follow import read_to
from state.metrics import StreamMetrics
from state.microbatch.codec import END, framed
from state.positions import Source
from state.process.environment import wall_ms
from state.process.log_lines import Pace
from state.process.part import run_part
from state.recordings.files import Recording, constants_of, find, refuse_beyond_memory
from state.recordings.rows import I64, EncodedRows, Encoder, RecordedTimes, far_ms, joined, order
from state.registry.log_line import WHOLE
from state.storage import STREAM, map_bytes
from streaming.alignment import AlignedReader, Reached
from streaming.commit import StreamSweep
from streaming.context import JobContext, open_job, open_join
from streaming.control import ControlWatch
from streaming.rows import Cut, Cutter, Encoding, clocks_of, encode_cut

POLL_S = 0.5
PROGRESS_S = 5.0
NEVER_MS = 1 << 62
KEPT = "past-"
Batches = Iterator[list[PartitionBatch]]
logger = logging.getLogger(__name__)


class ClicksSegment(NamedTuple):
    """The part of the clicks topic that is read.

    Attributes:
        begins: By partition its first offset.
        ends: By partition at least the offset after the last one; later clicks are learned from the training log.
    """

    topic_id: str
    begins: Mapping[int, int]
    ends: Mapping[int, int]

    @property
    def positions(self) -> int:
        """Number of its positions."""
        return sum(self.ends[partition] - begin for partition, begin in self.begins.items())


def segment_of(settings: Settings, past: Past, topics: Topics) -> ClicksSegment:
    """The part to read: it starts one longest window before the first requested row, if the topic has that.

    Record timestamps decide. If they are later than the clicks' own times, as in a replay, more is read.

    Raises:
        UnknownTopic: The topic is gone, or was recreated since the cut.
        LogError: Kafka does not answer.
    """
    topic, reach_ms = settings.kafka.clicks_topic, settings.features.windows_s[-1] * 1000
    topic_id = topics.describe(topic).topic_id
    ends: dict[int, int] = {}
    for source, mark in past.sources:
        if source.topic_id == topic_id:
            # The furthest of several buckets counts: the trainer leaves out rows that are not before the cut.
            ends[source.partition] = max(mark, ends.get(source.partition, 0))
    if not ends:
        raise UnknownTopic(
            f"version {past.version} learned nothing of topic {topic} with id {topic_id}: it was recreated since then",
            "stop the experiment, and start another once the live trainer has learned from the new topic; or name files in retrain.files",
        )
    spans, since = topics.ends(topic), topics.offset_before(topic, max(0, past.begin_ms - reach_ms))
    begins = {partition: min(max(since[partition], spans[partition][0]), end) for partition, end in ends.items()}
    return ClicksSegment(
        topic_id, {partition: begin for partition, begin in begins.items() if begin < ends[partition]}, ends
    )


def of_topic(settings: Settings, segment: ClicksSegment, log: Log, reached: Callable[[Source], Reached]) -> Batches:
    """Yields the clicks of a segment in approximate order of event time, and some clicks after the segment.

    `reached` returns the time that a source has reached, once the yielded clicks are processed.

    Raises:
        GapError: Clicks of it were deleted meanwhile.
        LogError: No record arrived from Kafka for a minute.
    """
    topic, begins = settings.kafka.clicks_topic, dict(segment.begins)
    if not begins:
        return
    with log.reader(topic, sorted(begins), begins) as reader:
        aligned = AlignedReader(reader, lambda partition: reached(Source(segment.topic_id, partition)))

        def poll() -> list[PartitionBatch]:
            aligned.begin(settings.stream.cut_rows)
            return aligned.poll(POLL_S)

        yield from read_to(reader, {partition: segment.ends[partition] for partition in begins}, poll=poll)


def recorded_batches(
    events: Events,
    recording: Recording,
    sort: str,
    now_s: float,
    say: Callable[[str], None],
    size: Callable[[I64], int],
) -> Batches:
    """Yields the rows of files with their recorded times, as one partition; the parser refuses strays.

    Args:
        events: Names of fields, and which times are believed.
        recording: The files.
        sort: memory (read everything, then order by time) or assume (the files are in order).
        now_s: Wall clock; a later time counts as missing.
        say: Receives a message about strays.
        size: Maximum number of rows of the next batch, by the times of the rows that are left; 0 ends the reading.

    Raises:
        SettingsError: The columns do not fit, or the files do not fit in memory.
        SpringtideError: A file is cut or damaged.
    """
    now_ms, latest_ms = round(now_s * 1000), round((now_s + events.max_future_s) * 1000)
    encoder = Encoder(events, recording.constants or {}, latest_ms)
    chunks: Iterator[EncodedRows] = recording.encoded(encoder, events)
    if sort == "memory":
        import psutil

        refuse_beyond_memory(recording, psutil.virtual_memory().available)
        recorded, times = joined(list(chunks)), RecordedTimes()
        times.add(recorded.at_ms, recorded.file, recorded.line)
        chunks = iter([recorded.take(order(recorded.at_ms))])
    else:
        times = recording.times(events, latest_ms)
    far = far_ms(events)
    span = times.span(far)
    if strays := recording.described(span, far):
        say(strays)
    topic_id, first = topic_of(recording), 0
    for chunk in chunks:
        at = 0
        while at < len(chunk) and (count := size(chunk.at_ms[at:])) > 0:
            part = chunk.cut(at, at + count)
            at += len(part)
            values = encoder.values(part, part.at_ms)
            yield [_partition_batch(topic_id, first, part, values, span.kept_stamps(part.at_ms, now_ms))]
            first += len(part)


def topic_of(recording: Recording) -> str:
    """A stand-in for a topic id, derived from the files' names and sizes."""
    named = "\n".join(f"{file.path.name} {file.path.stat().st_size}" for file in recording.files)
    return hashlib.sha256(named.encode()).hexdigest()[:32]


def _partition_batch(
    topic_id: str, first: int, part: EncodedRows, values: Sequence[bytes], stamps: I64
) -> PartitionBatch:
    count = len(part)
    offsets: I64 = np.arange(first, first + count, dtype=np.int64)
    return PartitionBatch(topic_id, 0, first, first + count, offsets, stamps, list(part.keys), list(values))


class PastRows:
    """Makes micro-batches of clicks that arrive in the order of their partitions. One thread.

    Args:
        context: Computes their rows; its store is new.
        begin_ms: Micro-batches that end before this log time are left out: they only fill histories.
    """

    def __init__(self, context: JobContext, metrics: StreamMetrics, salt: str, begin_ms: int) -> None:
        self._context, self._begin_ms = context, begin_ms
        stream = context.settings.stream
        self._encoding = Encoding.of(stream, context.spec.digest, salt, context.mask.generation)
        self._cutter = Cutter(stream.cut_rows, NEVER_MS)
        self._sweep = StreamSweep(context, metrics)

    def take(self, batches: list[PartitionBatch]) -> list[bytes]:
        """Takes the records of a poll; returns the micro-batches that are full."""
        context, now_ms = self._context, wall_ms()
        rows = context.commit(context.make_rows(context.parse(batches), now_ms))
        self._sweep.note([rows])
        if (due_s := self._sweep.due_s) is not None and time.monotonic() >= due_s:
            self._sweep.sweep()
        return self._encoded(self._cutter.add(rows, now_ms))

    def flush(self) -> list[bytes]:
        """Returns the last micro-batches."""
        return self._encoded(self._cutter.flush(wall_ms()))

    def reached(self, source: Source) -> Reached:
        """The time that a source has reached."""
        return self._context.clock.reached(source)

    def _encoded(self, cuts: Sequence[Cut]) -> list[bytes]:
        wanted = [cut for cut in cuts if max((end for _, end in clocks_of(cut)), default=NEVER_MS) >= self._begin_ms]
        return [value for cut in wanted for value in encode_cut(cut, self._encoding)]


def logged(clicks: Batches, total: int | None, clock_s: Callable[[], float] = time.monotonic) -> Batches:
    """Passes batches on, and logs the progress from time to time; `total` is None if it is not known."""
    positions_read, pace, reported_s = 0, Pace(total), clock_s()
    for batches in clicks:
        yield batches
        positions_read, now_s = positions_read + sum(batch.next - batch.first for batch in batches), clock_s()
        pace.add(positions_read, now_s)
        if now_s - reported_s >= PROGRESS_S:
            reported_s, rate = now_s, pace.rate()
            speed = "" if rate is None else f", {rate:,.0f}/s"
            time_left = (
                "" if rate is None or total is None else f", {max(0, total - positions_read) / rate:,.0f} s left"
            )
            logger.info("%s past clicks are read%s%s", f"{positions_read:,}", speed, time_left)


def run(settings: Settings, wanted: Past, log: Log, out: Callable[[bytes], object]) -> None:
    """Writes the micro-batches of the past to `out`, with the registry and the control of the experiment's trainer.

    Raises:
        SpringtideError: Clicks, files or the disk cannot be used.
        OSError: The disk refused, or the reader has closed the pipe.
    """
    salt, history = load_salt(settings.salt_path, create=False), settings.features.history
    with ExitStack() as stack:
        folder = _own_folder(settings.registry_dir, stack)
        histories = folder / HISTORIES
        histories.mkdir()
        store = HistoryStore(histories, history, map_bytes(settings, STREAM, HISTORIES, histories))
        stack.callback(store.close)
        mask = ControlWatch(settings.registry_dir, WHOLE).desired.mask
        own_paths = replace(settings, paths=replace(settings.paths, state=str(folder)))
        metrics = StreamMetrics(CollectorRegistry())
        join = open_join(own_paths, salt, metrics, stack, reports=lambda _: lambda letters: None)

        def maker(topic_id: str) -> PastRows:
            job = replace(open_job(settings, store, salt, topic_id, mask), join=join)
            return PastRows(job, metrics, salt.fingerprint, wanted.begin_ms)

        total: int | None = None
        if wanted.files:
            events, rows_per_batch = settings.events, settings.stream.cut_rows
            recording = Recording(find(wanted.files), events.columns, constants_of(events.constants, events))
            rows = maker(topic_of(recording))
            clicks = recorded_batches(events, recording, "memory", time.time(), logger.info, lambda _: rows_per_batch)
        else:
            with log.topics() as topics:
                segment = segment_of(settings, wanted, topics)
            rows, total = maker(segment.topic_id), segment.positions
            clicks = of_topic(settings, segment, log, rows.reached)
        for batches in logged(clicks, total):
            for value in rows.take(batches):
                out(value)
        for value in rows.flush():
            out(value)


def _own_folder(registry: Path, stack: ExitStack) -> Path:
    for leftover in registry.glob(f"{KEPT}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=KEPT, dir=registry))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _write_all(settings: Settings, out: BinaryIO) -> None:
    wanted = read_past(settings.registry_dir)
    if wanted is None:
        raise RegistryError(
            f"{settings.registry_dir} requests no past clicks",
            "it is a part of `springtide experiment start NAME --from clicks`",
        )
    try:
        run(settings, wanted, Log(settings.kafka), lambda value: out.write(framed(value)))
        out.write(END)
        out.flush()
    except BrokenPipeError:
        logger.warning("the trainer closed the pipe: it has ended")
        # Unwritten data is discarded: closing must not try again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Writes all micro-batches; returns the exit code."""
    # Output of libraries must not mix with the frames.
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)
        return run_part("past clicks", lambda settings: _write_all(settings, out), argv, logger)


if __name__ == "__main__":
    sys.exit(main())
