"""The steps of a distributed job up to the rows: one keyed by source, which reads, and one keyed by bucket of users."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any, cast

import apache_beam as beam
from apache_beam.coders import BytesCoder
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import BagStateSpec, ReadModifyWriteStateSpec, TimerSpec, on_timer
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import Timestamp

from streaming.distributed.bucket import BucketRows
from streaming.distributed.buckets import decode, encode
from streaming.distributed.keeping import Cells, take_portion
from streaming.distributed.partitions import Partitions
from streaming.distributed.reading import SourceReading
from streaming.distributed.worker import JobPlan, JobWorker, worker_of

TOKEN_BYTES = 16
LEAST_S = 0.01  # for a source whose turn comes when the moment is over


class WorkerStep(beam.DoFn):
    """A step that uses the process's worker.

    Args:
        plan: Of the job.
    """

    def __init__(self, plan: JobPlan) -> None:
        super().__init__()
        self._plan = plan

    @property
    def worker(self) -> JobWorker:
        """What this process owns."""
        return worker_of(self._plan)


class ReadPartitions(WorkerStep):
    """Reads the partitions of a source for a moment, gives each bucket its part, and does so again in the next bundle.

    Keyed by source. How far it is and the timer that calls it again are state of the
    key: with what it gives out they are one checkpoint of the engine.
    """

    READING = ReadModifyWriteStateSpec("reading", BytesCoder())
    AGAIN = TimerSpec("again", TimeDomain.REAL_TIME)

    def start_bundle(self) -> None:
        """A moment begins, which all sources of the bundle share."""
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
        """Gives `(bucket, bytes of a portion)`, in the order of the log for each bucket."""
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
        # Prism hands out what a key gets by timestamp.
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
