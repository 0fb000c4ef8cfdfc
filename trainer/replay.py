"""Replays records of the training log, segment by segment, exactly as the trainer learned them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from state.errors import GapError
from state.features.erased import Erased
from state.log import PartitionBatch, Reader, accepted_gaps
from state.log.accepted_gaps import Accepted
from state.log.follow import read_to
from state.positions import Source
from state.registry.manifest import LogRange, Manifest
from state.registry.segments import LogSegment
from trainer.intake import RecordFilter, former, records_of
from trainer.privacy import NoisePlace, environment_digest

if TYPE_CHECKING:
    from trainer.engine.step import Trainer

RECORDS = 64
PROGRESS_S = 1.0
ACCOUNT = ("rows", "duplicate", "masked")


class Replay:
    """Learns the records of the log again. Not thread-safe.

    Args:
        specs: Digests of the feature specs that upgrades replaced.
        lost: Erasures whose users' rows were removed from the base after it was made.

    Attributes:
        unlike: Rows of the users in `lost` that were learned before their erasure. With any the result differs.
    """

    def __init__(
        self,
        trainer: Trainer,
        base: Manifest | None,
        target: Manifest,
        specs: Collection[str] = frozenset(),
        lost: Erased = Erased.NOBODY,
    ) -> None:
        self._lost, self.unlike, self._log = lost, 0, target.log
        self._environment = environment_digest(target.environment)
        self._trainer = trainer
        self._where = f"{target.log.topic}:{target.log.partition}"
        self._filter = RecordFilter(target.spec, target.salt, former(specs, lambda: trainer.counters.steps))
        self.marks = {} if base is None else base.marks
        metrics = {} if base is None else base.metrics
        self.account = {name: int(metrics.get(f"account.{name}", 0)) for name in ACCOUNT}
        self.steps = self.rows = 0

    def run(self, reader: SegmentReader, segments: Sequence[LogSegment], say: Callable[[str], None]) -> None:
        """Learns the records of the segments, oldest first. Reports the progress and the remaining time once a second."""
        total, learned = sum(segment.next - segment.first for segment in segments), 0
        said_s = time.monotonic()
        began: tuple[float, int] | None = None
        try:
            for segment in segments:
                # The users whose erasure is at its start.
                if segment.forget:
                    self._trainer.forget(segment.forget.users.ids)
                for offset, value in reader.records(segment):
                    self._learn(offset, value, segment)
                    now_s, positions = time.monotonic(), learned + offset - segment.first
                    # The first step compiles, so the pace is measured from its end.
                    began = began_s, first = began or (now_s, positions)
                    if now_s - said_s < PROGRESS_S or positions <= first:
                        continue
                    said_s = now_s
                    left_s = (now_s - began_s) / (positions - first) * max(0, total - positions)
                    say(
                        f"verify: {positions} of {total} positions, {self.steps} steps, {self.rows:,} rows, "
                        f"{left_s:.0f} s left"
                    )
                learned += segment.next - segment.first
        finally:
            reader.close()

    def _learn(self, offset: int, value: bytes | None, segment: LogSegment) -> None:
        where = f"{self._where} offset {offset}"
        intake = self._filter.take_in(value, self.marks, segment.mask_at, where, segment.line, offset)
        self.marks = intake.marks
        self.rows += intake.rows
        for name in ACCOUNT:
            self.account[name] += getattr(intake, name)
        if len(intake.batch) == 0:
            return
        if self._trainer.guard.held:
            # Nothing is learned while training is held, so an operator must have resumed it here.
            self._trainer.guard = self._trainer.guard.released()
        self.unlike += int(self._lost.after(segment.erased).users.has(intake.batch.user).sum())
        mask = segment.mask_at(intake.batch.header.mask_generation)
        log = self._log
        noise_place = NoisePlace(
            log.topic_id, log.partition, offset, segment.epoch, segment.line, mask, self._environment
        )
        self._trainer.step(intake.batch, place=noise_place)
        self.steps += 1


class SegmentReader:
    """Reads segments of the training log, past the gaps and bad records that the trainer passed. Not thread-safe.

    After a rollback a segment begins before the end of the previous one; the log is
    then opened again at that offset.
    """

    def __init__(
        self, open_at: Callable[[int], Reader], log: LogRange, accepted: Sequence[Accepted], patience_s: float
    ) -> None:
        self._open_at, self._partition, self._source = open_at, log.partition, Source(log.topic_id, log.partition)
        self._accepted, self._patience_s = accepted, patience_s
        self._log: Reader | None = None

    def records(self, segment: LogSegment) -> Iterator[tuple[int, bytes | None]]:
        """Offset and value of each record of a segment, in order.

        Raises:
            GapError: Records were deleted.
            LogError: Records do not arrive in time.
            MicroBatchError: A record that was learned is damaged.
        """
        at = segment.first
        while at < segment.next:
            log = self._moved_to(self._past(at))
            try:
                for batches in read_to(log, {self._partition: segment.next}, RECORDS, self._patience_s):
                    for batch in batches:
                        yield from self._records(batch, segment.next)
                return
            except GapError as error:
                at = log.position(self._partition)
                if not any(self._past(at) == gap.next for gap in error.gaps):
                    raise

    def _records(self, batch: PartitionBatch, end: int) -> Iterator[tuple[int, bytes | None]]:
        for record in records_of(batch):
            if record.first < end and not accepted_gaps.left_out(self._accepted, self._source, record.first):
                record.require_whole(f"offset {record.first} of the training log")
                yield record.first, record.value

    def close(self) -> None:
        """Closes the log."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def _past(self, offset: int) -> int:
        return accepted_gaps.past(self._accepted, self._source, offset)

    def _moved_to(self, offset: int) -> Reader:
        if self._log is None or self._log.position(self._partition) != offset:
            self.close()
            self._log = self._open_at(offset)
        return self._log
