"""Makes rows of past clicks again, for a trainer that learns them: `python -m streaming.past`, its child process.

The settings are those of the experiment's trainer; its registry holds the request (`state/experiments/past.py`). Past clicks
come from files or from the topic. From the topic it reads up to the cut, and starts early enough to fill the windows
of the first requested row.

Micro-batches go to the standard output, framed as in `state/microbatch/codec.py`; log lines go to the standard error.
The process exits with 0 after the last micro-batch, or when its reader has closed the pipe.

Histories begin empty and grow by the stream's own code. How clicks are batched changes no bit of a row, see
`streaming/profile.py`. So a row equals the stream's row of that click, as far as its history reaches back. Only
attributes differ: they are the ones known now.

Histories and attributes are kept in a temporary directory of that registry and deleted at the end. The next run
deletes what a killed process left.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

from prometheus_client import CollectorRegistry

from state.config.settings import Settings
from state.errors import RegistryError, UnknownTopic
from state.events.identity import load_salt
from state.experiments.past import Past, read_past
from state.features.spec import FeatureSpec
from state.history.store import HistoryStore
from state.layout import HISTORIES
from state.log import Log, PartitionBatch, Topics
from state.log.follow import read_to
from state.metrics import StreamMetrics
from state.microbatch.codec import END, framed
from state.positions import Source
from state.process.part import run_part
from state.process.wall_clock import wall_ms
from state.recordings.files import Recording, constants_of, find
from state.registry.log_line import WHOLE
from state.storage.shares import STREAM, map_bytes
from streaming.alignment import AlignedReader, Reached
from streaming.attributes import Join
from streaming.context import JobContext
from streaming.control import ControlWatch
from streaming.cut import Cut, Cutter, clocks_of, encode_cut
from streaming.open_shard import open_job, open_join
from streaming.rows import leave_out
from streaming.sample import recorded_batches, topic_of
from streaming.steps import rows_of
from streaming.sweeping import StreamSweep
from streaming.unlogged import commit_rows

POLL_S = 0.5
PROGRESS_S = 5.0
NEVER_MS = 1 << 62
KEPT = "past-"
logger = logging.getLogger(__name__)


class ClicksStretch(NamedTuple):
    """The part of the clicks topic that is read.

    Attributes:
        topic_id: The topic's id.
        begins: By partition its first offset.
        ends: By partition at least the offset after the last one; later clicks are learned from the training log.
    """

    topic_id: str
    begins: Mapping[int, int]
    ends: Mapping[int, int]

    @property
    def positions(self) -> int:
        """How many there are."""
        return sum(self.ends[one] - begin for one, begin in self.begins.items())

    def done(self, position: Callable[[int], int]) -> int:
        """How many are read if `position` gives each partition's position."""
        return sum(min(position(one), self.ends[one]) - begin for one, begin in self.begins.items())


def stretch_of(settings: Settings, past: Past, topics: Topics) -> ClicksStretch:
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
            # Of several buckets the furthest: the learner leaves out rows that are not before the cut.
            ends[source.partition] = max(mark, ends.get(source.partition, 0))
    if not ends:
        raise UnknownTopic(
            f"version {past.version} learned nothing of topic {topic} with id {topic_id}: it was made anew since then",
            "stop the experiment, and start another once the live trainer has learned from the new topic; or name files in retrain.files",
        )
    kept, since = topics.ends(topic), topics.offset_before(topic, max(0, past.begin_ms - reach_ms))
    begins = {one: min(max(since[one], kept[one][0]), end) for one, end in ends.items()}
    return ClicksStretch(topic_id, {one: at for one, at in begins.items() if at < ends[one]}, ends)


def of_topic(
    settings: Settings,
    stretch: ClicksStretch,
    log: Log,
    reached: Callable[[Source], Reached],
    reach: Callable[[int], None] = lambda _: None,
    elapsed: Callable[[], float] = time.monotonic,
) -> Iterator[list[PartitionBatch]]:
    """The clicks of a segment in the order in which they happened, and some after it.

    Args:
        settings: All settings.
        stretch: The segment of the topic.
        log: The log that has the topic.
        reached: Returns the time that a source has reached, once the yielded clicks are processed.
        reach: Called with the number of positions that are read.
        elapsed: Monotonic seconds.

    Raises:
        GapError: Clicks of it were deleted meanwhile.
        LogError: No record arrived from Kafka for a minute.
    """
    topic, begins = settings.kafka.clicks_topic, dict(stretch.begins)
    if not begins:
        return
    with log.reader(topic, sorted(begins), begins) as reader:
        aligned = AlignedReader(reader, lambda one: reached(Source(stretch.topic_id, one)), elapsed)

        def poll() -> list[PartitionBatch]:
            aligned.begin(settings.stream.cut_rows)
            return aligned.poll(POLL_S)

        for batches in read_to(reader, {one: stretch.ends[one] for one in begins}, poll=poll):
            yield batches
            reach(stretch.done(reader.position))


def recording_of(settings: Settings, past: Past) -> Recording:
    """The files of a past.

    Raises:
        SettingsError: There is no such file, or its name has no known format.
    """
    events = settings.events
    return Recording(find(past.files), events.columns, constants_of(events.constants, events))


def of_files(
    settings: Settings, recording: Recording, say: Callable[[str], None], reach: Callable[[int], None] = lambda _: None
) -> Iterator[list[PartitionBatch]]:
    """The clicks of files, ordered by time.

    Args:
        settings: All settings.
        recording: The files.
        say: Called with a message about stray rows.
        reach: Called with the number of rows that are read.

    Raises:
        SettingsError: The columns do not fit, or memory does not hold the files.
        UnreadableRecording: A file is cut or damaged.
    """
    done, most = 0, settings.stream.cut_rows
    for batches in recorded_batches(settings.events, recording, "memory", time.time(), say, lambda _: most):
        yield batches
        done += sum(map(len, batches))
        reach(done)


@dataclass(frozen=True, kw_only=True)
class PastContext(JobContext):
    """The parts that make rows of past clicks; the store is new, and deleted afterwards.

    Attributes:
        join: Attributes of users and items; None if none are configured.
        metrics: Not served.
    """

    join: Join | None
    metrics: StreamMetrics


class PastRows:
    """Makes micro-batches of clicks that arrive in the order of their partitions. One thread.

    Args:
        context: Makes their rows.
        salt: Fingerprint of the users' salt.
        begin_ms: Micro-batches that end before this log time are left out: they only fill histories.
    """

    def __init__(self, context: PastContext, salt: str, begin_ms: int) -> None:
        self._context, self._salt, self._begin_ms = context, salt, begin_ms
        self._cutter, self._sweep = (
            Cutter(context.settings.stream.cut_rows, NEVER_MS),
            StreamSweep(context, context.metrics),
        )

    def take(self, batches: list[PartitionBatch]) -> list[bytes]:
        """Takes the records of a poll; returns the micro-batches that are full.

        Raises:
            StoreError: The store of histories cannot take it.
            MicroBatchError: A row is larger than a record may be.
            SpringtideError: The follower of attributes failed.
        """
        context, now_ms = self._context, wall_ms()
        events = leave_out(context.parser.parse(batches), context.mask)
        made = rows_of(context, context.join, events, now_ms)
        rows = commit_rows(context.store, context.profiler, context.labels, made)
        self._sweep.note([rows])
        if (due_s := self._sweep.due_s) is not None and time.monotonic() >= due_s:
            self._sweep.look()
        return self._encoded(self._cutter.add(rows, now_ms))

    def flush(self) -> list[bytes]:
        """Returns the last micro-batches."""
        return self._encoded(self._cutter.flush(wall_ms()))

    def reached(self, source: Source) -> Reached:
        """The time that a source has reached."""
        return self._context.clock.reached(source)

    def _encoded(self, cuts: Sequence[Cut]) -> list[bytes]:
        context, stream = self._context, self._context.settings.stream
        limits = stream.cut_rows, stream.max_record_bytes, context.mask.generation
        wanted = [cut for cut in cuts if max((end for _, end in clocks_of(cut)), default=NEVER_MS) >= self._begin_ms]
        return [value for cut in wanted for value in encode_cut(cut, context.spec.digest, self._salt, *limits)]


class ReadingProgress:
    """Logs the progress of reading from time to time.

    Args:
        total: Positions to read; None if that is not known.
        elapsed: Monotonic seconds.
    """

    def __init__(self, total: int | None, elapsed: Callable[[], float] = time.monotonic) -> None:
        self._total, self._elapsed = total, elapsed
        self._said_s = elapsed()
        self._began: tuple[float, int] | None = None

    def reach(self, done: int) -> None:
        """Records that this many positions are read."""
        now_s = self._elapsed()
        # The first rows load the kernels: the pace is measured from there.
        self._began = began_s, began = self._began or (now_s, done)
        if now_s - self._said_s < PROGRESS_S or done == began:
            return
        self._said_s, rate = now_s, (done - began) / max(now_s - began_s, 1e-9)
        if self._total is None:
            logger.info("%s rows of files are read, %s/s", f"{done:,}", f"{rate:,.0f}")
        else:
            left = f"{(self._total - done) / rate:,.0f} s left"
            logger.info("%s of %s clicks are read, %s/s, %s", f"{done:,}", f"{self._total:,}", f"{rate:,.0f}", left)


def run(settings: Settings, wanted: Past, log: Log, out: Callable[[bytes], object]) -> None:
    """Writes the micro-batches of the past to `out`.

    Args:
        settings: Of the experiment's trainer: its registry, and its control, which names the masked users.
        wanted: The past.
        log: The log that has the clicks.
        out: Takes each encoded micro-batch.

    Raises:
        SpringtideError: Clicks, files or the disk cannot be used.
        OSError: The disk refused, or the reader has closed the pipe.
    """
    spec, salt = FeatureSpec.from_settings(settings), load_salt(settings.salt_path, create=False)
    with ExitStack() as stack:
        folder = _own_folder(settings.registry_dir, stack)
        histories = folder / HISTORIES
        histories.mkdir()
        store = HistoryStore(histories, spec.history, map_bytes(settings, STREAM, HISTORIES, histories))
        stack.callback(store.close)
        mask = ControlWatch(settings.registry_dir, WHOLE).desired.mask
        place = replace(settings, paths=replace(settings.paths, state=str(folder)))
        metrics = StreamMetrics(CollectorRegistry())
        join = open_join(place, salt, metrics, stack, reports=lambda _: lambda letters: None)
        if wanted.files:
            recording = recording_of(settings, wanted)
            topic_id, progress = topic_of(recording), ReadingProgress(None)
        else:
            with log.topics() as topics:
                stretch = stretch_of(settings, wanted, topics)
            topic_id, progress = stretch.topic_id, ReadingProgress(stretch.positions)
        job = open_job(settings, spec, store, salt, topic_id, mask)
        parts = {one.name: getattr(job, one.name) for one in fields(job)}
        rows = PastRows(PastContext(**parts, join=join, metrics=metrics), salt.fingerprint, wanted.begin_ms)
        clicks: Iterator[list[PartitionBatch]]
        if wanted.files:
            clicks = of_files(settings, recording, logger.info, progress.reach)
        else:
            clicks = of_topic(settings, stretch, log, rows.reached, progress.reach)
        for batches in clicks:
            for value in rows.take(batches):
                out(value)
        for value in rows.flush():
            out(value)


def _own_folder(registry: Path, stack: ExitStack) -> Path:
    """A directory that is deleted after the block; those of killed processes are deleted now."""
    for left in registry.glob(f"{KEPT}*"):
        shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=KEPT, dir=registry))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _write_all(settings: Settings, out: BinaryIO) -> None:
    wanted = read_past(settings.registry_dir)
    if wanted is None:
        raise RegistryError(
            f"{settings.registry_dir} wants no past clicks",
            "it is a part of `springtide experiment start NAME --from clicks`",
        )
    try:
        run(settings, wanted, Log(settings.kafka), lambda value: out.write(framed(value)))
        out.write(END)
        out.flush()
    except BrokenPipeError:
        logger.warning("nobody reads on: the trainer ended")
        # Unwritten data is discarded: closing must not try again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Writes all micro-batches; returns the exit code."""
    # Output of libraries must not come between the frames.
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)
        return run_part("past clicks", lambda settings: _write_all(settings, out), argv, logger)


if __name__ == "__main__":
    sys.exit(main())
