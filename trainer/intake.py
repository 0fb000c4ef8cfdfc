"""Iterates over the records of the training log, and selects their rows to learn from: new ones that are not masked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from state.errors import MicroBatchError, SaltMismatch, SpecMismatch
from state.features.mask import MaskAt
from state.log import PartitionBatch
from state.microbatch.batch import Logged, MicroBatch, gaps, in_log_time, masked, trained, trim
from state.microbatch.codec import decode
from state.positions import Source
from state.registry.log_line import WHOLE, LogLine, counts

BAD = (MicroBatchError, SpecMismatch, SaltMismatch)
"""The errors that concern a single record."""


@dataclass(frozen=True, slots=True)
class Intake:
    """The outcome of the rows of one record.

    Attributes:
        batch: The rows to learn from, in log time; may be empty.
        rows: Rows of the record to learn from; the others only update histories.
        masked: New rows that the mask excludes.
        gaps: Positions that no record covered: (source, expected, found).
        told_ms: The newest time of a row to learn from, of its event or its label; 0 without rows.
        other_features: New rows of a record of another feature spec or salt, which is skipped.
    """

    batch: MicroBatch
    marks: dict[Source, int]
    rows: int
    duplicate: int
    masked: int
    gaps: list[tuple[Source, int, int]]
    told_ms: int = 0
    other_features: int = 0


def never(spec: str) -> bool:
    """Never skips a record of another feature spec."""
    return False


def former(specs: Collection[str], steps: Callable[[], int]) -> Callable[[str], bool]:
    """Returns a predicate for the feature specs whose records a trainer skips.

    Those are `specs`, which upgrades replaced, and before the first of the trainer's steps all but its own spec.

    >>> [former({"ab"}, lambda: steps)(spec) for steps in (0, 9) for spec in ("ab", "cd")]
    [True, True, True, False]
    """
    return lambda spec: spec in specs or not steps()


class RecordFilter(NamedTuple):
    """Selects the rows of records that a trainer with these features learns from.

    Attributes:
        spec: Digest of the feature spec.
        salt: Fingerprint of the salt.
        is_former: Whether a record of another spec or salt is skipped; otherwise it is an error.
    """

    spec: str
    salt: str
    is_former: Callable[[str], bool] = never

    def take_in(
        self,
        value: bytes | None,
        marks: Mapping[Source, int],
        mask_at: MaskAt,
        where: str,
        line: LogLine = WHOLE,
        offset: int = 0,
    ) -> Intake:
        """Decodes a record, drops rows that `marks` covers, and excludes masked rows. Raises one of `BAD` for a bad record.

        A record outside `line`, or of a former spec or salt, has no rows left. `where` names the record in messages;
        `offset` is its offset.
        """
        try:
            batch = decode(value or b"")
        except MicroBatchError as error:
            raise MicroBatchError(f"{where}: {error.what}", error.do) from error
        if not counts(line, batch.header.log_epoch, offset):
            batch = replace(_without_rows(batch), header=replace(batch.header, ranges=()))
            return Intake(batch, dict(marks), 0, 0, 0, [])
        is_ours = self._is_ours(batch, where)
        unseen, after = trim(batch, marks)
        is_trained = trained(batch.kind)
        fresh = is_trained & unseen
        if not is_ours:
            # Sources without a mark get none: their clicks may still come, perhaps from the beginning.
            known = {source: after[source] for source in marks}
            rows, new = int(is_trained.sum()), int(fresh.sum())
            return Intake(
                _without_rows(batch), known, rows, rows - new, 0, gaps(batch.header, marks), other_features=new
            )
        mask = mask_at(batch.header.mask_generation)
        allowed = unseen & ~masked(batch, mask) if mask else unseen
        keep = is_trained & allowed
        # Log time is computed from all rows, and only then the rows to learn from are selected.
        learned = in_log_time(batch.take(allowed)).take(is_trained[allowed])
        return Intake(
            batch=replace(learned, logged=Logged(value or b"", keep)),
            marks=after,
            rows=int(is_trained.sum()),
            duplicate=int((is_trained & ~unseen).sum()),
            masked=int(fresh.sum()) - int(keep.sum()),
            gaps=gaps(batch.header, marks),
            told_ms=int((batch.at_ms + np.maximum(batch.delay_ms, 0))[keep].max()) if keep.any() else 0,
        )

    def _is_ours(self, batch: MicroBatch, where: str) -> bool:
        """Whether a record has the trainer's features and salt. Raises if it has others that are not former ones."""
        header = batch.header
        if header.spec != self.spec and not self.is_former(header.spec):
            raise SpecMismatch(
                f"{where} has feature spec {header.spec[:12]}, this trainer has {self.spec[:12]}",
                "give both the same release, [features] and events.actions: see `springtide upgrade --dry-run` with the stream's",
            )
        if header.salt != self.salt and not self.is_former(header.salt):
            raise SaltMismatch.between(where, header.salt, self.salt)
        return (header.spec, header.salt) == (self.spec, self.salt)


def _without_rows(batch: MicroBatch) -> MicroBatch:
    return batch.take(np.zeros(len(batch), np.bool_))


class LogRecord(NamedTuple):
    """A record of the training log, or the records `first` to `next` of a batch that cannot be read because of `damage`."""

    first: int
    next: int
    value: bytes | None = None
    damage: str = ""

    def require_whole(self, where: str) -> None:
        """Raises MicroBatchError if the record is damaged; `where` names its offset."""
        if self.damage:
            raise MicroBatchError(
                f"{where} cannot be read: {self.damage}",
                "check the broker's disk, and restore the topic if you can",
            )


def records_of(batch: PartitionBatch) -> Iterator[LogRecord]:
    """All records of a poll, in log order.

    >>> import numpy as np
    >>> at = np.array([4, 9])
    >>> batch = PartitionBatch("ab" * 16, 0, 4, 11, at, at, [None] * 2, [b"a", b"b"], corrupt=((5, 9, "checksum"),))
    >>> [(one.first, one.next, one.value) for one in records_of(batch)]
    [(4, 5, b'a'), (5, 9, None), (9, 10, b'b')]
    """
    records_read = zip(batch.offsets.tolist(), batch.values, strict=True)
    damaged = [LogRecord(first, after, damage=reason) for first, after, reason in batch.corrupt]
    if not damaged:
        yield from (LogRecord(offset, offset + 1, value) for offset, value in records_read)
        return
    yield from sorted([*damaged, *(LogRecord(offset, offset + 1, value) for offset, value in records_read)])
