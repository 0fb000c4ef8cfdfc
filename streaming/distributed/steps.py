"""The steps of a distributed job up to the rows: elements that read partitions, and a keyed step for each bucket of users."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any, cast

import apache_beam as beam
from apache_beam.coders import BytesCoder
from apache_beam.transforms.userstate import BagStateSpec, ReadModifyWriteStateSpec
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import Timestamp

from streaming.distributed.bucket import BucketRows
from streaming.distributed.buckets import decode, encode
from streaming.distributed.keeping import Cells, take_portion
from streaming.distributed.partitions import Partitions
from streaming.distributed.reading import Readings, SourceReading
from streaming.distributed.worker import JobPlan, JobWorker, worker_of

TOKEN_BYTES = 16


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
    """An element of the source: reads its partitions for a moment, gives each bucket its part, and puts off the rest.

    What it gives out and how far it is then are one checkpoint of the engine.
    """

    @beam.DoFn.unbounded_per_element()
    def process(
        self,
        element: int,
        tracker: Any = beam.DoFn.RestrictionParam(Readings()),  # noqa: B008  # Beam reads the default
    ) -> Iterator[Any]:
        """Gives `(bucket, bytes of a portion)`, in the order of the log for each bucket."""
        worker, begin = self.worker, tracker.current_restriction()
        partitions = self._open(worker, element, begin)
        try:
            portions, after = partitions.read()
        except BaseException:
            partitions.close()
            raise
        if after is None and partitions.at_end:
            partitions.close()
            tracker.try_claim(None)
            return
        if after is not None and not tracker.try_claim(after):
            # The engine puts off the rest itself, from where it knows us: what was read is read again.
            partitions.close()
            return
        worker.keep_reading(element, partitions)
        # Prism hands out what a key gets by timestamp.
        now = Timestamp.now()
        for bucket, portion in enumerate(portions):
            yield TimestampedValue((bucket, encode(portion)), now)
        tracker.defer_remainder()

    def _open(self, worker: JobWorker, element: int, begin: SourceReading) -> Partitions:
        held = cast(Partitions | None, worker.take_reading(element))
        if held is not None and held.at != begin:
            held.close()
            held = None
        return held or Partitions(worker, element, begin)


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
